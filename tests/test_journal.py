"""journal.py: the tables and events of a run, and what its time is spent on."""

import errno
import io
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_up_run import (
    Items,
    column,
    fit,
    read_csv,
    small_run,
    squared,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import journal
import plots
import training
from training import RunSettings

REAL_CURVES = plots.curves
pytestmark = pytest.mark.usefixtures("quick_curves")


# --- the clock --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """Time stands still, but for what a test adds to `now`; saving a file takes 0.5 s."""
    clock, save = SimpleNamespace(now=100.0), training.save_checkpoint

    def slow_save(*args):
        clock.now += 0.5
        save(*args)

    monkeypatch.setattr(journal.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(training, "save_checkpoint", slow_save)
    return clock


def fit_timed(run: training.Run, clock: SimpleNamespace) -> None:
    """Of each of the 2 steps loading takes 1 s (4 photos) and training 2 s; validation takes 4 s and finds nothing."""

    def spend(seconds: float, result):
        clock.now += seconds
        return result

    read = run.loader.dataset.__class__.__getitem__
    run.loader.dataset.__class__ = type("Slow", (Items,), {"__getitem__": lambda s, i: spend(0.25, read(s, i))})
    fit(run, lambda *args: spend(2, squared(*args)), validate=lambda network: spend(4, (0.0, {})))


def test_the_log_states_what_the_time_of_each_epoch_was_spent_on(tmp_path, clock, capsys):
    run = small_run(tmp_path, RunSettings(epochs=2), batches=2)
    clock.now += 1000  # the bank of stage 2: of no epoch
    fit_timed(run, clock)
    run.report_best()
    rows = [{name: float(row[name]) for name in ("seconds", *journal.ACTIVITIES)} for row in run.history]
    assert rows[0] == pytest.approx(
        {"seconds": 5, "training": 0, "loading": 0, "validation": 4 / 5, "saving": 1 / 5}  # last.pt and best.pt
    )
    # Of last.pt, saved before and after the validation, the latter comes after the row, and counts for the next one.
    shares = {"training": 4 / 11, "loading": 2 / 11, "validation": 4 / 11, "saving": 1 / 11}
    assert rows[1] == rows[2] == pytest.approx({"seconds": 11} | shares)
    assert [float(row["training"]) for row in read_csv(tmp_path / "log.csv")] == [row["training"] for row in rows]
    assert run.history[1]["images_per_second"] == pytest.approx(8 / 6)
    assert column(tmp_path, "images_per_second") == pytest.approx([4 / 3] * 4)
    assert column(tmp_path, "loading") == pytest.approx([1 / 3] * 4)
    *_, best, times = capsys.readouterr().out.splitlines()
    assert best == f"best: the network as loaded, no epoch was better, top-1 0.00 % on val: {tmp_path / 'best.pt'}"
    # 27.5 s: 8 training, 4 loading, 12 validation, 3.5 saving, the last of them after the last row
    assert times == "time: training 29 %, loading 15 %, validation 44 %, saving 13 % of 0.5 min"


def test_a_resumed_run_adds_its_time_to_what_was_spent_before(tmp_path, clock):
    def killed(*args):
        clock.now += 2
        if count.pop():
            raise InterruptedError
        return squared(*args)

    count = [True, False]
    with pytest.raises(InterruptedError):
        fit(small_run(tmp_path, RunSettings(epochs=1, save_every=1), batches=2), killed)
    run = small_run(tmp_path, RunSettings(epochs=1, save_every=1), batches=2)
    clock.now += 1000  # between the two runs
    run.resume({})
    clock.now += 1000  # the bank
    assert (run.batch, run.meter.seen) == (1, 4)
    fit_timed(run, clock)
    row = run.history[1]
    spent = {name: row[name] * row["seconds"] for name in journal.ACTIVITIES}
    # Of the first run a step, and the save at the end of epoch 0; of the second a step, and the save after it.
    assert spent == pytest.approx({"training": 4, "loading": 1, "validation": 4, "saving": 0.5 + 0.5})


def test_the_meter_weighs_each_step_by_its_images(clock):
    meter = journal.Meter()
    for images, loss, accuracy in ((2, 1.0, 1.0), (6, 3.0, 0.5)):
        meter.add(images, {"loss": loss, "accuracy": accuracy})
        meter.seen += images
        clock.now += images
        assert meter.lap("training") == images
    assert meter.means() == pytest.approx({"loss": (2 + 18) / 8, "accuracy": (2 + 3) / 8, "images_per_second": 1.0})
    assert str(meter) == "loss 2.500, accuracy 62.5 %, 1.0 images/s"


# --- the journal ------------------------------------------------------------------------------------------------------


def events(run_dir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run_dir / "tensorboard"))
    accumulator.Reload()
    return accumulator


def test_curves_are_drawn_of_every_step_and_kind_and_of_the_averages():
    steps = [
        {"update": str(i), "loss": "nan" if i == 5 else str(9 - i / 10), "backbone_lr": "1e-4", "head_lr": "1e-2"}
        for i in range(1, 31)
    ]
    kinds = {"top1_mean": 0.5, "top1_best": 0.25, "top1_blurred": 0.75}
    averaged = {f"ema_{name}": value for name, value in kinds.items()}
    history = [{"epoch": e, "top1": 0.5} | kinds | averaged for e in (0, 1, 2)]
    loss, top1, kind, rates = REAL_CURVES(history, steps).axes
    assert list(loss.lines[0].get_xdata()) == list(range(1, 31)) and loss.lines[0].get_ydata()[29] == 6.0
    assert len(rates.lines) == 2
    same = [f"same, template {name}" for name in ("mean", "best")]
    expected = ["what chooses the epoch", *same, *(f"averaged: {name}" for name in same)]
    assert [line.get_label() for line in top1.lines] == expected
    assert {line.get_label() for line in kind.lines} == {"blurred", "averaged: blurred"}
    assert list(kind.lines[0].get_ydata()) == [75, 75, 75]
    assert REAL_CURVES([{"epoch": 0, "top1": 0.5, "top1_mean": 0.5}], []).axes  # before the first step


ROW = {"epoch": 1, "batch": 1, "loss": 1.5, "skipped": 0}


def written_journal(run_dir: Path, updates) -> journal.Journal:
    written = journal.Journal(run_dir)
    for update in updates:
        written.step({"update": update} | ROW)
    written.flush()
    return written


def test_rewind_drops_the_steps_after_an_update_from_table_and_events(tmp_path):
    written_journal(tmp_path, range(1, 6))
    again = journal.Journal(tmp_path)
    again.rewind(3)
    again.step({"update": 4} | ROW | {"loss": 2.5})
    again.flush()
    assert column(tmp_path, "update") == [1, 2, 3, 4]
    assert column(tmp_path, "loss") == [1.5, 1.5, 1.5, 2.5]
    found = events(tmp_path).Scalars("step/loss")
    assert [(event.step, event.value) for event in found] == [(1, 1.5), (2, 1.5), (3, 1.5), (4, 2.5)]


def test_a_new_run_starts_its_own_table_where_an_earlier_ones_checkpoints_were_deleted(tmp_path):
    written_journal(tmp_path, range(1, 6))
    fit(small_run(tmp_path, RunSettings(epochs=1)))
    assert column(tmp_path, "update") == [1, 2, 3, 4]
    assert "backbone_lr" in read_csv(tmp_path / "steps.csv")[0]  # its columns are its own, too


@pytest.mark.parametrize("cut", ["1", "12,", "12,1,4,1.", "12,1,4,1.5,"])
def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path, cut):
    written_journal(tmp_path, range(1, 12))
    with open(tmp_path / "steps.csv", "a") as file:
        file.write(cut)
    again = journal.Journal(tmp_path)
    assert [row["update"] for row in again.steps()] == [str(i) for i in range(1, 12)]
    again.rewind(12)
    again.step({"update": 12} | ROW)
    again.flush()
    assert column(tmp_path, "update") == list(range(1, 13))
    assert column(tmp_path, "skipped") == [0] * 12


