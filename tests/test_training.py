import copy
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import KINDS, MakesFolderWhenLoaded, TinyNet, same_tensors, write_photo
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import checkpoints
import common
import datasets
import gallery
import journal
import optimisation
import samplers
import training
import transforms
from common import UserError

REPO = Path(__file__).parents[1]
CPU = torch.device("cpu")
FACTS = {"stage": 1, "seed": 0, "image_size": 160, "face_crop": 0.52, "dropout": 0.4}
FACTS |= {"persons": ["ann", "bob"], "holdout": [], "selected_on": "val"}


def linear(*weights: float) -> nn.Linear:
    """One output, no bias: weights . x"""
    layer = nn.Linear(len(weights), 1, bias=False)
    layer.weight.data = torch.tensor([weights])
    return layer


class Rows(TensorDataset):
    """`rows` (N, W) as one-line images (1, 1, W), with the rest of what a run asks of its dataset."""

    def __init__(self, rows):
        super().__init__(torch.tensor(rows)[:, None, None])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def files(self, index: int) -> list[Path]:
        return [Path(f"row{index}.png")]


def small_run(run_dir: Path, *models: nn.Linear, rows, seed: int = 0, **options) -> training.Run:
    """A run over `rows`, two in each batch, by SGD at a learning rate of 1 without warm-up; one group per model."""
    dataset, settings = Rows(rows), training.RunSettings(**{"epochs": 1} | options)
    loader = training.train_loader(dataset, samplers.ShuffledBatches([0] * len(dataset), 2, seed), 0, CPU)
    groups = [{"name": f"part{i}", "params": model.parameters()} for i, model in enumerate(models)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scheduler = optimisation.warmup_cosine(optimizer, 0, settings.epochs * len(loader))
    networks = {"model": models[0]} | {f"part{i}": model for i, model in enumerate(models) if i}
    return training.Run(
        run_dir, FACTS | {"seed": seed}, networks, optimizer, scheduler, loader, device=CPU, settings=settings
    )


def python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run `code` as a script `folder`/script.py that can import the repo's modules."""
    (folder / "script.py").write_text(code)
    return subprocess.run(
        [sys.executable, "script.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPO)} | environment,
        capture_output=True,
        text=True,
    )


# --- run --------------------------------------------------------------------------------------------------------------


def raising(error: BaseException):
    def main():
        raise error

    return main


def test_a_users_mistake_ends_the_script_with_its_sentence_and_no_traceback(tmp_path):
    code = (
        "import common\ndef main():\n    raise common.UserError('BATCH_SIZE = 1: too few')\ncommon.run_script(main)\n"
    )
    done = python(code, tmp_path, TRACEBACK="")
    assert done.returncode == 1
    assert done.stderr == "error: BATCH_SIZE = 1: too few\n(TRACEBACK=1 python script.py shows where)\n"
    assert done.stdout == ""


def test_a_users_mistake_becomes_a_sentence(monkeypatch):
    monkeypatch.delenv("TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as end:
        common.run_script(raising(UserError("the place: what to do")))
    assert end.value.code.startswith("error: the place: what to do\n")  # a string: to stderr, exit status 1


def test_traceback_1_keeps_the_traceback(monkeypatch):
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(UserError, match="the place"):
        common.run_script(raising(UserError("the place")))


@pytest.mark.parametrize(
    "kind", [KeyError, TypeError, AssertionError, RuntimeError, ValueError, OSError, FloatingPointError]
)
def test_our_own_mistakes_keep_their_traceback(monkeypatch, kind):
    monkeypatch.delenv("TRACEBACK", raising=False)
    with pytest.raises(kind, match="bug"):
        common.run_script(raising(kind("bug")))


def test_an_interrupted_script_tells_how_to_go_on_if_it_can(monkeypatch):
    with pytest.raises(SystemExit) as end:
        common.run_script(raising(KeyboardInterrupt()))
    assert end.value.code == "\ninterrupted"
    monkeypatch.setitem(globals(), "RESUME", False)  # as a training script has it
    with pytest.raises(SystemExit) as end:
        common.run_script(raising(KeyboardInterrupt()))
    assert end.value.code == "\ninterrupted; RESUME = True goes on from the last checkpoint, if there is one"


def test_an_interrupted_run_that_could_still_save_tells_where_it_stopped():
    with pytest.raises(SystemExit) as end:
        common.run_script(raising(KeyboardInterrupt("stopped after batch 3")))
    assert end.value.code == "\nstopped after batch 3"


# --- device, seeds, data ----------------------------------------------------------------------------------------------


def random_numbers(run_dir: Path, seed: int, epoch: int, disturbed: bool = False) -> list[tuple[float, ...]]:
    """What a model could draw, as dropout does, in each of the two steps of an epoch."""
    model = linear(0.0)
    run = small_run(run_dir, model, rows=[[1.0]] * 4, seed=seed, epochs=epoch)
    run.epoch, draws = epoch - 1, []
    assert next(run.epochs()) == epoch
    for (images,) in run.steps():
        draws.append(tuple(torch.rand(4).tolist()))
        if disturbed:
            torch.rand(100)
        run.step(model(images).mean())
    assert len(draws) == 2
    return draws


def test_no_two_seeds_epochs_or_steps_share_a_stream(tmp_path):
    streams = set()
    for seed, epoch in [(0, 1), (0, 2), (0, 999), (1, 1), (1, 2), (1, 999), (2, 1)]:
        streams.update(random_numbers(tmp_path, seed, epoch))
    assert len(streams) == 14


def test_an_epoch_draws_the_same_again_whatever_was_drawn_before(tmp_path):
    first = random_numbers(tmp_path, 3, 5)
    torch.rand(17)
    assert random_numbers(tmp_path, 3, 5, disturbed=True) == first


def test_the_largest_seed_and_epoch_can_be_set(tmp_path):
    random_numbers(tmp_path, 2**32, 999)


def loader_of(items: int, batch_size: int, num_workers: int = 0) -> tuple[DataLoader, samplers.ShuffledBatches]:
    """A loader of the numbers 0..items-1, and its batches."""
    batches = samplers.ShuffledBatches([0] * items, batch_size, seed=0)
    return training.train_loader(TensorDataset(torch.arange(items)), batches, num_workers, CPU), batches


def test_the_train_loader_gives_shuffled_batches_of_all_items_without_repeats():
    loader, epoch = loader_of(50, 8)
    batches = [batch.tolist() for (batch,) in loader]
    assert len(loader) == len(batches) == 7
    assert sorted(map(len, batches)) == [7] * 6 + [8]  # none much smaller than the others
    seen = [index for batch in batches for index in batch]
    assert sorted(seen) == list(range(50)) and seen != sorted(seen)
    epoch.set_epoch(2)
    assert [batch.tolist() for (batch,) in loader] != batches


def test_a_batch_of_the_whole_dataset_is_possible_and_a_larger_one_an_error():
    assert len(loader_of(4, 4)[0]) == 1
    with pytest.raises(ValueError, match="BATCH_SIZE = 5: more than the 4 items of an epoch; lower it"):
        loader_of(4, 5)


def test_an_epoch_draws_the_same_batches_whether_or_not_one_went_before_and_for_any_workers():
    """A loader draws a base seed for its workers: once if it keeps them, else in each epoch."""

    def second_epoch(num_workers: int, first: bool) -> list:
        loader, drawn = loader_of(12, 4, num_workers)
        torch.manual_seed(0)
        for epoch in (1, 2) if first else (2,):
            drawn.set_epoch(epoch)
            batches = [batch.tolist() for (batch,) in loader]
        return [*batches, torch.rand(1).item()]  # dropout draws from the common stream

    expected = second_epoch(0, first=True)
    assert second_epoch(0, first=False) == expected
    assert second_epoch(1, first=False) == expected
    assert second_epoch(1, first=True) == expected


def product_type(amp: str | None) -> torch.dtype:
    with optimisation.autocast(CPU, amp):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


@pytest.mark.parametrize("amp", ["auto", None])
def test_mixed_precision_is_off_on_the_cpu(tmp_path, amp):
    assert optimisation.precision(CPU, amp) is None
    assert product_type(amp) == torch.float32
    assert not small_run(tmp_path, linear(0.0), rows=[[1.0]] * 2, amp=amp).learner.scaler.is_enabled()


def test_bfloat16_can_be_asked_for_on_the_cpu_and_needs_no_scaler(tmp_path):
    assert optimisation.precision(CPU, "bf16") == product_type("bf16") == torch.bfloat16
    assert not small_run(tmp_path, linear(0.0), rows=[[1.0]] * 2, amp="bf16").learner.scaler.is_enabled()


@pytest.mark.parametrize("ask", [optimisation.precision, optimisation.autocast])
def test_a_precision_that_the_device_lacks_is_told(ask):
    with pytest.raises(ValueError, match=r"^AMP = 'fp16': float16 is for GPUs; 'bf16' or None works on the CPU"):
        ask(CPU, "fp16")
    for amp in (True, False, "float16", ""):
        with pytest.raises(ValueError, match=f"^AMP = {amp!r}: expected 'auto', 'bf16', 'fp16' or None"):
            ask(CPU, amp)


# a GPU without bfloat16 is one from before Ampere
@pytest.mark.parametrize("has_bfloat16, automatic", [(True, torch.bfloat16), (False, torch.float16)])
def test_mixed_precision_on_a_gpu_is_what_it_can_and_what_was_asked_for(monkeypatch, has_bfloat16, automatic):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bfloat16)
    gpu = torch.device("cuda", 0)
    asked = [optimisation.precision(gpu, amp) for amp in ("auto", "bf16", "fp16", None)]
    assert asked == [automatic, torch.bfloat16, torch.float16, None]


# --- optimisation -----------------------------------------------------------------------------------------------------


def learning_rates(warmup_steps: int, total_steps: int) -> list[float]:
    """What each step of a run would use, at a base rate of 1, and what would come after it."""
    optimizer = torch.optim.SGD(linear(0.0).parameters(), lr=1.0)
    scheduler = optimisation.warmup_cosine(optimizer, warmup_steps, total_steps)
    rates = []
    for _ in range(total_steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    "warmup_steps, total_steps, expected",
    [
        (3, 7, [0.25, 0.5, 0.75, 1.0, 0.853553, 0.5, 0.146447, 0.0]),
        (0, 4, [1.0, 0.853553, 0.5, 0.146447, 0.0]),
        (50, 4, [1 / 3, 2 / 3, 1.0, 0.5, 0.0]),  # shorter than the warm-up: half of it rises
        (50, 2, [0.5, 1.0, 0.0]),
        (50, 1, [1.0, 0.0]),
    ],
)
def test_the_learning_rate_rises_linearly_and_falls_along_half_a_cosine(warmup_steps, total_steps, expected):
    assert learning_rates(warmup_steps, total_steps) == pytest.approx(expected, abs=1e-6)


def test_the_learning_rate_stays_at_zero_after_the_end():
    optimizer = torch.optim.SGD(linear(0.0).parameters(), lr=1.0)
    scheduler = optimisation.warmup_cosine(optimizer, 0, 2)
    optimizer.step()
    for _ in range(5):
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0


def gradient_norms(run: training.Run, loss) -> list[float]:
    """Train an epoch on `loss` of the images; the norms that each step has logged."""
    next(run.epochs())
    for (images,) in run.steps():
        run.step(loss(images))
    run.journal.flush()
    return [float(row["gradient_norm"]) for row in run.journal.steps()]


@pytest.mark.parametrize("grad_clip, change", [(1.0, (0.6, 0.8)), (10.0, (3.0, 4.0))])
def test_a_step_clips_the_gradient_to_its_norm_and_logs_the_norm_before(tmp_path, grad_clip, change):
    model = linear(1.0, 1.0)
    run = small_run(tmp_path, model, rows=[[3.0, 4.0]] * 4, grad_clip=grad_clip)
    norms = gradient_norms(run, lambda images: model(images).mean())
    assert norms == pytest.approx([5, 5])  # the first step's gradient has not added up
    rate = 1 + 0.5  # of both steps: the schedule moves on
    assert model.weight[0].tolist() == pytest.approx([1 - rate * change[0], 1 - rate * change[1]], abs=1e-5)
    assert run.learner.optimizer.param_groups[0]["lr"] == pytest.approx(0)


def test_a_step_clips_over_all_parameter_groups_together(tmp_path):
    a, b = linear(0.0), linear(0.0)
    run = small_run(tmp_path, a, b, rows=[[1.0]] * 2, grad_clip=1.0)
    assert gradient_norms(run, lambda images: 3 * a(images).mean() + 4 * b(images).mean()) == pytest.approx([5])
    assert [a.weight.item(), b.weight.item()] == pytest.approx([-0.6, -0.8], abs=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_never_finite_stops_before_any_weight_changes(tmp_path, value):
    model = linear(1.0, 1.0)
    run = small_run(tmp_path, model, rows=[[value, 0.0]] * 8)
    with pytest.raises(UserError, match=rf"batch 3: the loss is {value}, .*checkpoint is kept.*lower the lear"):
        gradient_norms(run, lambda images: model(images).mean())
    assert model.weight.tolist() == [[1.0, 1.0]]


def test_frozen_batchnorm_keeps_its_statistics_while_the_rest_trains():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.BatchNorm1d(2)).train()
    optimisation.freeze_batchnorm(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(5 + torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))
    assert same_tensors(model.state_dict(), before)
    assert model[1].training and model[0].weight.requires_grad


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_into_folders_that_are_made_on_the_way(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    with checkpoints.atomic_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_while_writing_keeps_the_old_file_and_leaves_no_other(tmp_path, error):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), checkpoints.atomic_file(path) as file:
        file.write(b"half of the new")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_rows_are_written_under_the_keys_of_all_of_them(tmp_path):
    path = tmp_path / "log.csv"
    checkpoints.write_csv(path, [{"epoch": 0, "top1": 0.5}, {"epoch": 1, "loss": 2.5, "top1": 1.0}, {"note": "ä, b"}])
    assert path.read_bytes().decode() == 'epoch,top1,loss,note\n0,0.5,,\n1,1.0,2.5,\n,,,"ä, b"\n'


def test_a_run_notes_its_constants(tmp_path):
    constants = {"EPOCHS": 4, "DATA_DIR": Path("Task_B"), "RESUME": False, "AMP": "auto", "PRETRAINED": None}
    constants |= {"SKIP_KINDS": ("sunny",), "F": math, "main": 3}
    training.start_run(tmp_path / "runs" / "new", False, constants)
    noted = json.loads((tmp_path / "runs" / "new" / "constants.json").read_text())
    expected = {"EPOCHS": 4, "DATA_DIR": "Task_B", "RESUME": False, "AMP": "auto", "PRETRAINED": None}
    assert noted == expected | {"SKIP_KINDS": ["sunny"]}


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_an_earlier_run_is_not_overwritten(tmp_path, name):
    (tmp_path / name).write_bytes(b"weights")
    (tmp_path / "constants.json").write_text("of the earlier run")
    with pytest.raises(UserError, match="set RESUME = True to go on with it, or give RUN_DIR another name") as e:
        training.start_run(tmp_path, False, {"EPOCHS": 4})
    assert str(tmp_path) in str(e.value)
    assert (tmp_path / "constants.json").read_text() == "of the earlier run"
    training.start_run(tmp_path, True, {"EPOCHS": 4})


@pytest.mark.parametrize(
    "name, value",
    [
        ("SEED", -1),
        ("SEED", 2**32 + 1),
        ("EPOCHS", 0),
        ("EPOCHS", 1000),
        ("BATCH_SIZE", 1),
        ("PERSONS_PER_BATCH", 1),
        ("PHOTOS_PER_PERSON", 1),
        ("ACCUMULATE", 0),
        ("NUM_WORKERS", -1),
        ("SAVE_EVERY", -1),
        ("PATIENCE", -1),
        ("BACKBONE_LR", -1e-9),
        ("BACKBONE_LR", math.nan),
        ("HEAD_LR", -1.0),
        ("WIDE_LR", -1.0),
        ("WEIGHT_DECAY", -0.1),
        ("WARMUP_STEPS", -1),
        ("GRAD_CLIP", 0.0),
        ("EMA_DECAY", -0.1),
        ("EMA_DECAY", 1.0),
        ("BALANCE", -0.1),
        ("BALANCE", 1.1),
    ],
)
def test_a_constant_out_of_range_is_named_before_anything_is_written(tmp_path, name, value):
    kind, low, high = common.RANGES[name]
    article = {int: "a whole number", float: "a number"}[kind]
    with pytest.raises(ValueError) as error:
        training.start_run(tmp_path / "run", False, {name: value})
    assert str(error.value) == f"{name} = {value}: expected {article}, {low}..{high}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("EPOCHS", 4.0, "a whole number, 1..999"),
        ("EPOCHS", True, "a whole number, 1..999"),
        ("EPOCHS", None, "a whole number, 1..999"),
        ("BATCH_SIZE", "32", "a whole number, 2..inf"),
        ("NUM_WORKERS", 0.5, "a whole number, 0..inf"),
        ("WIDE_LR", "3e-5", "a number, 0..inf"),
        ("GRAD_CLIP", None, "a number, 1e-12..inf"),
        ("BALANCE", False, "a number, 0..1"),
    ],
)
def test_a_constant_of_another_type_is_named_before_anything_is_written(tmp_path, name, value, expected):
    with pytest.raises(ValueError) as error:
        training.start_run(tmp_path / "run", False, {name: value})
    assert str(error.value) == f"{name} = {value!r}: expected {expected}"
    assert not (tmp_path / "run").exists()


