"""Files that ``torch.save`` wrote, read without torch and without running anything.

A pickle is a program for a stack machine. ``_Machine`` is that machine with everything dangerous left out: the module
``pickle`` is not imported, a global is never looked up anywhere but in ``GLOBALS``, and what is built out of one is a
tensor, a plain Python value, or an inert ``Record``. What is not in there is only a name: whatever the pickle makes of
it is an empty ``Foreign``. The opcodes are those of ``Lib/pickletools.py`` (protocols 2 to 5); what torch puts into
them is described in ``torch/serialization.py`` and ``torch/_utils.py``.

Memory and time grow with the pickle's size and are bounded by the constants below.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from lora_state_format.errors import FileError, RefusedError
from lora_state_format.foreign.zips import Archive
from lora_state_format.io.ledger import crc32
from lora_state_format.model.dtypes import NAMES, item_size
from lora_state_format.model.gc import paused
from lora_state_format.model.sources import File, Memory, Range, Source
from lora_state_format.model.tensors import Box, Piece, Tensor, c_strides, contiguous

__all__ = [
    "DTYPES",
    "Foreign",
    "Global",
    "NumpyScalar",
    "Pickled",
    "Record",
    "array",
    "container",
    "is_bounded",
    "load",
    "load_plain",
    "mentions",
]

MAX_PICKLE: Final = 40 << 20
"""Bytes of one pickle; an Adam state of 100,000 parameters has 24 MB."""

MAX_BUILT: Final = 430_000_000
"""Bytes of memory that are counted while a pickle is read; that same state counts 340 MB."""

CHECKED: Final = 1 << 16
"""Bytes of a pickle between two looks at ``MAX_BUILT``."""

MAX_DEPTH: Final = 200
"""How deep values may be nested in each other, and marks on the stack."""

MAX_REFERENCES: Final = 1_000_000
"""Values in the result beyond one for each byte of the pickle. Each is counted as often as it is referred to: shared
lists of shared lists unfold without end."""

MAX_ODD_KEYS: Final = 10_000
"""Tuples as keys, and integers beyond 64 bits: their hashes can be made to collide, and dicts become quadratic."""

MAX_REPEATS: Final = 16
"""How often a file's bytes may appear in its tensors (shared and expanded storages), beyond the first 64 MiB."""

MAX_ALIKE: Final = 4096
"""Bytes of a pickle that is kept for others like it; a tensor's has some 200."""

MAX_INTEGER: Final = 256
"""Bytes of an integer."""

MAX_NAME: Final = 256
"""Bytes of a module's or a global's name."""

MAGIC: Final = 0x1950A86A20F9469CFC6C
"""What the stream that torch wrote before 1.6 begins with, as a pickled integer."""

_U16, _I32, _U32, _I64, _U64 = (struct.Struct(code) for code in ("<H", "<i", "<I", "<q", "<Q"))
_F64 = struct.Struct(">d")

(
    MARK, STOP, POP, POP_MARK, DUP, BINFLOAT, BININT, BININT1, BININT2, LONG1, LONG4, BINSTRING, SHORT_BINSTRING,
    BINUNICODE, SHORT_BINUNICODE, BINUNICODE8, BINBYTES, SHORT_BINBYTES, BINBYTES8, BYTEARRAY8, NONE, NEWTRUE, NEWFALSE,
    EMPTY_TUPLE, TUPLE, TUPLE1, TUPLE2, TUPLE3, EMPTY_LIST, LIST, APPEND, APPENDS, EMPTY_DICT, DICT, SETITEM, SETITEMS,
    EMPTY_SET, ADDITEMS, FROZENSET, BINGET, LONG_BINGET, BINPUT, LONG_BINPUT, MEMOIZE, GLOBAL, STACK_GLOBAL, REDUCE,
    BUILD, NEWOBJ, NEWOBJ_EX, BINPERSID, PROTO, FRAME,
) = (
    b"(.012GJKM\x8a\x8bTUX\x8c\x8dBC\x8e\x96N\x88\x89)t\x85\x86\x87]lae}dsu\x8f\x90\x91hjqr\x94c\x93Rb\x81\x92Q\x80\x95"
)  # fmt: skip

