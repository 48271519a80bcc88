"""From a live optimizer and its model to an ``OptimizerState``. Nothing is run, nothing is changed.

Names are those of ``named_parameters()`` without the segments of wrappers, found by the identity of the tensors; what
an optimizer itself says about names (``param_names``) is not asked, since torch overwrites it on load. Of several
models, given as a mapping, each name gets the model's key in front: ``unet.``.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, TypeAlias, cast
from weakref import WeakKeyDictionary

import torch

from lora_state_format.binding.live import LiveGroup, LiveOptimizer, LiveParameter
from lora_state_format.binding.plan import SCALING
from lora_state_format.errors import CaptureError, UnrepresentableError
from lora_state_format.foreign.state_dict import Leaf, Reader
from lora_state_format.model.digests import ALGORITHM, hash_tensor
from lora_state_format.model.states import (
    Group,
    Naming,
    Optimizer,
    OptimizerState,
    Parameter,
    Role,
    Scalar,
    Slot,
    Value,
    walk,
)
from lora_state_format.model.tensors import Digest, Tensor
from lora_state_format.naming.names import peft_key, split_adapter
from lora_state_format.torch.fsdp1 import Part, parts_of
from lora_state_format.torch.objects import outside, unpacked
from lora_state_format.torch.tensors import dtype_name, from_torch, is_sharded, refusal, to_host
from lora_state_format.torch.zero import parts_of_zero, view_of

__all__ = [
    "CARRIED",
    "Models",
    "Named",
    "Optimizers",
    "capture",
    "capture_parts",
    "describe",
    "named_tensors",
    "optimizers_of",
    "sharding",
    "weights_of",
]

logger = logging.getLogger("lora_state_format")

Models: TypeAlias = "torch.nn.Module | Mapping[str, torch.nn.Module]"
Optimizers: TypeAlias = "torch.optim.Optimizer | Sequence[torch.optim.Optimizer]"

CARRIED: Final[WeakKeyDictionary[torch.optim.Optimizer, tuple[Parameter, ...]]] = WeakKeyDictionary()
"""State that a load with ``unexpected="carry"`` keeps for the next save, by the first optimizer of the run."""

WRAPPERS: Final[Mapping[str, str]] = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "_fsdp_wrapped_module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": "_checkpoint_wrapped_module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
}
"""Class of a wrapper -> the segment that it puts into names."""

SHELLS: Final[Mapping[str, str]] = {
    "accelerate.optimizer.AcceleratedOptimizer": "optimizer",
    "lightning.pytorch.core.optimizer.LightningOptimizer": "optimizer",
    "pytorch_lightning.core.optimizer.LightningOptimizer": "optimizer",
}
"""Class of an optimizer that only hands on to another -> where it has that one."""


# --- names ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Named:
    """The parameters of a model. ``tensors`` has each once, under its first name; ``tied`` has the other names.

    ``names`` has the first names by ``id(tensor)``, ``owners`` the class of the module that has the parameter,
    ``scaling`` what LoRA layers multiply the products of their parameters with, ``parts`` what FSDP1 has left of those
    that it has cut up.
    """

    tensors: dict[str, torch.Tensor]
    tied: dict[str, tuple[str, ...]]
    names: dict[int, str]
    owners: dict[str, type]
    scaling: dict[str, float]
    parts: dict[str, Part]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole parameter."""
        return self.parts[name].shape if name in self.parts else tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> str:
        """Return the dtype of what the optimizer steps, as safetensors spells it, or as torch does if that has none."""
        part, own = self.parts.get(name), self.tensors[name].dtype
        return (part.dtype if part else None) or dtype_name(own) or str(own)


