"""Applying a map of names and layouts to a state, and going back.

A rule applies to every slot that has the parameter's axes (role ``param``); where it transposes, ``row`` and ``col``
change places; other tensors of parameters whose elements move are refused. The name chooses the rule, never a shape
that happens to fit; only the number of axes has to be the rule's. Nothing is read: tensors are ranges.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any, Final

from lora_state_format.errors import ConversionError, MissingNamesError, OptionError, Remedy, UnrepresentableError
from lora_state_format.mapping import cuts
from lora_state_format.mapping.algorithms import ALGORITHMS
from lora_state_format.mapping.cuts import Heads, Runs
from lora_state_format.mapping.maps import FIELD, MAPS, Map, MapRule, load
from lora_state_format.model.states import Checkpoint, OptimizerState, Parameter, Role, Slot, Value, walk
from lora_state_format.model.tensors import Box, Piece, Tensor, contiguous
from lora_state_format.naming.modules import in_module_order
from lora_state_format.naming.names import peft_key, split_adapter

__all__ = ["OPTION", "apply", "apply_to_weights", "invert", "on_reading", "on_writing"]

OPTION: Final = "map of names and axes: one that is known, or a file"
"""The meaning of a converter's option ``map``."""


def on_reading(checkpoint: Checkpoint, name: str | None) -> Checkpoint:
    """Return a checkpoint under our names, by the named map; unchanged without a map, and by ``none``."""
    if name in (None, "none"):
        return checkpoint
    assert isinstance(checkpoint.state, OptimizerState)
    layout = load(name)
    weights = apply_to_weights(checkpoint.weights, layout)
    return replace(checkpoint, state=apply(checkpoint.state, layout), weights=weights)


def on_writing(state: OptimizerState, name: str | None, converter: str) -> OptimizerState:
    """Return a state under a format's names: by the named map, else by the one that the format was read with.

    Raises ``OptionError`` where neither is there: the names and axes of one framework are not those of another.
    """
    if name is None and state.origin.get("format") == converter:
        name = str(state.origin.get("map", "none"))
    if name is None:
        known = ", ".join(layout.name for layout in MAPS)
        raise OptionError(
            f"the names and axes of the state are not those of {converter}; maps are known for {known}",
            remedy=Remedy("pass one, a file, or 'none' to keep the names, as {options}", {"options": {"map": ...}}),
        )
    return state if name == "none" else invert(state, load(name))


# --- applying -----------------------------------------------------------------------------------------------------

_SWAPPED: Final = {Role.ROW: Role.COL, Role.COL: Role.ROW}


@dataclass(frozen=True, slots=True)
class _Way:
    """How a foreign tensor, or a part of it, becomes ours: the layer in a stack, the rows, and our name."""

    rule: MapRule
    name: str
    layer: int = 0
    rows: Runs | None = None


def _ways(foreign: str, shape: Sequence[int], layout: Map, heads: Heads | None) -> Iterator[_Way]:
    """Yield what becomes of a foreign tensor: one of ours, or several.

    Raises ``ConversionError`` for a name without a rule or with one that refuses, and rows that do not divide.
    """
    rule, captured = _fitting(foreign, shape, layout)
    if rule.parts:
        apart = cuts.cut(foreign, shape, rule.cut, len(rule.parts), heads)
        for part, rows in zip(rule.parts, apart, strict=True):
            yield _Way(rule, _filled(rule.ours, {**captured, "part": part}), rows=rows)
    else:
        for layer in range(1 if rule.unstack is None else shape[rule.unstack]):
            values = {"layer": str(layer), **captured, "adapter": "default"}
            yield _Way(rule, _filled(rule.ours, values), layer)


