"""NumPy's ``.npz``: an archive of arrays, each a member of its own, read without NumPy and without pickle."""

from __future__ import annotations

import ast
import zipfile
import zlib
from collections.abc import Mapping
from itertools import accumulate
from shutil import copyfileobj
from tempfile import NamedTemporaryFile
from typing import Final

from lora_state_format.errors import FileError, RefusedError
from lora_state_format.foreign.zips import Archive
from lora_state_format.model.dtypes import SPELLED
from lora_state_format.model.sources import File, Range, Source, Stream
from lora_state_format.model.tensors import Tensor, contiguous

__all__ = ["arrays_in", "read_npz"]

MAGIC: Final = b"\x93NUMPY"
SUFFIX: Final = ".npy"
LONGEST: Final = 1 << 16
"""Bytes of an array's header: its format, shape and order, in text."""


def arrays_in(source: Source, path: object = None) -> list[str]:
    """Return the names of the arrays in an archive; none for one of anything else."""
    names = list(Archive(source, path))
    return [name.removesuffix(SUFFIX) for name in names] if all(name.endswith(SUFFIX) for name in names) else []


def read_npz(source: Source, path: object = None) -> Mapping[str, Tensor]:
    """Return the arrays of an archive by name, lazily; where they are compressed, they are unpacked on disk.

    Raises ``FileError`` for a damaged one, ``RefusedError`` for arrays that are pickled, of types that safetensors does
    not have, or of more than 16 GiB that were compressed.
    """
    archive = Archive(source, path)
    try:
        members: Mapping[str, Source] = {name: archive[name] for name in archive if name.endswith(SUFFIX)}
    except RefusedError:
        members = _unpacked(source, path)
    return {name.removesuffix(SUFFIX): _array(member, name, path) for name, member in members.items()}


MOST: Final = 16 << 30
"""Bytes that are unpacked on disk."""


def _unpacked(source: Source, path: object) -> Mapping[str, Source]:
    """Return the members of an archive that was compressed, as ``numpy.savez_compressed`` does it.

    They lie one after the other in a file without a name, which goes with the last reference to them.
    """
    try:
        with zipfile.ZipFile(Stream(source)) as archive, NamedTemporaryFile() as unpacked:
            infos = [info for info in archive.infolist() if info.filename.endswith(SUFFIX)]
            if sum(info.file_size for info in infos) > MOST:
                raise RefusedError(
                    f"its compressed arrays unpack to more than {MOST >> 30} GiB: save them with numpy.savez", path=path
                )
            for info in infos:
                with archive.open(info) as member:  # checks its size and CRC-32
                    copyfileobj(member, unpacked)
            unpacked.flush()
            file = File(unpacked.name)
        starts = accumulate((info.file_size for info in infos), initial=0)
        return {info.filename: Range(file, start, info.file_size) for info, start in zip(infos, starts, strict=False)}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"its compressed arrays cannot be unpacked: {error}", path=path) from error


def _array(member: Source, name: str, path: object) -> Tensor:
    start = bytearray(min(member.size, LONGEST))
    member.readinto(0, memoryview(start))
    wide = 2 if start[6:7] == b"\1" else 4
    first = 8 + wide
    end = first + int.from_bytes(start[8:first], "little")
    if not start.startswith(MAGIC) or end > len(start):
        raise FileError(f"the member {name!r} is not an array as NumPy writes it", path=path)
    try:
        stated = ast.literal_eval(start[first:end].decode("latin-1").strip())
        spelled, fortran, shape = stated["descr"], stated["fortran_order"], tuple(stated["shape"])
        sound = all(type(size) is int and 0 <= size < 1 << 60 for size in shape)
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError) as error:
        raise FileError(f"the member {name!r} has a header that is not NumPy's", path=path) from error
    if not sound:
        raise FileError(f"the member {name!r} has the shape {shape}", path=path)
    if spelled not in SPELLED or (fortran and len(shape) > 1):
        raise RefusedError(
            f"the array {name!r} is of type {spelled!r}{', in Fortran order' if fortran else ''}; little-endian "
            "numbers in C order are read, and no pickle is run",
            path=path,
        )
    tensor = contiguous(SPELLED[spelled], shape, member, end)
    if end + tensor.size != member.size:
        raise FileError(
            f"the member {name!r} has {member.size - end} bytes, where its header says {tensor.size}", path=path
        )
    return tensor
