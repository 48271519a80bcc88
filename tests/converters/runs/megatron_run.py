"""One rank of runs that save a small GPT with Megatron-Core: ``megatron_run.py OUT RANK WORLD PORT CASES``.

A case is words joined by dashes: how the optimizer's state is saved (``fp32``: an optimizer that is not distributed;
``full``: fully_reshardable; ``bucket``: dp_reshardable), the sizes ``tp2``, ``pp2``, ``ep2`` (the rest of the ranks are
data-parallel), ``vp2`` (each pipeline stage has two parts of the model, interleaved), and ``gated`` (SwiGLU, fewer
query groups), ``tied`` embeddings, ``slow`` (so low a learning rate that norms are still ones in bfloat16), ``rms``
norms without biases, ``nl4`` layers. If there is a folder ``CASE.from``, the model and its optimizer are loaded from it
in place of what they have.

Next to a case's folder each rank leaves ``CASE.RANK.safetensors``, the optimizer's state as it holds it, under
``parameter/slot/first element``, and ``CASE.RANK.json``, where its parameters belong in the whole model.

Megatron asks for CUDA in some places; they get the CPU here. Gradients are random: a backward pass would need fused
kernels, and neither the optimizer nor the writer can tell.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

STEPS, LAYERS = 3, 2


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*("cpu" if _is_cuda(argument) else argument for argument in args), **kwargs)


def _is_cuda(argument: Any) -> bool:
    return isinstance(argument, (str, torch.device)) and str(argument).startswith("cuda")


def without_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *_, **__: None
    cuda.is_initialized = lambda: False
    tensor: Any = torch.Tensor
    plain = tensor.type

    def named(t: Any, *args: Any, **kwargs: Any) -> Any:
        kind = plain(t, *args, **kwargs)
        return kind.replace("torch.", "torch.cuda.") if isinstance(kind, str) and "cuda" not in kind else kind

    tensor.type = named
    tensor.cuda = lambda t, *_, **__: t


def sizes(case: str) -> dict[str, int]:
    words = case.split("-")
    found = {axis: next((int(w[2:]) for w in words if w[:2] == axis), 1) for axis in ("tp", "pp", "ep", "vp")}
    return {**found, "nl": next((int(w[2:]) for w in words if w[:2] == "nl"), LAYERS * found["pp"])}


def build(case: str) -> tuple[list[Any], list[Any], Any]:
    """The parts of the model that this rank has, the same wrapped, and their optimizer."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.transformer_config import TransformerConfig

    words, size = case.split("-"), sizes(case)
    experts = 4 if size["ep"] > 1 else None
    low = torch.float32 if "fp32" in words else torch.bfloat16
    norm = "RMSNorm" if "rms" in words else "LayerNorm"
    torch.manual_seed(7)
    config = TransformerConfig(
        num_layers=size["nl"], hidden_size=16, num_attention_heads=4, ffn_hidden_size=32,
        num_query_groups=2 if "gated" in words else 4, gated_linear_unit="gated" in words, normalization=norm,
        activation_func=torch.nn.functional.silu if "gated" in words else torch.nn.functional.gelu,
        num_moe_experts=experts, moe_ffn_hidden_size=8 if experts else None, add_bias_linear=experts is None,
        tensor_model_parallel_size=size["tp"], pipeline_model_parallel_size=size["pp"],
        virtual_pipeline_model_parallel_size=size["vp"] if size["vp"] > 1 else None,
        expert_model_parallel_size=size["ep"], pipeline_dtype=low, params_dtype=low, bf16=low is torch.bfloat16,
        use_cpu_initialization=True, hidden_dropout=0.0, attention_dropout=0.0,
        gradient_accumulation_fusion=False, bias_activation_fusion=False,
    )  # fmt: skip
    parts = []
    for part in range(size["vp"]):
        stage = {"ignore_virtual": False, "vp_stage": part}
        model = GPTModel(
            config, get_gpt_layer_local_spec(num_experts=experts, moe_grouped_gemm=False, normalization=norm),
            vocab_size=32, max_sequence_length=16, pre_process=parallel_state.is_pipeline_first_stage(**stage),
            post_process=parallel_state.is_pipeline_last_stage(**stage), vp_stage=part if size["vp"] > 1 else None,
            share_embeddings_and_output_weights="tied" in words, position_embedding_type="rope",
        ).to(low)  # fmt: skip
        parts.append(model)
    distributed = "fp32" not in words
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=distributed
    )
    wrapped = [DistributedDataParallel(config, options, model) for model in parts]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=1e-5 if "slow" in words else 1e-2, weight_decay=0.1, clip_grad=0.0, params_dtype=low,
            bf16=distributed, use_distributed_optimizer=distributed,
        ),
        wrapped,
    )  # fmt: skip
    return parts, wrapped, optimizer


def parameters(parts: list[Any]) -> dict[str, Any]:
    """The parameters of this rank by name, with the numbers that layers have in the whole model."""
    found = {}
    for part in parts:
        for name, parameter in part.named_parameters():
            segments = name.split(".")
            if segments[:2] == ["decoder", "layers"]:
                segments[2] = str(part.decoder.layers[int(segments[2])].layer_number - 1)
            found[".".join(segments)] = parameter
    return found


