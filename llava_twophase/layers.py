"""``--mm_vision_select_layer``: one hidden state of the tower, or several that are concatenated on channels.

Several layers are those of ``vision_feature_layer`` in transformers' LLaVA: the channels of the first layer come first.
LLaVA itself reads one. Shapes: N layers of a tower, which has N + 1 hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Layers = int | tuple[int, ...]
"""The selected layer, or several in the order of their channels; -2 is the second to last hidden state."""


def as_layers(values: int | Sequence[int]) -> Layers:
    """Return one layer as a number and several as a tuple, whether they were given as a number or as a sequence."""
    if isinstance(values, int):
        return values
    return values[0] if len(values) == 1 else tuple(values)


def as_tuple(layers: Layers) -> tuple[int, ...]:
    """Return the selected layers in their order."""
    return (layers,) if isinstance(layers, int) else layers


def from_the_end(layers: Any, total: Any) -> Any:
    """Spell layers one way: hidden state 23 of a tower of 24 layers is -2.

    Args:
        layers: One layer or several; any other value of a fingerprint is returned as it is.
        total: N; layers are returned as they are if it is not a number.
    """
    if isinstance(layers, (list, tuple)):
        return [from_the_end(layer, total) for layer in layers]
    if isinstance(layers, int) and isinstance(total, int) and layers >= 0:
        return layers - total - 1
    return layers


def describe(layers: Any) -> str:
    """Return the selected layers as a phrase: ``hidden state -2``, ``hidden states -2, -5 and -8``."""
    if isinstance(layers, (list, tuple)) and len(layers) > 1:
        *first, last = map(str, layers)
        return f"hidden states {', '.join(first)} and {last}"
    return f"hidden state {layers}"
