"""Converts features to stored rows and back, on any device: exact dtypes, and int8 and int4 with scales.

A *stored row* is all bytes that a shard stores for one image: those of ``/features``, then those of ``/scale`` for int8
and int4. Rows are ``uint8 [B, row_bytes]``.

Shapes: B images, L tokens, D width, K blocks of 32 channels in a token.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_twophase.cache.format import BLOCK, QUANTISED, ROW_PARTS, STORAGE_DTYPES, layout, row_bytes
from llava_twophase.errors import UserError

if TYPE_CHECKING:
    import torch

# A channel's std is at least this fraction of the root mean square of all std: a channel that is constant in the sample
# may vary in other images.
_STD_FLOOR = 1e-3


@dataclass(frozen=True, eq=False)
class Channels:
    """Mean and std of each channel, by which int8 and int4 normalise; the same for all images of a cache.

    Attributes:
        mean: float32 ``[D]``.
        std: float32 ``[D]``, positive.
    """

    mean: np.ndarray
    std: np.ndarray

    def to_json(self) -> dict[str, str]:
        """Return the manifest's form: the exact bits as base64."""
        return {name: base64.b64encode(getattr(self, name).tobytes()).decode("ascii") for name in ("mean", "std")}

    def sha256(self) -> str:
        """Return the SHA-256 (hex) of mean and std, which the fingerprint holds."""
        return hashlib.sha256(self.mean.tobytes() + self.std.tobytes()).hexdigest()

    @staticmethod
    def from_json(content: dict[str, Any]) -> Channels:
        """Read the result of ``to_json``.

        Raises:
            UserError: It is damaged.
        """
        try:
            raw = [base64.b64decode(content[name], validate=True) for name in ("mean", "std")]
            mean, std = (np.frombuffer(part, "<f4") for part in raw)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the manifest's channels are damaged: {error!r}") from None
        return Channels(mean, std)

    @staticmethod
    def measure(batches: Iterable[torch.Tensor]) -> Channels:
        """Measure the channels of a sample of images, in float64.

        Args:
            batches: Features ``[B, L, D]``, on any device.
        """
        count, total, squares = 0, np.zeros(()), np.zeros(())
        for features in batches:
            values = features.flatten(0, 1).double()  # [B * L, D]
            count += len(values)
            total = total + values.sum(0).cpu().numpy()
            squares = squares + values.square().sum(0).cpu().numpy()
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0))
        floor = _STD_FLOOR * np.sqrt(np.mean(std**2))
        std = np.maximum(std, floor if floor > 0 else 1.0)
        return Channels(mean.astype("<f4"), std.astype("<f4"))


