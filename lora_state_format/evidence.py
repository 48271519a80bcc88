"""Do these moments belong to these weights? What the numbers themselves say about an order, and what they cannot say.

How to call it::

    weigh(state, weights)                          # a named state and the weights it is said to belong to
    weigh(state, weights, before=older)            # weights of an earlier checkpoint too, for a full fine-tune
    weigh(state, weights, orders={"flat": names})  # and other whole orders that must be ruled out
    paired(state, weights)                         # digests first, where the state has its own: no statistics

``weights`` map a parameter's name, or one of its ``keys``, to its values. Three signals are used, each with its noise
as this very file shows it:

*balance*
    The loss sees LoRA's matrices only as ``B @ A``, so every gradient obeys ``B.T @ grad(B) == grad(A) @ A.T``. First
    moments are averages of gradients, so they obey it up to what the weights moved within that average. It holds at
    any step, for any optimizer with a first moment, and whether or not B started at zero.
*history*
    What an optimizer does now goes along with what it has done: ``exp_avg / sqrt(exp_avg_sq)`` correlates with the
    weights' own history, which for B, starting at zero, is B itself. Strong at first, faint after some 300 steps. The
    sign is not used: with coupled weight decay, or when a run turns, the right order correlates negatively.
*rows*
    A magnitude or a bias sees the same output gradients as B does: their second moments share the profile over rows.

Master copies (``z``, ``p0``) take the place of history. Each signal gives a log-likelihood ratio, in nats, divided by
the square of the noise that wrong pairs show in this file; the margin of an exchange is what it would lose.
``docs/evidence.md`` holds the study that the constants come from.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from lora_state_format.container import hash_tensor
from lora_state_format.manifest import ALGORITHM
from lora_state_format.model import Group, OptimizerState, Parameter, Scalar, Slot, Tensor, Value

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array: TypeAlias = "NDArray[np.float32]"

__all__ = ["EXCLUDED", "Evidence", "Exchanges", "Pairing", "paired", "weigh"]

EXCLUDED: Final = 16.0
"""Nats by which an exchange must lose to count as excluded, or win to count against the order."""

CONFIRMED: Final = 0.99
"""Share of module pairs that must be excluded in a confirmed order."""

TRIMMED: Final = 0.25
"""Share of the modules, those that speak loudest, that are not heard when whole orders are compared."""

RANKS: Final = 16
"""Rows of A and columns of B that are compared at most; the identity holds for any choice of them."""

SIDE: Final = 2048
"""Ranks times modules of one shape at most: it bounds the memory of comparing all with all."""

SAMPLE: Final = 1 << 15
"""Elements that are looked at of a parameter that is no LoRA matrix."""

SURE: Final = ("balance", "skew", "copy")
"""The signals that do not fade and have no sign to turn: only these can speak against an order."""

PRIOR: Final = (1.5, 20)
"""A signal's noise before any is seen, and how many wrong pairs that counts as: a handful cannot claim to be quiet."""

A, B, MAGNITUDE, BIAS, WEIGHT = "lora_A", "lora_B", "lora_magnitude_vector", "lora_B.bias", "weight"

_PART: Final = re.compile(
    r"(?P<module>.*)\.(?:lora_(?:embedding_)?(?:(?P<a>A|a|down)|(?P<b>B|b|up))|(?:lora_)?magnitude(?:_vector)?)"
    r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?P<bias>\.bias)?(?:\.weight)?"
)
_LAYER: Final = re.compile(r"(?P<stack>.*?)(?<![^.])(?P<number>\d+)(?P<rest>\..*)")
_FIRST: Final = ("exp_avg", "momentum_buffer", "m", "mu", "state1")
_SECOND: Final = ("exp_avg_sq", "v", "nu", "state2")
_COPIES: Final = ("fp32", "z", "p0")
_BITSANDBYTES: Final = "__bnb_optimizer_quant_state__"


class Exchanges(NamedTuple):
    """How many exchanges of one kind are ruled out, and how many are not."""

    excluded: int
    undecided: int

    def plus(self, other: Exchanges) -> Exchanges:
        return Exchanges(self.excluded + other.excluded, self.undecided + other.undecided)

    def share(self) -> float:
        """The share that is excluded; 0 where there is none to exclude."""
        return self.excluded / max(1, self.excluded + self.undecided)


