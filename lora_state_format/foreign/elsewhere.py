"""What the integrations leave in a framework's checkpoint in place of its optimizers, and where these are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from lora_state_format.model.sources import Source

__all__ = ["LIGHTNING", "TRAINER", "beside", "is_lightning", "is_trainer"]

LIGHTNING: Final = [{"state": {}, "param_groups": [], "named_state": "beside this file"}]
"""What a ``.ckpt`` has in place of its optimizers. Loading it without the callback is an error, not a cold start."""

TRAINER: Final = (
    b"c this checkpoint keeps its optimizer in training_state/optimizer\n"
    b"safetensors: resume it with lora_state_format.integrations.transformers.with_named_state(trainer)\n."
)
"""What ``drop_legacy`` leaves in place of ``optimizer.pt``: a pickle of nothing but a name.

A plain Trainer would start cold without a word if there were no such file. torch refuses this one, and its error shows
the name, which says where the optimizer is.
"""


def is_lightning(states: Any) -> bool:
    """Return whether these ``optimizer_states`` only say that the optimizers are next to the file."""
    return bool(states == LIGHTNING)


def is_trainer(source: Source) -> bool:
    """Return whether this ``optimizer.pt`` only says that the optimizer is next to it."""
    if source.size != len(TRAINER):
        return False
    found = bytearray(source.size)
    source.readinto(0, memoryview(found))
    return found == TRAINER


def beside(path: str | os.PathLike[str]) -> Path:
    """Return where the optimizers of a ``.ckpt`` are; a link to one (``save_last="link"``) has those of its target."""
    name = os.path.realpath(path) if Path(path).is_symlink() else os.fspath(path)
    return Path(name.removesuffix(".ckpt") + ".training_state", "optimizer.safetensors")