class Codec:
    """Converts features to stored rows and back.

    Args:
        storage: Storage dtype.
        feature_shape: L and D.
        channels: For int8 and int4.

    Attributes:
        row_bytes: Bytes of a stored row.

    Raises:
        UserError: int8 or int4 without channels of D values, or int4 with a width that blocks do not divide.
    """

    def __init__(self, storage: str, feature_shape: tuple[int, int], channels: Channels | None = None) -> None:
        self.storage = storage
        self.feature_shape = feature_shape
        self.channels = channels
        shapes = layout(storage, 1, feature_shape, 1)
        self._part_shapes = [shapes[name][1][1:] for name in ROW_PARTS if name in shapes]
        self._features_bytes = prod(self._part_shapes[0]) * STORAGE_DTYPES[storage].itemsize
        self.row_bytes = row_bytes(storage, feature_shape)
        wanted = (feature_shape[1],)
        if storage in QUANTISED and (channels is None or not channels.mean.shape == channels.std.shape == wanted):
            raise UserError(f"{storage} needs the mean and std of {feature_shape[1]} channels")

    def to_rows(self, features: torch.Tensor) -> torch.Tensor:
        """Convert features to stored rows, on their device.

        Args:
            features: ``[B, L, D]`` in a float dtype; for exact storage, one that the storage dtype holds exactly.

        Returns:
            ``uint8 [B, row_bytes]``. Rows with values that are not finite are found by ``finite``.
        """
        import torch

        if self.channels is None:
            return features.to(getattr(torch, self.storage)).contiguous().view(torch.uint8).flatten(1)
        mean, std = self._channels(features.device)
        values = (features.float() - mean) / std  # [B, L, D]
        return _encode_int8(values) if self.storage == "int8" else _encode_int4(values)

    def numpy_to_rows(self, values: np.ndarray) -> np.ndarray:
        """Convert features to stored rows without torch, bit for bit as ``to_rows`` does on a CPU.

        Args:
            values: float32 ``[B, L, D]``, finite; exact storage rounds to the nearest value, ties to even.

        Returns:
            ``uint8 [B, row_bytes]``. ``finite`` tells which rows hold a value that became infinite.
        """
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if self.channels is not None:
                normalised = (values - self.channels.mean) / self.channels.std
                encode = _numpy_int8 if self.storage == "int8" else _numpy_int4
                stored, scale = encode(normalised)
                parts = [part.reshape(len(values), -1).view(np.uint8) for part in (stored, scale)]
                return np.concatenate(parts, axis=1)
            if self.storage == "bfloat16":
                bits = values.view(np.uint32)
                stored = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
            else:
                stored = values.astype(STORAGE_DTYPES[self.storage])
        return stored.reshape(len(values), -1).view(np.uint8)

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Convert stored rows to features, on their device.

        Args:
            rows: ``uint8 [B, row_bytes]``.

        Returns:
            ``[B, L, D]``: for exact storage a view in the storage dtype, for int8 and int4 float32.
        """
        import torch

        if self.channels is None:
            exact: torch.Tensor = rows.view(getattr(torch, self.storage)).unflatten(1, self.feature_shape)
            return exact
        mean, std = self._channels(rows.device)
        stored: torch.Tensor = rows[:, : self._features_bytes].unflatten(1, self._part_shapes[0])
        halves = rows[:, self._features_bytes :].contiguous().view(torch.float16)
        scale: torch.Tensor = halves.unflatten(1, self._part_shapes[1])
        if self.storage == "int8":
            values = stored.view(torch.int8).float() * scale.float().unsqueeze(-1)
        else:
            pairs = torch.stack((stored & 15, stored >> 4), dim=-1)  # [B, L, D / 2, 2]
            blocks: torch.Tensor = pairs.flatten(2).float().sub_(8).unflatten(2, (-1, BLOCK))  # [B, L, K, 32]
            values = (blocks * scale.float().unsqueeze(-1)).flatten(2)
        return values.mul_(std).add_(mean)

    def to_numpy(self, rows: np.ndarray) -> np.ndarray:
        """Convert stored rows ``uint8 [B, row_bytes]`` to float32 ``[B, L, D]``, without torch."""
        stored: np.ndarray = rows[:, : self._features_bytes].copy().view(STORAGE_DTYPES[self.storage])
        stored = stored.reshape(-1, *self._part_shapes[0])
        if self.storage == "bfloat16":
            # bfloat16 is the upper half of a float32.
            exact: np.ndarray = (stored.astype(np.uint32) << 16).view(np.float32)
            return exact
        if self.channels is None:
            return stored.astype(np.float32)
        scale = rows[:, self._features_bytes :].copy().view("<f2").reshape(-1, *self._part_shapes[1], 1)
        if self.storage == "int4":
            pairs = np.stack((stored & 15, stored >> 4), axis=-1).astype(np.float32) - 8
            stored = pairs.reshape(*scale.shape[:-1], BLOCK)
        values: np.ndarray = (stored.astype(np.float32) * scale.astype(np.float32)).reshape(-1, *self.feature_shape)
        values = values * self.channels.std + self.channels.mean
        return values

    def finite(self, rows: np.ndarray) -> np.ndarray:
        """Return for each stored row whether all its values are finite: ``bool [B]``."""
        if self.channels is not None:
            values = rows[:, self._features_bytes :].copy().view("<f2")  # the scales
        else:
            values = rows.view(STORAGE_DTYPES[self.storage])  # [B, L * D]
        # In bfloat16, all exponent bits set means inf or NaN.
        finite = (values & 0x7F80) != 0x7F80 if self.storage == "bfloat16" else np.isfinite(values)
        result: np.ndarray = finite.all(axis=1)
        return result

    def _channels(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        assert self.channels is not None
        mean, std = (torch.tensor(values, device=device) for values in (self.channels.mean, self.channels.std))
        return mean, std


def _encode_int8(values: torch.Tensor) -> torch.Tensor:
    import torch

    scale = (values.abs().amax(-1, keepdim=True) / 127).half()  # [B, L, 1]
    quantised = (values * _inverse(scale)).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat([quantised.flatten(1).view(torch.uint8), scale.flatten(1).view(torch.uint8)], dim=1)


def _encode_int4(values: torch.Tensor) -> torch.Tensor:
    import torch

    blocks = values.unflatten(-1, (-1, BLOCK))  # [B, L, K, 32]
    # The scale has the sign that puts the largest value at -8: eight steps on its side instead of seven.
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))  # [B, L, K, 1]
    scale = (largest / -8).half()
    quantised = (blocks * _inverse(scale)).round_().clamp_(-8, 7).add_(8).to(torch.uint8)
    pairs = quantised.flatten(2).unflatten(2, (-1, 2))  # [B, L, D / 2, 2]
    packed = pairs[..., 0] | (pairs[..., 1] << 4)
    return torch.cat([packed.flatten(1), scale.flatten(1).view(torch.uint8)], dim=1)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    # Of the scale as it is stored. A block of zeros has scale 0 and stays 0.
    import torch

    return torch.where(scale == 0, 0.0, scale.float().reciprocal())


def _numpy_int8(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = (np.abs(values).max(axis=-1, keepdims=True) / np.float32(127)).astype(np.float16)  # [B, L, 1]
    quantised = np.rint(values * _numpy_inverse(scale)).clip(-127, 127)
    return quantised.astype(np.int8), scale


def _numpy_int4(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    blocks = values.reshape(*values.shape[:-1], -1, BLOCK)  # [B, L, K, 32]
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)  # [B, L, K, 1]
    scale = (largest / np.float32(-8)).astype(np.float16)
    quantised = (np.rint(blocks * _numpy_inverse(scale)).clip(-8, 7) + 8).astype(np.uint8)
    pairs = quantised.reshape(*values.shape[:-1], -1, 2)  # [B, L, D / 2, 2]
    return pairs[..., 0] | (pairs[..., 1] << 4), scale


def _numpy_inverse(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, np.float32(0), np.float32(1) / scale.astype(np.float32))
