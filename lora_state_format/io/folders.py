"""Folders that appear whole or not at all, and of which nothing is removed but what they replace.

A folder is written under a name of its own next to its target; then the two exchange their names in one step
(``renameat2`` of Linux). Where a system cannot, the old folder steps aside and comes back if anything fails. The names
of all files that may have to be removed, those of the old folder at the end, stand in a journal next to the target
before the files do. A writer that dies leaves it behind, and the next one for the same target removes what it names.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Final

from lora_state_format.errors import TargetExistsError, UnrepresentableError
from lora_state_format.io.atomic import (
    TOKEN,
    exchange,
    gathered,
    locked,
    move_new,
    naming,
    refuse_existing,
    sync,
    sync_folder,
    write_all,
)
from lora_state_format.io.files import is_plain

__all__ = ["NewFolder", "new_folder", "sweep"]

HEAD: Final = b"lora_state_format: files that a writer may have left behind\n"
"""The first line of a journal."""


class NewFolder:
    """A folder that is being written, next to its target."""

    def __init__(self, target: Path, journal: _Journal) -> None:
        self._target = target
        self.path = journal.folder
        self.path.mkdir()
        self._journal = journal
        self._folders = {self.path}

    def write(self, place: Sequence[str], chunks: Iterable[bytes | memoryview]) -> None:
        """Write a file.

        Args:
            place: The names of the folders that it is in, from the outermost, and its own.
            chunks: Its bytes in order.

        Raises ``UnrepresentableError`` for a name that is not one plain, printable component of a path, and for a
        second file of the same name.
        """
        for name in place:
            if not is_plain(name) or not name.isprintable():
                raise UnrepresentableError(
                    f"{name[:100]!r} would become the name of a file, and is not the plain name of one: rename it"
                )
        path = self.path.joinpath(*place)
        self._journal.note("/".join(place))
        self._make(path.parent)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            raise UnrepresentableError(f"two files would be called {'/'.join(place)!r}: rename one") from None
        try:
            position = 0
            for chunk in gathered(chunks):
                with naming(self._target):
                    write_all(descriptor, chunk, position)
                position += len(chunk)
            with naming(self._target):
                sync(descriptor)
        finally:
            os.close(descriptor)

    def sync(self) -> None:
        """Wait until the names of all files are on the disk."""
        for folder in self._folders:
            sync_folder(folder)

    def _make(self, folder: Path) -> None:
        if folder not in self._folders:
            self._make(folder.parent)
            folder.mkdir(exist_ok=True)
            self._folders.add(folder)


@contextlib.contextmanager
def new_folder(target: Path, *, force: bool, replaces: Collection[str] = ()) -> Iterator[NewFolder]:
    """Write a folder that becomes ``target`` where the block ends well, and vanishes where it does not.

    Args:
        target: Where the folder is to be; the folder around it has to be there.
        force: Replace a folder that is there.
        replaces: The files that such a folder may hold, as ``a/b`` in it. They are removed.

    Raises ``TargetExistsError`` if the target exists and ``force`` is false, and if it is no folder, or holds a file
    that is not in ``replaces``. That is checked at first, and again at the end.
    """
    _check(target, force, replaces)
    with locked(target.parent):
        _sweep(target)
        journal = _Journal(target)
    with journal:
        folder = NewFolder(target, journal)
        yield folder
        folder.sync()
        with locked(target.parent):
            _commit(target, journal, force, replaces)


def _check(target: Path, force: bool, allowed: Collection[str]) -> None:
    refuse_existing(target, force=force)
    if target.is_symlink():
        raise TargetExistsError(f"{target} is a link, and only folders are replaced; name the folder that it leads to")
    if os.path.lexists(target) and not target.is_dir():
        raise TargetExistsError(f"{target} is a file, and a folder is to be written; choose another name")
    others = list(islice((entry for entry in _entries(target) if entry not in allowed), 3))
    if others:
        raise TargetExistsError(f"{target} holds other files too ({', '.join(others)}); choose another folder")


def _entries(folder: Path) -> Iterator[str]:
    """Yield what a folder holds, as ``a/b``: files, links, and empty folders; those nearest to it first."""
    for inner, folders, files in os.walk(folder):
        links = [name for name in folders if Path(inner, name).is_symlink()]
        names = sorted((*files, *links))
        if not folders and not files and Path(inner) != folder:
            names = [""]
        yield from (Path(inner, name).relative_to(folder).as_posix() for name in names)


def _commit(target: Path, journal: _Journal, force: bool, allowed: Collection[str]) -> None:
    if not os.path.lexists(target):
        move_new(journal.folder, target)
    else:
        _check(target, force, allowed)
        journal.note(*_entries(target))
        journal.sync()
        if not exchange(journal.folder, target):
            target.rename(journal.aside)
            try:
                journal.folder.rename(target)
            except BaseException:
                journal.aside.rename(target)
                raise
    sync_folder(target.parent)


# --- what a writer may leave behind -------------------------------------------------------------------------------


class _Journal:
    """The names of the files that a writer may leave behind in folders next to its target.

    It is locked while its writer lives. When it is closed, what it names is removed, and itself.
    """

    def __init__(self, target: Path) -> None:
        token = secrets.token_hex(8)
        self.path = target.with_name(f".{target.name}.{token}.names")
        self.folder, self.aside = _beside(target, token)
        self.names: set[str] = set()
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks: left-overs stay
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self._size = 0
        try:
            self._append(HEAD)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def note(self, *names: str) -> None:
        """Write names down before there are files of these names."""
        new = [name for name in names if name not in self.names]
        self._append("".join(f"{json.dumps(name)}\n" for name in new).encode())
        self.names.update(new)

    def sync(self) -> None:
        sync(self._descriptor)

    def _append(self, data: bytes) -> None:
        write_all(self._descriptor, data, self._size)
        self._size += len(data)

    def __enter__(self) -> _Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            _remove(self.path, (self.folder, self.aside), self.names)
        finally:
            os.close(self._descriptor)


def _beside(target: Path, token: str) -> tuple[Path, Path]:
    """Return the names of a new folder while it is written, and of an old one that stepped aside."""
    return target.with_name(f".{target.name}.{token}.tmp"), target.with_name(f".{target.name}.{token}.old")


def sweep(target: Path) -> None:
    """Remove what dead writers of ``target`` left behind, and put back what stood aside; ``new_folder`` does so too."""
    with locked(target.parent):
        _sweep(target)


def _sweep(target: Path) -> None:
    pattern = re.compile(re.escape(f".{target.name}.") + f"({TOKEN})" + r"\.names")
    for path in list(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        with contextlib.suppress(OSError, ValueError):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                names = _noted(descriptor)
                if names is None:
                    continue
                folder, aside = _beside(target, match[1])
                if aside.is_dir() and not os.path.lexists(target):
                    aside.rename(target)
                _remove(path, (folder, aside), names)
            finally:
                os.close(descriptor)


def _noted(descriptor: int) -> list[str] | None:
    """Return the names in a journal, ``None`` for another file. A line that was not finished names nothing yet."""
    status = os.fstat(descriptor)
    data = os.pread(descriptor, status.st_size, 0) if stat.S_ISREG(status.st_mode) else b""
    if not data.startswith(HEAD):
        return [] if HEAD.startswith(data) and stat.S_ISREG(status.st_mode) else None
    lines = data[len(HEAD) :].split(b"\n")[:-1]
    names = [json.loads(line) for line in lines]
    return [name for name in names if isinstance(name, str) and all(map(is_plain, name.split("/")))]


def _remove(journal: Path, folders: Iterable[Path], names: Collection[str]) -> None:
    """Remove files by name, the folders that are empty then, and last the journal; it stays while anything does."""
    for folder in folders:
        if not folder.is_symlink():
            inner = {folder}
            for name in names:
                with contextlib.suppress(OSError):
                    (folder / name).unlink()
                inner.update((folder / name).parents[: name.count("/")])
            for empty in sorted(inner, key=lambda path: -len(path.parts)):
                with contextlib.suppress(OSError):  # it holds what nobody noted
                    empty.rmdir()
    if not any(map(os.path.lexists, folders)):
        journal.unlink(missing_ok=True)
