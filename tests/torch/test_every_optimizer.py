"""Every optimizer: saved, rebuilt over another order of parameters, loaded, and run on bit for bit as if never stopped.

The tables of ``docs/optimizers.md`` are what these runs find; see there for the command that writes them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, cast

import pytest
import torch
from torch.testing._internal.common_optimizers import optim_db

from lora_state_format import open_state
from lora_state_format.errors import BindError, UnrepresentableError
from lora_state_format.model.states import Scalar, Slot, walk
from lora_state_format.model.tensors import memory_order
from lora_state_format.optimizers.options import Kind, kind_of
from lora_state_format.torch import load_optimizer, save_optimizer
from lora_state_format.torch.tensors import from_torch

DOCS = Path(__file__).parents[2] / "docs" / "optimizers.md"
MATRICES = {"up": (6, 4), "gate": (6, 4), "down": (4, 6)}
ALL = {**MATRICES, "bias": (6,), "shift": (6,), "scale": (), "idle": (4,)}
"""Names and shapes; ``idle`` never gets a gradient."""

Build = Callable[[list[tuple[str, torch.nn.Parameter]]], Any]
Found = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Case:
    """An optimizer in one configuration, and what its step asks of parameters and gradients.

    ``same_order`` rebuilds it over the same order; ``sums`` means that its step sums over all parameters, which rounds
    by their order, so that it goes on over the same. ``differentiable`` steps take no leaf that requires a gradient.
    """

    build: Build
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype = torch.float32
    differentiable: bool = False
    sparse: bool = False
    closure: bool = False
    same_order: bool = False
    sums: bool = False


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
    if case.sums:
        rebuilt = case.build([(name, dict(order)[name]) for name in names])
        load_optimizer(rebuilt, other, path)
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
            assert memory_order(from_torch(a)) == memory_order(from_torch(b))
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
                if len(place) > 1 and not isinstance(value, (Slot, Scalar)):
                    continue  # what an object needs beside its tensors
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
    made = "".join(f"{line}\n" for line in [*head, *rows])
    text = DOCS.read_text(encoding="utf-8")
    before, start, rest = text.partition(f"<!-- {section} -->\n")
    old, end, after = rest.partition("<!-- end -->\n")
    if os.environ.get("WRITE_TABLES"):
        DOCS.write_text(before + start + made + end + after, encoding="utf-8")
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
        "hint: options={'d': 'current'} keeps the live values\n"
        "hint: options={'d': 'saved'} makes them alike"
    )
    assert kind_of("d", ["lr", "d0", "d"]) is Kind.STATE


# --- the others -----------------------------------------------------------------------------------------------------

INDUCTOR = "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
LARGE = {"up": (64, 64), "gate": (64, 64), "bias": (64,), "idle": (4,)}
"""bitsandbytes and torchao quantise moments of 4096 elements and more."""
ADAPTERS = {"q_lora_A": (2, 6), "q_lora_B": (6, 2), "v_lora_A": (2, 6), "v_lora_B": (6, 2), "norm": (6,)}


def parameters_of(named: list[tuple[str, torch.nn.Parameter]]) -> list[torch.nn.Parameter]:
    return [parameter for _, parameter in named]


def simple(path: str, **options: Any) -> Build:
    module, _, name = path.rpartition(".")
    return lambda named: getattr(import_module(module), name)(parameters_of(named), **options)


def schedule_free(named: list[tuple[str, torch.nn.Parameter]]) -> Any:
    optimizer = simple("schedulefree.AdamWScheduleFree", lr=1e-2, warmup_steps=4)(named)
    optimizer.train()
    return optimizer


def galore(named: list[tuple[str, torch.nn.Parameter]]) -> Any:
    from galore_torch import GaLoreAdamW

    projected = [parameter for name, parameter in named if parameter.dim() == 2]
    rest = [parameter for name, parameter in named if parameter.dim() != 2]
    options = {"rank": 2, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
    return GaLoreAdamW([{"params": projected, **options}, {"params": rest}], lr=1e-2, no_deprecation_warning=True)


def lora_fa(named: list[tuple[str, torch.nn.Parameter]]) -> Any:
    """As PEFT's create_lorafa_optimizer makes it; an A stands before its B."""
    from peft.optimizers.lorafa import LoraFAOptimizer

    modules = list(dict.fromkeys(name.partition("_")[0] for name, _ in named))
    named = sorted(named, key=lambda item: (modules.index(item[0].partition("_")[0]), item[0]))
    group = {
        "params": parameters_of(named),
        "names": [name for name, _ in named],
        "scaling_factors": [2.0] * len(named),
    }
    return LoraFAOptimizer([group], lr=1e-2)


