"""Optimizer state keyed by parameter name, in safetensors.

``convert`` makes a file out of a checkpoint, ``open_state`` opens one, ``read`` reads any known format, ``write`` and
``verify`` do what they say, ``diff`` compares two states; ``errors`` holds what they raise. Saving and loading in a
training loop is in ``lora_state_format.torch``. Names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_state_format import errors
    from lora_state_format.format.reading import open_state, verify
    from lora_state_format.format.writing import write
    from lora_state_format.operations.conversion import convert, read
    from lora_state_format.operations.diff import diff

__all__ = ["convert", "diff", "errors", "open_state", "read", "verify", "write"]

_HOMES = {
    "convert": "lora_state_format.operations.conversion",
    "diff": "lora_state_format.operations.diff",
    "open_state": "lora_state_format.format.reading",
    "read": "lora_state_format.operations.conversion",
    "verify": "lora_state_format.format.reading",
    "write": "lora_state_format.format.writing",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("lora_state_format.errors")
    if name == "__version__":
        from importlib.metadata import version

        return version("lora_state_format")
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_state_format' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
