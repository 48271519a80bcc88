"""Keras 3's optimizer variables: ``.keras``, ``.weights.h5``, and the older whole-model ``.h5``.

The older form names each variable after its parameter. The newer ones number them; there the optimizer's class says how
many each parameter has, and the layers' variables, in the order in which Keras wrote them, say whose they are: of
models whose layers have no layers in them. Others need ``--names``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, RefusedError
from lora_state_format.foreign import pickles
from lora_state_format.foreign.hdf5 import MAGIC, Tree, read_tree
from lora_state_format.foreign.zips import Archive
from lora_state_format.io.files import reading
from lora_state_format.io.strict_json import loads
from lora_state_format.model.sources import File, Source, Stream
from lora_state_format.model.states import (
    Checkpoint,
    Group,
    Naming,
    Optimizer,
    Parameter,
    PositionalState,
    Scalar,
    Value,
    Weights,
    slot_of,
)
from lora_state_format.model.tensors import Tensor
from lora_state_format.registry import Match

NAME: Final = "keras"
DESCRIPTION: Final = "a model or weights that Keras 3 saved with its optimizer: .keras, .weights.h5, .h5"

MEMBER: Final = "model.weights.h5"
"""The archive's member with all variables."""

NUMBERED: Final = "optimizer/vars/"
NAMED: Final = "optimizer_weights/"
MODEL: Final = "model_weights/"

SLOTS: Final[Mapping[str, tuple[str, ...]]] = {
    "adadelta": ("accumulated_grad", "accumulated_delta_var"),
    "adagrad": ("accumulator",),
    "adam": ("momentum", "velocity"),
    "adamw": ("momentum", "velocity"),
    "adamax": ("momentum", "norm"),
    "lamb": ("momentum", "velocity"),
    "lion": ("momentum",),
    "rmsprop": ("velocity",),
    "sgd": ("momentum",),
}
"""The variables of a parameter, by its optimizer's class in small letters: ``build`` in keras/src/optimizers, 3.15."""

SHARED: Final = ("iteration", "learning_rate")
"""The optimizer's own variables, which come first."""

MORE: Final = ("amsgrad", "use_ema", "gradient_accumulation_steps", "centered")
"""Options with which an optimizer has further variables."""

STATISTICS: Final = re.compile(r"(^|/)batch_normalization(_\d+)?/vars/[23]$")
"""Variables of a layer that are not trained; the trained ones stand before them."""

IN_ORDER: Final = re.compile(r"layers/[^/]+/vars/\d+")
"""Variables of a Sequential or Functional model's own layers, which stand as the model has them. Keras walks through
layers in layers, and the attributes of a subclassed model, by their names: saving_lib.py, ``_walk_saveable``."""


NO_OPTIMIZER: Final = "no optimizer's state dict in it: neither optimizer/vars nor optimizer_weights, as Keras has them"


def detect(path: Path) -> Match | None:
    if not path.is_file():
        return None
    with File(path) as file:
        if Stream(file).read(len(MAGIC)) == MAGIC:
            return Match("an HDF5 file", path)
        if pickles.container(file) == "zip archive":
            try:
                if MEMBER in Archive(file, path):
                    return Match(f"a zip archive with {MEMBER}", path)
            except FileError:
                return None
    return None


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Return the state and the model's variables.

    Raises:
        FileError: The file is damaged, or has no optimizer.
        RefusedError: The variables are numbered and the optimizer's class does not say what they are.
    """
    path = match.path
    with reading() as files:
        source: Source = files[path]
        config: Mapping[str, Any] = {}
        if path.suffix != ".h5" and Stream(source).read(len(MAGIC)) != MAGIC:
            archive = Archive(source, path)
            source = archive[MEMBER]
            config = _member(
                loads(archive["config.json"].bytes().decode("utf-8", "replace"), path=path),
                "compile_config",
                "optimizer",
            )
        tree = read_tree(source, path)
        if any(name.startswith(NAMED) for name in tree.tensors):
            trained = tree.attributes[""].get("training_config", "{}")
            return _by_name(tree, _member(loads(str(trained), path=path), "optimizer_config"), path, (files,))
        if f"{NUMBERED}0" not in tree.tensors:
            raise FileError(NO_OPTIMIZER, path=path)
        return _by_number(tree, config, path, (files,))


def _member(tree: Any, *keys: str) -> Mapping[str, Any]:
    """Return the mapping at some keys; an empty one where it is something else."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, Mapping) else {}


# --- variables with names -------------------------------------------------------------------------------------------


