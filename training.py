"""A training run of either stage: its epochs and steps, its best epoch, its files, and how it stops and resumes."""

import atexit
import ctypes
import functools
import logging
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from checkpoints import (
    check_disk,
    check_facts,
    check_progress,
    check_writable,
    locked,
    read_checkpoint,
    save_checkpoint,
)
from common import (
    RANGES,
    UserError,
    check_compiler,
    derived_seed,
    in_range,
    is_main,
    pick_device,
    rank_and_world,
    warn_once,
)
from constants import check_constants, course, note_constants, plain_constants
from distributed import any_process, stop_requests
from journal import Journal, Meter, epoch_line, percent, time_shares
from loading import PhotoLoader
from optimisation import Learner, Update
from scores import check_template

log = logging.getLogger(__name__)

PREFETCH = 4  # batches that each worker prepares ahead
BAD_IN_A_ROW = 3  # steps without a finite loss after which a run stops

# Facts of a checkpoint that a resumed run does not compare: where weights lay (what they are, other facts say), and the
# constants, which constants.py compares.
NOT_COMPARED = ("pretrained", "teacher", "constants")
WEIGHTS = ("model", "head", "optimizer", "ema")  # in last.pt, what is large

_folder_lock = None  # of the folder that this process trains in


@dataclass(frozen=True)
class RunSettings:
    """How a run goes, whatever it trains; each script builds it once from its constants."""

    epochs: int  # passes over the data
    accumulate: int = 1  # batches per update of the weights
    grad_clip: float = math.inf  # largest norm of the gradient
    ema_decay: float = 0.0  # weight of the past in the average of the weights; 0: no average
    patience: int = 0  # epochs without a better one after which the run stops; 0: never
    save_every: int = 0  # updates between two saves of last.pt within an epoch; 0: none
    max_clean_drop: float = 100.0  # points of top-1 on clean photos that the best epoch may lose
    amp: str | None = None  # see optimisation.precision


def start_run(run_dir: Path, resume: bool, constants: dict, stage: int) -> dict | None:
    """Check what every run needs, before anything slow, and keep other trainings out of `run_dir` from now on.

    constants: the script's globals(). Returns what last.pt states, without its weights, if the run is to be resumed,
    else None; the CAPITALS of a new run are noted in `run_dir`/constants.json.
    Raises UserError for a constant out of range, for a folder that another process trains in, if the run to be resumed
    is not there or was made with other constants, or if there is an earlier run and `resume` is off: nothing is
    overwritten.
    """
    for name, (kind, low, high) in RANGES.items():
        if name in constants and not in_range(constants[name], kind, low, high):
            article = "a whole number" if kind is int else "a number"
            raise UserError(f"{name} = {constants[name]!r}: expected {article}, {low}..{high}")
    if "TEMPLATE" in constants:
        check_template(constants["TEMPLATE"])
    compiled = constants.get("COMPILE", False)
    if compiled not in ("auto", True, False):
        raise UserError(f"COMPILE = {compiled!r}: expected 'auto', True or False")
    if compiled is True:
        check_compiler(pick_device(), setting="COMPILE = True", way_out="COMPILE = False")
    if resume:
        _check_folder(run_dir, resume)  # before it is made
    if is_main():
        _lock_folder(run_dir)
    _check_folder(run_dir, resume)
    if not resume:
        if is_main():
            note_constants(run_dir, plain_constants(constants))
        return None
    path = run_dir / "last.pt"
    saved = read_checkpoint(path)
    check_facts(path, saved, {"stage": stage})
    check_constants(path, saved, course(constants))
    return {name: value for name, value in saved.items() if name not in WEIGHTS}


def _check_folder(run_dir: Path, resume: bool) -> None:
    """Raises UserError if a run can not be started in `run_dir`, or not be resumed; the sentence says what can be."""
    last, best = ((run_dir / name).exists() for name in ("last.pt", "best.pt"))
    if last and not resume:
        raise UserError(
            f"{run_dir}: holds the checkpoints of an earlier run; set RESUME = True to go on with it, "
            "or give RUN_DIR another name"
        )
    if best and not last:
        raise UserError(
            f"{run_dir}: holds best.pt of an earlier run, but no last.pt to go on from; give RUN_DIR another name and "
            "set RESUME = False to start a new run"
        )
    if resume and not last:
        raise UserError(f"{run_dir / 'last.pt'}: no checkpoint to resume; set RESUME = False to start the run")


