"""Processes that train as one under torchrun: one model, one batch, one decision to stop; and the signals for that."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import rank_and_world

T = TypeVar("T")


def parallel(network: nn.Module) -> nn.Module:
    """`network`, its gradients averaged over the processes under torchrun; on GPUs BatchNorm then sees the whole batch
    (Ioffe & Szegedy 2015 on the whole mini-batch), on the CPU each process only its own part."""
    if rank_and_world()[1] == 1 or not any(parameter.requires_grad for parameter in network.parameters()):
        return network
    device = next(network.parameters()).device
    if device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)


def gather(*parts: Tensor) -> tuple[Tensor, ...]:
    """Each (n, ...) of each process -> (N, ...) of all, in the order of the batch; in a single process unchanged.

    A loss over the gathered rows is that of the whole batch, the same number in each process. Its gradient reaches this
    process's rows only, and `parallel` averages over processes: hence the factor. (torch's differentiable all_gather
    is deprecated, and its successor private.)
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


def gather_objects(mine: T) -> list[T]:
    """What each process passes as `mine`, in order of rank. Each process has to call this."""
    _, world = rank_and_world()
    if world == 1:
        return [mine]
    parts: list = [None] * world
    dist.all_gather_object(parts, mine)
    return parts


def any_process(value: bool, device: torch.device) -> bool:
    """Whether `value` is true in any process. Each process has to call this, and all get the same answer."""
    if rank_and_world()[1] == 1:
        return value
    flag = torch.tensor(int(value), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


@contextlib.contextmanager
def stop_requests() -> Iterator[list]:
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
