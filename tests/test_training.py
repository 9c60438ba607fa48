"""Whole runs of both training scripts, with a tiny network on a few photos: resuming, what constants do, bad data."""

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
from conftest import KINDS, TinyNet, files_in, plain, same_tensors, set_tiny_runs, write_photo, write_task_b
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
def test_a_run_that_is_killed_and_resumed_equals_one_in_one_go(
    stages, train, monkeypatch, stage, constants, steps, saved_at
):
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
        monkeypatch.setattr(
            dataset, "set_epoch", lambda self, epoch, of=set_epoch: epochs.append(epoch) or of(self, epoch)
        )
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
    before = files_in(script.RUN_DIR)

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
    assert files_in(script.RUN_DIR) == before


def test_each_fact_of_both_stages_must_be_equal_or_may_change(stages, train):
    facts = set().union(*(train(script, script.__name__).run.facts for script in stages))
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
    assert [event.step for event in found] == [0, 1, 2]
    assert [event.value for event in found] == pytest.approx([float(row["top1_mean"]) for row in log])
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
        trained = train(script, script.__name__)
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


def test_the_best_average_is_a_checkpoint_of_its_own_and_stage_2_can_start_from_it(stages, train, monkeypatch, capsys):
    stage1, stage2 = stages
    given = rising(monkeypatch, stage1.validation, top1=lambda call: call / 100)
    trained = train(stage1, "run", {"EMA_DECAY": 0.9, "EPOCHS": 2})
    path = stage1.RUN_DIR / "best_ema.pt"
    model, saved = checkpoints.load_facenet(path, CPU)
    assert same_tensors(model.state_dict(), trained.run.learner.ema.module.state_dict())
    assert same_tensors(trained.best["model"], trained.run.learner.networks["model"].state_dict())
    assert not torch.equal(model.backbone[6].weight, trained.best["model"]["backbone.6.weight"])
    assert (saved["epoch"], saved["top1"], saved["ema_decay"]) == (2, given[-1], 0.9)
    assert trained.last["best_ema"] == {"epoch": 2, "top1": given[-1]} and trained.last["best"]["top1"] == given[-2]
    rows = trained.rows("log.csv")
    assert all(0 <= float(row["ema_top1_mean"]) <= 1 for row in rows) and "ema_top1_blurred" in rows[0]
    assert f"on val: {path}" in capsys.readouterr().out
    last = train(stage2, "stage2", {"STAGE1_CHECKPOINT": path, "BACKBONE_LR": 0.0, "WIDE_LR": 0.0}).last
    assert torch.equal(last["model"]["backbone.6.weight"], model.backbone[6].weight)


# --- constants that reach both stages ---------------------------------------------------------------------------------


def test_patience_stops_the_runs_of_both_stages(stages, train, monkeypatch, capsys):
    rising(monkeypatch, stages[0].validation, top1=lambda call: 0.5)  # the same module in both
    for script in stages:
        assert train(script, script.__name__, {"EPOCHS": 3, "PATIENCE": 1}).last["epoch"] == 1
        assert "stopped early: 1 epochs without" in capsys.readouterr().out


@pytest.mark.parametrize("amp, dtype", [("auto", None), ("bf16", torch.bfloat16)])
def test_both_stages_train_float32_weights_in_the_precision_selected(stages, train, forwards, amp, dtype):
    for script in stages:
        forwards.clear()
        last = train(script, script.__name__, {"AMP": amp}).last
        assert {seen.dtype for seen in forwards} == {dtype}
        floating = [value for value in last["model"].values() if value.is_floating_point()]
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in floating)
        assert last["history"][1]["skipped"] == 0 and math.isfinite(last["history"][1]["loss"])


