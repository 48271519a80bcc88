"""A first look at a folder of very many ranks reads a few of its files, and says so."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from lora_state_format import registry
from lora_state_format.cli import run
from lora_state_format.errors import AmbiguousOrderError, FileError, RefusedError
from lora_state_format.foreign import dcp, pickles
from lora_state_format.foreign.dcp import metadata, write_folder
from lora_state_format.foreign.pickles import Record
from lora_state_format.foreign.torch_save import dumps, save
from lora_state_format.io.files import FEW
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import OptimizerState, Scalar
from lora_state_format.model.tensors import contiguous
from lora_state_format.operations import report
from lora_state_format.operations.conversion import read
from lora_state_format.operations.look import look

GOLDEN: Final = Path(__file__).parents[1] / "golden"
ZERO: Final = sorted(
    p.name.removesuffix(".tar.xz")
    for p in (GOLDEN / "deepspeed" / "files").iterdir()
    if p.name.removesuffix(".tar.xz")[-1] > "0"
)
DCP: Final = [
    (framework, path.name)
    for framework in ("megatron", "torchtitan")
    for path in sorted((GOLDEN / framework / "files").iterdir())
    if not path.name.startswith("bucket")
]
BUCKETS: Final = sorted(path.name for path in (GOLDEN / "megatron" / "files").glob("bucket-*"))
SHAPES: Final = {"a.weight": (FEW + 1, 2), "b.weight": (5, 3)}


def many(folder: Path, ranks: int) -> Path:
    """A ZeRO 3 folder of many ranks, laid out as DeepSpeed 0.19 lays them out."""
    folder.mkdir()
    share = sum(-(-rows * columns // ranks) for rows, columns in SHAPES.values())

    def flat(*shape: int) -> Any:
        count = shape[0] if shape else 1
        return contiguous("F32", shape, Memory(bytes(4 * count)))

    slots = {"step": flat(), "exp_avg": flat(share), "exp_avg_sq": flat(share)}
    base = {"state": {0: slots}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    tree = {"zero_stage": 3, "partition_count": ranks, "optimizer_state_dict": base, "fp32_flat_groups": [flat(share)]}
    shapes = {name: Record("torch", "Size", (shape,)) for name, shape in SHAPES.items()}
    model = {"param_shapes": [shapes], "module": {}, "dp_world_size": ranks, "global_steps": 3}
    save({"optimizer_state_dict": tree}, folder / "optimizer")
    save(model, folder / "model")
    for rank in range(ranks):
        shutil.copy(folder / "optimizer", folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        shutil.copy(folder / "model", folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    (folder / "optimizer").unlink()
    (folder / "model").unlink()
    return folder


def shown(state: Any) -> dict[str, Any]:
    """What ``inspect --json`` says of a state, where it came from aside."""
    members = report.to_json(state)
    return {key: value for key, value in members.items() if key not in {"origin", "notes"}}


def unpack(path: Path, folder: Path) -> None:
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")


def test_a_look_at_many_ranks_reads_two_files_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = many(tmp_path / "step", FEW + 1)
    assert run(["inspect", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["origin"] == {
        "format": "deepspeed_zero",
        "stage": 3,
        "ranks": 65,
        "first_look": {"files_read": 2, "files": 130},
    }
    assert run(["inspect", str(folder)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    note = "2 of 130 files were read, and the others are taken to be like them; convert reads and compares all"
    assert f"note a first look: {note} " in said
    with read(folder) as whole:
        assert shown(whole) == shown(look(folder).state)
        assert whole.origin["masters_compared"] == 0

    assert run(["inspect", str(folder), "--stats"]) == 0
    assert "a first look" not in capsys.readouterr().out


def test_what_was_not_read_is_not_claimed(tmp_path: Path) -> None:
    folder = many(tmp_path / "step", FEW + 1)
    state = look(folder).state
    assert isinstance(state, OptimizerState)
    with pytest.raises(FileError) as error:
        state["a.weight"]["exp_avg"].bytes()
    assert str(error.value) == (
        f"{folder}: was only looked at, and none of its tensors can be read: open it with read()"
    )
    damaged = folder / "zero_pp_rank_7_mp_rank_00_optim_states.pt"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    look(folder)
    for whole in (lambda: read(folder), lambda: look(folder, whole=True)):
        with pytest.raises(FileError) as error:
            whole()
        assert str(error.value) == f"{damaged}: the zip archive has no directory at its end: the file is cut short"
    damaged.unlink()  # names alone show this
    with pytest.raises(FileError) as error:
        look(folder)
    assert error.value.detail.startswith("missing: there are files of ranks [0, 1, 2,")


def test_few_ranks_are_all_read(tmp_path: Path) -> None:
    state = look(many(tmp_path / "step", FEW)).state
    assert (state.origin["ranks"], "first_look" in state.origin) == (FEW, False)


@pytest.mark.parametrize("case", ZERO)
def test_a_look_shows_what_reading_shows(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On what DeepSpeed itself wrote, with pipeline stages, slices and experts."""
    unpack(GOLDEN / "deepspeed" / "files" / f"{case}.tar.xz", tmp_path)
    folder = next(tmp_path.glob("*/global_step3"))
    monkeypatch.setattr(registry.get("deepspeed_zero"), "FEW", 0)
    options = {"slices": "megatron"} if "grid" in case else {}
    with read(folder, options=options) as whole:
        looked = look(folder, options=options).state
        assert "first_look" in looked.origin
        assert shown(looked) == shown(whole)
        assert {**looked.origin, "first_look": 0} == {
            **{key: value for key, value in whole.origin.items() if key != "masters_compared"},
            "first_look": 0,
        }


