"""What loading a state into a live optimizer would do: complete, printable, and checked before a byte changes.

``plan`` compares names, shapes, dtypes, slots and group options; it reads no tensor and knows no framework. The live
side is a ``LiveOptimizer``, which ``lora_state_format.torch`` makes. A plan with problems is still a plan: it names all
of them, each with its cause where it can be told. ``LoadPlan.check`` raises.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias, TypedDict

from lora_state_format.binding.live import LiveOptimizer, LiveParameter, Problem
from lora_state_format.binding.options import choose
from lora_state_format.errors import BindError, ConversionError, OptionError
from lora_state_format.model.gc import paused
from lora_state_format.model.states import OptimizerState, Parameter, Role, Slot, Value
from lora_state_format.naming.names import Rename, rename, split_adapter, with_adapter, without_wrappers
from lora_state_format.optimizers.options import Kind, kind_of

__all__ = [
    "Binding",
    "LoadPlan",
    "Policies",
    "PolicyArguments",
    "plan",
]

LISTED: Final = 10
"""Names that a report lists of each kind before it only counts."""

RESIZABLE: Final[Mapping[str, tuple[int, bool]]] = {
    **dict.fromkeys(("exp_avg", "momentum_buffer", "grad_avg"), (1, False)),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"), (2, True)),
    "exp_inf": (1, True),
}
"""The slots that ``mismatch="resize"`` resizes: with which power of the gradient they grow, and whether new elements
are the mean of the old ones or zero. Zero second moments beside a step that goes on make first updates five times too
large; a step that starts again cuts the old elements' updates to a third."""

SCALING: Final = "lora_scaling"
"""Member of ``origin``: alpha / r by adapter, and by parameter where it differs from its adapter's."""

FROZEN: Final = "in the model, requires_grad=False"
OUTSIDE: Final = "in the model, but not in the optimizer"


# --- the plan -------------------------------------------------------------------------------------------------------

Missing: TypeAlias = Literal["error", "fresh"]
Unexpected: TypeAlias = Literal["error", "ignore", "carry"]
Mismatch: TypeAlias = Literal["error", "fresh", "resize"]
Dtype: TypeAlias = Literal["saved", "param"]


@dataclass(frozen=True)
class Policies:
    """What to do where state and optimizer differ; every default is the strict one.

    ``missing``: in the optimizer, not in the state. ``unexpected``: in the state, not in the optimizer; ``carry`` keeps
    it for the next save. ``mismatch``: another shape; ``resize`` cuts and pads moments, for weights that were cut and
    padded alike. ``dtype``: of the slots, as saved or as the parameter's. ``options``: for each group option
    ``"saved"``, ``"current"`` or a value. ``rename``: see ``names.rename``.

    Raises ``OptionError`` for a policy that does not exist.
    """

    missing: Missing = "error"
    unexpected: Unexpected = "error"
    mismatch: Mismatch = "error"
    dtype: Dtype = "saved"
    options: Mapping[str, Any] = field(default_factory=dict)
    rename: Rename | None = None

    def __post_init__(self) -> None:
        allowed: dict[str, Any] = {"missing": Missing, "unexpected": Unexpected, "mismatch": Mismatch, "dtype": Dtype}
        for policy, values in allowed.items():
            if getattr(self, policy) not in values.__args__:
                choices = " or ".join(map(repr, values.__args__))
                raise OptionError(f"{policy}={getattr(self, policy)!r}: use {choices}")
        for option in self.options:
            if kind_of(option) is Kind.RUNTIME:
                raise OptionError(
                    f"options={{{option!r}: ...}}: {option} says how the live optimizer runs; set it on the optimizer"
                )


class PolicyArguments(TypedDict, total=False):
    """The members of ``Policies``, for functions that take them as keywords."""

    missing: Missing
    unexpected: Unexpected
    mismatch: Mismatch
    dtype: Dtype
    options: Mapping[str, Any]
    rename: Rename | None


