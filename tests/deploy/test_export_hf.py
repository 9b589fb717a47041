"""The exported folder in transformers' LLaVA: the logits and captions of this project, from pixels and cached rows."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from commands import use_command
from helpers import run
from llava_twophase import Captioner, FeatureCache
from llava_twophase.deploy.captioner import Placement
from llava_twophase.deploy.export_hf import export_hf
from llava_twophase.deploy.hf import encoder_outputs
from llava_twophase.deploy.trained_projector import find_projector
from llava_twophase.errors import UserError
from llava_twophase.train.model.projector import build_projector, save_projector
from pipelines.demo.fetch import cache_folder

OLD_TRANSFORMERS = Path(sys.prefix) / "peers" / "transformers-4.57"
KEYS = 4


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    return export_hf(find_projector(trained.run), tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def model(exported):
    found, info = LlavaForConditionalGeneration.from_pretrained(
        exported, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return found.eval()


@pytest.fixture(scope="module")
def processor(exported):
    return AutoProcessor.from_pretrained(exported, backend="pil")


def our_logits(captioner, features):
    prompt = torch.tensor([captioner.template.prompt] * len(features))
    embeds = captioner.model.splice(prompt, features)
    return captioner.model.llm(inputs_embeds=embeds).logits[:, -1]


@torch.no_grad()
def test_export_hf_gives_the_same_logits_and_captions(trained, model, processor):
    captioner = Captioner.load(trained.run)
    captioner.model.llm.set_attn_implementation("eager")
    paths = [trained.images / key for key in trained.keys[:KEYS]]
    features = captioner.features(paths)
    images = [Image.open(path).convert("RGB") for path in paths]
    inputs = processor(images=images, text=["<image>"] * KEYS, return_tensors="pt")
    assert inputs["input_ids"].shape == (KEYS, 17)
    logits = model(**inputs).logits[:, -1]
    vocabulary = captioner.model.llm.config.vocab_size
    assert torch.equal(logits[:, :vocabulary], our_logits(captioner, features))
    newline = processor.tokenizer("\n", add_special_tokens=False).input_ids[-1]
    written = model.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=newline, pad_token_id=newline)
    texts = processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [text.split("\n")[0] for text in texts] == captioner.caption_features(features)


@torch.no_grad()
def test_encoder_outputs_of_cached_rows_equal_pixels(trained, model, processor):
    images = [Image.open(trained.images / key).convert("RGB") for key in trained.keys[:KEYS]]
    inputs = processor(images=images, text=["<image>"] * KEYS, return_tensors="pt")
    features = FeatureCache(trained.cache).read_tensor(trained.keys[:KEYS])
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    cached = model(**text, mm_encoder_outputs=encoder_outputs(model, features)).logits
    assert torch.equal(cached, model(**inputs).logits)


def test_export_hf_writes_the_names_of_the_hub(exported):
    names = set(json.loads((exported / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"])
    assert {
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
        "multi_modal_projector.linear_1.weight",
        "vision_tower.vision_model.embeddings.class_embedding",
    } <= names
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    assert config["text_config"]["rope_theta"] == config["text_config"]["rope_parameters"]["rope_theta"]
    assert config["text_config"]["vocab_size"] % 64 == 0 and config["image_seq_length"] == 16


def test_export_hf_adds_mean_rows_for_the_new_tokens(exported, trained, model):
    captioner = Captioner.load(trained.run)
    old = captioner.model.llm.get_input_embeddings().weight
    new = model.get_input_embeddings().weight
    assert torch.equal(new[: len(old)], old)
    torch.testing.assert_close(new[-1], old.mean(0))


@pytest.mark.parametrize("tower", ["tiny_siglip", "tiny_dinov2"])
@torch.no_grad()
def test_export_hf_of_other_towers_gives_the_same_logits(tower, trained, request, tmp_path):
    folder = request.getfixturevalue(tower)
    projector = find_projector(trained.run, vision_tower=str(folder))
    exported = export_hf(projector, tmp_path / "model")
    model = LlavaForConditionalGeneration.from_pretrained(exported, dtype=torch.float32, attn_implementation="eager")
    processor = AutoProcessor.from_pretrained(exported, backend="pil")
    captioner = Captioner.load(projector)
    captioner.model.llm.set_attn_implementation("eager")
    path = trained.images / trained.keys[0]
    inputs = processor(images=Image.open(path).convert("RGB"), text="<image>", return_tensors="pt")
    logits = model.eval()(**inputs).logits[:, -1]
    ours = our_logits(captioner, captioner.features([path]))
    assert torch.equal(logits[:, : ours.shape[1]], ours)


@torch.no_grad()
def test_export_hf_of_real_weights_gives_the_same_logits_and_captions(plain_set, tmp_path):
    """DINOv2-small and SmolLM2-135M, where `make demo` has fetched them, with a random projector."""
    models = cache_folder() / "models"
    towers, llms = sorted(models.glob("dinov2-small-56px-*")), sorted(models.glob("smollm2-135m-*"))
    if not (towers and llms):
        pytest.skip("make demo fetches the weights")
    torch.manual_seed(0)
    save_projector(build_projector("mlp2x_gelu", 384, 576), tmp_path)
    projector = find_projector(
        tmp_path / "mm_projector.bin", llm=str(llms[0]), vision_tower=str(towers[0]), select_layer=-7
    )
    exported = export_hf(projector, tmp_path / "model")
    model = LlavaForConditionalGeneration.from_pretrained(exported, dtype=torch.float32, attn_implementation="eager")
    processor = AutoProcessor.from_pretrained(exported, backend="pil")
    captioner = Captioner.load(projector, Placement(dtype="fp32"))
    captioner.model.llm.set_attn_implementation("eager")
    path = plain_set.folder / plain_set.keys[0]
    features = captioner.features([path])
    inputs = processor(images=Image.open(path).convert("RGB"), text="<image>", return_tensors="pt")
    logits, ours = model.eval()(**inputs).logits[:, -1], our_logits(captioner, features)
    assert torch.equal(logits[:, : ours.shape[1]], ours)
    newline = processor.tokenizer("\n", add_special_tokens=False).input_ids[-1]
    written = model.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=newline, pad_token_id=newline)
    text = processor.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [text.split("\n")[0]] == captioner.caption_features(features)


def test_export_hf_refuses_other_projectors(trained, tmp_path):
    state = {"model.mm_projector.weight": torch.zeros(64, 32), "model.mm_projector.bias": torch.zeros(64)}
    torch.save(state, tmp_path / "linear.bin")
    projector = find_projector(tmp_path / "linear.bin", llm=str(trained.llm), vision_tower=str(trained.tower))
    with pytest.raises(UserError, match="has mlp2x_gelu only"):
        export_hf(projector, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_hf_refuses_a_folder_with_files(trained, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not an empty folder"):
        export_hf(find_projector(trained.run), tmp_path)


def test_export_hf_refuses_another_tower_width(trained, tiny_clip, tmp_path):
    folder = shutil.copytree(tiny_clip, tmp_path / "tower")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 48}), encoding="utf-8")
    with pytest.raises(UserError, match="give the models that it was trained with"):
        export_hf(find_projector(trained.run, vision_tower=str(folder)), tmp_path / "out")


@pytest.mark.skipif(
    not OLD_TRANSFORMERS.is_dir(), reason="needs transformers 4.57.1 in a folder of its own: make peers"
)
def test_export_hf_loads_in_transformers_4(exported, trained, tmp_path):
    script = """
import sys, json, torch, transformers
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
assert transformers.__version__.startswith("4.57"), transformers.__version__
folder, image = sys.argv[1:]
model, info = LlavaForConditionalGeneration.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
processor = AutoProcessor.from_pretrained(folder, use_fast=False)
inputs = processor(images=Image.open(image).convert("RGB"), text="<image>", return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits[0, -1]
print(json.dumps({"missing": info["missing_keys"], "unexpected": info["unexpected_keys"], "logits": logits.tolist()}))
"""
    path = trained.images / trained.keys[0]
    done = run(["python", "-c", script, exported, path], PYTHONPATH=OLD_TRANSFORMERS)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["missing"] == found["unexpected"] == []
    captioner = Captioner.load(trained.run)
    with torch.no_grad():
        ours = our_logits(captioner, captioner.features([path]))[0]
    torch.testing.assert_close(torch.tensor(found["logits"])[: len(ours)], ours, atol=1e-4, rtol=0)


def test_export_command_says_how_to_load_the_folder(trained, tmp_path):
    done = run(["python", *use_command("export", trained.run, tmp_path / "out", to="hf")])
    assert "LlavaForConditionalGeneration.from_pretrained" in done.stdout
