"""Every optimizer of pytorch_optimizer goes on from a file as if never stopped, or says why it does not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
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
    "scionlight": (BindError, "\n    SCIONLight.param_groups.params.grad, a torch.Tensor\n"),
}
"""What a save or a load says of those that keep something that no file holds."""

NOT_BY_TORCH: Final = {"scionlight"}
"""Those that torch's own state dict does not resume: SCIONLight's momentum is in the gradients."""

STATELESS: Final = {"lomo", "rose"}
"""Those that keep nothing from one step to the next, so that a cold start is no other run."""

# --- how each is built ----------------------------------------------------------------------------------------------

Build = Callable[[Any, Any], Any]


def over_parameters(kind: Any, made: Any, **options: Any) -> Any:
    return kind(list(made.parameters()), **{"lr": 1e-2, **options})


def over_matrices(kind: Any, made: Any, **options: Any) -> Any:
    return kind([p for p in made.parameters() if p.dim() == 2], lr=1e-2, **options)


def over_the_model(kind: Any, made: Any, **options: Any) -> Any:
    return kind(made, lr=1e-2, **options)


def with_muon_groups(kind: Any, made: Any, **options: Any) -> Any:
    matrices = [p for p in made.parameters() if p.dim() == 2]
    others = [p for p in made.parameters() if p.dim() != 2]
    return kind([{"params": matrices, "use_muon": True, **options}, {"params": others, "use_muon": False}], lr=1e-2)


def around_adamw(kind: Any, made: Any) -> Any:
    return kind(torch.optim.AdamW(made.parameters(), lr=1e-2))


def without_lr(kind: Any, made: Any, **options: Any) -> Any:
    return kind(list(made.parameters()), **options)


BUILDS: Final[dict[str, Build]] = {
    "adago": with_muon_groups,
    "adalomo": over_the_model,
    "adammini": partial(over_the_model, num_embeds=8, num_heads=2),
    "adamuon": with_muon_groups,
    "alig": partial(without_lr, max_lr=0.1, momentum=0.9),
    "bsam": partial(over_parameters, num_data=10),
    "dadaptlion": partial(over_parameters, lr=1.0),
    "dadaptsgd": partial(over_parameters, lr=1.0),
    "distributedmuon": with_muon_groups,
    "fromage": partial(over_parameters, p_bound=0.9),
    "lomo": over_the_model,
    "lookahead": around_adamw,
    "lorarite": partial(over_matrices, update_skipping=0.0),
    "muon": with_muon_groups,
    "muonclip": partial(with_muon_groups, qk_clip="query", attention_name="attention"),
    "normuon": with_muon_groups,
    "orthograd": around_adamw,
    "pid": partial(over_parameters, momentum=0.9),
    "qhm": partial(over_parameters, momentum=0.9),
    "ranger21": partial(over_parameters, num_iterations=20),
    "sgd": partial(over_parameters, momentum=0.9),
    "sgdp": partial(over_parameters, momentum=0.9),
    "sgdw": partial(over_parameters, momentum=0.9),
    "sophiah": partial(over_parameters, update_period=3),
    "spectralsphere": over_matrices,
}
"""Those that need more than a list of parameters, or without it keep nothing; of ``lr`` 1e-2 all others."""


def model(name: str) -> Any:
    """Two matrices and a vector; for Adam-mini, which goes by the names of layers, an attention's."""
    torch.manual_seed(0)
    if name == "adammini":
        kinds = {"embed": (8, 8), "q_proj": (8, 8), "mlp": (6, 8)}
        return torch.nn.ModuleDict({key: torch.nn.Linear(b, a) for key, (a, b) in kinds.items()})
    made = torch.nn.ParameterDict()
    for key, shape in SHAPES.items():
        made[key] = torch.nn.Parameter(torch.randn(shape))
    return made


def build(name: str, made: Any) -> Any:
    torch.manual_seed(0)
    return BUILDS.get(name, over_parameters)(optimizers.load_optimizer(name), made)


# --- how each takes a step ------------------------------------------------------------------------------------------


def loss_of(made: Any, step: int) -> torch.Tensor:
    """A loss with curvature, whose targets depend on the number of the step only."""
    generator = torch.Generator().manual_seed(step)
    differences = [p - torch.randn(p.shape, generator=generator) for p in made.parameters()]
    return torch.stack([d.square().sum() + 0.05 * d.pow(4).sum() for d in differences]).sum()


