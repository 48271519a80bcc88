from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import lora_state_format as lsf
from lora_state_format.binding.policies import Policies
from lora_state_format.cli import commands, run
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
    assert lora_state.err.startswith(f"error: {alone}: stores 392 parameters by position and contains no names, ")
    assert "; pass --names with a file of names in optimizer order, " in lora_state.err
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


SCREEN = """\
{path} (named)
  optimizer   class not stated
  step        3
  parameters  392
  state       784 tensors, 458,752 bytes (458.8 kB)
  names       from the adapter file, in the order of rule 'trainer'
  how sure    {sure}

groups (2)
  #  parameters
  0         392
  1           0
  all groups: lr 0.001, betas (0.9, 0.999), eps 1e-08, decoupled_weight_decay
  True, initial_lr 0.001
  not used: weight_decay, amsgrad, maximize, foreach, capturable,
  differentiable, fused

parameters (392): base_model.model.model.layers.*.NAME.default.weight
  name                     layers  count  shape     bytes
  self_attn.q_proj.lora_A  0-27       28  [4, 32]  28,672
  self_attn.q_proj.lora_B  0-27       28  [32, 4]  28,672
  self_attn.k_proj.lora_A  0-27       28  [4, 32]  28,672
  self_attn.k_proj.lora_B  0-27       28  [16, 4]  14,336
  self_attn.v_proj.lora_A  0-27       28  [4, 32]  28,672
  self_attn.v_proj.lora_B  0-27       28  [16, 4]  14,336
  self_attn.o_proj.lora_A  0-27       28  [4, 32]  28,672
  self_attn.o_proj.lora_B  0-27       28  [32, 4]  28,672
  mlp.gate_proj.lora_A     0-27       28  [4, 32]  28,672
  mlp.gate_proj.lora_B     0-27       28  [64, 4]  57,344
  mlp.up_proj.lora_A       0-27       28  [4, 32]  28,672
  mlp.up_proj.lora_B       0-27       28  [64, 4]  57,344
  mlp.down_proj.lora_A     0-27       28  [4, 64]  57,344
  mlp.down_proj.lora_B     0-27       28  [32, 4]  28,672

slots (3)
  slot        parameters  kind          bytes  value
  exp_avg            392  F32         229,376
  exp_avg_sq         392  F32         229,376
  step               392  F32 scalar        0    3.0
"""


