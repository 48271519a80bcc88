"""What a parameter is: its bytes, its rows, its layer; and what belongs to none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_state_format.errors import BindError, CaptureError, ConversionError, OptionError
from lora_state_format.format import reading
from lora_state_format.torch import load_optimizer, save_optimizer


def blocks(count: int = 4) -> Any:
    """Layers of equal shapes, each with a matrix and with a norm that begins as all the others."""
    torch.manual_seed(0)
    layers = nn.ModuleList(
        nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3, elementwise_affine=True)) for _ in range(count)
    )
    model = nn.Module()
    model.add_module("layers", layers)
    return model


def run(model: Any, layers: Callable[[Any], Any] = lambda model: model.layers) -> torch.optim.Optimizer:
    """AdamW over a model, after one step with other gradients for each parameter; norms get none, and stay equal."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if ".1." not in name:
            parameter.grad = torch.full_like(parameter, 1.0 + number)
        else:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    for number, parameter in enumerate(model.parameters()):
        optimizer.state[parameter]["exp_avg"].fill_(float(number))
    return optimizer


def firsts(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The moment of each parameter, which the saved run filled with the parameter's number."""
    state = optimizer.state
    return {name: float(state[p]["exp_avg"].reshape(-1)[0]) for name, p in model.named_parameters() if p in state}


# --- bytes name parameters ------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    model = blocks()
    save_optimizer(run(model), model, tmp_path / "o.safetensors")
    return model, tmp_path / "o.safetensors"


def test_a_dropped_layer_is_noticed_and_the_others_are_found(saved: tuple[Any, Path]) -> None:
    model, path = saved
    shorter = blocks()
    shorter.load_state_dict(copy.deepcopy(model.state_dict()))
    shorter.layers = nn.ModuleList(layer for number, layer in enumerate(shorter.layers) if number != 1)
    optimizer = torch.optim.AdamW(shorter.parameters())
    for policies in ({}, {"unexpected": "ignore"}):
        with pytest.raises(BindError) as caught:
            load_optimizer(optimizer, shorter, path, **policies)  # type: ignore[arg-type]
        assert "weights" in [problem.kind for problem in caught.value.plan.problems]
    assert str(caught.value) == (
        "optimizer state does not fit: 16 parameters saved, 12 in the optimizer\n"
        "  the weights say that these are other parameters (4):\n"
        "    layers.1.0.weight  was  layers.2.0.weight\n"
        "    layers.1.0.bias  was  layers.2.0.bias\n"
        "    layers.2.0.weight  was  layers.3.0.weight\n"
        "    layers.2.0.bias  was  layers.3.0.bias\n"
        "hint: rename='weights' names them, and the other parameters of their modules, by these bytes"
    )
    assert not optimizer.state
    report = load_optimizer(optimizer, shorter, path, rename="weights", unexpected="ignore")
    assert report.ignored == ("layers.1.0.weight", "layers.1.0.bias", "layers.1.1.weight", "layers.1.1.bias")
    assert list(firsts(shorter, optimizer).values()) == [0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15]
    with pytest.raises(BindError) as caught:
        load_optimizer(optimizer, shorter, path, rename="weights", unexpected="carry")
    assert "cannot be carried, since their names are other parameters' now (4):" in str(caught.value)


def test_an_inserted_copy_of_a_layer_starts_fresh_and_the_others_are_found(saved: tuple[Any, Path]) -> None:
    model, path = saved
    longer = blocks()
    longer.load_state_dict(copy.deepcopy(model.state_dict()))
    layers = list(longer.layers)
    longer.layers = nn.ModuleList([*layers[:2], copy.deepcopy(layers[1]), *layers[2:]])
    optimizer = torch.optim.AdamW(longer.parameters())
    report = load_optimizer(optimizer, longer, path, rename="weights", missing="fresh")
    assert report.fresh == ("layers.2.0.weight", "layers.2.0.bias", "layers.2.1.weight", "layers.2.1.bias")
    assert list(firsts(longer, optimizer).values()) == [*range(8), *range(8, 16)]


def test_exchanged_layers_are_found(saved: tuple[Any, Path]) -> None:
    model, path = saved
    turned = blocks()
    turned.load_state_dict(copy.deepcopy(model.state_dict()))
    turned.layers = nn.ModuleList(list(turned.layers)[::-1])
    optimizer = torch.optim.AdamW(turned.parameters())
    with pytest.raises(BindError):
        load_optimizer(optimizer, turned, path)
    report = load_optimizer(optimizer, turned, path, rename="weights")
    assert report.notes == ("8 parameters are named by the bytes of the weights",)
    assert list(firsts(turned, optimizer).values()) == [*range(12, 16), *range(8, 12), *range(4, 8), *range(4)]


def test_a_legacy_file_is_held_against_the_weights_next_to_it(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = blocks()
    optimizer = run(model)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    turned = blocks()
    turned.load_state_dict(copy.deepcopy(model.state_dict()))
    turned.layers = nn.ModuleList(list(turned.layers)[::-1])
    other = torch.optim.AdamW(turned.parameters())
    with pytest.raises(BindError) as caught:
        load_optimizer(other, turned, tmp_path)
    assert [problem.kind for problem in caught.value.plan.problems] == ["weights"]
    load_optimizer(other, turned, tmp_path, rename="weights")
    assert list(firsts(turned, other).values()) == [*range(12, 16), *range(8, 12), *range(4, 8), *range(4)]


def test_names_by_weights_need_digests(tmp_path: Path) -> None:
    model = blocks(1)
    optimizer = run(model)
    save_optimizer(optimizer, model, tmp_path / "o.safetensors", weights=False)
    with pytest.raises(ConversionError) as caught:
        load_optimizer(optimizer, model, tmp_path / "o.safetensors", rename="weights")
    assert str(caught.value) == (
        "rename='weights': the file has no digests of the weights; it was saved with weights=False"
    )


# --- rows -----------------------------------------------------------------------------------------------------------


def experts(rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 5, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bi,eio->beo", x, self.w).sum(1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Experts()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.experts(x)
            return out

    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=rank, target_parameters=["experts.w"], target_modules=[])
    return get_peft_model(Model(), config)


def adapter(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize(("old", "new"), [(2, 4), (4, 2)])
def test_the_experts_of_a_stacked_parameter_keep_their_ranks(old: int, new: int, tmp_path: Path) -> None:
    model = experts(old)
    optimizer = adapter(model)
    model(torch.randn(6, 5)).square().sum().backward()
    optimizer.step()
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    other = experts(new)
    resized = adapter(other)
    load_optimizer(resized, other, tmp_path / "o.safetensors", mismatch="resize")
    common = min(old, new)
    pairs = list(zip(optimizer.state.values(), resized.state.values(), strict=True))
    assert len(pairs) == 2
    for before, after in pairs:
        rows = before["exp_avg"].shape[0] == 3 * old
        was, now = (
            s["exp_avg"].reshape(3, r, -1) if rows else s["exp_avg"].reshape(5, r, 3)
            for s, r in ((before, old), (after, new))
        )
        assert torch.equal(now[:, :common], was[:, :common])
        assert not now[:, common:].any()


@pytest.mark.filterwarnings("ignore:The following rank_pattern:RuntimeWarning")
def test_adalora_keeps_the_ranks_that_its_mask_says(tmp_path: Path) -> None:
    from peft import AdaLoraConfig, PeftModel, get_peft_model

    def base() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))

    options = {"init_r": 6, "target_r": 3, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 8}
    model = get_peft_model(base(), AdaLoraConfig(target_modules=["0", "1"], **options))
    optimizer = adapter(model)
    for step in range(7):
        optimizer.zero_grad()
        model(torch.randn(4, 6, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    model.save_pretrained(tmp_path / "adapter")
    pattern = model.peft_config["default"].rank_pattern
    smaller = PeftModel.from_pretrained(base(), str(tmp_path / "adapter"), is_trainable=True)
    resized = adapter(smaller)
    load_optimizer(resized, smaller, tmp_path / "o.safetensors", mismatch="resize")
    live, cut = dict(smaller.named_parameters()), 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = name.split(".lora_")[0].removeprefix("base_model.model.")
        mask = torch.tensor(next(value for key, value in pattern.items() if key.startswith(f"{layer}.")))
        kept = mask.nonzero().flatten()
        cut += not torch.equal(kept, torch.arange(len(kept)))
        axis = 1 if "lora_B" in name else 0
        assert torch.equal(live[name], parameter.index_select(axis, kept))
        moment = optimizer.state[parameter]["exp_avg"].index_select(axis, kept)
        assert torch.equal(resized.state[live[name]]["exp_avg"], moment)
    assert cut, "some mask has to keep other ranks than the first"
    smaller.peft_config["default"].rank_pattern = None
    with pytest.raises(BindError) as caught:
        load_optimizer(resized, smaller, tmp_path / "o.safetensors", mismatch="resize")
    assert ("AdaLoRA keeps the ranks that its rank_pattern says, and the adapter's configuration has none") in str(
        caught.value
    )


def tokens(indices: list[int]) -> Any:
    from peft import TrainableTokensConfig, get_peft_model

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 3), nn.Linear(3, 2))
    return get_peft_model(model, TrainableTokensConfig(target_modules=["0"], token_indices=indices))


def test_rows_of_trainable_tokens_follow_their_tokens(tmp_path: Path) -> None:
    model = tokens([1, 4, 7])
    optimizer = adapter(model)
    model(torch.tensor([1, 4, 4, 7, 7, 7])).sum().backward()
    optimizer.step()
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    (old,) = optimizer.state.values()
    other = tokens([7, 2, 1])
    live = adapter(other)
    with pytest.raises(BindError) as caught:
        load_optimizer(live, other, tmp_path / "o.safetensors")
    assert "its rows are of other tokens than in the file" in str(caught.value)
    load_optimizer(live, other, tmp_path / "o.safetensors", mismatch="resize")
    (new,) = live.state.values()
    assert torch.equal(new["exp_avg"], torch.stack([old["exp_avg"][2], torch.zeros(3), old["exp_avg"][0]]))
    assert torch.equal(new["exp_avg_sq"][[0, 2]], old["exp_avg_sq"][[2, 0]])


# --- hints ----------------------------------------------------------------------------------------------------------


def lora(base: Any = None) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(
        base or nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), LoraConfig(target_modules=["0"], r=2)
    )


