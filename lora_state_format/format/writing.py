"""Writing files of named optimizer state: streamed, whole or not at all, in shards where one file would not do.

The text is ``spec/format.md``; the comments cite its rules. One chunk of memory is held, whatever the file's size.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Final, NamedTuple, TypeAlias

from lora_state_format.errors import OptionError, TargetExistsError, UnrepresentableError
from lora_state_format.format.envelope import (
    INDEX_SUFFIX,
    MAX_INDEX,
    MAX_SHARDS,
    METADATA,
    PREFIX,
    ZERO,
    header_digest,
    index_of,
    is_state,
    read_index,
    set_id,
    stated_digest,
)
from lora_state_format.format.manifest import FORMAT, Manifest, ShardOf, check_names, encode
from lora_state_format.format.stowing import stowed
from lora_state_format.io import plain
from lora_state_format.io.atomic import REPLACE, TemporaryFile, check_target, gathered, locked, sync_folder
from lora_state_format.io.ledger import Ledger
from lora_state_format.io.remote import exists, is_remote, remove, send, spelled
from lora_state_format.io.safetensors import MAX_DIMENSIONS, is_too_large
from lora_state_format.io.strict_json import MAX_VALUES, dumps, most_values, utf8
from lora_state_format.model.digests import ALGORITHM
from lora_state_format.model.dtypes import BITS
from lora_state_format.model.gc import paused
from lora_state_format.model.sources import readable_together
from lora_state_format.model.states import OptimizerState, Parameter, Slot, Value
from lora_state_format.model.tensors import CHUNK, Tensor

__all__ = [
    "Layout",
    "Written",
    "bounds_of",
    "check_path",
    "commit_file",
    "commit_shard",
    "committing",
    "content",
    "even_size",
    "files_of",
    "finish",
    "index_of_set",
    "lay_out",
    "shard_name",
    "stream",
    "write",
]

LARGEST_HEADER: Final = 25_000_000
"""Bytes of a header that are written at most (W7): where the Hugging Face Hub's parsers stop."""

PART: Final = 1 << 24
"""Bytes, and what is left of a tensor then, that one thread copies at a time."""

UNLINKING: Final = 4
"""Files of an older set that are removed at once: it takes as long as a tenth of writing one, and all ranks wait."""

SHARD_HEADER: Final = 16 << 20
"""Bytes of header that a shard is filled up to, as estimated."""