@pytest.mark.parametrize("before", [1, 5])
def test_steps_that_are_not_in_the_table_are_added_on_resume_and_those_that_are_stay(tmp_path, before):
    written_journal(tmp_path, range(1, before + 1))
    journal.Journal(tmp_path).rewind(4, unwritten=[{"update": update} | ROW for update in (2, 3, 4)])
    assert column(tmp_path, "update") == [1, 2, 3, 4]


def test_a_table_of_steps_that_another_program_has_changed_is_kept_and_a_new_one_begun(tmp_path, caplog):
    (tmp_path / "steps.csv").write_text("Update;Loss\n1;1,5\n")
    again = journal.Journal(tmp_path)
    again.rewind(1)
    again.step({"update": 2} | ROW)
    again.flush()
    assert (tmp_path / "steps_old.csv").read_text() == "Update;Loss\n1;1,5\n"
    assert column(tmp_path, "update") == [2] and "kept as steps_old.csv" in caplog.text


# --- files that cannot be written -------------------------------------------------------------------------------------

NAMES = ("steps.csv", "log.csv", "curves.png", "tensorboard")


def block(path: Path) -> None:
    """In the way of a file stands a folder, in that of a folder a file."""
    if path.suffix:
        (path / "in the way").mkdir(parents=True)
    else:
        path.write_text("in the way")


