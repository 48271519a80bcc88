"""Megatron-Core's distributed checkpoints (``torch_dist``), also those of NeMo and Megatron Bridge: DCP folders.

The optimizer's state has one of two forms. ``fully_reshardable``, and the state of optimizers that are not distributed:
``optimizer.state.<slot>.<parameter>``, whatever the number of tensor-, pipeline- and expert-parallel ranks was.
``dp_reshardable``: flat buckets, which ``foreign.flat_buckets`` takes apart. Layers are stacked along a first axis and
experts along the next; both are split here, so that parameters have the names that the model has. Fused projections
stay whole; the map ``megatron`` cuts them apart, and has the names of Hugging Face's Llama and Qwen.

Hyperparameters and steps stand in ``common.pt``, or with the buckets. Neither says which parameters a group had: they
follow from Megatron's rule (``optimizer/__init__.py``), by which biases and tensors of one axis are not decayed and
experts have groups of their own. Where the groups are not those of the rule, nothing is assumed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, RefusedError, Remedy
from lora_state_format.foreign import keyed, pickles
from lora_state_format.foreign.dcp import METADATA, is_folder, open_folder
from lora_state_format.foreign.flat_buckets import MASTER, Bucket, take_apart
from lora_state_format.foreign.masters import check_masters
from lora_state_format.foreign.state_dict import Found, from_state_dict
from lora_state_format.foreign.trees import member
from lora_state_format.io.json_files import read_json_object
from lora_state_format.model.sources import File, Memory
from lora_state_format.model.states import Checkpoint, OptimizerState, Value
from lora_state_format.model.tensors import Box, Piece, Tensor, contiguous
from lora_state_format.registry import Match

NAME: Final = "megatron"
DESCRIPTION: Final = "a Megatron-Core, NeMo or Bridge torch_dist checkpoint: metadata.json next to .metadata"
OPTIONS: Final = {
    "masters": "keep the fp32 master weights as a slot 'master_param'",
    "groups": "'merge' makes one group of all, with the options that they share",
}

MERGE: Final = Remedy(
    "pass {options} to read them as one group with the options that all share", {"options": {"groups": "merge"}}
)

_OPTIMIZER: Final = re.compile(r"(?:chained_(\d+)\.)?optimizer\.(.*)")
_STATE: Final = re.compile(r"state\.([^.]+)\.(.+)")
_BUCKET: Final = re.compile(r"distributed\.dp_group_idx_(\d+)\.gbuf_idx_(\d+)\.dtype_(.*)\.bucket_idx_(\d+)\.(\w+)")
_GROUPS: Final = re.compile(r"distributed\.dp_group_idx_\d+\.optimizer/shard_0_1")
_LAYERS: Final = re.compile(r"(.*\blayers)\.(?!\d)(.*)")
_EXPERTS: Final = re.compile(r"(.*\.experts)\.experts\.(.*)")


def detect(path: Path) -> Match | None:
    for folder in (path, path / "weights"):
        description = folder / "metadata.json"
        if is_folder(folder) and description.is_file() and "sharded_backend" in read_json_object(description):
            return Match("metadata.json with a sharded_backend next to .metadata", folder)
    return None


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Read the folder.

    Raises:
        RefusedError: another backend, or buckets that the weights do not take apart.
        FileError: no optimizer state, or groups that are not those of Megatron's rule.
    """
    place = match.path
    backend = read_json_object(place / "metadata.json").get("sharded_backend")
    if backend != "torch_dist":
        raise RefusedError(
            f"sharded_backend {backend!r}, where torch_dist is read: load the checkpoint in Megatron and save it with "
            "--ckpt-format torch_dist",
            path=place / "metadata.json",
        )
    folder = open_folder(place)
    try:
        entries = {".".join(map(str, where)): value for where, value in folder.entries.items()}
        weights = _weights(entries)
        states, told = _states(entries, weights, place / METADATA)
        if not states:
            raise FileError("has no entry under optimizer.state or optimizer.distributed", path=place / METADATA)
        masters = {
            name: slots.pop(MASTER) for state in states.values() for name, slots in state.items() if MASTER in slots
        }
        origin: dict[str, Value] = {"format": NAME, "masters_compared": check_masters(masters, weights, place)}
        if told:
            origin["told_apart_by_order"] = told
        if options.get("groups") != "merge":
            origin["groups"] = "by Megatron's rule: biases and tensors with one axis are not decayed"
        groups = _groups(place, entries)
        found = []
        for number, state in sorted(states.items()):
            tree = _tree(state, groups.get(number), place, merge=options.get("groups") == "merge")
            if options.get("masters"):
                for name in state.keys() & masters.keys():
                    tree["state"][name]["master_param"] = masters[name]
            found.append(Found((number,) if len(states) > 1 else (), tree))
        held = [name for state in states.values() for name in state]
        weights = {name: weights[name] for name in held if name in weights}
        result = keyed.named(from_state_dict(*found, origin=origin, resources=(folder,)), weights=weights)
        assert isinstance(result, OptimizerState)  # every parameter has slots, which show its shape
        details = {**result.naming.details, "order": "unknown"}
        return Checkpoint(replace(result, naming=replace(result.naming, details=details)), weights)
    except BaseException:
        folder.close()
        raise


