"""The study behind the thresholds of ``lora_state_format.evidence``: real runs, every wrong order, and what was said.

::

    python tests/bench/evidence_study.py train RUNS       # real training runs; about 10 minutes of one core, resumable
    python tests/bench/evidence_study.py weigh RUNS       # every order of every run; half an hour of one core
    python tests/bench/evidence_study.py table            # evidence_study.json -> docs/evidence.md

Needs torch, transformers, peft and, for the 8-bit and Lion runs, bitsandbytes. ``RUNS`` takes about 250 MB.
"""

from __future__ import annotations

import json
import random
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lora_state_format.foreign import pickles
from lora_state_format.foreign.state_dict import from_state_dict
from lora_state_format.model.sources import File
from lora_state_format.model.states import OptimizerState, Parameter
from lora_state_format.model.tensors import Tensor
from lora_state_format.naming.evidence import EXCLUDED, _layer_orders, _outcome, _twin_orders, _whole, judge
from lora_state_format.naming.order import decide
from lora_state_format.naming.signals import A, Balance, Sources, Unit, units_of
from lora_state_format.naming.table import Table

if TYPE_CHECKING:
    pass

RESULTS: Final = Path(__file__).with_suffix(".json")
"""What ``weigh`` found, so that the tables can be made without training anything."""

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "evidence.md"
MARK: Final = "<!-- The rest is written by tests/bench/evidence_study.py -->\n"

WHOLE: Final = frozenset(
    f"layers {how}"
    for how in ("reversed", "shifted up by one", "shifted down by one", "sorted as text", "sorted as numbers")
)
"""Labels of the wrong orders that are wrong as a whole."""

VERDICTS: Final = ("contradicted", "inconclusive", "partly", "confirmed")

SNAPSHOTS: Final = (3, 10, 30, 100, 200, 300, 1000, 3000)
"""Steps after which a run is saved, beside its last one."""

VOCABULARY: Final = 96
LENGTH: Final = 24
BATCH: Final = 4


@dataclass(frozen=True)
class Run:
    """One training run. ``decay`` is the optimizer's weight decay, coupled or not as the optimizer has it."""

    name: str
    method: str = "lora"
    optimizer: str = "adamw"
    layers: int = 4
    hidden: int = 48
    kv_heads: int = 2
    rank: int = 8
    steps: int = 200
    lr: float = 1e-3
    decay: float = 0.0
    schedule: str = "constant"
    pretrained: bool = True
    dropout: float = 0.0
    dtype: str = "float32"
    targets: str = "all-linear"
    random: bool = False


_SETTINGS: Final = (
    Run("qwen-28-layers", layers=28, hidden=32, steps=300, schedule="linear", pretrained=False),
    Run("rank-4", rank=4),
    Run("rank-16", rank=16),
    Run("rank-64", rank=64, hidden=64, layers=3),
    Run("two-layers", layers=2, hidden=64, kv_heads=4),
    Run("mha", layers=6, kv_heads=4),
    Run("twelve-layers", layers=12, hidden=32, rank=4),
    Run("untrained-base", pretrained=False),
    Run("lr-1e-5", lr=1e-5),
    Run("lr-1e-4", lr=1e-4, schedule="linear"),
    Run("lr-1e-2", lr=1e-2),
    Run("lr-1e-2-decay", lr=1e-2, decay=0.1, schedule="linear"),
    Run("decay-0.01", decay=0.01),
    Run("dropout", dropout=0.1, schedule="linear"),
    Run("bf16", dtype="bfloat16"),
    Run("adam-l2", optimizer="adam", decay=0.01),
    Run("sgd-momentum", optimizer="sgd", lr=1e-2),
    Run("sgd-l2", optimizer="sgd", lr=1e-2, decay=0.01),
    Run("lion", optimizer="lion", lr=1e-4),
    Run("adamw-8bit", optimizer="adamw8bit", hidden=64, rank=16),
    Run("dora", method="dora"),
    Run("rslora", method="rslora", rank=32),
    Run("loraplus", method="loraplus", lr=2e-4),
    Run("pissa", method="pissa"),
    Run("continued", method="continued"),
    Run("one-target", layers=12, hidden=32, rank=4, targets="q_proj"),
    Run("full", method="full", steps=300, lr=3e-4, decay=0.01),
    Run("full-llama", method="full", steps=300, lr=1e-3, kv_heads=4),
    Run("long", steps=3000, hidden=32),
    Run("long-decay", steps=3000, hidden=32, lr=3e-3, decay=0.1, schedule="linear"),
    Run("long-8-layers", steps=1000, layers=8, hidden=32, rank=4),
)
RUNS: Final = tuple(replace(r, name=f"{r.name}{s}", random=bool(s)) for r in _SETTINGS for s in ("", "-random"))
"""Every setting twice: on a Markov chain, which can be learned, and on random tokens, which cannot."""


