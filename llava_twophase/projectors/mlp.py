"""LLaVA's own projectors: ``linear`` and ``mlpNx_gelu`` (LLaVA-1.5, arXiv 2310.03744)."""

from __future__ import annotations

from torch import nn


def build_mlp(kind: str, in_features: int, out_features: int) -> nn.Module:
    """Build a projector of LLaVA with nn.Linear's default init, drawn from torch's global generator.

    Args:
        kind: ``linear`` or ``mlp{N}x_gelu``, N layers with GELU between them.
        in_features: Tower width D.
        out_features: LLM width H.

    Returns:
        A module ``[B, L, D] -> [B, L, H]``.
    """
    if kind == "linear":
        return nn.Linear(in_features, out_features)
    layers: list[nn.Module] = [nn.Linear(in_features, out_features)]
    for _ in range(1, int(kind.removeprefix("mlp").removesuffix("x_gelu"))):
        layers += [nn.GELU(), nn.Linear(out_features, out_features)]
    return nn.Sequential(*layers)
