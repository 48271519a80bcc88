"""Runs of several processes, and comparing what they held with what was read."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lora_state_format.model.states import OptimizerState, Scalar
from lora_state_format.model.tensors import Tensor

RunRanks = Callable[[str, Path, int, str], None]


@pytest.fixture(scope="session")
def run_ranks(run_ranks: Callable[[Path, Path, int, str], None]) -> RunRanks:
    """Run a script of ``runs``, by its name: (script, folder for what it makes, ranks, cases)."""
    return lambda script, *rest: run_ranks(Path(__file__).parent / "runs" / f"{script}.py", *rest)


@pytest.fixture(scope="session")
def assert_holds() -> Callable[[OptimizerState, Mapping[str, Mapping[str, Any]]], None]:
    """Assert that a state holds exactly the given slots, by parameter name and slot, bit for bit."""

    def check(state: OptimizerState, live: Mapping[str, Mapping[str, Any]]) -> None:
        import torch

        assert set(state) == set(live)
        for name, slots in live.items():
            for slot, expected in slots.items():
                value = state[name][slot]
                if isinstance(value, Scalar):
                    assert value.item() == expected.item()
                elif isinstance(value, Tensor):
                    assert value.shape == tuple(expected.shape)
                    assert torch.equal(value.torch(), expected), (name, slot)
                else:
                    assert value == expected

    return check


@pytest.fixture(scope="session")
def zero(tmp_path_factory: pytest.TempPathFactory, run_ranks: RunRanks) -> Callable[[int, str], Path]:
    """The folder of a DeepSpeed run's checkpoint, by ranks and case; what the run held lies beside it."""
    root = tmp_path_factory.mktemp("zero")
    two = "1-bf16,2-bf16,2-bf16-robin,2-fp32-frozen,3-bf16-next,3-bf16-sub,1-bf16-accum-flat,2-bf16-elastic"
    run_ranks("deepspeed_run", root / "2", 2, two)
    run_ranks("deepspeed_run", root / "3", 3, "1-bf16,2-bf16,2-bf16-robin,3-bf16-sub")
    return lambda ranks, case: root / str(ranks) / case


@pytest.fixture(scope="session")
def fsdp(tmp_path_factory: pytest.TempPathFactory, run_ranks: RunRanks) -> Callable[[str], Path]:
    """What an FSDP run saved, by case; what the run held lies beside it."""
    root = tmp_path_factory.mktemp("fsdp")
    table = runpy.run_path(str(Path(__file__).with_name("parallelism.py")))["TORCH"]
    cases = {2: ["positional", "flat", "local"], 3: ["three", "three-5"], 1: ["full"]}
    for case, (_, ranks, _, _) in table.items():
        cases.setdefault(ranks, []).append(case)
    for ranks, asked in cases.items():
        run_ranks("fsdp_run", root, ranks, ",".join(asked))
    return lambda case: root / case
