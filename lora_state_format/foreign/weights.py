"""Named tensors that may be a model's parameters: in a checkpoint's own tree, and in the files next to it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError
from lora_state_format.foreign import pickles
from lora_state_format.foreign.pickles import Foreign
from lora_state_format.foreign.state_dict import SEARCH_DEPTH, is_state_dict
from lora_state_format.io.files import Files, PooledFile, inside
from lora_state_format.io.json_files import read_json_object
from lora_state_format.io.safetensors import read_header
from lora_state_format.model.sources import File
from lora_state_format.model.states import TOP, Weights
from lora_state_format.model.tensors import Tensor

__all__ = ["in_tree", "near", "next_to", "read_weights", "weights_at"]

STANDARD: Final = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model_fsdp.bin",
)
"""Files that are written together with the optimizer's, the first that fits before the others."""

SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

NO_MODEL: Final = re.compile(r"optim|sched|rng|random_state|scaler|training_args|sampler|trainer_state")
"""In the names of files that lie next to an optimizer and hold no model."""

MAX_NEIGHBOURS: Final = 16
"""Other files that are looked into: a folder with more is a collection, and none of them is the optimizer's."""


def read_weights(path: Path, files: Files) -> dict[str, Tensor]:
    """Return the tensors of a weights file, safetensors or ``torch.save``, under its keys and in its order."""
    if path.suffix == ".safetensors":
        with File(path) as file:
            header = read_header(file)
        return {key: _moved(tensor, files[path]) for key, tensor in header.tensors.items()}
    return _tensors(pickles.load(files[path], path).value)


def _moved(tensor: Tensor, source: PooledFile) -> Tensor:
    return replace(tensor, pieces=tuple(piece._replace(source=source) for piece in tensor.pieces))


def _tensors(tree: Any) -> dict[str, Tensor]:
    if not isinstance(tree, Mapping):
        return {}
    return {key: value for key, value in tree.items() if isinstance(key, str) and isinstance(value, Tensor)}


def in_tree(tree: Any, where: str = "") -> tuple[Weights, ...]:
    """Return every mapping of names to tensors in a checkpoint's tree, but for the optimizers' state dicts.

    ``where`` is what the tree itself is called.
    """
    return tuple(_search(tree, (where,) if where else (), {}))


def _search(node: Any, path: tuple[str, ...], seen: dict[int, Any]) -> Iterator[Weights]:
    if isinstance(node, Foreign) and node.parts and id(node) not in seen and (tensors := _of_module(node)):
        seen[id(node)] = node
        yield _found(path, tensors)
    if not isinstance(node, (Mapping, list, tuple)) or id(node) in seen or is_state_dict(node):
        return
    seen[id(node)] = node  # each once, however often it is referred to
    if tensors := _tensors(node):
        yield _found(path, tensors)
    if len(path) <= SEARCH_DEPTH:
        for key, inner in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from _search(inner, (*path, str(key)), seen)


def _found(path: tuple[str, ...], tensors: dict[str, Tensor]) -> Weights:
    """Return tensors of a tree as candidates. An average of the weights has their names, and other values."""
    return Weights(".".join(path) or TOP, tensors, ordered=True, own=not any("ema" in p for p in path))


def _of_module(whole: Foreign) -> dict[str, Tensor]:
    """Return the parameters of a module that was pickled as an object, as its ``named_parameters()`` would."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    waiting = [("", whole)]
    while waiting:
        prefix, module = waiting.pop()
        if id(module) in seen or module.parts is None:
            continue
        seen.add(id(module))
        parameters, modules = module.parts
        found |= {f"{prefix}{name}": value for name, value in parameters.items() if isinstance(value, Tensor)}
        below = [(f"{prefix}{name}.", inner) for name, inner in modules.items() if isinstance(inner, Foreign)]
        waiting += reversed(below)
        if len(prefix) > MAX_NAME:
            return {}
    return found


MAX_NAME: Final = 4096
"""Characters of a parameter's name in a module: a tree that is deeper is none of a model."""


