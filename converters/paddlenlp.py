"""Unified checkpoints of PaddleNLP and PaddleFormers: ``optimizer-*.safetensors`` with an index, keyed by parameter.

Keys are ``<parameter>/<accumulator>``. The files hold neither steps nor options, but the powers of Adam's betas:
``powers`` checks the step in ``trainer_state.json`` by them. The layout is that of
``paddlenlp/trainer/unified_checkpoint``.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, OptionError, RefusedError, Remedy, UnrepresentableError
from lora_state_format.foreign.paddle import LAYOUTS, POWERS, betas_of, state_of
from lora_state_format.foreign.powers import power
from lora_state_format.foreign.trees import member
from lora_state_format.foreign.weights import read_weights
from lora_state_format.io import plain
from lora_state_format.io.files import Files, inside, reading
from lora_state_format.io.folders import NewFolder, new_folder
from lora_state_format.io.json_files import read_json, read_json_object
from lora_state_format.mapping import algorithms, apply
from lora_state_format.mapping.algorithms import HYPERPARAMETERS, OPTIMIZER, Algorithm, RuleLayout
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import Checkpoint, OptimizerState, Parameter
from lora_state_format.model.tensors import Tensor, contiguous
from lora_state_format.optimizers.roles import MASTER
from lora_state_format.registry import Match

NAME: Final = "paddlenlp"
DESCRIPTION: Final = "a unified checkpoint of PaddleNLP: optimizer-*.safetensors and optimizer.safetensors.index.json"
OPTIONS: Final = {
    "optimizer": OPTIMIZER,
    "step": "steps taken, where no trainer_state.json says it",
    "masters": "keep the fp32 master weights as a slot 'master_param'",
    "map": f"{apply.OPTION}; paddlenlp, for example",
    **HYPERPARAMETERS,
}

INDEX: Final = "optimizer.safetensors.index.json"
MASTERS: Final = "master_weights.safetensors.index.json"
WEIGHTS: Final = ("peft_model.safetensors.index.json", "model.safetensors.index.json")
TRAINER: Final = "trainer_state.json"


def detect(path: Path) -> Match | None:
    index = path / INDEX if path.is_dir() else path
    if index.name != INDEX or not index.is_file():
        return None
    members = read_json(index)
    if not isinstance(members, dict) or "master_weights" not in members:
        return None
    return Match(f"{INDEX} with a member 'master_weights'", index)


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Return the state, and the parameters if their index is next to it.

    Raises ``RefusedError`` for compressed and unmerged checkpoints, ``FileError`` where steps and powers disagree.
    """
    index = match.path
    with reading(index.parent) as files:
        tensors = _indexed(index, files)
        slots: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, accumulator = key.rpartition("/")
            slots.setdefault(name, {})[accumulator] = tensor
        if options.get("masters"):
            for name, tensor in _indexed(index.with_name(MASTERS), files).items():
                slots.get(name, {})[MASTER] = tensor
        beside = (index.with_name(name) for name in WEIGHTS)
        weights = next((_indexed(found, files) for found in beside if found.is_file()), {})
        trainer = index.with_name(TRAINER)
        step = member(read_json_object(trainer), "global_step", int, trainer) if trainer.is_file() else None
        state = state_of(slots, weights, index, options, step=step, origin=NAME, files=files)
        return apply.on_reading(Checkpoint(state, weights), options.get("map"))


def _indexed(index: Path, files: Files) -> dict[str, Tensor]:
    """Return the tensors that an index names, in the index's order."""
    members = read_json(index)
    stage = members.get("ckpt_quant_stage", "O0") if isinstance(members, dict) else None
    if stage not in ("O0", None):
        raise RefusedError(f"compressed (ckpt_quant_stage {stage}): its moments were rounded to a few bits", path=index)
    places = members.get("weight_map") if isinstance(members, dict) else None
    if not isinstance(places, dict):
        raise RefusedError(
            "has no weight_map: written with ignore_merge_optimizer, each rank's part by itself; save a merged one",
            path=index,
        )
    held: dict[str, dict[str, Tensor]] = {}
    for key, name in places.items():
        if name not in held:
            held[name] = read_weights(inside(index.parent, name, index), files)
        if key not in held[name]:
            raise FileError(f"says that '{key}' is in {name}, and it is not", path=index)
    return {key: held[name][key] for key, name in places.items()}


