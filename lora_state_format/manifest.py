"""The manifest: JSON <-> the model. ``spec/format.md`` is the text; the comments cite its rules.

Two layers. ``dumps`` and ``loads`` are the canonical JSON that the format allows. ``encode`` and ``decode`` turn an
``OptimizerState`` into a ``Manifest`` and back; tensors appear in it only as labels.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from json.encoder import encode_basestring
from typing import Any, Final

from lora_state_format.errors import FileError, UnrepresentableError, UnsupportedVersionError
from lora_state_format.model import (
    BITS,
    Digest,
    Group,
    Naming,
    Optimizer,
    OptimizerState,
    Parameter,
    Role,
    Scalar,
    Slot,
    Tensor,
    Value,
)

__all__ = [
    "ALGORITHM",
    "FORMAT",
    "VERSION",
    "Manifest",
    "ShardOf",
    "decode",
    "dumps",
    "encode",
    "loads",
    "tensor_key",
]

FORMAT: Final = "named-optimizer-state"
VERSION: Final = (1, 0)
ALGORITHM: Final = "xxh3-128"
GLOBALS: Final = "$globals"
MAX_DEPTH: Final = 64
MAX_INT: Final = 2**53 - 1
MAX_DIMENSIONS: Final = 64
HEX: Final = re.compile(r"[0-9a-f]{32}")


# --- canonical JSON -----------------------------------------------------------------------------------------------


def dumps(value: Any) -> str:
    """Canonical JSON (W1-W3): keys sorted by code point, no spaces, only the needed escapes, ECMAScript floats."""
    out: list[str] = []
    _dump(value, out.append)
    return "".join(out)


def _dump(value: Any, put: Callable[[str], None]) -> None:
    if isinstance(value, str):
        put(encode_basestring(value))
    elif value is None or isinstance(value, bool):
        put({None: "null", True: "true", False: "false"}[value])
    elif isinstance(value, int):
        put(str(value))
    elif isinstance(value, float):
        put(format_float(value))
    elif isinstance(value, dict):
        separator = "{"
        for key in sorted(value):
            put(separator)
            put(encode_basestring(key))
            put(":")
            _dump(value[key], put)
            separator = ","
        put("}" if value else "{}")
    else:
        separator = "["
        for item in value:
            put(separator)
            _dump(item, put)
            separator = ","
        put("]" if value else "[]")


def format_float(value: float) -> str:
    """The shortest digits that read back as ``value``, placed as ECMAScript places them (ECMA-262, Number::toString).

    ``.0`` is appended where the result would read as an integer; minus zero is ``-0.0``.
    """
    text = repr(value)
    mantissa, _, exponent = text.partition("e")
    sign = "-" if mantissa.startswith("-") else ""
    whole, _, fraction = mantissa.lstrip("-").partition(".")
    digits = (whole + fraction).lstrip("0")
    point = len(whole) + int(exponent or 0) - (len(whole + fraction) - len(digits))
    digits = digits.rstrip("0")
    if not digits:
        return sign + "0.0"
    if len(digits) <= point <= 21:
        return sign + digits.ljust(point, "0") + ".0"
    if 0 < point <= 21:
        return sign + digits[:point] + "." + digits[point:]
    if -6 < point <= 0:
        return sign + "0." + "0" * -point + digits
    return f"{sign}{digits[0]}{'.' + digits[1:] if len(digits) > 1 else ''}e{point - 1:+d}"


def loads(text: str, *, path: object = None) -> Any:
    """Strict JSON (R3): no duplicate keys, no NaN or Infinity, no lone surrogates, no number out of range."""

    def fail(detail: str) -> FileError:
        return FileError(detail, path=path, rule="R3")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            seen: set[str] = set()
            for key, _ in items:
                if key in seen:
                    raise fail(f"the key {key!r} occurs twice in one JSON object")
                seen.add(key)
        return result

    def constant(name: str) -> None:
        raise fail(f"JSON with the constant {name}")

    def number(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            raise fail(f"JSON with the number {digits[:40]}, which no float holds")
        return value

    def integer(digits: str) -> int:
        if len(digits) > 17 or not -MAX_INT <= (value := int(digits)) <= MAX_INT:
            raise fail(f"JSON with the integer {digits[:40]}, which is beyond 2^53")
        return value

    try:
        result = json.loads(
            text, object_pairs_hook=pairs, parse_constant=constant, parse_float=number, parse_int=integer
        )
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(result, ensure_ascii=False).encode()
    except RecursionError:
        raise fail(f"JSON nested deeper than {MAX_DEPTH} levels") from None
    except UnicodeEncodeError:
        raise fail("JSON with a lone surrogate") from None
    except json.JSONDecodeError as error:
        raise fail(f"not JSON: {error.msg} at character {error.pos}") from None
    return result


# --- typed values -------------------------------------------------------------------------------------------------


def encode_value(value: Value, place: str, tensors: dict[str, Slot] | None, path: tuple[Any, ...] = ()) -> Any:
    """A value tree as JSON. Tensors are entered into ``tensors`` under their labels; ``None`` refuses them.

    Raises ``UnrepresentableError`` naming ``place`` and the path in it.
    """

    def refuse(what: str) -> UnrepresentableError:
        where = f"{place}: {'.'.join(map(str, path))}" if path else place
        return UnrepresentableError(f"{where} holds {what}, which the format has no form for")

    if len(path) > MAX_DEPTH // 4:
        raise refuse("values nested too deep")
    if value is None or isinstance(value, (bool, str)):
        if isinstance(value, str) and not _is_text(value):
            raise refuse("a string with a lone surrogate")
        return value
    if type(value) is int:
        return value if -MAX_INT <= value <= MAX_INT else {"$int": str(value)}
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": "nan" if value != value else f"{value}"}
    if isinstance(value, bytes):
        return {"$bytes": value.hex()}
    if isinstance(value, Scalar):
        return {"$scalar": [value.dtype, value.data.hex()]}
    if isinstance(value, Slot):
        if tensors is None:
            raise refuse("a tensor")
        label = _label(path, tensors)
        tensors[label] = value
        return {"$tensor": label, "role": value.role.value}
    if isinstance(value, (tuple, list)):
        items = [encode_value(item, place, tensors, (*path, index)) for index, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {
                encode_value(key, place, None, path): encode_value(value[key], place, tensors, (*path, key))
                for key in sorted(value)
            }
        return {
            "$dict": [
                [encode_value(key, place, None, path), encode_value(item, place, tensors, (*path, key))]
                for key, item in value.items()
            ]
        }
    raise refuse(f"a {type(value).__module__}.{type(value).__qualname__}")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _label(path: tuple[Any, ...], taken: Mapping[str, Slot]) -> str:
    """W6: the path joined with dots, ``/`` as ``_``, made unique by a number."""
    base = ".".join(str(part) for part in path).replace("/", "_") or "tensor"
    label, number = base, 1
    while label in taken:
        number += 1
        label = f"{base}~{number}"
    return label


def decode_value(value: Any, fail: Callable[[str], FileError], tensor: Callable[[str, Role], Slot] | None) -> Value:
    """JSON as a value tree (R18). ``tensor`` makes a slot of a label; ``None`` refuses tensors."""
    return _decode(value, fail, tensor, MAX_DEPTH)


def _decode(
    value: Any, fail: Callable[[str], FileError], tensor: Callable[[str, Role], Slot] | None, depth: int
) -> Value:
    if depth == 0:
        raise FileError(f"{fail('').detail}values nested deeper than {MAX_DEPTH} levels", path=fail("").path, rule="R3")
    if isinstance(value, list):
        return [_decode(item, fail, tensor, depth - 1) for item in value]
    if not isinstance(value, dict):
        scalar: Value = value
        return scalar
    tags = [key for key in value if key.startswith("$")]
    if not tags:
        return {key: _decode(item, fail, tensor, depth - 1) for key, item in value.items()}
    tag, body = tags[0], value[tags[0]]
    if set(value) != ({"$tensor", "role"} if tag == "$tensor" else {tag}):
        raise fail(f"an object with the members {sorted(value)}")
    match tag, body:
        case "$tuple", list():
            return tuple(_decode(item, fail, tensor, depth - 1) for item in body)
        case "$float", "inf" | "-inf" | "nan":
            return float(body)
        case "$int", str() if re.fullmatch(r"-?[1-9][0-9]{15,999}", body) and not -MAX_INT <= int(body) <= MAX_INT:
            return int(body)
        case "$bytes", str() if re.fullmatch(r"(?:[0-9a-f]{2})*", body):
            return bytes.fromhex(body)
        case "$scalar", [str(dtype), str(data)] if (
            BITS.get(dtype, 0) >= 8 and re.fullmatch(r"[0-9a-f]*", data) and len(data) * 4 == BITS[dtype]
        ):
            return Scalar(dtype, bytes.fromhex(data))
        case "$dict", list():
            return _decode_dict(body, fail, tensor, depth)
        case "$tensor", str() if tensor is not None and value["role"] in tuple(Role):
            return tensor(body, Role(value["role"]))
    raise fail(f"{tag} with {dumps(body)[:60]}")


def _decode_dict(
    body: list[Any], fail: Callable[[str], FileError], tensor: Callable[[str, Role], Slot] | None, depth: int
) -> Value:
    result: dict[Any, Value] = {}
    for pair in body:
        if not isinstance(pair, list) or len(pair) != 2:
            raise fail(f"$dict with {dumps(pair)[:60]}")
        key = _decode(pair[0], fail, None, depth - 1)
        if not (key is None or isinstance(key, (bool, int, float, str, tuple))) or _same_key(result, key):
            raise fail(f"$dict with the key {dumps(pair[0])[:60]}")
        result[key] = _decode(pair[1], fail, tensor, depth - 1)
    return result


def _same_key(mapping: Mapping[Any, Value], key: Any) -> bool:
    try:
        return key in mapping
    except TypeError:
        return True


# --- the manifest -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ShardOf:
    """A shard's place: ``index`` (from 1) of ``count`` in the set ``id``; ``positions`` of its parameters."""

    id: str
    index: int
    count: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """A state as JSON-able members, and the tensors it names, parameter by parameter, in manifest order.

    ``tensors`` maps a tensor key to its slot; ``members`` lacks ``digests`` until the tensors' bytes have been seen.
    """

    members: dict[str, Any]
    tensors: dict[str, Slot]


