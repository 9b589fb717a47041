"""Rows of a cache: keys from a command line, samples, and recorded image files."""

import json
import sys
import unicodedata

import numpy as np
import pytest

from cache.make import make_cache
from helpers import run
from inspection.command import inspect
from llava_twophase import CacheWriter
from llava_twophase.errors import UserError
from llava_twophase.inspection.rows import CheckedRows

NFC, NFD = (unicodedata.normalize(form, "café/größe.jpg") for form in ("NFC", "NFD"))


def cache_of(folder, *keys):
    with CacheWriter(folder, (1, 2), "float32", {}) as cache:
        for number, key in enumerate(keys):
            cache.add(key, np.full((1, 2), number, np.float32))
    return folder


@pytest.mark.parametrize(("stored", "typed"), [(NFC, NFD), (NFD, NFC), (NFC, NFC)])
def test_find_accepts_the_other_unicode_form(stored, typed, tmp_path):
    rows = CheckedRows(cache_of(tmp_path / "cache", "a.jpg", stored))
    assert rows.find([typed]).tolist() == [1] and rows.keys([1]) == [stored]


def test_find_prefers_the_form_that_was_typed(tmp_path):
    rows = CheckedRows(cache_of(tmp_path / "cache", NFC, NFD))
    assert rows.find([NFD, NFC]).tolist() == [1, 0]


def test_find_reports_all_unknown_keys(tmp_path):
    rows = CheckedRows(make_cache(tmp_path / "cache")[0])
    with pytest.raises(UserError) as error:
        rows.find(["x/picture 0.jpg", "00000/éépicture 2.jpg", "none.jpg"])
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and lines[0].startswith("2 image keys are not in")
    assert "perhaps '00000/picture 0.jpg'" in lines[1] and "'none.jpg' is not in" in lines[2]


def test_key_beyond_ascii_is_found_in_the_c_locale(tmp_path):
    cache = cache_of(tmp_path / "cache", "größe/大.jpg")
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    found = run(["python", "pipelines/inspect_cache.py", "head", cache, "größe/大.jpg"], **environment)
    assert "row          0 of 1" in found.stdout


def test_recorded_sources_counts_rows_with_an_image_file(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"abc")
    with CacheWriter(tmp_path / "cache", (1, 2), "float32", {}) as cache:
        cache.add("a.jpg", np.ones((1, 2), np.float32), path)
        cache.add("b.jpg", np.ones((1, 2), np.float32))
    rows = CheckedRows(tmp_path / "cache")
    assert rows.recorded_sources() == 1 and rows.source(0)[0] == 3 and rows.source(1) is None


@pytest.mark.parametrize("subcommand", ["stats", "compare", "verify", "summary"])
def test_more_shards_than_open_files(subcommand, tmp_path):
    """70 shards with 64 file descriptors, of which the interpreter has some."""
    with CacheWriter(tmp_path / "cache", (1, 2), "float32", {}, images_per_shard=1) as cache:
        for number in range(70):
            cache.add(f"{number}.jpg", np.full((1, 2), number, np.float32))
    other = f"'{tmp_path / 'cache'}'" if subcommand == "compare" else ""
    script = f"ulimit -n 64; exec \"$0\" pipelines/inspect_cache.py {subcommand} '{tmp_path / 'cache'}' {other} --json"
    printed = json.loads(run(["bash", "-c", script, sys.executable]).stdout)
    counted = {"stats": "rows", "compare": "equal_images", "verify": "ok", "summary": "images"}[subcommand]
    assert printed[counted] == (True if subcommand == "verify" else 70)


def test_sample_larger_than_the_cache_is_all_of_it(tmp_path):
    cache = cache_of(tmp_path / "cache", "a.jpg", "b.jpg")
    assert CheckedRows(cache).sample(10**12, 0).tolist() == [0, 1]
    inspect("stats", cache, "--n", "1000000000000")
