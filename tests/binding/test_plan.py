"""Plans: every problem is named at once, with its cause and a way out, before anything is read."""

from __future__ import annotations

import ast
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from lora_state_format.binding import plan as planning
from lora_state_format.binding.live import Layer, LiveGroup, LiveOptimizer, LiveParameter
from lora_state_format.binding.plan import LoadPlan
from lora_state_format.binding.policies import Policies
from lora_state_format.errors import BindError, OptionError
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
from lora_state_format.optimizers.options import OPTIONS, Kind, kind_of

ADAMW = "torch.optim.adamw.AdamW"
PREFIX = "base_model.model.model.layers.0.self_attn."
MATH: dict[str, Value] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "foreach": None}


def plan(saved: OptimizerState, found: LiveOptimizer, **policies: Any) -> LoadPlan:
    """A plan under policies that are given one by one."""
    return planning.plan(saved, found, Policies(**policies))


def slot(shape: tuple[int, ...], dtype: str = "F32", role: Role = Role.PARAM) -> Slot:
    return Slot(contiguous(dtype, shape, Memory(b"")), role)


def adam(shape: tuple[int, ...], dtype: str = "F32") -> dict[str, Value]:
    step = Scalar("F32", struct.pack("<f", 3))
    return {"step": step, "exp_avg": slot(shape, dtype), "exp_avg_sq": slot(shape, dtype)}


def parameter(name: str, shape: tuple[int, ...] = (2, 3), **changes: Any) -> Parameter:
    return replace(Parameter(name, shape, adam(shape), dtype="F32"), **changes)


def state(*groups: Sequence[Parameter], options: Sequence[Mapping[str, Value]] = (), **changes: Any) -> OptimizerState:
    """One AdamW with these groups; all have the same options unless given."""
    made = OptimizerState(
        optimizers=(Optimizer(ADAMW),),
        groups=tuple(
            Group(0, tuple((options[n] if options else MATH).items()), len(group)) for n, group in enumerate(groups)
        ),
        parameters=tuple(p for group in groups for p in group),
        naming=Naming("model"),
    )
    return replace(made, **changes)


def live(
    *groups: Sequence[str],
    options: Sequence[Mapping[str, Value]] = (),
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    dtype: str = "F32",
    frozen: Sequence[str] = (),
    outside: Sequence[str] = (),
    tied: Mapping[str, tuple[str, ...]] | None = None,
    class_path: str = ADAMW,
    names: Sequence[str | None] = (),
) -> LiveOptimizer:
    """An optimizer over these names; ``frozen`` and ``outside`` are further names of the model."""
    listed = [name for group in groups for name in group]
    every = dict.fromkeys([*listed, *frozen, *outside])
    return LiveOptimizer(
        optimizers=(Optimizer(class_path),),
        groups=tuple(
            LiveGroup(0, tuple((options[n] if options else MATH).items()), tuple(group), names[n] if names else None)
            for n, group in enumerate(groups)
        ),
        parameters={
            name: LiveParameter(
                name,
                shape := (shapes or {}).get(name, (2, 3)),
                dtype,
                name not in frozen,
                (tied or {}).get(name, ()),
                layer=lora_layer(name, shape),
            )
            for name in every
        },
        lineages=((class_path,),),
    )


def lora_layer(name: str, shape: tuple[int, ...]) -> Layer | None:
    """What PEFT's layers say of a factor's rank."""
    if ".lora_A" in name:
        return Layer(fold=(-1, *shape[1:]))
    return Layer(fold=(shape[0], -1)) if ".lora_B" in name else None


def refused(made: LoadPlan) -> str:
    """The whole report of a plan that does not fit, as the error carries it."""
    with pytest.raises(BindError) as caught:
        made.check()
    assert caught.value.plan is made
    assert caught.value.exit_code == 1
    return str(caught.value)


# --- names ----------------------------------------------------------------------------------------------------------


def test_names_bind_in_any_order_and_grouping() -> None:
    made = plan(state([parameter("a"), parameter("b")], [parameter("c")]), live(["c", "a", "b"]))
    made.check()
    assert [(b.name, b.saved.name if b.saved else None) for b in made.bindings] == [("c", "c"), ("a", "a"), ("b", "b")]
    assert str(made) == "fits: 3/3 parameters would be restored"


