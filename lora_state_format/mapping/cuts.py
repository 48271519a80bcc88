"""The rows of a fused matrix: where queries, keys and values lie in it, or the halves of a gated unit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, TypeAlias

from lora_state_format.errors import ConversionError, OptionError, Remedy
from lora_state_format.model.tensors import Box, Piece, Tensor

__all__ = ["CUTS", "OPTION", "Heads", "Runs", "cut", "heads_of", "rows"]

OPTION: Final = "attention heads and query groups, 32/8: for a map that cuts queries, keys and values apart"
"""The meaning of the option ``heads``."""

_STATE: Final = {"options": {"heads": ...}}

CUTS: Final = ("equal", "square", "heads", "groups")
"""How rows are cut into parts; ``maps.MapRule`` says what each means."""

Heads: TypeAlias = "tuple[int, int]"
"""Attention heads and query groups."""

Runs: TypeAlias = "Sequence[tuple[int, int]]"
"""Runs of rows: first row and count."""


def heads_of(text: object) -> Heads:
    """Return heads and query groups from ``32/8``, or ``32`` without groups. Raises ``OptionError``."""
    match = re.fullmatch(r"(\d{1,5})(?:/(\d{1,5}))?", str(text))
    heads, groups = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not groups or heads % groups:
        raise OptionError(f"heads={text!r}: attention heads and query groups are expected, as 32/8 or 32")
    return heads, groups


def cut(name: str, shape: Sequence[int], how: str, parts: int, heads: Heads | None) -> list[Runs]:
    """Return the rows of each part of a parameter.

    Raises:
        ConversionError: its rows do not divide so, or the number of heads is not known.
    """
    size = shape[0] if shape else 0
    if how == "equal" and size % parts == 0:
        return [[(part * (size // parts), size // parts)] for part in range(parts)]
    if how == "square" and len(shape) == 2 and size >= shape[1] and (size - shape[1]) % (parts - 1) == 0:
        rest = (size - shape[1]) // (parts - 1)
        return [[(0, shape[1])], *([(shape[1] + part * rest, rest)] for part in range(parts - 1))]
    if how in ("equal", "square"):
        raise ConversionError(f"'{name}' of shape {list(shape)} is not {parts} matrices, one below the other")
    return _by_heads(name, size, heads, interleaved=how == "groups")


def _by_heads(name: str, size: int, heads: Heads | None, *, interleaved: bool) -> list[Runs]:
    """Return the rows of queries, keys and values."""
    if heads is None:
        raise ConversionError(
            f"'{name}' holds queries, keys and values, and the file does not say how many heads it has",
            remedy=Remedy("pass {options}: heads and query groups, as 32/8", _STATE),
        )
    count, groups = heads
    width, rest = divmod(size, count + 2 * groups)
    if rest:
        raise ConversionError(
            f"'{name}' has {size} rows, which {count} heads of {groups} query groups do not divide",
            remedy=Remedy("correct {options}", _STATE),
        )
    if not interleaved:
        return [[(0, count * width)], [(count * width, groups * width)], [((count + groups) * width, groups * width)]]
    own = count // groups * width
    starts = [group * (own + 2 * width) for group in range(groups)]
    return [
        [(start, own) for start in starts],
        [(start + own, width) for start in starts],
        [(start + own + width, width) for start in starts],
    ]


def rows(tensor: Tensor, runs: Runs) -> Tensor:
    """Return the runs of rows of a tensor, one after the other."""
    rest = tensor.shape[1:]
    pieces, position = [], 0
    for first, count in runs:
        part = tensor.part((first, *(0 for _ in rest)), (count, *rest))
        pieces.append(Piece(part, 0, Box((position, *(0 for _ in rest)), (count, *rest))))
        position += count
    return Tensor(tensor.dtype, (position, *rest), tuple(pieces))
