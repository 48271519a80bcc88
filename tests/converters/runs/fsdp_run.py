"""One rank of an FSDP run on the CPU: the folders and files that its users save, and the full state that the run held.

Usage: fsdp_run.py OUT RANK WORLD PORT CASE[,CASE..]
Cases that save: nested, flattened, positional (DCP folders of FSDP2), rows (sharded along axis 1), three (nested, for
three ranks; three-5 two steps later), grid (flattened: FSDP2 over tensor parallelism on four ranks, as torchtitan and
accelerate's parallelism_config have it: rows of a matrix are cut by both), full (FSDP1's one file), fsdp1 (its sharded
folder), flat (its local state dicts, a folder and a file of each rank), local (FSDP2's files of each rank, as
accelerate's save_fsdp_optimizer writes them with use_dcp=False), ranks and replicas (files of each rank as verl has
them, cut and copied), cells (such files of the ranks of grid).
Cases that load: load:FOLDER, load:FOLDER:flattened. OUT/CASE is what was saved, OUT/CASE.live.pt the gathered
state: {name: {slot: tensor}} and its groups.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

out, rank, world, port, cases = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(world), OMP_NUM_THREADS="1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner  # noqa: E402
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat  # noqa: E402
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter  # noqa: E402
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load  # noqa: E402
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save  # noqa: E402
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import (  # noqa: E402
    FullyShardedDataParallel,
    OptimStateKeyType,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.tensor import Replicate, Shard  # noqa: E402
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module  # noqa: E402


class Net(torch.nn.Module):
    """A frozen layer, and a parameter that never gets a gradient."""

    def __init__(self, hidden: int, out: int = 11) -> None:
        super().__init__()
        self.base = torch.nn.Linear(7, hidden)
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(hidden, 3, bias=False)})
        self.norm = torch.nn.LayerNorm(3)
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(3, out)})
        self.idle = torch.nn.Parameter(torch.ones(5))
        self.base.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.lora_B["default"](self.norm(self.lora_A["default"](torch.tanh(self.base(x)))))
        return result


def optimizer_of(model: torch.nn.Module, *, named: bool = False) -> torch.optim.Optimizer:
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decay: Any = [(n, p) if named else p for n, p in trained if p.dim() == 2]
    plain: Any = [(n, p) if named else p for n, p in trained if p.dim() == 1]
    return torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0, "lr": 2e-3}], lr=1e-3
    )


def sharded(case: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    if case in ("grid", "cells"):
        mesh, tensor = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor")), Net(16, 12)
        plan = {
            "lora_A.default": RowwiseParallel(input_layouts=Replicate()),
            "lora_B.default": ColwiseParallel(output_layouts=Replicate()),
        }
        parallelize_module(tensor, mesh["tensor"], plan)
        if case == "cells":  # as verl has it: an optimizer over all parameters, in one group
            tensor.requires_grad_(True)
        fully_shard(tensor, mesh=mesh["data"])
        optimizer = torch.optim.AdamW(tensor.parameters(), lr=1e-3) if case == "cells" else optimizer_of(tensor)
        for group in optimizer.param_groups:
            group["foreach"] = False  # torch has no such operations on parameters of two meshes
        return tensor, optimizer
    model: Any = Net(14 if case == "rows" else 13)
    if case in ("full", "fsdp1", "flat"):
        strategy = ShardingStrategy.FULL_SHARD
        model = FullyShardedDataParallel(
            model, use_orig_params=True, sharding_strategy=strategy, device_id=torch.device("cpu")
        )
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)

    def rows(parameter: torch.nn.Parameter) -> Shard | None:
        return Shard(1) if case == "rows" and parameter.shape == (3, 14) else None

    if case in ("ranks", "replicas"):
        model.requires_grad_(True)
        shape = (world,) if case == "ranks" else (2, world // 2)
        fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("copy", "cut")[-len(shape) :]))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)
    fully_shard(model, shard_placement_fn=rows)
    return model, optimizer_of(model, named=case == "positional")


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for seed in range(steps):
        torch.manual_seed(100 * seed + rank)
        (model(torch.randn(2, 7)) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The full state by name, as torch gathers it from the live run."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=False)
    return get_optimizer_state_dict(model, optimizer, options=options)


def joined(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """FSDP1's flat local parts, end to end: its own gathering mixes up buffers on the CPU."""
    names = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in model.named_parameters() if p.requires_grad}
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, {name: optimizer.state.get(p, {}) for name, p in names.items()})
    state: dict[str, Any] = {}
    for name in names:
        held = [part[name] for part in parts if part[name]]
        state[name] = {"step": held[0]["step"]}
        state[name] |= {slot: torch.cat([part[slot] for part in held]) for slot in ("exp_avg", "exp_avg_sq")}
    return {"state": state}


