"""Intervals: ends at the edge, order, and how often they hold the true rate of simulated queries."""

import numpy as np
import pytest
import torch
from scipy.stats import beta
from torch import Tensor

import intervals
from intervals import difference_interval, rate_ends, rate_interval


def clustered(queries: int, persons: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Values in 0..1 with NaN among them, and persons of arbitrary numbers, in no order."""
    random = np.random.default_rng(seed)
    person = random.permutation(np.concatenate([np.arange(persons), random.integers(persons, size=queries - persons)]))
    values = random.random((queries, columns)) * (0.3 + 0.7 * random.random(persons)[person, None])
    values[random.random(values.shape) < 0.15] = np.nan
    return torch.tensor(values), torch.tensor(person * 7 - 1)


def sizes_like_lfw(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Numbers of queries: 1 for two persons in five, 30 at most, 4.3 on average."""
    sizes = np.arange(1, 31)
    return random.choice(sizes, shape, p=sizes**-1.5 / (sizes**-1.5).sum()).astype(float)


# --- rates ------------------------------------------------------------------------------------------------------------


def test_all_right_and_all_but_one_right_have_nearly_the_same_interval():
    """20 persons with 85 queries."""
    person = torch.arange(85) % 20
    values = torch.ones(85, 4, dtype=torch.double)
    values[0, 1], values[:, 2], values[:, 3] = 0, 0, 0
    values[0, 3] = 1
    low, high = rate_interval(values, person, 0).tolist()
    assert high[0] == 1 and 0.99 < high[1] < 1 and low[2] == 0 and 0 < low[3] < 0.01
    assert 0.83 < low[1] < low[0] < 0.92  # 20 persons are no proof of more
    assert 0.08 < high[2] < high[3] < 0.17


def test_one_more_right_answer_never_lowers_an_end():
    random = np.random.default_rng(0)
    for persons in (10, 20, 60):
        for correlated in (False, True):
            sizes = sizes_like_lfw(random, persons)
            owner = np.repeat(np.arange(persons), sizes.astype(int))
            order = owner.argsort(kind="stable") if correlated else random.permutation(len(owner))
            right = np.zeros((persons, len(owner) + 1))  # column k: the first k answers of the order are right
            for count, query in enumerate(order):
                right[:, count + 1] = right[:, count]
                right[owner[query], count + 1] += 1
            ends = rate_ends(right, np.repeat(sizes[:, None], right.shape[1], 1), 1)
            assert (np.diff(ends) >= -1e-12).all()
            assert ends[0, 0] == 0 and ends[1, -1] == 1 and (ends[1] - ends[0] > 0).all()
            value = right.sum(0) / sizes.sum()
            assert (ends[0] <= value).all() and (value <= ends[1]).all()


@pytest.mark.parametrize("count, right", [(10, 10), (20, 13), (40, 0)])
def test_of_persons_with_one_query_each_the_interval_is_that_of_the_neutral_beta_prior(monkeypatch, count, right):
    monkeypatch.setattr(intervals, "REPLICATES", 200_000)
    values = (torch.arange(count) < right).double()[:, None]
    low, high = rate_interval(values, torch.arange(count), 0)[:, 0].tolist()
    tail = {10: 0.0118, 20: 0.0182, 40: 0.0215}[count]  # of the normal distribution beyond t(9), t(19) and t(39)
    posterior = beta(right + 1 / 3, count - right + 1 / 3)
    assert low == pytest.approx(posterior.ppf(tail) if right else 0, abs=0.005)
    assert high == pytest.approx(posterior.ppf(1 - tail) if right < count else 1, abs=0.005)


def test_persons_who_agree_on_a_share_that_is_neither_0_nor_1_have_an_interval_too():
    low, high = rate_interval(torch.full((40, 1), 0.5), torch.arange(20).repeat(2), 0)[:, 0].tolist()
    assert 0.4 < low < 0.5 < high < 0.6


def test_the_interval_does_not_depend_on_the_size_of_a_block_nor_on_other_columns(monkeypatch):
    values, person = clustered(60, 12, 3, seed=2)
    alone = rate_interval(values[:, :1], person, 4)
    together = rate_interval(values, person, 4)
    np.testing.assert_allclose(alone[:, 0], together[:, 0], rtol=0, atol=1e-12)
    monkeypatch.setattr(intervals, "BLOCK_WEIGHTS", 24 * 100)  # other draws, as good
    np.testing.assert_allclose(rate_interval(values, person, 4), together, rtol=0, atol=0.02)


@pytest.mark.parametrize("correlation", [0, 0.2, 0.5, 0.9])
def test_the_interval_holds_the_true_rate_95_times_in_100(correlation):
    """The table of RESULTS.md (`pytest -s` prints its rows): persons with numbers of queries as in LFW, whose answers
    are right with a rate of their own, drawn from a beta distribution of this correlation."""
    random, simulations, row = np.random.default_rng(0), 2000, []
    for persons in (20, 100, 250):
        for rate in (0.5, 0.9, 0.99):
            sizes = sizes_like_lfw(random, persons, simulations)
            spread = (1 - correlation) / max(correlation, 1e-6)
            own = random.beta(rate * spread, (1 - rate) * spread, sizes.shape)
            low, high = rate_ends(random.binomial(sizes.astype(int), own).astype(float), sizes, 0)
            row.append(100 * ((low <= rate) & (rate <= high)).mean())
    print(f"\n| {correlation} | " + " | ".join(f"{covered:.1f}" for covered in row) + " |")
    if correlation < 0.9:
        # Too wide at 0.5 for 20 persons whose answers are independent: so few cannot show that they are.
        assert min(row) >= 93 and max(row[1:]) <= 98 and row[0] <= 99.5
    else:
        assert min(row) >= 91 and max(row) <= 98.5


# --- differences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 50, 2**24])
def test_the_interval_of_a_difference_equals_a_loop_over_the_persons_drawn(monkeypatch, block):
    monkeypatch.setattr(intervals, "BLOCK_WEIGHTS", block)
    monkeypatch.setattr(intervals, "REPLICATES", 101)
    values, person = clustered(60, 12, 3, seed=2)
    drawn = torch.randint(12, (101, 12), generator=torch.Generator().manual_seed(2)).tolist()
    names = sorted(set(person.tolist()))
    means = []
    for replicate in drawn:
        rows = [row for number in replicate for row in values[person == names[number]].tolist()]
        means.append([np.mean([v for v in column if v == v]) for column in zip(*rows, strict=True)])
    expected = np.quantile(np.array(means), [0.025, 0.975], axis=0)
    found = difference_interval(values, person, 2)
    assert found.dtype == torch.float64 and found.shape == (2, 3)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


def test_a_difference_that_is_the_same_for_all_persons_is_exact():
    assert difference_interval(torch.full((40, 1), 0.5), torch.arange(20).repeat(2), 0).tolist() == [[0.5], [0.5]]


# --- both -------------------------------------------------------------------------------------------------------------

both_methods = pytest.mark.parametrize("interval", [rate_interval, difference_interval])


@both_methods
def test_a_column_in_which_fewer_than_ten_persons_have_a_value_has_no_interval(interval):
    values = (torch.arange(33).reshape(11, 3) % 5 < 2).double()
    values[:1, 1], values[:2, 2] = torch.nan, torch.nan  # 11, 10 and 9 persons
    found = interval(values, torch.arange(11), 0)
    assert not found[:, :2].isnan().any() and found[:, 2].isnan().all()
    assert interval(torch.ones(45, 2), torch.arange(9).repeat(5), 0).isnan().all()


@both_methods
def test_queries_are_not_persons(interval):
    """Intervals by query are too narrow where the queries of a person are alike."""
    random = np.random.default_rng(0)
    person = np.repeat(np.arange(60), random.integers(1, 8, 60))
    own = random.beta(1.5, 1.0, (60, 400))  # a person's own rate of success; mean 0.6
    values = torch.tensor(random.random((len(person), 400)) < own[person]).double()
    covered = []
    for drawn in (torch.tensor(person), torch.arange(len(person))):
        low, high = interval(values, drawn, 0)
        covered.append(((low <= 0.6) & (high >= 0.6)).double().mean().item())
    assert 0.9 <= covered[0] <= 0.985 and covered[1] < covered[0] - 0.05