@dataclass(frozen=True, slots=True)
class Binding:
    """What becomes of one parameter of the live optimizer.

    ``saved`` is ``None`` for a parameter that starts afresh. ``dtype`` is what floating slots are cast to, ``None`` for
    as they are. ``resize`` means that slots are of the saved shape and get the live one, and ``scale`` by how much the
    parameter's gradients have become larger since, because alpha / r has.
    """

    name: str
    saved: Parameter | None
    dtype: str | None = None
    resize: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class LoadPlan:
    """What a load would do. ``str`` of it is the report.

    ``bindings`` follow the live optimizer's order. ``options`` has for each live group the values that will be set.
    ``ignored`` and ``carried`` are saved parameters that the optimizer does not have.
    """

    state: OptimizerState
    live: LiveOptimizer
    bindings: tuple[Binding, ...]
    options: tuple[Mapping[str, Value], ...]
    ignored: tuple[Parameter, ...] = ()
    carried: tuple[Parameter, ...] = ()
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

    def __str__(self) -> str:
        if not self.problems:
            kept = [f"{len(ps)} {what}" for ps, what in ((self.carried, "carried"), (self.ignored, "ignored")) if ps]
            fits = f"fits: {self.restored}/{len(self.bindings)} parameters would be restored"
            return "\n".join([", ".join([fits, *kept]), *self.notes])
        saved = _count(len(self.state), "parameter", "parameters")
        lines = [f"optimizer state does not fit: {saved} saved, {len(self.bindings)} in the optimizer"]
        for problem in self.problems:
            lines.append(f"  {problem.title}")
            lines += [f"    {item}" for item in _capped(problem.items)]
        lines += dict.fromkeys(f"hint: {hint}" for problem in self.problems for hint in problem.hints)
        return "\n".join(lines)


@paused()
def plan(state: OptimizerState, live: LiveOptimizer, policies: Policies | None = None) -> LoadPlan:
    """Return what loading ``state`` into ``live`` would do, under these policies; the strict ones by default.

    Raises ``OptionError`` for policies that do not apply. Everything else that is wrong is in the plan's ``problems``.
    """
    policies = policies or Policies()
    matching = _match(state, live, policies.rename)
    bindings = tuple(_bindings(state, live, matching, policies))
    restored = [binding for binding in bindings if binding.saved]
    left = [p for p in state.parameters if p.name not in matching.found and p.state]
    groups = choose(state, live, {b.saved.name: b.name for b in restored if b.saved}, policies.options)
    problems = [
        *_unexpected(left, live, matching, policies),
        *_missing(state, live, matching, policies),
        *_shapes(state, live, matching, policies),
        *_slots(state, live, restored),
        *_dtypes(live, restored, policies),
        *_orders(state, live, restored),
        *groups.problems,
    ]
    if bindings and not restored and not problems and left:
        problems.append(Problem("names", "nothing would be restored: no saved parameter is in the optimizer"))
    carry = policies.unexpected == "carry"
    return LoadPlan(
        state,
        live,
        bindings,
        groups.options,
        ignored=() if carry else tuple(left),
        carried=tuple(left) if carry else (),
        problems=tuple(problems),
        notes=(*matching.notes, *_surgery(state, live, bindings), *groups.notes),
    )


# --- names ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Matching:
    """``found``: saved name -> name in the live optimizer; ``clashes``: saved name -> the one that took its place."""

    found: dict[str, str]
    clashes: dict[str, str]
    notes: tuple[str, ...] = ()


def _match(state: OptimizerState, live: LiveOptimizer, rule: Rename | None) -> _Matching:
    """By the caller's rule; then as they are; then without wrapper segments; then under another adapter's name."""
    saved = list(state)
    wanted = rename(saved, rule) if rule is not None else {name: name for name in saved}
    canonical = {alias: p.name for p in live.parameters.values() for alias in p.tied}
    canonical |= {name: name for name in live.parameters}
    absent = [name for name in saved if wanted[name] not in canonical]
    with contextlib.suppress(ConversionError):  # if two of them became one, they stay as they are, and are reported
        wanted |= dict(zip(absent, without_wrappers(wanted[name] for name in absent)[0], strict=True))
    adapted, notes = _other_adapter(state, live, wanted) if absent else ({}, ())
    wanted |= adapted

    found: dict[str, str] = {}
    clashes: dict[str, str] = {}
    owners: dict[str, str] = {}
    # A parameter's own name goes before names that are only tied to it.
    for name in sorted(saved, key=lambda name: canonical.get(wanted[name]) != wanted[name]):
        names = (wanted[name], *state[name].tied)
        target = next((canonical[alias] for alias in names if alias in canonical), None)
        if target is None or target not in live.members:
            continue
        if owners.setdefault(target, name) == name:
            found[name] = target
        else:
            clashes[name] = owners[target]
    return _Matching(found, clashes, notes)


