"""The dict that ``torch.optim.Optimizer.state_dict()`` returns, as the model has it, and back. No torch.

::

    {"state": {id: {slot: value}}, "param_groups": [{option: value, "params": [id, ...]}]}

Ids are 0, 1, 2, ... since torch 1.6, ``id(parameter)`` before, and names in what FSDP and DCP write. Only
``param_groups`` says in which order they stand; a parameter that never took a step has no entry in ``state``, and a key
of ``state`` that no group lists belongs to no parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any, Final, TypeAlias, TypeVar

from lora_state_format.errors import FileError, Remedy, UnrepresentableError
from lora_state_format.foreign.pickles import Foreign, Global, NumpyScalar, Record, array
from lora_state_format.foreign.stated import group_labels, stated_names
from lora_state_format.foreign.torchao import pack_torchao, unpack_torchao
from lora_state_format.foreign.whole import class_of, state_dict_of
from lora_state_format.io.ledger import crc32
from lora_state_format.model.gc import paused
from lora_state_format.model.states import Group, Optimizer, OptimizerState, PositionalState, Role, Scalar, Slot, Value
from lora_state_format.model.tensors import Tensor, memory_order
from lora_state_format.optimizers.quantised import TORCHAO
from lora_state_format.optimizers.roles import role_of

__all__ = ["Found", "Leaf", "Reader", "find", "from_state_dict", "is_state_dict", "to_state_dict"]

SEARCH_DEPTH: Final = 4
"""How many keys deep an optimizer's state dict may lie in a checkpoint."""

Leaf: TypeAlias = "Callable[[Any], Tensor | Scalar | None]"
"""Turns a framework's own tensor into the model's; ``None`` for anything else."""

Place: TypeAlias = "tuple[Any, ...]"
"""The keys that lead to a value from the top of the checkpoint."""


T = TypeVar("T")

_Listed: TypeAlias = "tuple[int | str | None, Mapping[str, Value] | None]"
"""A parameter of a group: its id, and its slots if it took a step."""


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """A state dict inside a checkpoint; ``path`` is empty where it is the whole.

    ``around`` are the dicts that hold it, the innermost first, where it is the only one of the checkpoint. ``whole`` is
    the optimizer that was pickled as an object, if the state dict is made of one.
    """

    path: tuple[str | int, ...]
    tree: Mapping[str, Any]
    around: tuple[Mapping[Any, Any], ...] = ()
    whole: Foreign | None = None

    @property
    def where(self) -> str:
        """The path, joined by dots."""
        return _dotted(self.path)


def is_state_dict(tree: Any) -> bool:
    """Return whether this is what an optimizer's ``state_dict()`` returns, by its structure."""
    return (
        isinstance(tree, Mapping)
        and isinstance(tree.get("state"), Mapping)
        and isinstance(tree.get("param_groups"), list)
        and all(isinstance(g, Mapping) and isinstance(g.get("params"), (list, tuple)) for g in tree["param_groups"])
    )


def find(tree: Any) -> list[Found]:
    """Return every optimizer's state dict in a checkpoint, wherever it lies (``optimizer``, ``optimizer_states.0``).

    Optimizers that were pickled as objects count as what their ``state_dict()`` would have returned.
    """
    found = list(_search(tree, ()))
    return [replace(found[0], around=tuple(_around(tree, found[0].path)))] if len(found) == 1 else found


def _around(tree: Any, path: Sequence[str | int]) -> list[Mapping[Any, Any]]:
    """Return the dicts on the way to a value, the innermost first."""
    passed: list[Mapping[Any, Any]] = []
    for step in path:
        if not isinstance(tree, Mapping):
            tree = tree[step]
            continue
        passed.insert(0, tree)
        tree = next(inner for key, inner in tree.items() if step in (key, str(key)))
    return passed


def _search(tree: Any, path: tuple[str | int, ...]) -> Iterator[Found]:
    if is_state_dict(tree):
        yield Found(path, tree)
    elif isinstance(tree, Foreign):
        if (known := state_dict_of(tree)) is not None:
            yield Found(path, known, whole=tree)
    elif len(path) < SEARCH_DEPTH and isinstance(tree, (Mapping, list, tuple)):
        for key, inner in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            if isinstance(inner, (Mapping, list, tuple, Foreign)):
                yield from _search(inner, (*path, key if isinstance(key, int) else str(key)))


