"""Group options that are tensors with axes: a file has them in its ``globals``, since options hold none (4.7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from lora_state_format.model.states import OptimizerState, Slot, Value, walk

__all__ = ["stowed", "unstowed"]

GROUP_OPTIONS: Final = "group_options"
"""Member of ``globals``: the number of a group, then the options of that group."""


def stowed(state: OptimizerState) -> OptimizerState:
    """Return the state with options that hold tensors in ``globals``."""
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


def unstowed(state: OptimizerState) -> OptimizerState:
    """Return the state with such options in their groups, behind the others."""
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
