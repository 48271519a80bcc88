"""accelerate's save_state and load_state with named state: real runs, a real kill."""

from __future__ import annotations

import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_state_format as lsf
from lora_state_format.errors import BindError, OptionError
from lora_state_format.integrations.accelerate import with_named_state

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

SCRIPT = Path(__file__).parent / "runs" / "accelerate_run.py"
STATE = "training_state/optimizer.safetensors"


@pytest.fixture(scope="module")
def loop() -> dict[str, Callable[..., Any]]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def whole(loop: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights after six steps without an interruption."""
    weights: dict[str, torch.Tensor] = loop["train"](loop["start"](), range(6))
    return weights


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize("order", [1, -1])
def test_a_resumed_run_is_the_uninterrupted_one(
    loop: dict[str, Any], whole: dict[str, torch.Tensor], tmp_path: Path, order: int, caplog: pytest.LogCaptureFixture
) -> None:
    loop["train"](loop["start"](), range(4), tmp_path)
    assert sorted(path.name for path in (tmp_path / "step-4").iterdir()) == [
        "model.safetensors", "random_states_0.pkl", "scheduler.bin", "training_state",
    ]  # fmt: skip
    with caplog.at_level(logging.INFO, "lora_state_format"):
        resumed = loop["start"](tmp_path / "step-4", order=order)
    assert [record.getMessage() for record in caplog.records if record.name == "lora_state_format"] == [
        "restored 8/8 parameters, 2 slots each, step 4; weights match 8/8",
        "lr 0.01 -> 0.004 from the file",
    ]
    assert same(loop["train"](resumed, range(4, 6)), whole)
    assert not same(loop["train"](loop["start"](), range(4, 6)), whole)


def test_a_new_rate_goes_on_as_if_it_had_been_there_from_the_start(loop: dict[str, Any], tmp_path: Path) -> None:
    def rates(run: Any, steps: range) -> list[float]:
        seen = []
        for step in steps:
            seen.append(run[2].param_groups[0]["lr"])
            loop["train"](run, range(step, step + 1))
        return seen

    loop["train"](loop["start"](), range(4), tmp_path)
    built = rates(loop["start"](lr=3e-3), range(6))
    resumed = loop["start"](tmp_path / "step-4", lr=3e-3, options={"lr": "current"})
    assert rates(resumed, range(4, 6)) == built[4:]


def test_beside_the_legacy_file(loop: dict[str, Any], whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    loop["train"](loop["start"](drop_legacy=False), range(2), tmp_path)
    assert (tmp_path / "step-2" / "optimizer.bin").exists()
    # another order: if optimizer.bin were loaded, its moments would go to the wrong parameters
    assert same(loop["train"](loop["start"](tmp_path / "step-2", order=-1), range(2, 6)), whole)


def test_a_folder_without_names_is_accelerates_own(
    loop: dict[str, Any], whole: dict[str, torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop["train"](loop["start"](drop_legacy=False), range(2), tmp_path)
    (tmp_path / "step-2" / STATE).unlink()
    assert same(loop["train"](loop["start"](tmp_path / "step-2"), range(2, 6)), whole)
    assert f"{tmp_path / 'step-2'}: no named state; accelerate loads its optimizers by order" in caplog.messages


def test_policies_and_what_does_not_fit(loop: dict[str, Any], tmp_path: Path) -> None:
    accelerator, *_ = run = loop["start"]()
    loop["train"](run, range(2), tmp_path)
    _, _, optimizer, _ = loop["start"](tmp_path / "step-2", lr=0.5, options={"lr": "current"})
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * (1 - 0.9 * 2 / 6))  # its own schedule, two steps on
    _, _, optimizer, _ = loop["start"](tmp_path / "step-2", lr=0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * (1 - 0.9 * 2 / 6))

    other = loop["start"]()
    other[2].param_groups[0]["params"].pop()
    with pytest.raises(BindError, match=r"in the file, not in the optimizer \(1\)"):
        other[0].load_state(str(tmp_path / "step-2"))
    assert len(other[0]._optimizers) == len(accelerator._optimizers) == 1


def pair() -> tuple[Any, Any, Any, Any]:
    """Two models with an optimizer each, one step in."""
    torch.manual_seed(0)
    generator, critic = torch.nn.Linear(4, 3), torch.nn.Linear(3, 1)
    first = torch.optim.SGD(generator.parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.AdamW(critic.parameters(), lr=0.1)
    critic(generator(torch.ones(2, 4))).sum().backward()
    return generator, critic, first, second


@pytest.mark.parametrize("keys", [None, ("generator", "critic")])
def test_several_models_and_optimizers(tmp_path: Path, keys: tuple[str, str] | None) -> None:
    from accelerate import Accelerator

    generator, critic, first, second = pair()
    models = dict(zip(keys, (generator, critic), strict=True)) if keys else None
    accelerator = with_named_state(Accelerator(cpu=True), models=models, drop_legacy=True)
    generator, critic, first, second = accelerator.prepare(generator, critic, first, second)
    first.step()
    second.step()
    accelerator.save_state(str(tmp_path))
    assert not list(tmp_path.glob("optimizer*"))
    one, two = keys or ("model", "model_1")
    with lsf.open_state(tmp_path / STATE) as state:
        assert list(state) == [f"{one}.weight", f"{one}.bias", f"{two}.weight", f"{two}.bias"]
        assert [optimizer.class_path for optimizer in state.optimizers] == [
            "torch.optim.sgd.SGD", "torch.optim.adamw.AdamW",
        ]  # fmt: skip
    other = pair()
    models = dict(zip(keys, other[:2], strict=True)) if keys else None
    again = with_named_state(Accelerator(cpu=True), models=models, drop_legacy=True)
    prepared = again.prepare(*other)
    again.load_state(str(tmp_path))
    for ours, theirs in ((prepared[2], first), (prepared[3], second)):
        assert len(ours.state) == 2
        for a, b in zip(ours.state.values(), theirs.state.values(), strict=True):
            assert all(torch.equal(a[slot], b[slot]) for slot in b)


def test_automatic_names(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    project = ProjectConfiguration(project_dir=str(tmp_path), automatic_checkpoint_naming=True, total_limit=1)
    accelerator = with_named_state(Accelerator(cpu=True, project_config=project), drop_legacy=True)
    generator, _, first, _ = pair()
    generator, first = accelerator.prepare(generator, first)
    first.step()
    for _ in range(2):
        accelerator.save_state()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint_1"]
    first.state.clear()
    accelerator.load_state()
    assert len(first.state) == 2


def test_an_error_leaves_the_accelerator_as_it_was(tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = with_named_state(Accelerator(cpu=True), drop_legacy=True)
    generator, _, first, _ = pair()
    accelerator.prepare(generator, first)
    (tmp_path / "training_state").write_text("in the way")
    with pytest.raises(FileExistsError):
        accelerator.save_state(str(tmp_path))
    assert len(accelerator._optimizers) == 1
    assert not accelerator._save_model_state_pre_hook


def test_a_sharded_accelerator() -> None:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    accelerator = Accelerator(cpu=True)
    try:
        accelerator.state.distributed_type = DistributedType.MEGATRON_LM
        with pytest.raises(OptionError) as caught:
            with_named_state(accelerator)
        assert str(caught.value) == "the optimizer is sharded by MEGATRON_LM, which saves and loads it in its own way"
        accelerator.state.distributed_type = DistributedType.DEEPSPEED
        with pytest.raises(OptionError) as caught:
            with_named_state(accelerator, drop_legacy=True)
        assert str(caught.value) == (
            "drop_legacy=True: DeepSpeed writes weights and optimizer by one method; leave it out"
        )
    finally:
        accelerator.state._reset_state(reset_partial_state=True)


def test_sharded_by_fsdp2(tmp_path: Path) -> None:
    script = SCRIPT.with_name("accelerate_fsdp_run.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env={
                **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)[-3000:]
    assert all("resumed 8 local shards, all equal" in output for output in outputs)
    assert not list((tmp_path / "step-2").glob("optimizer*"))
    with lsf.open_state(tmp_path / "step-2" / STATE) as state:
        assert {name: parameter["exp_avg"].shape for name, parameter in state.items()} == {
            "0.weight": (7, 8), "0.bias": (7,), "1.weight": (3, 7), "1.bias": (3,),
        }  # fmt: skip


def test_killed_while_it_saves(loop: dict[str, Any], whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), "pwrite", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    assert not (tmp_path / "step-4" / STATE).exists()
    assert same(loop["train"](loop["start"](tmp_path / "step-2"), range(2, 6), tmp_path), whole)
    assert lsf.verify(tmp_path / "step-4" / STATE).ok
