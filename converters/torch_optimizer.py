"""What ``torch.save(optimizer.state_dict(), ...)`` wrote: bare, inside another checkpoint, or in a Trainer's folder.

Three places are known: a file of ``torch.save`` with one or more state dicts somewhere in it; the folder that
``transformers.Trainer`` writes (``optimizer.pt`` beside weights, configs and ``trainer_state.json``); the archive of
stable-baselines3, a zip whose members are such files themselves. torch is not imported and nothing is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, OptionError, UnrepresentableError
from lora_state_format.foreign import keyed, pickles
from lora_state_format.foreign.deepspeed import check_whole
from lora_state_format.foreign.elsewhere import is_trainer
from lora_state_format.foreign.pickles import Foreign
from lora_state_format.foreign.state_dict import Found, find, from_state_dict, to_state_dict
from lora_state_format.foreign.torch_save import save
from lora_state_format.foreign.weights import in_tree, near, next_to
from lora_state_format.foreign.whole import names_in_models
from lora_state_format.foreign.zips import Archive, Member
from lora_state_format.io.files import reading
from lora_state_format.io.json_files import read_json_object
from lora_state_format.model.sources import File, Source
from lora_state_format.model.states import Checkpoint, OptimizerState, Value, Weights
from lora_state_format.naming.sources import stem_of
from lora_state_format.registry import Match

NAME: Final = "torch_optimizer"
DESCRIPTION: Final = "optimizer.pt, any other torch.save file with an optimizer in it, a Trainer's checkpoint folder"

OPTIMIZER: Final = "optimizer.pt"
TARGET: Final = OPTIMIZER
TRAINER: Final = "trainer_state.json"
CONFIGS: Final = ("adapter_config.json", "config.json")

MEMBER: Final = "optimizer.pth"
"""How the members of stable-baselines3's archives end that hold an optimizer; others hold parameters."""


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
            if kind == "zip archive" and _members(file, path):
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
    with reading() as files:
        tree = _tree(files[path], path)
        found = find(tree)
        if not found:
            whole = next(_whole_optimizers(tree), None)
            told = (
                f"; '{whole[0]}' is a whole {whole[1].module}.{whole[1].name}: save its state_dict()" if whole else ""
            )
            raise FileError(f"no optimizer's state dict in it (a dict with state and param_groups){told}", path=path)
        check_whole(tree, [item.tree for item in found], path)
        inside = in_tree(tree)
        found = [_with_names(item, inside, len(found) > 1) for item in found]
        tiers, skipped = next_to(path, files)
        folder = path.parent
        if not inside and not tiers and not any((folder / name).is_file() for name in CONFIGS):
            tiers, folder = near(path, files, skipped)
        beside = {**_beside(folder, CONFIGS, skipped), **_beside(path.parent, (TRAINER,), skipped)}
        state = from_state_dict(
            *found,
            origin=_origin(found, beside),
            global_step=_global_step(tree, beside),
            resources=(files,),
        )
        candidates = (inside, *tiers) if inside else tuple(tiers)
        nearest = candidates[0] if candidates else ()
        return Checkpoint(
            state,
            nearest[0].tensors if len(nearest) == 1 and nearest[0].own else {},
            {name: folder / name for name in CONFIGS if name in beside},
            candidates,
            tuple(skipped),
        )


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


def _with_names(found: Found, models: Sequence[Weights], several: bool) -> Found:
    """Return a state dict with the names that models in the same file give the parameters of a whole optimizer.

    Of several optimizers each gets in front what its model is called.
    """
    named = names_in_models(found.whole, models) if found.whole else None
    if named is None:
        return found
    where, names = named
    prefix = f"{stem_of(where)}." if several and stem_of(where) else ""
    stated = {identity: prefix + name for identity, name in names.items()}
    return replace(found, around=({"param_names": stated}, *found.around))


def _whole_optimizers(tree: Any) -> Iterator[tuple[str, Foreign]]:
    """Yield, by their keys, what seem to be pickled optimizers and have no state as torch's have it."""
    for key, value in tree.items() if isinstance(tree, Mapping) else [("the file", tree)]:
        if isinstance(value, Foreign) and "optim" in f"{value.module}.{value.name}".lower():
            yield str(key), value


def _members(file: Source, path: Path) -> dict[str, Member]:
    """Return the members of a stable-baselines3 archive that torch wrote: nothing if the file is none."""
    if pickles.container(file) != "zip archive":
        return {}
    archive = Archive(file, path)
    if not any(name.endswith(MEMBER) for name in archive):
        return {}
    return {name: archive[name] for name in archive if name.endswith(".pth")}


def _tree(file: Source, path: Path) -> Any:
    members = {} if is_trainer(file) else _members(file, path)
    if members:
        return {name: pickles.load(member, f"{path}:{name}").value for name, member in members.items()}
    if is_trainer(file):
        raise FileError(
            "it only says that the optimizer was saved as training_state/optimizer.safetensors next to it, which is "
            "not there",
            path=path,
        )
    tree = pickles.load(file, path).value
    models = [value for value in tree.values() if isinstance(value, Mapping)] if isinstance(tree, Mapping) else []
    if any(str(name).endswith(keyed.FLAT) for model in models for name in model):
        raise keyed.local_state(path)
    if isinstance(tree, dict) and "ds_version" in tree:
        raise FileError("one rank's part of a DeepSpeed checkpoint: convert the folder that holds it", path=path)
    return tree


def _beside(folder: Path, names: Sequence[str], skipped: list[str]) -> dict[str, dict[str, Any]]:
    """Return the JSON files of these names in a folder; ``skipped`` gets what cannot be read."""
    found = {}
    for name in names:
        if (folder / name).is_file():
            try:
                found[name] = read_json_object(folder / name)
            except (FileError, OSError) as error:
                skipped.append(f"{error}; it was skipped")
    return found


def _global_step(tree: Any, beside: Mapping[str, Mapping[str, Any]]) -> int | None:
    source = beside.get(TRAINER, tree)
    step = source.get("global_step") if isinstance(source, Mapping) else None
    return step if type(step) is int else None


def _origin(found: list[Found], beside: Mapping[str, Mapping[str, Any]]) -> dict[str, Value]:
    """Return what wrote the state, as far as its surroundings tell."""
    origin: dict[str, Value] = {"format": NAME}
    if len(found) == 1 and found[0].path:
        origin["place"] = found[0].where
    for name, package in (("adapter_config.json", "peft"), ("config.json", "transformers")):
        version = beside.get(name, {}).get(f"{package}_version")
        if isinstance(version, str):
            origin[package] = version
    return origin
