"""How many of a step's positions are padding, by the way in which samples of different lengths come together.

    python tests/benchmarks/padding.py                                    # captions drawn like LLaVA-Pretrain's
    python tests/benchmarks/padding.py --data_path J --tokenizer FOLDER   # your own

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
    """Tokens of each caption: of the user's records, or drawn with 14 at the median and a long tail."""
    if args.data_path is None:
        rng = np.random.default_rng(0)
        return np.clip(np.exp(rng.normal(np.log(14), 0.5, args.samples)), 4, 256).astype(int)
    from transformers import AutoTokenizer

    from llava_twophase.records import load_records

    captions = [record.caption for record in load_records(args.data_path)]
    return np.array([len(ids) for ids in AutoTokenizer.from_pretrained(args.tokenizer)(captions)["input_ids"]])


def padding(lengths, batch, rows, image):
    """Share of positions that are padding, in micro-batches of `rows`, longest samples first within a batch."""
    whole = lengths[: len(lengths) // batch * batch].reshape(-1, batch)
    pieces = -np.sort(-whole, axis=1).reshape(len(whole), -1, rows)  # [batches, micro-batches, rows]
    computed = (pieces[:, :, 0] + image).sum() * rows
    return 1 - (pieces + image).sum() / computed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, help="records; without it captions are drawn")
    parser.add_argument("--tokenizer", help="folder or hub id, with --data_path")
    parser.add_argument("--samples", type=int, default=320_000, help="captions to draw (default: 320000)")
    parser.add_argument("--batch", type=int, default=32, help="samples of a batch (default: 32)")
    parser.add_argument("--image", type=int, default=578, help="positions beside the caption's (default: 576 + 2)")
    args = parser.parse_args()
    if args.data_path is not None and args.tokenizer is None:
        parser.error("--data_path needs --tokenizer")
    lengths = caption_lengths(args)
    shuffled = np.random.default_rng(1).permutation(lengths)
    ways = {
        "batch padded as a whole (LLaVA)": padding(shuffled, args.batch, args.batch, args.image),
        "batches of like lengths (another order)": padding(np.sort(lengths), args.batch, args.batch, args.image),
        **{
            f"micro-batches of {rows}, longest first": padding(shuffled, args.batch, rows, args.image)
            for rows in (16, 8, 4, 2)
        },
        "several samples packed in a row": 0.0,
    }
    table = Table("way", "positions that are padding", box=None)
    for name, share in ways.items():
        table.add_row(name, f"{share:.2%}")
    Console(width=100).print(table)
    print(json.dumps({name: round(float(share), 5) for name, share in ways.items()}))


if __name__ == "__main__":
    main()
