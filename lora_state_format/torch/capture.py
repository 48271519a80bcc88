"""From a live optimizer and its model to an ``OptimizerState``. Nothing is run, nothing is changed.

Names are those of ``named_parameters()`` without the segments of wrappers, found by the identity of the tensors; what
an optimizer itself says about names (``param_names``) is not asked, since torch overwrites it on load. Of several
models, given as a mapping, each name gets the model's key in front: ``unet.``.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Literal, TypeAlias, cast

import torch

from lora_state_format.binding.crossing import CLASSES_OF, INNER
from lora_state_format.binding.live import Layer
from lora_state_format.binding.loose import OUTSIDE
from lora_state_format.binding.resizing import SCALING, TOKENS
from lora_state_format.errors import CaptureError, OptionError, UnrepresentableError
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
    leaf_of,
    mapped,
    walk,
)
from lora_state_format.model.tensors import Digest, Tensor, memory_order
from lora_state_format.model.text import class_path
from lora_state_format.naming.names import peft_key, split_adapter
from lora_state_format.optimizers.classes import CLASSES
from lora_state_format.torch.carried import kept
from lora_state_format.torch.fsdp1 import Part, parts_of
from lora_state_format.torch.layers import layer_of
from lora_state_format.torch.nested import beside, inner, outside, stepping, wrapped
from lora_state_format.torch.objects import unpacked
from lora_state_format.torch.tensors import Copies, dtype_name, from_torch, is_sharded, refusal
from lora_state_format.torch.versions import Versions
from lora_state_format.torch.zero import parts_of_zero, view_of

__all__ = [
    "Models",
    "Named",
    "Optimizers",
    "as_leaf",
    "capture",
    "capture_parts",
    "digest_of",
    "group_name",
    "group_options",
    "grouped",
    "lineage_of",
    "named_tensors",
    "optimizers_of",
    "sharding",
    "weights_of",
]

logger = logging.getLogger("lora_state_format")

Models: TypeAlias = "torch.nn.Module | Mapping[str, torch.nn.Module]"
Optimizers: TypeAlias = (
    "torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | Mapping[torch.Tensor, torch.optim.Optimizer]"
)

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


HOLDERS: Final[Mapping[str, str]] = {"transformers.trainer_pt_utils.LayerWiseDummyOptimizer": "optimizer_dict"}
"""Class of an optimizer that stands for others, one for each parameter -> where it has those, by parameter."""


# --- names ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Named:
    """The parameters of a model. ``tensors`` has each once, under its first name; ``tied`` has the other names.

    ``names`` has the first names by ``id(tensor)``, ``owners`` the class of the module that has the parameter,
    ``layers`` what adapters' layers say of their parameters, ``parts`` what FSDP1 has left of those that it has cut up.
    """

    tensors: dict[str, torch.Tensor]
    tied: dict[str, tuple[str, ...]]
    names: dict[int, str]
    owners: dict[str, type]
    layers: dict[str, Layer]
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
    layers: dict[str, Layer] = {}
    seen: set[str] = set()
    for name, tensor, owner, layer in _named(model):
        if name in seen:
            raise CaptureError(f"two parameters are called '{name}' once the segments of wrappers are removed")
        seen.add(name)
        first = names.setdefault(id(tensor), name)
        if first == name:
            tensors[name], owners[name] = tensor, owner
            if layer is not None:
                layers[name] = layer
        else:
            tied[first] = (*tied.get(first, ()), name)
    modules = model.values() if isinstance(model, Mapping) else [model]
    cut = (item for module in modules for found in (parts_of(module), parts_of_zero(module)) for item in found.items())
    parts = {names[key]: part for key, part in cut if key in names}
    return Named(tensors, tied, names, owners, layers, parts)


def _named(model: Models) -> Iterator[tuple[str, torch.Tensor, type, Layer | None]]:
    for key, module in model.items() if isinstance(model, Mapping) else [("", model)]:
        places: dict[str, tuple[str, Any]] = {"": (key, module)}
        configs = _adapter_configs(module)
        for name, tensor in module.named_parameters(remove_duplicate=False):
            head, _, leaf = name.rpartition(".")
            clean, owner = _place(head, places)
            yield _joined(clean, leaf), tensor, type(owner), _layer(name, tensor, places, configs)


def _adapter_configs(module: torch.nn.Module) -> Mapping[str, Any]:
    """Return the configurations of PEFT's adapters by name, from the first module that has some."""
    found = (getattr(part, "peft_config", None) for part in module.modules())
    return next((configs for configs in found if isinstance(configs, Mapping)), {})


