"""What loading a state into a live optimizer would do: complete, printable, and checked before a byte changes.

``plan`` compares classes, names, shapes, dtypes, slots, weights and group options; it reads no tensor of the state and
knows no framework. The live side is a ``LiveOptimizer``, which ``lora_state_format.torch`` makes. A plan with problems
is still a plan: it names all of them, each with its cause where it can be told. ``LoadPlan.check`` raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from lora_state_format.binding import problems
from lora_state_format.binding.bindings import Binding, bind, describe_masters
from lora_state_format.binding.crossing import Crossings, Fit, crossings_of
from lora_state_format.binding.live import LiveOptimizer, Problem
from lora_state_format.binding.loose import loose
from lora_state_format.binding.matching import Matching, Weights, compare, match
from lora_state_format.binding.options import choose
from lora_state_format.binding.policies import Policies
from lora_state_format.binding.problems import count
from lora_state_format.binding.resizing import scaling
from lora_state_format.errors import BindError, Remedy
from lora_state_format.model import notebook
from lora_state_format.model.gc import paused
from lora_state_format.model.states import OptimizerState, Parameter, Value

__all__ = ["LoadPlan", "plan"]

LISTED: Final = 10
"""Names that a report lists of each kind before it only counts."""


@dataclass(frozen=True)
class LoadPlan:
    """What a load would do. ``str`` of it is the report.

    ``bindings`` follow the live optimizer's order. ``options`` has for each live group the values that will be set,
    ``replaced`` the hyperparameters that this changes, ``globals`` for each live optimizer what belongs to none of its
    parameters. ``ignored`` and ``carried`` are saved parameters that the optimizer does not have; carried ones have the
    names that they have from now on. ``weights`` says which live parameters have the bytes of the time of the save.
    """

    state: OptimizerState
    live: LiveOptimizer
    bindings: tuple[Binding, ...]
    options: tuple[Mapping[str, Value], ...]
    replaced: tuple[str, ...] = ()
    globals: tuple[Mapping[str, Value], ...] = ()
    ignored: tuple[Parameter, ...] = ()
    carried: tuple[Parameter, ...] = ()
    weights: Weights = field(default_factory=Weights)
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def restored(self) -> int:
        """How many parameters take their state from the file."""
        return sum(binding.saved is not None for binding in self.bindings)

    def check(self) -> None:
        """Raise ``BindError`` with every problem if there is one."""
        if self.problems:
            raise BindError(str(self), self)

    def _repr_html_(self) -> str:
        return notebook.lines(self)

    def __str__(self) -> str:
        return self._text(Remedy.in_python)

    def on_command_line(self) -> str:
        """Return the report with the arguments of its hints as options of ``lora-state check``."""
        return self._text(Remedy.on_command_line)

    def _text(self, in_words: Callable[[Remedy], str]) -> str:
        if not self.problems:
            kept = [f"{len(ps)} {what}" for ps, what in ((self.carried, "carried"), (self.ignored, "ignored")) if ps]
            fits = f"fits: {self.restored}/{len(self.bindings)} parameters would be restored"
            return "\n".join([", ".join([fits, *kept]), *self.replaced, *self.notes])
        saved = count(len(self.state), "parameter", "parameters")
        lines = [f"optimizer state does not fit: {saved} saved, {len(self.bindings)} in the optimizer"]
        for problem in self.problems:
            lines.append(f"  {problem.title}")
            lines += [f"    {item}" for item in _capped(problem.items)]
        return "\n".join([*lines, *dict.fromkeys(f"hint: {in_words(hint)}" for p in self.problems for hint in p.hints)])


@paused()
def plan(state: OptimizerState, live: LiveOptimizer, policies: Policies | None = None) -> LoadPlan:
    """Return what loading ``state`` into ``live`` would do, under these policies; the strict ones by default.

    Raises ``OptionError`` for policies that do not apply. Everything else that is wrong is in the plan's ``problems``.
    """
    policies = policies or Policies()
    matching = match(state, live, policies.rename)
    weights = compare(state, live, matching)
    crossings = crossings_of(state, live, matching.found)
    bindings = bind(state, live, matching, crossings, policies)
    restored = {binding.saved.name: binding.name for binding in bindings if binding.saved}
    left = [p for p in state.parameters if p.name not in matching.found and p.state]
    groups = choose(state, live, restored, policies.options, crossings)
    outside = loose(state, live, crossings, policies)
    carried = tuple(_under_live_name(p, matching) for p in left) if policies.unexpected == "carry" else ()
    found = [
        *problems.classes(crossings, policies),
        *problems.moved(weights, policies),
        *problems.unexpected(left, live, matching, policies),
        *problems.uncarriable(carried, live),
        *problems.missing(state, live, matching, policies),
        *problems.shapes(state, live, matching, policies),
        *problems.slots(state, live, bindings, groups),
        *problems.dtypes(live, bindings, groups, policies),
        *problems.orders(state, live, bindings),
        *groups.problems,
        *outside.problems,
    ]
    if bindings and not restored and not found and left:
        found.append(Problem("names", "nothing would be restored: no saved parameter is in the optimizer"))
    return LoadPlan(
        state,
        live,
        bindings,
        groups.options,
        groups.replaced,
        outside.values,
        ignored=() if carried else tuple(left),
        carried=carried,
        weights=weights,
        problems=tuple(found),
        notes=(
            *matching.notes,
            *_translations(crossings, policies),
            *_surgery(state, live, bindings),
            *_frozen(live, bindings),
            *describe_masters(live, bindings, {target: state[name] for name, target in matching.found.items()}),
            *groups.notes,
        ),
    )


def _under_live_name(parameter: Parameter, matching: Matching) -> Parameter:
    """Return a parameter as the next save has to call it."""
    return replace(parameter, name=matching.wanted.get(parameter.name) or parameter.name)


# --- what there is to say of it -------------------------------------------------------------------------------------


def _translations(crossings: Crossings, policies: Policies) -> Iterator[str]:
    """Yield what there is to say of the ways into other classes that a load takes."""
    for crossing in crossings.values():
        if policies.mismatch_class == "error" or crossing.fit is Fit.SAME:
            continue
        way = f"from {crossing.saved or 'a class that the file does not state'} into {crossing.live}"
        if crossing.fit is Fit.OTHER:
            yield f"{way}: these parameters start without state, since {'; '.join(crossing.reasons)}"
        else:
            yield "; ".join((f"{way}: what both keep is laid out anew", *problems.said_of(crossing)))


def _surgery(state: OptimizerState, live: LiveOptimizer, bindings: Iterable[Binding]) -> Iterator[str]:
    """Yield what there is to say of resized parameters."""
    resized = [binding for binding in bindings if binding.resize]
    if not resized:
        return
    text = f"the moments of {count(len(resized), 'parameter', 'parameters')} are cut and padded"
    if any(binding.resize and not binding.resize.proven for binding in resized):
        text += ", which is right only if the weights were cut and padded alike"
    scales = {binding.scale for binding in resized}
    adapters = [b for b in resized if (layer := live.parameters[b.name].layer) and layer.scaling is not None]
    if scales != {1.0}:
        text += f"; they are scaled as the gradients are by the new alpha / r, by {', '.join(map(str, sorted(scales)))}"
    elif any(b.saved and scaling(state, b.saved) is None for b in adapters):
        text += "; the file does not say alpha / r, so they are not scaled by its change"
    yield text


def _frozen(live: LiveOptimizer, bindings: Iterable[Binding]) -> Iterator[str]:
    """Yield a note where state goes to parameters that will not be trained."""
    frozen = [b.name for b in bindings if b.saved and b.saved.state and not live.parameters[b.name].requires_grad]
    if frozen:
        yield (
            f"{count(len(frozen), 'restored parameter is', 'restored parameters are')} frozen (requires_grad=False; "
            f"the first is '{frozen[0]}'): training will not change them. PeftModel.from_pretrained freezes an adapter "
            "unless it is called with is_trainable=True"
        )


def _capped(items: Sequence[str]) -> list[str]:
    """Return the items, or so many of them and the number of the others."""
    if len(items) <= LISTED + 1:
        return list(items)
    return [*items[:LISTED], f"... and {len(items) - LISTED} more"]
