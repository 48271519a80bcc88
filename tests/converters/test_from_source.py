"""Layouts read off a framework's source and laid out by hand: kohya's; and diffusers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_state_format import registry
from lora_state_format.errors import MissingNamesError
from lora_state_format.operations.conversion import convert, read

pytestmark = pytest.mark.filterwarnings("ignore")


def adam(*shapes: tuple[int, ...], seed: int = 0) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize(
    ("name", "marker"), [("kohya", "train_state.json"), ("diffusers", "pytorch_lora_weights.safetensors")]
)
def test_accelerates_files_with_another_scripts_mark(tmp_path: Path, name: str, marker: str, assert_holds: Any) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    parameters, optimizer = adam((2, 4), (4, 2))
    keys = {
        "kohya": ["lora_unet_mid_block_attn1_to_q.lora_down.weight", "lora_unet_mid_block_attn1_to_q.lora_up.weight"],
        "diffusers": ["transformer.blocks.0.to_q.lora_A.weight", "transformer.blocks.0.to_q.lora_B.weight"],
    }[name]
    torch.save(optimizer.state_dict(), folder / "optimizer.bin")
    tensors = dict(zip(keys, (p.detach() for p in parameters), strict=True))
    if name == "kohya":
        save_file(
            {**tensors, keys[0].replace("lora_down.weight", "alpha"): torch.ones(())}, folder / "model.safetensors"
        )
        (folder / marker).write_text(json.dumps({"current_epoch": 1, "current_step": 3}))
        assert set(registry.read(folder, "kohya").weights) == set(keys)
    else:
        save_file(tensors, folder / marker)
    assert name == registry.detect(folder)[0].NAME
    names = keys if name == "kohya" else [key.replace(".weight", ".default.weight") for key in keys]
    with read(folder, names=keys) as state:  # keys of PEFT's form stand for the parameters of its adapter
        assert_holds(state, dict(zip(names, (optimizer.state[p] for p in parameters), strict=True)))
        assert state.global_step == 3
        assert state.origin.get("support") == ("from source only" if name == "kohya" else None)


def test_positional_files_without_names_say_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "train_state.json").write_text('{"current_step": 3}')
    torch.save(adam((2, 2))[1].state_dict(), tmp_path / "optimizer.bin")
    with pytest.raises(MissingNamesError):
        convert(tmp_path, tmp_path / "optimizer.safetensors")