def _place(path: str, places: dict[str, tuple[str, Any]]) -> tuple[str, Any]:
    """Return the path without the segments of wrappers, and the module there."""
    if path not in places:
        head, _, segment = path.rpartition(".")
        clean, module = _place(head, places)
        wraps = any(WRAPPERS.get(class_path) == segment for class_path in _lineage(type(module)))
        places[path] = (clean if wraps else _joined(clean, segment), getattr(module, segment, None))
    return places[path]


def _layer(
    name: str, tensor: torch.Tensor, places: dict[str, tuple[str, Any]], configs: Mapping[str, Any]
) -> Layer | None:
    parts = split_adapter(name)
    if parts is None:
        return None
    path, module = _place(parts[0].rpartition(".")[0], places)
    return layer_of(name, tuple(tensor.shape), module, path, configs)


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _lineage(kind: type) -> tuple[str, ...]:
    return tuple(class_path(ancestor) for ancestor in kind.__mro__)


# --- the live side --------------------------------------------------------------------------------------------------


def optimizers_of(optimizer: Optimizers) -> tuple[torch.optim.Optimizer, ...]:
    """Return the optimizers of a run, without the shells that frameworks put around them.

    A dict of them, as loops keep that step each parameter in the backward pass, stands for its values.

    Raises ``OptionError`` for something that is no optimizer.
    """
    if isinstance(optimizer, torch.nn.Module) and view_of(optimizer) is None:
        raise OptionError(
            f"the first argument is a {type(optimizer).__name__}, which is a model: pass the optimizer first, then the "
            "model, then the path"
        )
    if isinstance(optimizer, Mapping):
        if not optimizer or not all(isinstance(value, torch.optim.Optimizer) for value in optimizer.values()):
            raise OptionError("the first argument is a dict: pass the optimizer itself, not its state_dict()")
        optimizer = list(optimizer.values())
    listed = optimizer if isinstance(optimizer, Sequence) else [optimizer]
    return tuple(one for found in listed for one in _several(_shelled(found)))


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


def _several(optimizer: torch.optim.Optimizer) -> Sequence[torch.optim.Optimizer]:
    """Return the optimizers for which one without parameters of its own stands."""
    held = next((HOLDERS[path] for path in _lineage(type(optimizer)) if path in HOLDERS), None)
    return [optimizer] if held is None else list((getattr(optimizer, held) or {}).values())


