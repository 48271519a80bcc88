"""Make an optimizer's own ``state_dict()`` and ``load_state_dict()`` go by names, whatever framework calls them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import torch

from lora_state_format.binding import plan as planning
from lora_state_format.binding.policies import Policies, PolicyArguments
from lora_state_format.errors import CaptureError, ConversionError
from lora_state_format.foreign.state_dict import Leaf, from_state_dict
from lora_state_format.model.states import Naming, OptimizerState, Parameter
from lora_state_format.torch.apply import carry_out
from lora_state_format.torch.capture import Models, as_leaf, grouped, named_tensors, optimizers_of
from lora_state_format.torch.live import Live, describe
from lora_state_format.torch.swap import remembered

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Following", "follow_names"]

logger = logging.getLogger("lora_state_format")

DCP_STATE_DICT = "torch.distributed.checkpoint.state_dict"
"""These functions go by names themselves; a ``param_names`` in what they get would only be in their way."""


@dataclass(frozen=True, slots=True)
class Following:
    """The hooks of ``follow_names``; ``remove`` takes them off again."""

    handles: tuple[Any, ...]
    optimizer: torch.optim.Optimizer

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self.handles:
            handle.remove()
        vars(self.optimizer).pop("load_state_dict", None)


def follow_names(
    optimizer: torch.optim.Optimizer,
    model: Models,
    **policies: Unpack[PolicyArguments],
) -> Following:
    """Let ``optimizer.state_dict()`` carry the model's names, and ``optimizer.load_state_dict()`` bind by them.

    One line, before a framework saves or loads, makes its checkpoints independent of the order of parameters and of
    their grouping; the files keep their form, with ``param_names`` in each group, which torch 2.6 and newer knows.
    A load follows the policies of ``binding.policies.Policies``, is exact (no cast to the parameters' dtype), and is
    refused with a ``BindError`` before anything changed; whatever is raised on the way, the optimizer is as it was. A
    state dict without names is left to torch, with a warning.

    torch's hooks do it, so they go where those go: ``copy.deepcopy`` and ``pickle`` of an optimizer lose them, and
    inside ``torch.distributed.checkpoint.state_dict``, which goes by names of its own, they do nothing. Raises
    ``CaptureError`` for an optimizer whose class has a ``load_state_dict`` that calls no hooks.
    """
    (own,) = optimizers_of(optimizer)
    loader = type(own).load_state_dict
    code = getattr(getattr(loader, "__wrapped__", loader), "__code__", None)
    if loader is not torch.optim.Optimizer.load_state_dict and "load_state_dict" not in getattr(code, "co_names", ()):
        raise CaptureError(
            f"{type(own).__module__}.{type(own).__qualname__} has a load_state_dict of its own that calls no hooks; "
            "use save_optimizer and load_optimizer"
        )
    asked = Policies(**policies)
    pending: list[tuple[planning.LoadPlan, Live, list[dict[str, Any]]]] = []

    def put_names(found: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        if not _inside_dcp():
            names = [names for _, _, names in grouped([found], named_tensors(model))]
            for group, listed in zip(state_dict["param_groups"], names, strict=True):
                group["param_names"] = list(listed)

    def take_names(found: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        pending.clear()
        if _inside_dcp():
            return None
        state = _named(state_dict, model)
        if state is None:
            logger.warning(
                "a state dict without names goes into the optimizer by the order of its parameters, which nothing "
                "proves; the next one that is saved will have names"
            )
            return None
        live = describe(found, model)
        loading = planning.plan(state, live.side, asked)
        loading.check()
        pending.append((loading, live, found.param_groups))
        # torch goes on with this: nothing that it could cast or mix up. What it replaces is put back behind it.
        numbers = iter(range(sum(len(group["params"]) for group in found.param_groups)))
        groups = [{**group, "params": [next(numbers) for _ in group["params"]]} for group in found.param_groups]
        return {"state": {}, "param_groups": groups}

    def finish(found: torch.optim.Optimizer) -> None:
        if pending:
            loading, live, groups = pending.pop()
            found.param_groups = groups
            carry_out(loading, live)

    def load_state_dict(*arguments: Any, **options: Any) -> None:
        """Load as the class does; between its hooks torch empties the optimizer, so put back what it was on failure."""
        back = remembered(own)
        try:
            loader(own, *arguments, **options)
        except BaseException:
            back()
            raise

    handles = (
        own.register_state_dict_post_hook(put_names),
        own.register_load_state_dict_pre_hook(take_names),
        own.register_load_state_dict_post_hook(finish),
    )
    vars(own)["load_state_dict"] = load_state_dict
    return Following(handles, own)


def _inside_dcp() -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != DCP_STATE_DICT:
        frame = frame.f_back
    return frame is not None


def _named(state_dict: Mapping[str, Any], model: Models) -> OptimizerState | None:
    """Return the state under the names that the state dict carries; ``None`` if it carries none."""
    if not all("param_names" in group for group in state_dict["param_groups"]):
        return None
    positional = from_state_dict(state_dict, leaf=cast("Leaf", as_leaf), origin={"format": "torch"})
    names = list(chain.from_iterable(group["param_names"] for group in state_dict["param_groups"]))
    if len(set(names)) != len(positional.ids):
        raise ConversionError(f"a state dict with {len(set(names))} names for {len(positional.ids)} parameters")
    live = named_tensors(model).tensors
    parameters = [
        Parameter(name, tuple(live[name].shape) if shape is None and name in live else shape or (), None)
        for name, shape in zip(names, positional.shapes(), strict=True)
    ]
    return positional.named(parameters, Naming("checkpoint"))
