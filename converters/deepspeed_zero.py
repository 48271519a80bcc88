"""DeepSpeed ZeRO checkpoints of stages 1, 2 and 3, from any number of data-parallel ranks.

A tag folder (``global_step300``, ``pytorch_model``) holds one ``*_optim_states.pt`` per rank. Each has one flat tensor
per slot and group: the rank's share of the group's parameters, end to end. Where a parameter lies in it is written
down in stages 1 and 2 (``param_slice_mappings``, which knows of alignment, padding and round-robin order); in stage 3
every parameter is cut into equal shares, the last ones padded, in the order of ``param_shapes``. Nothing is copied
here: a parameter's slot is the list of its ranges in the rank files. The layouts are those of DeepSpeed's
``runtime/zero/stage_1_and_2.py``, ``runtime/zero/stage3.py`` and ``runtime/bf16_optimizer.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, RefusedError
from lora_state_format.foreign import keyed, pickles
from lora_state_format.foreign.pickles import Record
from lora_state_format.foreign.state_dict import from_state_dict
from lora_state_format.foreign.trees import member
from lora_state_format.io.files import PooledFile, is_plain, reading
from lora_state_format.model.dtypes import item_size
from lora_state_format.model.states import Checkpoint, Scalar, Value
from lora_state_format.model.tensors import Flat, Piece, Run, Tensor
from lora_state_format.registry import Match

NAME: Final = "deepspeed_zero"
DESCRIPTION: Final = "a DeepSpeed ZeRO folder: one zero_pp_rank_*_optim_states.pt per rank, or a 'latest' that names it"
OPTIONS: Final = {"masters": "keep the fp32 master weights as a slot 'master_param'"}

_OPTIM: Final = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)(_\d+)?_optim_states\.pt")
_EXPERTS: Final = re.compile(r"expp_rank_\d+_mp_rank_\d+_optim_states\.pt|layer_\d+_expert_.*_model_states\.pt")
_WAY_OUT: Final = "make a universal checkpoint of it with DeepSpeed's ds_to_universal.py and convert that"


def detect(path: Path) -> Match | None:
    folder = _tag_folder(path)
    if folder is None:
        return None
    count = sum(bool(_OPTIM.fullmatch(file.name)) for file in folder.iterdir())
    return Match(f"{count} ZeRO optimizer file{'s' if count > 1 else ''}, one per rank", folder)


def _tag_folder(path: Path) -> Path | None:
    """Return the folder of the rank files: the path itself, the one ``latest`` names, or the only one in it."""
    if not path.is_dir():
        return None
    latest = path / "latest"
    inner = []
    if latest.is_file() and latest.stat().st_size < 1024:
        tag = latest.read_text(errors="replace").strip()
        inner = [path / tag] if is_plain(tag) else []
    elif len(folders := [entry for entry in path.iterdir() if entry.is_dir() and _holds(entry)]) == 1:
        inner = folders
    return next((folder for folder in (path, *inner) if _holds(folder)), None)


def _holds(folder: Path) -> bool:
    return folder.is_dir() and any(_OPTIM.fullmatch(file.name) for file in folder.iterdir())


@dataclass(frozen=True)
class _Rank:
    """What one rank's file holds: flat tensors and other values by group, the fp32 masters, the groups' options."""

    path: Path
    stage: int
    states: Sequence[Mapping[str, Any]]
    masters: Sequence[Tensor]
    paddings: Sequence[int]
    options: Sequence[Mapping[str, Any]]
    slices: Sequence[Mapping[str, Any]]
    partitions: Sequence[int]


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    folder = match.path
    with reading() as files:
        ranks = [_rank(files[file]) for file in _rank_files(folder)]
        model_file = folder / f"{'zero_pp_rank_0_' if ranks[0].stage == 3 else ''}mp_rank_00_model_states.pt"
        if not model_file.exists():
            raise FileError("missing: it has the parameters' names and shapes", path=model_file)
        model = pickles.load(files[model_file], model_file).value
        shapes = member(model, "param_shapes", list, model_file)
        _check_agreement(ranks)
        _check_model(model, shapes, ranks, model_file)
        named = [member(shapes, number, dict, model_file) for number in range(len(shapes))]
        state = from_state_dict(
            _state_dict(ranks, named, model_file, bool(options.get("masters"))),
            origin=_origin(ranks, model),
            global_step=step if isinstance(step := model.get("global_steps"), int) else None,
            resources=(files,),
        )
        shape_of = {name: shape for group in named for name, shape in group.items()}
        module = model.get("module")
        weights = {k: v for k, v in module.items() if isinstance(v, Tensor)} if isinstance(module, dict) else {}
        return Checkpoint(
            keyed.named(state, shapes=shape_of, weights=weights, tied=_tied(model)),
            weights={name: tensor for name, tensor in weights.items() if tensor.shape == shape_of.get(name)},
        )


def _rank_files(folder: Path) -> list[Path]:
    """Return the ranks' files, in the order of their ranks; a gap between them is an error."""
    found: dict[int, Path] = {}
    for file in sorted(folder.iterdir()):
        if _EXPERTS.fullmatch(file.name):
            raise RefusedError(f"state of experts (MoE), which ranks hold differently: {_WAY_OUT}", path=file)
        if not (match := _OPTIM.fullmatch(file.name)):
            continue
        if int(match[2]) or match[3]:
            raise RefusedError(f"written by a tensor- or pipeline-parallel run: {_WAY_OUT}", path=file)
        if int(match[1]) in found:
            raise FileError(f"a second file of rank {int(match[1])}, beside {found[int(match[1])].name}", path=file)
        found[int(match[1])] = file
    for rank in range(len(found)):
        if rank not in found:
            name = re.sub(r"rank_\d+", f"rank_{rank}", next(iter(found.values())).name, count=1)
            raise FileError(f"missing: there are files of ranks {sorted(found)}", path=folder / name)
    return [found[rank] for rank in range(len(found))]


