"""Activation checkpointing of decoder layers in evaluation mode.

transformers' layers recompute in training mode only, where dropout and router noise are active. The frozen LLM stays
in evaluation mode, so that it is deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GradientCheckpointingLayer


def checkpointable_layers(llm: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of a transformers model."""
    return [module for module in llm.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def activation_checkpointing(layers: list[nn.Module], every: int) -> Iterator[None]:
    """Recompute the activations of every k-th layer in backward passes inside this context.

    Args:
        layers: Decoder layers. Their classes are replaced by subclasses inside the context.
        every: k; 0 recomputes nothing.
    """
    chosen = layers[::every] if every else []
    classes: list[Any] = [type(layer) for layer in chosen]
    for layer, original in zip(chosen, classes, strict=True):
        layer.__class__ = _checkpointed(original)
    try:
        yield
    finally:
        for layer, original in zip(chosen, classes, strict=True):
            layer.__class__ = original


@cache
def _checkpointed(layer_class: Any) -> Any:
    """Return a subclass whose forward pass is checkpointed.

    One class for all layers lets compiled layers share their code. `forward`, not `__call__`, is checkpointed: hooks on
    the layer, such as ZeRO-3's, stay outside and run once.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(partial(layer_class.forward, self), *args, use_reentrant=False, **kwargs)

    return type(f"Checkpointed{layer_class.__name__}", (layer_class,), {"forward": forward})
