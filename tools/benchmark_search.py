"""How long a search among very many templates takes, how much memory it needs, and how often the approximate one fails.

    python -m tools.benchmark_search

Templates are random directions, the worst case of a search in cells: real faces form clusters. Each query has a given
cosine to its own template. Prints a row per kind of `search.build_index`, and with few templates one of
Milvus in a file, each measured in a process of its own.
"""

import importlib.util
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import common
from common import UserError
from search import KINDS, Index, MilvusTemplates, build_index
from tools.benchmark import device_name, in_own_process, memory_text, peak_memory

TEMPLATES = 1_000_000  # 2 KiB each at DIM = 512: 1.9 GiB
QUERIES = 10_000  # searched all at once, each near a different template
SINGLE = 10  # queries searched one at a time, for the latency, 1..QUERIES
DIM = 512  # of FaceNet's embeddings
COSINE = 0.6  # of a query to its own template, 0..1; to others it is 0 +- 1 / sqrt(DIM)
K = 1  # nearest templates that a search returns, 1..TEMPLATES
NPROBES = (64, 128, 256, 512)  # cells searched by faiss-ivf, of about sqrt(TEMPLATES)
MILVUS_UP_TO = 20_000  # most TEMPLATES with which Milvus is measured too, if it is installed
SEED = 0  # 0, 1, 2, ...
BLOCK = 50_000  # templates drawn at a time: 98 MiB at DIM = 512


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The constants that `measure` needs, for a process of its own, which sees this file as it is on disk."""

    templates: int
    queries: int
    single: int
    dim: int
    cosine: float
    k: int
    nprobes: tuple[int, ...]
    seed: int
    block: int


def main() -> list[dict]:
    """Measure, print the table and return its rows."""
    if not 1 <= SINGLE <= QUERIES <= TEMPLATES:
        raise UserError(f"SINGLE={SINGLE}, QUERIES={QUERIES}, TEMPLATES={TEMPLATES}: expected 1 <= each <= the next")
    print(f"{torch.__version__}, {device_name()}")
    print(f"{TEMPLATES} templates of {DIM}, {QUERIES} queries of cosine {COSINE} to their own, k = {K}\n")
    print(
        f"{'':<24}{'build s':>9}{'search s':>10}{'queries/s':>11}{'one, ms':>9}{'peak GiB':>10}"
        f"{'recall@1':>10}{'top-1':>8}"
    )
    kinds = [kind for kind in KINDS if kind != "auto"]
    if importlib.util.find_spec("faiss") is None:
        print("(FAISS is not installed: pip install faiss-cpu)")
        kinds = ["exact"]
    if TEMPLATES <= MILVUS_UP_TO:
        if importlib.util.find_spec("pymilvus") and importlib.util.find_spec("milvus_lite"):
            kinds.append("milvus")
        else:
            print("(Milvus is not installed: pip install pymilvus milvus-lite)")
    rows, exact = [], None
    for kind in kinds:
        for row in in_own_process(measure, current_settings(), kind):
            first = row.pop("first")  # (Q,) nearest template of each query
            exact = first if exact is None else exact  # "exact" comes first
            row["recall"] = (first == exact).double().mean().item()
            rows.append(row)
            gib = memory_text(row["peak"], unit=2**30, decimals=2)
            print(
                f"{row['name']:<24}{row['build']:>9.1f}{row['search']:>10.2f}{QUERIES / row['search']:>11.0f}"
                f"{1000 * row['single']:>9.1f}{gib:>10}{row['recall']:>10.4f}{row['top1']:>8.4f}",
                flush=True,
            )
    return rows


def current_settings() -> Settings:
    return Settings(
        templates=TEMPLATES,
        queries=QUERIES,
        single=SINGLE,
        dim=DIM,
        cosine=COSINE,
        k=K,
        nprobes=NPROBES,
        seed=SEED,
        block=BLOCK,
    )


def measure(settings: Settings, kind: str) -> list[dict]:
    """Figures of an index of `kind`, one dict for each nprobe if it has that; seconds, bytes, shares 0..1.

    kind: of search.build_index, or "milvus", which is built by inserting the templates.
    """
    templates = make_templates(settings.templates, settings.dim, seed=settings.seed, block=settings.block)
    queries, truth = make_queries(templates, settings.queries, cosine=settings.cosine, seed=settings.seed)
    if kind != "milvus":
        started = time.perf_counter()
        index = build_index(templates, kind)
        return searched(settings, index, kind, time.perf_counter() - started, queries, truth)
    with tempfile.TemporaryDirectory() as folder:
        index = MilvusTemplates(Path(folder) / "templates.db", settings.dim)
        started = time.perf_counter()
        index.insert(templates, first=0)
        found = searched(settings, index, kind, time.perf_counter() - started, queries, truth)
        index.close()
    return found


def searched(
    settings: Settings, index: Index | MilvusTemplates, kind: str, build: float, queries: Tensor, truth: Tensor
) -> list[dict]:
    """What `measure` returns, of an index that took `build` seconds to build."""
    found = []
    for nprobe in settings.nprobes if kind == "faiss-ivf" else (None,):
        if nprobe is not None:
            index.nprobe = nprobe
        index.search(queries[:1], settings.k)  # the first search starts the threads
        single = []
        for query in queries[: settings.single].split(1):
            started = time.perf_counter()
            index.search(query, settings.k)
            single.append(time.perf_counter() - started)
        started = time.perf_counter()
        first = index.search(queries, settings.k)[0][:, 0]
        seconds = time.perf_counter() - started
        found.append(
            {
                "name": kind if nprobe is None else f"{kind}, nprobe {nprobe}",
                "build": build,
                "search": seconds,
                "single": statistics.median(single),
                "peak": peak_memory(),
                "first": first,
                "top1": (first == truth).double().mean().item(),
            }
        )
    return found


def make_templates(count: int, dim: int, seed: int, block: int) -> Tensor:
    """(count, dim) random directions, drawn `block` at a time."""
    generator = torch.Generator().manual_seed(seed)
    templates = torch.empty(count, dim)
    for part in templates.split(block):
        part.normal_(generator=generator)
        part.div_(torch.linalg.vector_norm(part, dim=1, keepdim=True))
    return templates


def make_queries(templates: Tensor, count: int, cosine: float, seed: int) -> tuple[Tensor, Tensor]:
    """Queries (count, D) of norm 1, and the templates (count,), all different, to which they have `cosine`."""
    generator = torch.Generator().manual_seed(seed + 1_000_000)  # not the stream of the templates
    truth = torch.randperm(len(templates), generator=generator)[:count]
    own = templates[truth]
    noise = torch.randn(count, templates.shape[1], generator=generator)
    noise = F.normalize(noise - (noise * own).sum(1, keepdim=True) * own)  # at right angles to the template
    return F.normalize(cosine * own + (1 - cosine**2) ** 0.5 * noise), truth


if __name__ == "__main__":
    common.run_script(main)
