"""What both training scripts share: device and processes, schedule, checkpoints, the log, and what surrounds a step."""

import atexit
import contextlib
import logging
import math
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.util import Finalize
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoints import read_checkpoint, restore, save_checkpoint, write_json
from common import RANGES, UserError, derived_seed, in_range, is_main, rank_and_world, warn_once
from journal import Journal, Meter

log = logging.getLogger(__name__)

PREFETCH = 4  # batches that each worker prepares ahead
BAD_IN_A_ROW = 3  # steps without a finite loss after which a run stops


# --- device and processes ---------------------------------------------------------------------------------------------


def parallel(network: nn.Module) -> nn.Module:
    """`network`, its gradients averaged over the processes under torchrun; on GPUs BatchNorm then sees all of a batch
    (Ioffe & Szegedy 2015 on the whole mini-batch), on the CPU each process only its own part."""
    if rank_and_world()[1] == 1 or not any(parameter.requires_grad for parameter in network.parameters()):
        return network
    device = next(network.parameters()).device
    if device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)


def gather(*parts: Tensor) -> tuple[Tensor, ...]:
    """Each (n, ...) of each process -> (N, ...) of all, in the order of the batch; in a single process as they are.

    A loss over the gathered rows is the whole batch's, the same number in each process. Its gradient reaches this
    process's rows only, and `parallel` averages over processes: hence the factor.
    """
    rank, world = rank_and_world()
    if world == 1:
        return parts
    counts = [torch.zeros(1, dtype=torch.int64, device=parts[0].device) for _ in range(world)]
    dist.all_gather(counts, torch.full_like(counts[0], len(parts[0])))
    counts = torch.cat(counts).tolist()
    whole = []
    for rows in parts:
        padded = F.pad(rows.detach(), [0, 0] * (rows.dim() - 1) + [0, max(counts) - len(rows)]).contiguous()
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        gathered = [other[:count] for other, count in zip(gathered, counts, strict=True)]
        if rows.requires_grad:
            rows.register_hook(lambda gradient: gradient * world)
        gathered[rank] = rows
        whole.append(torch.cat(gathered))
    return tuple(whole)


def precision(device: torch.device, amp: str | None) -> torch.dtype | None:
    """What AMP stands for: "auto" is bfloat16 where the GPU has it, else float16, and float32 on the CPU; "bf16" and
    "fp16" ask for one, "bf16" on the CPU too; None is float32, for which this returns None.

    Raises ValueError for anything else, or where the device cannot.
    """
    cuda = device.type == "cuda"
    if amp is None or (amp == "auto" and not cuda):
        return None
    if amp == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if amp not in ("bf16", "fp16"):
        raise UserError(f"AMP = {amp!r}: expected 'auto', 'bf16', 'fp16' or None")
    if amp == "fp16" and not cuda:
        raise UserError("AMP = 'fp16': float16 is for GPUs; 'bf16' or None works on the CPU")
    return torch.bfloat16 if amp == "bf16" else torch.float16


def autocast(device: torch.device, amp: str | None) -> torch.autocast:
    """The forward pass in the precision that `amp` stands for."""
    dtype = precision(device, amp)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def train_loader(dataset, batches, num_workers: int, device: torch.device) -> DataLoader:
    """The batches of `batches` (see samplers.ShuffledBatches), from workers that live on between epochs."""
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        prefetch_factor=PREFETCH if num_workers else None,
        worker_init_fn=_survive_first_signal,
        # The loader draws a base seed for its workers; from a generator of its own it leaves dropout's stream alone.
        generator=torch.Generator(),
    )
    # Python's exit needs the first: by the second torch shuts no workers down any more. A process that multiprocessing
    # started, as benchmark.py does, runs the second alone.
    atexit.register(_end_workers, weakref.ref(loader))
    Finalize(None, _end_workers, (weakref.ref(loader),), exitpriority=100)  # before its queues close, at 10
    return loader


