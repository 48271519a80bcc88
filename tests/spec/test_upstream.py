"""What docs/upstream shows is what happens, and the extension of the ``hf`` command line."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parent.parent.parent
UPSTREAM: Final = ROOT / "docs" / "upstream"
EXTENSION: Final = UPSTREAM / "hf-lora-state" / "hf-lora-state"
EXAMPLE: Final = ROOT / "spec" / "vectors" / "valid" / "example.safetensors"


def block(page: str, language: str) -> str:
    """Return the only block of a language on a page, without its indentation."""
    (found,) = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", (UPSTREAM / page).read_text("utf-8"), re.M | re.S)
    return re.sub(rf"^{found[0]}", "", found[1], flags=re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", "torchtitan.md"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_what_a_page_shows_is_what_happens(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "spec" / "vectors" / "valid" / "set", "training_state")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(block(page, "python"), page, "exec"), {})
    assert out.getvalue() == block(page, "text")


def test_a_server_can_tell_what_a_file_is(tmp_path: Path) -> None:
    space: dict[str, Any] = {}
    exec(block("servers.md", "python"), space)
    vectors = sorted((ROOT / "spec" / "vectors" / "valid").rglob("*.safetensors"))
    assert len(vectors) >= 25
    assert all(space["is_optimizer_state"](path) for path in vectors)
    for header in (b'{"__metadata__":{"format":"pt"}}', b'{"optimizer_state":{}}', b"{}", b""):
        plain = tmp_path / "model.safetensors"
        plain.write_bytes(len(header).to_bytes(8, "little") + header)
        assert not space["is_optimizer_state"](plain)


# --- hf lora-state ----------------------------------------------------------------------------------------------------


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


INSTALL: Final = """
import sys
import httpx2, huggingface_hub
from huggingface_hub.cli.hf import main

SCRIPT = open(sys.argv[1], "rb").read()
PATH = "/someone/hf-lora-state/HEAD/hf-lora-state"

def github(request):
    if request.url.host == "raw.githubusercontent.com" and request.url.path == PATH:
        return httpx2.Response(200, content=SCRIPT)
    return httpx2.Response(200 if request.method == "HEAD" else 404)

huggingface_hub.set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(github)))
sys.argv = ["hf", "extensions", "install", "someone/hf-lora-state"]
main()
"""
"""``hf extensions install`` with answers of GitHub that are made here: it cannot be reached from a test."""


def test_hf_installs_and_runs_it(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("httpx2")
    if tuple(map(int, hub.__version__.split(".")[:2])) < (2, 4):
        pytest.skip("this hf was not tried")
    (tmp_path / "lora-state").write_text(f'#!/bin/sh\nexec {sys.executable} -m lora_state_format "$@"\n')
    (tmp_path / "lora-state").chmod(0o755)
    environment = {
        "HOME": str(tmp_path),
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)),
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    }
    installed = run([sys.executable, "-c", INSTALL, str(EXTENSION)], **environment)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    assert (tmp_path / ".local/share/hf/extensions/hf-lora-state/hf-lora-state").read_bytes() == EXTENSION.read_bytes()
    hf = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()", "lora-state"]
    for arguments, code in ((["inspect", str(EXAMPLE)], 0), (["verify", str(tmp_path / "none")], 3)):
        through = run([*hf, *arguments], **environment)
        direct = run([sys.executable, "-m", "lora_state_format", *arguments], **environment)
        assert (through.returncode, through.stdout, through.stderr) == (code, direct.stdout, direct.stderr)
        assert direct.stdout + direct.stderr


def test_without_the_package_it_says_so(tmp_path: Path) -> None:
    done = run(["/bin/sh", str(EXTENSION), "inspect", "a"], PATH=str(tmp_path))
    assert done.returncode == 127
    assert done.stderr == "hf lora-state: lora_state_format is not installed: pip install lora_state_format\n"
