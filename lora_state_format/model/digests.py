"""Checksums of tensors: stated by a file, computed from the bytes, and compared."""

from __future__ import annotations

from typing import Final

import xxhash

from lora_state_format.errors import DigestError
from lora_state_format.model.tensors import Tensor

__all__ = ["ALGORITHM", "check_hash", "hash_tensor", "stated_hash"]

ALGORITHM: Final = "xxh3-128"
"""The algorithm of the digests that are written."""


def hash_tensor(tensor: Tensor, buffer: memoryview | None = None) -> str:
    """Return the xxh3-128 of a tensor's little-endian C-order bytes, as 32 hex digits."""
    hasher = xxhash.xxh3_128()
    for chunk in tensor.chunks(buffer):
        hasher.update(chunk)
    return hasher.hexdigest()


def stated_hash(tensor: Tensor) -> str | None:
    """Return the digest that the tensor's file states; ``None`` if it states none by this algorithm."""
    return tensor.digest.hex if tensor.digest and tensor.digest.algorithm == ALGORITHM else None


def check_hash(key: str, tensor: Tensor, found: str) -> None:
    """Raise ``DigestError`` for a tensor whose file states another digest than its bytes have."""
    if stated_hash(tensor) not in (None, found):
        raise DigestError(f"tensor {key!r} does not match the digest in the file that it comes from", rule="R21")
