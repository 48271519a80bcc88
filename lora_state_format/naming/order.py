"""From positions to names: which parameter does id 17 of an ``optimizer.pt`` mean?

How to call it::

    decide(positional, parameters, source="adapter", weights=w)   # convert: of names.adapter_parameters(...)
    decide(positional, described, source="configs", weights=w)    # a model rebuilt by torch.rebuild.rebuild(folder)
    decide(positional, described, source="model", live=groups)    # load_optimizer: torch.rebuild.describe(model)
    decide(positional, listed, source="names", rule="listed")     # --names FILE: the names stand in optimizer order

``parameters`` stand in ``named_parameters()`` order (only the rule ``listed`` takes them as they come). They may be
plain ``Parameter`` objects, of which nothing more is known and all of which are taken to be trainable, or ``Described``
ones. ``weights`` are the parameters' values, by ``Parameter.name`` or by one of its ``keys``; with them
``evidence.weigh`` is asked, which takes ``before`` and ``head_dim`` too. ``live`` are the names in each group of a live
optimizer.

A grouping rule is a row of ``RULES``: how a framework sorts a model's parameters into groups. Each yields candidates;
those whose group sizes, shapes or options are not the file's fall away; those left must agree, or evidence decides.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, permutations
from typing import Final, NamedTuple

from lora_state_format.errors import AmbiguousOrderError, ConversionError, OptionError, Remedy
from lora_state_format.model.states import Naming, OptimizerState, Parameter, PositionalState, Role, Slot, Value, walk
from lora_state_format.model.tensors import Tensor
from lora_state_format.naming.evidence import Evidence, weigh
from lora_state_format.naming.names import plain_name, split_adapter
from lora_state_format.naming.rules import (
    PARTS,
    RULES,
    Candidate,
    Described,
    Split,
    Splits,
    rules_called,
    trainable_of,
)

__all__ = ["NAME_ORDER", "ContradictedError", "candidates", "decide", "interchangeable"]

LIVE: Final = "live"
"""Stands for a rule where the order is that of a live optimizer."""

SURE: Final = ("stated", "whole-model")
"""Rules that go before others: what they read is in the file."""

INFERRED: Final = ("adapter", "configs", "checkpoint")
"""Sources of names that the weights overrule; a live model, a file of names and a forced rule they do not."""


FORCE: Final = Remedy("force one with {rule}", {"rule": ...})

FORCE_OR_WEIGH: Final = Remedy(
    "force one with {rule}, or pass the weights that were saved with the state", {"rule": ...}
)


class ContradictedError(ConversionError):
    """The weights say that the parameters stand in another order."""


# --- the verdict ----------------------------------------------------------------------------------------------------


def candidates(
    positional: PositionalState, parameters: Sequence[Parameter | Described], *, rule: str | None = None
) -> list[Candidate]:
    """Return every order that some rule proposes and that fits the state; orders that are equal come as one.

    Raises ``OptionError`` for a rule that does not exist.
    """
    return _survey(positional, [_described(p) for p in parameters], rule)[0]


def decide(
    positional: PositionalState,
    parameters: Sequence[Parameter | Described],
    *,
    others: Iterable[Sequence[Parameter | Described]] = (),
    partly: bool = False,
    rule: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
    before: Mapping[str, Tensor] | None = None,
    head_dim: int | None = None,
    live: Sequence[Sequence[str]] | None = None,
    source: str,
) -> OptimizerState:
    """Return the state under names; ``naming.details`` says what else fitted and what the weights say.

    The live optimizer's order, where it fits, and names stated in the file go before rules; other orders that fit are
    then only what the weights are asked about. ``others`` are further ways to see the parameters (which are frozen,
    what their modules are), tried like the first. ``partly`` allows that a group holds only some of the parameters
    that a rule puts into it, where the shapes leave one way to choose them. See the head of this module for the rest.

    Raises ``OptionError`` for a rule that does not exist, ``ConversionError`` if no order fits or the weights
    contradict one that was inferred, and ``AmbiguousOrderError`` if several fit and nothing tells which.
    """
    views = [[_described(p) for p in view] for view in (parameters, *others)]
    lived = _live(positional, views[0], live or ())
    fitting, reasons = _fitting(positional, views, rule, partly, weak=lived is None)
    first = lived or next((c for c in fitting if set(SURE) & set(c.rules)), None)
    found = _in_turn(positional, fitting, first if rule is None else None, adapters=_is_open(source, rule, first))
    if not found:
        raise _nothing_fits(positional, views[0], reasons)

    def weighed(candidate: Candidate) -> _Weighed:
        state = positional.named(candidate.parameters, Naming(source, candidate.rules[0]))
        rivals = {c.rules[0]: c.names for c in found if c is not candidate}
        evidence = weigh(state, weights, before=before, orders=rivals, head_dim=head_dim) if weights else None
        return _Weighed(candidate, state, evidence)

    chosen, state, evidence = _settled(found, first, weighed, has_weights=bool(weights))
    if evidence and evidence.verdict == "contradicted" and rule in {None, "listed"} and source in INFERRED:
        raise ContradictedError(
            _contradicted(evidence),
            remedy=Remedy(
                "pass {names} in the optimizer's order, or force the order with {rule}", {"names": ..., "rule": ...}
            ),
        )
    details: dict[str, Value] = {
        "rules": list(chosen.rules),
        "interchangeable": interchangeable(chosen.parameters),
        **({"evidence": evidence.to_json()} if evidence else {}),
    }
    return replace(state, naming=Naming(source, chosen.rules[0], details))


def grouped(parameters: Sequence[Parameter | Described], rule: str = "flat") -> list[list[str]]:
    """Return the names of a model's parameters in each group that a rule makes, in optimizer order.

    Args:
        parameters: Those of the model in ``named_parameters()`` order.
        rule: One of ``rules.RULES``.

    Raises:
        OptionError: There is no such rule, or what it makes depends on the optimizer's state.
    """
    row, *_ = rules_called(rule)
    blank = PositionalState((), (), (), {})
    splits = next(iter(row.splits([_described(p) for p in parameters], blank)), None)
    if splits is None:
        raise OptionError(f"what the rule '{rule}' makes depends on the optimizer's state")
    return [[item.name for item in split.members] for split in splits]


def _is_open(source: str, rule: str | None, first: Candidate | None) -> bool:
    """Return whether the order of adapters among each other is open: no model, no list and no sure order says it."""
    return source != "model" and rule != "listed" and (first is None or rule is not None)


def _in_turn(
    positional: PositionalState, fitting: Sequence[Candidate], first: Candidate | None, *, adapters: bool
) -> list[Candidate]:
    """Return the candidates with the one that goes before others in front, or with their adapters in every order."""
    if first is not None:
        return [first, *(c for c in fitting if c.names != first.names)]
    return [variant for c in fitting for variant in _adapter_orders(positional, c)] if adapters else list(fitting)


class _Weighed(NamedTuple):
    """A candidate, the state under its names, and what the weights say of it, if there are any."""

    candidate: Candidate
    state: OptimizerState
    evidence: Evidence | None


def _fitting(
    positional: PositionalState, views: Sequence[Sequence[Described]], rule: str | None, partly: bool, weak: bool
) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """Return the orders that fit, by any way to see the parameters, and why rules fell away for the first way.

    ``weak`` asks the rule for parts of a model too, if no other one fits: hardly an order contradicts it.
    """
    found, reasons = _survey(positional, views[0], rule)
    for view in views[1:]:
        seen = {tuple(c.names) for c in found}
        found += [c for c in _survey(positional, view, rule)[0] if tuple(c.names) not in seen]
    if not found and rule is None and weak:
        found = _survey(positional, views[0], PARTS)[0]
    if not found and partly:
        found, more_reasons = _survey(positional, views[0], rule, partly=True)
        reasons += [reason for reason in more_reasons if reason not in reasons]
    return found, reasons


def _settled(
    found: Sequence[Candidate],
    first: Candidate | None,
    weighed: Callable[[Candidate], _Weighed],
    *,
    has_weights: bool,
) -> _Weighed:
    """Return the first candidate, or the one for which the weights rule out all others.

    Raises ``AmbiguousOrderError`` if several fit, none goes before the others, and the weights do not tell.
    """
    best = weighed(found[0])
    contradicted = best.evidence is not None and best.evidence.verdict == "contradicted"
    if len(found) == 1 or (first is not None and not contradicted):
        return best
    labels = tuple(candidate.rules[0] for candidate in found)
    judged = chain([best], map(weighed, found[1:] if has_weights else ()))
    settled = next((other for other in judged if other.evidence and other.evidence.rules_out(labels)), None)
    if settled is None and first is None:
        ruled = len({label.partition(WAY)[0] for label in labels}) > 1
        remedy = NAME_ORDER if not ruled else FORCE if has_weights else FORCE_OR_WEIGH
        raise AmbiguousOrderError(_several_fit(found, has_weights), labels, remedy=remedy)
    return settled or best


def interchangeable(parameters: Sequence[Parameter]) -> int:
    """Return how many parameters have the same shape as another one, and so could be swapped unnoticed."""
    counts = Counter(p.shape for p in parameters)
    return sum(n for n in counts.values() if n > 1)


WAY: Final = ", way "
"""Stands before the number of a rule's second and further orders: where rivals are judged, each has its own label."""