def test_inspect_a_named_file(
    lora_state: Output, converted: Path, founding: Founding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole screen; 80 columns hold it."""
    monkeypatch.chdir(converted.parent)
    assert lora_state("inspect", converted.name) == 0
    head, tail = lora_state.out.split("  how sure    ")
    sure, rest = tail.split("\n\n", 1)
    assert f"{head}  how sure    {sure}\n\n{rest}" == SCREEN.format(path=converted.name, sure=sure)
    assert " ".join(sure.split()).startswith(("partly: the weights rule out ", "confirmed: the weights rule out "))
    assert all(len(line) <= 80 for line in lora_state.out.splitlines())


def test_inspect_names_a_checkpoint_and_weighs_nothing(lora_state: Output, founding: Founding) -> None:
    assert lora_state("inspect", founding.path) == 0
    found = " ".join(lora_state.out.split())
    assert (
        "names from the adapter file, in the order of rule 'trainer' how sure 392 parameters have the same shape"
        in found
    )
    assert "so shapes alone cannot confirm their order, and no weights were compared" in found


def test_inspect_a_legacy_file(lora_state: Output, founding: Founding, tmp_path: Path) -> None:
    alone = shutil.copy(founding.path / "optimizer.pt", tmp_path)
    assert lora_state("inspect", alone) == 0
    assert "names       none: " in lora_state.out
    assert "\n  id *  12,26,..,390     28  [4, 64]   57,344\n" in lora_state.out
    members = lora_state.json("inspect", alone)
    assert (members["schema_version"], members["format"], members["named"]) == (1, "torch_optimizer", False)
    assert members["unnamed"].startswith("none: ")
    assert [group["count"] for group in members["groups"]] == [392, 0]
    assert members["parameters"][0] == {
        "name": None, "id": 0, "shape": [4, 32], "group": 0,
        "state": {
            "step": 3.0,
            "exp_avg": {"dtype": "F32", "shape": [4, 32], "role": "param"},
            "exp_avg_sq": {"dtype": "F32", "shape": [4, 32], "role": "param"},
        },
    }  # fmt: skip
    names = tmp_path / "names.txt"
    names.write_text("\n".join(founding.slots))
    assert [p["name"] for p in lora_state.json("inspect", alone, "--names", names)["parameters"]] == list(
        founding.slots
    )


def test_inspect_rows(lora_state: Output, converted: Path, founding: Founding) -> None:
    arguments = ("inspect", converted, "--parameters", "--match", r"layers\.1\..*lora_B", "--sort", "name")
    assert lora_state(*arguments) == 0
    heading, *rows = lora_state.out.split("parameters (7)\n")[1].splitlines()
    assert heading == "  group  step  bytes  shape    name"
    expected = sorted(name for name in founding.slots if ".layers.1." in name and "lora_B" in name)
    assert [row.split()[-1] for row in rows] == expected
    assert rows[0] == f"      0     3    1,024  [32, 4]  {expected[0]}".replace("    1,024", "  1,024")
    assert lora_state("inspect", converted, "--match", "nosuch") == 2
    assert lora_state.err == (
        f"error: none of the 392 parameters matches 'nosuch'; the first is '{next(iter(founding.slots))}'\n"
    )
    assert lora_state("inspect", converted, "--match", "[") == 2
    assert lora_state.err.startswith("error: '[' is not a regular expression: ")
    assert lora_state("inspect", converted, "--sort", "update") == 2
    assert lora_state.err == ("error: --sort update needs --stats\n  Try 'lora-state inspect --help' for help.\n")


def test_inspect_as_a_tree(lora_state: Output, converted: Path) -> None:
    assert lora_state("inspect", converted, "--tree", "--match", "q_proj|down_proj.lora_A") == 0
    assert lora_state.out == (
        f"{converted} (named)\n"
        "base_model.model.model.layers.{0-27}\n"
        "  self_attn.q_proj\n"
        "    lora_A.default.weight [4, 32]  x 28, 28,672 bytes\n"
        "    lora_B.default.weight [32, 4]  x 28, 28,672 bytes\n"
        "  mlp.down_proj.lora_A.default.weight [4, 64]  x 28, 57,344 bytes\n"
    )


def test_inspect_as_markdown(lora_state: Output, tmp_path: Path) -> None:
    path = odd(tmp_path / "a.safetensors", "a|b", lr=0.0)
    assert lora_state("inspect", path, "--markdown") == 0
    assert "| a\\|b |  |" not in lora_state.out
    assert "\n| a\\|b | 1 | \\[2\\] | 0 |\n" in lora_state.out
    assert lora_state.out.endswith("- lr is 0 in group 0: a step moves no weight until a scheduler or you set lr\n")


def on_a_terminal(command: list[str], stream: str, **environment: str) -> tuple[bytes, bytes]:
    """What a command that succeeds shows on a terminal, which ``stream`` is, and what it writes to the other stream.

    The terminal is read meanwhile: it holds 4,096 bytes, and a command that has more to say on a slow machine waits.
    """
    controller, end = os.openpty()
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: end}
    with (
        os.fdopen(controller, "rb", buffering=0) as screen,
        subprocess.Popen(command, **streams, env={**os.environ, "TERM": "xterm", **environment}) as run,
    ):
        os.close(end)
        shown = b""
        with contextlib.suppress(OSError):  # no process has the other end any more
            while part := screen.read(1 << 16):
                shown += part
        out, err = run.communicate(timeout=60)
    assert run.returncode == 0, (shown, out, err)
    return shown, out or err or b""


def test_colours_are_for_terminals(converted: Path) -> None:
    def shown(**environment: str) -> bytes:
        return on_a_terminal([*COMMAND, "inspect", str(converted)], "stdout", **environment)[0]

    assert b"\x1b[1m" in shown()
    assert b"\x1b" not in shown(NO_COLOR="1")
    assert b"\x1b" not in shown(TERM="dumb")
    plain = subprocess.run(
        [*COMMAND, "inspect", converted], env={**os.environ, "LC_ALL": "C"}, capture_output=True, check=True
    )
    assert plain.stdout.isascii()
    assert b"\x1b" not in plain.stdout


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
    assert "\n  slot        parameters  kind          bytes       rms   largest  zeros\n" in lora_state.out
    assert " update\n" in lora_state.out


def test_names_from_files_are_printed_harmlessly(lora_state: Output, tmp_path: Path) -> None:
    path = odd(tmp_path / "a.safetensors", "a\x1b[2Jb\nc", "{0}.3.\u202e")
    assert lora_state("inspect", path) == 0
    assert r"  a\x1b[2Jb\nc " in lora_state.out
    assert r"  {0}.*.\u202e " in lora_state.out
    assert lora_state("inspect", path, "--tree") == 0
    assert r"a\x1b[2Jb\nc [2]" in lora_state.out
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
    ("arguments", "command", "message"),
    [
        (["inspect"], " inspect", "Missing argument 'PATH'."),
        (["inspect", "a", "b"], " inspect", "Got unexpected extra argument (b)"),
        (["nosuch"], "", "No such command 'nosuch'."),
        (["convert", "--nosuch"], " convert", "No such option '--nosuch'."),
        (
            ["export", "a", "b", "--slot", "x", "--slot", "y"],
            " export",
            "one --slot a file, not 2: run the command once for each of x, y",
        ),
    ],
)
def test_usage(lora_state: Output, arguments: list[str], command: str, message: str) -> None:
    assert lora_state(*arguments) == 2
    assert lora_state.err == f"error: {message}\n  Try 'lora-state{command} --help' for help.\n"


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


def test_progress_is_shown_on_a_terminal_only(founding: Founding, tmp_path: Path) -> None:
    # A bar comes up after a second; so that it is seen here, at once.
    code = "from lora_state_format import cli; cli.PATIENCE = 0.0; cli.main()"
    arguments = ["convert", str(founding.path), str(tmp_path / "a.safetensors"), "--json"]
    shown, out = on_a_terminal([sys.executable, "-c", code, *arguments], "stderr")
    assert json.loads(out)["written"] is True
    assert b"converting" in shown


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
    rank = config["r"]
    assert (problem["kind"], problem["title"], len(problem["items"])) == (
        "shape",
        f"of another shape (392; the rank is {2 * rank} in the model and {rank} in the file):",
        392,
    )
    assert problem["hints"] == [
        "--mismatch resize cuts and pads the moments, for weights that were cut and padded alike",
        "--mismatch fresh lets these parameters start without state",
    ]
    assert lora_state("check", founding.path, "--model", tmp_path) == 1
    assert lora_state.out.splitlines()[-2:] == [f"hint: {hint}" for hint in problem["hints"]]
    assert lora_state("check", founding.path, "--model", tmp_path, "--mismatch", "resize") == 0
    assert lora_state.out.startswith("fits: 392/392 parameters would be restored\n")


def test_check_takes_the_base_from_another_folder(lora_state: Output, founding: Founding, tmp_path: Path) -> None:
    founding.model.config.save_pretrained(tmp_path)
    assert lora_state("check", founding.path, "--base", tmp_path) == 0
    assert lora_state.out == "fits: 392/392 parameters would be restored\n"
    assert lora_state("check", founding.path, "--model", tmp_path / "nosuch") == 3
    assert lora_state.err == f"error: {tmp_path}/nosuch: no such folder of a model's configs\n"


def test_check_compares_the_class_that_it_is_told(lora_state: Output, founding: Founding, tmp_path: Path) -> None:
    founding.model.config.save_pretrained(tmp_path)
    told = ["check", founding.path, "--base", tmp_path, "--into"]
    assert lora_state(*told, "torch.optim.AdamW") == 0
    assert lora_state.out == "fits: 392/392 parameters would be restored\n"
    assert lora_state(*told, "torch.optim.SGD") == 1
    assert lora_state.out == (
        "optimizer state does not fit: 392 parameters saved, 392 in the optimizer\n"
        "  written by torch.optim.adamw.AdamW, and the optimizer is torch.optim.sgd.SGD:\n"
        "    SGD never reads exp_avg, exp_avg_sq, step\n"
        "    SGD keeps momentum_buffer, which the file does not have\n"
        "    no translation from AdamW into SGD is known\n"
        "hint: --mismatch-class fresh lets the parameters whose state does not serve start without state\n"
    )
    assert lora_state(*told, "torch.optim.SGD", "--mismatch-class", "fresh") == 0
    assert lora_state.out.startswith("fits: 0/392 parameters would be restored\n")
    assert lora_state(*told, "bitsandbytes.optim.AdamW8bit", "--mismatch-class", "translate") == 0
    assert lora_state.out == (
        "fits: 392/392 parameters would be restored\n"
        "from torch.optim.adamw.AdamW into bitsandbytes.optim.adamw.AdamW8bit: what both keep is laid out anew; "
        "moments are quantised as AdamW8bit is configured to keep them\n"
    )
    assert lora_state(*told, "AdamW") == 2
    assert lora_state.err == "error: 'AdamW' is not the path of a class; pass --into torch.optim.AdamW\n"


def test_check_takes_every_policy_of_a_load_but_values_of_options() -> None:
    """Configs say nothing of an optimizer's groups, so there is nothing that ``options`` could be compared with."""
    policies = {field.name for field in dataclasses.fields(Policies)} - {"options"}
    assert policies <= {option.name for option in commands.commands["check"].params}


# --- every command ------------------------------------------------------------------------------------------------

READERS = {
    "convert": ["{path}", "{target}"],
    "inspect": ["{path}"],
    "diff": ["{path}", "{path}"],
    "check": ["{path}", "--base", "{base}"],
    "export": ["{path}", "{target}", "--slot", "exp_avg"],
    "edit": ["{path}", "{target}", "--set", "lr=0.5"],
    "rename": ["{path}", "{target}", "--rename", "default", "other"],
    "reset": ["{path}", "{target}", "--match", "q_proj"],
    "strip": ["{path}", "{target}", "--slot", "exp_avg"],
    "prune": ["{path}", "{target}", "--match", "q_proj"],
}
"""Every command that reads a checkpoint of any format, and what it needs."""


@pytest.mark.parametrize("command", READERS)
def test_what_says_how_to_read_is_taken_by_all(
    command: str, lora_state: Output, founding: Founding, tmp_path: Path
) -> None:
    founding.model.config.save_pretrained(tmp_path / "base")
    alone = shutil.copy(founding.path / "optimizer.pt", tmp_path)
    (tmp_path / "adapter_config.json").write_text((founding.path / "adapter_config.json").read_text())
    names = tmp_path / "names.txt"
    names.write_text("\n".join(founding.slots))
    filled = [
        text.format(path=alone, target=tmp_path / "t.safetensors", base=tmp_path / "base") for text in READERS[command]
    ]
    told = ["--from", "torch_optimizer", "--names", names, "--optimizer", "torch.optim.adamw.AdamW"]
    assert lora_state(command, *filled, *told) == 0, lora_state.err


@pytest.mark.parametrize("command", ["demo", "completion", *READERS, "verify", "formats"])
def test_every_help_has_examples(command: str, lora_state: Output) -> None:
    assert lora_state(command, "--help") == 0
    assert "\n  Examples:\n    " in lora_state.out
    examples = lora_state.out.partition("Examples:")[2]
    assert f"lora-state {command}" in examples
    assert max(map(len, examples.splitlines())) <= 80
    assert "--traceback" in lora_state.out


def test_an_error_as_json(lora_state: Output, tmp_path: Path) -> None:
    assert lora_state("inspect", tmp_path / "nosuch", "--json") == 3
    assert json.loads(lora_state.out) == {
        "schema_version": 1,
        "error": {
            "type": "FileNotFoundError", "message": f"{tmp_path}/nosuch: no such file or folder", "exit_code": 3,
        },
    }  # fmt: skip
    assert lora_state("convert", "--json") == 2
    assert json.loads(lora_state.out)["error"]["type"] == "MissingParameter"


def test_a_traceback_on_request(lora_state: Output, tmp_path: Path) -> None:
    assert lora_state("inspect", tmp_path / "nosuch", "--traceback") == 3
    first, *_, last = lora_state.err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert last == f"error: {tmp_path}/nosuch: no such file or folder"


@pytest.mark.parametrize("command", READERS)
def test_a_path_that_is_not_there(command: str, lora_state: Output, founding: Founding, tmp_path: Path) -> None:
    founding.model.config.save_pretrained(tmp_path / "base")
    gone = tmp_path / "nosuch"
    filled = [
        text.format(path=gone, target=tmp_path / "t.safetensors", base=tmp_path / "base") for text in READERS[command]
    ]
    assert lora_state(command, *filled) == 3
    assert lora_state.err == f"error: {gone}: no such file or folder\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, lora_state: Output) -> None:
    assert lora_state("completion", shell) == 0
    assert "_LORA_STATE_COMPLETE" in lora_state.out
    words = {"COMP_WORDS": "lora-state convert --from torch_", "COMP_CWORD": "torch_" if shell == "fish" else "3"}
    environment = {**os.environ, "_LORA_STATE_COMPLETE": f"{shell}_complete", **words}
    result = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, check=False)
    assert "torch_optimizer" in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("path", [".", "..", "/"])