def test_the_ends_of_the_ranges_are_allowed(tmp_path):
    least = {"SEED": 0, "EPOCHS": 1, "BATCH_SIZE": 2, "PERSONS_PER_BATCH": 2, "PHOTOS_PER_PERSON": 2, "ACCUMULATE": 1}
    least |= {"NUM_WORKERS": 0, "SAVE_EVERY": 0, "PATIENCE": 0, "WARMUP_STEPS": 0, "WEIGHT_DECAY": 0, "HEAD_LR": 0}
    training.start_run(tmp_path / "least", False, least | {"EMA_DECAY": 0, "BALANCE": 0, "GRAD_CLIP": 1e-12})
    most = {"SEED": 2**32, "EPOCHS": 999, "EMA_DECAY": 0.999999, "BALANCE": 1, "GRAD_CLIP": math.inf}
    training.start_run(tmp_path / "most", False, most)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save(path: Path, weight: float = 1.0) -> Path:
    checkpoints.save_checkpoint(path, FACTS | {"epoch": 1}, {"model": linear(weight)})
    return path


def test_a_checkpoint_gives_back_facts_and_weights(tmp_path):
    saved = checkpoints.read_checkpoint(save(tmp_path / "best.pt", weight=0.25))
    assert {name: saved[name] for name in FACTS} == FACTS
    model = linear(0.0)
    checkpoints.restore(tmp_path / "best.pt", saved, {"model": model})
    assert model.weight.item() == 0.25


