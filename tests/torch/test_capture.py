"""What is read off a live optimizer: names by identity, everything else as it is, and nothing changed by it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lora_state_format.errors import CaptureError, UnrepresentableError
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import Role, Scalar, Slot
from lora_state_format.model.tensors import contiguous
from lora_state_format.torch import capture
from lora_state_format.torch.tensors import DTYPES, _Device, from_torch, scalar_to_torch, to_torch


def linear() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, *inputs: torch.Tensor) -> None:
    model(*(inputs or (torch.ones(5, 3),))).square().sum().backward()
    optimizer.step()


# --- names ----------------------------------------------------------------------------------------------------------


def test_names_are_found_by_identity_not_by_what_the_optimizer_says() -> None:
    model = linear()
    optimizer = torch.optim.AdamW([(f"wrong{n}", p) for n, p in enumerate(reversed(list(model.parameters())))])
    step(model, optimizer)

    state = capture(optimizer, model)

    assert list(state) == ["2.bias", "2.weight", "0.bias", "0.weight"]
    assert torch.equal(to_torch(state["0.weight"]["exp_avg"]), optimizer.state[model[0].weight]["exp_avg"])
    assert "param_names" not in dict(state.groups[0].options)
    assert (state.naming.source, state.optimizers[0].class_path) == ("model", "torch.optim.adamw.AdamW")


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Shelf(nn.Module):
    """A module of one's own with a child that is called as torch's wrappers call theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 3)
        self._orig_mod = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self._orig_mod(self.module(x))


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_segments_of_wrappers_go_by_the_wrappers_type() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    last: Any = torch.compile(nn.Linear(3, 2), backend="eager")
    model = nn.Sequential(Shelf(), checkpoint_wrapper(nn.Linear(3, 3)), last)
    wrapped: Any = torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager")
    optimizer = torch.optim.SGD(wrapped.parameters())

    assert any(name.startswith("_orig_mod.module.2._orig_mod") for name, _ in wrapped.named_parameters())
    assert list(capture(optimizer, wrapped)) == [
        f"{path}.{leaf}" for path in ("0.module", "0._orig_mod", "1", "2") for leaf in ("weight", "bias")
    ]


def test_two_parameters_that_become_one_are_refused() -> None:
    unet, text = nn.ModuleDict({"a": nn.Linear(1, 1)}), nn.Linear(1, 1)
    with pytest.raises(CaptureError) as caught:
        capture(torch.optim.SGD([*unet.parameters(), *text.parameters()]), {"x": unet, "x.a": text})
    assert str(caught.value) == "two parameters are called 'x.a.weight' once the segments of wrappers are removed"


def test_several_models_and_several_optimizers_make_one_state() -> None:
    unet, text = linear(), nn.Linear(3, 2)
    optimizers = [
        torch.optim.AdamW([{"params": unet.parameters(), "name": "unet"}]),
        torch.optim.SGD(text.parameters(), lr=0.1, momentum=0.9),
    ]
    step(unet, optimizers[0])
    step(text, optimizers[1])

    state = capture(optimizers, {"unet": unet, "text": text})

    assert list(state) == ["unet.0.weight", "unet.0.bias", "unet.2.weight", "unet.2.bias", "text.weight", "text.bias"]
    assert [(g.optimizer, g.count, g.name) for g in state.groups] == [(0, 4, "unet"), (1, 2, None)]
    assert [o.class_path for o in state.optimizers] == ["torch.optim.adamw.AdamW", "torch.optim.sgd.SGD"]
    assert set(state["text.weight"].state or ()) == {"momentum_buffer"}


def test_accelerates_shell_is_seen_through() -> None:
    from accelerate import Accelerator

    model = linear()
    shell = Accelerator(cpu=True).prepare_optimizer(torch.optim.AdamW(model.parameters()))
    assert type(shell).__name__ == "AcceleratedOptimizer"
    assert capture(shell, model).optimizers[0].class_path == "torch.optim.adamw.AdamW"


def test_tied_parameters_stand_under_their_first_name_and_know_the_others() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    state = capture(torch.optim.SGD(model.parameters()), model)
    assert [(name, state[name].tied) for name in state] == [("0.weight", ("1.weight",)), ("0.bias", ()), ("1.bias", ())]


