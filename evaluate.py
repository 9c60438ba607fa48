"""Retrieval on one split: a gallery of clean photos, distorted ones ask it; every figure, with its interval.

    python evaluate.py

Writes RESULTS_DIR/<split>_<stage>/: report.html with everything in it, figures.json, figures.csv, comparison.csv,
queries.csv, persons.csv and the pictures.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

import checkpoints
import common
import fast
import metrics
import plots
from common import UserError, warn_once
from datasets import Person, PhotoList, scan_persons, warn_duplicate_photos, warn_shared_persons
from gallery import (
    Gallery,
    NoQueries,
    Queries,
    build_gallery,
    check_protocol,
    discard_curves,
    embed_queries,
    made_by,
    measure,
    retrieve,
    score,
    select_queries,
)
from report import comparison_table, figures_table
from results import Evaluated, discard_summary, missing_figures, told, write_report, write_results
from scores import check_template, mean_templates
from transforms import FaceCrop, Transform, eval_transform, load_image

# --- what to evaluate ---
DATA_DIR = Path("Task_B")  # holds one folder per split
SPLIT = "val"  # "val", "test" or "train"
CHECKPOINT = Path("runs/stage2/best.pt")  # knows its image size and crop; None: the PRETRAINED network as it is
COMPARE_WITH = None  # checkpoint asked the same, the "before" of tables and pictures; "pretrained": that network; None
TEMPLATE = "mean"  # whose figures count: a person's "mean" clean embedding, or the "best" match among its photos
# Who asks: all distorted photos ("same"), these without their own source ("cross"), clean photos ("clean").
PROTOCOLS = ("same", "cross", "clean")
RESULTS_DIR = Path("results")
CHECK_IMAGES = True  # decode every file once first, list the broken ones and go on without them

# --- only where CHECKPOINT = None or COMPARE_WITH = "pretrained" ---
PRETRAINED = "vggface2"  # "vggface2", "casia-webface", path of a state dict, or None: random weights
IMAGE_SIZE = 160  # pixels, 76..160
FACE_CROP = 0.52  # centre share of the shorter side that is kept, 0.3..1

# --- speed ---
# "torch", "fused", "compiled"; on CPUs also "onnxruntime", "openvino" (pip install onnx openvino): the same figures.
# "openvino-int8" (pip install onnx openvino nncf) is far faster, and not the same: about a point less.
BACKEND = "torch"
INT8_PHOTOS = 300  # of DATA_DIR/train, that the ranges of "openvino-int8" are fitted to, 100..1000
BATCH_SIZE = 64  # photos embedded at a time, >= 1
NUM_WORKERS = 2  # processes that load images, 0..CPU cores; 0 where the network itself keeps the cores busy

# --- pictures ---
PICTURES = True  # False: figures only
PLOT_PERSONS = 20  # persons in t-SNE and similarity matrix, the first by name, 2..40
MISTAKES = 12  # rows of the sheet, 1..30: wrong answers of highest score
MISTAKES_PER_KIND = 3  # at most so many of one kind, so that a hopeless kind does not fill the sheet
SEED = 0  # of t-SNE, the bootstrap and the halves of the open-set test


def main() -> dict:
    """Evaluate, print the tables, write the files; returns gallery.retrieve's details of the first protocol."""
    check_template(TEMPLATE)
    for protocol in PROTOCOLS:
        check_protocol(protocol)
    device = common.pick_device()
    root = DATA_DIR / SPLIT
    persons = scan_persons(root, check_images=CHECK_IMAGES)
    warn_shared_persons([], persons)
    warn_duplicate_photos(persons)

    after = evaluated(CHECKPOINT, persons, device)
    before = None
    if COMPARE_WITH is not None:
        before = evaluated(None if COMPARE_WITH == "pretrained" else COMPARE_WITH, persons, device)
        if before.title == after.title:
            before = replace(before, title=f"{before.title}, before")
    comparison = compared(before, after) if before else {}

    for protocol, details in after.details.items():
        groups = after.measured[protocol][TEMPLATE]
        print(f"\n{protocol}: {told(details)}; {TEMPLATE} template")
        print(figures_table(groups))
        top1 = {template: f"{100 * value:.1f}" for template, value in details["top1"].items()}
        print(f"rank-1 of all by template: mean {top1['mean']}, best {top1['best']}")
        if after.discard_curves[protocol]:
            print(discard_summary(after.discard_curves[protocol]))
        if protocol in comparison:
            print(f"difference to {before.title}, with 95 % interval (* clear of 0)")
            print(comparison_table(comparison[protocol]))
    for line in missing_figures(after):
        print(line)
    print(f"\ntop-1, {TEMPLATE} template")
    for protocol, details in after.details.items():
        who = f"{details['queries']} queries of {len(details['per_person'])} persons"
        print(f"{protocol:<6}{100 * details['top1'][TEMPLATE]:7.2f} %, {who}")
    details = next(iter(after.details.values()))

    if not common.is_main():  # of several processes one writes
        return details
    results = RESULTS_DIR / f"{SPLIT}_{after.title}"
    write_results(results, after, before, comparison)
    if PICTURES:
        write_report(results, draw_pictures(after, before), after, comparison, before)
    print(f"figures{', pictures and report.html' if PICTURES else ''}: {results}")
    return details


