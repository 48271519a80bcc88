"""JSON as the format allows it: one form to write, strict to read. ``spec/format.md`` is the text; comments cite it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from json.encoder import encode_basestring
from typing import Any, Final

from lora_state_format.errors import FileError, UnrepresentableError

__all__ = [
    "MAX_DEPTH",
    "MAX_VALUES",
    "check_size",
    "dumps",
    "format_float",
    "loads",
    "most_values",
    "utf8",
]

MAX_DEPTH: Final = 64
"""Arrays and objects inside each other, in one JSON text."""

MAX_VALUES: Final = 1 << 21
"""Commas and opening brackets in one JSON text, strings aside: what bounds the memory that parsing takes."""

ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))

EXPONENT: Final = re.compile(r"[\[:,]-?[0-9](?:\.[0-9]+)?e")

# All that is neither structure nor the quote of a string.
FILLING: Final = bytes(set(range(256)) - set(b'[]{},"'))


# --- writing ------------------------------------------------------------------------------------------------------


def dumps(value: Any) -> str:
    """Return canonical JSON (W1 to W3): keys sorted by code point, no spaces, few escapes, ECMAScript's floats."""
    if isinstance(value, str):
        return encode_basestring(value)
    if isinstance(value, float):
        return format_float(value)
    text = ENCODER.encode(value)
    # The encoder is right but for floats with an exponent, so only what holds one is put together here.
    if not EXPONENT.search(text):
        return text
    if isinstance(value, dict):
        return "{" + ",".join(f"{encode_basestring(key)}:{dumps(value[key])}" for key in sorted(value)) + "}"
    return "[" + ",".join(map(dumps, value)) + "]"


def utf8(text: str) -> bytes:
    """Return the bytes of a text. Raises ``UnrepresentableError`` for lone surrogates, which have none."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise UnrepresentableError(
            "the state holds a string with a lone surrogate, which UTF-8 cannot encode"
        ) from None


def format_float(value: float) -> str:
    """Return the shortest digits that read back as ``value``, placed as in ECMAScript (ECMA-262, Number::toString).

    ``.0`` is appended where the result would read as an integer; minus zero is ``-0.0``.
    """
    mantissa, _, exponent = repr(value).partition("e")
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


# --- reading ------------------------------------------------------------------------------------------------------


def loads(text: str, *, path: object = None, shallow: bool = False) -> Any:
    """Return strict JSON (R3). Raises ``FileError``; nothing is built before nesting and number of values are known.

    ``shallow`` says that the caller refuses what is nested more than a few levels deep: then it is not looked for here,
    which takes as long as the parsing.
    """

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
        if digits == "-0":
            raise fail("JSON with the integer -0, which would lose its sign")
        return int(digits)

    if not shallow or most_values(text.encode("utf-8", "surrogatepass")) > MAX_VALUES:
        check_size(text, fail)
    try:
        result = json.loads(
            text,
            object_pairs_hook=pairs,
            parse_constant=constant,
            parse_float=number,
            # A call for every integer takes half of the time.
            parse_int=integer if re.search("-0", text) else None,
        )
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(result, ensure_ascii=False).encode()
    except FileError:
        raise
    except RecursionError:
        raise fail(f"JSON nested deeper than {MAX_DEPTH} levels") from None
    except UnicodeEncodeError:
        raise fail("JSON with a lone surrogate") from None
    except json.JSONDecodeError as error:
        raise fail(f"not JSON: {error.msg} at character {error.pos}") from None
    except ValueError:  # more digits than the interpreter's own limit
        raise fail("JSON with an integer of thousands of digits") from None
    return result


def most_values(text: bytes) -> int:
    """Return the count that R3 bounds, with the same characters inside strings."""
    return len(text) - len(text.translate(None, b",[{"))


def check_size(text: str, fail: Callable[[str], FileError]) -> None:
    """Refuse what is nested too deep or has too many values, by its brackets and commas alone."""
    # Without escaped characters a quote begins or ends a string. Then strings go: the empty ones first, and where that
    # joins two neighbours, they go as one.
    structure = text.encode("utf-8", "surrogatepass")
    if b"\\" in structure:
        structure = structure.replace(b"\\\\", b"").replace(b'\\"', b"")
    structure = re.sub(rb'"[^"]*"', b"", structure.translate(None, FILLING).replace(b'""', b""))
    values = structure.count(b",") + structure.count(b"[") + structure.count(b"{")
    if values > MAX_VALUES:
        raise fail(f"JSON with {values} values, more than {MAX_VALUES}")
    # Pairs are taken out from the inside, level by level. What is left in the end has brackets that do not match, which
    # the parser says better, or is nested too deep.
    structure = structure.translate(bytes.maketrans(b"{}", b"[]"), b",")
    for _ in range(MAX_DEPTH):
        structure = structure.replace(b"[]", b"")
    if b"[" * (MAX_DEPTH + 1) in structure or b"[]" in structure:
        raise fail(f"JSON nested deeper than {MAX_DEPTH} levels")
