"""Checkpoints and other files: written atomically, read strictly."""

import contextlib
import glob
import json
import logging
import os
import reprlib
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from filelock import AcquireReturnProxy, FileLock, Timeout
from torch import nn
from torch.optim import Optimizer

from backbones import BACKBONES
from common import MAX_SIDE, UserError, csv_cell, in_range, list_names, read_plain, warn_once
from models import Crops, FaceNet

if TYPE_CHECKING:
    from pandas import DataFrame

log = logging.getLogger(__name__)
FORMAT = 1  # of the checkpoint files; raised when an older file can no longer be read
# What every checkpoint states, besides its weights.
STATED = {"stage": int, "model": dict, "image_size": int, "face_crop": (int, float), "dropout": (int, float)}
STATED |= {"framing": str, "backbone": str, "epoch": int, "selected_on": str, "persons": list, "holdout": list}
STATED |= {"pretrained": str}
LIMITS = {"image_size": (76, MAX_SIDE), "face_crop": (1e-3, 1), "dropout": (0, 1 - 1e-9)}  # of its numbers
STAGE1_FACTS = ("backbone", "image_size", "face_crop", "framing", "pretrained", "holdout")  # that those of stage 2 keep
CHOICES = {"framing": ("centre", "detected", "inset"), "backbone": BACKBONES}  # of its words; see framing.py
REPLACE_SECONDS = 5  # that another program may hold a file which is to be replaced
GRACE_SECONDS = 8  # that a lock may still be held by the loader workers of a killed process: they look every 5 s
LEFTOVER = 40  # characters of a file's name in its temporary one


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends well; killed midway, the old file stays.

    Whoever else writes `path` meanwhile does not mix with it: the last one to finish counts. The old file's mode is
    kept, and so is a symlink: the file that it points to is replaced.
    """
    path = _behind_link(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, as rename is atomic in one filesystem only; hidden, so that no folder of photos lists it; the name cut,
    # as filesystems take 255 bytes.
    temporary = path.with_name(f".{path.name[:LEFTOVER]}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a power cut may otherwise keep the new name without its bytes
        with contextlib.suppress(OSError):  # there is no old file, or the filesystem has no modes
            shutil.copymode(path, temporary)
        _replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # it has become `path`
            temporary.unlink()


def _behind_link(path: Path) -> Path:
    return path.resolve() if path.is_symlink() else path


def _replace(temporary: Path, path: Path) -> None:
    """os.replace, tried again for REPLACE_SECONDS: on Windows, virus scanners and OneDrive hold files for moments."""
    last = time.monotonic() + REPLACE_SECONDS
    while True:
        try:
            return os.replace(temporary, path)
        except PermissionError:
            if time.monotonic() > last:
                raise
            time.sleep(0.2)


def check_writable(constant: str, path: Path, *, folder: bool) -> None:
    """Make the folder of the file `path`, or with `folder` the folder `path`, and try to write there.

    To be called before work whose result goes there. Raises UserError, with the name of the constant that `path` is
    the value of.
    """
    place = path if folder else _behind_link(path).parent
    if path.exists() and path.is_dir() != folder:
        found, expected = ("a folder", "a file") if path.is_dir() else ("a file", "a folder")
        raise UserError(f"{constant} = {path}: is {found}; give the path of {expected}")
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(
            f"{constant} = {path}: {place} cannot be written to ({reason}); choose a folder where you may write"
        ) from error


def locked(path: Path, *, refusal: str | None) -> AcquireReturnProxy:
    """A lock on `path`, a file or an existing folder, which one process at a time holds until it ends or releases it.

    `with locked(...):` releases it after the block; of a result that is kept, `.lock.release()` does so. A lock that
    nothing refers to is released. Another holder is waited for, and a line says so; with a `refusal`, for GRACE_SECONDS
    at most, then UserError "<path>: <refusal>". What killed writers of `path` left is removed.
    The lock is an empty hidden file, in the folder or beside the file, which stays there. Where it cannot be made or
    locked (in a read-only or network folder), a warning says so, and nothing is locked.
    """
    target = path.resolve()
    file = target / ".lock" if target.is_dir() else target.with_name(f".{target.name}.lock")
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = lock.acquire(timeout=0.5 if refusal is None else GRACE_SECONDS)
        except Timeout:
            if refusal is not None:
                raise UserError(f"{path}: {refusal}") from None
            log.warning(f"{path}: another process changes it; waiting until it has finished")
            held = lock.acquire(timeout=-1, poll_interval=0.2)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, Timeout):
            raise
        warn_once(f"{path}: cannot be locked ({error}); nothing else may change it while this script runs")
        return AcquireReturnProxy(lock)  # releasing what is not held does nothing
    pattern = ".*.tmp" if target.is_dir() else f".{glob.escape(target.name[:LEFTOVER])}.*.tmp"
    for leftover in file.parent.glob(pattern):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 3600:  # younger: maybe of a writer without the lock
                leftover.unlink()
    return held


def write_json(path: Path, values: dict) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(values, indent=1) + "\n").encode())


def write_csv(path: Path, rows: "Iterable[dict] | DataFrame") -> None:
    """`rows` under the keys of all of them, in order of first appearance; a missing value or NaN stays empty.

    Texts are made safe for a spreadsheet, see common.csv_cell.
    """
    from pandas import DataFrame  # takes half a second, which importing this module can do without

    with atomic_file(path) as file:
        table = DataFrame(rows, dtype=object)  # object: an int beside a missing value stays an int
        safe = {csv_cell(name): [csv_cell(value) for value in column] for name, column in table.items()}
        DataFrame(safe, dtype=object).to_csv(file, mode="wb", index=False, lineterminator="\n")


def save_checkpoint(path: Path, facts: dict, parts: dict) -> None:
    """Write `facts` (plain types) and the state_dict of each of `parts`, atomically."""
    saved = {"format": FORMAT} | facts | {name: part.state_dict() for name, part in parts.items()}
    with atomic_file(path) as file:
        torch.save(saved, file)


def read_checkpoint(path: Path) -> dict:
    """What `save_checkpoint` wrote, tensors on the CPU.

    Raises UserError if there is no file, or if it is not a checkpoint of this project.
    """
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint; run the stage that writes it, or correct the path")
    saved = read_plain(path, "damaged, or not a checkpoint", "run the stage that writes it again")
    if not isinstance(saved, dict) or not {"format", "stage", "model", "image_size", "face_crop"} <= saved.keys():
        raise UserError(
            f"{path}: no checkpoint of these scripts; a bare state dict belongs in PRETRAINED of train_stage1.py"
        )
    if type(saved["format"]) is not int or saved["format"] != FORMAT:
        found = reprlib.repr(saved["format"])
        raise UserError(f"{path}: checkpoint format {found}, these scripts read {FORMAT}; train it again")
    for name, before in (("framing", "centre"), ("backbone", "facenet")):  # which earlier versions do not state
        saved.setdefault(name, before)
    if odd := [name for name in STATED if not _is_sound(name, saved.get(name))]:
        found = reprlib.repr(saved.get(odd[0]))  # shortened: a file can hold a list without end
        raise UserError(f"{path}: damaged, its {odd[0]} is {found}; train it again")
    return saved


def _is_sound(name: str, fact: object) -> bool:
    """Whether a checkpoint can state `fact` under this name of STATED."""
    if not isinstance(fact, STATED[name]):
        return False
    if name in LIMITS:
        low, high = LIMITS[name]
        return in_range(fact, float, low, high)
    if name in CHOICES:
        return fact in CHOICES[name]
    return name not in ("persons", "holdout") or all(isinstance(person, str) for person in fact)


def check_stage1(path: Path, stage1: object) -> None:
    """Raises UserError if what a checkpoint of stage 2 states of stage 1 is damaged."""
    if not (isinstance(stage1, dict) and all(_is_sound(name, stage1.get(name)) for name in STAGE1_FACTS)):
        raise UserError(f"{path}: damaged, its stage1 is {reprlib.repr(stage1)}; train it again")


def check_facts(path: Path, saved: dict, facts: dict) -> None:
    """Raises UserError for the first of a run's `facts` that differs from what its checkpoint `saved` states."""
    for name, now in facts.items():
        then = saved.get(name)
        if then == now:
            continue
        if name not in saved:
            raise UserError(
                f"{path}: cannot be resumed, it is of a version of these scripts that did not state {name}; give "
                "RUN_DIR another name to start a new run"
            )
        if name in ("persons", "holdout"):  # of hundreds of names show those that differ
            old, new = {*then}, {*now}
            then, now = list_names(sorted(old - new)) or "none", list_names(sorted(new - old)) or "none"
        raise UserError(
            f"{path}: cannot be resumed, {name} has changed ({then} then, {now} now); set it back, or give RUN_DIR "
            "another name to start a new run"
        )


