"""samplers.py: which items make the batches of an epoch, in one process and in several; and which files they read."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_person
from PIL import Image
from torch.utils.data import DataLoader

import datasets
import samplers
import transforms
from common import UserError
from datasets import FaceClassificationDataset, FacePairDataset
from samplers import PersonBatches, ShuffledBatches

UNEVEN = [0] * 100 + [1] + [2] * 10  # photos per person; the middle one's index is 100
FEW_LARGE = [0] * 236 + list(range(1, 643))  # as in LFW: one person of 236 photos beside many of a single one


def shuffled(seed: int = 0, balance: float = 0.0) -> ShuffledBatches:
    """15 batches of 6 and 7 photos, of 10 persons with 10 photos each."""
    return ShuffledBatches([i // 10 for i in range(100)], 7, seed, balance)


def grouped(seed: int = 0) -> PersonBatches:
    return PersonBatches([0] * 9 + [label for label in range(1, 30) for _ in range(3)], persons=4, pairs=2, seed=seed)


BUILDS = {
    "shuffled": shuffled,
    "balanced": lambda seed=0: shuffled(seed, balance=1.0),
    "persons": grouped,
}
each_sampler = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


def epoch_of(sampler, epoch: int = 1, skip: int = 0) -> list[list[int]]:
    sampler.set_epoch(epoch, skip)
    return list(sampler)


def flat(batches: Sequence[Sequence[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


def per_rank(monkeypatch, world: int, build, epoch: int = 1, skip: int = 0) -> list[list[list[int]]]:
    """The epoch's batches as each of `world` processes sees them."""
    parts = []
    for rank in range(world):
        monkeypatch.setattr(samplers, "rank_and_world", lambda rank=rank: (rank, world))
        parts.append(epoch_of(build(), epoch, skip))
    return parts


# --- every sampler ----------------------------------------------------------------------------------------------------


@each_sampler
def test_batches_depend_on_the_seed_and_the_epoch_alone(build):
    draws = [epoch_of(build(seed), epoch) for seed in (0, 1) for epoch in (1, 2)]
    assert [epoch_of(build(seed), epoch) for seed in (0, 1) for epoch in (1, 2)] == draws
    assert all(a != b for i, a in enumerate(draws) for b in draws[:i])
    assert list(build(0)) == draws[0]  # the first epoch is 1
    sampler = build(0)
    assert epoch_of(sampler, 2) == draws[1] and epoch_of(sampler, 1) == draws[0]  # whatever was drawn before


@each_sampler
def test_a_resumed_epoch_gives_the_batches_that_are_left(build):
    sampler = build()
    whole = epoch_of(sampler, 3)
    for skip in (0, 1, 5, len(whole) - 1, len(whole)):
        assert epoch_of(sampler, 3, skip) == whole[skip:]
        assert len(sampler) == len(whole)  # of a whole epoch: what the learning rate's schedule counts by
    assert epoch_of(sampler, 3) == whole  # the skip is of one epoch


@each_sampler
def test_batches_neither_depend_on_the_global_generator_nor_change_it(build):
    torch.manual_seed(0)
    first = epoch_of(build())
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert epoch_of(build()) == first
    assert torch.equal(torch.get_rng_state(), state)


@each_sampler
def test_len_is_the_number_of_batches_and_items_are_plain_numbers(build):
    for epoch in (1, 2, 3):
        batches = epoch_of(build(), epoch)
        assert len(batches) == len(build()) > 1
        assert {type(index) for index in flat(batches)} == {int}  # tensors would be slow, and no keys of a dict


@each_sampler
@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_have_exactly_the_batches_of_one(monkeypatch, build, world):
    whole = epoch_of(build(), 4, skip=1)
    parts = per_rank(monkeypatch, world, build, epoch=4, skip=1)
    assert [flat(batch) for batch in zip(*parts, strict=True)] == whole
    sizes = [[len(part) for part in batch] for batch in zip(*parts, strict=True)]
    assert all(min(size) >= 2 and max(size) - min(size) <= 1 for size in sizes)


