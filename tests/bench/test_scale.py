"""What grows with the number of parameters alone, and what does not grow at all; ``bench/scale.py`` measures it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Final
from xml.etree import ElementTree as ET

import pytest
import torch

from lora_state_format.binding.plan import plan
from lora_state_format.cli import run
from lora_state_format.format import reading, writing
from lora_state_format.model.states import OptimizerState, Slot
from lora_state_format.model.tensors import Tensor

SCRIPT: Final = Path(__file__).with_name("scale.py")


@pytest.fixture(scope="module")
def scale(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    return load_module(SCRIPT)


def allocated(folder: Path) -> int:
    return sum(512 * path.stat().st_blocks for path in folder.iterdir())


def moment(state: OptimizerState, name: str) -> Tensor:
    slot = (state[name].state or {})["exp_avg_sq"]
    assert isinstance(slot, Slot)
    return slot.tensor


def test_the_state_of_a_70b_model(scale: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """564 GB of moments, in files that hold nothing but their headers."""
    (tmp_path / "config.json").write_text(json.dumps(scale.LLAMA_70B), encoding="utf-8")
    state = scale.model_state(tmp_path)
    path = tmp_path / "optimizer.safetensors"
    written = scale.write_sparse(state, path, scale.SHARD)
    assert (len(written.files), written.tensors) == (scale.SHARDS + 1, 2 * 723)
    assert written.size > 8 * 70_000_000_000
    assert allocated(tmp_path) < 4_000_000
    assert max(Path(name).stat().st_size for name in written.files) <= scale.SHARD + 1_000_000

    with reading.open_state(path) as opened:
        found = plan(opened, scale.live_model(tmp_path))
        assert str(found) == "fits: 723/723 parameters would be restored"
        head = moment(opened, "lm_head.weight")
        assert head.shape == (128256, 8192)
        assert head.read([slice(128_000, 128_001), slice(None)]) == bytes(4 * 8192)
    assert run(["inspect", f"{path}.index.json"]) == 0
    assert "723" in capsys.readouterr().out


def test_holes_are_what_would_have_been_written(scale: ModuleType, tmp_path: Path) -> None:
    state = scale.many(300)
    whole, sparse = (tmp_path / kind / "optimizer.safetensors" for kind in ("whole", "sparse"))
    for path, write in ((whole, writing.write), (sparse, scale.write_sparse)):
        path.parent.mkdir()
        write(state, path, max_shard_size=20_000)
    assert [path.name for path in sorted(whole.parent.iterdir())] == [
        path.name for path in sorted(sparse.parent.iterdir())
    ]
    assert len([*whole.parent.iterdir()]) == 3
    for path in whole.parent.iterdir():
        assert path.read_bytes() == (sparse.parent / path.name).read_bytes()
    assert reading.verify(sparse).ok


def test_torch_reads_the_sparse_source(scale: ModuleType, tmp_path: Path) -> None:
    scale.source(tmp_path, 30)
    path = tmp_path / "optimizer.pt"
    assert path.stat().st_size > 29_000_000 > 50 * allocated(tmp_path)
    loaded = torch.load(path, weights_only=True)
    shape = loaded["state"][0]["exp_avg"].shape
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(shape)) for _ in range(scale.COUNT)])
    optimizer.load_state_dict(loaded)
    slots = [slot for entry in optimizer.state.values() for slot in entry.values() if slot.ndim]
    assert sum(slot.nbytes for slot in slots) > 29_000_000
    assert not any(slot.any() for slot in slots)


def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    """The script measures whole processes, and fails where the peaks of 64 and 512 MB lie more than 8 MiB apart."""
    sizes = ["--only", "sizes", "--gigabytes", "0.064", "0.512", "--large", "--rounds", "1", "--folder", str(tmp_path)]
    figure = tmp_path / "scale.svg"
    done = subprocess.run([sys.executable, SCRIPT, *sizes, "--svg", figure], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split(" | ")[0] for line in done.stdout.splitlines()[4:]] == ["| 0.06", "| 0.51"]
    charts = ET.parse(figure).getroot().findall("{*}g")
    assert [chart.findtext("{*}text") for chart in charts] == [
        "lora-state convert: seconds",
        "lora-state convert: MiB at its peak",
    ]
