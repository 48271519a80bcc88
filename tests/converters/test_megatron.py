"""Checkpoints that Megatron-Core wrote, against what its ranks held: tensor, pipeline, expert and data parallel."""

from __future__ import annotations

import json
import re
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_state_format import registry
from lora_state_format.converters import megatron
from lora_state_format.errors import ConversionError, FileError, OptionError, RefusedError, UnrepresentableError
from lora_state_format.foreign.dcp import Item, open_folder, write_folder
from lora_state_format.foreign.model_space import in_shape
from lora_state_format.model.sources import Memory, bytes_of
from lora_state_format.model.states import OptimizerState
from lora_state_format.model.tensors import Tensor, contiguous
from lora_state_format.operations.conversion import convert, read
from lora_state_format.operations.diff import diff

pytestmark = pytest.mark.filterwarnings("ignore")

GOLDEN = Path(__file__).parents[1] / "golden" / "megatron" / "files"
NEMO = GOLDEN.parents[1] / "nemo" / "files"
CASES = sorted(path.name.removesuffix(".tar.xz") for files in (GOLDEN, NEMO) for path in files.iterdir())
LIVE = ["full-tp2-gated", "bucket-tp2-gated"]


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder out of ``tests/golden``, by its case; what the ranks held lies next to it."""
    return unpack(request.param, tmp_path)


def unpack(case: str, path: Path) -> Path:
    files = next(files for files in (GOLDEN, NEMO) if (files / f"{case}.tar.xz").is_file())
    with tarfile.open(files / f"{case}.tar.xz") as archive:
        archive.extractall(path, filter="data")
    return path / case


@pytest.mark.parametrize("folder", CASES, indirect=True)
def test_the_state_is_what_the_ranks_held(folder: Path) -> None:
    check(folder)


@pytest.mark.frameworks
def test_todays_megatron_writes_such_folders(tmp_path: Path, run_ranks: Any) -> None:
    run_ranks("megatron_run", tmp_path, 2, ",".join(LIVE))
    for case in LIVE:
        check(tmp_path / case)


@pytest.mark.parametrize(
    "folder", ["bucket-tp2-dp2-gated", "bucket-ep2-gated", "bucket-pp2-vp2-gated", "fp32-pp2"], indirect=True
)
def test_any_form_is_written_fully_reshardable(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "written"
    convert(folder, target, target_format="megatron", base=folder, options={"masters": True})
    with read(folder) as state, read(target) as written:
        found = diff(state, written)
        if folder.name.startswith("fp32"):  # whose steps are tensors
            assert all(line.endswith(": step: 3.0 and 3.0") for line in found.slots)
        else:
            assert not found
        assert [group.options for group in written.groups] == [group.options for group in state.groups]
        assert written.origin["masters_compared"] == len(state)
    common = torch.load(target / "common.pt", weights_only=True)
    forms = [inner["param_state_sharding_type"] for inner in chained(common["optimizer"])]
    assert forms == ["fully_reshardable"] * len(state.optimizers)
    with open_folder(folder, raw=True) as ours, open_folder(target, raw=True) as theirs:
        for where, value in ours.entries.items():
            if "optimizer." not in where[0]:  # what is no optimizer state is there, byte for byte
                copied = theirs.entries[where]
                kind = Tensor if isinstance(value, Tensor) else Item
                assert type(copied) is kind
                assert raw(copied) == raw(value)


def raw(value: Tensor | Item) -> bytes:
    return bytes(value.bytes()) if isinstance(value, Tensor) else b"".join(bytes_of(value.source))


def chained(optimizer: dict[Any, Any]) -> list[Any]:
    return [optimizer[number] for number in range(2)] if 0 in optimizer else [optimizer]


@pytest.mark.frameworks
def test_megatron_loads_what_is_written(tmp_path: Path, run_ranks: Any) -> None:
    """Its own ``load``, and with other parallelism than the source had; what it then saves holds the same bits."""
    moved = {"full-tp2-gated-nl4": "bucket-pp2-vp2-gated", "full-ep2-gated": "bucket-ep2-gated"}
    for case, source in moved.items():
        unpack(source, tmp_path)
        target, base = tmp_path / f"{case}.from", tmp_path / source
        convert(base, target, target_format="megatron", base=base, options={"masters": True})
    run_ranks("megatron_run", tmp_path, 2, ",".join(moved))
    for case, source in moved.items():
        check(tmp_path / case)
        options = {"masters": True}
        with read(tmp_path / source, options=options) as state, read(tmp_path / case, options=options) as loaded:
            found = diff(state, loaded)  # which may stand in another order: the files have none
            assert (found.run, found.removed, found.added, found.slots) == ((), (), (), ())


def check(folder: Path) -> None:
    words = folder.name.split("-")
    nemo = words[0] in ("space", "whole")  # which multiplies the groups' decay itself
    with read(folder, options={"masters": True}) as state:
        seen = set()
        for described in folder.parent.glob(f"{folder.name}.*.json"):
            where = json.loads(described.read_text())
            held = load_file(described.with_suffix(".safetensors"))
            assert len(held) > 10
            for key, expected in held.items():
                local, slot, start = key.rsplit("/", 2)
                name = whole_name(local, where)
                seen.add(name)
                value = state[name]["master_param" if slot == "param" else slot].torch()
                share = shard(
                    value, where["parameters"][local]["axis"], where, gated="gated" in words and "fc1." in name
                )
                assert list(share.shape) == where["parameters"][local]["shape"]
                assert torch.equal(share.flatten()[int(start) :][: expected.numel()], expected), (name, slot)
        assert set(state) == seen
        assert {number(parameter["step"]) for parameter in state.values()} == {3.0}
        for group, members in zip(state.groups, state.members(), strict=True):
            options = dict(group.options)
            decayed = options["weight_decay" if nemo else "wd_mult"] != 0.0
            assert {p.name.endswith(".bias") or len(p.shape) == 1 for p in members} == {not decayed}
            assert {".experts." in p.name for p in members} == {options["is_expert_parallel"]}
            assert (options["betas"], options["weight_decay"]) == ((0.9, 0.999), 0.1 if decayed or not nemo else 0.0)
        assert state.origin["masters_compared"] == (0 if "fp32" in words else len(state))
        assert bool(state.origin.get("told_apart_by_order")) == ("slow" in words)


def number(step: Any) -> float:
    return float(step.item() if hasattr(step, "item") else step)


def whole_name(local: str, where: dict[str, Any]) -> str:
    """A rank's name of a parameter as the whole model has it."""
    name = re.sub(r"(?<=layers\.)\d+", lambda m: str(int(m[0]) + where["first_layer"]), local)
    name = re.sub(r"(?<=local_experts\.)\d+", lambda m: str(int(m[0]) + 4 // where["sizes"]["ep"] * where["ep"]), name)
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    name = name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    return "embedding.word_embeddings.weight" if where["tied"] and name == "output_layer.weight" else name


def shard(value: torch.Tensor, axis: int | None, where: dict[str, Any], *, gated: bool) -> torch.Tensor:
    """A tensor-parallel rank's part of a parameter; of a gated unit's first matrix, that part of both halves."""
    size = where["sizes"]["tp"]
    if axis is None or size == 1:
        return value
    halves = value.chunk(2) if gated else (value,)
    return torch.cat([half.chunk(size, axis)[where["tp"]] for half in halves])


@pytest.mark.parametrize("folder", ["space-tp2-dp2"], indirect=True)
def test_nemos_folders_are_no_base(folder: Path, tmp_path: Path) -> None:
    with read(folder, options={"masters": True}) as state, pytest.raises(UnrepresentableError) as error:
        megatron.write(state, tmp_path / "written", base=folder, force=False, options={})
    assert str(error.value) == (
        f"{folder / 'weights' / 'common.pt'} is NeMo's, which has a list of optimizers and cannot load what is written "
        "here: pass a folder that Megatron-Core saved as base"
    )


def test_flat_parts_of_a_parameter_are_put_in_their_places() -> None:
    """Only where the parts are those of the parameter: two by two, of two rows and three columns."""
    whole = torch.arange(24.0).reshape(4, 6)
    parts = torch.stack([torch.stack([part.flatten() for part in row.chunk(2, 1)]) for row in whole.chunk(2)])
    tensor = contiguous("F32", tuple(parts.shape), Memory(parts.numpy().tobytes()))
    assert torch.equal(in_shape(tensor, (4, 6)).torch(), whole)
    for shape in ((4, 6, 1), (6, 4), (5, 6), (8, 6)):
        found = in_shape(tensor, shape)
        assert found.shape == (shape if shape == (6, 4) else tensor.shape)


@pytest.mark.parametrize("folder", ["bucket-dp2"], indirect=True)
def test_what_megatron_would_not_read_back_is_not_written(folder: Path, tmp_path: Path) -> None:
    """Each message whole; what it says to do is done in the tests above."""
    target = tmp_path / "written"

    def refused(state: OptimizerState, base: Path | None = folder) -> str:
        with pytest.raises((UnrepresentableError, OptionError)) as error:
            megatron.write(state, target, base=base, force=False, options={})
        assert not target.exists()
        return str(error.value)

    def changed(number: int, **members: Any) -> OptimizerState:
        parameters = list(state.parameters)
        parameters[number] = replace(parameters[number], **members)
        return replace(state, parameters=tuple(parameters))

    with read(folder) as bare:
        first = "embedding.word_embeddings.weight"
        assert refused(bare) == (
            f"'{first}' has no fp32 master weight: read the checkpoint with the option masters, which keeps it as a "
            "slot 'master_param'"
        )
    with read(folder, options={"masters": True}) as state:
        needs = "megatron takes the weights from a torch_dist folder of the same model"
        assert refused(state, None) == f"{needs}; pass it as base="
        assert refused(state, tmp_path) == f"{needs}, which {tmp_path} is not; pass it as base="
        names = list(state)
        fc1 = "decoder.layers.1.mlp.linear_fc1.weight"
        layer, slots = names.index(fc1), state[fc1].state or {}
        assert refused(changed(layer, name="decoder.layers.2.mlp.linear_fc1.weight")) == (
            "1 of the 2 parameters that Megatron stacks as 'decoder.layers.mlp.linear_fc1.weight' have state, in "
            "optimizers [0]: it keeps all of them or none, in one"
        )
        assert refused(changed(names.index(first), name="other.weight")) == (
            f"'other.weight' is no parameter of the model in {folder}"
        )
        assert refused(changed(layer, state={**slots, "step": 4.0})) == (
            "the parameters of group 0 are at steps [3.0, 4.0], and Megatron counts the steps of a group once"
        )
        assert refused(changed(layer, state={**slots, "max_exp_avg_sq": slots["exp_avg"]})) == (
            "'decoder.layers.0.mlp.linear_fc1.weight' and the others that Megatron stacks with it have different slots"
        )
        other = state["decoder.layers.1.mlp.linear_fc2.weight"].state or {}
        assert refused(changed(layer, state={**slots, "exp_avg": other["exp_avg"]})) == (
            "slot 'exp_avg' of 'decoder.layers.1.mlp.linear_fc1.weight' is no tensor of shape [32, 16], and Megatron "
            "keeps no other"
        )
        groups = [replace(g, options=tuple(o for o in g.options if o[0] != "wd_mult")) for g in state.groups]
        assert refused(replace(state, groups=tuple(groups))) == (
            "group 0 has no wd_mult, by which Megatron finds a group again: only groups that Megatron saved can be "
            "written"
        )
        alike = [replace(group, options=state.groups[0].options) for group in state.groups]
        assert refused(replace(state, groups=tuple(alike))) == (
            "the groups would not be read back: groups 0 and 1 differ in more than decay and experts, and the file "
            "does not say which parameters they had"
        )
        swapped = [replace(group, options=o.options) for group, o in zip(state.groups, state.groups[::-1], strict=True)]
        assert refused(replace(state, groups=tuple(swapped))) == (
            "'decoder.final_layernorm.bias' is not in group 0, and by Megatron's rule, by which groups are read back, "
            "it is the other way round"
        )
        assert refused(replace(state, globals={"beside": 1})) == (
            "'beside' belongs to no parameter, and Megatron has no place for it"
        )


def test_weights_in_fp16_have_a_loss_scale(tmp_path: Path) -> None:
    group = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, "step": 3}
    folder, entries = older(tmp_path, group)
    half = contiguous("F16", (5, 2), Memory(torch.zeros(5, 2).half().numpy().tobytes()))
    base = tmp_path / "half"
    write_folder({**entries, (SINGLE,): half}, base)
    for file in ("metadata.json", "common.pt"):
        (base / file).write_bytes((folder / file).read_bytes())
    with read(folder, options={"masters": True}) as state, pytest.raises(UnrepresentableError) as error:
        megatron.write(state, tmp_path / "written", base=base, force=False, options={})
    assert str(error.value) == (
        f"'{SINGLE}' is F16, and the loss scale that Megatron keeps with the optimizer then is not in the state"
    )


# --- layouts of other versions, and refusals --------------------------------------------------------------------

STACKED, SINGLE = "decoder.layers.self_attention.linear_qkv.weight", "embedding.word_embeddings.weight"


def f32(*shape: int) -> Any:
    return contiguous("F32", shape, Memory(torch.randn(shape).numpy().tobytes()))


def stored(tensor: torch.Tensor) -> Any:
    return contiguous("F32", tuple(tensor.shape), Memory(tensor.detach().contiguous().numpy().tobytes()))


def older(path: Path, *groups: dict[str, Any], master: str = "fp32_param") -> tuple[Path, dict[tuple[str, ...], Any]]:
    """A folder as Megatron-Core 0.6 laid it out: weights of three stacked layers and an embedding, and their state."""
    torch.manual_seed(0)
    entries: dict[tuple[str, ...], Any] = {(STACKED,): f32(3, 4, 2), (SINGLE,): f32(5, 2)}
    for slot in ("exp_avg", "exp_avg_sq", master):
        entries[f"optimizer.state.{slot}.{STACKED}",] = entries[STACKED,] if slot == master else f32(3, 4, 2)
        entries[f"optimizer.state.{slot}.{SINGLE}",] = entries[SINGLE,] if slot == master else f32(5, 2)
    folder = path / "iter_0000003"
    write_folder(entries, folder)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    torch.save({"optimizer": {"optimizer": {"param_groups": list(groups)}}}, folder / "common.pt")
    return folder, entries


def test_groups_that_the_rule_does_not_tell_apart_become_one_on_request(tmp_path: Path) -> None:
    groups = [{"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": decay, "step": 3} for decay in (0.1, 0.0)]
    folder, entries = older(tmp_path, *groups)
    with pytest.raises(RefusedError) as refused:
        read(folder)
    assert str(refused.value) == (
        f"{folder}: groups 0 and 1 differ in more than decay and experts, and the file does not say which parameters "
        "they had; pass options={'groups': 'merge'} to read them as one group with the options that all share"
    )
    with read(folder, options={"masters": True, "groups": "merge"}) as state:
        names = [f"decoder.layers.{layer}.self_attention.linear_qkv.weight" for layer in range(3)]
        assert list(state) == [*names, SINGLE]
        for layer, name in enumerate(names):
            assert state[name].shape == (4, 2)
            for slot, key in (("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq"), ("master_param", "fp32_param")):
                whole = entries[f"optimizer.state.{key}.{STACKED}",].torch()
                assert torch.equal(state[name][slot].torch(), whole[layer])
            assert state[name]["step"] == 3
        assert dict(state.groups[0].options) == {"lr": 1e-3, "betas": (0.9, 0.95)}
        assert state.origin == {"format": "megatron", "masters_compared": 4}
    report = convert(folder, tmp_path / "optimizer.safetensors", options={"groups": "merge"})
    assert (report.parameters, report.paired) == (4, 4)


def test_a_parameter_without_a_group_is_refused(tmp_path: Path) -> None:
    folder, _ = older(tmp_path, {"lr": 1e-3, "wd_mult": 0.0, "step": 3})
    with pytest.raises(RefusedError) as refused:
        read(folder)
    assert str(refused.value) == (
        f"{folder}: 'decoder.layers.0.self_attention.linear_qkv.weight' belongs to no group by Megatron's rule, which "
        "decays it; 1 groups are stated; pass options={'groups': 'merge'} to read them as one group with the "
        "options that all share"
    )
    with read(folder, options={"groups": "merge"}) as state:
        assert len(state) == 4


def test_hugging_faces_names_and_parts(tmp_path: Path) -> None:
    """A Llama's parameters, fused as Megatron's converter does (``tools/checkpoint/loader_llama_mistral.py``)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads, groups, width = 4, 2, 4
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=heads,
            num_key_value_heads=groups, max_position_embeddings=16,
        )
    )  # fmt: skip
    live = {name: torch.randn_like(p) for name, p in model.named_parameters()}

    def grouped(name: str) -> torch.Tensor:
        return live[name].reshape(groups, -1, width, 16)

    fused: dict[str, list[torch.Tensor]] = {}
    for layer in range(2):
        own = f"model.layers.{layer}."
        qkv = torch.cat([grouped(f"{own}self_attn.{kind}_proj.weight") for kind in "qkv"], dim=1).reshape(-1, 16)
        gate = torch.cat([live[f"{own}mlp.{kind}_proj.weight"] for kind in ("gate", "up")])
        for key, value in {
            "self_attention.linear_qkv.weight": qkv, "mlp.linear_fc1.weight": gate,
            "self_attention.linear_proj.weight": live[f"{own}self_attn.o_proj.weight"],
            "mlp.linear_fc2.weight": live[f"{own}mlp.down_proj.weight"],
            "self_attention.linear_qkv.layer_norm_weight": live[f"{own}input_layernorm.weight"],
            "mlp.linear_fc1.layer_norm_weight": live[f"{own}post_attention_layernorm.weight"],
        }.items():  # fmt: skip
            fused.setdefault(f"decoder.layers.{key}", []).append(value)
    whole = {key: torch.stack(values) for key, values in fused.items()}
    whole["embedding.word_embeddings.weight"] = live["model.embed_tokens.weight"]
    whole["decoder.final_layernorm.weight"] = live["model.norm.weight"]
    whole["output_layer.weight"] = live["lm_head.weight"]
    folder = tmp_path / "iter_0000003"
    write_folder({(f"optimizer.state.exp_avg.{key}",): stored(value) for key, value in whole.items()}, folder)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    groups_of = [{"wd_mult": 1.0, "step": 3}, {"wd_mult": 0.0, "step": 3}]
    torch.save({"optimizer": {"param_groups": groups_of}}, folder / "common.pt")
    with read(folder, options={"map": "megatron", "heads": "4/2"}) as state:
        assert set(state) == set(live)
        for name, expected in live.items():
            assert torch.equal(state[name]["exp_avg"].torch(), expected), name
        assert [group.count for group in state.groups] == [16, 5]
    for wrong, message in {
        "5/2": "heads='5/2': attention heads and query groups are expected, as 32/8 or 32",
        "6/3": "'decoder.layers.0.self_attention.linear_qkv.weight' has 32 rows, which 6 heads of 3 query groups do "
        "not divide; correct options={'heads': ...}",
    }.items():
        with pytest.raises((OptionError, ConversionError)) as error:
            read(folder, options={"map": "megatron", "heads": wrong})
        assert str(error.value) == message


@pytest.mark.parametrize("folder", ["full-tp2-pp2"], indirect=True)
def test_a_parameter_that_hugging_faces_models_lack(folder: Path) -> None:
    with pytest.raises(ConversionError) as error:
        read(folder, options={"map": "megatron", "heads": "4"})
    assert str(error.value) == ("'decoder.layers.0.mlp.linear_fc2.bias' has no rule in map 'megatron'")


def test_masters_that_are_not_the_weights_are_refused(tmp_path: Path) -> None:
    folder, entries = older(tmp_path, {"wd_mult": 1.0, "step": 3})
    entries[f"optimizer.state.fp32_param.{SINGLE}",] = f32(5, 2)
    write_folder(entries, tmp_path / "other")
    for file in ("metadata.json", "common.pt"):
        (tmp_path / "other" / file).write_bytes((folder / file).read_bytes())
    with pytest.raises(FileError) as error:
        read(tmp_path / "other")
    assert str(error.value) == (
        f"{tmp_path / 'other'}: the fp32 master of '{SINGLE}', rounded to F32, is not the model's weight at element 0: "
        "the optimizer's files and the model's are not of one save, or files of two ranks were exchanged; copy the "
        "folder again from where it was written"
    )


def test_another_backend_is_refused(tmp_path: Path) -> None:
    folder, _ = older(tmp_path, {"wd_mult": 1.0})
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(RefusedError) as refused:
        registry.read(folder)
    assert str(refused.value) == (
        f"{folder / 'metadata.json'}: sharded_backend 'zarr', where torch_dist is read: load the checkpoint in "
        "Megatron and save it with --ckpt-format torch_dist"
    )
