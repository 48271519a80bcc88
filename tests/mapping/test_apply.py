"""Maps of names and axes: each keeps the function that the factors compute, moves every element once, and goes back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_state_format.cli import run
from lora_state_format.errors import ConversionError, FileError, OptionError, StateFormatError, UnrepresentableError
from lora_state_format.format.reading import open_state
from lora_state_format.format.writing import write
from lora_state_format.io.plain import save
from lora_state_format.mapping import apply
from lora_state_format.mapping.algorithms import check_told
from lora_state_format.mapping.maps import MAPS, Map, MapRule, load
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

Array = "np.ndarray[Any, Any]"
ADAM = "torch.optim.adam.Adam"
STEP = Scalar("F32", np.float32(3).tobytes())


def tensor(array: np.ndarray[Any, Any]) -> Tensor:
    kind = {"float32": "F32", "float16": "F16", "int8": "I8"}[array.dtype.name]
    return contiguous(kind, array.shape, Memory(array.tobytes()))


def state_of(arrays: Mapping[str, np.ndarray[Any, Any]], class_path: str | None = ADAM) -> OptimizerState:
    """An Adam state whose ``exp_avg`` are these arrays, and whose ``exp_avg_sq`` their negatives."""
    parameters = tuple(
        Parameter(
            name,
            array.shape,
            {
                "step": STEP,
                "exp_avg": Slot(tensor(array), Role.PARAM),
                "exp_avg_sq": Slot(tensor(-array), Role.PARAM),
            },
        )
        for name, array in arrays.items()
    )
    return OptimizerState(
        (Optimizer(class_path),),
        (Group(0, (), len(parameters)),),
        parameters,
        Naming("checkpoint"),
        origin={"format": "x"},
    )


def moments(state: OptimizerState, slot: str = "exp_avg") -> dict[str, np.ndarray[Any, Any]]:
    return {name: parameter[slot].numpy() for name, parameter in state.items()}


def filled(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(len(shape) + sum(shape)).normal(size=shape).astype(np.float32)


# --- what each library computes, against what PEFT does ------------------------------------------------------------

IN, RANK, HEADS, SIZE, LAYERS = 6, 2, 3, 4, 2
Q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.default.weight"


def peft(arrays: Mapping[str, np.ndarray[Any, Any]], x: np.ndarray[Any, Any], path: str) -> np.ndarray[Any, Any]:
    """What PEFT adds to a layer's output, its scale aside."""
    a, b = (arrays[f"{path}.lora_{factor}.default.weight"] for factor in "AB")
    return np.asarray(x @ a.T @ b.T)


