"""Carry out a plan: read the state into new tensors, check every byte, and only then swap it into the optimizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import torch

from lora_state_format.binding.bindings import Binding
from lora_state_format.binding.plan import LoadPlan
from lora_state_format.binding.resizing import RESIZABLE, Resize
from lora_state_format.errors import BindError
from lora_state_format.io.ledger import Ledger
from lora_state_format.model import notebook
from lora_state_format.model.sources import readable_together
from lora_state_format.model.states import Parameter, Role, Scalar, Slot, Value, mapped
from lora_state_format.optimizers.classes import Known, known
from lora_state_format.optimizers.roles import MASTER
from lora_state_format.torch import carried as carrying
from lora_state_format.torch.capture import Models, Optimizers, lineage_of, stepper
from lora_state_format.torch.codes import Coded, coded
from lora_state_format.torch.fsdp1 import Part, run_of
from lora_state_format.torch.live import Live, describe
from lora_state_format.torch.nested import inner
from lora_state_format.torch.objects import flat, packed
from lora_state_format.torch.swap import Change, group_changes, plain, swap
from lora_state_format.torch.tensors import (
    dtype_of,
    empty,
    from_torch,
    is_sharded,
    read_into,
    scalar_to_torch,
    to_torch,
)
from lora_state_format.torch.zero import check_master

__all__ = ["LoadReport", "apply", "carry_out"]

logger = logging.getLogger("lora_state_format")

ON_THE_HOST: Final = frozenset({"step", "mu_product"})
"""0-d slots that torch keeps in CPU memory unless a group is ``capturable`` or ``fused``."""


@dataclass(frozen=True)
class LoadReport:
    """What a load did. ``str`` of it is one line, and one more for each note.

    ``restored`` of ``total`` parameters took their state from the file, ``fresh`` names the others; ``slots`` counts
    the tensors of a parameter, least and most; ``steps`` are the first and last step that was found, if any.
    ``weights`` counts the parameters whose own bytes are those of the time of the save, or are not; the rest had no
    digest, or one of another dtype. ``replaced`` says which hyperparameters have another value now.
    """

    restored: int
    total: int
    fresh: tuple[str, ...]
    slots: tuple[int, int]
    steps: tuple[int, int] | None
    matching: int
    differing: tuple[str, ...]
    ignored: tuple[str, ...]
    carried: tuple[str, ...]
    options: tuple[Mapping[str, Value], ...]
    replaced: tuple[str, ...]
    notes: tuple[str, ...]

    def _repr_html_(self) -> str:
        return notebook.lines(self)

    def __str__(self) -> str:
        return "\n".join([self.line(), *self.replaced, *self.notes])

    def line(self) -> str:
        """Return the report without what was replaced, and without its notes."""
        text = f"restored {self.restored}/{self.total} parameters, {_span(self.slots)} slots each"
        if self.steps:
            text += f", step {_span(self.steps)}"
        for names, what in ((self.fresh, "fresh"), (self.carried, "carried"), (self.ignored, "ignored")):
            text += f", {len(names)} {what}" if names else ""
        compared = self.matching + len(self.differing)
        return text + (f"; weights match {self.matching}/{compared}" if compared else "")


def _span(bounds: tuple[int, int]) -> str:
    return str(bounds[0]) if bounds[0] == bounds[1] else f"{bounds[0]} to {bounds[1]}"


# --- carrying it out ------------------------------------------------------------------------------------------------


def apply(loading: LoadPlan, optimizer: Optimizers, model: Models) -> LoadReport:
    """Carry out a plan that was made for this optimizer and model.

    Everything is read and verified first; then it is put in place. Raises ``BindError`` for a plan with problems,
    ``DigestError`` or ``FileError`` for damaged bytes; the optimizer is then as it was.
    """
    return carry_out(loading, describe(optimizer, model))


def carry_out(loading: LoadPlan, live: Live, agree: Callable[[], None] = lambda: None) -> LoadReport:
    """Carry out a plan that was made for this live side, as ``apply`` does.

    ``agree`` is called when everything is read and verified, and nothing changed yet; what it raises stops the load.
    """
    loading.check()
    ledger = Ledger()
    staged = _staged(loading, live, ledger)
    carried = tuple(map(_in_memory, loading.carried))
    changes = _changes(loading, live, [entry.slots for entry in staged])
    options = group_changes(live.optimizers, loading.options)
    ledger.check()
    loading.state.check_unchanged()
    report = _report(loading, [entry.coded for entry in staged if entry.coded])
    tensors, members = live.named.tensors.values(), tuple(loading.live.members)
    before = carrying.entries(tensors)
    agree()
    swap(
        changes,
        options,
        lambda: carrying.replace(tensors, members, carried),
        lambda: carrying.restore(tensors, before),
    )
    return _said(report)


class _Staged(NamedTuple):
    """A parameter's new slots, ``None`` for none, and what was quantised for them."""

    slots: dict[str, Any] | None
    coded: Coded | None = None


