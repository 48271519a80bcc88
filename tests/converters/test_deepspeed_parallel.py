"""DeepSpeed with pipeline stages, tensor-parallel ranks and experts, with and without ZeRO, against what ranks held."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_state_format import registry
from lora_state_format.errors import FileError, RefusedError
from lora_state_format.foreign import pickles
from lora_state_format.foreign.torch_save import save
from lora_state_format.io.files import Files
from lora_state_format.model.sources import Memory
from lora_state_format.model.tensors import contiguous
from lora_state_format.operations.conversion import convert
from lora_state_format.operations.conversion import read as read_any

pytestmark = pytest.mark.filterwarnings("ignore")

GOLDEN = Path(__file__).parents[1] / "golden" / "deepspeed" / "files"
CASES = sorted(path.name.removesuffix(".tar.xz") for path in GOLDEN.iterdir())


GROUPS = {"experts": [5, 16], "staged": [10, 32], "uneven": [9, 16], "routed": [10, 16], "wide": [10, 16]}
"""Kind of case with experts -> how many parameters each group has; others have one group."""


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The tag folder of a run in ``tests/golden``, by ranks and case; what the ranks held lies above it."""
    with tarfile.open(GOLDEN / f"{request.param}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return next(tmp_path.glob("*/global_step3"))


@pytest.mark.parametrize("folder", CASES, indirect=True)
def test_the_state_is_what_the_ranks_held(folder: Path, tmp_path: Path) -> None:
    check(folder, tmp_path / "optimizer.safetensors")


@pytest.mark.frameworks
def test_todays_deepspeed_writes_such_folders(tmp_path: Path, run_ranks: Any) -> None:
    run_ranks("deepspeed_parallel_run", tmp_path, 2, "experts2")
    check(tmp_path / "experts2" / "global_step3", tmp_path / "optimizer.safetensors")


def shifted(by: int, match: re.Match[str]) -> str:
    return str(int(match[0]) + by)


def check(folder: Path, target: Path) -> None:
    case = folder.parent.name
    ranks = sorted(folder.parent.parent.glob(f"{case}.*.pt"))
    zero = not case.endswith("0")
    converter, _ = registry.detect(folder.parent)
    assert ("deepspeed_zero" if zero else "deepspeed_plain") == converter.NAME
    slices = {"slices": "megatron"} if case.startswith("grid") else {}
    convert(folder, target, options=slices | ({"masters": True} if zero else {}))
    seen = set()
    with read_any(target) as state:
        for path in ranks:
            rank = int(path.suffixes[-2][1:])
            for local, slots in torch.load(path).items():
                name = re.sub(
                    r"(?<=deepspeed_experts\.)\d",
                    partial(shifted, rank if case.startswith("wide") else 2 * (rank % 2)),
                    local,
                )
                seen.add(name)
                for slot, expected in slots.items():
                    value = state[name][slot].torch()
                    if value.shape != expected.shape:  # these have their columns cut, others their rows
                        assert case.startswith(("tensor", "routed", "wide", "grid"))
                        value = value.chunk(2, 1 if re.search(r"((down|o)_proj|dense)\.", name) else 0)[rank % 2]
                    assert torch.equal(value, expected), (name, slot)
        assert set(state) == seen
        assert {parameter["step"].item() for parameter in state.values()} == {3.0}
        assert state.global_step == 3
        sizes = [group.count for group in state.groups]
        assert sizes == GROUPS.get(case[:-1], [len(seen)])
        assert dict(state.groups[0].options)["lr"] == 1e-2
        stage3 = case.endswith("3")  # its model files hold no weights
        assert all((parameter.weights is None) == stage3 for parameter in state.values())
        assert state.origin.get("masters_compared") == ((0 if stage3 else len(seen)) if zero else None)


@pytest.mark.parametrize("folder", ["4-hpz3"], indirect=True)
def test_weights_next_to_stage_3_prove_its_masters(folder: Path, tmp_path: Path) -> None:
    """``stage3_gather_16bit_weights_on_model_save`` and Trainer leave the weights there: the masters, rounded."""
    options = {"masters": True}
    report = convert(folder, tmp_path / "alone.safetensors")
    unseen = (
        "no fp32 master was compared with a weight, for the files do not hold both: ranks' files that were exchanged, "
        "or are of another save of the same step, would go unnoticed"
    )
    assert (report.paired, report.notes, report.warnings) == (0, (unseen,), ())
    with read_any(folder, options=options) as state:
        masters = {name: parameter["master_param"].torch() for name, parameter in state.items()}
    weights = folder.parent / "model.safetensors"
    save_file({name: master.bfloat16() for name, master in masters.items()}, weights)
    report = convert(folder, tmp_path / "proven.safetensors")
    assert (report.paired, report.notes, report.warnings) == (len(masters), (), ())
    with read_any(folder) as state:
        assert state.origin["masters_compared"] == len(masters)

    files = [folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (1, 2)]
    files[0].rename(folder / "kept")
    files[1].rename(files[0])
    (folder / "kept").rename(files[1])
    report = convert(folder, tmp_path / "exchanged.safetensors")
    warning = (
        f"{folder.parent}: the weights in it are not what the fp32 masters in global_step3 round to: either they are "
        "of another step, or files of ranks were exchanged; they were not used"
    )
    assert (report.paired, report.notes, report.warnings) == (0, (unseen,), (warning,))
    weights.write_bytes(b"nothing")
    report = convert(folder, tmp_path / "damaged.safetensors")
    assert [warning.endswith("; it was skipped") for warning in report.warnings] == [True]


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["2-experts0"], indirect=True)
def test_one_ranks_file_is_never_the_whole(folder: Path, tmp_path: Path) -> None:
    for name in ("expp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"):
        with pytest.raises(RefusedError) as error:
            read_any(folder / name)
        assert str(error.value) == (
            f"{folder / name}: one rank's file of a DeepSpeed checkpoint: give the folder, global_step3, which has "
            "those of all ranks"
        )
    renamed = shutil.copy(folder / "expp_rank_1_mp_rank_00_optim_states.pt", tmp_path / "optimizer.pt")
    with pytest.raises(RefusedError) as error:
        read_any(renamed)
    assert str(error.value) == (
        f"{renamed}: group 1 holds the experts of one of DeepSpeed's ranks, and others may have more of them: give the "
        "checkpoint's folder, with the files of all ranks under the names that DeepSpeed gave them"
    )
    (folder / "expp_rank_0_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(FileError) as missing:
        read_any(folder)
    assert str(missing.value) == (
        f"{folder / 'expp_rank_0_mp_rank_00_optim_states.pt'}: missing: there are files of expert-parallel ranks [1]"
    )


@pytest.mark.parametrize("folder", ["2-experts0"], indirect=True)
def test_the_last_expert_rank_is_missing(folder: Path) -> None:
    (folder / "layer_0_expert_3_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(FileError) as expert:
        read_any(folder)
    assert str(expert.value) == f"{folder}: there are files of 3 experts, where 4 were trained: a file is missing"


@pytest.mark.parametrize("folder", ["4-experts0"], indirect=True)
def test_the_last_file_of_an_expert_rank_is_missing(folder: Path) -> None:
    (folder / "expp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(FileError) as rank:
        read_any(folder)
    assert str(rank.value) == (
        f"{folder}: there are files of 1 expert-parallel ranks, where group 'ep_size_2' had another number: a file is "
        "missing"
    )


@pytest.mark.parametrize("folder", ["4-staged0", "4-uneven0"], indirect=True)
def test_a_stages_files_of_expert_ranks_are_missing(folder: Path) -> None:
    (folder / "expp_rank_0_mp_rank_01_optim_states.pt").unlink()
    with pytest.raises(FileError) as first:
        read_any(folder)
    assert str(first.value) == (
        f"{folder / 'expp_rank_0_mp_rank_01_optim_states.pt'}: missing: there are files of expert-parallel ranks [1]"
    )
    for path in folder.glob("expp_*_mp_rank_01_*"):
        path.unlink()
    with pytest.raises(FileError) as both:
        read_any(folder)
    assert str(both.value) == (
        f"{folder / 'expp_rank_0_mp_rank_01_optim_states.pt'}: missing: the experts of all ranks lie in files of such "
        "names"
    )


@pytest.mark.parametrize("folder", ["4-uneven0"], indirect=True)
def test_stages_with_experts_of_different_saves(folder: Path) -> None:
    step = contiguous("F32", (), Memory(bytes(4)))
    for path in folder.glob("expp_*"):
        tree = loaded(path)
        for group in tree["optimizer"]["param_groups"]:
            group["lr"] = 0.5
        save(tree, path, force=True)
    with pytest.raises(FileError) as options:
        read_any(folder)
    assert str(options.value) == (
        f"{folder}: model-parallel rank 0 has other options than rank 1: files of different saves"
    )
    for path in folder.glob("expp_*"):
        tree = loaded(path)
        for group in tree["optimizer"]["param_groups"]:
            group["lr"] = 1e-2
        for slots in tree["optimizer"]["state"].values():
            slots["step"] = step
        save(tree, path, force=True)
    with pytest.raises(FileError) as steps:
        read_any(folder)
    assert str(steps.value) == f"{folder}: model-parallel rank 1 has other steps than rank 0: files of different saves"


def loaded(path: Path) -> Any:
    """What a file holds, in memory."""
    return pickles.load(Memory(path.read_bytes()), path).value


@pytest.mark.parametrize("folder", ["2-experts0"], indirect=True)
def test_experts_of_a_rank_that_was_not_there(folder: Path) -> None:
    stray = folder / "expp_rank_0_mp_rank_07_optim_states.pt"
    shutil.copy(folder / "expp_rank_0_mp_rank_00_optim_states.pt", stray)
    with pytest.raises(FileError) as error:
        read_any(folder)
    assert str(error.value) == f"{stray}: is of a rank beyond the 1 that wrote the folder"


@pytest.mark.parametrize("folder", ["4-routed0"], indirect=True)
def test_fewer_expert_ranks_than_tensor_ranks(folder: Path) -> None:
    (folder / "expp_rank_1_mp_rank_01_optim_states.pt").unlink()
    with pytest.raises(RefusedError) as error:
        read_any(folder)
    assert str(error.value) == (
        f"{folder}: there are files of 1 expert-parallel ranks, where 2 tensor-parallel ranks have slices: a file is "
        "missing, or ep_size was less than 2, and DeepSpeed wrote no slices of the other ranks"
    )


@pytest.mark.parametrize("folder", ["4-pipeline1"], indirect=True)
def test_a_stage_that_is_missing(folder: Path) -> None:
    for file in folder.glob("*mp_rank_01*"):
        file.unlink()
    with pytest.raises(FileError) as error:
        read_any(folder)
    assert str(error.value) == (
        f"{folder / 'mp_rank_01_model_states.pt'}: missing: there were 2 pipeline stages of 1 tensor-parallel ranks"
    )
    rank = folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    with pytest.raises(RefusedError) as alone:
        read_any(rank)
    assert str(alone.value) == (
        f"{rank}: one rank's share of a ZeRO checkpoint: give the folder, global_step3, which has all ranks' files"
    )


@pytest.mark.parametrize("folder", ["4-tensor1"], indirect=True)
def test_slices_that_nothing_describes(folder: Path, tmp_path: Path) -> None:
    patterns: dict[str, Any] = {}
    for path in folder.glob("mp_rank_*_model_states.pt"):
        model = torch.load(path, weights_only=False)
        patterns = {k: v for k, v in model.pop("universal_checkpoint_info").items() if k.endswith("_patterns")}
        torch.save(model, path)
    with pytest.raises(RefusedError) as error:
        read_any(folder)
    assert str(error.value) == (
        f"{folder / 'mp_rank_00_model_states.pt'}: written by 2 tensor-parallel ranks, and nothing says which axis "
        "their slices were cut along; known are those of megatron; pass "
        "options={'slices': ...}: the name of a model family, or a JSON file with the patterns of "
        "universal_checkpoint_info"
    )
    (tmp_path / "patterns.json").write_text(json.dumps(patterns))
    with read_any(folder, options={"slices": str(tmp_path / "patterns.json")}) as state:
        assert state["model.layers.0.self_attn.o_proj.weight"].shape == (16, 16)
        assert state["model.layers.0.mlp.down_proj.weight"].shape == (16, 24)
        assert state["lm_head.weight"].shape == (32, 16)


@pytest.mark.parametrize("folder", ["4-tensor1"], indirect=True)
def test_a_pattern_that_would_take_for_ever(folder: Path) -> None:
    path = folder / "mp_rank_00_model_states.pt"
    model = torch.load(path, weights_only=False)
    model["universal_checkpoint_info"]["tp_replicated_parameter_patterns"] = ["(a+)+$"]
    torch.save(model, path)
    with pytest.raises(RefusedError) as error:
        read_any(folder)
    assert str(error.value) == f"{path}: a pattern of names that is not read: '(a+)+$'"


# --- rank files that lie ----------------------------------------------------------------------------------------


def swapped(folder: Path, a: str, b: str) -> None:
    (folder / a).rename(folder / "x")
    (folder / b).rename(folder / a)
    (folder / "x").rename(folder / b)


@pytest.mark.parametrize("folder", ["4-experts2"], indirect=True)
def test_ranks_exchanged_are_seen_by_their_masters(folder: Path) -> None:
    name = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    swapped(folder, name.format(0), name.format(1))
    with pytest.raises(FileError) as error:
        read_any(folder)
    assert " is not the model's weight at element " in str(error.value)


@pytest.mark.parametrize("folder", ["4-experts2", "4-hpz3"], indirect=True)
def test_a_rank_that_was_copied_over_another(folder: Path) -> None:
    """Of stage 3 no weights are there to be compared with: two ranks with the same masters tell."""
    read_any(folder).close()
    first, second = (folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1))
    shutil.copy(first, second)
    with pytest.raises(FileError) as error:
        read_any(folder)
    assert str(error.value) == f"{second}: holds the fp32 masters of {first.name}: one is a copy of the other"


@pytest.mark.parametrize("folder", ["4-pipeline1"], indirect=True)
def test_addresses_that_overlap_or_are_exchanged(folder: Path) -> None:
    path = folder / "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt"
    with Files() as files:
        tree = pickles.load(files[path], path).value
        addresses = {n: a.state for n, a in tree["optimizer_state_dict"]["param_slice_mappings"][0].items()}
        first, second, *_ = addresses
        addresses[second]["start"] = addresses[first]["start"]
        save(tree, path.with_suffix(".overlap"))
        addresses[second]["start"], addresses[first]["start"] = 0, addresses[second]["numel"]
        save(tree, path.with_suffix(".exchanged"))
    path.with_suffix(".overlap").replace(path)
    with pytest.raises(FileError) as overlap:
        read_any(folder)
    assert str(overlap.value) == f"{path}: places '2.weight' at 0, inside '2.bias' (0 to 8)"
    path.with_suffix(".exchanged").replace(path)
    with read_any(folder, options={"masters": True}) as state:  # the masters prove the order of param_shapes
        assert state.origin["layout"] == (
            "param_shapes, as the masters prove: param_slice_mappings are those of another order"
        )
        held = torch.load(folder.parent.with_name("pipeline1.2.pt"))
        for name in ("2.bias", "2.weight"):
            assert torch.equal(state[name]["exp_avg"].torch(), held[name]["exp_avg"])
