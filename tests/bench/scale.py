"""Cost as a function of size: a 70B model's state in 66 shards, sources up to 30 GB, up to 100,000 parameters.

::

    python tests/bench/scale.py [--only model sizes parameters] [--folder /dev/shm] [--gigabytes 0.25 0.5 1 2 4 8]
        [--disk /tmp] [--large 30] [--counts 1000 10000 100000] [--rounds 5] [--svg docs/scale.svg]

Tensors are holes: files that say how long they are and hold no blocks there, so that a state of 564 GB takes some
megabytes of disk. Headers, manifests, digests and CRCs are the real ones of those zeros. What ``convert`` makes of them
has no holes: the large source takes its size once, in the folder ``--disk``.

Every measurement is a process of its own, so that peaks are those of whole processes; of several rounds the least
seconds and the largest peak are printed, as tables in Markdown. The exit code is 1 if something is not as expected:
another number of shards, a plan that does not restore everything, a peak that grows with the source or exceeds 96 MiB,
100,000 parameters that take more than 3 s to open, 2 s to plan, or 75 MB of headers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest import mock

import measure
from measure import Run

CLI: Final = (sys.executable, "-m", "lora_state_format")
LLAMA_70B: Final = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
"""What the config.json of a Llama 3 of 70B says of shapes."""

SHARD: Final = 9_000_000_000
"""Bytes; the largest parameters have 8.4 GB of moments, a layer has 6.8."""
SHARDS: Final = 66
COUNT, COLUMNS = 32, 1024
"""Of the matrices in the sources of ``convert``; only their rows differ."""

MOST: Final = 96
"""MiB that ``convert`` may take, whatever it converts."""
GROWTH: Final = 8
"""MiB between the smallest peak and the largest."""
HEADERS: Final = 75_000_000
SECONDS: Final = {"open_many": 3.0, "plan_many": 2.0}
"""For 100,000 parameters."""


# --- states of zeros ----------------------------------------------------------------------------------------------

BLOCK: Final = bytes(1 << 20)


class Zeros:
    """So many zeros, as a source; what it shows are parts of ``BLOCK``."""

    crc32 = None

    def __init__(self, size: int) -> None:
        self.size = size

    def view(self, offset: int, size: int) -> memoryview | None:
        return memoryview(BLOCK)[:size] if size <= len(BLOCK) else None

    def readinto(self, offset: int, out: memoryview) -> None:
        out[:] = bytes(len(out))


def zeros(shape: tuple[int, ...]) -> Any:
    from lora_state_format.model.tensors import contiguous

    return contiguous("F32", shape, Zeros(4 * math.prod(shape)))


@cache
def digest_of_zeros(count: int) -> str:
    from lora_state_format.model.digests import hash_tensor

    return hash_tensor(zeros((count,)))


def leave_holes(layout: Any, target: Any, *_: object, **__: object) -> None:
    """In place of ``writing.stream``, where every byte is zero: room for the bytes, and their digests."""
    os.truncate(target.path, layout.header_size + layout.data_size)
    layout.digests[:] = [digest_of_zeros(tensor.count) for _, tensor in layout.tensors]


def write_sparse(state: Any, path: Path, max_shard_size: int | None = None) -> Any:
    """What ``writing.write`` writes of a state of zeros, with holes for all tensors."""
    from lora_state_format.format import writing

    with mock.patch.object(writing, "stream", leave_holes):
        return writing.write(state, path, max_shard_size=max_shard_size)


def save_sparse(value: Any, path: Path) -> None:
    """What ``torch.save`` writes, with holes for tensors of zeros."""
    from lora_state_format.foreign.torch_save import archive
    from lora_state_format.io.ledger import Ledger

    with path.open("wb") as file:
        for chunk in archive(value, Ledger()):
            if isinstance(chunk, memoryview) and chunk.obj is BLOCK:
                file.seek(len(chunk), os.SEEK_CUR)
            else:
                file.write(chunk)


def moments(shape: tuple[int, ...]) -> dict[str, Any]:
    """AdamW's slots of one parameter at its third step."""
    from lora_state_format.model.states import Role, Scalar, Slot

    tensors = {slot: Slot(zeros(shape), Role.PARAM) for slot in ("exp_avg", "exp_avg_sq")}
    return {"step": Scalar.of("F32", 3.0), **tensors}


