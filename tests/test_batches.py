"""Which items make the batches of an epoch, for one process and for several; and which files the items are made of."""

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
from common import derived_seed
from datasets import FaceClassificationDataset, FacePairDataset
from samplers import PersonBatches, ShuffledBatches

SHUFFLED = {"labels": [label for label in range(10) for _ in range(10)], "batch_size": 7}  # 15 batches of 6 and 7
PERSONS = {"labels": [0] * 9 + [label for label in range(1, 30) for _ in range(3)], "persons": 4, "pairs": 2}


def shuffled(seed: int = 0, **options) -> ShuffledBatches:
    return ShuffledBatches(seed=seed, **(SHUFFLED | options))


def grouped(seed: int = 0, **options) -> PersonBatches:
    return PersonBatches(seed=seed, **(PERSONS | options))


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


# --- seeds ------------------------------------------------------------------------------------------------------------


def test_derived_seeds_depend_on_every_number_and_on_their_order():
    triples = [(a, b, c) for a in range(12) for b in range(12) for c in range(12)]
    seeds = {derived_seed(*triple) for triple in triples}
    assert len(seeds) == len(triples)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(1, 2, 3) == derived_seed(1, 2, 3)


# --- every sampler ----------------------------------------------------------------------------------------------------


@each_sampler
def test_the_same_seed_and_epoch_give_the_same_batches_and_other_ones_others(build):
    draws = [epoch_of(build(seed), epoch) for seed in (0, 1) for epoch in (1, 2)]
    assert [epoch_of(build(seed), epoch) for seed in (0, 1) for epoch in (1, 2)] == draws
    assert all(a != b for i, a in enumerate(draws) for b in draws[:i])
    sampler = build(0)
    assert epoch_of(sampler, 2) == draws[1] and epoch_of(sampler, 1) == draws[0]  # whatever was drawn before
    assert list(sampler) == draws[0]


@each_sampler
def test_the_first_epoch_is_1_and_misses_nothing(build):
    assert list(build()) == epoch_of(build(), epoch=1, skip=0)


@each_sampler
def test_a_resumed_epoch_gives_the_batches_that_are_left(build):
    sampler = build()
    whole = epoch_of(sampler, 3)
    for skip in (0, 1, 5, len(whole) - 1, len(whole)):
        assert epoch_of(sampler, 3, skip) == whole[skip:]
        assert len(sampler) == len(whole)  # of a whole epoch: what the learning rate's schedule counts by
    assert epoch_of(sampler, 3) == whole  # the skip is of one epoch


@each_sampler
def test_batches_neither_depend_on_torchs_generator_nor_change_it(build):
    torch.manual_seed(0)
    first = epoch_of(build())
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert epoch_of(build()) == first
    assert torch.equal(torch.get_rng_state(), state)


@each_sampler
def test_len_is_the_number_of_batches(build):
    for epoch in range(1, 6):
        assert len(epoch_of(build(), epoch)) == len(build()) > 1


@each_sampler
@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_have_exactly_the_batches_of_one(monkeypatch, build, world):
    whole = epoch_of(build(), 4, skip=1)
    parts = per_rank(monkeypatch, world, build, epoch=4, skip=1)
    assert [flat(batch) for batch in zip(*parts, strict=True)] == whole
    sizes = [[len(part) for part in batch] for batch in zip(*parts, strict=True)]
    assert all(min(size) >= 2 and max(size) - min(size) <= 1 for size in sizes)


@each_sampler
def test_items_are_plain_numbers(build):
    assert {type(index) for index in flat(epoch_of(build()))} == {int}  # tensors would be slow, and no keys of a dict


# --- shuffled batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_each_item_comes_once_in_even_batches_whatever_their_size(monkeypatch, world):
    monkeypatch.setattr(samplers, "rank_and_world", lambda: (0, world))
    for items in range(2 * world, 60):
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


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_no_process_is_left_with_a_single_photo(monkeypatch, world):
    for items, batch_size in ((4 * world + 1, 2 * world), (6 * world - 1, 2 * world + 1), (50, 49), (97, 12)):
        labels = [0] * items
        parts = per_rank(monkeypatch, world, lambda labels=labels, size=batch_size: ShuffledBatches(labels, size, 0))
        assert sorted(flat(flat(parts))) == list(range(items))
        assert min(len(batch) for part in parts for batch in part) >= 2


