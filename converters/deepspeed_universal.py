"""DeepSpeed universal checkpoints, as ``ds_to_universal.py`` writes them: ``zero/<parameter>/<slot>.pt``.

From stages 1 and 2 each file holds ``{"cat_dim": 0, "param": tensor}`` and ``step.pt`` a number; from stage 3 a flat
tensor, and the step stands in ``optimizer_state.pt`` alone. Groups, names and shapes come from the
``*_model_states.pt`` beside ``zero``. The layout is that of DeepSpeed's ``checkpoint/ds_to_universal.py`` and
``checkpoint/universal_checkpoint.py``.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, OptionError, Remedy, UnrepresentableError
from lora_state_format.foreign import keyed, pickles
from lora_state_format.foreign.masters import check_masters
from lora_state_format.foreign.pickles import Record
from lora_state_format.foreign.state_dict import from_state_dict
from lora_state_format.foreign.torch_save import pack
from lora_state_format.foreign.trees import member
from lora_state_format.io.atomic import refuse_existing, write_file
from lora_state_format.io.files import Files, inside, is_plain, reading
from lora_state_format.io.folders import new_folder, sweep
from lora_state_format.model.sources import bytes_of
from lora_state_format.model.states import Checkpoint, OptimizerState, Parameter, Scalar, Slot, Value, scalar_of
from lora_state_format.model.tensors import Box, Piece, Run, Tensor
from lora_state_format.optimizers.roles import MASTER as MASTER_SLOT
from lora_state_format.registry import Match

NAME: Final = "deepspeed_universal"
DESCRIPTION: Final = "a DeepSpeed universal checkpoint: zero/<parameter>/exp_avg.pt and zero/optimizer_state.pt"
OPTIONS: Final = {"masters": "keep the fp32 master weights as a slot 'master_param'"}

MASTER: Final = "fp32"
"""What the files of the master weights are called."""

LATEST: Final = "latest_universal"
"""The file that names the tag to load."""

_MIXED: Final = (
    "ds_to_universal.py mixes up parameters of runs with round_robin_gradients, or the files are not of one save; "
    "convert the ZeRO folder itself, which is read right"
)
_GLOBAL: Final = ("zero", "optimizer_state.pt")
_MODEL: Final = re.compile(r"(?:zero_pp_rank_0_)?mp_rank_\d+(?:_\d+)?_model_states\.pt")


def detect(path: Path) -> Match | None:
    folder = _folder(path)
    return Match("a folder zero with an optimizer_state.pt", folder) if folder else None


def _folder(path: Path) -> Path | None:
    if not path.is_dir():
        return None
    latest = path / LATEST
    tag = latest.read_text(errors="replace").strip() if latest.is_file() and latest.stat().st_size < 1024 else ""
    inner = [path / tag] if is_plain(tag) else []
    return next((folder for folder in (path, *inner) if folder.joinpath(*_GLOBAL).is_file()), None)


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    files = Files(match.path)
    try:
        return _read(match.path, files, bool(options.get("masters")))
    except BaseException:
        files.close()
        raise


def _read(folder: Path, files: Files, masters: bool) -> Checkpoint:
    place = folder.joinpath(*_GLOBAL)
    common = pickles.load(files[place], place).value
    models = _models(folder, files)
    shapes, weights, tied = _described(models)
    entries, sizes = _entries(folder, files, models[0][0], shapes, weights, _steps(common), masters)
    groups = _groups(member(common, "param_groups", list, place), shapes, place)
    first = models[0][1]
    step = first.get("global_steps")
    state = from_state_dict(
        {"state": entries, "param_groups": groups},
        origin={"format": NAME, **({"deepspeed": version} if (version := first.get("ds_version")) else {})},
        global_step=step if isinstance(step, int) else None,
        resources=(files,),
    )
    named = keyed.named(state, shapes=sizes, weights=weights, tied=tied)
    return Checkpoint(named, {name: tensor for name, tensor in weights.items() if tensor.shape == sizes.get(name)})


def _entries(
    folder: Path,
    files: Files,
    model: Path,
    shapes: Sequence[Mapping[str, tuple[int, ...]]],
    weights: Mapping[str, Tensor],
    steps: Sequence[Scalar | None],
    masters: bool,
) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[int, ...]]]:
    """Return the slots of every parameter that has some, and the shapes of all."""
    entries: dict[str, dict[str, Any]] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    for number, names in enumerate(shapes):
        held = {name: dict(_slots(inside(folder / "zero", name, model), shape, files)) for name, shape in names.items()}
        _check_alike(held, folder / "zero")
        check_masters({name: slots[MASTER] for name, slots in held.items() if MASTER in slots}, weights, folder, _MIXED)
        stated = steps[number] if number < len(steps) else None
        for name, shape in names.items():
            slots = held[name]
            master = slots.pop(MASTER, None)
            sizes[name] = next((s.shape for s in (*slots.values(), master) if isinstance(s, Tensor) and s.shape), shape)
            # One with nothing but a weight never got a gradient.
            if slots and "step" not in slots and stated is not None:
                slots = {"step": stated, **slots}
            if masters and master is not None:
                slots[MASTER_SLOT] = master
            if slots:
                entries[name] = slots
    return entries, sizes


def _groups(
    groups: Sequence[Any], shapes: Sequence[Mapping[str, tuple[int, ...]]], place: Path
) -> list[dict[str, Any]]:
    """Return the groups with their parameters' names; a group lists the numbers of its flat groups."""
    result = []
    for group in groups:
        numbers = group.get("params", ()) if isinstance(group, dict) else ()
        listed = [name for number in numbers for name in member(shapes, number, dict, place)]
        own = {key: value for key, value in group.items() if key not in ("params", "step")}
        result.append({**own, "params": listed})
    return result


