"""What an evaluation prints and writes: JSON and CSV files, pictures, and report.html, which holds all of it."""

import base64
import io
import logging
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import checkpoints
import metrics
import plots
from gallery import Gallery, Queries, score
from result_tables import comparison_cells, comparison_table, figures_cells, figures_frame, figures_table, summary_cells
from scores import TEMPLATES, mean_templates
from transforms import Frame, eval_crop, load_image

log = logging.getLogger(__name__)
# What of a checkpoint is worth repeating beside its figures; the rest is weights and names.
FACTS = ("stage", "epoch", "pretrained", "image_size", "face_crop", "selected_on", "template", "made_by")
# The files of an evaluation.
WRITTEN = re.compile(
    r"figures\.json|(figures|comparison|queries|persons)\.csv|report\.html"
    r"|((cmc|roc|scores|kinds|discard)_(same|cross|clean)|tsne|similarity|mistakes)\.(png|jpg)"
)
# What the queries of a protocol are, for a reader who does not know its name.
ASKED = {
    "same": "distorted photos, with the clean photo that each was made from in the gallery",
    "cross": "distorted photos, none of them compared with the clean photo that it was made from",
    "clean": "clean photos, none of them compared with itself",
}
# The page's tables, so that each fits a screen: caption -> figures.
TASKS = {
    "Closed set, which person is it?": metrics.FIGURES[: metrics.FIGURES.index("EER")],
    "Verification and open set, is it that person, and is it anybody known?": (
        metrics.FIGURES[metrics.FIGURES.index("EER") :]
    ),
}
REFUSED = 0.2  # of the queries, where the share of the wrong answers left is one number and not a curve


@dataclass(frozen=True)
class Evaluated:
    """One model on one split: its gallery, and per protocol the queries, the answers and the figures."""

    title: str
    source: str  # the checkpoint, or the pretrained network
    split: str
    facts: dict  # what the checkpoint states besides its weights
    gallery: Gallery
    queries: dict[str, Queries]
    details: dict[str, dict]  # of gallery.retrieve
    measured: dict[str, dict]  # of gallery.measure: template -> group -> Measured
    discard_curves: dict[str, dict]  # of gallery.discard_curves, under the template that counts
    frames: Frame | None = None  # how a photo is framed before its crop, see transforms.eval_transform


# --- sentences --------------------------------------------------------------------------------------------------------


def print_results(after: Evaluated, before: Evaluated | None, comparison: dict) -> None:
    """Print every protocol's figures, the differences to `before`, the figures that are missing, and top-1 last."""
    template = after.gallery.template
    for protocol, details in after.details.items():
        print(f"\n{protocol}: {describe(details)}; {template} template")
        print(figures_table(after.measured[protocol][template]))
        top1 = ", ".join(f"{name} {100 * value:.1f}" for name, value in details["top1"].items())
        print(f"rank-1 of all by template: {top1}")
        if after.discard_curves[protocol]:
            print(describe_discard(after.discard_curves[protocol]))
        if before:
            print(f"difference to {before.title}, with 95 % interval (*: it excludes 0)")
            print(comparison_table(comparison[protocol]))
    for line in missing_figures(after):
        print(line)
    print(f"\n{template} template; in brackets the 95 % interval")
    print(summary_cells(of_all_queries(after)).to_string())


def of_all_queries(after: Evaluated) -> dict[str, metrics.Measured]:
    """protocol -> figures of all its queries, under the template that counts."""
    return {protocol: measured[after.gallery.template]["all"] for protocol, measured in after.measured.items()}


def headline(after: Evaluated) -> str:
    """The result in one sentence, by the protocol that measures face recognition where it has queries."""
    protocol = "cross" if "cross" in after.details else next(iter(after.details))
    persons, all_queries = after.details[protocol]["persons"], of_all_queries(after)[protocol]
    rank1 = all_queries.figures["rank-1"]
    sure = "" if rank1["low"] is None else f" (95 % interval {100 * rank1['low']:.1f} to {100 * rank1['high']:.1f})"
    asked = f"{len(all_queries.values['rank-1']):,} {ASKED[protocol]}"
    found = f"{100 * rank1['value']:.1f} %{sure} of {asked}"
    return f"The {after.title} network finds the right one of {persons:,} persons for {found}."


