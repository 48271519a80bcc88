"""Save the state of an optimizer under the names of the model's parameters."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, overload

import torch

from lora_state_format.errors import CaptureError, OptionError
from lora_state_format.format import writing
from lora_state_format.torch.background import BackgroundSave, settle, start
from lora_state_format.torch.capture import (
    Models,
    Optimizers,
    capture,
    capture_with,
    optimizers_of,
    sharding,
    with_weights,
)
from lora_state_format.torch.fsdp1 import full_state, whole_weights

__all__ = ["save_optimizer"]


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
    if kind := sharding(optimizer, model):
        if background:
            raise OptionError("background=True: the state of a sharded model is brought together while it is written")
        save = _save_together if kind == "DTensor" else _save_whole
        return save(optimizer, model, path, weights, extra, global_step, max_shard_size, force)

    def captured() -> Callable[[], writing.Written]:
        state = capture(optimizer, model, weights=weights, extra=extra, global_step=global_step, copy=background)
        path.parent.mkdir(parents=True, exist_ok=True)
        return lambda: writing.write(state, path, force=force, max_shard_size=max_shard_size)

    if background:
        return start(captured)
    settle()
    return captured()()


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

    first, *others = optimizers_of(optimizer)
    if isinstance(model, Mapping) or others:
        raise CaptureError("FullyShardedDataParallel is saved for one model and one optimizer at a time")
    entries = full_state(first, model)
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
