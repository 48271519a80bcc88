"""Lightning's ``.ckpt``: one file with ``state_dict``, ``optimizer_states`` and the loops' own state.

The optimizers' state dicts are positional; ``state_dict`` has the parameters' names in the model's order. FSDP's full
checkpoints count positions through the whole model, frozen parameters included (``rekey_optim_state_dict`` without an
optimizer): there the position alone says the name. Sharded folders are DCP's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, OptionError, Remedy, UnrepresentableError
from lora_state_format.foreign import pickles
from lora_state_format.foreign.elsewhere import beside, is_lightning
from lora_state_format.foreign.state_dict import Found, from_state_dict, to_state_dict
from lora_state_format.foreign.torch_save import save
from lora_state_format.foreign.trees import member
from lora_state_format.format.envelope import is_state
from lora_state_format.format.reading import open_state
from lora_state_format.io.atomic import check_target
from lora_state_format.io.files import reading
from lora_state_format.model.sources import File
from lora_state_format.model.states import Checkpoint, OptimizerState, Weights
from lora_state_format.model.tensors import Tensor
from lora_state_format.registry import Match

NAME: Final = "lightning"
DESCRIPTION: Final = "a Lightning .ckpt file: optimizer_states beside pytorch-lightning_version"

TARGET: Final = "last.ckpt"


def detect(path: Path) -> Match | None:
    if not path.is_file():
        return None
    with File(path) as file:
        try:
            if pickles.mentions(file, b"pytorch-lightning_version"):
                return Match("a torch.save file whose pickle mentions pytorch-lightning_version", path)
        except FileError:
            pass
    return None


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    path = match.path
    with reading() as files:
        tree = pickles.load(files[path], path).value
        states = member(tree, "optimizer_states", list, path)
        if not states:
            raise FileError(
                "optimizer_states is empty: saved with save_weights_only, or without an optimizer", path=path
            )
        weights = {k: v for k, v in (tree.get("state_dict") or {}).items() if isinstance(v, Tensor)}
        if is_lightning(states):
            return Checkpoint(_next_to(path), weights)
        step = tree.get("global_step")
        version = tree.get("pytorch-lightning_version")
        state = from_state_dict(
            *(Found(("optimizer_states", index), value) for index, value in enumerate(states)),
            origin={"format": NAME, **({"lightning": version} if isinstance(version, str) else {})},
            global_step=step if isinstance(step, int) else None,
            resources=(files,),
        )
        return Checkpoint(
            state, weights, candidates=((Weights("state_dict", weights, ordered=True),),) if weights else ()
        )


def _next_to(path: Path) -> OptimizerState:
    """Return the named state that ``integrations.lightning`` keeps next to a ``.ckpt``."""
    state = beside(path)
    if not is_state(state):
        raise FileError(
            f"its optimizers were saved by name as {state.parent.name}/{state.name} next to it, which is not there; "
            "copy that folder along",
            path=path,
        )
    return open_state(state)


def write(state: OptimizerState, path: Path, *, base: Path | None, force: bool, options: Mapping[str, Any]) -> None:
    """Write ``base``, a ``.ckpt`` of the same run, with the state in place of its ``optimizer_states``.

    Raises ``UnrepresentableError`` where the number of optimizers differs, or for a value that torch could not load.
    """
    if base is None:
        raise OptionError(
            f"{NAME} takes all but the optimizers from a .ckpt of the same run",
            remedy=Remedy("pass it as {base}", {"base": ...}),
        )
    check_target(path, force=force)
    with reading() as files:
        tree = pickles.load(files[base], base).value
        count = len(member(tree, "optimizer_states", list, base))
        if count != len(state.optimizers):
            raise UnrepresentableError(f"{base} has {count} optimizers, the state {len(state.optimizers)}")
        save({**tree, "optimizer_states": [to_state_dict(state, i) for i in range(count)]}, path, force=force)
        files.close()