@pytest.fixture
def adapted(tmp_path: Path) -> Path:
    model = lora()
    optimizer = adapter(model)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    return tmp_path / "o.safetensors"


def hints(model: Any, optimizer: torch.optim.Optimizer, path: Path) -> list[str]:
    with pytest.raises(BindError) as caught:
        load_optimizer(optimizer, model, path)
    return [line.removeprefix("hint: ") for line in str(caught.value).splitlines() if line.startswith("hint: ")]


def test_a_base_that_is_trainable_by_mistake(adapted: Path) -> None:
    model = lora()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert hints(model, torch.optim.AdamW(model.parameters()), adapted) == [
        (
            "the saved run trained an adapter, and 4 parameters of its base model are trainable here: call "
            "requires_grad_(False) on them and build the optimizer from what is left"
        )
    ]


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_was_wrapped_twice(adapted: Path) -> None:
    model = lora(lora())
    assert (
        "the model is a PeftModel inside a PeftModel, whose inner adapter is frozen and whose outer one is new: call "
        "get_peft_model or PeftModel.from_pretrained once, on the base model"
    ) in hints(model, adapter(model), adapted)


def test_a_forgotten_is_trainable(adapted: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    lora().save_pretrained(tmp_path / "adapter")
    base = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if "lora_" in name])
    (note,) = [n for n in load_optimizer(optimizer, model, adapted).notes if "frozen" in n]
    assert note == (
        "2 restored parameters are frozen (requires_grad=False; the first is "
        "'base_model.model.0.lora_A.default.weight'): training will not change them. PeftModel.from_pretrained freezes "
        "an adapter unless it is called with is_trainable=True"
    )
    other = torch.optim.AdamW([next(iter(model.parameters()))])
    assert "PeftModel.from_pretrained freezes an adapter unless it is called with is_trainable=True" in hints(
        model, other, adapted
    )