OTHERS: Final[Mapping[str, Case]] = {
    "bitsandbytes AdamW": Case(simple("bitsandbytes.optim.AdamW", lr=1e-2), LARGE),
    "bitsandbytes AdamW8bit": Case(simple("bitsandbytes.optim.AdamW8bit", lr=1e-2), LARGE),
    "bitsandbytes Lion8bit": Case(simple("bitsandbytes.optim.Lion8bit", lr=1e-2), LARGE),
    "bitsandbytes AdEMAMix8bit": Case(simple("bitsandbytes.optim.AdEMAMix8bit", lr=1e-2), LARGE),
    "torchao AdamW8bit": Case(simple("torchao.optim.AdamW8bit", lr=1e-2), LARGE),
    "torchao AdamW4bit": Case(simple("torchao.optim.AdamW4bit", lr=1e-2), LARGE),
    "torchao AdamWFp8": Case(simple("torchao.optim.AdamWFp8", lr=1e-2), LARGE),
    "schedulefree AdamWScheduleFree": Case(schedule_free, ALL),
    "prodigyopt Prodigy": Case(simple("prodigyopt.Prodigy", lr=1.0), ALL, sums=True),
    "lion_pytorch Lion": Case(simple("lion_pytorch.Lion", lr=1e-2), ALL),
    "transformers Adafactor": Case(
        simple("transformers.optimization.Adafactor", lr=1e-2, relative_step=False, beta1=0.9), ALL
    ),
    "pytorch_optimizer SOAP": Case(simple("pytorch_optimizer.SOAP", lr=1e-2, precondition_frequency=3), MATRICES),
    "galore_torch GaLoreAdamW": Case(galore, ALL),
    "peft LoraFAOptimizer": Case(lora_fa, ADAPTERS),
}


@cache
def run_of(title: str) -> Found:
    with TemporaryDirectory() as folder:
        return resumed(OTHERS[title], Path(folder, "state.safetensors"))


@pytest.mark.frameworks
@pytest.mark.filterwarnings(INDUCTOR)
@pytest.mark.parametrize("title", OTHERS)
def test_the_others(title: str) -> None:
    assert run_of(title)


@pytest.mark.frameworks
@pytest.mark.filterwarnings(INDUCTOR)
def test_the_table_of_the_others() -> None:
    rows = []
    for title, case in OTHERS.items():
        exact = "exactly, its steps over the same order" if case.sums else "exactly"
        rows.append(row(title, 1, run_of(title), exact))
    check_table("others", rows)


def trained(title: str) -> tuple[torch.nn.Module, Any]:
    case = OTHERS[title]
    model = net(case, case.shapes)
    optimizer = case.build(list(model.named_parameters()))
    for step in range(3):
        advance(case, model, optimizer, step)
    return model, optimizer


