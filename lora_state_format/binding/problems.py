"""What keeps a state from being loaded: each kind of problem, with its cause where it can be told and a way out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from lora_state_format.binding.bindings import Binding
from lora_state_format.binding.crossing import Crossing, Crossings, Fit, source_of
from lora_state_format.binding.live import LiveOptimizer, LiveParameter, Problem
from lora_state_format.binding.matching import Matching, Weights, common, suggestion
from lora_state_format.binding.options import Chosen
from lora_state_format.binding.policies import BY_WEIGHTS, Policies
from lora_state_format.binding.resizing import RESIZABLE, differs, resize, unresizable
from lora_state_format.errors import Remedy
from lora_state_format.model.states import OptimizerState, Parameter, Role, Slot, Value
from lora_state_format.naming.names import split_adapter

__all__ = [
    "classes",
    "count",
    "dtypes",
    "missing",
    "moved",
    "orders",
    "said_of",
    "shapes",
    "slots",
    "uncarriable",
    "unexpected",
]

FROZEN: Final = "in the model, requires_grad=False"
OUTSIDE: Final = "in the model, but not in the optimizer"

TWICE: Final = "base_model.model.base_model.model."
"""How names begin in a PeftModel around a PeftModel."""


MISSING_FRESH: Final = Remedy(
    "{missing} lets the parameters that are not in the file start without state", {"missing": "fresh"}
)
FRESH_CLASS: Final = Remedy(
    "{mismatch_class} lets the parameters whose state does not serve start without state", {"mismatch_class": "fresh"}
)
TRANSLATE: Final = Remedy("{mismatch_class} goes on with what both classes keep", {"mismatch_class": "translate"})
STATE_THE_CLASS: Final = Remedy("if it is the same class, convert the file with {optimizer}", {"optimizer": "CLASS"})
RESIZE: Final = Remedy(
    "{mismatch} cuts and pads the moments, for weights that were cut and padded alike", {"mismatch": "resize"}
)
FRESH_SHAPE: Final = Remedy("{mismatch} lets these parameters start without state", {"mismatch": "fresh"})
CARRY_OR_IGNORE: Final = (
    Remedy("{unexpected} keeps their state for the next save", {"unexpected": "carry"}),
    Remedy("{unexpected} drops it", {"unexpected": "ignore"}),
)


# --- classes --------------------------------------------------------------------------------------------------------


def classes(crossings: Crossings, policies: Policies) -> Iterator[Problem]:
    """Yield a problem for each way into another class that the policy does not take."""
    for crossing in crossings.values():
        refused = {"error": crossing.fit is not Fit.SAME, "translate": crossing.fit is Fit.OTHER, "fresh": False}
        if not refused[policies.mismatch_class]:
            continue
        hints = [FRESH_CLASS]
        if crossing.fit is Fit.TRANSLATED:
            hints = [TRANSLATE]
        elif crossing.saved is None:
            hints.append(STATE_THE_CLASS)
        yield Problem(
            "class",
            f"written by {crossing.saved or 'a class that the file does not state'}, and the optimizer is "
            f"{crossing.live}:",
            crossing.reasons or ("both keep the same quantities", *said_of(crossing)),
            tuple(hints),
        )


def said_of(crossing: Crossing) -> tuple[str, ...]:
    """Return what a translation does, besides taking the same tensors."""
    live = crossing.live.rpartition(".")[2]
    said = []
    if crossing.decoded:
        said.append("quantised moments are decoded to float32: what quantising lost stays lost")
    if crossing.quantise:
        said.append(f"moments are quantised as {live} is configured to keep them")
    if crossing.kept:
        said.append(f"{live} keeps its own {', '.join(sorted(crossing.kept))}, which means something else there")
    return tuple(said)


# --- names ----------------------------------------------------------------------------------------------------------


def moved(weights: Weights, policies: Policies) -> Iterator[Problem]:
    """Yield a problem where the bytes of the weights were saved under other names."""
    if not weights.moved:
        return
    items = tuple(f"{new}  was  {old}" for new, old in weights.moved.items())
    hint = (
        Remedy("{rename} names them, and the other parameters of their modules, by these bytes", {"rename": BY_WEIGHTS})
        if policies.rename != BY_WEIGHTS
        else Remedy("the bytes do not name all of them: give the names with {rename}", {"rename": [("OLD", "NEW")]})
    )
    yield Problem("weights", f"the weights say that these are other parameters ({len(items)}):", items, (hint,))


def missing(state: OptimizerState, live: LiveOptimizer, matching: Matching, policies: Policies) -> Iterator[Problem]:
    """Yield a problem for parameters of the optimizer that are not in the file."""
    bound = set(matching.found.values())
    absent = [live.parameters[name] for name in live.members if name not in bound]
    if not absent or policies.missing == "fresh":
        return
    tied = {alias: p.name for p in state.parameters for alias in p.tied}
    items = []
    for parameter in absent:
        why = "" if parameter.requires_grad else "  (requires_grad=False)"
        if parameter.name in tied:
            why = f"  (when it was saved, the same tensor as '{tied[parameter.name]}')"
        items.append(_named(parameter) + why)
    yield Problem(
        "missing",
        f"in the optimizer, not in the file ({len(absent)}):",
        tuple(items),
        (_missing_hint(state, live, absent),),
    )


def _missing_hint(state: OptimizerState, live: LiveOptimizer, absent: Sequence[LiveParameter]) -> Remedy:
    frozen = sum(not parameter.requires_grad for parameter in absent)
    if frozen == len(absent) < len(live.members):
        gone = {parameter.name for parameter in absent}
        idle = sum(not live.parameters[name].requires_grad for name in live.members if name not in gone)
        thaw = (
            f"{idle} of those that the file has are frozen, too: call requires_grad_(True) on them, or pass "
            "is_trainable=True to PeftModel.from_pretrained, and then "
        )
        return Remedy(
            f"the optimizer was built over {len(live.members)} parameters and holds {frozen} frozen parameters, which "
            f"the saved one did not; {thaw if idle else ''}build it from [p for p in model.parameters() if "
            "p.requires_grad]"
        )
    adapters_only = bool(state) and all(split_adapter(name) for name in state)
    if adapters_only and not any(split_adapter(parameter.name) for parameter in absent):
        return Remedy(
            f"the saved run trained an adapter, and {len(absent)} parameters of its base model are trainable here: "
            "call requires_grad_(False) on them and build the optimizer from what is left"
        )
    return MISSING_FRESH


def unexpected(
    left: Sequence[Parameter], live: LiveOptimizer, matching: Matching, policies: Policies
) -> Iterator[Problem]:
    """Yield a problem for parameters of the file that are not in the optimizer."""
    if not left or policies.unexpected != "error":
        return
    causes = [_cause(parameter, live, matching) for parameter in left]
    items = tuple(_named(p) + (f"  ({cause})" if cause else "") for p, cause in zip(left, causes, strict=True))
    title = f"in the file, not in the optimizer ({len(left)}):"
    yield Problem("unexpected", title, items, tuple(_unexpected_hints(left, causes, live, matching)))


def _unexpected_hints(
    left: Sequence[Parameter], causes: Sequence[str], live: LiveOptimizer, matching: Matching
) -> Iterator[Remedy]:
    if frozen := causes.count(FROZEN):
        yield Remedy(
            f"{count(frozen, 'saved parameter is', 'saved parameters are')} frozen in this model: call "
            "requires_grad_(True) before the optimizer is built"
        )
        if any(split_adapter(p.name) for p, cause in zip(left, causes, strict=True) if cause == FROZEN):
            yield Remedy("PeftModel.from_pretrained freezes an adapter unless it is called with is_trainable=True")
    if any(name.startswith(TWICE) for name in live.parameters) and not any(p.name.startswith(TWICE) for p in left):
        yield Remedy(
            "the model is a PeftModel inside a PeftModel, whose inner adapter is frozen and whose outer one is new: "
            "call get_peft_model or PeftModel.from_pretrained once, on the base model"
        )
    elif found := suggestion(left, live, matching):
        yield Remedy("if these are the same parameters under other names, pass {rename}", {"rename": found})
    else:
        yield from CARRY_OR_IGNORE


def _cause(parameter: Parameter, live: LiveOptimizer, matching: Matching) -> str:
    if parameter.name in matching.clashes:
        return f"'{matching.clashes[parameter.name]}' is the same tensor here"
    if matching.wanted.get(parameter.name) is None:
        return "its name is another parameter's now"
    for name in (parameter.name, *parameter.tied):
        if name in live.parameters:
            return OUTSIDE if live.parameters[name].requires_grad else FROZEN
    return ""


def uncarriable(carried: Sequence[Parameter], live: LiveOptimizer) -> Iterator[Problem]:
    """Yield a problem for state that cannot be kept for the next save, since its name is another parameter's there."""
    names = Counter(parameter.name for parameter in carried)
    items = tuple(_named(p) for p in carried if p.name in live.members or names[p.name] > 1)
    if items:
        yield Problem(
            "unexpected",
            f"cannot be carried, since their names are other parameters' now ({len(items)}):",
            items,
            (Remedy("{unexpected} drops them", {"unexpected": "ignore"}),),
        )


