"""The exported folder in transformers' LLaVA: the logits and captions of this project, from pixels and cached rows."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from commands import use_command
from helpers import run
from llava_twophase import Captioner, FeatureCache
from llava_twophase.deploy.captioner import Placement
from llava_twophase.deploy.export import export
from llava_twophase.deploy.export_hf import export_hf
from llava_twophase.deploy.hf import encoder_outputs
from llava_twophase.deploy.hf_parts import LLMS
from llava_twophase.deploy.trained_projector import find_projector
from llava_twophase.errors import UserError
from llava_twophase.train.model.projector import build_projector, save_projector
from pipelines.demo.fetch import cache_folder
from train.model.llms import FAMILIES, build_family

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


def write_llm(kind, like, folder):
    """An LLM of a family with the tokenizer of another one, and a projector for it."""
    vocabulary = len(AutoTokenizer.from_pretrained(like))
    build_family(kind, vocab_size=vocabulary).save_pretrained(folder / "llm")
    for path in like.glob("*token*"):
        shutil.copy(path, folder / "llm")
    save_projector(build_projector("mlp2x_gelu", 32, 64), folder)
    return folder / "llm"


@pytest.mark.parametrize("kind", LLMS)
@torch.no_grad()
def test_export_hf_of_each_family_gives_the_same_logits(kind, trained, tmp_path):
    llm = write_llm(kind, trained.llm, tmp_path)
    projector = find_projector(tmp_path / "mm_projector.bin", llm=str(llm), vision_tower=str(trained.tower))
    exported = export_hf(projector, tmp_path / "model")
    captioner = Captioner.load(projector, Placement(dtype="fp32"))
    captioner.model.llm.set_attn_implementation("eager")
    model, info = LlavaForConditionalGeneration.from_pretrained(
        exported, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    path = trained.images / trained.keys[0]
    processor = AutoProcessor.from_pretrained(exported, backend="pil")
    inputs = processor(images=Image.open(path).convert("RGB"), text="<image>", return_tensors="pt")
    logits, ours = model.eval()(**inputs).logits[:, -1], our_logits(captioner, captioner.features([path]))
    assert torch.equal(logits[:, : ours.shape[1]], ours)


@pytest.mark.parametrize("kind", sorted({*FAMILIES, "cohere"} - set(LLMS)))
def test_export_hf_refuses_families_that_it_would_change(kind, trained, tmp_path):
    llm = write_llm(kind, trained.llm, tmp_path)
    projector = find_projector(tmp_path / "mm_projector.bin", llm=str(llm), vision_tower=str(trained.tower))
    with pytest.raises(UserError, match=f"the LLM is a {kind}; .* Use the projector with"):
        export_hf(projector, tmp_path / "model")


def test_export_hf_refuses_a_tower_of_another_family_whatever_its_image_processor(trained, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}), encoding="utf-8")
    (tmp_path / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="the vision tower is a vit; exports hold clip_vision_model"):
        export_hf(find_projector(trained.run, vision_tower=str(tmp_path)), tmp_path / "out")


def test_export_hf_refuses_tensors_that_it_cannot_name(trained, tmp_path):
    llm = shutil.copytree(trained.llm, tmp_path / "llm")
    weights = load_file(llm / "model.safetensors")
    save_file({**weights, "lm_head.bias": torch.zeros(weights["lm_head.weight"].shape[0])}, llm / "model.safetensors")
    with pytest.raises(UserError, match=r"has the tensor lm_head\.bias"):
        export_hf(find_projector(trained.run, llm=str(llm)), tmp_path / "model")


@pytest.mark.parametrize("adds_bos", [False, True])
def test_export_hf_writes_a_tokenizer_that_begins_as_in_training(adds_bos, trained, tmp_path):
    """`add_bos_token` decides in training; transformers 5 ignores it where there is a tokenizer.json."""
    llm = shutil.copytree(trained.llm, tmp_path / "llm")
    settings = json.loads((llm / "tokenizer_config.json").read_text(encoding="utf-8"))
    (llm / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": adds_bos}), encoding="utf-8")
    content = json.loads((llm / "tokenizer.json").read_text(encoding="utf-8"))
    if adds_bos:
        content["post_processor"] = None
    (llm / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(export_hf(find_projector(trained.run, llm=str(llm)), tmp_path / "model"))
    start = [tokenizer.bos_token_id] if adds_bos else []
    assert tokenizer("<image>").input_ids == [*start, tokenizer.convert_tokens_to_ids("<image>")]
    pair = tokenizer("a", "b").input_ids
    assert pair.count(tokenizer.bos_token_id) == 2 * adds_bos


def test_export_hf_counts_the_tokens_of_the_crop(trained, tiny_dinov2, tmp_path):
    """DINOv2's processor crops to 224, its position embedding is made for 518."""
    tower = shutil.copytree(tiny_dinov2, tmp_path / "tower")
    path = tower / "preprocessor_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.update(crop_size={"height": 28, "width": 28}, size={"shortest_edge": 28})
    path.write_text(json.dumps(settings), encoding="utf-8")
    config = json.loads((tower / "config.json").read_text(encoding="utf-8"))
    assert config["image_size"] != 28
    exported = export_hf(find_projector(trained.run, vision_tower=str(tower)), tmp_path / "model")
    written = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    assert written["image_seq_length"] == (28 // config["patch_size"]) ** 2


def test_export_hf_after_a_full_disk_works_again(trained, small_disk, monkeypatch):
    disk = small_disk("size=200k")
    with pytest.raises(UserError, match=r"kB are needed for the exported weights, but the disk"):
        export_hf(find_projector(trained.run), disk / "model")
    monkeypatch.setattr("llava_twophase.deploy.export_hf.require_free_space", lambda *args: None)
    with pytest.raises(UserError, match="the disk of OUT .* is full: free some space, then run the same command"):
        export_hf(find_projector(trained.run), disk / "model")
    assert not (disk / "model").exists()
    subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
    monkeypatch.undo()
    export_hf(find_projector(trained.run), disk / "model")
    assert [path.name for path in disk.iterdir()] == ["model"]
    assert (disk / "model" / "model.safetensors.index.json").is_file()


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


def test_export_refuses_a_url(trained):
    with pytest.raises(UserError, match="OUT s3://bucket/model: give a folder or file on this machine"):
        export(find_projector(trained.run), "hf", "s3://bucket/model")