@dataclass(frozen=True, slots=True)
class Reader:
    """Turns what a state dict holds into values of the model.

    ``leaf`` is asked first about anything that is no plain Python value. ``converted`` collects the places where a
    value changed its type: NumPy's scalars and arrays become Python numbers and tensors.
    """

    leaf: Leaf | None = None
    converted: list[Value] = field(default_factory=list)

    def slots(self, entry: Mapping[Any, Any], options: Mapping[str, Any], place: Place) -> dict[str, Value]:
        """Return a parameter's slot tree. ``options`` are those of its group, ``place`` is where the entry stands."""
        for key in entry:
            if not isinstance(key, str):
                raise UnrepresentableError(f"{_dotted(place)}: a slot is called {key!r}, which is no string")
        return {key: self._value(value, (*place, key), entry, options, len(place)) for key, value in entry.items()}

    def value(self, raw: Any, place: Place) -> Value:
        """Return an option, or anything else that belongs to no parameter: its tensors are opaque."""
        return self._value(raw, place, {}, {}, None)

    def _value(
        self, raw: Any, place: Place, siblings: Mapping[Any, Any], options: Mapping[str, Any], depth: int | None
    ) -> Value:
        if raw is None or type(raw) in (bool, int, float, str, bytes):
            return raw  # type: ignore[no-any-return]
        if isinstance(raw, Record) and (unpacked := unpack_torchao(raw)) is not None:
            raw = unpacked
        if isinstance(raw, Mapping):
            for key in raw:
                _check_key(key, place)
            return {key: self._value(inner, (*place, key), raw, options, depth) for key, inner in raw.items()}
        if isinstance(raw, (list, tuple)) and type(raw) in (list, tuple):
            items = (self._value(x, (*place, number), siblings, options, depth) for number, x in enumerate(raw))
            return list(items) if type(raw) is list else tuple(items)
        tensor = self._tensor(raw, place)
        if isinstance(tensor, Tensor):
            role = Role.OPAQUE if depth is None else role_of(place[depth:], tensor.dtype, siblings, options)
            return Slot(tensor, role, memory_order(tensor) if role is Role.OPAQUE else None)
        return tensor

    def _tensor(self, raw: Any, place: Place) -> Tensor | Scalar | Value:
        if self.leaf is not None and (known := self.leaf(raw)) is not None:
            return known
        if isinstance(raw, Tensor):
            return raw if raw.shape else _scalar(raw, place)
        if isinstance(raw, Scalar):
            return raw
        if isinstance(raw, NumpyScalar) and not isinstance(raw.value, complex):
            self.converted.append(f"{_dotted(place)}: NumPy {raw.dtype} to {type(raw.value).__name__}")
            return raw.value
        if isinstance(raw, Record) and (tensor := array(raw)) is not None:
            self.converted.append(f"{_dotted(place)}: NumPy array to tensor")
            return tensor if tensor.shape else _scalar(tensor, place)
        if isinstance(raw, bytearray):
            self.converted.append(f"{_dotted(place)}: bytearray to bytes")
            return bytes(raw)
        again = _saved_as(raw)
        raise UnrepresentableError(
            f"{_dotted(place)} is {_kind(raw)}, which has no form in a state",
            remedy=Remedy(f"load it with torch, and save {again} in its place") if again else None,
        )


SAVED_AS: Final = {
    ("torch", "Tensor that is to be conjugated or negated"): "resolve_conj().resolve_neg()",
    ("torch", "complex32"): "to(torch.complex64)",
    ("torch._utils", "_rebuild_sparse_tensor"): "to_dense()",
    ("torch._utils", "_rebuild_sparse_csr_tensor"): "to_dense()",
    ("torch._utils", "_rebuild_qtensor"): "dequantize()",
}
"""Tensors without a form in a state, and the methods that make one that has a form."""


def _saved_as(raw: Any) -> str | None:
    """Return what to save in place of a tensor or an array that has no form in a state."""
    match raw:
        case Record("numpy", "ndarray", _, (1, _, Record("numpy", "dtype", _, (_, ">", *_)), *_)):
            return "array.astype(array.dtype.newbyteorder('='))"
        case Record(module, name) if (module, name) in SAVED_AS:
            return f"tensor.{SAVED_AS[module, name]}"
    return None


def _check_key(key: Any, place: Place) -> None:
    if not (key is None or type(key) in (bool, int, float, str)):
        raise UnrepresentableError(f"{_dotted(place)}: a key of a dict is {_kind(key)}")


def _scalar(tensor: Tensor, place: Place) -> Scalar:
    """Return the value of a 0-d tensor; its bytes are checked if its storage holds nothing else and states a CRC-32."""
    data = bytes(tensor.bytes())
    source = tensor.pieces[0].source
    if source.crc32 is not None and source.size == len(data) and crc32(data) != source.crc32:
        raise FileError(f"{_dotted(place)} does not have the CRC-32 that the container states: the file is damaged")
    return Scalar(tensor.dtype, data)


