"""The weights of an adapter of one rank, put into a model with an adapter of another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import torch

from lora_state_format.errors import BindError
from lora_state_format.io.safetensors import read_header
from lora_state_format.model.sources import File
from lora_state_format.naming.names import peft_key
from lora_state_format.torch.tensors import to_torch

__all__ = ["resize_adapter"]

AXES: Final = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
"""The axis of each of LoRA's matrices that is as long as the rank."""


def resize_adapter(model: torch.nn.Module, path: str | os.PathLike[str], *, adapter: str = "default") -> None:
    """Put the weights of an adapter file into a PEFT model whose LoRA has another rank.

    A smaller rank cuts: the last rows of A and columns of B are lost. A larger one pads: new rows of A keep the values
    that they have in the model, new columns of B become zero, so that ``B @ A`` is what it was. The model then computes
    what it did before if alpha / r is what it was, too. Weights without a rank (magnitudes, ``modules_to_save``) are
    copied. ``load_optimizer(..., mismatch="resize")`` does the same to the moments.

    Args:
        model: The PEFT model.
        path: ``adapter_model.safetensors``, or the folder that holds it.
        adapter: The name of the adapter in the model.

    Raises:
        BindError: A weight of the file is not in the model, or differs in more than the rank. Nothing was changed.
        FileError: The file is damaged.
    """
    path = Path(path)
    own = {
        key[0]: (name, parameter)
        for name, parameter in model.named_parameters()
        if (key := peft_key(name)) and key[1] == adapter
    }
    with File(path / "adapter_model.safetensors" if path.is_dir() else path) as file:
        planned = []
        for stored, tensor in read_header(file).tensors.items():
            if stored not in own:
                raise BindError(
                    f"{path}: '{stored}' is not in the model's adapter '{adapter}', which has {len(own)} weights"
                )
            name, parameter = own[stored]
            matrix = next((part for part in name.split(".") if part in AXES), "")
            axis = AXES.get(matrix)
            differing = [n for n, (a, b) in enumerate(zip(tensor.shape, parameter.shape, strict=False)) if a != b]
            if len(tensor.shape) != parameter.dim() or not set(differing) <= ({axis} if axis is not None else set()):
                raise BindError(
                    f"{path}: '{stored}' has shape {list(tensor.shape)}, and '{name}' in the model "
                    f"{list(parameter.shape)}: more than the rank differs"
                )
            planned.append((parameter, axis, to_torch(tensor), matrix.endswith("_B")))
    with torch.no_grad():
        for parameter, axis, values, is_b in planned:
            if axis is None or values.shape == parameter.shape:
                parameter.copy_(values)
                continue
            if is_b:
                parameter.zero_()
            count = min(values.shape[axis], parameter.shape[axis])
            parameter.narrow(axis, 0, count).copy_(values.narrow(axis, 0, count))
