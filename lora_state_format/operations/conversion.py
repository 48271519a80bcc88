"""Read, name, write: the one flow behind the API and the command line."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lora_state_format import registry
from lora_state_format.errors import OptionError, TargetExistsError
from lora_state_format.format import envelope, writing
from lora_state_format.model import digests
from lora_state_format.model.digests import ALGORITHM
from lora_state_format.model.states import Naming, OptimizerState, PositionalState, Slot, walk
from lora_state_format.model.tensors import Digest, Tensor
from lora_state_format.naming.evidence import head_size
from lora_state_format.naming.rules import Described
from lora_state_format.naming.sources import CONFIG, Names, config_of, name_state, resolve, with_weights
from lora_state_format.operations.report import (
    NOTHING_HELD,
    SCHEMA_VERSION,
    describe_naming,
    describe_support,
    naming_json,
    tensors,
)
from lora_state_format.optimizers import quantised

if TYPE_CHECKING:
    from lora_state_format.naming.evidence import Evidence, Pairing
    from lora_state_format.registry import Converter, Match, Writer

__all__ = ["ConversionReport", "Names", "belongs", "convert", "read"]

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

    def __str__(self) -> str:
        done = "converted" if self.written else "would convert"
        step = "" if self.global_step is None else f", step {self.global_step}"
        slots = ", ".join(f"{name} x {count}" for name, count in self.slots.items()) or "none"
        lines = [
            f"{done} {self.source} ({self.source_format}) to {self.target} ({self.target_format})",
            f"{self.parameters} parameters in groups of {list(self.groups)}{step}",
            f"slots: {slots}; {self.tensors} tensors, {self.bytes:,} bytes",
            *describe_naming(self.naming),
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


def read(
    path: str | os.PathLike[str],
    *,
    source_format: str | None = None,
    names: Names | None = None,
    rule: str | None = None,
    optimizer: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> OptimizerState:
    """Return the named state in a checkpoint of any known format, lazily: close it, or use it in a ``with`` block.

    ``names`` says which parameter a position means where the checkpoint itself does not; ``rule`` forces one of
    ``order.RULES``; ``optimizer`` is the optimizer's class path where the file does not say it; ``options`` are those
    of the converter.

    Raises ``FileNotFoundError``, ``UnknownFormatError``, ``FileError`` for a damaged file, ``MissingNamesError`` and
    other ``ConversionError`` subclasses where the parameters cannot be named, ``OptionError`` for what does not apply.
    """
    converter, match = registry.find(path, source_format)
    registry.check_options(options or {}, converter)
    return _read(converter, match, Path(path), names, rule, optimizer, options or {})[0]


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
    base: str | os.PathLike[str] | None = None,
    dequantize: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a checkpoint into a file of named optimizer state, or into another format that can hold it exactly.

    Takes the arguments of ``read``; ``options`` may also be those of the target's converter, and ``base`` is a
    checkpoint of the target's format to take the rest from, where it has one. ``dequantize`` decodes 8-bit and 4-bit
    moments to float32, so that a run can go on with an ordinary Adam; the report says what that loses. ``force``
    replaces an existing target; ``dry_run`` does everything but write; ``progress`` is told the bytes of tensors
    written and their total. Where the parameters' own weights were found, their digests are kept, so that loading can
    tell whether weights and state belong together.

    Raises what ``read`` raises, ``DigestError`` for a named source that is damaged, ``TargetExistsError``, and
    ``UnrepresentableError`` for what the target cannot hold.
    """
    source, target = Path(source), Path(target)
    if target.is_dir() and target_format == registry.NAMED:
        raise OptionError(f"{target} is a folder; name the file to write, as in {target / 'optimizer.safetensors'}")
    if target.exists() and not force:
        raise TargetExistsError(f"{target} exists; pass force=True (--force) to replace it")
    writer = registry.writer(target_format)
    converter, match = registry.find(source, source_format)
    options = options or {}
    registry.check_options(options, converter, writer)
    state, weights = _read(converter, match, source, names, rule, optimizer, options)
    with state:
        if not dry_run and (dequantize or target_format != registry.NAMED):
            _check_digests(state)  # ``writing.write`` does so itself with what it copies
        decoded = quantised.dequantize(state) if dequantize else None
        state = _paired(decoded.state if decoded else state, weights)
        sizes = [tensor.size for tensor in tensors(state)]
        digest = None
        if not dry_run:
            given = None if base is None else Path(base)
            digest = _write(writer, state, target, given, force, options, progress)
        return ConversionReport(
            source=str(source),
            source_format=converter.NAME,
            target=str(target),
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
            notes=(*([str(decoded)] if decoded else []), *_notes(state)),
            warnings=tuple(beside_weights(target)),
        )