def _other_adapter(
    state: OptimizerState, live: LiveOptimizer, wanted: Mapping[str, str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the saved names under the live adapter's name, where the one saved adapter can only be the one live one.

    It must be absent from the whole model, and each of its names be there with the same shape.
    """
    saved = {name: parts[1] for name, other in wanted.items() if (parts := split_adapter(other))}
    here = {parts[1] for name in live.members if (parts := split_adapter(name))}
    anywhere = {parts[1] for name in live.parameters if (parts := split_adapter(name))}
    if len(set(saved.values())) != 1 or len(here) != 1 or set(saved.values()) & anywhere:
        return {}, ()
    (new,) = here
    result = {name: with_adapter(wanted[name], new) for name in saved}
    for name, other in result.items():
        if other not in live.members or live.parameters[other].shape != state[name].shape:
            return {}, ()
    old = next(iter(saved.values()))
    return result, (f"the saved adapter '{old}' goes into '{new}', the only one in the optimizer",)


# --- parameters -----------------------------------------------------------------------------------------------------


def _bindings(state: OptimizerState, live: LiveOptimizer, matching: _Matching, policies: Policies) -> Iterator[Binding]:
    sources = {target: state[name] for name, target in matching.found.items()}
    for name in live.members:
        saved, own = sources.get(name), live.parameters[name]
        resize = saved is not None and saved.shape != own.shape
        if resize and policies.mismatch != "resize":
            saved, resize = None, False
        then = _scaling(state, saved) if saved is not None and resize else None
        scale = own.scaling / then if own.scaling and then else 1.0
        yield Binding(name, saved, own.dtype if policies.dtype == "param" else None, resize, scale)


def _scaling(state: OptimizerState, parameter: Parameter) -> float | None:
    """Return alpha / r of a saved parameter, if the file says it."""
    stated = state.origin.get(SCALING)
    if not isinstance(stated, Mapping):
        return None
    value = stated.get(parameter.name, stated.get(parameter.adapter))
    return value if isinstance(value, float) else None


def _missing(state: OptimizerState, live: LiveOptimizer, matching: _Matching, policies: Policies) -> Iterator[Problem]:
    bound = set(matching.found.values())
    missing = [live.parameters[name] for name in live.members if name not in bound]
    if not missing or policies.missing == "fresh":
        return
    tied = {alias: p.name for p in state.parameters for alias in p.tied}
    frozen = sum(not parameter.requires_grad for parameter in missing)
    items = []
    for parameter in missing:
        why = "" if parameter.requires_grad else "  (requires_grad=False)"
        if parameter.name in tied:
            why = f"  (when it was saved, the same tensor as '{tied[parameter.name]}')"
        items.append(_named(parameter) + why)
    hint = "missing='fresh' lets the parameters that are not in the file start without state"
    if frozen == len(missing) < len(live.members):
        hint = (
            f"the optimizer was built over {len(live.members)} parameters and holds {frozen} frozen parameters, which "
            "the saved one did not; build it from [p for p in model.parameters() if p.requires_grad]"
        )
    yield Problem("missing", f"in the optimizer, not in the file ({len(missing)}):", tuple(items), (hint,))


def _unexpected(
    left: Sequence[Parameter], live: LiveOptimizer, matching: _Matching, policies: Policies
) -> Iterator[Problem]:
    if not left or policies.unexpected != "error":
        return
    causes = [_cause(parameter, live, matching) for parameter in left]
    items = tuple(_named(p) + (f"  ({cause})" if cause else "") for p, cause in zip(left, causes, strict=True))
    hints = []
    if frozen := causes.count(FROZEN):
        hints.append(
            f"{_count(frozen, 'saved parameter is', 'saved parameters are')} frozen in this model: call "
            "requires_grad_(True) before the optimizer is built"
        )
    if suggestion := _suggestion(left, live, matching):
        hints.append(f"if these are the same parameters under other names, pass {suggestion}")
    else:
        hints.append("unexpected='carry' keeps their state for the next save, unexpected='ignore' drops it")
    yield Problem("unexpected", f"in the file, not in the optimizer ({len(left)}):", items, tuple(hints))


def _cause(parameter: Parameter, live: LiveOptimizer, matching: _Matching) -> str:
    if parameter.name in matching.clashes:
        return f"'{matching.clashes[parameter.name]}' is the same tensor here"
    for name in (parameter.name, *parameter.tied):
        if name in live.parameters:
            return OUTSIDE if live.parameters[name].requires_grad else FROZEN
    return ""


def _suggestion(left: Sequence[Parameter], live: LiveOptimizer, matching: _Matching) -> str | None:
    """Return the ``rename=`` that puts every saved parameter on a live one of its shape, if none found its own.

    One run of segments is replaced by another: the first parameter's possible partners propose it, all must fit.
    """
    if matching.found:
        return None
    shapes = {name: live.parameters[name].shape for name in live.members}
    for candidate in (name for name, shape in shapes.items() if shape == left[0].shape):
        pattern, replacement = _substitution(left[0].name, candidate)
        partners = set()
        for parameter in left:
            renamed = re.sub(pattern, replacement, parameter.name)
            if shapes.get(renamed) != parameter.shape or renamed in partners:
                break
            partners.add(renamed)
        else:
            return f"rename=[({pattern!r}, {replacement!r})]"
    return None


def _substitution(old: str, new: str) -> tuple[str, str]:
    """Return the ``re.sub`` arguments that make ``new`` of ``old`` by replacing one run of segments."""
    a, b = old.split("."), new.split(".")
    head = _common(a, b)
    tail = _common(a[head:][::-1], b[head:][::-1])
    if head and (len(a) == head + tail or len(b) == head + tail):
        head -= 1  # segments only come or go: the one in front of them says where
    before, after = a[head : len(a) - tail], b[head : len(b) - tail]
    if head == 0:
        return "^" + re.escape("".join(f"{s}." for s in before)), "".join(f"{s}." for s in after)
    return rf"(?<=\.){re.escape('.'.join(before))}(?=\.|$)", ".".join(after)


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return how many leading items are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _shapes(state: OptimizerState, live: LiveOptimizer, matching: _Matching, policies: Policies) -> Iterator[Problem]:
    pairs = [(state[name], live.parameters[target]) for name, target in matching.found.items()]
    pairs = [(saved, own) for saved, own in pairs if saved.shape != own.shape]
    if not pairs or policies.mismatch == "fresh":
        return
    if policies.mismatch == "resize":
        yield from _unresizable(pairs)
        return
    items = tuple(f"{p.name}  {list(p.shape)} in the model, {list(saved.shape)} in the file" for saved, p in pairs)
    hint = (
        "mismatch='resize' cuts and pads the moments, for weights that were cut and padded alike; mismatch='fresh' "
        "lets these parameters start without state"
    )
    if ranks := _rank_change(pairs):
        hint = f"the rank is {ranks[1]} in the model and {ranks[0]} in the file; {hint}"
    yield Problem("shape", f"of another shape ({len(pairs)}):", items, (hint,))


def _rank_change(pairs: Sequence[tuple[Parameter, LiveParameter]]) -> tuple[int, int] | None:
    """Return the saved and the live rank, if one axis of LoRA parameters differs, everywhere by the same sizes."""
    changes: set[tuple[int, int]] = set()
    for saved, own in pairs:
        axes = [(a, b) for a, b in zip(saved.shape, own.shape, strict=False) if a != b]
        if len(axes) != 1 or len(saved.shape) != len(own.shape) or ".lora_" not in own.name:
            return None
        changes.update(axes)
    return changes.pop() if len(changes) == 1 else None


def _surgery(state: OptimizerState, live: LiveOptimizer, bindings: Iterable[Binding]) -> Iterator[str]:
    """Yield the notes on resized parameters."""
    resized = [binding for binding in bindings if binding.resize]
    if not resized:
        return
    text = (
        f"the moments of {_count(len(resized), 'parameter', 'parameters')} are cut and padded, which is right only if "
        "the weights were cut and padded alike"
    )
    scales = {binding.scale for binding in resized}
    adapters = [b for b in resized if live.parameters[b.name].scaling is not None]
    if scales != {1.0}:
        text += f"; they are scaled as the gradients are by the new alpha / r, by {', '.join(map(str, sorted(scales)))}"
    elif any(b.saved and _scaling(state, b.saved) is None for b in adapters):
        text += "; the file does not say alpha / r, so they are not scaled by its change"
    yield text


def _unresizable(pairs: Sequence[tuple[Parameter, LiveParameter]]) -> Iterator[Problem]:
    items = tuple(
        f"{own.name}  {_dotted(path)} {list(slot.tensor.shape)} of role {slot.role.value}"
        for saved, own in pairs
        for path, slot in saved.tensors()
        if len(saved.shape) != len(own.shape) or slot.role is not Role.PARAM or path[-1] not in RESIZABLE
    )
    if items:
        hint = f"resized are slots of role param by these names: {', '.join(sorted(RESIZABLE))}"
        yield Problem("shape", f"slots that cannot be resized ({len(items)}):", items, (hint,))


def _slots(state: OptimizerState, live: LiveOptimizer, restored: Iterable[Binding]) -> Iterator[Problem]:
    """Yield slots without which the live optimizer's step would raise."""
    needs = []
    for group, options in zip(live.groups, live.options, strict=True):
        row = live.known[group.optimizer]
        needs.append((*row.needs, *(slot for slot, option in row.optional if options.get(option))))
    lacking: Counter[tuple[int, str]] = Counter()
    for binding in restored:
        number, held = live.members[binding.name], binding.saved.state if binding.saved else None
        for slot in needs[number] if held else ():
            if held and slot not in held:
                lacking[live.groups[number].optimizer, slot] += 1
    for (optimizer, slot), count in lacking.items():
        writers = ", ".join(o.class_path or "a class that the file does not state" for o in state.optimizers)
        yield Problem(
            "slot",
            f"{live.title(optimizer)} needs the slot '{slot}', which the file does not have for "
            + _count(count, "parameter", "parameters"),
            hints=(f"the file was written from {writers}",),
        )


def _dtypes(live: LiveOptimizer, restored: Iterable[Binding], policies: Policies) -> Iterator[Problem]:
    """Yield slots of another dtype than the parameter's where the optimizer's own step would raise on them."""
    if policies.dtype == "param":
        return
    rows = [live.known[group.optimizer] for group in live.groups]
    fused = [row.fused_same_dtype and bool(o.get("fused")) for row, o in zip(rows, live.options, strict=True)]
    found: Counter[tuple[str, str, str, str]] = Counter()
    for binding in restored:
        group, own = live.members[binding.name], live.parameters[binding.name].dtype
        for name, slot in (binding.saved.state or {}).items() if binding.saved else ():
            if not isinstance(slot, Slot) or slot.tensor.dtype == own:
                continue
            if name in rows[group].same_dtype or (fused[group] and slot.role is Role.PARAM):
                found[name, slot.tensor.dtype, own, live.title(live.groups[group].optimizer)] += 1
    for (name, dtype, own, title), count in found.items():
        yield Problem(
            "dtype",
            f"{name} is {dtype} beside {own} parameters ({count}): the step of {title} raises on that",
            hints=("dtype='param' casts the state to the dtype of its parameter, as torch's load_state_dict does",),
        )


def _orders(state: OptimizerState, live: LiveOptimizer, restored: Sequence[Binding]) -> Iterator[Problem]:
    """Optimizers whose one state belongs to all their parameters in order take it back in that order only."""
    for number, optimizer in enumerate(live.optimizers):
        if not live.known[number].ordered:
            continue
        own = [name for name, group in live.members.items() if live.groups[group].optimizer == number]
        sources = {binding.name: binding.saved.name for binding in restored if binding.saved}
        now = [sources.get(name) for name in own]
        then = [parameter.name for parameter in state.parameters if parameter.name in set(now)]
        if now != then:
            at = _common([str(name) for name in now], then)
            yield Problem(
                "order",
                f"{live.title(number)} keeps one state for all its parameters in their order; the saved order differs "
                f"from position {at} on",
                hints=(f"build {optimizer.class_path} over the parameters in the saved order",),
            )


# --- words ----------------------------------------------------------------------------------------------------------


def _named(parameter: Parameter | LiveParameter) -> str:
    return f"{parameter.name}  {list(parameter.shape)}"


def _count(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _dotted(path: Iterable[Any]) -> str:
    return ".".join(map(str, path))


def _capped(items: Sequence[str]) -> list[str]:
    """Return the items, or so many of them and the number of the others."""
    if len(items) <= LISTED + 1:
        return list(items)
    return [*items[:LISTED], f"... and {len(items) - LISTED} more"]
