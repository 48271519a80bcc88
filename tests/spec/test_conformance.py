"""The runner of ``spec/conformance``, the readers that it runs, and the page of its results."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parent.parent.parent
RUNNER: Final = ROOT / "spec" / "conformance" / "run.py"
PAGE: Final = ROOT / "docs" / "conformance.md"
NAMES: Final = [reader["name"] for reader in json.loads(RUNNER.with_name("readers.json").read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def runner(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    return load_module(RUNNER)


def cells(table: str, name: str) -> dict[str, str]:
    """Return the column of a reader, by the first cell of each row."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    column = rows[0].index(name)
    return {row[0]: row[column] for row in rows}


@pytest.mark.parametrize("name", NAMES)
def test_every_reader_passes_every_vector(name: str, runner: ModuleType) -> None:
    (reader,) = [reader for reader in runner.readers() if reader.name == name]
    if reader.missing() is not None:
        pytest.skip(f"there is no {reader.missing()} here")
    cases = runner.vectors()
    assert len(cases) >= 300
    results = {name: runner.run(reader, cases)}
    assert runner.failures(results) == []
    assert list(results[name]) == [runner.label(case) for case in cases]
    assert cells(runner.table(cases, results), name) == cells(PAGE.read_text(encoding="utf-8"), name)


def test_the_page_shows_three_languages_at_all_of_the_vectors(runner: ModuleType) -> None:
    assert {reader.language for reader in runner.readers()} == {"Python", "JavaScript", "Rust"}
    count = len(runner.vectors())
    for name in NAMES:
        assert cells(PAGE.read_text(encoding="utf-8"), name)["**all**"].startswith(f"{count}/{count}")


ACCEPTS: Final = 'import sys\nfor _ in sys.argv[1:]: print(\'{"verified": false, "state": {}}\')'
DIES: Final = "import sys\nsys.exit(sys.argv[1:] and 3)"
REFUSES: Final = """import sys
for _ in sys.argv[1:]: print('{"rule": "R9", "kind": "digest", "message": "R9: no"}')
sys.exit(1)"""
SILENT: Final = REFUSES.replace("sys.exit(1)", "")


@pytest.mark.parametrize(
    ("script", "vector", "verdict"),
    [
        (ACCEPTS, "valid/example", "another state"),
        (ACCEPTS, "invalid/alignment", "expected R8 (malformed), found: accepted"),
        (ACCEPTS, "invalid/tensor-changed", "not verified"),
        (DIES, "valid/example", "no line of JSON: the reader failed"),
        (DIES, "invalid/alignment", "no line of JSON: the reader failed"),
        (REFUSES, "valid/example", "refused: R9: no"),
        (REFUSES, "invalid/alignment", "expected R8 (malformed), found: R9 (digest)"),
        (REFUSES, "invalid/digest-of-zeros", "pass"),
        (SILENT, "invalid/digest-of-zeros", "no line of JSON: the reader failed"),
    ],
)
def test_a_reader_that_is_wrong_fails(script: str, vector: str, verdict: str, runner: ModuleType) -> None:
    cases = [case for case in runner.vectors() if runner.label(case) == vector]
    reader = runner.Reader("wrong", "Python", (sys.executable, "-c", script))
    assert runner.run(reader, cases) == {vector: verdict}


@pytest.fixture(scope="module")
def right(runner: ModuleType) -> dict[str, Any]:
    """Return what ``spec/reader.py`` says of the vector of all kinds of values."""
    (case,) = [case for case in runner.vectors() if runner.label(case) == "valid/values"]
    command = [sys.executable, str(RUNNER.with_name("python_reader.py")), str(case.path)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {**found, "case": case}


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["extra"]["tuples"].update({"$tuple": [1.0, {"$tuple": [2]}, [{"$tuple": [3, [4.0]]}]]}),
        lambda state: state["extra"].update(tuples=[1, [2], [[3, [4.0]]]]),
        lambda state: state["extra"].update(none=False),
        lambda state: state["extra"]["by number"]["$dict"].pop(),
        lambda state: state["extra"].update(bytes=[{"$bytes": ""}, {"$bytes": "00fe"}]),
        lambda state: state["parameters"][0].update(slots={}),
        lambda state: state["naming"].pop("rule"),
    ],
    ids=["float for integer", "list for tuple", "false for null", "a pair less", "bytes", "slots", "rule"],
)
def test_the_smallest_difference_in_a_state_is_seen(
    change: Callable[[Any], object], right: dict[str, Any], runner: ModuleType
) -> None:
    assert runner.judged(right["case"], right) == "not verified"
    changed = json.loads(json.dumps(right["state"]))
    change(changed)
    assert runner.judged(right["case"], {"verified": False, "state": changed}) == "another state"


def test_the_runner_goes_on_behind_a_vector_that_ends_a_reader(runner: ModuleType) -> None:
    script = REFUSES.replace("for _ in sys.argv[1:]: ", "for p in sys.argv[1:]:\n if 'empty' in p: sys.exit(9)\n ")
    cases = [
        case for case in runner.vectors() if case.name in ("digest-of-zeros", "length-empty", "text-empty", "alignment")
    ]
    verdicts = runner.run(runner.Reader("dying", "Python", (sys.executable, "-c", script)), cases)
    assert verdicts == {
        "invalid/alignment": "expected R8 (malformed), found: R9 (digest)",
        "invalid/digest-of-zeros": "pass",
        "invalid/length-empty": "no line of JSON: the reader failed",
        "invalid/text-empty": "no line of JSON: the reader failed",
    }


def test_the_command_of_another_reader() -> None:
    command = [sys.executable, str(RUNNER), "--", sys.executable, "-c", REFUSES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "| R9 broken | 3/3 |" in done.stdout
    assert "yours: valid/example: refused: R9: no" in done.stderr.splitlines()
