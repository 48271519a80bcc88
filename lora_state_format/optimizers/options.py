"""Group options by kind, as data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any, Final

from lora_state_format.model.states import Scalar, Slot, scalar_of

__all__ = ["OPTIONS", "Kind", "comparable", "kind_of"]


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
    CLASS = "class"
    """Tells two update rules apart that share a class: always as it is, and compared as the class is."""


OPTIONS: Final[Mapping[str, Kind]] = {
    **dict.fromkeys(("lr", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"), Kind.SCHEDULE),
    **dict.fromkeys(("foreach", "fused", "capturable", "differentiable"), Kind.RUNTIME),
    "decoupled_weight_decay": Kind.CLASS,  # torch's Adam with it is its AdamW
    # what others write into groups about their own parameters: timm and many scripts, torch, LoRA-FA
    **dict.fromkeys(("name", "names", "param_names", "scaling_factors"), Kind.RUNTIME),
    # Prodigy and D-Adaptation
    **dict.fromkeys(("d", "d0", "d_max", "d_hat", "d_numerator", "d_denom", "numerator_weighted", "k"), Kind.STATE),
    # what optimizers of pytorch_optimizer put into their groups as they go
    **dict.fromkeys(("step_size", "g0_norm", "gsq_weighted", "sk_sq_weighted", "sk_l1", "d_de_nom"), Kind.STATE),
    **dict.fromkeys(("prev_param_norm", "prev_grad_norm", "curr_param_norm", "curr_grad_norm"), Kind.STATE),
    "update_counter": Kind.STATE,
    # apex and pytorch_optimizer count steps by group
    "step": Kind.STATE,
    # schedule-free
    **dict.fromkeys(("weight_sum", "lr_max", "train_mode", "scheduled_lr"), Kind.STATE),
}
"""Option -> its kind."""


def kind_of(option: str, beside: Collection[str] = ("d0",)) -> Kind:
    """Return the kind of an option of a group: ``d`` is state in Prodigy, where ``d0`` is its first value."""
    return Kind.MATH if option == "d" and "d0" not in beside else OPTIONS.get(option, Kind.MATH)


def comparable(value: Any) -> Any:
    """Return a hyperparameter as numbers, lists and tuples alike: what makes two of them the same."""
    if isinstance(value, (list, tuple)):
        return tuple(map(comparable, value))
    if isinstance(value, Slot):
        return comparable(scalar_of(value.tensor)) if value.tensor.count == 1 else value
    return value.item() if isinstance(value, Scalar) or getattr(value, "shape", None) == () else value
