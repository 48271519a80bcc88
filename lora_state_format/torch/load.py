"""Load state into a live optimizer: open it, name it where it has positions, plan, apply."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lora_state_format import registry
from lora_state_format.binding import plan as planning
from lora_state_format.binding.live import LiveOptimizer, LiveParameter
from lora_state_format.binding.plan import LoadPlan
from lora_state_format.binding.policies import (
    Dtype,
    Mismatch,
    MismatchClass,
    Missing,
    Policies,
    PolicyArguments,
    Renaming,
    Unexpected,
)
from lora_state_format.errors import ConversionError, FileError, MissingDependencyError
from lora_state_format.format import envelope, reading
from lora_state_format.model import digests
from lora_state_format.model.digests import ALGORITHM
from lora_state_format.model.states import Checkpoint, OptimizerState, Parameter, Scalar
from lora_state_format.model.tensors import Digest, Tensor
from lora_state_format.naming import order, rules
from lora_state_format.naming.names import peft_key
from lora_state_format.naming.sources import Live as LiveNames
from lora_state_format.naming.sources import name_state
from lora_state_format.optimizers.rounded import describe_stored
from lora_state_format.torch.apply import LoadReport, carry_out
from lora_state_format.torch.capture import Models, Optimizers, sharding, weights_of
from lora_state_format.torch.live import Live, describe
from lora_state_format.torch.rebuild import rebuild
from lora_state_format.torch.tensors import (
    from_torch,
    is_sharded,
    refusal,
)
from lora_state_format.torch.zero import ZeroView

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["load_optimizer", "plan"]

logger = logging.getLogger("lora_state_format")


def load_optimizer(
    optimizer: Optimizers,
    model: Models,
    path: str | os.PathLike[str],
    *,
    missing: Missing = "error",
    unexpected: Unexpected = "error",
    mismatch: Mismatch = "error",
    mismatch_class: MismatchClass = "error",
    dtype: Dtype = "saved",
    options: Mapping[str, Any] | None = None,
    rename: Renaming | None = None,
    verify: bool = True,
) -> LoadReport:
    """Load state into a live optimizer, or several, by the names of the model's parameters: all of it, or nothing.

    ``path`` is a file or a set of shards of this format, or any checkpoint that a converter reads. Where that one has
    positions instead of names, the order of the live optimizer says what they mean, with a warning: order alone is no
    proof. The policies are those of ``binding.policies.Policies``.

    Of a sharded model each rank reads its own part, whatever the placement; call this on every rank. If one fails, all
    do. Digests cover whole tensors, so the ranks share the work of verifying those that they read in parts, and of
    comparing the weights: each tensor is read, or sent, once more. ``verify=False`` leaves both out.

    Raises ``BindError`` that names everything that does not fit, ``DigestError`` and ``FileError`` for damaged bytes,
    ``RankError`` if another rank raised something, and what opening the path raises. The optimizer is then as it was.
    """
    policies = Policies(missing, unexpected, mismatch, dtype, options or {}, rename, mismatch_class)
    if sharding(optimizer, model):
        return _load_together(optimizer, model, Path(path), policies, verify)
    with _open(Path(path), live := describe(optimizer, model)) as state:
        return carry_out(_planned(state, live.side, policies), live)


def _planned(state: OptimizerState, live: LiveOptimizer, policies: Policies) -> LoadPlan:
    """Return the plan, which says too what the file says of slots that were rounded."""
    loading = planning.plan(state, live, policies)
    lossy = describe_stored(state.origin)
    return replace(loading, notes=(*loading.notes, lossy)) if lossy else loading


def _load_together(optimizer: Optimizers, model: Models, path: Path, policies: Policies, verify: bool) -> LoadReport:
    """Load a sharded state: every rank its part, all of them or none."""
    from lora_state_format.torch.distributed import hashes, verify_share
    from lora_state_format.torch.ranks import Ranks, agreement

    ranks = Ranks()
    with agreement(ranks) as agree, _open(path, live := describe(optimizer, model)) as state:
        named = live.named
        spread = {name for name, tensor in named.tensors.items() if is_sharded(tensor) or name in named.parts}
        agree(False)
        if verify and any(parameter.weights for parameter in state.parameters):
            own = {name: weights_of(named, name) for name in live.side.members if name in spread}
            found = {name: Digest(ALGORITHM, own[name].dtype, value) for name, value in hashes(own, ranks).items()}
            live = replace(live, side=_with_digests(live.side, found))
        loading = _planned(state, live.side, policies)
        parts = {
            f"'{b.name}': slot '{'.'.join(map(str, path))}'": slot.tensor
            for b in loading.bindings
            if b.saved and b.name in spread
            for path, slot in b.saved.tensors()
        }
        for view in live.optimizers:
            if isinstance(view, ZeroView):
                view.check({id(named.tensors[b.name]): _step(b.saved) for b in loading.bindings if b.name in spread})
        with ThreadPoolExecutor(1) as beside:
            verifying = beside.submit(verify_share, parts if verify else {})

            def settle() -> None:
                verifying.result()
                agree(True)

            return carry_out(loading, live, settle)


def _step(saved: Parameter | None) -> Any:
    step = (saved.state or {}).get("step") if saved else None
    return step.item() if isinstance(step, Scalar) else step


def _with_digests(live: LiveOptimizer, found: Mapping[str, Digest]) -> LiveOptimizer:
    """Return the live side, with the digests of parameters of which this rank has only a part."""
    parameters = {
        name: replace(parameter, digest=partial(found.__getitem__, name)) if name in found else parameter
        for name, parameter in live.parameters.items()
    }
    return replace(live, parameters=parameters)


def plan(state: OptimizerState, optimizer: Optimizers, model: Models, **policies: Unpack[PolicyArguments]) -> LoadPlan:
    """Return what loading a state into a live optimizer would do; nothing is read or changed.

    The policies are those of ``binding.policies.Policies``.
    """
    return planning.plan(state, describe(optimizer, model).side, Policies(**policies))


def _open(path: Path, live: Live) -> OptimizerState:
    """Return the named state at a path; positions are named by the live optimizer's order, or the live model."""
    if envelope.is_state(path):
        return reading.open_state(path)
    with registry.read(path).closed_on_error() as checkpoint:
        return _named(checkpoint, path, live)


