"""Write the files in which other libraries keep a model next to its optimizer, each by that library's own code.

``names.json`` gets the names of each file's parameters, group by group, from the live optimizer.
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))
import torchvision  # the stand-in next to this folder: no model of these needs it
from torch import nn

version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.0" if name == "torchvision" else version(name)

import torch

folder = Path(sys.argv[1])
folder.mkdir(parents=True)
folder = folder.resolve()
names = {}


def keep(file, model, optimizer):
    live = {id(parameter): name for name, parameter in model.named_parameters()}
    names[file] = [[live[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def step(model, optimizer, loss):
    for _ in range(2):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.backbone(x))


def mmengine():
    import logging

    from mmengine.logging import MMLogger
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x, mode="loss"):
            return {"loss": self.net(x).square().mean()}

        def train_step(self, data, optim_wrapper):
            loss = self.forward(data[0])["loss"]
            optim_wrapper.update_params(loss)
            return {"loss": loss.detach()}

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 3)), batch_size=4)
    wrapper = {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 1e-3}}
    wrapper["paramwise_cfg"] = {"custom_keys": {"backbone": {"lr_mult": 0.1}}}
    MMLogger.get_instance("quiet").setLevel(logging.ERROR)
    runner = Runner(
        Model(), work_dir="work", train_dataloader=data, optim_wrapper=wrapper, log_level="ERROR",
        train_cfg={"by_epoch": True, "max_epochs": 2},
    )
    runner.train()
    Path("work/epoch_2.pth").rename(folder / "mmengine.pth")
    keep("mmengine.pth", runner.model, runner.optim_wrapper.optimizer)


def timm():
    from timm.optim import create_optimizer_v2
    from timm.utils import CheckpointSaver

    model = Net()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    step(model, optimizer, lambda: model(torch.randn(4, 3)).square().mean())
    saver = CheckpointSaver(model, optimizer, args=SimpleNamespace(model="net"), checkpoint_dir=".")
    saver.save_checkpoint(0, 0.5)
    Path("last.pth.tar").rename(folder / "timm.pth.tar")
    keep("timm.pth.tar", model, optimizer)


def ultralytics():
    from ultralytics.engine.trainer import BaseTrainer
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils import DEFAULT_CFG
    from ultralytics.utils.torch_utils import EarlyStopping, ModelEMA

    backbone = [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2]], [-1, 1, "C2f", [8, True]]]
    model = DetectionModel({"nc": 2, "reg_max": 4, "backbone": backbone, "head": [[[2], 1, "Detect", ["nc"]]]}, verbose=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".dfl" not in name
    trainer = BaseTrainer.__new__(BaseTrainer)
    trainer.args, trainer.data, trainer.epoch, trainer.epochs = DEFAULT_CFG, {"nc": 2}, 0, 2
    trainer.model, trainer.best_fitness, trainer.fitness = model, 0.0, 0.0
    optimizer = trainer.optimizer = trainer.build_optimizer(model, name="AdamW", lr=1e-3, momentum=0.9, decay=5e-4)
    step(model, optimizer, lambda: sum(value.square().mean() for value in flat(model.train()(torch.randn(2, 3, 64, 64)))))
    trainer.ema, trainer.stopper, trainer.scaler = ModelEMA(model), EarlyStopping(), torch.amp.GradScaler("cpu")
    trainer.metrics, trainer.save_period, trainer.csv = {}, -1, Path("results.csv")
    trainer.last, trainer.best, trainer.wdir = folder / "ultralytics.pt", Path("best.pt"), folder
    trainer.save_model()
    keep("ultralytics.pt", model, optimizer)


def flat(tree):
    if isinstance(tree, torch.Tensor):
        return [tree] if tree.is_floating_point() else []
    return [found for inner in (tree.values() if isinstance(tree, dict) else tree) for found in flat(inner)]


def hydra():
    """A bundle as scripts under Hydra save it: their configuration, the model and the optimizer."""
    from dataclasses import dataclass, field

    from omegaconf import MISSING, OmegaConf

    @dataclass
    class Optim:
        lr: float = 1e-3
        betas: tuple = (0.9, 0.999)
        name: str = MISSING

    @dataclass
    class Config:
        optim: Optim = field(default_factory=Optim)
        steps: int = 3

    Optim.__module__ = Config.__module__ = "train"
    sys.modules["train"] = SimpleNamespace(Optim=Optim, Config=Config)
    Optim.__qualname__, Config.__qualname__ = "Optim", "Config"
    config = OmegaConf.merge(OmegaConf.structured(Config), {"optim": {"name": "adamw"}})
    free = OmegaConf.create({"lr": "${optim.lr}", "layers": [1, {"deep": 2.5}], "optim": {"lr": 0.1}})
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer, lambda: model(torch.randn(4, 3)).square().mean())
    tree = {"cfg": config, "hyper_parameters": free, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(tree, folder / "hydra.pt")
    keep("hydra.pt", model, optimizer)


torch.manual_seed(0)
for write in (mmengine, timm, ultralytics, hydra):
    write()
(folder / "names.json").write_text(json.dumps(names, indent=1) + "\n")