@pytest.mark.parametrize(
    "stage, constants, message",
    [
        (1, {"AMP": "fp16"}, "AMP = 'fp16'"),
        (1, {"BATCH_SIZE": 22}, "BATCH_SIZE = 22: more than the 21 items of an epoch"),
        (1, {"DATA_DIR": Path("nowhere")}, "nowhere/train: no such folder"),
        (2, {"PERSONS_PER_BATCH": 5}, "PERSONS_PER_BATCH = 5: only 4 persons have pairs; lower it"),
        (2, {"PHOTOS_PER_PERSON": 3}, "PHOTOS_PER_PERSON = 3: expected an even number, half clean, half distorted"),
        (2, {"CLEAN": 0.5, "DISTORT": 0.75}, r"CLEAN = 0.5, DISTORT = 0.75: expected shares in 0\.\.1"),
        (2, {"STAGE1_CHECKPOINT": Path("nowhere.pt")}, r"^nowhere.pt: no checkpoint; run the stage that writes it"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(stages, train, stage, constants, message):
    script = stages[stage - 1]
    with pytest.raises(UserError, match=message):
        train(script, "run", constants)
    assert not list(script.RUN_DIR.glob("*.pt"))


def test_a_full_disk_and_a_missing_val_folder_stop_both_stages_before_the_first_step(stages, train, monkeypatch):
    for script in stages:
        with monkeypatch.context() as context, pytest.raises(UserError, match="run: 0 MiB free"):
            context.setattr(checkpoints.shutil, "disk_usage", lambda path: SimpleNamespace(total=10**15, free=1000))
            train(script, "run")
    shutil.rmtree(stages[0].DATA_DIR / "val")
    for script in stages:
        with pytest.raises(UserError, match="val: no such folder"):
            train(script, "run")
    assert not list(stages[0].RUN_DIR.parent.rglob("*.pt"))


@pytest.mark.parametrize("freeze", [True, False])
def test_freeze_batchnorm_keeps_the_statistics_through_a_whole_run(stages, train, stage1_best, freeze):
    random = {"backbone.1.running_mean": torch.zeros(16), "backbone.1.running_var": torch.ones(16)}
    before = checkpoints.read_checkpoint(stage1_best)["model"]
    for script, start in zip(stages, (random, widened({name: before[name] for name in random})), strict=True):
        last = train(script, script.__name__, {"FREEZE_BATCHNORM": freeze}).last
        assert {torch.equal(last["model"][name], value) for name, value in start.items()} == {freeze}


def test_freeze_until_freezes_the_first_blocks_of_the_face_network_in_both_stages(stages, train, stage1_best):
    torch.manual_seed(stages[0].SEED)
    for script, start in zip(
        stages, (TinyNet().state_dict(), checkpoints.read_checkpoint(stage1_best)["model"]), strict=True
    ):
        free, frozen = (
            train(script, f"{script.__name__} {name}", {"FREEZE_UNTIL": name}).last for name in (None, "mixed_6a")
        )
        for weight in ("0.weight", "1.bias"):
            assert torch.equal(frozen["model"][f"backbone.{weight}"], start[f"backbone.{weight}"])
            assert not torch.equal(free["model"][f"backbone.{weight}"], start[f"backbone.{weight}"])
            if script is stages[1]:  # the wide crop's network is never frozen
                assert not torch.equal(frozen["model"][f"wide.{weight}"], start[f"backbone.{weight}"])
        assert not torch.equal(frozen["model"]["backbone.6.weight"], start["backbone.6.weight"])
        for last, of_face in ((free, 6), (frozen, 2)):
            groups = {group["name"]: len(group["params"]) for group in last["optimizer"]["param_groups"]}
            assert groups == {"backbone": of_face} | ({"wide": 6} if script is stages[1] else {"head": 1})


def test_compile_is_called_once_and_trains_the_same_under_the_usual_names(stages, train, monkeypatch):
    compiled = []

    def compile_eagerly(self):
        compiled.append(self)
        nn.Module.compile(self, backend="eager")

    monkeypatch.setattr(TinyNet, "compile", compile_eagerly)
    monkeypatch.setattr(common, "_try_compiler", lambda device: None)  # which takes seconds, and a compiler
    for script in stages:
        usual = train(script, f"{script.__name__}_usual", {"EMA_DECAY": 0.9}).last
        assert not compiled
        trained = train(script, script.__name__, {"COMPILE": True, "EMA_DECAY": 0.9})
        assert [network is trained.run.learner.networks["model"] for network in compiled] == [True]
        for part in ("model", "ema"):
            torch.testing.assert_close(trained.last[part], usual[part], rtol=0, atol=1e-5)
        compiled.clear()


def test_without_a_compiler_compile_is_refused_before_anything_is_read(stages, monkeypatch):
    def no_compiler(device):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(common, "_try_compiler", no_compiler)
    for script in stages:
        monkeypatch.setattr(script, "COMPILE", True)
        monkeypatch.setattr(script, "scan_persons", lambda *_, **__: pytest.fail("photos were read"))
        message = r"^COMPILE = True: torch\.compile does not work here \(no C\+\+ compiler found\); .* COMPILE = False$"
        with pytest.raises(UserError, match=message):
            script.main()


def test_both_stages_use_a_fused_optimizer_and_images_in_channels_last(stages, train, forwards):
    for script in stages:
        forwards.clear()
        learner = train(script, script.__name__).run.learner
        assert all(group["fused"] is True for group in learner.optimizer.param_groups)
        network = learner.networks["model"]
        layers = (network.backbone[0], network.wide[0]) if network.crops else (network.backbone[0],)
        for tensor in [seen.images for seen in forwards] + [layer.weight for layer in layers]:
            assert tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_nan_loss_lists_the_photos_of_its_batch(stages, train, monkeypatch, caplog, opened, stage):
    of_batch = []

    def spoiled(loss):
        of_batch.append([str(path) for path in opened])
        opened.clear()
        return loss * (math.nan if len(of_batch) == 3 else 1.0)

    monkeypatch.setattr(stages[0], "F", SimpleNamespace(cross_entropy=lambda *args: spoiled(F.cross_entropy(*args))))
    forward = stages[1].ContrastiveLoss.forward
    monkeypatch.setattr(stages[1].ContrastiveLoss, "forward", lambda *args, **named: spoiled(forward(*args, **named)))
    constants = {"EPOCHS": 2} | ({"CLEAN": 0.0, "DISTORT": 0.0} if stage == 2 else {})
    trained = train(stages[stage - 1], "run", constants)
    (listed,) = [record.getMessage() for record in caplog.records if "the step is skipped" in record.getMessage()]
    files = [line.strip() for line in listed.splitlines()[1:]]
    assert len(files) == (4 if stage == 1 else 2 * 3)
    assert files == of_batch[2][-len(files) :]  # in the order of the batch; validation may have come before
    assert ("epoch 1, batch 3" if stage == 1 else "epoch 2, batch 1") + ": the loss is nan" in caplog.text
    assert trained.column("skipped") == [0, 0, 1] + [0] * (9 if stage == 1 else 1)


# --- stage 1 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate, updates", [(1, 6), (4, 2), (7, 1)])
def test_stage_1_updates_once_for_each_group_of_batches_begun(stages, train, accumulate, updates):
    trained = train(stages[0], "run", {"ACCUMULATE": accumulate})  # 21 photos, 6 batches
    assert trained.last["updates"] == len(trained.column("update")) == updates
    assert trained.last["scheduler"]["last_epoch"] == updates
    rates = [group["lr"] for group in trained.run.learner.optimizer.param_groups]
    assert rates == pytest.approx([0, 0], abs=1e-12)  # the schedule came to its end


def test_training_learns_the_train_persons(stages, train):
    history = train(stages[0], "run", {"EPOCHS": 4, "BACKBONE_LR": 1e-2, "HEAD_LR": 1e-1}).last["history"]
    assert history[4]["loss"] < history[1]["loss"]


@pytest.mark.parametrize("balance", [0.0, 1.0])
def test_balance_reaches_the_batches_of_stage_1(stages, train, opened, balance):
    train(stages[0], "run", {"BALANCE": balance, "CENTRES_FROM_MEANS": False})  # which reads photos, too
    seen = Counter(path.parents[1].name for path in opened if path.is_relative_to(stages[0].DATA_DIR / "train"))
    assert sum(seen.values()) == 21
    if balance:
        assert all(4 <= seen[person] <= 7 for person in ("ann", "bob", "cy", "di"))  # 21 / 4, photo by photo rounded
    else:
        assert seen == {"ann": 3, "bob": 6, "cy": 9, "di": 3}


@pytest.fixture
def distorted(monkeypatch, stages) -> Counter:
    """Counts the random distortions, of two kinds, by kind."""
    count = Counter()
    kinds = {
        name: lambda image, severity, generator, name=name: count.update([name]) or image for name in ("fog", "sunny")
    }
    for script in stages:
        monkeypatch.setattr(script, "DISTORTIONS", kinds)
    return count


def test_distort_reaches_the_photos_of_stage_1_without_the_kinds_that_are_skipped(stages, train, distorted):
    train(stages[0], "never", {"DISTORT": 0.0})
    assert not distorted
    last = train(stages[0], "fog", {"DISTORT": 1.0, "DISTORT_MOST": 1, "SKIP_KINDS": ("sunny",)}).last
    assert distorted == {"fog": 21} and last["distort"] == [1.0, 1]
    train(stages[0], "both", {"DISTORT": 1.0, "DISTORT_MOST": 1, "SKIP_KINDS": ()})
    assert distorted.total() == 2 * 21 and distorted["sunny"]


def embedded(model: nn.Module, paths: list[Path]) -> torch.Tensor:
    transform = transforms.eval_transform(76, 0.8)
    with torch.no_grad():
        return model.eval()(torch.stack([transform(transforms.load_image(path)) for path in paths]))


def test_class_centres_start_at_the_persons_means_or_at_random(stages, train):
    still = {"HEAD_LR": 0.0, "BACKBONE_LR": 0.0, "FREEZE_BATCHNORM": True}
    centres = train(stages[0], "means", still | {"CENTRES_FROM_MEANS": True}).last["head"]["weight"]
    model, _ = checkpoints.load_facenet(stages[0].RUN_DIR / "last.pt", CPU)
    folders = [stages[0].DATA_DIR / "train" / name / "clean" for name in ("ann", "bob", "cy", "di")]
    means = torch.stack([embedded(model, sorted(folder.iterdir())).mean(0) for folder in folders])
    torch.testing.assert_close(centres, F.normalize(means), rtol=0, atol=1e-5)
    centres = train(stages[0], "random", still | {"CENTRES_FROM_MEANS": False}).last["head"]["weight"]
    assert torch.cosine_similarity(centres, means).abs().max() < 0.5


def test_held_out_persons_choose_the_epoch_without_a_val_folder_and_train_in_neither_stage(
    stages, train, monkeypatch, opened
):
    seen = {}
    for script in stages:

        def watched(*args, script=script, whole=script.train_one_epoch):
            opened.clear()
            whole(*args)
            seen[script] = {path.parents[1].name for path in opened}

        monkeypatch.setattr(script, "train_one_epoch", watched)
    shutil.rmtree(stages[0].DATA_DIR / "val")
    first = train(stages[0], "stage1", {"HOLDOUT_PERSONS": 2})
    checkpoint = {"STAGE1_CHECKPOINT": stages[0].RUN_DIR / "best.pt"}
    second = train(stages[1], "stage2", checkpoint | {"PERSONS_PER_BATCH": 2})
    held_out = set(first.best["holdout"])
    assert len(held_out) == 2 and set(first.best["persons"]) == {"ann", "bob", "cy", "di"} - held_out
    assert seen[stages[0]] == seen[stages[1]] == set(first.best["persons"])
    for saved in (first.best, second.best):
        assert (saved["persons"], saved["holdout"]) == (first.best["persons"], first.best["holdout"])
        assert saved["selected_on"] == "2 persons held out of train"
    assert first.best["head"]["weight"].shape == (2, 512)
    assert "val_clean_accuracy" not in first.last["history"][1] and "top1_mean" in first.last["history"][1]


def test_accuracy_on_clean_val_photos_is_logged_where_all_val_persons_were_trained(stages, train):
    root = stages[0].DATA_DIR
    shutil.rmtree(root / "val" / "fay")
    shutil.copytree(root / "train" / "ann", root / "val" / "ann")
    history = train(stages[0], "one unknown").last["history"]
    assert "val_clean_accuracy" not in history[1] and "top1_mean" in history[1]
    shutil.rmtree(root / "val")
    shutil.copytree(root / "train", root / "val")
    last = train(stages[0], "all known").last
    assert [("val_clean_accuracy" in row) for row in last["history"]] == [False, True]
    model, photos = TinyNet(), sorted((root / "val").glob("*/clean/*.png"))
    model.load_state_dict(last["model"])
    cosines = F.normalize(embedded(model, photos)) @ F.normalize(last["head"]["weight"]).T
    named = [last["persons"][row.argmax()] for row in cosines]
    right = sum(name == path.parents[1].name for name, path in zip(named, photos, strict=True))
    assert len(photos) == 7 and last["history"][1]["val_clean_accuracy"] == pytest.approx(right / 7)


# --- stage 2 ----------------------------------------------------------------------------------------------------------


def pairs_of_an_epoch(trained: Trained) -> int:
    return sum(len(batch) for batch in trained.run.loader.batch_sampler.batches())


def test_distort_reaches_the_positives_of_stage_2_alone(stages, train, distorted):
    constants = {"CLEAN": 0.0, "DISTORT_MOST": 1, "SKIP_KINDS": ("sunny",)}
    train(stages[1], "never", constants | {"DISTORT": 0.0})
    assert not distorted
    trained = train(stages[1], "always", constants | {"DISTORT": 1.0})
    assert distorted == {"fog": pairs_of_an_epoch(trained)}
    assert (trained.last["distort"], trained.last["skip_kinds"]) == ([0.0, 1.0, 1], ["sunny"])


def test_clean_positives_and_those_distorted_on_the_fly_open_no_distorted_file(stages, train, opened):
    train_dir = stages[1].DATA_DIR / "train"
    for clean, distort in ((1.0, 0.0), (0.0, 1.0), (0.0, 0.0)):
        opened.clear()
        trained = train(stages[1], f"{clean} {distort}", {"CLEAN": clean, "DISTORT": distort})
        folders = Counter(path.parent.name for path in opened if path.is_relative_to(train_dir))
        pairs, anchors = pairs_of_an_epoch(trained), 7  # each anchor is opened once more for the bank
        twice = clean * pairs  # an anchor that is distorted on the fly is opened once
        assert folders == Counter(clean=anchors + pairs + twice, distortion=0 if clean or distort else pairs)
    dataset = trained.run.loader.dataset
    files = [dataset.files(index) for index in range(10 * len(dataset))]
    assert all(positive.stem.startswith(anchor.stem) for anchor, positive in files)  # its own copies, no other photo's


def test_photos_per_person_and_persons_per_batch_make_the_batches_of_stage_2(stages, train, forwards):
    train(stages[1], "stage2", {"PERSONS_PER_BATCH": 4, "PHOTOS_PER_PERSON": 6})
    # 7 clean photos fill one batch of 4 x 3 pairs; faces are those of the distorted photos alone.
    assert [(len(seen.images), seen.part) for seen in forwards] == [(4 * 3, "face"), (4 * 6, "wide")]


WIDE = {"face": 0.8, "wide_size": 76, "wide_weight": 0.5}


@pytest.mark.parametrize("wide_weight, frame", [(0.0, (76, 0.8, None)), (0.5, (95, 1.0, WIDE))])
def test_stage_2_starts_from_stage_1_and_takes_over_its_crop_or_the_frame_around_it(
    stages, train, stage1_best, forwards, wide_weight, frame
):
    before = checkpoints.read_checkpoint(stage1_best)
    start = widened(before["model"]) if wide_weight else before["model"]
    trained = train(stages[1], "stage2", {"BACKBONE_LR": 0.0, "WIDE_LR": 0.0, "WIDE_WEIGHT": wide_weight})
    best, row = trained.best, trained.last["history"][1]
    assert same_weights(trained.last, start)
    assert (best["stage"], best["teacher"]) == (2, "None")
    assert (best["pretrained"], best["holdout"]) == (before["pretrained"], before["holdout"])
    assert (best["dropout"], best["mirror"]) == (stages[1].DROPOUT, stages[1].MIRROR)
    assert (best["image_size"], best["face_crop"], best["crops"]) == frame
    assert ("instance_loss" in row) == bool(wide_weight) and "contrastive_loss" in row
    if not wide_weight:
        assert {(seen.part, *seen.images.shape[1:]) for seen in forwards} == {("face", 3, 76, 76)}
    model, _ = checkpoints.load_facenet(stages[1].RUN_DIR / "best.pt", CPU)
    assert model.mirror and not checkpoints.load_facenet(stage1_best, CPU)[0].mirror
    assert (model.crops and vars(model.crops)) == frame[2]
    assert model.eval()(torch.zeros(2, 3, frame[0], frame[0])).shape == (2, 1024 if wide_weight else 512)


def test_stage_2_refuses_to_start_from_a_checkpoint_of_stage_2(stages, train):
    train(stages[1], "stage2")
    path = stages[1].RUN_DIR / "best.pt"
    with pytest.raises(UserError, match=f"^STAGE1_CHECKPOINT = {path}: of stage 2, expected one of stage 1"):
        train(stages[1], "again", {"STAGE1_CHECKPOINT": path})


@pytest.mark.parametrize("still, moves", [("backbone", "wide"), ("wide", "backbone")])
def test_face_and_frame_learn_at_rates_of_their_own(stages, train, stage1_best, still, moves):
    last = train(stages[1], "stage2", {f"{still.upper()}_LR": 0.0, f"{moves.upper()}_LR": 1e-2}).last
    start = widened(checkpoints.read_checkpoint(stage1_best)["model"])
    learned = {name for name in start if name.endswith("weight") and not torch.equal(last["model"][name], start[name])}
    assert learned and {name.split(".")[0] for name in learned} == {moves}


def test_stage_2_is_never_below_the_network_it_loaded_even_where_training_ruins_it(stages, train, monkeypatch):
    stage1, stage2 = stages
    first = train(stage1, "stage1", {"EPOCHS": 2})
    whole = stage2.train_one_epoch

    def ruinous(run, model, *args):
        whole(run, model, *args)
        for network in (model.backbone, model.wide):
            network[6].weight.data.zero_()  # every photo has the same embedding now, and eve is the nearest of all

    monkeypatch.setattr(stage2, "train_one_epoch", ruinous)
    checkpoint = {"STAGE1_CHECKPOINT": stage1.RUN_DIR / "best.pt"}
    second = train(stage2, "stage2", checkpoint | {"BACKBONE_LR": 1e3, "WIDE_LR": 1e3, "WIDE_WEIGHT": 0.5})
    assert [row["top1_mean"] for row in second.last["history"]] == pytest.approx([1, 4 / 6])  # 4 of 6 queries are eve's
    assert (second.best["epoch"], first.best["top1"]) == (0, 1)
    assert same_weights(second.best, widened(first.best["model"]))
    assert not same_weights(second.last, widened(first.best["model"]))


@pytest.fixture
def banks(monkeypatch, stages) -> list[SimpleNamespace]:
    """Fills up with the banks that stage 2 makes, and the arguments of its contrastive loss: calls."""
    made, losses, forward = [], stages[1].Losses.__init__, stages[1].ContrastiveLoss.forward

    def watched_bank(self, bank, labels):
        made.append(SimpleNamespace(bank=bank, labels=labels, calls=[]))
        losses(self, bank, labels)

    def watched_loss(self, anchor, positive, negative, weight):
        made[-1].calls.append([part.detach() for part in (anchor, positive, negative, weight)])
        return forward(self, anchor=anchor, positive=positive, negative=negative, weight=weight)

    monkeypatch.setattr(stages[1].Losses, "__init__", watched_bank)
    monkeypatch.setattr(stages[1].ContrastiveLoss, "forward", watched_loss)
    return made


@pytest.mark.parametrize(
    "teacher, wide_weight, mirror", [(None, 0.5, True), ("vggface2", 0.5, False), ("vggface2", 0.0, True)]
)
def test_the_bank_is_every_clean_face_as_the_teacher_sees_it(
    stages, train, stage1_best, monkeypatch, banks, teacher, wide_weight, mirror
):
    expected, _ = checkpoints.load_facenet(stage1_best, CPU)
    if teacher:
        expected, sources = TinyNet(), []

        def loaded(source, dropout, mirror, constant):
            sources.append(source)
            network = copy.deepcopy(expected)
            network.mirror = mirror
            return network

        monkeypatch.setattr(stages[1], "FaceNet", loaded)
    constants = {"TEACHER": teacher, "WIDE_WEIGHT": wide_weight, "MIRROR": mirror}
    last = train(stages[1], "stage2", constants | {"BACKBONE_LR": 1e-2, "WIDE_LR": 1e-2}).last
    expected.mirror = mirror
    paths = sorted((stages[1].DATA_DIR / "train").glob("*/clean/*.png"))
    assert len(paths) == 7 and last["persons"] == ["ann", "bob", "cy", "di"]
    (made,) = banks
    torch.testing.assert_close(made.bank, embedded(expected, paths), rtol=0, atol=1e-5)
    assert made.labels.tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert not made.bank.requires_grad
    assert last["teacher"] == str(teacher)
    assert not teacher or sources == ["vggface2"]


def test_stage_2_pulls_to_the_photos_row_of_the_bank_and_pushes_the_nearest_row_of_another_person(stages, train, banks):
    trained = train(stages[1], "stage2", {"BACKBONE_LR": 1e-2, "WIDE_LR": 1e-2})
    (made,), steps = banks, trained.rows("steps.csv")
    assert len(steps) == len(made.calls) == 2
    for (anchor, face, negative, gate), row in zip(made.calls, steps, strict=True):
        assert gate.tolist() == [1.0] * 3
        to_bank = torch.cdist(face, made.bank)
        sources, negatives = (torch.cdist(rows, made.bank).argmin(1) for rows in (anchor, negative))
        assert torch.equal(made.bank[sources], anchor) and torch.equal(made.bank[negatives], negative)
        other = made.labels[sources][:, None] != made.labels[None, :]
        nearest = to_bank.where(other, torch.inf).amin(1)
        assert other.gather(1, negatives[:, None]).all()
        to_anchor, to_negative = (face - anchor).norm(dim=1), (face - negative).norm(dim=1)
        torch.testing.assert_close(to_negative, nearest, rtol=0, atol=1e-4)
        assert float(row["positive_distance"]) == pytest.approx(to_anchor.mean().item(), abs=1e-4)
        assert float(row["negative_distance"]) == pytest.approx(to_negative.mean().item(), abs=1e-4)
        assert float(row["accuracy"]) == pytest.approx((to_anchor < to_negative).float().mean().item())
    row = trained.last["history"][1]
    terms = (("CONTRASTIVE_WEIGHT", "contrastive_loss"), ("INSTANCE_WEIGHT", "instance_loss"))
    loss = sum(getattr(stages[1], weight) * row[name] for weight, name in terms)
    assert row["loss"] == pytest.approx(loss, rel=1e-4)


def test_faces_that_do_not_show_are_out_of_the_loss_on_faces_and_stay_in_that_on_frames(stages, train, banks):
    for path in (stages[1].DATA_DIR / "train").glob("*/distortion/*.png"):
        Image.new("RGB", (40, 40), "white").save(path)
    row = train(stages[1], "stage2", {"CLEAN": 0.0, "DISTORT": 0.0}).last["history"][1]
    assert [gate.tolist() for *_, gate in banks[0].calls] == [[0.0] * 3] * 2
    assert (row["contrastive_loss"], row["positive_distance"]) == (0, 0)
    assert row["instance_loss"] > 0 and row["skipped"] == 0
    assert row["loss"] == pytest.approx(stages[1].INSTANCE_WEIGHT * row["instance_loss"])


@pytest.mark.parametrize("margin, active", [(1e-6, 0), (2.0, 1)])
def test_active_negatives_are_those_within_the_margin(stages, train, margin, active):
    assert train(stages[1], "run", {"CONTRASTIVE_MARGIN": margin}).last["history"][1]["active_negatives"] == active


# --- data that is not as it should be ---------------------------------------------------------------------------------


def test_persons_and_images_that_lie_twice_are_warned_of_in_both_stages(stages, train, caplog):
    root = stages[0].DATA_DIR
    for script in stages:
        train(script, f"{script.__name__}_clean")
    assert "more than one person" not in caplog.text and "train persons too" not in caplog.text
    shutil.copytree(root / "train" / "ann", root / "val" / "ann")
    double = root / "train" / "bob" / "clean" / "bob_0007.png"
    shutil.copy(root / "train" / "cy" / "clean" / "cy_0002.png", double)
    for script in stages:
        caplog.clear()
        common.warn_once.cache_clear()
        train(script, script.__name__)
        assert "1 of 3 val persons are train persons too" in caplog.text and "(ann)" in caplog.text
        assert "1 images lie under more than one person" in caplog.text
        assert str(double) in caplog.text and "cy_0002.png" in caplog.text and "cy_0001.png" not in caplog.text


def test_a_corrupt_photo_is_listed_and_the_run_goes_on_as_if_it_were_absent(stages, train, caplog):
    without = train(stages[0], "without")
    bad = stages[0].DATA_DIR / "train" / "bob" / "clean" / "bob_0009.png"
    bad.write_bytes((stages[0].DATA_DIR / "train" / "bob" / "clean" / "bob_0001.png").read_bytes()[:500])
    assert train(stages[0], "with").state() == without.state()
    assert "1 unreadable images, left out" in caplog.text and str(bad) in caplog.text


def test_a_person_without_a_clean_photo_is_warned_of_and_both_stages_go_on(stages, train, caplog):
    folder = stages[0].DATA_DIR / "train" / "gus" / "distortion"
    write_photo(folder / "gus_0001_blurred.png", (90, 90, 90), seed=1)
    first = train(stages[0], "stage1")
    second = train(stages[1], "stage2", {"STAGE1_CHECKPOINT": stages[0].RUN_DIR / "best.pt"})
    assert "1 persons without a clean photo" in caplog.text and "(gus)" in caplog.text
    assert first.last["persons"] == second.last["persons"] == ["ann", "bob", "cy", "di", "gus"]


def test_both_folder_layouts_give_the_same_run(stages, train):
    clean = [train(script, f"clean_{script.__name__}").state() for script in stages]
    for folder in list(stages[0].DATA_DIR.glob("*/*/clean")):
        for photo in folder.iterdir():
            photo.rename(folder.parent / photo.name)
        folder.rmdir()
    flat = [train(script, f"flat_{script.__name__}").state() for script in stages]
    for ours, theirs in zip(flat, clean, strict=True):
        assert {name for name in theirs if ours[name] != theirs[name]} <= {"data"}
