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

from lora_state_format import container

SCRIPT: Final = Path(__file__).with_name("crash_writer.py")
NAME: Final = "optimizer.safetensors"


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
    container.write(writer.state(0), path)
    done = run(
        "import resource, pathlib\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "try:\n"
        "    w.container.write(w.state(1, 50_000), path, force=True, max_shard_size=w.LAYOUTS[sys.argv[2]])\n"
        "except OSError as error:\n"
        "    print(error.errno, error.filename, type(error).__name__)\n",
        path,
        layout,
    )
    assert (done.stdout, done.stderr) == (f"{errno.EFBIG} {path} OSError\n", "")
    assert writer.number_at(path) == 0
    assert [file.name for file in tmp_path.iterdir()] == [NAME]


def test_a_folder_that_may_not_be_written(writer: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        path = Path(folder) / NAME
        container.write(writer.state(0), path)
        Path(folder).chmod(0o555)
        done = run(
            "if os.geteuid() == 0:\n"
            "    os.setgid(65534); os.setuid(65534)\n"
            "import pathlib\n"
            "path = pathlib.Path(sys.argv[1])\n"
            "try:\n"
            "    w.container.write(w.state(1), path, force=True)\n"
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
    container.write(writer.state(0), path)
    code = (
        "import pathlib, random\n"
        "path, own = pathlib.Path(sys.argv[1]), int(sys.argv[2])\n"
        "choose = random.Random(own)\n"
        "for n in range(60):\n"
        "    layout = choose.choice(list(w.LAYOUTS.values()))\n"
        "    w.container.write(w.state(own + n % 50, 100), path, force=True, max_shard_size=layout and 10 * layout)\n"
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
    container.write(writer.state(0), path, force=True)
    assert [file.name for file in tmp_path.iterdir()] == [NAME]


def test_a_writer_does_not_sweep_a_living_one_away(tmp_path: Path, writer: ModuleType) -> None:
    path = tmp_path / NAME
    inner: list[int] = []

    def meanwhile(_: int) -> None:
        if not inner:
            inner.append(1)
            container.write(writer.state(2), path, force=True)

    container.write(writer.state(1), path, force=True, progress=meanwhile)
    assert writer.number_at(path) == 1


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path, writer: ModuleType) -> None:
    path = tmp_path / NAME

    def meanwhile(_: int) -> None:
        if not path.exists():
            container.write(writer.state(2), path)

    with pytest.raises(FileExistsError):
        container.write(writer.state(1), path, progress=meanwhile)
    assert writer.number_at(path) == 2
    assert [file.name for file in tmp_path.iterdir()] == [NAME]
