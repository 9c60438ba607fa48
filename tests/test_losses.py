import math

import pytest
import torch
import torch.nn.functional as F

from losses import ArcMarginProduct, ContrastiveLoss, euclidean, hardest_negatives


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


# --- ArcFace ----------------------------------------------------------------------------------------------------------


def test_arcface_equals_the_paper_formula_whatever_the_embedding_norm():
    logits = arcface(s=8.0, m=0.5)(at(math.pi / 6, 2.0, norm=7.0), torch.tensor([0, 1]))
    assert logits[0].tolist() == pytest.approx(
        [8 * math.cos(math.pi / 6 + 0.5), 8 * math.cos(math.pi / 3), 8 * math.cos(5 * math.pi / 6)], rel=1e-12
    )
    assert logits[1].tolist() == pytest.approx(
        [8 * math.cos(2.0), 8 * math.cos(2.0 - math.pi / 2 + 0.5), 8 * math.cos(math.pi - 2.0)], rel=1e-12
    )


def test_arcface_gives_the_numbers_worked_out_by_hand():
    """At 60 degrees from its centre and a margin of 30 degrees the target is cos 90 = 0, and 1/2 without a margin."""
    label = torch.tensor([0])
    assert arcface(s=10.0, m=math.pi / 6)(at(math.pi / 3), label)[0, 0].item() == pytest.approx(0, abs=1e-12)
    assert arcface(s=10.0, m=0.0)(at(math.pi / 3), label)[0, 0].item() == pytest.approx(5, rel=1e-12)


@pytest.mark.parametrize("angle", [math.pi - 0.49, math.pi - 0.25, math.pi])
def test_arcface_target_is_cos_less_m_sin_m_beyond_pi_minus_m(angle):
    logits = arcface(s=8.0, m=0.5)(at(angle), torch.tensor([0]))
    assert logits[0, 0].item() == pytest.approx(8 * (math.cos(angle) - 0.5 * math.sin(0.5)), rel=1e-12)


def test_arcface_target_is_cos_of_the_shifted_angle_just_before_pi_minus_m():
    logits = arcface(s=8.0, m=0.5)(at(math.pi - 0.51), torch.tensor([0]))
    assert logits[0, 0].item() == pytest.approx(8 * math.cos(math.pi - 0.01), rel=1e-12)


@pytest.mark.parametrize(
    "angle, target",
    [(1.0, math.cos(1.5)), (1.57, math.cos(2.07)), (1.58, math.cos(1.58)), (3.0, math.cos(3.0))],  # pi/2 = 1.5708
)
def test_easy_margin_applies_the_margin_only_where_the_cosine_is_positive(angle, target):
    logits = arcface(s=8.0, m=0.5, easy_margin=True)(at(angle), torch.tensor([0]))
    assert logits[0, 0].item() == pytest.approx(8 * target, rel=1e-9)


@pytest.mark.parametrize("margin", [0.0, 0.5, 1.2])
def test_arcface_target_logit_falls_all_the_way_from_angle_0_to_pi(margin):
    angles = [math.pi * i / 5000 for i in range(5001)]
    target = arcface(s=32.0, m=margin)(at(*angles), torch.zeros(5001, dtype=torch.int64))[:, 0]
    assert (target.diff() < 0).all()


def test_arcface_leaves_the_other_columns_at_s_cos():
    embeddings, labels = unit_vectors(6, 16, seed=0).double(), torch.tensor([0, 1, 2, 3, 4, 0])
    head = ArcMarginProduct(16, 5, s=30.0, m=0.5).double()
    logits = head(embeddings, labels)
    for row, label in enumerate(labels.tolist()):
        for column in set(range(5)) - {label}:
            centre = head.weight[column]
            cosine = (embeddings[row] @ centre / (embeddings[row].norm() * centre.norm())).item()
            assert logits[row, column].item() == pytest.approx(30 * cosine, rel=1e-9)


def test_the_cosine_that_classifies_knows_no_margin_and_no_scale():
    cosine = arcface(s=8.0, m=0.5).cosine(at(math.pi / 3, norm=7.0))
    assert cosine[0].tolist() == pytest.approx([0.5, math.sqrt(3) / 2, -0.5], rel=1e-12)


