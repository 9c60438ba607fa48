"""The losses against their formulas, written out number by number in float64, and their gradients."""

import contextlib
import math
import re

import pytest
import torch
import torch.nn.functional as F

import train_stage1
import train_stage2
from common import UserError
from losses import ArcMarginProduct, ContrastiveLoss, SourceLoss, hardest_negatives, weighted_mean


def arcface(s: float, m: float, easy_margin: bool = False) -> ArcMarginProduct:
    """A float64 head of 3 classes in the plane, centres at 0, 90 and 180 degrees, of lengths that must not matter."""
    head = ArcMarginProduct(2, 3, s=s, m=m, easy_margin=easy_margin).double()
    head.weight.data = torch.tensor([[2.0, 0.0], [0.0, 0.5], [-3.0, 0.0]]).double()
    return head


def at(*angles: float, norm: float = 1.0) -> torch.Tensor:
    """Embeddings (B, 2) float64 at `angles`, radians."""
    return torch.tensor([[norm * math.cos(t), norm * math.sin(t)] for t in angles], dtype=torch.double)


def unit_vectors(count: int, dims: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, dims, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: arcface(s=0.0, m=0.5), "SCALE = 0.0: expected a positive number"),
        (lambda: arcface(s=32.0, m=-0.1), "MARGIN = -0.1: expected radians in [0, pi/2)"),
        (lambda: arcface(s=32.0, m=28.6), "MARGIN = 28.6: expected radians in [0, pi/2); 0.5 is 28.6 degrees"),
        (lambda: arcface(s=32.0, m=math.nan), "MARGIN = nan: expected radians in [0, pi/2)"),
        (lambda: ContrastiveLoss(0.0), "CONTRASTIVE_MARGIN = 0.0: expected a distance in (0, 2]"),
        (lambda: ContrastiveLoss(2.1), "CONTRASTIVE_MARGIN = 2.1: expected a distance in (0, 2]"),
        (lambda: SourceLoss(0.0), "TEMPERATURE = 0.0: expected a positive number"),
    ],
)
def test_a_constant_out_of_range_is_refused_with_what_was_expected(make, message):
    with pytest.raises(UserError, match="^" + re.escape(message)):
        make()


# --- ArcFace ----------------------------------------------------------------------------------------------------------


def test_arcface_equals_the_paper_formula_whatever_the_embedding_norm():
    logits = arcface(s=8.0, m=0.5)(at(math.pi / 6, 2.0, norm=7.0), torch.tensor([0, 1]))
    of_first = [math.cos(math.pi / 6 + 0.5), math.cos(math.pi / 3), math.cos(5 * math.pi / 6)]
    of_second = [math.cos(2.0), math.cos(2.0 - math.pi / 2 + 0.5), math.cos(math.pi - 2.0)]
    assert logits[0].tolist() == pytest.approx([8 * value for value in of_first], rel=1e-12)
    assert logits[1].tolist() == pytest.approx([8 * value for value in of_second], rel=1e-12)


@pytest.mark.parametrize("angle", [math.pi - 0.51, math.pi - 0.49, math.pi])
def test_arcface_target_is_cos_less_m_sin_m_beyond_pi_minus_m(angle):
    logits = arcface(s=8.0, m=0.5)(at(angle), torch.tensor([0]))
    expected = math.cos(angle + 0.5) if angle < math.pi - 0.5 else math.cos(angle) - 0.5 * math.sin(0.5)
    assert logits[0, 0].item() == pytest.approx(8 * expected, rel=1e-12)


@pytest.mark.parametrize("angle, shifted", [(1.0, 1.5), (1.57, 2.07), (1.58, 1.58), (3.0, 3.0)])  # pi/2 = 1.5708
def test_easy_margin_applies_the_margin_only_where_the_cosine_is_positive(angle, shifted):
    logits = arcface(s=8.0, m=0.5, easy_margin=True)(at(angle), torch.tensor([0]))
    assert logits[0, 0].item() == pytest.approx(8 * math.cos(shifted), rel=1e-9)


