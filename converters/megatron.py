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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, OptionError, RefusedError, Remedy, UnrepresentableError
from lora_state_format.foreign import keyed, pickles
from lora_state_format.foreign.dcp import METADATA, Folder, is_folder, open_folder, seen, write_folder
from lora_state_format.foreign.flat_buckets import MASTER, Bucket, NotAllError, look_at, take_apart
from lora_state_format.foreign.masters import check_masters
from lora_state_format.foreign.model_space import in_shape
from lora_state_format.foreign.state_dict import Found, from_state_dict
from lora_state_format.foreign.torch_save import with_items
from lora_state_format.foreign.trees import member
from lora_state_format.io.json_files import read_json_object
from lora_state_format.model.sources import File, Memory, bytes_of
from lora_state_format.model.states import Checkpoint, OptimizerState, Scalar, Value
from lora_state_format.model.tensors import Box, Piece, Tensor, contiguous
from lora_state_format.optimizers.roles import MASTER as MASTER_SLOT
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

_DESCRIPTION: Final = "metadata.json"
_COMMON: Final = "common.pt"
_OPTIMIZER: Final = re.compile(r"(?:chained_(\d+)\.)?optimizer\.(.*)")
_STATE: Final = re.compile(r"state\.([^.]+)\.(.+)")
_BUCKET: Final = re.compile(r"distributed\.dp_group_idx_(\d+)\.gbuf_idx_(\d+)\.dtype_(.*)\.bucket_idx_(\d+)\.(\w+)")
_SEEN: Final = "all weights of the folder; convert proves by the fp32 masters which of them have state"
_GROUPS: Final = re.compile(r"distributed\.dp_group_idx_\d+\.optimizer/shard_0_1")
_LAYERS: Final = re.compile(r"(.*\blayers)\.(?!\d)(.*)")
_EXPERTS: Final = re.compile(r"(.*\.experts)\.experts\.(.*)")


def detect(path: Path) -> Match | None:
    for folder in (path, path / "weights"):
        description = folder / _DESCRIPTION
        if is_folder(folder) and description.is_file() and "sharded_backend" in read_json_object(description):
            return Match("metadata.json with a sharded_backend next to .metadata", folder)
    return None


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Read the folder.

    Raises:
        RefusedError: another backend, or buckets that the weights do not take apart.
        FileError: no optimizer state, or groups that are not those of Megatron's rule.
    """
    return _read(match.path, options, open_folder)


def glance(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Return what the folder holds by ``.metadata``, the optimizer's values, and the names of its files.

    A folder of up to ``FEW`` files is read as a whole. Of flat buckets, whose parameters only masters and weights tell
    apart, all weights are taken to have state; a folder in which there is no room for that is read as a whole, too.
    Raises what ``read`` raises, for what is seen.
    """
    try:
        return _read(match.path, options, partial(open_folder, glance=lambda key: bool(_OPTIMIZER.fullmatch(key))))
    except NotAllError:
        return read(match, options)


def _read(place: Path, options: Mapping[str, Any], opener: Callable[[Path], Folder]) -> Checkpoint:
    _check_backend(place)
    folder = opener(place)
    try:
        return _checkpoint(folder, place, options)
    except BaseException:
        folder.close()
        raise


def _check_backend(place: Path) -> None:
    backend = read_json_object(place / _DESCRIPTION).get("sharded_backend")
    if backend != "torch_dist":
        raise RefusedError(
            f"sharded_backend {backend!r}, where torch_dist is read: load the checkpoint in Megatron and save it with "
            "--ckpt-format torch_dist",
            path=place / _DESCRIPTION,
        )