def stepper(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer whose class takes the steps: under ZeRO, DeepSpeed's inner one."""
    return cast("torch.optim.Optimizer", getattr(optimizer, "base", optimizer))


def digest_of(tensor: torch.Tensor) -> Digest:
    """Return the digest of a live tensor's bytes."""
    content = _content(tensor)
    return Digest(ALGORITHM, content.dtype, hash_tensor(content))


def grouped(
    optimizers: Sequence[torch.optim.Optimizer], named: Named
) -> Iterator[tuple[int, Mapping[str, Any], list[str]]]:
    """Yield each group with the number of its optimizer and its parameters' names."""
    strangers: list[str] = []
    owners: dict[str, int] = {}
    seen: set[str] = set()
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
                if name in seen:
                    raise CaptureError(
                        f"parameter '{name}' is in the optimizer twice, the second time at position {position} of "
                        f"group {place}: torch takes its step twice then; build the optimizer with each parameter once"
                    )
                seen.add(name)
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


def lineage_of(kind: type) -> tuple[str, ...]:
    """Return an optimizer's class and those of its ancestors whose ``step`` it has."""
    own = inspect.unwrap(kind.step)  # type: ignore[attr-defined]
    same = [ancestor for ancestor in kind.__mro__ if inspect.unwrap(getattr(ancestor, "step", None) or len) is own]
    return tuple(map(class_path, same))


def group_name(group: Mapping[str, Any]) -> str | None:
    """Return what a group is called, if it is called something."""
    name = group.get("name")
    return name if isinstance(name, str) else None


def group_options(reader: Reader, group: Mapping[str, Any], where: str | None = None) -> Iterator[tuple[str, Value]]:
    """Yield a group's options; those without a form in a file are left out, with a warning that says ``where``."""
    for key, raw in group.items():
        if key in ("params", "param_names"):
            continue
        try:
            yield key, reader.value(raw, (key,))
        except UnrepresentableError as error:
            if where is not None:
                logger.warning("%s: option %s; it is not saved, and a load keeps what the live group has", where, error)


def _content(tensor: torch.Tensor, copies: Copies | None = None) -> Tensor:
    """Return a tensor's bytes, live or of a copy to be made; of a sharded one all, which arrive inside ``gather``."""
    if is_sharded(tensor):
        from lora_state_format.torch.spread import spread

        sharded = cast("Any", tensor)
        if tensor.shape:
            return spread(sharded, copies)
        tensor = sharded.full_tensor()
    return from_torch(copies.of(tensor) if copies and not refusal(tensor) else tensor)


def as_leaf(raw: Any, copies: Copies | None = None) -> Tensor | Scalar | None:
    """Live tensors, or copies of them, and NumPy's scalars as Python numbers."""
    if isinstance(raw, torch.Tensor):
        return leaf_of(_content(raw, copies if raw.dim() else None))  # the value of one without axes is read at once
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(raw, numpy.generic) and not isinstance(raw, (numpy.str_, numpy.bytes_)):
        return cast("None", raw.item())
    return None


def _leaf(name: str, part: Part | None, copies: Copies | None) -> Leaf:
    """Return what reads the slots of a parameter; those of a part stand for the whole parameter's."""

    def leaf(raw: Any) -> Tensor | Scalar | None:
        if part and isinstance(raw, torch.Tensor) and raw.shape == (part.count,):
            return _part_content(name, part, raw, copies) if part.shape else as_leaf(raw[0])
        return as_leaf(raw, copies)

    return cast("Leaf", leaf)


def _part_content(name: str, part: Part, local: torch.Tensor, copies: Copies | None) -> Tensor:
    from lora_state_format.torch.spread import run

    return run(name, part.shape, part.start, local, copies)


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

    Raises ``CaptureError`` if the optimizer holds parameters that the model does not have, or takes a step meanwhile,
    and ``UnrepresentableError`` for a value that no file can hold, naming the parameter and the slot.
    """
    named = named_tensors(model)
    if named.parts:
        raise CaptureError(
            "FSDP has cut the parameters up: call save_optimizer on every rank, which brings them together"
        )
    copies = Copies() if copy else None
    return capture_parts(optimizer, model, named, weights=weights, extra=extra, global_step=global_step, copies=copies)


@torch.no_grad()  # else every look at a DTensor's own part goes through autograd: a third of the time of a small copy
def capture_parts(
    optimizer: Optimizers,
    model: Models,
    named: Named,
    *,
    weights: bool,
    extra: Mapping[str, Any] | None,
    global_step: int | None,
    copies: Copies | None,
) -> OptimizerState:
    """Return what ``capture`` does, with the slots of this rank where parameters are cut up.

    A parameter of which this rank has no elements has no state here. Of ``copies`` those that were promised before are
    made, too.
    """
    optimizers = optimizers_of(optimizer)
    versions = Versions(optimizers)
    reader = Reader(cast("Leaf", partial(as_leaf, copies=copies)))
    groups: list[Group] = []
    parameters: dict[str, Parameter] = {}
    for place, (number, group, names) in enumerate(grouped(optimizers, named)):
        options = tuple(group_options(reader, group, f"group {place}"))
        groups.append(Group(number, options, len(names), group_name(group)))
        for name in names:
            parameters[name] = _parameter(optimizers[number], name, named, group, weights, copies)
    members = tuple(parameters)
    for found in optimizers:
        for name in _groupless(found, named):
            if name not in parameters:
                parameters[name] = _parameter(found, name, named, {}, weights, copies)
    for carried in kept(named.tensors.values(), members):
        own = parameters.setdefault(carried.name, carried)
        if own.state is None:  # its parameter came back, and has not taken a step since
            parameters[carried.name] = replace(own, state=carried.state)
    found_globals = _globals(reader, optimizers)
    found_extra = _extra(reader, extra or {})
    if copies:
        copies.make()
        versions.check_unchanged()
    return OptimizerState(
        optimizers=tuple(Optimizer(class_path(type(stepper(found)))) for found in optimizers),
        groups=tuple(groups),
        parameters=tuple(parameters.values()),
        naming=Naming("model"),
        globals=found_globals,
        origin={
            "format": "torch",
            "torch": str(torch.__version__),
            **_scalings(parameters.values(), named),
            **_origin([*map(stepper, optimizers)], parameters, named),
        },
        extra=found_extra,
        global_step=global_step,
        resources=() if copies else (versions,),
    )


def _entry(optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> Mapping[str, Any] | None:
    """Return a parameter's slots; those of optimizers inside this one stand under the attribute that holds them."""
    slots = optimizer.state.get(tensor)
    nested = {name: entry for name, held in inner(optimizer).items() if (entry := _entry(held, tensor)) is not None}
    if slots is not None and (taken := nested.keys() & slots.keys()):
        raise UnrepresentableError(f"the slot '{taken.pop()}' is called like the attribute that holds an optimizer")
    return None if slots is None and not nested else {**(slots or {}), **nested}


def _groupless(optimizer: torch.optim.Optimizer, named: Named) -> Iterator[str]:
    """Yield the parameters that an optimizer keeps state of; those in no group are carried."""
    for found in stepping(optimizer):
        for key in found.state:
            if not isinstance(key, torch.Tensor):
                continue
            if id(key) not in named.names:
                raise CaptureError(
                    f"the optimizer keeps state of a tensor of shape {list(key.shape)} that is in none of its groups "
                    "and not in the model; delete it from optimizer.state"
                )
            yield named.names[id(key)]


def _origin(
    optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, Parameter], named: Named
) -> Mapping[str, Value]:
    """Return what a load has to know of the optimizers besides their state; warn about what is not saved."""
    lineages = {class_path(kind): lineage_of(kind) for kind in map(type, optimizers)}
    ancestors: dict[str, Value] = {
        path: list(lineage[1:]) for path, lineage in lineages.items() if path not in CLASSES and len(lineage) > 1
    }
    classes: dict[str, Value] = {
        str(number): {name: class_path(type(value)) for name, value in held.items()}
        for number, optimizer in enumerate(optimizers)
        if (held := wrapped(optimizer))
    }
    tokens: dict[str, Value] = {
        name: list(layer.tokens) for name in parameters if (layer := named.layers.get(name)) and layer.tokens
    }
    lost: list[Value] = []
    for optimizer in optimizers:
        for path, kind in outside(optimizer):
            title = type(optimizer).__name__
            lost.append(f"{title}.{path}, a {kind}")
            logger.warning(
                "%s keeps a %s in its attribute %s, outside its state: it is not saved, and a load will say so",
                title,
                kind,
                path,
            )
    every: dict[str, Value] = {CLASSES_OF: ancestors, INNER: classes, TOKENS: tokens, OUTSIDE: lost}
    return {key: value for key, value in every.items() if value}


