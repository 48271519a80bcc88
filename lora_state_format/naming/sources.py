"""Where the names of positional state come from: the caller, the checkpoint, the files next to it, a live model.

``name_state`` is the one way from a checkpoint to named state. It tries the sources in order of trust, and hands the
parameters of each to ``order.decide`` until one fits: what the caller says; the tensors in the file, then those of
files next to it; names that the file states; the configs; several models of the file joined.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, permutations
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from lora_state_format.errors import (
    AmbiguousOrderError,
    ConversionError,
    FileError,
    MissingDependencyError,
    MissingNamesError,
    OptionError,
    Remedy,
)
from lora_state_format.io.json_files import read_json_object
from lora_state_format.model.sources import File
from lora_state_format.model.states import TOP, Checkpoint, OptimizerState, Parameter, PositionalState, Value, Weights
from lora_state_format.model.tensors import Tensor
from lora_state_format.naming import order
from lora_state_format.naming.evidence import head_size
from lora_state_format.naming.modules import in_module_order
from lora_state_format.naming.names import (
    adapter_orders,
    is_adapter_key,
    peft_key,
    plain_name,
    read_names,
    split_adapter,
)
from lora_state_format.naming.rules import Described

__all__ = [
    "ADAPTER_CONFIG",
    "CONFIG",
    "Live",
    "Named",
    "Names",
    "Rebuild",
    "config_of",
    "name_state",
    "split_names",
    "stem_of",
]

ADAPTER_CONFIG: Final = "adapter_config.json"
CONFIG: Final = "config.json"

Names: TypeAlias = "str | os.PathLike[str] | Sequence[str] | Sequence[os.PathLike[str]]"
"""Where names come from: the path of a file with one name a line in optimizer order, of a file of weights, or of a
folder with ``config.json`` and, for an adapter, ``adapter_config.json``; several such paths; or the names themselves,
in optimizer order."""

Rebuild: TypeAlias = "Callable[[Path, Path | None], Sequence[Described]]"
"""Describes the model of the configs in a folder, with the adapter of a config file if one is given."""


class Live(NamedTuple):
    """A live model and its optimizer: what ``parameters`` the model has, and which of them each group holds.

    ``weights`` are the parameters' values by name, for the evidence.
    """

    parameters: Sequence[Described]
    groups: Sequence[Sequence[str]]
    weights: Mapping[str, Tensor]


class Named(NamedTuple):
    """A state under names, and the parameters' own values, as far as the source of the names has them."""

    state: OptimizerState
    weights: Mapping[str, Tensor]
    skipped: tuple[str, ...] = ()
    """Files next to the state that could not be read, and why."""


class _Source(NamedTuple):
    """Parameters in some order, where they come from, and the rule that they have to follow, if it is known.

    ``others`` are further ways to see the same parameters. ``partly`` asks for those of them that the optimizer has.
    ``weights`` are their values, ``where`` is what their source is called.
    """

    parameters: Sequence[Parameter | Described]
    name: str
    rule: str | None
    weights: Mapping[str, Tensor]
    others: Sequence[Sequence[Parameter | Described]] = ()
    partly: bool = False
    where: str = ""


def name_state(
    checkpoint: Checkpoint,
    path: Path,
    *,
    names: Names | None = None,
    rule: str | None = None,
    live: Live | None = None,
    rebuild: Rebuild,
    weigh: bool = True,
) -> Named:
    """Return the state of a checkpoint under names; state that has names already is returned as it is.

    Args:
        checkpoint: What a converter read, with the weights that the caller gave.
        path: Where it was read, for messages.
        names: What the caller says about names, without weights: see ``split_names``.
        rule: The grouping rule to force, one of ``rules.RULES``.
        live: The live model to take names from; it goes before everything in the checkpoint.
        rebuild: Describes the model of a folder with configs; called only where the weights do not say their order.
        weigh: Whether the weights, if there are any, are read to tell how sure the order is.

    Raises:
        MissingNamesError: Nothing says which parameter a position means.
        OptionError: ``names`` or ``rule`` for a state that has names.
        ConversionError: No order fits, or several do (``AmbiguousOrderError``).
    """
    return _named(checkpoint, path, names, rule, live, rebuild, weigh)._replace(skipped=checkpoint.skipped)


