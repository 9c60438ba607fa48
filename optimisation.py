"""What changes the weights: precision, learning rates, the average of the weights, one update of all of them."""

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from checkpoints import restore
from common import UserError, first_line, rank_and_world, warn_once

NORMS = nn.modules.batchnorm._BatchNorm  # the base of BatchNorm in any dimension, and of SyncBatchNorm


def precision(device: torch.device, amp: str | None) -> torch.dtype | None:
    """The type that `amp` selects: "auto" is bfloat16 where the device multiplies in it, else float16 on a CUDA GPU and
    float32 elsewhere; "bf16" and "fp16" are those two, "bf16" on any CPU too; None is float32, for which this returns
    None.

    Raises UserError for anything else, or where the device cannot.
    """
    if amp == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if amp == "auto" and device.type == "cpu" and multiplies_bfloat16():
        return torch.bfloat16
    if amp in ("auto", None):
        return None
    if amp not in ("bf16", "fp16"):
        raise UserError(f"AMP = {amp!r}: expected 'auto', 'bf16', 'fp16' or None")
    if device.type == "mps":
        raise UserError(f"AMP = {amp!r}: on a Mac's GPU networks are trained in float32; set AMP to 'auto' or None")
    if amp == "fp16" and device.type != "cuda":
        raise UserError("AMP = 'fp16': float16 is for GPUs; 'bf16' or None works on the CPU")
    return torch.bfloat16 if amp == "bf16" else torch.float16


def multiplies_bfloat16() -> bool:
    """Whether the CPU has units for products of bfloat16 matrices: AMX, in Intel's Xeons since 2023. On CPUs without,
    bfloat16 is slower than float32, even where AVX-512 has instructions for it. False where torch is too old to tell.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities.get("amx_bf16", False)


def autocast(device: torch.device, amp: str | None) -> torch.autocast:
    """The forward pass in the precision that `amp` selects."""
    dtype = precision(device, amp)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def record(network: nn.Module, shape: tuple[int, ...], device: torch.device, amp: str | None) -> None:
    """Replay `network`'s forward and backward pass in training as CUDA graphs from now on, on one GPU.

    Launched one by one, the network's thousands of kernels keep a fast GPU waiting; a recorded pass is launched as one,
    with the same results. shape: of a batch of images, (B, 3, H, W). Batches of another shape, and eval mode, take the
    usual way; so does everything, with a warning, where recording fails. To be called in the mode of the training, and
    before any loader pins memory in a thread of its own.
    """
    plain, statistics = network.forward, [buffer.clone() for buffer in network.buffers()]
    example = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    dtype = precision(device, amp)
    # The cache of autocast would keep copies of the weights as they were when recorded.
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
        try:
            torch.cuda.make_graphed_callables(network, (example,), allow_unused_input=True)
        except RuntimeError as error:
            warn_once(f"COMPILE = 'auto': CUDA graphs do not work here, so steps take longer ({first_line(error)})")
            network.forward = plain
    # Recording runs on a stream of its own, to which the nodes that collect the gradients belong from then on.
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
    replayed = network.forward
    for buffer, before in zip(network.buffers(), statistics, strict=True):  # which the trial runs have changed
        buffer.copy_(before)

    def forward(images: Tensor) -> Tensor:
        return (replayed if network.training and images.shape == example.shape else plain)(images)

    network.forward = forward


def recordable(device: torch.device, accumulate: int) -> bool:
    """Whether `record` may be used: on one GPU. A replayed backward pass writes each gradient to the same place again,
    so gradients cannot be added up over several passes, nor averaged over processes while the pass runs."""
    return device.type == "cuda" and rank_and_world()[1] == 1 and accumulate == 1


def trainable(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def set_training(model: nn.Module, frozen_batchnorm: bool) -> None:
    """Training mode. frozen_batchnorm: BatchNorm normalises by the stored statistics and leaves them as they are."""
    model.train()
    for module in model.modules():
        if frozen_batchnorm and isinstance(module, NORMS):
            module.eval()


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Learning rates times a factor per step: linear up to 1 over `warmup_steps`, then half a cosine down to 0."""
    warmup_steps = min(warmup_steps, total_steps // 2)  # a short run still has a way down

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1)))

    return LambdaLR(optimizer, factor)


class MovingAverage(AveragedModel):
    """A copy of `model` whose weights follow: w <- d w + (1 - d) new, d = min(decay, (1 + n) / (10 + n)) at update n,
    so that a short run's average is not mostly its start. BatchNorm's statistics, averages already, are copied."""

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model)
        self.decay = decay
        self.n_averaged.fill_(1)  # the next update

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """As AveragedModel's, which copies its counter to the GPU for each update, and waits."""
        n = int(self.n_averaged)  # on the CPU
        averaged, new = list(self.module.parameters()), list(model.parameters())
        torch._foreach_lerp_(averaged, new, 1 - min(self.decay, (1 + n) / (10 + n)))
        for averaged, new in zip(self.module.buffers(), model.buffers(), strict=True):
            averaged.copy_(new)
        self.n_averaged += 1


