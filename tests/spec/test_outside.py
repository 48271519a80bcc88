"""Readers of plain safetensors that stream to where tensors are used: they open the vectors, bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

pytestmark = pytest.mark.frameworks

VALID: Final = sorted((Path(__file__).parent.parent.parent / "spec" / "vectors" / "valid").glob("*.safetensors"))
REFUSED: Final = {
    ("fastsafetensors", "dtypes"): "'C64' is not a valid DType",
    ("fastsafetensors", "order-of-entries"): "InvalidOffset",  # no writer of this version makes such a file (W7)
    ("runai", "dtypes"): "Unsupported dtype 'F8_E4M3FNUZ'",
}
"""What a reader does not open, and what it says."""


def fastsafetensors(path: Path) -> Iterator[tuple[str, Any]]:
    reader = pytest.importorskip("fastsafetensors")
    with reader.fastsafe_open(filenames=[str(path)], nogds=True, device="cpu", debug_log=False) as file:
        yield from ((key, file.get_tensor(key).clone()) for key in file.keys())  # noqa: SIM118


def runai(path: Path) -> Iterator[tuple[str, Any]]:
    reader = pytest.importorskip("runai_model_streamer")
    with reader.SafetensorsStreamer() as streamer:
        streamer.stream_file(str(path))
        yield from ((key, tensor.clone()) for key, tensor in streamer.get_tensors())


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
@pytest.mark.parametrize("reader", [fastsafetensors, runai])
def test_streaming_readers_open_the_vectors(reader: Callable[[Path], Iterator[tuple[str, Any]]], path: Path) -> None:
    import torch

    if (refused := REFUSED.get((reader.__name__, path.stem))) is not None:
        with pytest.raises(Exception, match=refused):
            list(reader(path))
        return
    found = {
        key: {
            "shape": list(tensor.shape),
            "sha256": hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest(),
        }
        for key, tensor in reader(path)
    }
    described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["tensors"]
    assert found == {key: {"shape": t["shape"], "sha256": t["sha256"]} for key, t in described.items()}
