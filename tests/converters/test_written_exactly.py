"""What each format is given is read back equal, or it is refused by name and nothing is written.

States are made of what optimizers keep, and of what formats have no place for: other slots, steps and options, tensors
where numbers are usual, nested values, empty groups, several optimizers, state of no parameter. The readers are our
own, and torch's for what is a file of ``torch.save`` or a DCP folder; MLX's, flax's and Paddle's read in ``test_mlx``,
``test_flax_msgpack`` and ``test_paddlenlp``, DeepSpeed's in ``test_deepspeed_universal``. LeRobot's loader was not run.
"""

from __future__ import annotations

import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_state_format import registry
from lora_state_format.errors import OptionError, UnrepresentableError
from lora_state_format.foreign import torch_save
from lora_state_format.foreign.pickles import Record
from lora_state_format.foreign.state_dict import to_state_dict
from lora_state_format.format import reading
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import (
    Group,
    Naming,
    Optimizer,
    OptimizerState,
    Parameter,
    PositionalState,
    Role,
    Scalar,
    Slot,
    Value,
)
from lora_state_format.model.tensors import Tensor, contiguous
from lora_state_format.operations.diff import diff

NAMES: Final = ("layers.0.weight", "layers.1.weight", "layers.2.weight", "head.bias")
SHAPE: Final = (2, 3)
ADAMW: Final = "torch.optim.adamw.AdamW"


@pytest.fixture(autouse=True, scope="module")
def _without_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


# --- states -----------------------------------------------------------------------------------------------------------


def numbers(seed: int, shape: tuple[int, ...] = SHAPE, role: Role = Role.PARAM) -> Slot:
    count = 1
    for size in shape:
        count *= size
    values = [float(seed + n) for n in range(count)]
    return Slot(contiguous("F32", shape, Memory(struct.pack(f"<{count}f", *values))), role)


STEPS: Final[st.SearchStrategy[Value]] = st.sampled_from(
    [Scalar.of("F32", 3.0), Scalar.of("F32", 5.0), Scalar.of("I64", 3), 3]
)
ODD_SLOTS: Final[st.SearchStrategy[dict[str, Value]]] = st.sampled_from(
    [
        {}, {}, {}, {}, {"mu_product": Scalar.of("F32", 0.5)}, {"k": 7}, {"max_exp_avg_sq": numbers(50)},
        {"momentum_buffer": None}, {"x.y": numbers(60)}, {"a/b": numbers(70)}, {"nested": {"x": numbers(80)}},
        {"nested": {0: numbers(80), 1: 2}}, {"nested": {}}, {"list": [numbers(90), 1]}, {"tuple": (1, 2.0)},
        {"master_param": numbers(40)}, {"text": "x"}, {"fp32": numbers(1)},
        {"Q": numbers(9, (2,), Role.OPAQUE)},
    ]
)  # fmt: skip
ODD_OPTIONS: Final[st.SearchStrategy[dict[str, Value]]] = st.sampled_from(
    [
        {}, {}, {}, {}, {"maximize": True}, {"maximize": False}, {"amsgrad": True}, {"mystery": ("x", 3)}, {"n": None},
        {"lr": Scalar.of("F32", 0.5)}, {"lr": float("nan")}, {"lr": 1}, {"a.b": 1.0}, {"deep": {"x": {"y": (1,)}}},
        {"deep": {0: "x"}}, {"deep": {1: "x", "1": "y"}}, {"bytes": b"x"}, {"flag": True}, {"one": 1}, {"one": 1.0},
    ]
)  # fmt: skip