def test_a_missing_parameter() -> None:
    assert refused(plan(state([parameter("a")]), live(["a", "b"]))) == (
        "optimizer state does not fit: 1 parameter saved, 2 in the optimizer\n"
        "  in the optimizer, not in the file (1):\n"
        "    b  [2, 3]\n"
        "hint: missing='fresh' lets the parameters that are not in the file start without state"
    )
    made = plan(state([parameter("a")]), live(["a", "b"]), missing="fresh")
    made.check()
    assert [binding.saved is None for binding in made.bindings] == [False, True]
    assert str(made) == "fits: 1/2 parameters would be restored"


def test_an_optimizer_over_all_parameters() -> None:
    adapters = [f"{PREFIX}q_proj.lora_{ab}.default.weight" for ab in "AB"]
    base = [f"{PREFIX}{name}.base_layer.weight" for name in "abcdefghijklm"]
    saved = state([parameter(name) for name in adapters])
    found = live([*adapters, *base])
    found = replace(found, parameters={n: replace(p, requires_grad=n in adapters) for n, p in found.parameters.items()})
    listed = "".join(f"    {name}  [2, 3]  (requires_grad=False)\n" for name in base[:10])
    assert refused(plan(saved, found)) == (
        "optimizer state does not fit: 2 parameters saved, 15 in the optimizer\n"
        "  in the optimizer, not in the file (13):\n"
        f"{listed}"
        "    ... and 3 more\n"
        "hint: the optimizer was built over 15 parameters and holds 13 frozen parameters, which the saved one did not; "
        "build it from [p for p in model.parameters() if p.requires_grad]"
    )


def test_unexpected_parameters_with_their_causes() -> None:
    saved = state([parameter("a"), parameter("frozen"), parameter("outside"), parameter("gone")])
    found = live(["a"], frozen=["frozen"], outside=["outside"])
    assert refused(plan(saved, found)) == (
        "optimizer state does not fit: 4 parameters saved, 1 in the optimizer\n"
        "  in the file, not in the optimizer (3):\n"
        "    frozen  [2, 3]  (in the model, requires_grad=False)\n"
        "    outside  [2, 3]  (in the model, but not in the optimizer)\n"
        "    gone  [2, 3]\n"
        "hint: 1 saved parameter is frozen in this model: call requires_grad_(True) before the optimizer is built\n"
        "hint: unexpected='carry' keeps their state for the next save\n"
        "hint: unexpected='ignore' drops it"
    )
    ignored = plan(saved, found, unexpected="ignore")
    carried = plan(saved, found, unexpected="carry")
    names = ["frozen", "outside", "gone"]
    assert ([p.name for p in ignored.ignored], ignored.carried) == (names, ())
    assert ([p.name for p in carried.carried], carried.ignored) == (names, ())
    assert str(carried) == "fits: 1/1 parameters would be restored, 3 carried"
    assert str(ignored) == "fits: 1/1 parameters would be restored, 3 ignored"


def test_a_parameter_that_never_stepped_is_restored_to_that_and_never_unexpected() -> None:
    made = plan(state([parameter("a", state=None), parameter("b", state=None), parameter("c", state={})]), live(["a"]))
    made.check()
    assert made.bindings[0].saved is not None
    assert made.bindings[0].saved.state is None
    assert made.ignored == ()


