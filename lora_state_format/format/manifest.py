"""The manifest: JSON <-> the model. ``spec/format.md`` is the text; the comments cite its rules.

``encode`` makes members of a state, ``decode`` a state of members; ``values`` does so for the values in them. Tensors
appear in a manifest only as labels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from lora_state_format.errors import FileError, RefusedError, UnrepresentableError, UnsupportedVersionError
from lora_state_format.format.values import MAX_INT, decode_value, encode_value, is_text, show
from lora_state_format.io.safetensors import MAX_DIMENSIONS
from lora_state_format.io.strict_json import dumps
from lora_state_format.model.digests import ALGORITHM
from lora_state_format.model.dtypes import BITS
from lora_state_format.model.states import (
    Group,
    Naming,
    Optimizer,
    OptimizerState,
    Parameter,
    Role,
    Scalar,
    Slot,
    Value,
)
from lora_state_format.model.tensors import Digest, Tensor

__all__ = [
    "FORMAT",
    "HEX",
    "NESTED",
    "VERSION",
    "Manifest",
    "ShardOf",
    "check_names",
    "decode",
    "decode_digests",
    "encode",
    "fits",
    "tensor_key",
]

FORMAT: Final = "named-optimizer-state"

VERSION: Final = (1, 0)

GLOBALS: Final = "$globals"

HEX: Final = re.compile(r"[0-9a-f]{32}")

_NULL: Final = type(None)

MEMBERS: Final[Mapping[str, Mapping[str, tuple[type, ...]]]] = {
    "manifest": {
        "format": (str,), "version": (str,), "optimizers": (list,), "groups": (list,), "parameters": (list,),
        "states": (list,), "naming": (dict,), "digests": (dict,), "globals": (dict,), "origin": (dict,),
        "extra": (dict,), "extensions": (dict,), "global_step": (int,), "weights": (dict,), "set": (dict,),
    },
    "optimizers": {"class": (str, _NULL), "id": (str,)},
    "groups": {"optimizer": (int,), "count": (int,), "options": (list,), "name": (str,)},
    "parameters": {
        "name": (str,), "shape": (list,), "state": (int, _NULL), "dtype": (str,), "adapter": (str,), "tied": (list,),
        "keys": (dict,), "id": (int, str, dict),
    },
    "naming": {"source": (str,), "rule": (str,), "details": (dict,)},
    "weights": {"algorithm": (str,), "values": (list,)},
    "digests": {"algorithm": (str,), "values": (list,)},
    "set": {"id": (str,), "index": (int,), "count": (int,), "positions": (list,)},
}  # fmt: skip
"""The members that this version knows, object by object, with their types (R12); integers are natural numbers."""

REQUIRED: Final[Mapping[str, frozenset[str]]] = {
    "manifest": frozenset({"format", "version", "optimizers", "groups", "parameters", "states", "naming", "digests"}),
    "optimizers": frozenset({"class"}),
    "groups": frozenset({"optimizer", "count", "options"}),
    "parameters": frozenset({"name", "shape", "state"}),
    "naming": frozenset({"source"}),
    "weights": frozenset({"algorithm", "values"}),
    "digests": frozenset({"algorithm", "values"}),
    "set": frozenset({"id", "index", "count", "positions"}),
}

TYPES: Final[Mapping[type, str]] = {
    str: "a string", list: "an array", dict: "an object", int: "a natural number", _NULL: "null",
}  # fmt: skip

NESTED: Final = "$nested"
"""Where ``OptimizerState.unknown`` lists members that cannot be kept."""


# --- a manifest from a state --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ShardOf:
    """A shard's place: ``index`` (from 1) of ``count`` in the set ``id``; ``positions`` of its parameters."""

    id: str
    index: int
    count: int
    positions: tuple[int, ...]


class Manifest(NamedTuple):
    """A state as JSON-able members, and the tensors it names, parameter by parameter, in manifest order.

    ``tensors`` maps a tensor key to its slot; ``members`` lacks ``digests`` until the tensors' bytes have been seen.
    """

    members: dict[str, Any]
    tensors: dict[str, Slot]


