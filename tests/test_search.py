"""Search against brute force in float64, with ties, blocks, shards and FAISS where it is installed."""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import search
from search import build_index, merge, nearest, recall
from tools import benchmark_search


def unit_rows(rows: int, dims: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed)))


def brute_force(queries: torch.Tensor, rows: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(Q, k) indices and float64 cosines by the rule, row by row: the lowest index within TIE of the highest left."""
    cosine = queries.double().numpy() @ rows.double().numpy().T
    index = np.empty((len(queries), k), dtype=np.int64)
    for q in range(len(queries)):
        left = list(range(len(rows)))
        for column in range(k):
            highest = max(cosine[q, row] for row in left)
            index[q, column] = min(row for row in left if cosine[q, row] >= highest - search.TIE)
            left.remove(index[q, column])
    return index, np.take_along_axis(cosine, index, 1)


def assert_is_brute_force(found, queries, rows, k) -> None:
    index, cosine = found
    assert index.dtype == torch.int64 and cosine.dtype == torch.float32
    expected, expected_cosine = brute_force(queries, rows, k)
    np.testing.assert_array_equal(index.numpy(), expected)
    np.testing.assert_allclose(cosine.numpy(), expected_cosine, atol=1e-6, rtol=0)


def small_blocks(monkeypatch, scores: int, group: int = 2) -> None:
    monkeypatch.setattr(search, "BLOCK_SCORES", scores)
    monkeypatch.setattr(search, "GROUP", group)


FAISS_KINDS = ("faiss-exact", "faiss-ivf")


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries, rows, dims, k", [(1, 1, 4, 1), (20, 7, 3, 7), (13, 50, 16, 5), (9, 3000, 64, 12)])
def test_nearest_equals_a_loop_over_all_pairs(queries, rows, dims, k):
    q, g = unit_rows(queries, dims, seed=0), unit_rows(rows, dims, seed=1)
    assert_is_brute_force(nearest(q, g, k), q, g, k)


def test_without_k_there_is_one_column():
    index, cosine = nearest(unit_rows(5, 8, seed=0), unit_rows(9, 8, seed=1))
    assert index.shape == cosine.shape == (5, 1)


@pytest.mark.parametrize("scores, group", [(1, 1), (7, 2), (30, 4), (64, 16), (2**20, 5)])
def test_blocks_give_the_result_of_one_block(monkeypatch, scores, group):
    q, g = unit_rows(23, 16, seed=3), unit_rows(41, 16, seed=4)
    g = torch.cat([g, g[5:25]])  # ties across blocks too
    small_blocks(monkeypatch, scores, group)
    for k in (1, 4, 61):
        assert_is_brute_force(nearest(q, g, k), q, g, k)


@pytest.mark.parametrize("copies", [2, 17, 100])
@pytest.mark.parametrize("group", [3, 1024])
def test_equal_rows_come_in_the_order_of_their_indices(monkeypatch, copies, group):
    monkeypatch.setattr(search, "GROUP", group)
    row = unit_rows(1, 512, seed=2)
    rows = torch.cat([-row, row.repeat(copies, 1), -row])
    for queries in (1, 5, 33):
        # Towards the row, but each with a rounding of its own: the sum's order must not decide.
        q = F.normalize(row + 0.05 * unit_rows(queries, 512, seed=queries))
        index, _ = nearest(q, rows, copies + 2)
        assert index.tolist() == [[*range(1, copies + 1), 0, copies + 1]] * queries


def near_ties() -> tuple[torch.Tensor, torch.Tensor]:
    """The query (1, 0), and rows whose cosines to it are 0.5 plus 0, 0.6, 1.2, 1.8 and -5 millionths."""
    cosine = 0.5 + 1e-6 * torch.tensor([0.0, 0.6, 1.2, 1.8, -5.0], dtype=torch.float64)
    return torch.tensor([[1.0, 0.0]]), torch.stack([cosine, (1 - cosine**2).sqrt()], 1).float()


@pytest.mark.parametrize("group", [1, 2, 3, 1024])
def test_what_is_within_tie_of_the_highest_left_is_a_tie_and_no_more(monkeypatch, group):
    monkeypatch.setattr(search, "GROUP", group)
    q, g = near_ties()
    # Highest is 1.8: 1.2 ties (row 2). Then 1.8 remains, alone (row 3). Then 0.6: 0 ties (row 0), and so on.
    assert nearest(q, g, 5)[0].tolist() == [[2, 3, 0, 1, 4]]


def test_a_smaller_k_gives_the_first_columns_of_a_larger_one():
    q, g = unit_rows(9, 8, seed=5), unit_rows(30, 8, seed=6).repeat(2, 1)
    index, cosine = nearest(q, g, 20)
    for k in (1, 2, 7):
        fewer, of_fewer = nearest(q, g, k)
        assert torch.equal(fewer, index[:, :k]) and torch.equal(of_fewer, cosine[:, :k])


def test_cosines_never_rise_by_more_than_tie_from_one_column_to_the_next():
    _, cosine = nearest(unit_rows(9, 4, seed=5), unit_rows(3000, 4, seed=6), 50)
    assert (cosine.diff(dim=1) <= search.TIE + 2e-7).all() and (cosine[:, 0] > cosine[:, -1]).all()


def test_no_more_than_block_scores_cosines_are_made_at_a_time(monkeypatch):
    small_blocks(monkeypatch, scores=400, group=10)
    made, mm = [], torch.mm

    def counted(a, b, **options):
        made.append(len(a) * b.shape[1])
        return mm(a, b, **options)

    monkeypatch.setattr(torch, "mm", counted)
    nearest(unit_rows(90, 8, seed=0), unit_rows(1000, 8, seed=1))
    assert sum(made) == 90 * 1000 and max(made) <= 400 and sum(made) / len(made) > 200  # nor needlessly few


def test_products_are_in_full_float32_and_the_callers_precision_is_put_back(monkeypatch):
    q, g = unit_rows(30, 64, seed=0), unit_rows(200, 64, seed=1)
    used, mm = set(), torch.mm

    def watched(a, b, **options):
        used.add(torch.get_float32_matmul_precision())
        return mm(a, b, **options)

    monkeypatch.setattr(torch, "mm", watched)
    torch.set_float32_matmul_precision("medium")  # TF32 or bfloat16, where the machine has them
    try:
        nearest(q, g, 3)
        assert used == {"highest"} and torch.get_float32_matmul_precision() == "medium"
        monkeypatch.setattr(search, "_pick", None)  # fails midway
        with pytest.raises(TypeError):
            nearest(q, g)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_inputs_stay_as_they_are_and_no_gradient_is_kept():
    q, g = unit_rows(5, 8, seed=0).requires_grad_(), unit_rows(9, 8, seed=1).requires_grad_()
    before = q.detach().clone(), g.detach().clone()
    _, cosine = nearest(q, g, 2)
    assert not cosine.requires_grad and torch.equal(q, before[0]) and torch.equal(g, before[1])


@pytest.mark.parametrize("kind", ["exact", *FAISS_KINDS])
def test_embeddings_made_in_inference_mode_can_be_searched(kind):
    if kind != "exact":
        pytest.importorskip("faiss")
    with torch.inference_mode():  # as gallery.embed makes them
        q, g = unit_rows(20, 8, seed=0).clone(), unit_rows(30, 8, seed=1).clone()
    assert q.is_inference()
    assert_is_brute_force(build_index(g, kind).search(q, 3), q, g, 3)


@pytest.mark.parametrize("queries, rows", [(0, 3), (3, 0), (0, 0)])
def test_a_search_of_nothing_is_an_error_with_both_sizes(queries, rows):
    with pytest.raises(ValueError, match=f"needs queries and rows to search, got {queries} and {rows}"):
        nearest(torch.zeros(queries, 4), torch.zeros(rows, 4))


@pytest.mark.parametrize("k", [-1, 0, 4])
def test_k_outside_the_number_of_rows_is_an_error(k):
    with pytest.raises(ValueError, match=rf"k={k}: expected 1\.\.3, the number of rows"):
        nearest(unit_rows(2, 4, seed=0), unit_rows(3, 4, seed=1), k)


@pytest.mark.parametrize("queries, rows", [((2, 4), (3, 5)), ((4,), (3, 4)), ((2, 4), (4,))])
def test_shapes_that_do_not_match_are_an_error_with_both(queries, rows):
    with pytest.raises(ValueError, match=r"expects queries \(Q, D\) and rows \(G, D\), got \[") as e:
        nearest(torch.ones(queries), torch.ones(rows))
    assert str([*queries]) in str(e.value) and str([*rows]) in str(e.value)


def test_other_dtypes_and_other_devices_are_an_error():
    rows = unit_rows(3, 4, seed=0)
    with pytest.raises(ValueError, match=r"float32, got queries torch\.float64 and rows torch\.float32"):
        nearest(rows.double(), rows)
    with pytest.raises(ValueError, match="one device, got queries on meta and rows on cpu"):
        nearest(rows.to("meta"), rows)


@pytest.mark.parametrize("value, told", [(float("nan"), "nan"), (float("inf"), "inf"), (0.0, "0"), (3.0, "6")])
@pytest.mark.parametrize("name", ["query", "row"])
def test_a_vector_that_is_not_of_norm_1_is_an_error_naming_it(name, value, told):
    good, bad = unit_rows(9, 4, seed=0), unit_rows(9, 4, seed=1)
    bad[5], bad[7] = value, value
    arguments = (bad, good) if name == "query" else (good, bad)
    with pytest.raises(ValueError, match=f"^{name} 5 has norm {told}, expected 1; normalize"):
        nearest(*arguments)


# --- shards -----------------------------------------------------------------------------------------------------------


def in_shards(q, g, k, sizes):
    parts, start = [], 0
    for shard in g.split(sizes):
        parts.append((start, *nearest(q, shard, min(k, len(shard)))))
        start += len(shard)
    return merge(parts, k)


@pytest.mark.parametrize("k", [1, 4, 60])
def test_merged_shards_give_the_answer_of_the_whole(k):
    q, g = unit_rows(23, 16, seed=0), unit_rows(40, 16, seed=1)
    g = torch.cat([g, g[10:30]])  # equal rows in different shards
    index, cosine = in_shards(q, g, k, [25, 2, 33])
    whole, of_whole = nearest(q, g, k)
    assert torch.equal(index, whole)
    torch.testing.assert_close(cosine, of_whole, atol=1e-6, rtol=0)


def test_shards_may_be_merged_in_any_order():
    row = unit_rows(1, 8, seed=0)
    parts = [(start, *nearest(row, row.repeat(5, 1), 2)) for start in (10, 0, 5)]
    assert merge(parts, 4)[0].tolist() == [[0, 1, 5, 6]]


@pytest.mark.parametrize("parts, columns", [(0, 0), (2, 4)])
def test_fewer_columns_than_k_are_an_error(parts, columns):
    part = (0, *nearest(unit_rows(3, 4, seed=0), unit_rows(2, 4, seed=1), 2))
    with pytest.raises(ValueError, match=rf"k=5: expected 1\.\.{columns}, the columns of all {parts} parts"):
        merge([part] * parts, 5)


# --- indices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, 100])
def test_the_exact_index_answers_like_nearest(k):
    q, g = unit_rows(20, 16, seed=0), unit_rows(100, 16, seed=1)
    index, cosine = build_index(g, "exact").search(q, k)
    expected, of_expected = nearest(q, g, k)
    assert torch.equal(index, expected) and torch.equal(cosine, of_expected)


@pytest.mark.parametrize("k", [1, 5, 100])
def test_faiss_exact_equals_brute_force(k):
    pytest.importorskip("faiss")
    q, g = unit_rows(30, 16, seed=0), unit_rows(60, 16, seed=1)
    g = torch.cat([g, g[:40]])
    assert_is_brute_force(build_index(g, "faiss-exact").search(q, k), q, g, k)


@pytest.mark.parametrize("kind", FAISS_KINDS)
def test_more_equal_rows_than_faiss_is_asked_for_still_come_in_order(kind):
    pytest.importorskip("faiss")
    others, rows = unit_rows(200, 32, seed=3), torch.zeros(150, 32)
    cosine = 0.9 + 6e-7 * torch.linspace(0, 1, 150, dtype=torch.float64)  # rising, but all within TIE
    rows[:, 0], rows[:, 1] = cosine, (1 - cosine**2).sqrt()
    q = torch.cat([torch.eye(32)[:1].repeat(25, 1), others[:25]])
    index, _ = build_index(torch.cat([others, rows]), kind).search(q, 3)
    assert index[:25].tolist() == [[200, 201, 202]] * 25
    assert index[25:, 0].tolist() == list(range(25))


def test_faiss_exact_follows_near_ties_like_nearest():
    pytest.importorskip("faiss")
    q, g = near_ties()
    assert build_index(g, "faiss-exact").search(q, 5)[0].tolist() == [[2, 3, 0, 1, 4]]


def clustered(rows: int, seed: int) -> torch.Tensor:
    """Rows around 20 directions, as a search in cells likes them."""
    return F.normalize(unit_rows(20, 32, seed).repeat(rows // 20, 1) + 0.5 * unit_rows(rows, 32, seed + 1))


def test_faiss_ivf_finds_nearly_all_and_gives_the_exact_cosines_of_what_it_finds():
    pytest.importorskip("faiss")
    g = clustered(2000, seed=0)
    q = F.normalize(g[:200] + 0.3 * unit_rows(200, 32, seed=2))
    index = build_index(g, "faiss-ivf")
    index.nprobe = 12  # of 45 cells
    found, cosine = index.search(q, 4)
    exact = (q.double()[:, None] * g.double()[found]).sum(2)
    torch.testing.assert_close(cosine.double(), exact, atol=1e-6, rtol=0)
    assert all(len(set(row)) == 4 for row in found.tolist())
    assert recall(index, q, g) >= 0.95


def test_faiss_ivf_that_searches_all_cells_of_a_few_rows_is_exact():
    pytest.importorskip("faiss")
    q, g = unit_rows(30, 16, seed=0), unit_rows(30, 16, seed=1)
    assert_is_brute_force(build_index(g, "faiss-ivf").search(q, 5), q, g, 5)  # CANDIDATES: all 30 are compared


def test_faiss_ivf_is_the_same_for_the_same_rows():
    pytest.importorskip("faiss")
    q, g = unit_rows(50, 16, seed=0), unit_rows(1000, 16, seed=1)
    answers = []
    for _ in range(2):
        index = build_index(g, "faiss-ivf")
        index.nprobe = 2
        answers.append(index.search(q, 3)[0])
    assert torch.equal(*answers)


def test_where_the_cells_hold_fewer_than_k_rows_the_query_is_asked_exactly():
    pytest.importorskip("faiss")
    q, g = unit_rows(10, 16, seed=0), unit_rows(400, 16, seed=1)
    index = build_index(g, "faiss-ivf")
    index.nprobe = 1  # about 20 rows
    assert_is_brute_force(index.search(q, 150), q, g, 150)


def test_recall_is_the_share_of_first_answers_that_are_the_exact_ones():
    class ThirdIsWrong:
        def search(self, queries, k):
            index, cosine = nearest(queries, rows, k)
            index[2] = (index[2] + 1) % len(rows)
            return index, cosine

    q, rows = unit_rows(8, 16, seed=0), unit_rows(50, 16, seed=1)
    assert recall(ThirdIsWrong(), q, rows) == 7 / 8
    assert recall(build_index(rows, "exact"), q, rows) == 1


def test_faiss_takes_torchs_number_of_threads_even_if_imported_before_it_and_both_work():
    pytest.importorskip("faiss")
    script = """
import faiss, torch, search
faiss.omp_set_num_threads(2)
torch.set_num_threads(1)
rows = torch.nn.functional.normalize(torch.randn(100, 16))
for kind in ("faiss-exact", "faiss-ivf", "exact"):
    index, _ = search.build_index(rows, kind).search(rows, 1)
    assert index[:, 0].tolist() == list(range(100)), kind
assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == (1, 1)
"""
    folder = Path(search.__file__).parent
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["exact", *FAISS_KINDS])
def test_an_index_refuses_what_nearest_refuses(kind):
    if kind != "exact":
        pytest.importorskip("faiss")
    good, bad = unit_rows(20, 4, seed=0), unit_rows(20, 4, seed=1)
    bad[3] = float("nan")
    index = build_index(good, kind)
    with pytest.raises(ValueError, match="query 3 has norm nan"):
        index.search(bad, 1)
    with pytest.raises(ValueError, match=r"k=21: expected 1\.\.20"):
        index.search(good, 21)
    with pytest.raises(ValueError, match=r"got \[20, 3\] and \[20, 4\]"):
        index.search(good[:, :3], 1)
    with pytest.raises(ValueError, match="row 3 has norm nan"):
        build_index(bad, kind)
    with pytest.raises(ValueError, match="needs queries and rows to search, got 0 and 0"):
        build_index(good[:0], kind)


def test_an_unknown_kind_is_an_error_with_the_known_ones():
    with pytest.raises(ValueError, match="kind 'hnsw': expected one of 'auto', 'exact', 'faiss-exact', 'faiss-ivf'"):
        build_index(unit_rows(3, 4, seed=0), "hnsw")


def test_too_few_rows_to_learn_from_are_an_error():
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="'faiss-ivf': 15 rows, expected at least 16 to learn from"):
        build_index(unit_rows(15, 4, seed=0), "faiss-ivf")
    assert build_index(unit_rows(16, 4, seed=0), "faiss-ivf").kind == "faiss-ivf"


@pytest.fixture
def no_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)  # `import faiss` fails


@pytest.mark.parametrize("kind", FAISS_KINDS)
def test_a_faiss_kind_without_faiss_is_an_error_naming_the_package(no_faiss, kind):
    with pytest.raises(ValueError, match=f"kind '{kind}' needs FAISS: pip install faiss-cpu, or take kind 'exact'"):
        build_index(unit_rows(20, 4, seed=0), kind)


def test_auto_is_exact_for_few_rows_and_says_nothing(caplog):
    assert build_index(unit_rows(20, 4, seed=0), "auto").kind == "exact"
    assert caplog.messages == []


def test_auto_without_faiss_is_exact_and_says_so_once(no_faiss, monkeypatch, caplog):
    monkeypatch.setattr(search, "FAISS_FROM", 20)
    rows = unit_rows(20, 4, seed=0)
    with caplog.at_level(logging.WARNING):
        kinds = [build_index(rows, "auto").kind for _ in range(2)]
    assert kinds == ["exact", "exact"]
    (message,) = caplog.messages
    assert message.startswith("20 rows are searched one by one; pip install faiss-cpu")


def test_auto_with_faiss_is_approximate_from_many_rows_on_and_says_so_once(monkeypatch, caplog):
    pytest.importorskip("faiss")
    monkeypatch.setattr(search, "FAISS_FROM", 20)
    rows = unit_rows(20, 4, seed=0)
    with caplog.at_level(logging.WARNING):
        kinds = [build_index(rows, "auto").kind for _ in range(2)]
    assert kinds == ["faiss-ivf", "faiss-ivf"] and build_index(rows[:19], "auto").kind == "exact"
    (message,) = caplog.messages
    assert message.startswith("20 rows are searched approximately")


# --- benchmark --------------------------------------------------------------------------------------------------------


def test_the_benchmarks_queries_have_their_cosine_to_a_template_of_their_own():
    templates = benchmark_search.make_templates(200, 64, seed=0, block=30)
    queries, truth = benchmark_search.make_queries(templates, 50, 0.6, seed=0)
    torch.testing.assert_close(templates.norm(dim=1), torch.ones(200))
    torch.testing.assert_close(queries.norm(dim=1), torch.ones(50))
    torch.testing.assert_close((queries * templates[truth]).sum(1), torch.full((50,), 0.6))
    assert len(set(truth.tolist())) == 50
    assert (templates @ templates.T).fill_diagonal_(0).abs().max() < 0.6  # no block is another's copy


def measured_here(monkeypatch) -> list[dict]:
    """main() at a size where speed means nothing, in this process."""
    small = {"TEMPLATES": 300, "QUERIES": 40, "SINGLE": 2, "DIM": 64, "NPROBES": (1, 17), "BLOCK": 100, "K": 2}
    for name, value in small.items():
        monkeypatch.setattr(benchmark_search, name, value)
    monkeypatch.setattr(benchmark_search, "in_own_process", lambda measure, *arguments: measure(*arguments))
    return benchmark_search.main()


def test_the_benchmark_reports_what_few_cells_miss(monkeypatch, capsys):
    pytest.importorskip("faiss")
    exact, faiss_exact, one_cell, all_cells = measured_here(monkeypatch)
    assert exact["recall"] == faiss_exact["recall"] == all_cells["recall"] == 1 > one_cell["recall"]
    assert exact["top1"] == 1 > one_cell["top1"] > 0
    assert all(row["search"] > 0 and row["single"] > 0 and row["peak"] > 2**20 for row in (exact, one_cell))
    lines = capsys.readouterr().out.splitlines()
    assert [line[:24].strip() for line in lines[-4:]] == [
        *("exact", "faiss-exact", "faiss-ivf, nprobe 1", "faiss-ivf, nprobe 17")
    ]
    assert {len(line) for line in lines[-5:]} == {len(lines[-1])}  # the columns line up


def test_the_benchmark_measures_the_exact_search_where_faiss_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_search.importlib.util, "find_spec", lambda name: None)
    assert [row["name"] for row in measured_here(monkeypatch)] == ["exact"]
    assert "pip install faiss-cpu" in capsys.readouterr().out


def test_more_queries_than_templates_are_an_error(monkeypatch):
    monkeypatch.setattr(benchmark_search, "TEMPLATES", 5)
    with pytest.raises(ValueError, match="SINGLE=10, QUERIES=10000, TEMPLATES=5: expected 1 <= each <= the next"):
        benchmark_search.main()
