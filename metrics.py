"""Figures of a retrieval: rank-k, CMC, mAP, macro F1, ROC, EER, open set, discard. Tensors only.

All but mAP are functions of `scores.Scores`: (Q, P) scores of Q queries against P persons, and truth (Q,), each query's
person, -1 if not enrolled. Scores within TIE of each other are equal.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from intervals import difference_interval, rate_interval
from scores import TIE, Scores, photo_cosines

MIN_ERRORS = 10  # false accepts that a rate must let one expect, or it is not reported: fewer are chance
BINS = 100  # of the score histograms, over -1..1
CMC_RANKS = 20  # shown of a CMC

RANKS = (1, 5, 10)
FARS = (1e-2, 1e-3, 1e-4)
FPIRS = (1e-2, 1e-1)
FIGURES = (
    *(f"rank-{k}" for k in RANKS),
    *("mAP", "macro F1", "EER"),
    *(f"TAR@FAR={far:g}" for far in FARS),
    *(name for fpir in FPIRS for name in (f"DIR@FPIR={fpir:g}", f"FPIR of {fpir:g}")),
)


# --- closed set: which person is it? ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranking:
    """The answer to each query; all (Q,).

    predicted: int64, person of the highest score; score: float32, that cosine. rank: int64 from 1, place of the right
    person, P + 1 if it is not enrolled. genuine: score of the right person, NaN if not enrolled. rival: highest score
    of another person, -inf if there is no other.
    """

    predicted: Tensor
    score: Tensor
    rank: Tensor
    genuine: Tensor
    rival: Tensor


def ranking(scores: Scores) -> Ranking:
    """Each query's answer and the rank of its person. Of tied persons the lower label goes first, right or wrong."""
    matrix, truth, enrolled = scores.matrix, scores.truth, scores.enrolled
    persons = matrix.shape[1]
    column = truth.clamp(min=0)[:, None]
    # Equal rows differ by rounding, with their place in the product: argmax() of the scores would pick by chance.
    tied = matrix >= matrix.amax(1, keepdim=True) - TIE
    predicted = tied.to(torch.uint8).argmax(1)  # argmax() gives the first of equals
    genuine = matrix.gather(1, column)
    above = (matrix > genuine + TIE).sum(1)
    level = ((matrix - genuine).abs() <= TIE) & (torch.arange(persons) < column)
    rank = 1 + above + level.sum(1)
    # TIE chains: a lower label may be level with the right person and not with the highest score.
    rank = torch.where(predicted == truth, 1, rank.clamp(min=2))
    others = torch.where(enrolled[:, None], matrix.scatter(1, column, -torch.inf), matrix)
    return Ranking(
        predicted=predicted,
        score=matrix.gather(1, predicted[:, None])[:, 0],
        rank=torch.where(enrolled, rank, persons + 1),
        genuine=torch.where(enrolled, genuine[:, 0], torch.nan),
        rival=others.amax(1),
    )


def cmc(rank: Tensor, ranks: int) -> Tensor:
    """(ranks,): share of the queries whose person is among the first 1, 2, ... (cumulative match characteristic)."""
    counts = torch.bincount(rank.clamp(max=ranks + 1), minlength=ranks + 2)[1 : ranks + 1]
    return counts.cumsum(0).double() / len(rank)


def average_precision(queries: Tensor, truth: Tensor, sources: Tensor, gallery: Tensor, labels: Tensor) -> Tensor:
    """(Q,) float64: each query's average precision over the gallery's photos; those of its person are relevant.

    Mean over relevant photos of (relevant among the first r) / r, r the photo's place; 0 if no photo is relevant.
    The mean over queries is the mAP. It ranks photos, so it does not depend on the template. A query's source is left
    out. Cosines within TIE of the next in line are equal and keep the gallery's order. Shapes: see scores.py.
    """
    found = []
    for block, cosines in photo_cosines(queries, sources, gallery, held=8):
        relevant = (labels == truth[block][:, None]) & (cosines > -torch.inf)
        falling, order = cosines.sort(dim=1, descending=True)
        group = torch.zeros_like(order)
        group[:, 1:] = (falling[:, :-1] > falling[:, 1:] + TIE).cumsum(1)
        of_row = torch.empty_like(order).scatter_(1, order, group)  # in the gallery's order again
        hits = relevant.gather(1, of_row.argsort(dim=1, stable=True))
        precision = hits.cumsum(1).double() / torch.arange(1, len(gallery) + 1)
        found.append((precision * hits).sum(1) / hits.sum(1).clamp(min=1))
    return torch.cat(found)


