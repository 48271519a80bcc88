"""One rank of GPT-NeoX or BLOOM's Megatron-DeepSpeed on the CPU: ``megatron_run.py OUT RANK WORLD PORT FAMILY SOURCE``.

SOURCE is a checkout of the family. Its own model and DeepSpeed's engine run with two pipeline stages, or as what
GPT-NeoX makes of it without pipeline stages (``neox_sequential``), on two data-parallel ranks; arguments are the defaults
of its own parser, with small sizes. What the CPU lacks (fused kernels, tokenizers) is never reached.
"""

import contextlib
import os
import sys
import types
from pathlib import Path

out, rank, world, port, family, source = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:7]
os.environ.update(
    DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), LOCAL_RANK=str(rank),
    WORLD_SIZE=str(world), OMP_NUM_THREADS="1",
)
sys.path.insert(0, source)

import deepspeed
import packaging.version
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.utils import safe_get_full_optimizer_state

SIZES = {
    "hidden_size": 16, "num_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 16, "seq_length": 16,
    "padded_vocab_size": 32, "params_dtype": torch.float32, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "use_cpu_initialization": True, "init_method_std": 0.3,
}
tracker = deepspeed.checkpointing.get_cuda_rng_tracker()
tracker.fork = lambda *_: contextlib.nullcontext()  # of CUDA's generators
torch.cuda.current_device = lambda: torch.device("cpu")


def stub(name, **members):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(members)


def neox(topology):
    import dataclasses

    stub("pkg_resources", packaging=packaging)
    stub("megatron.tokenizer", build_tokenizer=None)
    import megatron.neox_arguments.deepspeed_args as first
    import megatron.neox_arguments.neox_args as second
    from megatron import mpu
    from megatron.model.gpt2_model import GPT2ModelPipe

    members = [f for m in (first, second) for c in vars(m).values() if dataclasses.is_dataclass(c)
               for f in dataclasses.fields(c)]
    defaults = {f.name: f.default_factory() if f.default is dataclasses.MISSING else f.default for f in members}
    more = {
        "pos_emb": "rotary", "rotary_pct": 0.5, "no_weight_tying": True, "gpt_j_residual": True,
        "attention_config": ["global", "global"], "norm": "layernorm", "precision": "fp32", "init_method": "normal",
        "output_layer_init_method": "normal", "activation": "gelu", "mlp_multiple_of": 1, "intermediate_size": None,
    }
    mpu.initialize_model_parallel(1, topology=topology, fp32_allreduce=False)
    deepspeed.checkpointing.configure(mpu, partition_activations=False)
    return GPT2ModelPipe(types.SimpleNamespace(**{**defaults, **SIZES, **more}), topology=topology)


def bloom(topology):
    import argparse

    stub("apex", amp=None)
    stub("megatron.fused_kernels", load=None)
    stub("megatron.tokenizer", build_tokenizer=None)
    stub("megatron.model.fused_layer_norm", MixedFusedLayerNorm=torch.nn.LayerNorm)
    import megatron.global_vars as variables
    import megatron.model.glu_activations  # arguments.py takes it for granted
    from megatron import arguments, mpu

    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, function in vars(arguments).items():
        if name.startswith("_add_") and name.endswith("_args"):
            parser = function(parser)
    more = {
        "position_embedding_type": arguments.PositionEmbeddingType.alibi, "embed_layernorm": True,
        "pp_partition_method": "parameters", "ffn_hidden_size": 64, "kv_channels": 4, "micro_batch_size": 2,
        "bias_gelu_fusion": False, "masked_softmax_fusion": False, "fp32_residual_connection": False, "bf16": False,
        "fp16": False, "rank": rank, "world_size": world, "curriculum_learning": False,
        "pretrain_causal_attention": True,
    }
    chosen = parser.parse_args([])
    vars(chosen).update({**SIZES, **more})
    variables._GLOBAL_ARGS = chosen
    mpu.initialize_model_parallel(1, 2)
    mpu.get_cuda_rng_tracker().fork = lambda *_: contextlib.nullcontext()
    deepspeed.checkpointing.configure(mpu, partition_activations=False)
    from megatron.model import gpt_model

    return gpt_model.GPTModelPipe(parallel_output=True)


def inputs(ids):
    """What the first stage takes; BLOOM's was trained without a mask of its own."""
    positions = torch.arange(ids.shape[1])[None].expand_as(ids).contiguous()
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1]).triu(1) > 0.5
    return (ids, positions, mask.expand(len(ids), -1, -1, -1).contiguous())[: 2 if family == "bloom" else 3]


def logits(model, ids):
    """What the stages compute one after the other, on the last one."""
    with torch.no_grad():
        if not staged:
            return model(inputs(ids))
        if rank == 0:
            hidden = model(inputs(ids))
            dist.send((hidden[0] if isinstance(hidden, tuple) else hidden).contiguous(), 1)
            return None
        hidden = torch.empty(ids.shape[1], ids.shape[0], SIZES["hidden_size"])
        dist.recv(hidden, 0)
        return model((hidden, inputs(ids)[2]) if family == "neox" else hidden)


deepspeed.init_distributed("gloo")
torch.manual_seed(rank)
staged = family != "neox_sequential"
topology = PipeModelDataParallelTopology(num_pp=2 if staged else 1, num_mp=1, num_dp=world // 2 if staged else world)
model = (bloom if family == "bloom" else neox)(topology)
model = model if staged else model.to_sequential()
config = {
    "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}, "steps_per_print": 1000,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
}
engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))


def batches():
    generator = torch.Generator().manual_seed(5)
    while True:
        rows = torch.randint(0, 32, (2, 8), generator=generator)
        yield inputs(rows), (rows, torch.ones(2, 8))


data = batches()
for _ in range(3):
    if staged:
        engine.train_batch(data_iter=data)
    else:
        engine.backward(engine(next(data)[0]).float().square().mean())
        engine.step()
engine.save_checkpoint(str(out / family))
torch.manual_seed(9)
ids = torch.randint(0, 32, (2, 8))
held = {n: {s: safe_get_full_optimizer_state(p, s) for s in ("exp_avg", "exp_avg_sq")}
        for n, p in model.named_parameters()}
torch.save({"held": held, "ids": ids, "logits": logits(model.eval(), ids)}, out / f"{family}.{rank}.pt")
dist.barrier()
sys.stdout.flush()
os._exit(0)
