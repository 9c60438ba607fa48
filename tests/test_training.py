"""Whole runs of both training scripts, of a tiny network on a few photos: what each constant does, resuming, the data."""

import copy
import csv
import math
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import KINDS, TinyNet, plain, same_tensors, set_tiny_runs, write_photo, write_task_b
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import checkpoints
import common
import datasets
import journal
import plots
import training
import transforms
from common import UserError

CPU = torch.device("cpu")
CLOCK = ("images_per_second", "seconds", *journal.ACTIVITIES)  # differ from run to run
REAL_CURVES = plots.curves


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
    others = ("F", "DISTORTIONS")  # capitals that are no constants, for tests to replace
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
    monkeypatch.setattr(datasets, "load_image", lambda path: paths.append(path) or load_image(path))
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


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_weights(saved: dict, start: dict) -> bool:
    """Whether the model of a checkpoint has the weights and statistics `start`; a count of passes aside."""
    names = [name for name in start if not name.endswith("num_batches_tracked")]
    return saved["model"].keys() == start.keys() and all(torch.equal(saved["model"][n], start[n]) for n in names)


def widened(weights: dict) -> dict:
    """What a network of these weights is when its wide crop is new."""
    return weights | {name.replace("backbone.", "wide."): value for name, value in weights.items()}


# --- runs that stop, resume and repeat --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, constants, steps, saved_at",
    [
        # Killed within epoch 2, three batches after the last save; 7 batches and 4 updates an epoch.
        (1, {"EMA_DECAY": 0.9, "ACCUMULATE": 2, "SAVE_EVERY": 2, "BATCH_SIZE": 3}, 13, (1, 4, 6)),
        (1, {"NUM_WORKERS": 1, "SAVE_EVERY": 0}, 8, (1, 0, 6)),
        (2, {"BACKBONE_LR": 1e-2, "WIDE_LR": 1e-2, "SAVE_EVERY": 1}, 4, (1, 1, 3)),
    ],
)
def test_a_run_that_is_killed_and_resumed_equals_one_in_one_go(stages, train, monkeypatch, stage, constants, steps, saved_at):
    script, constants = stages[stage - 1], constants | {"EPOCHS": 2}
    whole = train(script, "whole", constants)
    count, step = iter(range(1, 1000)), training.Run.step

    def until(run, *args):
        step(run, *args)
        if next(count) == steps:
            raise InterruptedError

    with monkeypatch.context() as context, pytest.raises(InterruptedError):
        context.setattr(training.Run, "step", until)
        train(script, "killed", constants)
    between = checkpoints.read_checkpoint(script.RUN_DIR / "last.pt")
    assert (between["epoch"], between["batch"], between["updates"]) == saved_at
    resumed = train(script, "killed", constants | {"RESUME": True})
    ours, theirs = resumed.state(), whole.state()
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    assert whole.last["epoch"] == 2 and whole.last["history"][2]["loss"] != whole.last["history"][1]["loss"]
    assert resumed.best["epoch"] == whole.best["epoch"] and same_tensors(resumed.best["model"], whole.best["model"])
    for name in ("log.csv", "steps.csv"):
        assert resumed.rows(name) == whole.rows(name)
    assert resumed.column("update") == list(range(1, whole.last["updates"] + 1))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_finished_run_goes_on_for_more_epochs_each_with_its_own_draws(stages, train, monkeypatch, stage):
    epochs, script = [], stages[stage - 1]
    for dataset in (datasets.FaceClassificationDataset, datasets.FacePairDataset):
        set_epoch = dataset.set_epoch
        monkeypatch.setattr(dataset, "set_epoch", lambda self, epoch, of=set_epoch: epochs.append(epoch) or of(self, epoch))
    short = train(script, "run", {"EPOCHS": 1})
    longer = train(script, "run", {"EPOCHS": 2, "RESUME": True})
    assert epochs == [1, 2] and longer.last["epoch"] == 2
    assert longer.rows("log.csv")[:2] == short.rows("log.csv")[:2]


