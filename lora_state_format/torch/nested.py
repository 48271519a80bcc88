"""What an optimizer keeps outside its own state: optimizers inside it, members of its state dict, attributes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

import torch

from lora_state_format.foreign.state_dict import is_state_dict
from lora_state_format.model.text import class_path

__all__ = ["beside", "inner", "outside", "stepping", "wrapped"]

_BASE: Final = frozenset({"state", "param_groups", "defaults"})
_REBUILT: Final = frozenset({"name2qmap"})
"""Attributes that an optimizer's constructor fills alike each time: bitsandbytes' tables of codes."""

_IN_GRADIENTS: Final = frozenset({"pytorch_optimizer.optimizer.scion.SCIONLight"})
"""Classes whose momentum is what they leave in the gradients, for the next backward pass to add to."""

_DEPTH: Final = 3
"""How many containers deep ``outside`` looks into an attribute."""


def wrapped(optimizer: torch.optim.Optimizer) -> dict[str, torch.optim.Optimizer]:
    """Return the optimizers that an optimizer wraps, by attribute: they share its groups.

    Lookahead, SAM and their kin keep theirs so.
    """
    return {
        name: value
        for name, value in vars(optimizer).items()
        if isinstance(value, torch.optim.Optimizer)
        and len(value.param_groups) == len(optimizer.param_groups)
        and all(a is b for a, b in zip(value.param_groups, optimizer.param_groups, strict=True))
    }


def inner(optimizer: torch.optim.Optimizer) -> dict[str, torch.optim.Optimizer]:
    """Return those of the optimizers that an optimizer wraps that have a state of their own."""
    return {name: value for name, value in wrapped(optimizer).items() if value.state is not optimizer.state}


def stepping(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """Yield an optimizer and those inside it."""
    yield optimizer
    for value in inner(optimizer).values():
        yield from stepping(value)


def beside(optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
    """Return what an optimizer's own ``state_dict`` adds to ``state`` and ``param_groups``.

    The state dicts of optimizers inside it are not part of that: their state is kept with the parameters.
    """
    if type(optimizer).state_dict is torch.optim.Optimizer.state_dict:
        return {}
    found = cast("Mapping[str, Any]", optimizer.state_dict())
    if not is_state_dict(found):
        return {}
    return {key: value for key, value in found.items() if key not in _BASE and not is_state_dict(value)}


def outside(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str]]:
    """Yield path and kind of what an optimizer keeps in attributes of its own, where no state dict has it."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    if class_path(type(optimizer)) in _IN_GRADIENTS and any(p.grad is not None for p in trained[:1]):
        yield "param_groups.params.grad", "torch.Tensor"
    parameters = set(map(id, trained))
    kept = {*_BASE, *_REBUILT, *wrapped(optimizer), *beside(optimizer)}
    for name, value in vars(optimizer).items():
        if name not in kept:
            yield from _kept(value, name, parameters, _DEPTH)
    for name, value in wrapped(optimizer).items():
        yield from ((f"{name}.{path}", kind) for path, kind in outside(value))


def _kept(value: Any, path: str, parameters: set[int], depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, (torch.Tensor, torch.Generator, torch.optim.Optimizer)):
        if id(value) not in parameters:
            yield path, class_path(type(value))
    elif depth and isinstance(value, (Mapping, list, tuple)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            label = key if isinstance(key, (str, int)) else f"[{type(key).__name__}]"
            yield from _kept(item, f"{path}.{label}", parameters, depth - 1)
