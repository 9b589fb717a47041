"""LLaVA-1.5 stage 1 in two phases: extract patch features once, then train the projector from the feature cache.

Importing this package loads no torch; each command imports what it needs once its arguments are known to be right.
"""

__version__ = "0.1.0"
