"""The layers of `--mm_vision_select_layer` in one spelling, and in words."""

import pytest

from llava_twophase.layers import as_layers, as_tuple, describe, from_the_end


@pytest.mark.parametrize(("given", "layers"), [(-2, -2), ([-2], -2), ((3,), 3), ([-2, -5], (-2, -5))])
def test_as_layers_returns_a_number_for_one_layer(given, layers):
    assert as_layers(given) == layers
    assert as_tuple(layers) == (tuple(given) if not isinstance(given, int) else (given,))


@pytest.mark.parametrize(
    ("layers", "total", "spelled"),
    [(23, 24, -2), (-2, 24, -2), ((23, -5, 0), 24, [-2, -5, -25]), ([23], None, [23]), ("last", 24, "last")],
)
def test_from_the_end_spells_a_layer_one_way(layers, total, spelled):
    assert from_the_end(layers, total) == spelled


def test_describe_lists_layers_in_their_order():
    assert describe(-2) == "hidden state -2"
    assert describe([-2, -8, -5]) == "hidden states -2, -8 and -5"
