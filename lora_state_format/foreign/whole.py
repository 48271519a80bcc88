"""Optimizers that were pickled as objects: the state dicts that they would have returned, and their parameters' names.

Such an object holds its parameters themselves, values and all, and keeps its state by them. So nothing has to be
guessed where the model lies in the same file: it has the very tensors that the optimizer has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_state_format.foreign.pickles import Foreign, is_bounded
from lora_state_format.model.states import Weights
from lora_state_format.model.tensors import Tensor

__all__ = ["class_of", "names_in_models", "state_dict_of"]


def state_dict_of(whole: Foreign) -> Mapping[str, Any] | None:
    """Return what the ``state_dict()`` of a pickled optimizer would have returned; ``None`` for any other object.

    Ids are places among the parameters of all groups, as torch counts them.
    """
    parameters = _parameters(whole)
    if whole.optimizer is None or parameters is None or not is_bounded(whole.optimizer):
        return None
    state, groups = whole.optimizer
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    if len(places) < len(parameters) or any(isinstance(key, Tensor) and id(key) not in places for key in state):
        return None
    return {
        "state": {places.get(id(key), key): entry for key, entry in state.items()},
        "param_groups": [{**group, "params": [places[id(item)] for item in group["params"]]} for group in groups],
    }


def class_of(whole: Foreign) -> str | None:
    """Return the path of an object's class, if it is one."""
    path = f"{whole.module}.{whole.name}"
    return path if all(part.isidentifier() for part in path.split(".")) else None


def names_in_models(whole: Foreign, models: Iterable[Weights]) -> tuple[str, dict[int, str]] | None:
    """Return the first model that holds the bytes of all parameters of an optimizer, and their names by id."""
    places = [_place(parameter) for parameter in _parameters(whole) or ()]
    for model in models:
        names: dict[object, str] = {}
        for name, tensor in model.tensors.items():
            names.setdefault(_place(tensor), name)
        if None not in places and all(place in names for place in places):
            return model.where, {identity: names[place] for identity, place in enumerate(places)}
    return None


def _parameters(whole: Foreign) -> Sequence[Tensor] | None:
    """Return the parameters of all groups, in order; ``None`` if the groups are not those of an optimizer."""
    groups = whole.optimizer[1] if whole.optimizer else []
    lists = [group.get("params") if isinstance(group, Mapping) else None for group in groups]
    parameters = [parameter for listed in lists if isinstance(listed, list) for parameter in listed]
    if not lists or not all(isinstance(listed, list) for listed in lists):
        return None
    return parameters if all(isinstance(parameter, Tensor) for parameter in parameters) else None


def _place(tensor: Tensor) -> object:
    """Return where the bytes of a tensor are; ``None`` for one without bytes."""
    run = tensor.runs[0] if tensor.runs else None
    return (id(run.source), run.offset, tensor.shape) if run else None
