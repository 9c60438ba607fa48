"""Figures of a retrieval, compared with loops over all pairs in float64 and with cases counted by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import Tensor

from intervals import difference_interval, rate_interval
from metrics import (
    FIGURES,
    Measured,
    OpenSet,
    average_precision,
    cmc,
    compare,
    macro_f1,
    measure,
    open_rates,
    open_set,
    ranking,
    roc,
    share_left,
    threshold_for,
    thresholds_without,
    wrong_left,
)
from scores import TEMPLATES, TIE, Scores, person_scores

both_templates = pytest.mark.parametrize("template", TEMPLATES)


def scores_of(matrix, truth) -> Scores:
    return Scores(torch.as_tensor(matrix, dtype=torch.float32), torch.as_tensor(truth))


def random_scores(queries: int, persons: int, seed: int, steps: int = 32, absent: bool = True) -> Scores:
    """In steps of 1 / steps, so with ties; the right person's score is higher on average. absent: some truth is -1."""
    random = np.random.default_rng(seed)
    matrix = random.integers(-steps // 2, steps // 2, (queries, persons))
    truth = random.integers(-1 if absent else 0, persons, queries)
    matrix[np.arange(queries), truth] += np.where(truth >= 0, steps // 4, 0)
    return scores_of(matrix / steps, truth)


def unit_rows(rows: int, dims: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed)))


def leave_one_out(gallery: Tensor, labels: Tensor, template: str) -> Scores:
    """Every gallery photo as a query, without itself."""
    return person_scores(
        queries=gallery,
        truth=labels,
        sources=torch.arange(len(gallery)),
        gallery=gallery,
        labels=labels,
        template=template,
        wide=False,
    )


# --- ranking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [8, 10**5])  # many ties, and few
def test_the_ranking_equals_a_sort_of_each_querys_scores_with_ties_in_the_order_of_labels(steps):
    scores = random_scores(200, 7, seed=3, steps=steps)
    found = ranking(scores)
    assert found.predicted.dtype == found.rank.dtype == torch.int64
    assert torch.equal(found.rank == 1, found.predicted == scores.truth)
    for i, (line, own) in enumerate(zip(scores.matrix.tolist(), scores.truth.tolist(), strict=True)):
        order = sorted(range(7), key=lambda person: (-line[person], person))
        assert found.predicted[i] == order[0] and found.score[i] == line[order[0]]
        assert found.rank[i] == (order.index(own) + 1 if own >= 0 else 8)
        assert found.rival[i] == max(score for person, score in enumerate(line) if person != own)
        assert found.genuine[i].isnan() if own < 0 else found.genuine[i] == line[own]
    assert set(found.rank.tolist()) == set(range(1, 9))


@pytest.mark.parametrize("difference, equal", [(0.0, True), (5e-7, True), (-5e-7, True), (4e-6, False), (-4e-6, False)])
def test_scores_closer_than_a_millionth_are_equal(difference, equal):
    found = ranking(scores_of([[0.5, 0.5 + difference]] * 3, [0, 1, -1]))
    first = 0 if equal or difference < 0 else 1
    assert found.predicted.tolist() == [first] * 3
    assert found.rank.tolist() == [1 + first, 2 - first, 3]
    assert found.score.tolist() == pytest.approx([0.5 + first * difference] * 3, abs=1e-7)


def test_a_chain_of_near_ties_gives_rank_1_to_the_answer_only():
    chain = [0.5, 0.5 + 8e-7, 0.5 + 1.6e-6]  # neighbours are level, the ends are not
    found = ranking(scores_of([chain] * 3, [0, 1, 2]))
    assert found.predicted.tolist() == [1, 1, 1]
    assert found.rank[1] == 1 and (found.rank[[0, 2]] >= 2).all() and (found.rank <= 3).all()


def test_rank_1_is_the_right_answer_at_the_last_bit_of_a_tie_too():
    highest = np.arange(-40, 400, dtype=np.float32) * np.float32(2**-25) + np.float32(0.5)
    lower = np.full_like(highest, np.nextafter(np.float32(0.5), np.float32(0)))
    for pair in ((highest, lower), (lower, highest), (highest, highest[::-1])):
        for own in (0, 1):
            found = ranking(scores_of(np.stack(pair, 1), [own] * len(highest)))
            assert torch.equal(found.rank == 1, found.predicted == own) and set(found.rank.tolist()) == {1, 2}


