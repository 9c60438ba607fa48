"""Pictures as matplotlib Figures: rates, scores, embeddings and mistakes of a retrieval, and the curves of a run."""

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import pdist
from sklearn.manifold import TSNE
from torch import Tensor
from torch.nn import functional as F

import fonts
from common import safe_text

DPI = 110

# One style per curve. Colour-blind readers can distinguish the first six colours (Okabe & Ito 2008), and in grey print
# the lines, markers and hatches differ. Later lines are thinner, so that an equal one beneath still shows.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#5c5c00")
LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)), (0, (3, 1, 1, 1)))
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "oo", "++", "--")
WIDTHS = (3.2, 2.4, 1.8, 1.8, 1.4, 1.4, 1.4, 1.4)  # points
GREY = "#707070"  # of what is not measured

MARKED_FAR = (1e-2, 1e-3, 1e-4)  # the false accept rates that papers report
LONGEST_NAME = 40  # characters; a longer one would leave no room for the plot, or be cut
# The overall curves of a run: column of log.csv, less "ema_" -> label. The others that begin with top1_ are kinds.
OVERALL = {
    "top1": "what chooses the epoch",
    "top1_mean": "same, template mean",
    "top1_best": "same, template best",
    "top1_cross": "cross",
    "top1_clean": "clean",
}
RESOLVED_PAIRS = 10  # a rate that rests on fewer accepted pairs is mostly chance


def cmc(curves: dict[str, Sequence[float]]) -> Figure:
    """Cumulative match characteristic: share of queries whose true person is among the first k answers, over k.

    curves: title -> rates (0..1) at k = 1, 2, ...; the legend repeats the rate at rank 1. Lengths may differ.
    Raises ValueError if there is no curve or one is empty.
    """
    if not curves or not all(len(rates) for rates in curves.values()):
        raise ValueError(f"cmc: no rates to draw in {list(curves)}, expected one or more per title")
    figure, axes = _one_plot(len(curves))
    for style, (title, rates) in zip(_styles(), curves.items(), strict=False):
        percent = 100 * np.asarray(rates, float)
        label = f"{_plain(title)} (rank 1: {percent[0]:.1f} %)"
        every = -(-len(percent) // 20)  # at most 20 markers, so that they do not overlap
        (line,) = axes.plot(np.arange(1, len(percent) + 1), percent, label=label)
        line.set(color=style.color, linestyle=style.line, linewidth=style.width)
        line.set(marker=style.marker, markersize=6, markevery=every)
    _fit_percent(axes, [line.get_ydata() for line in axes.lines])
    last = max(len(rates) for rates in curves.values())
    axes.set_xlim(1 - 0.03 * last, last + 0.03 * last)
    ticks = MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]).tick_values(0, last)
    axes.set_xticks([1, *(int(tick) for tick in ticks if 1 < tick <= last)])
    axes.set(title="Queries whose true person is among the first k answers", xlabel="rank k", ylabel="queries, %")
    _legend(figure, axes, "outside lower center")
    return figure