# --- shapes, slots and dtypes ---------------------------------------------------------------------------------------


def shapes(state: OptimizerState, live: LiveOptimizer, matching: Matching, policies: Policies) -> Iterator[Problem]:
    """Yield a problem for parameters of another shape, or of other rows, that the policy does not take."""
    pairs = [(state[name], live.parameters[target]) for name, target in matching.found.items()]
    pairs = [(saved, own) for saved, own in pairs if differs(state, saved, own)]
    if not pairs or policies.mismatch == "fresh":
        return
    reasons = {own.name: why for saved, own in pairs if isinstance(why := resize(state, saved, own), str)}
    stuck = {own.name: tuple(unresizable(saved)) for saved, own in pairs}
    if policies.mismatch == "resize":
        yield from _unresizable(reasons, stuck)
        return
    items = tuple(f"{p.name}  {list(p.shape)} in the model, {list(saved.shape)} in the file" for saved, p in pairs)
    if all(saved.shape == own.shape for saved, own in pairs):
        items = tuple(f"{own.name}  its rows are of other tokens than in the file" for _, own in pairs)
    hints = [FRESH_SHAPE] if reasons or any(stuck.values()) else [RESIZE, FRESH_SHAPE]
    title = f"of another shape ({len(pairs)}):"
    if ranks := _rank_change(pairs):
        title = f"of another shape ({len(pairs)}; the rank is {ranks[1]} in the model and {ranks[0]} in the file):"
    yield Problem("shape", title, items, tuple(hints))


