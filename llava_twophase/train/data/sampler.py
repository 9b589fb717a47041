"""The order of samples, equal to LLaVA's for the same seed.

It depends on seed and epoch only, so a resumed run repeats it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice

import numpy as np
import torch
from torch.utils.data import Sampler

_PART = 1 << 14  # indices that are Python objects at the same time


class EpochSampler(Sampler[int]):
    """Sample each epoch in the order of LLaVA's stage 1 (transformers 4.37, accelerate 0.21; measured).

    One process: the run's generator draws the data loader's seed and then the sampler's, which seeds the permutation.
    Several processes: a new generator with torch's default seed, so ``--seed`` has no effect on the order.
    Grouped: each mega-batch of a random permutation is sorted by length and distributed evenly over the ranks.

    Args:
        size: Number of samples.
        seed: The run's seed.
        world_size: Number of processes.
        lengths: For grouped order, the number of words of each sample, ``[size]``; else None.
        batch_size: For grouped order, samples in the batch of one process.
        groups: For grouped order, batches in a mega-batch: processes times accumulation steps.
        samples: Samples of an epoch: fewer drop the last ones, more begin again with the first; None for `size`.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        world_size: int = 1,
        lengths: np.ndarray | None = None,
        batch_size: int = 1,
        groups: int = 1,
        samples: int | None = None,
    ) -> None:
        self._size = size
        self._samples = size if samples is None else samples
        self._seed = seed
        self._world_size = world_size
        self._lengths = lengths
        self._batch_size = batch_size
        self._groups = groups
        self._epoch = 0

    def __len__(self) -> int:
        """Return the number of samples of an epoch."""
        return self._samples

    def __iter__(self) -> Iterator[int]:
        """Iterate over the sample indices of the current epoch."""
        epoch, rounds = self._epoch, -(-self._samples // max(self._size, 1))
        parts = chain.from_iterable(self._parts(epoch) for _ in range(rounds))
        return islice(chain.from_iterable(parts), self._samples)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, 0 for the first."""
        self._epoch = epoch

    def order(self, epoch: int) -> np.ndarray:
        """Return all sample indices in the order of one epoch, int64, independently of earlier calls."""
        if self._lengths is None:
            return self._permutation(epoch)
        return np.fromiter(chain.from_iterable(self._parts(epoch)), np.int64, self._size)

    def _parts(self, epoch: int) -> Iterator[list[int]]:
        # A part at a time: twelve million Python integers take half a gigabyte, and grouping them half a minute.
        permutation = self._permutation(epoch)
        size = _PART if self._lengths is None else self._batch_size * self._groups
        for start in range(0, self._size, size):
            part = permutation[start : start + size]
            yield part.tolist() if self._lengths is None else self._grouped(part, self._lengths[part])

    def _permutation(self, epoch: int) -> np.ndarray:
        generator = torch.Generator()
        if self._lengths is not None:
            generator.manual_seed(self._seed)
            for _ in range(epoch + 1):
                _draw_seed(generator)
                permutation = torch.randperm(self._size, generator=generator)
            return permutation.numpy()
        if self._world_size > 1:
            for _ in range(epoch):
                # LLaVA parity: torch's RandomSampler draws a second, unused permutation at the end of an epoch.
                torch.randperm(self._size, generator=generator)
                torch.randperm(self._size, generator=generator)
            return torch.randperm(self._size, generator=generator).numpy()
        generator.manual_seed(self._seed)
        for _ in range(epoch + 1):
            _draw_seed(generator)
            seed = _draw_seed(generator)
        return torch.randperm(self._size, generator=torch.Generator().manual_seed(seed)).numpy()

    def _grouped(self, part: np.ndarray, lengths: np.ndarray) -> list[int]:
        indices = part.tolist()
        known: dict[int, int] = dict(zip(indices, lengths.tolist(), strict=True))
        megabatch = sorted(indices, key=known.__getitem__, reverse=True)
        return [index for chunk in _distribute(megabatch, known, self._groups) for index in chunk]


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())


def _distribute(indices: Sequence[int], lengths: Mapping[int, int], chunks: int) -> list[list[int]]:
    # Longest first, each to the chunk with the smallest sum that is not full. An incomplete mega-batch is
    # distributed in turn.
    if len(indices) % chunks:
        return [list(indices[first::chunks]) for first in range(chunks)]
    distributed: list[list[int]] = [[] for _ in range(chunks)]
    sums = [0.0] * chunks
    for index in indices:
        shortest = sums.index(min(sums))
        distributed[shortest].append(index)
        sums[shortest] += lengths[index]
        if len(distributed[shortest]) == len(indices) // chunks:
            sums[shortest] = float("inf")
    return distributed