def _kind(raw: Any) -> str:
    if isinstance(raw, (Record, Foreign, Global)):
        return f"{'the global' if isinstance(raw, Global) else 'an object of class'} {raw.module}.{raw.name}"
    if isinstance(raw, NumpyScalar):
        return f"a NumPy scalar of type {raw.dtype}"
    return f"a value of type {type(raw).__qualname__}"


def _dotted(place: Place) -> str:
    return ".".join(map(str, place))


def from_state_dict(
    *trees: Mapping[str, Any] | Found,
    class_path: str | None = None,
    leaf: Leaf | None = None,
    origin: Mapping[str, Value] | None = None,
    global_step: int | None = None,
    resources: tuple[Any, ...] = (),
) -> PositionalState:
    """Return the state in the state dict of an optimizer, or in those of the several optimizers of one run.

    Where there are several, the ids of each get its index in front (``1:0``), and its place in the checkpoint is its
    ``Optimizer.id``. NumPy's scalars and arrays become Python numbers and tensors; ``origin["converted"]`` lists them.
    Keys of ``state`` that are in no group, and members beside ``state`` and ``param_groups``, become ``globals``, of
    several optimizers under the index of each. ``leaf`` turns a framework's live tensors into the model's. Raises
    ``FileError`` for something that is no state dict, and ``UnrepresentableError`` for a value that has no form, naming
    its place.
    """
    found = [tree if isinstance(tree, Found) else Found((), tree) for tree in trees]
    several = len(found) > 1
    reader = Reader(leaf)
    with paused():
        parts = [_read_one(reader, item, i, f"{i}:" if several else None) for i, item in enumerate(found)]
    ids = tuple(identity for part in parts for identity in part.ids)
    return PositionalState(
        optimizers=tuple(
            Optimizer(class_of(item.whole) if item.whole else class_path, item.where if several else None)
            for item in found
        ),
        groups=tuple(group for part in parts for group in part.groups),
        ids=ids,
        entries=_joined(part.entries for part in parts),
        names=_one_each([name for part in parts for name in part.names or ()], ids),
        stated=_unique(_joined(part.stated for part in parts)),
        globals=_globals_by_index(parts) if several else parts[0].globals,
        origin={**(origin or {}), **({"converted": reader.converted} if reader.converted else {})},
        global_step=global_step,
        resources=resources,
    )


def _joined(mappings: Iterable[Mapping[int | str, T]]) -> dict[int | str, T]:
    return {key: value for mapping in mappings for key, value in mapping.items()}


def _one_each(names: Sequence[str], ids: Sequence[int | str]) -> tuple[str, ...] | None:
    """Return the names if every id has one of its own."""
    return tuple(names) if len(set(names)) == len(ids) else None


def _unique(stated: dict[int | str, str]) -> dict[int | str, str]:
    """Return the names by id, or none of them where two ids have the same."""
    return stated if len(set(stated.values())) == len(stated) else {}


@dataclass(frozen=True, slots=True)
class _Part:
    groups: list[Group]
    ids: list[int | str]
    entries: dict[int | str, Mapping[str, Value]]
    names: list[str] | None
    stated: dict[int | str, str]
    globals: dict[str, Value]


def _read_one(reader: Reader, found: Found, index: int, prefix: str | None) -> _Part:
    if not is_state_dict(found.tree):
        raise FileError(f"{found.where or 'the value'} is no optimizer's state dict")
    groups, members = _read_groups(reader, found, index)
    entries, loose = _read_entries(reader, found, members)
    others = {key: value for key, value in found.tree.items() if key not in ("state", "param_groups")}
    beside = {str(key): reader.value(value, (*found.path, key)) for key, value in others.items()}
    stated = stated_names(members, found.tree, found.around)
    names = [*stated.values()] if stated.keys() == members.keys() else group_labels(found.tree["param_groups"])
    return _Part(
        groups,
        [_prefixed(identity, prefix) for identity in members],
        {_prefixed(identity, prefix): entry for identity, entry in entries.items()},
        names,
        {_prefixed(identity, prefix): name for identity, name in stated.items()},
        {**({"state": loose} if loose else {}), **beside},
    )


def _read_groups(reader: Reader, found: Found, index: int) -> tuple[list[Group], dict[int | str, Mapping[str, Any]]]:
    """Return the groups of optimizer ``index``, and for every id, in order, the members of its group."""
    groups: list[Group] = []
    members: dict[int | str, Mapping[str, Any]] = {}
    for number, raw in enumerate(found.tree["param_groups"]):
        place = (*found.path, "param_groups", number)
        for identity in raw["params"]:
            if type(identity) not in (int, str):
                raise FileError(f"{_dotted(place)} lists a parameter by {_kind(identity)}, not by an id")
            if identity in members:
                raise FileError(f"{_dotted(place)} lists id {identity!r}, which was listed before")
            members[identity] = raw
        options = tuple((key, reader.value(raw[key], (*place, key))) for key in raw if key != "params")
        name = raw.get("name")
        groups.append(Group(index, options, len(raw["params"]), name if isinstance(name, str) else None))
    return groups, members


