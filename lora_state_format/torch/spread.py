"""Tensors whose elements are spread over the ranks, and which rank holds which.

Of every tensor each rank holds some elements: a box (DTensor), or a run in C order (FSDP1, ZeRO).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from operator import mul
from typing import Any, Final, NamedTuple, Protocol, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from lora_state_format.errors import CaptureError
from lora_state_format.model.tensors import CHUNK, Box, Flat, Tensor, c_strides, contiguous, is_tiling
from lora_state_format.optimizers.rounded import Rounded
from lora_state_format.torch.tensors import Copies, dtype_name

__all__ = [
    "Holders",
    "Holding",
    "Kind",
    "Spread",
    "Where",
    "box_of",
    "holders_of",
    "holding_of",
    "run",
    "spread",
    "spread_of",
]

Where: TypeAlias = "Box | Flat | None"
"""The elements of a tensor that a rank holds."""

Kind: TypeAlias = tuple[str, tuple[int, ...]]
"""What decides who holds which elements: ``Spread.kind``, and the shape of the whole tensor."""


class Incoming(Protocol):
    """Where the bytes of tensors arrive that are spread over the ranks."""

    def find(self, spread: Spread, offset: int) -> memoryview:
        """Return the bytes of a tensor from ``offset`` on, as far as they stand in one piece."""
        ...


class Spread:
    """The bytes of a tensor whose elements are spread over the ranks; to be read once, in order, inside ``gather``.

    Attributes:
        shape: The shape of the whole tensor.
        width: Bytes per element.
        kind: What decides which rank holds which elements, as text; the same on every rank.
        where: The elements that this rank holds.
        local: Those elements, in C order, on any device; ``None`` where ``where`` is.
    """

    crc32 = None

    def __init__(self, shape: tuple[int, ...], width: int, kind: str, where: Where, local: torch.Tensor | None) -> None:
        self.shape = shape
        self.width = width
        self.kind = kind
        self.where = where
        self.local = local
        self.size = math.prod(shape) * width
        self.incoming: Incoming | None = None

    def readinto(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``offset`` on, when they have arrived."""
        while len(out):
            found = self._arrived().find(self, offset)
            count = min(len(found), len(out))
            out[:count] = found[:count]
            out, offset = out[count:], offset + count

    def view(self, offset: int, size: int) -> memoryview | None:
        """Return the same bytes without a copy, as far as they have arrived in one piece."""
        found = self._arrived().find(self, offset)
        return found[:size] if len(found) >= size else None

    def _arrived(self) -> Incoming:
        if self.incoming is None:
            raise CaptureError("the model is sharded: call save_optimizer on every rank")
        return self.incoming

    @cached_property
    def bytes_of_local(self) -> torch.Tensor:
        """The local elements as bytes: the last axis is ``width`` times as long."""
        assert self.local is not None
        return self.local.contiguous().view(torch.uint8)

    def some_of_local(self, offset: int, size: int) -> memoryview:
        """Return ``size`` of those bytes in C order, or fewer: at most a chunk, which of a device is copied."""
        flat = self.bytes_of_local.reshape(-1)
        found: memoryview = flat[offset : offset + min(size, CHUNK)].cpu().numpy().data
        return found


def spread(tensor: DTensor, copies: Copies | None = None) -> Tensor:
    """Return a DTensor as the places of all its bytes, which can be read inside ``gather``.

    Args:
        tensor: Of one or more dimensions.
        copies: Where this rank's part is to be kept as it is now.

    Raises:
        CaptureError: For a placement that gives a rank elements that are not a box, and for partial sums.
    """
    dtype = dtype_name(tensor.dtype)
    assert dtype is not None
    kind, where = _layout_of(tensor)
    local = tensor.to_local().detach() if where else None
    if local is not None and copies:
        local = copies.of(local)
    source = Spread(tuple(tensor.shape), tensor.element_size(), kind, where, local)
    return contiguous(dtype, source.shape, source)


def run(name: str, shape: tuple[int, ...], start: int, local: torch.Tensor, copies: Copies | None = None) -> Tensor:
    """Return a tensor of which each rank has a run of elements in C order, as ``spread`` does.

    Args:
        name: What the run belongs to; tensors of one name are cut alike.
        shape: Of the whole tensor, with one axis or more.
        start: The first element that this rank has.
        local: The elements from there on; none are allowed.
        copies: Where they are to be kept as they are now.
    """
    dtype = dtype_name(local.dtype)
    assert dtype is not None
    local = copies.of(local) if copies else local.detach()
    where = Flat(start, local.numel()) if local.numel() else None
    return contiguous(dtype, shape, Spread(shape, local.element_size(), f"runs of {name}", where, local.reshape(-1)))


_LAYOUTS: Final[WeakKeyDictionary[DeviceMesh, dict[Any, tuple[str, Box | None]]]] = WeakKeyDictionary()


def _layout_of(tensor: DTensor) -> tuple[str, Box | None]:
    """Return the kind of a DTensor, and what ``box_of`` returns, which takes torch 0.1 ms to find out."""
    mesh = tensor.device_mesh
    known, key = _LAYOUTS.setdefault(mesh, {}), (tensor.placements, tensor.shape)
    if key not in known:
        known[key] = f"{tensor.placements} on {tuple(mesh.shape)} {mesh.mesh_dim_names}", box_of(tensor)
    return known[key]


