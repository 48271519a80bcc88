"""Whatever is raised at whatever line of a load, the optimizer is as it was before, or as it is after."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from lora_state_format.torch import follow_names, load_optimizer, save_optimizer
from lora_state_format.torch.capture import capture

FOLDER = Path(sys.modules["lora_state_format.torch"].__file__ or "").parent
MODULES = ("apply", "swap", "carried", "load", "hooks", "live", "capture", "nested")


class Counting(torch.optim.AdamW):
    """An optimizer whose state dict has a member of its own."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        """Count."""
        self.count += 1
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        """Add the count."""
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the count out."""
        self.count = state_dict["count"]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "count"})


class Interruption(BaseException):
    """What is raised; no ``Exception``, as ``KeyboardInterrupt`` is none."""


def build(kind: type = Counting) -> tuple[Any, Any]:
    """A model of four parameters, the last of them frozen; the rate is one tensor, in all groups and the defaults."""
    torch.manual_seed(0)
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.randn(2)) for name in "abcd"})
    groups: list[dict[str, Any]] = [{"params": [model["a"]]}, {"params": [model["b"], model["c"]]}]
    return model, kind(groups, lr=torch.tensor(0.5), foreach=False)


def trained(kind: type = Counting) -> tuple[Any, Any]:
    model, optimizer = build(kind)
    for n in range(3):
        for p in model.values():
            p.grad = torch.full_like(p, 1.0 + n)
        optimizer.step()
    return model, optimizer


def contents(model: Any, optimizer: Any) -> str:
    """Everything that a load may change, by value; of tensors the object, too."""

    def form(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return id(value), value.tolist()
        if isinstance(value, dict):
            return {str(key): form(item) for key, item in value.items()}
        return [form(item) for item in value] if isinstance(value, (list, tuple)) else repr(value)

    slots = {name: form(optimizer.state.get(p)) for name, p in model.items()}
    groups = [form({**group, "params": len(group["params"])}) for group in optimizer.param_groups]
    carried = [parameter.name for parameter in capture(optimizer, model).carried]
    identity = id(optimizer.state), id(optimizer.param_groups), len(optimizer.state)
    return repr((slots, groups, form(optimizer.defaults), getattr(optimizer, "count", 0), carried, identity))


Line = tuple[str, int]


def traced(load: Callable[[], Any], at: Line | None = None, occurrence: int = 0) -> Counter[Line]:
    """Run a load, with an exception at the n-th time that it comes by a line; how often it came by each."""
    seen: Counter[Line] = Counter()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        path = Path(frame.f_code.co_filename)
        if path.parent != FOLDER or path.stem not in MODULES:
            return None
        if event == "line":
            line = path.stem, frame.f_lineno
            seen[line] += 1
            if line == at and seen[line] == occurrence:
                raise Interruption
        return trace

    sys.settrace(trace)
    try:
        load()
    finally:
        sys.settrace(None)
    return seen


def outcomes_of(prepare: Callable[[], tuple[Any, Any, Callable[[], Any]]]) -> Counter[str]:
    """Interrupt a load at each of its lines, the first and the last time that it comes by; how each one left it."""
    model, optimizer, load = prepare()
    lines = traced(load)
    after = values(model, optimizer)
    outcomes: Counter[str] = Counter()
    for line, count in lines.items():
        for occurrence in {1, count}:
            model, optimizer, load = prepare()
            before = contents(model, optimizer)
            with pytest.raises(Interruption):
                traced(load, line, occurrence)
            unchanged = contents(model, optimizer) == before
            assert unchanged or values(model, optimizer) == after, f"a mixture, at {line} ({occurrence})"
            outcomes["before" if unchanged else "after"] += 1
    return outcomes


def values(model: Any, optimizer: Any) -> Any:
    state = capture(optimizer, model)
    slots = {
        p.name: {
            slot: (v.tolist() if isinstance(v, torch.Tensor) else v)
            for slot, v in optimizer.state[model[p.name]].items()
        }
        for p in state.parameters
        if model[p.name] in optimizer.state
    }
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    return (
        slots,
        rates,
        float(optimizer.defaults["lr"]),
        [p.name for p in state.carried],
        getattr(optimizer, "count", 0),
    )


@pytest.mark.filterwarnings("ignore")
def test_a_load_is_all_or_nothing_at_every_line(tmp_path: Path) -> None:
    model, optimizer = trained()
    for group, rate in zip(optimizer.param_groups, (0.1, 0.2), strict=True):
        group["lr"] = torch.tensor(rate)
    optimizer.add_param_group({"params": [model["d"]], "lr": torch.tensor(0.2)})
    model["d"].grad = torch.ones(2)
    optimizer.step()
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")

    def prepare() -> tuple[Any, Any, Callable[[], Any]]:
        model, optimizer = trained()
        return (
            model,
            optimizer,
            lambda: load_optimizer(optimizer, model, tmp_path / "o.safetensors", unexpected="carry"),
        )

    assert {module for module, _ in traced(prepare()[2])} == {*MODULES} - {"hooks"}
    outcomes = outcomes_of(prepare)
    assert outcomes["before"] >= 150
    assert outcomes["after"] >= 1


@pytest.mark.filterwarnings("ignore")
def test_the_hooks_of_follow_names_are_all_or_nothing_at_every_line() -> None:
    model, optimizer = trained(torch.optim.AdamW)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.1)
    follow_names(optimizer, model)
    saved = copy.deepcopy(optimizer.state_dict())

    def prepare() -> tuple[Any, Any, Callable[[], Any]]:
        model, optimizer = trained(torch.optim.AdamW)
        follow_names(optimizer, model)
        return model, optimizer, lambda: optimizer.load_state_dict(copy.deepcopy(saved))

    outcomes = outcomes_of(prepare)
    assert outcomes["before"] >= 100
    assert outcomes["after"] == 0


def test_a_rate_made_in_inference_mode_is_replaced(tmp_path: Path) -> None:
    """Such a tensor cannot be filled in place outside of that mode."""
    model, optimizer = trained()
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    with torch.inference_mode():
        rate = torch.tensor(0.25)
    other = Counting(list(model.values())[:3], lr=rate, foreach=False)
    load_optimizer(other, model, tmp_path / "o.safetensors")
    assert other.param_groups[0]["lr"] == 0.5
    assert rate == 0.25


def test_a_failure_of_the_class_itself_puts_everything_back(tmp_path: Path) -> None:
    class Failing(Counting):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            raise MemoryError

    model, optimizer = trained(Failing)
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    optimizer.step()
    before = contents(model, optimizer)
    with pytest.raises(MemoryError):
        load_optimizer(optimizer, model, tmp_path / "o.safetensors")
    assert contents(model, optimizer) == before
    assert optimizer.count == 4
