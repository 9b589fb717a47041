"""Measure how many of a step's positions are padding, for different ways to batch samples of different lengths.

    python tests/benchmarks/padding.py                                    # captions drawn like LLaVA-Pretrain's
    python tests/benchmarks/padding.py --data_path J --tokenizer FOLDER   # other captions

Padding is what packing several samples into a row could save, and what grouping by length saves in part, at the price
of another order of samples. The last line is one JSON object.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table


def caption_lengths(args):
    """Tokens of each caption: of given records, or drawn with a median of 14 and a long tail."""
    if args.data_path is None:
        rng = np.random.default_rng(0)
        return np.clip(np.exp(rng.normal(np.log(14), 0.5, args.samples)), 4, 256).astype(int)
    from transformers import AutoTokenizer

    from llava_twophase.records import load_records

    captions = [record.caption for record in load_records(args.data_path)]
    return np.array([len(ids) for ids in AutoTokenizer.from_pretrained(args.tokenizer)(captions)["input_ids"]])


def padding(lengths, batch, samples, image):
    """Share of positions that are padding, in micro-batches of so many samples, longest first within a batch."""
    batches = lengths[: len(lengths) // batch * batch].reshape(-1, batch)
    micro_batches = -np.sort(-batches, axis=1).reshape(len(batches), -1, samples)
    computed = (micro_batches[:, :, 0] + image).sum() * samples
    return 1 - (micro_batches + image).sum() / computed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, help="records; without it captions are drawn")
    parser.add_argument("--tokenizer", help="folder or hub id, with --data_path")
    parser.add_argument("--samples", type=int, default=320_000, help="captions to draw (default: 320000)")
    parser.add_argument("--batch", type=int, default=32, help="samples of a batch (default: 32)")
    parser.add_argument("--image", type=int, default=578, help="positions other than the caption's (default: 576 + 2)")
    args = parser.parse_args()
    if args.data_path is not None and args.tokenizer is None:
        parser.error("--data_path needs --tokenizer")
    lengths = caption_lengths(args)
    shuffled = np.random.default_rng(1).permutation(lengths)
    ways = {
        "batch padded to its longest sample (LLaVA)": padding(shuffled, args.batch, args.batch, args.image),
        "batches of similar lengths (another order)": padding(np.sort(lengths), args.batch, args.batch, args.image),
        **{
            f"micro-batches of {samples}, longest first": padding(shuffled, args.batch, samples, args.image)
            for samples in (16, 8, 4, 2)
        },
        "several samples packed into one row": 0.0,
    }
    table = Table("way", "positions that are padding", box=None)
    for name, share in ways.items():
        table.add_row(name, f"{share:.2%}")
    Console(width=100).print(table)
    print(json.dumps({name: round(float(share), 5) for name, share in ways.items()}))


if __name__ == "__main__":
    main()
