"""transformers' Trainer with named state: real runs, real kills."""

from __future__ import annotations

import logging
import os
import pickle
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import lora_state_format as lsf
from lora_state_format.errors import BindError, FileError, OptionError, UnknownFormatError
from lora_state_format.integrations.transformers import last_checkpoint, with_named_state
from lora_state_format.torch import load_optimizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SCRIPT = Path(__file__).parent / "runs" / "trainer_run.py"
STATE = "training_state/optimizer.safetensors"
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def _no_precision_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers before 5 leaves that of a run in the environment, for all that follow in the process."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture(scope="module")
def loop() -> dict[str, Callable[..., Any]]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def plain(loop: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of a Trainer that knows nothing of this package."""
    folder: Path = tmp_path_factory.mktemp("plain")
    loop["make"](folder).train()
    return folder


@pytest.fixture(scope="module")
def named(loop: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with named state, and without optimizer.pt."""
    folder: Path = tmp_path_factory.mktemp("named")
    with_named_state(loop["make"](folder), drop_legacy=True).train()
    return folder


def same_end(a: Path, b: Path, checkpoint: str = "checkpoint-6") -> bool:
    """Whether two runs ended with the same weights and, where both have it, the same state, bit for bit."""
    ours, theirs = load_file(a / checkpoint / ADAPTER), load_file(b / checkpoint / ADAPTER)
    states = [folder / checkpoint / STATE for folder in (a, b)]
    if all(path.exists() for path in states) and states[0].read_bytes() != states[1].read_bytes():
        return False
    return ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)


# --- saving -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_state_once(named: Path, plain: Path) -> None:
    assert same_end(named, plain)
    for step in (2, 4, 6):
        folder = named / f"checkpoint-{step}"
        assert (folder / "optimizer.pt").stat().st_size < 200
        assert {path.name for path in folder.iterdir()} - {path.name for path in (plain / folder.name).iterdir()} == {
            "training_state"
        }
        with lsf.open_state(folder / STATE) as state:
            assert (len(state), state.global_step, [group.count for group in state.groups]) == (8, step, [8, 0])
    assert lsf.verify(named / "checkpoint-6" / STATE).ok


def test_a_plain_trainer_stops_and_says_where_the_optimizer_is(
    loop: dict[str, Any], named: Path, tmp_path: Path
) -> None:
    with pytest.raises(pickle.UnpicklingError) as caught:
        loop["make"](tmp_path).train(resume_from_checkpoint=str(named / "checkpoint-4"))
    assert (
        "this checkpoint keeps its optimizer in training_state/optimizer.safetensors: resume it with "
        "lora_state_format.integrations.transformers.with_named_state(trainer)"
    ) in str(caught.value)


