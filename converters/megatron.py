"""Megatron-core's distributed checkpoints (``torch_dist``), also inside NeMo 2: DCP folders with their own keys.

Written from Megatron's source only (``distrib_optimizer.py``, ``transformer_block.py``), not tested with files of its
own. The state stands under ``optimizer.state.<slot>.<parameter>``; layers of one shape are stacked along a first axis,
which is split here, so that parameters get the names that the model has. Names stay Megatron's: fused projections are
not taken apart. Steps and options stand in ``common.pt``, whose groups do not say which parameters they had.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, RefusedError
from lora_state_format.foreign import keyed, pickles
from lora_state_format.foreign.dcp import METADATA, is_folder, open_folder
from lora_state_format.foreign.state_dict import from_state_dict
from lora_state_format.io.json_files import read_json_object
from lora_state_format.model.sources import File
from lora_state_format.model.states import Checkpoint
from lora_state_format.model.tensors import Box, Piece, Tensor
from lora_state_format.registry import Match

NAME: Final = "megatron"
DESCRIPTION: Final = "a Megatron-core or NeMo torch_dist checkpoint: metadata.json beside .metadata (from source only)"
OPTIONS: Final = {"masters": "keep the fp32 master weights as a slot 'master_param'"}

_PREFIX: Final = "optimizer.state."
_STACKED: Final = re.compile(r"(.*\blayers)\.(?!\d)(.*)")


def detect(path: Path) -> Match | None:
    folder = _folder(path)
    if folder is None:
        return None
    return Match("metadata.json with a sharded_backend beside .metadata; support is from source only", folder)


def _folder(path: Path) -> Path | None:
    for folder in (path, path / "weights"):
        description = folder / "metadata.json"
        if is_folder(folder) and description.is_file() and "sharded_backend" in read_json_object(description):
            return folder
    return None


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Read the state. Raises ``RefusedError`` for buckets of flat buffers, which only the model can take apart."""
    chosen = options
    place = match.path
    backend = read_json_object(place / "metadata.json").get("sharded_backend")
    if backend != "torch_dist":
        raise RefusedError(f"sharded_backend {backend!r}; torch_dist is read", path=place / "metadata.json")
    folder = open_folder(place)
    try:
        entries = {".".join(map(str, where)): value for where, value in folder.entries.items()}
        if any(key.startswith("optimizer.distributed.") for key in entries):
            raise RefusedError(
                "the optimizer's state lies in buckets of flat buffers, which only the model can take apart: save with "
                "dist_ckpt_optim_fully_reshardable",
                path=place / METADATA,
            )
        groups = _groups(place)
        steps = [group["step"] for group in groups if "step" in group]
        state: dict[str, dict[str, Any]] = {}
        for key, value in entries.items():
            slot, _, name = key.removeprefix(_PREFIX).partition(".")
            if not key.startswith(_PREFIX) or not isinstance(value, Tensor) or not name:
                continue
            if slot == "fp32_param":
                if not chosen.get("masters"):
                    continue
                slot = "master_param"
            for layer, tensor in _layers(name, value):
                state.setdefault(layer, {"step": steps[0]} if steps else {})[slot] = tensor
        if not state:
            raise FileError(f"has no entry under {_PREFIX}", path=place / METADATA)
        kept = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in groups]
        common = (
            {key: value for key, value in kept[0].items() if all(g.get(key) == value for g in kept)} if kept else {}
        )
        result = from_state_dict(
            {"state": state, "param_groups": [{**common, "params": list(state)}]},
            origin={"format": NAME, "support": "from source only", **({"groups": len(kept)} if len(kept) > 1 else {})},
            resources=(folder,),
        )
        weights = {
            name: part
            for key, value in entries.items()
            if isinstance(value, Tensor) and not key.startswith("optimizer.")
            for name, part in _layers(key.removeprefix("model."), value)
        }
        return Checkpoint(keyed.named(result), {name: weights[name] for name in state if name in weights})
    except BaseException:
        folder.close()
        raise


def _layers(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensor under its name, or one tensor per layer where they are stacked along a first axis."""
    match = _STACKED.fullmatch(name)
    if match is None or not tensor.shape:
        yield name, tensor
        return
    rest = tensor.shape[1:]
    for layer in range(tensor.shape[0]):
        part = tensor.part((layer, *(0 for _ in rest)), (1, *rest))
        yield f"{match[1]}.{layer}.{match[2]}", Tensor(part.dtype, rest, tuple(map(_without_first, part.pieces)))


def _without_first(piece: Piece) -> Piece:
    assert isinstance(piece.where, Box)
    where = Box(piece.where.start[1:], piece.where.shape[1:])
    return Piece(piece.source, piece.offset, where, piece.strides[1:] if piece.strides else None)


def _groups(folder: Path) -> Sequence[dict[str, Any]]:
    """Return the options in ``common.pt``, wherever the optimizer's state dict lies in it."""
    path = folder / "common.pt"
    if not path.is_file():
        return []
    with File(path) as file:
        node = pickles.load(file).value
    for _ in range(4):
        if not isinstance(node, dict):
            return []
        if isinstance(node.get("param_groups"), list):
            return [group for group in node["param_groups"] if isinstance(group, dict)]
        node = node.get("optimizer")
    return []