def named_tensors(model: Models) -> Named:
    """Return the parameters of a model, or of several, under their names. Raises ``CaptureError`` if two share one."""
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, tuple[str, ...]] = {}
    names: dict[int, str] = {}
    owners: dict[str, type] = {}
    scaling: dict[str, float] = {}
    seen: set[str] = set()
    for name, tensor, owner, scale in _named(model):
        if name in seen:
            raise CaptureError(f"two parameters are called '{name}' once the segments of wrappers are removed")
        seen.add(name)
        first = names.setdefault(id(tensor), name)
        if first == name:
            tensors[name], owners[name] = tensor, owner
            if scale is not None:
                scaling[name] = scale
        else:
            tied[first] = (*tied.get(first, ()), name)
    modules = model.values() if isinstance(model, Mapping) else [model]
    cut = (item for module in modules for found in (parts_of(module), parts_of_zero(module)) for item in found.items())
    parts = {names[key]: part for key, part in cut if key in names}
    return Named(tensors, tied, names, owners, scaling, parts)


def _named(model: Models) -> Iterator[tuple[str, torch.Tensor, type, float | None]]:
    for key, module in model.items() if isinstance(model, Mapping) else [("", model)]:
        places: dict[str, tuple[str, Any]] = {"": (key, module)}
        for name, tensor in module.named_parameters(remove_duplicate=False):
            head, _, leaf = name.rpartition(".")
            clean, owner = _place(head, places)
            yield _joined(clean, leaf), tensor, type(owner), _scale(name, places)


def _place(path: str, places: dict[str, tuple[str, Any]]) -> tuple[str, Any]:
    """Return the path without the segments of wrappers, and the module there."""
    if path not in places:
        head, _, segment = path.rpartition(".")
        clean, module = _place(head, places)
        wraps = any(WRAPPERS.get(class_path) == segment for class_path in _lineage(type(module)))
        places[path] = (clean if wraps else _joined(clean, segment), getattr(module, segment, None))
    return places[path]


def _scale(name: str, places: dict[str, tuple[str, Any]]) -> float | None:
    """Return what PEFT's LoRA layer around a parameter multiplies with: alpha / r, or as the adapter has it."""
    parts = split_adapter(name)
    if parts is None or ".lora_" not in name:
        return None
    layer = _place(parts[0].rpartition(".")[0], places)[1]
    scales = getattr(layer, "scaling", None)
    return float(scales[parts[1]]) if isinstance(scales, dict) and parts[1] in scales else None


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _class_path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _lineage(kind: type) -> tuple[str, ...]:
    return tuple(_class_path(ancestor) for ancestor in kind.__mro__)


# --- the live side --------------------------------------------------------------------------------------------------


def optimizers_of(optimizer: Optimizers) -> tuple[torch.optim.Optimizer, ...]:
    """Return the optimizers of a run, without the shells that frameworks put around them."""
    listed = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    return tuple(map(_shelled, listed))


def sharding(optimizer: Optimizers, model: Models) -> Literal["DTensor", "FSDP1"] | None:
    """Return how the parameters of a run are sharded; ``None`` if they are not."""
    groups = (group for found in optimizers_of(optimizer) for group in found.param_groups)
    if any(is_sharded(parameter) for group in groups for parameter in group["params"]):
        return "DTensor"
    modules = model.values() if isinstance(model, Mapping) else [model]
    return "FSDP1" if any(parts_of(module) or parts_of_zero(module) for module in modules) else None


def _shelled(optimizer: Any) -> torch.optim.Optimizer:
    while inner := next((SHELLS[path] for path in _lineage(type(optimizer)) if path in SHELLS), None):
        optimizer = getattr(optimizer, inner)
    return cast("torch.optim.Optimizer", view_of(optimizer) or optimizer)


