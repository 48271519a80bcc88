"""What differs between two states, by name, and by how much."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Final, NamedTuple

import xxhash

from lora_state_format.format.values import encode_value
from lora_state_format.io.strict_json import dumps
from lora_state_format.model.digests import stated_hash
from lora_state_format.model.dtypes import NUMBERS, decoded, item_size
from lora_state_format.model.states import OptimizerState, Parameter, Scalar, Slot, Value
from lora_state_format.model.tensors import CHUNK, Tensor
from lora_state_format.model.text import printable
from lora_state_format.operations.conversion import opened

__all__ = ["Difference", "Distance", "diff"]

SHOWN: Final = 10
"""Lines that a difference prints of each kind before it only counts."""

WIDTH: Final = 100
"""Characters of a value that are shown."""


@dataclass(frozen=True, slots=True)
class Distance:
    """How far tensors of one state are from those of another.

    Attributes:
        tensors: How many were compared.
        elements: Their elements.
        different: Elements whose bytes differ.
        broken: Elements that are not finite in one of the states. Those below are of the others.
        largest: The largest magnitude of a difference.
        squares: The sum of the squares of the differences.
        norms: The sums of the squares of the first state's elements, and of the second's.
        product: The sum of the products of the two.
    """

    tensors: int = 0
    elements: int = 0
    different: int = 0
    broken: int = 0
    largest: float = 0.0
    squares: float = 0.0
    norms: tuple[float, float] = (0.0, 0.0)
    product: float = 0.0

    def __add__(self, other: Distance) -> Distance:
        """Return the distance over the tensors of both."""
        return Distance(
            self.tensors + other.tensors,
            self.elements + other.elements,
            self.different + other.different,
            self.broken + other.broken,
            max(self.largest, other.largest),
            self.squares + other.squares,
            (self.norms[0] + other.norms[0], self.norms[1] + other.norms[1]),
            self.product + other.product,
        )

    @property
    def relative(self) -> float | None:
        """The norm of the differences over that of the first state; ``None`` where that is zero."""
        return math.sqrt(self.squares / self.norms[0]) if self.norms[0] else None

    @property
    def cosine(self) -> float | None:
        """The cosine of the angle between the two states; ``None`` where one of them is zero."""
        norm = math.sqrt(self.norms[0]) * math.sqrt(self.norms[1])
        return self.product / norm if norm else None

    def __str__(self) -> str:
        relative = "" if self.relative is None else f", relative {self.relative:.3g}"
        cosine = "" if self.cosine is None else f", cosine {self.cosine:.6g}"
        broken = f"; {self.broken} not finite" if self.broken else ""
        by = f", by {self.largest:.3g} at most{relative}{cosine}" if self.norms != (0.0, 0.0) else ""
        return f"{self.different} of {self.elements} elements differ{by}{broken}"

    def to_json(self) -> dict[str, float | None]:
        """Return the distance as JSON values; a number that is too large for float64 is ``None``."""
        numbers = {"largest": self.largest, "relative": self.relative, "cosine": self.cosine}
        return {
            "tensors": self.tensors,
            "elements": self.elements,
            "different": self.different,
            "not_finite": self.broken,
            **{key: number if number is None or math.isfinite(number) else None for key, number in numbers.items()},
        }


@dataclass(frozen=True, slots=True)
class Difference:
    """How state ``b`` differs from state ``a``; it is false where it does not.

    Attributes:
        run: Lines on optimizers, groups, options and what belongs to no parameter.
        removed: Names that only the first has.
        added: Names that only the second has.
        slots: Lines ``name: slot: what``.
        moved: Whether the parameters that both have are in another order.
        distances: Of every tensor of numbers that differs, by parameter and slot.
    """

    run: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()
    moved: bool = False
    distances: Mapping[str, Mapping[str, Distance]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.run or self.removed or self.added or self.slots or self.moved)

    @property
    def totals(self) -> dict[str, Distance]:
        """The distance over all tensors that differ, by slot."""
        found: dict[str, Distance] = {}
        for slots in self.distances.values():
            for slot, distance in slots.items():
                found[slot] = found.get(slot, Distance()) + distance
        return found

    def __str__(self) -> str:
        if not self:
            return "the same state"
        lines = list(self.run)
        for title, items in (("only in the first", self.removed), ("only in the second", self.added)):
            lines += _listed(title, tuple(map(printable, items)))
        if self.moved:
            lines.append("the parameters stand in another order")
        lines += _listed("different", self.slots)
        for slot, distance in self.totals.items():
            lines.append(f"total of {printable(slot)} ({distance.tensors}): {distance}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the difference as JSON values."""
        return {
            "same": not self,
            "run": self.run, "removed": self.removed, "added": self.added, "slots": self.slots, "moved": self.moved,
            "distances": {
                name: {slot: distance.to_json() for slot, distance in slots.items()}
                for name, slots in self.distances.items()
            },
            "totals": {slot: distance.to_json() for slot, distance in self.totals.items()},
        }  # fmt: skip


