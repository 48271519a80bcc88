"""Where names come from: tensors in the file, files next to it, several models; and what is said if none fits."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import lora_state_format as lsf
from lora_state_format.cli import run
from lora_state_format.errors import AmbiguousOrderError, ConversionError, MissingNamesError
from lora_state_format.naming.sources import NAME_IT

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning:peft"),
]

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 842123456\n"
)
LFS = "a Git LFS pointer to 842 MB and not the file itself: run git lfs pull"


class Net(nn.Module):
    """Buffers of both kinds between parameters, a frozen layer, and one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(7))
        self.first = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)
        self.second = nn.Linear(5, 4)
        self.third = nn.Linear(4, 5, bias=False)
        self.tied = nn.Linear(4, 5, bias=False)
        self.tied.weight = self.third.weight


def stepped(parameters: Any, seed: int = 0) -> torch.optim.Optimizer:
    """An AdamW after a step with gradients that tell its parameters apart."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    return optimizer


def holds(path: Path, live: Mapping[str, tuple[nn.Module, torch.optim.Optimizer]], **arguments: Any) -> Any:
    """Whether the state names every live parameter's moments rightly; ``live`` maps a prefix to a model."""
    expected = {
        prefix + name: optimizer.state[p]
        for prefix, (model, optimizer) in live.items()
        for name, p in model.named_parameters()
        if any(p is other for group in optimizer.param_groups for other in group["params"])
    }
    with lsf.read(path, **arguments) as state:
        assert set(state) == set(expected)
        for name, slots in expected.items():
            for slot in ("exp_avg", "exp_avg_sq"):
                assert state[name][slot].torch().equal(slots[slot]), (name, slot)
        return state.naming


KEYS = [
    ("model", "optimizer"),
    ("model_state", "optimizer_state"),
    ("state_dict", "optimizer"),
    ("net", "optim"),
    ("policy", "optimizer"),
    ("Policy", "opt"),
]


@pytest.mark.parametrize("keys", KEYS, ids="-".join)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_state_dict_in_the_same_file(tmp_path: Path, keys: tuple[str, str], frozen: bool) -> None:
    net = Net()
    if frozen:
        net.second.requires_grad_(False)
    optimizer = stepped([p for p in net.parameters() if p.requires_grad])
    torch.save({"epoch": 3, keys[0]: net.state_dict(), keys[1]: optimizer.state_dict()}, tmp_path / "last.pt")
    naming = holds(tmp_path / "last.pt", {"": (net, optimizer)})
    assert (naming.source, naming.details["place"]) == ("checkpoint", keys[0])
    report = lsf.convert(tmp_path / "last.pt", tmp_path / "x.safetensors")
    assert report.paired == report.parameters


@pytest.mark.parametrize("turn", [(0, 1), (1, 0), (2, 0, 1), (4, 3, 2, 1, 0)])
def test_a_group_for_each_part_of_a_model(tmp_path: Path, turn: tuple[int, ...]) -> None:
    """A head before its backbone, layers from the last to the first: no framework's rule, and shapes leave one way."""
    net = nn.Sequential(*(nn.Linear(n, n + 1) for n in range(3, 3 + len(turn))))
    optimizer = stepped([{"params": net[number].parameters(), "lr": 0.1 * (number + 1)} for number in turn])
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    naming = holds(tmp_path / "last.pt", {"": (net, optimizer)})
    assert naming.rule == ("parts" if len(turn) > 2 or turn == (1, 0) else naming.rule)


