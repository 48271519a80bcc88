"""Models rebuilt from their configs, against the models that were really built."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftConfig, PromptTuningConfig, VeraConfig, get_peft_model
from transformers import Trainer

from lora_state_format.errors import ConversionError, FileError, MissingDependencyError
from lora_state_format.model.states import Group, Optimizer, PositionalState
from lora_state_format.naming.order import candidates
from lora_state_format.torch.rebuild import describe, rebuild

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", SIZES),
    "Qwen2ForCausalLM": ("Qwen2Config", {**SIZES, "tie_word_embeddings": True}),
    "Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        {**SIZES, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "MistralForCausalLM": ("MistralConfig", SIZES),
    "GemmaForCausalLM": ("GemmaConfig", {**SIZES, "head_dim": 8}),
    "GPT2LMHeadModel": ("GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SIZES),
    "BertForSequenceClassification": ("BertConfig", SIZES),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4},
    ),
    "Phi3ForCausalLM": ("Phi3Config", {**SIZES, "pad_token_id": 0}),
}
NAMES = sorted(ARCHITECTURES)

EMBEDDINGS = {"GPT2LMHeadModel": "wte", "GPTNeoXForCausalLM": "embed_in", "T5ForConditionalGeneration": "shared",
              "BertForSequenceClassification": "word_embeddings"}  # fmt: skip
HEADS = {"BertForSequenceClassification": "classifier", "GPTNeoXForCausalLM": "embed_out"}
ATTENTION = {"GPT2LMHeadModel": ["c_attn"], "GPTNeoXForCausalLM": ["query_key_value"], "Phi3ForCausalLM": ["qkv_proj"],
             "BertForSequenceClassification": ["query", "value"], "T5ForConditionalGeneration": ["q", "v"]}  # fmt: skip
NORMS = {"GPT2LMHeadModel": ["ln_1"], "T5ForConditionalGeneration": ["layer_norm"],
         "BertForSequenceClassification": ["LayerNorm"]}  # fmt: skip


def base(architecture: str) -> Any:
    config, members = ARCHITECTURES[architecture]
    return getattr(transformers, architecture)(getattr(transformers, config)(**members))


def adapters(architecture: str) -> dict[str, PeftConfig]:
    attention = ATTENTION.get(architecture, ["q_proj", "v_proj"])
    norms = NORMS.get(architecture, ["input_layernorm"])
    task = {"BertForSequenceClassification": "SEQ_CLS", "T5ForConditionalGeneration": "SEQ_2_SEQ_LM"}
    task_type = task.get(architecture, "CAUSAL_LM")
    found: dict[str, PeftConfig] = {
        "lora": LoraConfig(r=4, target_modules="all-linear", task_type=task_type),
        "no task": LoraConfig(r=4, target_modules=attention),
        "dora": LoraConfig(r=4, use_dora=True, target_modules=attention, task_type=task_type),
        "rslora with biases": LoraConfig(
            r=4, use_rslora=True, bias="all", lora_bias=True, target_modules=attention, task_type=task_type
        ),
        "saved head": LoraConfig(
            r=4, target_modules=attention, modules_to_save=[HEADS.get(architecture, "lm_head")], task_type=task_type
        ),
        "embeddings": LoraConfig(
            r=4, target_modules=[*attention, EMBEDDINGS.get(architecture, "embed_tokens")], task_type=task_type
        ),
        "ia3": IA3Config(target_modules=attention, feedforward_modules=[], task_type=task_type),
        "vera": VeraConfig(r=4, target_modules=attention[:1], task_type=task_type),
        "ln tuning": LNTuningConfig(target_modules=norms, task_type=task_type),
    }
    if architecture == "Qwen3MoeForCausalLM":
        found["experts"] = LoraConfig(
            r=4, target_modules=attention, target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            task_type=task_type,
        )  # fmt: skip
    if architecture == "LlamaForCausalLM":
        found["prompt"] = PromptTuningConfig(num_virtual_tokens=3, task_type=task_type)
        found["pissa"] = LoraConfig(r=4, init_lora_weights="pissa", target_modules=attention, task_type=task_type)
    return found


@pytest.mark.parametrize("architecture", NAMES)
def test_a_full_model(architecture: str, tmp_path: Path) -> None:
    model = base(architecture)
    model.config.architectures = [architecture]
    model.config.save_pretrained(tmp_path)
    assert rebuild(tmp_path) == describe(model)


@pytest.mark.parametrize("architecture", NAMES)
def test_adapters(architecture: str, tmp_path: Path) -> None:
    """Each method's names, shapes, trainability, ties and classes are those of the model that was really built."""
    for label, config in adapters(architecture).items():
        model = base(architecture)
        # What a base model's own config names may have no head, or another one.
        model.config.architectures = None if label == "no task" else [architecture]
        model.config.save_pretrained(tmp_path)
        model = get_peft_model(model, config)
        model.save_pretrained(tmp_path)
        live = describe(model)
        assert rebuild(tmp_path) == live, label
        assert 0 < sum(item.trainable for item in live) < len(live), label


