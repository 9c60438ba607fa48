"""Nearest templates by cosine, of a thousand rows or of millions: exact in blocks, or through FAISS."""

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from common import UserError, warn_once
from scores import TIE

# FAISS is imported by `_faiss`, so after torch: on Linux it then shares torch's OpenMP threads, else it brings its own.

BLOCK_SCORES = 2**22  # cosines held at a time: 16 MiB of float32, which stay in the cache until their maxima are taken
BLOCK_QUERIES = 4096  # queries at a time; fewer where the maxima of the groups would be more than BLOCK_SCORES
GROUP = 1024  # rows whose maximum is kept; the answer is looked for in one group of each query
UNIT = 1e-3  # how far a norm may be from 1

KINDS = ("auto", "exact", "faiss-exact", "faiss-ivf")
FAISS_FROM = 200_000  # rows from which "auto" takes FAISS: exact, one core takes about 40 ms for one query there
NPROBE = 256  # cells searched, of about sqrt(rows); of random directions, the worst case, a quarter finds 92%
SAMPLE_PER_CELL = 64  # rows to learn each cell from, >= 39 as FAISS advises
KMEANS_STEPS = 10  # FAISS's own default for cells
CANDIDATES = 32  # rows beyond k that FAISS is asked for, to order them by exact cosines


