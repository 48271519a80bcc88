"""What MindSpore 2.10 saves (``tests/golden/mindspore``), against what its optimizers held; MindFormers' folder of it.

The folder is made here as ``mindformers/checkpoint/metadata.py`` describes it, of the file that MindSpore wrote.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_state_format import registry
from lora_state_format.errors import FileError, UnknownFormatError
from lora_state_format.model.states import OptimizerState
from lora_state_format.operations.conversion import convert, read

FILES = Path(__file__).parents[1] / "golden" / "mindspore" / "files"
NAMES = ("0.weight", "0.bias", "1.gamma", "1.beta", "2.weight")


def holds(state: OptimizerState, name: str) -> None:
    with np.load(FILES / name / "expected.npz") as held:
        expected = dict(held)
    for key, value in expected.items():
        parameter, slot = key.split(":")
        assert np.array_equal(state[parameter][slot].numpy(), value), key
    assert set(state) == {key.split(":")[0] for key in expected} == set(NAMES)


@pytest.mark.parametrize("name", ["adam", "adamw", "momentum", "sgd"])
def test_it_holds_what_mindspore_held(tmp_path: Path, name: str) -> None:
    source = FILES / name / "model.safetensors"
    assert registry.detect(source)[0].NAME == "mindspore"
    report = convert(source, tmp_path / "optimizer.safetensors")
    assert report.paired == report.parameters == 5
    with read(tmp_path / "optimizer.safetensors") as state:
        holds(state, name)
        assert state.global_step == 5
        steps = {"step"} if name.startswith("adam") else set()
        moments = {"exp_avg", "exp_avg_sq"} if name.startswith("adam") else {"momentum_buffer"}
        for parameter in state.values():
            assert set(parameter) == moments | steps
            assert not steps or parameter["step"].item() == 5
        options = dict(state.groups[0].options)
        assert options.pop("lr") == np.float32(0.01)
        assert options == ({} if name.startswith("adam") else {"momentum": np.float32(0.9)})


def test_weights_alone_are_no_state(tmp_path: Path) -> None:
    tensors = load_file(FILES / "adam" / "model.safetensors")
    names = [name for name in tensors if not name.startswith("moment")]
    path = tmp_path / "model.safetensors"
    save_file(
        {**{name: tensors[name] for name in names}, "moments.weight": tensors["0.weight"]}, path, {"format": "ms"}
    )
    with pytest.raises(UnknownFormatError):  # a parameter may be called as a slot is
        registry.detect(path)


# --- a folder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two ranks, of which each has rows of the matrices; rank 1 has no others."""
    tensors = load_file(FILES / "adamw" / "model.safetensors")
    files: dict[str, dict[str, Any]] = {}
    described: dict[str, Any] = {}
    stored: dict[str, Any] = {}
    for key, value in tensors.items():
        half = len(value) // 2 if value.ndim == 2 else 0
        chunks = [(0, value[:half]), (half, value[half:])] if half else [(0, value)]
        described[key] = {"properties": {"dtype": str(value.dtype)}, "global_shape": list(value.shape), "chunk": []}
        for rank, (start, part) in enumerate(chunks):
            kind = "opt" if key.partition(".")[0] in ("adam_m", "adam_v") else "model"
            file = f"{kind}-{rank:07d}-0000002.safetensors"
            files.setdefault(file, {})[key] = part
            offset = (start, *[0] * (value.ndim - 1)) if value.ndim else ()
            described[key]["chunk"].append({"global_offset": list(offset), "local_shape": list(part.shape)})
            stored[str((key, offset))] = [{"file_name": file, "storage_rank": rank}]
    path = tmp_path / "iteration_00000005"
    path.mkdir()
    for name, held in files.items():
        save_file(held, path / name, {"format": "ms"})
    (path / "metadata.json").write_text(json.dumps({"state_dict_metadata": described, "storage_data": stored}))
    return path


def test_the_parts_of_all_ranks_are_joined(folder: Path, tmp_path: Path) -> None:
    report = convert(folder, tmp_path / "optimizer.safetensors")
    assert (report.source_format, report.paired) == ("mindspore", 5)
    with read(tmp_path / "optimizer.safetensors") as state:
        holds(state, "adamw")
        assert state.origin["support"] == "from source only"
        assert state.global_step == 5


def test_a_folder_that_lacks_a_file(folder: Path) -> None:
    (folder / "opt-0000001-0000002.safetensors").unlink()
    with pytest.raises(FileError) as caught:
        read(folder)
    assert str(caught.value) == f"{folder / 'opt-0000001-0000002.safetensors'}: missing: metadata.json names it"


def test_a_rank_file_that_is_another_one(folder: Path) -> None:
    shutil.copy(folder / "model-0000001-0000002.safetensors", folder / "opt-0000001-0000002.safetensors")
    with pytest.raises(FileError) as caught:
        read(folder)
    assert str(caught.value) == (
        f"{folder / 'opt-0000001-0000002.safetensors'}: has no 'adam_m.0.weight' where one is expected, in a dict"
    )


def test_parts_that_leave_a_gap(folder: Path) -> None:
    path = folder / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata["state_dict_metadata"]["adam_v.2.weight"]["chunk"].pop()
    path.write_text(json.dumps(metadata))
    with pytest.raises(FileError) as caught:
        read(folder)
    assert str(caught.value) == f"{path}: says parts of 'adam_v.2.weight' that do not make up [2, 4]"


@pytest.mark.parametrize(
    ("member", "value", "message"),
    [
        ("storage_data", {}, "has no \"('0.bias', (0,))\" where one is expected, in a dict"),
        ("state_dict_metadata", [], "'state_dict_metadata' is a list, where dict is expected"),
    ],
)
def test_metadata_of_another_form(folder: Path, member: str, value: Any, message: str) -> None:
    path = folder / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), member: value}))
    with pytest.raises(FileError) as caught:
        read(folder)
    assert str(caught.value) == f"{path}: {message}"


def test_a_file_name_that_leads_out(folder: Path) -> None:
    path = folder / "metadata.json"
    path.write_text(path.read_text().replace("opt-0000000-0000002", "../opt-0000000-0000002"))
    with pytest.raises(FileError) as caught:
        read(folder)
    assert str(caught.value) == (
        f"{path}: names '../opt-0000000-0000002.safetensors', which is not the name of a file in its folder"
    )