def test_an_epoch_is_well_shuffled():
    batches = [epoch_of(shuffled(), epoch) for epoch in range(1, 201)]
    first = Counter(index for epoch in batches for index in epoch[0])  # 7 of 100 items, 200 times: 14 +- 3.6 each
    assert len(first) == 100 and max(first.values()) < 32
    assert all(batch != sorted(batch) for batch in batches[0])


def test_a_batch_of_more_than_the_data_is_refused():
    with pytest.raises(ValueError, match=r"BATCH_SIZE = 11: more than the 10 items of an epoch; lower it"):
        ShuffledBatches([0] * 10, 11, seed=0)
    assert ShuffledBatches([0] * 10, 10, seed=0).batches()[0] != list(range(10))


@pytest.mark.parametrize("world, batch_size", [(1, 1), (2, 3), (4, 7)])
def test_a_batch_without_two_photos_for_each_process_is_refused(monkeypatch, world, batch_size):
    monkeypatch.setattr(samplers, "rank_and_world", lambda: (0, world))
    told = rf"BATCH_SIZE = {batch_size}: too few for two photos in each of {world} processes"
    with pytest.raises(ValueError, match=told):
        ShuffledBatches([0] * 20, batch_size, seed=0)
    ShuffledBatches([0] * 20, batch_size + 1, seed=0)


# --- balanced persons -------------------------------------------------------------------------------------------------

UNEVEN = [0] * 100 + [1] + [2] * 10  # photos per person; the middle one's index is 100


def counts(balance: float, epoch: int, labels: Sequence[int] = UNEVEN) -> np.ndarray:
    """How often each photo comes up; its copies are indices of their own, beyond the data."""
    batches = epoch_of(ShuffledBatches(labels, 8, seed=0, balance=balance), epoch)
    drawn = [index for batch in batches for index in batch]
    assert len(set(drawn)) == len(drawn)  # each copy draws its own crop
    seen = np.bincount([index % len(labels) for index in drawn], minlength=len(labels))
    assert max(drawn) < len(labels) * seen.max()  # numbered without gaps
    return seen


def expected_counts(balance: float, labels: Sequence[int] = UNEVEN) -> np.ndarray:
    """Of an epoch as long as the data, in proportion to n^-balance for a photo of a person with n of them."""
    weights = np.array([labels.count(label) ** -balance for label in labels])
    return len(labels) * weights / weights.sum()


@pytest.mark.parametrize("balance", [0.0, 0.25, 0.5, 1.0])
def test_each_photo_comes_up_in_its_share_rounded_up_or_down(balance):
    share = expected_counts(balance)
    for epoch in range(1, 41):
        seen = counts(balance, epoch)
        assert seen.sum() == len(UNEVEN)
        assert (seen >= np.floor(share - 1e-9)).all() and (seen <= np.ceil(share + 1e-9)).all()


def test_rounding_favours_no_photo():
    mean = np.mean([counts(1.0, epoch) for epoch in range(1, 401)], axis=0)
    assert np.abs(mean - expected_counts(1.0)).max() < 0.12  # standard deviation at most 0.5 / 400 ** 0.5 = 0.025


def of_persons(balance: float, epoch: int) -> np.ndarray:
    return np.bincount(UNEVEN, weights=counts(balance, epoch))


def test_full_balance_shows_persons_of_1_10_and_100_photos_equally_often():
    drawn = np.array([of_persons(1.0, epoch) for epoch in range(1, 101)])
    assert (drawn[:, 1] == 37).all()  # a third of the epoch's 111; one photo, so there is nothing to round
    assert np.abs(drawn - 37).max() <= 10  # each of the 10 photos of the third person is rounded up or down
    assert np.abs(drawn.mean(0) - 37).max() < 0.7


