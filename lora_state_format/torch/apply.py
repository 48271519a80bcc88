"""Carry out a plan: read the state into new tensors, check every byte, and only then swap it into the optimizer."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, cast, overload

import torch

from lora_state_format import registry
from lora_state_format.binding import plan as planning
from lora_state_format.binding.live import LiveOptimizer, LiveParameter
from lora_state_format.binding.plan import RESIZABLE, Binding, LoadPlan
from lora_state_format.errors import BindError, CaptureError, ConversionError, OptionError
from lora_state_format.format import envelope, reading, writing
from lora_state_format.io.ledger import Ledger
from lora_state_format.model import digests
from lora_state_format.model.digests import ALGORITHM
from lora_state_format.model.sources import File
from lora_state_format.model.states import OptimizerState, Parameter, PositionalState, Role, Scalar, Slot, Value
from lora_state_format.model.tensors import Digest, Tensor
from lora_state_format.naming import order, rules
from lora_state_format.naming.names import Rename, peft_key
from lora_state_format.optimizers.classes import Known
from lora_state_format.torch.background import BackgroundSave, settle, start
from lora_state_format.torch.capture import (
    CARRIED,
    Models,
    Named,
    Optimizers,
    capture,
    capture_with,
    describe,
    named_tensors,
    optimizers_of,
    with_weights,
)
from lora_state_format.torch.fsdp1 import Part, full_state, parts_of, run_of, whole_weights
from lora_state_format.torch.objects import flat, packed
from lora_state_format.torch.tensors import (
    dtype_of,
    from_torch,
    is_sharded,
    read_into,
    refusal,
    scalar_to_torch,
    to_torch,
)

__all__ = ["LoadReport", "apply", "load_optimizer", "plan", "save_optimizer"]

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
        """The report without its notes."""
        text = f"restored {self.restored}/{self.total} parameters, {_span(self.slots)} slots each"
        if self.steps:
            text += f", step {_span(self.steps)}"
        for names, what in ((self.fresh, "fresh"), (self.carried, "carried"), (self.ignored, "ignored")):
            text += f", {len(names)} {what}" if names else ""
        compared = self.matching + len(self.differing)
        return text + (f"; weights match {self.matching}/{compared}" if compared else "")


def _span(bounds: tuple[int, int]) -> str:
    return str(bounds[0]) if bounds[0] == bounds[1] else f"{bounds[0]} to {bounds[1]}"


# --- the interface --------------------------------------------------------------------------------------------------


@overload
def save_optimizer(
    optimizer: Optimizers,
    model: Models,
    path: str | os.PathLike[str],
    *,
    weights: bool = True,
    extra: Mapping[str, Any] | None = None,
    global_step: int | None = None,
    max_shard_size: int | None = None,
    force: bool = True,
    background: Literal[False] = False,
) -> writing.Written: ...


@overload
def save_optimizer(
    optimizer: Optimizers,
    model: Models,
    path: str | os.PathLike[str],
    *,
    weights: bool = True,
    extra: Mapping[str, Any] | None = None,
    global_step: int | None = None,
    max_shard_size: int | None = None,
    force: bool = True,
    background: Literal[True],
) -> BackgroundSave: ...


def save_optimizer(
    optimizer: Optimizers,
    model: Models,
    path: str | os.PathLike[str],
    *,
    weights: bool = True,
    extra: Mapping[str, Any] | None = None,
    global_step: int | None = None,
    max_shard_size: int | None = None,
    force: bool = True,
    background: bool = False,
) -> writing.Written | BackgroundSave:
    """Write the state of an optimizer, or of several, under the model's names; see ``capture``.

    An older file at the path is replaced, as a training loop wants it; it stays whole until the new one is. Folders on
    the way are made. With ``force=False`` an existing file is a ``TargetExistsError``. The optimizer is only read: no
    step is run, and gradients may be there.

    The optimizer of a sharded model (DTensors: FSDP2, tensor parallel) is saved by all ranks together: call this on
    every one. One tensor at a time is brought together for rank 0, which writes. If a rank fails, all raise. Of FSDP1
    (``FullyShardedDataParallel`` with ``use_orig_params=True``) the whole state is brought together on rank 0.

    With ``background=True`` the state is copied into the host's memory and written behind the run; what is returned
    has ``wait()``. The save before, if it is still being written, is waited for, and its error raised here.
    """
    path = Path(path)
    if sharding := _sharding(optimizer, model):
        if background:
            raise OptionError("background=True: the state of a sharded model is brought together while it is written")
        save = _save_together if sharding == "DTensor" else _save_whole
        return save(optimizer, model, path, weights, extra, global_step, max_shard_size, force)

    def captured() -> Callable[[], writing.Written]:
        state = capture(optimizer, model, weights=weights, extra=extra, global_step=global_step, copy=background)
        path.parent.mkdir(parents=True, exist_ok=True)
        return lambda: writing.write(state, path, force=force, max_shard_size=max_shard_size)

    if background:
        return start(captured)
    settle()
    return captured()()


def _sharding(optimizer: Optimizers, model: Models) -> Literal["DTensor", "FSDP1"] | None:
    groups = (group for found in optimizers_of(optimizer) for group in found.param_groups)
    if any(is_sharded(parameter) for group in groups for parameter in group["params"]):
        return "DTensor"
    modules = model.values() if isinstance(model, Mapping) else [model]
    return "FSDP1" if any(map(parts_of, modules)) else None


def _save_together(
    optimizer: Optimizers,
    model: Models,
    path: Path,
    weights: bool,
    extra: Mapping[str, Any] | None,
    global_step: int | None,
    max_shard_size: int | None,
    force: bool,
) -> writing.Written:
    """Rank 0 writes; every rank takes part in bringing each tensor together."""
    from lora_state_format.torch.distributed import Together, follow, from_first

    written = None
    with Together() as together:
        state = capture(optimizer, model, weights=False, extra=extra, global_step=global_step)
        order = [(key, tensor.dtype, tensor.shape) for key, tensor in writing.in_file_order(state, max_shard_size)]
        together.compare(repr((order, [(p.name, p.shape) for p in state.parameters])))
        if weights:
            state = with_weights(state, model)
        if torch.distributed.get_rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            written = writing.write(state, path, force=force, max_shard_size=max_shard_size)
        else:
            follow(tensor for _, tensor in writing.in_file_order(state, max_shard_size))
    return from_first(written)


def _save_whole(
    optimizer: Optimizers,
    model: Models,
    path: Path,
    weights: bool,
    extra: Mapping[str, Any] | None,
    global_step: int | None,
    max_shard_size: int | None,
    force: bool,
) -> writing.Written:
    """Rank 0 writes what FSDP1 brings together in its memory."""
    from lora_state_format.torch.distributed import agreement, from_first

    optimizers = optimizers_of(optimizer)
    if isinstance(model, Mapping) or len(optimizers) > 1:
        raise CaptureError("FullyShardedDataParallel is saved for one model and one optimizer at a time")
    entries = full_state(optimizers[0], model)
    written = None
    with agreement(True) as agree, whole_weights(model) if weights else contextlib.nullcontext():
        if torch.distributed.get_rank() == 0:
            state = capture_with(entries, optimizer, model, weights=False, extra=extra, global_step=global_step)
            if weights:
                state = with_weights(state, model, copy=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            written = writing.write(state, path, force=force, max_shard_size=max_shard_size)
        agree()
    return from_first(written)


@contextlib.contextmanager
def _agreed(optimizer: Optimizers, model: Models) -> Iterator[Callable[[], None]]:
    """What is called before anything changes: of a sharded model it returns when every rank is there."""
    if _sharding(optimizer, model) is None:
        yield lambda: None
        return
    from lora_state_format.torch.distributed import agreement

    with agreement(True) as agree:
        yield agree


def load_optimizer(
    optimizer: Optimizers,
    model: Models,
    path: str | os.PathLike[str],
    *,
    missing: planning.Missing = "error",
    unexpected: planning.Unexpected = "error",
    mismatch: planning.Mismatch = "error",
    dtype: planning.Dtype = "saved",
    options: Mapping[str, Any] | None = None,
    rename: Rename | None = None,
) -> LoadReport:
    """Load state into a live optimizer, or several, by the names of the model's parameters: all of it, or nothing.

    ``path`` is a file or a set of shards of this format, or any checkpoint that a converter reads. Where that one has
    positions instead of names, the order of the live optimizer says what they mean, with a warning: order alone is no
    proof. The policies are those of ``plan.Policies``.

    Of a sharded model each rank reads its own part, whatever the placement; call this on every rank. If one fails, all
    do. Tensors that are read in parts are not verified against their digests, and weights are not compared.

    Raises ``BindError`` that names everything that does not fit, ``DigestError`` and ``FileError`` for damaged bytes,
    ``RankError`` if another rank raised something, and what opening the path raises. The optimizer is then as it was.
    """
    with _agreed(optimizer, model) as agree, _open(Path(path), live := describe(optimizer, model), model) as state:
        loading = planning.plan(
            state,
            live,
            missing=missing,
            unexpected=unexpected,
            mismatch=mismatch,
            dtype=dtype,
            options=options,
            rename=rename,
        )
        return apply(loading, optimizer, model, agree)


def plan(state: OptimizerState, optimizer: Optimizers, model: Models, **policies: Any) -> LoadPlan:
    """What loading a state into a live optimizer would do; nothing is read or changed. See ``plan.plan``."""
    return planning.plan(state, describe(optimizer, model), **policies)


def _open(path: Path, live: LiveOptimizer, model: Models) -> OptimizerState:
    """The named state at a path; positions are named in the live optimizer's order, or else by the live model."""
    if envelope.is_state(path):
        return reading.open_state(path)
    checkpoint = registry.read(path)
    if not isinstance(checkpoint.state, PositionalState):
        return checkpoint.state
    named = named_tensors(model)
    parameters = [
        rules.Described(
            _beside(p, checkpoint.weights),
            p.requires_grad,
            tuple(kind.__name__ for kind in named.owners[p.name].__mro__[:-1]),
        )
        for p in live.parameters.values()
    ]
    own = {name: from_torch(tensor) for name, tensor in named.tensors.items() if refusal(tensor) is None}
    where = "beside it" if checkpoint.weights else "of the live model"
    state = order.decide(
        checkpoint.state,
        parameters,
        weights=checkpoint.weights or own,
        live=[group.parameters for group in live.groups],
        source="model",
    )
    details = state.naming.details
    evidence = cast("Mapping[str, str]", details.get("evidence", {}))
    verdict = evidence.get("verdict")
    if verdict == "contradicted":
        raise ConversionError(
            f"{path}: its parameters do not stand in the order of the live optimizer, say the weights {where}\n"
            "hint: give it names first, with convert(path, 'optimizer.safetensors'), and load that file"
        )
    logger.warning(
        "%s has no names; its %d parameters were named by the order of the live %s. Order alone is no proof: %s of "
        "them could be swapped without a shape that shows it%s",
        path,
        len(state),
        "optimizer" if state.naming.rule == order.LIVE else f"model (rule '{state.naming.rule}')",
        details["interchangeable"],
        f"; the order was weighed against the weights {where}: {verdict}" if verdict else "",
    )
    return state


