"""Segments of tensors that are spread over the ranks, and which bytes of one each rank holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from operator import mul
from typing import NamedTuple

import torch

from lora_state_format.model.tensors import Box, Flat, boxes_between, c_strides, intersection
from lora_state_format.torch.spread import Spread, Where

__all__ = ["Portion", "Segment", "portions"]


class Segment(NamedTuple):
    """Bytes ``first`` to ``last`` of a tensor, which stand in a bucket from ``place`` on."""

    spread: Spread
    first: int
    last: int
    place: int


class Portion(NamedTuple):
    """What one rank holds of a segment: a box of bytes of its own tensor, and where that goes in the bucket.

    ``local`` indexes the sender's bytes, which are one run from byte ``first`` on. In the bucket a run of shape ``run``
    begins at ``place``; ``into`` indexes it.
    """

    spread: Spread
    shape: tuple[int, ...]
    first: int
    local: tuple[slice, ...]
    place: int
    run: tuple[int, ...]
    into: tuple[slice, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape)

    def taken(self) -> torch.Tensor:
        """Return the bytes of this rank's own tensor."""
        return self.spread.bytes_of_local[self.local]

    def of(self, bucket: torch.Tensor) -> torch.Tensor:
        """Return the place of these bytes in a bucket."""
        return bucket[self.place : self.place + math.prod(self.run)].view(self.run)[self.into]


def portions(segment: Segment, where: Where) -> Iterator[Portion]:
    """Yield what a rank that holds ``where`` has of a segment."""
    spread, first, last, place = segment
    width = spread.width
    if isinstance(where, Flat):
        low, high = max(first, where.start * width), min(last, (where.start + where.count) * width)
        if low < high:
            own = low - where.start * width
            shape = (high - low,)
            yield Portion(spread, shape, own, (slice(own, own + shape[0]),), place + low - first, shape, (slice(None),))
        return
    if where is None:
        return
    whole, held = (*spread.shape[:-1], spread.shape[-1] * width), _in_bytes(where, width)
    low = _position(held.start, whole)
    if low >= last or low + _position([size - 1 for size in held.shape], whole) < first:
        return
    for position, box in boxes_between(whole, first, last):
        common = intersection(held, box)
        if common is not None:
            local, into = _slices(common, held), _slices(common, box)
            own = _position([index.start for index in local], held.shape)
            yield Portion(spread, common.shape, own, local, place + position - first, box.shape, into)


def _position(index: Sequence[int], shape: tuple[int, ...]) -> int:
    """Return where an element stands in C order."""
    return sum(map(mul, index, c_strides(shape)))


def _in_bytes(box: Box, width: int) -> Box:
    return Box((*box.start[:-1], box.start[-1] * width), (*box.shape[:-1], box.shape[-1] * width))


def _slices(box: Box, inside: Box) -> tuple[slice, ...]:
    return tuple(
        slice(start - base, start - base + size)
        for start, size, base in zip(box.start, box.shape, inside.start, strict=True)
    )
