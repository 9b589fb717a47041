"""The public commands compute what LLaVA's own stage 1 computed; tests/golden/llava/README.md has the provenance."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from commands import extract_command, torchrun, train_command
from helpers import ROOT, run
from llava_twophase import CacheWriter, FeatureCache
from llava_twophase.train.data.collator import collate
from llava_twophase.train.data.conversation import PlainTemplate
from llava_twophase.train.data.tokenizer import load_caption_tokenizer
from llava_twophase.train.model.frozen_llm import FrozenLLM
from llava_twophase.train.model.llava import LlavaProjectorModel
from llava_twophase.train.model.load_llm import LoadedLLM
from llava_twophase.train.model.projector import build_projector, load_weights
from llava_twophase.vision.images import decode
from llava_twophase.vision.preprocess import Preprocessor

GOLDEN = ROOT / "tests" / "golden" / "llava"
TOWER = GOLDEN / "clip-tiny-336"
IMAGES = {"data_path": GOLDEN / "pretrain.json", "image_folder": GOLDEN / "images"}
TOKENIZER_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
PATCHES = 576

sys.path.insert(0, str(GOLDEN.parent))
import rule  # noqa: E402


def golden(name):
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


RECORDS = golden("pretrain.json")
RUNS = golden("runs.json")


def tokenizer_model():
    # In a folder of its own: without its dependencies, transformers would try to use the package and fail.
    path = Path(sys.prefix) / "peers" / "mistral-common" / "mistral_common" / "data" / "tokenizer.model.v1"
    assert path.is_file(), "the golden tokenizer is missing: run 'make venv' (tests/golden/requirements.txt)"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == TOKENIZER_SHA256
    return path


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """The golden LLaMA with its sentencepiece tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    shutil.copytree(GOLDEN / "llama-tiny", folder, dirs_exist_ok=True)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    state = {name: torch.from_numpy(rule.tensor(name, value.shape, 2)) for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    model.half().save_pretrained(folder / "weights")
    shutil.copy(folder / "weights" / "model.safetensors", folder)
    shutil.copy(tokenizer_model(), folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    """The fixed projector inits as files."""
    folder = tmp_path_factory.mktemp("init")
    for kind in ("linear", "mlp2x_gelu"):
        state = {name: torch.from_numpy(value) for name, value in rule.projector(kind, 64, 64).items()}
        torch.save(state, folder / f"{kind}.bin")
    return folder


@pytest.fixture(scope="module")
def fp32_cache(tmp_path_factory):
    """The golden pictures through our own float32 tower."""
    cache = tmp_path_factory.mktemp("fp32") / "cache"
    run(["python", *extract_command(**IMAGES, vision_tower=TOWER, feature_cache=cache, num_workers=1)])
    return cache


@pytest.fixture(scope="module")
def llava_cache(fp32_cache, tmp_path_factory):
    """A cache of the features that LLaVA's own fp16 tower put out."""
    cache = tmp_path_factory.mktemp("fp16") / "cache"
    features = np.load(GOLDEN / "features_fp16_square.npz")["patch"].astype(np.float16)
    made = FeatureCache(fp32_cache)
    tower = {name: value for name, value in made.fingerprint["tower"].items() if name != "weights_sha256"}  # of float32
    fingerprint = {**made.fingerprint, "tower": tower, "compute_dtype": "float16", "storage_dtype": "float16"}
    with CacheWriter(cache, (PATCHES, 64), "float16", fingerprint, provenance=made.manifest.provenance) as writer:
        for record, row in zip(RECORDS, features, strict=True):
            writer.add(record["image"], row)
    return cache


def train(llm, init, output, launcher=("python",), **changes):
    """Run command 2 as LLaVA's golden runs were started; returns losses, learning rates, norms and the projector."""
    flags = {
        "model_name_or_path": llm,
        **IMAGES,
        "vision_tower": TOWER,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "output_dir": output,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "save_strategy": "steps",
        "save_steps": 24000,
        "save_total_limit": 1,
        "model_max_length": 2048,
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "seed": 42,
        # Sample 15 has a real <unk>, which LLaVA's padding mask cuts out.
        "drop_unk_tokens": True,
        **changes,
    }
    flags["pretrain_mm_mlp_adapter"] = init / f"{flags['mm_projector_type']}.bin"
    run([*launcher, *train_command(**flags)])
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    columns = [[entry[name] for entry in steps] for name in ("loss", "learning_rate", "grad_norm")]
    return *columns, torch.load(output / "mm_projector.bin", weights_only=True)


def assert_run(result, name, loss=1e-5, weights=1e-6):
    losses, rates, norms, projector = result
    expected, arrays = RUNS[name], np.load(GOLDEN / "weights.npz")
    np.testing.assert_allclose(losses, expected["loss"], rtol=0, atol=loss)
    assert rates == expected["lr_used"]
    if expected["grad_norm_preclip"]:
        np.testing.assert_allclose(norms, expected["grad_norm_preclip"], rtol=200 * loss)
    for key, tensor in projector.items():
        assert tensor.dtype == torch.float32
        np.testing.assert_allclose(tensor.numpy(), arrays[f"{name}/{key}"], rtol=0, atol=weights)


@pytest.mark.parametrize("mode", ["square", "pad"])
def test_pixels_are_bit_equal(mode):
    preprocessor = Preprocessor(str(TOWER), mode)
    for expected in golden("pixels.json")[mode]:
        crop = preprocessor.crop(decode((GOLDEN / "images" / expected["image"]).read_bytes()))
        values = preprocessor.pixel_values(torch.from_numpy(crop)[None])[0].contiguous().numpy()
        assert hashlib.sha256(crop.tobytes()).hexdigest() == expected["sha256_u8_hwc"], expected["image"]
        assert hashlib.sha256(values.tobytes()).hexdigest() == expected["sha256_f32_chw"], expected["image"]


@pytest.mark.parametrize("mode", ["square", "pad"])
@pytest.mark.parametrize(("name", "file"), [("anim_gif", "anim.gif"), ("w3", "w3.png")])
def test_odd_pictures_are_bit_equal(name, file, mode):
    """The odd pictures that LLaVA reads rightly; those on which it crashes or errs are in tests/vision."""
    preprocessor = Preprocessor(str(TOWER), mode)
    crop = preprocessor.crop(decode((GOLDEN / "images" / "odd" / file).read_bytes()))
    values = preprocessor.pixel_values(torch.from_numpy(crop)[None])[0].contiguous().numpy()
    assert hashlib.sha256(values.tobytes()).hexdigest() == golden("odd_pixels.json")[name][mode]


def test_features_of_a_float32_tower_are_bit_equal(fp32_cache):
    expected = np.load(GOLDEN / "features_fp32.npz")
    keys = [RECORDS[index]["image"] for index in expected["square_idx"]]
    assert np.array_equal(FeatureCache(fp32_cache).read_raw(keys), expected["square"])


@pytest.mark.parametrize(
    ("flag", "value", "name"),
    [("image_aspect_ratio", "pad", "pad"), ("mm_vision_select_feature", "cls_patch", "cls_patch")],
)
def test_features_of_other_settings_are_bit_equal(flag, value, name, tmp_path):
    flags = {"vision_tower": TOWER, "feature_cache": tmp_path / "cache", "num_workers": 1, flag: value}
    run(["python", *extract_command(**IMAGES, **flags)])
    expected = np.load(GOLDEN / "features_fp32.npz")
    keys = [RECORDS[index]["image"] for index in expected[f"{name}_idx"]]
    assert np.array_equal(FeatureCache(tmp_path / "cache").read_raw(keys), expected[name])


@pytest.mark.parametrize(
    ("legacy", "column"), [(True, "input_ids"), (False, "input_ids_legacy_false"), (None, "input_ids")]
)
def test_token_ids_equal_those_of_sentencepiece(llm, tmp_path, legacy, column):
    shutil.copytree(llm, tmp_path / "llm")
    settings = tmp_path / "llm" / "tokenizer_config.json"
    content = json.loads(settings.read_text(encoding="utf-8"))
    content.pop("legacy")
    if legacy is not None:
        content["legacy"] = legacy
    settings.write_text(json.dumps(content), encoding="utf-8")
    template = template_of(tmp_path / "llm")
    for sample in golden("tokens.json")["samples"]:
        input_ids, labels = template(sample["caption"])
        assert input_ids == sample[column], sample["caption"]
        if column == "input_ids":
            assert labels == sample["labels"]


def template_of(folder, model_max_length=2048, drop_unk=False):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return PlainTemplate(load_caption_tokenizer(str(folder), tokenizer), model_max_length, PATCHES, drop_unk)


@pytest.mark.parametrize(
    "name",
    [
        "plain4_L2048",
        "odd_captions_L2048",
        "odd_captions_L620",
        "long_L2048",
        "long_L620",
        "single_L2048",
        "last2_L2048",
    ],
)
def test_splice_loss_and_gradient_equal_llavas(llm, init, name):
    batch, arrays = golden("batches.json")[name], np.load(GOLDEN / "batches.npz")
    features = torch.from_numpy(np.load(GOLDEN / "features_fp16_square.npz")["patch"])
    template = template_of(llm, batch["model_max_length"], drop_unk=True)
    samples = []
    for index in batch["ids"]:
        input_ids, labels = template(RECORDS[index]["conversations"][1]["value"])
        samples.append(
            {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels), "features": features[index]}
        )
    assert [len(sample["input_ids"]) - 1 + PATCHES for sample in samples] == batch["merged_lengths"]
    projector = build_projector("mlp2x_gelu", 64, 64)
    load_weights(init / "mlp2x_gelu.bin", projector)
    loaded = LoadedLLM(AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32))
    model = LlavaProjectorModel(FrozenLLM(loaded), projector)
    collated = collate(samples)
    if f"{name}/inputs_embeds" in arrays:
        # LLaVA pads spliced embeddings with zeros; the padding is never read.
        embeds, lengths = model.splice(collated["input_ids"], collated["features"].float()), batch["merged_lengths"]
        for row, length in enumerate(lengths):
            expected = arrays[f"{name}/inputs_embeds"][row, :length]
            np.testing.assert_allclose(embeds[row, :length].detach().numpy(), expected, rtol=0, atol=1e-6)
    loss = model(**collated)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(batch["loss"], abs=1e-5)
    for key, parameter in projector.named_parameters():
        expected = arrays[f"{name}/grad/model.mm_projector.{key}"]
        assert np.linalg.norm(parameter.grad.numpy() - expected) <= 1e-5 * np.linalg.norm(expected)


