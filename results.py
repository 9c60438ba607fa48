"""The files of an evaluation: figures as JSON and CSV, pictures, and report.html that holds all of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

import checkpoints
import metrics
import report
from gallery import Gallery, Queries
from scores import TEMPLATES

# What of a checkpoint is worth repeating beside its figures; the rest is weights and names.
FACTS = ("stage", "epoch", "pretrained", "image_size", "face_crop", "selected_on", "template", "made_by")

ABOUT = {
    "same": "Every distorted photo asks the gallery of all clean photos, its own source among them. This flatters: "
    "hair, clothes and background are the same, so it rewards finding a photo again as well as knowing a face.",
    "cross": "No query is compared with the photo that it was made from, only with its person's other photos. Persons "
    "with a single photo ask nothing and stay in the gallery to be mistaken for. This is face recognition.",
    "clean": "Clean photos of persons with several ask, each left out of the gallery while it does: what the network "
    "knows of undistorted faces, and must not forget.",
}
PICTURE_CAPTIONS = {
    "cmc": "Share of the queries whose person is among the first k answers.",
    "roc": "Accepting a pair at a cosine: true accepts against false ones, over all pairs.",
    "scores": "Cosines of genuine and impostor pairs. Where they overlap, no threshold tells them apart.",
    "kinds": "Rank-1 by kind of distortion, with 95 % intervals.",
    "discard": "What is left of the wrong answers when the queries of lowest quality are refused: the nearer to the "
    "ideal, the better the model knows which photos it cannot know.",
    "tsne": "Embeddings in the plane: crosses (distorted) should lie on the dots (clean) of their colour.",
    "similarity": "Queries against persons, look-alikes side by side: a bright staircase on a dark ground is good, a "
    "bright column attracts strangers.",
    "mistakes": "The most confident wrong answers, as the network sees them.",
}


@dataclass(frozen=True)
class Evaluated:
    """One model on the split: its gallery, and per protocol who asked, the answers and the figures."""

    title: str
    source: str  # the checkpoint, or the pretrained network
    split: str
    facts: dict
    gallery: Gallery
    queries: dict[str, Queries]
    details: dict[str, dict]  # of gallery.retrieve
    measured: dict[str, dict]  # of gallery.measure: template -> group -> Measured
    discard_curves: dict[
        str, dict
    ]  # of gallery.discard_curves, of the template that counts: group -> wrong answers left


def told(details: dict) -> str:
    """The sizes behind a protocol's figures."""
    sizes = f"{details['photos']} clean photos of {details['persons']} persons, {details['queries']} queries"
    if details["not_enrolled"]:
        sizes += f", {details['not_enrolled']} of them of persons not enrolled"
    if details["persons_without_query"]:
        sizes += f" of {len(details['per_person'])} persons; the other {details['persons_without_query']} have no query"
    return sizes


def missing_figures(after: Evaluated) -> list[str]:
    """A line per figure that too few samples forbid, with what it would take."""
    lines = []
    for protocol, measured in after.measured.items():
        everything = measured[after.gallery.template]["all"]
        for rates, name, pairs, what, least in (
            (metrics.FARS, "TAR@FAR", everything.roc.impostor_pairs, "impostor pairs", metrics.MIN_ERRORS),
            # Half of the persons are strangers to either gallery.
            (metrics.FPIRS, "DIR@FPIR", everything.roc.genuine_pairs, "strangers' queries", 2 * metrics.MIN_ERRORS),
        ):
            for rate in rates:
                if everything.figures[f"{name}={rate:g}"]["value"] is None:
                    needed = f"{round(least / rate)} needed"
                    lines.append(f"{protocol}: {name}={rate:g} is not reported, {pairs} {what} of {needed}")
    return lines


REFUSED = 0.2  # of the queries, in the figures that tell what is left of the wrong answers


def errors_left(left: dict[str, Tensor]) -> dict[str, float | None]:
    """Group -> the share (0..1) of its wrong answers left once REFUSED of its queries are; None where none is wrong."""
    return {group: metrics.share_left(counts, REFUSED) for group, counts in left.items()}


def discard_summary(left: dict[str, Tensor]) -> str:
    """What `gallery.discard_curves` says, in a line."""
    shares = errors_left(left)
    wrong, queries = round(left["all"][0].item()), len(left["all"]) - 1
    ideal = max(0.0, 1 - metrics.rounded_down(REFUSED, queries) / wrong) if wrong else 0.0
    kinds = ", ".join(f"{group} {100 * share:.0f}" for group, share in shares.items() if share is not None)
    best = f" (ideal for all {wrong}: {100 * ideal:.0f})" if wrong else ""
    refused = f"once the {100 * REFUSED:.0f} % of lowest quality are refused"
    return f"wrong answers left, %, {refused}: {kinds or 'none is wrong'}{best}"