def weights_of(named: Named, name: str, copies: Copies | None = None) -> Tensor:
    """Return a parameter's own bytes, or those of a copy to be made; of a sharded one they arrive inside ``gather``."""
    part, tensor = named.parts.get(name), named.tensors[name]
    if part is None or part.own is None:
        return _content(tensor, copies)
    return _part_content(name, part, part.own, copies) if part.shape else _content(part.own.reshape(()), copies)


def _parameter(
    optimizer: torch.optim.Optimizer,
    name: str,
    named: Named,
    options: Mapping[str, Any],
    weights: bool,
    copies: Copies | None,
) -> Parameter:
    parts, key, tensor, part = split_adapter(name), peft_key(name), named.tensors[name], named.parts.get(name)
    entry = _entry(optimizer, tensor) if part is None or part.count else None
    return Parameter(
        name=name,
        shape=named.shape(name),
        state=None if entry is None else _slots(Reader(_leaf(name, part, copies)), name, named, entry, options),
        dtype=dtype_name(tensor.dtype),
        adapter=parts[1] if parts else None,
        tied=named.tied.get(name, ()),
        foreign_names={"peft": key[0]} if key else {},
        weights=digest_of(tensor) if weights else None,
    )


def _scalings(parameters: Iterable[Parameter], named: Named) -> Mapping[str, Value]:
    """Return alpha / r by adapter, and by parameter where it differs from that of the adapter's first."""
    found: dict[str, Value] = {}
    for parameter in parameters:
        layer = named.layers.get(parameter.name)
        scale = layer.scaling if layer else None
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
    fitted: Mapping[str, Value] = mapped(slots, lambda leaf, _: _fitted(leaf, named.shape(name)))
    for path, slot in walk(fitted) if name in named.parts else ():
        if isinstance(slot, Slot) and slot.role is not Role.PARAM:
            raise UnrepresentableError(
                f"'{name}': slot '{'.'.join(map(str, path))}' has role {slot.role.value}, and FSDP brings only slots "
                "of the parameter's own elements together"
            )
    return fitted


