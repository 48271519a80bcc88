"""The tables of spec/mappings.md are what the code does and the tests try. The file says how to write them anew."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from lora_state_format.converters import mlx
from lora_state_format.foreign import optax
from lora_state_format.foreign.paddle import LAYOUTS as PADDLE
from lora_state_format.mapping.algorithms import REFUSED, RuleLayout
from lora_state_format.mapping.maps import MAPS, MapRule

ROOT: Final = Path(__file__).parents[2]
DOCUMENT: Final = ROOT / "spec" / "mappings.md"

LAYOUTS: Final[Mapping[str, Iterable[RuleLayout]]] = {
    "optax": optax.LAYOUTS,
    "MLX": mlx.LAYOUTS,
    "Paddle": PADDLE,
}

GOES_ON: Final[Mapping[str, Mapping[str, str]]] = {
    "test_across_frameworks.py": {"OPTIMIZERS": "optax MLX"},
    "test_rules.py": {"CASES": "optax MLX"},
    "test_paddlenlp.py": {"test_a_run_moves_to_torch_and_back": "Paddle"},
}
"""Where runs go on in another framework."""

TRIED: Final[Mapping[str, str]] = {
    "flax_nnx": "with flax, PEFT and mlx-lm",
    "flax_nnx_linear": "with flax",
    "flax_linen": "with flax and torch",
    "mlx_lm": "with mlx-lm, PEFT and flax",
    "paddlenlp": "with Paddle; names from source only",
    "gpt_neox": "with GPT-NeoX's pipeline and transformers",
    "bloom": "with Megatron-DeepSpeed's pipeline and transformers",
    "olmo": "with OLMo and transformers",
    "olmo2": "with OLMo and transformers",
    "litgpt": "with Lit-GPT, TinyLlama and transformers",
    "megatron": "with Megatron-Core; the function with transformers",
}
"""Maps that were tried with the real libraries; others with the library's function, their names from source only."""