def tensor_key(owner: str, label: str) -> str:
    """Return the name of a tensor in the file; composed, never split."""
    return f"{owner}/{label}"


def encode(state: OptimizerState, shard: ShardOf | None = None) -> Manifest:
    """Return the members of a state's manifest. Members that equal their default are left out (W4).

    Raises ``UnrepresentableError`` for values that the format cannot hold and for a state that breaks a rule, so that
    every file that is written can be read.
    """
    if NESTED in state.unknown:
        names = state.unknown[NESTED]
        assert isinstance(names, list)
        raise UnrepresentableError(
            f"the state was written by version {state.unknown['version']!s} of the format, and has members that would "
            f"be lost: {', '.join(map(str, names))}; use a newer version of this package"
        )
    tensors: dict[str, Slot] = {}
    trees: dict[str, Any] = {}
    numbers: dict[str, int] = {}

    def tree_of(owner: str, value: Mapping[str, Value], place: str) -> Any:
        own: dict[str, Slot] = {}
        tree = encode_value(dict(value), place, own)
        tensors.update((tensor_key(owner, label), own[label]) for label in sorted(own))
        return tree

    alike: dict[_Look, tuple[int, list[tuple[str, str]]]] = {}

    def number_of(owner: str, value: Mapping[str, Value]) -> int:
        """Return the number of a slot tree. Flat ones that look alike are encoded once: a sixth of a write."""
        look = _look(value)
        if look is not None and look in alike:
            number, labels = alike[look]
            tensors.update((tensor_key(owner, label), value[key]) for label, key in labels)  # type: ignore[misc]
            return number
        tree = tree_of(owner, value, f"the state of {owner!r}")
        text = dumps(tree)
        trees.setdefault(text, tree)
        number = numbers.setdefault(text, len(numbers))
        if look is not None:
            alike[look] = number, sorted((tree[key]["$tensor"], key) for key, own in look if isinstance(own, Role))
        return number

    parameters = []
    for parameter in state.parameters:
        entry = _encode_parameter(parameter)
        if parameter.state is not None:
            entry["state"] = number_of(parameter.name, parameter.state)
        parameters.append(entry)
    members: dict[str, Any] = {
        "version": "{}.{}".format(*VERSION),
        **state.unknown,
        "format": FORMAT,
        "optimizers": [{"class": o.class_path, **_given(id=o.id)} for o in state.optimizers],
        "groups": [_encode_group(index, group) for index, group in enumerate(state.groups)],
        "parameters": parameters,
        "states": list(trees.values()),
        "naming": {
            "source": state.naming.source,
            **_given(rule=state.naming.rule, details=encode_value(state.naming.details, "naming", None) or None),
        },
        **_given(global_step=state.global_step, weights=_encode_weights(state.parameters)),
    }
    if state.globals:
        members["globals"] = tree_of(GLOBALS, state.globals, "the global state")
    for name, value in (("origin", state.origin), ("extra", state.extra), ("extensions", state.extensions)):
        if value:
            members[name] = encode_value(value, name, None)
    if shard is not None:
        positions = list(shard.positions)
        members["set"] = {"id": shard.id, "index": shard.index, "count": shard.count, "positions": positions}
    stated = {**members, "digests": {"algorithm": ALGORITHM, "values": []}}  # those come with the bytes
    stored = {key: slot.tensor for key, slot in tensors.items()}
    try:
        decode(stated, stored, stored.__getitem__)
    except FileError as error:
        raise UnrepresentableError(f"the state cannot be written: {error}") from None
    return Manifest(members, tensors)


_Look: TypeAlias = "tuple[tuple[str, Role | Scalar], ...]"


def _look(value: Mapping[str, Value]) -> _Look | None:
    """Return what the JSON of a slot tree is made of, but for its owner; ``None`` for one that is not flat."""
    look: list[tuple[str, Role | Scalar]] = []
    for key, own in value.items():
        if type(own) is Slot:
            look.append((key, own.role))
        elif type(own) is Scalar:
            look.append((key, own))
        else:
            return None
        if type(key) is not str or key.startswith("$"):
            return None
    return tuple(look)


