"""Plain safetensors files, as other programs read and write them: tensors under keys, and strings about them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import TargetExistsError
from lora_state_format.io.atomic import TemporaryFile
from lora_state_format.io.ledger import Ledger
from lora_state_format.model.tensors import BITS, CHUNK, Tensor

__all__ = ["header", "save"]

ALIGNMENT: Final = 64


def header(entries: Sequence[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the length and the header of a file with these keys, dtypes, shapes and sizes in bytes, in data order."""
    members: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for key, dtype, shape, size in entries:
        members[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(members, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw


def save(
    tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None, force: bool = False
) -> None:
    """Write tensors as one file, whole or not at all; those of wide elements first, so that all are aligned.

    Raises ``TargetExistsError`` unless ``force``, and ``FileError`` for damaged bytes.
    """
    if path.exists() and not force:
        raise TargetExistsError(f"{path} exists; pass force=True (--force) to replace it")
    ordered = sorted(tensors.items(), key=lambda item: (-BITS[item[1].dtype], item[0]))
    head = header([(key, tensor.dtype, tensor.shape, tensor.size) for key, tensor in ordered], metadata)
    ledger, buffer = Ledger(), memoryview(bytearray(CHUNK))
    with TemporaryFile(path) as file:
        position = len(head)
        for _, tensor in ordered:
            for chunk in ledger.chunks(tensor, buffer):
                file.write(position, chunk)
                position += len(chunk)
        ledger.check()
        file.finish(head)
        file.commit(path)