def _named(
    checkpoint: Checkpoint,
    path: Path,
    names: Names | None,
    rule: str | None,
    live: Live | None,
    rebuild: Rebuild,
    weigh: bool,
) -> Named:
    state, weights = checkpoint.state, checkpoint.weights
    if isinstance(state, OptimizerState):
        if names is not None or rule is not None:
            raise OptionError(
                f"{path}: its parameters have names", remedy=Remedy("leave {names} and {rule} out", BY_POSITION)
            )
        return Named(state, weights)
    decided = partial(_decided, head_dim=head_size(config_of(checkpoint, CONFIG) or {}), rule=rule, weigh=weigh)
    if live is not None:
        source = _Source(live.parameters, "model", None, weights or live.weights)
        return Named(decided(state, source, live=live.groups).state, weights)
    if names is not None:
        return decided(state, _given(state, names, checkpoint, rebuild))
    parts = _parts(state)
    if len(parts) == 1:
        return _inferred(state, checkpoint, path, rebuild, decided, "")
    return _joined(
        state,
        [_inferred(part, checkpoint, path, rebuild, decided, part.optimizers[0].id or "") for part in parts],
    )


def _decided(
    state: PositionalState,
    source: _Source,
    *,
    head_dim: int | None,
    rule: str | None,
    weigh: bool,
    live: Sequence[Sequence[str]] | None = None,
) -> Named:
    named = order.decide(
        state,
        source.parameters,
        others=source.others,
        partly=source.partly,
        rule=source.rule or rule,
        weights=(source.weights or None) if weigh else None,
        head_dim=head_dim,
        live=live,
        source=source.name,
    )
    if source.where:
        naming = replace(named.naming, details={"place": source.where, **named.naming.details})
        named = replace(named, naming=naming)
    return Named(named, source.weights)


# --- several optimizers ---------------------------------------------------------------------------------------------


def _parts(state: PositionalState) -> list[PositionalState]:
    """Return the state of each optimizer by itself."""
    if len(state.optimizers) == 1:
        return [state]
    parts, ids = [], iter(state.ids)
    members = [tuple(islice(ids, group.count)) for group in state.groups]
    for index, optimizer in enumerate(state.optimizers):
        own = tuple(
            i for group, listed in zip(state.groups, members, strict=True) for i in listed if group.optimizer == index
        )
        chosen = set(own)
        names = dict(zip(state.ids, state.names, strict=True)) if state.names else {}
        parts.append(
            replace(
                state,
                optimizers=(optimizer,),
                groups=tuple(replace(group, optimizer=0) for group in state.groups if group.optimizer == index),
                ids=own,
                entries={i: entry for i, entry in state.entries.items() if i in chosen},
                names=tuple(names[i] for i in own) if names else None,
                stated={i: name for i, name in state.stated.items() if i in chosen},
            )
        )
    return parts


def _joined(state: PositionalState, parts: Sequence[Named]) -> Named:
    """Return the state of several optimizers from that of each.

    Where they were named by different models, each name gets what its model is called in front.
    """
    places = [_place(part).partition(":")[0] for part in parts]
    prefixes = [_prefix(place) if len(set(places)) > 1 else "" for place in places]
    given = Counter(prefix + name for part, prefix in zip(parts, prefixes, strict=True) for name in part.state)
    if twice := next((name for name, count in given.items() if count > 1), None):
        raise ConversionError(
            f"two optimizers have a parameter '{twice}': {', '.join(dict.fromkeys(places)) or 'the file'} names both",
            remedy=order.NAME_ORDER,
        )
    parameters: list[Parameter] = []
    weights: dict[str, Tensor] = {}
    for part, prefix in zip(parts, prefixes, strict=True):
        parameters += [replace(p, name=prefix + p.name, state=None, original_id=None) for p in part.state.parameters]
        weights |= {prefix + name: tensor for name, tensor in part.weights.items()}
    naming = parts[0].state.naming
    details: dict[str, Value] = {
        "optimizers": [
            {"id": part.state.optimizers[0].id, "rule": part.state.naming.rule, **part.state.naming.details}
            for part in parts
        ],
        "interchangeable": order.interchangeable(parameters),
    }
    return Named(state.named(parameters, replace(naming, details=details)), weights)


