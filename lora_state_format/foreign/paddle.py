"""The state of Paddle's optimizers by parameter and accumulator, however a file keeps it.

There are neither steps nor options, but for Adam the powers of its betas: ``powers`` checks a step by them, or counts
it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, OptionError
from lora_state_format.foreign.powers import counted
from lora_state_format.io.files import Files
from lora_state_format.mapping import algorithms
from lora_state_format.mapping.algorithms import RuleLayout
from lora_state_format.model.states import Group, Naming, Optimizer, OptimizerState, Role, Slot
from lora_state_format.model.tensors import Tensor
from lora_state_format.optimizers.roles import MASTER

__all__ = ["LAYOUTS", "POWERS", "betas_of", "state_of"]

LAYOUTS: Final = (
    RuleLayout("adam", {"moment1_0": "exp_avg", "moment2_0": "exp_avg_sq"}),
    RuleLayout("adamw", {"moment1_0": "exp_avg", "moment2_0": "exp_avg_sq"}),
    RuleLayout("sgd", {"velocity_0": "momentum_buffer"}),
)
POWERS: Final = ("beta1_pow_acc_0", "beta2_pow_acc_0")

USUAL: Final = ((0.9, 0.999), (0.9, 0.95), (0.9, 0.98), (0.9, 0.99), (0.5, 0.999))
"""Betas that are tried where neither they nor the step are stated: both powers have to be theirs, bit for bit."""


def state_of(
    slots: Mapping[str, Mapping[str, Tensor]],
    weights: Mapping[str, Tensor],
    path: Path,
    options: Mapping[str, Any],
    *,
    step: int | None = None,
    usual: bool = False,
    origin: str,
    files: Files,
) -> OptimizerState:
    """Return the named state of accumulators by parameter.

    Args:
        slots: Name of a parameter -> its accumulators by field.
        weights: The parameters' values, as far as they are known.
        path: The file, for messages.
        options: What the caller states: the optimizer, its hyperparameters, the step.
        step: What the files say of the step; the caller goes before them.
        usual: Whether the usual betas may count the step.
        origin: The format.
        files: What has to stay open.

    Raises ``OptionError`` where the rule is not stated, ``FileError`` where steps and powers disagree.
    """
    stated = algorithms.stated_step(options) if "step" in options else step
    betas = betas_of(options["betas"]) if "betas" in options else None
    parameters, algorithm, counts = [], None, set()
    for name, held in slots.items():
        fields = {field: tensor for field, tensor in held.items() if field not in (*POWERS, MASTER)}
        where = f"{path}: '{name}'"
        algorithm, layout = algorithms.choose(options.get("optimizer"), LAYOUTS, fields, where)
        powers = tuple(struct.unpack("<f", held[field].bytes())[0] for field in POWERS if field in held)
        count = stated
        if powers:
            if usual and stated is None and betas is None:
                betas = _usual(powers, where)
            count, betas = counted(powers, betas, stated, where)
        counts.add(count)
        values = {slot: fields[field] for field, slot in layout.fields.items()}
        parameter = algorithms.parameter_of(name, values, algorithm, count, weight=weights.get(name), path=path)
        if MASTER in held:
            master = Slot(held[MASTER], Role.PARAM)
            parameter = replace(parameter, state={**(parameter.state or {}), MASTER: master})
        parameters.append(parameter)
    if algorithm is None:
        raise FileError("holds no parameter's state", path=path)
    known = {**options, **({"betas": betas} if betas is not None and "betas" in algorithm.options else {})}
    return OptimizerState(
        optimizers=(Optimizer(algorithm.class_path),),
        groups=(Group(0, algorithms.group_options(algorithm, known), len(parameters)),),
        parameters=tuple(parameters),
        naming=Naming("checkpoint", details={"order": "unknown"}),
        origin={"format": origin},
        global_step=counts.pop() if len(counts) == 1 else None,
        resources=(files,),
    )


def _usual(powers: Sequence[float], where: str) -> tuple[float, ...] | None:
    """Return the usual betas whose powers these are after some number of steps."""
    for betas in USUAL:
        try:
            counted(tuple(powers), betas, None, where)
        except FileError:
            continue
        return betas
    return None


def betas_of(value: Any) -> tuple[float, ...]:
    """Return two betas as they were given. Raises ``OptionError`` for anything else."""
    numbers = value if isinstance(value, (list, tuple)) and len(value) == 2 else (None,)
    if not all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in numbers):
        raise OptionError(f"betas={value!r} is not two numbers from 0 to 1")
    return tuple(value)
