"""``stats``: channels, tokens and images of a seeded sample, and what in them stands out; draws nothing.

Shapes: N images sampled, B of them at once, L tokens, D width, G the side of the patch grid.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from rich.console import Console

from llava_twophase.errors import UserError
from llava_twophase.inspection import output
from llava_twophase.inspection.pictures import patch_grid
from llava_twophase.inspection.rows import Rows, twins

OUTLIER_CHANNEL = 6.0
"""A channel stands out from this many times the median channel's root mean square on."""
OUTLIER_TOKEN = 3.0
"""A token stands out from this many times the median token's norm on."""
NEAR = 0.999
"""Two images are nearly the same from this cosine of their mean tokens on, the sample's mean taken off."""
_CONSTANT = 1e-3
_SHOWN = 8
_TWIN_PAIRS = 16


def run(args: argparse.Namespace) -> int:
    """Print the statistics; 1 where values are not finite."""
    rows, out = Rows(args.cache), output.console()
    measured = Measured(rows, args.n, args.seed)
    values = measured.values()
    if args.plot:
        from llava_twophase.inspection import plots

        plots.save(args.plot, measured)
    if args.json:
        output.print_json({"path": args.cache, **values}, out)
    else:
        print_statistics(values, out)
    return 1 if values["non_finite"] else 0


