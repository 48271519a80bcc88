"""What ``torch.save(optimizer.state_dict(), ...)`` wrote: bare, inside another checkpoint, or in a Trainer's folder.

Three places are known: a file of ``torch.save`` with one or more state dicts somewhere in it; the folder that
``transformers.Trainer`` writes (``optimizer.pt`` beside weights, configs and ``trainer_state.json``); the archive of
stable-baselines3, a zip whose members are such files themselves. torch is not imported and nothing is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, OptionError, UnrepresentableError
from lora_state_format.foreign import pickles
from lora_state_format.foreign.state_dict import Found, find, from_state_dict, to_state_dict
from lora_state_format.foreign.torch_save import save
from lora_state_format.foreign.zips import Archive, Member
from lora_state_format.io.files import inside
from lora_state_format.io.json_files import read_json_object
from lora_state_format.io.safetensors import read_header
from lora_state_format.model.sources import File
from lora_state_format.model.states import Checkpoint, OptimizerState, Value
from lora_state_format.model.tensors import Tensor
from lora_state_format.registry import Match

NAME: Final = "torch_optimizer"
DESCRIPTION: Final = "optimizer.pt, any other torch.save file with an optimizer in it, a Trainer's checkpoint folder"

OPTIMIZER: Final = "optimizer.pt"
TRAINER: Final = "trainer_state.json"
CONFIGS: Final = ("adapter_config.json", "config.json")
WEIGHTS: Final = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)
"""Files with the parameters' own values; the first of them that lies beside the optimizer is taken."""

MEMBER: Final = "optimizer.pth"
"""How the members of stable-baselines3's archives end that hold an optimizer; ``policy.pth`` holds the parameters."""

STATE_DICTS: Final = ("state_dict", "model_state_dict", "model", "policy.pth")
"""Where the parameters lie in a checkpoint that holds the optimizer too."""


def detect(path: Path) -> Match | None:
    if path.is_dir():
        if not (path / OPTIMIZER).is_file():
            return None
        trainer = (path / TRAINER).is_file()
        reason = f"{OPTIMIZER} beside {TRAINER}" if trainer else f"a folder with {OPTIMIZER}"
        return Match(reason, path / OPTIMIZER, generic=not trainer)
    with File(path) as file:
        kind = pickles.container(file)
        try:
            if kind == "zip archive" and _members(file):
                return Match(f"a zip archive with members called *{MEMBER}", path)
        except FileError:
            pass  # perhaps another converter knows it; if none does, reading it says what is wrong
    return Match(f"a {kind}, as torch.save writes them", path, generic=True) if kind else None


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Return the state, and what lies beside it. Several optimizers in one file make up one state.

    Raises ``FileError`` for a file that is damaged or holds no optimizer, ``RefusedError`` for one that would need
    code to be run, ``UnrepresentableError`` for a value without a form.
    """
    path = match.path
    beside = {name: path.parent / name for name in (*WEIGHTS, *CONFIGS, TRAINER) if (path.parent / name).is_file()}
    files = [File(path)]
    try:
        tree = _tree(files[0], path)
        found = find(tree)
        if not found:
            raise FileError("no optimizer's state dict in it (a dict with state and param_groups)", path=path)
        weights: Mapping[str, Tensor] = _state_dict(tree)
        if not weights and (name := next((name for name in WEIGHTS if name in beside), None)):
            weights = _weights(beside[name], files)
        elif not weights:
            weights = _namesake(path, files)
        state = from_state_dict(
            *found,
            origin=_origin(found, beside),
            global_step=_global_step(tree, beside),
            resources=tuple(files),
        )
    except BaseException:
        for file in files:
            file.close()
        raise
    return Checkpoint(state, weights, {name: beside[name] for name in CONFIGS if name in beside})


def write(state: OptimizerState, path: Path, *, base: Path | None, force: bool, options: Mapping[str, Any]) -> None:
    """Write ``optimizer.pt``: what the optimizer's ``state_dict()`` was, for ``torch.load(weights_only=True)``.

    Raises ``UnrepresentableError`` for several optimizers, for parameters that are in no group, and for values that
    torch could not load back.
    """
    if base is not None:
        raise OptionError(f"{NAME} writes a whole file and takes nothing from another ({base})")
    if len(state.optimizers) != 1:
        raise UnrepresentableError(f"the state of {len(state.optimizers)} optimizers; {OPTIMIZER} holds that of one")
    save(to_state_dict(state), path, force=force)


def _members(file: File) -> dict[str, Member]:
    """Return the members of a stable-baselines3 archive: nothing if the file is none."""
    if pickles.container(file) != "zip archive":
        return {}
    archive = Archive(file, file.path)
    if not any(name.endswith(MEMBER) for name in archive):
        return {}
    return {name: archive[name] for name in archive if name.endswith((MEMBER, "policy.pth"))}


def _tree(file: File, path: Path) -> Any:
    members = _members(file)
    if members:
        return {name: pickles.load(member, f"{path}:{name}").value for name, member in members.items()}
    tree = pickles.load(file).value
    if isinstance(tree, dict) and "ds_version" in tree:
        raise FileError("one rank's part of a DeepSpeed checkpoint: convert the folder that holds it", path=path)
    return tree


def _state_dict(tree: Any) -> dict[str, Tensor]:
    """Return the parameters that a checkpoint holds beside the optimizer, if it has one model."""
    inside = [value for value in tree.values() if isinstance(value, dict)] if isinstance(tree, dict) else []
    found = [part[key] for part in (tree, *inside) if isinstance(part, dict) for key in STATE_DICTS if key in part]
    models = [
        model
        for model in found
        if isinstance(model, dict) and model and all(isinstance(value, Tensor) for value in model.values())
    ]
    return models[0] if len(models) == 1 else {}


def _weights(path: Path, files: list[File]) -> Mapping[str, Tensor]:
    """Return the tensors of a weights file by their own keys; of all files that an index names."""
    if path.suffix == ".json":
        index = read_json_object(path).get("weight_map")
        places = {inside(path.parent, name, path) for name in index.values()} if isinstance(index, dict) else ()
        return {key: tensor for place in sorted(places) for key, tensor in _weights(place, files).items()}
    file = File(path)
    files.append(file)
    if path.suffix == ".safetensors":
        return read_header(file).tensors
    tree = pickles.load(file).value
    return {key: value for key, value in tree.items() if isinstance(value, Tensor)} if isinstance(tree, dict) else {}


def _namesake(path: Path, files: list[File]) -> Mapping[str, Tensor]:
    """Return the parameters in the file that is named ``model`` where this one is named ``optimizer``, if any."""
    model = path.with_name(re.sub("optim(izer)?", "model", path.name, count=1))
    if model == path or not model.is_file():
        return {}
    try:
        return _weights(model, files)
    except FileError:
        return {}  # a whole module, perhaps, which cannot be read without running code: nobody asked for it


def _global_step(tree: Any, beside: Mapping[str, Path]) -> int | None:
    source = read_json_object(beside[TRAINER]) if TRAINER in beside else tree
    step = source.get("global_step") if isinstance(source, dict) else None
    return step if type(step) is int else None


def _origin(found: list[Found], beside: Mapping[str, Path]) -> dict[str, Value]:
    """Return what wrote the state, as far as its surroundings tell."""
    origin: dict[str, Value] = {"format": NAME}
    if len(found) == 1 and found[0].path:
        origin["place"] = found[0].where
    for name, package in (("adapter_config.json", "peft"), ("config.json", "transformers")):
        version = read_json_object(beside[name]).get(f"{package}_version") if name in beside else None
        if isinstance(version, str):
            origin[package] = version
    return origin