def _lock_folder(run_dir: Path) -> None:
    """Keep other processes from training in `run_dir`, until this one ends or starts another run."""
    global _folder_lock
    if _folder_lock is not None:
        _folder_lock.lock.release()
    check_writable("RUN_DIR", run_dir, folder=True)
    refusal = "another training uses this folder; wait until it has ended, or give RUN_DIR another name"
    _folder_lock = locked(run_dir, refusal=refusal)


def selected_on(holdout: list[str]) -> str:
    """The photos that the best epoch is chosen on, for people and for the checkpoint."""
    return f"{len(holdout)} persons held out of train" if holdout else "val"


# --- batches ----------------------------------------------------------------------------------------------------------


def train_loader(dataset, batches, num_workers: int, device: torch.device, *, epochs: int) -> PhotoLoader:
    """The batches of `batches` (see samplers.ShuffledBatches), from workers that live on between the `epochs`."""
    ending = multiprocessing.RawValue(ctypes.c_bool, False)  # without a lock, which a signal would find held
    loader = PhotoLoader(
        dataset,
        batches,
        num_workers,
        device,
        passes=epochs,
        prefetch=PREFETCH,
        worker_init_fn=functools.partial(_outlive_signals, ending),
        # The loader draws a base seed for its workers; from a generator of its own it leaves dropout's stream alone.
        generator=torch.Generator(),
    )
    # Python's exit needs the first: it runs before torch's clean-up, which waits for workers that are left. A process
    # that multiprocessing started, as tools/benchmark.py does, runs the second alone, before it waits for its children.
    atexit.register(_end_workers, ending)
    Finalize(None, _end_workers, (ending,), exitpriority=100)
    return loader


def _outlive_signals(ending: ctypes.c_bool, worker: int) -> None:
    """A terminal, or a cluster, signals all processes of a job, but the main one needs its workers to end the step:
    they ignore SIGINT, and SIGTERM until `ending` is set."""

    def terminate(number: int, frame) -> None:
        if ending.value:
            os._exit(0)  # as torch's own handler does, which this one replaces

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminate)


def _end_workers(ending: ctypes.c_bool) -> None:
    """End the workers of a loader that still lives when Python exits, as one in a reference cycle may."""
    ending.value = True
    for child in multiprocessing.active_children():
        if child.daemon:  # Python terminates these, too, a moment later
            child.terminate()


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass
class Best:
    """The best epoch so far: the one of the highest top-1, the earlier where equal, among those that did not forget."""

    max_clean_drop: float  # points of top-1 on clean photos, against the network as loaded, that an epoch may lose
    epoch: int = -1
    top1: float = -1.0

    def update(self, epoch: int, top1: float, clean_drop: float) -> str:
        """Take `epoch` if it is better; returns what its line says about that."""
        if top1 <= self.top1:
            return ""
        if clean_drop > self.max_clean_drop + 1e-6:
            return f" (forgot {clean_drop:.1f} points of clean photos, not kept)"
        self.epoch, self.top1 = epoch, top1
        return " (best so far)"

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "top1": self.top1}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.top1 = state["epoch"], state["top1"]


def warn_of_photos(history: list[dict], template: str | None) -> None:
    """A network that finds photos better than the one loaded, and persons worse, has learned the wrong thing."""
    first, last, same = history[0], history[-1], f"top1_{template}"
    if not {same, "top1_cross"} <= first.keys() & last.keys():
        return
    if last[same] > first[same] and last["top1_cross"] < first["top1_cross"]:
        warn_once(
            f"epoch {last['epoch']} finds photos better than the network as loaded (same: {percent(first[same])}, now "
            f"{percent(last[same])}), and persons worse (cross: {percent(first['top1_cross'])}, now "
            f"{percent(last['top1_cross'])})"
        )


