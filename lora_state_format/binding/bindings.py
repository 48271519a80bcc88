"""What becomes of each parameter of a live optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from lora_state_format.binding.crossing import Crossings, Fit, source_of, translated
from lora_state_format.binding.live import LiveOptimizer
from lora_state_format.binding.matching import Matching
from lora_state_format.binding.policies import Policies
from lora_state_format.binding.resizing import Resize, differs, resize, scaling
from lora_state_format.model.states import OptimizerState, Parameter
from lora_state_format.optimizers.classes import UNKNOWN, Form
from lora_state_format.optimizers.roles import MASTER

__all__ = ["Binding", "bind", "describe_masters"]


@dataclass(frozen=True, slots=True)
class Binding:
    """What becomes of one parameter of the live optimizer.

    ``saved`` is ``None`` for a parameter that starts afresh; its slots are those of the live class. ``dtype`` is what
    floating slots are cast to, ``None`` for as they are. ``resize`` says where elements go in a parameter of another
    shape, and ``scale`` by how much its gradients have become larger since, because alpha / r has. ``quantise`` means
    that the live class keeps moments as codes where its configuration says so.
    """

    name: str
    saved: Parameter | None
    dtype: str | None = None
    resize: Resize | None = None
    scale: float = 1.0
    quantise: bool = False


def bind(
    state: OptimizerState, live: LiveOptimizer, matching: Matching, crossings: Crossings, policies: Policies
) -> tuple[Binding, ...]:
    """Return what becomes of each parameter of the live optimizer, in its order."""
    sources = {target: state[name] for name, target in matching.found.items()}
    homes = source_of(state)
    groups = {
        p.name: dict(group.options)
        for group, members in zip(state.groups, state.members(), strict=True)
        for p in members
    }

    def binding(name: str) -> Binding:
        saved, own = sources.get(name), live.parameters[name]
        if saved is None:
            return Binding(name, None)
        crossing = crossings[homes[saved.name], live.groups[live.members[name]].optimizer]
        change = resize(state, saved, own) if differs(state, saved, own) else None
        if crossing.fit is Fit.OTHER or (change and (policies.mismatch != "resize" or isinstance(change, str))):
            return Binding(name, None)
        assert not isinstance(change, str)
        then = scaling(state, saved) if change else None
        now = own.layer.scaling if own.layer else None
        dtype = own.dtype if policies.dtype == "param" else None
        coded = live.known[live.groups[live.members[name]].optimizer].form is Form.BITSANDBYTES
        return Binding(
            name,
            translated(_without_master(saved, live, name), crossing, groups.get(saved.name, {})),
            "F32" if crossing.quantise and coded else dtype,
            change,
            now / then if now and then else 1.0,
            crossing.quantise,
        )

    return tuple(map(binding, live.members))


def _without_master(saved: Parameter, live: LiveOptimizer, name: str) -> Parameter:
    """Return a saved parameter without its float32 copy where nothing steps one; an unknown class may have its own."""
    if live.parameters[name].narrow or not saved.state or MASTER not in saved.state:
        return saved
    row = live.known[live.groups[live.members[name]].optimizer]
    if row is UNKNOWN or MASTER in row.slots:
        return saved
    return replace(saved, state={slot: value for slot, value in saved.state.items() if slot != MASTER})


def describe_masters(live: LiveOptimizer, bindings: Iterable[Binding], saved: Mapping[str, Parameter]) -> Iterator[str]:
    """Yield what there is to say of float32 copies that the file has and the optimizer has not, or the other way.

    Args:
        live: The live side.
        bindings: What becomes of its parameters.
        saved: The file's parameters, by live name.
    """
    left, lacking = [], []
    for binding in bindings:
        state = binding.saved.state if binding.saved else None
        if state and live.parameters[binding.name].narrow and MASTER not in state:
            lacking.append(binding.name)
        if state and MASTER not in state and MASTER in (saved[binding.name].state or {}):
            left.append(binding.name)
    if left:
        yield (
            f"the float32 masters of {len(left)} parameters are left out (the first is '{left[0]}'): this optimizer "
            f"steps the weights themselves; `lora-state export FILE masters.safetensors --slot {MASTER}` writes them "
            "as plain weights"
        )
    if lacking:
        yield (
            f"the file has no float32 masters of {len(lacking)} parameters (the first is '{lacking[0]}'): DeepSpeed's "
            "are its weights, rounded, so the run does not go on bit for bit"
        )
