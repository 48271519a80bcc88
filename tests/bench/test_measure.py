"""The yardstick itself: what is counted, in which order, and that a missed limit is seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import measure
import pytest
from measure import Run

SCRIPT = Path(__file__).with_name("measure.py")


def test_a_process_is_measured_whole() -> None:
    burn = "import time; data = bytearray(64 << 20)\nwhile time.process_time() < 0.3: pass"
    run = measure.measured([sys.executable, "-c", f"{burn}\nprint('done')"])
    assert run.wall >= run.cpu * 0.5
    assert run.cpu >= 0.2
    assert run.peak > 64
    assert run.printed == ("done",)
    with pytest.raises(SystemExit, match="failed"):
        measure.measured([sys.executable, "-c", "raise SystemExit(3)"])


def test_a_worker_times_a_part_of_itself(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(SCRIPT.parent)!r}); import measure\n"
        "def nap(folder, size):\n    time.sleep(0.4)\n    print('ready')\n    return lambda: time.sleep(size / 1000)\n"
        "measure.work(globals())\n",
        encoding="utf-8",
    )
    run = measure.measured(measure.worker(str(script), "nap", tmp_path, 100))
    assert 0.1 <= run.wall < 0.4
    assert run.cpu < 0.1
    assert run.printed == ("ready",)


def test_cases_take_turns_in_rotated_order() -> None:
    order = []

    def case(name: str) -> Run:
        order.append(name)
        return Run(1.0, 1.0, 1.0)

    found = measure.in_turn([lambda: case("a"), lambda: case("b"), lambda: case("c")], 3)
    assert "".join(order) == "abcbcacab"
    assert [len(own) for own in found] == [3, 3, 3]


def test_ratios_are_of_one_round_and_limits_are_held() -> None:
    first = [Run(1.0, 1.0, 10), Run(10.0, 2.0, 10), Run(2.0, 1.0, 10)]
    own = [Run(1.2, 1.0, 50), Run(12.0, 4.0, 97), Run(2.4, 3.0, 20)]
    row = measure.row("ours", own, first, {"ratio": 1.1, "peak": 96, "cpu": 3.0})
    assert row["ratio"] == pytest.approx((1.2, 1.2, 1.2))
    assert row["cpu_ratio"] == (2.0, 1.0, 3.0)
    assert (row["seconds"][0], row["least"], row["peak"]) == (2.4, 1.2, 97)
    assert row["missed"] == {"ratio": pytest.approx(0.1), "peak": 1}
    limits = "ratio 1.1: missed by 0.1, peak 96: missed by 1, cpu 3: met"
    assert measure.lines("convert", [row]) == [
        "| convert | least s | median s | cpu s | ratio | quarters | cpu ratio | peak MiB | limit |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| ours | 1.20 | 2.40 | 3.00 | 1.20 | 1.20-1.20 | 2.00 | 97 | {limits} |",
    ]


def test_memory_is_warmed_and_given_back(tmp_path: Path) -> None:
    measure.warm(tmp_path, 20 << 20)
    assert not [*tmp_path.iterdir()]


def test_the_figure_shows_every_machine(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [Run(1.0, 1.0, 10)] * 3
    for name, speed in (("one", 1.5), ("two", 0.8)):
        rows = [
            measure.row("cp", runs, runs, {}),
            measure.row("`convert`", [Run(speed, 1.0, 10)] * 3, runs, {"ratio": 1}),
        ]
        measure.save(tmp_path / f"{name}.json", f"machine {name}", {"convert, 2 GB": rows})
    files = [str(tmp_path / name) for name in ("one.json", "two.json")]
    done = subprocess.run(
        [sys.executable, SCRIPT, *files, "--out", tmp_path / "figure.svg"], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("| convert, 2 GB |") == 2
    assert "machine one" in done.stdout
    assert (tmp_path / "figure.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert json.loads((tmp_path / "one.json").read_text(encoding="utf-8"))["machine"] == "machine one"
