"""Programs whose checkpoints are plain files of torch.save with keys of their own; the search in them finds both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_state_format as lsf

FILES = Path(__file__).parents[1] / "golden" / "trainers" / "files"


def test_what_the_checkpointer_of_detectron2_saved() -> None:
    name = "detectron2/model_final.pth"
    with lsf.read(FILES / name) as state, np.load(FILES / "expected.npz") as held:
        assert list(state) == json.loads((FILES / "names.json").read_text())[name]
        for parameter in state.parameters:
            for slot in ("exp_avg", "exp_avg_sq"):
                assert np.array_equal(parameter[slot].numpy(), held[f"{name}:{parameter.name}:{slot}"])


Tree = dict[str, Any]

FROM_SOURCE: dict[str, Callable[[Tree, Tree], Tree]] = {
    "nnU-Net": lambda model, optimizer: {
        "network_weights": model, "optimizer_state": optimizer, "grad_scaler_state": None, "logging": {"losses": [1.0]},
        "_best_ema": None, "current_epoch": 3, "init_args": {"fold": 0}, "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1),
    },
    "espnet": lambda model, optimizer: {
        "model": model, "reporter": {"epoch": 1, "stats": {}}, "optimizers": [optimizer], "schedulers": [None],
        "scaler": None,
    },
    "fairseq": lambda model, optimizer: {
        "args": None, "cfg": {}, "model": model, "criterion": None, "task_state": {},
        "optimizer_history": [{"optimizer_name": "FairseqAdam", "lr_scheduler_state": {"best": 1.0}, "num_updates": 3}],
        "extra_state": {"metrics": {}}, "last_optimizer_state": optimizer,
    },
    "rl_games": lambda model, optimizer: {
        "model": model, "running_mean_std": {"running_mean": torch.zeros(4), "count": torch.tensor(1.0)}, "epoch": 3,
        "optimizer": optimizer, "frame": 100, "last_mean_rewards": -1.0, "env_state": None,
    },
    "rl_games, rank 0": lambda model, optimizer: {0: FROM_SOURCE["rl_games"](model, optimizer)},  # type: ignore[dict-item]
}  # fmt: skip
"""How each lays out a checkpoint, read from its source: nnU-Net's ``nnUNetTrainer.save_checkpoint``, ESPnet's
``espnet2.train.trainer``, fairseq's ``Trainer.state_dict``, rl_games' ``get_full_state_weights``."""


def test_files_of_speechbrain_next_to_each_other(tmp_path: Path) -> None:
    """Its checkpointer saves each state dict in a file that is called as the object: from source only."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 4)).pow(2).mean().backward()
    optimizer.step()
    for key, tree in {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "counter": 3}.items():
        torch.save(tree, tmp_path / f"{key}.ckpt")
    with lsf.read(tmp_path / "optimizer.ckpt") as state:
        assert list(state) == ["weight", "bias"]
        assert state["weight"]["exp_avg"].torch().equal(optimizer.state[model.weight]["exp_avg"])


@pytest.mark.parametrize("name", FROM_SOURCE)
def test_what_others_are_said_to_save(tmp_path: Path, name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 4)).pow(2).mean().backward()
    optimizer.step()
    torch.save(FROM_SOURCE[name](model.state_dict(), optimizer.state_dict()), tmp_path / "last.pth")
    with lsf.read(tmp_path / "last.pth") as state:
        assert list(state) == [key for key, _ in model.named_parameters()]
        for key, parameter in model.named_parameters():
            assert state[key]["exp_avg"].torch().equal(optimizer.state[parameter]["exp_avg"]), key
