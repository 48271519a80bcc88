from __future__ import annotations

import json
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lora_state_format as lsf
from lora_state_format.cli import run
from lora_state_format.errors import DigestError, FileError, OptionError, TargetExistsError
from lora_state_format.model.sources import File, Memory
from lora_state_format.model.states import Group, Naming, Optimizer, OptimizerState, Parameter, Role, Slot
from lora_state_format.model.tensors import contiguous
from lora_state_format.operations.export import export
from lora_state_format.torch import save_optimizer

LAYER = "base_model.model.layers.0.q_proj"
A, B = f"{LAYER}.lora_A.default.weight", f"{LAYER}.lora_B.default.weight"
NEVER = f"{LAYER}.lora_magnitude_vector.default.weight"


def tree(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A module with parameters of these names."""
    root = torch.nn.Module()
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        *path, last = name.split(".")
        module = root
        for segment in path:
            if segment not in dict(module.named_children()):
                module.add_module(segment, torch.nn.Module())
            module = module.get_submodule(segment)
        module.register_parameter(last, torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
    return root


def train(optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    """Steps on random gradients; the last parameter of the last group takes one less, and one takes none."""
    generator = torch.Generator().manual_seed(1)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        for p in parameters[: len(parameters) - (step == 0)]:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def model() -> torch.nn.Module:
    return tree({A: (4, 300), B: (500, 4), NEVER: (7,)})


@pytest.fixture
def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    parameters = dict(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [parameters[A]], "betas": (0.8, 0.9), "eps": 1e-3},
        {"params": [parameters[B]]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=True)
    train(optimizer)
    optimizer.add_param_group({"params": [parameters[NEVER]]})
    return optimizer


@pytest.fixture
def saved(optimizer: torch.optim.Optimizer, model: torch.nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "optimizer.safetensors"
    save_optimizer(optimizer, model, path)
    return path


def test_the_path_of_a_checkpoint(saved: Path, tmp_path: Path) -> None:
    written = lsf.export(saved, tmp_path / "a.safetensors", "exp_avg")
    with lsf.open_state(saved) as state:
        assert lsf.export(state, tmp_path / "b.safetensors", "exp_avg").tensors == written.tensors == 2
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def exported(source: Path, slot: str, **options: Any) -> dict[str, torch.Tensor]:
    target = source.with_name("exported.safetensors")
    with lsf.open_state(source) as state:
        export(state, target, slot, force=True, **options)
    found: dict[str, torch.Tensor] = load_file(target)
    return found


def entry(optimizer: torch.optim.Optimizer, model: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    slots: dict[str, torch.Tensor] = optimizer.state[model.get_parameter(name)]
    return slots


# --- slots --------------------------------------------------------------------------------------------------------


def test_a_slot_by_name(saved: Path, optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    with lsf.open_state(saved) as state:
        found = state.slot("exp_avg")
        assert list(found) == [A, B]
        assert all(found[n].torch().equal(entry(optimizer, model, n)["exp_avg"]) for n in found)
        assert {name: tensor.torch().item() for name, tensor in state.slot("step").items()} == {A: 4.0, B: 3.0}


def test_a_slot_inside_another() -> None:
    tensor = contiguous("U8", (2,), Memory(b"ab"))
    entries: dict[str, Any] = {"quantised": {"state1": Slot(tensor)}, "step": 3}
    state = OptimizerState((Optimizer(),), (Group(0, (), 1),), (Parameter("w", (2,), entries),), Naming("model"))
    assert state.slot("quantised.state1") == {"w": tensor}


def test_a_slot_that_is_not_there(saved: Path) -> None:
    with lsf.open_state(saved) as state, pytest.raises(OptionError) as caught:
        state.slot("exp_avg_square")
    assert str(caught.value) == (
        "no parameter has a tensor in a slot 'exp_avg_square'; there are: exp_avg, exp_avg_sq, max_exp_avg_sq, step"
    )


# --- bytes as they are --------------------------------------------------------------------------------------------


def test_the_file_is_plain_safetensors(saved: Path, optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    target = saved.with_name("exported.safetensors")
    with lsf.open_state(saved) as state:
        done = export(state, target, "exp_avg_sq")
    assert (done.path, done.tensors, done.size, done.without) == (str(target), 2, 4 * (1200 + 2000), (NEVER,))
    with safe_open(target, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == {A, B}
        for name in (A, B):
            assert opened.get_tensor(name).equal(entry(optimizer, model, name)["exp_avg_sq"])
    assert int.from_bytes(target.read_bytes()[:8], "little") % 64 == 56


def test_keys_of_the_adapter_file(saved: Path) -> None:
    found = exported(saved, "exp_avg", keys="peft")
    assert set(found) == {f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"}


def test_any_dtype_without_computing(tmp_path: Path) -> None:
    model = tree({"w": (3, 5)}, torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.get_parameter("w").grad = torch.ones(3, 5, dtype=torch.bfloat16)
    optimizer.step()
    save_optimizer(optimizer, model, tmp_path / "a.safetensors")
    found = exported(tmp_path / "a.safetensors", "momentum_buffer")["w"]
    assert found.dtype == torch.bfloat16
    assert found.equal(optimizer.state[model.get_parameter("w")]["momentum_buffer"])


def test_only_the_slots_bytes_are_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[tuple[int, int]] = []
    readinto = File.readinto

    def record(file: File, offset: int, out: memoryview) -> None:
        ranges.append((offset, offset + len(out)))
        readinto(file, offset, out)

    with lsf.open_state(saved) as state:
        tensors = state.slot("exp_avg_sq").values()
        monkeypatch.setattr(File, "readinto", record)
        export(state, saved.with_name("exported.safetensors"), "exp_avg_sq")
    expected = sorted((piece.offset, piece.offset + t.size) for t in tensors for piece in t.pieces)
    assert sorted(ranges) == expected


def test_one_chunk_is_held(tmp_path: Path) -> None:
    size = 1 << 24
    tensor = contiguous("F32", (size // 4,), Memory(np.ones(size // 4, "<f4").data))
    entries: dict[str, Any] = {"step": 1, "exp_avg_sq": Slot(tensor, Role.PARAM)}
    group = Group(0, (("betas", (0.9, 0.99)), ("eps", 1e-8)), 1)
    state = OptimizerState((Optimizer(),), (group,), (Parameter("w", tensor.shape, entries),), Naming("model"))
    export(state, tmp_path / "warm.safetensors", "exp_avg_sq", unbiased=True, inverse_root=True)
    tracemalloc.start()
    export(state, tmp_path / "a.safetensors", "exp_avg_sq", unbiased=True, inverse_root=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20


# --- what is computed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slot", "place"), [("exp_avg", 0), ("exp_avg_sq", 1), ("max_exp_avg_sq", 1)])
def test_unbiased(saved: Path, optimizer: torch.optim.Optimizer, model: torch.nn.Module, slot: str, place: int) -> None:
    found = exported(saved, slot, unbiased=True)
    for name, group in zip((A, B), optimizer.param_groups, strict=False):
        slots = entry(optimizer, model, name)
        expected = slots[slot].double() / (1 - group["betas"][place] ** slots["step"].item())
        assert found[name].equal(expected.float())


@pytest.mark.parametrize("eps", [None, 1e-4])
def test_the_inverse_root(
    saved: Path, optimizer: torch.optim.Optimizer, model: torch.nn.Module, eps: float | None
) -> None:
    found = exported(saved, "exp_avg_sq", inverse_root=True, eps=eps)
    for name, group in zip((A, B), optimizer.param_groups, strict=False):
        root = entry(optimizer, model, name)["exp_avg_sq"].double().sqrt()
        assert found[name].equal((1 / (root + (group["eps"] if eps is None else eps))).float())


def test_adam_steps_by_what_is_exported(tmp_path: Path) -> None:
    """The unbiased first moment times the preconditioner is the step that torch's Adam takes."""
    model = tree({"w": (40, 50)})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.7, 0.95), eps=1e-3)
    before = model.get_parameter("w").detach().clone()
    model.get_parameter("w").grad = torch.linspace(-1, 1, 2000).reshape(40, 50)
    for _ in range(3):
        before = model.get_parameter("w").detach().clone()
        optimizer.step()
    save_optimizer(optimizer, model, tmp_path / "a.safetensors")
    moment = exported(tmp_path / "a.safetensors", "exp_avg", unbiased=True)["w"]
    preconditioner = exported(tmp_path / "a.safetensors", "exp_avg_sq", unbiased=True, inverse_root=True)["w"]
    torch.testing.assert_close(model.get_parameter("w").detach(), before - 1e-2 * moment * preconditioner)


