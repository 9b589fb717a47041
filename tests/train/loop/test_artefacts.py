"""config.json as LLaVA's transformers 4.37 reads it."""

import json

import pytest
from transformers import (
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
)

from llava_twophase.train.command_line import parse_arguments
from llava_twophase.train.loop.artefacts import llava_config, write_json

# The fields that LLaVA v1.2.2.post1 (transformers 4.37.2) wrote for a tiny LLaMA and its stage-1 recipe, paths aside.
WRITTEN_BY_LLAVA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False,
    "hidden_act": "silu",
    "hidden_size": 64,
    "image_aspect_ratio": "square",
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 32,
    "mm_patch_merge_type": "flat",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "some/tower",
    "model_type": "llava_llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 2048,
    "tokenizer_padding_side": "right",
    "torch_dtype": "float16",
    "tune_mm_mlp_adapter": True,
    "use_cache": True,
    "use_mm_proj": True,
    "vocab_size": 32000,
}


@pytest.fixture
def arguments(tmp_path):
    flags = ["--model_name_or_path", "some/llm", "--vision_tower", "some/tower", "--data_path", "records.json"]
    flags += ["--image_folder", ".", "--tune_mm_mlp_adapter", "True", "--mm_projector_type", "mlp2x_gelu"]
    return parse_arguments([*flags, "--output_dir", str(tmp_path), "--use_cpu", "True", "--report_to", "none"])


def base_config(folder, **changes):
    """A config.json as transformers 4.37 wrote it, read by today's transformers."""
    content = {name: value for name, value in WRITTEN_BY_LLAVA.items() if "mm_" not in name and "tokenizer" not in name}
    content |= {"model_type": "llama", "transformers_version": "4.37.2", **changes}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return LlamaConfig.from_pretrained(folder)


def require_rope_scaling_of_4_37(config):
    """The check that transformers 4.37.2 makes of `rope_scaling` in a LLaMA configuration, stated again."""
    scaling = config["rope_scaling"]
    if scaling is None:
        return
    assert isinstance(scaling, dict) and len(scaling) == 2
    assert scaling.get("type") in ("linear", "dynamic")
    assert isinstance(scaling.get("factor"), float) and scaling["factor"] > 1.0


def test_llava_config_has_every_field_of_llava(arguments, tmp_path):
    config = llava_config(base_config(tmp_path / "base"), arguments, mm_hidden_size=32)
    write_json(tmp_path / "config.json", config)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert {name: written.get(name, "absent") for name in WRITTEN_BY_LLAVA} == WRITTEN_BY_LLAVA
    assert written["_name_or_path"] == "some/llm"
    require_rope_scaling_of_4_37(written)


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_llava_config_writes_scaled_rope_as_transformers_4_37_reads_it(arguments, tmp_path, kind):
    """Vicuna's 16k models."""
    scaling = {"type": kind, "factor": 4.0}
    base = base_config(tmp_path / "base", rope_theta=500000.0, rope_scaling=scaling)
    config = llava_config(base, arguments, mm_hidden_size=32)
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == scaling
    assert config["rope_parameters"]["rope_theta"] == 500000.0
    require_rope_scaling_of_4_37(config)


@pytest.mark.parametrize(
    ("base", "name"),
    [
        (LlamaConfig, "llava_llama"),
        (MistralConfig, "llava_mistral"),
        (MptConfig, "llava_mpt"),
        (Qwen2Config, "llava_qwen"),
        (Qwen2MoeConfig, "llava_qwen_moe"),
        (MixtralConfig, "llava_mixtral"),
        (GemmaConfig, "llava_gemma"),
        (PhiConfig, "llava_phi"),  # neither registers it
    ],
)
def test_llava_config_has_the_model_type_that_llava_or_llava_next_registers(arguments, base, name):
    assert llava_config(base(), arguments, mm_hidden_size=32)["model_type"] == name


def test_llava_config_keeps_mm_tunable_parts(arguments):
    arguments.model.mm_tunable_parts = "mm_mlp_adapter"
    config = llava_config(LlamaConfig(), arguments, mm_hidden_size=32)
    assert config["mm_tunable_parts"] == "mm_mlp_adapter" and config["tune_mm_mlp_adapter"] is True
