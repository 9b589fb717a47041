"""``reencode``: bit-equal, different, or refused."""

import json
import shutil

import numpy as np
import pytest

import tiny
from cache.make import reseal, set_row
from drawn import COLOURS, draw
from helpers import run
from inspection.command import inspect
from llava_twophase import CacheWriter, FeatureCache

EXTRACT = "pipelines/extract_features.py"


def extract(image_set, tower, cache, *flags):
    run([
        "python", EXTRACT, "--data_path", image_set.json, "--image_folder", image_set.folder, "--vision_tower", tower,
        "--feature_cache", cache, "--num_workers", "0", "--device", "cpu", "--on_bad_image", "skip", *flags,
    ])  # fmt: skip
    return cache


def reencode(cache, images, *flags, expect=0):
    result = inspect("reencode", cache, "--image_folder", images, *flags, expect=expect)
    return json.loads(result.stdout) if "--json" in flags else result


@pytest.mark.parametrize("storage", ["auto", "int8"])
def test_odd_images_are_bit_equal(storage, image_set, tiny_clip, tmp_path):
    cache = extract(image_set, tiny_clip, tmp_path / "cache", "--storage_dtype", storage)
    values = reencode(cache, image_set.folder, "--json")
    assert values["verdict"] == "equal" and values["rows"] == values["equal_images"] == len(image_set.keys)
    assert values["changed_images"] == values["worst"] == [] and values["compute_dtype"] == "bfloat16"
    text = reencode(cache, image_set.folder).stdout
    assert text.startswith(f"bit-equal: {len(image_set.keys)} images give the features in the cache\n")


def test_padding_another_layer_and_another_tower_are_bit_equal(plain_set, tiny_dinov2, tmp_path):
    flags = ("--image_aspect_ratio", "pad", "--mm_vision_select_layer", "3", "--mm_vision_select_feature", "cls_patch")
    cache = extract(plain_set, tiny_dinov2, tmp_path / "cache", "--compute_dtype", "fp32", *flags)
    assert reencode(cache, plain_set.folder, "--n", "5", "--json")["equal_images"] == 5


def test_tower_that_moved_is_given(original, tmp_path):
    shutil.copytree(original.tower, tmp_path / "elsewhere")
    values = reencode(original.cache, original.images, "--vision_tower", tmp_path / "elsewhere", "--json")
    assert values["verdict"] == "equal"


def test_other_weights_are_refused_by_field(original, tmp_path):
    other = tiny.write_clip(tmp_path / "other", seed=9)
    result = reencode(original.cache, original.images, "--vision_tower", other, expect=1)
    assert result.stdout == "" and "is not the tower that made" in result.stderr
    assert "tower.weights_sha256: the cache has " in result.stderr and "processor" not in result.stderr


def test_another_kind_of_tower_is_refused(original, tiny_siglip):
    result = reencode(original.cache, original.images, "--vision_tower", tiny_siglip, expect=1)
    assert "tower.model_type: the cache has 'clip_vision_model', this tower 'siglip_vision_model'" in result.stderr


def test_changed_and_missing_images_are_skipped_and_reported(made):
    (made.images / made.keys[0]).unlink()
    draw((50, 50), COLOURS["red"]).save(made.images / made.keys[1])
    values = reencode(made.cache, made.images, "--json")
    assert sorted(values["changed_images"]) == sorted(made.keys[:2]) and values["equal_images"] == values["rows"] == 10


def test_sample_without_usable_images_is_an_error(made, tmp_path):
    (tmp_path / "nothing").mkdir()
    result = reencode(made.cache, tmp_path / "nothing", expect=1)
    assert "none of 12 images" in result.stderr


@pytest.mark.parametrize(("scale", "verdict"), [(1.002, "explained"), (1.3, "different")])
def test_verdict_depends_on_the_compute_dtype(scale, verdict, made):
    """Rows and checksums changed together, as another machine or another layer would write them."""
    bits = np.fromfile(made.cache / "shards/shard-000000.h5", np.uint8)

    def edit(data, header):
        part = header.datasets["features"]
        row = bits[part.offset : part.offset + part.row_bytes].view("<u2")
        values = (row.astype(np.uint32) << 16).view(np.float32) * np.float32(scale)
        rounded = ((values.view(np.uint32) + 0x8000) >> 16).astype("<u2")
        set_row(data, header, 0, rounded)

    reseal(made.cache, 0, edit)
    values = reencode(made.cache, made.images, "--json", expect=0 if verdict == "explained" else 1)
    assert values["verdict"] == verdict and values["equal_images"] == 11
    assert values["worst"][0][0] == made.keys[0] and values["device"]["then"] == values["device"]["now"]


def test_device_that_does_not_exist_is_refused(original):
    assert (
        "--device cuda:99 cannot be used"
        in reencode(original.cache, original.images, "--device", "cuda:99", expect=1).stderr
    )


def test_recorded_tower_that_is_gone_is_one_error(original, made):
    manifest = made.cache / "manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    content["provenance"]["vision_tower"] = "/none/tower"
    manifest.write_text(json.dumps(content), encoding="utf-8")
    errors = reencode(made.cache, made.images, expect=1).stderr
    assert errors.startswith(f"error: {made.cache} records '/none/tower' as its tower, which cannot be loaded; ")
    assert "if it has moved, give --vision_tower" in errors and "Traceback" not in errors
    del content["provenance"]["vision_tower"]
    manifest.write_text(json.dumps(content), encoding="utf-8")
    assert "does not record where its tower is" in reencode(made.cache, made.images, expect=1).stderr


@pytest.mark.parametrize("tower", ["", "none", "{llama}", "{images}"], ids=["empty", "missing", "llm", "images"])
def test_tower_that_is_not_one_is_one_error(tower, original, tiny_llama):
    tower = tower.format(llama=tiny_llama, images=original.images)
    errors = reencode(original.cache, original.images, "--vision_tower", tower, expect=1).stderr
    assert errors.startswith(f"error: --vision_tower {tower}") and "Traceback" not in errors


def test_image_file_that_is_not_recorded_is_compared_and_counted(original, tiny_clip, tmp_path):
    cache = FeatureCache(original.cache)
    with CacheWriter(
        tmp_path / "cache", cache.feature_shape, cache.dtype, cache.fingerprint, provenance=cache.manifest.provenance
    ) as copy:
        for key in original.keys:
            copy.add(key, cache.read([key])[0])
    values = reencode(tmp_path / "cache", original.images, "--json")
    assert values["verdict"] == "equal" and values["unverified_images"] == values["rows"] == 12