# --- shuffled batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 3, 4])
def test_each_item_comes_once_in_even_batches_whatever_their_size(monkeypatch, world):
    monkeypatch.setattr(samplers, "rank_and_world", lambda: (0, world))
    for items in range(2 * world, 36):
        for batch_size in range(2 * world, items + 1):
            sampler = ShuffledBatches([0] * items, batch_size, seed=0)
            batches = sampler.batches()
            assert sorted(flat(batches)) == list(range(items))
            sizes = [len(batch) for batch in batches]
            assert max(sizes) - min(sizes) <= 1 and len(sizes) == len(sampler)
            assert min(sizes) >= 2 * world  # BatchNorm fails on a single image
            if batch_size >= 4 * world:  # below, batches of 2 per process may have to take in the odd one
                assert max(sizes) <= batch_size
                assert len(sizes) == math.ceil(items / batch_size)  # not in more steps than needed


def test_an_epoch_is_well_shuffled():
    batches = [epoch_of(shuffled(), epoch) for epoch in range(1, 201)]
    first = Counter(index for epoch in batches for index in epoch[0])  # 7 of 100 items, 200 times: 14 +- 3.6 each
    assert len(first) == 100 and max(first.values()) < 32
    assert all(batch != sorted(batch) for batch in batches[0])


def of_persons(size: int) -> PersonBatches:
    return PersonBatches([0, 0, 1, 2], size, 2, seed=0)


def of_photos(size: int) -> ShuffledBatches:
    return ShuffledBatches([0] * 20, size, seed=0)


@pytest.mark.parametrize(
    "world, build, size, allowed, message",
    [
        (1, of_photos, 21, 20, "BATCH_SIZE = 21: more than the 20 items of an epoch; lower it"),
        (1, of_photos, 1, 2, "BATCH_SIZE = 1: too few for two photos in each of 1 processes"),
        (4, of_photos, 7, 8, "BATCH_SIZE = 7: too few for two photos in each of 4 processes"),
        (1, of_persons, 4, 3, "PERSONS_PER_BATCH = 4: only 3 persons have pairs; lower it"),
        (5, of_persons, 2, 3, "PERSONS_PER_BATCH = 2: too few for 5 processes"),  # 4 pairs, then 6
    ],
)
def test_a_batch_that_cannot_be_filled_or_divided_is_refused(monkeypatch, world, build, size, allowed, message):
    monkeypatch.setattr(samplers, "rank_and_world", lambda: (0, world))
    with pytest.raises(UserError, match=f"^{message}$"):
        build(size)
    assert len(build(allowed)) >= 1


# --- balanced persons -------------------------------------------------------------------------------------------------


def counts(balance: float, epoch: int) -> np.ndarray:
    """How often each photo of UNEVEN comes up; its copies are indices of their own, beyond the data."""
    drawn = flat(epoch_of(ShuffledBatches(UNEVEN, 8, seed=0, balance=balance), epoch))
    assert len(set(drawn)) == len(drawn)  # each copy draws its own crop
    seen = np.bincount([index % len(UNEVEN) for index in drawn], minlength=len(UNEVEN))
    assert max(drawn) < len(UNEVEN) * seen.max()  # numbered without gaps
    return seen


@pytest.mark.parametrize("balance", [0.0, 0.25, 0.5, 1.0])
def test_each_photo_comes_up_in_its_share_rounded_up_or_down(balance):
    weights = np.array([UNEVEN.count(label) ** -balance for label in UNEVEN])
    share = len(UNEVEN) * weights / weights.sum()  # in proportion to n^-balance for a photo of a person with n of them
    for epoch in range(1, 41):
        seen = counts(balance, epoch)
        assert seen.sum() == len(UNEVEN)
        assert (seen >= np.floor(share - 1e-9)).all() and (seen <= np.ceil(share + 1e-9)).all()


@pytest.mark.parametrize("balance, persons", [(0.0, (100, 1, 10)), (0.5, (78.3, 7.8, 24.8)), (1.0, (37, 37, 37))])
def test_a_person_of_n_photos_comes_up_in_proportion_to_n_to_the_1_minus_balance(balance, persons):
    drawn = [np.bincount(UNEVEN, weights=counts(balance, epoch)) for epoch in range(1, 101)]
    assert np.mean(drawn, axis=0) == pytest.approx(persons, abs=0.7)
    sampler = ShuffledBatches(UNEVEN, 8, seed=0, balance=balance)
    assert len(sampler) == 14 and {len(batch) for batch in epoch_of(sampler)} == {7, 8}  # as many as without


def test_the_copies_of_a_balanced_photo_are_spread_over_the_epoch():
    sampler = ShuffledBatches(UNEVEN, 7, seed=0, balance=1.0)
    found = [sum(any(i % 111 == 100 for i in batch) for batch in epoch_of(sampler, e)) for e in range(1, 11)]
    assert min(found) >= 11  # 37 copies in 16 batches: by chance 1.5 of them have none; side by side they would fill 6


