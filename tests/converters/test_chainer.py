"""Files that Chainer 7.8 wrote (``tests/golden/chainer``), against what its update rules held."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_state_format import registry
from lora_state_format.errors import FileError, MissingNamesError, RefusedError
from lora_state_format.operations.conversion import convert, read

FILES = Path(__file__).parents[1] / "golden" / "chainer" / "files"


def saved(path: Path, arrays: dict[str, Any]) -> None:
    np.savez(path, **arrays)


def expected(name: str) -> dict[tuple[str, str], np.ndarray[Any, Any]]:
    found = {}
    with np.load(FILES / "expected.npz") as held:
        for key in held.files:
            which, path, slot = key.replace("|", "/").split(":")
            if which == name:
                found[path, slot] = held[key]
    return found


@pytest.mark.parametrize(
    ("name", "held", "step"),
    [("adam", "adam", 3), ("sgd", "sgd", 3), ("compressed", "sgd", 3), ("snapshot", "snapshot", 2)],
)
def test_an_optimizer_and_a_snapshot(name: str, held: str, step: int, tmp_path: Path) -> None:
    path = FILES / f"{name}.npz"
    assert registry.detect(path)[0].NAME == "chainer"
    convert(path, tmp_path / "optimizer.safetensors")
    for source in (path, tmp_path / "optimizer.safetensors"):
        with read(source) as state:
            assert state.global_step == step
            found = {(p.name, slot): t for p in state.parameters for slot, t in p.items() if slot != "t"}
            assert found.keys() == expected(held).keys()
            for key, tensor in found.items():
                assert np.array_equal(tensor.numpy(), expected(held)[key]), key
            assert all(parameter["t"].item() == step for parameter in state.parameters)


def test_parameters_without_slots_keep_their_names(tmp_path: Path) -> None:
    """As Chainer's SGD saves them: counters alone. Nothing shows a shape, so the weights have to be given."""
    saved(tmp_path / "sgd.npz", {"t": 3, "epoch": 0, "a/W/t": 3, "b/W/t": 3})
    with pytest.raises(MissingNamesError) as caught:
        read(tmp_path / "sgd.npz")
    assert "'a/W' (id a/W) has no slot that shows its shape" in str(caught.value)


def test_arrays_that_are_pickles_or_damaged(tmp_path: Path) -> None:
    sound: dict[str, Any] = {"t": 3, "epoch": 0, "a/W/t": 3}
    path = tmp_path / "x.npz"
    saved(path, sound | {"a/W/m": np.array([None, 1], dtype=object)})
    with pytest.raises(RefusedError) as caught:
        read(path)
    assert str(caught.value) == (
        f"{path}: the array 'a/W/m.npy' is of type '|O'; little-endian numbers in C order are read, and no pickle is "
        "run"
    )
    saved(path, sound | {"a/W/m": np.asfortranarray(np.ones((2, 3)))})
    with pytest.raises(RefusedError, match="in Fortran order"):
        read(path)
    for text, words in {
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}": "has the shape",
        b"__import__('os').system('true')": "has a header that is not NumPy's",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (9,)}": "has 4 bytes, where its header says 36",
    }.items():
        saved(path, sound)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("a/W/m.npy", b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + bytes(4))
        with pytest.raises(FileError, match=words):
            read(path)
    np.savez_compressed(path, **(sound | {"a/W/m": np.ones(1000)}))
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"a/W/m.npy") + 30] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(FileError, match="its compressed arrays cannot be unpacked"):
        read(path)
