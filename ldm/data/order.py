"""Which images a rank reads in an epoch, in which order, and what is random about each."""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

WINDOW = 4  # runs that are shuffled together, where images are read in runs
PART = 1 << 16  # keys that are made at once


class Key(NamedTuple):
    """One image of an epoch."""

    position: int  # in the split; past its end: no image
    mirrored: bool = False
    draw: int = 0  # of this image at this place: chooses crops, augmentations, captions, noise; 0: the centre, none, the first
    place: int = 0  # in the whole training


class Groups(NamedTuple):
    """How the images of a split belong together.

    runs: (n,) the run of each, where images are read in runs, and files: the file of each run; buckets: (n,), where
    images have several sizes, which never share a batch.
    """

    runs: np.ndarray | None = None
    files: np.ndarray | None = None
    buckets: np.ndarray | None = None


ALONE = Groups()


class Order(DistributedSampler):
    """A training epoch's keys for one rank: a permutation, mirror choices and draws, from (seed, epoch) alone.

    How many ranks there are, and how a step's images fall into batches, changes none of them.  A run that resumes inside an epoch
    starts at `start()` images, so it goes on with exactly those it had not seen.  An epoch is whole optimizer steps, of `accumulate`
    batches each; a set smaller than one is passed through several times.  Every batch is of one bucket; a bucket's last batch is
    filled up with its first images.
    """

    def __init__(
        self, count: int, world: int, rank: int, batch_size: int, mirror: bool, seed: int, start: Callable[[], int],
        groups: Groups = ALONE, accumulate: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(range(count), world, rank, seed=seed)  # type: ignore[arg-type]
        self.count, self.batch_size, self.mirror, self.start, self.groups = count, batch_size, mirror, start, groups
        share = world * batch_size
        batches = count // share if groups.buckets is None else sum(-(-int(size) // share) for size in np.bincount(groups.buckets))
        steps = batches // accumulate if groups.buckets is None else -(-batches // accumulate)
        self.num_samples = max(1, steps) * accumulate * batch_size

    def __iter__(self) -> Iterator[Key]:  # type: ignore[override]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        needed = self.num_samples * self.num_replicas
        if self.groups.buckets is None:
            order = torch.cat([self._shuffled(generator) for _ in range(-(-needed // self.count))])[:needed]
        else:
            order = self._by_bucket(self._shuffled(generator), self.groups.buckets, generator)
            order = order.repeat(-(-needed // len(order)))[:needed]
        mirrored = (torch.rand(needed, generator=generator) < 0.5) & self.mirror
        draws = torch.randint(1, 2**62, (needed,), generator=generator)
        places = self.epoch * needed + torch.arange(needed)
        mine = slice(self.rank + self.start(), None, self.num_replicas)
        for part in zip(*(column[mine].split(PART) for column in (order, mirrored, draws, places)), strict=True):
            yield from map(Key, *(column.tolist() for column in part))

    def _shuffled(self, generator: torch.Generator) -> Tensor:
        """All positions; where they are read in runs, files in a random order, shuffled within WINDOW runs."""
        order = torch.randperm(self.count, generator=generator)
        if self.groups.runs is None or self.groups.files is None:
            return order
        runs, files = torch.from_numpy(self.groups.runs).long(), torch.from_numpy(self.groups.files).long()
        place = torch.randperm(int(files.max()) + 1, generator=generator)[files]  # of each run's file
        sequence = torch.argsort(place, stable=True)
        window = torch.empty_like(sequence)
        window[sequence] = torch.arange(len(sequence)) // WINDOW
        return order[torch.argsort(window[runs[order]], stable=True)]

    def _by_bucket(self, order: Tensor, buckets: np.ndarray, generator: torch.Generator) -> Tensor:
        """Batches of one bucket each, in a random order."""
        share, of, batches = self.batch_size * self.num_replicas, torch.from_numpy(buckets).long()[order], list[Tensor]()
        for bucket in of.unique().tolist():
            members = order[of == bucket]
            batches += members.repeat(1 - (-share // len(members)))[: -(-len(members) // share) * share].split(share)
        return torch.cat([batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()])


class HeldOutOrder(DistributedSampler):
    """Every position once, on one rank, in batches of one bucket; the same number of batches on each rank.

    Positions past the end, which fill up batches, are no images.
    """

    def __init__(self, count: int, world: int, rank: int, batch_size: int, buckets: np.ndarray | None = None) -> None:
        super().__init__(range(count), world, rank, shuffle=False)  # type: ignore[arg-type]
        self.count, self.share, self.buckets = count, world * batch_size, buckets

    @cached_property
    def positions(self) -> np.ndarray:
        """Those of this rank, int64."""
        if self.buckets is None:
            return np.arange(self.rank, -(-self.count // self.num_replicas) * self.num_replicas, self.num_replicas)
        found = list[np.ndarray]()
        for bucket in np.unique(self.buckets):
            members = np.flatnonzero(self.buckets == bucket)
            found += [members, np.full(-len(members) % self.share, self.count)]
        return np.concatenate(found)[self.rank :: self.num_replicas]

    def __iter__(self) -> Iterator[int]:
        for part in np.array_split(self.positions, 1 + len(self) // PART):
            yield from part.tolist()

    def __len__(self) -> int:
        return len(self.positions)
