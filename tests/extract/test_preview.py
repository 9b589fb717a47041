"""``--plan``: the work, the disk space and the time of an extraction, without writing anything."""

import json

import drawn
from extract.server import files
from helpers import SCRIPTS, run

COMMAND = SCRIPTS["llava-extract-features"]


def test_plan_reports_the_work_and_writes_nothing(server, command, image_set, tmp_path):
    log = server.run([*command(), "--plan"])
    assert "30, with 29 images (1 of them in several records)" in log
    assert not (tmp_path / "cache").exists()
    server.run(command(data_path=drawn.write_records(image_set.records[:12], tmp_path / "some.json")))
    before = files(tmp_path / "cache")
    done = run(["python", COMMAND, *command(), "--plan", "--json"])
    plan = json.loads(done.stdout)
    expected = {"records": 30, "images": 29, "repeated": 1, "cached": 12, "to_encode": 17, "shards": 3, "fits": True}
    assert {name: plan[name] for name in expected} == expected
    sizes = {"bfloat16": 1024, "float16": 1024, "float32": 2048, "int8": 16 * 32 + 16 * 2, "int4": 16 * 16 + 16 * 2}
    assert plan["features"] == [16, 32] and plan["bytes_per_image"] == sizes
    assert "one image   16 x 32: bfloat16 1.024 kB, float16 1.024 kB, float32 2.048 kB, int8 544 bytes" in log
    assert plan["bytes"] == 17 * 16 * 32 * 4 and plan["seconds"] > 0 and plan["images_per_second"] > 0
    assert files(tmp_path / "cache") == before


def test_plan_exits_with_1_if_the_extraction_would_fail(server, command, image_set, tmp_path):
    records = [*image_set.records, drawn.make_record("x", "gone.jpg", "x")]
    path = drawn.write_records(records, tmp_path / "r.json")
    log = server.run([*command(data_path=path), "--plan"], expect=1)
    assert "1 missing" in log and "gone.jpg: the file is missing" in log
    server.run([*command(data_path=path, on_bad_image="skip"), "--plan"])


def test_plan_of_a_complete_cache_has_no_work(server, command):
    server.run(command())
    assert "to encode   0" in server.run([*command(), "--plan"])


def test_plan_lists_all_images_that_cannot_be_used(server, command, image_set, tmp_path):
    records = [*image_set.records, *(drawn.make_record(f"x{n}", f"gone/{n}.jpg", "x") for n in range(267))]
    flags = command(data_path=drawn.write_records(records, tmp_path / "r.json"))
    log = server.run(flags, expect=1)
    assert "267 of 296 images" in log and "... and 247 more" in log and "--plan --json lists all of them" in log
    text = server.run([*flags, "--plan"], expect=1)
    assert "... and 247 more; --plan --json lists all of them" in text
    plan = json.loads(server.run([*flags, "--plan", "--json"], expect=1))
    assert plan["problems"] == [f"gone/{n}.jpg: the file is missing" for n in range(267)]
