"""Stage 2: pull each distorted photo to its clean original as a frozen teacher sees it, away from other persons.

    python train_stage2.py

Stage 1 made the network robust at some cost on clean photos. Stage 2 starts from that network and aims at the teacher,
the pretrained network, which knows clean faces best. The teacher embeds the clean photos once, into a bank of anchors a
that never change. For each distorted photo with embedding f, anchor a and n, the nearest bank row of another person,

    loss = CONTRASTIVE_WEIGHT * mean( |f - a|^2 + max(0, CONTRASTIVE_MARGIN - |f - n|)^2 )

over the photos that show a face at all (the gate is 1 for these, 0 where glare has whited out the face crop).
That needs no names: photos of EXTRA_FACES and of persons without files in distortion/ are distorted on the fly, and
of them, n is only a photo that the teacher finds unlike enough to be another person's (MAYBE_SAME).
A second network v of the same form sees the whole frame, but not its middle, where the face is. It learns to find a
distorted frame's clean original among the clean frames of the batch (InfoNCE, INSTANCE_WEIGHT), for photos that show no
face. Both make the final embedding, [gate f, WIDE_WEIGHT v] scaled to norm 1; WIDE_WEIGHT = 0 leaves the face alone.
Validation and the best epoch are as in stage 1; epoch 0 is the network of stage 1.

Starts from STAGE1_CHECKPOINT; writes RUN_DIR/best.pt (for evaluate.py), last.pt (for RESUME), log.csv, steps.csv,
curves.png, tensorboard/, constants.json and, with EMA_DECAY, best_ema.pt.
Several GPUs: torchrun --nproc_per_node=2 train_stage2.py
"""

import copy
import functools
import math
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW

import calibration
import checkpoints
import common
import distributed
import optimisation
import training
import validation
from backbones import BACKBONES
from common import UserError
from constants import course
from datasets import (
    FacePairDataset,
    Person,
    files_digest,
    photos_of,
    scan_persons,
    split_persons,
    warn_shared_persons,
    without_kinds,
)
from degradations import RandomDegradation, families_without, validation_degradations
from embedding import embed
from extra_faces import find_extra_faces
from framing import Frames, check_framing, find_frames, hidden_share, sources_of, with_photo
from losses import ContrastiveLoss, SourceLoss, euclidean, hardest_negatives, weighted_mean
from models import Crops, FaceNet, fingerprint
from samplers import PersonBatches
from transforms import Transform, eval_transform, train_transform
from validation import ValidationSet

# --- files ---
DATA_DIR = Path("Task_B")  # holds train/ and val/, in each one folder per person
# A folder of more photos of faces, at any depth and without names, framed as those of train/; None: no more photos.
EXTRA_FACES = None
STAGE1_CHECKPOINT = Path("runs/stage1/best.pt")  # stage 1's; stores image size, crop and held-out persons
RUN_DIR = Path("runs/stage2")  # checkpoints and log; use a new name for each run that you want to keep
RESUME = False  # True: go on from RUN_DIR/last.pt, as if the run had never stopped
SAVE_EVERY = 500  # optimizer updates between saves of last.pt; 0: it is saved only after each epoch
CHECK_IMAGES = True  # decode every file once before training; list the broken ones and train without them

# --- validation ---
TEMPLATE = "mean"  # whose top-1 chooses the best epoch: "mean" of a person's clean embeddings, or "best" match
# An epoch cannot be the best if its top-1 on clean photos is this many percentage points below that of epoch 0, 0..100;
# 100: no limit.
MAX_CLEAN_DROP = 2.0
QUICK_VALIDATION = True  # validate on every third distorted photo, without mirror images; False: as evaluate.py does
PATIENCE = 0  # stop after this many epochs without a better top-1, 2..20; 0: never

# --- network ---
FREEZE_UNTIL = None  # freeze the face's blocks up to and including this one (see backbones.py)
# The frozen network whose embeddings of clean photos are the targets: "vggface2", "casia-webface" or the path of a
# facenet's state dict; None: the network of stage 1, for a BACKBONE whose embeddings do not have 512 numbers.
TEACHER = "vggface2"
# Weight of the whole frame's embedding, where the face has 1: 0.01..0.1, or 0 for the face alone. The frame is what is
# around the face (clothes, background) and matches photos, not people. At 0.01 it decides where no face shows, and
# nothing else; photos that are cropped to the face need 0.
WIDE_WEIGHT = 0.01
WIDE_SIZE = 112  # pixels that the whole frame is shrunk to, 76..160
DROPOUT = 0.0  # before the last linear layer, 0..0.8; with fixed targets there is little to memorise
MIRROR = True  # at inference average each photo with its mirror image, the teacher too: better, and twice as slow

