"""Stage 2: pull a distorted photo to its person's clean one and push the nearest other person away.

    python train_stage2.py

Starts from STAGE1_CHECKPOINT; writes RUN_DIR/best.pt (for evaluate.py), last.pt (for RESUME), log.csv, steps.csv,
curves.png, tensorboard/ and constants.json. Several GPUs: torchrun --nproc_per_node=2 train_stage2.py
"""

import math
from pathlib import Path

import torch
from torch.optim import AdamW

import training
from datasets import (
    FacePairDataset,
    PersonBatches,
    RandomDistortion,
    eval_transform,
    scan_persons,
    train_transform,
    warn_shared,
)
from distortions import DISTORTIONS
from gallery import build_gallery, check_template, evaluate, summary
from losses import ContrastiveLoss, euclidean, hardest_negatives

# --- files ---
DATA_DIR = Path("Task_B")  # holds train/ and val/, in each one folder per person
STAGE1_CHECKPOINT = Path("runs/stage1/best.pt")  # what stage 1 wrote; knows its image size, crop and held-out persons
RUN_DIR = Path("runs/stage2")  # checkpoints and log; another name for each run that is to be kept
RESUME = False  # True: go on from RUN_DIR/last.pt, as if the run had never stopped
SAVE_EVERY = 500  # optimizer updates between two saves of last.pt, besides each epoch's end; 0: then only
CHECK_IMAGES = True  # decode every file once before training, list the broken ones and go on without them

# --- validation ---
TEMPLATE = "mean"  # which top-1 counts: "mean" of a person's clean embeddings, or "best" match among them
PATIENCE = 0  # stop after so many epochs without a better top-1, 2..20; 0: never

# --- network ---
FREEZE_UNTIL = None  # last block that stays as loaded, such as "mixed_6a" (see models.BLOCKS); None: all of it trains

# --- pairs ---
PERSONS_PER_BATCH = 24  # P, different persons in each step, on all GPUs together, >= 2: each is a negative of the rest
PHOTOS_PER_PERSON = 2  # K, half of them clean and half distorted, even, >= 2
CONTRASTIVE_MARGIN = 1.0  # distance of unit embeddings, 0..2: negatives farther away give no gradient
HARD_NEGATIVES = True  # nearest other person of the batch; False: a random photo more, which is too far to push
# Kinds of distortion that are not trained on; all are evaluated. FACECOM's sunny hides the whole face: pulling every
# person to the same white disc pulls them to each other. () trains on all.
SKIP_KINDS = ("sunny",)
CROP_ZOOM = 0.1  # the crop's side varies by +- this share of it, 0..0.3
CROP_SHIFT = 0.03  # the crop's centre moves by +- this share of the shorter side, 0..0.1
DISTORT = 0.0  # share of the positives that are distorted once more, at random, 0..1
DISTORT_MOST = 2  # kinds on one such photo, 1..7

# --- optimisation ---
SEED = 0  # 0, 1, 2, ...
EPOCHS = 4  # passes over the clean train photos, 1..999
ACCUMULATE = 1  # steps per update of the weights, >= 1; negatives are still mined in each step alone
LEARNING_RATE = 3e-5  # AdamW, per update, 1e-6..1e-4: a tenth of stage 1's, only refines it
WEIGHT_DECAY = 5e-4  # AdamW, 0..0.1
WARMUP_STEPS = 20  # updates with rising learning rate
GRAD_CLIP = 5.0  # largest norm of the gradient, > 0
EMA_DECAY = 0.0  # weight of the past in an average of the weights, saved as best_ema.pt, 0.99..0.9999; 0: none
FREEZE_BATCHNORM = True  # stage 1 has fitted the statistics; a few persons at a time only blur them

# --- speed ---
NUM_WORKERS = 2  # processes that load images, for each GPU, 0..CPU cores
AMP = "auto"  # "auto": bfloat16 or float16 on a GPU, float32 on the CPU; "bf16", "fp16"; None: float32
COMPILE = False  # True: torch.compile the network; the first steps then take minutes, the others less


