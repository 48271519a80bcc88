"""A state in words for people, and as JSON values for programs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from lora_state_format.model.dtypes import NUMBERS, decoded
from lora_state_format.model.states import Naming, OptimizerState, PositionalState, Scalar, Slot, Value, walk
from lora_state_format.model.tensors import Tensor

__all__ = [
    "NOTHING_HELD",
    "SCHEMA_VERSION",
    "Entry",
    "Statistics",
    "describe",
    "describe_naming",
    "describe_support",
    "entries",
    "plain",
    "tensors",
    "to_json",
]

SCHEMA_VERSION: Final = 1
"""Version of the JSON that is printed; it grows when a member goes or changes its meaning."""

SOURCES: Final[Mapping[str, str]] = {
    "model": "the live model",
    "checkpoint": "the checkpoint itself",
    "names": "the names that were given",
    "adapter": "the adapter file",
    "configs": "a model rebuilt from its configs",
}

NOTHING_HELD: Final = (
    "no parameter has any state: either no step was taken, or the optimizer keeps its moments where no state dict "
    "shows them, as the layerwise variants of GaLore and APOLLO, LOMO and AdaLomo do"
)
"""What there is to say of a state without moments."""

NUMBER: Final = re.compile(r"(?<![^.])\d+(?![^.])")
"""A segment of a parameter's name that is a number: a layer's, an expert's."""


class Entry(NamedTuple):
    """A parameter as both kinds of state have it; ``group`` is ``None`` for one that is in no group."""

    name: str | None
    id: int | str | None
    shape: tuple[int, ...] | None
    group: int | None
    state: Mapping[str, Value] | None


def entries(state: OptimizerState | PositionalState) -> Iterator[Entry]:
    """Yield the parameters of a state in order."""
    groups = (index for index, group in enumerate(state.groups) for _ in range(group.count))
    if isinstance(state, OptimizerState):
        for p in state.parameters:
            yield Entry(p.name, p.original_id, p.shape, next(groups, None), p.state)
    else:
        for identity, shape in zip(state.ids, state.shapes(), strict=True):
            yield Entry(None, identity, shape, next(groups, None), state.entries.get(identity))


def tensors(state: OptimizerState | PositionalState) -> Iterator[Tensor]:
    """Yield every tensor of a state."""
    trees: Iterable[Value] = (*(entry.state or {} for entry in entries(state)), state.globals)
    return (leaf.tensor for tree in trees for _, leaf in walk(tree) if isinstance(leaf, Slot))


@dataclass(slots=True)
class Statistics:
    """Counts of elements: all, those that are zero, those that are not finite (``broken``).

    Of the finite ones also the sum of squares and the largest magnitude.
    """

    elements: int = 0
    zeros: int = 0
    broken: int = 0
    squares: float = 0.0
    largest: float = 0.0

    def add(self, tensor: Tensor) -> None:
        """Count the elements of a tensor; one of a dtype without numbers is left out."""
        import numpy as np

        for chunk in tensor.chunks():
            if tensor.dtype not in NUMBERS:
                return
            values = decoded(chunk, tensor.dtype)
            finite = values[np.isfinite(values)].astype("f8")
            self.elements += values.size
            self.zeros += int((values == 0).sum())
            self.broken += values.size - finite.size
            self.squares += float(finite @ finite)
            self.largest = max(self.largest, float(np.abs(finite).max(initial=0.0)))

    @property
    def rms(self) -> float:
        """The root of the mean square of the finite elements."""
        return math.sqrt(self.squares / max(self.elements - self.broken, 1))

    def __str__(self) -> str:
        if not self.elements:
            return ""
        zeros = f", {self.zeros} of {self.elements} zero" if self.zeros else ""
        broken = f", {self.broken} NOT FINITE" if self.broken else ""
        return f" (rms {self.rms:.3g}, largest {self.largest:.3g}{zeros}{broken})"

    def to_json(self) -> dict[str, float]:
        """Return the statistics as JSON values."""
        return {
            "elements": self.elements, "zeros": self.zeros, "not_finite": self.broken,
            "rms": self.rms, "largest": self.largest,
        }  # fmt: skip


