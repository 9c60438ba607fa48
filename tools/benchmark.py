"""How fast this machine trains and embeds: stage 1 and each backend against plain loops, and against the machine.

    python -m tools.benchmark

Prints images/s, their ratio to those of the row named at the end, the share of time spent waiting for data, peak
memory, the machine's rate of float32 matrix products (GEMM) and which fraction of it is reached. Needs no data and no
weights: speed does not depend on them.
"""

import concurrent.futures
import csv
import importlib.util
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from facenet_pytorch import InceptionResnetV1
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import common
import train_stage1
from common import set_constants
from fast import INPUT, PACKAGES, accelerated, to_onnx
from gallery import embed
from losses import ArcMarginProduct
from models import EMBEDDING_DIM, FaceNet
from search import nearest
from transforms import eval_transform, load_image

try:
    import resource
except ImportError:  # on Windows
    resource = None

BATCH_SIZE = 32  # photos per step, >= 2
IMAGE_SIZE = 160  # pixels, 76..160
STEPS = 8  # timed steps of each kind in each round, >= 3; one more goes before them, untimed
ROUNDS = 2  # the kinds take turns, so that a busy spell hits all of them, >= 1
FREEZE_UNTIL = "mixed_6a"  # of the frozen case, see models.BLOCKS
PERSONS = 32  # synthetic, for the head and the files, >= 4
GEMM_SIZE = 2048  # rows and columns of the matrices multiplied
COMPILED = True  # False: without torch.compile, which takes a minute before its first batch
RUNTIMES = ("onnxruntime", "openvino", "openvino-int8")  # other than torch, on the CPU; (): none, as on a GPU
FAST_BACKEND = "onnxruntime"  # of the rows from files and of the search: "fused" or "compiled" on a GPU
NUM_WORKERS = (0, 2)  # of gallery.embed's rows from files, each 0..CPU cores
PHOTOS = 256  # embedded from files in those rows, BATCH_SIZE..(STEPS + 1) x BATCH_SIZE
GALLERY_PERSONS = 10_000  # enrolled in the rows that search, >= 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The constants that the cases need, for a process of its own, which sees this file as it is on disk."""

    batch_size: int
    image_size: int
    steps: int
    persons: int


def main() -> dict[str, dict]:
    """Measure, print the table; returns the figures of each case."""
    kinds = cases()
    skipped = {name: absent for name in kinds if (absent := missing(name))}
    kinds = {name: case for name, case in kinds.items() if name not in skipped}
    settings = current_settings()
    rates = [in_own_process(gemm_rate)]
    found: dict[str, list[dict]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder) / "Task_B")
        for _ in range(ROUNDS):
            for name, (measure, arguments, _) in kinds.items():
                found[name].append(in_own_process(measure, Path(folder) / "Task_B", settings, *arguments))
            rates.append(in_own_process(gemm_rate))
    gemm = max(rates)  # what the machine can do, a busy spell apart
    print(f"{torch.__version__}, {device_name()}, float32 GEMM {gemm / 1e9:.0f} GFLOP/s")
    print(f"batch {BATCH_SIZE}, {IMAGE_SIZE} pixels, median of {ROUNDS} x {STEPS} steps\n")
    print(f"{'':<40}{'images/s':>9}{'ratio':>8}{'loading':>9}{'peak MiB':>10}{'of GEMM':>9}  ratio to")
    results = {}
    for name, rounds in found.items():
        speed = statistics.median([value for of_round in rounds for value in of_round["images_per_second"]])
        loading = statistics.median([of_round["loading"] for of_round in rounds])
        peak = max(of_round["peak"] for of_round in rounds)
        base = kinds[name][2]
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
    for name, absent in skipped.items():
        print(f"{name:<40}left out, not installed: {', '.join(absent)}; pip install {' '.join(absent)}")
    return results


def missing(name: str) -> list[str]:
    """The packages that the row `name` needs and that are not installed."""
    runtime = max((runtime for runtime in RUNTIMES if runtime in name), key=len, default=None)
    needed = PACKAGES[runtime] if runtime else ()
    return [package for package in needed if importlib.util.find_spec(package) is None]


