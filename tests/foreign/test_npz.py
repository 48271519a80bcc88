"""Compressed archives of NumPy's arrays: unpacked on disk, not in memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_state_format.errors import FileError, RefusedError
from lora_state_format.foreign import npz
from lora_state_format.model.sources import File


def test_compressed_arrays_are_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    arrays: dict[str, Any] = {"a": np.zeros(1 << 22, np.float32), "b": np.arange(1 << 20), "c": np.array(3.0)}
    np.savez_compressed(path, a=arrays["a"], b=arrays["b"], c=arrays["c"])
    tracemalloc.start()
    with File(path) as file:
        found = npz.read_npz(file, path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 << 20
        for name, array in arrays.items():
            assert np.array_equal(found[name].numpy(), array), name


def test_more_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, a=np.zeros(1000))
    monkeypatch.setattr(npz, "MOST", 8000)
    with File(path) as file, pytest.raises(RefusedError) as caught:
        npz.read_npz(file, path)
    assert str(caught.value) == (f"{path}: its compressed arrays unpack to more than 0 GiB: save them with numpy.savez")


def test_a_damaged_member_leaves_nothing_open(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, a=np.arange(1000))
    data = bytearray(path.read_bytes())
    data[200] ^= 255
    path.write_bytes(data)
    with File(path) as file, pytest.raises(FileError, match="its compressed arrays cannot be unpacked"):
        npz.read_npz(file, path)
