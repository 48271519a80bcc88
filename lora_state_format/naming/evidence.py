"""Tell from the numbers whether moments belong to weights, and in which order.

How to call it::

    weigh(state, weights)                          # a named state and the weights that it may belong to
    weigh(state, weights, before=older)            # weights of an earlier checkpoint too, for a full fine-tune
    weigh(state, weights, orders={"flat": names})  # and other whole orders that must be ruled out
    paired(state, weights)                         # digests first, where the state has its own: no statistics

``weights`` map a parameter's name, or one of its ``foreign_names``, to its values. ``signals.py`` says what is
compared, this module what follows from it. ``docs/evidence.md`` holds the study that the constants come from.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Final, NamedTuple

from lora_state_format.model.digests import ALGORITHM, hash_tensor
from lora_state_format.model.states import OptimizerState
from lora_state_format.model.tensors import Tensor
from lora_state_format.naming.signals import A, B, Loss, Sources, Unit, units_of, value_of
from lora_state_format.naming.table import Table

__all__ = ["EXCLUDED", "Evidence", "Exchanges", "Pairing", "head_size", "judge", "paired", "weigh"]

EXCLUDED: Final = 16.0
"""Nats by which an exchange must lose to count as excluded, or win to count against the order."""

CONFIRMED: Final = 0.99
"""Share of module pairs that must be excluded in a confirmed order, where the rest must lose ``DOUBTFUL`` nats."""

DOUBTFUL: Final = 4.0
"""An exchange, of modules or of A or B alone, that loses fewer nats than this keeps an order from being confirmed."""

TRIMMED: Final = 0.25
"""Share of the modules, those with the strongest signal, that are left out when whole orders are compared."""

LISTED: Final = 20
"""Exchanges against the order that a report names at most."""


class Exchanges(NamedTuple):
    """How many exchanges of one kind are ruled out, and how many are not."""

    excluded: int
    undecided: int

    def plus(self, other: Exchanges) -> Exchanges:
        """Return the counts of both."""
        return Exchanges(self.excluded + other.excluded, self.undecided + other.undecided)

    def share(self) -> float:
        """Return the share that is excluded; 0 where there is none to exclude."""
        return self.excluded / max(1, self.excluded + self.undecided)


NONE_TRIED: Final = Exchanges(0, 0)


@dataclass(frozen=True)
class Evidence:
    """The evidence for an order.

    ``verdict`` is ``confirmed``, ``partly``, ``contradicted`` or ``inconclusive``. ``pairs`` counts exchanges of two
    modules of equal shapes, ``parts`` those of one matrix alone. ``orders`` says of each whole order held against this
    one whether it is ``excluded``, ``undecided`` or ``preferred``. ``against`` names every exchange that the numbers
    prefer. ``silent`` are the parameters without evidence.
    """

    verdict: str
    pairs: Exchanges
    parts: Mapping[str, Exchanges] = field(default_factory=dict)
    orders: Mapping[str, str] = field(default_factory=dict)
    against: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def rules_out(self, orders: Iterable[str]) -> bool:
        """Return whether each of these orders, but for this one itself, is excluded."""
        return all(self.orders.get(label, "excluded") == "excluded" for label in orders)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; at most ``LISTED`` exchanges against the order are named."""
        more = [f"and {len(self.against) - LISTED} more"] if len(self.against) > LISTED else []
        return {
            "verdict": self.verdict,
            "pairs": self.pairs._asdict(),
            "parts": {kind: counts._asdict() for kind, counts in self.parts.items()},
            "orders": dict(self.orders),
            "against": [*self.against[:LISTED], *more],
            "silent": len(self.silent),
            "notes": list(self.notes),
        }


def weigh(
    state: OptimizerState,
    weights: Mapping[str, Tensor],
    *,
    before: Mapping[str, Tensor] | None = None,
    orders: Mapping[str, Sequence[str]] | None = None,
    head_dim: int | None = None,
) -> Evidence:
    """Weigh the state's order against every exchange of two modules of equal shapes, and against whole other orders.

    Layers reversed, shifted by one or sorted as text, and twins exchanged in every layer, are always tried. There is no
    evidence about other adapters than LoRA's.

    Args:
        state: A named state.
        weights: The parameters' values, by a name or a foreign name of theirs.
        before: Their values at an earlier step, which give a full fine-tune a history.
        orders: Label -> the names as another order would have them, position by position.
        head_dim: The size of an attention head. It is needed for o where several of its heads share one of v.
    """
    units, balances, silent, notes = units_of(state, weights, before, head_dim)
    return judge(Table(units, balances), tuple(_orders(state, units, orders or {})), silent, notes)


def head_size(config: Mapping[str, Any]) -> int | None:
    """Return the size of an attention head by a model's ``config.json``; ``None`` where it does not say."""
    stated, hidden, heads = (config.get(key) for key in ("head_dim", "hidden_size", "num_attention_heads"))
    if isinstance(stated, int):
        return stated
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else None


