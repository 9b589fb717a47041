"""The extraction command on one rank: what it writes, what it refuses, and what a second run does."""

import json
import os
import shutil
import signal
from importlib.metadata import version

import h5py
import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, CLIPVisionModel

import drawn
import tiny
from extract.server import files
from helpers import SCRIPTS, run
from llava_twophase import CacheWriter
from llava_twophase.cache.check.verify import verify
from llava_twophase.cache.manifest import read_manifest
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.cache.session import CacheSession
from llava_twophase.errors import UserError
from llava_twophase.vision.images import decode

# Steps (see extract/server.py) after which about half of the shards are sealed.
STEPS_TO_HALF = 30
COMMAND = SCRIPTS["llava-extract-features"]


def test_extract_writes_a_complete_cache_and_a_second_run_changes_no_file(command, image_set, tiny_clip, tmp_path):
    cache = tmp_path / "cache"
    done = run(["python", COMMAND, *command(num_workers=2)])
    assert done.stdout == ""
    assert "29 to encode into 4 shards" in done.stderr and "complete, 29 images in 4 shards" in done.stderr
    assert "bound by:" in done.stderr and "1 image with more than 8 bits" in done.stderr
    assert sorted(files(cache)) == ["manifest.json", *(f"shards/shard-{number:06d}.h5" for number in range(4))]
    assert [entry.rows for entry in read_manifest(cache).shards] == [8, 8, 8, 5]
    assert list(FeatureCache(cache).keys()) == image_set.keys
    assert verify(cache) == []
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    again = run(["python", COMMAND, *command()])
    assert "29 images are cached, nothing to do" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_features_equal_those_of_transformers(server, command, image_set, tiny_clip, tmp_path, dtype, feature):
    """The same batches through the processor and the complete tower, as in LLaVA, give the same bits."""
    flags = {"compute_dtype": dtype, "mm_vision_select_feature": feature, "mm_vision_select_layer": -3}
    server.run(command(**flags))
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    processor = AutoImageProcessor.from_pretrained(tiny_clip, backend="pil")
    cache = FeatureCache(tmp_path / "cache")
    attention = cache.fingerprint["tower"]["attention"]
    model = CLIPVisionModel.from_pretrained(tiny_clip, dtype=torch_dtype, attn_implementation=attention).eval()
    shards = [image_set.keys[start : start + 8] for start in range(0, 29, 8)]
    for batch in [shard[start : start + 3] for shard in shards for start in range(0, len(shard), 3)]:
        pictures = [np.asarray(decode((image_set.folder / key).read_bytes())) for key in batch]
        pixels = [
            processor(p, input_data_format="channels_last", return_tensors="pt")["pixel_values"] for p in pictures
        ]
        with torch.inference_mode():
            # Two at a time, as ours on a CPU: how a product rounds depends on its shape.
            parts = [model(p, output_hidden_states=True) for p in torch.cat(pixels).to(torch_dtype).split(2)]
            hidden = torch.cat([part.hidden_states[-3] for part in parts])
        assert torch.equal(cache.read_tensor(batch), hidden[:, 1:] if feature == "patch" else hidden)


@pytest.mark.parametrize("tower", ["tiny_siglip", "tiny_dinov2", "tiny_clip_full"])
def test_extract_supports_every_kind_of_tower(server, command, tmp_path, tower, request):
    server.run(command(vision_tower=request.getfixturevalue(tower)))
    assert FeatureCache(tmp_path / "cache").feature_shape == (16, 32)


def test_json_lines_give_the_same_cache_as_json(server, command, image_set, expected_files, tmp_path):
    server.run(command(data_path=image_set.jsonl))
    assert files(tmp_path / "cache") == expected_files


def test_decode_workers_do_not_change_the_cache(server, command, expected_files, tmp_path):
    server.run(command(num_workers=3))
    assert files(tmp_path / "cache") == expected_files


def test_new_records_extend_the_cache_with_new_shards(server, command, image_set, tmp_path):
    cache = tmp_path / "cache"
    server.run(command(data_path=drawn.write_records(image_set.records[:12], tmp_path / "some.json")))
    before = files(cache)
    log = server.run(command())
    assert "12 images cached, 17 to encode into 3 shards" in log
    after = files(cache)
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: content for name, content in before.items() if name != "manifest.json"
    }
    assert list(FeatureCache(cache).keys()) == image_set.keys
    assert "nothing to do" in server.run(command(data_path=tmp_path / "some.json"))
    assert verify(cache) == []