def describe(details: dict) -> str:
    """The sizes behind a protocol's figures."""
    sizes = f"{details['photos']} clean photos of {details['persons']} persons in the gallery, "
    sizes += f"{details['queries']} queries of {len(details['per_person'])} persons"
    if details["not_enrolled"]:
        sizes += f", {details['not_enrolled']} of them of persons outside the gallery"
    if details["persons_without_query"]:
        sizes += f"; {details['persons_without_query']} persons of the gallery have no query"
    return sizes


def describe_discard(left: dict[str, Tensor]) -> str:
    """`gallery.discard_curves` in one line."""
    wrong, queries = round(left["all"][0].item()), len(left["all"]) - 1
    refused = f"refusing the {100 * REFUSED:.0f} % of the queries of lowest quality"
    if not wrong:
        return f"no answer is wrong, so {refused} cannot help"
    kinds = ", ".join(f"{group} {100 * share:.0f}" for group, share in errors_left(left).items() if share is not None)
    ideal = max(0.0, 1 - metrics.rounded_down(REFUSED, queries) / wrong)
    return f"wrong answers left, %, after {refused}: {kinds} (of {wrong}; ideal: {100 * ideal:.0f})"


def errors_left(left: dict[str, Tensor]) -> dict[str, float | None]:
    """Group -> share (0..1) of its wrong answers left after refusing REFUSED of its queries; None: none is wrong."""
    return {group: metrics.share_left(counts, REFUSED) for group, counts in left.items()}


def missing_figures(after: Evaluated) -> list[str]:
    """A line per figure for which there are too few samples, with the number needed, and per group without enrolled
    persons."""
    lines = []
    for protocol, measured in after.measured.items():
        groups = measured[after.gallery.template]
        everything = groups["all"]
        for name, group in groups.items():
            if not group.roc.genuine_pairs:
                shown = f"its {len(group.values['rank-1'])} queries show only persons outside the gallery"
                lines.append(f"{protocol}: {name} has no TAR, EER and DIR: {shown}")
        for rates, name, samples, what, least in (
            (metrics.FARS, "TAR@FAR", everything.roc.impostor_pairs, "impostor pairs", metrics.MIN_ERRORS),
            # Half of the persons are strangers to either gallery.
            (metrics.FPIRS, "DIR@FPIR", everything.roc.genuine_pairs, "queries", 2 * metrics.MIN_ERRORS),
        ):
            for rate in rates:
                if everything.figures[f"{name}={rate:g}"]["value"] is None:
                    needed = f"{samples} {what}, {round(least / rate)} needed"
                    lines.append(f"{protocol}: {name}={rate:g} is not reported: {needed}")
    return lines


# --- JSON and CSV -----------------------------------------------------------------------------------------------------


def without_earlier_files(folder: Path) -> Path:
    """`folder`, without the files of an earlier evaluation; what else lies there stays.

    Where one cannot be removed, as Excel holds it, a new folder beside it, with a warning.
    """
    try:
        for path in folder.iterdir() if folder.is_dir() else ():
            if WRITTEN.fullmatch(path.name):
                path.unlink()
    except OSError as error:
        other = Path(tempfile.mkdtemp(prefix=f"{folder.name}_", dir=folder.parent))
        other.chmod(folder.stat().st_mode)
        log.warning(f"{error.filename}: cannot be removed ({error.strerror}); close what holds it. Files: {other}")
        return other
    return folder


