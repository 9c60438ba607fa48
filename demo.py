"""The whole pipeline on synthetic faces, small enough for a laptop: sample faces, stage 1, stage 2, evaluation.

    python demo.py

It edits the constants of the scripts and calls their main(), as a user would by hand, and ends with the table
before training / stage 1 / stage 2. The pretrained network is used if it is available; else training is from scratch.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import common
import evaluate
import train_stage1
import train_stage2
from backbones import load_pretrained
from common import UserError, set_constants
from result_tables import top1_table
from tools import sample_faces

OUT_DIR = Path("demo_output")  # faces, checkpoints and pictures; an earlier demo's is replaced
PRETRAINED = "vggface2"  # used if it can be downloaded or is in torch's cache; None: always from scratch

# --- faces ---
TRAIN_PERSONS = 48  # 2..1000
VAL_PERSONS = 20  # 2..1000, none of them in train
MIN_PHOTOS = 3  # clean photos per person, >= 1, each with a distorted copy of every kind
MAX_PHOTOS = 6  # >= MIN_PHOTOS

# --- training: small, a real run takes the scripts' own constants ---
IMAGE_SIZE = 80  # pixels, 76..160: a quarter of the work of 160
STAGE1_EPOCHS = 4  # >= 1
STAGE2_EPOCHS = 3  # >= 1

SECONDS = {"faces": 23, "stage 1": 116, "stage 2": 96, "evaluation": 53}  # of each part at these sizes, on 2 cores


def main() -> None:
    common.resolve_constants(globals())
    started = time.time()
    data_dir, results = OUT_DIR / "Task_B", OUT_DIR / "results"
    stage1, stage2 = OUT_DIR / "runs" / "stage1", OUT_DIR / "runs" / "stage2"
    for folder in ("Task_B", "runs", "results"):  # what a demo writes, nothing else that may lie there
        shutil.rmtree(OUT_DIR / folder, ignore_errors=True)

    with announced("1/4 draw sample faces", seconds=SECONDS["faces"]):
        set_constants(sample_faces, OUT_DIR=data_dir, TRAIN_PERSONS=TRAIN_PERSONS, VAL_PERSONS=VAL_PERSONS)
        set_constants(sample_faces, MIN_PHOTOS=MIN_PHOTOS, MAX_PHOTOS=MAX_PHOTOS)
        sample_faces.main()
    pretrained = available(PRETRAINED)
    for script in (train_stage1, train_stage2, evaluate):
        set_constants(script, DATA_DIR=data_dir, CHECK_IMAGES=False)  # just written by ourselves
    for script in (train_stage1, train_stage2):
        set_constants(script, AMP=None)  # float32 everywhere, for figures like those in RESULTS.md

    with announced("2/4 stage 1: ArcFace", seconds=SECONDS["stage 1"]):
        set_constants(train_stage1, RUN_DIR=stage1, PRETRAINED=pretrained, IMAGE_SIZE=IMAGE_SIZE, EPOCHS=STAGE1_EPOCHS)
        set_constants(train_stage1, FRAMING="centre")  # where these faces are drawn: no search, which takes a minute
        if pretrained is None:
            # Random weights have a longer way to go.
            set_constants(train_stage1, BACKBONE_LR=1e-3, HEAD_LR=1e-2, DROPOUT=0.0)
            set_constants(train_stage1, CENTRES_FROM_MEANS=False, FREEZE_BATCHNORM=False)
            set_constants(train_stage2, WIDE_LR=1e-4)
        train_stage1.main()

    with announced("3/4 stage 2: contrastive", seconds=SECONDS["stage 2"]):
        set_constants(train_stage2, RUN_DIR=stage2, STAGE1_CHECKPOINT=stage1 / "best.pt", EPOCHS=STAGE2_EPOCHS)
        set_constants(train_stage2, TEACHER=pretrained, WIDE_SIZE=IMAGE_SIZE)
        set_constants(train_stage2, PERSONS_PER_BATCH=min(train_stage2.PERSONS_PER_BATCH, TRAIN_PERSONS))
        train_stage2.main()

    with announced("4/4 evaluate before training, stage 1 and stage 2", seconds=SECONDS["evaluation"]):
        set_constants(evaluate, RESULTS_DIR=results, CHECKPOINT=None, PRETRAINED=pretrained, PICTURES=False)
        set_constants(evaluate, IMAGE_SIZE=IMAGE_SIZE, FACE_CROP=train_stage1.FACE_CROP, FRAMING="centre")
        evaluations = {"before training": evaluate.main()}
        set_constants(evaluate, CHECKPOINT=stage1 / "best.pt")
        evaluations["stage 1"] = evaluate.main()
        set_constants(evaluate, CHECKPOINT=stage2 / "best.pt", COMPARE_WITH=stage1 / "best.pt", PICTURES=True)
        evaluations["stage 2"] = evaluate.main()

    weights = "random weights" if pretrained is None else f"the {pretrained} weights"
    print(f"\n{VAL_PERSONS} synthetic persons that training never saw, starting from {weights}:\n")
    print(top1_table(evaluations))
    print(f"\n{reached(results / 'val_stage2' / 'figures.json')} ({time.time() - started:.0f} s in all)")
    print(f"Pictures and all figures: {results / 'val_stage2' / 'report.html'}; faces: {data_dir / 'sample_faces.png'}")
    print("Next: your own photos in five commands (docs/own_photos.md), or DATA_DIR of the three scripts, run in turn.")


def reached(figures: Path) -> str:
    """One sentence on the protocol `cross`, from what evaluate.py wrote."""
    cross = json.loads(figures.read_text())["protocols"]["cross"]
    rank1 = cross["figures"][cross["template"]]["all"]["rank-1"]
    low, high = (rank1[end] for end in ("low", "high"))
    interval = "" if low is None else f" (95 % interval {100 * low:.0f} to {100 * high:.0f})"
    return (
        f"Of {cross['queries']} distorted photos, never compared with the photo that they were made from, "
        f"{100 * rank1['value']:.0f} %{interval} got the right one of {cross['persons']} names"
    )


@contextlib.contextmanager
def announced(part: str, seconds: float) -> Iterator[None]:
    """Print what comes next and how long it takes, and afterwards how long it took."""
    print(f"\n== {part}: about {seconds:.0f} s on 2 cores", flush=True)
    started = time.time()
    yield
    print(f"== {part}: took {time.time() - started:.0f} s", flush=True)


def available(pretrained: str | None) -> str | None:
    """`pretrained` if its weights are here or can be fetched, else None; says which."""
    if pretrained is None:
        return None
    try:
        load_pretrained(pretrained)
    except UserError as error:
        print(f"{error}\n-> training from scratch instead: enough to see everything work, not to recognise real faces")
        return None
    print(f"starting from the {pretrained} weights")
    return pretrained


if __name__ == "__main__":
    common.run_script(main)
