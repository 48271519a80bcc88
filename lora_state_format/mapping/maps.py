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

__all__ = ["FIELD", "MAPS", "Map", "MapRule", "load"]

FIELD: Final = re.compile(r"\{(\w+)\}")
"""A field in a name."""


@dataclass(frozen=True, slots=True)
class MapRule:
    """A foreign name and ours, and the way from the foreign axes to ours.

    A ``{field}`` stands for the same text in both names: ``{path}`` for any number of segments, ``{layer}`` for a
    number, others for one segment. ``{adapter}``, in ours only, is the adapter: ``default`` on the way here.

    First, ``unstack`` is the axis along which layers are stacked; the position in it becomes ``{layer}``. Then
    ``merge`` makes all axes but the last (``leading``), or but the first (``trailing``), one. Then ``axes`` gives
    for each of our axes its number there: ``[1, 0]`` transposes. ``refuse`` is why such a parameter does not convert.
    """

    foreign: str
    ours: str = ""
    unstack: int | None = None
    merge: str | None = None
    axes: tuple[int, ...] | None = None
    refuse: str | None = None

    @property
    def moves(self) -> bool:
        """Whether elements change their places."""
        turned = self.axes is not None and list(self.axes) != sorted(self.axes)
        return turned or self.unstack is not None or self.merge is not None


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
    rule = MapRule(**{**members, "axes": None if axes is None else tuple(axes)})
    stated = {*FIELD.findall(rule.foreign), *(["layer"] if rule.unstack is not None else [])}
    asked = set(FIELD.findall(rule.ours)) - {"adapter"}
    if rule.refuse is None and stated != asked:
        raise ValueError(f"'{rule.foreign}' and '{rule.ours}' do not have the same fields")
    if rule.merge not in (None, "leading", "trailing") or sorted(rule.axes or ()) != list(range(len(rule.axes or ()))):
        raise ValueError(f"the rule of '{rule.foreign}' has an unknown merge, or axes that are not a permutation")
    return rule
