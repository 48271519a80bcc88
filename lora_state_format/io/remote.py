"""Files on other machines, read by ranges through fsspec: ``hf://``, ``s3://``, ``gs://``, ``https://``.

A path may be a URL. ``pathlib`` makes ``https:/host`` of ``https://host``; both mean the same here. Only bytes that are
asked for are read, and what is read on from where the last read ended is read in larger pieces.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, MissingDependencyError, OptionError
from lora_state_format.model.sources import File

__all__ = ["Remote", "exists", "is_file", "is_remote", "open_file", "remove", "send", "spelled", "version_of"]

URL: Final = re.compile(r"([a-z][a-z0-9+.-]+):/+")

FIRST: Final = 1 << 16
"""Bytes of the first read of a file: the header of a LoRA run's state stands in these."""

LARGEST: Final = 8 << 20
"""Bytes of a request at most, but for what is asked for at once."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a URL."""
    found = URL.match(os.fspath(path))
    return found is not None and found[1] != "file"


def spelled(path: str | os.PathLike[str]) -> str:
    """Return a path as its user writes it: a URL with two slashes, of which ``pathlib`` leaves one."""
    return URL.sub(r"\1://", os.fspath(path), count=1) if is_remote(path) else os.fspath(path)


def open_file(path: str | os.PathLike[str]) -> File:
    """Return a file to read by position, here or on another machine.

    Raises:
        FileNotFoundError: For a missing one.
        FileError: For a path that is not a regular file.
        MissingDependencyError: If a package that the scheme needs is not installed.
    """
    return Remote(path) if is_remote(path) else File(path)


def exists(path: Path) -> bool:
    """Return whether there is a file at a path, here or on another machine."""
    if not is_remote(path):
        return path.exists()
    filesystem, place = _place(path)
    try:
        filesystem.info(place)  # over HTTP a question for the size; ``exists`` would begin to read the file
    except FileNotFoundError:
        return False
    return True


def is_file(path: Path) -> bool:
    """Return whether a path is a file that can be read by position, here or on another machine."""
    return exists(path) if is_remote(path) else path.is_file()


def send(source: Path, path: Path) -> None:
    """Make a file here one on another machine; an object store shows it whole or not at all."""
    filesystem, place = _place(path)
    filesystem.put_file(os.fspath(source), place)
    filesystem.invalidate_cache()


def remove(path: Path) -> None:
    """Remove a file on another machine."""
    filesystem, place = _place(path)
    filesystem.rm_file(place)
    filesystem.invalidate_cache()


def version_of(path: Path) -> tuple[Any, ...] | None:
    """Return what changes when the file at a path is replaced; ``None`` if there is none."""
    if is_remote(path):
        return ("remote",) if exists(path) else None
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


class Remote(File):
    """A file on another machine. Each read is a request for a range, and is tried by fsspec as often as it does."""

    readable_together = False  # it reads ahead in one place

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._descriptor = -1
        self.path = spelled(path)
        self._filesystem, self._place = _place(path)
        self._lock = threading.Lock()
        self._known = self._info()
        self.size = int(self._known["size"])
        self._held = (0, b"")
        self._end = 0
        self._window = FIRST

    def readinto(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``offset`` on."""
        if offset + len(out) > self.size:
            raise FileError(f"ends at byte {self.size}, before the end of what was asked for", path=self.path)
        with self._lock:
            start, data = self._held
            if not start <= offset <= offset + len(out) <= start + len(data):
                data = self._fetch(offset, len(out))
                start, self._held = offset, (offset, data)
            out[:] = data[offset - start : offset - start + len(out)]

    def _fetch(self, offset: int, size: int) -> bytes:
        """Read at least ``size`` bytes; more where the last read ended here, twice as many each time."""
        goes_on = offset == self._end
        wanted = max(size, self._window) if goes_on else size
        stop = min(offset + wanted, self.size)
        # The Hub's client, which is not one of fsspec's asynchronous ones, would read 5 MiB around each range.
        options = {} if self._filesystem.async_impl else {"cache_type": "none"}
        data: bytes = self._filesystem.cat_file(self._place, start=offset, end=stop, **options)
        if len(data) != stop - offset:
            raise FileError(f"gave {len(data)} bytes where {stop - offset} were asked for", path=self.path)
        self._window = min(2 * self._window, LARGEST) if goes_on else size
        self._end = stop
        return data

    def check_unchanged(self) -> None:
        """Raise ``FileError`` if the file's size, or its tag, is no longer what it was when it was opened."""
        now = self._info()
        if any(now.get(key) != self._known.get(key) for key in ("size", "ETag", "etag", "mtime", "LastModified")):
            raise FileError("changed while it was read", path=self.path)

    def close(self) -> None:
        """Forget what was read."""
        self._held = (0, b"")

    def _info(self) -> dict[str, Any]:
        self._filesystem.invalidate_cache()
        try:
            found: dict[str, Any] = self._filesystem.info(self._place)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.path}: no such file") from None
        if found.get("type") == "directory" or found.get("size") is None:
            raise FileError("is no file of a known size", path=self.path)
        return found


def _place(path: str | os.PathLike[str]) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it."""
    url = spelled(path)
    try:
        found: tuple[Any, str] = _fsspec().core.url_to_fs(url)
    except ImportError as error:
        raise MissingDependencyError(f"{url}: {error}") from error
    except ValueError as error:
        raise OptionError(f"{url}: {error}") from error
    return found


def _fsspec() -> Any:
    try:
        import fsspec
    except ImportError as error:
        raise MissingDependencyError("reading a URL needs fsspec: pip install 'lora_state_format[remote]'") from error
    return fsspec