def macro_f1(predicted: Tensor, truth: Tensor) -> float:
    """Mean F1 over all persons that occur as truth or as an answer.

    A person who is only ever a wrong answer has F1 0. All queries of persons who are not enrolled (truth -1) count as
    one more person, which has F1 0.
    """
    from sklearn.metrics import f1_score  # here: training does not load scikit-learn

    return float(f1_score(truth.numpy(), predicted.numpy(), average="macro", zero_division=0))


# --- verification: is it the same person? -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Roc:
    """Rates of accepting a pair at score >= threshold, at every threshold where the true accept rate changes: the
    genuine scores.

    thresholds: (T,) falling; far, tar: (T,) float64 rising, shares of impostor and of genuine pairs accepted. Genuine
    scores within TIE above a threshold share it, and an impostor within TIE below reaches it: rounding decides nothing.
    far_above: (T,), share of the impostors above by more than TIE, accepted however ties are broken.
    genuine_pairs, impostor_pairs: how many there are. edges (BINS + 1,), genuine_bins, impostor_bins (BINS,): counts.
    """

    thresholds: Tensor
    far: Tensor
    far_above: Tensor
    tar: Tensor
    genuine_pairs: int
    impostor_pairs: int
    edges: Tensor
    genuine_bins: Tensor
    impostor_bins: Tensor

    def at_far(self, far: float) -> tuple[float, float] | None:
        """(TAR, threshold) with the lowest threshold that keeps the false accept rate at `far` or below.

        TAR is 0, at an infinite threshold, where no such threshold accepts a genuine pair. None if there are too few
        impostor pairs to expect MIN_ERRORS false accepts, or no genuine pair.
        """
        if not self.genuine_pairs or self.impostor_pairs * far < MIN_ERRORS:
            return None
        within = int((self.far <= far).sum())
        return (self.tar[within - 1].item(), self.thresholds[within - 1].item()) if within else (0.0, torch.inf)

    def eer(self) -> float | None:
        """Equal error rate: false accept rate where it equals the false reject rate, on the curve of all thresholds.

        The curve is a staircase; at tied scores a slope, as half of the ties may be accepted. So an embedder to which
        all faces are equal has 0.5. None if there are fewer than MIN_ERRORS genuine or impostor pairs.
        """
        if min(self.genuine_pairs, self.impostor_pairs) < MIN_ERRORS:
            return None
        i = int((self.far + self.tar >= 1).int().argmax())  # first step past the crossing; the last has TAR 1
        tar_before = self.tar[i - 1].item() if i else 0.0
        before, after = self.far_above[i].item() + tar_before - 1, (self.far[i] + self.tar[i]).item() - 1
        if before >= 0:  # crossed on the level stretch before this step
            return 1 - tar_before
        along = -before / (after - before)
        return self.far_above[i].item() + along * (self.far[i] - self.far_above[i]).item()


def roc(scores: Scores) -> Roc:
    """Exact over all pairs of a query and a person. The curve rises at genuine scores only, so it is known from how
    many impostors reach each of them."""
    rows = scores.enrolled.nonzero()[:, 0]
    own = scores.truth[rows]
    genuine = scores.matrix[rows, own]
    is_impostor = torch.ones_like(scores.matrix, dtype=torch.bool)
    is_impostor[rows, own] = False
    impostor = scores.matrix[is_impostor]
    rising, edges = _spaced(genuine), (2 * torch.arange(BINS + 1) - BINS) / BINS  # linspace() misses 0 by rounding
    accepted = len(genuine) - torch.searchsorted(genuine.sort().values, rising)
    pairs, far = max(len(genuine), 1), max(len(impostor), 1)
    return Roc(
        thresholds=rising.flip(0),
        far=_reaching(impostor, rising - TIE, or_equal=True).double() / far,
        far_above=_reaching(impostor, rising + TIE, or_equal=False).double() / far,
        tar=accepted.flip(0).double() / pairs,
        genuine_pairs=len(genuine),
        impostor_pairs=len(impostor),
        edges=edges,
        genuine_bins=_bins(genuine, edges),
        impostor_bins=_bins(impostor, edges),
    )


