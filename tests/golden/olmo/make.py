"""What OLMo writes for an unsharded run, as a torch file and in its safetensors variant. Run by make.sh."""

import sys
from pathlib import Path

import torch
from olmo.checkpoint import save_state_dict
from olmo.optim import AdamW, fix_optim_state_dict
from olmo.safetensors_util import state_dict_to_safetensors_file

out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
named = dict(model.named_parameters())
decay, plain = [[n for n in sorted(named) if (named[n].dim() == 2) is both] for both in (True, False)]
extra = {"name": "golden", "sharded": False, "max_grad_norm": 1.0, "max_grad_norm_ratio": None, "initial_lr": 1e-3}
groups = [
    {"params": [named[n] for n in decay], "param_names": decay, "weight_decay": 0.1, **extra},
    {"params": [named[n] for n in plain], "param_names": plain, "weight_decay": 0.0, **extra},
]
optimizer = AdamW(groups, lr=1e-3)
for _ in range(3):
    (model(torch.randn(4, 7)) ** 2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
state = fix_optim_state_dict(optimizer, optimizer.state_dict())
save_state_dict(out, "model.pt", model.state_dict(), synchronize=False)
save_state_dict(out, "optim.pt", state, synchronize=False)
save_state_dict(out, "train.pt", {"epoch": 0, "global_step": 3}, synchronize=False)
(out / "safetensors").mkdir()
state_dict_to_safetensors_file(state, out / "safetensors" / "optim.safetensors")
state_dict_to_safetensors_file(model.state_dict(), out / "safetensors" / "model.safetensors")
names = {id(p): n for n, p in named.items()}
torch.save({names[id(p)]: dict(s) for p, s in optimizer.state.items()}, out / "expected.pt")
