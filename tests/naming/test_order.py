"""Which parameter an id means: every grouping rule, and the verdict on real checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import lora_state_format as lsf
from lora_state_format import registry
from lora_state_format.errors import AmbiguousOrderError, ConversionError, OptionError
from lora_state_format.foreign import pickles
from lora_state_format.foreign.state_dict import from_state_dict
from lora_state_format.io.safetensors import read_header
from lora_state_format.model.sources import File, Memory
from lora_state_format.model.states import Group, Optimizer, Parameter, PositionalState, Role, Slot, Value
from lora_state_format.model.tensors import contiguous
from lora_state_format.naming.names import adapter_parameters
from lora_state_format.naming.order import candidates, decide, interchangeable
from lora_state_format.naming.rules import RULES, Described

if TYPE_CHECKING:
    import torch

WILD = Path(__file__).parents[2] / ".." / "shared" / "wild"
LAYER = "model.layers.{}.{}.weight"


def slot(shape: Sequence[int], role: Role = Role.PARAM, dtype: str = "U8") -> Slot:
    """A slot of zeros, one byte an element."""
    count = 1
    for size in shape:
        count *= size
    return Slot(contiguous(dtype, shape, Memory(bytes(count))), role)


def state(
    groups: Sequence[Sequence[Parameter]],
    *,
    options: Sequence[dict[str, Value]] | None = None,
    names: Sequence[str] | None = None,
    ids: Sequence[int | str] | None = None,
) -> PositionalState:
    """The state that an optimizer over these groups writes."""
    parameters = [parameter for group in groups for parameter in group]
    ids = tuple(range(len(parameters))) if ids is None else tuple(ids)
    return PositionalState(
        optimizers=(Optimizer(),),
        groups=tuple(
            Group(0, tuple((options or [{}] * len(groups))[n].items()), len(group)) for n, group in enumerate(groups)
        ),
        ids=ids,
        entries={i: {"exp_avg": slot(p.shape)} for i, p in zip(ids, parameters, strict=True)},
        names=None if names is None else tuple(names),
    )


def parameter(name: str, *shape: int, adapter: str | None = None) -> Parameter:
    return Parameter(name, shape, None, adapter=adapter)


def described(name: str, shape: tuple[int, ...], classes: str = "", *, trainable: bool = True) -> Described:
    return Described(Parameter(name, shape, None), trainable, tuple(classes.split()))


def order(rule: str, parameters: Sequence[Described], sizes: Sequence[int], **options: Value) -> list[list[str]]:
    """The names in each group as a rule sorts them; each group's options are the same."""
    found = [p.parameter for p in parameters][: sum(sizes)]
    blank = PositionalState(
        (Optimizer(),),
        tuple(Group(0, tuple(options.items()), size) for size in sizes),
        tuple(range(sum(sizes))),
        {},
    )
    (candidate,) = candidates(blank, parameters, rule=rule)
    names = iter(candidate.names)
    assert len(found) == len(candidate.names)
    return [[next(names) for _ in range(size)] for size in sizes]


# --- rules ----------------------------------------------------------------------------------------------------------

FULL = [
    described("model.embed_tokens.weight", (8, 4), "Embedding"),
    described("model.layers.0.self_attn.q_proj.weight", (4, 4), "Linear"),
    described("model.layers.0.self_attn.q_proj.bias", (4,), "Linear"),
    described("model.layers.0.input_layernorm.weight", (4,), "Qwen2RMSNorm"),
    described("model.norm.weight", (4,), "Qwen2RMSNorm"),
    described("lm_head.weight", (8, 4), "Linear"),
]
EMBED, Q, BIAS, NORM, LAST, HEAD = (item.name for item in FULL)

