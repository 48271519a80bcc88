"""What ``integrations.lightning`` leaves in a ``.ckpt`` in place of its optimizers, and where these are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

__all__ = ["ELSEWHERE", "beside", "is_elsewhere"]

ELSEWHERE: Final = [{"state": {}, "param_groups": [], "named_state": "beside this file"}]
"""What a ``.ckpt`` has in place of its optimizers. Loading it without the callback is an error, not a cold start."""


def is_elsewhere(states: Any) -> bool:
    """Return whether these ``optimizer_states`` only say that the optimizers are next to the file."""
    return bool(states == ELSEWHERE)


def beside(path: str | os.PathLike[str]) -> Path:
    """Return where the optimizers of a checkpoint are; a link to one (``save_last="link"``) has those of its target."""
    name = os.path.realpath(path) if os.path.islink(path) else os.fspath(path)
    return Path(name.removesuffix(".ckpt") + ".training_state", "optimizer.safetensors")
