"""Keras 3's files: golden ones, and in the environment of frameworks those of each optimizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_state_format import registry
from lora_state_format.converters import keras as converter
from lora_state_format.errors import FileError, MissingNamesError, RefusedError
from lora_state_format.model.states import OptimizerState, PositionalState
from lora_state_format.operations.conversion import convert, read

pytest.importorskip("h5py")
FILES = Path(__file__).parents[1] / "golden" / "keras" / "files"

PATHS = {
    "layers/dense/vars/0": "sequential/first/kernel",
    "layers/dense/vars/1": "sequential/first/bias",
    "layers/batch_normalization/vars/0": "sequential/batch_normalization/gamma",
    "layers/batch_normalization/vars/1": "sequential/batch_normalization/beta",
    "layers/dense_1/vars/0": "sequential/dense/kernel",
    "layers/dense_1/vars/1": "sequential/dense/bias",
    "layers/dense_2/vars/0": "sequential/dense_1/kernel",
    "layers/dense_2/vars/1": "sequential/dense_1/bias",
}
"""What a variable is called in the newer files, and its path in the model, which the older files have."""


def expected(name: str) -> dict[str, np.ndarray[Any, Any]]:
    """The optimizer's variables by the names that Keras gave them."""
    with np.load(FILES / "expected.npz") as held:
        return {key.partition("|")[2]: held[key] for key in held.files if key.startswith(f"{name}|")}


def assert_holds(state: OptimizerState, held: dict[str, np.ndarray[Any, Any]]) -> None:
    """Each slot of each parameter has its variable's bytes; nothing is left over."""
    left = dict(held)
    assert int(left.pop("iteration")) == state.global_step
    assert float(left.pop("learning_rate")) == dict(state.groups[0].options)["learning_rate"]
    for parameter in state.parameters:
        for slot, tensor in parameter.items():
            name = PATHS.get(parameter.name, parameter.name).replace("/", "_")
            assert np.array_equal(tensor.numpy(), left.pop(f"{name}_{slot}")), (parameter.name, slot)
    assert not left


@pytest.mark.parametrize("suffix", [".keras", ".h5", ".weights.h5"])
def test_a_model_with_its_optimizer(suffix: str, tmp_path: Path) -> None:
    """Two of its matrices have the same shape, and the statistics of its normalisation that of four parameters."""
    path = FILES / f"adamw{suffix}"
    assert registry.detect(path)[0].NAME == "keras"
    with read(path) as state:
        assert list(state) == list(PATHS.values() if suffix == ".h5" else PATHS)
        assert_holds(state, expected("adamw"))
        options = dict(state.groups[0].options)
        if suffix != ".weights.h5":
            assert state.optimizers[0].class_path == "keras.optimizers.AdamW"
            assert (options["weight_decay"], options["beta_1"], options["epsilon"]) == (0.1, 0.9, 1e-07)
    convert(path, tmp_path / "optimizer.safetensors")
    with read(tmp_path / "optimizer.safetensors") as named:
        assert_holds(named, expected("adamw"))


def test_layers_in_layers_need_names(tmp_path: Path) -> None:
    """Keras writes an attention's query, key and value by their names; its optimizer has another order."""
    path = FILES / "attention.keras"
    with pytest.raises(MissingNamesError):
        read(path)
    held = expected("attention")
    names = [key.removesuffix("_momentum") for key in held if key.endswith("_momentum")]
    with read(path, names=names) as state:
        assert_holds(state, held)


def test_damaged_and_other_files(tmp_path: Path) -> None:
    """Each is read, or refused in words, and leaves nothing open."""
    whole = (FILES / "adamw.h5").read_bytes()
    for size in (8, 100, 5000, len(whole) - 100):
        path = tmp_path / f"{size}.h5"
        path.write_bytes(whole[:size])
        with pytest.raises(FileError):
            read(path)
    import h5py

    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = np.ones(3)
    with pytest.raises(FileError) as caught:
        read(tmp_path / "other.h5")
    assert str(caught.value) == f"{tmp_path / 'other.h5'}: {converter.NO_OPTIMIZER}"
    with h5py.File(tmp_path / "packed.h5", "w") as file:
        file.create_dataset("optimizer/vars/0", data=np.ones((50, 50)), compression="gzip")
    with pytest.raises(RefusedError) as refused:
        read(tmp_path / "packed.h5")
    assert str(refused.value) == (
        f"{tmp_path / 'packed.h5'}: the dataset 'optimizer/vars/0' (float64) is stored in chunks, compressed, "
        "big-endian or elsewhere, where datasets in one piece are read; Keras writes such ones"
    )