def source(folder: Path, megabytes: int) -> None:
    """An ``optimizer.pt`` of so many megabytes, and the parameters' names."""
    shape = max(round(megabytes * 1e6 / (8 * COUNT * COLUMNS)), 1), COLUMNS
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "params": list(range(COUNT))}
    state = {number: moments(shape) for number in range(COUNT)}
    save_sparse({"state": state, "param_groups": [group]}, folder / "optimizer.pt")
    (folder / "names.txt").write_text("".join(f"layers.{number}.weight\n" for number in range(COUNT)), "utf-8")


# --- workers: each prepares, then returns what is timed -----------------------------------------------------------


def make_source(folder: Path, megabytes: int) -> Callable[[], Any]:
    return lambda: source(folder, megabytes)


def live_model(folder: Path) -> Any:
    """AdamW over the model that ``config.json`` describes, which transformers builds on the meta device."""
    from lora_state_format.binding.live import LiveGroup, LiveOptimizer, LiveParameter
    from lora_state_format.model.states import Optimizer
    from lora_state_format.torch.rebuild import rebuild

    described = [item.parameter for item in rebuild(folder)]
    parameters = {p.name: LiveParameter(p.name, p.shape, "F32", tied=p.tied) for p in described}
    options = (("lr", 1e-5), ("betas", (0.9, 0.95)), ("eps", 1e-8), ("weight_decay", 0.1))
    return LiveOptimizer(
        (Optimizer("torch.optim.adamw.AdamW"),), (LiveGroup(0, options, tuple(parameters)),), parameters
    )


def model_state(folder: Path) -> Any:
    """The state of that optimizer after some steps, all zeros."""
    from lora_state_format.model.states import Group, Naming, OptimizerState, Parameter

    live = live_model(folder)
    return OptimizerState(
        live.optimizers,
        tuple(Group(group.optimizer, group.options, len(group.parameters)) for group in live.groups),
        tuple(Parameter(p.name, p.shape, moments(p.shape), dtype=p.dtype) for p in live.parameters.values()),
        Naming("model"),
    )


def make_model(folder: Path, size: int) -> Callable[[], Any]:
    (folder / "config.json").write_text(json.dumps(LLAMA_70B), "utf-8")

    def run() -> None:
        written = write_sparse(model_state(folder), folder / "optimizer.safetensors", SHARD)
        shards = len(written.files) - 1
        if shards != SHARDS:
            raise SystemExit(f"{shards} shards, where {SHARDS} are expected")
        print(f"{shards} shards, {written.tensors:,} tensors, {written.size / 1e9:,.1f} GB", flush=True)

    return run


def rebuild_model(folder: Path, size: int) -> Callable[[], Any]:
    from lora_state_format.torch.rebuild import rebuild

    return lambda: rebuild(folder)


def open_model(folder: Path, size: int) -> Callable[[], Any]:
    from lora_state_format.format import reading

    return lambda: reading.open_state(folder / "optimizer.safetensors")


def plan_model(folder: Path, size: int) -> Callable[[], Any]:
    from lora_state_format.binding.plan import plan
    from lora_state_format.format import reading

    state, live = reading.open_state(folder / "optimizer.safetensors"), live_model(folder)

    def run() -> None:
        found = plan(state, live)
        found.check()
        if found.restored != len(state):
            raise SystemExit(f"{found.restored} of {len(state)} parameters would be restored")

    return run


def many(count: int) -> Any:
    """A state of a mixture of experts: so many small matrices, two moments each."""
    from lora_state_format.model.states import Group, Naming, Optimizer, OptimizerState, Parameter

    slots = moments((4, 4))
    parameters = []
    for number in range(count):
        layer, expert, part = number // 1500, number // 3 % 500, ("gate", "up", "down")[number % 3]
        name = f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        parameters.append(Parameter(name, (4, 4), slots, dtype="F32"))
    groups = (Group(0, (("lr", 1e-4),), count),)
    return OptimizerState((Optimizer("torch.optim.adamw.AdamW"),), groups, tuple(parameters), Naming("model"))


def write_many(folder: Path, count: int) -> Callable[[], Any]:
    from lora_state_format.format import writing

    state = many(count)
    return lambda: writing.write(state, folder / "many.safetensors", force=True)


def open_many(folder: Path, count: int) -> Callable[[], Any]:
    from lora_state_format.format import reading

    return lambda: reading.open_state(folder / "many.safetensors")


def plan_many(folder: Path, count: int) -> Callable[[], Any]:
    from lora_state_format.binding.live import LiveGroup, LiveOptimizer, LiveParameter
    from lora_state_format.binding.plan import plan
    from lora_state_format.format import reading

    state = reading.open_state(folder / "many.safetensors")
    parameters = {p.name: LiveParameter(p.name, p.shape, "F32") for p in state.parameters}
    live = LiveOptimizer(state.optimizers, (LiveGroup(0, (("lr", 1e-4),), tuple(parameters)),), parameters)
    return lambda: plan(state, live).check()


