"""What differs between two states."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
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
from lora_state_format.model.tensors import Tensor, contiguous

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
    assert not lsf.diff(str(tmp_path / "a.safetensors"), tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError):
        lsf.diff(state(), tmp_path / "b.safetensors")


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
        "  b: exp_avg: 1 of 4 elements differ, by 1 at most, relative 0.00488, cosine 0.999991\n"
        "  b: step: 1.0 and 2.0\n"
        "total of exp_avg (1): 1 of 4 elements differ, by 1 at most, relative 0.00488, cosine 0.999991"
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


# --- bytes and numbers --------------------------------------------------------------------------------------------


def one(tensor: Tensor) -> OptimizerState:
    parameters = (Parameter("a", tensor.shape, {"exp_avg": Slot(tensor, Role.PARAM)}),)
    return OptimizerState((Optimizer(),), (Group(0, (), 1),), parameters, Naming("model"))


def floats(*values: float, dtype: str = "F32") -> Tensor:
    code = {"F32": "f", "F64": "d", "F16": "e"}[dtype]
    return contiguous(dtype, (len(values),), Memory(struct.pack(f"<{len(values)}{code}", *values)))


def test_a_flipped_bit_is_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where both files state the same digest, and compared with itself."""
    write(one(floats(1.0, 2.0)), tmp_path / "a.safetensors")
    data = bytearray((tmp_path / "a.safetensors").read_bytes())
    data[-1] ^= 1  # 2.0 becomes 8.0
    (tmp_path / "b.safetensors").write_bytes(data)
    assert run(["diff", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]) == 1
    assert capsys.readouterr().out == (
        "different (2):\n"
        "  a: exp_avg: 1 of 2 elements differ, by 6 at most, relative 2.68, cosine 0.94299\n"
        "  a: exp_avg: damaged in the second: its bytes do not have the digest that its file states\n"
        "total of exp_avg (1): 1 of 2 elements differ, by 6 at most, relative 2.68, cosine 0.94299\n"
    )
    assert run(["diff", str(tmp_path / "b.safetensors"), str(tmp_path / "b.safetensors"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["slots"] == [
        f"a: exp_avg: damaged in the {which}: its bytes do not have the digest that its file states"
        for which in ("first", "second")
    ]
    assert (found["same"], found["distances"], found["totals"]) == (False, {}, {})


@pytest.mark.parametrize(
    ("first", "second", "text", "numbers"),
    [
        (
            floats(3.0, 4.0), floats(3.0, 5.0), "1 of 2 elements differ, by 1 at most, relative 0.2, cosine 0.994692",
            {"different": 1, "largest": 1.0, "relative": 0.2, "cosine": 29 / 5 / math.sqrt(34)},
        ),
        (
            floats(0.0, 0.0), floats(0.0, -0.0), "1 of 2 elements differ",
            {"different": 1, "largest": 0.0, "relative": None, "cosine": None},
        ),
        (
            floats(1.0, math.nan), floats(1.0, 7.0),
            "1 of 2 elements differ, by 0 at most, relative 0, cosine 1; 1 not finite",
            {"different": 1, "largest": 0.0, "relative": 0.0, "cosine": 1.0, "not_finite": 1},
        ),
        (
            floats(1.0, 2.0), floats(1.0, 2.5, dtype="F16"),
            (
                "a tensor F32 [2] and a tensor F16 [2]: 1 of 2 elements differ, by 0.5 at most, relative 0.224, "
                "cosine 0.996546"
            ),
            {"different": 1, "largest": 0.5},
        ),
        (
            contiguous("BF16", (2,), Memory(b"\x80\x3f\x00\x40")),
            contiguous("BF16", (2,), Memory(b"\x80\x3f\x80\x3f")),
            "1 of 2 elements differ, by 1 at most, relative 0.447, cosine 0.948683",
            {"different": 1, "largest": 1.0, "relative": math.sqrt(1 / 5), "cosine": 3 / math.sqrt(10)},
        ),
        (
            floats(1e300, 1.0, dtype="F64"), floats(-1e300, 1.0, dtype="F64"),
            "1 of 2 elements differ, by 2e+300 at most, relative nan, cosine nan",
            {"different": 1, "largest": 2e300, "relative": None, "cosine": None},
        ),
    ],
)  # fmt: skip
def test_how_far_two_tensors_are_apart(
    first: Tensor, second: Tensor, text: str, numbers: dict[str, float | None]
) -> None:
    found = lsf.diff(one(first), one(second))
    assert found.slots == (f"a: exp_avg: {text}",)
    distance = found.distances["a"]["exp_avg"].to_json()
    assert {key: distance[key] for key in numbers} == pytest.approx(numbers)
    assert found.totals["exp_avg"].to_json() == distance


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (floats(1.0, 2.0, 3.0), "a tensor F32 [2] and a tensor F32 [3]"),
        (contiguous("F8_E4M3", (2,), Memory(b"ab")), "a tensor F32 [2] and a tensor F8_E4M3 [2]"),
    ],
)
def test_tensors_that_cannot_be_subtracted(second: Tensor, text: str) -> None:
    found = lsf.diff(one(floats(1.0, 2.0)), replace(one(second), parameters=(replace(one(second)["a"], shape=(2,)),)))
    assert found.slots == (f"a: exp_avg: {text}",)
    assert not found.distances
    eight = contiguous("F8_E4M3", (2,), Memory(b"ab")), contiguous("F8_E4M3", (2,), Memory(b"ac"))
    assert lsf.diff(one(eight[0]), one(eight[1])).slots == (
        "a: exp_avg: other bytes in a tensor F8_E4M3 [2] and a tensor F8_E4M3 [2]",
    )


def test_totals_are_over_all_parameters_and_all_chunks() -> None:
    """A tensor of more than one chunk, against NumPy's own numbers."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((3, 300_000)).astype("f4")
    y = x + generator.standard_normal(x.shape).astype("f4") * (generator.random(x.shape) < 0.5)

    def several(values: Any) -> OptimizerState:
        parameters = tuple(
            Parameter(f"p{n}", (300_000,), {"exp_avg": Slot(contiguous("F32", (300_000,), Memory(row.tobytes())))})
            for n, row in enumerate(values)
        )
        return OptimizerState((Optimizer(),), (Group(0, (), 3),), parameters, Naming("model"))

    total = lsf.diff(several(x), several(y)).totals["exp_avg"]
    first, second = x.astype("f8").ravel(), y.astype("f8").ravel()
    assert (total.tensors, total.elements, total.different) == (3, x.size, int((x != y).sum()))
    assert total.largest == np.abs(second - first).max()
    assert total.relative == pytest.approx(np.linalg.norm(second - first) / np.linalg.norm(first))
    assert total.cosine == pytest.approx(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def test_options_are_compared_where_groups_are_not_the_same() -> None:
    """One group of three against two: by what their parameters share."""
    (group,) = state().groups
    options = dict(group.options)
    second = replace(group, count=1, options=(*group.options[:1], ("betas", (0.9, 0.95))))
    found = lsf.diff(
        state(), replace(state(), groups=(replace(group, count=2, options=tuple(options.items())), second))
    )
    assert found.run == (
        "groups: of [3] and [2, 1] parameters",
        "groups 0 and 1, 1 parameters: betas.1: 0.999 and 0.95",
    )


def test_names_out_of_files_do_nothing_to_a_terminal() -> None:
    name, slot, option = "a\nremoved: everything", "x\u202ey", "l\x1b[2Jr"
    first = replace(
        state(),
        parameters=(Parameter(name, (4,), {slot: moment(b"abcd")}), Parameter("gone\n", (4,), None)),
        groups=(Group(0, ((option, 1),), 2),),
    )
    second = replace(
        first,
        parameters=(Parameter(name, (4,), {slot: moment(b"abce")}),),
        groups=(Group(0, ((option, 2),), 1),),
    )
    assert str(lsf.diff(first, second)).split("\n") == [
        "group 0: of 2 and 1 parameters, or another name or optimizer",
        "group 0: l\\x1b[2Jr: 1 and 2",
        "only in the first (1):",
        "  gone\\n",
        "different (1):",
        "  a\\nremoved: everything: x\\u202ey: 1 of 4 elements differ, by 1 at most, relative 0.00508, cosine 0.99999",
        "total of x\\u202ey (1): 1 of 4 elements differ, by 1 at most, relative 0.00508, cosine 0.99999",
    ]
