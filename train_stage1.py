"""Stage 1: fine-tune FaceNet with an ArcFace head over the training persons, clean and distorted photos alike.

    python train_stage1.py

Writes RUN_DIR/best.pt (for stage 2 and evaluate.py), last.pt (for RESUME), log.csv, steps.csv, curves.png,
tensorboard/ and constants.json. Several GPUs: torchrun --nproc_per_node=2 train_stage1.py
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim import AdamW
from torch.utils.data import DataLoader

import common
import distributed
import gallery
import optimisation
import training
import validation
from datasets import (
    FaceClassificationDataset,
    FaceCleanValDataset,
    Person,
    files_digest,
    scan_persons,
    split_holdout,
    split_persons,
    warn_shared_persons,
    without_kinds,
)
from distortions import DISTORTIONS
from gallery import check_template
from losses import ArcMarginProduct
from models import EMBEDDING_DIM, FaceNet
from samplers import ShuffledBatches
from transforms import RandomDistortion, Transform, eval_transform, train_transform

# --- files ---
DATA_DIR = Path("Task_B")  # holds train/ and val/, in each one folder per person
RUN_DIR = Path("runs/stage1")  # checkpoints and log; another name for each run that is to be kept
RESUME = False  # True: go on from RUN_DIR/last.pt, as if the run had never stopped
SAVE_EVERY = 500  # optimizer updates between two saves of last.pt, besides each epoch's end; 0: then only
CHECK_IMAGES = True  # decode every file once before training, list the broken ones and go on without them

# --- validation ---
HOLDOUT_PERSONS = 0  # train persons kept out of training to choose the best epoch on; 0: choose it on val
TEMPLATE = "mean"  # which top-1 counts: "mean" of a person's clean embeddings, or "best" match among them
# An epoch that knows undistorted photos worse than the network as loaded by more than so many points of top-1 is not
# kept as the best, 0..100; 100: any is.
MAX_CLEAN_DROP = 2.0
QUICK_VALIDATION = True  # every third distorted photo, none mirrored: a fifth of the time; False: all, as evaluate.py
PATIENCE = 0  # stop after so many epochs without a better top-1, 2..20; 0: never

# --- network ---
PRETRAINED = "vggface2"  # "vggface2", "casia-webface", path of a state dict, or None: random weights
IMAGE_SIZE = 160  # pixels, 76..160; the pretrained networks saw 160
FREEZE_UNTIL = None  # last block that stays as loaded, such as "mixed_6a" (see models.BLOCKS); None: all of it trains
FACE_CROP = 0.52  # centre share of the shorter side that is kept, 0.3..1; 1 for photos cropped to the face
DROPOUT = 0.4  # before the last linear layer, 0..0.8

# --- what is trained on ---
# Kinds of distortion that are not trained on; all are evaluated. FACECOM's sunny burns out the very crop of the face:
# without a face to see, the head could only learn it by heart. (): none is left out, for other data.
SKIP_KINDS = ("sunny",)
BALANCE = 0.0  # 0: each photo once per epoch; 1: each person equally often, however many photos; 0..1
CROP_ZOOM = 0.1  # the crop's side varies by +- this share of it, 0..0.3
CROP_SHIFT = 0.03  # the crop's centre moves by +- this share of the shorter side, 0..0.1
DISTORT = 0.0  # share of the photos that are distorted anew, at random, besides the files on disk, 0..1
DISTORT_MOST = 2  # kinds on one such photo, 1..7

# --- ArcFace ---
MARGIN = 0.5  # m, radians, 0..pi/2
SCALE = 32.0  # s, no unit, 8..64: the more persons, the larger
EASY_MARGIN = False  # True: margin only where cos > 0; gentler where training does not start
# True: each class centre starts at the mean of its person's clean embeddings, so that training begins where the
# pretrained network stands instead of tearing at it; False: at random, for networks that start at random themselves.
CENTRES_FROM_MEANS = True

# --- optimisation ---
SEED = 0  # 0, 1, 2, ...
EPOCHS = 2  # passes over the train photos, 1..999
BATCH_SIZE = 32  # photos per step, on all GPUs together, >= 2
ACCUMULATE = 1  # steps per update of the weights: batches that memory cannot hold, >= 1
BACKBONE_LR = 3e-4  # AdamW, per update, 1e-5..1e-3: pretrained, moves little
HEAD_LR = 1e-3  # AdamW, per update, 1e-4..1e-1: 1e-2 for class centres that start random
WEIGHT_DECAY = 5e-4  # AdamW, 0..0.1
WARMUP_STEPS = 50  # updates with rising learning rates: random class centres would tear at the network
GRAD_CLIP = 5.0  # largest norm of the gradient, > 0
EMA_DECAY = 0.0  # weight of the past in an average of the weights, saved as best_ema.pt, 0.99..0.9999; 0: none
# True: keep the pretrained statistics. False for a network that starts at random, with batches of 16 and more, and not
# in several processes on CPUs, where each would see its own part of the batch only.
FREEZE_BATCHNORM = True

# --- speed ---
NUM_WORKERS = 2  # processes that load images, for each GPU, 0..CPU cores
AMP = "auto"  # "auto": bfloat16 or float16 on a GPU, float32 on the CPU; "bf16", "fp16"; None: float32
COMPILE = False  # True: torch.compile the network; the first steps then take minutes, the others less


def main() -> None:
    device = common.pick_device()
    training.start_run(RUN_DIR, RESUME, globals())
    check_template(TEMPLATE)
    if COMPILE:
        common.check_compiler(device, setting="COMPILE = True", way_out="COMPILE = False")

    # Data: the persons of train/, perhaps less some that the best epoch is chosen on.
    everybody = scan_persons(DATA_DIR / "train", check_images=CHECK_IMAGES)
    holdout = split_holdout([person.name for person in everybody], HOLDOUT_PERSONS, SEED)
    train_persons, val_persons = split_persons(everybody, holdout)
    if not holdout:
        val_persons = scan_persons(DATA_DIR / "val", check_images=CHECK_IMAGES)
    warn_shared_persons(train_persons, val_persons)
    train_set = FaceClassificationDataset(without_kinds(train_persons, SKIP_KINDS), augmentation(), seed=SEED)
    batches = ShuffledBatches([label for _, label in train_set.samples], BATCH_SIZE, SEED, BALANCE)
    loader = training.train_loader(train_set, batches, NUM_WORKERS, device)
    transform = eval_transform(IMAGE_SIZE, FACE_CROP)
    clean_val = clean_val_loader(val_persons, train_set, transform)

    # Model, head and optimizer.
    torch.manual_seed(SEED)
    model = FaceNet(PRETRAINED, DROPOUT, FREEZE_UNTIL).to(device, memory_format=torch.channels_last)
    head = ArcMarginProduct(EMBEDDING_DIM, len(train_set.persons), s=SCALE, m=MARGIN, easy_margin=EASY_MARGIN)
    if CENTRES_FROM_MEANS and not RESUME:
        clean = [person for person in train_persons if person.name in train_set.label2idx]
        means, labels = gallery.person_means(model, clean, transform, device, num_workers=NUM_WORKERS)
        head.start_at(means, labels)
    head = head.to(device)
    groups = [
        {"name": "backbone", "params": optimisation.trainable(model), "lr": BACKBONE_LR},
        {"name": "head", "params": head.parameters(), "lr": HEAD_LR},
    ]
    optimizer = AdamW(groups, weight_decay=WEIGHT_DECAY, fused=True)
    scheduler = optimisation.warmup_cosine(optimizer, WARMUP_STEPS, EPOCHS * math.ceil(len(loader) / ACCUMULATE))
    if COMPILE:
        model.compile()
    ddp_model, ddp_head = distributed.parallel(model), distributed.parallel(head)

    # Epochs; epoch 0 of the log is the network as loaded.
    run = training.Run(
        run_dir=RUN_DIR,
        facts=checkpoint_facts(train_set, holdout, data=files_digest(everybody), steps=len(loader)),
        networks={"model": model, "head": head},
        optimizer=optimizer,
        scheduler=scheduler,
        loader=loader,
        device=device,
        settings=run_settings(),
        wrapped=(ddp_model, ddp_head),
    )

    def validate(network: FaceNet) -> tuple[float, dict]:
        """What the best epoch is chosen by, on persons that training does not know, and the row for the log."""
        top1, row = validation.validate(
            network,
            val_persons,
            transform,
            device,
            template=TEMPLATE,
            quick=QUICK_VALIDATION,
            num_workers=NUM_WORKERS,
        )
        if clean_val and run.epoch:  # before, the head is random
            row["val_clean_accuracy"] = accuracy(network, head, clean_val, device)
        return top1, row

    if RESUME:
        run.resume()
    else:
        print(f"train: {len(train_set.persons)} persons, {len(train_set)} photos, {len(loader)} steps per epoch")
        run.finish_epoch(validate)
    for _ in run.epochs():
        train_one_epoch(run, ddp_model, ddp_head, head, device)
        run.finish_epoch(validate)
    run.report_best()


def augmentation() -> Transform:
    """What a training photo goes through, from the image to the tensor."""
    distort = RandomDistortion(
        kinds={name: kind for name, kind in DISTORTIONS.items() if name not in SKIP_KINDS},
        probability=DISTORT,
        most=DISTORT_MOST,
        side=round(IMAGE_SIZE / FACE_CROP),
    )
    return train_transform(IMAGE_SIZE, FACE_CROP, CROP_ZOOM, CROP_SHIFT, distort)


def checkpoint_facts(train_set: FaceClassificationDataset, holdout: list[str], data: str, steps: int) -> dict:
    """What the checkpoints state beside the weights; training.MUST_EQUAL and MAY_CHANGE say what a resume compares."""
    return {
        "stage": 1,
        "seed": SEED,
        "batch_size": BATCH_SIZE,
        "image_size": IMAGE_SIZE,
        "face_crop": FACE_CROP,
        "dropout": DROPOUT,
        "pretrained": str(PRETRAINED),
        "freeze_until": FREEZE_UNTIL,
        "balance": BALANCE,
        "skip_kinds": list(SKIP_KINDS),
        "photos": len(train_set),
        "distort": [DISTORT, DISTORT_MOST],
        "persons": train_set.persons,
        "holdout": holdout,
        "template": TEMPLATE,
        "chosen_by": validation.CHOICE,
        "quick_validation": QUICK_VALIDATION,
        "data": data,
        "ema_decay": EMA_DECAY,
        "accumulate": ACCUMULATE,
        "steps": steps,
        "selected_on": training.selected_on(holdout),
    }


def train_one_epoch(run: training.Run, model, ddp_head, head: ArcMarginProduct, device: torch.device) -> None:
    """One pass over the train photos."""
    model.train()
    if FREEZE_BATCHNORM:
        optimisation.freeze_batchnorm(model)
    for images, labels in run.steps():
        with optimisation.autocast(device, AMP):
            embeddings = model(images)
        embeddings, labels = distributed.gather(embeddings, labels)  # from here on each process has the whole batch
        logits = ddp_head(embeddings, labels)
        loss = F.cross_entropy(logits, labels)
        with torch.no_grad():
            # Without the margin, as at test time: with it the right logit is handicapped.
            right = (head.cosine(embeddings).argmax(1) == labels).float().mean()
            target = logits.gather(1, labels[:, None]).mean()  # s cos(t + m), on the way from 0 to s
        run.step(loss, {"accuracy": right, "target_logit": target})


def clean_val_loader(
    val_persons: list[Person], train_set: FaceClassificationDataset, transform: Transform
) -> DataLoader | None:
    """Batches of the clean val photos if all val persons are trained ones; else None: the head does not know them."""
    if not {person.name for person in val_persons} <= set(train_set.persons):
        return None
    clean = FaceCleanValDataset(val_persons, train_set.persons, train_set.label2idx, transform)
    return DataLoader(clean, BATCH_SIZE, num_workers=NUM_WORKERS)


@torch.inference_mode()
def accuracy(model, head, loader: DataLoader, device: torch.device) -> float:
    """Share (0..1) of photos whose nearest class centre is their person's."""
    model.eval()
    right = 0
    for images, labels in loader:
        embeddings = model(images.to(device, memory_format=torch.channels_last))
        right += int((head.cosine(embeddings).argmax(1).cpu() == labels).sum())
    return right / len(loader.dataset)


def run_settings() -> training.RunSettings:
    return training.RunSettings(
        epochs=EPOCHS,
        accumulate=ACCUMULATE,
        grad_clip=GRAD_CLIP,
        ema_decay=EMA_DECAY,
        patience=PATIENCE,
        save_every=SAVE_EVERY,
        max_clean_drop=MAX_CLEAN_DROP,
        amp=AMP,
    )


if __name__ == "__main__":
    common.run_script(main)
