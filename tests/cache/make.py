"""Write small feature caches from seeded numbers, without images, a tower or torch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from llava_twophase.cache.codec import Channels
from llava_twophase.cache.format import QUANTISED, SHARDS, STORAGE_DTYPES, USER_BLOCK, shard_name
from llava_twophase.cache.header import decode_header
from llava_twophase.cache.manifest import Manifest, ShardEntry, read_manifest
from llava_twophase.cache.session import CacheSession
from llava_twophase.cache.shard_writer import ShardSpec, ShardWriter, sha256

FINGERPRINT = {
    "tower": {
        "model_type": "clip_vision_model",
        "num_hidden_layers": 4,
        "hidden_size": 8,
        "image_size": 30,
        "patch_size": 10,
        "weights_sha256": "0" * 64,
    },
    "select_layer": -2,
    "select_feature": "patch",
    "image_aspect_ratio": "square",
    "processor": {
        "size": {"shortest_edge": 30},
        "crop_size": {"height": 30, "width": 30},
        "image_mean": [0.5, 0.5, 0.5],
    },
    "compute_dtype": "bfloat16",
}
PROVENANCE = {"command": "tests/cache/make.py", "software": {"llava-twophase": "0"}}
SHAPE = (9, 32)
STORAGES = ("bfloat16", "float16", "float32", "int8", "int4")


def channels_of(width):
    """Return mean and std of each channel for int8 and int4: short fractions, which float32 holds exactly."""
    return Channels(((np.arange(width) - 10) / 16).astype("<f4"), ((np.arange(width) + 8) / 32).astype("<f4"))


def fingerprint_of(dtype, width=SHAPE[1]):
    """Return the fingerprint of a cache with this storage dtype."""
    extra = {"channels": {"sha256": channels_of(width).sha256()}} if dtype in QUANTISED else {}
    return {**FINGERPRINT, "storage_dtype": dtype, **extra}


def bfloat16_bits(values):
    """Return float32 values as the uint16 bits of bfloat16, rounded towards zero."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def rows(count, dtype="bfloat16", seed=0, shape=SHAPE):
    """Return rows as `FeatureCache.read_raw` does: values [count, tokens, dim], or uint8 [count, row_bytes]."""
    random = np.random.default_rng(seed)
    if dtype in QUANTISED:
        tokens, width = shape
        quantised = random.integers(1, 255, (count, tokens * width // (1 if dtype == "int8" else 2)), np.uint8)
        scales = random.random((count, tokens * (1 if dtype == "int8" else width // 32)), np.float32).astype("<f2")
        return np.concatenate([quantised, scales.view(np.uint8)], axis=1)
    values = random.standard_normal((count, *shape), np.float32)
    return bfloat16_bits(values) if dtype == "bfloat16" else values.astype(STORAGE_DTYPES[dtype])


def keys_of(number, count):
    """Return the image keys of one shard: with folders, a space, non-ASCII letters and several lengths."""
    return [f"{number:05d}/{'é' * (row % 3)}picture {row}.jpg" for row in range(count)]


def sources_of(keys):
    """Return size and SHA-256 of imaginary image files."""
    return [(len(key), sha256(key.encode())) for key in keys]


def make_shard(path, keys, stored, dtype="bfloat16", fingerprint=None, shape=SHAPE):
    """Seal one shard and return its manifest entry."""
    channels = channels_of(shape[1]) if dtype in QUANTISED else None
    fingerprint = fingerprint or fingerprint_of(dtype, shape[1])
    writer = ShardWriter(Path(path), keys, ShardSpec(shape, dtype, fingerprint, PROVENANCE["software"], channels))
    writer.append(stored[:2], sources_of(keys[:2]))
    if len(keys) > 2:
        writer.append(stored[2:], sources_of(keys[2:]))
    return writer.seal()


def make_cache(folder, counts=(5, 3), dtype="bfloat16", complete=True, fingerprint=None, shape=SHAPE):
    """Write a complete cache; return its directory, and its keys and stored rows in row order."""
    cache = Path(folder)
    (cache / SHARDS).mkdir(parents=True)
    entries, keys, stored = [], [], []
    for number, count in enumerate(counts):
        names, values = keys_of(number, count), rows(count, dtype, seed=number, shape=shape)
        entries.append(make_shard(cache / SHARDS / shard_name(number), names, values, dtype, fingerprint, shape))
        keys += names
        stored.append(values)
    write(cache, entries, dtype, complete, fingerprint or fingerprint_of(dtype, shape[1]), shape)
    return cache, keys, np.concatenate(stored)


def write(cache, entries, dtype="bfloat16", complete=True, fingerprint=None, shape=SHAPE):
    """Write the manifest of some shards."""
    channels = channels_of(shape[1]).to_json() if dtype in QUANTISED else {}
    fingerprint = fingerprint or fingerprint_of(dtype, shape[1])
    rows_of = max(entry.rows for entry in entries)
    replace_manifest(cache, Manifest(fingerprint, PROVENANCE, rows_of, complete, channels=channels, shards=entries))


def replace_manifest(cache, manifest):
    """Replace a manifest under the writer's lock."""
    with CacheSession(cache, read=False) as session:
        session.replace(manifest)


def reseal(cache, number, edit):
    """Change a shard's bytes, and make checksums, header and manifest agree with them, as an attacker or a bug could.

    `edit(data, header)` changes the bytearray in place; `header` has the offset of each dataset.
    """
    path = cache / SHARDS / shard_name(number)
    data = bytearray(path.read_bytes())
    header = decode_header(bytes(data[:USER_BLOCK]), "shard")
    edit(data, header)
    around = bytearray(data)
    for part in sorted(header.row_parts, key=lambda part: -part.offset):
        del around[part.offset : part.offset + part.nbytes]
    header = replace(header, file_bytes=len(data), xxh3_128=xxhash.xxh3_128_hexdigest(bytes(around[USER_BLOCK:])))
    data[:USER_BLOCK] = header.to_bytes()
    path.write_bytes(data)
    manifest = read_manifest(cache)
    manifest.shards = [
        ShardEntry(entry.file, header.rows, header.file_bytes, header.xxh3_128) if entry.file == path.name else entry
        for entry in manifest.shards
    ]
    replace_manifest(cache, manifest)


def flip_bit(cache, number, row, dataset="features"):
    """Flip one bit of a row of a shard, as a failing disk does; nothing else changes."""
    path = cache / SHARDS / shard_name(number)
    data = bytearray(path.read_bytes())
    place = decode_header(bytes(data[:USER_BLOCK]), "shard").datasets[dataset]
    data[place.offset + row * place.row_bytes + 7] ^= 4
    path.write_bytes(data)


def set_row(data, header, row, stored):
    """Overwrite one row and its checksum, within the `edit` of `reseal`."""
    raw = np.ascontiguousarray(stored).tobytes()
    start = header.datasets["features"].offset + row * len(raw)
    data[start : start + len(raw)] = raw
    set_number(data, header, "row_xxh3", row, xxhash.xxh3_64_intdigest(raw))


def set_number(data, header, name, row, value):
    """Overwrite one uint64 of a column, within the `edit` of `reseal`."""
    start = header.datasets[name].offset + 8 * row
    data[start : start + 8] = value.to_bytes(8, "little")


GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "format_v1"
GOLDEN_KEYS = ["00000/a.jpg", "00000/b é.png", "c.jpg"]
GOLDEN_STORAGES = ("bfloat16", "int8", "int4")
GOLDEN_SHAPE = (4, 32)
GOLDEN_HDF5 = "2.0.0"


def golden_rows(dtype):
    """Return the stored rows of the golden shard, computed without a random generator, which might change."""
    count = np.arange(3 * 4 * 32).reshape(3, 4, 32)
    if dtype == "bfloat16":
        return bfloat16_bits((count * 37 % 251 - 125) / 16)
    quantised = (count % 255 - 127).astype(np.int8).view(np.uint8) if dtype == "int8" else (count[..., ::2] % 256)
    scales = ((np.arange(3 * 4) % 7 + 1) / 64).astype("<f2").reshape(3, 4)
    return np.concatenate([quantised.astype(np.uint8).reshape(3, -1), scales.view(np.uint8)], axis=1)


def make_golden(folder, dtype):
    """Write the files of tests/golden/format_v1, byte for byte under HDF5 GOLDEN_HDF5. Version 1 never changes."""
    made = {"image_aspect_ratio": "square", "select_layer": -2, "tower": {"model_type": "clip_vision_model"}}
    if dtype in QUANTISED:
        made["channels"] = {"sha256": channels_of(32).sha256()}
    cache = Path(folder)
    (cache / SHARDS).mkdir(parents=True)
    entry = make_shard(cache / SHARDS / shard_name(0), GOLDEN_KEYS, golden_rows(dtype), dtype, made, GOLDEN_SHAPE)
    write(cache, [entry], dtype, fingerprint=made, shape=GOLDEN_SHAPE)
