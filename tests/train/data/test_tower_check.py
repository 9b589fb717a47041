"""A cache against the tower that the user names: its content decides, not its spelling."""

import json
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cache.make import make_cache
from llava_twophase.cache.fingerprint import normalize
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.errors import UserError
from llava_twophase.train.data import tower_check
from llava_twophase.train.data.source import CachedFeatures
from llava_twophase.train.data.tower_check import TowerSettings, check_all_settings, compare_with_tower, find_tower
from llava_twophase.vision.preprocess import Preprocessor
from llava_twophase.vision.tower import VisionTower


def settings_of(name):
    return TowerSettings(str(name), select_layer=-2, select_feature="patch", image_aspect_ratio="square")


@pytest.fixture
def tower(tiny_clip, tmp_path):
    """A folder named clip that the test may change."""
    return shutil.copytree(tiny_clip, tmp_path / "clip")


@pytest.fixture
def fingerprint(tower):
    """What phase one records of that tower in bfloat16."""
    made = VisionTower(str(tower), Preprocessor(str(tower)), dtype=torch.bfloat16)
    return normalize({**made.fingerprint(), "storage_dtype": "bfloat16"})


@pytest.fixture
def open_cache(fingerprint, tmp_path):
    """Opens a cache of that tower for a run with another --vision_tower."""
    path, _, _ = make_cache(tmp_path / "cache", fingerprint=fingerprint)
    cache = with_tower_name(path, "clip")
    return lambda name: CachedFeatures(cache, [settings_of(name)])


def with_tower_name(path, name):
    """Return the cache after its manifest has recorded the name of its tower, as phase one does."""
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    manifest["provenance"]["vision_tower"] = name
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return FeatureCache(path)


def change_weights(tower):
    weights = load_file(tower / "model.safetensors")
    name = next(name for name in sorted(weights) if name.endswith("q_proj.weight"))
    weights[name] *= 1.5
    save_file(weights, tower / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("spelling", ["clip", "clip/", "./clip", "{folder}", "{folder}/", "copy"])
def test_cached_features_accepts_every_spelling_of_the_tower(open_cache, tower, spelling, monkeypatch):
    monkeypatch.chdir(tower.parent)
    shutil.copytree(tower, "copy")
    source = open_cache(spelling.format(folder=tower))
    assert source.load() == (9, 32)  # the shape of the cache


def test_cached_features_refuses_other_weights_under_the_same_path(open_cache, tower, monkeypatch):
    monkeypatch.chdir(tower.parent)
    open_cache("clip")
    change_weights(tower)
    with pytest.raises(UserError, match=r"tower\.weights_sha256: the cache has '.*', --vision_tower clip '"):
        open_cache("clip")


def test_cached_features_refuses_another_image_processor(open_cache, tower):
    path = tower / "preprocessor_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "image_mean": [0.5, 0.5, 0.5]}), encoding="utf-8")
    with pytest.raises(UserError, match=r"processor\.image_mean"):
        open_cache(tower)


@pytest.mark.parametrize("name", ["someone/clip", "clip/"])
def test_cached_features_says_once_that_weights_were_not_compared(open_cache, caplog, name):
    caplog.set_level(logging.INFO)
    open_cache(name)
    (line,) = caplog.messages
    assert "only settings were compared, not the tower's weights" in line
    assert line.endswith(f"--vision_tower {name} is not on this machine. The cache was made from 'clip'.")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("someone/clpi", "the same tower, its folder, or download it: hf download someone/clpi"),
        ("clpi", "the same tower, its folder"),
        ("/nowhere/clip", "the same tower, its folder"),
    ],
)
def test_cached_features_refuses_another_name_of_a_tower_that_is_not_on_this_machine(open_cache, name, advice):
    with pytest.raises(UserError) as caught:
        open_cache(name)
    message = str(caught.value)
    assert f"was made from clip, not from --vision_tower {name}, which is not on this machine" in message
    assert "give --vision_tower clip, or, if it is" in message and message.endswith(advice)


def test_cached_features_names_the_tower_of_the_cache_where_weights_differ(open_cache, tiny_siglip):
    with pytest.raises(
        UserError, match="was made from clip, whose weights differ from those of --vision_tower"
    ) as caught:
        open_cache(tiny_siglip)
    assert str(caught.value).endswith(f"give --vision_tower clip, or a cache of {tiny_siglip}")


@pytest.mark.parametrize("on_this_machine", [True, False])
def test_check_all_settings_names_the_order_of_swapped_caches(tiny_clip, tiny_siglip, tmp_path, on_this_machine):
    names = [str(tiny_clip), str(tiny_siglip)] if on_this_machine else ["someone/clip", "someone/siglip"]
    caches = []
    for name, folder in zip(names, (tiny_clip, tiny_siglip), strict=True):
        made = VisionTower(str(folder), Preprocessor(str(folder)))
        path, _, _ = make_cache(tmp_path / folder.name, fingerprint=normalize(made.fingerprint()))
        caches.append(with_tower_name(path, name))
    expected = f"for the towers {names[0]} {names[1]}, expected the caches {caches[0].path} {caches[1].path}"
    with pytest.raises(UserError, match="--feature_cache has another order than --vision_tower") as caught:
        check_all_settings(caches[::-1], [settings_of(name) for name in names])
    assert str(caught.value).endswith(expected)
    check_all_settings(caches, [settings_of(name) for name in names])


@pytest.mark.parametrize("damage", ["weights", "config", "no weights"])
def test_cached_features_does_not_need_a_readable_tower(open_cache, tower, caplog, damage):
    caplog.set_level(logging.INFO)
    if damage == "config":
        (tower / "config.json").write_text("[]", encoding="utf-8")
    elif damage == "weights":
        (tower / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    else:
        (tower / "model.safetensors").unlink()
    open_cache(tower)
    assert "only settings were compared" in caplog.text


def test_find_tower_in_the_hub_cache_without_network(tower, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--my--clip" / "snapshots" / "3f2a"
    shutil.copytree(tower, snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("3f2a", encoding="utf-8")
    found = tower_check.try_to_load_from_cache
    monkeypatch.setattr(
        tower_check, "try_to_load_from_cache", lambda name, file: found(name, file, cache_dir=tmp_path / "hub")
    )
    assert find_tower("my/clip") == snapshot
    assert find_tower("my/other") is None


def test_fingerprint_is_kept_until_a_file_changes(fingerprint, tower, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tower_check, "_WORTH_KEEPING", 0)
    computed, compute = [], tower_check._compute_fingerprint
    monkeypatch.setattr(tower_check, "_compute_fingerprint", lambda *given: computed.append(given) or compute(*given))
    for _ in range(2):
        assert compare_with_tower(fingerprint, settings_of(tower)) == []
    assert len(computed) == 1
    size = os.path.getsize(tower / "model.safetensors")
    change_weights(tower)
    assert os.path.getsize(tower / "model.safetensors") == size
    assert compare_with_tower(fingerprint, settings_of(tower)) and len(computed) == 2


@pytest.mark.parametrize("fingerprint", [{}, {"tower": "my ViT"}, {"tower": {"name": "my ViT", "revision": "3f2a"}}])
def test_compare_with_tower_needs_a_hash_of_the_weights(fingerprint, tiny_clip):
    assert compare_with_tower(fingerprint, settings_of(tiny_clip)) is None
