"""The live side of a load: a model's parameters under their names, and the optimizers that train them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lora_state_format.binding.live import LiveGroup, LiveOptimizer, LiveParameter
from lora_state_format.foreign.state_dict import Reader
from lora_state_format.model.states import Optimizer
from lora_state_format.model.tensors import Digest
from lora_state_format.model.text import class_path
from lora_state_format.torch.capture import (
    Models,
    Named,
    Optimizers,
    as_leaf,
    digest_of,
    group_name,
    group_options,
    grouped,
    lineage_of,
    named_tensors,
    optimizers_of,
    stepper,
)
from lora_state_format.torch.nested import beside, wrapped
from lora_state_format.torch.tensors import dtype_name, is_sharded

__all__ = ["Live", "describe"]


@dataclass(frozen=True)
class Live:
    """A model and its optimizers, looked at once for a load; ``side`` is what a plan sees of them."""

    named: Named
    optimizers: tuple[torch.optim.Optimizer, ...]
    side: LiveOptimizer


def describe(optimizer: Optimizers, model: Models) -> Live:
    """Return the live side of a load. Raises ``CaptureError`` as ``capture`` does."""
    named, optimizers = named_tensors(model), optimizers_of(optimizer)
    reader = Reader(as_leaf)
    groups = [
        LiveGroup(number, tuple(group_options(reader, group)), tuple(names), group_name(group))
        for number, group, names in grouped(optimizers, named)
    ]
    steppers = tuple(map(stepper, optimizers))
    lineages = tuple(lineage_of(type(found)) for found in steppers)
    side = LiveOptimizer(
        tuple(Optimizer(kinds[0]) for kinds in lineages),
        tuple(groups),
        {name: _parameter(name, tensor, named) for name, tensor in named.tensors.items()},
        lineages,
        tuple(frozenset(map(str, beside(found))) for found in steppers),
        tuple({name: class_path(type(held)) for name, held in wrapped(found).items()} for found in steppers),
    )
    return Live(named, optimizers, side)


def _parameter(name: str, tensor: torch.Tensor, named: Named) -> LiveParameter:
    whole = not is_sharded(tensor) and name not in named.parts
    return LiveParameter(
        name,
        named.shape(name),
        named.dtype(name),
        tensor.requires_grad,
        named.tied.get(name, ()),
        (lambda: digest_of(tensor)) if whole else None,
        _corner(tensor) if whole else None,
        (lambda: _constant(tensor)) if whole else None,
        named.layers.get(name),
        own if name in named.parts and named.dtype(name) != (own := dtype_name(tensor.dtype)) else None,
    )


def _corner(tensor: torch.Tensor) -> Callable[[tuple[int, ...]], Digest]:
    """Return what digests the first elements along each axis, as many as a shape says."""
    return lambda shape: digest_of(tensor.detach()[tuple(map(slice, shape))])


def _constant(tensor: torch.Tensor) -> bool:
    flat = tensor.detach().reshape(-1)
    return bool((flat == flat[:1]).all())
