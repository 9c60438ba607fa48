"""Stage 1: fine-tune FaceNet with an ArcFace head over the training persons, clean and distorted photos alike.

    python train_stage1.py

Writes RUN_DIR/best.pt (for stage 2 and evaluate.py), last.pt (for RESUME), log.csv and constants.json.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim import AdamW
from torch.utils.data import DataLoader
from tqdm import tqdm

import training
from datasets import (
    FaceClassificationDataset,
    FaceCleanValDataset,
    Person,
    eval_transform,
    scan_persons,
    split_holdout,
    train_transform,
    warn_shared,
)
from gallery import build_gallery, check_template, evaluate, summary
from losses import ArcMarginProduct
from models import EMBEDDING_DIM, FaceNet

# --- files ---
DATA_DIR = Path("Task_B")  # holds train/ and val/, in each one folder per person
RUN_DIR = Path("runs/stage1")  # checkpoints and log; another name for each run that is to be kept
RESUME = False  # True: go on after the last finished epoch of RUN_DIR
CHECK_IMAGES = True  # decode every file once before training, list the broken ones and go on without them
NUM_WORKERS = 2  # processes that load images, 0..CPU cores

# --- validation ---
HOLDOUT_PERSONS = 0  # train persons kept out of training to choose the best epoch on; 0: choose it on val
TEMPLATE = "mean"  # which top-1 counts: "mean" of a person's clean embeddings, or "best" match among them

# --- network ---
PRETRAINED = "vggface2"  # "vggface2", "casia-webface", path of a state dict, or None: random weights
IMAGE_SIZE = 160  # pixels, 76..160; the pretrained networks saw 160
FACE_CROP = 0.52  # centre share of the shorter side that is kept, 0.3..1; 1 for photos cropped to the face
SKIP_KINDS = ()  # kinds of distortion that are not trained on, such as ("sunny",); all are evaluated
CROP_ZOOM = 0.1  # in training the crop's side varies by +- this share of it, 0..0.3
CROP_SHIFT = 0.03  # in training the crop's centre moves by +- this share of the shorter side, 0..0.1
DROPOUT = 0.4  # before the last linear layer, 0..0.8

# --- ArcFace ---
MARGIN = 0.5  # m, radians, 0..pi/2
SCALE = 32.0  # s, no unit, 8..64: the more persons, the larger
EASY_MARGIN = False  # True: margin only where cos > 0; gentler where training does not start

# --- optimisation ---
SEED = 0  # 0, 1, 2, ...
EPOCHS = 4  # passes over the train photos, 1..999
BATCH_SIZE = 32  # photos per step, >= 2
BACKBONE_LR = 3e-4  # AdamW, per step, 1e-5..1e-3: pretrained, moves little
HEAD_LR = 1e-2  # AdamW, per step, 1e-3..1e-1: class centres start random
WEIGHT_DECAY = 5e-4  # AdamW, 0..0.1
WARMUP_STEPS = 50  # steps with rising learning rates: random class centres would tear at the network
GRAD_CLIP = 5.0  # largest norm of the gradient, > 0
FREEZE_BATCHNORM = False  # True: keep the pretrained statistics; for batches under 16
AMP = True  # mixed precision on a GPU; the CPU always computes in float32


def main() -> None:
    device = training.pick_device()
    training.start_run(RUN_DIR, RESUME, globals())
    check_template(TEMPLATE)

    # Data: the persons of train/, perhaps less some that the best epoch is chosen on.
    train_dir, val_dir = DATA_DIR / "train", DATA_DIR / "val"
    train_persons = scan_persons(train_dir, check_images=CHECK_IMAGES)
    holdout = split_holdout([person.name for person in train_persons], HOLDOUT_PERSONS, SEED)
    val_persons = [] if holdout else scan_persons(val_dir, check_images=CHECK_IMAGES)
    warn_shared(train_persons, val_persons)
    augment = train_transform(IMAGE_SIZE, FACE_CROP, CROP_ZOOM, CROP_SHIFT)
    train_set = FaceClassificationDataset(
        train_dir, augment, exclude=holdout, skip_kinds=SKIP_KINDS, seed=SEED, check_images=CHECK_IMAGES
    )
    loader = training.train_loader(train_set, BATCH_SIZE, NUM_WORKERS, device)
    transform = eval_transform(IMAGE_SIZE, FACE_CROP)
    clean_val = None if holdout else clean_val_loader(val_dir, val_persons, train_set, transform)

    # Model, head and optimizer.
    training.seed_epoch(SEED, 0)
    model = FaceNet(PRETRAINED, DROPOUT).to(device, memory_format=torch.channels_last)
    head = ArcMarginProduct(EMBEDDING_DIM, len(train_set.persons), s=SCALE, m=MARGIN, easy_margin=EASY_MARGIN)
    head = head.to(device)
    groups = [
        {"params": model.parameters(), "lr": BACKBONE_LR},
        {"params": head.parameters(), "lr": HEAD_LR},
    ]
    optimizer = AdamW(groups, weight_decay=WEIGHT_DECAY, fused=device.type == "cuda")
    scheduler = training.warmup_cosine(optimizer, WARMUP_STEPS, EPOCHS * len(loader))
    scaler = training.grad_scaler(device, AMP)

    def validate() -> tuple[float, dict]:
        """Top-1 of retrieval among persons that training does not know, and the row for the log."""
        root = train_dir if holdout else val_dir
        options = {"persons": holdout or None, "num_workers": NUM_WORKERS, "check_images": CHECK_IMAGES}
        gallery = build_gallery(model, root, transform, device, template=TEMPLATE, **options)
        top1, details = evaluate(model, gallery, root, transform, device, **options)
        return top1, summary(details)

    # Epochs; epoch 0 of the log is the network as loaded.
    facts = {
        "stage": 1,
        "seed": SEED,
        "batch_size": BATCH_SIZE,
        "image_size": IMAGE_SIZE,
        "face_crop": FACE_CROP,
        "dropout": DROPOUT,
        "pretrained": str(PRETRAINED),
        "persons": train_set.persons,
        "holdout": holdout,
        "template": TEMPLATE,
    }
    progress = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    run = training.Run(RUN_DIR, facts, {"model": model, "head": head}, progress)
    if not RESUME:
        print(f"train: {len(train_set.persons)} persons, {len(train_set)} photos, {len(loader)} steps per epoch")
        run.finish_epoch(0, EPOCHS, *validate())
    for epoch in range(run.resume() if RESUME else 1, EPOCHS + 1):
        training.seed_epoch(SEED, epoch)
        train_set.set_epoch(epoch)
        row = train_one_epoch(epoch, model, head, loader, optimizer, scheduler, scaler, device)
        top1, val_row = validate()
        if clean_val:
            row["val_clean_accuracy"] = accuracy(model, head, clean_val, device)
        run.finish_epoch(epoch, EPOCHS, top1, row | val_row)
    run.tell_end()


def train_one_epoch(epoch, model, head, loader, optimizer, scheduler, scaler, device) -> dict:
    """One pass over the train photos; returns the row for the log."""
    model.train()
    if FREEZE_BATCHNORM:
        training.freeze_batchnorm(model)
    meter = training.Meter()
    for images, labels in (bar := tqdm(loader, desc=f"epoch {epoch}/{EPOCHS}", unit="batch", leave=False)):
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        labels = labels.to(device, non_blocking=True)
        with training.autocast(device, AMP):
            embeddings = model(images)
        logits = head(embeddings, labels)
        loss = F.cross_entropy(logits, labels)
        learning_rate = scheduler.get_last_lr()[0]
        gradient_norm = training.step(loss, optimizer, scheduler, scaler, GRAD_CLIP)
        # Without the margin, as at test time: with it the right logit is handicapped.
        right = (head.cosine(embeddings.detach()).argmax(1) == labels).float().mean()
        meter.add(len(images), loss=loss, accuracy=right, gradient_norm=gradient_norm)
        bar.set_postfix_str(f"{meter}, lr {learning_rate:.1e}")
    return meter.means() | {"backbone_lr": learning_rate}


def clean_val_loader(
    val_dir: Path, val_persons: list[Person], train_set: FaceClassificationDataset, transform
) -> DataLoader | None:
    """Batches of the clean val photos, where every val person is a trained one; else None: the head knows nobody."""
    if not {person.name for person in val_persons} <= set(train_set.persons):
        return None
    clean = FaceCleanValDataset(val_dir, train_set.persons, train_set.label2idx, transform, check_images=CHECK_IMAGES)
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


if __name__ == "__main__":
    training.run(main)
