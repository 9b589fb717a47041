"""Read the entries of a Parquet file with the columns of LLaVA's JSON: id, image, conversations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_twophase.errors import UserError

_MAGIC = b"PAR1"
_ROWS = 8192
_USED = ("id", "image", "conversations")
_EXPECTED = "expected image (string) and conversations (list of struct with value), as LLaVA's JSON has them"


def is_parquet(path: Path) -> bool:
    """Return whether a file begins as Parquet files do."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def read_parquet_records(path: Path) -> Iterator[Any]:
    """Read the rows of a Parquet file as JSON has them.

    Raises:
        UserError: pyarrow is not installed, the file is damaged, or it has other columns.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path} is a Parquet file, which needs pyarrow: pip install 'llava-twophase[parquet]'"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require_columns(file.schema_arrow, path)
            columns = [name for name in _USED if name in file.schema_arrow.names]
            for batch in file.iter_batches(_ROWS, columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is a Parquet file that cannot be read: {reason}; copy or write it again") from None


def _require_columns(schema: Any, path: Path) -> None:
    from pyarrow import types

    found = dict(zip(schema.names, schema.types, strict=True))
    missing = [name for name in ("image", "conversations") if name not in found]
    if missing:
        raise UserError(f"{path} has the columns {', '.join(found)}, not {' and '.join(missing)}; {_EXPECTED}")
    image, turns = found["image"], found["conversations"]
    if not (_is_string(image) or _is_list(image) and _is_string(image.value_type)):
        hint = "; write embedded images to files first" if types.is_struct(image) else ""
        raise UserError(f"{path} has an image column of {image}; {_EXPECTED}{hint}")
    if not (_is_list(turns) and types.is_struct(turns.value_type)):
        raise UserError(f"{path} has a conversations column of {turns}; {_EXPECTED}")


def _is_string(kind: Any) -> bool:
    from pyarrow import types

    values = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(values) or types.is_large_string(values) or types.is_string_view(values))


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))
