"""flax's msgpack: bytes <-> trees of ranges of the file. Neither flax nor jax is needed.

``flax.serialization`` writes maps of msgpack whose arrays are ext types, their payload again msgpack: shape, name of
the dtype, bytes. An array above 1 GiB is a map of chunks. EasyLM writes a stream of such leaves, each after its path.

A file is walked by hand, as a msgpack library would copy every array twice before it could be looked at; here an array
stays where it is. Some input that flax accepts is refused: unknown ext types, duplicate keys, negative dimensions,
lists.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, RefusedError, UnrepresentableError
from lora_state_format.foreign.optax_nodes import Tree
from lora_state_format.io.atomic import write_file
from lora_state_format.io.ledger import Ledger
from lora_state_format.io.strict_json import utf8
from lora_state_format.model.dtypes import NAMES, item_size
from lora_state_format.model.sources import File
from lora_state_format.model.states import Scalar
from lora_state_format.model.tensors import CHUNK, Flat, Piece, Tensor, contiguous

__all__ = ["first_key", "load", "packed", "save"]

DTYPES: Final = {name: dtype for dtype, name in NAMES.items()}
"""NumPy's name of a dtype, as flax writes it -> safetensors'."""
CHUNKED: Final = "__msgpack_chunked_array__"
MAX_PLAIN: Final = 1 << 30
"""Bytes up to which flax writes an array in one piece."""
MAX_DEPTH: Final = 64
MAX_NODES: Final = 500_000
MAX_TEXT: Final = 4096
MAX_DIMENSIONS: Final = 32
WINDOW: Final = 512
"""Bytes read at once, more than between two arrays."""


# --- reading ------------------------------------------------------------------------------------------------------


def load(file: File) -> dict[str, Tree]:
    """Return the tree in a file of flax, or in a stream of EasyLM. Raises ``FileError`` and ``RefusedError``."""
    reader = _MsgpackReader(file)
    if reader.is_stream():
        return reader.stream()
    tree = reader.value(0)
    if not isinstance(tree, dict):
        raise FileError("is not a map of msgpack, as flax writes it", path=file.path)
    if reader.position != file.size:
        raise FileError(f"goes on for {file.size - reader.position} bytes behind its map", path=file.path)
    return tree


def first_key(file: File) -> str | None:
    """Return the first key of a msgpack map, or of a stream's first path; ``None`` if it is neither."""
    reader = _MsgpackReader(file)
    try:
        if reader.is_stream():
            reader.head()
            reader.head()
        else:
            kind, size = reader.head()
            if kind != "map" or size == 0:  # a pickle too begins as an empty map does
                return None
        key = reader.value(0)
    except FileError:
        return None
    return str(key) if isinstance(key, (str, int)) else None


_FIXED: Final = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS: Final = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i",
    0xD3: ">q",
}  # fmt: skip
_SIZED: Final = {
    0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4), 0xC7: ("ext", 1), 0xC8: ("ext", 2), 0xC9: ("ext", 4),
    0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4), 0xDC: ("list", 2), 0xDD: ("list", 4), 0xDE: ("map", 2),
    0xDF: ("map", 4),
}  # fmt: skip
"""First byte -> kind, and bytes of the size behind it."""


