"""One rank of a run of transformers' Trainer under FSDP2, on the CPU: ``trainer_fsdp_run.py FOLDER first|again``.

``first`` trains six steps, saves after two and four, and resumes at four; ``again`` resumes at four on whatever number
of ranks it has. accelerate chooses FSDP on accelerators only, so it is told to here; everything else is its own.
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

os.environ["OMP_NUM_THREADS"] = "1"
warnings.simplefilter("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from accelerate import FullyShardedDataParallelPlugin  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from lora_state_format.integrations.transformers import with_named_state  # noqa: E402

TOOLS = runpy.run_path(str(Path(__file__).with_name("trainer_run.py")))


def make(folder: Path) -> Any:
    """The trainer; every rank sees the same batches, so that the mean of the gradients is the gradient."""
    trainer = TOOLS["make"](folder, lr_scheduler_type="constant", max_grad_norm=0.0)
    accelerator = trainer.accelerator
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen2DecoderLayer"],
        state_dict_type="SHARDED_STATE_DICT",
    )
    prepare = accelerator.prepare

    def sharded(*arguments: Any, **options: Any) -> Any:
        accelerator.state.distributed_type = DistributedType.FSDP
        found = prepare(*arguments, **options)
        accelerator.state.distributed_type = DistributedType.FSDP  # which prepare() forgets
        return found

    accelerator.prepare = sharded
    accelerator.state.distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(TOOLS["rows"](), batch_size=4)
    return with_named_state(trainer)


def state_of(trainer: Any) -> dict[str, torch.Tensor]:
    """The trained weights and the first moments, whole, by name."""
    found = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            moment = trainer.optimizer.optimizer.state[parameter]["exp_avg"]
            for key, value in (("", parameter), (".exp_avg", moment)):
                found[name + key] = (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
    return found


def main(folder: Path, part: str) -> None:
    final = folder / "final.pt"
    if part == "first":
        whole = make(folder)
        whole.train()
        arrived = state_of(whole)
        if dist.get_rank() == 0:
            torch.save(arrived, final)
        dist.barrier()
    resumed = make(folder)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    expected, own = torch.load(final, weights_only=True), state_of(resumed)
    cut = sum(isinstance(parameter, DTensor) for parameter in resumed.model.parameters())
    off = max(float((expected[name] - own[name]).abs().max()) for name in expected)
    said = {"tensors": len(own), "sharded": cut, "off": off, "step": resumed.state.global_step}
    (folder / f"{part}.{dist.get_rank()}.json").write_text(json.dumps(said))


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
