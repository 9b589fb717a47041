"""How a batch is cut into micro-batches, and what is recomputed: from what autograd keeps and what the device has free.

Knows nothing of losses or projectors. The losses do not depend on the cut, so this is about speed and memory alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

# Values of a micro-batch's hidden states beyond which larger matrices gain nothing. An accelerator wants many tiles, so
# that its last wave of them matters little: 1280 tiles of 128 x 128 are ten waves on 132 multiprocessors, 4096
# positions of width 5120. A CPU core has its rate much earlier (tests/benchmarks/train_step.py).
ENOUGH_VALUES = {"cpu": 2**20}
ENOUGH_VALUES_ON_ACCELERATORS = 20 * 2**20
# Kept free for the allocator's fragments, and for batches with longer captions than the first one's.
MARGIN = 0.15
# Every k-th layer, from nothing to all: each step down keeps less and recomputes more.
RECOMPUTE_STEPS = (0, 4, 2, 1)


@dataclass(frozen=True)
class Cut:
    """How a batch goes through the LLM.

    Attributes:
        rows: Samples of one micro-batch.
        recompute: 0 keeps all activations; k recomputes those of every k-th layer in the backward pass.
    """

    rows: int
    recompute: int = 0

    def smaller(self) -> Cut | None:
        """Return the next cut that needs less memory, or None when there is none."""
        if self.rows > 1:
            return replace(self, rows=self.rows // 2)
        steps = RECOMPUTE_STEPS[1:]
        left = [step for step in steps if not self.recompute or step < self.recompute]
        return replace(self, recompute=left[0]) if left else None

    def __str__(self) -> str:
        """Say it for the log."""
        words = {0: "nothing is recomputed", 1: "every layer is recomputed"}
        recomputed = words.get(self.recompute, f"one layer in {self.recompute} is recomputed")
        return f"micro-batches of {self.rows} sample{'s' if self.rows > 1 else ''}, {recomputed}"


@dataclass(frozen=True)
class RowMemory:
    """What one sample costs, in bytes.

    Attributes:
        layers: Decoder layers.
        layer: What autograd keeps of one layer.
        boundary: What it keeps of a recomputed one: its input.
        head: Logits, their float32 copy, and the gradients of both.
    """

    layers: int
    layer: int
    boundary: int
    head: int

    def needed(self, cut: Cut) -> int:
        """Return the peak of a micro-batch in bytes."""
        recomputed = -(-self.layers // cut.recompute) if cut.recompute else 0
        kept = recomputed * self.boundary + (self.layers - recomputed) * self.layer
        # One layer's worth more: gradients of its activations while it is differentiated, and its recomputed self.
        passing = self.layer * (2 if recomputed else 1)
        return cut.rows * (kept + max(passing, self.head))


def choose_cut(
    row: RowMemory, free: int, batch: int, enough: int, rows: int | None = None, recompute: int | None = None
) -> Cut:
    """Choose the fastest cut that fits: rather small micro-batches than recomputation, which costs half a step.

    Rows are powers of two, so that a little more or less free memory seldom changes the choice.

    Args:
        row: What one sample costs.
        free: Bytes that a micro-batch may take.
        batch: Samples of the batch.
        enough: Rows beyond which nothing is gained.
        rows: The user's own choice.
        recompute: The user's own choice.

    Returns:
        The cut; the smallest allowed one when nothing fits.
    """
    largest = 1 << (min(batch, max(enough, 1)) - 1).bit_length()
    sizes = [largest >> power for power in range(largest.bit_length())] if rows is None else [rows]
    cuts = [
        Cut(size, step) for step in (RECOMPUTE_STEPS if recompute is None else (recompute,)) for size in sizes if size
    ]
    return next((cut for cut in cuts if row.needed(cut) <= free * (1 - MARGIN)), cuts[-1])


def enough_rows(features: torch.Tensor) -> int:
    """Return how many samples, each of about ``[L, H]`` hidden states, fill the matrix units of their device."""
    values = ENOUGH_VALUES.get(features.device.type, ENOUGH_VALUES_ON_ACCELERATORS)
    return -(-values // (features.shape[1] * features.shape[2]))


def paper_row(config: Any, positions: int, kept: int, element_size: int) -> RowMemory:
    """Return what one sample costs a LLaMA-family LLM with frozen weights, on paper.

    A frozen matrix needs no saved input. What is kept of a layer: float32 inputs of two norms; queries, keys, values
    and output of the attention; gate, its activation and up-projection of the MLP.

    Args:
        config: The LLM's.
        positions: N, spliced positions.
        kept: Positions whose logits are computed.
        element_size: Bytes of a value in the LLM's dtype.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or 4 * hidden  # what GPT-2 and MPT leave unsaid
    values = 2 * (heads + kv_heads) * head_dim + 3 * inner
    return RowMemory(
        layers=config.num_hidden_layers,
        layer=positions * (2 * 4 * hidden + element_size * values),
        boundary=positions * hidden * element_size,
        # Logits in the LLM's dtype and in float32, log-probabilities, and the gradients of the first two.
        head=kept * config.vocab_size * (2 * element_size + 12),
    )


def agreed(cut: Cut, device: torch.device) -> Cut:
    """Return what fits on every rank: ranks that cut alike wait alike for each other, and under ZeRO-3 they must."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return cut
    nothing = 1 << 30
    smallest = torch.tensor([cut.rows, cut.recompute or nothing], device=device)
    distributed.all_reduce(smallest, op=distributed.ReduceOp.MIN)
    rows, recompute = smallest.tolist()
    return Cut(rows, 0 if recompute == nothing else recompute)


def saved_bytes(forward: Callable[[], Any], module: nn.Module) -> int:
    """Run a forward pass and return the bytes that autograd keeps for its backward pass, without the module's weights.

    Args:
        forward: Runs it, and returns what holds the graph.
        module: Whose parameters and buffers are there anyway.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = forward()
    total = sum(size for pointer, size in kept.items() if pointer not in own)
    del graph  # until here, or a freed tensor's address could have been counted for another
    return total


def free_bytes(device: torch.device) -> int:
    """Return the memory that this process can still take on a device, or on the host for a CPU.

    Ranks of one node share its host memory evenly.
    """
    if device.type == "cpu":
        return _available_host_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    backend = torch.get_device_module(device)
    free, _ = backend.mem_get_info(device)
    return free + backend.memory_reserved(device) - backend.memory_allocated(device)


def _available_host_memory() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        # Not Linux: all of the memory is the best that the standard library can tell.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
