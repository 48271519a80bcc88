"""Signals that a state belongs to weights, from their numbers, and the noise of these signals; ``evidence`` uses them.

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
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from lora_state_format.errors import OptionError, UnrepresentableError
from lora_state_format.model.dtypes import FLOATS, decoded
from lora_state_format.model.states import Group, OptimizerState, Parameter, Scalar, Slot, Value
from lora_state_format.model.tensors import Tensor
from lora_state_format.optimizers.quantised import BITSANDBYTES, dequantize

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array: TypeAlias = "NDArray[np.float32]"

__all__ = ["BIAS", "MAGNITUDE", "WEIGHT", "A", "B", "Loss", "Sources", "Unit", "UnitPart", "units_of", "value_of"]

RANKS: Final = 16
"""Rows of A and columns of B that are compared at most; the identity holds for any choice of them."""

SIDE: Final = 2048
"""Ranks times modules of one shape at most: it bounds the memory of comparing all with all."""

SAMPLE: Final = 1 << 15
"""Elements that are looked at of a parameter that is not a LoRA matrix."""

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


class Conservation(NamedTuple):
    """Two sums that gradients keep equal in a layer.

    The loss is the same when one side's lines grow and the other's shrink. Biases may be absent. ``turning``: rotary
    embeddings turn pairs of lines, which share a channel. ``unless`` is a place that must be empty.
    """

    left: tuple[Term, ...]
    right: tuple[Term, ...]
    turning: bool = False
    unless: str = ""


def _terms(places: str, axis: int, *, shared: bool = False) -> tuple[Term, ...]:
    return tuple(Term(f".{place}", axis, shared) for place in places.split())


CONSERVED: Final = (
    Conservation(
        _terms("self_attn.v_proj.weight self_attn.v_proj.bias", 0), _terms("self_attn.o_proj.weight", 1, shared=True)
    ),
    Conservation(
        _terms("self_attn.k_proj.weight self_attn.k_proj.bias", 0),
        _terms("self_attn.q_proj.weight self_attn.q_proj.bias", 0, shared=True),
        turning=True,
        unless=".self_attn.q_norm.weight",
    ),
    Conservation(_terms("mlp.up_proj.weight mlp.up_proj.bias", 0), _terms("mlp.down_proj.weight", 1)),
    Conservation(
        _terms("input_layernorm.weight", 0),
        _terms("self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight", 1),
    ),
    Conservation(
        _terms("post_attention_layernorm.weight", 0),
        _terms("mlp.gate_proj.weight mlp.up_proj.weight", 1),
        unless=".pre_feedforward_layernorm.weight",
    ),
)
"""Conservation laws of layers like Llama's. A law that does not hold in a model finds no signal there."""


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
    """Two sums of shares that gradients keep equal; ``kind`` is its row in ``CONSERVED``."""

    kind: int
    left: tuple[Share, ...]
    right: tuple[Share, ...]