def roc(curves: dict[str, tuple[Sequence[float], Sequence[float]]], pairs: int) -> Figure:
    """True accept rate over false accept rate: the shares of genuine and impostor pairs that reach a threshold.

    curves: title -> (FAR, TAR), each 0..1 and ascending, an entry per threshold; between two FAR the lower's TAR holds.
    pairs: impostor pairs behind FAR. Below 10 / pairs there is a shaded area and no curve: so few pairs are chance.
    Markers at FAR 1e-2, 1e-3, 1e-4. The legend repeats TAR at 1e-3, or at 1e-2 where there are too few pairs for that.
    Raises ValueError for no curve, no pair, an empty curve, or FAR and TAR of different length.
    """
    if not curves or pairs < 1:
        raise ValueError(f"roc: expected a curve and an impostor pair or more, got {len(curves)} and {pairs}")
    resolved = min(RESOLVED_PAIRS / pairs, 1)
    marked = [rate for rate in MARKED_FAR if rate >= resolved]
    in_legend = [rate for rate in (1e-3, 1e-2) if rate >= resolved][:1]
    figure, axes = _one_plot(len(curves))
    drawn = []
    for style, (title, (far, tar)) in zip(_styles(), curves.items(), strict=False):
        far, percent = np.asarray(far, float), 100 * np.asarray(tar, float)
        if len(far) == 0 or len(far) != len(percent):
            raise ValueError(f"roc: {title}: expected as many FAR as TAR, not 0; got {len(far)} and {len(percent)}")
        beyond = far > resolved  # TAR of a lower FAR, 0 included, counts where the resolved part starts
        x = np.concatenate([[resolved], far[beyond], [1]])
        y = np.concatenate([_at([resolved], far, percent), percent[beyond], percent[-1:]])
        values = zip(in_legend, _at(in_legend, far, percent), strict=True)
        label = _plain(title) + "".join(f" ({value:.1f} % at FAR {_power(rate)})" for rate, value in values)
        (steps,) = axes.plot(x, y, drawstyle="steps-post")
        (in_both,) = axes.plot([], [], marker=style.marker, markersize=7, label=label)  # for the legend
        for line in (steps, in_both):
            line.set(color=style.color, linestyle=style.line, linewidth=style.width)
        (dots,) = axes.plot(marked, _at(marked, far, percent), color=style.color, linestyle="", zorder=3)
        dots.set(marker=style.marker, markersize=8, markeredgecolor="white")
        drawn.append(y)
    _fit_percent(axes, drawn)
    axes.set(xscale="log", xlim=(resolved / 4, 1), title="Accepted pairs, over all thresholds")
    axes.set(xlabel="impostor pairs accepted (FAR), share", ylabel="genuine pairs accepted (TAR), %")
    axes.axvspan(resolved / 4, resolved, facecolor="#f0f0f0", edgecolor="#c8c8c8", hatch="//", linewidth=0)
    label = axes.text(resolved / 2, 0.5, f"fewer than {RESOLVED_PAIRS} of {pairs:,} pairs")
    label.set(transform=axes.get_xaxis_transform(), rotation=90, horizontalalignment="center")
    label.set(verticalalignment="center", bbox={"facecolor": "white", "linewidth": 0, "pad": 2})
    _legend(figure, axes, "outside lower center")
    return figure


def score_histogram(
    edges: Sequence[float], genuine: Sequence[int], impostor: Sequence[int], threshold: float | None, far: float | None
) -> Figure:
    """Histogram of the cosines of genuine and of impostor pairs, each in % of its own pairs.

    edges: (N + 1,) of N equally wide bins; genuine, impostor: (N,) pairs per bin. Empty bins at the ends are cut off.
    threshold: drawn as a line, labelled with its FAR (0..1); None leaves out the line or the label.
    Raises ValueError if the lengths do not fit.
    """
    edges, counts = np.asarray(edges, float), np.asarray([genuine, impostor], float)
    if counts.shape != (2, len(edges) - 1):
        sizes = f"{len(edges)} edges, {len(genuine)} genuine and {len(impostor)} impostor bins"
        raise ValueError(f"score_histogram: expected N + 1 edges of N bins, got {sizes}")
    figure, axes = _one_plot(3)
    percent = 100 * counts / counts.sum(1, keepdims=True).clip(1)  # (2, N)
    styles = (("genuine", COLOURS[0], "-", None), ("impostor", COLOURS[1], "--", "////"))
    for (name, colour, line, hatch), heights, count in zip(styles, percent, counts.sum(1), strict=True):
        label = f"{name} ({count:,.0f} pairs)"
        axes.stairs(heights, edges, fill=True, facecolor=colour + "38", edgecolor=colour, hatch=hatch, linewidth=0)
        axes.stairs(heights, edges, color=colour, linestyle=line, linewidth=2, label=label)
    filled = np.flatnonzero(counts.sum(0))
    low, high = edges[[filled[0], filled[-1] + 1]] if len(filled) else edges[[0, -1]]
    if threshold is not None:
        label = f"threshold {threshold:.3f}" + ("" if far is None else f" (FAR {_power(far)})")
        axes.axvline(threshold, color="black", linewidth=1.8, linestyle="-.", label=label)
        low, high = min(low, threshold), max(high, threshold)
    axes.set_xlim(low, high)
    axes.set_ylim(bottom=0)
    axes.set(title="Scores of genuine and impostor pairs", xlabel="cosine", ylabel="share of the pairs per bin, %")
    axes.grid(alpha=0.35)
    _legend(figure, axes, "outside lower center")
    return figure


