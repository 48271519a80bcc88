"""Names of parameters: wrapper segments, PEFT's keys, rename rules, and the order in which models define modules.

Strings in, strings out, without a model. PEFT's keys were read off PEFT 0.21 by saving one adapter of each method; the
module orders are those of the models of transformers 5.23 (and, for the names of the time, 4.x).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final, TypeAlias

from lora_state_format.errors import ConversionError, MissingNamesError, OptionError
from lora_state_format.model.states import Parameter
from lora_state_format.model.tensors import Tensor
from lora_state_format.model.text import expression
from lora_state_format.naming.modules import in_module_order

__all__ = [
    "WRAPPERS",
    "Rename",
    "adapter_orders",
    "adapter_parameters",
    "is_adapter_key",
    "peft_key",
    "plain_name",
    "read_names",
    "rename",
    "split_adapter",
    "strip_wrappers",
    "with_adapter",
    "without_wrappers",
]

MAX_FILE: Final = 64 << 20
"""Bytes of a file of names."""

# --- wrappers -------------------------------------------------------------------------------------------------------

WRAPPERS: Final = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Segments that only torch's wrappers put into a name: compile, FSDP, activation checkpointing."""

DATA_PARALLEL: Final = "module"
"""The segment of DistributedDataParallel. Modules may be called that, so it goes only where it leads every name."""


def strip_wrappers(name: str) -> str:
    """Return the name without the segments of ``WRAPPERS``."""
    if "_" not in name:
        return name
    return ".".join(segment for segment in name.split(".") if segment not in WRAPPERS)


def plain_name(name: str) -> str:
    """Return the name without wrapper segments and in lower case, to compare names that others wrote."""
    plain = strip_wrappers(name).casefold()
    while plain.startswith(f"{DATA_PARALLEL}."):
        plain = plain[len(DATA_PARALLEL) + 1 :]
    return plain


def without_wrappers(names: Iterable[str]) -> tuple[list[str], tuple[str, ...]]:
    """Return the names without wrapper segments, and the segments that were removed, sorted.

    ``module.`` is removed where it leads every name. Raises ``ConversionError`` if two names become one.
    """
    given = list(names)
    removed = {segment for name in given for segment in name.split(".") if segment in WRAPPERS}
    stripped = [strip_wrappers(name) for name in given]
    while stripped and all(name.startswith(f"{DATA_PARALLEL}.") for name in stripped):
        stripped = [name[len(DATA_PARALLEL) + 1 :] for name in stripped]
        removed.add(DATA_PARALLEL)
    origins: dict[str, str] = {}
    for before, after in zip(given, stripped, strict=True):
        if origins.setdefault(after, before) != before:
            raise ConversionError(
                f"'{origins[after]}' and '{before}' both become '{after}' without the segments of wrappers"
            )
    return stripped, tuple(sorted(removed))


# --- PEFT -----------------------------------------------------------------------------------------------------------

_TUNERS: Final = (
    r"lora_[ABE]|lora_embedding_[AB]|lora_magnitude_vector|ia3_l|vera_lambda_[bd]|ln_tuning_layers"
    r"|trainable_tokens_delta|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|oft_R|boft_[Rs]"
)

_LIVE: Final = re.compile(
    rf"((?:.*\.)?(?:{_TUNERS}))\.(?!(?:weight|bias)$)([^.]+)((?:\.(?:weight|bias))?)"
    r"|((?:.*\.)?modules_to_save)\.([^.]+)(\..+)"
    r"|(prompt_encoder)\.([^.]+)(\..+)"
)

_KEY: Final = re.compile(rf"((?:.*\.)?(?:{_TUNERS}))((?:\.(?:weight|bias))?)")

_PEFT_MODEL: Final = re.compile(r"(?:^|\.)((?:base_model\.model\.|prompt_encoder\.).*)")

_COMPUTED: Final = ("P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING")


def split_adapter(name: str) -> tuple[str, str, str] | None:
    """Return the part of a ``named_parameters()`` name before the adapter's name, the adapter, and the part behind it.

    Only the adapter's name in the place where PEFT puts it counts: a module of the same name stays. ``None`` if the
    parameter belongs to no adapter.
    """
    match = _LIVE.fullmatch(name)
    if match is None:
        return None
    head, adapter, tail = (part for part in match.groups() if part is not None)
    return head, adapter, tail


def with_adapter(name: str, adapter: str) -> str:
    """Return the name of the same parameter in an adapter of another name."""
    parts = split_adapter(name)
    return name if parts is None else f"{parts[0]}.{adapter}{parts[2]}"


