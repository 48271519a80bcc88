"""nanotron's ``optimizer`` folder: ``optimizer_config.json`` and one file per rank, with names next to the ids.

The layout is that of ``serialize/optimizer.py``, ``serialize/weights.py`` and ``optim/zero.py``. With ZeRO-1 a
data-parallel rank holds flat parts of parameters, one behind the other in the order of the ranks. Tensor- and
expert-parallel ranks hold slices: only the weights' files, in the folder ``model`` next to this one, say in their
metadata where each belongs. Pipeline ranks hold different parameters, but for tied ones, which several hold alike. The
fp32 masters of mixed precision are kept as the state of a gradient accumulator.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from lora_state_format.errors import FileError, RefusedError
from lora_state_format.foreign import keyed, pickles
from lora_state_format.foreign.masters import SAMPLE, check_masters, elements
from lora_state_format.foreign.state_dict import from_state_dict
from lora_state_format.foreign.trees import member
from lora_state_format.io.files import FEW, Files, first_look, inside, names_in, reading
from lora_state_format.io.json_files import read_json_object
from lora_state_format.io.safetensors import HeaderEntry, read_header
from lora_state_format.model.sources import File, Unread
from lora_state_format.model.states import Checkpoint, Value
from lora_state_format.model.tensors import Box, Flat, Piece, Tensor, contiguous, is_tiling
from lora_state_format.optimizers.roles import MASTER
from lora_state_format.registry import Match

NAME: Final = "nanotron"
DESCRIPTION: Final = "nanotron's optimizer folder: optimizer_config.json next to optimizer_pp-*.pt"
OPTIONS: Final = {"masters": "keep the fp32 master weights as a slot 'master_param'"}

_CONFIG: Final = "optimizer_config.json"
_FILE: Final = re.compile(r"optimizer_pp-\d.*\.pt")
_SLICE: Final = re.compile(r"_pp-rank-\d+-of-\d+_tp-rank-(\d+)-of-\d+(?:_exp-rank-(\d+)-of-\d+)?\.safetensors")
_RANGE: Final = re.compile(r"(\d+|None),(\d+|None),(?:None|1)")
_NUMPY: Final = re.compile(r"np\.int\d+\((\d+)\)")
_SHAPE: Final = re.compile(r"\((?:\d+(?:, |,?(?=\))))*\)")
_ANOTHER: Final = "a file of another save; copy the folder again from where it was written"

Place: TypeAlias = "tuple[int, int]"
"""A model-parallel rank of a pipeline stage: expert rank and tensor rank."""


def detect(path: Path) -> Match | None:
    folder = _folder(path)
    return Match(f"{_CONFIG} of nanotron", folder) if folder else None


def _folder(path: Path) -> Path | None:
    for folder in (path, path / "optimizer"):
        if (folder / _CONFIG).is_file() and any(map(_FILE.fullmatch, names_in(folder))):
            return folder
    return None


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Read the folder.

    Raises:
        FileError: files are missing, or not of one save.
        RefusedError: ranks hold slices, and the folder with the weights is not there.
    """
    with reading(match.path) as files:
        run = _run(match.path, files)
        return _checkpoint(run, [_stage(run, ranks) for ranks in run.stages], {}, options)


