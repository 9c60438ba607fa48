"""How fast this machine trains and embeds: stage 1 and each backend, compared with plain loops and with the machine.

    python -m tools.benchmark

Prints images/s, their ratio to those of the row named last, the share of time spent waiting for data, peak memory, the
machine's rate of float32 matrix products (GEMM) and the share of it that is reached. Needs neither data nor weights:
speed does not depend on them.
"""

import concurrent.futures
import csv
import functools
import importlib.util
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import common
import train_stage1
from backbones import BACKBONES
from common import UserError, set_constants
from embedding import embed
from fast import BACKENDS, INPUT, PACKAGES, accelerated, to_onnx
from losses import ArcMarginProduct
from models import FaceNet
from search import nearest
from transforms import eval_transform, load_image

try:
    import resource
except ImportError:  # on Windows
    resource = None

BATCH_SIZE = 32  # photos per step, >= 2
IMAGE_SIZE = 160  # pixels, 76..160
STEPS = 8  # timed steps of each row in each round, >= 3, after an untimed one
ROUNDS = 2  # the rows take turns, so that a busy spell affects all of them, >= 1
FREEZE_UNTIL = "mixed_6a"  # of the row with a frozen trunk, see backbones.py
PERSONS = 32  # synthetic, for the head and the files, >= 4
GEMM_SIZE = 2048  # rows and columns of the matrices multiplied
COMPILED = True  # False: leave out torch.compile, which takes a minute before its first batch
RUNTIMES = ("onnxruntime", "openvino", "openvino-int8")  # backends outside torch, CPU only; (): none, for a GPU
FAST_BACKEND = "onnxruntime"  # of the rows from files and of the search: "fused" or "compiled" on a GPU
NUM_WORKERS = (0, 2)  # of embedding.embed's rows from files, each 0..CPU cores
PHOTOS = 256  # embedded from files in those rows, BATCH_SIZE..(STEPS + 1) x BATCH_SIZE
GALLERY_PERSONS = 10_000  # enrolled in the rows that search, >= 1

DIM = BACKBONES["facenet"].dim  # numbers in an embedding


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The constants that a case needs, for a process of its own, which sees this file as it is on disk."""

    batch_size: int
    image_size: int
    steps: int
    persons: int


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row of the table."""

    measure: Callable[[Path, Settings], dict]  # the folder of photos, the settings -> see `figures`
    base: str  # the row that its ratio divides by
    needs: tuple[str, ...] = ()  # optional packages


def main() -> dict[str, dict]:
    """Measure, print the table and return the figures of each row."""
    check_backends(plain_device())
    kinds = cases()
    absent = {name: [p for p in case.needs if importlib.util.find_spec(p) is None] for name, case in kinds.items()}
    found: dict[str, list[dict]] = {name: [] for name in kinds if not absent[name]}
    rates = [in_own_process(gemm_rate)]
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder) / "Task_B"
        write_photos(data_dir)
        for _ in range(ROUNDS):
            for name in found:
                found[name].append(in_own_process(kinds[name].measure, data_dir, current_settings()))
            rates.append(in_own_process(gemm_rate))
    gemm = max(rates)  # what the machine can do outside a busy spell
    print(f"{torch.__version__}, {device_name()}, float32 GEMM {gemm / 1e9:.0f} GFLOP/s")
    print(f"batch {BATCH_SIZE}, {IMAGE_SIZE} pixels, median of {ROUNDS} x {STEPS} steps\n")
    print(f"{'':<40}{'images/s':>9}{'ratio':>8}{'loading':>9}{'peak MiB':>10}{'of GEMM':>9}  ratio to")
    results = {}
    for name, rounds in found.items():
        speed = statistics.median([value for of_round in rounds for value in of_round["images_per_second"]])
        loading = statistics.median([of_round["loading"] for of_round in rounds])
        peak = max(of_round["peak"] for of_round in rounds)
        base = kinds[name].base
        base_speed = speed if base == name else results[base]["images_per_second"]
        ratio, reached = speed / base_speed, rounds[0]["flops"] * speed / gemm
        results[name] = {
            "images_per_second": speed,
            "loading": loading,
            "peak": peak,
            "ratio": ratio,
            "gemm": reached,
        }
        mib = memory_text(peak, unit=2**20, decimals=0)
        print(f"{name:<40}{speed:>9.1f}{ratio:>8.2f}{loading:>9.1%}{mib:>10}{reached:>9.0%}  {base}")
    for name, packages in absent.items():
        if packages:
            print(f"{name:<40}left out, not installed: {', '.join(packages)}; pip install {' '.join(packages)}")
    return results


