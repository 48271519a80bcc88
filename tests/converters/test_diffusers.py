"""A checkpoint as diffusers' LoRA scripts write it: accelerate's ``save_state`` with the pipeline's own saving hook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_state_format import registry
from lora_state_format.operations.conversion import read

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]


def test_a_lora_of_a_flux_transformer(tmp_path: Path, assert_holds: Any) -> None:
    from accelerate import Accelerator
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=8,
        pooled_projection_dim=8, in_channels=4, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights="gaussian"))
    trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(list(trained.values()), lr=1e-3)
    accelerator = Accelerator(cpu=True)

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        layers = get_peft_model_state_dict(models[0])
        FluxPipeline.save_lora_weights(folder, transformer_lora_layers=layers)
        weights.pop()

    accelerator.register_save_state_pre_hook(save)
    transformer, optimizer = accelerator.prepare(transformer, optimizer)
    for _ in range(2):
        for parameter in trained.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    folder = tmp_path / "checkpoint-2"
    accelerator.save_state(str(folder))

    assert registry.detect(folder)[0].NAME == "diffusers"
    weights = registry.read(folder, "diffusers").weights
    assert {
        key.removeprefix("transformer.").replace(".lora_A.", ".lora_A.default.") for key in weights if "_A" in key
    } == {name for name in trained if "_A" in name}
    with read(folder, names=list(trained)) as state:
        assert_holds(state, {name: optimizer.state[parameter] for name, parameter in trained.items()})
        assert state.global_step == 2