def discard(left: dict[str, Sequence[float] | Tensor]) -> Figure:
    """Error versus discard (ISO/IEC 29794-1): the share of the wrong answers left, over the share of queries refused,
    lowest quality first. On the left all queries together, on the right each kind by itself.

    left: title -> counts of metrics.wrong_left, all queries together first. A title without wrong answers is left out.
    Grey: the ideal, which refuses wrong answers first, and chance. The legend gives the share left at 20 % refused.
    Raises ValueError if there is nothing to draw.
    """
    left = {title: np.asarray(counts, float) for title, counts in left.items() if counts[0] > 0}
    if not left:
        raise ValueError("discard: no wrong answer to draw")
    together, *kinds = left
    figure = Figure(figsize=(11, 4.6 + 0.22 * len(left)), layout="constrained", dpi=DPI)
    for axes, titles in zip(figure.subplots(1, 2), ([together], kinds or [together]), strict=True):
        for style, title in zip(_styles(), titles, strict=False):
            refused = np.linspace(0, 100, len(left[title]))
            share = 100 * left[title] / left[title][0]
            width = 2.2 if title == together else 1.4
            label = f"{_plain(title)} ({np.interp(20, refused, share):.0f} % left at 20 %)"
            axes.plot(refused, share, color=style.color, linestyle=style.line, linewidth=width, label=label)
        if titles == [together]:
            ideal = 100 * left[together][0] / (len(left[together]) - 1)  # so many are wrong, %
            axes.plot([0, ideal, 100], [100, 0, 0], "--", color=GREY, linewidth=1.2, label="ideal: wrong ones first")
            axes.plot([0, 100], [100, 0], ":", color=GREY, linewidth=1.2, label="by chance")
        axes.set(xlim=(0, 100), ylim=(0, 102), xlabel="queries refused, lowest quality first, %")
        axes.grid(alpha=0.35)
        _legend_below(axes, axes.lines, columns=1 + (len(titles) > 1 and max(map(len, titles)) <= 16))
    figure.axes[0].set(title="Wrong answers left", ylabel="of the wrong answers, %")
    figure.axes[1].set(title="The same within each kind")
    return figure


