"""Which checkpoints of a run keep their optimizer's state, and the removal of the others'.

Of a run's checkpoints the state is mostly the larger part, and only the last ones are ever resumed from. What is next
to a state (weights, a scheduler's state, logs) is not touched, and only files are removed that hold a state in this
format.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_state_format.errors import DigestError, FileError, OptionError
from lora_state_format.format.envelope import index_of, is_state
from lora_state_format.format.reading import open_state
from lora_state_format.format.writing import files_of
from lora_state_format.io.atomic import locked, sync_folder

__all__ = ["STATE", "Rotation", "plan_rotation", "remove_states", "series_of"]

STATE: Final = "training_state/optimizer.safetensors"
"""Where a checkpoint folder has its state: what serves a model loads every ``.safetensors`` file next to it."""

NUMBER: Final = re.compile(r"\d+")


@dataclass(frozen=True)
class Rotation:
    """Paths of the states that stay, newest first, and of those to remove, oldest last."""

    kept: tuple[Path, ...]
    removed: tuple[Path, ...]


def series_of(path: Path) -> list[Path]:
    """Return the states of the same run: at paths that differ from this one only in the numbers of one folder's name.

    The folder is the nearest above the file whose name has a number: ``checkpoint-300``, ``step=4.training_state``.
    """
    for level, folder in enumerate(path.parents):
        if NUMBER.search(folder.name):
            pattern = re.compile(r"\d+".join(map(re.escape, NUMBER.split(folder.name))))
            rest = path.parts[len(path.parts) - 1 - level :]
            siblings = [entry for entry in folder.parent.iterdir() if pattern.fullmatch(entry.name) and entry.is_dir()]
            return sorted(found for entry in siblings if _held(found := entry.joinpath(*rest)))
    return [path] if _held(path) else []


def plan_rotation(paths: Sequence[Path], keep: int, *, always: Path | None = None) -> Rotation:
    """Return which states of a run stay: the last ``keep`` that are whole, and all that are newer.

    Nothing is removed while there are no more whole ones than that: a state that cannot be opened counts for nothing.

    Args:
        paths: The states of one run.
        keep: How many stay, 1 or more.
        always: One that stays in any case.

    Raises:
        OptionError: For ``keep`` under 1, and for states whose order is unknown: neither their headers nor the names of
            their folders say it.
    """
    if keep < 1:
        raise OptionError(f"keep_last={keep}: the last state is never removed; choose 1 or more")
    kept: list[Path] = []
    removed: list[Path] = []
    whole = 0
    for path in _newest_first(paths):
        if whole < keep or path == always:
            kept.append(path)
            whole += _is_whole(path)
        else:
            removed.append(path)
    return Rotation(tuple(kept), tuple(removed) if whole >= keep else ())


def remove_states(paths: Sequence[Path]) -> None:
    """Remove the files of states, the index of a set first: so a state is there whole, or it is no state any more.

    A program that has opened a state can read it to its end, as the system keeps the bytes of open files.
    """
    for path in paths:
        with locked(path.parent):
            for file in _held(path):
                file.unlink(missing_ok=True)
            sync_folder(path.parent)
        with contextlib.suppress(OSError):  # other files are in it
            path.parent.rmdir()


def _held(path: Path) -> list[Path]:
    """Return the files of a state, or what is left of one: never a file that only has the name of one."""
    if not path.parent.is_dir():
        return []
    files = files_of(path)
    return files if is_state(path) else [file for file in files if file not in (path, index_of(path))]


def _newest_first(paths: Sequence[Path]) -> list[Path]:
    """Return the states by the steps that their headers state, or else by the numbers of their folders' names."""
    if len(paths) < 2:
        return [*paths]
    numbers = {path: [int(number) for part in path.parts for number in NUMBER.findall(part)] for path in paths}
    differing = [place for place, values in enumerate(zip(*numbers.values(), strict=True)) if len(set(values)) > 1]
    if len(differing) == 1:
        return sorted(paths, key=lambda path: -numbers[path][differing[0]])
    steps = {path: _step(path) for path in paths}
    unknown = [path for path, step in steps.items() if step is None]
    if unknown:
        raise OptionError(
            f"{unknown[0]}: which of {len(paths)} states is the newest is unknown: the folders' names differ in "
            "several numbers, and this state has no global_step"
        )
    return sorted(paths, key=lambda path: -(steps[path] or 0))


def _step(path: Path) -> int | None:
    if not _is_whole(path):
        return None
    with open_state(path) as state:
        return state.global_step


def _is_whole(path: Path) -> bool:
    """Return whether a state can be opened: all files are there, and every header is what it was when written."""
    try:
        if not is_state(path):
            return False
        open_state(path).close()
    except (FileError, DigestError, FileNotFoundError):
        return False
    return True
