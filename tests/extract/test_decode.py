"""Quarantined images that are tried again, and CPU time of worker processes."""

import pytest
from torch.utils.data import DataLoader

from llava_twophase.extract.decode import DecodeDataset, quarantined, still_bad
from llava_twophase.vision.preprocess import Preprocessor
from llava_twophase.vision.sources import open_images


def test_still_bad_tries_images_again_that_needed_too_much_memory(image_set):
    key = image_set.keys[0]
    images, data = open_images(image_set.folder), (image_set.folder / key).read_bytes()
    entries = {
        "damaged": quarantined(key, "cannot be decoded: image file is truncated", data),
        "memory": quarantined(key, "cannot be decoded: out of memory", data),
        "edited": quarantined(key, "cannot be decoded: image file is truncated", data + b"x"),
    }
    assert {name for name, entry in entries.items() if still_bad(images, [entry])} == {"damaged"}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_decoded_batches_of_workers_have_their_cpu_time(image_set, tiny_clip):
    dataset = DecodeDataset(open_images(image_set.folder), Preprocessor(str(tiny_clip)), [image_set.keys])
    (batch,) = DataLoader(dataset, batch_size=None, num_workers=1)
    assert batch.keys == image_set.keys and 0 < batch.cpu.received <= batch.cpu.wall + 0.1
    assert dataset[0].cpu.wall == 0  # measured by the process itself
