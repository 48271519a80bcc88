from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lora_state_format as lsf
from lora_state_format.cli import run
from lora_state_format.errors import OptionError
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import Group, Naming, Optimizer, OptimizerState, Parameter, Scalar, Slot
from lora_state_format.model.tensors import Digest, contiguous
from lora_state_format.naming.names import peft_key
from lora_state_format.operations.edit import prune, rename, reset, set_options, strip

NAMES = [f"base_model.model.layers.{n}.q_proj.lora_{ab}.default.weight" for n in (1, 10) for ab in "AB"]
OLD = "base_model.model.score.modules_to_save.default.weight"


def parameter(name: str, fill: int) -> Parameter:
    tensor = contiguous("F32", (2, 2), Memory(bytes([fill]) * 16))
    key = peft_key(name)
    assert key is not None
    return Parameter(
        name=name,
        shape=(2, 2),
        state={"step": Scalar.of("F32", 3.0), "exp_avg": Slot(tensor), "exp_avg_sq": Slot(tensor)},
        adapter="default",
        foreign_names={"peft": key[0], "other": f"x{fill}"},
        weights=Digest("xxh3-128", "F32", f"{fill:032x}"),
    )


@pytest.fixture
def state() -> OptimizerState:
    options: dict[str, Any] = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "amsgrad": False,
        "foreach": None,
        "swa_lr": Scalar.of("F32", 1.0),
    }
    return OptimizerState(
        optimizers=(Optimizer("torch.optim.adamw.AdamW"),),
        groups=(Group(0, tuple(options.items()), 2), Group(0, (("lr", 0.5),), 2, name="slow")),
        parameters=(*(parameter(name, n) for n, name in enumerate(NAMES)), parameter(OLD, 9)),
        naming=Naming("model"),
        global_step=3,
    )


def unchanged(a: OptimizerState, b: OptimizerState, but: str) -> bool:
    """Whether two states differ in one field at most."""
    return all(getattr(a, field) is getattr(b, field) for field in vars(a) if field not in {but, "_index"})


# --- options ------------------------------------------------------------------------------------------------------


def test_an_option_of_every_group(state: OptimizerState) -> None:
    edited, changed = set_options(state, {"lr": 1e-5})
    assert changed == 2
    assert [dict(group.options)["lr"] for group in edited.groups] == [1e-5, 1e-5]
    assert [key for key, _ in edited.groups[0].options] == [key for key, _ in state.groups[0].options]
    assert unchanged(edited, state, "groups")
    assert dict(state.groups[0].options)["lr"] == 1e-3


@pytest.mark.parametrize("group", [1, "slow"])
def test_an_option_of_one_group(state: OptimizerState, group: int | str) -> None:
    edited, changed = set_options(state, {"lr": 0.25}, group)
    assert changed == 1
    assert [dict(found.options)["lr"] for found in edited.groups] == [1e-3, 0.25]


def test_an_option_that_only_one_group_has(state: OptimizerState) -> None:
    edited, changed = set_options(state, {"betas": [0, 0.99], "amsgrad": True})
    assert changed == 1
    assert dict(edited.groups[0].options)["betas"] == (0.0, 0.99)
    assert "betas" not in dict(edited.groups[1].options)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("lr", 1, 1.0),
        ("betas", (0.5, 1), (0.5, 1.0)),
        ("foreach", True, True),
        ("amsgrad", None, None),
        ("swa_lr", 0.5, Scalar("F32", b"\0\0\0\x3f")),
    ],
)
def test_values_keep_their_kind(state: OptimizerState, option: str, value: Any, expected: Any) -> None:
    found = dict(set_options(state, {option: value}, 0).state.groups[0].options)[option]
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("options", "group", "message"),
    [
        ({"lrr": 1.0}, None, "no group has an option 'lrr'; there are: lr, betas, amsgrad, foreach, swa_lr"),
        ({"betas": (0.0, 0.0)}, "slow", "no group has an option 'betas'; there are: lr"),
        ({"lr": 1.0}, 2, "there is no group 2; there are: 0, 'slow'"),
        ({"lr": "high"}, 0, "option 'lr' is 0.001, and 'high' is of another type"),
        ({"lr": True}, 0, "option 'lr' is 0.001, and True is of another type"),
        ({"betas": (0.9,)}, 0, "option 'betas' is (0.9, 0.999), and (0.9,) has another length"),
        ({"swa_lr": 1e99}, 0, "option 'swa_lr' is 1.0 (F32), and 1e+99 is of another type"),
    ],
)
def test_options_that_do_not_apply(
    state: OptimizerState, options: dict[str, Any], group: int | str | None, message: str
) -> None:
    with pytest.raises(OptionError) as caught:
        set_options(state, options, group)
    assert str(caught.value) == message


