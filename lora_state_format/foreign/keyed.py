"""State dicts whose ids are names, as FSDP, DCP, DeepSpeed and others write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from lora_state_format.errors import RefusedError, UnrepresentableError
from lora_state_format.foreign.state_dict import to_state_dict
from lora_state_format.model.states import Naming, OptimizerState, Parameter, PositionalState
from lora_state_format.model.tensors import Tensor
from lora_state_format.naming.names import peft_key, split_adapter, without_wrappers

__all__ = ["FLAT", "by_name", "local_state", "named", "names_of"]

FLAT: Final = "_flat_param"
"""What FSDP1 calls the parameters that it flattened, in a local state dict."""


def local_state(path: object) -> RefusedError:
    """Return what to say of a local state dict of FSDP1: nothing in it tells its flat parameters apart."""
    return RefusedError(
        f"holds '{FLAT}': a local state dict of FSDP1, in which parameters have neither names nor shapes and the "
        "optimizer's state is that of one rank; load it where it was written, and save with "
        "StateDictType.SHARDED_STATE_DICT, or get_optimizer_state_dict",
        path=path,
    )


def names_of(state: PositionalState) -> tuple[str, ...] | None:
    """Return the ids, where they all are names; ``None`` where any is a number."""
    several = len(state.optimizers) > 1
    names = [str(identity).partition(":")[2] if several else identity for identity in state.ids]
    if any(not isinstance(name, str) or name.isdecimal() for name in names):
        return None
    return tuple(str(name) for name in names)


def named(
    state: PositionalState,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    tied: Mapping[str, tuple[str, ...]] | None = None,
) -> OptimizerState | PositionalState:
    """Return the state under the names that its ids are, wrapper segments removed.

    A parameter's shape comes from ``shapes``, from its own tensor in ``weights``, or from its slots. Where none of them
    says it (it never took a step, and the checkpoint has no weights), the state stays positional and carries the names,
    for whoever can say the shapes. So it does, without names, if ids are numbers.
    """
    names = names_of(state)
    if names is None:
        return state
    shapes, weights, tied = shapes or {}, weights or {}, tied or {}
    clean, removed = without_wrappers(names)
    parameters = []
    for name, raw, seen in zip(clean, names, state.shapes(), strict=True):
        tensor = weights.get(raw)
        shape = shapes.get(raw, tensor.shape if tensor is not None else seen)
        if shape is None:
            return replace(state, names=tuple(clean))
        peft, parts = peft_key(name), split_adapter(name)
        parameters.append(
            Parameter(
                name,
                tuple(shape),
                None,
                dtype=tensor.dtype if tensor is not None else None,
                adapter=parts[1] if parts else None,
                tied=tied.get(raw, ()),
                foreign_names={"peft": peft[0]} if peft else {},
            )
        )
    result = state.named(parameters, Naming("checkpoint", details={"removed": list(removed)} if removed else {}))
    originals = (raw if raw != name else None for raw, name in zip(names, clean, strict=True))
    return replace(
        result,
        parameters=tuple(
            replace(parameter, original_id=original)
            for parameter, original in zip(result.parameters, originals, strict=True)
        ),
    )


def by_name(state: OptimizerState, optimizer: int = 0) -> dict[str, Any]:
    """Return the state dict of one of the optimizers with names for ids, spelled as the source did.

    Raises ``UnrepresentableError`` for a name that would be read back as another, and as ``to_state_dict`` does.
    """
    names = [parameter.name for parameter in state.parameters]
    spelled = [p.original_id if isinstance(p.original_id, str) else p.name for p in state.parameters]
    if list(without_wrappers(spelled)[0]) != names:  # renamed since
        spelled = names
    for name, read in zip(names, without_wrappers(spelled)[0], strict=True):
        if name != read or name.isdecimal():
            raise UnrepresentableError(
                f"'{name}' would be read back as {f'id {name}' if name == read else repr(read)}: rename it first "
                "(`lora-state rename`)"
            )
    prefix = "0:" if len(state.optimizers) > 1 else ""
    parameters = [replace(p, original_id=prefix + name) for p, name in zip(state.parameters, spelled, strict=True)]
    return to_state_dict(replace(state, parameters=tuple(parameters)), optimizer)