def _described(parameter: Parameter | Described) -> Described:
    return parameter if isinstance(parameter, Described) else Described(parameter)


def _survey(
    positional: PositionalState, parameters: Sequence[Described], rule: str | None, partly: bool = False
) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """Return the candidates that fit, equal ones merged, and why each other rule fell away."""
    asked = [r for r in RULES if r.automatic] if rule is None else rules_called(rule)
    fitting: dict[tuple[str, ...], tuple[dict[str, None], tuple[Parameter, ...]]] = {}
    reasons: list[tuple[str, str]] = []
    for row in asked:
        ways = 0
        for full in row.splits(parameters, positional):
            splits = _thinned(positional, full) if partly else full
            if isinstance(splits, str):
                reason: str | None = splits
            else:
                order = tuple(item.parameter for split in splits for item in split.members)
                names = tuple(parameter.name for parameter in order)
                reason = _regrouped(positional, splits) or (None if names in fitting else _unfit(positional, order))
                if reason is None:
                    rules, _ = fitting.setdefault(names, ({}, order))
                    if not any(rule.partition(WAY)[0] == row.name for rule in rules):
                        ways += 1
                        rules[row.name if ways == 1 else f"{row.name}{WAY}{ways}"] = None
            if reason is not None and (row.name, reason) not in reasons:
                reasons.append((row.name, reason))
    return [Candidate(tuple(rules), order) for rules, order in fitting.values()], reasons