# --- names --------------------------------------------------------------------------------------------------------


def test_a_renamed_adapter(state: OptimizerState) -> None:
    edited, changed = rename(state, [(r"\.default\.", ".style.")])
    assert changed == 5
    assert list(edited) == [name.replace("default", "style") for name in state]
    assert {found.adapter for found in edited.values()} == {"style"}
    assert [found.foreign_names for found in edited.values()] == [found.foreign_names for found in state.values()]
    assert unchanged(edited, state, "parameters")
    assert edited.parameters[0].state is state.parameters[0].state


def test_keys_follow_the_names(state: OptimizerState) -> None:
    edited, changed = rename(state, {NAMES[0]: "encoder.weight"})
    assert changed == 1
    assert (edited["encoder.weight"].adapter, edited["encoder.weight"].foreign_names) == (None, {"other": "x0"})
    assert edited[NAMES[1]] == state[NAMES[1]]


def test_tied_names_are_renamed_too(state: OptimizerState) -> None:
    tied = replace(state.parameters[0], name="model.embed.weight", tied=("model.head.weight",))
    state = replace(state, parameters=(tied, *state.parameters[1:]))
    edited, _ = rename(state, [("^model", "net")])
    assert (edited.parameters[0].name, edited.parameters[0].tied) == ("net.embed.weight", ("net.head.weight",))


def test_a_rule_that_renames_nothing(state: OptimizerState) -> None:
    with pytest.raises(OptionError) as caught:
        rename(state, [("nosuch", "x")])
    assert str(caught.value) == f"rename: the rule changes none of the 5 names; the first is '{NAMES[0]}'"


def test_a_rule_that_makes_two_names_one(state: OptimizerState) -> None:
    with pytest.raises(OptionError) as caught:
        rename(state, [(r"lora_[AB]", "lora_A")])
    assert str(caught.value) == f"rename: '{NAMES[0]}' and '{NAMES[1]}' both become '{NAMES[0]}'"


# --- state --------------------------------------------------------------------------------------------------------


def test_reset(state: OptimizerState) -> None:
    edited, changed = reset(state, r"layers\.1\.")
    assert changed == 2
    assert [found.state is None for found in edited.values()] == [True, True, False, False, False]
    assert unchanged(edited, state, "parameters")
    assert edited[NAMES[0]].weights == state[NAMES[0]].weights
    with pytest.raises(OptionError) as caught:
        reset(edited, r"layers\.1\.")
    assert str(caught.value) == (
        f"none of the 5 parameters with state matches 'layers\\.1\\.'; the first is '{NAMES[0]}'"
    )


def test_a_pattern_with_a_slip(state: OptimizerState) -> None:
    with pytest.raises(OptionError) as caught:
        reset(state, "layers(")
    assert str(caught.value) == (
        "'layers(' is not a regular expression: missing ), unterminated subpattern at position 6"
    )


def test_strip(state: OptimizerState) -> None:
    never = replace(state.parameters[1], state=None)
    state = replace(state, parameters=(state.parameters[0], never, *state.parameters[2:]))
    edited, changed = strip(state, ["exp_avg"])
    assert changed == 4
    assert [list(found.state or ()) for found in edited.values()] == [
        ["step", "exp_avg_sq"], [], *[["step", "exp_avg_sq"]] * 3,
    ]  # fmt: skip
    assert edited.parameters[1].state is None
    assert unchanged(edited, state, "parameters")
    with pytest.raises(OptionError) as caught:
        strip(edited, ["exp_avg_sq", "exp_avg"])
    assert str(caught.value) == "no parameter has a slot 'exp_avg'; there are: step, exp_avg_sq"


def test_prune(state: OptimizerState) -> None:
    edited, changed = prune(state, r"lora_B|score")
    assert changed == 3
    assert list(edited) == [NAMES[0], NAMES[2]]
    assert [group.count for group in edited.groups] == [1, 1]
    assert [[found.name for found in members] for members in edited.members()] == [[NAMES[0]], [NAMES[2]]]