def _spaced(scores: Tensor) -> Tensor:
    """Rising scores, each more than TIE above the one before; the others are left out in favour of one just below."""
    kept, last = [], -math.inf
    for score in scores.unique().tolist():
        if score > last + TIE or not kept:
            kept.append(score)
            last = score
    return torch.tensor(kept)


def _reaching(scores: Tensor, rising: Tensor, or_equal: bool) -> Tensor:
    """(T,) int64: how many scores are above each threshold of `rising` (T,), or equal to it; the highest one first."""
    passed = torch.searchsorted(rising, scores, right=or_equal, out_int32=True)  # thresholds that each score passes
    return torch.bincount(passed, minlength=len(rising) + 1)[1:].flip(0).cumsum(0)


def _bins(scores: Tensor, edges: Tensor) -> Tensor:
    """(BINS,) int64. Not histc(): it counts in float32, which ends at 2**24."""
    place = torch.bucketize(scores, edges[1:-1], right=True, out_int32=True)
    return torch.bincount(place, minlength=BINS)


# --- open set: is it an enrolled person at all? -----------------------------------------------------------------------


@dataclass(frozen=True)
class OpenSetPoint:
    """answered, named: (Q,) bool. answered: the query is named correctly where its person is enrolled; named: it is
    given a name where its person is not. thresholds: of both galleries."""

    answered: Tensor
    named: Tensor
    thresholds: tuple[float, float]


@dataclass(frozen=True)
class OpenSet:
    """Each query against two galleries: one where its person is enrolled and one where it is a stranger. All (Q,).

    score, right: in the first, the highest score and whether it is its person's. stranger: the highest score in the
    second. half: 0 or 1, the gallery in which its person is enrolled. person: its person.
    """

    score: Tensor
    right: Tensor
    stranger: Tensor
    half: Tensor
    person: Tensor

    def at_fpir(self, fpir: float) -> OpenSetPoint | None:
        """The outcome at thresholds that give a name to a share `fpir` of strangers (false positive identification
        rate; the share of `answered` is the detection and identification rate, DIR; both ISO/IEC 19795-1).

        A gallery's threshold is the lowest that gives a name to at most that share of the persons who are not enrolled
        in it. So that the rate is tested and not fitted, each stranger is held against the threshold that the queries
        of all other strangers give. None if there are too few strangers' queries to expect MIN_ERRORS in both
        galleries, or only those of one person.
        """
        named, thresholds = torch.zeros_like(self.right), torch.zeros(2, dtype=torch.float32)
        for gallery in (0, 1):
            rows = (self.half != gallery).nonzero()[:, 0]
            if len(rows) * fpir < MIN_ERRORS or len(self.person[rows].unique()) < 2:
                return None
            scores = self.stranger[rows]
            thresholds[gallery] = threshold_for(scores, fpir)
            named[rows] = scores >= thresholds_without(scores, self.person[rows], fpir)
        answered = self.right & (self.score >= thresholds[self.half])
        return OpenSetPoint(answered, named, tuple(thresholds.tolist()))


