"""The parser of ``huggingface_hub``, which the Hub's pages and ``hf`` use, on our files and at its limit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from tests.web.conftest import Site

ROOT: Final = Path(__file__).parent.parent.parent
VALID: Final = sorted((ROOT / "spec" / "vectors" / "valid").glob("*.safetensors"))
TEXT: Final = (ROOT / "spec" / "format.md").read_text(encoding="utf-8")
LIMIT: Final = 25_000_000


@pytest.fixture(scope="module")
def hub(site: Site) -> Any:
    """Return an API that takes the server for the Hub, and the folder of its only repository."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    folder = site.files / "someone" / "run" / "resolve" / "main"
    folder.mkdir(parents=True)
    return huggingface_hub.HfApi(endpoint=f"{site.address}/files", token=False), folder


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_the_hub_parses_our_files(path: Path, hub: Any) -> None:
    api, folder = hub
    shutil.copy(path, folder / "optimizer.safetensors")
    found = api.parse_safetensors_file_metadata("someone/run", "optimizer.safetensors")
    described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["tensors"]
    assert {key: (t.dtype, list(t.shape)) for key, t in found.tensors.items()} == {
        key: (t["dtype"], t["shape"]) for key, t in described.items()
    }
    assert list(found.metadata) == ["optimizer_state"]


def test_the_hub_stops_where_the_text_says(hub: Any) -> None:
    from huggingface_hub.errors import SafetensorsParsingError

    api, folder = hub
    for length in (LIMIT, LIMIT + 1):
        raw = length.to_bytes(8, "little") + b'{"__metadata__":{}}'
        (folder / "long.safetensors").write_bytes(raw.ljust(8 + length))
        if length == LIMIT:
            assert api.parse_safetensors_file_metadata("someone/run", "long.safetensors").tensors == {}
        else:
            with pytest.raises(SafetensorsParsingError, match="too big"):
                api.parse_safetensors_file_metadata("someone/run", "long.safetensors")
    assert f"a header of more than {LIMIT:,} bytes" in " ".join(TEXT.split())