@dataclass(frozen=True)
class Written:
    """The result of ``write``: the path to open, all files behind it, their bytes and tensors.

    ``digest`` is the header's, or the id of the set.
    """

    path: str
    files: tuple[str, ...]
    size: int
    tensors: int
    digest: str


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
    Equal states give equal bytes. To an object store (a URL) a state is sent when it is whole on this machine, shards
    first and the index last; what the path meant before is removed then.

    Args:
        state: The state; its tensors are read once, in chunks.
        path: The file to write. A set is written as shards next to it, with an index.
        force: Replace a state that is there.
        max_shard_size: Bytes of tensors in a shard at most; a new shard also starts at 16 MiB of header.
        progress: Called with the bytes written since its last call.

    Raises:
        TargetExistsError: Something is at the path, and ``force`` is false.
        UnrepresentableError: The format cannot hold a value.
        FileError: A source is damaged, or changed while it was read.
        DigestError: A tensor no longer matches the digest in the file that it comes from.
        OSError: The system refused.
    """
    path = Path(path)
    if is_remote(path):
        return _sent(path, force, lambda local: write(state, local, max_shard_size=max_shard_size, progress=progress))
    check_path(path, force)
    with paused():
        state = stowed(state)
        bounds = bounds_of(state, max_shard_size)
        layouts = [lay_out(state, bounds, number) for number in range(len(bounds))]
    readers = 2 if state.resources and readable_together(state.resources) else 1
    with contextlib.ExitStack() as stack:
        ledger = Ledger()
        files = [stack.enter_context(TemporaryFile(path)) for _ in layouts]
        for layout, file in zip(layouts, files, strict=True):
            stream(layout, file, ledger, progress, readers=readers)
        ledger.check()
        state.check_unchanged()
        with paused():
            if len(layouts) == 1:
                return commit_file(path, layouts[0], files[0], force)
            return _commit_set(path, layouts, files, force)


class Layout(NamedTuple):
    """A file before its digests are known: the text of its manifest, and the tensors in data order (W5).

    ``members`` are the manifest's without ``digests``, each as canonical JSON; ``entries`` is the header's text behind
    ``__metadata__``; ``digests`` are filled in while the tensors are written.
    """

    members: dict[str, str]
    tensors: tuple[tuple[str, Tensor], ...]
    sizes: tuple[int, ...]
    entries: str
    digests: list[str]
    header_size: int

    @property
    def data_size(self) -> int:
        """Bytes of all tensors."""
        return sum(self.sizes)


def lay_out(state: OptimizerState, bounds: Bounds, number: int) -> Layout:
    """Return the layout of one file of a state that is ``stowed``: of all of it, or of the shard ``number`` from 0 on.

    Raises ``UnrepresentableError`` for a state that has no form in a file.
    """
    if len(bounds) == 1:
        return _layout(encode(state))
    if number == 0:
        check_names(state.parameters)
    first, last = bounds[number]
    place = ShardOf(ZERO, number + 1, len(bounds), tuple(range(first, last)))
    return _layout(encode(_part(state, first, last), place))


def _layout(manifest: Manifest) -> Layout:
    # W5: wide items first, so that everything is aligned; then parameter order; then label. The sort is stable, and
    # the manifest lists the tensors of each parameter by label.
    held = ((key, slot.tensor) for key, slot in manifest.tensors.items())
    tensors = plain.in_data_order(held, lambda pair: pair[1].dtype)
    sizes = []
    for key, tensor in tensors:
        size, rest = divmod(tensor.count * BITS[tensor.dtype], 8)
        if rest or is_too_large(tensor.shape) or len(tensor.shape) > MAX_DIMENSIONS:
            raise UnrepresentableError(
                f"tensor {key!r} of type {tensor.dtype} and shape {list(tensor.shape)}: not whole bytes, or too large"
            )
        sizes.append(size)
    described = zip(tensors, sizes, strict=True)
    entries = plain.entries((dumps(key), tensor.dtype, tensor.shape, size) for (key, tensor), size in described)
    layout = Layout(
        members={key: dumps(value) for key, value in manifest.members.items()},
        tensors=tuple(tensors),
        sizes=tuple(sizes),
        entries="".join(f",{entry}" for entry in entries),
        digests=[],
        header_size=0,
    )
    return layout._replace(header_size=len(_header(layout._replace(digests=[ZERO] * len(tensors)))))


def _header(layout: Layout, identity: str = ZERO) -> bytes:
    """Length and header, padded to the alignment (W7), its digest as zeros; ``identity`` is the set's id, if any."""
    members = {**layout.members, "digests": dumps({"algorithm": ALGORITHM, "values": layout.digests})}
    if "set" in members:
        members["set"] = members["set"].replace(ZERO, identity)
    manifest = ",".join(f"{dumps(key)}:{members[key]}" for key in sorted(members))
    metadata = dumps('{"digest":"' + ZERO + '","manifest":{' + manifest + "}}")
    header = utf8(f'{{"__metadata__":{{"{METADATA}":{metadata}}}{layout.entries}}}')
    whole = plain.padded(header)
    header = whole[8:]
    values = most_values(header)
    if len(header) > LARGEST_HEADER or values > MAX_VALUES:
        raise UnrepresentableError(
            f"a header of {len(header)} bytes and {values} values, more than {LARGEST_HEADER} or {MAX_VALUES}: extra, "
            "globals, or the values of one parameter are too large; keep large data in tensors"
        )
    return whole


