"""Tensors that a mesh of ranks shares, as torch pickles them (``DTensor``): one rank's part, and where it belongs.

The layout is that of ``torch/distributed/tensor/_api.py`` and ``placement_types.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from lora_state_format.errors import FileError, RefusedError
from lora_state_format.foreign.pickles import Record
from lora_state_format.foreign.trees import member
from lora_state_format.model.sources import Unread
from lora_state_format.model.tensors import Box, Piece, Tensor, contiguous

__all__ = ["is_dtensor", "joined", "tensors", "unread", "whole"]


def is_dtensor(value: Any) -> bool:
    """Return whether a value of a pickle is a ``DTensor``."""
    return isinstance(value, Record) and value.name == "DTensor"


def unread(value: Any, path: Path, folder: Path) -> Any:
    """Return a tensor of the whole's shape, by one rank's part, which cannot be read; other values as they are.

    ``path`` is the rank's file, ``folder`` what messages say was only looked at.
    """
    if not is_dtensor(value):
        return value
    local, _, shape = _parts(value, path)
    return contiguous(local.dtype, shape, Unread(folder))


def joined(trees: Sequence[Mapping[str, Any]], paths: Sequence[Path]) -> dict[str, Any]:
    """Return an optimizer's state dict out of those of all ranks, which lie in ``paths``. Raises as ``whole`` does."""
    first = trees[0]
    for path, tree in zip(paths, trees, strict=True):
        if tree["param_groups"] != first["param_groups"] or tree["state"].keys() != first["state"].keys():
            raise FileError(f"has other groups or parameters than {paths[0].name}: of another save", path=path)
    state = {
        identity: {
            slot: whole(f"{slot} of parameter {identity}", [tree["state"][identity].get(slot) for tree in trees], paths)
            for slot in slots
        }
        for identity, slots in first["state"].items()
    }
    return {"state": state, "param_groups": first["param_groups"]}


def tensors(trees: Sequence[Mapping[Any, Any]], paths: Sequence[Path]) -> dict[str, Tensor]:
    """Return a model's tensors out of the state dicts of all ranks. Raises as ``whole`` does."""
    found = {
        str(name): whole(str(name), [tree.get(name) for tree in trees], paths) for name in (trees[0] if trees else ())
    }
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def whole(what: str, parts: Sequence[Any], paths: Sequence[Path]) -> Any:
    """Return a value out of what the ranks have of it: a tensor of all parts, or the first rank's.

    Args:
        what: what messages call it.
        parts: what each rank has.
        paths: the ranks' files.

    Raises:
        FileError: the parts do not make up the whole, or are of different steps.
        RefusedError: they lie on their mesh in a way that is not read.
    """
    if not is_dtensor(parts[0]):
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
    local, stated, shape = _parts(part, path)
    spec = member(stated, "placements", tuple, path)
    mesh = member(stated, "mesh", Record, path).state
    sizes, place = _mesh(mesh, path)
    start, extent = [0] * len(shape), list(shape)
    cuts = _cuts(spec, sizes, place, len(shape))
    if cuts is None:
        raise RefusedError(
            f"{what} lies on its mesh as {[p.name for p in spec]}, where shards and replicas are read: save it with "
            "torch.distributed.checkpoint",
            path=path,
        )
    for axis, size, coordinate in cuts:
        share = -(-extent[axis] // size)
        skipped = min(coordinate * share, extent[axis])
        start[axis] += skipped
        extent[axis] = min(share, extent[axis] - skipped)
    if tuple(extent) != local.shape:
        raise FileError(f"{what} has the shape {list(local.shape)}, where its mesh says {extent}", path=path)
    return local, shape, Box(tuple(start), tuple(extent))


def _parts(part: Any, path: Path) -> tuple[Tensor, Any, tuple[int, ...]]:
    """Return a rank's own elements, how all of them lie, and the shape of the whole."""
    inner = (
        part.state[1] if isinstance(part, Record) and isinstance(part.state, tuple) and len(part.state) == 2 else None
    )
    local = member(inner, "_local_tensor", Tensor, path)
    stated = member(inner, "_spec", Record, path).state
    shape = member(member(stated, "tensor_meta", Record, path).args, 0, tuple, path)
    return local, stated, tuple(shape)


def _cuts(
    placements: Sequence[Any], sizes: Sequence[int], place: Sequence[int], axes: int
) -> list[tuple[int, int, int]] | None:
    """Return how a tensor is cut, one cut within the other: axis, ranks along it, and the place of this rank.

    What is cut by several axes of the mesh is cut by them in turn, but for ``_StridedShard``, as FSDP2 has it over
    tensor parallelism: it cuts what those behind it left. ``None`` for a placement of another kind.
    """
    found: list[tuple[int, int, int]] = []
    later: list[tuple[int, int, int]] = []
    for placement, size, coordinate in reversed(list(zip(placements, sizes, place, strict=True))):
        if placement.name == "Replicate":
            continue
        stated = placement.state if isinstance(placement.state, dict) else {}
        axis = stated.get("dim")
        if placement.name not in ("Shard", "_StridedShard") or type(axis) is not int or not 0 <= axis < axes:
            return None
        cut = (axis, size, coordinate)
        same = prod(ranks for other, ranks, _ in (*found, *later) if other == axis)
        if placement.name == "Shard":
            found.insert(0, cut)
        elif stated.get("split_factor") == same:
            later.append(cut)
        else:
            return None
    return [*found, *later]


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
