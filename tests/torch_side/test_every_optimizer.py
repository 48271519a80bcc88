"""Every optimizer: saved, rebuilt over another order of parameters, loaded, and run on bit for bit as if never stopped.

The tables of ``docs/optimizers.md`` are what these runs find; see there for the command that writes them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, cast

import pytest
import torch
from torch.testing._internal.common_optimizers import optim_db

from lora_state_format import open_state
from lora_state_format.errors import BindError
from lora_state_format.model import Scalar, Slot, walk
from lora_state_format.options import Kind, kind_of
from lora_state_format.torch import load_optimizer, save_optimizer

DOCS = Path(__file__).parents[2] / "docs" / "optimizers.md"
MATRICES = {"up": (6, 4), "gate": (6, 4), "down": (4, 6)}
ALL = {**MATRICES, "bias": (6,), "shift": (6,), "scale": (), "idle": (4,)}
"""Names and shapes; ``idle`` never gets a gradient."""

Build = Callable[[list[tuple[str, torch.nn.Parameter]]], Any]
Found = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Case:
    """An optimizer in one configuration, and what its step asks of parameters and gradients.

    ``same_order`` rebuilds it over the same order. ``differentiable`` steps take no leaf that requires a gradient.
    """

    build: Build
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype = torch.float32
    differentiable: bool = False
    sparse: bool = False
    closure: bool = False
    same_order: bool = False


def net(case: Case, names: Iterable[str]) -> torch.nn.Module:
    """A model of these parameters, registered in this order, each with the same values in any order."""
    model = torch.nn.Module()
    for name in names:
        values = torch.randn(case.shapes[name], dtype=case.dtype, generator=torch.Generator().manual_seed(seed(name)))
        model.register_parameter(name, torch.nn.Parameter(values, requires_grad=not case.differentiable))
    return model


def seed(name: str, step: int = 0) -> int:
    return 1000 * step + sum(map(ord, name))


def advance(case: Case, model: torch.nn.Module, optimizer: Any, step: int) -> None:
    """One step with gradients that depend on the names and the number of the step only."""
    parameters = dict(model.named_parameters())

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        total = sum((parameters[name] ** 4 / 4 - parameters[name]).sum() for name in sorted(parameters))
        assert isinstance(total, torch.Tensor)
        total.backward()  # type: ignore[no-untyped-call]
        return total

    for name, parameter in parameters.items():
        if name != "idle":
            generator = torch.Generator().manual_seed(seed(name, step + 1))
            gradient = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
            parameter.grad = gradient.to_sparse(1) if case.sparse else gradient
    optimizer.step(loss) if case.closure else optimizer.step()


def resumed(case: Case, path: Path) -> Found:
    """Save after 3 steps, load into what is built anew, go on for 5. What the file has: slot or option -> its kinds."""
    names = list(case.shapes)
    model = net(case, names)
    optimizer = case.build(list(model.named_parameters()))
    for step in range(3):
        advance(case, model, optimizer, step)
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0.5  # as a scheduler does
    save_optimizer(optimizer, model, path)

    other = net(case, names if case.same_order else sorted(names))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    order = list(other.named_parameters())
    rebuilt = case.build(order if case.same_order else order[::-1])
    load_optimizer(rebuilt, other, path)
    same(state_of(model, optimizer), state_of(other, rebuilt))
    for step in range(3, 8):
        advance(case, model, optimizer, step)
        advance(case, other, rebuilt, step)
    same(state_of(model, optimizer), state_of(other, rebuilt))
    return found(path)


def state_of(model: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
    """Weights, slots and the lr by name, and whatever else is in ``state``."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {name: group for group in optimizer.param_groups for p in group["params"] if (name := names[p])}
    first = optimizer.param_groups[0]
    kept = ("lr", *(key for key in first if kind_of(key, first) is Kind.STATE))
    return {
        "weights": {name: parameter.detach() for parameter, name in names.items()},
        "state": {names.get(key, key): slots for key, slots in optimizer.state.items()},
        "options": {name: {key: group.get(key) for key in kept} for name, group in groups.items()},
    }