# --- words --------------------------------------------------------------------------------------------------------


def describe_naming(naming: Naming) -> Iterator[str]:
    """Yield where names came from, and how sure that is."""
    text = f"names: from {SOURCES.get(naming.source, naming.source)}"
    if naming.rule:
        text += f", in the order of rule '{naming.rule}'"
    if alike := naming.details.get("interchangeable"):
        text += f"; {alike!r} of them share their shape with another"
    yield text
    evidence = naming.details.get("evidence")
    if isinstance(evidence, Mapping):
        yield describe_evidence(evidence)


def describe_evidence(evidence: Mapping[str, Any]) -> str:
    """Say what the numbers tell of an order; ``evidence`` is ``Evidence.to_json()``, as ``naming`` keeps it."""
    pairs, orders = evidence["pairs"], list(evidence["orders"].values())
    return (
        f"evidence: {evidence['verdict']}; of the exchanges of two modules {pairs['excluded']} excluded and "
        f"{pairs['undecided']} undecided, of the other whole orders {orders.count('excluded')}/{len(orders)} excluded"
    )


def describe_support(origin: Mapping[str, Value]) -> Iterator[str]:
    """Yield a note on a converter that was never tried on the files that it is for."""
    if isinstance(support := origin.get("support"), str):
        yield f"support of this format is {support}: it was never tried on a file of a real run"


def describe(state: OptimizerState | PositionalState, *, statistics: bool = False) -> Iterator[str]:
    """Yield a state line by line: totals, groups, and the parameters, those that differ only in numbers on one line.

    ``statistics`` reads every tensor.
    """
    rows: dict[Any, _Row] = {}
    for entry in entries(state):
        label, numbers = _template(entry)
        leaves = [(_dotted(path), leaf) for path, leaf in walk(entry.state or {})]
        layout = tuple((name, _kind(leaf, entry.shape)) for name, leaf in leaves)
        key = (entry.group, label, entry.shape, entry.state is None, layout)
        if key not in rows:
            rows[key] = _Row(entry, label, layout, tuple(set() for _ in numbers))
        rows[key].add(numbers, leaves, statistics)
    sizes = [tensor.size for tensor in tensors(state)]
    step = "" if state.global_step is None else f", step {state.global_step}"
    yield f"{sum(row.count for row in rows.values())} parameters{step}; {len(sizes)} tensors, {sum(sizes):,} bytes"
    if isinstance(state, OptimizerState):
        yield from describe_naming(state.naming)
    else:
        yield "names: none, the state stands under positions"
    if not any(entry.state for entry in entries(state)):
        yield NOTHING_HELD
    yield from describe_support(state.origin)
    for index, optimizer in enumerate(state.optimizers):
        yield f"optimizer {index}: {optimizer.class_path or 'class not stated'}"
    for index, group in enumerate(state.groups):
        options = "".join(f", {key} {_text(value)}" for key, value in group.options)
        yield f"group {index}{f' {group.name!r}' if group.name else ''}: {group.count} parameters{options}"
    yield from map(str, rows.values())
    for path, leaf in walk(state.globals):
        yield f"global {_dotted(path)} {_text(leaf)}"


@dataclass(slots=True)
class _Row:
    """Parameters that differ only in numbers: those of their layers, or their ids."""

    first: Entry
    label: str
    layout: tuple[tuple[str, str], ...]
    numbers: tuple[set[int], ...]
    count: int = 0
    values: dict[str, dict[str, None]] = field(default_factory=dict)
    statistics: dict[str, Statistics] = field(default_factory=dict)

    def add(self, numbers: list[int], leaves: list[tuple[str, Value]], statistics: bool) -> None:
        self.count += 1
        for seen, number in zip(self.numbers, numbers, strict=True):
            seen.add(number)
        for name, leaf in leaves:
            if not isinstance(leaf, Slot):
                self.values.setdefault(name, {}).setdefault(_text(leaf))
            elif statistics:
                self.statistics.setdefault(name, Statistics()).add(leaf.tensor)

    def __str__(self) -> str:
        group = "carried" if self.first.group is None else f"group {self.first.group}"
        shape = "" if self.first.shape is None else f" {list(self.first.shape)}"
        slots = []
        for name, kind in self.layout:
            if name in self.values:
                first, *others = self.values[name]
                slots.append(f"{name} {first}..{others[-1]}" if others else f"{name} {first}")
            else:
                slots.append(f"{name} {kind}{self.statistics.get(name, '')}")
        state = "never stepped" if self.first.state is None else ", ".join(slots) or "no slots"
        return f"{group}: {self.count} x {self.label.format(*map(_span, self.numbers))}{shape}: {state}"


