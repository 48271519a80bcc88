"""Checkpoints that are folders: any number of files to read, and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from lora_state_format.errors import FileError, TargetExistsError
from lora_state_format.io.atomic import sync_folder
from lora_state_format.model.sources import File

__all__ = ["Files", "PooledFile", "new_folder", "reading"]

MAX_OPEN: Final = 64
"""Files that are open at a time; a process may often hold no more than 1,024."""


class Files:
    """Files to read by position, of which only the ones used last are open."""

    def __init__(self) -> None:
        self._files: dict[Path, PooledFile] = {}
        self._open: OrderedDict[Path, File] = OrderedDict()

    def __getitem__(self, path: Path) -> PooledFile:
        """Return the file at a path. Raises ``FileNotFoundError``, and ``FileError`` for what is no regular file."""
        if path not in self._files:
            self._files[path] = PooledFile(path, self)
        return self._files[path]

    def opened(self, path: Path) -> File:
        """Return the open file at a path; the one used longest ago may be closed for it."""
        file = self._open.get(path)
        if file is None:
            file = self._open[path] = File(path)
            if path in self._files:
                self._files[path].check_unchanged()
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(path)
        return file

    def check_unchanged(self) -> None:
        """Raise ``FileError`` if a file's size or modification time is no longer what it was at first."""
        for file in self._files.values():
            file.check_unchanged()

    def close(self) -> None:
        """Close the files; they open again when they are read."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def reading() -> Iterator[Files]:
    """Files that are closed if the block raises, and else left open for the tensors that read from them."""
    files = Files()
    try:
        yield files
    except BaseException:
        files.close()
        raise


class PooledFile:
    """A file of ``Files``, as a source."""

    crc32 = None

    def __init__(self, path: Path, files: Files) -> None:
        self.path = path
        self._files = files
        self._known = path.stat()
        self.size = files.opened(path).size

    def readinto(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``offset`` on."""
        self._files.opened(self.path).readinto(offset, out)

    def check_unchanged(self) -> None:
        """Raise ``FileError`` if the file's size or modification time changed since it was first seen."""
        now = self.path.stat()
        if (now.st_size, now.st_mtime_ns) != (self._known.st_size, self._known.st_mtime_ns):
            raise FileError("changed while it was read", path=self.path)

    def view(self, offset: int, size: int) -> memoryview | None:
        """Return ``None``: a file's bytes are not in memory."""
        return None


@contextlib.contextmanager
def new_folder(target: Path, *, force: bool, replaceable: tuple[str, ...]) -> Iterator[Path]:
    """Make a folder next to ``target`` that becomes it if the block ends well, and vanishes if it does not.

    Raises ``TargetExistsError`` if the target exists and ``force`` is not given, or if it holds an entry whose name
    fits none of the patterns ``replaceable``: what this program did not write, it does not delete.
    """
    if target.exists():
        if not force:
            raise TargetExistsError(f"{target} exists; pass force=True (--force) to replace it")
        if not target.is_dir():
            raise TargetExistsError(f"{target} is a file, and a folder is to be written; choose another name")
        foreign = sorted(e.name for e in target.iterdir() if not any(fnmatch(e.name, p) for p in replaceable))
        if foreign:
            raise TargetExistsError(f"{target} holds other files too ({', '.join(foreign[:3])}); choose another folder")
    token = secrets.token_hex(8)
    folder = target.with_name(f".{target.name}.{token}.tmp")
    folder.mkdir()
    try:
        yield folder
        for inner, _, files in os.walk(folder):
            for name in files:
                _sync(Path(inner, name))
            sync_folder(Path(inner))
        if target.exists():
            old = target.with_name(f".{target.name}.{token}.old")
            target.rename(old)
            folder.rename(target)
            shutil.rmtree(old)
        else:
            folder.rename(target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