def _models(folder: Path, files: Files) -> list[tuple[Path, dict[str, Any]]]:
    paths = sorted(file for file in folder.iterdir() if _MODEL.fullmatch(file.name))
    if not paths:
        raise FileError(
            "missing: it has the parameters' names and groups; ds_to_universal.py copies it beside zero",
            path=folder / "mp_rank_00_model_states.pt",
        )
    models = [(path, pickles.load(files[path], path).value) for path in paths]
    for path, model in models:
        member(model, "param_shapes", list, path)
    return models


def _described(
    models: Sequence[tuple[Path, dict[str, Any]]],
) -> tuple[list[dict[str, tuple[int, ...]]], dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """Return names and shapes by group, weights, and tied names, of all model-parallel ranks together."""
    shapes: list[dict[str, tuple[int, ...]]] = []
    weights: dict[str, Tensor] = {}
    tied: dict[str, tuple[str, ...]] = {}
    for path, model in models:
        for number in range(len(model["param_shapes"])):
            if number == len(shapes):
                shapes.append({})
            shapes[number] |= {
                name: tuple(shape) for name, shape in member(model["param_shapes"], number, dict, path).items()
            }
        weights |= {key: value for key, value in (model.get("module") or {}).items() if isinstance(value, Tensor)}
        for alias, holder in (model.get("shared_params") or {}).items():
            tied[holder] = (*tied.get(holder, ()), alias)
    return shapes, weights, tied


def _steps(common: Any) -> list[Any]:
    """Return the step of each (sub)group where the state of stage 3 was kept whole."""
    inner = common.get("optimizer_state_dict") if isinstance(common, dict) else None
    states = inner.get("state") if isinstance(inner, dict) else None
    if not isinstance(states, dict):
        return []
    return [states[number].get("step") for number in sorted(states)]


def _slots(folder: Path, shape: tuple[int, ...], files: Files) -> Iterator[tuple[str, Any]]:
    if not folder.is_dir():
        raise FileError("missing: the model's file names a parameter of this name", path=folder)
    for path in sorted(folder.glob("*.pt")):
        value = pickles.load(files[path], path).value
        if isinstance(value, dict):
            value = member(value, "param", Tensor, path)
        if isinstance(value, Tensor) and value.shape and len(value.shape) == 1 and len(shape) != 1:
            value = _shaped(value, shape, path)
        yield path.stem, value


def _check_alike(group: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Raise ``FileError`` for parameters of a group with other slots or another step than the first of them has.

    The group was one flat tensor per slot, with one step: such files are missing, or of another checkpoint.
    """
    stepped = {name: slots for name, slots in group.items() if slots.keys() - {MASTER}}
    first, expected = next(iter(stepped.items()), ("", {}))
    for name, slots in stepped.items():
        for slot in expected.keys() ^ slots.keys():
            lacking, having = (first, name) if slot in slots else (name, first)
            raise FileError(f"missing: '{having}' has this slot", path=folder / lacking / f"{slot}.pt")
        ours, theirs = (
            scalar_of(step).item() if isinstance(step := s.get("step"), Tensor) else step for s in (expected, slots)
        )
        if ours != theirs:
            raise FileError(
                f"is {theirs!r}, where '{first}' has {ours!r}: files of different steps", path=folder / name / "step.pt"
            )


def _shaped(tensor: Tensor, shape: tuple[int, ...], path: Path) -> Tensor:
    """Return a flat tensor in its parameter's shape."""
    if tensor.count != prod(shape):
        raise FileError(f"has {tensor.count} elements for a parameter of shape {list(shape)}", path=path)
    run = tensor.runs[0] if tensor.runs and len(tensor.runs) == 1 else Run(tensor, 0, tensor.size)
    return Tensor(tensor.dtype, shape, (Piece(run.source, run.offset, Box((0,) * len(shape), shape)),))


# --- writing ------------------------------------------------------------------------------------------------------


def write(state: OptimizerState, path: Path, *, base: Path | None, force: bool, options: Mapping[str, Any]) -> None:
    """Write a folder for ``load_checkpoint`` with ``checkpoint.load_universal``: a tag and ``latest_universal``.

    ``base`` is a DeepSpeed checkpoint of the same run (its tag folder): what is not optimizer state, the model's files
    and the loss scaler, is taken from it. In a folder that is there (``force``) the tag's folder is replaced, if it
    holds nothing but a universal checkpoint, and ``latest_universal`` after it; other tags stay as they are. Raises
    ``UnrepresentableError`` if the fp32 masters (slot ``master_param``) are not in the state, if parameters, shapes or
    groups are not those of ``base``, and for slots and steps that DeepSpeed does not keep. ``options`` are for reading.
    """
    if base is None:
        raise OptionError(
            f"{NAME} takes the model's files from a DeepSpeed checkpoint of the same run",
            remedy=Remedy("pass it as {base}", {"base": ...}),
        )
    refuse_existing(path, force=force)
    tag = f"global_step{state.global_step}_universal" if state.global_step is not None else "universal"
    with reading() as files:
        checkpoint = _checkpoint(state, base, files)
        sweep(path)
        if path.is_dir():
            with new_folder(path / tag, force=True, replaces=_held(path / tag)) as folder:
                for place, chunks in checkpoint:
                    folder.write(place, chunks)
            write_file(path / LATEST, [tag.encode()], force=True)
        else:
            with new_folder(path, force=force) as folder:
                for place, chunks in checkpoint:
                    folder.write((tag, *place), chunks)
                folder.write((LATEST,), [tag.encode()])
        files.close()


def _checkpoint(
    state: OptimizerState, base: Path, files: Files
) -> Iterator[tuple[tuple[str, ...], Iterable[bytes | memoryview]]]:
    """Yield the files of a tag's folder, by their places in it."""
    models = _models(base, files)
    shapes, _, _ = _described(models)
    common, numbers, flat = _common(base, files)
    _check_same(state, shapes, numbers, base)
    steps = [_group_step(group) for group in state.members()]
    groups = [
        {**dict(group.options), "params": list(listed)} for group, listed in zip(state.groups, numbers, strict=True)
    ]
    if flat:
        states = {number: {"step": step} for step, listed in zip(steps, numbers, strict=True) for number in listed}
        common["optimizer_state_dict"] = {"state": states, "param_groups": groups}
    yield _GLOBAL, pack({**common, "param_groups": groups})
    for parameter in state.parameters:
        for slot, value in (parameter.state or {}).items():
            if slot != "step":
                yield _place(parameter.name, slot), pack(_slot(slot, value, parameter, flat))
            elif not flat:
                yield _place(parameter.name, slot), pack(value)
    for path, _ in models:
        yield (path.name,), bytes_of(files[path])


def _place(name: str, slot: str) -> tuple[str, ...]:
    return ("zero", name, f"{MASTER if slot == MASTER_SLOT else slot}.pt")


def _held(folder: Path) -> set[str]:
    """Return the files of a universal checkpoint in a tag's folder, as the model's files in it name them."""
    if not folder.is_dir():
        return set()
    with Files() as files, contextlib.suppress(FileError):
        models = _models(folder, files)
        shapes, _, _ = _described(models)
        slots = {
            path for names in shapes for name in names for path in inside(folder / "zero", name, folder).glob("*.pt")
        }
        found = {folder.joinpath(*_GLOBAL), *(path for path, _ in models), *slots}
        return {path.relative_to(folder).as_posix() for path in found}
    return set()


def _common(base: Path, files: Files) -> tuple[dict[str, Any], list[list[int]], bool]:
    """Return what each rank of ``base`` holds besides the state, each group's (sub)groups, whether it is stage 3."""
    places = [base.joinpath(*_GLOBAL), *sorted(base.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt"))]
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        raise FileError("no optimizer file of rank 0, and no zero/optimizer_state.pt", path=base)
    tree = pickles.load(files[place], place).value
    tree = tree.get("optimizer_state_dict", tree) if place.name != _GLOBAL[-1] else tree
    stage = tree.get("zero_stage", 1)
    stage = stage.args[0] if isinstance(stage, Record) and stage.args else stage
    inner = tree.get("optimizer_state_dict" if stage == 3 else "base_optimizer_state")
    groups = tree.get("param_groups") or (inner.get("param_groups") if isinstance(inner, dict) else None)
    if not isinstance(groups, list):
        raise FileError("has no param_groups: an elastic checkpoint cannot be the base of a universal one", path=place)
    numbers = [member(group, "params", list, place) for group in groups]
    large = ("base_optimizer_state", "single_partition_of_fp32_groups", "param_slice_mappings", "optimizer_state_dict")
    kept = {key: value for key, value in tree.items() if key not in (*large, "fp32_flat_groups", "param_groups")}
    return kept, numbers, stage == 3


def _check_same(
    state: OptimizerState, shapes: Sequence[Mapping[str, tuple[int, ...]]], numbers: Sequence[Sequence[int]], base: Path
) -> None:
    expected = [{name: shapes[number][name] for number in listed for name in shapes[number]} for listed in numbers]
    found = [{parameter.name: parameter.shape for parameter in group} for group in state.members()]
    if len(state.optimizers) != 1 or state.carried or [*map(dict, expected)] != found:
        raise UnrepresentableError(
            f"{base} is not of the same run: its groups have {[len(group) for group in expected]} parameters, those of "
            f"the state {[len(group) for group in found]}, or names or shapes differ"
        )
    if state.globals:
        raise UnrepresentableError(
            f"'{next(iter(state.globals))}' belongs to no parameter, and DeepSpeed has no place for it"
        )
    bare = [parameter.name for parameter in state.parameters if MASTER_SLOT not in (parameter.state or {})]
    if bare:
        raise UnrepresentableError(
            f"{len(bare)} parameters have no fp32 master weight (the first is '{bare[0]}'): read the checkpoint with "
            "the option masters, which keeps them as a slot 'master_param'"
        )


def _group_step(group: Sequence[Parameter]) -> Value:
    """Return the step of a group's parameters; DeepSpeed keeps a group as one flat tensor per slot, with one step.

    Raises ``UnrepresentableError`` for parameters with other slots, or at another step, than the first that has any.
    """
    stepped = [p for p in group if (p.state or {}).keys() - {MASTER_SLOT}]
    for parameter in stepped:
        first, other = stepped[0].state or {}, parameter.state or {}
        if odd := first.keys() ^ other.keys():
            raise UnrepresentableError(
                f"only one of '{stepped[0].name}' and '{parameter.name}' has a slot '{min(odd)}', and DeepSpeed keeps "
                "the same slots for all parameters of a group"
            )
        if first.get("step") != other.get("step"):
            raise UnrepresentableError(
                f"'{stepped[0].name}' is at step {_shown(first['step'])} and '{parameter.name}' at "
                f"{_shown(other['step'])}, and DeepSpeed counts the steps of a group once"
            )
    return (stepped[0].state or {}).get("step") if stepped else None


def _shown(step: Value) -> object:
    return step.item() if isinstance(step, Scalar) else step


def _slot(slot: str, value: Value, parameter: Parameter, flat: bool) -> Any:
    """Return what the file of a slot holds. Raises ``UnrepresentableError`` for what DeepSpeed would not read back."""
    if not isinstance(value, Slot):
        raise UnrepresentableError(
            f"slot '{slot}' of '{parameter.name}' is {_shown(value)!r:.60}, and DeepSpeed keeps tensors and the step"
        )
    tensor = value.tensor
    if tensor.shape != parameter.shape:
        raise UnrepresentableError(
            f"slot '{slot}' of '{parameter.name}' has the shape {list(tensor.shape)}, and DeepSpeed keeps slots of the "
            f"parameter's own, {list(parameter.shape)}"
        )
    if flat:
        tensor = Tensor(tensor.dtype, (tensor.count,), (Piece(tensor, 0, Box((0,), (tensor.count,))),))
    return tensor if flat else {"cat_dim": 0, "param": tensor}
