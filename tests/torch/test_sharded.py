"""Sharded models on gloo ranks: saved together, loaded by each rank with its own bytes, whatever the placement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

Said = dict[tuple[str, int], list[dict[str, Any]]]

CASES = {
    2: "save,background,recipe,storage,columns,replicas,fsdp1,shards,shards-columns,shards-messages,refused-save,"
    "missing-file,damaged,disagree",
    1: "load,shards,recipe",
    3: "load,shards,in-step",
    4: "load,hybrid,tensor-parallel,shards,shards-hybrid,shards-tensor-parallel,recipe",
}
"""Number of ranks -> what they do, one after the other; the first run saves what all load."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def said(folder: Path, ranks_said: Callable[[str, Path, Mapping[int, str]], Said]) -> Said:
    """What each rank of each case of ``sharded_run.py`` has to say, by case and number of ranks."""
    return ranks_said("sharded_run", folder, CASES)


def test_all_ranks_know_what_rank_0_has_written(said: Said, folder: Path) -> None:
    assert said["save", 2] == [{"written": ["state.safetensors"], "tensors": 10}] * 2
    assert [path.name for path in folder.glob(".*")] == []


@pytest.mark.parametrize(
    ("case", "world", "continues"),
    [
        ("load", 1, True),
        ("load", 3, False),  # the mean over three ranks rounds: the state is the same, further steps are not
        ("load", 4, True),
        ("columns", 2, True),
        ("hybrid", 4, True),
        ("tensor-parallel", 4, False),  # sums of parts round, too
    ],
)
def test_a_state_saved_by_two_ranks_is_loaded_by_any(said: Said, case: str, world: int, continues: bool) -> None:
    for rank in said[case, world]:
        assert rank["equal"]
        assert rank["again"]
        assert rank["strided"] == (case == "tensor-parallel")  # rows that FSDP cuts within those of tensor parallel
        assert rank["read"] <= 1.05 * rank["share"]
        assert rank["report"] == "restored 5/5 parameters, 2 slots each, step 3; weights match 5/5"
        assert rank["continued"] or not continues
    ranks = said[case, world]
    assert sum(rank["read verified"] for rank in ranks) <= 2 * sum(rank["share"] for rank in ranks)


def test_sets_of_shards_are_those_of_one_process_whatever_the_placement(said: Said) -> None:
    sets = {key: ranks for key, ranks in said.items() if key[0].startswith("shards")}
    assert len(sets) == 8
    (expected,) = {rank["digest"] for rank in said["shards", 1]}
    for ranks in sets.values():
        assert {rank["digest"] for rank in ranks} == {expected}
    assert {rank["files"] for ranks in sets.values() for rank in ranks} == {5}
    assert all(rank["verified"] for ranks in sets.values() for rank in ranks)


def test_ranks_of_one_machine_read_each_others_memory_and_others_send_messages(said: Said) -> None:
    sets = {key: ranks for key, ranks in said.items() if key[0].startswith("shards")}
    for (case, _), ranks in sets.items():
        assert all((rank["messages"] > 0) == (case == "shards-messages") for rank in ranks)


def test_ranks_tell_each_other_what_they_have_and_fail_together(said: Said) -> None:
    told = {"long": [0, 3_000, 6_000], "short": [0, 1, 2], "then": [0, 1, 2]}
    other = "RankError: rank 1 failed: ValueError: of its own"
    assert said["in-step", 3] == [{**told, "error": error} for error in (other, "ValueError: of its own", other)]


def test_a_damaged_tensor_stops_all_ranks_and_nothing_changes(said: Said) -> None:
    message = (
        "DigestError: 'up.weight': slot 'exp_avg_sq' does not match its digest: the file was changed after it was "
        "written"
    )
    errors = [rank["error"] for rank in said["damaged", 2]]
    assert message in errors
    assert all(error in (message, f"RankError: rank {errors.index(message)} failed: {message}") for error in errors)
    assert [rank["states"] for rank in said["damaged", 2]] == [0, 0]