def test_balance_in_between_lies_in_between():
    none, half, full = (np.mean([of_persons(b, epoch) for epoch in range(1, 51)], axis=0) for b in (0.0, 0.5, 1.0))
    assert none.tolist() == [100, 1, 10]
    roots = np.sqrt([100, 1, 10])
    assert half == pytest.approx(111 * roots / roots.sum(), abs=0.5)  # a person's share goes with n^(1 - balance)
    assert none[0] > half[0] > full[0]
    assert none[1] < half[1] < full[1] and none[2] < half[2] < full[2]


def test_no_balance_shows_each_photo_once():
    assert all((counts(0.0, epoch) == 1).all() for epoch in range(1, 6))


def test_balance_changes_nothing_in_the_sizes_of_the_batches():
    for balance in (0.0, 0.5, 1.0):
        sampler = ShuffledBatches(UNEVEN, 8, seed=0, balance=balance)
        assert len(sampler) == 14
        assert sorted({len(batch) for batch in epoch_of(sampler)}) == [7, 8]


def test_the_copies_of_a_balanced_photo_are_spread_over_the_epoch():
    found = [
        sum(any(i % 111 == 100 for i in batch) for batch in epoch_of(shuffled(labels=UNEVEN, balance=1.0), e))
        for e in range(1, 11)
    ]
    assert min(found) >= 11  # 37 copies in 16 batches: by chance about 1.5 of them miss it; side by side it were in 6


def test_persons_without_a_photo_of_their_own_disturb_no_balance():
    labels = [3] * 30 + [7] * 2  # labels 0..2 and 4..6 are there as a classifier's, not as photos
    drawn = np.mean([counts(1.0, epoch, labels)[:30].sum() for epoch in range(1, 101)])
    assert drawn == pytest.approx(16, abs=0.5)


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


@pytest.mark.parametrize("seed", range(150))
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


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_even_data_shows_every_anchor_exactly_once(pairs):
    labels = [label for label in range(12) for _ in range(2 * pairs)]
    sampler = PersonBatches(labels, 4, pairs, seed=0)
    assert len(sampler) == 6
    for epoch in (1, 2, 3):
        batches = epoch_of(sampler, epoch)
        check_epoch(labels, 4, pairs, batches)
        assert sorted(flat(batches)) == list(range(len(labels)))


def test_a_person_of_too_few_photos_fills_its_place_with_repeats():
    labels = [0, 1, 1, 2, 2, 2, 2, 2]  # 1, 2 and 5 photos, in groups of 4: 1, 1 and 2 of them
    sampler = PersonBatches(labels, 3, 4, seed=0)
    [batch] = epoch_of(sampler)
    check_epoch(labels, 3, 4, [batch])
    groups = {labels[batch[i] % 8]: sorted(batch[i : i + 4]) for i in range(0, 12, 4)}
    assert groups[0] == [0, 8, 16, 24] and groups[1] == [1, 2, 9, 10]
    seen = {tuple(sorted(index for index in epoch_of(sampler, e)[0] if labels[index % 8] == 2)) for e in range(1, 31)}
    assert any(max(group) < 8 for group in seen) and any(max(group) >= 8 for group in seen)  # either of its two groups


def test_a_person_of_very_many_photos_is_never_twice_in_a_batch():
    labels = [0] * 236 + list(range(1, 643))  # as in LFW: one of 236 beside many of a single photo
    sampler = PersonBatches(labels, 16, 2, seed=0)
    assert len(sampler) == 42  # 42 groups of the one and 642 of the others: 12 more than 42 batches of 16 take
    for epoch in (1, 2, 3):
        batches = epoch_of(sampler, epoch)
        check_epoch(labels, 16, 2, batches)
        of_the_one = [sum(index % 878 < 236 for index in batch) for batch in batches]
        assert set(of_the_one) <= {0, 2} and of_the_one.count(2) >= 30


