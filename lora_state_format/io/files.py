"""Checkpoints that are folders: the names of their files, and any number of them to read."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Lock
from typing import Final

from lora_state_format.errors import FileError, RefusedError
from lora_state_format.model.sources import File

__all__ = [
    "FEW",
    "Files",
    "PooledFile",
    "first_look",
    "folders_in",
    "inside",
    "is_plain",
    "names_in",
    "reading",
    "steady",
]

MAX_NAME: Final = 255
"""Bytes of a file's name, as most file systems have it."""

MAX_OPEN: Final = 64
"""Files that are open at a time; a process may often hold no more than 1,024."""

FEW: Final = 64
"""Ranks of a folder whose files are all read for a first look; of more, only some are (0.8 ms each)."""


def is_plain(name: object) -> bool:
    """Return whether a value is the name of one entry of a folder: not a path, not ``.`` or ``..``, not too long."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not {"/", "\\", "\0"} & {*name}
        and len(name.encode("utf-8", "surrogatepass")) <= MAX_NAME
    )


def inside(folder: Path, name: object, source: object) -> Path:
    """Return the path of an entry of a folder, as a file names it.

    Raises ``RefusedError`` for the file ``source`` if the name could lead out of the folder.
    """
    if not is_plain(name):
        raise RefusedError(f"names {str(name)[:100]!r}, which is not the name of a file in its folder", path=source)
    return folder / str(name)


def folders_in(path: Path) -> list[Path]:
    """Return the folders in a folder, sorted; none of its files, of which there may be ten thousand, is asked for."""
    with os.scandir(path) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir())


def names_in(path: Path) -> list[str]:
    """Return the names of all that is in a folder, sorted; of ten thousand, a path for each would take three times."""
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries)


def first_look(read: int, files: int) -> dict[str, int]:
    """Return what ``origin["first_look"]`` says of a folder of which only some files were read."""
    return {"files_read": read, "files": files}


class Files:
    """Files to read by position, of which only the ones used last are open.

    All that is read below each of ``folders`` has to be of the folder that is there now: a writer may put another one
    in its place at any time, and files of two checkpoints would not be told apart by their names. Closed by ``close``,
    or with the last reference to it and to what reads from its files. Several threads may read at once.
    """

    readable_together = True

    def __init__(self, *folders: Path) -> None:
        self._files: dict[Path, PooledFile] = {}
        self._pool = _Pool(folders)

    def __getitem__(self, path: Path) -> PooledFile:
        """Return the file at a path. Raises ``FileNotFoundError``, and ``FileError`` for what is no regular file."""
        if path not in self._files:
            self._files[path] = PooledFile(path, self._pool)
        return self._files[path]

    def __len__(self) -> int:
        """Return how many files were asked for."""
        return len(self._files)

    def check_unchanged(self) -> None:
        """Raise ``FileError`` if a file's size or modification time, or what a folder is, is not as it was at first."""
        self._pool.check_folders()
        for file in self._files.values():
            file.check_unchanged()

    def close(self) -> None:
        """Close the files; they open again when they are read."""
        self._pool.close()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Pool:
    """The files that are open; it knows none of those who read them, so that no circle keeps it alive."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._open: OrderedDict[Path, File] = OrderedDict()
        self._lock = Lock()
        self._folders = {folder: _identity(folder) for folder in folders}

    def opened(self, path: Path) -> tuple[File, bool]:
        """Return the open file at a path, and whether it had to be opened.

        The file used longest ago may leave, and closes as soon as no other thread reads it.
        """
        with self._lock:
            file = self._open.get(path)
            fresh = file is None
            if file is None:
                file = self._open[path] = File(path)
                self.check_folders()
                if len(self._open) > MAX_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
            return file, fresh

    def check_folders(self) -> None:
        for folder, identity in self._folders.items():
            if _identity(folder) != identity:
                raise _replaced(folder)

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return what tells a folder from another one of its name."""
    try:
        status = folder.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _replaced(folder: Path) -> FileError:
    return FileError("was replaced while it was read: read it again", path=folder)


@contextlib.contextmanager
def steady(path: Path) -> Iterator[None]:
    """Look into a folder that has to stay the one that it is.

    Of one that makes room for another, a part of the files may be listed: what was found in it, and what was missed,
    says nothing. Raises ``FileError`` if the folder was replaced, whatever the block says of it.
    """
    identity = _identity(path) if path.is_dir() else None
    try:
        yield
    except Exception:
        if identity is not None and _identity(path) != identity:
            raise _replaced(path) from None
        raise
    if identity is not None and _identity(path) != identity:
        raise _replaced(path)


@contextlib.contextmanager
def reading(*folders: Path) -> Iterator[Files]:
    """Files that are closed if the block raises, and else left open for the tensors that read from them."""
    files = Files(*folders)
    try:
        yield files
    except BaseException:
        files.close()
        raise


class PooledFile:
    """A file of ``Files``, as a source."""

    crc32 = None

    def __init__(self, path: Path, pool: _Pool) -> None:
        self.path = path
        self._pool = pool
        self._known = path.stat()
        self.size = pool.opened(path)[0].size

    def readinto(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``offset`` on."""
        file, fresh = self._pool.opened(self.path)
        if fresh:
            self.check_unchanged()
        file.readinto(offset, out)

    def check_unchanged(self) -> None:
        """Raise ``FileError`` if the file's size or modification time changed since it was first seen."""
        now = self.path.stat()
        if (now.st_size, now.st_mtime_ns) != (self._known.st_size, self._known.st_mtime_ns):
            raise FileError("changed while it was read", path=self.path)

    def view(self, offset: int, size: int) -> memoryview | None:
        """Return ``None``: a file's bytes are not in memory."""
        return None
