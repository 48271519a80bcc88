from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lora_state_format.errors import FileError, UnrepresentableError
from lora_state_format.foreign import pickles, torch_save
from lora_state_format.foreign.state_dict import Found, find, from_state_dict, is_state_dict, to_state_dict
from lora_state_format.io.ledger import Ledger
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import Naming, Parameter, Role, Scalar, Slot
from lora_state_format.model.tensors import Tensor, contiguous
from lora_state_format.optimizers.roles import role_of

Build = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Build] = {
    "Adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3)),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Rprop": torch.optim.Rprop,
    "ASGD": torch.optim.ASGD,
    "Adafactor": torch.optim.Adafactor,
    "LBFGS": torch.optim.LBFGS,
    "transformers Adafactor": lambda p: transformers.Adafactor(p, beta1=0.9),
}
SHAPES = [(3, 4), (4,), (2, 3, 4)]


def stepped(build: Build) -> dict[str, Any]:
    """The state dict of an optimizer after two steps; its last parameter never had a gradient."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in [*SHAPES, (5,)]]

    @torch.enable_grad()  # transformers' optimizers call it without gradients
    def loss() -> float:
        optimizer.zero_grad()
        value = torch.stack([(p**2).sum() for p in parameters[:-1]]).sum()
        torch.autograd.backward([value])
        return value.item()

    optimizer = build(parameters)
    for _ in range(2):
        optimizer.step(loss)
    return optimizer.state_dict()


def read(tree: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return pickles.load(Memory(buffer.getvalue())).value


def assert_identical(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_identical(ours[key], theirs[key])
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_identical(mine, other)
    else:
        assert ours == theirs


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_there_and_back(name: str, tmp_path: Path) -> None:
    original = stepped(OPTIMIZERS[name])
    state = from_state_dict(read(original))
    assert (state.ids, state.sizes()) == ((0, 1, 2, 3), [4])
    torch_save.save(to_state_dict(state), tmp_path / "optimizer.pt")
    assert_identical(torch.load(tmp_path / "optimizer.pt", weights_only=True), original)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "LBFGS"])
def test_roles_are_what_the_shapes_of_a_run_show(name: str) -> None:
    state = from_state_dict(read(stepped(OPTIMIZERS[name])))
    for identity, shape in enumerate(SHAPES):
        for slot, value in state.entries.get(identity, {}).items():
            if isinstance(value, Slot):
                expected: dict[Role, tuple[int, ...]] = {
                    Role.PARAM: shape,
                    Role.ROW: tuple(n for n in shape[:-1] if n > 1),
                    Role.COL: tuple(n for n in (*shape[:-2], *shape[-1:]) if n > 1),
                }
                squeezed = tuple(n for n in value.tensor.shape if n > 1)
                assert squeezed == expected[value.role], (slot, shape)


@pytest.mark.parametrize("name", ["Adafactor", "transformers Adafactor"])
def test_factored_moments_show_the_shape_of_their_parameter(name: str) -> None:
    tree = stepped(lambda p: OPTIMIZERS[name](p) if name == "Adafactor" else transformers.Adafactor(p))
    assert from_state_dict(read(tree)).shapes() == [*SHAPES, None]


def test_factored_moments_that_show_two_shapes_show_none() -> None:
    """torch's of a parameter of (2, 1, 3), or transformers' of one of (2, 1, 1, 3)."""
    entry = {"row_var": torch.ones(2, 1, 1), "col_var": torch.ones(2, 1, 3)}
    tree = {"state": {0: entry}, "param_groups": [{"params": [0]}]}
    assert from_state_dict(read(tree)).shapes() == [None]


def test_a_state_dict_whose_ids_are_addresses_and_whose_state_is_sparse() -> None:
    """As before torch 1.6; order is that of the groups, whatever that of the state."""
    tree = {
        "state": {77: {"momentum_buffer": torch.ones(3)}, 2259262640440: {"momentum_buffer": None}},
        "param_groups": [
            {"lr": 0.1, "betas": [0.9, 0.99], "params": [2259262640440, 5]},
            {"lr": 0, "params": []},
            {"lr": 1e-5, "params": [77]},
        ],
    }
    state = from_state_dict(read(tree), class_path="torch.optim.sgd.SGD", global_step=7)
    assert (state.ids, state.sizes(), state.global_step) == ((2259262640440, 5, 77), [2, 0, 1], 7)
    assert state.optimizers[0].class_path == "torch.optim.sgd.SGD"
    assert state.shapes() == [None, None, (3,)]
    assert state.entries[2259262640440] == {"momentum_buffer": None}
    assert 5 not in state.entries
    assert state.groups[0].options == (("lr", 0.1), ("betas", [0.9, 0.99]))
    assert_plain(to_state_dict(state), tree)
    names = [Parameter("a", (3,), None), Parameter("b", (3,), None), Parameter("c", (3,), None)]
    assert_plain(to_state_dict(state.named(names, Naming("names"))), tree)


def assert_plain(ours: Any, tree: Any) -> None:
    """The written dict holds what the original does, by torch's own reading of it."""
    buffer = io.BytesIO(b"".join(bytes(chunk) for chunk in torch_save.archive(ours, Ledger())))
    loaded = torch.load(buffer, weights_only=True)
    assert loaded["param_groups"] == tree["param_groups"]
    assert loaded["state"].keys() == tree["state"].keys()
    for key, entry in tree["state"].items():
        assert_identical(loaded["state"][key], entry)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (3, 3),
        (torch.tensor(3.0), Scalar("F32", b"\0\0@@")),
        (torch.tensor(3), Scalar("I64", b"\3" + bytes(7))),
        (torch.tensor([1.0, 3.0])[1], Scalar("F32", b"\0\0@@")),
    ],
)
def test_steps_stay_what_they_are(step: Any, expected: Any) -> None:
    state = from_state_dict(read({"state": {0: {"step": step}}, "param_groups": [{"params": [0]}]}))
    value = state.entries[0]["step"]
    assert type(value) is type(expected)
    assert value == expected


