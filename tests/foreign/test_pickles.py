from __future__ import annotations

import argparse
import collections
import contextlib
import datetime as dt
import enum
import functools
import importlib.util
import io
import json
import pathlib
import pickle
import pickletools
import random
import re
import struct
import subprocess
import sys
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_state_format.errors import FileError, UnrepresentableError
from lora_state_format.foreign import pickles
from lora_state_format.foreign.pickles import Foreign, Global, NumpyScalar, Pickled, Record
from lora_state_format.foreign.state_dict import find, from_state_dict
from lora_state_format.foreign.zips import Archive
from lora_state_format.model.sources import File, Memory, Range
from lora_state_format.model.tensors import Tensor

WILD = Path(__file__).parents[3] / "shared" / "wild"
DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64,
    torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


def _corpus() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "hostile_pickles", Path(__file__).parents[1] / "hostile" / "hostile_pickles.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


hostile = _corpus()


def as_torch(tensor: Tensor) -> torch.Tensor:
    dtype = getattr(torch, next(name for name, spelled in pickles.DTYPES.items() if spelled == tensor.dtype))
    data = tensor.bytes()
    flat = torch.frombuffer(data, dtype=torch.uint8).view(dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(tensor.shape)


def assert_same(ours: Any, theirs: Any) -> None:
    """What was read is what torch reads; its subclasses of dict are dicts here."""
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, Tensor)
        assert tuple(theirs.shape) == ours.shape
        mine, other = as_torch(ours), theirs.detach().contiguous()
        assert mine.dtype == other.dtype
        assert bytes(mine.reshape(-1).view(torch.uint8).numpy()) == bytes(other.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, (list, tuple)):
        assert isinstance(ours, list if isinstance(theirs, list) else tuple)
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)
    else:
        assert type(ours) is type(theirs)
        assert ours == theirs


def read(value: Any, **options: Any) -> Pickled:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return pickles.load(Memory(buffer.getvalue()), "saved")


