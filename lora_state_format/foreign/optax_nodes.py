"""The structure of an optax state: which of its dicts hold the parameters' state, and what is around them.

``flax.serialization.to_state_dict`` makes dicts of an optax state and drops the types: tuples become ``{"0": ..., "1":
...}``, ``EmptyState()`` and ``MaskedNode()`` become ``{}``. So a tree is walked by what its nodes hold, never by
position: ``{count, mu, nu}`` is the state of one transformation, and each of its fields holds the parameters' own tree.
Everything between the root and these nodes has to be a known wrapper, or the tree is refused. Field names were read off
optax 0.2.8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, cast

from lora_state_format.errors import FileError, RefusedError
from lora_state_format.mapping.algorithms import REFUSED
from lora_state_format.model.states import Scalar, Value, walk
from lora_state_format.model.tensors import Tensor

__all__ = ["FIELDS", "NODES", "Keys", "Leaf", "Node", "Tree", "count_of", "leaves", "nested", "relative", "survey"]

Tree: TypeAlias = "Mapping[str, Tree] | Tensor | Scalar | bool | int | float | str | None"
"""A state dict of flax: arrays are tensors, or scalars where they have no axes."""
Leaf: TypeAlias = "Tensor | Scalar"
Keys: TypeAlias = "tuple[str, ...]"

NODES: Final = frozenset(
    map(
        frozenset,
        (
            {"count", "mu", "nu"}, {"count", "mu"}, {"trace"}, {"sum_of_squares"}, {"e_g", "e_x"}, {"nu"},
            {"mu", "nu"}, {"count", "v_row", "v_col", "v"},
        ),
    )
)  # fmt: skip
"""The fields of the states that convert."""

REFUSED_NODES: Final[Mapping[frozenset[str], str]] = {
    frozenset({"count", "mu", "nu", "nu_max"}): "amsgrad",
    frozenset({"count", "mu", "ns_coeffs"}): "muon",
    frozenset({"b1", "weight_sum", "step_count", "max_lr", "base_optimizer_state", "z"}): "schedule_free",
    frozenset({"exp_avg", "exp_avg_sq", "grad_sum", "params0", "estim_lr", "numerator_weighted", "count"}): "prodigy",
}
_WRAPPERS: Final = (
    ({"inner_state"}, "inner_state"),  # masked
    ({"inner_states"}, "inner_states"),  # multi_transform, partition
    ({"count", "hyperparams", "hyperparams_states", "inner_state"}, "inner_state"),  # inject_hyperparams
    ({"mini_step", "gradient_step", "inner_opt_state", "acc_grads", "skip_state"}, "inner_opt_state"),  # MultiSteps
    ({"notfinite_count", "last_finite", "total_notfinite", "inner_state"}, "inner_state"),  # apply_if_finite
    ({"step", "opt_state"}, "opt_state"),  # nnx.Optimizer
)
_OMITTED: Final = {"hyperparams_states", "skip_state"}
"""Members that nnx leaves out where they are empty."""
WRAPPERS: Final = {
    frozenset(fields - omitted): inner for fields, inner in _WRAPPERS for omitted in (frozenset[str](), _OMITTED)
}
"""The fields of a wrapper -> the one to go on with."""
FIELDS: Final = frozenset().union(*NODES, *REFUSED_NODES, *WRAPPERS)
"""Every key that may be at the root of a tree, positions in a tuple aside."""
INJECTED: Final[Mapping[str, str]] = {
    "learning_rate": "lr", "eps": "eps", "weight_decay": "weight_decay", "momentum": "momentum", "rho": "rho",
    "decay": "alpha",
}  # fmt: skip
"""Option that ``inject_hyperparams`` keeps in the state -> torch's name for it."""


