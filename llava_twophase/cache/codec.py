"""Storage dtypes between torch tensors and stored bytes, without a change of bits; knows nothing of files.

The storage dtype is the compute dtype, so a stored row is the tower's output itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import h5py
import numpy as np

from llava_twophase.cache.format import STORAGE_DTYPES

if TYPE_CHECKING:
    import torch


def to_stored(features: torch.Tensor) -> np.ndarray:
    """View features as the bytes that go to disk.

    Args:
        features: ``[B, tokens, dim]`` on the CPU, in a storage dtype.

    Returns:
        The same memory where it is contiguous; uint16 bits for bfloat16.
    """
    import torch

    features = features.contiguous()
    if features.dtype == torch.bfloat16:
        return features.view(torch.uint16).numpy()
    return features.numpy()


def from_stored(raw: np.ndarray, storage_dtype: str) -> torch.Tensor:
    """View stored bytes as features.

    Args:
        raw: Rows as ``FeatureCache.read`` gives them.
        storage_dtype: ``bfloat16``, ``float16`` or ``float32``.

    Returns:
        A tensor of the same shape and memory in the storage dtype.
    """
    import torch

    tensor = torch.from_numpy(raw)
    return tensor.view(torch.bfloat16) if storage_dtype == "bfloat16" else tensor


def to_float32(raw: np.ndarray, storage_dtype: str) -> np.ndarray:
    """Turn stored rows into float32 values without torch, exactly."""
    if storage_dtype == "bfloat16":
        # bfloat16 is the upper half of a float32.
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def finite_rows(raw: np.ndarray, storage_dtype: str) -> np.ndarray:
    """Tell for each row whether all its values are finite.

    Args:
        raw: ``[B, tokens, dim]`` stored values.
        storage_dtype: Their storage dtype.

    Returns:
        ``bool [B]``.
    """
    if storage_dtype == "bfloat16":
        # All exponent bits set means inf or NaN.
        bad = (raw & 0x7F80) == 0x7F80
        return ~bad.reshape(len(raw), -1).any(axis=1)
    return np.isfinite(raw).reshape(len(raw), -1).all(axis=1)


def hdf5_type(storage_dtype: str) -> h5py.h5t.TypeID:
    """Return the HDF5 datatype of a storage dtype.

    h5py has no bfloat16; the custom float made here equals HDF5 2.0's ``H5T_FLOAT_BFLOAT16LE``, and older tools read
    it as any float.
    """
    if storage_dtype != "bfloat16":
        return h5py.h5t.py_create(STORAGE_DTYPES[storage_dtype])
    bfloat16 = h5py.h5t.IEEE_F16LE.copy()
    bfloat16.set_fields(15, 7, 8, 0, 7)
    bfloat16.set_ebias(127)
    return bfloat16