def _beside(parameter: LiveParameter, weights: Mapping[str, Tensor]) -> Parameter:
    """The parameter, with the digest of its own bytes where they lie beside the state."""
    key = peft_key(parameter.name)
    tensor = weights.get(key[0] if key else parameter.name)
    return Parameter(
        name=parameter.name,
        shape=parameter.shape,
        state=None,
        dtype=parameter.dtype,
        tied=parameter.tied,
        keys={"peft": key[0]} if key else {},
        weights=Digest(ALGORITHM, tensor.dtype, digests.hash_tensor(tensor)) if tensor else None,
    )


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
    """The new slots of each binding.

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
    """A parameter's new slots, read and checked; ``None`` for none."""
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
    """A slot's tensor, where the parameter is; what is shaped like the parameter has its layout too."""
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
    """This rank's part of a slot, placed as the parameter is."""
    if slot.role is not Role.PARAM or binding.resize:
        what = "it has another shape" if binding.resize else f"its role is {slot.role.value}, not param"
        raise BindError(f"{where} cannot follow a sharded parameter: {what}")
    out = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    if part:
        read_into(run_of(slot.tensor, part), out, where=where)
    else:
        from lora_state_format.torch.distributed import read_shard

        read_shard(slot.tensor, out, where)  # type: ignore[arg-type]
    return out