_SIZED: Final = {  # opcode -> bytes of its length
    BINSTRING: 4, SHORT_BINSTRING: 1, BINUNICODE8: 8, BINBYTES: 4, SHORT_BINBYTES: 1, BINBYTES8: 8, BYTEARRAY8: 8,
    LONG1: 1, LONG4: 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A class, function or dtype that a pickle names. It stands for the name and does nothing by itself."""

    module: str
    name: str
    call: Callable[..., Any] | None = None
    known: bool = True

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Record:
    """An object of a class that is known by name only: what it was to be called with, and its state."""

    module: str
    name: str
    args: tuple[Any, ...] = ()
    state: Any = None


@dataclass(slots=True, eq=False)
class Foreign:
    """An object of a class that nothing here knows; nothing of it is kept, so it may refer to itself.

    Of one that looks like a whole ``torch.nn.Module``, ``parts`` has the dicts of its parameters and of its modules; of
    one that looks like a whole ``torch.optim.Optimizer``, ``optimizer`` has its state and its groups. Both may be deep,
    or hold themselves: ``is_bounded`` tells.
    """

    module: str
    name: str
    parts: tuple[Mapping[Any, Any], Mapping[Any, Any]] | None = None
    optimizer: tuple[Mapping[Any, Any], list[Any]] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class NumpyScalar:
    """A NumPy scalar as the Python number of the same value; ``dtype`` is NumPy's code (``f8``)."""

    value: bool | int | float | complex
    dtype: str


@dataclass(frozen=True, slots=True, eq=False)
class Pickled:
    """What a file holds. ``storages`` are its storages by key, whether or not some tensor shows all of their bytes."""

    value: Any
    container: str
    protocol: int
    storages: Mapping[str, Range]


@dataclass(slots=True)
class _Storage:
    """``count`` elements of ``width`` bytes; ``dtype`` is torch's name."""

    source: Range
    dtype: str
    width: int
    count: int


class _MalformedError(Exception):
    """What is wrong with a pickle, before it is said where; ``kind`` is the error that the caller gets."""

    def __init__(self, detail: str, kind: type[FileError] = FileError) -> None:
        super().__init__(detail)
        self.kind = kind


class _CutShortError(Exception):
    """The pickle goes on behind the bytes that were given."""


class _Machine:
    """Builds the values of the pickles in ``data``.

    ``open_storage`` gives the bytes of a storage by its key and size; ``room`` is how many bytes of tensors may come of
    it. Errors name the byte of ``where`` (a member, a file) at which a pickle went wrong. Where ``data`` is only the
    beginning of it (``windowed``), running into its end raises ``_CutShortError``. ``inner`` says that the pickle is
    itself a value of another one.
    """

    def __init__(
        self,
        data: bytes,
        path: object,
        where: str,
        room: int = 0,
        open_storage: Callable[[str, int], Range] | None = None,
        windowed: bool = False,
        inner: bool = False,
    ) -> None:
        self.data = data
        self.path = path
        self.where = where
        self.room = room
        self.open_storage = open_storage
        self.windowed = windowed
        self.inner = inner
        self.storages: dict[str, Range] = {}
        self.widths: dict[str, int] = {}
        self.protocol = 0
        self._layouts: dict[Any, tuple[Box, tuple[int, ...] | None, int, int]] = {}
        self._built = self._payload = 0
        self._odd_keys = 0
        self._at = 0

    def run(self, start: int = 0) -> tuple[Any, int]:
        """Return the value of the pickle that starts at byte ``start``, and the byte behind its end."""
        try:
            value, end = self._run(start)
            _check_tree(value, len(self.data) + MAX_REFERENCES)
            return value, end
        except _MalformedError as error:
            nothing = "; nothing was run" if error.kind is RefusedError else ""
            detail = f"{error}, at byte {self._at} of {self.where}{nothing}"
            raise error.kind(detail, path=self.path) from error.__cause__
        except FileError:
            raise
        except (_CutShortError, IndexError, struct.error) as error:
            if type(error) is _CutShortError or self._at + 9 > len(self.data):
                if self.windowed:
                    raise _CutShortError from error
                raise FileError(f"the pickle in {self.where} is cut short", path=self.path) from error
            raise self._malformed() from error
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise self._malformed() from error

    def _malformed(self) -> FileError:
        return FileError(f"the pickle is not well-formed, at byte {self._at} of {self.where}", path=self.path)

    def _run(self, i: int) -> tuple[Any, int]:
        data, end = self.data, len(self.data)
        u32 = _U32.unpack_from
        value: Any
        stack: list[Any] = []
        marks: list[list[Any]] = []
        memo: list[Any] = []
        built = at = self._payload = 0
        begin = i
        try:
            while i < end:
                # The lists grow by one entry at most with each byte: looking now and then is enough.
                lists = 9 * (len(stack) + len(memo) + sum(map(len, marks)))
                if built + lists + self._built > MAX_BUILT:
                    raise _MalformedError(f"the pickle builds more than {MAX_BUILT} bytes of objects")
                if i - begin - self._payload > MAX_PICKLE:
                    raise _MalformedError(f"the pickle has more than {MAX_PICKLE} bytes that are no array's")
                stop = min(end, i + CHECKED)
                # The branches stand in the order of their frequency, and so do those of the newer opcodes: 0.15 s for
                # the `.metadata` of 20,000 chunks.
                while i < stop:
                    at = i
                    op = data[i]
                    i += 1
                    if op == LONG_BINPUT:
                        if u32(data, i)[0] == len(memo):
                            memo.append(stack[-1])
                        else:
                            _put(memo, u32(data, i)[0], stack[-1])
                        i += 4
                    elif op == BINGET:
                        stack.append(memo[data[i]])
                        i += 1
                    elif op == BININT1:
                        stack.append(data[i])
                        i += 1
                    elif op >= PROTO:  # what protocols 2 to 5 brought
                        if op == MEMOIZE:
                            memo.append(stack[-1])
                        elif op == TUPLE2:
                            built += 72
                            value = stack.pop()
                            stack[-1] = (stack[-1], value)
                        elif op == SHORT_BINUNICODE:
                            size = data[i]
                            value = data[i + 1 : i + 1 + size]
                            i += 1 + size
                            if i > end:
                                raise _CutShortError
                            built += 64 + size
                            stack.append(value.decode())
                        elif op == TUPLE1:
                            built += 64
                            stack[-1] = (stack[-1],)
                        elif op == NEWOBJ:
                            value = stack.pop()
                            stack[-1] = self.call(stack[-1], value)
                        elif op == NEWFALSE:
                            stack.append(False)
                        elif op == TUPLE3:
                            built += 80
                            third, second = stack.pop(), stack.pop()
                            stack[-1] = (stack[-1], second, third)
                        elif op == NEWTRUE:
                            stack.append(True)
                        elif op == STACK_GLOBAL:
                            value = stack.pop()
                            stack[-1] = _global(stack[-1], value)
                        elif op == NEWOBJ_EX:
                            options, value = stack.pop(), stack.pop()
                            stack[-1] = self.call(stack[-1], (*value, options) if options else value)
                        elif op == PROTO:
                            self.protocol = data[i]
                            i += 1
                            if not 2 <= self.protocol <= 5:
                                raise _MalformedError(f"pickle protocol {self.protocol} is not one of 2 to 5")
                        elif op == FRAME:
                            i += 8
                            if i + _U64.unpack_from(data, i - 8)[0] > end:
                                raise _CutShortError
                        elif op == EMPTY_SET:
                            built += 232
                            stack.append(set())
                        elif op == ADDITEMS:
                            items = stack
                            stack = marks.pop()
                            built += 64 * len(items)
                            if type(stack[-1]) is not Foreign:
                                self.check_keys(items)
                                stack[-1].update(items)
                        elif op == FROZENSET:
                            items = stack
                            stack = marks.pop()
                            built += 232 + 64 * len(items)
                            self.check_keys(items)
                            stack.append(frozenset(items))
                        elif op in _SIZED:
                            value, i = self._sized(op, i)
                            stack.append(value)
                        else:
                            raise _unread(op)
                    elif op == MARK:
                        if len(marks) == MAX_DEPTH:
                            raise _MalformedError(f"more than {MAX_DEPTH} open marks")
                        marks.append(stack)
                        stack = []
                    elif op == LONG_BINGET:
                        stack.append(memo[u32(data, i)[0]])
                        i += 4
                    elif op == TUPLE:
                        value = tuple(stack)
                        built += 64 + 8 * len(value)
                        stack = marks.pop()
                        stack.append(value)
                    elif op == REDUCE:
                        value = stack.pop()
                        stack[-1] = self.call(stack[-1], value)
                    elif op == EMPTY_TUPLE:
                        stack.append(())
                    elif op == BINUNICODE:
                        size = u32(data, i)[0]
                        value = data[i + 4 : i + 4 + size]
                        i += 4 + size
                        if i > end:
                            raise _CutShortError
                        built += 64 + size
                        stack.append(value.decode())
                    elif op == BINPERSID:
                        built += 64
                        stack[-1] = self._storage(stack[-1])
                    elif op == BININT2:
                        built += 32
                        stack.append(data[i] | data[i + 1] << 8)
                        i += 2
                    elif op == EMPTY_DICT:
                        built += 80
                        stack.append({})
                    elif op == SETITEMS:
                        items = stack
                        stack = marks.pop()
                        built += 50 * len(items)
                        self.set(stack[-1], items)
                    elif op == BUILD:
                        value = stack.pop()
                        if type(stack[-1]) is Record:
                            stack[-1].state = value
                        elif type(stack[-1]) is Foreign:
                            stack[-1].parts, stack[-1].optimizer = _module_parts(value), _optimizer_parts(value)
                        elif type(stack[-1]) is not dict:  # the attributes of an OrderedDict are not kept
                            raise _MalformedError("the pickle sets the state of something that has none")
                    elif op == BININT:
                        built += 32
                        stack.append(_I32.unpack_from(data, i)[0])
                        i += 4
                    elif op == BINPUT:
                        _put(memo, data[i], stack[-1])
                        i += 1
                    elif op == SETITEM:
                        value, key = stack.pop(), stack.pop()
                        self.set(stack[-1], (key, value))
                    elif op == BINFLOAT:
                        built += 32
                        stack.append(_F64.unpack_from(data, i)[0])
                        i += 8
                    elif op == EMPTY_LIST:
                        built += 72
                        stack.append([])
                    elif op == APPENDS:
                        items = stack
                        stack = marks.pop()
                        _append(stack[-1], items)
                    elif op == APPEND:
                        value = stack.pop()
                        _append(stack[-1], (value,))
                    elif op == NONE:
                        stack.append(None)
                    elif op == GLOBAL:
                        words = data[i : i + 2 * MAX_NAME].split(b"\n", 2)
                        if len(words) < 3:
                            raise (
                                _MalformedError("a global has no name") if i + 2 * MAX_NAME <= end else _CutShortError
                            )
                        i += len(words[0]) + len(words[1]) + 2
                        stack.append(_global(words[0].decode(), words[1].decode()))
                    elif op == LIST:
                        built += 72
                        items = stack
                        stack = marks.pop()
                        stack.append(items)
                    elif op == DICT:
                        items = stack
                        stack = marks.pop()
                        built += 80 + 50 * len(items)
                        stack.append({})
                        self.set(stack[-1], items)
                    elif op == POP:
                        stack.pop()
                    elif op == POP_MARK:
                        stack = marks.pop()
                    elif op == DUP:
                        stack.append(stack[-1])
                    elif op == STOP:
                        if len(stack) != 1 or marks:
                            raise _MalformedError(f"the pickle stops with {len(stack)} values")
                        return stack[0], i
                    elif op in _SIZED:
                        value, i = self._sized(op, i)
                        stack.append(value)
                    else:
                        raise _unread(op)
            raise _CutShortError
        finally:
            self._at = at

    def charge(self, size: int) -> None:
        """Count memory before something is copied that the pickle may refer to again and again."""
        self._built += size
        if self._built > MAX_BUILT:
            raise _MalformedError(f"the pickle builds more than {MAX_BUILT} bytes of objects")

    def call(self, function: Any, args: Any) -> Any:
        if type(args) is not tuple or type(function) not in (Global, Foreign):
            raise _MalformedError("the pickle calls something that is no global")
        if type(function) is Global and function.call is not None:
            return function.call(self, *args)
        self._built += 100
        if type(function) is Global and function.known:
            return Record(function.module, function.name, args)
        made = args[0] if (function.module, function.name) in _MAKERS and args else function
        return Foreign(made.module, made.name) if type(made) is Global else Foreign(function.module, function.name)

    def set(self, target: Any, items: Sequence[Any]) -> None:
        if type(target) is Foreign:
            return
        if type(target) is not dict or len(items) % 2:
            raise _MalformedError("the pickle sets items of something that is no dict")
        keys = items[::2]
        self.check_keys(keys)
        target.update(zip(keys, items[1::2], strict=True))

    def check_keys(self, keys: Collection[Any]) -> None:
        """Before anything is hashed: Python hashes a tuple by recursion, and not by a random seed."""
        if _ODD.isdisjoint(map(type, keys)):
            return
        for key in keys:
            if type(key) in _ODD:
                self._count_odd_key()
                if type(key) is tuple and not all(type(part) in _PLAIN for part in key):
                    raise _MalformedError("a key that is a tuple of more than plain values")

    def _count_odd_key(self) -> None:
        self._odd_keys += 1
        if self._odd_keys > MAX_ODD_KEYS:
            raise _MalformedError(f"more than {MAX_ODD_KEYS} tuples as keys and integers beyond 64 bits")

    def _sized(self, op: int, i: int) -> tuple[str | bytes | bytearray | int, int]:
        """Return the value of an opcode that states how many bytes it has, and the byte behind it."""
        start = i + _SIZED[op]
        size = int.from_bytes(self.data[i:start], "little")
        data = self.data[start : start + size]
        if start + size > len(self.data):
            raise _CutShortError
        self._built += 64 + size
        self._payload += size
        return self._of_bytes(op, data), start + size

    def _of_bytes(self, op: int, data: bytes) -> str | bytes | bytearray | int:
        if op in (LONG1, LONG4):
            if len(data) > MAX_INTEGER:
                raise _MalformedError(f"an integer of {len(data)} bytes")
            if len(data) > 8:
                self._count_odd_key()
            return int.from_bytes(data, "little", signed=True)
        if op == BINUNICODE8:
            return data.decode()
        if op in (BINSTRING, SHORT_BINSTRING):  # Python 2's str: text where it is text
            try:
                return data.decode()
            except UnicodeDecodeError:
                return data
        return bytearray(data) if op == BYTEARRAY8 else data

    def _storage(self, identity: Any) -> _Storage | Any:
        """Return the storage of a persistent id, which is ``("storage", class, key, device, elements)``.

        The classes of whole modules were persistent too, with their source, in the stream from before torch 1.6.
        """
        if identity[:1] == ("module",) and len(identity) == 4:
            return identity[1]
        tag, kind, key, _, count = identity if len(identity) == 5 else identity[:5]
        if tag != "storage" or type(key) is not str or type(count) is not int or self.open_storage is None:
            raise _MalformedError("a persistent id that is no storage")
        if len(key) > MAX_NAME:
            raise _MalformedError(f"a storage with a key of {len(key)} characters")
        if len(identity) > 5 and identity[5] is not None:
            raise _MalformedError("a storage that is a view of another", RefusedError)
        dtype = _STORAGES[kind.name]
        width = _WIDTHS[dtype]
        source = self.storages.get(key)
        if source is None:
            self._built += 100
            source = self.storages[key] = self.open_storage(key, count * width)
            self.widths[key] = width
        if not 0 <= count * width <= source.size:
            raise _MalformedError(f"storage {key!r} of {count * width} bytes, for which the file holds {source.size}")
        return _Storage(source, dtype, width, count)

    def tensor(
        self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *rest: Any
    ) -> Tensor | Record:
        """Return a view of a storage, ``offset`` and ``strides`` in elements; inert if its dtype is unknown."""
        if type(storage) is not _Storage or type(offset) is not int or len(shape) != len(strides):
            raise _MalformedError("a tensor that is not made of a storage, an offset, a shape and strides")
        for n in (*shape, *strides):
            if type(n) is not int or n < 0:
                raise _MalformedError("a tensor whose shape or strides are not natural numbers")
        layout = self._layouts.get((shape, strides))
        if layout is None:
            span = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            dense = not span or all(n == 1 or s == c for n, s, c in zip(shape, strides, c_strides(shape), strict=True))
            layout = Box((0,) * len(shape), tuple(shape)), None if dense else tuple(strides), span, math.prod(shape)
            self._layouts[shape, strides] = layout
        box, gaps, span, count = layout
        if not 0 <= offset <= storage.count - span:
            raise _MalformedError(f"a tensor of {span} elements from {offset} on, in a storage of {storage.count}")
        self._built += 250
        dtype = DTYPES.get(storage.dtype)
        if dtype is None or (dtype == "F4" and (gaps or not shape)):
            return Record("torch", storage.dtype, (box.shape,))
        if rest and type(rest[-1]) is dict and (rest[-1].get("conj") or rest[-1].get("neg")):
            return Record("torch", "Tensor that is to be conjugated or negated", (box.shape,))
        if dtype == "F4":  # torch counts pairs, safetensors elements
            tensor = contiguous(dtype, (*shape[:-1], 2 * shape[-1]), storage.source, offset)
        else:
            tensor = Tensor(dtype, box.shape, (Piece(storage.source, offset * storage.width, box, gaps),))
        self.room -= count * storage.width
        if self.room < 0:
            raise _MalformedError(f"the tensors would hold more than {MAX_REPEATS} times the file's bytes")
        return tensor


def _module_parts(state: Any) -> tuple[Mapping[Any, Any], Mapping[Any, Any]] | None:
    """Return the parameters and modules in the state of a ``torch.nn.Module``; ``None`` for any other state."""
    if type(state) is not dict:
        return None
    parameters, modules = state.get("_parameters"), state.get("_modules")
    return (parameters, modules) if type(parameters) is dict and type(modules) is dict else None


def _optimizer_parts(state: Any) -> tuple[Mapping[Any, Any], list[Any]] | None:
    """Return the state and the groups in the state of a ``torch.optim.Optimizer``; ``None`` for any other state."""
    if type(state) is not dict:
        return None
    entries, groups = state.get("state"), state.get("param_groups")
    return (entries, groups) if type(entries) is dict and type(groups) is list else None


def is_bounded(value: Any) -> bool:
    """Return whether a walk over what a ``Foreign`` holds comes to an end: ``load`` promises that of all else."""
    try:
        _check_tree(value, MAX_REFERENCES)
    except _MalformedError:
        return False
    return True


def _unread(op: int) -> _MalformedError:
    return _MalformedError(f"pickle opcode {bytes([op])!r} is not read")


def _put(memo: list[Any], index: int, value: Any) -> None:
    """Entries are numbered in the order in which they are written; only an older one may be written again."""
    if index > len(memo):
        raise _MalformedError(f"memo entry {index} is written before entry {len(memo)}")
    memo[index : index + 1] = [value]


def _append(target: Any, items: Sequence[Any]) -> None:
    if type(target) is Foreign:
        return
    if type(target) is not list:
        raise _MalformedError("the pickle appends to something that is no list")
    target.extend(items)


def _global(module: Any, name: Any) -> Global:
    if type(module) is not str or type(name) is not str:
        raise _MalformedError("a global whose name is no text")
    known = GLOBALS.get((module, name))
    if known is not None:
        return known
    if not RUNNING.get(module.partition(".")[0], True) or name.partition(".")[0] in RUNNING.get(
        _RENAMED.get(module, module), ()
    ):
        raise _MalformedError(f"pickle global {f'{module}.{name}'[:MAX_NAME]!r} refused", RefusedError)
    if len(module) > MAX_NAME or len(name) > MAX_NAME:
        raise _MalformedError(f"a global with a name of more than {MAX_NAME} characters")
    return Global(module, name, known=False)


def _check_tree(value: Any, most: int) -> None:
    """Refuse a value that a walk over it would not come to the end of, or only by deep recursion."""
    count = 0
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for item in level if type(item) in _NESTING]
        if not level:
            return
        below: list[Any] = []
        for item in level:
            if type(item) is Record:
                below += (item.args, item.state)
            else:
                below += item.values() if type(item) is dict else item
            if count + len(below) > most:
                raise _MalformedError(f"the pickle unfolds to more than {most} values")
        count += len(below)
        level = below
    raise _MalformedError(f"the pickle nests values more than {MAX_DEPTH} deep, or a value in itself")


