"""What LeRobot writes for one optimizer and for two, and what they held. Run by make.sh."""

import sys
from pathlib import Path

import torch
from lerobot.optim.optimizers import save_optimizer_state
from safetensors.torch import save_model

out = Path(sys.argv[1])


def trained(seed, optimizer_class, **options):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    model.idle = torch.nn.Parameter(torch.ones(2))
    weights = [p for p in model.parameters() if p.dim() == 2]
    biases = [p for p in model.parameters() if p.dim() == 1]
    optimizer = optimizer_class([{"params": weights, "weight_decay": 0.1}, {"params": biases}], lr=1e-3, **options)
    for _ in range(3):
        (model(torch.randn(4, 7)) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


model, adam = trained(0, torch.optim.AdamW, betas=(0.8, 0.99))
one = out / "000003"
(one / "training_state").mkdir(parents=True)
(one / "pretrained_model").mkdir()
save_optimizer_state(adam, one / "training_state")
save_model(model, one / "pretrained_model" / "model.safetensors")
_, sgd = trained(1, torch.optim.SGD, momentum=0.9)
save_optimizer_state({"actor": adam, "critic": sgd}, out / "several")
torch.save({"actor": adam.state_dict(), "critic": sgd.state_dict()}, out / "expected.pt")
