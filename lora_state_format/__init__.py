"""Optimizer state keyed by parameter name, in safetensors.

``convert`` makes a file out of a checkpoint, ``open_state`` opens one, ``read`` reads any known format, ``write`` and
``verify`` do what they say, ``diff`` compares two states, ``export`` takes one slot out, ``check`` tells whether
a state would bind to a model; ``errors`` holds what they raise. Saving and loading in a training loop is in
``lora_state_format.torch``. Names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_state_format import errors
    from lora_state_format.binding.plan import LoadPlan
    from lora_state_format.format.reading import Verification, open_state, verify
    from lora_state_format.format.writing import Written, write
    from lora_state_format.model.states import OptimizerState, Parameter
    from lora_state_format.model.tensors import Tensor
    from lora_state_format.operations.check import check
    from lora_state_format.operations.conversion import ConversionReport, convert, read
    from lora_state_format.operations.diff import Difference, diff
    from lora_state_format.operations.export import Exported, export

__all__ = [
    "ConversionReport",
    "Difference",
    "Exported",
    "LoadPlan",
    "OptimizerState",
    "Parameter",
    "Tensor",
    "Verification",
    "Written",
    "check",
    "convert",
    "diff",
    "errors",
    "export",
    "open_state",
    "read",
    "verify",
    "write",
]

__version__ = "0.1.0"

_HOMES = {
    "ConversionReport": "operations.conversion",
    "Difference": "operations.diff",
    "Exported": "operations.export",
    "LoadPlan": "binding.plan",
    "OptimizerState": "model.states",
    "Parameter": "model.states",
    "Tensor": "model.tensors",
    "Verification": "format.reading",
    "Written": "format.writing",
    "check": "operations.check",
    "convert": "operations.conversion",
    "diff": "operations.diff",
    "export": "operations.export",
    "open_state": "format.reading",
    "read": "operations.conversion",
    "verify": "format.reading",
    "write": "format.writing",
}
"""Public name -> its module below the package."""


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("lora_state_format.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_state_format' has no attribute '{name}'")
    return getattr(import_module(f"lora_state_format.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
