"""What both training scripts share: device, seeds, the learning-rate schedule, checkpoints and the run's log."""

import contextlib
import csv
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from models import FaceNet, why_unreadable

FORMAT = 1  # of the checkpoint files; raised when an older file can no longer be read

# What a run's constants may be; those that a module takes, it checks itself.
RANGES = {
    "SEED": (0, 2**32),
    "EPOCHS": (1, 999),
    "BATCH_SIZE": (2, math.inf),  # BatchNorm cannot work with one image
    "NUM_WORKERS": (0, math.inf),
    "BACKBONE_LR": (0, math.inf),
    "HEAD_LR": (0, math.inf),
    "LEARNING_RATE": (0, math.inf),
    "WEIGHT_DECAY": (0, math.inf),
    "WARMUP_STEPS": (0, math.inf),
    "GRAD_CLIP": (1e-12, math.inf),
}


def run(main: Callable[[], object]) -> None:
    """Call `main()`; a user's mistake ends the script with its sentence alone, anything else with a traceback."""
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        sys.exit(f"error: {error}\n(TRACEBACK=1 python {Path(sys.argv[0]).name} shows where)")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; RESUME = True goes on after the last finished epoch")


# --- device, seeds, data ----------------------------------------------------------------------------------------------


def pick_device() -> torch.device:
    """A CUDA GPU if there is one, else the CPU. TF32 is allowed: 10 bits of mantissa in the products, as trained nets
    tolerate, for several times the speed."""
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
        return torch.device("cuda")
    return torch.device("cpu")


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """Mixed precision on CUDA: bfloat16 where the GPU has it, else float16 (see `grad_scaler`). Off on the CPU."""
    return torch.autocast(device.type, dtype=_amp_dtype(device), enabled=enabled and device.type == "cuda")


def grad_scaler(device: torch.device, enabled: bool) -> torch.amp.GradScaler:
    """Scales the loss where `autocast` uses float16, whose gradients underflow otherwise; does nothing elsewhere."""
    scale = enabled and device.type == "cuda" and _amp_dtype(device) == torch.float16
    return torch.amp.GradScaler(device.type, enabled=scale)


def _amp_dtype(device: torch.device) -> torch.dtype:
    bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported()
    return torch.bfloat16 if bfloat16 else torch.float16


def seed_epoch(seed: int, epoch: int) -> None:
    """Seed torch for `epoch` (1, 2, ...; 0 for the initialisation), so that a resumed run draws what this one would."""
    torch.manual_seed(1000 * seed + epoch)  # EPOCHS < 1000: no two seeds share a stream


def train_loader(dataset: Dataset, batch_size: int, num_workers: int, device: torch.device) -> DataLoader:
    """Shuffled batches, the incomplete last one dropped.

    Raises ValueError if the dataset gives no full batch.
    """
    if len(dataset) < batch_size:
        raise ValueError(f"BATCH_SIZE = {batch_size}: more than the {len(dataset)} items of an epoch; lower it")
    return DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        drop_last=True,  # a batch of one image would break BatchNorm
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )


# --- optimisation -----------------------------------------------------------------------------------------------------


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Learning rates times a factor per step: linear up to 1 over `warmup_steps`, then half a cosine down to 0."""
    warmup_steps = min(warmup_steps, total_steps // 2)  # a short run still has a way down

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1)))

    return LambdaLR(optimizer, factor)


def step(
    loss: Tensor, optimizer: Optimizer, scheduler: LambdaLR, scaler: torch.amp.GradScaler, grad_clip: float
) -> float:
    """Backward, clip the gradient's norm to `grad_clip`, update weights and learning rates; returns the norm before.

    Raises FloatingPointError for a loss that is not finite, before any weight has changed.
    """
    if not loss.isfinite():
        raise FloatingPointError(
            f"the loss is {loss.item()}; the last finished epoch's checkpoint is kept: lower the learning rates and "
            "set RESUME = True"
        )
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, grad_clip).item()
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
    return norm


def freeze_batchnorm(model: nn.Module) -> None:
    """Put the BatchNorm layers into eval mode: normalise by the stored statistics and leave them as they are."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