def cases() -> dict[str, Case]:
    """The rows by name; a row that others are compared with comes before them."""
    train, memory, search = "plain training loop", "plain embedding", "plain search, image by image"

    def embedding(backend: str) -> Case:
        measure = functools.partial(our_embedding, backend=backend)
        return Case(measure=measure, base=memory, needs=PACKAGES.get(backend, ()))

    frozen = functools.partial(stage1, freeze_until=FREEZE_UNTIL)
    rows = {
        train: Case(measure=plain_training, base=train),
        "stage 1": Case(measure=functools.partial(stage1, freeze_until=None), base=train),
        f"stage 1, frozen up to {FREEZE_UNTIL}": Case(measure=frozen, base=train),
        memory: Case(measure=plain_embedding, base=memory),
        "embedding, fused": embedding("fused"),
    }
    if COMPILED:
        rows["embedding, compiled"] = embedding("compiled")
    rows["onnxruntime's own session"] = Case(measure=session_embedding, base=memory, needs=PACKAGES["onnxruntime"])
    rows |= {f"embedding, {backend}": embedding(backend) for backend in RUNTIMES}
    for backend in dict.fromkeys(("torch", FAST_BACKEND)):
        for workers in NUM_WORKERS:
            measure = functools.partial(file_embedding, backend=backend, num_workers=workers, photos=PHOTOS)
            name = f"embedding.embed, {backend}, {workers} workers"
            rows[name] = Case(measure=measure, base=memory, needs=PACKAGES.get(backend, ()))
    rows[search] = Case(measure=functools.partial(plain_search, persons=GALLERY_PERSONS), base=search)
    measure = functools.partial(our_search, backend=FAST_BACKEND, persons=GALLERY_PERSONS)
    rows[f"our search, {FAST_BACKEND}"] = Case(measure=measure, base=search, needs=PACKAGES.get(FAST_BACKEND, ()))
    return rows


def check_backends(device: torch.device) -> None:
    """Raises UserError for a backend that is unknown or cannot work on `device`, before anything is measured."""
    for constant, backends in {"RUNTIMES": RUNTIMES, "FAST_BACKEND": (FAST_BACKEND,)}.items():
        for backend in backends:
            if backend not in BACKENDS:
                raise UserError(f"{constant}: {backend!r} is none of {', '.join(map(repr, BACKENDS))}")
            if backend in PACKAGES and device.type != "cpu":
                raise UserError(
                    f"{constant}: {backend!r} runs on the CPU only; set RUNTIMES = () and FAST_BACKEND = 'fused'"
                )
    if FAST_BACKEND == "openvino-int8":
        raise UserError("FAST_BACKEND = 'openvino-int8': measured among RUNTIMES only; set 'openvino' or another one")
    for setting, chosen, way_out in (
        ("COMPILED = True", COMPILED, "COMPILED = False"),
        ("FAST_BACKEND = 'compiled'", FAST_BACKEND == "compiled", "FAST_BACKEND = 'fused'"),
    ):
        if chosen:
            in_own_process(common.check_compiler, device, setting, way_out)


def current_settings() -> Settings:
    return Settings(batch_size=BATCH_SIZE, image_size=IMAGE_SIZE, steps=STEPS, persons=PERSONS)


