"""Sharded models: state of DTensors saved by all ranks together, loaded by each rank with its own bytes only.

torch's own planner does the resharding: a state is a DCP ``StorageReader``, so any placement that DCP knows is loaded
from any file, whatever it was saved on. Saving brings one tensor at a time together for the rank that writes it. Every
rank takes part in both, and if one fails, all fail with its message.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, TypeVar, cast

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

from lora_state_format.errors import CaptureError, RankError
from lora_state_format.model.states import OptimizerState
from lora_state_format.model.tensors import Tensor, contiguous
from lora_state_format.torch.tensors import DTYPES, dtype_name, read_into

__all__ = ["StateReader", "Together", "agreement", "follow", "from_first", "gathered", "read_shard"]

T = TypeVar("T")

# --- loading --------------------------------------------------------------------------------------------------------


class StateReader(StorageReader):
    """Tensors of a state for ``torch.distributed.checkpoint``: ``dcp.load(tree, storage_reader=StateReader(tensors))``.

    Of each tensor only what a rank's plan asks for is read. Digests cover whole tensors, so those that are read in
    parts are not verified. Keys are what the mapping has, values go into tensors of the same shape.
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
    """Read this rank's part of a tensor into its part of ``out``, whatever the placement."""
    reader, planner = StateReader({where: tensor}), DefaultLoadPlanner()
    planner.set_up_planner({where: out}, reader.read_metadata(), is_coordinator=False)
    reader.read_data(planner.create_local_plan(), planner).wait()


@contextlib.contextmanager
def agreement(together: bool) -> Iterator[Callable[[], None]]:
    """Around what all ranks do or none: each calls what it is given before it changes anything.

    If a rank fails before that, every other one raises ``RankError`` with its message.
    """
    settled = not together

    def settle() -> None:
        nonlocal settled
        if not settled:
            settled = True
            _exchange(None)

    try:
        yield settle
    except BaseException as error:
        if not settled:
            with contextlib.suppress(RankError):
                _exchange(error)
        raise


def _exchange(error: BaseException | None) -> None:
    """Tell every rank how this one fares. Raises ``RankError`` if any has failed."""
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if error is None else f"{type(error).__name__}: {error}")
    for rank, message in enumerate(messages):
        if message is not None:
            raise RankError(f"rank {rank} failed: {message}")


# --- saving ---------------------------------------------------------------------------------------------------------

READY: Final = 0
DONE: Final = 1
FAILED: Final = 2


class Together:
    """Around a save in which every rank takes part: they go from one sharded tensor to the next in step.

    Before each tensor, and at the end, every rank says how it fares; where one has failed, all stop. Which tensor is
    next follows from the state, so the ranks compare first what they are going to take.
    """

    def __init__(self) -> None:
        self._device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        self._held: tuple[DTensor, memoryview] | None = None

    def take(self, tensor: DTensor) -> memoryview:
        """Return all bytes of a tensor. Only the last one taken is held."""
        if self._held is None or self._held[0] is not tensor:
            self._held = None
            if self._sync(READY) != READY:
                raise RankError("another rank failed")
            full = cast("DTensor", tensor.detach()).full_tensor().cpu().contiguous()
            self._held = tensor, full.reshape(-1).view(torch.uint8).numpy().data
        return self._held[1]

    def compare(self, signature: str) -> None:
        """Raise ``RankError`` on every rank unless all give the same ``signature`` of what they are going to take."""
        if self._sync(READY) != READY:
            raise RankError("another rank failed")
        signatures: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(signatures, signature)
        if len(set(signatures)) > 1:
            raise CaptureError(
                f"the ranks do not hold state of the same tensors (rank {signatures.index(signature)} and rank "
                f"{next(rank for rank, other in enumerate(signatures) if other != signature)}): their models or "
                "optimizers differ, or some took no step"
            )

    def _sync(self, flag: int) -> int:
        """Return what all ranks say, or ``FAILED`` where they do not say the same."""
        flags = torch.tensor([flag, -flag], device=self._device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        worst, best = int(flags[0]), -int(flags[1])
        return worst if worst == best else FAILED

    def __enter__(self) -> Together:
        global _together
        _together = self
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        global _together
        _together = None
        self._held = None
        stopped = isinstance(error, RankError)
        if not stopped:
            stopped = self._sync(DONE if error is None else FAILED) != DONE and error is None
        # Every rank knows by now whether all is well; what was wrong is told here.
        try:
            _exchange(None if stopped else error)
        except RankError:
            if stopped:
                raise
        if stopped:
            raise RankError("the ranks did not save the same tensors: their optimizers or models differ")


_together: Together | None = None


class _Gathered:
    """The bytes of a whole DTensor, brought together when they are asked for."""

    crc32 = None

    def __init__(self, tensor: DTensor) -> None:
        self.tensor = tensor
        self.size = tensor.numel() * tensor.element_size()

    def _bytes(self) -> memoryview:
        if _together is None:
            raise CaptureError("the model is sharded: call save_optimizer on every rank")
        return _together.take(self.tensor)

    def readinto(self, offset: int, out: memoryview) -> None:
        out[:] = self._bytes()[offset : offset + len(out)]

    def view(self, offset: int, size: int) -> memoryview | None:
        return self._bytes()[offset : offset + size]


def gathered(tensor: DTensor) -> Tensor:
    """Return a DTensor as all its bytes, which can be read inside ``Together``."""
    dtype = dtype_name(tensor.dtype)
    assert dtype is not None
    return contiguous(dtype, tuple(tensor.shape), _Gathered(tensor))


def follow(tensors: Iterable[Tensor]) -> None:
    """Take part, on the ranks that do not write, in bringing each tensor together when its turn comes."""
    for tensor in tensors:
        for piece in tensor.pieces:
            if isinstance(piece.source, _Gathered) and tensor.size:
                piece.source.view(0, 0)


def from_first(value: T | None) -> T:
    """Return, on every rank, what rank 0 has."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    return box[0]