def save(case: str) -> None:
    model, optimizer = sharded(case)
    train(model, optimizer, 5 if case.endswith("-5") else 3)
    folder = out / case
    if case == "full":
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
            state: Any = FullyShardedDataParallel.optim_state_dict(model, optimizer)
            if rank == 0:
                folder.mkdir(parents=True)
                torch.save(state, folder / "optimizer.bin")
                # What Lightning's FSDP strategy makes of it (strategies/fsdp.py): positions in the whole model.
                counted = FullyShardedDataParallel.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_ID, Net(13))
                weights = Net(13).state_dict()
                version = {"pytorch-lightning_version": "2.6.6", "global_step": 3}
                torch.save({"state_dict": weights, "optimizer_states": [counted], **version}, out / "full.ckpt")
        live = state
    elif case == "fsdp1":
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
            state = FullyShardedDataParallel.optim_state_dict(model, optimizer)
            dcp_save({"optimizer": state}, checkpoint_id=folder / "optimizer_0")
        live = joined(model, optimizer)
    elif case == "flat":
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.LOCAL_STATE_DICT):
            tree = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            dcp_save(tree, checkpoint_id=folder)
            torch.save(tree, out / f"flat.{rank}.pt")
        live = None
    else:
        if case == "positional":
            state = {"optimizer": optimizer.state_dict(), "model": get_model_state_dict(model)}
        elif case in ("flattened", "grid"):
            options = StateDictOptions(flatten_optimizer_state_dict=True)
            state = {**get_model_state_dict(model), **get_optimizer_state_dict(model, optimizer, options=options)}
        elif case in ("ranks", "replicas", "cells"):
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), folder / f"model_world_size_{world}_rank_{rank}.pt")
            torch.save(optimizer.state_dict(), folder / f"optim_world_size_{world}_rank_{rank}.pt")
            state = None
        elif case == "local":
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(get_optimizer_state_dict(model, optimizer), folder / f"optimizer_0_rank{rank}.bin")
            torch.save(get_model_state_dict(model), folder / f"pytorch_model_fsdp_0_rank{rank}.bin")
            state = None
        else:
            state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
        if case in ("items", "zstd"):
            chosen: Any = {"serialization_format": SerializationFormat.SAFETENSORS}
            if case == "zstd":
                from torch.distributed.checkpoint._extension import ZStandard

                chosen = {"_extensions": [ZStandard()]}
            dcp_save(state, storage_writer=FileSystemWriter(folder, **chosen))
        elif case in ("hugging", "consolidated"):
            options = StateDictOptions(flatten_optimizer_state_dict=True)
            flat: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=options))
            tensors = {key: value for key, value in flat.items() if isinstance(value, torch.Tensor)}
            writer = HuggingFaceStorageWriter(
                str(folder), save_distributed=True, enable_consolidation=case == "consolidated",
                fqn_to_index_mapping=dict.fromkeys(tensors, 1),
            )  # fmt: skip
            dcp_save(tensors, storage_writer=writer)
        elif case == "async":
            planner = DefaultSavePlanner(enable_plan_caching=True)
            for _ in range(2):  # the second save has the plans of the first
                saving: Any = dcp_async_save(state, checkpoint_id=folder, planner=planner)
                saving.result()
        elif state is not None:
            dcp_save(state, checkpoint_id=folder)
        live = whole(model, optimizer)
    if rank == 0:
        torch.save(live, out / f"{case}.live.pt")


def load(folder: str, flattened: bool) -> None:
    """Load a folder that this project wrote, with torch's own functions; keep what the run then holds."""
    model, optimizer = sharded("load")
    # torch makes state of zeros for a parameter that never took a step, and then misses it in a folder of its own too.
    planner = DefaultLoadPlanner(allow_partial_load=True)
    if flattened:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        state = get_optimizer_state_dict(model, optimizer, options=options)
        dcp_load(state, checkpoint_id=out / folder, planner=planner)
    else:
        options = StateDictOptions()
        state = get_optimizer_state_dict(model, optimizer)
        dcp_load({"optimizer": state}, checkpoint_id=out / folder, planner=planner)
    set_optimizer_state_dict(model, optimizer, state, options=options)
    live = whole(model, optimizer)
    if rank == 0:
        torch.save(live, out / f"{folder}.loaded.pt")


def main() -> None:
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for case in cases.split(","):
        if case.startswith("load:"):
            _, folder, *flags = case.split(":")
            load(folder, bool(flags))
        else:
            save(case)
        dist.barrier()
    dist.destroy_process_group()


main()
# Threads that the process group leaves sometimes abort the exit of the interpreter; everything is done by then.
sys.stdout.flush()
os._exit(0)
