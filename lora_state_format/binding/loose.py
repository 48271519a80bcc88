"""State that belongs to no parameter: which live optimizer gets it, and what cannot be put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from lora_state_format.binding.crossing import Crossings, Fit
from lora_state_format.binding.live import LiveOptimizer, Problem
from lora_state_format.binding.policies import Policies
from lora_state_format.errors import Remedy
from lora_state_format.model.states import OptimizerState, Value

__all__ = ["OUTSIDE", "Loose", "loose"]

OUTSIDE: Final = "outside"
"""Member of ``origin``: what optimizers kept in attributes that no state dict has, and no file either."""

AS_IT_IS: Final = Remedy("{missing} goes on with what the live optimizer has there", {"missing": "fresh"})


@dataclass(frozen=True, slots=True)
class Loose:
    """For each live optimizer what belongs to none of its parameters, as the file has it."""

    values: tuple[Mapping[str, Value], ...]
    problems: tuple[Problem, ...]


def loose(state: OptimizerState, live: LiveOptimizer, crossings: Crossings, policies: Policies) -> Loose:
    """Return what each live optimizer gets: that of the one optimizer of the file whose parameters it has.

    Where the parameters of one went to several, or the other way round, nothing says whose it is; then it is a problem
    unless ``missing="fresh"`` starts without it.
    """
    values: list[Mapping[str, Value]] = [{} for _ in live.optimizers]
    found: list[Problem] = []
    for source, own in _by_optimizer(state).items():
        targets = [t for (s, t), crossing in crossings.items() if s == source and crossing.fit is not Fit.OTHER]
        if len(targets) == 1 and sum(t == targets[0] for _, t in crossings) == 1:
            values[targets[0]] = own
        elif own.get("state") and any(s == source for s, _ in crossings):
            found.append(_homeless(state, source, own["state"]))
    found += _outside(state)
    for number, value in enumerate(values):
        if any(t == number for _, t in crossings):
            found += _lacking(live, number, value)
    return Loose(tuple(values), () if policies.missing == "fresh" else tuple(found))


def _by_optimizer(state: OptimizerState) -> dict[int, Mapping[str, Value]]:
    if len(state.optimizers) == 1:
        return {0: state.globals}
    found = {number: state.globals.get(str(number)) for number in range(len(state.optimizers))}
    return {number: own for number, own in found.items() if isinstance(own, Mapping)}


def _homeless(state: OptimizerState, source: int, own: Value) -> Problem:
    keys = ", ".join(map(str, own)) if isinstance(own, Mapping) else ""
    path = state.optimizers[source].class_path or "a class that the file does not state"
    return Problem(
        "globals",
        f"optimizer {source} of the file, {path}, keeps {keys}, which belongs to no parameter; its parameters are not "
        "those of one live optimizer",
        hints=(
            Remedy("build the optimizers over the parameters that the saved ones had"),
            Remedy("{missing} goes on without it", {"missing": "fresh"}),
        ),
    )


def _outside(state: OptimizerState) -> Iterator[Problem]:
    stated = state.origin.get(OUTSIDE)
    if isinstance(stated, (list, tuple)) and stated:
        yield Problem(
            "outside",
            f"the saved optimizer kept state in attributes, which is not in the file ({len(stated)}):",
            tuple(map(str, stated)),
            (AS_IT_IS,),
        )


def _lacking(live: LiveOptimizer, number: int, value: Mapping[str, Value]) -> Iterator[Problem]:
    lacking = sorted((live.beside[number] if live.beside else frozenset()) - set(value))
    if lacking:
        yield Problem(
            "outside",
            f"{live.title(number)} keeps {', '.join(lacking)} in its state dict, which the file does not have",
            hints=(AS_IT_IS,),
        )