PREFIX = "base_model.model."
LORA = [
    described(PREFIX + "model.embed_tokens.lora_embedding_A.default", (2, 8), "ParameterDict"),
    described(PREFIX + "model.embed_tokens.lora_embedding_B.default", (4, 2), "ParameterDict"),
    described(PREFIX + "model.layers.0.mlp.up_proj.base_layer.weight", (8, 4), "Linear", trainable=False),
    described(PREFIX + "model.layers.0.mlp.up_proj.lora_A.default.weight", (2, 4), "Linear"),
    described(PREFIX + "model.layers.0.mlp.up_proj.lora_B.default.weight", (8, 2), "Linear"),
    described(PREFIX + "model.layers.0.mlp.up_proj.lora_B.default.bias", (8,), "Linear"),
    described(PREFIX + "lm_head.modules_to_save.default.weight", (8, 4), "Linear"),
]
EA, EB, FROZEN, LA, LB, LBIAS, SAVED = (item.name for item in LORA)


@pytest.mark.parametrize(
    ("rule", "groups"),
    [
        ("trainer", [[EMBED, Q, HEAD], [BIAS, NORM, LAST]]),
        ("trainer-4.52", [[EMBED, Q, LAST, HEAD], [BIAS, NORM]]),
        ("trainer-4.48", [[EMBED, Q, NORM, LAST, HEAD], [BIAS]]),
        ("trainer-4.47", [[EMBED, Q, NORM, LAST, HEAD], [BIAS]]),
        ("trainer-4.33", [[EMBED, Q, NORM, LAST, HEAD], [BIAS]]),
        ("trainer-4.0", [[EMBED, Q, NORM, LAST, HEAD], [BIAS]]),
        ("scripts", [[EMBED, Q, NORM, LAST, HEAD], [BIAS]]),
        ("nanogpt", [[EMBED, Q, HEAD], [BIAS, NORM, LAST]]),
        ("llamafactory-badam", [[BIAS, NORM, LAST], [EMBED, Q, HEAD]]),
        ("axolotl", [[Q], [EMBED, HEAD], [BIAS, NORM, LAST]]),
        ("flat", [[EMBED, Q, BIAS, NORM, LAST, HEAD]]),
        ("one-per-parameter", [[EMBED], [Q], [BIAS], [NORM], [LAST], [HEAD]]),
        ("sorted", [sorted([EMBED, Q, BIAS, NORM, LAST, HEAD])]),
    ],
)
def test_rules_on_a_full_model(rule: str, groups: list[list[str]]) -> None:
    assert order(rule, FULL, [len(group) for group in groups]) == groups


@pytest.mark.parametrize(
    ("rule", "groups"),
    [
        ("trainer", [[EA, EB, LA, LB, SAVED], [LBIAS]]),
        ("peft-loraplus", [[LA, SAVED], [EA, EB], [LB], [LBIAS]]),
        ("peft-loraplus", [[EA, EB, LA, SAVED], [], [LB], [LBIAS]]),
        ("llamafactory-loraplus", [[EA, LA, SAVED], [LB], [LBIAS], [EB]]),
        ("axolotl", [[LA, LB], [EA, EB, SAVED], [LBIAS]]),
        ("unsloth", [[EA, EB, LA, LB, LBIAS], [SAVED]]),
        ("everything", [[EA, EB, FROZEN, LA, LB, LBIAS, SAVED]]),
    ],
)
def test_rules_on_an_adapter(rule: str, groups: list[list[str]]) -> None:
    assert order(rule, LORA, [len(group) for group in groups]) == groups


def test_registered_norms_by_version() -> None:
    """A version spares the classes that its models had registered: torch's own always, Gemma's in some."""
    kinds = ("LlamaRMSNorm", "GemmaRMSNorm", "LayerNorm")
    model = [described(f"w{n}.weight", (4,), kind) for n, kind in enumerate(kinds)]
    assert order("trainer-4.0", model, [2, 1])[1] == ["w2.weight"]
    assert order("trainer-4.47", model, [0, 3])[1] == ["w0.weight", "w1.weight", "w2.weight"]
    assert order("trainer-4.48", model, [1, 2])[1] == ["w0.weight", "w2.weight"]
    assert order("trainer-4.33", model, [2, 1])[1] == ["w2.weight"]
    assert order("trainer-4.33", [described("a", (4,), "T5LayerNorm"), described("b", (4,))], [1, 1]) == [["b"], ["a"]]
    assert order("trainer-4.0", [described("a", (4,), "T5LayerNorm"), described("b", (4,))], [2, 0]) == [["a", "b"], []]
    assert order("trainer", model, [2, 1])[1] == ["w2.weight"]
    assert order("scripts", [described("a.LayerNorm.weight", (4,)), described("b.weight", (4,))], [1, 1]) == [
        ["b.weight"],
        ["a.LayerNorm.weight"],
    ]


