"""Trainer's ``optim_target_modules``: GaLore, as one optimizer and as one for each layer in the backward pass."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_state_format import open_state
from lora_state_format.integrations.transformers import with_named_state

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

STATE = "training_state/optimizer.safetensors"


@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adamw_layerwise"])
def test_a_run_goes_on_exactly(optim: str, tmp_path: Path) -> None:
    loop = runpy.run_path(str(Path(__file__).parent / "runs" / "trainer_run.py"))

    def make() -> Any:
        model = loop["build"]().unload().requires_grad_(True)
        return with_named_state(
            loop["make"](
                tmp_path,
                model=model,
                optim=optim,
                optim_target_modules=[".*(q_proj|down_proj).*"],
                optim_args="rank=4,update_proj_gap=2,scale=0.25",
                lr_scheduler_type="constant",
            )
        )

    whole = make()
    whole.train()
    with open_state(tmp_path / "checkpoint-4" / STATE) as state:
        names = {name for name, _ in whole.model.named_parameters()}
        assert set(state) == names
        assert len(state.optimizers) == (len(names) if optim.endswith("layerwise") else 1)
        assert "projector" in state["model.layers.0.self_attn.q_proj.weight"]
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for own, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(own, other)
