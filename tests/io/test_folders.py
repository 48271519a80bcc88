"""Folders that appear whole, and of which nothing is removed but what they replace."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lora_state_format.errors import TargetExistsError, UnrepresentableError
from lora_state_format.io import atomic, folders
from lora_state_format.io.folders import HEAD, new_folder, sweep


def made(target: Path, data: bytes, *, force: bool = False, replaces: tuple[str, ...] = ("x", "a/b/y")) -> None:
    with new_folder(target, force=force, replaces=replaces) as folder:
        folder.write(("x",), [data])
        folder.write(("a", "b", "y"), [data, data])


def failing(target: Path) -> None:
    with new_folder(target, force=True, replaces=("x", "a/b/y")) as folder:
        folder.write(("a", "x"), [b"new"])
        raise ZeroDivisionError


def twice(target: Path) -> None:
    with new_folder(target, force=False) as folder:
        folder.write(("a", "x"), [b"1"])
        folder.write(("a", "x"), [b"2"])


def one(target: Path, place: tuple[str, ...], data: bytes = b"1") -> None:
    with new_folder(target, force=False) as folder:
        folder.write(place, [data])


def overtaken(target: Path, force: bool) -> None:
    with new_folder(target, force=force) as folder:
        folder.write(("x",), [b"new"])
        target.mkdir()
        (target / "precious").write_bytes(b"1")


def listed(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def test_a_folder_vanishes_when_its_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        failing(tmp_path / "target")
    assert not list(tmp_path.iterdir())


def test_the_old_folder_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "target"
    made(target, b"old")
    with pytest.raises(ZeroDivisionError):
        failing(target)
    assert (target / "x").read_bytes() == b"old"
    made(target, b"new", force=True)
    assert ((target / "x").read_bytes(), (target / "a" / "b" / "y").read_bytes()) == (b"new", b"newnew")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "a\\b", "a\0b", "a\nb", "a\u202eb", "a" * 256, "\udc80"])
def test_a_name_that_is_not_plain(name: str, tmp_path: Path) -> None:
    for place in ((name,), ("a", name), (name, "x")):
        with pytest.raises(UnrepresentableError) as caught:
            one(tmp_path / "target", place)
        assert str(caught.value) == (
            f"{name[:100]!r} would become the name of a file, and is not the plain name of one: rename it"
        )
        assert not list(tmp_path.iterdir())


def test_two_files_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(UnrepresentableError) as caught:
        twice(tmp_path / "target")
    assert str(caught.value) == "two files would be called 'a/x': rename one"
    assert not list(tmp_path.iterdir())


# --- what is replaced -------------------------------------------------------------------------------------------------


def test_other_files_are_never_removed(tmp_path: Path) -> None:
    """Beside the files, in folders among them, as folders with their names, as links."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "y").write_bytes(b"precious")
    for number, (place, shown) in enumerate(
        [("thesis.tex", "thesis.tex"), ("a/thesis.tex", "a/thesis.tex"), ("x/thesis.tex", "x/thesis.tex"),
         ("optimizer_notes/a.tex", "optimizer_notes/a.tex"), ("a/empty/", "a/empty"), ("a/b", "a/b")]
    ):  # fmt: skip
        target = tmp_path / f"target{number}"
        path = target / place
        path.parent.mkdir(parents=True)
        if place == "a/b":
            path.symlink_to(outside)
        elif place.endswith("/"):
            path.mkdir()
        else:
            path.write_bytes(b"precious")
        with pytest.raises(TargetExistsError) as caught:
            made(target, b"new", force=True, replaces=("x", "a/b/y"))
        assert str(caught.value) == f"{target} holds other files too ({shown}); choose another folder"
        assert path.is_dir() or path.read_bytes() == b"precious"
    assert (outside / "y").read_bytes() == b"precious"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_the_old_checkpoint_held_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "target"
    (target / "old" / "inner").mkdir(parents=True)
    (target / "old" / "inner" / "z").write_bytes(b"1")
    made(target, b"new", force=True, replaces=("old/inner/z",))
    assert listed(target) == ["a/b/y", "x"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("kind", ["file", "link", "dangling", "folder"])
def test_a_target_that_is_there(kind: str, tmp_path: Path) -> None:
    target, inside = tmp_path / "target", tmp_path / "inside"
    inside.mkdir()
    match kind:
        case "file":
            target.write_bytes(b"precious")
        case "link":
            target.symlink_to(inside)
        case "dangling":
            target.symlink_to(tmp_path / "nowhere")
        case "folder":
            target.mkdir()
    with pytest.raises(TargetExistsError) as caught:
        made(target, b"new")
    assert str(caught.value) == f"{target} exists; pass force=True to replace it"
    if kind == "folder":
        made(target, b"new", force=True)
        assert (target / "x").read_bytes() == b"new"
        return
    with pytest.raises(TargetExistsError) as forced:
        made(target, b"new", force=True)
    assert (
        str(forced.value)
        == {
            "file": f"{target} is a file, and a folder is to be written; choose another name",
            "link": f"{target} is a link, and only folders are replaced; name the folder that it leads to",
            "dangling": f"{target} is a link, and only folders are replaced; name the folder that it leads to",
        }[kind]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside", "target"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("exchanging", [False, True])
def test_what_comes_while_a_folder_is_written(
    force: bool, exchanging: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that was not there, or a file in it: somebody else's, and kept."""
    if not exchanging:
        monkeypatch.setattr(atomic, "_renameat2", lambda *_: False)
    target = tmp_path / "target"
    with pytest.raises(TargetExistsError):
        overtaken(target, force)
    assert listed(tmp_path) == ["target/precious"]


# --- left-overs -------------------------------------------------------------------------------------------------------


def dead(target: Path, names: str, *, head: bytes = HEAD) -> tuple[Path, Path]:
    """What a dead writer left: its folder, and the journal."""
    folder = target.with_name(f".{target.name}.0123456789abcdef.tmp")
    journal = target.with_name(f".{target.name}.0123456789abcdef.names")
    (folder / "a").mkdir(parents=True)
    for name in ("x", "a/y"):
        (folder / name).write_bytes(b"1")
    journal.write_bytes(head + names.encode())
    return folder, journal


def test_left_overs_are_removed_by_name(tmp_path: Path) -> None:
    target = tmp_path / "target"
    dead(target, '"x"\n"a/y"\n"never/made"\n')
    (tmp_path / ".target.0123456789abcdeg.tmp").write_bytes(b"precious")
    (tmp_path / ".other.0123456789abcdef.names").write_bytes(HEAD)
    made(target, b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".other.0123456789abcdef.names", ".target.0123456789abcdeg.tmp", "target",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "head"),
    [
        ('"x"\n"a/y', HEAD),  # a line that was not finished
        ('"../outside"\n"/etc/hostname"\n"a/../../outside"\n["x"]\n1\n"x"\n', HEAD),
        ("not JSON\n", HEAD),
        ('"x"\n"a/y"\n', b"notes of my own\n"),
    ],
)
def test_what_a_journal_does_not_name_stays(names: str, head: bytes, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"precious")
    folder, journal = dead(tmp_path / "target", names, head=head)
    made(tmp_path / "target", b"new")
    assert (folder / "a" / "y").exists()
    assert journal.exists()
    assert (tmp_path / "outside").read_bytes() == b"precious"


def test_a_link_in_place_of_a_left_over_is_not_followed(tmp_path: Path) -> None:
    target, precious = tmp_path / "target", tmp_path / "precious"
    precious.mkdir()
    (precious / "x").write_bytes(b"1")
    tmp_path.joinpath(".target.0123456789abcdef.tmp").symlink_to(precious)
    tmp_path.joinpath(".target.0123456789abcdef.names").write_bytes(HEAD + b'"x"\n')
    made(target, b"new")
    assert (precious / "x").read_bytes() == b"1"


def test_a_living_writer_is_not_swept_away(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with new_folder(target, force=True, replaces=("x", "a/b/y")) as folder:
        folder.write(("x",), [b"first"])
        made(target, b"second", force=True)
        folder.write(("a", "b", "y"), [b"first"])
    assert listed(tmp_path) == ["target/a/b/y", "target/x"]
    assert (target / "x").read_bytes() == b"first"


# --- without an exchange of names -------------------------------------------------------------------------------------


@pytest.fixture
def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that knows no flags of ``renameat2``; ``test_kills`` has the real error."""
    monkeypatch.setattr(atomic, "_renameat2", lambda *_: False)


@pytest.mark.usefixtures("without_exchange")
def test_the_old_folder_steps_aside(tmp_path: Path) -> None:
    target = tmp_path / "target"
    made(target, b"old")
    made(target, b"new", force=True)
    assert (target / "x").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.usefixtures("without_exchange")
def test_the_old_folder_comes_back_if_the_new_one_cannot_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    made(target, b"old")
    rename = Path.rename

    def broken(path: Path, other: Path) -> Path:
        if path.name.endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, other)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="Input/output error"):
        made(target, b"new", force=True)
    assert (target / "x").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_folder_that_stood_aside_when_its_writer_died_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "target"
    made(target, b"old")
    dead(target, '"x"\n"a/y"\n"a/b/y"\n')
    target.rename(tmp_path / ".target.0123456789abcdef.old")
    sweep(target)
    assert (target / "x").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_journal_says_what_it_is() -> None:
    assert HEAD == b"lora_state_format: files that a writer may have left behind\n"
    assert folders.HEAD.endswith(b"\n")


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        made(tmp_path / "target", b"1")
    finally:
        os.umask(old)
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "target" / "x").stat().st_mode & 0o777 == 0o640


def test_an_error_of_the_disk_names_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the name that a file has for now; and an error of the source names the source."""
    written = os.pwrite

    def full(descriptor: int, data: bytes, position: int) -> int:
        if bytes(data) == b"new":
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        one(tmp_path / "target", ("a", "x"), b"new")
    assert caught.value.filename == str(tmp_path / "target")
    assert not list(tmp_path.iterdir())
