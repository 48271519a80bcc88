"""A run of Lightning that keeps its optimizer by name, and that can be killed while it saves.

``python lightning_run.py FOLDER CALL COUNT``: SIGKILL at the COUNT-th call of ``os.CALL`` while step=4.ckpt is written.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lora_state_format.integrations.lightning import NamedState

_trainer = runpy.run_path(str(Path(__file__).with_name("trainer_run.py")))


class Module(pl.LightningModule):  # type: ignore[misc]
    """A LoRA model under fused AdamW; the batch depends on the step alone, whatever the loader says."""

    def __init__(self, order: int = 1, lr: float = 1e-2, plateau: bool = False) -> None:
        super().__init__()
        self.model = _trainer["build"]()
        self._order = order
        self._lr = lr
        self._plateau = plateau
        self._rows = torch.stack([row["input_ids"] for row in _trainer["rows"]()])

    def training_step(self, _batch: Any, _index: int) -> torch.Tensor:
        step = self.global_step
        tokens = self._rows[4 * step : 4 * step + 4]
        loss: torch.Tensor = self.model(input_ids=tokens, labels=tokens).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters[:: self._order], lr=self._lr, fused=True)
        if self._plateau:  # no loss is better by 10 than the first, so each of the others halves the rate
            halving = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "min", 0.5, 0, 10.0, "abs")
            monitored = {"scheduler": halving, "interval": "step", "monitor": "loss"}
            return {"optimizer": optimizer, "lr_scheduler": monitored}
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def make(folder: Path, *callbacks: Any, steps: int = 6, **options: Any) -> Any:
    """A trainer for 6 steps that saves every second one into the folder."""
    checkpoint = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, **{"save_top_k": -1, **options})
    return pl.Trainer(
        max_steps=steps,
        callbacks=[checkpoint, *callbacks],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def loader() -> Any:
    return torch.utils.data.DataLoader(torch.zeros(64), batch_size=1)  # type: ignore[arg-type]


def main(folder: str, call: str, count: str) -> None:
    class Armed(NamedState):
        def save(self, trainer: Any, path: Path) -> None:
            if trainer.global_step == 4:
                _trainer["kill_at"](call, int(count))
            super().save(trainer, path)

    make(Path(folder), Armed("model")).fit(Module(), loader())


if __name__ == "__main__":
    main(*sys.argv[1:])
