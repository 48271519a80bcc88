"""Imports are the architecture: who may know whom, and what a command pays for."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "lora_state_format"

CHAIN = ["errors", "sources", "model", "crc", "collector", "canonical", "manifest", "atomic", "container", "writing"]
"""Each of these imports only those before it."""

PURE = ["names", "order", "plan"]
"""These know values and shapes, no files."""

FILES = {
    "atomic", "cli", "container", "conversion", "converters", "foreign", "manifest", "registry", "sources", "writing",
}  # fmt: skip

HEAVY = {
    "accelerate", "bitsandbytes", "deepspeed", "flax", "jax", "lightning", "mlx", "numpy", "optax", "orbax", "paddle",
    "peft", "rich", "tensorstore", "torch", "transformers",
}  # fmt: skip
"""What takes long to import, or is an extra."""

FRAMEWORK_SIDE = {"torch", "integrations"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the package: its dotted name below the package, and its tree."""
    for folder, prefix in ((ROOT / PACKAGE, ()), (ROOT / "converters", ("converters",))):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            yield ".".join(parts), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module, *, late: bool) -> Iterator[str]:
    """What a module imports when it runs: at its top, or with ``late`` also inside its functions."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for other in node.orelse:
                yield from visit(other)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif late or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            for child in ast.iter_child_nodes(node):
                yield from visit(child)

    return visit(tree)


def own(names: Iterator[str]) -> set[str]:
    """Of imported names those of this package, as the part below it: ``container``, ``torch``, ``converters``."""
    return {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE}.")}


MODULES = dict(modules())


def test_the_modules_are_found() -> None:
    assert {*CHAIN, *PURE, "converters.torch_optimizer", "torch.apply"} <= MODULES.keys()


@pytest.mark.parametrize("name", CHAIN)
def test_the_chain_runs_one_way(name: str) -> None:
    assert own(imported(MODULES[name], late=False)) <= set(CHAIN[: CHAIN.index(name)])


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_know_no_files(name: str) -> None:
    assert not own(imported(MODULES[name], late=True)) & FILES


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("foreign.")])
def test_what_knows_foreign_bytes_knows_nothing_of_conversions(name: str) -> None:
    assert own(imported(MODULES[name], late=True)) <= {*CHAIN, "algorithms", "foreign", "names"}


@pytest.mark.parametrize("name", MODULES)
def test_nobody_imports_a_converter(name: str) -> None:
    everything = set(imported(MODULES[name], late=True))
    assert not [x for x in everything if x.startswith((f"{PACKAGE}.converters", "converters"))], "use the registry"


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] not in FRAMEWORK_SIDE])
def test_the_core_imports_nothing_heavy_at_its_top(name: str) -> None:
    top = set(imported(MODULES[name], late=False))
    assert not {x.split(".")[0] for x in top} & HEAVY
    assert not own(iter(top)) & FRAMEWORK_SIDE


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("converters.")])
def test_a_converter_knows_only_the_core(name: str) -> None:
    assert not own(imported(MODULES[name], late=True)) & {"cli", "conversion", *FRAMEWORK_SIDE}


def loaded_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after ``code``."""
    report = "import sys; print('\\n'.join({name.partition('.')[0] for name in sys.modules}))"
    result = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines())


def test_importing_the_package_imports_nothing_else() -> None:
    assert not loaded_after("import lora_state_format") & {*HEAVY, "click", "safetensors", "xxhash"}


def test_the_public_names_import_no_framework() -> None:
    assert not loaded_after("from lora_state_format import *") & HEAVY