def _changes(loading: LoadPlan, live: Live, staged: list[dict[str, Any] | None]) -> list[Change]:
    """Return the whole new state of every optimizer, and of those inside it."""
    bound = {id(live.named.tensors[b.name]): slots for b, slots in zip(loading.bindings, staged, strict=True)}
    changes = []
    for optimizer, own in zip(live.optimizers, loading.globals, strict=True):
        entries = {
            parameter: bound[id(parameter)]
            for group in optimizer.param_groups
            for parameter in group["params"]
            if bound[id(parameter)] is not None
        }
        changes += _nested(optimizer, entries, own, bound)
    return changes


def _nested(
    optimizer: torch.optim.Optimizer,
    entries: Mapping[torch.Tensor, Any],
    own: Mapping[str, Value],
    bound: Mapping[int, Any],
) -> list[Change]:
    """Return the change of an optimizer, and of those inside it, whose slots stand under the attribute."""
    held = inner(optimizer)
    before: Mapping[Any, Any] = optimizer.state
    state = {
        key: value
        for key, value in before.items()
        if isinstance(key, torch.Tensor) and (bound.get(id(key)) is None if _untouched(value) else id(key) not in bound)
    }
    state |= {p: slots for p, entry in entries.items() if (slots := {k: v for k, v in entry.items() if k not in held})}
    state |= {p: {} for p, entry in entries.items() if not entry}
    loose = own.get("state", {})
    assert isinstance(loose, Mapping)
    state |= {key: plain(value) for key, value in loose.items()}
    beside = {key: plain(value) for key, value in own.items() if key != "state" and key not in held}
    changes = [Change(optimizer, state, beside)]
    for name, value in held.items():
        within = {p: entry[name] for p, entry in entries.items() if name in entry}
        nested = own.get(name, {})
        assert isinstance(nested, Mapping)
        changes += _nested(value, within, nested, bound)
    return changes


def _untouched(slots: Mapping[str, Any]) -> bool:
    """Return whether slots are those that a constructor made: Adagrad's step cannot do without them."""
    return "step" in slots and not slots["step"]


def _staged(loading: LoadPlan, live: Live, ledger: Ledger) -> list[_Staged]:
    """Return the new slots of each binding.

    Half of the time goes into the pages of new memory, so two threads read: open files can be read by both. Ranks that
    have parts of tensors talk to each other, in order.
    """

    def stage(binding: Binding) -> _Staged:
        return _stage(binding, live, ledger)

    named = live.named
    if not readable_together(loading.state.resources) or named.parts or any(map(is_sharded, named.tensors.values())):
        return [*map(stage, loading.bindings)]
    with ThreadPoolExecutor(2) as readers:
        return [*readers.map(stage, loading.bindings)]


