from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_state_format.testing import assert_resume_is_exact
from lora_state_format.torch import load_optimizer, save_optimizer

Run = tuple[torch.nn.Module, torch.optim.Optimizer]


def build(lr: float = 0.1) -> Run:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=lr)


def train(run: Run, steps: range) -> None:
    model, optimizer = run
    for step in steps:
        optimizer.zero_grad()
        batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        model(batch).square().sum().backward()
        optimizer.step()


def save(run: Run, folder: Path) -> None:
    torch.save(run[0].state_dict(), folder / "model.pt")
    save_optimizer(run[1], run[0], folder / "optimizer.safetensors")


def resume(folder: Path) -> Run:
    model, optimizer = build()
    model.load_state_dict(torch.load(folder / "model.pt"))
    load_optimizer(optimizer, model, folder / "optimizer.safetensors")
    return model, optimizer


def test_a_loop_that_resumes() -> None:
    assert_resume_is_exact(build, train, save, resume)
    assert_resume_is_exact(build, train, save, resume, before=1, after=1)


def test_any_kind_of_run() -> None:
    assert_resume_is_exact(
        lambda: {"net": build()},
        lambda run, steps: train(run["net"], steps),
        lambda run, folder: save(run["net"], folder),
        lambda folder: {"net": resume(folder)},
        model=lambda run: run["net"][0],
    )


def cold(folder: Path) -> Run:
    model, optimizer = build()
    model.load_state_dict(torch.load(folder / "model.pt"))
    return model, optimizer


def other(folder: Path) -> Run:
    model = torch.nn.Linear(3, 2, bias=False)
    return model, torch.optim.AdamW(model.parameters())


def wider(folder: Path) -> Run:
    model = torch.nn.Linear(3, 4)
    return model, torch.optim.AdamW(model.parameters())


def careless(run: Run, steps: range) -> None:
    train(run, range(int(torch.randint(1000, (1,))), 1003))


def meddling(run: Run, folder: Path) -> None:
    save(run, folder)
    run[1].state.clear()


COLD = (
    "a cold start, with the weights but without the optimizer's state, ends in the same weights, so this shows "
    "nothing: train for more steps, at a learning rate that is not 0, with an optimizer that keeps state"
)
RESUMED = "resumed after 3 steps, the run differs from the uninterrupted one 3 steps later: "
TWO = "two uninterrupted runs differ: 2 of 2 tensors, 'weight' by up to "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resume": cold}, RESUMED + "2 of 2 tensors, 'weight' by up to 0."),
        ({"resume": other}, RESUMED + "other tensors: ['bias']"),
        ({"resume": wider}, RESUMED + "2 of 2 tensors, 'weight' in its shape"),
        ({"train": careless}, TWO),
        ({"save": meddling}, TWO),
        ({"build": lambda: build(lr=0.0), "resume": lambda folder: (resume(folder)[0], build(lr=0.0)[1])}, COLD),
    ],
)
def test_a_loop_that_does_not(change: dict[str, Callable[..., Any]], message: str) -> None:
    parts: dict[str, Any] = {"build": build, "train": train, "save": save, "resume": resume, **change}
    with pytest.raises(AssertionError) as caught:
        assert_resume_is_exact(**parts)
    assert str(caught.value).startswith(message)
