"""What others may rely on; a change here is a line in the changelog."""

from __future__ import annotations

import inspect
import subprocess
import sys

import click
import pytest

import lora_state_format
from lora_state_format import cli


def test_names_of_the_package() -> None:
    assert lora_state_format.__all__ == [
        "ConversionReport",
        "Difference",
        "Exported",
        "LoadPlan",
        "OptimizerState",
        "Parameter",
        "Tensor",
        "Verification",
        "Written",
        "check",
        "convert",
        "diff",
        "errors",
        "export",
        "open_state",
        "read",
        "verify",
        "write",
    ]
    assert dir(lora_state_format) == sorted([*lora_state_format.__all__, "__version__"])
    for name in lora_state_format.__all__:
        assert getattr(lora_state_format, name).__doc__, name


def test_results_are_of_public_types() -> None:
    """What a public function returns, and takes of our own, can be imported from the package."""
    for name in ("check", "convert", "diff", "export", "open_state", "read", "verify", "write"):
        returned = inspect.signature(getattr(lora_state_format, name)).return_annotation
        assert returned in lora_state_format.__all__, (name, returned)


def test_names_of_the_torch_side() -> None:
    import lora_state_format.torch

    assert lora_state_format.torch.__all__ == [
        "BackgroundSave",
        "Following",
        "LoadReport",
        "apply",
        "capture",
        "follow_names",
        "load_optimizer",
        "load_scheduler",
        "plan",
        "resize_adapter",
        "save_optimizer",
    ]


def test_a_function_stays_a_function_whatever_is_imported_first() -> None:
    code = (
        "import lora_state_format as lsf, lora_state_format.cli, lora_state_format.operations.conversion\n"
        "assert all(callable(getattr(lsf, name)) for name in lsf.__all__ if name != 'errors')\n"
        "assert lsf.errors.StateFormatError.exit_code == 3\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(AttributeError) as caught:
        lora_state_format.nosuch  # noqa: B018
    assert str(caught.value) == "module 'lora_state_format' has no attribute 'nosuch'"


def test_commands_and_their_options() -> None:
    found = {
        name: sorted(option for parameter in command.params for option in parameter.opts)
        for name, command in cli.commands.commands.items()
    }
    reading = {
        "--from",
        "--map",
        "--names",
        "--optimizer",
        "--option",
        "--rule",
        "--trainable",
        "--json",
        "--traceback",
    }
    rewriting = {*reading, "--force", "source", "target"}
    assert found == {
        "check": sorted(
            {*reading, "--base", "--dtype", "--into", "--mismatch", "--mismatch-class", "--missing", "--model"}
            | {"--rename", "--unexpected", "path"}
        ),
        "completion": ["--traceback", "shell"],
        "convert": sorted({*rewriting, "--base", "--dequantize", "--dry-run", "--latest", "--store", "--to"}),
        "demo": ["--out", "--traceback"],
        "diff": sorted({*reading, "--match", "first", "second"}),
        "edit": sorted({*rewriting, "--group", "--set"}),
        "export": sorted({*rewriting, "--eps", "--inverse-root", "--keys", "--match", "--slot", "--unbiased"}),
        "formats": ["--json", "--traceback"],
        "inspect": sorted(
            {*reading, "--latest", "--markdown", "--match", "--parameters", "--recursive", "--sort", "--stats"}
            | {"--tree", "path"}
        ),
        "names": ["--json", "--rule", "--traceback", "folder"],
        "prune-checkpoints": ["--dry-run", "--json", "--keep", "--legacy", "--traceback", "folder"],
        "prune": sorted({*rewriting, "--carried", "--match"}),
        "report": sorted({*reading, "--compare", "--figures", "--force", "--output", "--weights", "-o", "path"}),
        "rename": sorted({*rewriting, "--rename"}),
        "reset": sorted({*rewriting, "--match"}),
        "strip": sorted({*rewriting, "--slot"}),
        "verify": ["--json", "--traceback", "--weights", "path"],
    }
    assert isinstance(cli.commands, click.Group)
