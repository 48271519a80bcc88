"""Tell from a model's configs whether a state would bind to it; nothing is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from lora_state_format import registry
from lora_state_format.binding.live import LiveGroup, LiveOptimizer, LiveParameter
from lora_state_format.binding.plan import LoadPlan, plan
from lora_state_format.binding.policies import Policies
from lora_state_format.errors import ConversionError, MissingNamesError, OptionError, Remedy
from lora_state_format.model.states import Optimizer, OptimizerState
from lora_state_format.naming.rules import Described
from lora_state_format.naming.sources import ADAPTER_CONFIG, CONFIG
from lora_state_format.operations.conversion import only_trainable, read, rebuild
from lora_state_format.optimizers.classes import full_path
from lora_state_format.optimizers.options import Kind, kind_of

__all__ = ["check"]

MODEL: Final = {"model": ...}
UNKNOWN: Final = (Kind.MATH, Kind.SCHEDULE)
"""Options whose live values configs do not say."""


def check(
    path: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    into: str | None = None,
    policies: Policies | None = None,
    trainable: Sequence[str] = (),
    **reading: Any,
) -> LoadPlan:
    """Return the plan of loading a checkpoint into an optimizer over the trainable parameters of a model.

    Configs do not say everything; these are not compared: the parameters' dtypes, the groups and options of an
    optimizer and, without ``into``, its class.

    Args:
        path: The checkpoint.
        model: A folder with the model's ``config.json`` and, for an adapter, ``adapter_config.json``; by default the
            checkpoint's own folder.
        base: A folder with the base model's ``config.json``, where ``model`` has the adapter's config alone.
        into: The class path of the optimizer that the state is for: ``torch.optim.AdamW``.
        policies: What to do where state and model differ.
        trainable: Regular expressions for the parameters that train, where not all do.
        reading: Further arguments of ``read``.

    Raises:
        MissingDependencyError: transformers or peft is not installed.
        ConversionError: The configs are not there, or describe no model that these know.
        StateFormatError: What ``read`` raises. What does not fit is in the plan's ``problems``.
    """
    registry.find(path, reading.get("source_format"))  # before a model is built
    folder = Path(model) if model is not None else Path(path) if Path(path).is_dir() else Path(path).parent
    described = _described(folder, base)
    if trainable:
        described = only_trainable(described, trainable)
    try:
        state = read(path, **reading)
    except ConversionError as error:
        if reading.get("names") is not None or not (trainable or isinstance(error, MissingNamesError)):
            raise
        state = read(path, **{**reading, "names": folder, "trainable": trainable})
    with state:
        policies = policies or Policies()
        compared = {key: "current" for group in state.groups for key, _ in group.options if kind_of(key) in UNKNOWN}
        return plan(state, _live(described, state, into), replace(policies, options={**compared, **policies.options}))


def _described(folder: Path, base: str | os.PathLike[str] | None) -> Sequence[Described]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of a model's configs")
    if base is not None:
        adapter = folder / ADAPTER_CONFIG
        return rebuild(Path(base), adapter if adapter.exists() else None)
    if not (folder / CONFIG).exists() and not (folder / ADAPTER_CONFIG).exists():
        raise ConversionError(
            f"{folder}: has no {CONFIG}", remedy=Remedy("pass {model} with the folder of the model's configs", MODEL)
        )
    return rebuild(folder)


def _live(described: Sequence[Described], state: OptimizerState, into: str | None) -> LiveOptimizer:
    """Return the model as the live side, in one group without options; dtypes as the state has them."""
    if into is not None and "." not in into:
        raise OptionError(
            f"'{into}' is not the path of a class", remedy=Remedy("pass {into}", {"into": "torch.optim.AdamW"})
        )
    path = full_path(into) if into else None
    parameters = {}
    for known in described:
        own = known.parameter
        dtype = (state[own.name].dtype if own.name in state else None) or own.dtype or "F32"
        parameters[own.name] = LiveParameter(own.name, own.shape, dtype, known.trainable, own.tied, layer=known.layer)
    trainable = tuple(name for name, parameter in parameters.items() if parameter.requires_grad)
    lineages = ((path,),) if path else ()
    return LiveOptimizer((Optimizer(path),), (LiveGroup(0, (), trainable),), parameters, lineages)
