"""fp32 master weights against the weights that the model was saved with: one is the other, rounded.

A mixed-precision optimizer updates the fp32 copy and rounds it to the model's dtype after each step: to nearest, ties
to even, as IEEE 754 has it. A checkpoint that holds both therefore proves to which parameter a range belongs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from lora_state_format.errors import FileError
from lora_state_format.model.dtypes import item_size
from lora_state_format.model.tensors import CHUNK, Box, Tensor, c_strides

if TYPE_CHECKING:
    import numpy as np

__all__ = ["REMEDY", "ROUNDED", "SAMPLE", "check_masters", "elements", "rounded"]

ROUNDED: Final = ("BF16", "F16", "F32")
"""The dtypes of weights that have an fp32 master."""

SAMPLE: Final = 64
"""Elements compared at the beginning of each piece of a master weight."""


def rounded(master: Tensor, dtype: str) -> Iterator[bytes]:
    """Yield an F32 tensor as bytes of ``dtype``, one of ``ROUNDED``, in C order and in chunks."""
    import numpy as np

    for chunk in master.chunks(memoryview(bytearray(min(CHUNK, master.size)))):
        yield _as(np.frombuffer(chunk, "<f4"), dtype)


def elements(tensor: Tensor, start: int, count: int) -> bytearray:
    """Return the bytes of ``count`` elements in C order, from element ``start`` on."""
    width = item_size(tensor.dtype)
    buffer = bytearray(count * width)
    tensor.readinto(start * width, memoryview(buffer))
    return buffer


REMEDY: Final = (
    "the optimizer's files and the model's are not of one save, or files of two ranks were exchanged; copy the folder "
    "again from where it was written"
)


def check_masters(
    masters: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: object = None, remedy: str = REMEDY
) -> int:
    """Compare samples of fp32 masters with the weights of the same names; return how many parameters were compared.

    The first elements of every piece are read, so every rank's share is seen. A weight of another shape, or of a dtype
    that is not in ``ROUNDED``, is passed over.

    Raises:
        FileError: a master, rounded, is not the model's weight.
    """
    import numpy as np

    compared = 0
    for name, master in masters.items():
        weight = weights.get(name)
        if weight is None or weight.shape != master.shape or weight.dtype not in ROUNDED or master.dtype != "F32":
            continue
        compared += bool(master.count)
        for start in _starts(master):
            count = min(SAMPLE, master.count - start)
            values = np.frombuffer(elements(master, start, count), "<f4")
            if not np.isnan(values).any() and _as(values, weight.dtype) != elements(weight, start, count):
                raise FileError(
                    f"the fp32 master of '{name}', rounded to {weight.dtype}, is not the model's weight at element "
                    f"{start}: {remedy}",
                    path=path,
                )
    return compared


def _starts(tensor: Tensor) -> set[int]:
    """Return the first element of each piece, in C order."""
    strides = c_strides(tensor.shape)
    return {
        sum(a * s for a, s in zip(piece.where.start, strides, strict=True))
        if isinstance(piece.where, Box)
        else piece.where.start
        for piece in tensor.pieces
        if not isinstance(piece.where, Box) or 0 not in piece.where.shape
    }


def _as(values: np.ndarray[Any, Any], dtype: str) -> bytes:
    import numpy as np

    if dtype == "F32":
        return values.tobytes()
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype("<f2").tobytes()
    bits = values.view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype("<u2").tobytes()
