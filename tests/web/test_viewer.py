"""The viewer in a real, headless Chromium: files of the vectors, large ones, and hostile ones."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from tests.web.conftest import Site

pytestmark = pytest.mark.browser

ROOT: Final = Path(__file__).parent.parent.parent
VALID: Final = sorted((ROOT / "spec" / "vectors" / "valid").glob("*.json"))
INVALID: Final = sorted((ROOT / "spec" / "vectors" / "invalid").glob("*.json"))
SET: Final = ROOT / "spec" / "vectors" / "valid" / "set"
SECONDS: Final = 60
CSS: Final = "css selector"


class Page:
    """The viewer in a browser."""

    def __init__(self, driver: Any, site: Site) -> None:
        self.driver = driver
        self.site = site

    def open(self, path: str) -> None:
        """Open a path of the server, and wait until it is shown or refused."""
        self.driver.get(f"{self.site.address}/viewer/?url={path}")
        self.wait()

    def wait(self) -> None:
        self.until(lambda: self.text("#status").startswith("Opened in ") or self.visible("#problem"))

    def until(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, f"nothing came: {self.text('body')}"
            time.sleep(0.02)

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements(CSS, selector))

    def text(self, selector: str) -> str:
        """Return the text that is shown of the first element of a selector."""
        return str(self.driver.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(each => each.innerText)"
        return list(self.driver.execute_script(script, selector))

    def visible(self, selector: str) -> bool:
        return any(each.is_displayed() for each in self.all(selector))

    def click(self, label: str, within: str = "body") -> None:
        """Click the first button of a label."""
        (button, *_) = [each for each in self.all(f"{within} button") if each.text == label]
        button.click()

    def choose(self, selector: str, value: str) -> None:
        self.driver.execute_script(
            "const control = document.querySelector(arguments[0]); control.value = arguments[1];"
            "control.dispatchEvent(new Event('input'))",
            selector,
            value,
        )

    def panel(self, heading: str) -> str:
        (text,) = [text for text in self.texts("section.panel") if text.startswith(f"{heading}\n")]
        return text.removeprefix(f"{heading}\n").strip()

    def problems(self) -> list[str]:
        """Return what the console says, but for an index that is not there."""
        lines = [entry["message"] for entry in self.driver.get_log("browser")]
        return [line for line in lines if not (".index.json" in line and "404" in line)]


@pytest.fixture(scope="module")
def page(start_browser: Callable[..., Any], site: Site) -> Page:
    return Page(start_browser(), site)


@pytest.fixture(scope="module")
def make(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    return load_module(ROOT / "tests" / "spec" / "make_vectors.py")


# --- reading ----------------------------------------------------------------------------------------------------------


def test_every_valid_vector_is_shown(page: Page) -> None:
    for description in VALID:
        folder = description.with_suffix("")
        path = folder / "optimizer.safetensors" if folder.is_dir() else description.with_suffix(".safetensors")
        page.open(f"/{path.relative_to(ROOT)}")
        assert not page.visible("#problem"), page.text("#problem")
        found = json.loads(description.read_text(encoding="utf-8"))
        files = list(found.get("shards", {"": found}).values())
        count = sum(len(file["manifest"]["parameters"]) for file in files)
        assert f"Parameters\n{count} parameter" in page.panel("Summary")
        assert "its digest was checked and matches" in page.panel("Summary")
    assert page.problems() == []


def test_a_file_of_every_broken_rule_is_refused_with_its_rule(page: Page) -> None:
    rules: dict[str, Path] = {}
    for description in INVALID:
        found = json.loads(description.read_text(encoding="utf-8"))
        if not found.get("verify"):
            rules.setdefault(found["rule"], description)
    assert len(rules) == 25  # R21 is of tensors
    del rules["R7"]  # plain safetensors, which it shows
    for rule, description in rules.items():
        folder = description.with_suffix("")
        path = folder / "optimizer.safetensors" if folder.is_dir() else description.with_suffix(".safetensors")
        page.open(f"/{path.relative_to(ROOT)}")
        assert f"\n{rule}: " in page.text("#problem"), description
        assert not page.visible("#state")
        assert page.problems() == []


def test_what_a_problem_says(page: Page) -> None:
    page.open("/spec/vectors/invalid/digest-of-changed-class.safetensors")
    address = f"{page.site.address}/spec/vectors/invalid/digest-of-changed-class.safetensors"
    assert page.text("#problem").split("\n") == [
        f"Could not open {address}",
        "",
        "R9: the header was changed after it was written",
        "",
        "The file was whole when it was written, and was changed since. R9 is a rule of the format.",
    ]
    page.open("/files/none.safetensors")
    assert "/files/none.safetensors: there is no such file" in page.text("#problem")
    page.problems()


def test_files_that_are_chosen(page: Page, tmp_path: Path) -> None:
    page.driver.get(f"{page.site.address}/viewer/")
    chooser = page.all("#files")[0]
    chooser.send_keys(str(ROOT / "spec" / "vectors" / "valid" / "example.safetensors"))
    page.wait()
    assert "2 parameters; 1 never stepped" in page.panel("Summary")
    page.driver.get(f"{page.site.address}/viewer/")
    page.all("#files")[0].send_keys("\n".join(str(path) for path in SET.iterdir()))
    page.wait()
    assert "its digest was checked and matches, in all 3 files" in page.panel("Summary")
    page.driver.get(f"{page.site.address}/viewer/")
    shard = next(SET.glob("*00002*"))
    page.all("#files")[0].send_keys(str(shard))
    page.wait()
    expected = "R23: this is shard 2 of 3, and no state by itself: open the index of its set"
    assert expected in page.text("#problem")
    assert page.problems() == []


def test_a_file_that_is_dropped(page: Page) -> None:
    page.driver.get(f"{page.site.address}/viewer/")
    page.driver.execute_async_script(
        """const done = arguments[arguments.length - 1];
        fetch('/spec/vectors/valid/example.safetensors').then(r => r.blob()).then(blob => {
          const data = new DataTransfer();
          data.items.add(new File([blob], 'example.safetensors'));
          const drop = new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true});
          document.getElementById('drop').dispatchEvent(drop);
          done();
        });"""
    )
    page.wait()
    assert page.text("#status").endswith(" s: example.safetensors")
    assert page.problems() == []


def test_a_url_costs_its_header_only(page: Page, make: ModuleType) -> None:
    size = write_large(make, page.site.files / "large.safetensors", [("w", [1 << 28])])
    page.site.log.clear()
    page.open("/files/large.safetensors")
    ranges = [wanted for path, wanted in page.site.log if path == "/files/large.safetensors"]
    assert ranges == ["bytes=0-0", f"bytes=0-{65_536 - 1}"]
    assert size < 65_536
    assert "2 tensors, 2.15 GB" in page.panel("Summary")
    page.problems()


def test_plain_safetensors(page: Page, make: ModuleType) -> None:
    entries = ',"b":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}'
    head = f'{{"__metadata__":{{"format":"pt"}}{entries}}}'.encode()
    (page.site.files / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + make.F32)
    page.open("/files/model.safetensors")
    assert page.panel("Summary").split("\n") == [
        "Format",
        "plain safetensors: it is not named optimizer state, so there are no groups, no steps and no digests",
        "Size",
        f"{8 + len(head) + 8} bytes",
        "Tensors",
        "1 tensor, 8 bytes",
        "Metadata",
        'format: "pt"',
    ]
    page.all("summary")[0].click()
    page.click("Histogram")
    page.until(lambda: "2 elements, from -2.000 to 1.000, root mean square 1.581; 0 zero" in page.text("#state"))
    assert page.problems() == []


def test_a_server_without_ranges_is_told(page: Page) -> None:
    shutil.copy(VALID[0].with_suffix(".safetensors"), page.site.files / "whole.safetensors")
    page.driver.get(f"{page.site.address}/viewer/")
    # A folder's listing is answered whole.
    page.choose("#address", f"{page.site.address}/spec/")
    page.click("Open")
    page.wait()
    assert "the server does not answer Range requests, or hides the Content-Range header" in page.text("#problem")
    page.problems()


def test_from_a_file_it_says_how_to_start_it(page: Page) -> None:
    page.driver.get((ROOT / "viewer" / "index.html").as_uri())
    assert page.visible("#unstarted")
    assert not page.visible("#open")
    page.problems()


# --- looking ----------------------------------------------------------------------------------------------------------


def test_groups_and_names(page: Page) -> None:
    page.open("/spec/vectors/valid/values.safetensors")
    assert page.panel("Names and evidence").split("\n\n")[:3] == [
        "Names are from the keys of an adapter's weights next to the checkpoint.",
        "Positions became names by the rule hf_trainer.",
        "The weights rule out every other whole order; some exchanges of single modules stay undecided.",
    ]
    page.open("/spec/vectors/valid/several-groups.safetensors")
    heads = [text.strip() for text in page.texts("th")]
    assert heads[:4] == ["Group", "Parameters", "lr", "betas"]
    rows = [[cell.text for cell in row.find_elements(CSS, "td")] for row in page.all("tbody tr")]
    assert rows[0][:4] == ["0 decay", "2", "0.0002", "(0.9, 0.999)"]
    assert rows[1][:4] == ["1 rest", "2", "0", "[0.9, 0.95]"]


def test_search_order_and_tree(page: Page) -> None:
    page.open("/spec/vectors/valid/set/optimizer.safetensors")
    assert page.texts("details.branch summary") == ["layers 5 parameters, 160 bytes"]
    page.choose("select[aria-label=View]", "list")
    names = page.texts("button.row > .name")
    assert names == [*(f"layers.{n}.weight" for n in range(5)), "frozen.weight"]
    page.choose("select[aria-label=Order]", "name")
    assert page.texts("button.row > .name")[0] == "frozen.weight"
    page.choose("input[type=search]", "LAYERS.3")
    assert page.texts("button.row > .name") == ["layers.3.weight"]
    assert "1 parameter of 6" in page.panel("Parameters")


def test_the_keyboard_is_enough(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.open("/spec/vectors/valid/set/optimizer.safetensors")
    page.all("input[type=search]")[0].send_keys(Keys.TAB, Keys.TAB, Keys.TAB)

    def press(key: str) -> None:
        page.driver.switch_to.active_element.send_keys(key)

    press(Keys.ENTER)  # the branch
    press(Keys.ARROW_DOWN)
    press(Keys.ARROW_DOWN)
    press(Keys.ENTER)
    assert page.text("#detail h2") == "layers.1.weight"
    assert page.driver.switch_to.active_element.get_attribute("id") == "detail"
    press(Keys.ESCAPE)
    assert page.driver.switch_to.active_element.text.startswith("1.weight")


def test_slots_digests_and_histograms(page: Page) -> None:
    page.open("/spec/vectors/valid/example.safetensors")
    page.choose("select[aria-label=View]", "list")
    page.all("button.row")[0].click()
    detail = page.text("#detail")
    assert "Called by peft\nbase_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in detail
    assert "exp_avg: F32 2 × 4, 32 bytes — param: one value for each element of the parameter" in detail
    assert "step = 3 F32, a tensor without axes" in detail
    page.click("Compare digest", "#detail")
    page.until(lambda: "As it was written (xxh3-128 ebb8bae637206a16efa133e700781187)." in page.text("#detail"))
    page.click("Histogram", "#detail")
    page.until(lambda: page.all("#detail svg.histogram"))
    page.all("button.row")[1].click()
    assert "None: the optimizer never made a step with it." in page.text("#detail")
    page.click("Compare all 2 tensors (64 bytes)")
    page.until(lambda: "All 2 tensors are as they were written." in page.panel("Summary"))
    page.open("/spec/vectors/invalid/tensor-changed.safetensors")
    page.click("Compare all 1 tensor (8 bytes)")
    page.until(lambda: 'R21: the tensor "w/momentum" was changed' in page.panel("Summary"))
    page.open("/spec/vectors/valid/unknown-algorithm.safetensors")
    page.click("Compare all 1 tensor (8 bytes)")
    page.until(lambda: "0 tensors compared; digests by sha-256 are not known here." in page.panel("Summary"))
    assert page.problems() == []


# --- hostile and large ------------------------------------------------------------------------------------------------

HOSTILE: Final = [
    "<img src=x onerror=window.ran=1>.weight",
    '"><script>window.ran=1</script>',
    "javascript:window.ran=1",
    "a\u202egnp.exe\u202c.weight",
    "\x1b[31mred",
    "zero\u200bwidth",
    "line\nbreak",
    "\u05d0.\u05d1.weight",
    "__proto__.constructor",
    "." * 300,
    "long" * 20_000,
]


@pytest.fixture(scope="module")
def hostile(make: ModuleType, site: Site) -> str:
    evil = "\u202e<svg onload=window.ran=1>"
    members = make.manifest(
        {},
        groups=[{"optimizer": 0, "count": len(HOSTILE), "options": [[evil, evil]], "name": evil}],
        optimizers=[{"class": evil}],
        parameters=[{"name": n, "shape": [1], "state": 0, "adapter": evil, "keys": {evil: evil}} for n in HOSTILE],
        states=[{"m": {"$tensor": "m", "role": "param"}, evil: evil}],
        digests={"algorithm": evil, "values": ["00"] * len(HOSTILE)},
        naming={"source": evil, "rule": evil, "details": {evil: evil, "evidence": {"verdict": evil}}},
        origin={evil: evil},
        extra={evil: [evil]},
        extensions={evil: {"must_understand": False}},
    )
    entries = {f"{name}/m": {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1]} for n, name in enumerate(HOSTILE)}
    data = make.sealed(make.header(make.envelope(members), entries), bytes(len(HOSTILE)))
    (site.files / "hostile.safetensors").write_bytes(data)
    return "/files/hostile.safetensors"


def test_hostile_text_stays_text(page: Page, hostile: str) -> None:
    page.open(hostile)
    assert not page.visible("#problem"), page.text("#problem")
    page.choose("select[aria-label=View]", "list")
    for button in page.all("button.row"):
        button.click()
    for summary in page.all("details > summary"):
        summary.click()
    page.choose("select[aria-label=View]", "tree")
    tags = page.driver.execute_script("return [...new Set([...document.querySelectorAll('*')].map(e => e.localName))]")
    assert not {"img", "svg", "b", "i", "a", "iframe"} & set(tags)
    assert page.driver.execute_script("return document.scripts.length") == 1
    assert page.driver.execute_script("return window.ran === undefined")
    assert page.driver.title == "Optimizer state viewer"
    text = page.text("#state")
    assert not set(text) & {"\u202e", "\u202c", "\u200b", "\x1b"}
    names = page.texts("button.row > .name")
    assert "<img src=x onerror=window.ran=1>.weight" in names
    assert "aU+202Egnp.exeU+202C.weight" in names
    assert any(name.endswith("… (80,000 characters)") for name in names)
    assert page.problems() == []


def test_a_script_in_the_page_would_be_stopped(page: Page, hostile: str) -> None:
    """The policy is the second wall: it holds even where markup would get in."""
    page.open(hostile)
    page.driver.execute_script("document.getElementById('status').innerHTML = '<img src=x onerror=window.ran=2>'")
    page.until(lambda: any("Content Security Policy" in line for line in page.problems()))
    assert page.driver.execute_script("return window.ran === undefined")


def moments(parameters: list[tuple[str, list[int]]]) -> tuple[dict[str, Any], int]:
    """Return the header's entries of two moments for each parameter, and the bytes of all."""
    entries: dict[str, Any] = {}
    at = 0
    for name, shape in parameters:
        size = 4
        for n in shape:
            size *= n
        for slot in ("exp_avg", "exp_avg_sq"):
            entries[f"{name}/{slot}"] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
            at += size
    return entries, at


