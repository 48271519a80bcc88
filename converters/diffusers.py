"""Checkpoints of diffusers' LoRA training scripts: accelerate's files with ``pytorch_lora_weights.safetensors``.

The optimizer is positional: one group with the transformer's or UNet's adapter, then one with each text encoder's. The
weights' keys name the same parameters without the adapter's name. Layout: ``examples/*/train_*_lora*.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lora_state_format.foreign import pickles
from lora_state_format.foreign.state_dict import from_state_dict
from lora_state_format.foreign.weights import read_weights
from lora_state_format.io.files import reading
from lora_state_format.model.states import Checkpoint
from lora_state_format.registry import Match

NAME: Final = "diffusers"
DESCRIPTION: Final = "a checkpoint of diffusers' LoRA scripts: optimizer.bin beside pytorch_lora_weights.safetensors"

_OPTIMIZER: Final = "optimizer.bin"
_WEIGHTS: Final = "pytorch_lora_weights.safetensors"


def detect(path: Path) -> Match | None:
    if (path / _OPTIMIZER).is_file() and (path / _WEIGHTS).is_file():
        return Match(f"{_OPTIMIZER} beside {_WEIGHTS}", path)
    return None


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    path = match.path
    step = path.name.removeprefix("checkpoint-")
    with reading() as files:
        state = from_state_dict(
            pickles.load(files[path / _OPTIMIZER], path / _OPTIMIZER).value,
            origin={"format": NAME},
            global_step=int(step) if step.isdecimal() else None,
            resources=(files,),
        )
        return Checkpoint(state, read_weights(path / _WEIGHTS, files))
