import math

import pytest
import torch
import torch.nn.functional as F

from losses import ArcMarginProduct, ContrastiveLoss, SourceLoss, euclidean, hardest_negatives, weighted_mean


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


def test_class_centres_start_where_they_are_told_to_and_train_on_from_there():
    head = arcface(s=8.0, m=0.5)
    others = head.weight[1].clone()
    head.start_at(torch.tensor([[0.0, 3.0], [5.0, 0.0]]), torch.tensor([0, 2]))
    torch.testing.assert_close(head.weight[[0, 2]], torch.eye(2).flip(0).double())  # of norm 1, in the head's precision
    assert torch.equal(head.weight[1], others)
    assert head.cosine(at(math.pi / 2)).argmax() in (0, 1)  # the second class still stands there too
    F.cross_entropy(head(at(1.0), torch.tensor([0])), torch.tensor([0])).backward()
    assert head.weight.grad[0].norm() > 0


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


# --- finding the source in a bank -------------------------------------------------------------------------------------

BANK_LABELS = torch.tensor([0, 0, 1, 1, 1, 2, 3])  # persons 0 and 1 have other photos, 2 and 3 have none
SOURCE = torch.tensor([1, 2, 5, 1, 6])  # two copies of one photo among them


def bank_and_copies(dims: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """(embeddings (5, D) near their sources, bank (7, D)), float64 of norm 1."""
    bank = unit_vectors(7, dims, seed=20).double()
    copies = F.normalize(bank[SOURCE] + unit_vectors(5, dims, seed=21).double())
    return copies, bank


def source_loss_by_hand(embeddings, bank, source, labels, temperature) -> float:
    """The formula, number by number."""
    embeddings, bank, labels = embeddings.tolist(), bank.tolist(), labels.tolist()
    total = 0.0
    for z, s in zip(embeddings, source.tolist(), strict=True):
        scores = [math.exp(sum(x * y for x, y in zip(z, b, strict=True)) / temperature) for b in bank]
        rivals = [j for j in range(len(bank)) if j == s or labels[j] != labels[s]]
        total -= math.log(scores[s] / sum(scores[j] for j in rivals))
    return total / len(embeddings)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 3.0])
def test_source_loss_equals_the_formula(temperature):
    embeddings, bank = bank_and_copies()
    loss = SourceLoss(temperature)(embeddings, bank, SOURCE, BANK_LABELS)
    expected = source_loss_by_hand(embeddings, bank, SOURCE, BANK_LABELS, temperature)
    assert loss.shape == () and loss.item() == pytest.approx(expected, rel=1e-12)


def test_source_loss_gives_the_number_worked_out_by_hand():
    """Cosine 1 with the source and 0 with two rivals, at t = 1/2: log(1 + 2 e^-2)."""
    bank = torch.eye(3, 4, dtype=torch.double)
    loss = SourceLoss(0.5)(bank[:1], bank, torch.tensor([0]), torch.arange(3))
    assert loss.item() == pytest.approx(math.log(1 + 2 * math.exp(-2)), rel=1e-12)


def test_source_loss_gradient_equals_the_numerical_one():
    embeddings, bank = (part.requires_grad_() for part in bank_and_copies(dims=4))
    assert torch.autograd.gradcheck(lambda z, b: SourceLoss(0.3)(z, b, SOURCE, BANK_LABELS), (embeddings, bank))


def test_other_photos_of_the_person_change_nothing_and_get_no_gradient():
    embeddings, bank = bank_and_copies()
    source = torch.tensor([1, 2, 1])  # persons 0 and 1; rows 0, 3 and 4 are their other photos
    embeddings, others = embeddings[[0, 1, 3]].requires_grad_(), [0, 3, 4]
    alike = bank.clone()
    alike[others] = torch.stack([bank[1], bank[2], bank[2]])  # as near as can be: the worst of rivals
    # A photo of person 0 is a rival of person 1's all the same, so each person is looked at alone.
    for rows, own in (([0, 2], [0]), ([1], [3, 4])):
        grads, values = [], []
        for version in (bank, alike):
            changed = bank.clone()
            changed[own] = version[own]
            changed.requires_grad_()
            loss = SourceLoss(0.1)(embeddings[rows], changed, source[rows], BANK_LABELS)
            grads.append(torch.autograd.grad(loss, (embeddings, changed)))
            values.append(loss.item())
            assert (grads[-1][1][own] == 0).all()
            assert (grads[-1][1][5:] != 0).all()  # other persons' photos do get one
        assert values[0] == pytest.approx(values[1], rel=1e-12) and values[0] > 0
        torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-9, atol=1e-12)