@dataclass(frozen=True, eq=False)
class UnitPart:
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
    """The parameters that an exchange moves together: a LoRA module's, or a single one."""

    label: str
    leaf: str
    layer: tuple[str, str] | None
    stepped: bool
    parts: Mapping[str, UnitPart]

    @property
    def shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The kinds of its parts with their shapes."""
        return tuple((kind, part.shape) for kind, part in sorted(self.parts.items()))

    @property
    def speaks(self) -> bool:
        """Whether there is anything to say about it, apart from the balances of its layer."""
        return any(part.update.any() for part in self.parts.values())

    def twin(self, other: Unit) -> bool:
        """Return whether both stand in the same layer."""
        return self.layer is not None and self.layer == other.layer


class Held(NamedTuple):
    """A parameter, its values now and at an earlier step, where they are known, and its group."""

    parameter: Parameter
    tensor: Tensor
    older: Tensor | None
    group: Group


Found: TypeAlias = "dict[tuple[str, str | None], dict[str, Held]]"
"""(module, adapter) -> kind of part -> its parameter."""


def units_of(
    state: OptimizerState,
    weights: Mapping[str, Tensor],
    before: Mapping[str, Tensor] | None = None,
    head_dim: int | None = None,
) -> tuple[list[Unit], list[Balance], list[str], list[str]]:
    """Return the units, the balances between them, the parameters without evidence, and notes on why.

    Args:
        state: A named state; its moments are decoded where they are quantised.
        weights: The parameters' values, by a name or a foreign name of theirs.
        before: Their values at an earlier step.
        head_dim: The size of an attention head.
    """
    with suppress(OptionError, UnrepresentableError):  # nothing is quantised, or not in one first moment
        state = dequantize(state).state
    found, silent, notes = _found(state, weights, before or {})
    balances = _balances(found, head_dim)
    shares = [share for balance in balances for share in (*balance.left, *balance.right)]
    balanced = {share.unit for share in shares}
    lines = _lines_by_shape(found, shares)
    ranks = max(4, SIDE // _crowd(found))
    units = [_unit(module, adapter, held, ranks, lines) for (module, adapter), held in found.items()]
    for number, unit in enumerate(units):
        if number not in balanced:
            silent += [part.name for part in unit.parts.values() if not part.update.any()]
    return units, balances, silent, notes


def _found(
    state: OptimizerState, weights: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> tuple[Found, list[str], list[str]]:
    """Return the parameters with weights of their shape, the names of the others, and notes on why."""
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
        found.setdefault((module, adapter), {})[kind] = Held(parameter, tensor, value_of(before, parameter), group)
    notes = []
    if doubled:
        notes.append(f"{doubled} weights have twice the rank of their state: an adapter converted from PiSSA or OLoRA")
    return found, silent, notes


def _crowd(found: Found) -> int:
    """Return how many LoRA matrices of one kind have the same shape, at most."""
    shapes = Counter((kind, entry.parameter.shape) for held in found.values() for kind, entry in held.items())
    return max((count for (kind, _), count in shapes.items() if kind in {A, B}), default=1)


def _lines_by_shape(found: Found, shares: Iterable[Share]) -> Mapping[tuple[int, ...], set[Lines]]:
    """Return the lines to take of full weights, by their shape: a state may come from any weight of that shape."""
    held = list(found.values())
    lines: dict[tuple[int, ...], set[Lines]] = defaultdict(set)
    for share in shares:
        lines[held[share.unit][WEIGHT].parameter.shape].add(share.lines)
    return lines


def _unit(
    module: str, adapter: str | None, held: Mapping[str, Held], ranks: int, lines: Mapping[tuple[int, ...], set[Lines]]
) -> Unit:
    match = _LAYER.fullmatch(module)
    suffix = f" of {adapter}" if adapter else ""
    return Unit(
        label=module + suffix,
        leaf=(match["stack"] + "*" + match["rest"] if match else module) + suffix,
        layer=(match["stack"], match["number"]) if match else None,
        stepped=any(entry.parameter.state for entry in held.values()),
        parts={
            kind: _part(kind, entry, ranks, lines.get(entry.parameter.shape, ()) if kind == WEIGHT else ())
            for kind, entry in held.items()
        },
    )


def _balances(found: Found, head_dim: int | None) -> list[Balance]:
    """Return the balances between the weights of each layer."""
    places: dict[tuple[str, str], dict[str, tuple[int, tuple[int, ...]]]] = defaultdict(dict)
    for number, ((module, _), held) in enumerate(found.items()):
        if WEIGHT in held and (match := _LAYER.fullmatch(module)):
            places[match["stack"], match["number"]][match["rest"]] = number, held[WEIGHT].parameter.shape
    made = (_balance(kind, layer, head_dim) for layer in places.values() for kind in range(len(CONSERVED)))
    return [balance for balance in made if balance]


def _balance(kind: int, layer: Mapping[str, tuple[int, tuple[int, ...]]], head_dim: int | None) -> Balance | None:
    """Return the balance of a row of ``CONSERVED`` in a layer, if all its weights are there and their shapes agree."""
    law = CONSERVED[kind]
    absent = [t for t in (*law.left, *law.right) if t.place not in layer and not t.place.endswith(".bias")]
    if absent or law.unless in layer:
        return None
    left, right = ([(*layer[t.place], t) for t in side if t.place in layer] for side in (law.left, law.right))
    count = left[0][1][left[0][2].axis]
    folded = _folded(count, [(shape, term) for _, shape, term in right])
    if folded is None:
        return None
    head, halves = 1, 1
    if folded > 1 or law.turning:
        if not head_dim or count % head_dim or head_dim % 2:
            return None
        head, halves = head_dim, 2 if law.turning else 1
    longest = max(math.prod(shape) * halves // count for _, shape, _ in (*left, *right))
    channels = min(count // halves, CHANNELS, max(FEWEST, ELEMENTS // longest))
    return Balance(
        kind,
        tuple(Share(unit, Lines(term.axis, channels, 1, head, halves)) for unit, _, term in left),
        tuple(Share(unit, Lines(term.axis, channels, folded, head, halves)) for unit, _, term in right),
    )


def _folded(count: int, right: Iterable[tuple[tuple[int, ...], Term]]) -> int | None:
    """Return how many lines of each weight on the right share one of ``count`` channels; ``None`` if they disagree."""
    folds = {shape[term.axis] / count if term.shared else float(shape[term.axis] == count) for shape, term in right}
    folded = int(max(folds))
    return folded if folded >= 1 and folds == {float(folded)} else None


def _split(name: str) -> tuple[str, str | None, str]:
    """Return the module, the adapter and the kind of a parameter."""
    match = _PART.fullmatch(name)
    if match is None:
        return name, None, WEIGHT
    kind = A if match["a"] else B if match["b"] else MAGNITUDE
    return match["module"], match["adapter"], BIAS if match["bias"] else kind


def value_of(weights: Mapping[str, Tensor], parameter: Parameter) -> Tensor | None:
    """Return a parameter's own values, found by its name or a foreign one."""
    return next((weights[key] for key in (parameter.name, *parameter.foreign_names.values()) if key in weights), None)