def cases() -> dict[str, tuple]:
    """Row -> (what measures it, its arguments, the row that its ratio divides by), that row first."""
    train, memory, search = "plain training loop", "plain embedding", "plain search, image by image"
    rows = {
        train: (plain_training, (), train),
        "stage 1": (stage1, (None,), train),
        f"stage 1, frozen up to {FREEZE_UNTIL}": (stage1, (FREEZE_UNTIL,), train),
        memory: (plain_embedding, (), memory),
        "embedding, fused": (our_embedding, ("fused",), memory),
    }
    if COMPILED:
        rows["embedding, compiled"] = (our_embedding, ("compiled",), memory)
    rows["onnxruntime's own session"] = (session_embedding, (), memory)
    for backend in RUNTIMES:
        rows[f"embedding, {backend}"] = (our_embedding, (backend,), memory)
    for backend in dict.fromkeys(("torch", FAST_BACKEND)):
        for workers in NUM_WORKERS:
            name = f"gallery.embed, {backend}, {workers} workers"
            rows[name] = (file_embedding, (backend, workers, PHOTOS), memory)
    rows[search] = (plain_search, (GALLERY_PERSONS,), search)
    rows[f"our search, {FAST_BACKEND}"] = (our_search, (FAST_BACKEND, GALLERY_PERSONS), search)
    return rows


def current_settings() -> Settings:
    return Settings(
        batch_size=BATCH_SIZE,
        image_size=IMAGE_SIZE,
        steps=STEPS,
        persons=PERSONS,
    )


