"""The parameters of a state one by one, named or not, and the kinds that they fall into."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple, overload

from lora_state_format.errors import OptionError
from lora_state_format.model.states import OptimizerState, PositionalState, Scalar, Slot, Value, walk
from lora_state_format.model.tensors import Tensor
from lora_state_format.model.text import expression

__all__ = ["Entry", "Kind", "dotted", "entries", "kind_of", "kinds", "matching", "span", "tensors"]

NUMBER: Final = re.compile(r"(?<![^.])\d+(?![^.])")
"""A segment of a parameter's name that is a number: a layer's, an expert's."""


NO_LAYER: Final = -1
"""Stands for the layer of a parameter whose name has no number."""


class Entry(NamedTuple):
    """A parameter as both kinds of state have it; ``group`` is ``None`` for one that is in no group."""

    name: str | None
    id: int | str | None
    shape: tuple[int, ...] | None
    group: int | None
    state: Mapping[str, Value] | None

    @property
    def label(self) -> str:
        """The name; ``id N`` for a parameter that has none."""
        return self.name if self.name is not None else f"id {self.id}"

    @property
    def place(self) -> tuple[str, int]:
        """The module, with ``*`` for the numbers of the name, and the layer: the first of these numbers."""
        numbers = NUMBER.findall(self.label)
        return NUMBER.sub("*", self.label), int(numbers[0]) if numbers else NO_LAYER

    @property
    def size(self) -> int:
        """Bytes of all its tensors."""
        return sum(leaf.tensor.size for _, leaf in walk(self.state or {}) if isinstance(leaf, Slot))

    @property
    def step(self) -> float | None:
        """How many steps the parameter took, if its state says so."""
        value = (self.state or {}).get("step")
        try:
            number = value.item() if isinstance(value, Scalar) else value
        except TypeError:
            return None
        return float(number) if isinstance(number, (int, float)) else None


@dataclass(slots=True)
class Kind:
    """Parameters that differ only in the numbers of their names: those of a model's layers.

    ``label`` has ``*`` in the place of each number, ``numbers`` which they are; ``layout`` is each slot's name with its
    dtype, and its shape and role where it is not shaped like its parameter.
    """

    label: str
    shape: tuple[int, ...] | None
    group: int | None
    stepped: bool
    layout: tuple[tuple[str, str], ...]
    numbers: tuple[set[int], ...]
    members: list[int] = field(default_factory=list)
    size: int = 0

    @property
    def spans(self) -> str:
        """The numbers in words: ``0-27``; several in turn for a name with several."""
        return " ".join(map(span, self.numbers))


def entries(state: OptimizerState | PositionalState) -> Iterator[Entry]:
    """Yield the parameters of a state in order."""
    groups = (index for index, group in enumerate(state.groups) for _ in range(group.count))
    if isinstance(state, OptimizerState):
        for p in state.parameters:
            yield Entry(p.name, p.original_id, p.shape, next(groups, None), p.state)
    else:
        for identity, shape in zip(state.ids, state.shapes(), strict=True):
            yield Entry(None, identity, shape, next(groups, None), state.entries.get(identity))


@overload
def matching(state: OptimizerState, match: str) -> OptimizerState: ...
@overload
def matching(state: OptimizerState | PositionalState, match: str) -> OptimizerState | PositionalState: ...
def matching(state: OptimizerState | PositionalState, match: str) -> OptimizerState | PositionalState:
    """Return the state of the parameters whose labels a regular expression finds; groups keep what is left of them.

    Raises ``OptionError`` for an expression that is not one, or that finds no parameter.
    """
    pattern = expression(match)
    found = list(entries(state))
    kept = [place for place, entry in enumerate(found) if pattern.search(entry.label)]
    if not kept:
        first = f"; the first is '{found[0].label}'" if found else ""
        raise OptionError(f"none of the {len(found)} parameters matches '{match}'{first}")
    counts = Counter(found[place].group for place in kept)
    groups = tuple(replace(group, count=counts[number]) for number, group in enumerate(state.groups))
    if isinstance(state, OptimizerState):
        return replace(state, groups=groups, parameters=tuple(state.parameters[place] for place in kept))
    return replace(state, groups=groups, ids=tuple(state.ids[place] for place in kept), names=None)


def kinds(found: Iterable[Entry]) -> list[Kind]:
    """Return the kinds that parameters fall into, each with the places of its members."""
    rows: dict[object, Kind] = {}
    for place, entry in enumerate(found):
        numbers = [int(n) for n in NUMBER.findall(entry.label)] if entry.name is not None else []
        label = NUMBER.sub("*", entry.label) if entry.name is not None else entry.label
        if entry.name is None and isinstance(entry.id, int):
            label, numbers = "id *", [entry.id]
        leaves = ((dotted(path), leaf) for path, leaf in walk(entry.state or {}))
        layout = tuple((slot, kind_of(leaf, entry.shape)) for slot, leaf in leaves)
        key = (entry.group, label, entry.shape, entry.state is None, layout)
        row = rows.setdefault(
            key, Kind(label, entry.shape, entry.group, entry.state is not None, layout, tuple(set() for _ in numbers))
        )
        for seen, number in zip(row.numbers, numbers, strict=True):
            seen.add(number)
        row.members.append(place)
        row.size += entry.size
    return list(rows.values())


def tensors(state: OptimizerState | PositionalState) -> Iterator[Tensor]:
    """Yield every tensor of a state."""
    trees: Iterable[Value] = (*(entry.state or {} for entry in entries(state)), state.globals)
    return (leaf.tensor for tree in trees for _, leaf in walk(tree) if isinstance(leaf, Slot))


def kind_of(leaf: Value, shape: tuple[int, ...] | None) -> str:
    """Return a slot's dtype, with its shape and role where it is not shaped like its parameter."""
    if isinstance(leaf, Scalar):
        return f"{leaf.dtype} scalar"
    if not isinstance(leaf, Slot):
        return type(leaf).__name__
    if leaf.tensor.shape == shape:
        return leaf.tensor.dtype
    return f"{leaf.tensor.dtype} {list(leaf.tensor.shape)} {leaf.role.value}"


def dotted(path: tuple[object, ...]) -> str:
    """Return a slot's path as text."""
    return ".".join(map(str, path))


def span(numbers: set[int]) -> str:
    """Return numbers in words: ``0-27`` where none is left out."""
    first, *rest = sorted(numbers)
    if not rest:
        return str(first)
    if rest[-1] - first == len(rest):
        return f"{first}-{rest[-1]}"
    return ",".join(map(str, [first, *rest] if len(rest) < 4 else [first, rest[0], "..", rest[-1]]))