_NESTING: Final = frozenset({dict, list, tuple, set, frozenset, Record})
_PLAIN: Final = frozenset({type(None), bool, int, float, str, bytes, Global})
_ODD: Final = frozenset({tuple, frozenset, complex})


# --- globals ------------------------------------------------------------------------------------------------------

DTYPES: Final = {**{name: dtype for dtype, name in NAMES.items()}, "float4_e2m1fn_x2": "F4"}
"""torch's dtypes, as safetensors spells them."""

_WIDTHS: Final = {
    **{name: item_size(dtype) for name, dtype in DTYPES.items()},
    "complex32": 4, "complex128": 16, "qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1,
}  # fmt: skip
"""Bytes per element, of the dtypes that safetensors lacks too."""

_STORAGES: Final = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "QInt8Storage": "qint8", "QUInt8Storage": "quint8", "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2", "QUInt2x4Storage": "quint2x4", "UntypedStorage": "uint8",
}  # fmt: skip
"""Storage class -> dtype of its elements."""


def _tensor_v3(
    machine: _Machine,
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    *rest: Any,
) -> Any:
    width = _WIDTHS[dtype.name]
    count = storage.count * storage.width // width
    return machine.tensor(_Storage(storage.source, dtype.name, width, count), offset, shape, strides, *rest)