def _prefix(place: str) -> str:
    """Return what goes in front of the names of a model; those of several that were joined have it already."""
    return f"{stem_of(place)}." if stem_of(place) and ", " not in place else ""


def _place(named: Named) -> str:
    return str(named.state.naming.details.get("place", ""))


_AFFIXES: Final = re.compile(
    r"optimi[sz]ers?|optims?|opts?|models?|networks?|nets?|states?|dicts?|weights|params|pth|pt|ckpt|bin|safetensors"
)
"""What says of a key that it holds an optimizer or a model; the rest of it says which."""


def stem_of(place: str) -> str:
    """Return which one a key says that it holds: ``actor`` of ``actor_state_dict`` and of ``actor.optimizer.pth``."""
    if place == TOP:
        return ""
    place = place.rpartition(":")[2]
    words = [word for word in re.split(r"[._\s-]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", place)) if word]
    return "_".join(word for word in words if not _AFFIXES.fullmatch(word.lower()))


# --- sources in a checkpoint and next to it -------------------------------------------------------------------------


def _inferred(
    state: PositionalState,
    checkpoint: Checkpoint,
    path: Path,
    rebuild: Rebuild,
    decided: Callable[[PositionalState, _Source], Named],
    optimizer: str,
) -> Named:
    """Return the state under the names of the first source that fits.

    A source that does not fit, or does not say its order, stops none that does. Of several that are equally near and
    give different names, the one that is called as the optimizer is.
    """
    failures: dict[str, ConversionError | FileError] = {}

    def named_by(weights: Weights, partly: bool) -> Named:
        return decided(state, _of_weights(weights, checkpoint, rebuild)._replace(partly=partly))

    for tier in checkpoint.tiers():
        models = _models(tier, parts=bool(optimizer))
        if state.names is not None:  # what the file itself states goes first
            models = [weights for weights in models if _form(weights, checkpoint) != PLAIN]
        for partly in (False, True):
            asked = [weights for weights in models if weights.ordered or not partly]
            if fitting := _fitting(asked, partial(named_by, partly=partly), failures):
                return _nearest(fitting, optimizer, path)
    for source in _further(state, checkpoint, rebuild, optimizer, failures):
        try:
            return decided(state, source)
        except order.ContradictedError:  # noqa: PERF203
            raise
        except ConversionError as error:
            failures[source.name] = error
    if failures:
        raise min(failures.values(), key=_weight)
    told = "".join(f"\n  {skipped}" for skipped in checkpoint.skipped)
    unreadable = f"; unreadable files were skipped:{told}" if told else ""
    raise MissingNamesError(f"{_nothing_known(path, state)}{unreadable}", remedy=NAME_IT)


def _fitting(
    models: Iterable[Weights],
    named_by: Callable[[Weights], Named],
    failures: dict[str, ConversionError | FileError],
) -> list[Named]:
    """Return the state under the names of every model that fits; ``failures`` gets why others do not.

    Raises ``ContradictedError`` where the weights of a model contradict the order.
    """
    fitting: list[Named] = []
    for weights in models:
        try:
            fitting.append(named_by(weights))
        except order.ContradictedError:  # noqa: PERF203
            raise
        except ConversionError as error:
            failures[weights.where] = error
    return fitting


def _weight(error: ConversionError | FileError) -> int:
    """Return how little an error says: several orders that fit say most, an order that is not known least."""
    return 0 if isinstance(error, AmbiguousOrderError) else 2 if isinstance(error, MissingNamesError) else 1


def _divided(weights: Weights) -> list[Weights]:
    """Return the parts of a model by the first segment of the names: an optimizer may have one of them."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.tensors.items():
        parts.setdefault(name.partition(".")[0], {})[name] = tensor
    if len(parts) == 1:
        return []
    return [replace(weights, where=f"{weights.where}:{part}", tensors=own) for part, own in parts.items()]


def _models(tier: Sequence[Weights], *, parts: bool) -> list[Weights]:
    """Return what may be an optimizer's model: those of a tier, those without copies, and ``parts`` of them."""
    divided = [part for weights in tier for part in _divided(weights)] if parts else []
    return [*tier, *(found for weights in tier if (found := _without_copies(weights))), *divided]


