"""From one optimizer class into another: what goes over exactly, what is laid out anew, and why something does not."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, NamedTuple, TypeAlias

from lora_state_format.binding.live import LiveOptimizer
from lora_state_format.model.states import OptimizerState, Parameter, Scalar, Value
from lora_state_format.optimizers.classes import CLASSES, UNKNOWN, Decay, Form, Known, known, known_path, same_class
from lora_state_format.optimizers.options import Kind, kind_of
from lora_state_format.optimizers.quantised import BITSANDBYTES, TORCHAO, decoded

__all__ = ["CLASSES_OF", "INNER", "Crossing", "Crossings", "Fit", "crossings_of", "source_of", "translated"]

CLASSES_OF: Final = "classes"
"""Member of ``origin``: for each optimizer its class and the ancestors whose step it has."""

INNER: Final = "inner"
"""Member of ``origin``: by an optimizer's number the classes of the optimizers that it wraps, by attribute."""

_LATER: Final = frozenset({"maximize", "amsgrad", "caution"})
"""Options that classes got in later versions; a file of an older one lacks them."""

_NAMES: Final = {"exp_avg": "state1", "exp_avg_sq": "state2"}
"""torch's names of Adam's moments -> those of bitsandbytes."""


class Fit(Enum):
    """How the state of one class serves another."""

    SAME = "same"
    TRANSLATED = "translated"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Crossing:
    """The way from an optimizer of the file into a live one.

    ``saved`` is the class that wrote the state, ``None`` if the file does not say. ``reasons`` say why the state does
    not serve, and ``kept`` are options that mean something else in the live class, where they stay as they are.
    ``quantise`` means that the live class may keep its moments as codes.
    """

    saved: str | None
    live: str
    fit: Fit
    reasons: tuple[str, ...] = ()
    kept: frozenset[str] = frozenset()
    quantise: bool = False
    decoded: bool = False


Crossings: TypeAlias = "Mapping[tuple[int | None, int], Crossing]"
"""By the numbers of an optimizer of the file and of a live one."""


def crossings_of(state: OptimizerState, live: LiveOptimizer, found: Mapping[str, str]) -> Crossings:
    """Return the ways that some parameter takes; ``found`` maps saved names to live ones."""
    homes = source_of(state)
    travelling: dict[tuple[int | None, int], list[Parameter]] = {}
    for name, target in found.items():
        key = homes[name], live.groups[live.members[target]].optimizer
        travelling.setdefault(key, []).append(state[name])
    return {key: _crossing(state, live, *key, parameters) for key, parameters in travelling.items()}


def source_of(state: OptimizerState) -> dict[str, int | None]:
    """Return for each saved parameter the number of its optimizer; ``None`` for a carried one of several."""
    homes: dict[str, int | None] = {
        p.name: group.optimizer for group, members in zip(state.groups, state.members(), strict=True) for p in members
    }
    only = 0 if len(state.optimizers) == 1 else None
    return {p.name: homes.get(p.name, only) for p in state.parameters}


class _Side(NamedTuple):
    """A class on one side of a crossing: itself and its ancestors, what is known of it, and its groups' options."""

    lineage: tuple[str, ...]
    row: Known
    groups: Sequence[Mapping[str, Value]]

    @property
    def title(self) -> str:
        """Return the bare name of the class."""
        return self.lineage[0].rpartition(".")[2]

    @property
    def decay(self) -> Decay | None:
        """Return what ``weight_decay`` means in these groups."""
        if self.row.decay is not Decay.OPTION:
            return self.row.decay
        decoupled = any(group.get("decoupled_weight_decay") for group in self.groups)
        return Decay.DECOUPLED if decoupled else Decay.COUPLED


