"""The tower built up to one layer gives the bits of the complete one, for every kind of tower and every layer."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, Dinov2Model, SiglipVisionModel

import tiny
from llava_twophase.errors import UserError
from llava_twophase.vision.images import decode
from llava_twophase.vision.preprocess import Preprocessor
from llava_twophase.vision.tower import VisionTower

CLASSES = {"tiny_clip": CLIPVisionModel, "tiny_siglip": SiglipVisionModel, "tiny_dinov2": Dinov2Model}
LAYERS = [-1, -2, -5, 0, 2, 4]


def tower_of(folder, **options):
    return VisionTower(str(folder), Preprocessor(str(folder)), **options)


@pytest.fixture(params=CLASSES)
def kind(request):
    return request.param


@pytest.fixture
def folder(request, kind):
    return request.getfixturevalue(kind)


@pytest.fixture(scope="module")
def crops(image_set, tiny_clip):
    preprocessor = Preprocessor(tiny_clip)
    pictures = [decode((image_set.folder / key).read_bytes()) for key in image_set.keys[:8]]
    return torch.from_numpy(np.stack([preprocessor.crop(picture) for picture in pictures]))


def complete_tower(kind, folder, crops, layer, dtype):
    """LLaVA's way: run the complete tower and select one of its hidden states."""
    # In float32 and float16 LLaVA's attention is the eager one; in bfloat16 the fast kernel rounds alike.
    attention = "sdpa" if dtype == torch.bfloat16 else "eager"
    model = CLASSES[kind].from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
    with torch.inference_mode():
        pixels = Preprocessor(folder).pixel_values(crops).to(dtype)
        # Two at a time, as ours on a CPU: how a product rounds depends on its shape.
        parts = [model(pixel_values=part, output_hidden_states=True) for part in pixels.split(2)]
        return torch.cat([part.hidden_states[layer] for part in parts])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encode_is_bit_equal_to_the_complete_tower(kind, folder, crops, layer, dtype):
    wanted = complete_tower(kind, folder, crops, layer, dtype)
    skip = 0 if kind == "tiny_siglip" else 1
    for feature, expected in (("patch", wanted[:, skip:]), ("cls_patch", wanted)):
        tower = tower_of(folder, select_layer=layer, select_feature=feature, dtype=dtype)
        found = tower.encode(crops)
        assert found.dtype == dtype and found.shape[1:] == tower.feature_shape
        assert torch.equal(found, expected)


def test_fingerprint_spells_a_layer_one_way(folder):
    counted, negative = tower_of(folder, select_layer=3), tower_of(folder, select_layer=-2)
    assert counted.fingerprint() == negative.fingerprint()
    assert counted.fingerprint()["select_layer"] == -2


def test_fingerprint_of_several_layers_is_a_list(tiny_clip):
    one, several = tower_of(tiny_clip), tower_of(tiny_clip, select_layer=(3, -5, 1))
    assert tower_of(tiny_clip, select_layer=(-2,)).fingerprint() == one.fingerprint()
    assert several.fingerprint() == {**one.fingerprint(), "select_layer": [-2, -5, -4]}


def test_tower_refuses_a_layer_that_is_listed_twice(tiny_clip):
    with pytest.raises(UserError, match="--mm_vision_select_layer -2 3: a layer is listed twice"):
        tower_of(tiny_clip, select_layer=(-2, 3))


def test_encode_ignores_the_text_tower_of_a_clip_model(tiny_clip, tiny_clip_full, crops):
    one, other = tower_of(tiny_clip), tower_of(tiny_clip_full)
    assert torch.equal(one.encode(crops), other.encode(crops))
    assert one.fingerprint() == other.fingerprint()


def test_fingerprint_is_json_and_depends_on_the_weights(tiny_clip, tmp_path):
    before = tower_of(tiny_clip).fingerprint()
    assert json.dumps(before)
    other = tiny.write_clip(tmp_path, seed=99)
    after = tower_of(other).fingerprint()
    assert before["tower"].pop("weights_sha256") != after["tower"].pop("weights_sha256")
    assert before == after


def test_encode_depends_on_the_batch_only_by_rounding(folder, crops):
    tower = tower_of(folder)
    together, alone = tower.encode(crops), torch.cat([tower.encode(crop[None]) for crop in crops])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_tower_has_no_trainable_parameters(folder):
    tower = tower_of(folder)
    assert not isinstance(tower, torch.nn.Module)
    assert not tower.encode(torch.zeros(1, 56, 56, 3, dtype=torch.uint8)).requires_grad


@pytest.mark.parametrize("layer", [5, -6, 99])
def test_tower_refuses_a_missing_layer(folder, layer):
    with pytest.raises(UserError, match="hidden states 0 to 4"):
        tower_of(folder, select_layer=layer)


def test_tower_refuses_an_unknown_feature(tiny_clip):
    with pytest.raises(UserError, match="patch or cls_patch"):
        tower_of(tiny_clip, select_feature="cls")


def test_tower_refuses_other_model_types(tiny_clip, tiny_llama):
    with pytest.raises(UserError, match="is a llama; supported towers: clip_vision_model"):
        VisionTower(str(tiny_llama), Preprocessor(tiny_clip))


def test_tower_refuses_a_crop_of_another_size(tiny_clip, tmp_path):
    folder = shutil.copytree(tiny_clip, tmp_path / "tower")
    side = {"height": 70, "width": 70}
    tiny.write_preprocessor(folder, {**tiny.CLIP_PREPROCESSOR, "crop_size": side, "size": {"shortest_edge": 70}})
    with pytest.raises(UserError, match="crops to 70 px"):
        tower_of(folder)


def test_tower_refuses_missing_weights(tiny_clip, tmp_path):
    folder = shutil.copytree(tiny_clip, tmp_path / "tower")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.0.mlp.fc1.weight" in name)
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks or misshapes"):
        tower_of(folder)


def test_tower_refuses_a_folder_without_weights(tiny_clip, tmp_path):
    folder = shutil.copytree(tiny_clip, tmp_path / "tower", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match="weights could not be loaded"):
        tower_of(folder)


@pytest.mark.parametrize(
    ("name", "keep", "content", "message"),
    [
        ("model.safetensors", 5000, b"", "its weights could not be loaded: SafetensorError"),
        (
            "config.json",
            0,
            b'{"model_type": "clip_vision_model", "hidden_size": "x"}',
            "Field 'hidden_size' expected int",
        ),
        ("preprocessor_config.json", 0, b"[]", "no image processor could be loaded: AttributeError"),
        (
            "preprocessor_config.json",
            0,
            b'{"image_processor_type": "CLIPImageProcessor", "resample": 77}',
            "its image processor does not work: Unknown resampling filter",
        ),
    ],
)
def test_tower_reports_damaged_files(tiny_clip, tmp_path, name, keep, content, message):
    """A truncated download, and files that somebody edited."""
    folder = shutil.copytree(tiny_clip, tmp_path / "tower")
    (folder / name).write_bytes((folder / name).read_bytes()[:keep] + content)
    with pytest.raises(UserError, match=message):
        tower_of(folder)


def test_tower_refuses_a_missing_folder(tmp_path, tiny_clip):
    with pytest.raises(UserError, match="could not be loaded"):
        VisionTower(str(tmp_path / "nowhere"), Preprocessor(tiny_clip))