def _without_copies(weights: Weights) -> Weights | None:
    """Return a model without its modules that follow others (``q_net_target``); ``None`` for one without them."""
    own = {
        name: tensor
        for name, tensor in weights.tensors.items()
        if not any(_COPY.search(segment.lower()) for segment in name.split(".")[:-1])
    }
    return replace(weights, tensors=own) if 0 < len(own) < len(weights.tensors) else None


def _nothing_known(path: Path, state: PositionalState) -> str:
    return (
        f"{path}: stores {len(state.ids)} parameters by position and contains no names, and no neighbouring file "
        "names them"
    )


BY_POSITION: Final = {"names": ..., "rule": ...}
"""The arguments that name positional state."""

NAME_IT: Final = Remedy(
    "pass {names} with a file of names in optimizer order, the adapter file, or a folder with config.json and "
    "adapter_config.json",
    {"names": ...},
)


def _nearest(fitting: Sequence[Named], optimizer: str, path: Path) -> Named:
    """Return the one state of those that fit, or the one whose model is called as the optimizer is.

    Models that give the same names are one source, wrappers left aside. Where nothing tells whose values are those of
    the state, a copy's or the model's, no values are taken. ``optimizer`` is what is said of one among several.

    Raises ``AmbiguousOrderError`` if the names differ, or if models of several optimizers are not told apart.
    """
    copies = [_COPY.search(stem_of(_place(named)).lower()) is not None for named in fitting]
    asked = [named for named, copy in zip(fitting, copies, strict=True) if not copy] or fitting
    likeness = [_likeness(stem_of(_place(named)), stem_of(optimizer)) for named in asked]
    alike = [named for named, like in zip(asked, likeness, strict=True) if like == max(likeness)]
    apart = [n for n, copy in zip(fitting, copies, strict=True) if not copy or not _follows(n, asked[0])]
    rivals = alike if optimizer else apart or asked
    spelled = {tuple(map(plain_name, named.state)) for named in rivals}
    if len(spelled) == 1 and not (optimizer and len(alike) > 1):
        return alike[0] if len(alike) == 1 else alike[0]._replace(weights={})
    raise _not_told(rivals, optimizer, path, len(spelled) == 1)


def _not_told(rivals: Sequence[Named], optimizer: str, path: Path, same: bool) -> AmbiguousOrderError:
    """Return what to say of models that fit; ``same`` is whether they give the same names."""
    told = "and nothing says which of them it trains" if same else "and give them different names"
    lines = [f"\n  {_place(named)}: '{next(iter(named.state))}', ..." for named in rivals]
    return AmbiguousOrderError(
        f"{path}: {len(lines)} models fit the {len(rivals[0].state)} parameters of the optimizer"
        f"{f' {optimizer!r}' if optimizer else ''}, {told}:{''.join(lines)}",
        tuple(_place(named) for named in rivals),
        remedy=Remedy("pass the names of the right one in optimizer order as {names}", {"names": ...}),
    )


_COPY: Final = re.compile(r"(^|_)(ema|teacher|target|shadow|avg|averaged?|swa|best)(_|$)")
"""What says of a model that it follows another one, which is trained."""


def _follows(copy: Named, model: Named) -> bool:
    """Return whether a copy's names are the model's, behind what the copy puts in front of each."""
    return all(f".{plain_name(b)}".endswith(f".{plain_name(a)}") for a, b in zip(model.state, copy.state, strict=True))


def _likeness(model: str, optimizer: str) -> int:
    """Return how much a model is called as an optimizer: the same, by some of its words, or by how it begins."""
    model, optimizer = model.lower(), optimizer.lower()
    if model == optimizer:
        return 3
    if not model or not optimizer:
        return 0
    if set(model.split("_")) <= set(optimizer.split("_")):
        return 2
    return 1 if model.startswith(optimizer) or optimizer.startswith(model) else 0


