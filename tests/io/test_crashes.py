"""What a path means when writers die, run out of room, or meet (W14)."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest

from lora_state_format import cli
from lora_state_format.format import writing
from lora_state_format.model.sources import File

SCRIPT: Final = Path(__file__).with_name("crash_writer.py")
NAME: Final = "optimizer.safetensors"
FORMATS: Final = {"named": "a.safetensors", "torch_optimizer": "a.pt", "dcp": "a", "accelerate": "b"}


@pytest.fixture(scope="session")
def writer(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    return load_module(SCRIPT)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("nothing", "file"), ("nothing", "set"), ("file", "file"), ("file", "set"), ("set", "file"), ("set", "set"),
        ("set", "other-set"),
    ],
)  # fmt: skip
def test_a_death_at_any_operation(before: str, after: str, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, SCRIPT, "every", folder, before, after], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    deaths, new = map(int, done.stdout.split())
    assert deaths >= 12
    assert 0 < new < deaths


def test_deaths_at_random_moments() -> None:
    """Five of each way to write; ``make crashes`` has 200."""
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, SCRIPT, "random", "5"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"(\w+): 5 killed, (\d) old, (\d) new, 0 lost, 0 litter\n", done.stdout)
    assert [name for name, _, _ in found] == ["convert", "write", "shards", "background"]
    assert all(int(old) + int(new) == 5 for _, old, new in found)


def run(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """A program that may use ``crash_writer``."""
    prelude = f"import os, sys; sys.path.insert(0, {os.fspath(SCRIPT.parent)!r})\nimport crash_writer as w\n"
    command = [sys.executable, "-c", prelude + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("layout", ["file", "set"])
def test_a_full_disk(layout: str, tmp_path: Path, writer: ModuleType) -> None:
    path = tmp_path / NAME
    writing.write(writer.state(0), path)
    done = run(
        "import resource, pathlib\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "try:\n"
        "    w.writing.write(w.state(1, 50_000), path, force=True, max_shard_size=w.LAYOUTS[sys.argv[2]])\n"
        "except OSError as error:\n"
        "    print(error.errno, error.filename, type(error).__name__)\n",
        path,
        layout,
    )
    assert (done.stdout, done.stderr) == (f"{errno.EFBIG} {path} OSError\n", "")
    assert writer.number_at(path) == 0
    assert [file.name for file in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize("to", FORMATS)
def test_a_full_disk_for_a_conversion(to: str, tmp_path: Path, writer: ModuleType) -> None:
    writing.write(writer.state(0, 50_000), tmp_path / NAME)
    done = run(
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from lora_state_format.cli import run\n"
        "sys.exit(run(['convert', *sys.argv[1:]]))\n",
        tmp_path / NAME,
        tmp_path / "target",
        "--to",
        to,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert re.fullmatch(r"error: .*File too large\n", done.stderr)
    assert [file.name for file in tmp_path.iterdir()] == [NAME]


# --- sources that do not stay as they are -------------------------------------------------------------------------


def flip(file: Path) -> None:
    """Change one bit of the last byte."""
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read(1)[0]
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last ^ 1]))


def shorten(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


EVENTS: Final[dict[str, Callable[[Path], None]]] = {"flip": flip, "shorten": shorten, "vanish": Path.unlink}
DONE: Final = [
    (source, to)
    for source in ("named", "set", "torch_optimizer", "dcp")
    for to in (*FORMATS, "export", "rename")
    if (source, to) != ("torch_optimizer", "rename")  # which has no names
]


@pytest.fixture
def source(tmp_path: Path, writer: ModuleType, request: pytest.FixtureRequest) -> tuple[list[str], Path]:
    """What to convert, with options, and the file that its bytes are in."""
    path, name = tmp_path / FORMATS["named"], request.param
    # More than is read at a time: 4 MiB for each of four parameters, and no options that a format could miss.
    writing.write(writer.state(1, 1 << 20), path, max_shard_size=1 << 22 if name == "set" else None)
    if name == "set":
        return [str(tmp_path / "a.safetensors.index.json")], max(tmp_path.glob("*-of-*"))
    if name == "named":
        return [str(path)], path
    target = tmp_path / FORMATS[name]
    assert cli.run(["convert", str(path), str(target), "--to", name]) == 0
    path.unlink()
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\nd\n")
    file = target if target.is_file() else max(target.iterdir(), key=lambda found: found.stat().st_size)
    return [str(target), *([] if name == "dcp" else ["--names", str(names)])], file


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize(("source", "to"), DONE, indirect=["source"])
def test_a_source_that_changes_while_it_is_read(
    source: tuple[list[str], Path], to: str, event: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path, *options), file = source
    before, target = set(tmp_path.rglob("*")), tmp_path / "target"
    read, done = File.readinto, False

    def readinto(opened: File, offset: int, out: memoryview) -> None:
        nonlocal done
        read(opened, offset, out)
        if not done and len(out) == 1 << 20:
            EVENTS[event](file)
            done = True

    monkeypatch.setattr(File, "readinto", readinto)
    match to:
        case "export":
            code = cli.run(["export", path, str(target), "--slot", "exp_avg", *options])
        case "rename":
            code = cli.run(["rename", path, str(target), "--rename", "a", "e"])
        case _:
            code = cli.run(["convert", path, str(target), "--to", to, *options])
    assert done
    if event == "vanish" and code == 0:  # what is open can be read to its end
        assert sum(found.stat().st_size for found in {*tmp_path.rglob("*")} - before) >= 1 << 24
    else:
        assert code == 3 or (event == "flip" and code == 1)  # the digest, where it is compared first
        assert set(tmp_path.rglob("*")) <= before


def test_a_folder_that_may_not_be_written(writer: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        path = Path(folder) / NAME
        writing.write(writer.state(0), path)
        Path(folder).chmod(0o555)
        done = run(
            "if os.geteuid() == 0:\n"
            "    os.setgid(65534); os.setuid(65534)\n"
            "import pathlib\n"
            "path = pathlib.Path(sys.argv[1])\n"
            "try:\n"
            "    w.writing.write(w.state(1), path, force=True)\n"
            "except PermissionError as error:\n"
            "    print(error.strerror, os.path.dirname(error.filename))\n"
            "print(w.number_at(path))\n",
            path,
        )
        assert (done.stdout, done.stderr) == (f"Permission denied {folder}\n0\n", "")
        Path(folder).chmod(0o755)
        assert [file.name for file in Path(folder).iterdir()] == [NAME]


def test_writers_and_readers_at_once(tmp_path: Path, writer: ModuleType) -> None:
    """Two writers that replace each other's files and sets, and readers that always find a whole state."""
    path = tmp_path / NAME
    writing.write(writer.state(0), path)
    code = (
        "import pathlib, random\n"
        "path, own = pathlib.Path(sys.argv[1]), int(sys.argv[2])\n"
        "choose = random.Random(own)\n"
        "for n in range(60):\n"
        "    layout = choose.choice(list(w.LAYOUTS.values()))\n"
        "    w.writing.write(w.state(own + n % 50), path, force=True, max_shard_size=layout)\n"
    )
    prelude = f"import os, sys; sys.path.insert(0, {os.fspath(SCRIPT.parent)!r})\nimport crash_writer as w\n"
    processes = [
        subprocess.Popen([sys.executable, "-c", prelude + code, path, str(own)], stderr=subprocess.PIPE, text=True)
        for own in (100, 200)
    ]
    seen = set()
    while any(process.poll() is None for process in processes):
        seen.add(writer.number_at(path))
    for process in processes:
        _, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")
    assert {number // 100 for number in seen} >= {1, 2}
    assert writer.number_at(path) in (109, 209)
    writing.write(writer.state(0), path, force=True)
    assert [file.name for file in tmp_path.iterdir()] == [NAME]


def test_a_writer_does_not_sweep_a_living_one_away(tmp_path: Path, writer: ModuleType) -> None:
    path = tmp_path / NAME
    inner: list[int] = []

    def meanwhile(_: int) -> None:
        if not inner:
            inner.append(1)
            writing.write(writer.state(2), path, force=True)

    writing.write(writer.state(1), path, force=True, progress=meanwhile)
    assert writer.number_at(path) == 1


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path, writer: ModuleType) -> None:
    path = tmp_path / NAME

    def meanwhile(_: int) -> None:
        if not path.exists():
            writing.write(writer.state(2), path)

    with pytest.raises(FileExistsError):
        writing.write(writer.state(1), path, progress=meanwhile)
    assert writer.number_at(path) == 2
    assert [file.name for file in tmp_path.iterdir()] == [NAME]
