"""One rank of DeepSpeed runs with parallel models on the CPU: ``deepspeed_parallel_run.py OUT RANK WORLD PORT CASES``.

A case is what is parallel and the ZeRO stage: ``pipeline0``, ``pipeline1`` (two stages), ``tensor0``, ``tensor1``,
``tensor2`` (AutoTP over two ranks), ``hpz3`` (ZeRO++: weights gathered within pairs of ranks), ``experts0``,
``experts1``, ``experts2`` (four experts over two ranks), ``staged0``, ``staged1`` (such experts in both of two stages),
``uneven0`` (in the last stage only), ``routed0``, ``routed1``, ``routed2`` (AutoTP and such experts),
``wide0``, ``wide1`` (the same, and an expert on each of four ranks), ``grid0``,
``grid1`` (two stages of two tensor-parallel ranks, with the names of Megatron's layers); the rest is data-parallel.
OUT/CASE becomes the checkpoint; OUT/CASE.RANK.pt holds what the rank's optimizer held, by the rank's own names:
moments, gathered over its data-parallel ranks, and, with ZeRO, fp32 masters.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

out, rank, world, port, cases = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
os.environ.update(
    DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), LOCAL_RANK=str(rank),
    WORLD_SIZE=str(world), OMP_NUM_THREADS="1",
)  # fmt: skip

import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from deepspeed.moe.layer import MoE  # noqa: E402
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer  # noqa: E402
from deepspeed.pipe import LayerSpec, PipelineModule  # noqa: E402
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state  # noqa: E402

STEPS = 3


def config(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": stage > 0},
        "steps_per_print": 1000,
        **more,
    }


class Layer(torch.nn.Module):
    """A linear layer before four experts."""

    def __init__(self) -> None:
        super().__init__()
        expert = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 8))
        self.before = torch.nn.Linear(8, 8)
        self.moe = MoE(8, expert, num_experts=4, ep_size=2, k=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.moe(self.before(x))[0]
        return hidden


class Routed(Layer):
    """Linear layers around four experts."""

    def __init__(self) -> None:
        super().__init__()
        self.after = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.nn.functional.cross_entropy(self.after(super().forward(x)).float(), target)


def with_experts(model: torch.nn.Module) -> Any:
    return split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})


class Attention(torch.nn.Module):
    """What one of two tensor-parallel ranks has of Megatron's matrices; nothing in it attends."""

    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = torch.nn.Linear(8, 6)
        self.dense = torch.nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        part = torch.nn.functional.linear(self.query_key_value(x), self.dense.weight)
        return Summed.apply(part, True) + self.dense.bias  # type: ignore[no-untyped-call, no-any-return]


class Half(torch.nn.Module):
    """A layer of which each of two tensor-parallel ranks has a half."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = torch.nn.LayerNorm(8)
        self.attention = Attention()
        for name, parameter in self.attention.named_parameters():
            if name != "dense.bias":
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.attention(Summed.apply(self.input_layernorm(x), False))  # type: ignore[no-untyped-call]
        return hidden


class Summed(torch.autograd.Function):
    """A tensor, or its gradient, summed over the tensor-parallel ranks."""

    group: Any = None

    @staticmethod
    def forward(context: Any, x: torch.Tensor, forwards: bool) -> torch.Tensor:
        context.forwards = forwards
        return Summed.over_ranks(x) if forwards else x.view_as(x)

    @staticmethod
    def backward(context: Any, x: torch.Tensor) -> Any:
        return x if context.forwards else Summed.over_ranks(x), None

    @staticmethod
    def over_ranks(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x, group=Summed.group)
        return x


def grid(stage: int, dtype: torch.dtype) -> Any:
    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=world // 4)
    layers = [LayerSpec(Half), LayerSpec(Half), LayerSpec(torch.nn.LayerNorm, 8)]
    return staged(stage, dtype, layers, "uniform", lambda model: list(model.parameters()), 2, topology)


def pipeline(stage: int, dtype: torch.dtype) -> Any:
    layers = [LayerSpec(torch.nn.Linear, 8, 12), LayerSpec(torch.nn.ReLU), LayerSpec(torch.nn.Linear, 12, 8)]
    layers += [LayerSpec(torch.nn.LayerNorm, 8), LayerSpec(torch.nn.Linear, 8, 4)]
    return staged(stage, dtype, layers, "parameters", lambda model: list(model.parameters()), 2)


def experts_in(*middle: Any) -> Any:
    """The run of a pipeline with these layers between two linear ones."""
    layers = [LayerSpec(torch.nn.Linear, 8, 8), *middle, LayerSpec(torch.nn.Linear, 8, 4)]
    return lambda stage, dtype: staged(stage, dtype, layers, "uniform", with_experts, 8)


def staged(stage: int, dtype: torch.dtype, layers: Any, method: str, of: Any, rows: int, topology: Any = None) -> Any:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(output.float(), target)

    model = PipelineModule(layers, num_stages=2, topology=topology, loss_fn=loss, partition_method=method)
    Summed.group = model._grid.get_slice_parallel_group()
    engine, *_ = deepspeed.initialize(model=model, config=config(stage), model_parameters=of(model))

    def batches() -> Any:
        generator = torch.Generator().manual_seed(0 if topology else rank % 2)
        while True:
            yield torch.randn(rows, 8, generator=generator).to(dtype), torch.randint(0, 4, (rows,), generator=generator)

    data = batches()
    for _ in range(STEPS):
        engine.train_batch(data_iter=data)
    return engine, model


def experts(stage: int, dtype: torch.dtype) -> Any:
    model = Routed()
    engine, *_ = deepspeed.initialize(model=model, config=config(stage), model_parameters=with_experts(model))
    for seed in range(STEPS):
        torch.manual_seed(seed * 10 + rank)
        engine.backward(engine(torch.randn(8, 8).to(dtype), torch.randint(0, 4, (8,))))
        engine.step()
    return engine, model


class Block(torch.nn.Module):
    """Four experts in place of a Llama's MLP."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        expert = torch.nn.Sequential(torch.nn.Linear(16, 6), torch.nn.ReLU(), torch.nn.Linear(6, 16))
        self.moe = MoE(16, expert, num_experts=4, ep_size=ranks, k=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.moe(x)[0]
        return hidden


def routed(stage: int, _: torch.dtype, ranks: int = 2) -> Any:
    gather = deepspeed.comm.all_gather_into_tensor

    def flat(output: torch.Tensor, own: torch.Tensor, *rest: Any, **named: Any) -> Any:
        return gather(output.view(-1), own.reshape(-1), *rest, **named)  # gloo takes no other shapes

    deepspeed.comm.all_gather_into_tensor = flat
    model = llama()
    model.model.layers[0].mlp = Block(ranks)
    return sliced(stage, model, with_experts(model))


def tensor(stage: int, _: torch.dtype) -> Any:
    return sliced(stage, llama())


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=16,
        )
    )  # fmt: skip


