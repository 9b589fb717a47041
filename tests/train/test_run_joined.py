"""Training from joined caches: equal to both towers on the fly, resumable, and refused where they do not fit."""

import json
import shutil

import pytest
import torch

import tiny
from cache.make import flip_bit
from commands import assert_same_outcome, outcome
from encoded import write_encoded
from llava_twophase import CacheWriter, FeatureCache
from llava_twophase.cache.check.verify import verify
from llava_twophase.cache.codec import Channels
from llava_twophase.cache.quarantine import Quarantined, write_quarantine
from llava_twophase.deploy.trained_projector import find_projector

FLAGS = {"logging_steps": 1, "num_train_epochs": 1}


@pytest.fixture(scope="module")
def coarse(plain_set, tmp_path_factory):
    """A CLIP tower of width 16 with 4 patches of crops of another size, and its cache."""
    folder = tmp_path_factory.mktemp("coarse")
    tower = folder / "tower"
    tiny.write_clip(tower, seed=7, image_size=60, patch_size=30, hidden_size=16)
    size = {"crop_size": {"height": 60, "width": 60}, "size": {"shortest_edge": 60}}
    tiny.write_preprocessor(tower, {**tiny.CLIP_PREPROCESSOR, **size})
    return tower, write_encoded(folder / "cache", tower, plain_set.folder, plain_set.keys)


@pytest.fixture(scope="module")
def siglip_cache(plain_set, tiny_siglip, tmp_path_factory):
    """A float32 cache of the plain scenes from SigLIP, in the reverse order of the records."""
    path = tmp_path_factory.mktemp("siglip") / "cache"
    return write_encoded(path, tiny_siglip, plain_set.folder, plain_set.keys[::-1])


@pytest.fixture
def joined(plain_cache, siglip_cache, tiny_clip, tiny_siglip):
    """The flags of the two caches and their towers."""
    return {"vision_tower": [tiny_clip, tiny_siglip], "feature_cache": [plain_cache, siglip_cache]}


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("workers", [0, 1])
def test_joined_caches_train_to_the_projector_of_both_towers_on_the_fly(workers, train_in_process, joined, plain_set):
    assert train_in_process("cached", **joined, **FLAGS) == (0, True)
    on_the_fly = {**joined, "feature_cache": None, "image_folder": plain_set.folder, "compute_dtype": "fp32"}
    assert train_in_process("fly", **on_the_fly, **FLAGS, dataloader_num_workers=workers) == (0, True)
    cached, fly = train_in_process.folder / "cached", train_in_process.folder / "fly"
    assert_same_outcome(outcome(cached), outcome(fly))
    towers = list(map(str, joined["vision_tower"]))
    for run in (cached, fly):
        config = read_json(run / "config.json")
        assert (config["mm_hidden_size"], config["mm_vision_tower"]) == (64, towers)
        assert outcome(run).projector["model.mm_projector.0.weight"].shape == (64, 64)
    caches = list(map(str, joined["feature_cache"]))
    fingerprints = {str(number): FeatureCache(path).fingerprint for number, path in enumerate(caches, start=1)}
    assert read_json(cached / "feature_cache.json") == {
        "path": caches,
        "fingerprint": {"joined": fingerprints, "interpolate_patch_grid": False},
    }
    assert not (fly / "feature_cache.json").exists()
    assert [verify(cache) for cache in caches] == [[], []]


def test_towers_of_other_compute_dtypes_train_on_the_fly_as_from_their_caches(
    train_in_process, joined, plain_set, tiny_siglip, tmp_path
):
    cache = write_encoded(tmp_path / "bf16", tiny_siglip, plain_set.folder, plain_set.keys, dtype=torch.bfloat16)
    caches = [joined["feature_cache"][0], cache]
    assert train_in_process("cached", **{**joined, "feature_cache": caches}, **FLAGS) == (0, True)
    on_the_fly = {**joined, "feature_cache": None, "image_folder": plain_set.folder, "compute_dtype": ["fp32", "bf16"]}
    assert train_in_process("fly", **on_the_fly, **FLAGS) == (0, True)
    folder = train_in_process.folder
    assert_same_outcome(outcome(folder / "cached"), outcome(folder / "fly"))
    assert find_projector(folder / "fly").tower_dtypes == ("float32", "bfloat16")
    assert find_projector(folder / "cached").tower_dtypes == ("float32", "bfloat16")


