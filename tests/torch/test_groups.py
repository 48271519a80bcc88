"""Groups and their options, several optimizers and several models: whose values hold, and that runs go on exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_state_format.errors import BindError
from lora_state_format.format import reading
from lora_state_format.torch import load_optimizer, save_optimizer


def linear(width: int = 4) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 3))


def train(model: Any, *optimizers: Any, steps: int = 3, schedulers: tuple[Any, ...] = ()) -> None:
    for n in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model((torch.arange(15.0).reshape(5, 3) - n) / 9).square().sum().backward()
        for optimizer in (*optimizers, *schedulers):
            optimizer.step()


def same(model: Any, other: Any) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def copied(model: Any) -> Any:
    again = linear()
    again.load_state_dict(model.state_dict())
    return again


# --- options --------------------------------------------------------------------------------------------------------


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-3, 1e-1, step_size_up=3, cycle_momentum=False),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 7),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=2), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("scheduler_first", [True, False])
def test_a_scheduled_run_goes_on_exactly(name: str, scheduler_first: bool, tmp_path: Path) -> None:
    make = SCHEDULERS[name]
    model = linear()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = make(optimizer)
    train(model, optimizer, schedulers=(scheduler,))
    extra = {"scheduler": scheduler.state_dict()}
    middle = copied(model)
    path = tmp_path / "o.safetensors"
    save_optimizer(optimizer, model, path, extra=extra if name != "SequentialLR" else None)
    train(model, optimizer, schedulers=(scheduler,), steps=5)

    resumed = torch.optim.AdamW(list(middle.parameters())[::-1], lr=1e-2)
    again = make(resumed) if scheduler_first else None
    load_optimizer(resumed, middle, path)
    if again is None:
        rate = dict(resumed.param_groups[0])
        assert "initial_lr" not in rate
        again = make(resumed)
        load_optimizer(resumed, middle, path)
    again.load_state_dict(extra["scheduler"])
    train(middle, resumed, schedulers=(again,), steps=5)

    assert same(model, middle)
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_tensors_in_betas_stay_the_objects_that_they_are(tmp_path: Path) -> None:
    model = linear()
    first = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.99))
    train(model, first)
    save_optimizer(first, model, tmp_path / "o.safetensors")

    betas = torch.tensor(0.9), torch.tensor(0.999)
    second = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1.0), betas=betas, foreach=False, capturable=True)
    load_optimizer(second, model, tmp_path / "o.safetensors")

    assert second.param_groups[0]["betas"][0] is betas[0]
    assert [float(beta) for beta in betas] == [float(torch.tensor(0.8)), float(torch.tensor(0.99))]
    save_optimizer(second, model, tmp_path / "t.safetensors")
    load_optimizer(first, model, tmp_path / "t.safetensors")
    assert first.param_groups[0]["betas"] == tuple(beta.item() for beta in betas)
    assert all(type(beta) is float for beta in first.param_groups[0]["betas"])


def test_files_of_an_older_and_of_a_newer_torch(tmp_path: Path) -> None:
    model = linear()
    first = torch.optim.AdamW(model.parameters())
    train(model, first)
    del first.param_groups[0]["decoupled_weight_decay"]
    first.param_groups[0]["of_tomorrow"] = 1.5
    save_optimizer(first, model, tmp_path / "o.safetensors")

    second = torch.optim.AdamW(model.parameters())
    report = load_optimizer(second, model, tmp_path / "o.safetensors")
    assert second.param_groups[0]["decoupled_weight_decay"] is True
    assert "of_tomorrow" not in second.param_groups[0]
    assert report.notes == ("the live groups have no option of_tomorrow: what the file says of it was left out",)
    train(model, second, steps=1)


def test_runtime_options_stay_as_they_are(tmp_path: Path) -> None:
    model = linear()
    first = torch.optim.AdamW(model.parameters(), fused=True, lr=0.5)
    train(model, first)
    save_optimizer(first, model, tmp_path / "o.safetensors")
    second = torch.optim.AdamW(model.parameters(), foreach=True)
    load_optimizer(second, model, tmp_path / "o.safetensors")
    assert [second.param_groups[0][key] for key in ("lr", "foreach", "fused")] == [0.5, True, None]


def test_a_no_decay_group_is_never_made_to_decay_in_silence(tmp_path: Path) -> None:
    """torch's own state-dict functions set one group's weight decay in both, or lose the learning rate of one."""
    model = linear()
    one = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    train(model, one)
    save_optimizer(one, model, tmp_path / "o.safetensors")

    def split() -> torch.optim.Optimizer:
        weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
        return torch.optim.AdamW([{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}])

    two = split()
    with pytest.raises(BindError) as caught:
        load_optimizer(two, model, tmp_path / "o.safetensors")
    assert not two.state
    assert str(caught.value) == (
        "optimizer state does not fit: 4 parameters saved, 4 in the optimizer\n"
        "  saved group 0, with weight_decay 0.1, feeds live groups that disagree on it: 0.1 in live group 0, 0.0 in "
        "live group 1\n"
        "hint: options={'weight_decay': 'current'} keeps the live values\n"
        "hint: options={'weight_decay': 'saved'} makes them alike"
    )
    load_optimizer(two, model, tmp_path / "o.safetensors", options={"weight_decay": "current"})
    assert [group["weight_decay"] for group in two.param_groups] == [0.1, 0.0]

    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    theirs = split()
    set_optimizer_state_dict(model, theirs, get_optimizer_state_dict(model, one))
    with pytest.raises(KeyError):
        train(model, theirs, steps=1)


# --- state that lives in groups: real optimizers ----------------------------------------------------------------------


def prodigy(parameters: Any) -> Any:
    from prodigyopt import Prodigy

    return Prodigy(parameters, lr=1.0, d0=1e-2)


def schedule_free(parameters: Any) -> Any:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(parameters, lr=1e-2, warmup_steps=4)
    optimizer.train()
    return optimizer


@pytest.mark.frameworks
@pytest.mark.parametrize("make", [prodigy, schedule_free])
def test_state_in_groups_comes_from_the_file(make: Callable[[Any], Any], tmp_path: Path) -> None:
    model = linear()
    optimizer = make(model.parameters())
    train(model, optimizer)
    middle = copied(model)
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    train(model, optimizer, steps=5)

    resumed = make(middle.parameters())
    load_optimizer(resumed, middle, tmp_path / "o.safetensors", options={"lr": "current", "betas": "current"})
    train(middle, resumed, steps=5)

    assert same(model, middle)
    options = [{k: v for k, v in o.param_groups[0].items() if k != "params"} for o in (optimizer, resumed)]
    assert options[0] == options[1]


# --- several optimizers ---------------------------------------------------------------------------------------------


def test_muon_and_adamw_go_on_exactly(tmp_path: Path) -> None:
    def both(model: Any, turned: bool) -> list[torch.optim.Optimizer]:
        matrices, vectors = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
        if turned:
            matrices, vectors = matrices[::-1], vectors[::-1]
        return [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(vectors, lr=1e-2)]

    model = linear()
    optimizers = both(model, turned=False)
    train(model, *optimizers)
    middle = copied(model)
    save_optimizer(optimizers, model, tmp_path / "o.safetensors")
    train(model, *optimizers, steps=5)

    resumed = both(middle, turned=True)
    report = load_optimizer(resumed[::-1], middle, tmp_path / "o.safetensors")
    assert str(report) == "restored 4/4 parameters, 1 to 2 slots each, step 3; weights match 4/4"
    train(middle, *resumed, steps=5)
    assert same(model, middle)


def in_backward(model: Any) -> list[torch.optim.Optimizer]:
    """An optimizer for each parameter, stepped as soon as its gradient is there."""
    optimizers = {p: torch.optim.AdamW([p], lr=1e-2) for p in model.parameters()}

    def hook(p: torch.Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(hook)
    return list(optimizers.values())


def test_an_optimizer_in_backward_goes_on_exactly_and_in_one_optimizer(tmp_path: Path) -> None:
    model = linear()
    optimizers = in_backward(model)
    train(model)
    middle, plain = copied(model), copied(model)
    save_optimizer(optimizers, model, tmp_path / "o.safetensors")
    train(model, steps=5)

    load_optimizer(in_backward(middle), middle, tmp_path / "o.safetensors")
    train(middle, steps=5)
    assert same(model, middle)

    one = torch.optim.AdamW(list(plain.parameters())[::-1], lr=1e-2)
    load_optimizer(one, plain, tmp_path / "o.safetensors")
    train(plain, one, steps=5)
    assert same(model, plain)

    with reading.open_state(tmp_path / "o.safetensors") as state:
        assert [len(state.optimizers), len(state.groups)] == [4, 4]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # by torch itself
def test_torchs_own_optimizers_in_backward_go_on_exactly_also_as_a_dict(tmp_path: Path) -> None:
    from torch.distributed.optim.apply_optimizer_in_backward import (
        _apply_optimizer_in_backward,
        _get_in_backward_optimizers,
    )

    def started(model: Any) -> Any:
        _apply_optimizer_in_backward(torch.optim.AdamW, model.parameters(), {"lr": 1e-2})
        return model

    model = started(linear())
    train(model)
    plain = linear()
    plain.load_state_dict(model.state_dict())
    middle = started(plain)
    by_parameter = {p: p._in_backward_optimizers[0] for p in model.parameters()}
    save_optimizer(by_parameter, model, tmp_path / "dict.safetensors")
    save_optimizer(_get_in_backward_optimizers(model), model, tmp_path / "list.safetensors")
    assert (tmp_path / "dict.safetensors").read_bytes() == (tmp_path / "list.safetensors").read_bytes()
    train(model, steps=5)
    report = load_optimizer(_get_in_backward_optimizers(middle), middle, tmp_path / "dict.safetensors")
    assert str(report) == "restored 4/4 parameters, 2 slots each, step 3; weights match 4/4"
    train(middle, steps=5)
    assert same(model, middle)


def test_one_call_saves_and_restores_several_models(tmp_path: Path) -> None:
    def run() -> tuple[dict[str, Any], torch.optim.Optimizer]:
        models = {"unet": linear(), "text_encoder": linear()}
        return models, torch.optim.AdamW([p for m in models.values() for p in m.parameters()], lr=1e-2)

    models, optimizer = run()
    train(lambda x: models["text_encoder"](models["unet"](x)), optimizer)
    save_optimizer(optimizer, models, tmp_path / "o.safetensors")

    others, _ = run()
    turned = {"text_encoder": others["text_encoder"], "unet": others["unet"]}
    resumed = torch.optim.AdamW([p for m in turned.values() for p in m.parameters()], lr=1e-2)
    load_optimizer(resumed, turned, tmp_path / "o.safetensors")
    for name, model in models.items():
        for p, q in zip(model.parameters(), others[name].parameters(), strict=True):
            assert torch.equal(optimizer.state[p]["exp_avg"], resumed.state[q]["exp_avg"])

    alone = torch.optim.AdamW(others["unet"].parameters(), lr=1e-2)
    load_optimizer(alone, {"unet": others["unet"]}, tmp_path / "o.safetensors", unexpected="ignore")
    bare = torch.optim.AdamW(others["unet"].parameters(), lr=1e-2)
    report = load_optimizer(
        bare, others["unet"], tmp_path / "o.safetensors", unexpected="ignore", rename=[("^unet\\.", "")]
    )
    assert (report.restored, len(report.ignored)) == (4, 4)
