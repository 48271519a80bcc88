"""What numbers say of which state belongs to which weights: the signals behind ``evidence.py``, and their noise.

*balance*
    Where the loss stays the same when one factor grows and another shrinks, their gradients are tied. It sees LoRA's
    matrices only as ``B @ A``, so ``B.T @ grad(B) == grad(A) @ A.T``, a square of numbers for each module, compared in
    its symmetric and its skew half. Inside a layer of a plain transformer the same holds number by number: for a norm's
    weight and the columns of what reads it, for the rows of v and the columns of o, of up and of down
    (``sum(w * grad(w))`` is equal on both sides). First moments are averages of gradients, so they obey it up to what
    the weights moved within that average: at any step, for any optimizer with a first moment, from any start.
*history*
    What an optimizer does now goes along with what it has done: ``exp_avg / sqrt(exp_avg_sq)`` correlates with what the
    weights have come to, which for B, starting at zero, is B itself, and for any parameter the difference of two
    checkpoints. Strong at first, faint after some 300 steps. The sign is not used: with coupled weight decay, or when a
    run turns, the right order correlates negatively.
*rows*
    A magnitude or a bias sees the same output gradients as B does: their second moments share the profile over rows.
*copy*
    A master copy of the weights (``z``, ``p0``), in place of history.

Each gives a z-value: the root of twice a log-likelihood ratio. In nats, half its square divided by the square of the
noise that states and weights of the same file show where they do not belong together.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from lora_state_format.errors import OptionError, UnrepresentableError
from lora_state_format.foreign.quantised import BITSANDBYTES, dequantize
from lora_state_format.model import Group, OptimizerState, Parameter, Scalar, Slot, Tensor, Value

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array: TypeAlias = "NDArray[np.float32]"

__all__ = ["BIAS", "MAGNITUDE", "WEIGHT", "A", "B", "Loss", "Part", "Sources", "Table", "Unit", "units_of", "value_of"]

RANKS: Final = 16
"""Rows of A and columns of B that are compared at most; the identity holds for any choice of them."""

SIDE: Final = 2048
"""Ranks times modules of one shape at most: it bounds the memory of comparing all with all."""

SAMPLE: Final = 1 << 15
"""Elements that are looked at of a parameter that is no LoRA matrix."""

SURE: Final = ("balance", "skew", "layer", "copy")
"""The signals that do not fade and have no sign to turn: only these can speak against an order."""

PRIOR: Final = (1.5, 20)
"""A signal's noise before any is seen, and how many wrong pairs that counts as: a handful cannot claim to be quiet."""

CHANNELS, FEWEST, ELEMENTS = 64, 8, 1 << 17
"""Rows or columns of a full weight that are looked at for its balance: at most, at least, and elements in all."""

A, B, MAGNITUDE, BIAS, WEIGHT = "lora_A", "lora_B", "lora_magnitude_vector", "lora_B.bias", "weight"

_PART: Final = re.compile(
    r"(?P<module>.*)\.(?:lora_(?:embedding_)?(?:(?P<a>A|a|down)|(?P<b>B|b|up))|(?:lora_)?magnitude(?:_vector)?)"
    r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?P<bias>\.bias)?(?:\.weight)?"
)
_LAYER: Final = re.compile(r"(?P<stack>.*?)(?<![^.])(?P<number>\d+)(?P<rest>\..*)")
_FIRST: Final = ("exp_avg", "momentum_buffer", "m", "mu", "state1")
_SECOND: Final = ("exp_avg_sq", "v", "nu", "state2")
_COPIES: Final = ("fp32", "z", "p0")


# --- what is compared -----------------------------------------------------------------------------------------------


class Term(NamedTuple):
    """One parameter's share in a sum over ``weight * gradient``: along which axis lines are channels.

    ``place`` is what follows the layer's number in its name. ``shared``: several of its heads share a channel.
    """

    place: str
    axis: int
    shared: bool = False


class Rule(NamedTuple):
    """Two sums that gradients keep equal in a layer, since the loss is the same when one side's lines grow and the
    other's shrink. Biases may be absent. ``turning``: rotary embeddings turn pairs of lines, which share a channel.
    ``unless`` is a place that must be empty."""

    left: tuple[Term, ...]
    right: tuple[Term, ...]
    turning: bool = False
    unless: str = ""


