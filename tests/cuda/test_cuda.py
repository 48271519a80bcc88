"""What needs a CUDA device: ``make test-cuda``. Resumed equals uninterrupted, bit for bit, on the same device.

Everything is skipped where there is no device. Reductions of a kernel may run in any order: the loss is made of few
elements, and deterministic algorithms are asked for.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_state_format import open_state, verify
from lora_state_format.torch import load_optimizer, save_optimizer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]

Make = Callable[[torch.nn.Module], torch.optim.Optimizer]


def adamw(**options: Any) -> Make:
    return lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


def bitsandbytes(name: str) -> Make:
    library = pytest.importorskip("bitsandbytes")
    return lambda model: getattr(library.optim, name)(model.parameters(), lr=1e-2)


def net(dtype: torch.dtype = torch.float32, device: str = "cuda") -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(128, 96), torch.nn.Tanh(), torch.nn.Linear(96, 64)).to(device, dtype)


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, *, compiled: bool = False
) -> None:
    own: Any = next(model.parameters())
    step = torch.compile(optimizer.step) if compiled else optimizer.step
    for number in range(first, last):
        x = torch.randn(8, 128, generator=torch.Generator().manual_seed(number)).to(own.device, own.dtype)
        model(x).square().mean().backward()
        step()
        optimizer.zero_grad()


def copied(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def resumed(make: Make, path: Path, dtype: torch.dtype, *, compiled: bool = False, **saving: Any) -> bool:
    """Whether a run that is saved after three steps and resumed arrives where it arrives without."""
    model = net(dtype)
    optimizer = make(model)
    train(model, optimizer, 0, 3, compiled=compiled)
    pending = save_optimizer(optimizer, model, path, **saving)
    kept = copied(model)
    train(model, optimizer, 3, 6, compiled=compiled)
    if saving.get("background"):
        pending.wait()
    other = net(dtype)
    with torch.no_grad():
        for parameter, value in zip(other.parameters(), kept, strict=True):
            parameter.copy_(value)
    fresh = make(other)
    report = load_optimizer(fresh, other, path)
    assert report.restored == 4
    assert report.matching == 4
    train(other, fresh, 3, 6, compiled=compiled)
    return all(a.equal(b) for a, b in zip(copied(model), copied(other), strict=True))


@pytest.mark.parametrize(
    "options",
    [{"fused": True}, {"capturable": True}, {"foreach": True}, {"foreach": False}, {"fused": True, "amsgrad": True}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adamw(tmp_path: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    assert resumed(adamw(**options), tmp_path / "state.safetensors", dtype)


def test_a_save_behind_the_run_through_pinned_memory(tmp_path: Path) -> None:
    assert resumed(adamw(fused=True), tmp_path / "state.safetensors", torch.float32, background=True)


def test_a_compiled_step(tmp_path: Path) -> None:
    assert resumed(adamw(capturable=True), tmp_path / "state.safetensors", torch.float32, compiled=True)


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW"])
def test_bitsandbytes(tmp_path: Path, name: str) -> None:
    assert resumed(bitsandbytes(name), tmp_path / "state.safetensors", torch.float32)


def test_from_the_device_to_the_cpu_and_back(tmp_path: Path) -> None:
    model = net()
    optimizer = adamw(fused=True)(model)
    train(model, optimizer, 0, 3)
    first, second = tmp_path / "device.safetensors", tmp_path / "cpu.safetensors"
    save_optimizer(optimizer, model, first)
    host = net(device="cpu")
    host.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})
    there = torch.optim.AdamW(host.parameters(), lr=1e-2, fused=True)
    assert load_optimizer(there, host, first).matching == 4
    save_optimizer(there, host, second)
    with open_state(first) as a, open_state(second) as b:
        assert all(a[name]["exp_avg_sq"].bytes() == b[name]["exp_avg_sq"].bytes() for name in a)
    again = adamw(fused=True)(model)
    load_optimizer(again, model, second)
    for parameter in model.parameters():
        assert again.state[parameter]["step"].device == parameter.device
        for slot, value in optimizer.state[parameter].items():
            assert torch.equal(value, again.state[parameter][slot])


@pytest.mark.parametrize("case", ["fsdp2", "fsdp1", "zero1", "zero2"])
def test_sharded_on_one_device(tmp_path: Path, case: str) -> None:
    if case.startswith("zero"):
        pytest.importorskip("deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parent / "runs" / "sharded_cuda_run.py"
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), case],
        capture_output=True,
        text=True,
        timeout=240,
        env={**environment, "LOCAL_RANK": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "resumed: True, background: True"
    assert verify(tmp_path / "state.safetensors").ok