@dataclass(frozen=True, slots=True)
class Node:
    """The state of one transformation.

    ``fields`` holds the leaves of each field by path, ``holes`` the paths that are left out, ``injected`` the options
    that ``inject_hyperparams`` keeps around it, under torch's names.
    """

    place: Keys
    fields: Mapping[str, Mapping[Keys, Leaf]]
    holes: tuple[Keys, ...]
    count: int | None
    injected: Mapping[str, Value]

    @property
    def where(self) -> str:
        """Where the node is in the tree, for messages."""
        return "/".join(self.place) or "the root"

    @property
    def held(self) -> list[str]:
        """The fields, and ``count`` if it is one."""
        return [*self.fields, *([] if self.count is None else ["count"])]

    @property
    def paths(self) -> tuple[Keys, ...]:
        """The paths of its parameters."""
        return tuple(next(iter(self.fields.values())))

    @property
    def label(self) -> str | None:
        """Its label under ``multi_transform``."""
        return self.place[self.place.index("inner_states") + 1] if "inner_states" in self.place else None


def leaves(tree: Tree, path: Keys = ()) -> Iterator[tuple[Keys, Tree]]:
    """Yield every leaf of a tree with its path; an empty dict is a leaf."""
    if isinstance(tree, Mapping) and tree:
        for key, inner in tree.items():
            yield from leaves(inner, (*path, key))
    else:
        yield path, tree


def nested(values: Mapping[Keys, Leaf | dict[str, Tree]]) -> dict[str, Tree]:
    """Return values by path as a tree. Its keys are sorted, as jax sorts them: positions by number, names as text."""
    tree: dict[str, Any] = {}
    for keys in sorted(values, key=lambda keys: [(0, int(k), k) if k.isdecimal() else (1, 0, k) for k in keys]):
        inner = tree
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = values[keys]
    return tree


def survey(tree: Tree, path: object) -> tuple[Value, list[Node]]:
    """Return the tree with a number in place of each node, and the nodes, whose parameters are disjoint.

    Raises ``RefusedError`` for an unknown wrapper or state, or one that does not convert; ``path`` names the tree.
    """
    nodes: list[Node] = []
    around = _walk(tree, (), nodes, {}, path)
    seen: dict[Keys, Node] = {}
    for node in nodes:
        for keys in node.paths:
            if seen.setdefault(keys, node) is not node:
                raise RefusedError(
                    f"{seen[keys].where} and {node.where} both hold state of '{'.'.join(keys)}': a rule of two parts "
                    "(RMSprop with momentum) does not convert: optax scales the second by the learning rate",
                    path=path,
                )
    if not seen:
        raise FileError("holds no parameter's state: its optimizer keeps none, or it is not of optax", path=path)
    return around, nodes


def _walk(tree: Tree, place: Keys, nodes: list[Node], injected: Mapping[str, Value], path: object) -> Value:
    where = "/".join(place) or "the root"
    if isinstance(tree, Scalar):
        return tree
    if not isinstance(tree, Mapping):
        raise RefusedError(f"{where} is {_described(tree)}, where a state of optax was expected", path=path)
    fields = frozenset(tree)
    if fields in NODES:
        nodes.append(_node(tree, place, injected, path))
        return len(nodes) - 1
    if fields in WRAPPERS:
        return _wrapper(tree, WRAPPERS[fields], place, nodes, injected, path)
    if all(key.isdecimal() for key in tree):
        return {key: _walk(value, (*place, key), nodes, injected, path) for key, value in tree.items()}
    if fields == {"count"}:
        return _numbers(tree, place, path)
    if fields in REFUSED_NODES:
        rule = REFUSED_NODES[fields]
        raise RefusedError(f"{where} is the state of {rule}, which does not convert: {REFUSED[rule]}", path=path)
    raise RefusedError(f"{where} holds {', '.join(sorted(fields))[:200]}: not a known state of optax", path=path)


def _wrapper(
    tree: Mapping[str, Tree],
    inner: str,
    place: Keys,
    nodes: list[Node],
    injected: Mapping[str, Value],
    path: object,
) -> Value:
    if "hyperparams" in tree:
        injected = _injected(tree["hyperparams"], path)
    done = tree.get("mini_step")
    if isinstance(done, Scalar) and done.item():
        raise RefusedError(
            f"{'/'.join((*place, 'mini_step'))} is {done.item()}: gradients are half accumulated, which no other "
            "framework keeps with the state; save it after an update",
            path=path,
        )
    around: dict[str, Value] = {}
    for key, value in tree.items():
        below = (*place, key)
        if key == inner == "inner_states" and isinstance(value, Mapping):
            around[key] = {k: _walk(v, (*below, k), nodes, injected, path) for k, v in value.items()}
        elif key == inner:
            around[key] = _walk(value, below, nodes, injected, path)
        elif key == "acc_grads":  # void between two updates
            around[key] = "zeros"
        else:
            around[key] = _numbers(value, below, path)
    return around


