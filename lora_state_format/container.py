"""Files of named optimizer state, and sets of shards: strict reading. ``writing`` makes them.

The text is ``spec/format.md``; the comments cite its rules. One chunk of memory is held, whatever the file's size.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import xxhash

from lora_state_format.canonical import dumps, loads
from lora_state_format.collector import paused
from lora_state_format.errors import DigestError, FileError
from lora_state_format.manifest import (
    ALGORITHM,
    FORMAT,
    HEX,
    MAX_DIMENSIONS,
    NESTED,
    ShardOf,
    check_names,
    decode,
    decode_digests,
    encode,
)
from lora_state_format.model import BITS, CHUNK, Digest, OptimizerState, Parameter, Tensor, contiguous
from lora_state_format.sources import File

__all__ = [
    "INDEX_SUFFIX",
    "Entry",
    "Header",
    "Verification",
    "hash_tensor",
    "is_state",
    "open_state",
    "read_header",
    "stated_hash",
    "verify",
]

ALIGNMENT: Final = 64
MAX_HEADER: Final = 32 << 20
"""Bytes of a header: what safetensors itself allows (100,000,000) would take gigabytes to parse."""
MAX_SHARDS: Final = 256
MAX_INDEX: Final = 64 << 20
"""Bytes of a set's index."""
MAX_ELEMENTS: Final = 2**53 - 1
"""Product of a tensor's sizes, those that are zero aside."""

INDEX_SUFFIX: Final = ".index.json"
ZERO: Final = "0" * 32
METADATA: Final = "optimizer_state"
PREFIX: Final = b'{"__metadata__":{"' + METADATA.encode() + b'":"{\\"digest\\":\\"'
"""What the header of every file begins with (R7); the digest's 32 digits follow."""
INDEX_PREFIX: Final = b'{"metadata":{"format":"' + FORMAT.encode() + b'"'


Raw: TypeAlias = "bytes | bytearray"
"""The length and the header."""


class Entry(NamedTuple):
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
    entries: Mapping[str, Entry]
    size: int
    file: File

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return {key: self.tensor(key) for key in self.entries}

    def tensor(self, key: str, digest: Digest | None = None) -> Tensor:
        entry = self.entries[key]
        return contiguous(entry.dtype, entry.shape, self.file, self.size + entry.begin, digest)


@dataclass(frozen=True)
class Verification:
    """What ``verify`` found. ``unverified`` are tensors whose digest is of an algorithm that is not known here."""

    tensors: int
    size: int
    problems: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems


# --- a header -----------------------------------------------------------------------------------------------------


def read_header(file: File, *, foreign: bool = False) -> Header:
    """The header of any safetensors file, strictly: ours or a model's. Raises ``FileError`` with the broken rule.

    ``foreign`` takes ``"__metadata__":null`` too, as MLX writes it.
    """
    return _parse(_raw_header(file), file, foreign=foreign)


def _raw_header(file: File) -> Raw:
    """The length and the header (R1)."""

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


def _parse(raw: Raw, file: File, *, foreign: bool = False) -> Header:
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


def _entry(name: str, item: Any, seen: dict[str, Spec], fail: Callable[[str, str], FileError]) -> Entry:
    """A tensor as the header describes it (R4, R5). ``seen`` has the types and shapes that were found good."""
    try:
        dtype, shape, (begin, end) = item["dtype"], item["shape"], item["data_offsets"]
    except (KeyError, TypeError, ValueError):
        dtype = shape = begin = end = None
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
    return Entry(begin, end, name, spec.dtype, spec.shape)


def is_too_large(shape: Sequence[int]) -> bool:
    """R4: a tensor without elements must not hide sizes that overflow; one with elements is as large as its bytes."""
    return 0 in shape and math.prod(filter(None, shape)) > MAX_ELEMENTS


def _is_ours(raw: Raw) -> bool:
    return raw.startswith(PREFIX, 8) and HEX.fullmatch(stated_digest(raw)) is not None


def stated_digest(raw: Raw) -> str:
    """The digest that a header states."""
    return raw[8 + len(PREFIX) :][:32].decode("ascii", "replace")