@st.composite
def states(draw: st.DrawFn, *, plain: bool = False) -> OptimizerState:
    """Any state; a ``plain`` one has nothing that only some formats can hold."""
    count = draw(st.integers(1, len(NAMES)))
    first = draw(STEPS)
    masters = draw(st.booleans())
    parameters = []
    for number, name in enumerate(NAMES[:count]):
        usual: dict[str, Value] = {"step": first}
        usual |= {"exp_avg": numbers(10 * number), "exp_avg_sq": numbers(10 * number + 5)}
        if masters:
            usual["master_param"] = numbers(30 + number)
        slots: dict[str, Value] | None = usual
        if not plain:
            odd = draw(st.integers(0, 9))
            if odd == 0:
                slots = None
            elif odd == 1:
                slots = {}
            elif odd == 2:
                slots = usual | {"step": draw(STEPS)}
            elif odd < 5:
                slots = usual | draw(ODD_SLOTS)
        parameters.append(Parameter(name, SHAPE, slots, "F32"))
    cuts = sorted(draw(st.lists(st.integers(0, count), max_size=0 if plain else 2)))
    bounds = [0, *cuts, count]
    optimizers = 2 if cuts and draw(st.integers(0, 3)) == 0 else 1
    groups = []
    for number, (start, stop) in enumerate(pairwise(bounds)):
        options: dict[str, Value] = {"lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-8}
        if not plain:
            options |= draw(ODD_OPTIONS)
        groups.append(Group(min(number, optimizers - 1), tuple(options.items()), stop - start))
    state = OptimizerState(
        (Optimizer(ADAMW),) * optimizers, tuple(groups), tuple(parameters), Naming("model"), global_step=3
    )
    if not plain and optimizers == 1 and draw(st.integers(0, 9)) == 0:
        loose: Mapping[str, Value] = draw(st.sampled_from([{"note": "x"}, {"state": {"k": numbers(3)}}, {"k": 3}]))
        state = replace(state, globals=loose)
    if not plain and draw(st.integers(0, 14)) == 0:
        state = replace(state, parameters=(*state.parameters, Parameter("old", SHAPE, {"step": 3}, "F32")))
    return state


# --- formats ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """How a format is written and read; ``same`` compares what was with what came back."""

    name: str
    same: Callable[[OptimizerState, Any, ModuleType], bool]
    options: Mapping[str, Any] = field(default_factory=dict)
    told: Mapping[str, Any] = field(default_factory=dict)
    base: bool = False


def _tree(state: OptimizerState | PositionalState, plain_states: ModuleType, lists: bool = False) -> list[Any]:
    """The state dicts of all optimizers, with ids by position."""
    found: list[Any] = []
    for index in range(len(state.optimizers)):
        tree = to_state_dict(state, index)
        listed = [identity for group in tree["param_groups"] for identity in group["params"]]
        ids = {identity: number for number, identity in enumerate(listed)}
        tree["state"] = {ids.get(identity, identity): slots for identity, slots in tree["state"].items()}
        for group in tree["param_groups"]:
            group["params"] = [ids[identity] for identity in group["params"]]
        if lists:
            tree["param_groups"] = _listed(tree["param_groups"])
        found.append(plain_states.plain(tree, _described))
    return found


def _described(value: Any) -> Any:
    if isinstance(value, Scalar):
        return value.dtype, [], value.data
    assert isinstance(value, Tensor)
    return value.dtype, list(value.shape), bytes(value.bytes())


def _listed(value: Any) -> Any:
    """As JSON has it, which has no tuples."""
    if isinstance(value, dict):
        return {key: _listed(inner) for key, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def same_tree(state: OptimizerState, back: Any, plain_states: ModuleType) -> bool:
    names = back.names if isinstance(back, PositionalState) else tuple(back)
    named = isinstance(back, OptimizerState) or (names is not None)
    return _tree(state, plain_states) == _tree(back, plain_states) and (not named or names == tuple(state))


def same_listed(state: OptimizerState, back: Any, plain_states: ModuleType) -> bool:
    return _tree(state, plain_states, True) == _tree(back, plain_states, True)


def same_parameters(state: OptimizerState, back: Any, plain_states: ModuleType) -> bool:
    """For formats that keep no options: slots by name, steps as numbers."""
    assert isinstance(back, OptimizerState)

    def slots(parameter: Parameter) -> Any:
        held = dict(parameter.state or {})
        step = held.pop("step", None)
        number = step.item() if isinstance(step, Scalar) else step
        tensors = {name: value.tensor if isinstance(value, Slot) else value for name, value in held.items()}
        return parameter.state is None, number, plain_states.plain(tensors, _described)

    return {p.name: slots(p) for p in state.parameters} == {p.name: slots(p) for p in back.parameters}


def same_groups(state: OptimizerState, back: Any, plain_states: ModuleType) -> bool:
    """Slots and options by name."""

    def options(found: OptimizerState) -> Any:
        return [plain_states.plain(dict(group.options), _described) for group in found.groups]

    return same_parameters(state, back, plain_states) and options(state) == options(back)


def same_everything(state: OptimizerState, back: Any, plain_states: ModuleType) -> bool:
    return not diff(state, back)


TOLD: Final = {"optimizer": "adamw", "map": "none", "betas": (0.9, 0.999), "bias_correction": True}
CASES: Final = {
    "named": Case("named", same_everything),
    "torch_optimizer": Case("torch_optimizer", same_tree),
    "accelerate": Case("accelerate", same_tree),
    "accelerate, fsdp": Case("accelerate", same_tree, {"fsdp": True}),
    "dcp": Case("dcp", same_tree),
    "dcp, flattened": Case("dcp", same_tree, {"flattened": True}),
    "lerobot": Case("lerobot", same_listed),
    "lightning": Case("lightning", same_tree, base=True),
    "deepspeed_universal": Case("deepspeed_universal", same_groups, told=TOLD, base=True),
    "mlx": Case("mlx", same_parameters, {"map": "none"}, TOLD),
    "flax_msgpack": Case("flax_msgpack", same_parameters, {"map": "none"}, TOLD),
    "paddlenlp": Case("paddlenlp", same_parameters, {"map": "none"}, TOLD),
}


def make_base(state: OptimizerState, name: str, folder: Path) -> Path:
    """A checkpoint of the same run for what is not optimizer state."""
    if name == "lightning":
        trees: list[Any] = [{"state": {}, "param_groups": []}] * len(state.optimizers)
        torch_save.save({"optimizer_states": trees, "pytorch-lightning_version": "2.6.6"}, folder / "base.ckpt")
        return folder / "base.ckpt"
    shapes = [{p.name: Record("torch", "Size", (SHAPE,)) for p in group} for group in state.members()]
    model = {"param_shapes": shapes, "module": {}, "ds_version": "0.19", "global_steps": 3}
    groups = [{"lr": 0.1, "params": [number]} for number in range(len(state.groups))]
    optimizer = {"zero_stage": 1, "base_optimizer_state": {"state": {}, "param_groups": groups}}
    (folder / "base").mkdir()
    torch_save.save(model, folder / "base" / "mp_rank_00_model_states.pt")
    torch_save.save({"optimizer_state_dict": optimizer}, folder / "base" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return folder / "base"


def written(state: OptimizerState, case: Case, folder: Path) -> Path | None:
    """The path of what was written; ``None`` if it was refused, and nothing is there."""
    base = make_base(state, case.name, folder) if case.base else None
    target = folder / "target" / ("x.safetensors" if case.name in ("named", "mlx") else "x")
    target.parent.mkdir()
    try:
        registry.writer(case.name).write(state, target, base=base, force=False, options=case.options)
    except (UnrepresentableError, OptionError):
        assert not list(target.parent.iterdir())
        return None
    return target


def check(state: OptimizerState, case: Case, folder: Path, plain_states: ModuleType) -> bool:
    target = written(state, case, folder)
    if target is None:
        return False
    if case.name == "named":
        with reading.open_state(target) as opened:
            assert case.same(state, opened, plain_states)
        return True
    told = {**case.told, "masters": any("master_param" in (p.state or {}) for p in state.parameters)}
    back = registry.read(target, case.name, told).state
    try:
        assert case.same(state, back, plain_states), f"{state} came back as {back}"
    finally:
        for resource in back.resources:
            resource.close()
    return True


def test_every_format_that_is_written_is_tried() -> None:
    writable = {name for name in registry.names() if hasattr(registry.get(name), "write")}
    only_its_own = {
        "megatron"
    }  # whose groups have options of Megatron's; tests/converters/test_megatron.py writes them
    assert writable == {case.name for case in CASES.values()} | only_its_own


@pytest.mark.parametrize("name", CASES)
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(state=states())
def test_read_back_equal_or_refused(name: str, state: OptimizerState, plain_states: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(state, CASES[name], Path(folder), plain_states)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(state=states(plain=True))
def test_a_plain_state_is_written(name: str, state: OptimizerState, plain_states: ModuleType) -> None:
    """Else a writer that refuses all would pass."""
    first = state.parameters[0]
    masters = "master_param" in first
    wanted = {"deepspeed_universal": masters, "mlx": not masters, "flax_msgpack": not masters}
    wanted["lerobot"] = isinstance(first["step"], Scalar)
    with tempfile.TemporaryDirectory() as folder:
        assert check(state, CASES[name], Path(folder), plain_states) is wanted.get(name, True)


# --- read by torch ----------------------------------------------------------------------------------------------------


def _live(value: Any) -> Any:
    """What torch loaded, as plain values."""
    import torch

    if isinstance(value, torch.Tensor):
        return str(value.dtype), list(value.shape), value.numpy().tobytes()
    raise AssertionError(type(value))


def _ours(value: Any) -> Any:
    names = {"F32": "torch.float32", "I64": "torch.int64"}
    dtype, shape, data = _described(value)
    return names[dtype], shape, data


@pytest.mark.parametrize("name", ["torch_optimizer", "accelerate", "lightning"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(state=states())
def test_torch_loads_the_same(name: str, state: OptimizerState, plain_states: ModuleType) -> None:
    torch = pytest.importorskip("torch")
    with tempfile.TemporaryDirectory() as folder:
        target = written(state, CASES[name], Path(folder))
        if target is None:
            return
        files = sorted(target.iterdir()) if target.is_dir() else [target]
        trees: Any = [torch.load(file, weights_only=True) for file in files]
        trees = trees[0]["optimizer_states"] if name == "lightning" else trees
        expected = [to_state_dict(state, index) for index in range(len(state.optimizers))]
        assert [plain_states.plain(tree, _live) for tree in trees] == [
            plain_states.plain(tree, _ours) for tree in expected
        ]


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(state=states(plain=True))
def test_torch_loads_the_same_from_dcp(state: OptimizerState, plain_states: ModuleType) -> None:
    torch = pytest.importorskip("torch")
    from torch.distributed.checkpoint.state_dict_loader import load

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target = written(state, CASES["dcp"], Path(folder))
        assert target is not None
        empty = {
            p.name: {k: torch.zeros(() if k == "step" else SHAPE) for k, v in (p.state or {}).items() if v != 3}
            for p in state.parameters
        }
        if isinstance(step := (state.parameters[0].state or {})["step"], Scalar) and step.dtype == "I64":
            empty = {name: {**slots, "step": torch.zeros((), dtype=torch.int64)} for name, slots in empty.items()}
        loaded: dict[str, Any] = {"optimizer": {"state": empty}}
        load(loaded, checkpoint_id=target, no_dist=True)
        for parameter in state.parameters:
            for slot, value in (parameter.state or {}).items():
                if isinstance(value, (Slot, Scalar)):
                    found = _live(loaded["optimizer"]["state"][parameter.name][slot])
                    assert found == _ours(value.tensor if isinstance(value, Slot) else value)
