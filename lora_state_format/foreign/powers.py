"""Steps counted by the powers of Adam's betas, in float32, as Paddle keeps them in place of a step.

After t steps an accumulator is the product of t + 1 factors beta, each product rounded to float32. So a step that
somebody states can be checked bit for bit, betas that nobody states can be found, and a step by given betas.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import Final

from lora_state_format.errors import FileError, OptionError, Remedy

__all__ = ["counted", "power"]

MAX_STEPS: Final = 1_000_000
"""Steps up to which powers are multiplied."""
TINY: Final = 2.0**-126
"""Below the least normal float32 powers are all taken for equal: some devices flush them to zero."""

Betas = tuple[float, ...]


def power(beta: float, steps: int) -> float:
    """Return what is kept after so many steps."""
    return next(islice(_powers(beta), steps, None))


def counted(powers: tuple[float, ...], betas: Betas | None, stated: int | None, where: str) -> tuple[int, Betas | None]:
    """Return the steps that gave these powers; and the betas, as they were stated, or as found if all of them can be.

    Raises ``FileError``, which begins with ``where``, if steps and betas do not give the powers, and ``OptionError`` if
    neither are known.
    """
    held = f"{where} has the powers {list(powers)}"
    if stated is None and betas is None:
        raise OptionError(
            f"{where}: neither the number of steps nor the betas are known",
            remedy=Remedy("pass one of them, as in {options}", {"options": {"step": ...}}),
        )
    if not all(0 <= value < 1 for value in powers) or not 0 <= (stated or 0) <= MAX_STEPS:
        raise FileError(
            f"{held}{f' after {stated} steps' if stated else ''}, which are not powers of betas in [0, 1), or exceed "
            f"{MAX_STEPS:,} steps"
        )
    if stated is None:
        assert betas is not None
        count = _count(powers, betas)
        if count is None:
            raise FileError(f"{held}, which are not those of betas {betas} after any number of steps")
        return count, betas
    found = [None if value < TINY else round(value ** (1 / (stated + 1)), 6) for value in powers]
    chosen: tuple[float | None, ...] = betas or tuple(found)
    if not _lead_to(powers, chosen, stated):
        raise FileError(
            f"{held}, which are not those of betas {chosen} after {stated} steps: the files are of different steps, or "
            "the betas were different ones",
            remedy=Remedy("in that case pass {options}", {"options": {"betas": ...}}),
        )
    return stated, betas or (tuple(beta for beta in found if beta is not None) if None not in found else None)


@cache
def _count(powers: tuple[float, ...], betas: Betas) -> int | None:
    for count, now in enumerate(zip(*map(_powers, betas), strict=True)):
        if all(map(_same, now, powers)) and now[-1] >= TINY:
            return count
        if now[-1] < TINY or count == MAX_STEPS:
            break
    return None


@cache
def _lead_to(powers: tuple[float, ...], betas: tuple[float | None, ...], steps: int) -> bool:
    """Return whether these betas give these powers; one that is not known gives any."""
    pairs = zip(powers, betas, strict=True)
    return all(beta is None or _same(value, power(beta, steps)) for value, beta in pairs)


def _powers(beta: float) -> Iterator[float]:
    """Yield what is kept after 0, 1, 2, ... steps."""
    factor = product = _f32(beta)
    while True:
        yield product
        product = _f32(product * factor)


def _f32(number: float) -> float:
    """Return the nearest float32. The product of two of them is exact as a Python float, so it is rounded only once."""
    return float(struct.unpack("<f", struct.pack("<f", number))[0])


def _same(one: float, other: float) -> bool:
    return one == other or max(one, other) < TINY
