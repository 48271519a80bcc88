"""Update rules that several frameworks have, and how each class and each framework spells their state.

Most frameworks save neither the algorithm nor its options: ``m`` and ``v`` are the moments of Adam, of AdamW and of
AdaMax alike. So the caller names the rule (``optimizer="adamw"``), and the options as far as they are known; both are
then kept. An option that nobody stated is not stored.

A state moves between frameworks where its tensors are the same quantities on both sides; ``REFUSED`` gives the reasons
for the others. That the options agree too (``eps`` inside or outside the root, its default, decay) is up to who builds
the optimizer; ``spec/mappings.md`` has the notes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from lora_state_format.errors import FileError, OptionError, Remedy, UnrepresentableError
from lora_state_format.model.dtypes import item_size
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import Group, OptimizerState, Parameter, Scalar, Slot, Value
from lora_state_format.model.tensors import Box, Piece, Tensor
from lora_state_format.optimizers.classes import ends
from lora_state_format.optimizers.options import Kind, comparable, kind_of
from lora_state_format.optimizers.roles import role_of

__all__ = [
    "ALGORITHMS",
    "HYPERPARAMETERS",
    "OPTIMIZER",
    "REFUSED",
    "STATE_STEPS",
    "Algorithm",
    "RuleLayout",
    "check_alike",
    "check_told",
    "choose",
    "find",
    "group_options",
    "is_zero",
    "layout_of",
    "of_state",
    "parameter_of",
    "shape_of",
    "stated_step",
    "steps",
    "values_of",
    "zeros",
]

STATE_STEPS: Final = Remedy("pass the number as {options}", {"options": {"step": ...}})
"""For a state without the number of its steps."""

_DECAYS: Final = ("lr", "betas", "eps", "weight_decay")


@dataclass(frozen=True, slots=True)
class Algorithm:
    """An update rule and a torch class that follows it.

    ``step`` is how the class counts a parameter's steps: the dtype of a 0-d tensor, ``int``, or ``None``. ``spelled``
    maps a slot as most classes call it to the name that this class has for it. ``elementwise`` is false where an update
    of one element depends on its neighbours, so that taking stacked layers apart changes the rule. ``recomputed`` are
    slots that a step writes before it reads them: they carry nothing. ``inside`` is a member that the class's
    ``state_dict()`` puts its tensors in, though its ``state`` does not.
    """

    name: str
    class_path: str
    step: str | None = "F32"
    options: tuple[str, ...] = _DECAYS
    spelled: Mapping[str, str] = field(default_factory=dict)
    elementwise: bool = True
    recomputed: tuple[str, ...] = ()
    inside: str | None = None


ALGORITHMS: Final = (
    Algorithm("adam", "torch.optim.adam.Adam"),
    Algorithm("adamw", "torch.optim.adamw.AdamW"),
    Algorithm("adam_uncorrected", "mlx.optimizers.Adam", options=(*_DECAYS, "bias_correction")),
    Algorithm("adamw_uncorrected", "mlx.optimizers.AdamW", options=(*_DECAYS, "bias_correction")),
    Algorithm("adamax", "torch.optim.adamax.Adamax"),
    Algorithm("sgd", "torch.optim.sgd.SGD", None, ("lr", "momentum", "nesterov", "weight_decay", "dampening")),
    Algorithm("lion", "lion_pytorch.lion_pytorch.Lion", None, ("lr", "betas", "weight_decay")),
    Algorithm(
        "lion", "bitsandbytes.optim.lion.Lion32bit", "int", ("lr", "betas", "weight_decay"), {"exp_avg": "state1"},
        inside="__bnb_optimizer_quant_state__",
    ),
    Algorithm("adagrad", "torch.optim.adagrad.Adagrad", "F32", ("lr", "lr_decay", "eps", "weight_decay")),
    Algorithm("adadelta", "torch.optim.adadelta.Adadelta", "F32", ("lr", "rho", "eps", "weight_decay")),
    Algorithm("rmsprop", "torch.optim.rmsprop.RMSprop", "F32", ("lr", "alpha", "eps", "weight_decay", "centered")),
    Algorithm(
        "adafactor", "transformers.optimization.Adafactor", "int", elementwise=False, recomputed=("RMS",),
        options=(
            "lr", "eps", "clip_threshold", "decay_rate", "beta1", "weight_decay", "scale_parameter", "relative_step",
            "warmup_init",
        ),
    ),
)  # fmt: skip
"""The rules that convert. The first row of a name is the class that the name alone stands for.

