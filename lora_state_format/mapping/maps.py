"""Names and axes of other libraries against torch's, as data.

``apply`` applies a map and inverts it. Every step of a rule is a permutation of elements.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, OptionError
from lora_state_format.io.json_files import read_json
from lora_state_format.mapping.cuts import CUTS

__all__ = ["FIELD", "MAPS", "Map", "MapRule", "load"]

FIELD: Final = re.compile(r"\{(\w+)(?:\+(\d+))?\}")
"""A field in a name, and what a foreign number has more than ours: ``{layer+2}``."""


def fields_of(template: str) -> set[str]:
    """Return the fields in a name."""
    return {match[1] for match in FIELD.finditer(template)}


@dataclass(frozen=True, slots=True)
class MapRule:
    """A foreign name and ours, and the way from the foreign axes to ours.

    A ``{field}`` stands for the same text in both names: ``{path}`` for any number of segments, ``{layer}`` for a
    number, ``{kind}`` for ``weight`` or ``bias``, others for one segment. ``{adapter}``, in ours only, is the adapter:
    ``default`` on the way here.

    First, ``unstack`` is the axis along which layers are stacked; the position in it becomes ``{layer}``. Then
    ``merge`` makes all axes but the last (``leading``), or but the first (``trailing``), one. Then ``axes`` gives
    for each of our axes its number there: ``[1, 0]`` transposes. ``refuse`` is why such a parameter does not convert.

    A matrix that is several of ours has its rows cut, and ``{part}`` in ours is each of ``parts`` in turn. ``cut`` says
    how: ``equal``, each has as many rows; ``square``, the first has as many as there are columns, the others share the
    rest; ``heads``, all queries, then all keys, then all values; ``groups``, the same for each query group in turn.
    The last two ask for the number of heads.
    """

    foreign: str
    ours: str = ""
    unstack: int | None = None
    merge: str | None = None
    axes: tuple[int, ...] | None = None
    refuse: str | None = None
    parts: tuple[str, ...] = ()
    cut: str = "equal"

    @property
    def leads_back(self) -> bool:
        """Whether our name says the foreign one."""
        return not self.parts and fields_of(self.foreign) <= fields_of(self.ours)

    @property
    def moves(self) -> bool:
        """Whether elements change their places."""
        turned = self.axes is not None and list(self.axes) != sorted(self.axes)
        return turned or self.unstack is not None or self.merge is not None or bool(self.parts)


@dataclass(frozen=True, slots=True)
class Map:
    """The rules of a library. The first that fits a name and its number of axes counts."""

    name: str
    summary: str
    rules: tuple[MapRule, ...] = field(repr=False)


# --- maps as data -------------------------------------------------------------------------------------------------


def _lora(a: str, b: str, ours: str, *, unstack: int | None = None, merge: bool = False) -> tuple[MapRule, MapRule]:
    """Factors [in, r] and [r, out], which PEFT has as [r, in] and [out, r]."""
    return (
        MapRule(a, f"base_model.model.{ours}.lora_A.{{adapter}}.weight", unstack, "leading" if merge else None, (1, 0)),
        MapRule(
            b, f"base_model.model.{ours}.lora_B.{{adapter}}.weight", unstack, "trailing" if merge else None, (1, 0)
        ),
    )


_LAYER: Final = "model.layers.{layer}"
_MAXTEXT: Final = {
    "self_attention.query": "self_attn.q_proj", "self_attention.key": "self_attn.k_proj",
    "self_attention.value": "self_attn.v_proj", "self_attention.out": "self_attn.o_proj",
    "mlp.wi_0": "mlp.gate_proj", "mlp.wi_1": "mlp.up_proj", "mlp.wo": "mlp.down_proj",
}  # fmt: skip
_NORMS: Final = ("input_layernorm", "post_attention_layernorm")
_BLOOM: Final = (
    *_NORMS, "self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h",
)  # fmt: skip
_NEOX: Final = (*_NORMS, "attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_LATER_NEOX: Final = {"mlp.linear1": "mlp.dense_h_to_4h", "mlp.linear2": "mlp.dense_4h_to_h"}
_QKV: Final = ("q", "k", "v")


def _layers(foreign: str, ours: str, modules: Mapping[str, str]) -> tuple[MapRule, ...]:
    """Modules of a layer, by the names of their weights and biases."""
    return tuple(MapRule(f"{foreign}.{theirs}.{{kind}}", f"{ours}.{own}.{{kind}}") for theirs, own in modules.items())


def _gpt_neox(prefix: str) -> tuple[MapRule, ...]:
    """Layers of GPT-NeoX's pipeline, or of the same as one module: 0 embeds, 2 is the first layer."""
    return (
        *_layers(f"{prefix}{{layer+2}}", "gpt_neox.layers.{layer}", {**{name: name for name in _NEOX}, **_LATER_NEOX}),
        MapRule(f"{prefix}0.word_embeddings.weight", "gpt_neox.embed_in.weight"),
        MapRule(f"{prefix}tied_modules.embed.word_embeddings.weight", "gpt_neox.embed_in.weight"),
        MapRule(f"{prefix}{{layer}}.norm.{{kind}}", "gpt_neox.final_layer_norm.{kind}"),
        MapRule(f"{prefix}{{layer}}.final_linear.weight", "lm_head.weight"),
    )