def test_an_adapters_parameters_know_their_adapter_and_their_key() -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(linear(), LoraConfig(target_modules=["0"]), adapter_name="mine")
    found = capture(torch.optim.SGD([p for p in model.parameters() if p.requires_grad]), model)
    assert [(p.name, p.adapter, p.foreign_names["peft"]) for p in found.parameters] == [
        (f"base_model.model.0.lora_{ab}.mine.weight", "mine", f"base_model.model.0.lora_{ab}.weight") for ab in "AB"
    ]


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_parameters_that_the_model_does_not_have() -> None:
    model = linear()
    other = nn.Linear(3, 2)
    optimizer = torch.optim.SGD([{"params": model.parameters()}, {"params": other.parameters()}])
    with pytest.raises(CaptureError) as caught:
        capture(optimizer, model)
    assert str(caught.value) == (
        "the optimizer holds 2 parameters that the model does not have:\n"
        "    group 1, position 0, shape [2, 3]\n"
        "    group 1, position 1, shape [2]\n"
        "hint: it was built over another model, or before the model's parameters were replaced; build it from this "
        "model's parameters, or pass every model that it trains, as in model={'unet': unet, 'text_encoder': te}"
    )
    assert caught.value.exit_code == 1


def test_one_parameter_in_two_optimizers() -> None:
    model = linear()
    with pytest.raises(CaptureError) as caught:
        capture([torch.optim.SGD(model.parameters()), torch.optim.SGD(model[2].parameters())], model)
    assert str(caught.value) == "parameter '2.weight' is in optimizer 0 and in optimizer 1"


def test_state_of_a_tensor_that_nobody_has() -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[torch.zeros(7)] = {"momentum_buffer": torch.zeros(7)}
    with pytest.raises(CaptureError) as caught:
        capture(optimizer, model)
    assert str(caught.value) == (
        "the optimizer keeps state of a tensor of shape [7] that is in none of its groups and not in the model; delete "
        "it from optimizer.state"
    )


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            torch.zeros(2, dtype=torch.complex128),
            "'x' is a tensor of torch.complex128, which safetensors does not have",
        ),
        (torch.eye(2).to_sparse(), "'x' is a tensor of layout torch.sparse_coo, where torch.strided was expected"),
        (torch.zeros(2, device="meta"), "'x' is a tensor on the meta device, without bytes"),
        (
            {"y": [torch.zeros(2).as_subclass(Subclass)]},
            "'x.y.0' is a tensor of class {}, which has no form of its own here",
        ),
    ],
    ids=["complex128", "sparse", "meta", "subclass"],
)
def test_tensors_without_plain_bytes_are_refused_by_parameter_and_slot(value: Any, message: str) -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model[2].bias] = {"x": value}
    with pytest.raises(UnrepresentableError) as caught:
        capture(optimizer, model)
    assert str(caught.value) == "'2.bias': slot " + message.format(f"{__name__}.Subclass")


def test_objects_are_refused_by_parameter_and_slot() -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model[2].bias] = {"projector": object()}
    with pytest.raises(UnrepresentableError) as caught:
        capture(optimizer, model)
    assert str(caught.value) == "2.bias.projector is a value of type object, which has no form in a state"


def test_an_option_that_no_file_can_hold_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer.param_groups[0]["momentum_dtype"] = torch.bfloat16
    with caplog.at_level(logging.WARNING, "lora_state_format"):
        state = capture(optimizer, model)
    assert dict(state.groups[0].options)["lr"] == 0.5
    assert "momentum_dtype" not in dict(state.groups[0].options)
    (record,) = caplog.records
    assert record.getMessage() == (
        "group 0: option momentum_dtype is a value of type dtype, which has no form in a state; it is not saved, and a "
        "load keeps what the live group has"
    )


def test_extra_holds_plain_values_only() -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    state = capture(optimizer, model, extra={"scheduler": schedule.state_dict(), "seen": (1, 2.0, None)}, global_step=9)
    assert state.extra["scheduler"] == schedule.state_dict()
    assert (state.extra["seen"], state.global_step) == ((1, 2.0, None), 9)
    with pytest.raises(UnrepresentableError) as caught:
        capture(optimizer, model, extra={"rng": [torch.get_rng_state()]})
    assert str(caught.value) == "extra.rng.0 is a tensor; extra holds plain values only"


# --- values ---------------------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Everything that a capture could change: values, and the memory they lie in."""
    grads = [None if p.grad is None else (p.grad.data_ptr(), p.grad.tolist()) for p in model.parameters()]
    slots = [
        {key: (value.data_ptr(), value.tolist()) for key, value in optimizer.state.get(p, {}).items()}
        for p in model.parameters()
    ]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return repr((grads, slots, groups, len(optimizer.state), [p.tolist() for p in model.parameters()]))


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_capturing_changes_nothing(stepped: bool, gradients: bool) -> None:
    model = linear()
    optimizer = torch.optim.AdamW(model.parameters())
    if stepped:
        step(model, optimizer)
    optimizer.zero_grad()
    if gradients:
        model(torch.ones(5, 3)).sum().backward()
    before = fingerprint(model, optimizer)

    state = capture(optimizer, model)

    assert fingerprint(model, optimizer) == before
    assert all((parameter.state is not None) is stepped for parameter in state.parameters)