def _first(machine: _Machine, value: Any, *_: Any) -> Any:
    return value


def _subclass(machine: _Machine, function: Any, kind: Any, args: Any, state: Any) -> Any:
    value = machine.call(function, args)
    if (kind.module, kind.name) in (("torch", "Tensor"), ("torch.nn.parameter", "Parameter")):
        return value
    machine.charge(150)
    return Record(kind.module, kind.name, (value,), state)


def _dict(machine: _Machine, items: Any = (), *_: Any) -> dict[Any, Any]:
    machine.charge(80 + 100 * len(items))
    if type(items) is dict:
        return dict(items)
    result: dict[Any, Any] = {}
    machine.set(result, [part for key, value in items for part in (key, value)])
    return result


def _defaultdict(machine: _Machine, factory: Any = None, items: Any = ()) -> dict[Any, Any]:
    return _dict(machine, items)


def _set(machine: _Machine, items: Any = ()) -> set[Any]:
    machine.charge(232 + 64 * len(items))
    machine.check_keys(items)
    return set(items)


def _frozenset(machine: _Machine, items: Any = ()) -> frozenset[Any]:
    return frozenset(_set(machine, items))


def _storage_of_bytes(machine: _Machine, data: Any) -> _Storage:
    """Return a storage that Python's own pickle wrote: torch makes a stream of its own of each, in bytes."""
    if machine.inner or type(data) is not bytes:
        raise _MalformedError("a storage that is not written in bytes")
    machine.charge(len(data) + STREAM)
    found = _load_stream(Memory(data), machine.path, inner=True).value
    if type(found) is not _Storage:
        raise _MalformedError("bytes that hold something else than a storage")
    return found