def _terms(places: str, axis: int, *, shared: bool = False) -> tuple[Term, ...]:
    return tuple(Term(f".{place}", axis, shared) for place in places.split())


RULES: Final = (
    Rule(_terms("self_attn.v_proj.weight self_attn.v_proj.bias", 0), _terms("self_attn.o_proj.weight", 1, shared=True)),
    Rule(
        _terms("self_attn.k_proj.weight self_attn.k_proj.bias", 0),
        _terms("self_attn.q_proj.weight self_attn.q_proj.bias", 0, shared=True),
        turning=True,
        unless=".self_attn.q_norm.weight",
    ),
    Rule(_terms("mlp.up_proj.weight mlp.up_proj.bias", 0), _terms("mlp.down_proj.weight", 1)),
    Rule(
        _terms("input_layernorm.weight", 0),
        _terms("self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight", 1),
    ),
    Rule(
        _terms("post_attention_layernorm.weight", 0),
        _terms("mlp.gate_proj.weight mlp.up_proj.weight", 1),
        unless=".pre_feedforward_layernorm.weight",
    ),
)
"""What holds in the layers of models of Llama's kind. Where one does not hold after all, it finds nothing."""


class Lines(NamedTuple):
    """Which lines of a weight make a channel: those of ``folded`` heads of ``head`` lines, and of both ``halves``.

    Some ``channels`` are taken, evenly spread.
    """

    axis: int
    channels: int
    folded: int = 1
    head: int = 1
    halves: int = 1


class Share(NamedTuple):
    """A unit's share in a balance."""

    unit: int
    lines: Lines


class Balance(NamedTuple):
    """Two sums of shares that gradients keep equal; ``kind`` is its row in ``RULES``."""

    kind: int
    left: tuple[Share, ...]
    right: tuple[Share, ...]


@dataclass(frozen=True, eq=False)
class Part:
    """Of a LoRA matrix: some ranks, ``[ranks, features]``. Of any other parameter: some elements, ``[1, elements]``.

    ``update`` is the direction of the optimizer's next step, or, where ``copied``, the master copy of the weights.
    ``drift`` is how far the weights were, on average, from where they are now when the gradients in ``first`` were
    taken. ``profile`` is the logarithm of the second moment's mean over ranks. Each is zero where there is none.
    ``lines`` are the weight and the first moment for the balances of whole layers, [channels, elements].
    """

    name: str
    shape: tuple[int, ...]
    weight: Array
    first: Array
    update: Array
    drift: Array
    profile: Array
    copied: bool
    lines: Mapping[Lines, tuple[Array, Array]]


@dataclass(frozen=True, eq=False)
class Unit:
    """What an exchange moves together: a module's LoRA matrices and what belongs to them, or one parameter."""

    label: str
    leaf: str
    layer: tuple[str, str] | None
    stepped: bool
    parts: Mapping[str, Part]

    @property
    def shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return tuple((kind, part.shape) for kind, part in sorted(self.parts.items()))

    @property
    def speaks(self) -> bool:
        """Whether there is anything to say about it, apart from the balances of its layer."""
        return any(part.update.any() for part in self.parts.values())

    def twin(self, other: Unit) -> bool:
        """Whether both stand in the same layer."""
        return self.layer is not None and self.layer == other.layer


Found: TypeAlias = "dict[tuple[str, str | None], dict[str, tuple[Parameter, Tensor, Tensor | None, Group]]]"


