"""Group options by kind, as data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum
from typing import Final

__all__ = ["OPTIONS", "Kind", "kind_of"]


class Kind(str, Enum):
    """The purpose of a group option; it decides whether the file's value or the live one is used."""

    MATH = "math"
    """Changes what a step computes: as saved. Options that are not listed are of this kind."""
    SCHEDULE = "schedule"
    """Set by schedulers: as saved where the live group has the key, so that no scheduler's key comes without one."""
    RUNTIME = "runtime"
    """How a step is run on this machine, or what the live group is called: always as it is."""
    STATE = "state"
    """The optimizer's own state, kept in its groups: always from the file."""


OPTIONS: Final[Mapping[str, Kind]] = {
    **dict.fromkeys(("lr", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"), Kind.SCHEDULE),
    **dict.fromkeys(("foreach", "fused", "capturable", "differentiable"), Kind.RUNTIME),
    # what others write into groups about their own parameters: timm and many scripts, torch, LoRA-FA
    **dict.fromkeys(("name", "names", "param_names", "scaling_factors"), Kind.RUNTIME),
    # Prodigy and D-Adaptation
    **dict.fromkeys(("d", "d0", "d_max", "d_hat", "d_numerator", "d_denom", "numerator_weighted", "k"), Kind.STATE),
    # apex and pytorch_optimizer count steps by group
    "step": Kind.STATE,
    # schedule-free
    **dict.fromkeys(("weight_sum", "lr_max", "train_mode", "scheduled_lr"), Kind.STATE),
}
"""Option -> its kind."""


def kind_of(option: str, beside: Collection[str] = ("d0",)) -> Kind:
    """Return the kind of an option of a group: ``d`` is state in Prodigy, where ``d0`` is its first value."""
    return Kind.MATH if option == "d" and "d0" not in beside else OPTIONS.get(option, Kind.MATH)