def test_what_is_described() -> None:
    config, members = ARCHITECTURES["Qwen2ForCausalLM"]
    model = transformers.Qwen2ForCausalLM(getattr(transformers, config)(**members))
    first, *_, last = describe(get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])))
    assert first.parameter.tied == ("base_model.model.lm_head.weight",)
    assert (first.trainable, first.classes) == (False, ("Embedding", "Module"))
    assert (last.name, last.classes) == ("base_model.model.model.norm.weight", ("Qwen2RMSNorm", "Module"))


@pytest.mark.parametrize("architecture", NAMES)
def test_the_trainers_split(architecture: str, tmp_path: Path) -> None:
    """The rule for this version of transformers, against its own Trainer."""
    model = base(architecture)
    model.config.architectures = [architecture]
    model.config.save_pretrained(tmp_path)
    own = set(Trainer.get_decay_parameter_names(None, model))
    names = [name for name, _ in model.named_parameters()]
    decayed, plain = [name for name in names if name in own], [name for name in names if name not in own]
    described = rebuild(tmp_path)
    sizes = tuple(Group(0, (), len(part)) for part in (decayed, plain))
    blank = PositionalState((Optimizer(),), sizes, tuple(range(len(names))), {})
    (candidate,) = candidates(blank, described, rule="trainer")
    assert candidate.names == [*decayed, *plain]


ERAS = ("trainer-4.47", "trainer-4.48", "trainer-4.52", "trainer")


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        # Qwen2.5-1.5B, Qwen3-0.6B, Llama-3.2-1B
        (
            {"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
             "architectures": ["Qwen2ForCausalLM"]},
            [(254, 84), (254, 84), (198, 140), (197, 141)],
        ),
        (
            {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
             "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
             "architectures": ["Qwen3ForCausalLM"]},
            [(310, 0), (310, 0), (254, 56), (197, 113)],
        ),
        (
            {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
             "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
             "architectures": ["LlamaForCausalLM"]},
            [(113, 33), (113, 33), (113, 33), (113, 33)],
        ),
    ],
)  # fmt: skip
def test_group_sizes_tell_the_version(config: dict[str, Any], sizes: list[tuple[int, int]], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    described = rebuild(tmp_path)
    for rule, pair in zip(ERAS, sizes, strict=True):
        groups = tuple(Group(0, (), size) for size in pair)
        blank = PositionalState((Optimizer(),), groups, tuple(range(sum(pair))), {})
        assert len(candidates(blank, described, rule=rule)) == 1, rule


def test_nothing_is_allocated(tmp_path: Path) -> None:
    """A model of 7 billion parameters; its config is of a base model, the adapter's configuration lies elsewhere."""
    config = transformers.LlamaConfig()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "base")
    LoraConfig(r=16, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path / "adapter")
    found = rebuild(tmp_path / "base", tmp_path / "adapter" / "adapter_config.json")
    assert sum(torch.Size(item.parameter.shape).numel() for item in found) > 6.7e9
    assert [item.trainable for item in found].count(True) == 64


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(expected: type[Exception] = ConversionError) -> str:
        with pytest.raises(expected) as caught:
            rebuild(tmp_path)
        return str(caught.value)

    assert message() == f"{tmp_path}: has no config.json, which describes the model"
    adapter = tmp_path / "adapter_config.json"
    adapter.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "some/base"}))
    assert (
        message()
        == f"{tmp_path}: has no config.json; put that of the base model, some/base, next to adapter_config.json"
    )
    versions = f"transformers {transformers.__version__} and peft {__import__('peft').__version__}"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["NoSuchModel"]}))
    failed = f"{tmp_path}: {versions} cannot build a model from its configs: "
    assert message() == failed + "config.json names no class that transformers has: ['NoSuchModel']"
    adapter.write_text(json.dumps({"peft_type": "NEWEST"}))
    assert message() == failed + "adapters of type 'NEWEST' are not known"
    adapter.write_text("{")
    assert message(FileError).startswith(f"{adapter}: not JSON: ")
    adapter.write_text("[]")
    assert message(FileError) == f"{adapter}: not a JSON object"
    adapter.unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nosuch"}))
    assert message().startswith(failed)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert message(MissingDependencyError) == (
        "names from configs need transformers and peft: pip install torch transformers peft"
    )