def test_other_targets_are_refused_although_every_shape_fits() -> None:
    def names(*modules: str) -> list[str]:
        return [f"{PREFIX}{module}.lora_{ab}.default.weight" for module in modules for ab in "AB"]

    saved = state([parameter(name) for name in names("q_proj", "v_proj")])
    assert refused(plan(saved, live(names("q_proj", "o_proj")))) == (
        "optimizer state does not fit: 4 parameters saved, 4 in the optimizer\n"
        "  in the file, not in the optimizer (2):\n"
        f"    {PREFIX}v_proj.lora_A.default.weight  [2, 3]\n"
        f"    {PREFIX}v_proj.lora_B.default.weight  [2, 3]\n"
        "  in the optimizer, not in the file (2):\n"
        f"    {PREFIX}o_proj.lora_A.default.weight  [2, 3]\n"
        f"    {PREFIX}o_proj.lora_B.default.weight  [2, 3]\n"
        "hint: unexpected='carry' keeps their state for the next save\n"
        "hint: unexpected='ignore' drops it\n"
        "hint: missing='fresh' lets the parameters that are not in the file start without state"
    )


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("model.layers.{}.w", "base_model.model.model.layers.{}.w", "('^', 'base_model.model.')"),
        ("base.model.layers.{}.w", "model.layers.{}.w", r"('^base\\.', '')"),
        ("m.layers.{}.mlp.w", "m.layers.{}.ffn.w", r"('(?<=\\.)mlp(?=\\.|$)', 'ffn')"),
        ("m.{}.lora.a.w", "m.{}.lora.w", r"('(?<=\\.)lora\\.a(?=\\.|$)', 'lora')"),
        ("m.{}.w", "m.{}.base_layer.w", ""),
    ],
)
def test_a_rename_is_suggested_only_where_it_maps_everything(old: str, new: str, rule: str) -> None:
    saved = state([parameter(old.format(layer), (layer + 1, 2)) for layer in range(3)])
    shapes = {new.format(layer): (layer + 1, 2) for layer in range(3)}
    report = refused(plan(saved, live(list(shapes), shapes=shapes)))
    hint = f"hint: if these are the same parameters under other names, pass rename=[{rule}]"
    assert (hint in report) is bool(rule)
    if rule:
        plan(saved, live(list(shapes), shapes=shapes), rename=[ast.literal_eval(rule)]).check()
    shapes[new.format(2)] = (9, 9)
    assert "rename=" not in refused(plan(saved, live(list(shapes), shapes=shapes)))


def test_the_callers_rule_decides_before_equal_names() -> None:
    made = plan(state([parameter("a"), parameter("b")]), live(["a", "b"]), rename={"a": "b", "b": "a"})
    made.check()
    assert [b.saved.name for b in made.bindings if b.saved] == ["b", "a"]


def test_wrapper_segments_do_not_keep_names_apart() -> None:
    saved = state([parameter("module.layers.0._orig_mod.w"), parameter("module.layers.1._orig_mod.w")])
    plan(saved, live(["layers.0.w", "layers.1.w"])).check()


def test_two_saved_names_that_would_become_one() -> None:
    saved = state([parameter("a._orig_mod.w"), parameter("_orig_mod.a.w")])
    assert refused(plan(saved, live(["a.w"]))) == (
        "optimizer state does not fit: 2 parameters saved, 1 in the optimizer\n"
        "  in the file, not in the optimizer (2):\n"
        "    a._orig_mod.w  [2, 3]\n"
        "    _orig_mod.a.w  [2, 3]\n"
        "  in the optimizer, not in the file (1):\n"
        "    a.w  [2, 3]\n"
        "hint: unexpected='carry' keeps their state for the next save\n"
        "hint: unexpected='ignore' drops it\n"
        "hint: missing='fresh' lets the parameters that are not in the file start without state"
    )


# --- adapters -------------------------------------------------------------------------------------------------------


def lora(adapter: str, modules: Sequence[str] = ("q_proj", "v_proj")) -> list[str]:
    return [f"{PREFIX}{module}.lora_{ab}.{adapter}.weight" for module in modules for ab in "AB"]


def test_the_one_saved_adapter_goes_into_the_one_live_one() -> None:
    made = plan(state([parameter(name) for name in lora("default")]), live(lora("other")[::-1]))
    made.check()
    assert [b.saved.name for b in made.bindings if b.saved] == lora("default")[::-1]
    assert str(made) == (
        "fits: 4/4 parameters would be restored\n"
        "the saved adapter 'default' goes into 'other', the only one in the optimizer"
    )


@pytest.mark.parametrize(
    "found",
    [
        live(lora("other"), outside=lora("default")),
        live(lora("other"), outside=lora("default")[:1]),
        live([*lora("other"), *lora("third")]),
        live(lora("other"), shapes={lora("other")[0]: (3, 2)}),
        live(lora("other", ("q_proj",))),
    ],
    ids=["saved adapter is there", "a part of it is", "two live adapters", "another shape", "fewer modules"],
)
def test_an_adapter_is_not_renamed_where_that_could_be_wrong(found: LiveOptimizer) -> None:
    made = plan(state([parameter(name) for name in lora("default")]), found)
    assert {problem.kind for problem in made.problems} == {"missing", "unexpected"}
    assert made.notes == ()