def train(parts: list[Any], wrapped: list[Any], optimizer: Any, place: dict[str, int], steps: int) -> None:
    """Steps with gradients that replicas share and shards do not."""
    for step in range(steps):
        for part in wrapped:
            part.zero_grad_buffer()
        optimizer.zero_grad()
        for number, (name, parameter) in enumerate(parameters(parts).items()):
            own = place["ep"] if ".experts." in name else place["tp"] if is_cut(parameter) else 0
            shared = "word_embeddings" in name or name == "output_layer.weight"  # also by the last stage, if tied
            seed = 100 + 10 * own if shared else 1_000 * number + 10 * own + 100_000 * (1 + place["pp"])
            torch.manual_seed(seed + step)
            parameter.main_grad.copy_(torch.randn(parameter.main_grad.shape) * 0.1)
        optimizer.step()


def is_cut(parameter: Any) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))


def sharded(parts: list[Any]) -> dict[str, Any]:
    """What Megatron saves and loads of the model: each part under a name of its own, if there are several."""
    states = {f"model{part}": model.sharded_state_dict(prefix="") for part, model in enumerate(parts)}
    return states if len(parts) > 1 else states["model0"]


def load(path: Path, parts: list[Any], optimizer: Any, options: dict[str, Any]) -> None:
    """Load the model and its optimizer, as Megatron-LM does (``training/checkpointing.py``)."""
    from megatron.core import dist_checkpointing

    assert dist_checkpointing.load_content_metadata(str(path)) in (None, options["metadata"])
    state = sharded(parts)
    wanted = {**state, "optimizer": optimizer.sharded_state_dict(state, is_loading=True, **options)}
    found = dist_checkpointing.load(wanted, str(path), strict="raise_all")
    for number, model in enumerate(parts):
        model.load_state_dict(found[f"model{number}"] if len(parts) > 1 else {k: found[k] for k in state})
    for inner in optimizer.chained_optimizers:
        # Megatron forgets here that torch's Adam, unlike Apex's, counts steps in a tensor for each parameter.
        inner._set_main_param_and_optimizer_states = functools.partial(put, inner)
    optimizer.load_state_dict(found["optimizer"])


def put(inner: Any, parameter: Any, tensors: dict[str, Any]) -> None:
    group, place = inner.model_param_group_index_map[parameter]
    slots = inner.optimizer.state[inner.optimizer.param_groups[group]["params"][place]]
    type(inner)._set_main_param_and_optimizer_states(inner, parameter, {**tensors, "step": slots["step"]})


def save(out: Path, case: str) -> None:
    from megatron.core import dist_checkpointing, parallel_state

    parts, wrapped, optimizer = build(case)
    place = {
        "tp": parallel_state.get_tensor_model_parallel_rank(), "pp": parallel_state.get_pipeline_model_parallel_rank(),
        "ep": parallel_state.get_expert_model_parallel_rank(),
    }  # fmt: skip
    kind = {"full": "fully_reshardable", "bucket": "dp_reshardable", "fp32": None}[case.split("-")[0]]
    options = {"metadata": {"distrib_optim_sharding_type": kind}} if kind else {}
    loads = (out / f"{case}.from").is_dir()
    train(parts, wrapped, optimizer, place, 1 if loads else STEPS)  # torch's Adam has to have a step to load over
    if loads:
        load(out / f"{case}.from", parts, optimizer, options)
    state = sharded(parts)
    if dist.get_rank() == 0:
        (out / case).mkdir()
    dist.barrier()
    saved = {**state, "optimizer": optimizer.sharded_state_dict(state, **options)}
    dist_checkpointing.save(saved, str(out / case), content_metadata=options.get("metadata"))
    held = {f"{name}/{slot}/{start}": t.clone() for name, slot, start, t in shares(parts, optimizer, kind is not None)}
    save_file(held, out / f"{case}.{dist.get_rank()}.safetensors")
    described = {
        name: {"shape": list(p.shape), "axis": p.partition_dim if is_cut(p) else None}
        for name, p in parameters(parts).items()
    }
    where = {
        **place,
        "sizes": sizes(case),
        "tied": "tied" in case,
        "first_layer": 0,
        "parameters": described,
    }
    (out / f"{case}.{dist.get_rank()}.json").write_text(json.dumps(where))
    dist.barrier()


def shares(parts: list[Any], optimizer: Any, distributed: bool) -> Any:
    """What this rank's optimizers hold: parameter, slot, first element, tensor."""
    names = {parameter: name for name, parameter in parameters(parts).items()}
    for inner in optimizer.chained_optimizers:
        if not distributed:
            for parameter, slots in inner.optimizer.state.items():
                yield from ((names[parameter], s, 0, t.flatten()) for s, t in slots.items() if t.dim())
            continue
        for buffer in inner.gbuf_ranges:
            for bucket in (bucket for buckets in buffer.values() for bucket in buckets):
                for parameter, ranges in bucket["param_map"].items():
                    slots = inner._get_main_param_and_optimizer_states(parameter)
                    yield from ((names[parameter], s, ranges["param"].start, t) for s, t in slots.items() if t.dim())


def main() -> None:
    out, rank, world, port, cases = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    without_cuda()
    with OnCpu():
        dist.init_process_group("gloo")
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import random

        random.get_cuda_rng_tracker().fork = lambda *_, **__: contextlib.nullcontext()
        for case in cases.split(","):
            size = sizes(case)
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=size["tp"],
                pipeline_model_parallel_size=size["pp"],
                expert_model_parallel_size=size["ep"],
                virtual_pipeline_model_parallel_size=size["vp"] if size["vp"] > 1 else None,
            )
            save(out, case)
            parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
