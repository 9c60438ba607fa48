"""Pictures of a retrieval: t-SNE, similarity matrix and the sheet of mistakes. Each returns a matplotlib Figure."""

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
