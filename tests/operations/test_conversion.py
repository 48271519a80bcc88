from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import lora_state_format as lsf
from lora_state_format.cli import run
from lora_state_format.errors import (
    ConversionError,
    DigestError,
    MissingNamesError,
    OptionError,
    TargetExistsError,
    UnrepresentableError,
)
from lora_state_format.format import writing
from lora_state_format.model.states import Group, Naming, Optimizer, OptimizerState, Parameter
from lora_state_format.operations.conversion import ConversionReport, belongs, convert, read
from lora_state_format.operations.report import describe_evidence

if TYPE_CHECKING:
    from tests.conftest import Founding


def exactly(state: OptimizerState, founding: Founding) -> bool:
    """Whether a state holds the live optimizer's slots bit for bit, by the live model's names, in its order."""
    assert list(state) == list(founding.slots)
    for name, slots in founding.slots.items():
        for slot in ("exp_avg", "exp_avg_sq"):
            assert state[name][slot].torch().equal(slots[slot]), (name, slot)
        assert state[name]["step"].item() == slots["step"].item()
    return True


@pytest.fixture
def alone(founding: Founding, tmp_path: Path) -> Path:
    """The optimizer file with nothing beside it."""
    folder = tmp_path / "alone"
    folder.mkdir()
    return Path(shutil.copy(founding.path / "optimizer.pt", folder))


@pytest.fixture
def names(founding: Founding, tmp_path: Path) -> Path:
    """A file with the names in optimizer order."""
    path = tmp_path / "names.txt"
    path.write_text("\n".join(founding.slots) + "\n")
    return path


# --- the main job -------------------------------------------------------------------------------------------------


def test_a_trainer_folder_becomes_a_file_by_name(founding: Founding, tmp_path: Path) -> None:
    target = tmp_path / "optimizer.safetensors"
    report = convert(founding.path, target)
    assert isinstance(report, ConversionReport)
    assert (report.parameters, report.groups, report.tensors) == (392, (392, 0), 784)
    assert report.slots == {"step": 392, "exp_avg": 392, "exp_avg_sq": 392}
    assert (report.source_format, report.target_format, report.written) == ("torch_optimizer", "named", True)
    assert (report.global_step, report.paired, report.notes, report.warnings) == (3, 392, (), ())
    with lsf.open_state(target) as state:
        assert exactly(state, founding)
        assert [group.count for group in state.groups] == [392, 0]
        assert dict(state.groups[0].options)["lr"] == 1e-3
        assert state.naming.source == "adapter"
        first = next(iter(state))
        assert state[first].foreign_names == {"peft": first.replace(".default", "")}
        assert state[first].adapter == "default"
    assert lsf.verify(target).ok


def test_the_weights_digests_are_those_of_the_adapter(founding: Founding, tmp_path: Path) -> None:
    import torch
    import xxhash
    from safetensors.torch import load_file

    weights = load_file(founding.path / "adapter_model.safetensors")
    convert(founding.path, tmp_path / "optimizer.safetensors")
    with lsf.open_state(tmp_path / "optimizer.safetensors") as state:
        for parameter in state.values():
            tensor = weights[parameter.foreign_names["peft"]]
            assert tensor.dtype == torch.float32
            assert parameter.weights is not None
            assert parameter.weights.dtype == "F32"
            assert parameter.weights.hex == xxhash.xxh3_128(tensor.numpy().tobytes()).hexdigest()


