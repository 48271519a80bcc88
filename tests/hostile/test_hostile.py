"""Files and paths that attack whoever reads them: each meets its one error, and nothing is run, written or waited for.

Pickles and zips have their own corpus, ``hostile_pickles.py``; single broken rules of the format are the vectors in
``spec/vectors/invalid``, which go through the command line here.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from lora_state_format import registry
from lora_state_format.cli import run
from lora_state_format.errors import (
    DigestError,
    FileError,
    RefusedError,
    StateFormatError,
    UnknownFormatError,
    UnsupportedVersionError,
)
from lora_state_format.foreign import dcp, flax, torch_save
from lora_state_format.foreign.pickles import MAX_PICKLE, Record, load_plain
from lora_state_format.format import envelope, reading, writing
from lora_state_format.io import safetensors
from lora_state_format.io.ledger import Ledger
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import Group, Naming, Optimizer, OptimizerState, Parameter, Role, Slot
from lora_state_format.model.tensors import Tensor, contiguous
from lora_state_format.operations import conversion

VECTORS: Final = Path(__file__).parents[2] / "spec" / "vectors"
PICKLES: Final = runpy.run_path(os.fspath(Path(__file__).with_name("hostile_pickles.py")))["CASES"]
SECONDS: Final = 5
MEBIBYTES: Final = 512
ODD: Final = "a\x1b[2J\x1b]0;title\x07\r\n\x00\x9b31m\u202eb"
"""A name that clears the screen, retitles the window and turns what follows around."""


def numbers(*shape: int) -> Tensor:
    size = contiguous("F32", shape, Memory(b"")).size
    return contiguous("F32", shape, Memory(bytes(size)))


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and everything printed, after the checks that hold for any command."""
    capsys.readouterr()
    start = time.process_time()
    code = run([str(argument) for argument in arguments])
    assert time.process_time() - start < SECONDS
    printed = "".join(capsys.readouterr())
    assert all(line.isprintable() for line in printed.split("\n")), printed
    assert "Traceback" not in printed
    return code, printed


# --- headers and manifests ----------------------------------------------------------------------------------------