def evaluated(checkpoint: Path | str | None, persons: list[Person], device: torch.device) -> Evaluated:
    """Embed gallery and queries, ask and measure by every protocol that has queries.

    Raises ValueError if none has.
    """
    model, facts = checkpoints.load_model(checkpoint, PRETRAINED, IMAGE_SIZE, FACE_CROP, device)
    title = f"stage{facts['stage']}" if facts["stage"] else "pretrained" if PRETRAINED else "random"
    root = DATA_DIR / SPLIT
    if checkpoint is not None:
        epoch = f"epoch {facts['epoch']}" if facts["epoch"] else "the network as loaded (no epoch was better)"
        print(f"{checkpoint}: stage {facts['stage']}, {epoch}, chosen on {facts['selected_on']}")
        if facts["selected_on"] == SPLIT:
            print(f"  so {SPLIT} is not untouched: HOLDOUT_PERSONS chooses on persons of train instead")
    transform = eval_transform(facts["image_size"], facts["face_crop"])
    facts["made_by"] = made_by(model, facts["image_size"], facts["face_crop"])
    photos = int8_photos(transform) if BACKEND == "openvino-int8" else None
    model = fast.accelerated(model, BACKEND, facts["image_size"], device, photos)
    gallery = build_gallery(
        model,
        persons,
        transform,
        device,
        template=TEMPLATE,
        made_by=facts["made_by"],
        batch_size=BATCH_SIZE,
        num_workers=NUM_WORKERS,
    )
    if known := set(facts.get("persons", ())) & set(gallery.persons):
        print(
            f"  {len(known)} of {len(gallery.persons)} persons in {root} were trained on: not a test of unseen persons"
        )
    if len(gallery.persons) == 1:
        warn_once(f"{root}: the gallery holds one person, whom every query is answered: the figures say nothing")
    distorted = None
    if set(PROTOCOLS) != {"clean"}:
        distorted = embed_queries(
            model, gallery, persons, transform, device, batch_size=BATCH_SIZE, num_workers=NUM_WORKERS
        )

    queries = {}
    for protocol in PROTOCOLS:
        try:
            queries[protocol] = select_queries(gallery, distorted, protocol)
        except NoQueries as error:  # nobody has a second photo: said, the other protocols still tell something
            if len(PROTOCOLS) == 1:
                raise
            warn_once(str(error))
    if "cross" in queries and (unknown := int((queries["cross"].sources < 0).sum())):
        warn_once(
            f"{root}: {unknown} of {len(distorted.paths)} queries have no source photo in the gallery by their name, "
            "<clean photo's name>_<kind>: under 'cross' they ask against all photos"
        )
    details, measured = {}, {}
    for protocol, of_protocol in queries.items():
        scores = score(gallery, of_protocol)
        details[protocol] = retrieve(gallery, of_protocol, scores)
        measured[protocol] = measure(gallery, of_protocol, scores, SEED)
    return Evaluated(
        title,
        str(checkpoint or PRETRAINED),
        SPLIT,
        facts,
        gallery,
        queries,
        details,
        measured,
        {protocol: discard_curves(queries[protocol], of[TEMPLATE]) for protocol, of in measured.items()},
    )


def int8_photos(transform: Transform) -> PhotoList:
    """INT8_PHOTOS of the train photos, clean and distorted, drawn by SEED. Raises what scan_persons raises."""
    persons = scan_persons(DATA_DIR / "train", check_images=False)
    paths = [path for person in persons for path in (*person.clean, *person.distorted)]
    drawn = torch.randperm(len(paths), generator=torch.Generator().manual_seed(SEED))[:INT8_PHOTOS]
    return PhotoList([paths[index] for index in drawn.tolist()], transform)