def _unresizable(reasons: Mapping[str, str], stuck: Mapping[str, Sequence[str]]) -> Iterator[Problem]:
    if reasons:
        items = tuple(f"{name}  {why}" for name, why in reasons.items())
        yield Problem("shape", f"parameters that cannot be resized ({len(items)}):", items, (FRESH_SHAPE,))
    items = tuple(f"{name}  {slot}" for name, found in stuck.items() for slot in found if name not in reasons)
    if items:
        known = Remedy(f"resized are slots of role param by these names: {', '.join(sorted(RESIZABLE))}")
        yield Problem("shape", f"slots that cannot be resized ({len(items)}):", items, (known,))


def _rank_change(pairs: Sequence[tuple[Parameter, LiveParameter]]) -> tuple[int, int] | None:
    """Return the saved and the live rank, if one axis of LoRA parameters differs, everywhere by the same sizes."""
    changes: set[tuple[int, int]] = set()
    for saved, own in pairs:
        axes = [(a, b) for a, b in zip(saved.shape, own.shape, strict=False) if a != b]
        if len(axes) != 1 or len(saved.shape) != len(own.shape) or ".lora_" not in own.name:
            return None
        changes.update(axes)
    return changes.pop() if len(changes) == 1 else None


def slots(state: OptimizerState, live: LiveOptimizer, bindings: Iterable[Binding], groups: Chosen) -> Iterator[Problem]:
    """Yield slots without which the live optimizer's step would raise, under the options that the load leaves."""
    needs = []
    for group, options in zip(live.groups, _after(live, groups), strict=True):
        row = live.known[group.optimizer]
        needs.append((*row.needs, *(slot for slot, option in row.optional if options.get(option))))
    lacking: Counter[tuple[int, str]] = Counter()
    for binding in bindings:
        number, held = live.members[binding.name], binding.saved.state if binding.saved else None
        for slot in needs[number] if held else ():
            if held and slot not in held and not _nested(held, slot):
                lacking[live.groups[number].optimizer, slot] += 1
    for (optimizer, slot), number in lacking.items():
        writers = ", ".join(o.class_path or "a class that the file does not state" for o in state.optimizers)
        yield Problem(
            "slot",
            f"{live.title(optimizer)} needs the slot '{slot}', which the file does not have for "
            + count(number, "parameter", "parameters"),
            hints=(Remedy("the file was written from " + writers),),
        )