def test_prune_what_is_carried(state: OptimizerState) -> None:
    edited, changed = prune(state, carried=True)
    assert (changed, list(edited), [group.count for group in edited.groups]) == (1, NAMES, [2, 2])
    with pytest.raises(OptionError) as caught:
        prune(edited, carried=True)
    assert str(caught.value) == "each of the 4 parameters is in a group; none is carried"


def test_prune_a_whole_group(state: OptimizerState) -> None:
    edited, _ = prune(state, r"layers\.1\.")
    assert [group.count for group in edited.groups] == [0, 2]


@pytest.mark.parametrize("arguments", [{}, {"match": "lora", "carried": True}])
def test_prune_nothing_or_both(state: OptimizerState, arguments: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        prune(state, **arguments)
    assert str(caught.value) == (
        "prune removes either the parameters that match an expression or those in no group; pass match= or carried=True"
    )


def test_prune_a_pattern_that_matches_nothing(state: OptimizerState) -> None:
    with pytest.raises(OptionError) as caught:
        prune(state, "lora_C")
    assert str(caught.value) == f"none of the 5 parameters matches 'lora_C'; the first is '{NAMES[0]}'"


# --- commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "printed", "change"),
    [
        (["edit", "--set", "lr=1e-5", "--group", "0"], "changed 1 groups", lambda s: set_options(s, {"lr": 1e-5}, 0)),
        (
            ["edit", "--set", "lr=2", "--set", "betas=(0.5,0.9)", "--group", "slow"], None,
            lambda s: set_options(s, {"lr": 2.0}, "slow"),
        ),
        (
            ["rename", "--rename", r"\.default\.", ".a."],
            "renamed 5 parameters",
            lambda s: rename(s, [("default", "a")]),
        ),
        (["reset", "--match", "lora_A"], "reset 2 parameters", lambda s: reset(s, "lora_A")),
        (["strip", "--slot", "exp_avg", "--slot", "step"], "dropped 10 slots", lambda s: strip(s, ["exp_avg", "step"])),
        (["prune", "--match", "score"], "removed 1 parameters", lambda s: prune(s, "score")),
        (["prune", "--carried"], "removed 1 parameters", lambda s: prune(s, carried=True)),
    ],
)  # fmt: skip
def test_commands(
    state: OptimizerState, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    arguments: list[str], printed: str | None, change: Callable[[OptimizerState], Any],
) -> None:  # fmt: skip
    source, target, expected = (tmp_path / f"{name}.safetensors" for name in ("source", "target", "expected"))
    lsf.write(state, source)
    code = run([arguments[0], str(source), str(target), *arguments[1:]])
    out, err = capsys.readouterr()
    if printed is None:
        assert (code, out) == (2, "")
        assert err == "error: no group has an option 'betas'; there are: lr\n"
        assert not target.exists()
        return
    assert (code, out) == (0, f"{printed}: {target}\n")
    with lsf.open_state(source) as opened:
        lsf.write(change(opened).state, expected)
    assert target.read_bytes() == expected.read_bytes()
    assert lsf.verify(target).ok


def test_a_command_overwrites_only_by_force(
    state: OptimizerState, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "state.safetensors"
    lsf.write(state, path)
    command = ["edit", str(path), str(path), "--set", "lr=1e-5"]
    assert run(command) == 2
    assert capsys.readouterr().err == f"error: {path} exists; pass --force to replace it\n"
    assert run([*command, "--force", "--json"]) == 0
    out, err = capsys.readouterr()
    with lsf.open_state(path) as found:
        assert dict(found.groups[0].options)["lr"] == 1e-5
    members = json.loads(out)
    assert members["digest"]
    assert {key: members[key] for key in ("schema_version", "source", "target", "changed")} == {
        "schema_version": 1, "source": str(path), "target": str(path), "changed": 2,
    }  # fmt: skip
    assert err == "note: a learning-rate scheduler that is resumed next to this state sets lr again\n"


@pytest.mark.parametrize("text", ["lr", "lr=high", "lr=[", "lr=__import__('os')"])
def test_a_setting_that_is_none(
    state: OptimizerState, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    lsf.write(state, tmp_path / "a.safetensors")
    assert run(["edit", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--set", text]) == 2
    expected = f"error: Invalid value: {text!r}: write OPTION=VALUE, the value as in Python (strings in quotes)\n"
    expected += "  Try 'lora-state edit --help' for help.\n"
    assert capsys.readouterr().err == expected