def _given(**members: Any) -> dict[str, Any]:
    """Return the members that are not ``None``."""
    return {key: value for key, value in members.items() if value is not None}


def _encode_parameter(parameter: Parameter) -> dict[str, Any]:
    if not is_text(parameter.name):
        raise UnrepresentableError(
            f"parameter {parameter.name!r} has a name with a lone surrogate, which UTF-8 cannot encode"
        )
    entry: dict[str, Any] = {"name": parameter.name, "shape": list(parameter.shape), "state": None}
    if parameter.dtype is not None:
        entry["dtype"] = parameter.dtype
    if parameter.adapter is not None:
        entry["adapter"] = parameter.adapter
    if parameter.tied:
        entry["tied"] = list(parameter.tied)
    if parameter.foreign_names:
        entry["keys"] = dict(parameter.foreign_names)
    if parameter.original_id is not None:
        entry["id"] = encode_value(parameter.original_id, f"the id of {parameter.name!r}", None)
    return entry


def _encode_group(index: int, group: Group) -> dict[str, Any]:
    options = [[key, encode_value(value, f"option {key!r} of group {index}", None)] for key, value in group.options]
    return {"optimizer": group.optimizer, "count": group.count, "options": options, **_given(name=group.name)}


def _encode_weights(parameters: Iterable[Parameter]) -> dict[str, Any] | None:
    digests = [parameter.weights for parameter in parameters]
    algorithms = sorted({digest.algorithm for digest in digests if digest})
    if len(algorithms) > 1:
        raise UnrepresentableError(f"weights digests of several algorithms: {', '.join(algorithms)}")
    if not algorithms:
        return None
    return {"algorithm": algorithms[0], "values": [digest and [digest.dtype, digest.hex] for digest in digests]}


# --- a state from a manifest --------------------------------------------------------------------------------------


class _Blank(NamedTuple):
    """A slot of a tree that many parameters share: it has no tensor yet."""

    label: str
    role: Role


class _Tree(NamedTuple):
    """A slot tree, decoded and checked, and the labels and roles in it."""

    value: dict[str, Value]
    labels: list[tuple[str, Role]]


class SlotTree(Mapping[str, Value]):
    """A parameter's slots: those of the shared tree, each made for this parameter when it is first asked for."""

    __slots__ = ("_made", "_owner", "_shared", "_tensor")

    def __init__(self, owner: str, shared: dict[str, Value], tensor: Callable[[str], Tensor]) -> None:
        self._owner = owner
        self._shared = shared
        self._tensor = tensor
        self._made: dict[str, Value] = {}

    def _own(self, value: Value) -> Value:
        if isinstance(value, _Blank):
            return Slot(self._tensor(tensor_key(self._owner, value.label)), value.role)
        if isinstance(value, dict):
            return {key: self._own(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._own, value))
        return value

    def __getitem__(self, key: str) -> Value:
        if key not in self._made:
            self._made[key] = self._own(self._shared[key])
        return self._made[key]

    def __contains__(self, key: object) -> bool:
        return key in self._shared

    def __iter__(self) -> Iterator[str]:
        return iter(self._shared)

    def __len__(self) -> int:
        return len(self._shared)

    def __repr__(self) -> str:
        return repr(dict(self))


