"""``coverage``: a cache beside its records: what lacks features, what nobody uses, what stands twice, what is cut."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from tqdm import tqdm

from llava_twophase.cache.quarantine import read_quarantine
from llava_twophase.inspection import output
from llava_twophase.inspection.rows import Rows, twins
from llava_twophase.records import Record, load_records

_WORDS = (0, 5, 10, 15, 20, 30, 50, 100)
_EXAMPLES = 5


def run(args: argparse.Namespace) -> int:
    """Print the coverage; 1 where records have no features."""
    records, out = load_records(args.data_path), output.console()
    values = coverage(Rows(args.cache), records)
    values["truncated"] = None
    if args.model_name_or_path:
        tokens = values["image_tokens"]
        values["truncated"] = truncated(records, args.model_name_or_path, args.model_max_length, tokens)
    if args.json:
        output.print_json({"path": args.cache, "data_path": args.data_path, **values}, out)
    else:
        _print(values, args, out)
    return 1 if values["images_without_features"] else 0


def coverage(rows: Rows, records: Sequence[Record]) -> dict[str, Any]:
    """Hold a cache against records.

    Args:
        rows: The cache.
        records: What is to be trained on.

    Returns:
        JSON values: counts, and a few examples of each kind.
    """
    cache = rows.cache
    uses = Counter(record.image for record in records)
    keys = list(uses)
    found = cache.find(keys)
    left_out = read_quarantine(cache.path)
    absent = [key for key, row in zip(keys, found.tolist(), strict=True) if row < 0]
    quarantined = [key for key in absent if key in left_out]
    missing = [key for key in absent if key not in left_out]
    used = np.zeros(len(cache), bool)
    used[found[found >= 0]] = True
    unused = np.flatnonzero(~used)
    groups = twins(cache)
    repeated = [(key, count) for key, count in uses.most_common() if count > 1]
    gone = set(absent)
    return {
        "records": len(records),
        "records_with_features": len(records) - sum(uses[key] for key in absent),
        "images": len(keys),
        "images_with_features": len(keys) - len(absent),
        "images_without_features": len(missing),
        "images_quarantined": len(quarantined),
        "features_unused": len(unused),
        "images_in_several_records": len(repeated),
        "pictures_under_several_keys": len(groups),
        "keys_of_such_pictures": int(sum(map(len, groups))),
        "image_tokens": cache.feature_shape[0],
        "caption_words": _histogram([len(record.caption.split()) for record in records if record.image not in gone]),
        "examples": {
            "without_features": missing[:_EXAMPLES],
            "quarantined": quarantined[:_EXAMPLES],
            "unused": rows.keys(unused[:_EXAMPLES]),
            "in_several_records": [f"{key} ({count} records)" for key, count in repeated[:_EXAMPLES]],
            "under_several_keys": [" = ".join(rows.keys(group[:3])) for group in groups[:_EXAMPLES]],
        },
    }


def truncated(records: Sequence[Record], name: str, model_max_length: int, image_tokens: int) -> dict[str, Any]:
    """Count the captions that training would cut.

    Args:
        records: The records.
        name: The LLM's hub id or folder.
        model_max_length: Training's.
        image_tokens: Positions that an image takes.

    Returns:
        ``captions``: how many; ``room``: the tokens that a caption and its newline may have; ``examples``.

    Raises:
        UserError: There is no such tokenizer, or no room at all.
    """
    from transformers import AutoTokenizer

    from llava_twophase.errors import UserError
    from llava_twophase.train.data.conversation import PlainTemplate
    from llava_twophase.train.data.tokenizer import load_caption_tokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name_or_path {name}: no tokenizer could be loaded: {error}") from None
    template = PlainTemplate(load_caption_tokenizer(name, tokenizer), model_max_length, image_tokens)
    room = template.max_ids - len(template.prompt)
    cut = []
    for record in tqdm(records, desc="captions", unit="record", disable=None):
        if template.truncates(record.caption):
            cut.append(record.image)
    return {"captions": len(cut), "room": room, "model_max_length": model_max_length, "examples": cut[:_EXAMPLES]}


def _histogram(words: list[int]) -> dict[str, int]:
    values = np.array(words, np.int64)
    counts = {"0": int((values == 0).sum())}
    for low, high in zip(_WORDS, _WORDS[1:], strict=False):
        counts[f"{low + 1}-{high}"] = int(((values > low) & (values <= high)).sum())
    counts[f"over {_WORDS[-1]}"] = int((values > _WORDS[-1]).sum())
    return counts


def headline(values: dict[str, Any], data_path: str) -> str:
    """Say in one line how much of the records a cache covers."""
    return f"{values['images_with_features']:,} of {values['images']:,} images of {data_path} have features"


def in_words(values: dict[str, Any]) -> dict[str, str]:
    """Turn a coverage into names and texts, for the terminal and the report."""
    several, keys = values["pictures_under_several_keys"], values["keys_of_such_pictures"]
    return {
        "records": f"{values['records']:,}, {values['records_with_features']:,} with features",
        "images without features": f"{values['images_without_features']:,}",
        "images quarantined": f"{values['images_quarantined']:,}",
        "features nobody uses": f"{values['features_unused']:,}",
        "images in several records": f"{values['images_in_several_records']:,}",
        "pictures under several keys": f"{several:,}, byte for byte, under {keys:,} keys" if several else "0",
        "captions to be truncated": _truncated_in_words(values["truncated"]),
    }


def _print(values: dict[str, Any], args: argparse.Namespace, out: Console) -> None:
    missing = values["images_without_features"]
    output.print_line(headline(values, args.data_path), out, "bold red" if missing else "bold green")
    out.print()
    output.print_table(([f"  {name}", value] for name, value in in_words(values).items()), out)
    examples = {name.replace("_", " "): found for name, found in values["examples"].items() if found}
    if values["truncated"] and values["truncated"]["examples"]:
        examples["truncated"] = values["truncated"]["examples"]
    if examples:
        out.print()
        output.print_line("such as", out, "bold")
        named = ((name if not i else "", key) for name, found in examples.items() for i, key in enumerate(found))
        output.print_table(([f"  {name}", key] for name, key in named), out)
    out.print()
    output.print_line("words of a caption, by records with features", out, "bold")
    output.print_table(output.bars(values["caption_words"]), out)
    if missing:
        out.print()
        output.print_line("run the extraction command with these records: it adds what is missing", out)


def _truncated_in_words(values: dict[str, Any] | None) -> str:
    if values is None:
        return "not counted; --model_name_or_path names the tokenizer"
    return f"{values['captions']:,} of more than {values['room']:,} tokens ({values['model_max_length']} in all)"
