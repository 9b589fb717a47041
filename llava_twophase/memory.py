"""Recognises that memory is used up, however a library reports it."""

from __future__ import annotations

import errno

_MESSAGES = (
    "out of memory",  # CUDA, and accelerators through torch
    "not enough memory",  # torch's CPU allocator before 2.7
    "can't allocate memory",  # torch's CPU allocator
    "std::bad_alloc",  # C++ code that torch calls
    "ALLOC_FAILED",  # cuBLAS and cuDNN
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that memory of the host or of a device is used up."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)
