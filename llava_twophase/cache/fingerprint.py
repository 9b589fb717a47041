"""Fingerprints: everything that changes a feature value, as a nested dict of JSON values, compared field by field.

What is recorded but does not change a value is provenance, and is not compared.
"""

from __future__ import annotations

import json
from typing import Any

from llava_twophase.cache.format import canonical_json

MISSING = "(absent)"


def normalize(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Return the fingerprint as it is after a round trip through JSON: tuples become lists."""
    return dict(json.loads(canonical_json(fingerprint)))


def differences(
    found: dict[str, Any], expected: dict[str, Any], names: tuple[str, str] = ("the cache", "this run")
) -> list[str]:
    """Compare two fingerprints.

    Args:
        found: The fingerprint of the cache.
        expected: The fingerprint that this run makes or needs. Top-level fields that it does not have are not compared.
        names: What to call the two in the result.

    Returns:
        One line for each field that differs, with its dotted name and both values.
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