def open_set(scores: Scores, seed: int) -> OpenSet:
    """Half of the persons, drawn by `seed`, are enrolled and the others are strangers; then the halves change places.

    Queries of persons outside the gallery are left out. Raises ValueError with fewer than two persons.
    """
    persons = scores.matrix.shape[1]
    if persons < 2:
        raise ValueError("an open-set test needs at least two persons in the gallery: one enrolled, one a stranger")
    first = torch.zeros(persons, dtype=torch.bool)
    first[torch.randperm(persons, generator=torch.Generator().manual_seed(seed))[: persons // 2]] = True
    scores = scores.subset(scores.enrolled)
    count = len(scores.truth)
    score, right, stranger = torch.zeros(count), torch.zeros(count, dtype=torch.bool), torch.zeros(count)
    for half in (first, ~first):
        mated, found = half[scores.truth], ranking(scores.among(half))
        score[mated], right[mated] = found.score[mated], found.rank[mated] == 1
        stranger[~mated] = found.score[~mated]
    return OpenSet(score, right, stranger, half=(~first).long()[scores.truth], person=scores.truth)


def threshold_for(strangers: Tensor, rate: float) -> float:
    """The lowest float32 threshold that at most a share `rate` of the `strangers`' scores (N,) reach."""
    allowed = rounded_down(rate, len(strangers))
    if allowed >= len(strangers):
        return -torch.inf
    highest_refused = strangers.float().sort(descending=True).values[allowed]
    return torch.nextafter(highest_refused, torch.tensor(torch.inf)).item()


def rounded_down(share: float, count: int) -> int:
    """How many of `count` a share of them is, rounded down."""
    return int(share * count + 1e-9)  # 0.07 * 100 is 7.000000000000001, 0.29 * 100 is 28.999999999999996


def thresholds_without(strangers: Tensor, persons: Tensor, rate: float) -> Tensor:
    """(N,) float32: for each stranger's score (N,) the `threshold_for` the scores of all other persons (N,)."""
    values, order = strangers.float().sort(descending=True)
    found = torch.empty(len(strangers))
    by_person = persons[order].argsort(stable=True)  # places in `values`, person by person, the highest score first
    _, sizes = persons.unique(return_counts=True)
    for places in by_person.split(sizes.tolist()):
        others = len(strangers) - len(places)
        allowed = rounded_down(rate, others)
        if allowed >= others:
            found[order[places]] = -torch.inf
            continue
        # The place of the others' highest score that is refused: as many places lower as this person holds above it.
        place = allowed
        while (lower := allowed + int(torch.searchsorted(places, place, right=True))) != place:
            place = lower
        found[order[places]] = torch.nextafter(values[place], torch.tensor(torch.inf))
    return found


@dataclass(frozen=True)
class OpenRates:
    """What each query adds to the open-set figures that can be given: name -> (Q,) float64, NaN for persons outside the
    gallery; and the threshold behind each DIR, the higher one of the two galleries."""

    values: dict[str, Tensor]
    thresholds: dict[str, float]

    def subset(self, rows: Tensor) -> "OpenRates":
        """Those of some queries. The thresholds stay those of all: in use, too, one threshold serves all kinds."""
        return OpenRates({name: value[rows] for name, value in self.values.items()}, self.thresholds)


def open_rates(scores: Scores, seed: int) -> OpenRates:
    """`open_set` at each of FPIRS; without those for which there is one person only, or too few strangers' queries."""
    rates = OpenRates({}, {})
    opened = open_set(scores, seed) if scores.matrix.shape[1] > 1 else None
    for fpir in FPIRS:
        point = opened.at_fpir(fpir) if opened else None
        if point is None:
            continue
        for name, outcome in ((f"DIR@FPIR={fpir:g}", point.answered), (f"FPIR of {fpir:g}", point.named)):
            rates.values[name] = torch.full((len(scores.truth),), torch.nan, dtype=torch.double)
            rates.values[name][scores.enrolled] = outcome.double()
        rates.thresholds[f"DIR@FPIR={fpir:g}"] = max(point.thresholds)
    return rates


# --- which photos to refuse? ------------------------------------------------------------------------------------------


def wrong_left(quality: Tensor, wrong: Tensor) -> Tensor:
    """(Q + 1,) float64: how many wrong answers are left once 0, 1, ..., Q queries of the lowest quality are refused:
    the error-versus-discard characteristic of ISO/IEC 29794-1, here in counts.

    quality (Q,): the higher, the better; wrong (Q,) bool. Queries of equal quality are refused in random order; this is
    the expected number. So a quality that is the same for all gives a straight line, not the order of the files.
    """
    _, group = quality.unique(return_inverse=True)  # sorted: the lowest first
    sizes = torch.bincount(group)
    share = torch.bincount(group, wrong.double()) / sizes  # of wrong ones in each group of equals
    refused = share.repeat_interleave(sizes).cumsum(0)
    return wrong.sum() - torch.cat([refused.new_zeros(1), refused])


def share_left(left: Tensor, refused: float) -> float | None:
    """Of `wrong_left`, the share (0..1) of the wrong answers that is left once a share `refused` of the queries,
    rounded down, is refused; None if there is no wrong answer."""
    return (left[rounded_down(refused, len(left) - 1)] / left[0]).item() if left[0] else None


# --- all of them ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """The figures of one set of queries under one template.

    figures: a name of FIGURES -> {value, low, high}, shares in 0..1 with their 95 % interval; None where there are too
    few samples. "FPIR of 0.01" is the rate that the threshold behind DIR@FPIR=0.01 really gave.
    thresholds: cosine behind each TAR and DIR that has a value. values: name -> (Q,) float64, what each query adds to
    a figure that is a mean over queries; NaN where it does not count. cmc: (CMC_RANKS,), or (P,) if fewer; roc: the
    curve.
    """

    figures: dict[str, dict[str, float | None]]
    thresholds: dict[str, float]
    values: dict[str, Tensor]
    cmc: Tensor
    roc: Roc


def measure(scores: Scores, precision: Tensor, persons: Tensor, opened: OpenRates, seed: int) -> Measured:
    """All figures of these queries.

    precision: (Q,), of `average_precision`. persons: (Q,) int64, each query's person, enrolled or not, to draw by.
    opened: of `open_rates`, of these queries or of all those that they are a subset of. seed: of the intervals.
    The intervals of TAR and DIR hold the threshold that all queries gave: they say how the rate depends on the persons
    in the queries, not on the draw of the strangers. macro F1 and EER have none.
    """
    found, curve = ranking(scores), roc(scores)
    enrolled = scores.enrolled  # in a small gallery P + 1, the rank of a stranger, may be among the first 10
    values = {f"rank-{k}": (enrolled & (found.rank <= k)).double() for k in RANKS} | {"mAP": precision}
    thresholds = {}
    for far in FARS:
        name, point = f"TAR@FAR={far:g}", curve.at_far(far)
        if point is None:
            continue
        if point[1] < torch.inf:
            thresholds[name] = point[1]
        values[name] = torch.where(enrolled, (found.genuine >= point[1]).double(), torch.nan)
    values |= opened.values
    thresholds |= opened.thresholds
    interval = rate_interval(torch.stack(list(values.values()), 1), persons, seed)
    figures: dict[str, dict] = {name: {"value": None, "low": None, "high": None} for name in FIGURES}
    for column, (name, value) in enumerate(values.items()):
        figures[name] = {"value": value.nanmean().item()} | _ends(interval[:, column])
    for name, value in (("macro F1", macro_f1(found.predicted, scores.truth)), ("EER", curve.eer())):
        figures[name] = {"value": value, "low": None, "high": None}
    shown = min(CMC_RANKS, scores.matrix.shape[1])
    return Measured(figures, thresholds, values, cmc(found.rank, shown), curve)


def compare(before: Measured, after: Measured, persons: Tensor, seed: int) -> dict[str, dict[str, float | None]]:
    """name -> {value, low, high}: after minus before, of the same queries in the same order, with the 95 % interval of
    the paired difference; of the figures that both have and that are means over queries.

    Raises ValueError if the numbers of queries differ.
    """
    if len(before.values["rank-1"]) != len(after.values["rank-1"]) or len(persons) != len(after.values["rank-1"]):
        raise ValueError(
            f"a comparison needs the same queries: {len(before.values['rank-1'])} before, "
            f"{len(after.values['rank-1'])} after, {len(persons)} persons"
        )
    names = [name for name in before.values if name in after.values]
    difference = torch.stack([after.values[name] - before.values[name] for name in names], 1)
    interval = difference_interval(difference, persons, seed)
    return {
        name: {"value": difference[:, column].nanmean().item()} | _ends(interval[:, column])
        for column, name in enumerate(names)
    }


def _ends(interval: Tensor) -> dict[str, float | None]:
    low, high = interval.tolist()
    return {"low": None, "high": None} if math.isnan(low) else {"low": low, "high": high}
