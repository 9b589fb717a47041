"""Features that are not finite, in the queue that writes shards."""

import numpy as np
import pytest

from llava_twophase.cache.quarantine import Quarantined, read_parts
from llava_twophase.cache.shard_writer import ShardSpec
from llava_twophase.errors import UserError
from llava_twophase.extract.plan import ShardWork
from llava_twophase.extract.sealing import ShardQueue
from llava_twophase.extract.timings import Timings


class Rows:
    """Takes the place of rows that a device made: float32 [B, 2, 4]."""

    def __init__(self, values):
        self.values = values
        self.encode_seconds = self.copy_seconds = 0.0

    def numpy(self):
        return self.values


@pytest.fixture
def overflow(tmp_path):
    """Put two batches of three rows into a queue; the second and the fourth row are not finite."""
    (tmp_path / "shards").mkdir()
    spec = ShardSpec((2, 4), "float32", {"a": 1}, {"b": 2})
    values = np.ones((6, 2, 4), np.float32)
    values[1, 1, 3], values[3, 0, 0] = np.inf, np.nan
    shard = ShardWork(0, [f"{row}.jpg" for row in range(6)])
    sources = [(row, bytes([row] * 32)) for row in range(6)]

    def put(skip):
        with ShardQueue(tmp_path, spec, skip, Timings()) as queue:
            for part in (slice(0, 3), slice(3, 6)):
                queue.append(shard, shard.keys[part], sources[part], Rows(values[part]))
            queue.finish(shard)
            return queue.sealed(wait=True)

    return put


def test_queue_skips_features_that_are_not_finite(overflow, tmp_path):
    (done,) = overflow(skip=True)
    assert done.entry.rows == 4
    reason = "the tower's features are not finite"
    assert done.bad == [Quarantined(f"{row}.jpg", reason, row, bytes([row] * 32).hex()) for row in (1, 3)]
    assert list(read_parts(tmp_path)["shard-000000.h5"].values()) == done.bad


def test_queue_refuses_features_that_are_not_finite_under_fail(overflow, tmp_path):
    with pytest.raises(UserError, match="1.jpg.*try --compute_dtype bf16"):
        overflow(skip=False)
    assert list((tmp_path / "shards").iterdir()) == []
