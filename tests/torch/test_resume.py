"""A resumed run is the uninterrupted run, bit for bit, whatever was rebuilt differently; and the tests could tell.

Each case goes on for five steps twice more: from a cold start, and with the state of two parameters of equal shape
swapped. Both have to end in other weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lora_state_format.torch import load_optimizer, save_optimizer
from lora_state_format.torch.capture import named_tensors

if TYPE_CHECKING:
    from tests.conftest import Founding

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

STEPS = 5


def go_on(model: Any, optimizer: torch.optim.Optimizer, steps: int = STEPS, seed: int = 7) -> None:
    """Train on the same batches in the same order, without clipping."""
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        if hasattr(model, "config"):
            rows = torch.randint(0, 64, (4, 16), generator=generator)
            model(input_ids=rows, labels=rows).loss.backward()
        else:
            model(torch.randn(4, 3, 8, 8, generator=generator)).square().sum().backward()
        optimizer.step()


def weights(model: Any, adapter: str = "default") -> dict[str, torch.Tensor]:
    """The trainable parameters under the names that they have with the adapter called ``default``."""
    found = named_tensors(model).tensors.items()
    return {name.replace(f".{adapter}.", ".default."): p.detach() for name, p in found if p.requires_grad}


def assert_same_run(
    ours: tuple[Any, torch.optim.Optimizer], reference: tuple[Any, torch.optim.Optimizer], adapter: str = "default"
) -> None:
    """Every weight and every slot is equal."""
    (model, optimizer), (other_model, other_optimizer) = ours, reference
    own, expected = weights(model, adapter), weights(other_model)
    assert own.keys() == expected.keys()
    for name, parameter in own.items():
        assert torch.equal(parameter, expected[name]), name
    slots, other_slots = slots_of(model, optimizer, adapter), slots_of(other_model, other_optimizer)
    assert slots.keys() == other_slots.keys()
    for name, state in slots.items():
        assert state.keys() == other_slots[name].keys() != set()
        for slot, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other_slots[name][slot])), (name, slot)


def slots_of(model: Any, optimizer: torch.optim.Optimizer, adapter: str = "default") -> dict[str, dict[str, Any]]:
    names = named_tensors(model).names
    return {
        names[id(p)].replace(f".{adapter}.", ".default."): optimizer.state[p]
        for group in optimizer.param_groups
        for p in group["params"]
    }


def assert_other_weights(ours: Any, reference: Any, adapter: str = "default") -> None:
    expected = weights(reference)
    assert any(not torch.equal(p, expected[name]) for name, p in weights(ours, adapter).items())


def swap_a_pair(optimizer: torch.optim.Optimizer) -> None:
    """Exchange the state of two parameters that no shape tells apart."""
    seen: dict[torch.Size, torch.Tensor] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            other = seen.setdefault(p.shape, p)
            if other is not p:
                optimizer.state[p], optimizer.state[other] = optimizer.state[other], optimizer.state[p]
                return
    raise AssertionError("no two parameters have the same shape")


def trainable(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# --- the founding checkpoint, rebuilt in ways that torch's own load does not survive --------------------------------


def rebuilt(founding: Founding, adapter: str = "default") -> Any:
    """The model as another process would build it: the base from its seed, the adapter from the checkpoint."""
    from peft import PeftModel
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    base = Qwen2ForCausalLM(founding.model.config)
    return PeftModel.from_pretrained(base, str(founding.path), adapter_name=adapter, is_trainable=True)


def reregistered(founding: Founding) -> Any:
    """The same model with its projections defined in another order."""
    model = rebuilt(founding)
    for layer in model.base_model.model.model.layers:
        for module in (layer, layer.self_attn, layer.mlp):
            module._modules = dict(reversed(module._modules.items()))
    return model


def adamw(groups: Iterable[Any]) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0)


def split(parameters: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups with equal options: every other parameter."""
    return [{"params": parameters[::2]}, {"params": parameters[1::2]}]


@dataclass(frozen=True)
class Change:
    """How the model and its optimizer are rebuilt."""

    model: Callable[[Founding], Any]
    groups: Callable[[list[torch.nn.Parameter]], Iterable[Any]] = lambda parameters: parameters
    adapter: str = "default"


CHANGES: dict[str, Change] = {
    "the same model": Change(rebuilt),
    "modules registered in another order": Change(reregistered),
    "parameters in reverse": Change(rebuilt, lambda parameters: parameters[::-1]),
    "one group in two": Change(rebuilt, split),
    "another adapter name": Change(lambda founding: rebuilt(founding, "second"), adapter="second"),
}


@pytest.fixture(scope="module")
def uninterrupted(founding: Founding) -> tuple[Any, torch.optim.Optimizer]:
    """Trainer's own model and optimizer, five steps on."""
    model, optimizer = copy.deepcopy((founding.model, founding.optimizer))
    go_on(model, optimizer)
    return model, optimizer