def _batches(run: Run, seed: int) -> Any:
    """Endless batches of tokens, ``[BATCH, LENGTH]``: of a chain where each token has four successors, or of noise."""
    import torch

    chain = torch.Generator().manual_seed(seed)
    successors = torch.randint(0, VOCABULARY, (VOCABULARY, 4), generator=chain)
    while True:
        if run.random:
            yield torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=chain)
            continue
        tokens = torch.randint(0, VOCABULARY, (BATCH, 1), generator=chain)
        for _ in range(LENGTH - 1):
            step = torch.randint(0, 4, (BATCH, 1), generator=chain)
            tokens = torch.cat([tokens, successors[tokens[:, -1:], step].view(BATCH, 1)], dim=1)
        yield tokens


def build(run: Run) -> Any:
    """The model of a run, base weights trained for a while on another chain where the run says so."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": run.hidden, "intermediate_size": 2 * run.hidden,
        "num_hidden_layers": run.layers, "num_attention_heads": 4, "num_key_value_heads": run.kv_heads,
        "max_position_embeddings": 64, "tie_word_embeddings": run.kv_heads == 2,
    }  # fmt: skip
    model = Qwen2ForCausalLM(Qwen2Config(**sizes)) if run.kv_heads == 2 else LlamaForCausalLM(LlamaConfig(**sizes))
    if run.pretrained:
        _fit(model, torch.optim.AdamW(model.parameters(), lr=2e-3), replace(run, random=False), 60, seed=1)
    if run.method == "full":
        return model
    config = LoraConfig(
        r=run.rank,
        lora_alpha=2 * run.rank,
        lora_dropout=run.dropout,
        target_modules=run.targets if run.targets == "all-linear" else [run.targets],
        use_dora=run.method == "dora",
        use_rslora=run.method == "rslora",
        init_lora_weights="pissa" if run.method == "pissa" else True,
    )
    return get_peft_model(model.to(getattr(torch, run.dtype)), config, autocast_adapter_dtype=False)


def optimizer_of(run: Run, model: Any) -> Any:
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    options: dict[str, Any] = {"lr": run.lr, "weight_decay": run.decay}
    if run.method == "loraplus":
        from peft.optimizers import create_loraplus_optimizer

        return create_loraplus_optimizer(model, torch.optim.AdamW, loraplus_lr_ratio=16, **options)
    if run.optimizer in {"lion", "adamw8bit"}:
        import bitsandbytes

        made = {"lion": bitsandbytes.optim.Lion, "adamw8bit": bitsandbytes.optim.AdamW8bit}[run.optimizer]
        return made(parameters, **options, **({"min_8bit_size": 512} if run.optimizer == "adamw8bit" else {}))
    if run.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, **options)
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[run.optimizer](parameters, **options)


def _fit(model: Any, optimizer: Any, run: Run, steps: int, seed: int, saved: Any = None) -> None:
    import torch

    batches = _batches(run, seed)
    linear = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: 1 - n / (steps + 1) if run.schedule == "linear" else 1.0
    )
    for step in range(1, steps + 1):
        tokens = next(batches)
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        linear.step()
        optimizer.zero_grad()
        if saved:
            saved(step)


def train(run: Run, folder: Path) -> None:
    """Train a run; each snapshot is ``<run>/<step>.pt``: the optimizer's state dict, weights and initial weights."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(zlib.crc32(run.name.encode()))
    target = folder / run.name
    target.mkdir(parents=True, exist_ok=True)
    model = build(run)
    model.train()
    if run.method == "continued":
        _fit(model, optimizer_of(run, model), run, 60, seed=2)
    optimizer = optimizer_of(run, model)

    def save(step: int) -> None:
        close = run.method == "full" and step + 10 in {*SNAPSHOTS, run.steps}
        if step in SNAPSHOTS or step == run.steps or close:
            weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            torch.save({"optimizer": optimizer.state_dict(), "weights": weights}, target / f"{step}.pt")

    _fit(model, optimizer, run, run.steps, seed=3, saved=save)


