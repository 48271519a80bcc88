"""accelerate's ``save_state`` and ``load_state``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from lora_state_format.errors import OptionError
from lora_state_format.format.envelope import is_state
from lora_state_format.integrations import STATE
from lora_state_format.torch import load_optimizer, load_scheduler, save_optimizer
from lora_state_format.torch.schedules import rate_of

__all__ = ["with_named_state"]

logger = logging.getLogger("lora_state_format")

T = TypeVar("T")


def with_named_state(
    accelerator: T,
    *,
    models: Mapping[str, Any] | None = None,
    drop_legacy: bool = False,
    weights: bool = True,
    keep_last: int | None = None,
    **policies: Any,
) -> T:
    """Return the same accelerator; from now on its ``save_state`` and ``load_state`` keep optimizers by name.

    The folder gets ``training_state/optimizer.safetensors``: of all prepared optimizers, over all prepared models. Of
    several models each has a key that leads its parameters' names: those of ``models``, else ``model``, ``model_1`` and
    so on, as accelerate calls their files. ``drop_legacy`` leaves ``optimizer.bin`` out; ``weights`` keeps digests of
    the weights with the state; ``keep_last`` is that of ``save_optimizer``.

    ``load_state`` binds by name, with the ``policies`` of ``load_optimizer``, after it has loaded everything else. A
    folder without named state is loaded as accelerate does it, with a warning. With ``options={"lr": "current"}`` the
    run goes on with the rate and the schedulers that were prepared, from the step that it had reached.

    Optimizers that FSDP or DeepSpeed's ZeRO shards are saved and loaded by all processes together, and go into another
    number of processes. DeepSpeed keeps weights and optimizer in one checkpoint of its own, which it goes on writing;
    of that, only the weights are loaded.

    Raises ``OptionError`` for an accelerator that shards in another way (Megatron-LM), and for ``drop_legacy`` with
    DeepSpeed.
    """
    owner: Any = accelerator
    kind = str(getattr(owner.distributed_type, "value", owner.distributed_type))
    if kind == "MEGATRON_LM":
        raise OptionError(f"the optimizer is sharded by {kind}, which saves and loads it in its own way")
    if kind == "DEEPSPEED" and drop_legacy:
        raise OptionError("drop_legacy=True: DeepSpeed writes weights and optimizer by one method; leave it out")
    save_state, load_state = owner.save_state, owner.load_state

    def named(prepared: list[Any]) -> Any:
        if models is not None or len(prepared) == 1:
            return models or prepared[0]
        return {f"model_{number}" if number else "model": model for number, model in enumerate(prepared)}

    def save(*arguments: Any, **options: Any) -> Any:
        with _hidden(owner._optimizers, drop_legacy) as found:

            def hook(_models: list[Any], _weights: list[Any], folder: str) -> None:
                if owner.is_main_process or owner.distributed_type in ("FSDP", "DEEPSPEED"):
                    path = Path(folder, STATE)
                    save_optimizer(found, named(owner._models), path, weights=weights, keep_last=keep_last)

            handle = owner.register_save_state_pre_hook(hook)
            try:
                return save_state(*arguments, **options)
            finally:
                handle.remove()

    def load(*arguments: Any, **options: Any) -> None:
        folders: list[str] = []
        handle = owner.register_load_state_pre_hook(lambda _, folder: folders.append(folder))
        only_weights = {"load_optimizer_states": False} if owner.distributed_type == "DEEPSPEED" else {}
        # Else the order in accelerate's own files would decide, if there are some, and the rates in them.
        with _hidden(owner._optimizers) as found, _hidden(owner._schedulers) as schedulers:
            try:
                load_state(*arguments, **{**only_weights, **options})
            finally:
                handle.remove()
        path = Path(folders[0], STATE)
        if is_state(path):
            load_optimizer(found, named(owner._models), path, **policies)
            for number, scheduler in enumerate(schedulers):
                file = Path(folders[0], f"scheduler_{number}.bin" if number else "scheduler.bin")
                load_scheduler(scheduler, torch.load(file, weights_only=True), lr=rate_of(policies))
        else:
            logger.warning("%s: no named state; accelerate loads its optimizers by order", folders[0])
            load_state(*arguments, **options)

    owner.save_state, owner.load_state = save, load
    return accelerator


@contextmanager
def _hidden(listed: list[Any], hide: bool = True) -> Iterator[list[Any]]:
    """Give what is in a list of the accelerator's, and hide it from accelerate meanwhile."""
    found = list(listed)
    if hide:
        listed.clear()
    try:
        yield found
    finally:
        listed[:] = found