def test_a_step_of_one_element_stays_a_tensor() -> None:
    tree = {"state": {0: {"step": torch.tensor([3.0])}}, "param_groups": [{"params": [0]}]}
    value = from_state_dict(read(tree)).entries[0]["step"]
    assert isinstance(value, Slot)
    assert (value.tensor.shape, value.role) == ((1,), Role.OPAQUE)


def test_ids_that_became_text() -> None:
    """As in JSON, whose keys are text."""
    state = from_state_dict({"state": {"0": {"a": 1.0}, "2": {"a": 2.0}}, "param_groups": [{"params": [2, 0, 1]}]})
    assert state.entries == {0: {"a": 1.0}, 2: {"a": 2.0}}
    assert (state.ids, state.globals) == ((2, 0, 1), {})


def test_state_that_belongs_to_no_parameter() -> None:
    tree = {
        "state": {0: {"exp_avg": torch.ones(2)}, "local_epoch": 219, 9: {"exp_avg": torch.zeros(3)}},
        "param_groups": [{"lr": 0.1, "params": [0]}],
        "master": {"weights": [torch.ones(2)]},
    }
    state = from_state_dict(read(tree))
    assert list(state.entries) == [0]
    keys: Any = state.globals["state"]
    assert keys["local_epoch"] == 219
    loose = keys[9]["exp_avg"]
    assert (loose.tensor.shape, loose.role) == ((3,), Role.OPAQUE)
    assert list(state.globals) == ["state", "master"]
    back = to_state_dict(state)
    assert list(back) == ["state", "param_groups", "master"]
    assert_plain(back, tree)


