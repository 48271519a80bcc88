"""DCP folders of FSDP on 2 CPU ranks against the state that the run gathered, and folders written for it to load."""

from __future__ import annotations

import pickle
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from lora_state_format import registry
from lora_state_format.converters import dcp
from lora_state_format.errors import FileError, RefusedError, TargetExistsError, UnrepresentableError
from lora_state_format.foreign.dcp import open_folder, write_folder
from lora_state_format.format.reading import open_state
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import OptimizerState, PositionalState, Role
from lora_state_format.model.tensors import Tensor, contiguous
from lora_state_format.operations.conversion import convert
from lora_state_format.operations.conversion import read as open_any
from lora_state_format.operations.report import to_json

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ["lora_A.default.weight", "lora_B.default.weight", "idle", "norm.weight", "norm.bias", "lora_B.default.bias"]


def live_of(path: Path) -> Any:
    return torch.load(path.with_name(f"{path.name}.live.pt"))


def slots_of(live: Any) -> dict[str, Any]:
    return {name: live["state"].get(name, {}) for name in NAMES}


def read(path: Path) -> OptimizerState:
    state = registry.read(path, "dcp").state
    assert isinstance(state, OptimizerState)
    return state


TABLE = runpy.run_path(str(Path(__file__).with_name("parallelism.py")))["TORCH"]
"""The rows of the table in ``docs/cluster.md`` that the runs here make."""


def rows(converter: str) -> list[str]:
    """The cases of the table that a converter reads; FSDP1 has a test of its own."""
    return [case for case, (by, *_) in TABLE.items() if by == converter and case != "fsdp1"]


@pytest.mark.parametrize("case", rows("dcp"))
def test_it_holds_what_the_ranks_held(fsdp: Callable[[str], Path], assert_holds: Any, case: str) -> None:
    path = fsdp(case)
    converter, match = registry.detect(path)
    assert (converter.NAME, match.reason) == ("dcp", "a .metadata file that lists an optimizer's param_groups")
    with read(path) as state:
        live = live_of(path)
        assert_holds(state, slots_of(live))
        assert state["idle"].state is None
        assert state["idle"].shape == (5,)
        assert all(slot.role is Role.PARAM for parameter in state.parameters for _, slot in parameter.tensors())
        assert [
            {**dict(group.options), "params": [parameter.name for parameter in members]}
            for group, members in zip(state.groups, state.members(), strict=True)
        ] == live["param_groups"]


@pytest.mark.parametrize("case", rows("dcp_safetensors"))
def test_what_the_hugging_face_writer_makes(fsdp: Callable[[str], Path], assert_holds: Any, case: str) -> None:
    converter, match = registry.detect(fsdp(case))
    assert converter.NAME == "dcp_safetensors"
    assert match.reason == "safetensors files with tensors called state.<parameter>.<slot>"
    with open_any(fsdp(case)) as state:
        assert_holds(state, {name: slots for name, slots in slots_of(live_of(fsdp(case))).items() if slots})
        assert [(group.options, group.count) for group in state.groups] == [((), 5)]
        assert state.origin == {"format": "dcp_safetensors", "files": 2}


def test_consolidated_files_lose_the_step(fsdp: Callable[[str], Path], assert_holds: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fsdp("consolidated"), tmp_path / "alone"))
    shutil.rmtree(folder / "sharded")
    with pytest.raises(FileError) as error:
        registry.read(folder)
    assert str(error.value) == (
        f"{folder}: 'step' of 'lora_A.default.weight' is 0, as torch's consolidated files have it whatever it was; "
        "give the folder with the shards ('sharded', next to this file when it was written), or pass "
        "options={'step': ...}"
    )
    with open_any(folder, options={"step": "3"}) as state:
        live = slots_of(live_of(fsdp("consolidated")))
        assert_holds(state, {name: slots for name, slots in live.items() if slots})