# --- tied parameters ------------------------------------------------------------------------------------------------


def test_a_tied_parameter_is_found_under_any_of_its_names() -> None:
    found = live(["embed.w"], tied={"embed.w": ("head.w",)})
    plan(state([parameter("head.w")]), found).check()
    plan(state([parameter("x.w", tied=("head.w",))]), found).check()


def test_parameters_tied_at_the_save_only() -> None:
    assert refused(plan(state([parameter("embed.w", tied=("head.w",))]), live(["embed.w", "head.w"]))) == (
        "optimizer state does not fit: 1 parameter saved, 2 in the optimizer\n"
        "  in the optimizer, not in the file (1):\n"
        "    head.w  [2, 3]  (when it was saved, the same tensor as 'embed.w')\n"
        "hint: missing='fresh' lets the parameters that are not in the file start without state"
    )


def test_parameters_tied_now_only() -> None:
    found = live(["embed.w"], tied={"embed.w": ("head.w",)})
    assert refused(plan(state([parameter("head.w"), parameter("embed.w")]), found)) == (
        "optimizer state does not fit: 2 parameters saved, 1 in the optimizer\n"
        "  in the file, not in the optimizer (1):\n"
        "    head.w  [2, 3]  ('embed.w' is the same tensor here)\n"
        "hint: unexpected='carry' keeps their state for the next save\n"
        "hint: unexpected='ignore' drops it"
    )


# --- shapes ---------------------------------------------------------------------------------------------------------


def ranks(rank: int) -> dict[str, tuple[int, ...]]:
    return {name: (rank, 6) if "lora_A" in name else (6, rank) for name in lora("default")}


def test_another_rank() -> None:
    saved = state([parameter(name, shape) for name, shape in ranks(8).items()])
    found = live(lora("default"), shapes=ranks(4))
    q, v = f"{PREFIX}q_proj", f"{PREFIX}v_proj"
    assert refused(plan(saved, found)) == (
        "optimizer state does not fit: 4 parameters saved, 4 in the optimizer\n"
        "  of another shape (4; the rank is 4 in the model and 8 in the file):\n"
        f"    {q}.lora_A.default.weight  [4, 6] in the model, [8, 6] in the file\n"
        f"    {q}.lora_B.default.weight  [6, 4] in the model, [6, 8] in the file\n"
        f"    {v}.lora_A.default.weight  [4, 6] in the model, [8, 6] in the file\n"
        f"    {v}.lora_B.default.weight  [6, 4] in the model, [6, 8] in the file\n"
        "hint: mismatch='resize' cuts and pads the moments, for weights that were cut and padded alike\n"
        "hint: mismatch='fresh' lets these parameters start without state"
    )
    assert plan(saved, found, mismatch="fresh").restored == 0
    resized = plan(saved, found, mismatch="resize")
    resized.check()
    assert all(binding.resize for binding in resized.bindings)
    assert resized.notes == (
        "the moments of 4 parameters are cut and padded, which is right only if the weights were cut and padded alike",
    )


def test_another_shape_of_one_parameter() -> None:
    assert refused(plan(state([parameter("a", (4, 4)), parameter("b")]), live(["a", "b"]))) == (
        "optimizer state does not fit: 2 parameters saved, 2 in the optimizer\n"
        "  of another shape (1):\n"
        "    a  [2, 3] in the model, [4, 4] in the file\n"
        "hint: mismatch='fresh' lets these parameters start without state"
    )
    assert refused(plan(state([parameter("a", (4, 4))]), live(["a"]), mismatch="resize")) == (
        "optimizer state does not fit: 1 parameter saved, 1 in the optimizer\n"
        "  parameters that cannot be resized (1):\n"
        "    a  the file has no digest of its weights, and no layer that changes its shape is known\n"
        "hint: mismatch='fresh' lets these parameters start without state"
    )


