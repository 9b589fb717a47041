"""``stats``: statistics of the channels, tokens and images of a seeded sample.

Shapes: N images sampled, B of them read at once, L tokens, D width, G the side of the patch grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console

from llava_twophase.cache.check.duplicates import duplicate_images
from llava_twophase.errors import UserError
from llava_twophase.inspection import output
from llava_twophase.inspection.pictures import patch_grid
from llava_twophase.inspection.rows import CheckedRows
from llava_twophase.text import counted

OUTLIER_CHANNEL = 6.0
"""A channel is an outlier from this multiple of the median channel's root mean square."""
OUTLIER_TOKEN = 3.0
"""A token is an outlier from this multiple of the median token's norm."""
NEAR = 0.999
"""Two images are nearly equal from this cosine of their mean tokens, after the mean of the sample is subtracted."""
_CONSTANT = 1e-3
_SHOWN = 8
_COMPARED_DUPLICATES = 16
_LISTED_PAIRS = 100
_BLOCK_VALUES = 1 << 22


def run(path: str, count: int, seed: int, plot: str | None, as_json: bool) -> int:
    """Print the statistics; return 1 if values are not finite."""
    if plot:
        output.check_output(plot)
    measured = SampleStatistics(CheckedRows(path), count, seed)
    values = measured.values()
    if plot:
        from llava_twophase.inspection import plots

        plots.save(plot, measured)
    output.print_result({"path": path, **values}, as_json, lambda out: print_statistics(values, out))
    return 1 if values["non_finite"] else 0


