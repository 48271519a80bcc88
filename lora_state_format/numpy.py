"""Named optimizer state as NumPy arrays, for whoever has no torch: JAX, MLX, analysis."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from lora_state_format.errors import DigestError, MissingDependencyError
from lora_state_format.format.reading import open_state
from lora_state_format.model.digests import hash_tensor, stated_hash
from lora_state_format.model.dtypes import DTYPES
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import Scalar, Slot, Value, mapped
from lora_state_format.model.tensors import Tensor, contiguous

if TYPE_CHECKING:
    import numpy as np

__all__ = ["array", "load"]

EXTENDED: Final = {dtype: row.name for dtype, row in DTYPES.items() if row.name and row.numpy is None}
"""dtypes that NumPy has only with ``ml_dtypes``, which comes with jax."""


def load(path: str | os.PathLike[str], *, verify: bool = True) -> dict[str, dict[str, Any] | None]:
    """Return every parameter's slots by its name, in optimizer order; ``None`` for one that never took a step.

    Tensors are arrays of their own, those without axes too; other values are what they are. ``verify`` compares the
    digest of each tensor. Raises ``DigestError`` for one that differs, ``MissingDependencyError`` for a dtype that
    needs ``ml_dtypes``, and what ``open_state`` raises.
    """
    with open_state(path) as state:
        return {
            name: None
            if parameter.state is None
            else mapped(parameter.state, partial(_checked, name=name, file=path if verify else None))
            for name, parameter in state.items()
        }


def array(tensor: Tensor | Scalar) -> np.ndarray[Any, Any]:
    """Return a tensor as an array of its own; of a dtype of ``ml_dtypes`` where NumPy has none."""
    if isinstance(tensor, Scalar):
        tensor = contiguous(tensor.dtype, (), Memory(tensor.data))
    if tensor.dtype not in EXTENDED:
        return tensor.numpy()
    try:
        import ml_dtypes
        import numpy as np
    except ImportError as error:
        raise MissingDependencyError(f"NumPy has no {EXTENDED[tensor.dtype]}: pip install {error.name}") from error
    return np.frombuffer(tensor.bytes(), getattr(ml_dtypes, EXTENDED[tensor.dtype])).reshape(tensor.shape)


def _checked(leaf: Value, path: tuple[Any, ...], *, name: str, file: object) -> Any:
    """Return a leaf of a slot tree, a tensor as an array; its digest is compared if there is a ``file`` to name."""
    if isinstance(leaf, Slot):
        stated = stated_hash(leaf.tensor)
        if file is not None and stated and hash_tensor(leaf.tensor) != stated:
            where = ": ".join([f"'{name}'", *map(str, path)])
            raise DigestError(f"{where} does not match its digest", path=file, rule="R21")
        return array(leaf.tensor)
    return array(leaf) if isinstance(leaf, Scalar) else leaf
