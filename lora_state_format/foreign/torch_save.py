"""Files that ``torch.load(weights_only=True)`` reads, written without torch, tensors streamed.

The archive is torch's: stored zip members ``data.pkl``, ``byteorder``, ``version`` and one per tensor, whose bytes
start at multiples of 64. The pickle is of protocol 2 and holds plain values, tensors, and the objects that a ``Record``
stands for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import RefusedError, UnrepresentableError
from lora_state_format.foreign import pickles
from lora_state_format.foreign.pickles import Global, Record
from lora_state_format.foreign.zips import Archive
from lora_state_format.io.atomic import write_file
from lora_state_format.io.ledger import Ledger, crc32
from lora_state_format.io.strict_json import utf8
from lora_state_format.model.dtypes import NAMES
from lora_state_format.model.sources import Memory, Source
from lora_state_format.model.states import Scalar, Slot
from lora_state_format.model.tensors import CHUNK, Tensor, c_strides, contiguous

__all__ = ["archive", "dumps", "pack", "save", "with_items"]

ALIGNMENT: Final = 64
_STREAMED: Final = 0x0808  # sizes and CRC follow the data; names are UTF-8
_BIG: Final = 0xFFFFFFFF

_STORAGES: Final = {
    "BOOL": "BoolStorage", "U8": "ByteStorage", "I8": "CharStorage", "I16": "ShortStorage", "I32": "IntStorage",
    "I64": "LongStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage", "F32": "FloatStorage",
    "F64": "DoubleStorage", "C64": "ComplexFloatStorage",
}  # fmt: skip
"""dtype -> torch's class for storages of it."""

_UNTYPED: Final = {dtype: name for dtype, name in NAMES.items() if dtype not in _STORAGES}
"""dtype -> torch's name, for those that torch saves in untyped storages."""


def save(value: Any, path: Path, *, force: bool = False) -> None:
    """Write one file, whole or not at all. Raises ``TargetExistsError``, and what ``pack`` raises."""
    write_file(path, pack(value), force=force)


def pack(value: Any) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a file in order; each chunk is valid until the next one is asked for.

    Raises ``UnrepresentableError`` for a value that torch could not load back, and at the end ``FileError`` for bytes
    that are not what their files state.
    """
    ledger = Ledger()
    yield from archive(value, ledger)
    ledger.check()


def archive(value: Any, ledger: Ledger, root: str = "archive") -> Iterator[bytes | memoryview]:
    """Yield the archive's bytes in order; each chunk is valid until the next is asked for.

    The CRCs that the tensors' sources state are noted in ``ledger``. Raises ``UnrepresentableError`` for a value
    that torch could not load back.
    """
    pickler = _Pickler()
    data = pickler.dump(value)
    small = {"data.pkl": data, "byteorder": b"little", "version": b"3\n"}
    members = {name: _bytes(Memory(content)) for name, content in small.items()}
    members |= {f"data/{key}": tensor for key, tensor in enumerate(pickler.tensors)}
    yield from _zipped({f"{root}/{name}": tensor for name, tensor in members.items()}, ledger)


def with_items(source: Source, items: Mapping[str, Any], path: object = None) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a file that ``torch.save`` wrote, with other items in the dict that it holds.

    All else that it holds is not looked at, and may be objects of any class: what sets the items is put in front of the
    pickle's end.

    Args:
        source: The file, which holds a dict.
        items: Values without tensors, which replace those of the same keys.
        path: The file, for messages.

    Raises:
        RefusedError: Another protocol of pickles than torch writes, or a file from before torch 1.6.
    """
    held = pickles.load(source, path)
    if (held.container, held.protocol) != ("zip", 2) or not isinstance(held.value, dict):
        raise RefusedError(
            f"is a {held.container} of pickle protocol {held.protocol} with a {type(held.value).__name__}: a dict as "
            "torch saves it today is expected",
            path=path,
        )
    old = Archive(source, path)
    place = next(name for name in old if name.endswith("/data.pkl"))
    end = b"".join(_plain(key) + dumps(value)[2:-1] + b"s" for key, value in items.items())
    data = bytes(old[place].bytes())[:-1] + end + b"."
    ledger = Ledger()
    yield from _zipped({name: _bytes(Memory(data) if name == place else old[name]) for name in old}, ledger)
    ledger.check()


def _bytes(source: Source) -> Tensor:
    return contiguous("U8", (source.size,), source)


def _zipped(members: Mapping[str, Tensor], ledger: Ledger) -> Iterator[bytes | memoryview]:
    """Yield an archive of stored members, as ``archive`` does."""
    buffer = memoryview(bytearray(CHUNK))
    position = 0
    directory = []
    for name, tensor in members.items():
        encoded = name.encode()
        big = tensor.size >= _BIG
        extra = struct.pack("<2H2Q", 1, 16, 0, 0) if big else b""
        padding = -(position + 30 + len(encoded) + len(extra) + 4) % ALIGNMENT
        extra += struct.pack("<2s H", b"FB", padding) + b"Z" * padding
        start = position
        yield (
            struct.pack("<4s5H3L2H", b"PK\3\4", 0, _STREAMED, 0, 0, 0, 0, 0, 0, len(encoded), len(extra))
            + encoded
            + extra
        )
        crc = 0
        for chunk in ledger.chunks(tensor, buffer, name):
            crc = crc32(chunk, crc)
            yield chunk
        yield struct.pack("<4sL2Q" if big else "<4s3L", b"PK\7\10", crc, tensor.size, tensor.size)
        position += 30 + len(encoded) + len(extra) + tensor.size + (24 if big else 16)
        directory.append((encoded, start, tensor.size, crc))
    yield _directory(directory, position)