def test_a_process_killed_while_saving_leaves_the_previous_checkpoint(tmp_path):
    """Killed with half of the new file on disk, by the one signal that no process can clean up after."""
    path = save(tmp_path / "last.pt", weight=1.0)
    before = path.read_bytes()
    code = f"""
import io, os, pathlib, signal, torch, checkpoints
whole_save = torch.save
def half_save(content, file):
    buffer = io.BytesIO()
    whole_save(content, buffer)
    file.write(buffer.getvalue()[:len(buffer.getvalue()) // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = half_save
checkpoints.save_checkpoint(pathlib.Path({str(path)!r}), {FACTS | {"epoch": 1}!r}, {{"model": torch.nn.Linear(1000, 1)}})
"""
    done = python(code, tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "last.pt.tmp").stat().st_size > 1000  # it was in the middle of it
    assert path.read_bytes() == before
    assert checkpoints.read_checkpoint(path)["model"]["weight"].item() == 1.0
    save(path, weight=2.0)  # what was left behind does not stand in the way
    assert checkpoints.read_checkpoint(path)["model"]["weight"].item() == 2.0
    assert not (tmp_path / "last.pt.tmp").exists()


def test_no_checkpoint_at_the_path_is_told_with_the_way_out(tmp_path):
    with pytest.raises(UserError, match="no checkpoint; run the stage that writes it, or correct the path") as e:
        checkpoints.read_checkpoint(tmp_path / "best.pt")
    assert str(e.value).startswith(f"{tmp_path / 'best.pt'}: ")