class Shaped(Protocol):
    """Anything with a shape: all that a manifest asks of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""
        ...


def decode(
    members: dict[str, Any],
    stored: Mapping[str, Shaped],
    tensor: Callable[[str], Tensor],
    *,
    path: object = None,
    resources: tuple[Any, ...] = (),
) -> tuple[OptimizerState, ShardOf | None]:
    """Return the state that a manifest describes, and its place in a set; everything is checked, no tensor is read.

    ``stored`` are the file's tensors by key; ``tensor`` makes one of its key when a slot is asked for. The digests are
    left to ``decode_digests``. Raises ``FileError`` with the id of the broken rule.
    """
    reader = _ManifestReader(path)
    minor = reader.version(members)
    unknown = reader.members(members, strict=minor <= VERSION[1])
    naming = members["naming"]
    shared = _tree(reader, "manifest.globals", members.get("globals", {}))
    parameters = _decode_parameters(reader, members, shared.labels, stored, tensor)
    state = OptimizerState(
        optimizers=tuple(Optimizer(item["class"], item.get("id")) for item in members["optimizers"]),
        groups=_decode_groups(reader, members, len(parameters)),
        parameters=parameters,
        naming=Naming(naming["source"], naming.get("rule"), reader.mapping(naming, "details", "naming")),
        globals=SlotTree(GLOBALS, shared.value, tensor),
        origin=reader.mapping(members, "origin"),
        extra=reader.mapping(members, "extra"),
        extensions=_decode_extensions(reader, members),
        unknown=unknown,
        global_step=members.get("global_step"),
        resources=resources,
    )
    return state, _decode_set(reader, members, len(parameters))


def decode_digests(
    members: dict[str, Any], stored: Collection[str], *, path: object = None
) -> tuple[str, dict[str, str]]:
    """Return the algorithm's name, and the digests of the file's tensors, whose keys are in data order (R20).

    ``members`` have been checked by ``decode``.
    """
    reader = _ManifestReader(path)
    algorithm, values = members["digests"]["algorithm"], members["digests"]["values"]
    if len(values) != len(stored):
        raise reader.fail(f"{len(values)} digests for {len(stored)} tensors", "R20")
    if not {*map(type, values)} <= {str} or not all(map(_pattern(algorithm).fullmatch, values)):
        raise reader.fail(f"digests.values are not all digests by {algorithm!r}", "R20")
    return algorithm, dict(zip(stored, values, strict=True))


class _ManifestReader:
    """Checks that several members need; every error names the member and the rule."""

    def __init__(self, path: object) -> None:
        self.path = path

    def fail(self, detail: str, rule: str) -> FileError:
        return FileError(detail, path=self.path, rule=rule)

    def version(self, members: dict[str, Any]) -> int:
        """Return the minor version of a manifest (R10, R11), looked at before anything else."""
        if members.get("format") != FORMAT:
            raise self.fail(f"manifest.format is {show(members.get('format'))}, expected {show(FORMAT)}", "R10")
        text = members.get("version")
        match = isinstance(text, str) and re.fullmatch(r"(0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,5})", text)
        if not match:
            raise self.fail(f"manifest.version is {show(text)}, expected MAJOR.MINOR", "R11")
        if int(match[1]) != VERSION[0]:
            raise UnsupportedVersionError(
                f"written in version {text} of the format; this package reads version {VERSION[0]}: install one "
                "that reads it",
                path=self.path,
                rule="R11",
            )
        return int(match[2])

    def members(self, manifest: dict[str, Any], *, strict: bool) -> dict[str, Any]:
        """Check that every object has the members that it needs, each of its type (R12), and return the unknown ones.

        Only a newer minor version may have members that version 1.0 does not know. Those of the manifest itself are
        kept, with the version, to be written back; those of objects inside it are listed: a rewriter would lose them.
        """
        top = self._unknown(manifest, "manifest", "manifest", strict)
        nested: set[str] = set()
        for kind in ("naming", "weights", "digests", "set"):
            if kind in manifest:
                nested |= self._unknown(manifest[kind], kind, kind, strict)
        for kind in ("optimizers", "groups", "parameters"):
            forms: set[Any] = set()  # of objects that were found right: most parameters are alike
            for index, item in enumerate(manifest[kind]):
                form = (*item, *map(type, item.values())) if type(item) is dict else None
                if form not in forms:
                    nested |= self._unknown(item, kind, f"{kind}[{index}]", strict)
                    forms.add(form)
        self.natural(manifest.get("global_step", 0), "manifest.global_step")
        unknown: dict[str, Any] = {key: manifest[key] for key in top}
        if nested:
            unknown[NESTED] = sorted(nested)
        return {**unknown, "version": manifest["version"]} if unknown else {}

    def _unknown(self, item: Any, kind: str, where: str, strict: bool) -> set[str]:
        """Return the members of an object that version 1.0 does not know, after the check of those that it knows."""
        if type(item) is not dict:
            raise self.fail(f"{where} is {show(item)}, expected an object", "R12")
        types = MEMBERS[kind]
        for key, value in item.items():
            allowed = types.get(key)
            if allowed and type(value) not in allowed:
                names = " or ".join(TYPES[kind] for kind in allowed)
                raise self.fail(f"{where}.{key} is {show(value)}, expected {names}", "R12")
        if not item.keys() >= REQUIRED[kind]:
            raise self.fail(f"{where} lacks the member {min(REQUIRED[kind] - item.keys())!r}", "R12")
        if item.keys() <= types.keys():
            return set()
        unknown = item.keys() - types.keys()
        if strict:
            raise self.fail(f"{where} has the unknown member {min(unknown)!r}", "R12")
        return {f"{kind}.{key}" for key in unknown} if kind != "manifest" else unknown

    def natural(self, value: int, where: str) -> int:
        if not 0 <= value <= MAX_INT:
            raise self.fail(f"{where} is {value}, expected a natural number", "R12")
        return value

    def value(self, value: Any, where: str) -> Value:
        return decode_value(value, lambda detail: self.fail(f"{where} holds {detail}", "R22"), None)

    def mapping(self, members: Mapping[str, Any], key: str, where: str = "manifest") -> dict[str, Value]:
        """Return a mapping with string keys and without tensors; empty where it is left out."""
        value = self.value(members.get(key, {}), f"{where}.{key}")
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
            raise self.fail(f"{where}.{key} is {show(members[key])}, expected a mapping with string keys", "R12")
        return value


def _decode_extensions(reader: _ManifestReader, members: dict[str, Any]) -> dict[str, Value]:
    extensions = reader.mapping(members, "extensions")
    for name, extension in extensions.items():
        if not isinstance(extension, dict) or not isinstance(extension.get("must_understand"), bool):
            raise reader.fail(f"extension {name!r} does not say whether it must be understood", "R13")
        if extension["must_understand"]:
            raise RefusedError(
                f"extension {name!r} must be understood, and this package does not know it",
                path=reader.path,
                rule="R13",
            )
    return extensions


def _decode_groups(reader: _ManifestReader, members: dict[str, Any], parameters: int) -> tuple[Group, ...]:
    optimizers = len(members["optimizers"])
    groups: list[Group] = []
    for index, item in enumerate(members["groups"]):
        where = f"groups[{index}]"
        options = []
        for pair in item["options"]:
            if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
                raise reader.fail(f"{where}.options holds {show(pair)}, expected pairs of a name and a value", "R12")
            options.append((pair[0], reader.value(pair[1], f"{where}.options {pair[0]!r}")))
        group = Group(
            optimizer=reader.natural(item["optimizer"], f"{where}.optimizer"),
            options=tuple(options),
            count=reader.natural(item["count"], f"{where}.count"),
            name=item.get("name"),
        )
        if len({key for key, _ in options}) != len(options):
            raise reader.fail(f"{where}.options names an option twice", "R15")
        if group.optimizer >= optimizers:
            raise reader.fail(f"{where} belongs to optimizer {group.optimizer}, of {optimizers}", "R15")
        if groups and group.optimizer < groups[-1].optimizer:
            raise reader.fail(f"{where} of optimizer {group.optimizer} follows a group of a later optimizer", "R15")
        groups.append(group)
    counted = sum(group.count for group in groups)
    if counted > parameters:
        raise reader.fail(f"the groups count {counted} parameters, the manifest lists {parameters}", "R15")
    return tuple(groups)


def _decode_parameters(
    reader: _ManifestReader,
    members: dict[str, Any],
    shared: list[tuple[str, Role]],
    stored: Mapping[str, Shaped],
    tensor: Callable[[str], Tensor],
) -> tuple[Parameter, ...]:
    trees = [_tree(reader, f"states[{index}]", tree) for index, tree in enumerate(members["states"])]
    weights = _decode_weights(reader, members)
    parameters = []
    owners = [(GLOBALS, shared)]
    shapes: dict[str, tuple[int, ...]] = {}
    for index, (item, digest) in enumerate(zip(members["parameters"], weights, strict=True)):
        _check_parameter(reader, item, index)
        alike = repr(item["shape"])
        shape = shapes.get(alike)
        if shape is None:
            shape = shapes[alike] = _decode_shape(reader, item["shape"], index)
        name, number = item["name"], item["state"]
        state: Mapping[str, Value] | None = None
        if number is not None:
            if not 0 <= number < len(trees):
                reader.natural(number, f"parameters[{index}].state")
                raise reader.fail(f"parameters[{index}].state is {number}, the table holds {len(trees)}", "R16")
            owners.append((name, trees[number].labels))
            _check_tensors(reader, *owners[-1], shape, stored)
            state = SlotTree(name, trees[number].value, tensor)
        parameters.append(
            Parameter(
                name,
                shape,
                state,
                dtype=item.get("dtype"),
                adapter=item.get("adapter"),
                tied=tuple(item["tied"]) if "tied" in item else (),
                foreign_names=item.get("keys", {}),
                weights=digest,
                original_id=_decode_id(reader, item["id"], index) if "id" in item else None,
            )
        )
    _check_tensors(reader, GLOBALS, shared, None, stored)
    check_names(parameters, path=reader.path)
    # Names and labels differ, so no tensor was found twice, and a count tells whether all were found.
    if sum(len(labels) for _, labels in owners) != len(stored):
        named = {tensor_key(owner, label) for owner, labels in owners for label, _ in labels}
        key = next(key for key in stored if key not in named)
        raise reader.fail(f"tensor {key!r} is in the header, not in the manifest", "R17")
    return tuple(parameters)


def _check_parameter(reader: _ManifestReader, item: dict[str, Any], index: int) -> None:
    """Check the contents of a parameter's members (R12)."""
    if "dtype" in item and item["dtype"] not in BITS:
        raise reader.fail(
            f"parameters[{index}].dtype is {show(item['dtype'])}, which is not a dtype of the format", "R12"
        )
    if "keys" in item and not {*map(type, item["keys"].values())} <= {str}:
        raise reader.fail(f"parameters[{index}].keys is {show(item['keys'])}, expected strings", "R12")
    if "tied" in item and not {*map(type, item["tied"])} <= {str}:
        raise reader.fail(f"parameters[{index}].tied is {show(item['tied'])}, expected strings", "R12")


