"""Every checkpoint below a folder: of what format it is, where its names come from, or why it cannot be named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_state_format import registry
from lora_state_format.errors import FileError, StateFormatError, UnknownFormatError
from lora_state_format.foreign.kinds import kind_of_file
from lora_state_format.operations.conversion import read

__all__ = ["Surveyed", "survey"]

NO_OPTIMIZER: Final = "no optimizer's state dict in it"
"""How a file of weights is refused by the converter that knows its container: it is no checkpoint of an optimizer."""


@dataclass(frozen=True)
class Surveyed:
    """A checkpoint, or what looks like one.

    ``format`` is the converter's name, ``source``, ``rule`` and ``place`` are where its names come from, and ``reason``
    says why it cannot be read or named; either of them is ``None``.
    """

    path: str
    format: str | None = None
    parameters: int | None = None
    global_step: int | None = None
    source: str | None = None
    rule: str | None = None
    place: str | None = None
    reason: str | None = None

    def __str__(self) -> str:
        if self.reason is not None:
            return f"{self.path} ({self.format or 'unknown'}): {self.reason}".replace("\n", "\n  ")
        step = "" if self.global_step is None else f", step {self.global_step}"
        place = f", {self.place}" if self.place else ""
        return f"{self.path} ({self.format}): {self.parameters} parameters{step}; names: {self.source}{place}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields."""
        return dict(vars(self))


def survey(path: str | os.PathLike[str]) -> Iterator[Surveyed]:
    """Yield every checkpoint at a path and in the folders below it, in the order of their paths.

    What belongs to a checkpoint's folder is not listed again. Links to folders are not followed. No tensor is read, but
    for those that speak for an order of names. Raises ``FileNotFoundError`` where there is nothing at the path.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    return _below(path)


def _below(path: Path) -> Iterator[Surveyed]:
    found = _surveyed(path)
    if found is not None:
        yield found
    elif path.is_dir() and not path.is_symlink():
        for inner in sorted(path.iterdir()):
            yield from _below(inner)


def _surveyed(path: Path) -> Surveyed | None:
    """Return what is at a path itself; ``None`` if that is no checkpoint."""
    try:
        converter, _ = registry.find(path)
    except UnknownFormatError as error:
        return Surveyed(str(path), reason=_told(error)) if getattr(error, "matches", ()) else None
    except (FileError, OSError) as error:
        return (
            Surveyed(str(path), reason=_told(error)) if path.is_file() and kind_of_file(path) != "a text file" else None
        )
    try:
        with read(path) as state:
            naming = state.naming
            place = naming.details.get("place")
            return Surveyed(
                str(path),
                converter.NAME,
                len(state),
                state.global_step,
                naming.source,
                naming.rule,
                place if isinstance(place, str) else None,
            )
    except (StateFormatError, OSError) as error:
        if isinstance(error, FileError) and error.detail.startswith(NO_OPTIMIZER):
            return None
        return Surveyed(str(path), converter.NAME, reason=_told(error))


def _told(error: StateFormatError | OSError) -> str:
    """Return what an error says, its remedy as options of a command: a survey is a command's."""
    return error.on_command_line() if isinstance(error, StateFormatError) else str(error)