def refused(path: Path, content: bytes) -> str:
    """The sentence with which read_checkpoint refuses a file of `content`."""
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        checkpoints.read_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999])
def test_a_truncated_checkpoint_is_told_with_the_way_out(tmp_path, share):
    whole = save(tmp_path / "best.pt").read_bytes()
    told = refused(tmp_path / "best.pt", whole[: int(share * len(whole))])
    assert "damaged, or not a checkpoint (" in told and "run the stage that writes it again" in told


@pytest.mark.parametrize("content", [b"\x80", b".", b"r\xea", b"garbage", b"<html>404</html>", b"\xff\xd8\xff" * 40])
def test_a_file_of_other_bytes_is_told_with_the_way_out(tmp_path, content):
    told = refused(tmp_path / "best.pt", content)
    assert "damaged, or not a checkpoint (" in told and "run the stage that writes it again" in told


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_any_random_bytes_are_told_and_never_a_traceback(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        size = int(torch.randint(1, 40, (), generator=generator))
        refused(tmp_path / "best.pt", bytes(torch.randint(256, (size,), generator=generator).tolist()))


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    path, trace = tmp_path / "best.pt", tmp_path / "code_has_run"
    torch.save(FACTS | {"epoch": 1, "format": 1, "model": MakesFolderWhenLoaded(trace)}, path)
    with pytest.raises(ValueError, match="damaged, or not a checkpoint") as error:
        checkpoints.read_checkpoint(path)
    assert not trace.exists()
    assert "weights_only" not in str(error.value)  # torch's own advice: how to run the code all the same
    assert "two options" not in str(error.value)
    torch.load(path, weights_only=False)
    assert trace.exists()  # the trap was armed


@pytest.mark.parametrize("content", [linear(1.0).state_dict(), {}, [1], 5, None, torch.zeros(3)])
def test_a_torch_file_of_something_else_is_sent_where_it_belongs(tmp_path, content):
    torch.save(content, tmp_path / "best.pt")
    told = refused(tmp_path / "best.pt", (tmp_path / "best.pt").read_bytes())
    assert "no checkpoint of these scripts; a bare state dict belongs into PRETRAINED" in told


def test_another_checkpoint_format_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "FORMAT", 7)
    save(tmp_path / "best.pt")
    monkeypatch.undo()
    told = refused(tmp_path / "best.pt", (tmp_path / "best.pt").read_bytes())
    assert "checkpoint format 7, these scripts read 1; train it anew" in told


def test_restore_names_the_part_that_is_missing():
    with pytest.raises(ValueError, match=r"^best\.pt: holds no 'head'; only last\.pt can be resumed"):
        checkpoints.restore(Path("best.pt"), {"model": linear(1.0).state_dict()}, {"head": linear(1.0)})


@pytest.mark.parametrize("part", [nn.Linear(5, 1, bias=False), nn.Linear(1, 1), nn.BatchNorm1d(1)])
def test_restore_names_the_part_that_does_not_fit(part):
    with pytest.raises(ValueError, match=r"^last\.pt: its 'head' does not fit \(.*a constant differs from that run"):
        checkpoints.restore(Path("last.pt"), {"head": linear(1.0).state_dict()}, {"head": part})


# --- the run's files --------------------------------------------------------------------------------------------------


@pytest.fixture
def model_and_run(tmp_path) -> tuple[nn.Linear, training.Run]:
    model = linear(0.0)
    return model, small_run(tmp_path, model, rows=[[1.0]] * 2, epochs=3)


def finish_epoch(run: training.Run, top1: float, loss: float | None = None, **row: float) -> None:
    """End an epoch of 4 images in 2 seconds at `loss`, or the one before any training, with `top1` and `row`."""
    if loss is not None:
        next(run.epochs())
        run.meter.add(4, loss=loss)
        run.meter.add_time(4, seconds=2.0, waited=0.5)

    def validate(network: nn.Module) -> tuple[float, dict]:
        assert network is run.learner.networks["model"]
        return top1, {"top1_mean": top1} | row

    run.finish_epoch(validate)


def test_the_best_checkpoint_is_the_highest_top1_and_the_earlier_where_equal(tmp_path, model_and_run, capsys):
    model, run = model_and_run
    for epoch, top1 in enumerate([0.5, 0.75, 0.75, 0.625]):
        model.weight.data.fill_(epoch)
        finish_epoch(run, top1, loss=3.0 - epoch if epoch else None)
    run.report_best()
    best, last = (checkpoints.read_checkpoint(tmp_path / name) for name in ("best.pt", "last.pt"))
    assert (best["epoch"], best["top1"], best["model"]["weight"].item()) == (1, 0.75, 1.0)
    assert (last["epoch"], last["top1"], last["model"]["weight"].item()) == (3, 0.625, 3.0)
    assert last["best"] == {"epoch": 1, "top1": 0.75}
    assert "optimizer" in last and "optimizer" not in best
    assert best["selected_on"] == last["selected_on"] == "val"
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "epoch 0/3  top-1 0.5000 *"
    assert told[1] == "epoch 1/3  loss 2.0000  top-1 0.7500 *  2 images/s"
    assert told[2] == "epoch 2/3  loss 1.0000  top-1 0.7500  2 images/s"
    assert told[4:] == [f"best: epoch 1, top-1 0.7500 on val: {tmp_path / 'best.pt'}"]


def test_the_history_is_in_the_log_and_in_the_checkpoint(tmp_path, model_and_run):
    _, run = model_and_run
    finish_epoch(run, 0.5)
    finish_epoch(run, 0.25, loss=2.0)
    assert (tmp_path / "log.csv").read_text().splitlines() == [
        "epoch,top1,top1_mean,loss,images_per_second,loading,skipped",
        "0,0.5,0.5,,,,",
        "1,0.25,0.25,2.0,2.0,0.25,0",
    ]
    before, after = checkpoints.read_checkpoint(tmp_path / "last.pt")["history"]
    assert before == {"epoch": 0, "top1": 0.5, "top1_mean": 0.5}
    speed = {"images_per_second": 2.0, "loading": 0.25}
    assert after == {"epoch": 1, "top1": 0.25, "top1_mean": 0.25, "loss": 2.0, "skipped": 0} | speed


