"""One state written by all ranks at once: each its own files of whole parameters, and the index last.

The files are those that one process would write with a ``max_shard_size`` that gives each rank about as much. Bytes
reach the rank that writes them by ``gather``. Every rank has its files on the disk before the first gets its name, and
rank 0 renames the index: until then the path means what it meant before, whatever happens to any rank.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from lora_state_format.errors import CaptureError, FileError
from lora_state_format.format import writing
from lora_state_format.format.envelope import MAX_SHARDS, index_of, set_id
from lora_state_format.format.stowing import stowed
from lora_state_format.io.atomic import TemporaryFile
from lora_state_format.io.ledger import Ledger
from lora_state_format.model.digests import ALGORITHM, hash_tensor
from lora_state_format.model.states import OptimizerState, Parameter, Role, Slot, Value, mapped
from lora_state_format.model.tensors import CHUNK, Digest, Tensor
from lora_state_format.optimizers.rounded import stored
from lora_state_format.torch.exchange import gather
from lora_state_format.torch.fsdp1 import Part
from lora_state_format.torch.ranks import Ranks
from lora_state_format.torch.spread import run
from lora_state_format.torch.tensors import dtype_of

__all__ = ["Captured", "write_together"]

LEAST: Final = 32 << 20
"""Bytes of tensors below which a rank gets no file of its own: a small state is one file."""


@dataclass(frozen=True)
class Captured:
    """What a rank has captured.

    Attributes:
        state: With tensors of which this rank has some elements.
        weights: The parameters' own tensors, whose digests go with the state.
        parts: What this rank has of the parameters that are cut up.
        store: The slots to round.
    """

    state: OptimizerState
    weights: Mapping[str, Tensor]
    parts: Mapping[str, Part]
    store: Mapping[str, str]


def write_together(
    capture: Callable[[], Captured],
    path: Path,
    *,
    force: bool,
    max_shard_size: int | None,
    consolidate: bool,
    group: Any = None,
) -> writing.Written:
    """Write the state that all ranks capture, and return on each rank what was written.

    Args:
        capture: Called on every rank; what it raises on one stops all.
        path: What the state is to be opened by.
        force: Replace what is there.
        max_shard_size: Bytes of tensors in a file; ranks get several files where their share is larger.
        consolidate: Write one file on rank 0, where its header allows.
        group: The process group; ``None`` is the default one.

    Raises:
        RankError: If another rank failed, with its message.
        CaptureError: If the ranks do not hold the same state.
        TargetExistsError: Unless ``force``.
    """
    ranks = Ranks(group)
    box: list[Captured] = []
    ranks.share(lambda: box.append(capture()))
    captured = box.pop()
    state = _completed(captured, ranks)
    if captured.store:  # what it raises, it raises on every rank
        state = stored(state, captured.store).state
    state = stowed(state)
    captured = replace(captured, state=state)
    bounds: list[tuple[int, int]] = []
    layouts: list[writing.Layout] = []

    def lay_out() -> dict[str, str]:
        most = 1 if consolidate else min(ranks.world, MAX_SHARDS, _size(state) // LEAST + 1)
        size = writing.even_size(state, most)
        bounds.extend(writing.bounds_of(state, size if max_shard_size is None else min(size, max_shard_size)))
        layouts.extend(writing.lay_out(state, bounds, number) for number in range(len(bounds)))
        return _signature(layouts)

    _compare(ranks.share(lay_out), ranks.rank)
    owners = [number * ranks.world // len(bounds) for number in range(len(bounds))]
    mine = [number for number, owner in enumerate(owners) if owner == ranks.rank]
    wanted: list[list[Tensor]] = [[] for _ in range(ranks.world)]
    for owner, bound, layout in zip(owners, bounds, layouts, strict=True):
        wanted[owner] += _read_by(captured, bound, layout)
    with contextlib.ExitStack() as stack:
        files: dict[int, TemporaryFile] = {}

        def begin() -> None:
            if ranks.rank == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                writing.check_path(path, force)
                files[0] = stack.enter_context(TemporaryFile(path))  # sweeps what dead writers left

        def write() -> dict[int, tuple[str, int]]:
            ledger, buffer = Ledger(), memoryview(bytearray(CHUNK))
            for number in mine:
                own = _with_weights(captured, bounds[number], buffer)
                layouts[number] = writing.lay_out(own, bounds, number)
                if number not in files:
                    files[number] = stack.enter_context(TemporaryFile(path, sweep=False))
                writing.stream(layouts[number], files[number], ledger, None)
            ledger.check()
            return {number: (writing.content(layouts[number]), layouts[number].header_size) for number in mine}

        ranks.share(begin)
        told = gather(wanted, write, ranks)
        sizes = {number: size for found in told for number, (_, size) in found.items()}
        layouts = [layout._replace(header_size=sizes[number]) for number, layout in enumerate(layouts)]
        if len(layouts) == 1:
            only = ranks.share(lambda: [writing.commit_file(path, layouts[0], files[0], force) for _ in mine])
            return only[0][0]
        contents = {number: content for found in told for number, (content, _) in found.items()}
        identity = set_id(contents[number] for number in range(len(layouts)))
        finished = ranks.share(
            lambda: {number: writing.finish(layouts[number], files[number], identity) for number in mine}
        )
        digests = {number: digest for found in finished for number, digest in found.items()}
        return _commit(path, layouts, files, identity, [digests[number] for number in sorted(digests)], force, ranks)


def _commit(
    path: Path,
    layouts: list[writing.Layout],
    files: Mapping[int, TemporaryFile],
    identity: str,
    digests: list[str],
    force: bool,
    ranks: Ranks,
) -> writing.Written:
    """Give the files their names, then rename the index; rank 0 holds the folder meanwhile."""
    first = ranks.rank == 0
    index, written = writing.index_of_set(path, layouts, identity, digests)
    with contextlib.ExitStack() as stack:

        def hold() -> TemporaryFile | None:
            if not first:
                return None
            temporary = stack.enter_context(TemporaryFile(path))
            temporary.finish(index)
            stack.enter_context(writing.committing(path, force, keep={Path(name).name for name in written.files}))
            held.append(temporary)
            return None

        def rename() -> None:
            for number, file in files.items():
                writing.commit_shard(path.with_name(writing.shard_name(path, identity, number, len(layouts))), file)

        def finish() -> None:
            for temporary in held:
                missing = [name for name in written.files[:-1] if not Path(name).exists()]
                if missing:
                    raise FileError(
                        "is not where its rank has put it: the ranks do not share a file system", path=missing[0]
                    )
                temporary.commit(index_of(path), force=force)
            stack.close()

        held: list[TemporaryFile] = []
        ranks.share(hold)
        ranks.share(rename)
        ranks.share(finish)
    return written


def _size(state: OptimizerState) -> int:
    return sum(slot.tensor.size for parameter in state.parameters for _, slot in parameter.tensors())


def _read_by(captured: Captured, bound: tuple[int, int], layout: writing.Layout) -> list[Tensor]:
    """Return the tensors that the writer of a file reads, in order: weights, which it only hashes, then the file's."""
    names = [parameter.name for parameter in captured.state.parameters[slice(*bound)]]
    weights = [captured.weights[name] for name in names if name in captured.weights]
    return [*weights, *(tensor for _, tensor in layout.tensors)]