def _by_name(tree: Tree, config: Mapping[str, Any], path: Path, resources: tuple[Any, ...]) -> Checkpoint:
    """Return the state of a whole-model ``.h5``: ``adam/dense_kernel_momentum`` is ``momentum`` of ``dense/kernel``."""
    weights = {
        name: tree.tensors[f"{group}/{name}"]
        for group in tree.attributes
        if group.startswith(MODEL) and group.count("/") == 1
        for name in _listed(tree, group)
        if f"{group}/{name}" in tree.tensors
    }
    flat: dict[str, str] = {}
    for name in weights:
        if (other := flat.setdefault(name.replace("/", "_"), name)) != name:
            raise RefusedError(f"'{name}' and '{other}' have the same name in its optimizer's variables", path=path)
    entries: dict[str, dict[str, Value]] = {}
    shared: dict[str, Value] = {}
    for variable in _listed(tree, NAMED.rstrip("/")):
        tensor = tree.tensors.get(NAMED + variable)
        if tensor is None:
            raise FileError(f"lists '{variable}', which is not there", path=path)
        label = variable.partition("/")[2]
        owners = [key for key in flat if label.startswith(f"{key}_") and weights[flat[key]].shape == tensor.shape]
        if owners:
            owner = max(owners, key=len)
            entries.setdefault(flat[owner], {})[label[len(owner) + 1 :]] = slot_of(tensor)
        elif tensor.shape:
            raise RefusedError(
                f"the optimizer's variable '{variable}' names no parameter of the model: Keras 2 and TensorFlow number "
                "them; load the model with Keras 3 and save it again",
                path=path,
            )
        else:
            shared[label] = slot_of(tensor)
    parameters = [Parameter(name, weights[name].shape, None, dtype=weights[name].dtype) for name in entries]
    state = _state(tuple(entries), entries, shared, config, resources)
    return Checkpoint(state.named(parameters, Naming("checkpoint")), weights)


def _listed(tree: Tree, group: str) -> list[str]:
    """Return the names that a group lists, in one attribute or in numbered ones, as h5py limits their size."""
    attributes = tree.attributes.get(group, {})
    parts = [attributes["weight_names"]] if "weight_names" in attributes else []
    for number in count():
        if f"weight_names{number}" not in attributes:
            break
        parts.append(attributes[f"weight_names{number}"])
    return [name.decode() if isinstance(name, bytes) else str(name) for part in parts for name in part]


# --- variables with numbers -----------------------------------------------------------------------------------------


def _by_number(tree: Tree, config: Mapping[str, Any], path: Path, resources: tuple[Any, ...]) -> Checkpoint:
    """Return the state of a ``.keras`` or ``.weights.h5`` file by position, and the layers' variables to name it by."""
    called = str(tree.attributes.get("optimizer/vars", {}).get("name", ""))
    kind = str(config.get("class_name", called)).lower().replace("_", "")
    variables = [tree.tensors[f"{NUMBERED}{number}"] for number in range(_count(tree))]
    shared, own = variables[: len(SHARED)], variables[len(SHARED) :]
    entries = _slots_in_turn(kind, _member(config, "config"), own)
    if entries is None:
        raise RefusedError(
            f"its optimizer '{called or kind}' has {len(variables)} numbered variables, and what each of them is "
            "is not known here: save the model as .h5 (model.save('model.h5')), which keeps their names",
            path=path,
        )
    state = _state(
        tuple(entries),
        entries,
        {name: slot_of(tensor) for name, tensor in zip(SHARED, shared, strict=False)},
        config,
        resources,
    )
    model = {
        name: tensor
        for name, tensor in tree.tensors.items()
        if not name.startswith("optimizer/") and not STATISTICS.search(name)
    }
    known = all(IN_ORDER.fullmatch(name) for name in model)
    return Checkpoint(state, candidates=((Weights(MEMBER, model, ordered=True),),) if known else ())


def _slots_in_turn(
    kind: str, options: Mapping[str, Any], variables: Sequence[Tensor]
) -> dict[int, dict[str, Value]] | None:
    """Return the slots of every parameter, whose variables follow each other; ``None`` where that is not sure."""
    slots = SLOTS.get(kind)
    more = any(options.get(option) for option in MORE) or (kind == "rmsprop" and options.get("momentum"))
    if slots is None or more:
        return None
    if not variables and kind == "sgd":
        return {}
    runs = [variables[start : start + len(slots)] for start in range(0, len(variables), len(slots))]
    if any(len(run) < len(slots) or len({tensor.shape for tensor in run}) > 1 for run in runs):
        return None
    return {
        number: {slot: slot_of(tensor) for slot, tensor in zip(slots, run, strict=True)}
        for number, run in enumerate(runs)
    }


def _count(tree: Tree) -> int:
    """Return how many variables the optimizer has, which are numbered from 0 without gaps."""
    return next(number for number in count() if f"{NUMBERED}{number}" not in tree.tensors)


def _state(
    ids: Sequence[int | str],
    entries: Mapping[Any, Mapping[str, Value]],
    shared: Mapping[str, Value],
    config: Mapping[str, Any],
    resources: tuple[Any, ...],
) -> PositionalState:
    """Return the state in one group, with the hyperparameters of the configuration and the rate of the variable."""
    stated = {
        key: value
        for key, value in _member(config, "config").items()
        if key != "name" and (value is None or isinstance(value, (bool, int, float, str)))
    }
    rate, steps = shared.get("learning_rate"), shared.get("iteration")
    if isinstance(rate, Scalar):
        stated["learning_rate"] = float(rate.item())  # type: ignore[arg-type]
    name = config.get("class_name")
    return PositionalState(
        optimizers=(Optimizer(f"keras.optimizers.{name}" if name else None),),
        groups=(Group(0, tuple(stated.items()), len(ids)),),
        ids=tuple(ids),
        entries=dict(entries),
        globals=dict(shared),
        origin={"format": NAME},
        global_step=int(steps.item()) if isinstance(steps, Scalar) else None,  # type: ignore[arg-type]
        resources=resources,
    )
