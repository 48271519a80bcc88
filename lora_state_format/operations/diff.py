"""What differs between two states, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from lora_state_format.format.values import encode_value
from lora_state_format.io.strict_json import dumps
from lora_state_format.model.digests import hash_tensor, stated_hash
from lora_state_format.model.states import OptimizerState, Parameter, Scalar, Slot, Value
from lora_state_format.model.tensors import Tensor

__all__ = ["Difference", "diff"]

SHOWN: Final = 10
"""Lines that a difference prints of each kind before it only counts."""

WIDTH: Final = 100
"""Characters of a value that are shown."""

NUMBERS: Final = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "BF16", "F32", "F64"}
"""Dtypes whose scalars are shown as numbers."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How state ``b`` differs from state ``a``; it is false where it does not.

    ``run`` are lines on optimizers, groups and what belongs to no parameter. ``removed`` and ``added`` are names that
    only one has; ``slots`` are lines ``name: slot: what``. ``moved`` says whether the parameters that both have stand
    in another order.
    """

    run: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()
    moved: bool = False

    def __bool__(self) -> bool:
        return bool(self.run or self.removed or self.added or self.slots or self.moved)

    def __str__(self) -> str:
        if not self:
            return "the same state"
        lines = list(self.run)
        for title, items in (("only in the first", self.removed), ("only in the second", self.added)):
            lines += _listed(title, items)
        if self.moved:
            lines.append("the parameters stand in another order")
        return "\n".join([*lines, *_listed("different", self.slots)])


def _listed(title: str, items: tuple[str, ...]) -> Iterator[str]:
    if items:
        yield f"{title} ({len(items)}):"
        yield from (f"  {item}" for item in items[:SHOWN])
        if len(items) > SHOWN:
            yield f"  ... and {len(items) - SHOWN} more"


def diff(a: OptimizerState, b: OptimizerState) -> Difference:
    """Compare two states bit for bit: optimizers, groups and options, parameters, slots, and the rest of a state.

    Tensors are compared by the digests that their files state, which ``verify`` proves, and read where one has none.
    Where names came from (``naming``), what wrote the state (``origin``), and digests of weights that only one of them
    has make no difference. Types do: 1, 1.0 and true are three values, a tuple is no list.
    """
    first, second = set(a), set(b)
    common = [name for name in a if name in second]
    return Difference(
        run=tuple(_run(a, b)),
        removed=tuple(name for name in a if name not in second),
        added=tuple(name for name in b if name not in first),
        slots=tuple(line for name in common for line in _parameter(a[name], b[name])),
        moved=common != [name for name in b if name in first],
    )


def _run(a: OptimizerState, b: OptimizerState) -> Iterator[str]:
    if a.optimizers != b.optimizers:
        yield f"optimizers: {_classes(a)} and {_classes(b)}"
    if len(a.groups) != len(b.groups):
        yield f"groups: of {[g.count for g in a.groups]} and {[g.count for g in b.groups]} parameters"
    else:
        for number, (one, two) in enumerate(zip(a.groups, b.groups, strict=True)):
            if (one.optimizer, one.name, one.count) != (two.optimizer, two.name, two.count):
                yield f"group {number}: of {one.count} and {two.count} parameters, or another name or optimizer"
            options = dict(one.options), dict(two.options)
            if [*options[0]] != [*options[1]] and options[0].keys() == options[1].keys():
                yield f"group {number}: its options stand in another order"
            for path, values in _values(*options):
                yield f"group {number}: {path}: {values}"
    if a.global_step != b.global_step:
        yield f"step: {a.global_step} and {b.global_step}"
    for what in ("globals", "extra", "extensions", "unknown"):
        for path, values in _values(getattr(a, what), getattr(b, what)):
            yield f"{what}: {path}: {values}"


def _classes(state: OptimizerState) -> str:
    return ", ".join(optimizer.class_path or "a class that is not stated" for optimizer in state.optimizers)


def _parameter(a: Parameter, b: Parameter) -> Iterator[str]:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        yield f"{a.name}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
    if (a.state is None) != (b.state is None):
        yield f"{a.name}: never stepped in the {'first' if a.state is None else 'second'}"
    for what in ("adapter", "tied", "foreign_names", "original_id"):
        if getattr(a, what) != getattr(b, what):
            yield f"{a.name}: {what}: {_text(getattr(a, what))} and {_text(getattr(b, what))}"
    for path, values in _values(a.state or {}, b.state or {}):
        yield f"{a.name}: {path}: {values}"
    if a.weights and b.weights and a.weights != b.weights:
        yield f"{a.name}: saved beside other weights"


def _values(a: Value, b: Value, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yield the places where two values differ, and how."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        one, two = ({_key(key): key for key in value} for value in (a, b))
        for text in sorted({*one, *two}):
            place = (*path, str(one.get(text, two.get(text))))
            if text in one and text in two:
                yield from _values(a[one[text]], b[two[text]], place)
            else:
                yield ".".join(place), f"only in the {'first' if text in one else 'second'}"
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and (type(a), len(a)) == (type(b), len(b)):
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from _values(left, right, (*path, str(index)))
    elif isinstance(a, Slot) and isinstance(b, Slot) and _same_bytes(a.tensor, b.tensor):
        if a.role is not b.role:
            yield ".".join(path), f"role {a.role.value} and {b.role.value}"
    elif not _same(a, b):
        yield ".".join(path), f"{_text(a)} and {_text(b)}"


def _key(key: Any) -> str:
    """Return a mapping's key as the format writes it: 1, 1.0 and "1" are three."""
    return dumps(encode_value(key, "a key", None))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return a.hex() == b.hex()
    return type(a) is type(b) and not isinstance(a, Slot) and bool(a == b)


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return _digest(a) == _digest(b)


def _digest(tensor: Tensor) -> str:
    return stated_hash(tensor) or hash_tensor(tensor)


def _text(value: Any) -> str:
    if isinstance(value, Slot):
        return f"a tensor {value.tensor.dtype} {list(value.tensor.shape)} ({_digest(value.tensor)[:8]})"
    text = repr(value.item()) if isinstance(value, Scalar) and value.dtype in NUMBERS else repr(value)
    return text if len(text) <= WIDTH else f"{text[:WIDTH]}..."
