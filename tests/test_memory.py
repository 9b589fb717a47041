"""Errors of memory that is used up, as libraries raise them."""

import errno
import os

import numpy as np
import pytest
import torch

from llava_twophase.memory import is_out_of_memory


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: np.empty(1 << 60, np.uint8), lambda: bytearray(1 << 60)],
    ids=["torch", "numpy", "python"],
)
def test_is_out_of_memory_recognises_failed_allocations(allocate):
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        allocate()
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:116] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
)
def test_is_out_of_memory_recognises_known_messages(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes"), OSError(errno.ENOSPC, "full"), ValueError("out of memory")])
def test_is_out_of_memory_is_false_for_other_errors(error):
    assert not is_out_of_memory(error)