def in_own_process(measure, *arguments):
    """`measure(*arguments)` in a new process: its peak memory, threads and caches are its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_as_here, multiprocessing.get_start_method(), measure, *arguments).result()


def _as_here(start_method: str, measure, *arguments):
    # A spawned process spawns: its loading processes would import everything again, for seconds, as no script's do.
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
    """torch as it comes: float32, NCHW, AdamW by default, images that already lie in memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = InceptionResnetV1(pretrained=None, dropout_prob=0.4).to(device).train()
    head = ArcMarginProduct(EMBEDDING_DIM, settings.persons, s=32, m=0.5).to(device)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], 3e-4)
    images = torch.randn(settings.batch_size, 3, settings.image_size, settings.image_size, device=device)
    labels = torch.randint(settings.persons, (settings.batch_size,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(head(model(images), labels), labels).backward()
        optimizer.step()

    seconds = [timed(step, device) for _ in range(settings.steps + 1)][1:]
    return figures(
        images_per_second=[settings.batch_size / t for t in seconds],
        loading=0.0,
        device=device,
        flops_per_image=flops(settings.image_size, freeze_until=None, training=True),
    )


def stage1(data_dir: Path, settings: Settings, freeze_until: str | None) -> dict:
    """train_stage1.main() itself, files and all, for one epoch."""
    with tempfile.TemporaryDirectory() as run_dir:
        set_constants(
            train_stage1,
            DATA_DIR=data_dir,
            RUN_DIR=Path(run_dir),
            RESUME=False,
            CHECK_IMAGES=False,
            EPOCHS=1,
            PRETRAINED=None,
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
    speeds = [float(row["images_per_second"]) for row in rows]
    loading = statistics.mean(float(row["loading"]) for row in rows)
    return figures(
        images_per_second=speeds,
        loading=loading,
        device=common.pick_device(),
        flops_per_image=flops(settings.image_size, freeze_until=freeze_until, training=True),
    )


@torch.inference_mode()
def plain_embedding(data_dir: Path, settings: Settings) -> dict:
    """torch as it comes, images that already lie in memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = InceptionResnetV1(pretrained=None).to(device).eval()
    images = torch.randn(settings.batch_size, 3, settings.image_size, settings.image_size, device=device)
    seconds = [timed(lambda: model(images), device) for _ in range(settings.steps + 1)][1:]
    return figures(
        images_per_second=[settings.batch_size / t for t in seconds],
        loading=0.0,
        device=device,
        flops_per_image=flops(settings.image_size, freeze_until=None, training=False),
    )


@torch.inference_mode()
def our_embedding(data_dir: Path, settings: Settings, backend: str) -> dict:
    """What gallery.embed does to a batch, of images that already lie in memory."""
    device = common.pick_device()
    images = torch.randn(settings.batch_size, 3, settings.image_size, settings.image_size)
    model = accelerated(facenet(device), backend, settings.image_size, device, list(images))  # speed knows no ranges

    def step() -> Tensor:
        return F.normalize(model(images.to(device, memory_format=torch.channels_last)).float()).cpu()

    seconds = [timed(step, device) for _ in range(settings.steps + 1)][1:]
    return figures(
        images_per_second=[settings.batch_size / t for t in seconds],
        loading=0.0,
        device=device,
        flops_per_image=flops(settings.image_size, freeze_until=None, training=False),
    )


def session_embedding(data_dir: Path, settings: Settings) -> dict:
    """onnxruntime as its users write it: the file of export_onnx.py, a session by default, a NumPy batch."""
    import onnxruntime

    device = torch.device("cpu")
    content = to_onnx(facenet(device), settings.image_size, {})
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).normal(size=(settings.batch_size, 3, settings.image_size, settings.image_size))
    images = images.astype(np.float32)
    seconds = [timed(lambda: session.run(None, {INPUT: images}), device) for _ in range(settings.steps + 1)][1:]
    return figures(
        images_per_second=[settings.batch_size / t for t in seconds],
        loading=0.0,
        device=device,
        flops_per_image=flops(settings.image_size, freeze_until=None, training=False),
    )


def file_embedding(data_dir: Path, settings: Settings, backend: str, num_workers: int, photos: int) -> dict:
    """gallery.embed, files and all, with the start of its loading processes."""
    device = common.pick_device()
    model = accelerated(facenet(device), backend, settings.image_size, device)
    paths = sorted((data_dir / "train").glob("*/clean/*.jpg"))[:photos]
    transform = eval_transform(settings.image_size, 0.52)

    def run(some: list[Path], workers: int) -> None:
        embed(model, some, transform, device, batch_size=settings.batch_size, num_workers=workers)

    run(paths[: settings.batch_size], workers=0)
    seconds = timed(lambda: run(paths, workers=num_workers), device)
    return figures(
        images_per_second=[len(paths) / seconds],
        loading=0.0,
        device=device,
        flops_per_image=flops(settings.image_size, freeze_until=None, training=False),
    )


@torch.inference_mode()
def plain_search(data_dir: Path, settings: Settings, persons: int) -> dict:
    """A photo at a time, and a call of cosine_similarity for each person enrolled."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = InceptionResnetV1(pretrained=None).to(device).eval()
    paths = sorted((data_dir / "train").glob("*/clean/*.jpg"))[: settings.batch_size]
    transform, gallery = eval_transform(settings.image_size, 0.52), torch.randn(persons, EMBEDDING_DIM, device=device)

    def search(path: Path) -> int:
        embedding = model(transform(load_image(path))[None].to(device))
        scores = [F.cosine_similarity(embedding, person[None]).item() for person in gallery]
        return max(range(persons), key=scores.__getitem__)

    search(paths[0])
    seconds = timed(lambda: [search(path) for path in paths], device)
    return figures(
        images_per_second=[len(paths) / seconds],
        loading=0.0,
        device=device,
        flops_per_image=flops(settings.image_size, freeze_until=None, training=False),
    )


def our_search(data_dir: Path, settings: Settings, backend: str, persons: int) -> dict:
    """gallery.embed in batches, then one product with the whole gallery."""
    device = common.pick_device()
    model = accelerated(facenet(device), backend, settings.image_size, device)
    paths = sorted((data_dir / "train").glob("*/clean/*.jpg"))[: settings.batch_size]
    transform, gallery = eval_transform(settings.image_size, 0.52), F.normalize(torch.randn(persons, EMBEDDING_DIM))

    def search() -> None:
        embeddings = embed(model, paths, transform, device, batch_size=settings.batch_size).embeddings
        nearest(embeddings, gallery)

    search()
    seconds = timed(search, device)
    return figures(
        images_per_second=[len(paths) / seconds],
        loading=0.0,
        device=device,
        flops_per_image=flops(settings.image_size, freeze_until=None, training=False),
    )


# --- helpers ----------------------------------------------------------------------------------------------------------


def facenet(device: torch.device) -> FaceNet:
    return FaceNet(None, 0.0).to(device, memory_format=torch.channels_last).eval()


def timed(work, device: torch.device) -> float:
    """Seconds that `work()` takes, until the device has done it."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def figures(*, images_per_second: list[float], loading: float, device: torch.device, flops_per_image: float) -> dict:
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    return {"images_per_second": images_per_second, "loading": loading, "peak": peak, "flops": flops_per_image}


def peak_memory() -> float:
    """Bytes of main memory that this process has held at most; NaN, unknown, where Python has no `resource`."""
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_text(count: float, *, unit: int, decimals: int) -> str:
    """`count` bytes in units of `unit` bytes; "-" for NaN."""
    return "-" if math.isnan(count) else f"{count / unit:.{decimals}f}"


def flops(image_size: int, freeze_until: str | None, training: bool) -> float:
    """Floating-point operations per image of the network, forward and, with `training`, backward."""
    model = FaceNet(None, 0.0, freeze_until).train(training)
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
