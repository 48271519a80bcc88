"""The demo says what it does, and its exit code what came of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lora_state_format import demo
from lora_state_format.cli import run


def test_the_demo_ends_with_its_verdict(tmp_path: Path) -> None:
    out = tmp_path / "kept"
    command = [sys.executable, "-m", "lora_state_format", "demo", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    for words in (
        "730 parameters, 392 trainable, 338 frozen",
        "two groups, of 392 and 0 parameters, and no names",
        "392 parameters in groups of [392, 0], step 4",
        "groups 2 -> 1",
        "torch's own load_state_dict(): ValueError: loaded state dict has a different number of parameter groups",
        "restored 392/392 parameters, 2 slots each, step 4; weights match 392/392",
        "1176/1176 slots equal, by name",
        "resumed: 392/392 weights and 1176/1176 slots equal to the uninterrupted run's, bit for bit",
        "cold start: 0/392 weights equal",
    ):
        assert words in result.stdout
    *_, verdict, kept = result.stdout.splitlines()
    assert verdict == "Verdict: the resumed run equals the uninterrupted one"
    assert kept == f"Kept in {out}: look with `lora-state inspect {out}/checkpoint-4`"
    assert run(["check", f"{out}/checkpoint-4", "--base", f"{out}/base"]) == 0


def test_the_demo_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").touch()
    assert run(["demo", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} exists and is not an empty folder; choose another one for the demo\n"
    )


def test_a_run_that_is_not_equal_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "demonstrate", lambda say, out: False)
    assert run(["demo"]) == 1


def test_what_the_demo_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "lora_state_format.demo")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert run(["demo"]) == 2
    assert capsys.readouterr().err == "error: the demo needs 'peft': pip install torch transformers peft accelerate\n"
