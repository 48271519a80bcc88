"""Would a state bind to a model? Asked of the model's configs, with nothing loaded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from lora_state_format.binding.live import LiveGroup, LiveOptimizer, LiveParameter
from lora_state_format.binding.plan import LoadPlan, plan
from lora_state_format.errors import MissingNamesError
from lora_state_format.model.states import Optimizer, OptimizerState
from lora_state_format.naming.rules import Described
from lora_state_format.operations.conversion import read

__all__ = ["check"]


def check(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> LoadPlan:
    """Return the plan of loading a checkpoint into an optimizer over the trainable parameters of a model.

    ``folder`` holds the model's ``config.json`` and, for an adapter, ``adapter_config.json``. What configs do not say
    is not asked: the parameters' dtypes, and the groups and options of an optimizer. Raises what ``read`` and
    ``torch.rebuild.rebuild`` raise; what does not fit is in the plan's ``problems``.
    """
    from lora_state_format.torch.rebuild import rebuild

    described = rebuild(Path(folder))
    try:
        state = read(path)
    except MissingNamesError:
        state = read(path, names=folder)
    with state:
        bare = replace(state, groups=tuple(replace(group, options=()) for group in state.groups))
        return plan(bare, _live(described, state))


def _live(described: list[Described], state: OptimizerState) -> LiveOptimizer:
    """Return the model as the live side, in one group without options; dtypes as the state has them."""
    parameters = {}
    for known in described:
        own = known.parameter
        dtype = (state[own.name].dtype if own.name in state else None) or own.dtype or "F32"
        parameters[own.name] = LiveParameter(own.name, own.shape, dtype, known.trainable, own.tied)
    trainable = tuple(name for name, parameter in parameters.items() if parameter.requires_grad)
    return LiveOptimizer((Optimizer(),), (LiveGroup(0, (), trainable),), parameters)