def _weights(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the model's tensors by name, layers and experts apart."""
    return {
        name: part
        for key, value in entries.items()
        if isinstance(value, Tensor) and not _OPTIMIZER.fullmatch(key)
        for name, part in _apart(key.removeprefix("model."), value)
    }


def _apart(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor under its name, or those of each layer and expert where they are stacked."""
    if match := _LAYERS.fullmatch(name):
        for layer, part in _along_first(tensor):
            yield from _apart(f"{match[1]}.{layer}.{match[2]}", part)
    elif match := _EXPERTS.fullmatch(name):
        for expert, part in _along_first(tensor):
            yield f"{match[1]}.local_experts.{expert}.{match[2]}", part
    else:
        yield name, tensor


def _along_first(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the tensors that are stacked along the first axis."""
    rest = tensor.shape[1:]
    for index in range(tensor.shape[0] if tensor.shape else 0):
        part = tensor.part((index, *(0 for _ in rest)), (1, *rest))
        yield index, Tensor(part.dtype, rest, tuple(map(_without_first, part.boxed().pieces)))


def _without_first(piece: Piece) -> Piece:
    assert isinstance(piece.where, Box)
    where = Box(piece.where.start[1:], piece.where.shape[1:])
    return Piece(piece.source, piece.offset, where, piece.strides[1:] if piece.strides else None)


def _states(
    entries: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path
) -> tuple[dict[int, dict[str, dict[str, Any]]], int]:
    """Return the slots by parameter of each optimizer, and how many parameters the order told apart."""
    states: dict[int, dict[str, dict[str, Any]]] = {}
    buckets: dict[tuple[int, ...], tuple[str, dict[str, Tensor]]] = {}
    for key, value in entries.items():
        if (match := _OPTIMIZER.fullmatch(key)) is None or not isinstance(value, Tensor):
            continue
        number = int(match[1] or 0)
        if inner := _STATE.fullmatch(match[2]):
            slot = MASTER if inner[1] == "fp32_param" else inner[1]
            for name, part in _apart(inner[2].removeprefix("model."), value):
                states.setdefault(number, {}).setdefault(name, {})[slot] = part
        elif inner := _BUCKET.fullmatch(match[2]):
            group, buffer, bucket = int(inner[1]), int(inner[2]), int(inner[4])
            domain = f"optimizer {number}, dp_group_idx {group}, gbuf_idx {buffer}"
            buckets.setdefault((number, group, buffer, bucket), (domain, {}))[1][inner[5]] = value
    told = 0
    for number in sorted({place[0] for place in buckets}):
        own = [Bucket(*bucket) for place, bucket in sorted(buckets.items()) if place[0] == number]
        states[number], ordered = take_apart(own, weights, path)
        told += ordered
    return states, told


def _groups(place: Path, entries: Mapping[str, Any]) -> dict[int, tuple[list[dict[str, Any]], Any]]:
    """Return each optimizer's groups, and the step that its state counts for all parameters, ``None`` without one."""
    found: dict[int, tuple[list[dict[str, Any]], Any]] = {}
    for key, value in entries.items():
        match = _OPTIMIZER.fullmatch(key)
        if match and _GROUPS.fullmatch(match[2]) and isinstance(value, list) and value:
            number, groups = int(match[1] or 0), member(value[0], "param_groups", list, place / METADATA)
            if found.setdefault(number, (groups, None))[0] != groups:
                raise FileError(f"'{key}' has other groups than the ranks before it", path=place / METADATA)
    path = place / "common.pt"
    if found or not path.is_file():
        return found
    with File(path) as file:
        tree = pickles.load(file).value
        optimizer = member(tree, "optimizer", dict, path)
        chained = {key: value for key, value in optimizer.items() if type(key) is int}
        for number, inner in (chained or {0: optimizer}).items():
            step = None
            while isinstance(inner, dict):
                step = (inner.get("state") or {}).get("common_step", step)
                if isinstance(inner.get("param_groups"), list):
                    found[number] = inner["param_groups"], _read_now(step)
                inner = inner.get("optimizer")
    return found


def _read_now(step: Any) -> Any:
    """Return a tensor with its bytes in memory: its file is closed before the state is read."""
    return contiguous(step.dtype, step.shape, Memory(step.bytes())) if isinstance(step, Tensor) else step


def _tree(
    state: Mapping[str, Mapping[str, Any]],
    stated: tuple[list[dict[str, Any]], Any] | None,
    place: Path,
    *,
    merge: bool,
) -> dict[str, Any]:
    """Return the state dict that one rank with the whole model would have had, with names for ids."""
    groups, common_step = stated or ([], None)
    options = [{key: value for key, value in group.items() if key not in ("params", "step")} for group in groups]
    steps = [group.get("step", common_step) for group in groups] or [None]
    if merge or not groups:
        if len({repr(step) for step in steps}) > 1:
            raise FileError(f"the groups are of steps {steps}: one group cannot have them all", path=place)
        shared = {k: v for k, v in options[0].items() if all(g.get(k) == v for g in options)} if options else {}
        members = [(shared, steps[0], list(state))]
    else:
        names = _by_rule(state, groups, place)
        members = list(zip(options, steps, names, strict=True))
    step_of = {name: step for _, step, names in members for name in names if step is not None}
    return {
        "state": {
            name: {**({"step": step_of[name]} if name in step_of else {}), **slots} for name, slots in state.items()
        },
        "param_groups": [{**chosen, "params": names} for chosen, _, names in members],
    }


def _by_rule(
    state: Mapping[str, Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], place: Path
) -> list[list[str]]:
    """Return the parameters of each group by Megatron's rule."""
    kinds: dict[tuple[bool, bool], int] = {}
    for number, group in enumerate(groups):
        kind = bool(group.get("is_expert_parallel")), group.get("wd_mult", 1.0) != 0.0
        if kinds.setdefault(kind, number) != number:
            raise RefusedError(
                f"groups {kinds[kind]} and {number} differ in more than decay and experts, and the file does not say "
                "which parameters they had",
                path=place,
                remedy=MERGE,
            )
    several = any(expert for expert, _ in kinds)
    names: list[list[str]] = [[] for _ in groups]
    for name, slots in state.items():
        shape = next(slot.shape for slot in slots.values())
        kind = several and ".experts." in name, not (name.endswith(".bias") or len(shape) == 1)
        if kind not in kinds:
            raise RefusedError(
                f"'{name}' belongs to no group by Megatron's rule, which decays {'it' if kind[1] else 'it not'}"
                f"{', as an expert' if kind[0] else ''}; {len(groups)} groups are stated",
                path=place,
                remedy=MERGE,
            )
        names[kinds[kind]].append(name)
    return names