def _stage(binding: Binding, live: Live, ledger: Ledger) -> _Staged:
    """Return a parameter's new slots, read and checked."""
    part = live.named.parts.get(binding.name)
    if binding.saved is None or binding.saved.state is None or (part and not part.count):
        return _Staged(None)
    group = live.side.members[binding.name]
    optimizer = live.optimizers[live.side.groups[group].optimizer]
    options = live.side.options[group]
    place = _Place(
        binding,
        live.named.tensors[binding.name],
        part,
        bool(options.get("capturable") or options.get("fused")),
        ledger,
    )
    slots = _built(binding.saved.state, optimizer, place, ())
    if part and live.side.parameters[binding.name].narrow and MASTER in slots:
        check_master(binding.name, place.parameter, part, slots[MASTER])
    if not binding.quantise:
        return _Staged(slots)
    return _Staged(*coded(optimizer, place.parameter, slots))


class _Place(NamedTuple):
    """Where a parameter's slots go; ``on_device`` says whether its step counts there too."""

    binding: Binding
    parameter: torch.Tensor
    part: Part | None
    on_device: bool
    ledger: Ledger


def _built(
    slots: Mapping[str, Value], optimizer: torch.optim.Optimizer, place: _Place, path: tuple[Any, ...]
) -> dict[str, Any]:
    """Return the slots that an optimizer keeps of a parameter; those of optimizers inside it stand in them."""
    held, lineage = inner(optimizer), lineage_of(type(stepper(optimizer)))
    row = known(lineage)

    def build(value: Value, path: tuple[Any, ...], top: bool) -> Any:
        if isinstance(value, Slot):
            return _tensor(value, path, place)
        if isinstance(value, Mapping):
            return packed({key: build(inner, (*path, key), False) for key, inner in value.items()})
        if isinstance(value, (list, tuple)):
            return type(value)(build(item, (*path, index), False) for index, item in enumerate(value))
        if top and path[-1] == "step" and isinstance(value, (int, float, Scalar)):
            return _step(value, row, place.parameter.device, place.on_device)
        if isinstance(value, Scalar):
            host = path[-1] in ON_THE_HOST and not place.on_device
            return scalar_to_torch(value).to("cpu" if host else place.parameter.device)
        return value

    return {
        key: _built(value, held[key], place, (*path, key))
        if key in held and isinstance(value, Mapping)
        else build(value, (*path, key), True)
        for key, value in flat(slots, lineage).items()
    }


def _tensor(slot: Slot, path: tuple[Any, ...], place: _Place) -> torch.Tensor:
    """Return a slot's tensor, where the parameter is; what is shaped like the parameter has its layout too."""
    tensor, binding, parameter = slot.tensor, place.binding, place.parameter
    saved = dtype_of(tensor.dtype)
    like = slot.role in (Role.PARAM, Role.ROW, Role.COL)
    dtype = dtype_of(binding.dtype) if binding.dtype and like and saved.is_floating_point else saved
    where = f"'{binding.name}': slot '{'.'.join(map(str, path))}'"
    if place.part or is_sharded(parameter):
        return _shard(slot, dtype, place, where)
    if binding.resize:
        old = torch.empty(tensor.shape, dtype=saved)
        read_into(tensor, old, ledger=place.ledger, where=where)
        power, mean = RESIZABLE[path[-1]]
        out = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return _resized(old.mul_(binding.scale**power), out, mean, binding.resize)
    if slot.role is Role.PARAM:
        out = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    else:
        out = empty(tensor.shape, dtype, parameter.device, slot.order)
    read_into(tensor, out, ledger=place.ledger, where=where)
    return out


def _shard(slot: Slot, dtype: torch.dtype, place: _Place, where: str) -> torch.Tensor:
    """Return this rank's part of a slot, placed as the parameter is."""
    if slot.role is not Role.PARAM or place.binding.resize:
        what = "it has another shape" if place.binding.resize else f"its role is {slot.role.value}, not param"
        raise BindError(f"{where} cannot follow a sharded parameter: {what}")
    if place.part:
        out = torch.empty(place.part.count, dtype=dtype, device=place.parameter.device)
        read_into(run_of(slot.tensor, place.part), out, where=where)
    else:
        from lora_state_format.torch.distributed import read_shard

        out = torch.empty_like(place.parameter, dtype=dtype, requires_grad=False)
        read_shard(slot.tensor, out, where)  # type: ignore[arg-type]
    return out


