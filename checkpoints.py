"""Checkpoints and other files: written atomically, read strictly."""

import contextlib
import json
import os
import reprlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import nn
from torch.optim import Optimizer

from common import MAX_SIDE, UserError, in_range, list_names, read_plain
from models import Crops, FaceNet

if TYPE_CHECKING:
    from pandas import DataFrame

FORMAT = 1  # of the checkpoint files; raised when an older file can no longer be read
# What every checkpoint states, besides its weights.
STATED = {"stage": int, "model": dict, "image_size": int, "face_crop": (int, float), "dropout": (int, float)}
STATED |= {"epoch": int, "selected_on": str, "persons": list, "holdout": list, "pretrained": str}
LIMITS = {"image_size": (76, MAX_SIDE), "face_crop": (1e-3, 1), "dropout": (0, 1 - 1e-9)}  # of its numbers


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


def write_json(path: Path, values: dict) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(values, indent=1) + "\n").encode())


def write_csv(path: Path, rows: "Iterable[dict] | DataFrame") -> None:
    """`rows` under the keys of all of them, in order of first appearance; a missing value or NaN stays empty."""
    from pandas import DataFrame  # takes half a second, which importing this module can do without

    with atomic_file(path) as file:
        table = DataFrame(rows, dtype=object)  # object: an int beside a missing value stays an int
        table.to_csv(file, mode="wb", index=False, lineterminator="\n")


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
    odd = [name for name, kind in STATED.items() if not isinstance(saved.get(name), kind)]
    if not odd:
        odd = [name for name, (low, high) in LIMITS.items() if not in_range(saved[name], float, low, high)]
        odd += [name for name in ("persons", "holdout") if not all(isinstance(person, str) for person in saved[name])]
    if odd:
        found = reprlib.repr(saved.get(odd[0]))  # shortened: a file can hold a list without end
        raise UserError(f"{path}: damaged, its {odd[0]} is {found}; train it again")
    return saved


def check_facts(path: Path, saved: dict, facts: dict) -> None:
    """Raises UserError for the first of a run's `facts` that differs from what its checkpoint `saved` states."""
    for name, now in facts.items():
        then = saved.get(name)
        if then == now:
            continue
        if name in ("persons", "holdout"):  # of hundreds of names show those that differ
            old, new = {*then}, {*now}
            then, now = list_names(sorted(old - new)) or "none", list_names(sorted(new - old)) or "none"
        raise UserError(
            f"{path}: cannot be resumed, {name} has changed ({then} then, {now} now); set it back, or give RUN_DIR "
            "another name to start a new run"
        )


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
            part.load_state_dict(saved[name])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:  # whatever the file holds
            found = " ".join(str(error).split())[:300]
            raise UserError(f"{path}: its {name!r} does not fit ({found}); {reason}") from error


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
) -> tuple[FaceNet, dict]:
    """The model of a checkpoint, or with None the `pretrained` network as it is, and what is known of it.

    The facts hold stage (0: pretrained), image_size, face_crop, pretrained and, of a checkpoint, all else it knows.
    """
    if checkpoint is not None:
        return load_facenet(checkpoint, device)
    torch.manual_seed(0)  # for pretrained None: the same random network each time
    model = FaceNet(pretrained, dropout=0).to(device, memory_format=torch.channels_last)
    return model, {"stage": 0, "pretrained": str(pretrained), "image_size": image_size, "face_crop": face_crop}
