"""Files of MLX's optimizers: genuine ones of mlx and mlx-lm, in the layouts of unsloth and mflux."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_state_format import registry
from lora_state_format.converters import mlx
from lora_state_format.errors import (
    ConversionError,
    FileError,
    OptionError,
    RefusedError,
    UnknownFormatError,
    UnrepresentableError,
)
from lora_state_format.format import reading, writing
from lora_state_format.io import safetensors
from lora_state_format.io.plain import header
from lora_state_format.mapping.maps import MAPS
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import (
    Checkpoint,
    Group,
    Naming,
    Optimizer,
    OptimizerState,
    Parameter,
    Role,
    Scalar,
    Slot,
)
from lora_state_format.model.tensors import contiguous


def written(path: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> Path:
    """A safetensors file as MLX writes it: its metadata is null, and scalars stand unaligned."""
    kinds = {"float32": "F32", "uint64": "U64", "uint32": "U32", "int32": "I32"}
    entries = [(key, kinds[array.dtype.name], array.shape, array.nbytes) for key, array in tensors.items()]
    raw = b'{"__metadata__":null,' + header(entries)[9:].rstrip(b" ")
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(array.tobytes() for array in tensors.values()))
    return path


STEP = np.array(3, np.uint64)
RATE = np.array(1e-3, np.float32)
MOMENT = np.arange(6, dtype=np.float32).reshape(2, 3)
ADAM: dict[str, Any] = {"learning_rate": RATE, "w.m": MOMENT, "w.v": MOMENT, "step": STEP}
CORRECTED = {"optimizer": "adam", "bias_correction": True}


def read(path: Path, **options: Any) -> OptimizerState:
    state = registry.read(path, "mlx", options).state
    assert isinstance(state, OptimizerState)
    return state


def test_it_is_found_by_its_counters(tmp_path: Path) -> None:
    for name in ("optimizer_state.safetensors", "optimizer.safetensors", "0000100_optimizer.safetensors"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        path = written(folder / name, ADAM)
        for place in (path, folder):
            converter, match = registry.detect(place)
            assert (converter.NAME, match.path) == ("mlx", path)
            assert match.reason == "safetensors with step and learning_rate next to <parameter>.<slot>, as MLX has them"
        written(folder / "0000200_optimizer.safetensors", ADAM)
        assert mlx.detect(folder) is None  # which of them?
    others: list[dict[str, Any]] = [{"w.m": MOMENT}, {**ADAM, "step": np.array(3, np.uint32)}, {"step": STEP}]
    for tensors in others:
        assert mlx.detect(written(tmp_path / "other.safetensors", tensors)) is None
    (tmp_path / "broken.safetensors").write_bytes(b"1234")
    assert mlx.detect(tmp_path / "broken.safetensors") is None
    assert mlx.detect(tmp_path) is None
    path = written(tmp_path / "other.safetensors", {"w.m": MOMENT})
    with pytest.raises(UnknownFormatError) as error:
        registry.read(path, "mlx")
    assert str(error.value) == f"{path}: not recognised as 'mlx': expected {mlx.DESCRIPTION}"


@pytest.mark.parametrize(
    ("tensors", "kind", "message"),
    [
        (
            {f"states.{n}.{key}": value for n in range(2) for key, value in ADAM.items()},
            RefusedError,
            "the state of a MultiOptimizer, whose parts do not say their rules: save the state of each part",
        ),
        (
            {**ADAM, "w.m.0": MOMENT},
            RefusedError,
            "'w.m.0' is a part of a moment in 8 bits: it was rounded when it was saved",
        ),
        ({"learning_rate": RATE, "step": STEP}, FileError, "holds no parameter's state"),
        (
            {**ADAM, "w.v": MOMENT.T.copy()},
            FileError,
            "'w' has slots of other shapes: exp_avg [2, 3], exp_avg_sq [3, 2]",
        ),
        (
            {**ADAM, "q.lora_a.m": MOMENT},
            OptionError,
            "'q.lora_a' holds m, which is not the state of adam; it fits lion",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, tensors: Any, kind: type[Exception], message: str) -> None:
    path = written(tmp_path / "optimizer.safetensors", tensors)
    with pytest.raises(kind) as caught:
        read(path, **CORRECTED)
    assert str(caught.value) == f"{path}: {message}"


def test_what_the_caller_has_to_say(tmp_path: Path) -> None:
    path = written(tmp_path / "optimizer.safetensors", ADAM)
    for options, message in (
        (
            {},
            (
                f"{path}: 'w' holds m, v, and the file does not name its optimizer; it fits adam, adamw, "
                "adam_uncorrected, adamw_uncorrected; pass the right one as optimizer="
            ),
        ),
        (
            {"optimizer": "adamw"},
            (
                f"{path}: the file does not say whether MLX's adamw corrected the bias of its moments; pass "
                "options={'bias_correction': True}, or False, which is MLX's default"
            ),
        ),
        ({**CORRECTED, "lr": 0.5}, f"{path} holds lr=0.0010000000474974513, not 0.5"),
    ):
        with pytest.raises(OptionError) as caught:
            read(path, **options)
        assert str(caught.value) == message
    state = read(path, **CORRECTED, betas=[0.9, 0.99])
    assert state.optimizers[0].class_path == "torch.optim.adam.Adam"
    assert state.groups[0].options == (("lr", float(RATE)), ("betas", (0.9, 0.99)))
    assert state["w"]["step"] == Scalar("F32", np.float32(3).tobytes())
    assert dict(read(path, **CORRECTED, lr=1e-3).groups[0].options)["lr"] == 1e-3, "float32 holds it rounded"
    plain = read(path, optimizer="adam", bias_correction=False)
    assert plain.optimizers[0].class_path == "mlx.optimizers.Adam"
    assert plain.groups[0].options == (("lr", float(RATE)), ("bias_correction", False))
    mlx.write(plain, tmp_path / "back.safetensors", base=None, force=False, options={})
    flax = registry.writer("flax_msgpack")
    with pytest.raises(UnrepresentableError) as refused:
        flax.write(plain, tmp_path / "never", base=None, force=False, options={"map": "none"})
    assert str(refused.value) == "the target has no place for the state of adam_uncorrected"


def test_a_compressed_archive_is_to_be_unzipped(tmp_path: Path) -> None:
    written(tmp_path / "0000100_optimizer.safetensors", ADAM)
    path = tmp_path / "0000100_checkpoint.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "0000100_optimizer.safetensors", "0000100_optimizer.safetensors")
    converter, match = registry.detect(path)
    assert converter.NAME == "mlx"
    assert match.reason == "a zip archive with 0000100_optimizer.safetensors, as mflux writes it"
    with pytest.raises(RefusedError) as caught:
        read(path)
    assert str(caught.value) == f"{path}: compressed: unzip it and convert the file *_optimizer.safetensors in it"


def test_the_adapter_beside_it_says_the_names(tmp_path: Path) -> None:
    path = written(tmp_path / "0000100_optimizer.safetensors", ADAM)
    written(tmp_path / "0000100_adapter.safetensors", {"w": MOMENT})
    assert list(registry.read(path, "mlx", CORRECTED).weights) == ["w"]
    written(tmp_path / "0000100_adapter.safetensors", {"other": MOMENT})
    with pytest.raises(FileError) as caught:
        read(path, **CORRECTED)
    assert str(caught.value) == f"{path}: 'w.m' is state of 'w', which the adapter next to it does not have"
    written(tmp_path / "0000100_adapter.safetensors", {"w": MOMENT.T.copy()})
    with pytest.raises(FileError) as caught:
        read(path, **CORRECTED)
    assert str(caught.value) == (
        f"{path}: 'w' of shape [3, 2] has slots of other shapes: exp_avg [2, 3], exp_avg_sq [2, 3]"
    )


def test_a_state_that_took_no_step_is_none(tmp_path: Path) -> None:
    none = np.zeros((2, 3), np.float32)
    tensors: dict[str, Any] = {"learning_rate": RATE, "w.m": none, "w.v": none, "step": np.array(0, np.uint64)}
    path = written(tmp_path / "optimizer.safetensors", tensors)
    state = read(path, **CORRECTED)
    assert state["w"].state is None
    mlx.write(state, tmp_path / "back.safetensors", base=None, force=False, options={})
    assert_same(path, tmp_path / "back.safetensors")


def assert_same(one: Path, other: Path) -> None:
    from lora_state_format.model.sources import File

    with File(one) as first, File(other) as second:
        ours = safetensors.read_header(first, foreign=True).tensors
        theirs = safetensors.read_header(second, foreign=True).tensors
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert (tensor.dtype, tensor.shape) == (theirs[key].dtype, theirs[key].shape)
            assert tensor.bytes() == theirs[key].bytes()


def test_what_mlx_has_no_place_for(tmp_path: Path) -> None:
    moment = Slot(contiguous("F32", (2,), Memory(bytes(8))), Role.PARAM)

    def state(*groups: Group, slots: Any = None, **options: Any) -> OptimizerState:
        parameters = tuple(
            Parameter(f"p{n}", (2,), {"step": 3, "exp_avg": moment, **(slots or {"exp_avg_sq": moment})})
            for n in range(sum(group.count for group in groups))
        )
        return OptimizerState((Optimizer("torch.optim.adam.Adam"),), groups, parameters, Naming("model"))

    target = tmp_path / "never.safetensors"
    cases: list[tuple[OptimizerState, dict[str, Any], type[Exception], str]] = [
        (
            state(Group(0, (("lr", 0.1),), 1), Group(0, (("lr", 0.2),), 1)),
            {},
            UnrepresentableError,
            ("MLX has one learning rate, and the groups have [0.1, 0.2]; pass the one to write as options={'lr': ...}"),
        ),
        (
            state(Group(0, (), 1)),
            {},
            UnrepresentableError,
            "MLX has one learning rate, and the groups have [None]; pass the one to write as options={'lr': ...}",
        ),
        (
            state(Group(0, (("lr", 0.1),), 1), slots={"max_exp_avg_sq": moment}),
            {},
            UnrepresentableError,
            "'p0' has a slot 'max_exp_avg_sq', which the target has no place for",
        ),
        (
            state(Group(0, (("lr", 0.1),), 1), slots={"step": 4}),
            {},
            UnrepresentableError,
            "'p0' has no tensor 'exp_avg_sq', which MLX keeps",
        ),
        (
            state(Group(0, (("lr", 0.1),), 1)),
            {"map": "mlx_lm"},
            ConversionError,
            "'p0' of shape [2] has no rule in map 'mlx_lm' for the way back",
        ),
        (
            state(Group(0, (("lr", 0.1), ("maximize", True)), 1)),
            {},
            UnrepresentableError,
            "group 0 has maximize=True, which adam of other frameworks does not have",
        ),
        (
            state(Group(0, (("lr", 0.1), ("decoupled_weight_decay", True)), 1)),
            {},
            UnrepresentableError,
            "group 0 has decoupled_weight_decay=True, which adam of other frameworks does not have",
        ),
        (
            state(Group(0, (("lr", 0.1), ("eps", 1e-8)), 1), Group(0, (("lr", 0.1), ("eps", 1e-6)), 1)),
            {},
            UnrepresentableError,
            "groups differ in eps (1e-08, 1e-06), and the target has one for all; pass it as options={'eps': ...}",
        ),
        (
            replace(state(Group(0, (("lr", 0.1),), 1)), globals={"k": 3}),
            {},
            UnrepresentableError,
            "'k' belongs to no parameter: the target has no place for it",
        ),
        (
            replace(state(Group(0, (("lr", 0.1),), 1)), optimizers=(Optimizer("torch.optim.adam.Adam"),) * 2),
            {},
            UnrepresentableError,
            "the state of 2 optimizers, where the target has that of one",
        ),
    ]
    for found, options, kind, message in cases:
        with pytest.raises(kind) as caught:
            mlx.write(found, target, base=None, force=False, options={"map": "none", **options})
        assert str(caught.value) == message
    with pytest.raises(OptionError) as refused:
        mlx.write(cases[0][0], target, base=tmp_path / "base", force=False, options={})
    assert str(refused.value) == f"mlx writes a whole file and takes nothing from another ({tmp_path / 'base'})"
    sgd = OptimizerState(
        (Optimizer("torch.optim.sgd.SGD"),),
        (Group(0, (("lr", 0.1),), 1),),
        (Parameter("p", (2,), {"momentum_buffer": moment}),),
        Naming("model"),
    )
    with pytest.raises(
        UnrepresentableError, match=r"^the state does not say how many steps were taken; pass the number as options="
    ):
        mlx.write(sgd, target, base=None, force=False, options={"map": "none"})
    with pytest.raises(OptionError) as unnamed:
        mlx.write(sgd, target, base=None, force=False, options={})
    assert str(unnamed.value) == (
        "the names and axes of the state are not those of mlx; maps are known for "
        f"{', '.join(layout.name for layout in MAPS)}; pass one, a file, or 'none' to keep the names, as "
        "options={'map': ...}"
    )
    assert not target.exists()
    mlx.write(sgd, target, base=None, force=False, options={"map": "none", "step": 7})
    assert read(target, optimizer="sgd").global_step == 7


# --- files made by MLX --------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "Adam": ("adam", {"bias_correction": True}, {"m": "exp_avg", "v": "exp_avg_sq"}),
    "AdamW": ("adamw", {"bias_correction": True}, {"m": "exp_avg", "v": "exp_avg_sq"}),
    "SGD": ("sgd", {"momentum": 0.9}, {"v": "momentum_buffer"}),
    "Lion": ("lion", {}, {"m": "exp_avg"}),
    "Adagrad": ("adagrad", {}, {"v": "sum"}),
    "RMSprop": ("rmsprop", {}, {"v": "square_avg"}),
    "AdaDelta": ("adadelta", {}, {"v": "square_avg", "u": "acc_delta"}),
    "Adafactor": ("adafactor", {}, {s: s for s in ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq")}),
}


def llama(dora: bool = False) -> Any:
    """mlx-lm's Llama with LoRA, on its embedding too."""
    from mlx_lm.models import llama
    from mlx_lm.tuner.utils import linear_to_lora_layers

    arguments = llama.ModelArgs(
        model_type="llama", hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=64,
    )  # fmt: skip
    model = llama.Model(arguments)
    model.freeze()
    keys = ["self_attn.q_proj", "mlp.down_proj", *([] if dora else ["model.embed_tokens"])]
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": keys}, use_dora=dora)
    return model


