"""Which batches a rank will ask for, from the order of an epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Upcoming:
    """Predict a rank's next batches. A batch that was not predicted is read when it is asked for.

    Args:
        order: The samples that all ranks use, in their order.
        batch_size: Samples of a batch of one rank.
        ranks: Ranks; they take batches in turn, as accelerate distributes them.
    """

    def __init__(self, order: Sequence[int] | np.ndarray, batch_size: int, ranks: int = 1) -> None:
        self._order = np.asarray(order, np.int32)
        self._batch_size, self._step = batch_size, batch_size * ranks
        self._begin = 0

    def after(self, indices: Sequence[int], count: int) -> list[list[int]]:
        """Return up to so many batches of this rank after a batch; none if the batch is not in the order.

        Args:
            indices: The samples of the batch.
            count: Most batches.
        """
        begin = self._find(indices) if count else None
        if begin is None:
            return []
        self._begin = begin
        starts = range(begin + self._step, len(self._order), self._step)[:count]
        return [self._order[start : start + self._batch_size].tolist() for start in starts]

    def _find(self, indices: Sequence[int]) -> int | None:
        # Usually one step after the last batch; after a resumption, anywhere later. At the end of an epoch, accelerate
        # takes samples from its start, so that all ranks have a batch: no batches of this epoch come after those.
        for begin in (self._begin + self._step, self._begin):
            if self._order[begin : begin + len(indices)].tolist() == list(indices):
                return begin
        found = np.flatnonzero(self._order[self._begin :] == indices[0])
        return self._begin + int(found[0]) if len(found) else None
