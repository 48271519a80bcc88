"""A learner's checkpoint that RLlib 2.60 wrote (``tests/golden/rllib``), against what its optimizer held."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from lora_state_format import registry
from lora_state_format.errors import FileError, RefusedError
from lora_state_format.operations.conversion import convert, read

FILES = Path(__file__).parents[1] / "golden" / "rllib" / "files"
LEARNER = FILES / "learner_group" / "learner"


@pytest.mark.parametrize("path", [FILES, LEARNER, LEARNER / "state.pkl"], ids=["algorithm", "learner", "file"])
def test_the_learner_of_an_algorithm(path: Path, tmp_path: Path) -> None:
    """Its module has buffers of one element among the parameters."""
    assert registry.detect(path)[0].NAME == "rllib"
    convert(path, tmp_path / "optimizer.safetensors")
    with np.load(FILES / "expected.npz") as held:
        expected = dict(held)
    for source in (path, tmp_path / "optimizer.safetensors"):
        with read(source) as state:
            found = {f"{p.name}:{slot}": value for p in state.parameters for slot, value in p.items()}
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                ours = found[key].numpy() if value.shape else found[key]
                assert np.array_equal(ours, value), key
            assert dict(state.groups[0].options)["betas"] == (0.9, 0.999)


def test_damaged_and_hostile_files(tmp_path: Path) -> None:
    shutil.copytree(LEARNER, tmp_path / "learner")
    path = tmp_path / "learner" / "state.pkl"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(FileError):
        read(path)
    path.write_bytes(b"\x80\x05}.")
    with pytest.raises(FileError) as caught:
        read(path)
    assert str(caught.value) == f"{path}: no optimizer's state dict in it (a dict with state and param_groups)"
    path.write_bytes(b"\x80\x02cos\nsystem\nX\4\0\0\0true\x85R.")
    with pytest.raises(RefusedError):
        read(path)
