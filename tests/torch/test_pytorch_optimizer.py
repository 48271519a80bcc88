"""Every optimizer of pytorch_optimizer: where torch's own state dict resumes it, a file does too, or says why not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from lora_state_format.errors import BindError, StateFormatError, UnrepresentableError
from lora_state_format.torch import load_optimizer, save_optimizer

optimizers = pytest.importorskip("pytorch_optimizer")

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

SHAPES: Final = {"up": (8, 6), "down": (6, 8), "bias": (8,)}

REFUSED: Final = {
    "adashift": (UnrepresentableError, "up.grad_queue is a value of type deque, which has no form in a state"),
    "conda": (UnrepresentableError, "up.projector is a value of type GaLoreProjector, which has no form in a state"),
    "scalableshampoo": (
        UnrepresentableError,
        "up.pre_conditioner is a value of type PreConditioner, which has no form in a state",
    ),
    "magma": (BindError, "the saved optimizer kept state in attributes, which is not in the file (3):"),
    "sara": (BindError, "the saved optimizer kept state in attributes, which is not in the file (3):"),
}
"""What a save or a load says of those that keep something that no file holds."""

WITHOUT: Final = {
    "adago", "adahessian", "adalomo", "adammini", "adamuon", "alig", "bsam", "demo", "distributedmuon", "lbfgs", "lomo",
    "muon", "muonclip", "normuon", "ranger21", "sophiah", "spectralsphere",
}  # fmt: skip
"""Those that do not run over a plain list of parameters with given gradients."""


def model() -> Any:
    made = torch.nn.ParameterDict()
    for number, (name, shape) in enumerate(SHAPES.items()):
        made[name] = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(number)))
    return made


def build(name: str, parameters: Any) -> Any:
    torch.manual_seed(0)
    kind = optimizers.load_optimizer(name)
    if name in ("lookahead", "orthograd"):
        return kind(torch.optim.AdamW(parameters, lr=1e-2))
    return kind(parameters, lr=1e-2)


def advance(made: Any, optimizer: Any, steps: range) -> None:
    """Steps with gradients that depend on the number of the step only."""
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()

    def gradients(extra: int) -> torch.Tensor:
        for number, parameter in enumerate(made.values()):
            generator = torch.Generator().manual_seed(100 * step + number + extra)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        return torch.tensor(1.0)

    for step in steps:
        torch.manual_seed(step)
        gradients(0)
        sharpened = type(optimizer).__name__.lower() in ("sam", "gsam", "looksam", "wsam", "friendlysam")
        optimizer.step(lambda: gradients(7)) if sharpened else optimizer.step()


def resumed(name: str, weights: Any, load: Any) -> list[torch.Tensor]:
    """The weights of a run that goes on for four steps after a load."""
    made = model()
    made.load_state_dict(weights)
    optimizer = build(name, list(made.values()))
    load(optimizer, made)
    advance(made, optimizer, range(4, 8))
    return [parameter.detach() for parameter in made.values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", sorted(set(optimizers.get_supported_optimizers()) - WITHOUT))
def test_exact_or_refused(name: str, tmp_path: Path) -> None:
    made = model()
    optimizer = build(name, list(made.values()))
    advance(made, optimizer, range(4))
    theirs, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(made.state_dict())
    refused: StateFormatError | None = None
    try:
        save_optimizer(optimizer, made, tmp_path / "o.safetensors")
        ours = resumed(name, weights, lambda live, over: load_optimizer(live, over, tmp_path / "o.safetensors"))
    except StateFormatError as error:
        refused = error
    advance(made, optimizer, range(4, 8))
    expected = [parameter.detach() for parameter in made.values()]
    if refused is not None:
        kind, message = REFUSED[name]
        assert type(refused) is kind
        assert message in str(refused)
        return
    assert name not in REFUSED
    if same(resumed(name, weights, lambda live, _: live.load_state_dict(theirs)), expected):
        assert same(ours, expected)
