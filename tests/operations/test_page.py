"""The HTML report in a real browser, and its figures as files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest
import torch

import lora_state_format as lsf
from lora_state_format.cli import run
from lora_state_format.model.states import Group, Naming, Optimizer, OptimizerState, Parameter, Scalar
from lora_state_format.operations.edit import set_options
from lora_state_format.operations.page import write_report

if TYPE_CHECKING:
    from tests.conftest import Founding

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
SIZES = {"phone": 390, "desktop": 1200}


@pytest.fixture(scope="module")
def pages(founding: Founding, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with weights and a comparison, and the figures of one."""
    folder = tmp_path_factory.mktemp("pages")
    with lsf.read(founding.path) as state:
        lsf.write(set_options(state, {"lr": 0.5}).state, folder / "before.safetensors")
    write_report(
        founding.path,
        folder / "report.html",
        compare=folder / "before.safetensors",
        weights=founding.path,
        figures_folder=folder / "figures",
    )
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, of the system's packages chromium and chromium-driver."""
    if not CHROMIUM or not DRIVER:
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def shown(browser: Any, page: Path, width: int = 1200, scheme: str = "light") -> Any:
    """Open a page at a width and in a colour scheme."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get_log("performance")
    browser.get(page.as_uri())
    return browser.execute_script


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_renders_without_an_error(browser: Any, pages: Path, size: str, scheme: str) -> None:
    script = shown(browser, pages / "report.html", SIZES[size], scheme)
    assert browser.get_log("browser") == []
    assert script("return document.documentElement.scrollWidth <= innerWidth"), (
        "the page itself does not scroll sideways"
    )
    assert script("return document.querySelectorAll('figure svg').length") == 4
    heights = script("return [...document.querySelectorAll('figure svg')].map((e) => e.getBoundingClientRect().height)")
    assert all(height > 100 for height in heights)
    ground, ink = script("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ground, ink)]
    assert (light[0] > light[1]) is (scheme == "light")
    drawn = script("return [...document.querySelectorAll('figure svg text')].map((e) => getComputedStyle(e).fill)")
    assert set(drawn) == {ink}, "the text of figures has the colour of the page's"


def test_it_asks_the_network_for_nothing(browser: Any, pages: Path) -> None:
    shown(browser, pages / "report.html")
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [(pages / "report.html").as_uri()]


def test_the_table_sorts_and_filters_by_keyboard(browser: Any, pages: Path, founding: Founding) -> None:
    script = shown(browser, pages / "report.html")
    rows = "[...document.querySelectorAll('#parameters tbody tr')].filter((row) => !row.hidden)"
    names = f"return {rows}.map((row) => row.cells[0].textContent)"
    assert script(names) == list(founding.slots)
    script("document.querySelector('input[data-filter]').focus()")
    browser.switch_to.active_element.send_keys(r"layers\.1\..*lora_B")
    found = script(names)
    assert found == [name for name in founding.slots if ".layers.1." in name and "lora_B" in name]
    assert script("return document.querySelector('[data-count=parameters]').textContent") == f"{len(found)} rows"
    script("document.querySelector('#parameters th button').focus()")
    browser.switch_to.active_element.send_keys("\n")
    browser.switch_to.active_element.send_keys("\n")
    assert script("return document.querySelector('#parameters th').getAttribute('aria-sort')") == "ascending"
    assert script(names) == sorted(found)


def test_a_cell_says_its_value(pages: Path, founding: Founding) -> None:
    name = next(name for name in founding.slots if "layers.3." in name and "v_proj.lora_B" in name)
    rms = founding.slots[name]["exp_avg_sq"].double().square().mean().sqrt().item()
    text = (pages / "report.html").read_text(encoding="utf-8")
    assert f"<title>self_attn.v_proj.lora_B, layer 3: {rms:.3g}</title>" in text


def test_what_differs_is_said(pages: Path) -> None:
    text = (pages / "report.html").read_text(encoding="utf-8")
    assert "compared with before.safetensors" in text
    assert "lr" in text.partition("<h2>What differs</h2><pre>")[2].partition("</pre>")[0]


def test_figures_as_files(pages: Path) -> None:
    names = {"second-moments", "update-to-weight", "update-sizes", "change"}
    assert {path.name for path in (pages / "figures").iterdir()} == {f"{n}.{k}" for n in names for k in ("png", "svg")}
    for path in (pages / "figures").glob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for path in (pages / "figures").glob("*.svg"):
        assert ET.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_names_from_files_are_text(tmp_path: Path, browser: Any) -> None:
    name = "<script>document.title = 'run'</script>.\x1b[2J"
    slots = {"step": Scalar("F32", b"\0\0\x80\x3f")}
    group = Group(0, (("lr", "<b>"),), 1)
    state = OptimizerState((Optimizer("<i>x"),), (group,), (Parameter(name, (2,), slots),), Naming("model"))
    lsf.write(state, tmp_path / "a.safetensors")
    write_report(tmp_path / "a.safetensors", tmp_path / "a.html")
    script = shown(browser, tmp_path / "a.html")
    assert browser.title == "a.safetensors"
    assert script("return document.querySelector('#parameters td').textContent") == name.replace("\x1b", "\\x1b")
    assert script("return document.querySelectorAll('script, b, i').length") == 1


def test_the_command(founding: Founding, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "report.html"
    assert run(["report", str(founding.path / "optimizer.pt"), "-o", str(target)]) == 0
    assert capsys.readouterr().out == f"wrote {target}\n"
    assert run(["report", str(founding.path), "-o", str(target)]) == 2
    assert capsys.readouterr().err == f"error: {target} exists; pass --force to replace it\n"
    assert run(["report", str(founding.path), "-o", str(tmp_path), "--force"]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} is a folder, and a file is to be written; choose another name\n"
    )


def test_the_same_state_gives_the_same_page(founding: Founding, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_report(founding.path, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_state_without_moments(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    from lora_state_format.torch import save_optimizer

    save_optimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, tmp_path / "a.safetensors")
    write_report(tmp_path / "a.safetensors", tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<figure" not in text
    assert "lr is 0 in group 0" in text
