"""Moments as the codes that bitsandbytes' 8-bit optimizers keep, made by bitsandbytes itself."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch

from lora_state_format.optimizers.quantised import bound_of

__all__ = ["Coded", "coded"]

_BLOCK: Final = 256
"""Elements of a block, as ``Optimizer2State.init_state`` of bitsandbytes 0.50 has it."""


class Coded(NamedTuple):
    """How many moments became codes, and how far a value may be from what it was, in parts of its block's largest."""

    moments: int
    bound: float


def coded(optimizer: Any, parameter: torch.Tensor, slots: dict[str, Any]) -> tuple[dict[str, Any], Coded | None]:
    """Return a parameter's slots as a bitsandbytes optimizer is configured to keep them.

    Args:
        optimizer: A live optimizer of bitsandbytes; its configuration says of each parameter how many bits.
        parameter: The parameter, in one of its groups.
        slots: Its ``step``, ``state1`` and ``state2``, in float32.
    """
    import bitsandbytes.functional as functional

    config = _config(optimizer, parameter)
    if config["optim_bits"] != 8 or parameter.numel() < config["min_8bit_size"]:
        return slots, None
    found, bounds = dict(slots), []
    for which, signed in (("1", True), ("2", False)):
        table = functional.create_dynamic_map(signed=signed).to(parameter.device)
        codes, scales = functional.quantize_blockwise(slots[f"state{which}"], code=table, blocksize=_BLOCK)
        found |= {f"state{which}": codes, f"qmap{which}": table, f"absmax{which}": scales.absmax}
        bounds.append(bound_of(table.cpu().numpy()))
    return found, Coded(2, max(bounds))


def _config(optimizer: Any, parameter: torch.Tensor) -> Any:
    for number, group in enumerate(optimizer.param_groups):
        for position, found in enumerate(group["params"]):
            if found is parameter:
                return optimizer.get_config(number, position, group)
    raise AssertionError("the parameter is in no group of the optimizer")
