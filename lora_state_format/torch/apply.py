"""Carry out a plan: read the state into new tensors, check every byte, and only then swap it into the optimizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from lora_state_format.binding.live import LiveOptimizer
from lora_state_format.binding.plan import RESIZABLE, Binding, LoadPlan
from lora_state_format.errors import BindError
from lora_state_format.io.ledger import Ledger
from lora_state_format.model.digests import ALGORITHM
from lora_state_format.model.sources import File
from lora_state_format.model.states import Parameter, Role, Scalar, Slot, Value
from lora_state_format.optimizers.classes import Known
from lora_state_format.torch.capture import (
    CARRIED,
    Models,
    Named,
    Optimizers,
    named_tensors,
    optimizers_of,
)
from lora_state_format.torch.fsdp1 import Part, run_of
from lora_state_format.torch.objects import flat, packed
from lora_state_format.torch.tensors import (
    dtype_of,
    from_torch,
    is_sharded,
    read_into,
    scalar_to_torch,
    to_torch,
)

__all__ = ["LoadReport", "apply"]

logger = logging.getLogger("lora_state_format")

ON_THE_HOST: Final = frozenset({"step", "mu_product"})
"""0-d slots that torch keeps in CPU memory unless a group is ``capturable`` or ``fused``."""


@dataclass(frozen=True)
class LoadReport:
    """What a load did. ``str`` of it is one line, and one more for each note.

    ``restored`` of ``total`` parameters took their state from the file, ``fresh`` names the others; ``slots`` counts
    the tensors of a parameter, least and most; ``steps`` are the first and last step that was found, if any.
    ``weights`` counts the parameters whose own bytes are those of the time of the save, or are not; the rest had no
    digest, or one of another dtype.
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
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([self.line(), *self.notes])

    def line(self) -> str:
        """Return the report without its notes."""
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


def apply(
    loading: LoadPlan, optimizer: Optimizers, model: Models, agree: Callable[[], None] = lambda: None
) -> LoadReport:
    """Carry out a plan that was made for this optimizer and model.

    ``agree`` is called when everything is read and verified, and nothing changed yet; what it raises stops the load.
    Everything is read and verified first; then it is put in place. Raises ``BindError`` for a plan with problems,
    ``DigestError`` or ``FileError`` for damaged bytes; the optimizer is then as it was.
    """
    loading.check()
    named, optimizers = named_tensors(model), optimizers_of(optimizer)
    tensors, ledger = named.tensors, Ledger()
    with ThreadPoolExecutor(1) as beside:
        comparing = beside.submit(_compare, loading)  # in the time that reading waits for bytes
        staged = _staged(loading, named, ledger)
        carried = tuple(_kept(parameter) for parameter in loading.carried)
    loose = _loose(loading.state.globals, len(optimizers))
    ledger.check()
    loading.state.check_unchanged()
    matching, differing = comparing.result()
    agree()

    for binding, slots in zip(loading.bindings, staged, strict=True):
        state = optimizers[loading.live.groups[loading.live.members[binding.name]].optimizer].state
        state.pop(tensors[binding.name], None)
        if slots is not None:
            state[tensors[binding.name]] = slots
    for live, values in zip(optimizers, loose, strict=True):
        live.state.update(values)
    raw_groups = [group for live in optimizers for group in live.param_groups]
    for group, chosen in zip(raw_groups, loading.options, strict=True):
        for key, value in chosen.items():
            group[key] = _set(group.get(key), value)
    if carried:
        CARRIED[optimizers[0]] = carried
    else:
        CARRIED.pop(optimizers[0], None)
    return _report(loading, matching, differing)


def _staged(loading: LoadPlan, named: Named, ledger: Ledger) -> list[dict[str, Any] | None]:
    """Return the new slots of each binding.

    Half of the time goes into the pages of new memory, so two threads read: open files can be read by both. Ranks that
    have parts of tensors talk to each other, in order.
    """

    def stage(binding: Binding) -> dict[str, Any] | None:
        return _stage(binding, named, loading.live, ledger)

    open_files = all(type(resource) is File for resource in loading.state.resources)
    if not open_files or named.parts or any(map(is_sharded, named.tensors.values())):
        return [*map(stage, loading.bindings)]
    with ThreadPoolExecutor(2) as readers:
        return [*readers.map(stage, loading.bindings)]


