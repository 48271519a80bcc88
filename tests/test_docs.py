"""The worked examples under docs/: what they show is what happens."""

from __future__ import annotations

import contextlib
import copy
import io
import re
import runpy
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lora_state_format.cli import run

if TYPE_CHECKING:
    from tests.conftest import Founding

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def carry_out(document: str, namespace: dict[str, Any]) -> None:
    """Run the blocks of a document in order; where a text follows, it is what they print, ``...`` aside."""
    printed = ""
    for kind, text in BLOCK.findall((DOCS / document).read_text(encoding="utf-8")):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            if kind == "python":
                exec(compile(text, document, "exec"), namespace)
            elif kind == "console":
                command, _, text = text.removeprefix("$ lora-state ").partition("\n")
                assert run(shlex.split(command)) == 0
                printed = ""
        printed += out.getvalue()
        if kind != "python":
            pattern = ".*".join(map(re.escape, text.split("...")))
            assert re.fullmatch(pattern, printed), f"{text}--- but it prints ---\n{printed}"
            printed = ""


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_preconditioned_norm_needs_no_optimizer(
    founding: Founding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live: Any = copy.deepcopy(founding.model)
    tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": tokens, "labels": tokens}
    shutil.copytree(founding.path, tmp_path / "checkpoint-3")
    monkeypatch.chdir(tmp_path)
    namespace = {"base": copy.deepcopy(live).unload(), "batch": batch}
    carry_out("preconditioner.md", namespace)

    live.train(False)
    live.zero_grad()
    live(**batch).loss.backward()
    square = 0.0
    for name, parameter in live.named_parameters():
        if parameter.grad is not None:
            slots = founding.slots[name]
            root = (slots["exp_avg_sq"].double() / (1 - 0.999 ** slots["step"].item())).sqrt()
            square += (parameter.grad.double().square() / (root + 1e-8)).sum().item()
    assert square > 0
    assert namespace["norm"] == pytest.approx(square**0.5, rel=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_another_rank_and_a_loop_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_state_format.integrations.transformers import with_named_state
    from lora_state_format.torch import load_optimizer, save_optimizer

    loop = runpy.run_path(str(Path(__file__).parent / "integrations" / "runs" / "trainer_run.py"))
    trainer = with_named_state(loop["make"](tmp_path, max_steps=2), drop_legacy=True)
    trainer.train()
    monkeypatch.chdir(tmp_path)

    def build() -> Any:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def train(run: Any, steps: range) -> None:
        for step in steps:
            run[0](torch.tensor([1.0, step, 2.0])).sum().backward()
            run[1].step()
            run[1].zero_grad()

    def save(run: Any, folder: Path) -> None:
        torch.save(run[0].state_dict(), folder / "model.pt")
        save_optimizer(run[1], run[0], folder / "optimizer.safetensors")

    def resume(folder: Path) -> Any:
        model, optimizer = build()
        model.load_state_dict(torch.load(folder / "model.pt"))
        load_optimizer(optimizer, model, folder / "optimizer.safetensors")
        return model, optimizer

    namespace = {
        "Trainer": loop["Trainer"], "wider": loop["build"](rank=8), "args": trainer.args, "dataset": loop["rows"](),
        "build": build, "train": train, "save": save, "resume": resume,
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):  # the trainer's own report
        carry_out("training.md", namespace)
    assert namespace["report"].restored == 8


def test_the_table_of_cluster_formats_names_every_case() -> None:
    """Each golden folder and each run of the tests stands in the table, and nothing else does."""
    table = (
        (DOCS / "cluster.md")
        .read_text()
        .partition("## What is read")[2]
        .partition("From source only")[0]
    )
    listed = {case for row in table.splitlines() if row.startswith("| ") for case in row.split("|")[4].split("`")[1::2]}
    golden = {
        path.name.removesuffix(".tar.xz")
        for kind in ("megatron", "deepspeed")
        for path in (Path(__file__).parent / "golden" / kind / "files").iterdir()
    }
    assert listed == golden | {"items", "zstd", "async", "hugging", "consolidated", "ranks", "replicas"}
