"""Every subcommand on caches that a user's program wrote with ``CacheWriter``, with any fingerprint."""

import json

import numpy as np
import pytest
from PIL import Image

from drawn import make_record, write_records
from inspection.command import inspect
from llava_twophase import CacheWriter

KEYS = ("a.png", "b/c.png", "d.png")
FINGERPRINTS = {
    "empty": {},
    "name": {"tower": {"name": "my ViT", "revision": "3f2a"}},
    "other types": {"tower": "my ViT", "processor": "mine", "select_layer": [1, 2], "image_aspect_ratio": 3},
    "other fields": {
        "processor": {"size": 224, "crop_size": 224, "image_mean": 0.5, "do_center_crop": 1},
        "image_aspect_ratio": "pad",
        "select_feature": {"a": 1},
    },
    "zeros": {"processor": {"size": {"shortest_edge": 0}, "crop_size": {"height": "x"}}, "compute_dtype": "nn"},
}


def write_cache(folder, fingerprint, shape=(9, 32), scale=1.0, dtype="float32", sources=()):
    """Write features of three images; `sources` are their files, if recorded."""
    random = np.random.default_rng(0)
    with CacheWriter(folder, shape, dtype, fingerprint, images_per_shard=2) as cache:
        for key, source in zip(KEYS, sources or [None] * 3, strict=True):
            cache.add(key, (random.standard_normal(shape) * scale).astype(np.float32), source)
    return folder


@pytest.fixture
def images(tmp_path):
    for number, key in enumerate(KEYS):
        path = tmp_path / "images" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (60 * number, 100, 0)).save(path)
    return tmp_path / "images"


@pytest.mark.parametrize("fingerprint", FINGERPRINTS.values(), ids=FINGERPRINTS)
def test_every_subcommand_shows_a_cache_with_any_fingerprint(fingerprint, images, tmp_path):
    cache = write_cache(tmp_path / "cache", fingerprint)
    records = write_records([make_record(key, key, "x") for key in KEYS], tmp_path / "records.json")
    folder = ("--image_folder", images)
    text = inspect("summary", cache).stdout
    assert "9 tokens of 32 for each image" in text and "None" not in text.partition("\n\n")[0]
    assert " ".join(text.split()).count("not recorded tower.model_type") == 1
    inspect("stats", cache)
    inspect("compare", cache, cache)
    inspect("coverage", cache, "--data_path", records)
    inspect("head", cache, KEYS[0])
    inspect("export", cache, KEYS[0], "-o", tmp_path / "a.npz")
    inspect("verify", cache, "--records", records)
    inspect("repair", cache)
    inspect("show", cache, *KEYS, "-o", tmp_path / "shown.png", "--patch", "1,1", *folder)
    inspect("report", cache, "-o", tmp_path / "report.html", "--data_path", records, *folder)
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count('class="card"') == 3


@pytest.mark.parametrize("fingerprint", FINGERPRINTS.values(), ids=FINGERPRINTS)
def test_reencode_refuses_a_cache_that_records_too_little(fingerprint, images, tmp_path):
    cache = write_cache(tmp_path / "cache", fingerprint)
    errors = inspect("reencode", cache, "--image_folder", images, "--vision_tower", "none", expect=1).stderr
    assert errors.startswith(f"error: {cache} cannot be compared with a tower: its fingerprint does not record tower.")
    assert len(errors.splitlines()) == 1


def test_summary_tells_what_the_fingerprint_of_a_program_has(tmp_path):
    cache = write_cache(tmp_path / "cache", FINGERPRINTS["name"])
    text = inspect("summary", cache).stdout
    assert "its fingerprint: tower.name my ViT, tower.revision 3f2a" in text
    assert "float32, without quantisation" in text
    missing = json.loads(inspect("summary", cache, "--json").stdout)["not_recorded"]
    assert missing == ["tower.model_type", "image_aspect_ratio", "compute_dtype", "select_layer", "select_feature"]


def test_cls_token_is_found_without_select_feature(images, tmp_path):
    cache = write_cache(tmp_path / "cache", {}, shape=(10, 32))
    inspect("show", cache, KEYS[0], "-o", tmp_path / "shown.png", "--image_folder", images)
    with Image.open(tmp_path / "shown.png") as sheet:
        assert sheet.width > 3 * 336  # three panels: nine of the ten tokens form the grid


