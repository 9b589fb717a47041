"""The feature cache, the contract between the phases, and a library of its own.

``FeatureCache`` reads a cache, ``JoinedCaches`` reads several as one, ``CacheWriter`` writes a cache, ``verify`` checks
every bit, and ``plan_repair`` and ``apply_repair`` rebuild a manifest. They are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava_twophase.lazy import lazy_exports

if TYPE_CHECKING:
    from llava_twophase.cache.check.repair import apply_repair, plan_repair
    from llava_twophase.cache.check.verify import verify
    from llava_twophase.cache.joined import JoinedCaches
    from llava_twophase.cache.reader import FeatureCache
    from llava_twophase.cache.writer import CacheWriter

__all__ = ["CacheWriter", "FeatureCache", "JoinedCaches", "apply_repair", "plan_repair", "verify"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CacheWriter": "writer",
        "FeatureCache": "reader",
        "JoinedCaches": "joined",
        "apply_repair": "check.repair",
        "plan_repair": "check.repair",
        "verify": "check.verify",
    },
)