MLX's Adam does not correct the bias of its moments unless it is told to (``bias_correction``): the same moments,
another rule, so another name.
"""

REFUSED: Final[Mapping[str, str]] = {
    "amsgrad": "torch keeps the maximum of the raw second moments, others that of the bias-corrected ones",
    "nadam": "torch keeps a product of momenta (mu_product) that others recompute",
    "radam": "no two of its implementations were compared",
    "adabelief": "torch has no such optimizer",
    "novograd": "torch has no such optimizer",
    "lamb": "its trust ratio is of whole tensors, so a change of layout changes the rule",
    "lars": "its trust ratio is of whole tensors, so a change of layout changes the rule",
    "muon": "it orthogonalises whole matrices, and frameworks do so in different ways",
    "prodigy": "its distance estimate is of all parameters at once, and frameworks keep different parts of it",
    "schedule_free": "its averaged and its running weights are part of the state",
}
"""Rules that do not convert, with the reason."""

OPTIMIZER: Final = "the rule, as in adamw, or the class: the file does not say it"
"""The meaning of a converter's option ``optimizer``."""

HYPERPARAMETERS: Final[Mapping[str, str]] = {
    "lr": "learning rate",
    "betas": "decay rates of the moments, [b1, b2]",
    "eps": "added to the denominator",
    "weight_decay": "weight decay",
    "momentum": "decay rate of the momentum buffer",
    "nesterov": "true for Nesterov momentum",
    "dampening": "0: no other framework has it",
    "alpha": "decay rate of the squared average",
    "centered": "true for centered RMSprop",
    "rho": "decay rate of the averages",
    "lr_decay": "learning rate decay",
    "clip_threshold": "Adafactor's update clipping",
    "decay_rate": "Adafactor's decay exponent",
    "beta1": "Adafactor's first moment; null for none",
    "scale_parameter": "Adafactor's scaling by the parameter",
    "relative_step": "Adafactor's own learning rate",
    "warmup_init": "Adafactor's warm-up",
}
"""Options of the rules that a caller may state, in torch's spelling."""


@dataclass(frozen=True, slots=True)
class RuleLayout:
    """How a framework keeps the state of a rule: its field -> the slot as most torch classes call it.

    ``counts`` says whether a ``count`` of steps is next to the fields.
    """

    rule: str
    fields: Mapping[str, str]
    counts: bool = False

    @property
    def held(self) -> frozenset[str]:
        """All members of its state, ``count`` included."""
        return frozenset(self.fields) | ({"count"} if self.counts else frozenset())


def choose(
    name: str | None, layouts: Sequence[RuleLayout], found: Iterable[str], where: str
) -> tuple[Algorithm, RuleLayout]:
    """Return the algorithm that the caller named, and its layout with the fields that were found.

    ``name`` is a rule or the path of a class. Raises ``OptionError`` where it is missing, unknown, refused, or has
    other fields; ``where`` names the place of the fields.
    """
    held = frozenset(found)
    fitting = [layout for layout in layouts if layout.held == held]
    fit = ", ".join(dict.fromkeys(layout.rule for layout in fitting)) or "no rule that converts"
    if name is None:
        raise OptionError(
            f"{where} holds {_listed(held)}, and the file does not name its optimizer; it fits {fit}",
            remedy=Remedy("pass the right one as {optimizer}", {"optimizer": ...}),
        )
    algorithm = find(name)
    layout = next((layout for layout in fitting if layout.rule == algorithm.name), None)
    if layout is None:
        raise OptionError(f"{where} holds {_listed(held)}, which is not the state of {algorithm.name}; it fits {fit}")
    return algorithm, layout