def _listed(title: str, items: tuple[str, ...]) -> Iterator[str]:
    if items:
        yield f"{title} ({len(items)}):"
        yield from (f"  {item}" for item in items[:SHOWN])
        if len(items) > SHOWN:
            yield f"  ... and {len(items) - SHOWN} more"


def diff(a: OptimizerState | str | os.PathLike[str], b: OptimizerState | str | os.PathLike[str]) -> Difference:
    """Compare two states bit for bit: optimizers, groups and options, parameters, slots, and the rest of a state.

    Every byte of both is read, and compared with the digest that its file states: a tensor that is no longer what it
    was is a difference, also to itself. Where names came from (``naming``), what wrote the state (``origin``), and
    digests of weights that only one of them has make no difference. Types do: 1, 1.0 and true are three values, a tuple
    is no list.

    Args:
        a: A state, or the path of a checkpoint that ``read`` can name.
        b: The one to compare it with.

    Raises what ``read`` raises.
    """
    with opened(a) as first, opened(b) as second:
        return _compared(first, second)


def _compared(a: OptimizerState, b: OptimizerState) -> Difference:
    second = set(b)
    common = [name for name in a if name in second]
    here = set(common)
    slots: list[str] = []
    distances: dict[str, dict[str, Distance]] = {}
    for name in common:
        for found in _parameter(a[name], b[name]):
            slots.append(f"{printable(name)}: {found.line}")
            if found.distance is not None:
                distances.setdefault(name, {})[found.path] = found.distance
    return Difference(
        run=tuple(_run(a, b)),
        removed=tuple(name for name in a if name not in second),
        added=tuple(name for name in b if name not in here),
        slots=tuple(slots),
        moved=common != [name for name in b if name in here],
        distances=distances,
    )


class _Found(NamedTuple):
    """A place where two values differ, and how."""

    path: str
    text: str
    distance: Distance | None = None

    @property
    def line(self) -> str:
        return printable(f"{self.path}: {self.text}" if self.path else self.text)


# --- what belongs to no parameter ---------------------------------------------------------------------------------


def _run(a: OptimizerState, b: OptimizerState) -> Iterator[str]:
    if a.optimizers != b.optimizers:
        yield f"optimizers: {_classes(a)} and {_classes(b)}"
    yield from map(printable, _groups(a, b))
    if a.global_step != b.global_step:
        yield f"step: {a.global_step} and {b.global_step}"
    for what in ("globals", "extra", "extensions", "unknown"):
        for found in _values(getattr(a, what), getattr(b, what)):
            yield f"{what}: {found.line}"


def _groups(a: OptimizerState, b: OptimizerState) -> Iterator[str]:
    """Yield how groups differ, and their options: of those at the same place, and of those that share parameters."""
    if len(a.groups) != len(b.groups):
        yield f"groups: of {[g.count for g in a.groups]} and {[g.count for g in b.groups]} parameters"
    shared = Counter(_shared(a, b))
    paired = len(a.groups) == len(b.groups)
    if paired:
        shared.update({(number, number): 0 for number in range(len(a.groups))})
    for (first, second), count in sorted(shared.items()):
        one, two = a.groups[first], b.groups[second]
        alike = (one.optimizer, one.name, one.count) == (two.optimizer, two.name, two.count)
        if paired and first == second and not alike:
            yield f"group {first}: of {one.count} and {two.count} parameters, or another name or optimizer"
        where = f"group {first}" if first == second else f"groups {first} and {second}, {count} parameters"
        options = dict(one.options), dict(two.options)
        if [*options[0]] != [*options[1]] and options[0].keys() == options[1].keys():
            yield f"{where}: its options stand in another order"
        for found in _values(*options):
            yield f"{where}: {found.line}"


def _shared(a: OptimizerState, b: OptimizerState) -> Iterator[tuple[int, int]]:
    """Yield, for each parameter that both have in a group, its group in the one and in the other."""
    homes = {p.name: number for number, members in enumerate(b.members()) for p in members}
    for number, members in enumerate(a.members()):
        yield from ((number, homes[p.name]) for p in members if p.name in homes)


def _classes(state: OptimizerState) -> str:
    return printable(", ".join(found.class_path or "a class that is not stated" for found in state.optimizers))


# --- parameters and values ----------------------------------------------------------------------------------------


