"""A state in words for people, and as JSON values for programs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from lora_state_format.model.states import Naming, OptimizerState, PositionalState, Scalar, Slot, Value
from lora_state_format.operations.entries import entries, kind_of
from lora_state_format.operations.findings import findings
from lora_state_format.optimizers.rounded import describe_stored

if TYPE_CHECKING:
    from lora_state_format.operations.statistics import Statistics

__all__ = [
    "NOTHING_HELD",
    "SCHEMA_VERSION",
    "SOURCES",
    "bytes_text",
    "describe_evidence",
    "describe_naming",
    "describe_support",
    "naming_json",
    "plain",
    "to_json",
    "value_text",
]

SCHEMA_VERSION: Final = 1
"""Version of the JSON that is printed; it grows when a member goes or changes its meaning."""

SOURCES: Final[Mapping[str, str]] = {
    "model": "the live model",
    "checkpoint": "the checkpoint itself",
    "names": "the names that were given",
    "adapter": "the adapter file",
    "configs": "a model rebuilt from its configs",
}

NOTHING_HELD: Final = (
    "no parameter has any state: either no step was taken, or the optimizer keeps its moments where no state dict "
    "shows them, as the layerwise variants of GaLore and APOLLO, LOMO and AdaLomo do"
)
"""What there is to say of a state without moments."""


NOT_COMPARED: Final = (
    "no fp32 master was compared with a weight, for the files do not hold both: ranks' files that were exchanged, or "
    "are of another save of the same step, would go unnoticed"
)
"""What there is to say of a folder of ranks' files that nothing proves to be whole."""

WITHOUT_CHECKSUMS: Final[Mapping[str, str]] = {
    "dcp": "distributed checkpoint",
    "dcp_safetensors": "Hugging Face writer",
}
"""Formats whose folders do not prove that their files belong together, and what of torch writes them."""


# --- words --------------------------------------------------------------------------------------------------------


def bytes_text(size: int) -> str:
    """Return a number of bytes in words."""
    for unit, least in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= least:
            return f"{size:,} bytes ({size / least:,.1f} {unit})"
    return f"{size:,} bytes"


def describe_naming(naming: Naming) -> Iterator[str]:
    """Yield where names came from, and how sure that is."""
    text = f"from {SOURCES.get(naming.source, naming.source)}"
    if naming.rule:
        text += f", in the order of rule '{naming.rule}'"
    yield text
    evidence = naming.details.get("evidence")
    if isinstance(evidence, Mapping):
        yield describe_evidence(evidence)
    elif naming.rule and (alike := naming.details.get("interchangeable")):
        yield (
            f"{alike!r} parameters have the same shape as another one, so shapes alone cannot confirm their order, and "
            "no weights were compared"
        )


def describe_evidence(evidence: Mapping[str, Any]) -> str:
    """Return in words what the weights say of an order; ``evidence`` is ``Evidence.to_json()``."""
    pairs, orders = evidence["pairs"], list(evidence["orders"].values())
    excluded, undecided = pairs["excluded"], pairs["undecided"]
    text = f"{evidence['verdict']}: the weights rule out "
    if not undecided and excluded:
        text += "every exchange of two modules"
    else:
        text += f"{excluded:,} of {excluded + undecided:,} exchanges of two modules"
    if orders:
        ruled_out = orders.count("excluded")
        every = f"all {len(orders)}" if ruled_out == len(orders) else f"{ruled_out} of {len(orders)}"
        text += f" and {every} other whole orders"
    if undecided:
        text += f"; {undecided:,} exchanges could go unnoticed"
    return text


def describe_support(origin: Mapping[str, Value]) -> Iterator[str]:
    """Yield notes on where a state came from.

    They are on a converter that was never tried on the files that it is for, on files that were not read or could not
    be compared, and on slots that were rounded.
    """
    if isinstance(support := origin.get("support"), str):
        yield f"support of this format is {support}: it was never tried on a file of a real run"
    if isinstance(seen := origin.get("first_look"), Mapping):
        read, files = seen["files_read"], seen["files"]
        some = "and the others are taken to be like them" if read != files else "each in part"
        yield f"a first look: {read!r} of {files!r} files were read, {some}; convert reads and compares all"
        if isinstance(parameters := origin.get("parameters"), str):
            yield f"parameters: {parameters}"
    if origin.get("masters_compared") == 0:
        yield NOT_COMPARED
    if writer := WITHOUT_CHECKSUMS.get(str(origin.get("format"))):
        yield (
            f"torch's {writer} keeps no digest of a folder's files: one that was exchanged with that of another save "
            "of the same shapes would go unnoticed"
        )
    if sentence := describe_stored(origin):
        yield sentence


def value_text(value: Value) -> str:
    """Return an option's value as text."""
    if isinstance(value, Scalar):
        return str(plain(value))
    if isinstance(value, Slot):
        return kind_of(value, None)
    return repr(value)


# --- JSON ---------------------------------------------------------------------------------------------------------


def plain(value: Value) -> Any:
    """Return a value as JSON has it. Lossy on purpose: tuples are lists, bytes hex digits, NaN and infinity strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(inner) for inner in value]
    if isinstance(value, Slot):
        return {"dtype": value.tensor.dtype, "shape": list(value.tensor.shape), "role": value.role.value}
    if isinstance(value, Scalar):
        try:
            number = value.item()
        except TypeError:
            return {"dtype": value.dtype, "bytes": value.data.hex()}
        return plain(number) if isinstance(number, (bool, int, float)) else str(number)
    if isinstance(value, bytes):
        return value.hex()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def to_json(state: OptimizerState | PositionalState, statistics: Statistics | None = None) -> dict[str, Any]:
    """Return a state as JSON values, every parameter by itself; ``statistics`` is what ``measure`` found."""
    parameters = []
    for place, entry in enumerate(entries(state)):
        member = {
            "name": entry.name,
            "id": entry.id,
            "shape": None if entry.shape is None else list(entry.shape),
            "group": entry.group,
            "state": None if entry.state is None else plain(entry.state),
        }
        if statistics:
            member["statistics"] = {slot: found.to_json() for slot, found in statistics.slots[place].items()}
            update = statistics.updates[place]
            member["update"] = {**update.sizes.to_json(), "beyond": update.beyond} if update else None
        parameters.append(member)
    named = isinstance(state, OptimizerState)
    return {
        "schema_version": SCHEMA_VERSION,
        "named": named,
        "global_step": state.global_step,
        "optimizers": [{"class_path": found.class_path, "id": found.id} for found in state.optimizers],
        "groups": [
            {"optimizer": g.optimizer, "name": g.name, "count": g.count, "options": plain(dict(g.options))}
            for g in state.groups
        ],
        "naming": naming_json(state.naming) if isinstance(state, OptimizerState) else None,
        "origin": plain(state.origin),
        "globals": plain(state.globals),
        "notes": list(describe_support(state.origin)),
        "findings": [
            {"kind": found.kind, "text": found.text, "parameters": list(found.parameters)}
            for found in findings(state, statistics)
        ],
        "parameters": parameters,
    }


def naming_json(naming: Naming) -> dict[str, Any]:
    """Return where names came from as JSON values."""
    return {"source": naming.source, "rule": naming.rule, "details": plain(naming.details)}