def _part(kind: str, held: Held, ranks: int, lines: Iterable[Lines]) -> UnitPart:
    import numpy as np

    parameter, tensor, older, group = held
    shape = parameter.shape
    matrix = kind in {A, B}
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
    return UnitPart(
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
    """Return the lines of a weight and of its first moment, [channels, elements]; zeros where there is no moment."""
    import numpy as np

    head, half = lines.head, lines.head // lines.halves
    count = shape[lines.axis] // lines.folded // lines.halves
    channel = np.arange(lines.channels) * count // lines.channels
    start = channel // half * head * lines.folded + channel % half
    offsets = np.add.outer(np.arange(lines.folded) * head, np.arange(lines.halves) * half).ravel()
    index = np.add.outer(start, offsets)
    width = math.prod(shape[1:])

    def take(value: Value) -> Array:
        """Return the lines, read by rows: the ones needed, or some at a time."""
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
    """Return the factor from an Adam update to the weights' mean distance from where its gradients were taken."""
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
    """Return first moment, second moment, master copy and step, by the names that optimizers give them."""
    inner = state.get(BITSANDBYTES)
    flat = {**state, **inner} if isinstance(inner, Mapping) else state
    wanted = {"first": _FIRST, "second": _SECOND, "copy": _COPIES, "step": ("step",)}
    return {what: flat[name] for what, names in wanted.items() for name in reversed(names) if name in flat}


def _spans(count: int) -> list[tuple[int, int]]:
    """Return runs of elements, evenly spread, ``SAMPLE`` elements in all at most: (start, length)."""
    if count <= SAMPLE:
        return [(0, count)]
    return [(count * i // 32, SAMPLE // 32) for i in range(32)]


def _numbers(value: Value, spans: Sequence[tuple[int, int]], shape: tuple[int, ...]) -> Array | None:
    """Return runs of a slot's values, where it is a tensor of the parameter's shape."""
    return _floats(value.tensor, spans) if isinstance(value, Slot) and value.tensor.shape == shape else None


def _floats(tensor: Tensor, spans: Sequence[tuple[int, int]]) -> Array:
    """Return runs of a tensor's elements as a flat float32 array, what is not finite as 0."""
    import numpy as np

    if tensor.dtype not in FLOATS:
        return np.zeros(sum(length for _, length in spans), np.float32)
    values = np.concatenate([decoded(_bytes(tensor, *span), tensor.dtype) for span in spans]).astype(np.float32)
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
"""The loss of a unit, in nats: by the signals that are sure (balance, master copies), and by all of them."""
