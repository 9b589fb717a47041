"""Names and arguments of projectors on the command line; importing this module loads no torch."""

from __future__ import annotations

import json
import re
from typing import Any

from llava_twophase.errors import UserError

SHIPPED = {
    "avgpool_mlp": "llava_twophase.projectors.avgpool_mlp:AvgPoolMLP",
    "pixel_shuffle": "llava_twophase.projectors.pixel_shuffle:PixelShuffleMLP",
    "ldpv2": "llava_twophase.projectors.ldpv2:LDPv2",
    "c_abstractor": "llava_twophase.projectors.c_abstractor:CAbstractor",
    "perceiver": "llava_twophase.projectors.perceiver:PerceiverResampler",
}
"""Short names of the projectors that come with this package, beside LLaVA's own, and their classes."""
_LLAVA = re.compile(r"linear|mlp[1-9]\d*x_gelu")


def is_llava(kind: str) -> bool:
    """Return whether LLaVA has a projector type."""
    return _LLAVA.fullmatch(kind) is not None


def parse_kwargs(text: str | None) -> dict[str, Any]:
    """Parse ``--mm_projector_kwargs``; an empty dictionary without the flag.

    Raises:
        UserError: It is not a JSON object.
    """
    if text is None:
        return {}
    try:
        content = json.loads(text)
        found = f"it is a {type(content).__name__}"
    except ValueError as error:
        content, found = None, str(error)
    if not isinstance(content, dict):
        raise UserError(f"--mm_projector_kwargs {text}: {found}; expected a JSON object such as '{{\"tokens\": 64}}'")
    return content
