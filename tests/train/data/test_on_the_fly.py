"""Features computed in the training step: bad images, the tower's identity, and pictures for pages."""

import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from llava_twophase.errors import UserError
from llava_twophase.records import load_records
from llava_twophase.train.data.collator import collate
from llava_twophase.train.data.conversation import PlainTemplate
from llava_twophase.train.data.dataset import CaptionDataset
from llava_twophase.train.data.on_the_fly import OnTheFlyFeatures, Thumbnails
from llava_twophase.train.data.tokenizer import load_caption_tokenizer
from llava_twophase.train.data.tower_check import TowerSettings

CPU = torch.device("cpu")


def source_of(folder, tower):
    return OnTheFlyFeatures(str(folder), [TowerSettings(str(tower), -2, "patch", "square")], [torch.float32], "cpu")


def test_read_equals_encoding_the_sample(plain_set, tiny_clip):
    source = source_of(plain_set.folder, tiny_clip)
    keys = [record.image for record in load_records(plain_set.json)[:2]]
    shape = source.load()
    crops = torch.stack([source.sample(key)["crops"] for key in keys])
    assert torch.equal(source.read(keys, CPU), source.encode(crops))
    assert source.encode(crops).shape == (2, *shape) and source.fingerprint is None
    # A data loader's worker needs no tower.
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(copy.sample(keys[0])["crops"], crops[0]) and copy._tower is None


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_image_is_reported_with_its_record(plain_set, tiny_clip, tiny_llama, tmp_path, workers):
    shutil.copytree(plain_set.folder, tmp_path / "images")
    records = load_records(plain_set.json)
    (tmp_path / "images" / records[2].image).write_bytes(b"<html>not found</html>")
    tokenizer = load_caption_tokenizer(str(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama))
    source = source_of(tmp_path / "images", tiny_clip)
    dataset = CaptionDataset(records, PlainTemplate(tokenizer, 512, 16), source)
    with pytest.raises(UserError) as caught:
        list(DataLoader(dataset, 2, collate_fn=collate, num_workers=workers))
    message = str(caught.value)
    assert message.startswith(f"the record with the caption {records[2].caption[:60]!r}: image {records[2].image}: ")
    assert message.endswith("fix the image, or remove its record") and "Traceback" not in message


def test_identity_is_the_towers_content_and_not_its_spelling(plain_set, tiny_clip, tmp_path, monkeypatch):
    tower = shutil.copytree(tiny_clip, tmp_path / "clip")
    monkeypatch.chdir(tmp_path)

    def identity(name):
        source = source_of(plain_set.folder, name)
        source.load()
        return source.identity

    first = identity("./clip/")
    assert first == identity(tower)
    weights = load_file(tower / "model.safetensors")
    name = next(name for name in sorted(weights) if name.endswith("q_proj.weight"))
    weights[name] *= 1.5
    save_file(weights, tower / "model.safetensors", metadata={"format": "pt"})
    assert first != identity(tower)


def test_thumbnails_are_small_and_grey_for_a_bad_image(plain_set):
    key = load_records(plain_set.json)[0].image
    picture, absent = Thumbnails.open(str(plain_set.folder)).read([key, "absent.jpg"], side=32)
    assert max(picture.size) == 32 and len(picture.getcolors(2048)) > 1
    assert absent.size == (32, 32) and len(absent.getcolors()) == 1


def test_thumbnails_open_refuses_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="--image_folder"):
        Thumbnails.open(str(tmp_path / "nowhere"))
