"""Optimizer classes, as data.

Each row of ``CLASSES`` was found by running the class: which slots its step cannot do without, which others it may
have, which of them it takes only in the parameter's own dtype, how it counts steps. Of a class that is not here nothing
is demanded. Of two classes of the same ``rule`` one goes on with the state of the other, once it is laid out anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

__all__ = ["CLASSES", "UNKNOWN", "Decay", "Form", "Known", "ends", "full_path", "known", "known_path", "same_class"]


class Form(str, Enum):
    """How a class lays out the moments of its rule."""

    PLAIN = "plain"
    """As torch does: ``exp_avg`` and ``exp_avg_sq``."""
    BITSANDBYTES = "bitsandbytes"
    """``state1`` and ``state2``, in float32 or as codes of blocks."""
    TORCHAO = "torchao"
    """``exp_avg`` and ``exp_avg_sq``, in float32 or as tensors of codes."""


class Decay(str, Enum):
    """What a group's ``weight_decay`` does."""

    COUPLED = "coupled"
    """It is added to the gradient (L2), so the moments contain it."""
    DECOUPLED = "decoupled"
    """It shrinks the parameter, and the moments know nothing of it."""
    OPTION = "option"
    """What the option ``decoupled_weight_decay`` says; without it, ``COUPLED``."""


@dataclass(frozen=True, slots=True)
class Known:
    """The demands of an optimizer class's step on a parameter's state.

    ``needs`` are the slots without which it raises, ``optional`` those that it needs if a group option (the value) is
    on, ``keeps`` others that it makes or reads. ``same_dtype`` are slots that it takes in the parameter's dtype only
    (``Tensor.lerp_`` does not promote). ``fused_same_dtype`` says whether its fused kernel asks that of every slot.
    ``counts`` is the type of its ``step``. ``ordered`` means that its state belongs to the run of all its parameters,
    in their order. Classes of the same ``rule`` keep the same quantities, each in its ``form``; ``decay`` is what their
    ``weight_decay`` means.
    """

    needs: tuple[str, ...] = ()
    optional: tuple[tuple[str, str], ...] = ()
    keeps: tuple[str, ...] = ()
    same_dtype: tuple[str, ...] = ()
    fused_same_dtype: bool = False
    counts: type[int] | type[float] | None = float
    ordered: bool = False
    rule: str | None = None
    form: Form = Form.PLAIN
    decay: Decay | None = None

    @property
    def slots(self) -> frozenset[str]:
        """Every slot that the class knows."""
        return frozenset((*self.needs, *(slot for slot, _ in self.optional), *self.keeps))


UNKNOWN: Final = Known(counts=None)
"""The row of a class that is not in ``CLASSES``."""

_MOMENTS: Final = ("step", "exp_avg", "exp_avg_sq")
_ADAM: Final = Known(
    _MOMENTS,
    (("max_exp_avg_sq", "amsgrad"),),
    same_dtype=("exp_avg",),
    fused_same_dtype=True,
    rule="adam",
    decay=Decay.OPTION,
)
_ADAMW: Final = replace(_ADAM, decay=Decay.DECOUPLED)
_ELSEWHERE: Final = Known(_MOMENTS, counts=int, rule="adam", decay=Decay.DECOUPLED)
_BITSANDBYTES: Final = Known(
    ("step", "state1", "state2"),
    keeps=("qmap1", "qmap2", "absmax1", "absmax2", "unorm_vec"),
    counts=int,
    rule="adam",
    form=Form.BITSANDBYTES,
    decay=Decay.DECOUPLED,
)
_TORCHAO: Final = Known(
    _MOMENTS, (("max_exp_avg_sq", "amsgrad"),), rule="adam", form=Form.TORCHAO, decay=Decay.DECOUPLED
)
_LBFGS: Final = (
    "func_evals", "n_iter", "al", "d", "t", "old_dirs", "old_stps", "ro", "H_diag", "prev_flat_grad", "prev_loss"
)  # fmt: skip

