"""Read, name, write: the one flow behind the API and the command line."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from lora_state_format import registry
from lora_state_format.errors import ConversionError, MissingDependencyError, MissingNamesError, OptionError, Remedy
from lora_state_format.foreign.weights import weights_at
from lora_state_format.format import envelope, writing
from lora_state_format.io.atomic import made_folders, refuse_existing
from lora_state_format.io.files import reading as opened_files
from lora_state_format.io.remote import is_remote, spelled
from lora_state_format.mapping.algorithms import ALGORITHMS, find
from lora_state_format.model import digests, notebook
from lora_state_format.model.digests import ALGORITHM
from lora_state_format.model.states import Checkpoint, Naming, OptimizerState, PositionalState, Slot, walk
from lora_state_format.model.tensors import Digest, Tensor
from lora_state_format.model.text import expression
from lora_state_format.naming.evidence import head_size
from lora_state_format.naming.rules import Described, rules_called
from lora_state_format.naming.sources import ADAPTER_CONFIG, CONFIG, Named, Names, config_of, name_state, split_names
from lora_state_format.operations.entries import tensors
from lora_state_format.operations.look import Found
from lora_state_format.operations.renaming import Renaming, renaming_of
from lora_state_format.operations.report import (
    NOTHING_HELD,
    SCHEMA_VERSION,
    SOURCES,
    describe_naming,
    describe_support,
    naming_json,
)
from lora_state_format.optimizers import quantised, rounded
from lora_state_format.optimizers.classes import full_path

if TYPE_CHECKING:
    from lora_state_format.naming.evidence import Evidence, Pairing
    from lora_state_format.registry import Converter, Match, Writer

__all__ = ["ConversionReport", "Names", "belongs", "convert", "look_closer", "opened", "read", "read_either"]

ASKED: Final = {"trainable": ..., "names": ...}

logger = logging.getLogger("lora_state_format")

Progress: TypeAlias = "Callable[[int, int], None]"


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did, or, where ``written`` is false, would do.

    ``slots`` counts the parameters that have each slot; ``groups`` are the group sizes as they were found; ``paired``
    counts the parameters whose own weights were found and whose digest is kept with them. ``digest`` is the header's,
    ``None`` where none was written.
    """

    source: str
    source_format: str
    target: str
    target_format: str
    written: bool
    parameters: int
    slots: Mapping[str, int]
    groups: tuple[int, ...]
    tensors: int
    bytes: int
    global_step: int | None
    naming: Naming
    paired: int
    digest: str | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def _repr_html_(self) -> str:
        return notebook.lines(self)

    def __str__(self) -> str:
        done = "converted" if self.written else "would convert"
        step = "" if self.global_step is None else f", step {self.global_step}"
        slots = ", ".join(f"{name} x {count}" for name, count in self.slots.items()) or "none"
        lines = [
            f"{done} {self.source} ({self.source_format}) to {self.target} ({self.target_format})",
            f"{self.parameters} parameters in groups of {list(self.groups)}{step}",
            f"slots: {slots}; {self.tensors} tensors, {self.bytes:,} bytes",
            *_naming_lines(self.naming),
        ]
        if self.paired:
            lines.append(f"weights: digests of {self.paired} of {self.parameters} parameters kept with their state")
        if self.digest:
            lines.append(f"digest: {self.digest}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        naming = naming_json(self.naming)
        evidence = naming["details"].pop("evidence", None)
        return {"schema_version": SCHEMA_VERSION, **vars(self), "naming": naming, "evidence": evidence}


@dataclass(frozen=True)
class _Reading:
    """How to read a checkpoint: the arguments that ``read``, ``look`` and ``convert`` share."""

    renaming: Renaming
    rule: str | None = None
    optimizer: str | None = None
    trainable: Sequence[str] = ()


def read(
    path: str | os.PathLike[str],
    *,
    source_format: str | None = None,
    names: Names | None = None,
    rule: str | None = None,
    optimizer: str | None = None,
    options: Mapping[str, Any] | None = None,
    trainable: Sequence[str] = (),
) -> OptimizerState:
    """Return the named state in a checkpoint of any known format, lazily: close it, or use it in a ``with`` block.

    Args:
        path: The checkpoint, a file or a folder.
        source_format: The converter's name; by default the format is detected.
        names: Which parameter a position means, where the checkpoint itself does not say it.
        rule: A grouping rule to force, one of ``order.RULES``.
        optimizer: The optimizer's class path, where the file does not say it.
        options: Options of the converter.
        trainable: Regular expressions. Where names come from a model built from its configs, the parameters that one
            of them finds are those that were trained, and no others were.

    Raises:
        FileNotFoundError: Nothing is there.
        UnknownFormatError: No converter knows the path.
        FileError: The file is damaged or refused.
        ConversionError: The parameters cannot be named (``MissingNamesError``), or several orders fit.
        OptionError: An argument that does not exist or apply.
    """
    converter, match = registry.find(path, source_format)
    reading = _Reading(renaming_of(names, options, converter), rule, optimizer, trainable)
    registry.check_options(reading.renaming.options, converter)
    named = _read(converter, match, Path(path), reading)
    for skipped in named.skipped:
        logger.warning("%s", skipped)
    return named.state


@contextlib.contextmanager
def opened(state: OptimizerState | str | os.PathLike[str]) -> Iterator[OptimizerState]:
    """Yield a state as it is, or the one that ``read`` finds at a path, which is closed at the end of the block."""
    if isinstance(state, OptimizerState):
        yield state
    else:
        with read(state) as found:
            yield found


def read_either(path: str | os.PathLike[str], **reading: Any) -> OptimizerState:
    """Return what ``read`` returns; what says how to name parameters is for a state that needs it."""
    if reading.get("rule") is not None:
        rules_called(reading["rule"])
    try:
        return read(path, **{**reading, "names": None, "rule": None, "trainable": ()})
    except MissingNamesError:
        return read(path, **reading)


def look_closer(
    path: str | os.PathLike[str],
    converter: Converter,
    match: Match,
    *,
    whole: bool = False,
    names: Names | None = None,
    rule: str | None = None,
    optimizer: str | None = None,
    options: Mapping[str, Any] | None = None,
    trainable: Sequence[str] = (),
) -> Found:
    """Return the state in a checkpoint, and names for it where they cost nothing.

    No tensor is read, so nothing is weighed; no model is built unless ``names``, ``rule`` or ``trainable`` is given.
    Takes the arguments of ``read``, its converter and match found, and raises what ``read`` raises; what cannot be
    named stays without names, unless names were asked for. ``whole`` is whether all files of a folder are read.
    """
    path = Path(path)
    renaming = renaming_of(names, options, converter)
    reading = _Reading(renaming, rule, optimizer, trainable)
    registry.check_options(renaming.options, converter)
    checkpoint = _checkpoint(converter, match, path, reading, glance=not whole)
    asked = names is not None or rule is not None or bool(trainable) or renaming.layout is not None

    def build(folder: Path, adapter: Path | None = None) -> Sequence[Described]:
        if asked:
            return _builder(trainable)(folder, adapter)
        raise MissingNamesError(f"stored by position; `convert` names them by building the model of {folder}")

    with checkpoint.closed_on_error():
        try:
            given = _names(checkpoint, renaming.names)
            named = renaming.apply(name_state(checkpoint, path, names=given, rule=rule, rebuild=build, weigh=False))
        except ConversionError as error:
            if asked:
                raise
            return Found(checkpoint.state, converter.NAME, error)
        _check_trainable(named.state, trainable, path)
        return Found(named.state, converter.NAME)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    source_format: str | None = None,
    target_format: str = registry.NAMED,
    names: Names | None = None,
    rule: str | None = None,
    optimizer: str | None = None,
    options: Mapping[str, Any] | None = None,
    trainable: Sequence[str] = (),
    base: str | os.PathLike[str] | None = None,
    dequantize: bool = False,
    store: Mapping[str, str] | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a checkpoint into a file of named optimizer state, or into another format that can hold it exactly.

    Takes the arguments of ``read``; ``options`` may also be those of the target's converter, and ``base`` is a
    checkpoint of the target's format to take the rest from, where it has one. A ``target`` with a slash at its end is a
    folder, in which the file gets its usual name; folders that are missing are made. ``dequantize`` decodes 8-bit and
    4-bit moments to float32, so that a run can go on with an ordinary Adam; the report says what that loses. ``store``
    rounds slots, as ``{"exp_avg": "BF16"}``, and the report says what that does to Adam's next update. ``force``
    replaces an existing target; ``dry_run`` does everything but write; ``progress`` is told the bytes of tensors
    written and their total. Where the parameters' own weights were found, their digests are kept, so that loading can
    tell whether weights and state belong together.

    Raises what ``read`` raises, ``DigestError`` for a named source that is damaged, ``TargetExistsError``, and
    ``UnrepresentableError`` for what the target cannot hold.
    """
    writer = registry.writer(target_format)
    source, target = Path(source), _target(target, writer)
    refuse_existing(target, force=force)
    if is_remote(target) and target_format != registry.NAMED:
        raise OptionError(
            f"{spelled(target)}: only files of named state are sent to a URL; convert into a folder and copy that"
        )
    converter, match = registry.find(source, source_format)
    options = options or {}
    reading = _Reading(renaming_of(names, options, converter, writer), rule, optimizer, trainable)
    registry.check_options(reading.renaming.options, converter, writer)
    if optimizer is not None and "optimizer" in registry.options(writer):
        find(optimizer)
    if base is not None and not Path(base).exists():
        raise FileNotFoundError(f"{base}: no such file or folder to take the rest from")
    named = _read(converter, match, source, reading)
    with named.state as state:
        if not dry_run and (dequantize or target_format != registry.NAMED):
            _check_digests(state)  # ``writing.write`` does so itself with what it copies
        state, notes = _prepared(state, named.weights, target_format, dequantize, store)
        sizes = [tensor.size for tensor in tensors(state)]
        digest = None
        if not dry_run:
            given = None if base is None else Path(base)
            with made_folders(target):
                digest = _write(writer, state, target, given, force, options, progress)
        return ConversionReport(
            source=spelled(source),
            source_format=converter.NAME,
            target=spelled(target),
            target_format=target_format,
            written=not dry_run,
            parameters=len(state.parameters),
            slots=dict(Counter(name for parameter in state.parameters for name in parameter.state or ())),
            groups=tuple(group.count for group in state.groups),
            tensors=len(sizes),
            bytes=sum(sizes),
            global_step=state.global_step,
            naming=state.naming,
            paired=sum(parameter.weights is not None for parameter in state.parameters),
            digest=digest,
            notes=notes,
            warnings=(*named.skipped, *beside_weights(target)),
        )


def _prepared(
    state: OptimizerState,
    weights: Mapping[str, Tensor],
    target_format: str,
    dequantize: bool,
    store: Mapping[str, str] | None,
) -> tuple[OptimizerState, tuple[str, ...]]:
    """Return the state as it is to be written, with the digests of its weights, and notes on it for the report."""
    decoded = quantised.dequantize(state) if dequantize else None
    state = _paired(decoded.state if decoded else state, weights)
    narrowed = rounded.stored(state, store, measure=True) if store else None
    state = narrowed.state if narrowed else state
    return state, (*([str(decoded)] if decoded else []), *_notes(state, target_format), *_error(narrowed))


def belongs(path: str | os.PathLike[str], weights: str | os.PathLike[str]) -> tuple[Pairing | None, Evidence | None]:
    """Return whether a state and weights belong together: by the digests that the state keeps, and by the numbers.

    ``weights`` is a safetensors file, or a folder with an adapter or a model in one. The first result is ``None`` where
    the state keeps no digest that could be compared; the second where digests settle it, because the state was saved
    from a live optimizer and every weight is the very one of that moment. A positional state is named by the weights.
    """
    from lora_state_format.naming.evidence import paired, weigh

    path = Path(path)
    with (
        registry.read(path).closed_on_error() as alone,
        _with_weights(alone, [Path(weights)]).closed_on_error() as checkpoint,
    ):
        named = name_state(checkpoint, path, rebuild=rebuild)
    with named.state as state:
        pairing = paired(state, named.weights)
        settled = state.naming.rule is None and pairing.matching == len(state)
        compared = pairing.matching + len(pairing.differing) > 0
        head_dim = head_size(config_of(checkpoint, CONFIG) or {})
        evidence = None if settled else weigh(state, named.weights, head_dim=head_dim)
        return (pairing if compared else None), evidence


def _read(converter: Converter, match: Match, path: Path, reading: _Reading) -> Named:
    """Return the named state, and the parameters' own weights as far as they were found."""
    with _checkpoint(converter, match, path, reading).closed_on_error() as checkpoint:
        names = _names(checkpoint, reading.renaming.names)
        named = name_state(checkpoint, path, names=names, rule=reading.rule, rebuild=_builder(reading.trainable))
        _check_trainable(named.state, reading.trainable, path)
        return reading.renaming.apply(named)


def _checkpoint(
    converter: Converter, match: Match, path: Path, reading: _Reading, *, glance: bool = False
) -> Checkpoint:
    """Return what the converter reads, with the optimizer's class and the adapter that the caller names.

    ``glance`` is whether some of a folder's files are enough, where the converter knows how.
    """
    options, optimizer = reading.renaming.options, reading.optimizer
    asks = "optimizer" in registry.options(converter)
    if optimizer is not None and asks:
        options = {"optimizer": optimizer, **options}
    with registry.read_match(converter, match, options, glance=glance).closed_on_error() as checkpoint:
        if optimizer is not None and not asks:
            checkpoint = replace(checkpoint, state=_classed(checkpoint.state, _class_called(optimizer), path))
        named = isinstance(checkpoint.state, OptimizerState)
        return checkpoint if named else _with_weights(checkpoint, split_names(reading.renaming.names)[1])


def _names(checkpoint: Checkpoint, names: Names | None) -> Names | None:
    """Return the caller's names without weights among them; of a state that has names all, so that they are refused."""
    return names if isinstance(checkpoint.state, OptimizerState) else split_names(names)[0]


def _with_weights(checkpoint: Checkpoint, paths: Sequence[Path]) -> Checkpoint:
    """Return the checkpoint as if these weights, in files or folders, lay next to it instead of what does."""
    if not paths:
        return checkpoint
    with opened_files() as files:
        tiers = tuple(weights_at(path, files) for path in paths)
    folders = [path if path.is_dir() else path.parent for path in paths]
    configs = {n: folder / n for folder in folders[::-1] for n in (ADAPTER_CONFIG, CONFIG) if (folder / n).is_file()}
    return replace(
        checkpoint,
        state=replace(checkpoint.state, resources=(*checkpoint.state.resources, files)),
        weights=tiers[0][0].tensors if len(tiers[0]) == 1 else {},
        configs=configs,
        candidates=tiers,
        skipped=(),
    )


def rebuild(folder: Path, adapter: Path | None = None) -> Sequence[Described]:
    """Return the parameters of the model that the configs in a folder describe."""
    try:
        from lora_state_format.torch.rebuild import rebuild
    except ImportError as error:
        raise MissingDependencyError(
            f"names from configs need '{error.name}': pip install torch transformers peft"
        ) from error
    return rebuild(folder, adapter)


def _builder(trainable: Sequence[str]) -> Callable[[Path, Path | None], Sequence[Described]]:
    """Return ``rebuild``, with the parameters that ``trainable`` finds as the only ones that were trained."""
    if not trainable:
        return rebuild

    def build(folder: Path, adapter: Path | None = None) -> Sequence[Described]:
        return only_trainable(rebuild(folder, adapter), trainable)

    return build


def only_trainable(described: Sequence[Described], trainable: Sequence[str]) -> list[Described]:
    """Return the parameters with those as trainable that one of the regular expressions finds, and no others.

    Raises ``OptionError`` for an expression that is not one, or that finds no parameter.
    """
    found: set[str] = set()
    for text in trainable:
        pattern = expression(text)
        matching = {item.name for item in described if pattern.search(item.name)}
        if not matching:
            raise OptionError(
                f"'{text}' matches none of the model's {len(described)} parameters; the first is '{described[0].name}'"
            )
        found |= matching
    return [replace(item, trainable=item.name in found) for item in described]


def _check_trainable(state: OptimizerState, trainable: Sequence[str], path: Path) -> None:
    if trainable and state.naming.source != "configs":
        raise OptionError(
            f"{path}: which parameters were trained matters only for a model that is built from its configs, and the "
            f"names come from {SOURCES[state.naming.source]}",
            remedy=Remedy("leave {trainable} out, or pass {names} with the folder of config.json", ASKED),
        )


def _class_called(name: str) -> str:
    """Return the path of the class that a caller means: by its path, or by the rule that the class stands for."""
    if "." in name:
        return full_path(name)
    rules = {algorithm.name: algorithm.class_path for algorithm in reversed(ALGORITHMS)}  # the first row of a name
    if name not in rules:
        raise OptionError(
            f"'{name}' is neither the path of a class nor a rule; the rules are: {', '.join(reversed(rules))}",
            remedy=Remedy("pass {optimizer}", {"optimizer": "torch.optim.AdamW"}),
        )
    return rules[name]


def _classed(state: OptimizerState | PositionalState, class_path: str, path: Path) -> OptimizerState | PositionalState:
    for found in state.optimizers:
        if found.class_path is not None and full_path(found.class_path) != class_path:
            raise OptionError(f"{path}: the optimizer is {found.class_path}, not {class_path}")
    return replace(state, optimizers=tuple(replace(found, class_path=class_path) for found in state.optimizers))


# --- writing and the report ---------------------------------------------------------------------------------------


def _paired(state: OptimizerState, weights: Mapping[str, Tensor]) -> OptimizerState:
    """Return the state with a digest of each parameter's own bytes, where they are at hand."""
    parameters = []
    for parameter in state.parameters:
        tensor = weights.get(parameter.name, weights.get(parameter.foreign_names.get("peft", "")))
        if parameter.weights is None and tensor is not None and tensor.shape == parameter.shape:
            digest = Digest(ALGORITHM, tensor.dtype, digests.hash_tensor(tensor))
            parameter = replace(parameter, weights=digest)
        parameters.append(parameter)
    return replace(state, parameters=tuple(parameters))


def _target(given: str | os.PathLike[str], writer: Writer) -> Path:
    """Return the path to write to: in a folder, which a slash at the end stands for, the usual name of a file."""
    path = Path(given)
    usual: str | None = getattr(writer, "TARGET", None)
    if usual is not None and os.fspath(given).endswith(os.sep):
        return path / usual
    if usual is not None and path.is_dir():
        raise OptionError(f"{path} is a folder; name the file to write, as in {path / usual}")
    return path


def _write(
    writer: Writer,
    state: OptimizerState,
    target: Path,
    base: Path | None,
    force: bool,
    options: Mapping[str, Any],
    progress: Progress | None,
) -> str | None:
    if writer.NAME != registry.NAMED:
        writer.write(state, target, base=base, force=force, options=registry.own_options(options, writer))
        return None
    total, done = sum(tensor.size for tensor in tensors(state)), 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if progress:
            progress(done, total)

    return writing.write(state, target, force=force, progress=advance).digest


def _check_digests(state: OptimizerState) -> None:
    """Raise ``DigestError`` for a tensor that is not what its file's digest says.

    A format without digests, or a decoded value, would take the damage on.
    """
    trees = [*((parameter.name, parameter.state or {}) for parameter in state.parameters), ("globals", state.globals)]
    for name, tree in trees:
        for path, leaf in walk(tree):
            if isinstance(leaf, Slot) and digests.stated_hash(leaf.tensor):
                key = "/".join(map(str, (name, *path)))
                digests.check_hash(key, leaf.tensor, digests.hash_tensor(leaf.tensor))


def _error(narrowed: rounded.Stored | None) -> list[str]:
    if narrowed is None or narrowed.error is None:
        return []
    return [f"Adam's next update differs by {narrowed.error:.2g} (relative, by norm) for what was rounded"]


def _naming_lines(naming: Naming) -> list[str]:
    head, *rest = describe_naming(naming)
    return [f"names: {head}", *(f"how sure: {line}" for line in rest)]


MOMENTS_ALIKE: Final = (
    "exp_avg and exp_avg_sq are the same bytes in every parameter that was looked at, which Adam does not do: torch's "
    "FSDP1 writes such a full state dict when it gathers on a CPU (one buffer for both); this state is not worth "
    "resuming from"
)
"""What there is to say of a state whose two moments are one."""

LOOKED_AT: Final = 8
"""Parameters whose moments are compared."""

COMPARED: Final = 1 << 16
"""Bytes at the start of a moment that are compared."""


def _moments_alike(state: OptimizerState) -> bool:
    """Return whether both moments of the first parameters begin with the same bytes, not all of them zero."""
    seen = False
    for parameter in state.parameters[:LOOKED_AT]:
        first, second = ((parameter.state or {}).get(slot) for slot in ("exp_avg", "exp_avg_sq"))
        if isinstance(first, Slot) and isinstance(second, Slot):
            starts = [bytearray(min(slot.tensor.size, COMPARED)) for slot in (first, second)]
            for slot, start in zip((first, second), starts, strict=True):
                slot.tensor.readinto(0, memoryview(start))
            if starts[0] != starts[1]:
                return False
            seen = seen or any(starts[0])
    return seen


def _notes(state: OptimizerState, target_format: str) -> list[str]:
    notes = []
    if target_format != registry.NAMED and state.extra:
        held = ", ".join(map(str, state.extra))
        notes.append(f"extra ({held}) is not written: only the named format has a place for it")
    if idle := sum(parameter.state is None for parameter in state.parameters):
        notes.append(f"{idle} parameters never took a step; they are kept as such")
    if state.carried:
        notes.append(f"{len(state.carried)} parameters with state are in no group; they stand behind the groups")
    if not any(parameter.state for parameter in state.parameters):
        notes.append(NOTHING_HELD)
    if _moments_alike(state):
        notes.append(MOMENTS_ALIKE)
    return [*notes, *describe_support(state.origin)]


def beside_weights(target: Path) -> list[str]:
    """Return a warning where a file would lie beside a model's weights, or nothing."""
    if target.suffix != ".safetensors":
        return []
    for beside in sorted(target.parent.glob("*.safetensors")):
        if beside != target and not envelope.is_state(beside):
            warning = (
                f"{target} lies beside {beside.name}, and programs that serve a model load every .safetensors file in "
                f"its folder as weights: {target.parent / 'training_state' / target.name} is a safe place"
            )
            return [warning]
    return []
