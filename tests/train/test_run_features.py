"""What a run trains on, beside patch features of one layer: equal from a cache and on the fly, and usable after it."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from commands import assert_same_outcome, extract_command, outcome
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.deploy.captioner import Captioner
from llava_twophase.deploy.export_gguf import export_gguf
from llava_twophase.deploy.export_hf import export_hf
from llava_twophase.deploy.handover import run_checks, stage_2_command
from llava_twophase.deploy.trained_projector import find_projector
from llava_twophase.errors import UserError
from llava_twophase.extract.cli import main as extract


@pytest.fixture
def train_both(train_in_process, plain_set, tiny_clip, tmp_path):
    """Extract with some flags, train from the cache and on the fly with them; returns the cached run's folder."""

    def start(**flags):
        images = {"image_folder": plain_set.folder, "vision_tower": tiny_clip}
        records = {"data_path": plain_set.json, "feature_cache": tmp_path / "features"}
        assert extract(extract_command(**images, **records, **flags)[1:]) == 0
        common = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", **flags}
        assert train_in_process("cached", feature_cache=tmp_path / "features", **common)[0] == 0
        live = {"feature_cache": None, "image_folder": plain_set.folder, "compute_dtype": "fp32"}
        assert train_in_process("live", **live, **common)[0] == 0
        assert_same_outcome(outcome(tmp_path / "cached"), outcome(tmp_path / "live"))
        return tmp_path / "cached"

    return start


def logits_of_export(folder, picture):
    """The logits after an image of an exported model, in transformers' LLaVA."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    inputs = processor(images=Image.open(picture).convert("RGB"), text="<image>", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits[0, -1]


def test_run_on_several_layers_is_the_same_from_a_cache_and_on_the_fly(train_both, plain_set, tmp_path):
    run = train_both(mm_vision_select_layer=[-2, 0, -4])
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert config["mm_vision_select_layer"] == [-2, 0, -4] and config["mm_hidden_size"] == 96
    cache = FeatureCache(tmp_path / "features")
    assert cache.fingerprint["select_layer"] == [-2, -5, -4] and cache.feature_shape == (16, 96)
    projector, picture = find_projector(run), plain_set.folder / plain_set.keys[0]
    captioner = Captioner.load(projector)
    captioner.model.llm.set_attn_implementation("eager")
    features = captioner.features([picture])
    assert torch.equal(features, cache.read_tensor(plain_set.keys[:1]))
    # transformers' LLaVA has such lists as vision_feature_layer. LLaVA and llama.cpp read one layer.
    with torch.no_grad():
        embeds = captioner.model.splice(torch.tensor([captioner.template.prompt]), features)
        ours = captioner.model.llm(inputs_embeds=embeds).logits[0, -1]
    assert torch.equal(logits_of_export(export_hf(projector, tmp_path / "hf"), picture)[: len(ours)], ours)
    (check,) = [check for check in run_checks(projector) if check.what == "mm_vision_select_layer"]
    assert "hidden states -2, 0 and -4" in check.found and "LLaVA reads one" in check.found and check.fix
    assert stage_2_command(projector) is None
    with pytest.raises(UserError, match="reads hidden states -2, 0 and -4; llama.cpp's LLaVA reads one"):
        export_gguf(projector, tmp_path / "mmproj.gguf")


def test_run_refuses_a_cache_of_other_layers(train_in_process, caplog, capsys):
    assert train_in_process(mm_vision_select_layer=[-2, -3]) == (1, False)
    found = "select_layer: the cache has -2, this run [-2, -3] (--mm_vision_select_layer)"
    assert found in caplog.text + capsys.readouterr().err


def test_run_on_several_scales_is_the_same_from_a_cache_and_on_the_fly(train_both, plain_set, tmp_path):
    run = train_both(s2=True, s2_scales="56,112,168")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert (config["s2"], config["s2_scales"], config["mm_hidden_size"]) == (True, "56,112,168", 96)
    cache = FeatureCache(tmp_path / "features")
    assert cache.fingerprint["s2_scales"] == [56, 112, 168] and cache.feature_shape == (16, 96)
    projector = find_projector(run)
    keys = plain_set.keys[:2]  # as many as the tower encodes at once on a CPU: how a product rounds depends on it
    features = Captioner.load(projector).features([plain_set.folder / key for key in keys])
    assert torch.equal(features, cache.read_tensor(keys))
    assert "--s2 True --s2_scales 56,112,168" in stage_2_command(projector)
    checks = {check.what: check for check in run_checks(projector)}
    assert "s2wrapper" in checks["s2"].found and not checks["projector"].fix
    for export, target in ((export_hf, "hf"), (export_gguf, "mmproj.gguf")):
        with pytest.raises(UserError, match=r"several scales \(S2\)"):
            export(projector, tmp_path / target)


def test_run_refuses_a_cache_of_other_scales(train_in_process, caplog, capsys):
    assert train_in_process(s2=True, s2_scales="56,112") == (1, False)
    found = "s2_scales: the cache has [], this run [56, 112] (--s2 and --s2_scales)"
    assert found in caplog.text + capsys.readouterr().err
