"""Moments of a parameter of another shape: which of its elements are which of the old ones, and what is new."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

from lora_state_format.binding.live import LiveParameter
from lora_state_format.model.states import OptimizerState, Parameter, Role, Value

__all__ = [
    "RESIZABLE",
    "SCALING",
    "TOKENS",
    "Resize",
    "differs",
    "fold",
    "resize",
    "scaling",
    "unresizable",
]

RESIZABLE: Final[Mapping[str, tuple[int, bool]]] = {
    **dict.fromkeys(("exp_avg", "momentum_buffer", "grad_avg"), (1, False)),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"), (2, True)),
    "exp_inf": (1, True),
}
"""The slots that ``mismatch="resize"`` resizes: with which power of the gradient they grow, and whether new elements
are the mean of the old ones or zero. Zero second moments next to a step that goes on make first updates five times too
large; a step that starts again cuts the old elements' updates to a third."""

SCALING: Final = "lora_scaling"
"""Member of ``origin``: alpha / r by adapter, and by parameter where it differs from its adapter's."""

TOKENS: Final = "token_indices"
"""Member of ``origin``: by parameter the ids of the tokens that its rows belong to."""


@dataclass(frozen=True, slots=True)
class Resize:
    """Where old elements go.

    Both tensors are seen in shapes of as many axes, ``before`` and ``after``. Along each axis the old positions ``old``
    become the new ones ``new``; everything else of the new tensor is new. ``proven`` means that layer or bytes say so.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    old: tuple[Sequence[int], ...]
    new: tuple[Sequence[int], ...]
    proven: bool


def fold(kind: str, shape: tuple[int, ...], experts: int = 1) -> tuple[int, ...] | None:
    """Return a LoRA factor's shape with -1 for the rank; ``None`` for what has no rank.

    The experts of a stacked parameter share an axis with it: in A rank by rank within each expert, in B expert by
    expert within each rank (PEFT 0.21, ``ParamWrapper.get_delta_weight``).
    """
    if kind in ("lora_A", "lora_embedding_A", "lora_E") and shape:
        return (experts, -1, *shape[1:]) if experts > 1 else (-1, *shape[1:])
    if kind in ("lora_B", "lora_embedding_B") and len(shape) > 1:
        return (shape[0], -1, experts, *shape[2:]) if experts > 1 else (shape[0], -1, *shape[2:])
    return None


def differs(state: OptimizerState, saved: Parameter, own: LiveParameter) -> bool:
    """Return whether a saved parameter is of another shape than the live one, or of other rows."""
    tokens = _tokens(state, saved)
    return saved.shape != own.shape or (
        tokens is not None and own.layer is not None and own.layer.tokens not in (None, tokens)
    )


def resize(state: OptimizerState, saved: Parameter, own: LiveParameter) -> Resize | str:
    """Return where the elements of a saved parameter go in a live one of another shape, or why nothing says it."""
    layer = own.layer
    if layer is not None and layer.tokens is not None:
        return _by_tokens(state, saved, own.shape, layer.tokens)
    if layer is not None and layer.fold is not None:
        return _by_rank(saved, own.shape, layer.fold, layer.kept, layer.masks)
    grown = len(saved.shape) == len(own.shape) and all(a <= b for a, b in zip(saved.shape, own.shape, strict=True))
    if grown and saved.weights and own.corner and own.corner(saved.shape) == saved.weights:
        places = tuple(map(range, saved.shape))
        return Resize(saved.shape, own.shape, places, places, proven=True)
    if saved.weights is None:
        return "the file has no digest of its weights, and no layer that changes its shape is known"
    if grown:
        return "its first elements are not the weights that were saved, and no layer that changes its shape is known"
    return "no layer that changes its shape is known"


def _by_tokens(
    state: OptimizerState, saved: Parameter, shape: tuple[int, ...], tokens: tuple[int, ...]
) -> Resize | str:
    before = _tokens(state, saved)
    if before is None or len(before) != saved.shape[0] or saved.shape[1:] != shape[1:]:
        return "the file does not say which tokens its rows belong to"
    common = [token for token in tokens if token in set(before)]
    rest = tuple(map(range, shape[1:]))
    old, new = [before.index(token) for token in common], [tokens.index(token) for token in common]
    return Resize(saved.shape, shape, (old, *rest), (new, *rest), proven=True)


def _by_rank(
    saved: Parameter,
    shape: tuple[int, ...],
    fold: tuple[int, ...],
    kept: tuple[int, ...] | None,
    masks: bool,
) -> Resize | str:
    """Return the resize of a LoRA factor, whose axis -1 of ``fold`` is the rank; experts may stand in another one."""
    others = prod(size for size in fold if size != -1)
    axis, count = fold.index(-1), prod(saved.shape)
    then = tuple(count // others if size == -1 else size for size in fold)
    now = tuple(prod(shape) // others if size == -1 else size for size in fold)
    if prod(then) != count or len(saved.shape) != len(shape) or not _same_but_one(saved.shape, shape):
        return "another axis than that of its rank changed"
    if kept is not None and (len(kept) != now[axis] or max(kept, default=-1) >= then[axis]):
        return f"rank_pattern keeps {len(kept)} ranks, and the file has {then[axis]}"
    if masks and kept is None:
        return "AdaLoRA keeps the ranks that its rank_pattern says, and the adapter's configuration has none"
    ranks = kept if kept is not None else range(min(then[axis], now[axis]))
    old = tuple(ranks if n == axis else range(size) for n, size in enumerate(then))
    new = tuple(range(len(ranks)) if n == axis else range(size) for n, size in enumerate(now))
    return Resize(then, now, old, new, proven=kept is not None)


def _same_but_one(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return sum(x != y for x, y in zip(a, b, strict=True)) <= 1


def _tokens(state: OptimizerState, saved: Parameter) -> tuple[int, ...] | None:
    stated = state.origin.get(TOKENS)
    found: Value = stated.get(saved.name) if isinstance(stated, Mapping) else None
    return tuple(n for n in found if isinstance(n, int)) if isinstance(found, (list, tuple)) else None


def scaling(state: OptimizerState, parameter: Parameter) -> float | None:
    """Return alpha / r of a saved parameter, if the file says it."""
    stated = state.origin.get(SCALING)
    if not isinstance(stated, Mapping):
        return None
    value = stated.get(parameter.name, stated.get(parameter.adapter))
    return value if isinstance(value, float) else None


def unresizable(saved: Parameter) -> Iterator[str]:
    """Name the slots of a parameter that have no rule for another shape."""
    for path, slot in saved.tensors():
        if slot.role is not Role.PARAM or path[-1] not in RESIZABLE:
            yield f"{'.'.join(map(str, path))} {list(slot.tensor.shape)} of role {slot.role.value}"
