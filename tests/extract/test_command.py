"""The extraction command on one rank: what it writes, what it refuses, and that it goes on where it was."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, CLIPVisionModel

import drawn
import tiny
from extract.server import files
from helpers import SCRIPTS, run
from llava_twophase.cache.check.verify import verify
from llava_twophase.cache.manifest import read_manifest
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.vision.images import decode

COMMAND = SCRIPTS["llava-extract-features"]


def test_a_first_run_as_a_user_starts_it(command, image_set, tiny_clip, tmp_path):
    cache = tmp_path / "cache"
    done = run(["python", COMMAND, *command(num_workers=2)])
    assert done.stdout == ""
    assert "29 to encode into 4 shards" in done.stderr and "complete, 29 images in 4 shards" in done.stderr
    assert "bound by:" in done.stderr and "1 images have more than 8 bits" in done.stderr
    assert sorted(files(cache)) == ["manifest.json", *(f"shards/shard-{number:06d}.h5" for number in range(4))]
    assert [entry.rows for entry in read_manifest(cache).shards] == [8, 8, 8, 5]
    assert list(FeatureCache(cache).keys()) == image_set.keys
    assert verify(cache) == []
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    again = run(["python", COMMAND, *command()])
    assert "all 29 images are cached, nothing to do" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_features_are_those_of_transformers(server, command, image_set, tiny_clip, tmp_path, dtype, feature):
    """The same batches through the processor and the whole tower, LLaVA's way: the same bits."""
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
def test_every_kind_of_tower(server, command, tmp_path, tower, request):
    server.run(command(vision_tower=request.getfixturevalue(tower)))
    assert FeatureCache(tmp_path / "cache").feature_shape == (16, 32)


def test_json_lines_give_the_same_cache(server, command, image_set, whole, tmp_path):
    server.run(command(data_path=image_set.jsonl))
    assert files(tmp_path / "cache") == whole


def test_decode_workers_change_nothing(server, command, whole, tmp_path):
    server.run(command(num_workers=3))
    assert files(tmp_path / "cache") == whole


def subset(image_set, count, path):
    return drawn.write_records([r for r in image_set.records if r["image"] in image_set.keys[:count]], path)


def test_new_records_extend_the_cache(server, command, image_set, tmp_path):
    cache = tmp_path / "cache"
    server.run(command(data_path=subset(image_set, 12, tmp_path / "some.json")))
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


def test_records_that_shrink_leave_the_cache_alone(server, command, image_set, whole, tmp_path):
    server.run(command())
    log = server.run(command(data_path=subset(image_set, 5, tmp_path / "some.json")))
    assert "all 5 images are cached" in log
    assert files(tmp_path / "cache") == whole


def test_another_setting_is_refused_field_by_field(server, command, tmp_path, tiny_dinov2, whole):
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
    assert "tower.model_type" in server.run(command(vision_tower=tiny_dinov2), expect=1)
    other = tiny.write_clip(tmp_path / "other", seed=9)
    assert "tower.weights_sha256" in server.run(command(vision_tower=other), expect=1)
    assert files(tmp_path / "cache") == whole


def test_a_lost_shard_comes_back_alone(server, command, whole, tmp_path):
    server.run(command())
    (tmp_path / "cache/shards/shard-000001.h5").unlink()
    log = server.run(command())
    assert "shard-000001.h5 is missing" in log and "8 to encode into 1 shards" in log
    assert files(tmp_path / "cache") == whole


def test_a_truncated_shard_is_named(server, command, whole, tmp_path):
    server.run(command())
    path = tmp_path / "cache/shards/shard-000002.h5"
    path.write_bytes(path.read_bytes()[:-1])
    log = server.run(command(), expect=1)
    assert "shard-000002.h5 is truncated" in log
    path.unlink()
    server.run(command())
    assert files(tmp_path / "cache") == whole