_OLMO: Final = (
    MapRule(
        "transformer.blocks.{layer}.att_proj.weight", f"{_LAYER}.self_attn.{{part}}_proj.weight",
        parts=_QKV, cut="square",
    ),
    MapRule(
        "transformer.blocks.{layer}.ff_proj.weight", f"{_LAYER}.mlp.{{part}}_proj.weight", parts=("up", "gate"),
    ),
    MapRule("transformer.blocks.{layer}.attn_out.weight", f"{_LAYER}.self_attn.o_proj.weight"),
    MapRule("transformer.blocks.{layer}.ff_out.weight", f"{_LAYER}.mlp.down_proj.weight"),
    MapRule("transformer.wte.weight", "model.embed_tokens.weight"),
    MapRule("transformer.ff_out.weight", "lm_head.weight"),
)  # fmt: skip
_LITGPT: Final = {
    "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj",
    "attn.norm_q": "self_attn.q_norm", "attn.norm_k": "self_attn.k_norm", "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj", "mlp.swiglu.w1": "mlp.gate_proj",
    "mlp.swiglu.w2": "mlp.up_proj", "mlp.swiglu.w3": "mlp.down_proj",
}  # fmt: skip
_MEGATRON: Final = "decoder.layers.{layer}"
_MEGATRON_LAYER: Final = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.experts.local_experts.{expert}.linear_fc2.weight": "mlp.experts.{expert}.down_proj.weight",
}
_SHARED: Final = "keys and values share this lora_a, so its moments are those of two matrices of PEFT at once"
_SCALED: Final = "it is scaled by the root of the head's size, and its moments with it, which is not a permutation"
_ROTARY: Final = "its outputs are interleaved for rotary embeddings, which no rule here undoes"