# --- persons by the batch ---------------------------------------------------------------------------------------------


def check_epoch(labels: Sequence[int], persons: int, pairs: int, batches: list[list[int]]) -> None:
    """What holds for each epoch of PersonBatches."""
    total = len(labels)
    for batch in batches:
        assert len(set(batch)) == len(batch) == persons * pairs
        groups = [[labels[index % total] for index in batch[i : i + pairs]] for i in range(0, len(batch), pairs)]
        assert all(len(set(group)) == 1 for group in groups)  # a person's pairs lie together
        assert len({group[0] for group in groups}) == persons
    every = flat(batches)
    assert len(set(every)) == len(every)
    repeated = Counter(labels[index % total] for index in every if index >= total)
    photos = Counter(labels)
    assert all(count == -photos[label] % pairs for label, count in repeated.items())  # to fill one group, no more


def capped_groups(labels: Sequence[int], pairs: int, batches: int) -> int:
    """How many groups the persons can give, at most one to each batch."""
    return sum(min(math.ceil(photos / pairs), batches) for photos in Counter(labels).values())


def random_labels(seed: int) -> tuple[list[int], int, int]:
    """Labels in any order, of even or very uneven persons; persons and pairs per batch that they allow."""
    generator = np.random.default_rng(seed)
    people = int(generator.integers(1, 30))
    most = int(generator.choice([1, 3, 12, 80]))
    photos = generator.integers(1, most, people, endpoint=True)
    if seed % 3 == 0:
        photos[0] += 100
    labels = generator.permutation(np.repeat(generator.permutation(100)[:people], photos)).tolist()
    return labels, int(generator.integers(1, people, endpoint=True)), int(generator.integers(1, 5, endpoint=True))


@pytest.mark.parametrize("seed", range(40))
def test_any_distribution_gives_whole_batches_of_different_persons(seed):
    labels, persons, pairs = random_labels(seed)
    sampler = PersonBatches(labels, persons, pairs, seed)
    for epoch in (1, 2):
        batches = epoch_of(sampler, epoch)
        assert len(batches) == len(sampler) >= 1
        check_epoch(labels, persons, pairs, batches)
    # One batch more could not be filled, so fewer than a batch's groups are left over.
    count = len(sampler)
    assert capped_groups(labels, pairs, count) - count * persons < persons
    assert capped_groups(labels, pairs, count + 1) < (count + 1) * persons


def test_even_data_shows_every_anchor_exactly_once():
    sampler = PersonBatches([label for label in range(12) for _ in range(4)], 4, 2, seed=0)
    for epoch in (1, 2, 3):
        assert sorted(flat(epoch_of(sampler, epoch))) == list(range(48))


def test_a_person_of_too_few_photos_fills_its_place_with_repeats():
    labels = [0, 1, 1, 2, 2, 2, 2, 2]  # 1, 2 and 5 photos, in groups of 4: 1, 1 and 2 of them
    sampler = PersonBatches(labels, 3, 4, seed=0)
    [batch] = epoch_of(sampler)
    check_epoch(labels, 3, 4, [batch])
    groups = {labels[batch[i] % 8]: sorted(batch[i : i + 4]) for i in range(0, 12, 4)}
    assert groups[0] == [0, 8, 16, 24] and groups[1] == [1, 2, 9, 10]
    seen = {tuple(sorted(index for index in epoch_of(sampler, e)[0] if labels[index % 8] == 2)) for e in range(1, 31)}
    assert any(max(group) < 8 for group in seen) and any(max(group) >= 8 for group in seen)  # either of its two groups


def test_a_person_of_very_many_photos_is_never_twice_in_a_batch_and_the_surplus_misses_the_epoch():
    sampler, missed = PersonBatches(FEW_LARGE, 16, 2, seed=0), []
    assert len(sampler) == 42  # 42 groups of the one and 642 of the others: 12 more than 42 batches of 16 take
    for epoch in range(1, 11):
        batches = epoch_of(sampler, epoch)
        check_epoch(FEW_LARGE, 16, 2, batches)
        of_the_one = [sum(index % 878 < 236 for index in batch) for batch in batches]
        assert set(of_the_one) <= {0, 2} and of_the_one.count(2) >= 30
        missed.append(set(range(236, 878)) - set(flat(batches)))
    assert all(1 <= len(indices) <= 12 for indices in missed)
    assert len(set.union(*missed)) > 0.8 * sum(map(len, missed))  # others each time: 12 of 642 seldom come again