def check_progress(path: Path, saved: dict, attributes: dict[str, type], counters: dict[str, dict]) -> None:
    """Raises UserError if what last.pt holds of a run, besides facts and weights, is damaged.

    attributes: name -> type; counters: name -> a state_dict, of whose form the saved one has to be.
    """
    odd = [name for name, kind in attributes.items() if type(saved.get(name)) is not kind]
    for name, wanted in counters.items():
        state = saved.get(name)
        fits = isinstance(state, dict) and state.keys() >= wanted.keys()
        odd += [] if fits and all(_alike(state[key], wanted[key]) for key in wanted) else [name]
    rows = {"history": ("epoch", "top1", "seconds"), "unwritten": ("update",)}
    for name, keys in rows.items():
        values = saved.get(name, [])
        if not (isinstance(values, list) and all(isinstance(row, dict) and row.keys() >= {*keys} for row in values)):
            odd.append(name)
    if odd:
        raise UserError(
            f"{path}: damaged, its {odd[0]} is {reprlib.repr(saved.get(odd[0]))}; give RUN_DIR another name and "
            "set RESUME = False to train again"
        )


def _alike(value: object, wanted: object) -> bool:
    """Whether a number stands for a number, and a dict for a dict."""
    return isinstance(value, (int, float) if isinstance(wanted, (int, float)) else type(wanted))