# --- measuring ----------------------------------------------------------------------------------------------------


def measured(command: Sequence[str]) -> Run:
    """A command of its own, or a worker."""
    return measure.measured(command if command[0] in CLI else measure.worker(__file__, *command))


def best(command: Sequence[str], rounds: int) -> Run:
    """The least seconds of several rounds, and the largest peak."""
    runs = [measured(command) for _ in range(rounds)]
    return Run(
        min(run.wall for run in runs), min(run.cpu for run in runs), max(run.peak for run in runs), runs[0].printed
    )


def table(*rows: Sequence[str]) -> None:
    print(f"\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows[1:]:
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()


# --- the three parts ----------------------------------------------------------------------------------------------


def model_part(folder: Path, rounds: int) -> None:
    made = measured(["make_model", str(folder), "0"])
    (what,) = made.printed
    held = sum(512 * path.stat().st_blocks for path in folder.iterdir())
    inspect, verify = ([*CLI, name, str(folder / "optimizer.safetensors.index.json")] for name in ("inspect", "verify"))
    steps = {
        "write it, with holes": made,
        "names and shapes from `config.json` (`rebuild`)": best(["rebuild_model", str(folder), "0"], rounds),
        "`open_state`": best(["open_model", str(folder), "0"], rounds),
        "`lora-state inspect`, the whole process": best(inspect, rounds),
        "`plan` for AdamW over the model on the meta device": best(["plan_model", str(folder), "0"], rounds),
        "`lora-state verify`, which reads all of it": measured(verify),
    }
    shown = ([title, f"{run.wall:.2f}", f"{run.peak:,.0f}"] for title, run in steps.items())
    table([f"AdamW of a 70B model: {what}; {held / 1e6:.1f} MB of disk", "s", "peak MiB"], *shown)


def sizes_part(places: Sequence[tuple[float, Path]], rounds: int) -> tuple[dict[float, Run], bool]:
    """``convert`` and ``verify`` of sources of so many GB in these folders, and whether the peaks are flat."""
    converted: dict[float, Run] = {}
    rows = []
    for gigabytes, folder in places:
        measured(["make_source", str(folder), str(round(gigabytes * 1000))])
        archive, target, names = folder / "optimizer.pt", folder / "out.safetensors", folder / "names.txt"
        held = 512 * archive.stat().st_blocks
        convert = [*CLI, "convert", str(archive), str(target), "--names", str(names)]
        times = rounds if gigabytes <= 8 else 1
        run = converted[gigabytes] = best([*convert, "--force"], times)
        verified = measured([*CLI, "verify", str(target)])
        target.unlink()
        rows.append(
            [f"{archive.stat().st_size / 1e9:.2f}", f"{held / 1e6:.2f}", f"{run.wall:.2f}", f"{run.peak:.1f}",
             f"{verified.wall:.2f}", f"{verified.peak:.1f}"]
        )  # fmt: skip
        archive.unlink()
    table(["`optimizer.pt`, GB", "MB of disk", "`convert`, s", "peak MiB", "`verify`, s", "peak MiB"], *rows)
    peaks = [run.peak for run in converted.values()]
    return converted, max(peaks) <= MOST and max(peaks) - min(peaks) <= GROWTH


def parameters_part(counts: Sequence[int], folder: Path, rounds: int) -> tuple[dict[str, dict[float, Run]], bool]:
    """Writing, opening and planning so many parameters, and whether 100,000 keep within bounds."""
    found: dict[str, dict[float, Run]] = {"write_many": {}, "open_many": {}, "plan_many": {}}
    rows, kept = [], True
    for count in counts:
        row = [f"{count:,}"]
        for worker, runs in found.items():
            run = runs[count] = best([worker, str(folder), str(count)], rounds)
            row += [f"{run.wall:.3f}", f"{run.peak:,.0f}"]
            kept &= run.wall <= SECONDS.get(worker, math.inf) * max(count / 100_000, 1)
        files = [*folder.glob("many*.safetensors")]
        headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)
        kept &= headers <= HEADERS * max(count / 100_000, 1)
        rows.append([*row, f"{headers / 1e6:.1f}", str(len(files))])
        for path in folder.iterdir():
            path.unlink()
    steps = [title for step in ("`write`", "`open_state`", "`plan`") for title in (f"{step}, s", "peak MiB")]
    table(["parameters", *steps, "headers, MB", "files"], *rows)
    return found, kept


