"""Files and sets: what is written, what is read, what is refused; every complaint word by word."""

from __future__ import annotations

import json
import os
import stat
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import safetensors.numpy

from lora_state_format.errors import DigestError, FileError, OptionError, TargetExistsError, UnrepresentableError
from lora_state_format.format import envelope, reading, writing
from lora_state_format.format.envelope import is_state
from lora_state_format.format.reading import Verification, open_state, verify
from lora_state_format.format.writing import write
from lora_state_format.io.atomic import TemporaryFile
from lora_state_format.io.safetensors import read_header
from lora_state_format.model import digests
from lora_state_format.model.dtypes import BITS
from lora_state_format.model.sources import File, Memory
from lora_state_format.model.states import Group, Naming, Optimizer, OptimizerState, Parameter, Role, Scalar, Slot
from lora_state_format.model.tensors import Box, Digest, Piece, Tensor, contiguous

VECTORS: Final = Path(__file__).parents[2] / "spec" / "vectors"


def make(*, scale: int = 1, parameters: int = 4, elements: int = 6, step: float = 1.0) -> OptimizerState:
    """AdamW over some parameters in two groups, the last one carried."""
    items = []
    for n in range(parameters):
        moments = {
            name: Slot(
                contiguous("F32", (elements,), Memory(np.full(elements, scale * (n + k), "<f4").tobytes())), Role.PARAM
            )
            for k, name in enumerate(("exp_avg", "exp_avg_sq"))
        }
        items.append(
            Parameter(f"layers.{n}.weight", (elements,), {"step": Scalar("F32", struct.pack("<f", step)), **moments})
        )
    return OptimizerState(
        optimizers=(Optimizer("torch.optim.adamw.AdamW"),),
        groups=(Group(0, (("lr", 0.5),), parameters - 2), Group(0, (("lr", 0.0),), 1)),
        parameters=tuple(items),
        naming=Naming("model"),
        globals={"scale": Slot(contiguous("F32", (1,), Memory(struct.pack("<f", scale))))},
        origin={"format": "test"},
        extra={"scale": scale},
        global_step=3,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "optimizer.safetensors"


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def contents(state: OptimizerState) -> Any:
    """What a state holds, to compare."""
    return (
        state.optimizers, state.groups, state.naming, dict(state.origin), dict(state.extra), state.global_step,
        [(p.name, p.shape, {key: _plain(value) for key, value in (p.state or {}).items()}) for p in state.parameters],
        {key: _plain(value) for key, value in state.globals.items()},
    )  # fmt: skip


def _plain(value: Any) -> Any:
    return (
        (value.tensor.dtype, value.tensor.shape, bytes(value.tensor.bytes()), value.role)
        if isinstance(value, Slot)
        else value
    )


# --- one file -----------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(path: Path) -> None:
    state = make()
    done = write(state, path)
    assert (done.path, done.files, done.size, done.tensors) == (str(path), (str(path),), path.stat().st_size, 9)
    with open_state(path) as found:
        assert contents(found) == contents(state)
        tensor = found["layers.1.weight"]["exp_avg"]
        assert tensor.digest == Digest("xxh3-128", "F32", digests.hash_tensor(tensor))
        assert [p.name for p in found.carried] == ["layers.3.weight"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        tensor.bytes()
    assert verify(path) == Verification(9, path.stat().st_size)
    raw = path.read_bytes()
    assert raw[58:90].decode() == done.digest


def test_equal_states_give_equal_bytes(path: Path) -> None:
    write(make(), path)
    write(make(), path.with_name("b"))
    with open_state(path) as found:
        write(found, path.with_name("c"))
    assert len({path.with_name(name).read_bytes() for name in (path.name, "b", "c")}) == 1
    write(make(scale=2), path.with_name("d"))
    assert path.read_bytes() != path.with_name("d").read_bytes()


def test_the_layout_of_a_file(path: Path) -> None:
    """W5, W7: wide items first, then the order of parameters, then labels; data at a multiple of 64."""
    slots = {label: Slot(contiguous(dtype, (1,), Memory(bytes(8)))) for label, dtype in
             {"z8": "U8", "y64": "F64", "x16": "BF16", "w64": "I64", "v8": "BOOL"}.items()}  # fmt: skip
    parameters = tuple(Parameter(name, (1,), slots) for name in ("b", "a"))
    groups = (Group(0, (), 2),)
    write(OptimizerState((Optimizer(),), groups, parameters, Naming("model"), globals={"g64": slots["y64"]}), path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].decode()
    members = json.loads(header)
    assert header.startswith('{"__metadata__":{"optimizer_state":"{\\"digest\\":\\"')
    assert [*members][1:] == [
        "b/w64", "b/y64", "a/w64", "a/y64", "$globals/g64", "b/x16", "a/x16", "b/v8", "b/z8", "a/v8", "a/z8",
    ]  # fmt: skip
    assert [*members["b/w64"]] == ["dtype", "shape", "data_offsets"]
    assert ": " not in header
    assert (8 + length) % 64 == 0
    assert len(header) - len(header.rstrip()) < 64
    for key, entry in members.items():
        if key != "__metadata__":
            assert (8 + length + entry["data_offsets"][0]) * 8 % BITS[entry["dtype"]] == 0


def test_a_tensor_in_pieces_is_written_as_one(path: Path) -> None:
    array = np.arange(12, dtype="<f4").reshape(3, 4)
    columns = tuple(
        Piece(Memory(np.ascontiguousarray(array[:, part]).tobytes()), 0, Box((0, part.start), (3, 2)))
        for part in (slice(2, 4), slice(0, 2))
    )
    slot = Slot(Tensor("F32", (3, 4), columns), Role.PARAM)
    state = OptimizerState((Optimizer(),), (Group(0, (), 1),), (Parameter("w", (3, 4), {"m": slot}),), Naming("model"))
    write(state, path)
    np.testing.assert_array_equal(safetensors.numpy.load_file(path)["w/m"], array)


def test_the_mode_follows_the_umask(path: Path) -> None:
    old = os.umask(0o027)
    try:
        write(make(), path)
        write(make(parameters=6), path.with_name("set"), max_shard_size=50)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(entry.stat().st_mode) for entry in path.parent.iterdir()} == {0o640}


def test_an_index_goes_before_the_shards_that_it_names(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is killed in between leaves shards that nothing names, not an index that names what is gone."""
    write(make(), path, max_shard_size=50)
    before, gone, unlink = len(names(path.parent)), list[str](), Path.unlink

    def slow(file: Path) -> None:
        if file.name.endswith(".index.json"):
            time.sleep(0.1)  # shards are removed by several threads
        unlink(file)
        gone.append(file.name)

    monkeypatch.setattr(Path, "unlink", slow)
    write(make(), path, force=True)
    assert gone[0] == f"{path.name}.index.json"
    assert len(gone) == before > 3
    assert names(path.parent) == [path.name]


def test_progress_counts_every_byte_of_the_tensors(path: Path) -> None:
    told: list[int] = []
    write(make(elements=300_000), path, progress=told.append)
    assert sum(told) == 8 * 300_000 * 4 + 4
    assert max(told) == 1 << 20


def test_two_threads_write_what_one_writes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an open file, in parts of any size; a tensor that is damaged in any of them leaves no file."""
    write(make(parameters=9, elements=40_000), path)
    copy = path.with_name("copy")
    writers: set[int] = set()

    class Seen(TemporaryFile):
        def write(self, position: int, data: Any) -> None:
            writers.add(threading.get_ident())
            super().write(position, data)

    monkeypatch.setattr(writing, "TemporaryFile", Seen)
    for size in (1, 300_000, 1 << 24):
        monkeypatch.setattr(writing, "PART", size)
        with open_state(path) as state:
            told: list[int] = []
            write(state, copy, force=True, progress=told.append)
        assert copy.read_bytes() == path.read_bytes()
        assert sum(told) == 18 * 160_000 + 4
    assert len(writers) > 2  # this one writes headers
    copy.unlink()
    monkeypatch.setattr(writing, "PART", 300_000)
    data = bytearray(path.read_bytes())
    for place in (-1, -1_500_000, -18 * 160_000):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        with open_state(path) as state, pytest.raises(DigestError):
            write(state, copy)
        assert names(path.parent) == [path.name]


def test_headers_of_other_files(path: Path) -> None:
    arrays = {
        "b": np.arange(6, dtype=np.int64).reshape(2, 3),
        "a": np.ones((), np.float32),
        "c": np.zeros((0, 2), np.uint8),
    }
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    with File(path) as file:
        header = read_header(file)
        assert header.metadata == {"format": "pt"}
        assert list(header.tensors) == list(header.entries) == ["b", "a", "c"]
        for key, array in arrays.items():
            np.testing.assert_array_equal(header.tensors[key].numpy(), array)
    with pytest.raises(FileError) as caught:
        open_state(path)
    assert str(caught.value) == f"{path}: a safetensors file without 'optimizer_state': not named optimizer state [R7]"


def test_whether_a_path_is_a_state(path: Path) -> None:
    folder = path.parent
    write(make(), path)
    write(make(), folder / "set", max_shard_size=50)
    safetensors.numpy.save_file({"a": np.ones(1)}, folder / "model.safetensors")
    (folder / "short").write_bytes(b"{")
    (folder / "model.safetensors.index.json").write_text('{"metadata":{"total_size":1},"weight_map":{}}')
    os.mkfifo(folder / "pipe")
    verdicts = {name: is_state(folder / name) for name in (*names(folder), "missing", ".")}
    shards = {name: True for name in names(folder) if name.startswith("set-")}
    assert verdicts == {
        "optimizer.safetensors": True, "set.index.json": True, **shards, "model.safetensors": False, "short": False,
        "model.safetensors.index.json": False, "pipe": False, "missing": False, ".": False,
    }  # fmt: skip
    assert is_state(folder / "set")


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(path: Path) -> Path:
    """A file with as few bytes as one with everything in it needs."""
    write(make(parameters=2, elements=2), path)
    return path


def found_by_verify(path: Path) -> bool:
    try:
        return not verify(path).ok
    except FileError:
        return True


def test_every_flipped_byte_is_found(small: Path) -> None:
    raw = small.read_bytes()
    for position, byte in enumerate(raw):
        for bit in (0, 5):  # 5 turns upper case into lower, and a space into NUL
            small.write_bytes(raw[:position] + bytes([byte ^ 1 << bit]) + raw[position + 1 :])
            assert found_by_verify(small), position


def test_every_truncation_is_refused(small: Path) -> None:
    raw = small.read_bytes()
    for length in range(len(raw)):
        small.write_bytes(raw[:length])
        with pytest.raises(FileError) as caught:
            open_state(small)
        assert caught.value.rule in ("R1", "R6")
    small.write_bytes(raw + b"\0")
    with pytest.raises(FileError) as caught:
        open_state(small)
    assert caught.value.rule == "R6"


def test_every_flipped_byte_of_a_set_is_found(path: Path) -> None:
    write(make(parameters=3, elements=2), path, max_shard_size=20)
    for file in path.parent.iterdir():
        raw = file.read_bytes()
        for position in range(0, len(raw), 1 if file.suffix == ".json" else 7):
            file.write_bytes(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
            assert found_by_verify(path), (file.name, position)
        file.write_bytes(raw)
    assert verify(path).ok


def test_a_changed_tensor_is_named(small: Path) -> None:
    raw = small.read_bytes()
    small.write_bytes(raw[:-1] + b"\x41")
    result = verify(small)
    assert not result.ok
    assert result.problems == (f"{small}: tensor '$globals/scale' does not match its digest [R21]",)


def test_damage_is_not_signed_anew(small: Path) -> None:
    """W12."""
    raw = small.read_bytes()
    small.write_bytes(raw[:-1] + b"\x41")
    with open_state(small) as state, pytest.raises(DigestError) as caught:
        write(state, small.with_name("copy"))
    assert str(caught.value) == "tensor '$globals/scale' does not match the digest in the file that it comes from [R21]"
    assert names(small.parent) == [small.name]


def test_digests_by_another_algorithm_are_replaced(path: Path) -> None:
    with open_state(VECTORS / "valid" / "unknown-algorithm.safetensors") as state:
        write(state, path)
    assert verify(VECTORS / "valid" / "unknown-algorithm.safetensors").unverified == ("w/momentum",)
    assert verify(path).unverified == ()


# --- targets ------------------------------------------------------------------------------------------------------


def test_a_target_is_not_replaced_by_itself(path: Path) -> None:
    write(make(), path)
    before = path.read_bytes()
    with pytest.raises(TargetExistsError) as caught:
        write(make(scale=2), path)
    assert str(caught.value) == f"{path} exists; pass force=True to replace it"
    assert path.read_bytes() == before
    write(make(scale=2), path, force=True)
    assert path.read_bytes() != before
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(TargetExistsError):
        write(make(), path)
    write(make(), path, force=True)
    assert not path.is_symlink()


def test_a_set_is_not_replaced_by_itself(path: Path) -> None:
    write(make(), path, max_shard_size=50)
    with pytest.raises(TargetExistsError) as caught:
        write(make(), path)
    assert str(caught.value) == f"{path}.index.json exists; pass force=True to replace it"


def test_targets_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        write(make(), tmp_path, force=True)
    assert str(caught.value) == (
        f"{tmp_path} is a folder; name the file to write, as in {tmp_path / 'optimizer.safetensors'}"
    )
    with pytest.raises(OptionError) as caught:
        write(make(), tmp_path / "a.index.json")
    assert str(caught.value) == (
        f"{tmp_path / 'a.index.json'} is the name of an index; name the file to write, without '.index.json'"
    )
    with pytest.raises(FileNotFoundError) as missing:
        write(make(), tmp_path / "nowhere" / "a")
    assert missing.value.filename == str(tmp_path / "nowhere")
    assert names(tmp_path) == []


def test_a_state_may_replace_its_own_file(path: Path) -> None:
    write(make(), path)
    before = path.read_bytes()
    with open_state(path) as state:
        write(state, path, force=True)
    assert path.read_bytes() == before
    with open_state(path) as state:
        write(state, path, force=True, max_shard_size=50)
        assert not path.exists()
    with open_state(path) as state:
        write(state, path, force=True)
    assert path.read_bytes() == before
    assert names(path.parent) == [path.name]


def test_what_does_not_fit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "LARGEST_HEADER", 1000)
    with pytest.raises(UnrepresentableError) as caught:
        write(make(), path)
    assert str(caught.value) == (
        "a header of 2040 bytes and 143 values, more than 1000 or 2097152: extra, globals, or the values of one "
        "parameter are too large; keep large data in tensors"
    )
    monkeypatch.undo()
    monkeypatch.setattr(writing, "MAX_VALUES", 100)
    with pytest.raises(UnrepresentableError) as caught:
        write(make(), path)
    assert str(caught.value).startswith("a header of 2040 bytes and 143 values, more than 25000000 or 100: ")
    monkeypatch.undo()
    monkeypatch.setattr(writing, "MAX_INDEX", 100)
    with pytest.raises(UnrepresentableError) as caught:
        write(make(), path, max_shard_size=50)
    assert str(caught.value) == "an index of 1204 bytes, more than 100: too many tensors for one set"
    monkeypatch.setattr(writing, "MAX_SHARDS", 3)
    with pytest.raises(OptionError) as refused:
        write(make(), path, max_shard_size=50)
    assert str(refused.value) == "the state would become 4 shards, more than 3; choose a larger max_shard_size"
    assert names(path.parent) == []


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            contiguous("F4", (3,), Memory(bytes(2))),
            "tensor 'w/m' of type F4 and shape [3]: not whole bytes, or too large",
        ),
        (
            contiguous("F32", (2**40, 2**40, 0), Memory(b"")),
            f"tensor 'w/m' of type F32 and shape [{2**40}, {2**40}, 0]: not whole bytes, or too large",
        ),
    ],
)
def test_tensors_that_no_header_describes(tensor: Tensor, message: str, path: Path) -> None:
    """W16."""
    parameters = (Parameter("w", (1,), {"m": Slot(tensor)}),)
    with pytest.raises(UnrepresentableError) as caught:
        write(OptimizerState((Optimizer(),), (Group(0, (), 1),), parameters, Naming("model")), path)
    assert str(caught.value) == message


