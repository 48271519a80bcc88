"""Moments stored as bfloat16: the numbers that torch makes of them, and everywhere said to be lossy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_state_format import convert, open_state
from lora_state_format.cli import run
from lora_state_format.errors import BindError, OptionError
from lora_state_format.model.tensors import contiguous
from lora_state_format.optimizers.rounded import Rounded
from lora_state_format.torch import load_optimizer, save_optimizer
from lora_state_format.torch.tensors import from_torch

STORE = {"exp_avg": "BF16", "exp_avg_sq": "BF16"}
LOSSY = "lossy: exp_avg, exp_avg_sq were float32 and are stored as bfloat16, within 2**-9 of each value"


def trained(steps: int = 3) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(70, 60)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    for _ in range(steps):
        model(torch.randn(8, 70)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_rounds_as_torch_does() -> None:
    bits = torch.randint(-(2**31), 2**31, (3_000_000,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 3.4e38, 1.00390625])
    values = torch.cat([bits.view(torch.float32), special])
    narrow = contiguous("BF16", tuple(values.shape), Rounded(from_torch(values))).torch()
    expected = values.to(torch.bfloat16)
    same = narrow.view(torch.int16) == expected.view(torch.int16)
    assert (same | (narrow.isnan() & expected.isnan())).all()


def test_save_and_load(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = tmp_path / "state.safetensors"
    save_optimizer(optimizer, model, path, store=STORE)
    with open_state(path) as state:
        assert state["weight"]["exp_avg"].dtype == state["weight"]["exp_avg_sq"].dtype == "BF16"
        assert state.origin["stored"] == {"exp_avg": ["F32", "BF16"], "exp_avg_sq": ["F32", "BF16"]}
    other, fresh = trained(0)
    with pytest.raises(BindError):
        load_optimizer(fresh, other, path)
    report = load_optimizer(fresh, other, path, dtype="param")
    assert LOSSY in report.notes
    for own, theirs in zip(model.parameters(), other.parameters(), strict=True):
        moments = optimizer.state[own]["exp_avg"].to(torch.bfloat16).float()
        assert torch.equal(fresh.state[theirs]["exp_avg"], moments)


def test_convert_says_what_it_does_to_the_next_update(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = trained()
    source, target = tmp_path / "state.safetensors", tmp_path / "narrow.safetensors"
    save_optimizer(optimizer, model, source)
    report = convert(source, target, store=STORE)
    assert LOSSY in report.notes
    (note,) = (note for note in report.notes if note.startswith("Adam's next update differs by "))
    updates = []
    for dtype in (torch.float32, torch.bfloat16):
        moments = [
            [optimizer.state[p][slot].to(dtype).double().flatten() for slot in STORE] for p in model.parameters()
        ]
        updates.append(torch.cat([first / second.sqrt() for first, second in moments]))
    error = float((updates[1] - updates[0]).norm() / updates[0].norm())
    assert note == f"Adam's next update differs by {error:.2g} (relative, by norm) for what was rounded"
    assert 1e-3 < error < 3e-3
    assert run(["inspect", str(target)]) == 0
    assert LOSSY in " ".join(capsys.readouterr().out.split())
    again = tmp_path / "again.safetensors"
    assert run(["convert", str(source), str(again), "--store", "exp_avg=BF16", "--store", "exp_avg_sq=BF16"]) == 0
    assert again.read_bytes() == target.read_bytes()


@pytest.mark.parametrize(
    ("store", "message"),
    [
        (
            {"exp_avg_sq": "F16"},
            (
                "store={'exp_avg_sq': 'F16'}: its range is too small for second moments, which would become zero; "
                "choose 'BF16' or leave the slot out"
            ),
        ),
        (
            {"exp_avg": "U8"},
            (
                "store={'exp_avg': 'U8'}: only bfloat16 keeps moments well enough to go on with; choose 'BF16' or "
                "leave the slot out"
            ),
        ),
        ({"momentum": "BF16"}, "store: no parameter has a float32 tensor in a slot 'momentum'"),
    ],
)
def test_what_is_refused(tmp_path: Path, store: dict[str, str], message: str) -> None:
    model, optimizer = trained()
    with pytest.raises(OptionError) as raised:
        save_optimizer(optimizer, model, tmp_path / "state.safetensors", store=store)
    assert str(raised.value) == message
    assert list(tmp_path.iterdir()) == []
