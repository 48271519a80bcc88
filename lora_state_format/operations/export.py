"""One slot of every parameter as a plain safetensors file: a preconditioner, a Fisher diagonal, a mask.

Only the slot's own bytes are read, and one chunk of them is held at a time. Computations are in float64 and rounded
once, so that they do not depend on the chunks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from lora_state_format.errors import FileError, OptionError, Remedy
from lora_state_format.io import plain
from lora_state_format.io.atomic import check_target
from lora_state_format.model.dtypes import DTYPES, FLOATS, decoded
from lora_state_format.model.states import OptimizerState, Parameter, Scalar, Value
from lora_state_format.operations.conversion import opened

if TYPE_CHECKING:
    import numpy as np

    from lora_state_format.model.tensors import Tensor

    Function: TypeAlias = Callable[["np.ndarray[Any, Any]"], "np.ndarray[Any, Any]"]

__all__ = ["Exported", "Keys", "export"]

Keys: TypeAlias = Literal["model", "peft"]

DECAYS: Final[Mapping[str, int]] = {"exp_avg": 0, "exp_avg_sq": 1, "max_exp_avg_sq": 1}
"""Slots that are exponential means started at zero, and which of the group's ``betas`` is their decay.

Every optimizer with these slots, a ``step`` and ``betas`` uses them so, but those whose means carry a step size
(Prodigy's ``d``)."""

DENOMINATORS: Final = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "variance"})
"""Slots that are means or sums of squared gradients, whose square root a step divides by."""


@dataclass(frozen=True)
class Exported:
    """The written file. ``without`` are the parameters that have no such slot, and so are not in the file."""

    path: str
    tensors: int
    size: int
    without: tuple[str, ...]


def export(
    state: OptimizerState | str | os.PathLike[str],
    path: str | os.PathLike[str],
    slot: str,
    *,
    keys: Keys = "model",
    unbiased: bool = False,
    inverse_root: bool = False,
    eps: float | None = None,
    force: bool = False,
) -> Exported:
    """Write one slot of every parameter that has it, each in the parameter's shape or the slot's own, under its name.

    With ``unbiased`` and ``inverse_root`` Adam's ``exp_avg_sq`` becomes exactly the factor of its unbiased ``exp_avg``.
    Computed tensors are F32 (F64 stays F64), others keep their bytes. On an error nothing is left behind.

    Args:
        state: The state, or the path of a checkpoint that ``read`` can name.
        path: The file to write.
        slot: Name of the slot: ``exp_avg_sq``, for example.
        keys: ``"model"`` for the parameters' names, ``"peft"`` for their keys in ``adapter_model.safetensors``.
        unbiased: Divide a moment by ``1 - beta**step``, with the parameter's ``step`` and its group's ``betas``.
        inverse_root: Write ``1 / (sqrt(value) + eps)``.
        eps: In place of the ``eps`` of each parameter's group.
        force: Replace a file that is there.

    Raises:
        OptionError: The slot, a key or a number is missing.
        TargetExistsError: Something is at the path, and ``force`` is false.
        DigestError: A tensor does not match its digest.
        FileError: The source is damaged.
        StateFormatError: What ``read`` raises.
    """
    path = Path(path)
    check_target(path, force=force)
    if eps is not None and not inverse_root:
        raise OptionError(
            "eps is used for the inverse root only",
            remedy=Remedy("pass {inverse_root} with it", {"inverse_root": True}),
        )
    with opened(state) as source:
        found = source.slot(slot)
        items = _items(source, found, slot, keys, unbiased, inverse_root, eps)
        # "format" is what loaders of model weights look for in a file of tensors
        plain.save(items, path, metadata={"format": "pt"}, force=force)
        size = sum(item.size for item in items.values())
        return Exported(str(path), len(items), size, tuple(p.name for p in source.parameters if p.name not in found))


