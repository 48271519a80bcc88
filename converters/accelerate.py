"""What accelerate's ``save_state`` writes: ``optimizer.bin``, ``optimizer_1.bin``, ... beside the models' weights.

Without FSDP each is a positional state dict; with FSDP's full state dict (the Trainer writes that too, into its
checkpoint folder) its ids are names. The file names are those of ``accelerate/checkpointing.py`` and
``accelerate/utils/fsdp_utils.py``. Its sharded folders (``optimizer_0``) are DCP's; without DCP each rank saves a file
of its own, whose tensors say where they belong (``foreign.dtensors``) where FSDP2 wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, OptionError, RefusedError
from lora_state_format.foreign import dtensors, keyed, pickles
from lora_state_format.foreign.state_dict import Found, from_state_dict, is_state_dict, to_state_dict
from lora_state_format.foreign.torch_save import pack, save
from lora_state_format.foreign.trees import member
from lora_state_format.foreign.weights import read_weights
from lora_state_format.io.files import Files, names_in, reading
from lora_state_format.io.folders import new_folder, sweep
from lora_state_format.io.json_files import read_json_object
from lora_state_format.model.states import Checkpoint, OptimizerState
from lora_state_format.model.tensors import Tensor
from lora_state_format.naming.names import split_adapter
from lora_state_format.registry import Match

NAME: Final = "accelerate"
DESCRIPTION: Final = "a folder of accelerate's save_state, or of FSDP's full state dict: optimizer.bin, optimizer_1.bin"
OPTIONS: Final = {"fsdp": "write FSDP's full state dict, whose ids are names"}

_OPTIMIZER: Final = re.compile(r"optimizer(?:_(\d+))?\.bin")
_RANKS: Final = re.compile(r"(optimizer|pytorch_model_fsdp)_(\d+)_rank(\d+)\.bin")
_MODELS: Final = ("model.safetensors", "pytorch_model.bin", "pytorch_model_fsdp.bin")
_OTHERS: Final = ("train_state.json", "pytorch_lora_weights.safetensors")
"""Signs of kohya's scripts and of diffusers', which use accelerate and have converters of their own."""


def detect(path: Path) -> Match | None:
    if not path.is_dir() or any((path / name).exists() for name in _OTHERS):
        return None
    if _of_ranks("optimizer", path):
        return Match("FSDP state of single ranks", path)
    files = _files(path)
    return Match(f"{len(files)} optimizer.bin of accelerate or FSDP", path) if files else None


def _files(path: Path) -> list[Path]:
    found = {int(m[1] or 0): file for file in path.iterdir() if (m := _OPTIMIZER.fullmatch(file.name))}
    return [found[number] for number in sorted(found)]


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Read the state. ``options`` are for writing.

    Raises:
        FileError: files of ranks that are not all there, or not of one save.
        RefusedError: files with one rank's shards, which do not say where they belong.
    """
    path = match.path
    with reading(match.path) as files:
        ranks = _of_ranks("optimizer", path)
        found = [Found((f"optimizer_{index}",), _joined(of, files)) for index, of in sorted(ranks.items())] or [
            Found((place.name,), pickles.load(files[place], place).value) for place in _files(path)
        ]
        models = _of_ranks("pytorch_model_fsdp", path)
        if len(models) == 1:
            (of,) = models.values()
            weights = dtensors.tensors([_loaded(place, files) for place in of], of)
        else:
            weights = _weights(path, files, len(found))
        trainer = path / "trainer_state.json"
        step = read_json_object(trainer).get("global_step") if trainer.is_file() else None
        state = from_state_dict(*found, origin={"format": NAME}, global_step=step, resources=(files,))
        configs = {name: path / name for name in ("adapter_config.json", "config.json") if (path / name).is_file()}
        return Checkpoint(keyed.named(state, weights=weights), weights, configs)


def _of_ranks(kind: str, path: Path) -> dict[int, list[Path]]:
    """Return the files that single ranks wrote of each model or optimizer, in the order of the ranks."""
    found: dict[int, dict[int, Path]] = {}
    for name in names_in(path):
        if (match := _RANKS.fullmatch(name)) and match[1] == kind:
            found.setdefault(int(match[2]), {})[int(match[3])] = path / name
    return {index: [of[rank] for rank in sorted(of)] for index, of in found.items()}


def _joined(paths: list[Path], files: Files) -> dict[str, Any]:
    """Return an optimizer's state dict out of those of all ranks."""
    trees = [_loaded(path, files) for path in paths]
    for path, tree in zip(paths, trees, strict=True):
        if not is_state_dict(tree):
            raise FileError("holds no optimizer's state dict", path=path)
    if not any(dtensors.is_dtensor(value) for slots in trees[0]["state"].values() for value in slots.values()):
        raise RefusedError(
            f"one of {len(paths)} files with the shards of single ranks, which do not say how they fit together: load "
            "them where they were written, and save with FSDP's full or sharded state dict",
            path=paths[0],
        )
    return dtensors.joined(trees, paths)


def _loaded(path: Path, files: Files) -> dict[str, Any]:
    return member({path.name: pickles.load(files[path], path).value}, path.name, dict, path)


def _weights(path: Path, files: Files, optimizers: int) -> dict[str, Tensor]:
    """Return the model's tensors; of an adapter only, where the model has one: what it was put on is frozen.

    Which of several optimizers trains which model is not said, so their weights are not taken for names.
    """
    place = next((path / name for name in _MODELS if (path / name).is_file()), None)
    if place is None or optimizers > 1:
        return {}
    weights = read_weights(place, files)
    return {name: tensor for name, tensor in weights.items() if split_adapter(name)} or weights


def write(state: OptimizerState, path: Path, *, base: Path | None, force: bool, options: Mapping[str, Any]) -> None:
    """Write ``optimizer.bin``, and ``optimizer_1.bin`` and so on for further optimizers, into a folder.

    One file is put into a folder that has other files too. Several appear together, so their folder may hold nothing
    but what they replace. Raises ``TargetExistsError`` otherwise, and unless ``force``.
    """
    if base is not None:
        raise OptionError(f"{NAME} writes whole files and takes nothing from another ({base})")
    names = [f"optimizer{f'_{index}' if index else ''}.bin" for index in range(len(state.optimizers))]
    trees = [
        keyed.by_name(state, index) if options.get("fsdp") else to_state_dict(state, index)
        for index in range(len(names))
    ]
    sweep(path)
    held = {file.name for file in _files(path)} if path.is_dir() else set()
    if path.is_dir() and len(names) == 1 and held <= {*names}:
        save(trees[0], path / names[0], force=force)
        return
    with new_folder(path, force=force, replaces=held) as folder:
        for name, tree in zip(names, trees, strict=True):
            folder.write((name,), pack(tree))
