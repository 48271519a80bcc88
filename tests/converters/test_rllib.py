"""A learner's checkpoint that RLlib 2.60 wrote (``tests/golden/rllib``), against what its optimizer held."""

from __future__ import annotations

import pickle
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


def test_a_policy_of_the_old_stack(tmp_path: Path) -> None:
    """Laid out as ``Policy.get_state`` and ``TorchPolicy.get_state`` of RLlib's source have it: from source only."""
    rng = np.random.default_rng(0)
    weights = {
        name: rng.random(shape, np.float32) for name, shape in {"b.w": (3, 4), "a.w": (4, 3), "a.b": (4,)}.items()
    }
    entries = {
        number: {"step": np.array(2.0, np.float32), "exp_avg": array * 2, "exp_avg_sq": array * 3}
        for number, array in enumerate(weights.values())
    }
    groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1, 2]}]
    tree = {
        "weights": weights,
        "global_timestep": 100,
        "connector_configs": {},
        "_optimizer_variables": [{"state": entries, "param_groups": groups}],
        "_exploration_state": {},
    }
    folder = tmp_path / "policies" / "default_policy"
    folder.mkdir(parents=True)
    (folder / "policy_state.pkl").write_bytes(pickle.dumps(tree))
    for path in (tmp_path, folder, folder / "policy_state.pkl"):
        assert registry.detect(path)[0].NAME == "rllib"
        with read(path) as state:
            assert list(state) == list(weights)
            for name, array in weights.items():
                assert np.array_equal(state[name]["exp_avg"].numpy(), array * 2)
                assert np.array_equal(state[name]["exp_avg_sq"].numpy(), array * 3)