Case = tuple[str, dict[str, np.ndarray[Any, Any]], Callable[[dict[str, Any], Any], Any], str]
A, B = filled(IN, RANK), filled(RANK, HEADS * SIZE)
B3 = B.reshape(RANK, HEADS, SIZE)
PATH = "model.layers.0.self_attn.q_proj"
OURS = f"base_model.model.{PATH}"
FUNCTIONS: dict[str, Case] = {
    # flax.nnx.LoRA: x @ a @ b
    "flax_nnx": (
        "flax_nnx", {f"{PATH}.lora_a": A, f"{PATH}.lora_b": B},
        lambda w, x: x @ w[f"{PATH}.lora_a"] @ w[f"{PATH}.lora_b"], OURS,
    ),
    "flax_nnx_linear": (
        "flax_nnx_linear", {f"{PATH}.lora.lora_a": A, f"{PATH}.lora.lora_b": B},
        lambda w, x: x @ w[f"{PATH}.lora.lora_a"] @ w[f"{PATH}.lora.lora_b"], OURS,
    ),
    # qwix on a Dense, and on an attention's einsum: the ranks contract, the heads stay
    "qwix": (
        "qwix", {f"{PATH}.kernel_lora_a": A, f"{PATH}.kernel_lora_b": B},
        lambda w, x: x @ w[f"{PATH}.kernel_lora_a"] @ w[f"{PATH}.kernel_lora_b"], OURS,
    ),
    "tunix, q": (
        "tunix", {"layers.0.attn.q_proj.w_lora_a": A, "layers.0.attn.q_proj.w_lora_b": B3},
        lambda w, x: np.einsum(
            "td,dr,rnh->tnh", x, w["layers.0.attn.q_proj.w_lora_a"], w["layers.0.attn.q_proj.w_lora_b"]
        ).reshape(len(x), -1),
        OURS,
    ),
    "tunix, o": (
        "tunix",
        {
            "layers.0.attn.o_proj.w_lora_a": filled(HEADS, SIZE // 2, RANK),
            "layers.0.attn.o_proj.w_lora_b": filled(RANK, IN),
        },
        lambda w, x: np.einsum(
            "tnh,nhr,rd->td", x.reshape(len(x), HEADS, SIZE // 2), w["layers.0.attn.o_proj.w_lora_a"],
            w["layers.0.attn.o_proj.w_lora_b"],
        ),
        "base_model.model.model.layers.0.self_attn.o_proj",
    ),
    "tunix, mlp": (
        "tunix", {"layers.0.mlp.up_proj.kernel_lora_a": A, "layers.0.mlp.up_proj.kernel_lora_b": B},
        lambda w, x: x @ w["layers.0.mlp.up_proj.kernel_lora_a"] @ w["layers.0.mlp.up_proj.kernel_lora_b"],
        "base_model.model.model.layers.0.mlp.up_proj",
    ),
    "gemma": (
        "gemma", {f"{PATH}.lora.a": A, f"{PATH}.lora.b": B3},
        lambda w, x: np.einsum("td,dr,rnh->tnh", x, w[f"{PATH}.lora.a"], w[f"{PATH}.lora.b"]).reshape(len(x), -1), OURS,
    ),
    # lorax: the kernel [in, out] gets b @ a, so its b is PEFT's A
    "lorax": (
        "lorax", {f"{PATH}.kernel.a": filled(RANK, 5), f"{PATH}.kernel.b": filled(IN, RANK)},
        lambda w, x: x @ (w[f"{PATH}.kernel.b"] @ w[f"{PATH}.kernel.a"]), OURS,
    ),
    "mlx_lm": (
        "mlx_lm", {f"{PATH}.lora_a": A, f"{PATH}.lora_b": B},
        lambda w, x: x @ w[f"{PATH}.lora_a"] @ w[f"{PATH}.lora_b"], OURS,
    ),
    "paddlenlp": (
        "paddlenlp", {f"{PATH}.lora_A": A, f"{PATH}.lora_B": B},
        lambda w, x: x @ w[f"{PATH}.lora_A"] @ w[f"{PATH}.lora_B"], OURS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FUNCTIONS)
def test_the_function_is_the_same_and_the_way_back_is_exact(tmp_path: Path, case: str) -> None:
    name, arrays, function, path = FUNCTIONS[case]
    state = state_of(arrays)
    ours = apply.apply(state, load(name))
    x = filled(7, IN)
    np.testing.assert_allclose(peft(moments(ours), x, path), function(arrays, x), rtol=1e-4, atol=1e-5)
    assert ours.naming.details == {"map": name, "order": "modules"}
    assert ours[f"{path}.lora_A.default.weight"].foreign_names == {"peft": f"{path}.lora_A.weight"}
    assert ours[f"{path}.lora_A.default.weight"].adapter == "default"
    write(ours, tmp_path / "state.safetensors")
    with open_state(tmp_path / "state.safetensors") as reopened:
        back = apply.invert(reopened, load(name))
        assert set(back) == set(arrays)
        for slot, sign in (("exp_avg", 1), ("exp_avg_sq", -1)):
            for key, array in moments(back, slot).items():
                assert np.array_equal(array, sign * arrays[key])
                assert back[key]["step"] == STEP


def test_layers_that_were_stacked_are_taken_apart() -> None:
    """Along axis 0 in Levanter, along axis 1 in MaxText; a layer's factors compute what its slices do."""
    a, b = filled(LAYERS, RANK, IN), filled(LAYERS, HEADS * SIZE, RANK)
    names = [f"transformer.layers.stacked.self_attn.q_proj.lora.lora_{factor}.weight" for factor in "AB"]
    levanter = state_of(dict(zip(names, (a, b), strict=True)))
    ours = apply.apply(levanter, load("levanter"))
    assert list(ours) == [Q.format(layer, factor) for layer in range(LAYERS) for factor in "AB"]
    for layer in range(LAYERS):
        assert np.array_equal(ours[Q.format(layer, "A")]["exp_avg"].numpy(), a[layer])
        assert np.array_equal(ours[Q.format(layer, "B")]["exp_avg_sq"].numpy(), -b[layer])
    back = apply.invert(ours, load("levanter"))
    assert [array.tolist() for array in moments(back).values()] == [a.tolist(), b.tolist()]
    assert ours.groups[0].count == 4
    assert back.groups[0].count == 2

    value = "decoder.layers.self_attention.value.kernel_lora_"
    out = "decoder.layers.self_attention.out.kernel_lora_"
    arrays = {
        f"{value}a": filled(IN, LAYERS, RANK), f"{value}b": filled(RANK, LAYERS, HEADS, SIZE),
        f"{out}a": filled(HEADS, LAYERS, SIZE, RANK), f"{out}b": filled(RANK, LAYERS, IN),
    }  # fmt: skip
    ours = apply.apply(state_of(arrays), load("maxtext"))
    for layer in range(LAYERS):
        path = f"base_model.model.model.layers.{layer}.self_attn"
        x = filled(5, IN)
        slices = arrays[f"{value}a"][:, layer], arrays[f"{value}b"][:, layer]
        expected = np.einsum("td,dr,rnh->tnh", x, *slices).reshape(5, -1)
        np.testing.assert_allclose(peft(moments(ours), x, f"{path}.v_proj"), expected, rtol=1e-4, atol=1e-5)
        x = filled(5, HEADS * SIZE)
        slices = arrays[f"{out}a"][:, layer], arrays[f"{out}b"][:, layer]
        expected = np.einsum("tnh,nhr,rd->td", x.reshape(5, HEADS, SIZE), *slices)
        np.testing.assert_allclose(peft(moments(ours), x, f"{path}.o_proj"), expected, rtol=1e-4, atol=1e-5)
    back = apply.invert(ours, load("maxtext"))
    assert {name: array.tolist() for name, array in moments(back).items()} == {k: v.tolist() for k, v in arrays.items()}


def test_a_model_of_linen() -> None:
    arrays = {
        "encoder.dense.kernel": filled(3, 5), "encoder.dense.bias": filled(5), "conv.kernel": filled(2, 3, 4, 5),
        "norm.scale": filled(5), "embed.embedding": filled(7, 3),
    }  # fmt: skip
    ours = apply.apply(state_of(arrays), load("flax_linen"))
    assert {name: parameter.shape for name, parameter in ours.items()} == {
        "encoder.dense.weight": (5, 3), "encoder.dense.bias": (5,), "conv.weight": (5, 4, 2, 3), "norm.weight": (5,),
        "embed.weight": (7, 3),
    }  # fmt: skip
    assert np.array_equal(ours["conv.weight"]["exp_avg"].numpy(), arrays["conv.kernel"].transpose(3, 2, 0, 1))
    assert ours.naming.details["order"] == "unknown"
    del arrays["embed.embedding"]
    back = apply.invert(apply.apply(state_of(arrays), load("flax_linen")), load("flax_linen"))
    assert {name: array.tolist() for name, array in moments(back).items()} == {k: v.tolist() for k, v in arrays.items()}


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore")
def test_linen_computes_what_torch_does() -> None:
    """Dense, Conv, LayerNorm and Embed of flax, their parameters moved to torch's modules."""
    import flax.linen as linen
    import jax
    import torch

    from lora_state_format.foreign.optax_nodes import leaves

    x, picture, words = filled(2, 3), filled(1, 5, 5, 2), np.array([1, 3])
    cases: list[tuple[Any, torch.nn.Module, np.ndarray[Any, Any]]] = [
        (linen.Dense(4), torch.nn.Linear(3, 4), x),
        (linen.Conv(4, (3, 2), padding="VALID"), torch.nn.Conv2d(2, 4, (3, 2)), picture),
        (linen.LayerNorm(epsilon=1e-5), torch.nn.LayerNorm(3), x),
        (linen.Embed(5, 3), torch.nn.Embedding(5, 3), words),
    ]
    for number, (theirs, ours, fed) in enumerate(cases):
        params = jax.tree.map(np.asarray, theirs.init(jax.random.key(number), fed)["params"])
        moved = apply.apply(
            state_of({".".join(("module", *keys)): np.asarray(leaf) for keys, leaf in leaves(params)}),
            load("flax_linen"),
        )
        weights = {name.removeprefix("module."): torch.from_numpy(array) for name, array in moments(moved).items()}
        ours.load_state_dict(weights)
        with torch.no_grad():
            found = ours(torch.from_numpy(fed.transpose(0, 3, 1, 2).copy() if fed.ndim == 4 else fed)).numpy()
        expected = np.asarray(theirs.apply({"params": params}, fed))
        found = found.transpose(0, 2, 3, 1) if fed.ndim == 4 else found
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_and_columns_change_places() -> None:
    rows, cols = filled(IN), filled(RANK)
    slots: dict[str, Value] = {
        "exp_avg_sq_row": Slot(tensor(rows), Role.ROW),
        "exp_avg_sq_col": Slot(tensor(cols), Role.COL),
        "step": 3,
    }
    torch_like = {"row_var": Slot(tensor(rows[:, None]), Role.ROW), "col_var": Slot(tensor(cols[None]), Role.COL)}
    base = state_of({})
    state = replace(
        base,
        groups=(Group(0, (), 2),),
        parameters=(Parameter("q.lora_a", (IN, RANK), slots), Parameter("k.lora_a", (IN, RANK), torch_like)),
    )
    ours = apply.apply(state, load("flax_nnx"))
    q, k = (ours[f"base_model.model.{name}.lora_A.default.weight"] for name in "qk")
    assert np.array_equal(q["exp_avg_sq_row"].numpy(), cols)
    assert np.array_equal(q["exp_avg_sq_col"].numpy(), rows)
    assert {path[0]: slot.role for path, slot in q.tensors()} == {
        "exp_avg_sq_row": Role.ROW,
        "exp_avg_sq_col": Role.COL,
    }
    assert k["row_var"].shape == (RANK, 1)
    assert np.array_equal(k["col_var"].numpy(), rows[None])
    back = apply.invert(ours, load("flax_nnx"))
    assert np.array_equal(back["q.lora_a"]["exp_avg_sq_row"].numpy(), rows)
    assert back["k.lora_a"]["row_var"].shape == (IN, 1)


def test_slots_in_dicts_move_too() -> None:
    base = state_of({"q.lora_a": A})
    inner: dict[str, Value] = {"state1": Slot(tensor(A), Role.PARAM), "step": 3}
    state = replace(base, parameters=(Parameter("q.lora_a", A.shape, {"quantised": inner}),))
    moved = apply.apply(state, load("flax_nnx")).parameters[0]
    assert moved.state is not None
    assert np.array_equal(moved["quantised"]["state1"].tensor.numpy(), A.T)


REFUSED: dict[str, tuple[OptimizerState, str, type[StateFormatError], str]] = {
    "a name without a rule": (
        state_of({"q.kernel": A}), "flax_nnx", ConversionError, "'q.kernel' has no rule in map 'flax_nnx'",
    ),
    "experts": (
        state_of({"q.lora_a": filled(2, 3, 4)}), "mlx_lm", ConversionError,
        "'q.lora_a' has 3 axes, which no rule of map 'mlx_lm' for its name has",
    ),
    "a shared factor": (
        state_of({"layers.0.attn.kv_einsum.w_lora_a": A}), "tunix", ConversionError,
        ("'layers.0.attn.kv_einsum.w_lora_a' does not convert (map 'tunix'): keys and values share this lora_a, so "
        "its moments are those of two matrices of PEFT at once"),
    ),
    "a scaled factor": (
        state_of({"decoder.layers.self_attention.query.kernel_lora_b": filled(2, 2, 3)}), "maxtext", ConversionError,
        ("'decoder.layers.self_attention.query.kernel_lora_b' does not convert (map 'maxtext'): it is scaled by the "
        "root of the head's size, and its moments with it, which is not a permutation"),
    ),
    "interleaved outputs": (
        state_of({"decoder.layers.self_attention.key.kernel_lora_b": filled(2, 2, 3)}), "maxtext", ConversionError,
        ("'decoder.layers.self_attention.key.kernel_lora_b' does not convert (map 'maxtext'): its outputs are "
        "interleaved for rotary embeddings, which no rule here undoes"),
    ),
    "whole tensors": (
        state_of(
            {"decoder.layers.mlp.wo.kernel_lora_a": filled(2, 2, 3)}, "transformers.optimization.Adafactor"
        ),
        "maxtext", ConversionError,
        ("'decoder.layers.mlp.wo.kernel_lora_a' holds stacked layers, and transformers.optimization.Adafactor "
        "updates whole tensors, or may do so: taken apart, the layers would be updated differently"),
    ),
    "an unknown rule": (
        state_of({"decoder.layers.mlp.wo.kernel_lora_a": filled(2, 2, 3)}, None), "maxtext", ConversionError,
        ("'decoder.layers.mlp.wo.kernel_lora_a' holds stacked layers, and its optimizer updates whole "
        "tensors, or may do so: taken apart, the layers would be updated differently"),
    ),
    "an opaque slot": (
        replace(state_of({}), groups=(Group(0, (), 1),), parameters=(
            Parameter("q.lora_a", A.shape, {"GG": Slot(tensor(A))}),)), "flax_nnx", UnrepresentableError,
        "'q.lora_a' has a slot 'GG' of role opaque, which cannot be permuted with it",
    ),
    "rows of a stack": (
        replace(state_of({}), groups=(Group(0, (), 1),), parameters=(Parameter(
            "decoder.layers.mlp.wo.kernel_lora_a", (2, 2, 3), {"row": Slot(tensor(A), Role.ROW)}),)),
        "maxtext", UnrepresentableError,
        "'decoder.layers.mlp.wo.kernel_lora_a' has a slot 'row' of role row, which cannot be permuted with it",
    ),
    "a list of tensors": (
        replace(state_of({}), groups=(Group(0, (), 1),), parameters=(
            Parameter("q.lora_a", A.shape, {"GG": [Slot(tensor(A))]}),)), "flax_nnx", UnrepresentableError,
        "'q.lora_a' has a list of tensors in 'GG', which no map moves",
    ),
    "in no group": (
        replace(state_of({"q.lora_a": A}), groups=(Group(0, (), 0),)), "flax_nnx", ConversionError,
        "'q.lora_a' has state and is in no group, so no map says where to put it",
    ),
    "one name for two": (
        state_of({"a.embed_tokens.lora_a": A, "b.lora_a": A}), "twice", ConversionError,
        "map 'twice' gives two parameters the name 'w'",
    ),
}  # fmt: skip


TWICE = Map("twice", "", (MapRule("{path}.lora_a", "w"),))


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together(case: str) -> None:
    state, name, kind, message = REFUSED[case]
    with pytest.raises(kind) as caught:
        apply.apply(state, TWICE if name == "twice" else load(name))
    assert str(caught.value) == message


def test_what_does_not_go_back() -> None:
    ours = state_of({Q.format(layer, "A"): filled(RANK, IN) for layer in range(3)})
    two = replace(ours, parameters=(ours.parameters[0], ours.parameters[2]), groups=(Group(0, (), 2),))
    other = state_of({"base_model.model.w.lora_A.one.weight": A, "base_model.model.w.lora_A.two.weight": A})
    steps = replace(
        ours,
        parameters=(
            *ours.parameters[:2],
            replace(ours.parameters[2], state={**(ours.parameters[2].state or {}), "step": 4}),
        ),
    )
    slots = replace(ours, parameters=(*ours.parameters[:2], replace(ours.parameters[2], state={"step": STEP})))
    fresh = replace(ours, parameters=(replace(ours.parameters[0], state=None), *ours.parameters[1:]))
    stack = "transformer.layers.stacked.self_attn.q_proj.lora.lora_A.weight"
    for state, name, message in (
        (ours, "paddle", "'paddle' is neither a map nor a file; the maps are: "),
        (two, "levanter", f"'{stack}' is a stack of layers, of which only [0, 2] are there"),
        (steps, "levanter", f"'{stack}' is a stack of layers that differ in 'step'"),
        (slots, "levanter", f"'{stack}' is a stack of layers that differ in 'exp_avg'"),
        (fresh, "levanter", f"'{stack}' is a stack of layers that do not have the same slots"),
        (
            other, "flax_nnx",
            "'base_model.model.w.lora_A.one.weight' and 'base_model.model.w.lora_A.two.weight' are both 'w.lora_a'",
        ),
        (
            ours, "tunix",
            f"'{Q.format(0, 'A')}' has axes to split for map 'tunix', and only a state that was read with it says how",
        ),
        (
            replace(state_of({Q.format(0, "B"): B.T.copy()}), origin={"map": "maxtext"}), "maxtext",
            ("'decoder.layers.self_attention.query.kernel_lora_b' does not convert (map 'maxtext'): it is scaled by "
            "the root of the head's size, and its moments with it, which is not a permutation"),
        ),
    ):  # fmt: skip
        with pytest.raises(StateFormatError) as caught:
            apply.invert(state, load(name))
        assert str(caught.value).startswith(message)
    never = replace(ours, parameters=tuple(replace(p, state=None, dtype="F32") for p in ours.parameters))
    assert apply.invert(never, load("levanter"))[stack].state is None


def test_rules_that_do_not_lead_back_are_found() -> None:
    crossed = Map("crossed", "", (MapRule("w", "v"), MapRule("{path}", "{path}", axes=(1, 0))))
    with pytest.raises(ConversionError) as caught:
        apply.invert(state_of({"w": A}), crossed)
    assert str(caught.value) == "'w' would become 'w', for which map 'crossed' has another rule"


# --- a user's own map ---------------------------------------------------------------------------------------------

OWN = {
    "name": "ours",
    "summary": "a model of ours",
    "rules": [
        {
            "foreign": "blocks.{layer}.{name}.down",
            "ours": "base_model.model.h.{layer}.{name}.lora_A.{adapter}.weight",
            "axes": [1, 0],
        },
        {
            "foreign": "stack.{name}.down", "ours": "base_model.model.s.{layer}.{name}.weight",
            "unstack": 1, "axes": [1, 0],
        },
        {"foreign": "gate.{path}", "refuse": "gates are not adapters"},
        {"foreign": "{path}", "ours": "{path}"},
    ],
}  # fmt: skip


def test_a_map_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(OWN))
    own = load(path)
    arrays = {"blocks.3.fc.down": filled(4, 2), "stack.fc.down": filled(4, 3, 2), "norm": filled(5)}
    ours = apply.apply(state_of(arrays), own)
    assert {name: parameter.shape for name, parameter in ours.items()} == {
        "base_model.model.h.3.fc.lora_A.default.weight": (2, 4),
        **{f"base_model.model.s.{layer}.fc.weight": (2, 4) for layer in range(3)},
        "norm": (5,),
    }
    back = apply.invert(ours, own)
    assert {name: array.tolist() for name, array in moments(back).items()} == {k: v.tolist() for k, v in arrays.items()}
    with pytest.raises(ConversionError, match=r"^'gate\.x' does not convert \(map 'ours'\): gates are not adapters$"):
        apply.apply(state_of({"gate.x": A}), own)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "list indices must be integers or slices, not str"),
        ("{}", "'rules'"),
        ('{"name": "x", "rules": [{"foreign": "a", "turn": 1}]}', "a rule has the unknown member 'turn'"),
        ('{"name": "x", "rules": [{"foreign": "{a}", "ours": "{b}"}]}', "'{a}' and '{b}' do not have the same fields"),
        (
            '{"name": "x", "rules": [{"foreign": "a", "ours": "a", "axes": [1]}]}',
            "the rule of 'a' has an unknown merge, or axes that are not a permutation",
        ),
        (
            '{"name": "x", "rules": [{"foreign": "a", "ours": "a", "merge": "all"}]}',
            "the rule of 'a' has an unknown merge, or axes that are not a permutation",
        ),
    ],
)  # fmt: skip
def test_files_that_hold_no_map(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "map.json"
    path.write_text(text)
    with pytest.raises(FileError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: not a map of names and layouts: {message}"
    path.write_text("{")
    with pytest.raises(FileError, match=r"map\.json: not JSON: Expecting property name"):
        load(path)


def test_maps_are_listed_where_there_is_none() -> None:
    with pytest.raises(OptionError) as caught:
        load("nosuch")
    names = ", ".join(known.name for known in MAPS)
    assert str(caught.value) == f"'nosuch' is neither a map nor a file; the maps are: {names}"


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of MLX through a map of one's own, and back."""
    (tmp_path / "own.json").write_text(json.dumps(OWN))
    tensors = {"blocks.0.fc.down.m": tensor(A), "blocks.0.fc.down.v": tensor(A)}
    tensors |= {"step": contiguous("U64", (), Memory((3).to_bytes(8, "little")))}
    tensors |= {"learning_rate": contiguous("F32", (), Memory(np.float32(0.1).tobytes()))}
    source, named, back = (tmp_path / f"{name}.safetensors" for name in ("optimizer", "named", "back"))
    save(tensors, source)
    own = ["--map", str(tmp_path / "own.json")]
    told = ["--optimizer", "adam", "--option", "bias_correction=True", *own]
    assert run(["inspect", str(source), "--parameters", *told]) == 0
    assert "base_model.model.h.0.fc.lora_A.default.weight" in capsys.readouterr().out
    assert run(["convert", str(source), str(named), *told]) == 0
    assert run(["convert", str(named), str(back), "--to", "mlx", *own]) == 0
    assert back.read_bytes() == source.read_bytes()
    capsys.readouterr()
    assert run(["inspect", str(named), "--map", "gpt_neox"]) == 4
    assert capsys.readouterr().err == (
        "error: 'base_model.model.h.0.fc.lora_A.default.weight' has no rule in map 'gpt_neox'\n"
    )


def test_fused_matrices_are_cut_where_the_class_updates_single_elements() -> None:
    arrays = {"transformer.blocks.0.att_proj.weight": filled(8, 4), "transformer.wte.weight": filled(5, 4)}
    layout = load("olmo")
    moved = moments(apply.apply(state_of(arrays, None), layout))
    whole = arrays["transformer.blocks.0.att_proj.weight"]
    for part, rows in {"q": whole[:4], "k": whole[4:6], "v": whole[6:]}.items():
        assert np.array_equal(moved[f"model.layers.0.self_attn.{part}_proj.weight"], rows)
    with pytest.raises(ConversionError) as muon:
        apply.apply(state_of(arrays, "torch.optim.Muon"), layout)
    assert str(muon.value) == (
        "'transformer.blocks.0.att_proj.weight' holds 3 matrices, and torch.optim.Muon updates whole tensors, or may "
        "do so: taken apart, they would be updated differently"
    )
    with pytest.raises(ConversionError) as shape:
        apply.apply(state_of({"transformer.blocks.0.att_proj.weight": filled(7, 4)}), layout)
    assert str(shape.value) == (
        "'transformer.blocks.0.att_proj.weight' of shape [7, 4] is not 3 matrices, one below the other"
    )
    with pytest.raises(ConversionError) as back:
        apply.invert(apply.apply(state_of(arrays), layout), layout)
    assert " has no rule in map 'olmo' for the way back" in str(back.value)


def test_an_order_that_is_not_torchs_gives_no_positions(tmp_path: Path) -> None:
    from lora_state_format.foreign.state_dict import to_state_dict

    state = replace(state_of({"b.kernel": A}), naming=Naming("checkpoint", details={"order": "unknown"}))
    known = apply.apply(replace(state_of({f"{PATH}.lora_a": A}), naming=state.naming), load("flax_nnx"))
    assert to_state_dict(known)["param_groups"] == [{"params": [0]}]
    unknown = apply.apply(replace(state_of({"b.kernel": A, "a.kernel": A})), load("flax_linen"))
    for case in (state, unknown):
        with pytest.raises(UnrepresentableError) as caught:
            to_state_dict(case)
        assert str(caught.value) == (
            "the parameters stand in the order of a file of format 'x', and positions would have to be those of a "
            "torch optimizer: load the state by name"
        )


# --- properties ---------------------------------------------------------------------------------------------------

SIZES = st.integers(1, 4)


@given(
    shape=st.lists(SIZES, min_size=2, max_size=5), merge=st.sampled_from([None, "leading", "trailing"]), data=st.data()
)
def test_every_rule_moves_every_element_once_and_back(shape: list[int], merge: str | None, data: st.DataObject) -> None:
    unstack = data.draw(st.one_of(st.none(), st.integers(0, len(shape) - 1))) if len(shape) > 2 else None
    count = 2 if merge else len(shape) - (unstack is not None)
    axes = tuple(data.draw(st.permutations(range(count))))
    layer = "{layer}." if unstack is not None else ""
    layout = Map("drawn", "", (MapRule("{path}.w", f"{{path}}.{layer}v", unstack, merge, axes),))
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    ours = apply.apply(state_of({"a.w": array}), layout)
    expected: list[Any] = [array]
    if unstack is not None:
        expected = [array.take(index, unstack) for index in range(shape[unstack])]
    if merge == "leading":
        expected = [part.reshape(-1, part.shape[-1]) for part in expected]
    if merge == "trailing":
        expected = [part.reshape(part.shape[0], -1) for part in expected]
    found = sorted(moments(ours).items())
    assert [array.tolist() for _, array in found] == [part.transpose(axes).tolist() for part in expected]
    back = apply.invert(ours, layout)
    assert np.array_equal(back["a.w"]["exp_avg"].numpy(), array)


@pytest.mark.parametrize(
    ("shape", "chunk"), [((40, 50), 64), ((40, 50), 100), ((3, 700), 64), ((700, 3), 1000), ((7, 9), 4096)]
)
def test_what_is_far_apart_is_gathered_in_blocks(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], chunk: int
) -> None:
    """A transpose reads its source a block at a time, whatever the chunks."""
    monkeypatch.setattr("lora_state_format.model.tensors.GATHER_SPAN", 1000)
    whole = filled(*shape)
    turned = tensor(whole).permute((1, 0))
    assert b"".join(map(bytes, turned.chunks(memoryview(bytearray(chunk))))) == whole.T.tobytes()
    assert b"".join(map(bytes, turned.chunks())) == whole.T.tobytes()


def test_weights_follow_their_parameters() -> None:
    weights = {"layers.0.attn.q_proj.w_lora_a": tensor(A), "layers.0.attn.q_proj.w": tensor(A), "stacked": tensor(A)}
    found = apply.apply_to_weights(weights, load("tunix"))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert list(found) == [key]
    assert np.array_equal(found[key].numpy(), A.T)


def test_a_told_value_may_be_what_float32_holds_of_it_or_not_a_number() -> None:
    for told, held in (
        (0.1, 0.10000000149011612),
        (1, 1.0),
        (math.nan, float("nan")),
        ((0.1, math.nan), (0.1, math.nan)),
    ):
        check_told("lr", told, held, "x")
    for told, held in ((0.1, 0.2), (math.nan, 0.1), (0.1, math.nan)):
        with pytest.raises(OptionError) as caught:
            check_told("lr", told, held, "x")
        assert str(caught.value) == f"x holds lr={held!r}, not {told!r}"