def peft_key(name: str) -> tuple[str, str] | None:
    """Return the key of a ``named_parameters()`` name in ``adapter_model.safetensors``, and its adapter.

    ``None`` if it belongs to no adapter of a ``PeftModel``, or if PEFT does not save the parameter itself (the networks
    behind P-tuning).
    """
    inner = _PEFT_MODEL.search(name)
    parts = split_adapter(inner[1]) if inner else None
    if parts is None:
        return None
    head, adapter, tail = parts
    if head == "prompt_encoder":
        return ("prompt_embeddings", adapter) if tail == ".embedding.weight" else None
    if head.endswith(".modules_to_save"):
        return head.removesuffix(".modules_to_save") + tail, adapter
    return head + ("" if head.endswith(".lora_magnitude_vector") else tail), adapter


def _live_name(key: str, adapter: str, config: Mapping[str, Any] | None) -> str | None:
    """Return the ``named_parameters()`` name of an adapter file's key; ``None`` for a frozen tensor saved with it."""
    if split_adapter(key):
        return key
    if tuner := _KEY.fullmatch(key):
        head, tail = tuner.groups()
        return f"{head}.{adapter}{'.weight' if head.endswith('.lora_magnitude_vector') else tail}"
    if key == "prompt_embeddings":
        kind = (config or {}).get("peft_type")
        if kind in _COMPUTED and (kind != "PREFIX_TUNING" or (config or {}).get("prefix_projection")):
            raise MissingNamesError(
                f"an adapter of type {kind} saves the embeddings that its network computes, not the parameters that "
                "are trained: name them by a live model, or by a file of names"
            )
        return f"prompt_encoder.{adapter}.embedding.weight"
    bias = "all" if config is None else config.get("bias", "none")
    if key.startswith("base_model.vera_") or key.endswith(".base_layer.weight"):
        return None
    if key.endswith(".base_layer.bias"):
        return None if bias == "none" else key
    if module := _saved_module(key, config):
        return f"{module}.modules_to_save.{adapter}{key[len(module) :]}"
    return key if bias == "all" and key.endswith(".bias") else None


TASK_HEADS: Final = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""PEFT's task types, and the modules that it trains and saves for them without being told."""


def _saved_module(key: str, config: Mapping[str, Any] | None) -> str | None:
    """Return the module of ``modules_to_save`` of a key: the outermost whose path ends as the config says."""
    segments = key.split(".")
    if config is None:
        return ".".join(segments[:-1]) if segments[-1] == "weight" else None
    wanted = (*(config.get("modules_to_save") or ()), *TASK_HEADS.get(str(config.get("task_type")), ()))
    paths = (".".join(segments[:stop]) for stop in range(1, len(segments)))
    return next((path for path in paths if wanted and path.endswith(wanted)), None)


def is_adapter_key(key: str) -> bool:
    """Return whether a key of a file is that of a tensor that PEFT trains, as its adapter files have them.

    Other libraries' LoRA (loralib, LitGPT) has parameters called ``lora_A`` and ``lora_B`` in modules of its own.
    """
    match = _KEY.fullmatch(key)
    if match and match[2] == "" and key.endswith((".lora_A", ".lora_B")) and "base_model.model." not in key:
        return False
    return match is not None or key == "prompt_embeddings"


def adapter_parameters(
    weights: Mapping[str, Tensor], adapter: str = "default", config: Mapping[str, Any] | None = None
) -> list[Parameter]:
    """Return the trainable parameters behind an ``adapter_model.safetensors``, as ``adapter_orders`` has them first."""
    return adapter_orders(weights, adapter, config)[0]


def adapter_orders(
    weights: Mapping[str, Tensor],
    adapter: str = "default",
    config: Mapping[str, Any] | None = None,
    *,
    ordered: bool = False,
) -> list[list[Parameter]]:
    """Return the trainable parameters behind an adapter's file in each order that ``named_parameters()`` may have.

    ``weights`` are the file's tensors under its keys; ``config`` is the parsed ``adapter_config.json``, which says
    which tensors of a file are frozen; without it every ``weight`` that belongs to no adapter module is taken for a
    saved module's. ``ordered`` says that the file keeps the model's order, as a pickle does; but saved modules are at
    its end, so those of embeddings may have to go first. PEFT before 0.6 trained the originals of saved modules too;
    that is one more way. Each parameter has its key under ``foreign_names["peft"]``. Raises ``MissingNamesError`` where
    no order of the modules is known, or the file lacks trained parameters.
    """
    found: dict[str, str] = {}
    for key in weights:
        name = _live_name(key, adapter, config)
        if name is not None and found.setdefault(strip_wrappers(name), key) != key:
            raise ConversionError(f"the keys '{found[strip_wrappers(name)]}' and '{key}' are both '{name}'")
    if not found:
        raise MissingNamesError("the adapter file holds no parameter that PEFT trains")
    if ordered:
        first = [name for name in found if EMBEDDING.search(name)]
        orders = [[*found], [*first, *(name for name in found if name not in first)]]
    else:
        orders = [in_module_order(found, str((config or {}).get("base_model_name_or_path") or ""))]
    plain = [[_adapter_parameter(name, found[name], weights) for name in names] for names in orders]
    if not any(SAVED in name for name in found):
        return plain[:1]
    return [*plain, *map(_with_originals, plain)]


