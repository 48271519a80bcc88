"""Whether an optimizer took a step while it was being saved: torch counts what is written into a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_state_format.errors import CaptureError
from lora_state_format.torch.nested import stepping
from lora_state_format.torch.tensors import tensors_in

__all__ = ["Versions"]


class Versions:
    """The versions of an optimizer's tensors, as a resource of the state that was captured from it.

    Tensors made in inference mode have none, and a graph that was captured on a device changes them without a count.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._seen = [
            (tensor, tensor._version)
            for optimizer in optimizers
            for found in stepping(optimizer)
            for slots in found.state.values()
            for tensor in tensors_in(slots)
            if not tensor.is_inference()
        ]

    def check_unchanged(self) -> None:
        """Raise ``CaptureError`` if something was written into one of the tensors since."""
        changed = sum(tensor._version != version for tensor, version in self._seen)
        if changed:
            raise CaptureError(
                f"{changed} of the optimizer's {len(self._seen)} tensors were written into while they were saved, by a "
                "step in another thread; nothing was written: save between two steps"
            )

    def close(self) -> None:
        """Do nothing: the tensors are the optimizer's."""
