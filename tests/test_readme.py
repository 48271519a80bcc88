"""The README's examples: Python blocks run, and what they print is the text block that follows; console blocks are
commands and what they print, where ``...`` stands for any text. Blocks of ``py`` need every framework:
``integrations/test_moves.py`` runs them."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lora_state_format.cli import run

if TYPE_CHECKING:
    from tests.conftest import Founding

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    return BLOCK.findall(README.read_text(encoding="utf-8"))


def printed(call: Any) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        call()
    return out.getvalue()


def alike(expected: str, found: str) -> bool:
    pattern = ".*?".join(re.escape(part) for part in expected.strip().split("..."))
    return re.fullmatch(pattern, found.strip(), re.DOTALL) is not None


def test_it_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_examples_do_what_they_say(founding: Founding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(founding.path, tmp_path / "checkpoint-3")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    ran, found = [], None
    for kind, text in blocks():
        if kind == "python":
            code = compile(text, str(README), "exec")
            found = printed(lambda code=code: exec(code, namespace))
        elif kind == "text" and found is not None:
            assert alike(text, found), f"{text}\n--- but it prints ---\n{found}"
            found = None
        elif kind == "console":
            for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
                program, *arguments = shlex.split(command)
                assert program == "lora-state"
                output = printed(lambda arguments=arguments: run(arguments))
                assert alike(expected, output), f"{command}\n{expected}\n--- but it prints ---\n{output}"
        ran.append(kind)
    assert {"python", "text", "console"} <= set(ran)


def test_it_counts_the_formats() -> None:
    from lora_state_format import registry

    text = README.read_text(encoding="utf-8")
    writers = [name for name in registry.BUILT_IN if hasattr(registry.get(name), "write")]
    assert f"It reads {len(registry.BUILT_IN)} formats:" in text
    numbers = ["", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    assert f"writes {numbers[len(writers)]} of them" in text
