"""Figures of a retrieval: rank-k, CMC, mAP, macro F1, ROC, EER, open set, discard, and their intervals. Tensors only.

A query scores against each person of the gallery: the cosine with the person's mean embedding (template "mean") or
with its most similar photo ("best"). All scores of a query are looked at, a block of queries at a time. Embeddings of
a face and a whole frame (models.Crops, D > 512) are averaged in the face alone, see `templates`.

Shapes used throughout: queries (Q, D), rows of norm 1, and gallery (G, D), likewise, or each row of a norm that is the
weight of this photo in its person's mean; labels (G,) int64 in 0..P-1, the person of each gallery row, every person
with at least one; truth (Q,) int64, the query's person, -1 if not enrolled; sources (Q,) int64, the gallery row that
the query must not be compared with (its own source photo), -1 for none.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError
from models import EMBEDDING_DIM

TEMPLATES = ("mean", "best")  # a person's mean embedding, or the best match over its photos
TIE = 1e-6  # cosines closer than this are equal: float32 rounding
BLOCK_SCORES = 2**24  # cosines held at a time: 64 MiB of float32
MIN_ERRORS = 10  # false accepts that a rate must let one expect, or it is not reported: fewer are chance
MIN_PERSONS = 10  # to draw an interval from
REPLICATES = 2000  # of the bootstrap
BINS = 100  # of the score histograms, over -1..1


# --- scores -----------------------------------------------------------------------------------------------------------


def mean_templates(gallery: Tensor, labels: Tensor) -> Tensor:
    """(P, D): the sum of each person's embeddings, renormalised."""
    return F.normalize(_sums(gallery, labels))


def _unit(gallery: Tensor) -> Tensor:
    """Rows of norm 1; the gallery itself, not a copy, where they are."""
    norms = gallery.norm(dim=1, keepdim=True)
    return gallery if ((norms - 1).abs() < 1e-4).all() else gallery / norms


def _sums(gallery: Tensor, labels: Tensor) -> Tensor:
    return torch.zeros(int(labels.max()) + 1, gallery.shape[1]).index_add_(0, labels, gallery)


def templates(gallery: Tensor, labels: Tensor, template: str) -> tuple[Tensor, Tensor]:
    """(T, D) rows of norm 1 to match against, and (T,) their labels: a person's score is that of its best row.

    "best": all photos. "mean": one row per person. Of embeddings of a face and a whole frame, "mean" has a row per
    photo all the same: the mean of the person's faces beside the frame of that one photo. A frame's embedding tells a
    photo, not a person, and the mean of several is like none of them. A person all of whose faces are burnt out has
    its frames alone.
    Raises ValueError for another `template`.
    """
    check_template(template)
    if template == "best":
        return _unit(gallery), labels
    if gallery.shape[1] <= EMBEDDING_DIM:
        return mean_templates(gallery, labels), torch.arange(int(labels.max()) + 1)
    faces, frames, share = _parts(gallery)
    means = mean_templates(faces, labels)
    means = means[labels]
    return torch.cat([share * means, _beside(means, share)[:, None] * frames], 1), labels


def _parts(gallery: Tensor) -> tuple[Tensor, Tensor, float]:
    """Faces (G, 512), of norm `share` times their weight or, burnt out, 0; frames, of norm 1; share: the norm of a face
    beside a frame."""
    faces, frames = gallery[:, :EMBEDDING_DIM], F.normalize(gallery[:, EMBEDDING_DIM:])
    return faces, frames, min(1.0, (faces.norm(dim=1) / gallery.norm(dim=1)).max().item())


def _beside(means: Tensor, share: float) -> Tensor:
    """The norm of the frame beside each of `means`, (N, 512) of norm 1 or 0, so that both make 1."""
    return torch.where(means.any(1), math.sqrt(max(1 - share**2, 1e-12)), 1.0)