def header_digest(raw: Raw) -> str:
    """BLAKE2b-128 of the length and the header, the digest's own digits as zeros (R9)."""
    start, view = 8 + len(PREFIX), memoryview(raw)
    hasher = hashlib.blake2b(view[:start], digest_size=16)
    hasher.update(ZERO.encode())
    hasher.update(view[start + 32 :])
    return hasher.hexdigest()


# --- opening ------------------------------------------------------------------------------------------------------


class _Stored(NamedTuple):
    """The tensors of one file, and their digests by key."""

    header: Header
    algorithm: str
    digests: Mapping[str, str]

    def tensor(self, key: str) -> Tensor:
        return self.header.tensor(key, Digest(self.algorithm, self.header.entries[key].dtype, self.digests[key]))


class _Opened(NamedTuple):
    """One file: what it holds, its place in a set, and what the set's checks need.

    ``digest`` is the one that the header states; ``content`` is taken with the set's id as zeros.
    """

    state: OptimizerState
    shard: ShardOf | None
    stored: _Stored
    digest: str
    content: str


def is_state(path: str | os.PathLike[str]) -> bool:
    """Whether a path looks like a file, or the index of a set, of named optimizer state; its first bytes say so."""
    path = Path(path)
    index = _find_index(path)
    start, prefix = (8, PREFIX) if index is None else (0, INDEX_PREFIX)
    if not (index or path).is_file():
        return False
    with File(index or path) as file:
        return file.size >= start + len(prefix) and file.read(start, len(prefix)) == prefix


def open_state(path: str | os.PathLike[str]) -> OptimizerState:
    """The state in a file, or in the set whose index stands beside the path. Tensors are read when they are asked for.

    The header's digest is checked, every rule of the format too; the tensors' digests are checked by ``verify`` and by
    whatever copies or loads them. Raises ``FileError`` for a broken rule, ``DigestError`` for a header that was
    changed, ``FileNotFoundError``.
    """
    return _open(Path(path))[0]


def _open(path: Path) -> tuple[OptimizerState, list[_Opened]]:
    """The state and the files that it stands in."""
    while True:
        before = _version(path)
        try:
            with paused():
                index = _find_index(path)
                if index is not None:
                    return _open_set(index)
                return _open_single(path)
        except (FileError, DigestError, FileNotFoundError):
            # A writer may have replaced a set by a file, or one set by another, after the index was looked for.
            if _version(path) == before:
                raise


def _version(path: Path) -> list[tuple[int, int] | None]:
    """What changes when a writer replaces the state at a path."""

    def version(file: Path) -> tuple[int, int] | None:
        try:
            found = file.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    return [version(path), version(index_of(path))]


def _open_single(path: Path) -> tuple[OptimizerState, list[_Opened]]:
    opened = _open_file(path)
    if opened.shard is not None:
        opened.state.close()
        raise FileError(
            f"is shard {opened.shard.index} of {opened.shard.count}: open the set by its index (*{INDEX_SUFFIX})",
            path=path,
            rule="R23",
        )
    return opened.state, [opened]


def _open_file(path: Path) -> _Opened:
    file = File(path)
    try:
        raw = _raw_header(file)
        if _is_ours(raw) and header_digest(raw) != stated_digest(raw):
            raise DigestError(
                "the header does not match its digest: it was changed after it was written; take a copy that `verify` "
                "accepts",
                path=path,
                rule="R9",
            )
        header = _parse(raw, file)
        members = _members(raw, header, path)
        state, shard = decode(members, header.entries, lambda key: stored.tensor(key), path=path, resources=(file,))
        stored = _Stored(header, *decode_digests(members, header.entries, path=path))
    except BaseException:
        file.close()
        raise
    content = header_digest(raw.replace(shard.id.encode(), ZERO.encode())) if shard else ""
    return _Opened(state, shard, stored, stated_digest(raw), content)


