"""Optimizer state as this package holds it: frozen, framework-free, tensors as byte ranges.

There is one in-memory thing, ``OptimizerState``. Every reader makes one, every writer takes one. State whose parameters
have no names yet is a ``PositionalState``; ``PositionalState.named`` is the only way from one to the other.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeAlias

from lora_state_format.errors import ConversionError, OptionError
from lora_state_format.model import notebook
from lora_state_format.model.dtypes import DTYPES
from lora_state_format.model.sources import Memory
from lora_state_format.model.tensors import Digest, Tensor, contiguous

__all__ = [
    "Checkpoint",
    "Group",
    "Naming",
    "Optimizer",
    "OptimizerState",
    "Parameter",
    "PositionalState",
    "Role",
    "Scalar",
    "Slot",
    "Value",
    "Weights",
    "mapped",
    "slot_of",
    "walk",
]


class Role(str, Enum):
    """How a slot's tensor relates to the parameter's axes: what may be done to it.

    It comes from the optimizer's description, never from a shape that happens to agree. Unknown is ``OPAQUE``.
    """

    PARAM = "param"
    """Element for element: sliced, permuted and resized with the parameter."""
    ROW = "row"
    """The last axis reduced: one value per index of the others (Adafactor's ``exp_avg_sq_row``)."""
    COL = "col"
    """The last but one axis reduced (Adafactor's ``exp_avg_sq_col``)."""
    BLOCK = "block"
    """Codes or scales of blocks of consecutive elements in C order: cut between blocks only, never permuted."""
    OPAQUE = "opaque"
    """Nothing is known: copied whole or not at all."""


SHOWN_IN_A_NOTEBOOK: Final = 50
"""Parameters that a notebook shows of a state."""

SHOWN: Final = 3
"""Parameters, and groups, that the ``repr`` of a state names."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """A 0-d tensor: its dtype and its little-endian bytes, so that every dtype and every NaN survives."""

    dtype: str
    data: bytes

    @classmethod
    def of(cls, dtype: str, value: bool | int | float) -> Scalar:
        """Return a number as a scalar. Raises ``TypeError`` for a dtype or a number that ``struct`` does not take."""
        try:
            return cls(dtype, struct.pack(f"<{DTYPES[dtype].struct or dtype}", value))
        except (KeyError, struct.error, OverflowError) as error:
            raise TypeError(f"{value!r} cannot be a scalar of type {dtype}") from error

    def item(self) -> bool | int | float | complex:
        """Return the value as a Python number. Raises ``TypeError`` for a dtype that ``struct`` does not know."""
        if self.dtype == "BF16":
            return float(struct.unpack("<f", b"\0\0" + self.data)[0])
        if self.dtype == "C64":
            return complex(*struct.unpack("<2f", self.data))
        code = DTYPES[self.dtype].struct
        if code is None:
            raise TypeError(f"a scalar of type {self.dtype} has no Python number")
        value: bool | int | float = struct.unpack(f"<{code}", self.data)[0]
        return value


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor of one or more dimensions in a slot tree.

    ``order`` has its axes from the slowest to the fastest in memory, where that was another order than C's: only of
    opaque tensors, since others are laid out as their parameter.
    """

    tensor: Tensor
    role: Role = Role.OPAQUE
    order: tuple[int, ...] | None = None


Value: TypeAlias = (
    "bool | int | float | str | bytes | Scalar | Slot | tuple[Value, ...] | list[Value] | Mapping[Any, Value] | None"
)
"""What a slot, an option or an extra may hold. Mapping keys are ``None``, ``bool``, ``int``, ``float`` or ``str``."""


def slot_of(tensor: Tensor) -> Slot | Scalar:
    """Return a tensor as a slot like its parameter; one without axes by its value."""
    return Slot(tensor, Role.PARAM) if tensor.shape else scalar_of(tensor)


def leaf_of(tensor: Tensor) -> Tensor | Scalar:
    """Return a tensor as it is; one without axes by its value."""
    return tensor if tensor.shape else scalar_of(tensor)


def scalar_of(tensor: Tensor) -> Scalar:
    """Return the value of a tensor of one element."""
    return Scalar(tensor.dtype, bytes(tensor.bytes()))


def walk(value: Value, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Value]]:
    """Yield every leaf of a value tree with its path, in order."""
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Value]] = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        yield path, value
        return
    for key, inner in items:
        if type(inner) is Slot or type(inner) is Scalar:  # most are: half of the time of a walk
            yield (*path, key), inner
        else:
            yield from walk(inner, (*path, key))


