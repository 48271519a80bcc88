"""How time grows: every job over so many parameters, in one group and in a group each, and over twice as many.

``python tests/bench/growth.py [--largest 16000]``. Adam-mini and many scripts make a group of each parameter. The
exponent is that of the last doubling: 1 is linear, 2 quadratic. Times are the least of three runs. Nothing is asserted,
for a busy machine says little; whoever changes a job looks at its row.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from lora_state_format.binding.live import LiveGroup, LiveOptimizer, LiveParameter
from lora_state_format.binding.plan import plan
from lora_state_format.foreign import keyed
from lora_state_format.foreign.state_dict import from_state_dict, to_state_dict
from lora_state_format.format import reading, writing
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import (
    Group,
    Naming,
    Optimizer,
    OptimizerState,
    Parameter,
    Role,
    Scalar,
    Slot,
    Value,
)
from lora_state_format.model.tensors import contiguous
from lora_state_format.naming import names, order
from lora_state_format.operations import edit
from lora_state_format.operations.diff import diff

CLASS: Final = "torch.optim.adamw.AdamW"
OPTIONS: Final = (("lr", 1e-4), ("betas", (0.9, 0.999)), ("eps", 1e-8), ("weight_decay", 0.01))


def a_state(count: int, groups: int) -> OptimizerState:
    slot = Slot(contiguous("F32", (2, 2), Memory(bytes(range(16)))), Role.PARAM)
    slots: dict[str, Value] = {"step": Scalar.of("F32", 3.0), "exp_avg": slot, "exp_avg_sq": slot}
    parameters = tuple(
        Parameter(f"layers.{n // 7}.{'qkvogud'[n % 7]}_proj.weight", (2, 2), slots, "F32") for n in range(count)
    )
    size = count // groups
    return OptimizerState(
        (Optimizer(CLASS),), tuple(Group(0, OPTIONS, size) for _ in range(groups)), parameters, Naming("model")
    )


def a_live(state: OptimizerState) -> LiveOptimizer:
    parameters = {p.name: LiveParameter(p.name, p.shape, "F32") for p in state.parameters}
    groups = tuple(LiveGroup(0, OPTIONS, tuple(p.name for p in members)) for members in state.members())
    return LiveOptimizer(state.optimizers, groups, parameters)


Job = Callable[[OptimizerState, Path], Callable[[], Any]]
"""Gets all ready; what it returns is timed."""


def opened(state: OptimizerState, folder: Path, shards: int | None = None) -> Path:
    path = folder / "a.safetensors"
    size = None if shards is None else -(-len(state) // shards) * 32
    writing.write(state, path, force=True, max_shard_size=size)
    return path


def merged(state: OptimizerState, folder: Path) -> Callable[[], Any]:
    path = opened(state, folder, 64)
    return lambda: reading.open_state(path).close()


def decided(state: OptimizerState, folder: Path) -> Callable[[], Any]:
    positional = from_state_dict(to_state_dict(state))
    return lambda: order.decide(positional, state.parameters, rule="listed", source="names")


def verified(state: OptimizerState, folder: Path) -> Callable[[], Any]:
    path = opened(state, folder)
    return lambda: reading.verify(path)


def planned(state: OptimizerState, folder: Path) -> Callable[[], Any]:
    live = a_live(state)
    return lambda: plan(state, live)


def compared(state: OptimizerState, folder: Path) -> Callable[[], Any]:
    other = a_state(len(state), len(state.groups))
    return lambda: diff(state, other)


def read(state: OptimizerState, folder: Path) -> Callable[[], Any]:
    path = opened(state, folder)
    return lambda: reading.open_state(path).close()


JOBS: Final[dict[str, Job]] = {
    "plan": planned,
    "write": lambda state, folder: lambda: opened(state, folder),
    "write, 64 shards": lambda state, folder: lambda: opened(state, folder, 64),
    "open": read,
    "open, 64 shards": merged,
    "verify": verified,
    "diff": compared,
    "rename": lambda state, _: lambda: edit.rename(state, lambda name: f"model.{name}"),
    "prune": lambda state, _: lambda: edit.prune(state, "q_proj"),
    "set options": lambda state, _: lambda: edit.set_options(state, {"lr": 1.0}),
    "state dict": lambda state, _: lambda: from_state_dict(to_state_dict(state)),
    "names, order": decided,
    "by name": lambda state, _: lambda: keyed.named(from_state_dict(keyed.by_name(state))),
    "wrappers": lambda state, _: lambda: names.without_wrappers([f"module.{name}" for name in state]),
}


def seconds(job: Job, count: int, groups: int) -> float:
    state = a_state(count, groups)
    best = math.inf
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        ready = job(state, Path(folder))
        for _ in range(3):
            start = time.process_time()
            ready()
            best = min(best, time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description="How the time of every job grows with parameters and groups.")
    parser.add_argument("jobs", nargs="*", help=f"of {', '.join(JOBS)}; all by default")
    parser.add_argument("--largest", type=int, default=16_000, help="parameters; half and a quarter are tried too")
    given = parser.parse_args()
    counts = [given.largest // 4, given.largest // 2, given.largest]
    head = " | ".join(f"{count:,}" for count in counts)
    print(f"| job | groups | {head} | exponent |\n|---|---|{'---|' * (len(counts) + 1)}")
    for name in given.jobs or JOBS:
        for one in (True, False):
            found = [seconds(JOBS[name], count, 1 if one else count) for count in counts]
            exponent = math.log2(found[-1] / found[-2])
            cells = " | ".join(f"{value:.3f}" for value in found)
            print(f"| {name} | {'one' if one else 'one each'} | {cells} | {exponent:.1f} |", flush=True)


if __name__ == "__main__":
    main()