def _rank(file: PooledFile) -> _Rank:
    path = file.path
    tree = member(pickles.load(file, path).value, "optimizer_state_dict", dict, path)
    stage = tree.get("zero_stage", 1)
    if isinstance(stage, Record):
        stage = stage.args[0] if stage.args else stage.state
    if stage not in (1, 2, 3):
        raise RefusedError(f"ZeRO stage {stage!r}; stages 1, 2 and 3 are read", path=path)
    if stage == 3:
        if "ds_zero_partition_groups" in tree:
            raise RefusedError(f"parameters are cut over groups of ranks of different sizes: {_WAY_OUT}", path=path)
        base = member(tree, "optimizer_state_dict", dict, path)
        masters = member(tree, "fp32_flat_groups", list, path)
    else:
        base = member(tree, "base_optimizer_state", (dict, list), path)
        masters = member(tree, "single_partition_of_fp32_groups", list, path)
    slices = member(tree, "param_slice_mappings", list, path) if stage < 3 else []
    if isinstance(base, list):  # an elastic checkpoint: the groups' states only, and without their padding
        step = {"step": tree["base_optimizer_state_step"]} if "base_optimizer_state_step" in tree else {}
        states: Any = base
        groups = [{"params": [number], **step} for number in range(len(base))]
    else:
        states = member(base, "state", dict, path)
        groups = [member({"group": group}, "group", dict, path) for group in member(base, "param_groups", list, path)]
    if any(group.get("moe") for group in groups):
        raise RefusedError(f"groups of experts (MoE), which ranks hold differently: {_WAY_OUT}", path=path)
    count = member(tree, "partition_count", (int, list), path)
    return _Rank(
        path,
        stage,
        [member(states, number, dict, path) for number in range(len(masters))],
        [member(masters, number, Tensor, path) for number in range(len(masters))],
        tree.get("group_paddings") or [0] * len(masters),
        groups,
        slices,
        count if isinstance(count, list) else [count],
    )