def glance(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Return what the folder holds by the names of all files and the first rank's file of each pipeline stage.

    A folder of up to ``FEW`` ranks is read as a whole. Raises what ``read`` raises, for what is seen.
    """
    names = names_in(match.path)
    if len(names) <= FEW:
        return read(match, options)
    with reading(match.path) as files:
        run = _run(match.path, files)
        stages = [_unread(run, _rank(ranks[0, 0][0], files)) for ranks in run.stages]
        return _checkpoint(run, stages, {"first_look": first_look(len(stages), len(names))}, options)


# --- the files ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """The files of each pipeline stage, by model-parallel rank and data-parallel rank, and what the config says.

    ``shapes`` and ``offsets`` are those of ZeRO-1: the shape of a rank's slice, and which elements of it each
    data-parallel rank holds. Only the first stage's parameters are in them.
    """

    folder: Path
    files: Files
    stages: Sequence[Mapping[Place, Sequence[Path]]]
    zero: bool
    shapes: Mapping[str, Any]
    offsets: Mapping[str, Any]
    model: _Model

    @property
    def sliced(self) -> bool:
        """Whether model-parallel ranks hold slices of parameters."""
        return len(self.stages[0]) > 1

    @property
    def experts(self) -> bool:
        """Whether there were several expert-parallel ranks."""
        return any(expert for expert, _ in self.stages[0])

    def local_shape(self, name: str, place: Place) -> tuple[int, ...]:
        """Return the shape of what the data-parallel ranks of a model-parallel rank hold together."""
        if name in self.shapes:
            stated = member(self.shapes, name, list, self.folder / _CONFIG)
            return tuple(_number(size, self.folder / _CONFIG) for size in stated)
        return self.model.at(name, place).tensor.shape


def _run(folder: Path, files: Files) -> _Run:
    path = folder / _CONFIG
    config = read_json_object(path)
    stated, configs = (
        member(config, "parallelism", dict, path),
        member({"configs": {}, **config}, "configs", dict, path),
    )
    pipeline, data, tensor, expert = (
        _number(stated.get(key, 1), path) for key in ("pp_size", "dp_size", "tp_size", "expert_parallel_size")
    )
    zero = "param_name_to_dp_rank_offsets" in configs
    there = set(names_in(folder))

    def file(stage: int, rank: int, place: Place) -> Path:
        flat = f"_dp-{rank}-of-{data}" if zero else ""
        name = f"optimizer_pp-{stage}-of-{pipeline}{flat}_tp-{place[1]}-of-{tensor}_exp-{place[0]}-of-{expert}.pt"
        if name not in there:
            sizes = ", ".join(f"{key} {value}" for key, value in stated.items())
            raise FileError(f"missing: {_CONFIG} says that there were {sizes}", path=folder / name)
        return folder / name

    stages = [
        {
            place: [file(stage, rank, place) for rank in range(data if zero else 1)]
            for place in product(range(expert), range(tensor))
        }
        for stage in range(pipeline)
    ]
    shapes = member(configs, "orig_param_shapes", dict, path) if zero else {}
    offsets = member(configs, "param_name_to_dp_rank_offsets", dict, path) if zero else {}
    return _Run(folder, files, stages, zero, shapes, offsets, _Model(folder.parent / "model", files))


def _number(value: Any, path: Path) -> int:
    """Return a number, which nanotron writes as text."""
    if not str(value).isdecimal():
        raise FileError(f"has {str(value)[:60]!r} where a number is expected", path=path)
    return int(value)


class _Rank(NamedTuple):
    """What one file holds, or several together: slots and groups by name."""

    path: Path
    state: Mapping[str, dict[str, Any]]
    groups: Sequence[Mapping[str, Any]]


def _rank(path: Path, files: Files) -> _Rank:
    tree = pickles.load(files[path], path).value
    names = member(tree, "names", dict, path)
    entries = member(tree, "state", dict, path)
    state = {member(names, identity, str, path): dict(member(entries, identity, dict, path)) for identity in entries}
    masters = member({"gradient_accumulator": {}, **tree}, "gradient_accumulator", dict, path)
    for name in masters.keys() & state.keys():
        state[name][MASTER] = member(masters, name, Tensor, path)
    groups = []
    for group in member(tree, "param_groups", list, path):
        listed = [member(names, identity, str, path) for identity in member(group, "params", list, path)]
        groups.append({**group, "params": listed})
    return _Rank(path, state, groups)


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _unread(run: _Run, first: _Rank) -> _Rank:
    """Return a stage with tensors that cannot be read, by its first rank."""

    def unread(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.shape:
            return value
        shape = value.shape
        if run.sliced:
            shape = run.model.shape(name)
        elif run.zero:
            shape = run.local_shape(name, (0, 0))
        return contiguous(value.dtype, shape, Unread(run.folder))

    state = {name: {slot: unread(name, value) for slot, value in slots.items()} for name, slots in first.state.items()}
    return first._replace(state=state)


# --- put together ---------------------------------------------------------------------------------------------------


def _checkpoint(
    run: _Run, stages: Sequence[_Rank], seen: Mapping[str, Value], options: Mapping[str, Any]
) -> Checkpoint:
    """Return the state of all pipeline stages."""
    state, groups = _follow(stages, compared=not seen)
    weights = run.model.weights(state) if not seen else {}
    masters = {name: slots.pop(MASTER) for name, slots in state.items() if MASTER in slots}
    if options.get("masters"):
        for name, master in masters.items():
            state[name][MASTER] = master
    compared = check_masters(masters, weights, run.folder) if not seen else 0
    support: dict[str, Value] = {"support": "from source only"} if run.experts else {}
    result = from_state_dict(
        {"state": state, "param_groups": groups},
        origin={"format": NAME, **support, "masters_compared": compared, **seen},
        resources=(run.files,),
    )
    return Checkpoint(keyed.named(result, weights=weights), weights)


def _follow(stages: Sequence[_Rank], *, compared: bool) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Return the slots and groups of stages that follow each other; groups with the same options become one."""
    state: dict[str, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for stage in stages:
        for name, slots in stage.state.items():
            for slot, value in slots.items() if name in state else ():
                _check_alike(name, slot, [state[name].get(slot), value], stage.path, compared=compared)
        earlier = list(groups)
        for group in stage.groups:
            names = [name for name in group["params"] if name not in state]
            same = next((other for other in earlier if _options(other) == _options(group)), None)
            if same is None:
                groups.append({**group, "params": names})
            else:
                earlier.remove(same)
                same["params"] += names
        state = {**stage.state, **state}
    return state, groups


def _stage(run: _Run, ranks: Mapping[Place, Sequence[Path]]) -> _Rank:
    """Return what the ranks of a pipeline stage hold."""
    read = {place: [_rank(path, run.files) for path in paths] for place, paths in ranks.items()}
    held = {place: _data_ranks(run, place, parts) for place, parts in read.items()}
    if not run.sliced:
        return held[0, 0]
    names = dict.fromkeys(name for rank in held.values() for name in rank.state)
    state = {
        name: _slots(run, name, {place: rank for place, rank in held.items() if name in rank.state}) for name in names
    }
    return _Rank(held[0, 0].path, state, _groups(list(held.values())))


def _data_ranks(run: _Run, place: Place, ranks: Sequence[_Rank]) -> _Rank:
    """Return the slices of a model-parallel rank, of which the data-parallel ranks hold flat parts (ZeRO-1)."""
    if not run.zero:
        return ranks[0]
    names = dict.fromkeys(name for rank in ranks for name in rank.state)
    state = {
        name: _flat(name, [rank for rank in ranks if name in rank.state], run.local_shape(name, place), run)
        for name in names
    }
    return _Rank(ranks[0].path, state, _groups(ranks))


def _groups(ranks: Sequence[_Rank]) -> list[dict[str, Any]]:
    """Return the groups of ranks, of which some hold nothing of some parameters.

    Raises ``FileError`` if they have groups with other options.
    """
    for rank in ranks:
        if [_options(group) for group in rank.groups] != [_options(group) for group in ranks[0].groups]:
            raise FileError(f"has other groups than {ranks[0].path.name}: {_ANOTHER}", path=rank.path)
    return [
        {**group, "params": list(dict.fromkeys(name for rank in ranks for name in rank.groups[number]["params"]))}
        for number, group in enumerate(ranks[0].groups)
    ]


def _check_alike(name: str, slot: str, values: Sequence[Any], path: Path, *, compared: bool = True) -> None:
    """Raise ``FileError`` if ranks hold something else where they hold the same; of tensors, elements are compared."""

    def look(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        sample = bytes(elements(value, 0, min(SAMPLE, value.count))) if compared or not value.shape else None
        return value.dtype, value.shape, sample

    first, *others = map(look, values)
    if any(other != first for other in others):
        raise FileError(f"its {slot} of '{name}' is not that of the other ranks: {_ANOTHER}", path=path)


def _flat(name: str, ranks: Sequence[_Rank], shape: tuple[int, ...], run: _Run) -> dict[str, Any]:
    """Return a parameter's slots out of the flat parts that the data-parallel ranks hold, one behind the other."""
    stated = run.offsets.get(name)
    slots: dict[str, Any] = {}
    for slot, value in ranks[0].state[name].items():
        if not isinstance(value, Tensor) or not value.shape:
            for rank in ranks:
                _check_alike(name, slot, [value, rank.state[name].get(slot)], rank.path)
            slots[slot] = value
            continue
        pieces, end = [], 0
        for number, rank in enumerate(ranks):
            part = member(rank.state[name], slot, Tensor, rank.path)
            expected = _extent(stated, number, run.folder / _CONFIG) if stated is not None else part.count
            if part.count != expected:
                raise FileError(f"holds {part.count} of {expected} elements of '{name}'", path=rank.path)
            pieces.append(Piece(part, 0, Flat(end, part.count)))
            end += part.count
        if end != prod(shape):
            raise FileError(f"the ranks hold {end} of {prod(shape)} elements of '{name}'", path=run.folder)
        slots[slot] = Tensor(value.dtype, shape, tuple(pieces))
    return slots


def _extent(stated: Any, rank: int, path: Path) -> int:
    """Return how many elements of a parameter a data-parallel rank holds, as the config says."""
    start, stop = (_number(end, path) for end in member(stated, str(rank), list, path)[:2])
    return stop - start


def _slots(run: _Run, name: str, held: Mapping[Place, _Rank]) -> dict[str, Any]:
    """Return a parameter's slots out of those of the model-parallel ranks."""
    slices = run.model.slices(name)
    slots: dict[str, Any] = {}
    for slot, value in next(iter(held.values())).state[name].items():
        parts = {place: member(rank.state[name], slot, object, rank.path) for place, rank in held.items()}
        if isinstance(value, Tensor) and value.shape and slices[0].place is not None:
            slots[slot] = _whole(f"{slot} of '{name}'", slices, parts, run.folder)
            continue
        for place, part in parts.items():
            _check_alike(name, slot, [value, part], held[place].path)
        slots[slot] = value
    return slots


# --- the weights ----------------------------------------------------------------------------------------------------


class _Slice(NamedTuple):
    """A weights' file: the tensor in it, and where its parts belong in the whole, which has ``shape``.

    ``place`` is the model-parallel rank that it is of: ``None`` if it is all of the parameter, an expert rank of -1 if
    it is that of all of them.
    """

    tensor: Tensor
    place: Place | None
    boxes: tuple[tuple[Box, Box], ...]
    shape: tuple[int, ...]


class _Model:
    """The folder ``model``: a file for each parameter, or for each of its slices, by the steps of its name."""

    def __init__(self, folder: Path, files: Files) -> None:
        self.folder = folder
        self._pool = files
        self._names: dict[Path, list[str]] = {}
        self._slices: dict[str, list[_Slice]] = {}

    def slices(self, name: str) -> list[_Slice]:
        """Return all slices of a parameter. Raises ``RefusedError`` where there are no files of it."""
        if name not in self._slices:
            self._slices[name] = [_slice(*file, self._pool) for file in self._needed(name)]
        return self._slices[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole parameter, by one of its files."""
        return _slice(*self._needed(name)[0], self._pool).shape

    def at(self, name: str, place: Place) -> _Slice:
        """Return the slice of a model-parallel rank."""
        for found in self.slices(name):
            if found.place in (None, place, (-1, place[1])):
                return found
        raise FileError(f"has no slice of '{name}' of tensor rank {place[1]}, expert rank {place[0]}", path=self.folder)

    def weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the whole weights that there are, under the names of the optimizer's parameters."""
        found = {}
        for name in filter(self._files, names):
            slices = self.slices(name)
            if slices[0].place is None:
                found[name] = slices[0].tensor
            else:
                parts = {part.place: part.tensor for part in slices if part.place is not None}
                found[name] = _whole(f"'{name}'", slices, parts, self.folder)
        return found

    def _needed(self, name: str) -> list[tuple[Path, Place | None]]:
        if found := self._files(name):
            return found
        raise RefusedError(
            f"has no file of '{name}', of which the optimizer's ranks hold parts, and only the weights' files say how "
            "these fit together: give the checkpoint's whole folder, with 'model' next to 'optimizer'",
            path=self.folder,
        )

    def _files(self, name: str) -> list[tuple[Path, Place | None]]:
        """Return a parameter's files, and of which model-parallel rank each is."""
        *steps, last = name.removeprefix("module.").split(".")
        folder = self.folder
        for step in steps:
            folder = inside(folder, step, self.folder)
        if folder not in self._names:
            self._names[folder] = names_in(folder) if folder.is_dir() else []
        if f"model_{last}.safetensors" in self._names[folder]:
            return [(folder / f"model_{last}.safetensors", None)]
        return [
            (folder / file, (int(match[2]) if match[2] else -1, int(match[1])))
            for file in self._names[folder]
            if file.startswith(f"model_{last}_") and (match := _SLICE.fullmatch(file, len(f"model_{last}")))
        ]


def _slice(path: Path, place: Place | None, files: Files) -> _Slice:
    """Return what a weights' file holds, and what its metadata says."""
    with File(path) as file:
        header = read_header(file)
    entry = member(header.entries, "data", HeaderEntry, path)
    tensor = contiguous(entry.dtype, entry.shape, files[path], header.size + entry.begin)
    if place is None:
        return _Slice(tensor, None, (), tensor.shape)
    text = _NUMPY.sub(r"\1", member(header.metadata, "unsharded_shape", str, path))
    if not _SHAPE.fullmatch(text):
        raise FileError(f"has the unsharded_shape {text[:60]!r}, which is no shape", path=path)
    shape = tuple(map(int, re.findall(r"\d+", text)))
    pairs = member(header.metadata, "local_global_slices_pairs", str, path).split(";")
    return _Slice(tensor, place, tuple(_boxes(pair, tensor.shape, shape, path) for pair in pairs), shape)


def _boxes(pair: str, local: tuple[int, ...], whole: tuple[int, ...], path: Path) -> tuple[Box, Box]:
    """Return which part of a slice is which part of the whole."""
    text, _, other = pair.partition("#")
    here, there = _box(text, local), _box(other, whole)
    if here is None or there is None or here.shape != there.shape:
        raise FileError(
            f"says {pair[:100]!r} of its slice of shape {list(local)} in {list(whole)}, which are no parts of the same "
            "shape",
            path=path,
        )
    return here, there


def _box(text: str, shape: tuple[int, ...]) -> Box | None:
    """Return the box that nanotron describes by a slice for each axis; ``None`` if it is none in this shape."""
    matches = [_RANGE.fullmatch(part) for part in text.split("|")]
    if len(matches) != len(shape):
        return None
    start, extent = [], []
    for match, size in zip(matches, shape, strict=True):
        if match is None:
            return None
        first, last = (int(end) if end != "None" else other for end, other in ((match[1], 0), (match[2], size)))
        if not first <= last <= size:
            return None
        start.append(first)
        extent.append(last - first)
    return Box(tuple(start), tuple(extent))


def _whole(what: str, slices: Sequence[_Slice], parts: Mapping[Place, Any], path: Path) -> Tensor:
    """Return a tensor out of the parts that model-parallel ranks hold, by the metadata of the weights' slices."""
    shape = slices[0].shape
    held = [(found, _part(what, found, parts, path)) for found in slices]
    boxes = [(part.part(here.start, here.shape), there) for found, part in held for here, there in found.boxes]
    if (
        any(found.shape != shape or part.dtype != held[0][1].dtype for found, part in held)
        or not is_tiling([there for _, there in boxes], shape)
    ):  # fmt: skip
        raise FileError(f"the slices of {what} do not make up {list(shape)}: {_ANOTHER}", path=path)
    return Tensor(held[0][1].dtype, shape, tuple(Piece(part, 0, there) for part, there in boxes))


def _part(what: str, found: _Slice, parts: Mapping[Place, Any], path: Path) -> Tensor:
    """Return what the rank of a slice holds."""
    assert found.place is not None
    expert, rank = found.place
    part = parts.get(found.place, parts.get((max(expert, 0), rank)))
    if not isinstance(part, Tensor) or part.shape != found.tensor.shape:
        held = list(part.shape) if isinstance(part, Tensor) else "nothing"
        raise FileError(
            f"tensor rank {rank} holds {held} of {what}, and the weights' slice has {list(found.tensor.shape)}: "
            f"{_ANOTHER}",
            path=path,
        )
    return part