def _crossing(
    state: OptimizerState, live: LiveOptimizer, source: int | None, target: int, parameters: Sequence[Parameter]
) -> Crossing:
    """Return what becomes of ``parameters`` on their way from the file's optimizer into the live one.

    ``source`` and ``target`` are their numbers; ``source`` is ``None`` for carried parameters of several optimizers.
    """
    if not live.lineages:
        return Crossing(None, live.title(target), Fit.SAME)
    slots = frozenset(slot for p in parameters for slot in _unnested(p.state or {}))
    groups = [dict(group.options) for group in live.groups if group.optimizer == target]
    here = _Side(live.lineages[target], live.known[target], groups)
    options = [dict(group.options) for group in state.groups if source in (None, group.optimizer)]
    here_path = known_path(here.lineage)
    lineage = _lineage(state, source) or _coded(parameters, here_path) or _inferred(slots, options, here_path)
    if not lineage:
        reasons = tuple(_unstated(slots, options, here))
        return Crossing(None, here.lineage[0], Fit.OTHER if reasons else Fit.SAME, reasons)
    there = _Side(lineage, known(lineage), options)
    reasons = tuple(_inside(state, live, source, target))
    if not reasons and same_class(lineage, here.lineage) and there.decay == here.decay:
        return Crossing(lineage[0], here.lineage[0], Fit.SAME)
    reasons = reasons or tuple(_differences(slots, there, here))
    if reasons:
        return Crossing(lineage[0], here.lineage[0], Fit.OTHER, reasons)
    return _translation(there, here)


def _translation(there: _Side, here: _Side) -> Crossing:
    """Return the way between two classes that keep the same quantities."""
    as_it_is = there.row.form is here.row.form and _bits(there.lineage[0]) == _bits(here.lineage[0])
    return Crossing(
        there.lineage[0],
        here.lineage[0],
        Fit.TRANSLATED,
        kept=frozenset({"weight_decay"}) if there.decay != here.decay else frozenset(),
        quantise=here.row.form is Form.BITSANDBYTES and not as_it_is,
        decoded=there.row.form is not Form.PLAIN and not as_it_is,
    )


def translated(parameter: Parameter, crossing: Crossing, options: Mapping[str, Value]) -> Parameter:
    """Return a saved parameter with its slots as the live class lays them out.

    ``options`` are those of its group in the file: apex counts steps there. What the live class keeps as codes is in
    float32 here.
    """
    if crossing.fit is not Fit.TRANSLATED or not parameter.state:
        return parameter
    slots = dict(decoded(parameter, crossing.saved or "", []) or {}) if crossing.decoded else dict(parameter.state)
    step = options.get("step")
    if "step" not in slots and isinstance(step, int):
        slots["step"] = Scalar("F32", struct.pack("<f", step))
    if crossing.quantise:
        slots = {_NAMES.get(key, key): value for key, value in slots.items()}
    return replace(parameter, state=slots)


def _bits(path: str) -> str:
    """Return what bitsandbytes' class names say about codes; paged ones have those of their namesakes."""
    return "8" if path.endswith("8bit") else "32"


def _unnested(slots: Mapping[str, Value]) -> Iterable[str]:
    """Return the names of slots; bitsandbytes nests some of its own in its state dict."""
    inner = slots.get(BITSANDBYTES)
    return [*(key for key in slots if key != BITSANDBYTES), *(inner if isinstance(inner, Mapping) else ())]


def _lineage(state: OptimizerState, source: int | None) -> tuple[str, ...]:
    """Return the class of an optimizer of the file, and its ancestors if the file states them."""
    paths = {optimizer.class_path for optimizer in state.optimizers}
    shared = paths.pop() if len(paths) == 1 else None
    path = shared if source is None else state.optimizers[source].class_path
    stated = state.origin.get(CLASSES_OF)
    if path is None:
        return ()
    ancestors = stated.get(path) if isinstance(stated, Mapping) else None
    return (path, *map(str, ancestors)) if isinstance(ancestors, (list, tuple)) else (path,)