def _nested(held: Mapping[str, Value], slot: str) -> bool:
    """Return whether a slot stands inside another mapping: bitsandbytes nests some in its state dict."""
    return any(isinstance(inner, Mapping) and slot in inner for inner in held.values())


def _after(live: LiveOptimizer, groups: Chosen) -> list[dict[str, Value]]:
    """Return the options that each live group will have."""
    return [{**before, **chosen} for before, chosen in zip(live.options, groups.options, strict=True)]


def dtypes(live: LiveOptimizer, bindings: Iterable[Binding], groups: Chosen, policies: Policies) -> Iterator[Problem]:
    """Yield slots of another dtype than the parameter's where the optimizer's own step would raise on them."""
    if policies.dtype == "param":
        return
    rows = [live.known[group.optimizer] for group in live.groups]
    after = _after(live, groups)
    fused = [row.fused_same_dtype and bool(o.get("fused")) for row, o in zip(rows, after, strict=True)]
    found: Counter[tuple[str, str, str, str]] = Counter()
    for binding in bindings:
        group, own = live.members[binding.name], live.parameters[binding.name].dtype
        for name, slot in (binding.saved.state or {}).items() if binding.saved else ():
            if not isinstance(slot, Slot) or slot.tensor.dtype == own:
                continue
            if name in rows[group].same_dtype or (fused[group] and slot.role is Role.PARAM):
                found[name, slot.tensor.dtype, own, live.title(live.groups[group].optimizer)] += 1
    for (name, dtype, own, title), number in found.items():
        yield Problem(
            "dtype",
            f"{name} is {dtype} beside {own} parameters ({number}): the step of {title} raises on that",
            hints=(
                Remedy(
                    "{dtype} casts the state to the dtype of its parameter, as torch's load_state_dict does",
                    {"dtype": "param"},
                ),
            ),
        )


def orders(state: OptimizerState, live: LiveOptimizer, bindings: Sequence[Binding]) -> Iterator[Problem]:
    """Yield a problem for optimizers whose one state belongs to the run of all their parameters, if that is another."""
    sources = {binding.name: binding.saved.name for binding in bindings if binding.saved}
    origins = source_of(state)
    for number, optimizer in enumerate(live.optimizers):
        if not live.known[number].ordered:
            continue
        own = [name for name, group in live.members.items() if live.groups[group].optimizer == number]
        now = [sources.get(name) for name in own]
        homes = {origins[name] for name in now if name is not None}
        then = [name for name, home in origins.items() if home in homes]
        if homes and now != then:
            at = common([str(name) for name in now], then)
            yield Problem(
                "order",
                f"{live.title(number)} keeps one state for all its parameters in their order; the saved order differs "
                f"from position {at} on",
                hints=(Remedy(f"build {optimizer.class_path} over the parameters in the saved order"),),
            )


# --- words ----------------------------------------------------------------------------------------------------------


def _named(parameter: Parameter | LiveParameter) -> str:
    return f"{parameter.name}  {list(parameter.shape)}"


def count(number: int, one: str, many: str) -> str:
    """Return a number and the word for so many."""
    return f"{number} {one if number == 1 else many}"