def of_state(state: OptimizerState, name: str | None) -> Algorithm:
    """Return the rule of a state's one optimizer, from its class, or as the caller names it.

    Raises ``UnrepresentableError`` for a class without a row, and for several optimizers.
    """
    classes = {optimizer.class_path for optimizer in state.optimizers}
    if len(classes) != 1:
        raise UnrepresentableError(f"{len(classes)} kinds of optimizer in one state, where the target has one")
    class_path = classes.pop()
    if class_path is None:
        if name is None:
            raise OptionError(
                "the state does not name its optimizer's class",
                remedy=Remedy("pass it as {optimizer}", {"optimizer": ...}),
            )
        return find(name)
    try:
        return find(class_path)
    except OptionError as error:
        raise UnrepresentableError(str(error)) from None


def find(name: str) -> Algorithm:
    """Return the rule called ``name``, or of the class of that path. Raises ``OptionError`` for any other."""
    for algorithm in ALGORITHMS:
        if name == algorithm.name or ends(name) == ends(algorithm.class_path):
            return algorithm
    short = name.rpartition(".")[2].lower()
    if short in REFUSED:
        raise OptionError(f"'{name}' does not convert between frameworks: {REFUSED[short]}")
    names = ", ".join(dict.fromkeys(algorithm.name for algorithm in ALGORITHMS))
    raise OptionError(f"'{name}' is not a rule that converts between frameworks; those that do: {names}")


NEUTRAL: Final[Mapping[str, tuple[str, ...]]] = {
    "decoupled_weight_decay": ("adamw", "adamw_uncorrected", "lion"),
    "initial_accumulator_value": ("adagrad",),
}
"""Options of torch's classes that ``options`` does not list -> rules in which they change nothing."""


def _check_options(number: int, options: Mapping[str, Value], algorithm: Algorithm) -> None:
    """Raise ``UnrepresentableError`` for an option that changes what a step computes and that other frameworks lack."""
    if options.get("amsgrad"):
        raise UnrepresentableError(f"amsgrad=True does not convert between frameworks: {REFUSED['amsgrad']}")
    if options.get("dampening"):
        raise UnrepresentableError("SGD with dampening does not convert: no other framework has it")
    for key, value in options.items():
        own = key in algorithm.options or algorithm.name in NEUTRAL.get(key, ())
        if not own and value and kind_of(key, options) in (Kind.MATH, Kind.STATE, Kind.CLASS):
            raise UnrepresentableError(
                f"group {number} has {key}={comparable(value)!r}, which {algorithm.name} of other frameworks does not "
                "have"
            )


def check_alike(groups: Sequence[Group], algorithm: Algorithm, given: Mapping[str, Any]) -> None:
    """Raise ``UnrepresentableError`` for groups that differ in an option, where the target makes one of them.

    Args:
        groups: Those that become one; empty ones do not count.
        algorithm: Whose options count.
        given: Options that the caller states for all.
    """
    held = [dict(group.options) for group in groups if group.count]
    for key in algorithm.options:
        values = [comparable(options[key]) for options in held if key in options]
        if key not in given and any(value != values[0] for value in values):
            found = ", ".join(dict.fromkeys(map(repr, values)))
            raise UnrepresentableError(
                f"groups differ in {key} ({found}), and the target has one for all",
                remedy=Remedy("pass it as {options}", {"options": {key: ...}}),
            )


