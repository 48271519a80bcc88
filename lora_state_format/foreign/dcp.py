"""Folders of ``torch.distributed.checkpoint`` (DCP), read without torch.

``.metadata`` is a pickle that lists every entry: its path in the state dict (``planner_data``, the only thing that may
split a key, since names have dots), and for each chunk of it a file, an offset and a length (``storage_data``). At that
place stands a small ``torch.save`` archive of its own, which is opened when its bytes are asked for. The layout is that
of ``torch/distributed/checkpoint/{metadata,filesystem}.py``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, ClassVar, Final, cast

from lora_state_format.errors import FileError, MissingDependencyError, RefusedError, Remedy, UnrepresentableError
from lora_state_format.foreign import pickles
from lora_state_format.foreign.pickles import Global, Record
from lora_state_format.foreign.torch_save import archive, dumps
from lora_state_format.foreign.trees import member
from lora_state_format.io.files import FEW, Files, PooledFile, first_look, is_plain, names_in
from lora_state_format.io.folders import new_folder
from lora_state_format.io.ledger import Ledger
from lora_state_format.io.safetensors import Header, read_header
from lora_state_format.model.dtypes import item_size
from lora_state_format.model.sources import File, Memory, Range, Source, Unread, bytes_of
from lora_state_format.model.states import Scalar, Value
from lora_state_format.model.tensors import Box, Piece, Tensor, contiguous, is_tiling

__all__ = ["METADATA", "Folder", "Item", "is_folder", "metadata", "open_folder", "seen", "write_folder"]

METADATA: Final = ".metadata"
MAX_DIMENSIONS: Final = 64

_TENSOR: Final = "TensorStorageMetadata"
_VALUE: Final = "BytesStorageMetadata"

ZSTD: Final = "stream.zstd/1"
"""How ``torch.distributed.checkpoint._extension`` calls its compression."""

LARGE: Final = 16 << 20
"""Bytes of a ``.metadata`` that lists more than 100,000 chunks."""

ARCHIVE: Final = 1 << 16
"""Bytes that an archive may have beside its tensor's own."""


@dataclass(frozen=True)
class Folder:
    """What a folder holds: every entry by its path in the state dict, and the files behind it.

    ``named`` is how many data files it has; a first look, which leaves tensors out (``whole``), asks for some of them.
    """

    entries: Mapping[tuple[Any, ...], Any]
    files: Files
    named: int
    whole: bool
    readable_together: ClassVar = True

    def tree(self) -> dict[Any, Any]:
        """Return the entries as nested dicts; the keys of what was a list are integers."""
        root: dict[Any, Any] = {}
        for path, value in self.entries.items():
            node = root
            for key in path[:-1]:
                node = node.setdefault(key, {})
                if not isinstance(node, dict):
                    raise FileError(f"has a value on the way to the entry {'.'.join(map(str, path))}")
            node[path[-1]] = value
        return root

    def check_unchanged(self) -> None:
        """Raise ``FileError`` if a file of the folder changed since it was opened."""
        self.files.check_unchanged()

    def close(self) -> None:
        """Close the folder's files."""
        self.files.close()

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder that DCP wrote."""
    return (path / METADATA).is_file()


def metadata(path: Path) -> bytes:
    """Return the bytes of a folder's ``.metadata``. Raises ``FileError`` if they are more than a pickle may have."""
    with File(path / METADATA) as file:
        if file.size > pickles.MAX_PICKLE:
            detail = f"a pickle of {file.size} bytes; the limit is {pickles.MAX_PICKLE}"
            raise FileError(detail, path=file.path, remedy=_one_file(path))
        return bytes(file.read(0, file.size))


def _root(path: Path) -> Any:
    """Return what ``.metadata`` holds. One of many chunks may build more than a pickle may."""
    data = metadata(path)
    try:
        return pickles.load_plain(data, path / METADATA)
    except FileError as error:
        if len(data) < LARGE:
            raise
        raise FileError(error.detail, path=error.path, remedy=_one_file(path)) from None


def _one_file(path: Path) -> Remedy:
    return Remedy(
        f"let torch make one file of the folder and convert that: python -m torch.distributed.checkpoint.format_utils "
        f"dcp_to_torch {path} FILE.pt"
    )


@dataclass(frozen=True)
class Item:
    """The bytes of a value that is no tensor, as they were saved."""

    source: Source


def seen(folders: Sequence[Folder]) -> dict[str, Value]:
    """Return what ``origin`` says of folders of which some were only looked at; nothing where all were read."""
    if all(folder.whole for folder in folders):
        return {}
    return {"first_look": first_look(sum(1 + len(f.files) for f in folders), sum(1 + f.named for f in folders))}