def _sealed(layout: Layout, identity: str = ZERO) -> bytes:
    """Return the header with its digest."""
    raw = _header(layout, identity)
    start = 8 + len(PREFIX)
    return raw[:start] + header_digest(raw).encode() + raw[start + 32 :]


def stream(
    layout: Layout,
    target: TemporaryFile,
    ledger: Ledger,
    progress: Callable[[int], None] | None,
    *,
    readers: int = 1,
) -> None:
    """Copy every tensor of a file behind the room for its header, and fill in the tensors' digests.

    With two ``readers`` one thread reads and hashes while the other one writes: 1.0 times ``cp`` in memory, where one
    thread takes 1.25 times.

    Raises ``DigestError`` for a tensor that does not match the digest in the file that it comes from.
    """
    turn = Lock()

    def copy(part: _Part) -> list[str]:
        buffer, digests = memoryview(bytearray(CHUNK)), list[str]()
        chunks = (chunk for key, tensor in part.tensors for chunk in ledger.chunks(tensor, buffer, key, digests))
        position = part.start
        for chunk in gathered(chunks):
            target.write(position, chunk)
            position += len(chunk)
            if progress:
                with turn:
                    progress(len(chunk))
        return digests

    parts = _parts(layout)
    with ThreadPoolExecutor(readers) as pool:
        for digests in pool.map(copy, parts) if min(readers, len(parts)) > 1 else map(copy, parts):
            layout.digests.extend(digests)


class _Part(NamedTuple):
    """Tensors that stand next to each other in a file, from ``start`` on."""

    start: int
    tensors: Sequence[tuple[str, Tensor]]


def _parts(layout: Layout) -> list[_Part]:
    """Return the tensors of a file in parts of at least ``PART`` bytes, but for the last."""
    parts, start, end, first = list[_Part](), layout.header_size, layout.header_size, 0
    for number, size in enumerate(layout.sizes, 1):
        end += size
        if end - start >= PART or number == len(layout.sizes):
            parts.append(_Part(start, layout.tensors[first:number]))
            start, first = end, number
    return parts


def content(layout: Layout) -> str:
    """Return the digest of a shard that is complete but for the id of its set, which is made of all these digests."""
    return header_digest(_header(layout))


def finish(layout: Layout, file: TemporaryFile, identity: str = ZERO) -> str:
    """Write the header, wait until the file is on the disk, and return the digest that the header states."""
    header = _sealed(layout, identity)
    file.finish(header)
    return stated_digest(header)


def commit_file(path: Path, layout: Layout, file: TemporaryFile, force: bool) -> Written:
    """Make a file with all its tensors the state at ``path``."""
    digest = finish(layout, file)
    with committing(path, force, keep={path.name}):
        file.commit(path, force=force)
    return Written(str(path), (str(path),), layout.header_size + layout.data_size, len(layout.tensors), digest)


def check_path(path: Path, force: bool) -> None:
    """Raise ``OptionError`` for a path that cannot name a state, ``TargetExistsError`` for one that does already."""
    if path.is_dir():
        raise OptionError(f"{path} is a folder; name the file to write, as in {path / 'optimizer.safetensors'}")
    if path.name.endswith(INDEX_SUFFIX):
        raise OptionError(f"{path} is the name of an index; name the file to write, without '{INDEX_SUFFIX}'")
    for existing in (index_of(path), path):
        check_target(existing, force=force)


@contextlib.contextmanager
def committing(path: Path, force: bool, keep: set[str]) -> Iterator[None]:
    """Around the renames that make a new state the one at ``path``: afterwards whatever held an older one is removed.

    A path means its index if there is one, else the file. So the rename of an index commits a set, and the removal of
    an index commits a single file that was put in place before; shards that no index names are left-overs.
    """
    with locked(path.parent):
        check_path(path, force)
        yield
        old = [found for found in files_of(path) if found.name not in keep]
        means = [found for found in old if found in (index_of(path), path)]
        # An index before the shards that it names: whoever opens the path finds all or none of them.
        for found in means:
            found.unlink()
        with ThreadPoolExecutor(UNLINKING) as pool:
            list(pool.map(Path.unlink, old[len(means) :]))
        sync_folder(path.parent)