def test_nested_and_listed_slots_keep_their_form() -> None:
    """bitsandbytes since 0.49 and SOAP."""
    quantized = {"state1": torch.zeros(8, 512, dtype=torch.uint8), "absmax1": torch.ones(16), "qmap1": torch.ones(256)}
    tree = {
        "state": {
            0: {"step": 2, "__bnb_optimizer_quant_state__": quantized},
            1: {"GG": [torch.eye(2), []], "Q": [torch.eye(2), None], "exp_avg": torch.ones(2, 3)},
        },
        "param_groups": [{"alpha": None, "params": [0, 1]}],
    }
    state = from_state_dict(read(tree))
    inner: Any = state.entries[0]["__bnb_optimizer_quant_state__"]
    assert {key: slot.role for key, slot in inner.items()} == {
        "state1": Role.BLOCK, "absmax1": Role.BLOCK, "qmap1": Role.OPAQUE,
    }  # fmt: skip
    rotated: Any = state.entries[1]
    assert rotated["GG"][1] == []
    assert rotated["exp_avg"].role is Role.OPAQUE
    assert_plain(to_state_dict(state), tree)


@pytest.mark.parametrize(
    ("path", "dtype", "siblings", "options", "role"),
    [
        (("exp_avg",), "F32", {}, {}, Role.PARAM),
        (("exp_avg",), "U8", {}, {}, Role.OPAQUE),
        (("exp_avg",), "F32", {"projector"}, {}, Role.OPAQUE),
        (("exp_avg_sq_row",), "BF16", {}, {}, Role.ROW),
        (("col_var",), "F32", {}, {}, Role.COL),
        (("state1",), "U8", {"absmax1"}, {}, Role.BLOCK),
        (("state1",), "U8", {"absmax1", "projector"}, {}, Role.OPAQUE),
        (("state2",), "U8", {"absmax1"}, {}, Role.OPAQUE),
        (("state1",), "F32", {}, {"betas": (0.9, 0.99)}, Role.PARAM),
        (("state1",), "F32", {}, {"betas": (0.9, 0.99, 0.999)}, Role.OPAQUE),
        (("state2",), "F32", {}, {"betas": (0.9, 0.99, 0.999)}, Role.PARAM),
        (("absmax1",), "F32", {"absmax1"}, {"betas": [0.9, 0.99, 0.999]}, Role.OPAQUE),
        (("Q", 0), "F32", {"Q"}, {}, Role.OPAQUE),
        (("s",), "F32", {}, {}, Role.OPAQUE),
    ],
)
def test_roles_by_name(path: tuple[Any, ...], dtype: str, siblings: set[str], options: Any, role: Role) -> None:
    assert role_of(path, dtype, dict.fromkeys(siblings), options) is role


def test_numbers_and_arrays_of_numpy_are_converted_and_listed() -> None:
    tree = {
        "state": {0: {"buffer": np.arange(3, dtype="f4"), "blob": bytearray(b"x"), "point": np.array(2.0)}},
        "param_groups": [{"lr": np.float64(0.5), "nesterov": np.bool_(True), "params": [0]}],
    }
    state = from_state_dict(read(tree), origin={"format": "test"})
    assert state.groups[0].options == (("lr", 0.5), ("nesterov", True))
    assert state.entries[0]["blob"] == b"x"
    assert state.entries[0]["point"] == Scalar("F64", b"\0\0\0\0\0\0\0@")
    assert state.origin == {
        "format": "test",
        "converted": [
            "param_groups.0.lr: NumPy f8 to float",
            "param_groups.0.nesterov: NumPy b1 to bool",
            "state.0.buffer: NumPy array to tensor",
            "state.0.blob: bytearray to bytes",
            "state.0.point: NumPy array to tensor",
        ],
    }


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "groups", "names"),
    [
        (["a.weight", "b.weight"], {}, ("a.weight", "b.weight")),
        ([0, 1], {"param_names": [["a"], ["b"]]}, ("a", "b")),
        ([0, 1], {"names": [("a",), ("b",)]}, ("a", "b")),
        ([0, 1], {"name": ["a", "b"]}, ("a", "b")),
        ([0, 1], {"param_names": [["a"], ["a"]]}, None),
        ([0, 1], {"param_names": [["a"], ["b", "c"]]}, None),
        ([0, 1], {"param_names": [["a"], [1]]}, None),
        ([0, 1], {"name": ["decay", None]}, None),
        ([0, 1], {}, None),
    ],
)
def test_names_that_the_file_states(ids: list[Any], groups: dict[str, list[Any]], names: Any) -> None:
    tree = {
        "state": {},
        "param_groups": [
            {"params": [identity], **{key: values[number] for key, values in groups.items()}}
            for number, identity in enumerate(ids)
        ],
    }
    state = from_state_dict(tree)
    assert state.names == names
    assert to_state_dict(state) == tree


