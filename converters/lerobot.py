"""LeRobot's ``training_state``: ``optimizer_state.safetensors`` with keys like ``state/0/exp_avg``, groups in JSON.

Several optimizers have a folder each. The ids are positions. The layout is that of ``lerobot/optim/optimizers.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, OptionError, UnrepresentableError
from lora_state_format.foreign.state_dict import Found, from_state_dict, to_state_dict
from lora_state_format.foreign.weights import read_weights
from lora_state_format.io import plain
from lora_state_format.io.files import Files, folders_in, reading
from lora_state_format.io.folders import new_folder
from lora_state_format.io.json_files import read_json
from lora_state_format.io.strict_json import utf8
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import Checkpoint, OptimizerState, Scalar
from lora_state_format.model.tensors import Tensor, contiguous
from lora_state_format.registry import Match

NAME: Final = "lerobot"
DESCRIPTION: Final = "LeRobot's training_state: optimizer_state.safetensors and optimizer_param_groups.json"

STATE: Final = "optimizer_state.safetensors"
GROUPS: Final = "optimizer_param_groups.json"


def detect(path: Path) -> Match | None:
    folders = _folders(path)
    return Match(f"{STATE} beside {GROUPS}", path) if folders else None


def _folders(path: Path) -> list[Path]:
    """Return the optimizers' folders: the path itself, its ``training_state``, or one in it for each of several."""
    if not path.is_dir():
        return []
    for folder in (path, path / "training_state"):
        if _holds(folder):
            return [folder]
    root = path / "training_state" if (path / "training_state").is_dir() else path
    return [folder for folder in folders_in(root) if _holds(folder)]


def _holds(folder: Path) -> bool:
    return (folder / STATE).is_file() and (folder / GROUPS).is_file()


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    folders = _folders(match.path)
    if not folders:  # since it was detected
        raise FileError(f"no {STATE} with {GROUPS} next to it", path=match.path)
    with reading(match.path) as files:
        trees = [Found((folder.name,), _tree(folder, files)) for folder in folders]
        model = folders[0].parent / "pretrained_model" / "model.safetensors"
        weights = read_weights(model, files) if model.is_file() and len(folders) == 1 else {}
        return Checkpoint(from_state_dict(*trees, origin={"format": NAME}, resources=(files,)), weights)


def _tree(folder: Path, files: Files) -> dict[str, Any]:
    groups = read_json(folder / GROUPS)
    state: dict[Any, Any] = {}
    for key, tensor in read_weights(folder / STATE, files).items():
        first, *path = key.split("/")
        if first != "state" or len(path) < 2:
            raise FileError(f"has a key {key!r}, where 'state/<id>/<slot>' is expected", path=folder / STATE)
        node = state.setdefault(int(path[0]) if path[0].isdecimal() else path[0], {})
        for step in path[1:-1]:
            node = node.setdefault(step, {})
        node[path[-1]] = tensor
    return {"state": state, "param_groups": groups}


def write(state: OptimizerState, path: Path, *, base: Path | None, force: bool, options: Mapping[str, Any]) -> None:
    """Write a ``training_state`` folder. Raises ``UnrepresentableError`` for what JSON or safetensors cannot hold."""
    if base is not None:
        raise OptionError(f"{NAME} writes a whole folder and takes nothing from another ({base})")
    several = len(state.optimizers) > 1
    replaces = {
        f"{folder.relative_to(path).as_posix()}/{name}" for folder in _folders(path) for name in (STATE, GROUPS)
    }
    with new_folder(path, force=force, replaces={STATE, GROUPS, *replaces}) as folder:
        for index, optimizer in enumerate(state.optimizers):
            place = (optimizer.id or str(index),) if several else ()
            tree = to_state_dict(state, index)
            _check(tree)
            tensors = dict(_flat(tree["state"], ("state",)))
            try:
                text = json.dumps(tree["param_groups"], indent=4, ensure_ascii=False, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise UnrepresentableError(f"an option has no form in JSON: {error}") from None
            folder.write((*place, GROUPS), [utf8(text)])
            folder.write((*place, STATE), plain.pack(tensors, alignment=8))


def _check(tree: Mapping[str, Any]) -> None:
    """Raise ``UnrepresentableError`` for what would be read back as something else, or not at all."""
    listed = [identity for group in tree["param_groups"] for identity in group["params"]]
    for name in (*(tree.keys() - {"state", "param_groups"}), *(tree["state"].keys() - set(listed))):
        raise UnrepresentableError(f"'{name}' belongs to no parameter, and {STATE} has no place for it")
    for identity in listed:
        if isinstance(identity, str) and (identity.isdecimal() or "/" in identity):
            raise UnrepresentableError(f"the id {identity!r} cannot be a part of a key in {STATE}")
    for identity, slots in tree["state"].items():
        _check_keys(slots, f"the state of id {identity!r}")
    for number, group in enumerate(tree["param_groups"]):
        _check_options(group, f"an option of group {number}")


def _check_keys(node: Any, where: str) -> None:
    if not isinstance(node, Mapping):
        return
    if not node:
        raise UnrepresentableError(f"{where} holds nothing, which {STATE} cannot tell from a parameter without state")
    for key, inner in node.items():
        if not isinstance(key, str) or "/" in key:
            raise UnrepresentableError(f"{where} has a slot {key!r}, which cannot be a part of a key in {STATE}")
        _check_keys(inner, where)


def _check_options(node: Any, where: str) -> None:
    if isinstance(node, Mapping) and not all(isinstance(key, str) for key in node):
        raise UnrepresentableError(f"{where} is a mapping with keys that are no texts, which JSON does not have")
    if isinstance(node, (Mapping, list, tuple)):
        for inner in node.values() if isinstance(node, Mapping) else node:
            _check_options(inner, where)


def _flat(node: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Mapping):
        for key, inner in node.items():
            yield from _flat(inner, (*path, key))
    elif isinstance(node, Scalar):
        yield "/".join(map(str, path)), contiguous(node.dtype, (), Memory(node.data))
    elif isinstance(node, Tensor):
        yield "/".join(map(str, path)), node
    else:
        raise UnrepresentableError(f"{'/'.join(map(str, path))} is a {type(node).__name__}; {STATE} holds tensors only")
