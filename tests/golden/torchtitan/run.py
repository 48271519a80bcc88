"""One rank of a torchtitan run on the CPU: its model, optimizers and checkpoint manager, and the state that ranks held.

Usage: run.py OUT RANK WORLD PORT CASE. A case is words with numbers: fsdp2-tp2, pp2-tp2; with ep, Qwen 3 with experts
in place of Llama 3. OUT/CASE is the folder of the step, OUT/CASE.live.pt the whole state by name, as torch gathers
it from the live tensors, and the groups. Gradients are made of the weights: a file does not know where they came from.
torchtitan takes "cuda" for the device if there is no accelerator; this says that the CPU is one, and nothing else.
"""

import dataclasses
import os
import re
import sys
import warnings
import zlib
from pathlib import Path

out, rank, world, port, case = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
warnings.filterwarnings("ignore")

import torch
import torch.distributed as dist

torch._utils._get_available_device_type = lambda: "cpu"
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpointer.dcp import CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models import llama3, qwen3
from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear, RMSNorm
from torchtitan.trainer import Trainer

sizes = {word: int(number) for word, number in re.findall(r"(fsdp|tp|pp|ep)(\d)", case)}


def registered():
    """Llama 3, or Qwen 3 with experts, as torchtitan registers them, of two layers that are small."""
    if "ep" in sizes:
        layers = qwen3._build_qwen3_moe_layers(
            fuse_qkv=True, n_layers=2, dim=16, n_heads=4, n_kv_heads=2, head_dim=8, moe_hidden_dim=12, num_experts=4,
            top_k=2, attn_backend="flex", rope=CosSinRoPE.Config(dim=8, max_seq_len=32, theta=1e6),
            moe_comm_backend="standard",
        )
        found, kind = qwen3.model_registry("debugmodel_moe"), qwen3.Qwen3Model
    else:
        layers = llama3._build_llama3_layers(
            n_layers=2, dim=16, n_heads=4, n_kv_heads=2, hidden_dim=24, attn_backend="flex",
            rope=ComplexRoPE.Config(dim=4, max_seq_len=32, theta=500000, scaling="llama"),
        )
        found, kind = llama3.model_registry("debugmodel"), llama3.Llama3Model
    model = kind.Config(
        dim=16,
        vocab_size=32,
        tok_embeddings=Embedding.Config(num_embeddings=32, embedding_dim=16, param_init=llama3._EMBEDDING_INIT),
        norm=RMSNorm.Config(normalized_shape=16, param_init=llama3._NORM_INIT),
        lm_head=Linear.Config(in_features=16, out_features=32, param_init=llama3._output_linear_init(16)),
        layers=layers,
    )
    return dataclasses.replace(found, model=model)


def build():
    """This rank's parts of the model, parallel as torchtitan's own trainer makes them."""
    parallelism = ParallelismConfig(
        data_parallel_shard_degree=sizes.get("fsdp", 1),
        tensor_parallel_degree=sizes.get("tp", 1),
        pipeline_parallel_degree=sizes.get("pp", 1),
        expert_parallel_degree=sizes.get("ep", 1),
        pipeline_parallel_schedule="1F1B",
        spmd_backend="partial_dtensor",  # torch 2.13 refuses its default: "Got plain tensor for parameter 'weight'"
    )
    training = TrainingConfig(local_batch_size=2, seq_len=16, disable_cuda_graphs=True)
    dims = ParallelDims.from_config(parallelism, world)
    dims.build_mesh()
    found = registered()
    found.model.update_from_config(
        config=Trainer.Config(model_spec=found, parallelism=parallelism, training=training)
    )
    with torch.device("meta"):
        model = found.model.build()
    shared = {
        "parallel_dims": dims, "training": training, "parallelism": parallelism, "compile_config": CompileConfig(),
        "ac_config": None, "dump_folder": str(out),
    }
    if sizes.get("pp", 1) > 1:
        _, parts, _, _ = found.pipelining_fn(
            model, device=torch.device("cpu"), model_config=found.model, parallelize_fn=found.parallelize_fn,
            loss_fn=lambda *_: None, **shared,
        )
    else:
        parts = [found.parallelize_fn(model, **shared)]
    for part in parts:
        part.to_empty(device="cpu")
        with torch.no_grad():
            part.init_weights(buffer_device=None)
    return parts


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def main():
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(0)
    parts = build()
    groups = [
        ParamGroupConfig(pattern="norm", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-2, "weight_decay": 0.0}),
        ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-2, "weight_decay": 0.1}),
    ]
    optimizers = OptimizersContainer.Config(param_groups=groups, implementation="for-loop").build(model_parts=parts)
    schedulers = LRSchedulersContainer.Config(warmup_steps=2).build(optimizers=optimizers, training_steps=10)
    for step in range(3):
        for part in parts:
            for name, parameter in part.named_parameters():
                parameter.grad = torch.sin((parameter.detach() + step) * (1 + zlib.crc32(name.encode()) % 97))
        optimizers.step()
        schedulers.step()
        optimizers.zero_grad()
    manager = CheckpointManager.Config(enable=True, folder="steps", interval=1, last_save_model_only=False).build(
        dataloader=None, model_parts=parts, optimizers=optimizers, lr_schedulers=schedulers, states={}, sd_adapter=None,
        base_folder=str(out),
    )
    assert manager.save(3)
    held = {"state": {}, "groups": []}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            names = group["param_names"]
            held["groups"].append({"lr": group["lr"], "weight_decay": group["weight_decay"], "names": list(names)})
            for name, parameter in zip(names, group["params"], strict=True):
                held["state"][name] = {slot: whole(value).clone() for slot, value in optimizer.state[parameter].items()}
    every = [None] * world
    dist.all_gather_object(every, held)
    if rank == 0:
        state = {name: slots for part in every for name, slots in part["state"].items()}
        torch.save({"state": state, "groups": [group for part in every for group in part["groups"]]}, out / f"{case}.live.pt")
        (out / "steps" / "step-3").rename(out / case)
    dist.barrier()
    dist.destroy_process_group()


main()
sys.stdout.flush()
os._exit(0)
