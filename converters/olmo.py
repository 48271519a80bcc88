"""OLMo's unsharded checkpoints: ``optim.pt`` beside ``model.pt`` and ``train.pt``.

Every group lists its parameters' names, which OLMo sorts, and FSDP's files use them for ids. The safetensors variant
keeps the keys as base64 of pickles, and all but tensors as pickles in tensors: it is refused. Sharded checkpoints
(``model_and_optim``) are DCP folders. The layouts are those of ``olmo/checkpoint.py`` and ``olmo/safetensors_util.py``.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, RefusedError
from lora_state_format.foreign import keyed, pickles
from lora_state_format.foreign.state_dict import from_state_dict
from lora_state_format.foreign.weights import read_weights
from lora_state_format.io.files import reading
from lora_state_format.io.safetensors import read_header
from lora_state_format.model.sources import File
from lora_state_format.model.states import Checkpoint
from lora_state_format.registry import Match

NAME: Final = "olmo"
DESCRIPTION: Final = "an unsharded OLMo checkpoint folder: optim.pt beside model.pt"

_OPTIMIZER: Final = "optim.pt"
_PICKLED: Final = "optim.safetensors"


def detect(path: Path) -> Match | None:
    if (path / _OPTIMIZER).is_file() and (path / "model.pt").is_file():
        return Match(f"{_OPTIMIZER} beside model.pt", path)
    for place in (path, path / _PICKLED):
        if place.name == _PICKLED and place.is_file() and _is_pickled(place):
            return Match(f"{_PICKLED} whose keys are pickles", place)
    return None


def _is_pickled(path: Path) -> bool:
    with File(path) as file:
        try:
            key = next(iter(read_header(file).tensors), "")
            return base64.urlsafe_b64decode(key).startswith(b"\x80")
        except (FileError, binascii.Error, ValueError):
            return False


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Read the state. Raises ``RefusedError`` for the safetensors variant."""
    path = match.path
    if path.name == _PICKLED:
        raise RefusedError(
            "its tensors' names and all other values are pickles; save the run's state as optim.pt "
            "(save_format torch) and convert that. Nothing was run",
            path=path,
        )
    with reading() as files:
        place = path / _OPTIMIZER
        weights = read_weights(path / "model.pt", files)
        state = from_state_dict(
            pickles.load(files[place], place).value,
            origin={"format": NAME},
            global_step=_step(path),
            resources=(files,),
        )
        return Checkpoint(keyed.named(state, weights=weights), weights)


def _step(path: Path) -> int | None:
    for name in ("train.pt", "other.pt"):
        if (path / name).is_file():
            with File(path / name) as file:
                tree = pickles.load(file).value
            step = tree.get("global_step") if isinstance(tree, dict) else None
            return step if type(step) is int else None
    return None