class Measured:
    """A sample's statistics, summed in float64 over the finite values.

    Args:
        rows: The cache.
        count: Images to sample.
        seed: Picks them.

    Attributes:
        channel_mean: ``[D]``.
        channel_rms: ``[D]``, root mean square.
        channel_std: ``[D]``.
        norms: Each token's norm, NaN where it is not finite: ``[N, L]``.
        pooled: Each image's mean token, ``[N, D]``.
    """

    def __init__(self, rows: Rows, count: int, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self.picked = rows.sample(count, seed)
        tokens, width = rows.cache.feature_shape
        self.norms = np.empty((len(self.picked), tokens))
        self.pooled = np.empty((len(self.picked), width), np.float32)
        self.minimum, self.maximum, self.non_finite = np.inf, -np.inf, 0
        self.constant: list[int] = []
        self.bad: list[int] = []
        self._adjacent: list[float] = []
        self._distant: list[float] = []
        total, squares, counted, done = np.zeros(width), np.zeros(width), np.zeros(width), 0
        for part, values in rows.batches(self.picked, "stats"):
            finite = np.isfinite(values)  # [B, L, D]
            kept = np.where(finite, values, 0)
            wide = kept.reshape(-1, width).astype(np.float64)
            total, counted = total + wide.sum(0), counted + finite.sum((0, 1))
            squares = squares + np.einsum("ij,ij->j", wide, wide)
            self.minimum = min(self.minimum, float(values.min(initial=np.inf, where=finite)))
            self.maximum = max(self.maximum, float(values.max(initial=-np.inf, where=finite)))
            self.norms[done : done + len(part)] = np.where(finite.all(-1), np.linalg.norm(kept, axis=-1), np.nan)
            self.pooled[done : done + len(part)] = kept.mean(1)
            done += len(part)
            self._images(part, values, finite)
        counted = np.maximum(counted, 1)
        self.channel_mean, self.channel_rms = total / counted, np.sqrt(squares / counted)
        self.channel_std = np.sqrt(np.maximum(squares / counted - self.channel_mean**2, 0))

    def values(self) -> dict[str, Any]:
        """Return JSON values; what there is none of is None."""
        median = float(np.median(self.channel_rms))
        strong = self.channel_rms > OUTLIER_CHANNEL * median if median else self.channel_rms > 0
        norms = self.norms[np.isfinite(self.norms)]
        middle = float(np.median(norms)) if len(norms) else None
        outside = self.norms > OUTLIER_TOKEN * (middle or np.inf)  # [N, L]
        finite = self.minimum <= self.maximum
        return {
            "rows": len(self.picked),
            "of": len(self.rows.cache),
            "seed": self.seed,
            "mean": float(self.channel_mean.mean()) if finite else None,
            "std": float(np.sqrt(np.mean(self.channel_rms**2) - self.channel_mean.mean() ** 2)) if finite else None,
            "min": self.minimum if finite else None,
            "max": self.maximum if finite else None,
            "non_finite": self.non_finite,
            "non_finite_images": self.rows.keys(self.bad),
            "token_norm": float(norms.mean()) if len(norms) else None,
            "token_norm_percentiles": [float(np.percentile(norms, p)) for p in (1, 50, 99)] if len(norms) else None,
            "outlier_tokens": int(outside.sum()),
            "outlier_token_images": int(outside.any(1).sum()),
            "outlier_token_places": [[int(place), int(n)] for place, n in _most(outside.sum(0))],
            "channel_rms_median": median,
            "outlier_channels": [[int(c), float(self.channel_rms[c] / (median or 1))] for c in self._strongest(strong)],
            "dead_channels": np.flatnonzero(self.channel_std == 0).tolist(),
            "constant_images": self.rows.keys(self.constant),
            "adjacent_patch_cosine": float(np.mean(self._adjacent)) if self._adjacent else None,
            "distant_patch_cosine": float(np.mean(self._distant)) if self._distant else None,
            **self._neighbours(),
            **self._twins(),
            "channel_rms": [float(value) for value in self.channel_rms],
            "token_norms": [float(value) for value in np.nan_to_num(self.norms).mean(0)],
        }

    def _images(self, part: np.ndarray, values: np.ndarray, finite: np.ndarray) -> None:
        for row, image, whole in zip(part, values, finite, strict=True):
            if not whole.all():
                self.bad.append(int(row))
                self.non_finite += int(whole.size - whole.sum())
                continue
            spread = np.linalg.norm(image - image.mean(0))
            if spread <= max(_CONSTANT * float(np.linalg.norm(image)), 1e-37):
                self.constant.append(int(row))
                continue
            try:
                grid = patch_grid(image, str(self.rows.cache.fingerprint.get("select_feature")))  # [G, G, D]
            except UserError:  # tokens that form no square have no neighbours
                continue
            unit = grid / np.maximum(np.linalg.norm(grid, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
            if len(unit) > 1:
                self._adjacent.append(float((unit[:, 1:] * unit[:, :-1]).sum(-1).mean()))
                half = len(unit) // 2
                self._distant.append(float((unit[:half] * unit[half : 2 * half]).sum(-1).mean()))

    def _strongest(self, strong: np.ndarray) -> np.ndarray:
        return np.argsort(-self.channel_rms, kind="stable")[: int(strong.sum())]

    def _neighbours(self) -> dict[str, Any]:
        centred = self.pooled - self.pooled.mean(0)
        length = np.linalg.norm(centred, axis=1, keepdims=True)
        unit = centred / np.maximum(length, np.finfo(np.float32).tiny)
        if len(unit) < 2:
            return {"nearest_image_cosine": None, "nearly_equal_images": []}
        cosine = unit @ unit.T  # [N, N]
        np.fill_diagonal(cosine, -2)
        nearest = cosine.max(1)
        pairs = [(row, column) for row, column in zip(*np.nonzero(cosine > NEAR), strict=True) if row < column]
        names = self.rows.keys(self.picked)
        found = [[names[row], names[column], float(cosine[row, column])] for row, column in pairs]
        return {"nearest_image_cosine": float(np.median(nearest)), "nearly_equal_images": found}

    def _twins(self) -> dict[str, Any]:
        # One picture under two keys went through the tower twice: its features should be the same.
        pairs = [group[:2] for group in twins(self.rows.cache)[:_TWIN_PAIRS]]
        apart = [float(np.abs(np.subtract(*self.rows.values(pair))).max()) for pair in pairs]
        return {"equal_pictures_compared": len(pairs), "equal_pictures_apart": max(apart, default=None)}


def print_statistics(values: dict[str, Any], out: Console) -> None:
    """Print statistics for people."""
    for name, rows in in_words(values).items():
        output.print_section(name, rows, out)


def in_words(values: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Turn statistics into titled groups of names and texts, for the terminal and the report."""
    number, channels = output.number, values["outlier_channels"]
    low, middle, high = values["token_norm_percentiles"] or (None, None, None)
    strongest = ", ".join(f"{channel} ({times:.0f}x)" for channel, times in channels[:_SHOWN])
    places = ", ".join(f"{place} ({count}x)" for place, count in values["outlier_token_places"])
    near = ", ".join(f"{one} ~ {other}" for one, other, _ in values["nearly_equal_images"][:3])
    constant = values["constant_images"]
    chosen = f"{values['rows']:,} of {values['of']:,} images, seed {values['seed']}"
    twice, apart = values["equal_pictures_compared"], values["equal_pictures_apart"]
    return {
        f"values of a sample ({chosen})": {
            "mean": number(values["mean"]),
            "std": number(values["std"]),
            "min, max": f"{number(values['min'])}, {number(values['max'])}",
            "not finite": f"{values['non_finite']:,}" + _names(values["non_finite_images"]),
        },
        "channels": {
            "median root mean square": number(values["channel_rms_median"]),
            f"over {OUTLIER_CHANNEL:g} times that": f"{len(channels):,}{': ' if channels else ''}{strongest}",
            "never changing": f"{len(values['dead_channels']):,}",
        },
        "tokens": {
            "mean norm": number(values["token_norm"]),
            "1st, 50th, 99th percentile": f"{number(low)}, {number(middle)}, {number(high)}",
            f"over {OUTLIER_TOKEN:g} times the median": f"{values['outlier_tokens']:,} in "
            f"{values['outlier_token_images']:,} images{', most at ' if places else ''}{places}",
            "cosine, adjacent patches": number(values["adjacent_patch_cosine"]),
            "cosine, half an image apart": number(values["distant_patch_cosine"]),
        },
        "images": {
            "constant or dead": f"{len(constant):,}" + _names(constant),
            "cosine to the nearest other": number(values["nearest_image_cosine"]),
            "nearly equal pairs": f"{len(values['nearly_equal_images']):,}{': ' if near else ''}{near}",
            "equal files under two keys": f"{twice:,} pairs" + (f", features {number(apart)} apart" if twice else ""),
        },
    }


def _names(keys: list[str]) -> str:
    return f" in {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}" if keys else ""


def _most(counts: np.ndarray) -> list[tuple[int, int]]:
    order = np.argsort(-counts, kind="stable")[:_SHOWN]
    return [(int(place), int(counts[place])) for place in order if counts[place]]
