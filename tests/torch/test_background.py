from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_state_format as lsf
from lora_state_format.errors import CaptureError, TargetExistsError
from lora_state_format.format import writing
from lora_state_format.torch import save_optimizer


@pytest.fixture
def run() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    return model, optimizer


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 16)).square().sum().backward()
    optimizer.step()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits until this event is set; what is written, and how, stays the real thing."""
    event, write = threading.Event(), writing.write

    def held(*args: Any, **kwargs: Any) -> writing.Written:
        assert event.wait(20)
        return write(*args, **kwargs)

    monkeypatch.setattr(writing, "write", held)
    return event


def test_it_is_the_state_of_the_moment(
    run: tuple[torch.nn.Module, torch.optim.Optimizer], tmp_path: Path, gate: threading.Event
) -> None:
    model, optimizer = run
    gate.set()
    save_optimizer(optimizer, model, tmp_path / "expected.safetensors", global_step=1)
    gate.clear()
    save = save_optimizer(optimizer, model, tmp_path / "deep" / "a.safetensors", global_step=1, background=True)
    step(model, optimizer)  # the run goes on while nothing is written yet
    assert not save.done
    gate.set()
    written = save.wait()
    assert save.done
    assert written.path == str(tmp_path / "deep" / "a.safetensors")
    assert Path(written.path).read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    assert save.wait() == written


def test_strided_and_narrow_tensors_are_copied_as_they_are(tmp_path: Path) -> None:
    model: Any = torch.nn.Conv2d(2, 3, 3).to(torch.bfloat16)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2, 5, 5, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    save_optimizer(optimizer, model, tmp_path / "a.safetensors")
    save_optimizer(optimizer, model, tmp_path / "b.safetensors", background=True).wait()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_one_writer_at_a_time(
    run: tuple[torch.nn.Module, torch.optim.Optimizer], tmp_path: Path, gate: threading.Event
) -> None:
    model, optimizer = run
    first = save_optimizer(optimizer, model, tmp_path / "a.safetensors", global_step=1, background=True)
    threading.Timer(0.3, gate.set).start()
    save_optimizer(optimizer, model, tmp_path / "a.safetensors", global_step=2)  # waits for the first
    assert first.done
    with lsf.open_state(tmp_path / "a.safetensors") as state:
        assert state.global_step == 2
    second = save_optimizer(optimizer, model, tmp_path / "a.safetensors", global_step=3, background=True)
    third = save_optimizer(optimizer, model, tmp_path / "a.safetensors", global_step=4, background=True)
    assert second.done
    third.wait()
    with lsf.open_state(tmp_path / "a.safetensors") as state:
        assert state.global_step == 4


@pytest.mark.parametrize("background", [False, True])
def test_an_error_surfaces_at_the_next_save(
    run: tuple[torch.nn.Module, torch.optim.Optimizer], tmp_path: Path, caplog: pytest.LogCaptureFixture,
    background: bool,
) -> None:  # fmt: skip
    model, optimizer = run
    (tmp_path / "a.safetensors").write_text("precious")
    save_optimizer(optimizer, model, tmp_path / "a.safetensors", force=False, background=True)
    with pytest.raises(TargetExistsError):
        save_optimizer(optimizer, model, tmp_path / "b.safetensors", background=background)  # type: ignore[call-overload]
    assert not (tmp_path / "b.safetensors").exists()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert caplog.messages[0].startswith("a save in the background failed: TargetExistsError: ")
    save_optimizer(optimizer, model, tmp_path / "b.safetensors")  # it was said once


def test_an_error_surfaces_at_wait(run: tuple[torch.nn.Module, torch.optim.Optimizer], tmp_path: Path) -> None:
    model, optimizer = run
    (tmp_path / "a.safetensors").write_text("precious")
    save = save_optimizer(optimizer, model, tmp_path / "a.safetensors", force=False, background=True)
    for _ in range(2):
        with pytest.raises(TargetExistsError):
            save.wait()
    save_optimizer(optimizer, model, tmp_path / "b.safetensors")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_what_cannot_be_captured_is_said_at_once(
    run: tuple[torch.nn.Module, torch.optim.Optimizer], tmp_path: Path
) -> None:
    other = torch.nn.Linear(2, 2)
    with pytest.raises(CaptureError):
        save_optimizer(run[1], other, tmp_path / "a.safetensors", background=True)
    save_optimizer(run[1], run[0], tmp_path / "a.safetensors", background=True).wait()


def test_the_copy_is_let_go(run: tuple[torch.nn.Module, torch.optim.Optimizer], tmp_path: Path) -> None:
    model, optimizer = run
    save = save_optimizer(optimizer, model, tmp_path / "a.safetensors", background=True)
    save.wait()
    assert not hasattr(save, "_write")


def test_the_program_ends_when_it_is_written(tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "from lora_state_format.torch import save_optimizer\n"
        "model = torch.nn.Linear(2000, 2000)\n"
        "optimizer = torch.optim.Adam(model.parameters())\n"
        "model(torch.ones(2000)).sum().backward(); optimizer.step()\n"
        "save_optimizer(optimizer, model, 'a.safetensors', background=True)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    assert lsf.verify(tmp_path / "a.safetensors").ok


def test_a_failure_that_nobody_waited_for_is_the_last_that_is_said(tmp_path: Path) -> None:
    code = f"""
import torch
from lora_state_format.torch import save_optimizer
model = torch.nn.Linear(2, 2)
save_optimizer(torch.optim.AdamW(model.parameters()), model, r"{tmp_path}/o.safetensors", force=False)
optimizer = torch.optim.AdamW(model.parameters())
save_optimizer(optimizer, model, r"{tmp_path}/o.safetensors", force=False, background=True)
print("done")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "done\n"
    assert result.stderr.splitlines()[-1] == (
        "lora_state_format: the last save in the background failed, and nothing waited for it: TargetExistsError: "
        f"{tmp_path}/o.safetensors exists; pass force=True to replace it"
    )


def test_a_step_while_the_state_is_saved_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step in another thread, between reading the first tensor and the commit."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    step()
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    before = (tmp_path / "o.safetensors").read_bytes()
    stream = writing.stream

    def stepped(*arguments: Any, **options: Any) -> None:
        other = threading.Thread(target=step)
        other.start()
        other.join()
        stream(*arguments, **options)

    monkeypatch.setattr(writing, "stream", stepped)
    with pytest.raises(CaptureError) as caught:
        save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    assert str(caught.value) == (
        "6 of the optimizer's 6 tensors were written into while they were saved, by a step in another thread; nothing "
        "was written: save between two steps"
    )
    assert (tmp_path / "o.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["o.safetensors"]
