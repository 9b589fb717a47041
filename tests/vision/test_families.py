"""Every family of towers gives the bits of its own `hidden_states` in transformers, from its own image processor."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoImageProcessor

import drawn
import tiny
from llava_twophase.errors import UserError
from llava_twophase.vision.families import FAMILIES, UNSUPPORTED
from llava_twophase.vision.preprocess import Preprocessor
from llava_twophase.vision.tower import VisionTower
from vision import tiny_towers

PICTURES = [drawn.draw(size, (10, 200, 90)) for size in ((64, 80), (90, 60), (56, 56))]
TEXT_SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT_SHAPE |= {"vocab_size": 64, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def tower_of(folder, **options):
    return VisionTower(str(folder), Preprocessor(str(folder)), **options)


def encode(tower):
    return tower.encode(torch.from_numpy(np.stack([tower.preprocessor.crop(picture) for picture in PICTURES])))


def processor_of(folder, family):
    """The family's own image processor, or the Pillow one with its settings if it has no Pillow version."""
    if family.processor == "DINOv3ViTImageProcessor":
        return transformers.ViTImageProcessorPil.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert type(processor).__name__.removesuffix("Pil") == family.processor
    return processor


def hidden_states_of(folder, family, pixels):
    """All hidden states of the complete model, two images at a time as `encode` runs on a CPU."""
    model = getattr(transformers, family.model_class).from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        parts = [model(pixel_values=part, output_hidden_states=True).hidden_states for part in pixels.split(2)]
    return [torch.cat(states) for states in zip(*parts, strict=True)]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_encode_is_bit_equal_to_hidden_states_at_every_layer(tmp_path, model_type):
    family, folder = FAMILIES[model_type], tiny_towers.write(tmp_path, model_type)
    processor = processor_of(folder, family)
    pixels = torch.cat([processor(picture, return_tensors="pt")["pixel_values"] for picture in PICTURES])
    states = hidden_states_of(folder, family, pixels)
    prefix = states[0].shape[1] - tiny.TOKENS
    assert len(states) == 5 and prefix == family.prefix_tokens(transformers.AutoConfig.from_pretrained(folder))
    for layer, state in enumerate(states):
        patches = state[:, prefix:]
        with_cls = torch.cat([state[:, :1], patches], dim=1) if family.leading_tokens else patches
        for feature, expected in (("patch", patches), ("cls_patch", with_cls)):
            tower = tower_of(folder, select_layer=layer, select_feature=feature)
            assert tower.grid == (4, 4) and tower.feature_shape == tuple(expected.shape[1:])
            assert torch.equal(encode(tower), expected), (layer, feature)
    several = tower_of(folder, select_layer=(-2, 0, -4))
    assert several.feature_shape == (16, 96)
    assert torch.equal(encode(several), torch.cat([states[layer][:, prefix:] for layer in (-2, 0, -4)], dim=-1))


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if family.any_size])
def test_tower_scales_positions_to_another_crop(tmp_path, model_type):
    folder = tiny_towers.write(tmp_path, model_type)
    side = {"height": 84, "width": 84}
    settings = {**tiny.DINOV2_PREPROCESSOR, "crop_size": side, "size": {"shortest_edge": 84}}
    tiny.write_preprocessor(folder, settings)
    tower = tower_of(folder, select_layer=-1)
    assert tower.grid == (6, 6)
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(PICTURES, return_tensors="pt")["pixel_values"]
    expected = hidden_states_of(folder, FAMILIES[model_type], pixels)[-1]
    assert torch.equal(encode(tower), expected[:, -36:])


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if not family.any_size])
def test_tower_refuses_another_crop_than_the_configured(tmp_path, model_type):
    folder = tiny_towers.write(tmp_path, model_type)
    settings = {**tiny.CLIP_PREPROCESSOR, "crop_size": {"height": 70, "width": 70}, "size": {"shortest_edge": 70}}
    with pytest.raises(UserError, match="crops to 70 px, but the tower takes 56 px"):
        tower_of(tiny.write_preprocessor(folder, settings))


@pytest.mark.parametrize("name", ["Siglip", "MetaClip2", "ChineseCLIP"])
def test_encode_reads_a_published_model_with_text_tower(tmp_path, name):
    """Published CLIP-like models have a text tower; SigLIP 2 of fixed resolution is a SiglipModel."""
    config_class, model_class = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}Model")
    model = tiny.redraw(model_class(config_class(text_config=TEXT_SHAPE, vision_config=tiny.VISION_SHAPE)), 2)
    model.save_pretrained(tmp_path)
    tower = tower_of(tiny.write_preprocessor(tmp_path, tiny.SIGLIP_PREPROCESSOR))
    model.vision_model.set_attn_implementation("eager")
    crops = torch.randint(0, 256, (2, 56, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        pixels = tower.preprocessor.pixel_values(crops)
        states = model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert torch.equal(tower.encode(crops), states[-2][:, -tiny.TOKENS :])


def test_preprocessor_of_dinov3_differs_from_a_float_resize_by_one_step_at_most(tmp_path):
    # What torchvision does for DINOv3: rescale, resize with antialiasing in float32, normalise.
    preprocessor = Preprocessor(str(tiny_towers.write(tmp_path, "dinov3_vit")))
    assert preprocessor.settings()["class"] == "ViTImageProcessorPil"
    for picture in PICTURES:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
        resized = torch.nn.functional.interpolate(
            pixels, size=(56, 56), mode="bilinear", antialias=True, align_corners=False
        )
        found = torch.from_numpy(preprocessor.crop(picture)).permute(2, 0, 1)
        assert (found - 255 * resized[0]).abs().max() <= 1


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_tower_refuses_unsupported_towers_with_the_reason(tmp_path, monkeypatch, tiny_clip, model_type):
    config = transformers.PretrainedConfig()
    config.model_type = model_type
    monkeypatch.setattr("llava_twophase.vision.tower.AutoConfig.from_pretrained", lambda _: config)
    with pytest.raises(UserError) as error:
        VisionTower("some/model", Preprocessor(tiny_clip))
    assert UNSUPPORTED[model_type] in str(error.value) and ", ".join(FAMILIES) in str(error.value)


def test_fingerprint_has_the_fields_of_the_family(tmp_path):
    folders = [tiny_towers.write(tmp_path / str(count), "dinov3_vit", num_register_tokens=count) for count in (3, 5)]
    towers = [tower_of(folder).fingerprint()["tower"] for folder in folders]
    assert [tower["num_register_tokens"] for tower in towers] == [3, 5]


def test_every_family_is_described():
    for family in FAMILIES.values():
        values = dataclasses.asdict(family)
        assert all(values[name] for name in ("title", "model_class", "norm", "positions", "processor", "published"))
        assert hasattr(transformers, family.model_class)