def _read_entries(
    reader: Reader, found: Found, members: Mapping[int | str, Mapping[str, Any]]
) -> tuple[dict[int | str, Mapping[str, Value]], dict[Any, Value]]:
    """Return the slots of every id that a group lists, and what else ``state`` holds.

    Writers whose keys are text turn the ids of ``state`` into text, and leave those that the groups list as numbers.
    """
    entries: dict[int | str, Mapping[str, Value]] = {}
    loose: dict[Any, Value] = {}
    state = found.tree["state"]
    spelled = {str(identity): identity for identity in members if identity not in state}
    for written, raw in state.items():
        key = spelled.get(written, written) if written not in members and isinstance(written, str) else written
        place = (*found.path, "state", key)
        if key not in members:
            _check_key(key, place[:-1])
            loose[key] = reader.value(raw, place)
        elif isinstance(raw, Mapping):
            entries[key] = reader.slots(raw, members[key], place)
        else:
            raise FileError(f"{_dotted(place)} is {_kind(raw)}, not the slots of a parameter")
    return entries, loose


def _globals_by_index(parts: Sequence[_Part]) -> dict[str, Value]:
    return {str(index): part.globals for index, part in enumerate(parts) if part.globals}


def _prefixed(identity: int | str, prefix: str | None) -> int | str:
    return identity if prefix is None else f"{prefix}{identity}"


# --- writing ------------------------------------------------------------------------------------------------------


def to_state_dict(state: OptimizerState | PositionalState, optimizer: int = 0) -> dict[str, Any]:
    """Return the positional state dict that an optimizer of the state would have written, or had written.

    Ids are those of the source, or the positions where they were 0..n-1 or never given. Tensors stay ``Tensor`` and
    ``Scalar``. Raises ``UnrepresentableError`` for carried parameters, which are in no group, and where the order of
    the parameters is not a torch optimizer's.
    """
    members = _members_of(state) if isinstance(state, OptimizerState) else _entries_of(state)
    several = len(state.optimizers) > 1
    entries: dict[int | str, Any] = {}
    groups = []
    position = count()
    for group, listed in zip(state.groups, members, strict=True):
        if group.optimizer == optimizer:
            ids = [_identity(original, next(position), several) for original, _ in listed]
            entries |= {i: _plain(slots) for i, (_, slots) in zip(ids, listed, strict=True) if slots is not None}
            groups.append({**{key: _plain(value) for key, value in group.options}, "params": ids})
    beside = state.globals.get(str(optimizer), {}) if several else state.globals
    assert isinstance(beside, Mapping)
    others = {key: _plain(value) for key, value in beside.items() if key != "state"}
    return {"state": {**entries, **_plain(beside.get("state", {}))}, "param_groups": groups, **others}


def _members_of(state: OptimizerState) -> list[list[_Listed]]:
    """Return the original id and the slots of every parameter, group by group."""
    nameless = any(parameter.original_id is None for parameter in state.parameters)
    if nameless and state.naming.details.get("order") == "unknown":
        raise UnrepresentableError(
            f"the parameters stand in the order of a file of format {state.origin.get('format')!r}, and positions "
            "would have to be those of a torch optimizer: load the state by name"
        )
    carried = [p.name for p in state.carried if p.state is not None]
    if carried:
        raise UnrepresentableError(
            f"{len(carried)} parameters are in no group (the first is '{carried[0]}'): a state dict lists only "
            "those of its groups"
        )
    return [[(p.original_id, p.state) for p in group] for group in state.members()]


def _entries_of(state: PositionalState) -> list[list[_Listed]]:
    """Return the id and the slots of every parameter, group by group."""
    rest = iter(state.ids)
    return [[(i, state.entries.get(i)) for i in islice(rest, group.count)] for group in state.groups]


def _identity(original: int | str | None, position: int, several: bool) -> int | str:
    """Return the id that a parameter has in its optimizer's state dict; ``position`` where it never had one."""
    if original is None:
        return position
    return _without_index(original) if several else original


def _without_index(identity: int | str) -> int | str:
    """Return the id that ``from_state_dict`` put an optimizer's index in front of."""
    rest = str(identity).partition(":")[2]
    return int(rest) if rest.isdecimal() else rest


def _plain(value: Value) -> Any:
    if isinstance(value, Slot):
        return value.tensor
    if isinstance(value, Mapping):
        plain = {key: _plain(inner) for key, inner in value.items()}
        return pack_torchao(plain) if TORCHAO in plain else plain
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value
