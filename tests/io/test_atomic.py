"""One file, replaced whole; what is not to be replaced, whenever it comes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from lora_state_format.errors import TargetExistsError
from lora_state_format.foreign import flax, torch_save
from lora_state_format.format import writing
from lora_state_format.io import atomic, plain
from lora_state_format.io.atomic import SMALL, gathered, made_folders, write_file
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import Group, Naming, Optimizer, OptimizerState, Parameter, Role, Slot
from lora_state_format.model.tensors import contiguous
from lora_state_format.operations import export

TENSOR: Final = contiguous("F32", (2,), Memory(bytes(8)))
STATE: Final = OptimizerState(
    (Optimizer(),),
    (Group(0, (), 1),),
    (Parameter("a", (2,), {"exp_avg": Slot(TENSOR, Role.PARAM)}),),
    Naming("model"),
)
WAYS: Final[dict[str, Callable[[Path, bool], Any]]] = {
    "write_file": lambda path, force: write_file(path, [b"x"], force=force),
    "plain": lambda path, force: plain.save({"a": TENSOR}, path, force=force),
    "torch_save": lambda path, force: torch_save.save({"a": TENSOR}, path, force=force),
    "flax": lambda path, force: flax.save({"a": TENSOR}, path, force=force),
    "export": lambda path, force: export.export(STATE, path, "exp_avg", force=force),
    "writing": lambda path, force: writing.write(STATE, path, force=force),
}
"""Everything that writes one file."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("exchanging", [False, True])
def test_what_is_there_or_comes_is_not_replaced(
    way: str, exchanging: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file, or a link to nowhere, before the first byte, or just before the last step."""
    if not exchanging:
        monkeypatch.setattr(atomic, "_renameat2", lambda *_: False)
    target = tmp_path / "target"
    target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(TargetExistsError) as caught:
        WAYS[way](target, False)
    assert str(caught.value) == f"{target} exists; pass force=True to replace it"
    assert target.is_symlink()
    target.unlink()
    finish = atomic.TemporaryFile.finish

    def late(file: atomic.TemporaryFile, header: bytes = b"") -> None:
        finish(file, header)
        target.write_bytes(b"somebody else's")

    monkeypatch.setattr(atomic.TemporaryFile, "finish", late)
    with pytest.raises(TargetExistsError):
        WAYS[way](target, False)
    assert target.read_bytes() == b"somebody else's"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_the_system_refuses_what_comes_after_the_last_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    monkeypatch.setattr(atomic, "check_target", lambda *_, **__: None)
    target.write_bytes(b"somebody else's")
    with pytest.raises(TargetExistsError) as caught:
        write_file(target, [b"x"], force=False)
    assert str(caught.value) == f"{target} exists; pass force=True to replace it"
    assert target.read_bytes() == b"somebody else's"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("way", [way for way in WAYS if way != "writing"])
def test_what_is_no_file_is_never_replaced(way: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("pipe", "is a device or a pipe, and only files are replaced; choose another name"),
        ("folder", "is a folder, and a file is to be written; choose another name"),
    ):
        with pytest.raises(TargetExistsError) as caught:
            WAYS[way](tmp_path / name, True)
        assert str(caught.value) == f"{tmp_path / name} {message}"
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


@pytest.mark.parametrize("way", WAYS)
def test_a_link_is_replaced_and_not_what_it_leads_to(way: str, tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    WAYS[way](tmp_path / "link", True)
    assert (tmp_path / "real").read_bytes() == b"precious"
    assert not (tmp_path / "link").is_symlink()


def test_a_link_with_the_name_of_a_left_over_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"1")
    (tmp_path / ".target.0123456789abcdef.tmp").symlink_to(tmp_path / "precious")
    write_file(tmp_path / "target", [b"x"], force=False)
    assert (tmp_path / "precious").read_bytes() == b"1"


def test_an_error_of_the_chunks_leaves_nothing(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"x" * (SMALL + 1)
        raise ZeroDivisionError

    (tmp_path / "target").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        write_file(tmp_path / "target", chunks(), force=True)
    assert (tmp_path / "target").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_cannot_sync(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``EINVAL`` says that there is nothing to wait for; ``EIO`` that bytes were lost."""

    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            write_file(tmp_path / "target", [b"x"], force=False)
        assert not list(tmp_path.iterdir())
    else:
        write_file(tmp_path / "target", [b"x"], force=False)
        assert (tmp_path / "target").read_bytes() == b"x"


def test_small_chunks_are_written_together() -> None:
    chunks: list[bytes | memoryview] = [
        b"a" * 3, b"b" * SMALL, b"", b"c", b"d" * (2 * SMALL), memoryview(b"e"), b"f" * (SMALL - 1), b"g",
    ]  # fmt: skip
    found = [bytes(chunk) for chunk in gathered(chunks)]
    assert b"".join(found) == b"".join(map(bytes, chunks))
    assert len(found) == 6


def test_folders_that_were_made_go_again(tmp_path: Path) -> None:
    with made_folders(tmp_path / "kept" / "target"):
        assert (tmp_path / "kept").is_dir()
    (tmp_path / "kept").rmdir()
    with pytest.raises(ZeroDivisionError), made_folders(tmp_path / "a" / "b" / "target"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    with pytest.raises(ZeroDivisionError), made_folders(tmp_path / "a" / "b" / "target"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]
