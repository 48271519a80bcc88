"""Every checkpoint below a folder, the newest of a run, and what a path is that holds none."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_state_format import registry
from lora_state_format.cli import run
from lora_state_format.errors import UnknownFormatError

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
    assert run(["inspect", str(many), "--recursive", "--json"]) == 0
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
    assert run(["inspect", str(many), "--recursive"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == (
        f"{many / 'run' / 'checkpoint-3'} (torch_optimizer): 10 parameters, step 3; names: adapter, "
        "adapter_model.safetensors"
    )


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
