"""What differs between two states, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_state_format.container import hash_tensor
from lora_state_format.manifest import ALGORITHM
from lora_state_format.model import OptimizerState, Parameter, Scalar, Slot, Tensor, Value, walk

__all__ = ["Difference", "diff"]

SHOWN = 10
"""Lines that a difference prints of each kind before it only counts."""


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
    Where names came from (``naming``) and what wrote the state (``origin``) make no difference.
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
            for path, values in _leaves(dict(one.options), dict(two.options)):
                yield f"group {number}: {path}: {values}"
    if a.global_step != b.global_step:
        yield f"step: {a.global_step} and {b.global_step}"
    for what in ("globals", "extra", "extensions", "unknown"):
        for path, values in _leaves(getattr(a, what), getattr(b, what)):
            yield f"{what}: {path}: {values}"


def _classes(state: OptimizerState) -> str:
    return ", ".join(optimizer.class_path or "a class that is not stated" for optimizer in state.optimizers)


def _parameter(a: Parameter, b: Parameter) -> Iterator[str]:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        yield f"{a.name}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
    if (a.state is None) != (b.state is None):
        yield f"{a.name}: never stepped in the {'first' if a.state is None else 'second'}"
    for path, values in _leaves(a.state or {}, b.state or {}):
        yield f"{a.name}: {path}: {values}"
    if a.weights and b.weights and a.weights != b.weights:
        yield f"{a.name}: saved beside other weights"


def _leaves(a: Mapping[str, Value], b: Mapping[str, Value]) -> Iterator[tuple[str, str]]:
    """The leaves that two trees do not have alike, and how they differ."""
    one, two = dict(walk(a)), dict(walk(b))
    for path in sorted({*one, *two}, key=str):
        name = ".".join(map(str, path))
        if path not in one or path not in two:
            yield name, f"only in the {'first' if path in one else 'second'}"
        elif not _same(one[path], two[path]):
            yield name, f"{_text(one[path])} and {_text(two[path])}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Slot) and isinstance(b, Slot):
        return a.role is b.role and _same_bytes(a.tensor, b.tensor)
    if isinstance(a, float) and isinstance(b, float):
        return a.hex() == b.hex()
    return type(a) is type(b) and bool(a == b)


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return _digest(a) == _digest(b)


def _digest(tensor: Tensor) -> str:
    stated = tensor.digest
    return stated.hex if stated and stated.algorithm == ALGORITHM else hash_tensor(tensor)


def _text(value: Any) -> str:
    if isinstance(value, Slot):
        return f"a tensor {value.tensor.dtype} {list(value.tensor.shape)} ({_digest(value.tensor)[:8]})"
    return repr(value.item()) if isinstance(value, Scalar) and value.dtype != "C64" else repr(value)