def write_results(folder: Path, after: Evaluated, before: Evaluated | None, comparison: dict) -> None:
    """figures.json, figures.csv (a row per protocol, template and group), comparison.csv, queries.csv, persons.csv."""
    rows, per_query, per_person, protocols = [], [], [], {}
    for protocol, details in after.details.items():
        summary = {name: value for name, value in details.items() if name not in ("per_query", "embeddings")}
        protocols[protocol] = summary | {
            "figures": {
                template: {group: of_group.figures for group, of_group in groups.items()}
                for template, groups in after.measured[protocol].items()
            },
            "thresholds": {t: groups["all"].thresholds for t, groups in after.measured[protocol].items()},
            "cmc": {t: groups["all"].cmc.tolist() for t, groups in after.measured[protocol].items()},
            "wrong_left": errors_left(after.discard_curves[protocol]),
        }
        for template, groups in after.measured[protocol].items():
            for group, of_group in groups.items():
                row = {"protocol": protocol, "template": template, "kind": group}
                row["queries"] = len(of_group.values["rank-1"])
                for name, figure in of_group.figures.items():
                    row |= {name: figure["value"], f"{name} low": figure["low"], f"{name} high": figure["high"]}
                rows.append(row)
        for query in details["per_query"]:
            row = {"protocol": protocol} | {name: query[name] for name in ("path", "kind", "person", "quality")}
            for template in TEMPLATES:
                row |= {f"{name}_{template}": value for name, value in query[template].items()}
            per_query.append(row)
        precision = after.measured[protocol]["mean"]["all"].values["mAP"].tolist()  # of photos, whatever the template
        of_person: dict[str, list[float]] = {}
        for person, value in zip(after.queries[protocol].persons, precision, strict=True):
            of_person.setdefault(person, []).append(value)
        for person, figures in details["per_person"].items():
            row = {"protocol": protocol, "person": person, "queries": figures["queries"]}
            row |= {f"top1_{template}": value for template, value in figures["top1"].items()}
            per_person.append(row | {"mAP": sum(of_person[person]) / len(of_person[person])})
    facts = {name: value for name, value in after.facts.items() if name in FACTS}
    content = {"split": after.split, "model": facts, "template": after.gallery.template, "protocols": protocols}
    if before:
        facts = {name: value for name, value in before.facts.items() if name in FACTS}
        content |= {"compared_with": facts, "difference": comparison}
        differences = [
            {"protocol": protocol, "kind": group, "figure": name, **figure}
            for protocol, groups in comparison.items()
            for group, of_group in groups.items()
            for name, figure in of_group.items()
        ]
        checkpoints.write_csv(folder / "comparison.csv", differences)
    checkpoints.write_json(folder / "figures.json", content)
    checkpoints.write_csv(folder / "figures.csv", rows)
    checkpoints.write_csv(folder / "queries.csv", per_query)
    checkpoints.write_csv(folder / "persons.csv", per_person)


def write_report(
    folder: Path, pictures: dict[str, Figure], after: Evaluated, comparison: dict, before: Evaluated | None
) -> None:
    """Each picture as <name>.png or, of photos, .jpg; and report.html, which holds them all."""
    files = {name: report.encoded(figure) for name, figure in pictures.items()}
    for name, (suffix, content) in files.items():
        with checkpoints.atomic_file(folder / f"{name}{suffix}") as file:
            file.write(content)
        # An earlier run's: a sheet of mistakes has photos, one without any has none.
        (folder / f"{name}{'.jpg' if suffix == '.png' else '.png'}").unlink(missing_ok=True)

    def shown(names: Sequence[str]) -> list[report.Picture]:
        captions = {name: PICTURE_CAPTIONS[name.split("_")[0]] for name in names if name in files}
        return [report.Picture(caption, files[name][1], caption) for name, caption in captions.items()]

    sections = []
    for protocol, details in after.details.items():
        tables = [
            figures_page(groups, f"{template} template, %") for template, groups in after.measured[protocol].items()
        ]
        if protocol in comparison:
            tables.append(
                comparison_page(
                    comparison[protocol], f"{after.gallery.template} template: difference to {before.title}"
                )
            )
        kinds = ("kinds", "cmc", "roc", "scores", "discard")
        text = f"{ABOUT[protocol]} Here: {told(details)}."
        sections.append(report.Section(protocol, text, tables, shown([f"{kind}_{protocol}" for kind in kinds])))
    notes = missing_figures(after)
    text = (
        "A figure's brackets hold its 95 % interval, by resampling persons; where the rate comes with a threshold, the "
        "threshold is held. A dash: too few samples to say. " + " ".join(f"{line}." for line in notes)
    )
    sections.append(report.Section("reading the figures", text, [], []))
    sections.append(report.Section("embeddings and mistakes", "", [], shown(["tsne", "similarity", "mistakes"])))
    facts = after.facts
    size = f"{facts['image_size']} pixels, crop {facts['face_crop']}, model {facts['made_by']['fingerprint']}"
    page = report.page(f"{after.title} on {after.split}", f"{after.source}: {size}", sections)
    with checkpoints.atomic_file(folder / "report.html") as file:
        file.write(page.encode())


def percent(figure: dict, sign: str = "") -> str | None:
    """'98.1 [97.0, 99.0]', in %; None without a value."""
    if figure["value"] is None:
        return None
    interval = (
        f" [{100 * figure['low']:{sign}.1f}, {100 * figure['high']:{sign}.1f}]" if figure["low"] is not None else ""
    )
    return f"{100 * figure['value']:{sign}.1f}{interval}"


def figures_page(groups: dict[str, metrics.Measured], caption: str) -> report.Table:
    rows = [
        [group, len(of_group.values["rank-1"]), *(percent(of_group.figures[name]) for name in metrics.FIGURES)]
        for group, of_group in groups.items()
    ]
    return report.Table(caption, ["kind", "queries", *metrics.FIGURES], rows)


def comparison_page(groups: dict[str, dict], caption: str) -> report.Table:
    names = [name for name in metrics.FIGURES if any(name in of_group for of_group in groups.values())]
    rows = [
        [group, *(percent(of_group[name], "+") if name in of_group else None for name in names)]
        for group, of_group in groups.items()
    ]
    return report.Table(caption, ["kind", *names], rows)
