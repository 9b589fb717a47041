"""``export`` and ``head``: features of a few images as a file that other tools read, or as numbers on the terminal."""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np

from llava_twophase.cache.format import canonical_json
from llava_twophase.inspection import output
from llava_twophase.inspection.rows import Rows

FORMATS = ("npz", "safetensors", "pt")
_TOKENS, _CHANNELS = 6, 8


def run_export(args: argparse.Namespace) -> int:
    """Write features and their keys to one file."""
    rows = Rows(args.cache)
    stored = rows.stored(np.array([rows.find(key) for key in args.keys]))
    fingerprint = canonical_json(rows.cache.fingerprint)
    if args.to == "npz":
        # numpy has no bfloat16: float32 holds it exactly.
        features: Any = rows.cache.codec.to_numpy(stored)
        if rows.cache.dtype == "float16":
            features = features.astype(np.float16)
        keys, made = np.array(args.keys), np.array(fingerprint)
        output.write_file(args.output, lambda file: np.savez(file, features=features, keys=keys, fingerprint=made))
        dtype = str(features.dtype)
    else:
        features, dtype = _write_tensor(args, rows, stored, fingerprint)
    shape = " x ".join(map(str, features.shape))
    output.print_line(f"wrote {args.output}: features {shape}, {dtype}", output.console())
    return 0


def _write_tensor(args: argparse.Namespace, rows: Rows, stored: np.ndarray, fingerprint: str) -> tuple[Any, str]:
    import torch

    features = rows.cache.codec.from_rows(torch.from_numpy(stored)).contiguous()
    if args.to == "pt":
        content = {"features": features, "keys": list(args.keys), "fingerprint": json.loads(fingerprint)}
        output.write_file(args.output, lambda file: torch.save(content, file))
    else:
        from safetensors.torch import save

        texts = {"keys": json.dumps(args.keys), "fingerprint": fingerprint}
        data = save({"features": features}, metadata=texts)
        output.write_file(args.output, lambda file: file.write(data))
    return features, str(features.dtype).removeprefix("torch.")


def run_head(args: argparse.Namespace) -> int:
    """Print the first tokens and channels of an image, and what the cache knows of it."""
    rows, out = Rows(args.cache), output.console()
    row = rows.find(args.key)
    values = rows.values(np.array([row]))[0]  # [L, D]
    cache = rows.cache
    digest = rows.digest(row).hex()
    size = int(cache.column("source_size")[row])
    norms = np.linalg.norm(values, axis=-1)
    tokens, channels = min(_TOKENS, len(values)), min(_CHANNELS, values.shape[1])
    if args.json:
        finite = np.where(np.isfinite(values), values, np.nan)
        shown = [[None if np.isnan(value) else float(value) for value in token] for token in finite]
        output.print_json(
            {"key": args.key, "row": row, "dtype": cache.dtype, "source_size": size, "source_sha256": digest,
             "values": shown}, out,
        )  # fmt: skip
        return 0
    known = {
        "row": f"{row:,} of {len(cache):,}",
        "features": f"{values.shape[0]} tokens x {values.shape[1]}, {cache.dtype}",
        "mean, std": f"{output.number(float(values.mean()))}, {output.number(float(values.std()))}",
        "min, max": f"{output.number(float(values.min()))}, {output.number(float(values.max()))}",
        "token norms": f"{output.number(float(norms.min()))} to {output.number(float(norms.max()))}",
        "made from": f"{size:,} bytes, SHA-256 {digest[:16]}...",
    }
    output.print_line(args.key, out, "bold")
    output.print_table(([f"  {name}", value] for name, value in known.items()), out)
    out.print()
    table = ([str(token), *(f"{value:.4f}" for value in values[token, :channels])] for token in range(tokens))
    output.print_table(table, out, ("token", *(f"ch {channel}" for channel in range(channels))))
    return 0