STREAM: Final = 20_000
"""Bytes that are counted for a stream in a pickle: to read one takes 0.1 ms, and the same bytes may be read again."""


def _encode(machine: _Machine, text: Any, codec: Any) -> bytes:
    """Protocol 2 has no bytes: they come as text, one character for each."""
    if type(text) is not str or codec not in ("latin1", "latin-1"):
        raise _MalformedError("bytes that are not written as latin-1")
    machine.charge(len(text))
    return text.encode("latin-1")


def _bytes(machine: _Machine, *args: Any) -> bytes:
    return _encode(machine, *args) if args else b""


def _bytearray(machine: _Machine, data: Any = b"", *codec: Any) -> bytearray:
    machine.charge(len(data))
    return bytearray(_encode(machine, data, *codec) if codec else memoryview(data))


def _complex(machine: _Machine, real: Any, imaginary: Any) -> complex:
    return complex(real, imaginary)


def _size(machine: _Machine, sizes: Any) -> tuple[Any, ...]:
    if type(sizes) is tuple:  # of which no copy is made
        return sizes
    machine.charge(64 + 8 * len(sizes))
    return tuple(sizes)


_ARRAYS: Final = {
    "b1": "BOOL", "u1": "U8", "i1": "I8", "u2": "U16", "i2": "I16", "u4": "U32", "i4": "I32", "u8": "U64", "i8": "I64",
    "f2": "F16", "f4": "F32", "f8": "F64", "c8": "C64",
}  # fmt: skip
"""NumPy's types, without byte order, as safetensors spells them."""