def _further(
    state: PositionalState,
    checkpoint: Checkpoint,
    rebuild: Rebuild,
    optimizer: str,
    failures: dict[str, ConversionError | FileError],
) -> Iterator[_Source]:
    """Yield the sources that are no weights: names that the file states, the configs, several models joined."""
    if state.names is not None:
        yield _Source(
            _listed(state, state.names, checkpoint), "checkpoint", "listed", _covering(state.names, checkpoint)
        )
    if CONFIG in checkpoint.configs:
        try:
            parameters = _rebuilt(checkpoint.configs[CONFIG].parent, checkpoint, rebuild)
        except (ConversionError, FileError) as error:
            failures[CONFIG] = error
        else:
            yield _Source(parameters, "configs", None, checkpoint.weights)
    for tier in checkpoint.tiers()[:1]:
        models = [weights for weights in tier if weights.ordered and _form(weights, checkpoint) == PLAIN]
        if turns := _together(models, len(state.ids), optimizer):
            first, *others = [_concatenated(turn, checkpoint) for turn in turns]
            yield _Source(first, "checkpoint", None, {}, others, where=", ".join(model.where for model in turns[0]))


MAX_JOINED: Final = 4
"""Models that one optimizer may hold together; their order is tried in every way."""

MAX_SEVERAL: Final = 8
"""Models of a checkpoint among which those of one optimizer are looked for."""


def _together(models: Sequence[Weights], count: int, optimizer: str) -> list[tuple[Weights, ...]]:
    """Return the models that may make up the ``count`` parameters of an optimizer, in every order.

    Where some are called as the optimizer is (``G_A`` and ``G_B`` of ``optimizer_G``), these; else all, first without
    copies of others.
    """
    called = [model for model in models if stem_of(optimizer).lower() in stem_of(model.where).lower().split("_")]
    trained = [model for model in models if not _COPY.search(stem_of(model.where).lower())]
    for chosen in (called, trained, models):
        if 1 < len(chosen) <= MAX_SEVERAL:
            sizes = {id(model): len(_parameters(model)) for model in chosen}
            turns = [
                turn
                for number in range(2, min(len(chosen), MAX_JOINED) + 1)
                for turn in permutations(chosen, number)
                if sum(sizes[id(model)] for model in turn) == count
            ]
            if turns:
                return turns
    return []


def _concatenated(models: Sequence[Weights], checkpoint: Checkpoint) -> list[Described]:
    """Return the parameters of several models as one optimizer may hold them, under what each model is called."""
    return [
        replace(item, parameter=replace(item.parameter, name=f"{stem_of(model.where) or model.where}.{item.name}"))
        for model in models
        for item in _of_weights(model, checkpoint, None).parameters
        if isinstance(item, Described)
    ]


LIVE_NAMES, ADAPTER_KEYS, PLAIN = "live", "adapter", "plain"


def _form(weights: Weights, checkpoint: Checkpoint) -> str:
    """Return what the keys are: names of a model with an adapter, those of an adapter's file, or any other names."""
    if any(split_adapter(key) for key in weights.tensors):
        return LIVE_NAMES
    first = next(iter(weights.tensors), "")
    adapter = any(is_adapter_key(key) for key in weights.tensors) or (
        first.startswith("base_model.model.") and ADAPTER_CONFIG in checkpoint.configs
    )
    return ADAPTER_KEYS if adapter else PLAIN