def apply(state: OptimizerState, layout: Map, heads: Heads | None = None) -> OptimizerState:
    """Return a state of foreign names and axes under ours, in the order of a torch model's modules if it is known.

    ``heads`` is for maps that cut queries, keys and values apart.

    Raises ``ConversionError`` for a name without a rule or with one that refuses, ``UnrepresentableError`` for slots
    that cannot be permuted.
    """
    shapes: dict[str, Value] = {}
    groups, parameters, ordered = [], [], True
    for group, members in zip(state.groups, state.members(), strict=True):
        found: dict[str, Parameter] = {}
        for parameter in members:
            for way in _ways(parameter.name, parameter.shape, layout, heads):
                rule = way.rule
                _check_elementwise(rule, state, parameter)
                if way.name in found:
                    raise ConversionError(f"map '{layout.name}' gives two parameters the name '{way.name}'")
                found[way.name] = _here(parameter, way, layout)
                if rule.merge and len(parameter.shape) > 2 + (rule.unstack is not None):
                    shapes[way.name] = list(parameter.shape)
        order, known = _module_order(found)
        ordered = ordered and known
        groups.append(replace(group, count=len(order)))
        parameters += [found[name] for name in order]
    _check_grouped(state)
    details = {**state.naming.details, "map": layout.name, "order": "modules" if ordered else "unknown"}
    return replace(
        state,
        groups=tuple(groups),
        parameters=tuple(parameters),
        naming=replace(state.naming, details=details),
        origin={**state.origin, "map": layout.name, **({"shapes": shapes} if shapes else {})},
    )


def apply_to_weights(weights: Mapping[str, Tensor], layout: Map, heads: Heads | None = None) -> dict[str, Tensor]:
    """Return the parameters' own tensors as ``apply`` has them, under PEFT's keys if there are any."""
    found: dict[str, Tensor] = {}
    for foreign, tensor in weights.items():
        try:
            ways = list(_ways(foreign, tensor.shape, layout, heads))
        except ConversionError:
            continue
        for way in ways:
            key = peft_key(way.name)
            found[key[0] if key else way.name] = _moved(tensor, way)
    return found


def _fitting(name: str, shape: Sequence[int], layout: Map) -> tuple[MapRule, dict[str, str]]:
    named = False
    for rule in layout.rules:
        captured = _captured(rule.foreign, name)
        if captured is None:
            continue
        if rule.refuse:
            raise ConversionError(f"'{name}' does not convert (map '{layout.name}'): {rule.refuse}")
        named = True
        if _fits(rule, len(shape)):
            return rule, captured
    why = f"has {len(shape)} axes, which no rule of map '{layout.name}' for its name has" if named else ""
    raise ConversionError(f"'{name}' {why or f'has no rule in map {layout.name!r}'}")


def _fits(rule: MapRule, count: int) -> bool:
    """Return whether a rule is for tensors with so many axes."""
    count -= rule.unstack is not None
    return count >= 2 if rule.merge else rule.axes is None or count == len(rule.axes)


def _check_grouped(state: OptimizerState) -> None:
    if state.carried:
        raise ConversionError(f"'{state.carried[0].name}' has state and is in no group, so no map says where to put it")


def _check_elementwise(rule: MapRule, state: OptimizerState, parameter: Parameter) -> None:
    """Raise ``ConversionError`` where a tensor is taken apart that its optimizer updates as a whole.

    Parts of a fused matrix are parameters of their own elsewhere, so there only a class that is known to do so counts.
    """
    rows = {algorithm.class_path: algorithm for algorithm in ALGORITHMS}
    for optimizer in state.optimizers:
        row = rows.get(optimizer.class_path or "")
        whole = row is None or not row.elementwise
        known = optimizer.class_path is not None
        if whole and (rule.unstack is not None or (rule.parts and known)):
            what = "stacked layers" if rule.unstack is not None else f"{len(rule.parts)} matrices"
            raise ConversionError(
                f"'{parameter.name}' holds {what}, and {optimizer.class_path or 'its optimizer'} updates whole "
                f"tensors, or may do so: taken apart, {'they' if rule.parts else 'the layers'} would be updated "
                "differently"
            )


def _here(parameter: Parameter, way: _Way, layout: Map) -> Parameter:
    adapter, peft = split_adapter(way.name), peft_key(way.name)
    state = parameter.state
    if state is not None and way.rule.moves:
        state = _permuted(state, parameter, way.rule, lambda tensor: _moved(tensor, way))
    return replace(
        parameter,
        name=way.name,
        shape=_moved(Tensor("U8", parameter.shape, ()), way).shape,
        state=state,
        adapter=adapter[1] if adapter else None,
        foreign_names={**parameter.foreign_names, **({"peft": peft[0]} if peft else {})},
        weights=None if way.rule.moves else parameter.weights,
        tied=() if way.rule.moves else tuple(_tied(parameter, layout)),
    )


def _tied(parameter: Parameter, layout: Map) -> Iterator[str]:
    """Yield the other names of a parameter, by a map; those without a rule are left out."""
    for name in parameter.tied:
        with suppress(ConversionError):
            yield from (way.name for way in _ways(name, parameter.shape, layout, None))


