"""State under DeepSpeed's ZeRO, saved by name and loaded into live engines of other stages and numbers of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

Said = dict[tuple[str, int], list[dict[str, Any]]]

pytestmark = pytest.mark.frameworks

CASES = {2: "plain,1,2,3,2-offload,3-offload", 3: "1,3"}
"""Number of ranks -> what they run; the first one's state, of a run without DeepSpeed, is what all resume from."""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, ranks_said: Callable[[str, Path, Mapping[int, str]], Said]) -> Said:
    return ranks_said("zero_run", tmp_path_factory.mktemp("zero"), CASES)


@pytest.mark.parametrize(("case", "world"), [(case, world) for world in CASES for case in CASES[world].split(",")])
def test_a_state_goes_into_a_live_engine_and_out_again(said: Any, case: str, world: int) -> None:
    for rank in said[case, world]:
        assert rank["report"] == "restored 5/5 parameters, 2 slots each, step 3; weights match 5/5"
        assert rank["same"]  # the file that is saved again, byte for byte
        assert rank["off"] <= (0 if world == 2 else 1e-7)  # the mean over three ranks rounds
        assert (rank["files"], rank["verified"]) == (4, True)
