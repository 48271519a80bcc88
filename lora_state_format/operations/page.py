"""A report of a checkpoint as one HTML page that needs no network. Needs the extra ``report``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import ConversionError, MissingDependencyError
from lora_state_format.foreign.weights import weights_at
from lora_state_format.io.atomic import TemporaryFile, check_target
from lora_state_format.io.files import Files
from lora_state_format.model.states import OptimizerState, PositionalState, Scalar
from lora_state_format.model.text import printable
from lora_state_format.naming.names import peft_key
from lora_state_format.operations.conversion import read
from lora_state_format.operations.diff import diff
from lora_state_format.operations.entries import Entry, entries
from lora_state_format.operations.figures import Cells, Figure, heat_map, histogram, rms_by_place
from lora_state_format.operations.findings import SQUARES
from lora_state_format.operations.look import look
from lora_state_format.operations.overview import parameter_rows, summary
from lora_state_format.operations.statistics import Measure, Statistics, measure, measure_tensor
from lora_state_format.operations.tables import Table

try:
    import jinja2
except ImportError as error:
    raise MissingDependencyError("a report needs matplotlib and jinja2: pip install matplotlib jinja2") from error

__all__ = ["Side", "figures", "page", "write_report"]

MAX_ROWS: Final = 5000
"""Rows of the table of parameters; a page with more is slow to scroll."""

MAX_LINES: Final = 5
"""Kinds of parameters that have a line of their own in the histogram."""


@dataclass(frozen=True)
class Side:
    """A checkpoint that a report shows: what it is called, its state, and what was measured.

    ``weights`` are the measures of the parameters' own values, by the parameter's place in the state.
    """

    name: str
    state: OptimizerState | PositionalState
    unnamed: str
    statistics: Statistics
    weights: tuple[Measure | None, ...] = ()

    @property
    def entries(self) -> list[Entry]:
        """The state's parameters."""
        return list(entries(self.state))