def _thinned(positional: PositionalState, splits: Splits) -> Splits | str:
    """Return the splits without what the groups do not hold, told by shapes alone; or why that cannot be.

    Parameters that are frozen, buffers, and tied weights that were saved twice stand among those of a state dict and
    are in no group. What a group holds is in the same order: where the shapes leave one way to choose it, that is it.
    """
    if len(splits) != len(positional.groups):
        return f"makes {len(splits)} groups"
    shapes, start, result = positional.shapes(), 0, []
    for number, (split, size) in enumerate(zip(splits, positional.sizes(), strict=True)):
        wanted = shapes[start : start + size]
        start += size
        ways, chosen = _chosen([item.parameter.shape for item in split.members], wanted)
        if ways != 1:
            many = "no way" if not ways else "more than one way"
            return f"leaves {many} to choose the {size} of group {number} from {len(split.members)} by their shapes"
        result.append(Split([split.members[n] for n in chosen], split.decays))
    return result


def _chosen(shapes: Sequence[tuple[int, ...]], wanted: Sequence[tuple[int, ...] | None]) -> tuple[int, list[int]]:
    """Return how many ways there are to choose the wanted shapes in order (0, 1 or 2 for more), and the first one.

    A shape that is not known (``None``) is that of any. The greedy choice from the left is the first way; it is the
    only one if the greedy choice from the right is the same.
    """
    left = _greedy(shapes, wanted)
    if left is None:
        return 0, []
    right = _greedy(shapes[::-1], wanted[::-1])
    assert right is not None
    return (1 if left == [len(shapes) - 1 - n for n in right[::-1]] else 2), left


def _greedy(shapes: Sequence[tuple[int, ...]], wanted: Sequence[tuple[int, ...] | None]) -> list[int] | None:
    chosen: list[int] = []
    n = 0
    for shape in wanted:
        while n < len(shapes) and shape is not None and shapes[n] != shape:
            n += 1
        if n == len(shapes):
            return None
        chosen.append(n)
        n += 1
    return chosen


