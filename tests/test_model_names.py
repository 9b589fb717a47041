"""Names that are not a model's folder."""

import json
import shutil

import pytest

from llava_twophase.errors import UserError
from llava_twophase.model_names import require_model_folder, require_tower_folder


def test_require_model_folder_accepts_models_and_hub_ids(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    for name in (str(tmp_path), "owner/name", "gpt2"):
        require_model_folder("--model_name_or_path", name, "an LLM")
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json"):
        require_model_folder("--model_name_or_path", str(tmp_path), "an LLM")


def test_require_model_folder_says_what_it_found(tmp_path):
    with pytest.raises(UserError, match="has no config.json; expected the folder of an LLM, found: no file"):
        require_model_folder("--model_name_or_path", str(tmp_path), "an LLM")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"found: weights\.bin"):
        require_model_folder("--model_name_or_path", str(tmp_path), "an LLM")
    with pytest.raises(UserError, match="is a file"):
        require_model_folder("--model_name_or_path", str(tmp_path / "weights.bin"), "an LLM")


@pytest.mark.parametrize("name", ["/nowhere", "./llm", "models/vicuna/7b", "llm/"])
def test_require_model_folder_refuses_paths_that_do_not_exist(name):
    with pytest.raises(UserError, match="there is no such folder"):
        require_model_folder("--model_name_or_path", name, "an LLM")


def test_require_model_folder_says_what_a_path_is_relative_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"there is no folder models/vicuna/7b in {tmp_path}; .*give the full path"):
        require_model_folder("--model_name_or_path", "models/vicuna/7b", "an LLM")
    with pytest.raises(UserError) as caught:
        require_model_folder("--model_name_or_path", "/models/vicuna", "an LLM")
    assert "relative" not in str(caught.value)


def test_require_tower_folder_accepts_towers_and_hub_ids(tiny_clip, tiny_clip_full, tiny_siglip, tiny_dinov2, tmp_path):
    for name in (tiny_clip, tiny_clip_full, tiny_siglip, tiny_dinov2, "openai/clip-vit-large-patch14-336"):
        require_tower_folder(str(name))
    without_processor = shutil.copytree(tiny_clip, tmp_path / "tower")
    (without_processor / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="has no image processor"):
        require_tower_folder(str(without_processor))


def test_require_tower_folder_refuses_other_folders(tiny_llama, tmp_path):
    with pytest.raises(UserError, match="holds a model of type llama, expected a vision tower"):
        require_tower_folder(str(tiny_llama))
    with pytest.raises(UserError, match="has no image processor .preprocessor_config.json.; expected the folder of a"):
        require_tower_folder(str(tmp_path))
    with pytest.raises(UserError, match="there is no such folder"):
        require_tower_folder("/nowhere/clip")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architecture": "vit_small_patch14_reg4_dinov2", "pretrained_cfg": {"input_size": [3, 518, 518]}}, "timm"),
        ({"model_type": "siglip2", "vision_config": {"model_type": "siglip2_vision_model"}}, "NaFlex"),
        ({"model_type": "vit_mae"}, "random patches"),
    ],
)
def test_require_tower_folder_refuses_towers_that_do_not_fit(config, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=f"{reason}.*supported towers: clip_vision_model, siglip"):
        require_tower_folder(str(tmp_path))


def test_require_tower_folder_refuses_hub_ids_of_timm():
    with pytest.raises(UserError, match="timm/vit_base_patch16_224 is a timm_wrapper: a timm model"):
        require_tower_folder("timm/vit_base_patch16_224")
