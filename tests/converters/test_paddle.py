"""What Paddle 3.3 saves with ``paddle.save`` (``tests/golden/paddle``), against what its optimizers held."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from lora_state_format import registry
from lora_state_format.errors import FileError, OptionError, RefusedError
from lora_state_format.foreign import pickles
from lora_state_format.model.states import OptimizerState
from lora_state_format.operations.conversion import convert, read

FILES = Path(__file__).parents[1] / "golden" / "paddle" / "files"
OPTIMIZERS = {"adamw": "adamw", "momentum": "sgd"}


def holds(state: OptimizerState, name: str, prefix: dict[str, str] | None = None) -> None:
    with np.load(FILES / name / "expected.npz") as held:
        expected = dict(held)
    for key, value in expected.items():
        parameter, slot = key.split(":")
        found = state[parameter if prefix is None else prefix[parameter]][slot]
        assert np.array_equal(found.numpy(), value), key
    assert len(state) == len({key.split(":")[0] for key in expected})


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("place", ["", "model.pdopt"])
def test_it_holds_what_paddle_held(tmp_path: Path, name: str, place: str) -> None:
    path = FILES / name / place
    assert registry.detect(path)[0].NAME == "paddle"
    report = convert(
        path,
        tmp_path / "optimizer.safetensors",
        optimizer=OPTIMIZERS[name],
        options={"momentum": 0.9} if name == "momentum" else {},
    )
    assert report.paired == report.parameters
    with read(tmp_path / "optimizer.safetensors") as state:
        holds(state, name)
        options = dict(state.groups[0].options)
        if name == "adamw":
            assert (state.global_step, options["betas"]) == (5, (0.9, 0.95))
            assert options["lr"] == pytest.approx(0.01 * 0.1**2)
        else:
            assert (state.global_step, options) == (None, {"momentum": 0.9})


def test_without_the_model_tensors_have_their_own_names(tmp_path: Path) -> None:
    shutil.copy(FILES / "adamw" / "model.pdopt", tmp_path)
    with read(tmp_path / "model.pdopt", optimizer="adamw") as state:
        assert list(state)[:2] == ["linear_0.w_0", "linear_0.b_0"]
        with np.load(FILES / "adamw" / "expected.npz") as held:
            assert np.array_equal(state["linear_0.w_0"]["exp_avg"].numpy(), held["0.weight:exp_avg"])


def test_what_has_to_be_told(tmp_path: Path) -> None:
    path = FILES / "adamw" / "model.pdopt"
    with pytest.raises(OptionError) as caught:
        read(path)
    assert str(caught.value) == (
        f"{path}: '0.weight' holds moment1_0, moment2_0, and the file does not name its optimizer; it fits adam, "
        "adamw; pass the right one as optimizer="
    )
    tree = pickle.loads(path.read_bytes())
    for key in tree:
        if key.endswith("beta2_pow_acc_0"):
            tree[key] = np.multiply.reduce(np.full((6, 1), 0.97, np.float32))  # after 5 steps
    (tmp_path / "model.pdopt").write_bytes(pickle.dumps(tree, 4))
    with pytest.raises(OptionError) as caught:
        read(tmp_path / "model.pdopt", optimizer="adamw")
    assert str(caught.value) == (
        f"{tmp_path / 'model.pdopt'}: 'linear_0.w_0': neither the number of steps nor the betas are known; pass one of "
        "them, as in options={'step': ...}"
    )
    with read(tmp_path / "model.pdopt", optimizer="adamw", options={"step": 5}) as state:
        assert (state.global_step, dict(state.groups[0].options)["betas"]) == (5, (0.9, 0.97))


def test_damaged_and_hostile_files(tmp_path: Path) -> None:
    path = tmp_path / "model.pdopt"
    good = (FILES / "adamw" / "model.pdopt").read_bytes()
    path.write_bytes(good[:-20])
    with pytest.raises(FileError):
        read(path, optimizer="adamw")
    path.write_bytes(pickle.dumps([1], 4))
    with pytest.raises(FileError) as caught:
        read(path, optimizer="adamw")
    assert str(caught.value) == f"{path}: not what paddle.save makes of a state dict"
    path.write_bytes(pickle.dumps({"linear_0.w_0_ubermoment_0": np.ones(2, np.float32)}, 4))
    with pytest.raises(RefusedError) as caught:
        read(path, optimizer="adamw")
    assert str(caught.value) == (
        f"{path}: 'linear_0.w_0_ubermoment_0' is of an accumulator that is not known; known are beta1_pow_acc_0, "
        "beta2_pow_acc_0, moment1_0, moment2_0, velocity_0"
    )
    path.write_bytes(b"\x80\x04cos\nsystem\nX\4\0\0\0true\x85R.")
    with pytest.raises(FileError):
        read(path, optimizer="adamw")


def test_arrays_in_a_pickle_may_be_larger_than_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is no payload counts towards the limit of a pickle."""
    monkeypatch.setattr(pickles, "MAX_PICKLE", 1 << 17)
    tree = pickle.loads((FILES / "momentum" / "model.pdopt").read_bytes())
    tree["linear_9.w_0_velocity_0"] = np.ones((1 << 16,), np.float32)
    (tmp_path / "model.pdopt").write_bytes(pickle.dumps(tree, 4))
    with read(tmp_path / "model.pdopt", optimizer="sgd") as state:
        assert state["linear_9.w_0"].shape == (1 << 16,)
    (tmp_path / "model.pdopt").write_bytes(b"\x80\x04" + b"N0" * (1 << 18) + b"}.")
    with pytest.raises(FileError, match="more than 131072 bytes that are no array's"):
        read(tmp_path / "model.pdopt", optimizer="sgd")
