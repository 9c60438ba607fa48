"""The figures of an evaluation as tables: of text, at most LINE_WIDTH wide, and of cells for report.html."""

from collections.abc import Sequence

import pandas as pd

import metrics
from scores import TEMPLATES

LINE_WIDTH = 100  # of a printed table, characters; one that is wider still goes on below itself
# What is printed, as all figures are too wide: figures.csv and report.html have them.
PRINTED = ("rank-1", "rank-5", "mAP", "macro F1", "EER", "TAR@FAR=0.001", "DIR@FPIR=0.01")
COMPARED = ("rank-1", "TAR@FAR=0.001", "DIR@FPIR=0.01")


def top1_table(evaluations: dict[str, dict]) -> str:
    """Text table of top-1 in %: a row per kind with its number of queries, columns mean and best per evaluation.

    evaluations: title -> details of `gallery.retrieve`, all of the same queries.
    """
    first = next(iter(evaluations.values()))
    queries = pd.Series({kind: figures["queries"] for kind, figures in first["per_kind"].items()})
    columns = {
        (title, template): {kind: figures["top1"][template] for kind, figures in details["per_kind"].items()}
        for title, details in evaluations.items()
        for template in TEMPLATES
    }
    top1 = pd.DataFrame(columns)
    # A tight crop cannot see FACECOM's sunny at all, which drags the overall figure down: the others have a row too.
    others = queries.drop("sunny", errors="ignore")
    if 0 < len(others) < len(queries):
        top1.loc["without sunny"] = top1.loc[others.index].mul(others, axis=0).sum() / others.sum()
        queries["without sunny"] = others.sum()
    top1.loc["all"] = [evaluations[title]["top1"][template] for title, template in top1]
    queries["all"] = first["queries"]
    table = 100 * top1
    table.insert(0, ("queries", ""), queries)
    return table.rename_axis(columns=["top-1, %", "template"]).to_string(
        float_format="{:.1f}".format, line_width=LINE_WIDTH
    )


def figures_frame(groups: dict[str, metrics.Measured]) -> pd.DataFrame:
    """A row per group: its number of queries; value, low and high of each figure, shares in 0..1 or NaN."""
    rows = []
    for measured in groups.values():
        row = {}
        for name, figure in measured.figures.items():
            row |= {name: figure["value"], f"{name} low": figure["low"], f"{name} high": figure["high"]}
        rows.append(row)
    frame = pd.DataFrame(rows, index=list(groups), dtype=float)
    frame.insert(0, "queries", [len(measured.values["rank-1"]) for measured in groups.values()])
    return frame


def figures_table(groups: dict[str, metrics.Measured]) -> str:
    """Text table in %: a row per group with its number of queries, rank-1 with its 95 % interval, then others.

    A dash: too few samples for that figure.
    """
    frame = figures_frame(groups)
    table = 100 * frame[list(PRINTED)]
    table.insert(0, "queries", frame["queries"])
    table.insert(2, "95 % interval", [interval(measured.figures["rank-1"]) for measured in groups.values()])
    table.columns = table.columns.str.replace("@FAR=", "@").str.replace("@FPIR=", "@")
    return table.rename_axis(columns="%").to_string(float_format="{:.1f}".format, na_rep="-", line_width=LINE_WIDTH)


def comparison_table(differences: dict[str, dict[str, dict]]) -> str:
    """Text table in percentage points: group -> figure -> {value, low, high} of `metrics.compare`."""
    return comparison_cells(differences, COMPARED).rename_axis(columns="points").to_string(line_width=LINE_WIDTH)


def figures_cells(groups: dict[str, metrics.Measured], names: Sequence[str]) -> pd.DataFrame:
    """Some figures with their intervals, in %."""
    rows = [
        {"queries": len(measured.values["rank-1"])} | {name: percent(measured.figures[name]) for name in names}
        for measured in groups.values()
    ]
    return pd.DataFrame(rows, index=list(groups)).rename_axis(columns="kind")


def comparison_cells(differences: dict[str, dict[str, dict]], names: Sequence[str]) -> pd.DataFrame:
    """The differences of some figures in percentage points, with a star where the interval excludes 0."""

    def cell(difference: dict | None) -> str:
        if difference is None:
            return "-"
        if difference["low"] is None:
            return percent(difference, "+")
        return percent(difference, "+") + ("*" if difference["low"] > 0 or difference["high"] < 0 else " ")

    rows = [{name: cell(of_group.get(name)) for name in names} for of_group in differences.values()]
    return pd.DataFrame(rows, index=list(differences)).rename_axis(columns="kind")


def summary_cells(everything: dict[str, metrics.Measured]) -> pd.DataFrame:
    """Top-1 in % with its 95 % interval, a row per protocol. everything: protocol -> figures of all its queries."""
    rows = [
        {"top-1, %": percent(measured.figures["rank-1"]), "queries": len(measured.values["rank-1"])}
        for measured in everything.values()
    ]
    return pd.DataFrame(rows, index=list(everything)).rename_axis(columns="protocol")


def percent(figure: dict, sign: str = "") -> str:
    """'98.1 [97.0, 99.0]', in %; '-' without a value. sign: '+' for a difference."""
    if figure["value"] is None:
        return "-"
    return f"{100 * figure['value']:{sign}.1f} {interval(figure, sign)}".rstrip()


def interval(figure: dict, sign: str = "") -> str:
    """'[97.0, 99.0]', in %; nothing where there is no interval."""
    return "" if figure["low"] is None else f"[{100 * figure['low']:{sign}.1f}, {100 * figure['high']:{sign}.1f}]"
