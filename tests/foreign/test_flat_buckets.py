"""Flat buckets without names: what the weights prove, what Megatron's order decides, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from lora_state_format.errors import AmbiguousOrderError, RefusedError
from lora_state_format.foreign.flat_buckets import Bucket, take_apart
from lora_state_format.model.sources import Memory
from lora_state_format.model.tensors import Box, Piece, Tensor, contiguous

WAY_OUT = "save with Megatron's --dist-ckpt-optim-fully-reshardable"


def stored(tensor: torch.Tensor) -> Tensor:
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else b""
    return contiguous("BF16" if tensor.dtype is torch.bfloat16 else "F32", tuple(tensor.shape), Memory(data))


def flat(parts: Sequence[torch.Tensor]) -> Tensor:
    """A bucket's slot: the parts end to end, each a chunk of its own."""
    pieces, start = [], 0
    for part in parts:
        pieces.append(Piece(stored(part.flatten()), 0, Box((start,), (part.numel(),))))
        start += part.numel()
    return Tensor("F32", (start,), tuple(pieces))


def bucket(masters: Sequence[torch.Tensor], domain: str = "optimizer 0, dp_group_idx 0, gbuf_idx 0") -> Bucket:
    return Bucket(domain, {"param": flat(masters), "exp_avg": flat([master + 1 for master in masters])})


def in_bf16(masters: dict[str, torch.Tensor]) -> dict[str, Tensor]:
    return {name: stored(master.bfloat16()) for name, master in masters.items()}


def test_names_come_from_the_weights_whatever_the_order() -> None:
    torch.manual_seed(0)
    masters = {"a": torch.randn(8, 3), "b": torch.randn(70), "c": torch.randn(2, 12), "frozen": torch.randn(90)}
    held = [masters["c"], torch.full((40,), 3.25), masters["a"], masters["b"]]  # 40 elements of padding
    state, told = take_apart([bucket(held)], in_bf16(masters), "x")
    assert told == 0
    assert state.keys() == {"a", "b", "c"}
    for name, slots in state.items():
        assert torch.equal(slots["param"].torch(), masters[name])
        assert torch.equal(slots["exp_avg"].torch(), masters[name] + 1)


def test_equal_weights_follow_megatrons_order() -> None:
    torch.manual_seed(0)
    layer = "decoder.layers.{}.self_attention.linear_{}"
    masters = {}
    for number in (0, 1):
        masters[layer.format(number, "qkv.layer_norm_weight")] = torch.ones(16) + 1e-5 * (1 + number)
        masters[layer.format(number, "proj.weight")] = torch.randn(16, 16)
    masters["decoder.final_layernorm.weight"] = torch.ones(16)
    state, told = take_apart([bucket(list(masters.values())[::-1])], in_bf16(masters), "x")
    assert told == 3
    for name, slots in state.items():
        assert torch.equal(slots["param"].torch(), masters[name])


def test_equal_weights_without_a_known_order_are_refused() -> None:
    torch.manual_seed(0)
    masters = {"vision.norm1.weight": torch.ones(16), "vision.norm2.weight": torch.ones(16), "a": torch.randn(4, 4)}
    with pytest.raises(AmbiguousOrderError) as error:
        take_apart([bucket(list(masters.values())[::-1])], in_bf16(masters), "folder/.metadata")
    assert str(error.value) == (
        "folder/.metadata: in optimizer 0, dp_group_idx 0, gbuf_idx 0 the 16 elements from 16 on equal the weights of "
        f"2 parameters (vision.norm1.weight, vision.norm2.weight), and no assignments fit Megatron's order: {WAY_OUT}"
    )
    assert error.value.candidates == ("vision.norm1.weight", "vision.norm2.weight")


def test_what_equals_no_weight_is_refused() -> None:
    torch.manual_seed(0)
    masters = {"a": torch.randn(8, 8), "b": torch.randn(70)}
    weights = {**in_bf16(masters), "b": stored(torch.randn(70).bfloat16())}
    with pytest.raises(RefusedError) as error:
        take_apart([bucket(list(masters.values()))], weights, "folder/.metadata")
    assert str(error.value) == (
        "folder/.metadata: optimizer 0, dp_group_idx 0, gbuf_idx 0 holds 70 elements from 64 on that equal no weight "
        f"of the model in this folder: {WAY_OUT}"
    )


def test_a_parameter_that_may_be_in_the_padding_is_refused() -> None:
    torch.manual_seed(0)
    masters = {"a": torch.randn(8, 8), "b": torch.randn(10)}
    weights = {**in_bf16(masters), "b": stored(torch.randn(10).bfloat16())}
    with pytest.raises(RefusedError) as error:
        take_apart([bucket(list(masters.values()))], weights, "folder/.metadata")
    assert (
        str(error.value) == f"folder/.metadata: 0 of the shards of 'b' are in the buckets, by their weights: {WAY_OUT}"
    )


def test_a_bucket_without_masters_is_refused() -> None:
    given = Bucket("optimizer 0, dp_group_idx 0, gbuf_idx 0", {"exp_avg": flat([torch.zeros(64)])})
    with pytest.raises(RefusedError) as error:
        take_apart([given], {}, "folder/.metadata")
    assert str(error.value) == (
        "folder/.metadata: optimizer 0, dp_group_idx 0, gbuf_idx 0 has no fp32 master weights ('param') of the size of "
        f"its other slots, and nothing else tells its parameters apart: {WAY_OUT}"
    )