def test_frozen_parameters_are_in_the_groups_of_old_trainers() -> None:
    frozen = [described("a.weight", (4, 4), trainable=False), described("a.bias", (4,)), described("b.weight", (4, 4))]
    assert order("trainer-4.25", frozen, [2, 1]) == [["a.weight", "b.weight"], ["a.bias"]]
    assert candidates(state([[item.parameter for item in FULL]]), FULL, rule="trainer-4.25") == []


def test_muon_joins_its_lists() -> None:
    assert order("muon", FULL, [6], ns_steps=5) == [[Q, EMBED, BIAS, NORM, LAST, HEAD]]
    assert candidates(state([[p.parameter for p in FULL]]), FULL, rule="muon") == []


@pytest.mark.parametrize(
    ("rule", "groups"),
    [
        ("galore", [[EMBED, BIAS, NORM, LAST, HEAD], [Q]]),
        ("llamafactory-galore", [[BIAS, NORM, LAST], [EMBED, HEAD], [Q]]),
        ("swift-galore", [[Q], [EMBED, HEAD], [BIAS, NORM, LAST]]),
    ],
)
def test_low_rank_optimizers(rule: str, groups: list[list[str]]) -> None:
    """Their groups say a rank; which linear layers they project is not in the file, but how many is."""
    assert order(rule, FULL, [len(group) for group in groups], rank=4) == groups
    with pytest.raises(ConversionError):
        decide(state([[p.parameter for p in FULL]] * 1), FULL, rule=rule, source="configs")


def test_swift_multimodal() -> None:
    names = ["model.visual.blocks.0.weight", "model.visual.blocks.0.bias", "model.visual.merger.weight",
             "model.language_model.layers.0.weight", "model.language_model.layers.0.bias"]  # fmt: skip
    vision, vision_bias, aligner, language, language_bias = names
    model = [described(name, (4,)) for name in names]
    assert order("swift-multimodal", model, [1, 1, 1, 1, 1]) == [
        [vision_bias], [vision], [aligner], [language_bias], [language]
    ]  # fmt: skip


def test_every_rule_is_listed_once_with_what_it_is() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES) == 30
    assert [rule.name for rule in RULES if not rule.automatic] == ["parts", "sorted", "listed"]
    assert all(rule.summary for rule in RULES)


# --- what a file itself tells ---------------------------------------------------------------------------------------


def test_ids_that_are_places_in_the_whole_model() -> None:
    """Lightning's FSDP: ids count frozen parameters too, and stand in any order."""
    found = state([[LORA[n].parameter for n in (4, 3, 6)]], ids=[4, 3, 6])
    named = decide(found, LORA, source="model")
    assert list(named) == [LB, LA, SAVED]
    assert named.naming.rule == "whole-model"
    assert [p.original_id for p in named.parameters] == [4, 3, 6]


def test_names_in_the_file_in_any_case() -> None:
    """Adam-mini makes a group of each parameter and lowers its name."""
    turned = [LORA[4], LORA[3]]
    found = state([[p.parameter] for p in turned], names=[p.name.lower() for p in turned])
    named = decide(found, [LORA[3], LORA[4]], source="adapter")
    assert list(named) == [LB, LA]
    assert named.naming.rule == "stated"
    unknown = state([[p.parameter] for p in turned], names=["a", "b"])
    assert candidates(unknown, [LORA[3], LORA[4]], rule="stated") == []


def test_weight_decay_speaks_against_a_rule() -> None:
    """Both groups decay, so the second is not the one without weight decay."""
    model = [parameter("a.weight", 4), parameter("b.bias", 4)]
    found = state([[model[0]], [model[1]]], options=[{"weight_decay": 0.1}, {"weight_decay": 0.1}])
    with pytest.raises(ConversionError) as caught:
        decide(found, model, rule="trainer", source="adapter")
    assert str(caught.value) == (
        "no order of the 2 parameters fits the 2 of the optimizer, whose groups hold [1, 1]:\n"
        "  trainer: gives group 1 no weight decay, but it has 0.1"
    )


