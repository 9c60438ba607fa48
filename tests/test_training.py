"""A Run on made-up data: steps that are not finite, its best epoch, its files, its loader."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import files_in, plain, same_tensors
from made_up_run import (
    CPU,
    FACTS,
    Listed,
    adamw,
    bad_at,
    column,
    fit,
    last,
    make_run,
    read_csv,
    small_items,
    small_run,
    squared,
    state,
)
from torch import nn
from torch.utils.data import Dataset

import checkpoints
import common
import journal
import samplers
import training
from common import UserError
from training import RunSettings

REPO = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("quick_curves")


def gradient_bad_at(*steps: int):
    """A finite loss whose gradient is not finite at these steps: 0 * the infinite slope of sqrt at 0."""
    count = iter(range(1, 1000))

    def loss(model, *batch):
        nothing = (0 * next(model.parameters()).sum()).sqrt() if next(count) in steps else 0.0
        return squared(model, *batch) + nothing

    return loss


def listed_files(caplog) -> list[list[str]]:
    """The files that each warning about a skipped step lists."""
    found = [record.getMessage() for record in caplog.records if "the step is skipped" in record.getMessage()]
    return [[line.strip() for line in message.splitlines()[1:]] for message in found]


# --- steps that are not finite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make_loss, message",
    [
        (lambda: bad_at(2, value=math.nan), "the loss is nan"),
        (lambda: bad_at(2, value=-math.inf), "the loss is -inf"),
        (lambda: gradient_bad_at(2), "the norm of the gradient is nan"),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_and_only_its_files_are_listed(tmp_path, caplog, make_loss, message):
    run = small_run(tmp_path, RunSettings(epochs=1, ema_decay=0.9, grad_clip=1.0))
    states, loss = [], make_loss()

    def watched(model, *batch):
        states.append(state(run))
        return loss(model, *batch)

    fit(run, watched, after_step=lambda: states.append(state(run)))
    before, after = states[2:4]  # of the second step
    assert before["optimizer"]["state"]
    assert plain(after) == plain(before)
    for step in (0, 4, 6):  # the others did change everything
        assert not same_tensors(states[step]["model"], states[step + 1]["model"])
        assert not same_tensors(states[step]["ema"], states[step + 1]["ema"])
    assert len(states) == 8  # the run went on

    assert f"epoch 1, batch 2: {message}" in caplog.text
    assert listed_files(caplog) == [[f"item_{i}.png" for i in (4, 5, 6, 7)]]
    assert column(tmp_path, "skipped") == [0, 1, 0, 0]
    (row,) = read_csv(tmp_path / "log.csv")[1:]
    assert float(row["skipped"]) == 1
    for name in ("loss", "gradient_norm"):  # means of the steps that counted
        values = column(tmp_path, name)
        assert float(row[name]) == pytest.approx((values[0] + values[2] + values[3]) / 3)


def test_a_photo_of_nan_leaves_no_trace_in_the_batchnorm_statistics(tmp_path, caplog):
    run = small_run(tmp_path, RunSettings(epochs=1))
    run.loader.dataset.inputs[6] = math.nan
    fit(run)
    assert listed_files(caplog) == [[f"item_{i}.png" for i in (4, 5, 6, 7)]]
    assert all(value.isfinite().all() for value in run.learner.networks["model"].state_dict().values())


def test_a_skipped_update_takes_back_all_its_batches_and_lists_the_files_of_all(tmp_path, caplog):
    run = small_run(tmp_path, RunSettings(epochs=1, accumulate=2), batches=6)
    states, loss = [], bad_at(4)

    def watched(model, *batch):
        states.append(state(run))
        return loss(model, *batch)

    fit(run, watched)
    assert plain(states[4]) == plain(states[2])  # before batch 5 all is as before batch 3
    assert listed_files(caplog) == [[f"item_{i}.png" for i in range(8, 16)]]
    assert column(tmp_path, "skipped") == [0, 1, 0]


def test_skipped_steps_are_counted_for_each_epoch_also_where_all_of_them_are(tmp_path):
    run = small_run(tmp_path, RunSettings(epochs=3), batches=2)
    fit(run, bad_at(2, 5, 6))
    assert [row["skipped"] for row in run.history[1:]] == [1, 0, 2]
    assert "loss" not in run.history[3]


@pytest.mark.parametrize("bad, make_loss", [((5, 6, 7), gradient_bad_at), ((4, 5, 6), bad_at)])
def test_three_bad_steps_in_a_row_stop_the_run_and_keep_the_last_checkpoint(tmp_path, caplog, bad, make_loss):
    run, earlier = small_run(tmp_path, RunSettings(epochs=2)), signal.getsignal(signal.SIGINT)
    kept, loss = [], make_loss(*bad)

    def watched(model, *batch):
        if (run.epoch, run.batch) == (2, 0):
            kept.append((tmp_path / "last.pt").read_bytes())
        return loss(model, *batch)

    with pytest.raises(UserError, match="3 times in a row; the last good checkpoint is kept") as error:
        fit(run, watched)
    assert f"epoch 2, batch {bad[-1] - 4}: the " in str(error.value) and "lower the learning rates" in str(error.value)
    assert (tmp_path / "last.pt").read_bytes() == kept[0]
    saved = last(tmp_path)
    assert saved["epoch"] == 1 and saved["bad_in_a_row"] == sum(step <= 4 for step in bad)
    for weights in (saved["model"], run.learner.networks["model"].state_dict()):
        assert all(value.isfinite().all() for value in weights.values())
    assert len(listed_files(caplog)) == 3
    assert signal.getsignal(signal.SIGINT) is earlier


def test_two_bad_steps_a_good_one_and_two_bad_ones_do_not_stop_the_run(tmp_path):
    fit(small_run(tmp_path, RunSettings(epochs=1), batches=6), bad_at(1, 2, 4, 5))
    assert column(tmp_path, "skipped") == [1, 1, 0, 1, 1, 0]


def test_an_overflow_of_float16_halves_the_scale_and_is_not_reported_before_the_scale_is_1(tmp_path, caplog):
    run = small_run(tmp_path, RunSettings(epochs=1), batches=6)
    run.learner.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    fit(run, gradient_bad_at(1, 2, 3, 4, 5))  # at 8, 4, 2, 1 and 0.5
    assert column(tmp_path, "skipped") == [1, 1, 1, 1, 1, 0]
    assert listed_files(caplog) == [[f"item_{i}.png" for i in range(k, k + 4)] for k in (12, 16)]
    assert (run.history[1]["skipped"], run.learner.scaler.get_scale()) == (2, 0.25)


# --- the best epoch ---------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_is_the_highest_top1_and_the_earlier_where_equal(tmp_path, capsys):
    run, top1 = small_run(tmp_path, RunSettings(epochs=3), batches=1), iter([0.5, 0.75, 0.75, 0.625])
    fit(run, validate=lambda network: (next(top1), {"top1_clean": 0.25}))
    run.report_best()
    best, end = checkpoints.read_checkpoint(tmp_path / "best.pt"), last(tmp_path)
    assert (best["epoch"], best["top1"], end["epoch"], end["top1"]) == (1, 0.75, 3, 0.625)
    assert end["best"] == {"epoch": 1, "top1": 0.75}
    assert not same_tensors(best["model"], end["model"])
    assert "optimizer" in end and "optimizer" not in best
    lines = [line.partition("  top-1 ")[2] for line in capsys.readouterr().out.splitlines()[:4]]
    assert lines[0] == "50.00 % (best so far)  clean 25.00 %"
    assert [line.startswith("75.00 % (best so far)") for line in lines[1:]] == [True, False, False]


@pytest.mark.parametrize("drop, kept", [(0.0, 1), (2.0, 2), (3.0, 3), (100.0, 4)])
def test_an_epoch_that_forgot_clean_photos_is_not_kept_as_the_best(tmp_path, drop, kept, capsys):
    run = small_run(tmp_path, RunSettings(epochs=4, max_clean_drop=drop), batches=1)
    found = iter([(0.5, 0.95), (0.6, 0.95), (0.7, 0.93), (0.8, 0.92), (0.9, 0.5)])  # 0, 2, 3 and 45 points lost

    def validate(network):
        top1, clean = next(found)
        return top1, {"top1_clean": clean}

    fit(run, validate=validate)
    best = checkpoints.read_checkpoint(tmp_path / "best.pt")
    assert (best["epoch"], best["top1"]) == (kept, pytest.approx(0.5 + kept / 10))
    lines = capsys.readouterr().out.splitlines()
    assert ("(forgot 45.0 points of clean photos, not kept)" in lines[4]) == (kept < 4)
    assert sum("forgot" in line for line in lines) == 4 - kept


@pytest.mark.parametrize(
    "of_model, of_average, clean, best, best_ema",
    [
        ((0.5, 0.75, 0.25), (0.4, 0.6), (0.9, 0.9, 0.9, 0.9, 0.9), (1, 0.75), (2, 0.6)),
        ((0.5, 0.75, 0.25), (0.8, 0.9), (0.9, 0.9, 0.5, 0.9, 0.5), (1, 0.75), (0, 0.5)),  # the average forgot
    ],
)
def test_the_best_epoch_of_the_average_is_chosen_on_its_own(tmp_path, of_model, of_average, clean, best, best_ema):
    run = small_run(tmp_path, RunSettings(epochs=2, ema_decay=0.9, max_clean_drop=2.0), batches=1)
    of_model, of_average, clean = iter(of_model), iter(of_average), iter(clean)
    models = lambda network: next(of_average) if network is run.learner.ema.module else next(of_model)  # noqa: E731
    fit(run, validate=lambda network: (models(network), {"top1_clean": next(clean)}))
    for name, expected in (("best.pt", best), ("best_ema.pt", best_ema)):
        saved = checkpoints.read_checkpoint(tmp_path / name)
        assert (saved["epoch"], saved["top1"]) == expected


@pytest.mark.parametrize(
    "top1, cross, warned", [(0.9, 0.4, True), (0.9, 0.5, False), (0.5, 0.4, False), (0.9, None, False)]
)
def test_finding_photos_better_and_persons_worse_is_warned_of(tmp_path, caplog, top1, cross, warned):
    rows = iter([{"top1_mean": 0.5, "top1_cross": 0.5}, {"top1_mean": top1} | ({"top1_cross": cross} if cross else {})])
    fit(small_run(tmp_path, RunSettings(epochs=1)), validate=lambda network: (0.5, next(rows)))
    message = "epoch 1 finds photos better than the network as loaded (same: 50.00 %, now 90.00 %), and persons worse"
    assert (message in caplog.text) == warned


@pytest.mark.parametrize(
    "patience, top1, end",
    [
        (2, [0.5] * 9, 2),
        (0, [0.5] * 9, 8),
        (2, [0.1, 0.2, 0.2, 0.3, 0.3, 0.3, 0.9, 0.9, 0.9], 5),
        (8, [0.5] * 9, 8),
    ],
)
def test_patience_stops_a_run_that_does_not_improve(tmp_path, capsys, patience, top1, end):
    run, validations = small_run(tmp_path, RunSettings(epochs=8, patience=patience), batches=1), iter(top1)
    fit(run, validate=lambda network: (next(validations), {}))
    assert [row["epoch"] for row in run.history] == list(range(end + 1))
    message = f"stopped early: {patience} epochs without a better top-1 (PATIENCE = {patience})"
    assert (message in capsys.readouterr().out) == (end < 8)


def test_an_average_that_improves_keeps_a_patient_run_going(tmp_path):
    run = small_run(tmp_path, RunSettings(epochs=6, patience=2, ema_decay=0.9), batches=1)
    averages = iter(range(1, 9))
    fit(run, validate=lambda net: (0.5 + next(averages) / 100 if net is run.learner.ema.module else 0.5, {}))
    assert run.epoch == 6


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_run_notes_its_constants(tmp_path):
    constants = {"EPOCHS": 4, "DATA_DIR": Path("Task_B"), "RESUME": False, "AMP": "auto", "PRETRAINED": None}
    constants |= {"SKIP_KINDS": ("sunny",), "F": math, "main": 3}
    assert training.start_run(tmp_path / "runs" / "new", False, constants, stage=1) is None
    noted = json.loads((tmp_path / "runs" / "new" / "constants.json").read_text())
    expected = {"EPOCHS": 4, "DATA_DIR": "Task_B", "RESUME": False, "AMP": "auto", "PRETRAINED": None}
    assert noted == expected | {"SKIP_KINDS": ["sunny"]}


@pytest.mark.parametrize(
    "files, of_start, of_resume",
    [
        (["last.pt", "best.pt"], "set RESUME = True to go on with it, or give RUN_DIR another name", None),
        (["last.pt"], "set RESUME = True to go on with it, or give RUN_DIR another name", None),
        (["best.pt"], *2 * ["holds best.pt of an earlier run, but no last.pt to go on from; give RUN_DIR another"]),
        (["constants.json", "log.csv"], None, "last.pt: no checkpoint to resume; set RESUME = False to start the run"),
    ],
)
def test_what_can_be_done_in_a_folder_is_done_and_the_sentence_about_anything_else_says_so(
    tmp_path, files, of_start, of_resume
):
    fit(small_run(tmp_path / "whole", RunSettings(epochs=1), batches=1))
    for name in files:
        (tmp_path / name).write_bytes((tmp_path / "whole" / "last.pt").read_bytes())
    for resume, sentence in ((True, of_resume), (False, of_start)):
        before = files_in(tmp_path)
        if sentence:
            with pytest.raises(UserError, match=f"^{tmp_path}.*{sentence}"):
                training.start_run(tmp_path, resume, {"EPOCHS": 4}, stage=1)
            assert {name for name, content in files_in(tmp_path).items() if before.get(name) != content} <= {".lock"}
        else:
            stated = training.start_run(tmp_path, resume, {"EPOCHS": 4}, stage=1)
            assert (stated is not None) == resume and not (stated or {}).keys() & {"model", "optimizer"}


def test_a_folder_in_which_another_process_trains_is_refused_until_that_one_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "GRACE_SECONDS", 0.1)
    code = "import sys, pathlib, training; training.start_run(pathlib.Path(sys.argv[1]), False, {}, stage=1); input()"
    pipe = subprocess.PIPE
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=REPO, stdin=pipe, stdout=pipe, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "constants.json").exists():
            assert time.monotonic() < deadline and other.poll() is None
            time.sleep(0.05)
        for resume in (False, True):
            (tmp_path / "last.pt").touch() if resume else None
            with pytest.raises(UserError, match=f"^{tmp_path}: another training uses this folder; wait until it has"):
                training.start_run(tmp_path, resume, {}, stage=1)
        (tmp_path / "last.pt").unlink()
        training.start_run(tmp_path / "another", False, {}, stage=1)
    finally:
        other.communicate("\n")
    for _ in range(2):  # this process can start again in a folder that it holds
        training.start_run(tmp_path, False, {}, stage=1)


def test_a_constant_below_or_above_its_range_is_refused_before_anything_is_written(tmp_path):
    for name, (kind, low, high) in common.RANGES.items():
        step = 1 if kind is int else 1e-9
        article = "a whole number" if kind is int else "a number"
        for value in (low - step, high + step, math.nan, None, "3", kind is int):
            if value == math.inf:
                continue
            with pytest.raises(UserError) as error:
                training.start_run(tmp_path / "run", False, {name: value}, stage=1)
            assert str(error.value) == f"{name} = {value!r}: expected {article}, {low}..{high}"
        for value in (low, low if high == math.inf and kind is int else high):
            training.start_run(tmp_path / "ends", False, {name: value}, stage=1)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"EPOCHS = 4.0: expected a whole number, 1..999"):
        training.start_run(tmp_path / "run", False, {"EPOCHS": 4.0}, stage=1)


@pytest.mark.parametrize("every, expected", [(0, [0, 0, 0, 0]), (1, [0, 1, 2, 3]), (2, [0, 0, 2, 2])])
def test_save_every_writes_last_pt_within_an_epoch(tmp_path, every, expected):
    run, seen = small_run(tmp_path, RunSettings(epochs=1, save_every=every)), []

    def watched(model, *batch):
        seen.append(last(tmp_path))
        return squared(model, *batch)

    fit(run, watched)
    assert [saved["batch"] for saved in seen] == [saved["updates"] for saved in seen] == expected
    assert all(saved["epoch"] == 0 for saved in seen)
    saved = last(tmp_path)
    assert (saved["epoch"], saved["batch"], saved["updates"]) == (1, 0, 4)


def test_a_run_with_another_fact_is_refused_and_changes_nothing(tmp_path):
    fit(small_run(tmp_path, RunSettings(epochs=1), facts=FACTS | {"persons": ["ann", "bob"]}))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for fact, now, change in (
        ("face_crop", 0.7, "0.52 then, 0.7 now"),
        ("persons", ["bob", "cy", "di"], "ann then, cy, di now"),
        ("holdout", ["cy"], "none then, cy now"),
        ("pretrained_weights", "12ab", "None then, 12ab now"),
    ):
        run = small_run(tmp_path, RunSettings(epochs=2), facts=FACTS | {"persons": ["ann", "bob"], fact: now})
        message = f"{tmp_path / 'last.pt'}: cannot be resumed, {fact} has changed .{change}.; set it back"
        with pytest.raises(UserError, match=message):
            run.resume({})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# --- kills and crashes ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def of_weights(network) -> tuple[float, dict]:
    return network[0].weight.sum().sigmoid().item(), {}


def outcome(run_dir: Path) -> tuple:
    """What a run leaves that does not depend on the clock."""
    saved = last(run_dir)
    history = [{"epoch": row["epoch"], "top1": row["top1"], "loss": row.get("loss")} for row in saved["history"]]
    best = {name: checkpoints.read_checkpoint(run_dir / name) for name in ("best.pt", "best_ema.pt")}
    files = (column(run_dir, "update"), column(run_dir, "loss"), [row["top1"] for row in read_csv(run_dir / "log.csv")])
    return plain([saved | {"history": history, "meter": None}, best]), files


def test_after_a_kill_at_any_file_a_run_starts_or_resumes_to_the_same_end_and_the_sentence_says_which(
    tmp_path, monkeypatch
):
    replace, append, left = os.replace, journal.Journal._append, []

    def killed_at(call: int) -> None:
        left[:] = [None] * call

    def counted(act, *args):
        if not left:
            return act(*args)
        left.pop()
        if not left:
            raise Killed
        return act(*args)

    monkeypatch.setattr(checkpoints.os, "replace", lambda *paths: counted(replace, *paths))
    monkeypatch.setattr(journal.Journal, "_append", lambda log, rows: counted(append, log, rows))
    settings = RunSettings(epochs=2, save_every=2, ema_decay=0.9)

    def go(run_dir: Path, resume: bool) -> None:
        training.start_run(run_dir, resume, {}, stage=1)
        run = small_run(run_dir, settings, batches=3)
        if resume:
            run.resume({})
        fit(run, validate=of_weights)

    go(tmp_path / "whole", False)
    expected, ways = outcome(tmp_path / "whole"), []
    for call in range(1, 100):
        run_dir = tmp_path / str(call)
        killed_at(call)
        try:
            go(run_dir, False)
        except Killed:
            ways.append((run_dir / "last.pt").exists())  # whether to resume
            with pytest.raises(UserError, match=f"set RESUME = {ways[-1]} to"):
                go(run_dir, not ways[-1])
            go(run_dir, ways[-1])
            assert outcome(run_dir) == expected, call
        else:
            break
    assert ways == [False] * 2 + [True] * (len(ways) - 2) and len(ways) > 20  # killed at constants.json, at last.pt


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("epoch", [0, 2])
def test_what_ends_a_validation_costs_the_validation_alone(tmp_path, error, epoch):
    def ends(network):
        if run.epoch == epoch:
            raise error
        return of_weights(network)

    run = small_run(tmp_path / "ended", RunSettings(epochs=2, ema_decay=0.9))
    with pytest.raises(error):
        fit(run, validate=ends)
    run, steps = small_run(tmp_path / "ended", RunSettings(epochs=2, ema_decay=0.9)), []
    run.resume({})
    fit(run, validate=of_weights, after_step=lambda: steps.append(run.batch))
    assert len(steps) == (0 if epoch else 2 * 4)
    fit(small_run(tmp_path / "whole", RunSettings(epochs=2, ema_decay=0.9)), validate=of_weights)
    assert outcome(tmp_path / "ended") == outcome(tmp_path / "whole")


# --- the disk ---------------------------------------------------------------------------------------------------------


def free(monkeypatch, size: float) -> None:
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: SimpleNamespace(total=10**15, free=size))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_needs_as_much_free_disk_as_its_checkpoints_take(tmp_path, monkeypatch, ema):
    def start(name: str) -> training.Run:
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10000))
        settings = RunSettings(epochs=1, ema_decay=ema)
        return make_run(tmp_path / name, model, adamw(model), small_items(2), [[0, 1]], settings)

    fit(start("there"), lambda model, images, _: model(images).square().mean())
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "there").glob("*.pt")}
    most = sum(sizes.values()) + sizes["last.pt"]  # while last.pt is replaced
    for name, needed in (("new", most), ("there", sizes["last.pt"])):  # the others are there already
        free(monkeypatch, 0.97 * needed)
        with pytest.raises(UserError, match=rf"{tmp_path / name}: \d+ MiB free, the checkpoints need \d+; make room"):
            start(name)
        free(monkeypatch, 1.03 * needed)
        start(name)
    assert not (tmp_path / "new").exists()


# --- the loader -------------------------------------------------------------------------------------------------------


class Numbers(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return index


def test_workers_stay_and_fetch_ahead_and_memory_is_pinned_for_a_gpu_only():
    batches = Listed([[0, 1], [2, 3]])
    alone, with_worker = (training.train_loader(Numbers(), batches, workers, CPU, epochs=99) for workers in (0, 1))
    assert with_worker.num_workers == 1 and with_worker.persistent_workers
    assert with_worker.prefetch_factor == training.PREFETCH > 2
    assert alone.num_workers == 0 and not alone.persistent_workers and alone.prefetch_factor is None
    assert not alone.pin_memory and not with_worker.pin_memory
    assert training.train_loader(Numbers(), batches, 0, torch.device("cuda"), epochs=1).pin_memory


def test_an_epoch_draws_the_same_batches_whether_or_not_one_went_before_and_for_any_workers():
    """A loader draws a base seed for its workers: once if it keeps them, else in each epoch."""

    def second_epoch(num_workers: int, first: bool) -> list:
        batches = samplers.ShuffledBatches([0] * 12, 4, seed=0)
        loader = training.train_loader(Numbers(), batches, num_workers, CPU, epochs=99)
        torch.manual_seed(0)
        for epoch in (1, 2) if first else (2,):
            batches.set_epoch(epoch)
            found = [batch.tolist() for batch in loader]
        assert sorted(index for batch in found for index in batch) == list(range(12))
        return [*found, torch.rand(1).item()]  # dropout draws from the common stream

    expected = second_epoch(0, first=True)
    assert second_epoch(0, first=False) == expected
    assert second_epoch(1, first=False) == expected
    assert second_epoch(1, first=True) == expected


@pytest.mark.parametrize("odd", ["missing", None, "text", 7, [1, 2], {"a": 1}], ids=repr)
def test_a_last_pt_with_odd_parts_is_refused_with_its_path_before_anything_is_restored(tmp_path, odd):
    fit(small_run(tmp_path, RunSettings(epochs=1)))
    path = tmp_path / "last.pt"
    saved = torch.load(path, weights_only=True)
    stated = [name for name in FACTS if name != "constants"]  # see test_checkpoints
    names = [name for name in saved if name not in ("top1", "scaler", *stated)]  # those two are not read here
    assert {"constants", "batch", "history", "best", "best_ema", "meter", "rates", "unwritten", "model"} <= {*names}
    for name in names:
        others = {key: value for key, value in saved.items() if key != name}
        torch.save(others if odd == "missing" else others | {name: odd}, path)
        run = small_run(tmp_path, RunSettings(epochs=2))
        usual = {"constants": [{"a": 1}], "unwritten": ["missing"], "rates": [{"a": 1}], "epoch": [7]}
        usual |= {"batch": [7], "updates": [7], "skipped": [7], "bad_in_a_row": [7]}  # what they may be, or is not read
        if odd in usual.get(name, []):
            continue
        try:
            run.resume({})
        except UserError as error:
            assert str(error).startswith(f"{path}: ")
        else:
            pytest.fail(f"{name} = {odd!r} was taken")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda t: torch.zeros_like(t, dtype=torch.int8), "is torch.int8, expected torch.float32"),
        (lambda t: t.to(torch.complex64), "is torch.complex64, expected torch.float32"),
        (lambda t: torch.full_like(t, math.nan), "is not finite"),
    ],
)
def test_weights_of_another_type_or_not_finite_are_refused(tmp_path, spoil, message):
    fit(small_run(tmp_path, RunSettings(epochs=1)))
    path = tmp_path / "last.pt"
    saved = torch.load(path, weights_only=True)
    first = next(iter(saved["model"]))
    torch.save(saved | {"model": saved["model"] | {first: spoil(saved["model"][first])}}, path)
    with pytest.raises(UserError, match=f"its 'model' does not fit .{first} {message}"):
        small_run(tmp_path, RunSettings(epochs=2)).resume({})