# --- weighing -------------------------------------------------------------------------------------------------------


def read(path: Path) -> tuple[OptimizerState, dict[str, Tensor]]:
    """A snapshot in its true order, and its weights."""
    tree = pickles.load(File(path)).value
    weights: dict[str, Tensor] = tree["weights"]
    positional = from_state_dict(tree["optimizer"])
    parameters = [Parameter(name, tensor.shape, None) for name, tensor in weights.items()]
    rule = "peft-loraplus" if len(positional.groups) == 4 else "flat"
    return decide(positional, parameters, rule=rule, source="names"), weights


def wrong_orders(units: Sequence[Unit], swaps: int, seed: int) -> Iterator[tuple[str, Sources | None]]:
    """Each wrong order with the class that it is counted under; ``None`` if shapes refuse it."""
    yield from _layer_orders(units)
    yield from (("all of a twin", sources) for _, sources in _twin_orders(units))
    choice = random.Random(seed)
    table = Table(units)
    pairs = [pair for members in table.classes.values() for pair in combinations(members, 2)]
    twins = [(i, k) for i, k in pairs if units[i].twin(units[k])]
    layers = {unit.layer[1] for unit in units if unit.layer}
    for layer in choice.sample(sorted(layers, key=int)[:-1], min(2, len(layers) - 1)):
        here = [n for n, unit in enumerate(units) if unit.layer and unit.layer[1] == layer]
        above = [n for n, unit in enumerate(units) if unit.layer and unit.layer[1] == str(int(layer) + 1)]
        leaves = {units[n].leaf: n for n in above}
        both = [(n, leaves[units[n].leaf]) for n in here]
        yield "adjacent layers", _whole(units, [*both, *((k, i) for i, k in both)])
    for i, k in choice.sample(twins, min(8, len(twins))):
        yield "one of a twin", _whole(units, [(i, k), (k, i)])
    for i, k in choice.sample(pairs, min(swaps, len(pairs))):
        yield "one pair", _whole(units, [(i, k), (k, i)])
    several = [pair for pair in pairs if A in units[pair[0]].parts]
    for i, k in choice.sample(several, min(20, len(several))):
        yield "A of one pair", {(i, A): k, (k, A): i}


def moved(units: Sequence[Unit], sources: Sources) -> list[Unit]:
    """The units as another order has them: weights stay, state moves."""
    result = []
    for number, unit in enumerate(units):
        parts = {}
        for kind, part in unit.parts.items():
            state = units[sources.get((number, kind), number)].parts[kind]
            lines = {line: (values, state.lines[line][1]) for line, (values, _) in part.lines.items()}
            parts[kind] = replace(state, name=part.name, weight=part.weight, lines=lines)
        result.append(replace(unit, parts=parts))
    return result


def weigh_snapshot(units: list[Unit], balances: list[Balance], swaps: int, seed: int) -> dict[str, Any]:
    """What is said of the true order and of each wrong one, and of the pair itself where just one was exchanged."""
    table = Table(units, balances)
    right = judge(table)
    lost = [loss for _, losses in table.exchanges() for loss in losses.values()]
    nearest = -float("inf")
    wrong: dict[str, Counter[str]] = defaultdict(Counter)
    exchanged: dict[str, Counter[str]] = defaultdict(Counter)
    for label, sources in wrong_orders(units, swaps, seed):
        if sources is None:
            wrong[label]["refused"] += 1
            continue
        wrongly = Table(moved(units, sources), balances)
        wrong[label][judge(wrongly).verdict] += 1
        if len({number for number, _ in sources}) == 2:
            kind = A if label == "A of one pair" else None
            pair = tuple(sorted({number for number, _ in sources}))
            losses = [found[pair] for part, found in wrongly.exchanges() if part == kind and pair in found]
            exchanged[label][_outcome(losses)] += 1
            nearest = max(nearest, losses[0][1])
    return {
        "verdict": right.verdict,
        "pairs": list(right.pairs),
        "parts": {kind: list(counts) for kind, counts in right.parts.items()},
        "undecided": [label for label, outcome in right.orders.items() if outcome != "excluded"],
        "against": list(right.against[:5]),
        "least": round(min(sure for sure, _ in lost), 1),
        "nearest": round(nearest, 1),
        "wrong": {label: dict(counts) for label, counts in wrong.items()},
        "exchanged": {label: dict(counts) for label, counts in exchanged.items()},
    }