def layout_of(state: OptimizerState, algorithm: Algorithm, layouts: Sequence[RuleLayout]) -> RuleLayout:
    """Return the layout that holds exactly the slots of a state, its step aside.

    Raises ``UnrepresentableError`` that names the slot or option that has no place, with the reason where it is known.
    """
    fitting = [layout for layout in layouts if layout.rule == algorithm.name]
    if len(state.optimizers) != 1:
        raise UnrepresentableError(f"the state of {len(state.optimizers)} optimizers, where the target has that of one")
    if state.globals:
        name = next(iter(state.globals))
        raise UnrepresentableError(f"'{name}' belongs to no parameter: the target has no place for it")
    if state.carried:
        raise UnrepresentableError(f"'{state.carried[0].name}' is in no group: the target has no place for its state")
    for number, group in enumerate(state.groups):
        _check_options(number, dict(group.options), algorithm)
    strange = f"the target has no place for the state of {algorithm.name}"
    for layout in fitting:
        slots = {*layout.fields.values(), *algorithm.recomputed, "step"}
        spelled = {algorithm.spelled.get(slot, slot) for slot in slots}
        held = ((p.name, slot) for p in state.parameters for slot in _slots(p, algorithm))
        extra = next(((name, slot) for name, slot in held if slot not in spelled), None)
        if extra is None:
            return layout
        strange = f"'{extra[0]}' has a slot '{extra[1]}', which the target has no place for"
    raise UnrepresentableError(strange)


def group_options(algorithm: Algorithm, options: Mapping[str, Any]) -> tuple[tuple[str, Value], ...]:
    """Return the stated options in the rule's order. Raises ``OptionError`` for one of another rule."""
    for name in options:
        if name in HYPERPARAMETERS and name not in algorithm.options:
            raise OptionError(f"{algorithm.name} has no option '{name}'; it has: {', '.join(algorithm.options)}")
    stated: dict[str, Any] = {name: options[name] for name in algorithm.options if name in options}
    for name, value in stated.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if not numbers or not all(number is None or isinstance(number, (int, float)) for number in numbers):
            raise OptionError(f"{name}={value!r} must be a number or a sequence of numbers")
    return tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in stated.items())


def check_told(name: str, told: Value, held: Value, path: object) -> None:
    """Raise ``OptionError`` where the file holds another value of an option; it may be rounded to float32, or NaN."""
    if told != held and _single(told) != held and repr(told) != repr(held):
        raise OptionError(f"{path} holds {name}={held!r}, not {told!r}")


def _single(value: Value) -> Value:
    """Return a number, or each of several, as float32 has it."""
    if isinstance(value, tuple):
        return tuple(map(_single, value))
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0]) if isinstance(value, float) else value
    except OverflowError:  # more than float32 holds
        return value


def stated_step(options: Mapping[str, Any]) -> int:
    """Return the option ``step``. Raises ``OptionError`` unless it is a whole number, 0 or more."""
    step = options["step"]
    if type(step) is not int or step < 0:
        raise OptionError(f"step={step!r} must be a whole number, 0 or more")
    return step


def step_scalar(algorithm: Algorithm, count: int) -> Value:
    """Return a step as the class keeps it. Raises ``UnrepresentableError`` where a float32 does not hold it."""
    if algorithm.step == "int":
        return count
    if count > 2**24:
        raise UnrepresentableError(f"step {count} has no exact float32, which {algorithm.class_path} keeps it in")
    return Scalar("F32", struct.pack("<f", count))


def steps(parameters: Iterable[Parameter]) -> int | None:
    """Return the one step of these parameters; one without state took none. ``None`` where none counts steps.

    Raises ``UnrepresentableError`` where they differ: other frameworks have one counter for all.
    """
    found: dict[int, str] = {}
    for parameter in parameters:
        step = 0 if parameter.state is None else parameter.state.get("step")
        count = step.item() if isinstance(step, Scalar) else step
        if isinstance(count, float) and not count.is_integer():
            raise UnrepresentableError(f"'{parameter.name}' took {count} steps, which is not a whole number of steps")
        if isinstance(count, (int, float)):
            found.setdefault(int(count), parameter.name)
    if len(found) > 1:
        (one, first), (two, second) = list(found.items())[:2]
        raise UnrepresentableError(
            f"'{first}' took {one} steps and '{second}' took {two}, where the target counts them once for all"
        )
    return next(iter(found), None)


