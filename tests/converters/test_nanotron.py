"""nanotron's folders, made by its own writers on CPU ranks (``tests/golden/nanotron``), against what the ranks held."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lora_state_format import registry
from lora_state_format.cli import run
from lora_state_format.errors import FileError, RefusedError
from lora_state_format.operations.conversion import convert, read
from lora_state_format.operations.look import look
from lora_state_format.operations.report import to_json

pytestmark = pytest.mark.filterwarnings("ignore")

GOLDEN = Path(__file__).parents[1] / "golden" / "nanotron" / "files"
CASES = sorted(path.name.removesuffix(".tar.xz") for path in GOLDEN.iterdir())


@pytest.fixture
def golden(tmp_path: Path) -> Callable[[str], Path]:
    """The checkpoint of a run in ``tests/golden``, by case; what the ranks held together lies next to it."""

    def unpacked(case: str) -> Path:
        with tarfile.open(GOLDEN / f"{case}.tar.xz") as archive:
            archive.extractall(tmp_path, filter="data")
        return tmp_path / case

    return unpacked


def live(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    held = torch.load(folder.with_name(f"{folder.name}.live.pt"))
    return {name: {"master_param" if s == "fp32" else s: v for s, v in slots.items()} for name, slots in held.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_state_is_what_the_ranks_held(
    golden: Callable[[str], Path], case: str, assert_holds: Any, tmp_path: Path
) -> None:
    folder = golden(case)
    converter, match = registry.detect(folder)
    assert (converter.NAME, match.reason) == ("nanotron", "optimizer_config.json of nanotron")
    report = convert(folder, tmp_path / "optimizer.safetensors", options={"masters": True})
    held, masters = live(folder), "masters" in case
    with read(tmp_path / "optimizer.safetensors") as state:
        assert_holds(state, held)
        assert {len(parameter) for parameter in state.values()} == {4 if masters else 3}
        matrices = [name for name, slots in held.items() if slots["exp_avg"].dim() == 2]
        assert [group.count for group in state.groups] == [len(matrices), len(held) - len(matrices)]
        assert [dict(group.options)["weight_decay"] for group in state.groups] == [0.1, 0.0]
        assert set(list(state)[: len(matrices)]) == {*matrices}
        assert state.origin["masters_compared"] == (len(held) if masters else 0)
    assert (report.paired, report.naming.source) == (len(held), "checkpoint")


def test_masters_are_left_out_unless_they_are_asked_for(golden: Callable[[str], Path], assert_holds: Any) -> None:
    folder = golden("tp2-dp2-zero-masters")
    with read(folder) as state:
        held = live(folder)
        assert_holds(state, {n: {s: v for s, v in slots.items() if s != "master_param"} for n, slots in held.items()})
        assert {len(parameter) for parameter in state.values()} == {3}


def test_slices_without_the_weights_are_refused(golden: Callable[[str], Path]) -> None:
    folder = golden("tp2")
    shutil.move(folder / "model", folder / "kept")
    with pytest.raises(RefusedError) as refused:
        read(folder)
    assert str(refused.value) == (
        f"{folder / 'model'}: has no file of 'blocks.0.qkv.weight', of which the optimizer's ranks hold parts, and "
        "only the weights' files say how these fit together: give the checkpoint's whole folder, with 'model' next to "
        "'optimizer'"
    )
    shutil.move(folder / "kept", folder / "model")
    with read(folder):
        pass


def test_a_rank_is_missing(golden: Callable[[str], Path]) -> None:
    folder = golden("tp2-dp2-zero-masters")
    lost = folder / "optimizer" / "optimizer_pp-0-of-1_dp-1-of-2_tp-0-of-2_exp-0-of-1.pt"
    lost.unlink()
    for look_at in (read, look):
        with pytest.raises(FileError) as error:
            look_at(folder)
        assert str(error.value) == (
            f"{lost}: missing: optimizer_config.json says that there were tp_size 2, dp_size 2, pp_size 1, "
            "expert_parallel_size 1"
        )


def edited(path: Path, change: Callable[[Any], None]) -> None:
    tree = torch.load(path, weights_only=False)
    change(tree)
    torch.save(tree, path)


def test_ranks_of_another_save(golden: Callable[[str], Path]) -> None:
    folder = golden("tp2-dp2-zero-masters")
    path = folder / "optimizer" / "optimizer_pp-0-of-1_dp-1-of-2_tp-0-of-2_exp-0-of-1.pt"
    kept = path.read_bytes()

    def later(tree: Any) -> None:
        for slots in tree["state"].values():
            slots["step"] += 1

    edited(path, later)
    with pytest.raises(FileError) as steps:
        read(folder)
    another = "a file of another save; copy the folder again from where it was written"
    assert str(steps.value) == (f"{path}: its step of 'blocks.0.qkv.weight' is not that of the other ranks: {another}")
    path.write_bytes(kept)

    def rate(tree: Any) -> None:
        tree["param_groups"][0]["lr"] = 0.5

    edited(path, rate)
    with pytest.raises(FileError) as groups:
        read(folder)
    first = "optimizer_pp-0-of-1_dp-0-of-2_tp-0-of-2_exp-0-of-1.pt"
    assert str(groups.value) == f"{path}: has other groups than {first}: {another}"
    path.write_bytes(kept)

    def negated(tree: Any) -> None:
        for name in tree["gradient_accumulator"]:
            tree["gradient_accumulator"][name] = -tree["gradient_accumulator"][name].detach()

    edited(path, negated)
    with pytest.raises(FileError) as masters:
        read(folder)
    other = path.with_name("optimizer_pp-0-of-1_dp-0-of-2_tp-1-of-2_exp-0-of-1.pt")
    assert str(masters.value) == (
        f"{other}: its master_param of 'blocks.0.norm.weight' is not that of the other ranks: {another}"
    )


def exchanged(first: Path, second: Path) -> None:
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)


def test_exchanged_ranks_are_seen_by_their_masters(golden: Callable[[str], Path]) -> None:
    folder = golden("tp2-pp2-masters")
    exchanged(*(folder / "optimizer" / f"optimizer_pp-0-of-2_tp-{rank}-of-2_exp-0-of-1.pt" for rank in (0, 1)))
    for path in (folder / "optimizer").glob("optimizer_pp-1-of-2*"):  # the tied weights would be seen too

        def untied(tree: Any) -> None:
            number = next(n for n, name in tree["names"].items() if name == "embedding.weight")
            for held in (tree["state"], tree["names"]):
                del held[number]
            tree["param_groups"][0]["params"].remove(number)

        edited(path, untied)
    with pytest.raises(FileError) as error:
        read(folder)
    assert str(error.value) == (
        f"{folder / 'optimizer'}: the fp32 master of 'blocks.0.qkv.weight', rounded to BF16, is not the model's weight "
        "at element 0: the optimizer's files and the model's are not of one save, or files of two ranks were "
        "exchanged; copy the folder again from where it was written"
    )


def test_a_tied_parameter_that_differs_between_stages(golden: Callable[[str], Path]) -> None:
    folder = golden("tp2-pp2-masters")
    first = folder / "optimizer" / "optimizer_pp-1-of-2_tp-0-of-2_exp-0-of-1.pt"
    exchanged(first, first.with_name("optimizer_pp-1-of-2_tp-1-of-2_exp-0-of-1.pt"))
    with pytest.raises(FileError) as error:
        read(folder)
    assert str(error.value) == (
        f"{first}: its exp_avg of 'embedding.weight' is not that of the other ranks: a file of another save; copy the "
        "folder again from where it was written"
    )


def test_what_nothing_proves_is_said(golden: Callable[[str], Path], tmp_path: Path) -> None:
    unseen = (
        "no fp32 master was compared with a weight, for the files do not hold both: ranks' files that were exchanged, "
        "or are of another save of the same step, would go unnoticed"
    )
    assert convert(golden("tp2"), tmp_path / "optimizer.safetensors").notes == (unseen,)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("local_global_slices_pairs", "None,None,None#0,8,None", "which are no parts of the same shape"),
        ("local_global_slices_pairs", "None,None,None|None,None,None#0,99,None|None,None,None", "of the same shape"),
        ("unsharded_shape", "(16,)", "no parts of the same shape"),
        ("unsharded_shape", "sixteen", "which is no shape"),
        ("unsharded_shape", "(99, 6)", "do not make up [99, 6]"),
    ],
)
def test_metadata_that_is_wrong(golden: Callable[[str], Path], key: str, value: str, says: str) -> None:
    folder = golden("tp2")
    path = folder / "model" / "blocks" / "0" / "qkv" / "model_weight_pp-rank-0-of-1_tp-rank-0-of-2.safetensors"
    with safe_open(path, "pt") as file:
        tensor, metadata = file.get_tensor("data"), file.metadata()
    save_file({"data": tensor}, path, {**metadata, key: value})
    with pytest.raises(FileError) as error:
        read(folder)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("gradient_accumulator", [1], "'gradient_accumulator' is a list, where dict is expected"),
        ("param_groups", [3], "has no 'params' where one is expected, in a int"),
        ("names", {}, "has no 0 where one is expected, in a dict"),
    ],
)
def test_a_file_of_another_form(golden: Callable[[str], Path], key: str, value: Any, says: str) -> None:
    folder = golden("tp2")
    path = folder / "optimizer" / "optimizer_pp-0-of-1_tp-0-of-2_exp-0-of-1.pt"
    edited(path, lambda tree: tree.update({key: value}))
    with pytest.raises(FileError) as error:
        read(folder)
    assert str(error.value) == f"{path}: {says}"


def test_a_config_without_numbers(golden: Callable[[str], Path]) -> None:
    folder = golden("dp2-zero")
    path = folder / "optimizer" / "optimizer_config.json"
    config = json.loads(path.read_text())
    config["parallelism"]["tp_size"] = "-1"
    path.write_text(json.dumps(config))
    with pytest.raises(FileError) as error:
        read(folder)
    assert str(error.value) == f"{path}: has '-1' where a number is expected"


@pytest.mark.parametrize("case", ["dp2-zero", "tp2-dp2-zero-masters", "pp2-dp2-zero"])
def test_a_first_look_reads_a_file_of_each_stage(
    golden: Callable[[str], Path], case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = golden(case)
    monkeypatch.setattr("lora_state_format.converters.nanotron.FEW", 1)
    assert run(["inspect", str(folder), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    files = len(list((folder / "optimizer").iterdir()))
    assert seen["origin"]["first_look"] == {"files_read": 2 if case.startswith("pp2") else 1, "files": files}
    with read(folder) as whole:
        told = to_json(whole)
    assert {k: v for k, v in seen.items() if k in told and k not in {"origin", "notes", "weights"}} == {
        k: v for k, v in told.items() if k in seen and k not in {"origin", "notes", "weights"}
    }
    assert re.search(r"read of it|were read", " ".join(seen["notes"]))