def test_anchors_that_miss_an_epoch_are_others_each_time():
    labels = [0] * 236 + list(range(1, 643))
    sampler = PersonBatches(labels, 16, 2, seed=0)
    missed = [set(range(len(labels))) - set(flat(epoch_of(sampler, epoch))) for epoch in range(1, 11)]
    singles = [{index for index in indices if index >= 236} for indices in missed]
    assert all(1 <= len(indices) <= 12 for indices in singles)  # at most the surplus
    assert len(set.union(*singles)) > 0.8 * sum(map(len, singles))  # 12 of 642 seldom come again
    assert len(set.intersection(*missed)) < 10  # 84 of 236 are shown: (1 - 84 / 236) ** 10 = 0.01 of them never


def test_left_over_persons_make_no_batch_and_change_with_the_epoch():
    labels = list(range(11))
    sampler = PersonBatches(labels, 4, 1, seed=0)
    missed = []
    for epoch in range(1, 41):
        batches = epoch_of(sampler, epoch)
        check_epoch(labels, 4, 1, batches)
        assert len(batches) == 2
        missed.append(set(labels) - set(flat(batches)))
    assert all(len(indices) == 3 for indices in missed)
    assert set.union(*missed) == set(labels)


def test_persons_meet_other_persons_in_other_epochs():
    labels = [label for label in range(20) for _ in range(2)]
    sampler = PersonBatches(labels, 5, 2, seed=0)
    met = {
        frozenset((labels[a], labels[b]))
        for epoch in range(1, 61)
        for batch in epoch_of(sampler, epoch)
        for a in batch
        for b in batch
        if labels[a] != labels[b]
    }
    assert len(met) == 190  # all pairs of the 20


def test_a_persons_photos_are_grouped_anew_each_epoch():
    labels = [label for label in range(3) for _ in range(6)]
    sampler = PersonBatches(labels, 3, 2, seed=0)
    pairs = {
        frozenset(batch[i : i + 2])
        for e in range(1, 61)
        for batch in epoch_of(sampler, e)
        for i in range(0, len(batch), 2)
    }
    assert len(pairs) == 3 * 15  # all pairs among 6 photos


def test_fewer_persons_than_a_batch_wants_are_refused_with_their_number():
    with pytest.raises(ValueError, match="PERSONS_PER_BATCH = 4: only 3 persons have pairs; lower it"):
        PersonBatches([0, 0, 1, 2], 4, 2, seed=0)
    assert len(PersonBatches([0, 0, 1, 2], 3, 2, seed=0)) == 1


def test_fewer_pairs_than_processes_are_refused(monkeypatch):
    monkeypatch.setattr(samplers, "rank_and_world", lambda: (0, 5))
    with pytest.raises(ValueError, match="PERSONS_PER_BATCH = 2: too few for 5 processes"):
        PersonBatches([0, 1, 2], 2, 2, seed=0)
    assert len(epoch_of(PersonBatches([0, 1, 2], 3, 2, seed=0))[0]) == 1  # rank 0 of 5: 1 of 6 pairs


