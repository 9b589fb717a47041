"""Duplicate images in the report of an extraction."""

from cache.make import make_cache
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.extract.report import report_twins


def test_distinct_images_are_not_reported_as_duplicates(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache")
    assert report_twins(FeatureCache(cache)) is None