def _fitted(leaf: Value, shape: tuple[int, ...]) -> Value:
    """Return a slot that is called like one of the parameter's shape, and has another, as an opaque one."""
    if isinstance(leaf, Slot) and leaf.role is Role.PARAM and leaf.tensor.shape != shape:
        return Slot(leaf.tensor, order=memory_order(leaf.tensor))
    return leaf


def _globals(reader: Reader, optimizers: Sequence[torch.optim.Optimizer]) -> Mapping[str, Value]:
    """Return what belongs to no parameter, as ``state_dict.from_state_dict`` lays it out."""
    found: dict[str, Value] = {}
    for number, optimizer in enumerate(optimizers):
        own = {
            **_loose(reader, optimizer),
            **{key: reader.value(raw, (key,)) for key, raw in beside(stepper(optimizer)).items()},
        }
        if own:
            found |= {str(number): own} if len(optimizers) > 1 else own
    return found


def _loose(reader: Reader, optimizer: torch.optim.Optimizer) -> dict[str, Value]:
    """Return the state under keys that are no parameters; of optimizers inside under the attribute that holds them."""
    own = {
        key: reader.value(raw, ("state", key))
        for key, raw in cast("Mapping[Any, Any]", optimizer.state).items()
        if not isinstance(key, torch.Tensor)
    }
    nested = {name: found for name, held in inner(optimizer).items() if (found := _loose(reader, held))}
    return {**({"state": own} if own else {}), **nested}


def _extra(reader: Reader, extra: Mapping[str, Any]) -> Mapping[str, Value]:
    values = {key: reader.value(raw, ("extra", key)) for key, raw in extra.items()}
    for path, value in walk(values):
        if isinstance(value, Slot):
            raise UnrepresentableError(f"extra.{'.'.join(map(str, path))} is a tensor; extra holds plain values only")
    return values
