"""A run that goes on with a new learning rate takes the steps of one that was built with it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedules

from lora_state_format.errors import OptionError
from lora_state_format.format import reading
from lora_state_format.torch import load_optimizer, load_scheduler, save_optimizer

Schedule = Callable[[torch.optim.Optimizer, float], Any]

SCHEDULES: dict[str, Schedule] = {
    "constant": lambda o, lr: schedules.ConstantLR(o, factor=1.0),
    "linear": lambda o, lr: schedules.LinearLR(o, 1.0, 0.0, 12),
    "cosine": lambda o, lr: schedules.CosineAnnealingLR(o, 12),
    "cosine with restarts": lambda o, lr: schedules.CosineAnnealingWarmRestarts(o, 3),
    "exponential": lambda o, lr: schedules.ExponentialLR(o, 0.9),
    "step": lambda o, lr: schedules.StepLR(o, 2, 0.5),
    "multi-step": lambda o, lr: schedules.MultiStepLR(o, [2, 7], 0.1),
    "polynomial": lambda o, lr: schedules.PolynomialLR(o, 12, 2.0),
    "one cycle": lambda o, lr: schedules.OneCycleLR(o, max_lr=lr, total_steps=14),
    "cyclic": lambda o, lr: schedules.CyclicLR(o, lr / 10, lr, step_size_up=3, cycle_momentum=False),
    "lambda": lambda o, lr: schedules.LambdaLR(o, lambda n: 1 / (1 + n)),
    "warmup": lambda o, lr: schedules.LambdaLR(o, lambda n: min(n / 6, 1.0)),
    "sequential": lambda o, lr: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, 1.0, 3), schedules.CosineAnnealingLR(o, 9)], [3]
    ),
    "chained": lambda o, lr: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.5, 3), schedules.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "plateau": lambda o, lr: schedules.ReduceLROnPlateau(o, patience=1),
}


def run(schedule: Schedule, lr: float, groups: int = 1) -> tuple[Any, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model: Any = torch.nn.Linear(3, 2)
    parameters = list(model.parameters())
    chunks = [parameters] if groups == 1 else [[p] for p in parameters]
    optimizer = torch.optim.AdamW([{"params": chunk} for chunk in chunks], lr=lr)
    return model, optimizer, schedule(optimizer, lr)


def steps(model: Any, optimizer: torch.optim.Optimizer, scheduler: Any, rounds: range) -> list[float]:
    """The rates of these steps. A plateau is told the same losses in every run, which begin to stall in round 4."""
    rates = []
    for n in rounds:
        optimizer.zero_grad()
        model(torch.full((4, 3), 0.1 * n)).square().sum().backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(*([1.0 / min(n + 1, 5)] if isinstance(scheduler, schedules.ReduceLROnPlateau) else []))
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_new_rate_goes_on_as_if_it_had_been_there_from_the_start(name: str, tmp_path: Path) -> None:
    model, optimizer, scheduler = run(SCHEDULES[name], 1e-2)
    steps(model, optimizer, scheduler, range(5))
    extra = {"scheduler": plain(scheduler.state_dict())}
    save_optimizer(optimizer, model, tmp_path / "o.safetensors", extra=extra)
    weights = copy.deepcopy(model.state_dict())

    reference, built, advanced = run(SCHEDULES[name], 3e-3)
    steps(reference, built, advanced, range(5))
    reference.load_state_dict(weights)
    for p, q in zip(reference.parameters(), model.parameters(), strict=True):
        built.state[p] = copy.deepcopy(optimizer.state[q])

    resumed, live, scheduler = run(SCHEDULES[name], 3e-3)
    resumed.load_state_dict(weights)
    load_optimizer(live, resumed, tmp_path / "o.safetensors", options={"lr": "current"})
    with reading.open_state(tmp_path / "o.safetensors") as state:
        load_scheduler(scheduler, state.extra["scheduler"], lr="current")  # type: ignore[arg-type]
    assert scheduler.get_last_lr() == advanced.get_last_lr()
    assert steps(resumed, live, scheduler, range(5, 12)) == steps(reference, built, advanced, range(5, 12))
    for p, q in zip(resumed.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_saved_schedule_goes_on(name: str, tmp_path: Path) -> None:
    model, optimizer, scheduler = run(SCHEDULES[name], 1e-2)
    steps(model, optimizer, scheduler, range(5))
    extra = {"scheduler": plain(scheduler.state_dict())}
    save_optimizer(optimizer, model, tmp_path / "o.safetensors", extra=extra)
    resumed, live, after = run(SCHEDULES[name], 1e-2)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    load_optimizer(live, resumed, tmp_path / "o.safetensors")
    with reading.open_state(tmp_path / "o.safetensors") as state:
        load_scheduler(after, state.extra["scheduler"])  # type: ignore[arg-type]
    assert steps(resumed, live, after, range(5, 12)) == steps(model, optimizer, scheduler, range(5, 12))


def plain(value: Any) -> Any:
    """A scheduler's state as a file takes it: OneCycleLR keeps a method of its own in it, which is made again."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if not callable(item)}
    return [plain(item) for item in value] if isinstance(value, list) else value