def _permuted(
    state: Mapping[str, Value], parameter: Parameter, rule: MapRule, move: Callable[[Tensor], Tensor]
) -> dict[str, Value]:
    """Return slots of a parameter whose elements move."""
    result: dict[str, Value] = {}
    transposed = rule.axes == (1, 0) and rule.unstack is None and len(parameter.shape) == 2
    for name, value in state.items():
        if isinstance(value, Mapping):
            result[name] = _permuted(value, parameter, rule, move)
        elif not isinstance(value, Slot):
            if any(isinstance(leaf, Slot) for _, leaf in walk(value)):
                raise UnrepresentableError(f"'{parameter.name}' has a list of tensors in '{name}', which no map moves")
            result[name] = value
        elif value.role is Role.PARAM:
            result[name] = Slot(move(value.tensor), Role.PARAM)
        elif value.role in _SWAPPED and transposed:
            other = name.replace("row", "\0").replace("col", "row").replace("\0", "col")
            tensor = value.tensor.permute((1, 0)) if len(value.tensor.shape) == 2 else value.tensor
            result[other] = Slot(tensor, _SWAPPED[value.role])
        else:
            raise UnrepresentableError(
                f"'{parameter.name}' has a slot '{name}' of role {value.role.value}, which cannot be permuted with it"
            )
    return result


def _module_order(names: Mapping[str, Parameter]) -> tuple[list[str], bool]:
    try:
        return in_module_order(names), True
    except MissingNamesError:
        return list(names), False


# --- going back ---------------------------------------------------------------------------------------------------


def invert(state: OptimizerState, layout: Map) -> OptimizerState:
    """Return a state under foreign names, stacked as they are there: the inverse of ``apply``.

    Raises ``ConversionError`` for a name without a rule, a stack that lacks a layer, and axes to be split in
    an unknown way; ``UnrepresentableError`` for slots that cannot be permuted.
    """
    shapes: Any = state.origin.get("shapes", {}) if state.origin.get("map") == layout.name else None
    groups, parameters = [], []
    for group, members in zip(state.groups, state.members(), strict=True):
        stacks: dict[str, dict[int, Parameter]] = {}
        rules: dict[str, MapRule] = {}
        for parameter in members:
            rule, captured = _fitting_back(parameter, layout)
            _check_elementwise(rule, state, parameter)
            foreign = _filled(rule.foreign, captured)
            layer = 0 if rule.unstack is None else int(captured["layer"])
            stack = stacks.setdefault(foreign, {})
            if layer in stack:
                raise ConversionError(f"'{stack[layer].name}' and '{parameter.name}' are both '{foreign}'")
            stack[layer], rules[foreign] = parameter, rule
        groups.append(replace(group, count=len(stacks)))
        parameters += [_there(foreign, rules[foreign], stack, shapes, layout) for foreign, stack in stacks.items()]
    _check_grouped(state)
    return replace(state, groups=tuple(groups), parameters=tuple(parameters))


def _fitting_back(parameter: Parameter, layout: Map) -> tuple[MapRule, dict[str, str]]:
    for rule in layout.rules:
        captured = _captured(rule.ours, parameter.name) if rule.leads_back else None
        if captured is not None and (rule.axes is None or len(rule.axes) == len(parameter.shape)):
            return rule, captured
    raise ConversionError(
        f"'{parameter.name}' of shape {list(parameter.shape)} has no rule in map '{layout.name}' for the way back"
    )