@pytest.mark.filterwarnings("ignore")
def test_weight_norm_that_became_a_parametrization(tmp_path: Path) -> None:
    from torch.nn.utils import parametrizations, weight_norm

    def build(norm: Any) -> Any:
        torch.manual_seed(0)
        return nn.Sequential(norm(nn.Linear(3, 3)), nn.Linear(3, 3))

    old = build(weight_norm)
    optimizer = torch.optim.AdamW(old.parameters())
    old(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    save_optimizer(optimizer, old, tmp_path / "o.safetensors")
    new = build(parametrizations.weight_norm)
    live = torch.optim.AdamW(new.parameters())
    pairs = [("weight_g$", "parametrizations.weight.original0"), ("weight_v$", "parametrizations.weight.original1")]
    assert f"if these are the same parameters under other names, pass rename={pairs!r}" in hints(
        new, live, tmp_path / "o.safetensors"
    )
    load_optimizer(live, new, tmp_path / "o.safetensors", rename=pairs)
    for name, slot in (("original0", old[0].weight_g), ("original1", old[0].weight_v)):
        parameter = getattr(new[0].parametrizations.weight, name)
        assert torch.equal(live.state[parameter]["exp_avg"], optimizer.state[slot]["exp_avg"])


def test_a_module_that_was_wrapped_while_others_were_not(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(3, 3)})
    save_optimizer(torch.optim.AdamW(model.parameters()), model, tmp_path / "o.safetensors")
    optimizer = torch.optim.AdamW(model.parameters())
    model["a"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    wrapped = nn.ModuleDict({"a": nn.ModuleDict({"inner": model["a"]}), "b": model["b"]})
    live = torch.optim.AdamW(wrapped.parameters())
    rule = [("^a\\.", "a.inner.")]
    assert f"if these are the same parameters under other names, pass rename={rule!r}" in hints(
        wrapped, live, tmp_path / "o.safetensors"
    )
    assert load_optimizer(live, wrapped, tmp_path / "o.safetensors", rename=rule).restored == 4


def test_the_model_before_the_optimizer(adapted: Path) -> None:
    model = lora()
    with pytest.raises(OptionError) as caught:
        load_optimizer(model, adapter(model), adapted)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "the first argument is a PeftModel, which is a model: pass the optimizer first, then the model, then the path"
    )
    with pytest.raises(OptionError) as caught:
        load_optimizer(adapter(model).state_dict(), model, adapted)  # type: ignore[arg-type]
    assert str(caught.value) == "the first argument is a dict: pass the optimizer itself, not its state_dict()"