def main() -> None:
    device = training.pick_device()
    training.start_run(RUN_DIR, RESUME, globals())
    check_template(TEMPLATE)

    # Model: what stage 1 left, and what its checkpoint knows.
    model, stage1 = training.load_facenet(STAGE1_CHECKPOINT, device, FREEZE_UNTIL)
    image_size, face_crop, holdout = stage1["image_size"], stage1["face_crop"], stage1["holdout"]

    # Data: pairs of the persons that stage 1 trained on.
    train_dir, val_dir = DATA_DIR / "train", DATA_DIR / "val"
    warn_shared(
        scan_persons(train_dir, check_images=CHECK_IMAGES),
        [] if holdout else scan_persons(val_dir, check_images=CHECK_IMAGES),
    )
    if PHOTOS_PER_PERSON % 2:
        raise ValueError(
            f"PHOTOS_PER_PERSON = {PHOTOS_PER_PERSON}: expected an even number, half clean, half distorted"
        )
    distort = RandomDistortion(
        {name: kind for name, kind in DISTORTIONS.items() if name not in SKIP_KINDS},
        *(DISTORT, DISTORT_MOST),
        side=round(image_size / face_crop),
    )
    crop = (image_size, face_crop, CROP_ZOOM, CROP_SHIFT)
    train_set = FacePairDataset(
        train_dir,
        train_transform(*crop),
        positive_transform=train_transform(*crop, distort),
        negatives=not HARD_NEGATIVES,
        exclude=holdout,
        skip_kinds=SKIP_KINDS,
        seed=SEED,
        check_images=CHECK_IMAGES,
    )
    batches = PersonBatches([label for _, label in train_set.anchors], PERSONS_PER_BATCH, PHOTOS_PER_PERSON // 2, SEED)
    loader = training.train_loader(train_set, batches, NUM_WORKERS, device)
    transform = eval_transform(image_size, face_crop)

    # Loss and optimizer.
    criterion = ContrastiveLoss(CONTRASTIVE_MARGIN)
    group = {"name": "backbone", "params": training.trainable(model), "lr": LEARNING_RATE}
    optimizer = AdamW([group], weight_decay=WEIGHT_DECAY, fused=True)
    scheduler = training.warmup_cosine(optimizer, WARMUP_STEPS, EPOCHS * math.ceil(len(loader) / ACCUMULATE))
    if COMPILE:
        model.compile()
    ddp_model = training.parallel(model)

    def validate(network: torch.nn.Module) -> tuple[float, dict]:
        """Top-1 of retrieval among persons that training does not know, and the row for the log."""
        root = train_dir if holdout else val_dir
        options = {"persons": holdout or None, "num_workers": NUM_WORKERS, "check_images": CHECK_IMAGES}
        gallery = build_gallery(network, root, transform, device, template=TEMPLATE, **options)
        top1, details = evaluate(network, gallery, root, transform, device, **options)
        return top1, summary(details)

    # Epochs; epoch 0 is what stage 1 left, so the best checkpoint is never worse than that.
    facts = {key: stage1[key] for key in ("image_size", "face_crop", "dropout", "pretrained", "holdout")}
    facts |= {"stage": 2, "persons": train_set.persons, "template": TEMPLATE, "seed": SEED}
    facts |= {"freeze_until": FREEZE_UNTIL, "batch_size": [PERSONS_PER_BATCH, PHOTOS_PER_PERSON]}
    facts |= {"distort": [DISTORT, DISTORT_MOST], "hard_negatives": HARD_NEGATIVES}
    facts |= {"skip_kinds": list(SKIP_KINDS), "photos": len(train_set)}
    run = training.Run(
        *(RUN_DIR, facts, {"model": model}, optimizer, scheduler, loader),
        **{"epochs": EPOCHS, "device": device, "wrapped": (ddp_model,), "amp": AMP, "accumulate": ACCUMULATE},
        **{"grad_clip": GRAD_CLIP, "ema_decay": EMA_DECAY, "patience": PATIENCE, "save_every": SAVE_EVERY},
    )
    if RESUME:
        run.resume()
    else:
        print(f"train: {len(train_set.persons)} persons, {len(train_set)} anchors, {len(loader)} steps per epoch")
        run.finish_epoch(validate)
    for _ in run.epochs():
        train_one_epoch(run, ddp_model, criterion, device)
        run.finish_epoch(validate)
    run.tell_end()


def train_one_epoch(run: training.Run, model, criterion: ContrastiveLoss, device: torch.device) -> None:
    """One pass over the anchors."""
    model.train()
    if FREEZE_BATCHNORM:
        training.freeze_batchnorm(model)
    for batch in run.steps():
        *images, labels = batch if HARD_NEGATIVES else batch[:4]  # the fifth, whose the negatives are, is not needed
        with training.autocast(device, AMP):
            embeddings = model(torch.cat(images))  # one pass: BatchNorm sees clean and distorted photos together
        # From here on each process has the whole batch: negatives are mined among all of it.
        anchor, positive, *negative, labels = training.gather(*embeddings.split(len(labels)), labels)  # (B, D), (B,)
        if HARD_NEGATIVES:
            candidates = torch.cat([anchor, positive])
            negative = [candidates[hardest_negatives(anchor, labels, candidates, labels.repeat(2))]]
        loss = criterion(anchor, positive, *negative)
        with torch.no_grad():
            to_positive, to_negative = euclidean(anchor, positive), euclidean(anchor, *negative)
            right = (to_positive < to_negative).float().mean()  # share of triplets in the right order
            active = (to_negative < CONTRASTIVE_MARGIN).float().mean()  # share of negatives that push
        run.step(
            loss,
            accuracy=right,
            active_negatives=active,
            positive_distance=to_positive.mean(),
            negative_distance=to_negative.mean(),
        )


if __name__ == "__main__":
    training.run(main)
