"""Rank files of FSDP2 that every rank saved by itself, against the state that the run gathered."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_state_format import registry
from lora_state_format.errors import FileError, RefusedError
from lora_state_format.model.states import OptimizerState
from lora_state_format.operations.conversion import convert, read
from lora_state_format.operations.look import look

pytestmark = pytest.mark.filterwarnings("ignore")


TABLE = runpy.run_path(str(Path(__file__).with_name("parallelism.py")))["TORCH"]


@pytest.mark.parametrize("case", [case for case, (converter, *_) in TABLE.items() if converter == "fsdp2_ranks"])
def test_it_holds_what_the_ranks_held(
    fsdp: Callable[[str], Path], assert_holds: Any, case: str, tmp_path: Path
) -> None:
    folder = fsdp(case)
    assert registry.detect(folder)[0].NAME == "fsdp2_ranks"
    live = torch.load(folder.with_name(f"{case}.live.pt"))["state"]
    convert(folder, tmp_path / "optimizer.safetensors")
    with read(tmp_path / "optimizer.safetensors") as state:
        assert_holds(state, {**live, "idle": {}})
        assert state["idle"].state is None
        assert dict(state.groups[0].options)["lr"] == 1e-3
        assert state.naming.source == "checkpoint"


@pytest.mark.parametrize("case", ["ranks", "cells"])
def test_a_first_look_reads_the_files_of_the_first_rank(
    fsdp: Callable[[str], Path], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_state_format.converters.fsdp2_ranks.FEW", 1)
    folder = fsdp(case)
    seen = look(folder).state
    assert isinstance(seen, OptimizerState)
    ranks = len(list(folder.glob("optim_*")))
    assert seen.origin == {
        "format": "fsdp2_ranks", "ranks": ranks, "first_look": {"files_read": 2, "files": 2 * ranks}
    }  # fmt: skip
    with read(folder) as whole:
        assert [repr(parameter) for parameter in whole.parameters] == [repr(p) for p in seen.parameters]
        assert whole.groups == seen.groups
    with pytest.raises(FileError) as error:
        seen["norm.weight"]["exp_avg"].bytes()
    assert str(error.value) == (
        f"{folder}: was only looked at, and none of its tensors can be read: open it with read()"
    )


def test_files_that_are_not_all_there(fsdp: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fsdp("ranks"), tmp_path / "ranks"))
    alone = folder / "optim_world_size_2_rank_1.pt"
    with pytest.raises(RefusedError) as one:
        read(alone)
    assert str(one.value) == (
        f"{alone}: the file of one of FSDP's ranks: give the folder, ranks, which has those of all ranks"
    )
    alone.unlink()
    with pytest.raises(FileError) as missing:
        read(folder)
    assert str(missing.value) == f"{alone}: missing: there were 2 ranks"
    shutil.copy(folder / "optim_world_size_2_rank_0.pt", alone)
    with pytest.raises(FileError) as copied:
        read(folder)
    assert str(copied.value) == (
        f"{folder}: exp_avg of parameter 1: the ranks' files do not make up [13, 7] (pieces with 49 elements for a "
        "tensor of shape [13, 7]): one is a copy of another, or of another save"
    )