def large(make: ModuleType, parameters: list[tuple[str, list[int]]], **members: Any) -> tuple[dict[str, Any], Any, int]:
    """Return the manifest of an Adam state, its entries and its bytes."""
    entries, size = moments(parameters)
    slots = {slot: {"$tensor": slot, "role": "param"} for slot in ("exp_avg", "exp_avg_sq")}
    manifest = make.manifest(
        {},
        groups=[{"optimizer": 0, "count": len(parameters), "options": [["lr", 1e-5]]}],
        parameters=[{"name": name, "shape": shape, "state": 0} for name, shape in parameters],
        states=[{**slots, "step": {"$scalar": ["F32", "00007a44"]}}],
        digests={"algorithm": "xxh3-128", "values": [hashlib.md5(key.encode()).hexdigest() for key in entries]},
        **members,
    )
    return manifest, entries, size


def write_sparse(path: Path, raw: bytes, size: int) -> None:
    """Write a header, and data that are a hole in the file."""
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(len(raw) + size)


def write_large(make: ModuleType, path: Path, parameters: list[tuple[str, list[int]]]) -> int:
    """Write a file of a header and of holes; return the header's length."""
    manifest, entries, size = large(make, parameters)
    raw = make.sealed(make.header(make.envelope(manifest), entries), b"")
    write_sparse(path, raw, size)
    return len(raw)


