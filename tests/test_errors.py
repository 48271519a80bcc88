"""What to do about an error, in Python's words and in the command line's."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from string import Formatter
from typing import Any

import click
import pytest

import lora_state_format
from lora_state_format import cli, errors
from lora_state_format.binding.policies import Policies
from lora_state_format.errors import FileError, OptionError, Remedy, TargetExistsError
from lora_state_format.operations import edit
from lora_state_format.operations.conversion import belongs

OPTION = re.compile(r"(^|[ (])--[a-z]")

SOURCES = sorted(Path(lora_state_format.__file__).parent.rglob("*.py")) + sorted(
    Path(lora_state_format.__file__).parents[1].glob("converters/*.py")
)


@pytest.mark.parametrize(
    ("text", "arguments", "in_python", "on_command_line"),
    [
        ("pass {force} to replace it", {"force": True}, "force=True", "--force"),
        ("pass {names} with names", {"names": ...}, "names=", "--names"),
        ("pass {keys}", {"keys": "model"}, "keys='model'", "--keys model"),
        ("pass {source_format}", {"source_format": ...}, "source_format=", "--from"),
        ("pass {inverse_root}", {"inverse_root": True}, "inverse_root=True", "--inverse-root"),
        ("pass {options}", {"options": {"step": ...}}, "options={'step': ...}", "--option step=..."),
        (
            "pass {options}",
            {"options": {"bias_correction": True, "lr": 0.1}},
            "options={'bias_correction': True, 'lr': 0.1}",
            "--option bias_correction=True --option lr=0.1",
        ),
    ],
)
def test_a_remedy_is_in_the_words_of_its_reader(
    text: str, arguments: dict[str, Any], in_python: str, on_command_line: str
) -> None:
    remedy = Remedy(text, arguments)
    (name,) = arguments
    assert remedy.in_python() == text.replace(f"{{{name}}}", in_python)
    assert remedy.on_command_line() == text.replace(f"{{{name}}}", on_command_line)


def test_a_message_ends_with_its_remedy() -> None:
    remedy = Remedy("pass {force} to replace it", {"force": True})
    error = TargetExistsError("x exists", remedy=remedy)
    assert str(error) == "x exists; pass force=True to replace it"
    assert error.on_command_line() == "x exists; pass --force to replace it"
    several = OptionError("two things\nthis\nthat", remedy=remedy)
    assert str(several) == "two things\nthis\nthat\nhint: pass force=True to replace it"
    assert several.on_command_line() == "two things\nthis\nthat\nhint: pass --force to replace it"
    assert str(OptionError("as it is")) == OptionError("as it is").on_command_line() == "as it is"


@pytest.mark.parametrize("copied", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_an_error_can_be_sent_to_another_process(copied: Any) -> None:
    remedy = Remedy("pass {options}", {"options": {"step": ...}})
    for error in (
        FileError("short", path="a/b", rule="R7", remedy=remedy),
        TargetExistsError("x exists", remedy=remedy),
        errors.MissingDependencyError("needs torch", remedy=remedy),
        errors.AmbiguousOrderError("two orders", ("a", "b"), remedy=remedy),
    ):
        again = copied(error)
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def _remedies() -> list[tuple[str, set[str]]]:
    """Return the place and the arguments of every ``Remedy`` in the package."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Remedy":
                texts = [part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)]
                fields = {field for _, field, _, _ in Formatter().parse("".join(map(str, texts))) if field}
                found.append((f"{path.name}:{node.lineno}", fields))
    return found


def test_every_remedy_names_arguments_that_exist() -> None:
    lsf = lora_state_format
    functions: list[Callable[..., Any]] = [lsf.check, lsf.convert, lsf.export, belongs, edit.prune, Policies]
    keywords = {name for function in functions for name in inspect.signature(function).parameters}
    options = {
        option
        for command in cli.commands.commands.values()
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in parameter.opts
    }
    remedies = _remedies()
    assert remedies
    for place, arguments in remedies:
        assert arguments <= keywords, place
        assert {errors.SHORT_OPTIONS.get(name, f"--{name.replace('_', '-')}") for name in arguments} <= options, place


def test_no_message_mixes_the_words_of_python_and_of_the_command_line() -> None:
    """Only a remedy names options of the command line: a message is read by those who call from Python, too."""
    mixed = []
    for path in SOURCES:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "").endswith("Error"):
                texts = [node.value for node in ast.walk(call) if isinstance(node, ast.Constant)]
                found = [text for text in texts if isinstance(text, str) and OPTION.search(text)]
                mixed += [f"{path.name}:{call.lineno}: {text}" for text in found]
    assert [line for line in mixed if "Megatron" not in line] == []  # whose options are no affair of ours
