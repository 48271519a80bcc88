"""One rank of a run that accelerate shards by FSDP2, on the CPU.

``python accelerate_fsdp_run.py FOLDER``, under the usual environment variables. accelerate chooses FSDP on accelerators
only, so it is told to here; everything else is its own.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType

from lora_state_format.integrations.accelerate import with_named_state

warnings.simplefilter("ignore")


def sharded(accelerator: Any) -> None:
    accelerator.state.distributed_type = DistributedType.FSDP


def start() -> tuple[Any, Any, Any]:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Linear"],
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = plugin
    sharded(accelerator)
    with_named_state(accelerator, drop_legacy=True)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 7), torch.nn.Linear(7, 3))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    sharded(accelerator)  # which prepare() forgets
    return accelerator, model, optimizer


def train(accelerator: Any, model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        accelerator.backward(model(rows).square().sum())
        optimizer.step()
        optimizer.zero_grad()


def shards(model: Any, optimizer: Any) -> list[torch.Tensor]:
    """This rank's part of the weights and of the first moments."""
    moments = [optimizer.state[parameter]["exp_avg"] for parameter in model.parameters()]
    return [tensor.to_local().detach().clone() for tensor in (*model.parameters(), *moments)]


def main(folder: str) -> None:
    whole = start()
    train(*whole, range(2))
    whole[0].save_state(str(Path(folder, "step-2")))
    train(*whole, range(2, 4))

    resumed = start()
    resumed[0]._models, resumed[0]._optimizers = resumed[0]._models[-1:], resumed[0]._optimizers[-1:]
    resumed[0].load_state(str(Path(folder, "step-2")))
    train(*resumed, range(2, 4))
    pairs = list(zip(shards(*whole[1:]), shards(*resumed[1:]), strict=True))
    same = all(a.equal(b) for a, b in pairs)
    sys.stdout.write(f"resumed {len(pairs)} local shards, {'all equal' if same else 'NOT EQUAL'}\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    # Threads that the process group leaves sometimes abort the exit of the interpreter; everything is done by then.
    sys.stdout.flush()
    os._exit(0)
