"""Any number of files to read, few of them open; names that could lead out of their folder."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_state_format.errors import FileError, RefusedError
from lora_state_format.io.files import MAX_OPEN, Files, inside, is_plain
from lora_state_format.io.folders import new_folder
from lora_state_format.io.remote import Remote
from lora_state_format.model.sources import File, readable_together


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    files = Files()
    paths = [tmp_path / str(number) for number in range(MAX_OPEN + 40)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 3)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):
        for number, path in enumerate(paths):
            out = bytearray(2)
            files[path].readinto(1, memoryview(out))
            assert out == bytes([number]) * 2
    assert len(list(Path("/proc/self/fd").iterdir())) - before == MAX_OPEN
    files.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_threads_read_more_files_than_may_be_open(tmp_path: Path) -> None:
    """A file that leaves is still read by whoever began to."""
    files = Files()
    paths = [tmp_path / str(number) for number in range(MAX_OPEN + 40)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 1000)

    def read(start: int) -> bool:
        out = bytearray(1000)
        for at in [*range(start, len(paths)), *range(start)] * 3:
            files[paths[at]].readinto(0, memoryview(out))
            if out != bytes([at]) * 1000:
                return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, (0, 30, 60, 90)))
    files.close()


def test_what_may_be_read_by_several_threads(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"one")
    with File(path) as file, Files() as files:
        assert readable_together([file, files])
        assert not readable_together([file, object()])  # a decoder, of whose library nothing is known
    assert not Remote.readable_together


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    files = Files()
    changed = tmp_path / "x"
    changed.write_bytes(b"one")
    out = memoryview(bytearray(3))
    files[changed].readinto(0, out)
    files.check_unchanged()
    changed.write_bytes(b"another")
    with pytest.raises(FileError) as at_the_end:
        files.check_unchanged()
    assert str(at_the_end.value) == f"{changed}: changed while it was read"
    files.close()
    with pytest.raises(FileError):  # and when it is opened again
        files[changed].readinto(0, out)


def test_a_folder_that_is_replaced_is_noticed(tmp_path: Path) -> None:
    """Whether its files are open already, are opened again, or for the first time."""
    folder = tmp_path / "folder"

    def made(data: bytes) -> None:
        with new_folder(folder, force=True, replaces=("x", "y")) as new:
            new.write(("x",), [data])
            new.write(("y",), [data])

    made(b"one")
    files = Files(folder)
    out = memoryview(bytearray(3))
    files[folder / "x"].readinto(0, out)
    made(b"two")
    message = f"{folder}: was replaced while it was read: read it again"
    with pytest.raises(FileError) as first:
        files[folder / "y"]
    with pytest.raises(FileError) as at_the_end:
        files.check_unchanged()
    assert str(first.value) == str(at_the_end.value) == message
    files[folder / "x"].readinto(0, out)
    assert bytes(out) == b"one"  # what is open can be read to its end
    files.close()
    with pytest.raises(FileError):
        files[folder / "x"].readinto(0, out)
    files = Files(folder)
    shutil.rmtree(folder)
    with pytest.raises(FileError):
        files.check_unchanged()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\\b", "a\0b", "a" * 256, "é" * 128, 3, None, ["a"]])
def test_names_that_could_lead_out_of_their_folder(name: object, tmp_path: Path) -> None:
    assert not is_plain(name)
    with pytest.raises(RefusedError) as caught:
        inside(tmp_path, name, tmp_path / "index.json")
    shown = str(name)[:100]
    assert str(caught.value) == (
        f"{tmp_path / 'index.json'}: names {shown!r}, which is not the name of a file in its folder"
    )


@pytest.mark.parametrize("name", ["a", ".metadata", "a b", "layers.0.weight", "..a", "é" * 127, "-rf"])
def test_names_of_files(name: str, tmp_path: Path) -> None:
    assert is_plain(name)
    assert inside(tmp_path, name, "index") == tmp_path / name
