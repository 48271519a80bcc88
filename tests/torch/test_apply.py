"""Loads: all of it or nothing, byte for byte, into the layout, the place and the objects that the live side has."""

from __future__ import annotations

import copy
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_state_format.errors import (
    BindError,
    ConversionError,
    DigestError,
    FileError,
    RefusedError,
    StateFormatError,
    TargetExistsError,
    UnsupportedVersionError,
)
from lora_state_format.format import envelope, reading
from lora_state_format.optimizers.classes import CLASSES
from lora_state_format.torch import apply, capture, load_optimizer, plan, save_optimizer
from lora_state_format.torch.apply import _step

if TYPE_CHECKING:
    from tests.conftest import Founding

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def linear(width: int = 4) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 3))


def stepped(model: Any, optimizer: torch.optim.Optimizer, count: int = 3) -> torch.optim.Optimizer:
    for n in range(count):
        optimizer.zero_grad()
        model((torch.arange(15.0).reshape(5, 3) - n) / 9).square().sum().backward()
        optimizer.step()
    return optimizer


def adamw(model: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


def contents(optimizer: torch.optim.Optimizer) -> str:
    """Everything in an optimizer, by value and by the memory it lies in."""

    def form(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.data_ptr(), value.dtype, value.stride(), value.tolist()
        if isinstance(value, dict):
            return {key: form(value[key]) for key in sorted(value)}
        return value

    return repr(
        (
            [[form(optimizer.state.get(p)) for p in group["params"]] for group in optimizer.param_groups],
            [{key: form(v) for key, v in group.items() if key != "params"} for group in optimizer.param_groups],
            len(optimizer.state),
        )
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A file of ``linear()`` under AdamW after three steps."""
    path = tmp_path / "training_state" / "optimizer.safetensors"
    model = linear()
    save_optimizer(stepped(model, adamw(model)), model, path, global_step=3)
    return path


# --- refused: nothing has changed -----------------------------------------------------------------------------------


def renamed(model: Any) -> Any:
    return nn.ModuleDict({"other": model})


def frozen(model: Any) -> Any:
    model[2].requires_grad_(False)
    return model


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def major(path: Path) -> None:
    content = path.read_bytes().replace(b'\\"version\\":\\"1.0\\"', b'\\"version\\":\\"2.0\\"')
    start = content.index(b'digest\\":\\"') + len(b'digest\\":\\"')
    length = 8 + int.from_bytes(content[:8], "little")
    sealed = envelope.header_digest(content[:length]).encode()
    path.write_bytes(content[:start] + sealed + content[start + 32 :])


BROKEN: dict[str, tuple[type[StateFormatError], Callable[[Path], Any]]] = {
    "a flipped bit of the last tensor": (DigestError, lambda path: flip(path, -1)),
    "a flipped digit of the header": (
        DigestError,
        lambda path: flip(path, path.read_bytes().index(b'\\"lr\\",0.01') + 10),
    ),
    "a truncated file": (FileError, lambda path: path.write_bytes(path.read_bytes()[:-5])),
    "a newer major version": (UnsupportedVersionError, major),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_changes_nothing(what: str, saved: Path) -> None:
    kind, damage = BROKEN[what]
    damage(saved)
    model = linear()
    optimizer = stepped(model, adamw(model), 1)
    before = contents(optimizer)
    with pytest.raises(kind):
        load_optimizer(optimizer, model, saved)
    assert contents(optimizer) == before


def test_a_changed_tensor_is_named(saved: Path) -> None:
    flip(saved, -1)
    model = linear()
    with pytest.raises(DigestError) as caught:
        load_optimizer(adamw(model), model, saved)
    assert str(caught.value) == (
        "'2.bias': slot 'exp_avg_sq' does not match its digest: the file was changed after it was written"
    )
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    "rebuild",
    [renamed, frozen, lambda _: linear(5), lambda model: nn.Sequential(*model, nn.Linear(3, 3))],
    ids=["renamed", "frozen", "another shape", "one more layer"],
)
def test_a_model_that_does_not_fit_changes_nothing(rebuild: Callable[[Any], Any], saved: Path) -> None:
    model = rebuild(linear())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = contents(optimizer)
    with pytest.raises(BindError) as caught:
        load_optimizer(optimizer, model, saved)
    assert contents(optimizer) == before
    assert caught.value.plan is not None
    assert str(caught.value.plan) == str(caught.value)


def test_a_plan_with_problems_is_not_applied(saved: Path) -> None:
    model = renamed(linear())
    optimizer = adamw(model)
    with reading.open_state(saved) as state:
        loading = plan(state, optimizer, model)
        assert loading.problems
        with pytest.raises(BindError):
            apply(loading, optimizer, model)
    assert not optimizer.state


def test_a_pickle_that_asks_for_code_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    class Command:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/ran",)

    model = linear()
    optimizer = adamw(model)
    torch.save({"state": {}, "param_groups": [{"params": [0], "lr": Command()}]}, tmp_path / "optimizer.pt")
    with pytest.raises(RefusedError) as caught:
        load_optimizer(optimizer, model, tmp_path / "optimizer.pt")
    assert "system" in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert not optimizer.state


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    model = linear()
    with pytest.raises(FileNotFoundError):
        load_optimizer(adamw(model), model, tmp_path / "none.safetensors")


def test_saving_replaces_an_older_file_unless_told_not_to(saved: Path) -> None:
    model = linear()
    optimizer = stepped(model, adamw(model))
    before = saved.read_bytes()
    with pytest.raises(TargetExistsError) as caught:
        save_optimizer(optimizer, model, saved, force=False)
    assert str(caught.value) == f"{saved} exists; pass force=True to replace it"
    assert saved.read_bytes() == before
    written = save_optimizer(optimizer, model, saved)
    assert (written.path, written.tensors) == (str(saved), 8)
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]


# --- what is restored -----------------------------------------------------------------------------------------------


def test_the_report(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = linear()
    stepped(model, adamw(model))
    optimizer = adamw(model)
    with caplog.at_level(logging.INFO, "lora_state_format"):
        report = load_optimizer(optimizer, model, saved)
    line = "restored 4/4 parameters, 2 slots each, step 3; weights match 4/4"
    assert str(report) == line
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("INFO", line)]
    assert (report.restored, report.total, report.fresh, report.slots, report.steps) == (4, 4, (), (2, 2), (3, 3))


def test_weights_of_another_step_are_pointed_out(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = linear()
    note = (
        "these weights are not those that the state was saved with: of another step, or changed since (the first is "
        "'0.weight')"
    )
    report = load_optimizer(adamw(model), model, saved)
    assert str(report) == f"restored 4/4 parameters, 2 slots each, step 3; weights match 0/4\n{note}"
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [note]
    stepped(model, adamw(model))
    with torch.no_grad():
        model[2].bias.add_(1)
    report = load_optimizer(adamw(model), model, saved)
    assert report.differing == ("2.bias",)
    (note,) = report.notes
    assert note == (
        "the weights of 1 parameters are not those that the state was saved with: of another step, or changed since "
        "(the first is '2.bias')"
    )
    assert load_optimizer(adamw(model.double()), model, saved, dtype="param").matching == 0


def test_weights_without_digests_are_not_compared(tmp_path: Path) -> None:
    model = linear()
    save_optimizer(stepped(model, adamw(model)), model, tmp_path / "o.safetensors", weights=False)
    report = load_optimizer(adamw(model), model, tmp_path / "o.safetensors")
    assert str(report) == "restored 4/4 parameters, 2 slots each, step 3"


def test_what_never_stepped_is_restored_to_that(tmp_path: Path) -> None:
    model = linear()
    model[2].bias.requires_grad_(False)
    save_optimizer(stepped(model, adamw(model)), model, tmp_path / "o.safetensors")
    model = linear()
    optimizer = stepped(model, adamw(model))
    load_optimizer(optimizer, model, tmp_path / "o.safetensors")
    assert model[2].bias not in optimizer.state
    assert len(optimizer.state) == 3


def test_memory_follows_the_parameters_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = nn.Conv2d(3, 4, 3)
    stepped_once = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    stepped_once.step()
    expected = stepped_once.state[model.weight]["exp_avg"].clone()
    save_optimizer(stepped_once, model, tmp_path / "o.safetensors")

    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters())
    load_optimizer(optimizer, model, tmp_path / "o.safetensors")

    moment = optimizer.state[model.weight]["exp_avg"]
    assert moment.stride() == model.weight.stride() != expected.stride()
    assert torch.equal(moment, expected)
    save_optimizer(optimizer, model, tmp_path / "again.safetensors", weights=False)
    load_optimizer(optimizer, model, tmp_path / "again.safetensors")
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], expected)


def test_a_load_copies_no_weights(tmp_path: Path) -> None:
    model = linear()
    save_optimizer(stepped(model, adamw(model)), model, tmp_path / "o.safetensors")
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    used: list[str] = []

    class Recorded(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            tensors = [value for value in args if isinstance(value, torch.Tensor)]
            if any(tensor.data_ptr() in weights for tensor in tensors):
                used.append(str(func))
            return func(*args, **(kwargs or {}))

    optimizer = adamw(model)
    with Recorded():  # type: ignore[no-untyped-call]
        load_optimizer(optimizer, model, tmp_path / "o.safetensors")
    assert {*used} <= {"aten.detach.default", "aten.view.default", "aten.view.dtype", "aten.empty_like.default"}


def test_a_live_tensor_option_stays_the_object_that_it_is(tmp_path: Path) -> None:
    model = linear()
    first = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.25), foreach=False, capturable=False)
    save_optimizer(stepped(model, first), model, tmp_path / "o.safetensors")

    lr = torch.tensor(0.5)
    tensors = torch.optim.AdamW(model.parameters(), lr=lr, foreach=False)
    load_optimizer(tensors, model, tmp_path / "o.safetensors")
    assert tensors.param_groups[0]["lr"] is lr
    assert lr == 0.25

    numbers = adamw(model)
    load_optimizer(numbers, model, tmp_path / "o.safetensors")
    assert (numbers.param_groups[0]["lr"], type(numbers.param_groups[0]["lr"])) == (0.25, float)
    save_optimizer(numbers, model, tmp_path / "n.safetensors")
    load_optimizer(tensors, model, tmp_path / "n.safetensors", options={"lr": 0.75, "betas": "current"})
    assert tensors.param_groups[0]["lr"] is lr
    assert lr == 0.75


def test_a_scheduler_goes_on_where_it_was(tmp_path: Path) -> None:
    def run() -> tuple[Any, torch.optim.Optimizer, Any]:
        model = linear()
        optimizer = adamw(model)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    model, optimizer, scheduler = run()
    rates = []
    for n in range(6):
        stepped(model, optimizer, 1)
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
        if n == 2:
            extra = {"scheduler": scheduler.state_dict()}
            save_optimizer(optimizer, model, tmp_path / "o.safetensors", extra=extra)

    model, optimizer, scheduler = run()
    load_optimizer(optimizer, model, tmp_path / "o.safetensors")
    with reading.open_state(tmp_path / "o.safetensors") as state:
        scheduler.load_state_dict(state.extra["scheduler"])
    assert optimizer.param_groups[0]["initial_lr"] == 1e-2
    resumed = []
    for _ in range(3):
        stepped(model, optimizer, 1)
        scheduler.step()
        resumed.append(optimizer.param_groups[0]["lr"])
    assert resumed == rates[3:]


# --- policies -------------------------------------------------------------------------------------------------------


def test_fresh_parameters_start_without_state(saved: Path) -> None:
    model: Any = nn.Sequential(*linear(), nn.Linear(3, 3))
    optimizer = stepped(model, adamw(model), 1)
    report = load_optimizer(optimizer, model, saved, missing="fresh")
    assert report.fresh == ("3.weight", "3.bias")
    assert set(optimizer.state) == set(list(model.parameters())[:4])
    stepped(model, optimizer, 1)
    assert [int(optimizer.state[p]["step"]) for p in model.parameters()] == [4, 4, 4, 4, 1, 1]


def test_carried_state_comes_back_with_the_next_save(saved: Path, tmp_path: Path) -> None:
    model = frozen(linear())
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=1e-2)
    report = load_optimizer(optimizer, model, saved, unexpected="carry")
    assert report.carried == ("2.weight", "2.bias")
    assert report.line() == ("restored 2/2 parameters, 2 slots each, step 3, 2 carried; weights match 0/2")
    saved.unlink()
    stepped(model, optimizer, 1)
    save_optimizer(optimizer, model, tmp_path / "next.safetensors")
    with reading.open_state(tmp_path / "next.safetensors") as state:
        assert [p.name for p in state.carried] == ["2.weight", "2.bias"]

    whole = linear()
    reference = stepped(whole, adamw(whole))
    whole = linear()
    thawed = adamw(whole)
    load_optimizer(thawed, whole, tmp_path / "next.safetensors")
    for slot in ("exp_avg", "exp_avg_sq", "step"):
        expected = reference.state[reference.param_groups[0]["params"][2]][slot]
        assert torch.equal(thawed.state[whole[2].weight][slot], expected)
    assert [int(thawed.state[p]["step"]) for p in whole.parameters()] == [4, 4, 3, 3]


def test_ignored_state_is_dropped(saved: Path, tmp_path: Path) -> None:
    model = frozen(linear())
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=1e-2)
    load_optimizer(optimizer, model, saved, unexpected="carry")
    assert load_optimizer(optimizer, model, saved, unexpected="ignore").ignored == ("2.weight", "2.bias")
    assert [p.name for p in capture(optimizer, model).carried] == []


def test_moments_are_cut_and_padded(tmp_path: Path) -> None:
    model: Any = nn.Linear(3, 4, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    old = {key: value.clone() for key, value in optimizer.state[model.weight].items()}
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")

    wide: Any = nn.Linear(3, 6, bias=False)
    with torch.no_grad():
        wide.weight[:4] = model.weight
    padded = torch.optim.AdamW(wide.parameters(), amsgrad=True)
    report = load_optimizer(padded, wide, tmp_path / "o.safetensors", mismatch="resize")
    new = padded.state[wide.weight]
    assert torch.equal(new["exp_avg"], torch.cat([old["exp_avg"], torch.zeros(2, 3)]))
    for slot in ("exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(new[slot][:4], old[slot])
        assert torch.equal(new[slot][4:], old[slot].mean().expand(2, 3))
    assert int(new["step"]) == 1
    assert report.notes == ("the moments of 1 parameter are cut and padded",)  # the weights prove it


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (2, "no layer that changes its shape is known"),
        (6, "its first elements are not the weights that were saved, and no layer that changes its shape is known"),
    ],
    ids=["fewer", "more"],
)
def test_rows_that_nothing_tells_apart_are_not_resized(rows: int, why: str, tmp_path: Path) -> None:
    model: Any = nn.Linear(3, 4, bias=False)
    save_optimizer(adamw(model), model, tmp_path / "o.safetensors")
    other: Any = nn.Linear(3, rows, bias=False)
    with pytest.raises(BindError) as caught:
        load_optimizer(adamw(other), other, tmp_path / "o.safetensors", mismatch="resize")
    assert str(caught.value) == (
        "optimizer state does not fit: 1 parameter saved, 1 in the optimizer\n"
        "  parameters that cannot be resized (1):\n"
        f"    weight  {why}\n"
        "hint: mismatch='fresh' lets these parameters start without state"
    )


def test_padding_with_the_mean_keeps_first_updates_small(tmp_path: Path) -> None:
    """What new rows are filled with decides how far they jump: zeros beside a large step let them go too far."""
    model: Any = nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        model.weight.grad = torch.randn(4, 8, generator=generator)
        optimizer.step()
    save_optimizer(optimizer, model, tmp_path / "o.safetensors")

    def largest(fill: Callable[[dict[str, Any]], None]) -> float:
        wide: Any = nn.Linear(8, 8, bias=False)
        with torch.no_grad():
            wide.weight[:4] = model.weight
        resized = torch.optim.AdamW(wide.parameters(), lr=1e-3, weight_decay=0.0)
        load_optimizer(resized, wide, tmp_path / "o.safetensors", mismatch="resize", options={"lr": 1e-3})
        fill(resized.state[wide.weight])
        moves, gradient = [], torch.ones(8, 8)
        for _ in range(30):
            before = wide.weight.detach()[4:].clone()
            wide.weight.grad = gradient
            resized.step()
            moves.append(float((wide.weight.detach()[4:] - before).abs().max()) / 1e-3)
        return max(moves)

    assert largest(lambda slots: None) < 1.2
    assert largest(lambda slots: slots["exp_avg_sq"][4:].zero_()) > 5


def test_the_state_can_take_the_parameters_dtype(saved: Path) -> None:
    model = linear().bfloat16()
    optimizer = adamw(model)
    with pytest.raises(BindError):
        load_optimizer(optimizer, model, saved)
    load_optimizer(optimizer, model, saved, dtype="param")
    whole = linear()
    reference = stepped(whole, adamw(whole)).state
    for p, q in zip(model.parameters(), reference, strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], reference[q]["exp_avg"].bfloat16())
        assert optimizer.state[p]["step"].dtype is torch.float32
    stepped(model, optimizer, 0)


@pytest.mark.parametrize(
    ("rename", "build"),
    [
        ({f"{n}.{leaf}": f"net.{n}.{leaf}" for n in (0, 2) for leaf in ("weight", "bias")}, "net"),
        ([("^", "net.")], "net"),
        (lambda name: f"net.{name}", "net"),
    ],
    ids=["mapping", "pairs", "function"],
)
def test_names_that_were_renamed(rename: Any, build: str, saved: Path) -> None:
    model = nn.ModuleDict({build: linear()})
    assert load_optimizer(adamw(model), model, saved, rename=rename).restored == 4


# --- several models, several optimizers -----------------------------------------------------------------------------


def test_one_file_for_several_models_and_optimizers(tmp_path: Path) -> None:
    def run() -> tuple[dict[str, Any], list[torch.optim.Optimizer]]:
        models = {"unet": linear(), "text": linear(5)}
        return models, [adamw(models["unet"]), torch.optim.SGD(models["text"].parameters(), lr=0.1, momentum=0.9)]

    models, optimizers = run()
    for name, optimizer in zip(models, optimizers, strict=True):
        stepped(models[name], optimizer)
    save_optimizer(optimizers, models, tmp_path / "o.safetensors")
    expected = [contents(o) for o in optimizers]

    others, fresh = run()
    report = load_optimizer(fresh, others, tmp_path / "o.safetensors")
    assert (report.restored, report.slots, report.steps) == (8, (1, 2), (3, 3))
    assert [strip_memory(contents(o)) for o in fresh] == [strip_memory(text) for text in expected]


def strip_memory(text: str) -> str:
    return re.sub(r"\(\d{6,}, ", "(", text)


def test_an_optimizer_for_each_parameter(tmp_path: Path) -> None:
    model = linear()
    optimizers = [torch.optim.AdamW([p]) for p in model.parameters()]
    model(torch.ones(1, 3)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    save_optimizer(optimizers, model, tmp_path / "o.safetensors")
    one = adamw(model)
    assert load_optimizer(one, model, tmp_path / "o.safetensors", options={"lr": "current"}).restored == 4
    for optimizer in optimizers:
        (p,) = optimizer.param_groups[0]["params"]
        assert torch.equal(one.state[p]["exp_avg_sq"], optimizer.state[p]["exp_avg_sq"])


# --- the founding case ----------------------------------------------------------------------------------------------


def test_trainers_checkpoint_as_it_lies_there(founding: Founding, caplog: pytest.LogCaptureFixture) -> None:
    model = founding.model
    assert len(list(model.parameters())) == 730
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.5)

    report = load_optimizer(optimizer, model, founding.path)

    assert report.line() == "restored 392/392 parameters, 2 slots each, step 3; weights match 392/392"
    names = {id(p): name for name, p in model.named_parameters()}
    for p in trainable:
        for slot, value in founding.slots[names[id(p)]].items():
            assert torch.equal(optimizer.state[p][slot], value)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    said, _, verdict = warning.rpartition(": ")
    assert said == (
        f"{founding.path} has no names; its 392 parameters were named by the order of the live optimizer. Order alone "
        "is no proof: 392 of them could be swapped without a shape that shows it; the order was weighed against the "
        "weights beside it"
    )
    assert verdict in ("confirmed", "partly")


def test_without_weights_beside_it_the_live_models_are_asked(
    founding: Founding, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(shutil.copy(founding.path / "optimizer.pt", tmp_path))
    optimizer = torch.optim.AdamW([p for p in founding.model.parameters() if p.requires_grad])
    load_optimizer(optimizer, founding.model, path)
    said, _, verdict = caplog.messages[-1].rpartition(": ")
    assert said.endswith("; the order was weighed against the weights of the live model")
    assert verdict in ("confirmed", "partly")


def test_an_optimizer_over_all_730_parameters_is_told_what_is_wrong(founding: Founding) -> None:
    optimizer = torch.optim.AdamW(founding.model.parameters())
    with pytest.raises(BindError) as caught:
        load_optimizer(optimizer, founding.model, founding.path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "optimizer state does not fit: 392 parameters saved, 730 in the optimizer"
    assert lines[1] == "  in the optimizer, not in the file (338):"
    assert lines[-2] == "    ... and 328 more"
    assert lines[-1] == (
        "hint: the optimizer was built over 730 parameters and holds 338 frozen parameters, which the saved one did "
        "not; build it from [p for p in model.parameters() if p.requires_grad]"
    )
    assert not optimizer.state


def test_an_order_that_shapes_refuse_is_not_taken_and_names_still_bind(founding: Founding) -> None:
    model = founding.model
    named = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW([p for _, p in named])
    assert load_optimizer(optimizer, model, founding.path).restored == 392
    for name, p in named:
        assert torch.equal(optimizer.state[p]["exp_avg"], founding.slots[name]["exp_avg"])


def by_text(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Trainable parameters with layers as text sorts them: 0, 1, 10, 11, ..., 2. Every shape stays where it was."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return sorted(named, key=lambda item: item[0].split(".")[4])


def test_an_order_that_shapes_allow_is_not_taken_where_the_weights_contradict_it(founding: Founding) -> None:
    """torch would bind the moments of 26 of 28 layers to another layer in silence."""
    named = by_text(founding.model)
    theirs = torch.optim.AdamW([p for _, p in named])
    theirs.load_state_dict(
        torch.load(founding.path / "optimizer.pt") | {"param_groups": theirs.state_dict()["param_groups"]}
    )
    wrong = [name for name, p in named if not torch.equal(theirs.state[p]["exp_avg"], founding.slots[name]["exp_avg"])]
    assert len(wrong) == 26 * 14

    ours = torch.optim.AdamW([p for _, p in named])
    load_optimizer(ours, founding.model, founding.path)
    for name, p in named:
        assert torch.equal(ours.state[p]["exp_avg"], founding.slots[name]["exp_avg"])


def test_an_order_that_nothing_but_the_live_optimizer_proposes_is_refused_where_the_weights_contradict_it(
    founding: Founding, tmp_path: Path
) -> None:
    def halved(parameters: list[Any]) -> list[dict[str, Any]]:
        return [{"params": parameters[:196]}, {"params": parameters[196:]}]

    folder = shutil.copytree(founding.path, tmp_path / "checkpoint-3")
    saved = torch.load(folder / "optimizer.pt")
    (one, _), options = saved["param_groups"], saved["param_groups"][0]
    saved["param_groups"] = [{**options, **group} for group in halved(one["params"])]
    torch.save(saved, folder / "optimizer.pt")
    optimizer = torch.optim.AdamW(halved([p for _, p in by_text(founding.model)]))
    with pytest.raises(ConversionError) as caught:
        load_optimizer(optimizer, founding.model, folder)
    assert str(caught.value) == (
        f"{folder}: its parameters do not stand in the order of the live optimizer, say the weights beside it\n"
        "hint: give it names first, with convert(path, 'optimizer.safetensors'), and load that file"
    )
    assert not optimizer.state


# --- LoRA, refused and resized ---------------------------------------------------------------------------------------


def adapted(targets: str, rank: int = 8, alpha: int = 16) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = nn.ModuleDict({name: nn.Linear(6, 6) for name in "qkvo"})
    base.forward = lambda x: sum(layer(x) for layer in base.values())
    config = LoraConfig(target_modules=list(targets), r=rank, lora_alpha=alpha, init_lora_weights=False)
    return get_peft_model(base, config)


def adapter_optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """LoRA of rank 8 on q and v, one step."""
    model = adapted("qv")
    optimizer = adapter_optimizer(model)
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    save_optimizer(optimizer, model, tmp_path / "lora.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "lora.pt")
    return tmp_path / "lora.safetensors"


@pytest.mark.parametrize(("targets", "rank", "kinds"), [("qo", 8, {"missing", "unexpected"}), ("qv", 4, {"shape"})])
def test_another_adapter_loads_into_torch_and_is_refused_by_name(
    targets: str, rank: int, kinds: set[str], lora: Path
) -> None:
    model = adapted(targets, rank)
    optimizer = adapter_optimizer(model)
    optimizer.load_state_dict(torch.load(lora.with_suffix(".pt")))  # not a word
    optimizer = adapter_optimizer(model)
    with pytest.raises(BindError) as caught:
        load_optimizer(optimizer, model, lora)
    assert caught.value.plan is not None
    assert {problem.kind for problem in caught.value.plan.problems} == kinds
    assert not optimizer.state


@pytest.mark.parametrize(("rank", "alpha", "scale"), [(12, 24, 1.0), (4, 16, 2.0), (16, 16, 0.5)])
def test_a_new_rank_cuts_pads_and_scales_with_alpha_over_r(rank: int, alpha: int, scale: float, lora: Path) -> None:
    old_model, model = adapted("qv"), adapted("qv", rank, alpha)
    old = adapter_optimizer(old_model)
    load_optimizer(old, old_model, lora)
    new = adapter_optimizer(model)
    report = load_optimizer(new, model, lora, mismatch="resize")

    common = min(rank, 8)
    for p, q in zip(old.state, new.state, strict=True):
        axis = 0 if p.shape[0] == 8 else 1
        for slot, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            before, after = old.state[p][slot], new.state[q][slot]
            assert after.shape == q.shape
            kept = before.narrow(axis, 0, common) * scale**power
            assert torch.equal(after.narrow(axis, 0, common), kept)
            if rank > 8:
                fill = (before * scale**power).double().mean().float() if power == 2 else torch.tensor(0.0)
                assert torch.equal(after.narrow(axis, 8, rank - 8), fill.expand(after.narrow(axis, 8, rank - 8).shape))
    note = (
        "the moments of 4 parameters are cut and padded, which is right only if the weights were cut and padded alike"
    )
    if scale != 1.0:
        note += f"; they are scaled as the gradients are by the new alpha / r, by {scale}"
    assert report.notes == (note,)


def test_a_folder_without_names_is_named_by_its_adapter_where_the_live_order_does_not_fit(
    lora: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of another rank, no order of the live parameters has the shapes of the file; the adapter next to it has."""
    adapted("qv").save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "optimizer.pt").write_bytes(lora.with_suffix(".pt").read_bytes())
    model = adapted("qv", 4, 8)
    optimizer = adapter_optimizer(model)
    with pytest.raises(BindError) as caught:
        load_optimizer(optimizer, model, tmp_path / "run")
    assert caught.value.plan is not None
    assert {problem.kind for problem in caught.value.plan.problems} == {"shape"}
    assert caplog.messages == [
        (
            f"{tmp_path / 'run'} does not fit the parameters of the live optimizer in any order; its names are those "
            "of adapter_model.safetensors"
        )
    ]
    load_optimizer(optimizer, model, tmp_path / "run", mismatch="resize")
    expected = adapter_optimizer(model)
    load_optimizer(expected, model, lora, mismatch="resize")
    for ours, theirs in zip(optimizer.state.values(), expected.state.values(), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(ours[slot].equal(theirs[slot]) for slot in ours)


def test_gradients_of_lora_grow_with_alpha_over_r() -> None:
    """Why moments are scaled: with the same weights, gradients are alpha / r times what they were."""
    gradients = []
    for alpha in (16, 8):
        model = adapted("qv", alpha=alpha)
        model(torch.ones(2, 6)).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for first, second in zip(*gradients, strict=True):
        assert torch.allclose(first, 2 * second)


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_holds_the_state_and_little_else(tmp_path: Path) -> None:
    code = f"""
import sys, torch
from lora_state_format.torch import save_optimizer, load_optimizer
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) // 1024
def peak(work):
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before
model = torch.nn.ModuleList([torch.nn.Linear(2048, 1024, bias=False) for _ in range(4)])
first = torch.optim.AdamW(model.parameters())
for p in model.parameters():
    p.grad = torch.ones_like(p)
first.step()
print(peak(lambda: save_optimizer(first, model, r"{tmp_path}/o.safetensors")))
del first
for p in model.parameters():
    p.grad = None
second = torch.optim.AdamW(model.parameters())
print(peak(lambda: load_optimizer(second, model, r"{tmp_path}/o.safetensors")))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    saving, loading = map(int, result.stdout.split())
    assert saving < 32
    assert loading < 64 + 64  # MiB: two slots of four parameters of 8


# --- torch's own load, for comparison -------------------------------------------------------------------------------


def test_torch_binds_by_position_without_a_word_and_ours_by_name(saved: Path) -> None:
    model: Any = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    first = torch.optim.AdamW(model.parameters())
    for n, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, float(n + 1))
    first.step()
    save_optimizer(first, model, saved)
    turned = [*model["b"].parameters(), *model["a"].parameters()]

    theirs = torch.optim.AdamW(turned)
    theirs.load_state_dict(copy.deepcopy(first.state_dict()))
    ours = torch.optim.AdamW(turned)
    load_optimizer(ours, model, saved)

    right = first.state[model["a"].weight]["exp_avg"]
    assert not torch.equal(theirs.state[model["a"].weight]["exp_avg"], right)
    assert torch.equal(theirs.state[model["b"].weight]["exp_avg"], right)
    assert torch.equal(ours.state[model["a"].weight]["exp_avg"], right)


def test_torch_lets_another_rank_load_and_ours_does_not(saved: Path) -> None:
    model = linear()
    state = stepped(model, adamw(model)).state_dict()
    wide = linear(8)
    theirs = adamw(wide)
    theirs.load_state_dict(state)
    with pytest.raises(RuntimeError, match="The size of tensor a"):
        stepped(wide, theirs)
    with pytest.raises(BindError):
        load_optimizer(adamw(wide), wide, saved)


def test_torch_narrows_float32_state_and_ours_does_not(tmp_path: Path) -> None:
    from transformers.optimization import Adafactor

    def build() -> tuple[Any, torch.optim.Optimizer]:
        model = linear().bfloat16()
        return model, Adafactor(model.parameters(), lr=1e-3, scale_parameter=False, relative_step=False)

    model, first = build()
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.3)
    first.step()
    slot = first.state[model[0].bias]["exp_avg_sq"]
    assert slot.dtype is torch.float32
    save_optimizer(first, model, tmp_path / "o.safetensors")

    other, theirs = build()
    theirs.load_state_dict(first.state_dict())
    assert theirs.state[other[0].bias]["exp_avg_sq"].dtype is torch.bfloat16
    other, ours = build()
    load_optimizer(ours, other, tmp_path / "o.safetensors")
    assert torch.equal(ours.state[other[0].bias]["exp_avg_sq"], slot)


# --- steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("saved_as", "class_path"), [(3, "torch.optim.adamw.AdamW"), (3.0, "torch.optim.adam.Adam")])
def test_a_step_becomes_what_the_live_class_counts_with(saved_as: float, class_path: str) -> None:
    cpu = torch.device("cpu")
    step = _step(saved_as, CLASSES[class_path], cpu, False)
    assert (step.dtype, step.shape, float(step)) == (torch.float32, (), 3.0)
    assert _step(saved_as, CLASSES["torch.optim.sparse_adam.SparseAdam"], cpu, False) == 3
    on_device = _step(saved_as, CLASSES[class_path], torch.device("meta"), True)
    assert on_device.device.type == "meta"
    assert _step(saved_as, CLASSES[class_path], torch.device("meta"), False).device.type == "cpu"