def belongs(path: str | os.PathLike[str], weights: str | os.PathLike[str]) -> tuple[Pairing | None, Evidence | None]:
    """Return whether a state and weights belong together: by the digests that the state keeps, and by the numbers.

    ``weights`` is a safetensors file, or a folder with an adapter or a model in one. The first result is ``None`` where
    the state keeps no digest that could be compared; the second where digests settle it, because the state was saved
    from a live optimizer and every weight is the very one of that moment. A positional state is named by the weights.
    """
    from lora_state_format.naming.evidence import paired, weigh

    path = Path(path)
    checkpoint = with_weights(registry.read(path), Path(weights))
    with name_state(checkpoint, path, rebuild=rebuild) as state:
        pairing = paired(state, checkpoint.weights)
        settled = state.naming.rule is None and pairing.matching == len(state)
        compared = pairing.matching + len(pairing.differing) > 0
        head_dim = head_size(config_of(checkpoint, CONFIG) or {})
        evidence = None if settled else weigh(state, checkpoint.weights, head_dim=head_dim)
        return (pairing if compared else None), evidence


def _read(
    converter: Converter,
    match: Match,
    path: Path,
    names: Names | None,
    rule: str | None,
    optimizer: str | None,
    options: Mapping[str, Any],
) -> tuple[OptimizerState, Mapping[str, Tensor]]:
    """Return the named state, and the parameters' own weights as far as they were found."""
    asks = "optimizer" in registry.options(converter)
    if optimizer is not None and asks:
        options = {"optimizer": optimizer, **options}
    checkpoint = converter.read(match, registry.own_options(options, converter))
    if optimizer is not None and not asks:
        checkpoint = replace(checkpoint, state=_classed(checkpoint.state, optimizer, path))
    checkpoint = resolve(checkpoint, names)
    return name_state(checkpoint, path, names=names, rule=rule, rebuild=rebuild), checkpoint.weights


def rebuild(folder: Path, adapter: Path | None = None) -> Sequence[Described]:
    """Return the parameters of the model that the configs in a folder describe."""
    from lora_state_format.torch.rebuild import rebuild

    return rebuild(folder, adapter)


def _classed(state: OptimizerState | PositionalState, class_path: str, path: Path) -> OptimizerState | PositionalState:
    for found in state.optimizers:
        if found.class_path not in (None, class_path):
            raise OptionError(f"{path}: the optimizer is {found.class_path}, not {class_path}")
    return replace(state, optimizers=tuple(replace(found, class_path=class_path) for found in state.optimizers))


# --- writing and the report ---------------------------------------------------------------------------------------


def _paired(state: OptimizerState, weights: Mapping[str, Tensor]) -> OptimizerState:
    """Return the state with a digest of each parameter's own bytes, where they are at hand."""
    parameters = []
    for parameter in state.parameters:
        tensor = weights.get(parameter.foreign_names.get("peft", parameter.name))
        if parameter.weights is None and tensor is not None and tensor.shape == parameter.shape:
            digest = Digest(ALGORITHM, tensor.dtype, digests.hash_tensor(tensor))
            parameter = replace(parameter, weights=digest)
        parameters.append(parameter)
    return replace(state, parameters=tuple(parameters))


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


def _notes(state: OptimizerState) -> list[str]:
    notes = []
    if idle := sum(parameter.state is None for parameter in state.parameters):
        notes.append(f"{idle} parameters never took a step; they are kept as such")
    if state.carried:
        notes.append(f"{len(state.carried)} parameters with state are in no group; they stand behind the groups")
    if not any(parameter.state for parameter in state.parameters):
        notes.append(NOTHING_HELD)
    return [*notes, *describe_support(state.origin)]


def beside_weights(target: Path) -> list[str]:
    """Return a warning where a file would lie beside a model's weights, or nothing."""
    for beside in sorted(target.parent.glob("*.safetensors")):
        if beside != target and not envelope.is_state(beside):
            warning = (
                f"{target} lies beside {beside.name}, and programs that serve a model load every .safetensors file in "
                f"its folder as weights: {target.parent / 'training_state' / target.name} is a safe place"
            )
            return [warning]
    return []