def tensor_key(owner: str, label: str) -> str:
    """The name of a tensor in the file; composed, never split."""
    return f"{owner}/{label}"


def encode(state: OptimizerState, shard: ShardOf | None = None) -> Manifest:
    """The members of a state's manifest. Members that equal their default are left out (W4).

    Raises ``UnrepresentableError`` for values that the format has no form for.
    """
    tensors: dict[str, Slot] = {}
    states: dict[str, int] = {}
    trees: list[Any] = []
    parameters = []
    for parameter in state.parameters:
        if not parameter.name or parameter.name.startswith("$") or not _is_text(parameter.name):
            raise UnrepresentableError(f"parameter {parameter.name!r}: a name is text that does not begin with '$'")
        entry: dict[str, Any] = {"name": parameter.name, "shape": list(parameter.shape), "state": None}
        if parameter.dtype is not None:
            entry["dtype"] = parameter.dtype
        if parameter.adapter is not None:
            entry["adapter"] = parameter.adapter
        if parameter.tied:
            entry["tied"] = list(parameter.tied)
        if parameter.keys:
            entry["keys"] = dict(parameter.keys)
        if parameter.original_id is not None:
            entry["id"] = encode_value(parameter.original_id, f"the id of '{parameter.name}'", None)
        if parameter.state is not None:
            own: dict[str, Slot] = {}
            tree = encode_value(dict(parameter.state), f"the state of '{parameter.name}'", own)
            text = dumps(tree)
            if text not in states:
                states[text] = len(trees)
                trees.append(tree)
            entry["state"] = states[text]
            tensors.update((tensor_key(parameter.name, label), own[label]) for label in sorted(own))
        parameters.append(entry)
    members: dict[str, Any] = {
        **state.unknown,
        "format": FORMAT,
        "version": "{}.{}".format(*VERSION),
        "optimizers": [{"class": o.class_path, **({} if o.id is None else {"id": o.id})} for o in state.optimizers],
        "groups": [_encode_group(index, group) for index, group in enumerate(state.groups)],
        "parameters": parameters,
        "states": trees,
        "naming": {
            "source": state.naming.source,
            **({} if state.naming.rule is None else {"rule": state.naming.rule}),
            **({} if not state.naming.details else {"details": encode_value(state.naming.details, "naming", None)}),
        },
    }
    if state.globals:
        own = {}
        members["globals"] = encode_value(state.globals, "the global state", own)
        tensors.update((tensor_key(GLOBALS, label), own[label]) for label in sorted(own))
    for name, value in (("origin", state.origin), ("extra", state.extra), ("extensions", state.extensions)):
        if value:
            members[name] = encode_value(value, name, None)
    if state.global_step is not None:
        members["global_step"] = state.global_step
    if any(parameter.weights for parameter in state.parameters):
        algorithms = {p.weights.algorithm for p in state.parameters if p.weights}
        if len(algorithms) > 1:
            raise UnrepresentableError(f"weights digests of several algorithms: {', '.join(sorted(algorithms))}")
        members["weights"] = {
            "algorithm": algorithms.pop(),
            "values": [p.weights and [p.weights.dtype, p.weights.hex] for p in state.parameters],
        }
    if shard is not None:
        members["set"] = {"id": shard.id, "index": shard.index, "count": shard.count}
        members["positions"] = list(shard.positions)
    return Manifest(members, tensors)


