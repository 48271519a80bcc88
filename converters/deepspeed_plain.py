"""DeepSpeed checkpoints without ZeRO: ``mp_rank_NN_model_states.pt`` holds the optimizer, ``expp_rank_*`` with experts.

Each model-parallel rank has the whole state of its own parameters under ids: of its pipeline stage, or of its slices.
Stages follow each other; slices are joined by DeepSpeed's patterns (``foreign.deepspeed``). With experts, the state of
a stage that has some lies in one file per expert-parallel rank: all hold the dense parameters, and each its own
experts. The optimizer's class and its groups are DeepSpeed's own state dict; names are those of the model's files, in
their order, which is the order of ``parameters()``, where the optimizer has one group, or one and the experts'.
Otherwise only sizes are known, and names have to be given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Final, cast

from lora_state_format.errors import FileError, RefusedError
from lora_state_format.foreign import deepspeed, pickles
from lora_state_format.foreign.deepspeed import EXPERT, MODEL, Slices
from lora_state_format.foreign.masters import SAMPLE, elements
from lora_state_format.foreign.state_dict import from_state_dict, is_state_dict
from lora_state_format.io.files import Files, names_in, reading
from lora_state_format.model.states import Checkpoint, Value
from lora_state_format.model.tensors import Tensor
from lora_state_format.registry import Match

NAME: Final = "deepspeed_plain"
DESCRIPTION: Final = "a DeepSpeed folder without ZeRO: mp_rank_*_model_states.pt, expp_rank_*_optim_states.pt"
OPTIONS: Final = {"slices": deepspeed.SLICES_OPTION}

_EXPERT_RANK: Final = re.compile(r"expp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


def detect(path: Path) -> Match | None:
    if path.is_file():
        rank = _EXPERT_RANK.fullmatch(path.name) or (MODEL.fullmatch(path.name) and _others(path))
        return Match("a DeepSpeed file of one rank", path) if rank else None
    folder = deepspeed.tag_folder(path, _holds)
    return Match("mp_rank_*_model_states.pt without ZeRO files", folder) if folder else None


def _holds(folder: Path) -> bool:
    names = names_in(folder)
    return any(map(MODEL.fullmatch, names)) and not any("zero" in name and name != "zero_to_fp32.py" for name in names)


def _others(path: Path) -> bool:
    """Whether files of other ranks, pipeline layers or experts lie next to a model's file."""
    names = (file.name for file in path.parent.iterdir() if file != path)
    return any(p.fullmatch(name) for name in names for p in (MODEL, deepspeed.LAYER, EXPERT, _EXPERT_RANK))


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Read the folder.

    Raises:
        FileError: files are missing, or not of one save.
        RefusedError: one rank's file alone, or a layout that is not read.
    """
    folder = match.path
    if folder.is_file():
        raise RefusedError(
            f"one rank's file of a DeepSpeed checkpoint: give the folder, {folder.parent.name}, which has those of all "
            "ranks",
            path=folder,
        )
    with reading() as files:
        paths = {int(m[1]): folder / name for name in names_in(folder) if (m := MODEL.fullmatch(name))}
        models = {mp: pickles.load(files[path], path).value for mp, path in paths.items()}
        for mp, model in models.items():
            if not isinstance(model, dict):
                raise FileError("is not the dict that DeepSpeed writes", path=paths[mp])
        stages, tensor = deepspeed.degrees(models, folder)
        slices = deepspeed.slices_of(tensor, models[min(models)], options.get("slices"), paths[min(paths)])
        weights = deepspeed.weights(folder, models, slices, files)
        if any(map(_EXPERT_RANK.fullmatch, names_in(folder))):
            tree, names = _stages_with_experts(folder, models, paths, slices, files)
        else:
            trees = {mp: _dense(_optimizer(model, paths[mp]), mp, folder) for mp, model in models.items()}
            tree, names = _stages(trees, weights, stages, slices, folder)
        first = models[min(models)]
        origin: dict[str, Value] = {"format": NAME}
        if stages * tensor > 1:
            origin |= {"pipeline_stages": stages, "tensor_parallel": tensor}
        if isinstance(version := first.get("ds_version"), str):
            origin["deepspeed"] = version
        step = first.get("global_steps")
        state = from_state_dict(
            tree, origin=origin, global_step=step if isinstance(step, int) else None, resources=(files,)
        )
        return Checkpoint(state if names is None else replace(state, names=tuple(names)), weights)


def _optimizer(model: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return the optimizer's state dict in a file."""
    tree = model.get("optimizer")
    if not is_state_dict(tree):
        what = "an optimizer of DeepSpeed's fp16 wrapper" if isinstance(tree, dict) else "no optimizer's state dict"
        raise RefusedError(
            f"holds {what}, where 'state' and 'param_groups' are expected: save with ZeRO stage 1, which is read",
            path=path,
        )
    return cast("Mapping[str, Any]", tree)