def next_to(path: Path, files: Files) -> tuple[list[tuple[Weights, ...]], list[str]]:
    """Return what may be the model in the files next to an optimizer's, the likeliest first, and what cannot be read.

    Looked into are the files that frameworks write together with an optimizer's, those that are called as this one is
    but for the word ``optimizer``, and, where there is none of them, all other files of weights. The values of those
    are not known to be of the state's moment.
    """
    skipped: list[str] = []
    likely = dict.fromkeys((*(path.with_name(name) for name in STANDARD), *_namesakes(path)))
    tiers = [found for file in likely if file != path and file.is_file() and (found := _read(file, files, skipped))]
    if not tiers:
        others = sorted(
            file
            for file in path.parent.iterdir()
            if (file.suffix in SUFFIXES or (file.suffix == path.suffix and _is_saved(file)))
            and file not in {path, *likely}
            and not NO_MODEL.search(file.name.lower())
            and file.is_file()
        )
        if len(others) <= MAX_NEIGHBOURS:
            found = tuple(weights for file in others for weights in _read(file, files, skipped, own=False))
            tiers = [found] if found else []
    return tiers, skipped


_WORD: Final = re.compile("optim(izer)?|^opt(?=[^a-z])")
_LEFT_OUT: Final = re.compile("[._-]optim(izer)?(?=[._-]|$)|^optim(izer)?[._-]")


def _namesakes(path: Path) -> list[Path]:
    """Return what a model may be called whose optimizer is called so: by another word in its place, or by none."""
    names = [_WORD.sub(word, path.name, count=1) for word in ("model", "params", "weights", "net")]
    found = [path.with_name(name) for name in (*names, _LEFT_OUT.sub("", path.name, count=1)) if name]
    folder = path.parent
    if folder.name and (other := _WORD.sub("model", folder.name, count=1)) != folder.name:
        found.append(folder.with_name(other) / path.name)
    return found


def _is_saved(path: Path) -> bool:
    """Return whether a file looks like one of ``torch.save``, whatever it is called."""
    if not path.is_file():
        return False
    with File(path) as file:
        return pickles.container(file) is not None


def near(path: Path, files: Files, skipped: list[str]) -> tuple[list[tuple[Weights, ...]], Path]:
    """Return what may be the model of an optimizer with nothing next to it, and the folder where that is.

    Looked into are a folder ``model``, and the folder above. Nothing says that these weights are of the state's moment.
    """
    path = path.absolute()
    for folder in (path.with_name("model"), path.parent.parent):
        there = [folder / name for name in STANDARD if (folder / name).is_file()]
        if tiers := [found for file in there if (found := _read(file, files, skipped, own=False))]:
            place = os.path.relpath(folder, path.parent)
            return [tuple(replace(w, where=f"{place}/{w.where}") for w in tier) for tier in tiers], folder
    return [], path.parent


def weights_at(path: Path, files: Files) -> tuple[Weights, ...]:
    """Return what may be a model in a file of weights, or in the first such file of a folder.

    Raises ``FileError`` for a file that cannot be read or holds none, and ``FileNotFoundError`` for such a folder.
    """
    if path.is_dir():
        file = next((path / name for name in STANDARD if (path / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{path}: no weights in this folder; looked for {', '.join(STANDARD)}")
        path = file
    elif not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder of weights")
    found = _opened(path, files)
    if not found:
        raise FileError("holds no tensors under names", path=path)
    return found


def _read(path: Path, files: Files, skipped: list[str], *, own: bool = True) -> tuple[Weights, ...]:
    """Return what may be a model in a file; where it cannot be read, say so in ``skipped`` and return nothing."""
    try:
        return tuple(replace(found, own=own) for found in _opened(path, files))
    except (FileError, OSError) as error:
        skipped.append(f"{error}; it was skipped")
        return ()


def _opened(path: Path, files: Files) -> tuple[Weights, ...]:
    if path.suffix == ".json":
        parts = _parts(path)
        tensors = {key: tensor for part in parts for key, tensor in read_weights(part, files).items()}
        return (Weights(path.name, tensors, ordered=all(part.suffix != ".safetensors" for part in parts)),)
    if path.suffix == ".safetensors":
        return (Weights(path.name, read_weights(path, files)),)
    return in_tree(pickles.load(files[path], path).value, path.name)


def _parts(path: Path) -> list[Path]:
    """Return the files that an index of shards names, in the order in which the model was cut.

    Raises ``FileError`` for one outside of its folder.
    """
    index = read_json_object(path).get("weight_map")
    return sorted({inside(path.parent, name, path) for name in index.values()}) if isinstance(index, dict) else []