def bars(
    kinds: Sequence[str], evaluations: dict[str, Sequence[tuple[float | None, float | None, float | None]]]
) -> Figure:
    """A group of bars per kind, one bar per evaluation, from top to bottom in the order given.

    evaluations: title -> (rate, low, high) per kind, each 0..1; low and high: the ends of the 95 % interval, or None.
    A rate of None or NaN shows as a dash. Raises ValueError for no kind, no evaluation or one of another length.
    """
    lengths = {title: len(rates) for title, rates in evaluations.items()}
    if not kinds or set(lengths.values()) != {len(kinds)}:
        raise ValueError(f"bars: expected a rate for each of {len(kinds)} kinds, one or more, got {lengths}")
    height = 0.8 / len(evaluations)  # of the 1 between two kinds
    inches = 1.4 + len(kinds) * (0.12 + 0.22 * len(evaluations)) + 0.25 * len(evaluations)
    figure = Figure(figsize=(7, inches), layout="constrained", dpi=DPI)
    axes = figure.subplots()
    intervals = False
    for number, (title, rates) in enumerate(evaluations.items()):
        colour, hatch = COLOURS[number % len(COLOURS)], HATCHES[number % len(HATCHES)]
        places = np.arange(len(kinds)) + (number + 0.5) * height - 0.4
        values = 100 * np.array([rate for rate, _, _ in rates], float)
        bars = axes.barh(places, values, height, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5)
        bars.set_label(_plain(title))
        for place, value, (_, low, high) in zip(places, values, rates, strict=True):
            end = value
            if low is not None and high is not None and np.isfinite(value):
                # Rounding may put a bound slightly beyond the rate, and a negative length is an error.
                lengths = [[max(value - 100 * low, 0)], [max(100 * high - value, 0)]]
                axes.errorbar(value, place, xerr=lengths, color="black", linewidth=1, capsize=2)
                end, intervals = max(100 * high, value), True
            end, text = (end, f"{value:.1f}") if np.isfinite(value) else (0, "–")
            axes.text(end + 1, place, text, va="center", fontsize=9)
    axes.set_yticks(range(len(kinds)), [_plain(kind) for kind in kinds])
    axes.set(xlim=(0, 109), ylim=(len(kinds) - 0.5, -0.5), xticks=range(0, 101, 20))
    axes.set_xlabel("top-1, %" + (" (whiskers: 95 % interval)" if intervals else ""))
    axes.grid(axis="x", alpha=0.35)
    axes.set_axisbelow(True)
    _legend(figure, axes, "outside upper center")
    return figure


