"""Trainer and accelerate under DeepSpeed's ZeRO, launched by torchrun: saved by name, resumed to the same weights.

Not run here, as they refuse a CPU: Lightning's strategies for DeepSpeed and FSDP; accelerate's FSDP1, of which torch's
own gathering ends in a segmentation fault on a CPU. FSDP1 itself is in ``tests/torch/test_sharded.py``.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.frameworks

CASES = ("accelerate-zero1", "accelerate-zero3", "trainer-zero2")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("trainers")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parent / "runs" / "sharded_trainers_run.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [*command, str(script), str(folder), ",".join(CASES)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {case: [json.loads((folder / f"{case}.2.{rank}.json").read_text()) for rank in range(2)] for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_resumed_arrives_at_the_same_weights(said: dict[str, list[dict[str, Any]]], case: str) -> None:
    for rank in said[case]:
        assert rank["same"]
        assert rank["step"] == 2.0
        count, first = (4, "0.weight") if case.startswith("accelerate") else (8, "base_model.model.model.layers.0")
        assert len(rank["names"]) == count
        assert rank["names"][0].startswith(first)
