"""A model's parameters from its configs alone: built by transformers and PEFT on the meta device, without weights.

Names, shapes, trainability and module classes are exact for the versions that are installed. What a run changed by hand
after ``get_peft_model`` (a layer unfrozen, say) is in no config.

Configs are files from strangers, and these libraries trust them further than that: one may name code to import or to
fetch, weights to load, a billion layers, a pattern that takes for ever. None of it gets that far.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from lora_state_format.errors import ConversionError, FileError, MissingDependencyError
from lora_state_format.io.json_files import read_json_object
from lora_state_format.model.states import Parameter
from lora_state_format.naming.names import peft_key, split_adapter
from lora_state_format.naming.rules import Described
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

UNNEEDED: Final = {
    "inference_mode": False,
    "init_lora_weights": True,
    "megatron_config": None,
    "prompt_tuning_init": "RANDOM",
}
"""Members of an adapter's configuration that would freeze it, ask for weights or a tokenizer to start it from, or name
a module to import."""

LOADING: Final = ("SHADOW", "XLORA")
"""Adapters that are made of other checkpoints."""

CODE: Final = ("auto_map", "configuration_files", "_attn_implementation", "attn_implementation")
"""Members of a model's configuration, or of one within it, that name code or other files; no shape depends on them."""

MANY: Final = re.compile("layer|label|expert|depth|num_blocks")
MAX_MANY: Final = 1 << 14
"""What is built one by one, and of which a model has this many at most."""

MAX_SECONDS: Final = 120
"""Of processor time: 80 layers with adapters take one, 3,000 experts that are modules of their own eleven."""


def rebuild(folder: str | os.PathLike[str], adapter_config: str | os.PathLike[str] | None = None) -> list[Described]:
    """Return the parameters of the model that ``config.json`` and, for an adapter, ``adapter_config.json`` describe.

    They stand in ``named_parameters()`` order, frozen ones too; their dtypes are unknown. ``adapter_config`` is the
    adapter's configuration where it lies elsewhere. No weights are read, no code of the checkpoint is run, nothing is
    fetched; ``MAX_SECONDS`` are the limit, where this is the main thread. Raises ``MissingDependencyError`` without
    transformers and peft, ``FileError`` for a configuration that is no JSON object or describes too much,
    ``ConversionError`` for one that these do not know, ``FileNotFoundError`` where there is no such folder.
    """
    folder = Path(folder)
    adapter = Path(adapter_config) if adapter_config else folder / ADAPTER_CONFIG
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of a model's configs")
    try:
        import huggingface_hub.constants
        import peft
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "names from configs need transformers and peft: pip install torch transformers peft"
        ) from error
    members = read_json_object(adapter) if os.path.lexists(adapter) else None
    if not (folder / CONFIG).exists():
        raise ConversionError(f"{folder}: has no {CONFIG}{_whose(members, adapter, folder)}")
    described = _bare(read_json_object(folder / CONFIG), folder / CONFIG)
    with warnings.catch_warnings(), _replaced(huggingface_hub.constants, "HF_HUB_OFFLINE", True):
        warnings.simplefilter("ignore")
        try:
            with _limited(MAX_SECONDS), torch.device("meta"):
                config = _model_config(transformers, described)
                tuned = None if members is None else _adapter(peft, members)
                model = _class(transformers, config, tuned)(config)
                if tuned is not None:
                    model = peft.get_peft_model(model, tuned, low_cpu_mem_usage=True)
        except (Exception, _TooLongError) as error:  # these libraries raise what they like
            raise ConversionError(
                f"{folder}: transformers {transformers.__version__} and peft {peft.__version__} cannot build a model "
                f"from its configs: {error}"
            ) from error
    return describe(model)


def _whose(members: dict[str, Any] | None, adapter: Path, folder: Path) -> str:
    """Return whose ``config.json`` is missing in a folder, as far as an adapter's configuration says it."""
    if members is None:
        return ", which describes the model"
    base = members.get("base_model_name_or_path")
    if adapter.parent == folder:
        return f"; put that{f' of the base model, {base},' if base else ''} next to {ADAPTER_CONFIG}"
    return f", which describes the base model{f', {base}' if base else ''}"


def describe(model: Models) -> list[Described]:
    """Return every parameter of a model, or of several by name, in ``named_parameters()`` order, each once."""
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
                    foreign_names={"peft": key[0]} if key else {},
                ),
                tensor.requires_grad,
                tuple(kind.__name__ for kind in found.owners[name].__mro__[:-1]),
                found.layers.get(name),
            )
        )
    return result


def _bare(value: Any, path: Path) -> Any:
    """Return a configuration without what names code. Raises ``FileError`` for more of something than a model has."""
    if isinstance(value, list):
        return [_bare(item, path) for item in value]
    if not isinstance(value, dict):
        return value
    for key, item in value.items():
        if isinstance(item, int) and item > MAX_MANY and MANY.search(key):
            raise FileError(f"'{key}' is {item}, more than {MAX_MANY}", path=path)
    return {key: _bare(item, path) for key, item in value.items() if key not in CODE}


class _TooLongError(BaseException):
    """Not an ``Exception``: what is being interrupted must not take it for one of its own."""


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise ``_TooLongError`` in a block that takes more processor time; only in the main thread, which has signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _TooLongError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    # Again every second: where Python frees an object or calls back from C, it drops what is raised.
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:  # even if the last one came in between
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)  # None: a handler that is not Python's


@contextlib.contextmanager
def _replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


def _model_config(transformers: Any, described: dict[str, Any]) -> Any:
    """Return the model's configuration, from a folder that holds nothing else."""
    if "model_type" not in described:
        raise ValueError(f"{CONFIG} has no model_type")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, CONFIG).write_text(json.dumps(described))
        return transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, attn_implementation="eager"
        )


def _adapter(peft: Any, members: dict[str, Any]) -> PeftConfig:
    """Return the adapter's configuration, made to train and to start from nothing."""
    if members.get("peft_type") not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"adapters of type {members.get('peft_type')!r} are not known")
    if members["peft_type"] in LOADING:
        raise ValueError(f"an adapter of type {members['peft_type']} is made of other checkpoints, which are not read")
    needed = {**members, **{key: value for key, value in UNNEEDED.items() if key in members}}
    config: PeftConfig = peft.PeftConfig.from_peft_type(**needed)
    return config


def _class(transformers: Any, config: Any, tuned: PeftConfig | None) -> Any:
    """Return what builds the model: the class of the adapter's base or head, or the one that the config names."""
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
