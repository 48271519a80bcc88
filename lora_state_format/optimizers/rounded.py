"""Moments stored as bfloat16: half the bytes of float32, and not the same numbers.

A bfloat16 has float32's range and 8 bits of its significand, so each value is within 2**-9 of the truth. What Adam does
next is a quotient of two of them. F16 has not the range for second moments (they are squares of gradients, and become
zero), and linear 8-bit codes have not the resolution: next updates were wrong by factors of 1e2 to 1e4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from lora_state_format.errors import OptionError
from lora_state_format.model.states import OptimizerState, Parameter, Slot, Value, mapped
from lora_state_format.model.tensors import CHUNK, Tensor, contiguous

if TYPE_CHECKING:
    import numpy as np

__all__ = ["STORED", "Rounded", "check_stored", "describe_stored", "next_update_error", "stored"]

STORED: Final = "stored"
"""The member of ``origin`` that says which slots were rounded: slot -> [dtype before, dtype after]."""

SAMPLE: Final = 1 << 16
"""Elements of each parameter that ``next_update_error`` looks at."""


class Rounded:
    """The bytes of a float32 tensor as bfloat16, rounded to the nearest, ties to even, when they are read."""

    crc32 = None

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.size = tensor.size // 2

    def readinto(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``offset`` on; both are even numbers of bytes."""
        for start in range(0, len(out), CHUNK):
            part = out[start : start + CHUNK]
            wide = bytearray(2 * len(part))
            self.tensor.readinto(2 * (offset + start), memoryview(wide))
            part[:] = _rounded(wide).data.cast("B")

    def view(self, offset: int, size: int) -> memoryview | None:
        """Return nothing: the bytes are made when they are read."""
        return None


def _rounded(wide: bytearray) -> np.ndarray[Any, Any]:
    import numpy as np

    bits = np.frombuffer(wide, "<u4")
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    near = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    near[nan] = 0x7FC0
    narrow: np.ndarray[Any, Any] = near.astype("<u2")
    return narrow


@dataclass(frozen=True)
class Stored:
    """The state with some slots rounded, and the relative error of Adam's next update, where that can be told."""

    state: OptimizerState
    error: float | None


def check_stored(store: Mapping[str, str]) -> None:
    """Raise ``OptionError`` for another dtype than BF16."""
    for slot, dtype in store.items():
        if dtype != "BF16":
            reasons = {"F16": "its range is too small for second moments, which would become zero"}
            reason = reasons.get(dtype, "only bfloat16 keeps moments well enough to go on with")
            raise OptionError(f"store={{{slot!r}: {dtype!r}}}: {reason}; choose 'BF16' or leave the slot out")


def stored(state: OptimizerState, store: Mapping[str, str], *, measure: bool = False) -> Stored:
    """Return the state with the named slots in bfloat16; ``origin`` says so.

    Args:
        state: What is to be written.
        store: Slot -> ``"BF16"``; float32 slots of that name are rounded, a path inside a slot is joined by dots.
        measure: Read a part of every pair of moments, and tell what rounding does to Adam's next update.

    Raises:
        OptionError: For another dtype, and for a slot that no parameter has in float32.
    """
    check_stored(store)
    found: dict[str, Value] = {}

    def narrow(value: Any, path: tuple[Any, ...]) -> Any:
        label = ".".join(map(str, path))
        if not isinstance(value, Slot) or label not in store or value.tensor.dtype != "F32":
            return value
        found[label] = ["F32", "BF16"]
        return Slot(contiguous("BF16", value.tensor.shape, Rounded(value.tensor)), value.role)

    def rounded(parameter: Parameter) -> Parameter:
        return replace(parameter, state=None if parameter.state is None else mapped(parameter.state, narrow))

    narrowed = replace(state, parameters=tuple(map(rounded, state.parameters)))
    started = any(parameter.state for parameter in state.parameters)
    if started and (missing := [slot for slot in store if slot not in found]):
        raise OptionError(f"store: no parameter has a float32 tensor in a slot '{missing[0]}'")
    narrowed = replace(narrowed, origin={**state.origin, STORED: found} if found else state.origin)
    return Stored(narrowed, next_update_error(state, narrowed) if measure else None)


def describe_stored(origin: Mapping[str, Any]) -> str | None:
    """Return a sentence about slots that were rounded when they were saved."""
    slots = origin.get(STORED)
    if not isinstance(slots, Mapping) or not slots:
        return None
    names = ", ".join(sorted(map(str, slots)))
    return f"lossy: {names} were float32 and are stored as bfloat16, within 2**-9 of each value"


def next_update_error(before: OptimizerState, after: OptimizerState) -> float | None:
    """Return the relative error of Adam's next update, ``exp_avg / sqrt(exp_avg_sq)``; ``None`` without both moments.

    It is that of all updates together, by their Euclidean norm, over the first 65,536 elements of each parameter.
    """
    import numpy as np

    wrong = right = 0.0
    for old, new in zip(before.parameters, after.parameters, strict=True):
        updates = [_update(parameter) for parameter in (old, new)]
        if updates[0] is not None and updates[1] is not None:
            wrong += float(np.square(updates[1] - updates[0]).sum())
            right += float(np.square(updates[0]).sum())
    return (wrong / right) ** 0.5 if right else None


def _update(parameter: Parameter) -> np.ndarray[Any, Any] | None:
    import numpy as np

    first, second = ((parameter.state or {}).get(slot) for slot in ("exp_avg", "exp_avg_sq"))
    if not isinstance(first, Slot) or not isinstance(second, Slot):
        return None
    moments = [_values(slot.tensor) for slot in (first, second)]
    with np.errstate(divide="ignore", invalid="ignore"):
        update = moments[0] / np.sqrt(moments[1])
    return np.where(np.isfinite(update), update, 0.0)


def _values(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return the first elements of a float32 or bfloat16 tensor in double precision."""
    import numpy as np

    width = 2 if tensor.dtype == "BF16" else 4
    data = bytearray(width * min(SAMPLE, tensor.count))
    tensor.readinto(0, memoryview(data))
    if tensor.dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype("f8")
    return np.frombuffer(data, "<f4").astype("f8")