def _checkpoint(folder: Folder, place: Path, options: Mapping[str, Any]) -> Checkpoint:
    entries = _by_key(folder)
    weights = _weights(entries)
    states, said = _states(entries, weights, place, whole=folder.whole)
    if not states:
        raise FileError("has no entry under optimizer.state or optimizer.distributed", path=place / METADATA)
    masters = _masters(states, keep=bool(options.get("masters")))
    origin: dict[str, Value] = {"format": NAME, **seen([folder])}
    if folder.whole:
        origin["masters_compared"] = check_masters(masters, weights, place)
    origin |= said
    merge = options.get("groups") == "merge"
    if not merge:
        origin["groups"] = "by Megatron's rule: biases and tensors with one axis are not decayed"
    groups = _groups(place, entries)
    found = [
        Found((number,) if len(states) > 1 else (), _tree(state, groups.get(number), place, merge=merge))
        for number, state in sorted(states.items())
    ]
    weights = {name: weights[name] for state in states.values() for name in state if name in weights}
    result = keyed.named(from_state_dict(*found, origin=origin, resources=(folder,)), weights=weights)
    assert isinstance(result, OptimizerState)  # every parameter has slots, which show its shape
    details = {**result.naming.details, "order": "unknown"}
    return Checkpoint(replace(result, naming=replace(result.naming, details=details)), weights)


def _by_key(folder: Folder) -> dict[str, Any]:
    return {".".join(map(str, where)): value for where, value in folder.entries.items()}


def _masters(states: Mapping[int, Mapping[str, dict[str, Any]]], *, keep: bool) -> dict[str, Tensor]:
    """Return the fp32 masters, which are taken out of the slots; with ``keep`` they get our name for them there."""
    masters = {}
    for name, slots in (item for state in states.values() for item in state.items()):
        if MASTER in slots:
            masters[name] = slots.pop(MASTER)
            if keep:
                slots[MASTER_SLOT] = masters[name]
    return masters


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
    entries: Mapping[str, Any], weights: Mapping[str, Tensor], place: Path, *, whole: bool
) -> tuple[dict[int, dict[str, dict[str, Any]]], dict[str, Value]]:
    """Return the slots by parameter of each optimizer, and what ``origin`` says of how buckets were taken apart."""
    states: dict[int, dict[str, dict[str, Any]]] = {}
    buckets: dict[tuple[int, ...], tuple[str, dict[str, Tensor]]] = {}
    for key, value in entries.items():
        if (match := _OPTIMIZER.fullmatch(key)) is None or not isinstance(value, Tensor):
            continue
        number = int(match[1] or 0)
        if inner := _STATE.fullmatch(match[2]):
            slot = MASTER if inner[1] == "fp32_param" else inner[1]
            for name, part in _apart(inner[2].removeprefix("model."), value):
                shaped = in_shape(part, weights[name].shape) if name in weights else part
                states.setdefault(number, {}).setdefault(name, {})[slot] = shaped
        elif inner := _BUCKET.fullmatch(match[2]):
            group, buffer, bucket = int(inner[1]), int(inner[2]), int(inner[4])
            domain = f"optimizer {number}, dp_group_idx {group}, gbuf_idx {buffer}"
            buckets.setdefault((number, group, buffer, bucket), (domain, {}))[1][inner[5]] = value
    of_optimizer: dict[int, list[Bucket]] = {}
    for numbers, (domain, slots) in sorted(buckets.items(), key=lambda item: item[0]):
        of_optimizer.setdefault(numbers[0], []).append(Bucket(domain, slots))
    if of_optimizer and not whole:
        groups = _groups(place, entries)
        for number, own in of_optimizer.items():
            states[number] = look_at(own, _of_optimizer(number, weights, groups), place)
        return states, {"parameters": _SEEN}
    told = 0
    for number, own in of_optimizer.items():
        states[number], ordered = take_apart(own, weights, place / METADATA)
        told += ordered
    return states, {"told_apart_by_order": told} if told else {}


