"""Choose the micro-batch size and activation checkpointing from measured activation size and free memory.

Losses do not depend on this choice beyond rounding; speed and memory do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

# Values of a micro-batch's hidden states beyond which larger matrices are no faster. On an accelerator the last wave of
# tiles should be a small part of all: 1280 tiles of 128 x 128 are ten waves on 132 multiprocessors, 4096 positions of
# width 5120. A CPU core reaches its full rate much earlier (tests/benchmarks/train_step.py).
SATURATING_VALUES = {"cpu": 2**20}
SATURATING_VALUES_ON_ACCELERATORS = 20 * 2**20
# Part of the free memory that is left unused, for fragmentation and for batches with longer captions.
MARGIN = 0.15
# Every k-th layer is recomputed, from none to all: each step needs less memory and more computation.
CHECKPOINT_STEPS = (0, 4, 2, 1)


@dataclass(frozen=True)
class MicroBatching:
    """How a batch is passed through the LLM.

    Attributes:
        samples: Samples per micro-batch.
        checkpoint_every: Activation checkpointing: 0 keeps all activations, k recomputes those of every k-th layer.
    """

    samples: int
    checkpoint_every: int = 0

    def smaller(self) -> MicroBatching | None:
        """Return the next choice that needs less memory; None if there is none."""
        if self.samples > 1:
            return replace(self, samples=self.samples // 2)
        current = self.checkpoint_every
        steps = [step for step in CHECKPOINT_STEPS if step and (not current or step < current)]
        return replace(self, checkpoint_every=steps[0]) if steps else None

    def __str__(self) -> str:
        """Return a description for the log."""
        known = {0: "no activation checkpointing", 1: "activation checkpointing of every layer"}
        checkpointing = known.get(
            self.checkpoint_every, f"activation checkpointing of one layer in {self.checkpoint_every}"
        )
        return f"micro-batches of {self.samples} sample{'s' if self.samples > 1 else ''}, {checkpointing}"


@dataclass(frozen=True)
class SampleMemory:
    """Memory for the activations of one sample, in bytes.

    Attributes:
        layers: Number of decoder layers.
        layer: Activations that autograd keeps of one layer.
        boundary: Activations that it keeps of one checkpointed layer: its input.
        head: Logits, their float32 copy, and the gradients of both.
    """

    layers: int
    layer: int
    boundary: int
    head: int

    def needed(self, micro_batching: MicroBatching) -> int:
        """Return the peak of a micro-batch in bytes."""
        every = micro_batching.checkpoint_every
        checkpointed = -(-self.layers // every) if every else 0
        kept = checkpointed * self.boundary + (self.layers - checkpointed) * self.layer
        # The backward pass needs one more layer: gradients of its activations, and what was recomputed.
        passing = self.layer * (2 if checkpointed else 1)
        return micro_batching.samples * (kept + max(passing, self.head))


def choose_micro_batching(
    memory: SampleMemory,
    free: int,
    batch: int,
    saturating: int,
    samples: int | None = None,
    checkpoint_every: int | None = None,
) -> MicroBatching:
    """Choose the fastest micro-batching that fits; small micro-batches cost less than recomputation.

    Sizes are powers of two, so a small difference in free memory seldom changes the choice.

    Args:
        memory: Memory for one sample.
        free: Bytes that a micro-batch may take.
        batch: Samples of the batch.
        saturating: Samples beyond which larger micro-batches are no faster.
        samples: The user's own choice.
        checkpoint_every: The user's own choice.

    Returns:
        The choice; the smallest allowed one if nothing fits.
    """
    largest = 1 << (min(batch, max(saturating, 1)) - 1).bit_length()
    sizes = [largest >> power for power in range(largest.bit_length())] if samples is None else [samples]
    steps = CHECKPOINT_STEPS if checkpoint_every is None else (checkpoint_every,)
    choices = [MicroBatching(size, step) for step in steps for size in sizes if size]
    return next((choice for choice in choices if memory.needed(choice) <= free * (1 - MARGIN)), choices[-1])


def saturating_samples(features: torch.Tensor) -> int:
    """Return how many samples, each of about ``[L, H]`` hidden states, use the full rate of their device."""
    values = SATURATING_VALUES.get(features.device.type, SATURATING_VALUES_ON_ACCELERATORS)
    return -(-values // (features.shape[1] * features.shape[2]))


def analytic_estimate(config: Any, positions: int, kept: int, element_size: int) -> SampleMemory:
    """Estimate the memory for one sample from an LLM's configuration, for the LLaMA family with frozen weights.

    Autograd does not save the input of a frozen matrix. It keeps for a layer: float32 inputs of two norms; queries,
    keys, values and output of the attention; gate, its activation and up-projection of the MLP.

    Args:
        config: The LLM's configuration.
        positions: N, spliced positions.
        kept: Positions whose logits are computed.
        element_size: Bytes of a value in the LLM's dtype.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or 4 * hidden  # GPT-2 and MPT do not list it
    values = 2 * (heads + kv_heads) * head_dim + 3 * inner
    return SampleMemory(
        layers=config.num_hidden_layers,
        layer=positions * (2 * 4 * hidden + element_size * values),
        boundary=positions * hidden * element_size,
        # Logits in the LLM's dtype and in float32, log-probabilities, and the gradients of the first two.
        head=kept * config.vocab_size * (2 * element_size + 12),
    )


def smallest_of_all_ranks(choice: MicroBatching, device: torch.device) -> MicroBatching:
    """Return the choice that fits on every rank; ranks with equal micro-batches wait equally long for each other."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return choice
    none = 1 << 30
    smallest = torch.tensor([choice.samples, choice.checkpoint_every or none], device=device)
    distributed.all_reduce(smallest, op=distributed.ReduceOp.MIN)
    samples, checkpoint_every = smallest.tolist()
    return MicroBatching(samples, 0 if checkpoint_every == none else checkpoint_every)


def saved_bytes(forward: Callable[[], Any], module: nn.Module) -> int:
    """Run a forward pass and return the bytes that autograd keeps for the backward pass, without the module's weights.

    Args:
        forward: Runs the forward pass and returns what holds the graph.
        module: Module whose parameters and buffers are not counted.
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
    del graph  # kept until here: the address of a freed tensor could have been used again
    return total


def free_memory(device: torch.device) -> int:
    """Return the memory that this process can still allocate on a device, or on the host for a CPU.

    Ranks of one node share its host memory evenly.
    """
    if device.type == "cpu":
        return _available_host_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    backend = torch.get_device_module(device)
    free, _ = backend.mem_get_info(device)
    return int(free + backend.memory_reserved(device) - backend.memory_allocated(device))


def _available_host_memory() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        # Not Linux: the standard library knows the total memory only.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