@dataclass(frozen=True)
class Evidence:
    """What the numbers say of an order.

    ``verdict`` is ``confirmed``, ``partly``, ``contradicted`` or ``inconclusive``. ``pairs`` counts exchanges of two
    modules of equal shapes, ``parts`` those of one matrix alone. ``orders`` says of each whole order held against this
    one whether it is ``excluded``, ``undecided`` or ``preferred``. ``against`` names every exchange that the numbers
    prefer. ``silent`` are the parameters that there is no evidence about.
    """

    verdict: str
    pairs: Exchanges
    parts: Mapping[str, Exchanges] = field(default_factory=dict)
    orders: Mapping[str, str] = field(default_factory=dict)
    against: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "verdict": self.verdict,
            "pairs": self.pairs._asdict(),
            "parts": {kind: counts._asdict() for kind, counts in self.parts.items()},
            "orders": dict(self.orders),
            "against": list(self.against),
            "silent": list(self.silent),
            "notes": list(self.notes),
        }


def weigh(
    state: OptimizerState,
    weights: Mapping[str, Tensor],
    *,
    before: Mapping[str, Tensor] | None = None,
    orders: Mapping[str, Sequence[str]] | None = None,
) -> Evidence:
    """Weigh the state's order against every exchange of two modules of equal shapes, and against whole other orders.

    ``orders`` give the names as another order would have them, position by position; layers reversed, shifted by one
    or sorted as text, and twins exchanged in every layer, are always tried. ``before`` are weights of an earlier step,
    which turn a full fine-tune's weights into its history. Parameters of other methods than LoRA are silent: of what
    they have learnt nothing is known to start at zero.
    """
    units, silent, notes = _units(state, weights, before)
    table = _Table(units)
    pairs, twins, against = Exchanges(0, 0), Exchanges(0, 0), []
    parts: dict[str, Exchanges] = {}
    for kind, losses in table.exchanges():
        outcomes = {pair: _outcome([loss]) for pair, loss in losses.items()}
        counts = _count(outcomes.values())
        against += [
            f"{units[i].label} and {units[k].label} exchanged" + (f" in {kind} alone" if kind else "")
            for (i, k), outcome in outcomes.items()
            if outcome == "preferred"
        ]
        if kind is None:
            pairs = pairs.plus(counts)
            twins = twins.plus(_count(outcome for (i, k), outcome in outcomes.items() if units[i].twin(units[k])))
        else:
            parts[kind] = parts.get(kind, Exchanges(0, 0)).plus(counts)
    whole = {
        label: "excluded" if sources is None else _outcome(table.losses(sources))
        for label, sources in (*_orders(state, units, orders or {}), *_layer_orders(units))
    }
    if table.classes:
        whole["a random order"] = _outcome(table.support())
    every_twin = {label: _outcome(table.losses(sources)) for label, sources in _twin_orders(units)}
    if against or "preferred" in {*whole.values(), *every_twin.values()}:
        verdict = "contradicted"
    elif not pairs.excluded or set(whole.values()) != {"excluded"}:
        verdict = "inconclusive"
    elif twins.undecided or {*every_twin.values(), "excluded"} != {"excluded"} or pairs.share() < CONFIRMED:
        verdict = "partly"
    else:
        verdict = "confirmed"
    return Evidence(verdict, pairs, parts, {**whole, **every_twin}, tuple(against), tuple(silent), tuple(notes))


@dataclass(frozen=True)
class Pairing:
    """Weights against the digests that a state keeps of them: how many are the very bytes, which are not."""

    matching: int
    differing: tuple[str, ...]
    uncompared: tuple[str, ...]


def paired(state: OptimizerState, weights: Mapping[str, Tensor]) -> Pairing:
    """Compare weights with the digests that the state has of its parameters' own bytes.

    Digests are compared at equal dtype and for the one algorithm that is known here. What they prove depends on the
    state: where it was saved from a live optimizer (``naming.rule`` is ``None``), name, order and step; where
    ``convert`` took them from a file beside a positional checkpoint, only that the weights are those of that file.
    """
    matching, differing, uncompared = 0, [], []
    for parameter in state.parameters:
        tensor, digest = _values_of(weights, parameter), parameter.weights
        if tensor is None or digest is None or (digest.algorithm, digest.dtype) != (ALGORITHM, tensor.dtype):
            uncompared.append(parameter.name)
        elif hash_tensor(tensor) == digest.hex:
            matching += 1
        else:
            differing.append(parameter.name)
    return Pairing(matching, tuple(differing), tuple(uncompared))


def _count(outcomes: Iterable[str]) -> Exchanges:
    excluded = [outcome == "excluded" for outcome in outcomes]
    return Exchanges(sum(excluded), len(excluded) - sum(excluded))


