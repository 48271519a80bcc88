"""Files of named optimizer state: strict safetensors reading, streaming and atomic writing, shards.

The text is ``spec/format.md``; the comments cite its rules. One chunk of memory is held, whatever the file's size.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import xxhash

from lora_state_format.atomic import TemporaryFile, locked, sync_folder
from lora_state_format.crc import Ledger
from lora_state_format.errors import DigestError, FileError, TargetExistsError
from lora_state_format.manifest import (
    ALGORITHM,
    FORMAT,
    HEX,
    Manifest,
    ShardOf,
    check_rewritable,
    decode,
    decode_digests,
    dumps,
    encode,
    loads,
)
from lora_state_format.model import BITS, CHUNK, OptimizerState, Parameter, Tensor, contiguous
from lora_state_format.sources import File

__all__ = [
    "INDEX_SUFFIX",
    "Header",
    "Verification",
    "Written",
    "is_state",
    "open_state",
    "read_header",
    "verify",
    "write",
]

ALIGNMENT: Final = 64
MAX_HEADER: Final = 100_000_000
SHARD_HEADER: Final = 16 << 20
INDEX_SUFFIX: Final = ".index.json"
ZERO: Final = "0" * 32
METADATA: Final = "optimizer_state"
PREFIX: Final = b'{"__metadata__":{"' + METADATA.encode() + b'":"{\\"digest\\":\\"'
SUFFIX: Final = '","manifest":'


@dataclass(frozen=True)
class Header:
    """A safetensors header. ``tensors`` stand in data order; ``raw`` is the length and the header's bytes."""

    metadata: Mapping[str, str]
    tensors: dict[str, Tensor]
    raw: bytes


@dataclass(frozen=True)
class Written:
    """What ``write`` wrote: the path to open, all files behind it, their bytes and tensors, the header's digest."""

    path: str
    files: tuple[str, ...]
    size: int
    tensors: int
    digest: str


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


# --- reading ------------------------------------------------------------------------------------------------------


def read_header(file: File) -> Header:
    """The header of any safetensors file, strictly: ours or a model's. Raises ``FileError`` with the broken rule."""

    def fail(detail: str, rule: str) -> FileError:
        return FileError(detail, path=file.path, rule=rule)

    if file.size < 8:
        raise fail(f"{file.size} bytes: too short for a safetensors file", "R1")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER:
        raise fail(f"claims a header of {length} bytes; not a safetensors file, or one beyond {MAX_HEADER}", "R1")
    if 8 + length > file.size:
        raise fail(f"claims a header of {length} bytes and holds {file.size - 8} behind the length", "R1")
    raw = bytes(file.read(0, 8 + length))
    try:
        text = raw[8:].decode()
    except UnicodeDecodeError as error:
        raise fail(f"the header is not UTF-8 at byte {8 + error.start}", "R2") from None
    if not text.startswith("{") or not text.rstrip(" ").endswith("}"):
        raise fail("the header is not one JSON object from its first byte on, padded with spaces", "R2")
    members = loads(text, path=file.path)
    metadata = members.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise fail("__metadata__ is not a mapping of strings", "R4")

    entries: list[tuple[int, int, str, str, tuple[int, ...]]] = []
    for name, entry in members.items():
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
                len(entry) == 3 and dtype in BITS and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            ):
                entries.append((begin, end, name, dtype, tuple(shape)))
            case _:
                raise fail(f"tensor '{name}' is described by {dumps(entry)[:100]}", "R4")
    entries.sort(key=lambda entry: entry[:2])
    tensors: dict[str, Tensor] = {}
    position = 0
    for begin, end, name, dtype, sizes in entries:
        if math.prod(sizes) * BITS[dtype] != (end - begin) * 8:
            raise fail(f"tensor '{name}' of type {dtype} and shape {list(sizes)} holds {end - begin} bytes", "R5")
        if begin != position:
            raise fail(f"tensor '{name}' begins at byte {begin} of the data, where {position} was expected", "R6")
        if 8 + length + end > file.size:
            raise fail(f"tensor '{name}' ends at byte {end} of the data; the file holds {file.size - 8 - length}", "R6")
        tensors[name] = contiguous(dtype, sizes, file, 8 + length + begin)
        position = end
    if 8 + length + position != file.size:
        raise fail(f"the tensors hold {position} bytes, the file {file.size - 8 - length}", "R6")
    return Header(metadata, tensors, raw)


