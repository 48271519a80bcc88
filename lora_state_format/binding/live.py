"""The live side of a load, as ``plan`` sees it: a model's parameters and an optimizer's groups, without a framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from lora_state_format.errors import Remedy
from lora_state_format.model.states import Optimizer, Value
from lora_state_format.model.tensors import Digest
from lora_state_format.optimizers.classes import Known, known

__all__ = ["Layer", "LiveGroup", "LiveOptimizer", "LiveParameter", "Problem"]


@dataclass(frozen=True, slots=True)
class Layer:
    """What the layer around an adapter's parameter says of its axes.

    ``scaling`` is what LoRA multiplies the parameter's product with (alpha / r). ``fold`` is the parameter's shape with
    -1 for its rank, where experts that share an axis with it have one of their own. ``masks`` means that the rank is
    cut by a mask, as AdaLoRA does, and ``kept`` are the ranks that it kept. ``tokens`` are the ids that its rows belong
    to.
    """

    scaling: float | None = None
    fold: tuple[int, ...] | None = None
    masks: bool = False
    kept: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class LiveParameter:
    """A parameter of the live model. ``dtype`` is spelled as in safetensors.

    ``digest()`` is that of its bytes now, ``corner(shape)`` that of its first elements along each axis; ``constant()``
    says whether it is one value again and again. ``layer`` is known for an adapter's parameters. ``narrow`` is the
    dtype of the weights where the optimizer steps a wider copy, which is a slot of its state (DeepSpeed's ZeRO).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool = True
    tied: tuple[str, ...] = ()
    digest: Callable[[], Digest] | None = None
    corner: Callable[[tuple[int, ...]], Digest] | None = None
    constant: Callable[[], bool] | None = None
    layer: Layer | None = None
    narrow: str | None = None


@dataclass(frozen=True, slots=True)
class LiveGroup:
    """A group of a live optimizer; ``optimizer`` is its number, ``parameters`` are names in the group's order."""

    optimizer: int
    options: tuple[tuple[str, Value], ...]
    parameters: tuple[str, ...]
    name: str | None = None


@dataclass(frozen=True)
class LiveOptimizer:
    """The live side: one optimizer, or the several of one run, and every parameter of the model.

    ``parameters`` are all that the model has, trainable or not, in the optimizer or not. ``lineages`` has for each
    optimizer its class path and those of the ancestors whose step it inherits, ``beside`` the members that its own
    state dict has next to ``state`` and ``param_groups``, ``inner`` the classes of those that it wraps, by attribute.
    """

    optimizers: tuple[Optimizer, ...]
    groups: tuple[LiveGroup, ...]
    parameters: Mapping[str, LiveParameter]
    lineages: tuple[tuple[str, ...], ...] = ()
    beside: tuple[frozenset[str], ...] = ()
    inner: tuple[Mapping[str, str], ...] = ()

    @cached_property
    def members(self) -> dict[str, int]:
        """Name -> number of its group, for every parameter in the optimizer, in its order."""
        return {name: number for number, group in enumerate(self.groups) for name in group.parameters}

    @cached_property
    def options(self) -> list[dict[str, Value]]:
        """The options of each group."""
        return [dict(group.options) for group in self.groups]

    @cached_property
    def known(self) -> list[Known]:
        """What is known of the class of each optimizer."""
        return [known(lineage) for lineage in self.lineages or ((),) * len(self.optimizers)]

    def title(self, optimizer: int) -> str:
        """Return the bare name of its class."""
        return (self.optimizers[optimizer].class_path or "the optimizer").rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as a policy asks.

    ``kind`` is one of ``missing``, ``unexpected``, ``shape``, ``dtype``, ``slot``, ``order``, ``option``, ``names``,
    ``class``, ``weights``, ``globals``, ``outside``.
    ``items`` are the lines of a list, ``hints`` say what to do.
    """

    kind: str
    title: str
    items: tuple[str, ...] = ()
    hints: tuple[Remedy, ...] = ()
