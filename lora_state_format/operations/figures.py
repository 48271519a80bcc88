"""Figures of a state's statistics: heat maps by layer and module, sizes of the next update. Needs matplotlib."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from xml.etree import ElementTree as ET

from lora_state_format.errors import MissingDependencyError
from lora_state_format.operations.entries import NO_LAYER, Entry
from lora_state_format.operations.statistics import BINS, HIGHEST, LOWEST, Measure

try:
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure as Canvas
    from matplotlib.patches import Rectangle
except ImportError as error:
    raise MissingDependencyError("a report needs matplotlib and jinja2: pip install matplotlib jinja2") from error

__all__ = ["Cells", "Figure", "heat_map", "histogram", "rms_by_place"]

INK: Final = "#010203"
"""The colour of text and lines while a figure is drawn; on a page it becomes that of the page's text."""

TICKS: Final = 15
"""Layers that are numbered at most."""

SEEN: Final = 1e-3
"""Share of the elements that a bin at the edge of a histogram must hold to be shown."""

PIXELS: Final = 54
"""Pixels that an inch of a figure takes on a page at least; where the screen is narrower, the figure scrolls."""

SVG: Final = "http://www.w3.org/2000/svg"

Cells = Mapping[tuple[str, int], float]
"""A value by module and layer."""


@dataclass(frozen=True)
class Figure:
    """A figure: its name in a file's name, a title, and a text that says what it shows."""

    name: str
    title: str
    text: str
    canvas: Any
    tips: Mapping[str, str]

    def write(self, kind: str) -> bytes:
        """Return the figure as the bytes of a ``png`` or ``svg`` file, on white."""
        out = io.BytesIO()
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            self.canvas.savefig(out, format=kind, dpi=200, facecolor="white", metadata=_undated(kind))
        return out.getvalue().replace(INK.encode(), b"#000000") if kind == "svg" else out.getvalue()

    def inline(self) -> str:
        """Return the figure as an ``svg`` element for a page: transparent, in the colours of the page, with tips."""
        out = io.BytesIO()
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            self.canvas.savefig(out, format="svg", transparent=True, metadata=_undated("svg"))
        ET.register_namespace("", SVG)
        ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
        root = ET.fromstring(out.getvalue().replace(INK.encode(), b"currentColor"))
        for metadata in root.findall(f"{{{SVG}}}metadata"):
            root.remove(metadata)
        root.set("role", "img")
        root.set("aria-label", f"{self.title}. {self.text}")
        for size in ("width", "height"):
            root.attrib.pop(size, None)
        root.set("style", f"min-width: {self.canvas.get_figwidth() * PIXELS:.0f}px")
        for element in root.iter(f"{{{SVG}}}g"):
            if tip := self.tips.get(element.attrib.pop("id", "")):
                title = ET.Element(f"{{{SVG}}}title")
                title.text = tip
                element.insert(0, title)
        return ET.tostring(root, encoding="unicode")


def rms_by_place(
    found: Sequence[Entry], measures: Sequence[Mapping[str, Measure]], slots: Sequence[str]
) -> dict[tuple[str, int], float]:
    """Return the RMS of the first of the slots that a parameter has, of any slot if none is named, by its place."""
    sums: dict[tuple[str, int], Measure] = {}
    for entry, own in zip(found, measures, strict=True):
        measured = next((own[slot] for slot in slots or own if slot in own), None)
        if measured is not None and measured.elements:
            sums.setdefault(entry.place, Measure()).merge(measured)
    return {key: value.rms for key, value in sums.items()}


