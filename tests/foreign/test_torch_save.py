"""Files written without torch, loaded by torch and by Python's zipfile."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_state_format.errors import TargetExistsError, UnrepresentableError
from lora_state_format.foreign import pickles
from lora_state_format.foreign.torch_save import _STORAGES, _UNTYPED, _directory, save
from lora_state_format.model.dtypes import item_size
from lora_state_format.model.sources import File, Memory
from lora_state_format.model.states import Scalar
from lora_state_format.model.tensors import contiguous

TENSORS = {
    dtype: contiguous(dtype, (2, 3), Memory(bytes(i % 2 for i in range(6 * item_size(dtype)))))
    for dtype in (*_STORAGES, *_UNTYPED)
}

PLAIN: dict[str, Any] = {
    "int": [0, 255, 256, -1, 2**31, -(2**31), 2**70, -(2**40)], "float": [1.5, -0.0, 5e-324, math.inf],
    "other": [None, True, False, "é", b"\0\xff", "x" * 300], "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    "nested": {"list": [[], [{}]], 7: {"key": "value"}, None: 0},
}  # fmt: skip


def test_torch_loads_what_was_written(tmp_path: Path) -> None:
    tree = {
        **PLAIN,
        "tensors": TENSORS,
        "scalar": Scalar("F32", b"\0\0\x80\x3f"),
        "empty": contiguous("F32", (0, 4), Memory(b"")),
    }
    save(tree, tmp_path / "x.pt")
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert {key: loaded[key] for key in PLAIN} == PLAIN
    assert [type(value) for value in loaded["other"]] == [type(value) for value in PLAIN["other"]]
    assert math.copysign(1, loaded["float"][1]) == -1
    for dtype, tensor in TENSORS.items():
        assert loaded["tensors"][dtype].shape == (2, 3)
        assert bytes(loaded["tensors"][dtype].view(torch.uint8).flatten().tolist()) == bytes(tensor.bytes())
    assert loaded["scalar"].item() == 1.0
    assert loaded["empty"].shape == (0, 4)
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is None


def test_our_own_reader_gives_the_same(tmp_path: Path) -> None:
    save({**PLAIN, "tensors": TENSORS}, tmp_path / "x.pt")
    with File(tmp_path / "x.pt") as file:
        value: Any = pickles.load(file).value
        assert {key: value[key] for key in PLAIN} == PLAIN
        for dtype, tensor in TENSORS.items():
            assert (value["tensors"][dtype].dtype, value["tensors"][dtype].bytes()) == (dtype, tensor.bytes())
            source = value["tensors"][dtype].runs[0].source
            assert source.start % 64 == 0
            assert source.crc32 is not None


def test_a_tensor_is_stored_once(tmp_path: Path) -> None:
    tensor = TENSORS["F32"]
    save([tensor, tensor], tmp_path / "x.pt")
    first, second = torch.load(tmp_path / "x.pt", weights_only=True)
    assert first.data_ptr() == second.data_ptr()


def test_members_beyond_four_gigabytes_are_described_in_zip64() -> None:
    """The directory alone: sizes and offsets that 32 bits do not hold stand in an extra field, as Python reads them."""
    big = 5 << 30
    directory = _directory([(b"archive/data/0", 64, big, 1), (b"archive/data/1", big + 128, 8, 2)], big + 256)
    assert (64).to_bytes(8, "little") not in directory
    assert directory.count(big.to_bytes(8, "little")) == 2
    assert (big + 128).to_bytes(8, "little") in directory
    assert (big + 256).to_bytes(8, "little") in directory
    assert b"PK\6\6" in directory
    assert b"PK\6\7" in directory


def test_what_torch_could_not_load_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnrepresentableError) as error:
        save({"a": {1, 2}}, tmp_path / "x.pt")
    assert str(error.value) == "a set cannot be written into a file that torch loads"
    with pytest.raises(UnrepresentableError) as dtype:
        save(contiguous("F6_E2M3", (4,), Memory(bytes(3))), tmp_path / "x.pt")
    assert str(dtype.value) == "torch has no storage for F6_E2M3"
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    save(1, tmp_path / "x.pt")
    with pytest.raises(TargetExistsError) as error:
        save(2, tmp_path / "x.pt")
    assert str(error.value) == f"{tmp_path / 'x.pt'} exists; pass force=True to replace it"
    save(2, tmp_path / "x.pt", force=True)
    assert torch.load(tmp_path / "x.pt") == 2