def _of_optimizer(
    number: int, weights: Mapping[str, Tensor], groups: Mapping[int, tuple[Sequence[Mapping[str, Any]], Any]]
) -> Mapping[str, Tensor]:
    """Return the weights that an optimizer steps: where there are several, one of them has the experts."""
    if len(groups) < 2:
        return weights
    experts = any(group.get("is_expert_parallel") for group in groups[number][0]) if number in groups else False
    return {name: weight for name, weight in weights.items() if (".experts." in name) == experts}


def _groups(place: Path, entries: Mapping[str, Any]) -> dict[int, tuple[list[dict[str, Any]], Any]]:
    """Return each optimizer's groups, and the step that its state counts for all parameters, ``None`` without one."""
    found: dict[int, tuple[list[dict[str, Any]], Any]] = {}
    for key, value in entries.items():
        match = _OPTIMIZER.fullmatch(key)
        if match and _GROUPS.fullmatch(match[2]) and isinstance(value, list) and value:
            number, groups = int(match[1] or 0), member(value[0], "param_groups", list, place / METADATA)
            if found.setdefault(number, (groups, None))[0] != groups:
                raise FileError(f"'{key}' has other groups than the ranks before it", path=place / METADATA)
    path = place / _COMMON
    if found or not path.is_file():
        return found
    with File(path) as file:
        tree = pickles.load(file).value
        optimizer = member(tree, "optimizer", (dict, list), path)
        if isinstance(optimizer, list):  # Lightning's, of which NeMo has one
            optimizer = member(optimizer, 0, dict, path)
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
    steps = [group.get("step", common_step) for group in groups]
    if merge or not groups:
        options, steps, names = [_shared(groups)], [_one_step(steps, place)], [list(state)]
    else:
        options = [{key: value for key, value in group.items() if key not in ("params", "step")} for group in groups]
        shapes = {name: next(slot.shape for slot in slots.values()) for name, slots in state.items()}
        names = _by_rule(shapes, groups, place)
    step_of = {name: step for step, own in zip(steps, names, strict=True) for name in own if step is not None}
    return {
        "state": {
            name: {**({"step": step_of[name]} if name in step_of else {}), **slots} for name, slots in state.items()
        },
        "param_groups": [{**chosen, "params": own} for chosen, own in zip(options, names, strict=True)],
    }


