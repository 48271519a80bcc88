"""Megatron-Core's parameters under the names and in the parts that Hugging Face's Llama, Qwen and their kin have.

Megatron keeps queries, keys and values in one matrix: for each query group, the rows of its heads' queries, then its
keys, then its values. A gated unit's two matrices stand one after the other, the activated one first. Both are cut
apart here; rows only change places. The layouts are those of ``core/transformer/attention.py`` and ``mlp.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from lora_state_format.errors import ConversionError, OptionError, Remedy
from lora_state_format.model.tensors import Box, Piece, Tensor

__all__ = ["Heads", "heads_of", "renamed"]

_TOP: Final[Mapping[str, str]] = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_LAYER: Final[Mapping[str, str]] = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
}
_NAME: Final = re.compile(r"(?:module\.)*decoder\.layers\.(\d+)\.(.*)")
_QKV: Final = re.compile(r"self_attention\.linear_qkv\.(weight|bias)")
_GATED: Final = re.compile(r"mlp\.(experts\.)?(?:local_experts\.(\d+)\.)?linear_fc1\.weight")
_DOWN: Final = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.linear_fc2\.weight")

OPTION: Final = {"options": {"huggingface": ...}}
"""The argument that states the heads."""

Heads = tuple[int, int]
"""Attention heads and query groups."""

_Rows = Sequence[tuple[int, int]]
"""Runs of rows: first row and count."""


def heads_of(text: object) -> Heads:
    """Return heads and query groups from ``32/8``, or ``32`` without groups. Raises ``OptionError``."""
    match = re.fullmatch(r"(\d{1,5})(?:/(\d{1,5}))?", str(text))
    heads, groups = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not groups or heads % groups:
        raise OptionError(f"huggingface={text!r}: attention heads and query groups are expected, as 32/8 or 32")
    return heads, groups


def renamed(state: Mapping[str, Mapping[str, Any]], heads: Heads) -> dict[str, dict[str, Any]]:
    """Return slots by Hugging Face's names, fused parameters in their parts.

    Raises:
        ConversionError: a parameter that those models do not have, or whose rows are not those of so many heads.
    """
    result: dict[str, dict[str, Any]] = {}
    for name, slots in state.items():
        shape = next(value.shape for value in slots.values() if isinstance(value, Tensor) and value.shape)
        for new, rows in _parts(name, shape[0], heads):
            result[new] = {
                slot: _rows(value, rows) if rows and isinstance(value, Tensor) and value.shape else value
                for slot, value in slots.items()
            }
    return result


def _parts(name: str, size: int, heads: Heads) -> Iterator[tuple[str, _Rows]]:
    """Yield the names of a parameter's parts, and the rows of each; no rows for a parameter that stays whole."""
    match = _NAME.fullmatch(name)
    rest = match[2] if match else ""
    prefix = f"model.layers.{match[1]}." if match else ""
    if (whole := _TOP.get(re.sub(r"^(?:module\.)+", "", name))) is not None:
        yield whole, ()
    elif rest in _LAYER:
        yield prefix + _LAYER[rest], ()
    elif expert := _DOWN.fullmatch(rest):
        yield f"{prefix}mlp.experts.{expert[1]}.down_proj.weight", ()
    elif qkv := _QKV.fullmatch(rest):
        for kind, rows in zip("qkv", _qkv(name, size, heads), strict=True):
            yield f"{prefix}self_attn.{kind}_proj.{qkv[1]}", rows
    elif (gated := _GATED.fullmatch(rest)) and size % 2 == 0:
        inner = f"experts.{gated[2]}." if gated[1] else ""
        for part, first in (("gate_proj", 0), ("up_proj", size // 2)):
            yield f"{prefix}mlp.{inner}{part}.weight", [(first, size // 2)]
    else:
        raise ConversionError(
            f"'{name}' has no name in Hugging Face's Llama and Qwen",
            remedy=Remedy("read the checkpoint without {options}", OPTION),
        )


def _qkv(name: str, size: int, heads: Heads) -> tuple[_Rows, _Rows, _Rows]:
    count, groups = heads
    width, rest = divmod(size, count + 2 * groups)
    if rest:
        raise ConversionError(
            f"'{name}' has {size} rows, which {count} heads of {groups} query groups do not divide",
            remedy=Remedy("correct {options}", OPTION),
        )
    own = count // groups
    block = (own + 2) * width
    return (
        [(group * block, own * width) for group in range(groups)],
        [(group * block + own * width, width) for group in range(groups)],
        [(group * block + (own + 1) * width, width) for group in range(groups)],
    )


def _rows(tensor: Tensor, runs: _Rows) -> Tensor:
    """Return the runs of rows of a tensor, one after the other."""
    rest = tensor.shape[1:]
    pieces, position = [], 0
    for first, count in runs:
        part = tensor.part((first, *(0 for _ in rest)), (count, *rest))
        pieces.append(Piece(part, 0, Box((position, *(0 for _ in rest)), (count, *rest))))
        position += count
    return Tensor(tensor.dtype, (position, *rest), tuple(pieces))
