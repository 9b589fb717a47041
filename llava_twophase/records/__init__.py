"""The records of a data file, validated, as columns that processes of a node share.

``load_records`` reads JSON, JSON Lines or Parquet. ``Records`` is a sequence of ``Record``, which are made when they
are asked for: 12 million Python objects would take 17 GB and two minutes.
"""

from __future__ import annotations

from llava_twophase.records.load import image_keys, load_records, records_of
from llava_twophase.records.record import Record, normalize_key
from llava_twophase.records.sequences import ImageKeys, Records

__all__ = ["ImageKeys", "Record", "Records", "image_keys", "load_records", "normalize_key", "records_of"]
