"""ColossalAI's sharded optimizer: ``pytorch_optim.bin.index.json``, shards with the slots of ids, a file of groups.

Whatever the plugin (``LowLevelZeroPlugin``, ``GeminiPlugin``, ``HybridParallelPlugin``), its writer gathers each
parameter's slots before it saves them: shards hold whole tensors, under the ids that the parameters had in the model
before it was cut. The layout is that of ``colossalai/checkpoint_io``. Names come from the weights, which its programs
save in a folder next to this one. What ``save_optimizer`` writes without ``shard=True`` is a plain state dict.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, RefusedError
from lora_state_format.foreign import pickles
from lora_state_format.foreign.state_dict import from_state_dict
from lora_state_format.foreign.trees import member
from lora_state_format.foreign.weights import weights_at
from lora_state_format.io.files import Files, inside, names_in, reading
from lora_state_format.io.json_files import read_json_object
from lora_state_format.model.states import Checkpoint, Weights
from lora_state_format.registry import Match

NAME: Final = "colossalai"
DESCRIPTION: Final = (
    "ColossalAI's sharded optimizer: pytorch_optim.bin.index.json, its shards and pytorch_optim_group.bin"
)

_INDEX: Final = re.compile(r"(?:pytorch_optim\.bin|optimizer\.safetensors)\.index(?:\.[^.]+)?\.json")
_FOLDERS: Final = ("modeling", "model")
"""What its programs call the folder with the weights, next to ``optimizer``."""
_CONFIGS: Final = ("adapter_config.json", "config.json")


def detect(path: Path) -> Match | None:
    for place in (path, path / "optimizer"):
        index = _index(place)
        if index is not None:
            return Match(f"{index.name} of ColossalAI", index)
    return None


def _index(path: Path) -> Path | None:
    """Return the index of a folder, or the path itself where it is one: the metadata of ColossalAI's names a file."""
    if path.is_dir():
        found = [path / name for name in names_in(path) if _INDEX.fullmatch(name)]
    else:
        found = [path] if path.is_file() and _INDEX.fullmatch(path.name) else []
    return next((index for index in found if isinstance(_metadata(index), dict)), None)


def _metadata(index: Path) -> Any:
    metadata = read_json_object(index).get("metadata")
    return metadata if isinstance(metadata, dict) and "param_groups" in metadata else None


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Read the folder.

    Raises:
        FileError: shards are missing, or not those of the index.
        RefusedError: safetensors of an asynchronous save, in which steps and groups are pickles.
    """
    index = match.path
    if index.name.startswith("optimizer.safetensors"):
        raise RefusedError(
            "an asynchronous save, in whose safetensors all that is no tensor is a pickle: load it where it was "
            "written, and save it with use_async=False",
            path=index,
        )
    with reading(index.parent) as files:
        place = inside(index.parent, _metadata(index)["param_groups"], index)
        groups = _loaded(place, files)
        if not isinstance(groups, list):
            raise FileError("holds no list of groups", path=place)
        state = _state(index, files)
        result = from_state_dict({"state": state, "param_groups": groups}, origin={"format": NAME}, resources=(files,))
        candidates, configs, skipped = _next_to(index.parent, files)
        return Checkpoint(result, configs=configs, candidates=candidates, skipped=skipped)


def _next_to(folder: Path, files: Files) -> tuple[tuple[tuple[Weights, ...], ...], dict[str, Path], tuple[str, ...]]:
    """Return the weights in the optimizer's folder or in one next to it, the configs there, and what was skipped."""
    skipped = []
    for place in (folder, *(folder.parent / name for name in _FOLDERS)):
        if not place.is_dir():
            continue
        try:
            found = weights_at(place, files)
        except (FileError, OSError) as error:
            if place != folder:
                skipped.append(f"{error}; it was skipped")
            continue
        configs = {name: place / name for name in _CONFIGS if (place / name).is_file()}
        return (found,), configs, tuple(skipped)
    return (), {}, tuple(skipped)


def _state(index: Path, files: Files) -> dict[Any, Any]:
    """Return the slots of all shards by id. Raises ``FileError`` for a shard that is missing, or of another save."""
    stated = member(read_json_object(index), "weight_map", dict, index)
    shards: dict[Path, set[str]] = {}
    for identity, name in stated.items():
        shards.setdefault(inside(index.parent, name, index), set()).add(identity)
    state: dict[Any, Any] = {}
    for path, identities in shards.items():
        tree = _loaded(path, files)
        held = {str(identity) for identity in tree} if isinstance(tree, dict) else set()
        if held != identities:
            raise FileError(
                f"holds the ids {_some(held)}, where {index.name} says {_some(identities)}: a shard of another save",
                path=path,
            )
        state |= tree
    return state


def _some(identities: set[str]) -> str:
    """Return ids in words, a few of many."""
    shown = sorted(identities, key=lambda text: (len(text), text))
    return ", ".join(shown[:3]) + (f", ... ({len(shown)})" if len(shown) > 3 else "") or "none"


def _loaded(path: Path, files: Files) -> Any:
    if not path.is_file():
        raise FileError("missing: the index of the optimizer's shards names it", path=path)
    return pickles.load(files[path], path).value
