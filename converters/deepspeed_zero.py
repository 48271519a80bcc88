"""DeepSpeed ZeRO checkpoints of stages 1, 2 and 3, from any number of data-parallel ranks.

Stages 1 and 2 also with pipeline stages, tensor-parallel ranks and experts: each model-parallel rank has data-parallel
ranks of its own, which are put together first; then stages follow each other, slices are joined by DeepSpeed's patterns
(``foreign.deepspeed``), and the experts of expert-parallel ranks, ``r``, ``r + n``, ..., get their global numbers.

A tag folder (``global_step300``, ``pytorch_model``) holds one ``*_optim_states.pt`` per rank. Each has one flat tensor
per slot and group: the rank's share of the group's parameters, end to end. Where a parameter lies in it is written
down in stages 1 and 2 (``param_slice_mappings``, which knows of alignment, padding and round-robin order); in stage 3
every parameter is cut into equal shares, the last ones padded, in the order of ``param_shapes``. Nothing is copied
here: a parameter's slot is the list of its ranges in the rank files. The layouts are those of DeepSpeed's
``runtime/zero/stage_1_and_2.py``, ``runtime/zero/stage3.py`` and ``runtime/bf16_optimizer.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, zip_longest
from math import prod
from pathlib import Path
from typing import Any, Final, TypeAlias

from lora_state_format.errors import FileError, RefusedError
from lora_state_format.foreign import deepspeed, keyed, pickles, sub_partitions
from lora_state_format.foreign.masters import check_masters
from lora_state_format.foreign.pickles import Record
from lora_state_format.foreign.state_dict import from_state_dict
from lora_state_format.foreign.trees import member
from lora_state_format.foreign.weights import weights_at
from lora_state_format.io.files import FEW, Files, PooledFile, first_look, names_in, reading
from lora_state_format.model.dtypes import item_size
from lora_state_format.model.sources import Unread
from lora_state_format.model.states import Checkpoint, Value, scalar_of
from lora_state_format.model.tensors import Flat, Piece, Run, Tensor, contiguous
from lora_state_format.naming.names import peft_key
from lora_state_format.optimizers.roles import MASTER
from lora_state_format.registry import Match

NAME: Final = "deepspeed_zero"
DESCRIPTION: Final = "a DeepSpeed ZeRO folder: one zero_pp_rank_*_optim_states.pt per rank, or a 'latest' that names it"
OPTIONS: Final = {
    "masters": "keep the fp32 master weights as a slot 'master_param'",
    "slices": deepspeed.SLICES_OPTION,
}

_OPTIM: Final = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)(_\d+)?_optim_states\.pt")
_SUB_PARTITIONS: Final = "sub-partitions of DeepSpeed 0.3, whose masters prove which group a parameter is in"
_WAY_OUT: Final = "make a universal checkpoint of it with DeepSpeed's ds_to_universal.py and convert that"


def detect(path: Path) -> Match | None:
    if _OPTIM.fullmatch(path.name) and path.is_file():
        return Match("a ZeRO optimizer file of one rank", path)
    folder = deepspeed.tag_folder(path, _holds)
    if folder is None:
        return None
    count = sum(bool(_OPTIM.fullmatch(name)) for name in names_in(folder))
    return Match(f"{count} ZeRO optimizer file{'s' if count > 1 else ''}, one per rank", folder)


def _holds(folder: Path) -> bool:
    return any(map(_OPTIM.fullmatch, names_in(folder)))


@dataclass(frozen=True)
class _Rank:
    """What one rank's file holds: flat tensors and other values by group, the fp32 masters, the groups' options.

    Of DeepSpeed 0.3's ZeRO 1, one of its sub-partitions of each group. ``shapes`` are then those of the model's
    parameters in their order, none of a version that did not save them; ``padded`` is whether padding was saved.
    """

    path: Path
    stage: int
    states: Sequence[Mapping[str, Any]]
    masters: Sequence[Tensor]
    paddings: Sequence[int]
    options: Sequence[Mapping[str, Any]]
    slices: Sequence[Mapping[str, Any]]
    partitions: Sequence[int]
    shapes: Mapping[str, tuple[int, ...]] | None = None
    padded: bool = False


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Read the folder.

    Raises:
        FileError: files are missing, or not of one save.
        RefusedError: a layout that is not read; the message says what to do.
    """
    folder = match.path
    paths = _rank_files(folder)
    with reading(folder) as files:
        ranks = {mp: _flat_order([_rank(files[file]) for file in of]) for mp, of in paths.items()}
        _check_agreement([rank for of in ranks.values() for rank in of])
        for of in ranks.values():
            _check_copies(of)
        save = _save(folder, ranks, options, files)
        weights = deepspeed.weights(folder, save.trees, save.slices, files)
        laid_out = _proven(save, weights)
        skipped: tuple[str, ...] = ()
        if save.stage == 3:  # whose own files hold no weights
            laid_out, weights, skipped = _beside(laid_out, folder, files)
        return _checkpoint(save, laid_out, weights, options, files, skipped)


