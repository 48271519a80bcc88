"""States on a server that answers ranges: only the bytes that are asked for, and every byte counted."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_state_format import convert, open_state, verify
from lora_state_format.cli import run
from lora_state_format.errors import FileError, OptionError, TargetExistsError
from lora_state_format.torch import load_optimizer, save_optimizer

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]


class Server(ThreadingHTTPServer):
    """Serves a folder; counts the bytes of files that it has sent, and the requests for them."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sent = 0
        self.requests = 0
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def _answer(self, body: bool) -> None:
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(found[1]), int(found[2] or len(data) - 1)) if found else (0, len(data) - 1)
        part = data[first : last + 1]
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if body:
            self.server.sent += len(part)
            self.server.requests += 1
            self.wfile.write(part)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def trained(steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(8)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    for _ in range(steps):
        model(torch.ones(1, 512)).square().sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("size", [None, 5 << 20])
def test_what_is_read_is_what_is_asked_for(server: Server, tmp_path: Path, size: int | None) -> None:
    model, optimizer = trained(1)
    third = dict(model.named_parameters())["3.weight"]
    written = save_optimizer(optimizer, model, tmp_path / "optimizer.safetensors", max_shard_size=size)
    url = f"{server.url}/optimizer.safetensors"
    with open_state(url) as state:
        opened = server.sent
        assert opened <= (1 << 18) * len(written.files)  # no tensor of 1 MiB among them
        moment = state["3.weight"]["exp_avg"]
        assert torch.equal(moment.torch(), optimizer.state[third]["exp_avg"])
        assert server.sent - opened == moment.size
    server.sent = server.requests = 0
    other, fresh = trained(0)
    report = load_optimizer(fresh, other, url)
    assert report.restored == 8
    for own, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[own]["exp_avg_sq"], fresh.state[theirs]["exp_avg_sq"])
    assert server.sent <= 1.1 * written.size
    assert server.requests <= 12 * len(written.files)  # of 16 tensors, each read in chunks of 1 MiB
    assert verify(url).ok


def test_the_command_line(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = trained(1)
    save_optimizer(optimizer, model, tmp_path / "optimizer.safetensors")
    assert run(["inspect", f"{server.url}/optimizer.safetensors"]) == 0
    assert "exp_avg_sq" in capsys.readouterr().out
    assert server.sent <= 1 << 18


def test_what_is_not_there(server: Server) -> None:
    with pytest.raises(FileNotFoundError):
        open_state(f"{server.url}/nothing.safetensors")
    with pytest.raises(OptionError) as raised:
        open_state("nosuch://host/optimizer.safetensors")
    assert str(raised.value) == "nosuch://host/optimizer.safetensors: Protocol not known: nosuch"


def test_a_file_that_changes_is_told(server: Server, tmp_path: Path) -> None:
    model, optimizer = trained(1)
    path = tmp_path / "optimizer.safetensors"
    save_optimizer(optimizer, model, path)
    with open_state(f"{server.url}/optimizer.safetensors") as state:
        path.write_bytes(path.read_bytes() + b"more")
        with pytest.raises(FileError) as raised:
            state.check_unchanged()
    assert raised.value.detail == "changed while it was read"


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """fsspec's own file system in memory; what is put and removed, in order."""
    from fsspec.implementations.memory import MemoryFileSystem

    done: list[str] = []
    put, remove = MemoryFileSystem.put_file, MemoryFileSystem.rm_file

    def put_file(self: Any, source: str, place: str, **options: Any) -> None:
        done.append("put " + place.rpartition("/")[2])
        put(self, source, place, **options)

    def rm_file(self: Any, place: str) -> None:
        done.append("rm " + place.rpartition("/")[2])
        remove(self, place)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    monkeypatch.setattr(MemoryFileSystem, "rm_file", rm_file)
    yield done
    MemoryFileSystem.store.clear()


URL = "memory://bucket/run/optimizer.safetensors"


def test_a_set_is_sent_shards_first_and_the_index_last(store: list[str], tmp_path: Path) -> None:
    model, optimizer = trained(1)
    save_optimizer(optimizer, model, URL)
    assert store == ["put optimizer.safetensors"]
    store.clear()
    written = save_optimizer(optimizer, model, URL, max_shard_size=5 << 20)
    assert len(written.files) == 5
    index = "optimizer.safetensors.index.json"
    assert [done.partition(" ")[0] for done in store] == ["put"] * 5 + ["rm"]
    assert store[4:] == [f"put {index}", "rm optimizer.safetensors"]
    other, fresh = trained(0)
    assert load_optimizer(fresh, other, URL).restored == 8
    assert verify(URL).ok
    store.clear()
    save_optimizer(optimizer, model, URL, global_step=2)
    assert store[:2] == ["put optimizer.safetensors", f"rm {index}"]  # the path means the old set until the second
    assert [done.partition(" ")[0] for done in store[2:]] == ["rm"] * 4
    with open_state(URL) as state:
        assert state.global_step == 2
    assert list(tmp_path.iterdir()) == []
    assert not Path("memory:").exists()


def test_what_is_there_is_replaced_only_when_asked_for(store: list[str], tmp_path: Path) -> None:
    model, optimizer = trained(1)
    save_optimizer(optimizer, model, tmp_path / "here.safetensors")
    save_optimizer(optimizer, model, URL)
    with pytest.raises(TargetExistsError) as raised:
        convert(tmp_path / "here.safetensors", URL)
    assert str(raised.value) == "memory://bucket/run/optimizer.safetensors exists; pass force=True to replace it"
    convert(tmp_path / "here.safetensors", URL, force=True)
    assert len(store) == 2
    assert verify(URL).ok


def test_what_is_not_written_to_a_url(store: list[str], tmp_path: Path) -> None:
    model, optimizer = trained(1)
    save_optimizer(optimizer, model, tmp_path / "here.safetensors")
    with pytest.raises(OptionError) as raised:
        save_optimizer(optimizer, model, URL, keep_last=2)
    assert str(raised.value) == (
        "memory://bucket/run/optimizer.safetensors: keep_last removes files of a folder, and this is a URL; leave "
        "keep_last out"
    )
    with pytest.raises(OptionError) as raised:
        convert(tmp_path / "here.safetensors", "memory://bucket/optimizer.pt", target_format="torch_optimizer")
    assert str(raised.value) == (
        "memory://bucket/optimizer.pt: only files of named state are sent to a URL; convert into a folder and copy that"
    )
    assert store == []
