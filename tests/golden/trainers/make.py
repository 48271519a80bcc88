"""Write a checkpoint by the code with which detectron2 saves: a plain file of torch.save.

``names.json`` gets the names of each optimizer's parameters in its order, ``expected.npz`` what it held.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

folder = Path(sys.argv[1])
folder.mkdir(parents=True)
names, held = {}, {}


class Net(nn.Module):
    """Modules of equal shapes, in another order than that of their names."""

    def __init__(self):
        super().__init__()
        self.value = nn.Linear(4, 4)
        self.key = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.norm(self.value(x) + 2 * self.key(x)))


def trained(name):
    torch.manual_seed(len(names))
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).pow(2).mean().backward()
        optimizer.step()
    named = dict(model.named_parameters())
    names[name] = list(named)
    for key, parameter in named.items():
        for slot in ("exp_avg", "exp_avg_sq"):
            held[f"{name}:{key}:{slot}"] = optimizer.state[parameter][slot].numpy().copy()
    return model, optimizer


def detectron2():
    """detectron2's DetectionCheckpointer is a subclass of this one, and adds nothing to what it saves."""
    from fvcore.common.checkpoint import PeriodicCheckpointer, Checkpointer

    model, optimizer = trained("detectron2/model_final.pth")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    saver = Checkpointer(model, str(folder / "detectron2"), optimizer=optimizer, scheduler=scheduler)
    (folder / "detectron2").mkdir()
    PeriodicCheckpointer(saver, period=100, max_iter=3).step(2)


detectron2()
(folder / "names.json").write_text(json.dumps(names, indent=1))
np.savez_compressed(folder / "expected.npz", **held)