def test_a_folder_that_is_no_cache_is_left_alone(server, command, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.tex").write_text("precious", encoding="utf-8")
    assert "is not a feature cache" in server.run(command(), expect=1)
    assert files(tmp_path / "cache") == {"thesis.tex": b"precious"}


def test_a_cache_with_a_name_that_no_locale_knows(command, tmp_path):
    cache = tmp_path / "Merkmale 雪"
    run(["python", COMMAND, *command(feature_cache=cache)], LC_ALL="C", LANG="C", PYTHONUTF8=None)
    assert len(FeatureCache(cache)) == 29


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "0"], "not positive"),
        (["--batchsize", "4"], "unrecognized arguments"),
        (["--mm_vision_select_feature", "cls"], "invalid choice"),
        (["--json"], "--json needs --plan"),
        (["--llm", "13B"], "--llm needs --plan"),
        (["--plan", "--runs", "3"], "--runs needs --llm"),
        (["--num_workers", "-1"], "negative"),
    ],
)
def test_wrong_usage_exits_with_2(server, command, flags, message):
    assert message in server.run([*command(), *flags], expect=2)


def test_problems_exit_with_1_and_one_line(server, command, tmp_path):
    for changes, message in (
        ({"image_folder": tmp_path / "nowhere"}, "neither a folder nor"),
        ({"vision_tower": tmp_path / "nowhere"}, "could"),
        ({"data_path": tmp_path / "nowhere.json"}, "does not exist"),
        ({"mm_vision_select_layer": 9}, "hidden states 0 to 4"),
        ({"device": "cuda:77"}, "--device"),
    ):
        log = server.run(command(**changes), expect=1)
        assert "error: " in log and message in log and "Traceback" not in log
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_features_that_are_not_finite_end_the_run(server, command, tiny_clip, tmp_path):
    folder = shutil.copytree(tiny_clip, tmp_path / "tower")
    model = CLIPVisionModel.from_pretrained(folder)
    with torch.no_grad():
        dict(model.named_parameters())["embeddings.patch_embedding.weight"].mul_(1e30)
    model.save_pretrained(folder)
    log = server.run(command(vision_tower=folder), expect=1)
    assert "are not finite" in log and "00000/000000000.png" in log


def test_plan_writes_nothing_and_says_all(server, command, image_set, tmp_path):
    log = server.run([*command(), "--plan"])
    assert "30, with 29 images (1 of them in several records)" in log
    assert not (tmp_path / "cache").exists()
    server.run(command(data_path=subset(image_set, 12, tmp_path / "some.json")))
    before = files(tmp_path / "cache")
    done = run(["python", COMMAND, *command(), "--plan", "--json"])
    plan = json.loads(done.stdout)
    expected = {"records": 30, "images": 29, "repeated": 1, "cached": 12, "to_encode": 17, "shards": 3, "fits": True}
    assert {name: plan[name] for name in expected} == expected
    assert plan["bytes"] == 17 * 16 * 32 * 4 and plan["seconds"] > 0 and plan["images_per_second"] > 0
    assert files(tmp_path / "cache") == before


def test_plan_exits_with_1_where_the_work_cannot_be_done(server, command, image_set, tmp_path):
    records = [*image_set.records, drawn.make_record("x", "gone.jpg", "x")]
    path = drawn.write_records(records, tmp_path / "r.json")
    log = server.run([*command(data_path=path), "--plan"], expect=1)
    assert "1 are missing" in log and "gone.jpg: the file is missing" in log
    server.run([*command(data_path=path, on_bad_image="skip"), "--plan"])


def test_plan_and_time_of_a_complete_cache(server, command):
    server.run(command())
    assert "to encode   0" in server.run([*command(), "--plan"])


def test_extraction_reports_duplicate_images(server, command, image_set, tmp_path):
    folder = shutil.copytree(image_set.folder, tmp_path / "images")
    records = list(image_set.records)
    for name in ("placeholder_1.png", "placeholder_2.png"):
        shutil.copy(folder / image_set.keys[0], folder / name)
        records.append(drawn.make_record(name, name, "not available"))
    log = server.run(command(image_folder=folder, data_path=drawn.write_records(records, tmp_path / "r.json")))
    assert f"keys are duplicates of 1 image files, byte for byte: {image_set.keys[0]} (3 keys)" in log
