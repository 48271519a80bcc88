"""Roles of slots by their names, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from lora_state_format.model.states import Role
from lora_state_format.optimizers.quantised import TORCHAO

__all__ = ["MASTER", "role_of"]

MASTER: Final = "master_param"
"""The slot of the float32 copy that an optimizer steps where the model's weights are narrower."""

# --- roles --------------------------------------------------------------------------------------------------------

_FLOATS: Final = frozenset({"F16", "BF16", "F32", "F64", "C64"})

_PARAM: Final = frozenset({
    # torch.optim, in the order of its documentation
    "square_avg", "acc_delta", "sum", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "variance", "exp_inf", "ax",
    "momentum_buffer", "grad_avg", "prev", "step_size",
    # schedule-free, Adan, AdEMAMix, AdaBelief, Sophia, AdaHessian, Ranger, Lookahead, MARS, optimi; fp32 copies
    "z", "exp_avg_diff", "neg_pre_grad", "exp_avg_fast", "exp_avg_slow", "exp_avg_var", "max_exp_avg_var", "hessian",
    "exp_hessian_diag_sq", "slow_buffer", "slow_param", "last_grad", "previous_grad", "kahan_comp", "master_param",
})  # fmt: skip

_ROLES: Final[Mapping[str, Role]] = {
    **dict.fromkeys(_PARAM, Role.PARAM),
    **dict.fromkeys(("row_var", "exp_avg_sq_row", "exp_avg_res_row"), Role.ROW),
    **dict.fromkeys(("col_var", "exp_avg_sq_col", "exp_avg_res_col"), Role.COL),
}
"""What a slot's name says about its axes. Names that different optimizers give to different things are not here."""

_REDUCED: Final = frozenset({"projector", "Q", "GG"})
"""Slots next to which moments are in another basis or rank: GaLore and APOLLO project them, SOAP rotates them."""


def role_of(
    path: Sequence[Any],
    dtype: str,
    siblings: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Role:
    """Return the role of a slot's tensor where only its name is known.

    ``path`` leads to the tensor inside a parameter's slot tree; ``siblings`` is the dict that holds it; ``options`` are
    those of the parameter's group. bitsandbytes calls its moments ``state1`` and ``state2``: codes of blocks if they
    are bytes with ``absmax`` next to them, else values; AdEMAMix (three betas) stacks two of them in ``state1``.
    torchao's codes and scales are of blocks too.
    """
    name, siblings, options = path[-1], siblings or {}, options or {}
    if not _REDUCED.isdisjoint(siblings):
        return Role.OPAQUE
    if TORCHAO in siblings:
        return Role.BLOCK if name in ("codes", "scale") else Role.OPAQUE
    if name in ("state1", "state2", "absmax1", "absmax2"):
        betas = options.get("betas")
        if name.endswith("1") and isinstance(betas, (list, tuple)) and len(betas) == 3:
            return Role.OPAQUE
        if f"absmax{name[-1]}" in siblings:
            return Role.BLOCK
        return Role.PARAM if dtype in _FLOATS else Role.OPAQUE
    return _ROLES.get(name, Role.OPAQUE) if dtype in _FLOATS else Role.OPAQUE