def _encode_group(index: int, group: Group) -> dict[str, Any]:
    return {
        "optimizer": group.optimizer,
        "count": group.count,
        "options": [
            [key, encode_value(value, f"option '{key}' of group {index}", None)] for key, value in group.options
        ],
        **({} if group.name is None else {"name": group.name}),
    }


class _Reader:
    """Typed access to JSON members; every complaint names the member and the rule."""

    def __init__(self, path: object) -> None:
        self.path = path

    def fail(self, detail: str, rule: str) -> FileError:
        return FileError(detail, path=self.path, rule=rule)

    def get(self, members: Any, key: str, kind: type | tuple[type, ...], where: str, *default: Any) -> Any:
        """``members[key]`` of a type, bool not being int. Without a default the member is required (R12)."""
        if not isinstance(members, dict):
            raise self.fail(f"{where} is not a JSON object", "R12")
        if key not in members:
            if default:
                return default[0]
            raise self.fail(f"{where} lacks the member '{key}'", "R12")
        value = members[key]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise self.fail(f"{where}.{key} is {dumps(value)[:60]}, expected {names}", "R12")
        return value

    def natural(self, members: Any, key: str, where: str, *default: Any) -> Any:
        value = self.get(members, key, int, where, *default)
        if value is not None and value < 0:
            raise self.fail(f"{where}.{key} is {value}, expected a natural number", "R12")
        return value

    def texts(self, value: Any, where: str) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fail(f"{where} is {dumps(value)[:60]}, expected a list of strings", "R12")
        return tuple(value)

    def value(self, value: Any, where: str) -> Value:
        return decode_value(value, lambda detail: self.fail(f"{where}: {detail}", "R18"), None)

    def mapping(self, members: Any, key: str) -> dict[str, Value]:
        value = self.value(self.get(members, key, dict, "manifest", {}), f"manifest.{key}")
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
            raise self.fail(f"manifest.{key} is not a mapping with string keys", "R12")
        return value


