"""No file stays open once nobody can read from it: at once, not when the garbage collector comes."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest

from lora_state_format import registry
from lora_state_format.errors import StateFormatError
from lora_state_format.operations.conversion import belongs, convert, read

WRITERS: Final = Path(__file__).with_name("kill_writer.py")
WAYS: Final = (
    "accelerate",
    "dcp",
    "deepspeed_universal",
    "flax_msgpack",
    "lerobot",
    "paddlenlp",
    "torch_optimizer",
)
TOLD: Final = {"masters": True, "optimizer": "adamw", "betas": (0.9, 0.999), "map": "none"}

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's list of open files")


@pytest.fixture(autouse=True)
def without_the_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def open_below(folder: Path) -> list[Path]:
    """The files in a folder that this process has open."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists the others
            found.append(descriptor.readlink())
    return [path for path in found if folder in path.parents]


@pytest.mark.parametrize("way", WAYS)
def test_closed_with_the_last_reference(way: str, tmp_path: Path, load_module: Callable[[Path], ModuleType]) -> None:
    writers = load_module(WRITERS)
    writers.make_base(tmp_path / "base")
    writers.WRITERS[way](tmp_path / "target", 0, tmp_path / "base")
    checkpoint = registry.read(tmp_path / "target", way, TOLD)
    assert open_below(tmp_path), "nothing is read lazily: the test would show nothing"
    del checkpoint
    assert open_below(tmp_path) == []


@pytest.mark.parametrize(
    "refused",
    [
        lambda path, target: read(path, names=["a"]),
        lambda path, target: read(path, trainable=["lora_A"]),
        lambda path, target: convert(path, target, names=["a"]),
        lambda path, target: convert(path, target, store={"exp_avg": "F16"}),
        lambda path, target: belongs(path, path / "nothing.safetensors"),
    ],
    ids=["names", "trainable", "convert names", "convert store", "weights"],
)
def test_closed_after_a_refusal(refused: Callable[[Path, Path], Any], founding: Any, tmp_path: Path) -> None:
    """While the exception, and with it every frame that it passed, is still held."""
    with pytest.raises((StateFormatError, FileNotFoundError)) as error:
        refused(founding.path, tmp_path / "out.safetensors")
    assert open_below(founding.path) == []
    assert error.value.__traceback__ is not None
    assert list(tmp_path.iterdir()) == []


def test_closed_after_a_load_that_is_refused(founding: Any, tmp_path: Path) -> None:
    import torch

    from lora_state_format.torch import load_optimizer

    model = torch.nn.Linear(2, 2)
    with pytest.raises(StateFormatError) as error:
        load_optimizer(torch.optim.AdamW(model.parameters()), model, founding.path)
    assert open_below(founding.path) == []
    assert error.value.__traceback__ is not None
    assert list(tmp_path.iterdir()) == []
