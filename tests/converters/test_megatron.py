"""Checkpoints that Megatron-Core wrote, against what its ranks held: tensor, pipeline, expert and data parallel."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_state_format.errors import RefusedError
from lora_state_format.operations.conversion import convert, read

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

CASES = {
    2: [
        "fp32-tp2", "fp32-pp2", "full-tp2-gated", "full-pp2-tied", "full-ep2-gated", "full-dp2", "bucket-dp2",
        "bucket-tp2-gated", "bucket-pp2-tied", "bucket-ep2-gated", "bucket-tp2-slow", "bucket-pp2-slow-rms",
    ],
    4: ["full-tp2-pp2", "bucket-tp2-dp2-gated", "bucket-tp2-pp2-slow"],
}  # fmt: skip


@pytest.fixture(scope="session")
def megatron(tmp_path_factory: pytest.TempPathFactory, run_ranks: Any) -> Callable[[int, str], Path]:
    """The folder of a run, by ranks and case."""
    root = tmp_path_factory.mktemp("megatron")
    for ranks, cases in CASES.items():
        run_ranks("megatron_run", root / str(ranks), ranks, ",".join(cases))
    return lambda ranks, case: root / str(ranks) / case


@pytest.mark.parametrize(("ranks", "case"), [(ranks, case) for ranks in CASES for case in CASES[ranks]])
def test_the_state_is_what_the_ranks_held(megatron: Callable[[int, str], Path], ranks: int, case: str) -> None:
    folder = megatron(ranks, case)
    compared = 0
    with read(folder, options={"masters": True}) as state:
        seen = set()
        for rank in range(ranks):
            where = json.loads(folder.with_name(f"{case}.{rank}.json").read_text())
            for key, held in load_file(folder.with_name(f"{case}.{rank}.safetensors")).items():
                local, slot, start = key.rsplit("/", 2)
                name = whole_name(local, where)
                seen.add(name)
                value = state[name]["master_param" if slot == "param" else slot].torch()
                share = shard(value, where["parameters"][local]["axis"], where, gated="gated" in case, name=name)
                assert list(share.shape) == where["parameters"][local]["shape"]
                assert torch.equal(share.flatten()[int(start) :][: held.numel()], held), (name, slot)
                compared += 1
        assert set(state) == seen
        assert {
            parameter["step"].item() if hasattr(parameter["step"], "item") else parameter["step"]
            for parameter in state.values()
        } == {3.0}
        for group, members in zip(state.groups, state.members(), strict=True):
            options = dict(group.options)
            decayed = {not (p.name.endswith(".bias") or len(p.shape) == 1) for p in members}
            assert decayed == {options["wd_mult"] == 1.0}
            assert {".experts." in p.name for p in members} == {options["is_expert_parallel"]}
        assert state.origin.get("masters_compared") == (0 if case.startswith("fp32") else len(state))
        assert bool(state.origin.get("told_apart_by_order")) == ("slow" in case)
    assert compared > 50


def whole_name(local: str, where: dict[str, Any]) -> str:
    """A rank's name for a parameter as the whole model has it."""
    name = re.sub(r"(?<=layers\.)\d+", lambda m: str(int(m[0]) + where["first_layer"]), local)
    name = re.sub(r"(?<=local_experts\.)\d+", lambda m: str(int(m[0]) + 2 * where["ep"]), name)
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    name = name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    tied = name == "output_layer.weight" and where["tied"]
    return "embedding.word_embeddings.weight" if tied else name


def shard(value: torch.Tensor, axis: int | None, where: dict[str, Any], *, gated: bool, name: str) -> torch.Tensor:
    """A tensor-parallel rank's part; of a gated unit the same part of both halves."""
    size = where["sizes"]["tp"]
    if axis is None or size == 1:
        return value
    halves = value.chunk(2) if gated and "linear_fc1." in name else (value,)
    return torch.cat([half.chunk(size, axis)[where["tp"]] for half in halves])