def test_equal_input_gives_equal_bytes(founding: Founding, tmp_path: Path) -> None:
    reports = [convert(founding.path, tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    assert reports[0].digest == reports[1].digest
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_named_file_converts_to_itself(founding: Founding, tmp_path: Path) -> None:
    first = convert(founding.path, tmp_path / "a.safetensors")
    again = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (again.source_format, again.digest) == ("named", first.digest)


def test_the_report_in_words(founding: Founding, tmp_path: Path) -> None:
    target = tmp_path / "optimizer.safetensors"
    report = convert(founding.path, target)
    assert str(report) == (
        f"converted {founding.path} (torch_optimizer) to {target} (named)\n"
        "392 parameters in groups of [392, 0], step 3\n"
        f"slots: step x 392, exp_avg x 392, exp_avg_sq x 392; 784 tensors, {report.bytes:,} bytes\n"
        f"names: from the adapter file, in the order of rule '{report.naming.rule}'\n"
        f"how sure: {describe_evidence(report.to_json()['evidence'])}\n"
        "weights: digests of 392 of 392 parameters kept with their state\n"
        f"digest: {report.digest}"
    )


def test_the_report_as_json(founding: Founding, tmp_path: Path) -> None:
    report = convert(founding.path, tmp_path / "optimizer.safetensors")
    members = json.loads(json.dumps(report.to_json()))
    assert members["schema_version"] == 1
    assert members["groups"] == [392, 0]
    assert members["naming"]["source"] == "adapter"
    assert members["evidence"]["verdict"] in {"confirmed", "partly"}
    assert set(members["evidence"]["pairs"]) == {"excluded", "undecided"}
    assert members["digest"] == report.digest


def test_a_dry_run_writes_nothing(founding: Founding, tmp_path: Path) -> None:
    report = convert(founding.path, tmp_path / "optimizer.safetensors", dry_run=True)
    assert (report.written, report.digest, report.parameters) == (False, None, 392)
    assert str(report).startswith("would convert ")
    assert list(tmp_path.iterdir()) == []


def test_progress_ends_at_the_total(founding: Founding, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = convert(founding.path, tmp_path / "a.safetensors", progress=lambda *at: seen.append(at))
    assert seen[-1] == (report.bytes, report.bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_read_names_a_checkpoint_lazily(founding: Founding) -> None:
    with read(founding.path) as state:
        assert exactly(state, founding)
        assert all(parameter.weights is None for parameter in state.values())


# --- names --------------------------------------------------------------------------------------------------------


def test_the_adapter_beside_a_bare_file_names_it(founding: Founding) -> None:
    with read(founding.path / "optimizer.pt") as state:
        assert exactly(state, founding)


def test_nothing_to_take_names_from(alone: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingNamesError) as caught:
        convert(alone, tmp_path / "optimizer.safetensors")
    assert str(caught.value) == (
        f"{alone}: stores 392 parameters by position and contains no names, and no neighbouring file names them; pass "
        "names= with a file of names in optimizer order, the adapter file, or a folder with config.json and "
        "adapter_config.json"
    )
    assert caught.value.exit_code == 4
    assert not (tmp_path / "optimizer.safetensors").exists()


def test_a_file_of_names(alone: Path, names: Path, founding: Founding) -> None:
    with read(alone, names=names) as state:
        assert exactly(state, founding)
        assert (state.naming.source, state.naming.rule) == ("names", "listed")


def test_names_as_a_list(alone: Path, founding: Founding) -> None:
    with read(alone, names=list(founding.slots)) as state:
        assert exactly(state, founding)


def test_a_file_of_adapter_keys_beside_the_adapter(founding: Founding) -> None:
    with read(founding.path, names=[name.replace(".default", "") for name in founding.slots]) as state:
        assert exactly(state, founding)
        assert all(parameter.foreign_names["peft"] == name.replace(".default", "") for name, parameter in state.items())


@pytest.mark.parametrize("given", ["adapter_model.safetensors", ""])
def test_an_adapter_from_elsewhere(alone: Path, founding: Founding, tmp_path: Path, given: str) -> None:
    report = convert(alone, tmp_path / "optimizer.safetensors", names=founding.path / given)
    assert (report.naming.source, report.paired) == ("adapter", 392)
    with lsf.open_state(tmp_path / "optimizer.safetensors") as state:
        assert exactly(state, founding)


def test_an_adapter_without_its_config(alone: Path, founding: Founding) -> None:
    adapter = shutil.copy(founding.path / "adapter_model.safetensors", alone.parent / "elsewhere.safetensors")
    with read(alone, names=adapter) as state:
        assert exactly(state, founding)


def test_a_folder_of_configs(alone: Path, founding: Founding, tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    founding.model.get_base_model().config.save_pretrained(folder)
    shutil.copy(founding.path / "adapter_config.json", folder)
    with read(alone, names=folder) as state:
        assert exactly(state, founding)
        assert state.naming.source == "configs"


def test_the_configs_of_the_base_alone(founding: Founding, tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    founding.model.get_base_model().config.save_pretrained(folder)
    with read(founding.path, names=folder) as state:
        assert exactly(state, founding)
        assert (state.naming.source, "evidence" in state.naming.details) == ("configs", True)


def test_too_few_names(alone: Path, founding: Founding) -> None:
    with pytest.raises(ConversionError) as caught:
        read(alone, names=list(founding.slots)[1:])
    assert str(caught.value) == "391 names for the state of 392 parameters"


def test_two_names_in_the_wrong_places(alone: Path, founding: Founding) -> None:
    import torch

    names = list(founding.slots)
    names[0], names[1] = names[1], names[0]
    with read(alone, names=names) as state:
        pass  # without weights there is nothing to compare a listed name with
    assert state[names[0]].shape == founding.slots[names[1]]["exp_avg"].shape != torch.Size([0])
    with pytest.raises(ConversionError, match=r"^no order of the .*parameters fits") as caught:
        read(founding.path, names=names)
    assert f"'{names[0]}' has shape [32, 4], but id 0 has exp_avg of shape [4, 32]" in str(caught.value)


def test_a_name_without_a_shape(tmp_path: Path) -> None:
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(MissingNamesError) as caught:
        read(tmp_path / "optimizer.pt", names=["bias"])
    assert str(caught.value) == (
        "'bias' (id 0) has no slot that shows its shape; pass names= a second time, with the model's or the adapter's "
        "weights"
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_names_and_the_weights_that_show_their_shapes(tmp_path: Path, suffix: str) -> None:
    """SGD without momentum has no slots, 8-bit moments are flat: one file has the order, and another the shapes."""
    import torch
    from safetensors.torch import save_file

    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD([model.bias, model.weight], lr=0.1)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "names.txt").write_text("bias\nweight\n")
    elsewhere = tmp_path / "elsewhere" / f"weights{suffix}"
    elsewhere.parent.mkdir()
    if suffix == ".bin":
        torch.save(model.state_dict(), elsewhere)
    else:
        save_file(model.state_dict(), elsewhere)
    for given in ([tmp_path / "names.txt", elsewhere], [elsewhere, tmp_path / "names.txt"]):
        with read(tmp_path / "optimizer.pt", names=given) as state:
            assert {name: p.shape for name, p in state.items()} == {"bias": (2,), "weight": (2, 3)}
    arguments = ["--names", str(tmp_path / "names.txt"), "--names", str(elsewhere)]
    assert run(["convert", str(tmp_path / "optimizer.pt"), str(tmp_path / "x.safetensors"), *arguments]) == 0


def test_two_files_that_both_say_names(tmp_path: Path, alone: Path, names: Path) -> None:
    other = Path(shutil.copy(names, tmp_path / "other.txt"))
    with pytest.raises(OptionError) as caught:
        read(alone, names=[names, other])
    assert str(caught.value) == f"{names} and {other} both say the names: pass one of them, and weights next to it"


def test_names_that_are_not_there(alone: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        read(alone, names=tmp_path / "nosuch.txt")
    assert str(caught.value) == f"{tmp_path / 'nosuch.txt'}: no such file or folder to take names from"


def test_names_for_what_has_names(founding: Founding, tmp_path: Path) -> None:
    target = tmp_path / "optimizer.safetensors"
    convert(founding.path, target)
    with pytest.raises(OptionError) as caught:
        read(target, names=["a"])
    assert str(caught.value) == (f"{target}: its parameters have names; leave names= and rule= out")


def test_an_adapter_config_that_is_not_json(
    founding: Founding, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The adapter says the names by itself; a config that cannot be read is reported and skipped."""
    for name in ("optimizer.pt", "adapter_model.safetensors"):
        shutil.copy(founding.path / name, tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text("{")
    with read(tmp_path / "optimizer.pt") as state:
        assert list(state) == list(founding.slots)
    config.write_text("[]")
    with read(tmp_path / "optimizer.pt") as state:
        assert list(state) == list(founding.slots)
    reasons = (
        "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        "not a JSON object",
    )
    assert caplog.messages == [f"{config}: {reason}; it was skipped" for reason in reasons]


# --- weights ------------------------------------------------------------------------------------------------------


def test_a_file_belongs_to_the_weights_of_its_moment(founding: Founding, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    target = tmp_path / "optimizer.safetensors"
    convert(founding.path, target)
    pairing, evidence = belongs(target, founding.path)
    assert pairing is not None
    assert (pairing.matching, pairing.differing, pairing.uncompared) == (392, (), ())
    assert evidence is not None, "the digests are of a file beside a positional one: they prove no order"
    assert evidence.verdict in {"confirmed", "partly"}

    weights = load_file(founding.path / "adapter_model.safetensors")
    first = next(iter(weights))
    weights[first] += 1
    (tmp_path / "later").mkdir()
    save_file(weights, tmp_path / "later" / "adapter_model.safetensors")
    pairing, _ = belongs(target, tmp_path / "later")
    assert pairing is not None
    assert (pairing.matching, len(pairing.differing)) == (391, 1)


def test_a_legacy_file_is_named_by_the_weights(alone: Path, founding: Founding) -> None:
    pairing, evidence = belongs(alone, founding.path)
    assert pairing is None
    assert evidence is not None
    assert evidence.verdict in {"confirmed", "partly"}


# --- options and targets ------------------------------------------------------------------------------------------


def test_the_optimizer_class(founding: Founding, tmp_path: Path) -> None:
    target = tmp_path / "optimizer.safetensors"
    convert(founding.path, target, optimizer="torch.optim.adamw.AdamW")
    with lsf.open_state(target) as state:
        assert [optimizer.class_path for optimizer in state.optimizers] == ["torch.optim.adamw.AdamW"]
    with pytest.raises(OptionError) as caught:
        read(target, optimizer="torch.optim.sgd.SGD")
    assert str(caught.value) == f"{target}: the optimizer is torch.optim.adamw.AdamW, not torch.optim.sgd.SGD"


def test_an_existing_target(founding: Founding, tmp_path: Path) -> None:
    target = tmp_path / "optimizer.safetensors"
    target.write_text("precious")
    with pytest.raises(TargetExistsError) as caught:
        convert(founding.path, target)
    assert str(caught.value) == f"{target} exists; pass force=True to replace it"
    assert target.read_text() == "precious"
    assert convert(founding.path, target, force=True).written
    assert lsf.verify(target).ok


def test_a_folder_as_target(founding: Founding, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        convert(founding.path, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} is a folder; name the file to write, as in {tmp_path / 'optimizer.safetensors'}"
    )


@pytest.mark.parametrize(("to", "name"), [("named", "optimizer.safetensors"), ("torch_optimizer", "optimizer.pt")])
def test_a_slash_means_a_folder(founding: Founding, tmp_path: Path, to: str, name: str) -> None:
    """Folders that are missing are made."""
    target = f"{tmp_path}/run/training_state/"
    report = convert(founding.path, target, target_format=to)
    assert report.target == f"{target}{name}"
    assert [path.name for path in (tmp_path / "run" / "training_state").iterdir()] == [name]
    assert run(["convert", str(founding.path), f"{tmp_path}/two/", "--to", to]) == 0
    assert (tmp_path / "two" / name).is_file()
    with pytest.raises(OptionError) as caught:
        convert(founding.path, tmp_path / "two", target_format=to, force=True)
    assert (
        str(caught.value) == f"{tmp_path / 'two'} is a folder; name the file to write, as in {tmp_path / 'two' / name}"
    )


def test_folders_that_were_made_for_nothing(tmp_path: Path) -> None:
    parameters = (Parameter("a", (2,), {"step": 3}),)
    state = OptimizerState((Optimizer(),) * 2, (Group(0, (), 1), Group(1, (), 0)), parameters, Naming("model"))
    writing.write(state, tmp_path / "a.safetensors")
    with pytest.raises(UnrepresentableError):
        convert(tmp_path / "a.safetensors", tmp_path / "x" / "y" / "optimizer.pt", target_format="torch_optimizer")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_extra_has_no_place_in_other_formats(tmp_path: Path) -> None:
    parameters = (Parameter("a", (2,), {"step": 3}),)
    state = OptimizerState(
        (Optimizer(),), (Group(0, (), 1),), parameters, Naming("model"), extra={"scheduler": {"last_epoch": 3}}
    )
    writing.write(state, tmp_path / "a.safetensors")
    report = convert(tmp_path / "a.safetensors", tmp_path / "optimizer.pt", target_format="torch_optimizer")
    assert report.notes == ("extra (scheduler) is not written: only the named format has a place for it",)
    assert convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors").notes == ()


def test_a_target_beside_model_weights(founding: Founding, tmp_path: Path) -> None:
    shutil.copy(founding.path / "adapter_model.safetensors", tmp_path)
    target = tmp_path / "optimizer.safetensors"
    safe = tmp_path / "training_state" / "optimizer.safetensors"
    warning = (
        f"{target} lies beside adapter_model.safetensors, and programs that serve a model load every .safetensors file "
        f"in its folder as weights: {safe} is a safe place"
    )
    assert convert(founding.path, target).warnings == (warning,)
    safe.parent.mkdir()
    assert convert(founding.path, safe).warnings == ()
    assert convert(founding.path, safe.with_name("second.safetensors")).warnings == ()
    # what no server would load
    assert convert(founding.path, tmp_path / "optimizer.pt", target_format="torch_optimizer").warnings == ()
    assert convert(founding.path, tmp_path / "dcp", target_format="dcp").warnings == ()


def test_notes_on_parameters_that_are_special(tmp_path: Path) -> None:
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    state = OptimizerState(
        optimizers=(Optimizer(),),
        groups=(Group(0, (("lr", 0.1),), 1),),
        parameters=(Parameter("idle", (2,), None), Parameter("carried", (2,), {"step": 3})),
        naming=Naming("model"),
    )
    lsf.write(state, source)
    assert convert(source, target).notes == (
        "1 parameters never took a step; they are kept as such",
        "1 parameters with state are in no group; they stand behind the groups",
    )


def test_options_that_no_converter_has(founding: Founding, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        read(founding.path, options={"colour": 1})
    assert str(caught.value) == "no option 'colour' for torch_optimizer; there are: none"
    with pytest.raises(OptionError, match=r"^no option 'colour' for torch_optimizer and dcp; there are: key \("):
        convert(founding.path, tmp_path / "dcp", target_format="dcp", options={"colour": 1})


def test_options_reach_the_converter_that_knows_them(founding: Founding, tmp_path: Path) -> None:
    target = tmp_path / "dcp"
    report = convert(founding.path, target, target_format="dcp", options={"key": "optim"})
    assert (report.target_format, report.digest, report.written) == ("dcp", None, True)
    with read(target) as state:
        assert exactly(state, founding)


def test_a_format_that_is_read_only(founding: Founding, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        convert(founding.path, tmp_path / "a", target_format="deepspeed_zero")
    assert str(caught.value) == "format 'deepspeed_zero' can be read but not written"


def test_back_to_what_it_was(founding: Founding, tmp_path: Path) -> None:
    import torch

    convert(founding.path, tmp_path / "named.safetensors")
    report = convert(tmp_path / "named.safetensors", tmp_path / "optimizer.pt", target_format="torch_optimizer")
    assert str(report).splitlines()[0].endswith("/optimizer.pt (torch_optimizer)")
    before, after = (torch.load(path / "optimizer.pt", weights_only=True) for path in (founding.path, tmp_path))
    assert before["param_groups"] == after["param_groups"]
    assert before["state"].keys() == after["state"].keys()
    for identity, slots in before["state"].items():
        assert all(torch.equal(value, after["state"][identity][slot]) for slot, value in slots.items())


def test_a_format_that_is_not_there(founding: Founding, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^no converter 'nosuch'; there are: "):
        convert(founding.path, tmp_path / "a", target_format="nosuch")
    with pytest.raises(OptionError, match=r"^no converter 'nosuch'; there are: "):
        read(founding.path, source_format="nosuch")


@pytest.mark.parametrize("target", ["named", "torch_optimizer", "dcp", "mlx", "flax_msgpack", "deepspeed_universal"])
def test_damage_is_not_carried_on(target: str, tmp_path: Path) -> None:
    """Most formats have no digests: what is wrong in a named file must not become what is right there."""
    source = tmp_path / "a.safetensors"
    raw = bytearray(Path(__file__).parents[2].joinpath("spec/vectors/valid/example.safetensors").read_bytes())
    raw[-1] ^= 1
    source.write_bytes(raw)
    with pytest.raises(DigestError) as caught:
        convert(source, tmp_path / "b", target_format=target)
    assert str(caught.value) == (
        "tensor 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight/exp_avg_sq' does not match the "
        "digest in the file that it comes from [R21]"
    )
    assert [found.name for found in tmp_path.iterdir()] == ["a.safetensors"]


def test_moments_that_are_alike_are_pointed_out(tmp_path: Path) -> None:
    """As torch's FSDP1 writes its full state dict when it gathers it on a CPU."""
    import torch

    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tree = optimizer.state_dict()
    torch.save({"optimizer": tree, "model": model.state_dict()}, tmp_path / "right.pt")
    assert convert(tmp_path / "right.pt", tmp_path / "right.safetensors").notes == ()
    for slots in tree["state"].values():
        slots["exp_avg_sq"] = slots["exp_avg"].clone()
    torch.save({"optimizer": tree, "model": model.state_dict()}, tmp_path / "wrong.pt")
    (note,) = convert(tmp_path / "wrong.pt", tmp_path / "wrong.safetensors").notes
    assert note == (
        "exp_avg and exp_avg_sq are the same bytes in every parameter that was looked at, which Adam does not do: "
        "torch's FSDP1 writes such a full state dict when it gathers on a CPU (one buffer for both); this state is not "
        "worth resuming from"
    )
