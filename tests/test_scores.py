"""Scores of queries against persons, compared with loops over photos in float64 and with cases worked out by hand."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metrics import average_precision
from scores import TEMPLATES, Scores, mean_templates, person_scores, photo_cosines, templates

both_templates = pytest.mark.parametrize("template", TEMPLATES)


@dataclass(frozen=True)
class Case:
    """Queries and a gallery; shapes as in scores.py."""

    queries: Tensor
    truth: Tensor
    sources: Tensor
    gallery: Tensor
    labels: Tensor
    wide: bool = False

    def scores(self, template: str) -> Scores:
        return person_scores(
            queries=self.queries,
            truth=self.truth,
            sources=self.sources,
            gallery=self.gallery,
            labels=self.labels,
            template=template,
            wide=self.wide,
        )

    def average_precision(self) -> Tensor:
        return average_precision(
            queries=self.queries,
            truth=self.truth,
            sources=self.sources,
            gallery=self.gallery,
            labels=self.labels,
        )


def random_case(with_source: float = 0.5, photos=(1, 3, 2, 4, 1, 2, 3), seed: int = 0, queries: int = 40) -> Case:
    """`photos` of each person, gallery rows in no order; each query near a photo of its person, which is its source for
    a share `with_source` of them; one in five queries is of a person who is not enrolled."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(len(photos)), photos))
    gallery = random.normal(size=(len(labels), 5))
    source = random.integers(len(labels), size=queries)
    rows = gallery[source] + random.normal(size=(queries, 5))
    truth = labels[source]
    stranger = np.arange(queries) % 5 == 4
    rows[stranger], truth[stranger] = random.normal(size=(stranger.sum(), 5)), -1
    source[stranger | (random.random(queries) >= with_source)] = -1
    rows, gallery = (F.normalize(torch.tensor(of, dtype=torch.float32)) for of in (rows, gallery))
    return Case(rows, torch.tensor(truth), torch.tensor(source), gallery, torch.tensor(labels))


def loop_scores(case: Case, template: str) -> Tensor:
    """(Q, P) float64: each query against each person, with lists."""
    table = []
    gallery, labels = case.gallery.double().tolist(), case.labels.tolist()
    for query, source in zip(case.queries.double().tolist(), case.sources.tolist(), strict=True):
        line = []
        for person in range(max(labels) + 1):
            photos = [row for place, row in enumerate(gallery) if labels[place] == person and place != source]
            cosines = [math.fsum(a * b for a, b in zip(query, photo, strict=True)) for photo in photos]
            if not photos:
                line.append(-math.inf)
            elif template == "best":
                line.append(max(cosines))
            else:
                total = [math.fsum(column) for column in zip(*photos, strict=True)]
                line.append(math.fsum(cosines) / math.sqrt(math.fsum(value**2 for value in total)))
        table.append(line)
    return torch.tensor(table, dtype=torch.float64)


# --- scores -----------------------------------------------------------------------------------------------------------


@both_templates
@pytest.mark.parametrize(
    "with_source, photos",
    [
        (0.0, (1, 3, 2, 4, 1, 2, 3)),
        (0.5, (1, 3, 2, 4, 1, 2, 3)),
        (1.0, (1, 3, 2, 4, 1, 2, 3)),
        (0.5, (1, 1, 1, 1, 1)),
        (0.5, (3,)),
        (0.5, (1,)),
    ],
)
def test_scores_equal_a_loop_over_queries_and_persons(template, with_source, photos):
    case = random_case(with_source, photos)
    found, expected = case.scores(template), loop_scores(case, template)
    assert found.matrix.dtype == torch.float32 and torch.equal(found.truth, case.truth)
    torch.testing.assert_close(found.matrix.double(), expected, rtol=0, atol=2e-6)  # -inf in the same places, too
    assert (expected == -torch.inf).any() == (with_source > 0 and 1 in photos)  # a source that is the only photo


def test_scoring_leaves_its_inputs_unchanged():
    case = random_case(1.0)
    before = {name: tensor.clone() for name, tensor in vars(case).items() if name != "wide"}
    case.scores("mean"), case.scores("best"), case.average_precision()
    assert all(torch.equal(getattr(case, name), tensor) for name, tensor in before.items())


