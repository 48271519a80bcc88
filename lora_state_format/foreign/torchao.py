"""Pickled tensors of torchao's as mappings, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from lora_state_format.foreign.pickles import DTYPES, Global, Record
from lora_state_format.model.tensors import c_strides

if TYPE_CHECKING:
    pass
from lora_state_format.optimizers.quantised import TORCHAO

__all__ = ["pack_torchao", "unpack_torchao"]

_CLASSES: Final = ("OptimState8bit", "OptimState4bit", "OptimStateFp8")


# --- torchao's tensors --------------------------------------------------------------------------------------------


def unpack_torchao(record: Record) -> dict[str, Any] | None:
    """Return a pickled tensor of torchao's as a mapping; ``None`` for any other object."""
    if not record.module.startswith("torchao.") or record.name not in _CLASSES or not isinstance(record.state, dict):
        return None
    match record.args:
        case (Record("torch._utils", "_rebuild_wrapper_subclass", (_, Global("torch", dtype), tuple(shape), *_)),):
            # Older classes keep their shape too.
            kept = {key: value for key, value in record.state.items() if key != "_shape"}
            return {
                TORCHAO: f"{record.module}.{record.name}",
                "dtype": DTYPES.get(dtype, dtype),
                "shape": shape,
                **kept,
            }
    return None


def pack_torchao(tree: Mapping[str, Any]) -> Record:
    """Return the object that torch pickles for such a mapping, and rebuilds with torchao imported."""
    module, _, name = tree[TORCHAO].rpartition(".")
    shape = tuple(tree["shape"])
    dtype = next((name for name, spelled in DTYPES.items() if spelled == tree["dtype"]), tree["dtype"])
    state = {key: value for key, value in tree.items() if key not in (TORCHAO, "dtype", "shape")}
    if name == "OptimState4bit":
        state = {**state, "_shape": Record("torch", "Size", (shape,))}
    args = (
        Global(module, name),
        Global("torch", dtype),
        Record("torch", "Size", (shape,)),
        c_strides(shape),
        0,
        Record("torch.serialization", "_get_layout", ("torch.strided",)),
        Record("torch", "device", ("cpu",)),
        False,
    )
    rebuild = Global("torch._utils", "_rebuild_wrapper_subclass")
    return Record("torch._tensor", "_rebuild_from_type_v2", (rebuild, Global(module, name), args, state))
