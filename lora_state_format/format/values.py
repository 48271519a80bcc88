"""Typed values as JSON (W8 of ``spec/format.md``), and back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from lora_state_format.errors import FileError, UnrepresentableError
from lora_state_format.io.strict_json import dumps
from lora_state_format.model.dtypes import BITS
from lora_state_format.model.states import (
    Role,
    Scalar,
    Slot,
    Value,
)
from lora_state_format.model.text import class_path

__all__ = ["decode_value", "encode_value"]

MAX_NESTING: Final = 16
"""Mappings, lists and tuples inside each other in a value; each is at most three levels of JSON."""

MAX_INT: Final = 2**53 - 1
"""Largest magnitude of an integer that is written as a JSON number."""

MAX_DIGITS: Final = 1000
"""Decimal digits of an integer."""

ROLES: Final[Mapping[str, Role]] = {role.value: role for role in Role}

Fail: TypeAlias = "Callable[[str], FileError]"

MakeSlot: TypeAlias = "Callable[[str, Role], Value]"


# --- typed values -------------------------------------------------------------------------------------------------


def encode_value(value: Value, place: str, tensors: dict[str, Slot] | None, path: tuple[Any, ...] = ()) -> Any:
    """Return a value tree as JSON (W8).

    Types are exact: a subclass would come back as its base.

    Args:
        value: The tree.
        place: Its owner, for messages.
        tensors: Receives the tensors by label; ``None`` refuses tensors.
        path: The keys that lead to ``value`` from the root of the tree.

    Raises ``UnrepresentableError`` naming ``place`` and the path in it.
    """
    kind = type(value)
    encode = _ATOMS.get(kind)
    if encode is not None:
        return encode(value, place, path)
    if isinstance(value, Slot):
        if tensors is None:
            raise _refusal("a tensor", place, path)
        label = _label(path, tensors)
        tensors[label] = value
        return {"$tensor": label, "role": value.role.value}
    if len(path) == MAX_NESTING:
        raise _refusal(f"values nested deeper than {MAX_NESTING} levels", place, path)
    if kind is list or kind is tuple:
        items = [encode_value(item, place, tensors, (*path, index)) for index, item in enumerate(value)]  # type: ignore[arg-type]
        return items if kind is list else {"$tuple": items}
    if isinstance(value, Mapping):
        return _encode_mapping(value, place, tensors, path)
    raise _refusal(f"a {class_path(kind)}", place, path)


def _refusal(what: str, place: str, path: tuple[Any, ...]) -> UnrepresentableError:
    where = f"{place}: {'.'.join(map(str, path))}" if path else place
    return UnrepresentableError(f"{where} holds {what}, which the format cannot hold")


def _encode_same(value: Any, place: str, path: tuple[Any, ...]) -> Any:
    return value


def _encode_text(value: str, place: str, path: tuple[Any, ...]) -> str:
    if not is_text(value):
        raise _refusal("a string with a lone surrogate", place, path)
    return value


def _encode_int(value: int, place: str, path: tuple[Any, ...]) -> Any:
    if -MAX_INT <= value <= MAX_INT:
        return value
    if abs(value) >= 10**MAX_DIGITS:
        raise _refusal(f"an integer of more than {MAX_DIGITS} digits", place, path)
    return {"$int": str(value)}


def _encode_float(value: float, place: str, path: tuple[Any, ...]) -> Any:
    return value if math.isfinite(value) else {"$float": "nan" if value != value else f"{value}"}


def _encode_bytes(value: bytes, place: str, path: tuple[Any, ...]) -> Any:
    return {"$bytes": value.hex()}


def _encode_scalar(value: Scalar, place: str, path: tuple[Any, ...]) -> Any:
    return {"$scalar": [value.dtype, value.data.hex()]}


_ATOMS: Final[Mapping[type, Callable[[Any, str, tuple[Any, ...]], Any]]] = {
    type(None): _encode_same,
    bool: _encode_same,
    str: _encode_text,
    int: _encode_int,
    float: _encode_float,
    bytes: _encode_bytes,
    Scalar: _encode_scalar,
}
"""Exact type of a value that holds no others -> how it is encoded."""


def _encode_mapping(
    value: Mapping[Any, Value], place: str, tensors: dict[str, Slot] | None, path: tuple[Any, ...]
) -> Any:
    plain = True
    for key in value:
        if type(key) is str:
            _encode_text(key, place, path)
            plain = plain and not key.startswith("$")
        elif _is_key(key):
            plain = False
        else:
            raise _refusal(f"the key {key!r}", place, path)
    if plain:
        return {key: encode_value(value[key], place, tensors, (*path, key)) for key in sorted(value)}
    keys = sorted(((encode_value(key, place, None, path), key) for key in value), key=lambda pair: dumps(pair[0]))
    return {"$dict": [[text, encode_value(value[key], place, tensors, (*path, key))] for text, key in keys]}


def is_text(value: str) -> bool:
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_key(value: Any) -> bool:
    """Return whether a value may be a mapping's key (R22): null, boolean, number, string, or a tuple of keys."""
    if type(value) is tuple:
        return all(map(_is_key, value))
    return value is None or type(value) in (bool, int, float, str)


