"""Tensors as the places of their bytes: boxes and runs of files, read on request."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from lora_state_format.errors import FileError
from lora_state_format.model.dtypes import BITS, DTYPES, item_size
from lora_state_format.model.sources import Source

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "CHUNK",
    "Box",
    "Digest",
    "Flat",
    "Piece",
    "Run",
    "Tensor",
    "boxes_between",
    "contiguous",
    "intersection",
    "is_tiling",
    "joined",
    "memory_order",
]

CHUNK: Final = 1 << 20
"""Bytes moved at a time."""

GATHER_SPAN: Final = 1 << 24
"""Bytes of a source, and of the tensor, that gathering a strided tensor may hold at a time."""

GATHER_RUN: Final = 256
"""Runs of so many bytes are read one by one; shorter ones together with the bytes between them."""

MAX_CUT_AXES: Final = 4
"""Axes along which the boxes of one tensor may be cut; a mesh of devices cuts one or two."""

MAX_CORNERS: Final = 1 << 20
"""Corners of all boxes of one tensor, 2 to the power of the axes that are cut for each: of 262,144 boxes in a plane."""


class Box(NamedTuple):
    """The part of a tensor that a piece holds: the elements from ``start`` on, ``shape`` of them along each axis."""

    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Flat:
    """The part of a tensor that a piece holds: ``count`` elements from ``start`` on, in C order. It may cut a row."""

    start: int
    count: int


class Piece(NamedTuple):
    """Elements of a tensor and where their bytes are.

    ``offset`` is in bytes from the start of ``source``. ``strides`` is in elements, one per axis, for a ``Box``;
    ``None`` means C order without gaps, which is the only layout a ``Flat`` piece has.
    """

    source: Source
    offset: int
    where: Box | Flat
    strides: tuple[int, ...] | None = None


class Run(NamedTuple):
    """``size`` bytes of a source, from ``offset`` on."""

    source: Source
    offset: int
    size: int


class Digest(NamedTuple):
    """A checksum of a tensor's little-endian C-order bytes. ``dtype`` says of which type those bytes were."""

    algorithm: str
    dtype: str
    hex: str


