"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from lora_state_format.atomic import sync_folder
from lora_state_format.errors import TargetExistsError

__all__ = ["new_folder"]


@contextlib.contextmanager
def new_folder(target: Path, *, force: bool, replaceable: tuple[str, ...]) -> Iterator[Path]:
    """A folder beside ``target`` that becomes it where the block ends well, and vanishes where it does not.

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
