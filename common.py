"""What every module may need: errors and warnings, seeds, the device and the processes, checks of constants."""

import functools
import logging
import math
import os
import pickle
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

# Without any set-up, logging prints a warning as the bare sentence on stderr: what a script's user should see.
log = logging.getLogger(__name__)
# What a run's constants may be; those that a module takes, it checks itself.
RANGES = {
    "SEED": (int, 0, 2**32),
    "EPOCHS": (int, 1, 999),
    "BATCH_SIZE": (int, 2, math.inf),  # BatchNorm cannot work with one image
    "PERSONS_PER_BATCH": (int, 2, math.inf),  # a negative is another person
    "PHOTOS_PER_PERSON": (int, 2, math.inf),
    "ACCUMULATE": (int, 1, math.inf),
    "NUM_WORKERS": (int, 0, math.inf),
    "SAVE_EVERY": (int, 0, math.inf),
    "PATIENCE": (int, 0, math.inf),
    "BACKBONE_LR": (float, 0, math.inf),
    "HEAD_LR": (float, 0, math.inf),
    "WIDE_LR": (float, 0, math.inf),
    "WEIGHT_DECAY": (float, 0, math.inf),
    "WARMUP_STEPS": (int, 0, math.inf),
    "GRAD_CLIP": (float, 1e-12, math.inf),
    "EMA_DECAY": (float, 0, 0.999999),
    "MAX_CLEAN_DROP": (float, 0, 100),
    "BALANCE": (float, 0, 1),
    "WIDE_WEIGHT": (float, 0, math.inf),
    "CONTRASTIVE_WEIGHT": (float, 0, math.inf),
    "INSTANCE_WEIGHT": (float, 0, math.inf),
}


class UserError(ValueError):
    """A mistake that the user can mend, in one sentence: the place, what was found, what was expected, what to do."""


@functools.cache
def warn_once(message: str) -> None:
    """Log `message` as a warning, the first time it comes up in this process."""
    log.warning(message)


def derived_seed(*numbers: int) -> int:
    """A seed in 0..2^63-1 that depends on all of `numbers`, alike in every process: hash() salts strings only."""
    return hash(numbers) % 2**63


def rank_and_world() -> tuple[int, int]:
    """Which of how many processes this one is: (0, 1) unless started by torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def list_names(names: Sequence[str], most: int = 5) -> str:
    """'a, b, c and 7 more'"""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def plain_name(name: str) -> str:
    """`name` as names are compared: in Unicode's NFC. From a Mac, "é" may come as e and an accent, two characters."""
    return unicodedata.normalize("NFC", name)


def in_range(value: object, kind: type, low: float, high: float) -> bool:
    """Whether a constant is a number of `kind`, int (whole) or float (either), in low..high."""
    number = isinstance(value, (int, kind)) and not isinstance(value, bool)  # True is an int to Python
    return number and low <= value <= high


def run_script(main: Callable[[], object]) -> None:
    """Call `main()`. A UserError ends the script with its sentence alone, anything else with a traceback."""
    try:
        main()
    except UserError as error:
        if os.environ.get("TRACEBACK"):
            raise
        sys.exit(f"error: {error}\n(TRACEBACK=1 python {Path(sys.argv[0]).name} shows where)")
    except KeyboardInterrupt as interrupt:
        way_on = "; RESUME = True goes on from the last checkpoint, if there is one"
        resumes = "RESUME" in getattr(main, "__globals__", {})
        sys.exit(f"\n{str(interrupt) or 'interrupted' + (way_on if resumes else '')}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def pick_device() -> torch.device:
    """A CUDA GPU if there is one, else the CPU; under torchrun this process's own, and the processes are joined.

    TF32 is allowed: 10 bits of mantissa in the products, as trained nets tolerate, for several times the speed.
    """
    cuda, local_rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
        if not is_main():  # one process speaks for all; its siblings only tell why they fail
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            logging.disable(logging.WARNING)
    return device


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank_and_world()[0] == 0


def read_plain(path: Path, fault: str, way_out: str) -> object:
    """Content of a torch file, tensors on the CPU. `weights_only`: a file from elsewhere can run no code.

    Raises ValueError "<path>: <fault> (<reason>); <way_out>" for what cannot be read, or is more than tensors and plain
    types.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes raise anything in the unpickler: IndexError, struct.error, OSError, ...
        raise UserError(f"{path}: {fault} ({_why_unreadable(error)}); {way_out}") from error


def _why_unreadable(error: Exception) -> str:
    """A short reason. torch's own text on an UnpicklingError advises weights_only=False: to run a stranger's code."""
    if isinstance(error, pickle.UnpicklingError):
        return "no torch file, or one with more than tensors and plain types in it"
    return first_line(error)


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def set_constants(script, **constants) -> None:
    """What a user does at the top of `script`. Raises AttributeError for a constant that it does not have."""
    for name, value in constants.items():
        getattr(script, name)
        setattr(script, name, value)
