"""What is measured and what is found odd, against numbers computed by torch and runs that torch made."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import lora_state_format as lsf
from lora_state_format.errors import OptionError
from lora_state_format.model.states import OptimizerState, Scalar
from lora_state_format.operations.entries import entries as entries_of
from lora_state_format.operations.entries import kinds, matching
from lora_state_format.operations.findings import findings
from lora_state_format.operations.statistics import measure
from lora_state_format.torch import save_optimizer

if TYPE_CHECKING:
    from tests.conftest import Founding


def stepped(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def saved(tmp_path: Path, change: Any = None, steps: int = 3, **options: Any) -> OptimizerState:
    """The state of an AdamW over two layers, after ``change`` had its way with it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    stepped(model, optimizer, steps)
    if change:
        change(model, optimizer)
    save_optimizer(optimizer, model, tmp_path / "a.safetensors")
    return lsf.open_state(tmp_path / "a.safetensors")


def found(state: OptimizerState) -> dict[str, tuple[str, ...]]:
    return {finding.kind: finding.parameters for finding in findings(state, measure(state))}


def test_what_is_measured(founding: Founding) -> None:
    told: list[tuple[int, int]] = []
    with lsf.read(founding.path) as state:
        statistics = measure(state, lambda done, total: told.append((done, total)))
        assert findings(state, statistics) == ()
    for own, update, (_, slots) in zip(statistics.slots, statistics.updates, founding.slots.items(), strict=True):
        m, v = slots["exp_avg"].double(), slots["exp_avg_sq"].double()
        for slot, values in (("exp_avg", m), ("exp_avg_sq", v)):
            assert own[slot].rms == pytest.approx(values.square().mean().sqrt().item())
            assert own[slot].largest == pytest.approx(values.abs().max().item())
            assert own[slot].zeros == int((values == 0).sum())
        sizes = (m / (1 - 0.9**3)).abs() / ((v / (1 - 0.999**3)).sqrt() + 1e-8)
        assert update is not None
        assert update.sizes.rms == pytest.approx(sizes.square().mean().sqrt().item())
        assert sum(update.bins) + update.still == sizes.numel()
        assert update.beyond == 0
    assert told[-1] == (458_752, 458_752)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float(tmp_path: Path, dtype: torch.dtype) -> None:
    def change(model: Any, optimizer: Any) -> None:
        for state in optimizer.state.values():
            state["exp_avg"] = state["exp_avg"].to(dtype)

    with saved(tmp_path, change) as state:
        measured = measure(state).slots[0]["exp_avg"]
        values = torch.from_numpy(np.asarray(measure_source(state), dtype=np.float64))
    assert measured.rms == pytest.approx(values.square().mean().sqrt().item())


def measure_source(state: OptimizerState) -> Any:
    from lora_state_format.torch.tensors import to_torch

    return to_torch(next(iter(state.values()))["exp_avg"]).double().numpy()


def test_blocks_make_no_difference(tmp_path: Path) -> None:
    model = torch.nn.Linear(300, 500, bias=False)  # more than one block
    optimizer = torch.optim.Adam(model.parameters())
    stepped(model, optimizer, 2)
    save_optimizer(optimizer, model, tmp_path / "a.safetensors")
    with lsf.open_state(tmp_path / "a.safetensors") as state:
        (own,) = measure(state).slots
    values = optimizer.state[model.weight]["exp_avg"].double()
    assert own["exp_avg"].elements == 150_000
    assert own["exp_avg"].rms == pytest.approx(values.square().mean().sqrt().item())


def test_not_finite_and_negative(tmp_path: Path) -> None:
    def change(model: Any, optimizer: Any) -> None:
        optimizer.state[model[0].weight]["exp_avg"][0, 0] = math.nan
        optimizer.state[model[0].weight]["exp_avg"][0, 1] = math.inf
        optimizer.state[model[1].bias]["exp_avg_sq"][0] = -1.0

    with saved(tmp_path, change) as state:
        assert found(state) == {
            "not finite": ("0.weight exp_avg",), "negative squares": ("1.bias exp_avg_sq",),
        }  # fmt: skip
        assert measure(state).slots[0]["exp_avg"].broken == 2


def test_cold_parameters(tmp_path: Path) -> None:
    def change(model: Any, optimizer: Any) -> None:
        for slot in ("exp_avg", "exp_avg_sq"):
            optimizer.state[model[1].weight][slot].zero_()

    with saved(tmp_path, change) as state:
        assert found(state) == {"cold": ("1.weight",)}


def test_moments_of_two_runs(tmp_path: Path) -> None:
    """No run of Adam has a first moment so much larger than the second allows."""

    def change(model: Any, optimizer: Any) -> None:
        optimizer.state[model[0].weight]["exp_avg"] *= 20

    with saved(tmp_path, change) as state:
        assert found(state) == {"beyond Adam": ("0.weight",)}


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.0, 0.5), (0.95, 0.9)])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_no_run_of_adam_is_beyond_it(tmp_path: Path, betas: tuple[float, float], steps: int) -> None:
    """The bound is met by gradients that grow as it allows, and by constant ones."""

    def change(model: Any, optimizer: Any) -> None:
        ratio = betas[0] / betas[1]
        for step in range(steps):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, ratio ** (steps - step) if ratio else 1.0)
            optimizer.step()

    with saved(tmp_path, change, steps=0, betas=betas) as state:
        assert found(state) == {}


def test_steps_and_groups(tmp_path: Path) -> None:
    def change(model: Any, optimizer: Any) -> None:
        optimizer.state[model[0].bias]["step"] += 1
        del optimizer.state[model[1].bias]

    with saved(tmp_path, change, lr=0.0) as state:
        assert found(state) == {"never stepped": ("1.bias",), "steps differ": ("0.bias",), "lr 0": ()}
        texts = [str(finding) for finding in findings(state)]
    assert texts == [
        "1 of 4 parameters never took a step: 1.bias",
        "most parameters are at step 3, 1 are not: 0.bias",
        "lr is 0 in group 0: a step moves no weight until a scheduler or you set lr",
    ]


def test_matching_keeps_groups(founding: Founding) -> None:
    with lsf.read(founding.path) as state:
        part = matching(state, r"layers\.3\.")
        assert [group.count for group in part.groups] == [14, 0]
        assert set(part) == {name for name in founding.slots if ".layers.3." in name}
        with pytest.raises(OptionError) as caught:
            matching(state, "(")
    assert str(caught.value).startswith("'(' is not a regular expression: ")


def test_kinds_differ_in_numbers_only(founding: Founding) -> None:
    with lsf.read(founding.path) as state:
        rows = kinds(entries_of(state))
        assert len(rows) == 14
        assert {row.spans for row in rows} == {"0-27"}
        odd = replace(state.parameters[0], state={"step": Scalar.of("F32", 1.0)})
        other = replace(state, parameters=(odd, *state.parameters[1:]))
        assert len(kinds(entries_of(other))) == 15, "one with other slots is a kind of its own"
