"""A small Task_B tree and a small network, so that whole runs fit into seconds."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import checkpoints
import common
import plots
import train_stage1
import train_stage2
from models import FaceNet

torch.set_num_threads(1)  # tiny networks gain nothing from more, and crawl where other work holds the cores

KINDS = ("blurred", "lowlight")


@pytest.fixture(autouse=True)
def fresh_warnings():
    """Each test hears its warnings, also those that an earlier test has heard."""
    common.warn_once.cache_clear()


def write_photo(path: Path, colour, seed: int, side: int = 40) -> None:
    """A photo of one colour under noise of its own."""
    noise = np.random.default_rng(seed).integers(-30, 30, (side, side, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


def write_plain(path: Path, colour=(90, 90, 90), size=(8, 8)) -> Path:
    """A photo of exactly one colour, which identifies it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, tuple(colour)).save(path)
    return path


def write_person(folder: Path, colour, photos: int, layout: str = "clean") -> None:
    """`photos` clean photos with their distorted copies, in FACECOM's layout "flat" or in "clean"."""
    for number in range(1, photos + 1):
        stem = f"{folder.name}_{number:04d}"
        clean = folder / "clean" if layout == "clean" else folder
        write_photo(clean / f"{stem}.png", colour, seed=number)
        for kind, scale in zip(KINDS, (0.9, 0.3), strict=True):
            distorted = folder / "distortion" / f"{stem}_{kind}.png"
            write_photo(distorted, np.array(colour) * scale, seed=100 * number)


COLOURS = {"ann": (220, 40, 40), "bob": (40, 220, 40), "cy": (40, 40, 220), "di": (220, 220, 40)}


def write_task_b(root: Path) -> Path:
    """4 train persons (1, 2, 3 and 1 photos: 21 files) and 2 other val persons, in the layout with clean/."""
    for (name, colour), photos in zip(COLOURS.items(), (1, 2, 3, 1), strict=True):
        write_person(root / "train" / name, colour, photos)
    write_person(root / "val" / "eve", (200, 40, 200), 2)
    write_person(root / "val" / "fay", (40, 200, 200), 1)
    return root


@pytest.fixture
def task_b(tmp_path) -> Path:
    return write_task_b(tmp_path / "Task_B")


class TinyNet(FaceNet):
    """FaceNet, crops and gate included, on a network of 10,000 weights with BatchNorm and dropout."""

    def __init__(self, pretrained=None, dropout=0.4, freeze_until=None, crops=None, mirror=False, constant=None):
        nn.Module.__init__(self)
        self.backbone = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, stride=4), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            *(nn.Dropout(dropout), nn.Linear(16, 512)),
        )
        self.crops, self.wide, self.mirror = None, None, mirror
        if crops:
            self.widen(crops)
        self._frozen = [self.backbone[:5].requires_grad_(False)] if freeze_until else []


def set_tiny_runs(monkeypatch, data_dir: Path, runs: Path) -> tuple:
    """Set both training scripts to TinyNet on `data_dir` for two short epochs; returns (train_stage1, train_stage2)."""
    figure = Figure(figsize=(0.1, 0.1))
    monkeypatch.setattr(plots, "curves", lambda history, steps: figure)  # drawing would take longer than the run
    monkeypatch.setattr(train_stage1, "FaceNet", TinyNet)
    monkeypatch.setattr(checkpoints, "FaceNet", TinyNet)
    monkeypatch.setattr(train_stage2, "FaceNet", TinyNet)
    monkeypatch.setattr(train_stage2, "WIDE_SIZE", 76)
    monkeypatch.setattr(train_stage2, "TEACHER", None)  # the network that stage 1 left
    both = {"DATA_DIR": data_dir, "NUM_WORKERS": 0, "EPOCHS": 2, "WARMUP_STEPS": 1, "QUICK_VALIDATION": False}
    monkeypatch.setattr(train_stage1, "BATCH_SIZE", 4)
    # TinyNet starts at random: its defaults are those for such a network.
    for constant, value in {"SKIP_KINDS": (), "FREEZE_BATCHNORM": False, "HEAD_LR": 1e-2}.items():
        monkeypatch.setattr(train_stage1, constant, value)
    monkeypatch.setattr(train_stage2, "PERSONS_PER_BATCH", 3)
    monkeypatch.setattr(train_stage2, "OFTEN", ())  # of kinds that task_b does not have
    for script, name in ((train_stage1, "stage1"), (train_stage2, "stage2")):
        for constant, value in (both | {"RUN_DIR": runs / name}).items():
            monkeypatch.setattr(script, constant, value)
    monkeypatch.setattr(train_stage1, "IMAGE_SIZE", 76)
    monkeypatch.setattr(train_stage1, "FACE_CROP", 0.8)
    monkeypatch.setattr(train_stage2, "STAGE1_CHECKPOINT", runs / "stage1" / "best.pt")
    return train_stage1, train_stage2


@pytest.fixture
def tiny_runs(monkeypatch, task_b, tmp_path) -> tuple:
    return set_tiny_runs(monkeypatch, task_b, tmp_path / "runs")


FRAME = 154  # pixels: its centre of 0.52 is 80 wide, rows and columns 37..116


def tell_apart(model: FaceNet, side: int, brightest: float = 1.0) -> FaceNet:
    """Make a random network tell images apart, by torch's own generator: BatchNorm gets the statistics of some images
    of `side` pixels up to `brightest`, not the first 0 and 1, in each network as that one sees them. In eval mode."""
    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)):
            norm.momentum = 1.0
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.1)
        model.train()(brightest * (2 * torch.rand(8, 3, side, side) - 1))
    return model.eval()


def noise_frames(count: int, burnt: int, seed: int) -> torch.Tensor:
    """`count` standardized frames of noise; the one of number `burnt` is white where the face would be."""
    frames = 0.9 * (2 * torch.rand(count, 3, FRAME, FRAME, generator=torch.Generator().manual_seed(seed)) - 1)
    frames[burnt, :, 37:117, 37:117] = 127.5 / 128
    return frames


class MakesFolderWhenLoaded:
    """Creates the folder `path` when unpickled: what a malicious file could do with any command."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def same_tensors(a: dict, b: dict) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def plain(saved):
    """`saved` with its tensors as lists, exactly, so that == compares all of it."""
    if isinstance(saved, torch.Tensor):
        return str(saved.dtype), saved.tolist()
    if isinstance(saved, dict):
        return {name: plain(value) for name, value in saved.items()}
    return [plain(value) for value in saved] if isinstance(saved, (list, tuple)) else saved


def files_in(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file under `folder`."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def made_with_seeds(script, monkeypatch, folder: Path, seeds: tuple[int, ...]) -> list[dict[str, bytes]]:
    """The files that `script` writes to an OUT_DIR of its own for each SEED."""
    made = []
    for run, seed in enumerate(seeds):
        monkeypatch.setattr(script, "OUT_DIR", folder / str(run))
        monkeypatch.setattr(script, "SEED", seed)
        script.main()
        made.append(files_in(folder / str(run)))
    return made
