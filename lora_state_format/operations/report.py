"""A state in words and tables for people, and as JSON values for programs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lora_state_format.model.states import Group, Naming, OptimizerState, PositionalState, Scalar, Slot, Value, walk
from lora_state_format.operations.entries import Entry, Kind, dotted, entries, kind_of, kinds, span
from lora_state_format.operations.findings import Finding, findings
from lora_state_format.operations.tables import Table
from lora_state_format.optimizers.rounded import describe_stored

if TYPE_CHECKING:
    from lora_state_format.operations.statistics import Statistics

__all__ = [
    "NOTHING_HELD",
    "SCHEMA_VERSION",
    "SOURCES",
    "Summary",
    "describe_naming",
    "describe_support",
    "naming_json",
    "parameter_rows",
    "plain",
    "summary",
    "to_json",
    "tree",
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

LISTED: Final = 24
"""Rows of a table before the rest are only counted."""

UNSET: Final = (None, False)
"""Values of options that say that something is not used."""


@dataclass(frozen=True)
class Summary:
    """What a state holds: facts as pairs of a heading and a text, tables, and findings."""

    facts: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...]
    findings: tuple[Finding, ...]


def summary(
    state: OptimizerState | PositionalState, statistics: Statistics | None = None, *, unnamed: str = ""
) -> Summary:
    """Return what a state holds, its parameters by kind; nothing is read.

    Args:
        state: The state.
        statistics: What ``measure`` found, to be shown too.
        unnamed: Why the parameters of a positional state have no names.
    """
    found = list(entries(state))
    return Summary(
        tuple(_facts(state, found, unnamed)),
        (_group_table(state), _kind_table(state, found, statistics), _slot_table(found, statistics)),
        findings(state, statistics),
    )


# --- words --------------------------------------------------------------------------------------------------------


def _facts(state: OptimizerState | PositionalState, found: Sequence[Entry], unnamed: str) -> Iterator[tuple[str, str]]:
    classes = [optimizer.class_path or "class not stated" for optimizer in state.optimizers]
    yield "optimizer", ", ".join(f"{n}: {c}" for n, c in enumerate(classes)) if len(classes) > 1 else "".join(classes)
    steps = Counter(entry.step for entry in found if entry.step is not None)
    if state.global_step is not None:
        yield "step", f"{state.global_step:,}"
    elif steps:
        first, last = min(steps), max(steps)
        yield "step", f"{first:,g}" if first == last else f"{first:,g} to {last:,g}"
    held = sum(bool(entry.state) for entry in found)
    yield "parameters", f"{len(found):,}, {held:,} of them with state" if held < len(found) else f"{len(found):,}"
    leaves = [leaf.tensor for e in found for _, leaf in walk(e.state or {}) if isinstance(leaf, Slot)]
    leaves += [leaf.tensor for _, leaf in walk(state.globals) if isinstance(leaf, Slot)]
    yield "state", f"{len(leaves):,} tensors, {bytes_text(sum(tensor.size for tensor in leaves))}"
    if isinstance(state, OptimizerState):
        head, *rest = describe_naming(state.naming)
        yield "names", head
        for line in rest:
            yield "how sure", line
    else:
        yield "names", unnamed or "none: the state is stored by position"
    if not held:
        yield "note", NOTHING_HELD
    for line in describe_support(state.origin):
        yield "note", line


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
        yield (
            f"a first look: {read!r} of {files!r} files were read, and the others are taken to be like them; convert "
            "reads and compares all"
        )
    if origin.get("masters_compared") == 0:
        yield NOT_COMPARED
    if sentence := describe_stored(origin):
        yield sentence


# --- tables -------------------------------------------------------------------------------------------------------


def _group_table(state: OptimizerState | PositionalState) -> Table:
    """Return the groups with the options in which they differ; options that agree are notes."""
    options = [dict(group.options) for group in state.groups]
    keys = list(dict.fromkeys(key for own in options for key in own))
    shown = {key: [value_text(own[key]) if key in own else "-" for own in options] for key in keys}
    differing = [key for key in keys if len(set(shown[key])) > 1]
    same = {key: options[0][key] for key in keys if key not in differing}
    runs: list[list[int]] = []
    for n, group in enumerate(state.groups):
        before = state.groups[runs[-1][0]] if runs else None
        alike = before and _folds(before, group) and all(shown[k][runs[-1][0]] == shown[k][n] for k in differing)
        runs[-1].append(n) if alike else runs.append([n])
    several, named = len(state.optimizers) > 1, any(group.name for group in state.groups)
    rows = []
    for run in runs[:LISTED]:
        first = state.groups[run[0]]
        number = str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
        count = f"{first.count:,}" if len(run) == 1 else f"{len(run):,} x {first.count:,}"
        optimizer = (str(first.optimizer),) if several else ()
        name = (first.name or "",) if named else ()
        rows.append((number, *optimizer, *name, count, *(shown[key][run[0]] for key in differing)))
    columns = ("#", *(("optimizer",) if several else ()), *(("name",) if named else ()), "parameters", *differing)
    notes = [f"and {len(runs) - LISTED:,} more; --json has them all"] if len(runs) > LISTED else []
    used = ", ".join(f"{key} {value_text(value)}" for key, value in same.items() if value not in UNSET)
    unset = ", ".join(key for key, value in same.items() if value in UNSET)
    which = "all groups" if len(state.groups) > 1 else "options"
    notes += [f"{which}: {used}"] if used else []
    notes += [f"not used: {unset}"] if unset else []
    right = frozenset(range(len(columns))) - {columns.index("name")} if named else frozenset(range(len(columns)))
    return Table(f"groups ({len(state.groups):,})", columns, tuple(rows), right, tuple(notes))


def _folds(first: Group, other: Group) -> bool:
    return (first.optimizer, first.count, first.name) == (other.optimizer, other.count, other.name)


def _kind_table(
    state: OptimizerState | PositionalState, found: Sequence[Entry], statistics: Statistics | None
) -> Table:
    """Return the parameters by kind: what all names begin and end with is said once."""
    rows = kinds(found)
    start, end = _shared([kind.label for kind in rows])
    several = len({kind.group for kind in rows}) > 1
    odd = len({(kind.stepped, kind.layout) for kind in rows}) > 1
    columns = ["name", _numbers(found, rows), "count", "shape", "bytes"]
    columns += ["group"] if several else []
    columns += ["state"] if odd else []
    columns += ["update"] if statistics else []
    lines = []
    for kind in rows[:LISTED]:
        line = [kind.label[len(start) : len(kind.label) - len(end)] or kind.label, kind.spans, f"{len(kind.members):,}"]
        line += ["" if kind.shape is None else str(list(kind.shape)), f"{kind.size:,}"]
        line += [("none" if kind.group is None else str(kind.group))] if several else []
        line += [", ".join(f"{s} {k}" for s, k in kind.layout) if kind.stepped else "never stepped"] if odd else []
        line += [_update(kind, statistics)] if statistics else []
        lines.append(tuple(line))
    kept = [column for column, heading in enumerate(columns) if heading]
    title = f"parameters ({len(found):,})"
    if start or end:
        title += f": {start}NAME{end}"
    notes = [f"and {len(rows) - LISTED:,} more kinds; --parameters and --tree show them"] if len(rows) > LISTED else []
    if several and state.groups and any(kind.group is None for kind in rows):
        notes.append("group none: carried, kept for a parameter that is in no group now")
    right = frozenset(place for place, column in enumerate(kept) if columns[column] in {"count", "bytes", "update"})
    return Table(
        title,
        tuple(columns[column] for column in kept),
        tuple(tuple(line[column] for column in kept) for line in lines),
        right,
        tuple(notes),
    )


def _numbers(found: Sequence[Entry], rows: Sequence[Kind]) -> str:
    """Return the heading of the numbers in names: none where no name has one."""
    if not any(kind.numbers for kind in rows):
        return ""
    return "layers" if found[0].name is not None else "ids"


def _update(kind: Kind, statistics: Statistics) -> str:
    """Return the RMS of the next update of a kind's parameters, before the learning rate."""
    from lora_state_format.operations.statistics import Measure

    total = Measure()
    for place in kind.members:
        if own := statistics.updates[place]:
            total.merge(own.sizes)
    return f"{total.rms:.3g}" if total.elements else ""