def _live(
    positional: PositionalState, parameters: Sequence[Described], live: Sequence[Sequence[str]]
) -> Candidate | None:
    """Return the order of a live optimizer, where it fits; empty groups do not count."""
    known = {item.name: item for item in parameters}
    splits = [Split([known[name] for name in group]) for group in live if group and set(group) <= set(known)]
    order = tuple(item.parameter for split in splits for item in split.members)
    full = replace(positional, groups=tuple(group for group in positional.groups if group.count))
    if not live or _regrouped(full, splits) or _unfit(positional, order):
        return None
    return Candidate((LIVE,), order)


def _adapter_orders(positional: PositionalState, candidate: Candidate) -> Iterator[Candidate]:
    """Yield the candidate, and where it has several adapters, the same with them created in any other order.

    What differs by its adapter alone stands side by side, so the files of adapters do not tell.
    """
    parts = [split_adapter(parameter.name) or (parameter.name, "", "") for parameter in candidate.parameters]
    adapters = list(dict.fromkeys(adapter for _, adapter, _ in parts if adapter))
    yield candidate
    if not 1 < len(adapters) <= 4:
        return
    places: dict[tuple[str, str], list[int]] = {}
    for number, (head, _, tail) in enumerate(parts):
        places.setdefault((head, tail), []).append(number)
    for order in list(permutations(adapters))[1:]:
        moved = list(candidate.parameters)
        for numbers in places.values():
            members = sorted(numbers, key=lambda n: order.index(parts[n][1]) if parts[n][1] else 0)
            for number, member in zip(numbers, members, strict=True):
                moved[number] = candidate.parameters[member]
        if _unfit(positional, moved) is None:
            rules = tuple(f"{rule}, adapters {', '.join(order)}" for rule in candidate.rules)
            yield Candidate(rules, tuple(moved))


def _regrouped(positional: PositionalState, splits: Splits) -> str | None:
    """Why the groups cannot be those of the state, by their sizes and options."""
    sizes = [len(split.members) for split in splits]
    if sizes != positional.sizes():
        return f"makes groups of {sizes}" if len(sizes) <= 8 else f"makes {len(sizes)} groups"
    for number, (split, group) in enumerate(zip(splits, positional.groups, strict=True)):
        decay = dict(group.options).get("weight_decay")
        if not split.decays and split.members and isinstance(decay, (int, float)) and decay != 0:
            return f"gives group {number} no weight decay, but it has {decay}"
    return None


def _unfit(positional: PositionalState, order: Sequence[Parameter]) -> str | None:
    """Return why the parameters cannot have the state in this order, by shapes or by the names that the file states."""
    return _misshaped(positional, order) or _misnamed(positional, order)


def _misnamed(positional: PositionalState, order: Sequence[Parameter]) -> str | None:
    """Return the first contradiction between the order and the names that the file itself states.

    A stated name may lack what leads the parameter's name, or have more of it (a wrapper's attribute), or be the key
    of an adapter file.
    """
    for identity, parameter in zip(positional.ids, order, strict=True):
        if (stated := positional.stated.get(identity)) is None:
            continue
        theirs = plain_name(stated)
        names = [plain_name(name) for name in (parameter.name, *parameter.tied, *parameter.foreign_names.values())]
        if not any(a == theirs or a.endswith(f".{theirs}") or theirs.endswith(f".{a}") for a in names):
            return f"takes id {identity} for '{parameter.name}', but the file itself calls it '{stated}'"
    return None


def _misshaped(positional: PositionalState, order: Sequence[Parameter]) -> str | None:
    """Why the parameters cannot have the state in this order."""
    return next((r for n, p in enumerate(order) if (r := _misshapen(positional, n, p)) is not None), None)