def test_persons_meet_other_persons_in_other_epochs():
    sampler = PersonBatches([i // 2 for i in range(40)], 5, 2, seed=0)
    batches = flat([epoch_of(sampler, epoch) for epoch in range(1, 61)])
    met = {frozenset((a // 2, b // 2)) for batch in batches for a in batch for b in batch if a // 2 != b // 2}
    assert len(met) == 190  # all pairs of the 20


def test_a_persons_photos_are_grouped_differently_in_each_epoch():
    sampler = PersonBatches([label for label in range(3) for _ in range(6)], 3, 2, seed=0)
    batches = flat([epoch_of(sampler, epoch) for epoch in range(1, 61)])
    pairs = {frozenset(batch[i : i + 2]) for batch in batches for i in range(0, len(batch), 2)}
    assert len(pairs) == 3 * 15  # all pairs among 6 photos


# --- the datasets that the batches are for ----------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path) -> Path:
    """4 persons of 1, 2, 3 and 5 clean photos, with two distorted copies of each."""
    for name, photos in (("ann", 1), ("bob", 2), ("cy", 3), ("di", 5)):
        write_person(tmp_path / "train" / name, (90, 90, 90), photos)
    return tmp_path / "train"


def tiny(image: Image.Image) -> torch.Tensor:
    """An image (1, 2, 3): 4 of its pixels, and what a random augmentation would draw."""
    return torch.cat([torch.tensor(np.array(image.resize((2, 2)).convert("L")))[None], torch.rand(1, 2, 1)], dim=2)


def pairs_of(root: Path) -> FacePairDataset:
    return FacePairDataset(root, tiny, seed=3)


def test_a_repeated_anchor_gets_another_positive_and_another_augmentation(tree):
    dataset = pairs_of(tree)
    total, same = len(dataset), 0
    for index in range(total):
        [anchor, positive], [repeated, other] = dataset.files(index), dataset.files(index + 3 * total)
        assert repeated == anchor and other.parent == positive.parent
        same += other == positive
        assert not torch.equal(dataset[index][0], dataset[index + 3 * total][0])
    assert same <= 7  # of 11; about 3.3 by chance


def test_a_batch_with_repeats_loads_as_tensors_labels_and_anchor_indices(tree):
    dataset = pairs_of(tree)
    batches = PersonBatches([label for _, label in dataset.anchors], persons=4, pairs=3, seed=0)
    indices = epoch_of(batches)[0]
    [(anchors, positives, labels, places), *_] = DataLoader(dataset, batch_sampler=batches)
    assert anchors.shape == positives.shape == (12, 1, 2, 3)
    assert places.tolist() == [index % len(dataset) for index in indices] != indices
    assert [dataset.anchors[place][1] for place in places] == labels.tolist()
    assert Counter(labels.tolist()) == {0: 3, 1: 3, 2: 3, 3: 3}
    assert len(anchors.unique(dim=0)) == 12  # ann's single photo three times, each cropped differently


@pytest.mark.parametrize(
    "build, count",
    [(lambda root: FaceClassificationDataset(root, tiny, seed=3), 1), (pairs_of, 2)],
    ids=["photos", "pairs"],
)
def test_files_are_those_that_an_item_loads_and_listing_them_draws_and_opens_nothing(tree, monkeypatch, build, count):
    dataset, loaded = build(tree), []
    load = transforms.load_image
    monkeypatch.setattr(datasets, "load_image", lambda path, least=None: (loaded.append(path), load(path))[1])
    listed = []
    for epoch in (1, 2):
        dataset.set_epoch(epoch)
        for index in range(len(dataset) * (1 if count == 1 else 3)):  # pairs go on beyond len
            loaded.clear()
            state = torch.get_rng_state()
            files = dataset.files(index)
            assert not loaded and torch.equal(torch.get_rng_state(), state)
            dataset[index]
            assert files == loaded and len(loaded) == count
            listed.append((epoch, files))
    of_epochs = [[files for e, files in listed if e == epoch] for epoch in (1, 2)]
    assert (of_epochs[0] == of_epochs[1]) == (count == 1)  # the draws of pairs are of the present epoch
