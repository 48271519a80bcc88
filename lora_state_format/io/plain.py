"""The one writer of safetensors: tensors under keys, and strings about them; our own format adds its metadata.

Every file is laid out alike: wide elements first, so that all are aligned, and the data at a multiple of ``ALIGNMENT``,
or of what the program that is to read it uses.
While the bytes stream by, what their files state of them is checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lora_state_format.io.atomic import write_file
from lora_state_format.io.ledger import Ledger
from lora_state_format.io.safetensors import ALIGNMENT
from lora_state_format.io.strict_json import utf8
from lora_state_format.model.dtypes import BITS
from lora_state_format.model.tensors import CHUNK, Tensor

__all__ = ["Item", "entries", "header", "in_data_order", "pack", "padded", "save"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor to write: the bytes of ``tensor``, or what ``function`` makes of each chunk, in elements of ``dtype``.

    ``name`` is what messages call it.
    """

    name: str
    tensor: Tensor
    dtype: str
    function: Callable[[memoryview], memoryview] | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.tensor.count * BITS[self.dtype] // 8


def in_data_order(items: Iterable[T], dtype: Callable[[T], str]) -> list[T]:
    """Return items in the order of a file's data: wide elements first, else as they come."""
    return sorted(items, key=lambda item: -BITS[dtype(item)])


def entries(described: Iterable[tuple[str, str, Sequence[int], int]]) -> Iterator[str]:
    """Yield the members of a header, for keys as JSON, dtypes, shapes and sizes in bytes, in data order."""
    position = 0
    for key, dtype, shape, size in described:
        end = position + size
        yield f'{key}:{{"dtype":"{dtype}","shape":[{",".join(map(str, shape))}],"data_offsets":[{position},{end}]}}'
        position = end


def padded(members: bytes, alignment: int = ALIGNMENT) -> bytes:
    """Return the length and the header, with spaces behind it up to the alignment."""
    raw = members + b" " * (-(8 + len(members)) % alignment)
    return len(raw).to_bytes(8, "little") + raw


def header(
    described: Iterable[tuple[str, str, Sequence[int], int]],
    metadata: Mapping[str, str] | None = None,
    alignment: int = ALIGNMENT,
) -> bytes:
    """Return the length and the header of a file with these keys, dtypes, shapes and sizes in bytes, in data order."""
    text = json.dumps(metadata, separators=(",", ":")) if metadata else ""
    members = [f'"__metadata__":{text}'] if metadata else []
    members += entries((json.dumps(key), dtype, shape, size) for key, dtype, shape, size in described)
    return padded(f"{{{','.join(members)}}}".encode(), alignment)


def pack(
    items: Mapping[str, Tensor | Item], metadata: Mapping[str, str] | None = None, alignment: int = ALIGNMENT
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a file; each chunk is valid until the next one is asked for.

    Raises ``FileError`` and ``DigestError`` at the end for bytes that are not what their files state.
    """
    named = {key: Item(key, item, item.dtype) if isinstance(item, Tensor) else item for key, item in items.items()}
    ordered = in_data_order(sorted(named.items()), lambda pair: pair[1].dtype)
    utf8("".join(named))
    yield header(((key, item.dtype, item.tensor.shape, item.size) for key, item in ordered), metadata, alignment)
    ledger, buffer = Ledger(), memoryview(bytearray(CHUNK))
    for _, item in ordered:
        for chunk in ledger.chunks(item.tensor, buffer, item.name):
            yield chunk if item.function is None else item.function(chunk)
    ledger.check()


def save(
    items: Mapping[str, Tensor | Item], path: Path, *, metadata: Mapping[str, str] | None = None, force: bool = False
) -> None:
    """Write tensors as one file, whole or not at all.

    Raises ``TargetExistsError`` unless ``force``, and what ``pack`` raises.
    """
    write_file(path, pack(items, metadata), force=force)