@pytest.mark.parametrize("easy_margin", [False, True])
def test_arcface_gradient_equals_the_numerical_one(easy_margin):
    angles = (0.3, 1.0, 2.0, 2.9)  # the last one beyond pi - m
    head, labels = arcface(s=4.0, m=0.5, easy_margin=easy_margin), torch.tensor([0, 0, 0, 0])

    def logits(embeddings, weight):
        return torch.func.functional_call(head, {"weight": weight}, (embeddings, labels))

    inputs = (at(*angles, norm=2.0).requires_grad_(), head.weight.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(logits, inputs)


@pytest.mark.parametrize("easy_margin", [False, True])
@pytest.mark.parametrize("sign", [1, -1])  # the embedding on its own class centre, and opposite to it
def test_arcface_gradient_is_finite_at_both_ends(sign, easy_margin):
    head = ArcMarginProduct(512, 64, s=64.0, m=0.5, easy_margin=easy_margin)  # 64: some cosines round to above 1
    embeddings = (sign * head.weight.detach()).requires_grad_()
    F.cross_entropy(head(embeddings, torch.arange(64)), torch.arange(64)).backward()
    assert embeddings.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_arcface_computes_in_float32_under_autocast():
    head, labels = ArcMarginProduct(512, 10, s=64.0, m=0.5), torch.arange(10)
    embeddings = unit_vectors(10, 512, seed=1)
    expected = head(embeddings, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(embeddings, labels)
        from_half = head(embeddings.bfloat16(), labels)
        assert (embeddings @ embeddings.T).dtype == torch.bfloat16  # autocast is at work around it
    assert logits.dtype == from_half.dtype == torch.float32
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("s", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_is_no_positive_number_is_refused(s):
    with pytest.raises(ValueError, match=rf"SCALE = {s}: expected a positive number"):
        ArcMarginProduct(8, 2, s=s, m=0.5)


@pytest.mark.parametrize("m", [-0.1, math.pi / 2, 28.6, math.nan])
def test_a_margin_outside_0_to_half_pi_is_refused_and_radians_are_told(m):
    with pytest.raises(ValueError, match=rf"MARGIN = {m}: expected radians in \[0, pi/2\); 0.5 is 28.6 degrees"):
        ArcMarginProduct(8, 2, s=32.0, m=m)


# --- contrastive ------------------------------------------------------------------------------------------------------


def test_contrastive_loss_equals_the_formula_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    anchor, positive, negative = 0.3 * torch.randn(3, 8, 5, dtype=torch.double, generator=generator)
    total = 0.0
    for a, p, n in zip(anchor.tolist(), positive.tolist(), negative.tolist(), strict=True):
        to_positive = math.sqrt(sum((x - y) ** 2 for x, y in zip(a, p, strict=True)))
        to_negative = math.sqrt(sum((x - y) ** 2 for x, y in zip(a, n, strict=True)))
        total += to_positive**2 + max(0.0, 1.1 - to_negative) ** 2
    assert ContrastiveLoss(1.1)(anchor, positive, negative).item() == pytest.approx(total / 8, rel=1e-12)


def test_contrastive_loss_gives_the_number_worked_out_by_hand():
    """Positive at distance 5 -> 25; negative at distance 0.6 of margin 1 -> 0.16; a second triplet adds nothing."""
    anchor = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    positive = torch.tensor([[3.0, 4.0], [1.0, 1.0]])
    negative = torch.tensor([[0.6, 0.0], [9.0, 9.0]])
    assert ContrastiveLoss(1.0)(anchor, positive, negative).item() == pytest.approx((25 + 0.16) / 2, rel=1e-6)


def test_contrastive_loss_is_zero_for_an_identical_positive_and_a_far_negative():
    anchor = unit_vectors(4, 16, seed=2)
    assert ContrastiveLoss(1.0)(anchor, anchor.clone(), -anchor).item() == 0


def test_a_negative_beyond_the_margin_gives_no_gradient_and_one_within_does():
    anchor = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    negative = torch.tensor([[0.0, 1.0], [0.8, 0.6]], requires_grad=True)  # distances sqrt(2) and sqrt(0.4)
    ContrastiveLoss(1.0)(anchor, anchor.detach(), negative).backward()
    assert anchor.grad[0].tolist() == [0, 0] and negative.grad[0].tolist() == [0, 0]
    distance = math.sqrt(0.4)
    away = -2 * (1 - distance) / distance / 2  # d/dn of (1 - d)^2, halved by the mean over two triplets
    assert negative.grad[1].tolist() == pytest.approx([away * -0.2, away * 0.6], rel=1e-5)


def test_contrastive_gradient_is_zero_where_all_three_embeddings_coincide():
    anchor = unit_vectors(3, 512, seed=3).requires_grad_()
    positive, negative = (anchor.detach().clone().requires_grad_() for _ in range(2))
    loss = ContrastiveLoss(1.0)(anchor, positive, negative)
    loss.backward()
    assert loss.item() == pytest.approx(1, abs=1e-5)  # nothing to pull, and margin^2 for the negative
    for embeddings in (anchor, positive, negative):
        assert (embeddings.grad == 0).all()


def test_contrastive_gradient_equals_the_numerical_one():
    generator = torch.Generator().manual_seed(4)
    triplet = [0.3 * torch.randn(6, 4, dtype=torch.double, generator=generator) for _ in range(3)]
    assert torch.autograd.gradcheck(ContrastiveLoss(1.0), [part.requires_grad_() for part in triplet])


@pytest.mark.parametrize("margin", [0.0, -1.0, 2.1, math.nan])
def test_a_contrastive_margin_that_unit_embeddings_cannot_have_is_refused(margin):
    with pytest.raises(ValueError, match=rf"CONTRASTIVE_MARGIN = {margin}: expected a distance in \(0, 2\]"):
        ContrastiveLoss(margin)


def test_euclidean_is_the_row_wise_distance():
    distance = euclidean(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[3.0, 4.0], [1.0, 1.0]]))
    assert distance.tolist() == pytest.approx([5, 0], abs=1e-5)


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
    index = hardest_negatives(anchor, torch.arange(32), candidates, 100 + torch.arange(32))
    assert index.tolist() == planted.tolist()
    mined = candidates[index].requires_grad_()
    ContrastiveLoss(1.0)(anchor, anchor, mined).backward()
    assert (mined.grad.norm(dim=1) > 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_the_hardest_negative_is_the_nearest_candidate_of_another_person(seed):
    anchors, candidates = unit_vectors(10, 3, seed=seed), unit_vectors(40, 3, seed=100 + seed)
    generator = torch.Generator().manual_seed(seed)
    anchor_labels = torch.randint(4, (10,), generator=generator)
    candidate_labels = torch.randint(4, (40,), generator=generator)
    chosen = hardest_negatives(anchors, anchor_labels, candidates, candidate_labels)
    for i in range(10):
        others = [j for j in range(40) if candidate_labels[j] != anchor_labels[i]]
        assert chosen[i].item() == min(others, key=lambda j: math.dist(anchors[i].tolist(), candidates[j].tolist()))


def test_a_candidate_of_the_same_person_is_never_a_negative_however_near():
    anchors = torch.tensor([[1.0, 0.0]])
    candidates = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])  # the only other person lies opposite
    assert hardest_negatives(anchors, torch.tensor([3]), candidates, torch.tensor([3, 8, 3])).tolist() == [1]


def test_a_tie_goes_to_the_lower_index():
    anchors = torch.tensor([[1.0, 0.0]])
    candidates = torch.tensor([[0.0, 1.0], [0.6, 0.8], [0.6, -0.8], [0.6, 0.8]])
    assert hardest_negatives(anchors, torch.tensor([0]), candidates, torch.tensor([1, 2, 3, 4])).tolist() == [1]


def test_an_anchor_without_another_person_is_an_error():
    anchors = unit_vectors(2, 4, seed=8)
    with pytest.raises(ValueError, match=r"an anchor has no negative; raise BATCH_SIZE"):
        hardest_negatives(anchors, torch.tensor([5, 5]), anchors, torch.tensor([5, 5]))


def test_no_gradient_flows_through_the_choice():
    embeddings, kept = unit_vectors(4, 8, seed=9).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        index = hardest_negatives(embeddings, torch.arange(4), embeddings, torch.arange(4))
    assert index.dtype == torch.int64
    assert kept == []  # nothing is stored for a backward pass
