"""95 % intervals of the figures that are means over queries. A person's photos succeed or fail together, so persons are
drawn, with all their queries, and not queries."""

import numpy as np
import torch
from scipy.special import ndtr, stdtrit
from torch import Tensor

MIN_PERSONS = 10  # to draw an interval from
REPLICATES = 2000  # draws of the persons
BLOCK_WEIGHTS = 2**24  # of persons in the draws, held at a time: 128 MiB of float64
PRIOR = 1 / 3  # weight of each of the two imagined persons: nearly neutral at all rates, Kerman 2011


def rate_interval(values: Tensor, persons: Tensor, seed: int) -> Tensor:
    """(2, M) float64: 95 % intervals of the column means of `values` (Q, M), shares in 0..1, by persons (Q,).

    NaN in `values`: the query does not count in that column. NaN as interval: fewer than MIN_PERSONS persons have a
    value. The method: `rate_ends`.
    """
    sums, sizes = _per_person(values, persons)
    return torch.from_numpy(rate_ends(sums.numpy(), sizes.numpy(), seed))


def rate_ends(sums: np.ndarray, sizes: np.ndarray, seed: int) -> np.ndarray:
    """(2, M) float64: `rate_interval` of M shares from the sum of each person's values and how many there are, (N, M).

    Quantiles of the Bayesian bootstrap (Rubin 1981): mean values under random weights of the persons, each from the
    exponential distribution. Two persons are imagined beside those seen, one always right and one always wrong, with
    weights from the gamma distribution of shape PRIOR. So the interval has a width where all persons agree, and where
    each person has one query it is that of the neutral beta prior (Kerman 2011, doi:10.1214/11-EJS648). They have as
    many queries as the person behind an average query. An end at the mean itself is kept at 0 and 1, as in Brown, Cai
    & DasGupta 2001. For few persons the quantiles lie further out, by Student's t (Hesterberg 2015).

    Monotone: no draw depends on the values, and a value that rises lowers no weighted mean.
    """
    count, columns = sizes.shape
    random = np.random.default_rng(seed)
    totals, valued = np.maximum(sizes.sum(0), 1), (sizes > 0).sum(0)
    imagined = np.square(sizes).sum(0) / totals
    means = np.empty((REPLICATES, columns))
    rows = max(1, BLOCK_WEIGHTS // count)
    for start in range(0, REPLICATES, rows):
        block = means[start : start + rows]
        weights = random.exponential(size=(len(block), count))
        right, wrong = random.gamma(PRIOR, size=(2, len(block), 1)) * imagined
        of_all = weights @ sizes + right + wrong
        np.divide(weights @ sums + right, of_all, out=block, where=of_all > 0)
    tail = ndtr(stdtrit(np.maximum(valued, 2) - 1, 0.025))  # of the normal distribution, beyond Student's 2.5 %
    value, ends = sums.sum(0) / totals, np.full((2, columns), np.nan)
    for column in np.flatnonzero(valued >= MIN_PERSONS):
        low, high = np.quantile(means[:, column], [tail[column], 1 - tail[column]])
        ends[:, column] = min(low, value[column]), max(high, value[column])
    return ends


def difference_interval(differences: Tensor, persons: Tensor, seed: int) -> Tensor:
    """(2, M) float64: 95 % intervals of the column means of `differences` (Q, M), by persons (Q,).

    Percentiles of the bootstrap. For two checkpoints on the same queries, row by row: a paired comparison. NaN: see
    `rate_interval`.
    """
    sums, sizes = _per_person(differences, persons)
    count = len(sums)
    generator = torch.Generator().manual_seed(seed)
    means = []
    rows = max(1, BLOCK_WEIGHTS // count)
    for start in range(0, REPLICATES, rows):
        drawn = torch.randint(count, (min(rows, REPLICATES - start), count), generator=generator)
        weights = torch.zeros(drawn.shape, dtype=torch.double).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
        means.append((weights @ sums) / (weights @ sizes))
    interval = torch.cat(means).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.double), dim=0)
    return torch.where((sizes > 0).sum(0) >= MIN_PERSONS, interval, torch.nan)


def _per_person(values: Tensor, persons: Tensor) -> tuple[Tensor, Tensor]:
    """(N, M) float64: the sum of each person's values in each column, and how many there are, NaN left out."""
    _, index = persons.unique(return_inverse=True)
    sums = torch.zeros(int(index.max()) + 1, values.shape[1], dtype=torch.double)
    sizes = torch.zeros_like(sums).index_add_(0, index, (~values.isnan()).double())
    return sums.index_add_(0, index, values.double().nan_to_num()), sizes
