"""Skip computation in the last decoder layer at positions whose output is not read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad


class LastLayer:
    """The last decoder layer of an LLM, whose leading positions can be skipped.

    Keys and values are needed at every position. Queries, the attention's output projection and the MLP work position
    by position, so hooks remove the leading positions from their inputs and pad their outputs with zeros. Submodules
    that do not have LLaMA's names are computed in full.

    Args:
        llm: The LLM. Its hooks are registered inside ``reading_from`` only.
    """

    def __init__(self, llm: Any) -> None:
        layers = decoder_layers(llm)
        layer = layers[-1] if layers else None
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        parts = [getattr(attention, "q_proj", None), getattr(attention, "o_proj", None)]
        # A mixture of experts has no down_proj of its own, and may look at all positions together.
        parts.append(mlp if isinstance(getattr(mlp, "down_proj", None), nn.Linear) else None)
        self._parts = [part for part in parts if part is not None]

    @contextmanager
    def reading_from(self, position: int) -> Iterator[None]:
        """Skip the positions before this one, in forward passes and in their recomputation."""

        def drop(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            # By index: a slice is not contiguous, and a linear layer would copy its weight for it.
            kept = torch.arange(position, inputs[0].shape[1], device=inputs[0].device)
            return inputs[0].index_select(1, kept), *inputs[1:]

        def restore(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            return pad(output, (0, 0, position, 0))

        handles = [part.register_forward_pre_hook(drop) for part in self._parts]
        handles += [part.register_forward_hook(restore) for part in self._parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def decoder_layers(llm: Any) -> Sequence[Any]:
    """Return the decoder layers; none for LLMs that do not keep them in ``layers`` (GPT-2, Falcon, MPT)."""
    layers: Sequence[Any] = getattr(llm.get_decoder(), "layers", ())
    return layers
