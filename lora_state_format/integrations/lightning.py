"""Lightning: a callback that keeps the optimizers' state beside each ``.ckpt``, and out of it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import OptionError
from lora_state_format.foreign.elsewhere import LIGHTNING, beside, is_lightning
from lora_state_format.format.envelope import is_state
from lora_state_format.format.rotation import remove_states
from lora_state_format.torch import load_optimizer, load_scheduler, save_optimizer
from lora_state_format.torch.schedules import rate_of

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.plugins import CheckpointIO
    from lightning.pytorch.strategies import Strategy
except ImportError:
    from pytorch_lightning import Callback
    from pytorch_lightning.plugins import CheckpointIO
    from pytorch_lightning.strategies import Strategy

__all__ = ["NamedState"]

STATES: Final = "optimizer_states"
SCHEDULERS: Final = "lr_schedulers"


class NamedState(Callback):  # type: ignore[misc]
    """Saves the optimizers' state of ``name.ckpt`` as ``name.training_state/optimizer.safetensors``; resumes from it.

    ``model`` is the attribute of the LightningModule whose parameters are trained, if names are to be those of that
    model, as every other framework has them; else they begin with the attribute's name. ``weights`` keeps digests of
    the weights with the state. Resuming binds by name, with the ``policies`` of ``load_optimizer``; with
    ``options={"lr": "current"}`` the run goes on with the rate and the schedulers of its own ``configure_optimizers``.

    The state is on the disk before the ``.ckpt`` is begun, and goes when that is removed. ``keep_last`` is that of
    ``save_optimizer``. Raises ``OptionError`` for a strategy that saves in its own way (FSDP, DeepSpeed).
    """

    def __init__(
        self, model: str | None = None, *, weights: bool = True, keep_last: int | None = None, **policies: Any
    ) -> None:
        self._model = model
        self._weights = weights
        self._keep_last = keep_last
        self._policies = policies
        self._resumed: tuple[Path, list[Any]] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse strategies that save checkpoints in their own way."""
        if type(trainer.strategy).save_checkpoint is not Strategy.save_checkpoint:
            raise OptionError(
                f"{type(trainer.strategy).__name__} saves optimizers in its own way, of which NamedState cannot be a "
                "part: leave it out, call save_optimizer(trainer.optimizers, trainer.lightning_module, path) on every "
                "rank next to trainer.save_checkpoint, and load_optimizer(...) of the same in on_train_start"
            )
        if not isinstance(trainer.strategy.checkpoint_io, _Beside):
            trainer.strategy.checkpoint_io = _Beside(trainer.strategy.checkpoint_io, self, trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Load the state of the checkpoint that the run resumes."""
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            return
        path, schedulers = resumed
        load_optimizer(trainer.optimizers, self._named(trainer), path, **self._policies)
        for config, saved in zip(trainer.lr_scheduler_configs, schedulers, strict=False):
            load_scheduler(config.scheduler, saved, lr=rate_of(self._policies))

    def save(self, trainer: Any, path: Path) -> None:
        """Save the optimizers' state next to a checkpoint."""
        step = trainer.global_step
        save_optimizer(
            trainer.optimizers,
            self._named(trainer),
            path,
            weights=self._weights,
            global_step=step,
            keep_last=self._keep_last,
        )

    def resume(self, path: Path, schedulers: list[Any]) -> None:
        """Remember the checkpoint that the run resumes, and the states of its schedulers."""
        self._resumed = path, schedulers

    @property
    def state_key(self) -> str:
        """What Lightning calls this callback where a run resumes without it."""
        return (
            "lora_state_format.integrations.lightning.NamedState, which keeps the optimizers in NAME.training_state "
            "next to NAME.ckpt"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return something, so that Lightning looks for this callback when a run resumes."""
        return {"optimizers": "by name"}

    def _named(self, trainer: Any) -> Any:
        module = trainer.lightning_module
        return module if self._model is None else getattr(module, self._model)


class _Beside(CheckpointIO):  # type: ignore[misc]
    """Hands on to another one all but the optimizers' state."""

    def __init__(self, inner: Any, callback: NamedState, trainer: Any) -> None:
        self.inner = inner
        self._callback = callback
        self._trainer = trainer

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if STATES in checkpoint:
            self._callback.save(self._trainer, beside(path))
            checkpoint = {**checkpoint, STATES: LIGHTNING}
        self.inner.save_checkpoint(checkpoint, path, storage_options=storage_options)

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        checkpoint: dict[str, Any] = self.inner.load_checkpoint(path, *arguments, **options)
        if is_lightning(checkpoint.get(STATES)):
            state = beside(path)
            if not is_state(state):
                raise FileNotFoundError(
                    f"{state}: no such file; the optimizers of {path} were saved there. Copy or rename the folder "
                    f"{state.parent.name} together with the .ckpt"
                )
            self._callback.resume(state, checkpoint.get(SCHEDULERS, []))
            checkpoint[STATES], checkpoint[SCHEDULERS] = [], []
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        self.inner.remove_checkpoint(path)
        state = beside(path)
        if state.parent.is_dir():
            remove_states([state])
            with contextlib.suppress(OSError):  # what is not ours stays, and so does its folder
                state.parent.rmdir()

    def teardown(self) -> None:
        self.inner.teardown()