def is_state(path: str | os.PathLike[str]) -> bool:
    """Whether a path looks like a file, or the index of a set, of named optimizer state; its first bytes say so."""
    path = Path(path)
    index = _find_index(path)
    if index is not None:
        return index.is_file() and f'"format":"{FORMAT}"'.encode() in index.read_bytes()
    if not path.is_file():
        return False
    with File(path) as file:
        return file.size >= 8 + len(PREFIX) and file.read(8, len(PREFIX)) == PREFIX


def open_state(path: str | os.PathLike[str]) -> OptimizerState:
    """The state in a file, or in the set whose index stands beside the path. Tensors are read when they are asked for.

    The header's digest is checked, every rule of the format too; the tensors' digests are checked by ``verify`` and by
    whatever loads them. Raises ``FileError`` for a broken rule, ``DigestError`` for a header that was changed,
    ``FileNotFoundError``.
    """
    path = Path(path)
    index = _find_index(path)
    if index is not None:
        return _open_set(index)
    opened = _open_file(path)
    if opened.shard is not None:
        opened.state.close()
        raise FileError(
            f"is shard {opened.shard.index} of {opened.shard.count}: open the set by its index (*{INDEX_SUFFIX})",
            path=path,
            rule="R22",
        )
    return opened.state


@dataclass(frozen=True)
class _Opened:
    """One file: what it holds, its place in a set, and what the set's checks need."""

    state: OptimizerState
    shard: ShardOf | None
    header: Header
    members: dict[str, Any]


def _open_file(path: Path) -> _Opened:
    file = File(path)
    try:
        header = read_header(file)
        manifest = _manifest_text(header, path)
        members = loads(manifest, path=path)
        tensors = decode_digests(members, header.tensors, path=path)
        state, shard = decode(members, tensors, path=path, resources=(file,))
    except BaseException:
        file.close()
        raise
    return _Opened(state, shard, header, members)


def _manifest_text(header: Header, path: object) -> str:
    """The manifest's JSON text, after the checks of the one metadata member and of the digest (R7, R8, R9)."""
    value = header.metadata.get(METADATA)
    if value is None:
        raise FileError(f"a safetensors file without '{METADATA}': not named optimizer state", path=path, rule="R7")
    if len(header.metadata) != 1 or not header.raw[8:].startswith(PREFIX) or not HEX.fullmatch(_stated(header.raw)):
        raise FileError(
            f"the header does not begin with __metadata__, '{METADATA}' alone in it, and a digest of 32 hex digits",
            path=path,
            rule="R7",
        )
    if len(header.raw) % ALIGNMENT:
        raise FileError(
            f"the data begin at byte {len(header.raw)}, not a multiple of {ALIGNMENT}", path=path, rule="R8"
        )
    if _digest(header.raw) != _stated(header.raw):
        raise DigestError(
            f"{path}: the header does not match its digest: it was changed after it was written [R9]; "
            "take the file from a copy that `verify` accepts"
        )
    text = value[len('{"digest":"') + 32 :]
    if not text.startswith(SUFFIX) or not text.endswith("}"):
        raise FileError(f"'{METADATA}' is not an object of a digest and a manifest", path=path, rule="R7")
    return text[len(SUFFIX) : -1]


def _stated(raw: bytes) -> str:
    return raw[8 + len(PREFIX) :][:32].decode("ascii", "replace")


def _digest(raw: bytes) -> str:
    """BLAKE2b-128 of the length and the header, the digest's own digits as zeros (R9)."""
    start = 8 + len(PREFIX)
    return hashlib.blake2b(raw[:start] + ZERO.encode() + raw[start + 32 :], digest_size=16).hexdigest()


def verify(path: str | os.PathLike[str]) -> Verification:
    """Read every byte of a file or set and compare every digest.

    A header that breaks a rule raises ``FileError``, as in ``open_state``; everything else is a problem in the result.
    """
    try:
        state = open_state(path)
    except DigestError as error:
        return Verification(0, 0, (str(error),))
    problems, unverified, count, size = [], [], 0, 0
    buffer = memoryview(bytearray(CHUNK))
    with state:
        for key, tensor in stored_tensors(state):
            count, size = count + 1, size + tensor.size
            assert tensor.digest is not None
            if tensor.digest.algorithm != ALGORITHM:
                unverified.append(key)
            elif hash_tensor(tensor, buffer) != tensor.digest.hex:
                problems.append(f"{os.fspath(path)}: tensor '{key}' does not match its digest")
    return Verification(count, size, tuple(problems), tuple(unverified))


def hash_tensor(tensor: Tensor, buffer: memoryview | None = None) -> str:
    """The xxh3-128 of a tensor's little-endian C-order bytes, as 32 hex digits."""
    hasher = xxhash.xxh3_128()
    for chunk in tensor.chunks(buffer):
        hasher.update(chunk)
    return hasher.hexdigest()


