"""Features for a trained projector, from a cache and from the tower."""

import os

import pytest
import torch

from llava_twophase import FeatureCache
from llava_twophase.deploy.image_features import ImageFeatures, open_image, read_image_file
from llava_twophase.deploy.trained_projector import find_projector
from llava_twophase.errors import UserError
from llava_twophase.vision.images import BadImage
from llava_twophase.vision.tower import VisionTower


@pytest.fixture
def batches(monkeypatch):
    """The sizes of the batches that went through a vision tower."""
    sizes = []
    encode = VisionTower.encode
    monkeypatch.setattr(VisionTower, "encode", lambda tower, crops: sizes.append(len(crops)) or encode(tower, crops))
    return sizes


def test_encode_runs_the_tower_once_and_only_for_images_without_row(trained, batches):
    images = ImageFeatures(find_projector(trained.run), torch.device("cpu"), FeatureCache(trained.cache))
    paths = [trained.images / key for key in trained.keys[:3]]
    features = images.encode([images.prepare(image) for image in (paths[0], trained.keys[1], paths[2])])
    assert batches == [2] and images.has(trained.keys[1]) and not images.has("absent.jpg")
    assert torch.equal(features, FeatureCache(trained.cache).read_tensor(trained.keys[:3]))


def test_image_features_refuses_a_cache_of_another_aspect_ratio(trained):
    projector = find_projector(trained.run, image_aspect_ratio="pad")
    with pytest.raises(UserError, match="image_aspect_ratio: the cache has 'square', this run 'pad'"):
        ImageFeatures(projector, torch.device("cpu"), FeatureCache(trained.cache))


def test_read_image_file_refuses_pipes_and_devices(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    for name in ("pipe.jpg", "zero.jpg", "absent.jpg", "absent/a.jpg"):
        with pytest.raises(BadImage):
            read_image_file(tmp_path / name)


def test_open_image_reports_what_a_file_is(tmp_path):
    (tmp_path / "page.jpg").write_text("<html></html>", encoding="utf-8")
    with pytest.raises(BadImage, match="HTML"):
        open_image(tmp_path / "page.jpg")
