"""When a cache pays: training runs with it and without, from short measurements on this device.

A run on the fly spends what a run from the cache spends, and the tower's time for each image. So the first run from a
cache costs as much as one on the fly, and every later one saves the extraction. How much that is beside the LLM's own
step is what is measured here. Decoding goes on beside both, in workers: on the fly it is hidden behind tower and LLM,
in an extraction behind the tower alone, so slow decoding costs an extraction before it costs a run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import count
from math import floor
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModel, LlamaConfig

from llava_twophase.errors import UserError

# Hidden width, MLP width, layers, heads, key-value heads: SmolLM2-135M, Qwen2.5-0.5B, TinyLlama, Vicuna-7B and -13B.
SIZES = {
    "135M": (576, 1536, 30, 9, 3),
    "0.5B": (896, 4864, 24, 14, 2),
    "1.1B": (2048, 5632, 22, 32, 4),
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
}
# Positions of a sample beside its image: BOS, and a caption of LLaVA-Pretrain's median length.
_TEXT = 15
_SECONDS = 4.0
# Samples that go through the layer at once, enough to fill it.
_ROWS_ON_ACCELERATORS = 8
# Saving less than this is not called worth the disk.
_WORTH = 0.05
_RUNS = ("run", "runs")


@dataclass(frozen=True)
class Pays:
    """Training runs of one epoch each, with the cache and on the fly, on one device.

    Attributes:
        llm: As it was given.
        runs: K.
        samples: Records of a run.
        step_seconds: The LLM's forward and backward pass, a sample.
        tower_seconds: The tower, an image.
        decode_seconds: Decoding, an image, by all workers together.
        extraction_seconds: Of what is still to encode.
        run_seconds: A run from the cache.
        run_seconds_on_the_fly: A run without one.
        seconds: K runs from the cache, extraction included.
        seconds_on_the_fly: K runs without it.
        saved: The share of K runs' time that the cache saves; negative where it costs time.
        pays_from: The first number of runs that the cache makes faster.
        read_mb_per_second: What a run reads from the cache.
    """

    llm: str
    runs: int
    samples: int
    step_seconds: float
    tower_seconds: float
    decode_seconds: float
    extraction_seconds: float
    run_seconds: float
    run_seconds_on_the_fly: float
    seconds: float
    seconds_on_the_fly: float
    saved: float
    pays_from: int
    read_mb_per_second: float

    def text(self) -> str:
        """Return the figures in lines, with what follows from them."""
        if self.runs < self.pays_from:
            verdict = f"does not pay within {self.runs} {_RUNS[self.runs > 1]}"
        elif self.saved < _WORTH:
            verdict = f"pays from run {self.pays_from} on, but hardly: images that are slow to read may be a reason"
        else:
            verdict = f"pays from run {self.pays_from} on"
        runs = f"{self.runs} {_RUNS[self.runs > 1]}"
        alone, fly = _hours(self.run_seconds), _hours(self.run_seconds_on_the_fly)
        return "\n".join(
            [
                f"a run       {alone} from the cache, {fly} on the fly, with {self.llm} on this device alone",
                f"{runs:<11} {_hours(self.seconds)} from the cache and its extraction, "
                f"{_hours(self.seconds_on_the_fly)} on the fly: {round(100 * self.saved, 1) + 0:.1f} % saved",
                f"the cache   {verdict}; a run reads {self.read_mb_per_second:.1f} MB/s of it: a slower disk slows it",
            ]
        )


def weigh(
    llm: str,
    runs: int,
    samples: int,
    to_encode: int,
    step_seconds: float,
    rates: tuple[float, float],
    row_bytes: int,
) -> Pays:
    """Add up K runs both ways.

    Args:
        llm: What to call the LLM.
        runs: K, at least 1.
        samples: Records of a run.
        to_encode: Images that are not cached yet.
        step_seconds: The LLM's forward and backward pass, a sample.
        rates: Images/s of the tower, and of decoding by all workers together.
        row_bytes: Stored bytes of an image.
    """
    tower_seconds, decode_seconds = (1 / rate for rate in rates)
    encode = max(tower_seconds, decode_seconds)
    # What a run saves on each sample; as a number of its own, so that the usual case, encode == gain, stays exact.
    gain = max(tower_seconds, decode_seconds - step_seconds)
    extraction, cached = to_encode * encode, samples * step_seconds
    on_the_fly = cached + samples * gain
    return Pays(
        llm,
        runs,
        samples,
        step_seconds,
        tower_seconds,
        decode_seconds,
        extraction,
        cached,
        on_the_fly,
        extraction + runs * cached,
        runs * on_the_fly,
        1 - (extraction + runs * cached) / (runs * on_the_fly),
        pays_from=floor(to_encode / samples * (encode / gain)) + 1,
        read_mb_per_second=row_bytes / step_seconds / 1e6,
    )


def llm_config(llm: str) -> Any:
    """Return the configuration of a size or of a model.

    Args:
        llm: A key of ``SIZES`` in either case, a folder, or a hub id.

    Raises:
        UserError: It is none of them.
    """
    if llm.upper() in SIZES:
        hidden, inner, layers, heads, kv_heads = SIZES[llm.upper()]
        return LlamaConfig(
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
        )
    try:
        config = AutoConfig.from_pretrained(llm).get_text_config()
    except (OSError, ValueError) as error:
        raise UserError(f"--llm {llm}: expected one of {', '.join(SIZES)}, or a model; {error}") from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"--llm {llm} is a {config.model_type}; expected one of {', '.join(SIZES)}, or a causal LM")
    return config


def measure_step(config: Any, tokens: int, device: torch.device) -> float:
    """Measure what the LLM costs a sample: one layer of its shape, with random weights, times its layers.

    Forward, and backward to the inputs alone, in bfloat16, nothing recomputed, as ``train_projector.py`` does it. The
    output embedding works at caption positions alone; leaving it out misses a few percent of the smallest LLMs' time.

    Args:
        config: The LLM's.
        tokens: L, patch tokens of an image.
        device: Where to measure, for some seconds.

    Returns:
        Seconds a sample.
    """
    layers, config.num_hidden_layers = config.num_hidden_layers, 1
    config.vocab_size, config.pad_token_id = 32, None
    with device:
        layer = AutoModel.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
        rows = 1 if device.type == "cpu" else _ROWS_ON_ACCELERATORS
        inputs = torch.randn(rows, tokens + _TEXT, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    best, begun = float("inf"), time.perf_counter()
    # At least twice, however slow: the first pass pays for what is set up once.
    for attempt in count():
        started = time.perf_counter()
        hidden = layer(inputs_embeds=inputs, use_cache=False).last_hidden_state
        torch.autograd.grad(hidden, inputs, torch.ones_like(hidden))
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        now = time.perf_counter()
        best = min(best, now - started)
        if attempt and now - begun > _SECONDS:
            break
    return layers * best / rows


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
