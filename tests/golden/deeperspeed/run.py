"""One rank of a run with EleutherAI's DeepSpeed 0.3.15, on the CPU: what it saves, and what its optimizer holds.

Usage: run.py OUT RANK WORLD PORT CASE. OUT/CASE is the folder of DeepSpeedEngine.save_checkpoint; OUT/CASE.RANK.pt what
this rank holds of its model's parameters, {name: {slot: tensor}}, with nan where other data-parallel ranks hold it.

A case is words: pp2 and tp2 (pipeline stages, tensor-parallel ranks; the ranks that are left over are data-parallel),
rigid (no elastic checkpoint), one (a single group), frozen (a parameter that is not trained). This DeepSpeed only runs
with CUDA: its tensors are put on the CPU, its process group is gloo's, two functions that it compiles are torch's own,
nothing else is replaced. Gradients are random, of no loss: a file does not know where they came from.
"""

import os
import sys
from pathlib import Path

out, rank, world, port, case = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0")
words = case.split("-")
stages, tensor = (2 if word in words else 1 for word in ("pp2", "tp2"))

import torch  # noqa: E402
from torch import distributed as dist  # noqa: E402


def on_cpu(to):
    """Moves nothing to CUDA, and dtypes as ever."""
    return lambda self, *args, **options: self if "cuda" in str(args[:1]) else to(self, *args, **options)


for kind in (torch.nn.Module, torch.Tensor):
    kind.to = on_cpu(kind.to)
torch.Tensor.cuda = lambda self, *_, **__: self
torch.cuda.set_device = torch.cuda.synchronize = lambda *_: None
torch.cuda.FloatTensor, torch.cuda.ByteTensor = torch.FloatTensor, torch.ByteTensor

import deepspeed  # noqa: E402
from deepspeed.pipe import LayerSpec, PipelineModule  # noqa: E402
from deepspeed.runtime import engine as engines  # noqa: E402
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology  # noqa: E402
from deepspeed.runtime.zero import stage1  # noqa: E402


class Flattening:
    """The functions that it compiles, and what they call."""

    flatten = staticmethod(torch._utils._flatten_dense_tensors)
    unflatten = staticmethod(torch._utils._unflatten_dense_tensors)

    def load(self):
        return self


engines.UtilsBuilder = stage1.UtilsBuilder = Flattening


class Perceptron(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dense_h_to_4h = torch.nn.Linear(6, 10 // tensor)
        self.dense_4h_to_h = torch.nn.Linear(10 // tensor, 6)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm = torch.nn.LayerNorm(6)
        self.register_buffer("mask", torch.ones(2, 2))
        self.mlp = Perceptron()


class Words(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.word_embeddings = torch.nn.Embedding(14 // tensor, 6)


def build():
    layers = [Words, Block, Block, Block]
    if stages * tensor == 1:
        return torch.nn.Sequential(*(layer() for layer in layers))
    topology = PipeModelDataParallelTopology(num_pp=stages, num_mp=tensor, num_dp=world // (stages * tensor))
    return PipelineModule([LayerSpec(layer) for layer in layers], topology=topology, partition_method="uniform")


def is_cut(name):
    return "norm" not in name and not name.endswith("4h_to_h.bias")


def seeded(name, step):
    """The same on all data-parallel ranks, and on all tensor-parallel ones for what these hold alike."""
    torch.manual_seed(sum(map(ord, name)) * 100 + step * 10 + (rank % tensor if is_cut(name) else 0))


def groups_of(model):
    """Weights and, without decay, norms and biases: as GPT-NeoX has them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if "one" in words:
        return [{"params": trained}]
    return [
        {"params": [p for p in trained if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]


def held(model, optimizer):
    """By the optimizer's own account: of its sub-partitions, the ``n``-th of rank ``r`` is the ``n * ranks + r``-th."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ranks, own = optimizer.partition_count, dist.get_rank(optimizer.dp_process_group)
    found = {}
    for number, parameters in enumerate(optimizer.fp16_groups):
        parts, size = optimizer.local_sub_partitions_of_fp32_groups[number], int(optimizer.sub_partition_sizes[number])
        slots = [
            {"fp32": part, **{s: v for s, v in optimizer.state[part].items() if torch.is_tensor(v)}} for part in parts
        ]
        flat = {slot: torch.full((size * ranks * len(parts),), float("nan")) for slot in slots[0]}
        for place, part in enumerate(slots):
            for slot, value in part.items():
                flat[slot].view(len(parts), ranks, size)[place, own] = value.detach()
        position = 0
        for parameter in parameters:
            of = slice(position, position + parameter.numel())
            found[names[id(parameter)]] = {
                slot: value[of].view(parameter.shape).clone() for slot, value in flat.items()
            }
            position = of.stop
    return found


dist.init_process_group("gloo", rank=rank, world_size=world)
model = build()
for name, parameter in model.named_parameters():
    seeded(name, 0)
    if "norm" not in name:
        torch.nn.init.normal_(parameter)
    parameter.requires_grad = "frozen" not in words or not name.startswith("2.mlp.dense_h")
config = {
    "train_batch_size": world // (stages * tensor), "train_micro_batch_size_per_gpu": 1, "steps_per_print": 1000,
    "fp16": {"enabled": True, "loss_scale": 1}, "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 64, "elastic_checkpoint": "rigid" not in words},
}  # fmt: skip
arguments = type("Arguments", (), {"local_rank": 0})()
optimizer = torch.optim.AdamW(groups_of(model), lr=1e-2)
engine, *_ = deepspeed.initialize(args=arguments, model=model, optimizer=optimizer, config_params=config)
for step in range(3):
    for name, parameter in model.named_parameters():
        seeded(name, 1 + step)
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape).half()
    engine._take_model_step({})
engine.save_checkpoint(str(out / case), tag="global_step3")
torch.save(held(model, engine.optimizer), out / f"{case}.{rank}.pt")
dist.barrier()
sys.stdout.flush()
os._exit(0)