def _outcome(losses: Sequence[Loss]) -> str:
    """What to say of an order that makes each of the modules it moves lose this much.

    The loudest modules are not heard: in an order that is wrong as a whole, a few may be right by accident. Only a
    signal that is sure can speak for the other order, or has to agree with it.
    """
    heard = len(losses) - int(len(losses) * TRIMMED)
    sure, together = (sorted(column) for column in zip(*losses, strict=True))
    if sum(together[:heard]) > EXCLUDED and sum(sure[-heard:]) > -EXCLUDED:
        return "excluded"
    return "preferred" if sum(sure[-heard:]) < -EXCLUDED and sum(together[-heard:]) < -EXCLUDED else "undecided"


# --- what is compared -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Part:
    """Of a LoRA matrix: some ranks, ``[ranks, features]``. Of any other parameter: some elements, ``[1, elements]``.

    ``update`` is the direction of the optimizer's next step, or, where ``copied``, the master copy of the weights.
    ``drift`` is how far the weights were, on average, from where they are now when the gradients in ``first`` were
    taken. ``profile`` is the logarithm of the second moment's mean over ranks. Each is zero where there is none.
    """

    name: str
    shape: tuple[int, ...]
    weight: Array
    first: Array
    update: Array
    drift: Array
    profile: Array
    copied: bool


@dataclass(frozen=True, eq=False)
class _Unit:
    """What an exchange moves together: a module's LoRA matrices and what belongs to them, or one parameter."""

    label: str
    leaf: str
    layer: tuple[str, str] | None
    stepped: bool
    parts: Mapping[str, _Part]

    @property
    def shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return tuple((kind, part.shape) for kind, part in sorted(self.parts.items()))

    def twin(self, other: _Unit) -> bool:
        """Whether both stand in the same layer."""
        return self.layer is not None and self.layer == other.layer


