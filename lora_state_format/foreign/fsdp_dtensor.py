"""What Megatron-FSDP saves as ``fsdp_dtensor``: a state dict that states each parameter's options under its name.

It is a DCP folder (``optimizer/distrib_optimizer.py`` and ``transformer/fsdp_dtensor_checkpoint.py`` of Megatron-Core).
Names of the optimizer's have a wrapper's ``module.`` more than the model's. Of a gated unit's first matrix, state and
weights are in two halves, ``..._w`` and ``..._v``, that stood one above the other; its options are under one name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from lora_state_format.errors import FileError
from lora_state_format.model.tensors import Tensor, joined

__all__ = ["KEY", "state_dict", "under_its_names"]

KEY: Final = "param_to_group_meta"
"""What such a state dict has in place of ``param_groups``."""

_HALVES: Final = ("_w", "_v")


def state_dict(stated: Any, state: Any) -> dict[str, Any]:
    """Return the state dict with groups: the parameters that state the same options. Halves are joined.

    Args:
        stated: the options by name.
        state: the slots by name, lists in it being lists.

    Raises:
        FileError: one of them is no dict, or two halves have different slots or shapes.
    """
    if not isinstance(stated, dict) or not isinstance(state, dict):
        raise FileError("holds a param_to_group_meta or a state that is no dict")
    groups: list[dict[str, Any]] = []
    for name, options in stated.items():
        chosen = options if isinstance(options, dict) else {}
        for group in groups:
            if {key: value for key, value in group.items() if key != "params"} == chosen:
                group["params"].append(name)
                break
        else:
            groups.append({**chosen, "params": [name]})
    return {"state": _whole(state, stated), "param_groups": groups}


def under_its_names(weights: Mapping[str, Tensor], names: Iterable[object]) -> dict[str, Tensor]:
    """Return a folder's weights under the names of its optimizer, where they are of such a pair."""
    found = dict(weights)
    for name in map(str, names):
        own = name.removeprefix("module.")
        halves = [own + half for half in _HALVES]
        if name in found:
            continue
        if own in found:
            found[name] = found.pop(own)
        elif all(half in found for half in halves):
            found[name] = _stacked(name, [found.pop(half) for half in halves])
    return found


def _whole(state: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the state with the halves of each parameter joined; what ranks count (``step``) is in both."""
    found = dict(state)
    for name in names:
        first, second = (found.get(name + half) for half in _HALVES)
        if name in found or not (isinstance(first, dict) and isinstance(second, dict)):
            continue
        if list(first) != list(second):
            raise FileError(f"the halves of '{name}' have different slots: {list(first)} and {list(second)}")
        del found[name + _HALVES[0]], found[name + _HALVES[1]]
        found[name] = {slot: _joined(f"{name}.{slot}", value, second[slot]) for slot, value in first.items()}
    return found


def _joined(name: str, first: Any, second: Any) -> Any:
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape:
        return _stacked(name, (first, second))
    return first


def _stacked(name: str, parts: Iterable[Tensor]) -> Tensor:
    """Return tensors one above the other, along the first axis. Raises ``FileError`` if they do not fit."""
    first, *others = parts
    if any(part.shape[1:] != first.shape[1:] or part.dtype != first.dtype for part in others):
        shapes = " and ".join(str(list(part.shape)) for part in (first, *others))
        raise FileError(f"the halves of '{name}' have shapes that do not fit: {shapes}")
    return joined([first, *others])