def measured(kind: Any, optimizer: torch.optim.Optimizer, **options: Any) -> Any:
    return kind(optimizer, **{"factor": 0.5, "patience": 0, **options})


@pytest.mark.parametrize("name", ["ReduceLROnPlateau", "GreedyLR"])
def test_a_rate_that_measurements_had_changed_goes_on_from_the_live_one(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that was built with the new rate, was told the same, and had not changed it until then."""
    if name == "GreedyLR":
        kind = pytest.importorskip("transformers.optimization").GreedyLR
        schedule: Schedule = lambda o, lr: measured(kind, o, min_lr=1e-5, smooth=True, window_size=2)  # noqa: E731
    else:
        schedule = lambda o, lr: measured(schedules.ReduceLROnPlateau, o)  # noqa: E731
    told = [1.0, 2.0, 3.0, 4.0, 0.5, 0.6, 9.0, 0.1, 0.7, 0.05]

    def tell(optimizer: torch.optim.Optimizer, scheduler: Any, metrics: list[float]) -> list[float]:
        rates = []
        for metric in metrics:
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step(metric)
        return rates

    model, optimizer, scheduler = run(schedule, 1e-2)
    assert len(set(tell(optimizer, scheduler, told[:4]))) > 1
    save_optimizer(optimizer, model, tmp_path / "o.safetensors", extra={"scheduler": scheduler.state_dict()})

    _, built, advanced = run(schedule, 4e-3)
    tell(built, advanced, told[:4])
    built.param_groups[0]["lr"] = 4e-3

    resumed, live, after = run(schedule, 4e-3)
    load_optimizer(live, resumed, tmp_path / "o.safetensors", options={"lr": "current"})
    with reading.open_state(tmp_path / "o.safetensors") as state:
        load_scheduler(after, state.extra["scheduler"], lr="current")  # type: ignore[arg-type]
    assert after.get_last_lr() == [4e-3]
    expected = tell(built, advanced, told[4:])
    assert tell(live, after, told[4:]) == expected
    assert len(set(expected)) > 2
    assert caplog.messages[-1] == (
        f"{name} goes on from the live rate, 0.004: its state does not say how often it had changed that of the saved "
        "run"
    )


def test_a_scheduler_that_measures_otherwise_is_refused() -> None:
    _, _, scheduler = run(SCHEDULES["plateau"], 1e-2)
    _, _, other = run(lambda o, lr: schedules.ReduceLROnPlateau(o, mode="max"), 1e-2)
    with pytest.raises(OptionError) as caught:
        load_scheduler(other, scheduler.state_dict(), lr="current")
    assert str(caught.value) == (
        "ReduceLROnPlateau was saved with mode='min' and is built with mode='max', by which the best that it remembers "
        "is another: build it with mode='min'"
    )


def test_two_groups_into_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, scheduler = run(SCHEDULES["sequential"], 1e-2, groups=2)
    steps(model, optimizer, scheduler, range(5))
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    resumed, live, after = run(SCHEDULES["sequential"], 1e-2)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    load_optimizer(live, resumed, tmp_path / "o.safetensors")
    load_scheduler(after, scheduler.state_dict())
    assert "the scheduler was saved with 2 groups, and now has 1" in caplog.messages
    assert steps(resumed, live, after, range(5, 12)) == steps(model, optimizer, scheduler, range(5, 12))


def test_a_scheduler_that_has_taken_steps_cannot_be_advanced() -> None:
    model, optimizer, scheduler = run(SCHEDULES["linear"], 1e-2)
    steps(model, optimizer, scheduler, range(2))
    with pytest.raises(OptionError) as caught:
        load_scheduler(scheduler, scheduler.state_dict(), lr="current")
    assert str(caught.value) == (
        "LinearLR has taken 2 steps: to go on with its own rates, load right after it was built"
    )


def test_a_scheduler_that_does_not_count_cannot_be_advanced() -> None:
    _, _, scheduler = run(SCHEDULES["linear"], 1e-2)
    with pytest.raises(OptionError) as caught:
        load_scheduler(scheduler, {"gamma": 0.1}, lr="current")
    assert str(caught.value) == (
        "LinearLR does not say in its state how many steps it has taken; step it to where it was"
    )


def test_a_rate_that_a_scheduler_will_replace_is_pointed_out(tmp_path: Path) -> None:
    model, optimizer, _ = run(SCHEDULES["linear"], 1e-2)
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    report = load_optimizer(optimizer, model, tmp_path / "o.safetensors", options={"lr": 0.5})
    assert report.replaced == ("lr 0.01 -> 0.5 as options= says",)
    assert report.notes == (
        (
            "a scheduler drives lr in group 0, and replaces the 0.5 of options= at its next step: build optimizer and "
            "scheduler with the new rate and pass options={'lr': 'current'} to go on so"
        ),
    )
    assert math.isclose(optimizer.param_groups[0]["lr"], 0.5)
