"""The manifest: canonical JSON, typed values, and every complaint word by word."""

from __future__ import annotations

import json
import math
import re
import struct
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_state_format.errors import (
    ConversionError,
    FileError,
    RefusedError,
    UnrepresentableError,
    UnsupportedVersionError,
)
from lora_state_format.format import reading, writing
from lora_state_format.format.manifest import ShardOf, encode, fits
from lora_state_format.format.values import decode_value, encode_value
from lora_state_format.io import strict_json
from lora_state_format.io.strict_json import dumps, format_float, loads
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import Group, Naming, Optimizer, OptimizerState, Parameter, Role, Scalar, Slot
from lora_state_format.model.tensors import Digest, Tensor, contiguous
from lora_state_format.naming.names import without_wrappers
from lora_state_format.optimizers.roles import role_of

VECTORS: Final = Path(__file__).parents[2] / "spec" / "vectors"


# --- canonical JSON -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0"), (-0.0, "-0.0"), (1.0, "1.0"), (-1.5, "-1.5"), (0.1, "0.1"), (100.0, "100.0"),
        (0.001, "0.001"), (1e-5, "0.00001"), (1e-6, "0.000001"), (1e-7, "1e-7"), (1.5e-7, "1.5e-7"),
        (123456789.125, "123456789.125"), (1e16, "10000000000000000.0"), (1e20, "100000000000000000000.0"),
        (1e21, "1e+21"), (1.5e21, "1.5e+21"), (5e-324, "5e-324"), (1.7976931348623157e308, "1.7976931348623157e+308"),
        (2.2250738585072014e-308, "2.2250738585072014e-308"), (9007199254740993.0, "9007199254740992.0"),
        (0.000123, "0.000123"), (123e-9, "1.23e-7"), (4.35, "4.35"),
    ],
)  # fmt: skip
def test_floats_stand_as_ecmascript_writes_them(value: float, text: str) -> None:
    """W3."""
    assert format_float(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_reads_back(value: float) -> None:
    text = format_float(value)
    assert struct.pack("<d", float(text)) == struct.pack("<d", value)
    assert struct.pack("<d", loads(text)) == struct.pack("<d", value)
    assert re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?(e[+-][1-9][0-9]*)?", text)
    assert "." in text or "e" in text


def test_json_has_one_form() -> None:
    """W1, W2: order of code points, no spaces, no escapes but the needed ones."""
    assert dumps({"b": [1, 2.0, None, True, False], "a": {}, "": [], "é": (), "\U0001f71a": 0, "\uffff": 0}) == (
        '{"":[],"a":{},"b":[1,2.0,null,true,false],"é":[],"\uffff":0,"\U0001f71a":0}'
    )
    assert dumps('"\\/\b\t\n\f\r\x00\x1f\x7f\u2028é') == '"\\"\\\\/\\b\\t\\n\\f\\r\\u0000\\u001f\x7f\u2028é"'


JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers(1 - 2**53, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Equal, types and signs of zero too."""
    return repr(a) == repr(b)


def in_order(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: in_order(value[key]) for key in sorted(value)}
    return [in_order(item) for item in value] if isinstance(value, list) else value


@given(JSON)
def test_json_reads_back(value: Any) -> None:
    text = dumps(value)
    assert same(loads(text), in_order(value))
    assert same(json.loads(text), in_order(value))
    assert dumps(loads(text)) == text


@given(JSON, st.integers(0, 3))
def test_json_in_other_forms_is_read(value: Any, indent: int) -> None:
    assert same(in_order(loads(json.dumps(value, indent=indent))), in_order(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":1,"b":2,"a":3}', "the key 'a' occurs twice in one JSON object [R3]"),
        ("[NaN]", "JSON with the constant NaN [R3]"),
        ("[1e999]", "JSON with the number 1e999, which no float holds [R3]"),
        ("[-0]", "JSON with the integer -0, which would lose its sign [R3]"),
        ('["\\ud800"]', "JSON with a lone surrogate [R3]"),
        ("[1 2]", "not JSON: Expecting ',' delimiter at character 3 [R3]"),
        ("", "not JSON: Expecting value at character 0 [R3]"),
        ("[" * 65 + "]" * 65, "JSON nested deeper than 64 levels [R3]"),
        ('{"a":' * 65 + "1" + "}" * 65, "JSON nested deeper than 64 levels [R3]"),
        ("[" * 100_000, "JSON nested deeper than 64 levels [R3]"),
        ("[" + "[{}]," * 60 + '{"[[[":' * 64, "JSON nested deeper than 64 levels [R3]"),
        (f"[{'1' * 5000}]", "JSON with an integer of thousands of digits [R3]"),
    ],
    ids=range(12),
)
def test_json_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(FileError) as caught:
        loads(text, path="x")
    assert str(caught.value) == f"x: {message}"
    assert caught.value.rule == "R3"


def test_json_with_too_many_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "MAX_VALUES", 6)
    assert loads('[[1,{"a,[{":2}],3,"4,4"]') == [[1, {"a,[{": 2}], 3, "4,4"]
    with pytest.raises(FileError) as caught:
        loads("[[1,{}],3,4,5]")
    assert str(caught.value) == "JSON with 7 values, more than 6 [R3]"


@pytest.mark.parametrize(
    "text",
    [
        "[" * 64 + "]" * 64,
        '{"a":[' * 32 + "]}" * 32,
        '["[[[[","\\"[[[","\\\\",["]"],"\\\\\\"["]',
        '"["',
        "[[],[[]],{}]",
    ],
)
def test_depth_counts_brackets_outside_strings(text: str) -> None:
    assert loads(text) == json.loads(text)


# --- typed values -------------------------------------------------------------------------------------------------


def fail(detail: str) -> FileError:
    return FileError(detail, rule="R22")


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (None, None), (True, True), (1, 1), (1.0, 1.0), ("$a", "$a"), ([], []), ({}, {}),
        ((), {"$tuple": []}),
        ((1, [2]), {"$tuple": [1, [2]]}),
        (math.inf, {"$float": "inf"}),
        (-math.inf, {"$float": "-inf"}),
        (2**53 - 1, 2**53 - 1),
        (2**53, {"$int": "9007199254740992"}),
        (-(10**999), {"$int": "-1" + "0" * 999}),
        (b"\x00\xff", {"$bytes": "00ff"}),
        (Scalar("F32", b"\x00\x00\x40\x40"), {"$scalar": ["F32", "00004040"]}),
        ({"b": 1, "a": ()}, {"a": {"$tuple": []}, "b": 1}),
        ({1: "x"}, {"$dict": [[1, "x"]]}),
        ({10: 0, 9: 0, None: 0, (2, "a"): 0}, {"$dict": [[10, 0], [9, 0], [None, 0], [{"$tuple": [2, "a"]}, 0]]}),
        ({"$a": 1, "b": 2}, {"$dict": [["$a", 1], ["b", 2]]}),
    ],
    ids=repr,
)  # fmt: skip
def test_values_and_their_form(value: Any, encoded: Any) -> None:
    """W8."""
    assert same(encode_value(value, "x", None), encoded)
    assert same(decode_value(encoded, fail, None), in_order(value) if encoded == {"a": {"$tuple": []}, "b": 1} else
                dict(sorted(value.items(), key=lambda item: dumps(encode_value(item[0], "x", None))))
                if isinstance(value, dict) else value)  # fmt: skip


def test_mappings_of_any_kind_become_plain_ones() -> None:
    for kind in (OrderedDict, MappingProxyType):
        assert encode_value(kind({"b": 1, "a": 2}), "x", None) == {"a": 2, "b": 1}


def test_nan_is_nan() -> None:
    assert encode_value(math.nan, "x", None) == {"$float": "nan"}
    assert math.isnan(decode_value({"$float": "nan"}, fail, None))  # type: ignore[arg-type]


class Pair(NamedTuple):
    a: int
    b: int


class Text(str):
    pass


SLOT: Final = Slot(contiguous("F32", (2,), Memory(bytes(8))), Role.PARAM)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1, 2}, "the place holds a builtins.set, which the format cannot hold"),
        ({"a": [1, {"b": np.float64(1)}]}, "the place: a.1.b holds a numpy.float64, which the format cannot hold"),
        (Pair(1, 2), f"the place holds a {__name__}.Pair, which the format cannot hold"),
        ([Text("a")], f"the place: 0 holds a {__name__}.Text, which the format cannot hold"),
        (1j, "the place holds a builtins.complex, which the format cannot hold"),
        (bytearray(1), "the place holds a builtins.bytearray, which the format cannot hold"),
        (["\ud800"], "the place: 0 holds a string with a lone surrogate, which the format cannot hold"),
        ({"\ud800": 1}, "the place holds a string with a lone surrogate, which the format cannot hold"),
        (10**1000, "the place holds an integer of more than 1000 digits, which the format cannot hold"),
        ({b"k": 1}, "the place holds the key b'k', which the format cannot hold"),
        ({(1, (2, b"k")): 1}, "the place holds the key (1, (2, b'k')), which the format cannot hold"),
        ({"a": SLOT}, "the place: a holds a tensor, which the format cannot hold"),
    ],
    ids=range(12),
)
def test_values_without_a_form(value: Any, message: str) -> None:
    with pytest.raises(UnrepresentableError) as caught:
        encode_value(value, "the place", None)
    assert str(caught.value) == message


def test_nesting() -> None:
    value: Any = 1
    for _ in range(16):
        value = {"a": (value,)} if isinstance(value, int) else [value]
    with pytest.raises(UnrepresentableError) as caught:
        encode_value([value], "x", None)
    assert str(caught.value).endswith("holds values nested deeper than 16 levels, which the format cannot hold")
    deep: Any = 1
    for _ in range(16):
        deep = {0: deep}
    assert same(decode_value(loads(dumps(encode_value(deep, "x", None))), fail, None), deep)


@pytest.mark.parametrize(
    ("path", "label"),
    [
        (("exp_avg",), "exp_avg"),
        (("a", 0, "b"), "a.0.b"),
        (("a/b",), "a_b"),
        (("",), "tensor"),
        (("a", None), "a.null"),
    ],
)
def test_labels(path: tuple[Any, ...], label: str) -> None:
    """W6."""
    value: Any = SLOT
    for part in reversed(path):
        value = [value] if isinstance(part, int) else {part: value}
    found: dict[str, Slot] = {}
    encode_value(value, "x", found)
    assert list(found) == [label]


def test_labels_that_would_be_the_same() -> None:
    """W6: in canonical order."""
    found: dict[str, Slot] = {}
    tree = encode_value({"c/d": SLOT, "a.b": SLOT, "a": {"b": SLOT}, "c_d": SLOT, "a.b~2": SLOT}, "x", found)
    assert list(found) == ["a.b", "a.b~2", "a.b~2~2", "c_d", "c_d~2"]
    assert tree["a"]["b"] == {"$tensor": "a.b", "role": "param"}
    assert tree["a.b"]["$tensor"] == "a.b~2"


@pytest.mark.parametrize(
    ("role", "tensor", "parameter", "verdict"),
    [
        (Role.PARAM, (2, 3), (2, 3), True), (Role.PARAM, (3, 2), (2, 3), False), (Role.ROW, (2,), (2, 3), True),
        (Role.ROW, (2, 1), (2, 3), True), (Role.ROW, (3,), (2, 3), False), (Role.ROW, (), (2,), False),
        (Role.COL, (3,), (2, 3), True), (Role.COL, (1, 3), (2, 3), True), (Role.COL, (2,), (2, 3), False),
        (Role.COL, (2,), (2,), False), (Role.ROW, (4, 2), (4, 2, 3), True), (Role.COL, (4, 3), (4, 2, 3), True),
        (Role.COL, (4, 1, 3), (4, 2, 3), True), (Role.BLOCK, (9,), (2, 3), True), (Role.OPAQUE, (9, 9), (2,), True),
    ],
)  # fmt: skip
def test_shapes_that_roles_allow(role: Role, tensor: Any, parameter: Any, verdict: bool) -> None:
    assert fits(role, tensor, parameter) is verdict


# --- states -------------------------------------------------------------------------------------------------------


def state(*parameters: Parameter, **members: Any) -> OptimizerState:
    default = {"optimizers": (Optimizer(),), "groups": (Group(0, (), len(parameters)),), "naming": Naming("model")}
    return OptimizerState(parameters=parameters, **{**default, **members})


def parameter(name: str = "w", **members: Any) -> Parameter:
    return Parameter(**{"name": name, "shape": (2,), "state": {"m": SLOT}, **members})


def test_defaults_are_left_out() -> None:
    """W4."""
    members = encode(state(parameter())).members
    assert members == {
        "format": "named-optimizer-state",
        "version": "1.0",
        "optimizers": [{"class": None}],
        "groups": [{"optimizer": 0, "count": 1, "options": []}],
        "parameters": [{"name": "w", "shape": [2], "state": 0}],
        "states": [{"m": {"$tensor": "m", "role": "param"}}],
        "naming": {"source": "model"},
    }


def test_the_table_has_each_tree_once() -> None:
    """W9: in the order of first use."""
    trees: list[Mapping[str, Any] | None] = [
        {"m": SLOT, "step": 2},
        None,
        {},
        {"step": 2, "m": SLOT},
        {"step": 2.0},
        {},
    ]
    found = encode(state(*(parameter(f"w{n}", state=tree) for n, tree in enumerate(trees))))
    assert [entry["state"] for entry in found.members["parameters"]] == [0, None, 1, 0, 2, 1]
    assert found.members["states"] == [{"m": {"$tensor": "m", "role": "param"}, "step": 2}, {}, {"step": 2.0}]
    assert list(found.tensors) == ["w0/m", "w3/m"]


def test_tensors_stand_by_parameter_and_label() -> None:
    """W5, before the sizes of items are looked at."""
    both = {"b": SLOT, "a": {"c": SLOT}}
    found = encode(state(parameter("z", state=both), parameter("a", state=both), globals={"g": SLOT}))
    assert list(found.tensors) == ["z/a.c", "z/b", "a/a.c", "a/b", "$globals/g"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (state(parameter("")), "parameters[0] has the name '': empty, or with '$' in front [R14]"),
        (state(parameter("$w")), "parameters[0] has the name '$w': empty, or with '$' in front [R14]"),
        (state(parameter(tied=("w",))), "two parameters have the name 'w' [R14]"),
        (state(parameter(shape=(-2,))), "parameters[0].shape is [-2], expected natural numbers [R12]"),
        (state(parameter(shape=(np.int64(2),))),
         'parameters[0].shape is ["np.int64(2)"], expected natural numbers [R12]'),
        (
            state(parameter(dtype="float32")),
            'parameters[0].dtype is "float32", which is not a dtype of the format [R12]',
        ),
        (state(parameter(adapter=1)), "parameters[0].adapter is 1, expected a string [R12]"),
        (state(parameter(original_id=-1)),
         "parameters[0].id is -1, expected a natural number [R12]"),
        (state(parameter(shape=(3,))),
         "tensor 'w/m' has shape [2], which role 'param' does not allow for a parameter of shape [3] [R18]"),
        (state(parameter(state={"m": Slot(contiguous("F32", (), Memory(bytes(4))))})),
         "tensor 'w/m' has no axes: it must be a $scalar [R18]"),
        (state(parameter(), groups=(Group(1, (), 1),)), "groups[0] belongs to optimizer 1, of 1 [R15]"),
        (state(parameter(), groups=(Group(0, (), 2),)), "the groups count 2 parameters, the manifest lists 1 [R15]"),
        (state(parameter(), groups=(Group(0, (("lr", 1), ("lr", 2)), 1),)),
         "groups[0].options names an option twice [R15]"),
        (state(parameter(), global_step=-1), "manifest.global_step is -1, expected a natural number [R12]"),
        (state(parameter(weights=Digest("xxh3-128", "F32", "abc"))),
         "weights.values holds [\"F32\", \"abc\"], expected null or a dtype and a digest [R19]"),
        (state(parameter(), extensions={"a": {}}), "extension 'a' does not say whether it must be understood [R13]"),
        (state(parameter(), extensions={"a": {"must_understand": True}}),
         "extension 'a' must be understood, and this package does not know it [R13]"),
        (state(parameter(), optimizers=(Optimizer(), Optimizer()), groups=(Group(1, (), 1), Group(0, (), 0))),
         "groups[1] of optimizer 0 follows a group of a later optimizer [R15]"),
    ],
    ids=range(18),
)  # fmt: skip
def test_a_state_that_breaks_a_rule_is_not_written(broken: OptimizerState, message: str) -> None:
    """W16."""
    with pytest.raises(UnrepresentableError) as caught:
        encode(broken)
    assert str(caught.value) == f"the state cannot be written: {message}"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (state(parameter("\ud800")), "parameter '\\ud800' has a name with a lone surrogate, which UTF-8 cannot encode"),
        (
            state(parameter(state={"x": {1}})),
            "the state of 'w': x holds a builtins.set, which the format cannot hold",
        ),
        (
            state(parameter(), groups=(Group(0, (("lr", SLOT),), 1),)),
            "option 'lr' of group 0 holds a tensor, which the format cannot hold",
        ),
        (
            state(parameter(), extra={"a": SLOT}),
            "extra: a holds a tensor, which the format cannot hold",
        ),
        (
            state(parameter("a", weights=Digest("x", "F32", "00")), parameter("b", weights=Digest("y", "F32", "00"))),
            "weights digests of several algorithms: x, y",
        ),
    ],
    ids=range(5),
)
def test_what_a_state_holds_has_to_have_a_form(broken: OptimizerState, message: str) -> None:
    with pytest.raises(UnrepresentableError) as caught:
        encode(broken)
    assert str(caught.value) == message


def test_a_shard_says_its_place() -> None:
    found = encode(state(parameter()), ShardOf("0" * 32, 2, 3, (7,))).members
    assert found["set"] == {"id": "0" * 32, "index": 2, "count": 3, "positions": [7]}


def test_wrapper_segments_are_removed() -> None:
    """W10."""
    names = ["module._orig_mod.a._checkpoint_wrapped_module.weight", "module._orig_mod.module.bias"]
    assert without_wrappers(names) == (
        ["a.weight", "module.bias"],
        ("_checkpoint_wrapped_module", "_orig_mod", "module"),
    )
    with pytest.raises(ConversionError):
        without_wrappers(["a._orig_mod.b", "a.b"])


def test_what_is_not_known_is_opaque() -> None:
    """W11."""
    assert role_of(("whatever",), "F32") is Role.OPAQUE


# --- what a reader says -------------------------------------------------------------------------------------------


MESSAGES: Final = {
    "format-other": 'manifest.format is "named-optimizer-states", expected "named-optimizer-state" [R10]',
    "version-zero": 'manifest.version is "01.0", expected MAJOR.MINOR [R11]',
    "version-major": (
        "written in version 2.0 of the format; this package reads version 1: install one that reads it [R11]"
    ),
    "member-groups-missing": "manifest lacks the member 'groups' [R12]",
    "member-states-type": "manifest.states is {}, expected an array [R12]",
    "member-parameter-state-string": 'parameters[1].state is "0", expected a natural number or null [R12]',
    "member-optimizer-type": 'optimizers[0] is "AdamW", expected an object [R12]',
    "member-unknown": "manifest has the unknown member 'later' [R12]",
    "member-step-large": "manifest.global_step is 9007199254740992, expected a natural number [R12]",
    "member-extra-keys": 'manifest.extra is {"$dict": [[1, 2]]}, expected a mapping with string keys [R12]',
    "member-naming-details": "naming.details is [], expected an object [R12]",
    "member-group-options-single": 'groups[0].options holds ["lr"], expected pairs of a name and a value [R12]',
    "member-parameter-shape-float": "parameters[1].shape is [2.0], expected natural numbers [R12]",
    "member-parameter-shape-too-many-axes": "parameters[1].shape has 65 axes, more than 64 [R12]",
    "member-parameter-dtype": 'parameters[1].dtype is "float32", which is not a dtype of the format [R12]',
    "member-parameter-tied-number": "parameters[1].tied is [1], expected strings [R12]",
    "member-parameter-keys": 'parameters[1].keys is {"peft": 1}, expected strings [R12]',
    "member-parameter-id-tuple": 'parameters[1].id is {"$tuple": []}, expected an integer or a string [R12]',
    "extension-undecided": "extension 'org.example' does not say whether it must be understood [R13]",
    "extension-unknown": "extension 'org.example' must be understood, and this package does not know it [R13]",
    "name-dollar": "parameters[0] has the name '$globals': empty, or with '$' in front [R14]",
    "name-tied-twice": "two parameters have the name 'x' [R14]",
    "group-count": "the groups count 2 parameters, the manifest lists 1 [R15]",
    "group-optimizer": "groups[0] belongs to optimizer 1, of 1 [R15]",
    "group-order": "groups[1] of optimizer 0 follows a group of a later optimizer [R15]",
    "group-option-twice": "groups[0].options names an option twice [R15]",
    "state-beyond-the-table": "parameters[0].state is 1, the table holds 1 [R16]",
    "globals-tuple": 'manifest.globals is {"$tuple": []}, expected a mapping with string keys [R16]',
    "label-slash": "states[0] has the label 'a/b': empty, or with '/' in it [R17]",
    "label-twice": "states[0] has a label twice [R17]",
    "tensor-not-in-the-header": "tensor 'w/b' is in the manifest, not in the header [R17]",
    "tensor-not-in-the-manifest": "tensor 'w/momentum' is in the header, not in the manifest [R17]",
    "role-without-axes": "tensor 'w/m' has no axes: it must be a $scalar [R18]",
    "role-row": "tensor 'w/m' has shape [3], which role 'row' does not allow for a parameter of shape [2, 3] [R18]",
    "weights-count": "2 weights digests for 1 parameters [R19]",
    "weights-odd": 'weights.values holds ["F32", "abc"], expected null or a dtype and a digest [R19]',
    "digests-count": "2 digests for 1 tensors [R20]",
    "digests-long": "digests.values are not all digests by 'xxh3-128' [R20]",
    "value-large-integer": "manifest.extra holds the integer 9007199254740992 as a number [R22]",
    "value-unknown-tag": 'manifest.extra holds {"$complex": [1, 2]}, which is not a typed value [R22]',
    "value-tag-and-member": 'manifest.extra holds an object with the members ["$tuple", "a"] [R22]',
    "value-dict-single": "manifest.extra holds $dict with [1], expected pairs [R22]",
    "value-dict-key-bytes": 'manifest.extra holds $dict with the key {"$bytes": "00"} [R22]',
    "value-dict-twice-by-value": "manifest.extra holds $dict with the key 1.0 twice [R22]",
    "value-tensor-option": "groups[0].options 'lr' holds the tensor \"momentum\" [R22]",
    "value-tensor-role": (
        'states[0] holds {"$tensor": "momentum", "role": "parameter"}, which is not a typed value [R22]'
    ),
    "shard-id": 'set.id is "abc", expected 32 hex digits [R23]',
    "shard-index-beyond": "set.index is 3, of 2 shards [R23]",
    "shard-positions-count": "set.positions has 2 different naturals for 1 parameters [R23]",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(name: str) -> None:
    path = VECTORS / "invalid" / f"{name}.safetensors"
    with pytest.raises(FileError) as caught:
        reading.open_state(path)
    assert str(caught.value) == f"{path}: {MESSAGES[name]}"
    kinds = {"version-major": UnsupportedVersionError, "extension-unknown": RefusedError}
    assert caught.type is kinds.get(name, FileError)


def test_characters_that_a_terminal_would_act_on_are_escaped(tmp_path: Path) -> None:
    hostile = "\x1b[31m\x9b\u202e"
    found = state(parameter(hostile), parameter("b", tied=(hostile,)))
    with pytest.raises(UnrepresentableError) as caught:
        encode(found)
    assert str(caught.value).isprintable()


# --- newer versions -----------------------------------------------------------------------------------------------


def test_members_of_a_newer_version_are_kept(tmp_path: Path) -> None:
    """W15: top-level members come back with their version."""
    raw = (VECTORS / "valid" / "newer-minor.safetensors").read_bytes()
    head = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    members = json.loads(head["__metadata__"]["optimizer_state"])["manifest"]
    del members["parameters"][0]["later"], members["naming"]["later"]
    path = tmp_path / "a.safetensors"
    found = state(parameter(), unknown={"version": "1.7", "later": {"a": [1, {"$new": 2}]}})
    writing.write(found, path)
    with reading.open_state(path) as opened:
        assert opened.unknown == {"version": "1.7", "later": {"a": [1, {"$new": 2}]}}
        writing.write(opened, tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()
    assert members["later"] == found.unknown["later"]


def test_members_that_would_be_lost_are_not_written() -> None:
    """W15."""
    with reading.open_state(VECTORS / "valid" / "newer-minor.safetensors") as opened:
        assert opened.unknown["$nested"] == ["naming.later", "parameters.later"]
        with pytest.raises(UnrepresentableError) as caught:
            encode(opened)
    assert str(caught.value) == (
        "the state was written by version 1.7 of the format, and has members that would be lost: naming.later, "
        "parameters.later; use a newer version of this package"
    )


def test_slot_trees_are_decoded_when_they_are_asked_for() -> None:
    with reading.open_state(VECTORS / "valid" / "several-groups.safetensors") as opened:
        tree = opened.parameters[0].state
        assert tree is not None
        assert (set(tree), len(tree)) == ({"step", "exp_avg", "exp_avg_sq"}, 3)
        assert tree["exp_avg"] is tree["exp_avg"]
        assert repr(tree).startswith("{'exp_avg': Slot(")
        assert isinstance(opened["layers.0.weight"]["exp_avg"], Tensor)
