"""One rank of a run with nanotron's own layers, optimizers and writers, on the CPU: what it saves, and what ranks held.

Usage: run.py OUT RANK WORLD PORT CASE. A case is words with numbers: tp2-pp2-dp2-zero-masters. OUT/CASE is the
checkpoint, OUT/CASE.live.pt the whole state: {name: {slot: tensor}}, and the groups {option: names}. nanotron itself
only runs with CUDA: the device of its buffers and the backend of its process group are replaced here, nothing else.
Gradients are random, of no loss: a file does not know where they came from.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

out, rank, world, port, case = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0")
warnings.filterwarnings("ignore")

# The modules of 0.4 import each other in a circle: its logging has to be there first, and only names a type of another.
sys.modules["nanotron.config"] = sys.modules["nanotron.config.config"] = ModuleType("nanotron.config")
sys.modules["nanotron.config"].LoggingArgs = object
import nanotron.logging  # noqa: E402

del sys.modules["nanotron.config"], sys.modules["nanotron.config.config"]
import nanotron.config  # noqa: E402
import torch  # noqa: E402
import torch.distributed  # noqa: E402
from nanotron import distributed as dist  # noqa: E402
from nanotron.optim.gradient_accumulator import FP32GradientAccumulator  # noqa: E402
from nanotron.optim.named_optimizer import NamedOptimizer  # noqa: E402
from nanotron.optim.optimizer_from_gradient_accumulator import OptimizerFromGradientAccumulator  # noqa: E402
from nanotron.optim.zero import ZeroDistributedOptimizer  # noqa: E402
from nanotron.parallel import ParallelContext  # noqa: E402
from nanotron.parallel.parameters import NanotronParameter  # noqa: E402
from nanotron.parallel.tensor_parallel.enum import TensorParallelLinearMode  # noqa: E402
from nanotron.parallel.tensor_parallel.nn import (  # noqa: E402
    TensorParallelColumnLinear,
    TensorParallelEmbedding,
    TensorParallelRowLinear,
)
from nanotron.parallel.tied_parameters import create_pg_for_tied_weights, tie_parameters  # noqa: E402
from nanotron.serialize.optimizer import save_optimizer  # noqa: E402
from nanotron.serialize.weights import save_weights  # noqa: E402
from torch import nn  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

sizes = {word: int(number) for word, number in re.findall(r"(tp|pp|dp)(\d)", case)}
zero, masters = "zero" in case, "masters" in case
DTYPE = torch.bfloat16 if masters else torch.float32
QKV = (8, 4, 4)


class OnCpu(TorchFunctionMode):
    """Makes on the CPU what is asked for on "cuda"."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def start() -> Any:
    torch.cuda.set_device = lambda device: None
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    return ParallelContext(
        tensor_parallel_size=sizes.get("tp", 1),
        pipeline_parallel_size=sizes.get("pp", 1),
        data_parallel_size=sizes.get("dp", 1),
    )


class Block(nn.Module):
    """Queries, keys and values in one matrix, cut each for itself; a bias that only the first tensor rank has."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        mode = TensorParallelLinearMode.ALL_REDUCE
        self.norm = nn.LayerNorm(6)
        self.qkv = TensorParallelColumnLinear(6, 16, group, mode, bias=True, contiguous_chunks=QKV)
        self.down = TensorParallelRowLinear(16, 6, group, mode, bias=True)


def build(context: Any) -> nn.Module:
    """The layers of this pipeline stage, with the embeddings in the first one and, tied to them, in the last one."""
    stage, stages = dist.get_rank(context.pp_pg), context.pp_pg.size()
    model = nn.Module()
    model.blocks = nn.ModuleDict({str(n): Block(context.tp_pg) for n in range(4) if n // (4 // stages) == stage})
    if stage in (0, stages - 1):
        name = "embedding" if stage == 0 else "head"
        mode = TensorParallelLinearMode.ALL_REDUCE
        setattr(model, name, TensorParallelEmbedding(10, 6, pg=context.tp_pg, mode=mode))
    model.to(DTYPE)
    for name, parameter in list(model.named_parameters()):
        if not isinstance(parameter, NanotronParameter):
            *path, last = name.split(".")
            setattr(model.get_submodule(".".join(path)), last, NanotronParameter(parameter))
    tie(model, context)
    return model


def tie(model: nn.Module, context: Any) -> None:
    """What all tensor ranks hold is tied between them, and the embeddings between the first stage and the last."""
    ranks = context.world_rank_matrix
    here = [int(place[0]) for place in (ranks == rank).nonzero()]
    stages = context.pp_pg.size()
    tensor = tuple(int(r) for r in ranks[here[0], here[1], here[2], :])
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_sharded and not name.endswith("down.bias"):
            tie_parameters(model, [(name, tensor)], context, reduce_op=None)
    ends = [int(ranks[here[0], stage, here[2], here[3]]) for stage in (0, stages - 1)]
    if stages > 1:
        ties = [("embedding.weight", (ends[0],)), ("head.weight", (ends[1],))]
        if rank in ends:
            tie_parameters(model, ties, context, reduce_op=torch.distributed.ReduceOp.SUM)
    create_pg_for_tied_weights(model, context)


def named_parameters(model: nn.Module) -> list[tuple[str, Any]]:
    """As ``NanotronModel.get_named_params_with_correct_tied`` has them: a tied one under the name of the first."""
    return [
        (p.get_tied_info().get_full_name_from_model(model) if p.is_tied else name, p)
        for name, p in model.named_parameters()
    ]


def optimizer_of(model: nn.Module, context: Any) -> tuple[Any, list[Any]]:
    named = named_parameters(model)
    groups: Any = [
        {"named_params": [item for item in named if item[1].dim() == 2], "weight_decay": 0.1},
        {"named_params": [item for item in named if item[1].dim() == 1], "weight_decay": 0.0},
    ]
    accumulators: list[Any] = []

    def plain(groups: Any) -> Any:
        return NamedOptimizer(groups, lambda params: torch.optim.AdamW(params, lr=1e-2))

    def accumulated(groups: Any) -> Any:
        found = OptimizerFromGradientAccumulator(
            lambda params: FP32GradientAccumulator(params, grad_buckets_named_params=named), groups, plain
        )
        accumulators.append(found.gradient_accumulator)
        return found

    builder = accumulated if masters else plain
    if not zero:
        return builder(groups), accumulators
    found = ZeroDistributedOptimizer(groups, builder, context.dp_pg)
    for accumulator in accumulators:
        accumulator.assign_param_offsets(found.param_name_to_dp_rank_offsets, dist.get_rank(context.dp_pg))
    return found, accumulators


def slice_of(whole: torch.Tensor, parameter: Any) -> torch.Tensor:
    """Return a rank's part of a tensor, by what the layer itself says of its parameter."""
    if not parameter.is_sharded:
        return whole
    part = torch.empty_like(parameter, dtype=whole.dtype)
    for pair in parameter.get_sharded_info().local_global_slices_pairs:
        part[pair.local_slices] = whole[pair.global_slices]
    return part


