"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from lora_state_format.errors import TargetExistsError

__all__ = ["TemporaryFile", "locked", "new_folder", "sync_folder"]


class TemporaryFile:
    """A file beside the target that becomes it, or another file beside it, by a rename; or vanishes.

    It is locked while its writer lives, so that the next writer knows a killed one's left-over and removes it.
    ``OSError``\\ s of writing name the target.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        with locked(target.parent):  # else another writer could sweep the file between its making and its locking
            _sweep(target)
            self.path = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
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


@contextlib.contextmanager
def new_folder(target: Path, *, force: bool, replaceable: tuple[str, ...]) -> Iterator[Path]:
    """A folder beside ``target`` that becomes it where the block ends well, and vanishes where it does not.

    Raises ``TargetExistsError`` if the target exists and ``force`` is not given, or if it holds an entry whose name
    fits none of the patterns ``replaceable``: what this program did not write, it does not delete.
    """
    if target.exists():
        if not force:
            raise TargetExistsError(f"{target} exists; pass force=True (--force) to replace it")
        foreign = sorted(e.name for e in target.iterdir() if not any(fnmatch(e.name, p) for p in replaceable))
        if foreign:
            raise TargetExistsError(f"{target} holds other files too ({', '.join(foreign[:3])}); choose another folder")
    token = secrets.token_hex(8)
    folder = target.with_name(f".{target.name}.{token}.tmp")
    folder.mkdir()
    try:
        yield folder
        sync_folder(folder)
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