def test_interpolated_caches_train_to_the_projector_of_both_towers(train_in_process, joined, coarse, plain_set):
    flags = {**FLAGS, "interpolate_patch_grid": True, "vision_tower": [joined["vision_tower"][0], coarse[0]]}
    caches = [joined["feature_cache"][0], coarse[1]]
    assert train_in_process("cached", **flags, feature_cache=caches) == (0, True)
    assert train_in_process(
        "fly", **flags, feature_cache=None, image_folder=plain_set.folder, compute_dtype="fp32"
    ) == (0, True)
    folder = train_in_process.folder
    assert_same_outcome(outcome(folder / "cached"), outcome(folder / "fly"))
    config = read_json(folder / "cached" / "config.json")
    assert config["mm_hidden_size"] == 48 and config["mm_interpolate_patch_grid"] is True


def test_run_of_joined_caches_resumes_and_ends_with_the_same_projector(train_in_process, joined):
    constant = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "logging_steps": 1}
    assert train_in_process("out", **joined, **constant, max_steps=2) == (0, True)
    assert train_in_process("out", **joined, **constant, max_steps=5) == (0, True)
    assert train_in_process("uninterrupted", **joined, **constant, max_steps=5) == (0, True)
    folder = train_in_process.folder
    assert_same_outcome(outcome(folder / "out"), outcome(folder / "uninterrupted"))
    assert len(outcome(folder / "out").losses) == 5


@pytest.fixture
def refusal(train_in_process, capsys):
    """Run a command that must be refused before the LLM loads; return what it prints."""

    def start(name="refused", **flags):
        capsys.readouterr()
        assert train_in_process(name, **{**FLAGS, **flags}) == (1, False)
        return capsys.readouterr().err

    return start


def test_run_of_joined_caches_refuses_to_resume_with_other_caches(
    train_in_process, joined, refusal, plain_cache, plain_set, tiny_siglip, tmp_path
):
    assert train_in_process("out", **joined, **FLAGS, max_steps=2) == (0, True)
    other = write_encoded(tmp_path / "other", tiny_siglip, plain_set.folder, plain_set.keys, dtype=torch.float16)
    flag = "(--feature_cache, or --vision_tower and its flags)"
    said = refusal("out", **{**joined, "feature_cache": [plain_cache, other]}, max_steps=4)
    assert "features.joined.2.compute_dtype" in said and flag in said and "joined.1" not in said
    swapped = {name: paths[::-1] for name, paths in joined.items()}
    assert "features.joined.1.tower.model_type" in refusal("out", **swapped, max_steps=4)
    one = {name: paths[0] for name, paths in joined.items()}
    assert "features.joined" in refusal("out", **one, max_steps=4)


def test_joined_towers_with_other_token_counts_are_refused_with_the_flag(refusal, joined, coarse, plain_set):
    towers, caches = [joined["vision_tower"][0], coarse[0]], [joined["feature_cache"][0], coarse[1]]
    said = refusal(vision_tower=towers, feature_cache=caches)
    assert f"{caches[0]} has 16 tokens per image, {caches[1]} has 4" in said
    assert f"--interpolate_patch_grid True resamples the patch grid of {caches[1]}" in said
    said = refusal(vision_tower=towers, feature_cache=None, image_folder=plain_set.folder)
    assert f"--vision_tower {towers[0]} has 16 tokens per image, --vision_tower {towers[1]} has 4" in said


def test_joined_caches_in_the_other_order_than_their_towers_are_refused(refusal, joined):
    said = refusal(**{**joined, "feature_cache": joined["feature_cache"][::-1]})
    towers, caches = (" ".join(map(str, joined[name])) for name in ("vision_tower", "feature_cache"))
    assert said == (
        "error: --feature_cache has another order than --vision_tower; for the towers "
        f"{towers}, expected the caches {caches}\n"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vision_tower": 1}, "2 feature caches and 1 vision tower were given: joined caches need the tower of each"),
        ({"feature_cache": 1}, "1 feature cache and 2 vision towers were given: joined caches need the tower of each"),
        ({"vision_tower": 1, "feature_cache": 1, "interpolate_patch_grid": True}, "there is one vision tower"),
        (
            {"compute_dtype": ["fp32", "bf16", "fp32"]},
            "--compute_dtype fp32 bf16 fp32: expected bf16, fp16 or fp32, one",
        ),
        (
            {"interpolate_patch_grid": True, "mm_vision_select_feature": "cls_patch"},
            "a CLS token has no place in a patch grid",
        ),
    ],
)
def test_flags_of_joined_caches_that_do_not_fit_are_refused(changes, expected, refusal, joined):
    flags = {name: joined[name][:value] if name in joined else value for name, value in changes.items()}
    assert expected in refusal(**{**joined, **flags})