@pytest.mark.parametrize(
    ("make", "slot"),
    [(torch.optim.RMSprop, "square_avg"), (torch.optim.Adagrad, "sum"), (torch.optim.Adam, "exp_avg_sq")],
)
def test_other_squares_in_bfloat16(tmp_path: Path, make: Any, slot: str) -> None:
    model = tree({"w": (40, 50)}, torch.bfloat16)
    optimizer = make(model.parameters(), lr=1e-2, eps=1e-3)
    model.get_parameter("w").grad = torch.linspace(-1, 1, 2000).reshape(40, 50).bfloat16()
    optimizer.step()
    save_optimizer(optimizer, model, tmp_path / "a.safetensors")
    found = exported(tmp_path / "a.safetensors", slot, inverse_root=True)["w"]
    expected = 1 / (optimizer.state[model.get_parameter("w")][slot].double().sqrt() + 1e-3)
    assert found.equal(expected.float())


def test_double_stays_double(tmp_path: Path) -> None:
    model = tree({"w": (4,)}, torch.float64)
    optimizer = torch.optim.Adam(model.parameters())
    model.get_parameter("w").grad = torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=torch.float64)
    optimizer.step()
    save_optimizer(optimizer, model, tmp_path / "a.safetensors")
    found = exported(tmp_path / "a.safetensors", "exp_avg_sq", inverse_root=True, eps=0.0)["w"]
    assert found.equal(optimizer.state[model.get_parameter("w")]["exp_avg_sq"].sqrt().reciprocal())
    assert found[3] == float("inf")


