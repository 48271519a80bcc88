"""kohya's sd-scripts' ``--save_state`` folders: accelerate's files with ``train_state.json``.

Written from the scripts' source only (``train_network.py``, ``networks/lora.py``), not tested with files of theirs. The
optimizer is positional: the text encoders' adapters, then the UNet's; with LoRA+ each split into two groups. The
weights' keys have the modules' dots made underscores, and an order of their own, so that names have to be given.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lora_state_format.foreign import pickles
from lora_state_format.foreign.state_dict import from_state_dict
from lora_state_format.foreign.weights import read_weights
from lora_state_format.io.files import reading
from lora_state_format.io.json_files import read_json_object
from lora_state_format.model.states import Checkpoint
from lora_state_format.registry import Match

NAME: Final = "kohya"
DESCRIPTION: Final = "a state folder of kohya's sd-scripts: optimizer.bin beside train_state.json (from source only)"

_OPTIMIZER: Final = "optimizer.bin"
_STATE: Final = "train_state.json"


def detect(path: Path) -> Match | None:
    if (path / _OPTIMIZER).is_file() and (path / _STATE).is_file():
        return Match(f"{_OPTIMIZER} beside {_STATE}; support is from source only", path)
    return None


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    path = match.path
    with reading() as files:
        step = read_json_object(path / _STATE).get("current_step")
        state = from_state_dict(
            pickles.load(files[path / _OPTIMIZER], path / _OPTIMIZER).value,
            origin={"format": NAME, "support": "from source only"},
            global_step=step if isinstance(step, int) else None,
            resources=(files,),
        )
        model = path / "model.safetensors"
        weights = read_weights(model, files) if model.is_file() else {}
        return Checkpoint(state, {key: tensor for key, tensor in weights.items() if not key.endswith(".alpha")})