def _with_weights(captured: Captured, bound: tuple[int, int], buffer: memoryview) -> OptimizerState:
    """Return the state, with the digests of the weights that belong into one file."""
    parameters = [*captured.state.parameters]
    for place in range(*bound):
        own = captured.weights.get(parameters[place].name)
        if own is not None:
            digest = Digest(ALGORITHM, own.dtype, hash_tensor(own, buffer))
            parameters[place] = replace(parameters[place], weights=digest)
    return replace(captured.state, parameters=tuple(parameters))


# --- the same on every rank -----------------------------------------------------------------------------------------


def _signature(layouts: list[writing.Layout]) -> dict[str, str]:
    """Digests of what the files say alike on every rank, by member of the manifest; ``extra`` is that of rank 0."""
    texts = {"tensors": [layout.entries for layout in layouts]}
    for layout in layouts:
        for key, text in layout.members.items():
            if key not in ("extra", "origin"):
                texts.setdefault(key, []).append(text)
    return {key: hashlib.blake2b("\n".join(text).encode(), digest_size=16).hexdigest() for key, text in texts.items()}


def _compare(signatures: list[dict[str, str]], rank: int) -> None:
    own = signatures[rank]
    for other, signature in enumerate(signatures):
        if signature != own:
            differing = sorted(key for key in own.keys() | signature.keys() if own.get(key) != signature.get(key))
            raise CaptureError(
                f"the ranks do not hold the same state: rank {rank} and rank {other} differ in {', '.join(differing)}; "
                "their models, optimizers or options differ, or some took no step"
            )


@dataclass(frozen=True, slots=True)
class _Told:
    """What a rank tells the others of a slot, of which they may have no elements."""

    dtype: str
    role: Role


def _completed(captured: Captured, ranks: Ranks) -> OptimizerState:
    """Return the state with the slots of all cut-up parameters, also where this rank has no elements.

    The rank that has a parameter's first element tells the others which slots there are.
    """
    if not captured.parts:
        return captured.state
    own = {
        parameter.name: mapped(parameter.state, _tell)
        for parameter in captured.state.parameters
        if (part := captured.parts.get(parameter.name)) and part.count and part.start == 0
        if parameter.state is not None
    }
    told: dict[str, Any] = {}
    for found in ranks.share(lambda: own):
        told = found | told
    parameters = [
        replace(p, state=_with_slots(p, told[p.name])) if p.name in told else p for p in captured.state.parameters
    ]
    return replace(captured.state, parameters=tuple(parameters))


def _tell(value: Value, path: tuple[Any, ...]) -> Any:
    return _Told(value.tensor.dtype, value.role) if isinstance(value, Slot) else value


def _with_slots(parameter: Parameter, told: Any) -> Any:
    """Return the slots of a parameter as they were told, with the elements that this rank has."""
    held = dict(parameter.tensors())

    def fill(value: Any, path: tuple[Any, ...]) -> Any:
        if not isinstance(value, _Told):
            return value
        empty = torch.empty(0, dtype=dtype_of(value.dtype))
        return held.get(path) or Slot(run(parameter.name, parameter.shape, 0, empty), value.role)

    return mapped(told, fill)