def _inside(state: OptimizerState, live: LiveOptimizer, source: int | None, target: int) -> Iterable[str]:
    """Say where wrappers wrap other classes than those that wrote the state."""
    stated = state.origin.get(INNER)
    found = stated.get(str(source), {}) if isinstance(stated, Mapping) else {}
    then = {key: str(path) for key, path in found.items()} if isinstance(found, Mapping) else {}
    now = live.inner[target] if live.inner else {}
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            yield f"its {name} is {now.get(name, 'not there')}, and was {then.get(name, 'not there')}"


def _coded(parameters: Sequence[Parameter], live: str | None) -> tuple[str, ...]:
    """Return the class of a file that states none, where its moments are torchao's own tensors, which name theirs."""
    for parameter in parameters:
        for value in (parameter.state or {}).values():
            if isinstance(value, Mapping) and TORCHAO in value:
                bits = str(value[TORCHAO]).rpartition("OptimState")[2]
                return (live if live and live.endswith(bits) else f"torchao.optim.adam.AdamW{bits}",)
    return ()


def _inferred(slots: frozenset[str], options: Sequence[Mapping[str, Value]], live: str | None) -> tuple[str, ...]:
    """Return the class of a file that states none, where options and slots leave only torch's Adam or AdamW."""
    adam, adamw = "torch.optim.adam.Adam", "torch.optim.adamw.AdamW"
    if not options or not {"exp_avg", "exp_avg_sq"} <= slots <= CLASSES[adam].slots:
        return ()
    if not all("amsgrad" in group for group in options):
        return ()
    stated = {bool(group["decoupled_weight_decay"]) for group in options if "decoupled_weight_decay" in group}
    if len(stated) == 1:
        return (adamw if stated.pop() else adam,)
    return (live,) if live in (adam, adamw) else (adamw,)


def _unstated(slots: frozenset[str], saved: Sequence[Mapping[str, Value]], here: _Side) -> Iterable[str]:
    """Say why state of a class that the file does not name cannot be that of the live class."""
    if here.row is not UNKNOWN:
        if strange := list(_strange(slots, here)):
            yield from strange
            yield from _lacking(slots, here.row.needs, here)
        return
    stated = {key for options in saved for key in options}
    own = {key for options in here.groups for key in options if kind_of(key, options) is Kind.MATH}
    if stated and (lacking := sorted(own - stated - _LATER)):
        yield f"{here.title} has the options {', '.join(lacking)}, which the file's groups do not have"


def _lacking(slots: frozenset[str], needed: Iterable[str], here: _Side) -> Iterable[str]:
    if lacking := [slot for slot in needed if slot not in slots]:
        yield f"{here.title} keeps {', '.join(lacking)}, which the file does not have"


def _strange(slots: frozenset[str], here: _Side) -> Iterable[str]:
    if strange := sorted(slots - here.row.slots):
        yield f"{here.title} never reads {', '.join(strange)}"


def _differences(slots: frozenset[str], there: _Side, here: _Side) -> Iterable[str]:
    """Say what keeps the state of one class from serving another; nothing if it can be laid out anew."""
    if there.row.rule is None or there.row.rule != here.row.rule:
        yield from _strange(slots, here) if here.row is not UNKNOWN else ()
        yield from _lacking(slots, here.row.needs or here.row.keeps, here)
        yield f"no translation from {there.title} into {here.title} is known"
        return
    if strange := sorted(slots - there.row.slots):
        yield f"the file has {', '.join(strange)}, which {there.title} does not have elsewhere"
    if here.row.form is Form.BITSANDBYTES and "max_exp_avg_sq" in slots:
        yield f"{here.title} has no amsgrad, and the file has max_exp_avg_sq"
    if here.row.form is Form.TORCHAO:
        yield f"no way to quantise for {here.title} is known"
    if there.row.form is not here.row.form and "unorm_vec" in slots:
        yield f"{here.title} never reads unorm_vec"
    if there.decay is not here.decay:
        coupled, other = (there, here) if there.decay is Decay.COUPLED else (here, there)
        if any(group.get("weight_decay") for group in coupled.groups):
            yield f"weight_decay is L2 in {coupled.title}, whose moments contain it, and decoupled in {other.title}"
