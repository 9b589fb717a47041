"""Batches that threads read ahead: equal to a plain data loader's, in the same order, in reused memory."""

import threading
from concurrent.futures import wait

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import skip_first_batches
from torch.utils.data import DataLoader

from cache.make import flip_bit, make_cache
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.cache.shard_files import read_header
from llava_twophase.errors import UserError
from llava_twophase.train.data import prefetch
from llava_twophase.train.data.collator import collate
from llava_twophase.train.data.prefetch import PrefetchDataset

ORDER = np.random.default_rng(0).permutation(20).tolist()


def tokenize(index):
    """A sample as long as its number, so that sorting collators have something to sort."""
    return {"input_ids": torch.full((index + 2,), index), "labels": torch.full((index + 2,), -100)}


def sorting_collate(samples):
    """A collator that puts the longest sample first, and adds a list, which is not a tensor."""
    batch = collate(sorted(samples, key=lambda sample: -len(sample["input_ids"])))
    return {**batch, "lengths": [len(sample["input_ids"]) for sample in samples]}


def feed(path, collator=collate, batch=3, batches_in_use=1):
    """Dataset and prepared loader over the samples in ORDER; sample i has the features of row i."""
    cache = FeatureCache(path)
    dataset = PrefetchDataset(tokenize, collator, cache, list(cache.keys()), batch, batches_in_use)
    dataset.announce(ORDER, 0, 1)
    loader = DataLoader(dataset, batch, sampler=ORDER, collate_fn=lambda pending: pending)
    return dataset, Accelerator(cpu=True).prepare(loader)


@pytest.fixture
def cached(tmp_path):
    """A cache of 20 images in two shards: its directory and stored bfloat16 rows."""
    path, _, stored = make_cache(tmp_path / "cache", counts=(12, 8))
    return path, torch.from_numpy(stored).view(torch.bfloat16)


@pytest.fixture(params=["folder", "url"])
def place(cached, request):
    """The cache as a folder or URL, from which batches are read further ahead; and its stored rows."""
    return cached if request.param == "folder" else (f"file://{cached[0]}", cached[1])


@pytest.mark.parametrize("collator", [collate, sorting_collate])
def test_prefetch_dataset_gives_each_batch_its_text_and_features(place, collator):
    path, values = place
    _, loader = feed(path, collator)
    for _ in range(2):
        seen = []
        for batch in loader:
            numbers = batch["input_ids"][:, 0].tolist()
            assert torch.equal(batch["features"], values[numbers])
            seen.append(sorted(numbers))
        assert seen == [sorted(ORDER[start : start + 3]) for start in range(0, 20, 3)]
        assert len(loader) == 7


def test_prefetch_dataset_keeps_what_the_collator_makes(cached):
    _, loader = feed(cached[0])
    expected = collate([tokenize(index) for index in ORDER[:3]])
    batch = next(iter(loader))
    assert torch.equal(batch["input_ids"], expected["input_ids"]) and torch.equal(batch["labels"], expected["labels"])
    assert "position_in_batch" not in batch


@pytest.mark.parametrize("batches_in_use", [1, 2, 4])
def test_prefetch_dataset_does_not_overwrite_batches_in_use(place, batches_in_use):
    path, values = place
    _, loader = feed(path, batches_in_use=batches_in_use)
    window = []
    for batch in loader:
        window = [*window, batch][-batches_in_use:]
        for kept in window:
            assert torch.equal(kept["features"], values[kept["input_ids"][:, 0]])


def test_prefetch_dataset_reuses_its_buffers(cached):
    _, loader = feed(cached[0], batches_in_use=2)
    places = [batch["features"].data_ptr() for _ in range(3) for batch in loader]
    assert len(set(places)) == 4


def test_prefetch_dataset_reads_no_skipped_batch_of_a_resumed_epoch(place, monkeypatch):
    path, values = place
    dataset, loader = feed(path)
    read = []
    monkeypatch.setattr(
        dataset._cache, "read_raw_rows_into", lambda rows, buffer: (read.extend(rows.tolist()), buffer.fill(0))
    )
    assert len(list(skip_first_batches(loader, 5))) == 2
    assert sorted(read) == sorted(ORDER[15:])


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_pending_batch_decodes_lossy_rows_after_the_move(storage, tmp_path):
    path, keys, _ = make_cache(tmp_path / "cache", counts=(12, 8), dtype=storage)
    _, loader = feed(path)
    expected = FeatureCache(path).read_tensor(keys)
    for batch in loader:
        assert torch.equal(batch["features"], expected[batch["input_ids"][:, 0]])


