"""``verify`` and ``repair``: their lines, their JSON, records and sources."""

import json
import os
import shutil

import pytest

from cache.make import make_cache, make_shard, rows, write
from drawn import COLOURS, draw, make_record, write_records
from helpers import run
from inspection.command import inspect
from llava_twophase.cache.format import SHARDS
from llava_twophase.cache.quarantine import Quarantined, write_quarantine

EXTRACT = "pipelines/extract_features.py"
SHARD = "shards/shard-000000.h5"


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache")[0]


@pytest.fixture
def damaged(cache):
    """A cache with one flipped bit in a row and a shard that is missing."""
    with (cache / SHARD).open("r+b") as file:
        file.seek(-3000, os.SEEK_END)
        file.write(b"\xab")
    (cache / SHARDS / "shard-000001.h5").unlink()
    return cache


def test_verify_of_an_intact_cache_is_one_line(cache):
    result = inspect("verify", cache)
    assert result.stdout == f"{cache}: 8 images in 2 shards, every bit as it was written\n"
    assert result.stderr == ""
    assert json.loads(inspect("verify", cache, "--json").stdout) == {"path": str(cache), "ok": True, "problems": []}


def test_verify_reports_every_problem(damaged):
    result = inspect("verify", damaged, expect=1)
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("shards/shard-000001.h5: it is missing; ")
    assert lines[1].startswith("shards/shard-000000.h5: ")
    assert lines[2] == f"{damaged}: 2 problems found"
    values = json.loads(inspect("verify", damaged, "--json", expect=1).stdout)
    assert values["ok"] is False
    assert [problem["file"] for problem in values["problems"]] == ["shards/shard-000001.h5", "shards/shard-000000.h5"]


def test_verify_does_not_count_notes_as_problems(cache):
    (cache / SHARDS / "shard-000002.h5.0a1b2c3d.tmp").touch()
    lines = inspect("verify", cache).stdout.splitlines()
    assert lines[0].startswith("note: shards/shard-000002.h5.0a1b2c3d.tmp: ") and "every bit" in lines[1]
    assert json.loads(inspect("verify", cache, "--json").stdout)["ok"] is True


def test_summary_of_a_damaged_cache_is_one_error(damaged):
    result = inspect("summary", damaged, expect=1)
    assert result.stdout == "" and result.stderr.startswith("error: ") and "shard-000001.h5" in result.stderr


def test_verify_escapes_control_sequences_of_keys(tmp_path):
    cache = tmp_path / "cache"
    (cache / SHARDS).mkdir(parents=True)
    write(cache, [make_shard(cache / SHARD, ["a.jpg", "../\x1b[31mred [bold]x[/bold].jpg"], rows(2))])
    text = inspect("verify", cache, expect=1).stdout
    assert "\x1b" not in text and "[31mred [bold]x[/bold].jpg" in text


def test_verify_accepts_records_and_sources_that_are_there(original):
    flags = ("--records", original.records, "--sources", original.images)
    text = inspect("verify", original.cache, *flags).stdout
    assert text.endswith(
        f"every bit as it was written, 12 images of {original.records} have features, "
        f"all files in {original.images} unchanged\n"
    )


def test_verify_reports_records_without_features(made, tmp_path):
    records = [make_record(key, key, "x") for key in [*made.keys, "new.jpg", "bad.jpg"]]
    write_quarantine(made.cache, [Quarantined("bad.jpg", "the file is empty")])
    lines = inspect(
        "verify", made.cache, "--records", write_records(records, tmp_path / "r.json"), expect=1
    ).stdout.splitlines()
    assert lines[0] == "new.jpg: it has no features; run the extraction command with these records"
    assert lines[1].startswith("note: bad.jpg: quarantined: the file is empty") and "1 problem found" in lines[2]


