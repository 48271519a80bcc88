"""State under DeepSpeed's ZeRO, saved by name and loaded into live engines of other stages and numbers of ranks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

Said = dict[tuple[str, int], list[dict[str, Any]]]

pytestmark = pytest.mark.frameworks

CASES = {2: "plain,1,2,3,2-offload,3-offload,2-bf16,1-bf16,3-bf16", 3: "1,3,3-bf16"}
"""Number of ranks -> what they run; the first one's state, of a run without DeepSpeed, is what all resume from."""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, ranks_said: Callable[[str, Path, Mapping[int, str]], Said]) -> Said:
    return ranks_said("zero_run", tmp_path_factory.mktemp("zero"), CASES)


RUN = [(case, world) for world in CASES for case in CASES[world].split(",")]


@pytest.mark.parametrize(("case", "world"), [key for key in RUN if "bf16" not in key[0]])
def test_a_state_goes_into_a_live_engine_and_out_again(said: Any, case: str, world: int) -> None:
    for rank in said[case, world]:
        assert rank["report"] == "restored 5/5 parameters, 2 slots each, step 3; weights match 5/5"
        assert rank["same"]  # the file that is saved again, byte for byte
        assert rank["off"] <= (0 if world == 2 else 1e-7)  # the mean over three ranks rounds
        assert (rank["files"], rank["verified"]) == (4, True)
        if case != "plain":
            assert rank["late"] == "RuntimeError: 5 parameters have state"  # when everything was in its place
            assert rank["back"]


@pytest.mark.parametrize(("case", "world"), [key for key in RUN if "bf16" in key[0]])
def test_float32_masters_go_on_bit_for_bit(said: Any, case: str, world: int) -> None:
    lacking = (
        "the file has no float32 masters of 5 parameters (the first is 'lora_A.weight'): DeepSpeed's are its weights, "
        "rounded, so the run does not go on bit for bit"
    )
    left = (
        "the float32 masters of 5 parameters are left out (the first is 'lora_A.weight'): this optimizer steps the "
        "weights themselves; `lora-state export FILE masters.safetensors --slot master_param` writes them as plain "
        "weights"
    )
    for rank in said[case, world]:
        assert rank["saved"] == ["exp_avg", "exp_avg_sq", "master_param", "step"]
        assert rank["report"] == "restored 5/5 parameters, 3 slots each, step 3; weights match 5/5"
        assert rank["notes"] == []
        assert rank["masters"]  # they are not what the engine made of the weights
        assert rank["same"]
        assert rank["late"] == "RuntimeError: 5 parameters have state"
        assert rank["back"]
        assert rank["lacking"] == [lacking]
        assert rank["left"] == [left]
        assert rank["slots"] == ["exp_avg", "exp_avg_sq", "step"]
        if world == 2:
            assert rank["equal"]
            assert rank["equal masters"]
        assert rank["off"] <= (0 if world == 2 else 1e-2)  # a mean over three ranks is rounded to bfloat16
    strange = [rank["strange"] for rank in said[case, world]]
    assert any(REFUSED.fullmatch(text) for text in strange)
    assert all(text.startswith(("BindError: '", "RankError: rank ")) for text in strange)


REFUSED = re.compile(
    r"BindError: '[a-zA-Z_.]+': the float32 master in the file, rounded to BF16, differs from the live weights in \d+ "
    r"of \d+ elements, which the next step would overwrite: load the weights of the same save into the model first"
)