def test_replicas_have_one_writer_and_load_on_every_rank(said: Said) -> None:
    for rank in said["replicas", 2]:
        assert rank["equal"]
        assert rank["report"] == "restored 5/5 parameters, 2 slots each, step 3; weights match 5/5"
        assert rank["same bytes"]


def test_fsdp1_loads_what_fsdp2_saved_and_saves_the_same(said: Said) -> None:
    for rank in said["fsdp1", 2]:
        assert rank["report"] == "restored 5/5 parameters, 2 slots each, step 3; weights match 5/5"
        assert rank["read"] <= 1.05 * rank["share"]
        assert rank["written"] == ["fsdp1.safetensors"]
        assert rank["equal"]
        assert rank["shards"] == 5
        assert rank["equal shards"]
        assert rank["continued"]


def test_fsdp1_before_the_first_step_is_saved_as_it_is(said: Said) -> None:
    for rank in said["fsdp1", 2]:
        assert rank["fresh"] == [None] * 5
        assert rank["left alone"]


def test_what_fsdp1_does_not_allow_is_refused(said: Said) -> None:
    nameless = (
        "CaptureError: FullyShardedDataParallel with use_orig_params=False makes one flat parameter of many, and their "
        "optimizer's state has no names; wrap the model with use_orig_params=True"
    )
    for rank in said["fsdp1", 2]:
        assert (rank["flat save"], rank["flat load"]) == (nameless, nameless)
        assert rank["capture"] == (
            "CaptureError: FSDP has cut the parameters up: call save_optimizer on every rank, which brings them "
            "together"
        )
        assert rank["refused"] == (
            "BindError: 'up.weight': slot 'col_var' cannot follow a sharded parameter: its role is col, not param"
        )


def test_behind_the_run_the_state_is_saved_as_it_was(said: Said, folder: Path) -> None:
    ranks = said["background", 2]
    assert [rank["same"] for rank in ranks] == [True, True]
    assert ranks[0]["digest"] == ranks[1]["digest"]
    error = f"FileExistsError: [Errno 17] File exists: '{folder}/folder'"
    assert [rank["later"] for rank in ranks] == [error, f"RankError: rank 0 failed: {error}"]
    assert [rank["after"] for rank in ranks] == [True, True]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_torch_reads_it_without_us(said: Said, world: int) -> None:
    assert said["recipe", world] == [{"same": True, "tensors": 15, "lr": 0.01}] * world


def test_dcp_writes_it(said: Said) -> None:
    for rank in said["storage", 2]:
        assert rank == {
            "same": True, "files": 5, "report": "restored 5/5 parameters, 2 slots each, step 3", "async": True,
        }  # fmt: skip


def test_a_rank_that_cannot_write_stops_all(said: Said, folder: Path) -> None:
    first, second = said["refused-save", 2]
    assert first["error"] == f"FileExistsError: [Errno 17] File exists: '{folder}/folder'"
    assert second["error"] == f"RankError: rank 0 failed: {first['error']}"
    remote = (
        "OptionError: memory://bucket/optimizer.safetensors: the ranks of a sharded model write into a folder that all "
        "of them see; save there, then convert(that path, 'memory://bucket/optimizer.safetensors')"
    )
    assert [first["remote"], second["remote"]] == [remote, remote]


def test_a_rank_that_cannot_read_stops_all_and_nothing_changes(said: Said, folder: Path) -> None:
    first, second = said["missing-file", 2]
    assert second["error"] == f"FileNotFoundError: {folder}/elsewhere.safetensors: no such file or folder"
    assert first["error"] == f"RankError: rank 1 failed: {second['error']}"
    assert (first["states"], second["states"]) == (0, 0)


def test_ranks_that_do_not_hold_the_same_are_refused(said: Said) -> None:
    for rank, result in enumerate(said["disagree", 2]):
        assert result["error"] == (
            f"CaptureError: the ranks do not hold the same state: rank {rank} and rank {1 - rank} differ in "
            "parameters, tensors; their models, optimizers or options differ, or some took no step"
        )
        assert result["left"] == []