def heat_map(name: str, title: str, text: str, cells: Cells, unit: str, *, around_zero: bool = False) -> Figure:
    """Return a map of the logarithms of values, modules down and layers across.

    Args:
        name: The figure's name in a file's name.
        title: Its title.
        text: What it shows.
        cells: Positive values by module and layer; others are left empty.
        unit: What a value is, for the scale.
        around_zero: Whether 1 is the middle of the scale, as for ratios.
    """
    known = {key: math.log10(value) for key, value in cells.items() if value > 0}
    modules = list(dict.fromkeys(module for module, _ in cells))
    layers = sorted({layer for _, layer in cells})
    low, high = min(known.values(), default=0.0), max(known.values(), default=1.0)
    if around_zero:
        high = max(abs(low), abs(high), 0.01)
        low = -high
    elif low == high:
        low, high = low - 0.5, high + 0.5
    scale, colours = Normalize(low, high), mpl.colormaps["RdBu_r" if around_zero else "viridis"]
    labels = _short(modules)
    canvas = Canvas(figsize=(2.4 + 0.16 * max(len(layers), 14), 1.9 + 0.22 * len(modules)), layout="constrained")
    axes = canvas.add_subplot()
    tips = {}
    for row, module in enumerate(modules):
        for column, layer in enumerate(layers):
            if (value := known.get((module, layer))) is None:
                continue
            cell = Rectangle((column, row), 1, 1, facecolor=(c := colours(scale(value))), edgecolor=c, linewidth=0.4)
            cell.set_gid(f"{name}-{row}-{column}")
            where = "in no layer" if layer == NO_LAYER else f"layer {layer}"
            tips[f"{name}-{row}-{column}"] = f"{labels[row]}, {where}: {10**value:.3g}"
            axes.add_patch(cell)
    axes.set_xlim(0, len(layers))
    axes.set_ylim(len(modules), 0)
    axes.set_yticks([row + 0.5 for row in range(len(modules))], labels)
    every = max(1, math.ceil(len(layers) / TICKS))
    ticks = range(0, len(layers), every)
    axes.set_xticks([n + 0.5 for n in ticks], ["none" if layers[n] == NO_LAYER else str(layers[n]) for n in ticks])
    axes.set_xlabel("layer", color=INK)
    bar = canvas.colorbar(ScalarMappable(scale, colours), ax=axes, location="bottom", aspect=40, pad=0.02)
    bar.set_label(f"{unit}, power of ten", color=INK)
    for part in (axes, bar.ax):
        _inked(part)
    axes.tick_params(length=0)
    return Figure(name, title, text, canvas, tips)


def histogram(name: str, title: str, text: str, lines: Mapping[str, Sequence[int]], unit: str) -> Figure:
    """Return how many elements have which size, a line for each kind: counts by power of ten, as ``Update.bins``."""
    canvas = Canvas(figsize=(6.4, 2.8), layout="constrained")
    axes = canvas.add_subplot()
    width = (HIGHEST - LOWEST) / BINS
    edges = [10 ** (LOWEST + n * width) for n in range(BINS + 1)]
    for label, bins in lines.items():
        total = max(sum(bins), 1)
        axes.stairs([100 * count / total for count in bins], edges, label=label, linewidth=1.6)
    used = [n for bins in lines.values() for n, count in enumerate(bins) if count > SEEN * sum(bins)]
    if used:
        axes.set_xlim(edges[max(0, min(used) - 1)], edges[min(BINS, max(used) + 2)])
    axes.set_xscale("log")
    axes.set_xlabel(unit, color=INK)
    axes.set_ylabel("% of elements", color=INK)
    if len(lines) > 1:
        axes.legend(frameon=False, labelcolor=INK)
    _inked(axes)
    return Figure(name, title, text, canvas, {})


def _inked(axes: Any) -> None:
    axes.tick_params(colors=INK, which="both")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _short(modules: Sequence[str]) -> list[str]:
    """Return the modules without what all of them begin or end with."""
    split = [module.split(".") for module in modules]
    least = min(map(len, split), default=1) - 1
    if len(split) < 2:
        return [re.sub(r"^.*\*\.", "", module) for module in modules]
    start = next((n for n in range(least) if len({s[n] for s in split}) > 1), least)
    end = next((n for n in range(least - start) if len({s[-1 - n] for s in split}) > 1), least - start)
    return [".".join(segments[start : len(segments) - end]) for segments in split]


def _undated(kind: str) -> dict[str, None]:
    return {"Date": None} if kind == "svg" else {"Software": None}