def compared(before: Evaluated, after: Evaluated) -> dict[str, dict[str, dict]]:
    """protocol -> group -> figure -> difference with interval, of the template that counts.

    Raises ValueError if the two were not asked the same photos.
    """
    found: dict[str, dict[str, dict]] = {}
    for protocol, queries in after.queries.items():
        if before.queries[protocol].paths != queries.paths:
            raise UserError(f"{DATA_DIR / SPLIT}: photos were added or removed meanwhile; evaluate again")
        persons, old, new = queries.person_index(), before.measured[protocol], after.measured[protocol]
        found[protocol] = {
            group: metrics.compare(old[TEMPLATE][group], new[TEMPLATE][group], persons[rows], SEED)
            for group, rows in queries.groups().items()
        }
    return found


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw_pictures(after: Evaluated, before: Evaluated | None) -> dict[str, Figure]:
    """File name without its suffix -> picture, from what has already been embedded."""
    models = [model for model in (before, after) if model]
    pictures: dict[str, Figure] = {}
    for protocol, measured in after.measured.items():
        everything = {model.title: model.measured[protocol][TEMPLATE]["all"] for model in models}
        pictures[f"cmc_{protocol}"] = plots.cmc({title: of.cmc.tolist() for title, of in everything.items()})
        curve = measured[TEMPLATE]["all"].roc
        if curve.impostor_pairs and curve.genuine_pairs:
            curves = {title: (of.roc.far.tolist(), of.roc.tar.tolist()) for title, of in everything.items()}
            pictures[f"roc_{protocol}"] = plots.roc(curves, curve.impostor_pairs)
            point, chosen = chosen_threshold(measured[TEMPLATE]["all"])
            pictures[f"scores_{protocol}"] = plots.score_histogram(
                curve.edges.tolist(), curve.genuine_bins.tolist(), curve.impostor_bins.tolist(), chosen, point
            )
        groups = [group for group in measured[TEMPLATE] if group != "all" or len(measured[TEMPLATE]) > 2]
        groups = groups or ["all"]
        rank1 = {model.title: model.measured[protocol][TEMPLATE] for model in models}
        bars = {
            title: [tuple(of[group].figures["rank-1"][part] for part in ("value", "low", "high")) for group in groups]
            for title, of in rank1.items()
        }
        pictures[f"kinds_{protocol}"] = plots.bars(groups, bars)
        left = after.discard_curves[protocol]
        if left and left["all"][0]:
            pictures[f"discard_{protocol}"] = plots.discard({"all": left["all"]} | left)  # "all" first
    pictures |= embedding_pictures(after.gallery, next(iter(after.queries.values())))
    details = next(iter(after.details.values()))
    crop = FaceCrop(after.facts["image_size"], after.facts["face_crop"])
    pictures["mistakes"] = plots.mistakes_sheet(mistake_rows(after.gallery, details, crop))
    return pictures


def chosen_threshold(measured: metrics.Measured) -> tuple[float, float | None]:
    """(FAR, cosine) of the lowest false accept rate that there are pairs enough to know, down to 0.001."""
    for far in (1e-3, 1e-2):
        if f"TAR@FAR={far:g}" in measured.thresholds:
            return far, measured.thresholds[f"TAR@FAR={far:g}"]
    return 1e-2, None


def embedding_pictures(gallery: Gallery, queries: Queries) -> dict[str, Figure]:
    """tsne and similarity of the first PLOT_PERSONS persons."""
    shown = len(gallery.persons[:PLOT_PERSONS])
    of_query = ((queries.truth >= 0) & (queries.truth < shown)).nonzero()[:, 0]
    of_gallery = (gallery.labels < shown).nonzero()[:, 0]
    asking, labels = queries.embeddings[of_query], queries.truth[of_query].tolist()
    persons, pictures = gallery.persons[:shown], {}
    if len(of_query) + len(of_gallery) >= 4:
        is_query = [False] * len(of_gallery) + [True] * len(of_query)
        embeddings = torch.cat([gallery.embeddings[of_gallery], asking])
        pictures["tsne"] = plots.tsne(embeddings, gallery.labels[of_gallery].tolist() + labels, is_query, persons, SEED)
    if labels:
        templates = mean_templates(gallery.weighted, gallery.labels)[:shown]
        pictures["similarity"] = plots.similarity_matrix(asking @ templates.T, labels, persons, templates)
    return pictures


def mistake_rows(
    gallery: Gallery, details: dict, crop: Callable[[Image.Image], Image.Image]
) -> list[tuple[Sequence[Image.Image], Sequence[str]]]:
    """The most confident wrong answers: cropped images (as the network sees them) and captions."""
    template = details["template"]
    wrong = [q for q in details["per_query"] if q[template]["predicted"] != q["person"]]
    first_photo = {}
    for path, label in zip(gallery.paths, gallery.labels.tolist(), strict=True):
        first_photo.setdefault(gallery.persons[label], path)
    rows, of_kind = [], {}
    for query in sorted(wrong, key=lambda q: -q[template]["score"]):
        if len(rows) == MISTAKES:
            break
        of_kind[query["kind"]] = of_kind.get(query["kind"], 0) + 1
        if of_kind[query["kind"]] > MISTAKES_PER_KIND:
            continue
        predicted, score = query[template]["predicted"], query[template]["score"]
        true_photo = first_photo.get(query["person"], query["path"])  # not enrolled: nothing clean to show
        paths = (Path(query["path"]), Path(true_photo), first_photo[predicted])
        captions = (Path(query["path"]).name, query["person"], f"{predicted}  (cosine {score:.2f})")
        rows.append(([crop(load_image(path)) for path in paths], captions))
    return rows


if __name__ == "__main__":
    common.run_script(main)