_SCALARS: Final = {
    "b1": "?", "u1": "B", "i1": "b", "u2": "H", "i2": "h", "u4": "I", "i4": "i", "u8": "Q", "i8": "q",
    "f2": "e", "f4": "f", "f8": "d", "c8": "2f", "c16": "2d",
}  # fmt: skip
"""The same in the spelling of ``struct``."""


def _numpy_scalar(machine: _Machine, dtype: Any, data: Any) -> NumpyScalar | Record:
    code = _numpy_code(dtype)
    if code[1:] not in _SCALARS:
        machine.charge(150)
        return Record("numpy", "scalar", (dtype, data))
    machine.charge(100)
    values = struct.unpack(code[0] + _SCALARS[code[1:]], data)
    return NumpyScalar(complex(*values) if len(values) == 2 else values[0], code[1:])


def _numpy_code(dtype: Record) -> str:
    """Byte order and type of a pickled dtype, ``<f8``."""
    order, code = dtype.state[1] if dtype.state else "=", dtype.args[0]
    if type(code) is not str:
        raise _MalformedError("a NumPy type whose name is no text")
    return (">" if order == ">" else "<") + code


def _frombuffer(machine: _Machine, data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> Record:
    """NumPy's own function of the name: with order ``K``, ``shape`` is that of the bytes, whose ``axes`` go where."""
    machine.charge(250)
    if order == "K" and axes is not None:
        return Record("numpy", "ndarray", (tuple(axes),), (1, shape, dtype, False, data))
    return Record("numpy", "ndarray", (), (1, shape, dtype, order == "F", data))


def _from_numpy(machine: _Machine, data: Any, dtype: Any, *_: Any) -> Tensor | Record:
    """Return a tensor of XLA's or DirectML's from NumPy's array of it, in which bfloat16 is float32."""
    tensor, wanted = array(data), DTYPES.get(dtype.name)
    if tensor is not None and tensor.dtype == wanted:
        return tensor
    if tensor is not None and (tensor.dtype, wanted) == ("F32", "BF16"):
        raw = bytes(tensor.bytes())
        machine.charge(len(raw))
        if not any(raw[0::4]) and not any(raw[1::4]):
            halves = bytearray(len(raw) // 2)
            halves[0::2], halves[1::2] = raw[2::4], raw[3::4]
            return contiguous("BF16", tensor.shape, Memory(halves))
    return Record("torch", f"{dtype.name} of a device, saved as another type")


def _reconstruct(machine: _Machine, *_: Any) -> Record:
    machine.charge(100)
    return Record("numpy", "ndarray")


_CALLS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {
    "torch._utils": {
        "_rebuild_tensor": _Machine.tensor,
        "_rebuild_tensor_v2": _Machine.tensor,
        "_rebuild_tensor_v3": _tensor_v3,
        "_rebuild_parameter": _first,
        "_rebuild_parameter_with_state": _first,
        "_rebuild_device_tensor_from_cpu_tensor": _first,
        "_rebuild_device_tensor_from_numpy": _from_numpy,
    },
    "torch._tensor": {"_rebuild_from_type_v2": _subclass},
    "torch.storage": {"_load_from_bytes": _storage_of_bytes},
    "torch": {"Size": _size},
    "collections": {"OrderedDict": _dict, "Counter": _dict, "defaultdict": _defaultdict},
    "builtins": {
        "set": _set, "frozenset": _frozenset, "bytes": _bytes, "bytearray": _bytearray, "complex": _complex,
    },
    "_codecs": {"encode": _encode},
    "numpy._core.multiarray": {"scalar": _numpy_scalar, "_reconstruct": _reconstruct},
    "numpy._core.numeric": {"_frombuffer": _frombuffer},
    "pytorch_lightning.utilities.parsing": {"AttributeDict": _dict},
    "lightning_fabric.utilities.data": {"AttributeDict": _dict},
    "lightning.fabric.utilities.data": {"AttributeDict": _dict},
}  # fmt: skip
"""What is done for a global when it is called; everything else becomes a ``Record``."""

_INERT: Final[Mapping[str, str]] = {
    "torch": "Tensor device dtype layout memory_format strided sparse_coo contiguous_format preserve_format "
    + " ".join((*_WIDTHS, *_STORAGES)),
    "torch.cuda": " ".join(_STORAGES),
    "torch.torch_version": "TorchVersion",
    "torch.storage": "UntypedStorage _UntypedStorage",
    "torch._utils": "_rebuild_sparse_tensor _rebuild_sparse_csr_tensor _rebuild_qtensor _rebuild_nested_tensor "
    "_rebuild_meta_tensor_no_storage _rebuild_wrapper_subclass",
    "torch.nn.parameter": "Parameter",
    "torch.serialization": "_get_layout",
    "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata "
    "ChunkStorageMetadata TensorProperties StorageMeta _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.planner": "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    "torch.distributed._shard.sharded_tensor.metadata": "TensorProperties MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed.checkpoint.hf_storage": "_HFStorageInfo",
    "torch.distributed.tensor": "DTensor",
    "torch.distributed.tensor._api": "DTensor",
    "torch.distributed.tensor._dtensor_spec": "DTensorSpec TensorMeta ShardOrderEntry",
    "torch.distributed.tensor.placement_types": "Shard Replicate Partial _StridedShard",
    "torch.distributed.device_mesh": "DeviceMesh",
    "torch.distributed._mesh_layout": "_MeshLayout _FlatLayout",
    "bitsandbytes.nn.modules": "Params4bit Int8Params",
    "bitsandbytes.functional": "QuantState",
    "torchao.optim.subclass_8bit": "OptimState8bit",
    "torchao.optim.subclass_4bit": "OptimState4bit",
    "torchao.optim.subclass_fp8": "OptimStateFp8",
    "torchao.prototype.low_bit_optim.subclass_8bit": "OptimState8bit",
    "torchao.prototype.low_bit_optim.subclass_4bit": "OptimState4bit",
    "torchao.prototype.low_bit_optim.subclass_fp8": "OptimStateFp8",
    "deepspeed.runtime.fp16.loss_scaler": "LossScaler DynamicLossScaler",
    "deepspeed.runtime.zero.config": "ZeroStageEnum",
    "deepspeed.utils.tensor_fragment": "fragment_address",
    "numpy": "dtype ndarray",
}
"""Module -> classes and functions whose objects are read: what they are called with, and their state, are kept."""

_RENAMED: Final = {
    "__builtin__": "builtins",
    "numpy.core.multiarray": "numpy._core.multiarray",
    "numpy.core.numeric": "numpy._core.numeric",
}
"""Older names of modules -> what they are called in the tables above."""

_RUNNING_MODULES: Final = (
    "_pickle bdb cPickle code codeop commands cProfile ctypes importlib marshal nt operator os pdb pickle popen2 posix "
    "pty pydoc runpy shutil socket subprocess sys timeit webbrowser"
)
RUNNING: Final[Mapping[str, str]] = {
    **dict.fromkeys(_RUNNING_MODULES.split(), ""),
    "builtins": "__import__ breakpoint compile delattr eval exec execfile globals input locals open setattr vars",
    "io": "open open_code FileIO",
    "_io": "open open_code FileIO",
    "numpy": "load fromfile loadtxt memmap",
    "torch": "load hub compile classes ops",
    "torch.serialization": "load",
}
"""Modules (all of one where nothing follows), and names in them, that a pickle needs for nothing but to run code.

A file that names one is refused as a whole, so that whoever opens it learns what it is. Safety does not rest on this
list: of no name is anything run.
"""

_MAKERS: Final = frozenset({("copyreg", "_reconstructor"), ("copy_reg", "_reconstructor"), ("copyreg", "__newobj__")})
"""Functions that make an object of the class that is their first argument."""

GLOBALS: Final[Mapping[tuple[str, str], Global]] = {
    (alias, name): Global(module, name, _CALLS.get(module, {}).get(name))
    for module in {**_CALLS, **_INERT}
    for alias in (module, *(old for old, new in _RENAMED.items() if new == module))
    for name in (*_CALLS.get(module, ()), *_INERT.get(module, "").split())
}
"""Every global that is more than a name. There is no way to add to it at run time."""


# --- files --------------------------------------------------------------------------------------------------------


def container(source: Source) -> str | None:
    """Return what a file is by its first bytes, if a version of ``torch.save`` wrote it or may have."""
    start = _peek(source, 0, 9)
    if start.startswith(b"PK\3\4"):
        return "zip archive"
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5") and start[2:3] != b"\0":
        return "pickle"  # no opcode is 0: that is a safetensors file whose header is, by chance, of such a length
    return "tar archive" if start == b"sys_info\0" else None


def mentions(source: Source, word: bytes) -> bool:
    """Return whether ``torch.save`` wrote this and its pickle has ``word`` in it; nothing is built. For detection."""
    start = _peek(source, 0, 16)
    if not start.startswith(b"PK\3\4"):
        return MAGIC.to_bytes(10, "little") in start and word in _peek(source, 0, MAX_PICKLE)
    try:
        archive = Archive(source)
        return word in archive[_pickle_in(archive)].bytes()
    except FileError:
        return False


def load(source: Source, path: object = None, *, alike: dict[bytes, Pickled] | None = None) -> Pickled:
    """Return what ``torch.save`` wrote: a zip archive, or the stream from before torch 1.6. No tensor is read.

    What Python's own ``pickle.dump`` wrote is read too; its tensors are then in memory.

    ``source`` may be a file or a part of one: a member of another zip, an item of a ``.distcp`` file. Tensors become
    ``Tensor`` objects over byte ranges of it that carry the CRC-32 of the archive; nothing else than plain values,
    ``Record``, ``Global`` and ``NumpyScalar`` comes beside them. ``path`` is for messages. ``alike`` keeps tensors by
    their pickles: of many archives that hold one each, most have the same pickle. Raises ``FileError`` for a file
    that is damaged or something else, ``RefusedError`` for a pickle that names a global which is not on the
    list, for big-endian files, and for the tar archives of torch 0.1.
    """
    if path is None and isinstance(source, File):
        path = source.path
    kind = container(source)
    if kind is None:
        raise FileError("not a file that torch.save wrote: neither a zip archive nor a pickle", path=path)
    if kind == "tar archive":
        raise RefusedError("a tar archive of torch 0.1: save it again with a newer torch", path=path)
    with paused():
        if kind == "zip archive":
            return _load_zip(source, path, alike)
        streamed = MAGIC.to_bytes(10, "little") in _peek(source, 0, 32)
        return _load_stream(source, path) if streamed else _load_pickle(source, path)


def load_plain(data: bytes, path: object = None, *, payload: bool = False) -> Any:
    """Return the value of a pickle that torch did not write and that holds no tensors: DCP's ``.metadata``, for one.

    With ``payload`` the bytes of arrays in it do not count towards the limit of a pickle, only towards that of memory.
    """
    if len(data) > MAX_PICKLE and not payload:
        raise FileError(f"a pickle of {len(data)} bytes; the limit is {MAX_PICKLE}", path=path)
    with paused():
        return _Machine(data, path, "the file").run()[0]


def array(record: Record) -> Tensor | None:
    """Return the tensor of a NumPy array's record; ``None`` for a type or byte order that safetensors does not have."""
    match record:
        case Record("numpy", "ndarray", _, (1, tuple(shape), Record("numpy", "dtype") as dtype, fortran, data)):
            pass
        case _:
            return None
    code = _numpy_code(dtype)
    name = _ARRAYS.get(code[1:])
    if name is None or type(data) not in (bytes, bytearray) or (code[0] == ">" and item_size(name) > 1):
        return None
    if len(data) != math.prod(shape) * item_size(name):
        raise FileError(f"a NumPy array of shape {list(shape)} and type {code} with {len(data)} bytes")
    tensor = contiguous(name, shape[::-1] if fortran else shape, Memory(data))
    if record.args and isinstance(record.args[0], tuple):
        return tensor.permute(record.args[0])
    return tensor.permute(range(len(shape))[::-1]) if fortran else tensor


def _peek(source: Source, offset: int, size: int) -> bytes:
    size = min(size, source.size - offset)
    if size <= 0:
        return b""
    buffer = bytearray(size)
    source.readinto(offset, memoryview(buffer))
    return bytes(buffer)


def _room(source: Source) -> int:
    return MAX_REPEATS * source.size + (64 << 20)


def _pickle_in(archive: Archive) -> str:
    """Return the name of the member that holds the pickle."""
    pickles = [name for name in archive if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise FileError(
            f"the zip archive has {len(pickles) or 'no'} data.pkl among its {len(archive)} members: "
            + ("not one that torch.save wrote" if pickles else "an interrupted torch.save, or another kind of archive"),
            path=archive.path,
        )
    if (size := archive[pickles[0]].size) > MAX_PICKLE:
        raise FileError(f"{pickles[0]} has {size} bytes; the limit is {MAX_PICKLE}", path=archive.path)
    return pickles[0]


def _load_zip(source: Source, path: object, alike: dict[bytes, Pickled] | None) -> Pickled:
    archive = Archive(source, path)
    member = archive[_pickle_in(archive)]
    root = member.name.removesuffix("data.pkl")
    if root + "byteorder" in archive and archive[root + "byteorder"].bytes() == b"big":
        raise RefusedError("written on a big-endian machine: save it again on a little-endian one", path=path)
    data = bytes(member.bytes())
    if member.crc32 not in (None, crc32(data)):
        raise FileError(
            f"{member.name} does not have the CRC-32 that the container states: the file is damaged", path=path
        )

    def open_storage(key: str, size: int) -> Range:
        name = f"{root}data/{key}"
        if name not in archive:
            raise FileError(f"the zip archive has no member {name!r}, which its pickle refers to", path=path)
        return archive[name]

    known = alike.get(data) if alike is not None else None
    if known is not None and (again := _elsewhere(known, open_storage)) is not None:
        return again
    machine = _Machine(data, path, member.name, _room(source), open_storage)
    value, end = machine.run()
    if end != len(data):
        raise FileError(f"{len(data) - end} bytes follow the pickle in {member.name}", path=path)
    loaded = Pickled(value, "zip", machine.protocol, machine.storages)
    if alike is not None and isinstance(value, Tensor) and len(data) <= MAX_ALIKE:
        alike[data] = loaded
    return loaded


def _elsewhere(known: Pickled, open_storage: Callable[[str, int], Range]) -> Pickled | None:
    """Return a tensor as the same pickle means it in another archive; ``None`` if its storages have other sizes."""
    storages = {key: open_storage(key, old.size) for key, old in known.storages.items()}
    if any(storages[key].size != old.size for key, old in known.storages.items()):
        return None
    moved = {id(old): storages[key] for key, old in known.storages.items()}
    pieces = tuple(piece._replace(source=moved[id(piece.source)]) for piece in known.value.pieces)
    return replace(known, value=replace(known.value, pieces=pieces), storages=storages)


def _load_pickle(source: Source, path: object) -> Pickled:
    """Read what Python's own ``pickle.dump`` wrote: all of it is in one pickle, tensors too."""
    if source.size > MAX_BUILT:
        raise FileError(
            f"a pickle of {source.size} bytes, which torch.save did not write; the limit is {MAX_BUILT}", path=path
        )
    data = _peek(source, 0, source.size)
    machine = _Machine(data, path, "the file", _room(source))
    value, end = machine.run()
    if end != len(data):
        raise FileError(f"{len(data) - end} bytes follow the pickle, which torch.save did not write", path=path)
    return Pickled(value, "pickle", machine.protocol, {})


def _load_stream(source: Source, path: object, inner: bool = False) -> Pickled:
    """Five pickles (magic number, version, the writer's machine, the value, the storages' keys), then the storages."""

    def open_storage(key: str, size: int) -> Range:
        if not 0 <= size <= source.size:
            raise FileError(f"storage {key!r} of {size} bytes in a file of {source.size}", path=path)
        return Range(source, 0, size)

    window = 1 << 20
    while True:
        data = _peek(source, 0, window)
        windowed = len(data) < min(source.size, MAX_PICKLE)
        machine = _Machine(data, path, "the file", _room(source), open_storage, windowed, inner)
        try:
            magic, at = machine.run()
            if magic != MAGIC:
                raise FileError("a pickle that torch.save did not write", path=path)
            _, at = machine.run(at)
            writer, at = machine.run(at)
            value, at = machine.run(at)
            keys, at = machine.run(at)
            break
        except _CutShortError:
            window = min(2 * window, MAX_PICKLE)
    if type(keys) is not list or not all(type(key) is str for key in keys) or set(keys) != machine.storages.keys():
        raise FileError("the storages in the file are not those that its pickle refers to", path=path)
    if type(writer) is not dict or writer.get("little_endian") is not True:
        raise RefusedError("written on a big-endian machine: save it again on a little-endian one", path=path)
    for key in keys:
        storage, width = machine.storages[key], machine.widths[key]
        count = int.from_bytes(_peek(source, at, 8), "little")
        at += 8
        if count * width != storage.size or at + storage.size > source.size:
            raise FileError(f"storage {key!r} at byte {at} is cut short, or not of {storage.size} bytes", path=path)
        storage.start = at
        at += storage.size
    if at != source.size:
        raise FileError(f"{source.size - at} bytes follow the last storage", path=path)
    return Pickled(value, "stream", machine.protocol, machine.storages)
