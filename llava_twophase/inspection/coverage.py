"""``coverage``: records without features, features without records, duplicates, and captions that are truncated."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from rich.console import Console
from tqdm import tqdm

from llava_twophase.cache.check.duplicates import duplicate_images
from llava_twophase.cache.quarantine import read_quarantine
from llava_twophase.errors import UserError
from llava_twophase.inspection import output
from llava_twophase.inspection.rows import CheckedRows
from llava_twophase.records import Records, load_records

_WORDS = (0, 5, 10, 15, 20, 30, 50, 100)
_EXAMPLES = 5


def run(
    path: str,
    data_path: str,
    image_folder: str | None,
    llm: str | None,
    model_max_length: int,
    image_tokens: int | None,
    as_json: bool,
) -> int:
    """Print the coverage; return 1 if records have no features."""
    records = load_records(data_path, image_folder=image_folder)
    values = coverage(CheckedRows(path), records)
    values["image_tokens"] = image_tokens or values["image_tokens"]
    values["truncated"] = truncated(records, llm, model_max_length, values["image_tokens"]) if llm else None
    output.print_result(
        {"path": path, "data_path": data_path, **values}, as_json, lambda out: _print(values, data_path, out)
    )
    return 1 if values["images_without_features"] else 0


def coverage(rows: CheckedRows, records: Records) -> dict[str, Any]:
    """Compare a cache with records.

    Args:
        rows: The cache.
        records: Records for training.

    Returns:
        JSON values: counts, and a few examples of each kind.
    """
    cache = rows.cache
    uses = Counter(records.images)
    keys = list(uses)
    found = cache.find(keys)
    excluded = read_quarantine(cache.path)
    absent = [key for key, row in zip(keys, found.tolist(), strict=True) if row < 0]
    quarantined = [key for key in absent if key in excluded]
    missing = [key for key in absent if key not in excluded]
    used = np.zeros(len(cache), bool)
    used[found[found >= 0]] = True
    unused = np.flatnonzero(~used)
    duplicates = duplicate_images(cache)
    repeated = [(key, count) for key, count in uses.most_common() if count > 1]
    without = set(absent)
    return {
        "records": len(records),
        "records_with_features": len(records) - sum(uses[key] for key in absent),
        "images": len(keys),
        "images_with_features": len(keys) - len(absent),
        "images_without_features": len(missing),
        "images_quarantined": len(quarantined),
        "features_unused": len(unused),
        "images_in_several_records": len(repeated),
        "pictures_under_several_keys": len(duplicates),
        "keys_of_such_pictures": int(sum(map(len, duplicates))),
        "image_tokens": cache.feature_shape[0],
        "caption_words": _histogram([len(record.caption.split()) for record in records if record.image not in without]),
        "examples": {
            "without_features": missing[:_EXAMPLES],
            "quarantined": quarantined[:_EXAMPLES],
            "unused": rows.keys(unused[:_EXAMPLES]),
            "in_several_records": [f"{key} ({count} records)" for key, count in repeated[:_EXAMPLES]],
            "under_several_keys": [" = ".join(rows.keys(group[:3])) for group in duplicates[:_EXAMPLES]],
        },
    }


def truncated(records: Records, name: str, model_max_length: int, image_tokens: int) -> dict[str, Any]:
    """Count the captions that training would truncate.

    Args:
        records: The records.
        name: The LLM's hub id or folder.
        model_max_length: ``--model_max_length`` of the training command.
        image_tokens: Positions of an image.

    Returns:
        ``captions``: their number; ``room``: tokens for a caption and its newline; ``examples``.

    Raises:
        UserError: There is no such tokenizer, or there is no room for a caption.
    """
    from transformers import AutoTokenizer

    from llava_twophase.train.data.conversation import PlainTemplate
    from llava_twophase.train.data.tokenizer import load_caption_tokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name_or_path {name}: no tokenizer could be loaded: {error}") from None
    template = PlainTemplate(load_caption_tokenizer(name, tokenizer), model_max_length, image_tokens)
    room = template.max_ids - len(template.prompt)
    found = [
        record.image
        for record in tqdm(records, desc="captions", unit="record", disable=None)
        if template.truncates(record.caption)
    ]
    return {"captions": len(found), "room": room, "model_max_length": model_max_length, "examples": found[:_EXAMPLES]}


def _histogram(words: list[int]) -> dict[str, int]:
    values = np.array(words, np.int64)
    counts = {"0": int((values == 0).sum())}
    for low, high in zip(_WORDS, _WORDS[1:], strict=False):
        counts[f"{low + 1}-{high}"] = int(((values > low) & (values <= high)).sum())
    counts[f"over {_WORDS[-1]}"] = int((values > _WORDS[-1]).sum())
    return counts


def headline(values: dict[str, Any], data_path: str) -> str:
    """Return in one line how many images of the records have features."""
    return f"{values['images_with_features']:,} of {values['images']:,} images of {data_path} have features"


def in_words(values: dict[str, Any]) -> dict[str, str]:
    """Return a coverage as names and texts, for the terminal and the report."""
    several, keys = values["pictures_under_several_keys"], values["keys_of_such_pictures"]
    return {
        "records": f"{values['records']:,}, {values['records_with_features']:,} with features",
        "images without features": f"{values['images_without_features']:,}",
        "images quarantined": f"{values['images_quarantined']:,}",
        "features without records": f"{values['features_unused']:,}",
        "images in several records": f"{values['images_in_several_records']:,}",
        "duplicate images": f"{several:,}, byte for byte, under {keys:,} keys" if several else "0",
        "truncated captions": _truncated_in_words(values["truncated"]),
    }


def _print(values: dict[str, Any], data_path: str, out: Console) -> None:
    missing = values["images_without_features"]
    output.print_line(headline(values, data_path), out, "bold red" if missing else "bold green")
    out.print()
    output.print_names(in_words(values), out)
    examples = {name.replace("_", " "): found for name, found in values["examples"].items() if found}
    if values["truncated"] and values["truncated"]["examples"]:
        examples["truncated"] = values["truncated"]["examples"]
    if examples:
        out.print()
        output.print_line("examples", out, "bold")
        lines = ((name if not i else "", key) for name, found in examples.items() for i, key in enumerate(found))
        output.print_table(([f"  {name}", key] for name, key in lines), out)
    out.print()
    output.print_line("words of a caption, of records with features", out, "bold")
    output.print_table(output.histogram_rows(values["caption_words"]), out)
    if missing:
        out.print()
        output.print_line("run the extraction command with these records: it adds what is missing", out)


def _truncated_in_words(values: dict[str, Any] | None) -> str:
    if values is None:
        return "not counted; give --model_name_or_path for its tokenizer"
    return f"{values['captions']:,} of more than {values['room']:,} tokens ({values['model_max_length']:,} in all)"
