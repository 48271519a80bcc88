"""Grouping rules: how frameworks sort a model's parameters into groups, as data."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, compress, permutations
from typing import Any, Final, NamedTuple, TypeAlias

from lora_state_format.errors import OptionError
from lora_state_format.model.states import Parameter, PositionalState
from lora_state_format.naming.names import plain_name

__all__ = ["PARTS", "RULES", "Candidate", "Described", "Rule", "rules_called"]


@dataclass(frozen=True, slots=True)
class Described:
    """A parameter, and what only a model can tell of it.

    ``classes`` are the names of the class of the module that owns it and of that class's bases, the nearest first
    (``("Qwen2RMSNorm",)``, ``("Embedding",)``); empty where there is no model to ask. ``layer`` is what an adapter's
    layer says of the parameter's axes, a ``binding.live.Layer``.
    """

    parameter: Parameter
    trainable: bool = True
    classes: tuple[str, ...] = ()
    layer: Any = None

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self.parameter.name

    @property
    def axes(self) -> int:
        """How many axes the parameter has."""
        return len(self.parameter.shape)


class Split(NamedTuple):
    """One group as a rule has it: its parameters, and whether weight decay may apply to them."""

    members: Sequence[Described]
    decays: bool = True


Splits: TypeAlias = "list[Split]"

Splitter: TypeAlias = "Callable[[Sequence[Described], PositionalState], Iterable[Splits]]"


@dataclass(frozen=True, slots=True)
class Rule:
    """How a framework sorts parameters into groups.

    ``splits`` takes all parameters in ``named_parameters()`` order and the state, and yields every grouping that the
    rule may have made, nothing where it cannot apply. A rule that is not ``automatic`` is used only when asked for.
    """

    name: str
    summary: str
    splits: Splitter
    automatic: bool = True


@dataclass(frozen=True, slots=True)
class Candidate:
    """An order that fits: the parameters as they stand in the file, and the rules that say so."""

    rules: tuple[str, ...]
    parameters: tuple[Parameter, ...]

    @property
    def names(self) -> list[str]:
        """The names in the candidate's order."""
        return [parameter.name for parameter in self.parameters]


# --- weight decay, as frameworks decide it --------------------------------------------------------------------------

_REGISTERED: Final = frozenset({
    "ChameleonRMSNorm", "CohereLayerNorm", "GraniteMoeRMSNorm", "IdeficsRMSNorm", "LayerNorm", "LlamaRMSNorm",
    "LongT5LayerNorm", "MegaSequenceNorm", "MoshiRMSNorm", "NemotronLayerNorm1P", "Olmo2RMSNorm", "OlmoeRMSNorm",
    "Pix2StructLayerNorm", "Pop2PianoLayerNorm", "RecurrentGemmaRMSNorm", "SwitchTransformersLayerNorm", "T5LayerNorm",
    "ZambaRMSNorm",
})  # fmt: skip


_REGISTERED_EARLY: Final = frozenset({
    "LayerNorm", "LongT5LayerNorm", "MegaSequenceNorm", "Pix2StructLayerNorm", "Pop2PianoLayerNorm",
    "SwitchTransformersLayerNorm", "T5LayerNorm",
})  # fmt: skip


class _Era(NamedTuple):
    """Which parameters a version of transformers spares weight decay: by class of module, by pattern in the name."""

    rule: str
    versions: str
    classes: frozenset[str]
    pattern: re.Pattern[str]

    def decays(self, item: Described) -> bool:
        return self.classes.isdisjoint(item.classes) and not self.pattern.search(item.parameter.name.lower())


_BIAS: Final = re.compile("bias")