def plainly(optimizer: Any, backward: Callable[[], torch.Tensor], _: torch.Tensor) -> None:
    backward()
    optimizer.step()


def with_a_closure(optimizer: Any, backward: Callable[[], torch.Tensor], _: torch.Tensor) -> None:
    backward()
    optimizer.step(backward)


def with_the_loss(optimizer: Any, backward: Callable[[], torch.Tensor], _: torch.Tensor) -> None:
    loss = float(backward())
    optimizer.step(lambda: loss)


def with_a_graph(optimizer: Any, _: Callable[[], torch.Tensor], loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward(create_graph=True)  # type: ignore[no-untyped-call]
    optimizer.step()


def with_logits(optimizer: Any, backward: Callable[[], torch.Tensor], _: torch.Tensor) -> None:
    backward()
    optimizer.step(attention_max_logits={"attention": torch.tensor([150.0, 50.0])})


def in_backward(optimizer: Any, _: Callable[[], torch.Tensor], loss: torch.Tensor) -> None:
    optimizer.fused_backward(loss, 1e-2)


def upon_the_gradients(optimizer: Any, _: Callable[[], torch.Tensor], loss: torch.Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


STEPS: Final = {
    "adahessian": with_a_graph,
    "adalomo": in_backward,
    "alig": with_the_loss,
    "lomo": in_backward,
    "muonclip": with_logits,
    "scionlight": upon_the_gradients,
    "sophiah": with_a_graph,
    **dict.fromkeys(("bsam", "friendlysam", "gsam", "lbfgs", "looksam", "sam", "wsam"), with_a_closure),
}


def advance(name: str, made: Any, optimizer: Any, steps: range) -> None:
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()

    def backward() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(made, step)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    for step in steps:
        torch.manual_seed(step)
        np.random.seed(step)  # Kron draws from it
        STEPS.get(name, plainly)(optimizer, backward, loss_of(made, step))


# --- the runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one process, for DeMo and the distributed Muon."""
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def resumed(name: str, weights: Any, load: Any) -> list[torch.Tensor]:
    """The weights of a run that goes on for four steps after a load."""
    made = model(name)
    made.load_state_dict(weights)
    optimizer = build(name, made)
    load(optimizer, made)
    advance(name, made, optimizer, range(4, 8))
    return [parameter.detach() for parameter in made.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", sorted(optimizers.get_supported_optimizers()))
def test_exact_or_refused(name: str, tmp_path: Path) -> None:
    made = model(name)
    optimizer = build(name, made)
    advance(name, made, optimizer, range(4))
    theirs, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(made.state_dict())
    refused: StateFormatError | None = None
    try:
        save_optimizer(optimizer, made, tmp_path / "o.safetensors")
        ours = resumed(name, weights, lambda live, over: load_optimizer(live, over, tmp_path / "o.safetensors"))
    except StateFormatError as error:
        refused = error
    advance(name, made, optimizer, range(4, 8))
    expected = [parameter.detach() for parameter in made.parameters()]
    assert all(p.isfinite().all() for p in expected)
    by_torch = resumed(name, weights, lambda live, _: live.load_state_dict(theirs))
    assert same(by_torch, expected) == (name not in NOT_BY_TORCH)
    if refused is not None:
        kind, message = REFUSED[name]
        assert type(refused) is kind
        assert message in str(refused)
        return
    assert name not in REFUSED
    assert same(ours, expected)
    assert same(resumed(name, weights, lambda *_: None), expected) == (name in STATELESS)


def test_the_docs_count_them() -> None:
    path = Path(__file__).parents[2] / "docs" / "optimizers.md"
    docs = " ".join(path.read_text(encoding="utf-8").split())
    names = optimizers.get_supported_optimizers()
    refused = sorted(optimizers.load_optimizer(name).__name__ for name in REFUSED)
    assert f"A test runs all {len(names)} optimizers that `pytorch_optimizer` 4.1 names" in docs
    assert f"{len(names) - len(refused)} of them go on exactly" in docs
    assert f"refused in words: `{'`, `'.join(refused)}`." in docs