def test_a_shard_of_the_hugging_face_writer_is_missing(fsdp: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fsdp("hugging"), tmp_path / "last"))
    (folder / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(FileError) as last:
        registry.read(folder)
    assert str(last.value) == (
        f"{folder}: has no 'step' of 'lora_B.default.bias', where 'lora_A.default.weight' has one: a shard is missing; "
        "copy the folder again from where it was written"
    )
    folder = Path(shutil.copytree(fsdp("hugging"), tmp_path / "first"))
    (folder / "shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(FileError) as first:
        registry.read(folder)
    assert str(first.value) == f"{folder}: has no shard 1, and has shard 2"


def test_megatron_fsdp_states_options_by_name(tmp_path: Path) -> None:
    """Laid out as ``DistributedOptimizer.sharded_param_state_fsdp_dtensor`` does."""
    torch.manual_seed(0)
    names = ["module.a.weight", "module.a.bias", "module.b.weight"]
    state = {
        n: {"exp_avg": torch.randn(4, 3), "exp_avg_sq": torch.rand(4, 3), "step": torch.tensor(3.0)} for n in names
    }
    metas = {n: {"lr": 1e-3, "betas": (0.9, 0.95), "wd_mult": float("weight" in n)} for n in names}
    tree = {"optimizer": {"state": state, "param_to_group_meta": metas}}
    dcp_save(tree, checkpoint_id=tmp_path / "folder", no_dist=True)
    assert registry.detect(tmp_path / "folder")[0].NAME == "dcp"
    with read(tmp_path / "folder") as read_back:
        for name in names:
            own = read_back[name.removeprefix("module.")]
            assert torch.equal(own["exp_avg"].torch(), state[name]["exp_avg"])
            assert own["step"].item() == 3.0
        assert [group.count for group in read_back.groups] == [2, 1]
        assert dict(read_back.groups[0].options) == {"lr": 1e-3, "betas": (0.9, 0.95), "wd_mult": 1.0}
        assert dict(read_back.groups[1].options)["wd_mult"] == 0.0


def test_two_keys_in_one_place_are_refused(fsdp: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fsdp("nested"), tmp_path / "nested"))
    places: dict[str, Any] = {}

    def edit(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            if index.index == 0 and index.fqn.endswith(
                ("lora_A.default.weight.exp_avg", "lora_A.default.weight.exp_avg_sq")
            ):
                places[index.fqn.rpartition(".")[2]] = info
        first, second = places["exp_avg"], places["exp_avg_sq"]
        second.relative_path, second.offset, second.length = first.relative_path, first.offset, first.length

    edit_metadata(folder, edit)
    with pytest.raises(FileError) as error:
        registry.read(folder)
    place = places["exp_avg"]
    key = "optim.state.lora_A.default.weight.exp_avg"
    assert str(error.value) == (
        f"{folder / '.metadata'}: places '{key}_sq' at byte {place.offset} of {place.relative_path}, inside '{key}' "
        f"({place.offset} to {place.offset + place.length})"
    )


def test_entries_that_were_taken_out_or_exchanged_are_refused(fsdp: Callable[[str], Path], tmp_path: Path) -> None:
    """``.metadata`` names each entry three times: it has to be the same one."""
    keys = [f"optim.state.lora_A.default.weight.{slot}" for slot in ("exp_avg", "exp_avg_sq")]

    def exchange(metadata: Any) -> None:
        paths = metadata.planner_data
        paths[keys[0]], paths[keys[1]] = paths[keys[1]], paths[keys[0]]

    def take_out(metadata: Any) -> None:
        del metadata.state_dict_metadata[keys[1]]

    told = {
        exchange: f"places '{keys[0]}' at ('optim', 'state', 'lora_A.default.weight', 'exp_avg_sq'), which is the path "
        "of another entry",
        take_out: f"says where '{keys[1]}' is, and not what it is: an entry was taken out",
    }
    for edit, message in told.items():
        folder = Path(shutil.copytree(fsdp("nested"), tmp_path / edit.__name__))
        edit_metadata(folder, edit)
        with pytest.raises(FileError) as error:
            registry.read(folder)
        assert str(error.value) == f"{folder / '.metadata'}: {message}"


def test_compression_that_lies_about_its_size(fsdp: Callable[[str], Path], tmp_path: Path) -> None:
    """A stream that unfolds to more than its tensor is cut off, not held in memory."""
    import zstandard

    folder = Path(shutil.copytree(fsdp("zstd"), tmp_path / "zstd"))
    bomb = zstandard.compress(bytes(64 << 20), 19)
    (folder / "bomb.distcp").write_bytes(bomb * 2)  # both ranks' chunks

    def edit(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn.endswith("lora_A.default.weight.exp_avg"):
                place = 0 if index.index == 0 else len(bomb)
                info.relative_path, info.offset, info.length = "bomb.distcp", place, len(bomb)

    edit_metadata(folder, edit)
    with read(folder) as state, pytest.raises(FileError) as error:
        state["lora_A.default.weight"]["exp_avg"].bytes()
    assert str(error.value).endswith("unfolds to more than the 65640 bytes that it can have")


def test_another_transform_is_refused(fsdp: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fsdp("zstd"), tmp_path / "zstd"))

    def edit(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.transform_descriptors = ["stream.lz4/1"]

    edit_metadata(folder, edit)
    with pytest.raises(RefusedError) as error:
        registry.read(folder)
    assert str(error.value) == (
        f"{folder / '.metadata'}: 'model.idle' is stored transformed (['stream.lz4/1']), where "
        "'stream.zstd/1' alone is read: load it with torch and save it without the extension"
    )


def edit_metadata(folder: Path, edit: Callable[[Any], None]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_chunks_along_another_axis_come_together(fsdp: Callable[[str], Path]) -> None:
    with read(fsdp("rows")) as state:
        tensor = state["lora_A.default.weight"]["exp_avg"]
        assert [piece.where.start for piece in tensor.pieces] == [(0, 0), (0, 7)]
        assert tensor.runs is None
        assert bytes(tensor.read([slice(1, 3), slice(5, 9)])) == bytes(
            live_of(fsdp("rows"))["state"]["lora_A.default.weight"]["exp_avg"][1:3, 5:9].contiguous().numpy().tobytes()
        )


def test_local_state_dicts_of_fsdp1_are_refused(fsdp: Callable[[str], Path]) -> None:
    folder = fsdp("flat")
    for path in (folder, folder.with_name("flat.0.pt"), folder.with_name("flat.1.pt")):
        with pytest.raises(RefusedError) as error:
            open_any(path)
        assert str(error.value) == (
            f"{path}: holds '_flat_param': a local state dict of FSDP1, in which parameters have neither names nor "
            "shapes and the optimizer's state is that of one rank; load it where it was written, and save with "
            "StateDictType.SHARDED_STATE_DICT, or get_optimizer_state_dict"
        )


def test_sharded_fsdp1(fsdp: Callable[[str], Path], assert_holds: Any) -> None:
    path = fsdp("fsdp1")
    assert registry.detect(path)[1].path == path
    with read(path) as state:
        live = live_of(path)["state"]
        steps = {name: {"step": slots["step"]} for name, slots in live.items() if slots}
        assert_holds(state, {name: steps.get(name, {}) for name in NAMES})
        for name, slots in live.items():
            for slot in slots.keys() - {"step"}:
                assert torch.equal(state[name][slot].torch().flatten(), slots[slot]), (name, slot)


def test_a_saved_state_dict_keeps_its_ids(fsdp: Callable[[str], Path]) -> None:
    state = registry.read(fsdp("positional"), "dcp").state
    assert isinstance(state, PositionalState)
    assert state.ids == (0, 1, 2, 3, 4, 5)
    assert list(state.names or ()) == NAMES
    assert 2 not in state.entries
    state.resources[0].close()


def test_it_converts_to_one_file_with_the_weights_digests(
    fsdp: Callable[[str], Path], tmp_path: Path, assert_holds: Any
) -> None:
    report = convert(fsdp("rows"), tmp_path / "optimizer.safetensors")
    assert (report.source_format, report.groups, report.paired) == ("dcp", (2, 4), 6)
    unseen = (
        "torch's distributed checkpoint keeps no digest of a folder's files: one that was exchanged with that of "
        "another save of the same shapes would go unnoticed"
    )
    assert unseen in report.notes
    with open_state(report.target) as state:
        assert to_json(state)["notes"] == [unseen]
        assert_holds(state, slots_of(live_of(fsdp("rows"))))


@pytest.mark.parametrize("flattened", [False, True])
def test_torch_loads_what_is_written(
    fsdp: Callable[[str], Path], tmp_path: Path, run_ranks: Any, flattened: bool
) -> None:
    """``torch.distributed.checkpoint.load`` and ``set_optimizer_state_dict`` on 2 ranks give back the run's state."""
    options = {"flattened": True, "key": ""} if flattened else {}
    with read(fsdp("nested")) as state:
        dcp.write(state, tmp_path / "written", base=None, force=False, options=options)
    again = registry.read(tmp_path / "written", "dcp").state
    assert isinstance(again, PositionalState)  # nothing in the folder says the shape of what never took a step
    assert (list(again.names or ()), again.groups) == (NAMES, state.groups)
    run_ranks("fsdp_run", tmp_path, 2, "load:written" + (":flattened" if flattened else ""))
    live, loaded = live_of(fsdp("nested")), torch.load(tmp_path / "written.loaded.pt")
    assert loaded["param_groups"] == live["param_groups"]
    for name, slots in live["state"].items():
        for slot, expected in slots.items():
            assert torch.equal(loaded["state"][name][slot], expected), (name, slot)


def test_what_is_written_is_what_torch_writes(fsdp: Callable[[str], Path], tmp_path: Path) -> None:
    """Whatever DCP stores for each key, and the keys' paths."""
    with read(fsdp("nested")) as state:
        dcp.write(state, tmp_path / "written", base=None, force=False, options={"key": "optim"})
    ours, theirs = (
        pickle.loads((folder / ".metadata").read_bytes()) for folder in (tmp_path / "written", fsdp("nested"))
    )
    for key, path in ours.planner_data.items():
        assert theirs.planner_data[key] == path
        described = theirs.state_dict_metadata[key]
        assert type(ours.state_dict_metadata[key]) is type(described)
        if hasattr(described, "size"):
            assert ours.state_dict_metadata[key].size == described.size
            assert ours.state_dict_metadata[key].properties == described.properties


@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize("path", [(), ("app",), ("state", "optimizers", "AdamW")])
def test_an_optimizer_may_stand_anywhere_in_the_tree(
    fsdp: Callable[[str], Path], tmp_path: Path, assert_holds: Any, path: tuple[str, ...], flattened: bool
) -> None:
    """At the top as in torchtitan's folders, under a name, or deeper as in Composer's."""
    with read(fsdp("flattened" if flattened else "nested")) as state:
        dcp.write(state, tmp_path / "top", base=None, force=False, options={"key": "", "flattened": flattened})
    with open_folder(tmp_path / "top") as top:
        weights = {
            ("model", name): contiguous("F32", p.shape, Memory(bytes(4 * prod(p.shape)))) for name, p in state.items()
        }
        write_folder({**{(*path, *key): value for key, value in top.entries.items()}, **weights}, tmp_path / "moved")
    assert registry.detect(tmp_path / "moved")[0].NAME == "dcp"
    with read(tmp_path / "moved") as moved:
        assert_holds(moved, slots_of(live_of(fsdp("nested"))))


def test_nothing_is_overwritten_and_nothing_foreign_deleted(fsdp: Callable[[str], Path], tmp_path: Path) -> None:
    target = tmp_path / "written"
    with read(fsdp("nested")) as state:
        dcp.write(state, target, base=None, force=False, options={})
        before = (target / "__0_0.distcp").read_bytes()
        with pytest.raises(TargetExistsError):
            dcp.write(state, target, base=None, force=False, options={})
        dcp.write(state, target, base=None, force=True, options={})
        assert (target / "__0_0.distcp").read_bytes() == before
        (target / "model.safetensors").write_bytes(b"")
        with pytest.raises(TargetExistsError) as foreign:
            dcp.write(state, target, base=None, force=True, options={})
        assert str(foreign.value) == f"{target} holds other files too (model.safetensors); choose another folder"
    assert [path.name for path in tmp_path.iterdir()] == ["written"]


# --- what is refused ----------------------------------------------------------------------------------------------


def copied(path: Path, to: Path) -> Path:
    return Path(shutil.copytree(path, to / path.name))


def test_a_missing_rank_file_is_named(fsdp: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(fsdp("nested"), tmp_path)
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(FileError) as error:
        registry.read(folder, "dcp")
    assert str(error.value) == f"{folder / '__1_0.distcp'}: missing: .metadata says that it holds a part of the state"


def test_a_truncated_rank_file_is_named(fsdp: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(fsdp("nested"), tmp_path)
    cut = folder / "__1_0.distcp"
    cut.write_bytes(cut.read_bytes()[:-10])
    with pytest.raises(FileError) as error:
        registry.read(folder, "dcp")
    assert str(error.value).startswith(f"{cut}: is cut short: {cut.stat().st_size} bytes, where .metadata places '")


def test_files_of_another_number_of_ranks_are_refused(fsdp: Callable[[str], Path], tmp_path: Path) -> None:
    """The list of three ranks beside the files of two, and a file of three ranks beside the list of two."""
    folder = copied(fsdp("nested"), tmp_path)
    shutil.copy(fsdp("three") / ".metadata", folder)
    with pytest.raises(FileError) as fewer:
        registry.read(folder, "dcp")
    assert str(fewer.value).startswith(f"{folder / '__'}")
    folder = copied(fsdp("nested"), tmp_path / "more")
    shutil.copy(fsdp("three") / "__1_0.distcp", folder)
    with pytest.raises(FileError) as more:
        convert(folder, tmp_path / "optimizer.safetensors")
    assert str(more.value).startswith(f"{folder / '__1_0.distcp'}: ")
    assert not (tmp_path / "optimizer.safetensors").exists()


def test_files_of_two_steps_are_refused(fsdp: Callable[[str], Path], tmp_path: Path) -> None:
    """As far as it can be told: where more than one file holds steps, which takes three ranks."""
    folder = copied(fsdp("three"), tmp_path)
    shutil.copy(fsdp("three-5") / "__2_0.distcp", folder)
    with pytest.raises(FileError) as error:
        registry.read(folder, "dcp")
    assert str(error.value) == (
        f"{folder / '__2_0.distcp'}: every step in it differs from those in __1_0.distcp: files of two checkpoints"
    )


def test_a_changed_byte_is_found_while_it_streams(fsdp: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(fsdp("nested"), tmp_path)
    live = live_of(fsdp("nested"))["state"]["lora_B.default.weight"]["exp_avg"]
    damaged = folder / "__1_0.distcp"
    data = bytearray(damaged.read_bytes())
    at = data.index(live[-2:].numpy().tobytes())
    data[at] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(FileError, match="the CRC-32 that the"):
        convert(folder, tmp_path / "optimizer.safetensors")
    assert not (tmp_path / "optimizer.safetensors").exists()


def test_a_metadata_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    write_folder({("optimizer", "param_groups", 0, "params"): []}, tmp_path / "x")
    meta = tmp_path / "x" / ".metadata"
    meta.write_bytes(meta.read_bytes().replace(b"__0_0.distcp", b"../../passwd"))
    with pytest.raises(RefusedError) as error:
        open_folder(tmp_path / "x")
    assert str(error.value) == f"{meta}: points at a file outside the folder: '../../passwd'"


def test_two_paths_with_one_key_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UnrepresentableError) as error:
        write_folder({("a", "b.c"): 1, ("a.b", "c"): 2}, tmp_path / "x")
    assert str(error.value) == "DCP would give ('a', 'b.c') and ('a.b', 'c') the same key"
    assert list(tmp_path.iterdir()) == []


def test_a_metadata_of_too_many_chunks_names_a_way_out(tmp_path: Path) -> None:
    """Its text names a way that ``test_one_file_of_torchs_is_read`` goes."""
    path = tmp_path / "step" / ".metadata"
    path.parent.mkdir()
    way = (
        "let torch make one file of the folder and convert that: python -m torch.distributed.checkpoint.format_utils "
        f"dcp_to_torch {path.parent} FILE.pt"
    )
    path.write_bytes(b"\x80\x02" + b"}" * 6_000_000 + b"\0" * 12_000_000)
    with pytest.raises(FileError) as error:
        open_folder(path.parent)
    assert str(error.value) == (
        f"{path}: the pickle builds more than 430000000 bytes of objects, at byte 4849663 of the file; {way}"
    )
    with path.open("ab") as file:
        file.truncate(50 << 20)
    with pytest.raises(FileError) as error:
        open_folder(path.parent)
    assert str(error.value) == f"{path}: a pickle of 52428800 bytes; the limit is 41943040; {way}"


def test_one_file_of_torchs_is_read(fsdp: Callable[[str], Path], tmp_path: Path) -> None:
    folder, file = fsdp("nested"), tmp_path / "file.pt"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.checkpoint.format_utils",
        "dcp_to_torch",
        str(folder),
        str(file),
    ]
    subprocess.run(command, check=True, capture_output=True)
    convert(file, tmp_path / "one.safetensors")
    with read(folder) as expected, open_state(tmp_path / "one.safetensors") as found:
        assert list(found) == list(expected)
        for name, parameter in expected.items():
            held = {slot: value.bytes() if isinstance(value, Tensor) else value for slot, value in parameter.items()}
            own = found[name].items()
            assert {slot: value.bytes() if isinstance(value, Tensor) else value for slot, value in own} == held
