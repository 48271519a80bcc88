from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import lora_state_format as lsf
from lora_state_format.cli import run
from lora_state_format.model.states import Group, Naming, Optimizer, OptimizerState, Parameter, Scalar
from lora_state_format.operations.conversion import convert

if TYPE_CHECKING:
    from tests.conftest import Founding

COMMAND = [sys.executable, "-m", "lora_state_format"]


class Output:
    """Runs a command in this process; keeps what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: object) -> int:
        code = run([str(argument) for argument in arguments])
        self.out, self.err = self._capsys.readouterr()
        return code

    def json(self, *arguments: object) -> Any:
        assert self(*arguments, "--json") == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def lora_state(capsys: pytest.CaptureFixture[str]) -> Output:
    return Output(capsys)


@pytest.fixture(scope="module")
def converted(founding: Founding, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "optimizer.safetensors"
    convert(founding.path, path)
    return path


def odd(path: Path, *names: str, **options: Any) -> Path:
    """A small state of one group."""
    parameters = tuple(Parameter(name, (2,), {"step": Scalar("F32", b"\0\0\x80\x3f")}) for name in names)
    group = Group(0, tuple(options.items()), len(parameters))
    lsf.write(OptimizerState((Optimizer(),), (group,), parameters, Naming("model")), path)
    return path


# --- convert ------------------------------------------------------------------------------------------------------


def test_convert_prints_its_report(lora_state: Output, founding: Founding, tmp_path: Path) -> None:
    target = tmp_path / "optimizer.safetensors"
    assert lora_state("convert", founding.path, target) == 0
    assert lora_state.out.startswith(f"converted {founding.path} (torch_optimizer) to {target} (named)\n392 parameters")
    assert lora_state.err == ""
    with lsf.open_state(target) as state:
        assert list(state) == list(founding.slots)


def test_convert_as_json(lora_state: Output, founding: Founding, tmp_path: Path) -> None:
    report = lora_state.json("convert", founding.path, tmp_path / "optimizer.safetensors")
    assert (report["schema_version"], report["parameters"], report["groups"]) == (1, 392, [392, 0])


def test_convert_dry(lora_state: Output, founding: Founding, tmp_path: Path) -> None:
    assert lora_state("convert", "--dry-run", founding.path, tmp_path / "optimizer.safetensors") == 0
    assert lora_state.out.startswith("would convert ")
    assert not list(tmp_path.iterdir())


def test_convert_does_not_overwrite(lora_state: Output, founding: Founding, tmp_path: Path) -> None:
    target = tmp_path / "optimizer.safetensors"
    target.write_text("precious")
    assert lora_state("convert", founding.path, target) == 2
    assert lora_state.err == f"error: {target} exists; pass --force to replace it\n"
    assert target.read_text() == "precious"
    assert lora_state("convert", "--force", founding.path, target) == 0


def test_convert_stops_without_names(lora_state: Output, founding: Founding, tmp_path: Path) -> None:
    alone = shutil.copy(founding.path / "optimizer.pt", tmp_path)
    target = tmp_path / "optimizer.safetensors"
    assert lora_state("convert", alone, target) == 4
    assert lora_state.err.startswith(f"error: {alone}: the state of 392 parameters stands under positions")
    assert lora_state.err.count("\n") == 1
    assert not target.exists()
    names = tmp_path / "names.txt"
    names.write_text("\n".join(founding.slots))
    assert lora_state("convert", alone, target, "--names", names) == 0


def test_convert_warns_on_stderr(lora_state: Output, founding: Founding, tmp_path: Path) -> None:
    shutil.copy(founding.path / "adapter_model.safetensors", tmp_path)
    assert lora_state("convert", founding.path, tmp_path / "optimizer.safetensors") == 0
    assert lora_state.err.startswith("warning: ")
    assert "lies beside adapter_model.safetensors" in lora_state.err


def test_rules_are_listed(lora_state: Output) -> None:
    assert lora_state("convert", "--rule", "list") == 0
    assert "trainer: transformers.Trainer, since 4.53: with weight decay, then without\n" in lora_state.out


def test_a_pickle_that_asks_for_code(lora_state: Output, tmp_path: Path) -> None:
    import torch

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'owned'}",)

    path = tmp_path / "optimizer.pt"
    torch.save({"state": {}, "param_groups": [Attack()]}, path, pickle_module=pickle)
    assert lora_state("convert", path, tmp_path / "optimizer.safetensors") == 3
    assert lora_state.err.startswith(f"error: {path}: pickle global '{os.name}.system' refused, ")
    assert lora_state.err.endswith("; nothing was run\n")
    assert not (tmp_path / "owned").exists()


def test_a_list_in_an_error_is_indented(lora_state: Output, founding: Founding, tmp_path: Path) -> None:
    first, second, *others = founding.slots
    names = tmp_path / "names.txt"
    names.write_text("\n".join([second, first, *others]))
    assert lora_state("convert", founding.path, tmp_path / "a.safetensors", "--names", names) == 4
    heading, reason, *others = lora_state.err.splitlines()
    assert heading.startswith("error: no order of the ")
    assert reason == f"  listed: '{second}' has shape [32, 4], but id 0 has exp_avg of shape [4, 32]"
    assert all(line.startswith("  ") for line in others)


# --- inspect ------------------------------------------------------------------------------------------------------


def test_inspect_a_named_file(lora_state: Output, converted: Path) -> None:
    assert lora_state("inspect", converted) == 0
    lines = lora_state.out.splitlines()
    assert lines[0] == f"{converted} (named)"
    assert lines[1].startswith("392 parameters, step 3; 784 tensors, ")
    assert lines[2].startswith("names: from the adapter file, in the order of rule ")
    assert lines[3].startswith("evidence: ")
    assert lines[4] == "optimizer 0: class not stated"
    assert lines[5].startswith("group 0: 392 parameters, ")
    assert ", lr 0.001, " in lines[5]
    assert ", betas (0.9, 0.999), " in lines[5]
    assert lines[6].startswith("group 1: 0 parameters, ")
    assert len(lines) == 7 + 14
    prefix = "group 0: 28 x base_model.model.model.layers.{0-27}"
    assert f"{prefix}.self_attn.q_proj.lora_A.default.weight [4, 32]: exp_avg F32, exp_avg_sq F32, step 3.0" in lines


def test_inspect_a_legacy_file(lora_state: Output, founding: Founding) -> None:
    assert lora_state("inspect", founding.path / "optimizer.pt") == 0
    assert "names: none, the state stands under positions" in lora_state.out
    assert "id {0," in lora_state.out
    members = lora_state.json("inspect", founding.path / "optimizer.pt")
    assert (members["schema_version"], members["format"], members["named"]) == (1, "torch_optimizer", False)
    assert [group["count"] for group in members["groups"]] == [392, 0]
    assert members["parameters"][0] == {
        "name": None, "id": 0, "shape": [4, 32], "group": 0,
        "state": {
            "step": 3.0,
            "exp_avg": {"dtype": "F32", "shape": [4, 32], "role": "param"},
            "exp_avg_sq": {"dtype": "F32", "shape": [4, 32], "role": "param"},
        },
    }  # fmt: skip


def test_inspect_as_json(lora_state: Output, converted: Path, founding: Founding) -> None:
    members = lora_state.json("inspect", converted)
    assert [parameter["name"] for parameter in members["parameters"]] == list(founding.slots)
    assert members["naming"]["source"] == "adapter"


def test_inspect_statistics(lora_state: Output, converted: Path, founding: Founding) -> None:
    name, slots = next(iter(founding.slots.items()))
    members = lora_state.json("inspect", "--stats", converted)
    found = members["parameters"][0]["statistics"]["exp_avg_sq"]
    expected = slots["exp_avg_sq"].double()
    assert members["parameters"][0]["name"] == name
    assert found["rms"] == pytest.approx(expected.square().mean().sqrt().item())
    assert found["largest"] == pytest.approx(expected.abs().max().item())
    assert (found["elements"], found["not_finite"]) == (expected.numel(), 0)
    assert lora_state("inspect", "--stats", converted) == 0
    assert "exp_avg_sq F32 (rms " in lora_state.out


def test_names_from_files_are_printed_harmlessly(lora_state: Output, tmp_path: Path) -> None:
    path = odd(tmp_path / "a.safetensors", "a\x1b[2Jb\nc", "{0}.3.\u202e")
    assert lora_state("inspect", path) == 0
    assert r"group 0: 1 x a\x1b[2Jb\nc [2]: step 1.0" in lora_state.out
    assert r"group 0: 1 x {0}.3.\u202e [2]: step 1.0" in lora_state.out
    assert lora_state.out.replace("\n", "").isprintable()


def test_an_error_is_one_line_whatever_the_name(lora_state: Output, tmp_path: Path) -> None:
    path = tmp_path / "two\nlines\x1b"
    assert lora_state("inspect", path) == 3
    assert lora_state.err == f"error: {tmp_path}/two\\nlines\\x1b: no such file or folder\n"


# --- verify -------------------------------------------------------------------------------------------------------


def test_verify(lora_state: Output, converted: Path) -> None:
    assert lora_state("verify", converted) == 0
    assert lora_state.out.startswith(f"{converted}: every digest matches; 784 tensors, ")
    assert lora_state.json("verify", converted)["ok"] is True


def test_verify_finds_a_flipped_bit(lora_state: Output, converted: Path, tmp_path: Path) -> None:
    path = tmp_path / "flipped.safetensors"
    data = bytearray(converted.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert lora_state("verify", path) == 1
    assert "does not match its digest" in lora_state.out
    assert lora_state("verify", "--json", path) == 1
    assert json.loads(lora_state.out)["ok"] is False


def test_verify_a_truncated_file(lora_state: Output, converted: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(converted.read_bytes()[:-1])
    assert lora_state("verify", path) == 3
    assert lora_state.err.startswith(f"error: {path}: ")


def test_verify_with_weights(lora_state: Output, converted: Path, founding: Founding, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    assert lora_state("verify", converted, "--weights", founding.path) == 0
    assert "\nweights: 392/392 match by digest\n" in lora_state.out
    members = lora_state.json("verify", converted, "--weights", founding.path / "adapter_model.safetensors")
    assert members["weights"]["matching"] == 392
    assert members["evidence"]["verdict"] in {"confirmed", "partly"}

    weights = load_file(founding.path / "adapter_model.safetensors")
    save_file({key: value + 1 for key, value in weights.items()}, tmp_path / "adapter_model.safetensors")
    shutil.copy(founding.path / "adapter_config.json", tmp_path)
    assert lora_state("verify", converted, "--weights", tmp_path) == 1
    assert "\nweights: 0/392 match by digest\n" in lora_state.out
    assert lora_state.out.count("weights differ: ") == 5


# --- the rest -----------------------------------------------------------------------------------------------------


def test_formats(lora_state: Output) -> None:
    assert lora_state("formats") == 0
    assert "torch_optimizer" in lora_state.out
    members = lora_state.json("formats")
    assert {"named", "torch_optimizer"} <= {row["name"] for row in members["formats"] if row["writes"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect"], "error: Missing argument 'PATH'.\n"),
        (["inspect", "a", "b"], "error: Got unexpected extra argument (b)\n"),
        (["nosuch"], "error: No such command 'nosuch'.\n"),
        (["convert", "--nosuch"], "error: No such option '--nosuch'.\n"),
    ],
)
def test_usage(lora_state: Output, arguments: list[str], message: str) -> None:
    assert lora_state(*arguments) == 2
    assert lora_state.err == message


def test_help(lora_state: Output) -> None:
    assert lora_state() == 0
    assert lora_state.out.startswith("Usage: lora-state [OPTIONS] COMMAND")
    assert lora_state("convert", "--help") == 0
    assert "--dry-run" in lora_state.out
    assert lora_state("--version") == 0
    assert lora_state.out == f"lora-state, version {lsf.__version__}\n"


def test_an_unreadable_file(lora_state: Output, tmp_path: Path) -> None:
    folder = tmp_path / "optimizer.pt"
    folder.mkdir()
    assert lora_state("inspect", "--from", "torch_optimizer", folder) == 3
    assert lora_state.err.startswith(f"error: {folder}")
    assert lora_state.err.count("\n") == 1


# --- processes ----------------------------------------------------------------------------------------------------


def modules_after(*arguments: object) -> set[str]:
    """What a command has imported when it is done."""
    code = (
        "import sys\nfrom lora_state_format.cli import run\n"
        f"assert run({[str(argument) for argument in arguments]!r}) == 0\n"
        "print('\\n'.join(sys.modules), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stderr.splitlines())


def test_no_command_imports_torch(founding: Founding, converted: Path, tmp_path: Path) -> None:
    heavy = {"torch", "peft", "transformers", "rich"}
    assert not modules_after("convert", founding.path, tmp_path / "a.safetensors") & heavy
    assert not modules_after("inspect", founding.path) & heavy
    assert not modules_after("verify", converted) & {*heavy, "numpy"}


def test_inspect_imports_little(converted: Path) -> None:
    assert not modules_after("inspect", converted) & {"numpy", "rich", "torch", "importlib.metadata", "msgpack"}


def test_whoever_stops_reading_gets_no_traceback(converted: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([*COMMAND, "inspect", converted], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, b"")


def test_interrupt(founding: Founding, tmp_path: Path) -> None:
    # The signal comes as the target's temporary file is opened. A test run in the background ignores SIGINT, and so
    # would its children.
    code = """
