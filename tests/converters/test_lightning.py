"""Checkpoints that Lightning's Trainer wrote, and those written for it to resume from."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lora_state_format import registry
from lora_state_format.converters import lightning
from lora_state_format.errors import OptionError, UnrepresentableError
from lora_state_format.model.states import PositionalState
from lora_state_format.operations.conversion import convert, read

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]


def build(manual: bool) -> Any:
    import lightning as pl

    class Module(pl.LightningModule):  # type: ignore[misc]
        """A batch norm for its buffers, tied weights; with ``manual`` two optimizers, else one of every parameter."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.automatic_optimization = not manual
            self.net = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 5))
            self.head = torch.nn.Linear(5, 5)
            tied: Any = self.net[2]
            self.head.weight = tied.weight

        def training_step(self, batch: torch.Tensor) -> Any:
            loss = (self.head(self.net(batch)) ** 2).mean()
            if manual:
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                self.manual_backward(loss)
                for optimizer in self.optimizers():
                    optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            if not manual:
                return torch.optim.AdamW(self.parameters(), lr=1e-3)
            return [
                torch.optim.AdamW(self.net.parameters(), lr=1e-3),
                torch.optim.SGD([self.head.bias], lr=1e-2, momentum=0.9),
            ]

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(list(torch.randn(12, 7)), batch_size=4)  # type: ignore[arg-type]

    return Module()


def trainer(folder: Path, epochs: int) -> Any:
    import lightning as pl

    return pl.Trainer(
        default_root_dir=folder, max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip


@pytest.fixture(scope="session", params=[False, True], ids=["one", "several"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any, bool]:
    folder = tmp_path_factory.mktemp("lightning")
    model, ran = build(request.param), trainer(folder, 1)
    ran.fit(model)
    ran.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt", model, ran, request.param


def test_it_holds_what_the_run_held(run: Any, tmp_path: Path, assert_holds: Any) -> None:
    path, model, ran, several = run
    converter, match = registry.detect(path)
    assert (converter.NAME, match.generic) == ("lightning", False)
    state = registry.read(path, "lightning").state
    assert isinstance(state, PositionalState)
    assert state.global_step == ran.global_step
    names = {parameter: name for name, parameter in model.named_parameters()}
    held = {names[p]: dict(slots) for optimizer in ran.optimizers for p, slots in optimizer.state.items()}
    report = convert(path, tmp_path / "x.safetensors")
    assert (report.naming.source, report.naming.rule) == ("checkpoint", "flat")
    if several:  # each optimizer has one part of the model; a file of names says the same
        with read(tmp_path / "x.safetensors") as named:
            assert_holds(named, held)
        order = [names[p] for o in ran.optimizers for group in o.param_groups for p in group["params"]]
        (tmp_path / "names.txt").write_text("\n".join(order))
        convert(path, tmp_path / "x.safetensors", names=tmp_path / "names.txt", force=True)
    with read(tmp_path / "x.safetensors") as named:
        assert_holds(named, held)
        assert len(named.optimizers) == len(ran.optimizers)


def test_lightning_resumes_from_what_is_written(run: Any, tmp_path: Path) -> None:
    """The optimizers' state of a base is replaced; the rest of it is kept, and the Trainer goes on from the result."""
    path, _, ran, several = run
    other = build(several)
    fresh = trainer(tmp_path, 1)
    fresh.fit(other)
    names = [f"p{number}" for number in range(sum(len(g["params"]) for o in ran.optimizers for g in o.param_groups))]
    for optimizer in fresh.optimizers:
        for slots in optimizer.state.values():
            for slot in slots:
                slots[slot] = slots[slot] * 0
    fresh.save_checkpoint(tmp_path / "zeros.ckpt")
    with read(path, names=names) if several else read(path) as state:
        lightning.write(state, tmp_path / "written.ckpt", base=tmp_path / "zeros.ckpt", force=False, options={})
    resumed, again = build(several), trainer(tmp_path, 1)
    again.fit(resumed, ckpt_path=tmp_path / "written.ckpt")
    written = torch.load(tmp_path / "written.ckpt", weights_only=True)
    original = torch.load(path, weights_only=True)
    zeros = torch.load(tmp_path / "zeros.ckpt", weights_only=True)
    assert list(written) == list(zeros)
    for key in zeros.keys() - {"optimizer_states", "state_dict"}:
        assert written[key] == zeros[key], key
    for name, weight in zeros["state_dict"].items():
        assert torch.equal(written["state_dict"][name], weight)
    for ours, theirs, live in zip(
        written["optimizer_states"], original["optimizer_states"], again.optimizers, strict=True
    ):
        assert ours["param_groups"] == theirs["param_groups"]
        for identity, slots in theirs["state"].items():
            for slot, value in slots.items():
                assert torch.equal(ours["state"][identity][slot], value)
                assert torch.equal(live.state_dict()["state"][identity][slot], value)


def test_callbacks_that_are_keyed_by_their_classes(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning before 1.5 wrote them so, and ``weights_only`` refuses it; it is read, and written back the same."""
    path, _, ran, _ = run
    module = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    kind = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = kind  # type: ignore[attr-defined]
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    tree = torch.load(path, weights_only=True)
    torch.save({**tree, "callbacks": {kind: {"best_model_score": torch.ones(2)}}}, tmp_path / "old.ckpt")

    names = [f"p{number}" for number in range(sum(len(g["params"]) for o in ran.optimizers for g in o.param_groups))]
    with read(tmp_path / "old.ckpt", names=names) as state:
        lightning.write(state, tmp_path / "written.ckpt", base=tmp_path / "old.ckpt", force=False, options={})
    written = torch.load(tmp_path / "written.ckpt", weights_only=False)
    assert torch.equal(written["callbacks"][kind]["best_model_score"], torch.ones(2))
    for ours, theirs in zip(written["optimizer_states"], tree["optimizer_states"], strict=True):
        assert ours["param_groups"] == theirs["param_groups"]
        assert ours["state"].keys() == theirs["state"].keys()


def test_it_needs_a_base_with_as_many_optimizers(run: Any, tmp_path: Path) -> None:
    path, _, _, several = run
    with read(path, names=[f"p{number}" for number in range(7)]) if several else read(path) as state:
        with pytest.raises(OptionError) as base:
            lightning.write(state, tmp_path / "x.ckpt", base=None, force=False, options={})
        assert str(base.value) == (
            "lightning takes all but the optimizers from a .ckpt of the same run; pass it as base="
        )
        torch.save({"optimizer_states": [{}] * 3}, tmp_path / "three.ckpt")
        with pytest.raises(UnrepresentableError) as three:
            lightning.write(state, tmp_path / "x.ckpt", base=tmp_path / "three.ckpt", force=False, options={})
        count = 2 if several else 1
        assert str(three.value) == f"{tmp_path / 'three.ckpt'} has 3 optimizers, the state {count}"
