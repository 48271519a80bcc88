"""This package's own format as one more format: a file, the index of a set, or a checkpoint folder with either."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lora_state_format.format import envelope, reading
from lora_state_format.model.states import Checkpoint, OptimizerState
from lora_state_format.registry import Match

if TYPE_CHECKING:
    from lora_state_format.format.writing import Written

NAME: Final = "named"
DESCRIPTION: Final = "named optimizer state: a .safetensors file of this package, or a set of them with its index"

TARGET: Final = "optimizer.safetensors"
"""What the file is called in a folder that the caller names."""


def detect(path: Path) -> Match | None:
    place = envelope.find_state(path)
    return Match("a safetensors file whose metadata holds 'optimizer_state'", place) if place else None


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint(reading.open_state(match.path))


def write(state: OptimizerState, path: Path, *, base: Path | None, force: bool, options: Mapping[str, Any]) -> Written:
    from lora_state_format.format import writing  # ``inspect`` comes here too, and writes nothing

    return writing.write(state, path, force=force)