def test_names_of_a_torch_optimizer_that_was_given_them() -> None:
    model = torch.nn.Linear(2, 3)
    original = torch.optim.AdamW(model.named_parameters()).state_dict()
    state = from_state_dict(read(original))
    assert state.names == ("weight", "bias")
    assert to_state_dict(state) == original


# --- several optimizers -------------------------------------------------------------------------------------------


def test_state_dicts_are_found_where_frameworks_put_them() -> None:
    one = {"state": {}, "param_groups": [{"params": [0]}]}
    for tree, places in (
        (one, [""]),
        ({"optimizer": one, "epoch": 3}, ["optimizer"]),
        ({"optimizer_states": [one, one]}, ["optimizer_states.0", "optimizer_states.1"]),
        ({"state": {"optimizers": {"AdamW": one}}}, ["state.optimizers.AdamW"]),
        ({"a": {"b": {"c": {"d": {"e": one}}}}}, []),
        ([1, 2], []),
        (None, []),
    ):
        assert [item.where for item in find(tree)] == places
    assert not is_state_dict({"state": {}, "param_groups": [{"lr": 1}]})
    assert not is_state_dict({"state": [], "param_groups": []})


def test_several_optimizers_are_one_state() -> None:
    trees = [
        {"state": {0: {"exp_avg": torch.ones(2)}, "epoch": 1}, "param_groups": [{"lr": 1.0, "params": [0, 1]}]},
        {"state": {1: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"params": [1]}, {"params": [0]}]},
    ]
    state = from_state_dict(*find(read({"optimizer_states": trees})))
    assert [optimizer.id for optimizer in state.optimizers] == ["optimizer_states.0", "optimizer_states.1"]
    assert [(group.optimizer, group.count) for group in state.groups] == [(0, 2), (1, 1), (1, 1)]
    assert state.ids == ("0:0", "0:1", "1:1", "1:0")
    assert state.globals == {"0": {"state": {"epoch": 1}}}
    parameters = [Parameter(name, shape, None) for name, shape in zip("abcd", [(2,), (2,), (3,), (3,)], strict=True)]
    for version in (state, state.named(parameters, Naming("names"))):
        for number, tree in enumerate(trees):
            assert_plain(to_state_dict(version, number), tree)


# --- live tensors -------------------------------------------------------------------------------------------------


def test_a_leaf_function_turns_live_tensors_into_the_models() -> None:
    def leaf(raw: Any) -> Tensor | Scalar | None:
        if not isinstance(raw, torch.Tensor):
            return None
        data = raw.numpy().tobytes()
        return contiguous("F32", raw.shape, Memory(data)) if raw.shape else Scalar("F32", data)

    original = stepped(OPTIMIZERS["AdamW"])
    state = from_state_dict(original, leaf=leaf)
    for identity, entry in original["state"].items():
        slot = state.entries[identity]["exp_avg"]
        assert isinstance(slot, Slot)
        assert slot.role is Role.PARAM
        assert np.array_equal(slot.tensor.numpy(), entry["exp_avg"].numpy())
        assert state.entries[identity]["step"] == Scalar("F32", b"\0\0\0@")
    lr = dict(state.groups[0].options)["lr"]
    assert isinstance(lr, Scalar)
    assert math.isclose(float(lr.item().real), 1e-3, rel_tol=1e-6)


