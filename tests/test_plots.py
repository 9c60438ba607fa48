import math
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import fonts
import plots

FAR, TAR = [0.0, 0.0, 0.0005, 0.005, 0.02, 1.0], [0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
BEFORE = [(0.5, 0.4, 0.6), (0.2, None, None)]
AFTER = [(1.0, 0.9, 1.0 - 1e-12), (0.25, 0.2, 0.32)]  # a bound that rounding put below its rate


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def drawn(figure):
    """The figure after layout: positions are final, and a text that matplotlib cannot set has raised."""
    figure.draw_without_rendering()
    return figure


def names(labels) -> list[str]:
    return [label.get_text() for label in labels]


@pytest.mark.parametrize(
    "draw, message",
    [
        (lambda: plots.cmc({"a": [0.5], "b": []}), "cmc: no rates to draw"),
        (lambda: plots.roc({}, 10), "got 0 and 10"),
        (lambda: plots.roc({"a": (FAR, TAR)}, 0), "got 1 and 0"),
        (lambda: plots.roc({"a": ([0.1, 1], [1])}, 10), "roc: a: .* got 2 and 1"),
        (lambda: plots.score_histogram([0, 1], [1, 2], [1, 2], None, None), "2 edges, 2 genuine and 2 impostor bins"),
        (lambda: plots.discard({"all": [0, 0]}), "no wrong answer to draw"),
        (lambda: plots.bars(["x"], {}), "each of 1 kinds"),
        (lambda: plots.bars(["x", "y"], {"a": BEFORE, "b": AFTER[:1]}), "each of 2 kinds"),
        (lambda: plots.tsne(torch.eye(3), [0, 1, 2], [False] * 3, list("abc"), 0), "at least 4 photos, got 3"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_cmc_draws_percent_over_ranks_from_one_and_its_legend_gives_rank_1():
    figure = plots.cmc({"before": [0.5, 0.75, 1.0], "after": [0.9, 0.95]})
    before, after = figure.axes[0].lines
    assert before.get_xdata().tolist() == [1, 2, 3] and before.get_ydata().tolist() == [50, 75, 100]
    assert after.get_xdata().tolist() == [1, 2] and after.get_ydata().tolist() == pytest.approx([90, 95])
    assert legend(figure) == ["before (rank 1: 50.0 %)", "after (rank 1: 90.0 %)"]


@pytest.mark.parametrize("rates", [[0.995, 0.998, 1.0], [1.0], [0.2, 0.9], [0.0, 0.004], [0.9] * 222])
def test_cmc_ticks_are_whole_ranks_and_its_y_axis_fits_the_rates_without_a_tick_above_100(rates):
    axes = drawn(plots.cmc({"a": rates})).axes[0]
    ticks, (low, high) = axes.get_xticks(), axes.get_ylim()
    assert ticks[0] == 1 and max(ticks) <= len(rates) and len(ticks) <= 15
    assert all(tick == round(tick) for tick in ticks) and len(set(ticks)) == len(ticks)
    assert low < 100 * min(rates) and high > 100 * max(rates)
    assert high - low <= 1.2 * max(100 * max(rates) - 100 * min(rates), 1)
    assert not [tick for tick in axes.get_yticks() if 100 + 1e-9 < tick <= high]


def test_eight_evaluations_differ_in_colour_line_and_marker_a_ninth_is_drawn_and_later_lines_are_thinner():
    lines = plots.cmc({f"run {number}": [0.9, 1.0] for number in range(9)}).axes[0].lines
    styles = [(line.get_color(), str(line._dash_pattern), line.get_marker()) for line in lines]
    assert len(styles) == 9 and [len(set(values)) for values in zip(*styles[:8], strict=True)] == [8, 8, 8]
    widths = [line.get_linewidth() for line in lines[:8]]
    assert widths[0] > widths[1] > widths[2] and widths == sorted(widths, reverse=True)


def test_roc_starts_at_ten_impostor_pairs():
    figure = plots.roc({"a": (FAR, TAR)}, pairs=100_000)
    step = figure.axes[0].lines[0]
    assert step.get_xdata().tolist() == [1e-4, 0.0005, 0.005, 0.02, 1.0, 1.0]  # FAR = 0 has no place on a log axis
    assert step.get_ydata().tolist() == pytest.approx([30, 50, 70, 90, 100, 100])
    assert step.get_drawstyle() == "steps-post" and figure.axes[0].get_xscale() == "log"


@pytest.mark.parametrize(
    "pairs, rates, label",
    [
        (100_000, {1e-2: 70, 1e-3: 50, 1e-4: 30}, "a (50.0 % at FAR 1e-3)"),
        (10_000, {1e-2: 70, 1e-3: 50}, "a (50.0 % at FAR 1e-3)"),
        (9_999, {1e-2: 70}, "a (70.0 % at FAR 1e-2)"),
        (500, {}, "a"),
        (5, {}, "a"),
    ],
)
def test_roc_marks_the_rates_of_ten_pairs_or_more_and_shades_the_others(pairs, rates, label):
    figure = drawn(plots.roc({"a": (FAR, TAR)}, pairs))
    _, _, markers = figure.axes[0].lines
    assert dict(zip(markers.get_xdata(), markers.get_ydata(), strict=True)) == pytest.approx(rates)
    assert legend(figure) == [label] and names(figure.axes[0].texts) == [f"fewer than 10 of {pairs:,} pairs"]
    (shade,), resolved = figure.axes[0].patches, min(10 / pairs, 1)
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == pytest.approx((resolved / 4, resolved))
    assert figure.axes[0].get_xlim() == pytest.approx((resolved / 4, 1))


def test_roc_draws_no_rate_below_the_first_threshold_but_allows_for_rounding():
    figure = plots.roc({"a": ([0.5, 1.0], [0.8, 1.0])}, pairs=1000)
    step, _, markers = figure.axes[0].lines
    assert math.isnan(step.get_ydata()[0]) and step.get_ydata()[1] == 80 and np.isnan(markers.get_ydata()).all()
    assert drawn(figure).axes[0].get_ylim()[0] > 70
    rounded = plots.roc({"a": ([0.0, 0.01 * (1 + 1e-12), 1.0], [0.2, 0.6, 1.0])}, pairs=1000)
    assert rounded.axes[0].lines[2].get_ydata().tolist() == pytest.approx([60])


def outlines(figure) -> dict:
    """Label -> heights and line style of the two outlines."""
    patches = [patch for patch in figure.axes[0].patches if patch.get_label()]
    return {patch.get_label(): (patch.get_data().values.tolist(), patch.get_linestyle()) for patch in patches}


def test_histogram_shows_each_side_as_shares_of_its_own_pairs():
    figure = plots.score_histogram([-1, -0.5, 0, 0.5, 1], [0, 1, 1, 2], [0, 750, 250, 0], 0.25, 1e-3)
    assert outlines(figure) == {
        "genuine (4 pairs)": ([0, 25, 25, 50], "-"),
        "impostor (1,000 pairs)": ([0, 75, 25, 0], "--"),
    }
    fills = {to_hex(p.get_edgecolor()): p.get_hatch() for p in figure.axes[0].patches if p.get_fill()}
    assert len(fills) == 2 and len(set(fills.values())) == 2  # distinct without colour
    flat = drawn(plots.score_histogram([0, 0.5, 1], [0, 0], [0, 0], None, None))
    assert [heights for heights, _ in outlines(flat).values()] == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    "threshold, far, label",
    [
        (0.25, 9.8e-4, "threshold 0.250 (FAR 9.8e-4)"),
        (0.25, 0.0, "threshold 0.250 (FAR 0)"),
        (0.25, None, "threshold 0.250"),
        (None, None, "impostor (6 pairs)"),
    ],
)
def test_histogram_draws_a_threshold_with_its_false_accept_rate_where_they_are_known(threshold, far, label):
    figure = plots.score_histogram(torch.linspace(-1, 1, 5), torch.tensor([0, 0, 1, 2]), [1, 5, 0, 0], threshold, far)
    assert [line.get_xdata()[0] for line in figure.axes[0].lines] == ([threshold] if threshold else [])
    assert legend(figure)[-1] == label


def test_histogram_cuts_off_empty_bins_but_not_the_threshold():
    edges, genuine, impostor = [-1, -0.5, 0, 0.5, 1], [0, 0, 3, 0], [0, 2, 0, 0]
    assert plots.score_histogram(edges, genuine, impostor, None, None).axes[0].get_xlim() == (-0.5, 0.5)
    assert plots.score_histogram(edges, genuine, impostor, 0.7, 0.0).axes[0].get_xlim() == (-0.5, 0.7)


def test_discard_draws_the_wrong_answers_left_with_the_ideal_and_chance_and_the_kinds_beside():
    figure = drawn(plots.discard({"all": [4, 3, 2, 2, 1, 0], "fog": [1, 0, 0], "rain": [3, 3, 2, 1], "_sun": [0, 0]}))
    together, kinds = figure.axes
    everything, ideal, chance = together.lines
    assert everything.get_ydata().tolist() == [100, 75, 50, 50, 25, 0]
    assert everything.get_xdata().tolist() == pytest.approx([0, 20, 40, 60, 80, 100])
    assert everything.get_label() == "all (75 % left at 20 %)"
    assert ideal.get_xydata().tolist() == [[0, 100], [80, 0], [100, 0]]  # 4 of 5 are wrong
    assert chance.get_xydata().tolist() == [[0, 100], [100, 0]]
    assert [line.get_label() for line in kinds.lines] == ["fog (60 % left at 20 %)", "rain (100 % left at 20 %)"]
    assert [len(axes.lines) for axes in plots.discard({"all": [2, 1, 0]}).axes] == [3, 3]  # without kinds: all in both


def test_bars_stand_in_a_group_per_kind_from_the_top_with_whiskers_where_there_is_an_interval():
    axes = drawn(plots.bars(["rainy", "all"], {"before": BEFORE, "after": AFTER})).axes[0]
    before, after = (c for c in axes.containers if c.get_label() in ("before", "after"))
    assert [bar.get_width() for bar in before] == [50, 20] and [bar.get_width() for bar in after] == [100, 25]
    spans = [(bar.get_y(), bar.get_y() + bar.get_height()) for pair in zip(before, after, strict=True) for bar in pair]
    assert np.ravel(spans).tolist() == pytest.approx([-0.4, 0, 0, 0.4, 0.6, 1, 1, 1.4])  # touch within a group only
    assert axes.yaxis_inverted() and axes.get_xlim()[0] == 0
    assert [(t.get_text(), t.get_position()[1]) for t in axes.get_yticklabels()] == [("rainy", 0), ("all", 1)]
    assert before[0].get_hatch() != after[0].get_hatch() and before[0].get_facecolor() != after[0].get_facecolor()
    whiskers = [path.vertices.tolist() for c in axes.collections for path in c.get_paths()]
    assert np.allclose(whiskers, [[[40, -0.2], [60, -0.2]], [[90, 0.2], [100, 0.2]], [[20, 1.2], [32, 1.2]]])
    assert axes.get_xlabel() == "top-1, % (whiskers: 95 % interval)"
    texts = sorted(axes.texts, key=lambda text: text.get_position()[1])  # from the top
    for text, value, end in zip(texts, ("50.0", "100.0", "20.0", "25.0"), (60, 100, 20, 32), strict=True):
        assert text.get_text() == value and end < text.get_position()[0] < end + 3  # behind bar and whisker
        assert text.get_window_extent().x1 < axes.get_window_extent().x1


def test_bars_show_a_dash_for_a_missing_rate_and_no_whisker_for_a_missing_interval():
    figure = drawn(plots.bars(["a", "b", "c"], {"x": [(math.nan, 0, 1), (None, None, None), (0.5, None, None)]}))
    axes = figure.axes[0]
    assert names(axes.texts) == ["–", "–", "50.0"] and not axes.collections
    assert axes.get_xlabel() == "top-1, %" and legend(figure) == ["x"]


def at_degrees(*degrees) -> torch.Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_similar_persons_are_side_by_side_in_columns_and_rows_alike_and_cosines_move_with_them():
    templates = at_degrees(70.0, 160.0, 0.0, 90.0)
    norms = torch.tensor([5.0, 5.0, 1.0, 1.0])[:, None]  # must not matter
    labels = [0, 1, 2, 0, 1, 2]  # d has no query
    figure = plots.similarity_matrix(templates[labels] @ templates.T, labels, list("abcd"), norms * templates)
    axes = figure.axes[0]
    order = "".join(names(axes.get_xticklabels()))
    assert order in ("cadb", "bdac")  # along the circle
    assert "".join(names(axes.get_yticklabels())) == order.replace("d", "")
    assert axes.get_yticks().tolist() == [0.5, 2.5, 4.5]
    places = ["abcd".index(person) for person in order]
    rows = [place for place in places for _ in range(2) if place != 3]
    assert np.array_equal(np.asarray(axes.images[0].get_array()), (templates[rows] @ templates.T)[:, places])


@pytest.mark.parametrize("templates", [torch.eye(3)[:1], torch.eye(3)[:2], at_degrees(0, 0, 180, 0)])
def test_the_similarity_matrix_takes_few_equal_and_opposite_templates(templates):
    persons = list("abcd")[: len(templates)]
    figure = plots.similarity_matrix(templates @ templates.T, list(range(len(persons))), persons, templates)
    order = "".join(names(drawn(figure).axes[0].get_xticklabels()))
    assert sorted(order) == persons and order.find("c") in (-1, 0, 3)  # the opposite one at an end


NAMES = ["_ann", "b$o$b", r"c\frac", "d$", "e\n\x1b[31m", "f" * 300]
SHOWN = [" _ann", r"b\$o\$b", r"c\frac", r"d\$", r"e\n\x1b[31m", "f" * 39 + "…"]  # \$: a plain dollar


def curves_of_kinds(kinds) -> Figure:
    rows = [{"epoch": epoch} | {f"top1_{kind}": 0.5 for kind in kinds} for epoch in (0, 1)]
    return plots.curves(rows, [])


@pytest.mark.parametrize(
    "draw, texts_of",
    [
        (lambda names: plots.tsne(torch.eye(12), [*range(6)] * 2, [False] * 6 + [True] * 6, names, 0), "legend"),
        (lambda names: plots.cmc({name: [1.0] for name in names}), "figure legend"),
        (lambda names: plots.discard({"all": [1, 0]} | {name: [1, 0] for name in names}), "last legend"),
        (lambda names: plots.bars(names, {"x": [(0.5, None, None)] * 6}), "ticks"),
        (lambda names: plots.similarity_matrix(torch.eye(6), [*range(6)], names, torch.eye(6)), "ticks"),
        (curves_of_kinds, "last legend"),
    ],
    ids=["tsne", "cmc", "discard", "bars", "similarity", "curves"],
)
def test_names_appear_unchanged_and_not_as_formulas_or_escape_codes(draw, texts_of):
    figure = drawn(draw(NAMES))
    axes = figure.axes[0]
    texts = {
        "legend": lambda: axes.get_legend().get_texts(),
        "figure legend": lambda: figure.legends[0].get_texts(),
        "last legend": lambda: figure.axes[-1].get_legend().get_texts(),
        "ticks": axes.get_yticklabels,
    }[texts_of]()
    found = [text.get_text().removesuffix(" (rank 1: 100.0 %)").removesuffix(" (80 % left at 20 %)") for text in texts]
    assert sorted(found) == sorted(SHOWN)
    assert all(text._preprocess_math(text.get_text())[1] is False for text in texts)
    assert names(plots.mistakes_sheet([], "a title").texts) == ["a title", "no mistakes"]


def test_curves_show_kinds_beside_the_overall_figures_whatever_they_are_called():
    row = {"epoch": 0, "top1": 0.1, "top1_mean": 0.2, "ema_top1_mean": 0.3, "top1_ema_x": 0.4, "cosine_top1_y": 0.5}
    _, overall, kinds = plots.curves([row | {"top1_so_top1_mean": 0.6}], []).axes
    expected = ["what chooses the epoch", "same, template mean", "averaged: same, template mean"]
    assert [line.get_label() for line in overall.lines] == expected
    assert [line.get_ydata().tolist() for line in overall.lines] == [[10], [20], [30]]
    assert [line.get_label() for line in kinds.lines] == ["ema_x", "so_top1_mean"]


def run_of(kinds) -> Figure:
    """The curves of three epochs with averaged weights, and their steps."""
    row = {f"{start}top1{name}": 0.5 for start in ("", "ema_") for name in ("", "_mean", "_cross", *kinds)}
    steps = [{"update": str(number), "loss": "2", "backbone_lr": "1e-5", "head_lr": "1e-3"} for number in range(1, 30)]
    return plots.curves([row | {"epoch": epoch} for epoch in range(3)], steps)


def test_every_curve_of_a_run_is_labelled_and_eight_kinds_differ_in_colour_and_dash():
    figure = drawn(run_of([f"_kind {number}" for number in range(8)]))
    loss, overall, kinds, rates = figure.axes
    for axes, lines in ((loss, [*loss.lines, *rates.lines]), (overall, overall.lines), (kinds, kinds.lines)):
        assert names(axes.get_legend().get_texts()) == [line.get_label() for line in lines]
        assert not any(line.get_label().startswith("_") for line in lines)
    model, averaged = kinds.lines[:8], kinds.lines[8:]
    assert len({line.get_color() for line in model}) == len({str(line._dash_pattern) for line in model}) == 8
    assert [line.get_color() for line in model] == [line.get_color() for line in averaged]
    assert {line.get_markerfacecolor() for line in averaged} == {"white"}


WIDE = [f"{'w' * 300}{number}" for number in range(8)]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.cmc({name: [0.5, 1] for name in WIDE}),
        lambda: plots.roc({name: (FAR, TAR) for name in WIDE}, 100_000),
        lambda: plots.discard({"all": [1, 0]} | {name: [1, 0] for name in WIDE}),
        lambda: plots.bars(["fog"], {name: [(0.5, None, None)] for name in WIDE}),
        lambda: run_of([f"_{name}" for name in WIDE]),
        lambda: plots.tsne(torch.eye(80), [*range(40)] * 2, [False] * 40 + [True] * 40, 5 * WIDE, 0),
    ],
    ids=["cmc", "roc", "discard", "bars", "curves", "tsne"],
)
def test_legends_of_eight_long_names_and_of_forty_persons_are_inside_the_picture(draw):
    figure = drawn(draw())
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    assert legends
    for legend in legends:
        box = legend.get_window_extent()
        inside = box.padded(-1)  # the box has a margin, which matplotlib 3.9 lets reach out by less than a pixel
        assert inside.x0 >= 0 and inside.y0 >= 0
        assert inside.x1 <= figure.bbox.width and inside.y1 <= figure.bbox.height


@pytest.fixture
def no_fonts_found(monkeypatch):
    """As in a new process in which only matplotlib's own fonts are installed."""
    own = [font for font in font_manager.fontManager.ttflist if "mpl-data" in font.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    monkeypatch.setattr(fonts, "_found", {})
    with matplotlib.rc_context():
        yield


def write_font(file: Path, family: str, letters: str) -> None:
    """A font in which each letter is a black square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square, glyphs = pen.glyph(), [".notdef", *(f"letter{number}" for number in range(len(letters)))]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(letters, glyphs[1:], strict=True)})
    builder.setupGlyf(dict.fromkeys(glyphs, square))
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(file)


@pytest.mark.parametrize("listed", [True, False], ids=["in matplotlib's list", "installed since"])
def test_letters_that_the_usual_font_lacks_come_from_an_installed_one(
    no_fonts_found, tmp_path, monkeypatch, caplog, listed
):
    write_font(tmp_path / "han.ttf", "Han", "山田")
    write_font(tmp_path / "last.ttf", "Last Resort", "山田한")
    for name in ("han", "last"):
        if listed:
            font_manager.fontManager.addfont(tmp_path / f"{name}.ttf")
    monkeypatch.setattr(
        font_manager, "findSystemFonts", lambda: [str(tmp_path / "last.ttf"), str(tmp_path / "han.ttf")]
    )
    figure = plots.cmc({"山田 ann": [1.0], "bob": [1.0]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a missing glyph
        figure.canvas.draw()
    assert "Han" in figure.legends[0].get_texts()[0].get_fontfamily() and not caplog.messages
    assert Path(fonts.font_file("ann 山")).name == "han.ttf" and Path(fonts.font_file("bob")).name == "DejaVuSans.ttf"


def test_a_font_that_is_missing_is_named_once_for_each_script(no_fonts_found, caplog):
    for name in ("山田", "한국", "クマ", "देव", "नाग", "🦊"):
        plots.cmc({name: [1.0]}).canvas.draw()
    [asian, hindi, symbol] = caplog.messages
    assert "no installed font has Chinese, Japanese or Korean letters" in asian and "install Noto Sans CJK" in asian
    assert "install Noto Sans Devanagari" in hindi and "install Noto Emoji" in symbol
