"""Composer's ``ep1-ba8-rank0.pt``: optimizers by class name, keyed by parameter name, or by position in older files.

Sharded checkpoints are DCP folders. The layout is that of ``composer/core/state.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError
from lora_state_format.foreign import keyed, pickles
from lora_state_format.foreign.state_dict import Found, from_state_dict
from lora_state_format.foreign.trees import member
from lora_state_format.io.files import reading
from lora_state_format.model.sources import File
from lora_state_format.model.states import Checkpoint, Weights
from lora_state_format.model.tensors import Tensor
from lora_state_format.registry import Match

NAME: Final = "composer"
DESCRIPTION: Final = "a Composer checkpoint file: state.optimizers beside rank_zero_seed, or state._optimizers"


def detect(path: Path) -> Match | None:
    if not path.is_file():
        return None
    with File(path) as file:
        try:
            # In early 2022 the keys were the attributes' names.
            for words in ((b"optimizers", b"rank_zero_seed"), (b"_optimizers", b"_is_model_ddp_wrapped")):
                if all(pickles.mentions(file, word) for word in words):
                    return Match(f"a torch.save file whose pickle mentions {b' and '.join(words).decode()}", path)
        except FileError:
            pass
    return None


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    path = match.path
    with reading() as files:
        tree = member(pickles.load(files[path], path).value, "state", dict, path)
        key = "optimizers" if "optimizers" in tree else "_optimizers"
        optimizers = member(tree, key, dict, path)
        if not optimizers:
            raise FileError("state.optimizers is empty", path=path)
        found = [Found(("state", key, name), member(optimizers, name, dict, path)) for name in optimizers]
        model = tree.get("model", tree.get("_model"))
        weights = {k: v for k, v in model.items() if isinstance(v, Tensor)} if isinstance(model, dict) else {}
        state = from_state_dict(
            *found, origin={"format": NAME, **_versions(tree)}, global_step=_batches(tree), resources=(files,)
        )
        candidates = ((Weights("state.model", weights, ordered=True),),) if weights else ()
        return Checkpoint(keyed.named(state, weights=weights), weights, candidates=candidates)


def _versions(tree: dict[str, Any]) -> dict[str, Any]:
    metadata = tree.get("metadata")
    info = metadata.get("composer_env_info") if isinstance(metadata, dict) else None
    version = info.get("composer_version") if isinstance(info, dict) else None
    return {"composer": version} if isinstance(version, str) else {}


def _batches(tree: dict[str, Any]) -> int | None:
    """Return how many batches were trained: Composer's count of steps."""
    timestamp = tree.get("timestamp")
    inner = timestamp.get("Timestamp") if isinstance(timestamp, dict) else None
    batch = inner.get("batch") if isinstance(inner, dict) else None
    batch = batch.get("value") if isinstance(batch, dict) else batch
    return batch if type(batch) is int else None