def _members(raw: Raw, header: Header, path: object) -> dict[str, Any]:
    """The manifest's members, after the checks of the one metadata member that holds them (R7, R8)."""
    if METADATA not in header.metadata:
        raise FileError(f"a safetensors file without '{METADATA}': not named optimizer state", path=path, rule="R7")
    if len(header.metadata) != 1 or not _is_ours(raw):
        raise FileError(
            f"the header does not begin with __metadata__, '{METADATA}' alone in it, and a digest of 32 hex digits",
            path=path,
            rule="R7",
        )
    if len(raw) % ALIGNMENT:
        raise FileError(f"the data begin at byte {len(raw)}, not at a multiple of {ALIGNMENT}", path=path, rule="R8")
    value = loads(header.metadata[METADATA], path=path)
    match value:
        case {"digest": str(), "manifest": dict(manifest)} if len(value) == 2:
            return manifest
    raise FileError(f"'{METADATA}' is not an object of a digest and a manifest", path=path, rule="R7")


def verify(path: str | os.PathLike[str]) -> Verification:
    """Read every byte of a file or set and compare every digest (R21).

    A header that breaks a rule raises ``FileError``, as in ``open_state``; a digest that does not match is a problem in
    the result.
    """
    try:
        state, parts = _open(Path(path))
    except DigestError as error:
        return Verification(0, 0, (str(error),))
    problems: list[str] = []
    unverified: list[str] = []
    buffer = memoryview(bytearray(CHUNK))
    with state:
        for part in parts:
            header = part.stored.header
            if part.stored.algorithm != ALGORITHM:
                unverified += header.entries
                continue
            for key, digest in part.stored.digests.items():
                if hash_tensor(header.tensor(key), buffer) != digest:
                    problems.append(f"{header.file.path}: tensor {key!r} does not match its digest [R21]")
    headers = [part.stored.header for part in parts]
    return Verification(
        tensors=sum(len(header.entries) for header in headers),
        size=sum(header.file.size for header in headers),
        problems=tuple(problems),
        unverified=tuple(unverified),
    )


def hash_tensor(tensor: Tensor, buffer: memoryview | None = None) -> str:
    """The xxh3-128 of a tensor's little-endian C-order bytes, as 32 hex digits."""
    hasher = xxhash.xxh3_128()
    for chunk in tensor.chunks(buffer):
        hasher.update(chunk)
    return hasher.hexdigest()


def stated_hash(tensor: Tensor) -> str | None:
    """What ``hash_tensor`` had to be, as the tensor's file states it; ``None`` if it states none by that algorithm."""
    return tensor.digest.hex if tensor.digest and tensor.digest.algorithm == ALGORITHM else None


# --- sets of shards ----------------------------------------------------------------------------------------------


def index_of(path: Path) -> Path:
    return path.with_name(path.name + INDEX_SUFFIX)


def _find_index(path: Path) -> Path | None:
    if path.name.endswith(INDEX_SUFFIX):
        return path
    return index_of(path) if index_of(path).exists() else None


def set_id(contents: Iterable[str]) -> str:
    """R24: BLAKE2b-128 of the shards' header digests, each taken with the set's own id as zeros."""
    return hashlib.blake2b("".join(contents).encode(), digest_size=16).hexdigest()


def _open_set(index: Path) -> tuple[OptimizerState, list[_Opened]]:
    """The union of a set's shards (R23 to R26), and they."""

    def fail(detail: str, rule: str) -> FileError:
        return FileError(detail, path=index, rule=rule)

    members = _read_index(index)
    identity, shards = members["metadata"]["set"], members["shards"]
    with contextlib.ExitStack() as stack:
        parts = []
        for number, item in enumerate(shards, 1):
            name = item["file"]
            if not index.with_name(name).exists():
                raise fail(f"shard {number} of {len(shards)} is missing: {name!r}", "R25")
            part = _open_file(index.with_name(name))
            stack.callback(part.state.close)
            shard = part.shard
            if shard is None or (shard.id, shard.index, shard.count) != (identity, number, len(shards)):
                raise fail(f"{name!r} is not shard {number} of {len(shards)} of the set {identity}", "R23")
            if part.digest != item["digest"]:
                raise fail(f"{name!r} has the digest {part.digest}, not {item['digest']}", "R25")
            parts.append(part)
        if set_id(part.content for part in parts) != identity:
            raise fail(f"the set's id {identity} is not the digest of its shards", "R24")
        headers = [part.stored.header for part in parts]
        stored = {key: item["file"] for item, header in zip(shards, headers, strict=True) for key in header.entries}
        total = sum(header.file.size - header.size for header in headers)
        if stored != members["weight_map"] or total != members["metadata"]["total_size"]:
            raise fail("weight_map or total_size does not say what the shards hold", "R25")
        state = _merge(parts, fail)
        stack.pop_all()
    return state, parts