# --- refusals -----------------------------------------------------------------------------------------------------

BARE = {"state": {}, "param_groups": [{"params": [0]}]}


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"state": {}}, FileError, "the value is no optimizer's state dict"),
        (
            {**BARE, "param_groups": [{"params": [0, 0]}]},
            FileError,
            "param_groups.0 lists id 0, which was listed before",
        ),
        (
            {**BARE, "param_groups": [{"params": [1.5]}]},
            FileError,
            "param_groups.0 lists a parameter by a value of type float, not by an id",
        ),
        (
            {**BARE, "state": {0: [1]}},
            FileError,
            "state.0 is a value of type list, not the slots of a parameter",
        ),
        (
            {**BARE, "state": {0: {7: 1}}},
            UnrepresentableError,
            "state.0: a slot is called 7, which is no string",
        ),
        (
            {**BARE, "state": {0: {"x": [1j]}}},
            UnrepresentableError,
            "state.0.x.0 is a value of type complex, which has no form in a state",
        ),
        (
            {**BARE, "state": {0: {"x": {(1, 2): 3}}}},
            UnrepresentableError,
            "state.0.x: a key of a dict is a value of type tuple",
        ),
        (
            {**BARE, "state": {(1, 2): 3}},
            UnrepresentableError,
            "state: a key of a dict is a value of type tuple",
        ),
        (
            {**BARE, "state": {0: {"x": torch.zeros(2, dtype=torch.complex128)}}},
            UnrepresentableError,
            "state.0.x is an object of class torch.complex128, which has no form in a state",
        ),
        (
            {**BARE, "state": {0: {"x": np.complex64(1)}}},
            UnrepresentableError,
            "state.0.x is a NumPy scalar of type c8, which has no form in a state",
        ),
        (
            {**BARE, "param_groups": [{"dtype": torch.float32, "params": [0]}]},
            UnrepresentableError,
            "param_groups.0.dtype is the global torch.float32, which has no form in a state",
        ),
        (
            {**BARE, "param_groups": [{"seen": {1}, "params": [0]}]},
            UnrepresentableError,
            "param_groups.0.seen is a value of type set, which has no form in a state",
        ),
    ],
)
def test_what_has_no_form_is_named(tree: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        from_state_dict(read(tree))
    assert str(caught.value) == message


def test_the_place_of_a_nested_state_dict_is_part_of_the_message() -> None:
    tree = {**BARE, "state": {0: {"x": 1j}}}
    with pytest.raises(UnrepresentableError) as caught:
        from_state_dict(Found(("optimizer_states", 0), tree))
    assert str(caught.value) == (
        "optimizer_states.0.state.0.x is a value of type complex, which has no form in a state"
    )


def test_a_scalar_whose_storage_changed_is_refused() -> None:
    buffer = io.BytesIO()
    torch.save({"state": {0: {"step": torch.tensor(1234.5)}}, "param_groups": [{"params": [0]}]}, buffer)
    data = bytearray(buffer.getvalue())
    data[data.index(b"\0\x50\x9a\x44")] ^= 1
    with pytest.raises(FileError) as caught:
        from_state_dict(pickles.load(Memory(data)).value)
    assert str(caught.value) == ("state.0.step does not have the CRC-32 that the container states: the file is damaged")


def test_parameters_in_no_group_cannot_be_written_into_a_state_dict() -> None:
    state = from_state_dict({"state": {0: {"step": 1}}, "param_groups": [{"params": [0]}]})
    named = state.named([Parameter("a", (2,), None)], Naming("names"))
    carried = type(named)(
        optimizers=named.optimizers,
        groups=(type(named.groups[0])(0, (), 0),),
        parameters=named.parameters,
        naming=named.naming,
    )
    with pytest.raises(UnrepresentableError) as caught:
        to_state_dict(carried)
    assert str(caught.value) == (
        "1 parameters are in no group (the first is 'a'): a state dict lists only those of its groups"
    )
