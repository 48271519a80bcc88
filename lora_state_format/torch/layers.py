"""What PEFT's layers say of the axes of an adapter's parameters: their rank, their experts, their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from lora_state_format.binding.live import Layer
from lora_state_format.binding.resizing import fold
from lora_state_format.naming.names import split_adapter

__all__ = ["layer_of"]

TOKENS: Final = "trainable_tokens_delta"


def layer_of(name: str, shape: tuple[int, ...], module: Any, path: str, configs: Mapping[str, Any]) -> Layer | None:
    """Return what the layer around a parameter says of it; ``None`` for parameters that are no adapter's.

    Args:
        name: The parameter's name.
        shape: Its shape.
        module: The layer, which holds the adapter's modules and parameters.
        path: The layer's own name in the model.
        configs: The adapters' configurations by name, as a ``PeftModel`` has them.
    """
    parts = split_adapter(name)
    if parts is None:
        return None
    kind, adapter = parts[0].rpartition(".")[2], parts[1]
    tokens = getattr(module, "token_indices", None)
    if kind == TOKENS and isinstance(tokens, Mapping) and adapter in tokens:
        return Layer(tokens=tuple(int(token) for token in tokens[adapter]))
    if not kind.startswith("lora_"):
        return None
    scales = getattr(module, "scaling", None)
    scale = float(scales[adapter]) if isinstance(scales, dict) and adapter in scales else None
    masks = hasattr(module, "ranknum")
    kept = _kept(path, adapter, configs.get(adapter)) if masks else None
    return Layer(scale, fold(kind, shape, int(getattr(module, "num_experts", 1))), masks, kept)


def _kept(path: str, adapter: str, config: Any) -> tuple[int, ...] | None:
    """Return the ranks that AdaLoRA kept of a layer, as ``rank_pattern`` in its configuration says."""
    pattern = getattr(config, "rank_pattern", None)
    for key, mask in (pattern or {}).items():
        layer = key.removesuffix(f".{adapter}").removesuffix(".lora_E")
        if path == layer or path.endswith(f".{layer}"):
            flat = mask.reshape(-1).tolist() if isinstance(mask, torch.Tensor) else mask
            return tuple(index for index, held in enumerate(flat) if held)
    return None