_ERAS: Final = (
    _Era(
        "trainer",
        "since 4.53",
        frozenset({"LayerNorm"}),
        re.compile(r"bias|layernorm|rmsnorm|(?:^|\.|_)norm(?:$|\.)"),
    ),
    _Era("trainer-4.52", "4.49 to 4.52", _REGISTERED, re.compile("bias|layernorm|rmsnorm")),
    _Era("trainer-4.48", "4.48", _REGISTERED, _BIAS),
    _Era("trainer-4.47", "up to 4.47", _REGISTERED | {"GemmaRMSNorm", "GraniteRMSNorm", "OlmoLayerNorm"}, _BIAS),
    _Era("trainer-4.33", "4.21 to 4.33", _REGISTERED_EARLY, _BIAS),
    _Era("trainer-4.0", "up to 4.20", frozenset({"LayerNorm"}), _BIAS),
)
"""Read from the last release of each minor version from 4.20 to 4.57, and from 5.23.0:
``Trainer.get_decay_parameter_names`` (before 4.34 in ``create_optimizer``), and the classes that modeling files
appended to ``ALL_LAYERNORM_LAYERS``: Llama's and Idefics' since 4.34, the others as soon as the model was there."""

_SCRIPTS: Final = _Era("", "", frozenset(), re.compile(r"bias|(?:^|\.)layernorm\.weight"))
"""What the example scripts of old had: ``no_decay = ["bias", "LayerNorm.weight"]``."""


Test: TypeAlias = "Callable[[Described], bool]"

NOTHING: Final = "(?!)"
"""A pattern that matches nothing."""


def trainable_of(parameters: Iterable[Described]) -> list[Described]:
    return [item for item in parameters if item.trainable]


def _apart(items: Iterable[Described], *tests: Test) -> list[list[Described]]:
    """Return for each test the items that pass it and none before it; last those that pass none."""
    parts: list[list[Described]] = []
    rest = list(items)
    for test in tests:
        passed = [test(item) for item in rest]
        parts.append(list(compress(rest, passed)))
        rest = [item for item, taken in zip(rest, passed, strict=True) if not taken]
    return [*parts, rest]


def _named_like(pattern: str) -> Test:
    search = re.compile(pattern).search
    return lambda item: search(item.parameter.name) is not None


def _both(items: Iterable[Described], decays: Test) -> list[Split]:
    """Return those with weight decay, and those without."""
    decayed, plain = _apart(items, decays)
    return [Split(decayed), Split(plain, decays=False)]


def _filled(splits: Iterable[Split]) -> Splits:
    return [split for split in splits if split.members]


# --- the rules ------------------------------------------------------------------------------------------------------


def _stated(parameters: Sequence[Described], state: PositionalState) -> Iterator[Splits]:
    """Yield the names that the file itself states, in any case: Adam-mini lowers them.

    Where it states those of stepped parameters only, the others of a single group follow in the model's order: they
    have no state that could be exchanged.
    """
    names = dict(zip(state.ids, state.names, strict=True)) if state.names is not None else state.stated
    known = {plain_name(item.name): item for item in parameters}
    found = {identity: known.get(plain_name(name)) for identity, name in names.items()}
    members = {identity: item for identity, item in found.items() if item is not None}
    if not names or len(members) < len(names) or len({item.name for item in members.values()}) < len(names):
        return
    members |= _unstated(parameters, state, members)
    if all(identity in members for identity in state.ids):
        yield from _listed([members[identity] for identity in state.ids], state)


def _unstated(
    parameters: Sequence[Described], state: PositionalState, stated: Mapping[int | str, Described]
) -> dict[int | str, Described]:
    """Return the parameters of a single group whose names are not stated, in the model's order, if all are found."""
    ids = [identity for identity in state.ids if identity not in stated]
    taken = {item.name for item in stated.values()}
    rest = [item for item in trainable_of(parameters) if item.name not in taken]
    bounds = list(accumulate(state.sizes()))
    groups = {bisect_right(bounds, number) for number, identity in enumerate(state.ids) if identity not in stated}
    return dict(zip(ids, rest, strict=True)) if len(rest) == len(ids) and len(groups) == 1 else {}


def _flat(parameters: Sequence[Described], state: PositionalState) -> Iterator[Splits]:
    yield [Split(trainable_of(parameters))]


