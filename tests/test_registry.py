from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_state_format import registry
from lora_state_format.errors import (
    AmbiguousFormatError,
    FileError,
    MissingDependencyError,
    OptionError,
    UnknownFormatError,
)
from lora_state_format.foreign.torch_save import save
from lora_state_format.operations.conversion import read


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on ``sys.path`` to install packages in; what they register is forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    registry._entries.cache_clear()
    yield folder
    registry._entries.cache_clear()
    for name in [name for name in sys.modules if name.startswith("installed_")]:
        del sys.modules[name]


def install(folder: Path, name: str, module: str, code: str) -> None:
    (folder / f"{module}.py").write_text(code)
    metadata = folder / f"{module}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[lora_state_format.converters]\n{name} = {module}\n")


CONVERTER = """
from lora_state_format.registry import Match
NAME = {name!r}
DESCRIPTION = "files that end in .{suffix}"
def detect(path):
    return Match("the suffix .{suffix}", path, generic={generic}) if path.suffix == ".{suffix}" else None
def read(path):
    raise AssertionError("only asked to detect")
"""


def claim(folder: Path, name: str, suffix: str, *, generic: bool = False) -> None:
    install(folder, name, f"installed_{name}", CONVERTER.format(name=name, suffix=suffix, generic=generic))


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_a_built_in_converter_is_what_its_row_says(name: str) -> None:
    converter = registry.get(name)
    assert (converter.NAME, converter.__name__) == (name, registry.BUILT_IN[name])  # type: ignore[attr-defined]
    assert converter.DESCRIPTION
    assert callable(converter.detect)
    assert callable(converter.read)


def test_every_module_of_the_folder_has_a_row() -> None:
    folder = Path(__file__).parent.parent / "converters"
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert {module.rpartition(".")[2] for module in registry.BUILT_IN.values()} == modules


def test_a_converter_is_one_object() -> None:
    assert registry.get("named") is registry.get("named")


def test_unknown_name() -> None:
    with pytest.raises(OptionError) as caught:
        registry.get("nosuch")
    assert str(caught.value) == f"no converter 'nosuch'; there are: {', '.join(sorted(registry.BUILT_IN))}"


def test_another_package_adds_a_converter(package: Path) -> None:
    claim(package, "plugged", "plugged")
    assert "plugged" in registry.names()
    assert "installed_plugged" not in sys.modules, "listed, not loaded"
    assert registry.get("plugged").DESCRIPTION == "files that end in .plugged"
    path = package / "state.plugged"
    path.touch()
    converter, match = registry.detect(path)
    assert (converter.NAME, match.reason, match.path) == ("plugged", "the suffix .plugged", path)


MOVER = """
from lora_state_format.registry import Match
NAME = "mover"
DESCRIPTION = "folders that do not stay"
def moved(path):
    path.rename(path.with_name("old"))
    path.mkdir()
def detect(path):
    if (path / "while detected").exists():
        return moved(path)
    return Match("it is a folder", path) if path.is_dir() else None
def read(match, options):
    if (match.path / "while read").exists():
        moved(match.path)
    return len(list(match.path.iterdir()))
"""


@pytest.mark.parametrize("when", ["while detected", "while read"])
@pytest.mark.parametrize("source_format", ["mover", None])
def test_a_folder_that_is_replaced(package: Path, when: str, source_format: str | None) -> None:
    """Whatever was found in it, or missed: a writer may have put another one there, and be emptying the old one."""
    install(package, "mover", "installed_mover", MOVER)
    path = package / "checkpoint"
    path.mkdir()
    (path / "file").touch()
    found: Any = registry.read(path, source_format)
    assert found == 1
    (path / when).touch()
    with pytest.raises(FileError) as caught:
        registry.read(path, source_format)
    assert str(caught.value) == f"{path}: was replaced while it was read: read it again"


