"""Four ranks save one state together, and one of them dies or fails: the old state stays whole, or the new one is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

Point = tuple[int, str, int, str, bool]

KILLED: list[tuple[Point, int]] = [
    ((0, "open", 1, "kill", False), 1),  # before its temporary file is there
    ((2, "pwrite", 1, "kill", False), 1),  # before its first bytes are
    ((1, "fsync", 1, "kill", False), 1),  # before its file is on the disk
    ((3, "replace", 1, "kill", False), 1),  # its file, complete, has no name
    ((2, "replace", 2, "kill", False), 1),  # one of its two files has
    ((0, "replace", 3, "kill", False), 1),  # all files have theirs, the index has not
    ((0, "unlink", 1, "kill", False), 2),  # committed; old files are still there
    ((0, "fsync", 1, "kill", True), 1),
    ((3, "replace", 1, "kill", True), 1),
]
"""Where a rank is killed, and the step of the state that the path means afterwards."""

FAILED: list[Point] = [
    (3, "pwrite", 1, "fail", False),
    (0, "fsync", 1, "fail", False),
    (1, "replace", 1, "fail", False),
    (2, "pwrite", 2, "fail", True),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("together")
    points = [point for point, _ in KILLED] + FAILED
    script = Path(__file__).parent / "runs" / "together_run.py"
    command = [sys.executable, str(script), str(folder), json.dumps(points)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.parametrize("number", range(len(KILLED)))
def test_a_rank_that_is_killed_leaves_a_whole_state(results: list[dict[str, Any]], number: int) -> None:
    (rank, *_), step = KILLED[number]
    result = results[number]
    assert result["said"][rank] == "killed"
    for other, said in enumerate(result["said"]):
        assert other == rank or said.startswith(
            "RankError: another rank does not answer any more, its process may have"
        )
    assert (result["step"], result["whole"]) == (step, True)


@pytest.mark.parametrize("number", range(len(FAILED)))
def test_a_rank_that_fails_stops_all(results: list[dict[str, Any]], number: int) -> None:
    rank = FAILED[number][0]
    result = results[len(KILLED) + number]
    error = "OSError: [Errno 28] No space left on device"
    assert result["said"][rank].startswith(error)
    assert {said for other, said in enumerate(result["said"]) if other != rank} == {
        f"RankError: rank {rank} failed: {result['said'][rank]}"
    }
    assert (result["step"], result["whole"], result["left"]) == (1, True, 0)


def test_the_next_save_leaves_nothing_behind(results: list[dict[str, Any]]) -> None:
    found = [result["files"] for result in results if "files" in result]
    assert found == [["optimizer"] * 6 + ["optimizer.safetensors.index.json"]] * 5