def test_a_parameter_that_is_in_a_group_twice(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = torch.optim.AdamW([model.weight, model.bias, model.weight])
    with pytest.raises(CaptureError) as caught:
        save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    assert str(caught.value) == (
        "parameter 'weight' is in the optimizer twice, the second time at position 2 of group 0: torch takes its step "
        "twice then; build the optimizer with each parameter once"
    )


def test_a_leading_module_that_is_dropped_is_said(tmp_path: Path) -> None:
    old = nn.ModuleDict({"module": nn.Linear(2, 2)})
    optimizer = torch.optim.AdamW(old.parameters())
    save_optimizer(optimizer, old, tmp_path / "o.safetensors", weights=False)
    report = load_optimizer(torch.optim.AdamW(old["module"].parameters()), old["module"], tmp_path / "o.safetensors")
    assert report.notes == (
        (
            "the names of 2 saved parameters begin with 'module.', as DistributedDataParallel puts it there; they are "
            "matched without it"
        ),
    )


# --- options --------------------------------------------------------------------------------------------------------


def two(rates: tuple[Any, Any], shared: Any = None) -> tuple[Any, torch.optim.Optimizer]:
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(2)) for name in "ab"})
    groups = [
        {"params": [p], **({} if shared is not None else {"lr": lr})}
        for p, lr in zip(model.values(), rates, strict=True)
    ]
    return model, torch.optim.AdamW(groups, **({"lr": shared} if shared is not None else {}), foreach=False)


