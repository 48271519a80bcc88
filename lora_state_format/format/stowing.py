"""What a state has that the format's own members have no place for: where a file keeps it (``spec/registry.md``).

Group options that are tensors with axes stand in ``globals``, since options hold none. How opaque tensors lie in memory
stands in the extension ``layouts``, which whoever does not know it may ignore.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from lora_state_format.model.states import OptimizerState, Role, Slot, Value, mapped, walk

__all__ = ["stowed", "unstowed"]

GROUP_OPTIONS: Final = "group_options"
"""Member of ``globals``: the number of a group, then the options of that group."""

LAYOUTS: Final = "layouts"
"""Extension: for a parameter, and then for the dotted path of a slot, the axes from the slowest to the fastest."""

AXES: Final = "axes"

GLOBALS: Final = "$globals"
"""Stands for a parameter where the slot is in ``globals``."""


def stowed(state: OptimizerState) -> OptimizerState:
    """Return the state with everything where a file keeps it."""
    return _with_layouts_stowed(_with_options_stowed(state))


def unstowed(state: OptimizerState) -> OptimizerState:
    """Return the state of a file with everything where it belongs."""
    return _with_options(_with_layouts(state))


# --- options --------------------------------------------------------------------------------------------------------


def _with_options_stowed(state: OptimizerState) -> OptimizerState:
    found: dict[str, Value] = {
        str(number): own
        for number, group in enumerate(state.groups)
        if (own := {key: value for key, value in group.options if _holds_tensor(value)})
    }
    if not found:
        return state
    groups = tuple(
        replace(group, options=tuple((key, value) for key, value in group.options if not _holds_tensor(value)))
        for group in state.groups
    )
    return replace(state, groups=groups, globals={**state.globals, GROUP_OPTIONS: found})


def _with_options(state: OptimizerState) -> OptimizerState:
    found = state.globals.get(GROUP_OPTIONS)
    if not isinstance(found, Mapping):
        return state
    own = {number: options for number, options in found.items() if isinstance(options, Mapping)}
    groups = tuple(
        replace(group, options=(*group.options, *own.get(str(number), {}).items()))
        for number, group in enumerate(state.groups)
    )
    return replace(state, groups=groups, globals={k: v for k, v in state.globals.items() if k != GROUP_OPTIONS})


def _holds_tensor(value: Value) -> bool:
    return any(isinstance(leaf, Slot) for _, leaf in walk(value))


# --- layouts --------------------------------------------------------------------------------------------------------


def _with_layouts_stowed(state: OptimizerState) -> OptimizerState:
    trees = {GLOBALS: state.globals, **{p.name: p.state or {} for p in state.parameters}}
    axes: dict[str, Value] = {name: own for name, tree in trees.items() if (own := _orders(tree))}
    others = {name: value for name, value in state.extensions.items() if name != LAYOUTS}
    stated: dict[str, Value] = {LAYOUTS: {"must_understand": False, AXES: axes}} if axes else {}
    return replace(state, extensions={**others, **stated}) if stated or LAYOUTS in state.extensions else state


def _orders(tree: Mapping[str, Value]) -> dict[str, Value]:
    """Return the orders of axes in a slot tree by the paths of their tensors."""
    return {
        _dotted(path): list(leaf.order)
        for path, leaf in walk(tree)
        if isinstance(leaf, Slot) and leaf.order is not None
    }


def _with_layouts(state: OptimizerState) -> OptimizerState:
    """Put orders of axes to their tensors; what fits no opaque tensor of the state is left out, as anyone may do."""
    stated = state.extensions.get(LAYOUTS)
    if not isinstance(stated, Mapping):
        return state
    axes = stated.get(AXES)
    found = axes if isinstance(axes, Mapping) else {}

    def ordered(name: str, tree: Any) -> Any:
        own = found.get(name)
        if not isinstance(own, Mapping):
            return tree
        return mapped(tree, lambda leaf, path: _laid_out(leaf, own.get(_dotted(path))))

    parameters = tuple(
        replace(p, state=ordered(p.name, p.state)) if p.name in found and p.state else p for p in state.parameters
    )
    extensions = {name: value for name, value in state.extensions.items() if name != LAYOUTS}
    return replace(state, parameters=parameters, globals=ordered(GLOBALS, state.globals), extensions=extensions)


def _laid_out(leaf: Value, axes: Value) -> Value:
    """Return an opaque tensor with its order of axes, if that is one; any other leaf as it is."""
    if not isinstance(leaf, Slot) or leaf.role is not Role.OPAQUE or not isinstance(axes, list):
        return leaf
    order = tuple(axis for axis in axes if type(axis) is int)
    whole = len(order) == len(axes) and sorted(order) == [*range(len(leaf.tensor.shape))]
    return replace(leaf, order=order) if whole else leaf


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
