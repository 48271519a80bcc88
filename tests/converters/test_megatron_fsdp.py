"""Megatron-FSDP's ``fsdp_dtensor`` folders (``tests/golden/megatron_fsdp``), against what the ranks held."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from lora_state_format import registry
from lora_state_format.errors import FileError
from lora_state_format.foreign import fsdp_dtensor
from lora_state_format.model.sources import Memory
from lora_state_format.model.tensors import contiguous
from lora_state_format.operations.conversion import convert, read

pytestmark = pytest.mark.filterwarnings("ignore")

GOLDEN: Final = Path(__file__).parents[1] / "golden" / "megatron_fsdp" / "files"
CASES: Final = sorted(path.name.removesuffix(".tar.xz") for path in GOLDEN.iterdir())


@pytest.mark.parametrize("case", CASES)
def test_the_state_is_what_the_ranks_held(case: str, tmp_path: Path, assert_holds: Any) -> None:
    with tarfile.open(GOLDEN / f"{case}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    check(tmp_path / case, tmp_path, assert_holds)


@pytest.mark.frameworks
def test_todays_megatron_writes_such_folders(tmp_path: Path, run_ranks: Any, assert_holds: Any) -> None:
    run_ranks("megatron_fsdp_run", tmp_path, 2, "dp2-optim,tp2-gated")
    for case in ("dp2-optim", "tp2-gated"):
        check(tmp_path / case, tmp_path, assert_holds)


def check(folder: Path, out: Path, assert_holds: Any) -> None:
    assert registry.detect(folder)[0].NAME == "dcp"
    report = convert(folder, out / f"{folder.name}.safetensors")
    held = live(folder)
    with read(out / f"{folder.name}.safetensors") as state:
        assert_holds(state, held)
        assert {len(parameter) for parameter in state.values()} == {3}
        matrices = [name for name, slots in held.items() if slots["exp_avg"].dim() == 2]
        assert [group.count for group in state.groups] == [len(matrices), len(held) - len(matrices)]
        assert [dict(group.options)["wd_mult"] for group in state.groups] == [1.0, 0.0]
        assert [dict(group.options)["weight_decay"] for group in state.groups] == [0.1, 0.1]
        assert set(list(state)[: len(matrices)]) == {*matrices}
    assert report.paired == len(held)


def live(folder: Path) -> dict[str, dict[str, Any]]:
    """What all ranks held together: flat shares of tensor-parallel parts, and these along the axis that was cut."""
    parts: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    axes: dict[str, int | None] = {}
    for path in sorted(folder.parent.glob(f"{folder.name}.*.pt")):
        for local, of in torch.load(path).items():
            name = local.removeprefix("module.module.")
            axes[name] = of["axis"]
            for slot, value in of["slots"].items():
                own = parts.setdefault(name, {}).setdefault(slot, {})
                if slot == "step":
                    own[0] = value
                    continue
                whole = own.setdefault(of["tp"], torch.full(of["shape"], torch.nan))
                whole.view(-1)[of["start"] : of["start"] + value.numel()] = value
    gated = "gated" in folder.name
    return {
        name: {slot: joined(own, axes[name], gated=gated and "fc1." in name) for slot, own in slots.items()}
        for name, slots in parts.items()
    }


def joined(parts: dict[int, torch.Tensor], axis: int | None, *, gated: bool) -> torch.Tensor:
    ranks = [parts[rank] for rank in sorted(parts)]
    assert not any(rank.isnan().any() for rank in ranks)
    if axis is None or len(ranks) == 1:
        return ranks[0]
    halves = [rank.chunk(2) for rank in ranks] if gated else [[rank] for rank in ranks]
    return torch.cat([torch.cat(half, axis) for half in zip(*halves, strict=True)])


def test_halves_that_are_none_are_refused() -> None:
    def of(*shape: int) -> dict[str, Any]:
        return {"exp_avg": contiguous("F32", shape, Memory(bytes(64)))}

    with pytest.raises(FileError) as error:
        fsdp_dtensor.state_dict({"a": {}}, {"a_w": of(2, 3), "a_v": of(2, 4)})
    assert str(error.value) == "the halves of 'a.exp_avg' have shapes that do not fit: [2, 3] and [2, 4]"
    with pytest.raises(FileError) as error:
        fsdp_dtensor.state_dict({"a": {}}, {"a_w": of(2, 3), "a_v": {}})
    assert str(error.value) == "the halves of 'a' have different slots: ['exp_avg'] and []"
    with pytest.raises(FileError) as error:
        fsdp_dtensor.state_dict({"a": {}}, [])
    assert str(error.value) == "holds a param_to_group_meta or a state that is no dict"
