"""The feature cache, the contract between the phases, and a library of its own.

``FeatureCache`` reads a cache, ``CacheWriter`` writes one, ``verify`` checks every bit, and ``plan_repair`` and
``apply_repair`` rebuild a manifest. They are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_twophase.cache.check.repair import apply_repair, plan_repair
    from llava_twophase.cache.check.verify import verify
    from llava_twophase.cache.reader import FeatureCache
    from llava_twophase.cache.writer import CacheWriter

__all__ = ["CacheWriter", "FeatureCache", "apply_repair", "plan_repair", "verify"]

_MODULES = {
    "CacheWriter": "writer",
    "FeatureCache": "reader",
    "apply_repair": "check.repair",
    "plan_repair": "check.repair",
    "verify": "check.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