def test_scoring_refuses_an_unknown_template_and_empty_input():
    case = random_case()
    for call in (case.scores, lambda template: templates(case.gallery, case.labels, template, case.wide)):
        with pytest.raises(ValueError, match="TEMPLATE = 'median': expected one of 'mean', 'best'"):
            call("median")
    none = torch.empty(0, dtype=torch.int64)
    without_queries = replace(case, queries=torch.empty(0, 5), truth=none, sources=none)
    with pytest.raises(ValueError, match="needs queries and a gallery, got 0 and 16 rows"):
        without_queries.scores("mean")
    with pytest.raises(ValueError, match="needs queries and a gallery, got 40 and 0 rows"):
        replace(case, gallery=torch.empty(0, 5), labels=none).scores("best")


def test_a_subset_holds_the_scores_of_some_queries_by_index_or_by_mask():
    whole = random_case().scores("mean")
    rows = torch.tensor([7, 3])
    assert torch.equal(whole.subset(rows).matrix, whole.matrix[rows])
    assert torch.equal(whole.subset(rows).truth, whole.truth[rows])
    known = whole.subset(whole.enrolled)
    assert len(known.truth) == len(known.matrix) == 32 and (known.truth >= 0).all()


@both_templates
@pytest.mark.parametrize("wide", [False, True])
def test_scores_among_some_persons_equal_those_of_a_gallery_that_holds_only_them(template, wide):
    case = faces_and_frames(queries=80, photos=23, persons=7, seed=0) if wide else random_case(1.0)
    persons = torch.tensor([True, False, True, True, False, False, True])
    found = case.scores(template).among(persons)
    rows, new_label = persons[case.labels], persons.cumsum(0) - 1
    mated = (case.truth >= 0) & persons[case.truth.clamp(min=0)]
    new_row = rows.cumsum(0) - 1
    smaller = Case(
        queries=case.queries,
        truth=torch.where(mated, new_label[case.truth.clamp(min=0)], -1),
        sources=torch.where(mated & (case.sources >= 0), new_row[case.sources.clamp(min=0)], -1),
        gallery=case.gallery[rows],
        labels=new_label[case.labels[rows]],
        wide=case.wide,
    )
    torch.testing.assert_close(found.matrix, smaller.scores(template).matrix, rtol=0, atol=1e-6)
    assert torch.equal(found.truth, smaller.truth) and set(found.truth.tolist()) == {-1, 0, 1, 2, 3}


