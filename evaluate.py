"""Retrieval on one split: clean photos are the gallery, distorted ones the queries; every rate with its interval.

    python evaluate.py

Writes RESULTS_DIR/<split>_<stage>/: report.html with everything in it, figures.json, figures.csv, comparison.csv,
queries.csv, persons.csv and the pictures. Those of an earlier evaluation are removed.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import checkpoints
import common
import fast
import metrics
import report
from common import UserError, list_names, warn_once
from datasets import Person, PhotoList, photos_of, scan_persons, warn_duplicate_photos, warn_shared_persons
from framing import Frames, check_framing, find_frames
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
    unembedded_split,
)
from report import Evaluated
from scores import check_template
from transforms import eval_transform

# --- what to evaluate ---
DATA_DIR = Path("Task_B")  # holds one folder per split
SPLIT = "val"  # "val", "test" or "train"
CHECKPOINT = Path("runs/stage2/best.pt")  # knows its image size and crop; None: the PRETRAINED network as it is
COMPARE_WITH = None  # "before" of tables and pictures: a checkpoint; "pretrained": the network below; None
TEMPLATE = "mean"  # a person is matched by the "mean" of its clean embeddings or by the "best" of its clean photos
# Queries: distorted photos against all clean ones ("same") or against all but their source ("cross"); clean photos,
# each against the others ("clean").
PROTOCOLS = ("same", "cross", "clean")
RESULTS_DIR = Path("results")
CHECK_IMAGES = True  # decode every file once first, list the broken ones and go on without them

# --- only where CHECKPOINT = None or COMPARE_WITH = "pretrained" ---
PRETRAINED = "vggface2"  # "vggface2", "casia-webface", path of a state dict, or None: random weights
IMAGE_SIZE = 160  # pixels, 76..160
FACE_CROP = 0.52  # side of the face crop, as in train_stage1.py
FRAMING = "detected"  # of the face: MTCNN finds it; "centre": it is at the centre of each photo, see framing.py

# --- speed ---
# "torch", "fused", "compiled": the same figures, as with "onnxruntime" (pip install onnx onnxruntime) and "openvino"
# (pip install onnx openvino), which are for CPUs.
# "openvino-int8" (pip install onnx openvino nncf) is far faster: the same top-1, half a point of TAR (docs/speed.md).
BACKEND = "torch"
INT8_PHOTOS = 300  # of DATA_DIR/train, to fit the ranges of "openvino-int8", 100..1000
BATCH_SIZE = 64  # photos embedded at a time, >= 1
# Processes that load images, 0..; "auto": one per core, at most 16; 0 where the network itself keeps the cores busy.
NUM_WORKERS = "auto"

# --- pictures ---
PICTURES = True  # False: figures only
PLOT_PERSONS = 20  # persons in t-SNE and similarity matrix, the first by name, 2..40
MISTAKES = 12  # rows of the sheet, 1..30: the wrong answers with the highest scores
MISTAKES_PER_KIND = 3  # most rows of one kind, so that a hopeless kind does not fill the sheet
SEED = 0  # of t-SNE, the intervals and the halves of the open-set test


def main() -> dict:
    """Evaluate, write the files, print the tables; returns gallery.retrieve's details of the first protocol."""
    common.resolve_constants(globals())
    check_constants()
    device = common.pick_device()
    fast.check_backend(BACKEND, device)
    networks = [load(CHECKPOINT, device)]
    if COMPARE_WITH is not None:
        networks.append(load(None if COMPARE_WITH == "pretrained" else COMPARE_WITH, device))
    folder = RESULTS_DIR / f"{SPLIT}_{networks[0].title}"
    checkpoints.check_writable("RESULTS_DIR", folder, folder=True)
    persons = scan_persons(DATA_DIR / SPLIT, check_images=CHECK_IMAGES)
    warn_shared_persons([], persons)
    warn_duplicate_photos(persons)
    # What lacks photos is found before hours of work.
    queries_by_protocol(*unembedded_split(persons, distorted=set(PROTOCOLS) != {"clean"}))

    framings = sorted({network.facts["framing"] for network in networks})  # faces are searched for once in each
    frames = {framing: find_frames(framing, photos_of(persons), device) for framing in framings}
    after, *others = [evaluated(network, persons, frames[network.facts["framing"]], device) for network in networks]
    before = others[0] if others else None
    if before and before.title == after.title:
        before = replace(before, title=f"{before.title}, before")
    comparison = compared(before, after) if before else {}

    if common.is_main():  # of several processes one writes
        folder = report.without_earlier_files(folder)
        report.write_results(folder, after, before, comparison)
        if PICTURES:
            pictures = report.draw_pictures(
                after,
                before,
                persons=PLOT_PERSONS,
                mistakes=MISTAKES,
                mistakes_per_kind=MISTAKES_PER_KIND,
                seed=SEED,
            )
            report.write_report(folder, pictures, after, before, comparison)
    report.print_results(after, before, comparison)
    print(f"figures{', pictures and report.html' if PICTURES else ''}: {folder}")
    return next(iter(after.details.values()))


def check_constants() -> None:
    """Raise UserError, before anything slow, for an unknown word or a missing folder."""
    check_template(TEMPLATE)
    check_framing(FRAMING, FACE_CROP)
    if isinstance(PROTOCOLS, str) or not PROTOCOLS:
        raise UserError(
            f"PROTOCOLS = {PROTOCOLS!r}: expected a tuple of one or more, such as ('cross',), with its comma"
        )
    for protocol in PROTOCOLS:
        check_protocol(protocol)
    if not DATA_DIR.is_dir():
        raise UserError(f"{DATA_DIR}: no such folder; set DATA_DIR to the folder that holds one folder per split")
    splits = list_names(sorted(path.name for path in DATA_DIR.iterdir() if path.is_dir())) or "no folder"
    if not (DATA_DIR / SPLIT).is_dir():
        raise UserError(f"{DATA_DIR / SPLIT}: no such folder; DATA_DIR holds {splits}; correct SPLIT = {SPLIT!r}")
    if BACKEND == "openvino-int8" and not (DATA_DIR / "train").is_dir():
        raise UserError(
            f"{DATA_DIR / 'train'}: no such folder, but BACKEND = {BACKEND!r} is fitted to photos there, and DATA_DIR "
            f"holds {splits}; set BACKEND = 'openvino'"
        )


