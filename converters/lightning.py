"""Lightning's ``.ckpt``: one file with ``state_dict``, ``optimizer_states`` and the loops' own state.

The optimizers' state dicts are positional. ``state_dict`` is in the model's order, so where an optimizer holds all the
parameters that can be trained, or the adapter's, in one group, their names are known. FSDP's full checkpoints count
positions through the whole model, frozen parameters included (``rekey_optim_state_dict`` without an optimizer): there
the position alone says the name. Sharded folders are DCP's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, OptionError, UnrepresentableError
from lora_state_format.foreign import pickles
from lora_state_format.foreign.state_dict import Found, from_state_dict, to_state_dict
from lora_state_format.foreign.torch_save import save
from lora_state_format.foreign.trees import member
from lora_state_format.io.atomic import check_target
from lora_state_format.io.files import reading
from lora_state_format.model.sources import File
from lora_state_format.model.states import Checkpoint, OptimizerState, PositionalState
from lora_state_format.model.tensors import Tensor
from lora_state_format.naming.names import split_adapter
from lora_state_format.registry import Match

NAME: Final = "lightning"
DESCRIPTION: Final = "a Lightning .ckpt file: optimizer_states beside pytorch-lightning_version"

_BUFFERS: Final = ("running_mean", "running_var", "num_batches_tracked", "inv_freq")


def detect(path: Path) -> Match | None:
    if not path.is_file():
        return None
    with File(path) as file:
        try:
            if pickles.mentions(file, b"pytorch-lightning_version"):
                return Match("a torch.save file whose pickle mentions pytorch-lightning_version", path)
        except FileError:
            pass
    return None


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    path = match.path
    with reading() as files:
        tree = pickles.load(files[path], path).value
        states = member(tree, "optimizer_states", list, path)
        if not states:
            raise FileError(
                "optimizer_states is empty: saved with save_weights_only, or without an optimizer", path=path
            )
        weights = {k: v for k, v in (tree.get("state_dict") or {}).items() if isinstance(v, Tensor)}
        step = tree.get("global_step")
        version = tree.get("pytorch-lightning_version")
        state = from_state_dict(
            *(Found(("optimizer_states", index), value) for index, value in enumerate(states)),
            origin={"format": NAME, **({"lightning": version} if isinstance(version, str) else {})},
            global_step=step if isinstance(step, int) else None,
            resources=(files,),
        )
        names = _names(state, weights)
        return Checkpoint(state if names is None else replace(state, names=names), weights)


def _names(state: PositionalState, weights: Mapping[str, Tensor]) -> tuple[str, ...] | None:
    """Return the names of the positions, if the order of ``state_dict`` leaves no choice and no shape contradicts."""
    if state.names is not None or len(state.optimizers) > 1:
        return state.names
    listed = _parameters(weights)
    numbers = [identity for identity in state.ids if isinstance(identity, int)]
    if (numbers and sorted(numbers) != list(range(len(numbers)))) or numbers != sorted(numbers):
        names = tuple(listed[number] for number in numbers if number < len(listed))
        return names if _fit(names, state, weights) else None
    if sum(group.count > 0 for group in state.groups) == 1:
        adapter = tuple(name for name in listed if split_adapter(name))
        return next((names for names in (adapter, tuple(listed)) if _fit(names, state, weights)), None)
    return None


def _parameters(weights: Mapping[str, Tensor]) -> list[str]:
    """Return the model's parameters: no buffers, and of tied ones the first."""
    seen: set[tuple[int, int]] = set()
    names = []
    for name, tensor in weights.items():
        run = tensor.runs[0] if tensor.runs else None
        place = (id(run.source), run.offset) if run else (id(tensor), 0)
        if place not in seen and not name.endswith(_BUFFERS):
            seen.add(place)
            names.append(name)
    return names


def _fit(names: Sequence[str], state: PositionalState, weights: Mapping[str, Tensor]) -> bool:
    return len(names) == len(state.ids) and all(
        shape in (None, weights[name].shape) for name, shape in zip(names, state.shapes(), strict=True)
    )


def write(state: OptimizerState, path: Path, *, base: Path | None, force: bool, options: Mapping[str, Any]) -> None:
    """Write ``base``, a ``.ckpt`` of the same run, with the state in place of its ``optimizer_states``.

    Raises ``UnrepresentableError`` where the number of optimizers differs, or for a value that torch could not load.
    """
    if base is None:
        raise OptionError(f"{NAME} needs a .ckpt of the same run (base=, --base): all but the optimizers comes from it")
    check_target(path, force=force)
    with reading() as files:
        tree = pickles.load(files[base], base).value
        count = len(member(tree, "optimizer_states", list, base))
        if count != len(state.optimizers):
            raise UnrepresentableError(f"{base} has {count} optimizers, the state {len(state.optimizers)}")
        save({**tree, "optimizer_states": [to_state_dict(state, i) for i in range(count)]}, path, force=force)
        files.close()