def _everything(parameters: Sequence[Described], state: PositionalState) -> Iterator[Splits]:
    if not all(item.trainable for item in parameters):
        yield [Split(parameters)]


def _trainer(era: _Era) -> Splitter:
    def splits(parameters: Sequence[Described], state: PositionalState) -> Iterator[Splits]:
        yield _both(trainable_of(parameters), era.decays)

    return splits


def _trainer_with_frozen(parameters: Sequence[Described], state: PositionalState) -> Iterator[Splits]:
    """Before 4.26 the Trainer did not ask whether a parameter is trained."""
    if not all(item.trainable for item in parameters):
        for era in _ERAS[-2:]:
            yield _both(parameters, era.decays)


def _matrices_first(parameters: Sequence[Described], state: PositionalState) -> Iterator[Splits]:
    yield _both(trainable_of(parameters), lambda item: item.axes >= 2)


def _timm(parameters: Sequence[Described], state: PositionalState) -> Iterator[Splits]:
    plain, decayed = _apart(trainable_of(parameters), lambda item: item.axes <= 1 or item.name.endswith(".bias"))
    yield [Split(plain, decays=False), Split(decayed)]


def _ultralytics(parameters: Sequence[Described], state: PositionalState) -> Iterator[Splits]:
    """Yield the groups as newer versions call them, else in the orders of older ones; with frozen parameters."""
    biases, plain, weights = _apart(
        parameters,
        lambda item: "bias" in item.name,
        lambda item: "logit_scale" in item.name or (item.axes <= 1 and item.name.endswith("weight")),
    )
    kinds = {"bias": Split(biases, decays=False), "weight": Split(weights), "bn": Split(plain, decays=False)}
    called = [str(dict(group.options).get("param_group")) for group in state.groups]
    for order in [called] if sorted(called) == sorted(kinds) else (("bias", "weight", "bn"), ("bn", "weight", "bias")):
        yield [kinds[kind] for kind in order]


def _norms_last(parameters: Sequence[Described], state: PositionalState) -> Iterator[Splits]:
    """Yield all but normalisations, then these: modules whose weight has one axis."""
    norms = {item.name.removesuffix("weight") for item in parameters if item.axes == 1 and item.name.endswith("weight")}
    plain, rest = _apart(trainable_of(parameters), lambda item: item.name.rpartition(".")[0] + "." in norms)
    yield [Split(rest), Split(plain)]


def _rises(item: Described) -> bool:
    """LoRA+ gives these the higher rate."""
    return "lora_B" in item.name or item.axes == 1


def _peft_loraplus(parameters: Sequence[Described], state: PositionalState) -> Iterator[Splits]:
    """Versions differ in whether the group of LoRA embeddings is ever filled."""
    for pattern in (r"\.lora_embedding_[AB]\.", NOTHING):
        embedded, rising, rest = _apart(trainable_of(parameters), _named_like(pattern), _rises)
        yield [Split(rest), Split(embedded), *_both(rising, _by_class)]


def _llamafactory_loraplus(parameters: Sequence[Described], state: PositionalState) -> Iterator[Splits]:
    embedded, rising, rest = _apart(trainable_of(parameters), lambda item: "lora_embedding_B" in item.name, _rises)
    yield [Split(rest), *_both(rising, _by_class), Split(embedded)]


def _by_class(item: Described) -> bool:
    """Return both LoRA+ ask for the module's class and for 'bias', in every version."""
    return _ERAS[3].decays(item)


def _plain_first(parameters: Sequence[Described], state: PositionalState) -> Iterator[Splits]:
    for era in _ERAS:
        yield _both(trainable_of(parameters), era.decays)[::-1]


def _muon(parameters: Sequence[Described], state: PositionalState) -> Iterator[Splits]:
    """Yield the optimizer joins its two lists into one group."""
    if _has_option(state, "ns_steps"):
        matrices, rest = _apart(
            trainable_of(parameters), lambda item: item.axes == 2 and not re.search("embed|lm_head", item.name)
        )
        yield [Split([*matrices, *rest])]


