"""HDF5 files as trees of tensors: what h5py says of where each dataset's bytes lie, nothing decoded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from lora_state_format.errors import FileError, MissingDependencyError, RefusedError
from lora_state_format.model.dtypes import SPELLED
from lora_state_format.model.sources import Source, Stream
from lora_state_format.model.tensors import Tensor, contiguous

__all__ = ["MAGIC", "Tree", "read_tree"]

MAGIC: Final = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True)
class Tree:
    """What a file holds: its datasets by path, in the order in which they were written, and the groups' attributes."""

    tensors: Mapping[str, Tensor]
    attributes: Mapping[str, Mapping[str, Any]]


def read_tree(source: Source, path: object) -> Tree:
    """Return the datasets and attributes of an HDF5 file, which may be a member of an archive.

    Links out of the file are not followed.

    Raises:
        FileError: It is damaged.
        MissingDependencyError: h5py is not installed.
        RefusedError: A dataset is compressed, chunked, big-endian or outside of the file.
    """
    try:
        import h5py
    except ImportError as error:
        raise MissingDependencyError(
            f"{path}: an HDF5 file needs h5py: pip install 'lora_state_format[hdf5]'"
        ) from error
    tensors: dict[str, tuple[int, Tensor]] = {}
    attributes: dict[str, Mapping[str, Any]] = {}

    def visit(name: str, item: Any) -> None:
        attributes[name] = dict(item.attrs)
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "fiu":  # h5py's booleans are enumerations
            tensors[name] = _tensor(name, item, source, path)

    try:
        with h5py.File(Stream(source), "r") as file:
            attributes[""] = dict(file.attrs)
            file.visititems(visit)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"h5py cannot read it: {error}", path=path) from error
    ordered = sorted(tensors.items(), key=lambda item: item[1][0])
    return Tree({name: tensor for name, (_, tensor) in ordered}, attributes)


def _tensor(name: str, item: Any, source: Source, path: object) -> tuple[int, Tensor]:
    """Return where a dataset's bytes begin, and its tensor."""
    spelled = item.dtype.str if sys.byteorder == "little" else item.dtype.newbyteorder("S").str
    offset, size = item.id.get_offset(), int(item.size) * item.dtype.itemsize
    if spelled not in SPELLED or (size and (offset is None or item.chunks is not None)):
        raise RefusedError(
            f"the dataset '{name}' ({item.dtype}) is stored in chunks, compressed, big-endian or elsewhere, where "
            "datasets in one piece are read; Keras writes such ones",
            path=path,
        )
    if size and offset + size > source.size:
        raise FileError(f"the dataset '{name}' reaches past the end of the file", path=path)
    start = offset or 0
    return start, contiguous(SPELLED[spelled], tuple(map(int, item.shape)), source, start)