def test_text_that_is_none(path: Path) -> None:
    """W2."""
    state = OptimizerState((Optimizer("a.\ud800"),), (), (), Naming("model"))
    with pytest.raises(UnrepresentableError) as caught:
        write(state, path)
    assert str(caught.value) == "the state holds a string with a lone surrogate, which UTF-8 cannot encode"


# --- sources ------------------------------------------------------------------------------------------------------


def test_a_source_that_ends_early(path: Path) -> None:
    write(make(elements=1000), path)
    with open_state(path) as state:
        os.truncate(path, path.stat().st_size - 10)
        with pytest.raises(FileError) as caught:
            write(state, path.with_name("copy"))
    assert "ends at byte" in str(caught.value)
    assert names(path.parent) == [path.name]


def test_a_source_that_changes_while_it_is_read(path: Path) -> None:
    write(make(elements=1000), path)

    def touch(_: int) -> None:
        os.utime(path, (1, 1))

    with open_state(path) as state, pytest.raises(FileError) as caught:
        write(state, path.with_name("copy"), progress=touch)
    assert str(caught.value) == f"{path}: changed while it was read"
    assert names(path.parent) == [path.name]


def test_a_source_that_vanishes_is_still_there(path: Path) -> None:
    write(make(), path)
    before = path.read_bytes()
    with open_state(path) as state:
        path.unlink()
        write(state, path)
    assert path.read_bytes() == before