def _directory(members: list[tuple[bytes, int, int, int]], start: int) -> bytes:
    """Return the central directory and the records behind it."""
    result = bytearray()
    for name, offset, size, crc in members:
        wide = [value for value in (size, size, offset) if value >= _BIG]
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        shown = min(size, _BIG)
        result += struct.pack(
            "<4s6H3L5H2L", b"PK\1\2", 0, 0, _STREAMED, 0, 0, 0, crc, shown, shown,
            len(name), len(extra), 0, 0, 0, 0, min(offset, _BIG),
        )  # fmt: skip
        result += name + extra
    count, size, end = len(members), len(result), start + len(result)
    if count >= 0xFFFF or start >= _BIG or size >= _BIG:
        result += struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
        result += struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    few = min(count, 0xFFFF)
    result += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, few, few, min(size, _BIG), min(start, _BIG), 0)
    return bytes(result)


def dumps(value: Any) -> bytes:
    """Return a pickle of values without tensors: DCP's ``.metadata``, for one."""
    pickler = _Pickler()
    data = pickler.dump(value)
    if pickler.tensors:
        raise UnrepresentableError("a tensor in a pickle that has no storages")
    return data


class _Pickler:
    """Protocol 2, no memo: what is referred to twice is written twice, but a tensor's storage only once."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.keys: dict[int, int] = {}

    def dump(self, value: Any) -> bytes:
        out = bytearray(b"\x80\x02")
        self._write(value, out)
        return bytes(out + b".")

    def _write(self, value: Any, out: bytearray) -> None:
        match value:
            case None | bool() | int() | float() | str():
                out += _plain(value)
            case bytes():
                # Protocol 2 has no bytes: this is how pickle itself writes them.
                self._record(Record("_codecs", "encode", (value.decode("latin-1"), "latin1")), out)
            case Slot():
                self._tensor(value.tensor, out)
            case Scalar():
                self._tensor(contiguous(value.dtype, (), Memory(value.data)), out)
            case Tensor():
                self._tensor(value, out)
            case tuple():
                self._tuple(value, out)
            case list() | Mapping():
                self._items(value, out)
            case Global():
                out += _global(value.module, value.name)
            case Record():
                self._record(value, out)
            case _:
                raise UnrepresentableError(f"a {type(value).__name__} cannot be written into a file that torch loads")

    def _items(self, value: list[Any] | Mapping[Any, Any], out: bytearray) -> None:
        """Write a list or a dict: an empty one, then its items between marks, if it has any."""
        mapping = isinstance(value, Mapping)
        out += b"}" if mapping else b"]"
        if not value:
            return
        out += b"("
        for item in chain.from_iterable(value.items()) if isinstance(value, Mapping) else value:
            self._write(item, out)
        out += b"u" if mapping else b"e"

    def _record(self, value: Record, out: bytearray) -> None:
        """Write a call of a global, or an object of a class with its state."""
        out += _global(value.module, value.name)
        self._tuple(value.args, out)
        if value.state is None:
            out += b"R"
        else:
            out += b"\x81"
            self._write(value.state, out)
            out += b"b"

    def _tuple(self, values: tuple[Any, ...], out: bytearray) -> None:
        out += b"(" if len(values) > 3 else b""
        for item in values:
            self._write(item, out)
        out += (b")", b"\x85", b"\x86", b"\x87")[len(values)] if len(values) <= 3 else b"t"

    def _tensor(self, tensor: Tensor, out: bytearray) -> None:
        key = self.keys.setdefault(id(tensor), len(self.tensors))
        if key == len(self.tensors):
            self.tensors.append(tensor)
        untyped = _UNTYPED.get(tensor.dtype)
        if untyped is None and tensor.dtype not in _STORAGES:
            raise UnrepresentableError(f"torch has no storage for {tensor.dtype}")
        out += f"ctorch._utils\n_rebuild_tensor_v{3 if untyped else 2}\n(".encode()
        self._tuple(
            (
                "storage",
                Global(
                    "torch.storage" if untyped else "torch", "UntypedStorage" if untyped else _STORAGES[tensor.dtype]
                ),
                str(key),
                "cpu",
                tensor.size if untyped else tensor.count,
            ),
            out,
        )
        out += b"Q"
        for part in (0, tensor.shape, c_strides(tensor.shape), False, Record("collections", "OrderedDict")):
            self._write(part, out)
        if untyped:
            self._write(Global("torch", untyped), out)
        out += b"tR"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _plain(value: bool | float | str | None) -> bytes:
    """Return the opcodes of a value that holds no others."""
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return _integer(value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            text = utf8(value)
            return b"X" + struct.pack("<L", len(text)) + text


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    if len(data) > 255:
        raise UnrepresentableError(f"an integer of {len(data)} bytes cannot be written into a file that torch loads")
    return b"\x8a" + bytes([len(data)]) + data