def weigh_run(run: Run, folder: Path, swaps: int = 200) -> Iterator[dict[str, Any]]:
    """Every snapshot of a run; one of a full fine-tune also with the weights of 10 steps, and of a snapshot, before."""
    steps = sorted(int(path.stem) for path in (folder / run.name).glob("*.pt"))
    whole = [step for step in steps if step in SNAPSHOTS or step == run.steps]
    for number, step in enumerate(whole):
        state, weights = read(folder / run.name / f"{step}.pt")
        earlier = {step - 10, whole[number - 1]} & {s for s in steps if s < step} if run.method == "full" else set()
        for before in (0, *sorted(earlier)):
            older = read(folder / run.name / f"{before}.pt")[1] if before else None
            units, balances, *_ = units_of(state, weights, older, run.hidden // 4)
            count = swaps if step == run.steps and not before else swaps // 10
            found = weigh_snapshot(units, balances, count, seed=step)
            yield {"run": run.name, "step": step, "before": before, **found}


# --- what follows ---------------------------------------------------------------------------------------------------


def results() -> list[dict[str, Any]]:
    """What ``weigh`` found, snapshot by snapshot."""
    found: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def claims(found: Sequence[dict[str, Any]]) -> list[str]:
    """Every snapshot that does not keep what the document claims."""
    broken = []
    for entry in found:
        where = f"{entry['run']} at step {entry['step']}, before {entry['before']}"
        if entry["verdict"] == "contradicted":
            broken.append(f"{where}: the right order is contradicted: {entry['against']}")
        broken += [
            f"{where}: {label} is {verdict}"
            for label, counts in entry["wrong"].items()
            for verdict in counts
            if verdict == "confirmed" or (verdict == "partly" and label in WHOLE)
        ]
        broken += [
            f"{where}: {label}: the exchanged pair is excluded"
            for label, counts in entry["exchanged"].items()
            if "excluded" in counts
        ]
    runs = {run.name: run for run in RUNS}
    short = [e for e in found if runs[e["run"]].optimizer == "adamw" and e["step"] <= 200]
    told = sum(entry["verdict"] in {"confirmed", "partly"} for entry in short)
    if told < 0.95 * len(short):
        broken.append(f"the right order of only {told} of {len(short)} short AdamW snapshots is told")
    return broken


METHODS: Final = {"lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA", "loraplus": "LoRA+", "pissa": "PiSSA"}
OPTIMIZERS: Final = {
    "adamw": "AdamW",
    "adam": "Adam with L2",
    "sgd": "SGD with momentum",
    "lion": "Lion",
    "adamw8bit": "8-bit AdamW",
}
BUCKETS: Final = ((10, "3 to 10"), (100, "30 to 100"), (300, "200 to 300"), (3000, "1,000 to 3,000"))


def _kind(entry: dict[str, Any]) -> str:
    run = next(run for run in RUNS if run.name == entry["run"])
    if run.method != "full":
        return f"{METHODS.get(run.method, 'LoRA, continued')}, {OPTIMIZERS[run.optimizer]}"
    if not entry["before"]:
        return "full fine-tune, one checkpoint"
    near = entry["step"] - entry["before"] <= 10
    return f"full fine-tune, another {'up to 10' if near else 'up to 100'} steps before"


def _share(counts: Sequence[Sequence[int]]) -> str:
    excluded, undecided = (sum(pair[n] for pair in counts) for n in (0, 1))
    total = excluded + undecided
    # Rounded down: 100 means every one.
    return f"{int(1000 * excluded / total) / 10:g}" if total else "-"


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _head(*cells: str) -> list[str]:
    return [_row(*cells), _row(*("---" for _ in cells))]


def table(found: Sequence[dict[str, Any]]) -> str:
    """The tables of the document."""
    return (
        "\n\n".join("\n".join(lines) for lines in (_right(found), _beside_the_prototype(found), _wrong(found))) + "\n"
    )


def _right(found: Sequence[dict[str, Any]]) -> list[str]:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for entry in found:
        bucket = next(n for n, (bound, _) in enumerate(BUCKETS) if entry["step"] <= bound)
        groups[_kind(entry), bucket].append(entry)
    verdicts = ("confirmed", "partly", "inconclusive")
    shares = ("pairs excluded, %", "A alone, %", "B alone, %")
    lines = ["### The right order", "", *_head("run", "steps", "snapshots", *verdicts, *shares)]
    for (kind, bucket), entries in sorted(groups.items()):
        counts = Counter(entry["verdict"] for entry in entries)
        parts = [[e["parts"][part] for e in entries if part in e["parts"]] for part in ("lora_A", "lora_B")]
        excluded = [_share(pairs) for pairs in ([entry["pairs"] for entry in entries], *parts)]
        lines.append(_row(kind, BUCKETS[bucket][1], len(entries), *(counts[v] for v in verdicts), *excluded))
    return lines


def _beside_the_prototype(found: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "### Beside the prototype",
        "",
        "On the case it was measured on, 28 layers and 392 parameters: exchanges excluded, in %.",
        "",
        *_head("step", "B alone, prototype", "B alone", "A alone, prototype", "A alone", "pairs"),
    ]
    for step, b, a in ((3, 100, "-"), (100, 71, 5), (300, 57, 33)):
        entries = [e for e in found if e["run"] == "qwen-28-layers" and e["step"] == step]
        of_a, of_b = (_share([e["parts"][part] for e in entries]) for part in ("lora_A", "lora_B"))
        lines.append(_row(step, b, of_b, a, of_a, _share([e["pairs"] for e in entries])))
    return lines


def _wrong(found: Sequence[dict[str, Any]]) -> list[str]:
    least, nearest = min(entry["least"] for entry in found), max(entry["nearest"] for entry in found)
    lines = [
        "### Wrong orders",
        "",
        "What each was said to be; and, where one pair was exchanged, what was said of that pair. The pair that came",
        f"nearest to being excluded though it was exchanged lost {nearest:g} nats; the exchange that came nearest to",
        f"contradicting a right order won {-least:g} by the signals that can. Either takes more than {EXCLUDED:g}.",
        "",
        *_head("wrong order", "tried", *VERDICTS, "pair excluded", "pair undecided", "pair preferred"),
    ]
    wrong: dict[str, Counter[str]] = defaultdict(Counter)
    exchanged: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in found:
        for label, counts in entry["wrong"].items():
            wrong[label].update(counts)
        for label, counts in entry["exchanged"].items():
            exchanged[label].update(counts)
    for label, said in wrong.items():
        pair = [exchanged[label][what] if exchanged[label] else "" for what in ("excluded", "undecided", "preferred")]
        lines.append(_row(label, said.total(), *(said[v] for v in VERDICTS), *pair))
    return lines


def main(arguments: list[str]) -> None:
    match arguments:
        case ["train", folder, *only]:
            for run in RUNS:
                done = Path(folder) / run.name / f"{run.steps}.pt"
                if not done.exists() and (not only or run.name in only):
                    train(run, Path(folder))
                    print(run.name, flush=True)
        case ["weigh", folder, *only]:
            found: list[dict[str, Any]] = []
            for run in RUNS:
                if not only or run.name in only:
                    found += weigh_run(run, Path(folder))
                    print(run.name, *claims(found), flush=True)
            if not only:
                RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n", encoding="utf-8")
        case ["table"]:
            text = DOCUMENT.read_text(encoding="utf-8")
            DOCUMENT.write_text(text[: text.index(MARK) + len(MARK)] + "\n" + table(results()), encoding="utf-8")
            print("\n".join(claims(results())) or "every claim holds")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
