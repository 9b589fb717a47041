"""Run one short text through an LLM to check that embeddings are all it needs: image positions have no token ids."""

from __future__ import annotations

from typing import Any

import torch

from llava_twophase.errors import UserError

_LENGTH = 16
# Relative differences that rounding explains; two passes over equal inputs usually agree to the bit.
_TOLERANCE = {torch.float32: 1e-4}
_TOLERANCE_HALF = 2e-2


def check_embedding_input(name: str, llm: Any) -> None:
    """Check that an LLM computes the same from embeddings as from token ids, and from preceding positions only.

    Under ZeRO-3 all ranks must call this together.

    Args:
        name: ``--model_name_or_path``, for the message.
        llm: The causal LM, on its device and in evaluation mode.

    Raises:
        UserError: Its logits differ, it refuses embeddings, or later positions change earlier logits.
    """
    ids = _probe_ids(llm)
    embeds = llm.get_input_embeddings()(ids)
    _require_width(name, llm, embeds)
    middle = _LENGTH // 2
    # Vectors that belong to no token, as image features are: some LLMs look the ids up from the embeddings.
    between = (embeds[:, :middle] + embeds[:, middle:]) / 2
    changed = torch.cat([embeds[:, :middle], between], dim=1)
    try:
        expected, found = _logits(llm, input_ids=ids), _logits(llm, inputs_embeds=embeds)
        changed_later = _logits(llm, inputs_embeds=changed)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an LLM that looks for ids fails in its own way
        raise UserError(
            f"--model_name_or_path {name} cannot be used: it does not run on embeddings without token ids, which image "
            f"positions do not have ({type(error).__name__}: {error}); give another LLM"
        ) from error
    if not expected.isfinite().all():
        raise UserError(
            f"--model_name_or_path {name} cannot be used: its logits are not finite in {llm.dtype}. Its weights are "
            "damaged, or its values exceed the range of float16: download it again, or use --bf16 True in place of "
            "--fp16 True"
        )
    tolerance = _TOLERANCE.get(llm.dtype, _TOLERANCE_HALF)
    difference = _relative_difference(found, expected)
    if difference > tolerance:
        raise UserError(
            f"--model_name_or_path {name} cannot be used: its logits for embeddings differ from those for the same "
            f"token ids by {difference:.2g} of their size (rounding explains {tolerance:g}). Part of its input comes "
            "from token ids, which image positions do not have, such as per-layer inputs, an embedding multiplier or "
            "hash routing; give another LLM"
        )
    difference = _relative_difference(changed_later[:, :middle], found[:, :middle])
    if difference > tolerance:
        raise UserError(
            f"--model_name_or_path {name} cannot be used: later tokens change its earlier logits by {difference:.2g} "
            "of their size. Its attention is not causal, so captions would predict themselves; give a causal LM"
        )


@torch.no_grad()
def _logits(llm: Any, **inputs: torch.Tensor) -> torch.Tensor:
    # Positions by index, as in training.
    every = torch.arange(_LENGTH, device=llm.device)
    logits: torch.Tensor = llm(**inputs, use_cache=False, logits_to_keep=every).logits.float()
    return logits


def _probe_ids(llm: Any) -> torch.Tensor:
    """Return ``[1, 16]`` ids spread over the vocabulary, without the padding id."""
    config = llm.config.get_text_config()
    ids = torch.linspace(1, config.vocab_size - 2, _LENGTH).long()
    return torch.where(ids == (config.pad_token_id or 0), ids + 1, ids)[None].to(llm.device)


def _relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    difference = ((found - expected).norm() / expected.norm()).item()
    return difference if difference == difference else float("inf")


def _require_width(name: str, llm: Any, embeds: torch.Tensor) -> None:
    hidden = llm.config.get_text_config().hidden_size
    if embeds.shape[-1] != hidden:
        raise UserError(
            f"--model_name_or_path {name}: its embeddings have width {embeds.shape[-1]}, its hidden states {hidden}; "
            "LLaVA builds mm_projector for one width only, so give another LLM"
        )
