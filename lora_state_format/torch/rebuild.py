"""A model's parameters from its configs alone: built by transformers and PEFT on the meta device, without weights.

Names, shapes, trainability and module classes are exact for the versions that are installed. What a run changed by hand
after ``get_peft_model`` (a layer unfrozen, say) is in no config.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from lora_state_format.errors import ConversionError, MissingDependencyError
from lora_state_format.foreign.folders import read_json_object
from lora_state_format.model import Parameter
from lora_state_format.names import peft_key, split_adapter
from lora_state_format.order import Described
from lora_state_format.torch.capture import Models, named_tensors

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["describe", "rebuild"]

CONFIG: Final = "config.json"
ADAPTER_CONFIG: Final = "adapter_config.json"

HEADS: Final = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's task types, and the class of transformers that has the head for it."""

UNNEEDED: Final = {"inference_mode": False, "init_lora_weights": True, "prompt_tuning_init": "RANDOM"}
"""Members of an adapter's configuration that would freeze it, or ask for weights or a tokenizer to start it from."""


def rebuild(folder: str | os.PathLike[str], adapter_config: str | os.PathLike[str] | None = None) -> list[Described]:
    """The parameters of the model that ``config.json`` and, for an adapter, ``adapter_config.json`` describe.

    They stand in ``named_parameters()`` order, frozen ones too; their dtypes are unknown. ``adapter_config`` is the
    adapter's configuration where it lies elsewhere. No weights are read, no code of the checkpoint is run, nothing is
    fetched. Raises ``MissingDependencyError`` without transformers and peft, ``FileError`` for a configuration that is
    no JSON object, ``ConversionError`` for one that these do not know.
    """
    folder = Path(folder)
    adapter = Path(adapter_config) if adapter_config else folder / ADAPTER_CONFIG
    try:
        import peft
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "names from configs need transformers and peft: pip install 'lora_state_format[peft]'"
        ) from error
    members = read_json_object(adapter) if adapter.exists() else None
    if not (folder / CONFIG).exists():
        base = (members or {}).get("base_model_name_or_path")
        named = f" of the base model, {base}," if base else ""
        raise ConversionError(f"{folder}: has no {CONFIG}; put that{named} beside {ADAPTER_CONFIG}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = transformers.AutoConfig.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True, attn_implementation="eager"
            )
            tuned = None if members is None else _adapter(peft, members)
            with torch.device("meta"):
                model = _class(transformers, config, tuned)(config)
                if tuned is not None:
                    model = peft.get_peft_model(model, tuned, low_cpu_mem_usage=True)
        except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError) as error:
            raise ConversionError(
                f"{folder}: transformers {transformers.__version__} and peft {peft.__version__} cannot build a model "
                f"from its configs: {error}"
            ) from error
    return describe(model)


def describe(model: Models) -> list[Described]:
    """Every parameter of a model, or of several by name, in ``named_parameters()`` order, each once."""
    found = named_tensors(model)
    result = []
    for name, tensor in found.tensors.items():
        key, parts = peft_key(name), split_adapter(name)
        result.append(
            Described(
                Parameter(
                    name=name,
                    shape=tuple(tensor.shape),
                    state=None,
                    adapter=parts[1] if parts else None,
                    tied=found.tied.get(name, ()),
                    keys={"peft": key[0]} if key else {},
                ),
                tensor.requires_grad,
                tuple(kind.__name__ for kind in found.owners[name].__mro__[:-1]),
            )
        )
    return result


def _adapter(peft: Any, members: dict[str, Any]) -> PeftConfig:
    """The adapter's configuration, made to train and to start from nothing."""
    if members.get("peft_type") not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"adapters of type {members.get('peft_type')!r} are not known")
    needed = {**members, **{key: value for key, value in UNNEEDED.items() if key in members}}
    config: PeftConfig = peft.PeftConfig.from_peft_type(**needed)
    return config


def _class(transformers: Any, config: Any, tuned: PeftConfig | None) -> Any:
    """What builds the model: the class the adapter was put on, or has a head for, or the one the config names."""
    if tuned is not None:
        name = (tuned.auto_mapping or {}).get("base_model_class")
        if name and hasattr(transformers, name):
            return getattr(transformers, name)._from_config
        if tuned.task_type in HEADS:
            return getattr(transformers, HEADS[tuned.task_type]).from_config
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)._from_config
    raise ValueError(f"{CONFIG} names no class that transformers has: {config.architectures}")