def _resized(old: torch.Tensor, out: torch.Tensor, mean: bool) -> torch.Tensor:
    """The moments of a parameter of another shape: what both have is kept, what is new is zero or the mean."""
    common = tuple(slice(0, min(a, b)) for a, b in zip(old.shape, out.shape, strict=True))
    out.fill_(float(old.double().mean()) if mean and old.numel() else 0.0)
    out[common].copy_(old[common])
    return out


def _step(value: int | float | Scalar, row: Known, device: torch.device, on_device: bool) -> Any:
    """A step count as the live optimizer's class counts: a Python number, or a 0-d tensor where it expects one."""
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
    """A carried parameter with its tensors in memory, for a save after the file is closed."""

    def copied(value: Any) -> Any:
        if isinstance(value, Slot):
            return Slot(from_torch(to_torch(value.tensor)), value.role)
        if isinstance(value, Mapping):
            return {key: copied(inner) for key, inner in value.items()}
        return type(value)(map(copied, value)) if isinstance(value, (list, tuple)) else value

    return replace(parameter, state=copied(parameter.state))


def _loose(values: Mapping[str, Value], count: int) -> list[dict[Any, Any]]:
    """For each optimizer the state under keys that are no parameters."""
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
    """A group option's new value: a live tensor stays the object it is, numbers stay numbers."""
    if isinstance(current, (list, tuple)) and isinstance(value, (list, tuple)) and len(current) == len(value):
        return type(current)(_set(a, b) for a, b in zip(current, value, strict=True))
    if isinstance(current, torch.Tensor) and isinstance(value, (int, float, Scalar, torch.Tensor)):
        return current.copy_(scalar_to_torch(value) if isinstance(value, Scalar) else torch.as_tensor(value))
    if isinstance(value, Scalar) and isinstance(current, (int, float)):
        return value.item()
    return _plain(value)


# --- the report -----------------------------------------------------------------------------------------------------


def _compare(loading: LoadPlan) -> tuple[int, tuple[str, ...]]:
    """How many live parameters have the bytes that they had at the save, and the names of those that have others."""
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
