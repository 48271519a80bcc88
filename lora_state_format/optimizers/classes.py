"""Optimizer classes, as data.

Each row of ``CLASSES`` was found by running the class: which slots its step cannot do without, which of them it takes
only in the parameter's own dtype, how it counts steps. Of a class that is not here nothing is demanded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["CLASSES", "Known", "known"]


@dataclass(frozen=True, slots=True)
class Known:
    """The demands of an optimizer class's step on a parameter's state.

    ``needs`` are the slots without which it raises, ``optional`` those that it needs if a group option (the value) is
    on. ``same_dtype`` are slots that it takes in the parameter's dtype only (``Tensor.lerp_`` does not promote).
    ``fused_same_dtype`` says whether its fused kernel asks that of every slot. ``counts`` is the type of its ``step``.
    ``ordered`` means that its state belongs to the run of all its parameters, in their order.
    """

    needs: tuple[str, ...] = ()
    optional: tuple[tuple[str, str], ...] = ()
    same_dtype: tuple[str, ...] = ()
    fused_same_dtype: bool = False
    counts: type[int] | type[float] | None = float
    ordered: bool = False


_ADAM: Final = Known(
    ("step", "exp_avg", "exp_avg_sq"), (("max_exp_avg_sq", "amsgrad"),), ("exp_avg",), fused_same_dtype=True
)
CLASSES: Final[Mapping[str, Known]] = {
    "torch.optim.adam.Adam": _ADAM,
    "torch.optim.adamw.AdamW": _ADAM,
    "torch.optim.nadam.NAdam": Known(("step", "exp_avg", "exp_avg_sq", "mu_product"), same_dtype=("exp_avg",)),
    "torch.optim.radam.RAdam": Known(("step", "exp_avg", "exp_avg_sq"), same_dtype=("exp_avg",)),
    "torch.optim.adamax.Adamax": Known(("step", "exp_avg", "exp_inf"), same_dtype=("exp_avg",)),
    "torch.optim.sgd.SGD": Known(fused_same_dtype=True, counts=None),
    "torch.optim.adagrad.Adagrad": Known(("step", "sum"), fused_same_dtype=True),
    "torch.optim.adadelta.Adadelta": Known(("step", "square_avg", "acc_delta")),
    "torch.optim.rmsprop.RMSprop": Known(
        ("step", "square_avg"), (("momentum_buffer", "momentum"), ("grad_avg", "centered")), ("grad_avg",)
    ),
    "torch.optim.rprop.Rprop": Known(("step", "prev", "step_size")),
    "torch.optim.asgd.ASGD": Known(("step", "eta", "mu", "ax")),
    "torch.optim.Adafactor": Known(("step",), same_dtype=("row_var", "col_var", "variance")),
    "torch.optim.Muon": Known(same_dtype=("momentum_buffer",), counts=None),
    "torch.optim.sparse_adam.SparseAdam": Known(("step", "exp_avg", "exp_avg_sq"), counts=int),
    "torch.optim.lbfgs.LBFGS": Known(counts=None, ordered=True),
    "transformers.optimization.Adafactor": Known(("step",), counts=int),
}
"""Class path -> demands of its step. Measured on torch 2.13 and transformers 5.23."""


def known(lineage: Iterable[str]) -> Known:
    """Return the row of the first of these classes that has one: a class, then its ancestors."""
    return next((CLASSES[path] for path in lineage if path in CLASSES), Known(counts=None))
