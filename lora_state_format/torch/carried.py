"""State that a load with ``unexpected="carry"`` keeps for the next save.

It is kept with the model, not with the optimizer, which frameworks rebuild and wrap.
"""

from __future__ import annotations

from collections.abc import Collection, MutableMapping
from typing import Final, cast

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from lora_state_format.model.states import Parameter

__all__ = ["Kept", "entries", "kept", "replace", "restore"]

Kept = tuple[frozenset[str], tuple[Parameter, ...]]

_KEPT: Final = cast("MutableMapping[torch.Tensor, list[Kept]]", WeakTensorKeyDictionary())
"""First parameter of a model -> for each optimizer the names of its parameters at the load, and what it carries."""


def kept(tensors: Collection[torch.Tensor], members: Collection[str]) -> tuple[Parameter, ...]:
    """Return what the optimizers over these parameters of a model carry."""
    return tuple(parameter for names, carried in _of(tensors) if not names.isdisjoint(members) for parameter in carried)


def entries(tensors: Collection[torch.Tensor]) -> list[Kept]:
    """Return everything that a model's optimizers carry, to put back."""
    return _of(tensors)


def replace(tensors: Collection[torch.Tensor], members: Collection[str], carried: tuple[Parameter, ...]) -> None:
    """Let the optimizers over these parameters carry this from now on."""
    others = [entry for entry in _of(tensors) if entry[0].isdisjoint(members)]
    restore(tensors, [*others, (frozenset(members), carried)] if carried else others)


def restore(tensors: Collection[torch.Tensor], entries: list[Kept]) -> None:
    """Let a model's optimizers carry what they did."""
    first = next(iter(tensors), None)
    if first is not None:
        _KEPT[first] = entries


def _of(tensors: Collection[torch.Tensor]) -> list[Kept]:
    first = next(iter(tensors), None)
    return _KEPT[first] if first is not None and first in _KEPT else []