def _misshapen(positional: PositionalState, position: int, parameter: Parameter) -> str | None:
    """Why the parameter cannot have the state at a position, by what the slots' roles promise of their shapes."""
    shape, blocks = parameter.shape, []
    identity = positional.ids[position]
    for path, leaf in walk(positional.entries.get(identity, {})):
        if not isinstance(leaf, Slot):
            continue
        held = leaf.tensor.shape
        expected = {
            Role.PARAM: (shape, held),
            Role.ROW: (_without_ones(shape[:-1]), _without_ones(held)),
            Role.COL: (_without_ones((*shape[:-2], *shape[-1:])), _without_ones(held)),
        }.get(leaf.role, ((), ()))
        if leaf.role is Role.BLOCK:
            blocks.append((leaf.tensor.count, path, leaf.tensor))
        elif expected[0] != expected[1]:
            return _shapes_differ(parameter, identity, path, leaf.tensor)
    if blocks:
        # Codes come one per element, two to a byte (4-bit), or for two moments at once (AdEMAMix); scales are fewer.
        codes, path, tensor = max(blocks, key=lambda block: block[0])
        if codes not in {count := math.prod(shape), -(-count // 2), 2 * count}:
            return _shapes_differ(parameter, identity, path, tensor)
    return None


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


# --- what to say ----------------------------------------------------------------------------------------------------


def _shapes_differ(parameter: Parameter, identity: int | str, path: tuple[object, ...], tensor: Tensor) -> str:
    message = (
        f"'{parameter.name}' has shape {list(parameter.shape)}, but id {identity} has {'.'.join(map(str, path))} of "
        f"shape {list(tensor.shape)}"
    )
    if "lora_" in parameter.name and math.prod(parameter.shape) == 2 * tensor.count:
        message += " (half the rank: the adapter may be one that was converted from PiSSA or OLoRA when it was saved)"
    return message


def _nothing_fits(
    positional: PositionalState, parameters: Sequence[Described], reasons: Sequence[tuple[str, str]]
) -> ConversionError:
    trainable = len(trainable_of(parameters))
    count = f"{len(parameters)}" if trainable == len(parameters) else f"{len(parameters)} ({trainable} trainable)"
    head = (
        f"no order of the {count} parameters fits the {len(positional.ids)} of the optimizer, whose groups hold "
        f"{positional.sizes()}:"
    )
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons:
        by_reason.setdefault(reason, []).append(name)
    lines = [head, *(f"  {', '.join(names)}: {reason}" for reason, names in by_reason.items())]
    remedy = None
    if len(positional.ids) == 1 and not positional.entries:
        remedy = LAYERWISE
    elif len(positional.ids) > len(parameters):
        remedy = NAME_FROZEN
    elif len(positional.ids) < trainable and any(item.classes for item in parameters):
        remedy = NAME_TRAINED
    elif len(reasons) > 1:
        remedy = NAME_ORDER
    return ConversionError("\n".join(lines), remedy=remedy)


LAYERWISE: Final = Remedy("a layer-wise optimizer leaves one dummy parameter here; its moments are in no file")
NAME_FROZEN: Final = Remedy(
    "the optimizer holds more parameters than these; if it was made of all of a model's, frozen ones too, pass {names} "
    "with the folder of the model's config.json",
    {"names": ...},
)
NAME_TRAINED: Final = Remedy(
    "if only a part of the model was trained, say which: {trainable} for each part, or {names} with a file of names in "
    "optimizer order",
    {"trainable": "REGEX", "names": ...},
)
NAME_ORDER: Final = Remedy(
    "pass {names} with a file of names in optimizer order, or the model that was trained", {"names": ...}
)


def _several_fit(found: Sequence[Candidate], weighed: bool) -> str:
    orders = [candidate.names for candidate in found]
    parting = next(n for n, names in enumerate(zip(*orders, strict=True)) if len(set(names)) > 1)
    moved = sum(len(set(names)) > 1 for names in zip(*orders, strict=True))
    told = "the weights do not tell" if weighed else "there are no weights to tell"
    head = (
        f"{len(found)} orders fit, and {told} which it is; they differ for {moved} of {len(orders[0])} parameters, "
        f"from position {parting} on:"
    )
    lines = [head, *(f"  {', '.join(c.rules)}: '{c.names[parting]}'" for c in found)]
    lines.append(
        f"{interchangeable(found[0].parameters)} parameters share their shape with another, so shapes cannot tell "
        "either"
    )
    return "\n".join(lines)


def _contradicted(evidence: Evidence) -> str:
    rivals = [label for label, outcome in evidence.orders.items() if outcome == "preferred"]
    lines = ["the order of the parameters does not fit their weights, which say that these belong together instead:"]
    lines += [f"  {label}" for label in (*rivals, *evidence.against)[:5]]
    if len(rivals) + len(evidence.against) > 5:
        lines.append(f"  and {len(rivals) + len(evidence.against) - 5} more")
    return "\n".join(lines)
