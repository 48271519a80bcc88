"""transformers' Trainer, and what is built on it (TRL)."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from lora_state_format.errors import FileError, OptionError
from lora_state_format.foreign.elsewhere import TRAINER
from lora_state_format.format.envelope import is_state
from lora_state_format.integrations import STATE
from lora_state_format.torch import load_optimizer, load_scheduler, save_optimizer
from lora_state_format.torch.schedules import rate_of

__all__ = ["last_checkpoint", "with_named_state"]

logger = logging.getLogger("lora_state_format")

T = TypeVar("T")

SAVE: Final = "_save_optimizer_and_scheduler"
LOAD: Final = "_load_optimizer_and_scheduler"
LOAD_WEIGHTS: Final = "_load_from_checkpoint"
METHODS: Final[Mapping[str, list[str]]] = {SAVE: ["output_dir"], LOAD: ["checkpoint"]}
"""The Trainer's own methods that are wrapped, and their arguments, as they are in transformers 5.23."""

SCHEDULER: Final = "scheduler.pt"
LEGACY: Final = "optimizer.pt"


def with_named_state(
    trainer: T, *, drop_legacy: bool = False, weights: bool = True, keep_last: int | None = None, **policies: Any
) -> T:
    """Return the same trainer; from now on it saves its optimizer by name, and resumes by name.

    Each ``checkpoint-N`` gets ``training_state/optimizer.safetensors``, before older checkpoints are removed and before
    anything is pushed. ``drop_legacy`` keeps the state out of ``optimizer.pt``, so that it is stored once; such a
    checkpoint can be resumed by a trainer that went through this function only, and a plain one stops and says so.
    ``weights`` keeps digests of the weights with it.

    ``trainer.train(resume_from_checkpoint=...)`` binds by name, with the ``policies`` of ``load_optimizer``: after
    groups, target modules or the adapter's name have changed, too. A checkpoint without names is bound by order, with a
    warning. Where a plain Trainer starts cold without a word, since a file is missing, this raises. With
    ``options={"lr": "current"}`` the run goes on with the rate and the schedule of its own arguments, from the step
    that it had reached.

    Under FSDP and DeepSpeed's ZeRO all processes save and load together, and a checkpoint goes into another number of
    them as far as the Trainer loads its weights there: under DeepSpeed it loads that one's own folder first, which is
    bound to the number of processes.

    ``keep_last`` is that of ``save_optimizer``: older checkpoints keep their weights and lose their state.

    Raises ``OptionError`` for a Trainer whose methods take other arguments than the ones that are known here, and for
    ``drop_legacy`` where the Trainer writes weights and optimizer by one method (FSDP, DeepSpeed).
    """
    sharded = _check(trainer)
    if sharded and drop_legacy:
        raise OptionError(
            f"drop_legacy=True: with {sharded} Trainer writes weights and optimizer by one method; leave it out"
        )
    owner: Any = trainer
    save, load_weights = getattr(owner, SAVE), getattr(owner, LOAD_WEIGHTS)

    def named_save(output_dir: str) -> None:
        if sharded or owner.args.should_save:
            path, step = Path(output_dir, STATE), owner.state.global_step
            save_optimizer(owner.optimizer, owner.model, path, weights=weights, global_step=step, keep_last=keep_last)
        if not drop_legacy:
            save(output_dir)
        elif owner.args.should_save:
            torch.save(owner.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER))
            Path(output_dir, LEGACY).write_bytes(TRAINER)

    def named_load(checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load_optimizer(owner.optimizer, owner.model, checkpoint, **policies)
        path = Path(checkpoint, SCHEDULER)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file; without it the learning rate would start over")
        load_scheduler(owner.lr_scheduler, torch.load(path, weights_only=True), lr=rate_of(policies))

    def named_load_weights(checkpoint: str, *others: Any, **named: Any) -> None:
        try:
            load_weights(checkpoint, *others, **named)
        except KeyError as error:
            raise _incomplete(checkpoint, error, owner) from error

    setattr(owner, SAVE, named_save)
    setattr(owner, LOAD, named_load)
    setattr(owner, LOAD_WEIGHTS, named_load_weights)
    return trainer


def _incomplete(checkpoint: str, error: KeyError, trainer: Any) -> Exception:
    """Return what to say where PEFT misses a module of ``modules_to_save`` in an adapter: the adapter had none."""
    adapter = Path(checkpoint, "adapter_model.safetensors")
    if not adapter.exists() or not hasattr(trainer.model, "peft_config"):
        return error
    return FileError(
        f"has no {error.args[0]!r}, which this model saves with its adapter (modules_to_save): PEFT does not load an "
        "adapter without it\nhint: to start that module from the model, load the rest with "
        f"set_peft_model_state_dict(model, get_peft_model_state_dict(model) | load_file({str(adapter)!r})), then "
        "trainer.create_optimizer_and_scheduler(...), load_optimizer(trainer.optimizer, model, "
        f"{checkpoint!r}, missing='fresh') and train() without resume_from_checkpoint",
        path=adapter,
    )


def last_checkpoint(folder: str | Path) -> str | None:
    """Return the newest ``checkpoint-N`` in a Trainer's output folder that was written to its end, or ``None``.

    Trainer's ``resume_from_checkpoint=True`` takes the newest folder, which a killed run may have left half-written.
    """
    paths = Path(folder).glob("checkpoint-*")
    steps = [(int(found[1]), path) for path in paths if (found := _NUMBER.fullmatch(path.name))]
    whole = (path for _, path in sorted(steps, reverse=True) if (path / "trainer_state.json").exists())
    return next((str(path) for path in whole if is_state(path / STATE)), None)


_NUMBER: Final = re.compile(r"checkpoint-(\d+)")


def _check(trainer: Any) -> str | None:
    """Return what shards a Trainer's optimizer, if anything. Raises ``OptionError`` for an unknown Trainer."""
    for name, expected in METHODS.items():
        method = getattr(trainer, name, None)
        found = list(inspect.signature(method).parameters) if method else None
        if found != expected:
            import transformers

            stated = "does not exist" if found is None else f"takes ({', '.join(found)})"
            raise OptionError(
                f"{type(trainer).__name__}.{name} {stated}, where ({', '.join(expected)}) was expected: transformers "
                f"{transformers.__version__} is not known here; call save_optimizer and load_optimizer yourself"
            )
    return next((kind for kind in ("deepspeed", "fsdp") if getattr(trainer, f"is_{kind}_enabled", False)), None)