class SampleStatistics:
    """Statistics of a sample, summed in float64 over the finite values.

    Args:
        rows: The cache.
        count: Images to sample.
        seed: Seed of the sample.

    Attributes:
        channel_mean: ``[D]``.
        channel_rms: ``[D]``, root mean square.
        channel_std: ``[D]``.
        norms: Norm of each token, NaN if the token is not finite: ``[N, L]``.
        pooled: Mean token of each image, ``[N, D]``.
    """

    def __init__(self, rows: CheckedRows, count: int, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self.picked = rows.sample(count, seed)
        tokens, width = rows.cache.feature_shape
        self.norms = np.empty((len(self.picked), tokens))
        self.pooled = np.empty((len(self.picked), width), np.float32)
        self.minimum = np.inf
        self.maximum = -np.inf
        self.non_finite = 0
        self.constant: list[int] = []
        self.bad: list[int] = []
        self._adjacent: list[float] = []
        self._distant: list[float] = []
        total, squares, counted, done = np.zeros(width), np.zeros(width), np.zeros(width), 0
        for part, values in rows.batches(self.picked, "stats"):
            finite = np.isfinite(values)  # [B, L, D]
            # In float64: norms and squares of large float32 values would overflow.
            kept = np.where(finite, values, 0).astype(np.float64)
            total += kept.sum((0, 1))
            counted += finite.sum((0, 1))
            squares += np.square(kept).sum((0, 1))
            self.minimum = min(self.minimum, float(values.min(initial=np.inf, where=finite)))
            self.maximum = max(self.maximum, float(values.max(initial=-np.inf, where=finite)))
            self.norms[done : done + len(part)] = np.where(finite.all(-1), np.linalg.norm(kept, axis=-1), np.nan)
            self.pooled[done : done + len(part)] = kept.mean(1)
            done += len(part)
            self._add_images(part, kept, finite)
        counted = np.maximum(counted, 1)
        self.channel_mean = total / counted
        self.channel_rms = np.sqrt(squares / counted)
        self.channel_std = np.sqrt(np.maximum(squares / counted - self.channel_mean**2, 0))

    def values(self) -> dict[str, Any]:
        """Return JSON values; a value that does not exist is None."""
        finite = self.minimum <= self.maximum
        deviation = np.sqrt(max(0.0, np.mean(self.channel_rms**2) - self.channel_mean.mean() ** 2))
        return {
            "rows": len(self.picked),
            "of": len(self.rows.cache),
            "seed": self.seed,
            "mean": float(self.channel_mean.mean()) if finite else None,
            "std": float(deviation) if finite else None,
            "min": self.minimum if finite else None,
            "max": self.maximum if finite else None,
            "non_finite": self.non_finite,
            "non_finite_images": self.rows.keys(self.bad),
            **self._tokens(),
            **self._channels(),
            "constant_images": self.rows.keys(self.constant),
            "adjacent_patch_cosine": float(np.mean(self._adjacent)) if self._adjacent else None,
            "distant_patch_cosine": float(np.mean(self._distant)) if self._distant else None,
            **self._neighbours(),
            **self._duplicates(),
            "channel_rms": [float(value) for value in self.channel_rms],
            "token_norms": [float(value) for value in np.nan_to_num(self.norms).mean(0)],
        }

    def _add_images(self, part: np.ndarray, values: np.ndarray, finite: np.ndarray) -> None:
        for row, image, is_finite in zip(part, values, finite, strict=True):
            if not is_finite.all():
                self.bad.append(int(row))
                self.non_finite += int(is_finite.size - is_finite.sum())
                continue
            spread = np.linalg.norm(image - image.mean(0))
            if spread <= max(_CONSTANT * float(np.linalg.norm(image)), 1e-37):
                self.constant.append(int(row))
                continue
            try:
                grid = patch_grid(image, self.rows.cache.fingerprint.get("select_feature"))  # [G, G, D]
            except UserError:  # tokens that form no square have no neighbours
                continue
            unit = grid / np.maximum(np.linalg.norm(grid, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
            if len(unit) > 1:
                self._adjacent.append(float((unit[:, 1:] * unit[:, :-1]).sum(-1).mean()))
                half = len(unit) // 2
                self._distant.append(float((unit[:half] * unit[half : 2 * half]).sum(-1).mean()))

    def _tokens(self) -> dict[str, Any]:
        norms = self.norms[np.isfinite(self.norms)]
        median = float(np.median(norms)) if len(norms) else None
        outside = self.norms > OUTLIER_TOKEN * (median or np.inf)  # [N, L]
        counts = outside.sum(0)
        most = [place for place in np.argsort(-counts, kind="stable")[:_SHOWN] if counts[place]]
        return {
            "token_norm": float(norms.mean()) if len(norms) else None,
            "token_norm_percentiles": [float(np.percentile(norms, p)) for p in (1, 50, 99)] if len(norms) else None,
            "outlier_tokens": int(outside.sum()),
            "outlier_token_images": int(outside.any(1).sum()),
            "outlier_token_places": [[int(place), int(counts[place])] for place in most],
        }

    def _channels(self) -> dict[str, Any]:
        median = float(np.median(self.channel_rms))
        outliers = self.channel_rms > OUTLIER_CHANNEL * median if median else self.channel_rms > 0
        strongest = np.argsort(-self.channel_rms, kind="stable")[: int(outliers.sum())]
        return {
            "channel_rms_median": median,
            "outlier_channels": [[int(c), float(self.channel_rms[c] / (median or 1))] for c in strongest],
            "dead_channels": np.flatnonzero(self.channel_std == 0).tolist(),
        }

    def _neighbours(self) -> dict[str, Any]:
        count = len(self.pooled)
        if count < 2:
            return {"nearest_image_cosine": None, "nearly_equal_pairs": 0, "nearly_equal_images": []}
        centred = self.pooled - self.pooled.mean(0, dtype=np.float64)
        length = np.linalg.norm(centred, axis=1, keepdims=True)
        unit = (centred / np.maximum(length, np.finfo(np.float32).tiny)).astype(np.float32)
        nearest, pairs, found = np.empty(count), 0, []
        block = max(1, _BLOCK_VALUES // count)  # [N, N] cosines of a large sample would not fit memory
        for start in range(0, count, block):
            cosine = unit[start : start + block] @ unit.T  # [block, N]
            here = np.arange(len(cosine))
            cosine[here, start + here] = -2
            nearest[start : start + block] = cosine.max(1)
            rows, columns = np.nonzero(np.triu(cosine > NEAR, start + 1))
            pairs += len(rows)
            for row, column in zip(rows[:_LISTED_PAIRS], columns[:_LISTED_PAIRS], strict=True):
                found.append((start + row, column, float(cosine[row, column])))
        listed = found[:_LISTED_PAIRS]
        names = [self.rows.keys(self.picked[[row, column]]) for row, column, _ in listed]
        return {
            "nearest_image_cosine": float(np.median(nearest)),
            "nearly_equal_pairs": pairs,
            "nearly_equal_images": [[*name, cosine] for name, (_, _, cosine) in zip(names, listed, strict=True)],
        }

    def _duplicates(self) -> dict[str, Any]:
        # The tower saw an image file under each of its keys: the features should be equal.
        pairs = [group[:2] for group in duplicate_images(self.rows.cache)[:_COMPARED_DUPLICATES]]
        apart = [float(np.abs(np.subtract(*self.rows.values(pair))).max()) for pair in pairs]
        return {"equal_pictures_compared": len(pairs), "equal_pictures_apart": max(apart, default=None)}


def print_statistics(values: dict[str, Any], out: Console) -> None:
    """Print statistics as text."""
    for name, rows in in_words(values).items():
        output.print_section(name, rows, out)


def in_words(values: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return statistics as titled groups of names and texts, for the terminal and the report."""
    number, channels = output.number, values["outlier_channels"]
    low, middle, high = values["token_norm_percentiles"] or (None, None, None)
    strongest = ", ".join(f"{channel} ({times:.0f}x)" for channel, times in channels[:_SHOWN])
    places = ", ".join(f"{place} ({count}x)" for place, count in values["outlier_token_places"])
    near = ", ".join(f"{one} ~ {other}" for one, other, _ in values["nearly_equal_images"][:3])
    constant = values["constant_images"]
    chosen = f"{values['rows']:,} of {values['of']:,} images, seed {values['seed']}"
    duplicates, apart = values["equal_pictures_compared"], values["equal_pictures_apart"]
    return {
        f"values of a sample ({chosen})": {
            "mean": number(values["mean"]),
            "std": number(values["std"]),
            "min, max": f"{number(values['min'])}, {number(values['max'])}",
            "not finite": f"{values['non_finite']:,}" + _examples(values["non_finite_images"]),
        },
        "channels": {
            "median root mean square": number(values["channel_rms_median"]),
            f"over {OUTLIER_CHANNEL:g} times that": f"{len(channels):,}{': ' if channels else ''}{strongest}",
            "constant": f"{len(values['dead_channels']):,}",
        },
        "tokens": {
            "mean norm": number(values["token_norm"]),
            "1st, 50th, 99th percentile": f"{number(low)}, {number(middle)}, {number(high)}",
            f"over {OUTLIER_TOKEN:g} times the median": f"{values['outlier_tokens']:,} in "
            f"{counted(values['outlier_token_images'], 'image')}{', most at ' if places else ''}{places}",
            "cosine, adjacent patches": number(values["adjacent_patch_cosine"]),
            "cosine, half an image apart": number(values["distant_patch_cosine"]),
        },
        "images": {
            "constant": f"{len(constant):,}" + _examples(constant),
            "cosine to the nearest other": number(values["nearest_image_cosine"]),
            "nearly equal pairs": f"{values['nearly_equal_pairs']:,}{': ' if near else ''}{near}",
            "duplicate images": counted(duplicates, "pair")
            + (f", features differ by at most {number(apart)}" if duplicates else ""),
        },
    }


def _examples(keys: list[str]) -> str:
    return f" in {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}" if keys else ""