# --- losses ---
CONTRASTIVE_WEIGHT = 2.0  # pull to the anchor, push from the nearest other person, 0..10
CONTRASTIVE_MARGIN = 1.0  # distance of unit embeddings, above 0 and at most 2: farther negatives give no gradient
INSTANCE_WEIGHT = 1.0  # find a distorted frame's original among the clean frames of the batch, 0..10
TEMPERATURE = 0.07  # of the latter, no unit, 0.02..0.2: the lower, the more the nearest rivals count
# A photo of EXTRA_FACES and another one may show the same person from this cosine on, as the teacher sees them; then
# they are not pushed apart. 0.3..0.6: of LFW's pairs, 97 % of the same person's are above 0.4, and 1 % of others'.
MAYBE_SAME = 0.4

# --- pairs ---
# P, different persons in each step, on all GPUs together, >= 2. Each photo of EXTRA_FACES counts as a person, so that
# steps hold them in proportion to their number.
PERSONS_PER_BATCH = 24
PHOTOS_PER_PERSON = 2  # K, half of them clean and half distorted, even, >= 2
SKIP_KINDS = ()  # kinds of distorted files to leave out of training, such as ("sunny",); all are evaluated
OFTEN = ("sunny", "rainy")  # the hard kinds, drawn twice as often as the others; (): none
CLEAN = 0.1  # fraction of the positives that are the clean photo itself, 0..0.5
DISTORT = 0.4  # fraction of the positives that are the clean photo distorted on the fly, not a file on disk, 0..1
DISTORT_MOST = 4  # families of degradations on one such photo, 1..8; see docs/degradations.md
# Families that training never draws, such as ("glare",), to see what becomes of them; validation then degrades its
# clean photos by these alone. (): both draw from all families.
WITHOUT_FAMILIES = ()
CROP_ZOOM = 0.1  # the crop's side varies by +- this fraction of it, 0..0.3
CROP_SHIFT = 0.03  # the crop's centre moves by +- this fraction of the shorter side, 0..0.1

