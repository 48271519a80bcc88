"""nanotron's ``optimizer`` folder: ``optimizer_config.json`` and one file per rank, with names next to the ids.

Written from nanotron's source only (``serialize/optimizer.py``, ``optim/zero.py``), not tested with files of its own.
With ZeRO-1 a data-parallel rank holds flat parts of parameters; their places are in the JSON file, as strings.
Pipeline ranks hold different parameters. Tensor-parallel and expert-parallel shards are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, RefusedError
from lora_state_format.foreign import keyed, pickles
from lora_state_format.foreign.state_dict import from_state_dict
from lora_state_format.foreign.trees import member
from lora_state_format.io.files import Files, reading
from lora_state_format.io.json_files import read_json_object
from lora_state_format.model.states import Checkpoint
from lora_state_format.model.tensors import Flat, Piece, Tensor
from lora_state_format.registry import Match

NAME: Final = "nanotron"
DESCRIPTION: Final = "nanotron's optimizer folder: optimizer_config.json next to optimizer_pp-*.pt (from source only)"

_CONFIG: Final = "optimizer_config.json"
_FILE: Final = re.compile(r"optimizer_pp-(\d+)-of-\d+(?:_dp-(\d+)-of-\d+)?_tp-\d+-of-\d+_exp-\d+.*\.pt")


def detect(path: Path) -> Match | None:
    folder = _folder(path)
    return Match(f"{_CONFIG} of nanotron; support is from source only", folder) if folder else None


def _folder(path: Path) -> Path | None:
    for folder in (path, path / "optimizer"):
        if (folder / _CONFIG).is_file() and any(_FILE.fullmatch(file.name) for file in folder.iterdir()):
            return folder
    return None


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    folder = match.path
    config = read_json_object(folder / _CONFIG)
    sizes = _parallel_sizes(config, folder)
    sharded = config.get("configs", {}).get("param_name_to_dp_rank_offsets", {})
    ranks = _ranks(folder, sizes.get("pp_size", 1), sizes.get("dp_size", 1) if sharded else 1)
    state: dict[str, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    with reading() as files:
        for paths in ranks:
            trees = [_by_name(path, files) for path in paths]
            merged = _merge_data_ranks(trees, config["configs"], folder) if sharded else trees[0]
            state |= merged["state"]
            groups += merged["param_groups"]
        positional = from_state_dict(
            {"state": state, "param_groups": groups},
            origin={"format": NAME, "support": "from source only"},
            resources=(files,),
        )
        return Checkpoint(keyed.named(positional))


def _parallel_sizes(config: Mapping[str, Any], folder: Path) -> dict[str, int]:
    """Return the sizes of a run's process groups. Raises ``RefusedError`` for tensor and expert parallelism."""
    sizes = {key: int(value) for key, value in member(config, "parallelism", dict, folder / _CONFIG).items()}
    for kind in ("tp_size", "expert_parallel_size"):
        if sizes.get(kind, 1) > 1:
            raise RefusedError(f"parameters are sharded ({kind} {sizes[kind]}), and nothing says how", path=folder)
    return sizes


def _ranks(folder: Path, pipeline_ranks: int, data_ranks: int) -> list[list[Path]]:
    """Return the files of each pipeline rank by data rank."""
    found = {
        (int(parts[1]), int(parts[2] or 0)): file
        for file in sorted(folder.iterdir())
        if (parts := _FILE.fullmatch(file.name))
    }
    for pipeline, data in product(range(pipeline_ranks), range(data_ranks)):
        if (pipeline, data) not in found:
            raise FileError(f"no file of pipeline rank {pipeline}, data rank {data}", path=folder)
    return [[found[pipeline, data] for data in range(data_ranks)] for pipeline in range(pipeline_ranks)]


def _merge_data_ranks(trees: list[dict[str, Any]], configs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the state dict whose parameters the data-parallel ranks hold flat parts of (ZeRO-1)."""
    shapes = member(configs, "orig_param_shapes", dict, folder / _CONFIG)
    offsets = member(configs, "param_name_to_dp_rank_offsets", dict, folder / _CONFIG)
    state: dict[str, dict[str, Any]] = {}
    groups = []
    for number, group in enumerate(trees[0]["param_groups"]):
        names = dict.fromkeys(name for tree in trees for name in tree["param_groups"][number]["params"])
        groups.append({**group, "params": list(names)})
        for name in names:
            shape = tuple(int(size) for size in member(shapes, name, list, folder / _CONFIG))
            places = member(offsets, name, dict, folder / _CONFIG)
            state[name] = _joined(name, [tree["state"].get(name) for tree in trees], places, shape, folder)
    return {"state": state, "param_groups": groups}


def _by_name(path: Path, files: Files) -> dict[str, Any]:
    """Return a rank's state dict with names for ids."""
    tree = pickles.load(files[path], path).value
    names = member(tree, "names", dict, path)
    groups = member(tree, "param_groups", list, path)
    for group in groups:
        for identity in member(group, "params", list, path):
            member(names, identity, str, path)
    return {
        "state": {names[identity]: slots for identity, slots in member(tree, "state", dict, path).items()},
        "param_groups": [{**group, "params": [names[identity] for identity in group["params"]]} for group in groups],
    }


def _joined(
    name: str, parts: list[Any], places: Mapping[str, Any], shape: tuple[int, ...], folder: Path
) -> dict[str, Any]:
    """Return a parameter's slots out of the flat parts that the data-parallel ranks hold."""
    first = next((part for part in parts if part is not None), None)
    if first is None:
        raise FileError(f"no rank holds the state of '{name}'", path=folder)
    slots: dict[str, Any] = {}
    for slot, value in first.items():
        if not isinstance(value, Tensor) or not value.shape:
            slots[slot] = value
            continue
        pieces = []
        for rank, part in enumerate(parts):
            if str(rank) in places:
                start, stop = (int(n) for n in places[str(rank)])
                tensor = member(part, slot, Tensor, folder)
                if tensor.count != stop - start:
                    raise FileError(
                        f"rank {rank} holds {tensor.count} of {stop - start} elements of '{name}'", path=folder
                    )
                pieces.append(Piece(tensor, 0, Flat(start, stop - start)))
        if sum(piece.where.count for piece in pieces if isinstance(piece.where, Flat)) != prod(shape):
            raise FileError(f"the ranks do not hold all {prod(shape)} elements of '{name}'", path=folder)
        slots[slot] = Tensor(value.dtype, shape, tuple(pieces))
    return slots