def files_of(path: Path) -> list[Path]:
    """Return the files that may hold a state of this path: the index, the file itself, then the shards of any set.

    Shards that another index names, a renamed one for instance, are not among them.
    """
    shard = re.compile(re.escape(path.stem) + r"-[0-9a-f]{8}-[0-9]{5}-of-[0-9]{5}" + re.escape(path.suffix))
    others = [found for found in path.parent.glob(f"*{INDEX_SUFFIX}") if found != index_of(path) and is_state(found)]
    kept = {item["file"] for index in others for item in read_index(index)["shards"]}
    shards = [
        found
        for found in path.parent.iterdir()
        if shard.fullmatch(found.name) and found.name not in kept and is_state(found)
    ]
    return [found for found in (index_of(path), path) if os.path.lexists(found)] + shards


# --- object stores ------------------------------------------------------------------------------------------------


def _sent(path: Path, force: bool, make: Callable[[Path], Written]) -> Written:
    """Let ``make`` write a state in a temporary folder, send its files to a URL in order, and remove older ones.

    Each file appears whole, and the index, by which a set is opened, last: a path always means a whole state. Two
    writers of one path are not kept apart, and shards of a writer that was killed stay, named by no index.
    """
    old = _sent_before(path)
    if old and not force:
        raise TargetExistsError(f"{spelled(path)} exists", remedy=REPLACE)
    with tempfile.TemporaryDirectory(prefix="lora-state-") as folder:
        written = make(Path(folder, path.name))
        files = [path.with_name(Path(name).name) for name in written.files]
        for name, file in zip(written.files, files, strict=True):
            send(Path(name), file)
    for file in old:
        if file not in files:
            remove(file)
    return replace(written, path=spelled(path), files=tuple(map(spelled, files)))


def _sent_before(path: Path) -> list[Path]:
    """Return the files of what a URL means now, the index first."""
    index = index_of(path)
    files = [index, *(path.with_name(item["file"]) for item in read_index(index)["shards"])] if exists(index) else []
    return [*files, path] if exists(path) else files


# --- sets of shards -----------------------------------------------------------------------------------------------


Bounds: TypeAlias = "Sequence[tuple[int, int]]"
"""For each file of a state the first of its parameters, and the one after its last."""


def bounds_of(state: OptimizerState, max_shard_size: int | None) -> Bounds:
    """Return the runs of parameters that each become a file (W13).

    Raises ``OptionError`` for more of them than a set may have.
    """
    costs = [_cost(parameter) for parameter in state.parameters]
    bounds = _runs(costs, max_shard_size)
    if len(bounds) > MAX_SHARDS:
        raise OptionError(
            f"the state would become {len(bounds)} shards, more than {MAX_SHARDS}; choose a larger max_shard_size"
        )
    return bounds


def even_size(state: OptimizerState, files: int) -> int:
    """Return the least ``max_shard_size`` by which a state becomes at most ``files`` files, in bytes of tensors.

    So the largest file is as small as runs of whole parameters allow. A limit on headers may ask for more files; then
    it is the size of the whole state.
    """
    costs = [_cost(parameter) for parameter in state.parameters]
    low, high = max((size for size, _ in costs), default=0), sum(size for size, _ in costs)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_runs(costs, middle)) <= files else (middle + 1, high)
    return low


