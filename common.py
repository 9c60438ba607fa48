"""What every module may need: errors, warnings and output, seeds, the device and the processes, checks of constants."""

import contextlib
import errno
import functools
import importlib
import logging
import math
import os
import pickle
import sys
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn, TextIO

import torch
import torch.distributed as dist

import machine

# Without any set-up, logging prints a warning as the bare sentence on stderr: what a script's user should see.
log = logging.getLogger(__name__)
MAX_SIDE = 2048  # pixels of the square images that a network sees: a side read from a file could fill the memory
SPARE = 2**28  # bytes that the tensors of a file may take beyond its size: an expanded one repeats what is stored once
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that a spreadsheet computes
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
    "MAYBE_SAME": (float, -1, 1),
}


# The scripts' constants that are paths of files and folders, and those of them that may be None.
PATHS = (
    *("DATA_DIR", "RUN_DIR", "STAGE1_CHECKPOINT", "RESULTS_DIR", "GALLERY"),
    *("IN_DIR", "OUT_DIR", "OUT", "SOURCE_DIR", "PAIRS_FILE"),
)
PATHS_OR_NONE = (
    "CHECKPOINT",
    "COMPARE_WITH",
    "ENROLL",
    "CALIBRATE_ON",
    "JSON_LINES",
    "ANNOTATED",
    "LFW_DIR",
    "PHOTOS_DIR",
    "EXTRA_FACES",
    "FIGURES",
)


class UserError(ValueError):
    """A mistake that the user can mend, in one sentence: the place, what was found, what was expected, what to do."""


@functools.cache
def warn_once(message: str) -> None:
    """Log `message` as a warning, the first time that it comes up in a run of a script; see pick_device."""
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


def optional_package(name: str, needed: Sequence[str], way_out: str = "") -> ModuleType:
    """The optional package `name`. Raises UserError, with all that is `needed`, if it is missing or broken."""
    if name == "nncf":
        os.environ.setdefault("NNCF_CI", "1")  # else it sends usage statistics over the internet
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package that does not fit to another one raises anything
        missing = isinstance(error, ModuleNotFoundError)
        fault, upgrade = ("is not installed", "") if missing else ("cannot be imported", "--upgrade ")
        raise UserError(
            f"the package {name} {fault} ({first_line(error)}): pip install {upgrade}{' '.join(needed)}{way_out}"
        ) from error


def in_range(value: object, kind: type, low: float, high: float) -> bool:
    """Whether a constant is a number of `kind`, int (whole) or float (either), in low..high."""
    number = isinstance(value, (int, kind)) and not isinstance(value, bool)  # True is an int to Python
    return number and low <= value <= high


def check_list(name: str, value: object, kind: type | tuple[type, ...], what: str) -> None:
    """Raise UserError unless a constant is a list (or a tuple or a set) of `kind`; `what` calls these."""
    if isinstance(value, (str, Path)):
        raise UserError(f"{name} = {str(value)!r}: expected a list, [{str(value)!r}]")
    if not isinstance(value, (list, tuple, set)) or not all(isinstance(part, kind) and str(part) for part in value):
        raise UserError(f"{name} = {value!r}: expected a list of {what}; [] for none")


# --- text and output --------------------------------------------------------------------------------------------------


