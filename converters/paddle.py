"""Paddle's own files: ``paddle.save(optimizer.state_dict(), "model.pdopt")``, next to the model's ``.pdparams``.

Keys are ``<tensor's name>_<accumulator>``, where tensors have names as ``linear_0.w_0``; the ``.pdparams`` says which
parameter of the model each one is. Both are plain pickles of NumPy's arrays, read without running anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, RefusedError
from lora_state_format.foreign import pickles
from lora_state_format.foreign.paddle import LAYOUTS, POWERS, state_of
from lora_state_format.foreign.pickles import NumpyScalar, Record
from lora_state_format.io.files import reading
from lora_state_format.mapping import algorithms, apply
from lora_state_format.mapping.algorithms import HYPERPARAMETERS, OPTIMIZER
from lora_state_format.model.sources import File
from lora_state_format.model.states import Checkpoint
from lora_state_format.model.tensors import Tensor
from lora_state_format.optimizers.roles import MASTER
from lora_state_format.registry import Match

NAME: Final = "paddle"
DESCRIPTION: Final = "Paddle's .pdopt, and the .pdparams next to it, which names its parameters"
OPTIONS: Final = {
    "optimizer": OPTIMIZER,
    "step": "steps taken, where the powers of the usual betas do not count them",
    "masters": "keep the fp32 master weights as a slot 'master_param'",
    "map": f"{apply.OPTION}; paddlenlp, for example",
    **HYPERPARAMETERS,
}

STATE, WEIGHTS = ".pdopt", ".pdparams"
NAMES: Final = "StructuredToParameterName@@"
"""The member of a ``.pdparams`` that has the name of each parameter's tensor."""

SCHEDULER, MASTERS = "LR_Scheduler", "master_weights"

_FIELDS: Final = sorted({field for layout in LAYOUTS for field in layout.fields} | set(POWERS))
_KEY: Final = re.compile(rf"(.+)_({'|'.join(_FIELDS)})")

MOST: Final = 1 << 30
"""Bytes of a pickle that are read into memory: NumPy's arrays are inside of it."""


def detect(path: Path) -> Match | None:
    found = sorted(path.glob(f"*{STATE}")) if path.is_dir() else [path]
    if len(found) != 1 or found[0].suffix != STATE or not found[0].is_file():
        return None
    with File(found[0]) as file:
        return Match(f"a pickle called *{STATE}", found[0]) if pickles.container(file) == "pickle" else None


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Return the state under the model's names, and its weights; under those of the tensors where no file says more.

    Raises ``FileError`` for a damaged file, ``RefusedError`` for an accumulator that is not known, ``OptionError``
    where the rule or the step is not known.
    """
    path = match.path
    tree = _unpickled(path)
    beside = path.with_suffix(WEIGHTS)
    model = _unpickled(beside) if beside.is_file() else {}
    named = model.pop(NAMES, {})
    known = {str(tensor): str(name) for name, tensor in named.items()} if isinstance(named, Mapping) else {}
    scheduler, masters, _ = tree.pop(SCHEDULER, {}), tree.pop(MASTERS, {}), tree.pop(NAMES, {})
    slots: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _arrays(tree, path).items():
        split = _KEY.fullmatch(key)
        if split is None:
            raise RefusedError(
                f"{key!r} is of an accumulator that is not known; known are {', '.join(_FIELDS)}", path=path
            )
        slots.setdefault(known.get(split[1], split[1]), {})[split[2]] = tensor
    if options.get("masters"):
        for key, tensor in _arrays(masters, path).items():
            slots.get(known.get(key, key), {})[MASTER] = tensor
    weights = {name: tensor for name, tensor in _arrays(model, beside).items() if name in slots}
    with reading() as files:
        told = {**_rate(scheduler, options), **options}
        state = state_of(slots, weights, path, told, usual=True, origin=NAME, files=files)
    return apply.on_reading(Checkpoint(state, weights), options.get("map"))


def _rate(scheduler: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the learning rate that the scheduler had last, where the rule has one."""
    rate = scheduler.get("last_lr") if isinstance(scheduler, Mapping) else None
    rate = rate.value if isinstance(rate, NumpyScalar) else rate
    known = "optimizer" in options and "lr" in algorithms.find(options["optimizer"]).options
    return {"lr": rate} if known and isinstance(rate, float) else {}


def _unpickled(path: Path) -> dict[str, Any]:
    with File(path) as file:
        if file.size > MOST:
            raise FileError(f"a pickle of {file.size} bytes, where at most {MOST} are read", path=path)
        tree = pickles.load_plain(bytes(file.read(0, file.size)), path, payload=True)
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise FileError("not what paddle.save makes of a state dict", path=path)
    return tree


def _arrays(tree: Any, path: Path) -> dict[str, Tensor]:
    """Return the arrays of a dict. Raises ``FileError`` for what is none."""
    found = {}
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        tensor = pickles.array(value) if isinstance(value, Record) else None
        if tensor is None:
            raise FileError(f"{key!r} is not an array of a type that is known", path=path)
        found[key] = tensor
    return found
