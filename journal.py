"""What a training run writes for people: logs, TensorBoard events, curves; and the means of an epoch."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from checkpoints import atomic_file, write_csv
from common import first_line, list_names

log = logging.getLogger(__name__)
ACTIVITIES = ("training", "loading", "validation", "saving")  # that a run's time is spent on


class Journal:
    """What a run writes for people: steps.csv, log.csv, TensorBoard events and curves.png, all in `run_dir`.

    None of these files ends a training. One that cannot be written (it is open in Excel, a virus scanner holds it, the
    disk is full) is reported once and written later; until then last.pt keeps the `unwritten` rows of steps.csv.
    """

    def __init__(self, run_dir: Path):
        self.run_dir, self._events = run_dir, None
        self.unwritten: list[dict] = []  # rows for the end of steps.csv
        self._last_update: int | None = None  # what steps.csv holds of later ones is to be dropped first; None: nothing
        self._purge_step: int | None = None  # the same for the events
        self._failed: set[str] = set()  # files that could not be written at the last attempt

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except (
            OSError,
            ValueError,
        ) as error:  # the latter: saved by another program, or a name TensorBoard cannot take
            if name not in self._failed:
                reason = getattr(error, "strerror", None) or first_line(error)
                log.warning(
                    f"{self.run_dir / name}: cannot be written ({reason}); the training "
                    "goes on and tries again later; close the file if another program has it open"
                )
            self._failed.add(name)
            if name == "tensorboard":
                self._events = None  # its writer, once it failed, fails for good
        else:
            self._failed.discard(name)

    def rewind(self, updates: int, unwritten: Sequence[dict] = ()) -> None:
        """Forget what was written of steps after `updates`, before the first of them is done again.

        unwritten: rows of earlier steps, some of which may be missing in steps.csv.
        """
        self._last_update, self._purge_step, self.unwritten = updates, updates + 1, list(unwritten)
        self.flush()

    def step(self, row: dict) -> None:
        self.unwritten.append(row)
        with self._writing("tensorboard"):
            for name, value in row.items():
                if name not in ("update", "epoch", "batch"):
                    self._open_events().add_scalar(f"step/{name}", value, row["update"])

    def flush(self) -> None:
        """Bring the steps to disk."""
        with self._writing("steps.csv"):
            if self._last_update is not None:
                self._drop_steps(self._last_update)
                self._last_update = None
            if self.unwritten:
                self._append(self.unwritten)
                self.unwritten.clear()
        with self._writing("tensorboard"):
            self._open_events().flush()

    def _drop_steps(self, after: int) -> None:
        path = self.run_dir / "steps.csv"
        try:
            rows = [row for row in self.steps() if int(row["update"]) <= after]
        except (KeyError, ValueError):  # saved by a program that makes another table of it
            old = path.with_name("steps_old.csv")
            log.warning(f"{path}: no table of steps any more; kept as {old.name}, a new one is begun")
            os.replace(path, old)
            rows = []
        if rows:
            write_csv(path, rows)
        else:
            path.unlink(missing_ok=True)
        last = int(rows[-1]["update"]) if rows else 0
        self.unwritten = [row for row in self.unwritten if row["update"] > last]

    def _append(self, rows: list[dict]) -> None:
        import pandas  # takes half a second, which importing this module can do without

        with open(self.run_dir / "steps.csv", "ab") as file:
            size = file.seek(0, os.SEEK_END)
            # A skipped step's loss is written as "nan": `steps` takes an empty cell for a line cut short.
            table = pandas.DataFrame(rows, dtype=object)
            text = table.to_csv(header=size == 0, index=False, na_rep="nan", lineterminator="\n")
            try:
                file.write(text.encode())
                file.flush()
            except OSError:
                file.truncate(size)  # on a full disk a part may be there; all of it is written later
                raise

    def epoch(self, history: list[dict]) -> None:
        """Log the last row of `history`, one row per epoch so far."""
        self.flush()
        with self._writing("tensorboard"):
            for name, value in history[-1].items():
                if name != "epoch":
                    self._open_events().add_scalar(f"epoch/{name}", value, history[-1]["epoch"])
            self._open_events().flush()
        self.tables(history)

    def tables(self, history: list[dict]) -> None:
        """log.csv and curves.png of all epochs so far."""
        import plots  # matplotlib and scikit-learn take seconds, and only an epoch's end needs them

        with self._writing("log.csv"):
            write_csv(self.run_dir / "log.csv", history)
        with self._writing("curves.png"), atomic_file(self.run_dir / "curves.png") as file:
            plots.curves(history, self.steps()).savefig(file, format="png")

    def close(self, history: list[dict]) -> None:
        """Try once more what could not be written, and report what still cannot be."""
        if self._failed:
            self.epoch(history)
        if self._failed:
            log.warning(
                f"{self.run_dir}: {list_names(sorted(self._failed))} could not be written to the end; close what holds "
                "them and run the script with RESUME = True, which writes them"
            )

    def steps(self) -> list[dict]:
        """The rows of steps.csv, as text; a line cut short by a kill is left out."""
        path = self.run_dir / "steps.csv"
        if not path.exists() or path.stat().st_size == 0:
            return []
        import pandas

        table = pandas.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
        return table.dropna().to_dict("records")

    def _open_events(self):
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter  # takes a second, which evaluate.py can do without

            self._events = SummaryWriter(self.run_dir / "tensorboard", purge_step=self._purge_step)
            self._purge_step = None
        return self._events


class Meter:
    """Means over an epoch, weighted by the images of each step, and what its time was spent on.

    The clock runs from one row of log.csv to the next, so what is saved with a row counts for the next one. What comes
    before the first validation or a resumed step, such as the bank of stage 2, is of no epoch: see `restart`.
    """

    def __init__(self):
        self.images, self.sums = 0, {}  # of the steps that counted
        self.seen = 0  # images of all steps
        self.spent = dict.fromkeys(ACTIVITIES, 0.0)  # seconds
        self.restart()

    def add(self, images: int, values: dict[str, float]) -> None:
        self.images += images
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * images

    def lap(self, activity: str) -> float:
        """Put the seconds since the last lap down to `activity`, and return them."""
        now = time.perf_counter()
        seconds, self._lap = now - self._lap, now
        self.spent[activity] += seconds
        return seconds

    def restart(self) -> None:
        """Put the seconds since the last lap down to nothing."""
        self._lap = time.perf_counter()

    def means(self) -> dict[str, float]:
        means = {name: total / self.images for name, total in self.sums.items()}
        return means | {"images_per_second": self.seen / max(self.spent["training"] + self.spent["loading"], 1e-9)}

    def times(self) -> dict[str, float]:
        """`seconds` of the epoch, and the shares (0..1) of them that each activity took: together 1. `training` is that
        of the steps without `loading`, the wait for their images."""
        seconds = sum(self.spent.values())
        return {"seconds": seconds} | {name: spent / max(seconds, 1e-9) for name, spent in self.spent.items()}

    def state_dict(self) -> dict:
        return {"images": self.images, "sums": self.sums, "seen": self.seen, "spent": self.spent}

    def load_state_dict(self, state: dict) -> None:
        self.images, self.sums, self.seen = state["images"], state["sums"], state["seen"]
        self.spent = state["spent"]

    def __str__(self) -> str:
        means = self.means()
        loss = f"loss {means['loss']:.3f}, " if "loss" in means else ""
        accuracy = f"accuracy {100 * means['accuracy']:.1f} %, " if "accuracy" in means else ""
        return f"{loss}{accuracy}{means['images_per_second']:.1f} images/s"


def percent(share: float) -> str:
    """0.875 -> "87.50 %"."""
    return f"{100 * share:.2f} %"


def epoch_line(history: list[dict], epochs: int, top1: str) -> str:
    """What is printed of the last epoch. history: the rows of log.csv; top1: of the model and its average, with the
    marks of the best."""
    row = history[-1]
    parts = [f"epoch {row['epoch']}/{epochs}"]
    if "loss" in row:
        parts.append(f"loss {row['loss']:.4f}")
    if "accuracy" in row:
        parts.append(f"accuracy {percent(row['accuracy'])}")
    parts.append(f"top-1 {top1}")
    parts += [f"{name} {percent(row[f'top1_{name}'])}" for name in ("cross", "clean") if f"top1_{name}" in row]
    if "images_per_second" in row:
        parts.append(f"{row['images_per_second']:.0f} images/s")
    recent = [of["seconds"] for of in history[-3:] if of["epoch"] > 0]  # the speed of a machine can change meanwhile
    if recent and row["epoch"] < epochs:
        minutes = (epochs - row["epoch"]) * sum(recent) / len(recent) / 60
        parts.append(f"{minutes:.0f} min left" if minutes >= 1 else "less than 1 min left")
    return "  ".join(parts)


def time_shares(history: list[dict], meter: Meter) -> str:
    """What a run spent its time on, in one line. history: the rows of log.csv; meter: what came after the last one."""
    rows = [*history, meter.times()]
    spent = {name: sum(row[name] * row["seconds"] for row in rows) for name in ACTIVITIES}
    seconds = sum(spent.values())
    shares = ", ".join(f"{name} {spent[name] / max(seconds, 1e-9):.0%}".replace("%", " %") for name in ACTIVITIES)
    return f"time: {shares} of {seconds / 60:.1f} min"
