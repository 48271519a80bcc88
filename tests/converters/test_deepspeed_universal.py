"""Universal checkpoints that DeepSpeed's script made, and those that this package makes for DeepSpeed to load."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_state_format import registry
from lora_state_format.converters import deepspeed_universal, deepspeed_zero
from lora_state_format.errors import FileError, OptionError, TargetExistsError, UnrepresentableError
from lora_state_format.model.states import OptimizerState

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

CASES = ["1-bf16", "2-bf16", "3-bf16-next"]


def live_of(path: Path) -> Any:
    """What the run held; the same without round-robin order, in which DeepSpeed's own gathering mixes up parameters."""
    return torch.load(path.with_name(f"{path.name.removesuffix('-robin')}.live.pt"))["saved"]


def masters(converter: Any, path: Path) -> OptimizerState:
    state = registry.read(path, converter.NAME, {"masters": True}).state
    assert isinstance(state, OptimizerState)
    return state


@pytest.fixture(scope="session")
def universal(zero: Callable[[int, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What ds_to_universal.py makes of a case."""
    made: dict[str, Path] = {}

    def make(case: str) -> Path:
        if case not in made:
            made[case] = tmp_path_factory.mktemp("universal") / case
            command = [sys.executable, "-W", "ignore", "-m", "deepspeed.checkpoint.ds_to_universal"]
            command += ["--input_folder", str(zero(2, case) / "global_step3"), "--output_folder", str(made[case])]
            command += ["--inject_missing_state", "--num_extract_workers", "1", "--num_merge_workers", "1"]
            environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, capture_output=True, env=environment)
        return made[case]

    return make


@pytest.mark.parametrize("case", CASES)
def test_it_holds_what_the_ranks_held(
    zero: Callable[[int, str], Path], universal: Callable[[str], Path], assert_holds: Any, case: str
) -> None:
    converter, match = registry.detect(universal(case))
    assert (converter.NAME, match.reason) == ("deepspeed_universal", "a folder zero with an optimizer_state.pt")
    direct = masters(deepspeed_zero, zero(2, case) / "global_step3")
    with direct, masters(deepspeed_universal, universal(case)) as state:
        assert_holds(state, live_of(zero(2, case)))
        assert list(state) == list(direct)
        assert state.groups == direct.groups
        assert state.global_step == 3
        assert {name: parameter["step"] for name, parameter in state.items()} == {
            name: parameter["step"] for name, parameter in direct.items()
        }


def test_what_deepspeeds_script_makes_of_round_robin_order_is_refused(universal: Callable[[str], Path]) -> None:
    with pytest.raises(FileError) as error:
        masters(deepspeed_universal, universal("2-bf16-robin"))
    assert str(error.value) == (
        f"{universal('2-bf16-robin')}: the fp32 master of 'lora_B.bias', rounded to BF16, is not the model's weight at "
        "element 0: ds_to_universal.py mixes up parameters of runs with round_robin_gradients, or the files are not of "
        "one save; convert the ZeRO folder itself, which is read right"
    )


@pytest.mark.parametrize("case", [*CASES, "2-bf16-robin"])
def test_deepspeed_loads_what_is_written_with_another_number_of_ranks(
    zero: Callable[[int, str], Path], tmp_path: Path, run_ranks: Any, case: str
) -> None:
    base = zero(2, case) / "global_step3"
    with masters(deepspeed_zero, base) as state:
        deepspeed_universal.write(state, tmp_path / "written", base=base, force=False, options={})
    assert (tmp_path / "written" / "latest_universal").read_text() == "global_step3_universal"
    run_ranks("deepspeed_run", tmp_path, 3, f"load:{case.removesuffix('-next')}:written")
    loaded = torch.load(tmp_path / "written.loaded.pt")
    assert loaded["global_steps"] == 3
    for name, slots in live_of(zero(2, case)).items():
        for slot, expected in slots.items():
            assert torch.equal(loaded["saved"][name][slot], expected), (name, slot)


def test_writing_and_reading_gives_the_same_state(
    zero: Callable[[int, str], Path], universal: Callable[[str], Path], tmp_path: Path, assert_holds: Any
) -> None:
    with masters(deepspeed_universal, universal("1-bf16")) as state:
        deepspeed_universal.write(state, tmp_path / "again", base=universal("1-bf16"), force=False, options={})
        with pytest.raises(TargetExistsError):
            deepspeed_universal.write(state, tmp_path / "again", base=universal("1-bf16"), force=False, options={})
        with masters(deepspeed_universal, tmp_path / "again") as again:
            assert_holds(again, live_of(zero(2, "1-bf16")))
            assert again.groups == state.groups


def test_what_cannot_be_written_is_refused(zero: Callable[[int, str], Path], tmp_path: Path) -> None:
    base = zero(2, "1-bf16") / "global_step3"
    with masters(deepspeed_zero, base) as state:
        with pytest.raises(OptionError) as needs_base:
            deepspeed_universal.write(state, tmp_path / "x", base=None, force=False, options={})
        assert str(needs_base.value) == (
            "deepspeed_universal takes the model's files from a DeepSpeed checkpoint of the same run; pass it as base="
        )
        other = zero(2, "1-bf16-accum-flat") / "global_step3"
        with pytest.raises(UnrepresentableError) as differs:
            deepspeed_universal.write(state, tmp_path / "x", base=other, force=False, options={})
        assert str(differs.value) == (
            f"{other} is not of the same run: its groups have [5] parameters, those of the state [2, 3], or names or "
            "shapes differ"
        )
    plain = registry.read(base, "deepspeed_zero").state
    assert isinstance(plain, OptimizerState)
    with plain, pytest.raises(UnrepresentableError) as bare:
        deepspeed_universal.write(plain, tmp_path / "x", base=base, force=False, options={})
    assert str(bare.value) == (
        "5 parameters have no fp32 master weight (the first is 'lora_A.weight'): read the checkpoint with the option "
        "masters, which keeps them as a slot 'master_param'"
    )
    assert list(tmp_path.iterdir()) == []


def test_damaged_folders_are_refused_by_name(universal: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(universal("1-bf16"), tmp_path / "copy"))
    slot = folder / "zero" / "norm.weight" / "exp_avg.pt"
    slot.write_bytes(slot.read_bytes()[:-50])
    with pytest.raises(FileError) as cut:
        registry.read(folder, "deepspeed_universal")
    assert str(cut.value) == f"{slot}: the zip archive has no directory at its end: the file is cut short"
    shutil.rmtree(slot.parent)
    with pytest.raises(FileError) as missing:
        registry.read(folder, "deepspeed_universal")
    assert str(missing.value) == f"{slot.parent}: missing: the model's file names a parameter of this name"


def test_files_of_two_steps_are_refused(universal: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(universal("1-bf16"), tmp_path / "copy"))
    step = folder / "zero" / "norm.bias" / "step.pt"
    held = torch.load(step)
    torch.save(held + 3, step)
    with pytest.raises(FileError) as mixed:
        registry.read(folder, "deepspeed_universal")
    assert str(mixed.value) == f"{step}: is 6.0, where 'norm.weight' has 3.0: files of different steps"


@pytest.mark.parametrize("name", ["norm.weight", "norm.bias"])
def test_a_missing_slot_is_named(universal: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(universal("1-bf16"), tmp_path / "copy"))
    slot = folder / "zero" / name / "exp_avg_sq.pt"
    slot.unlink()
    with pytest.raises(FileError) as missing:
        registry.read(folder, "deepspeed_universal")
    other = "norm.bias" if name == "norm.weight" else "norm.weight"
    assert str(missing.value) == f"{slot}: missing: '{other}' has this slot"
