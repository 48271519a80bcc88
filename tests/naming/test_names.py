"""Names, checked against PEFT: every adapter is made, saved and read back by the real library."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lora_state_format.errors import ConversionError, MissingNamesError, OptionError
from lora_state_format.model.sources import Memory
from lora_state_format.model.tensors import Tensor, contiguous
from lora_state_format.naming.modules import ORDERS, in_module_order
from lora_state_format.naming.names import (
    adapter_parameters,
    peft_key,
    read_names,
    rename,
    split_adapter,
    strip_wrappers,
    with_adapter,
    without_wrappers,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape:UserWarning:peft"),
]


def tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {key: contiguous("F32", shape, Memory(b"")) for key, shape in shapes.items()}


def base(head: str = "Qwen2ForCausalLM", layers: int = 1) -> Any:
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    return getattr(transformers, head)(config)


def saved(model: Any, folder: Path, adapter: str = "default") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``save_pretrained`` writes: the tensors' keys and shapes, and the configuration."""
    from safetensors import safe_open

    model.save_pretrained(folder)
    folder = folder if adapter == "default" else folder / adapter
    with safe_open(folder / "adapter_model.safetensors", "np") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return tensors(shapes), json.loads((folder / "adapter_config.json").read_text())


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("LoraConfig", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "embedding": ("LoraConfig", {"target_modules": ["embed_tokens", "q_proj"]}),
    "dora": ("LoraConfig", {"target_modules": ["q_proj", "k_proj"], "use_dora": True}),
    "dora_embedding": ("LoraConfig", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "lora_bias": ("LoraConfig", {"target_modules": ["q_proj"], "lora_bias": True}),
    "bias_lora_only": ("LoraConfig", {"target_modules": ["q_proj", "k_proj"], "bias": "lora_only"}),
    "modules_to_save": ("LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "modules_with_modules": ("LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "tokens_beside_lora": ("LoraConfig", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
    "tokens": ("TrainableTokensConfig", {"token_indices": [1, 2]}),
    "adalora": ("AdaLoraConfig", {"target_modules": ["q_proj"], "total_step": 10}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "vera": ("VeraConfig", {"target_modules": ["q_proj", "v_proj"], "r": 4}),
    "ln_tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}),
    "loha": ("LoHaConfig", {"target_modules": ["q_proj"], "r": 4}),
    "lokr": ("LoKrConfig", {"target_modules": ["q_proj"], "r": 4}),
    "oft": ("OFTConfig", {"target_modules": ["q_proj"], "oft_block_size": 4, "r": 0}),
    "prompt": ("PromptTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}),
    "prefix": ("PrefixTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("adapter", ["default", "k_proj"])
def test_the_keys_of_every_method_turn_back_into_the_names_of_the_model(
    method: str, adapter: str, tmp_path: Path
) -> None:
    import peft

    kind, options = METHODS[method]
    model = peft.get_peft_model(base(), getattr(peft, kind)(**options), adapter_name=adapter)
    live = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    keys, config = saved(model, tmp_path, adapter)

    found = adapter_parameters(keys, adapter, config)

    assert {p.name: p.shape for p in found} == live
    assert [p.name for p in found] == list(live)
    assert all(p.foreign_names["peft"] in keys for p in found)
    for parameter in found:
        own = parameter.adapter is not None
        assert (peft_key(parameter.name) == (parameter.foreign_names["peft"], adapter)) is own


def test_a_head_that_peft_saves_by_itself_is_trainable(tmp_path: Path) -> None:
    import peft

    options = {"task_type": "SEQ_CLS", "target_modules": ["q_proj"]}
    model = peft.get_peft_model(base("Qwen2ForSequenceClassification"), peft.LoraConfig(**options))
    live = [name for name, p in model.named_parameters() if p.requires_grad]

    keys, config = saved(model, tmp_path)

    assert [p.name for p in adapter_parameters(keys, config=config)] == live
    assert live[-1] == "base_model.model.score.modules_to_save.default.weight"


def test_without_a_configuration_a_bare_weight_is_a_saved_module(tmp_path: Path) -> None:
    import peft

    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}
    model = peft.get_peft_model(base(), peft.LoraConfig(**options))

    keys, _ = saved(model, tmp_path)

    assert [p.name for p in adapter_parameters(keys)] == [n for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PromptEncoderConfig", {}), ("PrefixTuningConfig", {"prefix_projection": True})],
    ids=["p_tuning", "prefix_projection"],
)
def test_computed_embeddings_are_not_taken_for_parameters(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    import peft

    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8, **options)
    keys, configuration = saved(peft.get_peft_model(base(), config), tmp_path)

    with pytest.raises(MissingNamesError) as caught:
        adapter_parameters(keys, config=configuration)

    assert str(caught.value) == (
        f"an adapter of type {configuration['peft_type']} saves the embeddings that its network computes, not the "
        "parameters that are trained: name them by a live model, or by a file of names"
    )


def test_twelve_layers_stand_in_numeric_order(tmp_path: Path) -> None:
    import peft

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(base(layers=12), peft.LoraConfig(target_modules=targets))

    keys, config = saved(model, tmp_path)

    live = [name for name, p in model.named_parameters() if p.requires_grad]
    assert live != sorted(live)
    assert [p.name for p in adapter_parameters(keys, config=config)] == live


def test_modules_of_unknown_order_are_named() -> None:
    keys = tensors({
        f"base_model.model.net.{layer}.{module}.lora_{ab}.weight": (2, 2)
        for layer in range(3)
        for module in ("beta", "alpha")
        for ab in "AB"
    })  # fmt: skip

    with pytest.raises(MissingNamesError) as caught:
        adapter_parameters(keys)

    assert str(caught.value) == (
        "the names are known, but not in which order the model defines these modules:\n"
        "  alpha, beta  in 'base_model.model.net.0'\n"
        "hint: name them by a live model, by the model's configs, or by a file of names in optimizer order"
    )


def test_where_known_models_disagree_only_a_further_module_or_the_base_models_name_decides() -> None:
    names = [f"model.decoder.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")]
    with pytest.raises(MissingNamesError):
        in_module_order(names)  # Moonshine and T5Gemma define q first, OPT and Whisper k, v, q
    assert in_module_order(names, "openai/whisper-small") == names[::-1]
    output = "model.decoder.layers.0.self_attn.out_proj"
    assert in_module_order([output, *names]) == [*names[::-1], output]
    assert in_module_order([n.replace("decoder.", "") for n in names]) == [n.replace("decoder.", "") for n in names]


def test_no_row_of_the_registry_contradicts_itself() -> None:
    for row in ORDERS:
        assert len(set(row.children)) == len(row.children) > 1
        re.compile(row.parent)
        re.compile(row.models)


def test_a_file_without_trained_parameters_is_refused() -> None:
    with pytest.raises(MissingNamesError) as caught:
        adapter_parameters(tensors({"base_model.vera_A": (2, 2), "base_model.model.x.base_layer.weight": (2, 2)}))
    assert str(caught.value) == "the adapter file holds no parameter that PEFT trains"


def test_two_keys_of_one_parameter_are_refused() -> None:
    keys = tensors({"base_model.model.a.lora_A.weight": (1,), "base_model.model.a.lora_A.default.weight": (1,)})
    with pytest.raises(ConversionError) as caught:
        adapter_parameters(keys)
    assert str(caught.value) == (
        "the keys 'base_model.model.a.lora_A.weight' and 'base_model.model.a.lora_A.default.weight' are both "
        "'base_model.model.a.lora_A.default.weight'"
    )


def test_an_adapter_is_found_only_where_peft_puts_it() -> None:
    name = "base_model.model.default.lora_A.default.weight"
    assert split_adapter(name) == ("base_model.model.default.lora_A", "default", ".weight")
    assert with_adapter(name, "other") == "base_model.model.default.lora_A.other.weight"
    assert with_adapter("model.default.weight", "other") == "model.default.weight"
    assert split_adapter("model.lora_A.weight") is None
    assert peft_key("unet.base_model.model.q.lora_A.a.weight") == ("base_model.model.q.lora_A.weight", "a")
    assert peft_key("prompt_encoder.default.mlp_head.0.weight") is None
    assert peft_key("model.q.lora_A.default.weight") is None


# --- wrappers -------------------------------------------------------------------------------------------------------


def test_wrapper_segments_go_wherever_they_stand() -> None:
    assert strip_wrappers("_orig_mod.layers.0._checkpoint_wrapped_module.fc._fsdp_wrapped_module.weight") == (
        "layers.0.fc.weight"
    )
    assert strip_wrappers("my_orig_mod.weight") == "my_orig_mod.weight"
    assert strip_wrappers("a.b") == "a.b"


def test_module_goes_only_where_it_leads_every_name() -> None:
    assert without_wrappers(["module._orig_mod.a", "module.b"]) == (["a", "b"], ("_orig_mod", "module"))
    assert without_wrappers(["module.a", "b"]) == (["module.a", "b"], ())
    assert without_wrappers(["net.module.a"]) == (["net.module.a"], ())
    assert without_wrappers([]) == ([], ())


def test_two_names_that_become_one_are_an_error() -> None:
    with pytest.raises(ConversionError) as caught:
        without_wrappers(["a._orig_mod.b", "a.b"])
    assert str(caught.value) == "'a._orig_mod.b' and 'a.b' both become 'a.b' without the segments of wrappers"


# --- rename rules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        {"old.a": "new.a", "old.b": "new.b"},
        [("^old", "new")],
        [(re.compile("^old"), "mid"), ("^mid", "new")],
        lambda name: name.replace("old", "new"),
    ],
    ids=["mapping", "pair", "pairs", "function"],
)
def test_rename_rules(rule: Any) -> None:
    assert rename(["old.a", "old.b", "c"], rule) == {"old.a": "new.a", "old.b": "new.b", "c": "c"}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"x": "y"}, "rename: there is no parameter 'x' to rename"),
        ({"a": "b"}, "rename: 'a' and 'b' both become 'b'"),
        ([(".", "z")], "rename: 'a' and 'b' both become 'z'"),
    ],
)
def test_rename_rules_are_one_to_one(rule: Any, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        rename(["a", "b"], rule)
    assert str(caught.value) == message


# --- files of names -------------------------------------------------------------------------------------------------


def test_a_file_of_names(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes("b.weight\r\n\n  a.wéight  \n".encode())
    assert read_names(path) == ["b.weight", "a.wéight"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n\nb\na\n", "'a' is on line 1 and on line 4"),
        (b"\n \n", "holds no name"),
        (b"\xff\xfe\n", "not UTF-8, so not a file of names"),
    ],
)
def test_a_file_that_holds_no_usable_names(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    with pytest.raises(ConversionError) as caught:
        read_names(path)
    assert str(caught.value) == f"{path}: {message}"


def test_a_file_of_names_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_names(tmp_path / "none")
