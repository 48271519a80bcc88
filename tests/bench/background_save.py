"""How long training stands still for a save, beside one copy of the state, ``torch.save`` and ``dcp.async_save``.

::

    python tests/bench/background_save.py [MEGABYTES] [FOLDER]

AdamW over layers of 2048 x 2048, of so many megabytes of state (default 512), saved into a folder in memory
(``/dev/shm``). Every round measures each case once, in rotated order; what is printed are minimum and median, and the
median of the ratios to one copy in the same round. The budget is 1.2 copies for the state; digests of the weights read
half as many bytes again, and are shown apart.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import async_save

from lora_state_format.torch import save_optimizer

ROUNDS: Final = 11
SIDE: Final = 2048
BUDGET: Final = 1.2
COPY: Final = "one copy of the state"
BACKGROUND: Final = "save_optimizer(background=True)"


def train(megabytes: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    layers = max(megabytes * 2**20 // (2 * 4 * SIDE * SIDE), 1)
    model = torch.nn.Sequential(*(torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def cases(model: Any, optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, Callable[[], Callable[[], Any]]]:
    """What is done while training stands still; each returns how to wait for the rest, which is not measured."""
    path = folder / "optimizer.safetensors"

    def copy() -> Callable[[], Any]:
        kept = [slot.clone() for state in optimizer.state.values() for slot in state.values()]
        return kept.clear

    def torch_save() -> Callable[[], Any]:
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        return lambda: None

    def dcp_save() -> Callable[[], Any]:
        future: Any = async_save({"optimizer": optimizer.state_dict()}, checkpoint_id=folder / "dcp")
        wait: Callable[[], Any] = future.result
        return wait

    def foreground() -> Callable[[], Any]:
        save_optimizer(optimizer, model, path)
        return lambda: None

    return {
        COPY: copy,
        BACKGROUND: lambda: save_optimizer(optimizer, model, path, background=True, weights=False).wait,
        "  and digests of the weights": lambda: save_optimizer(optimizer, model, path, background=True).wait,
        "save_optimizer": foreground,
        "torch.save": torch_save,
        "dcp.async_save": dcp_save,
    }


def measure(megabytes: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of standing still, by case, round by round."""
    model, optimizer = train(megabytes)
    timed = cases(model, optimizer, folder)
    for case in timed.values():
        case()()
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    names = list(timed)
    for number in range(ROUNDS):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter()
            rest = timed[name]()
            seconds[name].append(time.perf_counter() - started)
            rest()
    return seconds


def main(megabytes: str = "512", folder: str = "/dev/shm") -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541"}
    warnings.filterwarnings("ignore", "Detected an existing checkpoint")
    dist.init_process_group("gloo", rank=0, world_size=1)  # dcp.async_save asks for one
    with tempfile.TemporaryDirectory(dir=folder) as target:
        seconds = measure(int(megabytes), Path(target))
    dist.destroy_process_group()
    copies = seconds[COPY]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {megabytes} MB of state, {ROUNDS} rounds")
    ratios = {name: median(a / b for a, b in zip(found, copies, strict=True)) for name, found in seconds.items()}
    for name, found in seconds.items():
        print(f"{name:34} min {min(found):7.3f} s  median {median(found):7.3f} s  {ratios[name]:5.2f} copies")
    sys.exit(ratios[BACKGROUND] > BUDGET)


if __name__ == "__main__":
    main(*sys.argv[1:])