def values() -> dict[Any, Any]:
    """Everything that may stand in a state dict, and what often stands beside one."""
    base = torch.arange(60.0).reshape(3, 4, 5)
    return {
        "whole": base,
        "view": base[1],
        "transposed": base.transpose(0, 2),
        "every other": base[::2, 1:3, ::2],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 3),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "one axis of one": base[:, :1, 2:3],
        "scalar": torch.tensor(3.0),
        "part of a storage as scalar": base[1, 2, 3],
        "nothing": torch.empty(0, 7),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "requires grad": torch.ones(2, requires_grad=True),
        "numbers": [0, 1, -1, 255, 256, 65535, 65536, -(1 << 31), 1 << 31, 1 << 63, -(1 << 100), 0.1, -0.0, 1e308],
        "constants": (None, True, False, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "text": ["", "x", "ü€𝄞", "y" * 300],
        "bytes": [b"", b"\x00\xff", b"z" * 300, bytearray(b"w")],
        "complex": 1 - 2j,
        "sets": {1, 2},
        "ordered": collections.OrderedDict(b=1, a=base[0]),
        "counter": collections.Counter("aab"),
        5: {"keys": {None: 1, True: 2, 2.5: 3, (1, "a"): 4}},
        "size": base.shape,
        "same list": [[1, 2]] * 3,
        "empty": [{}, []],
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_what_torch_saves_is_read_as_torch_reads_it(protocol: int, zipped: bool) -> None:
    saved = values()
    found = read(saved, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert (found.container, found.protocol) == ("zip" if zipped else "stream", protocol)
    assert_same(found.value, saved)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_every_dtype(dtype: torch.dtype, zipped: bool) -> None:
    counted = torch.arange(256, dtype=torch.uint8)
    tensor = (counted % 3 == 0 if dtype is torch.bool else counted.view(dtype)).reshape(2, -1)
    assert_same(
        read({"x": tensor, "t": tensor.T}, _use_new_zipfile_serialization=zipped).value, {"x": tensor, "t": tensor.T}
    )


def test_four_bit_floats_count_elements_where_torch_counts_pairs() -> None:
    pairs = torch.arange(12, dtype=torch.uint8).reshape(3, 4).view(torch.float4_e2m1fn_x2)
    found = read(pairs).value
    assert (found.dtype, found.shape, bytes(found.bytes())) == ("F4", (3, 8), bytes(range(12)))


def test_types_that_safetensors_lacks_are_inert() -> None:
    found = read({"a": torch.zeros(2, 3, dtype=torch.complex128), "b": torch.zeros(2).to_sparse(), "c": torch.ones(1)})
    assert repr(found.value["a"]) == "Record(module='torch', name='complex128', args=((2, 3),), state=None)"
    assert found.value["b"].name == "_rebuild_sparse_tensor"
    assert_same(found.value["c"], torch.ones(1))


def test_a_storage_that_several_tensors_share_is_one_source() -> None:
    base = torch.arange(10.0)
    found = read([base[:4], base[4:], base[::2]])
    (source,) = {piece.source for tensor in found.value for piece in tensor.pieces}
    assert list(found.storages.values()) == [source]
    assert (source.size, source.name) == (40, "archive/data/0")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_numpy_scalars_become_numbers(protocol: int) -> None:
    codes = ["?", "i1", "u2", "i4", "<u8", "f2", "f4", ">f8", "c8", "c16"]
    scalars = [np.dtype(code).type(True if code == "?" else 5) for code in codes]
    found = read(scalars, pickle_protocol=protocol).value
    assert all(type(item) is NumpyScalar for item in found)
    assert [item.value for item in found] == [True, 5, 5, 5, 5, 5.0, 5.0, 5.0, 5 + 0j, 5 + 0j]
    assert [item.dtype for item in found] == ["b1", "i1", "u2", "i4", "u8", "f2", "f4", "f8", "c8", "c16"]


def test_numpy_before_2_called_its_modules_otherwise() -> None:
    buffer = io.BytesIO()
    torch.save([np.float64(0.5), np.arange(3)], buffer)
    old = rezipped(buffer.getvalue(), lambda body: body.replace(b"numpy._core", b"numpy.core"))
    number, grid = pickles.load(Memory(old)).value
    assert (number.value, number.dtype) == (0.5, "f8")
    tensor = pickles.array(grid)
    assert tensor is not None
    assert tensor.numpy().tolist() == [0, 1, 2]


def rezipped(data: bytes, change: Callable[[bytes], bytes] = bytes) -> bytes:
    """The same archive with its pickle changed; without alignment, as other tools zip."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    changed: bytes = hostile.archive(
        {name: change(body) if name.endswith("data.pkl") else body for name, body in members.items()}
    )
    return changed


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numpy_arrays_are_records_that_array_turns_into_tensors(protocol: int) -> None:
    grid = np.arange(12, dtype="f4").reshape(3, 4)
    arrays = [grid, np.asfortranarray(grid), grid[:, ::2], np.array(7, "i8"), np.zeros((0, 3), "u1"), np.array([True])]
    for array, record in zip(arrays, read(arrays, pickle_protocol=protocol).value, strict=True):
        tensor = pickles.array(record)
        assert tensor is not None
        assert np.array_equal(tensor.numpy(), array)
    for array in (np.arange(3, dtype=">i4"), np.array(["a"]), np.array([None]), np.zeros(1, "c16")):
        assert pickles.array(read(array, pickle_protocol=protocol).value) is None


class DataKind(enum.Enum):
    IMAGE = "image"


def test_other_objects_are_inert() -> None:
    saved = {
        "namespace": argparse.Namespace(lr=0.1),
        "path": pathlib.PurePosixPath("a/b"),
        "date": dt.date(2020, 1, 2),
        "default": collections.defaultdict(list, {1: [2]}),
        "deque": collections.deque([1, 2]),
        "range": range(3),
        "partial": functools.partial(torch.optim.AdamW, lr=1),
        "loss": torch.nn.BCELoss(),
        "function": torch.nn.functional.binary_cross_entropy,
        "optimizer": torch.optim.AdamW,
        "space": types.SimpleNamespace(a=1),
        "enum": DataKind.IMAGE,
        "dtype": torch.float32,
        "device": torch.device("cuda:1"),
        "class": argparse.Namespace,
    }
    found = read(saved).value
    assert found.keys() == saved.keys()
    assert found["default"] == {1: [2]}
    assert str(found["dtype"]) == "torch.float32"
    assert (found["device"].name, found["device"].args) == ("device", ("cuda", 1))
    named = {"function": "torch.nn.functional.binary_cross_entropy", "optimizer": "torch.optim.adamw.AdamW"}
    for key, name in {**named, "class": "argparse.Namespace"}.items():
        assert type(found[key]) is Global
        assert str(found[key]) == name
    objects = [("namespace", "argparse", "Namespace"), ("date", "datetime", "date"), ("deque", "collections", "deque")]
    objects += [("range", "__builtin__", "xrange"), ("loss", "torch.nn.modules.loss", "BCELoss")]
    for key, module, name in objects:
        assert type(found[key]) is Foreign
        assert (found[key].module, found[key].name) == (module, name)


def test_what_python_2_pickled() -> None:
    """Its text is bytes, and its OrderedDict came with all its items at once."""
    body = b"ccollections\nOrderedDict\n]]U\1aaK\1aa\x85R" + b"U\2\xff\xfe" + b"c__builtin__\nset\n]K\5a\x85R\x87."
    assert pickles.load(Memory(hostile.saved(body))).value == ({"a": 1}, b"\xff\xfe", {5})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_dcp_metadata(tmp_path: Path) -> None:
    """Protocol 4, and objects as the keys of a dict."""
    from torch.distributed.checkpoint.state_dict_saver import save

    save({"state": {"w": torch.ones(2, 3)}}, checkpoint_id=tmp_path, no_dist=True)
    metadata = pickles.load_plain((tmp_path / ".metadata").read_bytes())
    assert (metadata.module, metadata.name) == ("torch.distributed.checkpoint.metadata", "Metadata")
    assert metadata.state["planner_data"] == {"state.w": ("state", "w")}
    ((index, info),) = metadata.state["storage_data"].items()
    assert (index.state["fqn"], info.name) == ("state.w", "_StorageInfo")
    with File(tmp_path / info.state["relative_path"]) as file:
        item = pickles.load(Range(file, info.state["offset"], info.state["length"]))
        assert_same(item.value, torch.ones(2, 3))


def test_a_zip_in_a_zip(tmp_path: Path) -> None:
    """As stable-baselines3 keeps its optimizers."""
    inner = io.BytesIO()
    torch.save({"x": torch.arange(5.0)}, inner)
    path = tmp_path / "a2c.zip"
    with zipfile.ZipFile(path, "w") as outer:
        outer.writestr("data", "{}")
        outer.writestr("policy.optimizer.pth", inner.getvalue())
    with File(path) as file:
        archive = Archive(file, path)
        assert list(archive) == ["data", "policy.optimizer.pth"]
        assert_same(pickles.load(archive["policy.optimizer.pth"]).value, {"x": torch.arange(5.0)})


@contextlib.contextmanager
def without_checksums() -> Iterator[None]:
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(True)


def test_archives_of_other_writers() -> None:
    """Another root, no alignment, no byteorder, and no checksums."""
    saved = {"x": torch.arange(5.0)}
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    assert_same(pickles.load(Memory(rezipped(buffer.getvalue()))).value, saved)
    with without_checksums():
        found = read(saved)
    assert_same(found.value, saved)
    assert [storage.crc32 for storage in found.storages.values()] == [None]


def test_an_archive_beyond_4_gib(tmp_path: Path) -> None:
    """Sizes and offsets that only fit in zip64's fields; the file is mostly a hole, and states no checksums."""
    tensors = [
        hostile.tensor(hostile.numbers(count), store=hostile.storage(key, count)) + b"R"
        for key, count in (("0", 5 << 28), ("1", 2))
    ]
    body = hostile.PROTO + b"](" + b"".join(tensors) + b"e."
    members = {b"a/data.pkl": (body, len(body)), b"a/data/0": (b"", 5 << 30), b"a/data/1": (b"\0\0\x80?\0\0\0@", 8)}
    directory = b""
    with (tmp_path / "x.pt").open("wb") as file:
        for name, (data, size) in members.items():
            at = file.tell()
            file.write(struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0x808, 0, 0, 0, 0, 0, 0, len(name), 0) + name)
            file.write(data)
            file.seek(at + 30 + len(name) + size)
            wide = [value for value in (size, size, at) if value > 0xFFFFFFFF]
            extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
            shown = [min(value, 0xFFFFFFFF) for value in (size, size)]
            directory += struct.pack("<4s6H3L", b"PK\1\2", 45, 45, 0x808, 0, 0, 0, 0, *shown)
            directory += struct.pack("<5H2L", len(name), len(extra), 0, 0, 0, 0, min(at, 0xFFFFFFFF)) + name + extra
        start = file.tell()
        file.write(directory)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, len(directory), start))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, start + len(directory), 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, len(directory), 0xFFFFFFFF, 0))
    with zipfile.ZipFile(tmp_path / "x.pt") as theirs:
        assert [info.file_size for info in theirs.infolist()] == [size for _, size in members.values()]
    with File(tmp_path / "x.pt") as source:
        large, small = pickles.load(source).value
        assert (large.size, large.part([(5 << 28) - 2], [2]).bytes()) == (5 << 30, bytes(8))
        assert small.numpy().tolist() == [1.0, 2.0]


