"""transformers' Trainer under FSDP2, launched by torchrun on gloo ranks: saved by name, resumed on another number.

FSDP1 is not run here: accelerate's own gathering of weights ends in a segmentation fault of torch on a CPU. What this
package does under FSDP1 is in ``tests/torch/test_sharded.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from lora_state_format import open_state, verify

SCRIPT = Path(__file__).parent / "runs" / "trainer_fsdp_run.py"


def launch(ranks: int, folder: Path, part: str) -> list[dict[str, float]]:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", str(ranks), str(SCRIPT), str(folder), part],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{part}.{rank}.json").read_text()) for rank in range(ranks)]


def test_a_run_goes_on_exactly_and_on_another_number_of_ranks(tmp_path: Path) -> None:
    exact = {"tensors": 16, "sharded": 34, "off": 0.0, "step": 6}
    assert launch(2, tmp_path, "first") == [exact] * 2
    path = tmp_path / "checkpoint-4" / "training_state" / "optimizer.safetensors"
    assert verify(path).ok
    with open_state(path) as state:
        assert len(state) == 8
        assert all(name.startswith("base_model.model.model.layers.") for name in state)
        assert state.global_step == 4
    assert launch(1, tmp_path, "again") == [exact]
