"""MLX: ``mx.save_safetensors(path, tree_flatten(optimizer.state))``, as unsloth, mflux and MLX's documentation do it.

Keys are ``<parameter>.<slot>``, next to ``step`` and ``learning_rate``; a parameter may itself be called ``m`` (DoRA),
so exactly the last segment is the slot. Field names and rules were read off MLX 0.32.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, OptionError, RefusedError, Remedy, UnrepresentableError
from lora_state_format.foreign.npz import arrays_in, read_npz
from lora_state_format.foreign.zips import Archive
from lora_state_format.io import plain
from lora_state_format.io.safetensors import read_header
from lora_state_format.mapping import algorithms, apply
from lora_state_format.mapping.algorithms import HYPERPARAMETERS, OPTIMIZER, Algorithm, RuleLayout
from lora_state_format.model.sources import File, Memory
from lora_state_format.model.states import Checkpoint, Group, Naming, Optimizer, OptimizerState, Parameter, Scalar
from lora_state_format.model.tensors import Tensor, contiguous
from lora_state_format.registry import Match

NAME: Final = "mlx"
DESCRIPTION: Final = (
    "MLX's optimizer.state in safetensors (unsloth, mflux) or .npz: step, learning_rate, <parameter>.<slot>"
)
OPTIONS: Final = {
    "optimizer": OPTIMIZER,
    "bias_correction": "whether Adam or AdamW was made with it, True or False; MLX's default is False, mlx-lm's too",
    "step": "steps taken, to be written where the state does not count them",
    "map": f"{apply.OPTION}, or none; mlx_lm is taken where all names are of LoRA",
    **HYPERPARAMETERS,
}

LAYOUTS: Final = (
    *(
        RuleLayout(rule, {"m": "exp_avg", "v": "exp_avg_sq"})
        for rule in ("adam", "adamw", "adam_uncorrected", "adamw_uncorrected")
    ),
    RuleLayout("lion", {"m": "exp_avg"}),
    RuleLayout("sgd", {"v": "momentum_buffer"}),
    RuleLayout("adagrad", {"v": "sum"}),
    RuleLayout("rmsprop", {"v": "square_avg"}),
    RuleLayout("adadelta", {"v": "square_avg", "u": "acc_delta"}),
    RuleLayout("adafactor", {"exp_avg_sq_row": "exp_avg_sq_row", "exp_avg_sq_col": "exp_avg_sq_col"}),
    RuleLayout("adafactor", {"exp_avg_sq": "exp_avg_sq"}),
    RuleLayout("adafactor", {slot: slot for slot in ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq")}),
)
UNCORRECTED: Final = {"adam": "adam_uncorrected", "adamw": "adamw_uncorrected"}
NAMES: Final = ("optimizer_state.safetensors", "optimizer.safetensors")
TARGET: Final = NAMES[0]
SUFFIX: Final = "_optimizer.safetensors"
"""mflux and others write ``0000100_optimizer.safetensors``, and the adapter with the same number."""
COUNTERS: Final = {"step": ("U64", ()), "learning_rate": ("F32", ())}
PART: Final = "states.0.learning_rate"
"""The key that says that it is a MultiOptimizer's."""

LEARNING_RATES: Final = frozenset({"learning_rate", PART})


def detect(path: Path) -> Match | None:
    if path.is_dir():
        places = [*(path / name for name in NAMES), *sorted(path.glob(f"*{SUFFIX}"))]
        found = [match for place in places if place.is_file() and (match := detect(place))]
        return found[0] if len(found) == 1 else None
    with File(path) as file:
        try:
            if path.suffix == ".zip":
                members = [name for name in Archive(file, path) if name.endswith(SUFFIX)]
                return Match(f"a zip archive with {members[0]}, as mflux writes it", path) if members else None
            if path.suffix == ".npz" and not LEARNING_RATES & set(arrays_in(file, path)):
                return None  # before an archive that is compressed is unpacked
            tensors = _tensors(file, path) if path.suffix in (".safetensors", ".npz") else {}
        except FileError:
            return None
    if PART in tensors or _counters(tensors) == COUNTERS:
        return Match(f"{path.suffix[1:]} with step and learning_rate next to <parameter>.<slot>, as MLX has them", path)
    return None


