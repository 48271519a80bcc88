"""Rank files of FSDP2, as trainers of reinforcement learning write them: ``optim_world_size_N_rank_R.pt``.

Each rank saves its optimizer's state dict with ``torch.save``, and the model's next to it. Tensors are pickled as
``DTensor``: the rank's part, the shape of the whole, the mesh of ranks and how the whole lies on it. They are put
together here along the axis that they were cut; of replicas the first is taken. The optimizer has ids; the model's
files say which names stand in which order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, RefusedError
from lora_state_format.foreign import keyed, pickles
from lora_state_format.foreign.pickles import Record
from lora_state_format.foreign.state_dict import from_state_dict, is_state_dict
from lora_state_format.foreign.trees import member
from lora_state_format.io.files import Files, reading
from lora_state_format.model.states import Checkpoint
from lora_state_format.model.tensors import Box, Piece, Tensor
from lora_state_format.registry import Match

NAME: Final = "fsdp2_ranks"
DESCRIPTION: Final = "a folder of FSDP2's rank files: optim_world_size_N_rank_R.pt, as RL trainers write them"

_FILE: Final = re.compile(r"(optim|model)_world_size_(\d+)_rank_(\d+)\.pt")


def detect(path: Path) -> Match | None:
    if (match := _FILE.fullmatch(path.name)) and match[1] == "optim" and path.is_file():
        return Match("an optimizer file of one of FSDP's ranks", path)
    if path.is_dir() and any((m := _FILE.fullmatch(file.name)) and m[1] == "optim" for file in path.iterdir()):
        return Match("optim_world_size_*_rank_*.pt, one per rank", path)
    return None


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Read the folder.

    Raises:
        FileError: files are missing, or not of one save.
        RefusedError: one rank's file alone, or tensors that lie on their mesh in a way that is not read.
    """
    folder = match.path
    if folder.is_file():
        raise RefusedError(
            f"the file of one of FSDP's ranks: give the folder, {folder.parent.name}, which has those of all ranks",
            path=folder,
        )
    with reading() as files:
        trees = _trees("optim", folder, files)
        paths = list(trees)
        for path, tree in trees.items():
            if not is_state_dict(tree):
                raise FileError("holds no optimizer's state dict", path=path)
        first = trees[paths[0]]
        for path, tree in trees.items():
            if tree["param_groups"] != first["param_groups"] or tree["state"].keys() != first["state"].keys():
                raise FileError(f"has other groups or parameters than {paths[0].name}: of another save", path=path)
        state = {
            identity: {
                slot: _whole(
                    f"{slot} of parameter {identity}", [t["state"][identity].get(slot) for t in trees.values()], paths
                )
                for slot in slots
            }
            for identity, slots in first["state"].items()
        }
        models = _trees("model", folder, files)
        weights = {}
        if models:
            kept = list(models)
            named = {path: member({"model": tree}, "model", dict, path) for path, tree in models.items()}
            for name in named[kept[0]]:
                value = _whole(str(name), [tree.get(name) for tree in named.values()], kept)
                if isinstance(value, Tensor):
                    weights[str(name)] = value
        tree = {"state": state, "param_groups": first["param_groups"]}
        result = from_state_dict(tree, origin={"format": NAME, "ranks": len(paths)}, resources=(files,))
        shapes = [tensor.shape for tensor in weights.values()]
        if len(result.groups) == 1 and all(
            a in (None, b) for a, b in zip_longest(result.shapes(), shapes, fillvalue=())
        ):
            # One group over all of the model's parameters, which the model's files list in the same order.
            name_of = dict(zip(result.ids, weights, strict=True))
            result = replace(
                result,
                ids=tuple(name_of.values()),
                entries={name_of[identity]: entry for identity, entry in result.entries.items()},
            )
        return Checkpoint(keyed.named(result, weights=weights), weights)


def _trees(kind: str, folder: Path, files: Files) -> dict[Path, Any]:
    """Return what the files of a kind hold, in the order of their ranks."""
    found: dict[int, dict[int, Path]] = {}
    for file in folder.iterdir():
        if (match := _FILE.fullmatch(file.name)) and match[1] == kind:
            found.setdefault(int(match[2]), {})[int(match[3])] = file
    if len(found) > 1:
        raise FileError(f"has files of runs with {' and '.join(map(str, sorted(found)))} ranks", path=folder)
    for world, ranks in found.items():
        for rank in range(world):
            if rank not in ranks:
                raise FileError(
                    f"missing: there were {world} ranks", path=folder / f"{kind}_world_size_{world}_rank_{rank}.pt"
                )
        return {ranks[rank]: pickles.load(files[ranks[rank]], ranks[rank]).value for rank in range(world)}
    return {}


