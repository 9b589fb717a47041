"""What fits on a card, with which micro-batch, and how long an epoch takes: computed, on no device.

    python tests/benchmarks/memory_table.py                       # the tables of docs/memory.md
    python tests/benchmarks/memory_table.py --devices 1 --cards 24 48

Memory is that of ``llava-train-projector --plan``: the same functions, given the shapes of LLMs that are in use and
LLaVA's recipe (CLIP-L/14-336, mlp2x_gelu, batches of 32 samples for each device, bf16). Times are operations divided by
a rate that a device is assumed to reach; nothing was run. For quantised weights and ZeRO-3 they are lower bounds.

A cell: peak memory, samples of a micro-batch (r4: every fourth layer is recomputed), time of one epoch over the 558,128
records of LLaVA-Pretrain. The last line is one JSON object.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, Qwen2Config

sys.path.insert(0, str(Path(__file__).parents[2]))

from llava_twophase.train.model.activation_memory import analytic_estimate
from llava_twophase.train.model.projector import build_projector
from llava_twophase.train.plan.llm_weights import LLMWeights, Placement
from llava_twophase.train.plan.memory import Device, Setup, Workload, plan_memory
from llava_twophase.train.plan.projector_memory import ProjectorMemory

# Qwen2.5-0.5B, Qwen2.5-1.5B, Vicuna-7B and Vicuna-13B.
LLMS = {
    "0.5B": Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "1.5B": Qwen2Config(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "7B": LlamaConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "13B": LlamaConfig(
        vocab_size=32_000, hidden_size=5120, intermediate_size=13_824, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=40,
    ),
}  # fmt: skip
WAYS = {
    "bf16": Placement(2),
    "8 bit": Placement(2, bits=8),
    "4 bit": Placement(2, bits=4),
    "ZeRO-3": Placement(2),
}
# Cards of these sizes, and the dense bf16 TFLOP/s of their data sheets: RTX 4090, A100, H100.
CARDS = {24: ("RTX 4090", 165), 40: ("A100", 312), 80: ("H100", 989)}
# Part of the data sheet's rate that a step is assumed to reach: LoRA on one H100, the same work, reaches 400 TFLOP/s.
UTILISATION = 0.4
RECORDS, FEATURES = 558_128, (576, 1024)
# Ids of a typical sample of LLaVA-Pretrain, of the longest of a first batch of 32, and of the longest of all.
TYPICAL, FIRST, LONGEST = 17, 48, 285
BATCH = 32


def workload(config):
    """What LLaVA's recipe trains against an LLM."""
    projector = ProjectorMemory.measure(
        build_projector("mlp2x_gelu", FEATURES[1], config.hidden_size), FEATURES, torch.bfloat16
    )
    return Workload(
        weights=LLMWeights.of(config),
        activations=analytic_estimate(config, projector.tokens, element_size=2),
        projector=projector,
        feature_bytes=FEATURES[0] * FEATURES[1] * 2,
        tower_bytes=0,
        lengths=(FIRST, LONGEST),
    )


def hours(trained, plan, teraflops, devices):
    """Hours of one epoch at the assumed rate; recomputed layers run their forward pass, half of their work, again."""
    positions = TYPICAL - 1 + trained.projector.tokens
    operations = trained.weights.flops.count(1, positions, TYPICAL - 1)
    every = plan.micro_batching.checkpoint_every
    recomputed = 1 + 0.5 / every if every else 1
    # The projector's own gradients make it 6 operations for each weight and position.
    operations = operations * recomputed + 6 * trained.projector.weights * trained.projector.tokens
    return RECORDS * operations / (devices * UTILISATION * teraflops * 1e12) / 3600


def cell(trained, way, card, devices):
    """The plan of one combination, as a line of the table and as numbers."""
    name, peak_rate = CARDS.get(card, ("card", 0))
    placement = WAYS[way]
    setup = Setup(placement, ranks=devices, batch=BATCH, zero_stage=2 if devices > 1 else None)
    if way == "ZeRO-3":
        setup = replace(setup, placement=replace(placement, shares=devices), zero_stage=3)
    plan = plan_memory(trained, setup, Device.absent(card))
    every = plan.micro_batching.checkpoint_every
    numbers = {
        "gb": round(plan.peak / 1e9, 1),
        "fits": plan.fits,
        "micro_batch": plan.samples,
        "recompute": every,
        "hours": round(hours(trained, plan, peak_rate, devices), 2) if plan.fits and peak_rate else None,
    }
    if not plan.fits:
        return f"no: {numbers['gb']:.0f} GB", numbers
    text = f"{numbers['gb']:.0f} GB, {plan.samples}{f'r{every}' if every else ''}"
    # The time to dequantise weights, or to gather them from other devices, is not known.
    least = "" if way == "bf16" else ">"
    if numbers["hours"] is None:
        return text, numbers
    digits = 1 if numbers["hours"] >= 1 else 2
    return f"{text}, {least}{numbers['hours']:.{digits}f} h", numbers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, nargs="+", default=list(CARDS), help="GB of a card (default: 24 40 80)")
    parser.add_argument("--devices", type=int, default=8, help="devices of a run with ZeRO-3 (default: 8)")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args()
    ways = {way: args.devices if way == "ZeRO-3" else 1 for way in WAYS}
    columns = ["card", "LLM", *(f"{way}, {count} GPUs" if count > 1 else way for way, count in ways.items())]
    rows, line = [], {}
    workloads = {llm: workload(config) for llm, config in LLMS.items()}
    for card in args.cards:
        for llm, trained in workloads.items():
            cells = {way: cell(trained, way, card, count) for way, count in ways.items()}
            rows.append([f"{card} GB", llm, *(text for text, _ in cells.values())])
            line |= {f"{card} GB, {llm}, {way}": numbers for way, (_, numbers) in cells.items()}
    if args.markdown:
        print("\n".join("| " + " | ".join(cells) + " |" for cells in [columns, ["---"] * len(columns), *rows]))
    else:
        table = Table(*columns, box=None)
        for cells in rows:
            table.add_row(*cells)
        Console(width=110).print(table)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