def glance(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Return what the folder holds by the names of all files and the first rank's file of each model-parallel rank.

    A folder of up to ``FEW`` ranks is read as a whole. The tensors of a larger one cannot be read, and
    ``origin["first_look"]`` says how many files were. Raises what ``read`` raises, for what is seen.
    """
    folder = match.path
    paths = _rank_files(folder)
    if sum(map(len, paths.values())) <= FEW:
        return read(match, options)
    with reading(folder) as files:
        first = {mp: _rank(files[of[0]]) for mp, of in paths.items()}
        if any(shares[0].shapes is not None for shares in first.values()):  # only all ranks together name their groups
            return read(match, options)
        ranks = {mp: [replace(first[mp][0], path=path) for path in of] for mp, of in paths.items()}
        _check_agreement([of[0] for of in ranks.values()])
        save = _save(folder, ranks, options, files, seen=False)
        laid_out = _Whole(*_whole(save, _unread), {"first_look": first_look(len(files), len(names_in(folder)))})
        return _checkpoint(save, laid_out, {}, options, files)


@dataclass(frozen=True)
class _Save:
    """All files of a save, by model-parallel rank, and how those make up the model."""

    folder: Path
    ranks: Mapping[int, Sequence[_Rank]]
    models: Mapping[int, _Model]
    stages: int
    slices: deepspeed.Slices

    @property
    def trees(self) -> dict[int, Mapping[str, Any]]:
        """What the model's files hold."""
        return {mp: model.tree for mp, model in self.models.items()}

    @property
    def stage(self) -> int:
        """The stage of ZeRO."""
        return self.ranks[0][0].stage


def _with_groups(
    folder: Path, ranks: Mapping[int, Sequence[_Rank]], models: Mapping[int, _Model], files: Files
) -> dict[int, _Model]:
    """Return the models with the groups of their parameters, as the masters prove them."""
    trees = {mp: model.tree for mp, model in models.items()}
    _, tensor = deepspeed.degrees(trees, folder)
    parts = deepspeed.local_weights(folder, trees, tensor, files)
    found = {}
    for mp, model in models.items():
        first = ranks[mp][0]
        own = {name: of.get(mp % tensor, of[min(of)]) for name, of in parts.items()}
        shapes = first.shapes or {name: weight.shape for name, weight in own.items()}
        masters = [[rank.masters[number] for rank in ranks[mp]] for number in range(len(first.masters))]
        groups = sub_partitions.grouped(masters, shapes, own, padded=first.padded, path=first.path)
        found[mp] = replace(model, groups=groups)
    return found


@dataclass(frozen=True)
class _Whole:
    """The state dict of all ranks together, with masters; the shapes of its parameters; what there is to say of it."""

    tree: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    said: Mapping[str, Value]


def _save(
    folder: Path, ranks: Mapping[int, Sequence[_Rank]], options: Mapping[str, Any], files: Files, *, seen: bool = True
) -> _Save:
    """Return what the ranks' files and the model's have to say; ``seen`` is whether tensors are there to be compared.

    Raises ``FileError`` where they do not agree.
    """
    models = {mp: _model(folder, mp, ranks[mp], files) for mp in ranks}
    for mp, model in models.items():
        _check_model(model.tree, model.groups, ranks[mp], model.path)
    if ranks[0][0].shapes is not None:
        models = _with_groups(folder, ranks, models, files)
    trees = {mp: model.tree for mp, model in models.items()}
    stages, tensor = deepspeed.degrees(trees, folder) if ranks[0][0].stage < 3 else (1, 1)
    slices = deepspeed.slices_of(tensor, trees[0], options.get("slices"), models[0].path, seen=seen)
    return _Save(folder, ranks, models, stages, slices)


def _proven(save: _Save, weights: Mapping[str, Tensor]) -> _Whole:
    """Return the state in the order that the masters prove: that of the files' mappings, or of ``param_shapes``.

    Raises:
        FileError: the masters are not the model's weights in either order.
    """
    if save.ranks[0][0].shapes is not None:
        return _compared(_Whole(*_whole(save, _cut_in_order), {"layout": _SUB_PARTITIONS}), weights, save.folder)
    found = _Whole(*_whole(save, _cut_stage3 if save.stage == 3 else _cut_stage12), {})
    try:
        return _compared(found, weights, save.folder)
    except FileError as error:
        if save.stage == 3:
            raise
        try:
            found = _compared(_Whole(*_whole(save, _cut_in_order), {}), weights, save.folder)
        except FileError:
            raise error from None
        layout = "param_shapes, as the masters prove: param_slice_mappings are those of another order"
        return replace(found, said={**found.said, "layout": layout})


def _beside(found: _Whole, folder: Path, files: Files) -> tuple[_Whole, dict[str, Tensor], tuple[str, ...]]:
    """Return the state compared with the weights in the folder above, those weights, and what there is to warn of.

    ``stage3_gather_16bit_weights_on_model_save`` and transformers' Trainer put them there. They may be of another step.
    """
    place = folder.parent
    try:
        held = weights_at(place, files)[0].tensors
    except FileNotFoundError:
        return found, {}, ()
    except FileError as error:
        return found, {}, (f"{error}; it was skipped",)
    weights = {
        name: held[key]
        for name, shape in found.shapes.items()
        for key in (name, *(peft_key(name) or ())[:1])
        if key in held and held[key].shape == shape
    }
    try:
        return _compared(found, weights, place), weights, ()
    except FileError:
        warning = (
            f"{place}: the weights in it are not what the fp32 masters in {folder.name} round to: either they are of "
            "another step, or files of ranks were exchanged; they were not used"
        )
        return found, {}, (warning,)


def _compared(found: _Whole, weights: Mapping[str, Tensor], folder: Path) -> _Whole:
    masters = {name: slots[MASTER] for name, slots in found.tree["state"].items()}
    return replace(found, said={**found.said, "masters_compared": check_masters(masters, weights, folder)})


def _checkpoint(
    save: _Save,
    laid_out: _Whole,
    weights: Mapping[str, Tensor],
    options: Mapping[str, Any],
    files: Files,
    skipped: tuple[str, ...] = (),
) -> Checkpoint:
    """Return the result, masters in it where they were asked for."""
    entries = laid_out.tree["state"]
    if not options.get("masters"):
        for slots in entries.values():
            del slots[MASTER]
    step = save.models[0].tree.get("global_steps")
    state = from_state_dict(
        laid_out.tree,
        origin={**_origin(save), **laid_out.said},
        global_step=step if isinstance(step, int) else None,
        resources=(files,),
    )
    tied = {alias: name for model in save.trees.values() for alias, name in _tied(model).items()}
    shapes = laid_out.shapes
    own = {name: weights[name] for name in entries if name in weights and weights[name].shape == shapes[name]}
    return Checkpoint(keyed.named(state, shapes=shapes, weights=weights, tied=tied), own, skipped=skipped)


@dataclass(frozen=True)
class _Model:
    """What a model-parallel rank's model file holds; ``groups`` are the names and shapes of its parameters by group."""

    path: Path
    tree: Mapping[str, Any]
    groups: Sequence[Mapping[str, tuple[int, ...]]]


def _model(folder: Path, mp: int, ranks: Sequence[_Rank], files: Files) -> _Model:
    path = folder / f"{'zero_pp_rank_0_' if ranks[0].stage == 3 else ''}mp_rank_{mp:02d}_model_states.pt"
    if not path.exists():
        raise FileError("missing: it has the parameters' names and shapes", path=path)
    tree = pickles.load(files[path], path).value
    if ranks[0].shapes is not None:
        return _Model(path, tree, [])
    shapes = member(tree, "param_shapes", list, path)
    return _Model(path, tree, [member(shapes, number, dict, path) for number in range(len(shapes))])


def _rank_files(folder: Path) -> dict[int, list[Path]]:
    """Return the files of each model-parallel rank in the order of its ranks; a gap between them is an error."""
    if folder.is_file():
        raise RefusedError(
            f"one rank's share of a ZeRO checkpoint: give the folder, {folder.parent.name}, which has all ranks' files",
            path=folder,
        )
    found: dict[int, dict[int, Path]] = {}
    for name in names_in(folder):
        if match := _OPTIM.fullmatch(name):
            file = folder / name
            if match[3]:
                raise RefusedError(f"written by DeepSpeed 0.3 or older: {_WAY_OUT}", path=file)
            rank, of = int(match[1]), found.setdefault(int(match[2]), {})
            if rank in of:
                raise FileError(f"a second file of rank {rank}, beside {of[rank].name}", path=file)
            of[rank] = file
    for of in found.values():
        for rank in range(len(of)):
            if rank not in of:
                name = re.sub(r"rank_\d+", f"rank_{rank}", next(iter(of.values())).name, count=1)
                raise FileError(f"missing: there are files of ranks {sorted(of)}", path=folder / name)
    if 0 not in found:
        raise FileError("missing: there are none of model-parallel rank 0", path=folder / "mp_rank_00_model_states.pt")
    return {mp: [of[rank] for rank in range(len(of))] for mp, of in sorted(found.items())}


def _whole(save: _Save, cut: _Cut) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Return the state dict of all model-parallel ranks together, masters too, and the shapes of its parameters."""
    folder, stages, slices = save.folder, save.stages, save.slices
    parts = {
        mp: _state_dict(save.ranks[mp], model.groups, model.path, cut, (mp % slices.count, slices.count))
        for mp, model in save.models.items()
    }
    entries: dict[str, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = [{**group, "params": []} for group in parts[0]["param_groups"]]
    for stage in range(stages):
        own = [parts[stage * slices.count + rank] for rank in range(slices.count)]
        for group, *of in zip(groups, *(part["param_groups"] for part in own), strict=True):
            if not of[0].get("moe") and any(other["params"] != of[0]["params"] for other in of):
                raise FileError(f"the tensor-parallel ranks of stage {stage} have different parameters", path=folder)
            for name, held in _held(of, own):
                if name in entries and name.startswith("tied_modules."):
                    continue  # two stages hold it, and step it alike
                if name in entries:
                    raise FileError(f"two stages have a parameter '{name}'", path=folder)
                group["params"].append(name)
                entries[name] = {
                    slot: slices.join(name, [slots[slot] for slots in held]) if isinstance(value, Tensor) else value
                    for slot, value in held[0].items()
                }
    shapes = {name: slots[MASTER].shape for name, slots in entries.items()}
    return {"state": entries, "param_groups": groups}, shapes


def _held(
    groups: Sequence[Mapping[str, Any]], parts: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield each parameter of a group, and its slots on the tensor-parallel ranks: of an expert's, on the one with it.

    Expert-parallel ranks follow each other as all ranks do, so tensor-parallel ranks have different experts.
    """
    if groups[0].get("moe"):
        for group, part in zip(groups, parts, strict=True):
            yield from ((name, [part["state"][name]]) for name in group["params"])
    else:
        yield from ((name, [part["state"][name] for part in parts]) for name in groups[0]["params"])


def _flat_order(files: Sequence[Sequence[_Rank]]) -> list[_Rank]:
    """Return the shares of all ranks' files in the order in which they make up the groups.

    Raises ``FileError`` where files have different numbers of them.
    """
    for shares in files:
        if len(shares) != len(files[0]):
            raise FileError(
                f"has {len(shares)} sub-partitions of each group, where {files[0][0].path.name} has {len(files[0])}",
                path=shares[0].path,
            )
    return [share for interval in zip(*files, strict=True) for share in interval]


def _rank(file: PooledFile) -> list[_Rank]:
    """Return what a rank's file holds: one share of the groups, or the sub-partitions of DeepSpeed 0.3's ZeRO 1."""
    path = file.path
    whole = pickles.load(file, path).value
    tree = member(whole, "optimizer_state_dict", dict, path)
    stage = tree.get("zero_stage", 1)
    if isinstance(stage, Record):
        stage = stage.args[0] if stage.args else stage.state
    if stage not in (1, 2, 3):
        raise RefusedError(f"ZeRO stage {stage!r}; stages 1, 2 and 3 are read", path=path)
    if "local_sub_partitions_of_fp32_groups" in tree:
        return _sub_partitions(whole, tree, path)
    return [_share(tree, stage, path)]


def _sub_partitions(whole: Mapping[str, Any], tree: Mapping[str, Any], path: Path) -> list[_Rank]:
    found, options = sub_partitions.intervals(tree, path)
    shapes = member(whole, "param_shapes", dict, path) if "param_shapes" in whole else {}
    padded = "num_comm_intervals_per_group" not in tree
    count = [] if padded else [member(tree, "partition_count", int, path)]
    return [
        _Rank(path, 1, part.states, part.masters, [0] * len(part.masters), options, [], count, shapes, padded)
        for part in found
    ]


def _share(tree: Mapping[str, Any], stage: int, path: Path) -> _Rank:
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
    if stage == 3 and any(group.get("moe") for group in groups):
        raise RefusedError("groups of experts in stage 3: load it in DeepSpeed and save it with stage 2", path=path)
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


def _check_model(model: Mapping[str, Any], groups: Sequence[Any], ranks: Sequence[_Rank], path: Path) -> None:
    """Check that the model's file and the ranks' agree on how many ranks and groups there were."""
    first, count = ranks[0], _files(ranks)
    if first.shapes is None and len(groups) != len(first.states):
        raise FileError(f"names {len(groups)} groups of parameters; the ranks hold {len(first.states)}", path=path)
    for number, partitions in enumerate(first.partitions):
        experts = number < len(first.options) and first.options[number].get("moe")
        if partitions < 1 or (count % partitions if experts else partitions != count):
            raise FileError(f"says the state was cut over {partitions} ranks; there are {count} files", path=first.path)
    world = model.get("dp_world_size")
    if world not in (None, count):
        raise FileError(f"says there were {world} ranks; there are optimizer files of {count}", path=path)


def _files(ranks: Sequence[_Rank]) -> int:
    return len({rank.path for rank in ranks})


def _state_dict(
    ranks: Sequence[_Rank], named: Sequence[Mapping[str, Any]], model_file: Path, cut: _Cut, place: tuple[int, int]
) -> dict[str, Any]:
    """Return the state dict that one rank would have had, masters too, with names for ids.

    ``cut`` takes the parameters of a group out of the ranks' flat tensors; ``place`` is which of how many
    tensor-parallel ranks these are.
    """
    first = ranks[0]
    entries: dict[str, dict[str, Any]] = {}
    members: list[list[str]] = []
    for number, shapes in enumerate(named):
        moe = number < len(first.options) and first.options[number].get("moe")
        parallel = len(ranks) // first.partitions[number] if moe else 1
        members.append([])
        for expert_rank in range(parallel):
            own = ranks[expert_rank::parallel]
            flat, common = _split(own, number)
            for local, slots in cut(own, number, shapes, flat, model_file.parent):
                rank = expert_rank * place[1] + place[0]
                name = deepspeed.global_expert(local, rank, deepspeed.local_experts(list(shapes)))
                if name in entries:
                    raise FileError(f"names parameter '{name}' twice", path=model_file)
                entries[name] = {**common, **slots}
                members[-1].append(name)
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


def _origin(save: _Save) -> dict[str, Value]:
    version = save.models[0].tree.get("ds_version")
    origin: dict[str, Value] = {"format": NAME, "stage": save.stage, "ranks": sum(map(_files, save.ranks.values()))}
    if save.stages * save.slices.count > 1:
        origin |= {"pipeline_stages": save.stages, "tensor_parallel": save.slices.count}
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


def _check_copies(ranks: Sequence[_Rank]) -> None:
    """Raise ``FileError`` where two ranks hold the very same masters: each has a share of its own, or but padding."""
    seen: dict[tuple[object, ...], _Rank] = {}
    for rank in ranks:
        sums = tuple((piece.source.crc32, master.shape) for master in rank.masters for piece in master.pieces)
        if not sums or any(crc is None for crc, _ in sums):
            continue
        other = seen.setdefault(sums, rank)
        if other is not rank and any(any(chunk) for master in rank.masters for chunk in master.chunks()):
            raise FileError(f"holds the fp32 masters of {other.path.name}: one is a copy of the other", path=rank.path)


def _plain(groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Everything that is no flat tensor, in a form that can be compared."""
    for group in groups:
        for key, value in group.items():
            if not isinstance(value, Tensor):
                yield key, value
            elif not value.shape:
                yield key, scalar_of(value).item()
            else:
                yield key, value.dtype


def _split(ranks: Sequence[_Rank], number: int) -> tuple[dict[str, list[Tensor]], dict[str, Any]]:
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
    flat[MASTER] = [rank.masters[number] for rank in ranks]
    return flat, other


def _cut_stage12(
    ranks: Sequence[_Rank], number: int, named: Mapping[str, Any], flat: Mapping[str, Sequence[Tensor]], folder: Path
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for rank in ranks:
        _check_apart(member(rank.slices, number, dict, rank.path), rank.path)
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


def _cut_in_order(
    ranks: Sequence[_Rank], number: int, named: Mapping[str, Any], flat: Mapping[str, Sequence[Tensor]], folder: Path
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Take parameters of stages 1 and 2 as they stand in the group's shapes, whatever ``param_slice_mappings`` says.

    With ``round_robin_gradients``, DeepSpeed (seen with 0.19.8) writes the mappings of the order that it had before
    (``_link_all_hp_params`` in ``stage_1_and_2.py``).
    """
    ends = list(accumulate(rank.masters[number].count for rank in ranks))
    left = ends[-1] - sum(map(prod, named.values()))
    if left and not (left > 0 and ranks[0].padded):
        raise FileError(
            f"the ranks hold {ends[-1]} elements of group {number}, and its parameters have others", path=folder
        )
    start = 0
    for name, shape in named.items():
        cuts, stop = [], start + prod(shape)
        for index, end in enumerate(ends):
            begin = ends[index - 1] if index else 0
            if start < end and begin < stop:
                cuts.append((index, max(start, begin) - begin, min(stop, end) - max(start, begin)))
        yield name, {slot: _joined(tensors, cuts, shape, ranks) for slot, tensors in flat.items()}
        start = stop


def _check_apart(addresses: Mapping[str, Any], path: Path) -> None:
    """Raise ``FileError`` for two parameters in one place of a rank's share."""
    spans = sorted(
        (member(a.state, "start", int, path), member(a.state, "numel", int, path), name)
        for name, a in addresses.items()
        if isinstance(a, Record)
    )
    for (start, count, name), (following, _, other) in pairwise(spans):
        if start + count > following:
            raise FileError(f"places '{other}' at {following}, inside '{name}' ({start} to {start + count})", path=path)


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


def _unread(
    ranks: Sequence[_Rank], number: int, named: Mapping[str, Any], flat: Mapping[str, Sequence[Tensor]], folder: Path
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the parameters with their dtypes and shapes only; the ranks are the first one, as often as there are."""
    for name, shape in named.items():
        yield name, {slot: contiguous(of[0].dtype, shape, Unread(folder)) for slot, of in flat.items()}


_Cut: TypeAlias = Callable[
    [Sequence[_Rank], int, Mapping[str, Any], Mapping[str, Sequence[Tensor]], Path],
    Iterator[tuple[str, dict[str, Tensor]]],
]
"""Takes a group's parameters out of its flat tensors: ranks, the group's number, shapes by name, tensors, folder."""


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
