"""Stage 1: fine-tune FaceNet with an ArcFace head over the training persons, clean and distorted photos alike.

    python train_stage1.py

Each photo (B, 3, 160, 160) becomes an embedding z of norm 1; the head holds a centre w_j of norm 1 for each person.
With the cosine of photo and person cos t_j = z w_j, the logits are

    s cos(t_y + m) for the photo's own person y,  s cos t_j for all others

(s = SCALE, m = MARGIN), and the loss is their cross-entropy: ArcFace, Deng et al. 2019, arXiv:1801.07698. Network and
centres are trained together by AdamW, with a linear warm-up and then half a cosine down to 0.
After each epoch, and before the first (epoch 0), the network is validated on persons it is not trained on: a gallery of
their clean photos; every third distorted photo (QUICK_VALIDATION), and each clean photo degraded in four ways, a query;
top-1. The best epoch has the highest mean of top-1 over the protocols `same` and `cross` (see RESULTS.md) without
having forgotten clean photos (MAX_CLEAN_DROP); epoch 0 can be the best.

Writes RUN_DIR/best.pt (for stage 2 and evaluate.py), last.pt (for RESUME), log.csv, steps.csv, curves.png,
tensorboard/, constants.json and, with EMA_DECAY, best_ema.pt. Several GPUs: torchrun --nproc_per_node=2 train_stage1.py
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim import AdamW
from torch.utils.data import BatchSampler, SequentialSampler

import calibration
import common
import distributed
import gallery
import optimisation
import training
import validation
from common import UserError
from constants import course
from datasets import (
    FaceClassificationDataset,
    FaceCleanValDataset,
    Person,
    files_digest,
    photos_of,
    scan_persons,
    split_holdout,
    split_persons,
    warn_shared_persons,
    without_kinds,
)
from degradations import RandomDegradation, families_without, validation_degradations
from framing import Frames, check_framing, find_frames, sources_of
from loading import PhotoLoader
from losses import ArcMarginProduct
from models import FaceNet, fingerprint
from samplers import ShuffledBatches
from transforms import Transform, eval_transform, train_transform
from validation import ValidationSet

# --- files ---
DATA_DIR = Path("Task_B")  # holds train/ and val/, in each one folder per person
RUN_DIR = Path("runs/stage1")  # checkpoints and log; use a new name for each run that you want to keep
RESUME = False  # True: go on from RUN_DIR/last.pt, as if the run had never stopped
SAVE_EVERY = 500  # optimizer updates between saves of last.pt; 0: it is saved only after each epoch
CHECK_IMAGES = True  # decode every file once before training; list the broken ones and train without them

# --- validation ---
HOLDOUT_PERSONS = 0  # train persons kept out of training, to choose the best epoch on; 0: choose it on val
TEMPLATE = "mean"  # whose top-1 chooses the best epoch: "mean" of a person's clean embeddings, or "best" match
# An epoch cannot be the best if its top-1 on clean photos is this many percentage points below that of epoch 0, 0..100;
# 100: no limit.
MAX_CLEAN_DROP = 2.0
QUICK_VALIDATION = True  # validate on every third distorted photo, without mirror images; False: as evaluate.py does
PATIENCE = 0  # stop after this many epochs without a better top-1, 2..20; 0: never

# --- network ---
BACKBONE = "facenet"  # "facenet": InceptionResnetV1; "resnet50": torchvision's, with PRETRAINED = "imagenet"
PRETRAINED = "vggface2"  # "vggface2", "casia-webface", path of a state dict, or None: random weights
IMAGE_SIZE = 160  # pixels, 76..160; the pretrained networks saw 160
FREEZE_UNTIL = None  # freeze the blocks up to and including this one, such as "mixed_6a" (see backbones.py)
# Side of the face crop over that of the square around the face found, or with "centre" over the photo's shorter side,
# 0.3..1: 0.52 is the face in such a square and in LFW's photos; photos that are face crops need 1, and "centre".
FACE_CROP = 0.52
FRAMING = "detected"  # of the face: MTCNN finds it; "centre": it is at the centre of each photo, see framing.py
DROPOUT = 0.4  # before the last linear layer, 0..0.8

# --- what is trained on ---
# Kinds of distorted files to leave out of training; all are evaluated. FACECOM's sunny whites out the whole face crop,
# so the head could only memorise these photos. (): leave out none, for other data.
SKIP_KINDS = ("sunny",)
BALANCE = 0.0  # 0: each photo once per epoch; 1: each person equally often, however many photos; or between
CROP_ZOOM = 0.1  # the crop's side varies by +- this fraction of it, 0..0.3
CROP_SHIFT = 0.03  # the crop's centre moves by +- this fraction of the shorter side, 0..0.1
DISTORT = 0.0  # fraction of the photos that are distorted on the fly, besides the files on disk, 0..1
DISTORT_MOST = 4  # families of degradations on one such photo, 1..8; see docs/degradations.md
# Families that training never draws, such as ("glare",), to see what becomes of them; validation then degrades its
# clean photos by these alone. (): both draw from all families.
WITHOUT_FAMILIES = ()

# --- ArcFace ---
MARGIN = 0.5  # m, radians, 0 or more and below pi/2
SCALE = 32.0  # s, no unit, 8..64; larger for more persons
EASY_MARGIN = False  # True: margin only where cos t_y > 0; try it if the loss does not fall
# True: each class centre starts at the mean of its person's clean embeddings, so that training begins at the pretrained
# network instead of disrupting it; False: at random, for networks that start at random themselves.
CENTRES_FROM_MEANS = True

# --- optimisation ---
SEED = 0  # 0, 1, 2, ...
EPOCHS = 2  # passes over the train photos, 1..999
BATCH_SIZE = 32  # photos per step, on all GPUs together, >= 2
ACCUMULATE = 1  # steps per update of the weights, >= 1: for batches that do not fit into memory
BACKBONE_LR = 3e-4  # AdamW, 1e-5..1e-3: small, as the weights are pretrained
HEAD_LR = 1e-3  # AdamW, 1e-4..1e-1: 1e-2 for class centres that start at random
WEIGHT_DECAY = 5e-4  # AdamW, 0..0.1
WARMUP_STEPS = 50  # updates over which the learning rates rise linearly
GRAD_CLIP = 5.0  # largest norm of the gradient of network and head together, > 0
EMA_DECAY = 0.0  # of the exponential moving average of the weights (best_ema.pt), 0.99..0.9999; 0: no average
# True: keep the pretrained statistics. False: for a network that starts at random, with batches of at least 16, and in
# one process or on GPUs (on CPUs each process would see only its own part of the batch).
FREEZE_BATCHNORM = True

# --- speed ---
NUM_WORKERS = "auto"  # processes that load images, for each GPU, 0..; "auto": one per core, at most 16
# "auto": bfloat16 or float16 on a GPU, bfloat16 on a CPU with AMX, else float32; "bf16", "fp16"; None: float32.
AMP = "auto"
# "auto": on one GPU, with ACCUMULATE = 1, the network's passes are recorded and replayed as CUDA graphs, in 30 to 60 %
# of the time; True: torch.compile it, whose first steps then take minutes, the others less; False: neither.
COMPILE = "auto"


def main() -> None:
    common.resolve_constants(globals())
    device = common.pick_device()
    saved = training.start_run(RUN_DIR, RESUME, globals(), stage=1)
    check_framing(FRAMING, FACE_CROP)

    # Data: the persons of train/, minus any that are held out to choose the best epoch on.
    everybody = scan_persons(DATA_DIR / "train", check_images=CHECK_IMAGES)
    holdout = split_holdout([person.name for person in everybody], HOLDOUT_PERSONS, SEED)
    train_persons, val_persons = split_persons(everybody, holdout)
    if not holdout:
        val_persons = scan_persons(DATA_DIR / "val", check_images=CHECK_IMAGES)
    trained_on = without_kinds(train_persons, SKIP_KINDS)
    frames = find_frames(FRAMING, photos_of(trained_on), device, sources_of(trained_on))
    train_set = FaceClassificationDataset(trained_on, augmentation(frames), seed=SEED)
    check_data(train_set, train_persons, val_persons)
    batches = ShuffledBatches([label for _, label in train_set.samples], BATCH_SIZE, SEED, BALANCE)
    loader = training.train_loader(train_set, batches, NUM_WORKERS, device, epochs=EPOCHS)
    val_frames = find_frames(FRAMING, photos_of(val_persons), device)
    transform = eval_transform(IMAGE_SIZE, FACE_CROP, val_frames)
    degradations = validation_degradations(WITHOUT_FAMILIES, DISTORT_MOST, side=round(IMAGE_SIZE / FACE_CROP))
    val_set = ValidationSet(
        val_persons,
        transform,
        degraded=[eval_transform(IMAGE_SIZE, FACE_CROP, val_frames, each) for each in degradations],
        device=device,
        template=TEMPLATE,
        quick=QUICK_VALIDATION,
        num_workers=NUM_WORKERS,
    )
    clean_val = clean_val_loader(val_persons, train_set, transform, device)

    # Model, head and optimizer.
    torch.manual_seed(SEED)
    model, pretrained_weights = load_network(saved)
    model = model.to(device, memory_format=torch.channels_last)
    head = ArcMarginProduct(model.dim, len(train_set.persons), s=SCALE, m=MARGIN, easy_margin=EASY_MARGIN)
    head = head.to(device)
    groups = [
        {"name": "backbone", "params": optimisation.trainable(model), "lr": BACKBONE_LR},
        {"name": "head", "params": head.parameters(), "lr": HEAD_LR},
    ]
    optimizer = AdamW(groups, weight_decay=WEIGHT_DECAY, fused=True)
    scheduler = optimisation.warmup_cosine(optimizer, WARMUP_STEPS, EPOCHS * math.ceil(len(loader) / ACCUMULATE))
    if COMPILE is True:
        model.compile()
    ddp_model, ddp_head = distributed.parallel(model), distributed.parallel(head)

    # Epochs; epoch 0 is the network before training.
    run = training.Run(
        run_dir=RUN_DIR,
        facts=checkpoint_facts(
            train_set,
            holdout,
            data=files_digest(everybody),
            val="" if holdout else files_digest(val_persons),
            steps=len(loader),
            pretrained_weights=pretrained_weights,
        ),
        networks={"model": model, "head": head},
        optimizer=optimizer,
        scheduler=scheduler,
        loader=loader,
        device=device,
        settings=run_settings(),
        wrapped=(ddp_model, ddp_head),
    )

    def validate(network: FaceNet) -> tuple[float, dict]:
        """The figure that chooses the best epoch, and the row for the log."""
        top1, row = validation.validate(network, val_set)
        if clean_val and run.epoch:  # at epoch 0 the head is not trained
            row["val_clean_accuracy"] = accuracy(network, head, clean_val, device)
        return top1, row

    if saved:
        run.resume(globals())
    else:
        print(f"train: {len(train_set.persons)} persons, {len(train_set)} photos, {len(loader)} steps per epoch")
        if CENTRES_FROM_MEANS:
            means, labels = gallery.person_means(
                model, trained_on, eval_transform(IMAGE_SIZE, FACE_CROP, frames), device, num_workers=NUM_WORKERS
            )
            head.start_at(means, labels)
    if not run.history:
        run.finish_epoch(validate)
    if COMPILE == "auto" and optimisation.recordable(device, ACCUMULATE):
        optimisation.set_training(model, FREEZE_BATCHNORM)
        optimisation.record(model.backbone, (BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE), device, AMP)
    for _ in run.epochs():
        train_one_epoch(run, ddp_model, ddp_head, head, device)
        run.finish_epoch(validate)
    for path in run.report_best():
        calibration.calibrate_checkpoint(path, model, val_set)


def augmentation(frames: Frames | None = None) -> Transform:
    """From a training photo to a tensor: distortion, crop, a mirror image every second time, standardization."""
    side = round(IMAGE_SIZE / FACE_CROP)
    distort = RandomDegradation(families_without(WITHOUT_FAMILIES), DISTORT, DISTORT_MOST, side)
    return train_transform(IMAGE_SIZE, FACE_CROP, CROP_ZOOM, CROP_SHIFT, distort, frames=frames)


def load_network(saved: dict | None) -> tuple[FaceNet, str]:
    """The network to train, and the fingerprint of the weights that it starts, or once started, from.

    saved: what last.pt states, if the run is resumed. The weights then come from there, and PRETRAINED is not read: but
    where it has changed, for the run to notice other weights by their fingerprint.
    """
    if saved and saved["pretrained"] == str(PRETRAINED):
        return FaceNet(None, DROPOUT, FREEZE_UNTIL, backbone=BACKBONE), saved.get("pretrained_weights", "")
    model = FaceNet(PRETRAINED, DROPOUT, FREEZE_UNTIL, backbone=BACKBONE)
    return model, fingerprint(model)


def check_data(train_set: FaceClassificationDataset, train_persons: list[Person], val_persons: list[Person]) -> None:
    """Raises UserError for data that cannot be trained or validated on; warns of what makes figures misleading."""
    if len(train_set) < BATCH_SIZE:
        raise UserError(
            f"BATCH_SIZE = {BATCH_SIZE}: train/ has {len(train_set)} photos of {len(train_set.persons)} persons; set "
            f"BATCH_SIZE to at most {len(train_set)}, and PERSONS_PER_BATCH of train_stage2.py to at most "
            f"{len(train_set.persons)} (see docs/own_photos.md)"
        )
    warn_shared_persons(train_persons, val_persons)
    validation.check_data(
        train_set.persons,
        val_persons,
        max_clean_drop=MAX_CLEAN_DROP,
    )


def checkpoint_facts(
    train_set: FaceClassificationDataset,
    holdout: list[str],
    *,
    data: str,
    val: str,
    steps: int,
    pretrained_weights: str,
) -> dict:
    """What the checkpoints state besides the weights: the network, the data, and the constants."""
    return {
        "stage": 1,
        "seed": SEED,
        "image_size": IMAGE_SIZE,
        "face_crop": FACE_CROP,
        "framing": FRAMING,
        "backbone": BACKBONE,
        "dropout": DROPOUT,
        "pretrained": str(PRETRAINED),
        "pretrained_weights": pretrained_weights,
        "photos": len(train_set),
        "persons": train_set.persons,
        "holdout": holdout,
        "template": TEMPLATE,
        "chosen_by": validation.CHOICE,
        "data": data,  # of train/ ...
        "val": val,  # ... and of val/, where it chooses the best epoch
        "steps": steps,
        "selected_on": training.selected_on(holdout),
        "constants": course(globals()),
    }


def train_one_epoch(run: training.Run, model, ddp_head, head: ArcMarginProduct, device: torch.device) -> None:
    """One pass over the train photos."""
    optimisation.set_training(model, FREEZE_BATCHNORM)
    for images, labels in run.steps():
        with optimisation.autocast(device, AMP):
            embeddings = model(images)
        embeddings, labels = distributed.gather(embeddings, labels)  # from here on each process has the whole batch
        logits = ddp_head(embeddings, labels)
        loss = F.cross_entropy(logits, labels)
        with torch.no_grad():
            # Without the margin, as at test time: the margin lowers the right logit.
            right = (head.cosine(embeddings).argmax(1) == labels).float().mean()
            target = logits.gather(1, labels[:, None]).mean()  # s cos(t_y + m)
        run.step(loss, {"accuracy": right, "target_logit": target})


def clean_val_loader(
    val_persons: list[Person], train_set: FaceClassificationDataset, transform: Transform, device: torch.device
) -> PhotoLoader | None:
    """Batches of the clean val photos if every val person is one of the head's classes, else None."""
    if not {person.name for person in val_persons} <= set(train_set.persons):
        return None
    clean = FaceCleanValDataset(val_persons, train_set.persons, train_set.label2idx, transform)
    in_order = BatchSampler(SequentialSampler(clean), BATCH_SIZE, drop_last=False)
    return PhotoLoader(clean, in_order, NUM_WORKERS, device, passes=EPOCHS)


@torch.inference_mode()
def accuracy(model, head, loader: PhotoLoader, device: torch.device) -> float:
    """Fraction (0..1) of the photos whose nearest class centre is their person's."""
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
