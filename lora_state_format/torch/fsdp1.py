"""FSDP1: ``FullyShardedDataParallel`` with ``use_orig_params=True``, which leaves each rank runs of elements.

Each rank reads its runs from the file, and sends its runs to the ranks that write.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from lora_state_format.errors import CaptureError
from lora_state_format.model.tensors import Tensor, contiguous

__all__ = ["Part", "parts_of", "run_of"]


@dataclass(frozen=True, slots=True)
class Part:
    """What this rank has of a parameter of ``shape``: ``count`` elements from ``start`` on, in C order."""

    shape: tuple[int, ...]
    start: int
    count: int
    own: torch.Tensor | None
    """The same elements of the parameter itself; ``None`` where this rank has the whole parameter."""
    dtype: str | None = None
    """Of the copy that the optimizer steps, where that is another one than the parameter."""


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
                found[id(parameter)] = Part(
                    tuple(shape), info.intra_param_start_idx or 0, info.numel_in_shard or 0, parameter
                )
    return found


def run_of(tensor: Tensor, part: Part) -> Tensor:
    """Return a rank's elements of a slot of the parameter's shape; nothing is read."""
    return contiguous(tensor.dtype, (tensor.count,), tensor).part((part.start,), (part.count,))
