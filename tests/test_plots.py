import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

import plots


def lines(figure) -> dict:
    """Label -> line of the figure's only axes, the unlabelled ones left out."""
    return {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def drawn(figure):
    """The figure after layout: positions are final, and a text that matplotlib cannot set has raised."""
    figure.draw_without_rendering()
    return figure


# --- cmc ---


def test_cmc_draws_percent_over_ranks_from_one_and_tells_rank_1():
    figure = plots.cmc({"before": [0.5, 0.75, 1.0], "after": [0.9, 0.95]})
    before, after = lines(figure).values()
    assert before.get_xdata().tolist() == [1, 2, 3] and before.get_ydata().tolist() == [50, 75, 100]
    assert after.get_xdata().tolist() == [1, 2] and after.get_ydata().tolist() == pytest.approx([90, 95])
    assert legend(figure) == ["before (rank 1: 50.0 %)", "after (rank 1: 90.0 %)"]


@pytest.mark.parametrize("ranks", [1, 2, 5, 20, 50, 222])
def test_cmc_ticks_are_whole_ranks_that_exist_and_begin_at_one(ranks):
    ticks = plots.cmc({"a": [0.9] * ranks}).axes[0].get_xticks()
    assert ticks[0] == 1 and max(ticks) <= ranks and len(ticks) <= 15
    assert all(tick == round(tick) for tick in ticks) and len(set(ticks)) == len(ticks)


@pytest.mark.parametrize("rates", [[0.995, 0.998, 1.0], [1.0, 1.0], [0.2, 0.9], [0.0, 0.004]])
def test_cmc_y_axis_holds_all_rates_closely_without_a_tick_above_100(rates):
    axes = drawn(plots.cmc({"a": rates})).axes[0]
    low, high = axes.get_ylim()
    assert low < 100 * min(rates) and high > 100 * max(rates)
    assert high - low <= 1.2 * max(100 * max(rates) - 100 * min(rates), 1)
    assert not [tick for tick in axes.get_yticks() if 100 + 1e-9 < tick <= high]


def test_curves_differ_in_colour_line_and_marker_and_an_equal_one_beneath_is_wider():
    figure = plots.cmc({f"run {number}": [0.9, 1.0] for number in range(6)})
    looks = [(line.get_color(), str(line._dash_pattern), line.get_marker()) for line in lines(figure).values()]
    assert [len(set(values)) for values in zip(*looks, strict=True)] == [6, 6, 6]
    widths = [line.get_linewidth() for line in lines(figure).values()]
    assert widths[0] > widths[1] > widths[2] and widths == sorted(widths, reverse=True)


def test_a_seventh_evaluation_is_drawn_too():
    assert len(lines(plots.cmc({f"run {number}": [0.9] for number in range(7)}))) == 7


@pytest.mark.parametrize("curves", [{}, {"a": [0.5], "b": []}])
def test_cmc_refuses_to_draw_nothing(curves):
    with pytest.raises(ValueError, match="cmc: no rates to draw"):
        plots.cmc(curves)


# --- roc ---

FAR = [0.0, 0.0, 0.0005, 0.005, 0.02, 1.0]
TAR = [0.1, 0.3, 0.5, 0.7, 0.9, 1.0]


def roc_step(figure):
    return next(line for line in figure.axes[0].lines if line.get_drawstyle() == "steps-post")


def roc_markers(figure):
    return next(line for line in figure.axes[0].lines if line.get_linestyle() == "None")


def test_roc_starts_at_ten_impostor_pairs_with_what_the_lower_rates_reached():
    figure = plots.roc({"a": (FAR, TAR)}, pairs=100_000)
    step = roc_step(figure)
    assert step.get_xdata().tolist() == [1e-4, 0.0005, 0.005, 0.02, 1.0, 1.0]  # FAR = 0 has no place on a log axis
    assert step.get_ydata().tolist() == pytest.approx([30, 50, 70, 90, 100, 100])
    assert figure.axes[0].get_xscale() == "log"
    assert figure.axes[0].get_xlim() == pytest.approx((1e-4 / 4, 1))


def test_roc_shades_the_unresolved_rates_and_says_so():
    figure = plots.roc({"a": (FAR, TAR)}, pairs=100_000)
    (shade,) = figure.axes[0].patches
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == pytest.approx((1e-4 / 4, 1e-4))
    (text,) = figure.axes[0].texts
    assert text.get_text() == "fewer than 10 of 100,000 pairs" and shade.get_x() < text.get_position()[0] < 1e-4


@pytest.mark.parametrize(
    "pairs, rates, told",
    [
        (100_000, {1e-2: 70, 1e-3: 50, 1e-4: 30}, "a (50.0 % at FAR 1e-3)"),
        (10_000, {1e-2: 70, 1e-3: 50}, "a (50.0 % at FAR 1e-3)"),
        (9_999, {1e-2: 70}, "a (70.0 % at FAR 1e-2)"),
        (500, {}, "a"),
    ],
)
def test_roc_marks_and_tells_only_rates_of_ten_pairs_or_more(pairs, rates, told):
    figure = plots.roc({"a": (FAR, TAR)}, pairs)
    markers = roc_markers(figure)
    assert dict(zip(markers.get_xdata(), markers.get_ydata(), strict=True)) == pytest.approx(rates)
    assert legend(figure) == [told]


def test_roc_marker_takes_a_rate_that_rounding_put_a_hair_above_its_own():
    figure = plots.roc({"a": ([0.0, 0.01 * (1 + 1e-12), 1.0], [0.2, 0.6, 1.0])}, pairs=1000)
    assert roc_markers(figure).get_ydata().tolist() == pytest.approx([60])


def test_roc_draws_no_rate_below_the_first_threshold():
    figure = plots.roc({"a": ([0.5, 1.0], [0.8, 1.0])}, pairs=1000)
    assert math.isnan(roc_step(figure).get_ydata()[0]) and roc_step(figure).get_ydata()[1] == 80
    assert np.isnan(roc_markers(figure).get_ydata()).all()
    assert drawn(figure).axes[0].get_ylim()[0] > 70


def test_roc_of_fewer_than_ten_pairs_is_all_shaded():
    figure = drawn(plots.roc({"a": ([0.0, 0.2, 1.0], [0.1, 0.3, 1.0])}, pairs=5))
    (shade,) = figure.axes[0].patches
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == pytest.approx(figure.axes[0].get_xlim())


@pytest.mark.parametrize(
    "curves, pairs, message",
    [
        ({}, 10, "got 0 and 10"),
        ({"a": (FAR, TAR)}, 0, "got 1 and 0"),
        ({"a": ([], [])}, 10, "roc: a: .* got 0 and 0"),
        ({"a": ([0.1, 1], [1])}, 10, "roc: a: .* got 2 and 1"),
    ],
)
def test_roc_refuses_what_it_cannot_draw(curves, pairs, message):
    with pytest.raises(ValueError, match=message):
        plots.roc(curves, pairs)


# --- score_histogram ---


def outlines(figure) -> dict:
    """Label -> heights and line style of the two outlines."""
    found = {}
    for patch in figure.axes[0].patches:
        if not patch.get_label().startswith("_") and patch.get_label():
            found[patch.get_label()] = (patch.get_data().values.tolist(), patch.get_linestyle())
    return found


def test_histogram_shows_each_side_as_shares_of_its_own_pairs():
    figure = plots.score_histogram([-1, -0.5, 0, 0.5, 1], [0, 1, 1, 2], [0, 750, 250, 0], 0.25, 1e-3)
    assert outlines(figure) == {
        "genuine (4 pairs)": ([0, 25, 25, 50], "-"),
        "impostor (1,000 pairs)": ([0, 75, 25, 0], "--"),
    }
    fills = {to_hex(p.get_edgecolor()): p.get_hatch() for p in figure.axes[0].patches if p.get_fill()}
    assert len(fills) == 2 and len(set(fills.values())) == 2  # told apart without colour


def test_histogram_draws_the_threshold_and_its_false_accept_rate():
    figure = plots.score_histogram(torch.linspace(-1, 1, 5), torch.tensor([0, 0, 1, 2]), [1, 5, 0, 0], 0.25, 9.8e-4)
    (line,) = figure.axes[0].lines
    assert list(line.get_xdata()) == [0.25, 0.25]
    assert legend(figure)[-1] == line.get_label() == "threshold 0.250 (FAR 9.8e-4)"


@pytest.mark.parametrize("far, text", [(0.0, "threshold 0.250 (FAR 0)"), (None, "threshold 0.250")])
def test_histogram_tells_a_false_accept_rate_of_zero_but_none_where_none_is_known(far, text):
    assert legend(plots.score_histogram([0, 0.5, 1], [0, 1], [1, 0], 0.25, far))[-1] == text


def test_histogram_without_a_threshold_has_no_line():
    figure = plots.score_histogram([0, 0.5, 1], [0, 1], [1, 0], None, None)
    assert not figure.axes[0].lines and legend(figure) == ["genuine (1 pairs)", "impostor (1 pairs)"]


def test_histogram_cuts_off_empty_bins_but_not_the_threshold():
    edges, genuine, impostor = [-1, -0.5, 0, 0.5, 1], [0, 0, 3, 0], [0, 2, 0, 0]
    assert plots.score_histogram(edges, genuine, impostor, None, None).axes[0].get_xlim() == (-0.5, 0.5)
    assert plots.score_histogram(edges, genuine, impostor, 0.7, 0.0).axes[0].get_xlim() == (-0.5, 0.7)


def test_histogram_of_no_pairs_at_all_is_flat():
    figure = drawn(plots.score_histogram([0, 0.5, 1], [0, 0], [0, 0], None, None))
    assert [heights for heights, _ in outlines(figure).values()] == [[0, 0], [0, 0]]


def test_histogram_refuses_bins_that_do_not_fit_the_edges():
    with pytest.raises(ValueError, match="got 3 edges, 3 genuine and 3 impostor bins"):
        plots.score_histogram([0, 0.5, 1], [1, 2, 3], [1, 2, 3], None, None)


# --- discard ---


def test_discard_draws_what_is_left_of_the_wrong_answers_the_ideal_and_the_kinds_beside():
    figure = drawn(plots.discard({"all": [4, 3, 2, 2, 1, 0], "fog": [1, 0, 0], "rain": [3, 3, 2, 1], "_sun": [0, 0]}))
    together, kinds = figure.axes
    everything, ideal, chance = together.lines
    assert everything.get_ydata().tolist() == [100, 75, 50, 50, 25, 0]
    assert everything.get_xdata().tolist() == pytest.approx([0, 20, 40, 60, 80, 100])
    assert everything.get_label() == "all (75 % left at 20 %)"
    assert ideal.get_xydata().tolist() == [[0, 100], [80, 0], [100, 0]]  # 4 of 5 are wrong
    assert chance.get_xydata().tolist() == [[0, 100], [100, 0]]
    assert [line.get_label() for line in kinds.lines] == ["fog (60 % left at 20 %)", "rain (100 % left at 20 %)"]


def test_discard_of_one_group_shows_it_in_both_and_of_no_mistake_draws_nothing():
    assert [len(axes.lines) for axes in plots.discard({"all": [2, 1, 0]}).axes] == [3, 3]
    with pytest.raises(ValueError, match="no wrong answer to draw"):
        plots.discard({"all": [0, 0]})


# --- bars ---

BEFORE = [(0.5, 0.4, 0.6), (0.2, None, None)]
AFTER = [(1.0, 0.9, 1.0 - 1e-12), (0.25, 0.2, 0.32)]  # a bound that rounding put below its rate


def test_bars_stand_in_a_group_per_kind_in_the_order_given_from_the_top():
    axes = plots.bars(["rainy", "all"], {"before": BEFORE, "after": AFTER}).axes[0]
    before, after = (c for c in axes.containers if c.get_label() in ("before", "after"))
    assert [bar.get_width() for bar in before] == [50, 20] and [bar.get_width() for bar in after] == [100, 25]
    spans = [(bar.get_y(), bar.get_y() + bar.get_height()) for pair in zip(before, after, strict=True) for bar in pair]
    assert np.ravel(spans).tolist() == pytest.approx([-0.4, 0, 0, 0.4, 0.6, 1, 1, 1.4])  # touch in a group only
    assert axes.yaxis_inverted() and axes.get_xlim()[0] == 0
    assert [(t.get_text(), t.get_position()[1]) for t in axes.get_yticklabels()] == [("rainy", 0), ("all", 1)]
    assert before[0].get_hatch() != after[0].get_hatch() and before[0].get_facecolor() != after[0].get_facecolor()


def test_bars_carry_whiskers_where_there_is_an_interval():
    axes = plots.bars(["rainy", "all"], {"before": BEFORE, "after": AFTER}).axes[0]
    whiskers = [path.vertices.tolist() for c in axes.collections for path in c.get_paths()]
    expected = [[[40, -0.2], [60, -0.2]], [[90, 0.2], [100, 0.2]], [[20, 1.2], [32, 1.2]]]
    assert len(whiskers) == 3 and np.allclose(whiskers, expected)
    assert axes.get_xlabel() == "top-1, % (whiskers: 95 % interval)"


def test_bars_tell_their_value_behind_bar_and_whisker_inside_the_axes():
    figure = drawn(plots.bars(["rainy", "all"], {"before": BEFORE, "after": AFTER}))
    texts = {text.get_text(): text for text in figure.axes[0].texts}
    ends = {"50.0": 60, "20.0": 20, "100.0": 100, "25.0": 32}  # of the whisker or, without one, the bar
    assert texts.keys() == ends.keys()
    assert all(end < texts[label].get_position()[0] < end + 3 for label, end in ends.items())
    from_the_top = sorted(texts, key=lambda label: texts[label].get_position()[1])
    assert from_the_top == ["50.0", "100.0", "20.0", "25.0"]
    assert all(text.get_window_extent().x1 < figure.axes[0].get_window_extent().x1 for text in texts.values())


def test_bars_of_one_evaluation_without_intervals_have_no_whiskers():
    figure = plots.bars(["all"], {"stage 1": [(0.5, None, None)]})
    axes = figure.axes[0]
    assert axes.patches[0].get_width() == 50 and len(axes.collections) == 0 and axes.get_xlabel() == "top-1, %"
    assert legend(figure) == ["stage 1"]


def test_bars_show_a_dash_where_an_evaluation_has_no_rate():
    axes = drawn(plots.bars(["a", "b", "c"], {"x": [(math.nan, 0, 1), (None, None, None), (0.5, None, None)]})).axes[0]
    assert [text.get_text() for text in axes.texts] == ["–", "–", "50.0"] and not axes.collections


@pytest.mark.parametrize(
    "kinds, evaluations", [([], {"a": []}), (["x"], {}), (["x", "y"], {"a": BEFORE, "b": AFTER[:1]})]
)
def test_bars_refuse_what_does_not_fit_together(kinds, evaluations):
    with pytest.raises(ValueError, match=f"each of {len(kinds)} kinds"):
        plots.bars(kinds, evaluations)


# --- similarity_matrix ---


def matrix(figure) -> np.ndarray:
    return np.asarray(figure.axes[0].images[0].get_array())


def at_degrees(*degrees) -> torch.Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def names(labels) -> list[str]:
    return [label.get_text() for label in labels]


def test_look_alikes_lie_side_by_side_in_columns_and_rows_alike():
    templates = at_degrees(70.0, 160.0, 0.0, 90.0)
    norms = torch.tensor([5.0, 5.0, 1.0, 1.0])[:, None]  # must not matter
    labels = [0, 1, 2, 3, 0, 1, 2, 3]
    cosine = templates[labels] @ templates.T
    axes = plots.similarity_matrix(cosine, labels, list("abcd"), norms * templates).axes[0]
    order = "".join(names(axes.get_xticklabels()))
    assert order in ("cadb", "bdac")  # along the circle
    assert "".join(names(axes.get_yticklabels())) == order
    assert axes.get_yticks().tolist() == [0.5, 2.5, 4.5, 6.5]


def test_the_true_column_of_each_row_stays_on_the_staircase():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(7, (40,), generator=generator)
    templates = torch.randn(7, 16, generator=generator)
    true_column = torch.nn.functional.one_hot(labels, 7).float()  # marks what must lie on the staircase
    shown = matrix(plots.similarity_matrix(true_column, labels.tolist(), list("abcdefg"), templates))
    assert shown.sum(1).tolist() == [1] * 40 and (np.diff(shown.argmax(1)) >= 0).all()
    assert sorted(shown.sum(0).tolist()) == sorted(torch.bincount(labels).tolist())


def test_cosines_move_with_their_query_and_person():
    templates = at_degrees(0, 80, 10, 90)
    cosine = torch.arange(8.0).reshape(2, 4)  # queries of d and b
    figure = plots.similarity_matrix(cosine, [3, 1], list("abcd"), templates)
    columns = ["abcd".index(name) for name in names(figure.axes[0].get_xticklabels())]
    rows = [{"d": 0, "b": 1}[name] for name in names(figure.axes[0].get_yticklabels())]  # a, c asked nothing
    assert matrix(figure).tolist() == cosine[rows][:, columns].tolist()


@pytest.mark.parametrize("persons", [1, 2, 3])
def test_the_similarity_matrix_takes_few_persons(persons):
    templates = torch.eye(3)[:persons]
    figure = drawn(
        plots.similarity_matrix(
            torch.eye(3)[:persons, :persons], list(range(persons)), list("abc")[:persons], templates
        )
    )
    assert matrix(figure).tolist() == np.eye(persons).tolist()


def test_the_similarity_matrix_takes_equal_and_opposite_templates():
    templates = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    axes = plots.similarity_matrix(templates @ templates.T, [0, 1, 2, 3], list("abcd"), templates).axes[0]
    assert sorted(names(axes.get_xticklabels())) == list("abcd")
    assert "".join(names(axes.get_xticklabels())).index("c") in (0, 3)  # the stranger at an end


# --- all ---


def test_names_appear_as_they_are_and_not_as_formulas():
    persons = ["_ann", "b$o$b", r"c\frac"]
    points = torch.eye(6)
    labels, is_query = [0, 1, 2] * 2, [False] * 3 + [True] * 3
    shown = drawn(plots.tsne(points, labels, is_query, persons, 0)).axes[0].get_legend().get_texts()
    assert [text.get_text() for text in shown] == [" _ann", r"b\$o\$b", r"c\frac"]  # \$: a plain dollar
    assert all(text._preprocess_math(text.get_text())[1] is False for text in shown)
    assert legend(plots.cmc({"_run $1$": [1.0]})) == [r" _run \$1\$ (rank 1: 100.0 %)"]


def test_a_sheet_without_mistakes_says_so():
    assert [text.get_text() for text in plots.mistakes_sheet([]).texts] == ["no mistakes"]