def test_parts_of_a_model_that_are_alike(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = stepped([{"params": net[number].parameters()} for number in (1, 0)])
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    with pytest.raises(AmbiguousOrderError) as caught:
        lsf.read(tmp_path / "last.pt")
    assert str(caught.value).startswith("2 orders fit")


def test_frozen_ones_that_shapes_cannot_tell(tmp_path: Path) -> None:
    """Two layers are alike, and one of them is frozen: which, nothing says."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    net[0].requires_grad_(False)
    optimizer = stepped([p for p in net.parameters() if p.requires_grad])
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    with pytest.raises(ConversionError) as caught:
        lsf.read(tmp_path / "last.pt")
    lines = str(caught.value).splitlines()
    assert lines[0] == "no order of the 6 parameters fits the 4 of the optimizer, whose groups hold [4]:"
    assert "  flat: leaves more than one way to choose the 4 of group 0 from 6 by their shapes" in lines
    assert lines[-1] == "hint: pass names= with a file of names in optimizer order, or the model that was trained"
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    holds(tmp_path / "last.pt", {"": (net, optimizer)}, names=names)


# --- as training loops write them -----------------------------------------------------------------------------------


def net_of(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(n, m) for n, m in itertools.pairwise(sizes)))


def led(prefix: str, net: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict whose names a wrapper leads."""
    return {prefix + name: tensor for name, tensor in net.state_dict().items()}


def half(net: nn.Module) -> dict[str, torch.Tensor]:
    """What an average of the weights may be: other values under the same names."""
    return {name: tensor / 2 for name, tensor in net.state_dict().items()}


LOOPS: dict[str, tuple[str, Callable[[nn.Module, dict[str, Any]], Any]]] = {
    "PyTorch's tutorial": ("", lambda m, o: {"model_state_dict": m.state_dict(), "optimizer_state_dict": o, "loss": 1}),
    "a tuple": ("", lambda m, o: (m.state_dict(), o)),
    "a list": ("", lambda m, o: [7, m.state_dict(), o, {"best": 0.5}]),
    "the ImageNet example": ("module.", lambda m, o: {"arch": "x", "state_dict": led("module.", m), "optimizer": o}),
    "nanoGPT": ("_orig_mod.", lambda m, o: {"model": led("_orig_mod.", m), "optimizer": o, "best": torch.ones(1)}),
    "DDP and compile": ("module._orig_mod.", lambda m, o: {"net": led("module._orig_mod.", m), "opt": o}),
    "a whole model": ("", lambda m, o: {"model": m, "optimizer": o}),
    "torchvision's references": (
        "", lambda m, o: {"model": m.state_dict(), "optimizer": o, "model_ema": {**led("module.", m), "n_averaged": 3}},
    ),
    "denoising-diffusion": (
        "", lambda m, o: {"model": m.state_dict(), "opt": o, "ema": {f"ema_model.{k}": v for k, v in half(m).items()}},
    ),
    "DINO": ("module.", lambda m, o: {"teacher": half(m), "student": led("module.", m), "optimizer": o}),
    "a DQN": ("", lambda m, o: {"target": half(m), "local": m.state_dict(), "optimizer": o}),
    "the best so far": ("", lambda m, o: {"best_model": half(m), "model": m.state_dict(), "optimizer": o}),
    "a scheduled optimizer": ("", lambda m, o: {"model": m.state_dict(), "optim": {"step": 3, "optimizer": o}}),
    "ignite": ("", lambda m, o: {"model": m.state_dict(), "optimizer": o, "trainer": {"iteration": 5, "output": None}}),
    "catalyst": (
        "",
        lambda m, o: {
            "model_state_dict": m.state_dict(), "optimizer_state_dict": o,
            "criterion_state_dict": {"weight": torch.ones(3)},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS)
def test_what_a_loop_saves(tmp_path: Path, loop: str) -> None:
    """The values beside the names are those of the model that was trained, not of one that follows it."""
    prefix, tree = LOOPS[loop]
    net = net_of(3, 4, 4, 4, 2)
    optimizer = stepped(net.parameters())
    torch.save(tree(net, optimizer.state_dict()), tmp_path / "last.pt")
    holds(tmp_path / "last.pt", {prefix: (net, optimizer)})
    report = lsf.convert(tmp_path / "last.pt", tmp_path / "out" / "x.safetensors")
    assert report.paired == report.parameters
    torch.save(led(prefix, net), tmp_path / "live.pt")
    assert run(["verify", str(tmp_path / "out" / "x.safetensors"), "--weights", str(tmp_path / "live.pt")]) == 0


GROUPINGS: dict[str, tuple[str, str]] = {
    "torchvision's references": ("torchvision", "others norms"),
    "YOLOv5 since 6.1": ("ultralytics", "biases weights scales"),
    "YOLOv5 before that, YOLOv7": ("ultralytics", "scales weights biases"),
}


@pytest.mark.parametrize("program", GROUPINGS)
def test_groups_by_kinds_of_modules(tmp_path: Path, program: str) -> None:
    """They are made from the classes of modules, which a file does not have."""
    layers = [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2)]
    net = nn.Sequential(*layers)
    norms = [layer for layer in layers if isinstance(layer, (nn.BatchNorm1d, nn.LayerNorm))]
    others = [layer for layer in layers if isinstance(layer, nn.Linear)]
    kinds = {
        "norms": [p for layer in norms for p in layer.parameters()],
        "others": [p for layer in others for p in layer.parameters()],
        "scales": [layer.weight for layer in norms],
        "weights": [layer.weight for layer in others],
        "biases": [layer.bias for layer in layers],
    }
    rule, groups = GROUPINGS[program]
    decay = {"others": 0.1, "weights": 0.1}
    optimizer = stepped([{"params": kinds[kind], "weight_decay": decay.get(kind, 0.0)} for kind in groups.split()])
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    assert holds(tmp_path / "last.pt", {"": (net, optimizer)}).rule == rule


def test_groups_that_two_programs_may_have_made(tmp_path: Path) -> None:
    """No name says which module is a normalisation, and the shapes fit biases in a group of their own too."""
    layers = [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2, bias=False)]
    net = nn.Sequential(*layers)
    groups = [[p for layer in layers[start::2] for p in layer.parameters()] for start in (0, 1)]
    optimizer = stepped([{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}])
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    with pytest.raises(AmbiguousOrderError) as caught:
        lsf.read(tmp_path / "last.pt")
    assert str(caught.value).splitlines()[-1] == "hint: force one with rule="
    holds(tmp_path / "last.pt", {"": (net, optimizer)}, rule="torchvision")


def test_two_optimizers_of_one_model(tmp_path: Path) -> None:
    """The model of the second is not in the file; what the message says works."""
    net, gone = net_of(3, 3), net_of(3, 3)
    o, p = stepped(net.parameters(), 1), stepped(gone.parameters(), 2)
    torch.save({"model": net.state_dict(), "optims": [o.state_dict(), p.state_dict()]}, tmp_path / "last.pt")
    with pytest.raises(ConversionError) as caught:
        lsf.read(tmp_path / "last.pt")
    assert str(caught.value) == (
        "two optimizers have a parameter '0.weight': model names both; "
        "pass names= with a file of names in optimizer order, or the model that was trained"
    )
    names = [f"{model}.0.{kind}" for model in ("net", "gone") for kind in ("weight", "bias")]
    holds(tmp_path / "last.pt", {"net.": (net, o), "gone.": (gone, p)}, names=names)


def test_values_of_models_that_nothing_tells_apart_are_not_taken(tmp_path: Path) -> None:
    """Their names are the same, so those are; which of them the optimizer trains is not said."""
    net, other = net_of(3, 3, 3), net_of(3, 3, 3)
    optimizer = stepped(net.parameters())
    tree = {"net_a": other.state_dict(), "net_b": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(tree, tmp_path / "last.pt")
    holds(tmp_path / "last.pt", {"": (net, optimizer)})
    assert lsf.convert(tmp_path / "last.pt", tmp_path / "out" / "x.safetensors").paired == 0


PAIRS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "initials": (
        "generator.", "discriminator.",
        lambda a, b, o, p: {"generator": a, "discriminator": b, "optimizer_G": o, "optimizer_D": p},
    ),
    "netG, optG": ("G.", "D.", lambda a, b, o, p: {"netG": a, "netD": b, "optG": o, "optD": p}),
    "dicts": ("G.", "D.", lambda a, b, o, p: {"models": {"G": a, "D": b}, "optimizers": {"D": p, "G": o}}),
    "lists": ("0.", "1.", lambda a, b, o, p: {"models": [a, b], "optimizers": [o, p]}),
    "each with its own": (
        "actor.", "critic.",
        lambda a, b, o, p: {"actor": {"model": a, "optimizer": o}, "critic": {"model": b, "optimizer": p}},
    ),
    "folds": (
        "0.", "1.", lambda a, b, o, p: [{"model": a, "optimizer": o}, {"model": b, "optimizer": p}],
    ),
    "targets": (
        "actor.", "critic.",
        lambda a, b, o, p: {
            "actor_target": dict(b), "actor": a, "critic_target": dict(a), "critic": b,
            "actor_optim": o, "critic_optim": p,
        },
    ),
    "modules of an agent": (
        "_world.", "_behavior.",
        lambda a, b, o, p: {
            "agent_state_dict": {
                **{f"_world.{k}": v for k, v in a.items()}, **{f"_behavior.{k}": v for k, v in b.items()},
            },
            "optims_state_dict": {"_world._model_opt": o, "_behavior._actor_opt": p},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_what_a_loop_with_two_optimizers_saves(tmp_path: Path, pair: str) -> None:
    """The models are alike: what they are called says which optimizer trains which."""
    first, second, tree = PAIRS[pair]
    a, b = net_of(3, 3, 3), net_of(3, 3, 3)
    o, p = stepped(a.parameters(), 1), stepped(b.parameters(), 2)
    torch.save(tree(a.state_dict(), b.state_dict(), o.state_dict(), p.state_dict()), tmp_path / "last.pt")
    holds(tmp_path / "last.pt", {first: (a, o), second: (b, p)})


def test_two_models_that_nothing_matches_with_two_optimizers(tmp_path: Path) -> None:
    """Both have the same names; what the message says works."""
    a, b = net_of(3, 3), net_of(3, 3)
    o, p = stepped(a.parameters(), 1), stepped(b.parameters(), 2)
    tree = {"left": a.state_dict(), "right": b.state_dict(), "first": o.state_dict(), "second": p.state_dict()}
    torch.save(tree, tmp_path / "last.pt")
    with pytest.raises(AmbiguousOrderError) as caught:
        lsf.read(tmp_path / "last.pt")
    assert str(caught.value) == (
        f"{tmp_path / 'last.pt'}: 2 models fit the 2 parameters of the optimizer 'first', and nothing says which of "
        "them it trains:\n  left: '0.weight', ...\n  right: '0.weight', ...\n"
        "hint: pass the names of the right one in optimizer order as names="
    )
    names = [f"{side}.0.{kind}" for side in ("left", "right") for kind in ("weight", "bias")]
    holds(tmp_path / "last.pt", {"left.": (a, o), "right.": (b, p)}, names=names)


def test_a_model_with_the_copy_that_follows_it(tmp_path: Path) -> None:
    """As a DQN of stable-baselines3 has it: the optimizer trains one of two that are alike."""
    agent = nn.ModuleDict({"q_net_target": net_of(3, 3, 3), "q_net": net_of(3, 3, 3)})
    optimizer = stepped(agent["q_net"].parameters())
    torch.save({"policy": agent.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    holds(tmp_path / "last.pt", {"": (agent, optimizer)})
    both = stepped(agent.parameters())
    torch.save({"policy": agent.state_dict(), "optimizer": both.state_dict()}, tmp_path / "last.pt")
    holds(tmp_path / "last.pt", {"": (agent, both)})


def test_a_single_tensor_with_an_optimizer_of_its_own(tmp_path: Path) -> None:
    """As the temperature of a soft actor-critic."""
    net, box = net_of(3, 2), nn.ParameterDict({"log_alpha": nn.Parameter(torch.zeros(1))})
    o, p = stepped(net.parameters()), stepped(box.parameters())
    tree = {
        "actor": net.state_dict(),
        "log_alpha": box["log_alpha"],
        "actor_optim": o.state_dict(),
        "alpha_optim": p.state_dict(),
    }
    torch.save(tree, tmp_path / "last.pt")
    holds(tmp_path / "last.pt", {"actor.": (net, o), "": (box, p)})


class Ranked(nn.Module):
    """A layer of loralib's or LitGPT's LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4), requires_grad=False)
        self.lora_A = nn.Parameter(torch.ones(2, 4))
        self.lora_B = nn.Parameter(torch.zeros(4, 2))


@pytest.mark.parametrize("whole", [True, False])
def test_lora_that_is_not_peft_s(tmp_path: Path, whole: bool) -> None:
    net = nn.ModuleDict({"v": Ranked(), "k": Ranked()})
    optimizer = stepped([p for p in net.parameters() if p.requires_grad])
    model = {name: p for name, p in net.named_parameters() if whole or p.requires_grad}
    torch.save({"model": model, "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    holds(tmp_path / "last.pt", {"": (net, optimizer)})


def test_one_optimizer_of_two_models_among_copies_and_others(tmp_path: Path) -> None:
    encoder, decoder = net_of(3, 4), net_of(4, 2)
    optimizer = stepped([*encoder.parameters(), *decoder.parameters()])
    tree = {
        "encoder": encoder.state_dict(), "encoder_ema": half(encoder), "decoder": decoder.state_dict(),
        "loss": net_of(7, 1).state_dict(), "optimizer": optimizer.state_dict(),
    }  # fmt: skip
    torch.save(tree, tmp_path / "last.pt")
    holds(tmp_path / "last.pt", {"encoder.": (encoder, optimizer), "decoder.": (decoder, optimizer)})


def test_two_optimizers_of_two_models_each(tmp_path: Path) -> None:
    """As CycleGAN has them."""
    sizes = {"G_A": (3, 4), "G_B": (4, 5), "D_A": (3, 5), "D_B": (5, 4)}
    nets = {name: net_of(*size) for name, size in sizes.items()}
    g = stepped([*nets["G_A"].parameters(), *nets["G_B"].parameters()])
    d = stepped([*nets["D_A"].parameters(), *nets["D_B"].parameters()])
    tree = {f"net{name}": net.state_dict() for name, net in nets.items()}
    torch.save({**tree, "optimizer_G": g.state_dict(), "optimizer_D": d.state_dict()}, tmp_path / "last.pt")
    holds(tmp_path / "last.pt", {f"{name}.": (net, g if name[0] == "G" else d) for name, net in nets.items()})


# --- adapters -------------------------------------------------------------------------------------------------------


def llama() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def tuned(**options: Any) -> peft.PeftModel:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(llama(), config)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


SAVED: dict[str, Callable[[Any], dict[str, torch.Tensor]]] = {
    "the whole model": lambda model: model.state_dict(),
    "what is trained": lambda model: {n: p for n, p in model.named_parameters() if p.requires_grad},
    "the adapter": lambda model: dict(peft.get_peft_model_state_dict(model)),
}


@pytest.mark.parametrize("what", SAVED)
@pytest.mark.parametrize("saved", [None, ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_a_bundle_with_an_adapter(tmp_path: Path, what: str, saved: list[str] | None) -> None:
    model = tuned(modules_to_save=saved)
    optimizer = stepped(trainable(model))
    torch.save({"optimizer": optimizer.state_dict(), "adapter": SAVED[what](model)}, tmp_path / "optimizer.pt")
    naming = holds(tmp_path / "optimizer.pt", {"": (model, optimizer)})
    assert naming.source == ("adapter" if what == "the adapter" else "checkpoint")


def test_an_optimizer_of_all_parameters_beside_the_whole_model(tmp_path: Path) -> None:
    model = tuned()
    model.requires_grad_(True)
    optimizer = stepped(model.parameters())
    torch.save({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, tmp_path / "last.pt")
    assert holds(tmp_path / "last.pt", {"": (model, optimizer)}).rule == "everything"


def test_an_optimizer_of_all_parameters_beside_the_adapter(tmp_path: Path) -> None:
    """The base's names are in no file next to it: one hint says what to pass, and that works."""
    model = tuned()
    model.save_pretrained(tmp_path / "run")
    model.requires_grad_(True)
    optimizer = stepped(model.parameters())
    torch.save(optimizer.state_dict(), tmp_path / "run" / "optimizer.pt")
    with pytest.raises(ConversionError) as caught:
        lsf.read(tmp_path / "run")
    assert str(caught.value).splitlines()[-1] == (
        "hint: the optimizer holds more parameters than these; if it was made of all of a model's, frozen ones too, "
        "pass names= with the folder of the model's config.json"
    )
    llama().config.save_pretrained(tmp_path / "base")
    naming = holds(tmp_path / "run", {"": (model, optimizer)}, names=tmp_path / "base")
    assert (naming.source, naming.rule) == ("configs", "everything")


# --- several optimizers, several models -----------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
def test_two_optimizers_and_two_models_that_are_alike(tmp_path: Path, turned: bool) -> None:
    """What a model is called says whose it is."""
    actor, critic = nn.Linear(3, 3), nn.Linear(3, 3)
    a, c = stepped(actor.parameters(), 1), stepped(critic.parameters(), 2)
    models = [("actor_state_dict", actor.state_dict()), ("critic_state_dict", critic.state_dict())]
    tree = {
        **dict(models[::-1] if turned else models),
        "actor_optimizer": a.state_dict(),
        "critic_optimizer": c.state_dict(),
    }
    torch.save(tree, tmp_path / "agent.pt")
    naming = holds(tmp_path / "agent.pt", {"actor.": (actor, a), "critic.": (critic, c)})
    assert [part["place"] for part in naming.details["optimizers"]] == ["actor_state_dict", "critic_state_dict"]


def test_two_optimizers_and_one_model_of_two_parts(tmp_path: Path) -> None:
    """As a LightningModule with two optimizers has it, and stable-baselines3's policies."""
    model = nn.ModuleDict({"actor": nn.Linear(3, 3), "critic": nn.Linear(3, 3), "critic_target": nn.Linear(3, 3)})
    a, c = stepped(model["actor"].parameters(), 1), stepped(model["critic"].parameters(), 2)
    torch.save(
        {"policy": model.state_dict(), "actor.optimizer": a.state_dict(), "critic.optimizer": c.state_dict()},
        tmp_path / "agent.pt",
    )
    holds(tmp_path / "agent.pt", {"actor.": (model["actor"], a), "critic.": (model["critic"], c)})


def test_two_models_that_fit_one_optimizer(tmp_path: Path) -> None:
    student, teacher = nn.Sequential(nn.Linear(3, 3)), nn.ModuleDict({"t": nn.Linear(3, 3)})
    optimizer = stepped(student.parameters())
    tree = {"teacher": teacher.state_dict(), "student": student.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(tree, tmp_path / "x.pt")
    with pytest.raises(AmbiguousOrderError) as caught:
        lsf.read(tmp_path / "x.pt")
    assert str(caught.value) == (
        f"{tmp_path / 'x.pt'}: 2 models fit the 2 parameters of the optimizer, and give them different names:\n"
        "  teacher: 't.weight', ...\n"
        "  student: '0.weight', ...\n"
        "hint: pass the names of the right one in optimizer order as names="
    )
    holds(tmp_path / "x.pt", {"": (student, optimizer)}, names=["0.weight", "0.bias"])


def test_two_models_with_the_same_names_are_one_source(tmp_path: Path) -> None:
    net = nn.Linear(3, 3)
    optimizer = stepped(net.parameters())
    ema = {name: torch.zeros_like(p) for name, p in net.state_dict().items()}
    torch.save({"ema": ema, "model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    holds(tmp_path / "x.pt", {"": (net, optimizer)})


def test_one_optimizer_of_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    encoder, decoder = nn.Linear(3, 4), nn.Linear(4, 2)
    optimizer = stepped([*encoder.parameters(), *decoder.parameters()])
    tree = {"decoder": decoder.state_dict(), "encoder": encoder.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(tree, tmp_path / "x.pt")
    naming = holds(tmp_path / "x.pt", {"encoder.": (encoder, optimizer), "decoder.": (decoder, optimizer)})
    assert naming.details["place"] == "decoder, encoder"


def test_one_optimizer_of_two_models_that_are_alike(tmp_path: Path) -> None:
    left, right = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer = stepped([*left.parameters(), *right.parameters()])
    torch.save(
        {"left": left.state_dict(), "right": right.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt"
    )
    with pytest.raises(AmbiguousOrderError) as caught:
        lsf.read(tmp_path / "x.pt")
    assert str(caught.value).startswith(
        "2 orders fit, and there are no weights to tell which it is; they differ for 4 of 4 parameters, from position "
        "0 on:\n  flat: 'left.weight'\n  flat: 'right.weight'\n"
    )
    hint = "hint: pass names= with a file of names in optimizer order, or the model that was trained"
    assert str(caught.value).splitlines()[-1] == hint
    names = ["left.weight", "left.bias", "right.weight", "right.bias"]
    holds(tmp_path / "x.pt", {"left.": (left, optimizer), "right.": (right, optimizer)}, names=names)


# --- files next to it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer_name", "model_name", "paired"),
    [
        ("optimizer.pt", "model.pt", 6),
        ("optim_3.pth", "model_3.pth", 6),
        ("optimizer.pt", "pytorch_model.bin", 6),
        ("optimizer.pt", "best_model.pt", 0),
        ("optimizer.pt", "weights.ckpt", 0),
        ("train_end_optimizer.pt", "train_end_params.pt", 6),
        ("TD3_critic_optimizer", "TD3_critic", 6),
        ("opt000100.pt", "model000100.pt", 6),
        ("optimizer.tar", "encoder.tar", 0),
        ("optimizers/3.pt", "models/3.pt", 6),
        ("optimizer.pt", "model/pytorch_model.bin", 0),
        ("training/optimizer.pt", "pytorch_model.bin", 0),
    ],
)
def test_a_model_next_to_it(tmp_path: Path, optimizer_name: str, model_name: str, paired: int) -> None:
    """The values of a file that only lies there are not known to be of the state's moment: no digests of them."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    optimizer = stepped(net.parameters())
    for name, tree in ((optimizer_name, optimizer.state_dict()), (model_name, net.state_dict())):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save(tree, tmp_path / name)
    for other in ("scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"weight": torch.ones(3)}, tmp_path / other)
    report = lsf.convert(tmp_path / optimizer_name, tmp_path / "out" / "x.safetensors")
    holds(tmp_path / optimizer_name, {"": (net, optimizer)})
    above = "../" if optimizer_name.startswith("training/") else ""
    place = above + model_name.removeprefix("models/")
    assert (report.paired, report.naming.details["place"]) == (paired, place)


def test_configs_one_folder_up(tmp_path: Path) -> None:
    """A checkpoint that lost its weights, in the folder of a run that has the model's config."""
    model = llama()
    optimizer = stepped(model.parameters())
    model.config.save_pretrained(tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    torch.save(optimizer.state_dict(), tmp_path / "checkpoint-3" / "optimizer.pt")
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    holds(tmp_path / "checkpoint-3", {"": (model, optimizer)})


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "pytorch_model.bin", "config.json", "adapter_config.json"]
)
@pytest.mark.parametrize("text", [POINTER, "broken"], ids=["pointer", "broken"])
def test_a_source_that_cannot_be_read_is_skipped(tmp_path: Path, name: str, text: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = stepped(net.parameters())
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(net.state_dict(), tmp_path / "model.pt")
    (tmp_path / name).write_text(text)
    (tmp_path / "out").mkdir()
    report = lsf.convert(tmp_path, tmp_path / "out" / "x.safetensors")
    (warning,) = report.warnings
    assert warning.startswith(f"{tmp_path / name}: {LFS if text == POINTER else ''}")
    assert warning.endswith("; it was skipped")
    holds(tmp_path, {"": (net, optimizer)})


def test_a_config_of_something_else(tmp_path: Path) -> None:
    """As stable-baselines3's zoo and others write one; the model next to it names the state all the same."""
    net = nn.Linear(3, 4)
    optimizer = stepped(net.parameters())
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(net.state_dict(), tmp_path / "best_model.pt")
    (tmp_path / "config.json").write_text(json.dumps({"algo": "ppo", "n_envs": 8}))
    holds(tmp_path, {"": (net, optimizer)})


def test_nothing_left_but_what_was_skipped(tmp_path: Path) -> None:
    torch.save(stepped(nn.Linear(3, 4).parameters()).state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "adapter_model.safetensors").write_text(POINTER)
    with pytest.raises(MissingNamesError) as caught:
        lsf.read(tmp_path)
    assert NAME_IT.in_python() == (
        "pass names= with a file of names in optimizer order, the adapter file, or a folder with config.json and "
        "adapter_config.json"
    )
    assert str(caught.value).splitlines()[1:] == [
        f"  {tmp_path / 'adapter_model.safetensors'}: {LFS}; it was skipped",
        "hint: " + NAME_IT.in_python(),
    ]
    save_file({"a": torch.ones(4, 3), "b": torch.ones(4)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(MissingNamesError):
        lsf.read(tmp_path)