def _check_model(model: Mapping[str, Any], shapes: list[Any], ranks: Sequence[_Rank], path: Path) -> None:
    """Check that the model's file and the ranks' agree on how many ranks and groups there were."""
    for partitions in ranks[0].partitions:
        if partitions != len(ranks):
            raise FileError(
                f"says the state was cut over {partitions} ranks; there are {len(ranks)} files", path=ranks[0].path
            )
    world = model.get("dp_world_size")
    if world not in (None, len(ranks)):
        raise FileError(f"says there were {world} ranks; there are optimizer files of {len(ranks)}", path=path)
    if len(shapes) != len(ranks[0].states):
        raise FileError(f"names {len(shapes)} groups of parameters; the ranks hold {len(ranks[0].states)}", path=path)


def _state_dict(
    ranks: Sequence[_Rank], named: Sequence[Mapping[str, Any]], model_file: Path, masters: bool
) -> dict[str, Any]:
    """Return the state dict that one rank would have had, with names for ids."""
    first = ranks[0]
    entries: dict[str, dict[str, Any]] = {}
    for number, shapes in enumerate(named):
        flat, common = _split(ranks, number, masters)
        cut = _cut_stage3 if first.stage == 3 else _cut_stage12
        for name, slots in cut(ranks, number, shapes, flat, model_file.parent):
            if name in entries:
                raise FileError(f"names parameter '{name}' twice", path=model_file)
            entries[name] = {**common, **slots}
    members = [list(shapes) for shapes in named]
    groups = []
    for group in first.options:
        numbers = member(group, "params", list, first.path)
        names = [name for number in numbers for name in member(members, number, list, first.path)]
        # Apex's and older fused optimizers count steps by group.
        if "step" in group and not any("step" in entries[name] for name in names):
            for name in names:
                entries[name] = {"step": group["step"], **entries[name]}
        options = {key: value for key, value in group.items() if key not in ("params", "step")}
        groups.append({**options, "params": names})
    return {"state": entries, "param_groups": groups}


def _origin(ranks: Sequence[_Rank], model: Mapping[str, Any]) -> dict[str, Value]:
    version = model.get("ds_version")
    origin: dict[str, Value] = {"format": NAME, "stage": ranks[0].stage, "ranks": len(ranks)}
    return {**origin, "deepspeed": version} if isinstance(version, str) else origin