import os, signal, sys
from lora_state_format.cli import main

def interrupt(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".tmp"):
        os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.addaudithook(interrupt)
main()
"""
    command = [sys.executable, "-c", code, "convert", str(founding.path), str(tmp_path / "a.safetensors")]
    result = subprocess.run(command, capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (130, b"error: interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """The two ends of a pseudo-terminal."""
    controller, end = os.openpty()
    yield controller, end
    os.close(controller)
    os.close(end)


def test_progress_is_shown_on_a_terminal_only(founding: Founding, tmp_path: Path, terminal: tuple[int, int]) -> None:
    controller, end = terminal
    command = [*COMMAND, "convert", str(founding.path), str(tmp_path / "a.safetensors"), "--json"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=end, check=True)
    assert json.loads(result.stdout)["written"] is True
    assert b"converting" in os.read(controller, 1 << 16)


def test_a_name_that_no_terminal_encoding_has(tmp_path: Path) -> None:
    path = odd(tmp_path / "a.safetensors", "größe.重み")
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    result = subprocess.run([*COMMAND, "inspect", str(path)], env=environment, capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"gr\xf6\xdfe.\\u91cd\\u307f" in result.stdout


def test_check_tells_whether_a_checkpoint_would_bind_to_a_model(
    lora_state: Output, founding: Founding, tmp_path: Path
) -> None:
    founding.model.config.save_pretrained(tmp_path)
    config = json.loads((founding.path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert lora_state("check", founding.path, "--model", tmp_path) == 0
    assert lora_state.out == "fits: 392/392 parameters would be restored\n"

    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 2 * config["r"]}))
    assert lora_state("check", founding.path, "--model", tmp_path, "--json") == 1
    members = json.loads(lora_state.out)
    assert (members["ok"], members["restored"], members["parameters"]) == (False, 0, 392)
    (problem,) = members["problems"]
    assert (problem["kind"], problem["title"], len(problem["items"])) == ("shape", "of another shape (392):", 392)
    rank = config["r"]
    (hint,) = problem["hints"]
    assert hint == (
        f"the rank is {2 * rank} in the model and {rank} in the file; mismatch='resize' cuts and pads the moments, for "
        "weights that were cut and padded alike; mismatch='fresh' lets these parameters start without state"
    )