def test_fewer_records_do_not_change_the_cache(server, command, image_set, expected_files, tmp_path):
    server.run(command())
    log = server.run(command(data_path=drawn.write_records(image_set.records[:5], tmp_path / "some.json")))
    assert "5 images are cached" in log
    assert files(tmp_path / "cache") == expected_files


def test_different_settings_are_refused_field_by_field(server, command, tmp_path, tiny_dinov2, expected_files):
    server.run(command())
    changed = {"compute_dtype": "bf16", "mm_vision_select_layer": -1, "image_aspect_ratio": "pad"}
    log = server.run(command(**changed), expect=1)
    for line in (
        "select_layer: the cache has -2, this run -1",
        "image_aspect_ratio: the cache has 'square', this run 'pad'",
        "compute_dtype: the cache has 'float32', this run 'bfloat16'",
        "storage_dtype: the cache has 'float32', this run 'bfloat16'",
    ):
        assert line in log
    assert "tower.weights_sha256" not in log  # it is the same tower
    assert "tower.model_type" in server.run(command(vision_tower=tiny_dinov2), expect=1)
    other = tiny.write_clip(tmp_path / "other", seed=9)
    assert "tower.weights_sha256" in server.run(command(vision_tower=other), expect=1)
    assert files(tmp_path / "cache") == expected_files


def test_a_lost_shard_is_extracted_again_alone(server, command, expected_files, tmp_path):
    server.run(command())
    (tmp_path / "cache/shards/shard-000001.h5").unlink()
    log = server.run(command())
    assert "shard-000001.h5 is missing" in log and "8 to encode into 1 shard of" in log
    assert files(tmp_path / "cache") == expected_files


def test_a_truncated_shard_is_reported(server, command, expected_files, tmp_path):
    server.run(command())
    path = tmp_path / "cache/shards/shard-000002.h5"
    path.write_bytes(path.read_bytes()[:-1])
    log = server.run(command(), expect=1)
    assert "shard-000002.h5 is truncated" in log
    path.unlink()
    server.run(command())
    assert files(tmp_path / "cache") == expected_files


