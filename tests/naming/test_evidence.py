"""What the numbers say of an order: the identities themselves, the verdict, and a sample of the study."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from lora_state_format.model.digests import ALGORITHM, hash_tensor
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import Group, Naming, Optimizer, OptimizerState, Parameter, Role, Slot, Value
from lora_state_format.model.tensors import Digest, Tensor, contiguous
from lora_state_format.naming import signals, table
from lora_state_format.naming.evidence import Evidence, Exchanges, Pairing, head_size, paired, weigh
from lora_state_format.optimizers.quantised import BITSANDBYTES

RNG = np.random.default_rng(0)
ADAM: tuple[tuple[str, Value], ...] = (("lr", 1e-3), ("betas", (0.9, 0.999)))


def tensor(values: Any, dtype: str = "F32") -> Tensor:
    kinds = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "U8": "u1", "BF16": "<u2"}
    array = np.asarray(values)
    if dtype == "BF16":
        array = array.astype("<f4").view("<u4") >> 16
    return contiguous(dtype, array.shape, Memory(array.astype(kinds[dtype]).tobytes()))


def slot(values: Any, dtype: str = "F32", role: Role = Role.PARAM) -> Slot:
    return Slot(tensor(values, dtype), role)


def named(
    entries: Mapping[str, Mapping[str, Value] | None],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    options: tuple[tuple[str, Value], ...] = ADAM,
    rule: str | None = "flat",
) -> OptimizerState:
    parameters = tuple(Parameter(name, shapes[name], entries[name]) for name in entries)
    return OptimizerState((Optimizer(),), (Group(0, options, len(parameters)),), parameters, Naming("names", rule))


def lora(
    layers: int, modules: Sequence[str] = ("q_proj", "o_proj"), *, rank: int = 6, adapters: Sequence[str] = ("default",)
) -> tuple[OptimizerState, dict[str, Tensor]]:
    """Gradients of ``B @ A`` for random ``G``, exactly: state and weights that obey the identity."""
    entries: dict[str, Mapping[str, Value]] = {}
    weights: dict[str, Any] = {}
    for layer in range(layers):
        for module in modules:
            for adapter in adapters:
                a, b = RNG.normal(size=(rank, 16)), RNG.normal(size=(12, rank))
                gradient = RNG.normal(size=(12, 16))
                name = f"base_model.model.model.layers.{layer}.{module}.lora_{{}}.{adapter}.weight"
                weights[name.format("A")], weights[name.format("B")] = a, b
                entries[name.format("A")] = {"exp_avg": slot(b.T @ gradient)}
                entries[name.format("B")] = {"exp_avg": slot(gradient @ a.T)}
    shapes = {name: values.shape for name, values in weights.items()}
    return named(entries, shapes), {name: tensor(values) for name, values in weights.items()}


def exchanged(state: OptimizerState, *pairs: tuple[str, str]) -> OptimizerState:
    """The state with the entries of every two parameters whose names differ by these words exchanged."""

    def other(name: str) -> str:
        for left, right in pairs:
            name = name.replace(left, "\0").replace(right, left).replace("\0", right)
        return name

    sources = {p.name: other(p.name) if other(p.name) in state else p.name for p in state.parameters}
    return replace(state, parameters=tuple(replace(p, state=state[sources[p.name]].state) for p in state.parameters))


# --- the verdict ----------------------------------------------------------------------------------------------------


def test_an_exact_identity() -> None:
    state, weights = lora(12)
    found = weigh(state, weights)
    assert (found.verdict, found.pairs) == ("confirmed", Exchanges(276, 0))
    assert found.parts == {"lora_A": Exchanges(276, 0), "lora_B": Exchanges(276, 0)}
    assert set(found.orders.values()) == {"excluded"}
    *orders, twins = found.orders
    assert orders == [
        "layers reversed", "layers shifted up by one", "layers shifted down by one", "layers sorted as text",
        "layers sorted as numbers", "a random order",
    ]  # fmt: skip
    assert twins == (
        "base_model.model.model.layers.*.q_proj of default and base_model.model.model.layers.*.o_proj of default "
        "exchanged in every layer"
    )
    assert (found.against, found.silent, found.notes) == ((), (), ())


def test_one_exchange_is_found_by_name() -> None:
    """Not the mean of many, but the very pair."""
    state, weights = lora(6)
    wrong = exchanged(state, ("layers.3.q_proj", "layers.5.o_proj"))
    found = weigh(wrong, weights)
    assert found.verdict == "contradicted"
    prefix = "base_model.model.model.layers"
    assert found.against == (f"{prefix}.3.q_proj of default and {prefix}.5.o_proj of default exchanged",)
    assert found.pairs.undecided == 1
    alone = weigh(exchanged(state, ("layers.3.q_proj.lora_A", "layers.3.o_proj.lora_A")), weights)
    assert alone.against == (
        f"{prefix}.3.q_proj of default and {prefix}.3.o_proj of default exchanged in lora_A alone",
    )
    assert alone.verdict == "contradicted"


def test_whole_orders() -> None:
    state, weights = lora(6)
    twins = exchanged(state, ("q_proj", "o_proj"))
    found = weigh(twins, weights)
    assert found.verdict == "contradicted"
    assert [label for label, outcome in found.orders.items() if outcome == "preferred"][-1].endswith(
        "exchanged in every layer"
    )
    names = [
        p.name.replace("q_proj", "\0").replace("o_proj", "q_proj").replace("\0", "o_proj") for p in state.parameters
    ]
    given = weigh(state, weights, orders={"mine": names, "by type": sorted(names, key=lambda n: "lora_B" in n)})
    assert (given.orders["mine"], given.orders["by type"]) == ("excluded", "excluded")  # the second by shapes
    assert weigh(twins, weights, orders={"mine": names}).orders["mine"] == "preferred"


def test_noise_says_nothing() -> None:
    """State and weights that have nothing to do with each other: no verdict, and hardly an exclusion."""
    state, _ = lora(8)
    _, weights = lora(8)
    found = weigh(state, weights)
    assert found.verdict == "inconclusive"
    assert found.pairs.excluded == 0
    assert not found.against


def test_two_adapters_in_one_optimizer() -> None:
    """Made in the other order, their states stand exchanged."""
    state, weights = lora(6, ["q_proj"], adapters=["default", "second"])
    assert weigh(state, weights).verdict == "confirmed"
    found = weigh(exchanged(state, ("default", "second")), weights)
    assert found.verdict == "contradicted"
    assert (
        found.orders[
            "base_model.model.model.layers.*.q_proj of default and base_model.model.model.layers.*.q_proj of second "
            "exchanged in every layer"
        ]
        == "preferred"
    )


def test_never_trained_parameters() -> None:
    """What never took a step is silent; what did is weighed, against it too. Two without state cannot be exchanged."""
    state, weights = lora(6)
    idle = {p.name for p in state.parameters if "layers.2." in p.name}
    entries = {p.name: None if p.name in idle else p.state for p in state.parameters}
    found = weigh(named(entries, {p.name: p.shape for p in state.parameters}), weights)
    assert set(found.silent) == idle
    assert sum(found.pairs) == 12 * 11 // 2 - 1
    assert found.pairs.undecided == 0
    assert found.verdict == "confirmed"


def test_parameters_without_evidence() -> None:
    """IA3, AdaLoRA's factors, embeddings without a second checkpoint: listed, and no verdict is made of nothing."""
    names = [f"layers.{n}.k_proj.ia3_l.default" for n in range(4)]
    values = {name: RNG.normal(size=(8, 1)) for name in names}
    state = named({name: {"exp_avg": slot(v)} for name, v in values.items()}, dict.fromkeys(names, (8, 1)))
    found = weigh(state, {name: tensor(v) for name, v in values.items()})
    assert (found.verdict, found.pairs, found.silent) == ("inconclusive", Exchanges(0, 6), tuple(names))
    state, weights = lora(3, ["q_proj"])
    missing = weigh(state, {name: values for name, values in weights.items() if "layers.0" not in name})
    assert [name for name in missing.silent if "layers.0" in name] == list(missing.silent)
    adalora = {p.name.replace("lora_B", "lora_E"): p for p in state.parameters if "lora_B" in p.name}
    entries = {**{p.name: p.state for p in state.parameters}, **{name: p.state for name, p in adalora.items()}}
    shapes = {**{p.name: p.shape for p in state.parameters}, **{name: p.shape for name, p in adalora.items()}}
    assert weigh(named(entries, shapes), weights).verdict == "inconclusive"


