"""The worked examples under docs/: what they show is what happens."""

from __future__ import annotations

import contextlib
import copy
import io
import re
import runpy
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
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
                assert run(shlex.split(command)) == 0, command
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

    model, optimizer = build()
    train((model, optimizer), range(2))
    save_optimizer(optimizer, model, "run.safetensors")
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    then = scheduler.state_dict()
    model, optimizer = build()
    namespace = {
        "optimizer": optimizer, "model": model, "path": "run.safetensors", "saved_scheduler_state": then,
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
        "Trainer": loop["Trainer"], "wider": loop["build"](rank=8), "args": trainer.args, "dataset": loop["rows"](),
        "build": build, "train": train, "save": save, "resume": resume,
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):  # the trainer's own report
        carry_out("training.md", namespace)
    assert namespace["report"].restored == 8


def test_the_table_of_parallelisms_is_that_of_the_tests(load_module: Callable[[Path], ModuleType]) -> None:
    """The page has the table that is made of the cases, which are those that the tests run."""
    tests = Path(__file__).parent / "converters"
    made = load_module(tests / "parallelism.py")
    assert made.table() in (DOCS / "cluster.md").read_text(encoding="utf-8")


# --- pages that a newcomer reads ----------------------------------------------------------------------------------


IGNORED = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def checkpoint(founding: Founding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A folder with ``checkpoint-3`` and its base model's config, and the names that pages use."""
    from peft import PeftModel

    shutil.copytree(founding.path, tmp_path / "checkpoint-3")
    base = copy.deepcopy(founding.model).unload()
    base.config.architectures = ["Qwen2ForCausalLM"]
    base.config.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)

    def base_model() -> Any:
        return copy.deepcopy(base)

    model = PeftModel.from_pretrained(base_model(), "checkpoint-3", is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return {"base_model": base_model, "model": model, "optimizer": optimizer, "torch": torch}


@IGNORED
def test_five_minutes(checkpoint: dict[str, Any]) -> None:
    carry_out("five-minutes.md", checkpoint)
    assert len(checkpoint["optimizer"].state) == 392


@IGNORED
def test_you_see_this_error(checkpoint: dict[str, Any], founding: Founding) -> None:
    """What the page says to do is done; texts that are messages stand alone."""
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    for kind, text in BLOCK.findall(page):
        if kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, "errors.md", "exec"), checkpoint)
            assert out.getvalue() == "" or f"```text\n{out.getvalue()}```" in page
        elif kind == "console":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                command, _, expected = text.removeprefix("$ lora-state ").partition("\n")
                assert run(shlex.split(command)) == 0
            assert out.getvalue() == expected
    assert checkpoint["lines"] == list(founding.slots)


def raised(kind: type[BaseException], call: Any) -> str:
    """The message of the exception that a call raises, as Python prints it."""
    with pytest.raises(kind) as caught:
        call()
    return f"{type(caught.value).__name__}: {caught.value}"


def test_the_messages_are_what_torch_says(tmp_path: Path) -> None:
    """Each message on the page that torch can raise on one machine, letter for letter."""
    page = (DOCS / "errors.md").read_text(encoding="utf-8")

    def parameter(*shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.zeros(shape))

    def state(kind: Any, *shape: int, **options: Any) -> Any:
        own = parameter(*shape)
        optimizer = kind([own], **options)
        total: Any = own.sum()
        total.backward()
        optimizer.step()
        return optimizer.state_dict()

    def resumed(kind: Any, saved: Any, *shapes: tuple[int, ...]) -> None:
        own = [parameter(*shape) for shape in shapes]
        optimizer = kind(own)
        optimizer.load_state_dict(saved)
        total: Any = torch.stack([p.sum() for p in own]).sum()
        total.backward()
        optimizer.step()

    adamw, sgd = torch.optim.AdamW, torch.optim.SGD
    saved = state(adamw, 4, 8)
    two_groups = {**saved, "param_groups": [*saved["param_groups"], {**saved["param_groups"][0], "params": []}]}
    assert f"```text\n{raised(ValueError, lambda: resumed(adamw, two_groups, (4, 8)))}\n```" in page
    assert f"```text\n{raised(ValueError, lambda: resumed(adamw, saved, (4, 8), (4, 8)))}\n```" in page
    assert f"```text\n{raised(RuntimeError, lambda: resumed(adamw, saved, (8, 8)))}\n```" in page
    for other, kind in ((state(torch.optim.RMSprop, 4, 8), adamw), (saved, sgd), (state(sgd, 4, 8), adamw)):
        assert f"`{raised(KeyError, lambda kind=kind, other=other: resumed(kind, other, (4, 8)))}`" in page
    layer = torch.nn.Linear(2, 2)
    assert raised(RuntimeError, lambda: layer.load_state_dict(torch.nn.Linear(3, 2).state_dict())) in page
    assert raised(RuntimeError, lambda: layer.load_state_dict({})).rstrip() in page
    torch.save({"run": Path("x")}, tmp_path / "x.pt")
    said = raised(Exception, lambda: torch.load(tmp_path / "x.pt", weights_only=True))
    assert said.startswith("UnpicklingError: Weights only load failed. ")
    assert "_pickle.UnpicklingError: Weights only load failed." in page


