"""Check an LLM by its configuration, before its weights are loaded."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from llava_twophase.errors import UserError, combined_error

logger = logging.getLogger(__name__)

# What --bits loads too, with gradients to the inputs. Other methods have no backward pass, or one that drops gradients.
_DIFFERENTIABLE_QUANTIZATION = "bitsandbytes"


def require_llm(name: str, config: Any) -> Any:
    """Check that a configuration describes an LLM that stage 1 can train against.

    Args:
        name: ``--model_name_or_path``.
        config: Its configuration, as ``AutoConfig`` loads it.

    Returns:
        The configuration of the text model: `config` itself, or a part of it for a multimodal checkpoint.

    Raises:
        UserError: It describes a vision tower or another model without a causal LM, an attention-free or an already
            quantised LLM, or one whose embeddings have another width than its hidden states.
    """
    text = config.get_text_config()
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"--model_name_or_path {name} holds a model of type {config.model_type}, expected a causal LM such as "
            "lmsys/vicuna-7b-v1.5; a vision tower is given as --vision_tower"
        )
    if not hasattr(text, "num_attention_heads"):
        raise UserError(
            f"--model_name_or_path {name}: {config.model_type} is not a transformer; give an LLM that is one"
        )
    _require_differentiable(name, config)
    width = getattr(text, "word_embed_proj_dim", text.hidden_size)
    if width != text.hidden_size:
        raise UserError(
            f"--model_name_or_path {name}: its embeddings have width {width}, its hidden states {text.hidden_size}; "
            "LLaVA builds mm_projector for one width only, so give another LLM"
        )
    return text


def check_data_fits(
    config: Any, longest_positions: int, longest_record: str, largest_id: int, largest_id_record: str
) -> None:
    """Check the longest sample and the largest token id of the data set against an LLM.

    Args:
        config: The LLM's configuration.
        longest_positions: Positions of the longest sample, those of the image included.
        longest_record: Id of that sample's record, for the message.
        largest_id: The largest token id of all samples.
        largest_id_record: Id of a record that contains it.

    Raises:
        UserError: The sample is longer than the LLM's position table, or the id has no embedding.
    """
    text = config.get_text_config()
    problems = []
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    if limit is not None and longest_positions > limit:
        found = f"record {longest_record} has {longest_positions} positions with its image, the LLM has {limit}"
        if _has_position_table(text):
            problems.append(f"{found}; use --model_max_length {limit}")
        else:
            logger.warning("%s by its configuration: it was not trained on longer sequences", found)
    if largest_id >= text.vocab_size:
        problems.append(
            f"record {largest_id_record} contains token id {largest_id}, the LLM has embeddings for {text.vocab_size} "
            "ids; its tokenizer has added tokens without embeddings: remove them from the caption or the tokenizer"
        )
    if problems:
        raise combined_error(problems, "the data set does not fit the LLM")


def require_bitsandbytes(what: str, alternative: str) -> None:
    """Check that bitsandbytes can be used.

    Args:
        what: What needs it; begins the message.
        alternative: What to do without it.

    Raises:
        UserError: It is not installed, or there is no CUDA device.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{what} needs bitsandbytes: pip install bitsandbytes, or {alternative}")
    if not torch.cuda.is_available():
        raise UserError(f"{what} needs a CUDA device; {alternative}")


def _has_position_table(config: Any) -> bool:
    """Return whether positions beyond the configured number raise an error, instead of being extrapolated."""
    extrapolates = getattr(config, "rope_parameters", None) or getattr(config, "alibi", False)
    return not extrapolates


def _require_differentiable(name: str, config: Any) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = settings.get("quant_method")
    method = str(getattr(method, "value", method))
    if method == _DIFFERENTIABLE_QUANTIZATION:
        require_bitsandbytes(f"--model_name_or_path {name} is quantised with bitsandbytes, which", "give another LLM")
    else:
        raise UserError(
            f"--model_name_or_path {name} is already quantised ({method}), and stage 1 needs gradients through it; "
            "give the original weights, with --bits 4 or 8 if they do not fit"
        )