@pytest.mark.parametrize(
    ("shape", "entry"),
    [
        ((6, 4), {"exp_avg": slot((6, 4))}),
        ((6, 4), {"row": slot((6,), Role.ROW), "col": slot((4,), Role.COL)}),
        ((6, 4), {"row": slot((6, 1), Role.ROW), "col": slot((1, 4), Role.COL)}),
        ((2, 6, 4), {"row": slot((2, 6), Role.ROW), "col": slot((2, 4), Role.COL)}),
        ((6, 4), {"state1": slot((6, 4), Role.BLOCK), "absmax1": slot((1,), Role.BLOCK)}),
        ((6, 4), {"codes": slot((12,), Role.BLOCK)}),
        ((6, 4), {"state1": slot((2, 6, 4), Role.BLOCK)}),
        ((6, 4), {"GG": [slot((6, 6), Role.OPAQUE)], "step": 3}),
    ],
)
def test_shapes_by_role(shape: tuple[int, ...], entry: dict[str, Value]) -> None:
    """Every slot that says something of its parameter's shape is asked, whatever it holds."""
    found = PositionalState((Optimizer(),), (Group(0, (), 1),), (0,), {0: entry})
    assert len(candidates(found, [parameter("a", *shape)])) == 1
    other = candidates(found, [parameter("a", 5, 5)])
    assert len(other) == ("GG" in entry)


# --- the verdict ----------------------------------------------------------------------------------------------------


def test_rules_that_agree_are_one_candidate() -> None:
    model = [parameter(f"layers.{n}.lora_{side}.default.weight", 4, 4) for n in range(2) for side in "AB"]
    named = decide(state([model, []]), model, source="adapter")
    assert list(named) == [p.name for p in model]
    assert named.naming.rule == "trainer"
    assert named.naming.details["interchangeable"] == 4
    rules = named.naming.details["rules"]
    assert isinstance(rules, list)
    assert {"trainer", "trainer-4.47", "nanogpt", "unsloth"} <= set(rules)


def test_each_order_of_a_rule_has_a_label_of_its_own() -> None:
    """Evidence says by label which rival is excluded: of three alike parts five are rivals, not one."""
    parts = [described(f"{n}.weight", (2, 3)) for n in "abc"]
    found = candidates(state([[part.parameter] for part in parts]), parts, rule="parts")
    assert [candidate.rules for candidate in found] == [
        ("parts",), *((f"parts, way {n}",) for n in range(2, 7))
    ]  # fmt: skip
    assert len({tuple(candidate.names) for candidate in found}) == 6


def test_a_live_optimizers_order_goes_first() -> None:
    """Its empty groups do not count, and where it does not fit the rules are asked."""
    model = [parameter(name, 4) for name in ("a.weight", "b.weight", "c.weight")]
    found = state([model, []])
    live = [["c.weight", "a.weight", "b.weight"]]
    named = decide(found, model, source="model", live=live)
    assert (list(named), named.naming.rule) == (live[0], "live")
    for misfit in ([["a.weight"]], [["a.weight", "b.weight", "unknown"]], [live[0][:2], live[0][2:]]):
        named = decide(found, model, source="model", live=misfit)
        assert (list(named), named.naming.rule) == (["a.weight", "b.weight", "c.weight"], "trainer")


def test_unknown_rule() -> None:
    with pytest.raises(OptionError) as caught:
        decide(state([]), [], rule="alphabetical", source="names")
    assert str(caught.value) == (
        "no grouping rule 'alphabetical'; there are: stated, flat, everything, trainer, trainer-4.52, trainer-4.48, "
        "trainer-4.47, trainer-4.33, trainer-4.0, trainer-4.25, scripts, nanogpt, timm, torchvision, ultralytics, "
        "peft-loraplus, llamafactory-loraplus, llamafactory-badam, "
        "llamafactory-galore, muon, galore, axolotl, unsloth, swift-multimodal, swift-galore, one-per-parameter, "
        "whole-model, parts, sorted, listed"
    )


