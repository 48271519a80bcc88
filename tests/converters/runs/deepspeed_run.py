"""One rank of a DeepSpeed run on the CPU: checkpoints, what the run held when it wrote them, and what it did next.

Usage: deepspeed_run.py OUT RANK WORLD PORT CASE[,CASE..] ; a case is STAGE-DTYPE[-FLAG..], for example 2-bf16-robin.
OUT/CASE becomes the checkpoint folder; OUT/CASE.live.pt holds, by name, what every rank's state gathered to, and for
each of three more steps the averaged gradients that went in and the state that came out.
"""

from __future__ import annotations

import os
import sys
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
from deepspeed.utils import (  # noqa: E402
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Net(torch.nn.Module):
    """Odd sizes, so that partitions cut rows and need padding; a frozen layer; two decay groups."""

    def __init__(self) -> None:
        super().__init__()
        self.base = torch.nn.Linear(7, 13)
        self.lora_A = torch.nn.Linear(13, 3, bias=False)
        self.norm = torch.nn.LayerNorm(3)
        self.lora_B = torch.nn.Linear(3, 11)
        self.base.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.lora_B(self.norm(self.lora_A(torch.tanh(self.base(x)))))
        return result


def gathered(engine: Any, model: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """fp32 masters and moments of every trained parameter, on every rank."""
    if getattr(engine.optimizer, "_hp_optimizer_states_linked", False):
        # DeepSpeed links the state after the first group's first step, when the other groups have none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    result = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            slots = {slot: safe_get_full_optimizer_state(parameter, slot) for slot in ("exp_avg", "exp_avg_sq")}
            slots["master_param"] = safe_get_full_fp32_param(parameter)
            result[name] = {slot: tensor.detach().clone() for slot, tensor in slots.items()}
    return result


def build(case: str, *, universal: bool = False) -> Any:
    stage, dtype, *flags = case.split("-")
    torch.manual_seed(0)
    model = Net()
    decay = [p for p in model.parameters() if p.requires_grad and p.dim() == 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0, "lr": 2e-3}]
    if "flat" in flags:
        groups = [{"params": decay + plain}]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": int(stage), "round_robin_gradients": "robin" in flags},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "steps_per_print": 1000,
        "checkpoint": {"load_universal": universal},
    }
    if "elastic" in flags:
        config["zero_optimization"]["elastic_checkpoint"] = True
    if int(stage) == 3:
        config["zero_optimization"]["sub_group_size"] = 20 if "sub" in flags else 10**9
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    if "accum" in flags:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-3), config=config)
    return engine, model, DTYPES[dtype]


def step(
    engine: Any, model: torch.nn.Module, dtype: torch.dtype, seed: int, *, record: bool
) -> dict[str, torch.Tensor]:
    """One step on this rank's own batch; the averaged gradients by name."""
    torch.manual_seed(100 * seed + rank)
    engine.backward((engine(torch.randn(2, 7).to(dtype)).float() ** 2).mean())
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    gradients = {}
    if record:
        gradients = {name: safe_get_full_grad(parameter).detach().clone() for name, parameter in trained}
    engine.step()
    return gradients


def main() -> None:
    deepspeed.init_distributed("gloo")
    for case in cases.split(","):
        if case.startswith("load:"):  # load:CASE:FOLDER: what a run that loads a universal checkpoint then holds
            _, case, folder = case.split(":")
            engine, model, dtype = build(case, universal=True)
            engine.load_checkpoint(str(out / folder))
            live: dict[str, Any] = {"saved": gathered(engine, model), "global_steps": engine.global_steps}
            if rank == 0:
                torch.save(live, out / f"{folder}.loaded.pt")
            continue
        engine, model, dtype = build(case)
        for seed in range(3):
            step(engine, model, dtype, seed, record=False)
        engine.save_checkpoint(str(out / case), exclude_frozen_parameters="frozen" not in case)
        live = {"saved": gathered(engine, model), "steps": []}
        for seed in range(3, 6):
            # DeepSpeed's own gathering of gradients fails where round-robin order moved them.
            gradients = step(engine, model, dtype, seed, record="robin" not in case)
            live["steps"].append((gradients, gathered(engine, model)))
        if "next" in case:
            engine.save_checkpoint(str(out / case))
        if rank == 0:
            torch.save(live, out / f"{case}.live.pt")
    dist.barrier()
    dist.destroy_process_group()


main()
# Threads that the process group leaves sometimes abort the exit of the interpreter; everything is done by then.
sys.stdout.flush()
os._exit(0)
