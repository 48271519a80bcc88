"""Optimizer state as optax keeps it, and back, without optax or jax. ``optax_nodes`` has the structure of its trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypeAlias, cast

from lora_state_format.errors import ConversionError, FileError, OptionError, RefusedError, UnrepresentableError
from lora_state_format.foreign.optax_nodes import Keys, Leaf, Node, Tree, counters, nested, relative, survey
from lora_state_format.mapping.algorithms import (
    HYPERPARAMETERS,
    OPTIMIZER,
    STATE_STEPS,
    Algorithm,
    RuleLayout,
    check_alike,
    check_told,
    choose,
    group_options,
    layout_of,
    of_state,
    parameter_of,
    shape_of,
    stated_step,
    steps,
    values_of,
    zeros,
)
from lora_state_format.model.dtypes import item_size
from lora_state_format.model.states import Group, Naming, Optimizer, OptimizerState, Parameter, Scalar, Value
from lora_state_format.model.tensors import Tensor

__all__ = ["LAYOUTS", "OPTIONS", "from_tree", "to_tree"]

LAYOUTS: Final = (
    RuleLayout("adam", {"mu": "exp_avg", "nu": "exp_avg_sq"}, counts=True),
    RuleLayout("adamw", {"mu": "exp_avg", "nu": "exp_avg_sq"}, counts=True),
    RuleLayout("adamax", {"mu": "exp_avg", "nu": "exp_inf"}, counts=True),
    RuleLayout("lion", {"mu": "exp_avg"}, counts=True),
    RuleLayout("sgd", {"trace": "momentum_buffer"}),
    RuleLayout("adagrad", {"sum_of_squares": "sum"}),
    RuleLayout("adadelta", {"e_g": "square_avg", "e_x": "acc_delta"}),
    RuleLayout("rmsprop", {"nu": "square_avg"}),
    RuleLayout("rmsprop", {"mu": "grad_avg", "nu": "square_avg"}),
    RuleLayout("adafactor", {"v_row": "exp_avg_sq_row", "v_col": "exp_avg_sq_col", "v": "exp_avg_sq"}, counts=True),
)
CHAINS: Final[Mapping[str, str]] = {
    "adam": "N-", "adamw": "N--", "adamax": "N-", "lion": "N--", "sgd": "N-", "adagrad": "N-", "adadelta": "-N-",
    "rmsprop": "N--", "adafactor": "N----",
}  # fmt: skip
"""The tuple that ``optax.NAME(learning_rate)`` makes: ``N`` is the parameters' state, ``-`` an empty one."""

OPTIONS: Final[Mapping[str, str]] = {
    "optimizer": OPTIMIZER,
    "step": "steps taken, where the state of the rule does not count them",
    **HYPERPARAMETERS,
}
"""Facts about a tree that a caller may state."""


# --- reading ------------------------------------------------------------------------------------------------------


def from_tree(
    tree: Tree,
    *,
    path: object,
    options: Mapping[str, Any],
    origin: Mapping[str, Value],
    weights: Mapping[str, Tensor],
    resources: tuple[Any, ...] = (),
) -> OptimizerState:
    """Return the state in a tree, with a group for each label of ``multi_transform``. Names are paths joined with dots.

    ``options`` are those of ``OPTIONS``; ``weights`` are the parameters themselves, as far as they are known. The tree
    around the parameters' state is kept in ``origin["tree"]``, from which ``to_tree`` makes the same tree again.

    Raises what ``survey`` raises, ``FileError`` for shapes that disagree, and ``OptionError`` for a fact that the
    caller has to state, or states wrongly.
    """
    around, nodes = survey(tree, path)
    step = _step(around, nodes, options)
    groups, parameters, class_path = [], [], None
    for node in nodes:
        algorithm, layout = choose(options.get("optimizer"), LAYOUTS, node.held, f"{path}: {node.where}")
        held = {name: value for name, value in node.injected.items() if name in algorithm.options}
        stated = group_options(algorithm, {**held, **options})
        for name, value in stated:
            check_told(name, value, node.injected.get(name, value), path)
        groups.append(Group(0, stated, len(node.paths), node.label))
        count = step if node.count is None else node.count
        parameters += [_parameter(node, keys, algorithm, layout, count, weights, path) for keys in node.paths]
        class_path = algorithm.class_path
    holes: list[Value] = [[list(hole) for hole in node.holes] for node in nodes]
    return OptimizerState(
        optimizers=(Optimizer(class_path),),
        groups=tuple(groups),
        parameters=tuple(parameters),
        naming=Naming("checkpoint", details={"order": "unknown"}),
        origin={**origin, "tree": relative(around, step), **({"holes": holes} if any(holes) else {})},
        global_step=step,
        resources=resources,
    )