def open_folder(path: Path, *, raw: bool = False, glance: Callable[[str], bool] | None = None) -> Folder:
    """Return the folder's entries, lazily: tensors as byte ranges, other values as they were pickled.

    Args:
        path: The folder.
        raw: Whether other values are ``Item``, which ``write_folder`` copies, whatever is in them.
        glance: For a first look at a folder of more than ``FEW`` data files: whether the value of a key is read.
            Values for which it is not are left out. Only tensors of one element can be read; of the files that hold
            the others, the names are checked.

    Raises:
        FileError: A file is missing or truncated, or chunks do not make up a tensor.
        RefusedError: Items are transformed (compressed) in a way that is not read.
    """
    meta = path / METADATA
    if not meta.is_file():
        raise FileError("missing: without it nothing says what the other files hold", path=meta)
    files = Files(path)
    root = _root(path)
    described = _state(root, "state_dict_metadata", dict, meta)
    paths = _fields(root, meta).get("planner_data")
    if not isinstance(paths, (dict, NoneType)):
        raise FileError(f"has a {type(paths).__name__} for its paths, where a dict is expected", path=meta)
    paths = paths or {}
    try:
        storage = _state(root, "storage_data", dict, meta)
        named = {_state(info, "relative_path", str, meta) for info in storage.values()}
        passed = _passed_over(described, named, files, glance, meta)
        placed = [(_state(index, "fqn", str, meta), index, info) for index, info in storage.items()]
        chunks = _chunks((place for place in placed if place[0] not in passed), files, meta)
        if unknown := next((key for key, *_ in placed if key not in described), None):
            raise FileError(f"says where '{unknown}' is, and not what it is: an entry was taken out", path=meta)
        entries: dict[tuple[Any, ...], Any] = {}
        for key, where in _paths(described, paths, meta):
            if where in entries:
                raise FileError(f"has two entries at {where}", path=meta)
            if key not in passed:
                entries[where] = _entry(key, described[key], chunks.get(key, {}), meta, raw=raw)
            elif _kind(key, described[key], meta) == _TENSOR:
                entries[where] = contiguous(*_form(described[key], meta), Unread(path))
    except BaseException:
        files.close()
        raise
    return Folder(entries, files, len(named), whole=not passed)