def test_nothing_is_copied() -> None:
    model = linear()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    state = capture(optimizer, model)
    optimizer.state[model[0].weight]["exp_avg"].fill_(5.0)
    assert to_torch(state["0.weight"]["exp_avg"]).tolist() == [[5.0] * 3] * 4


def test_roles_come_from_names_and_are_checked_against_shapes() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight] = {
        "exp_avg": torch.zeros(4, 4),
        "exp_avg_sq": torch.zeros(2, 8),
        "nested": {"momentum_buffer": (torch.zeros(3), [torch.zeros(4, 4)])},
        "exp_avg_sq_row": torch.zeros(4),
        "mystery": torch.zeros(4, 4),
    }
    slots: Any = capture(optimizer, model)["weight"].state
    assert slots["exp_avg"].role is Role.PARAM
    assert slots["exp_avg_sq"].role is Role.OPAQUE
    assert slots["exp_avg_sq_row"].role is Role.ROW
    assert slots["mystery"].role is Role.OPAQUE
    assert isinstance(slots["nested"]["momentum_buffer"][1][0], Slot)


def test_values_keep_their_types() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=float(np.float64(0.5)))
    optimizer.param_groups[0]["lr"] = np.float64(0.25)
    optimizer.param_groups[0]["tensor"] = torch.tensor(1.5, dtype=torch.float64)
    optimizer.state[model.weight] = {"step": 3, "ratio": 0.5, "flag": True, "none": None, "name": "x", "pair": (1, [2])}
    optimizer.state[model.bias] = {"step": torch.tensor(3.0), "raw": b"\0"}
    optimizer.state["epoch"] = 7  # type: ignore[index]
    state = capture(optimizer, model)
    options = dict(state.groups[0].options)
    assert (options["lr"], type(options["lr"])) == (0.25, float)
    assert options["tensor"] == Scalar("F64", np.float64(1.5).tobytes())
    assert state["weight"].state == optimizer.state[model.weight]
    assert state["bias"].state == {"step": Scalar("F32", np.float32(3.0).tobytes()), "raw": b"\0"}
    assert state.globals == {"state": {"epoch": 7}}
    other = nn.Linear(1, 1)
    both = capture([torch.optim.SGD(other.parameters()), optimizer], {"a": other, "b": model})
    assert both.globals == {"1": {"state": {"epoch": 7}}}


# --- tensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_there_and_back(name: str) -> None:
    raw = torch.arange(96, dtype=torch.uint8) % 2
    tensor = raw.view(DTYPES[name]).reshape(2, -1)
    found = from_torch(tensor)
    assert (found.dtype, found.shape) == (name, tuple(tensor.shape))
    assert torch.equal(to_torch(found).view(torch.uint8), tensor.view(torch.uint8))
    scalar = scalar_to_torch(Scalar(name, bytes(raw[: DTYPES[name].itemsize].tolist())))
    assert scalar.dtype is DTYPES[name]
    assert scalar.shape == ()


LAYOUTS: dict[str, torch.Tensor] = {
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "every other": torch.arange(24.0).reshape(4, 6)[::2, 1::2],
    "expanded": torch.arange(3.0).expand(4, 3),
    "conjugated": torch.randn(3, 2, dtype=torch.complex64).conj(),
    "empty": torch.zeros(3, 0, 2),
    "scalar": torch.tensor(2.5),
    "large rows": torch.randn(3, 300_000).t().contiguous().t(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_in_c_order(layout: str) -> None:
    tensor = LAYOUTS[layout]
    assert torch.equal(to_torch(from_torch(tensor)), tensor)


def test_dtypes_that_torch_lacks_are_refused() -> None:
    with pytest.raises(UnrepresentableError) as caught:
        to_torch(contiguous("F6_E2M3", (4,), Memory(bytes(3))))
    assert str(caught.value) == "a tensor of type F6_E2M3, which this torch does not have"


def test_bytes_of_another_device_are_copied_piece_by_piece() -> None:
    tensor = torch.randn(1000)
    source = _Device(tensor.view(torch.uint8))
    out = bytearray(100)
    source.readinto(40, memoryview(out))
    assert bytes(out) == tensor.numpy().tobytes()[40:140]
    assert (source.size, source.view(0, 4)) == (4000, None)
