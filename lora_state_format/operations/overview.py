"""A state as people look at it: facts, tables of groups, parameters and slots, a tree of modules. Nothing is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from lora_state_format.model.states import Group, OptimizerState, PositionalState, Role, Slot, Value, walk
from lora_state_format.operations.entries import Entry, Kind, dotted, entries, kind_of, kinds, span, tensors
from lora_state_format.operations.findings import Finding, findings
from lora_state_format.operations.report import (
    NOTHING_HELD,
    bytes_text,
    describe_naming,
    describe_support,
    value_text,
)
from lora_state_format.operations.tables import Table

if TYPE_CHECKING:
    from lora_state_format.operations.statistics import Measure, Statistics

__all__ = ["Summary", "parameter_rows", "summary", "tree"]

Row = TypeVar("Row")

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


# --- facts --------------------------------------------------------------------------------------------------------


def _facts(state: OptimizerState | PositionalState, found: Sequence[Entry], unnamed: str) -> Iterator[tuple[str, str]]:
    classes = [optimizer.class_path or "class not stated" for optimizer in state.optimizers]
    yield "optimizer", ", ".join(f"{n}: {c}" for n, c in enumerate(classes)) if len(classes) > 1 else "".join(classes)
    if step := _step_text(state, found):
        yield "step", step
    held = sum(bool(entry.state) for entry in found)
    yield "parameters", f"{len(found):,}, {held:,} of them with state" if held < len(found) else f"{len(found):,}"
    sizes = [tensor.size for tensor in tensors(state)]
    yield "state", f"{len(sizes):,} tensors, {bytes_text(sum(sizes))}"
    if isinstance(state, OptimizerState):
        head, *rest = describe_naming(state.naming)
        yield "names", head
        yield from (("how sure", line) for line in rest)
    else:
        yield "names", unnamed or "none: the state is stored by position"
    if not held:
        yield "note", NOTHING_HELD
    yield from (("note", line) for line in describe_support(state.origin))


def _step_text(state: OptimizerState | PositionalState, found: Sequence[Entry]) -> str:
    """Return the step that the run had reached, or else those that the parameters say."""
    if state.global_step is not None:
        return f"{state.global_step:,}"
    steps = {entry.step for entry in found if entry.step is not None}
    if not steps:
        return ""
    first, last = min(steps), max(steps)
    return f"{first:,g}" if first == last else f"{first:,g} to {last:,g}"


# --- tables -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column(Generic[Row]):
    """A column of a table: its heading, the text of each row, and whether it is aligned as numbers are."""

    heading: str
    text: Callable[[Row], str]
    right: bool = True


def _table(title: str, columns: Sequence[_Column[Row]], rows: Iterable[Row], notes: Iterable[str] = ()) -> Table:
    return Table(
        title,
        tuple(column.heading for column in columns),
        tuple(tuple(column.text(row) for column in columns) for row in rows),
        frozenset(place for place, column in enumerate(columns) if column.right),
        tuple(notes),
    )


def _group_table(state: OptimizerState | PositionalState) -> Table:
    """Return the groups with the options in which they differ; options that agree are notes."""
    options = [dict(group.options) for group in state.groups]
    keys = dict.fromkeys(key for own in options for key in own)
    shown = {key: [value_text(own[key]) if key in own else "-" for own in options] for key in keys}
    differing = {key: texts for key, texts in shown.items() if len(set(texts)) > 1}
    runs = _alike(state.groups, list(zip(*differing.values(), strict=True)) or [()] * len(options))
    columns: list[_Column[list[int]]] = [_Column("#", lambda run: span(set(run)))]
    if len(state.optimizers) > 1:
        columns.append(_Column("optimizer", lambda run: str(state.groups[run[0]].optimizer)))
    if any(group.name for group in state.groups):
        columns.append(_Column("name", lambda run: state.groups[run[0]].name or "", right=False))
    columns.append(_Column("parameters", lambda run: _count_text(len(run), state.groups[run[0]].count)))
    columns += [_Column(key, partial(_first_of, texts)) for key, texts in differing.items()]
    notes = [f"and {len(runs) - LISTED:,} more; --json has them all"] if len(runs) > LISTED else []
    same = {key: options[0][key] for key in keys if key not in differing}
    notes += _agreed("all groups" if len(state.groups) > 1 else "options", same)
    return _table(f"groups ({len(state.groups):,})", columns, runs[:LISTED], notes)


def _agreed(which: str, options: Mapping[str, Value]) -> Iterator[str]:
    """Yield the options that are the same in all groups, those apart that are not used."""
    if used := ", ".join(f"{key} {value_text(value)}" for key, value in options.items() if value not in UNSET):
        yield f"{which}: {used}"
    if unset := ", ".join(key for key, value in options.items() if value in UNSET):
        yield f"not used: {unset}"


def _alike(groups: Sequence[Group], texts: Sequence[tuple[str, ...]]) -> list[list[int]]:
    """Return the groups in runs of those that follow each other and differ in nothing that is shown."""
    keys = [(g.optimizer, g.count, g.name, own) for g, own in zip(groups, texts, strict=True)]
    return [list(run) for _, run in groupby(range(len(groups)), keys.__getitem__)]


def _count_text(groups: int, count: int) -> str:
    return f"{count:,}" if groups == 1 else f"{groups:,} x {count:,}"


def _first_of(texts: Sequence[str], run: list[int]) -> str:
    return texts[run[0]]


def _kind_table(
    state: OptimizerState | PositionalState, found: Sequence[Entry], statistics: Statistics | None
) -> Table:
    """Return the parameters by kind: what all names begin and end with is said once."""
    rows = kinds(found)
    start, end = _shared([kind.label for kind in rows])
    columns: list[_Column[Kind]] = [_Column("name", lambda kind: _within(kind.label, start, end), right=False)]
    if any(kind.numbers for kind in rows):
        columns.append(_Column("ids" if found[0].name is None else "layers", lambda kind: kind.spans, right=False))
    columns.append(_Column("count", lambda kind: f"{len(kind.members):,}"))
    columns.append(_Column("shape", lambda kind: _shape_text(kind.shape), right=False))
    columns.append(_Column("bytes", lambda kind: f"{kind.size:,}"))
    several = len({kind.group for kind in rows}) > 1
    if several:
        columns.append(_Column("group", lambda kind: _group_text(kind.group), right=False))
    if len({(kind.stepped, kind.layout) for kind in rows}) > 1:
        columns.append(_Column("state", _layout_text, right=False))
    if statistics:
        columns.append(_Column("update", partial(_update, statistics=statistics)))
    notes = [f"and {len(rows) - LISTED:,} more kinds; --parameters and --tree show them"] if len(rows) > LISTED else []
    if several and state.groups and any(kind.group is None for kind in rows):
        notes.append("group none: carried, kept for a parameter that is in no group now")
    return _table(_title(len(found), start, end), columns, rows[:LISTED], notes)


def _title(count: int, start: str, end: str) -> str:
    """Return the title of a table of parameters, whose names all begin and end alike."""
    return f"parameters ({count:,})" + (f": {start}NAME{end}" if start or end else "")


def _within(label: str, start: str, end: str) -> str:
    return label[len(start) : len(label) - len(end)] or label


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "" if shape is None else str(list(shape))


def _group_text(group: int | None) -> str:
    return "none" if group is None else str(group)


def _layout_text(kind: Kind) -> str:
    return ", ".join(f"{slot} {form}" for slot, form in kind.layout) if kind.stepped else "never stepped"


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


@dataclass
class _Used:
    """What is known of a slot: how many parameters have it, of which kinds, how many bytes, and some of its values."""

    name: str
    count: int = 0
    size: int = 0
    forms: dict[str, None] = field(default_factory=dict)
    values: dict[str, None] = field(default_factory=dict)

    def add(self, leaf: Value) -> None:
        self.count += 1
        if isinstance(leaf, Slot):
            self.size += leaf.tensor.size
            role = "" if leaf.role is Role.PARAM else f" {leaf.role.value}"
            self.forms[f"{leaf.tensor.dtype}{role}"] = None
            return
        self.forms[kind_of(leaf, None)] = None
        if len(self.values) < 3:
            self.values[value_text(leaf)] = None


def _slot_table(found: Sequence[Entry], statistics: Statistics | None) -> Table:
    """Return the slots: how many parameters have each, of which dtypes, and how large they are."""
    slots: dict[str, _Used] = {}
    for entry in found:
        for path, leaf in walk(entry.state or {}):
            name = dotted(path)
            slots.setdefault(name, _Used(name)).add(leaf)
    columns: list[_Column[_Used]] = [
        _Column("slot", lambda slot: slot.name, right=False),
        _Column("parameters", lambda slot: f"{slot.count:,}"),
        _Column("kind", lambda slot: ", ".join(slot.forms), right=False),
        _Column("bytes", lambda slot: f"{slot.size:,}"),
    ]
    if statistics:
        columns += _measured_columns(statistics.by_slot())
    else:
        columns.append(_Column("value", lambda slot: _values_text(list(slot.values))))
    return _table(f"slots ({len(slots)})", columns, slots.values())


def _values_text(values: Sequence[str]) -> str:
    return " ..".join(values[:2]) + (" .." if len(values) > 2 else "")


def _measured_columns(measured: Mapping[str, Measure]) -> list[_Column[_Used]]:
    def of(text: Callable[[Measure], str], slot: _Used) -> str:
        found = measured.get(slot.name)
        return text(found) if found else ""

    return [
        _Column("rms", partial(of, lambda measure: f"{measure.rms:.3g}")),
        _Column("largest", partial(of, lambda measure: f"{measure.largest:.3g}")),
        _Column("zeros", partial(of, lambda m: f"{m.zeros / m.elements:.1%}" if m.elements else "")),
    ]


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
    columns: list[_Column[tuple[Entry, float]]] = [
        _Column("group", lambda row: _group_text(row[0].group)),
        _Column("step", lambda row: _steps_text(row[0])),
        _Column("bytes", lambda row: f"{row[0].size:,}"),
        *([_Column[tuple[Entry, float]]("update", lambda row: f"{row[1]:.3g}")] if statistics else []),
        _Column("shape", lambda row: _shape_text(row[0].shape), right=False),
        _Column("name", lambda row: _within(row[0].label, start, end), right=False),
    ]
    return _table(_title(len(rows), start, end), columns, rows)


def _steps_text(entry: Entry) -> str:
    if entry.state is None:
        return "never"
    return "" if entry.step is None else f"{entry.step:g}"


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
