"""Which value each live group's options get in a load."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from lora_state_format.binding.crossing import Crossing, Fit
from lora_state_format.binding.live import LiveOptimizer, Problem
from lora_state_format.errors import OptionError, Remedy
from lora_state_format.model.states import OptimizerState, Scalar, Slot, Value
from lora_state_format.optimizers.options import Kind, comparable, kind_of

__all__ = ["Chosen", "choose"]

_HYPERPARAMETERS: Final = (Kind.MATH, Kind.SCHEDULE)
_POLICIES: Final = ("saved", "current")

Options: TypeAlias = "Mapping[str, Value]"


@dataclass(frozen=True, slots=True)
class Chosen:
    """For each live group the options to set; which hyperparameters that replaces; what else there is to say."""

    options: tuple[Options, ...]
    replaced: tuple[str, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def choose(
    state: OptimizerState,
    live: LiveOptimizer,
    restored: Mapping[str, str],
    given: Mapping[str, Any],
    crossings: Mapping[tuple[int | None, int], Crossing],
) -> Chosen:
    """Return what loading sets in each live group.

    Args:
        state: What is loaded.
        live: What it is loaded into.
        restored: Saved names, and the live name that each takes its state to.
        given: The caller's ``options=``.
        crossings: By the numbers of an optimizer of the file and a live one, the way from one into the other.

    Raises:
        OptionError: No group has an option of that name, or it never has such a value.
    """
    saved = [dict(group.options) for group in state.groups]
    _check_given(given, [*saved, *live.options])
    sources = _sources(state, live, restored)
    chosen: list[dict[str, Value]] = []
    problems: list[Problem] = []
    for number, feeding in enumerate(sources):
        ways = [crossings.get((state.groups[source].optimizer, live.groups[number].optimizer)) for source in feeding]
        options, merging = _for_group(number, feeding, saved, live.options[number], given, ways)
        chosen.append(options)
        problems += merging
    problems += _splits(saved, live, sources, given)
    return Chosen(
        tuple(chosen),
        tuple(_replaced(live, chosen, given)),
        tuple(problems),
        (*_zero_rate(live, chosen, given), *_left_out(live, saved, sources, given), *_driven(live, given)),
    )


# --- the caller's values --------------------------------------------------------------------------------------------


def _check_given(given: Mapping[str, Any], groups: Sequence[Options]) -> None:
    for option, value in given.items():
        examples = [options[option] for options in groups if option in options]
        if not examples:
            raise OptionError(f"options={{{option!r}: ...}}: no group has an option of that name")
        if value in _POLICIES if isinstance(value, str) else any(_alike(value, example) for example in examples):
            continue
        if isinstance(value, str) and any(isinstance(example, str) for example in examples):
            continue
        expected = " or ".join(dict.fromkeys(map(_kind, examples)))
        raise OptionError(f"options={{{option!r}: {value!r}}}: expected {expected}, 'saved' or 'current'")


def _alike(value: Any, example: Value) -> bool:
    """Return whether an option that had one value can have the other."""
    if value is None or isinstance(value, bool):
        return type(value) is type(example)
    if isinstance(example, (list, tuple)):
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(example)
            and all(_alike(a, b) for a, b in zip(value, example, strict=True))
        )
    plain = value.item() if getattr(value, "shape", None) == () else value
    number = isinstance(plain, (int, float)) and not isinstance(plain, bool) and math.isfinite(plain)
    one = isinstance(example, Slot) and example.tensor.count == 1
    return number and (one or (isinstance(example, (int, float, Scalar)) and not isinstance(example, bool)))


def _kind(example: Value) -> str:
    if example is None:
        return "None"
    if isinstance(example, bool):
        return "True or False"
    if isinstance(example, (list, tuple)):
        return f"{len(example)} values"
    return "a text" if isinstance(example, str) else "a finite number"


def _policy(key: str, given: Mapping[str, Any]) -> Any:
    """Return the caller's word on an option: what schedulers keep of ``lr`` follows it to the live values."""
    if key not in given and kind_of(key) is Kind.SCHEDULE and _is_current(given.get("lr")):
        return "current"
    return given.get(key, "saved")


