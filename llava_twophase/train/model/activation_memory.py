"""Memory for the activations of a frozen LLM: estimated from its configuration, and measured by a forward pass."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class ActivationMemory:
    """Memory for activations, in bytes.

    Attributes:
        layers: Number of decoder layers.
        image_tokens: L, positions that replace the image token.
        layer: Activations that autograd keeps of one layer, for each position.
        attention: The same for each pair of positions; 0 for attention kernels that do not store their weights.
        boundary: Activations that it keeps of one checkpointed layer, its input, for each position.
        head: Logits, their float32 copy, and the gradients of both, for each caption position.
    """

    layers: int
    image_tokens: int
    layer: int
    attention: int
    boundary: int
    head: int

    def needed(self, samples: int, length: int, checkpoint_every: int) -> int:
        """Return the peak of a micro-batch in bytes.

        Args:
            samples: Number of samples.
            length: Number of ids of the longest one.
            checkpoint_every: Activation checkpointing, as in ``MicroBatching``.
        """
        positions = length - 1 + self.image_tokens
        layer = positions * self.layer + positions * positions * self.attention
        checkpointed = -(-self.layers // checkpoint_every) if checkpoint_every else 0
        kept = checkpointed * positions * self.boundary + (self.layers - checkpointed) * layer
        # The backward pass needs one more layer: gradients of its activations, and what was recomputed.
        passing = layer * (2 if checkpointed else 1)
        return samples * (kept + max(passing, length * self.head))


def analytic_estimate(config: Any, image_tokens: int, element_size: int) -> ActivationMemory:
    """Estimate the memory for activations from an LLM's configuration, for the LLaMA family with frozen weights.

    Autograd does not save the input of a frozen matrix. It keeps for a layer: float32 inputs of two norms; queries,
    keys, values and output of the attention; gate, its activation and up-projection of the MLP.

    Args:
        config: The LLM's configuration.
        image_tokens: L, positions that replace the image token.
        element_size: Bytes of a value in the LLM's dtype.
    """
    hidden, heads = config.hidden_size, _largest(config.num_attention_heads)
    head_dim = _largest(getattr(config, "head_dim", None)) or hidden // heads
    kv_heads = _largest(getattr(config, "num_key_value_heads", None)) or heads
    inner = _largest(getattr(config, "intermediate_size", None)) or 4 * hidden  # GPT-2 and MPT do not list it
    values = 2 * (heads + kv_heads) * head_dim + 3 * inner
    return ActivationMemory(
        layers=config.num_hidden_layers,
        image_tokens=image_tokens,
        layer=2 * 4 * hidden + element_size * values,
        attention=0,
        boundary=hidden * element_size,
        # Logits in the LLM's dtype and in float32, log-probabilities, and the gradients of the first two.
        head=config.vocab_size * (2 * element_size + 12),
    )


def _largest(value: Any) -> Any:
    """Return the largest of a value for each layer, or the one value for all."""
    return max(value) if isinstance(value, (list, tuple)) else value


def measure_activations(llm: Any, embeds: torch.Tensor, estimate: ActivationMemory) -> ActivationMemory:
    """Measure what autograd keeps of a layer; includes the attention kernel, and what Liger and the compiler save.

    Args:
        llm: The causal LM.
        embeds: ``[1, N, H]``, one sample.
        estimate: The analytic estimate; returned as it is if the sample does not fit in memory.
    """
    last = torch.zeros(1, dtype=torch.long, device=embeds.device)

    def saved(positions: int) -> float:
        leaf = embeds[:, :positions].detach().clone().requires_grad_()
        with torch.enable_grad():
            total = saved_bytes(lambda: llm(inputs_embeds=leaf, use_cache=False, logits_to_keep=last), llm)
        return total / positions / estimate.layers

    long, short = embeds.shape[1], -(-embeds.shape[1] // 2)
    try:
        at_long, at_short = saved(long), saved(short)
    except torch.OutOfMemoryError:
        return estimate
    # Bytes per position grow with the number of positions if the kernel stores attention weights.
    attention = max(0.0, (at_long - at_short) / (long - short))
    return replace(estimate, layer=int(at_long - attention * long) + 1, attention=int(attention))


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


def process_memory(peak: bool = False) -> int:
    """Return the bytes of host memory that this process has; on other systems than Linux, its peak.

    Args:
        peak: Return the most that it had.
    """
    try:
        # Not ru_maxrss: it is at least the memory of the process that started this one.
        with open("/proc/self/status", encoding="ascii") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["VmHWM" if peak else "VmRSS"].split()[0]) * 1024
    except (OSError, KeyError):
        found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return found if sys.platform == "darwin" else found * 1024


def _available_host_memory() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        # Not Linux: the standard library knows the total memory only.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
