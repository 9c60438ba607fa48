"""Retrieval on one split: a gallery of clean photos, every distorted photo a query, top-1 overall and per kind.

    python evaluate.py

Writes RESULTS_DIR/<split>_<stage>/: top1.json, top1.csv, queries.csv, tsne.png, similarity.png, mistakes.png.
"""

from pathlib import Path

import torch

import plots
import training
from datasets import FaceCrop, eval_transform, load_image
from gallery import TEMPLATES, Gallery, build_gallery, check_template, evaluate, top1_table
from models import FaceNet

# --- what to evaluate ---
DATA_DIR = Path("Task_B")  # holds one folder per split
SPLIT = "val"  # "val", "test" or "train"
CHECKPOINT = Path("runs/stage2/best.pt")  # knows its image size and crop; None: the PRETRAINED network as it is
TEMPLATE = "mean"  # which top-1 counts: "mean" of a person's clean embeddings, or "best" match among them
RESULTS_DIR = Path("results")
CHECK_IMAGES = True  # decode every file once first, list the broken ones and go on without them

# --- only where CHECKPOINT = None ---
PRETRAINED = "vggface2"  # "vggface2", "casia-webface", path of a state dict, or None: random weights
IMAGE_SIZE = 160  # pixels, 76..160
FACE_CROP = 0.52  # centre share of the shorter side that is kept, 0.3..1

# --- speed ---
BATCH_SIZE = 64  # photos embedded at a time, >= 1
NUM_WORKERS = 2  # processes that load images, 0..CPU cores

# --- pictures ---
PICTURES = True  # False: figures only
PLOT_PERSONS = 20  # persons in t-SNE and similarity matrix, the first by name, 2..40
MISTAKES = 12  # rows of the sheet, 1..30: wrong answers of highest score
MISTAKES_PER_KIND = 3  # at most so many of one kind, so that a hopeless kind does not fill the sheet
SEED = 0  # of t-SNE


def main() -> dict:
    """Evaluate, print the table, write the files; returns the details of gallery.evaluate."""
    check_template(TEMPLATE)
    device = training.pick_device()
    root = DATA_DIR / SPLIT
    if CHECKPOINT is None:
        torch.manual_seed(SEED)  # for PRETRAINED = None
        model = FaceNet(PRETRAINED, dropout=0).to(device, memory_format=torch.channels_last)
        facts = {"stage": 0, "pretrained": str(PRETRAINED), "image_size": IMAGE_SIZE, "face_crop": FACE_CROP}
        title, trained_on = "pretrained" if PRETRAINED else "random", set()
    else:
        model, saved = training.load_facenet(CHECKPOINT, device)
        facts = {name: value for name, value in saved.items() if name in FACTS}
        title, trained_on = f"stage{saved['stage']}", set(saved["persons"])
        epoch = f"epoch {saved['epoch']}" if saved["epoch"] else "the network as loaded (no epoch was better)"
        print(f"{CHECKPOINT}: stage {saved['stage']}, {epoch}, chosen on {saved['selected_on']}")
        if saved["selected_on"] == SPLIT:
            print(f"  so {SPLIT} is not untouched: HOLDOUT_PERSONS chooses on persons of train instead")

    transform = eval_transform(facts["image_size"], facts["face_crop"])
    options = {"batch_size": BATCH_SIZE, "num_workers": NUM_WORKERS, "check_images": CHECK_IMAGES}
    gallery = build_gallery(model, root, transform, device, template=TEMPLATE, **options)
    top1, details = evaluate(model, gallery, root, transform, device, **options)
    if known := trained_on & set(gallery.persons):
        print(
            f"  {len(known)} of {len(gallery.persons)} persons in {root} were trained on: not a test of unseen persons"
        )

    print(f"{root}: {details['photos']} clean photos of {details['persons']} persons, {details['queries']} queries")
    print(top1_table({title: details}))
    print(f"top-1 ({TEMPLATE} template): {100 * top1:.2f} %")

    results = RESULTS_DIR / f"{SPLIT}_{title}"
    if not training.is_main():  # of several processes one writes
        return details
    write_results(results, facts, details)
    if PICTURES:
        draw_pictures(results, gallery, details, FaceCrop(facts["image_size"], facts["face_crop"]))
    print(f"figures{' and pictures' if PICTURES else ''}: {results}")
    return details


# What of a checkpoint is worth repeating beside its figures; the rest is weights and names.
FACTS = ("stage", "epoch", "pretrained", "image_size", "face_crop", "selected_on", "template")


def write_results(folder: Path, facts: dict, details: dict) -> None:
    """top1.json, top1.csv (a row per kind) and queries.csv (a row per query)."""
    figures = {name: value for name, value in details.items() if name not in ("per_query", "embeddings")}
    training.write_json(folder / "top1.json", {"split": SPLIT, "model": facts} | figures)
    rows = [{"kind": kind, "queries": d["queries"], **d["top1"]} for kind, d in details["per_kind"].items()]
    rows.append({"kind": "all", "queries": details["queries"], **details["top1"]})
    training.write_csv(folder / "top1.csv", rows)
    queries = []
    for query in details["per_query"]:
        row = {name: query[name] for name in ("path", "kind", "person")}
        for template in TEMPLATES:
            row |= {f"{name}_{template}": value for name, value in query[template].items()}
        queries.append(row)
    training.write_csv(folder / "queries.csv", queries)


def draw_pictures(folder: Path, gallery: Gallery, details: dict, crop: FaceCrop) -> None:
    """tsne.png, similarity.png and mistakes.png, from what `evaluate` has already embedded."""
    shown = gallery.persons[:PLOT_PERSONS]
    of_query = [shown.index(q["person"]) if q["person"] in shown else -1 for q in details["per_query"]]
    is_shown = torch.tensor(of_query) >= 0
    queries, query_labels = details["embeddings"][is_shown], [label for label in of_query if label >= 0]
    in_gallery = gallery.labels < len(shown)
    clean, clean_labels = gallery.embeddings[in_gallery], gallery.labels[in_gallery].tolist()

    pictures = {}
    if len(queries) + len(clean) >= 4:
        is_query = [False] * len(clean) + [True] * len(queries)
        embeddings, labels = torch.cat([clean, queries]), clean_labels + query_labels
        pictures["tsne.png"] = plots.tsne(embeddings, labels, is_query, shown, SEED)
    if query_labels:
        templates, _ = gallery.templates("mean")
        pictures["similarity.png"] = plots.similarity_matrix(queries @ templates[: len(shown)].T, query_labels, shown)
    pictures["mistakes.png"] = plots.mistakes_sheet(mistake_rows(gallery, details, crop))
    for name, figure in pictures.items():
        with training.atomic_file(folder / name) as file:
            figure.savefig(file, format="png")


def mistake_rows(gallery: Gallery, details: dict, crop: FaceCrop) -> list:
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
    training.run(main)