def _stage(binding: Binding, named: Named, live: LiveOptimizer, ledger: Ledger) -> dict[str, Any] | None:
    """Return a parameter's new slots, read and checked; ``None`` for none."""
    part = named.parts.get(binding.name)
    if binding.saved is None or binding.saved.state is None or (part and not part.count):
        return None
    parameter = named.tensors[binding.name]
    group = live.members[binding.name]
    number = live.groups[group].optimizer
    row, lineage = live.known[number], live.lineages[number] if live.lineages else ()
    on_device = bool(live.options[group].get("capturable") or live.options[group].get("fused"))

    def build(value: Value, path: tuple[Any, ...]) -> Any:
        if isinstance(value, Slot):
            return _tensor(value, binding, path, parameter, part, ledger)
        if isinstance(value, Mapping):
            return packed({key: build(inner, (*path, key)) for key, inner in value.items()})
        if isinstance(value, (list, tuple)):
            return type(value)(build(inner, (*path, index)) for index, inner in enumerate(value))
        if path == ("step",) and isinstance(value, (int, float, Scalar)):
            return _step(value, row, parameter.device, on_device)
        if isinstance(value, Scalar):
            host = path[-1] in ON_THE_HOST and not on_device
            return scalar_to_torch(value).to("cpu" if host else parameter.device)
        return value

    return {key: build(value, (key,)) for key, value in flat(binding.saved.state, lineage).items()}


def _tensor(
    slot: Slot,
    binding: Binding,
    path: tuple[Any, ...],
    parameter: torch.Tensor,
    part: Part | None,
    ledger: Ledger,
) -> torch.Tensor:
    """Return a slot's tensor, where the parameter is; what is shaped like the parameter has its layout too."""
    tensor = slot.tensor
    saved = dtype_of(tensor.dtype)
    like = slot.role in (Role.PARAM, Role.ROW, Role.COL)
    dtype = dtype_of(binding.dtype) if binding.dtype and like and saved.is_floating_point else saved
    where = f"'{binding.name}': slot '{'.'.join(map(str, path))}'"
    if part or is_sharded(parameter):
        return _shard(slot, dtype, binding, parameter, part, where)
    if binding.resize:
        old = torch.empty(tensor.shape, dtype=saved)
        read_into(tensor, old, ledger=ledger, where=where)
        power, mean = RESIZABLE[path[-1]]
        out = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return _resized(old.mul_(binding.scale**power), out, mean)
    if slot.role is Role.PARAM:
        out = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    else:
        out = torch.empty(tensor.shape, dtype=dtype, device=parameter.device)
    read_into(tensor, out, ledger=ledger, where=where)
    return out


def _shard(
    slot: Slot, dtype: torch.dtype, binding: Binding, parameter: torch.Tensor, part: Part | None, where: str
) -> torch.Tensor:
    """Return this rank's part of a slot, placed as the parameter is."""
    if slot.role is not Role.PARAM or binding.resize:
        what = "it has another shape" if binding.resize else f"its role is {slot.role.value}, not param"
        raise BindError(f"{where} cannot follow a sharded parameter: {what}")
    out = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    if part:
        out = torch.empty(part.count, dtype=dtype, device=parameter.device)
        read_into(run_of(slot.tensor, part), out, where=where)
    else:
        from lora_state_format.torch.distributed import read_shard

        read_shard(slot.tensor, out, where)  # type: ignore[arg-type]
    return out


def _resized(old: torch.Tensor, out: torch.Tensor, mean: bool) -> torch.Tensor:
    """Return the moments of a parameter of another shape: what both have is kept, what is new is zero or the mean."""
    common = tuple(slice(0, min(a, b)) for a, b in zip(old.shape, out.shape, strict=True))
    out.fill_(float(old.double().mean()) if mean and old.numel() else 0.0)
    out[common].copy_(old[common])
    return out


def _step(value: int | float | Scalar, row: Known, device: torch.device, on_device: bool) -> Any:
    """Return a step count as the live class counts: a Python number, or a 0-d tensor where it expects one."""
    if row.counts is int:
        return int(value.item().real) if isinstance(value, Scalar) else int(value)
    if isinstance(value, Scalar):
        step = scalar_to_torch(value)
    elif row.counts is float:
        step = torch.tensor(float(value), dtype=torch.float32)
    else:
        return value
    return step.to(device=device, dtype=torch.float32) if on_device else step


