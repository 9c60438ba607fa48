"""machine.py: what the machine ran out of is one sentence with its cure; other errors stay what they are."""

import errno
import os
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, _utils

import common
import machine

TRAINING = {"BATCH_SIZE": 32, "NUM_WORKERS": 2, "RUN_DIR": "runs/a"}
STAGE2 = {"PERSONS_PER_BATCH": 24, "NUM_WORKERS": 0, "RUN_DIR": "runs/b"}
SHM = "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
BUS = (
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    "shared memory. Please try to raise your shared memory limit."
)
KILLED = "DataLoader worker (pid 7) is killed by signal: Killed. "
WORKER = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File\n"
CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 15.00 GiB"
ALLOCATE = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4"
WRITER = "PytorchStreamWriter failed writing file data/0: file write failed"
DISK = "the disk is full, and a file could not be written to its end; make room"


@pytest.mark.parametrize(
    "error, constants, sentence",
    [
        (RuntimeError(SHM), TRAINING, "/dev/shm is full, where workers queue batches; set NUM_WORKERS = 0, or enlarge"),
        (RuntimeError(f"{WORKER}RuntimeError: {SHM}\n"), TRAINING, "/dev/shm is full"),
        (RuntimeError(BUS), TRAINING, "/dev/shm is full"),
        (RuntimeError(KILLED), TRAINING, "a process that loads photos has ended, as it does when memory runs out"),
        (torch.cuda.OutOfMemoryError(CUDA), TRAINING, "the memory of the GPU is full; lower BATCH_SIZE"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
            STAGE2,
            "the memory of the GPU is full; lower PERSONS",
        ),
        (
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors"),
            {},
            "the memory of the GPU is full; lower",
        ),
        (RuntimeError(ALLOCATE), STAGE2, "the memory is full; lower PERSONS_PER_BATCH"),
        (
            RuntimeError(f"{WORKER}RuntimeError: {ALLOCATE}\n"),
            TRAINING,
            "the memory is full; lower BATCH_SIZE or NUM",
        ),
        (RuntimeError(f"{WORKER}numpy.exceptions._ArrayMemoryError: Unable"), TRAINING, "the memory is full"),
        (MemoryError(), {}, "the memory is full; close other programs"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), TRAINING, "the memory is full"),  # from fork
        (OSError(errno.EMFILE, "Too many open files"), TRAINING, "too many files are open; set NUM_WORKERS = 0"),
        (RuntimeError("received 0 items of ancdata"), TRAINING, "too many files are open"),
        (OSError(errno.ENOSPC, "No space left on device"), TRAINING, f"{DISK}, or move RUN_DIR = 'runs/a' to another"),
        (RuntimeError(WRITER), {"RESULTS_DIR": "results"}, f"{DISK}, or move RESULTS_DIR = 'results' to another disk"),
        (OSError(errno.ENOSPC, "No space left on device"), {}, DISK),
    ],
)
def test_what_the_machine_ran_out_of_is_one_sentence_with_constants_that_the_script_has(error, constants, sentence):
    found = machine.shortage(error, constants)
    assert found.startswith(sentence) and "\n" not in found


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError(f"{WORKER}    raise_if('out of memory. tried to allocate')\nKeyError: 3\n"),  # a line of code
        RuntimeError("CUDA error: device-side assert triggered"),
        OSError(errno.EACCES, "Permission denied"),
        ValueError("can't allocate memory"),
        KeyError("no space left"),
    ],
)
def test_any_other_error_is_no_shortage(error):
    assert machine.shortage(error, TRAINING) is None


class Full:
    """A file on a disk that is full, or broken, after 1000 bytes."""

    def __init__(self, code: int):
        self.code, self.left = code, 1000

    def write(self, data) -> int:
        self.left -= len(data)
        if self.left < 0:
            raise OSError(self.code, os.strerror(self.code))
        return len(data)

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("code, sentence", [(errno.ENOSPC, DISK), (errno.EIO, None)])
def test_torch_save_on_a_full_disk_is_told_from_one_that_is_broken(code, sentence):
    with pytest.raises(RuntimeError) as raised:  # torch's, about a position
        torch.save({"a": torch.zeros(10**5)}, Full(code))
    assert machine.shortage(raised.value, {}) == sentence


class Harmed(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def out_of_memory():
    np.zeros(10**15)


def worker_killed():
    list(DataLoader(Harmed(), 2, num_workers=1))


def disk_full():
    torch.save({"a": torch.zeros(10**5)}, Full(errno.ENOSPC))


@pytest.mark.parametrize(
    "main, sentence",
    [
        (out_of_memory, "the memory is full"),
        (worker_killed, "a process that loads photos"),
        (disk_full, DISK),
    ],
)
def test_a_script_ends_with_the_sentence_and_with_the_traceback_where_it_is_wanted(monkeypatch, main, sentence):
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # seconds between torch's looks at its workers
    monkeypatch.delenv("TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as end:
        common.run_script(main)
    assert end.value.code.startswith(f"error: {sentence}") and end.value.code.count("\n") == 1
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises((RuntimeError, MemoryError)):
        common.run_script(main)
