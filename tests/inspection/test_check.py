"""verify's --records and --sources, and repair as a command."""

import json
import shutil

import pytest

from drawn import COLOURS, draw, make_record, write_records
from helpers import run
from llava_twophase.cache.quarantine import Quarantined, write_quarantine

EXTRACT = "pipelines/extract_features.py"


def inspect(*arguments, expect=0):
    return run(["python", "pipelines/inspect_cache.py", *arguments], expect=expect)


def test_records_and_sources_that_are_all_there(original):
    flags = ("--records", original.records, "--sources", original.images)
    text = inspect("verify", original.cache, *flags).stdout
    assert text.endswith(
        f"every bit as it was written, all 12 images of {original.records} there, "
        f"all files in {original.images} unchanged\n"
    )


def test_records_without_features(made, tmp_path):
    records = [make_record(key, key, "x") for key in [*made.keys, "new.jpg", "bad.jpg"]]
    write_quarantine(made.cache, [Quarantined("bad.jpg", "the file is empty")])
    lines = inspect(
        "verify", made.cache, "--records", write_records(records, tmp_path / "r.json"), expect=1
    ).stdout.splitlines()
    assert lines[0] == "new.jpg: it has no features; run the extraction command with these records"
    assert lines[1].startswith("note: bad.jpg: quarantined: the file is empty") and "1 problem found" in lines[2]


def test_sources_edited_missing_and_replaced(made):
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


def test_sources_in_an_archive(original, tmp_path):
    archive = shutil.make_archive(tmp_path / "images", "zip", original.images)
    assert "unchanged" in inspect("verify", original.cache, "--sources", archive).stdout


def test_damage_is_named_before_sources_are_looked_at(made):
    (made.cache / "shards/shard-000001.h5").unlink()
    text = inspect("verify", made.cache, "--sources", made.images, expect=1).stdout
    assert "shard-000001.h5: it is missing" in text and "were not checked" in text


@pytest.mark.parametrize("lost", ["manifest", "shard", "both", "flip"])
def test_repair_then_extraction_gives_the_cache_again(lost, made, original):
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
    assert "would make" in dry.stdout and (made.cache / "manifest.json").exists() == (lost in ("shard", "flip"))
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
    assert inspect("repair", made.cache).stdout.startswith(f"{made.cache}: nothing to do: 12 images in 3 whole shards")
