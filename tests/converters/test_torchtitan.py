"""Folders of torchtitan's own checkpoint manager (``tests/golden/torchtitan``), against what the ranks held."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_state_format import registry
from lora_state_format.operations.conversion import convert, read

pytestmark = pytest.mark.filterwarnings("ignore")

GOLDEN = Path(__file__).parents[1] / "golden" / "torchtitan" / "files"
CASES = sorted(path.name.removesuffix(".tar.xz") for path in GOLDEN.iterdir())


@pytest.mark.parametrize("case", CASES)
def test_the_state_is_what_the_ranks_held(case: str, assert_holds: Any, tmp_path: Path) -> None:
    with tarfile.open(GOLDEN / f"{case}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / case
    assert registry.detect(folder)[0].NAME == "dcp"
    live = torch.load(tmp_path / f"{case}.live.pt")
    report = convert(folder, tmp_path / "optimizer.safetensors")
    with read(tmp_path / "optimizer.safetensors") as state:
        assert_holds(state, live["state"])
        assert {len(parameter) for parameter in state.values()} == {3}
        decay = {name: group["weight_decay"] for group in live["groups"] for name in group["names"]}
        for group, members in zip(state.groups, state.members(), strict=True):
            assert {decay[member.name] for member in members} == {dict(group.options)["weight_decay"]}
        fused = [name for name in state if name.endswith("wqkv.weight")]  # the model's state dict has them cut apart
        assert len(fused) == 2
        assert report.paired == len(state) - len(fused)
        assert report.groups == ((3, 6, 2, 6) if "pp" in case else (9, 14) if "ep" in case else (5, 12))
