"""One rank of runs that save a small GPT with Megatron-FSDP: ``megatron_fsdp_run.py OUT RANK WORLD PORT CASES``.

A case is words joined by dashes: ``tp2`` (the rest of the ranks are data-parallel), ``gated`` (SwiGLU), ``optim`` (only
the optimizer's state is sharded, where else parameters are, too). OUT/CASE is a folder as Megatron-LM's
``training/checkpointing.py`` saves it as ``fsdp_dtensor``; OUT/CASE.RANK.pt is what the rank's optimizer holds by
name: flat slots, the element that they start at, the shape of the tensor-parallel part, the axis that is cut, the rank.

Megatron-FSDP asks for CUDA in some places, where it gets the CPU here, and for the class of a layer of Transformer
Engine, which is not there. Gradients are random: neither the optimizer nor the writer can tell.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron_run import OnCpu, is_cut, sizes, without_cuda  # type: ignore[import-not-found]
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

STEPS = 3


class Immediate:
    """A CUDA stream or event, of what is over when it returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def nothing(self, *_: Any) -> None:
        pass

    wait_stream = wait_event = wait = record = synchronize = nothing


def without_streams() -> None:
    cuda: Any = torch.cuda
    cuda.Stream = cuda.Event = Immediate
    cuda.current_stream = lambda *_: Immediate()
    cuda.stream = lambda *_: contextlib.nullcontext()
    cuda.empty_cache = lambda: None
    cuda.current_device = lambda: 0
    cuda.get_rng_state, cuda.set_rng_state = torch.get_rng_state, torch.set_rng_state


def build(case: str) -> tuple[Any, Any]:
    """The wrapped model and its optimizer."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.distributed.fsdp import mcore_fsdp_adapter
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.transformer_config import TransformerConfig

    mcore_fsdp_adapter.TELinear = type("TELinear", (), {})
    words, low = case.split("-"), torch.bfloat16
    torch.manual_seed(7)
    config = TransformerConfig(
        num_layers=2, hidden_size=8, num_attention_heads=2, ffn_hidden_size=12, gated_linear_unit="gated" in words,
        activation_func=torch.nn.functional.silu if "gated" in words else torch.nn.functional.gelu,
        tensor_model_parallel_size=sizes(case)["tp"], params_dtype=low, bf16=True, use_cpu_initialization=True,
        hidden_dropout=0.0, attention_dropout=0.0, gradient_accumulation_fusion=False, bias_activation_fusion=False,
    )  # fmt: skip
    model = GPTModel(
        config, get_gpt_layer_local_spec(), vocab_size=14, max_sequence_length=16, position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    ).to(low)  # fmt: skip
    options = DistributedDataParallelConfig(
        use_distributed_optimizer=True, use_megatron_fsdp=True, overlap_grad_reduce=False, overlap_param_gather=False,
        data_parallel_sharding_strategy="optim" if "optim" in words else "optim_grads_params",
    )  # fmt: skip
    wrapped = mcore_fsdp_adapter.FullyShardedDataParallel(config, options, model, device=torch.device("cpu"))
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=1e-2, weight_decay=0.1, clip_grad=0.0, params_dtype=low, bf16=True,
            use_distributed_optimizer=True,
        ),
        [wrapped],
    )  # fmt: skip
    return wrapped, optimizer


def parameters(optimizer: Any) -> dict[str, Any]:
    """What the optimizer steps, by name: the fp32 shards that this rank has, as DTensors."""
    return {optimizer._param_name(p): p for group in optimizer.optimizer.param_groups for p in group["params"]}


def train(optimizer: Any, place: int) -> None:
    """Steps with gradients that are cut as the parameters are; replicas of tensor-parallel ranks have the same."""
    for step in range(STEPS):
        optimizer.zero_grad()
        for name, parameter in parameters(optimizer).items():
            torch.manual_seed(sum(map(ord, name)) * 100 + step * 10 + (place if is_cut(parameter.orig_param) else 0))
            whole = torch.randn(parameter.orig_param.shape).flatten()
            parameter.grad = torch.zeros_like(parameter)
            gradient: Any = parameter.grad
            local = gradient.to_local()
            local.copy_(whole[parameter.megatron_fsdp_slice].view(local.shape))
        optimizer.step()


class EitherName:
    """The wrapped model, under the names of the model's state dict and those of the optimizer's.

    ``handle_swiglu_in_state_dict`` of 0.16.1 looks for both in one model, and they differ by a ``module.``.
    """

    def __init__(self, wrapped: Any) -> None:
        self.config, self.wrapped = wrapped.config, wrapped

    def get_parameter(self, name: str) -> Any:
        try:
            return self.wrapped.get_parameter(name)
        except AttributeError:
            return self.wrapped.get_parameter(f"module.{name}")


def save(out: Path, case: str) -> None:
    from megatron.core import parallel_state
    from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import preprocess_state_dict_for_uneven_dtensor
    from megatron.core.transformer.fsdp_dtensor_checkpoint import handle_swiglu_in_state_dict

    place = parallel_state.get_tensor_model_parallel_rank()
    wrapped, optimizer = build(case)
    train(optimizer, place)
    model = wrapped.state_dict_for_save_checkpoint()
    state = optimizer.sharded_state_dict({}, metadata={"distrib_optim_sharding_type": "fsdp_dtensor"})
    if "gated" in case:
        model, state = handle_swiglu_in_state_dict(EitherName(wrapped), model, state)
    saved = {"model": model, "optimizer": state, "checkpoint_version": 3.0, "iteration": STEPS}
    preprocess_state_dict_for_uneven_dtensor(saved)
    dcp_save(saved, checkpoint_id=out / case)
    torch.save(held(optimizer, place), out / f"{case}.{dist.get_rank()}.pt")


def held(optimizer: Any, place: int) -> dict[str, Any]:
    return {
        name: {
            "shape": tuple(parameter.orig_param.shape),
            "axis": parameter.orig_param.partition_dim if is_cut(parameter.orig_param) else None,
            "tp": place,
            "start": parameter.megatron_fsdp_slice.start,
            "slots": {
                slot: value.to_local().flatten().clone() if hasattr(value, "to_local") else value
                for slot, value in optimizer.optimizer.state[parameter].items()
            },
        }
        for name, parameter in parameters(optimizer).items()
    }


def main() -> None:
    out, rank, world, port, cases = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    without_cuda()
    without_streams()
    with OnCpu():
        dist.init_process_group("gloo")
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import random

        random.get_cuda_rng_tracker().fork = lambda *_, **__: contextlib.nullcontext()
        for case in cases.split(","):
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=sizes(case)["tp"])
            save(out, case)
            parallel_state.destroy_model_parallel()
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