def written(section: str, rows: list[str]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(f"<!-- {section} -->\n")
    old, _, after = rest.partition("<!-- end -->")
    made = "".join(f"{row}\n" for row in rows)
    if os.environ.get("WRITE_TABLES"):
        DOCUMENT.write_text(f"{before}<!-- {section} -->\n{made}<!-- end -->{after}", encoding="utf-8")
    else:
        assert old == made, f"{DOCUMENT.name} is not what the code does; it says how to write it anew"


def gone_on(framework: str, rule: str) -> bool:
    """Whether a test goes on with this rule in this framework: its cases name both."""
    variants = {rule, *({"sgd": ["nesterov"], "rmsprop": ["centered"]}.get(rule, []))}
    for file, places in GOES_ON.items():
        tree = ast.parse((ROOT / "tests" / "converters" / file).read_text(encoding="utf-8"))
        for node in tree.body:
            names = [node.name] if isinstance(node, ast.FunctionDef) else []
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
            for name in names:
                if framework not in places.get(name, "").split():
                    continue
                texts: set[object] = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
                if file == "test_rules.py":
                    texts = cases(node, framework.lower())
                if variants & texts:
                    return True
    return False


def cases(node: ast.stmt, framework: str) -> set[object]:
    """The variants that a list of cases has for a framework."""
    found: set[object] = set()
    for generator in ast.walk(node):
        if isinstance(generator, ast.GeneratorExp):
            texts = [leaf.value for leaf in ast.walk(generator) if isinstance(leaf, ast.Constant)]
            found |= set(texts) if framework in texts else set()
    return found


def test_rules() -> None:
    rules = dict.fromkeys(layout.rule for layouts in LAYOUTS.values() for layout in layouts)
    rows = ["| rule | slots | optax | MLX | Paddle | gone on |", "|---|---|---|---|---|---|"]
    for rule in rules:
        if rule.endswith("_uncorrected"):
            continue
        fields = {}
        for framework, layouts in LAYOUTS.items():
            merged = {slot: field for layout in layouts if layout.rule == rule for field, slot in layout.fields.items()}
            fields[framework] = merged
        slots = dict.fromkeys(slot for merged in fields.values() for slot in merged)
        cells = [", ".join(f"`{merged[slot]}`" for slot in slots if slot in merged) for merged in fields.values()]
        on = [framework for framework, merged in fields.items() if merged and gone_on(framework, rule)]
        assert on == [framework for framework, merged in fields.items() if merged], rule
        rows.append(f"| {rule} | {', '.join(f'`{slot}`' for slot in slots)} | {' | '.join(cells)} | {', '.join(on)} |")
    written("rules", rows)


def test_refused() -> None:
    rows = ["| rule | why |", "|---|---|"]
    written("refused", [*rows, *(f"| {rule} | {reason} |" for rule, reason in REFUSED.items())])


def test_maps() -> None:
    assert TRIED.keys() <= {known.name for known in MAPS}
    rows = ["| map | foreign name | our name | axes |", "|---|---|---|---|"]
    for known in MAPS:
        tried = TRIED.get(known.name, "with its function; names from source only")
        rows.append(f"| **{known.name}** | *{known.summary}* | | *tried {tried}* |")
        rows += [f"| | `{rule.foreign}` | {ours(rule)} | {layout(rule)} |" for rule in known.rules]
    written("maps", rows)


COUNTS: Final = {1: "1 axis", 2: "2 axes"}


def ours(rule: MapRule) -> str:
    return f"refused: {rule.refuse}" if rule.refuse else f"`{rule.ours}`"


def layout(rule: MapRule) -> str:
    if rule.parts:
        return f"cut into {', '.join(rule.parts)} ({rule.cut})"
    parts = [f"unstack {rule.unstack}"] if rule.unstack is not None else []
    parts += [f"merge {rule.merge}"] if rule.merge else []
    if rule.axes is not None:
        turned = list(rule.axes) != sorted(rule.axes)
        parts.append(
            "transposed" if rule.axes == (1, 0) else str(list(rule.axes)) if turned else f"{len(rule.axes)} axes"
        )
    return ", ".join(parts)


def test_every_map_is_tried() -> None:
    """Those not tried with a library stand in a test by their name."""
    text = (ROOT / "tests" / "mapping" / "test_apply.py").read_text(encoding="utf-8")
    for known in MAPS:
        if known.name not in TRIED:
            assert f'"{known.name}"' in text, known.name


@pytest.mark.parametrize("rule", REFUSED)
def test_every_refusal_says_why(rule: str) -> None:
    from lora_state_format.errors import OptionError
    from lora_state_format.mapping.algorithms import choose

    with pytest.raises(OptionError) as caught:
        choose(rule, optax.LAYOUTS, ["mu"], "x")
    assert str(caught.value) == f"'{rule}' does not convert between frameworks: {REFUSED[rule]}"


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore")
def test_defaults() -> None:
    """The table of defaults that differ."""
    import inspect

    import mlx.optimizers
    import optax as library
    import paddle
    import torch

    def default(function: Any, name: str) -> Any:
        return inspect.signature(function).parameters[name].default

    decays = [
        default(torch.optim.AdamW, "weight_decay"), default(library.adamw, "weight_decay"),
        default(mlx.optimizers.AdamW, "weight_decay"), default(paddle.optimizer.AdamW, "weight_decay"),
    ]  # fmt: skip
    assert decays == [1e-2, 1e-4, 1e-2, 1e-2]
    assert default(mlx.optimizers.Adam, "bias_correction") is default(mlx.optimizers.AdamW, "bias_correction") is False
    assert [default(torch.optim.RMSprop, name) for name in ("alpha", "eps")] == [0.99, 1e-8]
    assert [default(library.rmsprop, name) for name in ("decay", "eps", "eps_in_sqrt")] == [0.9, 1e-8, True]
    assert [default(mlx.optimizers.RMSprop, name) for name in ("alpha", "eps")] == [0.99, 1e-8]
    assert [default(torch.optim.Adagrad, name) for name in ("initial_accumulator_value", "eps")] == [0, 1e-10]
    assert [default(library.adagrad, name) for name in ("initial_accumulator_value", "eps")] == [0.1, 1e-7]
    assert default(mlx.optimizers.Adagrad, "eps") == 1e-8
    assert [default(kind, "weight_decay") for kind in (library.lion, mlx.optimizers.Lion)] == [1e-3, 0.0]