class Rates(TrainerCallback):  # type: ignore[misc]
    """The rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, *arguments: Any, **options: Any) -> None:
        self.seen.append(options["optimizer"].param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("schedule", "warmup"),
    [("constant", 0), ("linear", 0), ("cosine", 0), ("linear", 5), ("cosine", 3), ("constant_with_warmup", 5)],
)
def test_a_new_rate_goes_on_as_if_it_had_been_there_from_the_start(
    schedule: str, warmup: int, loop: dict[str, Any], tmp_path: Path
) -> None:
    def run(folder: Path, lr: float, resume: Path | None = None, **policies: Any) -> list[float]:
        options = {"learning_rate": lr, "lr_scheduler_type": schedule, "warmup_steps": warmup}
        trainer = with_named_state(loop["make"](folder, **options), **policies)
        rates = Rates()
        trainer.add_callback(rates)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return rates.seen

    run(tmp_path / "old", 1e-2)
    built = run(tmp_path / "built", 3e-3)
    resumed = run(tmp_path / "new", 3e-3, tmp_path / "old" / "checkpoint-4", options={"lr": "current"})
    assert (len(built), len(resumed)) == (6, 2)
    assert resumed == built[4:]


@pytest.mark.parametrize(("schedule", "first"), [("reduce_lr_on_plateau", 8e-3), ("greedy", 16e-3)])
def test_a_new_rate_under_a_schedule_that_measures(
    schedule: str, first: float, loop: dict[str, Any], tmp_path: Path
) -> None:
    """No loss after the first is better by 10, so each one of them halves the rate; the best is remembered.

    The first one leaves the rate (``GreedyLR`` doubles it).
    """

    def run(folder: Path, lr: float, resume: Path | None = None, **policies: Any) -> list[float]:
        kwargs = {"factor": 0.5, "patience": 0, "threshold": 10.0, "threshold_mode": "abs", "min_lr": 1e-6}
        options = {"learning_rate": lr, "lr_scheduler_type": schedule, "lr_scheduler_kwargs": kwargs}
        trainer = loop["make"](folder, **options, eval_strategy="steps", eval_steps=1, metric_for_best_model="loss")
        rates = Rates()
        trainer.add_callback(rates)
        with_named_state(trainer, **policies).train(resume_from_checkpoint=str(resume) if resume else None)
        return rates.seen

    assert run(tmp_path / "old", 8e-3) == [8e-3, *(first / 2**n for n in range(5))]
    saved = tmp_path / "old" / "checkpoint-4"
    assert run(tmp_path / "same", 8e-3, saved) == [first / 8, first / 16]
    assert run(tmp_path / "new", 4e-3, saved, options={"lr": "current"}) == [4e-3, 2e-3]


def test_beside_the_legacy_file_it_says_the_same(loop: dict[str, Any], tmp_path: Path) -> None:
    with_named_state(loop["make"](tmp_path)).train()
    legacy = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt", weights_only=True)
    with lsf.open_state(tmp_path / "checkpoint-6" / STATE) as state:
        for position, parameter in enumerate(state.values()):
            for slot in ("exp_avg", "exp_avg_sq"):
                assert parameter[slot].torch().equal(legacy["state"][position][slot])


def test_rotation_the_best_model_accumulation_and_mixed_precision(loop: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "bf16": True,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "save_total_limit": 2,
    }
    with_named_state(loop["make"](tmp_path / "rotated", **options), drop_legacy=True).train()
    left = [path.name for path in (tmp_path / "rotated").iterdir()]
    assert len(left) == 2
    assert "checkpoint-6" in left
    assert all((tmp_path / "rotated" / name / STATE).exists() for name in left)

    options["save_total_limit"] = None
    with_named_state(loop["make"](tmp_path / "whole", **options), drop_legacy=True).train()
    resumed = with_named_state(loop["make"](tmp_path / "resumed", **options), drop_legacy=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert same_end(tmp_path / "resumed", tmp_path / "whole")


def test_it_is_there_before_anything_is_pushed(loop: dict[str, Any], tmp_path: Path) -> None:
    trainer = with_named_state(loop["make"](tmp_path, max_steps=2))
    pushed: list[bool] = []
    trainer.args.push_to_hub = True
    trainer._push_from_checkpoint = lambda folder: pushed.append(lsf.verify(Path(folder, STATE)).ok)
    trainer.push_to_hub = lambda **_: None
    trainer.train()
    assert pushed == [True]


# --- resuming -----------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_uninterrupted_one(
    loop: dict[str, Any], plain: Path, named: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "lora_state_format"):
        trainer = with_named_state(loop["make"](tmp_path), drop_legacy=True)
        trainer.train(resume_from_checkpoint=str(named / "checkpoint-2"))
    assert same_end(tmp_path, named)
    assert same_end(tmp_path, plain)
    assert [r.getMessage() for r in caplog.records if r.name == "lora_state_format"] == [
        "restored 8/8 parameters, 2 slots each, step 2; weights match 8/8",
        "lr 0.01 -> 0.006666666666666666 from the file",
    ]


def test_without_it_trainer_starts_cold_in_silence(
    loop: dict[str, Any], plain: Path, named: Path, tmp_path: Path
) -> None:
    """What this is for: a plain Trainer resumes from a folder without optimizer.pt, and says nothing."""
    checkpoint = shutil.copytree(named / "checkpoint-2", tmp_path / "checkpoint-2")
    (checkpoint / "optimizer.pt").unlink()
    loop["make"](tmp_path).train(resume_from_checkpoint=str(checkpoint))
    assert not same_end(tmp_path, plain)


def test_a_checkpoint_of_a_plain_trainer_is_resumed_by_order(
    loop: dict[str, Any], plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_named_state(loop["make"](tmp_path)).train(resume_from_checkpoint=str(plain / "checkpoint-2"))
    assert same_end(tmp_path, plain)
    assert any("Order alone is no proof" in message for message in caplog.messages)


def test_a_schedule_that_watches_the_loss(loop: dict[str, Any], tmp_path: Path) -> None:
    options = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "threshold": 10.0},  # lower the rate at every evaluation
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    with_named_state(loop["make"](tmp_path / "whole", **options), drop_legacy=True).train()
    resumed = with_named_state(loop["make"](tmp_path / "resumed", **options), drop_legacy=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same_end(tmp_path / "resumed", tmp_path / "whole")
    assert resumed.optimizer.param_groups[0]["lr"] < 1e-5


def test_other_groups(loop: dict[str, Any], named: Path, tmp_path: Path) -> None:
    model = loop["build"]()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters[::-1], lr=1e-2, weight_decay=0.01, fused=True)
    # the norm that gradients are clipped by would be rounded in another order
    trainer = with_named_state(loop["make"](tmp_path, model, (optimizer, None), max_grad_norm=0.0), drop_legacy=True)
    trainer.train(resume_from_checkpoint=str(named / "checkpoint-2"))
    other = loop["make"](tmp_path / "trainers_own", max_grad_norm=0.0, optim="adamw_torch_fused")
    with_named_state(other, drop_legacy=True).train(resume_from_checkpoint=str(named / "checkpoint-2"))
    ours, theirs = (load_file(folder / "checkpoint-6" / ADAPTER) for folder in (tmp_path, tmp_path / "trainers_own"))
    assert all(ours[key].equal(theirs[key]) for key in theirs)


def test_another_adapter(loop: dict[str, Any], named: Path, tmp_path: Path) -> None:
    trainer = with_named_state(loop["make"](tmp_path, loop["build"](adapter="style")), drop_legacy=True)
    trainer.train(resume_from_checkpoint=str(named / "checkpoint-2"))
    ours, theirs = load_file(tmp_path / "checkpoint-6" / "style" / ADAPTER), load_file(named / "checkpoint-6" / ADAPTER)
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in theirs)


def test_other_targets(loop: dict[str, Any], named: Path, tmp_path: Path) -> None:
    more = loop["build"](targets=("q_proj", "k_proj", "v_proj"))
    with pytest.raises(BindError, match=r"in the optimizer, not in the file \(4\):"):
        with_named_state(loop["make"](tmp_path, more)).train(resume_from_checkpoint=str(named / "checkpoint-2"))
    more = loop["build"](targets=("q_proj", "k_proj", "v_proj"))
    trainer = with_named_state(loop["make"](tmp_path, more, max_steps=3, save_steps=1), missing="fresh")
    trainer.train(resume_from_checkpoint=str(named / "checkpoint-2"))
    with lsf.open_state(tmp_path / "checkpoint-3" / STATE) as state:
        steps = {name: parameter["step"].item() for name, parameter in state.items()}
    assert {name: 1.0 if "k_proj" in name else 3.0 for name in steps} == steps

    fewer = loop["build"](targets=("q_proj",))
    trainer = with_named_state(loop["make"](tmp_path / "few", fewer), unexpected="carry")
    trainer.train(resume_from_checkpoint=str(named / "checkpoint-2"))
    with (
        lsf.open_state(tmp_path / "few" / "checkpoint-6" / STATE) as state,
        lsf.open_state(named / "checkpoint-2" / STATE) as before,
    ):
        assert [parameter.name for parameter in state.carried] == [name for name in before if "v_proj" in name]
        for parameter in state.carried:
            assert parameter["exp_avg"].torch().equal(before[parameter.name]["exp_avg"].torch())


@pytest.mark.parametrize("drop", [STATE, "scheduler.pt"])
def test_what_is_missing_is_an_error(loop: dict[str, Any], named: Path, tmp_path: Path, drop: str) -> None:
    checkpoint = shutil.copytree(named / "checkpoint-2", tmp_path / "checkpoint-2")
    (checkpoint / drop).unlink()
    trainer = with_named_state(loop["make"](tmp_path))
    if drop == STATE:
        with pytest.raises(FileError) as damaged:
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert str(damaged.value) == (
            f"{checkpoint}/optimizer.pt: it only says that the optimizer was saved as {STATE} next to it, which is not "
            "there"
        )
        (checkpoint / "optimizer.pt").unlink()
        with pytest.raises(
            UnknownFormatError, match=r"checkpoint-2: no optimizer state found here; looked for:\n  named "
        ):
            trainer.train(resume_from_checkpoint=str(checkpoint))
    else:
        with pytest.raises(FileNotFoundError) as caught:
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert str(caught.value) == (
            f"{checkpoint}/scheduler.pt: no such file; without it the learning rate would start over"
        )


def test_the_state_of_another_step_is_named(
    loop: dict[str, Any], named: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = shutil.copytree(named / "checkpoint-4", tmp_path / "checkpoint-4")
    shutil.copy(named / "checkpoint-2" / STATE, checkpoint / STATE)
    with_named_state(loop["make"](tmp_path)).train(resume_from_checkpoint=str(checkpoint))
    assert any(
        message.startswith("these weights are not those that the state was saved with: of another step")
        for message in caplog.messages
    )


# --- what Trainer refuses -----------------------------------------------------------------------------------------


def test_another_rank_and_the_way_round(loop: dict[str, Any], named: Path, tmp_path: Path) -> None:
    """Trainer loads the weights before it comes to the state, and PEFT refuses those of another rank."""
    checkpoint = named / "checkpoint-2"
    trainer = with_named_state(loop["make"](tmp_path, loop["build"](rank=8)), mismatch="resize")
    with pytest.raises(RuntimeError, match="size mismatch"):
        trainer.train(resume_from_checkpoint=str(checkpoint))

    model = loop["build"](rank=8)
    padded = {}
    for name, weight in load_file(checkpoint / ADAPTER).items():
        live = model.get_parameter(name.replace(".weight", ".default.weight")).detach()
        padded[name] = torch.zeros_like(live)
        padded[name][: weight.shape[0], : weight.shape[1]] = weight
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, padded)
    trainer = with_named_state(loop["make"](tmp_path, model), drop_legacy=True)
    trainer.create_optimizer_and_scheduler(num_training_steps=6)
    report = load_optimizer(trainer.optimizer, model, checkpoint, mismatch="resize")
    assert report.restored == 8
    trainer.train()
    with lsf.open_state(tmp_path / "checkpoint-2" / STATE) as state:
        assert {parameter["step"].item() for parameter in state.values()} == {4.0}


def test_a_module_to_save_that_the_checkpoint_lacks(loop: dict[str, Any], named: Path, tmp_path: Path) -> None:
    """PEFT raises a bare KeyError for it; what the message says to do is done."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    def second() -> Any:
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["model.norm"])
        return get_peft_model(loop["build"]().unload(), config)

    checkpoint = str(named / "checkpoint-2")
    adapter = f"{checkpoint}/{ADAPTER}"
    trainer = with_named_state(loop["make"](tmp_path / "stopped", second()), missing="fresh")
    with pytest.raises(FileError) as caught:
        trainer.train(resume_from_checkpoint=checkpoint)
    assert str(caught.value) == (
        f"{adapter}: has no 'base_model.model.model.norm.weight', which this model saves with its adapter "
        "(modules_to_save): PEFT does not load an adapter without it\n"
        "hint: to start that module from the model, load the rest with set_peft_model_state_dict(model, "
        f"get_peft_model_state_dict(model) | load_file('{adapter}')), then "
        "trainer.create_optimizer_and_scheduler(...), load_optimizer(trainer.optimizer, model, "
        f"'{checkpoint}', missing='fresh') and train() without resume_from_checkpoint"
    )
    model = second()
    set_peft_model_state_dict(model, get_peft_model_state_dict(model) | load_file(adapter))
    trainer = with_named_state(loop["make"](tmp_path / "second", model), drop_legacy=True)
    trainer.create_optimizer_and_scheduler(num_training_steps=6)
    report = load_optimizer(trainer.optimizer, model, checkpoint, missing="fresh")
    assert str(report).startswith("restored 8/9 parameters, 2 slots each, step 2, 1 fresh; weights match 8/8")
    trainer.train()