def _decode_shape(reader: _ManifestReader, shape: list[Any], index: int) -> tuple[int, ...]:
    if not ({*map(type, shape)} <= {int} and (not shape or (min(shape) >= 0 and max(shape) <= MAX_INT))):
        raise reader.fail(f"parameters[{index}].shape is {show(shape)}, expected natural numbers", "R12")
    if len(shape) > MAX_DIMENSIONS:
        raise reader.fail(f"parameters[{index}].shape has {len(shape)} axes, more than {MAX_DIMENSIONS}", "R12")
    return tuple(shape)


def _decode_id(reader: _ManifestReader, value: Any, index: int) -> int | str:
    if type(value) is int:
        return reader.natural(value, f"parameters[{index}].id")
    identity = reader.value(value, f"parameters[{index}].id")
    if not isinstance(identity, (int, str)):
        raise reader.fail(f"parameters[{index}].id is {show(value)}, expected an integer or a string", "R12")
    return identity


def check_names(parameters: Sequence[Parameter], *, path: object = None) -> None:
    """Check that names are not empty, do not begin with ``$``, and mean one parameter each; tied names too (R14)."""
    names: set[str] = set()
    for index, parameter in enumerate(parameters):
        for name in (parameter.name, *parameter.tied):
            if not name or name.startswith("$"):
                detail = f"parameters[{index}] has the name {name!r}: empty, or with '$' in front"
                raise FileError(detail, path=path, rule="R14")
            if name in names:
                raise FileError(f"two parameters have the name {name!r}", path=path, rule="R14")
            names.add(name)