def test_groups_that_share_a_rate_part_where_the_file_has_two(tmp_path: Path) -> None:
    model, optimizer = two((0.125, 0.25))
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    shared = torch.tensor(0.5)
    model, live = two((0, 0), shared)
    assert live.param_groups[0]["lr"] is live.param_groups[1]["lr"]
    report = load_optimizer(live, model, tmp_path / "o.safetensors")
    assert [float(group["lr"]) for group in live.param_groups] == [0.125, 0.25]
    assert float(live.defaults["lr"]) == float(shared) == 0.5
    assert report.replaced == ("lr 0.5 -> 0.125 in group 0; 0.5 -> 0.25 in group 1 from the file",)


def test_groups_that_share_a_rate_go_on_sharing_where_the_file_has_one(tmp_path: Path) -> None:
    model, optimizer = two((0.25, 0.25))
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    shared = torch.tensor(0.5)
    model, live = two((0, 0), shared)
    load_optimizer(live, model, tmp_path / "o.safetensors")
    assert all(group["lr"] is shared for group in live.param_groups)
    assert (float(shared), float(live.defaults["lr"])) == (0.25, 0.5)


@pytest.mark.parametrize("value", ["Current", "1e-4", None, True, [1], (0.9,), float("nan"), torch.tensor([1.0, 2.0])])
def test_a_rate_is_a_number(value: Any, tmp_path: Path) -> None:
    model, optimizer = two((0.25, 0.25))
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    with pytest.raises(OptionError) as caught:
        load_optimizer(optimizer, model, tmp_path / "o.safetensors", options={"lr": value})
    assert str(caught.value) == f"options={{'lr': {value!r}}}: expected a finite number, 'saved' or 'current'"


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [("betas", 0.9, "2 values"), ("maximize", 1, "True or False"), ("foreach", True, None)],
)
def test_an_option_keeps_its_kind(option: str, value: Any, expected: str | None, tmp_path: Path) -> None:
    model, optimizer = two((0.25, 0.25))
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    with pytest.raises(OptionError) as caught:
        load_optimizer(optimizer, model, tmp_path / "o.safetensors", options={option: value})
    if expected:
        assert str(caught.value) == f"options={{{option!r}: {value!r}}}: expected {expected}, 'saved' or 'current'"


def test_slots_are_checked_against_the_options_that_a_load_leaves(tmp_path: Path) -> None:
    model, optimizer = two((0.25, 0.25))
    for parameter in model.values():
        parameter.grad = torch.ones(2)
    optimizer.step()
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    with pytest.raises(BindError) as caught:
        load_optimizer(optimizer, model, tmp_path / "o.safetensors", options={"amsgrad": True})
    assert "AdamW needs the slot 'max_exp_avg_sq'" in str(caught.value)
    live = torch.optim.AdamW(model.values(), amsgrad=True)
    load_optimizer(live, model, tmp_path / "o.safetensors")  # the file's amsgrad is off, and so it is now
    live.step()
    assert live.param_groups[0]["amsgrad"] is False


# --- carried, and what belongs to no parameter ------------------------------------------------------------------------


def carrying(tmp_path: Path) -> tuple[Any, torch.optim.Optimizer, torch.Tensor]:
    """A model whose 'b' is frozen, its state carried; and what that state's first moment is."""
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(2)) for name in "ab"})
    optimizer = torch.optim.AdamW(model.values())
    for parameter in model.values():
        parameter.grad = torch.full((2,), 3.0)
    optimizer.step()
    moment = optimizer.state[model["b"]]["exp_avg"].clone()
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    model["b"].requires_grad_(False)
    live = torch.optim.AdamW([model["a"]])
    load_optimizer(live, model, tmp_path / "o.safetensors", unexpected="carry")
    return model, live, moment