def write_results(folder: Path, after: Evaluated, before: Evaluated | None, comparison: dict) -> None:
    """figures.json, figures.csv (a row per protocol, template and group), comparison.csv, queries.csv, persons.csv."""
    figures = {
        (protocol, template): figures_frame(groups)
        for protocol, measured in after.measured.items()
        for template, groups in measured.items()
    }
    checkpoints.write_csv(
        folder / "figures.csv", pd.concat(figures, names=["protocol", "template", "kind"]).reset_index()
    )
    checkpoints.write_csv(folder / "queries.csv", query_rows(after))
    checkpoints.write_csv(folder / "persons.csv", person_rows(after))
    found = {
        "split": after.split,
        "model": known_facts(after),
        "template": after.gallery.template,
        "not_reported": missing_figures(after),  # why a figure is null
        "protocols": {protocol: protocol_summary(after, protocol) for protocol in after.details},
    }
    if before:
        found |= {"compared_with": known_facts(before), "difference": comparison}
        differences = [
            {"protocol": protocol, "kind": group, "figure": name, **figure}
            for protocol, groups in comparison.items()
            for group, of_group in groups.items()
            for name, figure in of_group.items()
        ]
        checkpoints.write_csv(folder / "comparison.csv", differences)
    checkpoints.write_json(folder / "figures.json", found)


def known_facts(model: Evaluated) -> dict:
    return {name: value for name, value in model.facts.items() if name in FACTS}


def protocol_summary(after: Evaluated, protocol: str) -> dict:
    """What figures.json holds of a protocol: all that is not per query."""
    details, measured = after.details[protocol], after.measured[protocol]
    return {name: value for name, value in details.items() if name not in ("per_query", "embeddings")} | {
        "figures": {
            template: {group: of_group.figures for group, of_group in groups.items()}
            for template, groups in measured.items()
        },
        "thresholds": {template: groups["all"].thresholds for template, groups in measured.items()},
        "cmc": {template: groups["all"].cmc.tolist() for template, groups in measured.items()},
        "wrong_left": errors_left(after.discard_curves[protocol]),
    }


def query_rows(after: Evaluated) -> list[dict]:
    """A row per protocol and query: the photo, and the answer under each template."""
    rows = []
    for protocol, details in after.details.items():
        for query in details["per_query"]:
            row = {"protocol": protocol} | {name: query[name] for name in ("path", "kind", "person", "quality")}
            for template in TEMPLATES:
                row |= {f"{name}_{template}": value for name, value in query[template].items()}
            rows.append(row)
    return rows


def person_rows(after: Evaluated) -> list[dict]:
    """A row per protocol and person: the number of its queries, their top-1 and mAP."""
    rows = []
    for protocol, details in after.details.items():
        # Of photos, so the same under both templates.
        precision = pd.Series(after.measured[protocol]["mean"]["all"].values["mAP"].tolist())
        mean_precision = precision.groupby(after.queries[protocol].persons).mean()
        for person, figures in details["per_person"].items():
            row = {"protocol": protocol, "person": person, "queries": figures["queries"]}
            row |= {f"top1_{template}": value for template, value in figures["top1"].items()}
            rows.append(row | {"mAP": mean_precision[person]})
    return rows


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw_pictures(
    after: Evaluated, before: Evaluated | None, *, persons: int, mistakes: int, mistakes_per_kind: int, seed: int
) -> dict[str, Figure]:
    """File name without its suffix -> picture, from what has already been embedded.

    persons: shown in t-SNE and similarity matrix, the first by name; mistakes: see mistake_rows; seed: of t-SNE.
    """
    pictures: dict[str, Figure] = {}
    for protocol in after.measured:
        drawn = protocol_pictures([model for model in (before, after) if model], protocol)
        pictures |= {f"{name}_{protocol}": picture for name, picture in drawn.items()}
    first = next(iter(after.details))
    pictures |= embedding_pictures(after.gallery, after.queries[first], persons, seed)
    seen = eval_crop(after.facts["image_size"], after.facts["face_crop"], after.frames)
    rows = mistake_rows(after, first, seen, most=mistakes, most_per_kind=mistakes_per_kind)
    title = f"Protocol “{first}”: wrong answers of the highest cosine"
    return pictures | {"mistakes": plots.mistakes_sheet(rows, title)}


