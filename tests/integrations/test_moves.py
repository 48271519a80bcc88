"""A run that moves from framework to framework, and the README's loops, with the real frameworks."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lora_state_format as lsf
from lora_state_format.torch import load_optimizer, save_optimizer

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

LR = 1e-2
ROWS = 4
LEG = 5

README = Path(__file__).parent.parent.parent / "README.md"

_trainer = runpy.run_path(str(Path(__file__).parent / "runs" / "trainer_run.py"))


def loss(model: Any, tokens: torch.Tensor) -> Any:
    """The loss as Trainer asks for it: a sum over the batch, divided by the number of tokens that are predicted."""
    count = torch.tensor(tokens[:, 1:].numel())
    return model(input_ids=tokens, labels=tokens, num_items_in_batch=count).loss


def batch(step: int) -> torch.Tensor:
    rows = _trainer["rows"](4 * LEG * ROWS)[step * ROWS : (step + 1) * ROWS]
    return torch.stack([row["input_ids"] for row in rows])


def adamw(model: Any, order: int = 1) -> torch.optim.Optimizer:
    """Fused AdamW over the trainable parameters, in an order of its own."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters[::order], lr=LR, weight_decay=0.01, fused=True)


def plain(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    model.train()
    for step in steps:
        loss(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def under_trainer(folder: Path) -> Path:
    from lora_state_format.integrations.transformers import with_named_state

    options = {
        "max_steps": LEG,
        "save_steps": LEG,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
    }
    trainer = _trainer["make"](folder, **options)
    trainer.train_dataset = _trainer["rows"](4 * LEG * ROWS)
    with_named_state(trainer, drop_legacy=True).train()
    return folder / f"checkpoint-{LEG}"


def under_accelerate(source: Path, folder: Path) -> Path:
    from accelerate import Accelerator
    from peft import set_peft_model_state_dict

    from lora_state_format.integrations.accelerate import with_named_state

    model = _trainer["build"]()
    set_peft_model_state_dict(model, load_file(source / "adapter_model.safetensors"))
    accelerator = with_named_state(Accelerator(cpu=True), drop_legacy=True)
    model, optimizer = accelerator.prepare(model, adamw(model, -1))
    report = load_optimizer(optimizer, model, source)
    assert (report.restored, report.matching, report.steps) == (8, 8, (LEG, LEG))
    for step in range(LEG, 2 * LEG):
        accelerator.backward(loss(model, batch(step)))
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(folder))
    return folder


def under_lightning(source: Path, folder: Path) -> Path:
    import lightning.pytorch as pl

    from lora_state_format.integrations.lightning import NamedState

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = _trainer["build"]()
            self.model.load_state_dict(load_file(source / "model.safetensors"), strict=False)

        def training_step(self, tokens: torch.Tensor, _: int) -> Any:
            return loss(self.model, tokens)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = adamw(self.model)
            report = load_optimizer(optimizer, self.model, source)
            assert (report.restored, report.matching, report.steps) == (8, 8, (2 * LEG, 2 * LEG))
            return optimizer

    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_steps=LEG, callbacks=[NamedState("model")], default_root_dir=folder, **options)
    rows = torch.cat([batch(step) for step in range(2 * LEG, 3 * LEG)])
    trainer.fit(Module(), torch.utils.data.DataLoader(rows, batch_size=ROWS))  # type: ignore[arg-type]
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def under_torch(source: Path) -> tuple[Any, torch.optim.Optimizer]:
    model = _trainer["build"]()
    weights = torch.load(source, weights_only=False)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
    optimizer = adamw(model, -1)
    report = load_optimizer(optimizer, model, source.with_suffix(".training_state") / "optimizer.safetensors")
    assert (report.restored, report.matching, report.steps) == (8, 8, (3 * LEG, 3 * LEG))
    plain(model, optimizer, range(3 * LEG, 4 * LEG))
    return model, optimizer


def test_a_run_through_four_frameworks_is_one_run(tmp_path: Path) -> None:
    expected = _trainer["build"]()
    optimizer = adamw(expected)
    plain(expected, optimizer, range(4 * LEG))
    save_optimizer(optimizer, expected, tmp_path / "expected.safetensors")

    (tmp_path / "lightning").mkdir()
    checkpoint = under_trainer(tmp_path / "trainer")
    folder = under_accelerate(checkpoint, tmp_path / "accelerate")
    model, moved = under_torch(under_lightning(folder, tmp_path / "lightning"))

    for name, parameter in expected.named_parameters():
        assert model.get_parameter(name).equal(parameter), name
    save_optimizer(moved, model, tmp_path / "moved.safetensors")
    with lsf.open_state(tmp_path / "expected.safetensors") as a, lsf.open_state(tmp_path / "moved.safetensors") as b:
        assert set(a) == set(b)
        for name in a:
            assert b[name]["step"].item() == 4 * LEG
            for slot in ("exp_avg", "exp_avg_sq"):
                assert a[name][slot].bytes() == b[name][slot].bytes(), (name, slot)


# --- the README's section "Save your own runs" --------------------------------------------------------------------


def test_the_readmes_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning.pytorch as lightning
    from accelerate import Accelerator
    from transformers import Trainer

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, rows: torch.Tensor, _: int) -> Any:
            return self.layer(rows[:, None]).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    section = README.read_text(encoding="utf-8").partition("\n## Save your own runs\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```py\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    assert all(len(block.splitlines()) <= 6 for block in blocks)
    monkeypatch.chdir(tmp_path)
    model = _trainer["build"]()
    example = _trainer["make"](tmp_path / "trainer", model, max_steps=2)
    namespace = {
        "Trainer": Trainer, "model": model, "args": example.args, "dataset": _trainer["rows"](),
        "Accelerator": Accelerator, "optimizer": adamw(model),
        "lightning": lightning, "module": Module(), "loader": torch.utils.data.DataLoader(torch.ones(8)),  # type: ignore[arg-type]
        "save_optimizer": save_optimizer, "load_optimizer": load_optimizer,
    }  # fmt: skip
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("optimizer.safetensors")} >= {
        "trainer/checkpoint-2/training_state/optimizer.safetensors",
        "step-100/training_state/optimizer.safetensors",
        "last.training_state/optimizer.safetensors",
        "training_state/optimizer.safetensors",
    }