def _step(around: Value, nodes: Sequence[Node], options: Mapping[str, Any]) -> int | None:
    """Return the steps taken, by the states; else by the caller; else by schedules. ``None`` if they differ."""
    counts = {node.count for node in nodes if node.count is not None}
    if not counts and "step" in options:
        return stated_step(options)
    counts = counts or set(counters(around))
    return counts.pop() if len(counts) == 1 else None


def _parameter(
    node: Node,
    keys: Keys,
    algorithm: Algorithm,
    layout: RuleLayout,
    count: int | None,
    weights: Mapping[str, Tensor],
    path: object,
) -> Parameter:
    name, shape = ".".join(keys), None
    weight = weights.get(name)
    values = {slot: node.fields[field][keys] for field, slot in layout.fields.items()}
    if layout.rule == "adafactor":
        values, shape = _unfolded(values, weight, name, path)
    parameter = parameter_of(name, values, algorithm, count, weight=weight, path=path, shape=shape)
    return replace(parameter, foreign_names={"jax": _pointer(keys)}) if any("." in key for key in keys) else parameter


def _unfolded(
    values: Mapping[str, Leaf], weight: Tensor | None, name: str, path: object
) -> tuple[dict[str, Leaf], tuple[int, ...]]:
    """Return Adafactor's slots in use, and the parameter's shape.

    optax fills those not in use with one element. Its ``v_row`` is the mean over the *larger* axis (the last, if both
    are as large), where the row of other frameworks is the mean over the last.
    """
    row, col, whole = values["exp_avg_sq_row"], values["exp_avg_sq_col"], values["exp_avg_sq"]
    if shape_of(row) == shape_of(col) == (1,):
        return {"exp_avg_sq": whole}, shape_of(whole)
    sizes = shape_of(row) + shape_of(col)
    if shape_of(whole) != (1,) or len(sizes) != 2:
        raise RefusedError(
            f"'{name}' has factors of more than two axes, and frameworks choose different ones to factor", path=path
        )
    shape = sizes if sizes[0] == sizes[1] else weight.shape if weight else None
    if shape is None:
        raise OptionError(
            f"{path}: '{name}' has factors of {sizes[0]} and {sizes[1]} elements, which do not tell its axes "
            "apart; convert a file that has the parameters too (a TrainState)"
        )
    if shape not in (sizes, sizes[::-1]):
        raise FileError(f"'{name}' of shape {list(shape)} has factors of {sizes[0]} and {sizes[1]} elements", path=path)
    row, col = (row, col) if shape == sizes else (col, row)
    return {"exp_avg_sq_row": row, "exp_avg_sq_col": col}, shape


# --- writing ------------------------------------------------------------------------------------------------------

Members: TypeAlias = "tuple[Mapping[Keys, Parameter], Sequence[Keys]]"
"""The parameters of one node by path, and the paths that it leaves out."""


def to_tree(state: OptimizerState, *, options: Mapping[str, Any], base: Tree = None) -> Tree:
    """Return the tree of a state.

    ``base`` is a tree of the same optimizer, as ``tx.init(params)`` makes it, for all around the parameters' state;
    without it that is as the state's own origin had it, else as ``optax.NAME(lr)`` makes it.

    Raises ``UnrepresentableError`` for a state that optax cannot hold, ``ConversionError`` if ``base`` is of another
    optimizer.
    """
    algorithm = of_state(state, options.get("optimizer"))
    layout = layout_of(state, algorithm, LAYOUTS)
    around, nodes = _surroundings(state, layout, base)
    for parameters, _ in nodes:
        names = {parameter.name for parameter in parameters.values()}
        together = zip(state.groups, state.members(), strict=True)
        check_alike([group for group, members in together if names & {p.name for p in members}], algorithm, options)
    step = steps(state.parameters) if layout.counts and algorithm.step is not None else None
    if step is None:
        step = stated_step(options) if "step" in options else state.global_step

    def counter(dtype: str) -> Scalar:
        if step is None:
            raise UnrepresentableError("the state does not say how many steps were taken", remedy=STATE_STEPS)
        return Scalar(dtype, int(step).to_bytes(item_size(dtype), "little"))

    def filled(place: Value) -> Tree:
        if isinstance(place, int):
            parameters, holes = nodes[place]
            values = {keys: _values(parameter, algorithm, layout) for keys, parameter in parameters.items()}
            fields: dict[str, Tree] = {"count": counter("I32")} if layout.counts else {}
            for field in layout.fields:
                kept = {keys: held[field] for keys, held in values.items()}
                fields[field] = nested({**kept, **{hole: {} for hole in holes}})
            return fields
        if place == "zeros":
            every = {keys: parameter for parameters, _ in nodes for keys, parameter in parameters.items()}
            return nested({keys: _void(parameter, algorithm, layout) for keys, parameter in every.items()})
        if isinstance(place, list):
            return counter(str(place[1]))
        if isinstance(place, Mapping):
            return {key: filled(inner) for key, inner in place.items()}
        return cast("Scalar", place)

    return filled(around)


