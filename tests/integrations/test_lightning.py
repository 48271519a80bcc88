"""Lightning with its optimizers' state beside the .ckpt: real runs, a real kill."""

from __future__ import annotations

import logging
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_state_format as lsf
from lora_state_format.errors import FileError, OptionError
from lora_state_format.torch import load_optimizer, save_optimizer

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

SCRIPT = Path(__file__).parent / "runs" / "lightning_run.py"


@pytest.fixture(scope="module")
def loop() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def whole(loop: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Six steps with named state: the folder, and the weights at the end."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(loop, loop["make"](folder, loop["NamedState"]("model")))


@pytest.fixture(scope="module")
def plain(loop: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The same by a trainer that knows nothing of this package."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, fit(loop, loop["make"](folder))


def fit(loop: dict[str, Any], trainer: Any, ckpt: Path | None = None, **module: Any) -> dict[str, torch.Tensor]:
    trained = loop["Module"](**module)
    trainer.fit(trained, loop["loader"](), ckpt_path=ckpt)
    return {name: p.detach().clone() for name, p in trained.model.named_parameters() if p.requires_grad}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_the_state_is_beside_the_checkpoint(whole: Any, plain: Any) -> None:
    folder, weights = whole
    assert same(weights, plain[1])
    assert sorted(path.name for path in folder.iterdir()) == [
        f"step={step}.{kind}" for step in (2, 4, 6) for kind in ("ckpt", "training_state")
    ]
    with lsf.open_state(folder / "step=4.training_state" / "optimizer.safetensors") as state:
        assert (len(state), state.global_step) == (8, 4)
        assert set(state) == set(weights)
    inside = torch.load(folder / "step=4.ckpt", weights_only=False)["optimizer_states"]
    assert inside == [{"state": {}, "param_groups": [], "named_state": "beside this file"}]


@pytest.mark.parametrize("order", [1, -1])
def test_a_resumed_run_is_the_uninterrupted_one(
    loop: dict[str, Any], whole: Any, tmp_path: Path, order: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "lora_state_format"):
        trainer = loop["make"](tmp_path, loop["NamedState"]("model"))
        weights = fit(loop, trainer, whole[0] / "step=2.ckpt", order=order)
    assert same(weights, whole[1])
    assert [record.getMessage() for record in caplog.records if record.name == "lora_state_format"] == [
        "restored 8/8 parameters, 2 slots each, step 2; weights match 8/8",
        "lr 0.01 -> 0.007 from the file",
    ]


def test_without_the_callback_it_is_an_error(loop: dict[str, Any], whole: Any, tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match="NAME.training_state next to NAME.ckpt") as warned,
        pytest.raises(ValueError, match="different number of parameter groups"),
    ):
        fit(loop, loop["make"](tmp_path), whole[0] / "step=2.ckpt")
    assert any("lora_state_format.integrations.lightning.NamedState" in str(warning.message) for warning in warned)


def test_what_is_next_to_a_checkpoint_is_read_through_it(whole: Any, tmp_path: Path) -> None:
    ckpt = whole[0] / "step=4.ckpt"
    with lsf.read(ckpt) as state, lsf.open_state(whole[0] / "step=4.training_state" / "optimizer.safetensors") as own:
        assert list(state) == list(own)
        assert len(state) == 8
    lsf.convert(ckpt, tmp_path / "o.safetensors")
    own = whole[0] / "step=4.training_state" / "optimizer.safetensors"
    with lsf.open_state(tmp_path / "o.safetensors") as converted, lsf.open_state(own) as original:
        assert all(
            converted[name][slot].bytes() == original[name][slot].bytes()
            for name in original
            for slot in ("exp_avg", "exp_avg_sq")
        )
    alone = tmp_path / "best.ckpt"
    alone.write_bytes(ckpt.read_bytes())
    with pytest.raises(FileError) as caught:
        lsf.read(alone)
    assert str(caught.value) == (
        f"{alone}: its optimizers were saved by name as best.training_state/optimizer.safetensors next to it, which is "
        "not there; copy that folder along"
    )


def test_a_link_to_the_last_checkpoint(loop: dict[str, Any], whole: Any, tmp_path: Path) -> None:
    fit(loop, loop["make"](tmp_path, loop["NamedState"]("model"), steps=4, save_last="link", save_top_k=1))
    assert (tmp_path / "last.ckpt").is_symlink()
    weights = fit(loop, loop["make"](tmp_path, loop["NamedState"]("model")), tmp_path / "last.ckpt")
    assert same(weights, whole[1])


def rates_of(
    loop: dict[str, Any], folder: Path, ckpt: Path | None = None, named: Any = None, **module: Any
) -> list[float]:
    """The rate of each step of a run, with or without the callback ``named``."""
    seen: list[float] = []

    class Recorder(loop["pl"].Callback):  # type: ignore[misc]
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            seen.append(optimizer.param_groups[0]["lr"])

    callbacks = [named] if named else []
    fit(loop, loop["make"](folder, *callbacks, Recorder()), ckpt, **module)
    return seen


def test_a_new_rate_goes_on_as_if_it_had_been_there_from_the_start(
    loop: dict[str, Any], whole: Any, tmp_path: Path
) -> None:
    current = loop["NamedState"]("model", options={"lr": "current"})
    built = rates_of(loop, tmp_path, lr=3e-3)
    resumed = rates_of(loop, tmp_path, whole[0] / "step=4.ckpt", current, lr=3e-3)
    assert (len(built), len(resumed)) == (6, 2)
    assert resumed == built[4:]


def test_a_new_rate_under_a_schedule_that_measures(loop: dict[str, Any], tmp_path: Path) -> None:
    """Lightning tells it of step 4 after that step's checkpoint, and so not at all in a run that resumes there."""
    measured: dict[str, Any] = {"lr": 8e-3, "plateau": True}
    named = loop["NamedState"]("model")
    assert rates_of(loop, tmp_path / "named", named=named, **measured) == [8e-3, 8e-3, 4e-3, 2e-3, 1e-3, 5e-4]
    rates_of(loop, tmp_path / "plain", **measured)
    plain = rates_of(loop, tmp_path, tmp_path / "plain" / "step=4.ckpt", **measured)
    ckpt = tmp_path / "named" / "step=4.ckpt"
    assert rates_of(loop, tmp_path, ckpt, loop["NamedState"]("model"), **measured) == plain == [2e-3, 1e-3]
    current = loop["NamedState"]("model", options={"lr": "current"})
    assert rates_of(loop, tmp_path, ckpt, current, lr=5e-3, plateau=True) == [5e-3, 2.5e-3]


def test_without_the_state_it_is_an_error(loop: dict[str, Any], whole: Any, tmp_path: Path) -> None:
    alone = tmp_path / "step=2.ckpt"
    alone.write_bytes((whole[0] / "step=2.ckpt").read_bytes())
    with pytest.raises(FileNotFoundError) as caught:
        fit(loop, loop["make"](tmp_path, loop["NamedState"]("model")), alone)
    state = tmp_path / "step=2.training_state" / "optimizer.safetensors"
    assert str(caught.value) == (
        f"{state}: no such file; the optimizers of {alone} were saved there. Copy or rename the folder "
        "step=2.training_state together with the .ckpt"
    )


def test_a_checkpoint_with_its_own_optimizers_is_lightnings(loop: dict[str, Any], plain: Any, tmp_path: Path) -> None:
    trainer = loop["make"](tmp_path, loop["NamedState"]("model"))
    assert same(fit(loop, trainer, plain[0] / "step=2.ckpt"), plain[1])


def test_policies(loop: dict[str, Any], whole: Any, tmp_path: Path) -> None:
    callback = loop["NamedState"]("model", options={"betas": (0.5, 0.5)})
    trainer = loop["make"](tmp_path, callback, steps=3)
    fit(loop, trainer, whole[0] / "step=2.ckpt")
    assert trainer.optimizers[0].param_groups[0]["betas"] == (0.5, 0.5)


def test_names_are_those_of_the_whole_module_unless_said(loop: dict[str, Any], tmp_path: Path) -> None:
    fit(loop, loop["make"](tmp_path, loop["NamedState"](weights=False), steps=2))
    with lsf.open_state(tmp_path / "step=2.training_state" / "optimizer.safetensors") as state:
        assert all(name.startswith("model.base_model.model.") for name in state)
        assert all(parameter.weights is None for parameter in state.values())


def test_a_checkpoint_that_is_removed_takes_its_state_along(loop: dict[str, Any], tmp_path: Path) -> None:
    fit(loop, loop["make"](tmp_path, loop["NamedState"]("model"), save_top_k=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=6.ckpt", "step=6.training_state"]


def test_what_lies_next_to_the_state_of_a_removed_checkpoint_stays(loop: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "step=2.training_state").mkdir()
    (tmp_path / "step=2.training_state" / "notes.txt").write_text("precious")
    fit(loop, loop["make"](tmp_path, loop["NamedState"]("model"), save_top_k=1))
    assert [path.name for path in (tmp_path / "step=2.training_state").iterdir()] == ["notes.txt"]


def test_weights_alone_have_no_state(loop: dict[str, Any], tmp_path: Path) -> None:
    fit(loop, loop["make"](tmp_path, loop["NamedState"]("model"), save_weights_only=True, save_top_k=1))
    assert [path.name for path in tmp_path.iterdir()] == ["step=6.ckpt"]


def test_a_checkpoint_after_the_run(loop: dict[str, Any], tmp_path: Path) -> None:
    trainer = loop["make"](tmp_path, loop["NamedState"]("model"))
    fit(loop, trainer)
    trainer.save_checkpoint(tmp_path / "end")
    expected = tmp_path / "step=6.training_state" / "optimizer.safetensors"
    assert (tmp_path / "end.training_state" / "optimizer.safetensors").read_bytes() == expected.read_bytes()
    trainer.fit_loop.epoch_loop.max_steps = 8
    fit(loop, trainer, tmp_path / "end")
    assert sorted(tmp_path.glob("step=8*"))


def test_a_strategy_that_saves_by_itself(loop: dict[str, Any], plain: Any, tmp_path: Path) -> None:
    from lightning.pytorch import Callback
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class Own(SingleDeviceStrategy):  # type: ignore[misc]
        def save_checkpoint(self, *arguments: Any, **options: Any) -> None:
            super().save_checkpoint(*arguments, **options)

    trainer = loop["make"](tmp_path, loop["NamedState"]("model"))
    trainer.strategy.__class__ = Own
    with pytest.raises(OptionError) as caught:
        fit(loop, trainer)
    assert str(caught.value) == (
        "Own saves optimizers in its own way, of which NamedState cannot be a part: leave it out, call "
        "save_optimizer(trainer.optimizers, trainer.lightning_module, path) on every rank next to "
        "trainer.save_checkpoint, and load_optimizer(...) of the same in on_train_start"
    )

    class Loading(Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            report = load_optimizer(trainer.optimizers, trainer.lightning_module, tmp_path / "optimizer.safetensors")
            assert report.restored == 8

    first = loop["make"](tmp_path, steps=4)
    first.strategy.__class__ = Own
    fit(loop, first)
    save_optimizer(first.optimizers, first.lightning_module, tmp_path / "optimizer.safetensors")
    first.save_checkpoint(tmp_path / "by-hand.ckpt")
    again = loop["make"](tmp_path, Loading())
    again.strategy.__class__ = Own
    assert same(fit(loop, again, tmp_path / "by-hand.ckpt"), plain[1])


def test_killed_while_it_saves(loop: dict[str, Any], whole: Any, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), "pwrite", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step=2.ckpt", "step=2.training_state", "step=4.training_state",
    ]  # fmt: skip
    assert not (tmp_path / "step=4.training_state" / "optimizer.safetensors").exists()
    trainer = loop["make"](tmp_path, loop["NamedState"]("model"))
    assert same(fit(loop, trainer, tmp_path / "step=2.ckpt"), whole[1])
