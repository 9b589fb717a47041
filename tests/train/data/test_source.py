"""Where features come from: a cache compared with the flags, or the tower."""

import logging

import pytest
import torch

from cache.make import FINGERPRINT, make_cache
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.errors import UserError
from llava_twophase.train.data.source import CachedFeatures, TowerSettings

SETTINGS = TowerSettings("my/tower", select_layer=-2, select_feature="patch", image_aspect_ratio="square")
CPU = torch.device("cpu")


@pytest.fixture
def source_of(tmp_path):
    """Opens a cache with this fingerprint as a source."""

    def open_cache(fingerprint, settings=SETTINGS):
        path, _, _ = make_cache(tmp_path / "cache", fingerprint=fingerprint)
        return CachedFeatures(FeatureCache(path), settings)

    return open_cache


def test_cached_features_reads_what_the_cache_reads(source_of):
    source = source_of(FINGERPRINT)
    cache = source._cache
    keys = list(cache.keys())[:3]
    assert source.load() == cache.feature_shape
    assert torch.equal(source.read(keys, CPU), cache.read_tensor(keys))
    assert torch.equal(source.sample(keys[1])["features"], cache.read_tensor(keys)[1])
    assert source.encode is None and source.identity == source.fingerprint == FINGERPRINT


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (TowerSettings("my/tower", -1, "patch", "square"), "select_layer: the cache has -2, this run -1"),
        (TowerSettings("my/tower", -2, "cls_patch", "square"), "select_feature: the cache has 'patch'"),
        (TowerSettings("my/tower", -2, "patch", "pad"), "image_aspect_ratio: the cache has 'square', this run 'pad'"),
    ],
)
def test_cached_features_refuses_other_settings(source_of, settings, problem):
    with pytest.raises(UserError, match=problem):
        source_of(FINGERPRINT, settings)


def test_cached_features_accepts_a_layer_counted_from_the_start(source_of):
    source_of(FINGERPRINT, TowerSettings("my/tower", 3, "patch", "square"))  # of four layers


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
    assert line.endswith("does not have them: " + ", ".join(unchecked))


def test_cached_features_compares_the_fields_that_a_short_fingerprint_has(source_of):
    with pytest.raises(UserError, match="image_aspect_ratio: the cache has 'pad', this run 'square'"):
        source_of({"tower": "my ViT", "image_aspect_ratio": "pad"})


def test_cached_features_lists_images_without_features(source_of):
    source = source_of(FINGERPRINT)
    present = next(iter(source._cache.keys()))
    with pytest.raises(UserError, match=r"1 of 2 images have no features in .*; extract them first") as caught:
        source.require([present, "absent.jpg"])
    assert "absent.jpg" in str(caught.value)
