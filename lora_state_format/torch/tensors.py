"""Tensors of the model and of torch: views of live memory one way, bytes read straight into place the other."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
import xxhash

from lora_state_format.errors import DigestError, UnrepresentableError
from lora_state_format.io.ledger import Ledger
from lora_state_format.model.digests import stated_hash
from lora_state_format.model.dtypes import NAMES
from lora_state_format.model.sources import Memory, Source
from lora_state_format.model.states import Scalar, walk
from lora_state_format.model.tensors import CHUNK, Box, Piece, Tensor, contiguous
from lora_state_format.model.text import class_path

__all__ = [
    "DTYPES",
    "Copies",
    "dtype_name",
    "dtype_of",
    "empty",
    "from_torch",
    "is_sharded",
    "read_into",
    "refusal",
    "scalar_to_torch",
    "tensors_in",
    "to_torch",
]

DTYPES: Final[Mapping[str, torch.dtype]] = {
    name: getattr(torch, spelled) for name, spelled in NAMES.items() if hasattr(torch, spelled)
}
"""safetensors' dtypes as torch has them. The 4- and 6-bit ones, which torch packs or lacks, are not there."""

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str | None:
    """Return a torch dtype in safetensors' spelling, ``None`` if it has none."""
    return _NAMES.get(dtype)


def is_sharded(tensor: Any) -> bool:
    """Return whether this is a DTensor, of which each rank has its part."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the live tensors in a value of an optimizer, in order."""
    leaf: Any
    for _, leaf in walk(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf


def refusal(tensor: torch.Tensor) -> str | None:
    """Why a tensor's bytes cannot be taken as they are; ``None`` if they can."""
    if is_sharded(tensor):
        tensor = tensor.to_local()  # type: ignore[attr-defined]
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"of class {class_path(type(tensor))}, which has no form of its own here"
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return f"of layout {tensor.layout}, where torch.strided was expected"
    if tensor.dtype not in _NAMES:
        return f"of {tensor.dtype}, which safetensors does not have"
    if tensor.is_meta:
        return "on the meta device, without bytes"
    return None


class _Device:
    """The bytes of a one-dimensional tensor in another device's memory, copied as they are asked for."""

    crc32 = None

    def __init__(self, flat: torch.Tensor) -> None:
        self._flat = flat
        self.size = len(flat)

    def readinto(self, offset: int, out: memoryview) -> None:
        out[:] = self._flat[offset : offset + len(out)].cpu().numpy().data

    def view(self, offset: int, size: int) -> memoryview | None:
        return None


def from_torch(tensor: torch.Tensor) -> Tensor:
    """Return a live tensor as the places of its bytes: nothing is copied, and what changes there later changes here.

    Other layouts than C order are described by their strides. Raises ``UnrepresentableError`` for tensors that have no
    plain bytes (subclasses, sparse ones, dtypes that safetensors lacks).
    """
    reason = refusal(tensor)
    if reason:
        raise UnrepresentableError(f"a tensor {reason}")
    tensor = tensor.detach().resolve_conj().resolve_neg()
    shape, dtype = tuple(tensor.shape), _NAMES[tensor.dtype]
    if tensor.numel() == 0:
        return contiguous(dtype, shape, Memory(b""))
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape, tensor.stride(), strict=True))
    flat = torch.as_strided(tensor, (span,), (1,)).view(torch.uint8)
    source: Source = Memory(flat.numpy().data) if flat.device.type == "cpu" else _Device(flat)
    strides = None if tensor.is_contiguous() else tensor.stride()
    return Tensor(dtype, shape, (Piece(source, 0, Box((0,) * len(shape), shape), strides),))


