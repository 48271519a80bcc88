"""One process of runs that accelerate and Trainer shard by DeepSpeed's ZeRO, on the CPU.

``torchrun --nproc-per-node N sharded_trainers_run.py FOLDER CASE[,CASE..]``; a case is accelerate-zero1, -zero2, -zero3
or trainer-zero2. Each trains four steps and saves after two, resumes there in a fresh run, and says whether it arrives
at the same weights.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
warnings.simplefilter("ignore")

import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from accelerate import Accelerator, DeepSpeedPlugin  # noqa: E402
from accelerate.state import AcceleratorState, PartialState  # noqa: E402

import lora_state_format as lsf  # noqa: E402
from lora_state_format.integrations import STATE  # noqa: E402
from lora_state_format.integrations.accelerate import with_named_state  # noqa: E402


def config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "steps_per_print": 1000,
    }


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return [parameter.detach().clone() for parameter in model.parameters()]


def start(case: str) -> tuple[Any, Any, Any]:
    """The accelerator, the prepared model and the prepared optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config(int(case[-1]))))
    prepared = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False))
    with_named_state(accelerator)
    return accelerator, *prepared


def train(run: tuple[Any, Any, Any], steps: range) -> None:
    accelerator, model, optimizer = run
    for step in steps:
        rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        accelerator.backward(model(rows).square().sum())
        optimizer.step()
        optimizer.zero_grad()


def accelerated(case: str, folder: Path) -> dict[str, Any]:
    run = start(case)
    train(run, range(2))
    run[0].save_state(str(folder))
    train(run, range(2, 4))
    whole = weights(run[1])
    AcceleratorState._reset_state()
    PartialState._reset_state()
    resumed = start(case)
    resumed[0].load_state(str(folder))
    train(resumed, range(2, 4))
    same = all(a.equal(b) for a, b in zip(whole, weights(resumed[1]), strict=True))
    return {"same": same, **held(folder)}


def held(folder: Path) -> dict[str, Any]:
    with lsf.open_state(folder / STATE) as state:
        return {"names": list(state), "step": next(iter(state.values()))["step"].item()}


def trained(folder: Path) -> dict[str, Any]:
    tools = runpy.run_path(str(Path(__file__).with_name("trainer_run.py")))
    from lora_state_format.integrations.transformers import with_named_state

    def make() -> Any:
        options = {
            "use_cpu": False,
            "deepspeed": {**config(2), "gradient_clipping": "auto"},
            "save_steps": 2,
            "max_steps": 4,
        }
        return with_named_state(tools["make"](folder, **options))

    trainer = make()
    trainer.train()
    whole = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    again = make()
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    own = {name: p.detach().clone() for name, p in again.model.named_parameters() if p.requires_grad}
    same = all(whole[name].equal(own[name]) for name in whole)
    return {"same": same, **held(folder / "checkpoint-2")}


def main(folder: Path, cases: str) -> None:
    for case in cases.split(","):
        framework, _, how = case.partition("-")
        os.environ["ACCELERATE_USE_DEEPSPEED"] = str(how.startswith("zero")).lower()
        said = trained(folder / case) if framework == "trainer" else accelerated(how, folder / case)
        (folder / f"{case}.{os.environ['WORLD_SIZE']}.{os.environ['RANK']}.json").write_text(json.dumps(said))
        AcceleratorState._reset_state()
        PartialState._reset_state()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    dist.barrier()
    # Threads that the process group leaves sometimes abort the exit of the interpreter; everything is done by then.
    sys.stdout.flush()
    os._exit(0)
