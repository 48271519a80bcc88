"""What all benchmarks share: processes that are timed whole, in turn; tables, JSON, and the figure of the docs.

::

    python tests/bench/measure.py FILE.json [FILE.json ...] --out docs/bench.svg

draws what ``bench.py --json FILE.json`` measured, one file for each machine, and prints one table of them all. Needs
matplotlib, which the extra ``report`` brings.

Processor time (user and system) stands next to the time of the clock: it is the steadier of the two where others use
the machine. What is compared takes turns in rotated order, so that a ratio is of neighbours in time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

BLOCK: Final = bytes(1 << 24)


class Run(NamedTuple):
    """What a process took: seconds of the clock and of processors, MiB at its peak, and the lines that it printed."""

    wall: float
    cpu: float
    peak: float
    printed: tuple[str, ...] = ()


def worker(script: str, *arguments: object) -> tuple[str, ...]:
    """Return the command that runs a worker of a script: a function, a folder, a size."""
    return (sys.executable, "-W", "ignore", script, "--worker", *map(str, arguments))


def measured(command: Sequence[str]) -> Run:
    """Run a process to its end; a worker's seconds are those of what it times, else they are the whole process's."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        lines = process.stdout.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    elapsed = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    wall, cpu = elapsed, usage.ru_utime + usage.ru_stime
    if "--worker" in command:
        wall, cpu = json.loads(lines.pop())
    return Run(wall, cpu, usage.ru_maxrss / 1024, tuple(lines))


def work(functions: Mapping[str, Callable[[Path, int], Callable[[], Any]]]) -> bool:
    """Be a worker if the command line asks for one: prepare, time the rest, print seconds of clock and processors."""
    if sys.argv[1:2] != ["--worker"]:
        return False
    name, folder, size = sys.argv[2:]
    run = functions[name](Path(folder), int(size))
    wall, cpu = time.perf_counter(), _processor_time()
    run()
    print(json.dumps([time.perf_counter() - wall, _processor_time() - cpu]))
    return True


def _processor_time() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def in_turn(cases: Sequence[Callable[[], Run]], rounds: int) -> list[list[Run]]:
    """Measure each case once a round, in rotated order."""
    found: list[list[Run]] = [[] for _ in cases]
    for number in range(rounds):
        for index in (*range(number % len(cases), len(cases)), *range(number % len(cases))):
            found[index].append(cases[index]())
    return found


def warm(folder: Path, size: int) -> None:
    """Write and remove so many bytes: a virtual machine gets memory, or blocks, when it first writes to them."""
    path = folder / "warm"
    with path.open("wb", buffering=0) as file:
        for _ in range(0, size, len(BLOCK)):
            file.write(BLOCK)
    path.unlink()


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, and the first and third quarter."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return median(ordered), ordered[last // 4], ordered[last - last // 4]


def machine(*packages: str) -> str:
    """Return in a line what figures were measured on."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    python = f"Python {platform.python_version()}"
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {python}, {versions}"


# --- results ------------------------------------------------------------------------------------------------------


def row(title: str, own: Sequence[Run], first: Sequence[Run], limits: Mapping[str, float]) -> dict[str, Any]:
    """Return what was measured of a case as JSON, next to its limits: ``cpu``, ``ratio``, ``peak``.

    ``first`` are the runs of the yardstick, which ratios of the same round are to.
    """
    shown: dict[str, Any] = {"title": title, "limits": dict(limits)}
    shown["seconds"], shown["least"] = spread([run.wall for run in own]), min(run.wall for run in own)
    shown["cpu"] = spread([run.cpu for run in own])
    shown["ratio"] = spread([a.wall / b.wall for a, b in zip(own, first, strict=True)])
    shown["cpu_ratio"] = spread([a.cpu / max(b.cpu, 1e-6) for a, b in zip(own, first, strict=True)])
    shown["peak"] = max(run.peak for run in own)
    shown["missed"] = {name: over for name, limit in limits.items() if (over := _value(shown, name) - limit) > 0}
    return shown


def _value(row: Mapping[str, Any], name: str) -> float:
    value = row[name]
    return float(value if name == "peak" else value[0])


HEADINGS: Final = ("least s", "median s", "cpu s", "ratio", "quarters", "cpu ratio", "peak MiB", "limit")


def lines(title: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return rows as a table in Markdown."""
    table = [f"| {title} | {' | '.join(HEADINGS)} |", "|" + "---|" * (len(HEADINGS) + 1)]
    for found in rows:
        ratio, low, high = found["ratio"]
        limits = ", ".join(
            f"{name} {limit:g}: " + (f"missed by {found['missed'][name]:.2g}" if name in found["missed"] else "met")
            for name, limit in found["limits"].items()
        )
        numbers = [f"{found['least']:.2f}", f"{found['seconds'][0]:.2f}", f"{found['cpu'][0]:.2f}", f"{ratio:.2f}"]
        numbers += [f"{low:.2f}-{high:.2f}", f"{found['cpu_ratio'][0]:.2f}", f"{found['peak']:,.0f}", limits]
        table.append(f"| {found['title']} | {' | '.join(numbers)} |")
    return table


def save(path: Path, about: str, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write what was measured on one machine as JSON."""
    path.write_text(json.dumps({"machine": about, "tables": tables}, indent=1) + "\n", encoding="utf-8")


def _compared(path: Path) -> dict[str, Any]:
    """Print the tables of a file, and return it with those alone whose rows are to be compared with the first one."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    tables = result["tables"]
    for table, rows in tables.items():
        print("", result["machine"], "", *lines(table, rows), sep="\n")
    compared = {table: rows for table, rows in tables.items() if any("ratio" in row["limits"] for row in rows)}
    return {**result, "tables": compared}


def draw(files: Sequence[Path], out: Path) -> None:
    """Draw the ratios to each table's yardstick, a colour for each machine, limits as marks; print the tables."""
    from matplotlib.figure import Figure

    results = [_compared(path) for path in files]
    every = [(table, found) for result in results for table, rows in result["tables"].items() for found in rows[1:]]
    titles = list(dict.fromkeys((table, found["title"]) for table, found in every))
    figure = Figure(figsize=(8, 1 + 0.4 * len(titles)), layout="constrained")
    axes = figure.subplots()
    for number, result in enumerate(results):
        known = {(table, found["title"]): found for table, rows in result["tables"].items() for found in rows[1:]}
        places = [place + 0.8 * (number + 0.5) / len(results) - 0.4 for place, key in enumerate(titles) if key in known]
        found = [known[key] for key in titles if key in known]
        axes.barh(places, [row["ratio"][0] for row in found], 0.8 / len(results), label=result["machine"])
        limited = [(place, row) for place, row in zip(places, found, strict=True) if "ratio" in row["limits"]]
        limits = [row["limits"]["ratio"] for _, row in limited]
        axes.plot(limits, [place for place, _ in limited], "k|", markersize=14)
    axes.set_yticks(range(len(titles)), [f"{table}: {title.replace('`', '')}" for table, title in titles], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.5)
    axes.set_xlabel("times the yardstick; | is the limit")
    axes.legend(fontsize=6, loc="lower right")
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("files", type=Path, nargs="+")
    options.add_argument("--out", type=Path, required=True)
    chosen = options.parse_args()
    draw(chosen.files, chosen.out)


if __name__ == "__main__":
    main()