def _runs(costs: Sequence[tuple[int, int]], max_size: int | None) -> Bounds:
    starts, size, header = [0], 0, 0
    for position, (own_size, own_header) in enumerate(costs):
        full = max_size is not None and size + own_size > max_size
        if position > starts[-1] and (full or header + own_header > SHARD_HEADER):
            starts.append(position)
            size = header = 0
        size, header = size + own_size, header + own_header
    return list(zip(starts, [*starts[1:], len(costs)], strict=True))


def _cost(parameter: Parameter) -> tuple[int, int]:
    """Return bytes of tensors and, within some percent, of header: a name stands there once, and once per tensor."""
    texts = [parameter.name, *parameter.tied, *parameter.foreign_names, *parameter.foreign_names.values()]
    size, header = 0, 160 + sum(len(text) + 8 for text in texts)
    values: list[Value] = [*(parameter.state or {}).values()]
    for value in values:  # which grows
        if isinstance(value, Slot):
            size, header = size + value.tensor.size, header + len(parameter.name) + 160
        elif isinstance(value, (str, bytes)):
            header += 2 * len(value)
        elif isinstance(value, Mapping):
            values += value.values()
        elif isinstance(value, (list, tuple)):
            values += value
    return size, header


def _part(state: OptimizerState, first: int, last: int) -> OptimizerState:
    """Return a shard's own part (W13): its parameters, groups with its own counts; the first has what stands once."""
    groups, start = [], 0
    for group in state.groups:
        stop = start + group.count
        groups.append(replace(group, count=max(0, min(stop, last) - max(start, first))))
        start = stop
    part = replace(state, groups=tuple(groups), parameters=state.parameters[first:last], resources=())
    return part if first == 0 else replace(part, globals={}, origin={}, extra={}, unknown={})


def shard_name(path: Path, identity: str, number: int, count: int) -> str:
    """Return the name of the shard ``number`` (from 0) of a set (W13)."""
    return f"{path.stem}-{identity[:8]}-{number + 1:05}-of-{count:05}{path.suffix}"


def commit_shard(shard: Path, file: TemporaryFile) -> None:
    """Give a shard its name; what has it already, if anything, is the same shard of an equal state."""
    file.commit(shard, force=os.path.lexists(shard) and is_state(shard))


def index_of_set(path: Path, layouts: Sequence[Layout], identity: str, digests: Sequence[str]) -> tuple[bytes, Written]:
    """Return the index of a set, and what the set is made of; the digests are those that the shards state.

    Raises ``UnrepresentableError`` for an index that is too large.
    """
    names = [shard_name(path, identity, number, len(layouts)) for number in range(len(layouts))]
    total = sum(layout.data_size for layout in layouts)
    index = dumps(
        {
            "metadata": {"format": FORMAT, "set": identity, "total_size": total},
            "shards": [{"digest": digest, "file": name} for name, digest in zip(names, digests, strict=True)],
            "weight_map": {key: name for name, layout in zip(names, layouts, strict=True) for key, _ in layout.tensors},
        }
    ).encode()
    if len(index) > MAX_INDEX:
        raise UnrepresentableError(
            f"an index of {len(index)} bytes, more than {MAX_INDEX}: too many tensors for one set"
        )
    files = tuple(str(path.with_name(name)) for name in (*names, index_of(path).name))
    size = total + sum(layout.header_size for layout in layouts) + len(index)
    return index, Written(str(path), files, size, sum(len(layout.tensors) for layout in layouts), identity)


def _commit_set(path: Path, layouts: list[Layout], files: list[TemporaryFile], force: bool) -> Written:
    identity = set_id(map(content, layouts))
    digests = [finish(layout, file, identity) for layout, file in zip(layouts, files, strict=True)]
    index, written = index_of_set(path, layouts, identity, digests)
    with TemporaryFile(path) as temporary:
        temporary.finish(index)
        with committing(path, force, keep={Path(name).name for name in written.files}):
            for number, file in enumerate(files):
                commit_shard(path.with_name(shard_name(path, identity, number, len(files))), file)
            temporary.commit(index_of(path), force=force)
    return written
