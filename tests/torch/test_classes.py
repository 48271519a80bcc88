"""State of one optimizer class in another: exact, laid out anew, fresh on request, or refused; and then a step."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, cast

import pytest
import torch

from lora_state_format.binding.policies import MismatchClass
from lora_state_format.errors import BindError
from lora_state_format.torch import LoadReport, load_optimizer, save_optimizer

DOCS = Path(__file__).parents[2] / "docs" / "optimizers.md"
ADAM, ADAMW = "torch.optim.adam.Adam", "torch.optim.adamw.AdamW"


def simple(path: str, **options: Any) -> Callable[[list[torch.nn.Parameter]], Any]:
    module, _, name = path.rpartition(".")

    def build(parameters: list[torch.nn.Parameter]) -> Any:
        optimizer = getattr(import_module(module), name)(parameters, **options)
        if name == "AdamWScheduleFree":
            optimizer.train()
        return optimizer

    return build


CLASSES: Final = {
    "torch SGD": simple("torch.optim.SGD", lr=1e-2, momentum=0.9),
    "torch Adam": simple("torch.optim.Adam", lr=1e-2),
    "torch AdamW": simple("torch.optim.AdamW", lr=1e-2),
    "torch NAdam": simple("torch.optim.NAdam", lr=1e-2),
    "torch RAdam": simple("torch.optim.RAdam", lr=1e-2),
    "torch RMSprop": simple("torch.optim.RMSprop", lr=1e-2),
    "torch Adagrad": simple("torch.optim.Adagrad", lr=1e-2),
    "torch Adafactor": simple("torch.optim.Adafactor", lr=1e-2),
    "torch Muon": simple("torch.optim.Muon", lr=1e-2),
    "transformers Adafactor": simple("transformers.optimization.Adafactor", lr=1e-2, relative_step=False),
    "bitsandbytes AdamW": simple("bitsandbytes.optim.AdamW", lr=1e-2),
    "bitsandbytes AdamW8bit": simple("bitsandbytes.optim.AdamW8bit", lr=1e-2),
    "bitsandbytes PagedAdamW8bit": simple("bitsandbytes.optim.PagedAdamW8bit", lr=1e-2),
    "bitsandbytes Lion8bit": simple("bitsandbytes.optim.Lion8bit", lr=1e-2),
    "torchao AdamW8bit": simple("torchao.optim.AdamW8bit", lr=1e-2),
    "schedulefree AdamWScheduleFree": simple("schedulefree.AdamWScheduleFree", lr=1e-2),
    "prodigyopt Prodigy": simple("prodigyopt.Prodigy", lr=1.0),
    "pytorch_optimizer AdaBelief": simple("pytorch_optimizer.AdaBelief", lr=1e-2),
    "pytorch_optimizer Lion": simple("pytorch_optimizer.Lion", lr=1e-2),
    "pytorch_optimizer SOAP": simple("pytorch_optimizer.SOAP", lr=1e-2),
}
"""Matrices of 4,096 elements, which bitsandbytes and torchao keep as codes, and which Muon takes."""

EXACT, TRANSLATED, CODED, FRESH = "=", "t", "q", "f"


def run(title: str, steps: int = 3) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.randn(64, 64)) for name in "ab"})
    optimizer = CLASSES[title](list(model.values()))
    advance(model, optimizer, range(steps))
    return model, optimizer


def advance(model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        for number, parameter in enumerate(model.values()):
            generator = torch.Generator().manual_seed(10 * step + number)
            parameter.grad = torch.randn(64, 64, generator=generator)
        optimizer.step()


@cache
def saved(title: str) -> Path:
    folder = Path(FOLDER.name, title.replace(" ", "_"))
    folder.mkdir(exist_ok=True)
    model, optimizer = run(title)
    save_optimizer(optimizer, model, folder / "o.safetensors")
    return folder / "o.safetensors"


FOLDER = TemporaryDirectory()


def crossed(source: str, target: str) -> tuple[str, LoadReport]:
    """What becomes of a state, by the mildest policy that takes it; a step is taken then."""
    for policy, letter in (("error", EXACT), ("translate", TRANSLATED), ("fresh", FRESH)):
        model, _ = run(source)
        optimizer = CLASSES[target](list(model.values()))
        before = [parameter.clone() for parameter in model.values()]
        try:
            report = load_optimizer(optimizer, model, saved(source), mismatch_class=cast("MismatchClass", policy))
        except BindError as error:
            refused = error.plan
        else:
            refused = None
        if refused is not None:
            assert {problem.kind for problem in refused.problems} == {"class"}
            continue
        if letter == FRESH:
            assert report.restored == 0
            assert not any(optimizer.state.get(p) for p in model.values()) or target == "torch Adagrad"
        else:
            assert report.restored == 2
        held = {slot for slots in optimizer.state.values() for slot in slots}
        advance(model, optimizer, range(3, 4))
        assert all(torch.isfinite(p).all() for p in model.values())
        moved = any(not torch.equal(p, q) for p, q in zip(model.values(), before, strict=True))
        assert moved or target.endswith("SOAP"), "only SOAP's first step does nothing but prepare"
        assert held <= {slot for slots in optimizer.state.values() for slot in slots}
        if letter == EXACT:
            reference, same = run(source)
            advance(reference, same, range(3, 4))
            assert all(torch.equal(model[name], reference[name]) for name in "ab")
        coded = any("quantised by bitsandbytes" in note for note in report.notes)
        return (CODED if coded and letter == TRANSLATED else letter), report
    raise AssertionError(f"{source} into {target} is refused even where everything may start without state")


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore")
def test_every_class_into_every_other() -> None:
    """The table of ``docs/optimizers.md``, which ``WRITE_TABLES=1`` writes anew."""
    lines = ["| from \\ into | " + " | ".join(str(n) for n in range(1, len(CLASSES) + 1)) + " |"]
    lines.append("|---" * (len(CLASSES) + 1) + "|")
    for number, source in enumerate(CLASSES, 1):
        lines.append(f"| {number} {source} | " + " | ".join(crossed(source, target)[0] for target in CLASSES) + " |")
    made = "".join(f"{line}\n" for line in lines)
    text = DOCS.read_text(encoding="utf-8")
    before, start, rest = text.partition("<!-- classes -->\n")
    old, end, after = rest.partition("<!-- end -->\n")
    if os.environ.get("WRITE_TABLES"):
        DOCS.write_text(before + start + made + end + after, encoding="utf-8")
    else:
        assert old == made


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore")
def test_moments_become_codes_and_come_back_within_the_bound(tmp_path: Path) -> None:
    model, optimizer = run("torch AdamW")
    kind, report = crossed("torch AdamW", "bitsandbytes AdamW8bit")
    assert kind == CODED
    assert report.notes == (
        (
            "from torch.optim.adamw.AdamW into bitsandbytes.optim.adamw.AdamW8bit: what both keep is laid out anew; "
            "moments "
            "are quantised as AdamW8bit is configured to keep them"
        ),
        "4 moments were quantised by bitsandbytes: each value is within 0.71% of the largest of its block",
    )
    coded = CLASSES["bitsandbytes AdamW8bit"](list(model.values()))
    load_optimizer(coded, model, saved("torch AdamW"), mismatch_class="translate")
    save_optimizer(coded, model, tmp_path / "coded.safetensors")
    back = CLASSES["torch AdamW"](list(model.values()))
    load_optimizer(back, model, tmp_path / "coded.safetensors", mismatch_class="translate")
    for parameter in model.values():
        assert coded.state[parameter]["state1"].dtype is torch.uint8
        assert back.state[parameter]["step"] == 3
        for slot in ("exp_avg", "exp_avg_sq"):
            was, now = (held.state[parameter][slot].reshape(-1, 256) for held in (optimizer, back))
            assert ((was - now).abs() <= 0.0071 * was.abs().amax(1, keepdim=True)).all()
            assert not torch.equal(was, now)


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", ["bitsandbytes AdamW", "torch AdamW"])
def test_32_bits_go_over_exactly(bits: str) -> None:
    other = "torch AdamW" if bits.startswith("bits") else "bitsandbytes AdamW"
    model, optimizer = run(bits)
    live = CLASSES[other](list(model.values()))
    load_optimizer(live, model, saved(bits), mismatch_class="translate")
    names = {"exp_avg": "state1", "exp_avg_sq": "state2"}
    theirs, ours = (optimizer, live) if bits.startswith("bits") else (live, optimizer)
    for parameter in model.values():
        assert int(theirs.state[parameter]["step"]) == int(ours.state[parameter]["step"]) == 3
        for slot, other_slot in names.items():
            assert torch.equal(ours.state[parameter][slot], theirs.state[parameter][other_slot])


# --- without other frameworks ---------------------------------------------------------------------------------------


def pair(kind: Any, path: Path, **options: Any) -> Any:
    """A model whose optimizer of this kind took three steps, saved."""
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.ones(4, 4)) for name in "ab"})
    optimizer = kind(model.values(), **options)
    for _ in range(3):
        for parameter in model.values():
            parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
    save_optimizer(optimizer, model, path)
    return model, optimizer


def test_another_class_is_refused_with_both_names(tmp_path: Path) -> None:
    model, _ = pair(torch.optim.AdamW, tmp_path / "o.safetensors")
    live = torch.optim.SGD(model.values(), lr=0.1, momentum=0.9)
    with pytest.raises(BindError) as caught:
        load_optimizer(live, model, tmp_path / "o.safetensors")
    assert str(caught.value) == (
        "optimizer state does not fit: 2 parameters saved, 2 in the optimizer\n"
        "  written by torch.optim.adamw.AdamW, and the optimizer is torch.optim.sgd.SGD:\n"
        "    SGD never reads exp_avg, exp_avg_sq, step\n"
        "    SGD keeps momentum_buffer, which the file does not have\n"
        "    no translation from AdamW into SGD is known\n"
        "hint: mismatch_class='fresh' lets the parameters whose state does not serve start without state"
    )
    report = load_optimizer(live, model, tmp_path / "o.safetensors", mismatch_class="fresh")
    assert (report.restored, len(report.fresh), live.param_groups[0]["lr"], dict(live.state)) == (0, 2, 0.1, {})


def test_decay_that_means_something_else_stays_what_it_is(tmp_path: Path) -> None:
    model, optimizer = pair(torch.optim.Adam, tmp_path / "o.safetensors", weight_decay=0.0, lr=0.25)
    live = torch.optim.AdamW(model.values(), weight_decay=0.5)
    with pytest.raises(BindError) as caught:
        load_optimizer(live, model, tmp_path / "o.safetensors")
    assert str(caught.value) == (
        "optimizer state does not fit: 2 parameters saved, 2 in the optimizer\n"
        f"  written by {ADAM}, and the optimizer is {ADAMW}:\n"
        "    both keep the same quantities\n"
        "    AdamW keeps its own weight_decay, which means something else there\n"
        "hint: mismatch_class='translate' goes on with what both classes keep"
    )
    load_optimizer(live, model, tmp_path / "o.safetensors", mismatch_class="translate")
    (group,) = live.param_groups
    assert (group["lr"], group["weight_decay"], group["decoupled_weight_decay"]) == (0.25, 0.5, True)
    for parameter in model.values():
        for slot in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(live.state[parameter][slot], optimizer.state[parameter][slot])


def test_moments_with_l2_in_them_are_not_translated(tmp_path: Path) -> None:
    model, _ = pair(torch.optim.Adam, tmp_path / "o.safetensors", weight_decay=0.1)
    with pytest.raises(BindError) as caught:
        load_optimizer(torch.optim.AdamW(model.values()), model, tmp_path / "o.safetensors", mismatch_class="translate")
    assert str(caught.value) == (
        "optimizer state does not fit: 2 parameters saved, 2 in the optimizer\n"
        f"  written by {ADAM}, and the optimizer is {ADAMW}:\n"
        "    weight_decay is L2 in Adam, whose moments contain it, and decoupled in AdamW\n"
        "hint: mismatch_class='fresh' lets the parameters whose state does not serve start without state"
    )


def test_a_file_without_a_class_is_known_by_its_options_and_slots(tmp_path: Path) -> None:
    model, optimizer = pair(torch.optim.Adam, tmp_path / "o.safetensors", weight_decay=0.1)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    load_optimizer(torch.optim.Adam(model.values()), model, tmp_path / "optimizer.pt")
    for live in (
        torch.optim.AdamW(model.values()),
        torch.optim.RAdam(model.values()),
        torch.optim.NAdam(model.values()),
    ):
        with pytest.raises(BindError) as caught:
            load_optimizer(live, model, tmp_path / "optimizer.pt")
        assert caught.value.plan is not None
        assert [problem.kind for problem in caught.value.plan.problems] == ["class"]


def test_one_optimizer_into_two_of_which_one_is_another_class(tmp_path: Path) -> None:
    """AdamW goes on for its part, Muon starts; and back."""
    model, optimizer = pair(torch.optim.AdamW, tmp_path / "o.safetensors")
    both = [torch.optim.Muon([model["a"]], lr=0.5), torch.optim.AdamW([model["b"]])]
    report = load_optimizer(both, model, tmp_path / "o.safetensors", mismatch_class="fresh")
    assert report.fresh == ("a",)
    assert torch.equal(both[1].state[model["b"]]["exp_avg"], optimizer.state[model["b"]]["exp_avg"])
    assert (dict(both[0].state), both[0].param_groups[0]["lr"]) == ({}, 0.5)
    for parameter in model.values():
        parameter.grad = torch.ones(4, 4)
    for found in both:
        found.step()
    save_optimizer(both, model, tmp_path / "both.safetensors")
    one = torch.optim.AdamW(model.values())
    report = load_optimizer(one, model, tmp_path / "both.safetensors", mismatch_class="fresh")
    assert report.fresh == ("a",)
    assert torch.equal(one.state[model["b"]]["exp_avg"], both[1].state[model["b"]]["exp_avg"])


class Mine(torch.optim.AdamW):
    """A class of one's own with AdamW's step."""


def test_a_class_of_ones_own_is_known_by_the_step_that_it_has(tmp_path: Path) -> None:
    model, optimizer = pair(Mine, tmp_path / "mine.safetensors")
    live = torch.optim.AdamW(model.values())
    assert load_optimizer(live, model, tmp_path / "mine.safetensors").restored == 2
    save_optimizer(live, model, tmp_path / "plain.safetensors")
    assert load_optimizer(Mine(model.values()), model, tmp_path / "plain.safetensors").restored == 2
    assert torch.equal(live.state[model["a"]]["exp_avg"], optimizer.state[model["a"]]["exp_avg"])