def _survive_first_signal(worker: int) -> None:
    """A terminal, or a cluster, signals all processes of a job; the main one needs its workers to end the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The first only: the main process ends its workers by this signal.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def _end_workers(loader: weakref.ref) -> None:
    """End the workers of a loader that still lives when Python exits, as one in a reference cycle may.

    Python would send them a single SIGTERM, which they outlive, and then wait for them for ever.
    """
    if loader() is not None and loader()._iterator is not None:
        loader()._iterator._shutdown_workers()  # torch has no public way


# --- optimisation -----------------------------------------------------------------------------------------------------


def trainable(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Learning rates times a factor per step: linear up to 1 over `warmup_steps`, then half a cosine down to 0."""
    warmup_steps = min(warmup_steps, total_steps // 2)  # a short run still has a way down

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1)))

    return LambdaLR(optimizer, factor)


def freeze_batchnorm(model: nn.Module) -> None:
    """Put the BatchNorm layers into eval mode: normalise by the stored statistics and leave them as they are."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of `model` whose weights follow: w <- d w + (1 - d) new, d = min(decay, (1 + n) / (10 + n)) at update n,
    so that a short run's average is not mostly its start. BatchNorm's statistics, averages already, are copied."""

    def average(averaged: Tensor, new: Tensor, updates: Tensor | int) -> Tensor:
        n = int(updates)
        return averaged.lerp(new, 1 - min(decay, (1 + n) / (10 + n)))

    average_of = AveragedModel(model, avg_fn=average)
    average_of.n_averaged.fill_(1)  # at 0 the first update would copy, and forget where the model started
    return average_of


# --- files ------------------------------------------------------------------------------------------------------------


def start_run(run_dir: Path, resume: bool, constants: dict) -> None:
    """Check what every run needs, before anything slow, and note the script's CAPITALS in `run_dir`/constants.json.

    Raises UserError for a constant out of range, or if `run_dir` holds an earlier run and `resume` is off: nothing is
    overwritten.
    """
    if not resume and any((run_dir / name).exists() for name in ("best.pt", "last.pt")):
        raise UserError(
            f"{run_dir}: holds the checkpoints of an earlier run; set RESUME = True to go on with it, "
            "or give RUN_DIR another name"
        )
    plain = (bool, int, float, str, Path, tuple, type(None))  # not torch.nn.functional as F
    capitals = {name: value for name, value in constants.items() if name.isupper() and isinstance(value, plain)}
    for name, (kind, low, high) in RANGES.items():
        if name not in capitals:
            continue
        value = capitals[name]
        if not in_range(value, kind, low, high):
            article = "a whole number" if kind is int else "a number"
            raise UserError(f"{name} = {value!r}: expected {article}, {low}..{high}")
    if not resume and is_main():
        write_json(run_dir / "constants.json", {n: str(v) if isinstance(v, Path) else v for n, v in capitals.items()})


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
    amp: str | None = None  # see `precision`


@dataclass
class _Update:
    """One update of the weights while its batches go through: what `Run.step` adds up, and how it can be undone."""

    images: list[int] = field(default_factory=list)  # of each batch
    shares: list[float] = field(default_factory=list)  # of the update's items in each batch
    values: list[dict[str, Tensor]] = field(default_factory=list)  # loss and other means of each batch, 0-dim
    waited: float = 0.0  # seconds for data
    seconds: float = 0.0  # in all
    statistics: list[Tensor] = field(default_factory=list)  # BatchNorm's, before the update


@dataclass
class _Batch:
    """The batch at hand."""

    images: int
    share: float  # of the update's items
    ends_update: bool
    loaded: float  # when it came, by time.perf_counter


