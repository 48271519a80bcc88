"""Where bytes come from: an open file, a range of another source, memory. Nothing here knows what the bytes mean."""

from __future__ import annotations

import io
import os
import re
import stat
import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, Protocol

from lora_state_format.errors import FileError

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["File", "Memory", "Range", "Source", "Stream", "Unread", "bytes_of", "readable_together"]


COPIED: Final = 1 << 20
"""Bytes of a source that are copied at a time."""


class Source(Protocol):
    """Bytes that can be read by position, any number of times."""

    @property
    def size(self) -> int:
        """Bytes held."""
        ...

    @property
    def crc32(self) -> int | None:
        """CRC-32 of all bytes as the container states it, or ``None`` where it states none."""

    def readinto(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` (format ``B``) with the bytes from ``offset`` on; reading past the end is a ``FileError``."""

    def view(self, offset: int, size: int) -> memoryview | None:
        """Return the same bytes without a copy, where they are in memory anyway; else ``None``."""


MAX_POINTER: Final = 1024
"""Bytes of a Git LFS pointer: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md."""


def _pointer(data: bytes) -> str | None:
    """Return the size in words of what a Git LFS pointer points to; ``None`` for any other bytes."""
    if not data.startswith(b"version https://git-lfs.github.com/spec/"):
        return None
    found = re.search(rb"^size (\d{1,18})$", data, re.MULTILINE)
    size = int(found[1]) if found else 0
    unit = next((unit for unit in (10**9, 10**6, 10**3) if size >= unit), 1)
    return f"{size / unit:.3g} { {1: 'bytes', 10**3: 'kB', 10**6: 'MB', 10**9: 'GB'}[unit] }"


class File:
    """A regular file, opened once and read by position.

    Closed by ``close``, by leaving a ``with`` block, or with the last reference to it. Raises ``FileNotFoundError`` for
    a missing path and ``FileError`` for anything that is not a regular file (a folder, a pipe, a device).
    """

    crc32 = None
    readable_together = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        # O_NONBLOCK: opening a pipe that nobody writes to must not hang. It changes nothing for a regular file.
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self._descriptor = descriptor
        self._finalizer = weakref.finalize(self, os.close, descriptor)  # also runs at interpreter exit
        self._opened = os.fstat(descriptor)
        if not stat.S_ISREG(self._opened.st_mode):
            self.close()
            folder = stat.S_ISDIR(self._opened.st_mode)
            raise FileError("a folder, not a file" if folder else "a pipe or a device, not a file", path=self.path)
        self.size = self._opened.st_size
        if self.size <= MAX_POINTER and (size := _pointer(bytes(self.read(0, self.size)))):
            self.close()
            raise FileError(f"a Git LFS pointer to {size} and not the file itself: run git lfs pull", path=self.path)

    def readinto(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``offset`` on. Raises ``FileError`` at the file's end."""
        done = 0
        while done < len(out):
            count = os.preadv(self._descriptor, [out[done:]], offset + done)
            if count == 0:
                raise FileError(
                    f"ends at byte {offset + done}, {len(out) - done} bytes before the end of what was asked for",
                    path=self.path,
                )
            done += count

    def view(self, offset: int, size: int) -> memoryview | None:
        """Return ``None``: a file's bytes are not in memory."""
        return None

    def read(self, offset: int, size: int) -> bytearray:
        """Return ``size`` bytes from ``offset`` on. Check ``size`` against ``self.size`` before asking for it."""
        buffer = bytearray(size)
        self.readinto(offset, memoryview(buffer))
        return buffer

    def check_unchanged(self) -> None:
        """Raise ``FileError`` if the file's size or modification time is no longer what it was when it was opened."""
        now = os.fstat(self._descriptor)
        if (now.st_size, now.st_mtime_ns) != (self._opened.st_size, self._opened.st_mtime_ns):
            raise FileError("changed while it was read", path=self.path)

    def close(self) -> None:
        """Close the file; closing it again does nothing."""
        self._descriptor = -1
        self._finalizer()

    def __enter__(self) -> File:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Range:
    """``size`` bytes of another source, from ``start`` on; a zip member, for example."""

    def __init__(self, source: Source, start: int, size: int, crc32: int | None = None) -> None:
        if start < 0 or size < 0 or start + size > source.size:
            raise FileError(f"bytes {start} to {start + size} of a source that holds {source.size}")
        self.source = source
        self.start = start
        self.size = size
        self.crc32 = crc32

    def readinto(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``offset`` on. Raises ``FileError`` at the range's end."""
        if offset + len(out) > self.size:
            raise FileError(f"bytes {offset} to {offset + len(out)} of a range that holds {self.size}")
        self.source.readinto(self.start + offset, out)

    def view(self, offset: int, size: int) -> memoryview | None:
        """Return the bytes without a copy, where the source has them in memory."""
        return self.source.view(self.start + offset, size)


class Unread:
    """Bytes of a file that was not opened for a first look at its folder: there is nothing to read."""

    crc32 = None
    size = sys.maxsize

    def __init__(self, path: object) -> None:
        self.path = path

    def readinto(self, offset: int, out: memoryview) -> None:
        """Raise ``FileError``: what a first look returns has dtypes and shapes only."""
        raise FileError("was only looked at, and none of its tensors can be read: open it with read()", path=self.path)

    def view(self, offset: int, size: int) -> memoryview | None:
        """Return ``None``: no bytes are in memory."""
        return None


class Memory:
    """A buffer; the caller must not change it while it is read."""

    crc32 = None

    def __init__(self, buffer: bytes | bytearray | memoryview) -> None:
        self._view = memoryview(buffer).cast("B")
        self.size = len(self._view)

    def readinto(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``offset`` on. Raises ``FileError`` at the buffer's end."""
        if offset + len(out) > self.size:
            raise FileError(f"bytes {offset} to {offset + len(out)} of a buffer that holds {self.size}")
        out[:] = self._view[offset : offset + len(out)]

    def view(self, offset: int, size: int) -> memoryview | None:
        """Return the bytes without a copy."""
        return self._view[offset : offset + size]


class Stream(io.RawIOBase):
    """A source as the file object that a library asks for; closing it leaves the source open."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source, self._place = source, 0

    def readable(self) -> bool:
        """Return ``True``."""
        return True

    def seekable(self) -> bool:
        """Return ``True``."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, and return it."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._source.size}[whence]
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        """Return the place."""
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as there are bytes, and return how many."""
        out = memoryview(buffer).cast("B")
        count = max(0, min(len(out), self._source.size - self._place))
        self._source.readinto(self._place, out[:count])
        self._place += count
        return count


def bytes_of(source: Source) -> Iterator[memoryview]:
    """Yield all bytes of a source in order; each chunk is valid until the next one is asked for."""
    buffer = memoryview(bytearray(min(COPIED, source.size)))
    for offset in range(0, source.size, COPIED):
        chunk = buffer[: source.size - offset]
        source.readinto(offset, chunk)
        yield chunk


def readable_together(resources: Iterable[object]) -> bool:
    """Return whether several threads may read at once from what keeps these resources; decoders say nothing of it."""
    return all(getattr(resource, "readable_together", False) for resource in resources)