def safe_text(text: str, *, keep: str = "", encoding: str = "utf-8") -> str:
    """`text` with \\-escapes for all that a terminal would obey or `encoding` cannot write; `keep` stays as it is.

    Names of folders and files come from anywhere: they may hold escape codes, newlines, marks that turn the direction
    of writing, or bytes that are no UTF-8. The joiners of Hindi, Persian and emoji and wide spaces stay.
    """
    shown = "".join(c if c in keep or _is_shown(c) else c.encode("unicode_escape").decode() for c in text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def _is_shown(character: str) -> bool:
    return character.isprintable() or character in "\u200c\u200d" or unicodedata.category(character) == "Zs"


def csv_cell(value: object) -> object:
    """`value` for a cell of a CSV file: a safe text, and never a formula to a spreadsheet (OWASP: CSV injection).

    Applied twice it changes no more than once. A number written as text stays a number.
    """
    if not isinstance(value, str):
        return value
    return "'" * (value.startswith(FORMULA) and not _is_number(value)) + safe_text(value)


def csv_text(cell: str) -> str:
    """What `csv_cell` made a cell of, for a script that reads its own CSV file."""
    return cell[cell.startswith(tuple(f"'{start}" for start in FORMULA)) :]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class _Output:
    """stdout or stderr of a script: it ends no work. After the first write that fails, the rest goes nowhere.

    escape: whether lines pass through `safe_text`; a progress bar moves the cursor.
    """

    def __init__(self, stream: TextIO, *, escape: bool):
        self._stream, self._escape = stream, escape

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        shown = safe_text(text, keep="\n\t", encoding=self._stream.encoding or "utf-8") if self._escape else text
        with self._forgiving():
            self._stream.write(shown)
        return len(text)

    def flush(self) -> None:
        with self._forgiving():
            self._stream.flush()

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())  # of what is buffered Python would complain at its end
            # The reader of a pipe has seen enough (on Windows that is EINVAL); a full disk is worth a word.
            if self._escape and error.errno not in (errno.EPIPE, errno.EINVAL):
                log.warning(f"the output cannot be written ({error.strerror}); the work goes on without it")


class _SafeFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return safe_text(super().format(record), keep="\n\t")


@contextlib.contextmanager
def _safe_output() -> Iterator[None]:
    """Meanwhile, whatever is printed or logged is safe to show, and none of it can end the work."""
    logging.lastResort.setFormatter(_SafeFormatter())
    with contextlib.ExitStack() as stack:
        for name, redirect in (("stdout", contextlib.redirect_stdout), ("stderr", contextlib.redirect_stderr)):
            if (stream := getattr(sys, name)) is not None:  # None: closed, or a program without a console
                output = _Output(stream, escape=name == "stdout")
                stack.enter_context(redirect(output))
                stack.callback(output.flush)
        yield


