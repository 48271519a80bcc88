"""The tensors of other people's weights files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lora_state_format.foreign import pickles
from lora_state_format.io.files import Files, PooledFile
from lora_state_format.io.safetensors import read_header
from lora_state_format.model.sources import File
from lora_state_format.model.tensors import Tensor

__all__ = ["read_weights"]


def read_weights(path: Path, files: Files) -> dict[str, Tensor]:
    """Return the tensors of a weights file, safetensors or ``torch.save``, under its keys and in its order."""
    if path.suffix == ".safetensors":
        with File(path) as file:
            header = read_header(file)
        return {key: _moved(tensor, files[path]) for key, tensor in header.tensors.items()}
    tree = pickles.load(files[path], path).value
    return {key: value for key, value in tree.items() if isinstance(value, Tensor)} if isinstance(tree, dict) else {}


def _moved(tensor: Tensor, source: PooledFile) -> Tensor:
    return replace(tensor, pieces=tuple(replace(piece, source=source) for piece in tensor.pieces))
