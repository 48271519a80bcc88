"""The table of what optimizer classes ask of their state, held against the classes themselves."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from lora_state_format.optimizers.classes import CLASSES, known
from lora_state_format.torch.capture import lineage_of
from lora_state_format.torch.live import describe

HERE = ("torch.optim.", "transformers.optimization.Adafactor")
EAGER = [path for path in CLASSES if path.startswith(HERE) and path != "torch.optim.lbfgs.LBFGS"]
SHAPED: dict[str, set[str]] = {"torch.optim.Adafactor": {"row_var", "col_var", "variance"}}
"""Slots that a step needs or does without by the parameter's number of axes."""


def options_of(path: str) -> dict[str, Any]:
    options: dict[str, Any] = {"lr": 1e-2, **{option: True for _, option in CLASSES[path].optional}}
    if "momentum" in options or path.endswith(".SGD"):
        options["momentum"] = 0.9
    if path.startswith("transformers"):
        options |= {"scale_parameter": False, "relative_step": False}
    return options


def made(path: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[list[torch.nn.Parameter], Any]:
    """An optimizer of the class over a matrix and, where it takes one, a vector, after one step."""
    torch.manual_seed(0)
    module, _, name = path.rpartition(".")
    shapes = [(4, 4)] if name in ("Muon", "SparseAdam") else [(4, 4), (4,)]
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    optimizer = getattr(import_module(module), name)(parameters, **{**options_of(path), **options})
    step(parameters, optimizer)
    return parameters, optimizer


def step(parameters: list[torch.nn.Parameter], optimizer: Any) -> None:
    for p in parameters:
        gradient = torch.randn_like(p)
        p.grad = gradient.to_sparse() if type(optimizer).__name__ == "SparseAdam" else gradient
    optimizer.step()


def slots_of(parameters: list[torch.nn.Parameter], optimizer: Any) -> set[str]:
    return {slot for p in parameters for slot in optimizer.state[p]}


def steps(parameters: list[torch.nn.Parameter], optimizer: Any) -> bool:
    """Whether the class's own step takes the state that is there."""
    try:
        step(parameters, optimizer)
    except (KeyError, RuntimeError, AssertionError):
        return False
    return True


@pytest.mark.parametrize("path", EAGER)
def test_the_slots_that_a_step_needs(path: str) -> None:
    row = CLASSES[path]
    for slot in slots_of(*made(path)) - SHAPED.get(path, set()):
        parameters, optimizer = made(path)
        for p in parameters:
            optimizer.state[p].pop(slot, None)
        needed = slot in row.needs or slot in dict(row.optional)
        if not path.startswith("transformers"):  # it reads slots that are there by the parameter's shape
            assert steps(parameters, optimizer) is not needed, slot


@pytest.mark.parametrize("path", EAGER)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_the_slots_that_a_step_takes_in_the_parameters_dtype_only(
    path: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    own, other = dtypes
    fused = [False, True] if CLASSES[path].fused_same_dtype else [False]
    for run_fused in fused:
        extra = {"fused": True} if run_fused else {}
        for slot in slots_of(*made(path, own, **extra)) - {"step"}:
            parameters, optimizer = made(path, own, **extra)
            changed = False
            for p in parameters:
                value = optimizer.state[p].get(slot)
                if isinstance(value, torch.Tensor) and value.dim():
                    optimizer.state[p][slot] = value.to(other)
                    changed = True
            if changed:
                expected = slot not in CLASSES[path].same_dtype and not run_fused
                assert steps(parameters, optimizer) is expected, (slot, run_fused)


@pytest.mark.parametrize("path", EAGER)
def test_how_a_class_counts(path: str) -> None:
    parameters, optimizer = made(path)
    step = optimizer.state[parameters[0]].get("step")
    counts = {int: int, float: torch.Tensor, None: type(None)}
    assert isinstance(step, counts[CLASSES[path].counts])


@pytest.mark.parametrize("path", EAGER)
def test_a_class_makes_no_slot_that_its_row_does_not_have(path: str) -> None:
    parameters, optimizer = made(path)
    made_of = {slot for parameter in parameters for slot in optimizer.state[parameter]}
    assert made_of <= CLASSES[path].slots


def test_a_subclass_is_known_by_the_class_whose_step_it_has() -> None:
    class Mine(torch.optim.AdamW):
        """Another constructor, the same step."""

    class Other(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            raise NotImplementedError

    model = torch.nn.Linear(2, 2)
    assert known(lineage_of(Mine)) is CLASSES["torch.optim.adamw.AdamW"]
    assert lineage_of(Other) == (f"{__name__}.{Other.__qualname__}",)
    live = describe(Mine(model.parameters()), model).side
    assert live.known[0] is CLASSES["torch.optim.adamw.AdamW"]
    assert (live.title(0), live.optimizers[0].class_path) == (Mine.__qualname__.rpartition(".")[2], live.lineages[0][0])