@pytest.mark.parametrize("world", [2, 3, 8])
def test_each_process_has_its_own_part_of_every_persons_batch(monkeypatch, world):
    whole = epoch_of(grouped(), 2)  # of 8 pairs
    parts = per_rank(monkeypatch, world, grouped, epoch=2)
    assert [flat(batch) for batch in zip(*parts, strict=True)] == whole
    assert all(len(batch) in (8 // world, -(-8 // world)) for part in parts for batch in part)


# --- batches of pairs -------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path) -> Path:
    """4 persons of 1, 2, 3 and 5 clean photos, with two distorted copies of each."""
    for name, photos in (("ann", 1), ("bob", 2), ("cy", 3), ("di", 5)):
        write_person(tmp_path / "train" / name, (90, 90, 90), photos)
    return tmp_path / "train"


def tiny(image: Image.Image) -> torch.Tensor:
    """An image as 4 numbers, and what a random augmentation would draw."""
    return torch.cat([torch.tensor(np.array(image.resize((2, 2)).convert("L"))).flatten(), torch.rand(2)])


def batches_of(dataset: FacePairDataset, persons: int, pairs: int) -> PersonBatches:
    return PersonBatches([label for _, label in dataset.anchors], persons, pairs, seed=0)


def test_each_batch_shows_every_person_clean_and_distorted(tree):
    dataset = FacePairDataset(tree, tiny, negatives=False)
    batches = batches_of(dataset, persons=3, pairs=2)
    for epoch in range(1, 6):
        dataset.set_epoch(epoch)
        for batch in epoch_of(batches, epoch):
            folders: dict[str, list[str]] = {}
            for index in batch:
                for path in dataset.files(index):
                    folders.setdefault(path.parts[-3], []).append(path.parent.name)
            assert len(folders) == 3
            assert all(sorted(kinds) == ["clean", "clean", "distortion", "distortion"] for kinds in folders.values())


def test_a_repeated_anchor_gets_another_positive_and_another_augmentation(tree):
    dataset = FacePairDataset(tree, tiny, negatives=False)
    total, same = len(dataset), 0
    for index in range(total):
        [anchor, positive], [repeated, other] = dataset.files(index), dataset.files(index + 3 * total)
        assert repeated == anchor and other.parent == positive.parent
        same += other == positive
        assert not torch.equal(dataset[index][0], dataset[index + 3 * total][0])
    assert same <= 7  # of 11; about 3.3 by chance


def test_a_batch_loads_with_repeats_as_one_tensor_its_labels_and_the_places_of_its_anchors(tree):
    dataset = FacePairDataset(tree, tiny, negatives=False)
    batches = batches_of(dataset, persons=4, pairs=3)
    indices = epoch_of(batches)[0]
    [(anchors, positives, labels, places), *_] = DataLoader(dataset, batch_sampler=batches)
    assert anchors.shape == positives.shape == (12, 6)
    assert places.tolist() == [index % len(dataset) for index in indices] != indices
    assert [dataset.anchors[place][1] for place in places] == labels.tolist()
    assert Counter(labels.tolist()) == {0: 3, 1: 3, 2: 3, 3: 3}
    assert len(anchors.unique(dim=0)) == 12  # ann's single photo three times, each cropped anew


# --- files ------------------------------------------------------------------------------------------------------------

DATASETS = {
    "photos": lambda root: FaceClassificationDataset(root, tiny, seed=3),
    "pairs": lambda root: FacePairDataset(root, tiny, seed=3, negatives=False),
    "triplets": lambda root: FacePairDataset(root, tiny, seed=3),
}


@pytest.mark.parametrize(("build", "count"), [*zip(DATASETS.values(), (1, 2, 3), strict=True)], ids=DATASETS)
def test_files_are_those_that_an_item_loads(tree, monkeypatch, build, count):
    dataset, loaded = build(tree), []
    load = transforms.load_image
    monkeypatch.setattr(datasets, "load_image", lambda path: (loaded.append(path), load(path))[1])
    indices = range(len(dataset) * (1 if count == 1 else 3))  # pairs go on beyond len
    told = []
    for epoch in (1, 2):
        dataset.set_epoch(epoch)
        for index in indices:
            loaded.clear()
            dataset[index]
            assert dataset.files(index) == loaded and len(loaded) == count
            told.append((epoch, index, *loaded))
    of_epochs = [[files for e, *files in told if e == epoch] for epoch in (1, 2)]
    assert (of_epochs[0] == of_epochs[1]) == (count == 1)  # the draws of pairs are of the present epoch


@pytest.mark.parametrize("build", DATASETS.values(), ids=DATASETS)
def test_asking_for_files_draws_nothing_from_torchs_generator_and_opens_nothing(tree, monkeypatch, build):
    dataset = build(tree)
    monkeypatch.setattr(datasets, "load_image", lambda path: pytest.fail("an image was read"))
    state = torch.get_rng_state()
    files = [dataset.files(index) for index in range(len(dataset))]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert [dataset.files(index) for index in range(len(dataset))] == files