def same(a: Any, b: Any) -> None:
    """Raise unless two trees are the same in type, dtype, layout and every bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.device) == (b.dtype, b.device)
        if hasattr(a, "__tensor_flatten__"):
            same(vars(a), vars(b))
        else:
            assert a.stride() == b.stride()
            assert torch.equal(a, b)
    elif isinstance(a, Mapping):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif hasattr(a, "__dict__"):
        same(vars(a), vars(b))
    else:
        assert a == b


def found(path: Path) -> Found:
    """The slots of parameters with axes with what each is, lists by ``[]``; options that are state, global state."""
    kinds: dict[str, set[str]] = {}
    with open_state(path) as state:
        trees: list[tuple[str, Any]] = [
            ("", dict(parameter.state or {})) for parameter in state.parameters if parameter.shape
        ]
        trees += [
            ("group.", {k: v for k, v in g.options if kind_of(k, dict(g.options)) is Kind.STATE}) for g in state.groups
        ]
        trees += [("state.*.", entry) for entry in cast("dict[str, Any]", state.globals.get("state", {})).values()]
        for head, tree in trees:
            for place, value in walk(tree):
                slot = head + ".".join("[]" if isinstance(part, int) else str(part) for part in place)
                kinds.setdefault(slot.replace(".[]", "[]"), set()).add(kind(value))
    return {slot: frozenset(several) for slot, several in kinds.items()}


def kind(value: Any) -> str:
    if isinstance(value, Slot):
        return value.role.value
    if isinstance(value, Scalar):
        return f"{value.dtype} scalar"
    return "none" if value is None else type(value).__name__


def merged(runs: Iterable[Found]) -> Found:
    result: dict[str, frozenset[str]] = {}
    for run in runs:
        for slot, kinds in run.items():
            result[slot] = result.get(slot, frozenset()) | kinds
    return result


def row(title: str, configurations: int, slots: Found, resumes: str) -> str:
    listed = ", ".join(f"`{slot}` {' or '.join(sorted(kinds))}" for slot, kinds in slots.items())
    return f"| {title} | {configurations} | {listed or 'none'} | {resumes} |"


def check_table(section: str, rows: Sequence[str]) -> None:
    """Compare a section's table with what the runs found, or with ``WRITE_TABLES=1`` write it."""
    head = ["| optimizer | runs | slots | resumes |", "|---|---|---|---|"]
    made = "\n".join([*head, *rows])
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(f"<!-- {section} -->\n")
    old, _, after = rest.partition("\n<!-- end -->")
    if os.environ.get("WRITE_TABLES"):
        DOCS.write_text(f"{before}<!-- {section} -->\n{made}\n<!-- end -->{after}", encoding="utf-8")
    else:
        assert old == made, f"{DOCS.name} is not what the runs find; it says how to write it anew"


# --- torch.optim ----------------------------------------------------------------------------------------------------

INFOS: Final[Mapping[str, Any]] = {info.optim_cls.__name__: info for info in cast("list[Any]", optim_db)}
MATRICES_ONLY = ("Muon", "SparseAdam")


def configurations(info: Any, device: str = "cpu") -> Iterator[tuple[str, dict[str, Any]]]:
    """torch's own list, each entry plain and with each implementation that runs on a CPU."""
    for entry in info.optim_inputs_func(device=device):
        yield entry.desc, entry.kwargs
        if device == "cpu":
            for flag in info.supported_impls:
                if flag != "fused" or device in info.supports_fused_on:
                    yield f"{entry.desc}, {flag}", {**entry.kwargs, flag: True}


