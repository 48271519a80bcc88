"""Housekeeping: a state in, a changed state out. Nothing is read and nothing is written; ``writing.write`` does that.

Each function says how much it changed, and changing nothing is an ``OptionError``: a mistyped pattern must not look
like a success.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

from lora_state_format.errors import OptionError, Remedy
from lora_state_format.model.states import OptimizerState, Parameter, Scalar, Value
from lora_state_format.model.text import expression
from lora_state_format.naming import names
from lora_state_format.naming.names import Rename, peft_key, split_adapter

__all__ = ["Edited", "prune", "rename", "reset", "set_options", "strip"]


class Edited(NamedTuple):
    """The changed state, and how many groups (``set_options``), slots (``strip``) or parameters were changed."""

    state: OptimizerState
    changed: int


def set_options(state: OptimizerState, options: Mapping[str, Value], group: int | str | None = None) -> Edited:
    """Set options of all groups that have them, or of one, by number or name. A value keeps its kind of number.

    Raises ``OptionError`` for a group or an option that is not there, and for a value of another type.
    """
    chosen = [n for n, found in enumerate(state.groups) if group in (None, n, found.name)]
    if not chosen:
        stated = ", ".join(repr(found.name or number) for number, found in enumerate(state.groups))
        raise OptionError(f"there is no group {group!r}; there are: {stated}")
    for key in options:
        if not any(key in dict(state.groups[number].options) for number in chosen):
            known = dict.fromkeys(key for number in chosen for key, _ in state.groups[number].options)
            raise OptionError(f"no group has an option '{key}'; there are: {', '.join(known)}")
    changed, groups = 0, list(state.groups)
    for number in chosen:
        own = groups[number].options
        changed += any(key in options for key, _ in own)
        new = tuple((key, _like(key, old, options[key]) if key in options else old) for key, old in own)
        groups[number] = replace(groups[number], options=new)
    return Edited(replace(state, groups=tuple(groups)), changed)


def rename(state: OptimizerState, rule: Rename) -> Edited:
    """Rename parameters, as ``names.rename`` says; adapters and keys in adapter files follow from the new names.

    Raises ``OptionError`` if nothing is renamed or two names become one.
    """
    everything = [name for parameter in state.parameters for name in (parameter.name, *parameter.tied)]
    table = names.rename(everything, rule)
    count = sum(table[parameter.name] != parameter.name for parameter in state.parameters)
    if not count:
        raise OptionError(f"rename: the rule changes none of the {len(state)} names; the first is {_first(state)}")
    parameters = []
    for old in state.parameters:
        new = replace(old, name=table[old.name], tied=tuple(table[name] for name in old.tied))
        if new.name != old.name:
            adapter, key = split_adapter(new.name), peft_key(new.name)
            others = {kind: value for kind, value in old.foreign_names.items() if kind != "peft"}
            foreign = others | ({"peft": key[0]} if key else {})
            new = replace(new, adapter=adapter[1] if adapter else None, foreign_names=foreign)
        # The ids of a state dict that is keyed by name were the old names.
        parameters.append(replace(new, original_id=None) if isinstance(old.original_id, str) else new)
    return Edited(replace(state, parameters=tuple(parameters)), count)


def reset(state: OptimizerState, match: str) -> Edited:
    """Drop the state of the parameters whose names match, as if they had never taken a step (ReLoRA's resets).

    ``match`` is a regular expression, searched for. Raises ``OptionError`` if no parameter with state matches.
    """
    matches = _matcher(match)
    count = sum(matches(parameter) and parameter.state is not None for parameter in state.parameters)
    if not count:
        raise _nothing("with state ", match, state)
    parameters = tuple(replace(p, state=None) if matches(p) else p for p in state.parameters)
    return Edited(replace(state, parameters=parameters), count)


def strip(state: OptimizerState, slots: Collection[str]) -> Edited:
    """Drop slots by name from every parameter. Raises ``OptionError`` for a slot that no parameter has."""
    known = dict.fromkeys(slot for parameter in state.parameters for slot in parameter.state or ())
    for slot in slots:
        if slot not in known:
            raise OptionError(f"no parameter has a slot '{slot}'; there are: {', '.join(known) or 'none'}")
    count, parameters = 0, []
    for parameter in state.parameters:
        if parameter.state is not None:
            kept = {slot: value for slot, value in parameter.state.items() if slot not in slots}
            count += len(parameter.state) - len(kept)
            parameter = replace(parameter, state=kept)
        parameters.append(parameter)
    return Edited(replace(state, parameters=tuple(parameters)), count)


def prune(state: OptimizerState, match: str | None = None, *, carried: bool = False) -> Edited:
    """Remove parameters, from their groups too: those whose names match, or with ``carried`` those in no group.

    Groups that become empty stay. Raises ``OptionError`` if there is nothing to remove.
    """
    if (match is None) is not carried:
        raise OptionError(
            "prune removes either the parameters that match an expression or those in no group",
            remedy=Remedy("pass {match} or {carried}", {"match": ..., "carried": True}),
        )
    if match is None:
        goes = {parameter.name for parameter in state.carried}
        if not goes:
            raise OptionError(f"each of the {len(state)} parameters is in a group; none is carried")
    else:
        matches = _matcher(match)
        goes = {parameter.name for parameter in state.parameters if matches(parameter)}
        if not goes:
            raise _nothing("", match, state)
        if len(goes) == len(state):
            raise OptionError(f"prune: '{match}' matches all {len(state)} parameters, and nothing would be left")
    groups = tuple(
        replace(group, count=sum(parameter.name not in goes for parameter in members))
        for group, members in zip(state.groups, state.members(), strict=True)
    )
    parameters = tuple(parameter for parameter in state.parameters if parameter.name not in goes)
    return Edited(replace(state, groups=groups, parameters=parameters), len(goes))


def _like(key: str, old: Value, new: Value) -> Value:
    """Return the new value in the type of the old one, where both are numbers; ``None`` fits any type."""
    if isinstance(old, Scalar) and isinstance(new, (int, float)):
        with contextlib.suppress(TypeError):
            return Scalar.of(old.dtype, new)
    elif isinstance(old, tuple) and isinstance(new, (tuple, list)):
        if len(old) != len(new):
            raise OptionError(f"option '{key}' is {old!r}, and {new!r} has another length")
        return tuple(_like(key, a, b) for a, b in zip(old, new, strict=True))
    elif type(old) is float and type(new) is int:
        return float(new)
    elif old is None or new is None or type(old) is type(new):
        return new
    shown = f"{old.item()!r} ({old.dtype})" if isinstance(old, Scalar) else repr(old)
    raise OptionError(f"option '{key}' is {shown}, and {new!r} is of another type")


def _matcher(match: str) -> Callable[[Parameter], bool]:
    pattern = expression(match)
    return lambda parameter: pattern.search(parameter.name) is not None


def _nothing(what: str, match: str, state: OptimizerState) -> OptionError:
    return OptionError(f"none of the {len(state)} parameters {what}matches '{match}'; the first is {_first(state)}")


def _first(state: OptimizerState) -> str:
    return repr(next(iter(state), None))