def test_nothing_fits() -> None:
    model = [parameter("a.lora_A.weight", 4, 8), parameter("a.lora_B.weight", 8, 4)]
    frozen = described("a.weight", (8, 8), trainable=False)
    narrow = state([[parameter("", 2, 8), parameter("", 8, 2)]])
    with pytest.raises(ConversionError) as caught:
        decide(narrow, [frozen, *model], source="configs")
    assert str(caught.value) == (
        "no order of the 3 (2 trainable) parameters fits the 2 of the optimizer, whose groups hold [2]:\n"
        "  flat, axolotl, swift-multimodal: 'a.lora_A.weight' has shape [4, 8], but id 0 has exp_avg of shape [2, 8] "
        "(half the rank: the adapter may be one that was converted from PiSSA or OLoRA when it was saved)\n"
        "  everything: makes groups of [3]\n"
        "  trainer, trainer-4.52, trainer-4.48, trainer-4.47, trainer-4.33, trainer-4.0, scripts, nanogpt, "
        "torchvision, unsloth: makes groups of [2, 0]\n"
        "  trainer-4.25: makes groups of [3, 0]\n"
        "  timm, llamafactory-badam: makes groups of [0, 2]\n"
        "  ultralytics: makes groups of [0, 3, 0]\n"
        "  peft-loraplus: makes groups of [1, 0, 1, 0]\n"
        "  llamafactory-loraplus: makes groups of [1, 1, 0, 0]\n"
        "  one-per-parameter: makes groups of [1, 1]\n"
        "hint: pass names= with a file of names in optimizer order, or the model that was trained"
    )


def test_a_layerwise_optimizers_dummy() -> None:
    dummy = PositionalState((Optimizer(),), (Group(0, (), 1),), (0,), {})
    with pytest.raises(ConversionError) as caught:
        decide(dummy, [parameter("a.weight", 4, 4), parameter("b.weight", 4, 4)], source="adapter")
    assert str(caught.value).endswith(
        "\nhint: a layer-wise optimizer leaves one dummy parameter here; its moments are in no file"
    )


def test_orders_that_disagree() -> None:
    """Two adapters in one optimizer: their files do not say which was made first."""
    model = [
        parameter(f"base_model.model.layers.{n}.up.lora_{side}.{adapter}.weight", *shape, adapter=adapter)
        for n in range(2)
        for side, shape in (("A", (2, 4)), ("B", (4, 2)))
        for adapter in ("default", "second")
    ]
    with pytest.raises(AmbiguousOrderError) as caught:
        decide(state([model]), model, source="adapter")
    assert str(caught.value) == (
        "2 orders fit, and there are no weights to tell which it is; they differ for 8 of 8 parameters, from position "
        "0 on:\n"
        "  flat, axolotl, swift-multimodal: 'base_model.model.layers.0.up.lora_A.default.weight'\n"
        "  flat, adapters second, default, axolotl, adapters second, default, swift-multimodal, adapters second, "
        "default: 'base_model.model.layers.0.up.lora_A.second.weight'\n"
        "8 parameters share their shape with another, so shapes cannot tell either\n"
        "hint: force one with rule=, or pass the weights that were saved with the state"
    )
    assert caught.value.candidates == ("flat", "flat, adapters second, default")
    assert list(decide(state([model]), model, source="model")) == [p.name for p in model]


def test_interchangeable() -> None:
    assert interchangeable([parameter("a", 2), parameter("b", 2), parameter("c", 3)]) == 2


# --- genuine checkpoints --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A checkpoint folder, the live optimizer's slots by the live model's names in its order, and the base's config."""

    folder: Path
    slots: dict[str, dict[str, torch.Tensor]]
    config: Path