def test_verify_reports_sources_edited_missing_and_replaced(made):
    edited, gone, replaced, emptied = made.keys[:4]
    draw((50, 50), COLOURS["red"]).save(made.images / edited)
    (made.images / gone).unlink()
    data = bytearray((made.images / replaced).read_bytes())
    data[-1] ^= 1
    (made.images / replaced).write_bytes(data)
    (made.images / emptied).write_bytes(b"")
    values = json.loads(inspect("verify", made.cache, "--sources", made.images, "--json", expect=1).stdout)
    found = {problem["file"]: problem["what"] for problem in values["problems"]}
    assert found.keys() == {edited, gone, replaced, emptied}
    assert "when it was encoded" in found[edited] and "No such file" in found[gone]
    assert "but another SHA-256" in found[replaced] and "empty" in found[emptied]
    assert "delete shards/shard-000000.h5" in values["problems"][0]["fix"]


def test_verify_reads_sources_in_an_archive(original, tmp_path):
    archive = shutil.make_archive(tmp_path / "images", "zip", original.images)
    assert "unchanged" in inspect("verify", original.cache, "--sources", archive).stdout


def test_verify_reports_damage_and_skips_sources(made):
    (made.cache / "shards/shard-000001.h5").unlink()
    text = inspect("verify", made.cache, "--sources", made.images, expect=1).stdout
    assert "shard-000001.h5: it is missing" in text and "were not checked" in text


@pytest.mark.parametrize("lost", ["manifest", "shard", "both", "flip"])
def test_repair_and_extraction_restore_the_cache(lost, made, original):
    shard = made.cache / "shards/shard-000001.h5"
    if lost in ("manifest", "both"):
        (made.cache / "manifest.json").unlink()
    if lost in ("shard", "both"):
        shard.unlink()
    if lost == "flip":
        data = bytearray(shard.read_bytes())
        data[-10] ^= 1
        shard.write_bytes(data)
    dry = inspect("repair", made.cache, "--dry_run", expect=1)
    assert "would rebuild" in dry.stdout and (made.cache / "manifest.json").exists() == (lost in ("shard", "flip"))
    inspect("repair", made.cache, expect=1)
    run([
        "python", EXTRACT, "--data_path", made.records, "--image_folder", original.images, "--vision_tower", made.tower,
        "--feature_cache", made.cache, "--num_workers", "0", "--images_per_shard", "5", "--device", "cpu",
    ])  # fmt: skip
    assert "12 images" in inspect("verify", made.cache, "--records", made.records, "--sources", made.images).stdout
    if lost != "both":  # without the plan, what was lost comes back in a shard of its own
        for path in (original.cache / "shards").iterdir():
            assert (made.cache / "shards" / path.name).read_bytes() == path.read_bytes()


def test_repair_with_records_is_complete_without_images(made):
    (made.cache / "manifest.json").unlink()
    values = json.loads(inspect("repair", made.cache, "--records", made.records, "--json").stdout)
    assert values["complete"] and values["changed"] and values["images"] == 12 and values["extract_again"] == {}
    assert "every bit" in inspect("verify", made.cache).stdout
    assert inspect("repair", made.cache).stdout.startswith(f"{made.cache}: nothing to do: 12 images in 3 intact shards")


def test_verify_and_repair_find_records_with_absolute_image_paths(tmp_path):
    cache, keys, _ = make_cache(tmp_path / "cache")
    images = tmp_path / "images"
    images.mkdir()
    records = write_records([make_record(key, str(images / key), "x") for key in keys], tmp_path / "records.json")
    asked = inspect("verify", cache, "--records", records, expect=1).stderr
    assert "is absolute: give --image_folder (verify: --sources)" in asked
    found = inspect("verify", cache, "--records", records, "--sources", images, expect=1).stdout
    assert "8 problems found" in found and "it has no features" not in found
    repaired = inspect("repair", cache, "--records", records, "--image_folder", images, "--dry_run")
    assert "nothing to do" in repaired.stdout
