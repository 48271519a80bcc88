"""ZeRO 1 of DeepSpeed 0.3, in folders that its engine wrote (``tests/golden/deeperspeed``), against what ranks held."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from lora_state_format import registry
from lora_state_format.cli import run
from lora_state_format.errors import AmbiguousOrderError, FileError, RefusedError
from lora_state_format.foreign import pickles, sub_partitions
from lora_state_format.foreign.torch_save import save
from lora_state_format.io.files import reading
from lora_state_format.model.sources import Memory
from lora_state_format.model.tensors import Tensor, contiguous
from lora_state_format.operations.conversion import convert, read
from lora_state_format.operations.look import look

pytestmark = pytest.mark.filterwarnings("ignore")

GOLDEN: Final = Path(__file__).parents[1] / "golden" / "deeperspeed" / "files"
CASES: Final = sorted(path.name.removesuffix(".tar.xz") for path in GOLDEN.iterdir())
SLICES: Final = {"slices": "megatron"}
OPTIONS: Final = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}


@pytest.fixture
def golden(tmp_path: Path) -> Callable[[str], Path]:
    """The checkpoint of a run in ``tests/golden``, by case; what each rank held lies next to it."""

    def unpacked(case: str) -> Path:
        with tarfile.open(GOLDEN / f"{case}.tar.xz") as archive:
            archive.extractall(tmp_path, filter="data")
        return tmp_path / case / "global_step3"

    return unpacked


def live(folder: Path) -> dict[str, dict[str, Any]]:
    """What all ranks held together; every element is held by one data-parallel rank."""
    case = folder.parent.name
    tensor = 2 if "tp2" in case else 1
    parts: dict[tuple[str, str], list[torch.Tensor]] = {}
    for rank, path in enumerate(sorted(folder.parents[1].glob(f"{case}.*.pt"))):
        for name, slots in torch.load(path).items():
            for slot, value in slots.items():
                own = parts.setdefault((name, slot), [torch.full_like(value, torch.nan) for _ in range(tensor)])
                own[rank % tensor] = torch.where(value.isnan(), own[rank % tensor], value)
    held: dict[str, dict[str, Any]] = {}
    for (name, slot), slices in parts.items():
        whole = slices[0]
        if tensor > 1 and "norm" not in name and not name.endswith("4h_to_h.bias"):
            whole = torch.cat(slices, 1 if name.endswith("4h_to_h.weight") else 0)
        assert not whole.isnan().any()
        held.setdefault(name, {"step": torch.tensor(4)})["master_param" if slot == "fp32" else slot] = whole
    return held


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    new = path.with_suffix(".new")
    with reading(path.parent) as files:
        tree = pickles.load(files[path], path).value
        tree.get("optimizer_state_dict", {}).pop("loss_scaler", None)
        tree.pop("csr_tensor_module_names", None)  # a set
        change(tree)
        save(tree, new)
    new.replace(path)


def rank_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("zero_pp_rank_*"))


@pytest.mark.parametrize("case", CASES)
def test_the_state_is_what_the_ranks_held(
    golden: Callable[[str], Path], case: str, assert_holds: Any, tmp_path: Path
) -> None:
    folder = golden(case)
    converter, match = registry.detect(folder.parent)
    assert (converter.NAME, match.path) == ("deepspeed_zero", folder)
    options = {"masters": True, **(SLICES if "tp2" in case else {})}
    report = convert(folder, tmp_path / "optimizer.safetensors", options=options)
    held = live(folder)
    matrices = [name for name, slots in held.items() if slots["exp_avg"].dim() == 2]
    with read(tmp_path / "optimizer.safetensors") as state:
        assert_holds(state, held)
        assert {len(parameter) for parameter in state.values()} == {4}
        counts = [len(matrices), len(held) - len(matrices)]
        assert [group.count for group in state.groups] == ([len(held)] if "one" in case else counts)
        told = [dict(group.options) for group in state.groups]
        decays = [{"weight_decay": decay, **OPTIONS} for decay in (0.1, 0.0)]
        assert told == (decays if "rigid" in case else [{}] * len(told))
        assert state.origin["masters_compared"] == len(held)
        assert state.origin["ranks"] == len(rank_files(folder))
        assert state.origin["layout"] == (
            "sub-partitions of DeepSpeed 0.3, whose masters prove which group a parameter is in"
        )
        assert state.global_step == 3
    assert (report.paired, report.naming.source) == (len(held), "checkpoint")


def test_masters_are_left_out_unless_they_are_asked_for(golden: Callable[[str], Path]) -> None:
    with read(golden("dp2")) as state:
        assert {tuple(parameter) for parameter in state.values()} == {("step", "exp_avg", "exp_avg_sq")}


def test_without_shapes_the_weights_order_names_the_parameters(
    golden: Callable[[str], Path], assert_holds: Any
) -> None:
    """As a version before 0.3.12 wrote it; buffers are passed over, and so are the layers of other stages."""
    for case in ("dp2", "pp2-dp2"):
        folder = golden(case)
        for path in rank_files(folder):
            edit(path, lambda tree: tree.pop("param_shapes"))
        with read(folder, options={"masters": True}) as state:
            assert_holds(state, live(folder))


def test_a_look_at_many_ranks_reads_them_all(
    golden: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = golden("dp2")
    monkeypatch.setattr(registry.get("deepspeed_zero"), "FEW", 0)
    with read(folder) as whole:
        looked = look(folder).state
        assert dict(looked.origin) == dict(whole.origin)
    assert run(["inspect", str(folder)]) == 0
    assert "19" in capsys.readouterr().out


def test_ranks_of_which_one_is_missing(golden: Callable[[str], Path]) -> None:
    folder = golden("dp3-one")
    rank_files(folder)[2].unlink()
    with pytest.raises(FileError) as error:
        read(folder)
    assert str(error.value) == (f"{rank_files(folder)[0]}: says the state was cut over 3 ranks; there are 2 files")


def test_ranks_that_were_exchanged(golden: Callable[[str], Path]) -> None:
    folder = golden("dp2")
    first, second = rank_files(folder)
    first.rename(folder / "kept")
    second.rename(first)
    (folder / "kept").rename(second)
    with pytest.raises(FileError) as error:
        read(folder)
    assert str(error.value) == (
        f"{first}: the fp32 masters in its groups, of 444 and 84 elements, are not the model's 19 parameters, of 528 "
        "elements, rounded and in their order: the optimizer's files and the model's are not of one save, or files of "
        "two ranks were exchanged; copy the folder again from where it was written"
    )


def test_ranks_with_different_sub_partitions(golden: Callable[[str], Path]) -> None:
    folder = golden("dp2")
    second = rank_files(folder)[1]

    def cut(tree: dict[str, Any]) -> None:
        for key in ("local_sub_partitions_of_fp32_groups", "base_optimizer_state"):
            for group in tree["optimizer_state_dict"][key]:
                del group[3:]

    edit(second, cut)
    with pytest.raises(FileError) as error:
        read(folder)
    assert str(error.value) == (
        f"{second}: has 3 sub-partitions of each group, where {rank_files(folder)[0].name} has 7"
    )


def test_without_weights_only_one_group_has_an_order(golden: Callable[[str], Path], assert_holds: Any) -> None:
    folder = golden("dp3-one")
    edit(folder / "mp_rank_00_model_states.pt", lambda tree: tree.update(module={}))
    with read(folder, options={"masters": True}) as state:
        assert_holds(state, live(folder))
        assert state.origin["masters_compared"] == 0
    folder = golden("dp2")
    edit(folder / "mp_rank_00_model_states.pt", lambda tree: tree.update(module={}))
    with pytest.raises(AmbiguousOrderError) as error:
        read(folder)
    assert str(error.value) == (
        f"{rank_files(folder)[0]}: it does not say which group a parameter is in, and several ways of dealing them out "
        "fit, as there are no weights of them in this folder: two ways differ in 2.input_layernorm.bias, "
        "2.mlp.dense_4h_to_h.bias: put the files with the model's weights next to the optimizer's"
    )
    assert error.value.candidates == ("2.input_layernorm.bias", "2.mlp.dense_4h_to_h.bias")


# --- which group is a parameter in: by hand --------------------------------------------------------------------------


def flat(*values: float) -> Tensor:
    return contiguous("F32", (len(values),), Memory(torch.tensor(values, dtype=torch.float32).numpy().tobytes()))


def half(*values: float) -> Tensor:
    return contiguous("F16", (len(values),), Memory(torch.tensor(values, dtype=torch.float16).numpy().tobytes()))


def dealt(shares: list[list[Tensor]], weights: dict[str, Tensor], *, padded: bool = False) -> list[list[str]]:
    shapes = {name: weight.shape for name, weight in weights.items()}
    return [list(group) for group in sub_partitions.grouped(shares, shapes, weights, padded=padded, path="rank")]


def test_equal_weights_are_told_apart_by_what_follows() -> None:
    weights = {"a": half(1, 1), "b": half(2), "c": half(1, 1), "d": half(3)}
    assert dealt([[flat(1, 1), flat(2)], [flat(1, 1, 3)]], weights) == [["a", "b"], ["c", "d"]]


def test_parameters_that_are_not_trained_are_in_no_group() -> None:
    weights = {
        "a": half(1, 1),
        "b": half(2),
        "c": half(1, 4),
        "d": half(3),
        "none": contiguous("F16", (0,), Memory(b"")),
    }
    assert dealt([[flat(2)], [flat(1, 4, 3)]], weights) == [["b"], ["c", "d"]]
    assert dealt([[flat(2)], [flat(1), flat(1)]], weights) == [["b"], ["a"]]
    assert dealt([[flat(2, 0)], [flat(1, 4, 3, 0, 0)]], weights, padded=True) == [["b"], ["c", "d"]]
    with pytest.raises(FileError):
        dealt([[flat(2, 0)], [flat(1, 4, 3, 0)]], weights)


def test_values_between_two_halves_are_the_nearest_one() -> None:
    assert dealt([[flat(1.0001, -2.0001)]], {"a": half(1), "b": half(-2)}) == [["a", "b"]]


def test_more_groups_than_are_tried_are_refused() -> None:
    with pytest.raises(RefusedError) as error:
        dealt([[flat(1)]] * 257, {"a": half(1)})
    assert str(error.value) == (
        "rank: 257 groups of parameters, where up to 256 are read: load it in the DeepSpeed that wrote it, with fewer "
        "groups"
    )


def test_more_ways_than_are_followed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sub_partitions, "MAX_WAYS", 2)
    weights = {name: half(1) for name in "abcd"}
    with pytest.raises(AmbiguousOrderError) as error:
        dealt([[flat(1, 1)], [flat(1, 1)]], weights)
    assert str(error.value) == (
        "rank: more than 2 ways of dealing out the parameters up to 'b' to groups fit, as their weights are equal: "
        "convert a later checkpoint of the run, whose weights differ"
    )
    assert error.value.candidates == ("b",)


def test_equal_weights_that_nothing_tells_apart_are_refused() -> None:
    weights = {"a": half(1, 1), "b": half(1, 1), "c": half(2), "d": half(3)}
    with pytest.raises(AmbiguousOrderError) as error:
        dealt([[flat(1, 1), flat(2)], [flat(1, 1, 3)]], weights)
    assert str(error.value) == (
        "rank: it does not say which group a parameter is in, and several ways of dealing them out fit, as weights are "
        "equal: two ways differ in a, b: convert a later checkpoint of the run, whose weights differ"
    )
    assert error.value.candidates == ("a", "b")