@both_templates
@pytest.mark.parametrize("photos, dims", [(2, 3), (3, 128), (5, 512)])
def test_a_network_that_gives_all_photos_one_embedding_scores_chance(template, photos, dims):
    """Its cosines differ by rounding only, and by other rounding where a source is left out of the mean."""
    labels = torch.arange(40).repeat_interleave(photos)
    scores = leave_one_out(unit_rows(1, dims, seed=dims).repeat(len(labels), 1), labels, template)
    found, curve = ranking(scores), roc(scores)
    assert found.predicted.tolist() == [0] * len(labels) and torch.equal(found.rank, labels + 1)
    assert cmc(found.rank, 40).tolist() == pytest.approx([k / 40 for k in range(1, 41)])
    assert curve.eer() == pytest.approx(0.5) and curve.at_far(0.01)[0] == 0.0


@both_templates
def test_a_query_whose_source_is_its_persons_only_photo_comes_last_and_is_never_accepted(template):
    scores = leave_one_out(torch.eye(40), torch.arange(40).roll(1), template)
    found, curve = ranking(scores), roc(scores)
    assert found.rank.tolist() == [40] * 40 and found.genuine.tolist() == [-math.inf] * 40
    assert set(found.predicted.tolist()) == {0, 1} and found.rival.tolist() == found.score.tolist() == [0.0] * 40
    assert curve.thresholds.tolist() == [-math.inf] and curve.genuine_pairs == 40
    assert curve.at_far(0.01) == (0.0, math.inf) and curve.eer() == 1.0


def test_the_only_person_has_no_rival():
    found = ranking(scores_of([[0.25], [0.5]], [0, -1]))
    assert (found.rank.tolist(), found.predicted.tolist()) == ([1, 2], [0, 0])
    assert found.rival.tolist() == [-math.inf, 0.5]


# --- CMC, average precision, F1 ---------------------------------------------------------------------------------------


def test_the_cmc_counts_the_queries_found_by_each_rank():
    found = cmc(torch.tensor([1, 3, 1, 2, 6, 9, 6, 3]), 4)
    assert found.dtype == torch.float64 and found.tolist() == [2 / 8, 3 / 8, 5 / 8, 5 / 8]
    assert cmc(torch.tensor([2, 1]), 1).tolist() == [0.5]


def test_average_precision_counted_by_hand():
    found = average_precision(
        queries=torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5]] * 6),
        truth=torch.tensor([0, 1, 2, -1, 0, 2]),
        sources=torch.tensor([-1, -1, -1, -1, 0, 3]),
        gallery=torch.eye(5),
        labels=torch.tensor([0, 1, 0, 2, 1]),
    )
    assert found.dtype == torch.float64
    # Photos at places 1 and 3; 2 and 5; 4; none; the third is second once the first is out; nothing but the source.
    assert found.tolist() == pytest.approx([(1 + 2 / 3) / 2, (1 / 2 + 2 / 5) / 2, 1 / 4, 0, 1 / 2, 0], abs=1e-12)


@pytest.mark.parametrize("block", [1, 300, 2**24])
def test_average_precision_equals_sklearn_on_the_photos_without_the_source(monkeypatch, block):
    monkeypatch.setattr("scores.BLOCK_COSINES", block)
    gallery, labels, source = unit_rows(16, 5, seed=1), torch.arange(16) % 6, torch.arange(40) % 16
    queries, truth = F.normalize(gallery[source] + 0.7 * unit_rows(40, 5, seed=2)), labels[source].clone()
    truth[::5], source[::5], source[1::5] = -1, -1, -1
    found = average_precision(queries=queries, truth=truth, sources=source, gallery=gallery, labels=labels)
    cosines = queries.double().numpy() @ gallery.double().numpy().T
    several = 0
    for i in range(40):
        kept = np.arange(16) != source[i].item()
        relevant = labels.numpy()[kept] == truth[i].item()
        expected = average_precision_score(relevant, cosines[i][kept]) if relevant.any() else 0.0
        assert found[i].item() == pytest.approx(expected, abs=1e-9)
        several += 0 < expected < 1
    assert several > 5


@pytest.mark.parametrize("copies, dims, queries", [(3, 3, 1), (9, 512, 5), (17, 128, 5), (100, 512, 33)])
def test_equal_photos_keep_the_gallerys_order_in_the_average_precision(copies, dims, queries):
    row = unit_rows(1, dims, seed=2)
    found = average_precision(
        queries=F.normalize(row + 0.05 * unit_rows(queries, dims, seed=queries)),
        truth=torch.full((queries,), 2),
        sources=torch.full((queries,), -1),
        gallery=row.repeat(copies, 1),
        labels=torch.arange(copies) % 3,
    )
    assert found.tolist() == pytest.approx([1 / 3] * queries, abs=1e-12)  # places 3, 6, 9, ...: i of the first 3 i


@pytest.mark.parametrize("step, place", [(0.0, 3), (5e-7, 3), (-5e-7, 3), (4e-6, 1), (-4e-6, 3)])
def test_photos_further_apart_than_rounding_are_ordered_by_their_cosine(step, place):
    found = average_precision(
        queries=torch.tensor([[0.5, 0.5, 0.5 + step, 0.25]]),
        truth=torch.tensor([1]),
        sources=torch.tensor([-1]),
        gallery=torch.eye(4),
        labels=torch.tensor([0, 0, 1, 0]),
    )
    assert found.tolist() == pytest.approx([1 / place])