def stored_tensors(state: OptimizerState) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a state under the key that it has in a file."""
    for key, slot in encode(state).tensors.items():
        yield key, slot.tensor


# --- writing ------------------------------------------------------------------------------------------------------


def write(
    state: OptimizerState,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    max_shard_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Written:
    """Write a state as one file, or as a set of shards where it would not fit into one.

    The target appears whole or not at all: bytes go to a temporary file in the same folder, are synced, and renamed.
    Equal states give equal bytes. ``max_shard_size`` is in bytes of tensors; a new shard also starts at 16 MiB of
    header. ``progress`` is told the bytes written since it was last called. Raises ``TargetExistsError`` unless
    ``force``, ``UnrepresentableError`` for values without a form, ``FileError`` for a damaged or changing source.
    """
    path = Path(path)
    check_rewritable(state)
    _check_target(path, force)
    parts = _split(state, max_shard_size)
    with contextlib.ExitStack() as stack:
        ledger = Ledger()
        files = [stack.enter_context(TemporaryFile(path)) for _ in parts]
        layouts = []
        for number, (part, positions) in enumerate(parts, 1):
            shard = ShardOf(ZERO, number, len(parts), positions) if len(parts) > 1 else None
            layout = _layout(encode(part, shard))
            _stream(layout, files[number - 1], ledger, progress)
            layouts.append(layout)
        ledger.check()
        for resource in state.resources:
            if isinstance(resource, File):
                resource.check_unchanged()
        if len(parts) == 1:
            header = _sealed(layouts[0])
            files[0].finish(header)
            with _commit(path, force, keep={path.name}):
                files[0].commit(path)
            return Written(
                str(path), (str(path),), len(header) + layouts[0].size, len(layouts[0].tensors), _stated(header)
            )
        return _commit_set(path, layouts, files, force)


@dataclass(frozen=True)
class _Layout:
    """A file before its digests are known: the manifest, and the tensors in data order (W5)."""

    manifest: Manifest
    tensors: tuple[tuple[str, Tensor], ...]
    digests: list[str]
    size: int
    header_size: int


def _layout(manifest: Manifest) -> _Layout:
    # W5: wide items first, so that everything is aligned; then parameter order; then label. The sort is stable, and
    # the manifest lists the tensors of each parameter by label.
    tensors = sorted(
        ((key, slot.tensor) for key, slot in manifest.tensors.items()), key=lambda item: -BITS[item[1].dtype]
    )
    size = sum(tensor.size for _, tensor in tensors)
    layout = _Layout(manifest, tuple(tensors), [ZERO] * len(tensors), size, 0)
    return replace(layout, header_size=len(_header(layout)))


def _header(layout: _Layout) -> bytes:
    """Length and header, padded to the alignment, its digest as zeros."""
    manifest = {**layout.manifest.members, "digests": {"algorithm": ALGORITHM, "values": layout.digests}}
    entries = [
        "{" + f'"__metadata__":{{"{METADATA}":' + dumps('{"digest":"' + ZERO + SUFFIX + dumps(manifest) + "}") + "}"
    ]
    position = 0
    for key, tensor in layout.tensors:
        shape = ",".join(map(str, tensor.shape))
        end = position + tensor.size
        entries.append(f'{dumps(key)}:{{"dtype":"{tensor.dtype}","shape":[{shape}],"data_offsets":[{position},{end}]}}')
        position = end
    header = (",".join(entries) + "}").encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    if len(header) > MAX_HEADER:
        raise FileError(f"a header of {len(header)} bytes; write shards (max_shard_size)", rule="R1")
    return len(header).to_bytes(8, "little") + header


def _sealed(layout: _Layout) -> bytes:
    raw = _header(layout)
    start = 8 + len(PREFIX)
    return raw[:start] + _digest(raw).encode() + raw[start + 32 :]


def _stream(layout: _Layout, target: TemporaryFile, ledger: Ledger, progress: Callable[[int], None] | None) -> None:
    """Copy every tensor behind the room for the header, hashing on the way."""
    position = layout.header_size
    buffer = memoryview(bytearray(CHUNK))
    for number, (_, tensor) in enumerate(layout.tensors):
        hasher = xxhash.xxh3_128()
        for chunk in ledger.chunks(tensor, buffer):
            hasher.update(chunk)
            target.write(position, chunk)
            position += len(chunk)
            if progress:
                progress(len(chunk))
        layout.digests[number] = hasher.hexdigest()


# --- sets of shards -----------------------------------------------------------------------------------------------


def _index(path: Path) -> Path:
    return path.with_name(path.name + INDEX_SUFFIX)


def _find_index(path: Path) -> Path | None:
    if path.name.endswith(INDEX_SUFFIX):
        return path
    return _index(path) if _index(path).exists() else None


def _split(state: OptimizerState, max_size: int | None) -> list[tuple[OptimizerState, tuple[int, ...]]]:
    """The state in parts that each become a file: runs of parameters, with their positions in the whole."""
    parts, first, size, header = [], 0, 0, 0
    for position, parameter in enumerate(state.parameters):
        own_size, own_header = _cost(parameter)
        full = max_size is not None and size + own_size > max_size
        if position > first and (full or header + own_header > SHARD_HEADER):
            parts.append(_part(state, first, position))
            first, size, header = position, 0, 0
        size, header = size + own_size, header + own_header
    parts.append(_part(state, first, len(state.parameters)))
    return parts


def _cost(parameter: Parameter) -> tuple[int, int]:
    """Bytes of tensors, and bytes of header within some percent: the name stands there once, and once per tensor."""
    sizes = [slot.tensor.size for _, slot in parameter.tensors()]
    texts = [parameter.name, *parameter.tied, *parameter.keys, *parameter.keys.values()]
    return sum(sizes), 160 + sum(len(text) + 8 for text in texts) + len(sizes) * (len(parameter.name) + 160)


def _part(state: OptimizerState, first: int, last: int) -> tuple[OptimizerState, tuple[int, ...]]:
    positions = tuple(range(first, last))
    if (first, last) == (0, len(state.parameters)):
        return state, positions
    groups, start = [], 0
    for group in state.groups:
        stop = start + group.count
        groups.append(replace(group, count=max(0, min(stop, last) - max(start, first))))
        start = stop
    return (
        OptimizerState(
            optimizers=state.optimizers,
            groups=tuple(groups),
            parameters=state.parameters[first:last],
            naming=state.naming,
            globals=state.globals if first == 0 else {},
            origin=state.origin if first == 0 else {},
            extra=state.extra if first == 0 else {},
            extensions=state.extensions,
            unknown=state.unknown if first == 0 else {},
            global_step=state.global_step,
        ),
        positions,
    )


def _set_digest(raws: Iterable[bytes], identity: str) -> str:
    """R23: the digest of the shards' digests, taken with the set's own id as zeros."""
    digests = (_digest(raw.replace(identity.encode(), ZERO.encode())) for raw in raws)
    return hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()


def _commit_set(path: Path, layouts: list[_Layout], files: list[TemporaryFile], force: bool) -> Written:
    identity = _set_digest((_header(layout) for layout in layouts), ZERO)
    names, digests, size = [], [], 0
    for number, (layout, file) in enumerate(zip(layouts, files, strict=True), 1):
        layout.manifest.members["set"]["id"] = identity
        header = _sealed(layout)
        file.finish(header)
        names.append(f"{path.stem}-{identity[:8]}-{number:05}-of-{len(layouts):05}{path.suffix}")
        digests.append(_stated(header))
        size += len(header) + layout.size
    index = {
        "metadata": {"total_size": sum(layout.size for layout in layouts), "format": FORMAT, "set": identity},
        "shards": [{"file": name, "digest": digest} for name, digest in zip(names, digests, strict=True)],
        "weight_map": {key: name for name, layout in zip(names, layouts, strict=True) for key, _ in layout.tensors},
    }
    with TemporaryFile(_index(path)) as temporary:
        temporary.finish(dumps(index).encode())
        with _commit(path, force, keep={*names, _index(path).name}):
            for file, name in zip(files, names, strict=True):
                file.commit(path.with_name(name))
            temporary.commit(_index(path))
    written = tuple(str(path.with_name(name)) for name in (*names, _index(path).name))
    return Written(str(path), written, size, sum(len(layout.tensors) for layout in layouts), identity)


def _siblings(path: Path) -> list[Path]:
    """The files that may hold a state of this path: the index, the file itself, then the shards of any set."""
    shard = re.compile(re.escape(path.stem) + r"-[0-9a-f]{8}-[0-9]{5,}-of-[0-9]{5,}" + re.escape(path.suffix))
    shards = [found for found in path.parent.iterdir() if shard.fullmatch(found.name)]
    return [found for found in (_index(path), path) if found.exists()] + shards


def _check_target(path: Path, force: bool) -> None:
    for existing in (_index(path), path):
        if not force and (existing.exists() or existing.is_symlink()):
            raise TargetExistsError(f"{existing} exists; pass force=True (--force) to replace it")


@contextlib.contextmanager
def _commit(path: Path, force: bool, keep: set[str]) -> Iterator[None]:
    """Around the renames that make a new state the one at ``path``: afterwards whatever held an older one is removed.

    A path means its index if there is one, else the file. So the rename of an index commits a set, and the removal of
    an index commits a single file that was put in place before; shards that no index names are left-overs.
    """
    with locked(path.parent):
        _check_target(path, force)
        yield
        for sibling in _siblings(path):
            if sibling.name not in keep:
                sibling.unlink()
        sync_folder(path.parent)


def _open_set(index: Path) -> OptimizerState:
    """The union of a set's shards (R22 to R25)."""

    def fail(detail: str, rule: str) -> FileError:
        return FileError(detail, path=index, rule=rule)

    with File(index) as file:
        try:
            members = loads(file.read(0, file.size).decode(), path=index)
        except UnicodeDecodeError:
            raise fail("not UTF-8", "R24") from None
    match members:
        case {
            "metadata": {"format": str(name), "set": str(identity)},
            "shards": [_, *_] as shards,
            "weight_map": dict(),
        }:
            if name != FORMAT:
                raise fail(f"metadata.format is {name!r}, expected {FORMAT!r}", "R24")
        case _:
            raise fail("not the index of a set of named optimizer state", "R24")
    with contextlib.ExitStack() as stack:
        parts = []
        for number, item in enumerate(shards, 1):
            match item:
                case {"file": str(name), "digest": str(digest)} if name == Path(name).name:
                    path = index.with_name(name)
                case _:
                    raise fail(f"shards holds {dumps(item)[:100]}, expected the name of a file beside it", "R24")
            if not path.exists():
                raise fail(f"shard {number} of {len(shards)} is missing: {name}", "R24")
            part = _open_file(path)
            stack.callback(part.state.close)
            shard = part.shard
            if shard is None or (shard.id, shard.index, shard.count) != (identity, number, len(shards)):
                raise fail(f"{name} is not shard {number} of {len(shards)} of the set {identity}", "R22")
            if _stated(part.header.raw) != digest:
                raise fail(f"{name} has the digest {_stated(part.header.raw)}, not {digest}", "R24")
            parts.append((name, part))
        if _set_digest((part.header.raw for _, part in parts), identity) != identity:
            raise fail(f"the set's id {identity} is not the digest of its shards", "R23")
        stored = {key: name for name, part in parts for key in part.header.tensors}
        if stored != members["weight_map"]:
            raise fail("weight_map does not say where the tensors are", "R24")
        merged = _merge([part for _, part in parts], fail)
        stack.pop_all()
    return merged


