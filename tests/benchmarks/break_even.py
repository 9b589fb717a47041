"""Break-even of a cache by the size of the LLM: measured on this machine, or computed for another device.

    python tests/benchmarks/break_even.py                 # CLIP-L/14-336 with random weights, some minutes on two cores
    python tests/benchmarks/break_even.py --paper 400     # computed: a device that reaches 400 TFLOP/s

The same code as `extract_features.py --plan --llm`, for the 558,128 images and as many records of LLaVA-Pretrain and a
bf16 cache. The last line is one JSON object.
"""

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from extract import TOKENS, flops, write_pictures, write_tower
from llava_twophase.cpu import available_cpus
from llava_twophase.extract.break_even import SIZES, compute_break_even, llm_config, measure_step
from llava_twophase.extract.calibrate import Rates, measure_rates
from llava_twophase.extract.tower import plain_codec
from llava_twophase.train.loop.metrics import StepFlops
from llava_twophase.vision.preprocess import Preprocessor
from llava_twophase.vision.sources import ImageFolder
from llava_twophase.vision.tower import VisionTower

IMAGES, ROW_BYTES, LAYERS = 558_128, 1_179_648, 23


def on_paper(teraflops):
    """Rates of the tower and of decoding, which never limits; seconds per sample of each LLM. From FLOP counts."""
    steps = {}
    for name, (hidden, inner, layers, heads, kv_heads) in SIZES.items():
        weights = layers * (2 * hidden * hidden * (1 + kv_heads / heads) + 3 * hidden * inner)
        counts = StepFlops(int(weights), 0, layers * hidden)
        steps[name] = counts.count(1, TOKENS - 1 + 15, 0) / teraflops / 1e12
    return Rates(teraflops * 1e12 / flops(LAYERS), float("inf")), steps


def measured(device):
    """The same, measured."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tower(folder, LAYERS + 1)
        keys = write_pictures(folder, 8)
        tower = VisionTower(name, Preprocessor(name), dtype=torch.bfloat16, device=device)
        codec = plain_codec(tower, "bfloat16")
        rates = measure_rates(ImageFolder(folder), tower, codec, keys, len(keys), available_cpus())
        assert rates is not None
    return rates, {name: measure_step(llm_config(name), TOKENS - 1, device) for name in SIZES}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", type=float, help="TFLOP/s of a device, instead of measuring this one")
    parser.add_argument("--runs", type=int, default=5, help="runs that use the cache (default: 5)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates, steps = on_paper(args.paper) if args.paper else measured(device)
    name = (
        f"on paper, {args.paper:g} TFLOP/s"
        if args.paper
        else f"{platform.platform()}, {device}, {available_cpus()} CPUs"
    )
    table = Table("LLM", "extraction", "a run, cached", "on the fly", f"{args.runs} runs save", "reads", box=None)
    line = {"images_per_second": round(rates.extraction, 3)}
    for llm, step in steps.items():
        found = compute_break_even(
            llm=llm,
            runs=args.runs,
            samples=IMAGES,
            to_encode=IMAGES,
            step_seconds=step,
            rates=rates,
            row_bytes=ROW_BYTES,
        )
        hours = [
            seconds / 3600 for seconds in (found.extraction_seconds, found.run_seconds, found.run_seconds_on_the_fly)
        ]
        table.add_row(
            llm, *(f"{hour:.1f} h" for hour in hours), f"{found.saved:.1%}", f"{found.read_mb_per_second:,.0f} MB/s"
        )
        line[llm] = {
            "step_seconds": round(step, 5),
            "saved": round(found.saved, 4),
            "first_faster_run": found.first_faster_run,
        }
    console = Console(width=110)
    console.print(
        f"{name}; {IMAGES} images, {IMAGES * ROW_BYTES / 1e9:.0f} GB in bf16, {rates.extraction:.2f} images/s"
    )
    console.print(table)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