def test_slots_that_cannot_be_resized() -> None:
    slots = {"exp_avg": slot((4, 3)), "row": slot((4,), role=Role.ROW), "mask": slot((4, 3)), "qmap": slot((256,))}
    a = "m.lora_A.default.weight"
    saved = state([parameter(a, (4, 3), state={"step": 1, "exp_avg_sq": slot((4, 3)), **slots})])
    assert refused(plan(saved, live([a]), mismatch="resize")) == (
        "optimizer state does not fit: 1 parameter saved, 1 in the optimizer\n"
        "  slots that cannot be resized (3):\n"
        f"    {a}  row [4] of role row\n"
        f"    {a}  mask [4, 3] of role param\n"
        f"    {a}  qmap [256] of role param\n"
        "hint: resized are slots of role param by these names: exp_avg, exp_avg_sq, exp_inf, grad_avg, "
        "max_exp_avg_sq, momentum_buffer, square_avg, sum"
    )


# --- what the optimizer's own step asks for ---------------------------------------------------------------------------


def test_float32_moments_beside_bfloat16_parameters() -> None:
    saved = state([parameter("a"), parameter("b")])
    assert refused(plan(saved, live(["a", "b"], dtype="BF16"))) == (
        "optimizer state does not fit: 2 parameters saved, 2 in the optimizer\n"
        "  exp_avg is F32 beside BF16 parameters (2): the step of AdamW raises on that\n"
        "hint: dtype='param' casts the state to the dtype of its parameter, as torch's load_state_dict does"
    )
    made = plan(saved, live(["a", "b"], dtype="BF16"), dtype="param")
    made.check()
    assert [binding.dtype for binding in made.bindings] == ["BF16", "BF16"]
    adafactor, other = "transformers.optimization.Adafactor", "someone.elses.Optimizer"
    for path in (adafactor, other):
        own = replace(saved, optimizers=(Optimizer(path),))
        plan(own, live(["a", "b"], dtype="BF16", class_path=path)).check()


def test_a_fused_kernel_takes_no_other_dtype_in_any_slot() -> None:
    fused = live(["a"], options=[{**MATH, "fused": True}], dtype="BF16")
    saved = state([parameter("a")])
    found = [(problem.kind, problem.title) for problem in plan(saved, fused).problems]
    assert found == [
        ("dtype", "exp_avg is F32 beside BF16 parameters (1): the step of AdamW raises on that"),
        ("dtype", "exp_avg_sq is F32 beside BF16 parameters (1): the step of AdamW raises on that"),
    ]


def test_a_slot_that_the_step_needs_and_the_file_lacks() -> None:
    saved = state([parameter("a"), parameter("b", state=None)])
    assert refused(plan(saved, live(["a", "b"], options=[{**MATH, "amsgrad": True}]))) == (
        "optimizer state does not fit: 2 parameters saved, 2 in the optimizer\n"
        "  AdamW needs the slot 'max_exp_avg_sq', which the file does not have for 1 parameter\n"
        f"hint: the file was written from {ADAMW}"
    )
    momentum = state([parameter("a", state={"momentum_buffer": slot((2, 3))})], optimizers=(Optimizer(None),))
    assert refused(plan(momentum, live(["a"]))) == (
        "optimizer state does not fit: 1 parameter saved, 1 in the optimizer\n"
        f"  written by a class that the file does not state, and the optimizer is {ADAMW}:\n"
        "    AdamW never reads momentum_buffer\n"
        "    AdamW keeps step, exp_avg, exp_avg_sq, which the file does not have\n"
        "hint: mismatch_class='fresh' lets the parameters whose state does not serve start without state\n"
        "hint: if it is the same class, convert the file with optimizer='CLASS'"
    )


def test_an_optimizer_with_one_state_for_all_parameters_takes_it_back_in_order_only() -> None:
    lbfgs = "torch.optim.lbfgs.LBFGS"
    saved = state([parameter("a", state={"d": slot((18,), role=Role.OPAQUE)}), parameter("b", state=None)])
    saved = replace(saved, optimizers=(Optimizer(lbfgs),))
    plan(saved, live(["a", "b"], class_path=lbfgs)).check()
    assert refused(plan(saved, live(["b", "a"], class_path=lbfgs))) == (
        "optimizer state does not fit: 2 parameters saved, 2 in the optimizer\n"
        "  LBFGS keeps one state for all its parameters in their order; the saved order differs from position 0 on\n"
        "hint: build torch.optim.lbfgs.LBFGS over the parameters in the saved order"
    )
    fewer = plan(saved, live(["a"], class_path=lbfgs), unexpected="ignore")
    assert [problem.kind for problem in fewer.problems] == ["order"]


