"""Any number of files to read, few of them open; names that could lead out of their folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_state_format.errors import FileError
from lora_state_format.io.files import MAX_OPEN, Files


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