@dataclass(frozen=True)
class Network:
    """A network to evaluate. source: a checkpoint, or the pretrained network; facts: see checkpoints.load_model."""

    source: str
    model: nn.Module
    facts: dict

    @property
    def title(self) -> str:
        return f"stage{self.facts['stage']}" if self.facts["stage"] else "pretrained" if PRETRAINED else "random"


def load(checkpoint: Path | str | None, device: torch.device) -> Network:
    """The network of a checkpoint, or with None that of PRETRAINED. Raises what load_model raises."""
    model, facts = checkpoints.load_model(checkpoint, PRETRAINED, IMAGE_SIZE, FACE_CROP, device, FRAMING)
    if checkpoint is not None:
        print_choice(checkpoint, facts)
    facts["made_by"] = made_by(model, facts["image_size"], facts["face_crop"], facts["framing"])
    return Network(str(checkpoint or PRETRAINED), model, facts)


def evaluated(network: Network, persons: list[Person], frames: Frames | None, device: torch.device) -> Evaluated:
    """Embed gallery and queries, retrieve and measure under every protocol that has queries.

    Raises NoQueries if none of them has any.
    """
    facts = network.facts
    transform = eval_transform(facts["image_size"], facts["face_crop"], frames)
    photos = int8_photos(facts, device) if BACKEND == "openvino-int8" else None
    model = fast.accelerated(network.model, BACKEND, facts["image_size"], device, photos)
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
    root = DATA_DIR / SPLIT
    if known := set(facts.get("persons", ())) & set(gallery.persons):
        print(f"  {len(known)} of {len(gallery.persons)} persons of {root} were trained on: no test of unseen persons")
    if len(gallery.persons) == 1:
        warn_once(f"{root}: the gallery holds one person, who is the answer to every query, so the figures say nothing")
    distorted = None
    if set(PROTOCOLS) != {"clean"}:
        distorted = embed_queries(
            model, gallery, persons, transform, device, batch_size=BATCH_SIZE, num_workers=NUM_WORKERS
        )

    queries = queries_by_protocol(gallery, distorted)
    details, measured = {}, {}
    for protocol, of_protocol in queries.items():
        scores = score(gallery, of_protocol)
        details[protocol] = retrieve(gallery, of_protocol, scores)
        measured[protocol] = measure(gallery, of_protocol, scores, SEED)
    return Evaluated(
        title=network.title,
        source=network.source,
        split=SPLIT,
        facts=facts,
        gallery=gallery,
        queries=queries,
        details=details,
        measured=measured,
        frames=frames,
        discard_curves={protocol: discard_curves(queries[protocol], of[TEMPLATE]) for protocol, of in measured.items()},
    )


def print_choice(checkpoint: Path | str, facts: dict) -> None:
    """How the epoch of a checkpoint was chosen, and whether it was on the persons of this evaluation."""
    epoch = f"epoch {facts['epoch']}" if facts["epoch"] else "the network as loaded (no epoch was better)"
    print(f"{checkpoint}: stage {facts['stage']}, {epoch}, chosen on {facts['selected_on']}")
    if facts["selected_on"] == SPLIT:
        print(f"  so {SPLIT} is not untouched: HOLDOUT_PERSONS of train_stage1.py chooses on persons of train instead")


def queries_by_protocol(gallery: Gallery, distorted: Queries | None) -> dict[str, Queries]:
    """The queries of each of PROTOCOLS; one without any is left out with a warning.

    Raises NoQueries if none of them has any.
    """
    queries, reasons = {}, []
    for protocol in PROTOCOLS:
        try:
            queries[protocol] = select_queries(gallery, distorted, protocol)
        except NoQueries as error:  # no second photo in the split: the other protocols still say something
            reasons.append(str(error))
    if not queries:
        raise NoQueries("; ".join(reasons))
    for reason in reasons:
        warn_once(reason)
    if "cross" in queries and (unknown := int((queries["cross"].sources < 0).sum())):
        warn_once(
            f"{DATA_DIR / SPLIT}: {unknown} of {len(distorted.paths)} queries have no source photo in the gallery by "
            "their name, <clean photo's name>_<kind>: under 'cross' they are compared with all photos"
        )
    return queries


def int8_photos(facts: dict, device: torch.device) -> PhotoList:
    """INT8_PHOTOS of the train photos, clean and distorted, drawn by SEED. Raises what scan_persons raises."""
    persons = scan_persons(DATA_DIR / "train", check_images=False)
    paths = photos_of(persons)
    drawn = torch.randperm(len(paths), generator=torch.Generator().manual_seed(SEED))[:INT8_PHOTOS]
    photos = [paths[index] for index in drawn.tolist()]
    frames = find_frames(facts["framing"], photos, device)
    return PhotoList(photos, eval_transform(facts["image_size"], facts["face_crop"], frames))


def compared(before: Evaluated, after: Evaluated) -> dict[str, dict[str, dict]]:
    """protocol -> group -> figure -> difference with interval, of the template that counts.

    Raises UserError if their queries are not the same photos.
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


if __name__ == "__main__":
    common.run_script(main)
