"""Converting DeepSpeed and DCP folders, beside ``cp``, ``ds_to_universal`` and ``dcp_to_torch_save``.

    python tests/bench/sharded.py [--gigabytes 0.75 3] [--rounds 9] [--folder /dev/shm] [--only zero2 ...]

Needs the frameworks' environment and some four times the size in the folder, which should be in memory: ``cp`` does
not wait for a disk, and we do. Every contender is a process of its own; ours and ``cp`` take turns, the others run
once. The first column with ratios is time on the clock; where the machine does other things too, the one of processor
time says more.

``docs/cluster.md`` has the figures.

Files are laid out as DeepSpeed 0.19 lays them out; DCP's are written by torch on 2 ranks.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

SHAPES = ((4096,), (1000, 33), (512, 2048), (1024, 4096))
"""Of the parameters, in turn; the first alone makes the folder that start-up is measured with."""

RANKS = 2

LIMIT = 1.15
"""Times ``cp -r``, by the clock and without start-up, that a folder of ZeRO 2, ZeRO 3 or DCP may take."""

LIMITED = ("zero2", "zero3", "dcp")


def parameters(size: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of fp32 parameters whose state, with masters, has ``size`` bytes."""
    found: dict[str, tuple[int, ...]] = {}
    while 12 * sum(map(prod, found.values())) < size:
        found[f"layers.{len(found)}.weight"] = SHAPES[len(found) % len(SHAPES)]
    return found


def make_zero(folder: Path, size: int, stage: int, tensor: int = 1) -> None:
    """A ZeRO folder; of ``tensor`` ranks with slices of every parameter, if there are several."""
    for mp in range(tensor):
        make_ranks(folder, size // tensor, stage, mp, tensor)


def make_ranks(folder: Path, size: int, stage: int, mp: int, tensor: int) -> None:
    import torch
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    folder.mkdir(parents=True, exist_ok=True)
    shapes = parameters(size)
    shared = {"loss_scaler": LossScaler(1.0), "dynamic_loss_scale": False, "overflow": False, "ds_version": "0.19.8"}
    if stage == 3:
        share = sum(-(-prod(shape) // RANKS) for shape in shapes.values())
    else:
        share = -(-sum(map(prod, shapes.values())) // RANKS)
    for rank in range(RANKS):
        flat = {slot: torch.rand(share) for slot in ("exp_avg", "exp_avg_sq", "master")}
        state = {0: {"step": torch.tensor(3.0), **{slot: flat[slot] for slot in ("exp_avg", "exp_avg_sq")}}}
        base = {"state": state, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "params": [0]}]}
        tree: dict[str, Any]
        if stage == 3:
            tree = {"zero_stage": ZeroStageEnum(3), "partition_count": RANKS, "optimizer_state_dict": base}
            tree |= {"fp32_flat_groups": [flat["master"]], **shared}
        else:
            slices: dict[str, Any] = OrderedDict()
            start = 0
            for name, shape in shapes.items():
                low, high = max(start, rank * share), min(start + prod(shape), (rank + 1) * share)
                if low < high:
                    slices[name] = fragment_address(high - low, low - rank * share)
                start += prod(shape)
            tree = {"zero_stage": ZeroStageEnum(stage), "partition_count": [RANKS], "base_optimizer_state": base}
            tree |= {"single_partition_of_fp32_groups": [flat["master"]], "param_slice_mappings": [slices], **shared}
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_{mp:02d}_optim_states.pt"
        torch.save({"optimizer_state_dict": tree, "ds_version": "0.19.8"}, folder / name)
    model: dict[str, Any] = {
        "module": OrderedDict(), "buffer_names": [], "param_shapes": [OrderedDict(map(_size, shapes.items()))],
        "frozen_param_shapes": None, "shared_params": {}, "global_steps": 3, "dp_world_size": RANKS,
        "ds_version": "0.19.8", "ds_config": {}, "iteration": 3, "mp_world_size": tensor,
        "universal_checkpoint_info": {"parameter_with_row_parallelism_patterns": []},
    }  # fmt: skip
    for rank in range(RANKS if stage == 3 else 1):
        torch.save(model, folder / f"{f'zero_pp_rank_{rank}_' if stage == 3 else ''}mp_rank_{mp:02d}_model_states.pt")


def make_megatron(folder: Path, size: int) -> None:
    """A torch_dist folder, fully reshardable, with layers stacked as Megatron-Core stacks them."""
    import torch

    from lora_state_format.foreign.dcp import write_folder
    from lora_state_format.torch.tensors import from_torch

    layers = max(1, size // (8 * sum(map(prod, SHAPES))))
    entries: dict[tuple[str, ...], Any] = {}
    for slot in ("exp_avg", "exp_avg_sq"):
        for number, shape in enumerate(SHAPES):
            key = f"optimizer.state.{slot}.decoder.layers.mlp.part{number}.weight"
            entries[key,] = from_torch(torch.rand(layers, *shape))
    write_folder(entries, folder)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    groups = [{"wd_mult": 1.0, "step": 3, "lr": 1e-3}, {"wd_mult": 0.0, "step": 3, "lr": 1e-3}]
    torch.save({"optimizer": {"param_groups": groups}}, folder / "common.pt")


def _size(item: tuple[str, tuple[int, ...]]) -> tuple[str, Any]:
    import torch

    return item[0], torch.Size(item[1])


def make_dcp(folder: Path, size: int) -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import sharded; sharded.dcp_rank"
    started = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", f"{code}({rank}, {str(folder)!r}, {size})"])
        for rank in range(RANKS)
    ]
    assert not any(process.wait() for process in started)


def dcp_rank(rank: int, folder: str, size: int) -> None:
    """One of the ranks that write a DCP folder."""
    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    store: Any = dist.FileStore(f"{folder}.store", RANKS)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    state: dict[str, dict[str, Any]] = {}
    for name, shape in parameters(3 * size // 2).items():  # two tensors, where ZeRO has three
        rows = shape[0] // RANKS
        local = [torch.rand(rows, *shape[1:]) for _ in range(2)]
        whole = [DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False) for tensor in local]
        state[name] = {"step": torch.tensor(3.0), "exp_avg": whole[0], "exp_avg_sq": whole[1]}
    groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "params": list(state)}]
    save({"optimizer": {"state": state, "param_groups": groups}}, checkpoint_id=folder)
    dist.barrier()
    dist.destroy_process_group()