def _named(checkpoint: Checkpoint, path: Path, live: Live) -> OptimizerState:
    """Return the state under its own names, or under those of the live optimizer's or model's parameters."""
    if isinstance(checkpoint.state, OptimizerState):
        return checkpoint.state
    named = live.named
    parameters = [
        rules.Described(
            _beside(p, checkpoint.weights),
            p.requires_grad,
            tuple(kind.__name__ for kind in named.owners[p.name].__mro__[:-1]),
        )
        for p in live.side.parameters.values()
    ]
    own = {name: from_torch(tensor) for name, tensor in named.tensors.items() if refusal(tensor) is None}
    where = "beside it" if checkpoint.weights else "of the live model"
    groups = [group.parameters for group in live.side.groups]
    try:
        state, _, skipped = name_state(checkpoint, path, live=LiveNames(parameters, groups, own), rebuild=rebuild)
    except order.ContradictedError:
        raise
    except ConversionError:
        if (found := _by_its_own_names(checkpoint, path)) is None:
            raise
        logger.warning(
            "%s does not fit the parameters of the live optimizer in any order; its names are those of %s",
            path,
            found.naming.details.get("place", found.naming.source),
        )
        return found
    for file in skipped:
        logger.warning("%s", file)
    details = state.naming.details
    evidence = cast("Mapping[str, str]", details.get("evidence", {}))
    verdict = evidence.get("verdict")
    if verdict == "contradicted":
        raise ConversionError(
            f"{path}: its parameters do not stand in the order of the live optimizer, say the weights {where}\n"
            "hint: give it names first, with convert(path, 'optimizer.safetensors'), and load that file"
        )
    if state.naming.rule == "stated":
        return state
    logger.warning(
        "%s has no names; its %d parameters were named by the order of the live %s. Order alone is no proof: %s of "
        "them could be swapped without a shape that shows it%s",
        path,
        len(state),
        "optimizer" if state.naming.rule == order.LIVE else f"model (rule '{state.naming.rule}')",
        details["interchangeable"],
        f"; the order was weighed against the weights {where}: {verdict}" if verdict else "",
    )
    return state


def _by_its_own_names(checkpoint: Checkpoint, path: Path) -> OptimizerState | None:
    """Return the state under the names that the checkpoint has for it, for a model of other parameters or shapes."""
    try:
        return name_state(checkpoint, path, rebuild=rebuild).state
    except (ConversionError, FileError, MissingDependencyError):
        return None


def _beside(parameter: LiveParameter, weights: Mapping[str, Tensor]) -> Parameter:
    """Return the parameter, with the digest of its own bytes where they lie beside the state."""
    key = peft_key(parameter.name)
    tensor = weights.get(key[0] if key else parameter.name)
    return Parameter(
        name=parameter.name,
        shape=parameter.shape,
        state=None,
        dtype=parameter.dtype,
        tied=parameter.tied,
        foreign_names={"peft": key[0]} if key else {},
        weights=Digest(ALGORITHM, tensor.dtype, digests.hash_tensor(tensor)) if tensor else None,
    )