# --- writing ------------------------------------------------------------------------------------------------------


def write(state: OptimizerState, path: Path, *, base: Path | None, force: bool, options: Mapping[str, Any]) -> None:
    """Write a folder with the state, and ``trainer_state.json`` where all parameters are at one step.

    Raises ``UnrepresentableError`` for what the layout has no place for, and for Adam without betas.
    """
    if base is not None:
        raise OptionError(f"{NAME} writes a whole folder and takes nothing from another ({base})")
    state = apply.on_writing(state, options.get("map"), NAME)
    algorithm = algorithms.of_state(state, options.get("optimizer"))
    masters = {p.name: p[MASTER] for p in state.parameters if MASTER in (p.state or {})}
    bare = replace(state, parameters=tuple(map(_without_master, state.parameters)))
    layout = algorithms.layout_of(bare, algorithm, LAYOUTS)
    algorithms.check_alike(state.groups, algorithm, options)
    powers = len(layout.fields) == 2
    betas = () if not powers else betas_of(options["betas"]) if "betas" in options else _storedbetas_of(state)
    tensors: dict[str, Tensor] = {}
    counts: set[int] = set()
    for parameter in bare.parameters:
        tensors |= _accumulators(parameter, algorithm, layout)
        if powers:
            count = algorithms.steps([parameter]) or 0
            counts.add(count)
            tensors |= _powers(parameter, betas, count)
    with new_folder(path, force=force, replaces=_files(path)) as folder:
        _write_set(folder, "optimizer", INDEX, tensors, bool(masters))
        if masters:
            _write_set(folder, "master_weights", MASTERS, masters, True)
        step = state.global_step if not counts else counts.pop() if len(counts) == 1 else None
        if step is not None:
            folder.write((TRAINER,), [json.dumps({"global_step": step}).encode()])


def _files(folder: Path) -> set[str]:
    """Return the files of a checkpoint that is in a folder, as its indexes name them."""
    found = {INDEX, MASTERS, TRAINER}
    for index in (folder / INDEX, folder / MASTERS):
        with contextlib.suppress(FileError, OSError):
            found.update(member(read_json_object(index), "weight_map", dict, index).values())
    return found


def _without_master(parameter: Parameter) -> Parameter:
    if parameter.state is None:
        return parameter
    return replace(parameter, state={slot: value for slot, value in parameter.state.items() if slot != MASTER})


def _accumulators(parameter: Parameter, algorithm: Algorithm, layout: RuleLayout) -> dict[str, Tensor]:
    """Return the tensors of a parameter's state by their keys in the file."""
    values = algorithms.values_of(parameter, algorithm, layout)
    tensors: dict[str, Tensor] = {}
    for field, slot in layout.fields.items():
        tensor = values.get(slot)
        if not isinstance(tensor, Tensor):
            raise UnrepresentableError(f"'{parameter.name}' has no tensor '{slot}', which the target keeps")
        tensors[f"{parameter.name}/{field}"] = tensor
    return tensors


def _powers(parameter: Parameter, betas: tuple[float, ...], count: int) -> dict[str, Tensor]:
    """Return the powers of the betas after ``count`` steps by their keys in the file, float32 of shape [1]."""
    products = {field: struct.pack("<f", power(beta, count)) for field, beta in zip(POWERS, betas, strict=True)}
    return {f"{parameter.name}/{field}": contiguous("F32", (1,), Memory(data)) for field, data in products.items()}


def _storedbetas_of(state: OptimizerState) -> tuple[float, ...]:
    found = [dict(group.options).get("betas") for group in state.groups if group.count]
    if not found or found[0] is None or any(betas != found[0] for betas in found):
        raise UnrepresentableError(
            "PaddleNLP keeps powers of one pair of betas, and the groups have no betas, or different ones",
            remedy=Remedy("pass the two numbers as {options}", {"options": {"betas": ...}}),
        )
    return betas_of(found[0])


def _write_set(folder: NewFolder, name: str, index: str, tensors: Mapping[str, Tensor], masters: bool) -> None:
    file = f"{name}-00001-of-00001.safetensors"
    folder.write((file,), plain.pack(tensors, {"format": "np"}))
    size = sum(tensor.size for tensor in tensors.values())
    members = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(tensors, file), "master_weights": masters}
    folder.write((index,), [json.dumps(members, indent=2).encode()])