def test_a_folder_that_is_not_a_cache_is_unchanged(server, command, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.tex").write_text("precious", encoding="utf-8")
    assert "is not a feature cache" in server.run(command(), expect=1)
    assert files(tmp_path / "cache") == {"thesis.tex": b"precious"}


def test_a_cache_may_have_a_name_outside_the_locale(command, tmp_path):
    cache = tmp_path / "Merkmale 雪"
    run(["python", COMMAND, *command(feature_cache=cache)], LC_ALL="C", LANG="C", PYTHONUTF8=None)
    assert len(FeatureCache(cache)) == 29


def test_problems_of_the_input_exit_with_1_and_one_line(server, command, tmp_path):
    for changes, message in (
        ({"image_folder": tmp_path / "nowhere"}, "does not exist; expected a folder"),
        ({"vision_tower": tmp_path / "nowhere"}, "there is no such folder"),
        ({"data_path": tmp_path / "nowhere.json"}, "does not exist"),
        ({"mm_vision_select_layer": 9}, "hidden states 0 to 4"),
        ({"device": "cuda:77"}, "--device"),
    ):
        log = server.run(command(**changes), expect=1)
        assert "error: " in log and message in log and "Traceback" not in log
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_features_that_are_not_finite_are_refused(server, command, tiny_clip, tmp_path):
    folder = shutil.copytree(tiny_clip, tmp_path / "tower")
    model = CLIPVisionModel.from_pretrained(folder)
    with torch.no_grad():
        dict(model.named_parameters())["embeddings.patch_embedding.weight"].mul_(1e30)
    model.save_pretrained(folder)
    log = server.run(command(vision_tower=folder), expect=1)
    assert "are not finite" in log and "00000/000000000.png" in log


def test_extraction_reports_duplicate_images(server, command, image_set, tmp_path):
    folder = shutil.copytree(image_set.folder, tmp_path / "images")
    records = list(image_set.records)
    for name in ("placeholder_1.png", "placeholder_2.png"):
        shutil.copy(folder / image_set.keys[0], folder / name)
        records.append(drawn.make_record(name, name, "not available"))
    log = server.run(command(image_folder=folder, data_path=drawn.write_records(records, tmp_path / "r.json")))
    assert f"keys are duplicates of 1 image file, byte for byte: {image_set.keys[0]} (3 keys)" in log


@pytest.mark.parametrize("spelling", ["{}/", "{}/../{name}", "relative"])
def test_a_tower_is_identified_by_its_content_not_its_name(
    server, command, tiny_clip, expected_files, tmp_path, spelling
):
    """The second half is extracted with another name of the same tower: the same bytes as with one name."""
    flags = command()
    server.run(flags, expect=-signal.SIGKILL, crash_at=STEPS_TO_HALF)
    name = os.path.relpath(tiny_clip) if spelling == "relative" else spelling.format(tiny_clip, name=tiny_clip.name)
    log = server.run(command(vision_tower=name))
    assert "other software" not in log
    assert files(tmp_path / "cache") == expected_files


def test_another_tower_under_the_same_name_is_refused(server, command, tmp_path):
    tower = tiny.write_clip(tmp_path / "tower")
    server.run(command(vision_tower=tower))
    tiny.write_clip(tower, seed=9)
    assert "tower.weights_sha256: the cache has" in server.run(command(vision_tower=tower), expect=1)


def software_of(cache, number):
    with h5py.File(cache / "shards" / f"shard-{number:06d}.h5") as file:
        return json.loads(file.attrs["provenance"])


def made_elsewhere(cache):
    """Change the versions that a manifest records, as if it had been made on another machine."""
    path = cache / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["provenance"]["software"].update(torch="2.6.0", transformers="5.99.0")
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def test_new_shards_record_their_own_software_and_a_warning_names_both(server, command, image_set, tmp_path):
    cache = tmp_path / "cache"
    server.run(command(data_path=drawn.write_records(image_set.records[:8], tmp_path / "some.json")))
    made_elsewhere(cache)
    current = {name: version(name) for name in ("torch", "transformers")}
    log = server.run(command(), expect=-signal.SIGKILL, crash_at=STEPS_TO_HALF)
    assert f"torch 2.6.0 -> {current['torch']}" in log and f"transformers 5.99.0 -> {current['transformers']}" in log
    server.run(command())
    manifest = read_manifest(cache)
    assert manifest.provenance["software"]["torch"] == "2.6.0" and manifest.software["torch"] == current["torch"]
    assert [software_of(cache, number)["torch"] for number in (1, 2, 3)] == [current["torch"]] * 3
    assert verify(cache) == []
    before = files(cache)
    assert "nothing to do" in server.run(command())
    (cache / "shards" / "shard-000002.h5").unlink()
    server.run(command())  # the same plan again: the same bytes
    assert files(cache) == before


def test_a_resumed_plan_keeps_the_software_that_it_recorded(server, command, tmp_path):
    cache = tmp_path / "cache"
    server.run(command(), expect=-signal.SIGKILL, crash_at=STEPS_TO_HALF)
    made_elsewhere(cache)
    log = server.run(command())
    assert "the interrupted run had other software: torch 2.6.0 -> " in log
    sealed = len(list((cache / "shards").glob("*.h5")))
    assert sealed == 4 and software_of(cache, 3)["torch"] == "2.6.0"


def test_a_cache_that_another_process_changed_meanwhile_is_not_overwritten(tmp_path):
    """The plan is made before the lock is taken, because loading the tower takes long."""
    with CacheWriter(tmp_path, (2, 4), "float32", {"a": 1}) as cache:
        cache.add("a", np.zeros((2, 4), np.float32))
    seen = read_manifest(tmp_path)
    with CacheWriter(tmp_path, (2, 4), "float32", {"a": 1}) as cache:
        cache.add("b", np.zeros((2, 4), np.float32))
    with CacheSession(tmp_path) as session, pytest.raises(UserError, match="another process has changed"):
        session.require_unchanged(seen)
    with CacheSession(tmp_path) as session:
        session.require_unchanged(read_manifest(tmp_path))
