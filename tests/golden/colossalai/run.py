"""One rank of a run with ColossalAI's Booster on the CPU: what it saves, and the state that the optimizer held.

Usage: run.py OUT RANK WORLD PORT CASE. The only case is ddp, for the other plugins do not run without a device. OUT/CASE
is the checkpoint, with the folders that ColossalAI's own programs have, OUT/CASE.whole.bin the optimizer in one file,
OUT/CASE.live.pt the state by name and the names in the groups.
"""

import os
import sys
import warnings
from pathlib import Path

out, rank, world, port, case = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
warnings.filterwarnings("ignore")

import colossalai
import torch
import torch.distributed as dist
from colossalai.booster import Booster
from colossalai.booster.plugin import TorchDDPPlugin
from torch import nn


class Net(nn.Module):
    """A frozen layer; sizes that two ranks do not divide."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(7, 8)
        self.down = nn.Linear(8, 3, bias=False)
        self.norm = nn.LayerNorm(3)
        self.up = nn.Linear(3, 5)
        self.base.requires_grad_(False)

    def forward(self, x):
        return self.up(self.norm(self.down(torch.tanh(self.base(x)))))


def main():
    colossalai.launch(rank, world, "127.0.0.1", int(port), backend="gloo", verbose=False)
    torch.manual_seed(0)
    model = Net()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = [[n for n, p in trained.items() if (p.dim() == 2) is matrix] for matrix in (True, False)]
    groups = [{"params": [trained[n] for n in names[0]], "weight_decay": 0.1}, {"params": [trained[n] for n in names[1]]}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
    booster = Booster(plugin=TorchDDPPlugin())
    model, optimizer, *_ = booster.boost(model, optimizer)
    dtype = next(model.parameters()).dtype
    for seed in range(3):
        torch.manual_seed(100 * seed + rank)
        booster.backward(model(torch.randn(4, 7, dtype=dtype)).square().mean(), optimizer)
        optimizer.step()
        optimizer.zero_grad()
    folder = out / case
    booster.save_model(model, str(folder / "modeling"), shard=True)
    booster.save_optimizer(optimizer, str(folder / "optimizer"), shard=True, size_per_shard=0.0001)
    booster.save_optimizer(optimizer, str(out / f"{case}.whole.bin"), shard=False)
    state = {n: {k: v.clone() for k, v in optimizer.optim.state[p].items()} for n, p in trained.items()}
    if rank == 0:
        torch.save({"state": state, "groups": names}, out / f"{case}.live.pt")
    dist.barrier()
    dist.destroy_process_group()


main()
sys.stdout.flush()
os._exit(0)