SAVED: Final = ".modules_to_save."
EMBEDDING: Final = re.compile(r"(^|\.)(embed\w*|wte|wpe|shared|\w+_embeddings?)\.modules_to_save\.")


def _adapter_parameter(name: str, key: str, weights: Mapping[str, Tensor]) -> Parameter:
    tensor, parts = weights[key], split_adapter(name)
    return Parameter(
        name=name,
        shape=tensor.shape,
        state=None,
        dtype=tensor.dtype,
        adapter=parts[1] if parts else None,
        foreign_names={"peft": key},
    )


def _with_originals(parameters: Sequence[Parameter]) -> list[Parameter]:
    """Return the parameters with those that saved modules are copies of, each module's in front of its copy."""
    result: list[Parameter] = []
    for head, module in groupby(parameters, lambda p: (split_adapter(p.name) or ("", "", ""))[0]):
        members = list(module)
        if head.endswith(SAVED[:-1]):
            original = f"{head.removesuffix(SAVED[:-1])}.original_module"
            tails = [(split_adapter(p.name) or ("", "", ""))[2] for p in members]
            result += [
                Parameter(original + tail, p.shape, None, dtype=p.dtype) for p, tail in zip(members, tails, strict=True)
            ]
        result += members
    return result


# --- rename rules and files of names --------------------------------------------------------------------------------

Rename: TypeAlias = "Mapping[str, str] | Sequence[tuple[str | re.Pattern[str], str]] | Callable[[str], str]"
"""Saved name -> live name: a mapping, pairs of a regular expression and its replacement, or a function."""


def rename(names: Sequence[str], rule: Rename) -> dict[str, str]:
    """Return each name under its new name.

    A mapping renames whole names; pairs are applied by ``re.sub`` one after the other; a function is called with each
    name. Raises ``OptionError`` if a mapping names an unknown parameter, a text is not a regular expression, or two
    names become one.
    """
    if isinstance(rule, Mapping):
        absent = [old for old in rule if old not in set(names)]
        if absent:
            raise OptionError(f"rename: there is no parameter '{absent[0]}' to rename")
        result = {name: rule.get(name, name) for name in names}
    elif callable(rule):
        result = {name: rule(name) for name in names}
    else:
        pairs = [(expression(pattern), replacement) for pattern, replacement in rule]
        result = {name: _substituted(name, pairs) for name in names}
    origins: dict[str, str] = {}
    for old, new in result.items():
        if origins.setdefault(new, old) != old:
            raise OptionError(f"rename: '{origins[new]}' and '{old}' both become '{new}'")
    return result


def _substituted(name: str, pairs: Sequence[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in pairs:
        name = _replaced(name, pattern, replacement)
    return name


def _replaced(name: str, pattern: re.Pattern[str], replacement: str) -> str:
    try:
        return pattern.sub(replacement, name)
    except (re.error, IndexError) as error:
        raise OptionError(f"rename: '{replacement}' cannot replace '{pattern.pattern}': {error}") from error


def read_names(path: str | os.PathLike[str]) -> list[str]:
    """Return the names in a UTF-8 file, one a line, in optimizer order; blank lines do not count.

    Raises ``ConversionError`` if there are none or one occurs twice.
    """
    file = Path(path)
    if file.exists() and (not file.is_file() or file.stat().st_size > MAX_FILE):
        raise ConversionError(f"{file}: not a regular file of at most {MAX_FILE} bytes, so not a file of names")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConversionError(f"{os.fspath(path)}: not UTF-8, so not a file of names") from error
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if name and seen.setdefault(name, number) != number:
            raise ConversionError(f"{os.fspath(path)}: '{name}' is on line {seen[name]} and on line {number}")
    if not seen:
        raise ConversionError(f"{os.fspath(path)}: holds no name")
    return list(seen)
