"""Saving and loading a sharded state beside ``torch.distributed.checkpoint``, on gloo ranks of one machine.

    python tests/bench/distributed.py [--ranks 1 2 4 8] [--megabytes 400] [--rounds 5] [--folder /dev/shm]

FSDP2 with AdamW; every contender works on the same state in turn, in rotated order, and the ratio of a round is that
of its own times. Columns: ours / ``dcp.save``; what stands still in a save behind the run / a copy of the rank's share,
for ours and for ``dcp.async_save``; ours / ``dcp.load``, without and with verifying; bytes read / share for both;
rank 0's ``torch.save`` of a full state dict / ``dcp.save``; by how much a rank's memory grows in a save, in MiB; and
ours / ``dcp.save`` in processor time of all ranks, which other programs on the machine change less.
``docs/scale.md`` has the figures.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDTH = 2048


def measure(folder: Path, megabytes: int, rounds: int) -> None:
    """Be one of the ranks; rank 0 prints a row."""
    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
    from torch.distributed.checkpoint.state_dict_saver import async_save
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from lora_state_format.torch import load_optimizer, save_optimizer

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    layers = max(1, round(megabytes * 1e6 / (8 * WIDTH * WIDTH)))
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    mesh = init_device_mesh("cpu", (world,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    model(torch.ones(1, WIDTH)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    share = sum(v.to_local().nbytes for s in optimizer.state.values() for v in s.values() if hasattr(v, "to_local"))
    ours, theirs, whole = folder / "ours" / "optimizer.safetensors", folder / "dcp", folder / "whole.pt"
    group: Any = dist.new_group(backend="gloo")

    def timed(action: Callable[[], Any]) -> float:
        dist.barrier()
        start = time.perf_counter()
        action()
        dist.barrier()
        return time.perf_counter() - start

    def state_dict(**options: Any) -> dict[str, Any]:
        return {"optimizer": get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**options))}

    def load_theirs() -> None:
        found = state_dict()
        dcp_load(found, checkpoint_id=theirs)
        set_optimizer_state_dict(model, optimizer, found["optimizer"])

    def full() -> None:
        found = state_dict(full_state_dict=True, cpu_offload=True)
        if rank == 0:
            torch.save(found, whole)

    def copy() -> None:
        kept = [v.to_local().clone() for s in optimizer.state.values() for v in s.values() if hasattr(v, "to_local")]
        del kept

    def stalled(start: Callable[[], Any], end: Callable[[Any], Any] = lambda job: None) -> float:
        """Return the seconds from the first rank's call to the last one's return; all of them read one clock."""
        dist.barrier()
        begun = time.perf_counter()
        job = start()
        span = torch.tensor([-begun, time.perf_counter()], dtype=torch.float64)
        end(job)
        dist.all_reduce(span, dist.ReduceOp.MAX)
        return float(span.sum())

    def read(action: Callable[[], Any]) -> float:
        def taken() -> int:
            return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])

        before = taken()
        action()
        total = torch.tensor([taken() - before])
        dist.all_reduce(total)
        return float(total) / float(share * world)

    contenders: dict[str, Callable[[], float]] = {
        "save": lambda: timed(lambda: save_optimizer(optimizer, model, ours)),
        "save without weights": lambda: timed(lambda: save_optimizer(optimizer, model, ours, weights=False)),
        "dcp.save": lambda: timed(lambda: dcp_save(state_dict(), checkpoint_id=theirs)),
        "full": lambda: timed(full),
        "copy": lambda: stalled(copy),
        "stall": lambda: stalled(
            lambda: save_optimizer(optimizer, model, ours, background=True, weights=False), lambda job: job.wait()
        ),
        "async": lambda: stalled(
            lambda: async_save(state_dict(), checkpoint_id=theirs, process_group=group), lambda job: job.result()
        ),
        "load": lambda: timed(lambda: load_optimizer(optimizer, model, ours, verify=False)),
        "load verified": lambda: timed(lambda: load_optimizer(optimizer, model, ours)),
        "dcp.load": lambda: timed(load_theirs),
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    contenders["save"]()
    grown = torch.tensor([(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) >> 10])
    dist.all_reduce(grown, dist.ReduceOp.MAX)
    contenders["dcp.save"]()
    times: list[dict[str, float]] = []
    processor: list[dict[str, float]] = []

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    for number in range(rounds):
        names = list(contenders)
        turned = names[number % len(names) :] + names[: number % len(names)]
        times.append({name: contenders[name]() for name in turned})
        processor.append({})
        for name in ("save", "save without weights", "dcp.save"):
            before = used()
            contenders[name]()
            spent = torch.tensor([used() - before])
            dist.all_reduce(spent)
            processor[-1][name] = float(spent)
    plain = read(lambda: load_optimizer(optimizer, model, ours, verify=False))
    checked = read(lambda: load_optimizer(optimizer, model, ours))

    def ratio(one: str, other: str, rounds: list[dict[str, float]] = times) -> str:
        return f"{statistics.median(item[one] / item[other] for item in rounds):.2f}"

    if rank == 0:
        cells = [
            str(world), f"{share * world / 1e6:.0f}", ratio("save", "dcp.save"),
            ratio("save without weights", "dcp.save"),
            ratio("full", "dcp.save"), ratio("stall", "copy"), ratio("async", "copy"), ratio("load", "dcp.load"),
            ratio("load verified", "dcp.load"), f"{plain:.2f}, {checked:.2f}", str(int(grown)),
            ratio("save", "dcp.save", processor), ratio("save without weights", "dcp.save", processor),
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |", flush=True)
    dist.barrier()
    os._exit(0)  # threads that the process group leaves sometimes abort the exit of the interpreter


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments.add_argument("--megabytes", type=int, default=400)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    chosen = arguments.parse_args()
    if "RANK" in os.environ:
        measure(chosen.folder, chosen.megabytes, chosen.rounds)
    print(
        "| ranks | MB | save | without weights | full on rank 0 | stall | async's | load | verified | read | MiB "
        "| processor time of save | without weights |"
    )
    print("|" + 13 * "---|", flush=True)
    for world in chosen.ranks:
        folder = Path(tempfile.mkdtemp(dir=chosen.folder))
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        own = [__file__, "--folder", str(folder), "--megabytes", str(chosen.megabytes), "--rounds", str(chosen.rounds)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            subprocess.run([*command, "--nproc-per-node", str(world), *own], check=True, env=environment)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