# --- groups ---------------------------------------------------------------------------------------------------------


def test_what_each_kind_of_option_does() -> None:
    saved: dict[str, Value]
    saved = {
        "lr": 5e-4,
        "betas": (0.8, 0.9),
        "foreach": True,
        "fused": True,
        "d_max": 0.5,
        "initial_lr": 1.0,
        "lr_mult": 2,
    }
    own: dict[str, Value]
    own = {"lr": 1e-3, "betas": (0.9, 0.999), "foreach": None, "fused": None, "name": "mine", "maximize": False}
    made = plan(state([parameter("a")], options=[saved]), live(["a"], options=[own]))
    made.check()
    assert made.options == ({"lr": 5e-4, "betas": (0.8, 0.9), "d_max": 0.5},)
    assert made.notes == ("the live groups have no option lr_mult: what the file says of it was left out",)
    assert {kind_of(key) for key in OPTIONS} == {Kind.SCHEDULE, Kind.RUNTIME, Kind.STATE, Kind.CLASS}
    assert kind_of("betas") is Kind.MATH


def test_a_schedulers_keys_come_only_where_a_scheduler_is() -> None:
    saved = state([parameter("a")], options=[{**MATH, "initial_lr": 0.5}])
    assert "initial_lr" not in plan(saved, live(["a"])).options[0]
    scheduled = live(["a"], options=[{**MATH, "initial_lr": 1.0}])
    assert plan(saved, scheduled).options[0]["initial_lr"] == 0.5


def test_saved_groups_that_disagree_cannot_feed_one() -> None:
    options: list[dict[str, Value]] = [MATH, {**MATH, "weight_decay": 0.0, "betas": [0.9, 0.999]}]
    saved = state([parameter("a")], [parameter("b")], options=options)
    assert refused(plan(saved, live(["a", "b"]))) == (
        "optimizer state does not fit: 2 parameters saved, 2 in the optimizer\n"
        "  live group 0 is fed by saved groups that disagree on weight_decay: 0.01 in saved group 0, 0.0 in "
        "saved group 1\n"
        "hint: options={'weight_decay': 'current'} keeps the live value\n"
        "hint: options={'weight_decay': ...} sets another"
    )
    for given, expected in (("current", None), (0.1, 0.1)):
        made = plan(saved, live(["a", "b"]), options={"weight_decay": given})
        made.check()
        assert made.options[0].get("weight_decay") == expected


def test_live_groups_that_disagree_are_not_made_alike() -> None:
    found = live(["a"], ["b"], options=[MATH, {**MATH, "weight_decay": 0.0}])
    saved = state([parameter("a"), parameter("b")])
    assert refused(plan(saved, found)) == (
        "optimizer state does not fit: 2 parameters saved, 2 in the optimizer\n"
        "  saved group 0, with weight_decay 0.01, feeds live groups that disagree on it: 0.01 in live group 0, 0.0 in "
        "live group 1\n"
        "hint: options={'weight_decay': 'current'} keeps the live values\n"
        "hint: options={'weight_decay': 'saved'} makes them alike"
    )
    kept = plan(saved, found, options={"weight_decay": "current"})
    kept.check()
    assert [options.get("weight_decay") for options in kept.options] == [None, None]
    alike = plan(saved, found, options={"weight_decay": "saved"})
    alike.check()
    assert [options.get("weight_decay") for options in alike.options] == [0.01, 0.01]


def test_groups_match_by_name_before_they_match_by_members() -> None:
    saved = state([parameter("a")], [parameter("b")], options=[MATH, {**MATH, "lr": 0.5}])
    saved = replace(saved, groups=tuple(replace(g, name=n) for g, n in zip(saved.groups, ("x", "y"), strict=True)))
    found = live(["a"], ["b"], options=[MATH, MATH], names=["y", "z"])
    made = plan(saved, found)
    made.check()
    assert [options["lr"] for options in made.options] == [0.5, 0.5]