def _parameter(a: Parameter, b: Parameter) -> Iterator[_Found]:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        yield _Found("", f"{a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}")
    if (a.state is None) != (b.state is None):
        yield _Found("", f"never stepped in the {'first' if a.state is None else 'second'}")
    for what in ("adapter", "tied", "foreign_names", "original_id"):
        if getattr(a, what) != getattr(b, what):
            yield _Found(what, f"{_text(getattr(a, what))} and {_text(getattr(b, what))}")
    yield from _values(a.state or {}, b.state or {})
    if a.weights and b.weights and a.weights != b.weights:
        yield _Found("", "saved beside other weights")


def _values(a: Value, b: Value, path: tuple[str, ...] = ()) -> Iterator[_Found]:
    """Yield the places where two values differ."""
    place = ".".join(path)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        one, two = ({_key(key): key for key in value} for value in (a, b))
        for text in sorted({*one, *two}):
            inner = (*path, str(one.get(text, two.get(text))))
            if text in one and text in two:
                yield from _values(a[one[text]], b[two[text]], inner)
            else:
                yield _Found(".".join(inner), f"only in the {'first' if text in one else 'second'}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and (type(a), len(a)) == (type(b), len(b)):
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from _values(left, right, (*path, str(index)))
    elif isinstance(a, Slot) and isinstance(b, Slot):
        yield from (_Found(place, *found) for found in _tensors(a.tensor, b.tensor))
        if a.role is not b.role:
            yield _Found(place, f"role {a.role.value} and {b.role.value}")
    elif not _same(a, b):
        yield _Found(place, f"{_text(a)} and {_text(b)}")


def _key(key: Any) -> str:
    """Return a mapping's key as the format writes it: 1, 1.0 and "1" are three."""
    return dumps(encode_value(key, "a key", None))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return a.hex() == b.hex()
    return type(a) is type(b) and not isinstance(a, Slot) and bool(a == b)


def _text(value: Any) -> str:
    if isinstance(value, Slot):
        return f"a tensor {value.tensor.dtype} {list(value.tensor.shape)}"
    text = repr(value.item()) if isinstance(value, Scalar) and value.dtype in NUMBERS else repr(value)
    return text if len(text) <= WIDTH else f"{text[:WIDTH]}..."


# --- tensors ------------------------------------------------------------------------------------------------------


def _tensors(a: Tensor, b: Tensor) -> Iterator[tuple[str, Distance | None]]:
    """Yield how two tensors differ, and which of them is damaged."""
    alike = (a.dtype, a.shape) == (b.dtype, b.shape)
    kinds = f"a tensor {a.dtype} {list(a.shape)} and a tensor {b.dtype} {list(b.shape)}"
    hashers = xxhash.xxh3_128(), xxhash.xxh3_128()
    equal = alike
    for one, two in zip_longest(a.chunks(), b.chunks(), fillvalue=memoryview(b"")):
        equal = equal and one == two
        hashers[0].update(one)
        hashers[1].update(two)
    if not equal and a.shape == b.shape and {a.dtype, b.dtype} <= NUMBERS:
        distance = _distance(a, b)
        yield (str(distance) if alike else f"{kinds}: {distance}"), distance
    elif not equal:
        yield (f"other bytes in {kinds}" if alike else kinds), None
    for which, tensor, hasher in zip(("first", "second"), (a, b), hashers, strict=True):
        if stated_hash(tensor) not in (None, hasher.hexdigest()):
            yield f"damaged in the {which}: its bytes do not have the digest that its file states", None


def _distance(a: Tensor, b: Tensor) -> Distance:
    """Return the distance of two tensors of numbers, computed in float64 whatever their types are."""
    import numpy as np

    found = Distance(tensors=1)
    buffers = [memoryview(bytearray(CHUNK // 8 * item_size(tensor.dtype))) for tensor in (a, b)]
    for one, two in zip(a.chunks(buffers[0]), b.chunks(buffers[1]), strict=True):
        x, y = (decoded(chunk, tensor.dtype).astype("f8") for chunk, tensor in ((one, a), (two, b)))
        if a.dtype == b.dtype:
            ours, theirs = (np.frombuffer(chunk, f"u{item_size(a.dtype)}") for chunk in (one, two))
            different = int((ours != theirs).sum())
        else:
            different = int((x != y).sum())
        finite = np.isfinite(x) & np.isfinite(y)
        x, y = x[finite], y[finite]
        with np.errstate(over="ignore", invalid="ignore"):
            gap = y - x
            largest = float(np.abs(gap).max(initial=0.0))
            norms = float(x @ x), float(y @ y)
            squares, product = float(gap @ gap), float(x @ y)
        found += Distance(0, finite.size, different, finite.size - len(x), largest, squares, norms, product)
    return found