def _numbers(tree: Tree, place: Keys, path: object) -> Value:
    if isinstance(tree, Mapping):
        return {key: _numbers(value, (*place, key), path) for key, value in tree.items()}
    if isinstance(tree, Scalar):
        return tree
    raise RefusedError(f"{'/'.join(place)} is {_described(tree)}, where one number was expected", path=path)


def _injected(tree: Tree, path: object) -> dict[str, Value]:
    held: dict[str, Any] = {}
    if isinstance(tree, Mapping):
        held = {key: value.item() for key, value in tree.items() if isinstance(value, Scalar)}
    if held.get("eps_root"):
        raise RefusedError(f"eps_root is {held['eps_root']}: torch adds nothing inside the root", path=path)
    found: dict[str, Value] = {INJECTED[key]: value for key, value in held.items() if key in INJECTED}
    return {**found, "betas": (held["b1"], held["b2"])} if "b1" in held and "b2" in held else found


def _node(tree: Mapping[str, Tree], place: Keys, injected: Mapping[str, Value], path: object) -> Node:
    count = tree.get("count")
    if "count" in tree and not (isinstance(count, Scalar) and count.dtype == "I32"):
        raise FileError(f"{'/'.join((*place, 'count'))} is {_described(count)}, where an int32 was expected", path=path)
    fields: dict[str, dict[Keys, Leaf]] = {}
    holes: dict[str, list[Keys]] = {}
    for field in (field for field in tree if field != "count"):
        fields[field], holes[field] = {}, []
        for keys, leaf in leaves(tree[field]):
            if isinstance(leaf, Mapping):
                holes[field].append(keys)
            elif keys and isinstance(leaf, (Tensor, Scalar)):
                fields[field][keys] = leaf
            else:
                raise RefusedError(
                    f"{'/'.join((*place, field, *keys))} is {_described(leaf)}, where a tree of the parameters' arrays "
                    "was expected",
                    path=path,
                )
    first = next(iter(fields))
    for field in fields:
        if fields[field].keys() != fields[first].keys():
            raise FileError(f"{'/'.join((*place, field))} is of other parameters than {first}", path=path)
    steps = None if count is None else count_of(cast("Scalar", count))
    return Node(place, fields, tuple(holes[first]), steps, injected)


def _described(tree: Tree) -> str:
    if isinstance(tree, Tensor):
        return f"an array of type {tree.dtype} and shape {list(tree.shape)}"
    return f"a scalar of type {tree.dtype}" if isinstance(tree, Scalar) else f"a {type(tree).__name__}"


# --- counters -----------------------------------------------------------------------------------------------------


def count_of(scalar: Scalar) -> int:
    """Return a counter as a number."""
    return int.from_bytes(scalar.data, "little", signed=scalar.dtype.startswith("I"))


def counters(around: Value) -> Iterable[int]:
    """Return the counters around the nodes that go with the steps."""
    return (count_of(leaf) for path, leaf in walk(around) if isinstance(leaf, Scalar) and _is_counter(path, leaf))


def relative(around: Value, step: int | None, path: Sequence[str] = ()) -> Value:
    """Return the same, counters that agree with the step as ``["step", dtype]``."""
    if isinstance(around, Mapping):
        return {key: relative(value, step, (*path, key)) for key, value in around.items()}
    if isinstance(around, Scalar) and _is_counter(path, around) and count_of(around) == step:
        return ["step", around.dtype]
    return around


def _is_counter(path: Sequence[Any], leaf: Scalar) -> bool:
    """Return whether a number goes with the steps: a schedule's, ``MultiSteps``', ``nnx.Optimizer``'s."""
    return path[-1] in ("count", "gradient_step", "step") and leaf.dtype[0] in "IU"