def moments(path: Path) -> dict[str, Any]:
    with reading.open_state(path) as state:
        return {name: p["exp_avg"].torch() for name, p in state.items() if p.state}


def test_carried_state_is_there_when_its_parameter_comes_back(tmp_path: Path) -> None:
    model, live, moment = carrying(tmp_path)
    model["b"].requires_grad_(True)
    live.add_param_group({"params": [model["b"]]})
    save_optimizer(live, model, tmp_path / "next.safetensors")
    assert torch.equal(moments(tmp_path / "next.safetensors")["b"], moment)
    load_optimizer(live, model, tmp_path / "next.safetensors")
    assert torch.equal(live.state[model["b"]]["exp_avg"], moment)
    model["b"].grad = torch.ones(2)
    live.step()
    save_optimizer(live, model, tmp_path / "next.safetensors")
    assert torch.equal(moments(tmp_path / "next.safetensors")["b"], live.state[model["b"]]["exp_avg"])


def test_carried_state_outlives_the_optimizer_object(tmp_path: Path) -> None:
    model, live, moment = carrying(tmp_path)
    rebuilt = torch.optim.AdamW([model["a"]])
    rebuilt.load_state_dict(live.state_dict())
    save_optimizer(rebuilt, model, tmp_path / "next.safetensors")
    assert torch.equal(moments(tmp_path / "next.safetensors")["b"], moment)
    other = torch.optim.AdamW([model["b"]])
    save_optimizer(other, model, tmp_path / "other.safetensors")
    assert "a" not in moments(tmp_path / "other.safetensors"), "another optimizer of the model carries nothing"


def test_carried_state_is_renamed_as_the_caller_says(tmp_path: Path) -> None:
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(2)) for name in "ab"})
    optimizer = torch.optim.AdamW(model.values())
    for parameter in model.values():
        parameter.grad = torch.ones(2)
    optimizer.step()
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")
    wrapped = nn.ModuleDict({"net": model})
    live = torch.optim.AdamW([model["a"]])
    load_optimizer(live, wrapped, tmp_path / "o.safetensors", unexpected="carry", rename=[("^", "net.")])
    save_optimizer(live, wrapped, tmp_path / "next.safetensors")
    assert list(moments(tmp_path / "next.safetensors")) == ["net.a", "net.b"]


def keyed(parameters: list[Any], value: float | None = None) -> Any:
    """An optimizer that keeps something under a key of its own."""
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    if value is not None:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.state["k"] = torch.tensor([value])  # type: ignore[index]
    return optimizer


def test_what_belongs_to_no_parameter_goes_where_the_parameters_go(tmp_path: Path) -> None:
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(2)) for name in "ab"})
    path = tmp_path / "o.safetensors"
    save_optimizer([keyed([model["a"]], 1.0), keyed([model["b"]], 2.0)], model, path)
    of_b, of_a = keyed([model["b"]]), keyed([model["a"]])
    of_a.state["old"] = 1
    load_optimizer([of_b, of_a], model, path)
    assert (float(of_a.state["k"]), float(of_b.state["k"])) == (1.0, 2.0)
    assert "old" not in of_a.state
    one = keyed(list(model.values()))
    with pytest.raises(BindError) as caught:
        load_optimizer(one, model, path)
    sgd = "torch.optim.sgd.SGD"
    stated = [
        f"  optimizer {n} of the file, {sgd}, keeps k, which belongs to no parameter; its parameters are not those of "
        "one live optimizer"
        for n in (0, 1)
    ]
    assert str(caught.value).splitlines()[1:] == [
        *stated,
        "hint: build the optimizers over the parameters that the saved ones had",
        "hint: missing='fresh' goes on without it",
    ]
    load_optimizer(one, model, path, missing="fresh")
    assert "k" not in one.state
