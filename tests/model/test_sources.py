"""Files, ranges and buffers, and the CRCs that they state."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_state_format.errors import FileError
from lora_state_format.io import ledger as ledger_module
from lora_state_format.io.ledger import Ledger
from lora_state_format.model.sources import File, Memory, Range
from lora_state_format.model.tensors import Box, Flat, Piece, Tensor, contiguous

DATA = bytes(range(100))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(DATA)
    return path


def read(source: File | Range | Memory, offset: int, size: int) -> bytes:
    out = bytearray(size)
    source.readinto(offset, memoryview(out))
    return bytes(out)


def test_a_file(path: Path) -> None:
    with File(path) as file:
        assert (file.size, file.path, file.crc32) == (100, os.fspath(path), None)
        assert read(file, 90, 10) == file.read(90, 10) == DATA[90:]
        assert read(file, 100, 0) == b""
        assert file.view(0, 10) is None
        with pytest.raises(FileError) as caught:
            file.read(95, 10)
        assert str(caught.value) == f"{path}: ends at byte 100, 5 bytes before the end of what was asked for"
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.read(0, 1)
    file.close()


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_regular_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    make: dict[str, Callable[[], object]] = {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
    }
    make[kind]()
    with pytest.raises(FileError) as caught:
        File(path)
    assert str(caught.value) == f"{path}: {'a folder' if kind == 'folder' else 'a pipe or a device'}, not a file"


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        File(tmp_path / "x")
    assert caught.value.filename == os.fspath(tmp_path / "x")


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(DATA[:50]), lambda path: os.utime(path, (1, 1))])
def test_a_file_that_changes(path: Path, change: Callable[[Path], object]) -> None:
    with File(path) as file:
        file.check_unchanged()
        change(path)
        with pytest.raises(FileError) as caught:
            file.check_unchanged()
        assert str(caught.value) == f"{path}: changed while it was read"


def test_a_file_that_is_replaced_is_still_read(path: Path) -> None:
    with File(path) as file:
        other = path.with_name("other")
        other.write_bytes(b"other")
        other.replace(path)
        file.check_unchanged()
        assert file.read(0, 100) == DATA


def test_ranges_of_ranges() -> None:
    outer = Range(Memory(DATA), 10, 50)
    inner = Range(outer, 5, 20, crc32=7)
    assert (inner.size, inner.crc32) == (20, 7)
    assert read(inner, 3, 4) == DATA[18:22]
    assert bytes(inner.view(3, 4) or b"") == DATA[18:22]


def test_bytes_that_a_source_does_not_have() -> None:
    memory, part = Memory(b"abc"), Range(Memory(DATA), 10, 5)
    for call, message in (
        (lambda: read(memory, 2, 2), "bytes 2 to 4 of a buffer that holds 3"),
        (lambda: read(part, 4, 2), "bytes 4 to 6 of a range that holds 5"),
        (lambda: Range(memory, 2, 2), "bytes 2 to 4 of a source that holds 3"),
        (lambda: Range(memory, -1, 2), "bytes -1 to 1 of a source that holds 3"),
    ):
        with pytest.raises(FileError) as caught:
            call()
        assert str(caught.value) == message


def test_a_buffer_of_any_kind() -> None:
    assert Memory(memoryview(bytearray(16)).cast("I")).size == 16
    assert read(Memory(bytearray(b"abc")), 1, 2) == b"bc"


# --- CRCs ---------------------------------------------------------------------------------------------------------


class Member(Range):
    """A range with a name, as an archive has them."""

    name = "data/0"
    path = "optimizer.pt"


def member(data: bytes = DATA, stated: int | None = None) -> Member:
    return Member(Memory(b".." + data), 2, len(data), zlib.crc32(data) if stated is None else stated)


def stream(ledger: Ledger, *tensors: Tensor) -> bytes:
    buffer = memoryview(bytearray(7))
    return b"".join(bytes(chunk) for tensor in tensors for chunk in ledger.chunks(tensor, buffer))


@pytest.fixture(params=[True, False], ids=["combined", "read again"])
def combines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a way to combine CRCs, which only some platforms have."""
    if not request.param:
        monkeypatch.setattr(ledger_module, "combine", None)


@pytest.mark.usefixtures("combines")
@pytest.mark.parametrize(
    "parts",
    [
        [(0, 100)],
        [(0, 40), (40, 60)],
        [(50, 50), (0, 50)],
        [(10, 5), (20, 30)],
        [(0, 60), (40, 60)],
        [(99, 1)],
        [(3, 0)],
    ],
    ids=str,
)
def test_a_crc_is_checked_whatever_was_read(parts: list[tuple[int, int]]) -> None:
    good, ledger = member(), Ledger()
    tensors = [contiguous("U8", (size,), good, offset) for offset, size in parts]
    assert stream(ledger, *tensors) == b"".join(DATA[offset : offset + size] for offset, size in parts)
    ledger.check()
    bad, ledger = member(stated=1), Ledger()
    stream(ledger, *(contiguous("U8", (size,), bad, offset) for offset, size in parts))
    if parts == [(3, 0)]:  # nothing was read of it
        ledger.check()
        return
    with pytest.raises(FileError) as caught:
        ledger.check()
    assert str(caught.value) == (
        "optimizer.pt: data/0 does not have the CRC-32 that the container states: the file is damaged"
    )


@pytest.mark.usefixtures("combines")
@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), max_size=6), st.integers(0, 99))
def test_any_flipped_byte_is_found(parts: list[tuple[int, int]], flipped: int) -> None:
    whole = [contiguous("U8", (min(size, 100 - offset),), member(), offset) for offset, size in parts]
    ledger = Ledger()
    stream(ledger, *whole)
    ledger.check()
    damaged = member(DATA[:flipped] + bytes([DATA[flipped] ^ 16]) + DATA[flipped + 1 :], zlib.crc32(DATA))
    ledger = Ledger()
    stream(ledger, *(contiguous("U8", (min(size, 100 - offset),), damaged, offset) for offset, size in parts))
    if any(size and offset < 100 for offset, size in parts):
        with pytest.raises(FileError):
            ledger.check()
    else:
        ledger.check()


def test_a_gathered_tensor_is_checked_too() -> None:
    for stated, fails in ((None, False), (1, True)):
        source, ledger = member(stated=stated), Ledger()
        tensor = contiguous("U8", (10, 10), source).permute((1, 0))
        hidden = Tensor("U8", (100,), (Piece(tensor, 0, Flat(0, 100)),))
        strided = Tensor("U8", (100, 2), (Piece(tensor, 0, Box((0, 0), (100, 2)), (1, 0)),))
        assert stream(ledger, tensor, hidden)[:10] == DATA[0:100:10]
        assert stream(ledger, strided)[:4] == bytes([0, 0, 10, 10])
        if fails:
            with pytest.raises(FileError):
                ledger.check()
        else:
            ledger.check()


def test_sources_without_a_crc_are_not_read_again() -> None:
    ledger = Ledger()
    stream(ledger, contiguous("U8", (5,), Memory(DATA)))
    assert ledger._seen == {}
