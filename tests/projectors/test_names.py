"""Names and arguments of projectors, without torch."""

import pytest

from helpers import run
from llava_twophase.errors import UserError
from llava_twophase.projectors.names import is_llava, parse_kwargs


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp12x_gelu"])
def test_is_llava_knows_llavas_types(kind):
    assert is_llava(kind)


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlp2x_gelu2", "pixel_shuffle", "a:B", "identity", ""])
def test_is_llava_knows_no_others(kind):
    assert not is_llava(kind)


def test_parse_kwargs_reads_a_json_object():
    assert parse_kwargs('{"tokens": 64, "positions": true}') == {"tokens": 64, "positions": True}
    assert parse_kwargs(None) == {}


@pytest.mark.parametrize(("text", "found"), [("[1]", "it is a list"), ("{tokens: 3}", "Expecting property name")])
def test_parse_kwargs_refuses_what_is_not_a_json_object(text, found):
    with pytest.raises(UserError, match=rf"{found}.*; expected a JSON object such as"):
        parse_kwargs(text)


def test_importing_the_names_loads_no_torch():
    code = "import sys, llava_twophase.projectors.names; print('torch' in sys.modules)"
    assert run(["python", "-c", code]).stdout == "False\n"
