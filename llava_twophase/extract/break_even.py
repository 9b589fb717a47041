"""Break-even of a cache: training runs with it and without it, from short measurements on this device.

A run on the fly takes the time of a run from the cache plus the tower's time for each image. So the first run from a
cache costs as much as one on the fly, and every later run saves the time of the extraction. How much that is compared
with the LLM's own step is measured here. Workers decode in parallel with both: on the fly, decoding overlaps with tower
and LLM; in an extraction it overlaps with the tower only, so slow decoding slows an extraction before it slows a run.
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
from llava_twophase.extract.calibrate import Rates
from llava_twophase.text import counted

# Hidden width, MLP width, layers, heads, key-value heads: SmolLM2-135M, Qwen2.5-0.5B, TinyLlama, Vicuna-7B and -13B.
SIZES = {
    "135M": (576, 1536, 30, 9, 3),
    "0.5B": (896, 4864, 24, 14, 2),
    "1.1B": (2048, 5632, 22, 32, 4),
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
}
# Positions of a sample besides its image: BOS, and a caption of LLaVA-Pretrain's median length.
_TEXT_POSITIONS = 15
_MEASURED_SECONDS = 4.0
# Samples that go through the layer at once, enough to fill an accelerator.
_ACCELERATOR_SAMPLES = 8
# Saving less than this is not worth the disk space.
_WORTHWHILE = 0.05


@dataclass(frozen=True)
class BreakEven:
    """Time of training runs of one epoch each, with the cache and on the fly, on one device.

    Attributes:
        llm: The LLM, as it was given.
        runs: Number of training runs.
        samples: Records of a run.
        step_seconds: The LLM's forward and backward pass, per sample.
        tower_seconds: The tower, per image.
        decode_seconds: Decoding by all workers together, per image.
        extraction_seconds: Extraction of the images that are not cached yet.
        run_seconds: A run from the cache.
        run_seconds_on_the_fly: A run without a cache.
        seconds: All runs from the cache, extraction included.
        seconds_on_the_fly: All runs without a cache.
        saved: The part of the time of all runs that the cache saves; negative if it costs time.
        first_faster_run: The smallest number of runs for which the cache is faster.
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
    first_faster_run: int
    read_mb_per_second: float

    def text(self) -> str:
        """Return the figures and the conclusion in lines."""
        runs = counted(self.runs, "run")
        cached, on_the_fly = _duration(self.run_seconds), _duration(self.run_seconds_on_the_fly)
        saved = round(100 * self.saved, 1) + 0  # no "-0.0"
        return "\n".join(
            [
                f"a run       {cached} from the cache, {on_the_fly} on the fly, with {self.llm} on this device alone",
                f"{runs:<11} {_duration(self.seconds)} from the cache and its extraction, "
                f"{_duration(self.seconds_on_the_fly)} on the fly: {saved:.1f} % saved",
                f"the cache   {self._conclusion(runs)}; a run reads {self.read_mb_per_second:.1f} MB/s from it, "
                "so a slower disk slows the run",
            ]
        )

    def _conclusion(self, runs: str) -> str:
        if self.runs < self.first_faster_run:
            return f"does not break even within {runs}"
        if self.saved < _WORTHWHILE:
            return (
                f"breaks even at run {self.first_faster_run} but saves less than {_WORTHWHILE:.0%}; "
                "worth it only if images are slow to read"
            )
        return f"breaks even at run {self.first_faster_run}"


def compute_break_even(
    llm: str, runs: int, samples: int, to_encode: int, step_seconds: float, rates: Rates, row_bytes: int
) -> BreakEven:
    """Compute the time of several training runs with the cache and on the fly.

    Args:
        llm: The LLM's name in the report.
        runs: Number of training runs, at least 1.
        samples: Records of a run.
        to_encode: Images that are not cached yet.
        step_seconds: The LLM's forward and backward pass, per sample.
        rates: Images per second of the tower and of decoding.
        row_bytes: Stored bytes of an image.
    """
    tower_seconds, decode_seconds = 1 / rates.tower, 1 / rates.decode
    encode = max(tower_seconds, decode_seconds)
    # What a cached run saves per sample. Computed on its own, so that the usual case, encode == gain, is exact.
    gain = max(tower_seconds, decode_seconds - step_seconds)
    extraction = to_encode * encode
    cached_run = samples * step_seconds
    on_the_fly_run = cached_run + samples * gain
    cached_total = extraction + runs * cached_run
    on_the_fly_total = runs * on_the_fly_run
    return BreakEven(
        llm=llm,
        runs=runs,
        samples=samples,
        step_seconds=step_seconds,
        tower_seconds=tower_seconds,
        decode_seconds=decode_seconds,
        extraction_seconds=extraction,
        run_seconds=cached_run,
        run_seconds_on_the_fly=on_the_fly_run,
        seconds=cached_total,
        seconds_on_the_fly=on_the_fly_total,
        saved=1 - cached_total / on_the_fly_total,
        first_faster_run=floor(to_encode / samples * (encode / gain)) + 1,
        read_mb_per_second=row_bytes / step_seconds / 1e6,
    )


def llm_config(llm: str) -> Any:
    """Return the configuration of an LLM.

    Args:
        llm: A key of ``SIZES`` in upper or lower case, a folder, or a hub id.

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
    """Measure the LLM's time per sample: one layer of its shape with random weights, times its number of layers.

    Runs the forward pass, and the backward pass to the inputs only, in bfloat16 without recomputation, as
    ``train_projector.py`` does. The output embedding runs at caption positions only; not measuring it misses a few
    percent of the smallest LLMs' time.

    Args:
        config: The LLM's configuration.
        tokens: L, patch features of an image.
        device: The device to measure on.

    Returns:
        Seconds per sample.
    """
    layers, config.num_hidden_layers = config.num_hidden_layers, 1
    config.vocab_size, config.pad_token_id = 32, None
    samples = 1 if device.type == "cpu" else _ACCELERATOR_SAMPLES
    size = (samples, tokens + _TEXT_POSITIONS, config.hidden_size)
    from_config: Any = AutoModel.from_config
    with device:
        layer = from_config(config, dtype=torch.bfloat16).requires_grad_(False)
        inputs = torch.randn(size, dtype=torch.bfloat16, requires_grad=True)
    best, begun = float("inf"), time.perf_counter()
    # At least twice, even if slow: the first pass includes one-time set-up.
    for attempt in count():
        started = time.perf_counter()
        hidden = layer(inputs_embeds=inputs, use_cache=False).last_hidden_state
        torch.autograd.grad(hidden, inputs, torch.ones_like(hidden))
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        now = time.perf_counter()
        best = min(best, now - started)
        if attempt and now - begun > _MEASURED_SECONDS:
            break
    return float(layers * best / samples)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