def mapped(value: Any, leaf: Callable[[Any, tuple[Any, ...]], Any], path: tuple[Any, ...] = ()) -> Any:
    """Return a value tree with ``leaf(value, path)`` in place of every leaf."""
    if isinstance(value, Mapping):
        return {key: mapped(inner, leaf, (*path, key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(inner, leaf, (*path, index)) for index, inner in enumerate(value))
    return leaf(value, path)


@dataclass(frozen=True, slots=True)
class Optimizer:
    """One of the optimizers of a run. ``class_path`` is ``None`` where the file does not say."""

    class_path: str | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """A group's options, and how many parameters it has: groups are consecutive runs over the state's parameters.

    ``optimizer`` is an index into the state's ``optimizers``. ``options`` keeps the order in which they were found.
    """

    optimizer: int
    options: tuple[tuple[str, Value], ...]
    count: int
    name: str | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Parameter(Mapping[str, Any]):
    """One parameter's state under its name: a mapping from slot to value, a ``Tensor`` where it is one.

    Attributes:
        name: Its name in ``named_parameters()``, without wrappers' segments.
        shape: Its shape, even where no slot shows it.
        state: The slots as they were found; ``None`` if it never took a step, ``{}`` if its optimizer keeps no slots.
        dtype: Its own dtype, spelled as in safetensors, if it is known.
        adapter: The adapter that it belongs to.
        tied: Other live names of the same tensor.
        foreign_names: What others call it, by who does: ``{"peft": ...}``.
        weights: The checksum of the parameter's own bytes when the state was saved.
        original_id: Its id in a positional file, where that was not its position.
    """

    name: str
    shape: tuple[int, ...]
    state: Mapping[str, Value] | None
    dtype: str | None = None
    adapter: str | None = None
    tied: tuple[str, ...] = ()
    foreign_names: Mapping[str, str] = field(default_factory=dict)
    weights: Digest | None = None
    original_id: int | str | None = None

    def __getitem__(self, slot: str) -> Any:
        if self.state is None or slot not in self.state:
            raise KeyError(slot)
        value = self.state[slot]
        return value.tensor if isinstance(value, Slot) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.state or ())

    def __len__(self) -> int:
        return len(self.state or ())

    def __bool__(self) -> bool:
        return True  # without slots it is still a parameter

    def __repr__(self) -> str:
        slots = "never stepped" if self.state is None else ", ".join(self.state) or "no slots"
        return f"Parameter({self.name!r}, {list(self.shape)}: {slots})"

    def tensors(self) -> Iterator[tuple[tuple[Any, ...], Slot]]:
        """Yield every tensor of the slot tree with its path."""
        for path, leaf in walk(self.state or {}):
            if isinstance(leaf, Slot):
                yield path, leaf


@dataclass(frozen=True, slots=True)
class Naming:
    """Where a state's names came from, and how sure that is.

    ``source`` is one of ``model``, ``checkpoint``, ``names``, ``adapter``, ``configs``. ``rule`` is the grouping rule
    that turned positions into names, ``None`` where none was needed. ``details`` is free: counts, survivors, evidence.
    """

    source: str
    rule: str | None = None
    details: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class OptimizerState(Mapping[str, Parameter]):
    """Named optimizer state: a mapping from parameter name to ``Parameter``, in optimizer order.

    ``parameters`` holds the groups' members, run after run, and after them the carried ones: parameters whose state is
    kept though they are in no group any more. ``globals`` is state that belongs to no parameter. ``origin`` says what
    wrote the state (``format``, versions; never a path or a host). ``extra`` holds the user's own values, without
    tensors. ``extensions`` and ``unknown`` are members of a manifest that this version has no meaning for; they are
    kept. Two states are the same if ``diff`` finds nothing; ``==`` is identity of the object, as a state may be large.
    """

    optimizers: tuple[Optimizer, ...]
    groups: tuple[Group, ...]
    parameters: tuple[Parameter, ...]
    naming: Naming
    globals: Mapping[str, Value] = field(default_factory=dict)
    origin: Mapping[str, Value] = field(default_factory=dict)
    extra: Mapping[str, Value] = field(default_factory=dict)
    extensions: Mapping[str, Value] = field(default_factory=dict)
    unknown: Mapping[str, Value] = field(default_factory=dict)
    global_step: int | None = None
    resources: tuple[Any, ...] = field(default=(), repr=False)

    __eq__ = object.__eq__

    def __hash__(self) -> int:
        return object.__hash__(self)

    def __post_init__(self) -> None:
        if len(self._index) != len(self.parameters):
            seen: set[str] = set()
            for parameter in self.parameters:
                if parameter.name in seen:
                    raise ConversionError(f"parameter '{parameter.name}' occurs twice")
                seen.add(parameter.name)

    @cached_property
    def _index(self) -> dict[str, Parameter]:
        return {parameter.name: parameter for parameter in self.parameters}

    @cached_property
    def _foreign(self) -> dict[str, Parameter | None]:
        """The parameters by what others call them; ``None`` where that is several."""
        found: dict[str, Parameter | None] = {}
        for parameter in self.parameters:
            for key in set(parameter.foreign_names.values()):
                found[key] = parameter if key not in found else None
        return found

    def __getitem__(self, name: str) -> Parameter:
        """By name, or by a foreign name that only one parameter has."""
        try:
            return self._index[name]
        except KeyError:
            found = self._foreign.get(name)
            if found is None:
                raise
            return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __repr__(self) -> str:
        shown = [f"  {parameter!r}" for parameter in self.parameters[:SHOWN]]
        more = [f"  ... and {len(self) - SHOWN} more"] if len(self) > SHOWN else []
        return "\n".join([f"OptimizerState({_head(self)}; names from {self.naming.source})", *shown, *more])

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the head, and the first parameters with their slots."""
        shown = self.parameters[:SHOWN_IN_A_NOTEBOOK]
        rows = [
            (p.name, str(list(p.shape)), "never stepped" if p.state is None else ", ".join(p.state) or "no slots")
            for p in shown
        ]
        if len(self) > len(shown):
            rows.append((f"... and {len(self) - len(shown)} more", "", ""))
        return notebook.table(f"{_head(self)}; names from {self.naming.source}", ("name", "shape", "slots"), rows)

    def __len__(self) -> int:
        return len(self.parameters)

    def members(self) -> list[tuple[Parameter, ...]]:
        """Return the parameters of each group, in order."""
        result, start = [], 0
        for group in self.groups:
            result.append(self.parameters[start : start + group.count])
            start += group.count
        return result

    def slot(self, name: str) -> dict[str, Tensor]:
        """Parameter name -> its tensor in the slot ``name``, for the parameters that have one; nothing is read yet.

        A slot inside another goes by its path, joined by dots. Raises ``OptionError`` if no parameter has the slot.
        """
        found: dict[str, Tensor] = {}
        others: dict[str, None] = {}
        for parameter in self.parameters:
            for path, leaf in walk(parameter.state or {}):
                label = ".".join(map(str, path))
                if label != name or not isinstance(leaf, (Slot, Scalar)):
                    others[label] = None
                elif isinstance(leaf, Slot):
                    found[parameter.name] = leaf.tensor
                else:
                    found[parameter.name] = contiguous(leaf.dtype, (), Memory(leaf.data))
        if not found:
            raise OptionError(f"no parameter has a tensor in a slot '{name}'; there are: {', '.join(others) or 'none'}")
        return found

    @property
    def carried(self) -> tuple[Parameter, ...]:
        """The parameters that are in no group."""
        return self.parameters[sum(group.count for group in self.groups) :]

    def check_unchanged(self) -> None:
        """Raise ``FileError`` if a file that the tensors read from is no longer what it was when it was opened."""
        for resource in self.resources:
            if hasattr(resource, "check_unchanged"):
                resource.check_unchanged()

    def close(self) -> None:
        """Close the files that the tensors read from."""
        _close(self.resources)

    def __enter__(self) -> OptimizerState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close(resources: tuple[Any, ...]) -> None:
    for resource in resources:
        resource.close()


def _head(state: OptimizerState | PositionalState) -> str:
    """Say in a phrase what a state holds."""
    classes = ", ".join((found.class_path or "unknown class").rpartition(".")[2] for found in state.optimizers)
    sizes = [group.count for group in state.groups[: SHOWN + 1]]
    groups = f"groups of {sizes}" if len(sizes) <= SHOWN else f"{len(state.groups)} groups"
    step = "" if state.global_step is None else f", step {state.global_step}"
    count = len(state.parameters) if isinstance(state, OptimizerState) else len(state.ids)
    return f"{classes}: {count} parameters in {groups}{step}"


def _shape_of(entry: Mapping[str, Value]) -> tuple[int, ...] | None:
    shown = {leaf.role: leaf.tensor.shape for _, leaf in walk(entry) if isinstance(leaf, Slot)}
    if Role.PARAM in shown:
        return shown[Role.PARAM]
    row, col = shown.get(Role.ROW, ()), shown.get(Role.COL, ())
    dropped = row[:-1] == col[:-1] and bool(row)  # transformers drops the axis that it reduces,
    kept = row[:-2] == col[:-2] and row[-1:] == col[-2:-1] == (1,)  # torch keeps it with one element
    if dropped == kept:
        return None
    return (*row, col[-1]) if dropped else (*row[:-1], col[-1])


@dataclass(frozen=True, repr=False)
class PositionalState:
    """State whose parameters have ids, not names: ``ids`` run through the groups as ``OptimizerState.parameters`` do.

    ``entries`` maps an id to its slots; an id without an entry never took a step. ``names`` are the names that the file
    itself states, id by id, if it states all of them; ``stated`` holds those that it states of a parameter and not of a
    group, by id, be it of some parameters only: no order of parameters may contradict them.
    """

    optimizers: tuple[Optimizer, ...]
    groups: tuple[Group, ...]
    ids: tuple[int | str, ...]
    entries: Mapping[int | str, Mapping[str, Value]]
    names: tuple[str, ...] | None = None
    stated: Mapping[int | str, str] = field(default_factory=dict)
    globals: Mapping[str, Value] = field(default_factory=dict)
    origin: Mapping[str, Value] = field(default_factory=dict)
    global_step: int | None = None
    resources: tuple[Any, ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        return f"PositionalState({_head(self)}; without names)"

    def sizes(self) -> list[int]:
        """Return how many parameters each group has."""
        return [group.count for group in self.groups]

    def shapes(self) -> list[tuple[int, ...] | None]:
        """Return the shape of each parameter as its ``param`` slots, or ``row`` and ``col``, show it; else ``None``."""
        return [_shape_of(self.entries.get(identity, {})) for identity in self.ids]

    def close(self) -> None:
        """Close the files that the tensors read from."""
        _close(self.resources)

    def named(self, parameters: Sequence[Parameter], naming: Naming) -> OptimizerState:
        """Return the same state under names. ``parameters`` are in the order of ``ids``; their state comes from here.

        Raises ``ConversionError`` if the counts differ, a name occurs twice, or a ``param`` slot has another shape than
        its parameter.
        """
        if len(parameters) != len(self.ids):
            raise ConversionError(f"{len(parameters)} names for {len(self.ids)} parameters")
        plain = self.ids == tuple(range(len(self.ids)))
        filled = []
        for identity, parameter in zip(self.ids, parameters, strict=True):
            state = self.entries.get(identity)
            for path, leaf in walk(state or {}):
                if isinstance(leaf, Slot) and leaf.role is Role.PARAM and leaf.tensor.shape != parameter.shape:
                    raise ConversionError(
                        f"parameter '{parameter.name}' has shape {list(parameter.shape)}, but id {identity}, which "
                        f"would become its state, has {'.'.join(map(str, path))} of shape {list(leaf.tensor.shape)}"
                    )
            filled.append(replace(parameter, state=state, original_id=None if plain else identity))
        return OptimizerState(
            optimizers=self.optimizers,
            groups=self.groups,
            parameters=tuple(filled),
            naming=naming,
            globals=self.globals,
            origin=self.origin,
            global_step=self.global_step,
            resources=self.resources,
        )


TOP: Final = "its top level"
"""What tensors are called that stand in no mapping of their own in a file."""


@dataclass(frozen=True)
class Weights:
    """Tensors under names that may be those of a model's parameters: a state dict in a file, a file of weights.

    ``where`` is what messages call it: the keys that lead to it, or the name of its file. ``ordered`` says that they
    stand in the model's order, as pickles keep it and safetensors does not. ``own`` says that they were saved with the
    state, so that their values are those of its moment.
    """

    where: str
    tensors: Mapping[str, Tensor]
    ordered: bool = False
    own: bool = True


@dataclass(frozen=True)
class Checkpoint:
    """A converter's result: the state, and the neighbouring files that can name it.

    ``weights`` are the tensors of a sibling weights or adapter file under their own keys; ``configs`` are sibling
    configuration files by name (``adapter_config.json``). Where more than one thing may be the model, ``candidates``
    holds them in tiers, the nearest to the state first: those of one tier are equally near. ``skipped`` says which
    files next to the state could not be read, and why.
    """

    state: OptimizerState | PositionalState
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    configs: Mapping[str, Path] = field(default_factory=dict)
    candidates: tuple[tuple[Weights, ...], ...] = ()
    skipped: tuple[str, ...] = ()

    def tiers(self) -> tuple[tuple[Weights, ...], ...]:
        """Return the candidates, or else the weights as the only one."""
        alone = Weights("the weights next to it", self.weights)
        return self.candidates or (((alone,),) if self.weights else ())

    @contextlib.contextmanager
    def closed_on_error(self) -> Iterator[Checkpoint]:
        """Close the files that the state's tensors read from if the block raises; else they stay open."""
        try:
            yield self
        except BaseException:
            self.state.close()
            raise