@pytest.mark.parametrize("drop, kept", [(0.0, 1), (2.0, 2), (3.0, 3), (100.0, 4)])
def test_an_epoch_that_forgot_clean_photos_is_not_kept_as_the_best(tmp_path, drop, kept, capsys):
    run = small_run(tmp_path, linear(0.0), rows=[[1.0]] * 2, epochs=4, max_clean_drop=drop)
    finish_epoch(run, 0.5, top1_clean=0.95)
    for top1, clean in ((0.6, 0.95), (0.7, 0.93), (0.8, 0.92), (0.9, 0.5)):  # 0, 2, 3 and 45 points lost
        finish_epoch(run, top1, loss=1.0, top1_clean=clean)
    best = checkpoints.read_checkpoint(tmp_path / "best.pt")
    assert (best["epoch"], best["top1"]) == (kept, pytest.approx(0.5 + kept / 10))
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "epoch 0/4  top-1 0.5000 *  clean 0.9500"
    assert ("(forgot 45.0 points of clean photos, not kept)" in told[4]) == (kept < 4)
    assert sum("forgot" in line for line in told) == 4 - kept


@pytest.mark.parametrize(
    "after, warned",
    [
        ({"top1": 0.9, "top1_cross": 0.4}, True),
        ({"top1": 0.9, "top1_cross": 0.5}, False),
        ({"top1": 0.5, "top1_cross": 0.4}, False),
        ({"top1": 0.9}, False),
    ],
)
def test_finding_photos_better_and_persons_worse_is_told(model_and_run, caplog, after, warned):
    _, run = model_and_run
    run.facts["template"] = "mean"
    finish_epoch(run, 0.5, top1_cross=0.5)
    finish_epoch(run, loss=1.0, **after)
    told = "epoch 1 finds photos better than the network as loaded (same: 0.5000, now 0.9000), and persons worse"
    assert (told in caplog.text) == warned


def test_the_network_as_loaded_can_be_the_best(model_and_run, capsys):
    _, run = model_and_run
    finish_epoch(run, 0.0)
    finish_epoch(run, 0.0, loss=2.0)
    run.report_best()
    assert "best: the network as loaded, no epoch was better, top-1 0.0000 on val" in capsys.readouterr().out


def test_the_meter_weighs_each_batch_by_its_images_and_times_all_that_were_seen():
    meter = journal.Meter()
    meter.add(2, loss=1.0, accuracy=1.0)
    meter.add(6, loss=3.0, accuracy=0.5)
    for images, seconds, waited in [(2, 1.0, 0.5), (6, 2.0, 0.5), (4, 1.0, 0.0)]:  # the third step did not count
        meter.add_time(images, seconds, waited)
    expected = {"loss": (2 * 1 + 6 * 3) / 8, "accuracy": (2 + 3) / 8, "images_per_second": 12 / 4, "loading": 1 / 4}
    assert meter.means() == pytest.approx(expected)
    assert str(meter) == "loss 2.500, accuracy 0.625, 3.0 images/s"


def test_a_meter_goes_on_from_its_saved_state():
    meter, resumed = journal.Meter(), journal.Meter()
    meter.add(2, loss=1.0)
    meter.add_time(2, 1.0, 0.5)
    resumed.load_state_dict(copy.deepcopy(meter.state_dict()))  # as a file holds it
    for other in (meter, resumed):
        other.add(6, loss=3.0)
        other.add_time(6, 2.0, 0.5)
    assert resumed.means() == meter.means()
    assert meter.means() == pytest.approx({"loss": 2.5, "images_per_second": 8 / 3, "loading": 1 / 3})


# --- whole runs of both stages ----------------------------------------------------------------------------------------


@pytest.fixture
def trained(tiny_runs, monkeypatch):
    """trained(script, run name, CONSTANT=...) runs the script, its other constants as in `tiny_runs`, and returns
    its best.pt and its last.pt."""
    root = tiny_runs[0].RUN_DIR.parent
    usual = {script: {name: value for name, value in vars(script).items() if name.isupper()} for script in tiny_runs}

    def train(script, name: str, **constants) -> tuple[dict, dict]:
        assert constants.keys() <= usual[script].keys()
        for constant, value in (usual[script] | {"RUN_DIR": root / name} | constants).items():
            monkeypatch.setattr(script, constant, value)
        script.main()
        return tuple(checkpoints.read_checkpoint(root / name / file) for file in ("best.pt", "last.pt"))

    return train


def log(saved: dict) -> list[dict]:
    """The rows of the log, without what the clock says."""
    clock = ("images_per_second", "loading", "training", "validation", "saving", "seconds")
    return [{key: value for key, value in row.items() if key not in clock} for row in saved["history"]]


def assert_same_run(a: dict, b: dict, parts: tuple[str, ...]) -> None:
    """That two last.pt are equal bit for bit."""
    for part in parts:
        assert same_tensors(a[part], b[part])
    states = a["optimizer"]["state"], b["optimizer"]["state"]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 0
    assert all(same_tensors(states[0][index], states[1][index]) for index in states[0])
    for name in ("scheduler", "best", "epoch", "top1", "persons"):
        assert a[name] == b[name]
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    assert log(a) == log(b)


@pytest.fixture
def stopped_after_epoch_1(trained, monkeypatch):
    """As `trained`, but a Ctrl-C comes at the end of epoch 2, before anything of it is saved."""

    def train(script, name: str, **constants) -> None:
        whole = script.train_one_epoch

        def interrupted(run, *args):
            whole(run, *args)
            if run.epoch == 2:
                raise KeyboardInterrupt

        with monkeypatch.context() as context:
            context.setattr(script, "train_one_epoch", interrupted)
            with pytest.raises(KeyboardInterrupt):
                trained(script, name, **constants)

    return train


@pytest.mark.parametrize("workers", [0, 1])
def test_stage_1_stopped_and_resumed_equals_stage_1_in_one_go(tiny_runs, trained, stopped_after_epoch_1, workers):
    stage1, _ = tiny_runs
    best, last = trained(stage1, "whole", NUM_WORKERS=workers)
    stopped_after_epoch_1(stage1, "stopped", NUM_WORKERS=workers)
    assert checkpoints.read_checkpoint(stage1.RUN_DIR / "last.pt")["epoch"] == 1
    resumed_best, resumed_last = trained(stage1, "stopped", NUM_WORKERS=workers, RESUME=True)
    assert last["epoch"] == 2 and [row["epoch"] for row in last["history"]] == [0, 1, 2]
    assert_same_run(resumed_last, last, ("model", "head"))
    assert same_tensors(resumed_best["model"], best["model"]) and resumed_best["epoch"] == best["epoch"]
    with open(stage1.RUN_DIR / "log.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2"]


