"""What saving costs at sizes that no machine of ours has: the files that ``save_optimizer`` would write, and a model.

    python tests/bench/scale_model.py

The files come from the functions that cut a state into files, given the shapes of a Llama of 70B and of 405B parameters
and two float32 moments. The seconds are a model: a rank receives what it writes over its link, ranks write at once, and
the file system takes what it takes. ``docs/scale.md`` has the table.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from lora_state_format.format.envelope import MAX_SHARDS
from lora_state_format.format.writing import bounds_of, even_size
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import Group, Naming, Optimizer, OptimizerState, Parameter, Role, Slot
from lora_state_format.model.tensors import contiguous

LINK: Final = 25e9  # bytes per second into a rank
DISK: Final = 100e9  # bytes per second into the file system, all ranks together


class Llama(NamedTuple):
    """A model's sizes."""

    layers: int
    width: int
    inner: int
    keys: int
    vocabulary: int = 128_256


MODELS: Final = {"70B": Llama(80, 8192, 28_672, 1024), "405B": Llama(126, 16_384, 53_248, 1024)}


def shapes(model: Llama) -> dict[str, tuple[int, ...]]:
    """Return the parameters of a model in order."""
    width, inner = model.width, model.inner
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocabulary, width)}
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{name}_proj.weight": (width, width) for name in ("q", "o")}
        found |= {f"{prefix}self_attn.{name}_proj.weight": (model.keys, width) for name in ("k", "v")}
        found |= {f"{prefix}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = (width, inner)
        found |= {f"{prefix}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return found | {"model.norm.weight": (width,), "lm_head.weight": (model.vocabulary, width)}


def state_of(model: Llama) -> OptimizerState:
    """Return a state of two moments, without bytes."""
    parameters = []
    for name, shape in shapes(model).items():
        moment = Slot(contiguous("F32", shape, Memory(b"")), Role.PARAM)
        parameters.append(Parameter(name, shape, {"exp_avg": moment, "exp_avg_sq": moment}))
    groups = (Group(0, (), len(parameters)),)
    return OptimizerState((Optimizer("torch.optim.adamw.AdamW"),), groups, tuple(parameters), Naming("model"))


def main() -> None:
    print("| model | ranks | state | files | largest | to a rank, at most | index | network | disk | one rank alone |")
    print("|" + 10 * "---|")
    for title, model in MODELS.items():
        state = state_of(model)
        sizes = [sum(slot.tensor.size for _, slot in parameter.tensors()) for parameter in state.parameters]
        index = sum(2 * (len(name) + 80) for name in state) / 1e3
        for ranks in (64, 256, 1024):
            writers = min(ranks, MAX_SHARDS)
            bounds = bounds_of(state, even_size(state, writers))
            largest = max(sum(sizes[first:last]) for first, last in bounds)
            received = largest * (ranks - 1) / ranks * 1.5  # and the weights, of which it takes digests
            print(
                f"| {title} | {ranks:,} | {sum(sizes) / 1e9:,.0f} GB | {len(bounds)} | {largest / 1e9:.1f} GB "
                f"| {received / 1e9:.1f} GB | {index:.0f} kB | {received / LINK:.1f} s | {sum(sizes) / DISK:.1f} s "
                f"| {1.5 * sum(sizes) / LINK:.0f} s |"
            )


if __name__ == "__main__":
    main()