def person_scores(
    queries: Tensor, truth: Tensor, sources: Tensor, gallery: Tensor, labels: Tensor, template: str
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of queries and their scores (B, P) against every person; at most BLOCK_SCORES cosines at a time.

    A query with a source is scored against its person's other photos only; -inf if there is none.
    """
    check_template(template)
    sources = torch.where(truth >= 0, sources, -1)
    if template == "best":
        score, columns = _BestMatch(_unit(gallery), labels), len(gallery)
    elif gallery.shape[1] <= EMBEDDING_DIM:
        score, columns = _MeanMatch(gallery, labels), int(labels.max()) + 1
    else:
        score, columns = _MeanFaceMatch(gallery, labels), len(gallery)
    rows = max(1, BLOCK_SCORES // columns)
    for start in range(0, len(queries), rows):
        block = slice(start, min(start + rows, len(queries)))
        of_block = (sources[block] >= 0).nonzero()[:, 0]  # rows of the block with a source to leave out
        yield block, score(queries[block], of_block, truth[block][of_block], sources[block][of_block])


class _BestMatch:
    """Scores (B, P) of a block: the highest cosine among a person's photos; `rows` of it leave out `source`."""

    def __init__(self, gallery: Tensor, labels: Tensor):
        self.gallery, self.labels, self.persons = gallery, labels, int(labels.max()) + 1

    def __call__(self, queries: Tensor, rows: Tensor, own: Tensor, source: Tensor) -> Tensor:
        scores = queries @ self.gallery.T
        scores[rows, source] = -torch.inf
        if len(self.gallery) == self.persons:
            return torch.empty_like(scores).index_copy_(1, self.labels, scores)
        by_person = scores.new_full((len(scores), self.persons), -torch.inf)
        return by_person.scatter_reduce_(1, self.labels.expand_as(scores), scores, "amax")


class _MeanMatch:
    """Scores (B, P) of a block: the cosine with the mean of a person's photos; `rows` of it leave out `source`."""

    def __init__(self, gallery: Tensor, labels: Tensor):
        self.gallery, self.sums, self.counts = gallery, _sums(gallery, labels), torch.bincount(labels)
        self.means = F.normalize(self.sums)

    def rest(self, own: Tensor, source: Tensor) -> Tensor:
        """(N, D): the means without one photo; 0 where it is a person's only one, which rounding leaves at random."""
        rest = F.normalize(self.sums[own] - self.gallery[source])
        return rest.masked_fill((self.counts[own] == 1)[:, None], 0)

    def __call__(self, queries: Tensor, rows: Tensor, own: Tensor, source: Tensor) -> Tensor:
        scores = queries @ self.means.T
        if len(rows):
            cosine = (queries[rows] * self.rest(own, source)).sum(1)
            scores[rows, own] = cosine.masked_fill(self.counts[own] == 1, -torch.inf)
        return scores


class _MeanFaceMatch:
    """Scores (B, P) of a block: "mean" of embeddings of a face and a frame, see `templates`."""

    def __init__(self, gallery: Tensor, labels: Tensor):
        faces, frames, self.share = _parts(gallery)
        self.of_faces, self.of_frames = _MeanMatch(faces, labels), _BestMatch(frames, labels)

    def __call__(self, queries: Tensor, rows: Tensor, own: Tensor, source: Tensor) -> Tensor:
        faces, frames = queries[:, :EMBEDDING_DIM], queries[:, EMBEDDING_DIM:]
        of_frames = self.of_frames(frames, rows, own, source)  # (B, P)
        beside = _beside(self.of_faces.means, self.share).expand_as(of_frames).clone()
        beside[rows, own] = _beside(self.of_faces.rest(own, source), self.share)
        return self.share * self.of_faces(faces, rows, own, source) + beside * of_frames


def check_template(template: str) -> None:
    if template not in TEMPLATES:
        raise UserError(f"TEMPLATE = {template!r}: expected one of {', '.join(map(repr, TEMPLATES))}")


# --- closed set: who is it? -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranking:
    """What each query was answered; all (Q,).

    predicted: int64, person of the highest score; score: float32, that cosine. rank: int64 from 1, place of the right
    person, P + 1 if it is not enrolled. genuine: score of the right person, NaN if not enrolled. rival: highest score
    of another person, -inf if there is no other.
    """

    predicted: Tensor
    score: Tensor
    rank: Tensor
    genuine: Tensor
    rival: Tensor


def ranking(queries: Tensor, truth: Tensor, sources: Tensor, gallery: Tensor, labels: Tensor, template: str) -> Ranking:
    """Every query's answer and the rank of its person. Scores within TIE of each other are equal: the lower label goes
    first, be it the right one or not.

    Raises ValueError if there is no query or no gallery row.
    """
    if len(queries) == 0 or len(gallery) == 0:
        raise ValueError(f"retrieval needs queries and a gallery, got {len(queries)} and {len(gallery)} rows")
    parts: list[tuple[Tensor, ...]] = []
    for block, scores in person_scores(queries, truth, sources, gallery, labels, template):
        own = truth[block]
        enrolled = own >= 0
        column = own.clamp(min=0)[:, None]
        # Equal rows differ by rounding, with their place in the product: argmax() of the scores would pick by chance.
        tied = scores >= scores.amax(1, keepdim=True) - TIE
        predicted = tied.to(torch.uint8).argmax(1)  # argmax() gives the first of equals
        genuine = scores.gather(1, column)
        above = (scores > genuine + TIE).sum(1)
        level = ((scores - genuine).abs() <= TIE) & (torch.arange(scores.shape[1]) < column)
        rank = 1 + above + level.sum(1)
        # TIE chains: a lower label may be level with the right person and not with the highest score.
        rank = torch.where(predicted == own, 1, rank.clamp(min=2))
        score = scores.gather(1, predicted[:, None])[:, 0]
        others = torch.where(enrolled[:, None], scores.scatter(1, column, -torch.inf), scores)
        parts.append(
            (
                predicted,
                score,
                torch.where(enrolled, rank, scores.shape[1] + 1),
                torch.where(enrolled, genuine[:, 0], torch.nan),
                others.amax(1),
            )
        )
    return Ranking(*(torch.cat(column) for column in zip(*parts, strict=True)))


def cmc(rank: Tensor, ranks: int) -> Tensor:
    """(ranks,): share of the queries whose person is among the first 1, 2, ... (cumulative match characteristic)."""
    counts = torch.bincount(rank.clamp(max=ranks + 1), minlength=ranks + 2)[1 : ranks + 1]
    return counts.cumsum(0).double() / len(rank)


def average_precision(queries: Tensor, truth: Tensor, sources: Tensor, gallery: Tensor, labels: Tensor) -> Tensor:
    """(Q,): each query's average precision over the gallery's photos, its person's photos being the relevant ones.

    mean over relevant photos of (relevant among the first r) / r, r the photo's place; 0 if no photo is relevant.
    Their mean over queries is the mAP. The source is no part of the list. Cosines within TIE of the next in line are
    equal and keep the gallery's order.
    """
    found, gallery = [], _unit(gallery)
    rows = max(1, BLOCK_SCORES // (8 * len(gallery)))  # the sorting holds several times as much
    for start in range(0, len(queries), rows):
        block = slice(start, start + rows)
        cosine = queries[block] @ gallery.T
        relevant = labels == truth[block][:, None]
        with_source = (sources[block] >= 0).nonzero()[:, 0]
        cosine[with_source, sources[block][with_source]] = -torch.inf  # last place
        relevant[with_source, sources[block][with_source]] = False
        falling, order = cosine.sort(dim=1, descending=True)
        group = torch.zeros_like(order)
        group[:, 1:] = (falling[:, :-1] > falling[:, 1:] + TIE).cumsum(1)
        of_row = torch.empty_like(order).scatter_(1, order, group)  # in the gallery's order again
        hits = relevant.gather(1, of_row.argsort(dim=1, stable=True))
        precision = hits.cumsum(1).double() / torch.arange(1, len(gallery) + 1)
        found.append((precision * hits).sum(1) / hits.sum(1).clamp(min=1))
    return torch.cat(found)


def macro_f1(predicted: Tensor, truth: Tensor) -> float:
    """Mean over persons of F1 = 2 TP / (asked + answered), of all persons that are asked for or answered.

    A person named by mistake only has F1 0; likewise one who asks and is not enrolled (truth -1, as one person).
    """
    persons = torch.cat([predicted, truth]).unique()

    def count(of: Tensor) -> Tensor:
        return torch.bincount(torch.searchsorted(persons, of), minlength=len(persons))

    right, pairs = count(predicted[predicted == truth]), count(truth) + count(predicted)
    return (2 * right.double() / pairs).mean().item()


# --- verification: is it the same person? -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Roc:
    """Accepting at score >= threshold, at every threshold where the true accept rate changes: the genuine scores.

    thresholds: (T,) falling; far, tar: (T,) float64 rising, shares of impostor and of genuine pairs accepted. Genuine
    scores within TIE above a threshold share it, and an impostor within TIE below reaches it: rounding decides nothing.
    far_above: (T,), share of the impostors above by more than TIE, those who are accepted whatever becomes of ties.
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

        TAR is 0, at a threshold above every genuine score, where no such threshold accepts a genuine pair. None if
        there are too few impostor pairs to expect MIN_ERRORS false accepts, or no genuine pair.
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


def roc(queries: Tensor, truth: Tensor, sources: Tensor, gallery: Tensor, labels: Tensor, template: str) -> Roc:
    """Exact over all pairs of a query and a person, in two passes over the scores, holding one score per query.

    The curve rises at genuine scores alone, so it is known from how many impostors reach each of them.
    """
    inputs = (queries, truth, sources, gallery, labels, template)
    genuine = torch.empty(len(queries))
    for block, scores in person_scores(*inputs):
        genuine[block] = scores.gather(1, truth[block].clamp(min=0)[:, None])[:, 0]
    genuine = genuine[truth >= 0]  # (genuine pairs,)
    rising = _spaced(genuine)
    # Impostors that reach, or are above, exactly the first i thresholds.
    reached, above = torch.zeros(2, len(rising) + 1, dtype=torch.int64)
    impostor_bins, pairs = torch.zeros(BINS, dtype=torch.int64), 0
    for block, scores in person_scores(*inputs):
        impostor = torch.ones_like(scores, dtype=torch.bool)
        own = truth[block]
        impostor[(own >= 0).nonzero()[:, 0], own[own >= 0]] = False
        of_block = scores[impostor]
        reached += torch.bincount(torch.searchsorted(rising - TIE, of_block, right=True), minlength=len(reached))
        above += torch.bincount(torch.searchsorted(rising + TIE, of_block), minlength=len(above))
        impostor_bins += _bins(of_block)
        pairs += len(of_block)
    at_least, more = reached[1:].flip(0).cumsum(0), above[1:].flip(0).cumsum(0)  # of the thresholds, falling
    refused = torch.searchsorted(genuine.sort().values, rising.flip(0))
    return Roc(
        thresholds=rising.flip(0),
        far=at_least.double() / max(pairs, 1),
        far_above=more.double() / max(pairs, 1),
        tar=(len(genuine) - refused).double() / max(len(genuine), 1),
        genuine_pairs=len(genuine),
        impostor_pairs=pairs,
        edges=torch.linspace(-1, 1, BINS + 1),
        genuine_bins=_bins(genuine),
        impostor_bins=impostor_bins,
    )


def _spaced(scores: Tensor) -> Tensor:
    """Rising scores, each more than TIE above the one before, the others left out in favour of one just below them."""
    kept, last = [], -math.inf
    for score in scores.unique().tolist():
        if score > last + TIE or not kept:
            kept.append(score)
            last = score
    return torch.tensor(kept)


def _bins(scores: Tensor) -> Tensor:
    return torch.histc(scores.clamp(-1, 1), BINS, -1, 1).long()


# --- open set: is it anyone we know? ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenSetPoint:
    """answered, named: (Q,) bool, whether a query named its person where that is enrolled, and anybody where it is not.
    thresholds: of both galleries."""

    answered: Tensor
    named: Tensor
    thresholds: tuple[float, float]


@dataclass(frozen=True)
class OpenSet:
    """Every query asks twice: once enrolled (score, right: whether its person came first), once a stranger (stranger:
    the highest score in the gallery that holds the other persons). half: in which of the two galleries, 0 or 1, its
    person is enrolled; person: whom it shows. All (Q,)."""

    score: Tensor
    right: Tensor
    stranger: Tensor
    half: Tensor
    person: Tensor

    def at_fpir(self, fpir: float) -> OpenSetPoint | None:
        """Who is named where a share `fpir` of strangers may be (false positive identification rate; the share of
        enrolled queries answered right is the detection and identification rate, DIR; both ISO/IEC 19795-1).

        A gallery's threshold is the lowest that names at most that share of the persons who are not enrolled in it. So
        that the promise is tested and not fitted, each stranger meets the threshold that all the others give: persons
        who are neither enrolled nor asking. None if too few strangers ask to expect MIN_ERRORS in both galleries, or
        those of one person alone.
        """
        named, refused_at = torch.zeros_like(self.right), torch.zeros(2, dtype=torch.float32)
        for gallery in (0, 1):
            rows = (self.half != gallery).nonzero()[:, 0]
            if len(rows) * fpir < MIN_ERRORS or len(self.person[rows].unique()) < 2:
                return None
            scores = self.stranger[rows]
            refused_at[gallery] = threshold_for(scores, fpir)
            named[rows] = scores >= thresholds_without(scores, self.person[rows], fpir)
        answered = self.right & (self.score >= refused_at[self.half])
        return OpenSetPoint(answered, named, tuple(refused_at.tolist()))


def open_set(
    queries: Tensor, truth: Tensor, sources: Tensor, gallery: Tensor, labels: Tensor, template: str, seed: int
) -> OpenSet:
    """Half of the persons, drawn by `seed`, are enrolled and the others are strangers; then the halves change places.

    Queries of persons outside the gallery are left out. Raises UserError with fewer than two persons.
    """
    asks = truth >= 0
    persons = int(labels.max()) + 1
    if persons < 2:
        raise ValueError("an open-set test needs at least two persons in the gallery: one enrolled, one a stranger")
    enrolled = torch.zeros(persons, dtype=torch.bool)
    enrolled[torch.randperm(persons, generator=torch.Generator().manual_seed(seed))[: persons // 2]] = True
    score, right = torch.zeros(len(queries)), torch.zeros(len(queries), dtype=torch.bool)
    stranger = torch.zeros(len(queries))
    for half in (enrolled, ~enrolled):
        rows = half[labels]
        new_label = half.cumsum(0) - 1
        new_row = rows.cumsum(0) - 1
        mated = (truth >= 0) & half[truth.clamp(min=0)]
        found = ranking(
            queries,
            torch.where(mated, new_label[truth.clamp(min=0)], -1),
            torch.where(mated & (sources >= 0), new_row[sources.clamp(min=0)], -1),
            gallery[rows],
            new_label[labels[rows]],
            template,
        )
        score[mated], right[mated] = found.score[mated], found.rank[mated] == 1
        stranger[~mated] = found.score[~mated]
    half_of = (~enrolled).long()[truth.clamp(min=0)]
    return OpenSet(score[asks], right[asks], stranger[asks], half_of[asks], truth[asks])


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


# --- which photos to refuse? ------------------------------------------------------------------------------------------


def wrong_left(quality: Tensor, wrong: Tensor) -> Tensor:
    """(Q + 1,) float64: how many wrong answers are left once 0, 1, ..., Q queries of the lowest quality are refused:
    the error-versus-discard characteristic of ISO/IEC 29794-1, here in counts.

    quality (Q,): the higher, the better; wrong (Q,) bool. Among equal qualities it is left to chance whom it hits: the
    expected number, so that a quality that is the same for all gives a straight line, not the order of the files.
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


# --- how sure? --------------------------------------------------------------------------------------------------------


def bootstrap(
    values: Tensor, persons: Tensor, seed: int, replicates: int = REPLICATES, bounded: bool = True
) -> Tensor | None:
    """(2, M): 95 % percentile intervals of the column means of `values` (Q, M), by resampling persons (Q,) int64.

    A person's photos succeed or fail together, so persons are drawn, with all their queries. NaN: the query does not
    count in that column. Two checkpoints on the same queries are compared by the interval of their difference, row by
    row (paired). None with fewer than MIN_PERSONS persons.

    bounded: a share that is 0 or 1 for every person has no spread to resample: the exact binomial bound over persons
    (Clopper & Pearson 1934) then takes the place of an interval of no width; where all persons agree on another share,
    there is none (NaN), as in a column in which fewer than MIN_PERSONS have a value.
    """
    _, index = persons.unique(return_inverse=True)
    count = int(index.max()) + 1 if len(index) else 0
    if count < MIN_PERSONS:
        return None
    counted = (~values.isnan()).double()
    sums = torch.zeros(count, values.shape[1], dtype=torch.double).index_add_(0, index, values.double().nan_to_num())
    sizes = torch.zeros_like(sums).index_add_(0, index, counted)
    generator = torch.Generator().manual_seed(seed)
    means = []
    rows = max(1, BLOCK_SCORES // count)
    for start in range(0, replicates, rows):
        drawn = torch.randint(count, (min(rows, replicates - start), count), generator=generator)
        weights = torch.zeros(drawn.shape, dtype=torch.double).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
        means.append((weights @ sums) / (weights @ sizes))
    interval = torch.cat(means).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.double), dim=0)
    units = (sizes > 0).sum(0)  # persons that count in the column
    bound = 0.025 ** (1 / units.clamp(min=1).double())  # of a share of 1: what as many successes still allow
    exact = ((values == 0) | (values == 1) | values.isnan()).all(0)
    exact &= bounded
    low = torch.where(exact & (sums == sizes).all(0), bound, interval[0])
    high = torch.where(exact & (sums == 0).all(0), 1 - bound, interval[1])
    interval = torch.stack([low, high])
    interval[:, (low == high) & bounded] = torch.nan
    return torch.where(units >= MIN_PERSONS, interval, torch.nan)


# --- all of them ------------------------------------------------------------------------------------------------------

RANKS = (1, 5, 10)
FARS = (1e-2, 1e-3, 1e-4)
FPIRS = (1e-2, 1e-1)


@dataclass(frozen=True)
class OpenRates:
    """Of each query what it adds to the figures of the open set that can be told, (Q,) float64, NaN for persons outside
    the gallery; and the thresholds behind each DIR, the higher one of the two galleries."""

    values: dict[str, Tensor]
    thresholds: dict[str, float]

    def of(self, rows: Tensor) -> "OpenRates":
        """Those of some queries; the thresholds stay what all gave: a door knows no kinds."""
        return OpenRates({name: value[rows] for name, value in self.values.items()}, self.thresholds)


def open_rates(
    queries: Tensor, truth: Tensor, sources: Tensor, gallery: Tensor, labels: Tensor, template: str, seed: int
) -> OpenRates:
    """`open_set` at each of FPIRS; nothing where the gallery holds one person, or too few strangers ask."""
    rates = OpenRates({}, {})
    opened = open_set(queries, truth, sources, gallery, labels, template, seed) if int(labels.max()) else None
    for fpir in FPIRS:
        point = opened.at_fpir(fpir) if opened else None
        if point is None:
            continue
        for name, told in ((f"DIR@FPIR={fpir:g}", point.answered), (f"FPIR of {fpir:g}", point.named)):
            rates.values[name] = torch.full((len(queries),), torch.nan, dtype=torch.double)
            rates.values[name][truth >= 0] = told.double()
        rates.thresholds[f"DIR@FPIR={fpir:g}"] = max(point.thresholds)
    return rates


@dataclass(frozen=True)
class Measured:
    """The figures of one set of queries under one template.

    figures: name -> {value, low, high}, shares in 0..1 with their 95 % interval; None where there is too little to say.
    Names: rank-1, rank-5, rank-10, mAP, macro F1, EER, TAR@FAR=0.01, 0.001, 0.0001, DIR@FPIR=0.01, 0.1, and beside
    each DIR the FPIR that was realised where so much was promised, FPIR of 0.01, 0.1.
    thresholds: cosine behind each TAR and DIR that has a value. values: name -> (Q,) float64, what each query adds to
    a figure that is a mean over queries; NaN where it does not count. cmc: (ranks,), or (P,) if fewer; roc: the curve.
    """

    figures: dict[str, dict[str, float | None]]
    thresholds: dict[str, float]
    values: dict[str, Tensor]
    cmc: Tensor
    roc: Roc


def measure(
    queries: Tensor,
    truth: Tensor,
    sources: Tensor,
    gallery: Tensor,
    labels: Tensor,
    template: str,
    persons: Tensor,
    seed: int,
    ranks: int = 20,
    opened: OpenRates | None = None,
) -> Measured:
    """Everything this module knows, of (Q, D) queries; persons: (Q,) int64, whom each shows, enrolled or not.

    opened: of `open_rates`, where these queries are some of those that gave its thresholds; None: these give them.

    The intervals of TAR and DIR hold the threshold that all queries gave: they tell how the rate depends on the persons
    asked, not on the draw of the strangers. macro F1 and EER have none. seed: of open_set's halves and the bootstrap.
    """
    inputs = (queries, truth, sources, gallery, labels, template)
    found, curve = ranking(*inputs), roc(*inputs)
    opened = opened or open_rates(*inputs, seed)
    enrolled = truth >= 0  # in a small gallery P + 1, the rank of nobody, may be among the first 10
    values = {f"rank-{k}": (enrolled & (found.rank <= k)).double() for k in RANKS}
    values["mAP"] = average_precision(queries, truth, sources, gallery, labels)
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
    interval = bootstrap(torch.stack(list(values.values()), 1), persons, seed)
    figures: dict[str, dict] = {name: {"value": None, "low": None, "high": None} for name in FIGURES}
    for column, (name, value) in enumerate(values.items()):
        figures[name] = {"value": value.nanmean().item()} | _ends(interval, column)
    for name, value in (("macro F1", macro_f1(found.predicted, truth)), ("EER", curve.eer())):
        figures[name] = {"value": value, "low": None, "high": None}
    shown = min(ranks, int(labels.max()) + 1)
    return Measured(figures, thresholds, values, cmc(found.rank, shown), curve)


FIGURES = (
    *(f"rank-{k}" for k in RANKS),
    *("mAP", "macro F1", "EER"),
    *(f"TAR@FAR={far:g}" for far in FARS),
    *(name for fpir in FPIRS for name in (f"DIR@FPIR={fpir:g}", f"FPIR of {fpir:g}")),
)


def compare(before: Measured, after: Measured, persons: Tensor, seed: int) -> dict[str, dict[str, float | None]]:
    """name -> {value, low, high}: after minus before, of the same queries in the same order, with the 95 % interval of
    the paired difference; of the figures that both know and that are means over queries.

    Raises ValueError if the numbers of queries differ.
    """
    if len(before.values["rank-1"]) != len(after.values["rank-1"]) or len(persons) != len(after.values["rank-1"]):
        raise ValueError(
            f"a comparison needs the same queries: {len(before.values['rank-1'])} before, "
            f"{len(after.values['rank-1'])} after, {len(persons)} persons"
        )
    names = [name for name in before.values if name in after.values]
    difference = torch.stack([after.values[name] - before.values[name] for name in names], 1)
    interval = bootstrap(difference, persons, seed, bounded=False)
    found = {}
    for column, name in enumerate(names):
        found[name] = {"value": difference[:, column].nanmean().item()} | _ends(interval, column)
    return found


def _ends(interval: Tensor | None, column: int) -> dict[str, float | None]:
    low, high = interval[:, column].tolist() if interval is not None else (math.nan, math.nan)
    return {"low": None, "high": None} if math.isnan(low) else {"low": low, "high": high}