def _there(foreign: str, rule: MapRule, stack: Mapping[int, Parameter], shapes: Any, layout: Map) -> Parameter:
    if sorted(stack) != list(range(len(stack))):
        raise ConversionError(f"'{foreign}' is a stack of layers, of which only {sorted(stack)} are there")
    members = [stack[layer] for layer in range(len(stack))]
    first = members[0]
    if rule.merge and shapes is None:
        raise ConversionError(
            f"'{first.name}' has axes to split for map '{layout.name}', and only a state that was read with it says how"
        )
    single = Tensor("U8", first.shape, ()).permute(_inverse(rule.axes)).shape if rule.axes else first.shape
    if rule.merge and first.name in shapes:
        whole = tuple(shapes[first.name])
        single = whole if rule.unstack is None else whole[: rule.unstack] + whole[rule.unstack + 1 :]
    shape = single
    if rule.unstack is not None:
        shape = (*single[: rule.unstack], len(members), *single[rule.unstack :])
    if _fitting(foreign, shape, layout)[0] is not rule:
        raise ConversionError(
            f"'{first.name}' would become '{foreign}', for which map '{layout.name}' has another rule"
        )

    def back(tensor: Tensor) -> Tensor:
        tensor = tensor.permute(_inverse(rule.axes)) if rule.axes else tensor
        return tensor if tensor.shape == single else contiguous(tensor.dtype, single, tensor)

    states = [m.state if m.state is None or not rule.moves else _permuted(m.state, m, rule, back) for m in members]
    return replace(
        first,
        name=foreign,
        shape=shape,
        state=states[0] if rule.unstack is None else _stacked(foreign, states, shape, rule.unstack),
        adapter=None,
        foreign_names={kind: key for kind, key in first.foreign_names.items() if kind != "peft"},
        weights=None if rule.moves else first.weights,
    )


def _stacked(
    foreign: str, states: Sequence[Mapping[str, Value] | None], shape: tuple[int, ...], axis: int
) -> Mapping[str, Value] | None:
    if all(state is None for state in states):
        return None
    first = states[0] or {}
    result: dict[str, Value] = {}
    for name, value in first.items():
        values = [(state or {}).get(name) for state in states]
        tensors = [other.tensor for other in values if isinstance(other, Slot)]
        if len(tensors) == len(values):
            unit = (*shape[:axis], 1, *shape[axis + 1 :])
            starts = [tuple(n * (at == axis) for at in range(len(shape))) for n in range(len(tensors))]
            pieces = tuple(Piece(t, 0, Box(start, unit)) for t, start in zip(tensors, starts, strict=True))
            result[name] = Slot(Tensor(tensors[0].dtype, shape, pieces), Role.PARAM)
        elif all(other == value for other in values):
            result[name] = value
        else:
            raise ConversionError(f"'{foreign}' is a stack of layers that differ in '{name}'")
    if any((state or {}).keys() != first.keys() for state in states):
        raise ConversionError(f"'{foreign}' is a stack of layers that do not have the same slots")
    return result


# --- names and tensors --------------------------------------------------------------------------------------------


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """Return the pattern of names that fit a template with fields."""
    kinds = {"path": ".+", "layer": "[0-9]+", "kind": "weight|bias"}
    text, end = "", 0
    for match in FIELD.finditer(template):
        text += f"{re.escape(template[end : match.start()])}(?P<{match[1]}>{kinds.get(match[1], '[^.]+')})"
        end = match.end()
    return re.compile(text + re.escape(template[end:]))


def _captured(template: str, name: str) -> dict[str, str] | None:
    """Return the fields of a name that fits a template; ``None`` for another name."""
    match = _pattern(template).fullmatch(name)
    if match is None:
        return None
    captured = match.groupdict()
    for field in FIELD.finditer(template):
        if field[2]:
            number = int(captured[field[1]]) - int(field[2])
            if number < 0:
                return None
            captured[field[1]] = str(number)
    return captured


def _filled(template: str, values: Mapping[str, str]) -> str:
    return FIELD.sub(
        lambda field: str(int(values[field[1]]) + int(field[2])) if field[2] else values[field[1]], template
    )


def _inverse(axes: Sequence[int]) -> list[int]:
    return sorted(range(len(axes)), key=lambda axis: axes[axis])


def _moved(tensor: Tensor, way: _Way) -> Tensor:
    """Return a foreign tensor, or a part of it, as ours."""
    rule = way.rule
    if way.rows is not None:
        return cuts.rows(tensor, way.rows)
    if rule.unstack is not None:
        axis, shape = rule.unstack, tensor.shape
        part = tensor.part(
            [way.layer * (at == axis) for at in range(len(shape))], [*shape[:axis], 1, *shape[axis + 1 :]]
        )
        tensor = contiguous(tensor.dtype, (*shape[:axis], *shape[axis + 1 :]), part)
    if rule.merge == "leading" and len(tensor.shape) > 2:
        tensor = contiguous(tensor.dtype, (prod(tensor.shape[:-1]), tensor.shape[-1]), tensor)
    if rule.merge == "trailing" and len(tensor.shape) > 2:
        tensor = contiguous(tensor.dtype, (tensor.shape[0], prod(tensor.shape[1:])), tensor)
    return tensor if rule.axes is None else tensor.permute(rule.axes)