def test_prefetch_dataset_refuses_a_key_without_features(cached):
    with pytest.raises(UserError, match=r"image key 'absent\.jpg' is not in the feature cache"):
        PrefetchDataset(tokenize, collate, FeatureCache(cached[0]), ["absent.jpg"], 1)


def test_pending_batch_raises_for_a_row_that_cannot_be_read(cached):
    path, _ = cached
    _, loader = feed(path)
    shard = path / "shards" / "shard-000001.h5"
    with shard.open("r+b") as file:
        file.truncate(read_header(shard).datasets["features"].offset + 500)
    with pytest.raises(UserError, match=r"shard-000001\.h5 is truncated"):
        list(loader)


def test_pending_batch_raises_for_a_row_with_a_flipped_bit(cached):
    path, _ = cached
    flip_bit(path, 1, 3)
    _, loader = feed(path)
    with pytest.raises(
        UserError, match=r"'00001/picture 3\.jpg' do not match their checksum: bytes of shard-000001\.h5"
    ):
        list(loader)


@pytest.mark.parametrize(("ahead", "read"), [(1, 2), (3, 4), (32, 7)])
def test_prefetch_dataset_reads_batches_of_a_url_ahead(cached, monkeypatch, ahead, read):
    path, values = cached
    monkeypatch.setattr(prefetch, "_AHEAD_BYTES", ahead * 3 * values[0].nbytes)
    dataset, _ = feed(f"file://{path}")
    asked = []
    monkeypatch.setattr(dataset._cache, "read_raw_rows_into", lambda rows, buffer: asked.append(rows.tolist()))
    dataset.__getitems__(ORDER[:3])
    begun = [slot.begun for slot in dataset._slots if slot is not None]
    wait([task for future in begun for task in future.result()[1]])
    assert sorted(sum(asked, [])) == sorted(ORDER[: 3 * read])
    assert len(dataset._ring) == 3 + min(ahead, 32)


def test_prefetch_dataset_reads_nothing_more_when_it_is_closed(cached, monkeypatch):
    monkeypatch.setattr(prefetch, "REQUESTS", 1)
    dataset, _ = feed(f"file://{cached[0]}", batch=1)  # two batches are requested at the same time
    proceed, asked = threading.Event(), []

    def read(rows, buffer):
        asked.append(rows)
        proceed.wait(10)

    monkeypatch.setattr(dataset._cache, "read_raw_rows_into", read)
    dataset.__getitems__(ORDER[:1])
    wait([slot.begun for slot in dataset._slots if slot is not None])
    dataset.close()
    proceed.set()
    dataset._readers.shutdown(wait=True)
    assert len(asked) == 2


def test_prefetch_dataset_reads_one_batch_of_a_folder(cached):
    dataset, _ = feed(cached[0])
    dataset.__getitems__(ORDER[:3])
    assert len([slot for slot in dataset._slots if slot is not None]) == 1
    assert len(dataset._ring) == 3


def test_prefetch_dataset_gives_the_right_rows_in_another_order_than_announced(cached):
    path, values = cached
    dataset, loader = feed(f"file://{path}")
    batches = iter(loader)
    next(batches)
    del batches  # the epoch ends early
    for order in (ORDER[::-1], ORDER[6:] + ORDER[:6], ORDER):
        for start in range(0, 18, 3):
            numbers = order[start : start + 3]
            batch = dataset.__getitems__(numbers).to("cpu")
            assert torch.equal(batch["features"], values[numbers])


def test_prefetch_dataset_raises_for_a_batch_that_was_read_ahead(cached):
    path, values = cached
    flip_bit(path, 0, ORDER[3])
    _, loader = feed(f"file://{path}")
    with pytest.raises(UserError, match="do not match their checksum"):
        list(loader)


def test_prefetch_dataset_refuses_a_worker_process(cached):
    import pickle

    dataset, _ = feed(cached[0])
    with pytest.raises(TypeError, match="use it without data loader workers"):
        pickle.dumps(dataset)
