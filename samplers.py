"""Which photos make a batch, the same for the same seed and epoch in however many processes."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from common import UserError, derived_seed, rank_and_world


class EpochBatches(Sampler[list[int]]):
    """Batches of an epoch, the same for the same (seed, epoch) however many processes share them.

    Every process yields its own contiguous part of each batch. `len()` is the number of batches of a whole epoch.
    """

    def __init__(self, seed: int):
        self.seed, self.epoch, self.skip = seed, 1, 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Set the epoch to draw, and how many of its batches a resumed run has had already."""
        self.epoch, self.skip = epoch, skip

    def batches(self) -> list[list[int]]:
        """All batches of the epoch, undivided."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[list[int]]:
        rank, world = rank_and_world()
        for batch in self.batches()[self.skip :]:
            yield batch[len(batch) * rank // world : len(batch) * (rank + 1) // world]

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))


class ShuffledBatches(EpochBatches):
    """Items 0..len(labels)-1 in random order, in batches of `batch_size`, or a little less so that all are alike.

    balance 0: each item once per epoch. 1: each person (label) equally often, however many photos it has: an epoch is
    as long, but a photo of a person with n of them comes up in proportion to n^-balance, rounded at random up or down;
    copy k of photo i is index i + k * len(labels), which draws a crop of its own.
    Raises UserError if the batch is larger than the data, or too small for two items in each process.
    """

    def __init__(self, labels: Sequence[int], batch_size: int, seed: int, balance: float = 0.0):
        super().__init__(seed)
        self.labels, self.balance = torch.tensor(labels), balance
        world = rank_and_world()[1]
        if len(labels) < batch_size:
            raise UserError(f"BATCH_SIZE = {batch_size}: more than the {len(labels)} items of an epoch; lower it")
        if batch_size < 2 * world:
            raise UserError(f"BATCH_SIZE = {batch_size}: too few for two photos in each of {world} processes")
        # BatchNorm cannot work with one image, so none may be left for a last batch of its own.
        self._count = min(math.ceil(len(labels) / batch_size), len(labels) // (2 * world))

    def __len__(self) -> int:
        return self._count

    def batches(self) -> list[list[int]]:
        generator = self._generator()
        order = torch.randperm(len(self.labels), generator=generator)
        if self.balance:
            weights = self.labels.bincount().double()[self.labels[order]] ** -self.balance
            ends = weights.cumsum(0) * (len(order) / weights.sum())  # photo i fills an interval of its share
            ticks = torch.arange(len(order)) + torch.rand((), generator=generator, dtype=torch.double)
            place = torch.searchsorted(ends, ticks).clamp_max(len(order) - 1)
            copy = torch.arange(len(place)) - torch.searchsorted(place, place)  # a photo's copies lie side by side
            order = (order[place] + len(order) * copy)[torch.randperm(len(order), generator=generator)]
        return [batch.tolist() for batch in order.tensor_split(self._count)]


class PersonBatches(EpochBatches):
    """P x K (Hermans et al. 2017, arXiv:1703.07737, sec. 2): `persons` different persons (P) in each batch, each with
    `pairs` pairs of a clean and a distorted photo (K = 2 pairs photos), for FacePairDataset.

    labels: the person of each anchor; a photo without a name is a person of its own. An epoch shows each anchor once; a
    person whose anchors run out fills its last group with some of them again, as indices beyond len(labels), which
    stand for other positives. A person of very many photos cannot fill more than one place of a batch, and persons left
    over at the end make no batch: those anchors miss the epoch, others each time.
    Raises UserError if there are fewer persons, or fewer pairs in a batch than processes.
    """

    def __init__(self, labels: Sequence[int], persons: int, pairs: int, seed: int):
        super().__init__(seed)
        self.persons, self.pairs, self.total = persons, pairs, len(labels)
        self._anchors: dict[int, list[int]] = {}
        for index, label in enumerate(labels):
            self._anchors.setdefault(label, []).append(index)
        if len(self._anchors) < persons:
            raise UserError(f"PERSONS_PER_BATCH = {persons}: only {len(self._anchors)} persons have pairs; lower it")
        if persons * pairs < rank_and_world()[1]:
            raise UserError(f"PERSONS_PER_BATCH = {persons}: too few for {rank_and_world()[1]} processes")
        groups = [math.ceil(len(anchors) / pairs) for anchors in self._anchors.values()]
        # The most batches that can be filled: a person gives at most one group to each.
        self._count = sum(groups) // persons
        while sum(min(group, self._count) for group in groups) < self._count * persons:
            self._count -= 1

    def __len__(self) -> int:
        return self._count

    def batches(self) -> list[list[int]]:
        generator = self._generator()

        def shuffled(items: list) -> list:
            return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

        groups = []  # a person's lie side by side, at most one per batch
        for anchors in shuffled(list(self._anchors.values())):
            order = shuffled(anchors)
            missing = -len(order) % self.pairs
            order += [order[i % len(anchors)] + self.total * (1 + i // len(anchors)) for i in range(missing)]
            of_person = [order[i : i + self.pairs] for i in range(0, len(order), self.pairs)]
            groups += shuffled(of_person)[: self._count]
        surplus = set(torch.randperm(len(groups), generator=generator)[self._count * self.persons :].tolist())
        groups = [group for i, group in enumerate(groups) if i not in surplus]
        # Dealt like cards: neighbours go to different batches, so a batch meets no person twice.
        batches = [groups[i :: self._count] for i in range(self._count)]
        return [[index for group in shuffled(batch) for index in group] for batch in shuffled(batches)]