def _is_current(value: Any) -> bool:
    return isinstance(value, str) and value == "current"


# --- groups ---------------------------------------------------------------------------------------------------------


def _sources(state: OptimizerState, live: LiveOptimizer, restored: Mapping[str, str]) -> list[list[int]]:
    """Return for each live group the saved groups that it takes its options from: by name, else by its members.

    Where both sides have the same groups with the same members, the empty ones correspond too. A group that is fed by
    none stays as it is.
    """
    names = Counter(group.name for group in state.groups)
    by_name = {group.name: n for n, group in enumerate(state.groups) if group.name and names[group.name] == 1}
    members = state.members()
    home = {p.name: number for number, parameters in enumerate(members) for p in parameters}
    feeding: list[set[int]] = [set() for _ in live.groups]
    for name, target in restored.items():
        if name in home:
            feeding[live.members[target]].add(home[name])
    same = len(members) == len(live.groups) and all(
        {restored.get(p.name) for p in parameters} == set(group.parameters)
        for parameters, group in zip(members, live.groups, strict=True)
    )
    result = []
    for number, group in enumerate(live.groups):
        if feeding[number] and group.name in by_name:
            result.append([by_name[group.name]])
        else:
            result.append([number] if same else sorted(feeding[number]))
    return result


def _for_group(
    number: int,
    feeding: Sequence[int],
    saved: Sequence[Options],
    live: Options,
    given: Mapping[str, Any],
    ways: Sequence[Crossing | None],
) -> tuple[dict[str, Value], list[Problem]]:
    """Return the options to set in a live group, and where the groups that feed it disagree."""
    chosen: dict[str, Value] = {}
    problems = []
    for key in _settable(live, [saved[source] for source in feeding], ways):
        policy = _policy(key, given)
        if not isinstance(policy, str) or policy not in _POLICIES:
            chosen[key] = policy
        elif policy == "saved" and feeding:
            values = {source: saved[source][key] for source in feeding if key in saved[source]}
            distinct = _distinct(values.values())
            if len(distinct) > 1:
                problems.append(_merging(key, number, values))
            elif distinct:
                chosen[key] = distinct[0]
    return chosen, problems


def _settable(live: Options, saved: Sequence[Options], ways: Sequence[Crossing | None]) -> Iterator[str]:
    """Yield the options that may be set: those that the group has, and state that only the file has.

    Into another class goes no state of the old one, and no option that means something else there.
    """
    crossed = [way for way in ways if way is not None and way.fit is not Fit.SAME]
    kept = {key for way in crossed for key in way.kept}
    for key in live:
        kind = kind_of(key, live)
        if key not in kept and (kind in _HYPERPARAMETERS or (kind is Kind.STATE and not crossed)):
            yield key
    found = {key: None for options in saved for key in options if kind_of(key, options) is Kind.STATE}
    yield from (key for key in found if key not in live and not crossed)


def _splits(
    saved: Sequence[Options], live: LiveOptimizer, sources: Sequence[Sequence[int]], given: Mapping[str, Any]
) -> Iterator[Problem]:
    """Yield a problem where live groups that differ on purpose would become alike, since one saved group feeds them."""
    fed_by: dict[int, list[int]] = {}
    for number, feeding in enumerate(sources):
        for source in feeding:
            fed_by.setdefault(source, []).append(number)
    for source, fed in sorted(fed_by.items()):
        options = saved[source]
        for key, value in options.items():
            values = {number: live.options[number][key] for number in fed if key in live.options[number]}
            decided = key in given or _is_current(_policy(key, given)) or kind_of(key, options) not in _HYPERPARAMETERS
            if not decided and len(_distinct(values.values())) > 1:
                yield _splitting(key, source, value, values)


def _merging(key: str, number: int, values: Mapping[int, Value]) -> Problem:
    stated = ", ".join(f"{_text(value)} in saved group {source}" for source, value in values.items())
    return Problem(
        "option",
        f"live group {number} is fed by saved groups that disagree on {key}: {stated}",
        hints=(
            Remedy(f"options={{{key!r}: 'current'}} keeps the live value"),
            Remedy(f"options={{{key!r}: ...}} sets another"),
        ),
    )