def base_model(kind: str) -> Any:
    import transformers

    heads = 4 if kind == "Llama" else 2
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=heads, max_position_embeddings=32, tie_word_embeddings=kind == "Qwen2",
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def adapted(**options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    chosen = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return get_peft_model(base_model("Qwen2"), LoraConfig(**chosen))


def loraplus(model: Any) -> Any:
    from peft.optimizers import create_loraplus_optimizer
    from torch.optim import AdamW

    return create_loraplus_optimizer(model, AdamW, lr=1e-3, loraplus_lr_ratio=4.0)


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any] | None, str, list[int]]] = {
    "lora": (adapted, None, "trainer", [42, 0]),
    "dora": (lambda: adapted(use_dora=True), None, "trainer", [63, 0]),
    "biases and a saved head": (
        lambda: adapted(bias="lora_only", lora_bias=True, modules_to_save=["lm_head"]), None, "trainer", [43, 30]
    ),
    "loraplus": (adapted, loraplus, "peft-loraplus", [21, 0, 21, 0]),
    "full qwen2": (lambda: base_model("Qwen2"), None, "trainer", [22, 16]),
    "full llama": (lambda: base_model("Llama"), None, "trainer", [23, 7]),
}  # fmt: skip
"""Model, optimizer (the Trainer's own if none), the rule, and the group sizes."""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """Each case of ``CASES``, trained for 3 steps by transformers' Trainer when it is first asked for."""
    done: dict[str, Trained] = {}

    def train(case: str) -> Trained:
        if case not in done:
            done[case] = _train(case, tmp_path_factory.mktemp("trained"))
        return done[case]

    return train


def _train(case: str, folder: Path) -> Trained:
    import torch
    from transformers import Trainer, TrainingArguments

    build, make, *_ = CASES[case]
    torch.manual_seed(0)
    model = build()
    rows = torch.randint(0, 64, (12, 16))
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=3, save_steps=3, learning_rate=1e-3,
        lr_scheduler_type="constant", weight_decay=0.01, optim="adamw_torch", use_cpu=True, report_to=[],
        logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    optimizers = (make(model), None) if make else (None, None)
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model=model, args=arguments, train_dataset=data, optimizers=optimizers)
    trainer.train()
    names = {id(p): name for name, p in model.named_parameters()}
    live = trainer.optimizer.optimizer
    slots = {names[id(p)]: dict(live.state[p]) for group in live.param_groups for p in group["params"]}
    config = folder / "config"
    shutil.copytree(folder / "checkpoint-3", config)
    (config / "optimizer.pt").unlink()
    (
        getattr(model, "base_model", model).config if case.startswith("full") else model.get_base_model().config
    ).save_pretrained(config)
    return Trained(folder / "checkpoint-3", slots, config)


