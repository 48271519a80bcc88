"""An adapter's weights in a model with another rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lora_state_format.errors import BindError
from lora_state_format.torch import resize_adapter


def build(rank: int, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Embedding(5, 4), torch.nn.Conv2d(2, 3, 3))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0", "1", "2"], **options)
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(rank)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def products(model: PeftModel) -> list[torch.Tensor]:
    """What each layer adds to its base: its delta."""
    return [layer.get_delta_weight("default") for layer in model.base_model.model]


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_larger_rank_computes_the_same(tmp_path: Path, use_dora: bool) -> None:
    before = build(4, use_dora=use_dora)
    before.save_pretrained(tmp_path)
    wider = build(7, use_dora=use_dora)
    resize_adapter(wider, tmp_path)
    for old, new in zip(products(before), products(wider), strict=True):
        torch.testing.assert_close(new, old)
    own = dict(before.named_parameters())
    for name, parameter in wider.named_parameters():
        if "magnitude" in name:
            assert torch.equal(parameter, own[name])


def test_a_smaller_rank_is_cut(tmp_path: Path) -> None:
    before = build(4)
    before.save_pretrained(tmp_path)
    narrow = build(2)
    resize_adapter(narrow, tmp_path / "adapter_model.safetensors")
    own = dict(before.named_parameters())
    for name, parameter in narrow.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, own[name][tuple(map(slice, parameter.shape))])


def test_more_than_the_rank_differs(tmp_path: Path) -> None:
    build(4).save_pretrained(tmp_path)
    other = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 6)), LoraConfig(r=4, target_modules=["0"]))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(BindError) as caught:
        resize_adapter(other, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: 'base_model.model.0.lora_A.weight' has shape [4, 4], and "
        "'base_model.model.0.lora_A.default.weight' in the model [4, 3]: more than the rank differs"
    )
    with pytest.raises(BindError) as caught:
        resize_adapter(other, tmp_path, adapter="other")
    assert str(caught.value) == (
        f"{tmp_path}: 'base_model.model.0.lora_A.weight' is not in the model's adapter 'other', which has 0 weights"
    )
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