# --- sets ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[50, 100, 1], ids=lambda limit: f"{limit} bytes")
def shards(request: pytest.FixtureRequest, path: Path) -> Path:
    write(make(), path, max_shard_size=request.param)
    return path


def test_a_set_is_the_state(shards: Path) -> None:
    for target in (shards, shards.with_name(shards.name + ".index.json")):
        with open_state(target) as state:
            assert contents(state) == contents(make())
            assert len(state.resources) == len(names(shards.parent)) - 1
    assert verify(shards) == Verification(
        9, sum(file.stat().st_size for file in shards.parent.iterdir() if file.suffix != ".json")
    )


def test_a_set_is_what_the_text_says(path: Path) -> None:
    """W13."""
    done = write(make(), path, max_shard_size=100)
    id8 = done.digest[:8]
    files = [f"optimizer-{id8}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert names(path.parent) == [*files, "optimizer.safetensors.index.json"]
    assert done.files == tuple(str(path.with_name(name)) for name in (*files, "optimizer.safetensors.index.json"))
    assert done.size == sum(file.stat().st_size for file in path.parent.iterdir())
    index = json.loads(path.with_name("optimizer.safetensors.index.json").read_bytes())
    assert index["metadata"] == {"format": "named-optimizer-state", "set": done.digest, "total_size": 196}
    assert set(index["weight_map"].values()) == set(files)
    manifests = []
    for name, shard in zip(files, index["shards"], strict=True):
        with safetensors.safe_open(path.with_name(name), framework="numpy") as opened:
            assert {key for key, file in index["weight_map"].items() if file == name} == set(opened.keys())
            found = json.loads(opened.metadata()["optimizer_state"])
        assert shard == {"file": name, "digest": found["digest"]}
        manifests.append(found["manifest"])
    first, second = manifests
    assert first["set"] == {"id": done.digest, "index": 1, "count": 2, "positions": [0, 1]}
    assert second["set"] == {"id": done.digest, "index": 2, "count": 2, "positions": [2, 3]}
    assert [group["count"] for group in first["groups"]] == [2, 0]
    assert [group["count"] for group in second["groups"]] == [0, 1]
    assert {"globals", "origin", "extra"} & set(second) == set()
    assert first["global_step"] == second["global_step"] == 3


def test_headers_split_a_set_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SHARD_HEADER", 5000)
    write(make(parameters=40), path)
    headers = [int.from_bytes(file.read_bytes()[:8], "little") for file in path.parent.glob("*.safetensors")]
    assert len(headers) == 5
    assert max(headers) < 5000
    with open_state(path) as state:
        assert len(state) == 40


def test_sharding_and_merging_are_inverse(path: Path) -> None:
    write(make(), path)
    whole = path.read_bytes()
    sets = []
    for limit in (50, 100, 50):
        with open_state(path) as state:
            write(state, path, force=True, max_shard_size=limit)
        sets.append({file.name: file.read_bytes() for file in path.parent.iterdir()})
    assert sets[0] == sets[2] != sets[1]
    with open_state(path) as state:
        write(state, path, force=True)
    assert path.read_bytes() == whole


def test_a_shard_alone(path: Path) -> None:
    write(make(), path, max_shard_size=100)
    shard = next(path.parent.glob("*-00002-of-00002.*"))
    with pytest.raises(FileError) as caught:
        open_state(shard)
    assert str(caught.value) == f"{shard}: is shard 2 of 2: open the set by its index (*.index.json) [R23]"


def test_left_overs_of_a_set_are_removed(path: Path) -> None:
    """W14: and nothing else is."""
    write(make(), path, max_shard_size=50)
    (path.parent / "optimizer.safetensors.index.json").unlink()
    keep = [
        "optimizer-0badc0de-00001-of-00002.safetensors",
        "optimizer-model.safetensors",
        ".optimizer.safetensors.x.tmp",
    ]
    for name in keep:
        (path.parent / name).write_bytes(b"not ours")
    (path.parent / ".optimizer.safetensors.0123456789abcdef.tmp").write_bytes(b"a killed writer's")
    write(make(scale=2), path)
    assert names(path.parent) == sorted([*keep, path.name])


def test_a_set_whose_names_differ_only_in_case_of_force(path: Path) -> None:
    """A set is written beside another file whose name its shards could be taken for."""
    write(make(), path.with_name("optimizer-a.safetensors"))
    write(make(), path, max_shard_size=50)
    write(make(), path, force=True)
    assert names(path.parent) == ["optimizer-a.safetensors", "optimizer.safetensors"]


def test_a_set_is_opened_again_where_it_was_replaced_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(make(), path, max_shard_size=50)
    original = envelope.read_index
    calls = []

    def read_index(index: Path) -> Any:
        members = original(index)
        calls.append(index)
        if len(calls) == 1:
            write(make(scale=2), path, force=True, max_shard_size=100)
        if len(calls) == 2:
            write(make(scale=3), path, force=True)
        return members

    monkeypatch.setattr(reading, "read_index", read_index)
    with open_state(path) as state:
        assert state.extra == {"scale": 3}
    assert len(calls) == 2


def test_an_index_that_is_too_large(path: Path) -> None:
    index = path.with_name(path.name + ".index.json")
    with index.open("wb") as file:
        file.truncate(envelope.MAX_INDEX + 1)
    with pytest.raises(FileError) as caught:
        open_state(path)
    assert str(caught.value) == f"{index}: {envelope.MAX_INDEX + 1} bytes, more than {envelope.MAX_INDEX} [R25]"


def test_an_index_of_too_many_shards(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(make(), path, max_shard_size=50)
    monkeypatch.setattr(envelope, "MAX_SHARDS", 3)
    with pytest.raises(FileError) as caught:
        open_state(path)
    assert str(caught.value) == f"{path}.index.json: 4 shards, more than 3 [R25]"


def test_unknown_members_of_later_shards_are_not_lost(path: Path) -> None:
    """W15: a set of a newer version, whose second shard has a member of its own."""
    state = make()
    parts = [state, OptimizerState(state.optimizers, (), (), state.naming, unknown={"version": "1.9", "later": 1})]

    class Part:
        def __init__(self, state: OptimizerState) -> None:
            self.state = state

    unknown: Callable[[Any], Any] = reading._unknown
    assert unknown([Part(part) for part in parts]) == {"version": "1.9", "$nested": ["later"]}
    assert unknown([Part(state)]) == {}


# --- what a reader says -------------------------------------------------------------------------------------------


MESSAGES: Final = {
    "length-too-short": "7 bytes: too short for a safetensors file [R1]",
    "length-beyond-the-limit": (
        "claims a header of 33554496 bytes, more than 33554432: not a safetensors file, or a huge one [R1]"
    ),
    "length-beyond-the-file": "claims a header of 632 bytes and holds 92 behind the length [R1]",
    "text-not-utf8": "the header is not UTF-8 at byte 331 [R2]",
    "text-leading-space": "the header is not one JSON object from its first byte on, padded with spaces [R2]",
    "metadata-number": "__metadata__ is not a mapping of strings [R4]",
    "entry-dtype": 'tensor \'w/momentum\' is described by \'{"data_offsets":[0,8],"dtype":"F33","shape":[2]}\' [R4]',
    "entry-overflow": "tensor 'w/momentum' has the shape [4503599627370496,4,0], beyond the limits [R4]",
    "size-too-small": "tensor 'w/momentum' of type F32 and shape [2] holds 4 bytes [R5]",
    "layout-hole": "tensor 'w/b' begins at byte 12 of the data, where 8 was expected [R6]",
    "layout-truncated": "tensor 'w/momentum' ends at byte 8 of the data; the file holds 7 [R6]",
    "layout-trailing-byte": "the tensors hold 8 bytes, the file 9 [R6]",
    "envelope-missing": "a safetensors file without 'optimizer_state': not named optimizer state [R7]",
    "envelope-more-metadata": (
        "the header does not begin with __metadata__, 'optimizer_state' alone in it, and a digest of 32 hex digits [R7]"
    ),
    "envelope-further-member": "'optimizer_state' is not an object of a digest and a manifest [R7]",
    "alignment": "the data begin at byte 648, not at a multiple of 64 [R8]",
    "digest-of-zeros": (
        "the header does not match its digest: it was changed after it was written; take a copy that `verify` accepts "
        "[R9]"
    ),
}

SET_MESSAGES: Final = {
    "set-index": "'optimizer-861657e7-00002-of-00002.safetensors' is not shard 2 of 2 of the set "
    "861657e7175b0441ea83c8feaaf2805f [R23]",
    "set-step": "shard 2 has other optimizers, groups, naming, extensions or step than shard 1 [R23]",
    "set-extra": "shard 2 has globals, origin or extra, which belong into shard 1 [R23]",
    "set-own-id": "the set's id 12121212121212121212121212121212 is not the digest of its shards [R24]",
    "index-not-utf8": "not UTF-8 at byte 2 [R25]",
    "index-format": "metadata.format is 'pt', expected 'named-optimizer-state' [R25]",
    "index-of-a-model": "not the index of a set of named optimizer state [R25]",
    "index-shard-missing": "shard 2 of 2 is missing: 'x' [R25]",
    "index-shard-elsewhere": 'shards holds \'{"digest":"3625f3d986790b7bb8d3dab377f8b62f","file":"../x"}\', expected a '
    "digest and the name of a file next to it [R25]",
    "index-shard-digest": "'optimizer-090b9495-00002-of-00002.safetensors' has the digest "
    "3625f3d986790b7bb8d3dab377f8b62f, not 00000000000000000000000000000000 [R25]",
    "index-weight-map-short": "weight_map or total_size does not match the shards [R25]",
    "set-position-taken": "shard 2 puts 'c' at position 1 [R26]",
    "set-name-twice": "two parameters have the name 'a' [R26]",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(name: str) -> None:
    path = VECTORS / "invalid" / f"{name}.safetensors"
    with pytest.raises((FileError, DigestError)) as caught:
        open_state(path)
    assert str(caught.value) == f"{path}: {MESSAGES[name]}"
    assert isinstance(caught.value, (FileError, DigestError))
    assert str(caught.value.path) == str(path)


@pytest.mark.parametrize("name", SET_MESSAGES)
def test_messages_of_sets(name: str) -> None:
    path = VECTORS / "invalid" / name / "optimizer.safetensors"
    with pytest.raises(FileError) as caught:
        open_state(path)
    assert str(caught.value) == f"{path}.index.json: {SET_MESSAGES[name]}"


def test_replacing_a_state_removes_nothing_else(tmp_path: Path) -> None:
    """No shards that a renamed index names, nor what only looks like a shard."""
    path = tmp_path / "optimizer.safetensors"
    (tmp_path / "optimizer-01234567-00001-of-00002.safetensors").write_bytes(b"precious")
    write(make(), path, max_shard_size=100)
    renamed = tmp_path / "backup.safetensors.index.json"
    envelope.index_of(path).rename(renamed)
    kept = {found.name for found in tmp_path.iterdir()}
    assert len(kept) > 3
    write(make(step=2.0), path)
    write(make(step=3.0), path, force=True)
    assert {found.name for found in tmp_path.iterdir()} == kept | {path.name}
    open_state(renamed).close()
