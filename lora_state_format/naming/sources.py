"""Where the names of positional state come from: the caller, the checkpoint, the files next to it, a live model.

``name_state`` is the one way from a checkpoint to named state. It tries the sources in order of trust and hands the
parameters of the first one to ``order.decide``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from lora_state_format.errors import ConversionError, MissingNamesError, OptionError, Remedy
from lora_state_format.io.json_files import read_json_object
from lora_state_format.io.safetensors import read_header
from lora_state_format.model.sources import File
from lora_state_format.model.states import Checkpoint, OptimizerState, Parameter, PositionalState
from lora_state_format.model.tensors import Tensor
from lora_state_format.naming import order
from lora_state_format.naming.evidence import head_size
from lora_state_format.naming.names import adapter_parameters, peft_key, read_names
from lora_state_format.naming.rules import Described

__all__ = ["ADAPTER_CONFIG", "CONFIG", "Live", "Names", "Rebuild", "config_of", "name_state", "resolve", "with_weights"]

ADAPTER: Final = "adapter_model.safetensors"
MODEL: Final = "model.safetensors"
ADAPTER_CONFIG: Final = "adapter_config.json"
CONFIG: Final = "config.json"

Names: TypeAlias = "str | os.PathLike[str] | Sequence[str]"
"""Where names come from: the path of a file with one name a line in optimizer order, of an adapter file, or of a folder
with ``config.json`` and, for an adapter, ``adapter_config.json``; or the names themselves, in optimizer order."""

Rebuild: TypeAlias = "Callable[[Path, Path | None], Sequence[Described]]"
"""Describes the model of the configs in a folder, with the adapter of a config file if one is given."""


class Live(NamedTuple):
    """A live model and its optimizer: what ``parameters`` the model has, and which of them each group holds.

    ``weights`` are the parameters' values by name, for the evidence.
    """

    parameters: Sequence[Described]
    groups: Sequence[Sequence[str]]
    weights: Mapping[str, Tensor]


class _Source(NamedTuple):
    """Parameters in some order, where they come from, and the rule that they have to follow, if it is known."""

    parameters: Sequence[Parameter | Described]
    name: str
    rule: str | None


def name_state(
    checkpoint: Checkpoint,
    path: Path,
    *,
    names: Names | None = None,
    rule: str | None = None,
    live: Live | None = None,
    rebuild: Rebuild,
    weigh: bool = True,
) -> OptimizerState:
    """Return the state of a checkpoint under names; state that has names already is returned as it is.

    Args:
        checkpoint: What a converter read, after ``resolve``.
        path: Where it was read, for messages.
        names: What the caller says about names.
        rule: The grouping rule to force, one of ``rules.RULES``.
        live: The live model to take names from; it goes before everything in the checkpoint.
        rebuild: Describes the model of a folder with configs; called only after everything else failed.
        weigh: Whether the weights, if there are any, are read to tell how sure the order is.

    Raises:
        MissingNamesError: Nothing says which parameter a position means.
        OptionError: ``names`` or ``rule`` for a state that has names.
        ConversionError: No order fits, or several do (``AmbiguousOrderError``).
    """
    state = checkpoint.state
    if isinstance(state, OptimizerState):
        if names is not None or rule is not None:
            raise OptionError(f"{path}: its parameters have names; --names and --rule (names=, rule=) do not apply")
        return state
    source = _Source(live.parameters, "model", None) if live else _source(checkpoint, state, path, names, rebuild)
    return order.decide(
        state,
        source.parameters,
        rule=source.rule or rule,
        weights=(checkpoint.weights or (live.weights if live else None) or None) if weigh else None,
        head_dim=head_size(config_of(checkpoint, CONFIG) or {}),
        live=live.groups if live else None,
        source=source.name,
    )


def resolve(checkpoint: Checkpoint, names: Names | None) -> Checkpoint:
    """Return the checkpoint as if an adapter file that the caller names for names lay next to it."""
    if not isinstance(names, (str, os.PathLike)) or isinstance(checkpoint.state, OptimizerState):
        return checkpoint
    path = Path(names)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder to take names from")
    return with_weights(checkpoint, path) if _is_weights(path) else checkpoint


def with_weights(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """Return the checkpoint as if these weights, a file or in a folder, lay next to it."""
    if path.is_dir():
        path = next((path / name for name in (ADAPTER, MODEL) if (path / name).exists()), path / ADAPTER)
    weights = read_header(File(path)).tensors
    configs = {name: path.with_name(name) for name in (ADAPTER_CONFIG, CONFIG) if path.with_name(name).exists()}
    return replace(checkpoint, weights=weights, configs=configs)


def config_of(checkpoint: Checkpoint, name: str = ADAPTER_CONFIG) -> Mapping[str, Any] | None:
    """Return the parsed configuration file of that name, if there is one."""
    path = checkpoint.configs.get(name)
    return None if path is None else read_json_object(path)


def _is_weights(path: Path) -> bool:
    return not (path / CONFIG).exists() and (path.is_dir() or path.suffix == ".safetensors")


def _source(
    checkpoint: Checkpoint, state: PositionalState, path: Path, names: Names | None, rebuild: Rebuild
) -> _Source:
    """Return the first source of names that there is."""
    if names is not None and not isinstance(names, (str, os.PathLike)):
        return _Source(_listed(state, names, checkpoint), "names", "listed")
    if names is not None and (Path(names) / CONFIG).exists():
        return _Source(_rebuilt(Path(names), checkpoint, rebuild), "configs", None)
    if names is not None and not _is_weights(Path(names)):
        return _Source(_listed(state, read_names(names), checkpoint), "names", "listed")
    if _is_adapter(checkpoint):
        return _Source(adapter_parameters(checkpoint.weights, config=config_of(checkpoint)), "adapter", None)
    if state.names is not None:
        return _Source(_listed(state, state.names, checkpoint), "checkpoint", "listed")
    if CONFIG in checkpoint.configs:
        return _Source(_rebuilt(checkpoint.configs[CONFIG].parent, checkpoint, rebuild), "configs", None)
    raise MissingNamesError(
        f"{path}: stores {len(state.ids)} parameters by position and contains no names, and no neighbouring file "
        "names them",
        remedy=Remedy(
            "pass {names} with a file of names in optimizer order, the adapter file, or a folder with config.json and "
            "adapter_config.json",
            {"names": ...},
        ),
    )


def _listed(state: PositionalState, names: Sequence[str], checkpoint: Checkpoint) -> list[Parameter]:
    """Return parameters for names in optimizer order: as the weights have them, else shaped as their slots are.

    Keys of an adapter file are taken for the parameters that they stand for.
    """
    if len(names) != len(state.ids):
        raise ConversionError(f"{len(names)} names for the state of {len(state.ids)} parameters")
    adapter_file, config = _is_adapter(checkpoint), config_of(checkpoint)
    parameters = []
    for name, identity, shape in zip(names, state.ids, state.shapes(), strict=True):
        key, adapter = (name, "default") if name in checkpoint.weights else peft_key(name) or (name, "")
        tensor = checkpoint.weights.get(key)
        if tensor is not None and adapter_file:
            parameters += adapter_parameters({key: tensor}, adapter, config)
        elif tensor is not None:
            parameters.append(Parameter(name, tensor.shape, None, dtype=tensor.dtype))
        elif shape is not None:
            parameters.append(Parameter(name, shape, None))
        else:
            raise MissingNamesError(
                f"'{name}' (id {identity}) has no slot that shows its shape; pass --names (names=) with the adapter "
                "file or a folder with configs"
            )
    return parameters


def _is_adapter(checkpoint: Checkpoint) -> bool:
    """Return whether the weights are those of a PEFT adapter file, whose keys all begin alike."""
    first = next(iter(checkpoint.weights), None)
    return first is not None and (ADAPTER_CONFIG in checkpoint.configs or first.startswith("base_model.model."))


def _rebuilt(folder: Path, checkpoint: Checkpoint, rebuild: Rebuild) -> Sequence[Described]:
    """Return the parameters of the model of a folder; an adapter's config may lie next to the checkpoint."""
    return rebuild(folder, None if (folder / ADAPTER_CONFIG).exists() else checkpoint.configs.get(ADAPTER_CONFIG))