def run_script(main: Callable[[], object]) -> None:
    """Call `main()`. A UserError, or what the machine ran out of, ends it with a sentence; all else with a traceback.

    Output ends nothing: what is printed or logged is made safe to show, and a closed pipe is no error.
    """
    try:
        with _safe_output():
            main()
    except Exception as error:
        constants = getattr(main, "__globals__", {})
        sentence = str(error) if isinstance(error, UserError) else machine.shortage(error, constants)
        if sentence is None or os.environ.get("TRACEBACK"):
            raise
        _exit(f"error: {sentence}\n(TRACEBACK=1 python {Path(sys.argv[0]).name} shows where)")
    except KeyboardInterrupt as interrupt:
        way_on = "; RESUME = True goes on from the last checkpoint, if there is one"
        resumes = "RESUME" in getattr(main, "__globals__", {})
        _exit(f"\n{str(interrupt) or 'interrupted' + (way_on if resumes else '')}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _exit(message: str) -> NoReturn:
    sys.exit(safe_text(message, keep="\n\t"))


# --- device and processes ---------------------------------------------------------------------------------------------


def pick_device() -> torch.device:
    """A CUDA GPU if there is one, else a Mac's (MPS), else the CPU; under torchrun this process's own GPU, or the CPU,
    and the processes are joined.

    TF32 is allowed: 10 bits of mantissa in the products, as trained nets tolerate, for several times the speed.
    Here the main() of a script begins: what an earlier one in this process has warned of comes up again.
    """
    warn_once.cache_clear()
    cuda, local_rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if not cuda and not several and torch.backends.mps.is_available():
        device = torch.device("mps")
        warn_once("this Mac's GPU is used, in float32")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
    if several and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
        if not is_main():  # one process speaks for all; its siblings only tell why they fail
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            logging.disable(logging.WARNING)
    return device


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank_and_world()[0] == 0


def check_compiler(device: torch.device | str, setting: str, way_out: str) -> None:
    """Raises UserError, which begins with `setting` and advises `way_out`, where torch.compile cannot work."""
    try:
        _try_compiler(torch.device(device))
    except Exception as error:  # by platform: no compiler, no headers, no Triton, ...
        raise UserError(
            f"{setting}: torch.compile does not work here ({first_line(error)}); install a C++ compiler (Linux: g++ "
            "and python3-dev; macOS: xcode-select --install; Windows: Visual Studio's Build Tools) and, for a GPU, "
            f"the package triton, or set {way_out}"
        ) from error


@functools.cache
def _try_compiler(device: torch.device) -> None:
    """Compile a sum, once in a process; what the first compilation prepares, later ones find."""
    torch.compile(_double)(torch.ones(8, device=device))


def _double(values: torch.Tensor) -> torch.Tensor:
    return values + values


def read_plain(path: Path, fault: str, way_out: str) -> object:
    """Content of a torch file, tensors on the CPU. `weights_only`: a file from elsewhere can run no code.

    Raises UserError "<path>: <fault> (<reason>); <way_out>" for what cannot be read, is more than dense tensors and
    plain types, or would take more memory than the file has bytes, but for SPARE.
    """
    try:
        _check_parts(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tensors that are refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(content, most=path.stat().st_size + SPARE)
        return content
    except Exception as error:  # foreign bytes raise anything in the unpickler: IndexError, struct.error, OSError, ...
        raise UserError(f"{path}: {fault} ({_why_unreadable(error)}); {way_out}") from error


def _check_parts(path: Path) -> None:
    """Raise ValueError, before anything is unpacked, for a torch file whose parts are larger than the file."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # the older format, which stores everything as it is
            return
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    if any(part.filename.endswith("/constants.pkl") for part in parts):
        raise ValueError("a TorchScript program; the state_dict() of its network is needed")
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):  # a thousandth of the size is possible
        raise ValueError("it is compressed, which torch.save never does")
    if sum(part.file_size for part in parts) > path.stat().st_size:
        raise ValueError("its parts overlap")


def _check_tensors(content: object, most: int) -> None:
    """Raise ValueError for a tensor in `content` that is not dense, or if all of them would take over `most` bytes."""
    size, seen, left = 0, set(), [("", content)]
    while left:
        name, value = left.pop()
        if isinstance(value, (dict, list, tuple, set)):
            if id(value) in seen:  # lists that hold the same list twice, and so on: no end in sight
                continue
            seen.add(id(value))
            left += value.items() if isinstance(value, dict) else ((name, part) for part in value)
        elif isinstance(value, torch.Tensor):
            odd = {
                "sparse": value.layout != torch.strided,
                "quantized": value.is_quantized,
                "nested": value.is_nested,
                "without values, on the meta device": value.is_meta,
            }
            if kinds := [kind for kind, found in odd.items() if found]:
                raise ValueError(f"its tensor {str(name)[:60]!r} is {kinds[0]}, expected a dense one")
            size += value.numel() * value.element_size()
    if size > most:  # a single stored number can be expanded to any shape
        raise ValueError(f"its tensors would take {size / 2**30:.1f} GiB, more than the file holds")


def _why_unreadable(error: Exception) -> str:
    """A short reason. torch's own texts advise weights_only=False, which would run a stranger's code."""
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return "no torch file, or one with more than tensors and plain types in it"
    return first_line(error)


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def resolve_constants(script: dict) -> None:
    """Turn the texts among the path constants of a script's globals() into Paths, with ~ as the user's home folder, and
    NUM_WORKERS = "auto" into a number.

    "pretrained" stays, which COMPARE_WITH may be. Raises UserError for what is no path.
    """
    if script.get("NUM_WORKERS") == "auto":
        script["NUM_WORKERS"] = usable_cores()
    for name in set(PATHS + PATHS_OR_NONE) & script.keys():
        value = script[name]
        if value == "pretrained" or (value is None and name in PATHS_OR_NONE):
            continue
        if not isinstance(value, (str, Path)) or not str(value).strip():
            raise UserError(f'{name} = {value!r}: expected a path, such as Path("folder/name")')
        script[name] = Path(value).expanduser()


def usable_cores() -> int:
    """Cores for the workers of one process: those it may use, shared with torchrun's others here, at most 16."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have no such limit
        cores = os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def set_constants(script, **constants) -> None:
    """What a user does at the top of `script`. Raises AttributeError for a constant that it does not have."""
    for name, value in constants.items():
        getattr(script, name)
        setattr(script, name, value)
