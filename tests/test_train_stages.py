"""Both training scripts, whole runs on a few photos: resuming, what is written, shared constants, bad data."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, files_in, same_tensors, widened, write_photo
from tiny_net import TinyNet
from torch import nn

import checkpoints
import common
import datasets
import degradations
import models
import optimisation
import training
from common import UserError
from constants import DOES_NOT_MATTER, MAY_CHANGE, MUST_EQUAL, PLAIN, plain_constants

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


def another(value):
    """A value of a constant's type, and within its range, that is not `value`."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 2
    if isinstance(value, float):
        return value / 2 or 0.25
    return (*value, "foggy") if isinstance(value, tuple) else {"mean": "best"}.get(value, "mixed_6a")


def capitals(script) -> dict:
    return {name: value for name, value in vars(script).items() if name.isupper() and isinstance(value, PLAIN)}


def test_each_constant_of_both_scripts_is_in_exactly_one_list(stages):
    lists = [*MUST_EQUAL, *MAY_CHANGE, *DOES_NOT_MATTER]
    assert len(lists) == len({*lists})
    assert {name for script in stages for name in capitals(script)} == {*lists}


def test_a_constant_given_as_a_list_or_a_set_is_stated_like_a_tuple():
    stated = [
        plain_constants({"OFTEN": kinds}) for kinds in (("foggy", "sunny"), ["foggy", "sunny"], {"sunny", "foggy"})
    ]
    assert stated == [{"OFTEN": ["foggy", "sunny"]}] * 3


@pytest.mark.parametrize("stage", [1, 2])
def test_resume_with_other_constants_or_data_is_refused_and_changes_nothing(stages, train, stage):
    script = stages[stage - 1]
    train(script, "run")
    before = files_in(script.RUN_DIR)

    def refused(constants: dict, change: str) -> None:
        with pytest.raises(UserError, match=f"run/last.pt: cannot be resumed, {change}; set it back, or give RUN_DIR"):
            train(script, "run", constants | {"RESUME": True})

    for name in MUST_EQUAL:
        if name in capitals(script):
            then, now = (
                plain_constants({name: value})[name] for value in (vars(script)[name], another(vars(script)[name]))
            )
            refused({name: another(vars(script)[name])}, re.escape(f"{name} has changed ({then!r} then, {now!r} now)"))
    photo = next((script.DATA_DIR / "train").glob("*/distortion/*.png"))
    photo.rename(photo.with_name(f"other_{photo.name}"))
    refused({}, r"data has changed \(21 files, \w{12} then, 21 files, \w{12} now\)")
    photo.with_name(f"other_{photo.name}").rename(photo)
    of_val = next((script.DATA_DIR / "val").glob("*/clean/*.png"))
    of_val.write_bytes(of_val.read_bytes() + b"more")  # another photo under its name
    refused({}, r"val has changed \(\d+ files, \w{12} then, \d+ files, \w{12} now\)")
    (script.DATA_DIR / "train" / "di").rename(script.DATA_DIR / "train" / "dora")
    refused({}, r"(persons|data) has changed \(.*\)")
    assert files_in(script.RUN_DIR) == before