TINY = {"model_type": "qwen2", **SIZES, "architectures": ["Qwen2ForCausalLM"]}
LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]}


def hostile(folder: Path, config: dict[str, Any], adapter: dict[str, Any] | None = None) -> Path:
    """A folder of configs beside a module that tells when it is imported."""
    (folder / "config.json").write_text(json.dumps(config))
    if adapter is not None:
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    return folder


@pytest.mark.parametrize(
    ("config", "adapter"),
    [
        ({"model_type": "nosuch", "architectures": ["Mine"], "auto_map": {"AutoConfig": "mine.Config"}}, None),
        ({**TINY, "model_type": "t5", "auto_map": {"AutoModelForCausalLM": "mine.Model"}}, LORA),
        (TINY, {**LORA, "auto_mapping": {"base_model_class": "Mine", "parent_library": "mine"}, "task_type": "MINE"}),
        (TINY, {**LORA, "peft_type": "XLORA", "adapters": {"0": "."}}),
        (TINY, {**LORA, "peft_type": "SHADOW", "shadow_model": "."}),
        ({"model_type": "dpt", "architectures": ["DPTForDepthEstimation"], "use_pretrained_backbone": True,
          "backbone": "some/where"}, None),
    ],
    ids=range(6),
)  # fmt: skip
def test_a_config_that_needs_code_or_other_files_is_refused(
    config: dict[str, Any], adapter: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hostile(tmp_path, config, adapter)
    before = sorted(folder.rglob("*"))
    monkeypatch.syspath_prepend(str(folder))
    # Whoever asks, at a terminal too, whether to run a checkpoint's code gets no answer.
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with pytest.raises(ConversionError, match="cannot build a model from its configs"):
        rebuild(folder)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "members",
    [
        {"auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}},
        {"auto_map": 3},
        {"configuration_files": ["config.4.0.0.json"]},
        {"_attn_implementation": "kernels-community/flash-attn"},
        {"attn_implementation": "some/where"},
    ],
    ids=range(5),
)
def test_what_names_code_changes_nothing(members: dict[str, Any], tmp_path: Path) -> None:
    expected = rebuild(hostile(tmp_path, TINY, LORA))
    found = rebuild(hostile(tmp_path, {**TINY, **members}, {**LORA, "megatron_config": {}, "megatron_core": "mine"}))
    assert found == expected
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "members", [{"num_hidden_layers": 10**9}, {"num_labels": 10**9}, {"text_config": {"num_experts": 16385}}], ids=str
)
def test_counts_that_no_model_has(members: dict[str, Any], tmp_path: Path) -> None:
    config = hostile(tmp_path, {**TINY, **members}) / "config.json"
    ((key, count),) = members.get("text_config", members).items()
    with pytest.raises(FileError) as caught:
        rebuild(tmp_path)
    assert str(caught.value) == f"{config}: '{key}' is {count}, more than 16384"


@pytest.mark.parametrize(
    "members",
    [{"target_modules": "(([a-z0-9_.])+)+!"}, {"layer_replication": [[0, 2]] * 100_000}],
    ids=["re", "copies"],
)
def test_what_takes_for_ever_is_stopped(
    members: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_state_format.torch.rebuild.MAX_SECONDS", 1)
    rebuild(hostile(tmp_path, TINY, LORA))
    with pytest.raises(ConversionError, match="cannot build a model from its configs: it takes more than 1 s"):
        rebuild(hostile(tmp_path, TINY, {**LORA, **members}))


@pytest.mark.parametrize(
    "members",
    [{"hidden_size": 10**400}, {"hidden_size": "x"}, {"num_attention_heads": 0}, {"num_hidden_layers": -1},
     {"model_type": []}, {"architectures": [1]}, {"architectures": ["pipeline"]}, {"rope_parameters": 3},
     {"hidden_act": "os.system"}, {"dtype": "load"}, {"experts_implementation": "kernels-community/x"}],
    ids=str,
)  # fmt: skip
def test_what_these_libraries_raise_is_said_in_words(members: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="cannot build a model from its configs"):
        rebuild(hostile(tmp_path, {**TINY, **members}))
