"""Sharded models: state loaded by each rank with its own bytes only, and verified by all together.

torch's own planner does the resharding: a state is a DCP ``StorageReader``, so any placement that DCP knows is loaded
from any file, whatever it was saved on. Every rank takes part, and if one fails, all fail with its message.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor
from torch.futures import Future

from lora_state_format.errors import DigestError
from lora_state_format.model.digests import hash_tensor, stated_hash
from lora_state_format.model.states import OptimizerState
from lora_state_format.model.tensors import CHUNK, Tensor
from lora_state_format.torch.exchange import gather
from lora_state_format.torch.ranks import Ranks
from lora_state_format.torch.spread import box_of
from lora_state_format.torch.tensors import DTYPES, read_into

__all__ = [
    "StateReader",
    "hashes",
    "read_shard",
    "shared_out",
    "verify_share",
]

# --- loading --------------------------------------------------------------------------------------------------------


class StateReader(StorageReader):
    """Tensors of a state for ``torch.distributed.checkpoint``: ``dcp.load(tree, storage_reader=StateReader(tensors))``.

    Of each tensor only what a rank's plan asks for is read. Digests cover whole tensors: those that are read in parts
    are verified by ``verify_share``. Keys are what the mapping has, values go into tensors of the same shape.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    @classmethod
    def of(cls, state: OptimizerState, key: Callable[[str, str], str] = "{}/{}".format) -> StateReader:
        """Return all tensors of a state, under ``key(parameter, slot)``; nested slots are joined by dots."""
        return cls(
            {
                key(parameter.name, ".".join(map(str, path))): slot.tensor
                for parameter in state.parameters
                for path, slot in parameter.tensors()
            }
        )

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: there is nothing to reset."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata that torch's planner works with."""
        return Metadata(
            state_dict_metadata={
                key: TensorStorageMetadata(
                    TensorProperties(dtype=DTYPES[tensor.dtype]),
                    torch.Size(tensor.shape),
                    [ChunkStorageMetadata(torch.Size([0] * len(tensor.shape)), torch.Size(tensor.shape))],
                )
                for key, tensor in self._tensors.items()
            },
            storage_data={
                MetadataIndex(key, torch.Size([0] * len(tensor.shape))): key for key, tensor in self._tensors.items()
            },
            storage_meta=StorageMeta(),
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the state is open."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this rank needs of each item."""
        for item in plan.items:
            assert item.type is LoadItemType.TENSOR
            key = item.storage_index.fqn
            tensor, lengths = self._tensors[key], tuple(item.lengths)
            if lengths != tensor.shape:
                tensor = tensor.part(item.storage_offsets, lengths)
            target = planner.resolve_tensor(item).detach()
            read_into(tensor, target, where=key)
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return ``False``: this reader is never chosen by a path."""
        return False


def read_shard(tensor: Tensor, out: DTensor, where: str) -> None:
    """Read this rank's part of a tensor into its part of ``out``, whatever the placement.

    Raises ``CaptureError`` for a placement that gives a rank what is no box.
    """
    if box_of(out) is None:
        return
    reader, planner = StateReader({where: tensor}), DefaultLoadPlanner()
    planner.set_up_planner({where: out}, reader.read_metadata(), is_coordinator=False)
    reader.read_data(planner.create_local_plan(), planner).wait()


# --- verifying ------------------------------------------------------------------------------------------------------


def shared_out(sizes: Sequence[int], count: int) -> list[int]:
    """Return for each piece of work which of ``count`` does it, so that all have about the same size of it to do."""
    loads = [(0, rank) for rank in range(count)]
    owners = [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        load, owners[number] = heapq.heappop(loads)
        heapq.heappush(loads, (load + sizes[number], owners[number]))
    return owners


def verify_share(tensors: Mapping[str, Tensor]) -> None:
    """Read and verify this rank's share of tensors of which every rank has read a part: each by one rank.

    Raises:
        DigestError: For one that does not have its digest, with its key.
    """
    stated = [(key, tensor) for key, tensor in tensors.items() if stated_hash(tensor) is not None]
    owners = shared_out([tensor.size for _, tensor in stated], dist.get_world_size())
    buffer = memoryview(bytearray(CHUNK))
    for (key, tensor), owner in zip(stated, owners, strict=True):
        if owner == dist.get_rank() and hash_tensor(tensor, buffer) != stated_hash(tensor):
            raise DigestError(f"{key} does not match its digest: the file was changed after it was written")


def hashes(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, str]:
    """Return the hash of each of some tensors that are spread over the ranks: each is hashed by one rank."""
    keys = list(tensors)
    owners = shared_out([tensor.size for tensor in tensors.values()], ranks.world)
    wanted: list[list[str]] = [[] for _ in range(ranks.world)]
    for key, owner in zip(keys, owners, strict=True):
        wanted[owner].append(key)

    def read() -> dict[str, str]:
        return {key: hash_tensor(tensors[key]) for key in wanted[ranks.rank]}

    told = gather([[tensors[key] for key in mine] for mine in wanted], read, ranks)
    return {key: value for found in told for key, value in found.items()}
