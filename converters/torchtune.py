"""torchtune's ``recipe_state.pt``: the optimizer under the names that torchtune's own model has.

The optimizer is given every parameter of the model, so that a LoRA run's groups list the frozen ones too. Nothing says
the shapes of those, and they never take a step: they are left out, and listed in ``origin["frozen"]``. With one
optimizer per parameter (``optimizer_in_bwd``) consecutive ones with equal options become a group. Layout: torchtune
0.6's ``training/checkpointing/_checkpoint_client.py`` and ``training/memory.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError
from lora_state_format.foreign import keyed, pickles
from lora_state_format.foreign.state_dict import from_state_dict, is_state_dict
from lora_state_format.foreign.trees import member
from lora_state_format.foreign.weights import read_weights
from lora_state_format.io.files import reading
from lora_state_format.model.sources import File
from lora_state_format.model.states import Checkpoint
from lora_state_format.registry import Match

NAME: Final = "torchtune"
DESCRIPTION: Final = "torchtune's recipe_state.pt, or the folder of an epoch or a step with it"

RECIPE: Final = "recipe_state.pt"
_WEIGHTS: Final = ("adapter_model.pt", "adapter_0.pt")


def detect(path: Path) -> Match | None:
    place = _place(path)
    if place is None:
        return None
    with File(place) as file:
        try:
            found = pickles.mentions(file, b"epochs_run") and pickles.mentions(file, b"optimizer")
        except FileError:
            return None
    return Match(f"{RECIPE} with epochs_run and an optimizer", place) if found else None


def _place(path: Path) -> Path | None:
    if path.is_file():
        return path
    return next((p for p in (path / RECIPE, path / "recipe_state" / RECIPE) if p.is_file()), None)


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    place = match.path
    with reading() as files:
        tree = pickles.load(files[place], place).value
        optimizer = member(tree, "optimizer", dict, place)
        folder = place.parent.parent if place.parent.name == "recipe_state" else place.parent
        weights_file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
        weights = read_weights(weights_file, files) if weights_file else {}
        state = optimizer if is_state_dict(optimizer) else _in_backward(optimizer, place)
        stepped = state["state"]
        frozen = [
            name
            for group in state["param_groups"]
            for name in group["params"]
            if isinstance(name, str) and name not in stepped and name not in weights
        ]
        state = {
            **state,
            "param_groups": [
                {**group, "params": [name for name in group["params"] if name not in set(frozen)]}
                for group in state["param_groups"]
            ],
        }
        origin: dict[str, Any] = {"format": NAME, **({"frozen": frozen} if frozen else {})}
        return Checkpoint(
            keyed.named(from_state_dict(state, origin=origin, resources=(files,)), weights=weights), weights
        )


def _in_backward(optimizers: Mapping[Any, Any], path: Path) -> dict[str, Any]:
    """Return the state dicts of one optimizer per parameter as one; the newer form counts parameters, without names."""
    single = optimizers.get("optimizers", optimizers)
    state: dict[Any, Any] = {}
    groups: list[dict[str, Any]] = []
    for key in single:
        tree = member(single, key, dict, path)
        if not is_state_dict(tree) or len(tree["param_groups"]) != 1 or len(tree["param_groups"][0]["params"]) != 1:
            raise FileError(f"'{key}' is not the state dict of an optimizer of one parameter", path=path)
        name = int(key) if single is not optimizers and str(key).isdecimal() else key
        (group,), (identity,) = tree["param_groups"], tree["param_groups"][0]["params"]
        if identity in tree["state"]:
            state[name] = tree["state"][identity]
        options = {option: value for option, value in group.items() if option != "params"}
        if not groups or {option: value for option, value in groups[-1].items() if option != "params"} != options:
            groups.append({**options, "params": []})
        groups[-1]["params"].append(name)
    return {"state": state, "param_groups": groups}