def trained(model: Any, name: str, steps: int = 3) -> Any:
    import mlx.core as core
    import mlx.optimizers
    from mlx.utils import tree_map

    optimizer = getattr(mlx.optimizers, name)(learning_rate=1e-3, **OPTIMIZERS[name][1])
    gradients = tree_map(lambda weight: core.random.normal(weight.shape), model.trainable_parameters())
    for _ in range(steps):
        optimizer.update(model, gradients)
        core.eval(model.parameters(), optimizer.state)
    return optimizer


def save(optimizer: Any, model: Any, folder: Path, state: str, adapters: str) -> Path:
    import mlx.core as core
    from mlx.utils import tree_flatten

    folder.mkdir()
    core.save_safetensors(str(folder / adapters), dict(tree_flatten(model.trainable_parameters())))
    core.save_safetensors(str(folder / state), dict(tree_flatten(optimizer.state)))
    return folder / state


@pytest.mark.frameworks
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_holds_what_mlx_holds_and_comes_back(tmp_path: Path, name: str, dora: bool) -> None:
    from mlx.utils import tree_flatten

    rule, options, slots = OPTIMIZERS[name]
    model = llama(dora)
    optimizer = trained(model, name)
    path = save(optimizer, model, tmp_path / "checkpoint-3", "optimizer_state.safetensors", "adapters.safetensors")
    (path.parent / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    assert registry.detect(path.parent)[0].NAME == "mlx"

    ours = read(path, optimizer=rule, map="none", **options)
    live = {key: np.array(array) for key, array in tree_flatten(optimizer.state)}
    assert ours.global_step == live.pop("step") == 3
    assert ours.groups[0].options[0] == ("lr", float(live.pop("learning_rate")))
    for key, array in live.items():
        parameter, _, field = key.rpartition(".")
        assert ours[parameter][slots[field]].bytes() == array.tobytes()
        if rule != "adafactor":
            assert ours[parameter].shape == array.shape
    assert len(live) == sum(
        sum(isinstance(value, Slot) for value in p.state.values()) for p in ours.values() if p.state
    )

    # By the map of mlx-lm, which is taken where all names are of LoRA, and back.
    checkpoint: Checkpoint = registry.read(path, "mlx", {"optimizer": rule, **options})
    state = checkpoint.state
    assert isinstance(state, OptimizerState)
    named = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"
    adapter = dict(tree_flatten(model.trainable_parameters()))
    assert state[named].shape == adapter["model.layers.1.self_attn.q_proj.lora_a"].shape[::-1]
    assert state[named].foreign_names == {"peft": "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"}
    weight = checkpoint.weights[state[named].foreign_names["peft"]]
    assert np.array_equal(weight.numpy(), np.array(adapter["model.layers.1.self_attn.q_proj.lora_a"]).T)
    other = "lora_magnitude_vector.default.weight" if dora else "lora_embedding_A.default"
    assert any(name.endswith(other) for name in state)
    writing.write(state, tmp_path / "state.safetensors")
    with reading.open_state(tmp_path / "state.safetensors") as reopened:
        mlx.write(reopened, tmp_path / "back.safetensors", base=None, force=False, options={})
    assert_same(path, tmp_path / "back.safetensors")


@pytest.mark.frameworks
def test_an_npz_holds_the_same(tmp_path: Path) -> None:
    """``mx.savez`` of the same state and adapter."""
    import mlx.core as core
    from mlx.utils import tree_flatten

    model = llama(False)
    optimizer = trained(model, "AdamW")
    options = {"optimizer": "adamw", **OPTIMIZERS["AdamW"][1]}
    path = save(optimizer, model, tmp_path / "a", "optimizer_state.safetensors", "adapters.safetensors")
    core.savez(str(tmp_path / "optimizer.npz"), **dict(tree_flatten(optimizer.state)))
    core.savez(str(tmp_path / "adapters.npz"), **dict(tree_flatten(model.trainable_parameters())))
    assert registry.detect(tmp_path / "optimizer.npz")[0].NAME == "mlx"
    ours, theirs = read(tmp_path / "optimizer.npz", **options), read(path, **options)
    assert set(ours) == set(theirs)
    for name, parameter in theirs.items():
        assert ours[name].shape == parameter.shape
        assert ours[name]["exp_avg"].bytes() == parameter["exp_avg"].bytes()
        assert ours[name]["exp_avg_sq"].bytes() == parameter["exp_avg_sq"].bytes()


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore")
def test_names_are_those_of_peft(tmp_path: Path) -> None:
    """LoRA and its embedding, DoRA: what mlx-lm calls them, PEFT on transformers' Llama calls so, with these shapes."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    for dora in (False, True):
        targets = ["q_proj", "down_proj", *([] if dora else ["embed_tokens"])]
        peft = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=targets, use_dora=dora))
        model = llama(dora)
        optimizer = trained(model, "Lion")
        path = save(
            optimizer, model, tmp_path / str(dora), "0000003_optimizer.safetensors", "0000003_adapters.safetensors"
        )
        state = read(path, optimizer="lion")
        shapes = {name: tuple(p.shape) for name, p in peft.named_parameters() if p.requires_grad}
        assert {name: parameter.shape for name, parameter in state.items()} == shapes
        assert list(state) == list(shapes)


@pytest.mark.frameworks
def test_a_multi_optimizer_is_refused(tmp_path: Path) -> None:
    import mlx.optimizers as optimizers

    model = llama()
    both = optimizers.MultiOptimizer(
        [optimizers.SGD(1e-3), optimizers.AdamW(1e-3)], [lambda name, weight: "lora_a" in name]
    )
    both.update(model, model.trainable_parameters())
    path = save(both, model, tmp_path / "multi", "optimizer.safetensors", "adapters.safetensors")
    with pytest.raises(RefusedError) as caught:
        read(path, optimizer="sgd")
    assert str(caught.value) == (
        f"{path}: the state of a MultiOptimizer, whose parts do not say their rules: save the state of each part"
    )
