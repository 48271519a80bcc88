"""What to do where a state and a live optimizer differ, as the caller says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias, TypedDict

from lora_state_format.errors import OptionError
from lora_state_format.naming.names import Rename
from lora_state_format.optimizers.options import Kind, kind_of

__all__ = [
    "BY_WEIGHTS",
    "Dtype",
    "Mismatch",
    "MismatchClass",
    "Missing",
    "Policies",
    "PolicyArguments",
    "Renaming",
    "Unexpected",
]

Missing: TypeAlias = Literal["error", "fresh"]
Unexpected: TypeAlias = Literal["error", "ignore", "carry"]
Mismatch: TypeAlias = Literal["error", "fresh", "resize"]
MismatchClass: TypeAlias = Literal["error", "translate", "fresh"]
Dtype: TypeAlias = Literal["saved", "param"]
Renaming: TypeAlias = "Rename | Literal['weights']"

BY_WEIGHTS: Final = "weights"
"""The ``rename`` that goes by the bytes of the weights."""


@dataclass(frozen=True)
class Policies:
    """What to do where state and optimizer differ; every default is the strict one.

    Args:
        missing: For parameters of the optimizer that are not in the state: ``fresh`` starts them without state.
        unexpected: For parameters of the state that are not in the optimizer: ``ignore`` drops them, ``carry`` keeps
            them for the next save.
        mismatch: For parameters of another shape: ``fresh`` starts them without state, ``resize`` gives their moments
            the live shape, where the layer or the bytes of the weights say how.
        mismatch_class: For an optimizer of another class than the one that wrote the state: ``translate`` takes state
            that both classes keep, laid out anew; ``fresh`` does so too, and starts all other parameters without state.
        dtype: Slots as ``saved``, or in the dtype of their parameter: ``param``.
        options: For each group option ``"saved"``, ``"current"`` or a value.
        rename: See ``naming.names.rename``; ``"weights"`` names a parameter by its bytes, which the file has a digest
            of, where they were saved under another name.

    Raises:
        OptionError: A policy does not exist.
    """

    missing: Missing = "error"
    unexpected: Unexpected = "error"
    mismatch: Mismatch = "error"
    dtype: Dtype = "saved"
    options: Mapping[str, Any] = field(default_factory=dict)
    rename: Renaming | None = None
    mismatch_class: MismatchClass = "error"

    def __post_init__(self) -> None:
        allowed: dict[str, Any] = {
            "missing": Missing,
            "unexpected": Unexpected,
            "mismatch": Mismatch,
            "dtype": Dtype,
            "mismatch_class": MismatchClass,
        }
        for policy, values in allowed.items():
            if getattr(self, policy) not in values.__args__:
                choices = " or ".join(map(repr, values.__args__))
                raise OptionError(f"{policy}={getattr(self, policy)!r}: use {choices}")
        if isinstance(self.rename, str) and self.rename != BY_WEIGHTS:
            raise OptionError(f"rename={self.rename!r}: use 'weights', a mapping, pairs or a function")
        for option in self.options:
            if kind_of(option) is Kind.RUNTIME:
                raise OptionError(
                    f"options={{{option!r}: ...}}: {option} says how the live optimizer runs; set it on the optimizer"
                )
            if kind_of(option) is Kind.CLASS:
                raise OptionError(
                    f"options={{{option!r}: ...}}: {option} belongs to the class of the live optimizer; build the "
                    "optimizer with it"
                )


class PolicyArguments(TypedDict, total=False):
    """The members of ``Policies``, for functions that take them as keywords."""

    missing: Missing
    unexpected: Unexpected
    mismatch: Mismatch
    dtype: Dtype
    options: Mapping[str, Any]
    rename: Renaming | None
    mismatch_class: MismatchClass
