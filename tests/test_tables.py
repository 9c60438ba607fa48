"""Text tables of report.py."""

import pytest

from report import comparison_table, top1_table


def details_of(per_kind: dict[str, tuple[int, int, int]]) -> dict:
    """What the table reads of an evaluation; kind -> (queries, right under mean, right under best)."""
    queries, mean, best = (sum(column) for column in zip(*per_kind.values(), strict=True))
    return {
        "template": "mean",
        "top1": {"mean": mean / queries, "best": best / queries},
        "queries": queries,
        "per_kind": {
            kind: {"queries": count, "top1": {"mean": by_mean / count, "best": by_best / count}}
            for kind, (count, by_mean, by_best) in per_kind.items()
        },
    }


def rows_of(table: str) -> dict[str, list[str]]:
    """First column (15 characters) -> the other cells."""
    return {line[:15].strip(): line[15:].split() for line in table.splitlines()}


def test_the_table_shows_counts_and_percentages_of_each_evaluation_in_aligned_columns():
    before = details_of({"blurred": (8, 2, 4), "foggy": (2, 2, 2), "sunny": (10, 0, 1)})
    after = details_of({"blurred": (8, 8, 7), "foggy": (2, 1, 0), "sunny": (10, 3, 3)})
    table = top1_table({"pretrained": before, "a title of more than fifteen letters": after})
    assert len({len(line) for line in table.splitlines()}) == 1
    rows = rows_of(table)
    assert list(rows) == ["top-1, %", "template", "blurred", "foggy", "sunny", "without sunny", "all"]
    assert rows["template"] == ["mean", "best", "mean", "best"]
    assert rows["blurred"] == ["8", "25.0", "50.0", "100.0", "87.5"]
    assert rows["foggy"] == ["2", "100.0", "100.0", "50.0", "0.0"]
    assert rows["sunny"] == ["10", "0.0", "10.0", "30.0", "30.0"]
    assert rows["without sunny"] == ["10", "40.0", "60.0", "90.0", "70.0"]  # of queries, not the mean of two kinds
    assert rows["all"] == ["20", "20.0", "35.0", "60.0", "50.0"]


@pytest.mark.parametrize("kinds", [("foggy", "rainy"), ("sunny",)])
def test_the_table_has_a_row_without_sunny_only_where_there_are_other_kinds_too(kinds):
    table = top1_table({"stage 1": details_of(dict.fromkeys(kinds, (2, 1, 1)))})
    assert "without" not in table and rows_of(table)["all"][1:] == ["50.0", "50.0"]


def test_a_star_marks_a_difference_whose_interval_excludes_0():
    found = {"rank-1": {"value": 0.02, "low": 0.01, "high": 0.03}, "mAP": {"value": -0.01, "low": -0.02, "high": 0.0}}
    found |= {"DIR@FPIR=0.01": {"value": 0.5, "low": None, "high": None}}
    row = comparison_table({"all": found}).splitlines()[1]
    assert "+2.0 [+1.0, +3.0]*" in row and "-1.0 [-2.0, +0.0] " in row and row.endswith("+50.0")
