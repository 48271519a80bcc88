"""One rank of a run with sharded parameters, on the CPU with gloo.

Usage: sharded_run.py OUT RANK WORLD PORT CASE[,CASE..]
Cases: save, load, columns, hybrid, tensor-parallel, replicas, fsdp1, refused-save, missing-file, disagree, damaged,
background, in-step; and shards, with -hybrid, -tensor-parallel, -columns, which load and save as a set of shards, and
-messages, where each rank believes to be on a machine of its own. Rank r writes what it has to say as JSON to
OUT/CASE.WORLD.r.json; ``save`` writes OUT/weights.pt, OUT/state.safetensors and, three steps later, OUT/final.pt.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

out, rank, world, port, cases = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(world), OMP_NUM_THREADS="1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict  # noqa: E402
from torch.distributed.checkpoint.state_dict_saver import async_save, save  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor, Replicate, Shard  # noqa: E402
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module  # noqa: E402
from torch.distributed.tensor.placement_types import _StridedShard  # noqa: E402

from lora_state_format import open_state, verify  # noqa: E402
from lora_state_format.model.sources import File  # noqa: E402
from lora_state_format.model.states import Slot  # noqa: E402
from lora_state_format.model.tensors import Tensor  # noqa: E402
from lora_state_format.torch import capture, load_optimizer, neighbours, save_optimizer  # noqa: E402
from lora_state_format.torch.ranks import Ranks, agreement  # noqa: E402
from lora_state_format.torch.storage import NamedStorageWriter  # noqa: E402


class Net(nn.Module):
    """Rows that no number of ranks divides evenly, and a head that stays a plain tensor on every rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(256, 301)
        self.down = nn.Linear(301, 256, bias=False)
        self.head = nn.Linear(256, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.down(torch.tanh(self.up(x))))
        return result


def by_columns(parameter: nn.Parameter) -> Shard:
    """Along the last axis where the ranks divide it evenly, as FSDP2 wants it."""
    return Shard(parameter.dim() - 1 if parameter.shape[-1] == 256 else 0)