def _surroundings(state: OptimizerState, layout: RuleLayout, base: Tree) -> tuple[Value, list[Members]]:
    keyed = {_path(parameter): parameter for parameter in state.parameters}
    if base is not None:
        around, nodes = survey(base, "the base")
        odd = {keys for node in nodes for keys in node.paths} ^ keyed.keys()
        if odd:
            only = "the state" if min(odd) in keyed else "the base"
            raise ConversionError(f"only {only} has a parameter '{'.'.join(min(odd))}': the base is of another model")
        if any(node.fields.keys() != layout.fields.keys() for node in nodes):
            raise ConversionError(
                f"the base holds {', '.join(nodes[0].fields)}, which is not the state of {layout.rule}"
            )
        members: list[Members] = [({keys: keyed[keys] for keys in node.paths}, node.holes) for node in nodes]
        return relative(around, _step(around, nodes, {})), members
    if "tree" not in state.origin:
        return {str(n): 0 if mark == "N" else {} for n, mark in enumerate(CHAINS[layout.rule])}, [(keyed, ())]
    groups = [{_path(parameter): parameter for parameter in group} for group in state.members()]
    holes = cast("Sequence[Any]", state.origin.get("holes", [()] * len(groups)))
    return state.origin["tree"], [(g, [tuple(hole) for hole in h]) for g, h in zip(groups, holes, strict=True)]


def _values(parameter: Parameter, algorithm: Algorithm, layout: RuleLayout) -> Mapping[str, Leaf]:
    """Return a parameter's value for each field."""
    values = values_of(parameter, algorithm, layout)
    if layout.rule == "adafactor":
        values = _folded(values, parameter)
    if missing := [slot for slot in layout.fields.values() if slot not in values]:
        raise UnrepresentableError(f"'{parameter.name}' has no tensor '{missing[0]}', which optax keeps")
    return {field: values[slot] for field, slot in layout.fields.items()}


def _folded(values: dict[str, Leaf], parameter: Parameter) -> dict[str, Leaf]:
    """Return Adafactor's slots as optax has them; ``_unfolded`` says how."""
    if not values:
        return values
    unused = zeros(replace(parameter, shape=(1,), dtype=next(iter(values.values())).dtype))
    if "exp_avg_sq" in values:
        return {**values, "exp_avg_sq_row": unused, "exp_avg_sq_col": unused}
    if len(parameter.shape) != 2:
        raise UnrepresentableError(
            f"'{parameter.name}' has factors of {len(parameter.shape)} axes, where two are alike"
        )
    if parameter.shape[0] > parameter.shape[1]:
        row, col = values["exp_avg_sq_col"], values["exp_avg_sq_row"]
        values = {"exp_avg_sq_row": row, "exp_avg_sq_col": col}
    return {**values, "exp_avg_sq": unused}


def _void(parameter: Parameter, algorithm: Algorithm, layout: RuleLayout) -> Leaf:
    """Return zeros of the parameter's type, or of its state's."""
    first = next(iter(values_of(parameter, algorithm, layout).values()))
    return zeros(replace(parameter, dtype=parameter.dtype or first.dtype))


def _pointer(keys: Keys) -> str:
    """Return a path as a JSON pointer (RFC 6901): unambiguous for any keys."""
    return "".join("/" + key.replace("~", "~0").replace("/", "~1") for key in keys)


def _path(parameter: Parameter) -> Keys:
    pointer = parameter.foreign_names.get("jax")
    if pointer is None:
        return tuple(parameter.name.split("."))
    return tuple(key.replace("~1", "/").replace("~0", "~") for key in pointer.split("/")[1:])
