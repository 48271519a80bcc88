"""The header of a safetensors file, read strictly. The comments cite the rules of ``spec/format.md``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple, Protocol, TypeAlias, cast

from lora_state_format.errors import FileError
from lora_state_format.io.strict_json import dumps, loads
from lora_state_format.model.dtypes import BITS
from lora_state_format.model.gc import paused
from lora_state_format.model.sources import Source
from lora_state_format.model.tensors import Digest, Tensor, contiguous

__all__ = ["MAX_DIMENSIONS", "Header", "HeaderEntry", "read_header"]

ALIGNMENT: Final = 64

MAX_HEADER: Final = 32 << 20
"""Bytes of a header: what safetensors itself allows (100,000,000) would take gigabytes to parse."""

MAX_DIMENSIONS: Final = 64

MAX_ELEMENTS: Final = 2**53 - 1
"""Product of a tensor's sizes, those that are zero aside."""


Raw: TypeAlias = "bytes | bytearray"
"""The length and the header."""


class Readable(Source, Protocol):
    """A file, or a part of one that is a safetensors file of its own."""

    @property
    def path(self) -> object:
        """What messages call it."""
        ...

    def read(self, offset: int, size: int) -> bytearray:
        """Return ``size`` bytes from ``offset`` on."""
        ...


class HeaderEntry(NamedTuple):
    """A tensor in a header; ``begin`` and ``end`` are bytes of the data behind the header."""

    begin: int
    end: int
    name: str
    dtype: str
    shape: tuple[int, ...]


class Spec(NamedTuple):
    """What many tensors have in common; ``bits`` are those of all elements."""

    dtype: str
    shape: tuple[int, ...]
    bits: int


@dataclass(frozen=True)
class Header:
    """A safetensors header: its metadata, its tensors by key in data order, its ``size`` with the length in front."""

    metadata: Mapping[str, str]
    entries: Mapping[str, HeaderEntry]
    size: int
    file: Readable

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its key, in data order."""
        return {key: self.tensor(key) for key in self.entries}

    def tensor(self, key: str, digest: Digest | None = None) -> Tensor:
        """Return the tensor of a key; nothing is read."""
        entry = self.entries[key]
        return contiguous(entry.dtype, entry.shape, self.file, self.size + entry.begin, digest)


# --- a header -----------------------------------------------------------------------------------------------------


def read_header(file: Readable, *, foreign: bool = False) -> Header:
    """Return the header of any safetensors file, strictly read. Raises ``FileError`` with the broken rule.

    ``foreign`` takes ``"__metadata__":null`` too, as MLX writes it.
    """
    return parse_header(raw_header(file), file, foreign=foreign)


def raw_header(file: Readable) -> Raw:
    """Return the length and the header (R1)."""

    def fail(detail: str) -> FileError:
        return FileError(detail, path=file.path, rule="R1")

    if file.size < 8:
        raise fail(f"{file.size} bytes: too short for a safetensors file")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER:
        raise fail(f"claims a header of {length} bytes, more than {MAX_HEADER}: not a safetensors file, or a huge one")
    if 8 + length > file.size:
        raise fail(f"claims a header of {length} bytes and holds {file.size - 8} behind the length")
    return file.read(0, 8 + length)


def parse_header(raw: Raw, file: Readable, *, foreign: bool = False) -> Header:
    def fail(detail: str, rule: str) -> FileError:
        return FileError(detail, path=file.path, rule=rule)

    try:
        text = str(memoryview(raw)[8:], "utf-8")
    except UnicodeDecodeError as error:
        raise fail(f"the header is not UTF-8 at byte {8 + error.start}", "R2") from None
    if not text.startswith("{") or raw[raw.rfind(b"}") + 1 :].strip(b" "):
        raise fail("the header is not one JSON object from its first byte on, padded with spaces", "R2")
    with paused():
        members = loads(text, path=file.path, shallow=True)
    metadata = members.pop("__metadata__", {})
    if metadata is None and foreign:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise fail("__metadata__ is not a mapping of strings", "R4")
    entries = {}
    seen: dict[str, Spec] = {}
    position, room = 0, file.size - len(raw)
    for entry in sorted(_entry(name, item, seen, fail) for name, item in members.items()):
        if entry.begin != position:
            raise fail(
                f"tensor {entry.name!r} begins at byte {entry.begin} of the data, where {position} was expected", "R6"
            )
        if entry.end > room:
            raise fail(f"tensor {entry.name!r} ends at byte {entry.end} of the data; the file holds {room}", "R6")
        entries[entry.name] = entry
        position = entry.end
    if position != room:
        raise fail(f"the tensors hold {position} bytes, the file {room}", "R6")
    return Header(metadata, entries, len(raw), file)


def _entry(name: str, item: Any, seen: dict[str, Spec], fail: Callable[[str, str], FileError]) -> HeaderEntry:
    """Return a tensor as the header describes it (R4, R5). ``seen`` has the types and shapes that were found good."""
    try:
        dtype, shape, (begin, end) = item["dtype"], item["shape"], item["data_offsets"]
    except (KeyError, TypeError, ValueError):
        dtype = shape = begin = end = cast("Any", None)
    alike = repr((dtype, shape))
    if alike not in seen:
        plain = type(dtype) is str and type(shape) is list and {int, *map(type, shape)} == {int}
        if not plain or dtype not in BITS or min(shape, default=0) < 0:
            raise fail(f"tensor {name!r} is described by {dumps(item)[:100]!r}", "R4")
        if len(shape) > MAX_DIMENSIONS or is_too_large(shape):
            raise fail(f"tensor {name!r} has the shape {dumps(shape)[:100]}, beyond the limits", "R4")
        seen[alike] = Spec(dtype, tuple(shape), math.prod(shape) * BITS[dtype])
    spec = seen[alike]
    if len(item) != 3 or not type(begin) is type(end) is int or min(begin, end) < 0:
        raise fail(f"tensor {name!r} is described by {dumps(item)[:100]!r}", "R4")
    if spec.bits != (end - begin) * 8:
        raise fail(f"tensor {name!r} of type {dtype} and shape {shape} holds {end - begin} bytes", "R5")
    return HeaderEntry(begin, end, name, spec.dtype, spec.shape)


def is_too_large(shape: Sequence[int]) -> bool:
    """R4: a tensor without elements must not hide sizes that overflow; one with elements is as large as its bytes."""
    return 0 in shape and math.prod(filter(None, shape)) > MAX_ELEMENTS