@pytest.mark.parametrize("margin", [0.0, 1.2])
def test_arcface_target_logit_falls_all_the_way_from_angle_0_to_pi(margin):
    angles = [math.pi * i / 5000 for i in range(5001)]
    target = arcface(s=32.0, m=margin)(at(*angles), torch.zeros(5001, dtype=torch.int64))[:, 0]
    assert (target.diff() < 0).all()


def test_the_cosine_of_a_prediction_has_neither_margin_nor_scale():
    cosine = arcface(s=8.0, m=0.5).cosine(at(math.pi / 3, norm=7.0))
    assert cosine[0].tolist() == pytest.approx([0.5, math.sqrt(3) / 2, -0.5], rel=1e-12)


def test_class_centres_can_be_moved_and_train_from_there():
    head = arcface(s=8.0, m=0.5)
    others = head.weight[1].clone()
    head.start_at(torch.tensor([[0.0, 3.0], [5.0, 0.0]]), torch.tensor([0, 2]))
    torch.testing.assert_close(head.weight[[0, 2]], torch.eye(2).flip(0).double())  # of norm 1, in the head's precision
    assert torch.equal(head.weight[1], others)
    F.cross_entropy(head(at(1.0), torch.tensor([0])), torch.tensor([0])).backward()
    assert head.weight.grad[0].norm() > 0


@pytest.mark.parametrize("easy_margin", [False, True])
def test_arcface_gradient_equals_the_numerical_one(easy_margin):
    head, labels = arcface(s=4.0, m=0.5, easy_margin=easy_margin), torch.tensor([0, 0, 0, 0])

    def logits(embeddings, weight):
        return torch.func.functional_call(head, {"weight": weight}, (embeddings, labels))

    embeddings = at(0.3, 1.0, 2.0, 2.9, norm=2.0).requires_grad_()  # the last one beyond pi - m
    assert torch.autograd.gradcheck(logits, (embeddings, head.weight.detach().clone().requires_grad_()))


@pytest.mark.parametrize("sign", [1, -1])  # the embedding on its own class centre, and opposite to it
def test_arcface_gradient_is_finite_at_both_ends(sign):
    head = ArcMarginProduct(512, 64, s=64.0, m=0.5)  # 64: some cosines round to above 1
    embeddings = (sign * head.weight.detach()).requires_grad_()
    F.cross_entropy(head(embeddings, torch.arange(64)), torch.arange(64)).backward()
    assert embeddings.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_arcface_computes_in_float32_under_autocast():
    head, labels = ArcMarginProduct(512, 10, s=64.0, m=0.5), torch.arange(10)
    embeddings = unit_vectors(10, 512, seed=1)
    expected = head(embeddings, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(embeddings, labels), expected)
        assert head(embeddings.bfloat16(), labels).dtype == torch.float32
        assert (embeddings @ embeddings.T).dtype == torch.bfloat16  # autocast is at work around it


# --- contrastive ------------------------------------------------------------------------------------------------------


def triplets() -> torch.Tensor:
    """Anchors, positives and negatives, each (5, 4) float64, the negatives within a margin of 1.5."""
    return 0.3 * torch.randn(3, 5, 4, dtype=torch.double, generator=torch.Generator().manual_seed(23))


WEIGHT = torch.tensor([1.0, 0.0, 0.25, 1.0, 0.5]).double()


@pytest.mark.parametrize("weight", [None, WEIGHT, torch.full((5,), 0.1).double()])
def test_contrastive_loss_equals_the_formula_of_the_paper_as_a_mean_by_weight(weight):
    total, of_rows = 0.0, [1.0] * 5 if weight is None else weight.tolist()
    for w, a, p, n in zip(of_rows, *triplets().tolist(), strict=True):
        total += w * (math.dist(a, p) ** 2 + max(0.0, 1.1 - math.dist(p, n)) ** 2)
    loss = ContrastiveLoss(1.1)(*triplets(), weight)
    assert loss.item() == pytest.approx(total / sum(of_rows), rel=1e-12)


