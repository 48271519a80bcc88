"""The order in which well-known architectures register their modules, as data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from lora_state_format.errors import MissingNamesError

__all__ = ["ORDERS", "Order", "in_module_order"]


# --- the order of modules -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Order:
    """Sibling modules, in the order in which a model defines them.

    ``parent`` is searched for in the path of the module around them. ``models`` is searched for, in any case, in the
    base model's name; a row with a fitting ``models`` goes before all rows without one.
    """

    children: tuple[str, ...]
    parent: str = ""
    models: str = ""


def _rows(*rows: str, parent: str = "", models: str = "") -> tuple[Order, ...]:
    return tuple(Order(tuple(row.split()), parent, models) for row in rows)


_STACK: Final = r"(^|\.)(model|language_model|encoder|decoder)\.layers\.\d+"

_KEY_FIRST: Final = "k_proj v_proj q_proj out_proj"

ORDERS: Final[tuple[Order, ...]] = (
    # PEFT's own modules
    *_rows(
        "base_layer lora_A lora_B lora_embedding_A lora_embedding_B lora_magnitude_vector",
        "base_layer lora_A lora_B lora_E",
        "base_layer vera_lambda_b vera_lambda_d",
        "base_layer hada_w1_a hada_w1_b hada_w2_a hada_w2_b",
        "base_layer lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b",
        "base_layer boft_R boft_s",
        "weight bias",
    ),
    # around the layers
    *_rows(
        "embed_tokens layers norm",
        "wte wpe h ln_f",
        "shared encoder decoder",
        "embeddings encoder pooler",
        "model lm_head",
        "model score",
        "transformer lm_head",
        "transformer score",
        "bert classifier",
        "roberta classifier",
        "deberta pooler classifier",
        "distilbert pre_classifier classifier",
    ),
    # a layer
    *_rows(
        "self_attn mlp input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm",
        "self_attn self_attn_layer_norm encoder_attn encoder_attn_layer_norm fc1 fc2 final_layer_norm",
        "self_attn block_sparse_moe",
        parent=_STACK + "$",
    ),
    *_rows("linear_attn mlp", parent=_STACK + "$", models="qwen"),
    *_rows("ln_1 attn ln_2 mlp", parent=r"(^|\.)h\.\d+$"),
    *_rows("attention mlp", "self_attention mlp", "attention intermediate output", "self output"),
    # attention; where only q, k or v are there, encoders and decoders may have either order
    *_rows("q_proj k_proj v_proj o_proj", parent=_STACK + r"\.(self_attn|encoder_attn|cross_attn)$"),
    *_rows("q_proj k_proj v_proj dense", parent=_STACK + r"\.self_attn$", models="phi"),
    *_rows(
        _KEY_FIRST,
        parent=r"(^|\.)(encoder|decoder|biogpt)\.layers\.\d+\.(self_attn|encoder_attn)$|(^|\.)h\.\d+\.attn",
    ),
    *_rows(
        _KEY_FIRST,
        parent=r"\.(self_attn|encoder_attn)$",
        models=r"whisper|(^|[/_-])(m|bio)?bart|(^|[/_-])opt([/_-]|$)|xglm|pegasus|marian|opus-mt|nllb|m2m|blenderbot",
    ),
    *_rows(
        "q_proj q_a_proj q_a_layernorm q_b_proj kv_a_proj_with_mqa kv_a_layernorm kv_b_proj o_proj",
        parent=_STACK + r"\.self_attn$",
        models="deepseek|minicpm3",
    ),
    *_rows(
        "dense out_proj",
        "o_proj qkv_proj",
        "query_key_value dense",
        "qkv_proj out_proj",
        "c_attn c_proj",
        "query key value",
        "query_proj key_proj value_proj",
        "q_lin k_lin v_lin out_lin",
        "q k v o",
    ),
    # the rest of a layer
    *_rows(
        "gate_proj up_proj down_proj",
        "gate_up_proj down_proj",
        "fc1 fc2",
        "fc_in fc_out",
        "c_fc c_proj",
        "dense_h_to_4h dense_4h_to_h",
        "lin1 lin2",
        "wi wi_0 wi_1 wo",
    ),
    *_rows("w1 w3 w2", parent=r"feed_forward$"),
    *_rows("w1 w2 w3", parent=r"block_sparse_moe\.experts\.\d+$"),
)
"""Known orders of modules. Where several rows hold names in different orders, these have no order."""


def in_module_order(names: Iterable[str], base_model: str = "") -> list[str]:
    """Return names in ``named_parameters()`` order: numbers as numbers, sibling modules as in ``ORDERS``.

    Raises ``MissingNamesError`` that names every set of modules whose order is not known.
    """
    unknown: dict[tuple[str, tuple[str, ...]], str] = {}

    def visit(parent: str, rest: Sequence[tuple[Sequence[str], str]]) -> list[str]:
        below: dict[str, list[tuple[Sequence[str], str]]] = {}
        for segments, name in rest:
            if not segments:
                return [name]
            below.setdefault(segments[0], []).append((segments[1:], name))
        children = _ordered(parent, list(below), base_model)
        if children is None:
            unknown.setdefault((re.sub(r"\d+", "*", parent), tuple(sorted(below))), parent)
            children = list(below)
        return [name for child in children for name in visit(f"{parent}.{child}" if parent else child, below[child])]

    result = visit("", [(name.split("."), name) for name in names])
    if unknown:
        lines = [f"\n  {', '.join(children)}  in '{parent}'" for (_, children), parent in unknown.items()]
        raise MissingNamesError(
            "the names are known, but not in which order the model defines these modules:" + "".join(lines) + "\n"
            "hint: name them by a live model, by the model's configs, or by a file of names in optimizer order"
        )
    return result


def _ordered(parent: str, children: list[str], base_model: str) -> list[str] | None:
    """Return the children in the order of all applicable rows; ``None`` if no row applies, or rows disagree."""
    if len(children) == 1:
        return children
    if all(child.isdecimal() for child in children):
        return sorted(children, key=int)
    rows = [row for row in ORDERS if set(children) <= set(row.children) and re.search(row.parent, parent)]
    named = [row for row in rows if row.models and re.search(row.models, base_model, re.IGNORECASE)]
    found = {tuple(c for c in row.children if c in children) for row in named or [r for r in rows if not r.models]}
    return list(found.pop()) if len(found) == 1 else None
