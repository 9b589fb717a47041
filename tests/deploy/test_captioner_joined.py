"""A projector of joined towers: captioned and evaluated from pixels and from the caches, refused by other systems."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from commands import train_command, use_command
from encoded import encode_images, load_tower, write_encoded
from llava_twophase import Captioner, JoinedCaches, load_projector
from llava_twophase.deploy.cli import main
from llava_twophase.deploy.trained_projector import find_projector
from llava_twophase.errors import UserError
from llava_twophase.train.cli import main as train


@dataclass(frozen=True)
class JoinedRun:
    """A run of two joined towers, and its caches: the first in float32, the second of a tower in bfloat16."""

    run: Path
    caches: list
    towers: list


@pytest.fixture(scope="module")
def joined(plain_set, tiny_clip, tiny_siglip, tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("joined")
    caches = [
        write_encoded(folder / "clip", tiny_clip, plain_set.folder, plain_set.keys),
        write_encoded(folder / "siglip", tiny_siglip, plain_set.folder, plain_set.keys, dtype=torch.bfloat16),
    ]
    flags = {"vision_tower": [tiny_clip, tiny_siglip], "feature_cache": caches, "num_train_epochs": 1}
    command = train_command(data_path=plain_set.json, model_name_or_path=tiny_llama, output_dir=folder / "run", **flags)
    assert train(command[1:]) == 0
    return JoinedRun(folder / "run", list(map(str, caches)), [str(tiny_clip), str(tiny_siglip)])


def use(*words, **flags):
    return main(list(map(str, use_command(*words, **flags)))[1:])


def flags_of(caches):
    return [word for cache in caches for word in ("--feature_cache", cache)]


def test_find_projector_finds_the_towers_and_their_dtypes(joined):
    projector = find_projector(joined.run)
    assert list(projector.vision_towers) == joined.towers
    assert projector.tower_dtypes == ("float32", "bfloat16") and projector.interpolate_patch_grid is False
    assert [settings.select_layer for settings in projector.tower_settings] == [-2, -2]


def test_captioner_runs_both_towers_as_the_caches_have_them(joined, plain_set):
    keys = plain_set.keys[:3]
    cached = JoinedCaches(joined.caches).read_tensor(keys)
    captioner = Captioner.load(joined.run)
    features = captioner.features([plain_set.folder / key for key in keys])
    assert features.shape == (3, 16, 64) and torch.equal(features, cached)
    parts = [load_tower(joined.towers[0]), load_tower(joined.towers[1], dtype=torch.bfloat16)]
    expected = torch.cat([encode_images(tower, plain_set.folder, keys).float() for tower in parts], dim=2)
    assert torch.equal(features, expected)
    assert load_projector(joined.run)(cached).shape == (3, 16, 64)


def test_caption_is_the_same_from_pixels_and_from_both_caches(joined, plain_set, capsys):
    images = [plain_set.folder / key for key in plain_set.keys[:2]]
    assert use("caption", joined.run, *images, "--json") == 0
    pixels = [json.loads(line)["caption"] for line in capsys.readouterr().out.splitlines()]
    # Flags before the arguments: their values must not take the run or the images.
    assert use("caption", *flags_of(joined.caches), joined.run, *plain_set.keys[:2], "--json") == 0
    cached = [json.loads(line)["caption"] for line in capsys.readouterr().out.splitlines()]
    assert cached == pixels and len(pixels) == 2


def test_captioner_with_both_caches_loads_no_tower(joined, plain_set, tmp_path):
    towers = [str(tmp_path / "absent"), str(tmp_path / "none")]
    captioner = Captioner.load(joined.run, feature_cache=joined.caches, vision_tower=towers)
    assert isinstance(captioner(plain_set.keys[0]), str)


def test_an_image_that_one_cache_lacks_is_encoded_by_both_towers(joined, plain_set, tiny_siglip, tmp_path):
    keys = plain_set.keys[:3]
    short = write_encoded(tmp_path / "s", tiny_siglip, plain_set.folder, keys[1:], dtype=torch.bfloat16)
    captioner = Captioner.load(joined.run, feature_cache=[joined.caches[0], short])
    assert [captioner.images.has(key) for key in keys] == [False, True, True]
    images = [str(plain_set.folder / keys[0]), *keys[1:]]
    assert torch.equal(captioner.features(images), JoinedCaches(joined.caches).read_tensor(keys))


def test_evaluate_is_the_same_from_pixels_and_from_both_caches(joined, plain_set, capsys):
    flags = {"data_path": plain_set.json, "limit": 4, "candidates": 2}
    reports = []
    for source in (flags_of(joined.caches), ["--image_folder", plain_set.folder]):
        assert use("evaluate", joined.run, "--json", *source, **flags) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0]["records"] == reports[1]["records"] and reports[0]["evaluated_records"] == 4


@pytest.mark.parametrize("number", [1, 3])
def test_captioner_refuses_another_number_of_caches(number, joined, monkeypatch):
    monkeypatch.setattr("llava_twophase.deploy.captioner.read_causal_lm", lambda *_: pytest.fail("loaded the LLM"))
    with pytest.raises(UserError, match=f"{number} feature caches? and 2 vision towers were given"):
        Captioner.load(joined.run, feature_cache=[*joined.caches, *joined.caches][:number])


def test_captioner_refuses_caches_in_the_other_order(joined):
    with pytest.raises(UserError, match="--feature_cache has another order than --vision_tower"):
        Captioner.load(joined.run, feature_cache=joined.caches[::-1])


@pytest.mark.parametrize(
    ("words", "system"),
    [
        (("export", "RUN", "OUT", "--to", "hf"), "transformers' LLaVA takes one tower and cannot load it"),
        (("export", "RUN", "OUT", "--to", "gguf"), "llama.cpp's LLaVA takes one tower and cannot load it"),
        (("handover", "RUN"), "LLaVA (also LLaVA-NeXT) takes one tower and cannot load it"),
    ],
)
def test_other_systems_are_refused_with_what_can_load_the_projector(words, system, joined, tmp_path, capsys):
    names = {"RUN": joined.run, "OUT": tmp_path / "out"}
    assert use(*(names.get(word, word) for word in words)) == 1
    said = capsys.readouterr().err
    assert f"reads the joined features of 2 vision towers ({', '.join(joined.towers)})" in said and system in said
    assert "llava-use-projector caption and evaluate can" in said and not (tmp_path / "out").exists()