def whole_shape(parameter: Any) -> tuple[int, ...]:
    return tuple(
        int(n) for n in (parameter.get_sharded_info().unsharded_shape if parameter.is_sharded else parameter.shape)
    )


def train(model: nn.Module, optimizer: Any, accumulators: list[Any]) -> None:
    for step in range(3):
        for name, parameter in named_parameters(model):
            torch.manual_seed(sum(map(ord, name)) * 10 + step)
            parameter.grad = slice_of(torch.randn(whole_shape(parameter)).to(DTYPE), parameter)
        for accumulator in accumulators:
            for name, element in accumulator.fp32_grad_buffers.items():
                accumulator._accumulate_grad(name=name, half_param=element["half"])
        optimizer.step()
        optimizer.zero_grad()


def held(model: nn.Module, optimizer: Any, context: Any) -> dict[str, Any]:
    """What this rank's optimizer holds, by name, with the elements of the slice that they are."""
    base = optimizer.get_base_optimizer()
    named = dict(named_parameters(model))
    found = {}
    for parameter, slots in base.state.items():
        name = optimizer.id_to_name[id(parameter)]
        whole = torch.arange(torch.Size(whole_shape(named[name])).numel()).reshape(whole_shape(named[name]))
        places = slice_of(whole, named[name]).flatten()
        if zero:
            first, last = optimizer.param_name_to_dp_rank_offsets[name][dist.get_rank(context.dp_pg)]
            places = places[first:last]
        tensors = {"fp32": parameter, **slots} if masters else slots
        found[name] = tuple(whole.shape), places, {k: torch.as_tensor(v).detach().clone() for k, v in tensors.items()}
    return found


def gathered(model: nn.Module, optimizer: Any, context: Any) -> dict[str, Any]:
    """The whole state, element by element, of all ranks."""
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, held(model, optimizer, context))
    state: dict[str, Any] = {}
    for part in parts:
        for name, (shape, places, slots) in part.items():
            own = state.setdefault(name, {})
            for slot, value in slots.items():
                if value.dim() == 0:
                    own[slot] = value
                    continue
                own.setdefault(slot, torch.full(shape, torch.nan)).view(-1)[places] = value.flatten()
    assert not any(value.isnan().any() for slots in state.values() for value in slots.values())
    return state


def main() -> None:
    context = start()
    with OnCpu():
        torch.manual_seed(rank)
        model = build(context)
        with torch.no_grad():
            for name, parameter in named_parameters(model):
                torch.manual_seed(sum(map(ord, name)))
                parameter.copy_(slice_of(torch.randn(whole_shape(parameter)).to(DTYPE), parameter))
        optimizer, accumulators = optimizer_of(model, context)
        train(model, optimizer, accumulators)
    save_weights(model, context, out / case)
    save_optimizer(optimizer, context, out / case)
    live = gathered(model, optimizer, context)
    if rank == 0:
        torch.save(live, out / f"{case}.live.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


main()
sys.stdout.flush()
os._exit(0)
