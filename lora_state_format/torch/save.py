"""Save the state of an optimizer under the names of the model's parameters."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from lora_state_format.errors import OptionError
from lora_state_format.format import writing
from lora_state_format.format.rotation import plan_rotation, remove_states, series_of
from lora_state_format.io.atomic import made_folders
from lora_state_format.io.remote import is_remote, spelled
from lora_state_format.optimizers.rounded import check_stored, stored
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
from lora_state_format.torch.tensors import Copies

if TYPE_CHECKING:
    from lora_state_format.torch.together import Captured

__all__ = ["save_optimizer"]

logger = logging.getLogger("lora_state_format")

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
    keep_last: int | None = None,
    store: Mapping[str, str] | None = None,
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
    keep_last: int | None = None,
    store: Mapping[str, str] | None = None,
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
    keep_last: int | None = None,
    store: Mapping[str, str] | None = None,
) -> writing.Written | BackgroundSave:
    """Write the state of an optimizer, or of several, under the model's names; see ``capture``.

    An older file at the path is replaced, as a training loop wants it; it stays whole until the new one is. Folders on
    the way are made. The path may be a URL of an object store (``s3://``), to which the file is sent when it is whole.
    With ``force=False`` an existing file is a ``TargetExistsError``. The optimizer is only read: no step is run, and
    gradients may be there.

    The optimizer of a sharded model (FSDP2, tensor parallel, FSDP1 with ``use_orig_params=True``) is saved by all ranks
    together: call this on every one. Each writes files of its own, of about the same size; a state under 32 MiB is one
    file, and so is any with ``consolidate=True``. If a rank fails, all raise, and the path means what it meant before.
    ``extra`` is that of rank 0.

    With ``keep_last`` older checkpoints of the run lose their optimizer's state when this one is written, all but the
    last ones; everything else in them stays. Of a run are the states at paths that differ from this one in the numbers
    of a folder's name, as in ``checkpoint-300/training_state/optimizer.safetensors``.

    ``store={"exp_avg": "BF16", "exp_avg_sq": "BF16"}`` rounds these slots to half their bytes. That is lossy, the file
    and every report say so, and a load into float32 parameters needs ``dtype="param"``.

    With ``background=True`` the state is copied into the host's memory and written behind the run; what is returned
    has ``wait()``. The save before, if it is still being written, is waited for, and its error raised here. Of a
    sharded model each rank copies its part; call ``wait()`` before ``destroy_process_group``.
    """
    path = Path(path)
    if keep_last is not None:
        plan_rotation([], keep_last)  # refuses what is no number of checkpoints, before anything is written
    check_stored(store or {})
    capturing: dict[str, Any] = {"extra": extra, "global_step": global_step}

    def whole() -> Callable[[], writing.Written]:
        state = capture(optimizer, model, weights=weights, copy=background, **capturing)
        state = stored(state, store).state if store else state
        with made_folders(path):
            return lambda: _rotated(writing.write(state, path, force=force, max_shard_size=max_shard_size), keep_last)

    def together() -> Callable[[], writing.Written]:
        import torch.distributed as dist

        from lora_state_format.torch.ranks import background_group
        from lora_state_format.torch.together import write_together

        group = background_group() if background else None
        captured = _attempt(lambda: _captured(optimizer, model, weights, background, capturing, store or {}))

        def write() -> writing.Written:
            written = write_together(
                captured, path, force=force, max_shard_size=max_shard_size, consolidate=consolidate, group=group
            )
            return _rotated(written, keep_last if dist.get_rank(group) == 0 else None)

        return write

    prepare = together if sharding(optimizer, model) else whole
    if is_remote(path):
        _check_remote(path, together=prepare is together, keep_last=keep_last)
    if background:
        return start(prepare)
    settle()
    return prepare()()


def _check_remote(path: Path, *, together: bool, keep_last: int | None) -> None:
    """Raise ``OptionError`` for what is not done in an object store."""
    if together:
        raise OptionError(
            f"{spelled(path)}: the ranks of a sharded model write into a folder that all of them see; save there, then "
            f"convert(that path, {spelled(path)!r})"
        )
    if keep_last is not None:
        raise OptionError(
            f"{spelled(path)}: keep_last removes files of a folder, and this is a URL; leave keep_last out"
        )


def _rotated(written: writing.Written, keep_last: int | None) -> writing.Written:
    """Remove older states of the run, now that a newer one is on the disk."""
    if keep_last is not None:
        path = Path(written.path)
        rotation = plan_rotation(series_of(path), keep_last, always=path)
        remove_states(rotation.removed)
        for removed in rotation.removed:
            logger.info("%s: removed, for keep_last=%d", removed, keep_last)
    return written


def _captured(
    optimizer: Optimizers,
    model: Models,
    weights: bool,
    copy: bool,
    capturing: Mapping[str, Any],
    store: Mapping[str, str],
) -> Captured:
    """Return what this rank has of a sharded state."""
    from lora_state_format.torch.together import Captured

    named, copies = named_tensors(model), Copies() if copy else None
    state = capture_parts(optimizer, model, named, weights=False, copies=copies, **capturing)
    names = [parameter.name for parameter in state.parameters if parameter.name in named.tensors] if weights else []
    own = {name: weights_of(named, name, copies) for name in names}
    if copies:
        copies.make()
    return Captured(state, own, named.parts, store)


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