@dataclass(frozen=True, eq=False, repr=False)
class Tensor:
    """A tensor as the places of its bytes, which are read on request.

    ``dtype`` is spelled as in safetensors. The pieces cover every element exactly once. ``digest`` is the checksum that
    the file states, if any. A tensor is itself a ``Source``: of its little-endian bytes in C order.

    ``tensor[2:4, :8]`` is a part, still unread; ``np.asarray(tensor)``, ``numpy()`` and ``torch()`` read.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    digest: Digest | None = None
    crc32 = None

    def __repr__(self) -> str:
        return f"Tensor({self.dtype}, {list(self.shape)})"

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        """Return a part as a tensor of its own; nothing is read.

        Args:
            index: A slice for each of the first axes, without a step. The number of axes stays: ``tensor[2:3]``.
        """
        slices = index if isinstance(index, tuple) else (index,)
        if len(slices) > len(self.shape) or not all(isinstance(item, slice) for item in slices):
            raise TypeError(f"{index!r}: a tensor of shape {list(self.shape)} takes up to {len(self.shape)} slices")
        ranges = [item.indices(size) for item, size in zip(slices, self.shape, strict=False)]
        if any(step != 1 for _, _, step in ranges):
            raise ValueError(f"{index!r}: a slice of a tensor has no step")
        rest = self.shape[len(slices) :]
        start = [first for first, _, _ in ranges] + [0] * len(rest)
        return self.part(start, [max(last - first, 0) for first, last, _ in ranges] + list(rest))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if copy is False:
            raise ValueError("a tensor's bytes are read from its file: an array of them is always a copy")
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * BITS[self.dtype] // 8

    @property
    def runs(self) -> tuple[Run, ...] | None:
        """The tensor's bytes as runs of sources, in C order; ``None`` where elements have to be gathered.

        Of a source that is a tensor itself, they are its runs: what their sources state of their bytes can be checked.
        Raises ``FileError`` if the pieces do not cover every element exactly once.
        """
        if len(self.pieces) == 1 and _is_whole(self.pieces[0], self.shape):  # kept, it would cost a dict for each
            size, source = self.size, self.pieces[0].source
            if not isinstance(source, Tensor):
                return (Run(source, self.pieces[0].offset, size),) if size else ()
        return self._runs

    @cached_property
    def _runs(self) -> tuple[Run, ...] | None:
        extents = [(*_extent(piece, self.shape), piece) for piece in self.pieces]
        covered = sum(count for _, count, _ in extents)
        if covered != self.count:
            raise FileError(f"pieces with {covered} elements for a tensor of shape {list(self.shape)}")
        if any(start is None for start, _, _ in extents):
            _check_disjoint(self)
            return None
        runs: list[Run] = []
        end = 0
        for start, count, piece in sorted(extents, key=lambda extent: extent[0]):
            if count == 0:
                continue
            if start != end:
                raise FileError(f"pieces of a tensor of shape {list(self.shape)} that do not meet at element {end}")
            if count * BITS[self.dtype] % 8:
                raise FileError(f"a piece of {count} elements of {self.dtype}, which are not whole bytes")
            runs.extend(_leaf_runs(piece.source, piece.offset, count * BITS[self.dtype] // 8))
            end = start + count
        return tuple(runs)

    def readinto(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` (format ``B``) with the bytes from ``offset`` on."""
        if offset < 0 or offset + len(out) > self.size:
            raise ValueError(f"bytes {offset} to {offset + len(out)} of a tensor that has {self.size}")
        if self.runs is not None:
            self._read_runs(offset, out)
            return
        width = item_size(self.dtype)
        first, last = offset // width, -(-(offset + len(out)) // width)
        if (first * width, last * width) != (offset, offset + len(out)):
            whole = memoryview(bytearray((last - first) * width))
            _fill(self, first, last, whole)
            out[:] = whole[offset - first * width :][: len(out)]
        else:
            _fill(self, first, last, out)

    def _read_runs(self, offset: int, out: memoryview) -> None:
        assert self.runs is not None
        index = bisect_right(self._run_ends, offset)
        while len(out):
            run = self.runs[index]
            within = offset - (self._run_ends[index] - run.size)
            size = min(run.size - within, len(out))
            run.source.readinto(run.offset + within, out[:size])
            out, offset, index = out[size:], offset + size, index + 1

    @cached_property
    def _sorted(self) -> list[_Sorted]:
        """The pieces, which are boxes, in order along each axis of the tensor that they cut."""
        boxes = [piece.where for piece in self.pieces if isinstance(piece.where, Box)]
        return [_sort(self.pieces, axis) for axis in _cut_axes(boxes, self.shape)]

    @cached_property
    def _run_ends(self) -> list[int]:
        return list(accumulate(run.size for run in self.runs or ()))

    def view(self, offset: int, size: int) -> memoryview | None:
        """Return bytes without a copy, where they are one run in memory."""
        if self.runs is not None and len(self.runs) == 1:
            return self.runs[0].source.view(self.runs[0].offset + offset, size)
        return None

    def chunks(self, buffer: memoryview | None = None) -> Iterator[memoryview]:
        """Yield all bytes in order. A chunk is valid until the next one is asked for; a given ``buffer`` is reused."""
        if buffer is None:
            buffer = memoryview(bytearray(min(CHUNK, self.size)))
        if self._scattered and self.size > len(buffer) > 0:
            yield from self._blocks(len(buffer))
            return
        for offset in range(0, self.size, max(len(buffer), 1)):
            size = min(len(buffer), self.size - offset)
            chunk = self.view(offset, size)
            if chunk is None:
                chunk = buffer[:size]
                self.readinto(offset, chunk)
            yield chunk

    @property
    def _scattered(self) -> bool:
        """Whether neighbouring elements are far apart in its source, as in a transpose."""
        width = item_size(self.dtype)
        boxes = ((p.where, p.strides) for p in self.pieces if isinstance(p.where, Box) and p.strides is not None)
        return any(_run(where.shape, strides) * width < GATHER_RUN for where, strides in boxes)

    def _blocks(self, size: int) -> Iterator[memoryview]:
        """Yield all bytes in chunks of ``size``, cut from larger blocks: gathering costs the same for less."""
        block = memoryview(bytearray(min(GATHER_SPAN, self.size)))
        for start in range(0, self.size, len(block)):
            part = block[: self.size - start]
            self.readinto(start, part)
            yield from (part[offset : offset + size] for offset in range(0, len(part), size))

    def bytes(self) -> bytearray:
        """Return all bytes at once."""
        buffer = bytearray(self.size)
        self.readinto(0, memoryview(buffer))
        return buffer

    def boxed(self) -> Tensor:
        """Return the same tensor as boxes: flat pieces are hidden behind one source that reads them."""
        if all(isinstance(piece.where, Box) for piece in self.pieces):
            return self
        return contiguous(self.dtype, self.shape, self, 0)

    def permute(self, axes: Sequence[int]) -> Tensor:
        """Return the tensor with its axes in another order; bytes are gathered when they are read.

        Raises ``TypeError`` for a dtype that is smaller than a byte.
        """
        if sorted(axes) != list(range(len(self.shape))):
            raise ValueError(f"axes {tuple(axes)} of a tensor with {len(self.shape)}")
        if list(axes) == list(range(len(self.shape))):
            return self
        self._check_whole_bytes()

        def pick(values: Sequence[int]) -> tuple[int, ...]:
            return tuple(values[axis] for axis in axes)

        pieces = []
        for piece in self.boxed().pieces:
            assert isinstance(piece.where, Box)
            strides = piece.strides or c_strides(piece.where.shape)
            pieces.append(
                Piece(piece.source, piece.offset, Box(pick(piece.where.start), pick(piece.where.shape)), pick(strides))
            )
        return Tensor(self.dtype, pick(self.shape), tuple(pieces))

    def part(self, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return the box of ``shape`` elements from ``start`` on, as a tensor of its own; nothing is read.

        Raises ``TypeError`` for a dtype that is smaller than a byte, unless the box is the whole tensor.
        """
        if len(start) != len(self.shape) or len(shape) != len(self.shape):
            raise ValueError(f"a box of {len(shape)} axes in a tensor of {len(self.shape)}")
        if any(not 0 <= s <= s + n <= d for s, n, d in zip(start, shape, self.shape, strict=True)):
            raise ValueError(f"box {tuple(shape)} at {tuple(start)} of a tensor of shape {self.shape}")
        if tuple(shape) == self.shape:
            return self
        self._check_whole_bytes()
        target = Box(tuple(start), tuple(shape))
        pieces = []
        for piece in self.boxed().pieces:
            assert isinstance(piece.where, Box)
            common = intersection(piece.where, target)
            if common is None:
                continue
            strides = piece.strides or c_strides(piece.where.shape)
            skipped = sum((c - p) * s for c, p, s in zip(common.start, piece.where.start, strides, strict=True))
            moved = Box(tuple(c - t for c, t in zip(common.start, target.start, strict=True)), common.shape)
            dense = _drop_units(common.shape, strides) == _drop_units(common.shape, c_strides(common.shape))
            offset = piece.offset + skipped * item_size(self.dtype)
            pieces.append(Piece(piece.source, offset, moved, None if dense else strides))
        return Tensor(self.dtype, target.shape, tuple(pieces))

    def _check_whole_bytes(self) -> None:
        if BITS[self.dtype] % 8:
            raise TypeError(f"elements of {self.dtype} are smaller than a byte: such a tensor is taken whole")

    def read(self, slices: Sequence[slice]) -> bytearray:
        """Return the bytes of a part, in C order; only what the part needs is read. See ``__getitem__``."""
        return self[tuple(slices)].bytes()

    def numpy(self) -> np.ndarray[Any, Any]:
        """Return a NumPy array of its own. NumPy has no bfloat16 and no 8-bit floats: those raise ``TypeError``."""
        import numpy as np

        kind = DTYPES[self.dtype].numpy
        if kind is None:
            raise TypeError(f"NumPy has no {self.dtype}; use .bytes(), or .torch()")
        return np.frombuffer(self.bytes(), dtype=kind).reshape(self.shape)

    def torch(self) -> Any:
        """Return a ``torch.Tensor`` of its own, on the CPU. Needs torch."""
        from lora_state_format.torch.tensors import to_torch

        return to_torch(self)


def contiguous(
    dtype: str, shape: Sequence[int], source: Source, offset: int = 0, digest: Digest | None = None
) -> Tensor:
    """Return a tensor whose bytes lie in one run, in C order, from ``offset`` on."""
    shape = tuple(shape)
    return Tensor(dtype, shape, (Piece(source, offset, Box((0,) * len(shape), shape)),), digest)


def joined(tensors: Sequence[Tensor], axis: int = 0, *, parts: int = 1) -> Tensor:
    """Return tensors joined along an axis; nothing is read.

    Args:
        tensors: One or more, alike but for their sizes along the axis.
        axis: Its number.
        parts: How many equal matrices each of them holds along it: first come all first ones, then all second ones.
    """
    first = tensors[0]
    sizes = [tensor.shape[axis] // parts for tensor in tensors]
    pieces, position = [], 0
    for part in range(parts):
        for tensor, size in zip(tensors, sizes, strict=True):
            extent = (*first.shape[:axis], size, *first.shape[axis + 1 :])
            start, to = (tuple(at * (a == axis) for a in range(len(extent))) for at in (part * size, position))
            if math.prod(extent):
                pieces.append(Piece(tensor.part(start, extent), 0, Box(to, extent)))
            position += size
    whole = (*first.shape[:axis], sum(tensor.shape[axis] for tensor in tensors), *first.shape[axis + 1 :])
    return Tensor(first.dtype, whole, tuple(pieces))


def c_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return elements to step along each axis of a C-order tensor without gaps."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(shape[axis + 1], 1)
    return tuple(strides)


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the axes of a tensor from the slowest to the fastest in its source; ``None`` for C order.

    Axes of one element come first. Gaps between elements, as where it is a part of a larger tensor, do not count.
    """
    strides = tensor.pieces[0].strides if len(tensor.pieces) == 1 else None
    if strides is None or 0 in tensor.shape:
        return None
    sized = [axis for axis, size in enumerate(tensor.shape) if size > 1]
    units = [axis for axis, size in enumerate(tensor.shape) if size == 1]
    moving = sorted(sized, key=lambda axis: -strides[axis])
    return None if moving == sized else (*units, *moving)


def _drop_units(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Return the strides of axes with more than one element; the others are never stepped along."""
    return [stride for size, stride in zip(shape, strides, strict=True) if size != 1]


def intersection(a: Box, b: Box) -> Box | None:
    """Return what two boxes share; ``None`` if that is no element."""
    start = tuple(max(x, y) for x, y in zip(a.start, b.start, strict=True))
    stop = tuple(min(x + m, y + n) for x, m, y, n in zip(a.start, a.shape, b.start, b.shape, strict=True))
    if any(x >= y for x, y in zip(start, stop, strict=True)):
        return None
    return Box(start, tuple(y - x for x, y in zip(start, stop, strict=True)))


def _leaf_runs(source: Source, offset: int, size: int) -> Iterator[Run]:
    """Yield the runs of a range of a source: those of its own sources, where it is a tensor that has runs."""
    runs = source.runs if isinstance(source, Tensor) else None
    if runs is None:
        if size:
            yield Run(source, offset, size)
        return
    position = 0
    for run in runs:
        low, high = max(offset, position), min(offset + size, position + run.size)
        if low < high:
            yield Run(run.source, run.offset + low - position, high - low)
        position += run.size


def _is_whole(piece: Piece, shape: tuple[int, ...]) -> bool:
    """Return whether a piece is all of a tensor, in C order."""
    where = piece.where
    return (
        isinstance(where, Box) and piece.strides is None and where.shape == shape and where.start == (0,) * len(shape)
    )


def _extent(piece: Piece, shape: tuple[int, ...]) -> tuple[Any, int]:
    """Return the first element and the number of elements of a piece; ``None`` for the first if it is not one run.

    Raises ``FileError`` for a piece that is not inside the tensor.
    """
    where, strides = piece.where, piece.strides
    if isinstance(where, Flat):
        if where.start < 0 or where.count < 0:
            raise FileError(f"a piece of {where.count} elements from {where.start} on")
        return where.start, where.count
    inside = len(where.start) == len(where.shape) == len(shape) and all(
        0 <= start <= start + size <= whole for start, size, whole in zip(where.start, where.shape, shape, strict=True)
    )
    if not inside or (strides is not None and (len(strides) != len(shape) or min(strides, default=0) < 0)):
        raise FileError(f"{where} with strides {strides} in a tensor of shape {list(shape)}")
    count = math.prod(where.shape)
    first = next((axis for axis, size in enumerate(where.shape) if size != 1), len(shape))
    dense = strides is None or _drop_units(where.shape, strides) == _drop_units(where.shape, c_strides(where.shape))
    if count and not (dense and where.shape[first + 1 :] == shape[first + 1 :]):
        return None, count
    return sum(start * stride for start, stride in zip(where.start, c_strides(shape), strict=True)), count


def is_tiling(boxes: Sequence[Box], shape: tuple[int, ...]) -> bool:
    """Return whether boxes inside a tensor of this shape have each of its elements exactly once, in linear time.

    They do if and only if their indicator functions add up to the whole's. So do then the differences along all axes,
    which are not zero at a box's corners alone, with signs in turn: the corners of all have to cancel the whole's.
    ``False`` too beyond ``MAX_CUT_AXES`` or ``MAX_CORNERS``.
    """
    boxes = [box for box in boxes if 0 not in box.shape]
    if 0 in shape:
        return not boxes
    axes = _cut_axes(boxes, shape)
    if len(axes) > MAX_CUT_AXES or len(boxes) << len(axes) > MAX_CORNERS:
        return False
    strides = c_strides([size + 1 for size in shape])
    counts: dict[int, int] = {}
    for box, weight in [(Box((0,) * len(shape), shape), -1), *((box, 1) for box in boxes)]:
        corners = [(0, weight)]
        for axis in axes:
            first, last = box.start[axis], box.start[axis] + box.shape[axis]
            corners = [
                (place + at * strides[axis], sign * edge)
                for place, edge in corners
                for at, sign in ((first, 1), (last, -1))
            ]
        for place, sign in corners:
            counts[place] = counts.get(place, 0) + sign
    return not any(counts.values())


def _cut_axes(boxes: Sequence[Box], shape: tuple[int, ...]) -> list[int]:
    """Return the axes along which boxes are not as long as the tensor."""
    return [axis for axis, size in enumerate(shape) if any(box.shape[axis] != size for box in boxes)]


def _check_disjoint(tensor: Tensor) -> None:
    """Raise ``FileError`` for pieces that share elements, or are of two kinds; all are inside the tensor."""
    boxes = [piece.where for piece in tensor.pieces if isinstance(piece.where, Box)]
    if len(boxes) < len(tensor.pieces):
        raise FileError(f"boxes and flat pieces in one tensor of shape {list(tensor.shape)}")
    if not is_tiling(boxes, tensor.shape):
        raise FileError(f"{len(boxes)} boxes that do not make up a tensor of shape {list(tensor.shape)}")


def _fill(tensor: Tensor, first: int, last: int, out: memoryview) -> None:
    """Fill ``out`` with elements ``first`` to ``last`` of a tensor whose pieces are boxes that are not all runs."""
    width = item_size(tensor.dtype)
    for position, box in boxes_between(tensor.shape, first, last):
        part = out[(position - first) * width :][: math.prod(box.shape) * width]
        candidates = [_meeting(index, box) for index in tensor._sorted]
        for piece in min(candidates, key=len, default=tensor.pieces):
            _fill_box(piece, box, width, part)


@dataclass(frozen=True, slots=True)
class _Sorted:
    """Pieces by where they start along an axis; ``reach`` is how far the pieces up to each one go."""

    axis: int
    pieces: tuple[Piece, ...]
    starts: tuple[int, ...]
    reach: tuple[int, ...]


def _sort(pieces: Sequence[Piece], axis: int) -> _Sorted:
    bounds = []
    for number, piece in enumerate(pieces):
        assert isinstance(piece.where, Box)
        start = piece.where.start[axis]
        bounds.append((start, number, start + piece.where.shape[axis]))
    bounds.sort()
    return _Sorted(
        axis,
        tuple(pieces[number] for _, number, _ in bounds),
        tuple(start for start, _, _ in bounds),
        tuple(accumulate((end for _, _, end in bounds), max)),
    )


def _meeting(index: _Sorted, box: Box) -> Sequence[Piece]:
    """Return the pieces that can share elements with a box, as far as the one axis tells."""
    start = box.start[index.axis]
    first = bisect_right(index.reach, start)
    return index.pieces[first : bisect_left(index.starts, start + box.shape[index.axis])]


def boxes_between(shape: tuple[int, ...], first: int, last: int) -> Iterator[tuple[int, Box]]:
    """Yield the elements from ``first`` to ``last`` in C order, as boxes that are each one run, with their places."""
    while first < last:
        # The largest trailing block that starts here and ends in time; then as many of them as fit in its parent.
        axis, block = len(shape), 1
        while axis > 0 and first % (block * shape[axis - 1]) == 0 and first + block * shape[axis - 1] <= last:
            axis -= 1
            block *= shape[axis]
        start, rest = [], first
        for stride in c_strides(shape):
            start.append(rest // stride)
            rest %= stride
        extent = [1] * axis + list(shape[axis:])
        if axis > 0:
            extent[axis - 1] = min((last - first) // block, shape[axis - 1] - start[axis - 1])
            block *= extent[axis - 1]
        yield first, Box(tuple(start), tuple(extent))
        first += block


def _fill_box(piece: Piece, box: Box, width: int, out: memoryview) -> None:
    assert isinstance(piece.where, Box)
    common = intersection(piece.where, box)
    if common is None:
        return
    strides = piece.strides or c_strides(piece.where.shape)
    skipped = sum((c - p) * s for c, p, s in zip(common.start, piece.where.start, strides, strict=True))
    into = c_strides(box.shape)
    ahead = sum((c - b) * s for c, b, s in zip(common.start, box.start, into, strict=True))
    _gather(piece.source, piece.offset + skipped * width, common.shape, strides, out, ahead * width, into, width)


def _gather(
    source: Source, offset: int, shape: Sequence[int], strides: Sequence[int],
    out: memoryview, ahead: int, into: Sequence[int], width: int,
) -> None:  # fmt: skip
    """Copy a strided box of ``source`` into a strided box of ``out``; offsets in bytes, strides in elements.

    Reads runs where both sides are runs. Else reads the span of the box and gathers from it, in halves along the axis
    with the widest step while the span is too large, or mostly bytes that nobody asked for.
    """
    count = math.prod(shape)
    run = _drop_units(shape, c_strides(shape))
    if _drop_units(shape, strides) == run and _drop_units(shape, into) == run:
        source.readinto(offset, out[ahead : ahead + count * width])
        return
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    sparse = 1 if _run(shape, strides) * width >= GATHER_RUN else 8
    if span * width > GATHER_SPAN or span > sparse * count:
        axis = max((a for a in range(len(shape)) if shape[a] > 1), key=lambda a: strides[a])
        half = shape[axis] // 2
        for start, size in ((0, half), (half, shape[axis] - half)):
            part = [*shape[:axis], size, *shape[axis + 1 :]]
            _gather(
                source, offset + start * strides[axis] * width, part, strides,
                out, ahead + start * into[axis] * width, into, width,
            )  # fmt: skip
        return
    import numpy as np
    from numpy.lib.stride_tricks import as_strided

    buffer = bytearray(span * width)
    source.readinto(offset, memoryview(buffer))
    item = np.dtype((np.void, width))
    read = np.frombuffer(buffer, item)
    target = np.frombuffer(out[ahead:], item, count=1 + sum((n - 1) * s for n, s in zip(shape, into, strict=True)))
    as_strided(target, tuple(shape), [s * width for s in into])[...] = as_strided(
        read, tuple(shape), [s * width for s in strides]
    )


def _run(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return elements that lie in one run at the end of a strided box."""
    run = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != run:
            break
        run *= size
    return run
