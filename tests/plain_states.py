"""What a state holds as plain values, to compare: that of the package, and that of ``spec/reader.py``."""

from __future__ import annotations

import struct
from collections.abc import Callable
from types import ModuleType
from typing import Any

from lora_state_format.model.states import OptimizerState, Scalar, Slot


def plain(value: Any, tensor: Callable[[Any], Any]) -> Any:
    """A value with its type, so that 1, 1.0 and true are three; ``tensor`` describes what is neither."""
    if value is None or isinstance(value, (bool, int, str, bytes)):
        return type(value).__name__, value
    if isinstance(value, float):
        return "float", struct.pack("<d", value).hex() if value == value else "nan"
    if type(value) in (list, tuple):
        return type(value).__name__, [plain(item, tensor) for item in value]
    if hasattr(value, "items"):
        pairs = ((plain(key, tensor), plain(item, tensor)) for key, item in value.items())
        return "mapping", sorted(pairs, key=repr)
    return tensor(value)


def of_state(state: OptimizerState) -> Any:
    def tensor(value: Any) -> Any:
        if isinstance(value, Scalar):
            return value.dtype, value.data
        assert isinstance(value, Slot)
        return value.tensor.dtype, list(value.tensor.shape), bytes(value.tensor.bytes()), value.role.value

    return {
        "optimizers": [(o.class_path, o.id) for o in state.optimizers],
        "groups": [
            (g.optimizer, g.count, g.name, [(name, plain(value, tensor)) for name, value in g.options])
            for g in state.groups
        ],
        "parameters": [
            (
                p.name, list(p.shape), p.dtype, p.adapter, list(p.tied), dict(p.foreign_names), p.original_id,
                plain(p.state, tensor),
            )
            for p in state.parameters
        ],
        "naming": (state.naming.source, state.naming.rule, plain(state.naming.details, tensor)),
        "step": state.global_step,
        **{key: plain(getattr(state, key), tensor) for key in ("globals", "origin", "extra", "extensions")},
    }  # fmt: skip


def of_other(state: Any, reader: ModuleType) -> Any:
    """The same of what ``spec/reader.py`` gives."""

    def tensor(value: Any) -> Any:
        if isinstance(value, reader.Scalar):
            return value.dtype, value.data
        place = state["tensors"][value.key]
        data = place.path.read_bytes()[place.offset : place.offset + place.size]
        return place.dtype, place.shape, data, value.role

    return {
        "optimizers": [(o["class"], o.get("id")) for o in state["optimizers"]],
        "groups": [
            (g["optimizer"], g["count"], g.get("name"), [(name, plain(value, tensor)) for name, value in g["options"]])
            for g in state["groups"]
        ],
        "parameters": [
            (
                p["name"], p["shape"], p.get("dtype"), p.get("adapter"), p.get("tied", []), p.get("keys", {}),
                reader.value_of(p.get("id")), plain(p["tree"], tensor),
            )
            for p in state["parameters"]
        ],
        "naming": (state["naming"]["source"], state["naming"].get("rule"), plain(state["naming"]["details"], tensor)),
        "step": state.get("global_step"),
        **{key: plain(state[key], tensor) for key in ("globals", "origin", "extra", "extensions")},
    }  # fmt: skip
