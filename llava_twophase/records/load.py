"""Load a data file: from the columns that an earlier start kept, or entry by entry."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from llava_twophase.errors import UserError, combined_error, short_repr
from llava_twophase.json_file import read_json_records
from llava_twophase.records.builder import Built, ColumnBuilder
from llava_twophase.records.parquet import is_parquet, read_parquet_records
from llava_twophase.records.record import Record
from llava_twophase.records.sequences import Records
from llava_twophase.records.store import build_in_memory, keep_columns
from llava_twophase.text import agree, counted

# Smaller files are read at each start: that takes less than a second.
_KEPT_FROM = 64 * 10**6


def load_records(path: str | Path, flag: str = "--data_path", image_folder: str | Path | None = None) -> Records:
    """Read and check a data file.

    The columns of a large file are kept in the user's cache folder, and mapped at the next start; ``keep_columns`` says
    where and for how long.

    Args:
        path: A JSON list or JSON Lines, in UTF-8 whatever the locale; or Parquet with the columns of LLaVA's JSON.
        flag: The command-line flag that gave it, for errors.
        image_folder: The folder to which absolute image paths are made relative.

    Returns:
        The records in file order.

    Raises:
        UserError: The file is missing, empty or of another form, or records are not valid: all are counted, and the
            first are listed with position and id.
    """
    path = Path(path)
    build = partial(_build, path, flag, image_folder)
    try:
        is_large = path.is_file() and path.stat().st_size >= _KEPT_FROM
    except OSError:
        is_large = False
    return Records.all_of(keep_columns(path, build) if is_large else build_in_memory(build))


def records_of(records: Iterable[Record]) -> Records:
    """Return valid records as a ``Records``."""

    def build(files: Mapping[str, IO[bytes]]) -> Built:
        builder = ColumnBuilder(files)
        builder.add_records(list(records))
        return builder.finish()

    return Records.all_of(build_in_memory(build))


def image_keys(records: Sequence[Record]) -> list[str]:
    """Return each image key once, in the order of its first record."""
    images = records.images if isinstance(records, Records) else (record.image for record in records)
    return list(dict.fromkeys(images))


def _build(path: Path, flag: str, image_folder: str | Path | None, files: Mapping[str, IO[bytes]]) -> Built:
    builder = ColumnBuilder(files, image_folder)
    with _without_garbage_collection():
        entries = read_parquet_records(path) if is_parquet(path) else read_json_records(path, flag)
        builder.add_entries(_without_chat_layout(entries, path))
    built = builder.finish()
    if built.bad:
        heading = f"{path} has {counted(built.bad, 'bad record')}; fix or remove {agree(built.bad, 'it', 'them')}"
        raise combined_error(built.problems, heading, total=built.bad)
    if not built.records:
        raise UserError(f"{path} has no records; expected LLaVA's list of id, image and conversations")
    return built


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    # Entries have no cycles, and looking for some doubles the time to parse them.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _without_chat_layout(entries: Iterator[Any], path: Path) -> Iterator[Any]:
    for position, raw in enumerate(entries):
        if position == 0 and isinstance(raw, dict) and "messages" in raw and "conversations" not in raw:
            raise UserError(
                f"{path} has records with {short_repr(sorted(raw))}, the layout of chat data; expected "
                '{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>"}, '
                '{"from": "gpt", "value": "a caption"}]}'
            )
        yield raw