def _dense(tree: Mapping[str, Any], mp: int, folder: Path) -> Mapping[str, Any]:
    """Return the state dict in a model's file. Raises ``FileError`` where the experts in it are those of one rank."""
    if any(group.get("moe") for group in tree["param_groups"]):
        name = f"expp_rank_0_mp_rank_{mp:02d}_optim_states.pt"
        raise FileError("missing: the experts of all ranks lie in files of such names", path=folder / name)
    return tree


def _stages(
    trees: Mapping[int, Mapping[str, Any]], weights: Mapping[str, Tensor], stages: int, slices: Slices, folder: Path
) -> tuple[dict[str, Any], list[str] | None]:
    """Return the state dict of all ranks together, and its parameters' names where their order is known."""
    groups = [{**group, "params": []} for group in trees[0]["param_groups"]]
    state: dict[int, Any] = {}
    names: list[str] | None = list(weights) if len(groups) == 1 else None
    count = 0
    _check_alike(trees, folder)
    for number, group in enumerate(groups):
        for stage in range(stages):
            own = [trees[stage * slices.count + rank] for rank in range(slices.count)]
            for ids in zip(*(tree["param_groups"][number]["params"] for tree in own), strict=True):
                held = [tree["state"].get(identity) for tree, identity in zip(own, ids, strict=True)]
                if slices.count > 1:
                    held = [_joined(held, names, count, slices, folder)]
                if held[0] is not None:
                    state[count] = held[0]
                group["params"].append(count)
                count += 1
    if names is not None and len(names) != count:
        names = None
    return {"state": state, "param_groups": groups}, names


def _joined(held: Sequence[Any], names: Sequence[str] | None, number: int, slices: Slices, folder: Path) -> Any:
    if names is None or number >= len(names):
        raise RefusedError(
            "slices of tensor-parallel ranks are joined by their names, and the optimizer has several groups, or other "
            "parameters than the model: save with ZeRO stage 1, whose files have names",
            path=folder,
        )
    if held[0] is None:
        return None
    return {
        slot: slices.join(names[number], [slots[slot] for slots in held]) if isinstance(value, Tensor) else value
        for slot, value in held[0].items()
    }


def _check_alike(trees: Mapping[int, Mapping[str, Any]], folder: Path) -> None:
    """Raise ``FileError`` for ranks with other options or steps than the first has."""
    first, *rest = ((_options(tree), _steps(tree)) for tree in trees.values())
    for mp, (groups, steps) in zip(list(trees)[1:], rest, strict=True):
        if groups != first[0] or steps != first[1]:
            raise _other("options" if groups != first[0] else "steps", mp, folder)


def _options(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in tree["param_groups"]]


def _steps(tree: Mapping[str, Any]) -> set[bytes]:
    return {bytes(step.bytes()) for slots in tree["state"].values() if isinstance(step := slots.get("step"), Tensor)}


def _other(what: str, mp: int, folder: Path, than: int = 0) -> FileError:
    return FileError(
        f"model-parallel rank {mp} has other {what} than rank {than}: files of different saves", path=folder
    )


# --- experts ------------------------------------------------------------------------------------------------------