def spread(folder: Path, count: int) -> Path:
    """A DCP folder whose moments lie in ``count`` files, a chunk in each; its step lies in one, with the groups."""
    moments = contiguous("F32", (1, 4), Memory(bytes(16)))
    entries = {
        ("optimizer", "state", "w", "exp_avg"): moments,
        ("optimizer", "state", "w", "step"): Scalar.of("F32", 3.0),
    }
    write_folder({**entries, ("optimizer", "param_groups", 0, "params"): ["w"]}, folder)
    tree = pickles.load_plain(metadata(folder))
    key, places = "optimizer.state.w.exp_avg", tree.state["storage_data"]
    described = tree.state["state_dict_metadata"][key].state
    index, info = next((index, info) for index, info in places.items() if index.state["fqn"] == key)
    chunk = described["chunks"][0]
    size = Record("torch", "Size", ((count, 4),))
    chunks = []
    del places[index]
    for number in range(count):
        at, name = Record("torch", "Size", ((number, 0),)), f"__{number}_0.distcp"
        chunks.append(replace(chunk, state={**chunk.state, "offsets": at}))
        places[replace(index, state={**index.state, "offset": at})] = replace(
            info, state={**info.state, "relative_path": name}
        )
        if number:
            shutil.copy(folder / "__0_0.distcp", folder / name)
    described.update(size=size, chunks=chunks)
    (folder / ".metadata").write_bytes(dumps(tree))
    return folder


def test_a_look_at_a_dcp_folder_reads_no_tensor(tmp_path: Path) -> None:
    folder = spread(tmp_path / "step", FEW + 1)
    with read(folder) as whole:
        looked = look(folder).state
        assert whole.origin == {"format": "dcp"}
        assert looked.origin == {"format": "dcp", "first_look": {"files_read": 2, "files": FEW + 2}}
        assert shown(looked) == shown(whole)
    for path in folder.glob("__[1-9]*"):
        path.write_bytes(b"")  # none of them is opened, let alone read
    assert look(folder).state.origin == looked.origin
    with pytest.raises(FileError) as error:
        read(folder)
    assert error.value.detail.startswith(
        "is cut short: 0 bytes, where .metadata places 'optimizer.state.w.exp_avg' at "
    )
    (folder / "__7_0.distcp").unlink()  # names alone show this
    with pytest.raises(FileError) as missing:
        look(folder)
    assert str(missing.value) == (
        f"{folder / '__7_0.distcp'}: missing: .metadata says that it holds a part of the state"
    )


@pytest.mark.parametrize("number", [0, 1])
def test_a_look_at_a_dcp_folder_follows_no_name_out_of_it(number: int, tmp_path: Path) -> None:
    folder = spread(tmp_path / "step", FEW + 1)
    old = f"__{number}_0.distcp".encode()
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes().replace(old, b"../../passwd"))
    with pytest.raises(RefusedError) as error:
        look(folder)
    assert str(error.value) == f"{folder / '.metadata'}: points at a file outside the folder: '../../passwd'"


@pytest.mark.parametrize(("framework", "archive"), DCP)
def test_a_look_at_genuine_dcp_folders_shows_what_reading_shows(
    framework: str, archive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack(GOLDEN / framework / "files" / archive, tmp_path)
    folder = next(tmp_path.rglob(".metadata")).parent
    with read(folder) as whole:
        monkeypatch.setattr(dcp, "FEW", 0)
        looked = look(folder).state
        first = report.to_json(looked)["origin"]["first_look"]
        assert first["files_read"] <= first["files"] == 1 + len(list(folder.rglob("*.distcp")))
        assert shown(looked) == shown(whole)
    if first["files_read"] == first["files"]:
        note = f"a first look: {first['files']} of {first['files']} files were read, each in part; convert reads and "
        assert f"{note}compares all" in report.to_json(looked)["notes"]


@pytest.mark.parametrize("archive", BUCKETS)
def test_a_look_at_flat_buckets_takes_all_weights_to_have_state(
    archive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack(GOLDEN / "megatron" / "files" / archive, tmp_path)
    folder = next(tmp_path.rglob(".metadata")).parent
    with read(folder) as whole:
        monkeypatch.setattr(dcp, "FEW", 0)
        looked = look(folder).state
        assert shown(looked) == shown(whole)
        said = "all weights of the folder; convert proves by the fp32 masters which of them have state"
        assert looked.origin["parameters"] == said
        assert f"parameters: {said}" in report.to_json(looked)["notes"]


def test_flat_buckets_without_room_for_all_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack(GOLDEN / "megatron" / "files" / "bucket-dp2.tar.xz", tmp_path)
    folder = next(tmp_path.rglob(".metadata")).parent
    tree = pickles.load_plain(metadata(folder))
    described, places = tree.state["state_dict_metadata"], tree.state["storage_data"]
    for index, info in [*places.items()]:
        key, file = index.state["fqn"], info.state["relative_path"]
        if "optimizer" not in key and described[key].name == "TensorStorageMetadata":
            described[f"frozen.{key}"] = described[key]
            places[replace(index, state={**index.state, "fqn": f"frozen.{key}"})] = replace(
                info, state={**info.state, "relative_path": f"again_{file}"}
            )
            shutil.copy(folder / file, folder / f"again_{file}")
    (folder / ".metadata").write_bytes(dumps(tree))
    monkeypatch.setattr(dcp, "FEW", 0)
    with pytest.raises(AmbiguousOrderError) as expected:
        read(folder)
    with pytest.raises(AmbiguousOrderError) as error:
        look(folder)
    assert str(error.value) == str(expected.value)
