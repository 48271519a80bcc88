"""A loop under accelerate that keeps its optimizer by name, and that can be killed while it saves.

``python accelerate_run.py FOLDER CALL COUNT``: SIGKILL at the COUNT-th call of ``os.CALL`` while step-4 is written.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lora_state_format.integrations.accelerate import with_named_state

_trainer = runpy.run_path(str(Path(__file__).with_name("trainer_run.py")))


def start(folder: Path | None = None, *, order: int = 1, lr: float = 1e-2, **options: Any) -> tuple[Any, Any, Any, Any]:
    """The accelerator, a LoRA model, fused AdamW over its parameters in an ``order``, and a schedule."""
    accelerator = with_named_state(Accelerator(cpu=True), **{"drop_legacy": True, **options})
    model = _trainer["build"]()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters[::order], lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)
    run: tuple[Any, Any, Any, Any] = (accelerator, *accelerator.prepare(model, optimizer, schedule))
    if folder is not None:
        accelerator.load_state(str(folder))
    return run


def train(run: tuple[Any, Any, Any, Any], steps: Iterable[int], folder: Path | None = None) -> dict[str, torch.Tensor]:
    """Go on through these steps, saving every second one; the trained weights at the end."""
    accelerator, model, optimizer, schedule = run
    rows = _trainer["rows"]()
    for step in steps:
        tokens = torch.stack([row["input_ids"] for row in rows[4 * step : 4 * step + 4]])
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if folder is not None and step % 2:
            accelerator.save_state(str(folder / f"step-{step + 1}"))
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def main(folder: str, call: str, count: str) -> None:
    run = start()
    train(run, range(3), Path(folder))
    _trainer["kill_at"](call, int(count))
    train(run, range(3, 4), Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