# --- the figure ---------------------------------------------------------------------------------------------------

COLOURS: Final = ("#0072b2", "#d55e00", "#009e73")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 320, 260, 48, 34, 62, 44


class Chart(NamedTuple):
    """Lines through points, on two logarithmic axes."""

    title: str
    below: str
    lines: Mapping[str, Mapping[float, float]]


def figure(charts: Sequence[Chart]) -> str:
    """Charts side by side, as the text of an SVG file; the same text for the same points."""
    width = WIDTH * len(charts)
    size = f'viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{HEIGHT}" fill="white"/>',
    ]
    for number, chart in enumerate(charts):
        parts += [f'<g transform="translate({number * WIDTH},0)">', *_drawn(chart), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _drawn(chart: Chart) -> list[str]:
    points = [point for line in chart.lines.values() for point in line.items()]
    ticks = sorted({x for x, _ in points})
    low = 10.0 ** math.floor(math.log10(min(y for _, y in points)))
    high = 10.0 ** math.ceil(math.log10(max(y for _, y in points)))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(x: float) -> float:
        return LEFT + (right - LEFT) * math.log(x / ticks[0]) / math.log(ticks[-1] / ticks[0])

    def up(y: float) -> float:
        return bottom - (bottom - TOP) * math.log(y / low) / math.log(high / low)

    parts = [f'<text x="{LEFT}" y="18" font-size="13">{chart.title}</text>']
    for exponent in range(round(math.log10(low)), round(math.log10(high)) + 1):
        y = up(10.0**exponent)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_label(10.0**exponent)}</text>')
    for x in ticks:
        parts.append(f'<path d="M{across(x):.1f} {bottom}v4" stroke="#888"/>')
        parts.append(f'<text x="{across(x):.1f}" y="{bottom + 16}" text-anchor="middle">{_label(x)}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{chart.below}</text>')
    ends = []
    for (name, line), colour in zip(chart.lines.items(), COLOURS, strict=False):
        places = [(across(x), up(y)) for x, y in line.items()]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        ends.append((places[-1][1] + 4, name, colour))
    above = 0.0
    for y, name, colour in sorted(ends):  # not one over the other
        above = max(y, above + 13)
        parts.append(f'<text x="{right + 7}" y="{above:.1f}" fill="{colour}">{name}</text>')
    return parts


def _label(value: float) -> str:
    return f"{value:,.10g}" if value < 1000 else f"{value / 1000:,g}k"


# --- all of it ----------------------------------------------------------------------------------------------------


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--only", nargs="*", default=["model", "sizes", "parameters"])
    options.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    options.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()))
    options.add_argument("--gigabytes", type=float, nargs="*", default=[0.25, 0.5, 1, 2, 4, 8])
    options.add_argument("--large", type=float, nargs="*", default=[30])
    options.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000, 100_000])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--svg", type=Path)
    chosen = options.parse_args()
    names = ("lora_state_format", "torch", "transformers")
    print(measure.machine(*names))
    good = True
    charts = []
    with tempfile.TemporaryDirectory(dir=chosen.folder) as near, tempfile.TemporaryDirectory(dir=chosen.disk) as far:
        if "model" in chosen.only:
            model_part(Path(near), chosen.rounds)
        if "sizes" in chosen.only:
            places = [(size, Path(near)) for size in chosen.gigabytes] + [(size, Path(far)) for size in chosen.large]
            converted, kept = sizes_part(places, chosen.rounds)
            good &= kept
            seconds = {size: converted[size].wall for size in chosen.gigabytes}
            peaks = {size: run.peak for size, run in converted.items()}
            charts += [Chart("lora-state convert: seconds", "GB of optimizer.pt", {"": seconds})]
            charts += [Chart("lora-state convert: MiB at its peak", "GB of optimizer.pt", {"": peaks})]
        if "parameters" in chosen.only:
            found, kept = parameters_part(chosen.counts, Path(near), chosen.rounds)
            good &= kept
            lines = {
                worker.partition("_")[0]: {count: run.wall for count, run in runs.items()}
                for worker, runs in found.items()
            }
            charts += [Chart("small parameters: seconds", "parameters", lines)]
    if chosen.svg:
        chosen.svg.write_text(figure(charts), "utf-8")
    sys.exit(not good)


if __name__ == "__main__" and not measure.work(globals()):
    main()