def _merge(parts: list[_Opened], fail: Callable[[str, str], FileError]) -> OptimizerState:
    head = parts[0].state
    total = sum(len(part.state) for part in parts)
    shared = [_shared(part.members) for part in parts]
    groups = tuple(
        replace(group, count=sum(part.members["groups"][number]["count"] for part in parts))
        for number, group in enumerate(head.groups)
        if all(members == shared[0] for members in shared)
    )
    starts = [0, *accumulate(group.count for group in groups)]
    parameters: dict[int, Parameter] = {}
    for part, members in zip(parts, shared, strict=True):
        assert part.shard is not None
        if members != shared[0]:
            raise fail(f"shard {part.shard.index} has other optimizers or groups than shard 1", "R22")
        if part.shard.index > 1 and any(part.members.get(key) for key in ("globals", "origin", "extra")):
            raise fail(f"shard {part.shard.index} has members that belong into shard 1", "R22")
        counts = [group.count for group in part.state.groups]
        runs = [*zip(starts, starts[1:], counts, strict=False), (starts[-1], total, len(part.state) - sum(counts))]
        bounds = [(start, stop) for start, stop, count in runs for _ in range(count)]
        for parameter, position, (start, stop) in zip(part.state.parameters, part.shard.positions, bounds, strict=True):
            if not start <= position < stop or position in parameters:
                raise fail(f"shard {part.shard.index} puts '{parameter.name}' at position {position}", "R25")
            parameters[position] = parameter
    ordered = tuple(parameters[position] for position in range(total))
    names = Counter(parameter.name for parameter in ordered)
    if len(names) != total:
        raise fail(f"'{names.most_common(1)[0][0]}' is in two shards", "R25")
    resources = tuple(resource for part in parts for resource in part.state.resources)
    return replace(head, groups=groups, parameters=ordered, resources=resources)


def _shared(members: dict[str, Any]) -> Any:
    """What all shards of a set say alike: everything about optimizers and groups but the groups' counts."""
    return members["optimizers"], [{**group, "count": 0} for group in members["groups"]]
