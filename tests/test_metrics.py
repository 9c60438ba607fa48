"""Figures of a retrieval, against loops over all pairs in float64 and cases counted by hand."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import beta, binom
from sklearn.metrics import average_precision_score, f1_score
from torch.overrides import TorchFunctionMode

import metrics
from metrics import (
    FIGURES,
    TEMPLATES,
    OpenSet,
    average_precision,
    bootstrap,
    cmc,
    compare,
    macro_f1,
    mean_templates,
    measure,
    open_rates,
    open_set,
    person_scores,
    ranking,
    roc,
    threshold_for,
    thresholds_without,
)

templates = pytest.mark.parametrize("template", TEMPLATES)
source_modes = pytest.mark.parametrize("sources", ["no sources", "some sources", "all sources"])


def unit_rows(rows: int, dims: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed)))


def random_case(sources: str = "some sources", seed: int = 0, queries: int = 40, photos=(1, 3, 2, 4, 1, 2, 3), dims=5):
    """queries, truth, sources, gallery, labels: gallery rows in no order, a query near a photo of its person, one in
    five queries of somebody who is not enrolled."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(len(photos)), photos))
    gallery = random.normal(size=(len(labels), dims))
    source = random.integers(len(labels), size=queries)
    asked = gallery[source] + random.normal(size=(queries, dims))
    truth = labels[source]
    stranger = np.arange(queries) % 5 == 4
    asked[stranger], truth[stranger] = random.normal(size=(stranger.sum(), dims)), -1
    without = {"no sources": 1.0, "some sources": 0.5, "all sources": 0.0}[sources]
    source[stranger | (random.random(queries) < without)] = -1
    asked, gallery = (F.normalize(torch.tensor(rows, dtype=torch.float32)) for rows in (asked, gallery))
    return asked, torch.tensor(truth), torch.tensor(source), gallery, torch.tensor(labels)


def given(scores, truth):
    """The inputs whose scores are `scores` (Q, P), bit for bit, under both templates."""
    scores = torch.as_tensor(scores, dtype=torch.float32)
    persons = scores.shape[1]
    none = torch.full((len(scores),), -1)
    return scores, torch.as_tensor(truth), none, torch.eye(persons), torch.arange(persons)


