"""Moments kept as codes of blocks: bitsandbytes' 8-bit state, and torchao's 8-bit, 4-bit and fp8 tensors.

Both are kept as they are; ``dequantize`` makes float32 moments of them, with which an ordinary Adam can continue. A
value is ``map[code] * scale[block]``, as in bitsandbytes' ``functional.py`` (``dequantize_blockwise``) and torchao's
``optim/quant_utils.py``: exactly the value that the optimizer itself computes with.

torchao's moments are tensors of a class of their own. In a slot tree it is a mapping: ``torchao`` (the class),
``dtype`` and ``shape`` of the moment, its ``codes`` and ``scale``, and what else its class keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, Final

from lora_state_format.errors import OptionError, UnrepresentableError
from lora_state_format.model.states import OptimizerState, Parameter, Role, Scalar, Slot, Value
from lora_state_format.model.tensors import Tensor, contiguous

if TYPE_CHECKING:
    import numpy as np

__all__ = ["BITSANDBYTES", "TORCHAO", "Dequantized", "bound_of", "decoded", "dequantize"]

TORCHAO: Final = "torchao"
"""The key by which a mapping is known to be a tensor of torchao's."""

BITSANDBYTES: Final = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes keeps a parameter's state since 0.49.2; before, in the slots themselves."""

_FIRST_ONLY: Final = {"Lion": "exp_avg", "SGD": "momentum_buffer", "LARS": "momentum_buffer", "RMSprop": "square_avg"}
"""Class name -> the meaning of ``state1`` where there is no ``state2``."""


@dataclass(frozen=True)
class Dequantized:
    """The state in float32, how many moments were decoded, and the largest error of a value.

    ``bound`` is in parts of the largest value of a value's block: half the widest gap between neighbouring codes.
    """

    state: OptimizerState
    moments: int
    bound: float

    def __str__(self) -> str:
        return (
            f"{self.moments} quantised moments decoded to float32: what quantising lost stays lost, each value is "
            f"within {100 * self.bound:.2g}% of the largest of its block"
        )


def dequantize(state: OptimizerState) -> Dequantized:
    """Return the state with every quantised moment as a float32 tensor, decoded when it is read.

    bitsandbytes' ``state1`` and ``state2`` become ``exp_avg`` and ``exp_avg_sq``, and ``step`` a float32 scalar, as
    torch's Adam has them. Raises ``OptionError`` if nothing is quantised, ``UnrepresentableError`` for AdEMAMix, whose
    two first moments no Adam has.
    """
    bounds: list[float] = []
    groups = {id(p): group for group, members in zip(state.groups, state.members(), strict=True) for p in members}
    parameters = []
    for parameter in state.parameters:
        group = groups.get(id(parameter))
        class_path = state.optimizers[group.optimizer].class_path if group else None
        parameters.append(replace(parameter, state=decoded(parameter, class_path or "", bounds)))
    if not bounds:
        raise OptionError("no moment of this state is quantised: there is nothing to decode")
    options = [tuple((k, v) for k, v in g.options if k not in _OF_BITSANDBYTES) for g in state.groups]
    result = replace(
        state,
        parameters=tuple(parameters),
        groups=tuple(replace(group, options=kept) for group, kept in zip(state.groups, options, strict=True)),
        optimizers=tuple(replace(optimizer, class_path=None) for optimizer in state.optimizers),
        origin={**state.origin, "dequantized": len(bounds)},
    )
    return Dequantized(result, len(bounds), max(bounds))


_OF_BITSANDBYTES: Final = frozenset({"alpha", "t_alpha", "t_beta3"})
"""Options of AdEMAMix that bitsandbytes gives to every optimizer's groups."""


def decoded(parameter: Parameter, class_path: str, bounds: list[float]) -> Mapping[str, Value] | None:
    """Return a parameter's slots as torch's Adam has them, with float32 moments that are decoded when they are read.

    Args:
        parameter: As an optimizer of class ``class_path`` keeps it.
        class_path: Says what ``state1`` is where there is no ``state2``.
        bounds: Gets for each moment how far a value may be from the truth, in parts of the largest of its block.

    Raises:
        UnrepresentableError: Codes, scales and shape do not belong together, or no Adam has the moment.
    """
    if parameter.state is None:
        return None
    inner = parameter.state.get(BITSANDBYTES)
    slots = {**parameter.state, **inner} if isinstance(inner, Mapping) else dict(parameter.state)
    slots.pop(BITSANDBYTES, None)
    if "state1" not in slots:
        return {key: _moment(key, value, parameter, bounds) for key, value in slots.items()}
    names = {"state1": "exp_avg", "state2": "exp_avg_sq"}
    if "state2" not in slots:
        names = {"state1": next((slot for name, slot in _FIRST_ONLY.items() if name in class_path), "state1")}
    result: dict[str, Value] = {}
    for key, value in slots.items():
        if key in names:
            result[names[key]] = _of_bitsandbytes(key[-1], slots, parameter, bounds)
        elif key == "step" and isinstance(value, int):
            result[key] = _float_scalar(value)
        elif not key.startswith(("qmap", "absmax")):
            result[key] = value
    return result


def _float_scalar(value: int) -> Scalar:
    import struct

    return Scalar("F32", struct.pack("<f", value))