def test_a_photo_of_another_person_is_a_rival_the_worse_the_nearer():
    embeddings, bank = bank_and_copies()
    nearer = bank.clone()
    nearer[5] = embeddings[0]  # of person 2, upon a copy of person 0's photo
    before, after = (SourceLoss(0.1)(embeddings[:1], b, SOURCE[:1], BANK_LABELS).item() for b in (bank, nearer))
    assert after > before + 0.1


def test_a_bank_of_one_person_has_no_rival_and_costs_nothing():
    embeddings, bank = bank_and_copies()
    embeddings.requires_grad_()
    loss = SourceLoss(0.07)(embeddings, bank, SOURCE, torch.zeros(7, dtype=torch.int64))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12) and embeddings.grad.abs().max() < 1e-12


def test_source_loss_is_finite_where_the_softmax_alone_would_overflow():
    bank = unit_vectors(4, 8, seed=22)
    embeddings = (-bank).requires_grad_()  # as wrong as can be
    loss = SourceLoss(1e-3)(embeddings, bank, torch.arange(4), torch.arange(4))  # e^1000
    loss.backward()
    assert loss.isfinite() and loss > 100 and embeddings.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, -0.07, math.nan, math.inf])
def test_a_temperature_that_is_no_positive_number_is_refused(temperature):
    with pytest.raises(ValueError, match=rf"TEMPERATURE = {temperature}: expected a positive number"):
        SourceLoss(temperature)


# --- weights ----------------------------------------------------------------------------------------------------------


def triplets() -> list[torch.Tensor]:
    """Anchor, positive and negative (5, 4) float64, the negatives within a margin of 1.5."""
    return list(0.3 * torch.randn(3, 5, 4, dtype=torch.double, generator=torch.Generator().manual_seed(23)))


def weighted_case(rows=slice(None)):
    """The loss as a function of weight, and the embeddings that it reaches, of some `rows` of the batch."""
    parts = [part[rows].clone().requires_grad_() for part in triplets()]
    return lambda weight: ContrastiveLoss(1.5)(*parts, weight), parts


def test_rows_of_weight_0_change_neither_the_loss_nor_the_gradient():
    kept, weight = [0, 2, 4], torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]).double()
    (all_rows, parts), (some_rows, some_parts) = weighted_case(), weighted_case(kept)
    weighted, alone = all_rows(weight), some_rows(None)
    assert weighted.item() == pytest.approx(alone.item(), rel=1e-12)
    assert weighted.item() != pytest.approx(all_rows(None).item(), rel=1e-3)  # those rows would count otherwise
    weighted.backward()
    alone.backward()
    for part, some in zip(parts, some_parts, strict=True):
        assert (part.grad[[1, 3]] == 0).all()
        torch.testing.assert_close(part.grad[kept], some.grad, rtol=1e-9, atol=1e-12)
        assert (some.grad.norm(dim=1) > 0).all()


def test_weights_that_are_all_0_give_a_loss_of_0_and_a_gradient_of_0():
    loss_of, parts = weighted_case()
    loss = loss_of(torch.zeros(5, dtype=torch.double))
    loss.backward()
    assert loss.item() == 0
    assert all((part.grad == 0).all() for part in parts)


@pytest.mark.parametrize("same", [1.0, 0.1])
def test_equal_weights_of_whatever_size_give_the_plain_mean(same):
    loss_of, _ = weighted_case()
    assert loss_of(torch.full((5,), same).double()).item() == pytest.approx(loss_of(None).item(), rel=1e-12)


def test_contrastive_loss_with_weights_gives_the_number_worked_out_by_hand():
    """The first triplet costs 25 + 0.16, the second 0 and the third 4; by weights of 1, 1/2 and 1/2."""
    anchor = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    positive = torch.tensor([[3.0, 4.0], [1.0, 1.0], [2.0, 0.0]])
    negative = torch.tensor([[0.6, 0.0], [9.0, 9.0], [9.0, 9.0]])
    loss = ContrastiveLoss(1.0)(anchor, positive, negative, torch.tensor([1.0, 0.5, 0.5]))
    assert loss.item() == pytest.approx((25.16 + 0.5 * 4) / 2, rel=1e-6)


def test_contrastive_gradient_with_weights_equals_the_numerical_one():
    weight = torch.tensor([1.0, 0.0, 0.25, 1.0, 0.5]).double()
    parts = [part.requires_grad_() for part in triplets()]
    assert torch.autograd.gradcheck(lambda *parts: ContrastiveLoss(1.5)(*parts, weight), parts)


def test_a_weighted_mean_is_by_weight_plain_without_and_0_where_nothing_counts():
    values = torch.tensor([2.0, 4.0, 9.0])
    assert weighted_mean(values, None).item() == 5
    assert weighted_mean(values, torch.tensor([1.0, 0.5, 0.0])).item() == pytest.approx(4 / 1.5, rel=1e-6)
    assert weighted_mean(values, torch.zeros(3)).item() == 0