def test_stage_2_stopped_and_resumed_equals_stage_2_in_one_go(tiny_runs, trained, stopped_after_epoch_1):
    stage1, stage2 = tiny_runs
    trained(stage1, "stage1", EPOCHS=1)
    _, last = trained(stage2, "whole", BACKBONE_LR=1e-2, WIDE_LR=1e-2)
    stopped_after_epoch_1(stage2, "stopped", BACKBONE_LR=1e-2, WIDE_LR=1e-2)
    _, resumed = trained(stage2, "stopped", BACKBONE_LR=1e-2, WIDE_LR=1e-2, RESUME=True)
    assert last["epoch"] == 2 and last["history"][2]["loss"] != last["history"][1]["loss"]
    assert_same_run(resumed, last, ("model",))


def test_each_epoch_draws_its_own_crops_and_pairs_also_after_a_resume(tiny_runs, trained, monkeypatch):
    epochs, set_epoch = [], datasets.FacePairDataset.set_epoch
    for dataset in (datasets.FaceClassificationDataset, datasets.FacePairDataset):
        monkeypatch.setattr(dataset, "set_epoch", lambda self, epoch: epochs.append(epoch) or set_epoch(self, epoch))
    for script in tiny_runs:
        trained(script, script.RUN_DIR.name)
        trained(script, script.RUN_DIR.name, EPOCHS=3, RESUME=True)
        assert epochs == [1, 2, 3]
        epochs.clear()


def test_a_finished_run_can_be_resumed_for_more_epochs(tiny_runs, trained):
    stage1, _ = tiny_runs
    _, short = trained(stage1, "run", EPOCHS=1)
    _, longer = trained(stage1, "run", EPOCHS=2, RESUME=True)
    assert log(longer)[:2] == log(short) and longer["epoch"] == 2


def test_lower_learning_rates_take_effect_on_resume(tiny_runs, trained, stopped_after_epoch_1):
    """What the sentence about a loss that is not finite advises."""
    stage1, _ = tiny_runs
    stopped_after_epoch_1(stage1, "run", BACKBONE_LR=1e-3, HEAD_LR=1e-2)
    _, last = trained(stage1, "run", BACKBONE_LR=1e-5, HEAD_LR=1e-4, RESUME=True)
    assert last["history"][1]["backbone_lr"] > 1e-4
    assert last["history"][2]["backbone_lr"] < 1e-5


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resume_with_another_crop_is_refused_and_leaves_the_run_as_it_was(tiny_runs, trained):
    stage1, _ = tiny_runs
    trained(stage1, "run", EPOCHS=1)
    before = contents(stage1.RUN_DIR)
    with pytest.raises(ValueError, match=r"cannot be resumed, face_crop has changed \(0.8 then, 0.7 now\)") as error:
        trained(stage1, "run", FACE_CROP=0.7, RESUME=True)
    assert str(stage1.RUN_DIR / "last.pt") in str(error.value) and "another RUN_DIR" in str(error.value)
    assert contents(stage1.RUN_DIR) == before


def test_resume_with_other_persons_is_refused(tiny_runs, trained):
    stage1, _ = tiny_runs
    trained(stage1, "run", EPOCHS=1)
    (stage1.DATA_DIR / "train" / "di").rename(stage1.DATA_DIR / "train" / "dora")
    with pytest.raises(ValueError, match=r"cannot be resumed, persons has changed \(other persons than then\)"):
        trained(stage1, "run", RESUME=True)


@pytest.mark.parametrize("stage", [0, 1])
def test_resume_with_as_many_other_photos_is_refused(tiny_runs, trained, stage):
    trained(tiny_runs[0], "stage1", EPOCHS=1)
    script = tiny_runs[stage]
    trained(script, "run", EPOCHS=1)
    path = next((script.DATA_DIR / "train").glob("*/distortion/*.png"))
    path.rename(path.with_name(f"other_{path.name}"))
    told = r"cannot be resumed, data has changed \(21 files, \w{12} then, 21 files, \w{12} now\)"
    with pytest.raises(ValueError, match=told):
        trained(script, "run", RESUME=True)


def test_resume_where_there_is_nothing_to_resume_tells_to_turn_it_off(tiny_runs, trained):
    stage1, _ = tiny_runs
    with pytest.raises(UserError, match="no checkpoint") as error:
        trained(stage1, "run", RESUME=True)
    assert str(stage1.RUN_DIR / "last.pt") in str(error.value)
    assert "RESUME = False" in str(error.value)


def test_an_earlier_run_stops_the_script(tiny_runs, trained):
    stage1, _ = tiny_runs
    trained(stage1, "run", EPOCHS=1)
    with pytest.raises(UserError, match="set RESUME = True to go on with it"):
        trained(stage1, "run")


def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(tiny_runs, trained):
    stage1, _ = tiny_runs
    _, a = trained(stage1, "a", EPOCHS=1, SEED=3)
    torch.rand(17)  # what happened before does not matter
    _, b = trained(stage1, "b", EPOCHS=1, SEED=3)
    _, c = trained(stage1, "c", EPOCHS=1, SEED=4)
    assert_same_run(a, b, ("model", "head"))
    assert a["history"][1]["loss"] != c["history"][1]["loss"]
    assert not same_tensors(a["model"], c["model"])