def in_own_process(measure, *arguments):
    """`measure(*arguments)` in a new process: its peak memory, threads and caches are its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_as_here, multiprocessing.get_start_method(), measure, *arguments).result()


def _as_here(start_method: str, measure, *arguments):
    # Else its own loading processes would be spawned too, and import everything again, as those of no script do.
    multiprocessing.set_start_method(start_method, force=True)
    return measure(*arguments)


# --- the cases, each in a process of its own --------------------------------------------------------------------------


def gemm_rate() -> float:
    """Floating-point operations per second of a float32 matrix product, the best of several."""
    device = common.pick_device()
    a, b = torch.rand(2, GEMM_SIZE, GEMM_SIZE, device=device)
    seconds = [timed(lambda: a @ b, device) for _ in range(12)]
    return 2 * GEMM_SIZE**3 / min(seconds[2:])


def plain_training(data_dir: Path, settings: Settings) -> dict:
    """torch with its defaults: float32, NCHW, AdamW, images already in memory."""
    device = plain_device()
    model = FaceNet(None, dropout=0.4).to(device).train()
    head = ArcMarginProduct(model.dim, settings.persons, s=32, m=0.5).to(device)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], 3e-4)
    images = random_images(settings).to(device)
    labels = torch.randint(settings.persons, (settings.batch_size,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(head(model(images), labels), labels).backward()
        optimizer.step()

    return figures(speeds(step, settings, device), settings, device, training=True)


def stage1(data_dir: Path, settings: Settings, freeze_until: str | None) -> dict:
    """train_stage1.main() itself, with files, for one epoch."""
    with tempfile.TemporaryDirectory() as run_dir:
        set_constants(
            train_stage1,
            DATA_DIR=data_dir,
            RUN_DIR=Path(run_dir),
            RESUME=False,
            CHECK_IMAGES=False,
            EPOCHS=1,
            PRETRAINED=None,
            FRAMING="centre",
            IMAGE_SIZE=settings.image_size,
            BATCH_SIZE=settings.batch_size,
            SAVE_EVERY=0,
            HOLDOUT_PERSONS=0,
            FREEZE_UNTIL=freeze_until,
            BACKBONE_LR=1e-5,
        )
        train_stage1.main()
        with open(Path(run_dir) / "steps.csv", newline="") as file:
            rows = list(csv.DictReader(file))[1:]
    measured = [float(row["images_per_second"]) for row in rows]
    found = figures(measured, settings, common.pick_device(), training=True, freeze_until=freeze_until)
    return found | {"loading": statistics.mean(float(row["loading"]) for row in rows)}


@torch.inference_mode()
def plain_embedding(data_dir: Path, settings: Settings) -> dict:
    """torch with its defaults, images already in memory."""
    device = plain_device()
    model, images = FaceNet(None, dropout=0.0).to(device).eval(), random_images(settings).to(device)
    return figures(speeds(lambda: model(images), settings, device), settings, device)


@torch.inference_mode()
def our_embedding(data_dir: Path, settings: Settings, backend: str) -> dict:
    """What embedding.embed does with a batch, images already in memory."""
    device, images = common.pick_device(), random_images(settings)
    # Calibrated on noise: its speed does not depend on the images.
    model = accelerated(facenet(device), backend, settings.image_size, device, photos=list(images))

    def step() -> Tensor:
        return F.normalize(model(images.to(device, memory_format=torch.channels_last)).float()).cpu()

    return figures(speeds(step, settings, device), settings, device)


def session_embedding(data_dir: Path, settings: Settings) -> dict:
    """onnxruntime as its users write it: the file of export.py, a default session, a NumPy batch."""
    import onnxruntime

    device, images = torch.device("cpu"), random_images(settings).numpy()
    exported = to_onnx(facenet(device), settings.image_size, metadata={})
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    return figures(speeds(lambda: session.run(None, {INPUT: images}), settings, device), settings, device)


def file_embedding(data_dir: Path, settings: Settings, backend: str, num_workers: int, photos: int) -> dict:
    """embedding.embed with files, and with the start of its loading processes."""
    device = common.pick_device()
    model = accelerated(facenet(device), backend, settings.image_size, device)
    paths = sorted((data_dir / "train").glob("*/clean/*.jpg"))[:photos]
    transform = eval_transform(settings.image_size, 0.52)

    def run(some: list[Path], workers: int) -> None:
        embed(model, some, transform, device, batch_size=settings.batch_size, num_workers=workers)

    run(paths[: settings.batch_size], workers=0)
    seconds = timed(lambda: run(paths, workers=num_workers), device)
    return figures([len(paths) / seconds], settings, device)


@torch.inference_mode()
def plain_search(data_dir: Path, settings: Settings, persons: int) -> dict:
    """A photo at a time, and a call of cosine_similarity for each enrolled person."""
    device = plain_device()
    model = FaceNet(None, dropout=0.0).to(device).eval()
    paths = sorted((data_dir / "train").glob("*/clean/*.jpg"))[: settings.batch_size]
    transform, gallery = eval_transform(settings.image_size, 0.52), torch.randn(persons, model.dim, device=device)

    def search(path: Path) -> int:
        embedding = model(transform(load_image(path))[None].to(device))
        scores = [F.cosine_similarity(embedding, person[None]).item() for person in gallery]
        return max(range(persons), key=scores.__getitem__)

    search(paths[0])
    seconds = timed(lambda: [search(path) for path in paths], device)
    return figures([len(paths) / seconds], settings, device)


def our_search(data_dir: Path, settings: Settings, backend: str, persons: int) -> dict:
    """embedding.embed in batches, then one product with the whole gallery."""
    device = common.pick_device()
    model = accelerated(facenet(device), backend, settings.image_size, device)
    paths = sorted((data_dir / "train").glob("*/clean/*.jpg"))[: settings.batch_size]
    transform, gallery = eval_transform(settings.image_size, 0.52), F.normalize(torch.randn(persons, DIM))

    def search() -> None:
        embeddings = embed(model, paths, transform, device, batch_size=settings.batch_size).embeddings
        nearest(embeddings, gallery)

    search()
    return figures([len(paths) / timed(search, device)], settings, device)


# --- helpers ----------------------------------------------------------------------------------------------------------


def plain_device() -> torch.device:
    """Without the settings of common.pick_device."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def facenet(device: torch.device) -> FaceNet:
    return FaceNet(None, dropout=0.0).to(device, memory_format=torch.channels_last).eval()