def test_macro_f1_counted_by_hand():
    predicted, truth = torch.tensor([0, 0, 1, 2, 2, 5]), torch.tensor([0, 1, 1, -1, 2, -1])
    # F1: person 0 2/3, 1 2/3, 2 2/3, 5 (only ever a wrong answer) 0, those who are not enrolled 0.
    assert macro_f1(predicted, truth) == pytest.approx(2 / 5, abs=1e-12)
    assert macro_f1(torch.tensor([3, 4]), torch.tensor([3, 4])) == 1.0
    assert macro_f1(torch.tensor([3, 4]), torch.tensor([4, 3])) == 0.0


def test_macro_f1_is_the_mean_of_2_tp_over_queries_plus_answers_also_for_persons_not_enrolled():
    for seed in range(5):
        random = np.random.default_rng(seed)
        truth = random.integers(-1, 9, 50)
        predicted = np.where((random.random(50) < 0.5) & (truth >= 0), truth, random.integers(0, 12, 50))
        persons = sorted({*truth.tolist(), *predicted.tolist()})
        assert -1 in persons and set(predicted) - set(truth)
        tp = [np.sum((predicted == person) & (truth == person)) for person in persons]
        both = [np.sum(predicted == person) + np.sum(truth == person) for person in persons]
        expected = np.mean([2 * right / count for right, count in zip(tp, both, strict=True)])
        assert macro_f1(torch.tensor(predicted), torch.tensor(truth)) == pytest.approx(expected, abs=1e-12)


# --- verification -----------------------------------------------------------------------------------------------------