def _resized(old: torch.Tensor, out: torch.Tensor, mean: bool, change: Resize) -> torch.Tensor:
    """Return the moments of a parameter of another shape: what both have is kept, what is new is zero or the mean."""
    new = torch.full(change.after, float(old.double().mean()) if mean and old.numel() else 0.0, dtype=old.dtype)
    old = old.reshape(change.before)
    for axis, places in enumerate(change.old):
        old = old.index_select(axis, torch.tensor([*places], dtype=torch.long))
    new[torch.meshgrid(*(torch.tensor([*places], dtype=torch.long) for places in change.new), indexing="ij")] = old
    return out.copy_(new.reshape(out.shape))


def _step(value: int | float | Scalar, row: Known, device: torch.device, on_device: bool) -> Any:
    """Return a step count as a class counts: a Python number, or a 0-d tensor where it expects one."""
    if row.counts is int:
        return int(value.item().real) if isinstance(value, Scalar) else int(value)
    if isinstance(value, Scalar):
        step = scalar_to_torch(value)
    elif row.counts is float:
        step = torch.tensor(float(value), dtype=torch.float32)
    else:
        return value
    return step.to(device=device, dtype=torch.float32) if on_device else step


def _in_memory(parameter: Parameter) -> Parameter:
    """Return a carried parameter with its tensors in memory, for a save after the file is closed."""

    def copied(leaf: Any, _: tuple[Any, ...]) -> Any:
        if isinstance(leaf, Slot):
            return replace(leaf, tensor=from_torch(to_torch(leaf.tensor, leaf.order)))
        return leaf

    return replace(parameter, state=mapped(parameter.state, copied))


# --- the report -----------------------------------------------------------------------------------------------------


def _report(loading: LoadPlan, codes: list[Coded]) -> LoadReport:
    restored = [binding.saved for binding in loading.bindings if binding.saved]
    counts = [sum(1 for _ in parameter.tensors()) for parameter in restored if parameter.state is not None]
    steps = [int(step) for parameter in restored if (step := _number((parameter.state or {}).get("step"))) is not None]
    matching, differing = loading.weights.matching, loading.weights.differing
    notes = list(loading.notes)
    if codes:
        notes.append(
            f"{sum(code.moments for code in codes)} moments were quantised by bitsandbytes: each value is within "
            f"{100 * max(code.bound for code in codes):.2g}% of the largest of its block"
        )
    if differing:
        which = f"the weights of {len(differing)} parameters" if matching else "these weights"
        notes.append(
            f"{which} are not those that the state was saved with: of another step, or changed since (the first is "
            f"'{differing[0]}')"
        )
    return LoadReport(
        restored=len(restored),
        total=len(loading.bindings),
        fresh=tuple(binding.name for binding in loading.bindings if binding.saved is None),
        slots=(min(counts, default=0), max(counts, default=0)),
        steps=(min(steps), max(steps)) if steps else None,
        matching=len(matching),
        differing=differing,
        ignored=tuple(parameter.name for parameter in loading.ignored),
        carried=tuple(parameter.name for parameter in loading.carried),
        options=loading.options,
        replaced=loading.replaced,
        notes=tuple(notes),
    )


def _said(report: LoadReport) -> LoadReport:
    logger.info("%s", report.line())
    for change in report.replaced:
        logger.info("%s", change)
    for note in report.notes:
        logger.warning("%s", note)
    return report


def _number(value: Value) -> float | None:
    found = value.item() if isinstance(value, Scalar) else value
    return found if isinstance(found, (int, float)) else None