def _of_weights(weights: Weights, checkpoint: Checkpoint, rebuild: Rebuild | None) -> _Source:
    """Return the parameters of a model or an adapter whose tensors are at hand.

    Raises ``MissingNamesError`` where nothing says in which order the model has them.
    """
    form, own = _form(weights, checkpoint), weights.tensors if weights.own else {}
    if form == ADAPTER_KEYS:
        config = config_of(checkpoint)
        orders = adapter_orders(weights.tensors, config=config, ordered=weights.ordered)
        return _Source(orders[0], "adapter", None, own, orders[1:], where=weights.where)
    tensors = _parameters(weights)
    if form == LIVE_NAMES:
        first, *others = _with_adapter(tensors, weights.ordered)
        return _Source(first, "checkpoint" if weights.ordered else "adapter", None, own, others, where=weights.where)
    if not weights.ordered:
        if CONFIG in checkpoint.configs:
            raise MissingNamesError(f"{weights.where} does not keep the model's order; its config does")
        tensors = {name: tensors[name] for name in in_module_order(tensors)}
    first, *others = [
        [
            Described(_parameter(name, tensor), classes=classes)
            for (name, tensor), classes in zip(tensors.items(), seen, strict=True)
        ]
        for seen in _classes(list(tensors), checkpoint, rebuild)
    ]
    return _Source(first, "checkpoint", None, own, others, where=weights.where)


def _parameter(name: str, tensor: Tensor) -> Parameter:
    key, parts = peft_key(name), split_adapter(name)
    return Parameter(
        name,
        tensor.shape,
        None,
        dtype=tensor.dtype,
        adapter=parts[1] if parts else None,
        foreign_names={"peft": key[0]} if key else {},
    )


_BUFFERS: Final = re.compile(
    r"(^|\.)(running_(mean|var)|num_batches_tracked|(\w*_)?inv_freq|position_ids|masked_bias|relative_position_index|attn_mask)$"
)
"""Tensors of a state dict that are no parameters."""

_FLOATS: Final = ("F64", "F32", "F16", "BF16", "C64", "F8_E4M3", "F8_E5M2")


def _parameters(weights: Weights) -> dict[str, Tensor]:
    """Return the tensors that may be parameters: no buffers, no integers, and of tied ones the first."""
    seen: set[object] = set()
    found = {}
    for name, tensor in weights.tensors.items():
        if tensor.dtype in _FLOATS and not _BUFFERS.search(name):
            run = tensor.runs[0] if tensor.runs else None
            place = (id(run.source), run.offset, tensor.shape) if run else id(tensor)
            if place not in seen:
                seen.add(place)
                found[name] = tensor
    return found


def _with_adapter(tensors: Mapping[str, Tensor], ordered: bool) -> list[list[Described]]:
    """Return the parameters of a model with an adapter: the adapter's trained, the others frozen.

    PEFT before 0.6 left the originals of saved modules trainable too: that is the other way to see them. Without the
    model's order, those of the adapter are put into that of their modules, and nothing is known of the others.
    """
    if not ordered:
        names = in_module_order(name for name in tensors if split_adapter(name))
        return [[Described(_parameter(name, tensors[name])) for name in names]]
    return [
        [
            Described(
                _parameter(name, tensor), split_adapter(name) is not None or (also and ".original_module." in name)
            )
            for name, tensor in tensors.items()
        ]
        for also in (False, True)
    ]


_NORM: Final = re.compile(r"(^|\.)(\w*(norm|layernorm)\w*|ln\w*|\w*_ln)\.(weight|gamma)$", re.IGNORECASE)


def _classes(names: Sequence[str], checkpoint: Checkpoint, rebuild: Rebuild | None) -> list[list[tuple[str, ...]]]:
    """Return what modules the parameters may belong to: as the configs say, else as their names suggest, or none."""
    if rebuild is not None and CONFIG in checkpoint.configs:
        try:
            built = {
                item.name: item.classes for item in _rebuilt(checkpoint.configs[CONFIG].parent, checkpoint, rebuild)
            }
        except (ConversionError, FileError, MissingDependencyError):
            built = {}
        if all(name in built for name in names):
            return [[built[name] for name in names]]
    return [[("LayerNorm",) if _NORM.search(name) else () for name in names], [() for _ in names]]


# --- what the caller gives ------------------------------------------------------------------------------------------


