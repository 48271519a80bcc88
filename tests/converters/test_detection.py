"""What a path is, told from its structure: two answers are never silent, and none says what was looked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_state_format import registry
from lora_state_format.errors import AmbiguousFormatError, UnknownFormatError
from lora_state_format.foreign.dcp import write_folder
from lora_state_format.operations.overview import summary
from lora_state_format.operations.report import NOTHING_HELD


def layout(path: Path, *files: str) -> Path:
    for name in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("files", "name"),
    [
        (["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], "deepspeed_zero"),
        (["global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt"], "deepspeed_zero"),
        (["zero/optimizer_state.pt"], "deepspeed_universal"),
        (["optimizer.bin", "model.safetensors"], "accelerate"),
        (["optimizer_0_rank0.bin"], "accelerate"),
        (["optimizer.bin", "train_state.json"], "kohya"),
        (["optimizer.bin", "pytorch_lora_weights.safetensors"], "diffusers"),
        (["training_state/optimizer_state.safetensors", "training_state/optimizer_param_groups.json"], "lerobot"),
        (["optim.pt", "model.pt"], "olmo"),
        (["optimizer/optimizer_config.json", "optimizer/optimizer_pp-0-of-1_tp-0-of-1_exp-0-of-1.pt"], "nanotron"),
    ],
)
def test_names_alone_tell_these_folders(tmp_path: Path, files: list[str], name: str) -> None:
    assert name == registry.detect(layout(tmp_path, *files))[0].NAME


def test_two_formats_in_one_folder_are_both_named(tmp_path: Path) -> None:
    layout(tmp_path, "global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt", "universal/zero/optimizer_state.pt")
    (tmp_path / "latest").write_text("global_step3")
    (tmp_path / "latest_universal").write_text("universal")
    with pytest.raises(AmbiguousFormatError) as error:
        registry.detect(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: 2 formats fit: deepspeed_universal (a folder zero with an optimizer_state.pt); deepspeed_zero (1 "
        "ZeRO optimizer file, one per rank); pass the right one as source_format="
    )
    assert registry.detect(tmp_path / "universal")[0].NAME == "deepspeed_universal"


def test_an_unknown_folder_lists_what_was_looked_for(tmp_path: Path) -> None:
    layout(tmp_path, "model.safetensors", "notes.txt")
    write_folder({("model", "weight"): 1}, tmp_path / "weights")
    with pytest.raises(UnknownFormatError) as error:
        registry.detect(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: no optimizer state found here; looked for:\n")
    for name in registry.BUILT_IN:
        assert name in str(error.value)


def test_a_tag_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    layout(tmp_path, "other/zero_pp_rank_0_mp_rank_00_optim_states.pt", "here/x", "here/y/z")
    (tmp_path / "here" / "latest").write_text("../other")
    with pytest.raises(UnknownFormatError):
        registry.detect(tmp_path / "here")


def test_moments_that_are_not_in_the_file_are_said_not_to_be(tmp_path: Path) -> None:
    """What layerwise GaLore and LOMO leave: a dummy parameter, or none of the moments."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    facts = summary(registry.read(tmp_path / "optimizer.pt", "torch_optimizer").state).facts
    assert ("note", NOTHING_HELD) in facts


def test_detection_imports_no_framework(tmp_path: Path) -> None:
    layout(tmp_path, "zero/optimizer_state.pt")
    code = (
        "import sys\nfrom lora_state_format import registry\n"
        f"registry.detect({str(tmp_path)!r})\n"
        "print(sorted({'torch', 'deepspeed', 'accelerate', 'lightning', 'numpy'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