def judge(
    table: Table,
    orders: Iterable[tuple[str, Sources | None]] = (),
    silent: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Evidence:
    """Return the verdict on a table of states against weights.

    Args:
        table: What each unit loses with the state of each other.
        orders: Whole orders to try in addition to the usual ones; ``None`` for one that cannot be.
        silent: The parameters without evidence.
        notes: Why they have none.
    """
    tried = _try_exchanges(table)
    whole = {
        label: "excluded" if sources is None else _outcome(table.losses(sources))
        for label, sources in (*orders, *_layer_orders(table.units))
    }
    if table.classes:
        whole["a random order"] = _outcome(table.support())
    twins = {label: _outcome(table.losses(sources)) for label, sources in _twin_orders(table.units)}
    return Evidence(
        _verdict(tried, whole, twins),
        tried.pairs,
        tried.parts,
        {**whole, **twins},
        tuple(tried.against),
        tuple(silent),
        tuple(notes),
    )


@dataclass
class _Tried:
    """What exchanges of two units came to.

    ``pairs`` moved all parts of both, ``twins`` are those of them within a layer, ``parts`` moved one kind of part
    alone. ``against`` describes those that the numbers prefer; ``doubts`` counts those that lose too little.
    """

    pairs: Exchanges = NONE_TRIED
    twins: Exchanges = NONE_TRIED
    parts: dict[str, Exchanges] = field(default_factory=dict)
    against: list[str] = field(default_factory=list)
    doubts: int = 0


def _try_exchanges(table: Table) -> _Tried:
    units, tried = table.units, _Tried()
    for kind, losses in table.exchanges():
        outcomes = {pair: _outcome([loss]) for pair, loss in losses.items()}
        counts = _count(outcomes.values())
        if kind in {None, A, B}:
            tried.doubts += sum(loss[1] < DOUBTFUL for loss in losses.values())
        tried.against += [
            f"{units[i].label} and {units[k].label} exchanged" + (f" in {kind} alone" if kind else "")
            for (i, k), outcome in outcomes.items()
            if outcome == "preferred"
        ]
        if kind is None:
            of_twins = _count(outcome for (i, k), outcome in outcomes.items() if units[i].twin(units[k]))
            tried.pairs, tried.twins = tried.pairs.plus(counts), tried.twins.plus(of_twins)
        else:
            tried.parts[kind] = tried.parts.get(kind, NONE_TRIED).plus(counts)
    return tried


def _verdict(tried: _Tried, whole: Mapping[str, str], twins: Mapping[str, str]) -> str:
    """Return the verdict by the outcomes of exchanges, of whole other orders, and of twins in every layer."""
    if tried.against or "preferred" in {*whole.values(), *twins.values()}:
        return "contradicted"
    if not tried.pairs.excluded or set(whole.values()) != {"excluded"}:
        return "inconclusive"
    undecided = tried.doubts or tried.twins.undecided or {*twins.values(), "excluded"} != {"excluded"}
    return "partly" if undecided or tried.pairs.share() < CONFIRMED else "confirmed"


@dataclass(frozen=True)
class Pairing:
    """Weights against the digests that a state keeps of them: how many have the same bytes, which differ."""

    matching: int
    differing: tuple[str, ...]
    uncompared: tuple[str, ...]


def paired(state: OptimizerState, weights: Mapping[str, Tensor]) -> Pairing:
    """Compare weights with the digests that the state has of its parameters' own bytes.

    Digests are compared at equal dtype and for the one algorithm that is known here. What they prove depends on the
    state: where it was saved from a live optimizer (``naming.rule`` is ``None``), name, order and step; where
    ``convert`` took them from a file next to a positional checkpoint, only that the weights are those of that file.
    """
    matching, differing, uncompared = 0, [], []
    for parameter in state.parameters:
        tensor, digest = value_of(weights, parameter), parameter.weights
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
    """Return the outcome for an order that makes each of the modules it moves lose this much.

    The modules with the strongest signal are left out: in an order that is wrong as a whole, a few may be right by
    accident. Only a signal that is sure can speak for the other order, or has to agree with it.
    """
    if not losses:
        return "undecided"
    heard = len(losses) - int(len(losses) * TRIMMED)
    sure, together = (sorted(column) for column in zip(*losses, strict=True))
    if sum(together[:heard]) > EXCLUDED and sum(sure[-heard:]) > -EXCLUDED:
        return "excluded"
    return "preferred" if sum(sure[-heard:]) < -EXCLUDED and sum(together[-heard:]) < -EXCLUDED else "undecided"


# --- other orders ---------------------------------------------------------------------------------------------------


def _orders(
    state: OptimizerState, units: Sequence[Unit], orders: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, Sources | None]]:
    """Yield the given orders by label; ``None`` for one that puts a state on a parameter of another shape."""
    where = {part.name: (number, kind) for number, unit in enumerate(units) for kind, part in unit.parts.items()}

    def place(name: str) -> tuple[str, tuple[int, ...]]:
        number, kind = where[name]
        return kind, units[number].parts[kind].shape

    for label, names in orders.items():
        olds = [parameter.name for parameter in state.parameters]
        moved = [(new, old) for new, old in zip(names, olds, strict=False) if new != old and {new, old} <= set(where)]
        fits = all(place(new) == place(old) for new, old in moved)
        yield label, {where[new]: where[old][0] for new, old in moved} if fits else None


def _layer_orders(units: Sequence[Unit]) -> Iterator[tuple[str, Sources | None]]:
    """Yield orders that differ from the state's in the numbers of layers only."""
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


def _twin_orders(units: Sequence[Unit]) -> Iterator[tuple[str, Sources]]:
    """Yield orders in which two modules of equal shapes are exchanged in every layer."""
    leaves: dict[str, dict[tuple[str, str], int]] = defaultdict(dict)
    for number, unit in enumerate(units):
        if unit.layer:
            leaves[unit.leaf][unit.layer] = number
    for left, right in combinations(leaves, 2):
        pairs = [(number, leaves[right][layer]) for layer, number in leaves[left].items() if layer in leaves[right]]
        pairs = [(i, k) for i, k in pairs if units[i].shapes == units[k].shapes]
        if pairs:
            yield f"{left} and {right} exchanged in every layer", _whole(units, [*pairs, *((k, i) for i, k in pairs)])


def _whole(units: Sequence[Unit], moves: Sequence[tuple[int, int]]) -> Sources:
    return {(number, kind): source for number, source in moves for kind in units[number].parts}
