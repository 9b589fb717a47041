"""``export`` and ``head``: exact values, in files that other programs read."""

import json

import numpy as np
import pytest

from cache.make import STORAGES, fingerprint_of, make_cache
from inspection.command import inspect
from llava_twophase.cache.reader import FeatureCache


def read(path):
    """Features as float32, their dtype, keys and fingerprint, by the libraries that users have."""
    import torch
    from safetensors import safe_open

    if path.suffix == ".npz":
        with np.load(path) as file:
            features = file["features"]
            return features, str(features.dtype), list(file["keys"]), json.loads(str(file["fingerprint"]))
    if path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
        features = content["features"]
        return features.float().numpy(), str(features.dtype), content["keys"], content["fingerprint"]
    with safe_open(path, "pt") as file:
        features, texts = file.get_tensor("features"), file.metadata()
    return features.float().numpy(), str(features.dtype), json.loads(texts["keys"]), json.loads(texts["fingerprint"])


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("suffix", ["npz", "safetensors", "pt"])
def test_export_writes_values_keys_and_fingerprint(suffix, dtype, tmp_path):
    cache, keys, _ = make_cache(tmp_path / "cache", dtype=dtype)
    wanted = [keys[6], keys[0], keys[6]]
    path = tmp_path / f"features.{suffix}"
    result = inspect("export", cache, *wanted, "-o", path)
    features, kind, names, fingerprint = read(path)
    np.testing.assert_array_equal(features, FeatureCache(cache).read(wanted))
    assert (names, fingerprint) == (wanted, fingerprint_of(dtype))
    exact = "float32" if suffix == "npz" and dtype == "bfloat16" else dtype
    assert kind.removeprefix("torch.") == (exact if "float" in exact else "float32")
    assert result.stdout == f"wrote {path}: features 3 x 9 x 32, {kind.removeprefix('torch.')}\n"
    assert not list(tmp_path.glob(".*"))


def test_export_to_a_format_that_is_not_the_suffix(tmp_path):
    cache, keys, _ = make_cache(tmp_path / "cache")
    inspect("export", cache, keys[0], "-o", tmp_path / "features", "--to", "npz")
    with np.load(tmp_path / "features") as file:
        assert file["features"].shape == (1, 9, 32)


def test_export_without_a_file_uses_the_format(tmp_path, monkeypatch):
    cache, keys, _ = make_cache(tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    result = inspect("export", cache, keys[0], "--to", "npz")
    assert result.stdout.startswith("wrote features.npz: ") and (tmp_path / "features.npz").is_file()
    assert "give -o FILE or --to FORMAT" in inspect("export", cache, keys[0], expect=2).stderr


def test_export_into_a_missing_folder_is_one_error(tmp_path):
    cache, keys, _ = make_cache(tmp_path / "cache")
    result = inspect("export", cache, keys[0], "-o", tmp_path / "no" / "f.npz", expect=1)
    assert result.stderr.startswith("error: -o ") and "is not a folder" in result.stderr


def test_unknown_key_suggests_a_similar_one(tmp_path):
    cache, keys, _ = make_cache(tmp_path / "cache")
    result = inspect("export", cache, "x/picture 0.jpg", "-o", tmp_path / "f.npz", expect=1)
    assert f"perhaps {keys[0]!r}" in result.stderr


def test_head_prints_numbers(tmp_path):
    cache, keys, _ = make_cache(tmp_path / "cache", dtype="float32")
    values = FeatureCache(cache).read([keys[2]])[0]
    lines = inspect("head", cache, keys[2]).stdout.splitlines()
    assert lines[0] == keys[2] and "  row          2 of 8" in lines and "  features     9 tokens x 32, float32" in lines
    assert lines[-1].split() == ["5", *(f"{value:.4f}" for value in values[5, :8])]
    found = json.loads(inspect("head", cache, keys[2], "--json").stdout)
    np.testing.assert_array_equal(np.array(found["values"], np.float32), values)
    assert found["row"] == 2 and found["source_size"] == len(keys[2])
