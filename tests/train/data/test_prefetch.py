"""Batches that threads read ahead: the same as a plain data loader's, in the same order, in memory that is kept."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import skip_first_batches
from torch.utils.data import DataLoader

from cache.make import make_cache
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.cache.shard_files import read_header
from llava_twophase.errors import UserError
from llava_twophase.train.data.collator import collate
from llava_twophase.train.data.prefetch import PrefetchDataset

ORDER = np.random.default_rng(0).permutation(20).tolist()


def text(index):
    """A sample as long as its number, so that sorting collators have something to sort."""
    return {"input_ids": torch.full((index + 2,), index), "labels": torch.full((index + 2,), -100)}


def sorting_collate(samples):
    """A collator that puts the longest sample first, and adds what is no tensor."""
    batch = collate(sorted(samples, key=lambda sample: -len(sample["input_ids"])))
    return {**batch, "lengths": [len(sample["input_ids"]) for sample in samples]}


def feed(path, collator=collate, batch=3, batches_in_use=1):
    """Dataset and prepared loader over the samples in ORDER; sample i has the features of row i."""
    cache = FeatureCache(path)
    dataset = PrefetchDataset(text, collator, cache, list(cache.keys()), batch, batches_in_use)
    loader = DataLoader(dataset, batch, sampler=ORDER, collate_fn=lambda pending: pending)
    return dataset, Accelerator(cpu=True).prepare(loader)


@pytest.fixture
def cached(tmp_path):
    """A cache of 20 images in two shards: its directory and stored bfloat16 rows."""
    path, _, stored = make_cache(tmp_path / "cache", counts=(12, 8))
    return path, torch.from_numpy(stored).view(torch.bfloat16)


@pytest.mark.parametrize("collator", [collate, sorting_collate])
def test_every_batch_has_its_own_text_and_features(cached, collator):
    path, values = cached
    _, loader = feed(path, collator)
    for _ in range(2):
        seen = []
        for batch in loader:
            numbers = batch["input_ids"][:, 0].tolist()
            assert torch.equal(batch["features"], values[numbers])
            seen.append(sorted(numbers))
        assert seen == [sorted(ORDER[start : start + 3]) for start in range(0, 20, 3)]
        assert len(loader) == 7


def test_text_is_what_the_collator_makes(cached):
    _, loader = feed(cached[0])
    expected = collate([text(index) for index in ORDER[:3]])
    batch = next(iter(loader))
    assert torch.equal(batch["input_ids"], expected["input_ids"]) and torch.equal(batch["labels"], expected["labels"])
    assert "position_in_batch" not in batch


@pytest.mark.parametrize("batches_in_use", [1, 2, 4])
def test_batches_that_are_batches_in_use_keep_their_features(cached, batches_in_use):
    path, values = cached
    _, loader = feed(path, batches_in_use=batches_in_use)
    window = []
    for batch in loader:
        window = [*window, batch][-batches_in_use:]
        for kept in window:
            assert torch.equal(kept["features"], values[kept["input_ids"][:, 0]])


def test_memory_is_kept(cached):
    _, loader = feed(cached[0], batches_in_use=2)
    places = [batch["features"].data_ptr() for _ in range(3) for batch in loader]
    assert len(set(places)) == 4


def test_a_resumed_epoch_reads_nothing_of_what_it_skips(cached, monkeypatch):
    path, values = cached
    dataset, loader = feed(path)
    read = []
    monkeypatch.setattr(
        dataset._cache, "read_raw_rows_into", lambda rows, buffer: (read.extend(rows.tolist()), buffer.fill(0))
    )
    assert len(list(skip_first_batches(loader, 5))) == 2
    assert sorted(read) == sorted(ORDER[15:])


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_lossy_rows_are_decoded_after_the_move(storage, tmp_path):
    path, keys, _ = make_cache(tmp_path / "cache", counts=(12, 8), dtype=storage)
    _, loader = feed(path)
    expected = FeatureCache(path).read_tensor(keys)
    for batch in loader:
        assert torch.equal(batch["features"], expected[batch["input_ids"][:, 0]])


def test_an_image_without_features_is_named_before_training(cached):
    with pytest.raises(UserError, match=r"image key 'absent\.jpg' is not in the feature cache"):
        PrefetchDataset(text, collate, FeatureCache(cached[0]), ["absent.jpg"], 1)


def test_a_row_that_cannot_be_read_ends_the_run(cached):
    path, _ = cached
    _, loader = feed(path)
    shard = path / "shards" / "shard-000001.h5"
    with shard.open("r+b") as file:
        file.truncate(read_header(shard).datasets["features"].offset + 500)
    with pytest.raises(UserError, match=r"shard-000001\.h5 is truncated"):
        list(loader)


def test_a_worker_is_refused(cached):
    import pickle

    dataset, _ = feed(cached[0])
    with pytest.raises(TypeError, match="use it without data loader workers"):
        pickle.dumps(dataset)