@pytest.mark.frameworks
@pytest.mark.filterwarnings(INDUCTOR)
@pytest.mark.parametrize("layout", ["as written", "flat"])
@pytest.mark.parametrize("title", [title for title in OTHERS if title.startswith(("bitsandbytes", "torchao"))])
def test_their_own_checkpoints_load_into_them(title: str, layout: str, tmp_path: Path) -> None:
    """bitsandbytes nests its slots since 0.49.2 and had them flat before; torchao's tensors are pickled objects."""
    model, optimizer = trained(title)
    written = optimizer.state_dict()
    if layout == "flat":
        inner = "__bnb_optimizer_quant_state__"
        written["state"] = {key: {**slots, **slots.pop(inner, {})} for key, slots in written["state"].items()}
    torch.save(written, tmp_path / "optimizer.pt")
    rebuilt = OTHERS[title].build(list(model.named_parameters()))
    load_optimizer(rebuilt, model, tmp_path / "optimizer.pt")
    same(state_of(model, optimizer), state_of(model, rebuilt))


# --- what cannot be kept --------------------------------------------------------------------------------------------


class Holder:
    """Something that no file holds."""


def stepped() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    case = case_of(INFOS["SGD"], {"momentum": 0.9})
    model = net(case, ["up", "gate"])
    optimizer = case.build(list(model.named_parameters()))
    advance(case, model, optimizer, 0)
    return model, optimizer


def test_an_object_in_a_slot_is_refused_by_its_path(tmp_path: Path) -> None:
    model, optimizer = stepped()
    optimizer.state[model.get_parameter("gate")]["basis"] = {"left": [Holder()]}
    with pytest.raises(UnrepresentableError) as caught:
        save_optimizer(optimizer, model, tmp_path / "state.safetensors")
    assert str(caught.value) == "gate.basis.left.0 is a value of type Holder, which has no form in a state"


def test_state_outside_the_state_dict_is_said_by_its_path(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = stepped()
    held: Any = optimizer
    held.cache = {"norms": [torch.zeros(2)], "own": list(model.parameters())}
    held.noise = torch.Generator()
    held.inner = torch.optim.SGD(model.parameters(), lr=0.1)
    save_optimizer(optimizer, model, tmp_path / "state.safetensors")
    assert caplog.messages == [
        f"SGD keeps a {kind} in its attribute {path}, outside its state: it is not saved, and a load will say so"
        for path, kind in (
            ("cache.norms.0", "torch.Tensor"),
            ("noise", "torch._C.Generator"),
            ("inner", "torch.optim.sgd.SGD"),
        )
    ]
    with pytest.raises(BindError) as caught:
        load_optimizer(optimizer, model, tmp_path / "state.safetensors")
    assert str(caught.value) == (
        "optimizer state does not fit: 2 parameters saved, 2 in the optimizer\n"
        "  the saved optimizer kept state in attributes, which is not in the file (3):\n"
        "    SGD.cache.norms.0, a torch.Tensor\n"
        "    SGD.noise, a torch._C.Generator\n"
        "    SGD.inner, a torch.optim.sgd.SGD\n"
        "hint: missing='fresh' goes on with what the live optimizer has there"
    )
    assert load_optimizer(optimizer, model, tmp_path / "state.safetensors", missing="fresh").restored == 2


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"torchao": "torchao.optim.subclass_2bit.OptimState2bit"},
            (
                "a tensor of class torchao.optim.subclass_2bit.OptimState2bit, which is none of OptimState8bit, "
                "OptimState4bit, OptimStateFp8"
            ),
        ),
        (
            {"object": "os.PathLike"},
            (
                "an object of class os.PathLike, which is none of galore_torch.galore_projector.GaLoreProjector, "
                "galore_torch.galore_projector_tensor.GaLoreProjectorTensor"
            ),
        ),
    ],
)
def test_a_file_cannot_ask_for_another_class(tree: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, optimizer = stepped()
    optimizer.state[model.get_parameter("gate")]["basis"] = tree
    save_optimizer(optimizer, model, tmp_path / "state.safetensors")
    before = state_of(model, optimizer)
    with pytest.raises(UnrepresentableError) as caught:
        load_optimizer(optimizer, model, tmp_path / "state.safetensors")
    assert str(caught.value) == message
    same(before, state_of(model, optimizer))
