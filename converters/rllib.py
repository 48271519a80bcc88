"""RLlib's checkpoints of its learners: ``state.pkl``, next to the ``rl_module`` folder with the modules' weights.

The old API stack has one ``policy_state.pkl`` for each policy, in which ``weights`` are next to the optimizers.

It is a plain pickle of state dicts whose tensors are NumPy's arrays, as is each ``module_state.pkl``. Read without
running anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError
from lora_state_format.foreign import pickles
from lora_state_format.foreign.pickles import Record
from lora_state_format.foreign.state_dict import find, from_state_dict
from lora_state_format.model.sources import File
from lora_state_format.model.states import Checkpoint, Weights
from lora_state_format.model.tensors import Tensor
from lora_state_format.registry import Match

NAME: Final = "rllib"
DESCRIPTION: Final = (
    "RLlib's checkpoint of an algorithm or a learner: state.pkl beside rl_module; of a policy: policy_state.pkl"
)

STATE: Final = "state.pkl"
MODULES: Final = "rl_module"
MODULE: Final = "module_state.pkl"
LEARNER: Final = Path("learner_group", "learner")
"""Where the learner's folder is in that of an algorithm."""

POLICY: Final = "policy_state.pkl"
POLICIES: Final = "policies"
"""The folder with the policies' folders in that of an algorithm of the old API stack."""

VARIABLES, WEIGHTS = "_optimizer_variables", "weights"
"""Where a policy's state has its optimizers and its model."""

MOST: Final = 1 << 31
"""Bytes of a pickle that are read into memory: NumPy's arrays are inside of it."""


def detect(path: Path) -> Match | None:
    folder = path.parent if path.name == STATE else path
    for learner in (folder, folder / LEARNER):
        if (learner / STATE).is_file() and (learner / MODULES).is_dir():
            return Match(f"{STATE} beside {MODULES}", learner / STATE)
    places = [path] if path.name == POLICY else [path / POLICY, *sorted(path.glob(f"{POLICIES}/*/{POLICY}"))]
    found = [place for place in places if place.is_file()]
    return Match(f"a file {POLICY}", found[0]) if len(found) == 1 else None


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Return the state of the learner's optimizers, and the weights of its modules.

    Raises ``FileError`` for a damaged file or one without an optimizer, ``RefusedError`` for one that asks for code.
    """
    path = match.path
    tree = _unpickled(path)
    of_policy = path.name == POLICY and isinstance(tree, Mapping)
    found = find({VARIABLES: tree.get(VARIABLES)} if of_policy else tree)
    if not found:
        raise FileError("no optimizer's state dict in it (a dict with state and param_groups)", path=path)
    state = from_state_dict(*found, origin={"format": NAME})
    if of_policy:
        own = Weights(WEIGHTS, _arrays(tree.get(WEIGHTS)), ordered=True)
        return Checkpoint(state, candidates=((own,),) if own.tensors else ())
    modules = sorted((path.parent / MODULES).rglob(MODULE))
    weights = [Weights(file.parent.name, _arrays(_unpickled(file)), ordered=True) for file in modules]
    return Checkpoint(state, candidates=(tuple(found for found in weights if found.tensors),))


def _unpickled(path: Path) -> Any:
    with File(path) as file:
        if file.size > MOST:
            raise FileError(f"a pickle of {file.size} bytes, where at most {MOST} are read", path=path)
        return pickles.load_plain(bytes(file.read(0, file.size)), path, payload=True)


def _arrays(tree: Any) -> dict[str, Tensor]:
    """Return a module's arrays by name."""
    items = tree.items() if isinstance(tree, Mapping) else ()
    found = {key: pickles.array(value) for key, value in items if isinstance(key, str) and isinstance(value, Record)}
    return {key: tensor for key, tensor in found.items() if tensor is not None}