def test_run_from_the_cache_and_on_the_fly_equal_llavas_float32_run(llm, init, fp32_cache, tmp_path):
    cached = train(llm, init, tmp_path / "cached", feature_cache=fp32_cache)
    assert_run(cached, "mlp2x_vfp32")
    live = train(llm, init, tmp_path / "live", compute_dtype="fp32")
    assert live[0] == cached[0]
    assert all(torch.equal(live[-1][key], cached[-1][key]) for key in cached[-1])


@pytest.mark.parametrize(
    ("name", "changes"),
    [("mlp2x", {}), ("mlp2x_noclip", {"max_grad_norm": 0.0}), ("linear", {"mm_projector_type": "linear"})],
)
def test_run_on_llavas_features_equals_llavas_run(llm, init, llava_cache, tmp_path, name, changes):
    assert_run(train(llm, init, tmp_path / "out", feature_cache=llava_cache, **changes), name)


@pytest.mark.parametrize(
    ("name", "changes"), [("mlp2x", {}), ("mlp2x_cls_patch", {"mm_vision_select_feature": "cls_patch"})]
)
def test_run_on_the_fly_equals_llavas_run_with_its_fp16_tower(llm, init, tmp_path, name, changes):
    """LLaVA's tower runs in fp16 in an fp32 run, so ours does without a flag."""
    assert_run(train(llm, init, tmp_path / "out", **changes), name, loss=2e-4, weights=1e-4)


