"""Which states of a run stay, and that nothing else goes."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from lora_state_format import open_state, write
from lora_state_format.cli import run
from lora_state_format.errors import OptionError
from lora_state_format.format.rotation import plan_rotation, remove_states, series_of
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import Group, Naming, Optimizer, OptimizerState, Parameter, Role, Slot
from lora_state_format.model.tensors import contiguous

STATE = "training_state/optimizer.safetensors"


def state(step: int) -> OptimizerState:
    parameters = [
        Parameter(name, (4,), {"exp_avg": Slot(contiguous("F32", (4,), Memory(bytes(16))), Role.PARAM)})
        for name in ("a", "b", "c")
    ]
    return OptimizerState(
        (Optimizer("torch.optim.adamw.AdamW"),),
        (Group(0, (), 3),),
        tuple(parameters),
        Naming("model"),
        global_step=step,
    )


def make(folder: Path, steps: Iterable[int], name: str = "checkpoint-{}") -> list[Path]:
    """Checkpoints with weights, and the state as one file or, every other time, as a set."""
    paths = []
    for number, step in enumerate(steps):
        path = folder / name.format(step) / STATE
        path.parent.mkdir(parents=True)
        path.parent.with_name("model.safetensors").write_text("weights")
        write(state(step), path, max_shard_size=16 if number % 2 else None)
        paths.append(path)
    return paths


def test_the_last_ones_stay_and_weights_with_all(tmp_path: Path) -> None:
    paths = make(tmp_path, [9, 100, 20, 300])
    rotation = plan_rotation(series_of(paths[0]), 2)
    assert rotation.kept == (paths[3], paths[1])
    assert rotation.removed == (paths[2], paths[0])
    with open_state(paths[0]) as opened:
        remove_states(rotation.removed)
        assert opened["a"]["exp_avg"].bytes() == bytes(16)  # whoever reads it, reads it to its end
    assert [path for path in paths if path.parent.exists()] == [paths[1], paths[3]]
    assert all((folder / "model.safetensors").exists() for folder in tmp_path.iterdir())


def test_a_broken_state_counts_for_nothing(tmp_path: Path) -> None:
    paths = make(tmp_path, [1, 2, 3, 4])
    next(file for file in paths[3].parent.iterdir() if "00002" in file.name).unlink()
    assert plan_rotation(paths, 1) == plan_rotation(reversed_(paths), 1)
    assert plan_rotation(paths, 1).kept == (paths[3], paths[2])
    assert plan_rotation(paths, 3).removed == ()
    assert plan_rotation(paths, 4).removed == ()  # there are only three


def reversed_(paths: list[Path]) -> list[Path]:
    return paths[::-1]


def test_what_only_has_the_name_of_a_state_stays(tmp_path: Path) -> None:
    paths = make(tmp_path, [1, 2])
    other = tmp_path / "checkpoint-0" / STATE
    other.parent.mkdir(parents=True)
    other.write_text("something else")
    assert series_of(paths[0]) == paths
    remove_states([other])
    assert other.exists()


def test_what_is_left_of_a_killed_removal_goes_next_time(tmp_path: Path) -> None:
    paths = make(tmp_path, [1, 2, 3])
    Path(f"{paths[1]}.index.json").unlink()
    rotation = plan_rotation(series_of(paths[2]), 1)
    assert rotation.removed == (paths[1], paths[0])
    remove_states(rotation.removed)
    assert [path.name for path in tmp_path.glob("*/training_state")] == ["training_state"]


def test_names_with_several_numbers_go_by_the_step(tmp_path: Path) -> None:
    (early,) = make(tmp_path, [10], "loss=0.9-step={}")
    (late,) = make(tmp_path, [20], "loss=0.3-step={}")
    assert plan_rotation([early, late], 1).removed == (early,)
    unknown = tmp_path / "loss=0.1-step=30" / STATE
    unknown.parent.mkdir(parents=True)
    write(replace(state(0), global_step=None), unknown)
    with pytest.raises(OptionError) as raised:
        plan_rotation([early, late, unknown], 1)
    assert str(raised.value) == (
        f"{unknown}: which of 3 states is the newest is unknown: the folders' names differ in several numbers, and "
        "this state has no global_step"
    )


def test_the_last_one_always_stays(tmp_path: Path) -> None:
    with pytest.raises(OptionError) as raised:
        plan_rotation([], 0)
    assert str(raised.value) == "keep_last=0: the last state is never removed; choose 1 or more"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = make(tmp_path, [1, 2, 3])
    for path in paths:
        with zipfile.ZipFile(path.parent.with_name("optimizer.pt"), "w") as archive:
            archive.writestr("x", "y")
    assert run(["prune-checkpoints", str(tmp_path), "--keep", "2", "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["removed"] == [str(paths[0])]
    assert all(path.parent.exists() for path in paths)
    size = paths[0].stat().st_size
    assert said["bytes"] == size
    assert run(["prune-checkpoints", str(tmp_path), "--keep", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"keep {paths[2]}",
        f"keep {paths[1]}",
        f"remove {paths[0]}",
        f"1 removed, 2 kept, freed {size:,} bytes",
    ]
    assert run(["prune-checkpoints", str(tmp_path), "--keep", "1", "--legacy"]) == 0
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "checkpoint-1/model.safetensors",
        "checkpoint-2/model.safetensors",
        "checkpoint-3/model.safetensors",
        "checkpoint-3/optimizer.pt",
        "checkpoint-3/training_state/optimizer.safetensors",
    ]


def test_a_folder_without_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A script that makes room before a run starts has nothing to do then: that is no error."""
    assert run(["prune-checkpoints", str(tmp_path), "--keep", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "0 removed, 0 kept, freed 0 bytes\n"
    assert captured.err == (
        f"note: nothing to remove: no checkpoint in {tmp_path} has an optimizer's state under {STATE}; --legacy counts "
        "optimizer.pt and optimizer.bin too\n"
    )
    assert run(["prune-checkpoints", str(tmp_path), "--keep", "1", "--legacy", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"schema_version": 1, "dry_run": False, "kept": [], "removed": [], "bytes": 0}
    assert captured.err.endswith(f"under {STATE}\n")
    assert run(["prune-checkpoints", str(tmp_path / "gone"), "--keep", "1"]) == 3
