"""What GPT-NeoX, Megatron-DeepSpeed, Lit-GPT and OLMo wrote, under Hugging Face's names: moments, and the functions."""

from __future__ import annotations

import shutil
import tarfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lora_state_format import registry  # noqa: E402
from lora_state_format.cli import run  # noqa: E402
from lora_state_format.errors import ConversionError, OptionError  # noqa: E402
from lora_state_format.mapping import maps  # noqa: E402
from lora_state_format.mapping.apply import apply_to_weights  # noqa: E402
from lora_state_format.model.states import OptimizerState  # noqa: E402
from lora_state_format.operations.conversion import convert, read  # noqa: E402
from lora_state_format.operations.look import look  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

GOLDEN = Path(__file__).parents[1] / "golden" / "published" / "files"
SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 16, "attn_implementation": "eager", "tie_word_embeddings": False,
}  # fmt: skip
GROUPED = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 2}
NEOX = {**SIZES, "intermediate_size": 64, "rotary_pct": 0.5, "use_parallel_residual": True}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "neox": ("gpt_neox", "GPTNeoX", NEOX),
    "neox_sequential": ("gpt_neox", "GPTNeoX", NEOX),
    "bloom": ("bloom", "Bloom", {"vocab_size": 32, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "litgpt": ("litgpt", "Llama", {**GROUPED, "rms_norm_eps": 1e-5}),
    "tinyllama": ("litgpt", "Llama", {**GROUPED, "rms_norm_eps": 1e-5}),
    "olmo": ("olmo", "Olmo", GROUPED),
    "olmo2": ("olmo2", "Olmo2", {**GROUPED, "rms_norm_eps": 1e-5}),
}
LIT = {"litgpt": "lit_model.pth", "tinyllama": "iter-000003-ckpt.pth"}
HEADS = {case: {"heads": "4/2"} for case in LIT}


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    with tarfile.open(GOLDEN / f"{request.param}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / str(request.param)


def model_of(case: str) -> Any:
    _, name, sizes = MODELS[case]
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def expected(folder: Path) -> dict[str, Any]:
    """What the model computed, and the moments that the optimizers held."""
    ranks = [torch.load(path) for path in sorted(folder.parent.glob(f"{folder.name}.*.pt"))]
    if not ranks:
        return dict(torch.load(folder / "expected.pt"))
    return {**ranks[-1], "held": {name: slots for rank in ranks for name, slots in rank["held"].items()}}


@pytest.mark.parametrize("folder", MODELS, indirect=True)
def test_the_moments_and_the_model_are_hugging_faces(folder: Path, tmp_path: Path) -> None:
    case, (layout, _, _) = folder.name, MODELS[folder.name]
    source = folder / LIT.get(case, "")
    target = tmp_path / "optimizer.safetensors"
    options = {"map": layout, **HEADS.get(case, {})}
    report = convert(source, target, options=options)
    model, told = model_of(case), expected(folder)
    live = dict(model.named_parameters())
    with read(target) as state:
        assert {name: parameter.shape for name, parameter in state.items()} == {n: p.shape for n, p in live.items()}
        assert {parameter["step"].item() for parameter in state.values()} == {3}
        assert report.paired == len(live) - 3 * (case == "bloom")  # what stages share is not under its name there
        layout_of, live_names = maps.load(layout), list(state)
        for slot in ("exp_avg", "exp_avg_sq"):
            moved = {name: parameter[slot].torch() for name, parameter in state.items()}
            assert same_elements(told["held"], moved, slot)
            if case in LIT:  # its own converter of weights, given moments
                assert all(torch.equal(moved[name], slots[slot]) for name, slots in told["held"].items())
    # The weights go the moments' way, and the model computes with them what its own did.
    with read_weights(source) as weights:
        heads = (4, 2) if case in LIT else None
        for name, tensor in apply_to_weights(weights, layout_of, heads).items():
            if name in live:
                live[name].data.copy_(tensor.torch())
    if case == "bloom":
        shared = torch.load(folder / "global_step3" / "layer_01-model_00-model_states.pt", weights_only=False)
        for name, value in shared.items():
            live[f"transformer.{name.replace('embeddings.norm', 'embeddings_layernorm')}"].data.copy_(value)
    # BLOOM has another GELU, TinyLlama keeps its rotary angles in bfloat16.
    with torch.no_grad():
        close = 1e-3 if case in ("bloom", "tinyllama") else 1e-5
        assert torch.allclose(model(told["ids"]).logits, told["logits"], atol=close)
    found = look(source, options=options).state
    assert isinstance(found, OptimizerState)
    assert list(found) == live_names


def same_elements(held: dict[str, Any], moved: dict[str, Any], slot: str) -> bool:
    """Whether all elements are there, none twice."""
    sides = [
        torch.cat([value.flatten() for value in side]).sort().values
        for side in ([slots[slot] for slots in held.values()], list(moved.values()))
    ]
    return bool(torch.equal(*sides))


@contextmanager
def read_weights(source: Path) -> Any:
    checkpoint = registry.read(source)
    try:
        yield checkpoint.weights or checkpoint.tiers()[0][0].tensors
    finally:
        for resource in checkpoint.state.resources:
            resource.close()


@pytest.mark.parametrize("folder", ["litgpt"], indirect=True)
def test_heads_that_are_missing_or_do_not_divide(folder: Path) -> None:
    path = folder / "lit_model.pth"
    name = "transformer.h.0.attn.qkv.weight"
    unknown = (
        f"'{name}' holds queries, keys and values, and the file does not say how many heads it has; pass "
        "options={'heads': ...}: heads and query groups, as 32/8"
    )
    wrong = f"'{name}' has 32 rows, which 5 heads of 5 query groups do not divide; correct options={{'heads': ...}}"
    uneven = "heads='5/2': attention heads and query groups are expected, as 32/8 or 32"
    cases = ((None, ConversionError, unknown), ("5", ConversionError, wrong), ("5/2", OptionError, uneven))
    for heads, kind, message in cases:
        with pytest.raises(kind) as error:
            read(path, options={"map": "litgpt", **({} if heads is None else {"heads": heads})})
        assert str(error.value) == message


@pytest.mark.parametrize("folder", ["neox"], indirect=True)
def test_a_file_of_names_for_pipeline_layers(folder: Path, tmp_path: Path) -> None:
    with read(folder) as state, read(folder, options={"map": "gpt_neox"}) as mapped:
        pairs: dict[str, str] = {}
        for name, parameter in state.items():
            moment = parameter["exp_avg"].torch()
            pairs[name] = next(
                ours
                for ours, other in mapped.items()
                if ours not in pairs.values() and torch.equal(moment, other["exp_avg"].torch())
            )
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{theirs}\t{ours}\n" for theirs, ours in pairs.items()))
    target = tmp_path / "optimizer.safetensors"
    assert run(["convert", str(folder), str(target), "--names", str(names)]) == 0
    with read(target) as state:
        assert set(state) == set(pairs.values())
    again = tmp_path / "again.safetensors"
    shutil.copy(target, again)
    names.write_text("".join(f"{ours}\t{theirs}\n" for theirs, ours in list(pairs.items())[1:]))
    with pytest.raises(ConversionError) as error:
        read(again, names=names)
    missing = next(iter(pairs.values()))
    assert str(error.value) == f"'{missing}' has no rule in map 'names.txt'"
    names.write_text("a\tb\nc\n")
    with pytest.raises(ConversionError) as pair:
        read(again, names=names)
    assert str(pair.value) == f"{names}: expected two names with a tab between them, found 'c'"
