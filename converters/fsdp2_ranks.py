"""Rank files of FSDP2, as trainers of reinforcement learning write them: ``optim_world_size_N_rank_R.pt``.

Each rank saves its optimizer's state dict with ``torch.save``, and the model's next to it. Tensors are pickled as
``DTensor``: the rank's part, the shape of the whole, the mesh of ranks and how the whole lies on it. They are put
together here along the axes that they were cut, by FSDP2 and by tensor parallelism; of replicas the first is taken. The
optimizer has ids; the model's files say which names stand in which order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, RefusedError
from lora_state_format.foreign import dtensors, keyed, pickles
from lora_state_format.foreign.state_dict import from_state_dict, is_state_dict
from lora_state_format.foreign.trees import member
from lora_state_format.io.files import FEW, Files, first_look, names_in, reading
from lora_state_format.model.states import Checkpoint, Value
from lora_state_format.model.tensors import Tensor
from lora_state_format.registry import Match

NAME: Final = "fsdp2_ranks"
DESCRIPTION: Final = "a folder of FSDP2's rank files: optim_world_size_N_rank_R.pt, as RL trainers write them"

_FILE: Final = re.compile(r"(optim|model)_world_size_(\d+)_rank_(\d+)\.pt")


def detect(path: Path) -> Match | None:
    if (match := _FILE.fullmatch(path.name)) and match[1] == "optim" and path.is_file():
        return Match("an optimizer file of one of FSDP's ranks", path)
    if path.is_dir() and any((m := _FILE.fullmatch(name)) and m[1] == "optim" for name in names_in(path)):
        return Match("optim_world_size_*_rank_*.pt, one per rank", path)
    return None


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Read the folder.

    Raises:
        FileError: files are missing, or not of one save.
        RefusedError: one rank's file alone, or tensors that lie on their mesh in a way that is not read.
    """
    folder = _folder(match)
    optimizers, models = _paths("optim", folder), _paths("model", folder)
    with reading(folder) as files:
        tree = dtensors.joined([_optimizer(path, files) for path in optimizers], optimizers)
        weights = dtensors.tensors([_model(path, files) for path in models], models)
        return _checkpoint(tree, weights, {"ranks": len(optimizers)}, files)


def glance(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Return what the folder holds by the names of all files and those of the first rank.

    A folder of up to ``FEW`` ranks is read as a whole. Raises what ``read`` raises, for what is seen.
    """
    folder = _folder(match)
    optimizers, models = _paths("optim", folder), _paths("model", folder)
    if len(optimizers) <= FEW:
        return read(match, options)
    with reading(folder) as files:
        first = _optimizer(optimizers[0], files)
        state = {
            identity: {slot: dtensors.unread(value, optimizers[0], folder) for slot, value in slots.items()}
            for identity, slots in first["state"].items()
        }
        weights = {
            str(name): dtensors.unread(value, path, folder)
            for path in models[:1]
            for name, value in _model(path, files).items()
        }
        seen = first_look(len(files), len(optimizers) + len(models))
        origin: dict[str, Value] = {"ranks": len(optimizers), "first_look": seen}
        return _checkpoint({**first, "state": state}, weights, origin, files)


def _checkpoint(
    tree: Mapping[str, Any], found: Mapping[str, Any], origin: Mapping[str, Value], files: Files
) -> Checkpoint:
    weights = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    result = from_state_dict(tree, origin={"format": NAME, **origin}, resources=(files,))
    shapes = [tensor.shape for tensor in weights.values()]
    if len(result.groups) == 1 and all(a in (None, b) for a, b in zip_longest(result.shapes(), shapes, fillvalue=())):
        # One group over all of the model's parameters, which the model's files list in the same order.
        name_of = dict(zip(result.ids, weights, strict=True))
        result = replace(
            result,
            ids=tuple(name_of.values()),
            entries={name_of[identity]: entry for identity, entry in result.entries.items()},
        )
    return Checkpoint(keyed.named(result, weights=weights), weights)


def _folder(match: Match) -> Path:
    if match.path.is_file():
        raise RefusedError(
            f"the file of one of FSDP's ranks: give the folder, {match.path.parent.name}, which has those of all ranks",
            path=match.path,
        )
    return match.path


def _optimizer(path: Path, files: Files) -> Any:
    """Return the state dict that a rank saved."""
    tree = pickles.load(files[path], path).value
    if not is_state_dict(tree):
        raise FileError("holds no optimizer's state dict", path=path)
    return tree


def _model(path: Path, files: Files) -> dict[Any, Any]:
    """Return the weights that a rank saved."""
    return member({"model": pickles.load(files[path], path).value}, "model", dict, path)


def _paths(kind: str, folder: Path) -> list[Path]:
    """Return the files of a kind, in the order of their ranks."""
    found: dict[int, set[int]] = {}
    for name in names_in(folder):
        if (match := _FILE.fullmatch(name)) and match[1] == kind:
            found.setdefault(int(match[2]), set()).add(int(match[3]))
    if len(found) > 1:
        raise FileError(f"has files of runs with {' and '.join(map(str, sorted(found)))} ranks", path=folder)
    for world, ranks in found.items():
        paths = [folder / f"{kind}_world_size_{world}_rank_{rank}.pt" for rank in range(world)]
        for rank, path in enumerate(paths):
            if rank not in ranks:
                raise FileError(f"missing: there were {world} ranks", path=path)
        return paths
    return []