def to_torch(tensor: Tensor, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Return a tensor of its own in CPU memory. Raises ``UnrepresentableError`` for a dtype that torch lacks."""
    result = empty(tensor.shape, dtype_of(tensor.dtype), torch.device("cpu"), order)
    read_into(tensor, result)
    return result


def empty(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, order: tuple[int, ...] | None = None
) -> torch.Tensor:
    """Return an uninitialised tensor whose axes lie in memory in this order, from the slowest to the fastest."""
    axes = order or tuple(range(len(shape)))
    back = sorted(range(len(axes)), key=axes.__getitem__)
    return torch.empty([shape[axis] for axis in axes], dtype=dtype, device=device).permute(back)


class Copies:
    """Copies of tensors in the host's memory, promised one by one and made all at once, while training stands still.

    Between copies of some MB, Python finds nothing of its own in the cache: capturing 96 tensors takes 5 ms without
    any, and took 25 ms between them.
    """

    def __init__(self) -> None:
        self._promised: list[tuple[torch.Tensor, torch.Tensor]] = []

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return where a tensor's copy will be; in pinned memory, which copies faster, if it is on a device."""
        source = tensor.detach()
        host = torch.empty_like(source, device="cpu", pin_memory=source.device.type == "cuda")
        self._promised.append((host, source))
        return host

    @torch.no_grad()
    def make(self) -> None:
        """Make all copies that were promised."""
        for host, source in self._promised:
            host.copy_(source)
        self._promised.clear()


def scalar_to_torch(scalar: Scalar) -> torch.Tensor:
    """Return a 0-d tensor in CPU memory."""
    return torch.frombuffer(bytearray(scalar.data), dtype=dtype_of(scalar.dtype)).reshape(())


def dtype_of(name: str) -> torch.dtype:
    """Return the torch dtype that safetensors spells so. Raises ``UnrepresentableError`` if this torch has none."""
    if name not in DTYPES:
        raise UnrepresentableError(f"a tensor of type {name}, which this torch does not have")
    return DTYPES[name]


@torch.no_grad()
def read_into(tensor: Tensor, out: torch.Tensor, *, ledger: Ledger | None = None, where: str = "a tensor") -> None:
    """Read a tensor's bytes into a torch tensor of its shape, of any device, layout and dtype.

    Bytes that are to lie in CPU memory in C order go straight there; else they pass through a buffer of 1 MiB, or of
    one row where rows are larger. A digest that the file states is compared on the way, or else ``ledger`` is told what
    its sources' CRC-32 needs. Raises ``DigestError`` that names ``where``; ``out`` is then garbage.
    """
    stated = stated_hash(tensor)
    hasher = xxhash.xxh3_128() if stated else None
    in_place = out.device.type == "cpu" and out.is_contiguous() and dtype_name(out.dtype) == tensor.dtype
    if out.numel() == 0:
        pass
    elif in_place and (stated or ledger is None):
        memory = out.reshape(-1).view(torch.uint8).numpy().data
        for offset in range(0, tensor.size, CHUNK):
            chunk = memory[offset : offset + CHUNK]
            tensor.readinto(offset, chunk)
            if hasher:
                hasher.update(chunk)
    else:
        buffer = memoryview(bytearray(CHUNK))
        rows = _Rows(out, dtype_of(tensor.dtype))
        for chunk in ledger.chunks(tensor, buffer) if ledger and not stated else tensor.chunks(buffer):
            if hasher:
                hasher.update(chunk)
            rows.write(chunk)
        rows.flush()
    if hasher and hasher.hexdigest() != stated:
        raise DigestError(f"{where} does not match its digest: the file was changed after it was written")


class _Rows:
    """Bytes in C order, written into a tensor of any layout, device and dtype some whole rows at a time."""

    def __init__(self, out: torch.Tensor, dtype: torch.dtype) -> None:
        self._out = out.reshape(-1) if out.is_contiguous() else out
        self._dtype = dtype
        self._row = math.prod(self._out.shape[1:]) * dtype.itemsize
        self._buffer = bytearray(max(CHUNK // self._row, 1) * self._row)
        self._filled = 0
        self._start = 0

    def write(self, chunk: memoryview) -> None:
        while len(chunk):
            count = min(len(chunk), len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + count] = chunk[:count]
            self._filled += count
            chunk = chunk[count:]
            if self._filled == len(self._buffer):
                self.flush()

    def flush(self) -> None:
        if self._filled:
            count = self._filled // self._row
            part = torch.frombuffer(self._buffer, dtype=self._dtype, count=self._filled // self._dtype.itemsize)
            self._out[self._start : self._start + count].copy_(part.reshape(count, *self._out.shape[1:]))
            self._start, self._filled = self._start + count, 0
