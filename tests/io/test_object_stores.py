"""States in object stores, through the stores' own clients.

Those of S3 and of Google against servers of their protocols, that of the Hub against one that answers what it asks.
"""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lora_state_format import convert, open_state, verify
from lora_state_format.cli import run
from lora_state_format.errors import TargetExistsError
from lora_state_format.format.writing import write
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import Group, Naming, Optimizer, OptimizerState, Parameter, Slot
from lora_state_format.model.tensors import contiguous

pytestmark = pytest.mark.filterwarnings("ignore")

STORES = [pytest.param(name, marks=pytest.mark.stores) for name in ("s3", "gs")]

SIDE = 512
"""A moment has as many rows and columns: 1 MiB."""


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for key, value in {
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(key, value)
    pytest.importorskip("boto3").client("s3").create_bucket(Bucket="bucket")
    yield "s3://bucket"
    server.stop()
    _forget("s3")


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    yield "gs://bucket"
    server.stop()
    _forget("gcs")


def _forget(scheme: str) -> None:
    """fsspec keeps a file system, with the address of its server, for as long as the process lives."""
    import fsspec

    fsspec.get_filesystem_class(scheme).clear_instance_cache()


@pytest.fixture
def store(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(request.param)
    return url


def state(step: int) -> OptimizerState:
    """Eight parameters of 1 MiB with two moments each."""

    def moment(number: int) -> Slot:
        return Slot(contiguous("F32", (SIDE, SIDE), Memory(bytes([number, 0, 128, 63]) * SIDE**2)))

    parameters = [
        Parameter(f"layers.{n}.weight", (SIDE, SIDE), {"exp_avg": moment(n), "exp_avg_sq": moment(100 + n)}, "F32")
        for n in range(8)
    ]
    return OptimizerState(
        optimizers=(Optimizer("torch.optim.AdamW"),),
        groups=(Group(0, (("lr", 0.1),), len(parameters)),),
        parameters=tuple(parameters),
        naming=Naming("live"),
        global_step=step,
    )


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_written_read_replaced_and_verified(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"{store}/run/optimizer.safetensors"
    written = write(state(1), url)
    assert (written.path, written.files) == (url, (url,))
    with pytest.raises(TargetExistsError) as caught:
        write(state(2), url)
    assert str(caught.value) == f"{url} exists; pass force=True to replace it"
    shards = write(state(2), url, force=True, max_shard_size=5 << 20)
    assert len(shards.files) == 5
    assert _listed(store) == sorted(shards.files), "what the path meant before is gone"
    with open_state(url) as found:
        assert found.global_step == 2
        assert found["layers.5.weight"]["exp_avg_sq"].bytes() == bytes([105, 0, 128, 63]) * SIDE**2
    assert verify(url).ok
    copy = tmp_path / "optimizer.safetensors"
    assert str(convert(url, copy)).splitlines()[0] == f"converted {url} (named) to {copy} (named)"
    assert verify(copy).ok
    assert run(["inspect", url]) == 0
    assert "layers" in capsys.readouterr().out


def _listed(store: str) -> list[str]:
    import fsspec

    files, place = fsspec.core.url_to_fs(store)
    return sorted(f"{store.partition(':')[0]}://{name}" for name in files.find(place))


@pytest.mark.parametrize("store", [*STORES, pytest.param("hub", marks=pytest.mark.frameworks)], indirect=True)
def test_what_is_not_there(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"{store}/nothing.safetensors"
    with pytest.raises(FileNotFoundError) as caught:
        open_state(url)
    assert str(caught.value) == f"{url}: no such file"
    assert run(["inspect", url]) == 3
    assert capsys.readouterr().err == (
        f"error: {url}: no file of named state, and of a URL only that is read; copy other checkpoints to this "
        "machine first\n"
    )


# --- the Hub ----------------------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """A repository ``me/run`` as ``huggingface_hub`` asks for it: that it is there, its files, and ranges of them."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sent = 0
        super().__init__(("127.0.0.1", 0), HubHandler)


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            self._file(self.server.folder / self.path.rpartition("/")[2])
        elif self.path.startswith("/api/models/me/run/tree/main?"):
            files = sorted(self.server.folder.iterdir())
            self._json([{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files])
        elif self.path == "/api/models/me/run":
            self._json({"id": "me/run", "sha": "1" * 40, "siblings": [], "private": False})
        else:
            self._answer(404, b"", ("X-Error-Code", "EntryNotFound"))

    def _file(self, file: Path) -> None:
        data, asked = file.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert asked
        part = data[int(asked[1]) : int(asked[2]) + 1]
        self.server.sent += len(part)
        self._answer(206, part, ("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(data)}"))

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), ("Content-Type", "application/json"))

    def _answer(self, code: int, data: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(code)
        for key, value in (*headers, ("Content-Length", str(len(data)))):
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import fsspec
    import huggingface_hub

    folder = tmp_path / "hub"
    folder.mkdir()
    with Hub(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": f"http://127.0.0.1:{server.server_address[1]}"})
        yield server
        server.shutdown()
    huggingface_hub.HfFileSystem.clear_instance_cache()


@pytest.fixture
def hub(served: Hub) -> str:
    return "hf://me/run"


@pytest.mark.frameworks
@pytest.mark.parametrize("size", [None, 5 << 20])
def test_of_the_hub_only_what_is_asked_for_is_read(served: Hub, size: int | None) -> None:
    written = write(state(1), served.folder / "optimizer.safetensors", max_shard_size=size)
    url = "hf://me/run/optimizer.safetensors"
    with open_state(url) as found:
        opened = served.sent
        assert opened <= (1 << 18) * len(written.files)
        moment = found["layers.3.weight"]["exp_avg"]
        assert moment.bytes() == bytes([3, 0, 128, 63]) * SIDE**2
        assert served.sent - opened == moment.size
    served.sent = 0
    assert verify(url).ok
    assert served.sent <= 1.1 * written.size