def box_of(tensor: DTensor) -> Box | None:
    """Return the elements of a DTensor that this rank holds; ``None`` if it holds none.

    Raises:
        CaptureError: If they are no box: two ways to shard one axis, with sizes that do not divide.
    """
    if any(placement.is_partial() for placement in tensor.placements):
        raise CaptureError(f"a DTensor with placements {tensor.placements}: partial sums have no state to save")
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
    if len(box.start) != tensor.dim() or 0 in box.shape:  # the first: this rank is not in the mesh
        return None
    for axis in {p.dim for p in tensor.placements if isinstance(p, _StridedShard)}:
        _check_run(tensor, axis, box)
    return box


def _check_run(tensor: DTensor, axis: int, box: Box) -> None:
    """Raise ``CaptureError`` unless the indices that this rank has along an axis follow one another."""

    def along(placement: Any) -> Any:
        if getattr(placement, "dim", None) != axis:
            return Replicate()
        return (
            _StridedShard(0, split_factor=placement.split_factor) if isinstance(placement, _StridedShard) else Shard(0)
        )

    whole = torch.arange(tensor.shape[axis], device=tensor.device_mesh.device_type)
    placements = [along(placement) for placement in tensor.placements]
    own = distribute_tensor(whole, tensor.device_mesh, placements, src_data_rank=None).to_local().tolist()
    first = box.start[axis]
    if own != list(range(first, first + box.shape[axis])):
        raise CaptureError(
            f"a DTensor of shape {list(tensor.shape)} with placements {tensor.placements} on a mesh of "
            f"{list(tensor.device_mesh.shape)}: the rows of a rank do not follow one another along axis {axis}; shard "
            "this parameter along one dimension of the mesh only"
        )


def spread_of(tensor: Tensor) -> Spread | None:
    """Return what a tensor's bytes are spread over the ranks as, rounded ones too; ``None`` if they are not."""
    source = tensor.pieces[0].source if tensor.pieces and tensor.size else None
    if isinstance(source, Rounded):
        return spread_of(source.tensor)
    return source if isinstance(source, Spread) else None


# --- who holds what -------------------------------------------------------------------------------------------------


class Holders:
    """Which rank holds which elements of the tensors of one kind and shape."""

    def __init__(self, wheres: Sequence[Where]) -> None:
        self.wheres = wheres
        self._ranks: dict[Box | Flat, list[int]] = {}
        for rank, where in enumerate(wheres):
            if where is not None:
                self._ranks.setdefault(where, []).append(rank)

    def sends(self, rank: int, receiver: int) -> bool:
        """Whether it is this rank that sends its elements to ``receiver``: the nearest of those that hold them."""
        where = self.wheres[rank]
        return where is not None and _nearest(self._ranks[where], receiver) == rank

    def run(self, rank: int, spread: Spread) -> tuple[int, int]:
        """Return the first byte and the end of what a rank holds of a tensor, where it is one run; else nothing."""
        where, width = self.wheres[rank], spread.width
        if isinstance(where, Flat):
            return where.start * width, (where.start + where.count) * width
        if where is None:
            return 0, 0
        axis = next((axis for axis, size in enumerate(where.shape) if size > 1), 0)  # the first that steps
        if where.shape[axis + 1 :] != spread.shape[axis + 1 :]:
            return 0, 0
        first = sum(map(mul, where.start, c_strides(spread.shape))) * width
        return first, first + math.prod(where.shape) * width

    def senders(self, receiver: int) -> list[int]:
        """Return the ranks from which a receiver gets all elements."""
        return sorted(_nearest(ranks, receiver) for ranks in self._ranks.values())

    def check(self, spread: Spread) -> None:
        """Raise ``CaptureError`` unless the ranks hold every element of a tensor, and none of them two ways."""
        boxes = [where for where in self._ranks if isinstance(where, Box)]
        flats = sorted((where.start, where.count) for where in self._ranks if isinstance(where, Flat))
        end = 0
        for start, count in flats:
            end = end + count if start == end else -1
        whole = is_tiling(boxes, spread.shape) if not flats else not boxes and end == math.prod(spread.shape)
        if not whole:
            raise CaptureError(
                f"the ranks do not hold every element of a tensor of shape {list(spread.shape)} once ({spread.kind}): "
                "their models or optimizers differ, or some ranks have no state of it"
            )


def _nearest(ranks: Sequence[int], rank: int) -> int:
    place = bisect_left(ranks, rank)
    return min(ranks[max(place - 1, 0) : place + 1], key=lambda other: abs(other - rank))


class Holding(NamedTuple):
    """What a rank holds of each kind and shape of tensor: some tens in a model of any size."""

    kinds: list[Kind]
    wheres: list[Where]


def holding_of(spreads: Sequence[Spread]) -> Holding:
    """Return what this rank holds of some tensors, which are the same on every rank."""
    wheres = {(spread.kind, spread.shape): spread.where for spread in spreads}
    return Holding(list(wheres), list(wheres.values()))


def holders_of(spreads: Sequence[Spread], told: Sequence[Holding], rank: int) -> dict[Kind, Holders]:
    """Return who holds what of some tensors.

    Args:
        spreads: The tensors; the same on every rank.
        told: What each rank holds.
        rank: The number of this one.

    Raises:
        CaptureError: If the ranks do not hold every element of a tensor once.
    """
    kinds = told[rank].kinds
    for other, holding in enumerate(told):
        if holding.kinds != kinds:
            raise CaptureError(f"rank {other} shards its tensors in another way than rank {rank}")
    holders = {kind: Holders([holding.wheres[number] for holding in told]) for number, kind in enumerate(kinds)}
    for spread in {(spread.kind, spread.shape): spread for spread in spreads}.values():
        holders[spread.kind, spread.shape].check(spread)
    return holders
