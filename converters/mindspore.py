"""MindSpore's safetensors: one file of ``save_checkpoint``, or a folder of MindFormers with each rank's files.

Keys are ``<kind>.<parameter>``, ``adam_m.layers.0.weight`` for example, next to the weights under their own names. In a
folder ``metadata.json`` says which file holds which part of a tensor, by where the part begins; its layout is that of
``mindformers/checkpoint/metadata.py``. There are no options but the learning rate and SGD's momentum, no classes and no
groups. Parameters have MindSpore's names, which call a norm's weights ``gamma`` and ``beta``. What follows from the
step is left out: the powers of Adam's betas, and ``stat``, by which SGD knows its first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError
from lora_state_format.foreign import keyed
from lora_state_format.foreign.state_dict import from_state_dict
from lora_state_format.foreign.trees import member
from lora_state_format.foreign.weights import read_weights
from lora_state_format.io.files import Files, inside, reading
from lora_state_format.io.json_files import read_json_object
from lora_state_format.io.safetensors import read_header
from lora_state_format.model.sources import File, Memory
from lora_state_format.model.states import Checkpoint, Scalar, scalar_of
from lora_state_format.model.tensors import Box, Piece, Tensor, contiguous, is_tiling
from lora_state_format.registry import Match

NAME: Final = "mindspore"
DESCRIPTION: Final = "MindSpore's safetensors with an optimizer, or MindFormers' folder of them with metadata.json"

SLOTS: Final[Mapping[str, str]] = {
    "accum": "momentum_buffer",
    "adam_m": "exp_avg",
    "adam_v": "exp_avg_sq",
    "exp_avg": "exp_avg",
    "exp_avg_sq": "exp_avg_sq",
    "moment1": "exp_avg",
    "moment2": "exp_avg_sq",
    "moments": "momentum_buffer",
}
"""What an optimizer's tensors are called, by what MindSpore calls them: ``mindspore/nn/optim``, and MindFormers'
``core/optim``."""

ADAM: Final = "exp_avg"
"""The slot of the optimizers that count steps."""

_METADATA: Final = "metadata.json"
_TENSORS: Final = "state_dict_metadata"
_STEP: Final = "global_step"
_OPTIONS: Final = {"learning_rate": "lr", "momentum": "momentum"}


def detect(path: Path) -> Match | None:
    if path.is_dir():
        metadata = path / _METADATA
        found = metadata.is_file() and _TENSORS in read_json_object(metadata)
        return Match(f"{_METADATA} of MindFormers", path) if found else None
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with File(path) as file:
            header = read_header(file)
    except FileError:
        return None
    if header.metadata.get("format") == "ms" and _slots(header.tensors):
        return Match("a safetensors file of MindSpore with an optimizer's tensors", path)
    return None


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Read a file, or a folder.

    Raises:
        FileError: files are missing or damaged, or the parts of a tensor do not make it up.
    """
    path = match.path
    with reading(path) if path.is_dir() else reading() as files:
        tensors = _joined(path, files) if path.is_dir() else read_weights(path, files)
        slots = _slots(tensors)
        if not slots:
            raise FileError("holds no tensors of an optimizer: it was saved without one", path=path)
        step = _number(tensors, _STEP)
        state = {
            name: {**({"step": _counted(step)} if step is not None and ADAM in held else {}), **held}
            for name, held in slots.items()
        }
        told = {option: value for key, option in _OPTIONS.items() if (value := _number(tensors, key)) is not None}
        result = from_state_dict(
            {"state": state, "param_groups": [{**told, "params": list(state)}]},
            origin={"format": NAME, **({"support": "from source only"} if path.is_dir() else {})},
            global_step=None if step is None else int(step),
            resources=(files,),
        )
        weights = {name: tensors[name] for name in state if name in tensors}
        return Checkpoint(keyed.named(result, weights=weights), weights)


def _slots(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return an optimizer's tensors by parameter and slot.

    What begins as one of them does is one where the rest of its key is a parameter's name, or no parameter is there.
    """
    split = {key: key.partition(".") for key in tensors}
    weights = {key for key, (kind, _, _) in split.items() if kind not in SLOTS and tensors[key].shape and key != _STEP}
    found: dict[str, dict[str, Tensor]] = {}
    for key, (kind, _, name) in split.items():
        if kind in SLOTS and name and (not weights or name in weights):
            found.setdefault(name, {})[SLOTS[kind]] = tensors[key]
    return found


def _number(tensors: Mapping[str, Tensor], key: str) -> float | None:
    """Return the number in a tensor of one element; ``None`` if there is no such tensor."""
    tensor = tensors.get(key)
    if tensor is None or tensor.count != 1:
        return None
    value = scalar_of(tensor).item()
    return value if isinstance(value, (int, float)) else None


def _counted(step: float) -> Tensor:
    return contiguous("F32", (), Memory(Scalar.of("F32", float(step)).data))


# --- a folder -------------------------------------------------------------------------------------------------------


def _joined(folder: Path, files: Files) -> dict[str, Tensor]:
    """Return the tensors of a folder, whole."""
    path = folder / _METADATA
    metadata = read_json_object(path)
    stored = member(metadata, "storage_data", dict, path)
    held: dict[Path, dict[str, Tensor]] = {}
    found = {}
    for key, stated in member(metadata, _TENSORS, dict, path).items():
        shape = _sizes(stated, "global_shape", path)
        parts: dict[Box, Tensor] = {}
        for chunk in member(stated, "chunk", list, path):
            box = Box(_sizes(chunk, "global_offset", path), _sizes(chunk, "local_shape", path))
            place = member(stored, str((key, box.start)), list, path)
            file = inside(folder, member(member(place, 0, dict, path), "file_name", str, path), path)
            if file not in held:
                if not file.is_file():
                    raise FileError(f"missing: {_METADATA} names it", path=file)
                held[file] = read_weights(file, files)
            parts[box] = member(held[file], key, Tensor, file)
            if parts[box].shape != box.shape:
                raise FileError(
                    f"has {key!r} of shape {list(parts[box].shape)}, where {_METADATA} says {list(box.shape)}",
                    path=file,
                )
        if not is_tiling(list(parts), shape):
            raise FileError(f"says parts of {key!r} that do not make up {list(shape)}", path=path)
        dtypes = {part.dtype for part in parts.values()}
        if len(dtypes) != 1:
            raise FileError(f"has parts of {key!r} of several types: {', '.join(sorted(dtypes))}", path=folder)
        found[key] = Tensor(dtypes.pop(), shape, tuple(Piece(part, 0, box) for box, part in parts.items()))
    return found


def _sizes(stated: Any, key: str, path: Path) -> tuple[int, ...]:
    sizes = member(stated, key, list, path)
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise FileError(f"{key!r} is {str(sizes)[:60]}, where sizes are expected", path=path)
    return tuple(sizes)