def _shared(labels: Sequence[str]) -> tuple[str, str]:
    """Return what all labels begin and end with, in whole segments, if there are several and something is left."""
    split = [label.split(".") for label in labels]
    if len(split) < 2:
        return "", ""
    least = min(map(len, split)) - 1
    start = next((n for n in range(least) if len({segments[n] for segments in split}) > 1), least)
    rest = least - start
    end = next((n for n in range(rest) if len({segments[-1 - n] for segments in split}) > 1), rest)
    head, tail = split[0][:start], split[0][len(split[0]) - end :]
    return "".join(f"{segment}." for segment in head), "".join(f".{segment}" for segment in tail)


def _slot_table(found: Sequence[Entry], statistics: Statistics | None) -> Table:
    """Return the slots: how many parameters have each, of which dtypes, and how large they are."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    forms: dict[str, dict[str, None]] = {}
    values: dict[str, dict[str, None]] = {}
    for entry in found:
        for path, leaf in walk(entry.state or {}):
            slot = dotted(path)
            counts[slot] += 1
            is_tensor = isinstance(leaf, Slot)
            sizes[slot] += leaf.tensor.size if isinstance(leaf, Slot) else 0
            form = leaf.tensor.dtype if isinstance(leaf, Slot) else kind_of(leaf, None)
            like = is_tensor and isinstance(leaf, Slot) and leaf.role.value != "param"
            forms.setdefault(slot, {})[f"{form} {leaf.role.value}" if like and isinstance(leaf, Slot) else form] = None
            if not is_tensor and len(values.setdefault(slot, {})) < 3:
                values[slot][value_text(leaf)] = None
    measured = statistics.by_slot() if statistics else {}
    columns = ("slot", "parameters", "kind", "bytes", *(("rms", "largest", "zeros") if statistics else ("value",)))
    rows = []
    for slot in counts:
        line = [slot, f"{counts[slot]:,}", ", ".join(forms[slot]), f"{sizes[slot]:,}"]
        if statistics:
            m = measured.get(slot)
            zeros = f"{m.zeros / m.elements:.1%}" if m and m.elements else ""
            line += [f"{m.rms:.3g}", f"{m.largest:.3g}", zeros] if m else ["", "", ""]
        else:
            line.append(" ..".join(list(values.get(slot, {}))[:2]) + (" .." if len(values.get(slot, {})) > 2 else ""))
        rows.append(tuple(line))
    return Table(f"slots ({len(counts)})", columns, tuple(rows), frozenset({1, 3, 4, 5, 6}))


def parameter_rows(
    state: OptimizerState | PositionalState,
    statistics: Statistics | None = None,
    sort: str = "order",
    *,
    short: bool = False,
) -> Table:
    """Return one row for each parameter.

    Args:
        state: The state.
        statistics: What ``measure`` found; with it the RMS of each first and second moment's update is a column.
        sort: ``order``, ``name``, ``size``, ``step`` or ``update``; the largest size, step or update comes first.
        short: Whether what all names begin and end with is said once, in the title.
    """
    rows: list[tuple[Entry, float]] = []
    for place, entry in enumerate(entries(state)):
        update = statistics.updates[place] if statistics else None
        rows.append((entry, update.sizes.rms if update else 0.0))
    keys: dict[str, Callable[[tuple[Entry, float]], Any]] = {
        "name": lambda row: row[0].label,
        "size": lambda row: -row[0].size,
        "step": lambda row: -(row[0].step or 0.0),
        "update": lambda row: -row[1],
    }
    if sort in keys:
        rows.sort(key=keys[sort])
    start, end = _shared([entry.label for entry, _ in rows]) if short else ("", "")
    columns = ("group", "step", "bytes", *(("update",) if statistics else ()), "shape", "name")
    lines = tuple(
        (
            "none" if entry.group is None else str(entry.group),
            "never" if entry.state is None else "" if entry.step is None else f"{entry.step:g}",
            f"{entry.size:,}",
            *((f"{size:.3g}",) if statistics else ()),
            "" if entry.shape is None else str(list(entry.shape)),
            entry.label[len(start) : len(entry.label) - len(end)],
        )
        for entry, size in rows
    )
    title = f"parameters ({len(rows):,})" + (f": {start}NAME{end}" if start or end else "")
    return Table(title, columns, lines, frozenset(range(len(columns) - 2)))


def tree(state: OptimizerState | PositionalState) -> Iterator[str]:
    """Yield the modules as an indented tree, layers that are alike on one line, with counts and bytes."""
    root: dict[str | None, Any] = {}
    for kind in kinds(entries(state)):
        numbers = iter(kind.numbers)
        node = root
        for segment in kind.label.split("."):
            segment = _braced(next(numbers)) if segment == "*" else segment
            node = node.setdefault(segment, {})
        shape = "" if kind.shape is None else f" {list(kind.shape)}"
        state_text = "" if kind.stepped else ", never stepped"
        node[None] = f"{shape}  x {len(kind.members):,}, {kind.size:,} bytes{state_text}"
    yield from _branches(root, "")


def _braced(numbers: set[int]) -> str:
    """Return a number, or several in braces."""
    return span(numbers) if len(numbers) == 1 else f"{{{span(numbers)}}}"


def _branches(node: Mapping[Any, Any], indent: str) -> Iterator[str]:
    for segment, inner in node.items():
        if segment is None:
            continue
        while len(inner) == 1 and None not in inner:  # a module with one child and nothing else shares its line
            ((only, deeper),) = inner.items()
            segment, inner = f"{segment}.{only}", deeper
        yield f"{indent}{segment}{inner.get(None, '')}"
        yield from _branches(inner, indent + "  ")


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
        "findings": [
            {"kind": found.kind, "text": found.text, "parameters": list(found.parameters)}
            for found in findings(state, statistics)
        ],
        "parameters": parameters,
    }


def naming_json(naming: Naming) -> dict[str, Any]:
    """Return where names came from as JSON values."""
    return {"source": naming.source, "rule": naming.rule, "details": plain(naming.details)}