def test_a_converted_pissa() -> None:
    state, weights = lora(3)
    doubled = {
        name: contiguous("F32", [2 * n if n == 6 else n for n in t.shape], Memory(bytes(2 * t.size)))
        for name, t in weights.items()
    }
    found = weigh(state, doubled)
    assert found.notes == ("12 weights have twice the rank of their state: an adapter converted from PiSSA or OLoRA",)
    assert (found.verdict, len(found.silent)) == ("inconclusive", 12)


# --- signals --------------------------------------------------------------------------------------------------------


def test_history_alone() -> None:
    """Of B, when A is not trained: what was done goes along with what is being done, in either sign."""
    names = [f"model.layers.{n}.q_proj.lora_B.default.weight" for n in range(6)]
    weights = {name: RNG.normal(size=(12, 4)) for name in names}
    for sign in (1, -1):
        entries = {
            name: {"exp_avg": slot(sign * v + RNG.normal(size=v.shape)), "exp_avg_sq": slot(np.ones(v.shape))}
            for name, v in weights.items()
        }
        found = weigh(named(entries, dict.fromkeys(names, (12, 4))), {n: tensor(v) for n, v in weights.items()})
        assert (found.verdict, found.pairs.undecided) in {("confirmed", 0), ("partly", 0)} or found.pairs.excluded > 10
    wrong = exchanged(named(entries, dict.fromkeys(names, (12, 4))), ("layers.0", "layers.1"))
    assert not weigh(wrong, {n: tensor(v) for n, v in weights.items()}).against  # history alone contradicts nothing