# --- optimisation ---
SEED = 0  # 0, 1, 2, ...
EPOCHS = 10  # passes over the clean train photos, 1..999; more help only with EXTRA_FACES
ACCUMULATE = 1  # steps per update of the weights, >= 1
BACKBONE_LR = 1e-4  # AdamW, 1e-5..1e-3, of the face's network: small, as it is trained already
WIDE_LR = 3e-4  # AdamW, 1e-5..1e-3, of the whole frame's network: it starts as a copy and has a new task
WEIGHT_DECAY = 5e-4  # AdamW, 0..0.1
WARMUP_STEPS = 20  # updates over which the learning rates rise linearly
GRAD_CLIP = 5.0  # largest norm of the gradient of both networks together, > 0
EMA_DECAY = 0.0  # of the exponential moving average of the weights (best_ema.pt), 0.99..0.9999; 0: no average
FREEZE_BATCHNORM = True  # keep the statistics as loaded; those of a few persons at a time are too noisy

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
    saved = training.start_run(RUN_DIR, RESUME, globals(), stage=2)

    # Model: the network of stage 1, its teacher, and what else the checkpoint stores.
    model, teacher, stage1 = load_networks(device, saved)
    holdout, framing = stage1["holdout"], framing_of(stage1)
    image_size, crop = (frame_size(stage1), 1.0) if WIDE_WEIGHT else (stage1["image_size"], stage1["face_crop"])

    # Data: pairs of a clean photo and its distorted copy, of the persons that stage 1 trained on.
    everybody = scan_persons(DATA_DIR / "train", check_images=CHECK_IMAGES)
    train_persons, val_persons = split_persons(everybody, holdout)
    if not holdout:
        val_persons = scan_persons(DATA_DIR / "val", check_images=CHECK_IMAGES)
    check_data(train_persons, val_persons)
    extra = [] if EXTRA_FACES is None else find_extra_faces(EXTRA_FACES, DATA_DIR, stage1["face_crop"], device, framing)
    frames = find_frames(framing, [*photos_of(train_persons), *extra], device, sources_of(train_persons))
    train_set = FacePairDataset(
        without_kinds(train_persons, SKIP_KINDS),
        augmentation(image_size, crop, frames),
        with_anchors=WIDE_WEIGHT > 0,  # the faces' anchors are in the bank
        extra=extra,
        clean=CLEAN,
        on_the_fly=DISTORT,
        degraded=augmentation(image_size, crop, frames, degradation(side=frame_size(stage1))),
        often=OFTEN,
        seed=SEED,
    )
    labels = [label for _, label in train_set.anchors]
    batches = PersonBatches(labels, PERSONS_PER_BATCH, PHOTOS_PER_PERSON // 2, SEED)
    loader = training.train_loader(train_set, batches, NUM_WORKERS, device, epochs=EPOCHS)

    # Optimizer.
    groups = [{"name": "backbone", "params": optimisation.trainable(model.backbone), "lr": BACKBONE_LR}]
    if WIDE_WEIGHT:
        groups.append({"name": "wide", "params": optimisation.trainable(model.wide), "lr": WIDE_LR})
    optimizer = AdamW(groups, weight_decay=WEIGHT_DECAY, fused=True)
    scheduler = optimisation.warmup_cosine(optimizer, WARMUP_STEPS, EPOCHS * math.ceil(len(loader) / ACCUMULATE))
    if COMPILE is True:
        model.compile()
    ddp_model = distributed.parallel(BothCrops(model))

    # Epochs; epoch 0 is the network of stage 1, for the face and for the whole frame.
    run = training.Run(
        run_dir=RUN_DIR,
        facts=checkpoint_facts(
            train_set,
            stage1,
            crops=model.crops,
            image_size=image_size,
            face_crop=crop,
            data=files_digest([*everybody, Person("", tuple(extra), ())]),
            val="" if holdout else files_digest(val_persons),
            steps=len(loader),
            teacher_weights=fingerprint(teacher),
        ),
        networks={"model": model},
        optimizer=optimizer,
        scheduler=scheduler,
        loader=loader,
        device=device,
        settings=run_settings(),
        wrapped=(ddp_model,),
    )

    val_frames = find_frames(framing, photos_of(val_persons), device)
    degradations = validation_degradations(WITHOUT_FAMILIES, DISTORT_MOST, side=frame_size(stage1))
    val_set = ValidationSet(
        val_persons,
        eval_transform(image_size, crop, val_frames),
        degraded=[eval_transform(image_size, crop, val_frames, each) for each in degradations],
        device=device,
        template=TEMPLATE,
        quick=QUICK_VALIDATION,
        num_workers=NUM_WORKERS,
    )
    validate = functools.partial(validation.validate, on=val_set)
    if saved:
        run.resume(globals())
    else:
        of_extra = f" ({len(extra)} of EXTRA_FACES)" if extra else ""
        people, anchors = f"{len(train_set.persons)} persons", f"{len(train_set)} anchors{of_extra}"
        print(f"train: {people}, {anchors}, {len(loader)} steps per epoch")

    # The bank: the clean photos as the teacher sees them, without augmentation.
    paths = [path for path, _ in train_set.anchors]
    face_transform = eval_transform(stage1["image_size"], stage1["face_crop"], frames)
    bank = embed(teacher, paths, face_transform, device, num_workers=NUM_WORKERS).embeddings
    del teacher
    bank = bank.clone().to(device)  # autograd refuses inference tensors
    losses = Losses(bank, torch.tensor(labels, device=device), persons=len(train_set.persons))

    if not run.history:
        run.finish_epoch(validate)
    if COMPILE == "auto" and optimisation.recordable(device, ACCUMULATE):
        record(model, stage1["image_size"], device)
    for _ in run.epochs():
        train_one_epoch(run, model, ddp_model, losses, device)
        run.finish_epoch(validate)
    for path in run.report_best():
        calibration.calibrate_checkpoint(path, model, val_set)


def load_networks(device: torch.device, saved: dict | None) -> tuple[FaceNet, FaceNet, dict]:
    """The network to train, its frozen teacher, and what is known of stage 1.

    saved: what last.pt states, if the run is resumed. The weights then come from there, and STAGE1_CHECKPOINT is read
    only where its network is the teacher.
    Raises UserError if STAGE1_CHECKPOINT is not of stage 1, or what `load_facenet` and `FaceNet` raise.
    """
    stage1 = saved.get("stage1") if saved and TEACHER is not None else None
    if stage1 is not None:
        checkpoints.check_stage1(RUN_DIR / "last.pt", stage1)
        model = FaceNet(None, DROPOUT, FREEZE_UNTIL, mirror=MIRROR, backbone=stage1["backbone"])
        model = model.to(device, memory_format=torch.channels_last)
    else:
        model, stage1 = checkpoints.load_facenet(
            STAGE1_CHECKPOINT, device, freeze_until=FREEZE_UNTIL, dropout=DROPOUT, mirror=MIRROR
        )
        if stage1["stage"] != 1:
            found = stage1["stage"]
            raise UserError(f"STAGE1_CHECKPOINT = {STAGE1_CHECKPOINT}: of stage {found}, expected one of stage 1")
        stage1 = {name: stage1[name] for name in checkpoints.STAGE1_FACTS}
    if TEACHER is None:
        teacher = copy.deepcopy(model)
    else:
        check_teacher(stage1["backbone"])
        teacher = FaceNet(TEACHER, dropout=DROPOUT, mirror=MIRROR, constant="TEACHER").to(device)
    if WIDE_WEIGHT:
        face_crop = stage1["face_crop"]
        check_framing(stage1["framing"], face_crop)  # earlier versions allowed more
        model.widen(Crops(face_crop, WIDE_SIZE, WIDE_WEIGHT, hidden=hidden_share(face_crop)))
    return model, teacher.to(memory_format=torch.channels_last), stage1


def framing_of(stage1: dict) -> str:
    """The framing of stage 1; with WIDE_WEIGHT, the one that keeps the photo around the face."""
    return with_photo(stage1["framing"]) if WIDE_WEIGHT else stage1["framing"]


def check_teacher(backbone: str) -> None:
    """Raises UserError unless embeddings of `backbone` can be pulled to those of TEACHER, a facenet."""
    dim, of_teacher = BACKBONES[backbone].dim, BACKBONES["facenet"].dim
    if dim != of_teacher:
        raise UserError(
            f"TEACHER = {str(TEACHER)!r}: embeddings of a facenet have {of_teacher} numbers, those of stage 1's "
            f"{backbone} {dim}; set TEACHER = None, and the network of stage 1 is its own teacher"
        )


def record(model: FaceNet, image_size: int, device: torch.device) -> None:
    """Record the passes of both networks, see optimisation.record. image_size: pixels of the face crop."""
    optimisation.set_training(model, FREEZE_BATCHNORM)
    pairs = PERSONS_PER_BATCH * PHOTOS_PER_PERSON // 2
    optimisation.record(model.backbone, (pairs, 3, image_size, image_size), device, AMP)
    if WIDE_WEIGHT:
        optimisation.record(model.wide, (2 * pairs, 3, WIDE_SIZE, WIDE_SIZE), device, AMP)


def frame_size(stage1: dict) -> int:
    """Pixels of the whole frame whose centre is stage 1's face crop."""
    return round(stage1["image_size"] / stage1["face_crop"])


def check_data(train_persons: list[Person], val_persons: list[Person]) -> None:
    """Raises UserError for data that cannot be trained or validated on; warns of what makes figures misleading."""
    if PHOTOS_PER_PERSON % 2:
        raise UserError(f"PHOTOS_PER_PERSON = {PHOTOS_PER_PERSON}: expected an even number, half clean, half distorted")
    warn_shared_persons(train_persons, val_persons)
    validation.check_data(
        [person.name for person in train_persons],
        val_persons,
        max_clean_drop=MAX_CLEAN_DROP,
    )


def augmentation(
    image_size: int, crop: float, frames: Frames | None, distort: RandomDegradation | None = None
) -> Transform:
    """From a training photo to a tensor. The dataset mirrors both photos of a pair together, so this must not."""
    return train_transform(image_size, crop, CROP_ZOOM, CROP_SHIFT, distort, mirror=False, frames=frames)


def degradation(side: int) -> RandomDegradation:
    """What photos are distorted by on the fly, shrunk to `side` pixels first."""
    return RandomDegradation(families_without(WITHOUT_FAMILIES), probability=1.0, most=DISTORT_MOST, side=side)


def checkpoint_facts(
    train_set: FacePairDataset,
    stage1: dict,
    *,
    crops: Crops | None,
    image_size: int,
    face_crop: float,
    data: str,
    val: str,
    steps: int,
    teacher_weights: str,
) -> dict:
    """What the checkpoints state besides the weights: the network, the data, and the constants."""
    return {
        "stage": 2,
        "stage1": stage1,
        "seed": SEED,
        "image_size": image_size,
        "face_crop": face_crop,
        "framing": framing_of(stage1),
        "crops": crops and asdict(crops),
        "backbone": stage1["backbone"],
        "dropout": DROPOUT,
        "mirror": MIRROR,
        "pretrained": stage1["pretrained"],
        "teacher": str(TEACHER),
        "teacher_weights": teacher_weights,
        "photos": len(train_set),
        "persons": train_set.persons,
        "holdout": stage1["holdout"],
        "template": TEMPLATE,
        "chosen_by": validation.CHOICE,
        "data": data,  # of train/ ...
        "val": val,  # ... and of val/, where it chooses the best epoch
        "steps": steps,
        "selected_on": training.selected_on(stage1["holdout"]),
        "constants": course(globals()),
    }


class Losses:
    """The terms of the loss, on the embeddings of a whole batch."""

    def __init__(self, bank: Tensor, labels: Tensor, persons: int):
        """bank: (N, D), the teacher's embeddings of the clean photos; labels: (N,) int64, their persons.

        Labels from `persons` on are of single photos, whose person is not known.
        Raises UserError if a photo has no negative; in each step that check would have to wait for the GPU.
        """
        self.bank, self.labels, self.unknown = bank, labels, labels >= persons
        self.any_unknown = bool(self.unknown.any())
        self.contrastive, self.source = ContrastiveLoss(CONTRASTIVE_MARGIN), SourceLoss(TEMPERATURE)
        for rows in torch.arange(len(bank), device=bank.device).split(1024):  # not all pairs of photos at once
            if self.same_person(rows).all(1).any():
                raise UserError(
                    "all photos may be of one person, so there is no negative; train on two persons or more, "
                    "or raise MAYBE_SAME"
                )

    def of_faces(self, face: Tensor, gate: Tensor, source: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """face: (B, D) of distorted photos; gate: (B,), 0 where no face shows; source: (B,), rows of the bank.

        The anchor is frozen: the distorted photo is pulled to it and pushed from the nearest other person.
        """
        anchor = self.bank[source]
        nearest = hardest_negatives(face, candidates=self.bank, same_person=self.same_person(source))
        negative = self.bank[nearest]
        contrastive = self.contrastive(anchor=anchor, positive=face, negative=negative, weight=gate)
        with torch.no_grad():
            to_anchor, to_negative = euclidean(face, anchor), euclidean(face, negative)
            values = {
                "accuracy": weighted_mean((to_anchor < to_negative).float(), gate),  # nearer to its own person
                "active_negatives": weighted_mean(
                    (to_negative < CONTRASTIVE_MARGIN).float(), gate
                ),  # closer than the margin
                "positive_distance": weighted_mean(to_anchor, gate),
                "negative_distance": weighted_mean(to_negative, gate),
                "contrastive_loss": contrastive.detach(),
            }
        return CONTRASTIVE_WEIGHT * contrastive, values

    def of_frames(self, clean: Tensor, distorted: Tensor, source: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """clean, distorted: (B, D) of whole frames, which find each other within the batch."""
        places = torch.arange(len(source), device=source.device)
        instance = self.source(distorted, clean, source=places, same_person=self.same_person(source, among=source))
        return INSTANCE_WEIGHT * instance, {"instance_loss": instance.detach()}

    def same_person(self, source: Tensor, among: Tensor | slice = slice(None)) -> Tensor:
        """source: (B,), among: (N,), rows of the bank, all by default -> (B, N) bool: whether two of them show, or may
        show, the same person.

        Of two rows with persons, their labels say it. A person may occur in several photos of EXTRA_FACES, and among
        the persons too: if one of two rows has no person, they may show the same one from a cosine of MAYBE_SAME on.
        """
        same = self.labels[source][:, None] == self.labels[among]
        if not self.any_unknown:
            return same
        alike = self.bank[source] @ self.bank[among].T >= MAYBE_SAME
        return same | (alike & (self.unknown[source][:, None] | self.unknown[among]))


class BothCrops(nn.Module):
    """What a step embeds, in one call: DistributedDataParallel writes into BatchNorm's statistics at each, and torch
    2.6 (no longer 2.14) refuses the backward pass after two."""

    def __init__(self, model: FaceNet):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, frames: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The face's embeddings of `images`, and the wide crop's of `frames`."""
        return self.model(images, "face"), None if frames is None else self.model(frames, "wide")


def train_one_epoch(run: training.Run, model: FaceNet, ddp_model, losses: Losses, device: torch.device) -> None:
    """One pass over the pairs, an anchor each."""
    optimisation.set_training(model, FREEZE_BATCHNORM)
    for clean, distorted, _, source in run.steps():
        with optimisation.autocast(device, AMP):
            face, wide = ddp_model(distorted, torch.cat([clean, distorted]) if WIDE_WEIGHT else None)
        frames = wide.chunk(2) if WIDE_WEIGHT else ()
        # From here on each process has the whole batch.
        face, gate, source, *frames = distributed.gather(face, model.gate(distorted), source, *frames)
        loss, values = losses.of_faces(face, gate, source)
        if WIDE_WEIGHT:
            of_frames, more = losses.of_frames(*frames, source)
            loss, values = loss + of_frames, values | more
        run.step(loss, values)


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