def _items(
    state: OptimizerState,
    found: Mapping[str, Tensor],
    slot: str,
    keys: Keys,
    unbiased: bool,
    inverse_root: bool,
    eps: float | None,
) -> dict[str, plain.Item]:
    """Return what is to be written, by key: the tensors of a slot by parameter, and how each is computed."""
    options = {p.name: dict(g.options) for g, ps in zip(state.groups, state.members(), strict=True) for p in ps}
    items: dict[str, plain.Item] = {}
    for name, tensor in found.items():
        parameter = state[name]
        where, function = f"'{name}': slot '{slot}'", None
        dtype = tensor.dtype
        if unbiased or inverse_root:
            if tensor.dtype not in FLOATS:
                raise OptionError(f"{where} is {tensor.dtype}, which cannot be computed with")
            decay = _correction(parameter, slot, options.get(name, {})) if unbiased else 1.0
            damping = _damping(parameter, slot, options.get(name, {}), eps) if inverse_root else None
            dtype = tensor.dtype if tensor.dtype == "F64" else "F32"
            function = _converting(tensor.dtype, dtype, _function(where, decay, damping))
        item = plain.Item(f"{name}/{slot}", tensor, dtype, function)
        other = items.setdefault(_key(parameter, keys), item)
        if other is not item:
            raise OptionError(
                f"'{other.name}' and '{item.name}' would have the same key, '{_key(parameter, keys)}': export one "
                "adapter at a time (`lora-state prune`)"
            )
    return items


def _key(parameter: Parameter, keys: Keys) -> str:
    if keys == "model":
        return parameter.name
    if "peft" not in parameter.foreign_names:
        raise OptionError(
            f"'{parameter.name}' has no key in an adapter file", remedy=Remedy("export with {keys}", {"keys": "model"})
        )
    return parameter.foreign_names["peft"]


# --- what is computed -----------------------------------------------------------------------------------------------


def _correction(parameter: Parameter, slot: str, options: Mapping[str, Value]) -> float:
    """Return the divisor that makes a moment unbiased."""
    if slot not in DECAYS:
        raise OptionError(f"slot '{slot}' is not a mean with a known decay; those are: {', '.join(DECAYS)}")
    betas, step = options.get("betas"), _number((parameter.state or {}).get("step"))
    if not isinstance(betas, (tuple, list)) or not step or step <= 0 or "d" in options:
        raise OptionError(
            f"'{parameter.name}': correcting the bias of '{slot}' takes its step and its group's betas, which here are "
            f"{step!r} and {betas!r}" + (", in an optimizer that scales its moments by 'd'" if "d" in options else "")
        )
    return float(1.0 - (_number(betas[DECAYS[slot]]) or 0.0) ** step)


def _damping(parameter: Parameter, slot: str, options: Mapping[str, Value], eps: float | None) -> float:
    if slot not in DENOMINATORS:
        raise OptionError(f"slot '{slot}' does not hold squares; those that do: {', '.join(sorted(DENOMINATORS))}")
    stated = _number(options.get("eps")) if eps is None else eps
    if stated is None:
        raise OptionError(f"'{parameter.name}': its group has no eps", remedy=Remedy("pass {eps}", {"eps": ...}))
    return stated


def _number(value: Value) -> float | None:
    """Return an option or a step as a number, if it is one."""
    number = value.item() if isinstance(value, Scalar) else value
    return number if isinstance(number, (int, float)) else None


def _function(where: str, correction: float, damping: float | None) -> Function:
    import numpy as np

    def compute(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        unbiased = values / correction
        if damping is None:
            return unbiased
        if (values < 0).any():
            raise FileError(f"{where} holds a negative number, which is not a square")
        with np.errstate(divide="ignore"):
            return 1.0 / (np.sqrt(unbiased) + damping)

    return compute


# --- writing --------------------------------------------------------------------------------------------------------


def _converting(source: str, target: str, function: Function) -> Callable[[memoryview], memoryview]:
    """Return a function from chunks of one dtype to chunks of another."""

    def convert(chunk: memoryview) -> memoryview:
        return function(decoded(chunk, source).astype("f8")).astype(DTYPES[target].numpy).data.cast("B")

    return convert