@pytest.fixture(scope="module")
def converted(founding: Founding, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trainer's checkpoint as a file of names, converted without torch."""
    from lora_state_format import convert

    path = tmp_path_factory.mktemp("converted") / "optimizer.safetensors"
    convert(founding.path, path)
    return path


@pytest.mark.parametrize("change", CHANGES)
def test_a_trainer_checkpoint_resumes_bit_for_bit(
    change: str, founding: Founding, converted: Path, uninterrupted: tuple[Any, torch.optim.Optimizer]
) -> None:
    how = CHANGES[change]

    def fresh() -> tuple[Any, torch.optim.Optimizer]:
        model = how.model(founding)
        return model, adamw(how.groups(trainable(model)))

    model, optimizer = fresh()
    report = load_optimizer(optimizer, model, converted)
    assert report.line() == "restored 392/392 parameters, 2 slots each, step 3; weights match 392/392"
    go_on(model, optimizer)
    assert_same_run((model, optimizer), uninterrupted, how.adapter)

    model, optimizer = fresh()
    go_on(model, optimizer)
    assert_other_weights(model, uninterrupted[0], how.adapter)

    model, optimizer = fresh()
    load_optimizer(optimizer, model, converted)
    swap_a_pair(optimizer)
    go_on(model, optimizer)
    assert_other_weights(model, uninterrupted[0], how.adapter)


def test_two_groups_resume_in_one(
    founding: Founding, uninterrupted: tuple[Any, torch.optim.Optimizer], tmp_path: Path
) -> None:
    model, optimizer = copy.deepcopy((founding.model, founding.optimizer))
    two = adamw(split(trainable(model)))
    for p in trainable(model):
        two.state[p] = optimizer.state[p]
    save_optimizer(two, model, tmp_path / "two.safetensors")

    model = rebuilt(founding)
    one = adamw(trainable(model))
    load_optimizer(one, model, tmp_path / "two.safetensors")
    go_on(model, one)

    assert_same_run((model, one), uninterrupted)


# --- other optimizers, dtypes, layouts and wrappers: each against itself ----------------------------------------------


def small(dtype: torch.dtype = torch.float32) -> Any:
    """LoRA on a model of two layers; the adapter has the dtype of the base."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    options = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(Qwen2ForCausalLM(config).to(dtype), options, autocast_adapter_dtype=False)


def convolutions() -> Any:
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.Tanh(), torch.nn.Conv2d(8, 8, 3), torch.nn.Conv2d(8, 8, 3)
    model: Any = torch.nn.Sequential(*layers)
    return model.to(memory_format=torch.channels_last)


def perceptron() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))


def compiled(model: Callable[[], Any], backend: str) -> Callable[[], Any]:
    return lambda: torch.compile(model(), backend=backend)


def adafactor(parameters: Any) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    made: torch.optim.Optimizer = Adafactor(
        parameters, lr=1e-3, scale_parameter=False, relative_step=False, warmup_init=False, beta1=0.9
    )
    return made


@dataclass(frozen=True)
class Run:
    """A model, the model that it is rebuilt as, and its optimizer."""

    model: Callable[[], Any] = small
    rebuilt: Callable[[], Any] | None = None
    optimizer: Callable[[Any], torch.optim.Optimizer] = adamw


RUNS: dict[str, Run] = {
    "foreach": Run(optimizer=lambda ps: torch.optim.AdamW(ps, lr=1e-3, foreach=True)),
    "fused": Run(optimizer=lambda ps: torch.optim.AdamW(ps, lr=1e-3, fused=True)),
    "one by one": Run(optimizer=lambda ps: torch.optim.AdamW(ps, lr=1e-3, foreach=False)),
    "amsgrad, coupled decay": Run(optimizer=lambda ps: torch.optim.Adam(ps, lr=1e-3, amsgrad=True, weight_decay=0.1)),
    "bfloat16": Run(lambda: small(torch.bfloat16)),
    "float32 moments beside bfloat16": Run(lambda: small(torch.bfloat16), optimizer=adafactor),
    "channels last, fused": Run(convolutions, optimizer=lambda ps: torch.optim.AdamW(ps, lr=1e-3, fused=True)),
    "channels last, foreach": Run(convolutions, optimizer=lambda ps: torch.optim.AdamW(ps, lr=1e-3, foreach=True)),
    "aot_eager after eager": Run(rebuilt=compiled(small, "aot_eager")),
    "eager after aot_eager": Run(compiled(small, "aot_eager"), rebuilt=small),
    "inductor": Run(compiled(perceptron, "inductor")),
}


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_bit_for_bit_in_reverse_order(name: str, tmp_path: Path) -> None:
    run = RUNS[name]
    model = run.model()
    optimizer = run.optimizer(trainable(model))
    go_on(model, optimizer, 3, seed=1)
    save_optimizer(optimizer, model, tmp_path / "optimizer.safetensors")
    middle = {key: p.clone() for key, p in weights(model).items()}
    go_on(model, optimizer)

    def fresh() -> tuple[Any, torch.optim.Optimizer]:
        again = (run.rebuilt or run.model)()
        with torch.no_grad():
            for key, p in weights(again).items():
                p.copy_(middle[key])
        return again, run.optimizer(trainable(again)[::-1])

    other, resumed = fresh()
    report = load_optimizer(resumed, other, tmp_path / "optimizer.safetensors")
    assert (report.restored, report.matching, report.differing, report.notes) == (len(middle), len(middle), (), ())
    go_on(other, resumed)
    assert_same_run((other, resumed), (model, optimizer))

    other, cold = fresh()
    go_on(other, cold)
    assert_other_weights(other, model)

    other, swapped = fresh()
    load_optimizer(swapped, other, tmp_path / "optimizer.safetensors")
    swap_a_pair(swapped)
    go_on(other, swapped)
    assert_other_weights(other, model)
