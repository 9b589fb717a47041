"""The format: version 1 is read and written byte for byte; other versions are refused."""

import hashlib
import json
import re

import h5py
import numpy as np
import pytest

from cache.make import (
    GOLDEN,
    GOLDEN_HDF5,
    GOLDEN_KEYS,
    GOLDEN_SHAPE,
    GOLDEN_STORAGES,
    STORAGES,
    channels_of,
    golden_rows,
    make_cache,
    make_golden,
    replace_manifest,
    reseal,
    sources_of,
)
from llava_twophase.cache import format as cache_format
from llava_twophase.cache.check.verify import verify
from llava_twophase.cache.format import ALIGNMENT, FORMAT, USER_BLOCK
from llava_twophase.cache.header import decode_header
from llava_twophase.cache.manifest import read_manifest
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.cache.shard_files import read_header
from llava_twophase.errors import UserError

SHARD = "shards/shard-000000.h5"


def edit_header(path, **changes):
    """Rewrite fields of a shard's user block."""
    data = bytearray(path.read_bytes())
    content = {**json.loads(data[:USER_BLOCK]), **changes}
    line = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    data[:USER_BLOCK] = line.ljust(USER_BLOCK - 1) + b"\n"
    path.write_bytes(data)


def plain_values(file, dtype):
    """Decode a shard as its own attribute says, with h5py and numpy alone: no code of ours."""
    stored = file["features"][:]
    if dtype not in ("int8", "int4"):
        return stored.astype(np.float32)
    scale = file["scale"][:].astype(np.float32)
    if dtype == "int4":
        stored = np.stack([stored & 15, stored >> 4], axis=-1).reshape(*stored.shape[:2], -1).astype(np.int32) - 8
        scale = np.repeat(scale, 32, axis=-1)
    else:
        scale = scale[..., None]
    return stored.astype(np.float32) * scale * file["channel_std"][:] + file["channel_mean"][:]


@pytest.mark.parametrize("dtype", GOLDEN_STORAGES)
def test_reader_reads_version_1(dtype):
    cache = FeatureCache(GOLDEN / dtype)
    assert list(cache.keys()) == GOLDEN_KEYS
    assert (cache.feature_shape, cache.dtype) == (GOLDEN_SHAPE, dtype)
    assert cache.fingerprint["select_layer"] == -2
    np.testing.assert_array_equal(cache.read_raw(GOLDEN_KEYS), golden_rows(dtype))
    with h5py.File(GOLDEN / dtype / SHARD) as file:
        np.testing.assert_array_equal(cache.read(GOLDEN_KEYS), plain_values(file, dtype))
    sizes_and_hashes = list(zip(cache.column("source_size"), map(bytes, cache.column("source_sha256")), strict=True))
    assert sizes_and_hashes == sources_of(GOLDEN_KEYS)


@pytest.mark.parametrize("dtype", GOLDEN_STORAGES)
def test_verify_accepts_version_1(dtype):
    assert verify(GOLDEN / dtype) == []


@pytest.mark.parametrize("name", ["manifest.json", SHARD])
@pytest.mark.parametrize("dtype", GOLDEN_STORAGES)
def test_writer_writes_the_golden_bytes(dtype, name, tmp_path):
    make_golden(tmp_path / "cache", dtype)
    same = (tmp_path / "cache" / name).read_bytes() == (GOLDEN / dtype / name).read_bytes()
    found = h5py.version.hdf5_version
    if not same and found != GOLDEN_HDF5:
        pytest.skip(f"HDF5 {found} writes other metadata than {GOLDEN_HDF5}; values are still tested")
    assert same, f"{name} differs from the golden file: version 1 of the format must not change"


def test_golden_files_did_not_change():
    files = [GOLDEN / dtype / name for dtype in GOLDEN_STORAGES for name in ("manifest.json", SHARD)]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    assert digest == "0004ff701dcba2c5eeb7c8f9c190ad01b274acf3e96adc62e08a4816ec08536f"


@pytest.mark.parametrize("dtype", STORAGES)
def test_h5py_finds_the_values_at_the_offsets_of_the_header(dtype, tmp_path):
    cache, keys, _ = make_cache(tmp_path / "cache", counts=(5,), dtype=dtype)
    header = read_header(cache / SHARD)
    with h5py.File(cache / SHARD) as file:
        np.testing.assert_array_equal(plain_values(file, dtype), FeatureCache(cache).read(keys))
        assert [key.decode() for key in file["image_key"][:]] == keys
        assert {name: file[name].id.get_offset() for name in file} == {
            name: data.offset for name, data in header.datasets.items()
        }
        assert file["image_key"].dtype == h5py.string_dtype("utf-8", header.datasets["image_key"].numpy_dtype.itemsize)
        assert set(file.attrs) == {"schema", "fingerprint", "provenance"}
        if dtype in ("int8", "int4"):
            np.testing.assert_array_equal(file["channel_mean"][:], channels_of(32).mean)
    assert header.datasets["features"].offset % ALIGNMENT == 0