def _has_option(state: PositionalState, option: str) -> bool:
    return any(key == option for group in state.groups for key, _ in group.options)


def _is_saved(item: Described) -> bool:
    return item.name.endswith("modules_to_save.default.weight")


def _axolotl(parameters: Sequence[Described], state: PositionalState) -> Iterator[Splits]:
    embedded, rest = _apart(
        trainable_of(parameters), _named_like(r"modules_to_save\.default\.weight$|embed_tokens|lm_head")
    )
    for era in _ERAS:
        decayed, plain = _both(rest, era.decays)
        yield _filled([decayed, Split(embedded, decays=False), plain])


def _unsloth(parameters: Sequence[Described], state: PositionalState) -> Iterator[Splits]:
    saved, rest = _apart(trainable_of(parameters), _is_saved)
    yield [Split(rest), Split(saved)]


_ALIGNER: Final = r"(^|\.)(aligner|multi_modal_projector|merger\w*|connector|mlp1|mm_projector)\."

_VISION: Final = r"(^|\.)(visual|vision_\w+|vit|vpm|image_\w+)\."


def _swift_multimodal(parameters: Sequence[Described], state: PositionalState) -> Iterator[Splits]:
    """Vision, aligner and language model, told apart by segments that such models have in their names."""
    aligner, vision, language = _apart(trainable_of(parameters), _named_like(_ALIGNER), _named_like(_VISION))
    for era in _ERAS:
        yield _filled(split for part in (vision, aligner, language) for split in _both(part, era.decays)[::-1])


def _low_rank(order: str, *, frozen: bool = False) -> Splitter:
    """GaLore and its kin: ``l`` low rank, ``d`` with weight decay, ``p`` without, ``o`` all others."""

    def splits(parameters: Sequence[Described], state: PositionalState) -> Iterator[Splits]:
        if not _has_option(state, "rank"):
            return
        items = parameters if frozen else trainable_of(parameters)
        for pattern in ("", "attn|attention|mlp"):
            like = _named_like(pattern)
            chosen, others = _apart(items, lambda item: "Linear" in item.classes and item.axes == 2 and like(item))  # noqa: B023
            for era in _ERAS:
                decayed, plain = _both(others, era.decays)
                parts = {"l": Split(chosen), "d": decayed, "p": plain, "o": Split(others)}
                yield [parts[letter] for letter in order]

    return splits


def _each(parameters: Sequence[Described], state: PositionalState) -> Iterator[Splits]:
    yield [Split([item]) for item in trainable_of(parameters)]


def _parts_of_a_model(parameters: Sequence[Described], state: PositionalState) -> Iterator[Splits]:
    """Yield a group for each part of the model, a backbone and a head say: few parts in any order, many in either."""
    sizes, items = state.sizes(), trainable_of(parameters)
    if len(sizes) < 2 or sum(sizes) != len(items):
        return
    numbers = range(len(sizes))
    for order in permutations(numbers) if len(sizes) <= MAX_TURNED else (numbers, numbers[::-1]):
        ends = list(accumulate(sizes[number] for number in order))
        splits = {number: Split(items[end - sizes[number] : end]) for number, end in zip(order, ends, strict=True)}
        yield [splits[number] for number in numbers]


MAX_TURNED: Final = 4
"""Parts of a model that are tried in every order."""


def _whole_model(parameters: Sequence[Described], state: PositionalState) -> Iterator[Splits]:
    """Ids that are places in ``list(model.parameters())``, frozen ones counted too: they have holes, in any order."""
    ids = [identity for identity in state.ids if isinstance(identity, int)]
    if len(ids) == len(state.ids) and ids != list(range(len(ids))) and max(ids, default=0) < len(parameters):
        yield from _listed([parameters[identity] for identity in ids], state)


