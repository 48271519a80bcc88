"""Options that are tensors, and matrices that do not lie row by row: a file keeps both, and gives them back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_state_format as lsf
from lora_state_format.format.reading import open_state
from lora_state_format.model.states import Slot
from lora_state_format.torch import load_optimizer, save_optimizer


class Basis(torch.optim.Optimizer):
    """Keeps a matrix as LAPACK returns it, under a parameter and under a key of its own, and a tensor in a group."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make what is kept."""
        generator = torch.Generator().manual_seed(0)
        for group in self.param_groups:
            group["numerator_weighted"] = torch.arange(3.0)
            for parameter in group["params"]:
                matrix = torch.randn(2, 4, 3, generator=generator)
                self.state[parameter]["Q"] = [torch.linalg.qr(matrix[0] @ matrix[0].T)[0].T, matrix.permute(2, 0, 1)]
        self.state["basis"] = {"all": torch.randn(3, 2, generator=generator).T}  # type: ignore[index]


def run() -> tuple[Any, Any]:
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.ones(4, 3)) for name in "ab"})
    optimizer = Basis(model.values())
    optimizer.step()
    return model, optimizer


def tensors(model: Any, optimizer: Any) -> list[torch.Tensor]:
    held = [q for parameter in model.values() for q in optimizer.state[parameter]["Q"]]
    return [*held, optimizer.state["basis"]["all"], optimizer.param_groups[0]["numerator_weighted"]]


@pytest.mark.parametrize("max_shard_size", [None, 100], ids=["one file", "shards"])
def test_everything_comes_back_as_it_lay(max_shard_size: int | None, tmp_path: Path) -> None:
    model, optimizer = run()
    save_optimizer(optimizer, model, tmp_path / "o.safetensors", max_shard_size=max_shard_size)
    assert lsf.verify(tmp_path / "o.safetensors").ok
    other = Basis(model.values())
    load_optimizer(other, model, tmp_path / "o.safetensors")
    pairs = list(zip(tensors(model, optimizer), tensors(model, other), strict=True))
    assert len(pairs) == 6
    for was, now in pairs:
        assert torch.equal(was, now)
        assert was.stride() == now.stride()
    assert not pairs[1][0].is_contiguous()


def test_they_survive_a_copy_of_the_file(tmp_path: Path) -> None:
    model, optimizer = run()
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    with open_state(tmp_path / "o.safetensors") as state:
        assert state.extensions == {}
        assert [key for key, _ in state.groups[0].options] == ["lr", "numerator_weighted"]
        slot = state["a"].state["Q"][1]  # type: ignore[index]
        assert isinstance(slot, Slot)
        assert slot.order == (1, 2, 0)
        lsf.write(state, tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == (tmp_path / "o.safetensors").read_bytes()


def test_an_extension_that_fits_nothing_is_left_out(tmp_path: Path) -> None:
    """A program that does not know it may have renamed what it speaks of."""
    model, optimizer = run()
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    axes: Any = {"a": {"Q.1": [0, 1], "Q.0": "all"}, "gone": {"Q.0": [1, 0]}, "$globals": [1]}
    with open_state(tmp_path / "o.safetensors") as state:
        bare = replace(
            state,
            parameters=tuple(
                replace(p, state={"Q": [replace(slot, order=None) for slot in p["Q"]]}) for p in state.parameters
            ),
            globals={},
            extensions={"layouts": {"must_understand": False, "axes": axes}},
        )
        # A state that comes from elsewhere has the extension where nobody has taken it apart yet.
        from lora_state_format.format.stowing import unstowed

        found = unstowed(bare)
    assert found.extensions == {}
    assert all(slot.order is None for p in found.parameters for slot in p["Q"])
