"""Checkpoints that old and other versions of frameworks wrote, each named as its live optimizer had its parameters.

``names.json`` in each folder was written by the run, from the live optimizer; the values are compared with what torch
itself loads from the file, id by id.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lora_state_format as lsf

VERSIONS = Path(__file__).parents[1] / "golden" / "versions"
TRAINERS = sorted(path.parent for path in VERSIONS.glob("*/optimizer.pt"))
LIGHTNING = sorted(path.parent for path in VERSIONS.glob("*/last.ckpt"))


def expected(folder: Path) -> dict[str, Any]:
    members: dict[str, Any] = json.loads((folder / "names.json").read_text())
    return members


def assert_read(path: Path, tree: Any, groups: list[list[str]]) -> lsf.OptimizerState:
    """The state at a path has these groups of names, and at each the slots of the state dict's id, bit for bit."""
    state = lsf.read(path)
    assert [[p.name for p in members] for members in state.members()] == groups
    assert [group["params"] for group in tree["param_groups"]] == _counted(groups)
    for identity, name in enumerate(name for names in groups for name in names):
        slots = tree["state"].get(identity)
        if slots is None:
            assert state[name].state is None
            continue
        assert list(state[name].state or ()) == list(slots)
        for slot, value in slots.items():
            ours = state[name][slot]
            if isinstance(value, torch.Tensor) and value.shape:
                assert ours.torch().equal(value), (name, slot)
            else:
                assert (ours.item() if hasattr(ours, "item") else ours) == (
                    value.item() if isinstance(value, torch.Tensor) else value
                )
    return state


def _counted(groups: list[list[str]]) -> list[list[int]]:
    numbers = iter(range(sum(map(len, groups))))
    return [[next(numbers) for _ in names] for names in groups]


@pytest.mark.parametrize("folder", TRAINERS, ids=lambda folder: str(folder.name))
def test_a_trainers_checkpoint(folder: Path) -> None:
    tree = torch.load(folder / "optimizer.pt", weights_only=True)
    with assert_read(folder, tree, expected(folder)["groups"]) as state:
        assert state.global_step == 3


def test_both_sides_of_each_change_of_the_grouping_are_there() -> None:
    """The registered norms of T5 (4.21) and Llama (4.34), patterns in names (4.49, 4.53); with and without LoRA."""
    rules = {folder.name: lsf.read(folder).naming.rule for folder in TRAINERS}
    assert rules["transformers4.20.1-t5-full"] == "trainer-4.0"
    assert rules["transformers4.26.1-t5-full"] == "trainer"
    assert rules["transformers4.33.3-llama-full"] == "trainer-4.33"
    assert rules["transformers4.34.1-llama-full"] == "trainer"
    assert rules["transformers4.47.1-gemma-full"] == "trainer-4.48"
    assert rules["transformers4.48.3-qwen2-full"] == "trainer-4.48"
    assert rules["transformers4.52.4-qwen2-full"] == "trainer-4.52"
    assert rules["transformers4.53.3-qwen2-full"] == "trainer"


@pytest.mark.parametrize("folder", LIGHTNING, ids=lambda folder: str(folder.name))
def test_a_lightning_checkpoint_with_frozen_parameters_or_several_groups(folder: Path) -> None:
    tree = torch.load(folder / "last.ckpt", weights_only=False)["optimizer_states"][0]
    assert_read(folder / "last.ckpt", tree, expected(folder)["groups"]).close()


def test_a_dcp_folder_of_torch_2_1() -> None:
    """Its metadata names classes that have moved since."""
    folder = VERSIONS / "torch2.1-dcp-fsdp1"
    held = load_file(folder / "expected.safetensors")
    with lsf.read(folder / "checkpoint") as state:
        assert set(state) == {name for group in expected(folder)["groups"] for name in group}
        for key, tensor in held.items():
            name, slot = key.split("/")
            ours = state[name][slot]
            assert (ours.torch() if tensor.shape else torch.tensor(ours.item())).equal(tensor), key


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_a_dcp_folder_of_a_positional_state_is_named_by_the_model_in_it(tmp_path: Path) -> None:
    """As torchtune's asynchronous saves are, and whoever saves ``optimizer.state_dict()`` itself."""
    from torch.distributed.checkpoint.state_dict_saver import save

    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path)
    with lsf.read(tmp_path) as state:
        assert list(state) == [name for name, _ in model.named_parameters()]
        for name, parameter in model.named_parameters():
            assert state[name]["exp_avg"].torch().equal(optimizer.state[parameter]["exp_avg"])
