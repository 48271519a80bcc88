"""Megatron-Core's ``fully_sharded_model_space``, the form of 2024 and of NeMo 2: flat parts of parameters.

Of a parameter that is cut into ``n`` by ``m`` parts the file has an array of shape ``(n, m, size)``: each part's
elements end to end, wherever the distributed optimizer cut them. ``dist_checkpointing/strategies/torch.py`` takes
tensors with a ``flattened_range`` so.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

from lora_state_format.model.tensors import Box, Piece, Tensor

__all__ = ["in_shape"]


def in_shape(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a slot in a parameter's shape where it is flat parts of it, and otherwise as it is."""
    if len(tensor.shape) != len(shape) + 1:
        return tensor
    *counts, size = tensor.shape
    if any(count < 1 or whole % count for whole, count in zip(shape, counts, strict=True)):
        return tensor
    extent = tuple(whole // count for whole, count in zip(shape, counts, strict=True))
    if prod(extent) != size:
        return tensor
    pieces = []
    for place in product(*map(range, counts)):
        flat = tensor.part((*place, 0), (*(1 for _ in place), size))
        start = tuple(index * length for index, length in zip(place, extent, strict=True))
        pieces.append(Piece(flat, 0, Box(start, extent)))
    return Tensor(tensor.dtype, tuple(shape), tuple(pieces))