def parameter_of(
    name: str,
    values: Mapping[str, Tensor | Scalar],
    algorithm: Algorithm,
    step: int | None,
    *,
    weight: Tensor | None,
    path: object,
    shape: tuple[int, ...] | None = None,
) -> Parameter:
    """Return a parameter with its state as the class keeps it; without state where all is as before step 1.

    ``values`` are its slots by their usual names, ``weight`` is the parameter itself, if it is known. Slots that are
    not shaped as the parameter come with its ``shape``. Raises ``FileError`` for shapes that disagree, ``OptionError``
    if the class counts steps and ``step`` is ``None``.
    """
    first = next(iter(values.values()))
    shapes = [shape] if shape is not None else [shape_of(leaf) for leaf in values.values()]
    if len({*shapes, *([weight.shape] if weight else [])}) != 1:
        held = ", ".join(f"{slot} {list(shape_of(leaf))}" for slot, leaf in values.items())
        of = f" of shape {list(weight.shape)}" if weight else ""
        raise FileError(f"'{name}'{of} has slots of other shapes: {held}", path=path)
    if step == 0 and all(map(is_zero, values.values())):
        return Parameter(name, shapes[0], None, weight.dtype if weight else first.dtype)
    state: dict[str, Value] = {}
    if algorithm.step is not None:
        if step is None:
            raise OptionError(
                f"{path}: {algorithm.class_path} counts its steps, and the file does not", remedy=STATE_STEPS
            )
        state["step"] = step_scalar(algorithm, step)
    for slot, leaf in values.items():
        spelled = algorithm.spelled.get(slot, slot)
        state[spelled] = leaf if isinstance(leaf, Scalar) else Slot(leaf, role_of((spelled,), leaf.dtype))
    return Parameter(name, shapes[0], state, weight.dtype if weight else None)


def values_of(parameter: Parameter, algorithm: Algorithm, layout: RuleLayout) -> dict[str, Tensor | Scalar]:
    """Return the slots of a layout that a parameter has, under their usual names; zeros where it never took a step."""
    if parameter.state is None:
        return dict.fromkeys(layout.fields.values(), zeros(parameter))
    held = _slots(parameter, algorithm)
    values: dict[str, Tensor | Scalar] = {}
    for slot in layout.fields.values():
        value = held.get(algorithm.spelled.get(slot, slot))
        if isinstance(value, Slot):
            values[slot] = value.tensor
        elif isinstance(value, Scalar):
            values[slot] = value
    return values


def _slots(parameter: Parameter, algorithm: Algorithm) -> dict[str, Value]:
    """Return a parameter's slots as the class's ``state`` has them."""
    state = dict(parameter.state or {})
    inner = state.pop(algorithm.inside, None) if algorithm.inside else None
    return {**state, **inner} if isinstance(inner, Mapping) else state


def zeros(parameter: Parameter) -> Tensor | Scalar:
    """Return the zeros that a framework keeps before the first step. One element is held, whatever the shape."""
    if parameter.dtype is None:
        raise UnrepresentableError(f"'{parameter.name}' never took a step, and nothing says the type of its state")
    element = bytes(item_size(parameter.dtype))
    if not parameter.shape:
        return Scalar(parameter.dtype, element)
    box = Box((0,) * len(parameter.shape), parameter.shape)
    return Tensor(parameter.dtype, parameter.shape, (Piece(Memory(element), 0, box, (0,) * len(parameter.shape)),))


def is_zero(leaf: Tensor | Scalar) -> bool:
    """Return whether all bytes are zero."""
    chunks: Iterable[bytes | memoryview] = [leaf.data] if isinstance(leaf, Scalar) else leaf.chunks()
    return all(bytes(chunk).count(0) == len(chunk) for chunk in chunks)


def shape_of(leaf: Tensor | Scalar) -> tuple[int, ...]:
    """Return the shape of a tensor or of a scalar."""
    return leaf.shape if isinstance(leaf, Tensor) else ()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
