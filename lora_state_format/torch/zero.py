"""DeepSpeed's ZeRO: an optimizer whose state is flat partitions, seen as one of the model's parameters.

Stages 1 and 2 give each rank a run of a group's parameters laid end to end; stage 3 cuts every parameter into as many
runs as there are ranks. ``view_of`` makes of DeepSpeed's optimizer what the rest of this package knows: groups with the
model's parameters, and for each the elements that this rank has. What is set there goes into the live partitions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from lora_state_format.errors import BindError, CaptureError
from lora_state_format.model.text import class_path
from lora_state_format.optimizers.roles import MASTER
from lora_state_format.torch.fsdp1 import Part
from lora_state_format.torch.tensors import dtype_name

__all__ = ["ZeroView", "check_master", "parts_of_zero", "view_of"]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a parameter's elements of this rank stand: ``count`` of a flat partition, from ``offset`` on."""

    flat: torch.Tensor
    offset: int
    count: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.narrow(0, self.offset, self.count)


def view_of(optimizer: Any) -> ZeroView | None:
    """Return the view of a DeepSpeed optimizer of ZeRO 1, 2 or 3, or of an engine that has one; else ``None``.

    Raises:
        CaptureError: For a partition that is not in memory, or an optimizer of DeepSpeed's that is not known here.
    """
    if "deepspeed" not in sys.modules:
        return None
    from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
    from deepspeed.runtime.engine import DeepSpeedEngine

    found = optimizer.optimizer if isinstance(optimizer, DeepSpeedEngine) else optimizer
    if not isinstance(found, DeepSpeedOptimizer):
        return None
    if hasattr(found, "fp32_partitioned_groups_flat"):
        return _stage3(found)
    if hasattr(found, "single_partition_of_fp32_groups"):
        return _stage12(found)
    raise CaptureError(
        f"{class_path(type(found))} keeps its state in a way that is not known here; use "
        "ZeRO stage 1, 2 or 3, without bf16's own optimizer"
    )


