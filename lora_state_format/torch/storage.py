"""``torch.distributed.checkpoint`` writes this format: ``dcp.save(state, storage_writer=NamedStorageWriter(path))``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from lora_state_format.errors import OptionError
from lora_state_format.foreign.state_dict import Leaf, find, from_state_dict
from lora_state_format.format import writing
from lora_state_format.model.states import Naming, OptimizerState, Parameter
from lora_state_format.torch.capture import as_leaf
from lora_state_format.torch.ranks import background_group
from lora_state_format.torch.together import Captured, write_together

__all__ = ["NamedStorageWriter"]


class NamedStorageWriter(StorageWriter):
    """Writes the optimizer's state in what ``dcp.save`` and ``dcp.async_save`` are given, by name, as one state.

    What they are given is ``{"optimizer": get_optimizer_state_dict(model, optimizer)}``: names are those of torch's own
    state dict. Of a run with several ranks each writes its own files, as ``save_optimizer`` does.

    Args:
        path: What the state is to be opened by.
        optimizer: The optimizer's class path, which a state dict does not say.
        global_step: The run's step.
        force: Replace what is there.
        max_shard_size: Bytes of tensors in a file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        optimizer: str | None = None,
        global_step: int | None = None,
        force: bool = True,
        max_shard_size: int | None = None,
    ) -> None:
        self._path = Path(path)
        self._optimizer = optimizer
        self._global_step = global_step
        self._force = force
        self._max_shard_size = max_shard_size
        # ``async_save`` writes in a thread, next to the run's own collectives.
        self._group = background_group() if dist.is_initialized() else None
        self.written: writing.Written | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Take the path that ``dcp.save`` was given, if any."""
        self._path = self._path if checkpoint_id is None else Path(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: every rank writes."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Return the plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the whole state, together with all other ranks."""
        given: Any = planner
        tree = unflatten_state_dict(given.state_dict, given.mappings)
        if dist.is_initialized():
            self.written = write_together(
                lambda: Captured(self._state(tree), {}, {}, {}),
                self._path,
                force=self._force,
                max_shard_size=self._max_shard_size,
                consolidate=False,
                group=self._group,
            )
        else:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            state = self._state(tree)
            self.written = writing.write(state, self._path, force=self._force, max_shard_size=self._max_shard_size)
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(item.index, 0, None) for item in plan.items])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Do nothing: the state was committed by ``write_data``."""

    def storage_meta(self) -> StorageMeta | None:
        """Return nothing that ``dcp`` would have to keep."""
        return None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether ``dcp.save`` may choose this writer by itself: never."""
        return False

    def _state(self, tree: Mapping[str, Any]) -> OptimizerState:
        found = find(tree)
        others = [key for key in tree if not any(item.path[:1] in ((key,), ()) for item in found)]
        if len(found) != 1 or others:
            raise OptionError(
                f"dcp.save was given {', '.join(map(repr, tree))}, and a named state holds one optimizer's: give it "
                "{'optimizer': get_optimizer_state_dict(model, optimizer)}, and save the rest with another writer"
            )
        positional = from_state_dict(
            found[0], class_path=self._optimizer, leaf=cast("Leaf", as_leaf), origin={"format": "torch"},
            global_step=self._global_step,
        )  # fmt: skip
        shapes = zip(positional.ids, positional.shapes(), strict=True)
        parameters = [Parameter(str(name), shape or (), None) for name, shape in shapes]
        named = positional.named(parameters, Naming("checkpoint"))
        return replace(named, parameters=tuple(replace(p, original_id=None) for p in named.parameters))
