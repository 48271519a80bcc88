"""An optimizer's own state_dict and load_state_dict, by names."""

from __future__ import annotations

import copy
import io
import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lora_state_format.errors import BindError, CaptureError, ConversionError
from lora_state_format.torch import follow_names

NAMES = ("q", "k", "v", "o")


class Model(nn.Module):
    """Four layers of one shape, registered in a given order."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear

    def __init__(self, order: tuple[str, ...] = NAMES, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        weights = {name: torch.randn(4, 4, generator=torch.Generator().manual_seed(n)) for n, name in enumerate(NAMES)}
        for name in order:
            layer = nn.Linear(4, 4, bias=False, dtype=dtype)
            layer.weight.data.copy_(weights[name])
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in NAMES:
            x = torch.tanh(self.get_submodule(name)(x))
        return x


def train(model: Model, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 + step), dtype=torch.float32)
        optimizer.zero_grad()
        model(x.to(next(model.parameters()).dtype)).square().sum().backward()
        optimizer.step()


def through_a_file(state_dict: dict[str, Any]) -> Any:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def rebuilt(model: Model) -> Model:
    """The same weights in a model that registers its layers the other way round."""
    other = Model(NAMES[::-1])
    other.load_state_dict(model.state_dict())
    return other


def equal(a: nn.Module, b: nn.Module) -> bool:
    others = dict(b.named_parameters())
    return all(torch.equal(p, others[name]) for name, p in a.named_parameters())


def test_a_checkpoint_of_torch_is_bound_by_name_after_reordering_and_regrouping() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    follow_names(optimizer, model)
    train(model, optimizer, 0, 3)
    saved = through_a_file(optimizer.state_dict())
    assert saved["param_groups"][0]["param_names"] == [f"{name}.weight" for name in NAMES]

    cold, wrong, right = rebuilt(model), rebuilt(model), rebuilt(model)
    train(cold, torch.optim.AdamW(cold.parameters(), lr=0.05), 3, 6)

    def regrouped(of: Model) -> torch.optim.Optimizer:
        layers = list(of.parameters())
        return torch.optim.AdamW([{"params": layers[:1]}, {"params": layers[1:]}], lr=0.05)

    alone = torch.optim.AdamW(wrong.parameters(), lr=0.05)
    alone.load_state_dict(copy.deepcopy(saved))  # torch: no error, every moment on another layer
    train(wrong, alone, 3, 6)
    resumed = regrouped(right)
    groups = resumed.param_groups
    follow_names(resumed, right)
    resumed.load_state_dict(saved)
    assert resumed.param_groups is groups
    assert [len(group["params"]) for group in groups] == [1, 3]
    assert all("param_names" not in group for group in groups)
    train(right, resumed, 3, 6)

    train(model, optimizer, 3, 6)
    assert equal(model, right)
    assert not equal(model, wrong)
    assert not equal(model, cold)


def test_a_load_keeps_what_torch_casts_and_aliases_nothing() -> None:
    """torch casts every slot but ``step`` to its parameter's dtype and may keep the caller's own tensors."""
    model = Model(dtype=torch.bfloat16)
    optimizer = torch.optim.NAdam(model.parameters(), lr=0.05)
    follow_names(optimizer, model)
    train(model, optimizer, 0, 3)
    saved = optimizer.state_dict()
    alone = torch.optim.NAdam(model.parameters(), lr=0.05)
    alone.load_state_dict(saved)
    assert alone.state[model.q.weight]["mu_product"].dtype is torch.bfloat16

    resumed = torch.optim.NAdam(model.parameters(), lr=0.05)
    follow_names(resumed, model)
    resumed.load_state_dict(saved)
    for parameter in model.parameters():
        for slot, value in optimizer.state[parameter].items():
            mine = resumed.state[parameter][slot]
            assert mine.dtype is value.dtype
            assert torch.equal(mine, value)
            assert mine.data_ptr() != value.data_ptr()


def test_what_does_not_fit_is_refused_and_nothing_changes() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    follow_names(optimizer, model)
    train(model, optimizer, 0, 2)
    saved = optimizer.state_dict()
    part = torch.optim.AdamW([model.q.weight], lr=0.5)
    follow_names(part, model)
    with pytest.raises(BindError) as caught:
        part.load_state_dict(saved)
    assert str(caught.value) == (
        "optimizer state does not fit: 4 parameters saved, 1 in the optimizer\n"
        "  in the file, not in the optimizer (3):\n"
        "    k.weight  [4, 4]  (in the model, but not in the optimizer)\n"
        "    v.weight  [4, 4]  (in the model, but not in the optimizer)\n"
        "    o.weight  [4, 4]  (in the model, but not in the optimizer)\n"
        "hint: unexpected='carry' keeps their state for the next save\n"
        "hint: unexpected='ignore' drops it"
    )
    assert not part.state
    assert part.param_groups[0]["lr"] == 0.5

    partial = torch.optim.AdamW([model.q.weight], lr=0.5)
    follow_names(partial, model, unexpected="ignore")
    partial.load_state_dict(saved)
    assert torch.equal(partial.state[model.q.weight]["exp_avg"], optimizer.state[model.q.weight]["exp_avg"])

    twice = copy.deepcopy(saved)
    twice["param_groups"][0]["param_names"][1] = "q.weight"
    with pytest.raises(ConversionError) as stopped:
        optimizer.load_state_dict(twice)
    assert str(stopped.value) == "a state dict with 3 names for 4 parameters"


def test_a_state_dict_without_names_is_torch_s_business_and_said_to_be(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    train(model, optimizer, 0, 2)
    saved = optimizer.state_dict()
    other = torch.optim.AdamW(model.parameters(), lr=0.05)
    following = follow_names(other, model)
    with caplog.at_level(logging.WARNING, "lora_state_format"):
        other.load_state_dict(saved)
    (message,) = caplog.messages
    assert message == (
        "a state dict without names goes into the optimizer by the order of its parameters, which nothing proves; the "
        "next one that is saved will have names"
    )
    assert torch.equal(other.state[model.k.weight]["exp_avg"], optimizer.state[model.k.weight]["exp_avg"])
    assert "param_names" in other.state_dict()["param_groups"][0]
    following.remove()
    assert "param_names" not in other.state_dict()["param_groups"][0]


@pytest.mark.parametrize("flat", [False, True])
def test_dcp_s_own_functions_see_nothing_of_it(flat: bool) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    train(model, optimizer, 0, 2)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    before = get_optimizer_state_dict(model, optimizer, options=options)
    follow_names(optimizer, model)
    after = get_optimizer_state_dict(model, optimizer, options=options)
    assert str(before) == str(after)

    other = rebuilt(model)
    resumed = torch.optim.AdamW(other.parameters(), lr=0.05)
    follow_names(resumed, other)
    set_optimizer_state_dict(other, resumed, after, options=options)
    for name, parameter in model.named_parameters():
        mine = resumed.state[other.get_parameter(name)]
        assert torch.equal(mine["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_copies_of_an_optimizer_lose_the_hooks() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    follow_names(optimizer, model)
    assert "param_names" not in copy.deepcopy(optimizer).state_dict()["param_groups"][0]


def test_an_optimizer_whose_load_calls_no_hooks_is_refused() -> None:
    class Own(torch.optim.SGD):
        def load_state_dict(self, state_dict: Any) -> None:
            self.state.update(state_dict["state"])

    model = Model()
    with pytest.raises(CaptureError) as caught:
        follow_names(Own(model.parameters(), lr=0.1), model)
    assert str(caught.value) == (
        f"{__name__}.test_an_optimizer_whose_load_calls_no_hooks_is_refused.<locals>.Own has a load_state_dict of its "
        "own that calls no hooks; use save_optimizer and load_optimizer"
    )
