"""How often a step, or a batch of validation, waits for the GPU: counted on tensors that report a device of their own.

A GPU works through what it is sent while Python prepares the next step, until Python needs one of its numbers.
"""

from collections import Counter

import pytest
import torch
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import common
import training

aten = torch.ops.aten
BY_INDEX = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
)  # wait for a mask: its places are counted
DEVICE = torch.device("lazy")  # of no backend here; autograd takes no other name without a driver


class Remote(torch.Tensor):
    """A tensor that reports DEVICE; its numbers lie in `.local`, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, local: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, local.shape, strides=local.stride(), dtype=local.dtype, device=DEVICE
        )

    def __init__(self, local: torch.Tensor):
        self.local = local

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        raise AssertionError(f"{op}: Gpu is not in charge")

    def tolist(self):  # torch's refuses subclasses
        return self.cpu().tolist()


class Gpu(TorchDispatchMode):
    """Computes what concerns Remote tensors or DEVICE; `waits` counts the operations whose result Python waits for."""

    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, remote = dict(kwargs or {}), []
        if torch.is_inference_mode_enabled():  # which does not take composed operations apart
            with self:
                result = op.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        tree_map_only(Remote, remote.append, (args, kwargs))
        if waits(op, args, kwargs, remote=bool(remote)):
            self.waits[str(op)] += 1
        there = kwargs.get("device", DEVICE if remote else None) == DEVICE
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        args_here, kwargs_here = tree_map_only(Remote, lambda tensor: tensor.local, (args, kwargs))
        result = op(*args_here, **kwargs_here)
        if op._schema.is_mutable and isinstance(result, torch.Tensor):
            return args[0]
        return tree_map_only(torch.Tensor, Remote, result) if there else result


def waits(op, args: tuple, kwargs: dict, remote: bool) -> bool:
    """Whether Python waits until the GPU has the result of `op`. remote: some of its tensors lie there."""
    if op in (aten._to_copy.default, aten.copy_.default):
        to, source = (args[0].device, args[1]) if op == aten.copy_.default else (kwargs.get("device"), args[0])
        asynchronous = kwargs.get("non_blocking") or args[2:] == (True,)
        to_there, to_here = (to, source.device.type) == (DEVICE, "cpu"), to != source.device == DEVICE
        return to is not None and (to_here or (to_there and not asynchronous))
    if op in BY_INDEX:
        return remote and any(index is not None and index.dtype == torch.bool for index in args[1])
    return remote and bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(op.tags))


@pytest.fixture
def gpu(monkeypatch):
    """The scripts train on DEVICE."""
    make, autocast = torch.tensor, torch.autocast

    def tensor(data, device=None, **settings):  # torch's asks the backend for memory first
        return make(data, **settings) if device is None else make(data, **settings).to(device)

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch, "autocast", lambda device_type, **settings: autocast("cpu", **settings))
    monkeypatch.setattr(common, "pick_device", lambda: DEVICE)
    with Gpu() as gpu:
        yield gpu


WAITS = {  # an expression of x, (6,) float32 on DEVICE -> how many waits
    "x + 1": 0,
    "x.sum().sqrt().mul_(2)": 0,
    "x[x.argsort()]": 0,
    "x.masked_fill(x > 2, 0)": 0,
    "x.to(torch.float64)": 0,
    "torch.zeros(3).to(DEVICE, non_blocking=True)": 0,
    "torch.zeros(3).sum().item()": 0,
    "torch.zeros(3).nonzero()": 0,
    "x[0].item()": 1,
    "float(x[1]) + int(x[2])": 2,
    "bool((x > 2).any())": 1,
    "x.tolist()": 1,
    "x.cpu()": 1,
    "x.to('cpu', non_blocking=True)": 1,
    "torch.zeros(6).copy_(x)": 1,
    "torch.zeros(3).to(DEVICE)": 1,
    "torch.tensor([1, 2], device=DEVICE)": 1,
    "x.nonzero()": 1,
    "x[x > 2]": 1,
    "x.masked_select(x > 2)": 1,
    "x.unique()": 1,
    "torch.equal(x, x)": 1,
    "x[:1].is_nonzero()": 1,
}


@pytest.mark.parametrize("expression, expected", WAITS.items())
def test_what_waits_is_counted_and_what_does_not_is_not(gpu, expression, expected):
    x = torch.arange(6.0, device=DEVICE)
    eval(expression, {"torch": torch, "DEVICE": DEVICE, "x": x})
    assert gpu.waits.total() == expected


class Unfused(AdamW):
    """AdamW on DEVICE, where the fused one asks for a backend. As that one it takes the scaler of float16 as it is,
    which means something only where a gradient is not finite."""

    def __init__(self, groups: list, weight_decay: float, fused: bool):
        super().__init__(groups, weight_decay=weight_decay)
        self._step_supports_amp_scaling = fused

    def step(self, closure=None):
        self.grad_scale = self.found_inf = None
        super().step(closure)


def counted(script, gpu: Gpu, monkeypatch, constants: dict) -> dict[str, list[Counter]]:
    """The waits of an epoch of training, and of a validation before and after it."""
    found, epoch = {"training": [], "validation": []}, script.train_one_epoch

    def train_one_epoch(run, *rest):
        gpu.waits.clear()
        epoch(run, *rest)
        found["training"].append(gpu.waits.copy())

    def finish_epoch(run, validate):
        gpu.waits.clear()
        validate(run.learner.networks["model"])
        found["validation"].append(gpu.waits.copy())

    monkeypatch.setattr(script, "train_one_epoch", train_one_epoch)
    monkeypatch.setattr(script, "AdamW", Unfused)
    monkeypatch.setattr(training.Run, "finish_epoch", finish_epoch)  # nothing is saved: files hold no Remote tensors
    monkeypatch.setattr(training.Run, "report_best", lambda run: [])
    for constant, value in ({"EPOCHS": 1} | constants).items():
        monkeypatch.setattr(script, constant, value)
    script.main()
    return found


RUNS = {  # stage, its constants, whether gradients are scaled as in float16
    "stage 1": (0, {}, False),
    "stage 1, two batches an update": (0, {"ACCUMULATE": 2}, False),
    "stage 1, float16": (0, {}, True),
    "stage 1, with an average of the weights": (0, {"EMA_DECAY": 0.9}, False),
    "stage 2": (1, {}, False),
    "stage 2, of faces alone": (1, {"WIDE_WEIGHT": 0.0}, False),
}


@pytest.mark.parametrize("stage, constants, scaled", RUNS.values(), ids=RUNS)
def test_an_update_waits_once_and_a_batch_of_validation_twice(stages, gpu, monkeypatch, stage, constants, scaled):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, enabled=scaled))
    found = counted(stages[stage], gpu, monkeypatch, constants)
    updates = 6 // constants.get("ACCUMULATE", 1) if stage == 0 else 2
    # The numbers of a step that are logged, in one copy; the embeddings and their qualities.
    batches = 6  # of the gallery, of its four degraded copies and of the queries
    waited = {"training": [updates], "validation": [2 * batches] * 2}
    assert found == {of: [{"aten._to_copy.default": count} for count in counts] for of, counts in waited.items()}