class Run(NamedTuple):
    """What a process took: seconds, seconds of processor time, and MiB at its peak."""

    wall: float
    cpu: float
    peak: int


def timed(command: list[str], cache: Path) -> Run:
    """One run. Compiled modules are kept in ``cache``, for an installed package does not compile its own anew."""
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(cache)}
    environment = {**os.environ, **compiled, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "2"}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss >> 10)


def ours(source: Path, target: Path) -> list[str]:
    options = ["--option", "masters"] if "zero" in source.name else []
    return [sys.executable, "-m", "lora_state_format", "convert", str(source), f"{target}.safetensors", *options]


def inspect(source: Path, target: Path) -> list[str]:
    return [sys.executable, "-m", "lora_state_format", "inspect", str(source)]


def copy(source: Path, target: Path) -> list[str]:
    return ["cp", "-r", str(source), str(target)]


def theirs(source: Path, target: Path) -> list[str]:
    if "zero" in source.name:
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(source)]
        return [*command, "--output_folder", str(target), "--inject_missing_state"]
    code = "import sys; from torch.distributed.checkpoint.format_utils import dcp_to_torch_save as f; f(*sys.argv[1:])"
    return [sys.executable, "-c", code, str(source), str(target)]


def alone(contender: Any, source: Path, target: Path) -> Run:
    """One run of a contender, its output removed before and after."""

    def remove() -> None:
        for path in target.parent.glob(f"{target.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    remove()
    try:
        return timed(contender(source, target), target.parent / "compiled")
    finally:
        remove()


def made(kind: str, gigabytes: float, root: Path) -> Path:
    """A folder, made by another process: this one has to stay small, for its children start with its peak memory."""
    source = root / kind
    shutil.rmtree(source, ignore_errors=True)
    command = [sys.executable, "-W", "ignore", __file__, "--make", kind, str(source), str(int(gigabytes * 1e9) or 1)]
    subprocess.run(command, check=True, capture_output=True)
    return source


def row(kind: str, gigabytes: float, root: Path, rounds: int) -> tuple[str, bool]:
    """Return a row of the table, and whether it misses its limit."""
    source, target = made(kind, 0, root), root / "target"
    started = [alone(ours, source, target) for _ in range(rounds + 1)][1:]  # the first one compiles
    start = Run(min(run.wall for run in started), min(run.cpu for run in started), 0)
    source = made(kind, gigabytes, root)
    pairs = []
    for number in range(rounds):
        order = [ours, copy] if number % 2 else [copy, ours]
        runs = {contender: alone(contender, source, target) for contender in order}
        pairs.append((runs[ours], runs[copy]))
    other = alone(theirs, source, target) if kind in ("zero2", "zero3", "dcp") else None
    looked = [alone(inspect, source, target).wall for _ in range(3)]
    shutil.rmtree(source)
    wall = [(mine.wall - start.wall) / cp.wall for mine, cp in pairs]
    cpu = [(mine.cpu - start.cpu) / cp.cpu for mine, cp in pairs]
    copying = statistics.median(cp.cpu for _, cp in pairs)
    over = statistics.median(wall) - LIMIT
    limit = f"{LIMIT}: {f'missed by {over:.2f}' if over > 0 else 'met'}" if kind in LIMITED else ""
    shown = (
        f"| {kind} | {gigabytes:g} | {statistics.median(wall):.2f}, {min(wall):.2f} | {limit} "
        f"| {statistics.median(cpu):.2f}, {min(cpu):.2f} | {start.wall:.2f} | {max(mine.peak for mine, _ in pairs)} "
        f"| {min(looked):.2f} | {f'{other.cpu / copying:.1f} | {other.peak}' if other else ' | '} |"
    )
    return shown, kind in LIMITED and over > 0


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--gigabytes", type=float, nargs="+", default=[0.75, 3.0])
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    arguments.add_argument("--only", nargs="+", default=[*LIMITED, "megatron", "tensor-zero1"])
    arguments.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.make:
        kind, folder, size = chosen.make[0], Path(chosen.make[1]), int(chosen.make[2])
        makers = {"dcp": make_dcp, "megatron": make_megatron}
        makers.get(kind, lambda f, s: make_zero(f, s, int(kind[-1]), 2 if kind.startswith("tensor") else 1))(
            folder, size
        )
        return
    print("| folder | GB | (ours - start-up) / cp: median, min | limit | the same in processor time ", end="")
    print("| start-up s | peak MiB | inspect s | theirs / cp, processor time | their peak MiB |\n|" + 10 * "---|")
    missed = False
    with tempfile.TemporaryDirectory(dir=chosen.folder) as root:
        for gigabytes in chosen.gigabytes:
            for kind in chosen.only:
                shown, over = row(kind, gigabytes, Path(root), chosen.rounds)
                print(shown, flush=True)
                missed = missed or over
    sys.exit(missed)


if __name__ == "__main__":
    main()
