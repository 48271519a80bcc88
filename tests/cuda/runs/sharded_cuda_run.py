"""One rank with NCCL on one CUDA device: FSDP2, FSDP1 or DeepSpeed's ZeRO, saved and resumed.

Usage: sharded_cuda_run.py FOLDER CASE, under the environment variables of torchrun.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from lora_state_format.torch import load_optimizer, save_optimizer  # noqa: E402


def build(case: str, weights: dict[str, torch.Tensor] | None) -> tuple[Any, Any, Any]:
    """What runs forward, the model, and what has the optimizer's state."""
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(128, 96), torch.nn.Tanh(), torch.nn.Linear(96, 64)).cuda()
    if weights:
        model.load_state_dict(weights)
    if case == "fsdp2":
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=init_device_mesh("cuda", (1,)))
    elif case == "fsdp1":
        model = FullyShardedDataParallel(model, use_orig_params=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if not case.startswith("zero"):
        return model, model, optimizer
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": int(case[-1])},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, model, engine


def train(run: tuple[Any, Any, Any], first: int, last: int) -> None:
    forward, _, optimizer = run
    for step in range(first, last):
        x = torch.randn(8, 128, generator=torch.Generator().manual_seed(step)).cuda()
        loss = forward(x).square().mean()
        if forward is optimizer:
            forward.backward(loss)
            forward.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    parameters = ((name.removeprefix("_fsdp_wrapped_module."), p.detach()) for name, p in model.named_parameters())
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return {n.removeprefix("_fsdp_wrapped_module."): p.detach().clone() for n, p in model.named_parameters()}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in parameters}


def main(folder: Path, case: str) -> None:
    torch.cuda.set_device(0)
    dist.init_process_group("nccl")
    run = build(case, None)
    train(run, 0, 3)
    save_optimizer(run[2], run[1], folder / "state.safetensors")
    pending = save_optimizer(run[2], run[1], folder / "behind.safetensors", background=True)
    kept = weights_of(run[1])
    train(run, 3, 6)
    pending.wait()
    behind = (folder / "behind.safetensors").read_bytes() == (folder / "state.safetensors").read_bytes()
    again = build(case, kept)
    load_optimizer(again[2], again[1], folder / "state.safetensors")
    train(again, 3, 6)
    whole, own = weights_of(run[1]), weights_of(again[1])
    same = all(torch.equal(whole[name], own[name]) for name in whole)
    dist.destroy_process_group()
    sys.stdout.write(f"resumed: {same}, background: {behind}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
