"""A headless Chromium, and a server with Range requests for the page and for files."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest

ROOT: Final = Path(__file__).parent.parent.parent
CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serve the repository, and the folder ``files`` of a test under ``/files/``, with Range requests."""

    files: ClassVar[Path]
    log: ClassVar[list[tuple[str, str | None]]]

    def translate_path(self, path: str) -> str:
        if path.startswith("/files/"):
            name = super().translate_path(path.removeprefix("/files"))
            return str(self.files / os.path.relpath(name, self.directory))
        return super().translate_path(path)

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        type(self).log.append((self.path, wanted))
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            super().do_GET()
            return
        start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())  # type: ignore[union-attr]
        size = path.stat().st_size
        end = min(end + 1, size)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        with path.open("rb") as file:
            file.seek(start)
            self.wfile.write(file.read(end - start))

    def log_message(self, *_: Any) -> None:
        return


class Site:
    """The address of the server, the folder behind ``/files/``, and the requests so far with their ranges."""

    def __init__(self, address: str, handler: type[Handler]) -> None:
        self.address = address
        self.handler = handler

    @property
    def log(self) -> list[tuple[str, str | None]]:
        return self.handler.log

    @property
    def files(self) -> Path:
        return self.handler.files


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    class Own(Handler):
        files = tmp_path_factory.mktemp("files")
        log: ClassVar[list[tuple[str, str | None]]] = []

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Own, directory=str(ROOT)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Site(f"http://127.0.0.1:{server.server_port}", Own)
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def start_browser() -> Iterator[Callable[..., Any]]:
    """Return a function that starts a Chromium of a size and a colour scheme; they end with the module."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: make test-browser")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here: make test-browser")
    running: list[Any] = []

    def start(width: int = 1280, height: int = 900, *, dark: bool = False) -> Any:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        running.append(driver)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        return driver

    yield start
    for driver in running:
        driver.quit()
