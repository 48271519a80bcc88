"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["TemporaryFile", "locked", "sync_folder"]


class TemporaryFile:
    """A file beside the target that becomes it, or another file beside it, by a rename; or vanishes.

    It is locked while its writer lives, so that the next writer knows a killed one's left-over and removes it; but for
    ``sweep=False``, where others write parts of the same state on nodes whose locks may be unknown here.
    ``OSError``\\ s of writing name the target.
    """

    def __init__(self, target: Path, *, sweep: bool = True) -> None:
        self._target = target
        with locked(target.parent):  # else another writer could sweep the file between its making and its locking
            if sweep:
                _sweep(target)
            self.path = target.with_name(f".{target.name}.{os.urandom(8).hex()}.tmp")
            # 0o666: the umask decides, as for any file that a program makes.
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            with contextlib.suppress(OSError):  # a file system without locks: left-overs stay
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def write(self, position: int, data: bytes | memoryview) -> None:
        try:
            while len(data):
                count = os.pwrite(self._descriptor, data, position)
                data, position = memoryview(data)[count:], position + count
        except OSError as error:
            raise self._named(error) from None

    def finish(self, header: bytes) -> None:
        """Write the first bytes last, and wait until everything is on the disk."""
        self.write(0, header)
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._named(error) from None

    def commit(self, target: Path) -> None:
        self.path.replace(target)
        sync_folder(target.parent)

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, error.strerror, os.fspath(self._target))

    def __enter__(self) -> TemporaryFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


def _sweep(target: Path) -> None:
    """Remove the temporary files of writers of ``target`` that no longer live."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{16}\.tmp")
    for path in target.parent.iterdir():
        if pattern.fullmatch(path.name):
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                finally:
                    os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that what is done to several files is not mixed with another writer's doings.

    A file system without locks goes unlocked.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