def test_contrastive_loss_gives_the_number_worked_out_by_hand():
    """The triplets cost 25 + 0.16 (positive at distance 5 of the anchor, negative at 0.6 of it, margin 1), 0 and 4."""
    anchor = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    positive = torch.tensor([[3.0, 4.0], [1.0, 1.0], [2.0, 0.0]])
    negative = torch.tensor([[3.6, 4.0], [9.0, 9.0], [9.0, 9.0]])
    loss = ContrastiveLoss(1.0)(anchor, positive, negative, weight=torch.tensor([1.0, 0.5, 0.5]))
    assert loss.item() == pytest.approx((25.16 + 0.5 * 4) / 2, rel=1e-6)


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_contrastive_gradient_equals_the_numerical_one(weight):
    parts = [part.requires_grad_() for part in triplets()]
    assert torch.autograd.gradcheck(lambda *parts: ContrastiveLoss(1.5)(*parts, weight), parts)


def test_a_negative_beyond_the_margin_gives_no_gradient_and_one_within_does():
    positive = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    negative = torch.tensor([[0.0, 1.0], [0.8, 0.6]], requires_grad=True)  # distances sqrt(2) and sqrt(0.4)
    ContrastiveLoss(1.0)(positive.detach(), positive, negative).backward()
    assert positive.grad[0].tolist() == [0, 0] and negative.grad[0].tolist() == [0, 0]
    distance = math.sqrt(0.4)
    away = -2 * (1 - distance) / distance / 2  # d/dn of (1 - d)^2, halved by the mean over two triplets
    assert negative.grad[1].tolist() == pytest.approx([away * -0.2, away * 0.6], rel=1e-5)
    assert positive.grad[1].tolist() == (-negative.grad[1]).tolist()


def test_the_positive_moves_and_the_anchor_only_feels_the_pull():
    """The negative is within the margin of the positive and beyond that of the anchor."""
    anchor = torch.tensor([[1.0, 0.0]], requires_grad=True)
    positive = torch.tensor([[0.0, 1.0]], requires_grad=True)
    negative = torch.tensor([[-0.6, 0.8]])  # at sqrt(0.4) of the positive
    ContrastiveLoss(1.0)(anchor=anchor, positive=positive, negative=negative).backward()
    distance = math.sqrt(0.4)
    push = 2 * (1 - distance) / distance
    assert anchor.grad[0].tolist() == [2, -2]
    assert positive.grad[0].tolist() == pytest.approx([-2 - push * 0.6, 2 - push * 0.2], rel=1e-5)


def test_contrastive_gradient_is_zero_where_all_three_embeddings_coincide():
    parts = [unit_vectors(3, 512, seed=3).requires_grad_() for _ in range(3)]
    loss = ContrastiveLoss(1.0)(*parts)
    loss.backward()
    assert loss.item() == pytest.approx(1, abs=1e-5)  # nothing to pull, and margin^2 for the negative
    assert all((part.grad == 0).all() for part in parts)


def test_rows_of_weight_0_change_neither_the_loss_nor_the_gradient():
    kept, weight = [0, 2, 4], torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]).double()
    parts = [part.requires_grad_() for part in triplets()]
    some_parts = [part[kept].requires_grad_() for part in triplets()]
    weighted, alone = ContrastiveLoss(1.5)(*parts, weight), ContrastiveLoss(1.5)(*some_parts)
    assert weighted.item() == pytest.approx(alone.item(), rel=1e-12)
    weighted.backward()
    alone.backward()
    for part, some in zip(parts, some_parts, strict=True):
        assert (part.grad[[1, 3]] == 0).all()
        torch.testing.assert_close(part.grad[kept], some.grad, rtol=1e-9, atol=1e-12)


def test_a_weighted_mean_is_by_weight_plain_without_and_0_without_gradient_where_all_weights_are_0():
    values = torch.tensor([2.0, 4.0, 9.0], requires_grad=True)
    assert weighted_mean(values, None).item() == 5
    assert weighted_mean(values, torch.tensor([1.0, 0.5, 0.0])).item() == pytest.approx(4 / 1.5, rel=1e-6)
    nothing = weighted_mean(values, torch.zeros(3))
    nothing.backward()
    assert nothing.item() == 0 and values.grad.tolist() == [0, 0, 0]


# --- hard negatives ---------------------------------------------------------------------------------------------------