# --- files ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends well; killed midway, the old file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")  # a sibling: rename is atomic in one filesystem
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a power cut may otherwise keep the new name without its bytes
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def write_csv(path: Path, rows: Iterable[dict]) -> None:
    """`rows` under the keys of all of them, in order of first appearance; a missing value stays empty."""
    rows = list(rows)
    with atomic_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        writer = csv.DictWriter(text, dict.fromkeys(key for row in rows for key in row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text.detach()  # leaves `file` open for the flush to disk


def start_run(run_dir: Path, resume: bool, constants: dict) -> None:
    """Check what every run needs, before anything slow, and note the script's CAPITALS in `run_dir`/constants.json.

    Raises FileExistsError if `run_dir` holds an earlier run and `resume` is off: nothing is overwritten silently;
    ValueError for a constant out of range.
    """
    if not resume and any((run_dir / name).exists() for name in ("best.pt", "last.pt")):
        raise FileExistsError(
            f"{run_dir}: holds the checkpoints of an earlier run; set RESUME = True to go on with it, "
            "or give RUN_DIR another name"
        )
    plain = (bool, int, float, str, Path, tuple, type(None))  # not torch.nn.functional as F
    capitals = {name: value for name, value in constants.items() if name.isupper() and isinstance(value, plain)}
    for name, (low, high) in RANGES.items():
        if name in capitals and not low <= capitals[name] <= high:
            raise ValueError(f"{name} = {capitals[name]}: expected {low}..{high}")
    if not resume:
        write_json(run_dir / "constants.json", {n: str(v) if isinstance(v, Path) else v for n, v in capitals.items()})


def save_checkpoint(path: Path, facts: dict, parts: dict) -> None:
    """Write `facts` (plain types) and the state_dict of each of `parts`, atomically."""
    saved = {"format": FORMAT} | facts | {name: part.state_dict() for name, part in parts.items()}
    with atomic_file(path) as file:
        torch.save(saved, file)


def read_checkpoint(path: Path) -> dict:
    """What `save_checkpoint` wrote, tensors on the CPU. `weights_only`: a file from elsewhere can run no code.

    Raises FileNotFoundError, or ValueError if the file is no checkpoint of this project.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no checkpoint; run the stage that writes it, or correct the path")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes raise anything in the unpickler: IndexError, struct.error, ...
        raise ValueError(
            f"{path}: damaged, or not a checkpoint ({why_unreadable(error)}); run the stage that writes it again"
        ) from error
    if not isinstance(saved, dict) or not {"format", "stage", "model", "image_size", "face_crop"} <= saved.keys():
        raise ValueError(f"{path}: no checkpoint of these scripts; a bare state dict belongs into PRETRAINED")
    if saved["format"] != FORMAT:
        raise ValueError(f"{path}: checkpoint format {saved['format']}, these scripts read {FORMAT}; train it anew")
    return saved


def restore(path: Path, saved: dict, parts: dict) -> None:
    """Load each of `parts` from `saved`, strictly. Raises ValueError naming the part that is missing or differs."""
    for name, part in parts.items():
        if name not in saved:
            raise ValueError(f"{path}: holds no {name!r}; only last.pt can be resumed")
        try:
            part.load_state_dict(saved[name])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{path}: its {name!r} does not fit ({reason}); the data or a constant differs from that run"
            ) from error


def load_facenet(path: Path | str, device: torch.device | str) -> tuple[FaceNet, dict]:
    """The model of a checkpoint, on `device` in channels_last, and everything else that the checkpoint knows."""
    path = Path(path)
    saved = read_checkpoint(path)
    model = FaceNet(None, saved["dropout"])
    restore(path, saved, {"model": model})
    return model.to(device, memory_format=torch.channels_last), saved


class Run:
    """The files of one training run: best.pt, last.pt and log.csv in `run_dir`.

    facts: plain types that the checkpoint shall know; networks: what both checkpoints hold; progress: what only
    last.pt holds, to resume with. Epochs count from 1; 0 is the network as loaded.
    """

    def __init__(self, run_dir: Path, facts: dict, networks: dict, progress: dict):
        self.run_dir, self.networks, self.progress = run_dir, networks, progress
        holdout = len(facts["holdout"])
        self.facts = facts | {"selected_on": f"{holdout} persons held out of train" if holdout else "val"}
        self.history: list[dict] = []  # a row per epoch
        self.best = {"epoch": -1, "top1": -1.0}

    def resume(self) -> int:
        """Restore everything from last.pt; returns the epoch to go on with.

        Raises what `read_checkpoint` and `restore` raise; ValueError if the data or the image differs from that run's.
        """
        path = self.run_dir / "last.pt"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no checkpoint to resume; set RESUME = False to start the run")
        saved = read_checkpoint(path)
        for name, now in self.facts.items():
            if saved.get(name) != now:
                then = saved.get(name)
                told = f"{then} then, {now} now" if not isinstance(now, list) else "other persons than then"
                raise ValueError(
                    f"{path}: cannot be resumed, {name} has changed ({told}); start a run of another RUN_DIR"
                )
        optimizer, scheduler = self.progress["optimizer"], self.progress["scheduler"]
        rates = scheduler.base_lrs
        restore(path, saved, self.networks | self.progress)
        scheduler.base_lrs = rates  # this run's constants, not those saved: what the loss turned NaN at may be lowered
        for group, rate, factor in zip(optimizer.param_groups, rates, scheduler.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
        self.history, self.best = saved["history"], saved["best"]
        print(f"resumed {path} after epoch {saved['epoch']}")
        return saved["epoch"] + 1

    def finish_epoch(self, epoch: int, epochs: int, top1: float, row: dict) -> None:
        """Save last.pt, best.pt where `top1` is the highest so far (the earlier epoch where equal), and the log."""
        self.history.append({"epoch": epoch} | row)
        improved = top1 > self.best["top1"]
        if improved:
            self.best = {"epoch": epoch, "top1": top1}
        facts = self.facts | {"epoch": epoch, "top1": top1}
        if improved:
            save_checkpoint(self.run_dir / "best.pt", facts, self.networks)
        everything = self.networks | self.progress
        save_checkpoint(self.run_dir / "last.pt", facts | {"history": self.history, "best": self.best}, everything)
        write_csv(self.run_dir / "log.csv", self.history)
        shown = "".join(f"  {name} {row[name]:.4f}" for name in ("loss", "accuracy") if name in row)
        speed = f"  {row['images_per_second']:.0f} images/s" if "images_per_second" in row else ""
        print(f"epoch {epoch}/{epochs}{shown}  top-1 {top1:.4f}{' *' if improved else ''}{speed}", flush=True)

    def tell_end(self) -> None:
        which = f"epoch {self.best['epoch']}" if self.best["epoch"] else "the network as loaded, no epoch was better"
        print(
            f"best: {which}, top-1 {self.best['top1']:.4f} on {self.facts['selected_on']}: {self.run_dir / 'best.pt'}"
        )


class Meter:
    """Running means over an epoch, weighted by the batch, and images per second."""

    def __init__(self):
        self.images, self.sums, self.started = 0, {}, time.perf_counter()

    def add(self, images: int, **values: float | Tensor) -> None:
        self.images += images
        for name, value in values.items():
            value = value.item() if isinstance(value, Tensor) else value
            self.sums[name] = self.sums.get(name, 0.0) + value * images

    def means(self) -> dict[str, float]:
        means = {name: total / self.images for name, total in self.sums.items()}
        return means | {"images_per_second": self.images / (time.perf_counter() - self.started)}

    def __str__(self) -> str:
        means = self.means()
        shown = ", ".join(f"{name} {means[name]:.3f}" for name in ("loss", "accuracy") if name in means)
        return f"{shown}, {means['images_per_second']:.1f} images/s"