def llama_70b() -> Iterator[tuple[str, list[int]]]:
    """Yield the parameters of Llama 3 70B by name, with their shapes."""
    hidden, inner, small, words = 8192, 28672, 1024, 128256
    shapes = {
        **{f"self_attn.{n}_proj": [hidden if n in "qo" else small, hidden] for n in "qkvo"},
        **{f"mlp.{n}_proj": [inner, hidden] for n in ("gate", "up")},
        "mlp.down_proj": [hidden, inner],
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
    }
    yield "model.embed_tokens.weight", [words, hidden]
    for layer in range(80):
        yield from ((f"model.layers.{layer}.{name}.weight", shape) for name, shape in shapes.items())
    yield from (("model.norm.weight", [hidden]), ("lm_head.weight", [words, hidden]))


def write_large_set(make: ModuleType, folder: Path, parameters: list[tuple[str, list[int]]], count: int) -> None:
    """Write a set of shards of runs of parameters, by R23 to R25."""
    runs = [range(n * len(parameters) // count, (n + 1) * len(parameters) // count) for n in range(count)]

    def raws(identity: str) -> list[tuple[bytes, Any, int]]:
        found = []
        for n, run in enumerate(runs, 1):
            place = {"id": identity, "index": n, "count": count, "positions": list(run)}
            manifest, entries, size = large(make, [parameters[i] for i in run], set=place)
            found.append((make.sealed(make.header(make.envelope(manifest), entries), b""), entries, size))
        return found

    zeroed = [make.blake(raw[:58] + make.ZERO.encode() + raw[90:]) for raw, _, _ in raws(make.ZERO)]
    identity = make.blake("".join(zeroed).encode())
    shards, total = [], 0
    places: dict[str, str] = {}
    for n, (raw, entries, size) in enumerate(raws(identity), 1):
        name = f"optimizer-{identity[:8]}-{n:05}-of-{count:05}.safetensors"
        write_sparse(folder / name, raw, size)
        shards.append({"digest": raw[58:90].decode(), "file": name})
        places |= dict.fromkeys(entries, name)
        total += size
    metadata = {"format": "named-optimizer-state", "set": identity, "total_size": total}
    index = {"metadata": metadata, "shards": shards, "weight_map": places}
    (folder / "optimizer.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def test_a_set_of_seventy_billion_parameters(page: Page, make: ModuleType) -> None:
    folder = page.site.files / "llama"
    folder.mkdir()
    parameters = list(llama_70b())
    write_large_set(make, folder, parameters, 12)
    page.site.log.clear()
    page.open("/files/llama/optimizer.safetensors")
    summary = page.panel("Summary")
    assert "its digest was checked and matches, in all 12 files" in summary
    assert "Parameters\n723 parameters" in summary
    assert "Tensors\n1,446 tensors, 564 GB" in summary
    assert len(page.site.log) <= 2 + 12 * 3
    assert page.texts("details.branch summary") == ["model 722 parameters, 556 GB"]
    page.choose("input[type=search]", "layers.79.mlp")
    assert len(page.all("button.row")) == 3
    stop_and_go_on(page)


def stop_and_go_on(page: Page) -> None:
    """A comparison that would read 564 GB is stopped, begun again, and ends with the page that it is of."""
    label = "Compare all 1,446 tensors (564 GB)"
    for _ in range(2):
        page.click(label)
        assert f"{label} … Stop" in page.panel("Summary")
        page.click("Stop")
        page.until(lambda: f"{label} Stopped." in page.panel("Summary"))
        assert page.driver.switch_to.active_element.text == label
    asked = len(page.site.log)
    time.sleep(0.5)
    assert len(page.site.log) == asked
    assert page.problems() == []


def test_thirty_thousand_parameters_are_shown_a_page_at_a_time(page: Page, make: ModuleType) -> None:
    names = [(f"model.layers.{n // 8}.experts.{n % 8}.weight", [16, 4]) for n in range(30_000)]
    assert write_large(make, page.site.files / "many.safetensors", names) > 10_000_000
    page.open("/files/many.safetensors")
    assert "30,000 parameters" in page.panel("Summary")
    page.choose("select[aria-label=View]", "list")
    assert len(page.all("button.row")) == 200
    page.click("Show 200 more")
    assert len(page.all("button.row")) == 400
    assert page.driver.switch_to.active_element.text.startswith("model.layers.25.experts.0.weight")


# --- on screens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_it_fits_the_screen(
    width: int, height: int, dark: bool, start_browser: Callable[..., Any], site: Site, hostile: str
) -> None:
    page = Page(start_browser(width, height, dark=dark), site)
    for path in ("/spec/vectors/valid/set/optimizer.safetensors", hostile):
        page.open(path)
        page.choose("select[aria-label=View]", "list")
        page.all("button.row")[0].click()
        assert page.driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert contrasts(page) == []
    ground = page.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(21, 23, 26)" if dark else "rgb(251, 251, 250)")
    page.driver.quit()


def contrasts(page: Page) -> list[str]:
    """Return the texts whose contrast with their ground is below 4.5, the WCAG's level AA."""
    found: list[str] = page.driver.execute_script(
        r"""const rgb = color => color.match(/[\d.]+/g).map(Number);
        const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        const light = color => {
          const [r, g, b] = rgb(color).map(linear);
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
          if (rgb(c)[3] !== 0) return c; } return 'rgb(255, 255, 255)'; };
        const low = [];
        for (const e of document.querySelectorAll('body *')) {
          const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
          if (!own || !e.checkVisibility() || e.disabled) continue;
          const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
          if ((a + 0.05) / (b + 0.05) < 4.5) low.push(e.innerText.slice(0, 40));
        }
        return low;"""
    )
    return found
