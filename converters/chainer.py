"""Chainer's ``.npz``: ``serializers.save_npz`` of an optimizer, or the snapshot of a trainer.

Keys are ``<parameter>/<slot>``, next to the optimizer's ``t`` and ``epoch``; in a snapshot ``updater/optimizer:main/``
and ``updater/model:main/`` stand before them. Hyperparameters are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError
from lora_state_format.foreign import pickles
from lora_state_format.foreign.npz import arrays_in, read_npz
from lora_state_format.io.files import reading
from lora_state_format.model.sources import File
from lora_state_format.model.states import (
    Checkpoint,
    Group,
    Naming,
    Optimizer,
    Parameter,
    PositionalState,
    Scalar,
    Value,
    slot_of,
)
from lora_state_format.model.tensors import Tensor
from lora_state_format.registry import Match

NAME: Final = "chainer"
DESCRIPTION: Final = "Chainer's .npz of an optimizer, or of a trainer's snapshot: t, epoch, <parameter>/<slot>"

SHARED: Final = frozenset({"t", "epoch"})
"""The optimizer's own counters."""

OPTIMIZER, MODEL = "updater/optimizer:", "updater/model:"


def detect(path: Path) -> Match | None:
    if not path.is_file():
        return None
    with File(path) as file:
        if pickles.container(file) != "zip archive":
            return None
        try:
            names = arrays_in(file, path)
        except FileError:
            return None
    if any(name.startswith(OPTIMIZER) for name in names):
        return Match(f"arrays called {OPTIMIZER}*, as Chainer's snapshots have them", path)
    if set(names) >= SHARED and any(name.endswith("/t") for name in names):
        return Match("arrays t and epoch next to <parameter>/t, as Chainer saves an optimizer", path)
    return None


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Return the state, in the order of the file, and a snapshot's weights.

    Where a parameter has nothing but a counter and there are no weights, the state has names, and no shapes.
    """
    path = match.path
    with reading() as files:
        arrays = read_npz(files[path], path)
        parts: dict[str, dict[str, Tensor]] = {}
        weights: dict[str, Tensor] = {}
        for key, tensor in arrays.items():
            if key.startswith(OPTIMIZER):
                part, _, rest = key.removeprefix(OPTIMIZER).partition("/")
                parts.setdefault(part, {})[rest] = tensor
            elif key.startswith(MODEL):
                weights[key.removeprefix(MODEL).partition("/")[2]] = tensor
            elif not key.startswith("updater/") and match.reason.startswith("arrays t"):
                parts.setdefault("", {})[key] = tensor
        return Checkpoint(_state(parts, weights, files), weights)


def _state(parts: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, Tensor], files: Any) -> Any:
    """Return the named state of one or several optimizers; without names where a shape is not known."""
    entries: dict[int | str, dict[str, Value]] = {}
    shared: dict[str, Value] = {}
    groups = []
    for index, (part, arrays) in enumerate(parts.items()):
        prefix = f"{part}:" if len(parts) > 1 else ""
        before = len(entries)
        for key, tensor in arrays.items():
            name, _, slot = key.rpartition("/")
            if name:
                entries.setdefault(prefix + name, {})[slot] = slot_of(tensor)
            else:
                shared[prefix + slot] = slot_of(tensor)
        groups.append(Group(index, (), len(entries) - before))
    steps = [value.item() for key, value in shared.items() if key.endswith("t") and isinstance(value, Scalar)]
    state = PositionalState(
        optimizers=tuple(Optimizer(None, part or None) for part in parts),
        groups=tuple(groups),
        ids=tuple(entries),
        entries=entries,
        globals=shared,
        origin={"format": NAME},
        global_step=int(steps[0]) if len(steps) == 1 else None,  # type: ignore[arg-type]
        resources=(files,),
    )
    names = [str(identity) for identity in state.ids]
    shapes = [weights[n].shape if n in weights else shape for n, shape in zip(names, state.shapes(), strict=True)]
    if None in shapes:
        return replace(state, names=tuple(names))
    parameters = [Parameter(name, shape or (), None) for name, shape in zip(names, shapes, strict=True)]
    return state.named(parameters, Naming("checkpoint", details={"order": "unknown"}))