# --- exact ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def nearest(queries: Tensor, rows: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """For each query the `k` rows of highest cosine, and those cosines.

    Shapes: (Q, D), (G, D), float32 rows of norm 1 on one device -> (Q, k) int64, (Q, k) float32.
    Column 0 is the lowest index among the rows whose cosine is within TIE of the highest; each further column is the
    same among the rows that are left. So equal rows come in the order of their indices, cosines never rise by more than
    TIE from a column to the next, and the answer for a smaller k is a part of that for a larger one.
    At most BLOCK_SCORES cosines are held at a time, and as many maxima.
    Raises ValueError if there is no query or no row, for other shapes or dtypes, two devices, k outside 1..G, or a row
    whose norm is not 1 within UNIT (zero, NaN and infinity among them).
    """
    _check(queries, rows, k)
    _check_unit(rows, "row")
    return _nearest(queries, rows, k)


def _nearest(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    groups = math.ceil(len(rows) / GROUP)
    size = max(1, min(BLOCK_QUERIES, BLOCK_SCORES // GROUP, BLOCK_SCORES // groups))
    with _full_precision():
        index = torch.cat([_pick(block, rows, _group_maxima(block, rows), k) for block in queries.split(size)])
        return index, _cosines(queries, rows, index)


def _group_maxima(queries: Tensor, rows: Tensor) -> Tensor:
    """(B, ceil(G / GROUP)): each query's highest cosine in each group of GROUP rows. Nearly all time is spent here."""
    size = max(1, BLOCK_SCORES // len(queries) // GROUP) * GROUP
    scores = queries.new_empty(len(queries) * min(size, len(rows)))  # once: new memory costs as much as the maxima
    maxima = []
    for block in rows.split(size):
        cosine = torch.mm(queries, block.T, out=scores[: len(queries) * len(block)].view(len(queries), len(block)))
        whole = len(block) // GROUP * GROUP
        maxima.append(cosine[:, :whole].unflatten(1, (-1, GROUP)).amax(2))
        if whole < len(block):
            maxima.append(cosine[:, whole:].amax(1, keepdim=True))
    return torch.cat(maxima, 1)


def _pick(queries: Tensor, rows: Tensor, maxima: Tensor, k: int) -> Tensor:
    """(B, k) row indices by the rule of `nearest`, from the `maxima` of the groups, which are overwritten."""
    index = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    for column in range(k):
        lowest = maxima.amax(1, keepdim=True) - TIE  # (B, 1)
        group = _first(maxima >= lowest)  # no group before it holds a row that counts as equal to the highest
        present, counts = group.unique(return_counts=True)
        by_group = group.argsort(stable=True).split(counts.tolist())
        for number, asking in zip(present.tolist(), by_group, strict=True):
            start = number * GROUP
            cosine = queries[asking] @ rows[start : start + GROUP].T  # (b, GROUP)
            earlier = index[asking, :column] - start
            who, taken = ((earlier >= 0) & (earlier < cosine.shape[1])).nonzero(as_tuple=True)
            cosine[who, earlier[who, taken]] = -math.inf
            # A product of another shape rounds otherwise: the group's highest counts, even if it now misses the bound.
            row = _first(cosine >= torch.minimum(lowest[asking], cosine.amax(1, keepdim=True)))
            index[asking, column] = start + row
            maxima[asking, number] = cosine.scatter(1, row[:, None], -math.inf).amax(1)
    return index


def _first(mask: Tensor) -> Tensor:
    """Index of each row's first True."""
    return mask.to(torch.uint8).argmax(1)  # argmax() gives the first of equals


def _cosines(queries: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """(Q, k) cosines of each query with its rows; an index below 0 gives -infinity."""
    size = max(1, BLOCK_SCORES // (index.shape[1] * rows.shape[1]))
    parts = []
    for block, of_block in zip(queries.split(size), index.split(size), strict=True):
        parts.append((rows[of_block.clamp_min(0)] @ block[:, :, None])[..., 0])
    return torch.cat(parts).masked_fill_(index < 0, -math.inf)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Without TF32 and bfloat16, which `common.pick_device` allows: their error is a thousand times TIE."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _check(queries: Tensor, rows: Tensor, k: int) -> None:
    """ValueError unless `nearest` can answer; the norms of the rows are left to `_check_unit`."""
    if queries.dim() != 2 or rows.dim() != 2 or queries.shape[1] != rows.shape[1]:
        raise ValueError(f"search expects queries (Q, D) and rows (G, D), got {[*queries.shape]} and {[*rows.shape]}")
    if len(queries) == 0 or len(rows) == 0:
        raise ValueError(f"search needs queries and rows to search, got {len(queries)} and {len(rows)}")
    if queries.dtype != torch.float32 or rows.dtype != torch.float32:
        raise ValueError(f"search expects float32, got queries {queries.dtype} and rows {rows.dtype}; convert them")
    if queries.device != rows.device:
        raise ValueError(f"search expects one device, got queries on {queries.device} and rows on {rows.device}")
    if not 1 <= k <= len(rows):
        raise ValueError(f"k={k}: expected 1..{len(rows)}, the number of rows")
    _check_unit(queries, "query")


def _check_unit(vectors: Tensor, name: str) -> None:
    norms = torch.linalg.vector_norm(vectors, dim=1)
    wrong = ~((norms - 1).abs() <= UNIT)  # NaN fails every comparison
    if wrong.any():
        first = int(_first(wrong[None]))
        raise ValueError(
            f"{name} {first} has norm {norms[first].item():.4g}, expected 1; "
            "normalize finite ones (torch.nn.functional.normalize), leave out the others"
        )


# --- shards -----------------------------------------------------------------------------------------------------------


def merge(parts: Sequence[tuple[int, Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The answer over all shards from the answers of each, as `nearest` gives it for the whole.

    `parts`: (start, index (Q, k_s), cosine (Q, k_s)) of each shard, `start` being its first row's place in the whole;
    k_s = k, or the shard's number of rows where that is less. The highest over the shards is the highest of all, so
    this is exact, but for rows that differ by nearly TIE: a shard takes as equal what is within TIE of its own highest.
    Returns (Q, k) int64, (Q, k) float32. Raises ValueError if there is no part, or if they hold fewer than k columns.
    """
    columns = sum(index.shape[1] for _, index, _ in parts)
    if not 1 <= k <= columns:
        raise ValueError(f"k={k}: expected 1..{columns}, the columns of all {len(parts)} parts together")
    index = torch.cat([index + start for start, index, _ in parts], 1)
    return _order(index, torch.cat([cosine for _, _, cosine in parts], 1), k)


def _order(index: Tensor, cosine: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(Q, k) of the candidates (Q, C) by the rule of `nearest`."""
    index, order = index.sort(1)
    cosine = cosine.gather(1, order)
    left, chosen = cosine.clone(), []
    for _ in range(k):
        chosen.append(_first(left >= left.amax(1, keepdim=True) - TIE)[:, None])
        left.scatter_(1, chosen[-1], -math.inf)
    columns = torch.cat(chosen, 1)
    return index.gather(1, columns), cosine.gather(1, columns)


# --- FAISS ------------------------------------------------------------------------------------------------------------


def build_index(rows: Tensor, kind: str) -> "Index":
    """An index of `rows` (G, D), float32 of norm 1, which it refers to and does not copy. `kind`:

    exact        `nearest`, on any device
    faiss-exact  FAISS's own product and selection, with the answers of `nearest`; on the CPU
    faiss-ivf    approximate: see `Index`; on the CPU
    auto         exact below FAISS_FROM rows and on a GPU, else faiss-ivf if FAISS is installed; told once, either way

    Raises ValueError for another kind, rows that `nearest` refuses, a FAISS kind without FAISS or with rows on a GPU,
    and faiss-ivf of fewer than 16 rows.
    """
    if kind not in KINDS:
        raise UserError(f"kind {kind!r}: expected one of {', '.join(map(repr, KINDS))}")
    _check(rows[:1], rows, 1)
    _check_unit(rows, "row")
    if kind == "auto":
        kind = _choose(rows)
    if kind != "exact" and rows.device.type != "cpu":
        raise UserError(f"kind {kind!r}: expected rows on the CPU, got {rows.device}; take kind 'exact' there")
    return Index(rows, kind)


def _choose(rows: Tensor) -> str:
    """What "auto" means for `rows`."""
    if len(rows) < FAISS_FROM or rows.device.type != "cpu":
        return "exact"
    try:
        _faiss("auto")
    except ValueError:
        warn_once(f"{len(rows)} rows are searched one by one; pip install faiss-cpu for an approximate, quicker search")
        return "exact"
    warn_once(f"{len(rows)} rows are searched approximately, {NPROBE} cells of each query; kind 'exact' sees all")
    return "faiss-ivf"


class Index:
    """Rows to search, made by `build_index`. kind: what "auto" has become; nprobe: cells searched by faiss-ivf.

    faiss-ivf: the rows in about sqrt(G) cells around centres found by k-means on a sample, each row as D / 2 codes of 4
    bits (an inverted file of product quantisers, Jegou et al. 2011, doi:10.1109/TPAMI.2010.57). By these codes, the
    `nprobe` cells nearest to the query give k + CANDIDATES rows, whose exact cosines then decide. A row in another cell
    is missed.
    """

    def __init__(self, rows: Tensor, kind: str):
        self.rows, self.kind, self.nprobe = rows, kind, NPROBE
        if kind != "exact":
            faiss = _faiss(kind)
            self.rows = rows.detach().contiguous()
        if kind == "faiss-ivf":
            self.cells = _inverted_file(faiss, self.rows)

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Like `nearest`, k columns of row index and exact cosine; among the rows that faiss-ivf found, if it is that.

        Queries that FAISS gives fewer than k rows, or candidates that all count as equal, are asked again exactly: a
        row of a lower index may be equal too. Raises ValueError for queries or k that `nearest` refuses.
        """
        _check(queries, self.rows, k)
        if self.kind == "exact":
            return _nearest(queries, self.rows, k)
        count = min(k + CANDIDATES, len(self.rows))
        candidates = torch.cat([self._candidates(block, count) for block in queries.contiguous().split(BLOCK_QUERIES)])
        with _full_precision():
            scores = _cosines(queries, self.rows, candidates)  # (Q, k + CANDIDATES)
        index, cosine = _order(candidates, scores, k)
        if candidates.shape[1] < len(self.rows):
            last = cosine.amin(1)  # -infinity: fewer than k rows
            again = (scores.amin(1) >= last - 2 * TIE) | last.isinf()  # 2: FAISS rounds otherwise than torch
            if again.any():
                index[again], cosine[again] = _nearest(queries[again], self.rows, k)
        return index, cosine

    def _candidates(self, queries: Tensor, count: int) -> Tensor:
        """(Q, count) rows that FAISS thinks nearest, -1 where it has no more."""
        faiss = _faiss(self.kind)
        if self.kind == "faiss-ivf":
            self.cells.nprobe = min(self.nprobe, self.cells.nlist)
            _, found = self.cells.search(queries.numpy(), count)
        else:
            _, found = faiss.knn(queries.numpy(), self.rows.numpy(), count, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(found)


def _faiss(kind: str):
    """The module, with as many threads as torch has. ValueError if it is not installed."""
    try:
        import faiss
    except ImportError:
        raise UserError(f"kind {kind!r} needs FAISS: pip install faiss-cpu, or take kind 'exact'") from None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _inverted_file(faiss, rows: Tensor):
    """faiss.IndexIVFPQFastScan of `rows`, the same for the same rows."""
    count, dims = rows.shape
    if count < 16:
        raise ValueError(f"kind 'faiss-ivf': {count} rows, expected at least 16 to learn from; take kind 'exact'")
    cells = round(math.sqrt(count))
    codes = dims // 2 if dims % 2 == 0 else dims
    index = faiss.index_factory(dims, f"IVF{cells},PQ{codes}x4fs", faiss.METRIC_INNER_PRODUCT)
    index.cp.niter = KMEANS_STEPS
    for clustering in (index.cp, index.pq.cp):
        clustering.min_points_per_centroid = 1  # no warning for a few rows
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    index.train(rows[shuffled[: SAMPLE_PER_CELL * max(cells, 16)]].numpy())
    index.add(rows.numpy())
    return index


@torch.no_grad()
def recall(index: Index, queries: Tensor, rows: Tensor) -> float:
    """Recall@1: share (0..1) of queries whose first answer by `index` is that of `nearest` among `rows`.

    Raises what `nearest` raises.
    """
    found, _ = index.search(queries, 1)
    return (found == nearest(queries, rows)[0]).double().mean().item()
