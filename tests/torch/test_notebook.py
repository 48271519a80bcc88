"""What a notebook shows of states, plans and reports."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import lora_state_format as lsf
from lora_state_format.torch import load_optimizer, plan, save_optimizer


def test_states_plans_and_reports(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({f"<b>{number}": torch.nn.Linear(2, 2, bias=False) for number in range(60)})
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_optimizer(optimizer, model, tmp_path / "a.safetensors")
    with lsf.open_state(tmp_path / "a.safetensors") as state:
        shown = state._repr_html_()
        planned = plan(state, optimizer, model)
        assert planned._repr_html_() == f"<pre>{planned}</pre>"
    rows = re.findall("<tr>(.*?)</tr>", shown)
    assert rows[0] == "<th>name</th><th>shape</th><th>slots</th>"
    assert rows[1] == "<td>&lt;b&gt;0.weight</td><td>[2, 2]</td><td>exp_avg, exp_avg_sq, step</td>"
    assert len(rows) == 52
    assert rows[-1] == "<td>... and 10 more</td><td></td><td></td>"
    assert "60 parameters in groups of [60]" in shown
    report = load_optimizer(optimizer, model, tmp_path / "a.safetensors")
    assert report._repr_html_() == f"<pre>{report}</pre>"
    converted = lsf.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert "<pre>converted " in converted._repr_html_()
