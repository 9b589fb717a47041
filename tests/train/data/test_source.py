"""Where features come from: a cache compared with the flags, or the tower."""

import inspect
import logging
import re
import unicodedata

import numpy as np
import pytest
import torch

from cache.make import FINGERPRINT, flip_bit, make_cache
from commands import outcome, train_command
from helpers import run
from llava_twophase import CacheWriter
from llava_twophase.cache.quarantine import Quarantined, write_quarantine
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.errors import UserError
from llava_twophase.records import Record, load_records, records_of
from llava_twophase.train.data.feature_source import FeatureSource
from llava_twophase.train.data.on_the_fly import OnTheFlyFeatures
from llava_twophase.train.data.source import CachedFeatures
from llava_twophase.train.data.tower_check import TowerSettings

SETTINGS = TowerSettings("my/tower", select_layer=-2, select_feature="patch", image_aspect_ratio="square")
CPU = torch.device("cpu")


@pytest.fixture
def source_of(tmp_path):
    """Opens a cache with this fingerprint as a source."""

    def open_cache(fingerprint, settings=SETTINGS):
        path, _, _ = make_cache(tmp_path / "cache", fingerprint=fingerprint)
        return CachedFeatures(FeatureCache(path), [settings])

    return open_cache


@pytest.mark.parametrize("source", [CachedFeatures, OnTheFlyFeatures])
def test_every_source_has_the_methods_and_parameters_of_the_protocol(source):
    """By name: mypy accepts a method with ``*args`` and ``**kwargs`` in the place of any other."""
    expected = {
        name: list(inspect.signature(method).parameters)
        for name, method in inspect.getmembers(FeatureSource, inspect.isfunction)
        if not name.startswith("_")
    }
    assert "prefetch" in expected
    assert {name: list(inspect.signature(getattr(source, name)).parameters) for name in expected} == expected


def test_cached_features_reads_what_the_cache_reads(source_of):
    source = source_of(FINGERPRINT)
    cache = source._cache
    keys = list(cache.keys())[:3]
    assert source.load() == cache.feature_shape
    assert torch.equal(source.read(keys, CPU), cache.read_tensor(keys))
    assert torch.equal(source.sample(keys[1])["features"], cache.read_tensor(keys)[1])
    assert source.encode is None and source.identity == source.fingerprint == FINGERPRINT


def test_cached_features_refuses_a_row_with_a_flipped_bit(source_of):
    source = source_of(FINGERPRINT)
    key = next(iter(source._cache.keys()))
    flip_bit(source._cache.path, 0, 0)
    for read in (source.sample, lambda key: source.read([key], CPU)):
        with pytest.raises(UserError, match=f"the features of '{key}' do not match their checksum"):
            read(key)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            TowerSettings("my/tower", -1, "patch", "square"),
            "select_layer: the cache has -2, this run -1 (--mm_vision_select_layer)",
        ),
        (
            TowerSettings("my/tower", -2, "cls_patch", "square"),
            "select_feature: the cache has 'patch', this run 'cls_patch' (--mm_vision_select_feature)",
        ),
        (
            TowerSettings("my/tower", -2, "patch", "pad"),
            "image_aspect_ratio: the cache has 'square', this run 'pad' (--image_aspect_ratio)",
        ),
    ],
)
def test_cached_features_refuses_other_settings_with_their_flags(source_of, settings, problem):
    with pytest.raises(UserError, match=re.escape(problem)):
        source_of(FINGERPRINT, settings)


def test_cached_features_accepts_a_layer_counted_from_the_start(source_of):
    source = source_of(FINGERPRINT, TowerSettings("my/tower", 3, "patch", "square"))  # of four layers
    assert source.fingerprint["select_layer"] == -2


@pytest.mark.parametrize(
    ("fingerprint", "unchecked"),
    [
        ({"tower": {"name": "my ViT", "revision": "3f2a"}}, ["select_layer", "select_feature", "image_aspect_ratio"]),
        ({"tower": "my ViT", "select_feature": "patch"}, ["select_layer", "image_aspect_ratio"]),
        ({"made_by": ["timm", 3]}, ["select_layer", "select_feature", "image_aspect_ratio"]),
    ],
)
def test_cached_features_logs_fields_that_the_fingerprint_does_not_have(source_of, fingerprint, unchecked, caplog):
    caplog.set_level(logging.INFO)
    source_of(fingerprint)
    (line,) = [message for message in caplog.messages if "not compared" in message]
    assert "does not have them: " + ", ".join([*unchecked, "tower.weights_sha256"]) in line
    assert len(caplog.messages) == 1


def test_cached_features_compares_the_fields_that_a_short_fingerprint_has(source_of):
    with pytest.raises(UserError, match="image_aspect_ratio: the cache has 'pad', this run 'square'"):
        source_of({"tower": "my ViT", "image_aspect_ratio": "pad"})