@pytest.mark.parametrize("command", [*READERS, "verify"])
def test_a_folder_by_dots(command: str, path: str, lora_state: Output, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    filled = [text.format(path=path, target="t.safetensors", base=path) for text in READERS.get(command, ["{path}"])]
    assert lora_state(command, *filled) in {3, 4}
    assert lora_state.err.startswith(f"error: {path}: ")


def test_the_current_folder_is_a_checkpoint(
    lora_state: Output, founding: Founding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(founding.path)
    assert lora_state("convert", ".", tmp_path / "a.safetensors") == 0
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    assert lora_state("verify", "../a.safetensors") == 0


def test_convert_needs_a_base_that_is_there(lora_state: Output, founding: Founding, tmp_path: Path) -> None:
    target = tmp_path / "b.ckpt"
    base = tmp_path / "nosuch.ckpt"
    assert lora_state("convert", founding.path, target, "--to", "lightning", "--base", base) == 3
    assert lora_state.err == f"error: {base}: no such file or folder to take the rest from\n"


def test_prune_does_not_take_all(lora_state: Output, converted: Path, tmp_path: Path) -> None:
    assert lora_state("prune", converted, tmp_path / "t.safetensors", "--match", ".") == 2
    assert lora_state.err == "error: prune: '.' matches all 392 parameters, and nothing would be left\n"
    assert not (tmp_path / "t.safetensors").exists()


DRAW = ["report", "{path}", "-o", "{out}"]


@pytest.mark.parametrize(
    ("missing", "arguments", "needs", "install"),
    [
        ("torch", ["convert", "{full}", "{out}"], "names from configs need 'torch'", "torch transformers peft"),
        (
            "transformers",
            ["check", "{full}"],
            "names from configs need transformers and peft",
            "torch transformers peft",
        ),
        (
            "matplotlib",
            ["report", "{path}", "-o", "{out}"],
            "a report needs matplotlib and jinja2",
            "matplotlib jinja2",
        ),
        ("jinja2", ["report", "{path}", "-o", "{out}"], "a report needs matplotlib and jinja2", "matplotlib jinja2"),
        ("torch", ["demo"], "the demo needs 'torch'", "torch transformers peft accelerate"),
    ],
)
def test_what_is_not_installed_is_said_in_one_line(
    missing: str, arguments: list[str], needs: str, install: str, founding: Founding, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    shutil.copy(founding.path / "optimizer.pt", full)
    founding.model.config.save_pretrained(full)
    filled = [text.format(full=full, path=founding.path, out=tmp_path / "out") for text in arguments]
    code = f"import sys; sys.modules[{missing!r}] = None; from lora_state_format.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code, *filled], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (2, f"error: {needs}: pip install {install}\n")


def test_libraries_do_not_speak_first(founding: Founding, tmp_path: Path) -> None:
    """What transformers and others say while they are imported stays off the terminal, warnings too."""
    founding.model.config.save_pretrained(tmp_path / "base")
    code = (
        "import logging, sys, warnings\n"
        "from lora_state_format import cli\n"
        "def build(*arguments):\n"
        "    logging.getLogger('torchao').warning('Skipping import of cpp extensions')\n"
        "    warnings.warn('old kernels', FutureWarning)\n"
        "    return real(*arguments)\n"
        "from lora_state_format.torch import rebuild\n"
        "real, rebuild.rebuild = rebuild.rebuild, build\n"
        "cli.main()"
    )
    arguments = ["check", str(founding.path), "--base", str(tmp_path / "base")]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.stdout == "fits: 392/392 parameters would be restored\n"
    assert result.stderr == ""


WRITES = {command: arguments for command, arguments in READERS.items() if "{target}" in arguments}
READ = "tensor 'base_model.model.model.layers.27.mlp.down_proj.lora_B.default.weight/exp_avg_sq' does not match "
SOURCE = f"error: {READ}the digest in the file that it comes from [R21]\n"


@pytest.mark.parametrize("command", [*READERS, "report", "verify"])
def test_a_changed_header_is_a_digest_that_does_not_match(
    command: str, lora_state: Output, converted: Path, founding: Founding, tmp_path: Path
) -> None:
    founding.model.config.save_pretrained(tmp_path / "base")
    shutil.copy(founding.path / "adapter_config.json", tmp_path)
    damaged = tmp_path / "a.safetensors"
    data = bytearray(converted.read_bytes())
    data[200] ^= 1
    damaged.write_bytes(data)
    arguments = {**READERS, "report": ["{path}", "-o", "{target}"], "verify": ["{path}"]}[command]
    filled = [text.format(path=damaged, target=tmp_path / "t", base=tmp_path / "base") for text in arguments]
    assert lora_state(command, *filled) == 1
    message = (
        f"{damaged}: the header does not match its digest: it was changed after it was written; take a copy that "
        "`verify` accepts [R9]\n"
    )
    assert (lora_state.err, lora_state.out) in [(f"error: {message}", ""), ("", message)]
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "{path}", "--stats"],
        ["report", "{path}", "-o", "{target}"],
        ["report", "{good}", "-o", "{target}", "--compare", "{path}"],
        ["export", "{path}", "{target}", "--slot", "exp_avg_sq"],
        *([command, *rest] for command, rest in WRITES.items() if command != "export"),
    ],
    ids=lambda arguments: "-".join(word.strip("{}-") for word in arguments[:4]),
)
def test_a_changed_tensor_is_found_by_whatever_reads_it(
    arguments: list[str], lora_state: Output, converted: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "a.safetensors"
    data = bytearray(converted.read_bytes())
    data[-20] ^= 1
    damaged.write_bytes(data)
    filled = [text.format(path=damaged, good=converted, target=tmp_path / "t") for text in arguments]
    assert lora_state(*filled) == 1
    assert (lora_state.out, lora_state.err.replace("lora_B.other", "lora_B.default")) == ("", SOURCE)
    assert not (tmp_path / "t").exists()


def test_a_flipped_bit_in_an_archive(lora_state: Output, founding: Founding, tmp_path: Path) -> None:
    """An archive whose own checksum is broken is malformed: 3, as for every container."""
    folder = shutil.copytree(founding.path, tmp_path / "checkpoint-3")
    data = bytearray((folder / "optimizer.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "optimizer.pt").write_bytes(data)
    assert lora_state("convert", folder, tmp_path / "a.safetensors") == 3
    assert lora_state.err.startswith(f"error: {folder}/optimizer.pt: optimizer/data/")
    assert lora_state.err.endswith(" does not have the CRC-32 that the container states: the file is damaged\n")
    assert not (tmp_path / "a.safetensors").exists()


GONE = [
    "verify {gone}",
    "inspect {gone} --recursive",
    "report {gone} -o {target}",
    "prune-checkpoints {gone} --keep 1",
    "names {gone}",
    "check {good} --model {gone} --base {base}",
    "check {good} --base {gone}",
    "convert {gone} {target} --latest",
    "convert {alone} {target} --names {gone}",
    "verify {good} --weights {gone}",
    "report {good} -o {target} --weights {gone}",
    "report {good} -o {target} --compare {gone}",
]
"""Paths that commands take, those of ``READERS`` and of ``convert --base`` aside."""


@pytest.mark.parametrize("command", GONE)
def test_whatever_is_not_there_is_named(
    command: str, lora_state: Output, converted: Path, founding: Founding, tmp_path: Path
) -> None:
    founding.model.config.save_pretrained(tmp_path / "base")
    alone = shutil.copy(founding.path / "optimizer.pt", tmp_path)
    gone = tmp_path / "nosuch"
    paths = {"gone": gone, "good": converted, "alone": alone, "target": tmp_path / "t", "base": tmp_path / "base"}
    assert lora_state(*command.format(**paths).split()) == 3
    assert re.fullmatch(rf"error: {gone}: (?:[Nn]o such [^/]+|not a file or folder)\n", lora_state.err), lora_state.err
    assert not (tmp_path / "t").exists()


def test_a_folder_without_what_is_looked_for(lora_state: Output, converted: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert lora_state("verify", converted, "--weights", empty) == 3
    assert lora_state.err == (
        f"error: {empty}: no weights in this folder; looked for adapter_model.safetensors, adapter_model.bin, "
        "model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json, "
        "pytorch_model_fsdp.bin\n"
    )
    assert lora_state("inspect", empty, "--recursive") == 3
    assert lora_state.err == f"error: {empty}: no checkpoint of a known format here or in the folders below\n"
    assert lora_state("names", empty) == 4
    assert lora_state.err == f"error: {empty}: has no config.json, which describes the model\n"


def test_the_newest_checkpoint_of_a_checkpoint(lora_state: Output, founding: Founding, tmp_path: Path) -> None:
    assert lora_state("convert", founding.path, tmp_path / "t", "--latest") == 3
    assert lora_state.err == f"error: {founding.path}: a checkpoint itself, and no folder in it is a newer one\n"


@pytest.mark.parametrize("command", READERS)
def test_what_is_not_known_is_usage(
    command: str, lora_state: Output, converted: Path, founding: Founding, tmp_path: Path
) -> None:
    """Exit code 2 for a class, a rule, a format, a map, an option of a format and a flag that do not exist."""
    founding.model.config.save_pretrained(tmp_path / "base")
    shutil.copy(founding.path / "adapter_config.json", tmp_path)
    state = shutil.copy(converted, tmp_path)
    paths = {"path": state, "target": tmp_path / "t", "base": tmp_path / "base"}
    filled = [text.format(**paths) for text in READERS[command]]
    for told in ("--optimizer nosuch", "--rule nosuch", "--from nosuch", "--map nosuch", "--option no=1", "--nosuch"):
        assert lora_state(command, *filled, *told.split()) == 2, told
        assert lora_state.err.startswith("error: "), told
    assert lora_state(command, *filled, "--optimizer", "nosuch") == 2
    assert lora_state.err == (
        "error: 'nosuch' is neither the path of a class nor a rule; the rules are: adam, adamw, adam_uncorrected, "
        "adamw_uncorrected, adamax, sgd, lion, adagrad, adadelta, rmsprop, adafactor; pass --optimizer "
        "torch.optim.AdamW\n"
    )
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("command", ["rename", "check"])
@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (["(", "x"], "'(' is not a regular expression: missing ), unterminated subpattern at position 0"),
        (["q_proj", r"\9"], r"rename: '\9' cannot replace 'q_proj': invalid group reference 9 at position 1"),
    ],
)
def test_a_rule_of_renaming_that_cannot_be_followed(
    command: str, pair: list[str], message: str, lora_state: Output, converted: Path, founding: Founding, tmp_path: Path
) -> None:
    founding.model.config.save_pretrained(tmp_path / "base")
    rest = ["--model", founding.path, "--base", tmp_path / "base"] if command == "check" else [tmp_path / "t"]
    assert lora_state(command, converted, *rest, "--rename", *pair) == 2
    assert lora_state.err == f"error: {message}\n"


@pytest.mark.parametrize("named", ["adamw", "torch.optim.AdamW", "torch.optim.adamw.AdamW"])
def test_a_class_is_written_by_its_full_path(
    named: str, lora_state: Output, founding: Founding, tmp_path: Path
) -> None:
    assert lora_state("convert", founding.path, tmp_path / "t.safetensors", "--optimizer", named) == 0
    with lsf.open_state(tmp_path / "t.safetensors") as state:
        assert [found.class_path for found in state.optimizers] == ["torch.optim.adamw.AdamW"]
    assert lora_state("inspect", tmp_path / "t.safetensors", "--optimizer", named) == 0
    assert lora_state("inspect", tmp_path / "t.safetensors", "--optimizer", "sgd") == 2
    assert lora_state.err == (
        f"error: {tmp_path}/t.safetensors: the optimizer is torch.optim.adamw.AdamW, not torch.optim.sgd.SGD\n"
    )


def test_an_optimizer_that_is_not_known(lora_state: Output, founding: Founding, tmp_path: Path) -> None:
    arguments = ("convert", founding.path, tmp_path / "o.safetensors", "--to", "mlx", "--map", "mlx_lm")
    assert lora_state(*arguments, "--optimizer", "nosuch") == 2, lora_state.err
    assert "nosuch" in lora_state.err
