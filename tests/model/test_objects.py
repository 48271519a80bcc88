"""States, parameters and tensors behave as Python's protocols promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_state_format.format.reading import open_state
from lora_state_format.format.writing import write
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import Group, Naming, Optimizer, OptimizerState, Parameter, PositionalState, Slot
from lora_state_format.model.tensors import Tensor, contiguous

ARRAY = np.arange(24, dtype="<f4").reshape(2, 3, 4)


def tensor() -> Tensor:
    return contiguous("F32", ARRAY.shape, Memory(ARRAY.tobytes()))


def parameter(name: str = "w") -> Parameter:
    return Parameter(name, (2, 3, 4), {"step": 3, "exp_avg": Slot(tensor())})


def state(count: int) -> OptimizerState:
    parameters = tuple(parameter(f"layers.{number}.w") for number in range(count))
    optimizers = (Optimizer("torch.optim.adamw.AdamW"),)
    return OptimizerState(optimizers, (Group(0, (), count),), parameters, Naming("model"), global_step=7)


def test_a_parameter_is_a_mapping_by_slot() -> None:
    found = parameter()
    assert "exp_avg" in found
    assert "nosuch" not in found
    assert list(found) == list(found.keys()) == ["step", "exp_avg"]
    assert dict(found) == {**found} == {"step": 3, "exp_avg": found["exp_avg"]}
    assert found.get("nosuch", 5) == 5
    assert len(found) == 2
    for idle in (Parameter("w", (2,), None), Parameter("w", (2,), {})):
        assert (list(idle), len(idle), bool(idle)) == ([], 0, True), "a record is true, whatever it holds"


def test_a_tensor_is_an_array_for_numpy() -> None:
    assert np.array_equal(np.asarray(tensor()), ARRAY)
    assert np.asarray(tensor(), dtype="f8").dtype == np.float64
    assert np.array_equal(np.sqrt(tensor()), np.sqrt(ARRAY))
    with pytest.raises(ValueError, match=r"^a tensor's bytes are read from its file: an array of them is "):
        tensor().__array__(copy=False)


def test_slicing_reads_nothing_and_keeps_the_axes() -> None:
    for index in (np.s_[1:2], np.s_[:, 1:], np.s_[0:1, 1:3, -2:], np.s_[:, :, 4:]):
        part = tensor()[index]
        assert part.shape == ARRAY[index].shape
        assert np.array_equal(part.numpy(), ARRAY[index])
    with pytest.raises(TypeError) as integer:
        tensor()[0]  # type: ignore[index]
    assert str(integer.value) == "0: a tensor of shape [2, 3, 4] takes up to 3 slices"
    with pytest.raises(ValueError, match=r"^slice\(None, None, 2\): a slice of a tensor has no step$"):
        tensor()[::2]


def test_what_is_shown_of_a_large_state_fits_a_screen() -> None:
    assert repr(state(392)) == (
        "OptimizerState(AdamW: 392 parameters in groups of [392], step 7; names from model)\n"
        "  Parameter('layers.0.w', [2, 3, 4]: step, exp_avg)\n"
        "  Parameter('layers.1.w', [2, 3, 4]: step, exp_avg)\n"
        "  Parameter('layers.2.w', [2, 3, 4]: step, exp_avg)\n"
        "  ... and 389 more"
    )
    assert repr(Parameter("w", (2,), None)) == "Parameter('w', [2]: never stepped)"
    assert repr(Parameter("w", (2,), {})) == "Parameter('w', [2]: no slots)"
    assert repr(tensor()) == "Tensor(F32, [2, 3, 4])"
    groups = tuple(Group(0, (), 1) for _ in range(9))
    positional = PositionalState((Optimizer(),), groups, tuple(range(9)), {})
    assert repr(positional) == "PositionalState(unknown class: 9 parameters in 9 groups; without names)"


def test_a_state_that_is_left_open_ends_quietly(tmp_path: Path) -> None:
    """An interpreter that ends with a state open prints nothing, however much of it is gone by then."""
    write(state(2), tmp_path / "s.safetensors")
    code = "import sys, lora_state_format as lsf; sys.kept = [lsf.open_state(sys.argv[1])]; sys.kept.append(sys.kept)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "s.safetensors")], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
    opened = open_state(tmp_path / "s.safetensors")
    opened.close()
    opened.close()
