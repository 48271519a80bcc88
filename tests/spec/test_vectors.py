"""The text, the vectors, the schema and the two readers say the same."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import jsonschema
import pytest
import safetensors

from lora_state_format.errors import DigestError, FileError, RefusedError, UnsupportedVersionError
from lora_state_format.format import envelope, reading, values, writing
from lora_state_format.io import safetensors as header
from lora_state_format.io import strict_json
from lora_state_format.io.strict_json import dumps, loads
from lora_state_format.model.sources import File

ROOT: Final = Path(__file__).parents[2]
SPEC: Final = ROOT / "spec"
TEXT: Final = (SPEC / "format.md").read_text(encoding="utf-8")
RULES: Final = re.findall(r"^\*\*([RW][0-9]+)\. ", TEXT, flags=re.MULTILINE)
KINDS: Final = {DigestError: "digest", UnsupportedVersionError: "unsupported", RefusedError: "unsupported"}

VALID: Final = sorted((SPEC / "vectors" / "valid").glob("*.json"))
INVALID: Final = sorted((SPEC / "vectors" / "invalid").glob("*.json"))


def name_of(path: Path) -> str:
    return path.stem


def target(path: Path) -> Path:
    """What to open for a vector."""
    folder = path.with_suffix("")
    return folder / "optimizer.safetensors" if folder.is_dir() else path.with_suffix(".safetensors")


def expected(path: Path) -> Any:
    return loads(path.read_text(encoding="utf-8"))


# --- the text -----------------------------------------------------------------------------------------------------


def test_rules_are_numbered_in_order() -> None:
    assert [rule for rule in RULES if rule[0] == "R"] == [f"R{n + 1}" for n in range(26)]
    assert [rule for rule in RULES if rule[0] == "W"] == [f"W{n + 1}" for n in range(16)]


def test_must_stands_in_rules_only() -> None:
    _, _, behind_conventions = TEXT.partition("## 2. Terms")
    paragraphs = re.split(r"\n{2,}", behind_conventions)
    with_must = [p for p in paragraphs if re.search(r"\bMUST\b", p)]
    assert len(with_must) >= 10
    assert [p for p in with_must if not re.match(r"\*\*[RW][0-9]+\. ", p)] == []


def test_every_rule_has_a_vector_and_every_vector_a_rule() -> None:
    cited = {expected(path)["rule"] for path in INVALID}
    assert cited == {rule for rule in RULES if rule[0] == "R"}


def test_the_code_cites_every_rule_and_no_other() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "lora_state_format").rglob("*.py"))
    raised = set(re.findall(r'"(R[0-9]+)"', code)) | set(re.findall(r"\[(R[0-9]+)\]", code))
    assert raised == {rule for rule in RULES if rule[0] == "R"}
    mentioned = set(re.findall(r"\b([RW][0-9]+)\b", (ROOT / "spec" / "reader.py").read_text(encoding="utf-8")))
    assert mentioned == {rule for rule in RULES if rule[0] == "R"}


def test_every_writers_rule_is_cited_where_it_is_kept_or_tested() -> None:
    files = [*(ROOT / "lora_state_format").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    cited = {rule for path in files for rule in re.findall(r"\b(W[0-9]+)\b", path.read_text(encoding="utf-8"))}
    assert cited >= {rule for rule in RULES if rule[0] == "W"}


def test_limits_of_the_text_are_those_of_the_code() -> None:
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| ([0-9,]+)", TEXT, flags=re.MULTILINE))
    stated = {name: int(value.replace(",", "")) for name, value in rows.items()}
    modules = (strict_json, values, header, envelope, writing)
    held = {
        name: getattr(module, name)
        for module in modules
        for name in vars(module)
        if re.match(r"(MAX_|ALIGNMENT$|SHARD_HEADER$)", name)
    }
    assert stated == held


def test_the_example_of_the_text_is_a_vector() -> None:
    section = TEXT[TEXT.index("## 11. ") : TEXT.index("## 12. ")]
    (block,) = re.findall(r"```json\n(.*?)```", section, flags=re.DOTALL)
    found = expected(SPEC / "vectors" / "valid" / "example.json")
    assert loads(block) == found["manifest"]
    assert found["digest"] in section


# --- the vectors --------------------------------------------------------------------------------------------------


def test_there_are_vectors_and_more_of_the_invalid() -> None:
    assert len(VALID) >= 25
    assert len(INVALID) >= 250


def test_vectors_are_as_they_were_written(load_module: Callable[[Path], ModuleType]) -> None:
    made = load_module(ROOT / "tests" / "spec" / "make_vectors.py").rendered()
    folder = SPEC / "vectors"
    stored = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert sorted(made) == sorted(stored)
    changed = [name for name, data in made.items() if stored[name] != data]
    assert not changed, "a change of a vector is a change of the format"


@pytest.mark.parametrize("path", VALID, ids=name_of)
def test_valid(path: Path, spec_reader: ModuleType, plain_states: ModuleType, tmp_path: Path) -> None:
    found = expected(path)
    with reading.open_state(target(path)) as state:
        for file, part in found["shards"].items() if "shards" in found else [(target(path).name, found)]:
            compare_file(target(path).with_name(file), part)
        other = spec_reader.read(target(path))
        assert plain_states.of_state(state) == plain_states.of_other(other, spec_reader)
        result = reading.verify(target(path))
        assert result.ok
        assert bool(result.unverified) == (path.stem == "unknown-algorithm")
        if found["canonical"]:
            files = [file for file in target(path).parent.iterdir() if "shards" in found or file == target(path)]
            writing.write(state, tmp_path / target(path).name, max_shard_size=80 if "shards" in found else None)
            assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
                file.name: file.read_bytes() for file in files
            }


def compare_file(path: Path, found: dict[str, Any]) -> None:
    """A file is what its description says, and safetensors opens it."""
    end = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    head = json.loads(path.read_bytes()[8:end])
    envelope = loads(head["__metadata__"]["optimizer_state"])
    assert envelope["digest"] == found["digest"]
    assert dumps(envelope["manifest"]) == dumps(found["manifest"])
    with File(path) as file:
        tensors = header.read_header(file).tensors
        assert {
            key: {"dtype": t.dtype, "shape": list(t.shape), "sha256": hashlib.sha256(t.bytes()).hexdigest()}
            for key, t in tensors.items()
        } == found["tensors"]
    with safetensors.safe_open(path, framework="numpy") as opened:
        assert set(opened.keys()) == set(tensors)
        assert {key: list(opened.get_slice(key).get_shape()) for key in tensors} == {
            key: list(t.shape) for key, t in tensors.items()
        }


@pytest.mark.parametrize("path", INVALID, ids=name_of)
def test_invalid(path: Path, spec_reader: ModuleType) -> None:
    found = expected(path)
    if found.get("verify"):  # opens, and is found by reading every byte; the second reader says that it did not
        (problem,) = reading.verify(target(path)).problems
        assert problem.endswith(f"[{found['rule']}]")
        spec_reader.read(target(path))
        return
    with pytest.raises((FileError, DigestError)) as caught:
        reading.open_state(target(path))
    assert isinstance(caught.value, (FileError, DigestError))
    kind = KINDS.get(caught.type, "malformed")
    assert (caught.value.rule, kind) == (found["rule"], found["kind"]), str(caught.value)
    assert str(caught.value).startswith(str(caught.value.path))
    assert str(caught.value).isprintable()
    with pytest.raises(spec_reader.Refused) as refused:
        spec_reader.read(target(path))
    assert (refused.value.args[0], refused.value.args[2]) == (found["rule"], found["kind"])


# --- the schema ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schema() -> Any:
    text = json.loads((SPEC / "manifest.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(text)
    return jsonschema.Draft202012Validator(text)


def test_the_schema_accepts_what_is_valid(schema: Any) -> None:
    count = 0
    for path in VALID:
        found = expected(path)
        for part in found.get("shards", {"": found}).values():
            if part["manifest"]["version"] == "1.0":
                schema.validate(part["manifest"])
                count += 1
    assert count >= 25


def test_the_schema_refuses_what_it_can(schema: Any) -> None:
    verdicts = {}
    for path in INVALID:
        found = expected(path)
        if "schema" in found:
            raw = path.with_suffix(".safetensors").read_bytes()
            head = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
            members = json.loads(head["__metadata__"]["optimizer_state"])["manifest"]
            assert schema.is_valid(members) != found["schema"], path.stem
            verdicts[path.stem] = found["schema"]
    assert sum(verdicts.values()) >= 100
    assert sum(not verdict for verdict in verdicts.values()) >= 30


# --- the second reader --------------------------------------------------------------------------------------------


def test_the_second_reader_is_short_and_stands_alone() -> None:
    source = (SPEC / "reader.py").read_text(encoding="utf-8")
    assert source.count("\n") <= 200
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    assert imported <= sys.stdlib_module_names


def test_the_second_reader_as_a_command() -> None:
    path = SPEC / "vectors" / "valid" / "never-stepped.safetensors"
    done = subprocess.run([sys.executable, SPEC / "reader.py", path], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "never [2] None (not verified)",
        "without [2] {} (not verified)",
        "zero [2] {'momentum': Slot(key='zero/momentum', role='param')} (not verified)",
    ]


# --- beside safetensors -------------------------------------------------------------------------------------------


ENTRY: Final = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


def packed(header: str, data: bytes = b"x") -> bytes:
    raw = header.encode()
    return len(raw).to_bytes(8, "little") + raw + data


@pytest.mark.parametrize(
    ("header", "rule"),
    [
        (f" {{{ENTRY}}}", "R2"),
        (f"{{{ENTRY}}}\n\t", "R2"),
        (f"{{{ENTRY},{ENTRY}}}", "R3"),
        (f'{{"__metadata__":{{"k":"a","k":"b"}},{ENTRY}}}', "R3"),
        ('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"more":1}}', "R4"),
        ('{"a":["U8",[1],[0,1]]}', "R4"),
        (f'{{"__metadata__":null,{ENTRY}}}', "R4"),
        (f'{{"a":{{"dtype":"U8","shape":[{",".join("1" * 65)}],"data_offsets":[0,1]}}}}', "R4"),
        (f'{{"__metadata__":{{"format":"pt"}},{ENTRY}}}', "R7"),
        (f"{{{ENTRY}}}{' ' * (32 << 20)}", "R1"),
    ],
    ids=["space", "newline", "tensor twice", "metadata twice", "member", "array", "null", "axes", "metadata", "length"],
)
def test_what_safetensors_opens_and_this_format_refuses(header: str, rule: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(packed(header))
    with safetensors.safe_open(path, framework="numpy") as opened:
        assert list(opened.keys()) == ["a"]
    with pytest.raises(FileError) as caught:
        reading.open_state(path)
    assert caught.value.rule == rule


@pytest.mark.parametrize("name", ["alignment", "digest-of-changed-option", "tensor-changed"])
def test_what_safetensors_opens_of_the_vectors(name: str) -> None:
    path = SPEC / "vectors" / "invalid" / f"{name}.safetensors"
    with safetensors.safe_open(path, framework="numpy") as opened:
        assert list(opened.keys()) == ["w/momentum"]


@pytest.mark.parametrize("path", [path for path in INVALID if expected(path)["rule"] in ("R5", "R6")], ids=name_of)
def test_what_both_refuse(path: Path) -> None:
    with pytest.raises(safetensors.SafetensorError), safetensors.safe_open(target(path), framework="numpy"):
        pass
