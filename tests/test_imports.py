"""Imports are the architecture: who may know whom, and what a command pays for."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "lora_state_format"

FLOORS = [
    ["errors"],
    ["model"],
    ["io"],
    ["optimizers"],
    ["format"],
    ["naming"],
    ["mapping"],
    ["binding"],
    ["foreign"],
    ["registry"],
    ["converters"],
    ["torch"],
    ["integrations"],
    ["operations"],
    ["numpy", "testing"],
    ["demo"],
    [""],
    ["cli"],
    ["__main__"],
]
"""The package from the ground up: a part imports from the floors below its own and from itself. The root is ""."""

UPWARDS = {
    ("model.tensors", "torch"),  # ``Tensor.torch()`` hands over to the only side that knows torch
}
"""Imports inside functions that may go up."""

HEAVY = {
    "accelerate", "bitsandbytes", "deepspeed", "flax", "jax", "lightning", "mlx", "numpy", "optax", "orbax", "paddle",
    "peft", "rich", "tensorstore", "torch", "transformers",
}  # fmt: skip
"""What takes long to import, or is an extra."""

DRAWING = {"operations.figures", "operations.page"}
"""The modules that need the extra ``report``."""

FRAMEWORK_SIDE = {"torch", "integrations", "demo"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the package: its dotted name below the package, and its tree."""
    for path in sorted([*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / PACKAGE / "converters").glob("*.py")]):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        name = ".".join(parts if parts == ("__init__",) or parts[-1] != "__init__" else parts[:-1])
        yield name, ast.parse(path.read_text(encoding="utf-8"))


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


def part(module: str) -> str:
    """The part of the package that a module belongs to: ``io`` of ``io.files``, the root of ``__init__``."""
    first = module.split(".")[0]
    return "" if first == "__init__" else first


def own(names: Iterable[str]) -> set[str]:
    """Of imported names those of this package, as the part below it: ``io``, ``torch``, the root."""
    found = set()
    for name in names:
        if name == PACKAGE or name.startswith(f"{PACKAGE}."):
            below = name.split(".")[1:2]
            found.add(below[0] if below and below[0] in FLOOR else "")
    return found


FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
MODULES = dict(modules())


def test_every_module_is_on_a_floor() -> None:
    assert {part(name) for name in MODULES} == FLOOR.keys()


@pytest.mark.parametrize("name", MODULES)
def test_nothing_imports_upwards(name: str) -> None:
    here = part(name)
    below = {other for other, floor in FLOOR.items() if floor < FLOOR[here]}
    allowed = below | {here} | {target for module, target in UPWARDS if module in (name, here)}
    assert own(imported(MODULES[name], late=False)) <= below | {here}
    assert own(imported(MODULES[name], late=True)) <= allowed


@pytest.mark.parametrize("floor", FLOOR)
def test_the_modules_of_a_part_do_not_go_in_circles(floor: str) -> None:
    names = {name for name in MODULES if part(name) == floor}
    edges = {name: names & set(targets(name)) - {name} for name in names}
    while ready := [name for name, needs in edges.items() if not needs]:
        edges = {name: needs - set(ready) for name, needs in edges.items() if needs}
    assert not edges, "a circle"


def targets(name: str) -> Iterator[str]:
    """The modules that a module imports when it is loaded, as dotted names below the package."""
    for target in imported(MODULES[name], late=False):
        if target.startswith(f"{PACKAGE}."):
            below = target.removeprefix(f"{PACKAGE}.")
            yield below if below in MODULES else below.rpartition(".")[0]


def test_the_map_names_every_module() -> None:
    """``ARCHITECTURE.md`` has a row for each package, in the order of the floors, with all of its modules."""
    rows = {
        row.split("`")[1].rstrip("/"): row
        for row in (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines()
        if row.startswith("| `")
    }
    for name in MODULES:
        package, _, module = name.partition(".")
        if module and package != "converters":
            assert f"`{module}`" in rows[package], name
    listed = [name for name in rows if name in FLOOR]
    assert listed == sorted(listed, key=lambda name: -FLOOR[name])


@pytest.mark.parametrize("name", MODULES)
def test_nobody_imports_a_converter(name: str) -> None:
    everything = set(imported(MODULES[name], late=True))
    assert not [x for x in everything if x.startswith((f"{PACKAGE}.converters", "converters"))], "use the registry"


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] not in FRAMEWORK_SIDE])
def test_the_core_imports_nothing_heavy_at_its_top(name: str) -> None:
    top = set(imported(MODULES[name], late=False))
    assert not {x.split(".")[0] for x in top} & HEAVY
    assert not own(top) & FRAMEWORK_SIDE


@pytest.mark.parametrize("name", [name for name in MODULES if name not in DRAWING])
def test_only_the_report_draws(name: str) -> None:
    assert not {x.split(".")[0] for x in imported(MODULES[name], late=True)} & {"jinja2", "matplotlib"}
    top = set(imported(MODULES[name], late=False))
    assert not [x for x in top if x.removeprefix(f"{PACKAGE}.").startswith(tuple(DRAWING))]


def loaded_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after ``code``, packages by their own name too."""
    report = "import sys; print('\\n'.join(['', *sys.modules]), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(result.stderr.splitlines())


NOT_NEEDED = {
    "concurrent.futures", "html", "tempfile",
    "lora_state_format.naming", "lora_state_format.operations.conversion", "lora_state_format.operations.statistics",
}  # fmt: skip
"""What a command that only looks at a file does without: each is 1 to 5 of its 60 ms."""


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "VECTOR"], ["inspect", "VECTOR", "--json"]])
def test_a_look_at_a_file_loads_what_it_needs(arguments: list[str]) -> None:
    filled = [str(ROOT / "spec/vectors/valid/example.safetensors") if a == "VECTOR" else a for a in arguments]
    code = (
        f"import sys; sys.argv = ['lora-state', *{filled!r}]\n"
        "from lora_state_format.cli import main\ntry: main()\nexcept SystemExit as done: assert not done.code"
    )
    loaded = loaded_after(code)
    assert "lora_state_format.cli" in loaded
    assert ("lora_state_format.format.reading" in loaded) == ("inspect" in arguments)
    assert not loaded & (HEAVY | NOT_NEEDED)


def test_importing_the_package_imports_nothing_else() -> None:
    assert not loaded_after("import lora_state_format") & {*HEAVY, "click", "safetensors", "xxhash"}


def test_the_public_names_import_no_framework() -> None:
    assert not loaded_after("from lora_state_format import *") & HEAVY