def test_tokens_that_form_no_square_have_statistics_and_a_report(images, tmp_path):
    cache = write_cache(tmp_path / "cache", {}, shape=(7, 5))
    flags = ("--image_folder", images)
    errors = inspect("show", cache, KEYS[0], "-o", tmp_path / "shown.png", *flags, expect=1).stderr
    assert "error: 7 tokens form no square grid of patches, so they cannot be shown\n" in errors
    assert json.loads(inspect("stats", cache, "--json").stdout)["adjacent_patch_cosine"] is None
    inspect("report", cache, "-o", tmp_path / "report.html", *flags)
    assert "7 tokens form no square grid" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_image_files_that_are_not_recorded_are_reported_as_such(images, tmp_path):
    cache = write_cache(tmp_path / "cache", {})
    assert "made from    not recorded" in inspect("head", cache, KEYS[0]).stdout
    head = json.loads(inspect("head", cache, KEYS[0], "--json").stdout)
    assert head["source_size"] is None and head["source_sha256"] is None
    shown = inspect("show", cache, KEYS[0], "-o", tmp_path / "shown.png", "--image_folder", images)
    assert "a.png: the cache does not record which file the features were made from" in shown.stderr
    assert "0 of 3 files in" in inspect("verify", cache, "--sources", images).stdout
    # Equal hashes of zero are not duplicates.
    assert json.loads(inspect("stats", cache, "--json").stdout)["equal_pictures_compared"] == 0


def test_verify_checks_the_image_files_that_are_recorded(images, tmp_path):
    sources = [images / KEYS[0], None, images / KEYS[2]]
    cache = write_cache(tmp_path / "cache", {}, sources=sources)
    assert f"2 of 3 files in {images} unchanged, the others not recorded" in (
        inspect("verify", cache, "--sources", images).stdout
    )
    for path in (images / KEYS[1], images / KEYS[2]):
        path.write_bytes(b"edited")
    lines = inspect("verify", cache, "--sources", images, expect=1).stdout.splitlines()
    assert lines[0].startswith("d.png: it was edited or replaced since") and "1 problem found" in lines[1]


def strict_json(text):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("scale", [0.0, 5e37, 1e-42])
def test_json_is_valid_for_values_of_any_size(scale, images, tmp_path):
    cache, other = write_cache(tmp_path / "cache", {}, scale=scale), write_cache(tmp_path / "other", {})
    values = strict_json(inspect("stats", cache, "--json").stdout)
    assert values["token_norm"] == pytest.approx(scale * 5.6, rel=0.1) and values["non_finite"] == 0
    for pair in ((cache, other), (other, cache), (cache, cache)):
        strict_json(inspect("compare", *pair, "--json").stdout)
    strict_json(inspect("head", cache, KEYS[0], "--json").stdout)
    inspect("show", cache, KEYS[0], "-o", tmp_path / "shown.png", "--image_folder", images)
    inspect("report", cache, "-o", tmp_path / "report.html", "--image_folder", images)


@pytest.mark.parametrize(
    "provenance",
    [
        {"software": "mine", "created": 5, "vision_tower": ["x"]},
        {"software": {"torch": None, "a": {"b": 1}}, "created": "2020-01-01", "vision_tower": {"a": 1}},
        {"software": [1], "vision_tower": ""},
    ],
    ids=["text", "nested", "list"],
)
def test_provenance_may_hold_any_values(provenance, tmp_path):
    with CacheWriter(tmp_path / "cache", (9, 32), "float32", {}, provenance=provenance) as cache:
        cache.add(KEYS[0], np.ones((9, 32), np.float32))
    for command in (["summary"], ["stats"], ["verify"], ["repair"], ["report", "-o", tmp_path / "r.html"]):
        inspect(command[0], tmp_path / "cache", *command[1:])
    inspect("compare", tmp_path / "cache", tmp_path / "cache")
    assert json.loads(inspect("summary", tmp_path / "cache", "--json").stdout)["provenance"] == provenance
