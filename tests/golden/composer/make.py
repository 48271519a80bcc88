"""What Composer's Trainer writes, and what its optimizer held. Run by make.sh."""

import sys
from pathlib import Path

import torch
from composer import Trainer
from composer.models import ComposerModel

out = Path(sys.argv[1])
torch.manual_seed(0)


class Model(ComposerModel):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        self.idle = torch.nn.Parameter(torch.ones(2))

    def forward(self, batch):
        return self.net(batch[0])

    def loss(self, outputs, batch):
        return ((outputs - batch[1]) ** 2).mean()


model = Model()
optimizer = torch.optim.AdamW(
    [
        {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ],
    lr=1e-3,
)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(12, 7), torch.randn(12, 3)), batch_size=4)
trainer = Trainer(
    model=model, train_dataloader=data, max_duration="1ep", optimizers=optimizer, device="cpu", save_folder=str(out),
    save_interval="1ep", run_name="golden", progress_bar=False, seed=0,
)
trainer.fit()
names = {id(p): n for n, p in model.named_parameters()}
held = {names[id(p)]: dict(s) for p, s in optimizer.state.items()}
torch.save({"slots": held, "groups": [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups]}, out / "expected.pt")
for path in out.glob("latest*"):
    path.unlink()
for path in list(out.glob(".*symlink*")):
    path.unlink()