# --- errors -------------------------------------------------------------------------------------------------------


def small(options: Mapping[str, Any], **slots: Any) -> OptimizerState:
    parameter = Parameter("w", (2,), slots)
    return OptimizerState((Optimizer(),), (Group(0, tuple(options.items()), 1),), (parameter,), Naming("model"))


BIAS = "'w': correcting the bias of 'exp_avg' takes its step and its group's betas, which here are "


def floats(*values: float, dtype: str = "<f4") -> Slot:
    return Slot(contiguous({"<f4": "F32", "<i4": "I32"}[dtype], (len(values),), Memory(np.array(values, dtype).data)))


@pytest.mark.parametrize(
    ("options", "slots", "slot", "arguments", "message"),
    [
        (
            {}, {"momentum_buffer": floats(1, 2)}, "momentum_buffer", {"unbiased": True},
            "slot 'momentum_buffer' is not a mean with a known decay; those are: exp_avg, exp_avg_sq, max_exp_avg_sq",
        ),
        (
            {"betas": (0.9, 0.99)}, {"exp_avg": floats(1, 2)}, "exp_avg", {"unbiased": True},
            f"{BIAS}None and (0.9, 0.99)",
        ),
        (
            {"betas": (0.9, 0.99), "d": 1e-6}, {"exp_avg": floats(1, 2), "step": 3}, "exp_avg", {"unbiased": True},
            f"{BIAS}3 and (0.9, 0.99), in an optimizer that scales its moments by 'd'",
        ),
        (
            {}, {"exp_avg": floats(1, 2)}, "exp_avg", {"inverse_root": True},
            (
                "slot 'exp_avg' does not hold squares; those that do: exp_avg_sq, max_exp_avg_sq, square_avg, sum, "
                "variance"
            ),
        ),
        (
            {}, {"exp_avg_sq": floats(1, 2)}, "exp_avg_sq", {"inverse_root": True},
            "'w': its group has no eps; pass eps=",
        ),
        (
            {}, {"exp_avg_sq": floats(1, 2)}, "exp_avg_sq", {"eps": 1.0},
            "eps is used for the inverse root only; pass inverse_root=True with it",
        ),
        (
            {"eps": 1.0}, {"exp_avg_sq": floats(1, 2, dtype="<i4")}, "exp_avg_sq", {"inverse_root": True},
            "'w': slot 'exp_avg_sq' is I32, which cannot be computed with",
        ),
        (
            {}, {"exp_avg": floats(1, 2)}, "exp_avg", {"keys": "peft"},
            "'w' has no key in an adapter file; export with keys='model'",
        ),
    ],
)  # fmt: skip
def test_what_does_not_apply(
    tmp_path: Path, options: dict[str, Any], slots: dict[str, Any], slot: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError) as caught:
        export(small(options, **slots), tmp_path / "a.safetensors", slot, **arguments)
    assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