def write_report(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    compare: str | os.PathLike[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
    figures_folder: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **reading: Any,
) -> tuple[str, ...]:
    """Write the report of a checkpoint.

    Args:
        path: The checkpoint, of any known format.
        target: The HTML file to write.
        compare: An earlier checkpoint to compare it with.
        weights: The parameters' values: a safetensors file, or a folder with an adapter or a model in one.
        figures_folder: A folder for the figures as ``png`` and ``svg`` files; it is made if need be.
        force: Replace files that exist.
        progress: Called with the bytes measured and their total.
        reading: Further arguments of ``conversion.read``.

    Returns:
        The paths that were written.

    Raises:
        TargetExistsError: A file to write exists.
        StateFormatError: What reading the checkpoints raises.
    """
    target = Path(target)
    check_target(target, force=force)
    with ExitStack() as opened:
        side = _side(Path(path), weights, progress, reading, opened)
        before = None if compare is None else _side(Path(compare), None, progress, reading, opened)
        drawn = figures(side, before)
        pieces = {target: page(side, before).encode()}
        if figures_folder is not None:
            folder = Path(figures_folder)
            folder.mkdir(parents=True, exist_ok=True)
            pieces |= {
                folder / f"{figure.name}.{kind}": figure.write(kind) for figure in drawn for kind in ("png", "svg")
            }
            for piece in pieces:
                check_target(piece, force=force)
        for piece, data in pieces.items():
            with TemporaryFile(piece) as file:
                file.finish(data)
                file.commit(piece, force=force)
        return tuple(map(str, pieces))


def _side(
    path: Path,
    weights: str | os.PathLike[str] | None,
    progress: Callable[[int, int], None] | None,
    reading: Mapping[str, Any],
    opened: ExitStack,
) -> Side:
    """Return what a checkpoint holds and measures; ``opened`` closes its files."""
    unnamed = ""
    state: OptimizerState | PositionalState
    try:
        state = read(path, **reading)
    except ConversionError:
        found = look(path, whole=True, **reading)
        state, unnamed = found.state, found.why_unnamed(path)
    opened.callback(state.close)
    statistics = measure(state, progress)
    own = () if weights is None else tuple(_weights(state, Path(weights)))
    return Side(path.name or str(path.resolve()), state, unnamed, statistics, own)


def _weights(state: OptimizerState | PositionalState, path: Path) -> Iterable[Measure | None]:
    """Yield the measure of each parameter's own values, where the file has them."""
    with closing(Files()) as opened:
        tensors = {key: tensor for found in weights_at(path, opened) for key, tensor in found.tensors.items()}
        for entry in entries(state):
            key = peft_key(entry.label)
            tensor = tensors.get(entry.label) or (tensors.get(key[0]) if key else None)
            yield None if tensor is None else measure_tensor(tensor)


# --- figures ------------------------------------------------------------------------------------------------------


def figures(side: Side, before: Side | None = None) -> list[Figure]:
    """Return the figures of a state, those of a comparison among them."""
    drawn = []
    squares = rms_by_place(side.entries, side.statistics.slots, sorted(SQUARES))
    name, what = "second-moments", "second moment"
    if not squares:
        squares, name, what = rms_by_place(side.entries, side.statistics.slots, ()), "moments", "moment"
    if squares:
        drawn.append(
            heat_map(
                name,
                f"{what.capitalize()}s by layer and module",
                f"The root of the mean square of each {what}. Bright modules have had large gradients; a cell that "
                "stands out from its row has been trained differently.",
                squares,
                f"RMS of the {what}",
            )
        )
    if ratios := _ratios(side):
        drawn.append(
            heat_map(
                "update-to-weight",
                "The next update against the weights",
                "RMS of the next update with its learning rate, divided by the RMS of the weights. Around 0.001 is "
                "usual; far more moves the module quickly, far less hardly at all.",
                ratios,
                "update / weight",
            )
        )
    if lines := _lines(side):
        drawn.append(
            histogram(
                "update-sizes",
                "How large the next update is",
                "Elements by |m| / (sqrt(v) + eps), corrected for the bias of the start: 1 means a step of the full "
                "learning rate. A hill far to the left has small, noisy gradients.",
                lines,
                "size of the update, in learning rates",
            )
        )
    if before is not None:
        then = rms_by_place(before.entries, before.statistics.slots, sorted(SQUARES))
        change = {key: value / then[key] for key, value in squares.items() if then.get(key)}
        if change:
            drawn.append(
                heat_map(
                    "change",
                    f"Second moments against {before.name}",
                    "RMS of the second moment, divided by what it was. Red has grown, blue has shrunk.",
                    change,
                    "now / then",
                    around_zero=True,
                )
            )
    return drawn


def _ratios(side: Side) -> Cells:
    """Return update over weight by module and layer, where updates and weights are known."""
    rates = [dict(group.options).get("lr") for group in side.state.groups]
    updates: dict[tuple[str, int], Measure] = {}
    weights: dict[tuple[str, int], Measure] = {}
    scale: dict[tuple[str, int], float] = {}
    for entry, update, own in zip(side.entries, side.statistics.updates, side.weights, strict=False):
        stated = None if entry.group is None else rates[entry.group]
        rate = stated.item() if isinstance(stated, Scalar) else stated
        if update is None or own is None or not isinstance(rate, (int, float)):
            continue
        updates.setdefault(entry.place, Measure()).merge(update.sizes)
        weights.setdefault(entry.place, Measure()).merge(own)
        scale[entry.place] = float(rate)
    return {
        key: scale[key] * updates[key].rms / weights[key].rms for key in updates if weights[key].rms > 0 < scale[key]
    }


def _lines(side: Side) -> dict[str, list[int]]:
    """Return the histogram of update sizes for each kind of parameter, or for all together where there are many."""
    lines: dict[str, list[int]] = {}
    for entry, update in zip(side.entries, side.statistics.updates, strict=True):
        if update is not None:
            kind = next((k for k in ("lora_A", "lora_B", "embed", "norm", "bias") if k in entry.label), "weights")
            total = lines.setdefault(kind, [0] * len(update.bins))
            total[:] = [a + b for a, b in zip(total, update.bins, strict=True)]
    if len(lines) > MAX_LINES:
        return {"all": [sum(counts) for counts in zip(*lines.values(), strict=True)]}
    return lines


# --- the page -----------------------------------------------------------------------------------------------------


def page(side: Side, before: Side | None = None) -> str:
    """Return the report as one HTML page: no script, style or picture from elsewhere."""
    shown = summary(side.state, side.statistics, unnamed=side.unnamed)
    sides = [{"name": side.name, "facts": shown.facts, "findings": [printable(str(f)) for f in shown.findings]}]
    if before is not None:
        then = summary(before.state, before.statistics, unnamed=before.unnamed)
        sides.append({"name": before.name, "facts": then.facts, "findings": [printable(str(f)) for f in then.findings]})
    both = before is not None and isinstance(side.state, OptimizerState) and isinstance(before.state, OptimizerState)
    rows = _rows(side)
    tables = [_members(table, f"table-{number}") for number, table in enumerate(shown.tables)]
    template = files("lora_state_format.operations").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    rendered: str = environment.from_string(template).render(
        title=printable(side.name),
        subtitle="Optimizer state" if before is None else f"Optimizer state, compared with {printable(before.name)}",
        sides=sides,
        difference=str(diff(before.state, side.state)) if both and before else "",  # type: ignore[arg-type]
        figures=figures(side, before),
        tables=[*tables, {**_members(rows, "parameters"), "sorted": True}],
        version=version("lora_state_format"),
    )
    return rendered


def _members(table: Table, identity: str) -> dict[str, Any]:
    return {
        "id": identity, "title": printable(table.title), "columns": table.columns, "right": table.right,
        "rows": [tuple(map(printable, row)) for row in table.rows], "notes": list(map(printable, table.notes)),
        "sorted": False,
    }  # fmt: skip


def _rows(side: Side) -> Table:
    """Return the table of all parameters; the largest updates, where there are too many."""
    count = len(side.entries)
    table = parameter_rows(side.state, side.statistics, "order" if count <= MAX_ROWS else "update")
    names: Sequence[tuple[str, ...]] = [(row[-1], *row[:-1]) for row in table.rows[:MAX_ROWS]]
    note = (f"The {MAX_ROWS:,} largest updates of {count:,} parameters.",) if count > MAX_ROWS else ()
    columns = (table.columns[-1], *table.columns[:-1])
    return Table(f"Every parameter ({count:,})", columns, tuple(names), frozenset(range(1, len(columns) - 1)), note)
