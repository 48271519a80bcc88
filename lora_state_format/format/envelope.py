"""The envelope of a manifest: the header's first bytes, its digest, the index of a set.

The comments cite the rules of ``spec/format.md``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError
from lora_state_format.format.manifest import FORMAT, HEX
from lora_state_format.io.files import is_plain
from lora_state_format.io.remote import exists, is_file, open_file
from lora_state_format.io.safetensors import ALIGNMENT, Header, Raw
from lora_state_format.io.strict_json import dumps, loads

__all__ = ["INDEX_SUFFIX", "find_state", "is_state"]

MAX_SHARDS: Final = 256

MAX_INDEX: Final = 64 << 20
"""Bytes of a set's index."""

INDEX_SUFFIX: Final = ".index.json"

PLACES: Final = ("training_state/optimizer.safetensors", "optimizer.safetensors")
"""Where the state lies in a checkpoint folder."""

ZERO: Final = "0" * 32

METADATA: Final = "optimizer_state"

PREFIX: Final = b'{"__metadata__":{"' + METADATA.encode() + b'":"{\\"digest\\":\\"'
"""The first bytes of every file's header (R7); the digest's 32 digits follow."""

INDEX_PREFIX: Final = b'{"metadata":{"format":"' + FORMAT.encode() + b'"'


def is_ours(raw: Raw) -> bool:
    return raw.startswith(PREFIX, 8) and HEX.fullmatch(stated_digest(raw)) is not None


def stated_digest(raw: Raw) -> str:
    """Return the digest that a header states."""
    return raw[8 + len(PREFIX) :][:32].decode("ascii", "replace")


def header_digest(raw: Raw) -> str:
    """BLAKE2b-128 of the length and the header, the digest's own digits as zeros (R9)."""
    start, view = 8 + len(PREFIX), memoryview(raw)
    hasher = blake2b(view[:start], digest_size=16)
    hasher.update(ZERO.encode())
    hasher.update(view[start + 32 :])
    return hasher.hexdigest()


def is_state(path: str | os.PathLike[str]) -> bool:
    """Return whether a path looks, by its first bytes, like a file or the index of a set of named state."""
    path = Path(path)
    index = find_index(path)
    start, prefix = (8, PREFIX) if index is None else (0, INDEX_PREFIX)
    if not is_file(index or path):
        return False
    with open_file(index or path) as file:
        return file.size >= start + len(prefix) and file.read(start, len(prefix)) == prefix


def find_state(path: Path) -> Path | None:
    """Return where named state is: at the path itself, or where a checkpoint's folder has it."""
    return next((place for place in (path, *(path / place for place in PLACES)) if is_state(place)), None)


def manifest_members(raw: Raw, header: Header, path: object) -> dict[str, Any]:
    """Return the manifest's members, after the checks of the one metadata member that holds them (R7, R8)."""
    if METADATA not in header.metadata:
        raise FileError(f"a safetensors file without '{METADATA}': not named optimizer state", path=path, rule="R7")
    if len(header.metadata) != 1 or not is_ours(raw):
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


# --- sets of shards ----------------------------------------------------------------------------------------------


def index_of(path: Path) -> Path:
    return path.parent / (path.name + INDEX_SUFFIX)  # not with_name: "." and "/" have none


def find_index(path: Path) -> Path | None:
    if path.name.endswith(INDEX_SUFFIX):
        return path
    return index_of(path) if exists(index_of(path)) else None


def set_id(contents: Iterable[str]) -> str:
    """Return the set's id (R24): BLAKE2b-128 of the shards' header digests, each taken with the id as zeros."""
    return blake2b("".join(contents).encode(), digest_size=16).hexdigest()


def read_index(index: Path) -> dict[str, Any]:
    """Return the members of an index, checked for themselves (R25)."""

    def fail(detail: str) -> FileError:
        return FileError(detail, path=index, rule="R25")

    with open_file(index) as file:
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
            case {"digest": str(), "file": name} if len(item) == 2 and is_plain(name):
                pass
            case _:
                raise fail(f"shards holds {dumps(item)[:100]!r}, expected a digest and the name of a file next to it")
    return members
