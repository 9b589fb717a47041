"""An LLM's configuration is checked before its weights are loaded."""

import logging

import pytest
from transformers import AutoConfig, CLIPConfig, CLIPVisionConfig, Gemma3Config, LlamaConfig, LlavaConfig, T5Config

from llava_twophase.errors import UserError
from llava_twophase.train.model.llm_config import check_data_fits, require_llm

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 100, "pad_token_id": 0}
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "phi", "phi3"),
    *("gpt2", "opt", "mpt", "falcon", "bloom", "gpt_neox"),
)


def config_of(kind, **changes):
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    # OPT names the width of its embeddings on its own.
    extra = {"word_embed_proj_dim": 32} if kind == "opt" else {}
    return AutoConfig.for_model(kind, **SIZES, **ids, **{**extra, **changes})


@pytest.mark.parametrize("kind", FAMILIES)
def test_require_llm_accepts_llms(kind):
    config = config_of(kind)
    assert require_llm("llm", config) is config


@pytest.mark.parametrize("config", [LlavaConfig(), Gemma3Config()], ids=["llava", "gemma3"])
def test_require_llm_returns_the_text_model_of_a_multimodal_checkpoint(config):
    assert require_llm("llm", config) is config.text_config


@pytest.mark.parametrize("config", [CLIPConfig(), CLIPVisionConfig(), T5Config()], ids=lambda config: config.model_type)
def test_require_llm_refuses_models_without_a_causal_lm(config):
    with pytest.raises(UserError, match=f"type {config.model_type}, expected a causal LM .*--vision_tower"):
        require_llm("some/model", config)


def test_require_llm_refuses_attention_free_models():
    with pytest.raises(UserError, match="mamba is not a transformer"):
        require_llm("some/mamba", AutoConfig.for_model("mamba"))


@pytest.mark.parametrize("method", ["mxfp4", "awq", "fp8", "gptq", "compressed-tensors", "hqq"])
def test_require_llm_refuses_quantised_weights_by_name(method):
    config = config_of("llama")
    config.quantization_config = {"quant_method": method}
    with pytest.raises(UserError, match=rf"some/model is already quantised \({method}\)"):
        require_llm("some/model", config)


def test_require_llm_needs_bitsandbytes_for_its_own_format(monkeypatch):
    config = config_of("llama")
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    monkeypatch.setattr("llava_twophase.train.model.llm_config.find_spec", lambda name: None)
    with pytest.raises(UserError, match="quantised with bitsandbytes, which needs bitsandbytes: pip install"):
        require_llm("some/model", config)


def test_require_llm_refuses_embeddings_of_another_width():
    """As in OPT-350m: 512 and 1024."""
    with pytest.raises(UserError, match="its embeddings have width 16, its hidden states 32"):
        require_llm("some/opt", config_of("opt", word_embed_proj_dim=16))


def check(config, longest=600, largest=99):
    check_data_fits(config, longest, "a.jpg", largest, "b.jpg")


@pytest.mark.parametrize(
    "config",
    [
        *(config_of(kind, max_position_embeddings=600) for kind in ("gpt2", "opt", "llama")),
        config_of("mpt", max_seq_len=600),
        config_of("bloom"),
    ],
    ids=lambda config: config.model_type,
)
def test_check_data_fits_accepts_the_last_position_and_the_last_id(config, caplog):
    check(config)
    assert not caplog.records


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_check_data_fits_refuses_samples_longer_than_the_position_table(kind):
    config = config_of(kind, max_position_embeddings=599)
    with pytest.raises(
        UserError, match=r"record a.jpg has 600 positions .* the LLM has 599; use --model_max_length 599"
    ):
        check(config)


def test_check_data_fits_warns_where_positions_are_extrapolated(caplog):
    with caplog.at_level(logging.WARNING):
        check(LlamaConfig(**SIZES, max_position_embeddings=599))
    assert "record a.jpg has 600 positions with its image, the LLM has 599" in caplog.text


def test_check_data_fits_refuses_ids_without_an_embedding():
    with pytest.raises(UserError, match="record b.jpg contains token id 100, the LLM has embeddings for 100 ids"):
        check(config_of("llama"), largest=100)


def test_check_data_fits_reports_all_problems():
    with pytest.raises(UserError, match=r"(?s)600 positions.*token id 100"):
        check(config_of("gpt2", max_position_embeddings=599), largest=100)