def protocol_pictures(models: Sequence[Evaluated], protocol: str) -> dict[str, Figure]:
    """The curves and bars of all `models` under a protocol; scores and discard of the last one."""
    template = models[-1].gallery.template
    groups = {model.title: model.measured[protocol][template] for model in models}
    everything = {title: of_model["all"] for title, of_model in groups.items()}
    pictures = {"cmc": plots.cmc({title: measured.cmc.tolist() for title, measured in everything.items()})}

    last = models[-1].measured[protocol][template]
    curve = last["all"].roc
    if curve.impostor_pairs and curve.genuine_pairs:
        curves = {title: (of.roc.far.tolist(), of.roc.tar.tolist()) for title, of in everything.items()}
        pictures["roc"] = plots.roc(curves, curve.impostor_pairs)
        far, threshold = chosen_threshold(last["all"])
        pictures["scores"] = plots.score_histogram(
            curve.edges.tolist(), curve.genuine_bins.tolist(), curve.impostor_bins.tolist(), threshold, far
        )

    shown = list(last) if len(last) > 2 else [group for group in last if group != "all"] or ["all"]
    rates = {
        title: [tuple(of_model[group].figures["rank-1"][end] for end in ("value", "low", "high")) for group in shown]
        for title, of_model in groups.items()
    }
    pictures["kinds"] = plots.bars(shown, rates)
    left = models[-1].discard_curves[protocol]
    if left and left["all"][0]:
        pictures["discard"] = plots.discard({"all": left["all"]} | left)  # "all" first
    return pictures


def chosen_threshold(measured: metrics.Measured) -> tuple[float, float | None]:
    """(FAR, cosine) of the lowest false accept rate, down to 0.001, that has a threshold; (0.01, None) if none has."""
    for far in (1e-3, 1e-2):
        if f"TAR@FAR={far:g}" in measured.thresholds:
            return far, measured.thresholds[f"TAR@FAR={far:g}"]
    return 1e-2, None


def embedding_pictures(gallery: Gallery, queries: Queries, persons: int, seed: int) -> dict[str, Figure]:
    """tsne and similarity of the first `persons` of the gallery, where there is enough to draw."""
    names = gallery.persons[:persons]
    of_query = ((queries.truth >= 0) & (queries.truth < len(names))).nonzero()[:, 0]
    of_gallery = (gallery.labels < len(names)).nonzero()[:, 0]
    queries = queries.subset(of_query)
    pictures = {}
    if len(of_query) + len(of_gallery) >= 4:
        points = torch.cat([gallery.embeddings[of_gallery], queries.embeddings])
        labels = gallery.labels[of_gallery].tolist() + queries.truth.tolist()
        is_query = [False] * len(of_gallery) + [True] * len(of_query)
        pictures["tsne"] = plots.tsne(points, labels, is_query, names, seed)
    if len(of_query):
        cosines = score(gallery, queries)[gallery.template].matrix[:, : len(names)]  # those that the answers are by
        means = mean_templates(gallery.weighted, gallery.labels)[: len(names)]
        pictures["similarity"] = plots.similarity_matrix(cosines, queries.truth.tolist(), names, means)
    return pictures


def mistake_rows(
    after: Evaluated, protocol: str, crop: Callable[[Image.Image], Image.Image], *, most: int, most_per_kind: int
) -> list[tuple[Sequence[Image.Image], Sequence[tuple[str, str]]]]:
    """The wrong answers of highest score: cropped images, as the network sees them, and captions with the cosines.

    At most `most` of them, and `most_per_kind` of a kind, so that one hopeless kind does not fill the sheet.
    """
    gallery, details, first_photo = after.gallery, after.details[protocol], {}
    for path, label in zip(gallery.paths, gallery.labels.tolist(), strict=True):
        first_photo.setdefault(gallery.persons[label], path)
    answers = pd.DataFrame([query | query[details["template"]] for query in details["per_query"]])
    wrong = answers[answers["predicted"] != answers["person"]].sort_values("score", ascending=False, kind="stable")
    wrong = wrong.groupby("kind").head(most_per_kind).head(most)
    if wrong.empty:
        return []
    queries = after.queries[protocol].subset(torch.tensor(wrong.index))
    scores = score(gallery, queries)[gallery.template]
    rows = []
    for query, truth, cosines in zip(wrong.itertuples(), scores.truth.tolist(), scores.matrix, strict=True):
        true_photo = first_photo.get(query.person, query.path)  # not enrolled: no clean photo to show
        images = [crop(load_image(Path(path))) for path in (query.path, true_photo, first_photo[query.predicted])]
        right = "not enrolled" if truth < 0 else f"cosine {cosines[truth]:.2f}"
        captions = (
            (Path(query.path).name, query.kind),
            (query.person, right),
            (query.predicted, f"cosine {query.score:.2f}"),
        )
        rows.append((images, captions))
    return rows