def test_bf16_run_equals_llavas_and_keeps_a_float32_projector(llm, init, tmp_path):
    assert_run(train(llm, init, tmp_path / "out", bf16=True), "mlp2x_bf16", loss=1e-2, weights=1e-3)


def test_accumulation_equals_llava_until_its_epochs_overlap(llm, init, llava_cache, tmp_path):
    """Two updates of two micro-batches; after them LLaVA carries a leftover micro-batch into the next epoch."""
    losses, _, _, projector = train(
        *(llm, init, tmp_path / "out"), feature_cache=llava_cache, gradient_accumulation_steps=2, num_train_epochs=1
    )
    expected = RUNS["mlp2x_accum2"]["loss"]
    np.testing.assert_allclose(losses[0], np.mean(expected[:2]), rtol=0, atol=1e-5)
    assert set(projector) == {f"model.mm_projector.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}


def test_run_of_two_processes_equals_llavas(llm, init, llava_cache, tmp_path):
    losses, rates, _, _ = train(
        *(llm, init, tmp_path / "out", torchrun()), feature_cache=llava_cache, per_device_train_batch_size=2
    )
    ranks = [golden(f"ddp2_seed42_rank{rank}.json") for rank in (0, 1)]
    np.testing.assert_allclose(losses, np.mean([rank["loss"] for rank in ranks], axis=0), rtol=0, atol=1e-5)
    assert rates == ranks[0]["lr"]


def test_template_keeps_an_unknown_token_by_default(llm):
    caption = RECORDS[15]["conversations"][1]["value"]
    assert 0 in template_of(llm)(caption)[0]
    assert 0 not in template_of(llm, drop_unk=True)(caption)[0]