def _shared(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the options in which all groups agree."""
    first = groups[0] if groups else {}
    same = {key: value for key, value in first.items() if all(group.get(key) == value for group in groups)}
    return {key: value for key, value in same.items() if key not in ("params", "step")}


def _one_step(steps: Sequence[Any], place: Path) -> Any:
    if len({repr(step) for step in steps}) > 1:
        raise FileError(f"the groups are of steps {list(steps)}: one group cannot have them all", path=place)
    return steps[0] if steps else None


def _by_rule(shapes: Mapping[str, Sequence[int]], groups: Sequence[Mapping[str, Any]], place: Path) -> list[list[str]]:
    """Return the parameters of each group by Megatron's rule.

    Raises ``RefusedError`` if the rule does not tell the groups apart, or leaves a parameter out.
    """
    kinds: dict[tuple[bool, bool], int] = {}
    for number, group in enumerate(groups):
        decay = group.get("wd_mult", group.get("pre_wd_mult", 1.0))  # NeMo's has been taken into account
        kind = bool(group.get("is_expert_parallel")), decay != 0.0
        if kinds.setdefault(kind, number) != number:
            raise RefusedError(
                f"groups {kinds[kind]} and {number} differ in more than decay and experts, and the file does not say "
                "which parameters they had",
                path=place,
                remedy=MERGE,
            )
    several = any(expert for expert, _ in kinds)
    names: list[list[str]] = [[] for _ in groups]
    for name, shape in shapes.items():
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


# --- writing ------------------------------------------------------------------------------------------------------

FULL: Final = "fully_reshardable"
_CONTENT: Final = "distrib_optim_sharding_type"

IDENTIFIERS: Final = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""Options by which Megatron finds a group again, whatever its parallelism (``param_group_identifier_keys``)."""


def write(state: OptimizerState, path: Path, *, base: Path | None, force: bool, options: Mapping[str, Any]) -> None:
    """Write a ``fully_reshardable`` folder, which Megatron-Core loads with any parallelism.

    ``base`` is a folder of the same model, with or without optimizer state of any form: its weights, and all else that
    is no optimizer state, are taken from it byte for byte. ``options`` are for reading.

    Raises:
        OptionError: there is no base.
        UnrepresentableError: the state has other parameters, shapes, groups or slots than Megatron keeps for the model.
    """
    match = detect(base) if base is not None else None
    if match is None:
        raise OptionError(
            f"{NAME} takes the weights from a torch_dist folder of the same model"
            + ("" if base is None else f", which {base} is not"),
            remedy=Remedy("pass it as {base}", {"base": ...}),
        )
    place = match.path
    _check_backend(place)
    with open_folder(place, raw=True) as folder, File(place / _COMMON) as common:
        kept = {key: value for key, value in _by_key(folder).items() if not _OPTIMIZER.fullmatch(key)}
        trees = [keyed.by_name(state, number) for number in range(len(state.optimizers))]
        optimizers = [
            {"optimizer": {"param_groups": _written_groups(tree)}, "param_state_sharding_type": FULL} for tree in trees
        ]
        entries = {(key,): value for key, value in (*kept.items(), *_written_slots(trees, kept, place))}
        others = {
            _DESCRIPTION: bytes_of(folder.files[place / _DESCRIPTION]),
            _COMMON: with_items(common, _common_items(common, optimizers)),
        }
        write_folder(entries, path, force=force, others=others)


def _common_items(common: File, optimizers: Sequence[Any]) -> dict[str, Any]:
    """Return what changes in ``common.pt``: the optimizers, and what it says of the form of their state."""
    items: dict[str, Any] = {"optimizer": dict(enumerate(optimizers)) if len(optimizers) > 1 else optimizers[0]}
    tree = pickles.load(common).value
    if isinstance(tree, dict) and isinstance(tree.get("optimizer"), list):
        raise UnrepresentableError(
            f"{common.path} is NeMo's, which has a list of optimizers and cannot load what is written here: pass a "
            "folder that Megatron-Core saved as base"
        )
    content = tree.get("content_metadata") if isinstance(tree, dict) else None
    if isinstance(content, dict) and _CONTENT in content:
        items["content_metadata"] = {**content, _CONTENT: FULL}
    return items


def _written_groups(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return an optimizer's groups as ``common.pt`` has them, with their steps.

    Raises ``UnrepresentableError`` for groups that Megatron would not find again, or that would be read back as others.
    """
    if others := tree.keys() - {"state", "param_groups"}:
        raise UnrepresentableError(f"'{min(others)}' belongs to no parameter, and Megatron has no place for it")
    groups = []
    for number, group in enumerate(tree["param_groups"]):
        if lacking := [key for key in IDENTIFIERS if key not in group and f"pre_{key}" not in group]:
            raise UnrepresentableError(
                f"group {number} has no {lacking[0]}, by which Megatron finds a group again: only groups that Megatron "
                "saved can be written"
            )
        steps = {_number(tree["state"].get(name, {}).get("step")) for name in group["params"]} - {None}
        if len(steps) > 1:
            raise UnrepresentableError(
                f"the parameters of group {number} are at steps {sorted(steps)}, and Megatron counts the steps of a "
                "group once"
            )
        options = {key: value for key, value in group.items() if key != "params"}
        groups.append({**options, "step": steps.pop()} if steps else options)
    _check_read_back(tree, groups)
    return groups


def _check_read_back(tree: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    shapes = {
        name: next((slot.shape for slot in slots.values() if isinstance(slot, Tensor) and slot.shape), ())
        for name, slots in tree["state"].items()
    }
    try:
        found = _by_rule(shapes, groups, Path())
    except RefusedError as error:
        raise UnrepresentableError(f"the groups would not be read back: {error.detail}") from None
    for number, (own, group) in enumerate(zip(found, tree["param_groups"], strict=True)):
        if odd := set(own) ^ set(group["params"]):
            raise UnrepresentableError(
                f"'{min(odd)}' is {'not ' if min(odd) in own else ''}in group {number}, and by Megatron's rule, by "
                "which groups are read back, it is the other way round"
            )


def _number(step: Any) -> Any:
    return step.item() if isinstance(step, Scalar) else step


def _written_slots(
    trees: Sequence[Mapping[str, Any]], kept: Mapping[str, Any], place: Path
) -> Iterator[tuple[str, Tensor]]:
    """Yield the optimizers' tensors with their keys: layers and experts stacked as those of the weights are.

    Raises ``UnrepresentableError`` for other parameters than the weights', and for state that has no place.
    """
    left = {name: (number, slots) for number, tree in enumerate(trees) for name, slots in tree["state"].items()}
    for key, weight in kept.items():
        if not isinstance(weight, Tensor):
            continue
        parts = dict(_apart(key.removeprefix("model."), weight))
        held = {name: left.pop(name) for name in parts if name in left}
        if not held:
            continue  # not trained
        numbers = {number for number, _ in held.values()}
        if len(numbers) > 1 or (parts.keys() - held.keys()):
            raise UnrepresentableError(
                f"{len(held)} of the {len(parts)} parameters that Megatron stacks as '{key}' have state, in optimizers "
                f"{sorted(numbers)}: it keeps all of them or none, in one"
            )
        if weight.dtype == "F16":
            raise UnrepresentableError(
                f"'{key}' is F16, and the loss scale that Megatron keeps with the optimizer then is not in the state"
            )
        chained = f"chained_{numbers.pop()}." if len(trees) > 1 else ""
        for slot, tensors in _slots({name: slots for name, (_, slots) in held.items()}, parts).items():
            yield f"{chained}optimizer.state.{slot}.{key}", _stacked(weight.shape, tensors)
    if left:
        raise UnrepresentableError(f"'{min(left)}' is no parameter of the model in {place}")


def _slots(held: Mapping[str, Mapping[str, Any]], weights: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Return each slot's tensors, one of every parameter. The master of an fp32 weight is the weight."""
    kinds = {frozenset(slots) - {"step"} for slots in held.values()}
    if len(kinds) > 1:
        raise UnrepresentableError(f"'{min(held)}' and the others that Megatron stacks with it have different slots")
    found: dict[str, list[Tensor]] = {}
    for name, slots in held.items():
        if MASTER_SLOT not in slots and weights[name].dtype != "F32":
            raise UnrepresentableError(
                f"'{name}' has no fp32 master weight: read the checkpoint with the option masters, which keeps it as a "
                f"slot '{MASTER_SLOT}'"
            )
        for slot, value in {MASTER_SLOT: weights[name], **slots}.items():
            if slot == "step":
                continue
            if not isinstance(value, Tensor) or value.shape != weights[name].shape:
                raise UnrepresentableError(
                    f"slot '{slot}' of '{name}' is no tensor of shape {list(weights[name].shape)}, and Megatron keeps "
                    "no other"
                )
            found.setdefault(MASTER if slot == MASTER_SLOT else slot, []).append(value)
    return found


def _stacked(shape: tuple[int, ...], parts: Sequence[Tensor]) -> Tensor:
    """Return tensors stacked along the first axes of a shape, in C order."""
    own = parts[0].shape
    ahead = shape[: len(shape) - len(own)]
    if not ahead:
        return parts[0]
    pieces = [
        Piece(part, 0, Box((*index, *(0 for _ in own)), (*(1 for _ in ahead), *own)))
        for index, part in zip(product(*map(range, ahead)), parts, strict=True)
    ]
    return Tensor(parts[0].dtype, shape, tuple(pieces))
