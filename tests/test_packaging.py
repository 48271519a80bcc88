"""What is built is what was written: the converters' folder, the types marker, the spec, and no stray import name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is needed to build, so that building leaves nothing behind here."""
    copy = tmp_path_factory.mktemp("source")
    for path in ROOT.iterdir():
        if path.is_dir() and path.name in {"converters", "lora_state_format", "spec", "tests"}:
            shutil.copytree(path, copy / path.name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file():
            shutil.copy(path, copy)
    return copy


def build(source: Path, hook: str) -> Path:
    """Call a build hook of the project's backend, as pip does."""
    code = f"from setuptools import build_meta; print(build_meta.{hook}('dist'))"
    result = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True)
    return source / "dist" / result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    return build(source, "build_wheel")


def test_the_wheel_holds_every_module(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    core = {str(path.relative_to(ROOT)) for path in (ROOT / "lora_state_format").rglob("*.py")}
    converters = {f"lora_state_format/converters/{path.name}" for path in (ROOT / "converters").glob("*.py")}
    assert found == core | converters | {"lora_state_format/py.typed", "lora_state_format/operations/page.html"}


def test_the_installed_wheel_works_and_takes_no_other_name(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, 'site')\n"
        "from lora_state_format import registry\n"
        "print(*(registry.get(name).__file__ for name in registry.BUILT_IN), sep='\\n')\n"
        "try:\n    import converters\nexcept ModuleNotFoundError:\n    print('no converters')\n"
    )
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=alone, capture_output=True, text=True, check=True
    )
    *files, last = result.stdout.splitlines()
    assert last == "no converters"
    assert files
    assert all(Path(file).is_relative_to(tmp_path / "site") for file in files)


def test_the_source_distribution_holds_the_spec_and_the_tests(source: Path) -> None:
    with tarfile.open(build(source, "build_sdist")) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    files = [path for path in (ROOT / "spec").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {str(path.relative_to(ROOT)) for path in files} <= found
    assert {
        "tests/test_packaging.py",
        "lora_state_format/converters/__init__.py",
        "Makefile",
        "constraints.txt",
        "LICENSE",
    } <= found
