"""Stage 2: pull a distorted photo to its person's clean one and push the nearest other person away.

    python train_stage2.py

Starts from STAGE1_CHECKPOINT; writes RUN_DIR/best.pt (for evaluate.py), last.pt (for RESUME), log.csv, constants.json.
"""

from pathlib import Path

import torch
from torch.optim import AdamW
from tqdm import tqdm

import training
from datasets import FacePairDataset, eval_transform, train_transform
from gallery import build_gallery, check_template, evaluate, summary
from losses import ContrastiveLoss, euclidean, hardest_negatives

# --- files ---
DATA_DIR = Path("Task_B")  # holds train/ and val/, in each one folder per person
STAGE1_CHECKPOINT = Path("runs/stage1/best.pt")  # what stage 1 wrote; knows its image size, crop and held-out persons
RUN_DIR = Path("runs/stage2")  # checkpoints and log; another name for each run that is to be kept
RESUME = False  # True: go on after the last finished epoch of RUN_DIR
CHECK_IMAGES = True  # decode every file once before training, list the broken ones and go on without them
NUM_WORKERS = 2  # processes that load images, 0..CPU cores

# --- validation ---
TEMPLATE = "mean"  # which top-1 counts: "mean" of a person's clean embeddings, or "best" match among them

# --- pairs ---
CONTRASTIVE_MARGIN = 1.0  # distance of unit embeddings, 0..2: negatives farther away give no gradient
HARD_NEGATIVES = True  # nearest other person of the batch; False: the pair's random one, which is too far to push
# Kinds of distortion that are not trained on; all are evaluated. FACECOM's sunny hides the whole face: pulling every
# person to the same white disc pulls them to each other. () trains on all.
SKIP_KINDS = ("sunny",)
CROP_ZOOM = 0.1  # the crop's side varies by +- this share of it, 0..0.3
CROP_SHIFT = 0.03  # the crop's centre moves by +- this share of the shorter side, 0..0.1

# --- optimisation ---
SEED = 0  # 0, 1, 2, ...
EPOCHS = 4  # passes over the clean train photos, 1..999
BATCH_SIZE = 16  # triplets per step, >= 2: three photos each
LEARNING_RATE = 3e-5  # AdamW, per step, 1e-6..1e-4: a tenth of stage 1's, only refines it
WEIGHT_DECAY = 5e-4  # AdamW, 0..0.1
WARMUP_STEPS = 20  # steps with rising learning rate
GRAD_CLIP = 5.0  # largest norm of the gradient, > 0
FREEZE_BATCHNORM = True  # stage 1 has fitted the statistics; a few triplets at a time only blur them
AMP = True  # mixed precision on a GPU; the CPU always computes in float32


def main() -> None:
    device = training.pick_device()
    training.start_run(RUN_DIR, RESUME, globals())
    check_template(TEMPLATE)

    # Model: what stage 1 left, and what its checkpoint knows.
    training.seed_epoch(SEED, 0)
    model, stage1 = training.load_facenet(STAGE1_CHECKPOINT, device)
    image_size, face_crop, holdout = stage1["image_size"], stage1["face_crop"], stage1["holdout"]

    # Data: pairs of the persons that stage 1 trained on.
    train_dir, val_dir = DATA_DIR / "train", DATA_DIR / "val"
    augment = train_transform(image_size, face_crop, CROP_ZOOM, CROP_SHIFT)
    train_set = FacePairDataset(
        train_dir, augment, exclude=holdout, skip_kinds=SKIP_KINDS, seed=SEED, check_images=CHECK_IMAGES
    )
    loader = training.train_loader(train_set, BATCH_SIZE, NUM_WORKERS, device)
    transform = eval_transform(image_size, face_crop)

    # Loss and optimizer.
    criterion = ContrastiveLoss(CONTRASTIVE_MARGIN)
    optimizer = AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=device.type == "cuda")
    scheduler = training.warmup_cosine(optimizer, WARMUP_STEPS, EPOCHS * len(loader))
    scaler = training.grad_scaler(device, AMP)

    def validate() -> tuple[float, dict]:
        """Top-1 of retrieval among persons that training does not know, and the row for the log."""
        root = train_dir if holdout else val_dir
        options = {"persons": holdout or None, "num_workers": NUM_WORKERS, "check_images": CHECK_IMAGES}
        gallery = build_gallery(model, root, transform, device, template=TEMPLATE, **options)
        top1, details = evaluate(model, gallery, root, transform, device, **options)
        return top1, summary(details)

    # Epochs; epoch 0 is what stage 1 left, so the best checkpoint is never worse than that.
    facts = {key: stage1[key] for key in ("image_size", "face_crop", "dropout", "pretrained", "holdout")}
    facts |= {"stage": 2, "persons": train_set.persons, "template": TEMPLATE, "seed": SEED, "batch_size": BATCH_SIZE}
    progress = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    run = training.Run(RUN_DIR, facts, {"model": model}, progress)
    if not RESUME:
        print(f"train: {len(train_set.persons)} persons, {len(train_set)} anchors, {len(loader)} steps per epoch")
        run.finish_epoch(0, EPOCHS, *validate())
    for epoch in range(run.resume() if RESUME else 1, EPOCHS + 1):
        training.seed_epoch(SEED, epoch)
        train_set.set_epoch(epoch)
        row = train_one_epoch(epoch, model, criterion, loader, optimizer, scheduler, scaler, device)
        top1, val_row = validate()
        run.finish_epoch(epoch, EPOCHS, top1, row | val_row)
    run.tell_end()


def train_one_epoch(epoch, model, criterion, loader, optimizer, scheduler, scaler, device) -> dict:
    """One pass over the anchors; returns the row for the log."""
    model.train()
    if FREEZE_BATCHNORM:
        training.freeze_batchnorm(model)
    meter = training.Meter()
    for *images, labels, negative_labels in (
        bar := tqdm(loader, desc=f"epoch {epoch}/{EPOCHS}", unit="batch", leave=False)
    ):
        images = torch.cat(images).to(device, non_blocking=True, memory_format=torch.channels_last)  # (3B, 3, H, W)
        labels, negative_labels = labels.to(device), negative_labels.to(device)
        with training.autocast(device, AMP):
            embeddings = model(images)  # one pass, so that BatchNorm sees clean and distorted photos together
        anchor, positive, negative = embeddings.chunk(3)  # (B, D) each
        if HARD_NEGATIVES:
            candidate_labels = torch.cat([labels, labels, negative_labels])
            negative = embeddings[hardest_negatives(anchor, labels, embeddings, candidate_labels)]
        loss = criterion(anchor, positive, negative)
        learning_rate = scheduler.get_last_lr()[0]
        gradient_norm = training.step(loss, optimizer, scheduler, scaler, GRAD_CLIP)
        with torch.no_grad():
            to_positive, to_negative = euclidean(anchor, positive), euclidean(anchor, negative)
            right = (to_positive < to_negative).float().mean()  # share of triplets in the right order
            active = (to_negative < CONTRASTIVE_MARGIN).float().mean()  # share of negatives that push
        meter.add(len(labels) * 3, loss=loss, accuracy=right, active_negatives=active, gradient_norm=gradient_norm)
        bar.set_postfix_str(f"{meter}, lr {learning_rate:.1e}")
    return meter.means() | {"backbone_lr": learning_rate}


if __name__ == "__main__":
    training.run(main)