def _stage12(found: Any) -> ZeroView:
    places: dict[int, _Place] = {}
    for group, flat in zip(found.bit16_groups, found.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:
                places[id(parameter)] = _Place(flat, 0, 0)
            else:
                address = mapping.get_hp_fragment_address()
                places[id(parameter)] = _Place(flat, address.start, address.numel)
    return ZeroView(found, [list(group) for group in found.bit16_groups], places)


def _stage3(found: Any) -> ZeroView:
    if getattr(found, "swap_optimizer", False) or getattr(found, "params_in_nvme_and_cpu", False):
        raise CaptureError(
            "DeepSpeed keeps optimizer state on NVMe, where it is not read; offload it to the CPU instead"
        )
    groups: list[list[Any]] = [[] for _ in found.optimizer.param_groups]
    places: dict[int, _Place] = {}
    for number, parameters in enumerate(found.fp16_groups):
        groups[found.sub_group_to_group_id[number]] += parameters
        for parameter in parameters:
            _, offset, _ = found.grad_position[found.get_param_id(parameter)]
            flat = found.fp32_partitioned_groups_flat[number]
            places[id(parameter)] = _Place(flat, offset, _run3(parameter)[1])
    return ZeroView(found, groups, places)


def _run3(parameter: Any) -> tuple[int, int]:
    """Return the first element that this rank has of a parameter of stage 3, and how many; the last has less."""
    size = parameter.ds_tensor.ds_numel if hasattr(parameter.ds_tensor, "ds_numel") else parameter.ds_tensor.numel()
    start = size * torch.distributed.get_rank(parameter.ds_process_group)
    return min(start, parameter.ds_numel), min(size, max(0, parameter.ds_numel - start))


def parts_of_zero(model: torch.nn.Module) -> dict[int, Part]:
    """Return what this rank has of the state of each parameter that DeepSpeed has cut up, by ``id(parameter)``."""
    found: dict[int, Part] = {}
    for parameter in model.parameters() if "deepspeed" in sys.modules else ():
        held: Any = parameter
        if hasattr(held, "ds_id"):
            start, count = _run3(held)
            cut = held.ds_tensor.data.reshape(-1)[:count]
            found[id(parameter)] = Part(tuple(held.ds_shape), start, count, cut, _master(held))
        elif hasattr(held, "_hp_mapping"):
            mapping = held._hp_mapping
            address = mapping.lp_fragment_address if mapping is not None else None
            start, count = (address.start, address.numel) if address else (0, 0)
            found[id(parameter)] = Part(tuple(parameter.shape), start, count, None, "F32")
    return found


def _master(parameter: Any) -> str | None:
    optimizer = getattr(parameter, "_z3_optimizer", None)
    return dtype_name(optimizer.fp32_partitioned_groups_flat[0].dtype) if optimizer is not None else None


class _Group(MutableMapping[str, Any]):
    """A group's options, which are those of DeepSpeed's inner optimizer, with the model's parameters."""

    def __init__(self, options: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        self._options = options
        self._parameters = parameters

    def __getitem__(self, key: str) -> Any:
        return self._parameters if key == "params" else self._options[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._options[key] = value

    def __delitem__(self, key: str) -> None:
        del self._options[key]

    def __iter__(self) -> Iterator[str]:
        return (key for key in self._options if key != "params")

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _State(MutableMapping[Any, Mapping[str, Any]]):
    """Parameter -> its slots, of which tensors are this rank's elements; what is set goes into the partitions."""

    def __init__(
        self,
        state: MutableMapping[Any, Any],
        parameters: list[torch.Tensor],
        places: dict[int, _Place],
        forgotten: Callable[[], None],
    ) -> None:
        self._state = state
        self._parameters = parameters
        self._places = places
        self._forgotten = forgotten

    def __getitem__(self, parameter: torch.Tensor) -> Mapping[str, Any]:
        place = self._places[id(parameter)]
        slots = self._state.get(place.flat, {})
        if not slots:
            raise KeyError(parameter)
        held = {key: place.of(value) if _is_flat(value, place.flat) else value for key, value in slots.items()}
        return {**held, MASTER: place.of(place.flat)} if _has_master(parameter, place) else held

    def __setitem__(self, parameter: torch.Tensor, slots: Mapping[str, Any]) -> None:
        place = self._places[id(parameter)]
        live = self._state.setdefault(place.flat, {})
        for key, value in slots.items():
            if key == MASTER:
                if _has_master(parameter, place):
                    place.of(place.flat).data.copy_(value)
                continue
            if not isinstance(value, torch.Tensor) or value.shape != (place.count,) or not value.dim():
                live[key] = value
                continue
            if not _is_flat(live.get(key), place.flat):
                live[key] = torch.zeros_like(place.flat, dtype=value.dtype)
            place.of(live[key]).copy_(value)

    def __delitem__(self, parameter: torch.Tensor) -> None:
        raise TypeError("DeepSpeed keeps one state for a whole partition: it is cleared, and set anew")

    def clear(self) -> None:
        """Forget the state of all partitions. Whoever holds its tensors still has its values."""
        for place in self._places.values():
            self._state.pop(place.flat, None)
        self._forgotten()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (parameter for parameter in self._parameters if self._state.get(self._places[id(parameter)].flat))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _has_master(parameter: torch.Tensor, place: _Place) -> bool:
    """Return whether DeepSpeed steps a wider copy of a parameter, which its next step rounds into the weights."""
    return place.flat.dtype != parameter.dtype


def check_master(name: str, parameter: torch.Tensor, part: Part, master: torch.Tensor) -> None:
    """Raise ``BindError`` unless a float32 master, rounded, is what this rank has of the live weights.

    Args:
        name: The parameter's.
        parameter: The live one, of another dtype.
        part: What this rank has of it.
        master: The elements of that part.
    """
    own = part.own if part.own is not None else parameter.detach().reshape(-1)[part.start : part.start + part.count]
    rounded = master.to(device=own.device, dtype=own.dtype)
    differing = int((rounded != own).logical_and_(~(rounded.isnan() & own.isnan())).sum())
    if differing:
        raise BindError(
            f"'{name}': the float32 master in the file, rounded to {dtype_name(own.dtype)}, differs from the live "
            f"weights in {differing} of {own.numel()} elements, which the next step would overwrite: load the "
            "weights of the same save into the model first"
        )


def _is_flat(value: Any, flat: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == flat.shape and value.dim() > 0


class ZeroView:
    """DeepSpeed's optimizer as torch's are.

    Attributes:
        base: DeepSpeed's inner optimizer, of the class that takes the steps.
        param_groups: Its groups, with the model's parameters.
        defaults: The inner optimizer's.
        state: What this rank has of each parameter's state.
        masters: The partitions of wider copies of the weights, which a load fills in place.
    """

    def __init__(self, found: Any, groups: list[list[torch.Tensor]], places: dict[int, _Place]) -> None:
        base: torch.optim.Optimizer = found.optimizer

        def forgotten() -> None:
            if hasattr(found, "_hp_optimizer_states_linked"):  # by the next step to the new tensors
                found._hp_optimizer_states_linked = False

        self.base = base
        self.defaults = base.defaults
        self.param_groups = [_Group(o, g) for o, g in zip(base.param_groups, groups, strict=True)]
        self.state = _State(base.state, [p for group in groups for p in group], places, forgotten)
        self._places = places
        wider = [places[id(p)].flat for group in groups for p in group if _has_master(p, places[id(p)])]
        self.masters = list({id(flat): flat for flat in wider}.values())

    def check(self, steps: Mapping[int, Any]) -> None:
        """Raise ``BindError`` where parameters of one partition have taken different numbers of steps.

        Args:
            steps: ``id(parameter)`` -> what the file has as its step; ``None`` for one that took none.
        """
        found: dict[torch.Tensor, set[Any]] = {}
        for key, step in steps.items():
            if key in self._places:
                found.setdefault(self._places[key].flat, set()).add(step)
        for flat, values in found.items():
            if values == {None} and self.base.state.get(flat):
                raise BindError(
                    "the file's parameters have taken no step, and DeepSpeed's have: load it into an engine that has "
                    "taken none either"
                )
            if len(values) > 1:
                raise BindError(
                    f"DeepSpeed counts the steps of a whole partition, and its parameters have taken {len(values)} "
                    "different numbers of steps in the file: load it into a run without ZeRO"
                )