def _paths(
    described: Mapping[str, Any], paths: Mapping[str, Any], path: object
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield each entry's key and its path in the state dict, in the order of the paths."""
    for key in [*(key for key in paths if key in described), *(key for key in described if key not in paths)]:
        where = paths.get(key, (key,))
        if type(where) is not tuple or not where or not all(type(step) in (str, int) for step in where):
            raise FileError(f"places '{key}' at {where!r}, which is no path", path=path)
        if ".".join(map(str, where)) != key:
            raise FileError(f"places '{key}' at {where!r}, which is the path of another entry", path=path)
        yield key, where


def _passed_over(
    described: Mapping[str, Any],
    named: Set[str],
    files: Files,
    glance: Callable[[str], bool] | None,
    path: Path,
) -> Set[str]:
    """Return the keys that a first look does not read, of a folder of many data files whose names were then checked."""
    if glance is None or len(named) <= FEW:
        return frozenset()
    for name in sorted({*named}.difference(names_in(path.parent))):
        _file(name, files, path)  # which may be in a folder within
    return {key for key, what in described.items() if not _is_read(key, what, glance, path)}


def _is_read(key: str, described: Any, glance: Callable[[str], bool], path: object) -> bool:
    """Return whether a first look reads an entry: a value that is asked for, or a tensor of one element, as steps."""
    return glance(key) if _kind(key, described, path) == _VALUE else prod(_form(described, path)[1]) == 1


@dataclass
class _Data:
    """A data file: its safetensors part, where it has one, and the item that each thread decompressed last."""

    file: PooledFile
    archives: int = 0
    inflated: Any = field(default_factory=threading.local)
    header: Header | None = None

    def tensor(self, key: str) -> Tensor | None:
        """Return a tensor of the safetensors part, which stands behind the archives of the values."""
        if self.header is None:
            self.header = read_header(_Part(self.file, self.archives, self.file.size - self.archives))
        return self.header.tensor(key) if key in self.header.entries else None


class _Part(Range):
    """A part of a file, which is a file of its own."""

    def __init__(self, file: PooledFile, start: int, size: int) -> None:
        super().__init__(file, start, size)
        self.path = file.path

    def read(self, offset: int, size: int) -> bytearray:
        buffer = bytearray(size)
        self.readinto(offset, memoryview(buffer))
        return buffer


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """Where an item's archive lies, and how it was transformed."""

    key: str
    data: _Data
    offset: int
    length: int
    alike: dict[bytes, pickles.Pickled]
    compressed: bool

    @property
    def file(self) -> PooledFile:
        return self.data.file

    def item(self) -> Item:
        """Return the bytes as they are. Raises ``RefusedError`` for those that only their description unfolds."""
        if self.compressed:
            raise RefusedError(
                f"the item '{self.key}' is compressed, and would be copied as it is", path=self.file.path
            )
        return Item(Range(self.file, self.offset, self.length))

    def value(self, most: int) -> Any:
        """Return the value; ``most`` is how many bytes its archive may have, uncompressed."""
        source: Source = Range(self.file, self.offset, self.length)
        try:
            if self.compressed:
                source = Memory(_inflated(source, most))
            elif pickles.container(source) is None and (tensor := self.data.tensor(self.key)) is not None:
                return tensor
            return pickles.load(source, self.file.path, alike=None if self.compressed else self.alike).value
        except RefusedError:
            raise
        except FileError as error:
            raise FileError(
                f"the item '{self.key}' at byte {self.offset}: {error.detail}", path=self.file.path
            ) from None


def _inflated(source: Source, most: int) -> bytes:
    """Return what was compressed with Zstandard; more than ``most`` bytes are an error, not read."""
    try:
        import zstandard
    except ImportError as error:
        raise MissingDependencyError(
            "the checkpoint is compressed with Zstandard: pip install 'lora_state_format[zstd]'"
        ) from error
    data = bytearray(source.size)
    source.readinto(0, memoryview(data))
    try:
        with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(bytes(data)) as reader:
            result: bytes = reader.read(most + 1)
    except zstandard.ZstdError as error:
        raise FileError(f"is not a Zstandard stream: {error}") from None
    if len(result) > most:
        raise FileError(f"unfolds to more than the {most} bytes that it can have")
    return result


class _Item:
    """The bytes of one chunk of a tensor: they lie in a ``torch.save`` archive, which lies at a place in a file."""

    def __init__(self, place: _Place, dtype: str, shape: tuple[int, ...]) -> None:
        self.place = place
        self.dtype = dtype
        self.shape = shape
        self.size = prod(shape) * item_size(dtype)
        self.name = f"the item '{place.key}' at byte {place.offset}"
        self._opened: Source | None = None

    @property
    def crc32(self) -> int | None:
        return self._source().crc32

    def readinto(self, offset: int, out: memoryview) -> None:
        self._source().readinto(offset, out)

    def view(self, offset: int, size: int) -> memoryview | None:
        return None

    def check_unchanged(self) -> None:
        """Raise ``FileError`` if the file is no longer what it was when it was opened."""
        self.place.file.check_unchanged()

    def _source(self) -> Source:
        """Return the archive's member, which states a CRC, if it is exactly the tensor in C order; else the tensor.

        Of what was compressed only one item for each thread is kept in memory.
        """
        if self._opened is not None:
            return self._opened
        inflated = self.place.data.inflated
        owner, kept = getattr(inflated, "item", (None, None))
        if owner is self:
            return cast("Source", kept)
        opened = self._open()
        if self.place.compressed:
            inflated.item = self, opened
        else:
            self._opened = opened
        return opened

    def _open(self) -> Source:
        tensor = self.place.value(self.size + ARCHIVE)
        if not isinstance(tensor, Tensor) or (tensor.dtype, tensor.shape) != (self.dtype, self.shape):
            held = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise FileError(
                f"{self.name} is {held}, where .metadata says {self.dtype} {list(self.shape)}",
                path=self.place.file.path,
            )
        run = tensor.runs[0] if tensor.runs and len(tensor.runs) == 1 else None
        whole = run is not None and run.offset == 0 and run.source.size == self.size
        return run.source if run is not None and whole else tensor


def _fields(record: Any, path: object) -> Mapping[str, Any]:
    """Return a dataclass's fields."""
    if isinstance(record, Record) and isinstance(record.state, dict):
        return record.state
    raise FileError(f"has a {type(record).__name__} where an object with fields is expected", path=path)


def _naturals(sizes: Any, path: object) -> tuple[int, ...]:
    """Sizes or offsets, one per axis."""
    if type(sizes) in (list, tuple) and len(sizes) <= MAX_DIMENSIONS and all(type(n) is int and n >= 0 for n in sizes):
        return tuple(sizes)
    raise FileError(f"has {str(sizes)[:60]} where sizes are expected", path=path)


def _state(record: Any, key: str, kind: Any, path: object) -> Any:
    return member(_fields(record, path), key, kind, path)


def _chunks(
    placed: Iterable[tuple[str, Any, Any]], files: Files, path: Path
) -> dict[str, dict[tuple[int, ...] | None, _Place]]:
    """Return every chunk's place by the entry's key and the chunk's offsets.

    ``placed`` has, of each chunk, the entry's key, the record that says which it is, and the one that says where.
    """
    found: dict[str, dict[tuple[int, ...] | None, _Place]] = {}
    opened: dict[str, _Data] = {}
    alike: dict[bytes, pickles.Pickled] = {}
    room: dict[PooledFile, int] = {}
    spans: dict[PooledFile, list[tuple[int, int, str]]] = {}
    for key, index, info in placed:
        offsets = _fields(index, path).get("offset")
        transforms = _fields(info, path).get("transform_descriptors") or []
        if transforms not in ([], [ZSTD]):
            raise RefusedError(
                f"'{key}' is stored transformed ({transforms}), where '{ZSTD}' alone is read: load it with torch and "
                "save it without the extension",
                path=path,
            )
        start, length = _state(info, "offset", int, path), _state(info, "length", int, path)
        name = _state(info, "relative_path", str, path)
        if name not in opened:
            opened[name] = _Data(_file(name, files, path))
        file = opened[name].file
        if start < 0 or length < 0 or start + length > file.size:
            raise FileError(
                f"is cut short: {file.size} bytes, where .metadata places '{key}' at {start} to {start + length}",
                path=file.path,
            )
        room[file] = room.get(file, file.size) - length
        if room[file] < 0:  # else a small file would unfold to any number of values
            raise FileError(f"places more in {file.path.name} than its {file.size} bytes", path=path)
        spans.setdefault(file, []).append((start, length, key))
        where = None if offsets is None else _naturals(offsets, path)
        if where in found.setdefault(key, {}):
            raise FileError(f"has two chunks of '{key}' at {where}", path=path)
        if where is None:
            opened[name].archives = max(opened[name].archives, start + length)
        found[key][where] = _Place(key, opened[name], start, length, alike, bool(transforms))
    for file, listed in spans.items():
        for (start, length, key), (following, _, other) in pairwise(sorted(listed)):
            # The places of safetensors items mean nothing: torch writes them before it knows where the items will be.
            if start + length > following and pickles.container(Range(file, start, length)) is not None:
                raise FileError(
                    f"places '{other}' at byte {following} of {file.path.name}, inside '{key}' ({start} to "
                    f"{start + length})",
                    path=path,
                )
    return found


def _file(name: str, files: Files, metadata: Path) -> PooledFile:
    if not all(map(is_plain, name.split("/"))):
        raise RefusedError(f"points at a file outside the folder: {name!r}", path=metadata)
    path = metadata.parent / name
    try:
        return files[path]
    except FileNotFoundError:
        raise FileError("missing: .metadata says that it holds a part of the state", path=path) from None


def _kind(key: str, described: Any, path: object) -> str:
    if not isinstance(described, Record) or described.name not in (_TENSOR, _VALUE):
        raise FileError(f"describes '{key}' in a way that is not known", path=path)
    return described.name


def _entry(
    key: str, described: Any, places: Mapping[tuple[int, ...] | None, _Place], path: object, *, raw: bool
) -> Any:
    if _kind(key, described, path) == _VALUE:
        if list(places) != [None]:
            raise FileError(f"has {len(places)} places for '{key}', which is one value", path=path)
        return places[None].item() if raw else places[None].value(pickles.MAX_PICKLE)
    dtype, shape = _form(described, path)
    pieces = []
    for chunk in _state(described, "chunks", list, path):
        start, extent = (_naturals(_state(chunk, name, tuple, path), path) for name in ("offsets", "sizes"))
        if not len(start) == len(extent) == len(shape):
            raise FileError(f"has a chunk of '{key}' with other axes than {list(shape)}", path=path)
        if not prod(extent):
            continue
        if start not in places:
            raise FileError(f"has no place for the chunk of '{key}' at {list(start)}", path=path)
        if any(a + n > d for a, n, d in zip(start, extent, shape, strict=True)):
            raise FileError(f"has a chunk {list(extent)} of '{key}' at {list(start)}, outside {list(shape)}", path=path)
        pieces.append(Piece(_Item(places[start], dtype, extent), 0, Box(start, extent)))
    if not is_tiling([piece.where for piece in pieces if isinstance(piece.where, Box)], shape):
        raise FileError(f"has chunks of '{key}' that do not make up {list(shape)}", path=path)
    return Tensor(dtype, shape, tuple(pieces))


def _form(described: Record, path: object) -> tuple[str, tuple[int, ...]]:
    """Return a tensor's dtype and shape."""
    dtype = _dtype(_state(described, "properties", Record, path), path)
    return dtype, _naturals(_state(described, "size", (list, tuple), path), path)


def _dtype(properties: Record, path: object) -> str:
    state = properties.state
    dtype = state[0] if isinstance(state, tuple) and state else state.get("dtype") if isinstance(state, dict) else None
    name = pickles.DTYPES.get(dtype.name) if isinstance(dtype, Global) else None
    if name is None:
        raise RefusedError(f"a tensor of type {dtype}", path=path)
    return name


# --- writing ------------------------------------------------------------------------------------------------------

_DATA: Final = "__0_0.distcp"
_MODULE: Final = "torch.distributed.checkpoint.metadata"


def write_folder(
    entries: Mapping[tuple[Any, ...], Any],
    path: Path,
    *,
    force: bool = False,
    others: Mapping[str, Iterable[bytes | memoryview]] = MappingProxyType({}),
) -> None:
    """Write a folder that ``torch.distributed.checkpoint.load`` reads: one data file, one chunk per tensor.

    ``entries`` are as in ``Folder``, ``others`` are files to write next to them. Raises ``TargetExistsError``, and
    ``UnrepresentableError`` for two paths that DCP would give one key, or for a value that torch cannot load.
    """
    described: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    paths: dict[str, tuple[Any, ...]] = {}
    for where, value in entries.items():
        key = ".".join(map(str, where))
        if key in paths:
            raise UnrepresentableError(f"DCP would give {paths[key]} and {where} the same key")
        paths[key] = where
        described[key] = _described(value)

    def items() -> Iterator[bytes | memoryview]:
        ledger, position = Ledger(), 0
        for key, value in zip(paths, entries.values(), strict=True):
            start = position
            for chunk in bytes_of(value.source) if isinstance(value, Item) else archive(value, ledger):
                yield chunk
                position += len(chunk)
            places[_index(key, value)] = Record(
                "torch.distributed.checkpoint.filesystem",
                "_StorageInfo",
                state={"relative_path": _DATA, "offset": start, "length": position - start},
            )
        ledger.check()

    with new_folder(path, force=force, replaces={METADATA, _DATA, *others, *_files(path)}) as folder:
        folder.write((_DATA,), items())
        for name, chunks in others.items():
            folder.write((name,), chunks)
        members = {
            "state_dict_metadata": described,
            "planner_data": paths,
            "storage_data": places,
            "storage_meta": None,
            "version": "1.0.0",
        }
        folder.write((METADATA,), [dumps(Record(_MODULE, "Metadata", state=members))])


def _files(path: Path) -> set[str]:
    """Return the files that the ``.metadata`` of a folder names, if there is one that can be read."""
    if not is_folder(path):
        return set()
    with contextlib.suppress(FileError):
        storage = _state(pickles.load_plain(metadata(path)), "storage_data", dict, path)
        return {_state(info, "relative_path", str, path) for info in storage.values()}
    return set()


def _size(shape: Sequence[int]) -> Record:
    return Record("torch", "Size", (tuple(shape),))


def _index(key: str, value: Any) -> Record:
    shape = _shape(value)
    offset = None if shape is None else _size([0] * len(shape))
    return Record(_MODULE, "MetadataIndex", state={"fqn": key, "offset": offset, "index": None if shape is None else 0})


def _shape(value: Any) -> tuple[int, ...] | None:
    return value.shape if isinstance(value, Tensor) else () if isinstance(value, Scalar) else None


def _described(value: Any) -> Record:
    shape = _shape(value)
    if shape is None:
        return Record(_MODULE, _VALUE, state={})
    name = next(name for name, dtype in pickles.DTYPES.items() if dtype == value.dtype)
    strided = Record("torch.serialization", "_get_layout", ("torch.strided",))
    properties = (Global("torch", name), strided, False, Record(_MODULE, "_MEM_FORMAT_ENCODING", (0,)), False)
    chunk = Record(_MODULE, "ChunkStorageMetadata", state={"offsets": _size([0] * len(shape)), "sizes": _size(shape)})
    return Record(
        _MODULE,
        _TENSOR,
        state={
            "properties": Record(_MODULE, "TensorProperties", state=properties),
            "size": _size(shape),
            "chunks": [chunk],
        },
    )