class Run:
    """One training run: its progress, what surrounds each step, and its files in `run_dir`.

        for epoch in run.epochs():
            for batch in run.steps():
                run.step(loss of batch)
            run.finish_epoch(validate)

    facts: plain types that the checkpoint shall know; networks: "model" and what else is trained and saved, without
    `parallel` around them (the wrapped ones go into `wrapped`). loader: of `train_loader`. Epochs count from 1; 0 is
    the network as loaded. A step is one batch, an update the step of the optimizer after `accumulate` of them.

    Whatever an epoch draws comes from (SEED, epoch, batch), never from where a generator happens to stand: a run that
    is killed and resumed therefore repeats, on the CPU bit for bit, what it would have done.
    """

    def __init__(
        self,
        run_dir: Path,
        facts: dict,
        networks: dict[str, nn.Module],
        optimizer: Optimizer,
        scheduler: LambdaLR,
        loader: DataLoader,
        *,
        device: torch.device,
        settings: RunSettings,
        wrapped: Iterable[nn.Module] = (),
    ):
        self.run_dir, self.networks, self.optimizer, self.scheduler = run_dir, networks, optimizer, scheduler
        self.loader, self.device, self.settings, self.journal = loader, device, settings, Journal(run_dir)
        self.wrapped = [network for network in wrapped if isinstance(network, DistributedDataParallel)]
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision(device, settings.amp) == torch.float16)
        self.ema = moving_average(networks["model"], settings.ema_decay) if settings.ema_decay else None
        holdout = len(facts["holdout"])
        selected_on = f"{holdout} persons held out of train" if holdout else "val"
        self.facts = facts | {
            "ema_decay": settings.ema_decay,
            "accumulate": settings.accumulate,
            "steps": len(loader),
            "selected_on": selected_on,
        }
        self.history: list[dict] = []  # a row per epoch
        self.best = {"epoch": -1, "top1": -1.0}
        self.best_ema = {"epoch": -1, "top1": -1.0}
        self.epoch, self.batch, self.updates = 0, 0, 0  # the present epoch; batches of it, updates of the run done
        self.meter, self.rates, self.skipped, self.bad_in_a_row = Meter(), {}, 0, 0
        self._bar: tqdm | None = None
        self._statistics: list[Tensor] = []  # BatchNorm's, which a skipped update gives back
        self._batch: _Batch | None = None  # the one at hand, and the update that it belongs to
        self._update: _Update | None = None
        self._ready = 0.0  # when the wait for data began, by time.perf_counter
        self._check_disk()

    # --- the loop ---

    def epochs(self) -> Iterator[int]:
        """The epochs still to run; no more once none of the last `patience` was the best."""
        while self.epoch < self.settings.epochs:
            waited = self.epoch - max(self.best["epoch"], self.best_ema["epoch"])
            if self.settings.patience and waited >= self.settings.patience and not self.batch:
                print(f"stopped early: {waited} epochs without a better top-1 (PATIENCE = {self.settings.patience})")
                return
            self.epoch += 1
            self.loader.dataset.set_epoch(self.epoch)
            self.loader.batch_sampler.set_epoch(self.epoch, skip=self.batch)
            yield self.epoch

    def steps(self) -> Iterator[tuple[Tensor, ...]]:
        """The epoch's remaining batches, on the device, images in channels_last. Each has to be followed by `step`.

        Saves every `save_every` updates, and when Ctrl-C or SIGTERM asks to stop: raises KeyboardInterrupt then.
        """
        sizes = [len(batch) for batch in self.loader.batch_sampler.batches()]
        rank = rank_and_world()[0]
        norms = (nn.modules.batchnorm._BatchNorm,)
        layers = [m for network in self.networks.values() for m in network.modules() if isinstance(m, norms)]
        self._statistics = [t for m in layers if m.training for t in (m.running_mean, m.running_var)]
        title = f"epoch {self.epoch}/{self.settings.epochs}"
        self._bar = tqdm(total=len(sizes), initial=self.batch, desc=title, unit="batch", leave=False, disable=rank > 0)
        with self._bar, _stop_requests() as stop:
            self._ready = time.perf_counter()
            for batch in self.loader:
                loaded = time.perf_counter()
                first = self.batch - self.batch % self.settings.accumulate
                group = sizes[first : first + self.settings.accumulate]
                self._batch = _Batch(
                    images=sizes[self.batch] * sum(part.dim() == 4 for part in batch),
                    share=sizes[self.batch] / sum(group),
                    ends_update=self.batch + 1 == first + len(group),
                    loaded=loaded,
                )
                if self.batch == first:
                    self._update = _Update(statistics=[statistic.clone() for statistic in self._statistics])
                for network in self.wrapped:
                    network.require_backward_grad_sync = self._batch.ends_update  # what DDP.no_sync() sets
                # Dropout draws per batch, too, and other masks in each process.
                torch.manual_seed(derived_seed(self.facts["seed"], self.epoch, self.batch, rank))
                yield tuple(self._to_device(part) for part in batch)
                self._bar.update()
                if not self._batch.ends_update:
                    continue
                stopping = self._any_process(bool(stop))
                if stopping or (self.settings.save_every and self.updates % self.settings.save_every == 0):
                    self.save()
                if stopping:
                    raise KeyboardInterrupt(
                        f"stopped after batch {self.batch} of {len(sizes)} in epoch {self.epoch}, saved "
                        f"{self.run_dir / 'last.pt'}; set RESUME = True to go on from there"
                    )
                self._ready = time.perf_counter()  # saving is no waiting for data

    def step(self, loss: Tensor, **values: Tensor) -> None:
        """Backward; with the last batch of an update clip the gradient, update weights, learning rates and averages.

        loss: the mean over the whole batch, all processes' parts of it; values: more 0-dim means to log.
        An update whose losses or gradient are not finite is skipped: weights and BatchNorm statistics stay as they
        were, and the files are told. Raises FloatingPointError at the third in a row.
        """
        batch, update = self._batch, self._update
        self.scaler.scale(loss * batch.share).backward()
        update.images.append(batch.images)
        update.shares.append(batch.share)
        update.values.append({"loss": loss.detach()} | values)
        self.batch += 1
        now = time.perf_counter()
        update.waited += batch.loaded - self._ready
        update.seconds += now - self._ready
        self._ready = now
        if batch.ends_update:
            self._end_update(update)

    def _end_update(self, update: _Update) -> None:
        started = time.perf_counter()
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.grad_clip)
        names = list(update.values[0])
        # One copy from the device for everything: each would wait for the GPU.
        numbers = torch.stack([norm, *(values[name] for values in update.values for name in names)]).tolist()
        norm, losses = numbers[0], numbers[1 :: len(names)]
        row = {"update": self.updates + 1, "epoch": self.epoch, "batch": self.batch}
        for i, name in enumerate(names):
            means = numbers[1 + i :: len(names)]
            row[name] = sum(share * mean for share, mean in zip(update.shares, means, strict=True))
        rates = {f"{group['name']}_lr": group["lr"] for group in self.optimizer.param_groups}
        finite = math.isfinite(norm) and all(map(math.isfinite, losses))
        # float16 overflows where the scale is too large: the scaler halves it, and nothing is wrong with the run.
        overflow = self.scaler.is_enabled() and all(map(math.isfinite, losses)) and self.scaler.get_scale() > 1
        if finite:
            self.scaler.step(self.optimizer)
            self.scheduler.step()
            if self.ema:
                self.ema.update_parameters(self.networks["model"])
        elif self._statistics:
            torch._foreach_copy_(self._statistics, update.statistics)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1

        now = time.perf_counter()
        update.seconds += now - started
        self._ready = now
        images = sum(update.images)
        speed = {"images_per_second": images / update.seconds, "loading": update.waited / update.seconds}
        if is_main():
            self.journal.step(row | {"gradient_norm": norm} | rates | speed | {"skipped": int(not finite)})
        self.meter.add_time(images, update.seconds, update.waited)
        if finite:
            self.meter.add(images, gradient_norm=norm, **{name: row[name] for name in names})
            self.rates = rates
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self.meter}, lr {next(iter(rates.values())):.1e}")
        self.bad_in_a_row = 0 if finite or overflow else self.bad_in_a_row + 1
        if not finite and not overflow:
            self._report_skipped(losses, norm, len(update.values))

    def _report_skipped(self, losses: list[float], norm: float, count: int) -> None:
        """Name the files of the update's `count` batches."""
        self.skipped += 1
        batches = self.loader.batch_sampler.batches()[self.batch - count : self.batch]
        files = [str(path) for batch in batches for index in batch for path in self.loader.dataset.files(index)]
        bad = next((loss for loss in losses if not math.isfinite(loss)), None)
        what = f"the loss is {bad}" if bad is not None else f"the norm of the gradient is {norm}"
        told = f"epoch {self.epoch}, batch {self.batch}: {what}"
        log.warning(f"{told}; the step is skipped, its files:\n  " + "\n  ".join(files))
        if self.bad_in_a_row >= BAD_IN_A_ROW:
            if is_main():
                self.journal.flush()
            raise UserError(
                f"{told}, {BAD_IN_A_ROW} times in a row; the last good checkpoint is kept. Look at the files "
                "named above; if they are fine, lower the learning rates and set RESUME = True"
            )

    def finish_epoch(self, validate: Callable[[nn.Module], tuple[float, dict]]) -> None:
        """Evaluate the model, and its average if there is one; save last.pt, what is the best so far (the earlier where
        equal) as best.pt and best_ema.pt, and the log."""
        if self.epoch == 0 and is_main():
            self.journal.rewind(0)  # of an earlier run whose checkpoints were deleted
        top1, row = validate(self.networks["model"])
        if self.meter.seen:
            row = self.meter.means() | self.rates | {"skipped": self.skipped} | row
        shown = f"top-1 {top1:.4f}{self._keep_best(self.best, top1, row, 'best.pt', self.networks)}"
        if self.ema:
            # Before the first step the average is the model.
            ema_top1, ema_row = validate(self.ema.module) if self.epoch else (top1, row)
            star = self._keep_best(self.best_ema, ema_top1, ema_row, "best_ema.pt", {"model": self.ema.module})
            row = row | {f"ema_{name}": value for name, value in ema_row.items()}
            shown += f"  averaged {ema_top1:.4f}{star}"
        shown += "".join(f"  {name} {row[f'top1_{name}']:.4f}" for name in ("cross", "clean") if f"top1_{name}" in row)
        self.history.append({"epoch": self.epoch, "top1": top1} | row)
        self._warn_of_photos()
        self.meter, self.batch, self.skipped = Meter(), 0, 0
        self.save()
        if is_main():
            self.journal.epoch(self.history)
        means = "".join(f"  {name} {row[name]:.4f}" for name in ("loss", "accuracy") if name in row)
        speed = f"  {row['images_per_second']:.0f} images/s" if "images_per_second" in row else ""
        print(f"epoch {self.epoch}/{self.settings.epochs}{means}  {shown}{speed}", flush=True)

    def _keep_best(self, best: dict, top1: float, row: dict, name: str, parts: dict) -> str:
        """Save `parts` and note it in `best` if `top1` is higher and `row` tells no forgetting; returns a mark for it.

        Forgetting: top-1 among undistorted photos under that of the network as loaded by more than `max_clean_drop`.
        """
        if top1 <= best["top1"]:
            return ""
        drop = 100 * (self.history[0].get("top1_clean", 0) - row.get("top1_clean", 0)) if self.epoch else 0
        if drop > self.settings.max_clean_drop + 1e-6:
            return f" (forgot {drop:.1f} points of clean photos, not kept)"
        best.update(epoch=self.epoch, top1=top1)
        self._save(name, {"top1": top1}, parts)
        return " *"

    def _warn_of_photos(self) -> None:
        """A network that finds photos better than the one loaded, and persons worse, has learned the wrong thing."""
        first, last = self.history[0], self.history[-1]
        same = f"top1_{self.facts.get('template')}"
        if not {same, "top1_cross"} <= first.keys() & last.keys():
            return
        if last[same] > first[same] and last["top1_cross"] < first["top1_cross"]:
            warn_once(
                f"epoch {self.epoch} finds photos better than the network as loaded (same: {first[same]:.4f}, now "
                f"{last[same]:.4f}), and persons worse (cross: {first['top1_cross']:.4f}, now {last['top1_cross']:.4f})"
            )

    def report_best(self) -> None:
        """Print which epoch was best."""
        for best, name in ((self.best, "best.pt"), (self.best_ema, "best_ema.pt")):
            which = f"epoch {best['epoch']}" if best["epoch"] else "the network as loaded, no epoch was better"
            if best["epoch"] >= 0:
                print(f"best: {which}, top-1 {best['top1']:.4f} on {self.facts['selected_on']}: {self.run_dir / name}")

    # --- checkpoints ---

    def _parts(self) -> dict:
        parts = self.networks | {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}
        return parts | ({"ema": self.ema} if self.ema else {})

    def _save(self, name: str, facts: dict, parts: dict) -> None:
        if is_main():
            save_checkpoint(self.run_dir / name, self.facts | {"epoch": self.epoch} | facts, parts)

    def save(self) -> None:
        """Write last.pt: everything that `resume` needs, after any update."""
        if is_main():
            self.journal.flush()
        progress = {"epoch": self.epoch - (self.batch > 0), "batch": self.batch, "updates": self.updates}
        progress |= {"meter": self.meter.state_dict(), "skipped": self.skipped, "bad_in_a_row": self.bad_in_a_row}
        progress |= {"history": self.history, "best": self.best, "best_ema": self.best_ema}
        progress |= {"rates": self.rates, "top1": self.history[-1]["top1"]}
        self._save("last.pt", progress, self._parts())

    def resume(self) -> None:
        """Restore everything from last.pt.

        Raises what `read_checkpoint` and `restore` raise; ValueError if the data or the image differs from that run's.
        """
        path = self.run_dir / "last.pt"
        if not path.is_file():
            raise UserError(f"{path}: no checkpoint to resume; set RESUME = False to start the run")
        saved = read_checkpoint(path)
        for name, now in self.facts.items():
            if saved.get(name) != now:
                then = saved.get(name)
                told = f"{then} then, {now} now" if name not in ("persons", "holdout") else "other persons than then"
                raise UserError(
                    f"{path}: cannot be resumed, {name} has changed ({told}); start a run of another RUN_DIR"
                )
        rates = self.scheduler.base_lrs
        restore(path, saved, self._parts())
        # This run's constants, not those saved: what the loss turned NaN at may be lowered.
        self.scheduler.base_lrs = rates
        for group, rate, factor in zip(self.optimizer.param_groups, rates, self.scheduler.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * factor(self.scheduler.last_epoch)
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.history, self.best, self.best_ema = saved["history"], saved["best"], saved["best_ema"]
        self.epoch, self.batch, self.updates = saved["epoch"], saved["batch"], saved["updates"]
        self.skipped, self.bad_in_a_row, self.rates = saved["skipped"], saved["bad_in_a_row"], saved["rates"]
        self.meter.load_state_dict(saved["meter"])
        if is_main():
            self.journal.rewind(self.updates)
        within = f", batch {self.batch} of epoch {self.epoch + 1}" if self.batch else ""
        print(f"resumed {path} after epoch {self.epoch}{within}")

    def _check_disk(self) -> None:
        """OSError, before the first step, where the checkpoints will not fit."""
        weights = sum(t.numel() * t.element_size() for n in self.networks.values() for t in n.state_dict().values())
        trained = sum(p.numel() * p.element_size() for group in self.optimizer.param_groups for p in group["params"])
        average = weights if self.ema else 0
        best, last = weights + average, weights + average + 2 * trained  # AdamW keeps two moments
        exists = (self.run_dir / "last.pt").exists()
        needed = last + (0 if exists else best + last)  # a file is written beside the one that it replaces
        folder = next(parent for parent in [self.run_dir, *self.run_dir.absolute().parents] if parent.exists())
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise UserError(
                f"{self.run_dir}: {free / 2**20:.0f} MiB free, the checkpoints need {needed / 2**20:.0f}; "
                "make room, or set RUN_DIR to another disk"
            )

    def _any_process(self, value: bool) -> bool:
        """Whether `value` is true in any process: they have to stop after the same step."""
        if rank_and_world()[1] == 1:
            return value
        flag = torch.tensor(int(value), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def _to_device(self, part: Tensor) -> Tensor:
        layout = torch.channels_last if part.dim() == 4 else torch.preserve_format
        return part.to(self.device, non_blocking=True, memory_format=layout)


@contextlib.contextmanager
def _stop_requests() -> Iterator[list]:
    """A list that Ctrl-C or SIGTERM (a cluster's notice) fills, so that the step at hand can end; a second one stops at
    once."""
    requests: list[int] = []

    def note(number: int, frame) -> None:
        if requests:
            raise KeyboardInterrupt
        requests.append(number)

    if threading.current_thread() is not threading.main_thread():  # Python takes signals there only
        yield requests
        return
    earlier = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