def _units(
    state: OptimizerState, weights: Mapping[str, Tensor], before: Mapping[str, Tensor] | None
) -> tuple[list[_Unit], list[str], list[str]]:
    """The units, the parameters about which there is nothing to say, and notes on why."""
    groups = [group for group in state.groups for _ in range(group.count)]
    # AdaLoRA's third factor breaks the identity of the other two.
    adaptive = {p.name.rpartition(".lora_E")[0] for p in state.parameters if ".lora_E" in p.name}
    found: dict[tuple[str, str | None], dict[str, tuple[Parameter, Tensor, Tensor | None, Group]]] = {}
    silent, doubled = [], 0
    for parameter, group in zip(state.parameters, groups, strict=False):
        tensor = _values_of(weights, parameter)
        if tensor is None or tensor.shape != parameter.shape:
            doubled += tensor is not None and tensor.count == 2 * math.prod(parameter.shape)
            silent.append(parameter.name)
            continue
        module, adapter, kind = _split(parameter.name)
        if module in adaptive:
            module, adapter, kind = parameter.name, None, WEIGHT
        older = _values_of(before or {}, parameter)
        found.setdefault((module, adapter), {})[kind] = (parameter, tensor, older, group)
    notes = []
    if doubled:
        notes.append(f"{doubled} weights have twice the rank of their state: an adapter converted from PiSSA or OLoRA")
    shapes = [(kind, entry[0].shape) for parts in found.values() for kind, entry in parts.items() if kind in {A, B}]
    crowd = max((shapes.count(shape) for shape in set(shapes)), default=1)
    units = []
    for (module, adapter), entries in found.items():
        parts = {kind: _part(kind, *entry, ranks=max(4, SIDE // crowd)) for kind, entry in entries.items()}
        silent += [part.name for part in parts.values() if not part.update.any()]
        match = _LAYER.fullmatch(module)
        suffix = f" of {adapter}" if adapter else ""
        units.append(
            _Unit(
                label=module + suffix,
                leaf=(match["stack"] + "*" + match["rest"] if match else module) + suffix,
                layer=(match["stack"], match["number"]) if match else None,
                stepped=any(entry[0].state for entry in entries.values()),
                parts=parts,
            )
        )
    return units, silent, notes


def _split(name: str) -> tuple[str, str | None, str]:
    """The module, the adapter and the kind of a parameter."""
    match = _PART.fullmatch(name)
    if match is None:
        return name, None, WEIGHT
    kind = A if match["a"] else B if match["b"] else MAGNITUDE
    return match["module"], match["adapter"], BIAS if match["bias"] else kind


def _values_of(weights: Mapping[str, Tensor], parameter: Parameter) -> Tensor | None:
    return next((weights[key] for key in (parameter.name, *parameter.keys.values()) if key in weights), None)


def _part(kind: str, parameter: Parameter, tensor: Tensor, older: Tensor | None, group: Group, *, ranks: int) -> _Part:
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
        scale = np.sqrt(second) if second is not None else np.ones_like(first)
        update = np.clip(np.divide(first, scale, out=np.zeros_like(first), where=scale > 0), -10, 10)
        if second is not None:
            drift = update * _lag(group, slots.get("step"))
    energy = second.mean(axis=0) if second is not None else None
    return _Part(
        name=parameter.name,
        shape=shape,
        weight=weight,
        first=zero if first is None else first,
        update=update,
        drift=drift,
        profile=np.zeros(weight.shape[1], np.float32) if energy is None else np.log(np.maximum(energy, 1e-38)),
        copied=copy is not None,
    )


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
    nested = state.get(_BITSANDBYTES)
    flat: Mapping[str, Value] = {**state, **nested} if isinstance(nested, Mapping) else state

    def pick(names: Sequence[str]) -> Value:
        name = next((n for n in names if isinstance(flat.get(n), (Slot, Mapping))), None)
        if name is None or not name.startswith("state"):
            return flat[name] if name else None
        number = name.removeprefix("state")
        return {"codes": flat[name], "qmap": flat.get(f"qmap{number}"), "scale": flat.get(f"absmax{number}")}

    found = {"first": pick(_FIRST), "second": pick(_SECOND), "copy": pick(_COPIES), "step": flat.get("step")}
    return {key: value for key, value in found.items() if value is not None}


def _spans(count: int) -> list[tuple[int, int]]:
    """Runs of elements, evenly spread, ``SAMPLE`` elements in all at most: (start, length)."""
    if count <= SAMPLE:
        return [(0, count)]
    return [(count * i // 32, SAMPLE // 32) for i in range(32)]


def _numbers(value: Value, spans: Sequence[tuple[int, int]], shape: tuple[int, ...]) -> Array | None:
    """A slot's values: a tensor of the parameter's shape, or 8-bit codes with their levels and scales."""
    import numpy as np

    if isinstance(value, Slot):
        return _floats(value.tensor, spans) if value.tensor.shape == shape else None
    if not isinstance(value, Mapping):
        return None
    codes, levels, scales = value.get("codes"), value.get("qmap"), value.get("scale")
    if not isinstance(codes, Slot) or codes.tensor.shape != shape:
        return None
    if codes.tensor.dtype != "U8":
        return _floats(codes.tensor, spans)
    if not isinstance(levels, Slot) or not isinstance(scales, Slot):
        return None
    # The block size is not in the file. It is a power of two, and the last block may be cut.
    block = 1 << (-(-codes.tensor.count // scales.tensor.count) - 1).bit_length()
    where = np.concatenate([np.arange(start, start + length) for start, length in spans])
    steps = np.concatenate([np.frombuffer(_bytes(codes.tensor, *span), np.uint8) for span in spans])
    values: Array = _floats(levels.tensor)[steps] * _floats(scales.tensor)[where // block]
    return values


def _floats(tensor: Tensor, spans: Sequence[tuple[int, int]] | None = None) -> Array:
    """A tensor's elements, or runs of them, as a flat float32 array. Dtypes that are no floats give zeros."""
    import numpy as np

    types = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    spans = spans or [(0, tensor.count)]
    if tensor.dtype not in types:
        return np.zeros(sum(length for _, length in spans), np.float32)
    raw = np.concatenate([np.frombuffer(_bytes(tensor, *span), types[tensor.dtype]) for span in spans])
    if tensor.dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


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


class _Table:
    """Every state against every weight of the same shape.

    ``scores`` are z-values: square roots of twice a log-likelihood ratio. The noise of a signal is what it shows where
    states and weights do not belong together; in nats its square divides the ratio.
    """

    def __init__(self, units: Sequence[_Unit]) -> None:
        import numpy as np

        self.units = units
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
        noise larger and every answer more careful.
        """
        import numpy as np

        wrong: dict[str, list[Array]] = defaultdict(list)
        for moved, members, _ in self._moves():
            for name, score in self.scores(moved, members).items():
                wrong[name].append(score[~np.eye(len(score), dtype=bool)])
        result = {}
        for name, scores in wrong.items():
            values = np.concatenate(scores)
            assumed, count = PRIOR
            # One in a hundred of a standard normal's absolute values lies above 2.576.
            tail = float(np.quantile(np.abs(values), 0.99)) / 2.576
            seen = max(float(np.square(values).mean()), tail**2)
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
            yield (
                None if whole else moved[0],
                {
                    (members[i], members[k]): (loss[0][i][k], loss[1][i][k])
                    for i, k in combinations(range(len(members)), 2)
                    if self.units[members[i]].stepped or self.units[members[k]].stepped
                },
            )

    def support(self) -> list[Loss]:
        """What each unit would lose, on average, with the state of another one of its shapes."""
        result: list[Loss] = []
        for moved, members, whole in self._moves():
            if whole:
                nats = self.nats(moved, members)
                own = nats.diagonal(axis1=1, axis2=2)
                others = (nats.sum(axis=2) - own) / (len(members) - 1)
                result += zip(*(own - others).tolist(), strict=True)
        return result

    def losses(self, sources: Sources) -> list[Loss]:
        """What each unit that gets another state would lose."""
        moved = {number for (number, _), source in sources.items() if source != number}
        pairs = [(self._value(number, {}), self._value(number, sources)) for number in sorted(moved)]
        return [(own[0] - other[0], own[1] - other[1]) for own, other in pairs]

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


def _z(cosine: Any, count: int) -> Any:
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


# --- other orders ---------------------------------------------------------------------------------------------------


def _orders(
    state: OptimizerState, units: Sequence[_Unit], orders: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, Sources | None]]:
    """The given orders by label; ``None`` for one that puts a state on a parameter of another shape."""
    where = {part.name: (number, kind) for number, unit in enumerate(units) for kind, part in unit.parts.items()}

    def place(name: str) -> tuple[str, tuple[int, ...]]:
        number, kind = where[name]
        return kind, units[number].parts[kind].shape

    for label, names in orders.items():
        olds = [parameter.name for parameter in state.parameters]
        moved = [(new, old) for new, old in zip(names, olds, strict=False) if new != old and {new, old} <= set(where)]
        fits = all(place(new) == place(old) for new, old in moved)
        yield label, {where[new]: where[old][0] for new, old in moved} if fits else None


def _layer_orders(units: Sequence[_Unit]) -> Iterator[tuple[str, Sources | None]]:
    """Orders that differ only in which layer is which."""
    stacks: dict[str, set[str]] = defaultdict(set)
    for unit in units:
        if unit.layer:
            stacks[unit.layer[0]].add(unit.layer[1])
    moved: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
    for stack, numbers in stacks.items():
        layers, text = sorted(numbers, key=int), sorted(numbers)
        for label, others in {
            "layers reversed": layers[::-1],
            "layers shifted up by one": layers[1:] + layers[:1],
            "layers shifted down by one": layers[-1:] + layers[:-1],
            "layers sorted as text": text,
            "layers sorted as numbers": [layers[text.index(layer)] for layer in layers],
        }.items():
            if others != layers:
                moved[label].update({(stack, a): b for a, b in zip(layers, others, strict=True)})
    by_place = {(unit.leaf, unit.layer and unit.layer[1]): number for number, unit in enumerate(units)}
    for label, places in moved.items():
        sources = {
            number: by_place.get((unit.leaf, places[unit.layer]))
            for number, unit in enumerate(units)
            if unit.layer in places
        }
        if None not in sources.values():
            fits = all(source is not None and units[n].shapes == units[source].shapes for n, source in sources.items())
            yield label, _whole(units, [(n, s) for n, s in sources.items() if s is not None]) if fits else None


def _twin_orders(units: Sequence[_Unit]) -> Iterator[tuple[str, Sources]]:
    """Orders in which two modules of equal shapes are exchanged in every layer."""
    leaves: dict[str, dict[tuple[str, str], int]] = defaultdict(dict)
    for number, unit in enumerate(units):
        if unit.layer:
            leaves[unit.leaf][unit.layer] = number
    for left, right in combinations(leaves, 2):
        pairs = [(number, leaves[right][layer]) for layer, number in leaves[left].items() if layer in leaves[right]]
        pairs = [(i, k) for i, k in pairs if units[i].shapes == units[k].shapes]
        if pairs:
            yield f"{left} and {right} exchanged in every layer", _whole(units, [*pairs, *((k, i) for i, k in pairs)])


def _whole(units: Sequence[_Unit], moves: Sequence[tuple[int, int]]) -> Sources:
    return {(number, kind): source for number, source in moves for kind in units[number].parts}