def on_a_grid(queries: int, persons: int, seed: int, steps: int = 32, absent: bool = True):
    """Scores (Q, P) in steps of 1 / steps, with many ties, the right person's higher on average; and truth."""
    random = np.random.default_rng(seed)
    scores = random.integers(-steps // 2, steps // 2, (queries, persons))
    truth = random.integers(-1 if absent else 0, persons, queries)
    scores[np.arange(queries), truth] += np.where(truth >= 0, steps // 4, 0)
    return scores / steps, truth


def loop_scores(inputs, template: str) -> list[list[float]]:
    """Score of each query against each person, with lists."""
    queries, truth, sources, gallery, labels = (tensor.double().tolist() for tensor in inputs)
    table = []
    for query, own, source in zip(queries, truth, sources, strict=True):
        line = []
        for person in range(int(max(labels)) + 1):
            photos = [row for place, row in enumerate(gallery) if labels[place] == person and place != source]
            cosines = [math.fsum(a * b for a, b in zip(query, photo, strict=True)) for photo in photos]
            if not photos:
                assert person == own
                line.append(-math.inf)
            elif template == "best":
                line.append(max(cosines))
            else:
                total = [math.fsum(column) for column in zip(*photos, strict=True)]
                line.append(math.fsum(cosines) / math.sqrt(math.fsum(value**2 for value in total)))
        table.append(line)
    return table


def all_scores(inputs, template: str) -> torch.Tensor:
    return torch.cat([scores for _, scores in person_scores(*inputs, template)])


class LargestTensor(TorchFunctionMode):
    """Counts the elements of the largest tensor that any call returns meanwhile."""

    elements = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


# --- scores -----------------------------------------------------------------------------------------------------------


@templates
@source_modes
@pytest.mark.parametrize("seed", range(3))
def test_the_scores_equal_a_loop_over_queries_and_persons(template, sources, seed):
    inputs = random_case(sources, seed)
    expected = torch.tensor(loop_scores(inputs, template), dtype=torch.float64)
    scores = all_scores(inputs, template)
    assert scores.dtype == torch.float32 and scores.shape == (40, 7)
    assert torch.equal(scores == -torch.inf, expected == -torch.inf)
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=2e-6)
    assert (expected == -torch.inf).any() == (sources != "no sources")  # the case holds lone photos


@templates
@pytest.mark.parametrize("photos", [(1, 1, 1, 1, 1), (2, 1, 1), (3,), (1,)])
def test_galleries_of_one_photo_each_or_one_person_are_scored_like_others(template, photos):
    inputs = random_case("some sources", 5, photos=photos)
    expected = torch.tensor(loop_scores(inputs, template), dtype=torch.float64)
    torch.testing.assert_close(all_scores(inputs, template).double(), expected, rtol=0, atol=2e-6)


def test_scores_worked_out_by_hand():
    gallery = torch.tensor([[0.0, 1.0], [-1.0, 0.0], [1.0, 0.0], [0.6, 0.8]])  # bob, ann, bob, bob
    labels = torch.tensor([1, 0, 1, 1])
    queries, half = torch.tensor([[1.0, 0.0]] * 3), math.sqrt(0.5)
    asked = (queries, torch.tensor([1, 1, 0]), torch.tensor([-1, 3, 1]), gallery, labels)
    of_bob = 1.6 / math.hypot(1.6, 1.8)
    expected = [[-1.0, of_bob], [-1.0, half], [-math.inf, of_bob]]
    torch.testing.assert_close(all_scores(asked, "mean"), torch.tensor(expected))
    asked = (queries, torch.tensor([1, 1, 0]), torch.tensor([-1, 2, 1]), gallery, labels)
    torch.testing.assert_close(all_scores(asked, "best"), torch.tensor([[-1.0, 1.0], [-1.0, 0.6], [-math.inf, 1.0]]))


def test_the_mean_template_is_a_row_of_norm_1_per_person_in_the_order_of_labels():
    gallery = torch.tensor([[0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]])
    half = math.sqrt(0.5)
    found = mean_templates(gallery, torch.tensor([1, 0, 1]))
    torch.testing.assert_close(found, torch.tensor([[-1.0, 0.0], [half, half]]))


@templates
@source_modes
@pytest.mark.parametrize("block_scores", [1, 7, 30, 64, 200])
def test_blocks_are_small_cover_every_query_once_and_do_not_change_a_score(
    monkeypatch, template, sources, block_scores
):
    inputs = random_case(sources)
    whole = all_scores(inputs, template)
    monkeypatch.setattr(metrics, "BLOCK_SCORES", block_scores)
    blocks = list(person_scores(*inputs, template))
    columns = len(inputs[3]) if template == "best" else 7
    seen = []
    for block, scores in blocks:
        seen += range(40)[block]
        assert scores.shape == (block.stop - block.start, 7)
        assert len(scores) * columns <= max(block_scores, columns)  # one query at least
    assert seen == list(range(40))
    assert len(blocks) == math.ceil(40 / max(1, block_scores // columns))  # no smaller than they need to be
    torch.testing.assert_close(torch.cat([scores for _, scores in blocks]), whole, rtol=0, atol=1e-6)


@templates
def test_scoring_leaves_the_inputs_alone(template):
    inputs = random_case("all sources")
    before = [tensor.clone() for tensor in inputs]
    all_scores(inputs, template)
    average_precision(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@pytest.mark.parametrize("function", [lambda *inputs: list(person_scores(*inputs)), ranking, roc])
def test_an_unknown_template_is_an_error_that_lists_the_known_ones(function):
    with pytest.raises(ValueError, match="TEMPLATE = 'median': expected one of 'mean', 'best'"):
        function(*random_case(), "median")


# --- ranking ----------------------------------------------------------------------------------------------------------


@templates
@source_modes
@pytest.mark.parametrize("block_scores", [2**24, 30])
def test_the_ranking_equals_a_sort_of_each_querys_scores(monkeypatch, template, sources, block_scores):
    monkeypatch.setattr(metrics, "BLOCK_SCORES", block_scores)
    inputs = random_case(sources, seed=3)
    found = ranking(*inputs, template)
    assert found.predicted.dtype == found.rank.dtype == torch.int64
    ranks = []
    for i, (line, own) in enumerate(zip(loop_scores(inputs, template), inputs[1].tolist(), strict=True)):
        order = sorted(range(7), key=lambda person: -line[person])
        ranks.append(order.index(own) + 1 if own >= 0 else 8)
        assert found.predicted[i] == order[0] and found.rank[i] == ranks[-1]
        assert found.score[i].item() == pytest.approx(line[order[0]], abs=2e-6)
        rival = max(score for person, score in enumerate(line) if person != own)
        assert found.rival[i].item() == pytest.approx(rival, abs=2e-6)
        genuine = line[own] if own >= 0 else math.nan
        assert found.genuine[i].item() == pytest.approx(genuine, abs=2e-6, nan_ok=True)
    assert len(set(ranks)) > 4  # the case decides something


def test_tied_scores_go_to_the_lower_label_right_or_wrong():
    scores = [[0.5, 0.5, 0.25], [0.5, 0.5, 0.25], [0.25, 0.5, 0.5], [0.25, 0.5, 0.5], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    found = ranking(*given(scores, [0, 1, 2, 0, 2, -1]), "mean")
    assert found.predicted.tolist() == [0, 0, 1, 1, 0, 0]
    assert found.rank.tolist() == [1, 2, 2, 3, 3, 4]
    assert found.rival.tolist() == [0.5] * 6
    assert found.genuine.tolist() == pytest.approx([0.5, 0.5, 0.5, 0.25, 0.5, math.nan], nan_ok=True)


@pytest.mark.parametrize("difference, equal", [(0.0, True), (5e-7, True), (-5e-7, True), (4e-6, False), (-4e-6, False)])
def test_scores_closer_than_a_millionth_are_equal(difference, equal):
    found = ranking(*given([[0.5, 0.5 + difference]] * 3, [0, 1, -1]), "best")
    first = 0 if equal or difference < 0 else 1
    assert found.predicted.tolist() == [first] * 3
    assert found.rank.tolist() == [1 + first, 2 - first, 3]
    assert found.score.tolist() == pytest.approx([0.5 + first * difference] * 3, abs=1e-7)


def test_a_chain_of_near_ties_gives_rank_1_to_the_answer_alone():
    chain = [0.5, 0.5 + 8e-7, 0.5 + 1.6e-6]  # neighbours are level, the ends are not
    found = ranking(*given([chain] * 3, [0, 1, 2]), "mean")
    assert found.predicted.tolist() == [1, 1, 1]
    assert found.rank[1] == 1 and (found.rank[[0, 2]] >= 2).all() and (found.rank <= 3).all()


def test_rank_1_is_the_right_answer_at_the_last_bit_of_a_tie_too():
    highest = np.arange(-40, 400, dtype=np.float32) * np.float32(2**-25) + np.float32(0.5)
    lower = np.full_like(highest, np.nextafter(np.float32(0.5), np.float32(0)))
    for scores in (np.stack([highest, lower], 1), np.stack([lower, highest], 1), np.stack([highest, highest[::-1]], 1)):
        for own in (0, 1):
            found = ranking(*given(torch.tensor(scores.copy()), [own] * len(scores)), "mean")
            assert torch.equal(found.rank == 1, found.predicted == own) and set(found.rank.tolist()) == {1, 2}


@templates
@pytest.mark.parametrize("seed", range(4))
def test_rank_1_is_the_right_answer_and_nothing_else_ties_included(template, seed):
    scores, truth = on_a_grid(200, 6, seed, steps=8)
    found = ranking(*given(scores, truth), template)
    assert torch.equal(found.rank == 1, found.predicted == torch.tensor(truth))
    for line, own, rank in zip(scores.tolist(), truth.tolist(), found.rank.tolist(), strict=True):
        order = sorted(range(6), key=lambda person: (-line[person], person))
        assert rank == (order.index(own) + 1 if own >= 0 else 7)


@templates
@pytest.mark.parametrize("dims", [3, 128, 512])
@pytest.mark.parametrize("photos", [1, 2, 3, 5])
def test_an_embedder_that_sees_nothing_names_the_first_person_and_scores_one_in_p(template, dims, photos):
    persons = 8
    labels = torch.arange(persons).repeat(photos)
    row = unit_rows(1, dims, seed=photos)
    gallery = row.repeat(len(labels), 1)
    for sources in (torch.full((len(labels),), -1), torch.arange(len(labels)) if photos > 1 else None):
        if sources is None:  # a lone photo's source leaves nothing
            continue
        found = ranking(gallery, labels, sources, gallery, labels, template)
        assert found.predicted.tolist() == [0] * len(labels)
        assert torch.equal(found.rank, labels + 1)
        assert cmc(found.rank, persons).tolist() == pytest.approx([k / persons for k in range(1, persons + 1)])


@templates
def test_a_lone_photo_asked_with_its_own_copy_comes_last(template):
    gallery = torch.eye(4)
    labels = torch.tensor([2, 0, 3, 1])
    found = ranking(gallery, labels, torch.arange(4), gallery, labels, template)
    assert found.rank.tolist() == [4] * 4 and found.genuine.tolist() == [-math.inf] * 4
    assert found.predicted.tolist() == [0, 1, 0, 0] and found.rival.tolist() == found.score.tolist() == [0.0] * 4


def test_the_only_person_has_no_rival():
    found = ranking(*given([[0.25], [0.5]], [0, -1]), "mean")
    assert (found.rank.tolist(), found.predicted.tolist()) == ([1, 2], [0, 0])
    assert found.rival.tolist() == [-math.inf, 0.5]


@pytest.mark.parametrize("queries, rows", [(0, 3), (3, 0), (0, 0)])
def test_a_ranking_of_nothing_is_an_error_with_both_sizes(queries, rows):
    none = torch.full((queries,), -1)
    with pytest.raises(ValueError, match=f"needs queries and a gallery, got {queries} and {rows} rows"):
        ranking(torch.zeros(queries, 4), none, none, torch.zeros(rows, 4), torch.arange(rows), "mean")


# --- CMC, average precision, F1 ---------------------------------------------------------------------------------------


def test_the_cmc_counts_the_queries_found_by_each_rank():
    found = cmc(torch.tensor([1, 3, 1, 2, 6, 9, 6, 3]), 4)
    assert found.dtype == torch.float64 and found.tolist() == [2 / 8, 3 / 8, 5 / 8, 5 / 8]
    assert cmc(torch.tensor([2, 1]), 1).tolist() == [0.5]


def test_average_precision_counted_by_hand():
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5]] * 6)
    labels = torch.tensor([0, 1, 0, 2, 1])
    truth, sources = torch.tensor([0, 1, 2, -1, 0, 2]), torch.tensor([-1, -1, -1, -1, 0, 3])
    found = average_precision(scores, truth, sources, torch.eye(5), labels)
    assert found.dtype == torch.float64
    # Photos at places 1 and 3; 2 and 5; 4; none; the third is second once the first is out; nothing but the source.
    assert found.tolist() == pytest.approx([(1 + 2 / 3) / 2, (1 / 2 + 2 / 5) / 2, 1 / 4, 0, 1 / 2, 0], abs=1e-12)


@source_modes
@pytest.mark.parametrize("block_scores", [1, 300, 2**24])
def test_average_precision_equals_sklearn_on_the_photos_without_the_source(monkeypatch, sources, block_scores):
    monkeypatch.setattr(metrics, "BLOCK_SCORES", block_scores)
    queries, truth, source, gallery, labels = inputs = random_case(sources, seed=8)
    found = average_precision(*inputs)
    cosines = queries.double().numpy() @ gallery.double().numpy().T
    several = 0
    for i in range(len(queries)):
        kept = np.arange(len(gallery)) != source[i].item()
        relevant = labels.numpy()[kept] == truth[i].item()
        expected = average_precision_score(relevant, cosines[i][kept]) if relevant.any() else 0.0
        assert found[i].item() == pytest.approx(expected, abs=1e-9)
        several += 0 < expected < 1
    assert several > 5


@pytest.mark.parametrize("queries", [1, 5, 33])
@pytest.mark.parametrize("copies", [3, 9, 17, 100])
@pytest.mark.parametrize("dims", [3, 128, 512])
def test_equal_photos_keep_the_gallerys_order_in_the_average_precision(copies, dims, queries):
    labels = torch.arange(copies) % 3
    row = unit_rows(1, dims, seed=2)
    asked = F.normalize(row + 0.05 * unit_rows(queries, dims, seed=queries))
    truth = torch.full((queries,), 2)
    found = average_precision(asked, truth, torch.full((queries,), -1), row.repeat(copies, 1), labels)
    expected = np.mean([1 / 3] * (copies // 3))  # places 3, 6, 9, ...: i of the first 3 i
    assert found.tolist() == pytest.approx([expected] * queries, abs=1e-12)


@pytest.mark.parametrize("step, place", [(0.0, 3), (5e-7, 3), (-5e-7, 3), (4e-6, 1), (-4e-6, 3)])
def test_photos_further_apart_than_rounding_are_ordered_by_their_cosine(step, place):
    cosines = torch.tensor([[0.5, 0.5, 0.5 + step, 0.25]])
    found = average_precision(cosines, torch.tensor([1]), torch.tensor([-1]), torch.eye(4), torch.tensor([0, 0, 1, 0]))
    assert found.tolist() == pytest.approx([1 / place])


def test_macro_f1_counted_by_hand():
    predicted, truth = torch.tensor([0, 0, 1, 2, 2, 5]), torch.tensor([0, 1, 1, -1, 2, -1])
    # F1: person 0 2/3, 1 2/3, 2 2/3, 5 (named by mistake) 0, the one who is not enrolled 0.
    assert macro_f1(predicted, truth) == pytest.approx(2 / 5, abs=1e-12)
    assert macro_f1(torch.tensor([3, 4]), torch.tensor([3, 4])) == 1.0
    assert macro_f1(torch.tensor([3, 4]), torch.tensor([4, 3])) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_equals_sklearn(seed):
    random = np.random.default_rng(seed)
    truth = random.integers(-1, 9, 50)
    predicted = np.where((random.random(50) < 0.5) & (truth >= 0), truth, random.integers(0, 12, 50))
    expected = f1_score(truth, predicted, average="macro", zero_division=0)
    assert macro_f1(torch.tensor(predicted), torch.tensor(truth)) == pytest.approx(expected, abs=1e-12)


# --- verification -----------------------------------------------------------------------------------------------------


def split_pairs(table, truth) -> tuple[np.ndarray, np.ndarray]:
    """Genuine and impostor scores."""
    genuine = [line[own] for line, own in zip(table, truth, strict=True) if own >= 0]
    impostor = [
        score for line, own in zip(table, truth, strict=True) for person, score in enumerate(line) if person != own
    ]
    return np.array(genuine), np.array(impostor)


def candidates(genuine: np.ndarray, impostor: np.ndarray) -> np.ndarray:
    """Every threshold that can matter: each score, a little above it, and infinity."""
    scores = np.concatenate([genuine, impostor])
    return np.concatenate([scores, scores + 1e-5, [np.inf]])


def rate(scores: np.ndarray, threshold: float) -> float:
    return float(np.mean(scores >= threshold))


@templates
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("block_scores", [2**24, 100])
def test_the_curve_holds_the_exact_rates_at_every_genuine_score(monkeypatch, template, seed, block_scores):
    monkeypatch.setattr(metrics, "BLOCK_SCORES", block_scores)
    scores, truth = on_a_grid(60, 25, seed)
    genuine, impostor = split_pairs(scores, truth)
    curve = roc(*given(scores, truth), template)
    assert (curve.genuine_pairs, curve.impostor_pairs) == (len(genuine), len(impostor))
    assert curve.thresholds.tolist() == sorted(set(genuine.tolist()), reverse=True)
    assert curve.tar.dtype == curve.far.dtype == torch.float64
    assert curve.tar.tolist() == pytest.approx([rate(genuine, t) for t in curve.thresholds.tolist()], abs=1e-15)
    assert curve.far.tolist() == pytest.approx([rate(impostor, t) for t in curve.thresholds.tolist()], abs=1e-15)
    above = [float(np.mean(impostor > t)) for t in curve.thresholds.tolist()]
    assert curve.far_above.tolist() == pytest.approx(above, abs=1e-15)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", [8, 64])  # many ties, and few
@pytest.mark.parametrize("far", [0.0071, 0.01, 0.02, 0.1, 0.3])
def test_tar_at_far_is_the_best_of_all_thresholds_that_keep_the_far(seed, steps, far):
    scores, truth = on_a_grid(60, 25, seed, steps)
    genuine, impostor = split_pairs(scores, truth)
    tar, threshold = roc(*given(scores, truth), "mean").at_far(far)
    kept = [t for t in candidates(genuine, impostor) if rate(impostor, t) <= far]
    assert tar == pytest.approx(max(rate(genuine, t) for t in kept), abs=1e-15)
    assert rate(impostor, threshold) <= far and rate(genuine, threshold) == pytest.approx(tar, abs=1e-15)
    assert threshold == min((t for t in genuine if t in kept), default=np.inf)


def loop_eer(genuine: np.ndarray, impostor: np.ndarray) -> float:
    """Where false accepts equal false rejects on straight lines between the rates at all scores, falling."""
    far, frr = 0.0, 1.0
    for threshold in sorted({*genuine.tolist(), *impostor.tolist()}, reverse=True):
        next_far, next_frr = rate(impostor, threshold), 1 - rate(genuine, threshold)
        if next_far >= next_frr:
            share = (frr - far) / (frr - far + next_far - next_frr)
            return far + share * (next_far - far)
        far, frr = next_far, next_frr
    raise AssertionError("at the lowest score all are accepted")


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("steps", [4, 8, 64, 10**4])  # many ties to none
@pytest.mark.parametrize("block_scores", [2**24, 50])
def test_the_eer_is_where_the_errors_are_equal_on_the_curve_of_all_thresholds(monkeypatch, seed, steps, block_scores):
    monkeypatch.setattr(metrics, "BLOCK_SCORES", block_scores)
    scores, truth = on_a_grid(30, 9, seed, steps)
    expected = loop_eer(*split_pairs(scores, truth))
    assert 0 < expected < 0.5
    assert roc(*given(scores, truth), "best").eer() == pytest.approx(expected, abs=1e-12)


def eer_of(genuine: list[float], impostor: list[float]) -> float:
    """Of ten times these scores each."""
    scores = torch.tensor([[score] for score in genuine + impostor]).repeat(10, 1)
    curve = roc(*given(scores, ([0] * len(genuine) + [-1] * len(impostor)) * 10), "mean")
    return curve.eer()


def test_the_eer_counted_by_hand():
    assert eer_of([0.5, 0.75], [0.0, 0.25]) == 0.0
    assert eer_of([0.0, 0.25], [0.5, 0.75]) == 1.0
    assert eer_of([0.5], [0.5]) == pytest.approx(0.5)  # half of the ties accepted
    assert eer_of([0.25, 0.75], [0.0, 0.5]) == pytest.approx(0.5)  # level stretch: FAR 0 .. 0.5 at FRR 0.5
    assert eer_of([0.25, 0.5, 0.75], [0.0, 0.5]) == pytest.approx(0.4)  # (0, 2/3) to (1/2, 1/3): 4/5 of the way
    # Four genuine pairs of 0.1 .. 0.4 and two impostors: FRR 1/4 at both ends of the level stretch of FAR 0 .. 1/2.
    assert eer_of([0.125, 0.25, 0.375, 0.5], [0.1875, 0.0]) == pytest.approx(0.25)
    # FAR 1/2 on the upright stretch of FRR 1 .. 0.
    assert eer_of([0.25, 0.375], [0.5, 0.0]) == pytest.approx(0.5)


@pytest.mark.parametrize("rounding", [0.0, 3e-7, -3e-7, 8e-7, -8e-7])
def test_pairs_that_rounding_alone_tells_apart_are_tied(rounding):
    assert eer_of([0.5], [0.5 + rounding]) == pytest.approx(0.5)
    scores = torch.tensor([[0.5, 0.5 + rounding]]).repeat(1000, 1)
    curve = roc(*given(scores, [0] * 1000), "mean")
    assert curve.far.tolist() == [1.0] and curve.far_above.tolist() == [0.0] and curve.at_far(0.01) == (0.0, math.inf)


@pytest.mark.parametrize("step, eer", [(4e-6, 1.0), (-4e-6, 0.0)])
def test_pairs_further_apart_than_rounding_are_not_tied(step, eer):
    assert eer_of([0.5], [0.5 + step]) == eer


def test_genuine_scores_that_rounding_alone_tells_apart_share_the_lowest_of_them_as_threshold():
    scores = torch.tensor([[0.5], [0.5 + 5e-7], [0.5 + 9e-7], [0.5 + 4e-6], [0.25]])
    curve = roc(*given(scores, [0] * 5), "mean")
    assert curve.thresholds.tolist() == [scores[3].item(), 0.5, 0.25] and curve.genuine_pairs == 5
    assert curve.tar.tolist() == pytest.approx([0.2, 0.8, 1.0])


@templates
@source_modes
def test_the_curve_of_embeddings_equals_a_loop_over_all_pairs(template, sources):
    inputs = random_case(sources, seed=2, queries=80)
    genuine, impostor = split_pairs(loop_scores(inputs, template), inputs[1].tolist())
    curve = roc(*inputs, template)
    assert (curve.genuine_pairs, curve.impostor_pairs) == (len(genuine), len(impostor)) == (64, 80 * 7 - 64)
    thresholds = curve.thresholds.double().numpy() - 3e-6  # float32 rounding
    assert curve.tar.tolist() == pytest.approx([rate(genuine, t) for t in thresholds], abs=1e-12)
    assert curve.far.tolist() == pytest.approx([rate(impostor, t) for t in thresholds], abs=3 / len(impostor))
    expected = loop_eer(genuine, impostor)
    assert curve.eer() == pytest.approx(expected, abs=3 / len(impostor))
    assert 0.05 < expected < 0.95


def test_a_perfect_separation_has_no_error_and_its_threshold_is_the_lowest_genuine_score():
    scores = torch.full((40, 30), 0.25)
    truth = torch.arange(40) % 30
    scores[torch.arange(40), truth] = torch.linspace(0.5, 0.9, 40)
    curve = roc(*given(scores, truth), "mean")
    assert curve.eer() == 0.0 and curve.at_far(0.01) == (1.0, 0.5)


def test_where_impostors_score_above_every_genuine_pair_no_tar_is_left_and_the_eer_is_1():
    scores = torch.full((40, 30), 0.75)
    truth = torch.arange(40) % 30
    scores[torch.arange(40), truth] = 0.5
    curve = roc(*given(scores, truth), "mean")
    assert curve.at_far(0.01) == (0.0, math.inf) and curve.eer() == 1.0
    assert curve.at_far(1.0) == (1.0, 0.5)


@pytest.mark.parametrize(
    "queries, persons, far, enough",
    [
        (40, 26, 0.01, True),  # 1000 impostor pairs: 10 false accepts
        (37, 28, 0.01, False),  # 999
        (40, 26, 0.001, False),
        (100, 101, 0.001, True),
        (10, 11, 0.1, True),
        (9, 12, 0.1, False),  # 99
    ],
)
def test_a_far_with_fewer_than_ten_false_accepts_to_expect_has_no_tar(queries, persons, far, enough):
    scores, truth = on_a_grid(queries, persons, 0, absent=False)
    assert (roc(*given(scores, truth), "mean").at_far(far) is not None) == enough


@pytest.mark.parametrize("queries, persons, enough", [(10, 2, True), (9, 30, False), (9, 2, False), (10, 1, False)])
def test_an_eer_needs_ten_pairs_of_each_sort(queries, persons, enough):
    scores, truth = on_a_grid(queries, persons, 0, absent=False)
    assert (roc(*given(scores, truth), "mean").eer() is not None) == enough


def test_without_an_enrolled_query_there_are_impostor_pairs_only():
    scores, _ = on_a_grid(50, 30, 0)
    curve = roc(*given(scores, [-1] * 50), "mean")
    assert (curve.genuine_pairs, curve.impostor_pairs) == (0, 1500)
    assert len(curve.thresholds) == len(curve.far) == len(curve.tar) == 0 and int(curve.genuine_bins.sum()) == 0
    assert curve.at_far(0.1) is None and curve.eer() is None


@templates
def test_a_lone_photo_with_its_source_left_out_is_never_accepted(template):
    labels = torch.arange(40)
    gallery = unit_rows(40, 16, seed=1)
    curve = roc(gallery, labels, labels, gallery, labels, template)
    assert curve.thresholds.tolist() == [-math.inf] and curve.genuine_pairs == 40
    assert curve.at_far(0.01) == (0.0, math.inf) and curve.eer() == 1.0


@templates
@source_modes
@pytest.mark.parametrize("block_scores", [2**24, 100])
def test_the_histograms_count_every_pair_between_its_edges(monkeypatch, template, sources, block_scores):
    monkeypatch.setattr(metrics, "BLOCK_SCORES", block_scores)
    inputs = random_case(sources, seed=2, queries=80)
    curve = roc(*inputs, template)
    table = all_scores(inputs, template).double().clamp(-1, 1).tolist()  # a score of -inf is in the first bin
    assert curve.edges.shape == (101,) and (curve.edges[0], curve.edges[-1]) == (-1, 1)
    for bins, scores in zip(
        (curve.genuine_bins, curve.impostor_bins), split_pairs(table, inputs[1].tolist()), strict=True
    ):
        assert bins.dtype == torch.int64 and int(bins.sum()) == len(scores)
        assert bins.tolist() == np.histogram(scores, 100, (-1, 1))[0].tolist()


def test_a_cosine_that_rounding_puts_outside_of_minus_1_to_1_is_counted_in_the_last_bins():
    scores = torch.full((3, 2), 1 + 2e-7)
    scores[:, 1] = -1 - 2e-7
    curve = roc(*given(scores, [0, 0, 0]), "mean")
    assert curve.genuine_bins[-1] == curve.impostor_bins[0] == 3


@templates
@pytest.mark.parametrize("photos", [2, 3, 4, 5])
@pytest.mark.parametrize("dims", [3, 64, 512])
def test_an_embedder_that_sees_nothing_tells_no_two_persons_apart(template, photos, dims):
    labels = torch.arange(40).repeat_interleave(photos)
    gallery = unit_rows(1, dims, seed=dims).repeat(len(labels), 1)
    curve = roc(gallery, labels, torch.arange(len(labels)), gallery, labels, template)
    # Its cosines differ by rounding alone, and by another rounding where a source is left out of the mean.
    assert curve.eer() == pytest.approx(0.5) and curve.at_far(0.01)[0] == 0.0


# --- open set ---------------------------------------------------------------------------------------------------------


def loop_open_set(inputs, template: str, half: set[int]):
    """(score, right, stranger) of each enrolled query where `half` is enrolled, then the others."""
    queries, truth, sources, gallery, labels = inputs
    answers = []
    for i in (truth >= 0).nonzero()[:, 0].tolist():
        own = truth[i].item()
        mine = half if own in half else set(range(int(labels.max()) + 1)) - half
        other = set(range(int(labels.max()) + 1)) - mine
        scores = loop_scores((queries[i : i + 1], truth[i : i + 1], sources[i : i + 1], gallery, labels), template)[0]
        best = max(mine, key=lambda person: scores[person])
        answers.append((scores[best], best == own, max(scores[person] for person in other)))
    return answers


def same_open_set(found: OpenSet, answers) -> bool:
    score, right, stranger = (np.array(column) for column in zip(*answers, strict=True))
    return (
        np.allclose(found.score.numpy(), score, atol=3e-6)
        and found.right.tolist() == right.tolist()
        and np.allclose(found.stranger.numpy(), stranger, atol=3e-6)
    )


@templates
@source_modes
@pytest.mark.parametrize("photos", [(1, 3), (2, 1, 3), (1, 3, 2, 4, 1), (2, 3, 1, 2, 2, 1)])
def test_an_open_set_is_one_split_in_halves_in_which_each_asks_once_enrolled_and_once_a_stranger(
    template, sources, photos
):
    inputs = random_case(sources, seed=4, photos=photos)
    persons = len(photos)
    splits = [set(half) for half in itertools.combinations(range(persons), persons // 2)]
    expected = [loop_open_set(inputs, template, half) for half in splits]
    drawn = set()
    for seed in range(6):
        found = open_set(*inputs, template, seed)
        asks = inputs[1] >= 0
        assert len(found.score) == len(found.right) == len(found.stranger) == int(asks.sum())
        assert torch.equal(found.person, inputs[1][asks])
        same = [number for number, answers in enumerate(expected) if same_open_set(found, answers)]
        # Of an even number of persons a half and its complement are one split.
        assert len(same) == (2 if persons % 2 == 0 else 1)
        drawn.add(tuple(same))
    assert (len(drawn) == 1) == (persons == 2)  # other seeds, other halves


@templates
@pytest.mark.parametrize("block_scores", [1, 50])
def test_the_open_set_depends_on_the_seed_and_not_on_blocks(monkeypatch, template, block_scores):
    inputs = random_case(seed=4)
    whole = open_set(*inputs, template, seed=3)
    monkeypatch.setattr(metrics, "BLOCK_SCORES", block_scores)
    again = open_set(*inputs, template, seed=3)
    for name in ("score", "right", "stranger", "half", "person"):
        torch.testing.assert_close(getattr(whole, name), getattr(again, name), atol=1e-6, rtol=0)


def test_an_open_set_of_one_person_is_an_error():
    with pytest.raises(ValueError, match="at least two persons"):
        open_set(*random_case(photos=(3,)), "mean", 0)


@pytest.mark.parametrize("size", [1, 2, 7, 99, 100, 101, 333, 1000])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.07, 0.1, 0.29, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("steps", [10, 10**5])  # many ties, and few
def test_the_threshold_is_the_lowest_that_keeps_the_promised_share_of_strangers(size, share, steps):
    random = np.random.default_rng(size)
    strangers = (random.integers(-steps, steps, size) / steps).astype(np.float32)
    threshold = threshold_for(torch.tensor(strangers), share)
    assert rate(strangers, threshold) <= share
    if share == 1:
        assert threshold == -math.inf
    else:
        assert np.float32(threshold) == threshold  # comparing float32 with it loses nothing
        assert rate(strangers, np.nextafter(np.float32(threshold), np.float32(-2))) > share + 1e-12


def test_a_threshold_is_strictly_above_the_first_stranger_refused():
    strangers = torch.tensor([0.25, 0.75, 0.5, 0.5, -0.5])
    above = {score: float(np.nextafter(np.float32(score), np.float32(2))) for score in (0.75, 0.5, 0.25, -0.5)}
    for share, score in ((0.0, 0.75), (0.19, 0.75), (0.2, 0.5), (0.4, 0.5), (0.6, 0.25), (0.8, -0.5)):
        assert threshold_for(strangers, share) == above[score]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("persons", [1, 2, 7, 60])
@pytest.mark.parametrize("steps", [10, 10**5])  # many ties, and few
def test_a_strangers_threshold_is_that_of_all_other_persons(share, persons, steps):
    random = np.random.default_rng(persons)
    scores = torch.tensor((random.integers(-steps, steps, 300) / steps).astype(np.float32))
    person = torch.tensor(random.integers(persons, size=300) ** 2)  # of uneven numbers, not 0, 1, 2, ...
    found = thresholds_without(scores, person, share)
    for i in range(300):
        assert found[i].item() == threshold_for(scores[person != person[i]], share)


def random_open_set(seed: int, queries: int = 1000, persons: int = 40) -> OpenSet:
    random = np.random.default_rng(seed)
    person = random.integers(persons, size=queries)
    score = (random.integers(0, 40, queries) / 40).astype(np.float32)
    stranger = (random.integers(-10, 30, queries) / 40).astype(np.float32)
    right = random.random(queries) < 0.7
    return OpenSet(*(torch.tensor(column) for column in (score, right, stranger, person % 2, person)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fpir", [0.05, 0.1, 0.25])
def test_nobody_meets_a_threshold_that_the_own_queries_gave(seed, fpir):
    """Each query against the lowest threshold that keeps the FPIR among others who are not enrolled."""
    opened = random_open_set(seed)
    found = opened.at_fpir(fpir)
    score, right, stranger, half, person = (column.numpy() for column in vars(opened).values())

    def lowest(strangers) -> float:
        return min(t for t in candidates(score, stranger) if rate(strangers, t) <= fpir)

    for i in range(0, 1000, 7):
        enrolled_in, other = half[i], 1 - half[i]
        answered = right[i] and score[i] >= lowest(stranger[half != enrolled_in])
        named = stranger[i] >= lowest(stranger[(half != other) & (person != person[i])])
        assert (found.answered[i].item(), found.named[i].item()) == (answered, named)
    assert 0 < found.answered.float().mean() < right.mean()
    for gallery in (0, 1):
        assert rate(stranger[half != gallery], found.thresholds[gallery]) <= fpir
    assert abs(found.named.float().mean() - fpir) < 0.03


def test_an_answer_at_the_threshold_itself_is_named_and_one_at_a_refused_strangers_score_is_not():
    stranger = torch.full((200,), 0.5)
    score = stranger.clone()
    score[:60] = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
    person = torch.arange(200)
    found = OpenSet(score, torch.ones(200, dtype=torch.bool), stranger, person % 2, person).at_fpir(0.1)
    assert found.answered.sum() == 60 and found.thresholds == (score[0].item(),) * 2
    assert not found.named.any()


@pytest.mark.parametrize(
    "strangers, fpir, enough", [(1000, 0.01, True), (999, 0.01, False), (100, 0.1, True), (99, 0.1, False)]
)
def test_a_fpir_with_fewer_than_ten_strangers_to_expect_has_no_dir(strangers, fpir, enough):
    column = torch.linspace(0, 1, strangers + 2000)
    half = (torch.arange(len(column)) >= strangers).long()  # the first ones are strangers to the gallery of the others
    person = torch.arange(len(column))
    assert (OpenSet(column, column > 0, column, half, person).at_fpir(fpir) is not None) == enough


def test_a_kind_that_resembles_everybody_is_named_beyond_the_promise_and_that_is_seen():
    """One threshold for all: the tenth that scores high takes up the whole promise, and the others none of it."""
    opened = random_open_set(0, queries=4000)
    hubs = torch.arange(4000) % 10 == 0
    opened = dataclasses.replace(opened, stranger=opened.stranger.where(~hubs, opened.stranger + 1))
    named = opened.at_fpir(0.05).named.float()
    assert named[hubs].mean() > 0.4 and named[~hubs].mean() == 0 and abs(named.mean() - 0.05) < 0.01


# --- bootstrap --------------------------------------------------------------------------------------------------------


def clustered(queries: int, persons: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values in 0..1 with NaN among them, and persons of arbitrary numbers, in no order."""
    random = np.random.default_rng(seed)
    person = random.permutation(np.concatenate([np.arange(persons), random.integers(persons, size=queries - persons)]))
    values = random.random((queries, columns)) * (0.3 + 0.7 * random.random(persons)[person, None])
    values[random.random(values.shape) < 0.15] = np.nan
    return torch.tensor(values), torch.tensor(person * 7 - 1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("block_scores", [1, 50, 2**24])
@pytest.mark.parametrize("bounded", [True, False])
def test_the_interval_equals_a_loop_over_the_persons_drawn(monkeypatch, seed, block_scores, bounded):
    monkeypatch.setattr(metrics, "BLOCK_SCORES", block_scores)
    values, person = clustered(60, 12, 3, seed)
    replicates = 101
    drawn = torch.randint(12, (replicates, 12), generator=torch.Generator().manual_seed(seed)).tolist()
    names = sorted(set(person.tolist()))
    means = []
    for replicate in drawn:
        rows = [row for number in replicate for row in values[person == names[number]].tolist()]
        means.append([np.mean([v for v in column if v == v]) for column in zip(*rows, strict=True)])
    expected = np.quantile(np.array(means), [0.025, 0.975], axis=0)
    found = bootstrap(values, person, seed, replicates, bounded)
    assert found.dtype == torch.float64 and found.shape == (2, 3)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values, person = clustered(60, 12, 2, 0)
    one, again, other = (bootstrap(values, person, seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(one, bootstrap(values, person, 1, metrics.REPLICATES, True))
    torch.testing.assert_close(one, other, atol=0.02, rtol=0)


@pytest.mark.parametrize("persons, enough", [(0, False), (1, False), (9, False), (10, True)])
def test_fewer_than_ten_persons_give_no_interval(persons, enough):
    person = torch.arange(persons).repeat(5)
    assert (bootstrap(torch.ones(5 * persons, 2), person, 0) is not None) == enough


def test_the_interval_covers_the_true_rate_of_clustered_queries_about_95_times_in_100():
    random = np.random.default_rng(0)
    persons, simulations = 60, 400
    photos = random.integers(1, 8, persons)
    person = np.repeat(np.arange(persons), photos)
    rates = random.beta(1.5, 1.0, (persons, simulations))  # a person's own rate of success; mean 0.6
    values = random.random((len(person), simulations)) < rates[person]
    low, high = bootstrap(torch.tensor(values).double(), torch.tensor(person), 0, 500)
    covered = ((low <= 0.6) & (high >= 0.6)).double().mean().item()
    assert 0.9 <= covered <= 0.985
    naive = bootstrap(torch.tensor(values).double(), torch.arange(len(person)), 0, 500)
    assert ((naive[0] <= 0.6) & (naive[1] >= 0.6)).double().mean() < covered - 0.05  # queries are no persons
    below, above = (high < 0.6).double().mean(), (low > 0.6).double().mean()
    assert below < 0.08 and above < 0.08


def test_queries_that_succeed_together_widen_the_interval_by_the_root_of_their_number():
    success = (torch.arange(100) % 3 > 0).double()
    values, person = success.repeat_interleave(9)[:, None], torch.arange(100).repeat_interleave(9)
    by_person = bootstrap(values, person, 0)
    by_query = bootstrap(values, torch.arange(900), 0)
    ratio = ((by_person[1] - by_person[0]) / (by_query[1] - by_query[0])).item()
    assert ratio == pytest.approx(3, rel=0.15)


@pytest.mark.parametrize("persons", [10, 37])
def test_a_rate_of_1_or_0_gets_the_exact_binomial_bound_over_persons(persons):
    person = torch.arange(persons).repeat(4)
    values = torch.stack([torch.ones(len(person)), torch.zeros(len(person))], 1)
    values[:persons] = torch.nan  # of each person three queries are left
    low, high = bootstrap(values, person, 0)
    bound = beta.ppf(0.025, persons, 1)
    assert bound == pytest.approx(0.025 ** (1 / persons))
    assert (low[0].item(), high[0].item()) == (pytest.approx(bound), 1.0)
    assert (low[1].item(), high[1].item()) == (0.0, pytest.approx(1 - bound))
    unbounded = bootstrap(values, person, 0, bounded=False)
    assert unbounded.tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_the_exact_bound_counts_the_persons_who_have_a_value():
    values = torch.full((40, 1), torch.nan)
    values[:12] = 1.0
    low, high = bootstrap(values, torch.arange(40), 0)[:, 0].tolist()
    assert (low, high) == (pytest.approx(0.025 ** (1 / 12)), 1.0)


def test_where_all_persons_agree_on_a_share_that_is_neither_0_nor_1_there_is_no_interval():
    person = torch.arange(20).repeat(2)
    values = torch.stack([torch.full((40,), 0.5), (torch.arange(40) < 20).double(), (person < 10).double()], 1)
    low, high = bootstrap(values, person, 0)
    assert low[:2].isnan().all() and high[:2].isnan().all() and 0 < low[2] < 0.5 < high[2] < 1
    difference = bootstrap(values, person, 0, bounded=False)
    assert difference[:, :2].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    scores = torch.tensor([[0.5, 0.25] + [0.0] * 10, [0.25, 0.5] + [0.0] * 10]).repeat(10, 1)
    figure = measure(*given(scores, [0] * 20), "mean", torch.arange(10).repeat_interleave(2), 0).figures["rank-1"]
    assert figure == {"value": 0.5, "low": None, "high": None}


def test_a_query_without_a_value_does_not_count_and_a_column_without_one_has_no_interval():
    values, person = clustered(60, 12, 1, 0)
    kept = ~values[:, 0].isnan()
    assert set(person[kept].tolist()) == set(person.tolist())
    with_nan = bootstrap(torch.cat([values, torch.full_like(values, torch.nan)], 1), person, 5)
    torch.testing.assert_close(with_nan[:, :1], bootstrap(values[kept], person[kept], 5))
    assert with_nan[:, 1].isnan().all()


def test_a_column_in_which_too_few_persons_count_has_no_interval():
    values = (torch.arange(24).reshape(12, 2) % 5 < 2).double()
    values[:3, 1] = torch.nan  # nine persons are left in the second column
    found = bootstrap(values, torch.arange(12), 0)
    assert not found[:, 0].isnan().any() and found[:, 1].isnan().all()


# --- all of them ------------------------------------------------------------------------------------------------------


def big_case(sources: str = "some sources", seed: int = 0, noise: float = 0.6):
    """60 persons of 1 to 4 photos, 1200 queries: enough for every figure but TAR at a FAR of 0.0001."""
    photos = tuple(np.random.default_rng(0).integers(1, 5, 60))
    queries, truth, source, gallery, labels = random_case(sources, seed, 1200, photos, 24)
    random = torch.Generator().manual_seed(seed)
    mine = torch.tensor([(labels == max(own, 0)).nonzero()[0, 0].item() for own in truth.tolist()])
    centre = unit_rows(60, 24, 1000)
    gallery = F.normalize(centre[labels] + noise / 5 * torch.randn(len(labels), 24, generator=random))
    near = centre[labels[mine]] + noise / 2 * torch.randn(len(truth), 24, generator=random)
    queries = torch.where((truth >= 0)[:, None], F.normalize(near), queries)
    persons = torch.where(truth >= 0, truth, 1000 + torch.arange(len(truth)) % 30)
    return (queries, truth, source, gallery, labels), persons


@templates
@source_modes
def test_measure_reports_each_figure_as_the_functions_give_it(template, sources):
    inputs, persons = big_case(sources)
    truth = inputs[1]
    found = measure(*inputs, template, persons, 7)
    assert tuple(found.figures) == FIGURES
    assert set(FIGURES) == {
        *("rank-1", "rank-5", "rank-10", "mAP", "macro F1", "EER"),
        *("TAR@FAR=0.01", "TAR@FAR=0.001", "TAR@FAR=0.0001"),
        *("DIR@FPIR=0.01", "FPIR of 0.01", "DIR@FPIR=0.1", "FPIR of 0.1"),
    }
    ranked, curve = ranking(*inputs, template), roc(*inputs, template)
    opened = open_set(*inputs, template, 7).at_fpir(0.1)
    expected = {f"rank-{k}": np.mean(ranked.rank.numpy() <= k) for k in (1, 5, 10)}
    expected |= {"mAP": average_precision(*inputs).mean().item(), "macro F1": macro_f1(ranked.predicted, truth)}
    points = {f"TAR@FAR={far}": curve.at_far(far) for far in (0.01, 0.001)}
    points["DIR@FPIR=0.1"] = opened.answered.double().mean().item(), max(opened.thresholds)
    expected["FPIR of 0.1"] = opened.named.double().mean().item()
    expected |= {"EER": curve.eer()} | {name: point[0] for name, point in points.items()}
    for name in FIGURES:
        if name in expected:
            assert found.figures[name]["value"] == pytest.approx(expected[name], abs=1e-12), name
        else:
            assert found.figures[name] == {"value": None, "low": None, "high": None}, name
        assert set(found.figures[name]) == {"value", "low", "high"}
    assert found.thresholds == {name: point[1] for name, point in points.items()}
    assert 0.2 < expected["rank-1"] < expected["rank-5"] < expected["rank-10"] < 1  # the case decides something
    assert 0 < expected["DIR@FPIR=0.1"] < 1 and 0 < expected["TAR@FAR=0.001"] < expected["TAR@FAR=0.01"] <= 1
    torch.testing.assert_close(found.cmc, cmc(ranked.rank, 20))
    assert torch.equal(found.roc.far, curve.far) and torch.equal(found.roc.tar, curve.tar)


@templates
def test_a_figure_is_the_mean_of_its_values_and_lies_in_the_interval_of_them(template):
    inputs, persons = big_case()
    truth = inputs[1]
    found = measure(*inputs, template, persons, 7)
    names = set(FIGURES) - {"macro F1", "EER", "TAR@FAR=0.0001", "DIR@FPIR=0.01", "FPIR of 0.01"}
    assert set(found.values) == names
    ones = {"rank-1", "rank-5", "rank-10", "mAP"}
    for name in names:
        values, figure = found.values[name], found.figures[name]
        assert values.shape == (1200,) and values.dtype == torch.float64
        # A query of somebody who is not enrolled is a failure to identify; it takes no part in TAR and DIR.
        assert torch.equal(values.isnan(), (truth < 0) if name not in ones else torch.zeros(1200, dtype=torch.bool))
        assert name not in ones or (values[truth < 0] == 0).all()
        assert figure["value"] == pytest.approx(np.nanmean(values.numpy()), abs=1e-12)
        low, high = bootstrap(values[:, None], persons, 7)[:, 0].tolist()
        assert (figure["low"], figure["high"]) == (pytest.approx(low), pytest.approx(high))
        assert low <= figure["value"] <= high and low < high
    for name in ("macro F1", "EER"):
        assert found.figures[name]["low"] is None and found.figures[name]["high"] is None


def test_dir_at_a_fpir_of_one_in_a_hundred_is_reported_of_a_thousand_strangers_to_each_half():
    inputs, persons = big_case()
    asked = [torch.cat([tensor] * 3) for tensor in inputs[:3]]
    found = measure(*asked, *inputs[3:], "mean", persons.repeat(3), 7)
    low, high = (found.figures[f"DIR@FPIR={fpir}"]["value"] for fpir in (0.01, 0.1))
    assert 0 < low < high < 1
    assert found.thresholds["DIR@FPIR=0.01"] > found.thresholds["DIR@FPIR=0.1"]
    assert found.figures["TAR@FAR=0.0001"]["value"] is not None


@templates
def test_measure_does_not_depend_on_blocks(monkeypatch, template):
    inputs, persons = big_case()
    whole = measure(*inputs, template, persons, 7)
    monkeypatch.setattr(metrics, "BLOCK_SCORES", 5000)
    blocks = measure(*inputs, template, persons, 7)
    for name in FIGURES:
        for key in ("value", "low", "high"):
            assert blocks.figures[name][key] == pytest.approx(whole.figures[name][key], abs=2e-3), (name, key)


@pytest.mark.parametrize("persons", [2, 4, 9])
def test_somebody_who_is_not_enrolled_is_found_at_no_rank_however_small_the_gallery(persons):
    scores, _ = on_a_grid(20, persons, 0)
    found = measure(*given(scores, [-1] * 20), "mean", torch.arange(20), 0)
    assert [found.figures[f"rank-{k}"]["value"] for k in (1, 5, 10)] == [0.0] * 3
    assert found.cmc.tolist() == [0.0] * persons


def test_with_too_little_to_say_figures_are_none():
    found = measure(*given([[0.5, 0.25], [0.25, 0.5], [0.5, 0.25]], [0, 1, 1]), "mean", torch.tensor([0, 1, 1]), 0)
    values = {name: figure["value"] for name, figure in found.figures.items()}
    assert tuple(values) == FIGURES
    assert [values[name] for name in FIGURES[:4]] == pytest.approx([2 / 3, 1, 1, (1 + 1 + 1 / 2) / 3])
    assert values["macro F1"] == pytest.approx(2 / 3)
    assert all(values[name] is None for name in FIGURES[5:]) and found.thresholds == {}
    assert all(figure["low"] is figure["high"] is None for figure in found.figures.values())
    assert found.cmc.tolist() == pytest.approx([2 / 3, 1])


@templates
def test_a_gallery_of_one_person_has_ranks_and_no_open_set(template):
    inputs = random_case("no sources", photos=(3,), queries=40)
    found = measure(*inputs, template, torch.arange(40), 0)
    assert found.figures["rank-1"]["value"] == 0.8 and found.cmc.tolist() == [0.8]
    assert found.figures["rank-1"]["low"] < 0.8 < found.figures["rank-1"]["high"]
    assert found.figures["DIR@FPIR=0.1"]["value"] is None and found.roc.impostor_pairs == 8


def test_four_persons_are_the_fewest_for_an_open_set():
    """Two in either half: somebody to be refused, and somebody else to tell at which cosine."""
    scores = (torch.eye(4) / 2 + 0.25).repeat(50, 1)  # 0.75 as oneself, 0.25 as a stranger
    found = measure(*given(scores, torch.arange(200) % 4), "mean", torch.arange(200) % 4, 0)
    assert found.figures["DIR@FPIR=0.1"]["value"] == 1.0 and found.figures["FPIR of 0.1"]["value"] == 0.0
    assert 0.25 < found.thresholds["DIR@FPIR=0.1"] < 0.250001
    scores = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).repeat(100, 1)
    found = measure(*given(scores, torch.arange(200) % 2), "mean", torch.arange(200) % 2, 0)
    assert found.figures["DIR@FPIR=0.1"]["value"] is None


def test_the_queries_of_a_kind_meet_the_threshold_of_all():
    inputs, persons = big_case()
    opened = open_rates(*inputs, "mean", 7)
    whole = measure(*inputs, "mean", persons, 7)
    rows = torch.arange(0, 1200, 5)
    part = measure(*(of[rows] for of in inputs[:3]), *inputs[3:], "mean", persons[rows], 7, opened=opened.of(rows))
    for name in ("DIR@FPIR=0.1", "FPIR of 0.1"):
        torch.testing.assert_close(part.values[name], whole.values[name][rows], rtol=0, atol=0, equal_nan=True)
    assert part.thresholds["DIR@FPIR=0.1"] == whole.thresholds["DIR@FPIR=0.1"]


def test_a_measure_without_an_error_has_the_binomial_bound_of_its_persons():
    persons = torch.arange(12)
    figure = measure(*given(torch.eye(12), persons), "mean", persons, 0).figures["rank-1"]
    assert figure == {"value": 1.0, "low": pytest.approx(0.025 ** (1 / 12)), "high": 1.0}


def test_the_cmc_of_a_measure_ends_at_the_ranks_asked_for_or_at_the_last_person():
    inputs, persons = big_case()
    assert len(measure(*inputs, "mean", persons, 0).cmc) == 20
    assert len(measure(*inputs, "mean", persons, 0, ranks=3).cmc) == 3
    assert len(measure(*inputs, "mean", persons, 0, ranks=100).cmc) == 60


def test_with_queries_of_strangers_alone_there_is_nothing_to_accept():
    inputs, _ = big_case()
    truth = torch.full((1200,), -1)
    found = measure(inputs[0], truth, truth, *inputs[3:], "mean", torch.arange(1200) % 40, 0)
    values = {name: figure["value"] for name, figure in found.figures.items()}
    assert [values[name] for name in FIGURES[:5]] == [0.0] * 5 and [values[name] for name in FIGURES[5:]] == [None] * 8


# --- comparison -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_differs_from_itself_by_nothing():
    inputs, persons = big_case()
    found = measure(*inputs, "mean", persons, 0)
    differences = compare(found, found, persons, 0)
    assert set(differences) == set(found.values)
    assert all(difference == {"value": 0.0, "low": 0.0, "high": 0.0} for difference in differences.values())


def test_a_comparison_is_after_minus_before_with_the_interval_of_the_paired_difference():
    inputs, persons = big_case()
    before = measure(*inputs, "mean", persons, 0)
    near = F.normalize(inputs[0] + 0.08 * unit_rows(1200, 24, 5))
    after = measure(near, *inputs[1:], "mean", persons, 0)
    found = compare(before, after, persons, 3)
    for name in before.values:
        difference = after.values[name] - before.values[name]
        assert found[name]["value"] == pytest.approx(after.figures[name]["value"] - before.figures[name]["value"])
        low, high = bootstrap(difference[:, None], persons, 3, bounded=False)[:, 0].tolist()
        assert (found[name]["low"], found[name]["high"]) == (pytest.approx(low), pytest.approx(high))
        assert low <= found[name]["value"] <= high
    widths = [figure["high"] - figure["low"] for figure in (found["rank-1"], before.figures["rank-1"])]
    assert 0 < widths[0] < 0.6 * widths[1]  # the same queries are hard for both
    back = compare(after, before, persons, 3)
    assert back["rank-1"]["value"] == -found["rank-1"]["value"]
    assert back["rank-1"]["low"] == pytest.approx(-found["rank-1"]["high"])


def test_a_difference_of_1_at_every_person_gets_no_binomial_bound():
    truth = torch.arange(12)
    wrong = torch.eye(12).roll(1, 1)
    before, after = (measure(*given(scores, truth), "mean", truth, 0) for scores in (wrong, torch.eye(12)))
    assert compare(before, after, truth, 0)["rank-1"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_with_few_persons_a_comparison_has_no_interval():
    truth = torch.arange(9)
    found = measure(*given(torch.eye(9), truth), "mean", truth, 0)
    assert compare(found, found, truth, 0)["rank-1"] == {"value": 0.0, "low": None, "high": None}


def test_a_comparison_takes_the_figures_that_both_know():
    inputs, persons = big_case()
    before = measure(*inputs, "mean", persons, 0)
    after = measure(*inputs, "best", persons, 0)
    del before.values["TAR@FAR=0.001"], after.values["mAP"]
    assert set(compare(before, after, persons, 0)) == set(before.values) - {"mAP"}


@pytest.mark.parametrize("before, after, persons", [(12, 11, 12), (11, 12, 12), (12, 12, 11), (11, 11, 12)])
def test_other_numbers_of_queries_cannot_be_compared(before, after, persons):
    one, other = (measure(*given(torch.eye(12)[:n], range(n)), "mean", torch.arange(n), 0) for n in (before, after))
    message = f"the same queries: {before} before, {after} after, {persons} persons"
    with pytest.raises(ValueError, match=message):
        compare(one, other, torch.arange(persons), 0)


# --- chance -----------------------------------------------------------------------------------------------------------


@templates
@source_modes
def test_embeddings_that_say_nothing_get_the_figures_of_chance(template, sources):
    """Each query is its source's embedding: without the leave-out the figures would be perfect."""
    persons, photos, queries = 120, 3, 360
    gallery, labels = unit_rows(360, 32, seed=1), torch.arange(360) % persons
    source = torch.arange(queries)
    truth = labels[source].clone()
    asked = gallery[source].clone()
    if sources != "all sources":
        blind = torch.arange(queries) % 2 == 0 if sources == "some sources" else torch.ones(queries, dtype=torch.bool)
        asked[blind], source[blind] = unit_rows(queries, 32, seed=2)[blind], -1
    left_out = (source >= 0).double().mean().item()
    chance = 1 / persons
    if template == "best":  # the highest of all photos is anyone's; the right person has one less
        chance = (1 - left_out) * chance + left_out * (photos - 1) / (photos * persons - 1)
    found = ranking(asked, truth, source, gallery, labels, template)
    low, high = binom.interval(0.9999, queries, chance)
    assert low <= int((found.rank == 1).sum()) <= high
    assert found.rank.double().mean().item() == pytest.approx(persons / 2, rel=0.25)
    curve = roc(asked, truth, source, gallery, labels, template)
    if template == "mean" or sources == "no sources":
        assert curve.eer() == pytest.approx(0.5, abs=0.06)
        for far in (0.01, 0.1):
            assert curve.at_far(far)[0] == pytest.approx(far, abs=4 * math.sqrt(far / queries))
    else:  # the highest of 2 against the highest of 3: 1 - F^3 = F^2 at F = 0.7549
        expected = {"some sources": 0.535, "all sources": 0.57}[sources]
        assert curve.eer() == pytest.approx(expected, abs=0.06)


# --- size -------------------------------------------------------------------------------------------------------------


@templates
def test_thousands_of_queries_and_persons_are_measured_a_block_at_a_time(monkeypatch, template):
    queries, persons, block_scores = 2000, 3000, 2**18
    monkeypatch.setattr(metrics, "BLOCK_SCORES", block_scores)
    labels = torch.cat([torch.arange(persons), torch.arange(0, persons, 3)])
    gallery = unit_rows(len(labels), 32, seed=0)
    source = torch.arange(queries)
    asked = F.normalize(gallery[source] + 0.1 * unit_rows(queries, 32, seed=1))
    with LargestTensor() as largest:
        found = measure(asked, labels[source], source, gallery, labels, template, labels[source], 0)
    assert found.roc.impostor_pairs == queries * (persons - 1)
    assert int(found.roc.impostor_bins.sum()) == queries * (persons - 1)
    assert found.figures["rank-1"]["value"] < 0.02  # its own copy is left out, the other photo knows nothing of it
    assert found.figures["TAR@FAR=0.0001"]["value"] is not None
    assert largest.elements <= block_scores


# --- a face beside a frame --------------------------------------------------------------------------------------------


def joined(faces: torch.Tensor, frames: torch.Tensor, weight: float) -> torch.Tensor:
    """What models.FaceNet gives with crops: [face, weight x frame] of norm 1; a face of zeros is a burnt out one."""
    return F.normalize(torch.cat([F.normalize(faces), weight * F.normalize(frames)], 1))


def faces_and_frames(seed: int, count: int, persons: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % persons
    centres = torch.randn(persons, 512, generator=generator)
    faces = centres[labels] + torch.randn(count, 512, generator=generator)
    return faces, torch.randn(count, 512, generator=generator), labels


@pytest.mark.parametrize("block_scores", [1, 2**24])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_faces_are_averaged_and_frames_are_not(monkeypatch, weight, block_scores):
    monkeypatch.setattr(metrics, "BLOCK_SCORES", block_scores)
    faces, frames, labels = faces_and_frames(0, 17, 5)
    faces[[2, 7, 12]] = 0  # person 2: burnt out in every photo but none of the frames
    faces[3] = 0  # person 3: in one of three
    gallery, queries = joined(faces, frames, weight), joined(*faces_and_frames(1, 9, 5)[:2], weight)
    queries[4, :512] = 0
    queries = F.normalize(queries)
    truth = torch.tensor([0, 1, 2, 3, 4, 0, 1, -1, 3])
    sources = torch.tensor([0, -1, 7, 3, -1, 5, 1, -1, 8])

    expected = torch.empty(9, 5, dtype=torch.float64)
    for q in range(9):
        for person in range(5):
            own = [g for g in range(17) if labels[g] == person and not (g == sources[q] and truth[q] == person)]
            mean = F.normalize(sum(F.normalize(faces[g].double(), dim=0) for g in own), dim=0)
            rows = [joined(mean[None], frames[g : g + 1].double(), weight)[0] for g in own]
            expected[q, person] = max(queries[q].double() @ row for row in rows)
    blocks = metrics.person_scores(queries, truth, sources, gallery, labels, "mean")
    assert torch.allclose(torch.cat([scores for _, scores in blocks]).double(), expected, atol=1e-5)


def test_the_templates_of_faces_and_frames_score_as_the_queries_do():
    faces, frames, labels = faces_and_frames(2, 11, 4)
    faces[[1, 5, 9]], faces[4] = 0, 0
    gallery, queries = joined(faces, frames, 0.3), joined(*faces_and_frames(3, 6, 4)[:2], 0.3)
    nobody = torch.full((6,), -1)
    for template in metrics.TEMPLATES:
        rows, of_person = metrics.templates(gallery, labels, template)
        assert torch.equal(of_person, labels) and torch.allclose(rows.norm(dim=1), torch.ones(11), atol=1e-5)
        (_, scores), *_ = metrics.person_scores(queries, nobody, nobody, gallery, labels, template)
        cosine = queries @ rows.T
        best = torch.stack([cosine[:, labels == person].amax(1) for person in range(4)], 1)
        assert torch.allclose(scores, best, atol=1e-5)


def test_a_person_of_one_photo_is_that_photo_and_leaving_it_out_leaves_nothing():
    faces, frames, labels = faces_and_frames(4, 3, 3)
    gallery = joined(faces, frames, 0.3)
    assert torch.allclose(metrics.templates(gallery, labels, "mean")[0], gallery, atol=1e-5)
    truth = sources = torch.tensor([0, 1, 2])
    (_, scores), *_ = metrics.person_scores(gallery, truth, sources, gallery, labels, "mean")
    assert torch.equal(scores.isneginf(), torch.eye(3, dtype=torch.bool)) and not scores.isnan().any()


def test_a_frame_that_is_found_again_outvotes_a_mean_of_frames():
    """Why frames are kept: one of many photos of a person, its face burnt out, is found by its frame alone."""
    faces, frames, labels = faces_and_frames(5, 60, 6)
    gallery, query = joined(faces, frames, 0.3), joined(torch.zeros(60, 512), frames + 0.8 * frames.roll(1, 0), 0.3)
    nobody = torch.full((60,), -1)
    kept = metrics.ranking(query, labels, nobody, gallery, labels, "mean").predicted
    averaged = (query @ metrics.mean_templates(gallery, labels).T).argmax(1)
    assert (kept == labels).all() and (averaged == labels).float().mean() < 0.9


@pytest.mark.parametrize("dims", [16, 1024])
def test_the_norm_of_a_row_is_its_weight_in_the_mean_and_nothing_else(dims):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat_interleave(3)
    rows = F.normalize(torch.randn(15, dims, generator=generator))
    if dims > 512:  # a face of one norm beside a frame, one of them burnt out
        parts = [F.normalize(part) for part in rows.split(512, dim=1)]
        parts[0][4] = 0
        rows = F.normalize(torch.cat([parts[0], 0.3 * parts[1]], 1))
    weights = torch.tensor([1, 2, 4]).repeat(5)
    queries = F.normalize(rows + 0.2 * torch.randn(15, dims, generator=generator) / dims**0.5)
    weighted = rows * weights[:, None]
    for sources in (torch.full((15,), -1), torch.arange(15)):
        for template in ("best", "mean"):
            asked = (queries, labels, sources)
            found = torch.cat([s for _, s in metrics.person_scores(*asked, weighted, labels, template)])
            if template == "best":
                expected = [s for _, s in metrics.person_scores(*asked, rows, labels, template)]
                torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-6)
                continue
            # A photo of weight 2 counts like two photos, in the faces that are averaged.
            many, of_many = rows.repeat_interleave(weights, 0), labels.repeat_interleave(weights)
            if sources[0] < 0:
                expected = torch.cat([s for _, s in metrics.person_scores(*asked, many, of_many, template)])
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
                continue
            for query in range(15):  # its source left out, however often it is there
                others = (torch.arange(15) != query).repeat_interleave(weights)
                one = (queries[[query]], labels[[query]], torch.tensor([-1]))
                [(_, expected)] = metrics.person_scores(*one, many[others], of_many[others], template)
                torch.testing.assert_close(found[[query]], expected, rtol=0, atol=1e-5)
    precision = metrics.average_precision(queries, labels, torch.arange(15), weighted, labels)
    assert torch.equal(precision, metrics.average_precision(queries, labels, torch.arange(15), rows, labels))
    for template in ("best", "mean"):
        assert metrics.templates(weighted, labels, template)[0].norm(dim=1).tolist() == pytest.approx(
            [1.0] * (5 if (template, dims) == ("mean", 16) else 15), abs=1e-5
        )


# --- which photos to refuse? ------------------------------------------------------------------------------------------


def test_wrong_answers_left_are_counted_by_hand():
    quality, wrong = torch.tensor([0.9, 0.1, 0.5, 0.3]), torch.tensor([False, True, False, True])
    left = metrics.wrong_left(quality, wrong)
    assert left.tolist() == [2, 1, 0, 0, 0] and left.dtype == torch.float64
    assert [metrics.share_left(left, share) for share in (0, 0.2, 0.25, 0.49, 0.5, 1)] == [1, 1, 0.5, 0.5, 0, 0]
    assert metrics.share_left(torch.zeros(5), 0.2) is None
    assert metrics.wrong_left(-quality, wrong).tolist() == [2, 2, 2, 1, 0]  # the best way and the worst
    assert metrics.wrong_left(quality, torch.zeros(4, dtype=torch.bool)).tolist() == [0] * 5


def test_equal_qualities_are_refused_by_chance_whatever_the_order():
    wrong = torch.tensor([True, False, False, True])
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [1, 2, 0, 3]):
        assert metrics.wrong_left(torch.ones(4), wrong[order]).tolist() == pytest.approx([2, 1.5, 1, 0.5, 0])
    quality = torch.tensor([0.2, 0.2, 0.2, 0.7])  # three equals with one wrong, then a wrong one
    assert metrics.wrong_left(quality, wrong).tolist() == pytest.approx([2, 5 / 3, 4 / 3, 1, 0])


def test_wrong_answers_left_are_the_mean_over_all_orders_of_equals():
    generator = torch.Generator().manual_seed(0)
    quality = torch.randint(3, (7,), generator=generator).float()
    wrong = torch.rand(7, generator=generator) < 0.5
    counts = []
    for noise in torch.rand(4000, 7, generator=generator):
        order = (quality + 0.5 * noise).argsort()
        counts.append([int(wrong.sum() - wrong[order[:n]].sum()) for n in range(8)])
    mean = torch.tensor(counts, dtype=torch.double).mean(0)
    torch.testing.assert_close(metrics.wrong_left(quality, wrong), mean, rtol=0, atol=0.05)