# --- report.html ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A picture as a file; width and height in pixels."""

    suffix: str  # ".png" or ".jpg"
    data: bytes
    width: int
    height: int

    @property
    def uri(self) -> str:
        kind = {".png": "png", ".jpg": "jpeg"}[self.suffix]
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode()}"


def encode(figure: Figure) -> Picture:
    """A small file: JPEG where the figure shows photos, else PNG of 256 colours, a third of the size and no visible
    loss."""
    file, small = io.BytesIO(), io.BytesIO()
    figure.savefig(file, format="png")
    image = Image.open(file).convert("RGB")
    if any(shown.get_array().ndim == 3 for axes in figure.axes for shown in axes.images):  # (H, W, 3)
        image.save(small, format="jpeg", quality=88, optimize=True)
        return Picture(".jpg", small.getvalue(), image.width, image.height)
    image.quantize(256).save(small, format="png", optimize=True)
    return Picture(".png", small.getvalue(), image.width, image.height)


def write_report(
    folder: Path, figures: dict[str, Figure], after: Evaluated, before: Evaluated | None, comparison: dict
) -> None:
    """Each figure as <name>.png or, of photos, <name>.jpg; and report.html, which holds them all."""
    pictures = {name: encode(figure) for name, figure in figures.items()}
    for name, picture in pictures.items():
        with checkpoints.atomic_file(folder / f"{name}{picture.suffix}") as file:
            file.write(picture.data)
    with checkpoints.atomic_file(folder / "report.html") as file:
        # A file name may hold a byte that is no UTF-8; it becomes a question mark.
        file.write(page(pictures, after, before, comparison).encode("utf-8", "replace"))


def page(pictures: dict[str, Picture], after: Evaluated, before: Evaluated | None, comparison: dict) -> str:
    """The HTML page by report.html.jinja; every text is escaped."""
    template = after.gallery.template
    protocols = []
    for protocol, details in after.details.items():
        tables = {
            f"{task} Template “{name}”, %": figures_cells(groups, figures)
            for name, groups in after.measured[protocol].items()
            for task, figures in TASKS.items()
        }
        if before:
            groups = comparison[protocol]
            compared = {name for of_group in groups.values() for name in of_group}
            caption = (
                f"Template “{template}”: difference to {before.title}, percentage points; *: the interval excludes 0"
            )
            for task, figures in TASKS.items():
                if names := [name for name in figures if name in compared]:
                    tables[f"{task} {caption}"] = comparison_cells(groups, names)
        protocols.append({"name": protocol, "sizes": describe(details), "tables": tables})
    facts = after.facts
    framed = {"detected": " of the square around the face", "inset": " of the photo with the face in its middle"}.get(
        facts.get("framing"), ""
    )
    size = f"{facts['image_size']} pixels, crop {facts['face_crop']}{framed}, model {facts['made_by']['fingerprint']}"
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        title=f"{after.title} on {after.split}",
        headline=headline(after),
        model=f"{after.source}: {size}",
        template=template,
        summary=summary_cells(of_all_queries(after)),
        asked=ASKED,
        protocols=protocols,
        missing=missing_figures(after),
        pictures=pictures,
    )