def units_of(
    state: OptimizerState,
    weights: Mapping[str, Tensor],
    before: Mapping[str, Tensor] | None = None,
    head_dim: int | None = None,
) -> tuple[list[Unit], list[Balance], list[str], list[str]]:
    """The units, what holds between them, the parameters about which there is nothing to say, and notes on why."""
    with suppress(OptionError, UnrepresentableError):  # nothing is quantised, or has no one first moment
        state = dequantize(state).state
    groups = [group for group in state.groups for _ in range(group.count)]
    # AdaLoRA's third factor breaks the identity of the other two.
    adaptive = {p.name.rpartition(".lora_E")[0] for p in state.parameters if ".lora_E" in p.name}
    found: Found = {}
    silent, doubled = [], 0
    for parameter, group in zip(state.parameters, groups, strict=False):
        tensor = value_of(weights, parameter)
        if tensor is None or tensor.shape != parameter.shape:
            doubled += tensor is not None and tensor.count == 2 * math.prod(parameter.shape)
            silent.append(parameter.name)
            continue
        module, adapter, kind = _split(parameter.name)
        if module in adaptive or (kind in {A, B} and len(parameter.shape) < 2):
            module, adapter, kind = parameter.name, None, WEIGHT
        older = value_of(before or {}, parameter)
        found.setdefault((module, adapter), {})[kind] = (parameter, tensor, older, group)
    notes = []
    if doubled:
        notes.append(f"{doubled} weights have twice the rank of their state: an adapter converted from PiSSA or OLoRA")
    shapes = [(kind, entry[0].shape) for parts in found.values() for kind, entry in parts.items() if kind in {A, B}]
    crowd = max((shapes.count(shape) for shape in set(shapes)), default=1)
    balances = _balances(found, head_dim)
    shares = [share for balance in balances for share in (*balance.left, *balance.right)]
    entries_of = list(found.values())
    lines: dict[tuple[int, ...], set[Lines]] = defaultdict(set)
    for share in shares:
        lines[entries_of[share.unit][WEIGHT][0].shape].add(share.lines)
    units: list[Unit] = []
    for (module, adapter), entries in found.items():
        parts = {
            kind: _part(
                kind, *entry, ranks=max(4, SIDE // crowd), lines=lines[entry[0].shape] if kind == WEIGHT else ()
            )
            for kind, entry in entries.items()
        }
        balanced = any(share.unit == len(units) for share in shares)
        silent += [part.name for part in parts.values() if not part.update.any() and not balanced]
        match = _LAYER.fullmatch(module)
        suffix = f" of {adapter}" if adapter else ""
        units.append(
            Unit(
                label=module + suffix,
                leaf=(match["stack"] + "*" + match["rest"] if match else module) + suffix,
                layer=(match["stack"], match["number"]) if match else None,
                stepped=any(entry[0].state for entry in entries.values()),
                parts=parts,
            )
        )
    return units, balances, silent, notes


def _balances(found: Found, head_dim: int | None) -> list[Balance]:
    """What holds between the weights of each layer."""
    places: dict[tuple[str, str], dict[str, tuple[int, tuple[int, ...]]]] = defaultdict(dict)
    for number, ((module, _), entries) in enumerate(found.items()):
        if WEIGHT in entries and (match := _LAYER.fullmatch(module)):
            places[match["stack"], match["number"]][match["rest"]] = number, entries[WEIGHT][0].shape
    made = (_balance(kind, layer, head_dim) for layer in places.values() for kind in range(len(RULES)))
    return [balance for balance in made if balance]


def _balance(kind: int, layer: Mapping[str, tuple[int, tuple[int, ...]]], head_dim: int | None) -> Balance | None:
    """What a row of ``RULES`` comes to in a layer, where all of its weights are there and their shapes agree."""
    rule = RULES[kind]
    absent = [t for t in (*rule.left, *rule.right) if t.place not in layer and not t.place.endswith(".bias")]
    if absent or rule.unless in layer:
        return None
    left, right = ([(*layer[t.place], t) for t in side if t.place in layer] for side in (rule.left, rule.right))
    count = left[0][1][left[0][2].axis]
    folds = {shape[term.axis] / count if term.shared else float(shape[term.axis] == count) for _, shape, term in right}
    folded = int(max(folds))
    if folds != {float(folded)} or folded < 1:
        return None
    if (folded > 1 or rule.turning) and (not head_dim or count % head_dim or head_dim % 2):
        return None
    head, halves = (head_dim or 1, 2 if rule.turning else 1) if folded > 1 or rule.turning else (1, 1)
    longest = max(math.prod(shape) * halves // count for _, shape, _ in (*left, *right))
    channels = min(count // halves, CHANNELS, max(FEWEST, ELEMENTS // longest))
    return Balance(
        kind,
        tuple(Share(unit, Lines(term.axis, channels, 1, head, halves)) for unit, _, term in left),
        tuple(Share(unit, Lines(term.axis, channels, folded, head, halves)) for unit, _, term in right),
    )


def _split(name: str) -> tuple[str, str | None, str]:
    """The module, the adapter and the kind of a parameter."""
    match = _PART.fullmatch(name)
    if match is None:
        return name, None, WEIGHT
    kind = A if match["a"] else B if match["b"] else MAGNITUDE
    return match["module"], match["adapter"], BIAS if match["bias"] else kind


def value_of(weights: Mapping[str, Tensor], parameter: Parameter) -> Tensor | None:
    return next((weights[key] for key in (parameter.name, *parameter.keys.values()) if key in weights), None)


def _part(
    kind: str,
    parameter: Parameter,
    tensor: Tensor,
    older: Tensor | None,
    group: Group,
    *,
    ranks: int,
    lines: Iterable[Lines],
) -> Part:
    import numpy as np

    shape = parameter.shape
    matrix = kind in {A, B} and len(shape) >= 2
    spans = [(0, tensor.count)] if matrix else _spans(tensor.count)

    def arranged(values: Array | None) -> Array | None:
        if values is None or not matrix:
            return None if values is None else values[None]
        values = values.reshape(shape[0], -1) if kind == A else values.reshape(-1, shape[1]).T
        return np.ascontiguousarray(values[:: -(-len(values) // min(RANKS, ranks))])

    slots = _slots(parameter.state or {})
    weight = arranged(_floats(tensor, spans))
    first, second, copy = (arranged(_numbers(slots.get(key), spans, shape)) for key in ("first", "second", "copy"))
    assert weight is not None
    if older is not None and older.shape == shape:
        was = arranged(_floats(older, spans))
        assert was is not None
        weight = weight - was
    zero = np.zeros_like(weight)
    update, drift = zero, zero
    if copy is not None:
        update = copy
    elif first is not None and not (kind == WEIGHT and older is None):
        scale = np.sqrt(np.maximum(second, 0)) if second is not None else np.ones_like(first)
        update = np.clip(np.divide(first, scale, out=np.zeros_like(first), where=scale > 0), -10, 10)
        if second is not None:
            drift = update * _lag(group, slots.get("step"))
    energy = second.mean(axis=0) if second is not None else None
    return Part(
        name=parameter.name,
        shape=shape,
        weight=weight,
        first=zero if first is None else first,
        update=update,
        drift=drift,
        profile=np.zeros(weight.shape[1], np.float32) if energy is None else np.log(np.maximum(energy, 1e-38)),
        copied=copy is not None,
        lines={line: _taken(line, tensor, slots.get("first"), shape) for line in lines},
    )


def _taken(lines: Lines, tensor: Tensor, first: Value, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """The lines of a weight and of its first moment, [channels, elements]; zeros where there is no moment."""
    import numpy as np

    head, half = lines.head, lines.head // lines.halves
    count = shape[lines.axis] // lines.folded // lines.halves
    channel = np.arange(lines.channels) * count // lines.channels
    start = channel // half * head * lines.folded + channel % half
    offsets = np.add.outer(np.arange(lines.folded) * head, np.arange(lines.halves) * half).ravel()
    index = np.add.outer(start, offsets)
    width = math.prod(shape[1:])

    def take(value: Value) -> Array:
        """By rows: those that are asked for, or some at a time."""
        if lines.axis == 0:
            rows = _numbers(value, [(int(row) * width, width) for row in index.ravel()], shape)
            return np.zeros((len(index), 1), np.float32) if rows is None else rows.reshape(len(index), -1)
        parts, many = [], max(1, SAMPLE // width)
        for row in range(0, shape[0], many):
            some = _numbers(value, [(row * width, min(many, shape[0] - row) * width)], shape)
            if some is None:
                return np.zeros((len(index), 1), np.float32)
            parts.append(some.reshape(-1, width)[:, index])
        return np.ascontiguousarray(np.moveaxis(np.concatenate(parts), 0, -1)).reshape(len(index), -1)

    return take(Slot(tensor)), take(first)


def _lag(group: Group, step: Value) -> float:
    """What an Adam update is multiplied with to give the weights' mean distance from where its gradients were taken."""
    options = dict(group.options)
    lr, betas = options.get("lr"), options.get("betas")
    if isinstance(step, Scalar):
        step = step.item()  # type: ignore[assignment]
    if not (isinstance(lr, float) and isinstance(betas, (tuple, list)) and isinstance(step, (int, float)) and step):
        return 0.0
    beta1, beta2 = (float(b) for b in betas[:2] if isinstance(b, (int, float)))
    if not (0 < beta1 < 1 and 0 < beta2 < 1):
        return 0.0
    share = 1 - beta1**step
    steps = 1 / (1 - beta1) - step * beta1**step / share
    return lr * steps / share * math.sqrt(1 - beta2**step)


def _slots(state: Mapping[str, Value]) -> dict[str, Value]:
    """First moment, second moment, master copy and step, by the names that optimizers give them."""
    inner = state.get(BITSANDBYTES)
    flat = {**state, **inner} if isinstance(inner, Mapping) else state
    wanted = {"first": _FIRST, "second": _SECOND, "copy": _COPIES, "step": ("step",)}
    return {what: flat[name] for what, names in wanted.items() for name in reversed(names) if name in flat}


def _spans(count: int) -> list[tuple[int, int]]:
    """Runs of elements, evenly spread, ``SAMPLE`` elements in all at most: (start, length)."""
    if count <= SAMPLE:
        return [(0, count)]
    return [(count * i // 32, SAMPLE // 32) for i in range(32)]


def _numbers(value: Value, spans: Sequence[tuple[int, int]], shape: tuple[int, ...]) -> Array | None:
    """Runs of a slot's values, where it is a tensor of the parameter's shape."""
    return _floats(value.tensor, spans) if isinstance(value, Slot) and value.tensor.shape == shape else None


def _floats(tensor: Tensor, spans: Sequence[tuple[int, int]]) -> Array:
    """Runs of a tensor's elements as a flat float32 array. What is no finite number counts as 0."""
    import numpy as np

    types = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    if tensor.dtype not in types:
        return np.zeros(sum(length for _, length in spans), np.float32)
    raw = np.concatenate([np.frombuffer(_bytes(tensor, *span), types[tensor.dtype]) for span in spans])
    values = (raw.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "BF16" else raw.astype(np.float32)
    return np.nan_to_num(values, copy=False, posinf=0.0, neginf=0.0)


def _bytes(tensor: Tensor, start: int, length: int) -> bytearray:
    width = tensor.size // max(tensor.count, 1)
    buffer = bytearray(length * width)
    tensor.readinto(start * width, memoryview(buffer))
    return buffer


# --- the comparison -------------------------------------------------------------------------------------------------

Sources: TypeAlias = "Mapping[tuple[int, str], int]"
"""For a unit and a kind of part: the unit whose state another order would put there."""

Loss: TypeAlias = "tuple[float, float]"
"""What a unit loses, in nats: by the signals that are sure (balance, master copies), and by all of them."""


class Table:
    """Every state against every weight of the same shape.

    ``scores`` are z-values: square roots of twice a log-likelihood ratio. The noise of a signal is what it shows where
    states and weights do not belong together; in nats its square divides the ratio.
    """

    def __init__(self, units: Sequence[Unit], balances: Sequence[Balance] = ()) -> None:
        import numpy as np

        self.units = units
        self.balances = balances
        self.balanced: dict[int, set[int]] = defaultdict(set)
        for number, balance in enumerate(balances):
            for share in (*balance.left, *balance.right):
                self.balanced[share.unit].add(number)
        self._sums: dict[tuple[int, Share], Array] = {}
        self.members: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
        self.row: dict[tuple[str, int], int] = {}
        for number, unit in enumerate(units):
            for kind, part in unit.parts.items():
                members = self.members[kind, part.shape]
                self.row[kind, number] = len(members)
                members.append(number)
        self.history: dict[tuple[str, tuple[int, ...]], Array] = {}
        self.identity: dict[tuple[str, tuple[int, ...]], tuple[Array, Array]] = {}
        for key, members in self.members.items():
            parts = [units[number].parts[key[0]] for number in members]
            weight, update, first, drift = (
                np.stack([getattr(part, name) for part in parts]) for name in ("weight", "update", "first", "drift")
            )
            cosines = _centred(update) @ _centred(weight).T
            self.history[key] = _z(cosines, weight[0].size)
            if key[0] in {A, B}:
                self.identity[key] = _identity(key[0], weight, first, drift)
        self.classes: dict[tuple[tuple[str, tuple[int, ...]], ...], list[int]] = defaultdict(list)
        for number, unit in enumerate(units):
            self.classes[unit.shapes].append(number)
        self.classes = {shapes: members for shapes, members in self.classes.items() if len(members) > 1}
        self.noise = self._noise()

    def _moves(self) -> Iterator[tuple[tuple[str, ...], list[int], bool]]:
        """What can be exchanged for what: whole units, and single parts of units that have several."""
        for shapes, members in self.classes.items():
            yield tuple(kind for kind, _ in shapes), members, True
        for (kind, _), members in self.members.items():
            several = [number for number in members if len(self.units[number].parts) > 1]
            if len(several) > 1:
                yield (kind,), several, False

    def scores(self, moved: tuple[str, ...], members: Sequence[int]) -> dict[str, Array]:
        """For each signal: row i, column k: the score of unit i with the moved parts' state of unit k."""
        import numpy as np

        parts = [self.units[number].parts for number in members]
        result: dict[str, Array] = {}

        def rows(kind: str) -> list[int]:
            return [self.row[kind, number] for number in members]

        def halves(kind: str) -> tuple[Array, Array]:
            """Both halves of one side of the identity, [i, k or 1, elements]."""
            if kind in moved:
                grid = np.ix_(rows(kind), rows(kind))
                symmetric, skew = (half[grid].swapaxes(0, 1) for half in self.identity[kind, parts[0][kind].shape])
                return symmetric, skew
            own = [(self.identity[kind, part[kind].shape], row) for part, row in zip(parts, rows(kind), strict=True)]
            symmetric, skew = (np.stack([half[side][row, row] for half, row in own])[:, None] for side in (0, 1))
            return symmetric, skew

        if {A, B} & set(moved) and all({A, B} <= set(part) for part in parts):
            for name, left, right in zip(("balance", "skew"), halves(A), halves(B), strict=True):
                result[name] = _z((left * right).sum(-1), left.shape[-1])
        for kind in moved:
            history = self.history[kind, parts[0][kind].shape][np.ix_(rows(kind), rows(kind))].T
            copied = all(part[kind].copied for part in parts)
            result["copy" if copied else f"history of {kind}"] = history if copied else np.abs(history)
        if moved in {(MAGNITUDE,), (BIAS,)} and all(B in part for part in parts):
            own, of_b = (np.stack([part[kind].profile for part in parts]) for kind in (moved[0], B))
            result["rows"] = _z(_centred(of_b) @ _centred(own).T, own.shape[1])
        return result

    def _noise(self) -> dict[str, float]:
        """The deviation of each signal's score where state and weights do not belong together; 1 at least.

        The far tail counts as much as the bulk. In a wrong order some of these do belong together, which makes the
        noise larger and every answer more careful; only copies are beyond doubt.
        """
        import numpy as np

        wrong: dict[str, list[Array]] = defaultdict(list)
        for moved, members, _ in self._moves():
            for name, score in self.scores(moved, members).items():
                wrong[name].append(score[~np.eye(len(score), dtype=bool)])
        if elsewhere := [self._balance(n, sources) for n, _, sources in self._elsewhere()]:
            wrong["layer"].append(np.array(elsewhere))
        result = {}
        for name, scores in wrong.items():
            values = np.concatenate(scores)
            assumed, count = PRIOR
            # Half of a standard normal's absolute values lie above 0.6745, one in a hundred above 2.576.
            middle, tail = (float(v) for v in np.quantile(np.abs(values), [0.5, 0.99]) / [0.6745, 2.576])
            seen = middle**2 if name == "copy" else max(float(np.square(values).mean()), tail**2)
            result[name] = max(1.0, math.sqrt((len(values) * seen + count * assumed**2) / (len(values) + count)))
        return result

    def nats(self, moved: tuple[str, ...], members: Sequence[int]) -> Array:
        """What each unit of ``members`` has for the moved parts' state of each other one: by sure signals, by all."""
        import numpy as np

        total = np.zeros((2, len(members), len(members)), np.float32)
        for name, score in self.scores(moved, members).items():
            value = np.sign(score) * np.square(score / self.noise[name]) / 2
            total += value * np.array([name in SURE, True])[:, None, None]
        return total

    def exchanges(self) -> Iterator[tuple[str | None, dict[tuple[int, int], Loss]]]:
        """What each exchange would lose, by the two units: of whole units (``None``), or of one kind of part alone."""
        for moved, members, whole in self._moves():
            nats = self.nats(moved, members)
            own = nats.diagonal(axis1=1, axis2=2)
            loss = (own[:, :, None] + own[:, None] - nats - nats.swapaxes(1, 2)).tolist()
            found = {}
            for i, k in combinations(range(len(members)), 2):
                pair = members[i], members[k]
                if any(self.units[number].stepped for number in pair):
                    swapped = {(pair[0], WEIGHT): pair[1], (pair[1], WEIGHT): pair[0]}
                    more = sum(self._layer_losses(swapped)) if whole and self.balances else 0.0
                    found[pair] = loss[0][i][k] + more, loss[1][i][k] + more
            yield None if whole else moved[0], found

    def support(self) -> list[Loss]:
        """What each unit would lose, on average, with the state of another one of its shapes."""
        result: list[Loss] = []
        for moved, members, whole in self._moves():
            if whole:
                nats = self.nats(moved, members)
                own = nats.diagonal(axis1=1, axis2=2)
                others = (nats.sum(axis=2) - own) / (len(members) - 1)
                result += [
                    (sure, every)
                    for number, sure, every in zip(members, *(own - others).tolist(), strict=True)
                    if self.units[number].speaks
                ]
        apart: dict[int, list[float]] = defaultdict(list)
        for number, value, sources in self._elsewhere():
            apart[number].append(self._layer_nats(value) - self._layer_nats(self._balance(number, sources)))
        losses = [sum(values) / len(values) for values in apart.values()]
        return [*result, *zip(losses, losses, strict=True)]

    def losses(self, sources: Sources) -> list[Loss]:
        """What each unit that gets another state would lose."""
        moved = {n for (n, _), source in sources.items() if source != n and self.units[n].speaks}
        pairs = [(self._value(number, {}), self._value(number, sources)) for number in sorted(moved)]
        layers = self._layer_losses(sources)
        return [*((own[0] - other[0], own[1] - other[1]) for own, other in pairs), *zip(layers, layers, strict=True)]

    def _layer_losses(self, sources: Sources) -> list[float]:
        """What each balance of a layer loses that some of the units share."""
        touched = {number for (unit, _), source in sources.items() if unit != source for number in self.balanced[unit]}
        pairs = [(self._balance(number, {}), self._balance(number, sources)) for number in sorted(touched)]
        return [self._layer_nats(own) - self._layer_nats(other) for own, other in pairs]

    def _layer_nats(self, score: float) -> float:
        return math.copysign((score / self.noise["layer"]) ** 2 / 2, score)

    def _balance(self, number: int, sources: Sources) -> float:
        """The score of a layer's balance with the state of other units."""
        import numpy as np

        _, *sides = self.balances[number]
        left, right = (sum(self._sum(sources.get((s.unit, WEIGHT), s.unit), s) for s in side) for side in sides)
        # A few channels may hold most of a sum; only as many count as would have it evenly.
        energy = left * left + right * right
        count = energy.sum() ** 2 / max(np.square(energy).sum(), 1e-38)
        return float(_z((_unit_length(left) * _unit_length(right)).sum(), count))

    def _sum(self, source: int, share: Share) -> Any:
        if (source, share) not in self._sums:
            weight = self.units[share.unit].parts[WEIGHT].lines[share.lines][0]
            first = self.units[source].parts[WEIGHT].lines[share.lines][1]
            self._sums[source, share] = (weight * first).sum(axis=1)
        return self._sums[source, share]

    def _elsewhere(self) -> Iterator[tuple[int, float, Sources]]:
        """Each balance, its score, and its right side's state replaced by that of a layer nearby."""
        for number, (kind, _, right) in enumerate(self.balances):
            for other in range(max(0, number - 4 * len(RULES)), min(len(self.balances), number + 4 * len(RULES))):
                shares = self.balances[other].right
                same = [
                    self.units[a.unit].shapes == self.units[b.unit].shapes for a, b in zip(right, shares, strict=False)
                ]
                if other != number and self.balances[other].kind == kind and len(right) == len(shares) and all(same):
                    sources = {(a.unit, WEIGHT): b.unit for a, b in zip(right, shares, strict=True)}
                    yield number, self._balance(number, {}), sources

    def _value(self, number: int, sources: Sources) -> Loss:
        parts = self.units[number].parts

        def row(kind: str) -> int:
            return self.row[kind, sources.get((number, kind), number)]

        found: list[tuple[str, float]] = []
        if {A, B} <= set(parts):
            for side, name in enumerate(("balance", "skew")):
                left, right = (
                    self.identity[kind, parts[kind].shape][side][row(kind), self.row[kind, number]] for kind in (A, B)
                )
                found.append((name, float(_z(left @ right, len(left)))))
        for kind, part in parts.items():
            score = float(self.history[kind, part.shape][row(kind), self.row[kind, number]])
            found.append(("copy", score) if part.copied else (f"history of {kind}", abs(score)))
        nats = [
            (name, math.copysign((score / self.noise.get(name, PRIOR[0])) ** 2 / 2, score)) for name, score in found
        ]
        return sum(value for name, value in nats if name in SURE), sum(value for _, value in nats)


def _z(cosine: Any, count: Any) -> Any:
    """The signed root of twice the log-likelihood ratio of a correlation over ``count`` elements."""
    import numpy as np

    cosine = np.clip(cosine, -1 + 1e-6, 1 - 1e-6)
    return np.sign(cosine) * np.sqrt(-count * np.log1p(-cosine * cosine))


def _unit_length(values: Array) -> Array:
    import numpy as np

    length = np.linalg.norm(values, axis=-1, keepdims=True)
    result: Array = np.divide(values, length, out=np.zeros_like(values), where=length > 0)
    return result


def _centred(values: Array) -> Array:
    """Each entry as one vector of mean 0 and length 1; what is constant becomes zero."""
    flat = values.reshape(len(values), -1)
    return _unit_length(flat - flat.mean(axis=1, keepdims=True))


def _identity(kind: str, weight: Array, first: Array, drift: Array) -> tuple[Array, Array]:
    """One side of ``B.T @ grad(B) == grad(A) @ A.T``: its symmetric and its skew part, [state, weight, elements].

    The weights are moved back to where the gradients were taken, as far as the state tells: not A's in the symmetric
    part, where ``grad(A) @ update(A).T`` has a positive diagonal whatever it is paired with.
    """
    import numpy as np

    count, ranks, _ = weight.shape

    def product(left: Array, right: Array) -> Array:
        return (left.reshape(count * ranks, -1) @ right.reshape(count * ranks, -1).T).reshape(
            count, ranks, count, ranks
        )

    if kind == A:
        now = product(first, weight).transpose(0, 2, 1, 3)
        back = first @ drift.swapaxes(1, 2)
    else:
        now = product(weight, first).transpose(2, 0, 1, 3)
        back = drift @ first.swapaxes(1, 2)
    back = back[:, None]
    symmetric = now + back if kind == B else now
    symmetric = symmetric + symmetric.swapaxes(2, 3)
    index = np.arange(ranks)
    symmetric[:, :, index, index] /= math.sqrt(2)
    skew = now + back
    skew = skew - skew.swapaxes(2, 3)
    upper, above = np.triu_indices(ranks), np.triu_indices(ranks, 1)
    return _unit_length(symmetric[:, :, upper[0], upper[1]]), _unit_length(skew[:, :, above[0], above[1]])