def test_cached_features_lists_images_without_features(source_of):
    source = source_of(FINGERPRINT)
    present = next(iter(source._cache.keys()))
    with pytest.raises(UserError, match=r"1 of 2 images has no features in .*; extract them first") as caught:
        source.require([present, "absent.jpg"])
    assert "absent.jpg" in str(caught.value)


@pytest.fixture
def quarantining(tmp_path):
    """A source that drops records of quarantined images: one is in the cache by now, one is not."""
    path, keys, _ = make_cache(tmp_path / "cache", fingerprint=FINGERPRINT)
    write_quarantine(path, [Quarantined(keys[0], "was empty"), Quarantined("bad.jpg", "is empty")])
    return CachedFeatures(FeatureCache(path), [SETTINGS], drop_quarantined=True), keys


def record(key):
    return Record(key, "a caption", "<image>")


def test_usable_drops_records_of_images_without_features(quarantining, caplog):
    caplog.set_level(logging.INFO)
    source, keys = quarantining
    records = [record(keys[0]), record("bad.jpg"), record(keys[1])]
    assert source.usable(records_of(records)) == [records[0], records[2]]
    assert caplog.messages == ["--drop_quarantined: 1 of 3 records dropped"]


def test_usable_logs_nothing_if_nothing_is_dropped(quarantining, caplog):
    caplog.set_level(logging.INFO)
    source, keys = quarantining
    for records in ([], [record(keys[1])]):
        assert source.usable(records_of(records)) == records
    assert caplog.messages == []


def test_usable_refuses_to_drop_every_record(quarantining):
    source, _ = quarantining
    with pytest.raises(UserError, match="--drop_quarantined drops all of 2 records"):
        source.usable(records_of([record("bad.jpg"), record("bad.jpg")]))


def test_require_names_the_flag_for_quarantined_images(quarantining):
    source, _ = quarantining
    with pytest.raises(UserError, match="1 of them is in its quarantine.jsonl: --drop_quarantined True"):
        source.require(["bad.jpg", "other.jpg"])


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("quarantined", ["NFC", "NFD"])
def test_usable_drops_quarantined_images_in_every_unicode_form(tmp_path, form, quarantined):
    path, keys, _ = make_cache(tmp_path / "cache", fingerprint=FINGERPRINT)
    extracted = next(key for key in keys if not key.isascii())
    names = [unicodedata.normalize(quarantined, key) for key in ("bäd.jpg", extracted)]
    write_quarantine(path, [Quarantined(name, "was empty") for name in names])
    source = CachedFeatures(FeatureCache(path), [SETTINGS], drop_quarantined=True)
    records = [record(unicodedata.normalize(form, key)) for key in ("bäd.jpg", extracted)]
    assert source.usable(records_of(records)) == [record(extracted)]
    with pytest.raises(UserError, match="1 of them is in its quarantine.jsonl: --drop_quarantined True"):
        source.require([records[0].image])


def test_usable_finds_keys_in_the_other_unicode_form(source_of):
    source = source_of(FINGERPRINT)
    keys = list(source._cache.keys())
    records = records_of(record(unicodedata.normalize("NFD", key)) for key in keys)
    assert source._cache.missing(records.images)
    assert source.usable(records) == [record(key) for key in keys]
    absent = record("é.jpg")
    assert source.usable(records_of([absent])) == [absent]


def test_require_accepts_an_image_of_several_records(source_of):
    source = source_of(FINGERPRINT)
    key = next(iter(source._cache.keys()))
    source.require([key, key])
    with pytest.raises(UserError, match=r"1 of 2 images has no features"):
        source.require([key, key, "absent.jpg"])


def test_training_from_a_cache_of_a_cache_writer(plain_set, tiny_llama, tmp_path):
    """Features of any framework, with a fingerprint that phase one would not write."""
    records = load_records(plain_set.json)
    fingerprint = {"tower": {"name": "my ViT", "revision": "3f2a"}}
    random = np.random.default_rng(0)
    with CacheWriter(tmp_path / "mine", shape=(4, 32), dtype="bfloat16", fingerprint=fingerprint) as cache:
        for record in records:
            cache.add(record.image, random.standard_normal((4, 32), np.float32))
    command = train_command(
        model_name_or_path=tiny_llama,
        data_path=plain_set.json,
        vision_tower="my ViT",
        feature_cache=tmp_path / "mine",
        output_dir=tmp_path / "out",
        max_steps=2,
    )
    said = run(["python", *command]).stderr
    fields = "select_layer, select_feature, image_aspect_ratio, tower.weights_sha256"
    assert said.count("not compared") == 1 and f"its fingerprint does not have them: {fields}" in said
    assert len(outcome(tmp_path / "out").losses) == 2