def check_disk(run_dir: Path, networks: dict[str, nn.Module], optimizer: Optimizer, *, average: bool) -> None:
    """Raises UserError, before the first step, where the checkpoints will not fit. average: there is a best_ema.pt."""
    weights = sum(t.numel() * t.element_size() for n in networks.values() for t in n.state_dict().values())
    trained = sum(p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])
    averages = weights if average else 0
    best, last = weights + averages, weights + averages + 2 * trained  # AdamW keeps two moments
    exists = (run_dir / "last.pt").exists()
    needed = last + (0 if exists else best + last)  # a file is written beside the one that it replaces
    folder = next(parent for parent in [run_dir, *run_dir.absolute().parents] if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{run_dir}: {free / 2**20:.0f} MiB free, the checkpoints need {needed / 2**20:.0f}; "
            "make room, or set RUN_DIR to another disk"
        )


def restore(path: Path, saved: dict, parts: dict, reason: str = "the data or a constant differs from that run") -> None:
    """Load each of `parts` from `saved`, strictly.

    Raises UserError with the name of a part that is missing or differs, and the likely `reason`.
    """
    for name, part in parts.items():
        if name not in saved:
            raise UserError(f"{path}: holds no {name!r}; only last.pt can be resumed")
        try:
            if isinstance(part, nn.Module):
                _check_numbers(saved[name], part.state_dict())
            part.load_state_dict(saved[name])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:  # whatever the file holds
            found = " ".join(str(error).split())[:300]
            raise UserError(f"{path}: its {name!r} does not fit ({found}); {reason}") from error


def _check_numbers(saved: dict, wanted: dict) -> None:
    """Raise ValueError for a tensor whose numbers would be taken for others, as int8's would, or are not finite."""
    for name, tensor in saved.items():
        if name in wanted and tensor.dtype != wanted[name].dtype and not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, expected {wanted[name].dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")


def load_facenet(
    path: Path | str,
    device: torch.device | str,
    freeze_until: str | None = None,
    dropout: float | None = None,
    mirror: bool | None = None,
) -> tuple[FaceNet, dict]:
    """The model of a checkpoint, on `device` in channels_last, and everything else that the checkpoint knows.

    freeze_until, dropout, mirror: see FaceNet; None for the last two takes the checkpoint's.
    Raises UserError if the file is no checkpoint of this project.
    """
    path = Path(path)
    saved = read_checkpoint(path)
    crops = saved.get("crops")
    try:
        crops = None if crops is None else Crops(**crops)
    except (TypeError, ValueError) as error:
        found = reprlib.repr(crops)
        raise UserError(f"{path}: its crops {found} are none that this version knows ({error})") from error
    model = FaceNet(
        pretrained=None,
        dropout=saved["dropout"] if dropout is None else dropout,
        freeze_until=freeze_until,
        crops=crops,
        mirror=saved.get("mirror") is True if mirror is None else mirror,
        backbone=saved["backbone"],
    )
    reason = "it is damaged, or of another version of these scripts; train it again"
    restore(path, saved, {"model": model}, reason)
    return model.to(device, memory_format=torch.channels_last), saved


def load_model(
    checkpoint: Path | str | None,
    pretrained: str | Path | None,
    image_size: int,
    face_crop: float,
    device: torch.device | str,
    framing: str = "centre",
) -> tuple[FaceNet, dict]:
    """The model of a checkpoint, or with None the `pretrained` network as it is, and what is known of it.

    The facts hold stage (0: pretrained), image_size, face_crop, framing, pretrained and, of a checkpoint, all else it
    knows.
    """
    if checkpoint is not None:
        return load_facenet(checkpoint, device)
    torch.manual_seed(0)  # for pretrained None: the same random network each time
    model = FaceNet(pretrained, dropout=0).to(device, memory_format=torch.channels_last)
    facts = {"stage": 0, "pretrained": str(pretrained), "image_size": image_size, "face_crop": face_crop}
    return model, facts | {"framing": framing}