def _read_index(index: Path) -> dict[str, Any]:
    """The members of an index, checked for themselves (R25)."""

    def fail(detail: str) -> FileError:
        return FileError(detail, path=index, rule="R25")

    with File(index) as file:
        if file.size > MAX_INDEX:
            raise fail(f"{file.size} bytes, more than {MAX_INDEX}")
        try:
            text = file.read(0, file.size).decode()
        except UnicodeDecodeError as error:
            raise fail(f"not UTF-8 at byte {error.start}") from None
    members: dict[str, Any] = loads(text, path=index, shallow=True)
    match members:
        case {
            "metadata": {"format": str(name), "set": str(), "total_size": int()} as metadata,
            "shards": [_, *_] as shards,
            "weight_map": dict(),
        } if len(members) == len(metadata) == 3 and type(metadata["total_size"]) is int:
            if name != FORMAT:
                raise fail(f"metadata.format is {name!r}, expected {FORMAT!r}")
        case _:
            raise fail("not the index of a set of named optimizer state")
    if len(shards) > MAX_SHARDS:
        raise fail(f"{len(shards)} shards, more than {MAX_SHARDS}")
    for item in shards:
        match item:
            case {"digest": str(), "file": str(name)} if (
                len(item) == 2 and not {"/", "\\", "\0"} & {*name} and name not in ("", ".", "..")
            ):
                pass
            case _:
                raise fail(f"shards holds {dumps(item)[:100]!r}, expected a digest and the name of a file beside it")
    return members


def _merge(parts: list[_Opened], fail: Callable[[str, str], FileError]) -> OptimizerState:
    head = parts[0].state
    shared = _shared(head)
    groups = [replace(group, count=0) for group in head.groups]
    for number, part in enumerate(parts, 1):
        if _shared(part.state) != shared:
            raise fail(f"shard {number} has other optimizers, groups, naming, extensions or step than shard 1", "R23")
        if number > 1 and (part.state.globals or part.state.origin or part.state.extra):
            raise fail(f"shard {number} has globals, origin or extra, which belong into shard 1", "R23")
        groups = [replace(g, count=g.count + own.count) for g, own in zip(groups, part.state.groups, strict=True)]
    total = sum(len(part.state) for part in parts)
    starts = [0, *accumulate(group.count for group in groups), total]
    parameters: dict[int, Parameter] = {}
    for number, part in enumerate(parts, 1):
        assert part.shard is not None
        counts = [*(group.count for group in part.state.groups), len(part.state.carried)]
        runs = [run for run, count in zip(pairwise(starts), counts, strict=True) for _ in range(count)]
        for parameter, position, (start, stop) in zip(part.state.parameters, part.shard.positions, runs, strict=True):
            if not start <= position < stop or position in parameters:
                raise fail(f"shard {number} puts {parameter.name!r} at position {position}", "R26")
            parameters[position] = parameter
    ordered = tuple(parameters[position] for position in range(total))
    try:
        check_names(ordered)
    except FileError as error:
        raise fail(error.detail, "R26") from None
    return replace(
        head,
        groups=tuple(groups),
        parameters=ordered,
        unknown=_unknown(parts),
        resources=tuple(resource for part in parts for resource in part.state.resources),
    )


def _shared(state: OptimizerState) -> str:
    """What all shards of a set say alike, as text: everything but their parameters and what stands in the first."""
    groups = tuple(replace(group, count=0) for group in state.groups)
    rest = replace(state, groups=groups, parameters=(), globals={}, origin={}, extra={}, unknown={})
    return dumps(encode(rest).members)


def _unknown(parts: list[_Opened]) -> Mapping[str, Any]:
    """The members that this version does not know: those of the first shard are kept, others could only be lost."""
    head, *others = [part.state.unknown for part in parts]
    lost = sorted({key for unknown in others for key in unknown if key != "version"})
    return {**head, "version": others[0]["version"], NESTED: lost} if lost else head
