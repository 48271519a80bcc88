"""From positions to names: which parameter does id 17 of an ``optimizer.pt`` mean?

How to call it::

    decide(positional, parameters, source="adapter")             # convert: parameters of names.adapter_parameters(...)
    decide(positional, described, source="model", live=groups)   # load_optimizer: every parameter of the live model
    decide(positional, described, source="configs", weights=w)   # a model rebuilt from its configs, weights beside it
    decide(positional, listed, source="names", rule="listed")    # --names FILE: the names stand in optimizer order

``parameters`` stand in ``named_parameters()`` order (only ``rule="listed"`` takes them as they come). They may be plain
``Parameter`` objects, of which nothing more is known and all of which are taken to be trainable, or ``Described`` ones.
``weights`` are the parameters' values by ``Parameter.name`` or by one of its ``keys``; with them, ``evidence.py`` is
asked. ``live`` are the names in each group of a live optimizer: where they fit, they are the order that is proposed.

A grouping rule is a row of ``RULES``: how a framework sorts a model's parameters into groups. Each yields a candidate;
candidates whose group sizes, shapes or options are not the file's fall away; those left must agree.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from lora_state_format.errors import AmbiguousOrderError, ConversionError, OptionError
from lora_state_format.model import Naming, OptimizerState, Parameter, PositionalState, Role, Slot, Tensor, Value, walk

__all__ = ["RULES", "Candidate", "Described", "Rule", "candidates", "decide", "interchangeable"]


@dataclass(frozen=True, slots=True)
class Described:
    """A parameter, and what only a model can tell of it.

    ``module`` is the class of the module that owns it, with its path (``torch.nn.modules.sparse.Embedding``), ``None``
    where there is no model to ask.
    """

    parameter: Parameter
    trainable: bool = True
    module: str | None = None


Groups: TypeAlias = "list[list[Described]]"


@dataclass(frozen=True, slots=True)
class Rule:
    """How a framework sorts parameters into groups.

    ``groups`` takes the parameters in ``named_parameters()`` order and the state; it returns the parameters of each
    group, or ``None`` where the rule cannot apply. A rule that is not ``automatic`` is used only when asked for.
    """

    name: str
    summary: str
    groups: Callable[[Sequence[Described], PositionalState], Groups | None]
    automatic: bool = True


@dataclass(frozen=True, slots=True)
class Candidate:
    """An order that fits: the parameters as they stand in the file, and the rules that say so."""

    rules: tuple[str, ...]
    parameters: tuple[Parameter, ...]


def _flat(parameters: Sequence[Described], state: PositionalState) -> Groups:
    return [[p for p in parameters if p.trainable]]


def _trainer(parameters: Sequence[Described], state: PositionalState) -> Groups:
    decayed = [p for p in parameters if p.trainable and "bias" not in p.parameter.name]
    return [decayed, [p for p in parameters if p.trainable and "bias" in p.parameter.name]]


def _listed(parameters: Sequence[Described], state: PositionalState) -> Groups:
    rest = iter(parameters)
    groups = [[p for _, p in zip(range(size), rest, strict=False)] for size in state.sizes()]
    return [*groups, remaining] if (remaining := list(rest)) else groups


RULES: Final[tuple[Rule, ...]] = (
    Rule("flat", "one group of all trainable parameters", _flat),
    Rule("trainer", "transformers.Trainer: with weight decay, then without", _trainer),
    Rule("listed", "the names stand in the optimizer's order already", _listed, automatic=False),
)
"""Every grouping rule; a new one is one more row."""


def candidates(
    positional: PositionalState, parameters: Sequence[Parameter | Described], *, rule: str | None = None
) -> list[Candidate]:
    """Every order that some rule proposes and that fits the state; orders that are equal come as one."""
    found, _ = _survey(positional, [_described(p) for p in parameters], rule)
    return found


def decide(
    positional: PositionalState,
    parameters: Sequence[Parameter | Described],
    *,
    rule: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
    live: Sequence[Sequence[str]] | None = None,
    source: str,
) -> OptimizerState:
    """The state under names.

    Raises ``OptionError`` for a rule that does not exist, ``ConversionError`` if no order fits, and
    ``AmbiguousOrderError`` if several do. See the head of this module for the arguments.
    """
    found, reasons = _survey(positional, [_described(p) for p in parameters], rule)
    if not found:
        raise ConversionError(
            f"no order of the {len(parameters)} parameters fits the {len(positional.ids)} of the optimizer, whose "
            f"groups hold {positional.sizes()}:" + "".join(f"\n  {name}: {reason}" for name, reason in reasons)
        )
    if len(found) > 1:
        raise AmbiguousOrderError("several orders fit", tuple(c.rules[0] for c in found))
    chosen = found[0]
    details: dict[str, Value] = {
        "rules": list(chosen.rules),
        "interchangeable": interchangeable(chosen.parameters),
    }
    return positional.named(chosen.parameters, Naming(source, chosen.rules[0], details))


def interchangeable(parameters: Sequence[Parameter]) -> int:
    """How many of the parameters share their shape with another: those that could be swapped without it showing."""
    counts = Counter(p.shape for p in parameters)
    return sum(n for n in counts.values() if n > 1)


def _described(parameter: Parameter | Described) -> Described:
    return parameter if isinstance(parameter, Described) else Described(parameter)


def _survey(
    positional: PositionalState, parameters: Sequence[Described], rule: str | None
) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """The candidates that fit, equal ones merged, and why each other rule fell away."""
    rules = [r for r in RULES if (r.automatic if rule is None else r.name == rule)]
    if not rules:
        raise OptionError(f"no grouping rule '{rule}'; there are: {', '.join(r.name for r in RULES)}")
    fitting: dict[tuple[str, ...], tuple[list[str], tuple[Parameter, ...]]] = {}
    reasons = []
    for row in rules:
        groups = row.groups(parameters, positional)
        if groups is None:
            continue
        reason = _misfit(positional, groups)
        if reason:
            reasons.append((row.name, reason))
            continue
        order = tuple(p.parameter for group in groups for p in group)
        fitting.setdefault(tuple(p.name for p in order), ([], order))[0].append(row.name)
    return [Candidate(tuple(names), order) for names, order in fitting.values()], reasons


def _misfit(positional: PositionalState, groups: Groups) -> str | None:
    """Why the groups cannot be those of the state."""
    sizes = [len(group) for group in groups]
    if sizes != positional.sizes():
        return f"makes groups of {sizes}"
    order = [p.parameter for group in groups for p in group]
    for identity, parameter in zip(positional.ids, order, strict=True):
        for path, tensor in _misshapen(positional.entries.get(identity, {}), parameter.shape):
            return (
                f"'{parameter.name}' has shape {list(parameter.shape)}, but id {identity} has "
                f"{'.'.join(map(str, path))} of shape {list(tensor.shape)}"
            )
    return None


def _misshapen(state: Mapping[str, Value], shape: tuple[int, ...]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """The slots that a parameter of ``shape`` cannot have, by what their roles promise."""
    blocks = []
    for path, leaf in walk(state):
        if not isinstance(leaf, Slot):
            continue
        tensor = leaf.tensor
        squeezed = tuple(n for n in tensor.shape if n != 1)
        if leaf.role is Role.BLOCK:
            blocks.append((path, tensor))
        elif (
            (leaf.role is Role.PARAM and tensor.shape != shape)
            or (leaf.role is Role.ROW and squeezed != tuple(n for n in shape[:-1] if n != 1))
            or (leaf.role is Role.COL and squeezed != tuple(n for n in (*shape[:-2], *shape[-1:]) if n != 1))
        ):
            yield path, tensor
    if blocks:
        # Codes come one per element, two to a byte (4-bit), or for two moments at once (AdEMAMix); scales are fewer.
        path, codes = max(blocks, key=lambda block: block[1].count)
        if codes.count not in {count := math.prod(shape), -(-count // 2), 2 * count}:
            yield path, codes
