"""How photos reach the network: when workers are worth their start, what they may queue, how their errors arrive."""

import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common import UserError, warn_once

# Fewer batches are sooner loaded than workers are started: at once by fork, but spawn (Windows, macOS) and forkserver
# import torch in each of them, which takes 3..15 s.
FEW_BATCHES = {"fork": 4, "spawn": 24, "forkserver": 24}
PREFETCH = 2  # batches that each worker prepares ahead
SHARED_MEMORY = Path("/dev/shm")  # of Linux: what workers queue lies there; 64 MB in a Docker container
IN_USE = 2  # batches there that have left the queue: the present one, and the one before it


def worth_workers(num_workers: int, batches: int) -> int:
    """`num_workers`, or 0 for so few `batches` that one process is sooner done."""
    return num_workers if batches >= FEW_BATCHES[multiprocessing.get_start_method()] else 0


class PhotoLoader(DataLoader):
    """Batches of `dataset`, whose indices are those of `batches`, from `num_workers` processes at most.

    passes: over the data; workers live on between them. prefetch: batches that each worker prepares ahead. There are
    fewer workers, or none, where they are not worth their start or the shared memory cannot hold what they queue.
    worker_init_fn, generator: see DataLoader.
    What a worker raises as UserError arrives as its sentence, without the worker's traceback.
    """

    def __init__(
        self,
        dataset: Dataset,
        batches: Sampler[list[int]],
        num_workers: int,
        device: torch.device,
        *,
        passes: int = 1,
        prefetch: int = PREFETCH,
        worker_init_fn: Callable[[int], None] | None = None,
        generator: torch.Generator | None = None,
    ):
        workers = worth_workers(num_workers, passes * len(batches))
        if workers and SHARED_MEMORY.is_dir():
            workers, prefetch = _fitting(workers, prefetch, _batch_bytes(dataset, batches))
        super().__init__(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=workers > 0 and passes > 1,
            pin_memory=device.type == "cuda",
            worker_init_fn=worker_init_fn,
            generator=generator,
        )

    def __iter__(self) -> Iterator:
        try:
            yield from super().__iter__()
        except UserError as error:
            raise UserError(_sentence(error)) from error


def _batch_bytes(dataset: Dataset, batches: Sampler[list[int]]) -> int:
    """What one batch takes, by its first item."""
    indices = next(iter(batches))
    item = dataset[indices[0]]
    parts = item if isinstance(item, tuple) else (item,)
    return len(indices) * sum(part.nbytes if isinstance(part, Tensor) else 8 for part in parts)


def _fitting(workers: int, prefetch: int, batch_bytes: int) -> tuple[int, int]:
    """As many workers, and batches that each prepares ahead, as SHARED_MEMORY has room for; says so if these are fewer.

    Without room, a worker is killed by SIGBUS or raises an error of its own.
    """
    memory = shutil.disk_usage(SHARED_MEMORY)
    room = memory.free // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) // batch_bytes - IN_USE  # torchrun's processes
    if room >= workers * prefetch:
        return workers, prefetch
    found = min(workers, max(room, 0))
    what = "fewer batches are loaded ahead" if found else "the photos are loaded without workers, which takes longer"
    warn_once(
        f"{SHARED_MEMORY}: {memory.total / 2**20:.0f} MiB are too small for what {workers} workers queue, so {what}; "
        "enlarge it (docker run --shm-size=1g)"
    )
    return found, min(prefetch, room // found) if found else prefetch


def _sentence(error: UserError) -> str:
    """torch raises a worker's error again with the whole traceback as its text, which ends with the sentence."""
    return str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")[2].rstrip()