def split_names(names: Names | Sequence[os.PathLike[str]] | None) -> tuple[Names | None, list[Path]]:
    """Return what the caller says about names apart from the weights among it: names, configs or nothing, and paths.

    Several paths may be given: of weights, and one more that says the names. A path is that of weights unless it is a
    folder with ``config.json``, or a file of text.

    Raises:
        FileNotFoundError: A path leads nowhere.
        OptionError: Two of the paths say names.
    """
    given: Sequence[Any] = [names] if isinstance(names, (str, os.PathLike)) else names or ()
    if not isinstance(names, str) and not all(isinstance(path, os.PathLike) for path in given):
        return [str(name) for name in given], []
    weights: list[Path] = []
    others: list[Path] = []
    for path in map(Path, given):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder to take names from")
        (weights if _is_weights(path) else others).append(path)
    if len(others) > 1:
        raise OptionError(f"{others[0]} and {others[1]} both say the names: pass one of them, and weights next to it")
    return (others[0] if others else None), weights


def config_of(checkpoint: Checkpoint, name: str = ADAPTER_CONFIG) -> Mapping[str, Any] | None:
    """Return the parsed configuration file of that name, if there is one."""
    path = checkpoint.configs.get(name)
    return None if path is None else read_json_object(path)


def _is_weights(path: Path) -> bool:
    """Return whether a path is one of weights: a folder without ``config.json``, or a file that is not text."""
    if path.is_dir():
        return not (path / CONFIG).exists()
    with File(path) as file:  # refuses a pipe, which would be waited for
        return path.suffix in (".safetensors", ".json") or bytes(file.read(0, min(file.size, 2))) in (
            b"PK",
            b"\x80\x02",
        )


def _given(state: PositionalState, names: Names, checkpoint: Checkpoint, rebuild: Rebuild) -> _Source:
    """Return the source that the caller names: names, a file of them, or a folder with configs."""
    if isinstance(names, (str, os.PathLike)):
        if (Path(names) / CONFIG).exists():
            return _Source(_rebuilt(Path(names), checkpoint, rebuild), "configs", None, checkpoint.weights)
        listed = read_names(names)
    else:
        listed = [str(name) for name in names]
    return _Source(_listed(state, listed, checkpoint), "names", "listed", _covering(listed, checkpoint))


def _covering(names: Sequence[str], checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """Return the first weights that have all of these parameters, or else those of the checkpoint."""
    keys = [(name, (peft_key(name) or (name,))[0]) for name in names]
    for weights in (weights for tier in checkpoint.tiers() for weights in tier if weights.own):
        if all(name in weights.tensors or key in weights.tensors for name, key in keys):
            return weights.tensors
    return checkpoint.weights


def _listed(state: PositionalState, names: Sequence[str], checkpoint: Checkpoint) -> list[Parameter]:
    """Return parameters for names in optimizer order: as the weights have them, else shaped as their slots are.

    Keys of an adapter file are taken for the parameters that they stand for.
    """
    if len(names) != len(state.ids):
        raise ConversionError(f"{len(names)} names for the state of {len(state.ids)} parameters")
    weights, config = _covering(names, checkpoint), config_of(checkpoint)
    adapter_file = _form(Weights("", weights), checkpoint) != PLAIN
    shown = {key: tensor for tier in checkpoint.tiers()[::-1] for w in tier for key, tensor in w.tensors.items()}
    parameters = []
    for name, identity, shape in zip(names, state.ids, state.shapes(), strict=True):
        key, adapter = (name, "default") if name in weights else peft_key(name) or (name, "")
        tensor = weights.get(key, shown.get(name, shown.get(key)))
        if tensor is not None and adapter_file:
            parameters += adapter_orders({key: tensor}, adapter, config)[0]
        elif tensor is not None:
            parameters.append(Parameter(name, tensor.shape, None, dtype=tensor.dtype))
        elif shape is not None:
            parameters.append(Parameter(name, shape, None))
        else:
            raise MissingNamesError(
                f"'{name}' (id {identity}) has no slot that shows its shape",
                remedy=Remedy("pass {names} a second time, with the model's or the adapter's weights", {"names": ...}),
            )
    return parameters


def _rebuilt(folder: Path, checkpoint: Checkpoint, rebuild: Rebuild) -> Sequence[Described]:
    """Return the parameters of the model of a folder; an adapter's config may lie next to the checkpoint."""
    return rebuild(folder, None if (folder / ADAPTER_CONFIG).exists() else checkpoint.configs.get(ADAPTER_CONFIG))