def build(case: str, weights: dict[str, torch.Tensor] | None = None) -> tuple[Net, torch.optim.Optimizer]:
    net = Net()
    if weights:
        net.load_state_dict(weights)
    case = case.removeprefix("shards-")
    if case == "tensor-parallel":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
        plan = {"up": RowwiseParallel(input_layouts=Replicate()), "down": ColwiseParallel(output_layouts=Replicate())}
        parallelize_module(net, mesh["tp"], plan)
        for layer in (net.up, net.down):
            fully_shard(layer, mesh=mesh["dp"])
    elif case == "hybrid":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        for layer in (net.up, net.down):
            fully_shard(layer, mesh=mesh)
    elif world > 1 and case != "replicas":
        for layer in (net.up, net.down):
            fully_shard(layer, shard_placement_fn=by_columns if case == "columns" else None)
    return net, torch.optim.AdamW(reversed(list(net.parameters())), lr=0.01, foreach=False)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """The same batch on every rank, so that the mean of the gradients is the gradient."""
    for step in range(first, last):
        x = torch.randn(16, 256, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def weights_of(net: Net) -> dict[str, torch.Tensor]:
    return {name: whole(parameter).clone() for name, parameter in net.named_parameters()}


def equals_the_file(net: Net, optimizer: torch.optim.Optimizer) -> bool:
    with open_state(out / "state.safetensors") as state:
        same = True
        for name, parameter in net.named_parameters():
            for slot, value in optimizer.state[parameter].items():
                stored: Any = state[name][slot]
                live = whole(value)
                same &= (
                    torch.equal(live, stored.torch()) if isinstance(stored, Tensor) else live.item() == stored.item()
                )
        return same


def share(net: Net) -> int:
    """The bytes of both moments that this rank holds."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in net.parameters())
    return sum(2 * p.numel() * p.element_size() for p in local)


def counted() -> list[int]:
    """What is read of files from now on: [bytes]."""
    total = [0]
    read = File.readinto

    def readinto(file: File, offset: int, out: memoryview) -> None:
        total[0] += len(out)
        read(file, offset, out)

    File.readinto = readinto  # type: ignore[assignment, method-assign]
    return total


def cut_up(weights: dict[str, torch.Tensor], **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """FSDP1 inside FSDP1, built from whole weights; the optimizer has another order and two groups."""
    net: Any = Net()
    net.load_state_dict(weights)
    net.up = FullyShardedDataParallel(net.up, device_id=torch.device("cpu"), **options)
    model = FullyShardedDataParallel(net, device_id=torch.device("cpu"), **options)
    parameters = list(model.parameters())[::-1]
    groups: list[dict[str, Any]] = [{"params": parameters[:2]}, {"params": parameters[2:]}]
    return model, torch.optim.AdamW(groups, lr=0.01, foreach=False)


def run_fsdp1(path: Path) -> dict[str, Any]:
    """Load what FSDP2 has saved, save that again, go on; load into what was cut up differently."""
    weights = torch.load(out / "weights.pt", weights_only=True)
    model, optimizer = cut_up(weights, use_orig_params=True)
    total = counted()
    load_optimizer(optimizer, model, path, verify=False)
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    held = [value for slots in optimizer.state.values() for value in slots.values() if value.dim()]
    result: dict[str, Any] = {"read": total[0] - header, "share": sum(v.numel() * v.element_size() for v in held)}
    result["report"] = load_optimizer(optimizer, model, path).line()
    target = out / "fsdp1-shards.safetensors"
    result["shards"] = len(save_optimizer(optimizer, model, target, global_step=3, max_shard_size=300_000).files)
    written = save_optimizer(optimizer, model, out / "fsdp1.safetensors", global_step=3)
    result["written"] = [Path(name).name for name in written.files]
    for key, other in (("equal", out / "fsdp1.safetensors"), ("equal shards", target)):
        with open_state(path) as saved, open_state(other) as again:
            result[key] = saved.keys() == again.keys() and all(
                read(saved[name].state) == read(again[name].state) and saved[name].weights == again[name].weights
                for name in saved
            )
    train(model, optimizer, 3, 6)
    with FullyShardedDataParallel.summon_full_params(model):
        final = torch.load(out / "final.pt", weights_only=True)
        own = {name.replace("_fsdp_wrapped_module.", ""): p.detach() for name, p in model.named_parameters()}
        result["continued"] = all(torch.equal(final[name], own[name]) for name in final)
    fresh, untouched = cut_up(weights, use_orig_params=True)
    save_optimizer(untouched, fresh, out / "fresh.safetensors")
    with open_state(out / "fresh.safetensors") as state:
        result["fresh"] = [parameter.state for parameter in state.values()]
    result["left alone"] = len(untouched.state) == 0
    flat, unnamed = cut_up(weights, use_orig_params=False)
    result["flat save"] = failed(lambda: save_optimizer(unnamed, flat, out / "flat.safetensors"))
    result["flat load"] = failed(lambda: load_optimizer(unnamed, flat, path))
    result["capture"] = failed(lambda: capture(optimizer, model))
    factored = torch.optim.Adafactor(model.parameters())
    result["refused"] = failed(lambda: load_optimizer(factored, model, out / "factored.safetensors"))
    return result


def in_step() -> dict[str, Any]:
    """Tell the others little and much, and fail outside of what is shared."""
    ranks = Ranks()
    long = ranks.share(lambda: "*" * 3_000 * rank)
    short = ranks.share(lambda: rank)

    def attempt() -> None:
        with agreement(Ranks()) as agree:
            agree(False)
            if rank == 1:
                raise ValueError("of its own")
            agree(True)

    return {"long": list(map(len, long)), "short": short, "error": failed(attempt), "then": ranks.share(lambda: rank)}


def read(state: Any) -> dict[str, Any]:
    return {name: value.tensor.torch().tolist() if isinstance(value, Slot) else value for name, value in state.items()}


def failed(action: Any) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def run(case: str) -> dict[str, Any]:
    path = out / "state.safetensors"
    if case == "save":
        net, optimizer = build(case)
        train(net, optimizer, 0, 3)
        written = save_optimizer(optimizer, net, path, global_step=3)
        kept = weights_of(net)
        train(net, optimizer, 3, 6)
        stepped = weights_of(net)
        if rank == 0:
            torch.save(kept, out / "weights.pt")
            torch.save(stepped, out / "final.pt")
        dist.barrier()
        return {"written": [Path(name).name for name in written.files], "tensors": written.tensors}
    if case == "fsdp1":
        if rank == 0:
            plain = Net()
            factored = torch.optim.Adafactor(plain.parameters())
            train(plain, factored, 0, 1)
            save_optimizer(factored, plain, out / "factored.safetensors")
        dist.barrier()
        return run_fsdp1(path)
    if case == "in-step":
        return in_step()
    net, optimizer = build(case, torch.load(out / "weights.pt", weights_only=True))
    if case == "replicas":
        replica = nn.parallel.DistributedDataParallel(net)
        report = load_optimizer(optimizer, replica, path)
        result = {"report": report.line(), "equal": equals_the_file(net, optimizer)}
        if rank == 0:
            save_optimizer(optimizer, replica, out / "replicas.safetensors", global_step=3)
        dist.barrier()
        load_optimizer(optimizer, replica, out / "replicas.safetensors")
        return {**result, "same bytes": path.read_bytes() == (out / "replicas.safetensors").read_bytes()}
    if case == "refused-save":
        train(net, optimizer, 0, 1)
        target = out / "folder" / "state.safetensors"
        if rank == 0:
            (out / "folder").write_text("a file where a folder is wanted")
        dist.barrier()
        remote = failed(lambda: save_optimizer(optimizer, net, "memory://bucket/optimizer.safetensors"))
        return {"error": failed(lambda: save_optimizer(optimizer, net, target)), "remote": remote}
    if case == "disagree":
        train(net, optimizer, 0, 1)
        if rank == 1:
            del optimizer.state[net.down.weight]
        error = failed(lambda: save_optimizer(optimizer, net, out / "disagree.safetensors"))
        return {"error": error, "left": sorted(p.name for p in out.glob(".disagree*"))}
    if case == "damaged":
        broken = out / "broken.safetensors"
        if rank == 0:
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            broken.write_bytes(data)
        dist.barrier()
        return {"error": failed(lambda: load_optimizer(optimizer, net, broken)), "states": len(optimizer.state)}
    if case == "missing-file":
        name = path if rank == 0 else out / "elsewhere.safetensors"
        return {"error": failed(lambda: load_optimizer(optimizer, net, name)), "states": len(optimizer.state)}
    if case == "recipe":
        text = (
            (Path(__file__).parents[3] / "docs" / "torch.md")
            .read_text()
            .partition("```python\n")[2]
            .partition("```")[0]
        )
        other, theirs = build(case, torch.load(out / "weights.pt", weights_only=True))
        folder = out / "recipe" / str(world)
        load_optimizer(optimizer, net, path)
        save_optimizer(optimizer, net, folder / "optimizer.safetensors", max_shard_size=300_000)
        exec(text, {"model": other, "optimizer": theirs, "folder": str(folder)})
        pairs = [
            (optimizer.state[mine][slot], theirs.state[own][slot])
            for mine, own in zip(net.parameters(), other.parameters(), strict=True)
            for slot in optimizer.state[mine]
        ]
        same = all(torch.equal(whole(a), whole(b)) for a, b in pairs)
        return {"same": same, "tensors": len(pairs), "lr": theirs.param_groups[0]["lr"]}
    if case == "storage":
        load_optimizer(optimizer, net, path)
        state_dict = {"optimizer": get_optimizer_state_dict(net, optimizer)}
        writer = NamedStorageWriter(out / f"dcp.{world}.safetensors", max_shard_size=300_000, global_step=3)
        save(state_dict, storage_writer=writer)
        behind = NamedStorageWriter(out / f"async.{world}.safetensors", max_shard_size=300_000, global_step=3)
        pending: Any = async_save(state_dict, storage_writer=behind)
        pending.result()
        assert writer.written
        assert behind.written
        other, theirs = build(case, torch.load(out / "weights.pt", weights_only=True))
        report = load_optimizer(theirs, other, writer.written.path)
        return {
            "same": equals_the_file(other, theirs), "files": len(writer.written.files), "report": report.line(),
            "async": behind.written.digest == writer.written.digest,
        }  # fmt: skip
    if case == "background":
        load_optimizer(optimizer, net, path)
        pending = save_optimizer(optimizer, net, out / "behind.safetensors", global_step=3, background=True)
        train(net, optimizer, 3, 5)
        written = pending.wait()
        (out / "folder").write_text("a file where a folder is wanted")
        save_optimizer(optimizer, net, out / "folder" / "state.safetensors", background=True)
        later = failed(lambda: save_optimizer(optimizer, net, out / "after.safetensors"))
        save_optimizer(optimizer, net, out / "after.safetensors")
        same = (out / "behind.safetensors").read_bytes() == path.read_bytes()
        return {"same": same, "digest": written.digest, "later": later, "after": verify(out / "after.safetensors").ok}
    if case.startswith("shards"):
        load_optimizer(optimizer, net, path)
        target, messages, exchange = out / f"{case}.{world}.safetensors", [0], dist.all_to_all_single

        def counting(*arguments: Any, **options: Any) -> Any:
            messages[0] += 1
            return exchange(*arguments, **options)

        dist.all_to_all_single = counting
        machine = neighbours._machine
        if case == "shards-messages":
            neighbours._machine = lambda: (f"machine {rank}", "")
        written = save_optimizer(optimizer, net, target, global_step=3, max_shard_size=300_000)
        dist.all_to_all_single, neighbours._machine = exchange, machine
        return {
            "digest": written.digest, "files": len(written.files), "verified": verify(target).ok,
            "messages": messages[0],
        }  # fmt: skip
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    total = counted()
    load_optimizer(optimizer, net, path, verify=False)
    result = {"read": total[0] - header, "share": share(net), "equal": equals_the_file(net, optimizer)}
    total[0] = 0
    report = load_optimizer(optimizer, net, path)
    placed = [p for parameter in net.parameters() if isinstance(parameter, DTensor) for p in parameter.placements]
    result["strided"] = any(isinstance(placement, _StridedShard) for placement in placed)
    result |= {"report": report.line(), "read verified": total[0] - header, "again": equals_the_file(net, optimizer)}
    train(net, optimizer, 3, 6)
    final = torch.load(out / "final.pt", weights_only=True)
    result["continued"] = all(torch.equal(final[name], weight) for name, weight in weights_of(net).items())
    return result


if world > 1:
    dist.init_process_group("gloo")
try:
    for case in cases.split(","):
        (out / f"{case}.{world}.{rank}.json").write_text(json.dumps(run(case)))
except BaseException:
    traceback.print_exc()
    os._exit(1)
if world > 1:
    dist.barrier()
    dist.destroy_process_group()
    # Threads that the process group leaves sometimes abort the exit of the interpreter; everything is done by then.
    sys.stdout.flush()
    os._exit(0)