def random_images(settings: Settings) -> Tensor:
    return torch.randn(settings.batch_size, 3, settings.image_size, settings.image_size)


def speeds(step: Callable[[], object], settings: Settings, device: torch.device) -> list[float]:
    """Images per second of each timed step, which handles a batch."""
    seconds = [timed(step, device) for _ in range(settings.steps + 1)][1:]
    return [settings.batch_size / t for t in seconds]


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has finished `work()`."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def figures(
    images_per_second: list[float],
    settings: Settings,
    device: torch.device,
    *,
    training: bool = False,
    freeze_until: str | None = None,
) -> dict:
    """What main() reads of a case: its speeds, share of time spent loading, peak memory, operations per image."""
    operations = flops(settings.image_size, freeze_until=freeze_until, training=training)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    return {"images_per_second": images_per_second, "loading": 0.0, "peak": peak, "flops": operations}


def peak_memory() -> float:
    """Most bytes of main memory that this process has held; NaN where Python has no `resource`."""
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_text(count: float, *, unit: int, decimals: int) -> str:
    """`count` bytes in units of `unit` bytes; "-" for NaN."""
    return "-" if math.isnan(count) else f"{count / unit:.{decimals}f}"


def flops(image_size: int, freeze_until: str | None, training: bool) -> float:
    """Floating-point operations per image of the network, forward and, with `training`, backward."""
    model = FaceNet(None, dropout=0.0, freeze_until=freeze_until).train(training)
    images = torch.randn(2, 3, image_size, image_size)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        embeddings = model(images)
        if training:
            embeddings.sum().backward()
    return counter.get_total_flops() / len(images)


def write_photos(data_dir: Path) -> None:
    """A tree of smooth random pictures of 250 x 250, a batch for each step, and two persons to validate on."""
    generator = np.random.default_rng(0)

    def write(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        small = generator.integers(0, 256, (25, 25, 3), dtype=np.uint8)
        Image.fromarray(small).resize((250, 250), Image.Resampling.BICUBIC).save(path)

    for number in range((STEPS + 1) * BATCH_SIZE):
        person = f"person_{number % PERSONS:03d}"
        write(data_dir / "train" / person / "clean" / f"{person}_{number:05d}.jpg")
    for person in ("val_1", "val_2"):
        write(data_dir / "val" / person / "clean" / f"{person}_00001.jpg")
        write(data_dir / "val" / person / "distortion" / f"{person}_00001_blurred.jpg")


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    common.run_script(main)