class Run:
    """One training run: its progress, what surrounds each step, and its files in `run_dir`.

        for epoch in run.epochs():
            for batch in run.steps():
                run.step(loss of batch)
            run.finish_epoch(validate)

    facts: plain types that the checkpoint states; a resumed run has to have the same, but for NOT_COMPARED. networks:
    "model" and what else is trained and saved, without `parallel` around them (those go into `wrapped`). loader: of
    `train_loader`. Epochs count from 1; 0 is the network as loaded. A step is one batch, an update the step of the
    optimizer after `accumulate` of them.

    Whatever an epoch draws comes from (SEED, epoch, batch), never from the present state of a generator: a run that is
    killed and resumed therefore repeats, on the CPU bit for bit, what it would have done.
    """

    # Attributes that last.pt holds, and their types.
    PROGRESS: ClassVar = {"batch": int, "updates": int, "skipped": int, "bad_in_a_row": int, "rates": dict}
    PROGRESS |= {"history": list}

    def __init__(
        self,
        run_dir: Path,
        facts: dict,
        networks: dict[str, nn.Module],
        optimizer: Optimizer,
        scheduler: LambdaLR,
        loader: PhotoLoader,
        *,
        device: torch.device,
        settings: RunSettings,
        wrapped: Iterable[nn.Module] = (),
    ):
        self.run_dir, self.facts, self.loader, self.device, self.settings = run_dir, facts, loader, device, settings
        self.wrapped = [network for network in wrapped if isinstance(network, DistributedDataParallel)]
        self.learner = Learner(
            networks, optimizer, scheduler, device=device, amp=settings.amp, ema_decay=settings.ema_decay
        )
        self.best, self.best_ema = Best(settings.max_clean_drop), Best(settings.max_clean_drop)
        self.epoch = 0  # the present one
        self.batch = 0  # batches of it that are done
        self.updates = 0  # of the whole run
        self.skipped = 0  # updates of the epoch that were not finite
        self.bad_in_a_row = 0  # such updates up to now
        self.rates: dict[str, float] = {}  # learning rates of the last update that counted
        self.history: list[dict] = []  # the rows of log.csv
        self.journal, self.meter = Journal(run_dir), Meter()
        self._saved_at = (-1, -1)  # epoch and batch of last.pt
        self._update = Update([])  # the one at hand
        self._bar = tqdm(disable=True)  # the epoch's
        check_disk(run_dir, networks, optimizer, average=self.learner.ema is not None)

    # --- the loop ---

    def epochs(self) -> Iterator[int]:
        """The epochs still to run; no more once none of the last `patience` was the best."""
        self.meter.restart()
        while self.epoch < self.settings.epochs:
            waited = self.epoch - max(self.best.epoch, self.best_ema.epoch)
            if self.settings.patience and waited >= self.settings.patience and not self.batch:
                print(f"stopped early: {waited} epochs without a better top-1 (PATIENCE = {self.settings.patience})")
                return
            self.epoch += 1
            self.loader.dataset.set_epoch(self.epoch)
            self.loader.batch_sampler.set_epoch(self.epoch, skip=self.batch)
            yield self.epoch

    def steps(self) -> Iterator[tuple[Tensor, ...]]:
        """The epoch's remaining batches, on the device, images in channels_last. Each has to be followed by `step`.

        Saves every `save_every` updates, and when Ctrl-C or SIGTERM requests a stop: raises KeyboardInterrupt then.
        """
        sizes = [len(batch) for batch in self.loader.batch_sampler.batches()]
        self.learner.start_epoch()
        self._bar = tqdm(
            total=len(sizes),
            initial=self.batch,
            desc=f"epoch {self.epoch}/{self.settings.epochs}",
            unit="batch",
            leave=False,
            disable=not is_main(),
        )
        with self._bar, stop_requests() as stop:
            for batch in self.loader:
                self._start_batch(batch, sizes)
                yield tuple(self._to_device(part) for part in batch)
                self._bar.update()
                if self._update.complete():
                    self._save_or_stop(bool(stop), len(sizes))

    def _start_batch(self, batch: Iterable[Tensor], sizes: list[int]) -> None:
        """sizes: of all batches of the epoch, undivided."""
        waited = self.meter.lap("loading")
        if self._update.complete():
            self._update = Update(sizes[self.batch : self.batch + self.settings.accumulate])
            self.learner.start_update()
        self._update.loading += waited
        self._update.images += sizes[self.batch] * sum(part.dim() == 4 for part in batch)
        for network in self.wrapped:
            network.require_backward_grad_sync = self._update.at_last()  # what DDP.no_sync() sets
        # Dropout draws per batch, too, and other masks in each process.
        torch.manual_seed(derived_seed(self.facts["seed"], self.epoch, self.batch, rank_and_world()[0]))

    def _to_device(self, part: Tensor) -> Tensor:
        layout = torch.channels_last if part.dim() == 4 else torch.preserve_format
        return part.to(self.device, non_blocking=True, memory_format=layout)

    def step(self, loss: Tensor, values: dict[str, Tensor] | None = None) -> None:
        """Backward; with the last batch of an update clip the gradient, update weights, learning rates and averages.

        loss: the mean over the whole batch, all processes' parts of it; values: more 0-dim means to log.
        An update whose losses or gradient are not finite is skipped: weights and BatchNorm statistics stay as they
        were, and its files are listed. Raises UserError at the third in a row.
        """
        update = self._update
        self.learner.backward(loss * update.share())
        update.values.append({"loss": loss.detach()} | (values or {}))
        self.batch += 1
        if update.complete():
            self._end_update(update)
        else:
            update.training += self.meter.lap("training")

    def _end_update(self, update: Update) -> None:
        update.finish(self.learner.clip(self.settings.grad_clip))
        finite, rates = update.finite(), self.learner.rates()
        overflow = not finite and all(map(math.isfinite, update.losses)) and self.learner.may_overflow()
        self.learner.end_update(finite)
        self.updates += 1
        update.training += self.meter.lap("training")
        self.meter.seen += update.images
        if finite:
            self.meter.add(update.images, {"gradient_norm": update.norm} | update.means)
            self.rates = rates
        if is_main():
            row = {"update": self.updates, "epoch": self.epoch, "batch": self.batch}
            row |= update.means | {"gradient_norm": update.norm} | rates | update.speed()
            self.journal.step(row | {"skipped": int(not finite)})
        self._bar.set_postfix_str(f"{self.meter}, lr {next(iter(rates.values())):.1e}")
        if finite or overflow:
            self.bad_in_a_row = 0
        else:
            self._report_skipped(update)

    def _report_skipped(self, update: Update) -> None:
        """List the files of the update's batches. Raises UserError at the third such update in a row."""
        self.skipped += 1
        self.bad_in_a_row += 1
        batches = self.loader.batch_sampler.batches()[self.batch - len(update.sizes) : self.batch]
        files = [str(path) for batch in batches for index in batch for path in self.loader.dataset.files(index)]
        bad = next((loss for loss in update.losses if not math.isfinite(loss)), None)
        what = f"the loss is {bad}" if bad is not None else f"the norm of the gradient is {update.norm}"
        where = f"epoch {self.epoch}, batch {self.batch}: {what}"
        log.warning(f"{where}; the step is skipped, its files:\n  " + "\n  ".join(files))
        if self.bad_in_a_row >= BAD_IN_A_ROW:
            if is_main():
                self.journal.flush()
            raise UserError(
                f"{where}, {BAD_IN_A_ROW} times in a row; the last good checkpoint is kept. Look at the files "
                "listed above; if they are fine, lower the learning rates and set RESUME = True"
            )

    def _save_or_stop(self, stop: bool, count: int) -> None:
        """Save last.pt if it is due, or if any process has to stop: all of them then do so after the same step."""
        stop = any_process(stop, self.device)
        self.meter.lap("training")
        if stop or (self.settings.save_every and self.updates % self.settings.save_every == 0):
            self.save()
        if stop:
            raise KeyboardInterrupt(
                f"stopped after batch {self.batch} of {count} in epoch {self.epoch}, saved "
                f"{self.run_dir / 'last.pt'}; set RESUME = True to go on from there"
            )

    # --- the end of an epoch ---

    def finish_epoch(self, validate: Callable[[nn.Module], tuple[float, dict]]) -> None:
        """Evaluate the model, and its average if there is one; save what is the best so far as best.pt and best_ema.pt,
        then last.pt and the log.

        last.pt is saved before, too. A run that ends from then on is resumed at this validation: the epoch is not lost,
        and never is there a best.pt without a last.pt.
        """
        if self.epoch == 0:
            self.meter.restart()
            if is_main():
                self.journal.rewind(0)  # of an earlier run whose checkpoints were deleted
        if self._saved_at != (self.epoch, self.batch):
            self.save()
        top1, row = validate(self.learner.networks["model"])
        self.meter.lap("validation")
        if self.meter.seen:
            row = self.meter.means() | self.rates | {"skipped": self.skipped} | row
        marked = percent(top1) + self._keep_best(self.best, "best.pt", top1, row, self.learner.networks)
        if self.learner.ema:
            network = self.learner.ema.module
            # Before the first step it is the model.
            ema_top1, ema_row = validate(network) if self.epoch else (top1, row)
            self.meter.lap("validation")
            marked += f"  averaged {percent(ema_top1)}"
            marked += self._keep_best(self.best_ema, "best_ema.pt", ema_top1, ema_row, {"model": network})
            row = row | {"ema_top1": ema_top1} | {f"ema_{name}": value for name, value in ema_row.items()}
        self.history.append({"epoch": self.epoch, "top1": top1} | row | self.meter.times())
        warn_of_photos(self.history, self.facts.get("template"))
        self.meter, self.batch, self.skipped = Meter(), 0, 0
        self.save()
        if is_main():
            self.journal.epoch(self.history)
        self.meter.lap("saving")
        print(epoch_line(self.history, self.settings.epochs, marked), flush=True)

    def _keep_best(self, best: Best, name: str, top1: float, row: dict, networks: dict[str, nn.Module]) -> str:
        """Save `networks` if `best` takes the epoch; returns what its line says about that."""
        drop = 100 * (self.history[0].get("top1_clean", 0) - row.get("top1_clean", 0)) if self.epoch else 0
        mark = best.update(self.epoch, top1, drop)
        if best.epoch == self.epoch:
            self._write(name, {"epoch": self.epoch, "top1": top1}, networks)
        self.meter.lap("saving")
        return mark

    def report_best(self) -> list[Path]:
        """Print which epoch was best, and what the run spent its time on; returns the checkpoints of the best."""
        if is_main():
            self.journal.close(self.history)
        kept = [
            (best, name) for best, name in ((self.best, "best.pt"), (self.best_ema, "best_ema.pt")) if best.epoch >= 0
        ]
        for best, name in kept:
            which = f"epoch {best.epoch}" if best.epoch else "the network as loaded, no epoch was better"
            print(f"best: {which}, top-1 {percent(best.top1)} on {self.facts['selected_on']}: {self.run_dir / name}")
        print(time_shares(self.history, self.meter))
        return [self.run_dir / name for _, name in kept]

    # --- checkpoints ---

    def _write(self, name: str, facts: dict, parts: dict) -> None:
        if is_main():
            save_checkpoint(self.run_dir / name, self.facts | facts, parts)

    def save(self) -> None:
        """Write last.pt: everything that `resume` needs, after any update; then the log of the steps."""
        facts = {name: getattr(self, name) for name in self.PROGRESS}
        facts |= {"epoch": self.epoch - (self.batch > 0), "top1": self.history[-1]["top1"] if self.history else None}
        facts |= {"best": self.best.state_dict(), "best_ema": self.best_ema.state_dict()}
        facts |= {"meter": self.meter.state_dict(), "unwritten": self.journal.unwritten}
        self._write("last.pt", facts, self.learner.parts())
        self._saved_at = (self.epoch, self.batch)
        if is_main():
            self.journal.flush()
        self.meter.lap("saving")

    def resume(self, constants: dict) -> None:
        """Restore everything from last.pt. constants: the script's globals().

        Raises UserError if it is damaged, if a constant or a fact differs that must not, or if a part does not fit.
        """
        path = self.run_dir / "last.pt"
        saved = read_checkpoint(path)
        changes = check_constants(path, saved, course(constants))
        check_facts(path, saved, {name: fact for name, fact in self.facts.items() if name not in NOT_COMPARED})
        counters = {name: part.state_dict() for name, part in self._counters().items()}
        check_progress(path, saved, attributes=self.PROGRESS, counters=counters)
        self.learner.restore(path, saved)
        self.epoch = saved["epoch"]
        for name in self.PROGRESS:
            setattr(self, name, saved[name])
        for name, part in self._counters().items():
            part.load_state_dict(saved[name])
        self._saved_at = (self.epoch + (self.batch > 0), self.batch)
        within = f", batch {self.batch} of epoch {self.epoch + 1}" if self.batch else ""
        print(f"resumed {path} after epoch {self.epoch}{within}")
        if changes:
            print("changed from here on: " + ", ".join(f"{name} {change}" for name, change in changes.items()))
        if is_main():
            note_constants(self.run_dir, plain_constants(constants))
            self.journal.rewind(self.updates, saved.get("unwritten", ()))
            if self.history:  # a kill can have come between last.pt and these
                self.journal.tables(self.history)

    def _counters(self) -> dict[str, Best | Meter]:
        return {"best": self.best, "best_ema": self.best_ema, "meter": self.meter}