def _of_bitsandbytes(which: str, slots: Mapping[str, Value], parameter: Parameter, bounds: list[float]) -> Value:
    value = slots[f"state{which}"]
    if not isinstance(value, Slot) or value.tensor.dtype != "U8":
        return value  # parameters below 4,096 elements are kept in float32
    if value.tensor.shape != parameter.shape:
        raise UnrepresentableError(
            f"'{parameter.name}' has a state{which} of shape {list(value.tensor.shape)}: AdEMAMix keeps two first "
            "moments there, and no Adam has both"
        )
    scale, table = slots.get(f"absmax{which}"), slots.get(f"qmap{which}")
    if not isinstance(scale, Slot) or not isinstance(table, Slot):
        raise UnrepresentableError(f"'{parameter.name}' has a state{which} without its absmax{which} and qmap{which}")
    block = _block(value.tensor.count, scale.tensor.count, parameter.name)
    return _decoded(value.tensor, scale.tensor, _floats(table.tensor), block, parameter.shape, bounds)


def _block(count: int, blocks: int, name: str) -> int:
    """Return elements of a block: the power of two that cuts so many elements into so many blocks."""
    for exponent in range(5, 40):
        if -(-count // (1 << exponent)) == blocks:
            return 1 << exponent
    raise UnrepresentableError(f"'{name}' has {count} codes in {blocks} blocks, which no block size explains")


def _moment(key: str, value: Value, parameter: Parameter, bounds: list[float]) -> Value:
    """Return a tensor of torchao's, decoded; anything else as it is."""
    if not isinstance(value, Mapping) or TORCHAO not in value:
        return value
    codes, scale, table, shape = (value.get(name) for name in ("codes", "scale", "qmap", "shape"))
    block = value.get("block_size")
    if not isinstance(codes, Slot) or not isinstance(scale, Slot) or not isinstance(block, int):
        raise UnrepresentableError(f"slot '{key}' of '{parameter.name}' lacks codes, scale or block_size")
    if not isinstance(shape, tuple) or shape != parameter.shape:
        raise UnrepresentableError(f"slot '{key}' of '{parameter.name}' has another shape than the parameter")
    floats = _floats(table.tensor) if isinstance(table, Slot) else _e4m3()
    return _decoded(codes.tensor, scale.tensor, floats, block, parameter.shape, bounds)


def _decoded(
    codes: Tensor, scale: Tensor, table: np.ndarray[Any, Any], block: int, shape: tuple[int, ...], bounds: list[float]
) -> Slot:
    count = prod(shape)
    packed = codes.count * 2 == count
    if scale.dtype != "F32" or scale.count != -(-count // block) or not (packed or codes.count == count):
        raise UnrepresentableError(
            f"{codes.count} codes with {scale.count} scales for {count} elements in blocks of {block}"
        )
    bounds.append(bound_of(table))
    return Slot(contiguous("F32", shape, _Decoder(codes, scale, table, block, packed, count * 4)), Role.PARAM)


def bound_of(table: np.ndarray[Any, Any]) -> float:
    """Return how far a coded value may be from the truth, in parts of the largest of its block.

    That is half the widest gap between codes, the ends of the range included.
    """
    import numpy as np

    values = np.sort(table[np.isfinite(table)].astype(np.float64))
    values = values / max(abs(values[0]), abs(values[-1]))
    low = -1.0 if values[0] < 0 else 0.0
    inner = float(np.max(np.diff(values))) / 2
    # bitsandbytes' search on the CPU misses the nearest code by a hair now and then: 0.1% of the gap was measured.
    return 1.01 * max(inner, float(values[0] - low), float(1.0 - values[-1]))


def _floats(tensor: Tensor) -> np.ndarray[Any, Any]:
    if tensor.dtype != "F32" or tensor.count not in (16, 256):
        raise UnrepresentableError(f"a table of {tensor.count} codes of type {tensor.dtype}")
    return tensor.numpy()


def _e4m3() -> np.ndarray[Any, Any]:
    """Return the value of every code of float8_e4m3fn: no infinities, one pattern of NaN, subnormals below 2**-6."""
    import numpy as np

    values = np.empty(256, dtype=np.float32)
    for code in range(256):
        exponent, fraction = code >> 3 & 15, code & 7
        size = fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
        values[code] = np.nan if code & 127 == 127 else -size if code & 128 else size
    return values


class _Decoder:
    """Bytes of float32 values that are decoded as they are read."""

    crc32 = None

    def __init__(
        self, codes: Tensor, scale: Tensor, table: np.ndarray[Any, Any], block: int, packed: bool, size: int
    ) -> None:
        self.codes, self.scale, self.table = codes, scale, table
        self.block, self.packed, self.size = block, packed, size

    def readinto(self, offset: int, out: memoryview) -> None:
        import numpy as np

        first, last = offset // 4, -(-(offset + len(out)) // 4)
        low, high = (first // 2, -(-last // 2)) if self.packed else (first, last)
        raw = bytearray(high - low)
        self.codes.readinto(low, memoryview(raw))
        codes = np.frombuffer(raw, np.uint8)
        if self.packed:  # two codes to a byte, the first in its upper half
            codes = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[first - 2 * low :][: last - first]
        start, stop = first // self.block, -(-last // self.block)
        scales = np.empty(stop - start, np.float32)
        self.scale.readinto(4 * start, scales.data.cast("B"))
        blocks = np.arange(first, last) // self.block - start
        values = self.table[codes] * scales[blocks]
        out[:] = values.astype("<f4").data.cast("B")[offset - 4 * first :][: len(out)]

    def view(self, offset: int, size: int) -> memoryview | None:
        return None