MAPS: Final = (
    Map("flax_nnx", "flax.nnx.LoRA around a module; EasyDeL", _lora("{path}.lora_a", "{path}.lora_b", "{path}")),
    Map("flax_nnx_linear", "flax.nnx.LoRALinear", _lora("{path}.lora.lora_a", "{path}.lora.lora_b", "{path}")),
    Map(
        "flax_linen",
        "flax.linen without LoRA: Dense, Conv, norms, Embed",
        (
            MapRule("{path}.kernel", "{path}.weight", axes=(1, 0)),
            MapRule("{path}.kernel", "{path}.weight", axes=(3, 2, 0, 1)),
            MapRule("{path}.scale", "{path}.weight", axes=(0,)),
            MapRule("{path}.bias", "{path}.bias", axes=(0,)),
            MapRule("{path}.embedding", "{path}.weight", axes=(0, 1)),
        ),
    ),
    Map("qwix", "qwix", _lora("{path}.kernel_lora_a", "{path}.kernel_lora_b", "{path}", merge=True)),
    Map(
        "tunix",
        "tunix's Llama and Qwen, with qwix",
        (
            MapRule("{path}.kv_einsum.w_lora_{factor}", refuse=_SHARED),
            *_lora(
                "layers.{layer}.attn.{name}.w_lora_a", "layers.{layer}.attn.{name}.w_lora_b",
                f"{_LAYER}.self_attn.{{name}}", merge=True,
            ),
            *_lora(
                "layers.{layer}.mlp.{name}.kernel_lora_a", "layers.{layer}.mlp.{name}.kernel_lora_b",
                f"{_LAYER}.mlp.{{name}}", merge=True,
            ),
        ),
    ),
    Map("gemma", "google-deepmind's gemma", _lora("{path}.lora.a", "{path}.lora.b", "{path}", merge=True)),
    Map(
        "maxtext",
        "MaxText's Llama with qwix, layers scanned along axis 1",
        (
            MapRule("decoder.layers.self_attention.query.kernel_lora_b", refuse=_SCALED),
            MapRule("decoder.layers.self_attention.key.kernel_lora_b", refuse=_ROTARY),
            *(
                rule
                for theirs, ours in _MAXTEXT.items()
                for rule in _lora(
                    f"decoder.layers.{theirs}.kernel_lora_a", f"decoder.layers.{theirs}.kernel_lora_b",
                    f"{_LAYER}.{ours}", unstack=1, merge=True,
                )
            ),
        ),
    ),
    Map(
        "levanter",
        "Levanter, whose layers are stacked along axis 0",
        tuple(
            MapRule(
                f"transformer.layers.stacked.{{path}}.lora.{factor}.weight",
                f"base_model.model.{_LAYER}.{{path}}.{factor}.{{adapter}}.weight",
                unstack=0, axes=(0, 1),
            )
            for factor in ("lora_A", "lora_B")
        ),
    ),
    Map("lorax", "lorax, whose a and b are PEFT's B and A", _lora("{path}.kernel.b", "{path}.kernel.a", "{path}")),
    Map(
        "mlx_lm",
        "mlx-lm, unsloth on MLX: LoRA, DoRA and embeddings",
        (
            MapRule(
                "{path}.embed_tokens.lora_a", "base_model.model.{path}.embed_tokens.lora_embedding_A.{adapter}",
                axes=(1, 0),
            ),
            MapRule(
                "{path}.embed_tokens.lora_b", "base_model.model.{path}.embed_tokens.lora_embedding_B.{adapter}",
                axes=(1, 0),
            ),
            *_lora("{path}.lora_a", "{path}.lora_b", "{path}"),
            MapRule("{path}.m", "base_model.model.{path}.lora_magnitude_vector.{adapter}.weight", axes=(0,)),
        ),
    ),
    Map("paddlenlp", "PaddleNLP and PaddleFormers", _lora("{path}.lora_A", "{path}.lora_B", "{path}")),
    Map(
        "gpt_neox",
        "GPT-NeoX (Pythia), pipeline layers, to GPTNeoXForCausalLM, whose lm_head was embed_out in transformers 4; "
        "query_key_value stays fused, as it is there",
        tuple(rule for prefix in ("", "sequential.") for rule in _gpt_neox(prefix)),
    ),
    Map(
        "bloom",
        "Megatron-DeepSpeed (BLOOM), pipeline layers, to BloomForCausalLM; query_key_value stays fused, as it is there",
        (
            *_layers("{layer+3}", "transformer.h.{layer}", {name: name for name in _BLOOM}),
            MapRule("{layer}.{kind}", "transformer.ln_f.{kind}", axes=(0,)),
            *(
                rule
                for prefix in ("tied_modules.embed.", "1.")
                for rule in (
                    MapRule(f"{prefix}word_embeddings.weight", "transformer.word_embeddings.weight"),
                    MapRule(f"{prefix}word_embeddings.norm.{{kind}}", "transformer.word_embeddings_layernorm.{kind}"),
                )
            ),
        ),
    ),
    Map(
        "olmo",
        "OLMo before 2, to OlmoForCausalLM; queries, keys, values and both halves of SwiGLU are cut apart",
        _OLMO,
    ),
    Map(
        "olmo2",
        "OLMo 2, to Olmo2ForCausalLM; queries, keys, values and both halves of SwiGLU are cut apart",
        (
            *_OLMO,
            MapRule("transformer.ln_f.weight", "model.norm.weight"),
            MapRule("transformer.blocks.{layer}.attn_norm.weight", f"{_LAYER}.post_attention_layernorm.weight"),
            MapRule("transformer.blocks.{layer}.ff_norm.weight", f"{_LAYER}.post_feedforward_layernorm.weight"),
            *_layers(
                "transformer.blocks.{layer}", _LAYER, {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
            ),
        ),
    ),
    Map(
        "litgpt",
        "Lit-GPT and TinyLlama, to LlamaForCausalLM and its kin; queries, keys and values are cut apart by heads",
        (
            MapRule(
                "transformer.h.{layer}.attn.qkv.{kind}", f"{_LAYER}.self_attn.{{part}}_proj.{{kind}}",
                parts=_QKV, cut="heads",
            ),
            MapRule(
                "transformer.h.{layer}.attn.attn.{kind}", f"{_LAYER}.self_attn.{{part}}_proj.{{kind}}",
                parts=_QKV, cut="groups",
            ),
            *_layers("transformer.h.{layer}", _LAYER, _LITGPT),
            MapRule("transformer.wte.weight", "model.embed_tokens.weight"),
            MapRule("transformer.ln_f.{kind}", "model.norm.{kind}"),
            MapRule("lm_head.{kind}", "lm_head.{kind}"),
        ),
    ),
    Map(
        "megatron",
        "Megatron-Core's GPT, to LlamaForCausalLM and its kin; what Megatron fused is cut apart, by heads",
        (
            MapRule(
                f"{_MEGATRON}.self_attention.linear_qkv.{{kind}}", f"{_LAYER}.self_attn.{{part}}_proj.{{kind}}",
                parts=_QKV, cut="groups",
            ),
            MapRule(
                f"{_MEGATRON}.mlp.linear_fc1.weight", f"{_LAYER}.mlp.{{part}}_proj.weight", parts=("gate", "up")
            ),
            MapRule(
                f"{_MEGATRON}.mlp.experts.local_experts.{{expert}}.linear_fc1.weight",
                f"{_LAYER}.mlp.experts.{{expert}}.{{part}}_proj.weight", parts=("gate", "up"),
            ),
            *(MapRule(f"{_MEGATRON}.{theirs}", f"{_LAYER}.{ours}") for theirs, ours in _MEGATRON_LAYER.items()),
            MapRule("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
            MapRule("decoder.final_layernorm.weight", "model.norm.weight"),
            MapRule("output_layer.weight", "lm_head.weight"),
        ),
    ),
)  # fmt: skip
"""The maps that are known, by library. ``spec/mappings.md`` says of each whether it was tried or read off a source."""


def load(name: str | os.PathLike[str]) -> Map:
    """Return a map by its name, or from a JSON file: ``{"name": ..., "summary": ..., "rules": [{"foreign": ...}]}``.

    Raises ``OptionError`` for a name that is neither a map nor a file, ``FileError`` for a file that does not hold a
    map.
    """
    for known in MAPS:
        if known.name == os.fspath(name):
            return known
    path = Path(name)
    if not path.is_file():
        raise OptionError(f"'{path}' is neither a map nor a file; the maps are: {', '.join(m.name for m in MAPS)}")
    members = read_json(path)
    try:
        rules = tuple(_rule(rule) for rule in members["rules"])
        return Map(str(members["name"]), str(members.get("summary", "")), rules)
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"not a map of names and layouts: {error}", path=path) from error


def _rule(members: Mapping[str, Any]) -> MapRule:
    """Return a rule from a file. Raises ``ValueError`` and ``TypeError``."""
    if strange := set(members) - {member.name for member in fields(MapRule)}:
        raise ValueError(f"a rule has the unknown member '{min(strange)}'")
    axes = members.get("axes")
    parts = tuple(map(str, members.get("parts", ())))
    rule = MapRule(**{**members, "axes": None if axes is None else tuple(axes), "parts": parts})
    layers = {"layer"} if rule.unstack is not None else {"part"} if parts else set()
    if rule.refuse is None and fields_of(rule.foreign) | layers != fields_of(rule.ours) - {"adapter"}:
        raise ValueError(f"'{rule.foreign}' and '{rule.ours}' do not have the same fields")
    if rule.merge not in (None, "leading", "trailing") or sorted(rule.axes or ()) != list(range(len(rule.axes or ()))):
        raise ValueError(f"the rule of '{rule.foreign}' has an unknown merge, or axes that are not a permutation")
    _check_parts(rule)
    return rule


def _check_parts(rule: MapRule) -> None:
    """Check that a rule from a file cuts as it can. Raises ``ValueError``."""
    count = len(set(rule.parts))
    three = rule.cut in ("heads", "groups")
    if rule.cut not in CUTS or count != len(rule.parts) or count == 1 or (three and count != 3):
        raise ValueError(
            f"the rule of '{rule.foreign}' has an unknown cut, or other parts than it: two or more, and three by heads"
        )
    if rule.parts and (rule.unstack, rule.merge, rule.axes) != (None, None, None):
        raise ValueError(f"the rule of '{rule.foreign}' cuts parts, and moves axes too")
