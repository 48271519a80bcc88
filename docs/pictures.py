"""Make the pictures of the documentation: terminals and the report, as a browser shows them.

python docs/pictures.py              # docs/images; needs the extras demo, report and test, and chromium
python docs/pictures.py --all DIR    # every screen at 80 and 200 columns, the report on phone and desktop
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.text import Text
from selenium import webdriver

IMAGES: Final = Path(__file__).parent / "images"
COMMAND: Final = [sys.executable, "-m", "lora_state_format"]

SCREENS: Final = {
    "inspect": ["inspect", "checkpoint-4"],
    "stats": ["inspect", "checkpoint-4", "--stats"],
    "parameters": ["inspect", "checkpoint-4", "--parameters", "--match", "layers.0."],
    "tree": ["inspect", "checkpoint-4", "--tree"],
    "convert": ["convert", "checkpoint-4", "optimizer.safetensors", "--force"],
    "check": ["check", "checkpoint-4", "--base", "base"],
    "verify": ["verify", "checkpoint-4/training_state/optimizer.safetensors", "--weights", "checkpoint-4"],
    "error": ["convert", "nosuch", "optimizer.safetensors"],
    "usage": ["inspect", "--nosuch"],
    "help": ["inspect", "--help"],
}
"""Screens to look at."""


def terminal(command: Sequence[str], folder: Path, columns: int) -> str:
    """Return what a command prints on a terminal of that width, control sequences included."""
    controller, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*COMMAND, *command], stdout=end, stderr=end, cwd=folder, env=environment) as process:
        os.close(end)
        parts = []
        while True:
            try:
                part = os.read(controller, 1 << 16)
            except OSError:  # Linux's end of a terminal
                break
            if not part:
                break
            parts.append(part)
        process.wait()
    os.close(controller)
    return b"".join(parts).decode().replace("\r\n", "\n").replace(f"{folder}/", "")


def drawing(command: Sequence[str], printed: str, columns: int) -> str:
    """Return a terminal with a command and what it prints as an SVG."""
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(f"$ lora-state {' '.join(command)}", style="bold green"), soft_wrap=True)
    console.print(Text.from_ansi(printed.rstrip()))
    return console.export_svg(title="")


@contextmanager
def browser() -> Iterator[Any]:
    """Run headless Chromium."""
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    try:
        yield driver
    finally:
        driver.quit()


def picture(
    driver: Any, page: Path, target: Path, width: int, *, dark: bool = False, height: int | None = None
) -> None:
    """Save a picture of a page, of its whole height unless one is given."""
    features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": width, "height": height or 10, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.get(page.as_uri())
    if height is None:
        metrics["height"] = driver.execute_script("return document.documentElement.scrollHeight")
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.save_screenshot(str(target))


def screen(driver: Any, command: Sequence[str], printed: str, target: Path, columns: int) -> None:
    """Save a picture of a terminal."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "screen.html")
        page.write_text(
            "<!doctype html><meta charset=utf-8><style>body{margin:0}svg{display:block;width:100%}</style>"
            + drawing(command, printed, columns)
        )
        picture(driver, page, target, columns * 10 + 40)


def report(folder: Path) -> Path:
    """Write the report of the demo's checkpoint."""
    page = folder / "report.html"
    arguments = ["report", "checkpoint-4", "-o", page.name, "--weights", "checkpoint-4", "--force"]
    subprocess.run([*COMMAND, *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return page


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", type=Path, metavar="DIR")
    everything = parser.parse_args().all
    with tempfile.TemporaryDirectory() as folder, browser() as driver:
        out = Path(folder, "demo")
        told = terminal(["demo", "--out", str(out)], Path(folder), 120).replace(f"{folder}/", "")
        page = report(out)
        if everything:
            everything.mkdir(parents=True, exist_ok=True)
            for name, command in SCREENS.items():
                for columns in (80, 200):
                    printed = terminal(command, out, columns)
                    screen(driver, command, printed, everything / f"{name}-{columns}.png", columns)
            for width in (390, 1200):
                for dark in (False, True):
                    name = f"report-{width}-{'dark' if dark else 'light'}.png"
                    picture(driver, page, everything / name, width, dark=dark)
            return
        IMAGES.mkdir(exist_ok=True)
        ending = "\n".join(told.split("\n")[-11:-2])
        screen(driver, ["demo"], "   ...\n" + ending, IMAGES / "demo.png", 120)
        screen(driver, SCREENS["inspect"], terminal(SCREENS["inspect"], out, 80), IMAGES / "inspect.png", 80)
        picture(driver, page, IMAGES / "report.png", 1000, height=1160)
        picture(driver, page, IMAGES / "report-dark.png", 1000, dark=True, height=1160)


if __name__ == "__main__":
    main()
