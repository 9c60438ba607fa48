"""What a machine can run out of: memory, room for the batches of loader workers, open files, disk. A sentence each."""

import errno
from collections.abc import Mapping

# What torch's errors say, in lower case, where the machine has run out of something; the first that fits counts.
SAYS = {
    "shared memory": ("memory(shm)", "</torch_", "bus error"),  # batches lie in files /dev/shm/torch_...
    "workers": ("dataloader worker (pid", "pin memory thread exited"),
    "files": ("too many open files", "items of ancdata"),
    "GPU": ("out of memory. tried to allocate", "cuda error: out of memory", "alloc_failed"),
    "memory": ("allocate memory", "not enough memory", "memoryerror"),
    "disk": ("no space left", "file write failed", "unexpected pos"),
}
CODES = {errno.ENOSPC: "disk", errno.ENOMEM: "memory", errno.EMFILE: "files", errno.ENFILE: "files"}
CODES |= {errno.EDQUOT: "disk"} if hasattr(errno, "EDQUOT") else {}  # Windows has no quotas of that name
PAGING_FILE = 1455  # Windows: it is too small for all the processes that import torch
SIZES = ("BATCH_SIZE", "PERSONS_PER_BATCH")
PLACES = ("RUN_DIR", "RESULTS_DIR", "GALLERY", "OUT_DIR", "OUT")


def shortage(error: BaseException, constants: Mapping[str, object]) -> str | None:
    """What the machine ran out of where `error` ended a script, and what to do about it; None for any other error.

    constants: the script's globals(). The sentence names only those that the script has.
    """
    sizes = [name for name in SIZES if constants.get(name)]
    workers = ["NUM_WORKERS"] if constants.get("NUM_WORKERS") else []
    lower = f"lower {' or '.join(sizes + workers)}" if sizes + workers else "close other programs"
    no_workers = "set NUM_WORKERS = 0" if workers else "close other programs"
    place = next((name for name in PLACES if constants.get(name)), None)
    sentences = {
        "shared memory": f"/dev/shm is full, where workers queue batches; {no_workers}, or enlarge it "
        "(docker run --shm-size=1g)",
        "workers": f"a process that loads photos has ended, as it does when memory runs out ({_text(error)}); {lower}",
        "files": f"too many files are open; {no_workers}, or raise the limit (ulimit -n 4096)",
        "GPU": f"the memory of the GPU is full; lower {' or '.join(sizes) or 'what other programs take of it'}",
        "memory": f"the memory is full; {lower}",
        "disk": "the disk is full, and a file could not be written to its end; make room"
        + (f", or move {place} = {str(constants[place])!r} to another disk" if place else ""),
    }
    return sentences.get(_kind(error))


def _kind(error: BaseException) -> str | None:
    if isinstance(error, OSError):
        return "memory" if getattr(error, "winerror", None) == PAGING_FILE else CODES.get(error.errno)
    if isinstance(error, MemoryError):
        return "memory"
    if not isinstance(error, RuntimeError):
        return None
    text = _text(error).lower()
    if "unexpected pos" in text and isinstance(error.__context__, OSError):  # torch.save, after the error that counts
        return _kind(error.__context__)
    return next((kind for kind, signs in SAYS.items() if any(sign in text for sign in signs)), None)


def _text(error: BaseException) -> str:
    """What `error` says; of an error in a worker, which comes with its traceback, the last line."""
    text = str(error).rstrip()
    return text.rpartition("\n")[2] if text.startswith("Caught ") else text