def _tied(model: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Other names of a parameter, by the name that its state stands under."""
    tied: dict[str, tuple[str, ...]] = {}
    shared = model.get("shared_params")
    for alias, holder in shared.items() if isinstance(shared, dict) else ():
        tied[holder] = (*tied.get(holder, ()), alias)
    return tied


def _check_agreement(ranks: Sequence[_Rank]) -> None:
    """Files of one checkpoint have the same stage, options and steps; anything else is a mixture of several."""
    first = ranks[0]
    for rank in ranks[1:]:
        for what in ("stage", "partitions"):
            ours, theirs = getattr(first, what), getattr(rank, what)
            if ours != theirs:
                raise FileError(f"has {what} {theirs}, where {first.path.name} has {ours}", path=rank.path)
        if len(rank.states) != len(first.states) or len(rank.options) != len(first.options):
            raise FileError(
                f"has {len(rank.states)} groups, where {first.path.name} has {len(first.states)}", path=rank.path
            )
        mine, other = ([*_plain(r.states), *_plain(r.options)] for r in (first, rank))
        for (key, ours), (found, theirs) in zip_longest(mine, other, fillvalue=("nothing", None)):
            if (key, ours) != (found, theirs):
                raise FileError(
                    f"'{found}' is {theirs!r}, where {first.path.name} has {ours!r}: files of different steps",
                    path=rank.path,
                )


def _plain(groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Everything that is no flat tensor, in a form that can be compared."""
    for group in groups:
        for key, value in group.items():
            if not isinstance(value, Tensor):
                yield key, value
            elif not value.shape:
                yield key, _number(value)
            else:
                yield key, value.dtype


def _number(tensor: Tensor) -> Any:
    return Scalar(tensor.dtype, bytes(tensor.bytes())).item()


def _split(ranks: Sequence[_Rank], number: int, masters: bool) -> tuple[dict[str, list[Tensor]], dict[str, Any]]:
    """Return a group's slots: the ranks' flat tensors by slot, and what is the same for all of its parameters."""
    flat, other = {}, {}
    for slot, value in ranks[0].states[number].items():
        if not isinstance(value, Tensor) or not value.shape:
            other[slot] = value
            continue
        flat[slot] = [member(rank.states[number], slot, Tensor, rank.path) for rank in ranks]
        for rank, tensor in zip(ranks, flat[slot], strict=True):
            size = rank.masters[number].count
            padding = rank.paddings[number] if number < len(rank.paddings) else 0
            if len(tensor.shape) != 1 or tensor.count not in (size, size + padding):
                raise RefusedError(
                    f"slot '{slot}' has shape {list(tensor.shape)} for {size} elements: only state "
                    "with one value per element can be told apart by parameter",
                    path=rank.path,
                )
    if masters:
        flat["master_param"] = [rank.masters[number] for rank in ranks]
    return flat, other


def _cut_stage12(
    ranks: Sequence[_Rank], number: int, named: Mapping[str, Any], flat: Mapping[str, Sequence[Tensor]], folder: Path
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for name, shape in named.items():
        cuts = []
        for index, rank in enumerate(ranks):
            address = member(rank.slices, number, dict, rank.path).get(name)
            if address is not None:
                values = address.state if isinstance(address, Record) else None
                cuts.append((index, member(values, "start", int, rank.path), member(values, "numel", int, rank.path)))
        held = sum(count for *_, count in cuts)
        if held != prod(shape):
            raise FileError(f"the rank files hold {held} of the {prod(shape)} elements of '{name}'", path=folder)
        yield name, {slot: _joined(tensors, cuts, shape, ranks) for slot, tensors in flat.items()}


def _cut_stage3(
    ranks: Sequence[_Rank], number: int, named: Mapping[str, Any], flat: Mapping[str, Sequence[Tensor]], folder: Path
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    start = 0
    for name, shape in named.items():
        count = prod(shape)
        share = -(-count // len(ranks))
        cuts = [(index, start, max(0, min(share, count - index * share))) for index in range(len(ranks))]
        yield name, {slot: _joined(tensors, cuts, shape, ranks) for slot, tensors in flat.items()}
        start += share
    for rank in ranks:
        size = rank.masters[number].count
        if size != start:
            raise FileError(
                f"group {number} has {size} elements, where {len(named)} parameters cut over {len(ranks)} ranks have "
                f"{start}: another number of ranks wrote it",
                path=rank.path,
            )


def _joined(
    tensors: Sequence[Tensor], cuts: Sequence[tuple[int, int, int]], shape: Sequence[int], ranks: Sequence[_Rank]
) -> Tensor:
    """Return one parameter's slot out of the ranks' flat tensors. A cut is a rank, a start and a count, in elements."""
    pieces, position = [], 0
    for index, start, count in cuts:
        tensor = tensors[index]
        if start < 0 or count < 0 or start + count > tensor.count:
            raise FileError(
                f"holds {tensor.count} elements where {start + count} are addressed", path=ranks[index].path
            )
        if count:
            run = tensor.runs[0] if tensor.runs and len(tensor.runs) == 1 else Run(tensor, 0, tensor.size)
            pieces.append(Piece(run.source, run.offset + start * item_size(tensor.dtype), Flat(position, count)))
            position += count
    return Tensor(tensors[0].dtype, tuple(shape), tuple(pieces))