@pytest.mark.parametrize("stage", [1, 2])
def test_constants_that_may_change_are_reported_in_a_line_and_true_from_then_on(stages, train, capsys, stage):
    script = stages[stage - 1]
    train(script, "run")
    usual = capitals(script)
    new = {name: another(usual[name]) for name in MAY_CHANGE if name in usual} | {"EPOCHS": 2, "AMP": "bf16"}
    then = usual | {"EPOCHS": 1}
    capsys.readouterr()
    trained = train(script, "run", new | {"RESUME": True, "NUM_WORKERS": 1})
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed from here on: ")]
    changes = line.removeprefix("changed from here on: ").split(", ")
    assert sorted(changes) == sorted(f"{name} {then[name]!r} -> {value!r}" for name, value in new.items())
    noted = json.loads((script.RUN_DIR / "constants.json").read_text())
    assert noted["NUM_WORKERS"] == 1  # what does not matter is true, too
    for constants in (noted, trained.last["constants"]):
        assert {name: constants[name] for name in new} == new
    groups = trained.last["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {new["WEIGHT_DECAY"]}
    assert trained.run.settings.grad_clip == new["GRAD_CLIP"]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_of_a_version_without_a_constant_that_must_be_equal_is_not_resumed(stages, train, stage):
    script = stages[stage - 1]
    path = train(script, "run").run.run_dir / "last.pt"
    saved = torch.load(path, weights_only=True)
    del saved["constants"]["FREEZE_UNTIL"]
    torch.save(saved, path)
    with pytest.raises(UserError, match="cannot be resumed, it is of a version of these scripts without FREEZE_UNTIL"):
        train(script, "run", {"RESUME": True, "EPOCHS": 2})


def test_a_damaged_stage1_in_last_pt_is_a_sentence(stages, train):
    path = train(stages[1], "run").run.run_dir / "last.pt"
    saved = torch.load(path, weights_only=True)
    texts, nothing = ({**saved["stage1"], "face_crop": odd} for odd in ("0.8", 0))
    for odd in ("text", {}, {"image_size": 76}, texts, nothing):
        torch.save(saved | {"stage1": odd}, path)
        with pytest.raises(UserError, match=r"last\.pt: damaged, its stage1 is "):
            train(stages[1], "run", {"RESUME": True, "EPOCHS": 2, "TEACHER": "seed"})


def test_resume_without_a_run_and_a_start_over_one_are_refused(stages, train):
    message = f"{stages[0].RUN_DIR.parent / 'run' / 'last.pt'}: no checkpoint to resume; set RESUME = False"
    with pytest.raises(UserError, match=message):
        train(stages[0], "run", {"RESUME": True})
    train(stages[0], "run")
    with pytest.raises(UserError, match="set RESUME = True to go on with it"):
        train(stages[0], "run")


@pytest.fixture
def weights_at(stages, monkeypatch) -> list:
    """PRETRAINED and TEACHER are then the path of a file that holds a seed; fills up with what is loaded."""
    loaded = []

    def load(source, *args, constant=None, **options):
        loaded.append(source)
        if source is not None and not Path(source).exists():
            raise UserError(f"{source}: no such file")
        torch.manual_seed(int(Path(source).read_text()) if source is not None else 99)
        return TinyNet(None, *args, **options)

    for script in stages:
        monkeypatch.setattr(script, "FaceNet", load)
    return loaded


@pytest.mark.parametrize("stage, constant", [(1, "PRETRAINED"), (2, "TEACHER")])
def test_weights_are_known_by_what_they_are_and_not_read_where_a_resumed_run_has_its_own(
    stages, train, weights_at, tmp_path, stage, constant
):
    script, first, moved = stages[stage - 1], tmp_path / "first", tmp_path / "moved"
    first.write_text("1")
    stage1_best = tmp_path / "stage1.pt"
    shutil.copy(stages[1].STAGE1_CHECKPOINT, stage1_best)
    usual = {constant: first, "RESUME": False} | ({"STAGE1_CHECKPOINT": stage1_best} if stage == 2 else {})
    train(script, "run", usual)
    stage1_best.unlink()  # its weights are in last.pt

    def resume(epochs: int, **constants):
        return train(script, "run", usual | {"RESUME": True, "EPOCHS": epochs} | constants)

    shutil.copy(first, moved)
    assert resume(2, **{constant: moved}).last[constant.lower()] == str(moved)
    moved.write_text("2")
    change = rf"{constant.lower()}_weights has changed \(\w{{16}} then, \w{{16}} now\)"
    if stage == 2:  # the bank is embedded again: the same path is no excuse
        with pytest.raises(UserError, match=change):
            resume(3, **{constant: moved})
        return
    with pytest.raises(UserError, match=change):
        moved.rename(tmp_path / "other")
        resume(3, **{constant: tmp_path / "other"})
    weights_at.clear()
    resume(3, **{constant: moved})  # as it was, and the file is gone
    assert weights_at == [None]


# --- what a run writes ------------------------------------------------------------------------------------------------


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
    assert (saved["epoch"], saved["top1"], saved["constants"]["EMA_DECAY"]) == (2, given[-1], 0.9)
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
        (
            1,
            {"BATCH_SIZE": 22},
            "BATCH_SIZE = 22: train/ has 21 photos of 4 persons; set BATCH_SIZE to at most 21, and PERSONS_PER_BATCH "
            "of train_stage2.py to at most 4",
        ),
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


def test_on_a_gpu_the_passes_recorded_are_those_that_training_runs(stages, train, monkeypatch):
    monkeypatch.setattr(optimisation, "recordable", lambda device, accumulate: True)
    for script in stages:
        recorded, passed = {}, {}

        def note(module, inputs, passed=passed):
            if module.training:
                passed.setdefault(module, inputs[0].shape)

        def record(network, shape, device, amp, recorded=recorded, note=note):
            recorded[network] = shape
            network.register_forward_pre_hook(note)

        monkeypatch.setattr(optimisation, "record", record)
        train(script, script.__name__, {"COMPILE": "auto"})
        assert recorded and passed == recorded


def test_another_word_for_compile_is_refused(stages, monkeypatch):
    for script in stages:
        monkeypatch.setattr(script, "COMPILE", "yes")
        with pytest.raises(UserError, match=r"^COMPILE = 'yes': expected 'auto', True or False$"):
            script.main()


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


# --- data that cannot be used ---


def lose_clean(root: Path) -> None:
    for folder in (root / "val").glob("*/clean"):
        shutil.rmtree(folder)


def keep_one(root: Path) -> None:
    for name in ("bob", "cy", "di"):
        shutil.rmtree(root / "train" / name)


@pytest.mark.parametrize(
    "spoil, messages",
    [
        (lose_clean, ["val: "] * 2),
        (keep_one, ["1 person to train on .ann., expected two or more"] * 2),
    ],
)
def test_data_that_cannot_be_used_is_refused_before_any_photo_is_embedded(stages, train, opened, spoil, messages):
    spoil(stages[0].DATA_DIR)
    for script, message in zip(stages, messages, strict=True):
        with pytest.raises(UserError, match=message):
            train(script, "run", {"BATCH_SIZE": 2} if script is stages[0] else {})
    assert opened == []


def test_val_needs_clean_photos_only_and_they_are_degraded_by_the_families_left_out_or_by_all(
    stages, train, monkeypatch
):
    seen = []
    monkeypatch.setattr(
        degradations.FixedDegradation,
        "__call__",
        lambda self, image: seen.append((image.info["path"].name, set(self.degradation.families))) or image,
    )
    val = stages[0].DATA_DIR / "val"
    for folder in val.glob("*/distortion"):
        shutil.rmtree(folder)
    for script in stages:
        for left_out in ((), ("glare", "blur")):
            train(script, f"{script.__name__}_{len(left_out)}", {"WITHOUT_FAMILIES": left_out})
            families = set(left_out) or set(degradations.FAMILIES)
            # In four ways, of two epochs and the calibration.
            assert seen == 3 * 4 * [(path.name, families) for path in sorted(val.glob("*/clean/*"))]
            seen.clear()


@pytest.mark.parametrize("photos, drop, warned", [(1, 2.0, True), (1, 100.0, False), (2, 2.0, False)])
def test_a_limit_of_forgetting_that_nobody_in_val_can_show_is_warned_of_once(
    stages, train, caplog, photos, drop, warned
):
    if photos == 1:
        for path in (stages[0].DATA_DIR / "val" / "eve").glob("*/eve_0002*"):
            path.unlink()
    train(stages[0], "run", {"EPOCHS": 2, "MAX_CLEAN_DROP": drop})
    assert caplog.text.count(f"MAX_CLEAN_DROP = {drop} has no effect, as no person has two clean") == warned


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


def test_both_stages_train_a_resnet50_and_the_checkpoint_says_so(stages, train, monkeypatch, tmp_path):
    stage1, stage2 = stages
    for script in stages:
        monkeypatch.setattr(script, "FaceNet", models.FaceNet)
    monkeypatch.setattr(checkpoints, "FaceNet", models.FaceNet)
    small = {"DATA_DIR": stage1.DATA_DIR, "QUICK_VALIDATION": True, "SAVE_EVERY": 0}
    best = train(stage1, "one", small | {"BACKBONE": "resnet50", "PRETRAINED": None, "BATCH_SIZE": 7}).best
    assert best["backbone"] == "resnet50"
    teacher = tmp_path / "facenet.pt"  # of another backbone
    torch.save(models.FaceNet(None, dropout=0.0).backbone.state_dict(), teacher)
    constants = {"STAGE1_CHECKPOINT": stage1.RUN_DIR / "best.pt", "TEACHER": teacher, "PERSONS_PER_BATCH": 4}
    train(stage2, "two", small | constants | {"WIDE_WEIGHT": 0})
    model, saved = checkpoints.load_facenet(stage2.RUN_DIR / "best.pt", CPU)
    assert type(model.backbone).__name__ == "ResNet50" and saved["stage1"]["backbone"] == "resnet50"
