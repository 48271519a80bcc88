"""FSDP1: ``FullyShardedDataParallel`` with ``use_orig_params=True``, which leaves each rank runs of elements.

A load reads each rank's runs from the file. A save goes through torch's full state dict, which brings the whole state
together in the memory of rank 0.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch

from lora_state_format.errors import CaptureError
from lora_state_format.model.tensors import Tensor, contiguous

__all__ = ["Part", "full_state", "parts_of", "run_of", "whole_weights"]


@dataclass(frozen=True, slots=True)
class Part:
    """What this rank has of a parameter of ``shape``: ``count`` elements from ``start`` on, in C order."""

    shape: tuple[int, ...]
    start: int
    count: int


def parts_of(model: torch.nn.Module) -> dict[int, Part]:
    """Return the parameters that FSDP1 has cut up, by ``id(parameter)``; no more than a look where there can be none.

    Raises ``CaptureError`` for ``use_orig_params=False``, where parameters have no names of their own.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    found: dict[int, Part] = {}
    for module in model.modules() if fsdp else ():
        handle: Any = getattr(module, "_handle", None) if isinstance(module, fsdp.FullyShardedDataParallel) else None  # type: ignore[union-attr]
        if handle is None:
            continue
        if not handle._use_orig_params:
            raise CaptureError(
                "FullyShardedDataParallel with use_orig_params=False makes one flat parameter of many, and their "
                "optimizer's state has no names; wrap the model with use_orig_params=True"
            )
        if handle.uses_sharded_strategy:
            flat = handle.flat_param
            for parameter, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
                found[id(parameter)] = Part(tuple(shape), info.intra_param_start_idx or 0, info.numel_in_shard or 0)
    return found


def run_of(tensor: Tensor, part: Part) -> Tensor:
    """Return a rank's elements of a slot of the parameter's shape; nothing is read."""
    return contiguous(tensor.dtype, (tensor.count,), tensor).part((part.start,), (part.count,))


def full_state(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> Mapping[str, Mapping[str, Any]]:
    """Return the slots of whole parameters by name on rank 0, nothing on the others; every rank must call this."""
    from torch.distributed.fsdp import (
        FullOptimStateDictConfig,
        FullStateDictConfig,
        FullyShardedDataParallel,
        StateDictType,
    )

    # On a CPU, torch (2.13) offloads by doing nothing and gathers every slot into one buffer: all come out as the last.
    offload = _elsewhere(model)
    whole = (
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(offload_to_cpu=offload, rank0_only=True),
        FullOptimStateDictConfig(offload_to_cpu=offload, rank0_only=True),
    )
    with warnings.catch_warnings():
        # torch advises get_optimizer_state_dict instead, which takes a step with an optimizer that has taken none.
        warnings.simplefilter("ignore", FutureWarning)
        with FullyShardedDataParallel.state_dict_type(model, *whole):
            gathered = FullyShardedDataParallel.optim_state_dict(model, optimizer)
    return cast("Mapping[str, Mapping[str, Any]]", gathered.get("state", {}))


@contextmanager
def whole_weights(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model has its whole parameters on rank 0; every rank must enter."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    summon = cast("Callable[..., Any]", FullyShardedDataParallel.summon_full_params)
    # On a CPU, what torch offloads it frees as well.
    with summon(model, writeback=False, rank0_only=True, offload_to_cpu=_elsewhere(model)):
        yield


def _elsewhere(model: torch.nn.Module) -> bool:
    """Return whether there is anything to move to the host's memory."""
    return any(parameter.device.type != "cpu" for parameter in model.parameters())