def test_lower_learning_rates_take_effect_on_resume(stages, train):
    """As the sentence about a loss that is not finite advises."""
    train(stages[0], "run", {"BACKBONE_LR": 1e-3, "EPOCHS": 2})
    last = train(stages[0], "run", {"BACKBONE_LR": 1e-5, "EPOCHS": 3, "RESUME": True}).last
    assert last["history"][1]["backbone_lr"] > 1e-4 and last["history"][3]["backbone_lr"] < 1e-5


def test_a_repeated_run_is_equal_with_workers_too_and_another_seed_gives_another_run(stages, train):
    first = train(stages[0], "first", {"SEED": 3})
    torch.rand(17)  # what happened before does not matter
    second = train(stages[0], "second", {"SEED": 3, "NUM_WORKERS": 1})
    assert (first.run.loader.num_workers, second.run.loader.num_workers) == (0, 1)
    assert second.state() == first.state()
    assert not same_tensors(train(stages[0], "other", {"SEED": 4}).last["model"], first.last["model"])


REFUSED = {
    1: [
        ({"FREEZE_UNTIL": "mixed_6a"}, r"freeze_until has changed \(None then, mixed_6a now\)"),
        ({"FACE_CROP": 0.7}, r"face_crop has changed \(0.8 then, 0.7 now\)"),
        ({"BALANCE": 0.5}, r"balance has changed \(0.0 then, 0.5 now\)"),
        ({"EMA_DECAY": 0.9}, r"ema_decay has changed \(0.0 then, 0.9 now\)"),
        ({"ACCUMULATE": 2}, r"accumulate has changed \(1 then, 2 now\)"),
        ({"BATCH_SIZE": 5}, r"batch_size has changed \(4 then, 5 now\)"),
        ({"SEED": 1}, r"seed has changed \(0 then, 1 now\)"),
        ({"DISTORT": 0.5}, r"distort has changed \(\[0.0, 2\] then, \[0.5, 2\] now\)"),
    ],
    2: [
        ({"TEACHER": "vggface2"}, r"teacher has changed \(None then, vggface2 now\)"),
        ({"WIDE_WEIGHT": 0.75}, r"crops has changed \(.*'wide_weight': 0.3.* then, .*'wide_weight': 0.75.* now\)"),
        ({"CLEAN": 0.25}, r"distort has changed \(\[0.1, 0.0, 2\] then, \[0.25, 0.0, 2\] now\)"),
        ({"SKIP_KINDS": ("lowlight",)}, r"skip_kinds has changed \(\[\] then, \['lowlight'\] now\)"),
        ({"OFTEN": ("lowlight",)}, r"often has changed \(\[\] then, \['lowlight'\] now\)"),
        ({"MIRROR": False}, r"mirror has changed \(True then, False now\)"),
        ({"DROPOUT": 0.2}, r"dropout has changed \(0.0 then, 0.2 now\)"),
    ],
}


@pytest.mark.parametrize("stage", [1, 2])
def test_resume_with_other_constants_or_data_is_refused_and_changes_nothing(stages, train, stage):
    script = stages[stage - 1]
    train(script, "run")
    before = files_of(script.RUN_DIR)

    def refused(constants: dict, change: str) -> None:
        with pytest.raises(UserError, match=f"run/last.pt: cannot be resumed, {change}; set it back, or give RUN_DIR"):
            train(script, "run", constants | {"RESUME": True})

    for constants, change in REFUSED[stage]:
        refused(constants, change)
    photo = next((script.DATA_DIR / "train").glob("*/distortion/*.png"))
    photo.rename(photo.with_name(f"other_{photo.name}"))
    refused({}, r"data has changed \(21 files, \w{12} then, 21 files, \w{12} now\)")
    (script.DATA_DIR / "train" / "di").rename(script.DATA_DIR / "train" / "dora")
    refused({}, r"(persons|data) has changed \(.*\)")
    assert files_of(script.RUN_DIR) == before


def test_each_fact_of_both_stages_must_be_equal_or_may_change(stages, train):
    facts = set().union(*(train(script, script.RUN_DIR.name).run.facts for script in stages))
    assert not {*training.MUST_EQUAL} & {*training.MAY_CHANGE}
    assert facts == {*training.MUST_EQUAL, *training.MAY_CHANGE}


