"""Nearest templates by cosine, of a thousand rows or of millions: exact in blocks, through FAISS, or in Milvus."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from common import UserError, first_line, optional_package, warn_once
from scores import TIE

# `_faiss` imports FAISS, so torch comes first: on Linux FAISS then shares torch's OpenMP threads instead of its own.

BLOCK_SCORES = 2**22  # cosines held at a time: 16 MiB of float32, still in the cache when their maxima are taken
BLOCK_QUERIES = 4096  # queries at a time; fewer if that would make more than BLOCK_SCORES group maxima
GROUP = 1024  # rows per group: the maximum of each is kept, and only the best group is searched again
UNIT = 1e-3  # how far a norm may be from 1

KINDS = ("auto", "exact", "faiss-exact", "faiss-ivf")
FAISS_FROM = 200_000  # rows from which "auto" uses FAISS; an exact query takes about 40 ms on one core there
NPROBE = 256  # cells searched, of about sqrt(rows); random directions, the worst case: a quarter of them finds 92%
SAMPLE_PER_CELL = 64  # rows to learn each cell from, >= 39 as FAISS advises
KMEANS_STEPS = 10  # FAISS's own default for cells
CANDIDATES = 32  # rows beyond k that FAISS or Milvus returns, so that exact cosines can decide between them
MILVUS_ROWS = 1000  # templates or queries in one message to Milvus: 2 MB, of the 64 that it takes
MILVUS_MOST = 16_384  # rows that Milvus returns at most


# --- exact ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def nearest(queries: Tensor, rows: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """For each query the `k` rows of highest cosine, and those cosines.

    Shapes: (Q, D), (G, D), float32 rows of norm 1 on one device -> (Q, k) int64, (Q, k) float32.
    Column 0 is the lowest index among the rows whose cosine is within TIE of the highest; each further column applies
    the same rule to the rows that are left. So equal rows come in the order of their indices, cosines never rise by
    more than TIE from one column to the next, and a smaller k gives the first columns of a larger one.
    At most BLOCK_SCORES cosines are held at a time, and as many maxima.
    Raises ValueError if there is no query or no row, for other shapes or dtypes, two devices, k outside 1..G, or a row
    whose norm is not 1 within UNIT (zero, NaN or infinity, for example).
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
    """(B, ceil(G / GROUP)): each query's highest cosine in each group of GROUP rows. Nearly all the time goes here."""
    size = max(1, BLOCK_SCORES // len(queries) // GROUP) * GROUP
    scores = queries.new_empty(len(queries) * min(size, len(rows)))  # reused: allocating costs as much time
    maxima = []
    for block in rows.split(size):
        cosine = torch.mm(queries, block.T, out=scores[: len(queries) * len(block)].view(len(queries), len(block)))
        whole = len(block) // GROUP * GROUP
        maxima.append(cosine[:, :whole].unflatten(1, (-1, GROUP)).amax(2))
        if whole < len(block):
            maxima.append(cosine[:, whole:].amax(1, keepdim=True))
    return torch.cat(maxima, 1)


def _pick(queries: Tensor, rows: Tensor, maxima: Tensor, k: int) -> Tensor:
    """(B, k) row indices by the rule of `nearest`; `maxima`: of the groups, overwritten."""
    index = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    for column in range(k):
        lowest = maxima.amax(1, keepdim=True) - TIE  # (B, 1)
        group = _first(maxima >= lowest)  # no earlier group has a row within TIE of the highest
        present, counts = group.unique(return_counts=True)
        by_group = group.argsort(stable=True).split(counts.tolist())
        for number, of_group in zip(present.tolist(), by_group, strict=True):
            start = number * GROUP
            cosine = queries[of_group] @ rows[start : start + GROUP].T  # (b, GROUP)
            earlier = index[of_group, :column] - start
            query, taken = ((earlier >= 0) & (earlier < cosine.shape[1])).nonzero(as_tuple=True)
            cosine[query, earlier[query, taken]] = -math.inf
            # A product of another shape rounds differently: the group's highest counts even if it now misses the bound.
            row = _first(cosine >= torch.minimum(lowest[of_group], cosine.amax(1, keepdim=True)))
            index[of_group, column] = start + row
            maxima[of_group, number] = cosine.scatter(1, row[:, None], -math.inf).amax(1)
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
    """No TF32 or bfloat16, which `common.pick_device` allows: their error is a thousand times TIE."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _check(queries: Tensor, rows: Tensor, k: int) -> None:
    """Raise ValueError for what `nearest` cannot search; `_check_unit` checks the norms of the rows."""
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
            "normalize it (torch.nn.functional.normalize), or leave it out if it is zero or not finite"
        )


# --- FAISS ------------------------------------------------------------------------------------------------------------


def build_index(rows: Tensor, kind: str) -> "Index":
    """An index of `rows` (G, D), float32 of norm 1, which are referred to and not copied. `kind`:

    exact        `nearest`, on any device
    faiss-exact  FAISS's own product and selection, same result as `nearest`; on the CPU
    faiss-ivf    approximate: see `Index`; on the CPU
    auto         exact below FAISS_FROM rows and on a GPU; else, with a warning, faiss-ivf, or exact without FAISS

    Raises UserError for another kind, and for a FAISS kind without FAISS or with rows on a GPU; ValueError for rows
    that `nearest` refuses, and for faiss-ivf with fewer than 16 rows.
    """
    if kind not in KINDS:
        raise UserError(f"kind {kind!r}: expected one of {', '.join(map(repr, KINDS))}")
    _check(rows[:1], rows, 1)
    _check_unit(rows, "row")
    if kind == "auto":
        kind = _choose(rows)
    if kind != "exact" and rows.device.type != "cpu":
        raise UserError(f"kind {kind!r}: expected rows on the CPU, got {rows.device}; use kind 'exact' there")
    return Index(rows, kind)


def _choose(rows: Tensor) -> str:
    """What "auto" means for `rows`."""
    if len(rows) < FAISS_FROM or rows.device.type != "cpu":
        return "exact"
    try:
        _faiss("auto")
    except UserError:
        warn_once(f"{len(rows)} rows are searched one by one; pip install faiss-cpu for a faster, approximate search")
        return "exact"
    warn_once(f"{len(rows)} rows are searched approximately, {NPROBE} cells per query; kind 'exact' searches all")
    return "faiss-ivf"


class Index:
    """Rows to search, made by `build_index`. kind: never "auto"; nprobe: number of cells that faiss-ivf searches.

    faiss-ivf puts the rows into about sqrt(G) cells, around centres found by k-means on a sample, and encodes each row
    as D / 2 codes of 4 bits (inverted file with product quantization, Jegou et al. 2011, doi:10.1109/TPAMI.2010.57).
    The codes select k + CANDIDATES rows from the `nprobe` cells nearest to the query; exact cosines then decide. Rows
    in other cells are missed.
    """

    def __init__(self, rows: Tensor, kind: str):
        self.kind, self.nprobe = kind, NPROBE
        self.rows = rows if kind == "exact" else rows.detach().contiguous()
        self.faiss = None if kind == "exact" else _faiss(kind)
        self.cells = _inverted_file(self.faiss, self.rows) if kind == "faiss-ivf" else None

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(Q, k) row indices and exact cosines, as `nearest` gives them; faiss-ivf may miss rows.

        A query for which FAISS finds fewer than k rows, or candidates that all count as equal, is searched again
        exactly: a row of a lower index may be equal too. Raises ValueError for queries or k that `nearest` refuses.
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
            again = (scores.amin(1) >= last - 2 * TIE) | last.isinf()  # 2: FAISS rounds differently from torch
            if again.any():
                index[again], cosine[again] = _nearest(queries[again], self.rows, k)
        return index, cosine

    def _candidates(self, queries: Tensor, count: int) -> Tensor:
        """(Q, count) indices of the nearest rows according to FAISS, -1 where it finds no more."""
        if self.kind == "faiss-ivf":
            self.cells.nprobe = min(self.nprobe, self.cells.nlist)
            _, found = self.cells.search(queries.numpy(), count)
        else:
            metric = self.faiss.METRIC_INNER_PRODUCT
            _, found = self.faiss.knn(queries.numpy(), self.rows.numpy(), count, metric=metric)
        return torch.from_numpy(found)


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


def _faiss(kind: str):
    """The faiss module, using as many threads as torch. Raises UserError if it is not installed."""
    try:
        import faiss
    except ImportError:
        raise UserError(f"kind {kind!r} needs FAISS: pip install faiss-cpu, or use kind 'exact'") from None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _inverted_file(faiss, rows: Tensor):
    """faiss.IndexIVFPQFastScan of `rows`, the same for the same rows."""
    count, dims = rows.shape
    if count < 16:
        raise ValueError(f"kind 'faiss-ivf': {count} rows, expected at least 16 to learn from; use kind 'exact'")
    cells = round(math.sqrt(count))
    codes = dims // 2 if dims % 2 == 0 else dims
    index = faiss.index_factory(dims, f"IVF{cells},PQ{codes}x4fs", faiss.METRIC_INNER_PRODUCT)
    index.cp.niter = KMEANS_STEPS
    for clustering in (index.cp, index.pq.cp):
        clustering.min_points_per_centroid = 1  # no warning about few rows
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    index.train(rows[shuffled[: SAMPLE_PER_CELL * max(cells, 16)]].numpy())
    index.add(rows.numpy())
    return index


# --- Milvus -----------------------------------------------------------------------------------------------------------


class MilvusTemplates:
    """Templates kept in Milvus: embedded in a file by milvus-lite, or on a cluster, with the same answers.

    address: a path that ends in .db, or "http://host:19530". token: "user:password" of a cluster, "" for none.
    collection: its name there, made if there is none, for templates of `dims` numbers. Its index is FLAT, which
    compares each query with all templates; for an approximate one make the collection yourself first, with the same
    fields: "id" (INT64, primary) and "embedding" (FLOAT_VECTOR, metric IP).
    Raises UserError if pymilvus (for a file, milvus-lite) is not installed, or if the address cannot be reached or its
    collection has templates of other dimensions.
    """

    def __init__(self, address: Path | str, dims: int, collection: str = "templates", token: str = ""):
        remote = "://" in str(address)
        for package in ("pymilvus",) if remote else ("pymilvus", "milvus_lite"):
            optional_package(package, ("pymilvus", "milvus-lite"))
        import pymilvus

        if not remote and Path(address).suffix != ".db":
            raise UserError(f"{address}: expected the path of a file for Milvus that ends in .db, or http://host:port")
        self.collection = collection
        try:
            self.client = pymilvus.MilvusClient(str(address), token=token)
            if not self.client.has_collection(collection):
                self._create(pymilvus, dims)
            self.client.load_collection(collection)
            fields = self.client.describe_collection(collection)["fields"]
        except (pymilvus.MilvusException, OSError) as error:
            raise UserError(
                f"{address}: no Milvus that works ({first_line(error)}); start it, or correct its address or token"
            ) from error
        found = [field["params"].get("dim") for field in fields if field["name"] == "embedding"]
        if found != [dims]:
            self.close()
            raise UserError(
                f"{address}: the collection {collection!r} has no embeddings of {dims} numbers (found {found}); give "
                "another name"
            )

    def _create(self, pymilvus, dims: int) -> None:
        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", pymilvus.DataType.INT64, is_primary=True)
        schema.add_field("embedding", pymilvus.DataType.FLOAT_VECTOR, dim=dims)
        index = self.client.prepare_index_params()
        index.add_index(field_name="embedding", index_type="FLAT", metric_type="IP")
        self.client.create_collection(
            self.collection,
            schema=schema,
            index_params=index,
            consistency_level="Strong",  # a search sees what was inserted before it
        )

    def __len__(self) -> int:
        return self.client.query(self.collection, filter="", output_fields=["count(*)"])[0]["count(*)"]

    def insert(self, rows: Tensor, first: int) -> None:
        """Add `rows` (G, D), float32 of norm 1, under the numbers first, first + 1, ...; a number that is there already
        gets its new row. Raises ValueError for rows that `nearest` refuses."""
        _check(rows[:1], rows, 1)
        _check_unit(rows, "row")
        for block in rows.detach().cpu().split(MILVUS_ROWS):
            entities = [{"id": first + number, "embedding": row} for number, row in enumerate(block.numpy())]
            self.client.upsert(self.collection, entities)
            first += len(block)

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(Q, k) numbers of the nearest templates and their cosines, on the CPU, as `nearest` gives them.

        The rule for ties holds for the k + CANDIDATES rows that Milvus returns: among more equal ones, which of them it
        returns is Milvus's choice. Raises ValueError for queries that `nearest` refuses, for k outside 1..MILVUS_MOST,
        and if Milvus finds fewer than k templates.
        """
        if not 1 <= k <= MILVUS_MOST:
            raise ValueError(f"k={k}: expected 1..{MILVUS_MOST}, which Milvus returns at most")
        queries = queries.detach().cpu()
        _check(queries, queries, 1)
        hits = []
        for block in queries.split(MILVUS_ROWS):
            hits += self.client.search(
                self.collection,
                data=list(block.numpy()),
                anns_field="embedding",
                limit=min(k + CANDIDATES, MILVUS_MOST),
                output_fields=["id"],
            )
        fewest = min(map(len, hits))  # an approximate index may find fewer for one query than for another
        if fewest < k:
            raise ValueError(f"k={k}: Milvus found {fewest} templates; insert more, or ask for fewer")
        index = torch.tensor([[hit["id"] for hit in of_query[:fewest]] for of_query in hits])
        cosine = torch.tensor([[hit["distance"] for hit in of_query[:fewest]] for of_query in hits])
        return _order(index, cosine, k)

    def close(self) -> None:
        self.client.close()