def split_pairs(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Genuine and impostor scores."""
    pairs = ([], [])
    for line, own in zip(scores.matrix.tolist(), scores.truth.tolist(), strict=True):
        for person, score in enumerate(line):
            pairs[person != own].append(score)
    return np.array(pairs[0]), np.array(pairs[1])


def candidates(genuine: np.ndarray, impostor: np.ndarray) -> np.ndarray:
    """Every threshold that can matter: each score, a little above it, and infinity."""
    both = np.concatenate([genuine, impostor])
    return np.unique(np.concatenate([both, both + 1e-5, [np.inf]]))


def rate(scores: np.ndarray, threshold: float) -> float:
    return float(np.mean(scores >= threshold))


@pytest.mark.parametrize("seed", range(3))
def test_the_curve_holds_the_exact_rates_at_every_genuine_score(seed):
    scores = random_scores(60, 25, seed)
    genuine, impostor = split_pairs(scores)
    curve = roc(scores)
    assert (curve.genuine_pairs, curve.impostor_pairs) == (len(genuine), len(impostor))
    thresholds = curve.thresholds.tolist()
    assert thresholds == sorted(set(genuine.tolist()), reverse=True)
    assert curve.tar.dtype == curve.far.dtype == torch.float64
    assert curve.tar.tolist() == pytest.approx([rate(genuine, t) for t in thresholds], abs=1e-15)
    assert curve.far.tolist() == pytest.approx([rate(impostor, t) for t in thresholds], abs=1e-15)
    assert curve.far_above.tolist() == pytest.approx([float(np.mean(impostor > t)) for t in thresholds], abs=1e-15)


@pytest.mark.parametrize("steps", [8, 64])  # many ties, and few
def test_tar_at_far_is_the_best_of_all_thresholds_that_keep_the_far(steps):
    for seed, far in itertools.product(range(3), (0.0071, 0.01, 0.02, 0.1, 0.3)):
        scores = random_scores(60, 25, seed, steps)
        genuine, impostor = split_pairs(scores)
        tar, threshold = roc(scores).at_far(far)
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


@pytest.mark.parametrize("steps", [4, 8, 64, 10**4])  # many ties to none
def test_the_eer_is_where_the_errors_are_equal_on_the_curve_of_all_thresholds(steps):
    for seed in range(8):
        scores = random_scores(30, 9, seed, steps)
        expected = loop_eer(*split_pairs(scores))
        assert 0 < expected < 0.5
        assert roc(scores).eer() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "genuine, impostor, eer",
    [
        ([0.5, 0.75], [0.0, 0.25], 0.0),
        ([0.0, 0.25], [0.5, 0.75], 1.0),
        ([0.5], [0.5], 0.5),  # half of the ties accepted
        ([0.5], [0.5 + 8e-7], 0.5),  # rounding does not break a tie
        ([0.5], [0.5 - 8e-7], 0.5),
        ([0.5], [0.5 + 4e-6], 1.0),
        ([0.5], [0.5 - 4e-6], 0.0),
        ([0.25, 0.75], [0.0, 0.5], 0.5),  # level stretch: FAR 0 .. 0.5 at FRR 0.5
        ([0.25, 0.5, 0.75], [0.0, 0.5], 0.4),  # (0, 2/3) to (1/2, 1/3): 4/5 of the way
        ([0.125, 0.25, 0.375, 0.5], [0.1875, 0.0], 0.25),  # FRR 1/4 at both ends of the level stretch of FAR 0 .. 1/2
        ([0.25, 0.375], [0.5, 0.0], 0.5),  # FAR 1/2 on the upright stretch of FRR 1 .. 0
    ],
)
def test_the_eer_counted_by_hand(genuine, impostor, eer):
    matrix = torch.tensor([[score] for score in genuine + impostor]).repeat(10, 1)
    curve = roc(scores_of(matrix, ([0] * len(genuine) + [-1] * len(impostor)) * 10))
    assert curve.eer() == pytest.approx(eer)


@pytest.mark.parametrize("rounding", [0.0, 8e-7, -8e-7, TIE, -TIE])
def test_impostors_tied_with_all_genuine_pairs_allow_no_true_accept_at_a_low_far(rounding):
    scores = scores_of([[0.5, 0.5 + rounding]] * 1000, [0] * 1000)
    curve = roc(scores)
    assert curve.far.tolist() == [1.0] and curve.far_above.tolist() == [0.0] and curve.at_far(0.01) == (0.0, math.inf)
    found = all_figures(scores)
    assert found.figures["TAR@FAR=0.01"]["value"] == 0 and "TAR@FAR=0.01" not in found.thresholds  # none to report


def test_genuine_scores_within_rounding_share_the_lowest_of_them_as_threshold():
    matrix = torch.tensor([[0.5], [0.5 + 5e-7], [0.5 + 9e-7], [0.5 + 4e-6], [0.25]])
    curve = roc(scores_of(matrix, [0] * 5))
    assert curve.thresholds.tolist() == [matrix[3].item(), 0.5, 0.25] and curve.genuine_pairs == 5
    assert curve.tar.tolist() == pytest.approx([0.2, 0.8, 1.0])


@pytest.mark.parametrize(
    "queries, persons, far, enough",
    [
        (40, 26, 0.01, True),  # 1000 impostor pairs: 10 false accepts
        (37, 28, 0.01, False),  # 999
        (40, 26, 0.001, False),
        (100, 101, 0.001, True),
    ],
)
def test_a_far_with_fewer_than_ten_false_accepts_to_expect_has_no_tar(queries, persons, far, enough):
    curve = roc(random_scores(queries, persons, 0, absent=False))
    assert (curve.at_far(far) is not None) == enough


@pytest.mark.parametrize("queries, persons, enough", [(10, 2, True), (9, 30, False), (9, 2, False), (10, 1, False)])
def test_an_eer_needs_ten_genuine_and_ten_impostor_pairs(queries, persons, enough):
    assert (roc(random_scores(queries, persons, 0, absent=False)).eer() is not None) == enough


def test_without_an_enrolled_query_there_are_impostor_pairs_only():
    curve = roc(scores_of(random_scores(50, 30, 0).matrix, [-1] * 50))
    assert (curve.genuine_pairs, curve.impostor_pairs) == (0, 1500)
    assert len(curve.thresholds) == len(curve.far) == len(curve.tar) == 0 and int(curve.genuine_bins.sum()) == 0
    assert curve.at_far(0.1) is None and curve.eer() is None


def test_the_histograms_count_every_pair_between_its_edges():
    random = torch.Generator().manual_seed(0)
    matrix = 0.5 * torch.randn(80, 7, generator=random)  # some outside of -1..1: counted in the first and last bin
    matrix[:8, 0] = -torch.inf
    scores = scores_of(matrix, torch.arange(80) % 8 - 1)
    curve = roc(scores)
    assert curve.edges.shape == (101,) and (curve.edges[0], curve.edges[-1]) == (-1, 1)
    for bins, pairs in zip((curve.genuine_bins, curve.impostor_bins), split_pairs(scores), strict=True):
        assert bins.dtype == torch.int64 and int(bins.sum()) == len(pairs)
        assert bins.tolist() == np.histogram(pairs.clip(-1, 1), 100, (-1, 1))[0].tolist()


def test_a_bin_of_more_pairs_than_float32_can_count_is_counted_exactly():
    curve = roc(scores_of(torch.zeros(1, 2**24 + 4), [0]))
    assert curve.impostor_bins[50] == 2**24 + 3 and curve.far.tolist() == [1.0]


# --- open set ---------------------------------------------------------------------------------------------------------


def loop_open_set(scores: Scores, half: set[int]) -> tuple[list, list, list]:
    """(score, right, stranger) of each enrolled query, `half` of the persons in one gallery, the rest in another."""
    found = ([], [], [])
    for line, own in zip(scores.matrix.tolist(), scores.truth.tolist(), strict=True):
        if own < 0:
            continue
        mine = [person for person in range(len(line)) if (person in half) == (own in half)]
        best = max(mine, key=lambda person: line[person])
        others = [score for person, score in enumerate(line) if person not in mine]
        for column, value in zip(found, (line[best], best == own, max(others)), strict=True):
            column.append(value)
    return found


@pytest.mark.parametrize("persons", [2, 3, 5, 6])
def test_an_open_set_splits_the_persons_in_halves_and_each_query_is_once_enrolled_and_once_a_stranger(persons):
    scores = random_scores(40, persons, seed=4, steps=10**6)
    splits = [set(half) for half in itertools.combinations(range(persons), persons // 2)]
    expected = [loop_open_set(scores, half) for half in splits]
    drawn = set()
    for seed in range(6):
        found, again = open_set(scores, seed), open_set(scores, seed)
        answers = (found.score.tolist(), found.right.tolist(), found.stranger.tolist())
        assert torch.equal(found.person, scores.truth[scores.truth >= 0]) and torch.equal(found.half, again.half)
        same = [number for number, other in enumerate(expected) if answers == other]
        assert len(same) == (2 if persons % 2 == 0 else 1)  # of an even number a half and its complement are one split
        assert set(found.person[found.half == 0].tolist()) in [splits[number] for number in same]
        drawn.add(tuple(same))
    assert (len(drawn) == 1) == (persons == 2)  # other seeds, other halves


def test_an_open_set_of_one_person_is_an_error():
    with pytest.raises(ValueError, match="at least two persons"):
        open_set(random_scores(40, 1, 0), 0)


@pytest.mark.parametrize("steps", [10, 10**5])  # many ties, and few
def test_the_threshold_is_the_lowest_that_keeps_the_promised_share_of_strangers(steps):
    for size, share in itertools.product((1, 2, 7, 100, 333), (0.0, 0.001, 0.01, 0.07, 0.29, 0.5, 0.999, 1.0)):
        random = np.random.default_rng(size)
        strangers = (random.integers(-steps, steps, size) / steps).astype(np.float32)
        threshold = threshold_for(torch.tensor(strangers), share)
        assert rate(strangers, threshold) <= share
        if share == 1:
            assert threshold == -math.inf
        else:
            assert np.float32(threshold) == threshold  # comparing float32 with it loses nothing
            assert rate(strangers, np.nextafter(np.float32(threshold), np.float32(-2))) > share + 1e-12


@pytest.mark.parametrize("persons", [1, 2, 7, 60])
def test_a_strangers_threshold_is_that_of_all_other_persons(persons):
    for share, steps in itertools.product((0.0, 0.01, 0.3, 1.0), (10, 10**5)):
        random = np.random.default_rng(persons)
        stranger = torch.tensor((random.integers(-steps, steps, 200) / steps).astype(np.float32))
        person = torch.tensor(random.integers(persons, size=200) ** 2)  # of uneven numbers, not 0, 1, 2, ...
        found = thresholds_without(stranger, person, share)
        for i in range(200):
            assert found[i].item() == threshold_for(stranger[person != person[i]], share)


def random_open_set(queries: int = 600, persons: int = 40) -> OpenSet:
    random = np.random.default_rng(1)
    person = torch.tensor(random.integers(persons, size=queries))
    return OpenSet(
        score=torch.tensor(random.integers(0, 40, queries) / 40).float(),
        right=torch.tensor(random.random(queries) < 0.7),
        stranger=torch.tensor(random.integers(-10, 30, queries) / 40).float(),
        half=person % 2,
        person=person,
    )


@pytest.mark.parametrize("fpir", [0.05, 0.1, 0.25])
def test_no_stranger_is_held_against_a_threshold_that_its_own_queries_gave(fpir):
    """Each query against the lowest threshold that keeps the FPIR among others who are not enrolled."""
    opened = random_open_set()
    found = opened.at_fpir(fpir)
    score, right, stranger, half, person = (column.numpy() for column in vars(opened).values())

    def lowest(strangers) -> float:
        return min(t for t in candidates(score, stranger) if rate(strangers, t) <= fpir)

    for i in range(0, 600, 7):
        answered = right[i] and score[i] >= lowest(stranger[half != half[i]])
        named = stranger[i] >= lowest(stranger[(half == half[i]) & (person != person[i])])
        assert (found.answered[i].item(), found.named[i].item()) == (answered, named)
    assert 0 < found.answered.float().mean() < right.mean()
    for gallery in (0, 1):
        assert rate(stranger[half != gallery], found.thresholds[gallery]) <= fpir
    assert abs(found.named.float().mean() - fpir) < 0.03


def test_an_answer_at_the_threshold_itself_counts_and_one_at_a_refused_strangers_score_does_not():
    stranger = torch.full((200,), 0.5)
    score = stranger.clone()
    score[:60] = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
    person = torch.arange(200)
    found = OpenSet(score, torch.ones(200, dtype=torch.bool), stranger, half=person % 2, person=person).at_fpir(0.1)
    assert found.answered.sum() == 60 and found.thresholds == (score[0].item(),) * 2
    assert not found.named.any()


@pytest.mark.parametrize(
    "strangers, fpir, enough", [(1000, 0.01, True), (999, 0.01, False), (100, 0.1, True), (99, 0.1, False)]
)
def test_a_fpir_with_fewer_than_ten_strangers_to_expect_has_no_dir(strangers, fpir, enough):
    column = torch.linspace(0, 1, strangers + 2000)
    half = (torch.arange(len(column)) >= strangers).long()  # the first ones are strangers to the gallery of the others
    opened = OpenSet(column, column > 0, column, half=half, person=torch.arange(len(column)))
    assert (opened.at_fpir(fpir) is not None) == enough


# --- which photos to refuse? ------------------------------------------------------------------------------------------


def test_wrong_answers_left_counted_by_hand():
    quality, wrong = torch.tensor([0.9, 0.1, 0.5, 0.3]), torch.tensor([False, True, False, True])
    left = wrong_left(quality, wrong)
    assert left.tolist() == [2, 1, 0, 0, 0] and left.dtype == torch.float64
    assert [share_left(left, share) for share in (0, 0.2, 0.25, 0.49, 0.5, 1)] == [1, 1, 0.5, 0.5, 0, 0]
    assert share_left(torch.zeros(5), 0.2) is None
    assert wrong_left(-quality, wrong).tolist() == [2, 2, 2, 1, 0]  # the worst order
    assert wrong_left(quality, torch.zeros(4, dtype=torch.bool)).tolist() == [0] * 5
    # Equal qualities: the expected number, in whatever order the queries come.
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [1, 2, 0, 3]):
        assert wrong_left(torch.ones(4), wrong[order]).tolist() == pytest.approx([2, 1.5, 1, 0.5, 0])
    three_equals, wrong = torch.tensor([0.2, 0.2, 0.2, 0.7]), torch.tensor([True, False, False, True])
    assert wrong_left(three_equals, wrong).tolist() == pytest.approx([2, 5 / 3, 4 / 3, 1, 0])


def test_wrong_answers_left_are_the_mean_over_all_orders_of_equal_qualities():
    generator = torch.Generator().manual_seed(0)
    quality = torch.randint(3, (7,), generator=generator).float()
    wrong = torch.rand(7, generator=generator) < 0.5
    counts = []
    for noise in torch.rand(4000, 7, generator=generator):
        order = (quality + 0.5 * noise).argsort()
        counts.append([int(wrong.sum() - wrong[order[:n]].sum()) for n in range(8)])
    mean = torch.tensor(counts, dtype=torch.double).mean(0)
    torch.testing.assert_close(wrong_left(quality, wrong), mean, rtol=0, atol=0.05)


# --- all of them ------------------------------------------------------------------------------------------------------


def all_figures(scores: Scores, persons: Tensor | None = None, seed: int = 7) -> Measured:
    """measure() with the scores' own open set; each query is of a person of its own unless `persons` says otherwise."""
    count = len(scores.truth)
    precision = torch.linspace(0, 1, count, dtype=torch.double)  # any: it is passed through
    persons = torch.arange(count) if persons is None else persons
    return measure(scores, precision=precision, persons=persons, opened=open_rates(scores, seed), seed=seed)


def big_case(queries: int = 1200, shift: float = 0.35) -> tuple[Scores, Tensor]:
    """Scores against 60 persons, enough for every figure but those of the lowest rates; and the queries' persons. One
    query in five is of one of 30 persons who are not enrolled."""
    random = np.random.default_rng(0)
    truth = random.integers(60, size=queries)
    matrix = 0.2 * random.normal(size=(queries, 60))
    matrix[np.arange(queries), truth] += shift + 0.2 * random.normal(size=60)[truth]  # some persons are harder
    stranger = np.arange(queries) % 5 == 4
    matrix[stranger] = 0.2 * random.normal(size=(stranger.sum(), 60))
    persons = np.where(stranger, 1000 + np.arange(queries) % 30, truth)
    return scores_of(matrix.clip(-1, 1), np.where(stranger, -1, truth)), torch.tensor(persons)


def test_measure_reports_each_figure_as_the_functions_give_it():
    scores, persons = big_case()
    found = all_figures(scores, persons)
    ranked, curve, opened = ranking(scores), roc(scores), open_set(scores, 7).at_fpir(0.1)
    expected = {f"rank-{k}": float(np.mean(ranked.rank.numpy() <= k)) for k in (1, 5, 10)}
    expected |= {"mAP": 0.5, "macro F1": macro_f1(ranked.predicted, scores.truth), "EER": curve.eer()}
    expected |= {f"TAR@FAR={far}": curve.at_far(far)[0] for far in (0.01, 0.001)}
    expected |= {"TAR@FAR=0.0001": None, "DIR@FPIR=0.01": None, "FPIR of 0.01": None}  # too few pairs and strangers
    expected |= {"DIR@FPIR=0.1": opened.answered.double().mean().item()}
    expected |= {"FPIR of 0.1": opened.named.double().mean().item()}
    assert tuple(found.figures) == FIGURES and set(FIGURES) == expected.keys()
    assert {name: figure["value"] for name, figure in found.figures.items()} == pytest.approx(expected, abs=1e-12)
    thresholds = {f"TAR@FAR={far}": curve.at_far(far)[1] for far in (0.01, 0.001)}
    assert found.thresholds == thresholds | {"DIR@FPIR=0.1": max(opened.thresholds)}
    assert 0.2 < expected["rank-1"] < expected["rank-5"] < expected["rank-10"] < 1  # the case decides something
    assert 0 < expected["DIR@FPIR=0.1"] < 1 and 0 < expected["TAR@FAR=0.001"] < expected["TAR@FAR=0.01"] < 1
    torch.testing.assert_close(found.cmc, cmc(ranked.rank, 20))
    assert torch.equal(found.roc.far, curve.far) and torch.equal(found.roc.tar, curve.tar)


def test_a_figure_is_the_mean_of_its_values_and_lies_in_their_interval():
    scores, persons = big_case()
    found = all_figures(scores, persons)
    without_values = {"macro F1", "EER", "TAR@FAR=0.0001", "DIR@FPIR=0.01", "FPIR of 0.01"}
    assert set(found.values) == set(FIGURES) - without_values
    for name, values in found.values.items():
        figure, counts_all = found.figures[name], name in ("rank-1", "rank-5", "rank-10", "mAP")
        assert values.shape == (1200,) and values.dtype == torch.float64
        # A query of a person who is not enrolled is a failure to identify; it takes no part in TAR and DIR.
        assert torch.equal(values.isnan(), (scores.truth < 0) & (not counts_all))
        assert not name.startswith("rank") or (values[scores.truth < 0] == 0).all()
        assert figure["value"] == pytest.approx(np.nanmean(values.numpy()), abs=1e-12)
        low, high = rate_interval(values[:, None], persons, 7)[:, 0].tolist()
        assert (figure["low"], figure["high"]) == (pytest.approx(low), pytest.approx(high))
        assert low <= figure["value"] <= high and low < high
    for name in without_values:
        assert found.figures[name]["low"] is None and found.figures[name]["high"] is None


def test_with_three_times_the_queries_the_figures_of_the_lowest_rates_are_reported_too():
    found = all_figures(*big_case(3600))
    low, high = (found.figures[f"DIR@FPIR={fpir}"]["value"] for fpir in (0.01, 0.1))
    assert 0 < low < high < 1
    assert found.thresholds["DIR@FPIR=0.01"] > found.thresholds["DIR@FPIR=0.1"]
    assert found.figures["TAR@FAR=0.0001"]["value"] is not None


def test_a_person_who_is_not_enrolled_is_found_at_no_rank_however_small_the_gallery():
    for persons in (2, 4, 9):
        found = all_figures(scores_of(random_scores(20, persons, 0).matrix, [-1] * 20))
        assert [found.figures[f"rank-{k}"]["value"] for k in (1, 5, 10)] == [0.0] * 3
        assert found.cmc.tolist() == [0.0] * persons
        assert found.figures["macro F1"]["value"] == 0 and found.figures["EER"]["value"] is None
        assert found.figures["DIR@FPIR=0.1"]["value"] is None and not found.thresholds


def test_figures_that_too_few_samples_forbid_are_none():
    found = all_figures(scores_of([[0.5, 0.25], [0.25, 0.5], [0.5, 0.25]], [0, 1, 1]), torch.tensor([0, 1, 1]))
    values = {name: figure["value"] for name, figure in found.figures.items()}
    assert [values[name] for name in FIGURES[:5]] == pytest.approx([2 / 3, 1, 1, 1 / 2, 2 / 3])
    assert all(values[name] is None for name in FIGURES[5:]) and found.thresholds == {}
    assert all(figure["low"] is figure["high"] is None for figure in found.figures.values())
    assert found.cmc.tolist() == pytest.approx([2 / 3, 1])


def test_a_gallery_of_one_person_has_ranks_and_no_open_set():
    found = all_figures(scores_of(torch.rand(40, 1), [0, 0, 0, 0, -1] * 8))
    assert found.figures["rank-1"]["value"] == 0.8 and found.cmc.tolist() == [0.8]
    assert found.figures["rank-1"]["low"] < 0.8 < found.figures["rank-1"]["high"]
    assert found.figures["DIR@FPIR=0.1"]["value"] is None and found.roc.impostor_pairs == 8


def test_four_persons_are_the_fewest_for_an_open_set():
    """Two in each half: one to be refused, and another to set the threshold."""
    four, two = torch.arange(200) % 4, torch.arange(200) % 2
    found = all_figures(scores_of((torch.eye(4) / 2 + 0.25).repeat(50, 1), four), four)
    assert found.figures["DIR@FPIR=0.1"]["value"] == 1.0 and found.figures["FPIR of 0.1"]["value"] == 0.0
    assert 0.25 < found.thresholds["DIR@FPIR=0.1"] < 0.250001
    found = all_figures(scores_of((torch.eye(2) / 2 + 0.25).repeat(100, 1), two), two)
    assert found.figures["DIR@FPIR=0.1"]["value"] is None


def test_the_queries_of_a_kind_meet_the_threshold_of_all_queries():
    scores, persons = big_case()
    whole, opened, rows = all_figures(scores, persons), open_rates(scores, 7), torch.arange(0, 1200, 5)
    part = measure(
        scores.subset(rows),
        precision=torch.zeros(240, dtype=torch.double),
        persons=persons[rows],
        opened=opened.subset(rows),
        seed=7,
    )
    for name in ("DIR@FPIR=0.1", "FPIR of 0.1"):
        torch.testing.assert_close(part.values[name], whole.values[name][rows], rtol=0, atol=0, equal_nan=True)
    assert part.thresholds["DIR@FPIR=0.1"] == whole.thresholds["DIR@FPIR=0.1"]


# --- comparison -------------------------------------------------------------------------------------------------------


def test_a_comparison_is_after_minus_before_with_the_interval_of_the_paired_difference():
    scores, persons = big_case()
    before = all_figures(scores, persons)
    noise = 0.02 * torch.randn(1200, 60, generator=torch.Generator().manual_seed(0))
    after = all_figures(Scores(scores.matrix + noise, scores.truth), persons)
    found, back, nothing = (compare(*pair, persons, 3) for pair in ((before, after), (after, before), (after, after)))
    for name in before.values:
        difference = after.values[name] - before.values[name]
        assert found[name]["value"] == pytest.approx(after.figures[name]["value"] - before.figures[name]["value"])
        low, high = difference_interval(difference[:, None], persons, 3)[:, 0].tolist()
        assert (found[name]["low"], found[name]["high"]) == (pytest.approx(low), pytest.approx(high))
        assert low <= found[name]["value"] <= high
        assert nothing[name] == {"value": 0.0, "low": 0.0, "high": 0.0}
    widths = [figure["high"] - figure["low"] for figure in (found["rank-1"], before.figures["rank-1"])]
    assert 0 < widths[0] < 0.6 * widths[1]  # the same queries are hard for both
    assert back["rank-1"]["value"] == -found["rank-1"]["value"]
    assert back["rank-1"]["low"] == pytest.approx(-found["rank-1"]["high"])


@pytest.mark.parametrize("persons, low", [(12, 1.0), (9, None)])
def test_a_difference_of_1_at_every_person_gets_no_binomial_bound_and_few_persons_no_interval(persons, low):
    truth = torch.arange(persons)
    wrong, right = (
        all_figures(scores_of(matrix, truth)) for matrix in (torch.eye(persons).roll(1, 1), torch.eye(persons))
    )
    assert compare(wrong, right, truth, 0)["rank-1"] == {"value": 1.0, "low": low, "high": low}
    own = right.figures["rank-1"]  # the figure itself is a share: 12 right answers do not prove that all are
    assert (own["value"], own["high"]) == (1.0, low) and (low is None or 0.7 < own["low"] < 0.9)


def test_a_comparison_takes_the_figures_that_both_have():
    scores, persons = big_case()
    before, after = all_figures(scores, persons), all_figures(scores, persons)
    del before.values["TAR@FAR=0.001"], after.values["mAP"]
    assert set(compare(before, after, persons, 0)) == set(before.values) - {"mAP"}


@pytest.mark.parametrize("before, after, persons", [(12, 11, 12), (11, 12, 12), (12, 12, 11), (11, 11, 12)])
def test_other_numbers_of_queries_cannot_be_compared(before, after, persons):
    one, other = (all_figures(scores_of(torch.eye(12)[:count], range(count))) for count in (before, after))
    with pytest.raises(ValueError, match=f"the same queries: {before} before, {after} after, {persons} persons"):
        compare(one, other, torch.arange(persons), 0)


# --- chance -----------------------------------------------------------------------------------------------------------