def test_resume_without_a_run_and_a_start_over_one_are_refused(stages, train):
    message = f"{stages[0].RUN_DIR.parent / 'run' / 'last.pt'}: no checkpoint to resume; set RESUME = False"
    with pytest.raises(UserError, match=message):
        train(stages[0], "run", {"RESUME": True})
    train(stages[0], "run")
    with pytest.raises(UserError, match="set RESUME = True to go on with it"):
        train(stages[0], "run")


# --- what a run writes ------------------------------------------------------------------------------------------------


def test_stage_1_logs_steps_epochs_events_and_curves(stages, train, monkeypatch):
    monkeypatch.setattr(plots, "curves", REAL_CURVES)
    trained = train(stages[0], "run", {"EPOCHS": 2})
    folder = trained.run.run_dir
    assert (folder / "steps.csv").read_text().splitlines()[0].split(",") == [
        *("update", "epoch", "batch", "loss", "accuracy", "target_logit", "gradient_norm"),
        *("backbone_lr", "head_lr", "images_per_second", "loading", "skipped"),
    ]
    steps, log = trained.rows("steps.csv"), trained.rows("log.csv")
    assert trained.column("update") == list(range(1, 13))
    assert [(int(row["epoch"]), int(row["batch"])) for row in steps] == [(e, b) for e in (1, 2) for b in range(1, 7)]
    for row in steps:
        assert 0 <= float(row["accuracy"]) <= 1 and -32 <= float(row["target_logit"]) <= 32
    factors = [1 / 2, *(0.5 * (1 + math.cos(math.pi * done / 11)) for done in range(11))]  # WARMUP_STEPS = 1
    assert trained.column("backbone_lr") == pytest.approx([3e-4 * factor for factor in factors])
    assert trained.column("head_lr") == pytest.approx([1e-2 * factor for factor in factors])

    assert [row["epoch"] for row in log] == ["0", "1", "2"]
    assert log[0]["loss"] == "" and float(log[2]["loss"]) == trained.last["history"][2]["loss"]
    assert {"top1_mean", "top1_best", "target_logit", "gradient_norm", *(f"top1_{k}" for k in KINDS)} <= log[0].keys()
    losses = zip([4, 4, 4, 3, 3, 3], trained.column("loss")[6:], strict=True)  # photos per batch
    assert float(log[2]["loss"]) == pytest.approx(sum(size * loss for size, loss in losses) / 21)
    for row in trained.last["history"]:
        assert sum(row[activity] for activity in journal.ACTIVITIES) == pytest.approx(1) and row["seconds"] > 0

    scalars = EventAccumulator(str(folder / "tensorboard"))
    scalars.Reload()
    for name in ("loss", "gradient_norm", "target_logit", "skipped", "head_lr"):
        found = scalars.Scalars(f"step/{name}")
        assert [event.step for event in found] == list(range(1, 13))
        assert [event.value for event in found] == pytest.approx(trained.column(name), rel=1e-5)
    found = scalars.Scalars("epoch/top1_mean")
    assert [(event.step, event.value) for event in found] == [(i, float(row["top1_mean"])) for i, row in enumerate(log)]
    with Image.open(folder / "curves.png") as image:
        image.load()
        assert image.width > 300


def only_plain_types(content) -> bool:
    if isinstance(content, dict):
        return all(only_plain_types(part) for item in content.items() for part in item)
    if isinstance(content, (list, tuple)):
        return all(map(only_plain_types, content))
    return isinstance(content, (bool, int, float, str, type(None), torch.Tensor))


def test_checkpoints_hold_only_tensors_and_plain_types(stages, train):
    for script in stages:
        trained = train(script, script.RUN_DIR.name)
        assert only_plain_types(trained.best) and only_plain_types(trained.last)
        assert "ema" not in trained.last and not (script.RUN_DIR / "best_ema.pt").exists()
        assert not any(name.startswith("ema_") for row in trained.last["history"] for name in row)


def rising(monkeypatch, script, top1) -> list[float]:
    """Makes the script's top-1 a function of how many validations there were; returns those given so far."""
    given, validate = [], script.validate

    def validated(*args, **options):
        _, row = validate(*args, **options)
        given.append(top1(len(given)))
        return given[-1], row

    monkeypatch.setattr(script, "validate", validated)
    return given