def _label(path: tuple[Any, ...], taken: Mapping[str, Slot]) -> str:
    """Return a label (W6): the path joined with dots, ``/`` as ``_``, made unique by a number; other keys as JSON."""
    parts = [part if isinstance(part, str) else dumps(encode_value(part, "", None)) for part in path]
    base = ".".join(parts).replace("/", "_") or "tensor"
    label, number = base, 1
    while label in taken:
        number += 1
        label = f"{base}~{number}"
    return label


def decode_value(value: Any, fail: Fail, slot: MakeSlot | None) -> Value:
    """Return JSON as a value tree (R22).

    Args:
        value: The JSON, parsed.
        fail: Makes the error to raise, of what is wrong.
        slot: Makes a tensor, of its label and role; ``None`` refuses tensors.
    """
    if isinstance(value, list):
        return [decode_value(item, fail, slot) for item in value]
    if not isinstance(value, dict):
        if type(value) is int and not -MAX_INT <= value <= MAX_INT:
            raise fail(f"the integer {value} as a number")
        scalar: Value = value
        return scalar
    tag = next((key for key in value if key.startswith("$")), None)
    if tag is None:
        return {key: decode_value(item, fail, slot) for key, item in value.items()}
    if value.keys() != ({"$tensor", "role"} if tag == "$tensor" else {tag}):
        raise fail(f"an object with the members {show(sorted(value))}")
    return _decode_tagged(tag, value, fail, slot)


def _decode_tagged(tag: str, value: dict[str, Any], fail: Fail, slot: MakeSlot | None) -> Value:
    """Return what an object with a ``$`` tag means."""
    body = value[tag]
    match tag, body:
        case "$tensor", str() if slot is not None and isinstance(value["role"], str) and value["role"] in ROLES:
            return slot(body, ROLES[value["role"]])
        case "$scalar", [str(dtype), str(data)] if _is_scalar(dtype, data):
            return Scalar(dtype, bytes.fromhex(data))
        case "$tuple", list():
            return tuple(decode_value(item, fail, slot) for item in body)
        case "$dict", list():
            return _decode_dict(body, fail, slot)
        case "$float", "inf" | "-inf" | "nan":
            return float(body)
        case "$int", str() if _is_large_int(body):
            return int(body)
        case "$bytes", str() if re.fullmatch(r"(?:[0-9a-f]{2})*", body):
            return bytes.fromhex(body)
    raise fail(f"{show(value)}, which is not a typed value" if slot or tag != "$tensor" else f"the tensor {show(body)}")


def _is_scalar(dtype: str, data: str) -> bool:
    """Return whether ``data`` are the hexadecimal digits of one element of a dtype of whole bytes."""
    bits = BITS.get(dtype, 0)
    return bits >= 8 and len(data) * 4 == bits and re.fullmatch(r"[0-9a-f]*", data) is not None


def _is_large_int(text: str) -> bool:
    """Return whether a text is an integer in the one form of those beyond ``MAX_INT``."""
    short = len(text) <= MAX_DIGITS + 1 and re.fullmatch(r"-?[1-9][0-9]{15,999}", text)
    return bool(short) and abs(int(text)) > MAX_INT


def _decode_dict(body: list[Any], fail: Fail, slot: MakeSlot | None) -> Value:
    result: dict[Any, Value] = {}
    for pair in body:
        if not isinstance(pair, list) or len(pair) != 2:
            raise fail(f"$dict with {show(pair)}, expected pairs")
        key = decode_value(pair[0], fail, None)
        if not _is_key(key):
            raise fail(f"$dict with the key {show(pair[0])}")
        if key in result:
            raise fail(f"$dict with the key {show(pair[0])} twice")
        result[key] = decode_value(pair[1], fail, slot)
    return result


def show(value: Any) -> str:
    """Return some JSON for a message, without characters that a terminal would act on."""
    return json.dumps(value, default=repr)[:60]