def stepper(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer whose class takes the steps: under ZeRO, DeepSpeed's inner one."""
    return cast("torch.optim.Optimizer", getattr(optimizer, "base", optimizer))


def describe(optimizer: Optimizers, model: Models) -> LiveOptimizer:
    """Return the live side of a load. Raises ``CaptureError`` as ``capture`` does."""
    named, optimizers = named_tensors(model), optimizers_of(optimizer)
    reader = Reader(as_leaf)
    groups = [
        LiveGroup(number, tuple(_options(reader, group)), tuple(names), _group_name(group))
        for number, group, names in _groups(optimizers, named)
    ]
    parameters = {
        name: LiveParameter(
            name,
            named.shape(name),
            named.dtype(name),
            tensor.requires_grad,
            named.tied.get(name, ()),
            None if is_sharded(tensor) or name in named.parts else _digester(tensor),
            named.scaling.get(name),
        )
        for name, tensor in named.tensors.items()
    }
    lineages = tuple(_stepping(type(stepper(found))) for found in optimizers)
    return LiveOptimizer(tuple(Optimizer(kinds[0]) for kinds in lineages), tuple(groups), parameters, lineages)


def _stepping(kind: type) -> tuple[str, ...]:
    """Return the class and those of its ancestors whose ``step`` it has."""
    own = inspect.unwrap(kind.step)  # type: ignore[attr-defined]
    same = [ancestor for ancestor in kind.__mro__ if inspect.unwrap(getattr(ancestor, "step", None) or len) is own]
    return tuple(_class_path(ancestor) for ancestor in same)


def _digester(tensor: torch.Tensor) -> Callable[[], Digest]:
    return lambda: _digest(tensor)


def _digest(tensor: torch.Tensor) -> Digest:
    content = _content(tensor)
    return Digest(ALGORITHM, content.dtype, hash_tensor(content))


def _groups(
    optimizers: Sequence[torch.optim.Optimizer], named: Named
) -> Iterator[tuple[int, Mapping[str, Any], list[str]]]:
    """Yield each group with the number of its optimizer and its parameters' names."""
    strangers: list[str] = []
    owners: dict[str, int] = {}
    found = []
    for number, optimizer in enumerate(optimizers):
        for place, group in enumerate(optimizer.param_groups):
            names = []
            for position, tensor in enumerate(group["params"]):
                name = named.names.get(id(tensor))
                if name is None:
                    strangers.append(f"group {place}, position {position}, shape {list(tensor.shape)}")
                    continue
                if reason := refusal(tensor):
                    raise UnrepresentableError(f"parameter '{name}' is a tensor {reason}")
                if owners.setdefault(name, number) != number:
                    raise CaptureError(f"parameter '{name}' is in optimizer {owners[name]} and in optimizer {number}")
                names.append(name)
            found.append((number, group, names))
    if strangers:
        listed = "".join(f"\n    {stranger}" for stranger in strangers[:10])
        more = f"\n    ... and {len(strangers) - 10} more" if len(strangers) > 10 else ""
        raise CaptureError(
            f"the optimizer holds {len(strangers)} parameters that the model does not have:{listed}{more}\n"
            "hint: it was built over another model, or before the model's parameters were replaced; build it from this "
            "model's parameters, or pass every model that it trains, as in model={'unet': unet, 'text_encoder': te}"
        )
    yield from found


def _group_name(group: Mapping[str, Any]) -> str | None:
    name = group.get("name")
    return name if isinstance(name, str) else None


def _options(reader: Reader, group: Mapping[str, Any], where: str | None = None) -> Iterator[tuple[str, Value]]:
    """Yield a group's options; those that have no form in a file are left out, with a warning that says ``where``."""
    for key, raw in group.items():
        if key in ("params", "param_names"):
            continue
        try:
            yield key, reader.value(raw, (key,))
        except UnrepresentableError as error:
            if where is not None:
                logger.warning("%s: option %s; it is not saved, and a load keeps what the live group has", where, error)


def _content(tensor: torch.Tensor, copy: bool = False) -> Tensor:
    """Return a tensor's bytes, live or copied; of a sharded one all of them, which arrive inside ``gather``."""
    if is_sharded(tensor):
        from lora_state_format.torch.exchange import spread

        sharded = cast("Any", tensor)
        if tensor.shape:
            return spread(sharded, copy=copy)
        tensor = sharded.full_tensor()
    return from_torch(to_host(tensor) if copy else tensor)


def as_leaf(raw: Any, copy: bool = False) -> Tensor | Scalar | None:
    """Live tensors, or copies of them, and NumPy's scalars as Python numbers."""
    if isinstance(raw, torch.Tensor):
        content = _content(raw, copy)
        return content if content.shape else Scalar(content.dtype, bytes(content.bytes()))
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(raw, numpy.generic) and not isinstance(raw, (numpy.str_, numpy.bytes_)):
        return cast("None", raw.item())
    return None


def _leaf(name: str, part: Part | None, copy: bool) -> Leaf:
    """Return what reads the slots of a parameter; those of a part stand for the whole parameter's."""

    def leaf(raw: Any) -> Tensor | Scalar | None:
        if part and isinstance(raw, torch.Tensor) and raw.shape == (part.count,):
            return _part_content(name, part, raw, copy) if part.shape else as_leaf(raw[0])
        return as_leaf(raw, copy)

    return cast("Leaf", leaf)


def _part_content(name: str, part: Part, local: torch.Tensor, copy: bool) -> Tensor:
    from lora_state_format.torch.exchange import run

    return run(name, part.shape, part.start, local, copy=copy)


# --- capture --------------------------------------------------------------------------------------------------------


def capture(
    optimizer: Optimizers,
    model: Models,
    *,
    weights: bool = True,
    extra: Mapping[str, Any] | None = None,
    global_step: int | None = None,
    copy: bool = False,
) -> OptimizerState:
    """Return the state of an optimizer, or of several, under the model's names.

    Tensors are not copied: write the state before the next step, or ask for a ``copy``, which is in the host's memory
    and stays as it is. ``weights`` adds a digest of each parameter's own bytes, by which a load can tell whether state
    and weights belong together. ``extra`` are values of your own without tensors (a scheduler's ``state_dict()``, say).

    Raises ``CaptureError`` if the optimizer holds parameters that the model does not have, and
    ``UnrepresentableError`` for a value that no file can hold, naming the parameter and the slot.
    """
    named = named_tensors(model)
    if named.parts:
        raise CaptureError(
            "FSDP has cut the parameters up: call save_optimizer on every rank, which brings them together"
        )
    return capture_parts(optimizer, model, named, weights=weights, extra=extra, global_step=global_step, copy=copy)


def capture_parts(
    optimizer: Optimizers,
    model: Models,
    named: Named,
    *,
    weights: bool,
    extra: Mapping[str, Any] | None,
    global_step: int | None,
    copy: bool,
) -> OptimizerState:
    """Return what ``capture`` does, with the slots of this rank where parameters are cut up.

    A parameter of which this rank has no elements has no state here.
    """
    optimizers = optimizers_of(optimizer)
    reader = Reader(cast("Leaf", partial(as_leaf, copy=copy)))
    groups: list[Group] = []
    parameters: dict[str, Parameter] = {}

    def add(name: str, state: Mapping[torch.Tensor, Mapping[str, Any]], options: Mapping[str, Any]) -> None:
        tensor, part = named.tensors[name], named.parts.get(name)
        entry = state.get(tensor) if part is None or part.count else None
        slots = None if entry is None else _slots(Reader(_leaf(name, part, copy)), name, named, entry, options)
        parameters[name] = _parameter(name, tensor, named, slots, weights)

    for place, (number, group, names) in enumerate(_groups(optimizers, named)):
        options = tuple(_options(reader, group, f"group {place}"))
        groups.append(Group(number, options, len(names), _group_name(group)))
        for name in names:
            add(name, optimizers[number].state, group)
    for found in optimizers:
        for key in found.state:
            if isinstance(key, torch.Tensor):
                left = named.names.get(id(key))
                if left is None:
                    raise CaptureError(
                        f"the optimizer keeps state of a tensor of shape {list(key.shape)} that is in none of its "
                        "groups and not in the model; delete it from optimizer.state"
                    )
                if left not in parameters:
                    add(left, found.state, {})
        for path, kind in outside(stepper(found)):
            logger.warning(
                "%s keeps a %s in its attribute %s, outside its state: it is not saved",
                type(found).__name__,
                kind,
                path,
            )
    for parameter in CARRIED.get(optimizers[0], ()):
        parameters.setdefault(parameter.name, parameter)
    return OptimizerState(
        optimizers=tuple(Optimizer(_class_path(type(stepper(found)))) for found in optimizers),
        groups=tuple(groups),
        parameters=tuple(parameters.values()),
        naming=Naming("model"),
        globals=_globals(reader, optimizers),
        origin={"format": "torch", "torch": str(torch.__version__), **_scalings(parameters.values(), named)},
        extra=_extra(reader, extra or {}),
        global_step=global_step,
    )


def weights_of(named: Named, name: str, *, copy: bool = False) -> Tensor:
    """Return a parameter's own bytes, or a copy of them; of a sharded one they arrive inside ``gather``."""
    part, tensor = named.parts.get(name), named.tensors[name]
    if part is None or part.own is None:
        return _content(tensor, copy)
    return _part_content(name, part, part.own, copy) if part.shape else _content(part.own.reshape(()), copy)


def _parameter(
    name: str, tensor: torch.Tensor, named: Named, slots: Mapping[str, Value] | None, weights: bool
) -> Parameter:
    parts, key = split_adapter(name), peft_key(name)
    return Parameter(
        name=name,
        shape=named.shape(name),
        state=slots,
        dtype=dtype_name(tensor.dtype),
        adapter=parts[1] if parts else None,
        tied=named.tied.get(name, ()),
        foreign_names={"peft": key[0]} if key else {},
        weights=_digest(tensor) if weights else None,
    )


def _scalings(parameters: Iterable[Parameter], named: Named) -> Mapping[str, Value]:
    """Return alpha / r by adapter, and by parameter where it differs from that of the adapter's first."""
    found: dict[str, Value] = {}
    for parameter in parameters:
        scale = named.scaling.get(parameter.name)
        if scale is not None and found.setdefault(str(parameter.adapter), scale) != scale:
            found[parameter.name] = scale
    return {SCALING: found} if found else {}


def _slots(
    reader: Reader, name: str, named: Named, entry: Mapping[str, Any], options: Mapping[str, Any]
) -> Mapping[str, Value]:
    entry = unpacked(entry)
    for path, raw in walk(cast("Value", entry)):
        if isinstance(raw, torch.Tensor) and (reason := refusal(raw)):
            raise UnrepresentableError(f"'{name}': slot '{'.'.join(map(str, path))}' is a tensor {reason}")
    slots = reader.slots(entry, options, (name,))
    fitted = {key: _fitted(value, named.shape(name)) for key, value in slots.items()}
    for path, slot in walk(fitted) if name in named.parts else ():
        if isinstance(slot, Slot) and slot.role is not Role.PARAM:
            raise UnrepresentableError(
                f"'{name}': slot '{'.'.join(map(str, path))}' has role {slot.role.value}, and FSDP brings only slots "
                "of the parameter's own elements together"
            )
    return fitted


def _fitted(value: Any, shape: tuple[int, ...]) -> Any:
    """Return slots that are called like ones of the parameter's shape, and have another, are opaque."""
    if isinstance(value, Slot):
        return Slot(value.tensor) if value.role is Role.PARAM and value.tensor.shape != shape else value
    if isinstance(value, Mapping):
        return {key: _fitted(inner, shape) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_fitted(inner, shape) for inner in value)
    return value


def _globals(reader: Reader, optimizers: Sequence[torch.optim.Optimizer]) -> Mapping[str, Value]:
    """Return state under keys that are no parameters, as ``state_dict.from_state_dict`` lays it out."""
    found: dict[str, Value] = {}
    for number, optimizer in enumerate(optimizers):
        loose = {
            key: reader.value(raw, ("state", key))
            for key, raw in cast("Mapping[Any, Any]", optimizer.state).items()
            if not isinstance(key, torch.Tensor)
        }
        if loose:
            found |= {str(number): {"state": loose}} if len(optimizers) > 1 else {"state": loose}
    return found


def _extra(reader: Reader, extra: Mapping[str, Any]) -> Mapping[str, Value]:
    values = {key: reader.value(raw, ("extra", key)) for key, raw in extra.items()}
    for path, value in walk(values):
        if isinstance(value, Slot):
            raise UnrepresentableError(f"extra.{'.'.join(map(str, path))} is a tensor; extra holds plain values only")
    return values