def test_training_learns_the_train_persons(tiny_runs, trained):
    stage1, _ = tiny_runs
    _, last = trained(stage1, "run", EPOCHS=4, BACKBONE_LR=1e-2, HEAD_LR=1e-1)
    losses = [row["loss"] for row in last["history"][1:]]
    assert losses[3] < losses[0]
    with open(stage1.RUN_DIR / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert rows[0]["loss"] == "" and float(rows[4]["loss"]) == losses[3]
    assert {"top1_mean", "top1_best", *(f"top1_{kind}" for kind in KINDS)} <= rows[0].keys()


PLAIN = (bool, int, float, str, type(None))


def assert_plain(content) -> None:
    if isinstance(content, dict):
        for key, value in content.items():
            assert isinstance(key, PLAIN)
            assert_plain(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            assert_plain(value)
    else:
        assert isinstance(content, (*PLAIN, torch.Tensor))


def test_checkpoints_hold_only_tensors_and_plain_types(tiny_runs, trained):
    stage1, stage2 = tiny_runs
    trained(stage1, "stage1", EPOCHS=1)
    trained(stage2, "stage2", EPOCHS=1)
    for script in (stage1, stage2):
        for name in ("best.pt", "last.pt"):
            assert_plain(torch.load(script.RUN_DIR / name, weights_only=True))


def test_stage_2_without_a_stage_1_checkpoint_names_it(tiny_runs, trained):
    _, stage2 = tiny_runs
    with pytest.raises(UserError, match="no checkpoint; run the stage that writes it") as error:
        trained(stage2, "stage2")
    assert str(stage2.STAGE1_CHECKPOINT) in str(error.value)


def test_stage_2_refuses_to_start_from_what_stage_2_left(tiny_runs, trained):
    stage1, stage2 = tiny_runs
    trained(stage1, "stage1", EPOCHS=1)
    trained(stage2, "stage2", EPOCHS=1)
    path = stage2.RUN_DIR / "best.pt"
    with pytest.raises(ValueError, match="of stage 2, expected one of stage 1") as error:
        trained(stage2, "again", STAGE1_CHECKPOINT=path)
    assert f"STAGE1_CHECKPOINT = {path}: " in str(error.value)
    assert not list(stage2.RUN_DIR.glob("*.pt"))


def widened(weights: dict) -> dict:
    """What a network of these weights is when its wide crop is new."""
    return weights | {name.replace("backbone.", "wide."): value for name, value in weights.items()}


WIDE = {"face": 0.8, "wide_size": 76, "wide_weight": 0.5}


@pytest.mark.parametrize("wide_weight, frame", [(0.0, (76, 0.8, None)), (0.5, (95, 1.0, WIDE))])
def test_stage_2_starts_from_stage_1_and_takes_over_its_crop_or_the_frame_around_it(
    tiny_runs, trained, wide_weight, frame
):
    stage1, stage2 = tiny_runs
    best1, _ = trained(stage1, "stage1", EPOCHS=1)
    best2, last2 = trained(stage2, "stage2", EPOCHS=1, BACKBONE_LR=0.0, WIDE_LR=0.0, WIDE_WEIGHT=wide_weight)
    start = widened(best1["model"]) if wide_weight else best1["model"]
    assert last2["model"].keys() == start.keys()
    assert all(torch.equal(last2["model"][name], start[name]) for name in start if not name.endswith("tracked"))
    for name in ("pretrained", "holdout"):
        assert best2[name] == best1[name]
    assert (best2["dropout"], best2["mirror"]) == (stage2.DROPOUT, stage2.MIRROR)
    assert (best2["image_size"], best2["face_crop"], best2["crops"]) == frame
    assert (best1["stage"], best2["stage"], best2["teacher"]) == (1, 2, "None")
    if not wide_weight:
        assert last2["history"][0]["top1"] == best1["top1"]
    model, _ = checkpoints.load_facenet(stage2.RUN_DIR / "best.pt", CPU)
    assert model.mirror and not checkpoints.load_facenet(stage1.RUN_DIR / "best.pt", CPU)[0].mirror
    assert (model.crops and vars(model.crops)) == frame[2]
    assert model.eval()(torch.zeros(2, 3, frame[0], frame[0])).shape == (2, 1024 if wide_weight else 512)


@pytest.mark.parametrize("still, moves", [("backbone", "wide"), ("wide", "backbone")])
def test_face_and_frame_learn_at_rates_of_their_own(tiny_runs, trained, still, moves):
    stage1, stage2 = tiny_runs
    best1, _ = trained(stage1, "stage1", EPOCHS=1)
    rates = {f"{still.upper()}_LR": 0.0, f"{moves.upper()}_LR": 1e-2}
    _, last = trained(stage2, "stage2", EPOCHS=1, WIDE_WEIGHT=0.5, **rates)
    start = widened(best1["model"])
    learned = {name for name in start if name.endswith("weight") and not torch.equal(last["model"][name], start[name])}
    assert learned and {name.split(".")[0] for name in learned} == {moves}


@pytest.mark.parametrize("wide_weight", [0.0, 0.5])
def test_stage_2_is_never_below_the_network_it_loaded_even_where_training_ruins_it(
    tiny_runs, trained, monkeypatch, wide_weight
):
    stage1, stage2 = tiny_runs
    best1, _ = trained(stage1, "stage1")
    assert best1["top1"] == 1
    whole = stage2.train_one_epoch

    def ruinous(run, model, *args):
        whole(run, model, *args)
        for network in (model.backbone, model.wide) if wide_weight else (model.backbone,):
            network[6].weight.data.zero_()  # every photo has the same embedding now, and eve is everybody's nearest

    monkeypatch.setattr(stage2, "train_one_epoch", ruinous)
    best2, last2 = trained(stage2, "stage2", BACKBONE_LR=1e3, WIDE_LR=1e3, WIDE_WEIGHT=wide_weight)
    assert [row["top1_mean"] for row in last2["history"]] == pytest.approx(
        [1, 4 / 6, 4 / 6]
    )  # 4 of 6 queries are eve's
    assert (best2["epoch"], best2["top1"]) == (0, 1)
    start = widened(best1["model"]) if wide_weight else best1["model"]
    assert same_tensors(best2["model"], start)
    assert not same_tensors(last2["model"], start)


@pytest.fixture
def persons_trained_on(tiny_runs, monkeypatch) -> set[str]:
    """Fills up with the folders that train_one_epoch of either stage opens a photo of."""
    seen, in_training, load_image = set(), [], transforms.load_image

    def watched_load(path: Path):
        if in_training:
            seen.add(path.parents[1].name)
        return load_image(path)

    monkeypatch.setattr(datasets, "load_image", watched_load)
    for script in tiny_runs:

        def watched(*args, whole=script.train_one_epoch):
            in_training.append(True)
            whole(*args)
            in_training.clear()

        monkeypatch.setattr(script, "train_one_epoch", watched)
    return seen


def test_held_out_persons_choose_the_epoch_without_a_val_folder_and_train_in_neither_stage(
    tiny_runs, trained, persons_trained_on
):
    stage1, stage2 = tiny_runs
    shutil.rmtree(stage1.DATA_DIR / "val")
    best1, last1 = trained(stage1, "stage1", HOLDOUT_PERSONS=2)
    held_out = set(best1["holdout"])
    assert len(held_out) == 2 and set(best1["persons"]) == {"ann", "bob", "cy", "di"} - held_out
    assert persons_trained_on == set(best1["persons"])
    assert best1["selected_on"] == "2 persons held out of train"
    assert best1["head"]["weight"].shape == (2, 512)
    assert "val_clean_accuracy" not in last1["history"][2] and "top1_mean" in last1["history"][2]

    persons_trained_on.clear()
    best2, _ = trained(stage2, "stage2", PERSONS_PER_BATCH=2)
    assert persons_trained_on == set(best1["persons"])
    assert set(best2["holdout"]) == held_out and best2["persons"] == best1["persons"]
    assert best2["selected_on"] == "2 persons held out of train"


def test_accuracy_on_clean_val_photos_is_logged_where_val_persons_were_trained(tiny_runs, trained):
    stage1, _ = tiny_runs
    root = stage1.DATA_DIR
    shutil.rmtree(root / "val")
    shutil.copytree(root / "train", root / "val")
    _, last = trained(stage1, "run")
    assert [("val_clean_accuracy" in row) for row in last["history"]] == [False, True, True]

    model = TinyNet().eval()
    model.load_state_dict(last["model"])
    transform, right, photos = transforms.eval_transform(76, 0.8), 0, sorted((root / "val").glob("*/clean/*.png"))
    for path in photos:
        with torch.no_grad():
            embedding = model(transform(transforms.load_image(path))[None])[0]
        cosines = [torch.cosine_similarity(embedding, centre, dim=0).item() for centre in last["head"]["weight"]]
        right += last["persons"][cosines.index(max(cosines))] == path.parents[1].name
    assert len(photos) == 7
    assert last["history"][2]["val_clean_accuracy"] == pytest.approx(right / 7)


@pytest.mark.parametrize("val_persons", [("eve", "fay"), ("eve", "ann")])
def test_accuracy_on_val_is_not_logged_where_the_head_does_not_know_every_val_person(tiny_runs, trained, val_persons):
    stage1, _ = tiny_runs
    if "ann" in val_persons:
        shutil.rmtree(stage1.DATA_DIR / "val" / "fay")
        shutil.copytree(stage1.DATA_DIR / "train" / "ann", stage1.DATA_DIR / "val" / "ann")
    _, last = trained(stage1, "run", EPOCHS=1)
    assert "val_clean_accuracy" not in last["history"][1] and "top1_mean" in last["history"][1]


def test_a_corrupt_photo_is_listed_and_the_run_goes_on_as_if_it_were_absent(tiny_runs, trained, caplog):
    stage1, _ = tiny_runs
    _, without = trained(stage1, "without", EPOCHS=1)
    bad = stage1.DATA_DIR / "train" / "bob" / "clean" / "bob_0009.png"
    bad.write_bytes((stage1.DATA_DIR / "train" / "bob" / "clean" / "bob_0001.png").read_bytes()[:500])
    _, last = trained(stage1, "with", EPOCHS=1)
    assert "1 unreadable images, left out" in caplog.text and str(bad) in caplog.text
    assert_same_run(last, without, ("model", "head"))


def test_a_person_without_a_clean_photo_is_told_and_both_stages_go_on(tiny_runs, trained, caplog):
    stage1, stage2 = tiny_runs
    write_photo(stage1.DATA_DIR / "train" / "gus" / "distortion" / "gus_0001_blurred.png", (90, 90, 90), seed=1)
    best1, _ = trained(stage1, "stage1", EPOCHS=1)
    assert "1 persons without a clean photo" in caplog.text and "(gus)" in caplog.text
    _, last2 = trained(stage2, "stage2", EPOCHS=1)
    assert best1["persons"] == last2["persons"] == ["ann", "bob", "cy", "di", "gus"]
    assert last2["epoch"] == 1


def test_both_folder_layouts_give_the_same_run(tiny_runs, trained):
    stage1, stage2 = tiny_runs
    trained(stage1, "clean1", EPOCHS=1)
    _, clean = trained(stage2, "clean2", EPOCHS=1, STAGE1_CHECKPOINT=stage1.RUN_DIR / "best.pt")
    _, clean1 = (checkpoints.read_checkpoint(stage1.RUN_DIR / name) for name in ("best.pt", "last.pt"))
    for folder in list(stage1.DATA_DIR.glob("*/*/clean")):
        for photo in folder.iterdir():
            photo.rename(folder.parent / photo.name)
        folder.rmdir()
    _, flat1 = trained(stage1, "flat1", EPOCHS=1)
    _, flat = trained(stage2, "flat2", EPOCHS=1, STAGE1_CHECKPOINT=stage1.RUN_DIR / "best.pt")
    assert_same_run(flat1, clean1, ("model", "head"))
    assert_same_run(flat, clean, ("model",))


def test_class_centres_start_at_the_persons_means_or_at_random(tiny_runs, trained):
    stage1, _ = tiny_runs
    still = {"EPOCHS": 1, "HEAD_LR": 0.0, "BACKBONE_LR": 0.0, "FREEZE_BATCHNORM": True}
    _, last = trained(stage1, "means", CENTRES_FROM_MEANS=True, **still)
    model, _ = checkpoints.load_facenet(stage1.RUN_DIR / "last.pt", CPU)
    transform, root = transforms.eval_transform(76, 0.8), stage1.DATA_DIR / "train"
    means, labels = gallery.person_means(model, root, transform, CPU, persons=last["persons"])
    assert labels.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(last["head"]["weight"], means, rtol=0, atol=1e-5)
    _, last = trained(stage1, "random", CENTRES_FROM_MEANS=False, **still)
    assert (torch.nn.functional.normalize(last["head"]["weight"]) * means).sum(1).abs().max() < 0.5


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("stage", [0, 1])
def test_freeze_batchnorm_keeps_the_statistics_through_a_whole_run(tiny_runs, trained, freeze, stage):
    best, last = trained(tiny_runs[0], "stage1", EPOCHS=1, FREEZE_BATCHNORM=freeze)
    start = {"backbone.1.running_mean": torch.zeros(16), "backbone.1.running_var": torch.ones(16)}
    if stage == 1:
        start = widened({name: best["model"][name] for name in start})
        _, last = trained(tiny_runs[1], "stage2", EPOCHS=2, FREEZE_BATCHNORM=freeze)
    kept = [torch.equal(last["model"][name], start[name]) for name in start]
    assert kept == [freeze] * (4 if stage == 1 else 2)


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(tiny_runs, trained, monkeypatch):
    stage1, _ = tiny_runs
    whole = stage1.train_one_epoch

    def poisoned(run, model, *args):
        if run.epoch == 2:
            model.backbone[6].weight.data.fill_(math.nan)
        whole(run, model, *args)

    monkeypatch.setattr(stage1, "train_one_epoch", poisoned)
    with pytest.raises(UserError, match="the loss is nan"):
        trained(stage1, "run")
    last = checkpoints.read_checkpoint(stage1.RUN_DIR / "last.pt")
    assert last["epoch"] == 1 and all(value.isfinite().all() for value in last["model"].values())


def test_a_batch_larger_than_the_data_is_told_before_the_first_step(tiny_runs, trained):
    stage1, stage2 = tiny_runs
    with pytest.raises(ValueError, match="BATCH_SIZE = 22: more than the 21 items of an epoch"):
        trained(stage1, "run", BATCH_SIZE=22)
    trained(stage1, "stage1", EPOCHS=1)
    with pytest.raises(ValueError, match="PERSONS_PER_BATCH = 5: only 4 persons have pairs; lower it"):
        trained(stage2, "stage2", PERSONS_PER_BATCH=5)


def test_a_missing_val_folder_is_told_before_the_first_step(tiny_runs, trained):
    stage1, _ = tiny_runs
    shutil.rmtree(stage1.DATA_DIR / "val")
    with pytest.raises(UserError, match="val: no such folder"):
        trained(stage1, "run")