@pytest.mark.parametrize("schema", [2, 0, "1", True, None])
def test_unknown_schema_is_refused_with_its_value(schema, tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache")
    edit_header(cache / SHARD, schema=schema)
    expected = rf"shard-000000\.h5 has schema version {schema!r}; this llava-twophase reads version 1"
    with pytest.raises(UserError, match=expected):
        FeatureCache(cache)
    content = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
    (cache / "manifest.json").write_text(json.dumps({**content, "schema": schema}), encoding="utf-8")
    with pytest.raises(UserError, match=rf"manifest\.json has schema version {schema!r}"):
        FeatureCache(cache)


def test_unknown_format_or_storage_is_refused_with_its_value(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache")
    edit_header(cache / SHARD, storage="fp8")
    with pytest.raises(UserError, match="stores features as 'fp8'; this llava-twophase reads bfloat16, float16"):
        FeatureCache(cache)
    edit_header(cache / SHARD, format="someone-else")
    with pytest.raises(UserError, match=f"has the format 'someone-else'; expected '{FORMAT}'"):
        FeatureCache(cache)


@pytest.mark.parametrize(
    "features",
    [
        {"offset": 1 << 40},
        {"offset": -4096},
        {"offset": 73729},
        {"offset": 0},
        {"offset": True},
        {"offset": 73728.0},
        {"shape": [1 << 61, 9, 32]},
        {"shape": [6, 9, 32]},
        {"shape": [5, 0, 32]},
        {"shape": [5, 72]},
        {"shape": "598"},
        {"dtype": "|O"},
        {"dtype": "<f8"},
        {"dtype": "<f4"},
    ],
    ids=str,
)
def test_header_with_a_wrong_dataset_is_refused(features, tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache", counts=(5,))
    datasets = json.loads((cache / SHARD).read_bytes()[:USER_BLOCK])["datasets"]
    edit_header(cache / SHARD, datasets={**datasets, "features": {**datasets["features"], **features}})
    with pytest.raises(UserError, match="damaged header"):
        FeatureCache(cache)


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_header_with_other_datasets_is_refused(change, tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache", counts=(5,))
    datasets = json.loads((cache / SHARD).read_bytes()[:USER_BLOCK])["datasets"]
    if change == "missing":
        del datasets["row_xxh3"]
    else:
        datasets["more"] = datasets["row_xxh3"]
    edit_header(cache / SHARD, datasets=datasets)
    with pytest.raises(UserError, match="damaged header"):
        FeatureCache(cache)


@pytest.mark.parametrize(
    "block", [b"", b"{", b"\xff" * USER_BLOCK, b"[" * USER_BLOCK, b"[1]", b"null", b"{}"], ids=repr
)
def test_decode_header_refuses_other_bytes(block):
    with pytest.raises(UserError, match=r"^the file "):
        decode_header(block, "the file")


@pytest.mark.parametrize(
    "change",
    [
        {"shards": None},
        {"shards": [{"file": "../../etc/passwd", "rows": 1, "file_bytes": 1, "xxh3_128": ""}]},
        {"shards": [{"file": "shard-\ud800.h5", "rows": 1, "file_bytes": 1, "xxh3_128": ""}]},
        {"shards": [{"file": "shard-000000.h5", "rows": True, "file_bytes": 1, "xxh3_128": ""}]},
        {"shards": [{"file": "shard-000000.h5"}]},
        {"fingerprint": []},
        {"fingerprint": {"a": float("nan")}},
        {"provenance": {"a": float("inf")}},
        {"complete": "yes"},
        {"images_per_shard": 1.5},
    ],
    ids=str,
)
def test_damaged_manifest_is_refused(change, tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache")
    content = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
    (cache / "manifest.json").write_text(json.dumps({**content, **change}), encoding="utf-8")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        FeatureCache(cache)


def test_reader_ignores_unknown_keys(tmp_path):
    cache, keys, stored = make_cache(tmp_path / "cache", counts=(5,))
    edit_header(cache / SHARD, later="more")
    content = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
    (cache / "manifest.json").write_text(json.dumps({**content, "later": "more"}), encoding="utf-8")
    np.testing.assert_array_equal(FeatureCache(cache).read_raw(keys), stored)


def test_manifest_keeps_a_command_that_is_not_utf8(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache")
    manifest = read_manifest(cache)
    manifest.provenance["command"] = "extract --data_path \udcff.json"
    replace_manifest(cache, manifest)
    assert read_manifest(cache).provenance["command"] == "extract --data_path \udcff.json"


def test_docstring_has_the_specification():
    rules = re.findall(r"^    \d+\. ", cache_format.__doc__, flags=re.MULTILINE)
    assert len(rules) == 15
    assert "MUST" in cache_format.__doc__ and "MAY" in cache_format.__doc__


def test_reseal_of_an_unchanged_shard_changes_nothing(tmp_path):
    # The tests of verify rely on it.
    cache, _, _ = make_cache(tmp_path / "cache")
    before = (cache / SHARD).read_bytes()
    reseal(cache, 0, lambda data, header: None)
    assert (cache / SHARD).read_bytes() == before
    assert verify(cache) == []