def _kept(parameter: Parameter) -> Parameter:
    """Return a carried parameter with its tensors in memory, for a save after the file is closed."""

    def copied(value: Any) -> Any:
        if isinstance(value, Slot):
            return Slot(from_torch(to_torch(value.tensor)), value.role)
        if isinstance(value, Mapping):
            return {key: copied(inner) for key, inner in value.items()}
        return type(value)(map(copied, value)) if isinstance(value, (list, tuple)) else value

    return replace(parameter, state=copied(parameter.state))


def _loose(values: Mapping[str, Value], count: int) -> list[dict[Any, Any]]:
    """Return for each optimizer the state under keys that are no parameters."""
    found: list[dict[Any, Any]] = []
    for number in range(count):
        own = values.get(str(number), {}) if count > 1 else values
        state = own.get("state", {}) if isinstance(own, Mapping) else {}
        assert isinstance(state, Mapping)
        found.append({key: _plain(value) for key, value in state.items()})
    return found


def _plain(value: Value) -> Any:
    if isinstance(value, Slot):
        return to_torch(value.tensor)
    if isinstance(value, Scalar):
        return scalar_to_torch(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return type(value)(map(_plain, value)) if isinstance(value, (list, tuple)) else value


@torch.no_grad()
def _set(current: Any, value: Any) -> Any:
    """Return a group option's new value: a live tensor stays the object it is, numbers stay numbers."""
    if isinstance(current, (list, tuple)) and isinstance(value, (list, tuple)) and len(current) == len(value):
        return type(current)(_set(a, b) for a, b in zip(current, value, strict=True))
    if isinstance(current, torch.Tensor) and isinstance(value, (int, float, Scalar, torch.Tensor)):
        return current.copy_(scalar_to_torch(value) if isinstance(value, Scalar) else torch.as_tensor(value))
    if isinstance(value, Scalar) and isinstance(current, (int, float)):
        return value.item()
    return _plain(value)


# --- the report -----------------------------------------------------------------------------------------------------


def _compare(loading: LoadPlan) -> tuple[int, tuple[str, ...]]:
    """Return how many live parameters have the bytes of the save, and the names of those that have others."""
    matching, differing = 0, []
    for binding in loading.bindings:
        saved, own = binding.saved.weights if binding.saved else None, loading.live.parameters[binding.name]
        if saved is None or own.digest is None or binding.resize:
            continue
        if (saved.algorithm, saved.dtype) != (ALGORITHM, own.dtype):
            continue
        if own.digest() == saved:
            matching += 1
        else:
            differing.append(binding.name)
    return matching, tuple(differing)


def _report(loading: LoadPlan, matching: int, differing: tuple[str, ...]) -> LoadReport:
    restored = [binding.saved for binding in loading.bindings if binding.saved]
    counts = [sum(1 for _ in parameter.tensors()) for parameter in restored if parameter.state is not None]
    steps = [int(step) for parameter in restored if (step := _number((parameter.state or {}).get("step"))) is not None]
    notes = list(loading.notes)
    if differing:
        which = f"the weights of {len(differing)} parameters" if matching else "these weights"
        notes.append(
            f"{which} are not those that the state was saved with: of another step, or changed since (the first is "
            f"'{differing[0]}')"
        )
    report = LoadReport(
        restored=len(restored),
        total=len(loading.bindings),
        fresh=tuple(binding.name for binding in loading.bindings if binding.saved is None),
        slots=(min(counts, default=0), max(counts, default=0)),
        steps=(min(steps), max(steps)) if steps else None,
        matching=matching,
        differing=differing,
        ignored=tuple(parameter.name for parameter in loading.ignored),
        carried=tuple(parameter.name for parameter in loading.carried),
        options=loading.options,
        notes=tuple(notes),
    )
    logger.info("%s", report.line())
    for note in notes:
        logger.warning("%s", note)
    return report


def _number(value: Value) -> float | None:
    found = value.item() if isinstance(value, Scalar) else value
    return found if isinstance(found, (int, float)) else None