@pytest.mark.parametrize("most", [1, 90, 330])
def test_cosines_with_photos_are_held_a_block_at_a_time_and_blocks_change_no_figure(monkeypatch, most):
    case = random_case(photos=(4, 5, 6), queries=100)
    whole, precision = case.scores("best"), case.average_precision()
    monkeypatch.setattr("scores.BLOCK_COSINES", most)
    blocks = list(photo_cosines(case.queries, case.sources, case.gallery))
    assert [row for block, _ in blocks for row in range(100)[block]] == list(range(100))
    assert all(cosines.numel() <= max(most, 15) for _, cosines in blocks)  # at least one query
    assert len(blocks) == math.ceil(100 / max(1, most // 15))  # no smaller than they need to be
    torch.testing.assert_close(case.scores("best").matrix, whole.matrix, rtol=0, atol=1e-6)
    torch.testing.assert_close(case.average_precision(), precision)


# --- templates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 1024])
def test_templates_are_one_renormalised_row_per_person_or_every_photo(dims):
    gallery = F.pad(torch.tensor([[0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]]), (0, dims - 2))
    labels, half = torch.tensor([1, 0, 1]), math.sqrt(0.5)
    rows, of_person = templates(gallery, labels, "mean", wide=False)
    assert of_person.tolist() == [0, 1] and torch.equal(rows, mean_templates(gallery, labels))
    torch.testing.assert_close(rows[:, :2], torch.tensor([[-1.0, 0.0], [half, half]]))
    rows, of_person = templates(2 * gallery, labels, "best", wide=False)
    assert rows.tolist() == gallery.tolist() and of_person.tolist() == [1, 0, 1]


@both_templates
@pytest.mark.parametrize("wide", [False, True])
def test_a_persons_score_is_that_of_its_best_template_row(template, wide):
    case = faces_and_frames(queries=6, photos=11, persons=4, seed=2) if wide else random_case(0.0, (3, 1, 2, 4))
    case = replace(case, sources=torch.full_like(case.sources, -1))
    rows, labels = templates(case.gallery, case.labels, template, case.wide)
    assert torch.allclose(rows.norm(dim=1), torch.ones(len(rows)), atol=1e-5)
    cosine = case.queries @ rows.T
    best = torch.stack([cosine[:, labels == person].amax(1) for person in range(4)], 1)
    torch.testing.assert_close(case.scores(template).matrix, best, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wide", [False, True])
def test_the_norm_of_a_row_is_its_weight_in_the_mean_only(wide):
    """A photo of weight 2 counts like two photos in the mean, and like one everywhere else."""
    case = faces_and_frames(queries=12, photos=12, persons=4, seed=1) if wide else random_case(1.0, (2, 3, 4, 3))
    weights = 1 + torch.arange(12) % 3
    weighted = replace(case, gallery=case.gallery * weights[:, None])
    torch.testing.assert_close(weighted.scores("best").matrix, case.scores("best").matrix, rtol=0, atol=1e-6)
    torch.testing.assert_close(weighted.average_precision(), case.average_precision())
    found = weighted.scores("mean").matrix
    for query, source in enumerate(case.sources.tolist()):
        kept = (torch.arange(12) != source).repeat_interleave(weights)  # without the source, however often it is there
        one = Case(
            queries=case.queries[[query]],
            truth=case.truth[[query]],
            sources=torch.tensor([-1]),
            gallery=case.gallery.repeat_interleave(weights, 0)[kept],
            labels=case.labels.repeat_interleave(weights)[kept],
            wide=wide,
        )
        torch.testing.assert_close(found[[query]], one.scores("mean").matrix, rtol=0, atol=1e-5)


# --- a face beside a frame --------------------------------------------------------------------------------------------


def joined(faces: Tensor, frames: Tensor, weight: float = 0.3) -> Tensor:
    """As models.FaceNet with crops: [face, weight x frame] of norm 1; a burnt out face is all zeros."""
    return F.normalize(torch.cat([F.normalize(faces), weight * F.normalize(frames)], 1))


def faces_and_frames(queries: int, photos: int, persons: int, seed: int) -> Case:
    """Queries with and without a source, and a gallery, each with some burnt out faces."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(photos) % persons
    centres = torch.randn(persons, 512, generator=generator)
    faces = centres[labels] + torch.randn(photos, 512, generator=generator)
    faces[[photos // 2, photos - 1]] = 0
    sources = torch.randint(photos, (queries,), generator=generator)
    near = faces[sources] + torch.randn(queries, 512, generator=generator)
    near[1] = 0
    truth = labels[sources]
    truth[2] = -1
    sources[2 : queries // 2] = -1
    frames, query_frames = (torch.randn(count, 512, generator=generator) for count in (photos, queries))
    return Case(joined(near, query_frames), truth, sources, joined(faces, frames), labels, wide=True)


@pytest.mark.parametrize("weight, dims", [(0.3, 512), (1.0, 512), (0.3, 32)])
def test_faces_are_averaged_and_frames_are_not(weight, dims):
    generator = torch.Generator().manual_seed(0)
    faces, frames, query_faces, query_frames = (torch.randn(n, dims, generator=generator) for n in (17, 17, 9, 9))
    labels = torch.arange(17) % 5
    faces += torch.randn(5, dims, generator=generator)[labels]
    faces[[2, 7, 12]] = 0  # person 2: burnt out in every photo
    faces[[3, 13]] = 0  # person 3: in all but the one that is a query's source
    query_faces[4] = 0
    case = Case(
        queries=joined(query_faces, query_frames, weight),
        truth=torch.tensor([0, 1, 2, 3, 4, 0, 1, -1, 3]),
        sources=torch.tensor([0, -1, 7, 3, -1, 5, 1, -1, 8]),
        gallery=joined(faces, frames, weight),
        labels=labels,
        wide=True,
    )
    expected = torch.empty(9, 5, dtype=torch.float64)
    for q, source in enumerate(case.sources.tolist()):
        for person in range(5):
            own = [g for g in range(17) if labels[g] == person and g != source]
            mean = F.normalize(sum(F.normalize(faces[g].double(), dim=0) for g in own), dim=0)
            rows = [joined(mean[None], frames[g : g + 1].double(), weight)[0] for g in own]
            expected[q, person] = max(case.queries[q].double() @ row for row in rows)
    torch.testing.assert_close(case.scores("mean").matrix.double(), expected, rtol=0, atol=1e-5)


def test_a_person_of_one_photo_is_that_photo_and_has_no_score_without_it():
    case = faces_and_frames(queries=3, photos=3, persons=3, seed=4)
    torch.testing.assert_close(templates(case.gallery, case.labels, "mean", wide=True)[0], case.gallery)
    own = replace(case, queries=case.gallery, truth=case.labels, sources=torch.arange(3))
    assert torch.equal(own.scores("mean").matrix.isfinite(), ~torch.eye(3, dtype=torch.bool))