def test_random_negatives_in_512_dims_never_push_but_the_hardest_finds_the_planted_one():
    """The trap: random unit vectors are about 1.41 apart, beyond a margin of 1."""
    anchor, negative = unit_vectors(32, 512, seed=5), unit_vectors(32, 512, seed=6)
    random_negative = negative.clone().requires_grad_()
    ContrastiveLoss(1.0)(anchor, anchor, random_negative).backward()
    assert (random_negative.grad == 0).all()

    planted = torch.randperm(32, generator=torch.Generator().manual_seed(7))  # the look-alike of anchor i is planted[i]
    candidates = negative.clone()
    candidates[planted] = F.normalize(anchor + 0.02 * negative)
    index = hardest_negatives(anchor, candidates, same_person=torch.zeros(32, 32, dtype=torch.bool))
    assert index.tolist() == planted.tolist()
    mined = candidates[index].requires_grad_()
    ContrastiveLoss(1.0)(anchor, anchor, mined).backward()
    assert (mined.grad.norm(dim=1) > 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_hardest_negative_is_the_nearest_candidate_of_another_person(seed):
    anchors, candidates = unit_vectors(10, 3, seed=seed), unit_vectors(40, 3, seed=100 + seed)
    generator = torch.Generator().manual_seed(seed)
    anchor_labels = torch.randint(4, (10,), generator=generator)
    candidate_labels = torch.randint(4, (40,), generator=generator)
    candidates[::8], candidate_labels[::8] = anchors[::2], anchor_labels[::2]  # however near, never of the same person
    chosen = hardest_negatives(anchors, candidates, anchor_labels[:, None] == candidate_labels)
    for i in range(10):
        others = [j for j in range(40) if candidate_labels[j] != anchor_labels[i]]
        assert chosen[i].item() == min(others, key=lambda j: math.dist(anchors[i].tolist(), candidates[j].tolist()))


def test_a_tie_goes_to_the_lower_index():
    anchors = torch.tensor([[1.0, 0.0]])
    candidates = torch.tensor([[0.0, 1.0], [0.6, 0.8], [0.6, -0.8], [0.6, 0.8]])
    assert hardest_negatives(anchors, candidates, torch.zeros(1, 4, dtype=torch.bool)).tolist() == [1]


NO_NEGATIVE = "one person, so there is no negative; train on two persons or more, or raise MAYBE_SAME"


@pytest.mark.parametrize(
    "angles, labels, persons, maybe_same, enough",
    [
        ((0, 90), (0, 1), 2, 0.4, True),
        ((0, 90, 91), (0, 0, 0), 1, 0.4, False),
        ((0, 90, 20), (0, 0, 1), 1, 0.4, False),  # the last photo has no person, and may be of the one
        ((0, 90, 20), (0, 0, 1), 1, 0.99, True),  # at 20 degrees it is another one
        ((0, 40, 80, 120), (0, 1, 2, 3), 0, 0.7, True),
        ((0, 40, 80), (0, 1, 2), 0, 0.7, False),  # the one in the middle may be of either of the others
    ],
)
def test_stage_2_refuses_a_photo_that_has_no_negative_before_the_first_step(
    monkeypatch, angles, labels, persons, maybe_same, enough
):
    monkeypatch.setattr(train_stage2, "MAYBE_SAME", maybe_same)
    bank = at(*(math.radians(angle) for angle in angles))
    with contextlib.nullcontext() if enough else pytest.raises(UserError, match=NO_NEGATIVE):
        train_stage2.Losses(bank, torch.tensor(labels), persons)


def test_every_photo_of_a_large_bank_is_checked_for_a_negative(monkeypatch):
    monkeypatch.setattr(train_stage2, "MAYBE_SAME", 0.7)
    bank = at(*[0.0] * 1500, *[math.radians(80)] * 1500, math.radians(40))
    labels = torch.tensor([0] * 1500 + [1] * 1500 + [2])
    train_stage2.Losses(bank[:-1], labels[:-1], persons=2)
    with pytest.raises(UserError, match=NO_NEGATIVE):
        train_stage2.Losses(bank, labels, persons=2)


def test_no_gradient_flows_through_the_choice():
    embeddings, kept = unit_vectors(4, 8, seed=9).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        index = hardest_negatives(embeddings, embeddings, same_person=torch.eye(4, dtype=torch.bool))
    assert index.dtype == torch.int64 and kept == []  # nothing is stored for a backward pass


# --- finding the source in a bank -------------------------------------------------------------------------------------

BANK_LABELS = torch.tensor([0, 0, 1, 1, 1, 2, 3])  # persons 0 and 1 have other photos, 2 and 3 have none
SOURCE = torch.tensor([1, 2, 5, 1, 6])  # two copies of one photo among them
SAME_PERSON = BANK_LABELS[SOURCE][:, None] == BANK_LABELS


def bank_and_copies(dims: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """(embeddings (5, D) near their sources, bank (7, D)), float64 of norm 1."""
    bank = unit_vectors(7, dims, seed=20).double()
    return F.normalize(bank[SOURCE] + unit_vectors(5, dims, seed=21).double()), bank


@pytest.mark.parametrize("temperature", [0.07, 3.0])
def test_source_loss_equals_the_formula(temperature):
    embeddings, bank = bank_and_copies()
    labels, total = BANK_LABELS.tolist(), 0.0
    for z, s in zip(embeddings.tolist(), SOURCE.tolist(), strict=True):
        scores = [math.exp(sum(x * y for x, y in zip(z, b, strict=True)) / temperature) for b in bank.tolist()]
        total -= math.log(scores[s] / sum(scores[j] for j in range(7) if j == s or labels[j] != labels[s]))
    loss = SourceLoss(temperature)(embeddings, bank, SOURCE, SAME_PERSON)
    assert loss.shape == () and loss.item() == pytest.approx(total / 5, rel=1e-12)


def test_source_loss_gradient_equals_the_numerical_one():
    embeddings, bank = (part.requires_grad_() for part in bank_and_copies(dims=4))
    assert torch.autograd.gradcheck(lambda z, b: SourceLoss(0.3)(z, b, SOURCE, SAME_PERSON), (embeddings, bank))


def test_other_photos_of_the_person_change_nothing_and_get_no_gradient():
    embeddings, bank = bank_and_copies()
    losses = []
    for row_3, row_4 in ((bank[3], bank[4]), (bank[2], bank[2])):  # as drawn, and as near as can be to the source
        changed = torch.cat([bank[:3], row_3[None], row_4[None], bank[5:]]).requires_grad_()
        losses.append(SourceLoss(0.1)(embeddings[[1]], changed, torch.tensor([2]), SAME_PERSON[[1]]))
        (gradient,) = torch.autograd.grad(losses[-1], changed)
        assert (gradient[[3, 4]] == 0).all() and (gradient[[0, 1, 2, 5, 6]] != 0).any(1).all()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12) and losses[0] > 0


def test_a_bank_of_one_person_costs_nothing():
    embeddings, bank = bank_and_copies()
    embeddings.requires_grad_()
    loss = SourceLoss(0.07)(embeddings, bank, SOURCE, torch.ones(5, 7, dtype=torch.bool))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12) and embeddings.grad.abs().max() < 1e-12


def test_source_loss_is_finite_where_the_softmax_alone_would_overflow():
    bank = unit_vectors(4, 8, seed=22)
    embeddings = (-bank).requires_grad_()  # as wrong as can be
    loss = SourceLoss(1e-3)(embeddings, bank, torch.arange(4), torch.eye(4, dtype=torch.bool))  # e^1000
    loss.backward()
    assert loss.isfinite() and loss > 100 and embeddings.grad.isfinite().all()


# --- a loss of your own -----------------------------------------------------------------------------------------------


class CosFace(ArcMarginProduct):
    """Additive cosine margin logits: Wang et al. 2018, arXiv:1801.09414, eq. 4: s (cos(t) - m) for the label."""

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        cosine = self.cosine(embeddings)
        return self.s * (cosine - self.m * F.one_hot(labels, cosine.shape[1]))


def test_another_loss_trains_where_stage_1_makes_its_head(tiny_runs, monkeypatch):
    monkeypatch.setattr(train_stage1, "ArcMarginProduct", CosFace)
    monkeypatch.setattr(train_stage1, "EPOCHS", 1)
    train_stage1.main()
    assert (train_stage1.RUN_DIR / "best.pt").is_file()