def tsne(
    embeddings: Tensor, labels: Sequence[int], is_query: Sequence[bool], persons: Sequence[str], seed: int
) -> Figure:
    """Two-dimensional t-SNE (van der Maaten & Hinton 2008) of embeddings (N, D) under cosine distance.

    labels: (N,) index into persons, gives the colour; is_query: (N,) cross for a distorted photo, dot for a clean one.
    Raises ValueError for fewer than 4 points.
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
        of_person, colour = labels == label, colours[label]
        x, y = points[of_person & is_query].T
        axes.scatter(x, y, marker="x", s=22, alpha=0.8, color=colour, linewidths=0.8)
        x, y = points[of_person & ~is_query].T
        axes.scatter(x, y, marker="o", s=60, color=colour, edgecolors="black", linewidths=0.8, label=_plain(person))
    axes.set(title=f"t-SNE of {len(persons)} persons: dot = clean, cross = distorted", xticks=[], yticks=[])
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    return figure


def similarity_matrix(cosine: Tensor, query_labels: Sequence[int], persons: Sequence[str], templates: Tensor) -> Figure:
    """Heat map of cosines (Q, P): a row per query, grouped by person, a column per person of the gallery.

    query_labels: (Q,) index into persons; templates: (P, D), of any norm. Rows and columns have the same order, with
    similar persons side by side: the leaves of the average-linkage tree of the templates, in the order that puts
    neighbours nearest (Bar-Joseph et al. 2001). A good model shows a bright staircase on a dark ground.
    """
    order = np.arange(len(persons))
    if len(persons) > 2:
        # Of unit vectors the squared distance is 2 - 2 cosine, and unlike 1 - cosine never negative by rounding.
        order = leaves_list(linkage(pdist(F.normalize(templates).cpu().numpy()), "average", optimal_ordering=True))
    place = np.argsort(order)  # of each person in `order`
    of_query = place[np.asarray(query_labels)]
    counts = np.bincount(of_query, minlength=len(persons))
    ends = np.cumsum(counts)
    names, has_query = [_plain(persons[label]) for label in order], counts > 0
    figure = Figure(figsize=(8, 7.5), layout="constrained", dpi=DPI)
    axes = figure.subplots()
    heat_map = axes.imshow(
        cosine.cpu().numpy()[np.argsort(of_query, kind="stable")][:, order],
        aspect="auto",
        cmap="viridis",
        vmin=-0.2,
        vmax=1,
        interpolation="nearest",
    )
    axes.hlines(ends[:-1] - 0.5, -0.5, len(persons) - 0.5, color="white", linewidth=0.4)
    size = 9 if len(persons) <= 24 else 7
    axes.set_xticks(range(len(persons)), names, rotation=90, fontsize=size)
    rows = [name for name, shown in zip(names, has_query, strict=True) if shown]
    axes.set_yticks((ends - counts / 2 - 0.5)[has_query], rows, fontsize=size)
    axes.set(
        title="Cosine similarity, similar persons side by side",
        xlabel="person in the gallery",
        ylabel="distorted queries",
    )
    figure.colorbar(heat_map, shrink=0.6, label="cosine")
    return figure


def mistakes_sheet(rows: Sequence[tuple[Sequence[Image.Image], Sequence[tuple[str, str]]]], title: str) -> Figure:
    """A row per mistake: query, photo of the true person, photo of the predicted one, each with its caption.

    rows: three images and three captions of two lines each; none at all gives a sheet that says so.
    """
    figure = Figure(figsize=(6.6, 2.25 * max(len(rows), 0.3) + 0.7), layout="constrained", dpi=DPI)
    figure.suptitle(title, fontsize=10)
    if not rows:
        figure.text(0.5, 0.3, "no mistakes", ha="center", va="center")
        return figure
    grid = figure.subplots(len(rows), 3, squeeze=False)
    for axes_row, (images, captions) in zip(grid, rows, strict=True):
        for axes, image, caption in zip(axes_row, images, captions, strict=True):
            axes.imshow(image)
            axes.set_xlabel("\n".join(map(_plain, caption)), fontsize=7)
            axes.set(xticks=[], yticks=[])
    for axes, head in zip(grid[0], ("query", "true person", "predicted person"), strict=True):
        axes.set_title(head, fontsize=9)
    return figure


def curves(history: Sequence[dict], steps: Sequence[dict]) -> Figure:
    """A run at a glance: loss and learning rate per step, top-1 per epoch, overall and per kind.

    history: rows of log.csv, with epoch, top1 (what chooses the epoch), top1_mean, top1_best, top1_cross, top1_clean,
    top1_<kind>, and the same of the averaged weights with ema_ in front; steps: rows of steps.csv, as text.
    """
    epochs = pd.DataFrame(history)
    columns = [name for name in epochs.columns if name.removeprefix("ema_").startswith("top1")]
    overall = [name for name in columns if name.removeprefix("ema_") in OVERALL]
    kinds = [name for name in columns if name not in overall and name.removeprefix("ema_").startswith("top1_")]
    figure = Figure(figsize=(15, 4.4 + 0.22 * max(len(overall), len(kinds))), layout="constrained", dpi=DPI)
    loss_axes, overall_axes, kind_axes = figure.subplots(1, 3)
    loss_axes.set(title="loss and learning rate per step", xlabel="step")
    loss_axes.xaxis.get_major_locator().set_params(integer=True)
    if steps:
        _draw_steps(loss_axes, pd.DataFrame(steps).astype(float))
    for axes, shown in ((overall_axes, overall), (kind_axes, kinds)):
        names = list(dict.fromkeys(name.removeprefix("ema_") for name in shown))
        styles = dict(zip(names, _styles(), strict=False))
        for column in shown:
            name = column.removeprefix("ema_")
            style, averaged = styles[name], column != name
            label = "averaged: " * averaged + _plain(OVERALL.get(name, name.removeprefix("top1_")))
            (line,) = axes.plot(epochs["epoch"], 100 * epochs[column], label=label)
            line.set(color=style.color, linestyle=style.line, linewidth=2.4 if name == "top1" else 1.3)
            line.set(marker=style.marker, markersize=5, markerfacecolor="white" if averaged else style.color)
        axes.grid(alpha=0.3)
        axes.set_ylim(top=101)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="epoch", ylabel="top-1, %")
        _legend_below(axes, axes.lines)
    overall_axes.set(title="top-1 of all, by protocol and template")
    kind_axes.set(title="top-1 by kind, protocol same")
    return figure


def _draw_steps(axes: Axes, steps: pd.DataFrame) -> None:
    """The loss with its trend, and on a second axis the learning rates."""
    lines = axes.plot(steps["update"], steps["loss"], color="#b0b0b0", linewidth=0.6, label="loss")
    if len(steps) >= 20:  # the trend under the noise of single batches; a skipped step's NaN leaves a gap
        window = max(5, len(steps) // 50)
        trend = steps["loss"].rolling(window).mean()
        lines += axes.plot(
            steps["update"], trend, color="#0072b2", linewidth=1.8, label=f"loss, mean of {window} steps"
        )
    rates = steps.filter(regex="_lr$")
    rate_axes = axes.twinx()
    rate_axes.tick_params(colors="#d55e00")
    for name, line in zip(rates, LINES[1:], strict=False):
        label = name.removesuffix("_lr").replace("_", " ") + " learning rate (right)"
        lines += rate_axes.plot(steps["update"], rates[name], linestyle=line, color="#d55e00", linewidth=1, label=label)
    if (rates > 0).any(axis=None):
        rate_axes.set_yscale("log")  # head and backbone differ by orders of magnitude
    axes.set_ylabel("loss")
    _legend_below(axes, lines)


def _one_plot(legend_rows: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.2 + 0.22 * legend_rows), layout="constrained", dpi=DPI)
    return figure, figure.subplots()


def _legend(figure: Figure, axes: Axes, place: str) -> None:
    """Outside of the axes, where it hides nothing; in one row if the labels are short, else in one column."""
    handles, labels = axes.get_legend_handles_labels()
    columns = len(labels) if sum(len(label) + 8 for label in labels) <= 90 else 1
    figure.legend(handles, labels, loc=place, ncols=columns, handlelength=3.5, frameon=False)


def _legend_below(axes: Axes, lines: Sequence[Line2D], columns: int = 1) -> None:
    """Under the axes, where it hides no curve."""
    if lines:
        axes.figure.get_layout_engine().set(h_pad=0.1)  # inches: it places such a legend only within a few pixels
        axes.legend(
            handles=lines,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
            ncols=columns,
            handlelength=3.5,
            frameon=False,
        )


class Style(NamedTuple):
    """Of one curve: width in points, the others as matplotlib names them."""

    color: str
    line: str | tuple
    width: float
    marker: str


def _styles() -> Iterator[Style]:
    """The style of the first, second, ... curve; the ninth has that of the first."""
    return map(Style, cycle(COLOURS), cycle(LINES), cycle(WIDTHS), cycle(MARKERS))


def _plain(name: str) -> str:
    """`name` so that matplotlib shows it unchanged, but for what cannot be shown and for the end of a very long one.

    Without this $...$ would be a formula, a leading _ would hide the name in legends, and its letters might be boxes.
    """
    shown = safe_text(name)
    fonts.show_in_plots(shown)
    shown = shown if len(shown) <= LONGEST_NAME else f"{shown[: LONGEST_NAME - 1]}…"
    return (" " if shown.startswith("_") else "") + shown.replace("$", r"\$")


def _power(rate: float) -> str:
    """0.001 -> 1e-3, 0.00098 -> 9.8e-4, 0 -> 0."""
    digits, exponent = f"{rate:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}" if rate else "0"


def _fit_percent(axes: Axes, values: Sequence[np.ndarray]) -> None:
    """End the y axis near the lowest and highest of `values` (0..100, or NaN), so that similar curves can be seen."""
    values = np.concatenate(values)
    high = np.nanmax(values)
    low = max(min(np.nanmin(values), high - 1), 0)  # a narrower range would blow up noise
    span = max(high - low, 1)
    axes.set_ylim(low - 0.08 * span, low + 1.08 * span)  # less than a tick beyond the ends: none above 100
    axes.grid(alpha=0.35)


def _at(rates: Sequence[float], far: np.ndarray, tar: np.ndarray) -> np.ndarray:
    """TAR of the last threshold whose FAR is at most the rate, rounding aside; NaN where there is none."""
    return np.append(np.nan, tar)[np.searchsorted(far, np.asarray(rates) * (1 + 1e-9), side="right")]
