"""What is odd about a state: about its steps and groups, and about its numbers where they were measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lora_state_format.model.states import OptimizerState, PositionalState, Scalar, Value
from lora_state_format.operations.entries import Entry, entries

if TYPE_CHECKING:
    from lora_state_format.operations.statistics import Statistics

__all__ = ["SQUARES", "Finding", "findings", "number_of"]

SQUARES: Final = frozenset(
    {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "nu", "v", "exp_avg_sq_row", "exp_avg_sq_col"}
)
"""Slots that hold means of squares, which are never negative."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something odd: what kind, in words, and the parameters that show it."""

    kind: str
    text: str
    parameters: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = ", ".join(self.parameters[:3])
        more = f" and {len(self.parameters) - 3:,} more" if len(self.parameters) > 3 else ""
        return f"{self.text}: {shown}{more}" if shown else self.text


def number_of(value: Value) -> float | None:
    """Return a value as a float, if it is a number."""
    try:
        number = value.item() if isinstance(value, Scalar) else value
    except TypeError:
        return None
    return float(number) if isinstance(number, (int, float)) else None


def findings(state: OptimizerState | PositionalState, statistics: Statistics | None = None) -> tuple[Finding, ...]:
    """Return what is odd about a state: with ``statistics``, about its numbers too."""
    found = list(entries(state))
    return (*_of_steps(state, found), *_of_groups(state), *(_of_numbers(found, statistics) if statistics else ()))


def _of_steps(state: OptimizerState | PositionalState, found: list[Entry]) -> Iterator[Finding]:
    idle = tuple(entry.label for entry in found if entry.state is None)
    if idle and len(idle) < len(found):
        yield Finding("never stepped", f"{len(idle):,} of {len(found):,} parameters never took a step", idle)
    steps = Counter(number for e in found if (number := number_of((e.state or {}).get("step"))) is not None)
    if len(steps) > 1:
        usual = steps.most_common(1)[0][0]
        others = tuple(e.label for e in found if number_of((e.state or {}).get("step")) not in (usual, None))
        yield Finding("steps differ", f"most parameters are at step {usual:g}, {len(others):,} are not", others)


def _of_groups(state: OptimizerState | PositionalState) -> Iterator[Finding]:
    still = [
        str(n) for n, group in enumerate(state.groups) if group.count and number_of(dict(group.options).get("lr")) == 0
    ]
    if still:
        yield Finding(
            "lr 0", f"lr is 0 in group {', '.join(still)}: a step moves no weight until a scheduler or you set lr"
        )


def _of_numbers(found: list[Entry], statistics: Statistics) -> Iterator[Finding]:
    rows = list(zip(found, statistics.slots, statistics.updates, strict=True))

    def named(kind: str, text: str, which: Iterable[tuple[Entry, str]]) -> Iterator[Finding]:
        shown = tuple(f"{entry.label} {slot}".rstrip() for entry, slot in which)
        if shown:
            yield Finding(kind, text.format(f"{len(shown):,}"), shown)

    yield from named(
        "not finite",
        "{} tensors hold NaN or infinity; no optimizer step recovers from that",
        ((e, slot) for e, slots, _ in rows for slot, m in slots.items() if m.broken),
    )
    yield from named(
        "negative squares",
        "{} second moments hold negative numbers, which no mean of squares is",
        ((e, slot) for e, slots, _ in rows for slot, m in slots.items() if slot in SQUARES and m.negative),
    )
    yield from named(
        "cold",
        "{} parameters count steps, but their moments are all zero: no gradient reached them, or they start cold",
        (
            (e, "")
            for e, slots, _ in rows
            if slots and e.state and all(m.zeros == m.elements > 0 for m in slots.values())
        ),
    )
    yield from named(
        "beyond Adam",
        "{} parameters have first moments larger than Adam allows next to their second moments, steps and betas: "
        "another rule wrote them, or they are of different runs, or were changed",
        ((e, "") for e, _, update in rows if update and update.beyond),
    )