def _template(entry: Entry) -> tuple[str, list[int]]:
    """Return what the parameter is called, for ``str.format``, with its numbers taken out; and the numbers."""
    if entry.name is None and isinstance(entry.id, int):
        return "id {}", [entry.id]
    name = entry.name if entry.name is not None else f"id {entry.id}"
    return NUMBER.sub("{}", name.replace("{", "{{").replace("}", "}}")), [int(n) for n in NUMBER.findall(name)]


def _span(numbers: set[int]) -> str:
    first, *rest = sorted(numbers)
    if not rest:
        return str(first)
    if rest[-1] - first == len(rest):
        return f"{{{first}-{rest[-1]}}}"
    return "{" + ",".join(map(str, [first, *rest] if len(rest) < 4 else [first, rest[0], "..", rest[-1]])) + "}"


def _kind(leaf: Value, shape: tuple[int, ...] | None) -> str:
    """Return what a slot is: its dtype, and its shape and role where it is not like its parameter."""
    if not isinstance(leaf, Slot):
        return ""
    alike = leaf.tensor.shape == shape
    return leaf.tensor.dtype if alike else f"{leaf.tensor.dtype} {list(leaf.tensor.shape)} ({leaf.role.value})"


def _text(value: Value) -> str:
    if isinstance(value, Scalar):
        return str(plain(value))
    if isinstance(value, Slot):
        return _kind(value, None)
    return repr(value)


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


# --- JSON ---------------------------------------------------------------------------------------------------------


def plain(value: Value) -> Any:
    """Return a value as JSON has it, lossy on purpose: tuples are lists, bytes hex digits, infinities strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(inner) for inner in value]
    if isinstance(value, Slot):
        return {"dtype": value.tensor.dtype, "shape": list(value.tensor.shape), "role": value.role.value}
    if isinstance(value, Scalar):
        try:
            number = value.item()
        except TypeError:
            return {"dtype": value.dtype, "bytes": value.data.hex()}
        return plain(number) if isinstance(number, (bool, int, float)) else str(number)
    if isinstance(value, bytes):
        return value.hex()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def to_json(state: OptimizerState | PositionalState, *, statistics: bool = False) -> dict[str, Any]:
    """Return a state as JSON values, every parameter by itself; ``statistics`` reads every tensor."""
    parameters = []
    for entry in entries(state):
        member = {
            "name": entry.name,
            "id": entry.id,
            "shape": None if entry.shape is None else list(entry.shape),
            "group": entry.group,
            "state": None if entry.state is None else plain(entry.state),
        }
        if statistics:
            member["statistics"] = {
                _dotted(path): _measured(leaf.tensor)
                for path, leaf in walk(entry.state or {})
                if isinstance(leaf, Slot)
            }
        parameters.append(member)
    named = isinstance(state, OptimizerState)
    return {
        "schema_version": SCHEMA_VERSION,
        "named": named,
        "global_step": state.global_step,
        "optimizers": [{"class_path": found.class_path, "id": found.id} for found in state.optimizers],
        "groups": [
            {"optimizer": g.optimizer, "name": g.name, "count": g.count, "options": plain(dict(g.options))}
            for g in state.groups
        ],
        "naming": naming_json(state.naming) if isinstance(state, OptimizerState) else None,
        "origin": plain(state.origin),
        "globals": plain(state.globals),
        "parameters": parameters,
    }


def naming_json(naming: Naming) -> dict[str, Any]:
    return {"source": naming.source, "rule": naming.rule, "details": plain(naming.details)}


def _measured(tensor: Tensor) -> dict[str, float]:
    found = Statistics()
    found.add(tensor)
    return found.to_json()
