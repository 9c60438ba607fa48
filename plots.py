"""Pictures of a retrieval (t-SNE, similarity matrix, the sheet of mistakes) and a run's curves: matplotlib Figures."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from sklearn.manifold import TSNE
from torch import Tensor

DPI = 110


def tsne(
    embeddings: Tensor, labels: Sequence[int], is_query: Sequence[bool], persons: Sequence[str], seed: int
) -> Figure:
    """Two-dimensional t-SNE (van der Maaten & Hinton 2008) of embeddings (N, D) under cosine distance.

    labels: (N,) index into persons, gives the colour; is_query: (N,) cross for a distorted photo, dot for a clean one.
    Raises ValueError for fewer than 4 points, too few to lay out.
    """
    if len(embeddings) < 4:
        raise ValueError(f"t-SNE needs at least 4 photos, got {len(embeddings)}")
    perplexity = min(30, (len(embeddings) - 1) / 3)  # sklearn wants fewer neighbours than points
    points = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=seed).fit_transform(
        embeddings.numpy()
    )
    labels, is_query = np.asarray(labels), np.asarray(is_query, bool)
    figure = Figure(figsize=(9, 7), layout="constrained", dpi=DPI)
    axes = figure.subplots()
    colours = colormaps["turbo"](np.linspace(0.03, 0.97, len(persons)))
    for label, person in enumerate(persons):
        of_person, style = labels == label, {"color": colours[label], "linewidths": 0.8}
        axes.scatter(*points[of_person & is_query].T, marker="x", s=22, alpha=0.8, **style)
        axes.scatter(*points[of_person & ~is_query].T, marker="o", s=60, edgecolors="black", label=person, **style)
    axes.set(title=f"t-SNE of {len(persons)} persons: dot = clean, cross = distorted", xticks=[], yticks=[])
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, frameon=False)
    return figure


def similarity_matrix(cosine: Tensor, query_labels: Sequence[int], persons: Sequence[str]) -> Figure:
    """Heat map of cosines (Q, P): a row per query, grouped by person, a column per person's mean template.

    query_labels: (Q,) index into persons. A good model shows a bright staircase on a dark ground.
    """
    order = np.argsort(np.asarray(query_labels), kind="stable")
    counts = np.bincount(np.asarray(query_labels), minlength=len(persons))
    ends = np.cumsum(counts)
    figure = Figure(figsize=(8, 7.5), layout="constrained", dpi=DPI)
    axes = figure.subplots()
    shown = axes.imshow(
        cosine.numpy()[order], aspect="auto", cmap="viridis", vmin=-0.2, vmax=1, interpolation="nearest"
    )
    axes.hlines(ends[:-1] - 0.5, -0.5, len(persons) - 0.5, color="white", linewidth=0.4)
    axes.set_xticks(range(len(persons)), persons, rotation=90, fontsize=6)
    axes.set_yticks(ends - counts / 2 - 0.5, persons, fontsize=6)
    axes.set(
        title="Cosine similarity", xlabel="person in the gallery (mean of clean photos)", ylabel="distorted queries"
    )
    figure.colorbar(shown, shrink=0.6)
    return figure


def mistakes_sheet(rows: Sequence[tuple[Sequence[Image.Image], Sequence[str]]]) -> Figure:
    """A row per mistake: query, photo of the true person, photo of the predicted one, each with its caption.

    rows: three images and three captions each; none at all gives a sheet that says so.
    """
    if not rows:
        figure = Figure(figsize=(5, 1), dpi=DPI)
        figure.text(0.5, 0.5, "no mistakes", ha="center", va="center")
        return figure
    figure = Figure(figsize=(6.6, 2.1 * len(rows) + 0.4), layout="constrained", dpi=DPI)
    grid = figure.subplots(len(rows), 3, squeeze=False)
    for axes_row, (images, captions) in zip(grid, rows, strict=True):
        for axes, image, caption in zip(axes_row, images, captions, strict=True):
            axes.imshow(image)
            axes.set_xlabel(caption, fontsize=7)
            axes.set(xticks=[], yticks=[])
    for axes, title in zip(grid[0], ("query", "true person", "predicted person"), strict=True):
        axes.set_title(title, fontsize=9)
    return figure


def curves(history: Sequence[dict], steps: Sequence[dict]) -> Figure:
    """A run at a glance: loss and learning rate per step, top-1 per epoch, overall and per kind.

    history: rows of log.csv, with epoch, top1_mean, top1_best, top1_<kind>; steps: rows of steps.csv, as text.
    """
    figure = Figure(figsize=(13, 4), layout="constrained", dpi=DPI)
    loss_axes, top1_axes, kind_axes = figure.subplots(1, 3)

    update = [int(row["update"]) for row in steps]
    loss = np.array([float(row["loss"]) for row in steps])
    loss_axes.plot(update, loss, color="#b0b0b0", linewidth=0.6)
    if len(loss) >= 20:  # the trend under the noise of single batches; a skipped step's NaN leaves a gap
        width = max(5, len(loss) // 50)
        smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
        loss_axes.plot(update[width - 1 :], smooth, color="#0072b2", linewidth=1.8)
    loss_axes.set(title="loss per step", xlabel="step")
    rates = [name for name in (steps[0] if steps else {}) if name.endswith("_lr")]
    rate_axes = loss_axes.twinx()
    for name, style in zip(rates, ("--", ":"), strict=False):
        values = [float(row[name]) for row in steps]
        rate_axes.plot(update, values, style, color="#d55e00", linewidth=1, label=name.replace("_", " "))
    if any(float(row[name]) > 0 for row in steps for name in rates):
        rate_axes.set_yscale("log")  # head and backbone differ by orders of magnitude
    loss_axes.xaxis.get_major_locator().set_params(integer=True)
    rate_axes.tick_params(colors="#d55e00")
    if rates:
        rate_axes.legend(loc="upper right", frameon=False, fontsize=8)

    epoch = [row["epoch"] for row in history]
    names = [name for row in history for name in row if "top1_" in name]
    for name in dict.fromkeys(names):
        overall = name.endswith(("top1_mean", "top1_best"))
        axes, style = (top1_axes, "-") if overall else (kind_axes, "-")
        if name.startswith("ema_"):
            style = "--"  # of the averaged weights
        values = [100 * row.get(name, np.nan) for row in history]
        label = name.replace("ema_", "averaged: ").replace("top1_", "")
        axes.plot(epoch, values, style, marker="o", markersize=3, linewidth=1.2, label=label)
    top1_axes.set(title="top-1, %, by template", xlabel="epoch")
    kind_axes.set(title="top-1, %, by kind", xlabel="epoch")
    for axes in (top1_axes, kind_axes):
        axes.grid(alpha=0.3)
        axes.set_ylim(top=101)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    return figure