def test_two_adapters_with_the_same_keys(tmp_path: Path) -> None:
    state = small({}, exp_avg=floats(1, 2))
    pair = tuple(replace(state["w"], name=name, foreign_names={"peft": "w.lora_A.weight"}) for name in ("one", "two"))
    state = replace(state, groups=(Group(0, (), 2),), parameters=pair)
    with pytest.raises(OptionError) as caught:
        export(state, tmp_path / "a.safetensors", "exp_avg", keys="peft")
    assert str(caught.value) == (
        "'one/exp_avg' and 'two/exp_avg' would have the same key, 'w.lora_A.weight': export one "
        "adapter at a time (`lora-state prune`)"
    )


def test_a_negative_square(tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        export(small({"eps": 1.0}, exp_avg_sq=floats(1, -2)), tmp_path / "a", "exp_avg_sq", inverse_root=True)
    assert str(caught.value) == "'w': slot 'exp_avg_sq' holds a negative number, which is not a square"
    assert not list(tmp_path.iterdir())


def test_a_flipped_bit(saved: Path, tmp_path: Path) -> None:
    with lsf.open_state(saved) as state:
        at = state[B]["exp_avg"].pieces[0].offset
    data = bytearray(saved.read_bytes())
    data[at] ^= 1
    saved.write_bytes(data)
    with lsf.open_state(saved) as state, pytest.raises(DigestError) as caught:
        export(state, tmp_path / "a", "exp_avg")
    assert str(caught.value) == (f"tensor '{B}/exp_avg' does not match the digest in the file that it comes from [R21]")
    assert not (tmp_path / "a").exists()


def test_an_existing_target(saved: Path) -> None:
    with lsf.open_state(saved) as state, pytest.raises(TargetExistsError) as caught:
        export(state, saved, "exp_avg")
    assert str(caught.value) == f"{saved} exists; pass force=True to replace it"


def test_it_may_replace_its_own_source(saved: Path, optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    with lsf.open_state(saved) as state:
        export(state, saved, "exp_avg", force=True)
    assert load_file(saved)[A].equal(entry(optimizer, model, A)["exp_avg"])


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = saved.with_name("preconditioner.safetensors")
    arguments = ["export", str(saved), str(target), "--slot", "exp_avg_sq", "--keys", "peft", "--unbiased"]
    assert run([*arguments, "--inverse-root"]) == 0
    assert capsys.readouterr().out == (
        f"exported exp_avg_sq of 2 parameters from {saved} to {target}, 12,800 bytes\n"
        f"note: 1 parameters have no such slot: {NEVER}\n"
    )
    by_command = load_file(target)
    found = exported(saved, "exp_avg_sq", keys="peft", unbiased=True, inverse_root=True)
    assert all(by_command[key].equal(found[key]) for key in by_command.keys() | found.keys())
    assert run([*arguments, "--force", "--json"]) == 0
    members = json.loads(capsys.readouterr().out)
    assert (members["schema_version"], members["tensors"], members["without"]) == (1, 2, [NEVER])
    assert run([*arguments[:3], "--force", "--slot", "nosuch"]) == 2
    assert capsys.readouterr().err.startswith("error: no parameter has a tensor in a slot 'nosuch'; there are: exp_avg")


def test_a_target_beside_weights(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    assert run(["export", str(saved), str(folder / "adapter_model.safetensors"), "--slot", "exp_avg"]) == 0
    assert capsys.readouterr().err == ""
    assert run(["export", str(saved), str(folder / "second.safetensors"), "--slot", "exp_avg"]) == 0
    assert capsys.readouterr().err.startswith(
        f"warning: {folder / 'second.safetensors'} lies beside adapter_model.safetensors, and programs that serve a "
    )
    assert run(["strip", str(saved), str(folder / "third.safetensors"), "--slot", "exp_avg"]) == 0
    assert capsys.readouterr().err.startswith(f"warning: {folder / 'third.safetensors'} lies beside ")