KNOWN: Final = {
    "manifest": {
        "format", "version", "optimizers", "groups", "parameters", "states", "naming", "globals", "origin", "extra",
        "extensions", "global_step", "weights", "digests", "set", "positions",
    },
    "parameters": {"name", "shape", "dtype", "adapter", "tied", "keys", "id", "state"},
    "groups": {"optimizer", "count", "options", "name"},
    "optimizers": {"class", "id"},
}  # fmt: skip


class SlotTree(Mapping[str, Value]):
    """A parameter's slots, made from the shared tree when they are first asked for."""

    __slots__ = ("_made", "_make")

    def __init__(self, make: Callable[[], dict[str, Value]]) -> None:
        self._make: Callable[[], dict[str, Value]] | None = make
        self._made: dict[str, Value] = {}

    def _get(self) -> dict[str, Value]:
        if self._make is not None:
            self._made, self._make = self._make(), None
        return self._made

    def __getitem__(self, key: str) -> Value:
        return self._get()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._get())

    def __len__(self) -> int:
        return len(self._get())

    def __repr__(self) -> str:
        return repr(self._get())


def decode(
    members: Any, tensors: Mapping[str, Tensor], *, path: object = None, resources: tuple[Any, ...] = ()
) -> tuple[OptimizerState, ShardOf | None]:
    """The state that a manifest describes over the tensors of its file; everything is checked, nothing is read.

    ``tensors`` stand in data order. Raises ``FileError`` with the id of the broken rule.
    """
    r = _Reader(path)
    if r.get(members, "format", str, "manifest") != FORMAT:
        raise r.fail(f"manifest.format is {members['format']!r}, expected {FORMAT!r}", "R10")
    minor = _check_version(r, r.get(members, "version", str, "manifest"))
    nested = [] if minor <= VERSION[1] else _unknown_nested(members)
    for where, item in _objects(r, members):
        unknown = set(item) - KNOWN[where.partition("[")[0]]
        if unknown and minor <= VERSION[1]:
            raise r.fail(f"{where} has the unknown member '{min(unknown)}'", "R12")
    extensions = r.mapping(members, "extensions")
    for name, extension in extensions.items():
        if not isinstance(extension, dict) or not isinstance(extension.get("must_understand"), bool):
            raise r.fail(f"extension '{name}' does not say whether it must be understood", "R13")
        if extension["must_understand"]:
            raise r.fail(f"extension '{name}' must be understood, and is not known here", "R13")

    optimizers = tuple(
        Optimizer(
            r.get(item, "class", (str, type(None)), f"optimizers[{index}]"),
            r.get(item, "id", str, f"optimizers[{index}]", None),
        )
        for index, item in enumerate(r.get(members, "optimizers", list, "manifest"))
    )
    parameters = _decode_parameters(r, members, tensors)
    groups = _decode_groups(r, members, len(optimizers), len(parameters))
    naming = r.get(members, "naming", dict, "manifest")
    details = r.value(r.get(naming, "details", dict, "naming", {}), "naming.details")
    assert isinstance(details, dict)
    unknown_members = {key: value for key, value in members.items() if key not in KNOWN["manifest"]}
    r.value(list(unknown_members.values()), "manifest")
    if nested:
        unknown_members["$nested"] = nested
    state = OptimizerState(
        optimizers=optimizers,
        groups=groups,
        parameters=parameters,
        naming=Naming(r.get(naming, "source", str, "naming"), r.get(naming, "rule", str, "naming", None), details),
        globals=_decode_globals(r, members, tensors),
        origin=r.mapping(members, "origin"),
        extra=r.mapping(members, "extra"),
        extensions=extensions,
        unknown=unknown_members,
        global_step=r.natural(members, "global_step", "manifest", None),
        resources=resources,
    )
    return state, _decode_set(r, members, len(parameters))