def test_empty_groups_correspond_where_all_groups_do_and_others_stay_live() -> None:
    options = [MATH, {**MATH, "lr": 0.5}]
    saved = state([parameter("a"), parameter("b")], [], options=options)
    assert [dict(o).get("lr") for o in plan(saved, live(["b", "a"], [])).options] == [1e-3, 0.5]
    assert [dict(o).get("lr") for o in plan(saved, live(["b"], [], ["a"])).options] == [1e-3, None, 1e-3]
    fresh = plan(saved, live(["a", "b"], ["c"]), missing="fresh", options={"lr": 0.25})
    fresh.check()
    assert [dict(o).get("lr") for o in fresh.options] == [0.25, 0.25]


def test_tensor_valued_options_compare_by_value() -> None:
    tensor = Scalar("F64", struct.pack("<d", 1e-3))
    saved = state([parameter("a")], [parameter("b")], options=[{**MATH, "lr": tensor}, MATH])
    made = plan(saved, live(["a", "b"]))
    made.check()
    assert made.options[0]["lr"] == tensor


def test_a_learning_rate_of_zero_is_pointed_out() -> None:
    saved = state([parameter("a")], [], options=[{**MATH, "lr": 0.0}, MATH])
    made = plan(saved, live(["a"]))
    made.check()
    assert str(made) == (
        "fits: 1/1 parameters would be restored\n"
        "lr 0.001 -> 0.0 from the file\n"
        "lr is 0.0 in the file, as at the end of a schedule, and so it is now in group 0: options={'lr': 'current'} "
        "would keep the live value, options={'lr': 1e-4} set another"
    )
    assert plan(saved, live(["a"]), options={"lr": "saved"}).notes == ()


# --- policies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ({"missing": "carry"}, "missing='carry': use 'error' or 'fresh'"),
        ({"unexpected": "drop"}, "unexpected='drop': use 'error' or 'ignore' or 'carry'"),
        ({"mismatch": None}, "mismatch=None: use 'error' or 'fresh' or 'resize'"),
        ({"dtype": "bf16"}, "dtype='bf16': use 'saved' or 'param'"),
        ({"options": {"leer": 1}}, "options={'leer': ...}: no group has an option of that name"),
        (
            {"options": {"fused": "saved"}},
            "options={'fused': ...}: fused says how the live optimizer runs; set it on the optimizer",
        ),
        ({"rename": {"x": "y"}}, "rename: there is no parameter 'x' to rename"),
    ],
)
def test_policies_that_do_not_exist(policies: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        plan(state([parameter("a")]), live(["a"]), **policies)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


def test_a_load_that_would_restore_nothing_is_refused() -> None:
    made = plan(state([parameter("a")]), live(["b"]), missing="fresh", unexpected="ignore")
    assert refused(made) == (
        "optimizer state does not fit: 1 parameter saved, 1 in the optimizer\n"
        "  nothing would be restored: no saved parameter is in the optimizer"
    )


def test_all_policies_together() -> None:
    b, c = "b.lora_A.default.weight", "c.lora_A.default.weight"
    saved = state(
        [parameter("old.a"), parameter(f"old.{b}", (4, 3)), parameter("old.gone"), parameter(f"old.{c}", (4, 3))]
    )
    made = plan(
        saved,
        live([c, "new", "a", b], dtype="BF16"),
        missing="fresh",
        unexpected="carry",
        mismatch="resize",
        dtype="param",
        options={"lr": 0.5, "betas": "current"},
        rename=[("^old.", "")],
    )
    made.check()
    assert {x.name: (x.saved and x.saved.name, x.dtype, x.resize is not None) for x in made.bindings} == {
        c: (f"old.{c}", "BF16", True),
        "new": (None, None, False),
        "a": ("old.a", "BF16", False),
        b: (f"old.{b}", "BF16", True),
    }
    assert made.options == ({"lr": 0.5, "eps": 1e-8, "weight_decay": 0.01},)
    assert [p.name for p in made.carried] == ["gone"]
    assert str(made) == (
        "fits: 3/4 parameters would be restored, 1 carried\n"
        "lr 0.001 -> 0.5 as options= says\n"
        "the moments of 2 parameters are cut and padded, which is right only if the weights were cut and padded alike"
    )