def test_the_difference_of_two_checkpoints() -> None:
    names = [f"model.layers.{n}.fc.weight" for n in range(6)]
    before = {name: RNG.normal(size=(16, 16)) for name in names}
    moves = {name: RNG.normal(size=(16, 16)) for name in names}
    entries = {name: {"exp_avg": slot(-v), "exp_avg_sq": slot(np.ones((16, 16)))} for name, v in moves.items()}
    state = named(entries, dict.fromkeys(names, (16, 16)))
    now = {name: tensor(before[name] + 0.01 * moves[name]) for name in names}
    assert weigh(state, now).silent == tuple(names)
    found = weigh(state, now, before={name: tensor(v) for name, v in before.items()})
    assert (found.verdict, found.pairs, found.silent) == ("confirmed", Exchanges(15, 0), ())


@pytest.mark.parametrize("key", ["z", "p0", "fp32"])
def test_a_master_copy_decides(key: str) -> None:
    names = [f"model.layers.{n}.fc.weight" for n in range(6)]
    weights = {name: RNG.normal(size=(16, 16)) for name in names}
    entries = {name: {key: slot(v + 0.01 * RNG.normal(size=v.shape))} for name, v in weights.items()}
    state, values = named(entries, dict.fromkeys(names, (16, 16))), {n: tensor(v) for n, v in weights.items()}
    assert weigh(state, values).verdict == "confirmed"
    found = weigh(exchanged(state, ("layers.0", "layers.1")), values)
    assert (found.verdict, len(found.against)) == ("contradicted", 1)


def test_balances_inside_a_layer() -> None:
    """A full fine-tune from one checkpoint: gradients that a real layer makes, grouped heads and rotary embeddings."""
    torch = pytest.importorskip("torch")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():  # norms and biases that are not what they start from
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    tokens = torch.randint(0, 32, (4, 16))
    model(input_ids=tokens, labels=tokens).loss.backward()
    live = dict(model.named_parameters())
    entries = {name: {"exp_avg": slot(p.grad.numpy())} for name, p in live.items()}
    state = named(entries, {name: tuple(p.shape) for name, p in live.items()})
    weights = {name: tensor(p.detach().numpy()) for name, p in live.items()}
    units, balances, *_ = signals.units_of(state, weights, None, head_size(config.to_dict()))
    fits = table.Table(units, balances)
    assert len(balances) == 4 * len(signals.CONSERVED)
    for _, *sides in balances:
        left, right = (sum(fits._sum(share.unit, share) for share in side) for side in sides)
        assert np.allclose(left, right, atol=1e-5 * np.abs(left).max())
    found = weigh(state, weights, head_dim=8)
    assert set(found.orders.values()) == {"excluded"}
    assert found.verdict in {"confirmed", "partly"}
    fewer = weigh(state, weights)  # which heads of o share one of v is not known without the size of a head
    assert 0 < fewer.pairs.excluded < found.pairs.excluded
    wrong = weigh(exchanged(state, ("layers.0.self_attn.k_proj", "layers.2.self_attn.k_proj")), weights, head_dim=8)
    assert (wrong.verdict, len(wrong.against)) == ("contradicted", 1)