def sliced(stage: int, model: Any, parameters: Any = None) -> Any:
    settings = config(stage, tensor_parallel={"autotp_size": 2})
    engine, *_ = deepspeed.initialize(model=model, config=settings, model_parameters=parameters)
    for seed in range(STEPS):
        torch.manual_seed(seed * 10 + rank // 2)
        rows = torch.randint(0, 32, (2, 8))
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()
    return engine, model


def hpz(stage: int, dtype: torch.dtype) -> Any:
    model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.ReLU(), torch.nn.Linear(12, 8), torch.nn.LayerNorm(8))
    settings = config(stage)
    settings["zero_optimization"] |= {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
    engine, *_ = deepspeed.initialize(model=model, config=settings, model_parameters=list(model.parameters()))
    for seed in range(STEPS):
        torch.manual_seed(seed * 10 + rank)
        engine.backward(engine(torch.randn(2, 8).to(dtype)).float().pow(2).mean())
        engine.step()
    return engine, model


BUILD = {
    "pipeline": pipeline, "experts": experts, "tensor": tensor, "hpz": hpz, "grid": grid,
    "routed": routed, "wide": partial(routed, ranks=4),
    "staged": experts_in(LayerSpec(Layer), LayerSpec(Layer)),
    "uneven": experts_in(LayerSpec(torch.nn.LayerNorm, 8), LayerSpec(Layer)),
}  # fmt: skip


def held(engine: Any, model: torch.nn.Module, stage: int) -> dict[str, dict[str, torch.Tensor]]:
    result: dict[str, dict[str, torch.Tensor]] = {}
    if stage in (
        1,
        2,
    ):  # DeepSpeed links the state after the first group's first step, when the other groups have none yet
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in model.named_parameters():
        if stage == 0:
            slots = {k: v for k, v in engine.optimizer.state[parameter].items() if k != "step"}
        else:
            slots = {slot: safe_get_full_optimizer_state(parameter, slot) for slot in ("exp_avg", "exp_avg_sq")}
            slots["master_param"] = safe_get_full_fp32_param(parameter)
        result[name] = {slot: value.detach().clone() for slot, value in slots.items()}
    return result


def main() -> None:
    deepspeed.init_distributed("gloo")
    for case in cases.split(","):
        kind, stage = case[:-1], int(case[-1])
        torch.manual_seed(0)
        engine, model = BUILD[kind](stage, torch.bfloat16 if stage else torch.float32)
        engine.save_checkpoint(str(out / case))
        torch.save(held(engine, model, stage), out / f"{case}.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


main()
# Threads that the process group leaves sometimes abort the exit of the interpreter; everything is done by then.
sys.stdout.flush()
os._exit(0)