def test_nothing_is_imported_that_could_run_a_pickle(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2), "n": np.float64(1.0)}, tmp_path / "x.pt")
    script = (
        "import sys; from lora_state_format.model import sources; from lora_state_format.foreign import pickles\n"
        f"pickles.load(sources.File({str(tmp_path / 'x.pt')!r}))\n"
        "print([name for name in ('torch', 'pickle', '_pickle', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "path", sorted([*WILD.glob("*/*.pt"), *WILD.glob("*/*.ckpt")]), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_other_peoples_files(path: Path) -> None:
    if path.parent.name == "broken-zip":
        with File(path) as file, pytest.raises(FileError) as caught:
            pickles.load(file)
        assert str(caught.value) == (
            f"{path}: the zip archive has no data.pkl among its 3 members: an interrupted torch.save, or another kind "
            "of archive"
        )
        return
    with File(path) as file:
        found = pickles.load(file)
        try:
            theirs = torch.load(path, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError:
            # NumPy's scalars and arrays, and classes as keys of a dict: torch refuses them, and they are inert here.
            assert path.parent.name in ("composer-momentum-none", "lightning-class-objects", "numpy-scalar-option")
            assert find_inert(found.value)
        else:
            assert_same(found.value, theirs)


def find_inert(value: Any) -> bool:
    if isinstance(value, dict):
        return any(find_inert(key) or find_inert(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return any(map(find_inert, value))
    return isinstance(value, (Record, Foreign, Global, NumpyScalar))


# --- hostile files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hostile.CASES)
def test_a_hostile_file_meets_its_one_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    case = hostile.CASES[name]
    path = tmp_path / "optimizer.pt"
    path.write_bytes(case.make())
    start = time.process_time()
    with File(path) as file, pytest.raises(FileError) as caught:
        pickles.load(file)
    assert time.process_time() - start < 5
    assert type(caught.value) is case.error
    assert str(caught.value) == f"{path}: {case.detail}"
    assert not (tmp_path / hostile.CANARY).exists()


@pytest.mark.parametrize("name", hostile.HARMLESS)
def test_what_only_looks_dangerous_is_read_past(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer next to it is read exactly, nothing is run, and time is bounded."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "optimizer.pt"
    path.write_bytes(hostile.HARMLESS[name]())
    start = time.process_time()
    with File(path) as file:
        ((found),) = find(pickles.load(file).value)
        assert from_state_dict(found).entries[0]["exp_avg"].tensor.shape == (4,)  # type: ignore[union-attr]
    assert time.process_time() - start < 5
    assert not (tmp_path / hostile.CANARY).exists()


def test_a_foreign_object_in_the_state_is_refused_by_name() -> None:
    tree = {"state": {0: {"projector": argparse.Namespace(a=1)}}, "param_groups": [{"params": [0], "lr": 1}]}
    with pytest.raises(UnrepresentableError) as caught:
        from_state_dict(read(tree).value)
    assert str(caught.value) == (
        "state.0.projector is an object of class argparse.Namespace, which has no form in a state"
    )


CONJUGATES = {
    "conj": torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "neg": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", CONJUGATES)
def test_a_tensor_that_is_yet_to_be_conjugated_or_negated_is_refused(name: str, zipped: bool) -> None:
    """torch keeps that as a bit: the bytes are not its values."""
    tree = {"state": {0: {"exp_avg": CONJUGATES[name]}}, "param_groups": [{"params": [0]}]}
    found = read(tree, _use_new_zipfile_serialization=zipped).value
    with pytest.raises(UnrepresentableError) as caught:
        from_state_dict(found)
    assert str(caught.value) == (
        "state.0.exp_avg is an object of class torch.Tensor that is to be conjugated or negated, which has no form in "
        "a state; load it with torch, and save tensor.resolve_conj().resolve_neg() in its place"
    )


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_what_is_said_of_tensors_without_a_form_works() -> None:
    """Each is saved again as its message says, and read."""
    odd = [
        *CONJUGATES.values(), torch.ones(2, 2).to_sparse(), torch.ones(2, 2).to_sparse_csr(),
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), torch.ones(2, dtype=torch.complex32),
        np.arange(3, dtype=">f8"),
    ]  # fmt: skip
    for value in odd:
        tree: dict[str, Any] = {"state": {0: {"exp_avg": value}}, "param_groups": [{"params": [0]}]}
        with pytest.raises(UnrepresentableError) as caught:
            from_state_dict(read(tree).value)
        told = re.search(r"and save (.*) in its place$", str(caught.value))
        assert told is not None, str(caught.value)
        again = eval(told[1], {"tensor": value, "array": value, "torch": torch})
        tree["state"][0]["exp_avg"] = again
        held: Any = from_state_dict(read(tree).value).entries[0]["exp_avg"]
        assert np.array_equal(held.tensor.numpy(), np.asarray(again))


ARRAYS = {
    "C": np.arange(27.0).reshape(3, 3, 3),
    "F": np.asfortranarray(np.arange(27.0).reshape(3, 3, 3)),
    "T": np.arange(9.0).reshape(3, 3).T,
    "K": np.arange(27.0).reshape(3, 3, 3).transpose(1, 0, 2),
    "K of other sizes": np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2),
    "K the other way": np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1),
    "reversed": np.arange(9.0).reshape(3, 3)[::-1],
    "bool": np.arange(9.0).reshape(3, 3) > 3,
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", ARRAYS)
def test_numpy_arrays_of_every_order(name: str, protocol: int) -> None:
    found = pickles.array(read({"x": ARRAYS[name]}, pickle_protocol=protocol).value["x"])
    assert found is not None
    assert as_torch(found).equal(torch.from_numpy(ARRAYS[name].copy()))


class DeviceTensor:
    """Pickles as torch pickles a tensor of XLA or DirectML (``Tensor._reduce_ex_internal``)."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        import torch._utils

        plain = self.tensor.float() if self.tensor.dtype is torch.bfloat16 else self.tensor
        return torch._utils._rebuild_device_tensor_from_numpy, (plain.numpy(), self.tensor.dtype, "cpu", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_tensors_of_devices_that_come_as_numpy_arrays(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 4).mul(100).to(dtype)
    buffer = io.BytesIO()
    torch.save({"x": DeviceTensor(tensor)}, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False)["x"].equal(tensor)  # torch itself reads it so
    assert as_torch(pickles.load(Memory(buffer.getvalue())).value["x"]).equal(tensor)


def test_the_corpus_would_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases are real: Python's own unpickler runs them."""
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(io.BytesIO(hostile.CASES["os-system"].make())) as archive:
        pickle.loads(archive.read("archive/data.pkl"))
    assert (tmp_path / hostile.CANARY).exists()


def test_hostile_files_take_little_memory(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(hostile.__file__), tmp_path], check=True)
    script = """
import json, pathlib, re, sys
from lora_state_format import errors
from lora_state_format.model import sources
from lora_state_format.foreign import pickles
peaks = {}
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        pickles.load(sources.File(path))
    except errors.FileError:
        status = pathlib.Path("/proc/self/status").read_text()
        peaks[path.stem] = int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) >> 10
print(json.dumps(peaks))
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], check=True, capture_output=True, text=True)
    peaks = json.loads(done.stdout)
    assert peaks.keys() == hostile.CASES.keys()
    assert max(peaks.values()) < 512


def accepted(data: bytes) -> None:
    """Read or refused; nothing else may come of any bytes."""
    try:
        found = pickles.load(Memory(data))
    except FileError:
        return
    assert isinstance(found, Pickled)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_damaged_files_are_read_or_refused(zipped: bool) -> None:
    buffer = io.BytesIO()
    with without_checksums():  # or nothing but they would be tested
        torch.save(values(), buffer, _use_new_zipfile_serialization=zipped)
    whole = bytearray(buffer.getvalue())
    chance = random.Random(0)
    for _ in range(2000):
        data = whole[:]
        for _ in range(chance.choice((1, 1, 2, 5))):
            at = chance.randrange(len(data))
            if chance.random() < 0.1:
                del data[at : at + chance.randrange(1, 9)]
            else:
                data[at] = chance.choice((0, 1, 0x7F, 0xFF, data[at] ^ 1 << chance.randrange(8)))
        accepted(bytes(data))


FRAGMENTS = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes] + [
    b"K\0", b"h\0", b"h\1", b"q\0", b"j\0\0\0\0", b"\x8c\1x", b"\x8a\1\5", hostile.storage(), hostile.tensor(), b"tR",
    b"ctorch._utils\n_rebuild_tensor_v3\n", b"ctorch\nfloat32\n", b"ctorch._tensor\n_rebuild_from_type_v2\n",
    b"ccollections\nOrderedDict\n", b"cbuiltins\nset\n", b"c_codecs\nencode\n", b"cnumpy\ndtype\n",
    b"cnumpy.core.multiarray\nscalar\n", b"cnumpy.core.multiarray\n_reconstruct\n", b"cargparse\nNamespace\n",
]  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=4)), max_size=40))
def test_any_program_is_read_or_refused(fragments: list[bytes]) -> None:
    accepted(hostile.saved(b"".join(fragments) + b"."))


def test_archives_with_one_pickle_have_their_own_bytes(tmp_path: Path) -> None:
    alike: dict[bytes, pickles.Pickled] = {}
    saved = [torch.arange(6.0).reshape(2, 3) + n for n in range(3)]
    for number, tensor in enumerate(saved):
        path = tmp_path / f"{number}.pt"
        torch.save(tensor.t(), path)
        with File(path) as file:
            loaded = pickles.load(file, alike=alike)
            assert loaded.value.shape == (3, 2)
            assert loaded.value.bytes() == tensor.t().contiguous().numpy().tobytes()
            assert loaded.storages["0"].source is file
    assert len(alike) == 1

    short = tmp_path / "short.pt"
    with zipfile.ZipFile(tmp_path / "0.pt") as whole, zipfile.ZipFile(short, "w") as archive:
        for member in whole.namelist():
            data = whole.read(member)
            archive.writestr(f"0/{member.partition('/')[2]}", data[:20] if member.endswith("data/0") else data)
    with File(short) as file, pytest.raises(FileError) as caught:
        pickles.load(file, alike=alike)
    detail = "storage '0' of 24 bytes, for which the file holds 20, at byte 98 of 0/data.pkl"
    assert str(caught.value) == f"{short}: {detail}"