def test_a_trainer_with_other_methods(loop: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    trainer = loop["make"](tmp_path)
    trainer._load_optimizer_and_scheduler = lambda checkpoint, strict: None
    with pytest.raises(OptionError) as caught:
        with_named_state(trainer)
    assert str(caught.value) == (
        "Trainer._load_optimizer_and_scheduler takes (checkpoint, strict), where (checkpoint) was expected: "
        f"transformers {transformers.__version__} is not known here; call save_optimizer and load_optimizer yourself"
    )


def test_a_trainer_without_them(tmp_path: Path) -> None:
    import transformers

    with pytest.raises(OptionError) as caught:
        with_named_state(object())
    assert str(caught.value) == (
        "object._save_optimizer_and_scheduler does not exist, where (output_dir) was expected: "
        f"transformers {transformers.__version__} is not known here; call save_optimizer and load_optimizer yourself"
    )


def test_a_sharded_trainer(loop: dict[str, Any], tmp_path: Path) -> None:
    trainer = loop["make"](tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(OptionError) as caught:
        with_named_state(trainer, drop_legacy=True)
    assert str(caught.value) == (
        "drop_legacy=True: with fsdp Trainer writes weights and optimizer by one method; leave it out"
    )


def test_the_last_checkpoints_keep_their_state(loop: dict[str, Any], tmp_path: Path) -> None:
    with_named_state(loop["make"](tmp_path), drop_legacy=True, keep_last=2).train()
    held = {path.parent.parent.name for path in tmp_path.glob("checkpoint-*/training_state/optimizer.safetensors")}
    assert held == {"checkpoint-4", "checkpoint-6"}
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()


# --- crashes ------------------------------------------------------------------------------------------------------


KILLS = {"while it writes": ("pwrite", "2"), "before it commits": ("fsync", "1")}
"""When -> the function of ``os`` at whose call the process dies, and at which of them."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of runs that were killed while they saved checkpoint-4."""
    folders = {when: tmp_path_factory.mktemp("killed") for when in KILLS}
    runs = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folders[when]), *at],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for when, at in KILLS.items()
    ]
    outputs = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [-signal.SIGKILL] * len(runs), "\n".join(outputs)
    return folders


@pytest.mark.parametrize("when", KILLS)
def test_killed_while_it_saves(loop: dict[str, Any], plain: Path, killed: dict[str, Path], when: str) -> None:
    folder = killed[when]
    assert (folder / "checkpoint-4" / "training_state").is_dir()
    assert not (folder / "checkpoint-4" / STATE).exists()
    found = last_checkpoint(folder)
    assert found == str(folder / "checkpoint-2")
    with_named_state(loop["make"](folder), drop_legacy=True).train(resume_from_checkpoint=found)
    assert same_end(folder, plain)
    assert last_checkpoint(folder) == str(folder / "checkpoint-6")
    left = {path.name for path in (folder / "checkpoint-4" / "training_state").iterdir()}
    assert left == {"optimizer.safetensors"}


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "nosuch") is None