def case_of(info: Any, options: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Case:
    name = info.optim_cls.__name__

    def build(named: list[tuple[str, torch.nn.Parameter]]) -> Any:
        return info.optim_cls([parameter for _, parameter in named], **copy.deepcopy(dict(options)))

    return Case(
        build,
        MATRICES if name in MATRICES_ONLY else ALL,
        dtype,
        differentiable=bool(options.get("differentiable")),
        sparse=info.only_supports_sparse_grads,
        closure=info.step_requires_closure,
        same_order=name == "LBFGS",
    )


@cache
def runs_of(name: str) -> tuple[Found, ...]:
    """Every configuration of a class of torch.optim that runs on a CPU."""
    info = INFOS[name]
    with TemporaryDirectory() as folder:
        cases = [case_of(info, options) for _, options in configurations(info)]
        if info.supports_complex and not info.step_requires_closure:
            cases.append(case_of(info, {}, torch.complex64))
        return tuple(resumed(case, Path(folder, f"{number}.safetensors")) for number, case in enumerate(cases))


@pytest.mark.parametrize("name", INFOS)
def test_torch_in_all_its_configurations(name: str) -> None:
    assert len(runs_of(name)) >= len(INFOS[name].optim_inputs_func(device="cpu"))


def test_the_table_of_torch() -> None:
    rows = []
    for name in INFOS:
        exact = "exactly, over the same order" if name == "LBFGS" else "exactly"
        rows.append(row(name, len(runs_of(name)), merged(runs_of(name)), exact))
    check_table("torch.optim", rows)


@pytest.mark.parametrize("name", [name for name, info in INFOS.items() if info.has_capturable_arg])
def test_why_capturable_does_not_run_here(name: str) -> None:
    """If a torch runs it on a CPU one day, it belongs into the runs above."""
    case = case_of(INFOS[name], {"capturable": True})
    model = net(case, case.shapes)
    with pytest.raises((AssertionError, RuntimeError), match="capturable=True"):
        advance(case, model, case.build(list(model.named_parameters())), 0)


def test_lbfgs_over_another_order_is_refused(tmp_path: Path) -> None:
    case = case_of(INFOS["LBFGS"], {})
    model = net(case, ALL)
    optimizer = case.build(list(model.named_parameters()))
    advance(case, model, optimizer, 0)
    save_optimizer(optimizer, model, tmp_path / "state.safetensors")
    rebuilt = case.build(list(model.named_parameters())[::-1])
    with pytest.raises(BindError) as caught:
        load_optimizer(rebuilt, model, tmp_path / "state.safetensors")
    assert str(caught.value) == (
        "optimizer state does not fit: 7 parameters saved, 7 in the optimizer\n"
        "  LBFGS keeps one state for all its parameters in their order; the saved order differs from position 0 on\n"
        "hint: build torch.optim.lbfgs.LBFGS over the parameters in the saved order"
    )
    assert not rebuilt.state


def test_d_is_state_in_prodigy_and_an_option_in_adafactor(tmp_path: Path) -> None:
    case = case_of(INFOS["Adafactor"], {})
    model = net(case, ALL)
    optimizer = case.build(list(model.named_parameters()))
    advance(case, model, optimizer, 0)
    save_optimizer(optimizer, model, tmp_path / "state.safetensors")
    first, *others = model.parameters()
    groups: list[dict[str, Any]] = [{"params": [first], "d": 2.0}, {"params": others}]
    rebuilt = torch.optim.Adafactor(groups)
    with pytest.raises(BindError) as caught:
        load_optimizer(rebuilt, model, tmp_path / "state.safetensors")
    assert str(caught.value) == (
        "optimizer state does not fit: 7 parameters saved, 7 in the optimizer\n"
        "  saved group 0, with d 1.0, feeds live groups that disagree on it: 2.0 in live group 0, 1.0 in live group 1\n"
        "hint: options={'d': 'current'} keeps the live values, options={'d': 'saved'} makes them alike"
    )
    assert kind_of("d", ["lr", "d0", "d"]) is Kind.STATE