@dataclass
class Update:
    """One update of the weights while its batches go through."""

    sizes: list[int]  # items in each of its batches
    values: list[dict[str, Tensor]] = field(default_factory=list)  # loss and other means of the batches done, 0-dim
    images: int = 0  # so far
    loading: float = 0.0  # seconds spent waiting for data
    training: float = 0.0  # seconds of the steps without that
    norm: float = math.nan  # of the gradient; it and the next two are known from `finish` on
    losses: list[float] = field(default_factory=list)  # of each batch
    means: dict[str, float] = field(default_factory=dict)  # of the values, over all items

    def share(self) -> float:
        """Of the update's items, those in the batch at hand."""
        return self.sizes[len(self.values)] / sum(self.sizes)

    def at_last(self) -> bool:
        """Whether the batch at hand is the last one."""
        return len(self.values) + 1 == len(self.sizes)

    def complete(self) -> bool:
        """Whether all batches are done."""
        return len(self.values) == len(self.sizes)

    def finish(self, norm: Tensor) -> None:
        """Fetch the values and the `norm` of the gradient, all in one copy: each would wait for the GPU."""
        names = list(self.values[0])
        scalars = [norm, *(values[name] for values in self.values for name in names)]
        self.norm, *numbers = torch.stack(scalars).tolist()
        columns = {name: numbers[i :: len(names)] for i, name in enumerate(names)}
        self.losses = columns["loss"]
        shares = [size / sum(self.sizes) for size in self.sizes]
        for name, column in columns.items():
            self.means[name] = sum(share * mean for share, mean in zip(shares, column, strict=True))

    def finite(self) -> bool:
        return math.isfinite(self.norm) and all(map(math.isfinite, self.losses))

    def speed(self) -> dict[str, float]:
        """Images per second, and the share of the time that went into waiting for them."""
        seconds = self.loading + self.training
        return {"images_per_second": self.images / seconds, "loading": self.loading / seconds}


class Learner:
    """The networks and what trains them: optimizer, schedule, the scaler of float16, the average of the weights.

    networks: "model" and what else is trained. ema_decay 0: no average, `ema` is None.
    An update: `start_update`, then `backward` for each of its batches, `clip` and `end_update`.
    """

    def __init__(
        self,
        networks: dict[str, nn.Module],
        optimizer: Optimizer,
        scheduler: LambdaLR,
        *,
        device: torch.device,
        amp: str | None,
        ema_decay: float,
    ):
        self.networks, self.optimizer, self.scheduler = networks, optimizer, scheduler
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision(device, amp) == torch.float16)
        self.ema = MovingAverage(networks["model"], ema_decay) if ema_decay else None
        self._statistics: list[Tensor] = []  # BatchNorm's means and variances that this epoch changes
        self._before: list[Tensor] = []  # their values before the update

    def parts(self) -> dict:
        """Everything that has a state, by its name in last.pt."""
        parts = self.networks | {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}
        return parts | ({"ema": self.ema} if self.ema else {})

    def rates(self) -> dict[str, float]:
        """The learning rate of each group of parameters."""
        return {f"{group['name']}_lr": group["lr"] for group in self.optimizer.param_groups}

    def start_epoch(self) -> None:
        """Find the statistics that change; to be called once the networks are in training mode."""
        layers = [m for network in self.networks.values() for m in network.modules() if isinstance(m, NORMS)]
        self._statistics = [t for layer in layers if layer.training for t in (layer.running_mean, layer.running_var)]

    def start_update(self) -> None:
        self._before = [statistic.clone() for statistic in self._statistics]

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def clip(self, limit: float) -> Tensor:
        """Scale the gradient of all parameters together down to the norm `limit`; its norm before that, 0-dim."""
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return nn.utils.clip_grad_norm_(parameters, limit)

    def may_overflow(self) -> bool:
        """Whether a gradient that is not finite can be float16's range alone: the scale is then halved."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def end_update(self, finite: bool) -> None:
        """Change weights, learning rates and average; if the update is not `finite`, undo BatchNorm's changes."""
        if finite:
            self.scaler.step(self.optimizer)
            self.scheduler.step()
            if self.ema:
                self.ema.update_parameters(self.networks["model"])
        elif self._statistics:
            torch._foreach_copy_(self._statistics, self._before)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def restore(self, path: Path, saved: dict) -> None:
        """Load all parts from the checkpoint `saved`, but keep this run's base learning rates and weight decay, which
        the user may have changed. Raises UserError as `checkpoints.restore` does."""
        rates, decays = self.scheduler.base_lrs, [group["weight_decay"] for group in self.optimizer.param_groups]
        parts = self.parts()
        if not saved.get("scaler", True):
            del parts["scaler"]  # of a run without float16, which has no scale to go on from
        restore(path, saved, parts)
        self.scheduler.base_lrs = rates
        for group, rate, decay, factor in zip(
            self.optimizer.param_groups, rates, decays, self.scheduler.lr_lambdas, strict=True
        ):
            group["initial_lr"], group["lr"] = rate, rate * factor(self.scheduler.last_epoch)
            group["weight_decay"] = decay