def verdict(state: lsf.OptimizerState) -> str:
    evidence = state.naming.details["evidence"]
    assert isinstance(evidence, dict)
    return str(evidence["verdict"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("source", ["path", "configs"])
def test_a_genuine_checkpoint(trained: Callable[[str], Trained], case: str, source: str) -> None:
    """With nothing but its path, and with names from configs, every slot has the live model's name."""
    found, (*_, rule, sizes) = trained(case), CASES[case]
    with lsf.read(found.folder, names=found.config if source == "configs" else None) as named:
        assert list(named) == list(found.slots)
        for name, slots in found.slots.items():
            assert named[name]["exp_avg"].torch().equal(slots["exp_avg"]), name
            assert named[name]["exp_avg_sq"].torch().equal(slots["exp_avg_sq"]), name
        assert [group.count for group in named.groups] == sizes
        assert named.naming.rule == rule
        assert named.naming.source == ("configs" if source == "configs" or case.startswith("full") else "adapter")
        assert verdict(named) in {"confirmed", "partly"}


@pytest.mark.filterwarnings("ignore")
def test_a_flat_script(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    """One group of ``filter(requires_grad, parameters())``, saved beside the adapter by hand."""
    import torch

    torch.manual_seed(0)
    model = adapted()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-3)
    tokens = torch.randint(0, 64, (4, 16))
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with lsf.read(tmp_path) as named:
        assert list(named) == list(trainable)
        assert all(named[n]["exp_avg"].torch().equal(optimizer.state[p]["exp_avg"]) for n, p in trainable.items())
        assert (named.naming.rule, verdict(named)) == ("flat", "confirmed")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("made", [("default", "second"), ("second", "default")])
def test_two_adapters_in_either_order_of_creation(made: tuple[str, str], tmp_path: Path) -> None:
    """The files of adapters do not say which was made first; the weights do."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base_model("Qwen2"), config, adapter_name=made[0])
    model.add_adapter(made[1], config)
    model.base_model.set_adapter(list(made))
    live = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(live.values(), lr=1e-3)
    tokens = torch.randint(0, 64, (4, 16))
    for _ in range(12):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_file({name: p.detach().contiguous() for name, p in live.items()}, tmp_path / "weights.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    weights = read_header(File(tmp_path / "weights.safetensors")).tensors
    positional = from_state_dict(pickles.load(File(tmp_path / "optimizer.pt")).value)
    places = dict.fromkeys(name.replace(".second.", ".default.") for name in live)
    listed = [
        parameter(name, *live[name].shape, adapter=adapter)
        for place in places
        for adapter in ("default", "second")
        if (name := place.replace(".default.", f".{adapter}."))
    ]
    named = decide(positional, listed, weights=weights, source="adapter")
    assert list(named) == list(live)
    assert named.naming.rule == ("flat" if made[0] == "default" else "flat, adapters second, default")
    assert verdict(named) in {"confirmed", "partly"}


# --- wrong orders, written into real checkpoints --------------------------------------------------------------------


def swapped(left: str, right: str) -> Callable[[str], str]:
    return lambda name: name.replace(left, "\0").replace(right, left).replace("\0", right)


def layers(change: Callable[[int, int], int], count: int) -> Callable[[str], str]:
    def moved(name: str) -> str:
        head, mark, tail = name.partition("layers.")
        number, _, rest = tail.partition(".")
        return f"{head}{mark}{change(int(number), count)}.{rest}" if mark else name

    return moved


WRONG: dict[str, Callable[[int], Callable[[str], str]]] = {
    "reversed": lambda n: layers(lambda layer, count: count - 1 - layer, n),
    "shifted": lambda n: layers(lambda layer, count: (layer + 1) % count, n),
    "two layers": lambda n: layers(lambda layer, count: {0: 1, 1: 0}.get(layer, layer), n),
    "sorted as text": lambda n: layers(lambda layer, count: int(sorted(map(str, range(count)))[layer]), n),
    "q and o": lambda n: swapped("q_proj", "o_proj"),
    "k and v": lambda n: swapped("k_proj", "v_proj"),
    "gate and up": lambda n: swapped("gate_proj", "up_proj"),
    "q and o of one layer": lambda n: swapped("layers.1.self_attn.q_proj", "layers.1.self_attn.o_proj"),
    "A of q and o of one layer": lambda n: swapped("1.self_attn.q_proj.lora_A", "1.self_attn.o_proj.lora_A"),
}


def miswritten(found: Path, names: list[str], target: Path, move: Callable[[str], str]) -> Path:
    """The checkpoint with each parameter's state under the id of another one."""
    import torch

    shutil.copytree(found, target)
    content = torch.load(found / "optimizer.pt", weights_only=True)
    ids = [identity for group in content["param_groups"] for identity in group["params"]]
    where = dict(zip(names, ids, strict=True))
    content["state"] = {where[name]: content["state"][where.get(move(name), where[name])] for name in names}
    torch.save(content, target / "optimizer.pt")
    return target


def said(path: Path, **options: Any) -> str:
    """The verdict, or ``refused``."""
    try:
        with lsf.read(path, **options) as named:
            return verdict(named)
    except ConversionError:
        return "refused"


@pytest.mark.parametrize("wrong", list(WRONG))
def test_a_wrong_order_of_an_adapter(wrong: str, founding: Any, tmp_path: Path) -> None:
    path = miswritten(founding.path, list(founding.slots), tmp_path / "wrong", WRONG[wrong](28))
    assert said(path) in ({"refused", "partly"} if wrong.endswith("one layer") else {"refused"})
    forced = said(path, rule="trainer")  # forced, it is converted, and the verdict says what of it is left
    assert forced in ({"contradicted", "partly"} if wrong.endswith("one layer") else {"contradicted"})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrong", ["reversed", "shifted", "two layers", "q and o", "k and v", "gate and up"])
@pytest.mark.parametrize("case", ["full qwen2", "full llama"])
def test_a_wrong_order_of_a_full_model(
    wrong: str, case: str, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    found = trained(case)
    path = miswritten(found.folder, list(found.slots), tmp_path / "wrong", WRONG[wrong](3))
    assert said(path) in {"refused", "inconclusive"}


def test_a_live_order_that_the_weights_contradict(founding: Any) -> None:
    """A rule that they bear out takes its place; where they bear out none, the live order stands, contradicted."""
    checkpoint = registry.read(founding.path)
    assert isinstance(checkpoint.state, PositionalState)
    parameters = adapter_parameters(checkpoint.weights)
    live = [[WRONG["reversed"](28)(name) for name in founding.slots]]
    named = decide(checkpoint.state, parameters, weights=checkpoint.weights, live=live, source="model")
    assert (list(named), named.naming.rule) == (list(founding.slots), "trainer")
    names = [WRONG["shifted"](28)(name) for name in founding.slots]
    moved = [p for name in names for p in parameters if p.name == name]
    named = decide(checkpoint.state, moved, weights=checkpoint.weights, live=live, source="model")
    assert (list(named), named.naming.rule, verdict(named)) == (live[0], "live", "contradicted")


def test_sorted_names_are_refused_by_shapes(founding: Any, tmp_path: Path) -> None:
    names = list(founding.slots)
    turned = dict(zip(names, sorted(names), strict=True))
    assert said(miswritten(founding.path, names, tmp_path / "wrong", turned.__getitem__)) == "refused"


def test_what_is_said_of_a_contradicted_order(founding: Any, tmp_path: Path) -> None:
    path = miswritten(founding.path, list(founding.slots), tmp_path / "wrong", WRONG["reversed"](28))
    with pytest.raises(ConversionError) as caught:
        lsf.read(path)
    first, second, *_, hint = str(caught.value).splitlines()
    assert first == (
        "the order of the parameters does not fit their weights, which say that these belong together instead:"
    )
    assert second == "  layers reversed"
    assert hint == "hint: pass names= in the optimizer's order, or force the order with rule="


# --- other people's checkpoints -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("folder", "rule", "expected"),
    [
        ("bert-lora-adamw-3", "trainer", "partly"),
        ("gpt2-lora-adamw-500", "trainer", "confirmed"),
        ("gpt2-lora-adamw-7500", "trainer", "confirmed"),
        ("llama-lora-bnb8-32", "trainer", "confirmed"),
        ("t5-adafactor", "trainer-4.0", None),
    ],
)
def test_a_wild_checkpoint(folder: str, rule: str, expected: str | None) -> None:
    """Named with nothing but the path, and weighed: at step 7,500 too."""
    path = WILD / folder
    if not path.exists():
        pytest.skip("the collection of other people's checkpoints is not here")
    with lsf.read(path) as named:
        assert [p.foreign_names.get("peft", p.name) for p in named.parameters] == json.loads(
            (path / "names.json").read_text()
        )["names"]
        assert named.naming.rule == rule
        if expected:
            assert verdict(named) == expected


# --- Lightning ------------------------------------------------------------------------------------------------------


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore")
def test_a_lightning_checkpoint(tmp_path: Path) -> None:
    """Its state dict is pickled, so its names stand in the model's order: the path is enough."""
    import lightning
    import torch

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = adapted()

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(input_ids=batch, labels=batch).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    torch.manual_seed(0)
    module = Module()
    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    rows: Any = torch.randint(0, 64, (12, 16))
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    live = {name: p for name, p in module.named_parameters() if p.requires_grad}
    moments = trainer.optimizers[0].state
    with lsf.read(tmp_path / "last.ckpt") as named:
        assert list(named) == list(live)
        assert all(named[name]["exp_avg"].torch().equal(moments[p]["exp_avg"]) for name, p in live.items())
        assert verdict(named) in {"confirmed", "partly"}
