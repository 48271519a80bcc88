"""What torch's ``HuggingFaceStorageWriter`` makes of a flattened optimizer state: ``state.<parameter>.<slot>`` tensors.

``shard-R-...safetensors`` has rank ``R``'s parts, and in its metadata where each begins (``DCP_SHARDING_INFO``).
Consolidated files have whole tensors, but zeros for those without axes, ``step`` among them (seen with torch 2.13): the
folder ``sharded``, which the writer leaves next to them, is read instead where it is there. The layout is that of
``torch/distributed/checkpoint/hf_storage.py``. The writer takes tensors only, so hyperparameters, and parameters that
never took a step, are not in it: there is one group without options. Nothing says how many shards there were.
Parameters that lack a slot which others have show that one is missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, Remedy
from lora_state_format.foreign import keyed
from lora_state_format.foreign.state_dict import from_state_dict
from lora_state_format.io.files import Files, reading
from lora_state_format.io.safetensors import read_header
from lora_state_format.io.strict_json import loads
from lora_state_format.model.sources import File, Memory
from lora_state_format.model.states import Checkpoint, Scalar
from lora_state_format.model.tensors import Box, Piece, Tensor, contiguous, is_tiling
from lora_state_format.registry import Match

NAME: Final = "dcp_safetensors"
DESCRIPTION: Final = "a folder of torch's HuggingFaceStorageWriter with tensors state.<parameter>.<slot>"

OPTIONS: Final = {"step": "the number of steps, which torch's consolidated files lose"}

_STATE: Final = re.compile(r"(?:optim(?:izer)?\.)?state\.(.+)\.([^.]+)")
_SHARD: Final = re.compile(r"shard-(\d+)-.*\.safetensors")
_SHARDING: Final = "DCP_SHARDING_INFO"


def detect(path: Path) -> Match | None:
    for folder in (path / "sharded", path):
        if folder.is_dir() and (files := sorted(folder.glob("*.safetensors"))):
            with File(files[0]) as file:
                try:
                    keys = read_header(file).entries
                except FileError:
                    continue
            if keys and any(_STATE.fullmatch(key) for key in keys):
                return Match("safetensors files with tensors called state.<parameter>.<slot>", folder)
    return None


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Read the folder.

    Raises:
        FileError: the files of some ranks are missing.
    """
    folder = match.path
    with reading() as files:
        parts: dict[str, list[tuple[tuple[int, ...], Tensor]]] = {}
        paths = sorted(folder.glob("*.safetensors"))
        _check_complete(folder, paths)
        for path in paths:
            for key, start, tensor in _parts(path, files):
                parts.setdefault(key, []).append((start, tensor))
        state: dict[str, dict[str, Tensor]] = {}
        weights: dict[str, Tensor] = {}
        for key, found in parts.items():
            tensor = _whole(key, found, folder)
            if named := _STATE.fullmatch(key):
                state.setdefault(named[1], {})[named[2]] = tensor
            else:
                weights[key.removeprefix("model.")] = tensor
        if not any(map(_SHARD.fullmatch, (path.name for path in paths))):
            _restore_steps(state, options.get("step"), folder)
        slots = {slot: name for name, held in state.items() for slot in held}
        for name, held in state.items():
            if missing := sorted(slots.keys() - held.keys()):
                raise FileError(
                    f"has no '{missing[0]}' of '{name}', where '{slots[missing[0]]}' has one: a shard is missing; copy "
                    "the folder again from where it was written",
                    path=folder,
                )
        tree = {"state": state, "param_groups": [{"params": list(state)}]}
        result = from_state_dict(tree, origin={"format": NAME, "files": len(paths)}, resources=(files,))
        return Checkpoint(keyed.named(result, weights=weights), weights)


def _restore_steps(state: Mapping[str, dict[str, Any]], step: Any, folder: Path) -> None:
    """Replace the steps that a consolidated file lost by the number that the caller knows.

    Raises:
        FileError: steps are zero, and the caller says no number.
    """
    for name, slots in state.items():
        held = slots.get("step")
        if held is None or held.shape or any(held.bytes()):
            continue
        if not str(step).isdecimal():
            raise FileError(
                f"'step' of '{name}' is 0, as torch's consolidated files have it whatever it was",
                path=folder,
                remedy=Remedy(
                    "give the folder with the shards ('sharded', next to this file when it was written), or pass "
                    "{options}",
                    {"options": {"step": ...}},
                ),
            )
        slots["step"] = contiguous("F32", (), Memory(Scalar.of("F32", float(step)).data))


def _check_complete(folder: Path, paths: list[Path]) -> None:
    """Raise ``FileError`` for a gap in the numbers of the shards, which begin with 1."""
    numbers = sorted(int(match[1]) for path in paths if (match := _SHARD.fullmatch(path.name)))
    for expected, number in enumerate(sorted(set(numbers)), 1):
        if number != expected:
            raise FileError(f"has no shard {expected}, and has shard {number}", path=folder)


def _parts(path: Path, files: Files) -> list[tuple[str, tuple[int, ...], Tensor]]:
    """Return the tensors of a file: key, where it begins in the whole, and its bytes."""
    with File(path) as file:
        header = read_header(file)
    text = header.metadata.get(_SHARDING)
    sharding = loads(text, path=path) if text is not None else {}
    found = []
    for key, tensor in header.tensors.items():
        stated = sharding.get(key, {}) if isinstance(sharding, dict) else None
        start = stated.get("saved_offsets", [0] * len(tensor.shape)) if isinstance(stated, dict) else None
        if (
            not isinstance(start, list)
            or [type(n) for n in start] != [int] * len(tensor.shape)
            or min(start, default=0) < 0
        ):
            raise FileError(f"{_SHARDING} says no place for '{key}'", path=path)
        pieces = tuple(Piece(files[path], piece.offset, piece.where) for piece in tensor.pieces)
        found.append((key, tuple(start), Tensor(tensor.dtype, tensor.shape, pieces)))
    return found


def _whole(key: str, parts: list[tuple[tuple[int, ...], Tensor]], folder: Path) -> Tensor:
    """Return a tensor put together from its parts."""
    if len(parts) == 1 and not any(parts[0][0]):
        return parts[0][1]
    axes = range(len(parts[0][0]))
    shape = tuple(max(start[axis] + tensor.shape[axis] for start, tensor in parts) for axis in axes)
    boxes = [Box(start, tensor.shape) for start, tensor in parts]
    if len({tensor.dtype for _, tensor in parts}) > 1 or not is_tiling(boxes, shape):
        raise FileError(
            f"{len(parts)} parts of '{key}' do not make up {list(shape)}: a shard is missing, or of another save",
            path=folder,
        )
    pieces = tuple(Piece(tensor, 0, box) for box, (_, tensor) in zip(boxes, parts, strict=True) if tensor.count)
    return Tensor(parts[0][1].dtype, shape, pieces)
