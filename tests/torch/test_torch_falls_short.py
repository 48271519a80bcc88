"""Where torch's own facilities bind wrongly, lose state or stop without a name, and what happens here instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lora_state_format.errors import BindError, CaptureError
from lora_state_format.torch import capture, load_optimizer, save_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


class Two(nn.Module):
    """Two layers of equal shape; the second can go unused, or be tied to the first."""

    def __init__(self, width: int = 3, *, use: bool = True, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(3, width, bias=False)
        self.b = nn.Linear(3, width, bias=False)
        self.use = use
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> Any:
        return self.a(x) + self.b(x) if self.use else self.a(x)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.5)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> torch.optim.Optimizer:
    optimizer = optimizer or adamw(model)
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def moments(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = optimizer.state[p]["exp_avg"]
    return found


def refused(optimizer: torch.optim.Optimizer, model: nn.Module, path: Path) -> list[str]:
    """The kinds of the problems, after checking that nothing has changed."""
    before = len(optimizer.state)
    with pytest.raises(BindError) as caught:
        load_optimizer(optimizer, model, path)
    assert caught.value.plan is not None
    assert len(optimizer.state) == before
    return [problem.kind for problem in caught.value.plan.problems]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "optimizer.safetensors"


def test_reading_the_state_of_a_fresh_optimizer_takes_a_step_in_torch() -> None:
    model = Two()
    theirs, ours = adamw(model), adamw(model)
    found: Any = get_optimizer_state_dict(model, theirs)
    assert [int(slots["step"]) for slots in found["state"].values()] == [1, 1]
    assert len(theirs.state) == 2
    assert [p.state for p in capture(ours, model).parameters] == [None, None]
    assert len(ours.state) == 0


@pytest.mark.parametrize(
    ("kind", "error"),
    [(torch.optim.LBFGS, TypeError), (torch.optim.SparseAdam, RuntimeError)],
    ids=["LBFGS", "SparseAdam"],
)
def test_some_fresh_optimizers_cannot_be_read_in_torch(kind: Any, error: type[Exception]) -> None:
    model = Two()
    with pytest.raises(error):
        get_optimizer_state_dict(model, kind(model.parameters()))
    assert len(capture(kind(model.parameters()), model)) == 2


def test_a_parameter_without_a_gradient_keeps_torch_from_loading_what_it_saved(path: Path) -> None:
    model = Two(use=False)
    optimizer = trained(model)
    with pytest.raises(RuntimeError, match=r"Missing optimizer state for parameter 'b\.weight'"):
        set_optimizer_state_dict(model, adamw(model), get_optimizer_state_dict(model, optimizer))
    save_optimizer(optimizer, model, path)
    ours = adamw(model)
    assert load_optimizer(ours, model, path).restored == 2
    assert torch.equal(moments(ours, model.a.weight), moments(optimizer, model.a.weight))
    assert model.b.weight not in ours.state


def test_a_parameter_that_the_optimizer_lacks_is_dropped_in_silence_by_torch(path: Path) -> None:
    model = Two()
    optimizer = trained(model)
    found = get_optimizer_state_dict(model, optimizer)
    save_optimizer(optimizer, model, path)
    model.b.requires_grad_(False)
    theirs = adamw(model)
    set_optimizer_state_dict(model, theirs, found, options=StateDictOptions(strict=True))
    assert len(theirs.state) == 1
    assert refused(adamw(model), model, path) == ["unexpected"]
    assert load_optimizer(adamw(model), model, path, unexpected="carry").carried == ("b.weight",)


def test_two_groups_become_one_with_the_options_of_the_last_in_torch(path: Path) -> None:
    model = Two()
    groups = [{"params": [model.a.weight], "lr": 0.1}, {"params": [model.b.weight], "lr": 0.2}]
    optimizer = trained(model, torch.optim.AdamW(groups))
    theirs = adamw(model)
    set_optimizer_state_dict(model, theirs, get_optimizer_state_dict(model, optimizer))
    assert theirs.param_groups[0]["lr"] == 0.2
    save_optimizer(optimizer, model, path)
    assert refused(adamw(model), model, path) == ["option"]


def test_another_shape_goes_into_the_optimizer_in_torch(path: Path) -> None:
    model, wide = Two(), Two(width=5)
    optimizer = trained(model)
    theirs = adamw(wide)
    set_optimizer_state_dict(wide, theirs, get_optimizer_state_dict(model, optimizer))
    assert moments(theirs, wide.a.weight).shape == (3, 3)
    save_optimizer(optimizer, model, path)
    assert refused(adamw(wide), wide, path) == ["shape"]


def test_untied_parameters_are_named_with_their_cause(path: Path) -> None:
    tied, model = Two(tied=True), Two()
    optimizer = trained(tied)
    with pytest.raises(RuntimeError, match=r"Missing optimizer state for parameter 'b\.weight'"):
        set_optimizer_state_dict(model, adamw(model), get_optimizer_state_dict(tied, optimizer))
    save_optimizer(optimizer, tied, path)
    with pytest.raises(BindError, match=r"when it was saved, the same tensor as 'a\.weight'"):
        load_optimizer(adamw(model), model, path)
    assert load_optimizer(adamw(model), model, path, missing="fresh").fresh == ("b.weight",)


def test_an_option_that_the_file_lacks_stops_torch_and_stays_live_here(path: Path) -> None:
    model = Two()
    optimizer = trained(model)
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    found = get_optimizer_state_dict(model, optimizer, options=flat)
    found = {key: value for key, value in found.items() if not key.endswith("decoupled_weight_decay")}
    with pytest.raises(KeyError):
        set_optimizer_state_dict(model, adamw(model), found, options=flat)
    del optimizer.param_groups[0]["decoupled_weight_decay"]
    save_optimizer(optimizer, model, path)
    ours = adamw(model)
    load_optimizer(ours, model, path)
    assert ours.param_groups[0]["decoupled_weight_decay"] is True


def test_a_parameter_that_is_not_the_models_is_a_number_in_torch() -> None:
    model = Two()
    optimizer = trained(model)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    with pytest.raises(KeyError, match="2"):
        get_optimizer_state_dict(model, optimizer)
    with pytest.raises(CaptureError, match="1 parameters that the model does not have"):
        capture(optimizer, model)


def test_param_names_lie_after_torch_has_loaded_and_are_not_asked_here(path: Path) -> None:
    model = Two()
    first = torch.optim.AdamW(list(model.named_parameters()))
    trained(model, first)
    theirs = torch.optim.AdamW(list(model.named_parameters())[::-1])
    theirs.load_state_dict(first.state_dict())
    assert theirs.param_groups[0]["param_names"] == ["a.weight", "b.weight"]
    assert theirs.param_groups[0]["params"][0] is model.b.weight
    assert list(capture(theirs, model)) == ["b.weight", "a.weight"]
    save_optimizer(first, model, path)
    ours = torch.optim.AdamW(list(model.named_parameters())[::-1])
    load_optimizer(ours, model, path)
    assert ours.param_groups[0]["param_names"] == ["b.weight", "a.weight"]


def test_a_string_in_the_state_is_broken_by_torch_and_kept_here(path: Path) -> None:
    model = Two()
    optimizer = trained(model)
    optimizer.state[model.a.weight]["mode"] = "nearest"
    theirs = adamw(model)
    theirs.load_state_dict(optimizer.state_dict())
    assert theirs.state[model.a.weight]["mode"].startswith("<generator object")
    save_optimizer(optimizer, model, path)
    ours = adamw(model)
    load_optimizer(ours, model, path)
    assert ours.state[model.a.weight]["mode"] == "nearest"


def test_torch_shares_the_loaded_tensors_with_the_caller_and_a_contiguous_moment_misleads_its_fused_kernel(
    path: Path,
) -> None:
    torch.manual_seed(0)

    def conv() -> Any:
        torch.manual_seed(0)
        made: Any = nn.Conv2d(3, 4, 3, bias=False)
        return made.to(memory_format=torch.channels_last)

    def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
        generator = torch.Generator().manual_seed(1)
        model.weight.grad = torch.randn(4, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last)
        optimizer.step()

    model = conv()
    first = torch.optim.AdamW(model.parameters(), lr=0.5, fused=True)
    step(model, first)
    save_optimizer(first, model, path)
    contiguous = {
        key: value.clone(memory_format=torch.contiguous_format) for key, value in first.state[model.weight].items()
    }
    start = model.weight.detach().clone()
    step(model, first)

    ends = []
    for bound in ("by hand", "by name"):
        again = conv()
        with torch.no_grad():
            again.weight.copy_(start)
        optimizer = torch.optim.AdamW(again.parameters(), lr=0.5, fused=True)
        if bound == "by hand":
            optimizer.state[again.weight] = dict(contiguous)
        else:
            load_optimizer(optimizer, again, path)
        step(again, optimizer)
        ends.append(torch.equal(again.weight, model.weight))
    assert ends == [False, True]