def test_a_layer_with_further_norms_has_no_balance_of_its_second() -> None:
    name = "model.layers.0."
    shapes = {f"{name}post_attention_layernorm.weight": (4,), f"{name}mlp.gate_proj.weight": (8, 4),
              f"{name}mlp.up_proj.weight": (8, 4), f"{name}pre_feedforward_layernorm.weight": (4,)}  # fmt: skip
    state = named({key: {"exp_avg": slot(np.ones(shape))} for key, shape in shapes.items()}, shapes)
    weights = {key: tensor(np.ones(shape)) for key, shape in shapes.items()}
    assert signals.units_of(state, weights)[1] == []
    del shapes[f"{name}pre_feedforward_layernorm.weight"]
    state = named({key: {"exp_avg": slot(np.ones(shape))} for key, shape in shapes.items()}, shapes)
    assert len(signals.units_of(state, weights)[1]) == 1


def test_eight_bit_moments() -> None:
    """Decoded for the comparison, whether they stand flat or nested; small ones are in float32 anyway."""
    levels, scales = np.linspace(-1, 1, 256, dtype=np.float32), np.array([2.0, 3.0, 5.0])
    codes = RNG.integers(0, 256, (10, 60))
    expected = (levels[codes].ravel() * np.repeat(scales, 256)[:600]).reshape(10, 60)
    flat: dict[str, Value] = {
        "state1": slot(codes, "U8", Role.BLOCK), "qmap1": slot(levels), "absmax1": slot(scales, role=Role.BLOCK),
        "state2": slot(codes, "U8", Role.BLOCK), "qmap2": slot(levels), "absmax2": slot(scales, role=Role.BLOCK),
    }  # fmt: skip
    small: dict[str, Value] = {"state1": slot(np.full((10, 60), 7.0)), "state2": slot(np.ones((10, 60)))}
    names = {"model.a.lora_A.weight": flat, "model.b.lora_A.weight": small}
    nested: dict[str, dict[str, Value]] = {name: {"step": 1, BITSANDBYTES: entry} for name, entry in names.items()}
    for entries in (names, nested):
        state = named(entries, dict.fromkeys(names, (10, 60)))
        units, *_ = signals.units_of(state, {name: tensor(np.ones((10, 60))) for name in names})
        assert np.allclose(units[0].parts["lora_A"].first, expected)
        assert (units[1].parts["lora_A"].first == 7).all()


def test_matrices_of_other_forms_are_parameters() -> None:
    """What is called like LoRA's A or B and has one axis is no matrix of ranks."""
    names = ["model.a.lora_A.weight", "model.a.lora_B.weight"]
    state = named({name: {"exp_avg": slot(np.ones(4))} for name in names}, dict.fromkeys(names, (4,)))
    assert weigh(state, {name: tensor(np.ones(4)) for name in names}).verdict == "inconclusive"


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_dtypes(dtype: str) -> None:
    values = np.array([[1.5, -2.0, 0.25]])
    assert signals._floats(tensor(values, dtype), [(0, 3)]).tolist() == values.ravel().tolist()
    assert signals._floats(tensor(values, dtype), [(2, 1), (0, 1)]).tolist() == [0.25, 1.5]
    assert signals._floats(tensor([1, 2], "U8"), [(0, 2)]).tolist() == [0, 0]


def test_a_moment_that_is_no_number() -> None:
    """One parameter that ran away takes nothing from the others."""
    state, weights = lora(6)
    entries = {p.name: p.state for p in state.parameters}
    broken = next(iter(entries))
    entries[broken] = {"exp_avg": slot(np.full((6, 16), np.nan))}
    found = weigh(named(entries, {p.name: p.shape for p in state.parameters}), weights)
    assert found.silent == (broken,)
    assert found.pairs.undecided == 0