def _tensors(file: File, path: Path) -> Mapping[str, Tensor]:
    return read_npz(file, path) if path.suffix == ".npz" else read_header(file, foreign=True).tensors


def _counters(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {key: (tensors[key].dtype, tensors[key].shape) for key in COUNTERS if key in tensors}


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Return the state, and the adapter next to it. Parameters are in the order of the file.

    Raises ``RefusedError`` for 8-bit moments and a MultiOptimizer, ``OptionError`` where the rule is not stated, or for
    Adam and AdamW whether they correct the bias.
    """
    path = match.path
    files = [File(path)]
    try:
        if path.suffix == ".zip":
            raise RefusedError(f"compressed: unzip it and convert the file *{SUFFIX} in it", path=path)
        found = _tensors(files[0], path)
        if PART in found:
            raise RefusedError(
                "the state of a MultiOptimizer, whose parts do not say their rules: save the state of each part",
                path=path,
            )
        weights = _weights(path, files)
        state = _state(found, weights, path, options, tuple(files))
        layout = options.get("map", "mlx_lm" if all(_is_lora(name) for name in state) else None)
        return apply.on_reading(Checkpoint(state, weights), layout)
    except BaseException:
        for file in files:
            file.close()
        raise


def _weights(path: Path, files: list[File]) -> Mapping[str, Tensor]:
    number = path.name.removesuffix(SUFFIX) if path.name.endswith(SUFFIX) else None
    names = ("adapters",) if number is None else (f"{number}_adapters", f"{number}_adapter")
    for beside in (path.with_name(f"{name}{suffix}") for name in names for suffix in (".safetensors", ".npz")):
        if beside.is_file():
            files.append(File(beside))
            return _tensors(files[-1], beside)
    return {}


def _is_lora(name: str) -> bool:
    return name.rpartition(".")[2] in ("lora_a", "lora_b", "m")


def _state(
    found: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    path: Path,
    options: Mapping[str, Any],
    resources: tuple[File, ...],
) -> OptimizerState:
    slots: dict[str, dict[str, Tensor]] = {}
    for key, tensor in found.items():
        if key in COUNTERS:
            continue
        name, _, field = key.rpartition(".")
        if field.isdecimal() and name.endswith(".m"):
            raise RefusedError(f"'{key}' is a part of a moment in 8 bits: it was rounded when it was saved", path=path)
        if weights and name not in weights:
            raise FileError(f"'{key}' is state of '{name}', which the adapter next to it does not have", path=path)
        slots.setdefault(name, {})[field] = tensor
    if not slots:
        raise FileError("holds no parameter's state", path=path)
    step = int.from_bytes(found["step"].bytes(), "little")
    rate = struct.unpack("<f", found["learning_rate"].bytes())[0]
    lr = options.get("lr", rate)
    algorithms.check_told("lr", lr, rate, path)
    rule = _rule(options, path)
    parameters = [_parameter(name, fields, rule, step, weights, path) for name, fields in slots.items()]
    algorithm, _ = algorithms.choose(rule, LAYOUTS, next(iter(slots.values())), str(path))
    return OptimizerState(
        optimizers=(Optimizer(algorithm.class_path),),
        groups=(Group(0, algorithms.group_options(algorithm, {**options, "lr": lr}), len(parameters)),),
        parameters=tuple(parameters),
        naming=Naming("checkpoint", details={"order": "unknown"}),
        origin={"format": NAME},
        global_step=step,
        resources=resources,
    )


def _rule(options: Mapping[str, Any], path: Path) -> str | None:
    rule = options.get("optimizer")
    if rule not in UNCORRECTED:
        return rule
    corrected = options.get("bias_correction")
    if not isinstance(corrected, bool):
        raise OptionError(
            f"{path}: the file does not say whether MLX's {rule} corrected the bias of its moments",
            remedy=Remedy("pass {options}, or False, which is MLX's default", {"options": {"bias_correction": True}}),
        )
    return rule if corrected else UNCORRECTED[rule]


def _parameter(
    name: str, fields: Mapping[str, Tensor], rule: str | None, step: int, weights: Mapping[str, Tensor], path: Path
) -> Parameter:
    algorithm, layout = algorithms.choose(rule, LAYOUTS, fields, f"{path}: '{name}'")
    values = {slot: fields[field] for field, slot in layout.fields.items()}
    shape = None
    if "exp_avg_sq_col" in values:
        row, col = values["exp_avg_sq_row"].shape, values["exp_avg_sq_col"].shape
        shape = (*row, *col[-1:])
    return algorithms.parameter_of(name, values, algorithm, step, weight=weights.get(name), path=path, shape=shape)


# --- writing ------------------------------------------------------------------------------------------------------


def write(state: OptimizerState, path: Path, *, base: Path | None, force: bool, options: Mapping[str, Any]) -> None:
    """Write ``optimizer.state`` for ``tree_unflatten(list(mx.load(path).items()))``.

    Raises ``UnrepresentableError`` for a state that MLX cannot hold: steps that differ, several learning rates.
    """
    if base is not None:
        raise OptionError(f"{NAME} writes a whole file and takes nothing from another ({base})")
    state = apply.on_writing(state, options.get("map"), NAME)
    algorithm = algorithms.of_state(state, options.get("optimizer"))
    layout = algorithms.layout_of(state, algorithm, LAYOUTS)
    rate = _rate(state, options)
    algorithms.check_alike(state.groups, algorithm, {"lr": rate, **options})
    tensors: dict[str, Tensor] = {}
    for parameter in state.parameters:
        values = algorithms.values_of(parameter, algorithm, layout)
        for field, slot in layout.fields.items():
            leaf = values.get(slot)
            if leaf is not None:
                tensors[f"{parameter.name}.{field}"] = (
                    leaf if isinstance(leaf, Tensor) else _tensor(leaf.dtype, leaf.data)
                )
            elif algorithm.name != "adafactor":
                raise UnrepresentableError(f"'{parameter.name}' has no tensor '{slot}', which MLX keeps")
    tensors["step"] = _tensor("U64", struct.pack("<Q", _steps(state, algorithm, options)))
    tensors["learning_rate"] = _tensor("F32", struct.pack("<f", rate))
    plain.save(tensors, path, force=force)


def _tensor(dtype: str, data: bytes) -> Tensor:
    return contiguous(dtype, (), Memory(data))


def _steps(state: OptimizerState, algorithm: Algorithm, options: Mapping[str, Any]) -> int:
    count = algorithms.steps(state.parameters) if algorithm.step is not None else None
    if count is None:
        count = algorithms.stated_step(options) if "step" in options else state.global_step
    if count is None:
        raise UnrepresentableError("the state does not say how many steps were taken", remedy=algorithms.STATE_STEPS)
    return count


def _rate(state: OptimizerState, options: Mapping[str, Any]) -> float:
    """Return the learning rate of all groups, or as the caller states it."""
    found = [dict(group.options).get("lr") for group in state.groups if group.count]
    rates = {rate.item() if isinstance(rate, Scalar) else rate for rate in found}
    rate = options["lr"] if "lr" in options else rates.pop() if len(rates) == 1 else None
    if not isinstance(rate, (int, float)):
        raise UnrepresentableError(
            f"MLX has one learning rate, and the groups have {found}",
            remedy=Remedy("pass the one to write as {options}", {"options": {"lr": ...}}),
        )
    return float(rate)