def packed(header: str | bytes, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else header.encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(begin: int, end: int, dtype: str = "U8", shape: Sequence[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def tensors(data: bytes = bytes(8), **entries: Any) -> bytes:
    return packed(json.dumps(entries), data)


HEADERS: Final[dict[str, tuple[Callable[[], bytes], str]]] = {
    "hole": (lambda: tensors(a=entry(0, 4), b=entry(6, 8)), "R6"),
    "overlap": (lambda: tensors(a=entry(0, 5), b=entry(4, 8)), "R6"),
    "behind the end": (lambda: tensors(a=entry(0, 9)), "R6"),
    "backwards": (lambda: tensors(a={"dtype": "U8", "shape": [4], "data_offsets": [8, 4]}), "R5"),
    "overflow": (lambda: tensors(b"", a=entry(0, 0, shape=[0, 1 << 40, 1 << 40])), "R4"),
    "product wraps to zero": (lambda: tensors(b"", a=entry(0, 0, shape=[1 << 32, 1 << 32])), "R5"),
    "twice": (lambda: packed('{"a":{},"a":{}}'), "R3"),
    "nan": (lambda: packed('{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}'), "R3"),
    "infinite": (lambda: packed('{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,0]}}'), "R3"),
    "thousands of digits": (lambda: packed('{"a":' + "9" * 5000 + "}"), "R3"),
    "metadata as a tensor": (lambda: tensors(__metadata__=entry(0, 8)), "R4"),
    "metadata in metadata": (lambda: packed('{"__metadata__":{"__metadata__":{}}}'), "R4"),
    "name with escapes": (lambda: packed(json.dumps({ODD: entry(0, 9)}), bytes(8)), "R6"),
    "name with escapes described wrongly": (lambda: packed(json.dumps({ODD: {ODD: ODD}})), "R4"),
    "name out of the folder": (lambda: packed(json.dumps({"../../a": entry(0, 8)}), bytes(8)), "R7"),
    "not UTF-8": (lambda: packed(b'{"\xff":{}}'), "R2"),
    "25 MB of arrays": (lambda: packed('{"a":[' + "[],[[]]," * (25_000_000 // 8) + "0]}"), "R3"),
    "25 MB of nesting": (lambda: packed('{"a":' + "[" * 25_000_000 + "}"), "R3"),
    "25 MB of objects": (lambda: packed('{"a":' + '{"a":' * 5_000_000 + "}" * 5_000_001), "R3"),
    "25 MB of one name": (lambda: packed('{"' + "a" * 25_000_000 + '":{}}'), "R4"),
    "25 MB of tensors": (lambda: packed("{" + ",".join(f'"{n:07}":{{}}' for n in range(1_900_000)) + "}"), "R3"),
    "a million tensors": (lambda: packed("{" + ",".join(f'"{n:020}":{{}}' for n in range(1_000_000)) + "}"), "R4"),
    "25 MB of numbers": (lambda: packed('{"a":[' + "1e1," * 6_250_000 + "1]}"), "R3"),
    "25 MB of escapes": (lambda: packed('{"' + "\\u001b" * 4_000_000 + '":{}}'), "R4"),
    "33 MiB of spaces": (lambda: packed("{}" + " " * (33 << 20)), "R1"),
    "2 to the 63": (lambda: (1 << 63).to_bytes(8, "little") + b"{}", "R1"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_headers(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, rule = HEADERS[name]
    path = tmp_path / "optimizer.safetensors"
    path.write_bytes(make())
    with pytest.raises(FileError) as caught:
        reading.open_state(path)
    assert (caught.type, caught.value.rule, len(str(caught.value)) < 3000) == (FileError, rule, True)
    for arguments in (["verify", path], ["inspect", path, "--from", "named"], ["convert", path, tmp_path / "out"]):
        assert command(capsys, *arguments)[0] == 3
    assert listing(tmp_path) == ["optimizer.safetensors"]


INVALID: Final = sorted((VECTORS / "invalid").glob("*.json"))


def test_vectors_through_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = listing(VECTORS)
    for vector in INVALID:
        expected = json.loads(vector.read_text(encoding="utf-8"))
        folder = vector.with_suffix("")
        path = folder / "optimizer.safetensors" if folder.is_dir() else vector.with_suffix(".safetensors")
        code, printed = command(capsys, "verify", path)
        assert code == (1 if expected["kind"] == "digest" or expected.get("verify") else 3), vector.stem
        assert f"[{expected['rule']}]" in printed, vector.stem
        code, printed = command(capsys, "convert", path, tmp_path / "out.safetensors", "--from", "named")
        assert code in (1, 3), vector.stem
    assert listing(VECTORS) == before
    assert listing(tmp_path) == []


def edited(change: Callable[[dict[str, Any]], None]) -> bytes:
    """A valid file with another manifest, and the digest of that."""
    raw = (VECTORS / "valid" / "example.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    state = json.loads(header["__metadata__"]["optimizer_state"])
    change(state["manifest"])
    state["digest"] = "0" * 32
    header["__metadata__"]["optimizer_state"] = json.dumps(state, separators=(",", ":"))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % safetensors.ALIGNMENT)
    whole = len(text).to_bytes(8, "little") + text
    start = 8 + len(envelope.PREFIX)
    return whole[:start] + envelope.header_digest(whole).encode() + whole[start + 32 :] + raw[end:]


def named(members: dict[str, Any], name: str) -> None:
    members["parameters"][0]["name"] = name


MANIFESTS: Final[dict[str, tuple[Callable[[dict[str, Any]], None], type[Exception], str]]] = {
    "another name": (lambda m: named(m, ODD), FileError, "R17"),
    "out of the folder": (lambda m: named(m, "../../etc/passwd"), FileError, "R17"),
    "another shape": (lambda m: m["parameters"][0].update(shape=[1]), FileError, "R18"),
    "no parameter": (
        lambda m: m.update(parameters=[], groups=[], weights={"algorithm": "x", "values": []}), FileError, "R17"),
    "too many states": (lambda m: m["parameters"][0].update(state=10**9), FileError, "R16"),
    "billions in a group": (lambda m: m["groups"][0].update(count=2**53 - 1), FileError, "R15"),
    "version": (lambda m: m.update(version=ODD), FileError, "R11"),
    "next version": (lambda m: m.update(version="2.0"), UnsupportedVersionError, "R11"),
    "extension": (lambda m: m.update(extensions={ODD: {"must_understand": True}}), RefusedError, "R13"),
    "value": (lambda m: m.update(extra={"x": {"$" + ODD: ODD}}), FileError, "R22"),
    "member": (lambda m: m.update({ODD: ODD}), FileError, "R12"),
    "digest": (lambda m: m["digests"]["values"].__setitem__(0, ODD), FileError, "R20"),
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, error, rule = MANIFESTS[name]
    path = tmp_path / "optimizer.safetensors"
    path.write_bytes(edited(change))
    with pytest.raises(FileError) as caught:
        reading.open_state(path)
    assert (caught.type, caught.value.rule) == (error, rule), str(caught.value)
    for verb in ("verify", "inspect"):
        code, printed = command(capsys, verb, path)
        assert code == 3
        assert f"[{rule}]" in printed
    assert listing(tmp_path) == ["optimizer.safetensors"]


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b"])
def test_an_index_stays_in_its_folder(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = json.loads(next((VECTORS / "valid" / "set").glob("*.index.json")).read_bytes())
    index["shards"][0]["file"] = name
    path = tmp_path / "optimizer.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(FileError) as caught:
        reading.open_state(path)
    assert caught.value.rule == "R25"
    assert command(capsys, "verify", path)[0] == 3


# --- names that a terminal would act on ---------------------------------------------------------------------------


def hostile_state() -> OptimizerState:
    slots = {ODD.replace("/", "_"): Slot(numbers(2, 3), Role.PARAM), "exp_avg": Slot(numbers(2, 3), Role.PARAM)}
    return OptimizerState(
        optimizers=(Optimizer(f"torch.optim.{ODD}"),),
        groups=(Group(0, ((ODD, ODD), ("lr", 0.5)), 2, ODD),),
        parameters=(
            Parameter(ODD, (2, 3), slots, adapter=ODD, tied=(f"{ODD}2",), foreign_names={"peft": ODD}),
            Parameter("../../b", (2, 3), slots),
        ),
        naming=Naming(ODD, ODD, {ODD: ODD}),
        globals={ODD: ODD},
        origin={"format": ODD, ODD: ODD},
        extra={ODD: [ODD]},
    )


def test_names_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "a.safetensors", tmp_path / "out" / "b.safetensors"
    out.parent.mkdir()
    writing.write(hostile_state(), path)
    done = [
        ["verify", path], ["inspect", path], ["inspect", path, "--stats"], ["inspect", path, "--json"],
        ["convert", path, out], ["convert", path, out, "--force", "--json"],
        ["export", path, tmp_path / "slot.safetensors", "--slot", "exp_avg"],
        ["edit", path, tmp_path / "edited", "--set", "lr=1.0"], ["reset", path, tmp_path / "reset", "--match", "b"],
        ["prune", path, tmp_path / "pruned", "--match", "^[.]"],
        ["rename", path, tmp_path / "named", "--rename", "b$", "c"],
    ]  # fmt: skip
    for arguments in done:
        assert command(capsys, *arguments)[0] == 0, arguments
    refused = [
        ["export", path, tmp_path / "c", "--slot", "none"], ["edit", path, tmp_path / "c", "--set", "none=1"],
        ["convert", path, tmp_path / "c", "--to", "torch_optimizer", "--base", path],
        ["convert", path, tmp_path / "c", "--names", path],
    ]  # fmt: skip
    for arguments in refused:
        assert command(capsys, *arguments)[0] != 0, arguments
    written = {"a.safetensors", "edited", "named", "out", "out/b.safetensors", "pruned", "reset", "slot.safetensors"}
    assert written == set(listing(tmp_path))


def archived(value: Any) -> bytes:
    return b"".join(bytes(chunk) for chunk in torch_save.archive(value, Ledger()))


def state_dict(**options: Any) -> dict[str, Any]:
    slots = {"exp_avg": numbers(2, 3), ODD: numbers(2, 3), "step": 1.0}
    return {"state": {0: slots}, "param_groups": [{"lr": 0.5, "params": [0], **options}]}


def test_names_in_pickles_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, names = tmp_path / "optimizer.pt", tmp_path / "names.txt"
    names.write_text("w\x1b[2J\x9b31m\n", encoding="utf-8")
    path.write_bytes(archived(state_dict(**{ODD: ODD})))
    assert command(capsys, "inspect", path)[0] == 0
    assert command(capsys, "convert", path, tmp_path / "done", "--names", names)[0] == 0
    assert command(capsys, "convert", path, tmp_path / "out")[0] == 4
    path.write_bytes(archived({ODD: state_dict(**{ODD: Record("torch", "device", (ODD,))})}))
    assert command(capsys, "convert", path, tmp_path / "out", "--names", names)[0] == 1
    path.write_bytes(archived({ODD: Record("torch" + ODD.replace("\n", ""), "x")}))
    assert command(capsys, "inspect", path)[0] == 3
    assert listing(tmp_path) == ["done", "names.txt", "optimizer.pt"]


# --- bombs for the converters -------------------------------------------------------------------------------------


def message(value: Any) -> bytes:
    return b"".join(bytes(chunk) for chunk in flax.packed(value))


def extension(shape: bytes, name: bytes = b"\xa7float32", data: bytes = b"\xc4\0") -> bytes:
    inner = b"\x93" + shape + name + data
    return b"\x81\xa2mu\xc7" + bytes([len(inner)]) + b"\x01" + inner


MESSAGES: Final[dict[str, tuple[Callable[[], bytes], type[FileError], str]]] = {
    "4 billion members": (lambda: b"\x81\xa2mu\xdf\xff\xff\xff\xff", FileError, "ends 1 bytes before the end"),
    "4 GB of text": (lambda: b"\x81\xa2mu\xdb\xff\xff\xff\xff", FileError, "a text of 4294967295 bytes"),
    "4 GB of bytes": (lambda: b"\x81\xa2mu\xc6\xff\xff\xff\xff", RefusedError, "a bin at byte"),
    "4 billion items": (lambda: b"\x81\xa2mu\xdd\xff\xff\xff\xff", RefusedError, "a list at byte"),
    "a million maps": (lambda: b"\x81\xa2mu" * 1_000_000, FileError, "nested deeper than 64"),
    "a million values": (lambda: b"\x81\xa2mu\xdf\0\x0f\x42\x40" + b"".join(
        b"\xa7" + b"%07d" % n + b"\xc0" for n in range(1_000_000)), FileError, "values"),
    "an array of 2 to the 120": (
        lambda: extension(b"\x92" + 2 * (b"\xcf" + bytes([0x10]) + bytes(7))), FileError, "with 0 bytes in an ext of"),
    "an array of a million axes": (lambda: extension(b"\xdd\0\x0f\x42\x40"), FileError, "begin with its shape"),
    "a type with escapes": (lambda: extension(b"\x90", b"\xa4\x1b[2J"), RefusedError, "safetensors has no such type"),
    "a key with escapes twice": (lambda: b"\x81\xa2mu\x82\xa4\x1b[2J\xc0\xa4\x1b[2J\xc0", FileError, "twice in a map"),
    "code": (lambda: b"\x81\xa2mu\xd4\x05\x00", RefusedError, "an ext of type 5"),
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, error, detail = MESSAGES[name]
    path = tmp_path / "opt_state.msgpack"
    path.write_bytes(make())
    with pytest.raises(FileError, match=re.escape(detail)) as caught:
        registry.read(path, "flax_msgpack")
    assert caught.type is error
    assert command(capsys, "inspect", path)[0] == 3
    assert command(capsys, "convert", path, tmp_path / "out")[0] == 3
    assert listing(tmp_path) == ["opt_state.msgpack"]


METADATA: Final = "torch.distributed.checkpoint.metadata"


def checkpoint(folder: Path) -> dict[str, Any]:
    """A DCP folder, and the members of its metadata, to be changed."""
    entries = {("optim", "state", "w", "exp_avg"): numbers(2, 3), ("optim", "param_groups"): [{"params": ["w"]}]}
    dcp.write_folder(entries, folder)
    state: dict[str, Any] = load_plain((folder / ".metadata").read_bytes()).state
    return state


def place(key: str, name: str, offset: Any, length: Any) -> tuple[Record, Record]:
    info = {"relative_path": name, "offset": offset, "length": length}
    index = Record(METADATA, "MetadataIndex", state={"fqn": key, "offset": None, "index": None})
    return index, Record("torch.distributed.checkpoint.filesystem", "_StorageInfo", state=info)


def repeated(members: dict[str, Any]) -> None:
    """One item under 1,000 names."""
    info = next(info for index, info in members["storage_data"].items() if index.state["fqn"] == "optim.param_groups")
    for number in range(1000):
        key = f"optim.param_groups.{number}"
        members["state_dict_metadata"][key] = Record(METADATA, "BytesStorageMetadata", state={})
        members["storage_data"][place(key, "", 0, 0)[0]] = info


def through(members: dict[str, Any]) -> None:
    """A tensor stands inside of the groups."""
    old, new = "optim.state.w.exp_avg", "optim.param_groups.exp_avg"
    for table in ("state_dict_metadata", "planner_data"):
        members[table][new] = members[table].pop(old)
    members["planner_data"][new] = ("optim", "param_groups", "exp_avg")
    next(index for index in members["storage_data"] if index.state["fqn"] == old).state["fqn"] = new


def entangled(members: dict[str, Any]) -> None:
    """5,000 columns, each of which could overlap any other as far as the rows tell; one is there twice, one is not."""
    columns = 5_000
    places, (_, info) = members["storage_data"], place("", "__0_0.distcp", 0, 0)
    boxes = [((0, min(n, columns - 2)), (2, 1)) for n in range(columns)]
    for start, _ in boxes[1:-1]:  # the first one has a place
        places[Record(METADATA, "MetadataIndex", state={"fqn": "optim.state.w.exp_avg", "offset": start})] = info
    chunks = [Record(METADATA, "ChunkStorageMetadata", state={"offsets": a, "sizes": b}) for a, b in boxes]
    resized(members, size=(2, columns), chunks=chunks)


def resized(members: dict[str, Any], **sizes: Any) -> None:
    members["state_dict_metadata"]["optim.state.w.exp_avg"].state.update(sizes)


def moved(members: dict[str, Any], **info: Any) -> None:
    for place in members["storage_data"].values():
        place.state.update(info)


CHECKPOINTS: Final[dict[str, tuple[Callable[[dict[str, Any]], None], type[FileError], str]]] = {
    "a file elsewhere": (lambda m: moved(m, relative_path="../a"), RefusedError, "points at a file outside"),
    "an absolute file": (lambda m: moved(m, relative_path="/dev/zero"), RefusedError, "points at a file outside"),
    "a device": (lambda m: moved(m, relative_path="zero"), FileError, "a pipe or a device, not a file"),
    "a pipe": (lambda m: moved(m, relative_path="pipe"), FileError, "a pipe or a device, not a file"),
    "behind the end": (lambda m: moved(m, length=1 << 62), FileError, "is cut short"),
    "in front of the start": (lambda m: moved(m, offset=-1), FileError, "is cut short"),
    "one item a thousand times": (repeated, FileError, "places more in __0_0.distcp than its"),
    "chunks in each other's way": (entangled, FileError, "that do not make up [2, 5000]"),
    "2 to the 124 elements": (lambda m: resized(m, size=(1 << 62, 1 << 62)), FileError, "that do not make up"),
    "sizes of text": (lambda m: resized(m, size=(ODD,)), FileError, "where sizes are expected"),
    "a thousand axes": (lambda m: resized(m, size=(1,) * 1000), FileError, "where sizes are expected"),
    "no chunks": (lambda m: resized(m, chunks=[]), FileError, "that do not make up [2, 3]"),
    "a path through a value": (through, FileError, "has a value on the way"),
    "a path of another entry": (
        lambda m: m["planner_data"].update({"optim.param_groups": ("optim", "state", "w", "exp_avg", "x")}),
        FileError, "which is the path of another entry"),
    "no path": (lambda m: m["planner_data"].update({"optim.param_groups": ()}), FileError, "which is no path"),
    "a key with escapes": (lambda m: m["storage_data"].update([place(ODD, "none", 0, 1)]), FileError, "missing"),
}  # fmt: skip


def hostile_checkpoint(name: str, path: Path) -> Path:
    folder = path / "checkpoint"
    members = checkpoint(folder)
    os.mkfifo(folder / "pipe")
    (folder / "zero").symlink_to("/dev/zero")
    CHECKPOINTS[name][0](members)
    (folder / ".metadata").write_bytes(torch_save.dumps(Record(METADATA, "Metadata", state=members)))
    return folder


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, error, detail = CHECKPOINTS[name]
    folder = hostile_checkpoint(name, tmp_path)
    before = listing(tmp_path)
    start = time.process_time()
    with pytest.raises(FileError, match=re.escape(detail)) as caught:
        registry.read(folder, "dcp")
    assert time.process_time() - start < SECONDS
    assert caught.type is error
    assert command(capsys, "inspect", folder)[0] == 3
    assert command(capsys, "convert", folder, tmp_path / "out")[0] == 3
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_first_look_at_checkpoints(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a folder of very many files is looked at: what is not read may be wrong, and is not followed."""
    monkeypatch.setattr(dcp, "FEW", 0)
    folder = hostile_checkpoint(name, tmp_path)
    before = listing(tmp_path)
    start = time.process_time()
    assert command(capsys, "inspect", folder)[0] in (0, 3)
    assert time.process_time() - start < SECONDS
    assert listing(tmp_path) == before


# --- paths --------------------------------------------------------------------------------------------------------


def sparse(path: Path, size: int, start: bytes = b"") -> None:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


PATHS: Final[dict[str, Callable[[Path], object]]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to itself": lambda path: path.symlink_to(path),
    "empty": Path.touch,
    "empty folder": Path.mkdir,
    "100 GB of zeros": lambda path: sparse(path, 100 << 30),
    "100 GB of a zip": lambda path: sparse(path, 100 << 30, b"PK\3\4"),
    "100 GB of a pickle": lambda path: sparse(path, 100 << 30, b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."),
    "100 GB of a tensor": lambda path: sparse(path, 100 << 30, packed("{}")),
}  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_paths(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, good = tmp_path / "optimizer.safetensors", VECTORS / "valid" / "example.safetensors"
    PATHS[name](path)
    try:
        before = listing(tmp_path)
        for arguments in (
            ["inspect", path], ["inspect", path, "--from", "named"], ["inspect", path, "--from", "torch_optimizer"],
            ["inspect", path, "--from", "flax_msgpack"], ["inspect", path, "--from", "dcp"], ["verify", path],
            ["convert", path, tmp_path / "out"],
            ["edit", path, tmp_path / "out", "--set", "lr=1.0"], ["verify", good, "--weights", path],
        ):  # fmt: skip
            assert command(capsys, *arguments)[0] == 3, arguments
        assert command(capsys, "convert", good, path)[0] == 2  # never written over
        pickled = tmp_path / "optimizer.pt"
        pickled.write_bytes(archived(state_dict()))
        assert command(capsys, "convert", pickled, tmp_path / "out", "--names", path)[0] in (3, 4)
        pickled.unlink()
        assert listing(tmp_path) == before
    finally:
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("name", ["pipe", "device", "100 GB of zeros", "link to itself"])
@pytest.mark.parametrize(
    "beside", ["trainer_state.json", "adapter_config.json", "config.json", "adapter_model.safetensors", "latest"]
)
def test_what_lies_beside(name: str, beside: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files that are only looked at because of their names: ignored, or refused, never waited for."""
    (tmp_path / "optimizer.pt").write_bytes(archived(state_dict()))
    PATHS[name](tmp_path / beside)
    before = listing(tmp_path)
    assert command(capsys, "inspect", tmp_path)[0] in (0, 3)
    assert command(capsys, "convert", tmp_path, tmp_path / "out")[0] in (3, 4)
    assert listing(tmp_path) == before


def test_a_shard_that_is_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (VECTORS / "valid" / "set").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = min(tmp_path.glob("*-of-*.safetensors"))
    shard.unlink()
    os.mkfifo(shard)
    assert command(capsys, "verify", tmp_path / "optimizer.safetensors")[0] == 3


def test_an_unknown_file_and_a_changed_one_have_their_own_errors(tmp_path: Path) -> None:
    path = tmp_path / "optimizer.bin"
    path.write_bytes(ODD.encode())
    with pytest.raises(UnknownFormatError):
        registry.detect(path)
    raw = bytearray((VECTORS / "valid" / "example.safetensors").read_bytes())
    raw[raw.index(b"manifest") + 20] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DigestError) as caught:
        reading.open_state(path)
    assert caught.value.rule == "R9"


# --- every other command ------------------------------------------------------------------------------------------


def damaged(change: Callable[[dict[str, Any]], None], folder: Path) -> None:
    """A DCP folder whose metadata was changed."""
    members = checkpoint(folder)
    os.mkfifo(folder / "pipe")
    (folder / "zero").symlink_to("/dev/zero")
    change(members)
    (folder / ".metadata").write_bytes(torch_save.dumps(Record(METADATA, "Metadata", state=members)))


def of_each_kind() -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    """Inputs of every kind and for every rule: which one it is, the file's name, and what makes it at a path."""
    state = "optimizer.safetensors"

    def holding(make: Callable[[], bytes]) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(make())

    for name, (make, rule) in HEADERS.items():
        if "MB" not in name and "MiB" not in name and "million" not in name:
            yield f"header {rule}", state, holding(make)
    for vector in INVALID:
        expected = json.loads(vector.read_text(encoding="utf-8"))
        if "verify" not in expected and not vector.with_suffix("").is_dir():
            yield f"vector {expected['rule']}", state, holding(vector.with_suffix(".safetensors").read_bytes)
    for change, _, rule in MANIFESTS.values():
        yield f"manifest {rule}", state, holding(partial(edited, change))
    for name, (make, _, _) in MESSAGES.items():
        if "million" not in name:
            yield f"message {name}", "opt_state.msgpack", holding(make)
    for name, (damage, _, _) in CHECKPOINTS.items():
        if damage is not entangled:
            yield f"checkpoint {name}", "checkpoint", partial(damaged, damage)
    for case in PICKLES.values():
        if len(case.make()) < 1 << 16:
            yield re.sub(r"'[^']*'|\d+|, at byte.*", "", case.detail), "optimizer.pt", holding(case.make)
    for name, place in PATHS.items():
        if name != "100 GB of a pickle":  # of which as much is read as a pickle may have: a second each time
            yield name, state, place


SELECTED: Final[dict[str, tuple[str, Callable[[Path], object]]]] = {}
for _kind, _name, _make in of_each_kind():
    SELECTED.setdefault(_kind, (_name, _make))


@pytest.mark.parametrize("kind", SELECTED)
def test_commands(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each says what reading says, and no more."""
    name, make = SELECTED[kind]
    path, out, good = tmp_path / name, tmp_path / "out", VECTORS / "valid" / "example.safetensors"
    make(path)
    try:
        before = listing(tmp_path)
        with pytest.raises((StateFormatError, OSError)) as caught:
            conversion.read(path)
        expected = getattr(caught.value, "exit_code", 3)
        assert expected == (1 if isinstance(caught.value, DigestError) else 3)
        refused = expected, command(capsys, "inspect", path)[1]
        for arguments in (
            ["inspect", path], ["diff", path, good], ["diff", good, path], ["export", path, out, "--slot", "exp_avg"],
            ["edit", path, out, "--set", "lr=1.0"], ["rename", path, out, "--rename", "a", "b"],
            ["strip", path, out, "--slot", "exp_avg"], ["prune", path, out, "--match", "a"],
            ["reset", path, out, "--match", "a"],
        ):  # fmt: skip
            assert command(capsys, *arguments) == refused, arguments
        assert listing(tmp_path) == before
    finally:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


# --- models to check against --------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder of configs."""
    pytest.importorskip("peft")
    members = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 1}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(members))
    return tmp_path / "model"


def test_check(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of the files after the other, for a model that is in order."""
    for name, make in SELECTED.values():
        path = tmp_path / name
        make(path)
        try:
            before = listing(tmp_path)
            refused = command(capsys, "inspect", path)
            assert refused[0] in (1, 3)
            assert command(capsys, "check", path, "--model", model) == refused, name
            assert listing(tmp_path) == before
        finally:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


CONFIGS: Final[dict[str, Callable[[Path], object]]] = {
    **{name: PATHS[name] for name in ("pipe", "device", "empty", "link to itself", "100 GB of zeros", "empty folder")},
    "deep": lambda path: path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000),
    "25 MB of arrays": lambda path: path.write_text('{"a":[' + "[],[[]]," * (25_000_000 // 8) + "0]}"),
    "a list": lambda path: path.write_text("[]"),
    "not UTF-8": lambda path: path.write_bytes(b'{"\xff": 1}'),
    "a billion layers": lambda path: path.write_text('{"model_type": "qwen2", "num_hidden_layers": 1000000000}'),
    "escapes": lambda path: path.write_text(
        json.dumps({"model_type": ODD, "peft_type": ODD, "base_model_name_or_path": ODD, "num_layers": 10**9})
    ),
    "a key with escapes": lambda path: path.write_text(json.dumps({f"layer{ODD}": 10**9})),
}


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name: str, file: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They name the parameters of what has positions, too, and may lie beside it."""
    path, good = model / file, VECTORS / "valid" / "example.safetensors"
    pickled = model / "optimizer.pt"
    pickled.write_bytes(archived(state_dict()))
    path.unlink(missing_ok=True)
    CONFIGS[name](path)
    try:
        before = listing(tmp_path)
        for arguments in (
            ["check", good, "--model", model], ["check", pickled, "--model", model],
            ["convert", model, tmp_path / "out"], ["convert", pickled, tmp_path / "out", "--names", model],
        ):  # fmt: skip
            code, said = command(capsys, *arguments)
            assert code in (3, 4), arguments
            assert said.count("error: ") == 1
        assert listing(tmp_path) == before
    finally:
        path.rmdir() if path.is_dir() else path.unlink()


# --- memory -------------------------------------------------------------------------------------------------------


def test_memory(tmp_path: Path) -> None:
    """The largest of all of the above, one after the other in one process."""
    files = []
    for number, (make, _) in enumerate(HEADERS.values()):
        data = make()
        if len(data) > 1 << 20:
            files.append(tmp_path / f"{number}.safetensors")
            files[-1].write_bytes(data)
    for name in ("a million maps", "a million values"):
        files.append(tmp_path / f"{name}.msgpack")
        files[-1].write_bytes(MESSAGES[name][0]())
    for name in ("100 GB of a zip", "100 GB of a pickle", "100 GB of a tensor"):
        files.append(tmp_path / f"{name}.pt")
        PATHS[name](files[-1])
    files.append(tmp_path / "checkpoint")
    checkpoint(files[-1])
    sparse(files[-1] / ".metadata", 100 << 30, b"param_groups")
    files.append(tmp_path / "folder" / "optimizer.pt")
    files[-1].parent.mkdir()
    files[-1].write_bytes(archived(state_dict()))
    sparse(files[-1].parent / "trainer_state.json", 100 << 30)
    files.append(tmp_path / "lists.pt")
    with zipfile.ZipFile(files[-1], "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02](" + b"]" * (MAX_PICKLE - 16) + b"e.")
    script = """
import re, sys
from pathlib import Path
from lora_state_format.cli import run
for path in sys.argv[1:]:
    code = run(["inspect", path])
    if code != (0 if path.endswith("optimizer.pt") else 3):  # next to that one lies what is skipped
        sys.exit(f"{path}: {code}")
    print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
    done = subprocess.run([sys.executable, "-c", script, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peaks = [int(line) for line in done.stdout.splitlines() if line.isdecimal()]
    assert len(peaks) == len(files)
    assert max(peaks) >> 10 < MEBIBYTES