def test_variables_of_keras_2_are_refused(tmp_path: Path) -> None:
    """In the layout of TensorFlow 2's Keras, by hand: variables under numbers."""
    import h5py

    with h5py.File(tmp_path / "old.h5", "w") as file:
        file["optimizer_weights/training/Adam/Variable_7:0"] = np.ones((2, 3))
        file["optimizer_weights"].attrs["weight_names"] = [b"training/Adam/Variable_7:0"]
    with pytest.raises(RefusedError) as caught:
        read(tmp_path / "old.h5")
    assert str(caught.value) == (
        f"{tmp_path / 'old.h5'}: the optimizer's variable 'training/Adam/Variable_7:0' names no parameter of the "
        "model: Keras 2 and TensorFlow number them; load the model with Keras 3 and save it again"
    )


# --- every optimizer ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keras() -> Any:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    return pytest.importorskip("keras")


def trained(keras: Any, optimizer: Any, *, frozen: bool = False) -> Any:
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4), layers.Dense(4, trainable=not frozen), layers.Dense(2)]
    )
    model.compile(optimizer, "mse")
    model.fit(np.random.rand(8, 4).astype("float32"), np.zeros((8, 2), "float32"), epochs=2, verbose=0)
    return model


def live(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {variable.path.partition("/")[2]: variable.numpy() for variable in model.optimizer.variables}


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adadelta", "Adam", "AdamW", "Adamax", "Lamb", "Lion", "RMSprop"])
def test_every_optimizer_by_number_and_by_name(name: str, keras: Any, tmp_path: Path) -> None:
    options = {"momentum": 0.9} if name == "SGD" else {}
    model = trained(keras, getattr(keras.optimizers, name)(1e-2, **options))
    model.save(tmp_path / "model.keras")
    model.save(tmp_path / "model.h5")
    paths = [variable.path for variable in model.trainable_variables]
    with read(tmp_path / "model.h5") as by_name, read(tmp_path / "model.keras", names=paths) as by_number:
        assert_holds(by_name, live(model))
        assert_holds(by_number, live(model))
        assert list(by_name) == paths
    with read(tmp_path / "model.keras") as state:
        for parameter, path in zip(state.parameters, paths, strict=True):
            for slot, tensor in parameter.items():
                assert np.array_equal(tensor.numpy(), live(model)[f"{path.replace('/', '_')}_{slot}"])


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore")
def test_more_variables_are_refused_and_the_older_form_has_their_names(keras: Any, tmp_path: Path) -> None:
    model = trained(keras, keras.optimizers.Adam(1e-2, amsgrad=True, name="adam"))
    model.save(tmp_path / "model.keras")
    with pytest.raises(RefusedError) as caught:
        read(tmp_path / "model.keras")
    assert str(caught.value) == (
        f"{tmp_path / 'model.keras'}: its optimizer 'adam' has 20 numbered variables, and what each of them is is not "
        "known here: save the model as .h5 (model.save('model.h5')), which keeps their names"
    )
    model.save(tmp_path / "model.h5")
    with read(tmp_path / "model.h5") as state:
        assert_holds(state, live(model))


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore")
def test_a_frozen_layer_that_looks_like_another(keras: Any, tmp_path: Path) -> None:
    """The variables do not say which of the two was trained: named by the older form, refused in the newer."""
    model = trained(keras, keras.optimizers.Adam(1e-2), frozen=True)
    model.save(tmp_path / "model.keras")
    model.save(tmp_path / "model.h5")
    state = registry.read(tmp_path / "model.keras").state
    assert isinstance(state, PositionalState)
    with pytest.raises(Exception, match="no order of the 6 parameters fits the 4 of the optimizer"):
        read(tmp_path / "model.keras")
    with read(tmp_path / "model.h5") as named:
        assert_holds(named, live(model))
