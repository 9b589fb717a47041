"""manifest.json: what is written is read back, and damage of any kind is one short line."""

import json
from dataclasses import asdict

import pytest

from cache.make import make_cache, replace_manifest
from llava_twophase.cache.format import FORMAT, SCHEMA
from llava_twophase.cache.manifest import Manifest, ShardEntry, read_manifest
from llava_twophase.errors import UserError

DAMAGE = {
    "empty": lambda text: "",
    "truncated": lambda text: text[:200],
    "NUL": lambda text: "\0" * 500,
    "list": lambda text: "[]",
    "HTML": lambda text: "<html>",
    "UTF-16": lambda text: text.encode("utf-16"),
    "not UTF-8": lambda text: b"\xe9\xff",
    "nested deeply": lambda text: "[" * 100_000,
    "long number": lambda text: text.replace('"rows": 5', '"rows": ' + "1" * 5000),
    "negative rows": lambda text: text.replace('"rows": 5', '"rows": -5'),
    "NaN": lambda text: text.replace('"provenance": {', '"provenance": {"a": NaN,'),
    "long value": lambda text: text.replace('"complete": true', '"complete": "' + "x" * 100_000 + '"'),
    "value over lines": lambda text: text.replace('"complete": true', '"complete": "a\\nb"'),
    "long file name": lambda text: text.replace("shard-000001", "x" * 100_000),
    "long shard": lambda text: text.replace('"rows": 5', '"rows": "' + "x" * 100_000 + '"'),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_read_manifest_reports_damage_in_one_line(kind, tmp_path):
    path, _, _ = make_cache(tmp_path / "cache")
    file = path / "manifest.json"
    text = file.read_text(encoding="utf-8")
    damaged = DAMAGE[kind](text)
    assert damaged != text
    file.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    with pytest.raises(UserError, match=r"manifest\.json is damaged: ") as caught:
        read_manifest(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_manifest_is_written_as_indented_json(tmp_path, shards):
    entries = [ShardEntry(f"shard-{number:06d}.h5", 5, 4096, 'é"\n\\') for number in range(shards)]
    manifest = Manifest({"é": [1.5, []]}, {"shards": []}, 8, True, {"digest": "d"}, {}, entries)
    replace_manifest(tmp_path / "cache", manifest)
    text = (tmp_path / "cache" / "manifest.json").read_text(encoding="utf-8")
    content = {"format": FORMAT, "schema": SCHEMA, **asdict(manifest)}
    assert text == json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    assert read_manifest(tmp_path / "cache") == manifest


def test_read_manifest_refuses_a_folder_without_one(tmp_path):
    with pytest.raises(UserError, match=r"is not a feature cache: it has no manifest\.json"):
        read_manifest(tmp_path)
    with pytest.raises(UserError, match="nowhere is not a feature cache: it does not exist"):
        read_manifest(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a feature cache: it is not a folder"):
        read_manifest(tmp_path / "file")