def test_a_name_that_is_taken(package: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A built-in converter keeps its name, and every command goes on."""
    install(package, "torch_optimizer", "installed_impostor", "")
    assert registry.get("torch_optimizer").NAME == "torch_optimizer"
    assert registry.names() == sorted(registry.BUILT_IN)
    (message,) = caplog.messages
    assert message == (
        "two converters are called 'torch_optimizer': lora_state_format.converters.torch_optimizer is used, not "
        "installed_impostor"
    )


def test_two_packages_with_one_name(package: Path, caplog: pytest.LogCaptureFixture) -> None:
    claim(package, "twin", "twin")
    install(package, "twin", "installed_two", "")
    assert registry.names() == sorted({*registry.BUILT_IN, "twin"})
    (message,) = caplog.messages
    assert message in {
        f"two converters are called 'twin': {kept} is used, not {other}"
        for kept, other in (("installed_twin", "installed_two"), ("installed_two", "installed_twin"))
    }


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import a_package_that_is_not_there", "ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_converter_that_cannot_be_imported(
    package: Path, caplog: pytest.LogCaptureFixture, code: str, why: str
) -> None:
    """It is a warning that names it; whoever asks for it by name gets the error."""
    install(package, "broken", "installed_broken", code)
    message = f"converter 'broken' of installed_broken cannot be imported: {why}"
    with pytest.raises(MissingDependencyError) as caught:
        registry.get("broken")
    assert str(caught.value) == message
    path = package / "optimizer.pt"
    save({"state": {}, "param_groups": []}, path)
    assert registry.detect(path)[0].NAME == "torch_optimizer"
    assert caplog.messages == [f"{message}; it is left out"]


def test_the_command_line_names_a_broken_converter(package: Path) -> None:
    install(package, "broken", "installed_broken", "1 / 0")
    path = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "lora_state_format", "formats"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    why = "ZeroDivisionError: division by zero"
    warning = f"warning: converter 'broken' of installed_broken cannot be imported: {why}; it is left out\n"
    assert (done.returncode, done.stderr) == (0, warning)
    assert "torch_optimizer" in done.stdout


def test_a_converter_that_fails_to_detect(package: Path, caplog: pytest.LogCaptureFixture) -> None:
    code = CONVERTER.format(name="hasty", suffix="x", generic=False)
    install(package, "hasty", "installed_hasty", f"{code}def detect(path):\n    raise RuntimeError('oops')\n")
    path = package / "optimizer.pt"
    save({"state": {}, "param_groups": []}, path)
    assert registry.detect(path)[0].NAME == "torch_optimizer"
    assert caplog.messages == [f"converter 'hasty' failed on {path}: RuntimeError: oops"]


def test_a_format_that_is_asked_for_and_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnknownFormatError) as caught:
        registry.find(tmp_path, "diffusers")
    expected = registry.get("diffusers").DESCRIPTION
    assert str(caught.value) == f"{tmp_path}: not recognised as 'diffusers': expected {expected}"
    with pytest.raises(FileNotFoundError) as missing:
        registry.find(tmp_path / "nothing", "diffusers")
    assert str(missing.value) == f"{tmp_path / 'nothing'}: no such file or folder"


def test_two_claims_to_one_path(package: Path) -> None:
    claim(package, "first", "both")
    claim(package, "second", "both")
    path = package / "state.both"
    path.touch()
    with pytest.raises(AmbiguousFormatError) as caught:
        registry.detect(path)
    assert str(caught.value) == (
        f"{path}: 2 formats fit: first (the suffix .both); second (the suffix .both); pass the right one "
        "as source_format="
    )
    assert [name for name, _ in caught.value.matches] == ["first", "second"]


def test_a_specific_claim_beats_generic_ones(package: Path) -> None:
    claim(package, "first", "both", generic=True)
    claim(package, "second", "both")
    claim(package, "third", "both", generic=True)
    path = package / "state.both"
    path.touch()
    assert registry.detect(path)[0].NAME == "second"


def test_two_generic_claims(package: Path) -> None:
    claim(package, "first", "both", generic=True)
    claim(package, "second", "both", generic=True)
    path = package / "state.both"
    path.touch()
    with pytest.raises(AmbiguousFormatError, match="2 formats fit"):
        registry.detect(path)


def test_nothing_fits(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("nothing")
    with pytest.raises(UnknownFormatError) as caught:
        registry.detect(path)
    first, *table = str(caught.value).splitlines()
    assert first == f"{path}: no optimizer state found here: it is a text file; looked for:"
    assert [row.split()[0] for row in table] == ["named", *others()]
    start = len(max(others(), key=len)) + 4
    assert [row[start:] for row in table] == [registry.get(row.split()[0]).DESCRIPTION for row in table]


@pytest.mark.parametrize("depth", [0, 3])
def test_an_empty_folder_and_one_that_is_too_deep(tmp_path: Path, depth: int) -> None:
    (tmp_path / "/".join("abc"[:depth])).mkdir(parents=True, exist_ok=True)
    with pytest.raises(UnknownFormatError, match=f"^{re.escape(str(tmp_path))}: no optimizer state found here"):
        registry.detect(tmp_path)


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        registry.detect(tmp_path / "nosuch")
    assert str(caught.value) == f"{tmp_path / 'nosuch'}: no such file or folder"


def test_the_path_that_a_set_was_written_to() -> None:
    """A path means its index, if there is one."""
    folder = Path(__file__).parents[1] / "spec" / "vectors" / "valid" / "set"
    for path in (folder / "optimizer.safetensors", folder / "optimizer.safetensors.index.json", folder):
        converter, match = registry.detect(path)
        assert converter.NAME == "named"
        assert match.path.name.startswith("optimizer.safetensors")
        with read(path) as state:
            assert len(state) > 1


def others() -> list[str]:
    return [name for name in registry.names() if name != registry.NAMED]
