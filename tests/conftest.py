"""A small Task_B tree and a small network, so that whole runs fit into seconds."""

import csv
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tiny_net import TinyNet
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import checkpoints
import common
import datasets
import degradations
import evaluate
import identify
import journal
import optimisation
import plots
import train_stage1
import train_stage2
import training
import transforms
from models import FaceNet

torch.set_num_threads(1)  # tiny networks gain nothing from more, and crawl where other work holds the cores

CPU = torch.device("cpu")
KINDS = ("blurred", "lowlight")


@pytest.fixture(autouse=True)
def no_search(monkeypatch):
    """The photos of most tests show no face, and the search for one takes long."""
    for script in (evaluate, identify):
        monkeypatch.setattr(script, "FRAMING", "centre")


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """On every CPU: figures are compared to more digits than bfloat16 has."""
    monkeypatch.setattr(optimisation, "multiplies_bfloat16", lambda: False)


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


def set_quick_curves(monkeypatch) -> None:
    """Drawing three axes after each epoch would take longer than the run."""
    figure = Figure(figsize=(0.1, 0.1))
    monkeypatch.setattr(plots, "curves", lambda history, steps: figure)


@pytest.fixture
def quick_curves(monkeypatch) -> None:
    set_quick_curves(monkeypatch)


def set_tiny_runs(monkeypatch, data_dir: Path, runs: Path) -> tuple:
    """Set both training scripts to TinyNet on `data_dir` for two short epochs; returns (train_stage1, train_stage2)."""
    set_quick_curves(monkeypatch)
    monkeypatch.setattr(train_stage1, "FaceNet", TinyNet)
    monkeypatch.setattr(checkpoints, "FaceNet", TinyNet)
    monkeypatch.setattr(train_stage2, "FaceNet", TinyNet)
    monkeypatch.setattr(train_stage2, "WIDE_SIZE", 76)
    monkeypatch.setattr(train_stage2, "DISTORT", 0.0)  # files alone, unless a test is about degradations
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
    monkeypatch.setattr(train_stage1, "FRAMING", "centre")
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


class MeanColour(nn.Module):
    """(B, 3, H, W) -> (B, 3), an image's mean colour: its embedding is that vector over its norm."""

    def forward(self, images):
        return images.mean((2, 3))


def as_float(image: Image.Image) -> torch.Tensor:
    return pil_to_tensor(image).float()


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


# --- whole runs of both training scripts ------------------------------------------------------------------------------


CLOCK = ("images_per_second", "seconds", *journal.ACTIVITIES)  # differ from run to run


@dataclass
class Trained:
    """A run of a script that has ended."""

    run: training.Run
    best: dict  # best.pt
    last: dict  # last.pt

    def rows(self, name: str) -> list[dict]:
        """Of log.csv or steps.csv, as text, without what the clock says."""
        with open(self.run.run_dir / name, newline="") as file:
            return [{k: v for k, v in row.items() if k not in CLOCK} for row in csv.DictReader(file)]

    def column(self, name: str) -> list[float]:
        return [float(row[name]) for row in self.rows("steps.csv")]

    def state(self) -> dict:
        """All of last.pt that a resumed or repeated run has to reproduce, bit for bit."""
        history = [{k: v for k, v in row.items() if k not in CLOCK} for row in self.last["history"]]
        return plain(self.last | {"history": history, "meter": None})


@pytest.fixture(scope="module")
def stage1_best(tmp_path_factory) -> Path:
    """best.pt of an epoch of stage 1."""
    root = tmp_path_factory.mktemp("stage1")
    with pytest.MonkeyPatch.context() as patch:
        stage1, _ = set_tiny_runs(patch, write_task_b(root / "Task_B"), root / "runs")
        patch.setattr(stage1, "EPOCHS", 1)
        stage1.main()
    return root / "runs" / "stage1" / "best.pt"


@pytest.fixture
def stages(tiny_runs, stage1_best, monkeypatch) -> tuple:
    """Both scripts; stage 2 starts from `stage1_best`."""
    monkeypatch.setattr(tiny_runs[1], "STAGE1_CHECKPOINT", stage1_best)
    return tiny_runs


@pytest.fixture
def train(stages, monkeypatch):
    """train(script, run name, {CONSTANT: value}) runs one epoch, or EPOCHS; its other constants are as in `stages`."""
    root, runs, init = stages[0].RUN_DIR.parent, [], training.Run.__init__
    others = ("F",)  # capitals that are no constants, for tests to replace
    usual = {s: {n: value for n, value in vars(s).items() if n.isupper() and n not in others} for s in stages}
    monkeypatch.setattr(training.Run, "__init__", lambda run, *args, **kw: runs.append(run) or init(run, *args, **kw))

    def run(script, name: str, constants: dict | None = None) -> Trained:
        constants = {"EPOCHS": 1} | (constants or {})
        assert constants.keys() <= usual[script].keys()
        for constant, value in (usual[script] | {"RUN_DIR": root / name} | constants).items():
            monkeypatch.setattr(script, constant, value)
        script.main()
        return Trained(runs[-1], *(checkpoints.read_checkpoint(root / name / file) for file in ("best.pt", "last.pt")))

    return run


@pytest.fixture
def opened(monkeypatch) -> list[Path]:
    """Fills up with the photos that training opens."""
    paths, load_image = [], transforms.load_image
    monkeypatch.setattr(datasets, "load_image", lambda path, least=None: paths.append(path) or load_image(path))
    return paths


@pytest.fixture
def forwards(monkeypatch) -> list[SimpleNamespace]:
    """Fills up with what TinyNet's forward pass meets in training: images, part of the embedding, autocast's type."""
    seen, forward = [], TinyNet.forward

    def watched(self, images, part="both"):
        if self.training:
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
            seen.append(SimpleNamespace(images=images, part=part, dtype=dtype))
        return forward(self, images, part)

    monkeypatch.setattr(TinyNet, "forward", watched)
    return seen


def same_weights(saved: dict, start: dict) -> bool:
    """Whether the model of a checkpoint has the weights and statistics `start`; a count of passes aside."""
    names = [name for name in start if not name.endswith("num_batches_tracked")]
    return saved["model"].keys() == start.keys() and all(torch.equal(saved["model"][n], start[n]) for n in names)


def widened(weights: dict) -> dict:
    """What a network of these weights is when its wide crop is new."""
    return weights | {name.replace("backbone.", "wide."): value for name, value in weights.items()}


@pytest.fixture
def distorted(monkeypatch) -> Counter:
    """Counts the random degradations of training, of two families, by family; those of validation do nothing."""
    count = Counter()
    monkeypatch.setattr(degradations.FixedDegradation, "__call__", lambda self, image: image)
    families = {
        name: lambda image, severity, generator, name=name: count.update([name]) or image for name in ("fog", "sunny")
    }
    monkeypatch.setattr(degradations, "FAMILIES", families)
    return count


def embedded(model: nn.Module, paths: list[Path]) -> torch.Tensor:
    transform = transforms.eval_transform(76, 0.8)
    with torch.no_grad():
        return model.eval()(torch.stack([transform(transforms.load_image(path)) for path in paths]))
