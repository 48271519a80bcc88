"""What DeepSpeed's folders have in common: tags, parallel ranks, the model's weights, and slices that ranks hold.

A tag folder has files of model-parallel ranks (``mp_rank_NN``), which are pipeline stages, tensor-parallel ranks within
them, or both, the latter counted first. How the slices of tensor-parallel ranks make up a parameter is written down for
DeepSpeed's universal checkpoints, as patterns of names (``checkpoint/ds_to_universal.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, RefusedError, Remedy
from lora_state_format.foreign import pickles
from lora_state_format.foreign.masters import SAMPLE, elements
from lora_state_format.io.files import Files, folders_in, is_plain, names_in
from lora_state_format.io.json_files import read_json_object
from lora_state_format.model.tensors import Tensor, joined

__all__ = [
    "EXPERT",
    "MODEL",
    "PATTERNS",
    "Slices",
    "degrees",
    "global_expert",
    "local_experts",
    "local_weights",
    "slices_of",
    "tag_folder",
    "weights",
]

MODEL: Final = re.compile(r"mp_rank_(\d+)_model_states\.pt")
LAYER: Final = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
EXPERT: Final = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_LOCAL_EXPERT: Final = re.compile(r"(.*\.deepspeed_experts\.)(\d+)(\..*)")

REPLICATED: Final = ("tp_replicated_parameter_patterns", "parameter_to_average_patterns")
ROWS: Final = "parameter_with_row_parallelism_patterns"
HALVES: Final = "parameter_with_2_sub_params_cat_dim_0"

PATTERNS: Final[Mapping[str, Mapping[str, Sequence[str]]]] = {
    "megatron": {
        REPLICATED[0]: (
            r".*norm.weight", r".*norm.bias", r".*layernorm.weight", r".*layernorm.bias", r".*attention.dense.bias",
            r".*mlp.dense_4h_to_h.bias", r".*position_embeddings.weight", r"\d+.weight", r"\d+.bias",
        ),
        ROWS: (r".*attention.dense.weight", r".*mlp.dense_4h_to_h.weight"),
    },
}  # fmt: skip
"""Patterns of libraries that wrote none: Megatron-DeepSpeed and GPT-NeoX (``megatron/model``)."""

SLICES_OPTION: Final = (
    "how tensor-parallel slices join if no file says it: 'megatron', or a JSON file with DeepSpeed's patterns"
)

_SIMPLE: Final = re.compile(r"\^?(?:[\w-]|\\[.d-]\+?|\.[*+]?)*\$?")
MAX_REPEATS: Final = 3
"""Repetitions in a pattern; with more of them, matching could take for ever."""


def tag_folder(path: Path, holds: Callable[[Path], bool]) -> Path | None:
    """Return the folder that holds the rank files: the path, the one that ``latest`` names, or the only one in it."""
    if not path.is_dir():
        return None
    latest = path / "latest"
    inner = []
    if latest.is_file() and latest.stat().st_size < 1024:
        tag = latest.read_text(errors="replace").strip()
        inner = [path / tag] if is_plain(tag) else []
    else:
        folders = [folder for folder in folders_in(path) if holds(folder)]
        inner = folders if len(folders) == 1 else []
    return next((folder for folder in (path, *inner) if folder.is_dir() and holds(folder)), None)


def degrees(models: Mapping[int, Mapping[str, Any]], folder: Path) -> tuple[int, int]:
    """Return how many pipeline stages and tensor-parallel ranks there were.

    Raises:
        FileError: files of model-parallel ranks are missing.
    """
    first = next(iter(models.values()))
    stated = first.get("checkpoint_parallel_dimensions")
    slices = {match[2] for name in names_in(folder) if (match := LAYER.fullmatch(name))}
    if isinstance(stated, dict) and all(type(stated.get(key)) is int for key in ("pp_degree", "tp_degree")):
        pipeline, tensor = stated["pp_degree"], stated["tp_degree"]
    elif slices:
        tensor = max(1, len(slices - {None}))
        pipeline = len(models) // tensor
    else:
        pipeline, tensor = 1, first.get("mp_world_size") or len(models)
    for rank in range(pipeline * tensor):
        if rank not in models:
            raise FileError(
                f"missing: there were {pipeline} pipeline stages of {tensor} tensor-parallel ranks",
                path=folder / f"mp_rank_{rank:02d}_model_states.pt",
            )
    if len(models) != pipeline * tensor:
        raise FileError(
            f"has files of {len(models)} model-parallel ranks, where {pipeline} stages of {tensor} ranks wrote it",
            path=folder,
        )
    return pipeline, tensor


def weights(
    folder: Path, models: Mapping[int, Mapping[str, Any]], slices: Slices, files: Files, *, layers: bool = True
) -> dict[str, Tensor]:
    """Return the model's own tensors by name: of the ranks' files, of pipeline layers, and of experts.

    ``models`` are what the files of model-parallel ranks hold; of experts, those of the same ranks are read. Without
    ``layers`` the files of pipeline layers, which do not say whose they are, are left out.
    """
    parts = local_weights(folder, models, slices.count, files, layers=layers)
    return {
        name: slices.join(name, [of[r] for r in sorted(of)])
        for name, of in parts.items()
        if len(of) in (1, slices.count)
    }


def local_weights(
    folder: Path, models: Mapping[int, Mapping[str, Any]], count: int, files: Files, *, layers: bool = True
) -> dict[str, dict[int, Tensor]]:
    """Return the same as the tensor-parallel ranks have it: by name and, of ``count``, by rank.

    What all ranks have, and is in one file only, is under that one rank.
    """
    parts: dict[str, dict[int, Tensor]] = {}

    def add(tree: Any, rank: int, prefix: str = "") -> None:
        for key, value in tree.items() if isinstance(tree, dict) else ():
            if isinstance(value, Tensor):
                parts.setdefault(prefix + str(key), {})[rank] = value

    for rank, model in models.items():
        add(model.get("module"), rank % count)
    of_layers, experts = {}, {}
    for entry in names_in(folder):
        if match := LAYER.fullmatch(entry):
            of_layers[int(match[1]), int(match[2] or 0)] = folder / entry
        elif (match := EXPERT.fullmatch(entry)) and int(match[3]) in models:
            experts[int(match[3]), int(match[1]), int(match[2])] = folder / entry
    for (layer, rank), file in sorted(of_layers.items()) if layers else ():
        add(pickles.load(files[file], file).value, rank, f"{layer}.")
    for (mp, *_), file in sorted(experts.items()):
        add(pickles.load(files[file], file).value, mp % count)
    return parts


def check_whole(tree: Any, found: Sequence[Mapping[str, Any]], path: object) -> None:
    """Raise ``RefusedError`` if a checkpoint, wherever it lies, says that it is that of one rank of several.

    Args:
        tree: the checkpoint.
        found: the optimizers' state dicts in it.
        path: the file, for messages.
    """
    remedy = "give the checkpoint's folder, with the files of all ranks under the names that DeepSpeed gave them"
    for state in found:
        for number, group in enumerate(state["param_groups"]):
            if group.get("moe") is True:
                raise RefusedError(
                    f"group {number} holds the experts of one of DeepSpeed's ranks, and others may have more of them: "
                    f"{remedy}",
                    path=path,
                )
    if isinstance(tree, dict) and type(world := tree.get("mp_world_size")) is int and world > 1:
        raise RefusedError(f"one of {world} model-parallel ranks' files of a DeepSpeed checkpoint: {remedy}", path=path)


def global_expert(name: str, rank: int, local: int) -> str:
    """Return a rank's name of an expert's parameter as the whole model has it; ``local`` is how many a rank has."""
    match = _LOCAL_EXPERT.fullmatch(name)
    return name if match is None else f"{match[1]}{int(match[2]) + rank * local}{match[3]}"


def local_experts(names: Sequence[str]) -> int:
    """Return how many experts of a layer a rank has, by its names."""
    return len({match[2] for name in names if (match := _LOCAL_EXPERT.fullmatch(name))})


class Slices:
    """How the slices of tensor-parallel ranks make up parameters."""

    def __init__(self, count: int, patterns: Mapping[str, Any], path: object, *, seen: bool = True) -> None:
        """``patterns`` are those of ``universal_checkpoint_info``; ``path`` is for messages.

        ``seen`` is whether slices that should be the same can be compared.
        """
        self.count = count
        self.path = path
        self.seen = seen
        self._patterns = {key: _compiled(patterns.get(key), path) for key in (*REPLICATED, ROWS, HALVES)}
        unsupported = dict(patterns.get("autotp_unsupported_parameter_patterns") or {})
        several = [p for shape in patterns.get("parameter_with_sub_params") or () for p in shape.get("patterns", ())]
        self._refused = _compiled([*unsupported, *several], path)

    def join(self, name: str, slices: Sequence[Tensor]) -> Tensor:
        """Return a parameter out of its slices, one for every tensor-parallel rank.

        Raises:
            RefusedError: the slices are parts of several matrices, or of ranks that should hold the same and do not.
        """
        if len(slices) == 1 or not slices[0].shape:
            return slices[0]
        if _matches(self._refused, name):
            raise RefusedError(
                f"'{name}' is several matrices in one, cut each for itself: make a universal checkpoint with "
                "DeepSpeed's ds_to_universal.py and convert that",
                path=self.path,
            )
        if any(_matches(self._patterns[key], name) for key in REPLICATED):
            count = min(SAMPLE, slices[0].count)
            if any(
                s.shape != slices[0].shape or (self.seen and elements(s, 0, count) != elements(slices[0], 0, count))
                for s in slices
            ):
                raise RefusedError(
                    f"'{name}' is the same on all tensor-parallel ranks, and differs in it", path=self.path
                )
            return slices[0]
        if _matches(self._patterns[HALVES], name):
            return joined(slices, parts=2)
        return joined(slices, 1 if _matches(self._patterns[ROWS], name) and len(slices[0].shape) > 1 else 0)


def slices_of(count: int, model: Mapping[str, Any], chosen: object, path: Path, *, seen: bool = True) -> Slices:
    """Return how slices join: by what the model's file says, or by what the caller chose; ``seen`` as in ``Slices``.

    Raises:
        RefusedError: there are slices, and nothing says how they join.
    """
    patterns = model.get("universal_checkpoint_info")
    if isinstance(chosen, str):
        patterns = PATTERNS[chosen] if chosen in PATTERNS else read_json_object(Path(chosen))
    if count > 1 and not isinstance(patterns, Mapping):
        raise RefusedError(
            f"written by {count} tensor-parallel ranks, and nothing says which axis their slices were cut along; "
            f"known are those of {', '.join(PATTERNS)}",
            path=path,
            remedy=Remedy(
                "pass {options}: the name of a model family, or a JSON file with the patterns of "
                "universal_checkpoint_info",
                {"options": {"slices": ...}},
            ),
        )
    return Slices(count, patterns if isinstance(patterns, Mapping) else {}, path, seen=seen)


def _compiled(patterns: Any, path: object) -> tuple[frozenset[str], list[re.Pattern[str]]]:
    """Return the names that patterns spell out, and the other patterns."""
    exact, others = set(), []
    for pattern in patterns or ():
        simple = isinstance(pattern, str) and _SIMPLE.fullmatch(pattern)
        if not simple or pattern.count("*") + pattern.count("+") > MAX_REPEATS:
            raise RefusedError(f"a pattern of names that is not read: {str(pattern)[:100]!r}", path=path)
        plain = pattern[1:-1].replace("\\.", "\0")
        if pattern[:1] == "^" and pattern[-1:] == "$" and not set(plain) & set("\\.*+"):
            exact.add(plain.replace("\0", "."))
        else:
            others.append(re.compile(pattern))
    return frozenset(exact), others


def _matches(patterns: tuple[frozenset[str], list[re.Pattern[str]]], name: str) -> bool:
    """Return whether a name is one of the patterns, from its beginning on, as DeepSpeed matches them."""
    return name in patterns[0] or any(pattern.match(name) for pattern in patterns[1])
