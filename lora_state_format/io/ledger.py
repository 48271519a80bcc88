"""What files state of their bytes, CRC-32 of zip archives and digests of tensors, checked while the bytes stream by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, Protocol

import xxhash

from lora_state_format.errors import FileError
from lora_state_format.model.digests import check_hash, stated_hash
from lora_state_format.model.sources import Range, Source
from lora_state_format.model.tensors import CHUNK, Piece, Tensor

if TYPE_CHECKING:

    def crc32(data: bytes | memoryview, value: int = 0) -> int: ...  # noqa: D103

    combine: Callable[[int, int, int], int] | None
else:
    try:
        from isal.isal_zlib import crc32
        from isal.isal_zlib import crc32_combine as combine
    except ImportError:  # no wheel for this platform: slower, and what was cut into pieces is read again
        from zlib import crc32

        combine = None

__all__ = ["Ledger", "crc32"]


NOTED: Final = 1 << 14
"""Bytes that are read at a time, of which it is noted that they were: of fewer, notes would outgrow what they save."""


class _Changeable(Protocol):
    def check_unchanged(self) -> None: ...


class Ledger:
    """Checks what sources and tensors state about their bytes while these stream by, and that no file changes.

    What streamed past is kept as (offset, size, crc) per source and combined at the end; only bytes that no tensor
    covers, or that were gathered in small pieces or more than once, are read once more.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Source, list[tuple[int, int, int]]]] = {}
        self._files: dict[int, _Changeable] = {}

    def chunks(
        self, tensor: Tensor, buffer: memoryview, key: str = "", digests: list[str] | None = None
    ) -> Iterator[memoryview]:
        """Yield a tensor's bytes in order; each chunk is valid until the next one is asked for.

        Args:
            tensor: What to read.
            buffer: Reused for the chunks.
            key: What messages call the tensor.
            digests: The xxh3-128 of all bytes is appended, if a list is given.

        Raises ``DigestError`` at the end if the tensor's file states another digest.
        """
        if digests is None and stated_hash(tensor) is None:
            yield from self._chunks(tensor, buffer)
            return
        hasher = xxhash.xxh3_128()
        for chunk in self._chunks(tensor, buffer):
            hasher.update(chunk)
            yield chunk
        check_hash(key, tensor, hasher.hexdigest())
        if digests is not None:
            digests.append(hasher.hexdigest())

    def _chunks(self, tensor: Tensor, buffer: memoryview) -> Iterator[memoryview]:
        if tensor.runs is None:
            yield from self._noted(tensor).chunks(buffer)
            return
        for run in tensor.runs:
            parts = self._note(run.source)
            crc = 0
            for offset in range(0, run.size, len(buffer)):
                size = min(len(buffer), run.size - offset)
                chunk = run.source.view(run.offset + offset, size)
                if chunk is None:
                    chunk = buffer[:size]
                    run.source.readinto(run.offset + offset, chunk)
                if parts is not None:
                    crc = crc32(chunk, crc)
                yield chunk
            if parts is not None:
                parts.append((run.offset, run.size, crc))

    def _noted(self, tensor: Tensor) -> Tensor:
        """Return a tensor whose elements have to be gathered, with sources that note what is read of them."""
        pieces = []
        for piece in tensor.pieces:
            source = piece.source
            if isinstance(source, Tensor):
                source = self._noted(source)
            elif (parts := self._note(source)) is not None:
                source = _Noting(source, parts)
            pieces.append(Piece(source, piece.offset, piece.where, piece.strides))
        return replace(tensor, pieces=tuple(pieces))

    def _note(self, source: Source) -> list[tuple[int, int, int]] | None:
        root: Any = source
        while isinstance(root, Range):
            root = root.source
        if hasattr(root, "check_unchanged"):
            self._files[id(root)] = root
        if source.crc32 is None:
            return None
        return self._seen.setdefault(id(source), (source, []))[1]

    def check(self) -> None:
        """Raise ``FileError`` for a file that changed while it was read, and for bytes that do not have their CRC."""
        for file in self._files.values():
            file.check_unchanged()
        buffer = memoryview(bytearray(CHUNK))
        for source, parts in self._seen.values():
            if _combined_crc(source, sorted(parts), buffer) != source.crc32:
                name = getattr(source, "name", "a member of the container")
                raise FileError(
                    f"{name} does not have the CRC-32 that the container states: the file is damaged",
                    path=getattr(source, "path", None),
                )


class _Noting:
    """A source of which it is noted what was read: gathering reads spans, mostly one behind the other."""

    crc32 = None

    def __init__(self, source: Source, parts: list[tuple[int, int, int]]) -> None:
        self._source = source
        self._parts = parts
        self.size = source.size

    def readinto(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``offset`` on."""
        self._source.readinto(offset, out)
        if combine is None or len(out) < NOTED:
            return
        crc = crc32(out)
        if self._parts and sum(self._parts[-1][:2]) == offset:
            start, size, before = self._parts.pop()
            self._parts.append((start, size + len(out), combine(before, crc, len(out))))
        else:
            self._parts.append((offset, len(out), crc))

    def view(self, offset: int, size: int) -> memoryview | None:
        """Return ``None``: whoever gathers reads."""
        return None


def _combined_crc(source: Source, parts: Sequence[tuple[int, int, int]], buffer: memoryview) -> int:
    """Return the CRC of a source whose parts (offset, size, CRC) were seen; what lies between them is read."""
    if [part[:2] for part in parts] == [(0, source.size)]:
        return parts[0][2]
    if combine is None or any(a[0] + a[1] > b[0] for a, b in pairwise(parts)):
        parts = ()
    crc = position = 0
    for offset, size, part in [*parts, (source.size, 0, 0)]:
        for start in range(position, offset, len(buffer)):
            chunk = buffer[: min(len(buffer), offset - start)]
            source.readinto(start, chunk)
            crc = crc32(chunk, crc)
        if combine is not None and size:
            crc = combine(crc, part, size)
        position = offset + size
    return crc
