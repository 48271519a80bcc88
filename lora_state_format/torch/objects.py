"""Slots that are objects: torchao's quantised moments and GaLore's projectors, as mappings of plain values and back.

Only the classes named here are taken apart, and only they are ever put together again: a file cannot ask for another.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Final

import torch

from lora_state_format.errors import MissingDependencyError, UnrepresentableError
from lora_state_format.optimizers.quantised import BITSANDBYTES, TORCHAO
from lora_state_format.torch.tensors import dtype_name, dtype_of

__all__ = ["OBJECT", "flat", "outside", "packed", "unpacked"]

OBJECT: Final = "object"
"""The key by which a mapping is known to be an object; its value is the class."""

_MOMENTS: Final[Mapping[str, str]] = {
    "OptimState8bit": "torchao.optim.subclass_8bit",
    "OptimState4bit": "torchao.optim.subclass_4bit",
    "OptimStateFp8": "torchao.optim.subclass_fp8",
}
"""Class of a quantised moment -> the module that has it in this torchao; older ones had it elsewhere."""

_PROJECTORS: Final = frozenset(
    {
        "galore_torch.galore_projector.GaLoreProjector",
        "galore_torch.galore_projector_tensor.GaLoreProjectorTensor",
    }
)
"""Classes whose objects are what their attributes are."""

_BASE: Final = frozenset({"state", "param_groups", "defaults"})
_REBUILT: Final = frozenset({"name2qmap"})
"""Attributes that an optimizer's constructor fills alike each time: bitsandbytes' tables of codes."""

_DEPTH: Final = 3
"""How many containers deep ``outside`` looks into an attribute."""


def unpacked(raw: Any) -> Any:
    """Return a slot with its objects as mappings, laid out as ``torchao.unpack_torchao`` does for a pickle."""
    path = f"{type(raw).__module__}.{type(raw).__qualname__}"
    if type(raw).__name__ in _MOMENTS and path.startswith("torchao."):
        kept = {key: value for key, value in vars(raw).items() if key != "_shape"}
        return {TORCHAO: path, "dtype": dtype_name(raw.dtype), "shape": tuple(raw.shape), **kept}
    if path in _PROJECTORS:
        return {OBJECT: path, **unpacked(vars(raw))}
    if isinstance(raw, Mapping):
        return {key: unpacked(value) for key, value in raw.items()}
    return type(raw)(map(unpacked, raw)) if type(raw) in (list, tuple) else raw


def packed(tree: dict[Any, Any]) -> Any:
    """Return a mapping of live tensors as the object that it was, or as it is.

    Raises ``UnrepresentableError`` for another class than those, ``MissingDependencyError`` if its package is not
    installed.
    """
    if TORCHAO in tree:
        path = str(tree[TORCHAO])
        name = path.rpartition(".")[2]
        if name not in _MOMENTS:
            raise UnrepresentableError(f"a tensor of class {path}, which is none of {', '.join(_MOMENTS)}")
        kind = getattr(_module(_MOMENTS[name]), name)
        known = {**tree, "shape": torch.Size(tree["shape"]), "dtype": dtype_of(tree["dtype"])}
        asked = inspect.signature(kind.__init__).parameters
        return kind(**{key: value for key, value in known.items() if key in asked})
    if OBJECT in tree:
        path = str(tree[OBJECT])
        if path not in _PROJECTORS:
            raise UnrepresentableError(f"an object of class {path}, which is none of {', '.join(sorted(_PROJECTORS))}")
        module, _, name = path.rpartition(".")
        kind = getattr(_module(module), name)
        made = kind.__new__(kind)
        vars(made).update({key: value for key, value in tree.items() if key != OBJECT})
        return made
    return tree


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise MissingDependencyError(f"the state holds objects of {package}: install it to load them") from error


def flat(slots: Mapping[str, Any], lineage: tuple[str, ...]) -> Mapping[str, Any]:
    """Return a parameter's slots as the live class has them: bitsandbytes nests them in dicts since 0.49.2."""
    inner = slots.get(BITSANDBYTES)
    if not isinstance(inner, Mapping) or not any(path.startswith("bitsandbytes.") for path in lineage):
        return slots
    return {**{key: value for key, value in slots.items() if key != BITSANDBYTES}, **inner}


def outside(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str]]:
    """Path and kind of what an optimizer keeps in attributes of its own, where no state dict has it."""
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, value in vars(optimizer).items():
        if name not in _BASE and name not in _REBUILT:
            yield from _kept(value, name, parameters, _DEPTH)


def _kept(value: Any, path: str, parameters: set[int], depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, (torch.Tensor, torch.Generator, torch.optim.Optimizer)):
        if id(value) not in parameters:
            yield path, f"{type(value).__module__}.{type(value).__qualname__}"
    elif depth and isinstance(value, (Mapping, list, tuple)):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _kept(inner, f"{path}.{key}", parameters, depth - 1)