def _stages_with_experts(
    folder: Path, models: Mapping[int, Mapping[str, Any]], paths: Mapping[int, Path], slices: Slices, files: Files
) -> tuple[dict[str, Any], list[str] | None]:
    """Return the state dict of all stages together, and its parameters' names where they are known.

    A stage without experts has its state in the model's file, and its weights in those of its layers.
    """
    matches = filter(None, map(_EXPERT_RANK.fullmatch, names_in(folder)))
    with_experts = {int(match[2]) // slices.count: match[0] for match in matches}
    if (most := max(with_experts)) * slices.count >= len(models):
        raise FileError(
            f"is of a rank beyond the {len(models)} that wrote the folder", path=folder / with_experts[most]
        )
    layers = deepspeed.weights(folder, {}, slices, files)
    left = iter(layers)
    parts: list[tuple[Mapping[str, Any], list[str] | None]] = []
    for stage in range(len(models) // slices.count):
        own = {stage * slices.count + rank: models[stage * slices.count + rank] for rank in range(slices.count)}
        mp = min(own)
        if stage in with_experts:
            found = deepspeed.weights(folder, own, slices, files, layers=False)
            weights = {name: weight for name, weight in found.items() if name not in layers}
            parts.append(_with_experts(folder, stage, models[mp], weights, slices, files))
        else:
            tree = _dense(_optimizer(models[mp], paths[mp]), mp, folder)
            count = sum(len(group["params"]) for group in tree["param_groups"])
            own_layers = list(islice(left, count))
            parts.append((tree, own_layers if len(tree["param_groups"]) == 1 else None))
    return _together(parts, folder)


def _together(
    parts: Sequence[tuple[Mapping[str, Any], Sequence[str] | None]], folder: Path
) -> tuple[dict[str, Any], list[str] | None]:
    """Return one state dict of those of all stages, group by group; one without experts lacks their group."""
    all_options = [_options(tree) for tree, _ in parts]
    most = max(range(len(parts)), key=lambda mp: len(all_options[mp]))
    options = all_options[most]
    held: list[list[tuple[Any, str | None]]] = [[] for _ in options]
    for mp, (tree, names) in enumerate(parts):
        if _steps(tree) != _steps(parts[0][0]):
            raise _other("steps", mp, folder)
        left, named = list(range(len(options))), iter(names or ())
        for group, chosen in zip(tree["param_groups"], all_options[mp], strict=True):
            number = next((number for number in left if options[number] == chosen), None)
            if number is None:
                raise _other("options", mp, folder, most)
            left.remove(number)
            held[number] += [(tree["state"].get(identity), next(named, None)) for identity in group["params"]]
    listed = [entry for of in held for entry in of]
    ids = iter(range(len(listed)))
    groups = [{**chosen, "params": [next(ids) for _ in of]} for chosen, of in zip(options, held, strict=True)]
    state = {number: slots for number, (slots, _) in enumerate(listed) if slots is not None}
    found = [name for _, name in listed if name is not None]
    return {"state": state, "param_groups": groups}, found if len(found) == len(listed) else None


def _with_experts(
    folder: Path, stage: int, model: Mapping[str, Any], weights: Mapping[str, Tensor], slices: Slices, files: Files
) -> tuple[dict[str, Any], list[str] | None]:
    """Return the state dict of all expert-parallel ranks together, and its parameters' names where they are known.

    Both, and ``weights``, are of one pipeline stage.
    """
    paths = _expert_ranks(folder, stage, slices.count)
    trees = {rank: _optimizer(pickles.load(files[path], path).value, path) for rank, path in paths.items()}
    _check_alike(trees, folder)
    of_experts = [name for name in weights if ".deepspeed_experts." in name]
    experts = deepspeed.local_experts(of_experts)
    _check_experts(experts, model, trees, folder)
    kinds = [bool(group.get("moe")) for group in trees[0]["param_groups"]]
    dense = [name for name in weights if name not in of_experts and name not in (model.get("buffer_names") or ())]
    by_rank = sorted(of_experts, key=lambda name: _rank_of(name, experts // len(trees)))
    names = [name for moe in kinds for name in (by_rank if moe else dense)]
    held = sum(len(g["params"]) * (len(trees) if g.get("moe") else 1) for g in trees[0]["param_groups"])
    known = sorted(kinds) in ([False, True], [True]) and len(names) == held
    return _all_experts(trees, paths, names if known else None, slices, folder), names if known else None


def _expert_ranks(folder: Path, stage: int, tensor: int) -> dict[int, Path]:
    """Return a stage's files of the expert-parallel ranks in their order.

    Expert-parallel ranks follow each other as all ranks do: tensor-parallel ranks have different experts.

    Raises:
        FileError: there is a gap between them.
        RefusedError: there are fewer of them than of tensor-parallel ranks, whose slices are then in no such file, or
            they follow each other otherwise.
    """
    matches = filter(None, map(_EXPERT_RANK.fullmatch, names_in(folder)))
    found = {int(match[1]): (int(match[2]), folder / match[0]) for match in matches if int(match[2]) // tensor == stage}
    for rank in range(max(found) + 1):
        if rank not in found:
            raise FileError(
                f"missing: there are files of expert-parallel ranks {sorted(found)}",
                path=folder / f"expp_rank_{rank}_mp_rank_{stage * tensor + rank % tensor:02d}_optim_states.pt",
            )
    if len(found) < tensor or any(mp % tensor != rank % tensor for rank, (mp, _) in found.items()):
        raise RefusedError(
            f"there are files of {len(found)} expert-parallel ranks, where {tensor} tensor-parallel ranks have slices: "
            f"a file is missing, or ep_size was less than {tensor}, and DeepSpeed wrote no slices of the other ranks",
            path=folder,
        )
    return {rank: path for rank, (_, path) in sorted(found.items())}


def _check_experts(
    experts: int, model: Mapping[str, Any], trees: Mapping[int, Mapping[str, Any]], folder: Path
) -> None:
    """Raise ``FileError`` where fewer experts, or ranks with experts, left files than the files say that there were."""
    trained = model.get("num_experts")
    if isinstance(trained, list) and trained and experts != max(trained):
        raise FileError(
            f"there are files of {experts} experts, where {max(trained)} were trained: a file is missing", path=folder
        )
    for group in trees[0]["param_groups"]:
        if group.get("moe") and group.get("name") not in (None, f"ep_size_{len(trees)}"):
            raise FileError(
                f"there are files of {len(trees)} expert-parallel ranks, where group '{group['name']}' had another "
                "number: a file is missing",
                path=folder,
            )


def _all_experts(
    trees: Mapping[int, Mapping[str, Any]],
    paths: Mapping[int, Path],
    names: Sequence[str] | None,
    slices: Slices,
    folder: Path,
) -> dict[str, Any]:
    """Return the state dict with the dense parameters, of whose slices the first ranks have one each, and all experts.

    The experts follow each other rank by rank.
    """
    groups: list[dict[str, Any]] = []
    state: dict[int, Any] = {}
    count = 0
    for number, group in enumerate(trees[0]["param_groups"]):
        groups.append({**group, "params": []})
        ids = {rank: tree["param_groups"][number]["params"] for rank, tree in trees.items()}
        if group.get("moe"):
            listed = [tree["state"].get(identity) for rank, tree in trees.items() for identity in ids[rank]]
        else:
            listed = _dense_of(trees, ids, paths, count, names, slices, folder)
        for slots in listed:
            if slots is not None:
                state[count] = slots
            groups[-1]["params"].append(count)
            count += 1
    return {"state": state, "param_groups": groups}


def _dense_of(
    trees: Mapping[int, Mapping[str, Any]],
    ids: Mapping[int, Sequence[Any]],
    paths: Mapping[int, Path],
    first: int,
    names: Sequence[str] | None,
    slices: Slices,
    folder: Path,
) -> list[Any]:
    """Return the slots of a group's parameters that have no experts in them; ``first`` is the number of the first."""
    for rank in range(slices.count, len(trees)):
        like = rank % slices.count
        _check_same(trees[like], ids[like], trees[rank], ids[rank], paths[rank], like)
    result = []
    for number, of in enumerate(zip(*(ids[rank] for rank in range(slices.count)), strict=True), first):
        held = [trees[rank]["state"].get(identity) for rank, identity in enumerate(of)]
        result.append(held[0] if slices.count == 1 else _joined(held, names, number, slices, folder))
    return result


def _rank_of(name: str, local: int) -> int:
    """Return the expert-parallel rank that has an expert's parameter."""
    return int(name.partition(".deepspeed_experts.")[2].partition(".")[0]) // local


def _check_same(
    first: Mapping[str, Any], ids: Any, tree: Mapping[str, Any], others: Any, path: Path, rank: int
) -> None:
    """Raise ``FileError`` where two ranks hold different states of dense parameters, by the first elements."""
    for ours, theirs in zip(ids, others, strict=True):
        for slot, value in first["state"].get(ours, {}).items():
            other = tree["state"].get(theirs, {}).get(slot)
            if not isinstance(value, Tensor):
                continue
            count = min(SAMPLE, value.count)
            if (
                not isinstance(other, Tensor)
                or other.shape != value.shape
                or elements(value, 0, count) != elements(other, 0, count)
            ):
                raise FileError(
                    f"'{slot}' of parameter {theirs} is not what expert-parallel rank {rank} has: files of different "
                    "saves",
                    path=path,
                )
