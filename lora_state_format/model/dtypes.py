"""The dtypes that a tensor can have, spelled as safetensors spells them, and what others call them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    import numpy as np

__all__ = ["BITS", "DTYPES", "FLOATS", "NAMES", "NUMBERS", "SPELLED", "DType", "decoded", "item_size"]


class DType(NamedTuple):
    """A row of the table.

    ``bits`` are those of an element; ``name`` is what torch, NumPy, ``ml_dtypes``, JAX and flax call it; ``numpy`` is
    NumPy's little-endian type, spelled as its ``dtype.str``, and ``struct`` the code of the module ``struct``; ``None``
    where these have none.
    """

    bits: int
    name: str | None
    numpy: str | None = None
    struct: str | None = None


DTYPES: Final[Mapping[str, DType]] = {
    "BOOL": DType(8, "bool", "|b1", "?"),
    "U8": DType(8, "uint8", "|u1", "B"),
    "I8": DType(8, "int8", "|i1", "b"),
    "U16": DType(16, "uint16", "<u2", "H"),
    "I16": DType(16, "int16", "<i2", "h"),
    "U32": DType(32, "uint32", "<u4", "I"),
    "I32": DType(32, "int32", "<i4", "i"),
    "U64": DType(64, "uint64", "<u8", "Q"),
    "I64": DType(64, "int64", "<i8", "q"),
    "F16": DType(16, "float16", "<f2", "e"),
    "BF16": DType(16, "bfloat16"),
    "F32": DType(32, "float32", "<f4", "f"),
    "F64": DType(64, "float64", "<f8", "d"),
    "C64": DType(64, "complex64", "<c8"),
    "F8_E5M2": DType(8, "float8_e5m2"),
    "F8_E4M3": DType(8, "float8_e4m3fn"),
    "F8_E8M0": DType(8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": DType(8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": DType(8, "float8_e5m2fnuz"),
    "F4": DType(4, None),
    "F6_E2M3": DType(6, None),
    "F6_E3M2": DType(6, None),
}

BITS: Final[Mapping[str, int]] = {dtype: row.bits for dtype, row in DTYPES.items()}
"""Bits per element of every dtype."""

NAMES: Final[Mapping[str, str]] = {dtype: row.name for dtype, row in DTYPES.items() if row.name is not None}
"""What frameworks call the dtypes that they have."""

FLOATS: Final = frozenset({"F16", "BF16", "F32", "F64"})
"""Real floats that can be computed with."""

NUMBERS: Final = FLOATS | {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}
"""Real numbers that can be computed with."""

SPELLED: Final[Mapping[str, str]] = {
    row.numpy: dtype for dtype, row in DTYPES.items() if row.numpy and dtype in NUMBERS
}
"""The dtypes of real numbers by NumPy's ``dtype.str``."""


def item_size(dtype: str) -> int:
    """Return the bytes per element, rounded up for the dtypes that are smaller than a byte."""
    return (BITS[dtype] + 7) // 8


def decoded(data: bytes | bytearray | memoryview, dtype: str) -> np.ndarray[Any, Any]:
    """Return elements as a flat array of numbers, bfloat16 as float32; whatever else NumPy has, in its own type.

    Raises ``TypeError`` for a dtype that NumPy does not have.
    """
    import numpy as np

    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    if DTYPES[dtype].numpy is None:
        raise TypeError(f"NumPy has no {dtype}")
    return np.frombuffer(data, DTYPES[dtype].numpy)
