"""Save the state of an optimizer under the names of the model's parameters."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from lora_state_format.format import writing
from lora_state_format.torch.background import BackgroundSave, settle, start
from lora_state_format.torch.capture import (
    Models,
    Optimizers,
    capture,
    capture_parts,
    named_tensors,
    sharding,
    weights_of,
)

if TYPE_CHECKING:
    from lora_state_format.torch.together import Captured

__all__ = ["save_optimizer"]

T = TypeVar("T")


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
    consolidate: bool = False,
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
    consolidate: bool = False,
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
    consolidate: bool = False,
) -> writing.Written | BackgroundSave:
    """Write the state of an optimizer, or of several, under the model's names; see ``capture``.

    An older file at the path is replaced, as a training loop wants it; it stays whole until the new one is. Folders on
    the way are made. With ``force=False`` an existing file is a ``TargetExistsError``. The optimizer is only read: no
    step is run, and gradients may be there.

    The optimizer of a sharded model (FSDP2, tensor parallel, FSDP1 with ``use_orig_params=True``) is saved by all ranks
    together: call this on every one. Each writes files of its own, of about the same size; a state under 32 MiB is one
    file, and so is any with ``consolidate=True``. If a rank fails, all raise, and the path means what it meant before.
    ``extra`` is that of rank 0.

    With ``background=True`` the state is copied into the host's memory and written behind the run; what is returned
    has ``wait()``. The save before, if it is still being written, is waited for, and its error raised here. Of a
    sharded model each rank copies its part; call ``wait()`` before ``destroy_process_group``.
    """
    path = Path(path)
    capturing: dict[str, Any] = {"extra": extra, "global_step": global_step, "copy": background}

    def whole() -> Callable[[], writing.Written]:
        state = capture(optimizer, model, weights=weights, **capturing)
        path.parent.mkdir(parents=True, exist_ok=True)
        return lambda: writing.write(state, path, force=force, max_shard_size=max_shard_size)

    def together() -> Callable[[], writing.Written]:
        from lora_state_format.torch.distributed import background_group
        from lora_state_format.torch.together import write_together

        group = background_group() if background else None
        captured = _attempt(lambda: _captured(optimizer, model, weights, capturing))
        return lambda: write_together(
            captured, path, force=force, max_shard_size=max_shard_size, consolidate=consolidate, group=group
        )

    prepare = together if sharding(optimizer, model) else whole
    if background:
        return start(prepare)
    settle()
    return prepare()()


def _captured(optimizer: Optimizers, model: Models, weights: bool, capturing: Mapping[str, Any]) -> Captured:
    """Return what this rank has of a sharded state."""
    from lora_state_format.torch.together import Captured

    named = named_tensors(model)
    state = capture_parts(optimizer, model, named, weights=False, **capturing)
    names = [parameter.name for parameter in state.parameters if parameter.name in named.tensors] if weights else []
    own = {name: weights_of(named, name, copy=capturing["copy"]) for name in names}
    return Captured(state, own, named.parts)


def _attempt(action: Callable[[], T]) -> Callable[[], T]:
    """Return what returns the result of an action, or raises what it raised: where all ranks hear of it."""
    try:
        result = action()
    except Exception as caught:
        error = caught

        def fail() -> T:
            raise error

        return fail
    return lambda: result
