"""A bounded run of ``fuzz.py``; ``make fuzz`` is a long one."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

NAMES = ["container", "manifest", "set", "zip", "pickle", "state_dict", "msgpack", "dcp", "configs"]


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).with_name("fuzz.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["fuzz"] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fuzz"]


def test_every_target_is_run(fuzz: ModuleType) -> None:
    assert list(fuzz.TARGETS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_read_is_refused(name: str, fuzz: ModuleType) -> None:
    if name == "configs":
        pytest.importorskip("peft")
    result = fuzz.run(name, count=400)
    assert not result.findings, result.findings[0][1]
    assert result.inputs == 400
    assert result.accepted > 0 or name == "container"  # where nearly everything breaks a digest
    assert result.refused.total() > 40
    assert result.slowest < 5


def test_a_finding(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(data: bytes, folder: Path) -> None:
        raise IndexError(len(data))

    monkeypatch.setitem(fuzz.TARGETS, "zip", fuzz.Target(fuzz.TARGETS["zip"].make, broken))
    assert fuzz.main(["zip", "--count", "2"]) == 1
    printed = capsys.readouterr().out
    assert "--- zip --seed 0 --first 1 --count 1\nTraceback" in printed
    assert "zip: 2 inputs, 0 read, 0 refused; slowest" in printed
