"""What loading a state into a live optimizer would do: complete, printable, and checked before a byte changes.

``plan`` compares classes, names, shapes, dtypes, slots, weights and group options; it reads no tensor of the state and
knows no framework. The live side is a ``LiveOptimizer``, which ``lora_state_format.torch`` makes. A plan with problems
is still a plan: it names all of them, each with its cause where it can be told. ``LoadPlan.check`` raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from lora_state_format.binding import problems
from lora_state_format.binding.bindings import Binding, bind
from lora_state_format.binding.crossing import Crossings, Fit, crossings_of
from lora_state_format.binding.live import LiveOptimizer, Problem
from lora_state_format.binding.loose import loose
from lora_state_format.binding.matching import Matching, Weights, compare, match
from lora_state_format.binding.options import choose
from lora_state_format.binding.policies import Policies
from lora_state_format.binding.problems import count
from lora_state_format.binding.resizing import scaling
from lora_state_format.errors import BindError
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

    def __str__(self) -> str:
        if not self.problems:
            kept = [f"{len(ps)} {what}" for ps, what in ((self.carried, "carried"), (self.ignored, "ignored")) if ps]
            fits = f"fits: {self.restored}/{len(self.bindings)} parameters would be restored"
            return "\n".join([", ".join([fits, *kept]), *self.replaced, *self.notes])
        saved = count(len(self.state), "parameter", "parameters")
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
<<<<<<< HEAD
            yield "; ".join((f"{way}: what both keep is laid out anew", *problems.said_of(crossing)))


def _surgery(state: OptimizerState, live: LiveOptimizer, bindings: Iterable[Binding]) -> Iterator[str]:
    """Yield what there is to say of resized parameters."""
=======
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
>>>>>>> house
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


<<<<<<< HEAD
def _frozen(live: LiveOptimizer, bindings: Iterable[Binding]) -> Iterator[str]:
    """Yield a note where state goes to parameters that will not be trained."""
    frozen = [b.name for b in bindings if b.saved and b.saved.state and not live.parameters[b.name].requires_grad]
    if frozen:
        yield (
            f"{count(len(frozen), 'restored parameter is', 'restored parameters are')} frozen (requires_grad=False; the "
            f"first is '{frozen[0]}'): training will not change them. PeftModel.from_pretrained freezes an adapter "
            "unless it is called with is_trainable=True"
        )


=======
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


>>>>>>> house
def _capped(items: Sequence[str]) -> list[str]:
    """Return the items, or so many of them and the number of the others."""
    if len(items) <= LISTED + 1:
        return list(items)
    return [*items[:LISTED], f"... and {len(items) - LISTED} more"]
