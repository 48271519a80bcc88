"""One rank of a run that saves a small GPT as NeMo 2 does, on the CPU: ``run.py OUT RANK WORLD PORT CASES``.

A case is words, as in tests/converters/runs/megatron_run.py, whose model this is: ``space`` (NeMo's default, sharding
type ``fully_sharded_model_space``) or ``whole`` (``dp_zero_gather_scatter``), and sizes. OUT/CASE is the folder that
MegatronStrategy.save_checkpoint writes; next to it is what the ranks held, as there. NeMo's own strategy, optimizer and
writer are run; of its trainer there is only what they ask for, and what ModelOpt would add is left out.
"""

import contextlib
import json
import os
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "converters" / "runs"))

import megatron_run
import torch
import torch.distributed as dist
from safetensors.torch import save_file

MODELOPT = "nemo.collections.llm.modelopt.model_utils"


class Module(torch.nn.Module):
    """What of a LightningModule is asked for."""

    def __init__(self, module):
        super().__init__()
        self.module, self.config, self.optimizer = module, module.config, None

    def configure_model(self):
        pass

    def optimizers(self, use_pl_optimizer):
        return self.optimizer


def save(out, case):
    from lightning.pytorch.trainer.states import TrainerFn
    from megatron.core import parallel_state
    from nemo.lightning._strategy_lib import setup_megatron_optimizer
    from nemo.lightning.io.pl import MegatronCheckpointIO
    from nemo.lightning.megatron_parallel import MegatronParallel
    from nemo.lightning.pytorch.strategies import MegatronStrategy

    parts, wrapped, optimizer = megatron_run.build(case)
    module = Module(parts[0])
    parallel = MegatronParallel(module, ddp_config=wrapped[0].ddp_config, cpu=True)
    parallel.init_ddp()
    wrapped = [module.module]
    module.optimizer = setup_megatron_optimizer(parallel, optimizer.config)
    optimizer = module.optimizer.mcore_optimizer
    place = {
        "tp": parallel_state.get_tensor_model_parallel_rank(),
        "pp": parallel_state.get_pipeline_model_parallel_rank(),
        "ep": parallel_state.get_expert_model_parallel_rank(),
    }
    megatron_run.train(parts, wrapped, optimizer, place, megatron_run.STEPS)

    class Strategy(MegatronStrategy):
        lightning_module = module
        trainer = types.SimpleNamespace(state=types.SimpleNamespace(fn=TrainerFn.FITTING))

    strategy = Strategy.__new__(Strategy)
    strategy.ddp_config, strategy.ckpt_save_optimizer = None, True
    strategy.parallel_save_optim = "space" in case.split("-")
    strategy._checkpoint_io, strategy.megatron_parallel = MegatronCheckpointIO(), parallel
    lightning = {
        "epoch": 0,
        "global_step": megatron_run.STEPS,
        "loops": {},
        "optimizer_states": [{}],
        "lr_schedulers": [],
    }
    strategy.save_checkpoint(lightning, out / case)

    rank, size = dist.get_rank(), megatron_run.sizes(case)
    held = megatron_run.shares(parts, optimizer, distributed=True)
    save_file({f"{n}/{slot}/{start}": t.clone() for n, slot, start, t in held}, out / f"{case}.{rank}.safetensors")
    described = {
        name: {"shape": list(p.shape), "axis": p.partition_dim if megatron_run.is_cut(p) else None}
        for name, p in megatron_run.parameters(parts).items()
    }
    where = {**place, "sizes": size, "tied": False, "first_layer": 0, "parameters": described}
    (out / f"{case}.{rank}.json").write_text(json.dumps(where))
    dist.barrier()


def main():
    out, rank, world, port, cases = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    import nemo.lightning

    for name in ("nemo.collections.llm", "nemo.collections.llm.modelopt", MODELOPT):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[MODELOPT].save_modelopt_state = lambda *_: None
    megatron_run.without_cuda()
    with megatron_run.OnCpu():
        dist.init_process_group("gloo")
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import random

        random.get_cuda_rng_tracker().fork = lambda *_, **__: contextlib.nullcontext()
        for case in cases.split(","):
            size = megatron_run.sizes(case)
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=size["tp"],
                pipeline_model_parallel_size=size["pp"],
                expert_model_parallel_size=size["ep"],
            )
            save(out, case)
            parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
