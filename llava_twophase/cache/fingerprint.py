"""Everything that changes a feature value, compared field by field; what is only worth knowing is provenance.

A fingerprint is a nested dict of JSON values, made by whoever owns the tower; this module knows nothing of towers.
"""

from __future__ import annotations

import json
from typing import Any

from llava_twophase.cache.format import canonical_json

MISSING = "(absent)"


def normalize(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Turn a fingerprint into what reading it back from JSON gives (tuples become lists)."""
    return dict(json.loads(canonical_json(fingerprint)))


def differences(
    found: dict[str, Any], expected: dict[str, Any], names: tuple[str, str] = ("the cache", "this run")
) -> list[str]:
    """Compare two fingerprints.

    Args:
        found: What the cache says of itself.
        expected: What the run at hand would make or need; fields that it leaves out at the top are not compared.
        names: What to call the two.

    Returns:
        One line for each field that differs, with its dotted name and both values; empty where they agree.
    """
    flat_found = _flatten(normalize({name: found.get(name, MISSING) for name in expected}))
    flat_expected = _flatten(normalize(expected))
    return [
        f"{name}: {names[0]} has {flat_found.get(name, MISSING)!r}, {names[1]} {flat_expected.get(name, MISSING)!r}"
        for name in sorted(flat_found.keys() | flat_expected.keys())
        if flat_found.get(name, MISSING) != flat_expected.get(name, MISSING)
    ]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat.update(_flatten(inner, f"{prefix}.{name}" if prefix else str(name)))
    return flat
