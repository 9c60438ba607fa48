"""Search against brute force in float64: ties, blocks, and FAISS where it is installed."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import search
from common import UserError
from search import build_index, nearest
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


@pytest.fixture
def faiss():
    return pytest.importorskip("faiss")


@pytest.fixture(params=["exact", "faiss-exact", "faiss-ivf"])
def kind(request) -> str:
    """Each kind of index that can be searched here."""
    if request.param != "exact":
        pytest.importorskip("faiss")
    return request.param


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries, rows, dims, k", [(1, 1, 4, 1), (20, 7, 3, 7), (9, 3000, 64, 12)])
def test_nearest_equals_a_loop_over_all_pairs(queries, rows, dims, k):
    q, g = unit_rows(queries, dims, seed=0), unit_rows(rows, dims, seed=1)
    assert_is_brute_force(nearest(q, g, k), q, g, k)


@pytest.mark.parametrize("scores, group", [(1, 1), (30, 4), (2**20, 5)])
def test_blocks_give_the_result_of_one_block(monkeypatch, scores, group):
    monkeypatch.setattr(search, "BLOCK_SCORES", scores)
    monkeypatch.setattr(search, "GROUP", group)
    q, g = unit_rows(13, 16, seed=3), unit_rows(31, 16, seed=4)
    g = torch.cat([g, g[5:15]])  # ties across blocks too
    assert_is_brute_force(nearest(q, g, 41), q, g, 41)


@pytest.mark.parametrize("group, copies", [(3, 17), (1024, 100)])
def test_equal_rows_come_in_the_order_of_their_indices(monkeypatch, group, copies):
    monkeypatch.setattr(search, "GROUP", group)
    row = unit_rows(1, 512, seed=2)
    rows = torch.cat([-row, row.repeat(copies, 1), -row])
    for queries in (1, 5, 33):
        # Towards the row, but each with a rounding of its own: the order of a sum must not decide.
        q = F.normalize(row + 0.05 * unit_rows(queries, 512, seed=queries))
        index, _ = nearest(q, rows, copies + 2)
        assert index.tolist() == [[*range(1, copies + 1), 0, copies + 1]] * queries


def near_ties() -> tuple[torch.Tensor, torch.Tensor]:
    """The query (1, 0), and rows whose cosines to it are 0.5 plus 0, 0.6, 1.2, 1.8 and -5 millionths."""
    cosine = 0.5 + 1e-6 * torch.tensor([0.0, 0.6, 1.2, 1.8, -5.0], dtype=torch.float64)
    return torch.tensor([[1.0, 0.0]]), torch.stack([cosine, (1 - cosine**2).sqrt()], 1).float()


@pytest.mark.parametrize("group", [1, 2, 1024])
def test_only_rows_within_tie_of_the_highest_left_are_tied(monkeypatch, group):
    monkeypatch.setattr(search, "GROUP", group)
    q, g = near_ties()
    # Highest is 1.8: 1.2 ties (row 2). Then 1.8 remains, alone (row 3). Then 0.6: 0 ties (row 0), and so on.
    assert nearest(q, g, 5)[0].tolist() == [[2, 3, 0, 1, 4]]


def test_a_smaller_k_gives_the_first_columns_of_a_larger_one():
    q, g = unit_rows(9, 8, seed=5), unit_rows(30, 8, seed=6).repeat(2, 1)
    index, cosine = nearest(q, g, 20)
    for k in (1, 7):
        fewer, of_fewer = nearest(q, g, k)
        assert torch.equal(fewer, index[:, :k]) and torch.equal(of_fewer, cosine[:, :k])
    assert torch.equal(nearest(q, g)[0], index[:, :1])  # k = 1 unless given


def test_at_most_block_scores_cosines_are_held_at_a_time(monkeypatch):
    monkeypatch.setattr(search, "BLOCK_SCORES", 400)
    monkeypatch.setattr(search, "GROUP", 10)
    made, mm = [], torch.mm

    def counted(a, b, out):
        made.append(len(a) * b.shape[1])
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    nearest(unit_rows(90, 8, seed=0), unit_rows(1000, 8, seed=1))
    assert sum(made) == 90 * 1000 and max(made) <= 400 and sum(made) / len(made) > 200  # nor needlessly few


def test_products_are_in_full_float32_and_the_callers_precision_is_restored(monkeypatch):
    q, g = unit_rows(30, 64, seed=0), unit_rows(200, 64, seed=1)
    used, mm = [], torch.mm

    def fails_the_second_time(a, b, out):
        used.append(torch.get_float32_matmul_precision())
        if len(used) > 1:
            raise TypeError
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", fails_the_second_time)
    torch.set_float32_matmul_precision("medium")  # TF32 or bfloat16, where the machine has them
    try:
        nearest(q, g, 3)
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(TypeError):
            nearest(q, g)
        assert torch.get_float32_matmul_precision() == "medium" and used == ["highest"] * 2
    finally:
        torch.set_float32_matmul_precision("highest")


def test_inputs_stay_unchanged_and_no_gradient_is_kept():
    q, g = unit_rows(5, 8, seed=0).requires_grad_(), unit_rows(9, 8, seed=1).requires_grad_()
    before = q.detach().clone(), g.detach().clone()
    _, cosine = nearest(q, g, 2)
    assert not cosine.requires_grad and torch.equal(q, before[0]) and torch.equal(g, before[1])


ROWS = unit_rows(9, 4, seed=0)
NAN, ZERO, TRIPLE = (ROWS.index_fill(0, torch.tensor([5]), value) for value in (float("nan"), 0.0, 3.0))


@pytest.mark.parametrize(
    "queries, rows, k, message",
    [
        (ROWS[:0], ROWS, 1, "needs queries and rows to search, got 0 and 9"),
        (ROWS, ROWS[:0], 1, "needs queries and rows to search, got 9 and 0"),
        (ROWS, ROWS, 0, r"k=0: expected 1\.\.9, the number of rows"),
        (ROWS, ROWS, 10, r"k=10: expected 1\.\.9, the number of rows"),
        (ROWS, ROWS[:, :3], 1, r"expects queries \(Q, D\) and rows \(G, D\), got \[9, 4\] and \[9, 3\]"),
        (ROWS[0], ROWS, 1, r"expects queries \(Q, D\) and rows \(G, D\), got \[4\] and \[9, 4\]"),
        (ROWS.double(), ROWS, 1, r"float32, got queries torch\.float64 and rows torch\.float32"),
        (ROWS.to("meta"), ROWS, 1, "one device, got queries on meta and rows on cpu"),
        (NAN, ROWS, 1, "^query 5 has norm nan, expected 1; normalize"),
        (TRIPLE, ROWS, 1, "^query 5 has norm 6, expected 1; normalize"),
        (ROWS, ZERO, 1, "^row 5 has norm 0, expected 1; normalize"),
    ],
)
def test_a_wrong_input_is_refused_with_what_was_found(queries, rows, k, message):
    with pytest.raises(ValueError, match=message):
        nearest(queries, rows, k)


# --- indices ----------------------------------------------------------------------------------------------------------


def test_every_kind_equals_brute_force_on_a_few_rows(kind):
    # faiss-ivf too: with CANDIDATES more than k, all 30 rows are compared.
    with torch.inference_mode():  # as embedding.embed makes embeddings
        q, g = unit_rows(20, 16, seed=0).clone(), unit_rows(20, 16, seed=1).repeat(2, 1)[:30].clone()
    for k in (1, 5, 30):
        assert_is_brute_force(build_index(g, kind).search(q, k), q, g, k)


@pytest.mark.parametrize("kind", ["faiss-exact", "faiss-ivf"])
def test_ties_among_more_rows_than_faiss_returns_still_come_in_order(faiss, kind):
    others, rows = unit_rows(200, 32, seed=3), torch.zeros(150, 32)
    cosine = 0.9 + 6e-7 * torch.linspace(0, 1, 150, dtype=torch.float64)  # rising, but all within TIE
    rows[:, 0], rows[:, 1] = cosine, (1 - cosine**2).sqrt()
    q = torch.cat([torch.eye(32)[:1].repeat(25, 1), others[:25]])
    index, _ = build_index(torch.cat([others, rows]), kind).search(q, 3)
    assert index[:25].tolist() == [[200, 201, 202]] * 25
    assert index[25:, 0].tolist() == list(range(25))


def test_faiss_exact_treats_near_ties_like_nearest(faiss):
    q, g = near_ties()
    assert build_index(g, "faiss-exact").search(q, 5)[0].tolist() == [[2, 3, 0, 1, 4]]


def test_faiss_ivf_finds_nearly_all_rows_the_same_each_time_with_their_exact_cosines(faiss):
    # Rows around 20 directions, which suit a search in cells.
    g = F.normalize(unit_rows(20, 32, seed=0).repeat(100, 1) + 0.5 * unit_rows(2000, 32, seed=1))
    q = F.normalize(g[:200] + 0.3 * unit_rows(200, 32, seed=2))
    found = []
    for _ in range(2):
        index = build_index(g, "faiss-ivf")
        index.nprobe = 12  # of 45 cells
        rows, cosine = index.search(q, 4)
        found.append(rows)
        exact = (q.double()[:, None] * g.double()[rows]).sum(2)
        torch.testing.assert_close(cosine.double(), exact, atol=1e-6, rtol=0)
    assert torch.equal(*found) and all(len(set(row)) == 4 for row in rows.tolist())
    recall = (rows[:, 0] == nearest(q, g)[0][:, 0]).double().mean()
    assert recall >= 0.95


def test_a_query_whose_cells_hold_fewer_than_k_rows_is_searched_exactly(faiss):
    q, g = unit_rows(5, 16, seed=0), unit_rows(400, 16, seed=1)
    index = build_index(g, "faiss-ivf")
    index.nprobe = 1  # about 20 rows
    assert_is_brute_force(index.search(q, 60), q, g, 60)


def test_faiss_uses_as_many_threads_as_torch(faiss):
    faiss.omp_set_num_threads(torch.get_num_threads() + 1)
    build_index(unit_rows(20, 4, seed=0), "faiss-exact")
    assert faiss.omp_get_max_threads() == torch.get_num_threads()


def test_an_index_refuses_what_nearest_refuses(kind):
    good, bad = unit_rows(20, 4, seed=0), unit_rows(20, 4, seed=1)
    bad[3] = float("nan")
    index = build_index(good, kind)
    with pytest.raises(ValueError, match="query 3 has norm nan"):
        index.search(bad, 1)
    with pytest.raises(ValueError, match=r"k=21: expected 1\.\.20"):
        index.search(good, 21)
    with pytest.raises(ValueError, match="row 3 has norm nan"):
        build_index(bad, kind)
    with pytest.raises(ValueError, match="needs queries and rows to search, got 0 and 0"):
        build_index(good[:0], kind)


def test_an_unknown_kind_and_too_few_rows_to_learn_from_are_refused(faiss):
    with pytest.raises(ValueError, match="kind 'hnsw': expected one of 'auto', 'exact', 'faiss-exact', 'faiss-ivf'"):
        build_index(unit_rows(3, 4, seed=0), "hnsw")
    with pytest.raises(ValueError, match="'faiss-ivf': 15 rows, expected at least 16 to learn from"):
        build_index(unit_rows(15, 4, seed=0), "faiss-ivf")


@pytest.mark.parametrize("kind", ["faiss-exact", "faiss-ivf"])
def test_a_faiss_kind_without_faiss_is_refused_with_the_package_to_install(monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "faiss", None)  # `import faiss` fails
    with pytest.raises(ValueError, match=f"kind '{kind}' needs FAISS: pip install faiss-cpu, or use kind 'exact'"):
        build_index(unit_rows(20, 4, seed=0), kind)


@pytest.mark.parametrize(
    "installed, kind, warning",
    [(True, "faiss-ivf", "20 rows are searched approximately"), (False, "exact", "20 rows are searched one by one")],
)
def test_auto_is_exact_for_few_rows_and_warns_once_about_its_choice_for_many(
    monkeypatch, caplog, installed, kind, warning
):
    if installed:
        pytest.importorskip("faiss")
    else:
        monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(search, "FAISS_FROM", 20)
    rows = unit_rows(20, 4, seed=0)
    assert build_index(rows[:19], "auto").kind == "exact" and not caplog.messages
    assert [build_index(rows, "auto").kind for _ in range(2)] == [kind] * 2
    assert [message.startswith(warning) for message in caplog.messages] == [True]


# --- Milvus -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["file", "server"])
def milvus(request, tmp_path):
    """Makes MilvusTemplates: of a file, or by the address of a server on this machine."""
    pytest.importorskip("pymilvus", reason="pip install pymilvus milvus-lite")
    manager = pytest.importorskip("milvus_lite.server_manager", reason="pip install pymilvus milvus-lite")
    address, opened = tmp_path / "templates.db", []
    if request.param == "server":
        address = manager.server_manager_instance.start_and_get_uri(str(address))

    def open_templates(dims: int, **names) -> search.MilvusTemplates:
        opened.append(search.MilvusTemplates(address, dims, **names))
        return opened[-1]

    yield open_templates
    for templates in opened:
        templates.close()
    manager.server_manager_instance.release_all()


def test_milvus_gives_the_answers_of_exact_search_on_ten_thousand_templates(milvus):
    g = unit_rows(10_000, 64, seed=0)
    q = F.normalize(g[:50] + unit_rows(50, 64, seed=1))
    templates = milvus(64)
    templates.insert(g[:6000], first=0)
    templates.insert(g[6000:], first=6000)
    assert len(templates) == 10_000
    assert_is_brute_force(templates.search(q, 3), q, g, 3)


def test_milvus_treats_near_ties_like_nearest_and_replaces_a_row_of_the_same_number(milvus):
    q, g = near_ties()
    templates = milvus(2)
    templates.insert(-g, first=0)
    templates.insert(g, first=0)
    assert templates.search(q, 5)[0].tolist() == [[2, 3, 0, 1, 4]]
    assert milvus(2).search(q, 5)[0].tolist() == [[2, 3, 0, 1, 4]]  # opened again


def test_milvus_refuses_what_nearest_refuses_and_a_collection_of_other_templates(milvus):
    good, bad = unit_rows(20, 4, seed=0), unit_rows(20, 4, seed=1)
    bad[3] = float("nan")
    templates = milvus(4)
    templates.insert(good, first=0)
    for refused, message in [
        (lambda: templates.insert(bad, first=20), "row 3 has norm nan"),
        (lambda: templates.search(bad, 1), "query 3 has norm nan"),
        (lambda: templates.search(good, 21), "k=21: Milvus found 20 templates"),
        (lambda: templates.search(good, 0), r"k=0: expected 1\.\.16384"),
        (lambda: milvus(5), "the collection 'templates' has no embeddings of 5 numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            refused()
    assert len(milvus(5, collection="others")) == 0


def test_without_pymilvus_or_with_another_suffix_milvus_is_refused(monkeypatch, tmp_path):
    for package in ("pymilvus", "milvus_lite"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "pymilvus", sys)
            patch.setitem(sys.modules, package, None)
            with pytest.raises(UserError, match=rf"the package {package} is .*: pip install pymilvus milvus-lite$"):
                search.MilvusTemplates(tmp_path / "a.db", 4)
    monkeypatch.setitem(sys.modules, "pymilvus", sys)
    monkeypatch.setitem(sys.modules, "milvus_lite", sys)
    with pytest.raises(UserError, match=r"a\.pt: expected the path of a file for Milvus that ends in \.db"):
        search.MilvusTemplates(tmp_path / "a.pt", 4)


# --- benchmark --------------------------------------------------------------------------------------------------------


def test_each_benchmark_query_has_the_given_cosine_to_its_own_template():
    templates = benchmark_search.make_templates(200, 64, seed=0, block=30)
    queries, truth = benchmark_search.make_queries(templates, 50, 0.6, seed=0)
    torch.testing.assert_close(templates.norm(dim=1), torch.ones(200))
    torch.testing.assert_close(queries.norm(dim=1), torch.ones(50))
    torch.testing.assert_close((queries * templates[truth]).sum(1), torch.full((50,), 0.6))
    assert len(set(truth.tolist())) == 50
    assert (templates @ templates.T).fill_diagonal_(0).abs().max() < 0.6  # no block is another's copy


@pytest.fixture
def small_benchmark(monkeypatch):
    """The benchmark at a size where speed means nothing, in this process."""
    small = {"TEMPLATES": 300, "QUERIES": 40, "SINGLE": 2, "DIM": 64, "NPROBES": (1, 17), "BLOCK": 100, "K": 2}
    small["MILVUS_UP_TO"] = 0
    for name, value in small.items():
        monkeypatch.setattr(benchmark_search, name, value)
    monkeypatch.setattr(benchmark_search, "in_own_process", lambda measure, *arguments: measure(*arguments))
    return benchmark_search


def test_the_benchmark_reports_what_few_cells_miss(faiss, small_benchmark, capsys):
    exact, faiss_exact, one_cell, all_cells = small_benchmark.main()
    assert exact["recall"] == faiss_exact["recall"] == all_cells["recall"] == 1 > one_cell["recall"]
    assert exact["top1"] == 1 > one_cell["top1"] > 0
    assert all(row["search"] > 0 and row["single"] > 0 and row["peak"] > 2**20 for row in (exact, one_cell))
    lines = capsys.readouterr().out.splitlines()
    names = ["exact", "faiss-exact", "faiss-ivf, nprobe 1", "faiss-ivf, nprobe 17"]
    assert [line[:24].strip() for line in lines[-4:]] == names
    assert {len(line) for line in lines[-5:]} == {len(lines[-1])}  # the columns line up


def test_without_faiss_the_benchmark_measures_the_exact_search(small_benchmark, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_search.importlib.util, "find_spec", lambda name: None)
    assert [row["name"] for row in small_benchmark.main()] == ["exact"]
    assert "pip install faiss-cpu" in capsys.readouterr().out


def test_the_benchmark_measures_milvus_among_few_templates_and_only_there(small_benchmark, monkeypatch):
    for package in ("pymilvus", "milvus_lite"):
        pytest.importorskip(package, reason="pip install pymilvus milvus-lite")
    monkeypatch.setattr(benchmark_search, "MILVUS_UP_TO", 300)
    monkeypatch.setattr(benchmark_search, "KINDS", ("auto", "exact"))
    exact, milvus = small_benchmark.main()
    assert milvus["name"] == "milvus" and milvus["recall"] == exact["recall"] == 1 and milvus["build"] > 0
    monkeypatch.setattr(benchmark_search, "TEMPLATES", 301)
    assert len(small_benchmark.main()) == 1


def test_a_benchmark_with_more_queries_than_templates_is_refused(monkeypatch):
    monkeypatch.setattr(benchmark_search, "TEMPLATES", 5)
    with pytest.raises(ValueError, match="SINGLE=10, QUERIES=10000, TEMPLATES=5: expected 1 <= each <= the next"):
        benchmark_search.main()