class _MsgpackReader:
    """A file of msgpack, read from the front; the bytes of arrays are skipped."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.position = 0
        self.nodes = 0
        self._window = b""
        self._start = 0

    def fail(self, detail: str) -> FileError:
        return FileError(f"{detail}, at byte {self.position}", path=self.file.path)

    def take(self, size: int) -> bytes:
        start = self.position - self._start
        if start + size > len(self._window):
            rest = self.file.size - self.position
            if size > rest:
                raise self.fail(f"ends {size - rest} bytes before the end of what it announces")
            self._window = bytes(self.file.read(self.position, min(max(size, WINDOW), rest)))
            self._start, start = self.position, 0
        self.position += size
        return self._window[start : start + size]

    def head(self) -> tuple[str, Any]:
        """Return the next object: its kind, and its value or size. An ext is ``ext`` with its size."""
        code = self.take(1)[0]
        if code in _FIXED:
            return "value", _FIXED[code]
        if code in _NUMBERS:
            return "value", struct.unpack(_NUMBERS[code], self.take(struct.calcsize(_NUMBERS[code])))[0]
        if code in _SIZED:
            kind, width = _SIZED[code]
            return kind, int.from_bytes(self.take(width), "big")
        if code <= 0x7F or code >= 0xE0:
            return "value", code - 256 * (code >= 0xE0)
        if 0xD4 <= code <= 0xD8:
            return "ext", 1 << (code - 0xD4)
        if code == 0xC1:
            raise self.fail("0xc1, which msgpack does not use")
        return ("map", code & 15) if code < 0x90 else ("list", code & 15) if code < 0xA0 else ("str", code & 31)

    def value(self, depth: int) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self.fail(f"more than {MAX_NODES} nodes")
        if depth > MAX_DEPTH:
            raise self.fail(f"nested deeper than {MAX_DEPTH} levels")
        kind, value = self.head()
        if kind == "value":
            return value
        if kind == "str":
            return self.text(value)
        if kind == "map":
            return self.mapping(value, depth)
        if kind == "ext":
            return self.array(value)
        raise RefusedError(f"a {kind} at byte {self.position}, where flax writes maps and arrays", path=self.file.path)

    def text(self, size: int) -> str:
        if size > MAX_TEXT:
            raise self.fail(f"a text of {size} bytes, beyond {MAX_TEXT}")
        try:
            return self.take(size).decode()
        except UnicodeDecodeError:
            raise self.fail("a text that is not UTF-8") from None

    def key(self) -> str:
        kind, value = self.head()
        if kind == "str":
            return self.text(value)
        if type(value) is int and kind == "value" and value >= 0:  # flax's nnx numbers the items of its lists
            return str(value)
        raise self.fail(f"the key {value!r} in a map" if kind == "value" else f"a {kind} as a key in a map")

    def mapping(self, count: int, depth: int) -> Tree:
        result: dict[str, Any] = {}
        for _ in range(count):
            key = self.key()
            if key in result:
                raise self.fail(f"the key '{key}' twice in a map")
            result[key] = self.value(depth + 1)
        return self.joined(result) if CHUNKED in result else result

    def array(self, size: int) -> Tensor | Scalar:
        kind = int.from_bytes(self.take(1), "big", signed=True)
        end = self.position + size
        if kind not in (1, 3):
            what = "a complex number" if kind == 2 else f"an ext of type {kind}"
            raise RefusedError(f"{what} at byte {self.position}, where flax writes arrays", path=self.file.path)
        outer, count = self.head()
        inner, dimensions = self.head()
        if (outer, count, inner) != ("list", 3, "list") or dimensions > MAX_DIMENSIONS:
            raise self.fail("an array that does not begin with its shape")
        shape = [self.head() for _ in range(dimensions)]
        if not all(kind == "value" and type(n) is int and n >= 0 for kind, n in shape):
            raise self.fail("an array with a dimension that is not a natural number")
        name = self.value(0)
        if not isinstance(name, str) or name not in DTYPES:
            raise RefusedError(
                f"an array of type {name!r} at byte {self.position}: safetensors has no such type", path=self.file.path
            )
        kind_of_bytes, held = self.head()
        sizes, dtype = tuple(n for _, n in shape), DTYPES[name]
        if kind_of_bytes != "bin" or held != prod(sizes) * item_size(dtype) or self.position + held != end:
            raise self.fail(f"an array of type {name} and shape {list(sizes)} with {held} bytes in an ext of {size}")
        start = self.position
        if end > self.file.size:
            raise self.fail(f"ends {end - self.file.size} bytes before the end of an array")
        if not sizes:
            return Scalar(dtype, self.take(held))
        self.position = end
        return contiguous(dtype, sizes, self.file, start)

    def joined(self, parts: dict[str, Any]) -> Tensor:
        """Return an array that was written in chunks."""

        def items(tree: Any) -> list[Any]:
            if not isinstance(tree, dict) or set(tree) != {str(index) for index in range(len(tree))}:
                raise self.fail("an array in chunks without a plain list of them, or of its dimensions")
            return [tree[str(index)] for index in range(len(tree))]

        if set(parts) != {CHUNKED, "shape", "chunks"} or parts[CHUNKED] is not True:
            raise self.fail("an array in chunks with other members than shape and chunks")
        shape, chunks = items(parts["shape"]), items(parts["chunks"])
        if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
            raise self.fail("an array in chunks with a dimension that is not a natural number")
        flat = all(isinstance(chunk, Tensor) and len(chunk.shape) == 1 for chunk in chunks)
        if not chunks or not flat or len({chunk.dtype for chunk in chunks}) > 1:
            raise self.fail("an array in chunks that are not flat, or not of one type")
        if sum(chunk.count for chunk in chunks) != prod(shape):
            raise self.fail(f"an array of shape {shape} in chunks of {[chunk.count for chunk in chunks]} elements")
        pieces, start = [], 0
        for chunk in chunks:
            pieces.append(Piece(self.file, chunk.pieces[0].offset, Flat(start, chunk.count)))
            start += chunk.count
        return Tensor(chunks[0].dtype, tuple(shape), tuple(pieces))

    def is_stream(self) -> bool:
        """Return whether pairs follow, the first of each a list of keys."""
        start = self.position
        found = self.file.size > 1 and self.head() == ("list", 2) and self.head()[0] == "list"
        self.position = start
        return found

    def stream(self) -> dict[str, Any]:
        """Return the tree whose leaves follow one another, each after its path, in a bin of its own."""
        tree: dict[str, Any] = {}
        while self.position < self.file.size:
            if self.head() != ("list", 2) or (head := self.head())[0] != "list" or not 0 < head[1] <= MAX_DEPTH:
                raise self.fail("an entry of the stream that is not a pair of a path and a value")
            keys = [self.value(0) for _ in range(head[1])]
            if not all(isinstance(key, str) for key in keys):
                raise self.fail("a path with a key that is not text")
            kind, size = self.head()
            start = self.position
            value = self.value(0)
            if kind != "bin" or self.position != start + size:
                raise self.fail("a value that is not as long as it says")
            inner = tree
            for key in keys[:-1]:
                inner = inner.setdefault(key, {})
                if not isinstance(inner, dict):
                    raise self.fail(f"a path through '{key}', which is not a map")
            if keys[-1] in inner:
                raise self.fail(f"the path {'/'.join(keys)} twice")
            inner[keys[-1]] = value
        return tree


# --- writing ------------------------------------------------------------------------------------------------------


def save(tree: Tree, path: Path, *, force: bool = False) -> None:
    """Write a tree as one file, whole or not at all. Raises ``TargetExistsError``, and what ``packed`` raises."""
    write_file(path, packed(tree), force=force)


def packed(tree: Tree) -> Iterator[bytes | memoryview]:
    """Yield the bytes that flax makes of a tree; each chunk is valid until the next is asked for.

    Raises ``UnrepresentableError`` for a dtype that flax does not have, and ``FileError`` at the end if bytes do not
    have the CRC that their source states.
    """
    ledger = Ledger()
    yield from _packed(tree, ledger, memoryview(bytearray(CHUNK)))
    ledger.check()


def _packed(tree: Tree, ledger: Ledger, buffer: memoryview) -> Iterator[bytes | memoryview]:
    import msgpack

    if isinstance(tree, Tensor) and tree.size > MAX_PLAIN:
        count = MAX_PLAIN // item_size(tree.dtype)
        starts = range(0, tree.count, count)
        chunks = {str(n): _cut(tree, start, min(count, tree.count - start)) for n, start in enumerate(starts)}
        shape = {str(axis): size for axis, size in enumerate(tree.shape)}
        yield from _packed({CHUNKED: True, "shape": shape, "chunks": chunks}, ledger, buffer)
    elif isinstance(tree, Tensor):
        yield _array_head(tree.dtype, tree.shape, tree.size)
        yield from ledger.chunks(tree, buffer)
    elif isinstance(tree, Scalar):
        yield _array_head(tree.dtype, (), len(tree.data)) + tree.data
    elif isinstance(tree, Mapping):
        yield msgpack.Packer().pack_map_header(len(tree))
        for key, value in tree.items():
            if isinstance(key, str):
                utf8(key)
            yield msgpack.packb(key)
            yield from _packed(value, ledger, buffer)
    else:
        yield msgpack.packb(tree)


def _cut(tensor: Tensor, start: int, count: int) -> Tensor:
    """Return consecutive elements of a tensor, in C order, as a flat one."""
    return contiguous(tensor.dtype, (count,), tensor, start * item_size(tensor.dtype))


def _array_head(dtype: str, shape: tuple[int, ...], size: int) -> bytes:
    """Return all of an array that precedes its bytes."""
    import msgpack

    if dtype not in NAMES:
        raise UnrepresentableError(f"flax has no name for the type {dtype}")
    inner: bytes = b"\x93" + msgpack.packb(shape) + msgpack.packb(NAMES[dtype]) + _sized(0xC4, size)
    whole = len(inner) + size
    outer = bytes([0xD4 + whole.bit_length() - 1]) if whole in (1, 2, 4, 8, 16) else _sized(0xC7, whole)
    return outer + b"\x01" + inner


def _sized(code: int, size: int) -> bytes:
    """Return the head of a kind whose three codes announce sizes of 1, 2 and 4 bytes."""
    index = 0 if size < 1 << 8 else 1 if size < 1 << 16 else 2
    return bytes([code + index]) + size.to_bytes(1 << index, "big")
