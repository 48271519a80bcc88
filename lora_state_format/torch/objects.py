"""Slots that are objects: torchao's quantised moments and GaLore's projectors, as mappings of plain values and back.

Only the classes named here are taken apart, and only they are ever put together again: a file cannot ask for another.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

import torch

from lora_state_format.errors import MissingDependencyError, UnrepresentableError
from lora_state_format.model.text import class_path
from lora_state_format.optimizers.quantised import BITSANDBYTES, TORCHAO
from lora_state_format.torch.tensors import dtype_name, dtype_of

__all__ = ["OBJECT", "flat", "packed", "unpacked"]

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


def unpacked(raw: Any) -> Any:
    """Return a slot with its objects as mappings, laid out as ``torchao.unpack_torchao`` does for a pickle."""
    path = class_path(type(raw))
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