def _sorted(parameters: Sequence[Described], state: PositionalState) -> Iterator[Splits]:
    items = sorted(trainable_of(parameters), key=lambda item: item.name)
    yield [Split(items)]
    for era in _ERAS:
        yield _both(items, era.decays)


def _listed(parameters: Sequence[Described], state: PositionalState) -> Iterator[Splits]:
    splits, start = [], 0
    for size in state.sizes():
        splits.append(Split(parameters[start : start + size]))
        start += size
    yield splits if start >= len(parameters) else [*splits, Split(parameters[start:])]


PARTS: Final = "parts"

RULES: Final[tuple[Rule, ...]] = (
    Rule("stated", "the names that the file itself states, where all of them are known", _stated),
    Rule("flat", "one group of all trainable parameters", _flat),
    Rule("everything", "one group of all parameters, frozen ones too", _everything),
    *(
        Rule(era.rule, f"transformers.Trainer, {era.versions}: with weight decay, then without", _trainer(era))
        for era in _ERAS
    ),
    Rule("trainer-4.25", "transformers.Trainer, up to 4.25: frozen parameters too", _trainer_with_frozen),
    Rule("scripts", "no weight decay for 'bias' and 'LayerNorm.weight', as example scripts had it", _trainer(_SCRIPTS)),
    Rule("nanogpt", "nanoGPT: two or more axes, then the rest", _matrices_first),
    Rule("timm", "timm's param_groups_weight_decay: one axis and biases, then the rest", _timm),
    Rule("torchvision", "torchvision's set_weight_decay: all but normalisations, then these", _norms_last),
    Rule("ultralytics", "ultralytics, YOLOv5 and v7: biases, weights, weights of normalisations", _ultralytics),
    Rule("peft-loraplus", "PEFT's LoRA+: A, embeddings, B, B without weight decay", _peft_loraplus),
    Rule("llamafactory-loraplus", "LLaMA-Factory's LoRA+: A, B, B without decay, embeddings", _llamafactory_loraplus),
    Rule("llamafactory-badam", "LLaMA-Factory's BAdam: without weight decay, then with", _plain_first),
    Rule(
        "llamafactory-galore",
        "LLaMA-Factory's GaLore: without decay, with, low rank",
        _low_rank("pdl"),
    ),
    Rule("muon", "Muon and AdamW in one group: matrices that are no embeddings, then the rest", _muon),
    Rule("galore", "transformers' GaLore and APOLLO: the rest, then low rank", _low_rank("ol", frozen=True)),
    Rule("axolotl", "Axolotl: with decay, embeddings, without; no empty groups", _axolotl),
    Rule("unsloth", "Unsloth's embedding_learning_rate: the rest, then modules_to_save", _unsloth),
    Rule("swift-multimodal", "ms-swift: vision, aligner, language; each without decay, then with", _swift_multimodal),
    Rule("swift-galore", "ms-swift's GaLore: low rank, with decay, without", _low_rank("ldp")),
    Rule("one-per-parameter", "a group for each trainable parameter", _each),
    Rule("whole-model", "ids are places among all the model's parameters, as Lightning's FSDP has them", _whole_model),
    Rule(
        PARTS, "a group for each part of the model; asked where no other rule fits", _parts_of_a_model, automatic=False
    ),
    Rule("sorted", "trainable parameters sorted by name as text", _sorted, automatic=False),
    Rule("listed", "the names stand in the optimizer's order already", _listed, automatic=False),
)
"""Every grouping rule; a new one is one more row. Those of frameworks were read from their sources:
PEFT 0.21, LLaMA-Factory 002f58e, Axolotl 0e4982e, Unsloth 0024bb0, ms-swift 006938b, nanoGPT 0011cd4."""


def rules_called(name: str) -> list[Rule]:
    """Return the rules of a name: one, or several eras of one framework. Raises ``OptionError`` if there are none."""
    found = [rule for rule in RULES if rule.name == name]
    if not found:
        raise OptionError(f"no grouping rule '{name}'; there are: {', '.join(rule.name for rule in RULES)}")
    return found