def test_lag() -> None:
    """The mean age of the gradients in Adam's first moment, times what one step moves."""
    group, slow = Group(0, ADAM, 1), Group(0, (("lr", 1e-3), ("betas", (0.0, 0.99))), 1)
    ages = [sum(0.9**k * (k + 1) for k in range(step)) / sum(0.9**k for k in range(step)) for step in (1, 3, 500)]
    for step, age in zip((1, 3, 500), ages, strict=True):
        expected = 1e-3 * age * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
        assert signals._lag(group, step) == pytest.approx(expected)
    assert signals._lag(group, None) == signals._lag(slow, 3) == signals._lag(Group(0, (), 1), 3) == 0.0


def test_head_size() -> None:
    assert head_size({"head_dim": 128, "hidden_size": 1024, "num_attention_heads": 16}) == 128
    assert head_size({"hidden_size": 1024, "num_attention_heads": 16}) == 64
    assert head_size({"n_embd": 768}) is None


def test_large_parameters_are_sampled() -> None:
    spans = signals._spans(1 << 20)
    assert sum(length for _, length in spans) == signals.SAMPLE
    assert max(start + length for start, length in spans) <= 1 << 20
    assert signals._spans(100) == [(0, 100)]


# --- digests and reports --------------------------------------------------------------------------------------------


def test_digests_first() -> None:
    state, weights = lora(2, ["q_proj"])
    first, second, third, fourth = state.parameters

    def digest(name: str, algorithm: str = ALGORITHM, dtype: str = "F32") -> Digest:
        return Digest(algorithm, dtype, hash_tensor(weights[name]))

    parameters = (
        replace(first, weights=digest(first.name)),
        replace(second, weights=digest(first.name)),
        replace(third, weights=digest(third.name, dtype="BF16")),
        replace(fourth, weights=digest(fourth.name, algorithm="newer")),
    )
    found = paired(replace(state, parameters=parameters), weights)
    assert found == Pairing(1, (second.name,), (third.name, fourth.name))
    assert paired(state, weights) == Pairing(0, (), tuple(state))


def test_weights_by_a_foreign_key() -> None:
    state, weights = lora(4)
    keyed = tuple(replace(p, foreign_names={"peft": p.name.replace(".default", "")}) for p in state.parameters)
    by_key = {name.replace(".default", ""): values for name, values in weights.items()}
    assert weigh(replace(state, parameters=keyed), by_key).verdict == "confirmed"


def test_as_json() -> None:
    many = tuple(f"pair {n}" for n in range(25))
    found = Evidence(
        "contradicted", Exchanges(3, 25), {"lora_A": Exchanges(1, 0)}, {"flat": "excluded"}, many, ("a",), ()
    )
    assert found.to_json() == {
        "verdict": "contradicted",
        "pairs": {"excluded": 3, "undecided": 25},
        "parts": {"lora_A": {"excluded": 1, "undecided": 0}},
        "orders": {"flat": "excluded"},
        "against": [*many[:20], "and 5 more"],
        "silent": 1,
        "notes": [],
    }


# --- a sample of the study ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    path = Path(__file__).parents[1] / "bench" / "evidence_study.py"
    spec = importlib.util.spec_from_file_location("evidence_study", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", ["rank-4", "loraplus-random", "full"])
def test_three_short_runs(study: ModuleType, setting: str, tmp_path: Path) -> None:
    """Trained here and weighed in every wrong order: what the study's table says holds."""
    run = replace(next(run for run in study.RUNS if run.name == setting), steps=10, layers=3)
    study.train(run, tmp_path)
    for found in study.weigh_run(run, tmp_path, swaps=20):
        assert found["verdict"] in {"confirmed", "partly"}, found
        assert not found["against"]
        for label in study.WHOLE & set(found["wrong"]):
            assert not {"confirmed", "partly"} & set(found["wrong"][label]), (label, found)
        for label, counts in found["exchanged"].items():
            assert "excluded" not in counts, (label, found)
            assert "confirmed" not in found["wrong"][label], (label, found)


def test_the_study_holds(study: ModuleType) -> None:
    """What was found, run by run, in the file beside the study, against what is claimed of it."""
    assert study.claims(study.results()) == []


def test_the_table_is_that_of_the_results(study: ModuleType) -> None:
    assert study.DOCUMENT.read_text(encoding="utf-8").endswith(study.table(study.results()))