def _tree(reader: _ManifestReader, where: str, tree: Any) -> _Tree:
    """Return a slot tree, checked (R16, R17, R22)."""
    labels: list[tuple[str, Role]] = []

    def slot(label: str, role: Role) -> _Blank:
        if not label or "/" in label:
            raise reader.fail(f"{where} has the label {label!r}: empty, or with '/' in it", "R17")
        labels.append((label, role))
        return _Blank(label, role)

    value = decode_value(tree, lambda detail: reader.fail(f"{where} holds {detail}", "R22"), slot)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise reader.fail(f"{where} is {show(tree)}, expected a mapping with string keys", "R16")
    if len({label for label, _ in labels}) != len(labels):
        raise reader.fail(f"{where} has a label twice", "R17")
    return _Tree(value, labels)


def _check_tensors(
    reader: _ManifestReader,
    owner: str,
    labels: list[tuple[str, Role]],
    parameter: tuple[int, ...] | None,
    stored: Mapping[str, Shaped],
) -> None:
    """Check that the header has the tensor of each label, in a shape that its role allows (R17, R18)."""
    for label, role in labels:
        key = tensor_key(owner, label)
        if key not in stored:
            raise reader.fail(f"tensor {key!r} is in the manifest, not in the header", "R17")
        shape = stored[key].shape
        if shape == parameter != () and role is Role.PARAM:
            continue
        if not shape:
            raise reader.fail(f"tensor {key!r} has no axes: it must be a $scalar", "R18")
        if parameter is not None and not fits(role, shape, parameter):
            raise reader.fail(
                f"tensor {key!r} has shape {list(shape)}, which role '{role.value}' does not allow for a "
                f"parameter of shape {list(parameter)}",
                "R18",
            )


