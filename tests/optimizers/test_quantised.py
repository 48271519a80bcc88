"""Quantised state of bitsandbytes and torchao: kept as it is, and decoded as those libraries decode it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_state_format import registry
from lora_state_format.converters import torch_optimizer
from lora_state_format.errors import OptionError, UnrepresentableError
from lora_state_format.format.reading import open_state
from lora_state_format.format.writing import write
from lora_state_format.model.states import Naming, OptimizerState, Parameter, PositionalState, Role
from lora_state_format.operations.conversion import convert
from lora_state_format.optimizers.quantised import _e4m3, bound_of, dequantize

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

SHAPES = {"a": (96, 128), "b": (17,), "c": (64, 65)}


def trained(optimizer_class: Any, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> tuple[dict[str, Any], Any]:
    torch.manual_seed(0)
    parameters = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    optimizer = optimizer_class(list(parameters.values()), lr=1e-3)
    for _ in range(3):
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter) * 0.01
        optimizer.step()
    return parameters, optimizer


def named(optimizer: Any, parameters: Mapping[str, torch.Tensor], path: Path) -> OptimizerState:
    """The optimizer's state through an ``optimizer.pt``."""
    torch.save(optimizer.state_dict(), path)
    state = registry.read(path, "torch_optimizer").state
    assert isinstance(state, PositionalState)
    return state.named([Parameter(name, tuple(p.shape), None) for name, p in parameters.items()], Naming("names"))


@pytest.fixture(scope="session", params=["AdamW8bit", "Lion8bit"])
def bnb_run(request: pytest.FixtureRequest) -> Any:
    import bitsandbytes

    return request.param, *trained(getattr(bitsandbytes.optim, request.param))


