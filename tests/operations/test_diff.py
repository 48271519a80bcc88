"""What differs between two states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import lora_state_format as lsf
from lora_state_format.cli import run
from lora_state_format.format.writing import write
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import (
    Group,
    Naming,
    Optimizer,
    OptimizerState,
    Parameter,
    Role,
    Scalar,
    Slot,
    Value,
)
from lora_state_format.model.tensors import contiguous

ONE, TWO = Scalar("F32", b"\0\0\x80\x3f"), Scalar("F32", b"\0\0\x00\x40")


def moment(data: bytes) -> Slot:
    return Slot(contiguous("U8", (4,), Memory(data)), Role.PARAM)


def state() -> OptimizerState:
    parameters = (
        Parameter("a", (4,), {"step": ONE, "exp_avg": moment(b"abcd")}),
        Parameter("b", (4,), {"step": ONE, "exp_avg": moment(b"efgh")}),
        Parameter("c", (4,), None),
    )
    groups = (Group(0, (("lr", 0.1), ("betas", (0.9, 0.999))), 3),)
    return OptimizerState((Optimizer("torch.optim.adam.Adam"),), groups, parameters, Naming("model"), global_step=1)


def test_a_state_is_the_same_as_its_file_s(tmp_path: Path) -> None:
    write(state(), tmp_path / "a.safetensors")
    with lsf.open_state(tmp_path / "a.safetensors") as stored:
        found = lsf.diff(state(), stored)
        assert not found
        assert str(found) == "the same state"


def test_every_difference_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = state().parameters
    other = replace(
        state(),
        optimizers=(Optimizer("torch.optim.adamw.AdamW"),),
        groups=(Group(0, (("lr", 0.2), ("betas", (0.9, 0.99)), ("eps", 1e-8)), 3),),
        parameters=(
            replace(b, state={"step": TWO, "exp_avg": moment(b"efgi")}),
            replace(c, name="d"),
            replace(a, state=None),
        ),
        global_step=2,
        extra={"note": "x"},
    )
    text = (
        "optimizers: torch.optim.adam.Adam and torch.optim.adamw.AdamW\n"
        "group 0: betas.1: 0.999 and 0.99\n"
        "group 0: eps: only in the second\n"
        "group 0: lr: 0.1 and 0.2\n"
        "step: 1 and 2\n"
        "extra: note: only in the second\n"
        "only in the first (1):\n"
        "  c\n"
        "only in the second (1):\n"
        "  d\n"
        "the parameters stand in another order\n"
        "different (5):\n"
        "  a: never stepped in the second\n"
        "  a: exp_avg: only in the first\n"
        "  a: step: only in the first\n"
        "  b: exp_avg: a tensor U8 [4] (cc107591) and a tensor U8 [4] (a00cd026)\n"
        "  b: step: 1.0 and 2.0"
    )
    write(state(), tmp_path / "a.safetensors")
    write(other, tmp_path / "b.safetensors")
    assert run(["diff", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]) == 1
    printed = capsys.readouterr().out
    assert printed == f"{lsf.diff(state(), other)}\n"
    assert printed == text + "\n"
    assert run(["diff", str(tmp_path / "a.safetensors"), str(tmp_path / "a.safetensors"), "--json"]) == 0
    assert '"same": true' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("one", "two", "lines"),
    [
        (1, 1.0, ("extra: v: 1 and 1.0",)),
        (1, True, ("extra: v: 1 and True",)),
        (0.0, -0.0, ("extra: v: 0.0 and -0.0",)),
        ((1,), [1], ("extra: v: (1,) and [1]",)),
        ([1], [1, 2], ("extra: v: [1] and [1, 2]",)),
        ({}, [], ("extra: v: {} and []",)),
        ({"a": {}}, {}, ("extra: v.a: only in the first",)),
        ({1: "x"}, {"1": "x"}, ("extra: v.1: only in the second", "extra: v.1: only in the first")),
        ({1: [0, 5]}, {1: [0, 6]}, ("extra: v.1.1: 5 and 6",)),
        (float("nan"), float("nan"), ()),
        (ONE, TWO, ("extra: v: 1.0 and 2.0",)),
        (Scalar("F8_E4M3", b"a"), 1, ("extra: v: Scalar(dtype='F8_E4M3', data=b'a') and 1",)),
        ("x" * 200, "", (f"extra: v: '{'x' * 99}... and ''",)),
    ],
    ids=repr,
)
def test_values_differ_by_type_too(one: Value, two: Value, lines: tuple[str, ...]) -> None:
    found = lsf.diff(replace(state(), extra={"v": one}), replace(state(), extra={"v": two}))
    assert found.run == lines


def test_what_is_said_of_a_parameter(tmp_path: Path) -> None:
    a, *others = state().parameters
    slots = dict(a.state or {})
    role = replace(a, state={**slots, "exp_avg": replace(slots["exp_avg"], role=Role.OPAQUE)})  # type: ignore[type-var]
    for other, line in (
        (replace(a, adapter="x"), "a: adapter: None and 'x'"),
        (replace(a, tied=("z",)), "a: tied: () and ('z',)"),
        (replace(a, foreign_names={"peft": "y"}), "a: foreign_names: {} and {'peft': 'y'}"),
        (replace(a, original_id=7), "a: original_id: None and 7"),
        (replace(a, dtype="F32"), "a: None [4] and F32 [4]"),
        (role, "a: exp_avg: role param and opaque"),
    ):
        assert lsf.diff(state(), replace(state(), parameters=(other, *others))).slots == (line,)
    (group,) = state().groups
    turned = replace(group, options=group.options[::-1])
    assert lsf.diff(state(), replace(state(), groups=(turned,))).run == ("group 0: its options stand in another order",)