def unblock(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def assert_all_is_written(run_dir: Path, epochs: int) -> None:
    assert column(run_dir, "update") == list(range(1, 4 * epochs + 1))
    assert [int(row["epoch"]) for row in read_csv(run_dir / "log.csv")] == list(range(epochs + 1))
    assert (run_dir / "curves.png").stat().st_size > 100


@pytest.mark.parametrize("name", NAMES)
def test_a_log_or_picture_that_cannot_be_written_is_reported_once_and_written_later(tmp_path, caplog, name):
    block(tmp_path / name)
    run = small_run(tmp_path, RunSettings(epochs=3, save_every=1))

    def validate(network):
        if run.epoch == 2:
            unblock(tmp_path / name)
        return 0.0, {}

    fit(run, validate=validate)
    run.report_best()
    reports = [record.getMessage() for record in caplog.records]
    assert len([report for report in reports if report.startswith(f"{tmp_path / name}: cannot be written (")]) == 1
    assert not any("to the end" in report for report in reports)
    assert_all_is_written(tmp_path, 3)
    found = [event.step for event in events(tmp_path).Scalars("step/loss")]
    assert found == list(range(9 if name == "tensorboard" else 1, 13))


def test_a_table_of_steps_that_another_program_saves_in_its_own_form_ends_no_training(tmp_path):
    run = small_run(tmp_path, RunSettings(epochs=2))

    def validate(network):
        (tmp_path / "steps.csv").write_text("update;loss\n1;2;3\n4;5;6;7,8\n", encoding="utf-16")
        return 0.0, {}

    fit(run, validate=validate)
    assert len(run.history) == 3  # with epoch 0


def test_what_could_not_be_written_to_the_end_is_reported_and_written_by_a_resumed_run(tmp_path, caplog):
    for name in NAMES:
        block(tmp_path / name)
    run = small_run(tmp_path, RunSettings(epochs=1))
    fit(run)
    run.report_best()
    assert "curves.png, log.csv, steps.csv, tensorboard could not be written to the end" in caplog.text
    for name in NAMES:
        unblock(tmp_path / name)
    run = small_run(tmp_path, RunSettings(epochs=1))
    run.resume({})
    assert_all_is_written(tmp_path, 1)


def test_half_a_row_on_a_full_disk_is_taken_back_and_written_whole_later(tmp_path, monkeypatch):
    log, full = written_journal(tmp_path, [1]), []

    class Disk(io.FileIO):
        def write(self, data):
            if full:
                super().write(data[:5])
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(journal, "open", lambda path, mode: Disk(path, mode), raising=False)
    full.append(True)
    log.step({"update": 2} | ROW)
    log.flush()
    assert column(tmp_path, "update") == [1]
    full.clear()
    log.flush()
    assert column(tmp_path, "update") == [1, 2]


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([{"epoch": 0, "top1_clean": 0.25, "seconds": 900}], "epoch 0/5  top-1 T  clean 25.00 %"),
        (
            [{"epoch": 0, "seconds": 900}, {"epoch": 1, "loss": 2, "accuracy": 0.5, "top1_cross": 1.0, "seconds": 75}],
            "epoch 1/5  loss 2.0000  accuracy 50.00 %  top-1 T  cross 100.00 %  5 min left",  # without epoch 0
        ),
        (
            [{"epoch": epoch, "seconds": 10**epoch} for epoch in range(1, 5)],
            "epoch 4/5  top-1 T  62 min left",  # (100 + 1000 + 10000) / 3 seconds
        ),
        ([{"epoch": 4, "seconds": 59}], "epoch 4/5  top-1 T  less than 1 min left"),
        ([{"epoch": 5, "seconds": 900, "images_per_second": 99.6}], "epoch 5/5  top-1 T  100 images/s"),
    ],
)
def test_an_epochs_line_is_in_percent_and_ends_with_the_minutes_left_by_the_last_three_epochs(rows, expected):
    assert journal.epoch_line(rows, 5, "T") == expected