def _whole(what: str, parts: Sequence[Any], paths: Sequence[Path]) -> Any:
    """Return a value out of what the ranks have of it: a tensor of all parts, or the first rank's."""
    if not isinstance(parts[0], Record) or parts[0].name != "DTensor":
        if isinstance(parts[0], Tensor) and not parts[0].shape:
            for part, path in zip(parts, paths, strict=True):
                if not isinstance(part, Tensor) or bytes(part.bytes()) != bytes(parts[0].bytes()):
                    raise FileError(f"{what} is not what {paths[0].name} has: files of different steps", path=path)
        return parts[0]
    boxes: dict[Box, Tensor] = {}
    whole = dtype = None
    for part, path in zip(parts, paths, strict=True):
        local, shape, box = _placed(what, part, path)
        if (whole, dtype) not in ((None, None), (shape, local.dtype)):
            raise FileError(f"{what} has another shape or type than in {paths[0].name}", path=path)
        whole, dtype = shape, local.dtype
        if local.count:
            boxes.setdefault(box, local)
    assert whole is not None
    assert dtype is not None
    result = Tensor(dtype, whole, tuple(Piece(local, 0, box) for box, local in boxes.items()))
    try:
        result.runs  # noqa: B018
    except FileError as error:
        raise FileError(
            f"{what}: the ranks' files do not make up {list(whole)} ({error.detail}): one is a copy of another, or of "
            "another save",
            path=paths[0].parent,
        ) from None
    return result


def _placed(what: str, part: Any, path: Path) -> tuple[Tensor, tuple[int, ...], Box]:
    """Return a rank's part of a tensor, the whole's shape, and where the part lies."""
    inner = (
        part.state[1] if isinstance(part, Record) and isinstance(part.state, tuple) and len(part.state) == 2 else None
    )
    local = member(inner, "_local_tensor", Tensor, path)
    stated = member(inner, "_spec", Record, path).state
    spec = member(stated, "placements", tuple, path)
    shape = member(member(stated, "tensor_meta", Record, path).args, 0, tuple, path)
    mesh = member(stated, "mesh", Record, path).state
    sizes, place = _mesh(mesh, path)
    start, extent = [0] * len(shape), list(shape)
    for placement, size, coordinate in zip(spec, sizes, place, strict=True):
        if placement.name == "Replicate":
            continue
        axis = placement.state.get("dim") if placement.name == "Shard" and isinstance(placement.state, dict) else None
        if type(axis) is not int or not 0 <= axis < len(shape) or extent[axis] != shape[axis]:
            raise RefusedError(
                f"{what} lies on its mesh as {[p.name for p in spec]}, where axes that are cut once, and replicas, are "
                "read: save it with torch.distributed.checkpoint",
                path=path,
            )
        share = -(-shape[axis] // size)
        start[axis] = min(coordinate * share, shape[axis])
        extent[axis] = min(share, shape[axis] - start[axis])
    if tuple(extent) != local.shape:
        raise FileError(f"{what} has the shape {list(local.shape)}, where its mesh says {extent}", path=path)
    return local, tuple(shape), Box(tuple(start), tuple(extent))


def _mesh(mesh: Any, path: Path) -> tuple[list[int], list[int]]:
    """Return how many ranks stand along each axis of a mesh, and where this rank stands."""
    place = mesh.get("_coordinate_on_dim") if isinstance(mesh, dict) else None
    ranks = next((mesh[key] for key in ("_mesh", "mesh", "_rank_map") if isinstance(mesh.get(key), Tensor)), None)
    if not isinstance(place, (list, tuple)) or not all(type(n) is int for n in place) or ranks is None:
        raise RefusedError("a DeviceMesh that is not read: save it with torch.distributed.checkpoint", path=path)
    sizes = list(ranks.shape)
    layout = mesh.get("_layout")
    if isinstance(layout, Record) and isinstance(layout.state, dict):
        sizes = [_axis_size(axis, path) for axis in member(layout.state, "axes", (tuple, list), path)]
    if len(sizes) != len(place) or not all(0 <= n < size for n, size in zip(place, sizes, strict=True)):
        raise FileError(f"a DeviceMesh of {sizes} with this rank at {list(place)}", path=path)
    return sizes, list(place)


def _axis_size(axis: Any, path: Path) -> int:
    """Return how many ranks stand along an axis of a mesh, as torch describes it since 2.13."""
    shape = member(axis.state if isinstance(axis, Record) else None, "shape", tuple, path)
    if not all(type(n) is int for n in shape):
        raise RefusedError("a DeviceMesh that is not read: save it with torch.distributed.checkpoint", path=path)
    return prod(shape)
