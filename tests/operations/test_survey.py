"""Every checkpoint below a folder, the newest of a run, and what a path is that holds none."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

import lora_state_format as lsf
from lora_state_format import registry
from lora_state_format.cli import run
from lora_state_format.errors import FileError, UnknownFormatError
from lora_state_format.torch import save_optimizer

VERSIONS = Path(__file__).parents[1] / "golden" / "versions"


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A run of two checkpoints, a state without names, a file of weights, a broken file, and what is no checkpoint."""
    for step in (3, 20):
        shutil.copytree(VERSIONS / "transformers4.52.4-bert-lora", tmp_path / "run" / f"checkpoint-{step}")
    tree = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1.0, "params": [0]}]}
    (tmp_path / "alone").mkdir()
    torch.save(tree, tmp_path / "alone" / "optim.pt")
    torch.save({"weight": torch.ones(3)}, tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "broken.pt", "w") as archive:
        archive.writestr("x/version", "3")
    (tmp_path / "notes.txt").write_text("nothing")
    return tmp_path


def test_every_checkpoint_below_a_folder(many: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(many), "--recursive", "--json"]) == 1  # one has no names, and one is broken
    found = json.loads(capsys.readouterr().out)
    assert found["schema_version"] == 1
    rows = {str(Path(row.pop("path")).relative_to(many)): row for row in found["checkpoints"]}
    assert list(rows) == ["alone/optim.pt", "broken.pt", "run/checkpoint-20", "run/checkpoint-3"]
    assert rows["run/checkpoint-3"] == {
        "format": "torch_optimizer",
        "parameters": 10,
        "global_step": 3,
        "source": "adapter",
        "rule": "trainer",
        "place": "adapter_model.safetensors",
        "reason": None,
    }
    assert rows["alone/optim.pt"]["reason"].startswith(
        f"{many / 'alone' / 'optim.pt'}: stores 1 parameters by position"
    )
    assert "no data.pkl among its 1 members" in rows["broken.pt"]["reason"]
    assert run(["inspect", str(many / "run"), "--recursive", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["checkpoints"]) == 2
    assert run(["inspect", str(many), "--recursive"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == (
        f"{many / 'run' / 'checkpoint-3'} (torch_optimizer): 10 parameters, step 3; names: adapter, "
        "adapter_model.safetensors"
    )


def test_reasons_are_whole_and_in_the_words_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = {"state": {0: {"exp_avg": torch.ones(2, 2)}}, "param_groups": [{"lr": 1.0, "params": [0]}]}
    torch.save({"model": {"a": torch.ones(3), "b": torch.ones(2)}, "optimizer": tree}, tmp_path / "last.pt")
    assert run(["inspect", str(tmp_path), "--recursive"]) == 1
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first == (
        f"{tmp_path / 'last.pt'} (torch_optimizer): no order of the 2 parameters fits the 1 of the optimizer, whose "
        "groups hold [1]:"
    )
    assert "    one-per-parameter: makes groups of [1, 1]" in lines
    assert last == "  hint: pass --names with a file of names in optimizer order, or the model that was trained"
    (tmp_path / "names.txt").write_text("c")
    assert run(["inspect", str(tmp_path / "last.pt"), "--names", str(tmp_path / "names.txt")]) == 0
    torch.save(tree, tmp_path / "last.pt")
    capsys.readouterr()
    assert run(["inspect", str(tmp_path), "--recursive"]) == 1
    assert "; pass --names with a file of names" in capsys.readouterr().out


def test_weights_whose_header_is_as_long_as_a_pickle_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A header of 0x280 bytes starts as a pickle of protocol 2 does."""
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(0x280)
    (tmp_path / "adapter.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert run(["inspect", str(tmp_path), "--recursive"]) == 3
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: no checkpoint of a known format here or in the folders below\n"
    )
    with pytest.raises(UnknownFormatError, match="it is a safetensors file of weights"):
        registry.detect(tmp_path / "adapter.safetensors")


def test_the_dcp_folders_of_a_run_are_not_one_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = get_optimizer_state_dict(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("step-5", "step-10", "split/optimizer_0", "split/optimizer_1"):
            save({"optimizer": {**state, "index": name}}, checkpoint_id=tmp_path / name)
    assert run(["inspect", str(tmp_path), "--recursive"]) == 1  # both optimizers of one have the same names
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"{tmp_path / 'split'} (dcp)", f"{tmp_path / 'step-10'} (dcp)", f"{tmp_path / 'step-5'} (dcp)",
    ]  # fmt: skip
    assert registry.latest(tmp_path) == tmp_path / "step-10"


def test_the_newest_checkpoint_of_a_run(many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By number, not by text."""
    assert registry.latest(many / "run") == many / "run" / "checkpoint-20"
    assert run(["inspect", str(many / "run"), "--latest"]) == 0
    assert capsys.readouterr().out.startswith(f"{many / 'run' / 'checkpoint-20'} (torch_optimizer)\n")
    assert run(["convert", str(many / "run"), str(tmp_path / "x.safetensors"), "--latest"]) == 0
    assert run(["inspect", str(many / "run")]) == 3
    assert capsys.readouterr().err == (
        f"error: {many / 'run'}: no optimizer state in this folder itself; the newest folder in it that has one is "
        f"{many / 'run' / 'checkpoint-20'}\n"
    )
    with pytest.raises(UnknownFormatError):
        registry.latest(many / "alone")
    assert run(["inspect", str(many / "notes.txt"), "--latest"]) == 3


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a.png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(30)), "a PNG image"),
    "a.npz": (lambda path: np.savez(path, x=np.ones(3)), "a zip archive of NumPy arrays"),
    "a.npy": (lambda path: np.save(path, np.ones(3)), "a NumPy array"),
    "a.txt": (lambda path: path.write_text("lr: 0.1\n"), "a text file"),
    "a.json": (lambda path: path.write_text('{"a": 1}'), "a JSON file"),
    "a.pt": (lambda path: path.touch(), "an empty file"),
    "a.gguf": (lambda path: path.write_bytes(b"GGUF" + bytes(30)), "a GGUF model, which holds weights alone"),
    "a.tar.gz": (lambda path: path.write_bytes(b"\x1f\x8b" + bytes(30)), "a gzip archive: unpack it first"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_a_file_is(name: str, tmp_path: Path) -> None:
    make, words = KINDS[name]
    make(tmp_path / name)
    with pytest.raises(UnknownFormatError) as caught:
        registry.detect(tmp_path / name)
    assert str(caught.value).startswith(
        f"{tmp_path / name}: no optimizer state found here: it is {words}; looked for:\n"
    )


def test_verify_of_a_checkpoint_of_another_format(capsys: pytest.CaptureFixture[str]) -> None:
    path = VERSIONS / "transformers4.52.4-bert-lora" / "optimizer.pt"
    assert run(["verify", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {path}: a checkpoint of format 'torch_optimizer' has no digests to verify; convert it, which checks "
        "what its container states, or pass --weights to ask whether it belongs to them\n"
    )
    assert run(["verify", str(path), "--weights", str(path.parent)]) == 0


@pytest.mark.parametrize(
    ("folder", "rule"),
    [("transformers4.48.3-qwen2-full", "trainer-4.48"), ("transformers4.52.4-qwen2-full", "trainer-4.52")],
)
def test_the_names_of_a_model_in_optimizer_order(folder: str, rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    groups = json.loads((VERSIONS / folder / "names.json").read_text())["groups"]
    assert run(["names", str(VERSIONS / folder), "--rule", rule]) == 0
    assert capsys.readouterr().out.splitlines() == [name for group in groups for name in group]
    assert run(["names", str(VERSIONS / folder), "--rule", rule, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"] == groups
    assert run(["names", str(VERSIONS / folder), "--rule", "muon"]) == 2
    assert capsys.readouterr().err == "error: what the rule 'muon' makes depends on the optimizer's state\n"


def test_a_folder_where_a_file_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Functions that open this format alone take a checkpoint's folder too, and say what else to do with another."""
    (tmp_path / "run").mkdir()
    (tmp_path / "empty").mkdir()
    model = torch.nn.Linear(2, 2)
    save_optimizer(torch.optim.AdamW(model.parameters()), model, tmp_path / "run" / "optimizer.safetensors")
    monkeypatch.chdir(tmp_path / "run")
    assert lsf.verify(".").ok
    assert list(lsf.open_state(".")) == ["weight", "bias"]
    assert run(["verify", "."]) == 0
    monkeypatch.chdir(tmp_path / "empty")
    for opened in (lsf.verify, lsf.open_state):
        with pytest.raises(FileError) as caught:
            opened(".")
        assert str(caught.value) == (
            ".: a folder with neither training_state/optimizer.safetensors nor optimizer.safetensors in it: read opens "
            "a checkpoint of another format, and convert makes such a file of it"
        )
    assert run(["verify", "../run", "--weights", "."]) == 3
    assert capsys.readouterr().err == (
        "error: .: no weights in this folder; looked for adapter_model.safetensors, adapter_model.bin, "
        "model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json, "
        "pytorch_model_fsdp.bin\n"
    )
