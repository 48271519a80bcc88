"""A first look at a checkpoint: its state, and names for it where they cost nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_state_format import registry
from lora_state_format.errors import ConversionError
from lora_state_format.model.states import OptimizerState, PositionalState

__all__ = ["Found", "look"]


@dataclass(frozen=True)
class Found:
    """What a checkpoint holds: its state, named where that is cheap; its format; why it has no names, if so."""

    state: OptimizerState | PositionalState
    source_format: str
    unnamed: ConversionError | None = None

    def why_unnamed(self, path: Path, *, on_command_line: bool = False) -> str:
        """Return on one line why the state at ``path`` has no names, in the words of Python or of the command line."""
        if self.unnamed is None:
            return ""
        text = self.unnamed.on_command_line() if on_command_line else str(self.unnamed)
        return f"none: {text.splitlines()[0].removeprefix(f'{path}: ')}"


def look(
    path: str | os.PathLike[str], *, source_format: str | None = None, whole: bool = False, **reading: Any
) -> Found:
    """Return the state in a checkpoint, named where that is cheap.

    A state that has its names already is opened without the modules that find names: half of the time of ``inspect``.

    Args:
        path: The checkpoint.
        source_format: The converter's name; by default the format is detected.
        whole: Whether all files of a folder are read; else the state may be one whose tensors cannot be read, and its
            ``origin["first_look"]`` says of how many files it was taken.
        reading: Other arguments of ``conversion.read``.

    Raises:
        StateFormatError: What ``conversion.read`` raises; state that cannot be named stays without names, unless names
            were asked for.
    """
    converter, match = registry.find(path, source_format)
    if converter.NAME == registry.NAMED and not any(reading.values()):
        return Found(registry.read_match(converter, match, {}).state, converter.NAME)
    from lora_state_format.operations.conversion import look_closer

    return look_closer(path, converter, match, whole=whole, **reading)
