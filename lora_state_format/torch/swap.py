"""Put a loaded state in place of an optimizer's own: all of it, or, whatever happens on the way, nothing.

Everything is computed before. What changes is remembered, and put back if anything is raised, ``KeyboardInterrupt``
included.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from lora_state_format.errors import BindError
from lora_state_format.model.states import Scalar, Slot, Value, mapped
from lora_state_format.torch.tensors import scalar_to_torch, tensors_in, to_torch

__all__ = ["Change", "Options", "group_changes", "plain", "remembered", "swap"]

_HOOKS: Final = ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
_KEPT: Final = frozenset({"state", "param_groups", "defaults", *_HOOKS})

InPlace = tuple[torch.Tensor, torch.Tensor]
"""A live tensor, and the values that it is to have."""


@dataclass(frozen=True)
class Change:
    """What one optimizer is to have: the whole of ``state``, and ``beside``, which only its class can put in place."""

    optimizer: torch.optim.Optimizer
    state: Mapping[Any, Any]
    beside: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """What groups are to have: new values by group, tensors to fill in place, and defaults that part from those."""

    groups: Sequence[tuple[dict[str, Any], Mapping[str, Any]]]
    in_place: Sequence[InPlace]
    defaults: Sequence[tuple[dict[str, Any], Mapping[str, Any]]]


# --- options --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def group_changes(optimizers: Sequence[torch.optim.Optimizer], chosen: Sequence[Mapping[str, Value]]) -> Options:
    """Return how the groups get the values that a plan chose for them.

    A live tensor stays the object it is, since compiled and captured steps hold on to it, and numbers stay numbers.
    torch gives one tensor to all groups and to ``defaults``; groups that get different values part, and ``defaults``
    keeps what it has.

    Raises:
        BindError: A tensor is to get values of another shape.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    wanted: dict[int, list[torch.Tensor]] = {}
    for group, options in zip(groups, chosen, strict=True):
        for key, current in group.items():
            if key == "params":  # no option, and each would be copied
                continue
            for tensor, value in _pairs(key, current, options.get(key, current)):
                wanted.setdefault(id(tensor), []).append(value)
    split = {key for key, values in wanted.items() if any(not torch.equal(values[0], value) for value in values)}
    in_place: dict[int, InPlace] = {}
    changes = []
    for group, options in zip(groups, chosen, strict=True):
        changed = {key: _changed(key, group.get(key), value, split, in_place) for key, value in options.items()}
        changes.append((group, {key: value for key, value in changed.items() if value is not group.get(key)}))
    defaults = [
        (optimizer.defaults, {k: v.clone() for k, v in optimizer.defaults.items() if id(v) in in_place})
        for optimizer in optimizers
    ]
    return Options(changes, tuple(in_place.values()), defaults)


def _pairs(key: str, current: Any, value: Any) -> list[InPlace]:
    """Return the tensors in an option, each with the values that it is to have."""
    if isinstance(current, (list, tuple)) and isinstance(value, (list, tuple)) and len(current) == len(value):
        return [pair for a, b in zip(current, value, strict=True) for pair in _pairs(key, a, b)]
    if isinstance(current, torch.Tensor) and isinstance(value, (int, float, Scalar, Slot, torch.Tensor)):
        return [(current, _values(key, current, value))]
    return []


def _values(key: str, current: torch.Tensor, value: Any) -> torch.Tensor:
    new = plain(value) if isinstance(value, (Scalar, Slot)) else torch.as_tensor(value)
    if new.numel() != current.numel():
        raise BindError(
            f"the option {key} is a tensor of shape {list(current.shape)} in the optimizer and {list(new.shape)} in "
            f"the file: options={{{key!r}: 'current'}} keeps the live one"
        )
    return new.detach().reshape(current.shape).to(device=current.device, dtype=current.dtype, copy=True)


def _changed(key: str, current: Any, value: Any, split: set[int], in_place: dict[int, InPlace]) -> Any:
    """Return a group option's new value; the live object itself where that is filled in place."""
    if isinstance(current, (list, tuple)) and isinstance(value, (list, tuple)) and len(current) == len(value):
        return type(current)(_changed(key, a, b, split, in_place) for a, b in zip(current, value, strict=True))
    if isinstance(current, torch.Tensor) and isinstance(value, (int, float, Scalar, Slot, torch.Tensor)):
        new = _values(key, current, value)
        if id(current) in split or current.is_inference():
            return new
        in_place[id(current)] = (current, new)
        return current
    if isinstance(value, Scalar) and isinstance(current, (int, float)):
        return value.item()
    return plain(value)


def plain(value: Value) -> Any:
    """Return a value of a state as torch has it: tensors of its own in CPU memory."""
    return mapped(value, _plain)


def _plain(leaf: Value, path: tuple[Any, ...]) -> Any:
    if isinstance(leaf, Slot):
        return to_torch(leaf.tensor, leaf.order)
    return scalar_to_torch(leaf) if isinstance(leaf, Scalar) else leaf


# --- the swap -------------------------------------------------------------------------------------------------------


def swap(changes: Sequence[Change], options: Options, finish: Callable[[], None], unfinish: Callable[[], None]) -> None:
    """Put everything in place.

    Args:
        changes: What each optimizer is to have.
        options: What their groups are to have.
        finish: Does what else belongs to the load.
        unfinish: Undoes that, whether it was done or not.
    """
    undo = [remembered(change.optimizer) for change in changes]
    undo.append(unfinish)
    try:
        for change in changes:
            if change.beside:
                _load_beside(change)
            _refill(change.optimizer.state, change.state)
        for mapping, values in (*options.groups, *options.defaults):
            mapping.update(values)
        for tensor, new in options.in_place:
            _fill(tensor, new)
        finish()
    except BaseException:
        for back in reversed(undo):
            back()
        raise


def remembered(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Return what puts an optimizer back as it is now, the values included of tensors that a load fills in place."""
    attributes, state = dict(vars(optimizer)), dict(optimizer.state)
    mappings = [(mapping, dict(mapping)) for mapping in (*optimizer.param_groups, optimizer.defaults)]
    options = [value for _, before in mappings for key, value in before.items() if key != "params"]
    filled = (*tensors_in(options), *getattr(optimizer, "masters", ()))
    tensors = [(tensor, tensor.detach().clone()) for tensor in filled]

    def back() -> None:
        vars(optimizer).clear()
        vars(optimizer).update(attributes)
        for mapping, before in mappings:
            _refill(mapping, before)
        _refill(optimizer.state, state)
        for tensor, values in tensors:
            if not torch.equal(tensor, values):
                _fill(tensor, values)

    return back


@torch.no_grad()
def _fill(tensor: torch.Tensor, values: torch.Tensor) -> None:
    tensor.copy_(values)


def _refill(mapping: Any, values: Mapping[Any, Any]) -> None:
    """Make a mapping equal to another one; it stays the object it is."""
    mapping.clear()
    mapping.update(values)


def _load_beside(change: Change) -> None:
    """Let an optimizer's class take back what it adds to its state dict; everything else stays as it is."""
    optimizer, attributes = change.optimizer, vars(change.optimizer)
    kept = {key: value for key, value in attributes.items() if key in _KEPT}
    numbers = iter(range(sum(len(group["params"]) for group in optimizer.param_groups)))
    groups = [{**group, "params": [next(numbers) for _ in group["params"]]} for group in optimizer.param_groups]
    attributes.update({key: OrderedDict() for key in _HOOKS})
    optimizer.load_state_dict({"state": {}, "param_groups": groups, **change.beside})
    attributes.update(kept)
