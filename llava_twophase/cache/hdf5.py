"""HDF5 structure of a shard file: create an empty file, compare its metadata with the header, read its attributes.

This is the only module that uses h5py. Values are written and read at byte offsets, without HDF5. libhdf5 can crash or
loop forever on damaged metadata, so ``cache/check/hdf5_process.py`` calls this module in another process.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from llava_twophase.cache.format import ALIGNMENT, ENCODINGS, SCHEMA, USER_BLOCK, canonical_json, fingerprint_hash
from llava_twophase.cache.header import Header, StoredDataset

_JSON_ATTRIBUTES = ("fingerprint", "provenance")


def create_shard_file(
    path: Path,
    storage: str,
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
    fingerprint: dict[str, Any],
    provenance: dict[str, Any],
) -> dict[str, StoredDataset]:
    """Create a shard file whose metadata are complete and whose values are not yet written.

    Args:
        path: The file; an existing one is replaced.
        storage: Storage dtype, a key of ``STORAGE_DTYPES``.
        layout: Dtype and shape of every dataset, as ``format.layout`` returns them.
        fingerprint: Content of the attribute ``fingerprint``.
        provenance: Content of the attribute ``provenance``.

    Returns:
        Each dataset with its offset in the file.

    Raises:
        OSError: The file cannot be written.
    """
    datasets = {}
    with (
        _errors_with_errno(path),
        h5py.File(
            path, "w", libver="earliest", userblock_size=USER_BLOCK, alignment_threshold=1, alignment_interval=ALIGNMENT
        ) as file,
    ):
        file.attrs["schema"] = SCHEMA
        file.attrs["fingerprint"] = canonical_json(fingerprint)
        file.attrs["provenance"] = canonical_json(provenance)
        for name, (dtype, shape) in layout.items():
            datasets[name] = StoredDataset(dtype, shape, _create_dataset(file, name, dtype, shape))
        file["features"].attrs["encoding"] = ENCODINGS[storage]
    return datasets


def metadata_problems(path: Path, header: Header) -> Iterator[str]:
    """Open a shard with HDF5 and compare its metadata with its header. Links to other files are not followed.

    Yields:
        One sentence for each difference.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield from _metadata_problems(file, header)
    except Exception as error:  # h5py raises almost any exception on crafted files
        yield f"HDF5 cannot read it: {error!r}"


def read_attributes(path: Path, header: Header) -> dict[str, Any] | None:
    """Read the attributes ``fingerprint`` and ``provenance``; return None if they are damaged."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            found = {name: json.loads(file.attrs[name]) for name in _JSON_ATTRIBUTES}
        intact = all(isinstance(value, dict) for value in found.values())
        return found if intact and fingerprint_hash(found["fingerprint"]) == header.fingerprint else None
    except Exception:  # as above
        return None


def _metadata_problems(file: h5py.File, header: Header) -> Iterator[str]:
    links = {name: type(file.get(name, getlink=True)) for name in file}
    if links != dict.fromkeys(header.datasets, h5py.HardLink):
        yield f"it has HDF5 links other than its datasets: {sorted(map(str, links))}"
        return
    if file.userblock_size != USER_BLOCK or file.id.get_create_plist().get_version()[0] != 0:
        yield "its user block or HDF5 superblock is not of this format"
    for name, data in header.datasets.items():
        if not _matches(file[name].id, name, data):
            yield f"the HDF5 metadata of {name} differ from the header"
    if file.attrs["schema"] != SCHEMA or not isinstance(json.loads(file.attrs["provenance"]), dict):
        yield "its attribute schema or provenance is not of this format"
    if fingerprint_hash(json.loads(file.attrs["fingerprint"])) != header.fingerprint:
        yield "its attribute fingerprint differs from the header"
    if file["features"].attrs["encoding"] != ENCODINGS[header.storage]:
        yield "the attribute encoding of /features is not of this format"


def _matches(dataset: h5py.h5d.DatasetID, name: str, data: StoredDataset) -> bool:
    created = dataset.get_create_plist()
    plain = (
        created.get_layout() == h5py.h5d.CONTIGUOUS and not created.get_external_count() and not created.get_nfilters()
    )
    same = (dataset.shape, dataset.get_offset()) == (data.shape, data.offset)
    return bool(plain and same and dataset.get_type().equal(_datatype(name, data.dtype)))


def _create_dataset(file: h5py.File, name: str, dtype: str, shape: tuple[int, ...]) -> int:
    # Return the offset of the new dataset.
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    space = h5py.h5s.create_simple(shape)
    return int(h5py.h5d.create(file.id, name.encode(), _datatype(name, dtype), space, properties).get_offset())


def _datatype(name: str, dtype: str) -> h5py.h5t.TypeID:
    # h5py has no bfloat16. This custom float equals H5T_FLOAT_BFLOAT16LE of HDF5 2.0; older tools read it as a float.
    if name == "image_key":
        return h5py.h5t.py_create(h5py.string_dtype("utf-8", np.dtype(dtype).itemsize), logical=True)
    if dtype != "bfloat16":
        return h5py.h5t.py_create(np.dtype(dtype))
    bfloat16 = h5py.h5t.IEEE_F16LE.copy()
    bfloat16.set_fields(15, 7, 8, 0, 7)
    bfloat16.set_ebias(127)
    return bfloat16


@contextmanager
def _errors_with_errno(path: Path) -> Iterator[None]:
    # An error while HDF5 flushes, for example on a full disk, is a RuntimeError with the errno only in its text.
    try:
        yield
    except RuntimeError as error:
        if number := re.search(r"errno = (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise
