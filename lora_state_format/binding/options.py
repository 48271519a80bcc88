"""Which value each live group's options get in a load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_state_format.binding.live import LiveOptimizer, Problem
from lora_state_format.errors import OptionError
from lora_state_format.model.states import OptimizerState, Scalar, Value
from lora_state_format.optimizers.options import Kind, kind_of

__all__ = ["Chosen", "choose"]


@dataclass(frozen=True, slots=True)
class Chosen:
    """For each live group the options to set; and what there is to say of them."""

    options: tuple[Mapping[str, Value], ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def choose(state: OptimizerState, live: LiveOptimizer, restored: Mapping[str, str], given: Mapping[str, Any]) -> Chosen:
    """Return what loading sets in each live group.

    ``restored`` maps saved names to names in the live optimizer, ``given`` is the caller's ``options=``. Raises
    ``OptionError`` for an option that no group has.
    """
    saved = [dict(group.options) for group in state.groups]
    for option in given:
        if not any(option in options for options in (*saved, *live.options)):
            raise OptionError(f"options={{{option!r}: ...}}: no group has an option of that name")
    sources = _sources(state, live, restored)
    problems: list[Problem] = []
    result: list[dict[str, Value]] = []
    for number, feeding in enumerate(sources):
        chosen: dict[str, Value] = {}
        for key in _settable(live.options[number], [saved[source] for source in feeding]):
            policy = given.get(key, "saved") if feeding else "current"
            if not isinstance(policy, str) or policy not in ("saved", "current"):
                chosen[key] = policy
            elif policy == "saved":
                values = {source: saved[source][key] for source in feeding if key in saved[source]}
                distinct = _distinct(values.values())
                if len(distinct) > 1:
                    problems.append(_merging(key, number, values))
                elif distinct:
                    chosen[key] = distinct[0]
        result.append(chosen)
    for source, options in enumerate(saved):
        fed = [number for number, feeding in enumerate(sources) if source in feeding]
        for key, value in options.items():
            values = {number: live.options[number][key] for number in fed if key in live.options[number]}
            decided = key in given or kind_of(key, options) not in (Kind.MATH, Kind.SCHEDULE)
            if not decided and len(_distinct(values.values())) > 1:
                problems.append(_splitting(key, source, value, values))
    return Chosen(tuple(result), tuple(problems), (*_zero_rate(live, result, given), *_left_out(live, saved, sources)))


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


def _settable(live: Mapping[str, Value], saved: Sequence[Mapping[str, Value]]) -> Iterator[str]:
    """Yield the options that may be set: those that the group has, and state that only the file has."""
    yield from (key for key in live if kind_of(key) is not Kind.RUNTIME)
    found = {key: None for options in saved for key in options if kind_of(key, options) is Kind.STATE}
    yield from (key for key in found if key not in live)


def _merging(key: str, number: int, values: Mapping[int, Value]) -> Problem:
    stated = ", ".join(f"{_text(value)} in saved group {source}" for source, value in values.items())
    return Problem(
        "option",
        f"live group {number} is fed by saved groups that disagree on {key}: {stated}",
        hints=(f"options={{{key!r}: 'current'}} keeps the live value, options={{{key!r}: ...}} sets another",),
    )


def _splitting(key: str, source: int, saved: Value, values: Mapping[int, Value]) -> Problem:
    """Live groups that differ on purpose must not become alike because one saved group feeds them all."""
    stated = ", ".join(f"{_text(value)} in live group {number}" for number, value in values.items())
    return Problem(
        "option",
        f"saved group {source}, with {key} {_text(saved)}, feeds live groups that disagree on it: {stated}",
        hints=(f"options={{{key!r}: 'current'}} keeps the live values, options={{{key!r}: 'saved'}} makes them alike",),
    )


def _zero_rate(live: LiveOptimizer, chosen: Sequence[Mapping[str, Value]], given: Mapping[str, Any]) -> Iterator[str]:
    zero = [
        str(number)
        for number, options in enumerate(chosen)
        if live.groups[number].parameters and _plain(options.get("lr")) == 0 and _plain(live.options[number]["lr"]) != 0
    ]
    if zero and "lr" not in given:
        yield (
            f"lr is 0.0 in the file, as at the end of a schedule, and so it is now in group {', '.join(zero)}: "
            "options={'lr': 'current'} would keep the live value, options={'lr': 1e-4} set another"
        )


def _left_out(
    live: LiveOptimizer, saved: Sequence[Mapping[str, Value]], sources: Sequence[Sequence[int]]
) -> Iterator[str]:
    """Yield a note on saved options that change what a step computes and that no live group has."""
    strange = {
        key: None
        for number, feeding in enumerate(sources)
        for source in feeding
        for key in saved[source]
        if kind_of(key, saved[source]) is Kind.MATH and key not in live.options[number]
    }
    if strange:
        yield f"the live groups have no option {', '.join(strange)}: what the file says of it was left out"


def _plain(value: Value) -> Any:
    """Tensors' values as numbers, lists and tuples alike: what makes two options the same."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    return value.item() if isinstance(value, Scalar) else value


def _distinct(values: Iterable[Value]) -> list[Value]:
    found: list[Value] = []
    for value in values:
        if not any(_plain(value) == _plain(other) for other in found):
            found.append(value)
    return found


def _text(value: Value) -> str:
    return repr(_plain(value))
