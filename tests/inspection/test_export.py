"""export and head: the very values, in files that other programs read."""

import json

import numpy as np
import pytest

from cache.make import STORAGES, fingerprint_of, make_cache
from helpers import run
from llava_twophase.cache.reader import FeatureCache

SCRIPT = "pipelines/inspect_cache.py"


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
def test_values_keys_and_fingerprint_are_exported(suffix, dtype, tmp_path):
    cache, keys, _ = make_cache(tmp_path / "cache", dtype=dtype)
    wanted = [keys[6], keys[0], keys[6]]
    path = tmp_path / f"features.{suffix}"
    result = run(["python", SCRIPT, "export", cache, *wanted, "-o", path])
    features, kind, names, fingerprint = read(path)
    np.testing.assert_array_equal(features, FeatureCache(cache).read(wanted))
    assert (names, fingerprint) == (wanted, fingerprint_of(dtype))
    exact = "float32" if suffix == "npz" and dtype == "bfloat16" else dtype
    assert kind.removeprefix("torch.") == (exact if "float" in exact else "float32")
    assert result.stdout == f"wrote {path}: features 3 x 9 x 32, {kind.removeprefix('torch.')}\n"
    assert not list(tmp_path.glob(".*"))


def test_a_format_of_another_name(tmp_path):
    cache, keys, _ = make_cache(tmp_path / "cache")
    run(["python", SCRIPT, "export", cache, keys[0], "-o", tmp_path / "features", "--to", "npz"])
    with np.load(tmp_path / "features") as file:
        assert file["features"].shape == (1, 9, 32)


def test_a_format_alone_names_the_file(tmp_path):
    from helpers import ROOT

    cache, keys, _ = make_cache(tmp_path / "cache")
    result = run(["python", ROOT / SCRIPT, "export", cache, keys[0], "--to", "npz"], cwd=tmp_path)
    assert result.stdout.startswith("wrote features.npz: ") and (tmp_path / "features.npz").is_file()
    assert "give -o FILE or --to FORMAT" in run(["python", SCRIPT, "export", cache, keys[0]], expect=2).stderr


def test_where_nothing_can_be_written(tmp_path):
    cache, keys, _ = make_cache(tmp_path / "cache")
    result = run(["python", SCRIPT, "export", cache, keys[0], "-o", tmp_path / "no" / "f.npz"], expect=1)
    assert result.stderr.startswith("error: -o ") and "No such file" in result.stderr


def test_an_unknown_key_names_one_that_is_there(tmp_path):
    cache, keys, _ = make_cache(tmp_path / "cache")
    result = run(["python", SCRIPT, "export", cache, "x/picture 0.jpg", "-o", tmp_path / "f.npz"], expect=1)
    assert f"perhaps {keys[0]!r}" in result.stderr


def test_head_shows_numbers(tmp_path):
    cache, keys, _ = make_cache(tmp_path / "cache", dtype="float32")
    values = FeatureCache(cache).read([keys[2]])[0]
    lines = run(["python", SCRIPT, "head", cache, keys[2]]).stdout.splitlines()
    assert lines[0] == keys[2] and "  row          2 of 8" in lines and "  features     9 tokens x 32, float32" in lines
    assert lines[-1].split() == ["5", *(f"{value:.4f}" for value in values[5, :8])]
    found = json.loads(run(["python", SCRIPT, "head", cache, keys[2], "--json"]).stdout)
    np.testing.assert_array_equal(np.array(found["values"], np.float32), values)
    assert found["row"] == 2 and found["source_size"] == len(keys[2])