def fits(role: Role, tensor: tuple[int, ...], parameter: tuple[int, ...]) -> bool:
    """Return whether a role allows a tensor's shape (R18)."""
    if role is Role.PARAM:
        return tensor == parameter
    if role is Role.ROW:
        return len(parameter) >= 2 and tensor in (parameter[:-1], (*parameter[:-1], 1))
    if role is Role.COL:
        outer, last = parameter[:-2], parameter[-1:]
        return len(parameter) >= 2 and tensor in ((*outer, *last), (*outer, 1, *last))
    return True


def _decode_weights(reader: _ManifestReader, members: dict[str, Any]) -> Sequence[Digest | None]:
    """Return a digest or ``None`` for each parameter (R19)."""
    count = len(members["parameters"])
    if "weights" not in members:
        return [None] * count
    algorithm, values = members["weights"]["algorithm"], members["weights"]["values"]
    if len(values) != count:
        raise reader.fail(f"{len(values)} weights digests for {count} parameters", "R19")
    pattern = _pattern(algorithm)
    result: list[Digest | None] = []
    for item in values:
        if item is None:
            result.append(None)
            continue
        texts = type(item) is list and [*map(type, item)] == [str, str]
        if not texts or item[0] not in BITS or not pattern.fullmatch(item[1]):
            raise reader.fail(f"weights.values holds {show(item)}, expected null or a dtype and a digest", "R19")
        result.append(Digest(algorithm, *item))
    return result


def _pattern(algorithm: str) -> re.Pattern[str]:
    """Return the pattern of a digest; of an unknown algorithm, that of any bytes in hex."""
    return HEX if algorithm == ALGORITHM else re.compile(r"(?:[0-9a-f]{2})+")


def _decode_set(reader: _ManifestReader, members: dict[str, Any], parameters: int) -> ShardOf | None:
    """Return a shard's place (R23)."""
    if "set" not in members:
        return None
    item = members["set"]
    shard = ShardOf(
        id=item["id"],
        index=reader.natural(item["index"], "set.index"),
        count=reader.natural(item["count"], "set.count"),
        positions=tuple(item["positions"]),
    )
    if not HEX.fullmatch(shard.id):
        raise reader.fail(f"set.id is {show(shard.id)}, expected 32 hex digits", "R23")
    if not 1 <= shard.index <= shard.count:
        raise reader.fail(f"set.index is {shard.index}, of {shard.count} shards", "R23")
    naturals = {n for n in shard.positions if type(n) is int and 0 <= n <= MAX_INT}
    if not len(naturals) == len(shard.positions) == parameters:
        raise reader.fail(f"set.positions has {len(naturals)} different naturals for {parameters} parameters", "R23")
    return shard