def test_every_format_is_in_the_table() -> None:
    from lora_state_format import registry

    text = (DOCS / "formats.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(registry.BUILT_IN)
    for name in registry.BUILT_IN:
        (row,) = re.findall(rf"^\| `{name}` \|.*$", text, re.MULTILINE)
        assert row.split("|")[4].strip().startswith("yes") is hasattr(registry.get(name), "write"), name


def test_every_command_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Commands in the pages' shell blocks exist, with the options that they are given."""
    import click

    from lora_state_format import cli

    found = 0
    for page in DOCS.glob("*.md"):
        for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in text.splitlines() if kind == "sh" else ():
                name, *arguments = shlex.split(line, comments=True)
                if name == "lora-state":
                    command = cli.commands.commands[arguments[0]]
                    known = {option for parameter in command.params for option in parameter.opts}
                    assert {a for a in arguments[1:] if a.startswith("-")} <= known, line
                    command.make_context(arguments[0], arguments[1:], parent=click.Context(cli.commands))
                    found += 1
    assert found > 10


def test_every_claim_of_the_comparison_is_shown() -> None:
    """The last column of each row: a test that is there, another page of the docs, or an address (``make links``)."""
    root = DOCS.parent
    table = [row.split("|")[1:-1] for row in (DOCS / "comparison.md").read_text().splitlines() if row.startswith("| ")]
    _, *rows = table
    assert len(rows) >= 9
    for row in rows:
        shown = row[-1]
        tests = re.findall(r"`(tests/[\w/.]+)::(\w+)`", shown)
        for file, function in tests:
            assert f"def {function}(" in (root / file).read_text(encoding="utf-8"), shown
        links = re.findall(r"\]\(([^)]+)\)", shown)
        assert all("://" in link or (DOCS / link).is_file() for link in links), shown
        assert tests or links, row[0]


def slugs(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_within_the_repository_lead_somewhere() -> None:
    """Files and headings, of every page; addresses on the web are asked by ``make links``."""
    links = runpy.run_path(str(DOCS / "links.py"))
    pages = list(links["pages"]())
    assert {DOCS / "guides.md", DOCS.parent / "README.md", DOCS.parent / "spec" / "format.md"} <= set(pages)
    found, missing = 0, []
    for page in pages:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
            path = source_of((page.parent / target).resolve()) if target else page
            whole = not anchor or (path.is_file() and anchor in slugs(path.read_text(encoding="utf-8")))
            found += 1
            if not path.exists() or not whole:
                missing.append(f"{page.relative_to(DOCS.parent)}: {target}{'#' if anchor else ''}{anchor}")
    assert found > 100
    assert missing == []


def source_of(path: Path) -> Path:
    """The file that a page of the site shows: some lie elsewhere in the repository."""
    elsewhere = runpy.run_path(str(DOCS / "hooks.py"))["ELSEWHERE"]
    return DOCS.parent / elsewhere[path.name] if path.parent == DOCS and path.name in elsewhere else path