def _check_version(r: _Reader, text: str) -> int:
    match = re.fullmatch(r"(0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,5})", text)
    if not match:
        raise r.fail(f"manifest.version is {text!r}, expected MAJOR.MINOR", "R11")
    major, minor = int(match[1]), int(match[2])
    if major != VERSION[0]:
        raise UnsupportedVersionError(
            f"written in version {text} of the format; this package reads version {VERSION[0]}: install a newer one",
            path=r.path,
            rule="R11",
        )
    return minor


def _objects(r: _Reader, members: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for kind in ("optimizers", "groups", "parameters"):
        for index, item in enumerate(r.get(members, kind, list, "manifest")):
            if not isinstance(item, dict):
                raise r.fail(f"{kind}[{index}] is not a JSON object", "R12")
            yield f"{kind}[{index}]", item


def _unknown_nested(members: dict[str, Any]) -> list[str]:
    """Members of a newer minor version inside objects of this one: readable, but a rewriter would lose them."""
    return sorted(
        {
            f"{kind}[].{key}"
            for kind in ("optimizers", "groups", "parameters")
            for item in members.get(kind, [])
            if isinstance(item, dict)
            for key in set(item) - KNOWN[kind]
        }
    )


def _decode_groups(r: _Reader, members: dict[str, Any], optimizers: int, parameters: int) -> tuple[Group, ...]:
    groups: list[Group] = []
    for index, item in enumerate(members["groups"]):
        where = f"groups[{index}]"
        options = []
        for pair in r.get(item, "options", list, where):
            if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
                raise r.fail(f"{where}.options holds {dumps(pair)[:60]}, expected pairs of a name and a value", "R12")
            options.append((pair[0], r.value(pair[1], f"{where}.options '{pair[0]}'")))
        if len({key for key, _ in options}) != len(options):
            raise r.fail(f"{where}.options names an option twice", "R16")
        group = Group(
            optimizer=r.natural(item, "optimizer", where),
            options=tuple(options),
            count=r.natural(item, "count", where),
            name=r.get(item, "name", str, where, None),
        )
        if group.optimizer >= optimizers:
            raise r.fail(f"{where} belongs to optimizer {group.optimizer}, of {optimizers}", "R16")
        if groups and group.optimizer < groups[-1].optimizer:
            raise r.fail(f"{where} of optimizer {group.optimizer} stands behind one of a later optimizer", "R16")
        groups.append(group)
    counted = sum(group.count for group in groups)
    if counted > parameters:
        raise r.fail(f"the groups count {counted} parameters, the manifest lists {parameters}", "R16")
    return tuple(groups)


def _decode_parameters(r: _Reader, members: dict[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Parameter, ...]:
    trees = r.get(members, "states", list, "manifest")
    layouts = [_layout(r, index, tree) for index, tree in enumerate(trees)]
    weights = _decode_weights(r, members)
    claimed: set[str] = set()
    names: set[str] = set()
    parameters = []
    if weights and len(weights) != len(members["parameters"]):
        raise r.fail(f"{len(weights)} weights digests for {len(members['parameters'])} parameters", "R20")
    for index, item in enumerate(members["parameters"]):
        where = f"parameters[{index}]"
        name = r.get(item, "name", str, where)
        if not name or name.startswith("$"):
            raise r.fail(f"{where}.name is {name!r}: a name is not empty and does not begin with '$'", "R14")
        if name in names:
            raise r.fail(f"parameter '{name}' is listed twice", "R14")
        names.add(name)
        shape = r.get(item, "shape", list, where)
        if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
            raise r.fail(f"{where}.shape is {dumps(shape)[:60]}, expected a list of natural numbers", "R12")
        dtype = r.get(item, "dtype", str, where, None)
        if dtype is not None and dtype not in BITS:
            raise r.fail(f"{where}.dtype is {dtype!r}, which is not a dtype", "R12")
        keys = r.get(item, "keys", dict, where, {})
        r.texts(list(keys.values()), f"{where}.keys")
        number = r.get(item, "state", (int, type(None)), where)
        state: Mapping[str, Value] | None = None
        if number is not None:
            if not 0 <= number < len(trees):
                raise r.fail(f"{where}.state is {number}, the table holds {len(trees)}", "R15")
            for label, role in layouts[number]:
                key = tensor_key(name, label)
                _check_slot(r, key, role, tuple(shape), tensors, claimed)
            state = SlotTree(_maker(r, name, trees[number], tensors))
        parameters.append(
            Parameter(
                name=name,
                shape=tuple(shape),
                state=state,
                dtype=dtype,
                adapter=r.get(item, "adapter", str, where, None),
                tied=r.texts(r.get(item, "tied", list, where, []), f"{where}.tied"),
                keys=keys,
                weights=weights[index] if weights else None,
                original_id=_decode_id(r, item.get("id"), where),
            )
        )
    for parameter in parameters:
        for other in parameter.tied:
            if other in names:
                raise r.fail(f"'{other}' is tied to '{parameter.name}', and a parameter of its own", "R14")
    for key, _ in _layout(r, None, members.get("globals", {})):
        if tensor_key(GLOBALS, key) not in tensors:
            raise r.fail(f"tensor '{tensor_key(GLOBALS, key)}' is in the manifest, not in the header", "R17")
        claimed.add(tensor_key(GLOBALS, key))
    for key in tensors:
        if key not in claimed:
            raise r.fail(f"tensor '{key}' is in the header, not in the manifest", "R17")
    return tuple(parameters)


def _maker(r: _Reader, owner: str, tree: Any, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Value]]:
    def make() -> dict[str, Value]:
        value = decode_value(
            tree,
            lambda detail: r.fail(detail, "R18"),
            lambda label, role: Slot(tensors[tensor_key(owner, label)], role),
        )
        assert isinstance(value, dict)
        return value

    return make


def _layout(r: _Reader, index: int | None, tree: Any) -> list[tuple[str, Role]]:
    """The labels and roles of a slot tree, which is decoded once to check it."""
    where = "manifest.globals" if index is None else f"states[{index}]"
    labels: list[tuple[str, Role]] = []

    def tensor(label: str, role: Role) -> Slot:
        if not label or "/" in label:
            raise r.fail(f"{where}: {label!r} is no label: not empty, without '/'", "R17")
        labels.append((label, role))
        return Slot(Tensor("U8", (0,), ()), role)

    value = decode_value(tree, lambda detail: r.fail(f"{where}: {detail}", "R18"), tensor)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise r.fail(f"{where} is not a mapping with string keys", "R15")
    if len(set(labels)) != len(labels) or len({label for label, _ in labels}) != len(labels):
        raise r.fail(f"{where} uses a label twice", "R17")
    return labels


def _check_slot(
    r: _Reader, key: str, role: Role, shape: tuple[int, ...], tensors: Mapping[str, Tensor], claimed: set[str]
) -> None:
    tensor = tensors.get(key)
    if tensor is None:
        raise r.fail(f"tensor '{key}' is in the manifest, not in the header", "R17")
    if key in claimed:
        raise r.fail(f"tensor '{key}' belongs to two slots", "R17")
    claimed.add(key)
    if not fits(role, tensor.shape, shape):
        raise r.fail(
            f"tensor '{key}' has shape {list(tensor.shape)}, which the role '{role.value}' of a parameter of shape "
            f"{list(shape)} does not have",
            "R19",
        )


def fits(role: Role, tensor: tuple[int, ...], parameter: tuple[int, ...]) -> bool:
    """R19: what a role says about a tensor's shape."""
    if role is Role.PARAM:
        return tensor == parameter
    if role is Role.ROW:
        return len(parameter) >= 2 and tensor in (parameter[:-1], (*parameter[:-1], 1))
    if role is Role.COL:
        return len(parameter) >= 2 and tensor in (
            (*parameter[:-2], parameter[-1]),
            (*parameter[:-2], 1, parameter[-1]),
        )
    return True


def _decode_id(r: _Reader, value: Any, where: str) -> int | str | None:
    identity = r.value(value, f"{where}.id")
    if isinstance(identity, bool) or not (identity is None or isinstance(identity, (int, str))):
        raise r.fail(f"{where}.id is {dumps(value)[:60]}, expected an integer or a string", "R12")
    return identity


def _decode_weights(r: _Reader, members: dict[str, Any]) -> list[Digest | None]:
    if "weights" not in members:
        return []
    algorithm = r.get(members["weights"], "algorithm", str, "weights")
    result: list[Digest | None] = []
    for item in r.get(members["weights"], "values", list, "weights"):
        match item:
            case None:
                result.append(None)
            case [str(dtype), str(digits)] if dtype in BITS and HEX.fullmatch(digits):
                result.append(Digest(algorithm, dtype, digits))
            case _:
                raise r.fail(f"weights.values holds {dumps(item)[:60]}, expected null or [dtype, 32 hex digits]", "R20")
    return result


def _decode_globals(r: _Reader, members: dict[str, Any], tensors: Mapping[str, Tensor]) -> Mapping[str, Value]:
    if "globals" not in members:
        return {}
    return _maker(r, GLOBALS, members["globals"], tensors)()


def decode_digests(members: Any, tensors: Mapping[str, Tensor], *, path: object = None) -> dict[str, Tensor]:
    """The tensors, each with the digest that the manifest states for it (R21)."""
    r = _Reader(path)
    digests = r.get(members, "digests", dict, "manifest")
    algorithm = r.get(digests, "algorithm", str, "digests")
    values = r.texts(r.get(digests, "values", list, "digests"), "digests.values")
    if len(values) != len(tensors):
        raise r.fail(f"{len(values)} digests for {len(tensors)} tensors", "R21")
    for value in values:
        if not HEX.fullmatch(value):
            raise r.fail(f"digests.values holds {value[:60]!r}, expected 32 hex digits", "R21")
    return {
        key: replace(tensor, digest=Digest(algorithm, tensor.dtype, value))
        for (key, tensor), value in zip(tensors.items(), values, strict=True)
    }


def _decode_set(r: _Reader, members: dict[str, Any], parameters: int) -> ShardOf | None:
    if ("set" in members) != ("positions" in members):
        raise r.fail("manifest has only one of the members 'set' and 'positions'", "R22")
    if "set" not in members:
        return None
    item, positions = r.get(members, "set", dict, "manifest"), r.get(members, "positions", list, "manifest")
    shard = ShardOf(
        id=r.get(item, "id", str, "set"),
        index=r.natural(item, "index", "set"),
        count=r.natural(item, "count", "set"),
        positions=tuple(positions),
    )
    if not HEX.fullmatch(shard.id):
        raise r.fail(f"set.id is {shard.id[:60]!r}, expected 32 hex digits", "R22")
    if not 1 <= shard.index <= shard.count:
        raise r.fail(f"shard {shard.index} of {shard.count}", "R22")
    if len(positions) != parameters:
        raise r.fail(f"{len(positions)} positions for {parameters} parameters", "R22")
    if not all(type(n) is int and n >= 0 for n in positions) or len(set(positions)) != len(positions):
        raise r.fail("positions are not distinct natural numbers", "R22")
    return shard


def check_rewritable(state: OptimizerState) -> None:
    """Raise ``UnrepresentableError`` for a state read from a newer minor version with members that would be lost."""
    nested: Iterable[Any] = state.unknown.get("$nested", ())  # type: ignore[assignment]
    if nested:
        raise UnrepresentableError(
            f"the state was written by a newer version, and has members that would be lost: {', '.join(nested)}"
        )
