"""Files that appear whole or not at all.

A file is written under a name of its own next to its target and becomes the target by one rename. Whether the target
may be replaced is checked before the first byte is written, and again by that rename.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import Remedy, TargetExistsError
from lora_state_format.io.remote import is_remote

__all__ = [
    "REPLACE",
    "TemporaryFile",
    "check_target",
    "exchange",
    "gathered",
    "locked",
    "made_folders",
    "move_new",
    "naming",
    "refuse_existing",
    "sweep_file",
    "sync",
    "sync_folder",
    "write_all",
    "write_file",
]

TOKEN: Final = "[0-9a-f]{16}"
"""A pattern of what makes the name of a temporary file or folder its writer's own."""

SMALL: Final = 1 << 16
"""Bytes up to which chunks are written together."""

REPLACE: Final = Remedy("pass {force} to replace it", {"force": True})

_AT_FDCWD: Final = -100
_NOREPLACE: Final = 1
_EXCHANGE: Final = 2
_UNSUPPORTED: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP})
"""Errors that say that a file system, or a kernel, does not know an operation."""


# --- targets ------------------------------------------------------------------------------------------------------


def refuse_existing(path: Path, *, force: bool) -> None:
    """Raise ``TargetExistsError`` if anything is at a path, a link that points nowhere included, unless ``force``."""
    if not force and os.path.lexists(path):
        raise TargetExistsError(f"{path} exists", remedy=REPLACE)


def check_target(path: Path, *, force: bool) -> None:
    """Raise ``TargetExistsError`` if a file must not be written to a path.

    Without ``force`` nothing may be there. With it a regular file or a link may; a folder, a device or a pipe never.
    """
    refuse_existing(path, force=force)
    if path.is_dir():
        raise TargetExistsError(f"{path} is a folder, and a file is to be written; choose another name")
    if path.exists() and not path.is_file():
        raise TargetExistsError(f"{path} is a device or a pipe, and only files are replaced; choose another name")


@contextlib.contextmanager
def made_folders(path: Path) -> Iterator[None]:
    """Make the folders on the way to a path; if the block raises, remove those that were missing and are empty.

    An object store has none to make.
    """
    if is_remote(path):
        yield
        return
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


# --- renames ------------------------------------------------------------------------------------------------------


def move_new(source: Path, target: Path) -> None:
    """Rename a file or folder to a name that is free. Raises ``TargetExistsError`` if something has it by now.

    The system checks and renames in one step where it can.
    """
    try:
        if not _renameat2(source, target, _NOREPLACE):
            refuse_existing(target, force=False)
            source.rename(target)
    except FileExistsError:
        raise TargetExistsError(f"{target} exists", remedy=REPLACE) from None


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step. Returns false, with nothing changed, if this file system cannot."""
    return _renameat2(first, second, _EXCHANGE)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Rename with Linux's flags. Returns false if the system or the file system does not know them."""
    try:
        call: Any = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # not Linux, or a C library from before 2018
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), os.fspath(source), None, os.fspath(target))


# --- files --------------------------------------------------------------------------------------------------------


def write_file(path: Path, chunks: Iterable[bytes | memoryview], *, force: bool) -> None:
    """Write a file from its bytes in order, whole or not at all.

    Raises ``TargetExistsError`` as ``check_target`` does, ``OSError``, and what ``chunks`` raises.
    """
    check_target(path, force=force)
    with TemporaryFile(path) as file:
        position = 0
        for chunk in gathered(chunks):
            file.write(position, chunk)
            position += len(chunk)
        file.finish()
        with locked(path.parent):
            file.commit(path, force=force)


class TemporaryFile:
    """A file next to its target that becomes it, or another file next to it, by a rename; or vanishes.

    It is locked while its writer lives, so that the next writer knows a killed one's left-over and removes it; but for
    ``sweep=False``, where others write parts of the same state on nodes whose locks may be unknown here.
    An ``OSError`` of writing names the target.
    """

    def __init__(self, target: Path, *, sweep: bool = True) -> None:
        self._target = target
        with locked(target.parent):  # else another writer could sweep the file between its making and its locking
            if sweep:
                sweep_file(target)
            self.path = target.with_name(f".{target.name}.{os.urandom(8).hex()}.tmp")
            # 0o666: the umask decides, as for any file that a program makes.
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            with contextlib.suppress(OSError):  # a file system without locks: left-overs stay
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def write(self, position: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes at a position."""
        with naming(self._target):
            write_all(self._descriptor, data, position)

    def finish(self, header: bytes = b"") -> None:
        """Write the first bytes last, and wait until everything is on the disk."""
        self.write(0, header)
        with naming(self._target):
            sync(self._descriptor)

    def commit(self, target: Path, *, force: bool) -> None:
        """Become a file. Raises ``TargetExistsError`` as ``check_target`` does."""
        check_target(target, force=force)
        if force:
            self.path.replace(target)
        else:
            move_new(self.path, target)
        sync_folder(target.parent)

    def __enter__(self) -> TemporaryFile:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # the next writer removes it
            self.path.unlink()
        os.close(self._descriptor)


def gathered(chunks: Iterable[bytes | memoryview]) -> Iterator[bytes | bytearray | memoryview]:
    """Yield the same bytes, small chunks together: each is a system call."""
    small = bytearray()
    for chunk in chunks:
        if len(small) + len(chunk) > SMALL:
            yield small
            small = bytearray()
        if len(chunk) > SMALL:
            yield chunk
        else:
            small += chunk
    yield small


def write_all(descriptor: int, data: bytes | bytearray | memoryview, position: int) -> None:
    """Write bytes at a position of a file: all of them, where the system takes only some at a time."""
    while len(data):
        count = os.pwrite(descriptor, data, position)
        data, position = memoryview(data)[count:], position + count


@contextlib.contextmanager
def naming(target: Path) -> Iterator[None]:
    """Let an ``OSError`` name the target, which the user knows."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(target)) from None


def sweep_file(target: Path) -> None:
    """Remove the temporary files of writers of ``target`` that no longer live."""
    pattern = re.compile(re.escape(f".{target.name}.") + TOKEN + r"\.tmp")
    for path in target.parent.iterdir():
        if pattern.fullmatch(path.name):
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if stat.S_ISREG(os.fstat(descriptor).st_mode):
                        path.unlink()
                finally:
                    os.close(descriptor)


# --- the disk -----------------------------------------------------------------------------------------------------


def sync(descriptor: int) -> None:
    """Wait until a file or folder is on the disk; where the file system cannot tell (``EINVAL``), go on."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(descriptor)
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
