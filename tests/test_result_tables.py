import pytest
import torch

import metrics
import result_tables


def evaluation(per_kind: dict[str, tuple[int, int, int]]) -> dict:
    """per_kind: kind -> (queries, right under mean, right under best)"""
    total, mean, best = (sum(column) for column in zip(*per_kind.values(), strict=True))
    kinds = {kind: {"queries": n, "top1": {"mean": m / n, "best": b / n}} for kind, (n, m, b) in per_kind.items()}
    return {"queries": total, "top1": {"mean": mean / total, "best": best / total}, "per_kind": kinds}


def test_the_top1_table_has_a_row_per_kind_one_of_all_but_sunny_and_one_of_all():
    before = evaluation({"blurred": (8, 2, 4), "foggy": (2, 2, 2), "sunny": (10, 0, 1)})
    after = evaluation({"blurred": (8, 8, 7), "foggy": (2, 1, 0), "sunny": (10, 3, 3)})
    lines = result_tables.top1_table({"pretrained": before, "stage 1, averaged weights": after}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [" ".join(line.split()) for line in lines] == [
        "top-1, % queries pretrained stage 1, averaged weights",
        "template mean best mean best",
        "blurred 8 25.0 50.0 100.0 87.5",
        "foggy 2 100.0 100.0 50.0 0.0",
        "sunny 10 0.0 10.0 30.0 30.0",
        "without sunny 10 40.0 60.0 90.0 70.0",  # of queries, not the mean of two kinds
        "all 20 20.0 35.0 60.0 50.0",
    ]
    for kinds in ({"foggy": (2, 1, 1), "rainy": (2, 1, 1)}, {"sunny": (2, 1, 1)}):
        assert "without" not in result_tables.top1_table({"stage 1": evaluation(kinds)})


def of_a_group(high: float) -> metrics.Measured:
    figures = {name: {"value": 1.0, "low": 0.999, "high": high} for name in metrics.FIGURES}
    return metrics.Measured(figures, {}, {"rank-1": torch.ones(100_000)}, cmc=torch.ones(1), roc=None)


KINDS = ("blurred", "foggy", "lowlight", "noisy", "rainy", "resized", "sunny", "without sunny", "all")


@pytest.mark.parametrize(
    "table",
    [
        lambda: result_tables.figures_table({kind: of_a_group(1.0) for kind in KINDS}),
        lambda: result_tables.comparison_table({kind: of_a_group(1.0).figures for kind in KINDS}),
        lambda: result_tables.summary_cells({name: of_a_group(1.0) for name in ("same", "cross", "clean")}).to_string(),
        lambda: result_tables.top1_table(
            {
                name: evaluation({kind: (9000, 9000, 9000) for kind in KINDS[:7]})
                for name in ("before training", "1", "2")
            }
        ),
    ],
    ids=["figures", "comparison", "summary", "top-1"],
)
def test_a_printed_table_fits_100_columns_with_the_widest_figures(table):
    lines = table().splitlines()
    assert len(lines) in (4, 10, 11) and max(map(len, lines)) <= 100  # not one below the other


def test_a_table_of_long_names_goes_on_below_itself():
    lines = result_tables.figures_table({"x" * 60: of_a_group(1.0)}).splitlines()
    assert len(lines) > 4 and max(map(len, lines)) <= 101  # and the backslash that says so