@pytest.fixture(scope="session", params=["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def torchao_run(request: pytest.FixtureRequest) -> Any:
    import torchao.optim

    shapes = {**SHAPES, "c": (64, 64)}  # torchao quantises only what its blocks divide
    return trained(getattr(torchao.optim, request.param), shapes)


def test_bitsandbytes_is_decoded_as_it_decodes_itself(bnb_run: Any, tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_blockwise

    name, parameters, optimizer = bnb_run
    slots = {"state1": "exp_avg", "state2": "exp_avg_sq"} if name == "AdamW8bit" else {"state1": "exp_avg"}
    with named(optimizer, parameters, tmp_path / "optimizer.pt") as state:
        classed = replace(state.optimizers[0], class_path=f"bitsandbytes.optim.{name}")
        result = dequantize(replace(state, optimizers=(classed,)))
        assert result.moments == 2 * len(slots)
        for key, parameter in parameters.items():
            live = optimizer.state[parameter]
            for theirs, ours in slots.items():
                value, scale, table = live[theirs], live.get(f"absmax{theirs[-1]}"), live.get(f"qmap{theirs[-1]}")
                if value.dtype == torch.uint8:
                    value = dequantize_blockwise(value, absmax=scale, code=table, blocksize=256)
                assert torch.equal(result.state[key][ours].torch(), value), (key, ours)
            assert result.state[key]["step"].item() == 3.0
        assert all(slot.role is Role.PARAM for p in result.state.parameters for _, slot in p.tensors())
        assert not {"alpha", "t_alpha", "t_beta3"} & set(dict(result.state.groups[0].options))


@pytest.mark.parametrize("signed", [True, False])
def test_the_bound_holds_and_is_nearly_reached(signed: bool) -> None:
    """Known values, quantised by bitsandbytes: no error is beyond the bound that is printed, and some come near it."""
    import bitsandbytes.functional as bnb

    table = bnb.create_dynamic_map(signed=signed)
    values = torch.linspace(-1.0 if signed else 0.0, 1.0, 1 << 16)
    codes, how = bnb.quantize_blockwise(values, code=table, blocksize=256)
    largest = values.reshape(-1, 256).abs().amax(1).repeat_interleave(256)
    error = (bnb.dequantize_blockwise(codes, how) - values).abs() / largest
    bound = bound_of(table.numpy())
    assert 0.9 * bound < error.max().item() <= bound


@pytest.mark.parametrize("kind", ["8bit", "4bit", "Fp8"])
@pytest.mark.parametrize("signed", [True, False])
def test_the_bound_holds_for_torchao_too(kind: str, signed: bool) -> None:
    import torchao.optim.subclass_4bit
    import torchao.optim.subclass_8bit
    import torchao.optim.subclass_fp8

    modules = {"8bit": "subclass_8bit", "4bit": "subclass_4bit", "Fp8": "subclass_fp8"}
    tensor_class = getattr(getattr(torchao.optim, modules[kind]), f"OptimState{kind}")
    values = torch.linspace(-1.0 if signed else 0.0, 1.0, 1 << 16)
    quantised = tensor_class.zeros(values.shape, *(() if kind == "Fp8" else (signed,)), block_size=256)
    quantised.copy_(values)
    largest = values.reshape(-1, 256).abs().amax(1).repeat_interleave(256)
    error = (quantised.dequantize() - values).abs() / largest
    bound = bound_of(_e4m3() if kind == "Fp8" else quantised.qmap.numpy())
    assert 0.9 * bound < error.max().item() <= bound


def test_torchao_is_decoded_as_it_decodes_itself(torchao_run: Any, tmp_path: Path) -> None:
    parameters, optimizer = torchao_run
    with named(optimizer, parameters, tmp_path / "optimizer.pt") as state:
        result = dequantize(state)
        assert result.moments == 4
        for key, parameter in parameters.items():
            for slot in ("exp_avg", "exp_avg_sq"):
                value = optimizer.state[parameter][slot]
                value = value if type(value) is torch.Tensor else value.dequantize()
                moment = result.state[key][slot]
                assert torch.equal(moment.torch(), value), (key, slot)
                part = bytearray(10)
                moment.readinto(6, memoryview(part))
                assert part == moment.bytes()[6:16]


def test_torchao_comes_back_as_torch_saved_it(torchao_run: Any, tmp_path: Path) -> None:
    """Through our own file and back into an ``optimizer.pt`` that torch loads with torchao's classes."""
    parameters, optimizer = torchao_run
    with named(optimizer, parameters, tmp_path / "optimizer.pt") as state:
        write(state, tmp_path / "named.safetensors")
    with open_state(tmp_path / "named.safetensors") as again:
        torch_optimizer.write(again, tmp_path / "back.pt", base=None, force=False, options={})
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    original = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert back["param_groups"] == original["param_groups"]
    for identity, slots in original["state"].items():
        for slot, value in slots.items():
            ours = back["state"][identity][slot]
            assert (type(ours), ours.shape, ours.dtype) == (type(value), value.shape, value.dtype)
            if type(value) is torch.Tensor:
                assert torch.equal(ours, value)
                continue
            assert ours.__tensor_flatten__() == value.__tensor_flatten__()
            for part in value.__tensor_flatten__()[0]:
                assert torch.equal(getattr(ours, part).view(torch.uint8), getattr(value, part).view(torch.uint8))


def test_an_8_bit_run_goes_on_with_adamw(tmp_path: Path) -> None:
    """Loaded into torch's AdamW by name after decoding: the next update is close to what 8-bit Adam itself does."""
    import bitsandbytes

    from lora_state_format.torch import load_optimizer

    def net() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(128, 96), torch.nn.Linear(96, 64))

    def step(model: torch.nn.Module, optimizer: Any, seed: int) -> None:
        torch.manual_seed(seed)
        model(torch.randn(8, 128)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    model = net()
    eight = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-3)
    for seed in range(5):
        step(model, eight, seed)
    with named(eight, dict(model.named_parameters()), tmp_path / "optimizer.pt") as state:
        write(state, tmp_path / "eight.safetensors")
    report = convert(tmp_path / "eight.safetensors", tmp_path / "adamw.safetensors", dequantize=True)
    assert report.notes[0] == (
        "4 quantised moments decoded to float32: what quantising lost stays lost, each value is within 0.71% of the "
        "largest of its block"
    )
    twin = net()
    twin.load_state_dict(model.state_dict())
    adamw = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    load_optimizer(adamw, twin, tmp_path / "adamw.safetensors")
    step(model, eight, 9)
    step(twin, adamw, 9)
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert (ours - theirs).abs().mean().item() < 1e-4  # a tenth of the learning rate


def test_what_cannot_be_decoded(tmp_path: Path) -> None:
    import bitsandbytes

    parameters, plain = trained(torch.optim.AdamW)
    with named(plain, parameters, tmp_path / "a.pt") as state, pytest.raises(OptionError) as nothing:
        dequantize(state)
    assert str(nothing.value) == "no moment of this state is quantised: there is nothing to decode"
    parameters, mix = trained(bitsandbytes.optim.AdEMAMix8bit)
    with named(mix, parameters, tmp_path / "b.pt") as state, pytest.raises(UnrepresentableError) as two:
        dequantize(state)
    assert str(two.value) == (
        "'a' has a state1 of shape [2, 96, 128]: AdEMAMix keeps two first moments there, and no Adam has both"
    )


def test_a_public_8_bit_checkpoint(tmp_path: Path) -> None:
    folder = Path(__file__).parents[3] / "shared" / "wild" / "llama-lora-bnb8-32"
    if not folder.exists():
        pytest.skip("no public checkpoints beside the project")
    report = convert(folder, tmp_path / "x.safetensors", dequantize=True)
    assert "quantised moments decoded" in report.notes[0]
    with open_state(tmp_path / "x.safetensors") as state:
        assert all(slot.tensor.dtype == "F32" for p in state.parameters for _, slot in p.tensors())
        assert all(set(p.state or {}) == {"step", "exp_avg", "exp_avg_sq"} for p in state.parameters)