def _splitting(key: str, source: int, saved: Value, values: Mapping[int, Value]) -> Problem:
    stated = ", ".join(f"{_text(value)} in live group {number}" for number, value in values.items())
    return Problem(
        "option",
        f"saved group {source}, with {key} {_text(saved)}, feeds live groups that disagree on it: {stated}",
        hints=(
            Remedy(f"options={{{key!r}: 'current'}} keeps the live values"),
            Remedy(f"options={{{key!r}: 'saved'}} makes them alike"),
        ),
    )


# --- what there is to say -------------------------------------------------------------------------------------------


def _replaced(live: LiveOptimizer, chosen: Sequence[Options], given: Mapping[str, Any]) -> Iterator[str]:
    """Yield for each hyperparameter that gets another value what it was and is: ``lr 0.3 -> 0.01 from the file``."""
    changes: dict[str, dict[str, list[int]]] = {}
    filled = [number for number, group in enumerate(live.groups) if group.parameters]
    for number in filled:
        for key, value in chosen[number].items():
            before = live.options[number].get(key)
            if kind_of(key, live.options[number]) in _HYPERPARAMETERS and comparable(before) != comparable(value):
                change = f"{_text(before)} -> {_text(value)}"
                changes.setdefault(key, {}).setdefault(change, []).append(number)
    for key, found in changes.items():
        source = "from the file" if isinstance(_policy(key, given), str) else "as options= says"
        everywhere = sorted(n for numbers in found.values() for n in numbers) == filled and len(found) == 1
        stated = [
            change if everywhere else f"{change} in group {', '.join(map(str, numbers))}"
            for change, numbers in found.items()
        ]
        yield f"{key} {'; '.join(stated)} {source}"


def _zero_rate(live: LiveOptimizer, chosen: Sequence[Options], given: Mapping[str, Any]) -> Iterator[str]:
    zero = [
        str(number)
        for number, options in enumerate(chosen)
        if live.groups[number].parameters
        and comparable(options.get("lr")) == 0
        and comparable(live.options[number].get("lr")) != 0
    ]
    if zero and "lr" not in given:
        yield (
            f"lr is 0.0 in the file, as at the end of a schedule, and so it is now in group {', '.join(zero)}: "
            "options={'lr': 'current'} would keep the live value, options={'lr': 1e-4} set another"
        )


def _driven(live: LiveOptimizer, given: Mapping[str, Any]) -> Iterator[str]:
    """Yield a note where the caller sets a rate that a scheduler is going to replace."""
    value = given.get("lr", "saved")
    driven = [str(n) for n, options in enumerate(live.options) if "initial_lr" in options]
    if driven and not (isinstance(value, str) and value in _POLICIES) and "initial_lr" not in given:
        yield (
            f"a scheduler drives lr in group {', '.join(driven)}, and replaces the {_text(value)} of options= at its "
            "next step: build optimizer and scheduler with the new rate and pass options={'lr': 'current'} to go on so"
        )


def _left_out(
    live: LiveOptimizer, saved: Sequence[Options], sources: Sequence[Sequence[int]], given: Mapping[str, Any]
) -> Iterator[str]:
    """Yield options that change what a step computes, and that the live groups know nothing of.

    A newer torch wrote them, or another class.
    """
    strange = {
        key: None
        for number, feeding in enumerate(sources)
        for source in feeding
        for key in saved[source]
        if kind_of(key, saved[source]) is Kind.MATH and key not in live.options[number]
        if saved[source][key] not in (None, False)  # what is off says nothing
        if not _is_current(given.get(key))
    }
    if strange:
        yield f"the live groups have no option {', '.join(strange)}: what the file says of it was left out"


def _distinct(values: Iterable[Value]) -> list[Value]:
    found: list[Value] = []
    for value in values:
        if not any(comparable(value) == comparable(other) for other in found):
            found.append(value)
    return found


def _text(value: Value) -> str:
    plain = comparable(value)
    return f"a tensor of shape {list(plain.tensor.shape)}" if isinstance(plain, Slot) else repr(plain)