CLASSES: Final[Mapping[str, Known]] = {
    "torch.optim.adam.Adam": _ADAM,
    "torch.optim.adamw.AdamW": _ADAMW,
    "torch.optim.nadam.NAdam": Known((*_MOMENTS, "mu_product"), same_dtype=("exp_avg",)),
    "torch.optim.radam.RAdam": Known(_MOMENTS, same_dtype=("exp_avg",)),
    "torch.optim.adamax.Adamax": Known(("step", "exp_avg", "exp_inf"), same_dtype=("exp_avg",)),
    "torch.optim.sgd.SGD": Known(keeps=("momentum_buffer",), fused_same_dtype=True, counts=None),
    "torch.optim.adagrad.Adagrad": Known(("step", "sum"), fused_same_dtype=True),
    "torch.optim.adadelta.Adadelta": Known(("step", "square_avg", "acc_delta")),
    "torch.optim.rmsprop.RMSprop": Known(
        ("step", "square_avg"), (("momentum_buffer", "momentum"), ("grad_avg", "centered")), same_dtype=("grad_avg",)
    ),
    "torch.optim.rprop.Rprop": Known(("step", "prev", "step_size")),
    "torch.optim.asgd.ASGD": Known(("step", "eta", "mu", "ax")),
    "torch.optim.Adafactor": Known(
        ("step",), keeps=("row_var", "col_var", "variance"), same_dtype=("row_var", "col_var", "variance")
    ),
    "torch.optim.Muon": Known(keeps=("momentum_buffer",), same_dtype=("momentum_buffer",), counts=None),
    "torch.optim.sparse_adam.SparseAdam": Known(_MOMENTS, counts=int),
    "torch.optim.lbfgs.LBFGS": Known(keeps=_LBFGS, counts=None, ordered=True),
    "transformers.optimization.Adafactor": Known(
        ("step",), keeps=("RMS", "exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"), counts=int
    ),
    "transformers.optimization.AdamW": _ELSEWHERE,
    "deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam": _ELSEWHERE,
    "deepspeed.ops.adam.fused_adam.FusedAdam": _ELSEWHERE,
    "apex.optimizers.fused_adam.FusedAdam": replace(_ELSEWHERE, needs=("exp_avg", "exp_avg_sq")),
    **{
        f"bitsandbytes.optim.{kind.lower()}.{paged}{kind}{bits}": _BITSANDBYTES
        for kind in ("Adam", "AdamW")
        for paged in ("", "Paged")
        for bits in ("", "8bit", "32bit")
    },
    **{f"torchao.optim.adam.{kind}": _TORCHAO for kind in ("AdamW8bit", "AdamW4bit", "AdamWFp8", "_AdamW")},
    **{
        f"torchao.optim.adam.{kind}": replace(_TORCHAO, decay=Decay.COUPLED)
        for kind in ("Adam8bit", "Adam4bit", "AdamFp8")
    },
}
"""Class path -> demands of its step. Measured on torch 2.13, transformers 5.23, bitsandbytes 0.50 and torchao 0.18.

Transformers' AdamW, which left it in 5.0, was run in 4.46. Those of apex and DeepSpeed are as their sources say: no
test has run them. bitsandbytes' Adam decays as its AdamW does, decoupled: both run one kernel.
"""


def known_path(lineage: Iterable[str]) -> str | None:
    """Return the first of these classes that has a row: a class, then its ancestors."""
    return next((path for path in lineage if path in CLASSES), None)


def known(lineage: Iterable[str]) -> Known:
    """Return the row of the first of these classes that has one, else ``UNKNOWN``."""
    path = known_path(lineage)
    return UNKNOWN if path is None else CLASSES[path]


def ends(path: str) -> tuple[str, str]:
    """Return package and class; the modules between them change from release to release."""
    return path.partition(".")[0], path.rpartition(".")[2]


def full_path(path: str) -> str:
    """Return the path of a class as ``CLASSES`` has it: ``torch.optim.AdamW`` is ``torch.optim.adamw.AdamW``."""
    return next((known for known in CLASSES if ends(known) == ends(path)), path)


def same_class(saved: tuple[str, ...], live: tuple[str, ...]) -> bool:
    """Return whether two lineages, each a class and the ancestors whose step it has, are of one update rule.

    They are where they begin alike, or their first rows are the same. A script's own class is ``__main__`` where the
    script runs, and under the module's name where that is imported.
    """
    row, other = known_path(saved), known_path(live)
    return _scripted(saved[0], live[0]) or (row is not None and row == other)


def _scripted(path: str, other: str) -> bool:
    (module, _, name), (module2, _, name2) = path.rpartition("."), other.rpartition(".")
    return name == name2 and (module == module2 or "__main__" in (module, module2))