def test_settings_that_one_of_the_joined_caches_was_not_made_with_are_refused(
    refusal, joined, plain_set, tiny_siglip, tmp_path
):
    other = write_encoded(tmp_path / "other", tiny_siglip, plain_set.folder, plain_set.keys, select_layer=-1)
    said = refusal(**{**joined, "feature_cache": [joined["feature_cache"][0], other]})
    assert f"{other} was made with different settings" in said and str(joined["feature_cache"][0]) not in said
    assert "select_layer: the cache has -1, this run -2 (--mm_vision_select_layer)" in said


def test_images_that_one_of_the_joined_caches_lacks_are_reported_with_that_cache(
    refusal, joined, plain_set, tiny_siglip, tmp_path
):
    short = write_encoded(tmp_path / "short", tiny_siglip, plain_set.folder, plain_set.keys[2:])
    caches = [joined["feature_cache"][0], short]
    said = refusal(**{**joined, "feature_cache": caches})
    assert f"2 of 12 images have no features in {short}; extract them first" in said
    assert all(key in said for key in plain_set.keys[:2]) and f"features in {caches[0]}" not in said


def test_drop_quarantined_drops_the_quarantined_images_of_every_joined_cache(
    train_in_process, joined, plain_set, tiny_siglip, tiny_clip, tmp_path, caplog
):
    keys = plain_set.keys
    caches = [
        write_encoded(tmp_path / "first", tiny_clip, plain_set.folder, keys[1:]),
        write_encoded(tmp_path / "second", tiny_siglip, plain_set.folder, keys[:-1]),
    ]
    for cache, key in zip(caches, (keys[0], keys[-1]), strict=True):
        write_quarantine(cache, [Quarantined(key, "is empty")])
    flags = {**joined, "feature_cache": caches, "drop_quarantined": True}
    assert train_in_process(**flags, **FLAGS, max_steps=1) == (0, True)
    assert "--drop_quarantined: 2 of 12 records dropped" in caplog.text


def test_a_flipped_bit_in_one_of_the_joined_caches_ends_the_run(train_in_process, joined, plain_set, tmp_path, capsys):
    copy = shutil.copytree(joined["feature_cache"][1], tmp_path / "copy")
    flip_bit(copy, 0, 3)
    flags = {**joined, "feature_cache": [joined["feature_cache"][0], copy]}
    assert train_in_process(**flags, **FLAGS) == (1, True)
    said = capsys.readouterr().err
    assert f"'{plain_set.keys[::-1][3]}' do not match their checksum" in said and f"verify {copy}" in said


def test_joined_caches_of_other_dtypes_and_of_a_cache_writer_train(
    train_in_process, joined, plain_set, tmp_path, caplog
):
    """bf16 features of this project's tower, and int8 features of any other."""
    features = FeatureCache(joined["feature_cache"][1]).read(plain_set.keys)
    bf16, int8 = tmp_path / "bf16", tmp_path / "int8"
    channels = Channels(features.mean((0, 1)), features.std((0, 1)) + 0.1)
    with CacheWriter(bf16, features.shape[1:], "bfloat16", {"tower": "one"}) as cache:
        for key, row in zip(plain_set.keys, features, strict=True):
            cache.add(key, row)
    with CacheWriter(int8, features.shape[1:], "int8", {"tower": "two"}, channels=channels) as cache:
        for key, row in zip(plain_set.keys, features, strict=True):
            cache.add(key, row)
    flags = {"vision_tower": ["one", "two"], "feature_cache": [bf16, int8]}
    assert train_in_process(**flags, **FLAGS) == (0, True)
    assert len(outcome(train_in_process.folder / "out").losses) == 3
    assert caplog.text.count("not compared") == 2
    assert "joined features of 2 vision towers (one, two); LLaVA and LLaVA-NeXT have one tower" in caplog.text


def test_a_wrong_compute_dtype_of_towers_on_the_fly_is_reported(refusal, joined, plain_set):
    on_the_fly = {**joined, "feature_cache": None, "image_folder": plain_set.folder}
    said = refusal(**on_the_fly, compute_dtype="float16")
    assert "--compute_dtype float16: expected bf16, fp16 or fp32" in said and "Traceback" not in said
