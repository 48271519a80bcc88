"""Files of named optimizer state, and sets of shards: strict reading. ``writing`` makes them.

The text is ``spec/format.md``; the comments cite its rules. One chunk of memory is held, whatever the file's size.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from lora_state_format.errors import DigestError, FileError
from lora_state_format.format.envelope import (
    INDEX_SUFFIX,
    PLACES,
    ZERO,
    find_index,
    find_state,
    header_digest,
    index_of,
    is_ours,
    manifest_members,
    read_index,
    set_id,
    stated_digest,
)
from lora_state_format.format.manifest import NESTED, ShardOf, check_names, decode, decode_digests, encode
from lora_state_format.format.stowing import unstowed
from lora_state_format.io.remote import exists, open_file, version_of
from lora_state_format.io.safetensors import Header, parse_header, raw_header
from lora_state_format.io.strict_json import dumps
from lora_state_format.model.digests import ALGORITHM, hash_tensor
from lora_state_format.model.gc import paused
from lora_state_format.model.states import Group, OptimizerState, Parameter
from lora_state_format.model.tensors import CHUNK, Digest, Tensor

__all__ = ["Verification", "open_state", "verify"]


@dataclass(frozen=True)
class Verification:
    """The result of ``verify``. ``unverified`` are tensors with digests of an unknown algorithm."""

    tensors: int
    size: int
    problems: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


# --- opening ------------------------------------------------------------------------------------------------------


class _Stored(NamedTuple):
    """The tensors of one file, and their digests by key."""

    header: Header
    algorithm: str
    digests: Mapping[str, str]

    def tensor(self, key: str) -> Tensor:
        return self.header.tensor(key, Digest(self.algorithm, self.header.entries[key].dtype, self.digests[key]))


class _Opened(NamedTuple):
    """An open file: its state, its place in a set, and what the set's checks need.

    ``digest`` is the one that the header states; ``content`` is taken with the set's id as zeros.
    """

    state: OptimizerState
    shard: ShardOf | None
    stored: _Stored
    digest: str
    content: str


def open_state(path: str | os.PathLike[str]) -> OptimizerState:
    """Return the state in a file, in the set whose index is next to the path, or in a checkpoint's folder.

    Tensors are read on request.

    The header's digest is checked, every rule of the format too; the tensors' digests are checked by ``verify`` and by
    whatever copies or loads them.

    Raises:
        FileError: A rule of the format is broken; its ``rule`` says which.
        DigestError: The header was changed after it was written.
        FileNotFoundError: There is no such file.
    """
    return unstowed(_open(_place(Path(path)))[0])


def _place(path: Path) -> Path:
    """Return where the state of a checkpoint's folder is; any other path as it is.

    Raises ``FileError`` for a folder without one.
    """
    if not path.is_dir():
        return path
    if (place := find_state(path)) is None:
        raise FileError(
            f"a folder with neither {' nor '.join(PLACES)} in it: read opens a checkpoint of another format, and "
            "convert makes such a file of it",
            path=path,
        )
    return place


def _open(path: Path) -> tuple[OptimizerState, list[_Opened]]:
    """Return the state and its files."""
    while True:
        before = _version(path)
        try:
            with paused():
                index = find_index(path)
                if index is not None:
                    return _open_set(index)
                return _open_single(path)
        except (FileError, DigestError, FileNotFoundError):
            # A writer may have replaced a set by a file, or one set by another, after the index was looked for.
            if _version(path) == before:
                raise


def _version(path: Path) -> list[tuple[Any, ...] | None]:
    """Return what changes when a writer replaces the state at a path."""
    return [version_of(path), version_of(index_of(path))]


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
    file = open_file(path)
    try:
        raw = raw_header(file)
        if is_ours(raw) and header_digest(raw) != stated_digest(raw):
            raise DigestError(
                "the header does not match its digest: it was changed after it was written; take a copy that `verify` "
                "accepts",
                path=path,
                rule="R9",
            )
        header = parse_header(raw, file)
        members = manifest_members(raw, header, path)
        state, shard = decode(members, header.entries, lambda key: stored.tensor(key), path=path, resources=(file,))
        stored = _Stored(header, *decode_digests(members, header.entries, path=path))
    except BaseException:
        file.close()
        raise
    content = header_digest(raw.replace(shard.id.encode(), ZERO.encode())) if shard else ""
    return _Opened(state, shard, stored, stated_digest(raw), content)


def verify(path: str | os.PathLike[str]) -> Verification:
    """Read every byte of a file, a set, or the state in a checkpoint's folder, and compare every digest (R21).

    A header that breaks a rule raises ``FileError``, as in ``open_state``; a digest that does not match is a problem in
    the result.
    """
    try:
        state, parts = _open(_place(Path(path)))
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


def _open_set(index: Path) -> tuple[OptimizerState, list[_Opened]]:
    """Return the union of a set's shards (R23 to R26), and the shards."""

    def fail(detail: str, rule: str) -> FileError:
        return FileError(detail, path=index, rule=rule)

    members = read_index(index)
    identity, shards = members["metadata"]["set"], members["shards"]
    with contextlib.ExitStack() as stack:
        parts = []
        for number, item in enumerate(shards, 1):
            name = item["file"]
            if not exists(index.with_name(name)):
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
            raise fail("weight_map or total_size does not match the shards", "R25")
        state = _merge(parts, fail)
        stack.pop_all()
    return state, parts


def _merge(parts: list[_Opened], fail: Callable[[str, str], FileError]) -> OptimizerState:
    """Return the state whose shards these are."""
    groups = _merge_groups(parts, fail)
    parameters = _merge_parameters(parts, groups, fail)
    return replace(
        parts[0].state,
        groups=groups,
        parameters=parameters,
        unknown=_unknown(parts),
        resources=tuple(resource for part in parts for resource in part.state.resources),
    )


def _merge_groups(parts: list[_Opened], fail: Callable[[str, str], FileError]) -> tuple[Group, ...]:
    """Return the groups with their counts in the whole set, if the shards agree on all that they share (R23)."""
    shared = _shared(parts[0].state)
    groups = parts[0].state.groups
    for number, part in enumerate(parts[1:], 2):
        if _shared(part.state) != shared:
            raise fail(f"shard {number} has other optimizers, groups, naming, extensions or step than shard 1", "R23")
        if part.state.globals or part.state.origin or part.state.extra:
            raise fail(f"shard {number} has globals, origin or extra, which belong into shard 1", "R23")
        pairs = zip(groups, part.state.groups, strict=True)
        groups = tuple(replace(group, count=group.count + own.count) for group, own in pairs)
    return groups


def _merge_parameters(
    parts: list[_Opened], groups: tuple[Group, ...], fail: Callable[[str, str], FileError]
) -> tuple[Parameter, ...]:
    """Return the parameters in the order of the set, if each has a position of its own, within its group (R26)."""
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
    return ordered


def _shared(state: OptimizerState) -> str:
    """Return the members that all shards of a set share, as text: all but parameters and those of the first alone."""
    groups = tuple(replace(group, count=0) for group in state.groups)
    rest = replace(state, groups=groups, parameters=(), globals={}, origin={}, extra={}, unknown={})
    return dumps(encode(rest).members)


def _unknown(parts: list[_Opened]) -> Mapping[str, Any]:
    """Return the members that this version does not know. Only those of the first shard can be kept."""
    head, *others = [part.state.unknown for part in parts]
    lost = sorted({key for unknown in others for key in unknown if key != "version"})
    return {**head, "version": others[0]["version"], NESTED: lost} if lost else head
