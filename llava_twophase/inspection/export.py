"""``export`` and ``head``: features of a few images as a file that other tools read, or as numbers on the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from llava_twophase.cache.format import canonical_json
from llava_twophase.inspection import output
from llava_twophase.inspection.rows import CheckedRows

_TOKENS, _CHANNELS = 6, 8


def run_export(path: str, keys: Sequence[str], file: str, kind: str) -> int:
    """Write features and their keys to one file.

    Args:
        path: The cache's directory.
        keys: Image keys.
        file: File to write.
        kind: ``npz``, ``safetensors`` or ``pt``.
    """
    rows = CheckedRows(path)
    output.check_output(file)
    found = rows.find(keys)
    names, stored = rows.keys(found), rows.stored(found)
    if kind == "npz":
        shape, dtype = _write_npz(rows, names, stored, file)
    else:
        shape, dtype = _write_tensor(rows, names, stored, file, kind)
    output.print_written(file, f"features {' x '.join(map(str, shape))}, {dtype}")
    return 0


def _write_npz(rows: CheckedRows, names: list[str], stored: np.ndarray, path: str) -> tuple[tuple[int, ...], str]:
    # numpy has no bfloat16: float32 represents it exactly.
    features = rows.cache.codec.to_numpy(stored)
    if rows.cache.dtype == "float16":
        features = features.astype(np.float16)
    arrays: dict[str, Any] = {"keys": np.array(names), "fingerprint": np.array(canonical_json(rows.cache.fingerprint))}
    output.write_file(path, lambda file: np.savez(file, features=features, **arrays))
    return features.shape, str(features.dtype)


def _write_tensor(
    rows: CheckedRows, names: list[str], stored: np.ndarray, path: str, kind: str
) -> tuple[tuple[int, ...], str]:
    import torch

    features = rows.cache.codec.from_rows(torch.from_numpy(stored)).contiguous()
    if kind == "pt":
        content = {"features": features, "keys": names, "fingerprint": rows.cache.fingerprint}
        output.write_file(path, lambda file: torch.save(content, file))
    else:
        from safetensors.torch import save

        texts = {"keys": json.dumps(names), "fingerprint": canonical_json(rows.cache.fingerprint)}
        data = save({"features": features}, metadata=texts)
        output.write_file(path, lambda file: file.write(data))
    return tuple(features.shape), str(features.dtype).removeprefix("torch.")


def run_head(path: str, key: str, as_json: bool) -> int:
    """Print the first tokens and channels of an image, and what the cache records about it."""
    rows = CheckedRows(path)
    found = rows.find([key])
    row = int(found[0])
    values = rows.values(found)[0]  # [L, D]
    source = rows.source(row)
    result = {
        "key": rows.keys(found)[0],
        "row": row,
        "dtype": rows.cache.dtype,
        "source_size": source[0] if source else None,
        "source_sha256": source[1].hex() if source else None,
        "values": values.tolist(),
    }
    output.print_result(result, as_json, lambda out: _print_head(result, values, len(rows.cache), out))
    return 0


def _print_head(result: dict[str, Any], values: np.ndarray, count: int, out: Console) -> None:
    wide = values.astype(np.float64)
    norms = np.linalg.norm(wide, axis=-1)
    source = (
        f"{result['source_size']:,} bytes, SHA-256 {result['source_sha256'][:16]}..."
        if result["source_sha256"]
        else None
    )
    recorded = {
        "row": f"{result['row']:,} of {count:,}",
        "features": f"{values.shape[0]} tokens x {values.shape[1]}, {result['dtype']}",
        "mean, std": f"{output.number(float(wide.mean()))}, {output.number(float(wide.std()))}",
        "min, max": f"{output.number(float(wide.min()))}, {output.number(float(wide.max()))}",
        "token norms": f"{output.number(float(norms.min()))} to {output.number(float(norms.max()))}",
        "made from": source or output.NOT_RECORDED,
    }
    output.print_line(result["key"], out, "bold")
    output.print_names(recorded, out)
    out.print()
    tokens, channels = min(_TOKENS, len(values)), min(_CHANNELS, values.shape[1])
    table = ([str(token), *(f"{value:.4f}" for value in values[token, :channels])] for token in range(tokens))
    output.print_table(table, out, ("token", *(f"ch {channel}" for channel in range(channels))))
