"""What the text says of its example, of readers, of the registry, and what is frozen of it."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest

from lora_state_format import errors, open_state, verify

ROOT: Final = Path(__file__).parent.parent.parent
SPEC: Final = ROOT / "spec"
TEXT: Final = (SPEC / "format.md").read_text(encoding="utf-8")
EXAMPLE: Final = (SPEC / "vectors" / "valid" / "example.safetensors").read_bytes()
FROZEN: Final = {
    "1.0/format.md": "54539e2e9ea4d6f375ca8c970501af2a2b7e5d7325fb228c7ea8e3846e3e91cb",
    "1.0/manifest.schema.json": "9f4ee417f9b199859439d48ad58209c36dac4ff9b41899275e545f72bdb97f69",
}
"""The hashes of what was released; a file is added here when its version is frozen, and no hash is ever changed."""


def rows(text: str, header: str) -> list[list[str]]:
    """Return the cells of the rows of the table under a header."""
    _, _, behind = text.partition(header)
    lines = behind.strip().splitlines()[1:]
    table = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_drawing_is_of_the_example() -> None:
    (drawing,) = re.findall(r"```text\n(.*?)```", TEXT, flags=re.DOTALL)
    found = dict(re.findall(r"^byte ([0-9,]+) +(.*?)(?:  .*)?$", drawing, flags=re.MULTILINE))
    places = {int(at.replace(",", "")): what for at, what in found.items()}
    assert list(places) == [0, 8, 58, 90, 1634, 1664, 1696, 1728]
    for at in (0, 1664, 1696):
        data = bytes.fromhex(places[at].removesuffix(" ..."))
        assert EXAMPLE[at : at + len(data)] == data
    for at in (8, 58):
        assert EXAMPLE[at : at + len(places[at])] == places[at].encode()
    assert EXAMPLE[90:].startswith(places[90].partition("{")[0].encode())
    assert set(EXAMPLE[1634:1664]) == {0x20}
    assert EXAMPLE[1633:1634] == b"}"
    assert len(EXAMPLE) == 1728


# --- the table of implementations ------------------------------------------------------------------------------------

FEATURES: Final = rows(TEXT, "| feature | vectors | lora_state_format | reader.py | readers/js | readers/rust |\n")
READERS: Final = {"spec/reader.py": 3, "readers/js": 4, "readers/rust": 5}


def cited(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_table_of_implementations_is_whole() -> None:
    assert len(FEATURES) >= 25
    names = [name for row in FEATURES for name in cited(row[1])]
    assert all((SPEC / "vectors" / f"{name}.json").is_file() for name in names)
    described = {path.stem for path in (SPEC / "vectors" / "valid").glob("*.json")}
    assert described - {name.removeprefix("valid/") for name in names} == {
        "deep",
        "empty-groups",
        "no-parameters",
        "order-of-entries",
        "set-of-one",
    }


@pytest.mark.parametrize("name", READERS)
def test_what_the_table_says_of_a_reader(name: str, load_module: Callable[[Path], ModuleType]) -> None:
    runner = load_module(SPEC / "conformance" / "run.py")
    (reader,) = [reader for reader in runner.readers() if reader.name == name]
    if reader.missing() is not None:
        pytest.skip(f"there is no {reader.missing()} here")
    wanted = {vector for row in FEATURES for vector in cited(row[1])}
    verdicts = runner.run(reader, [case for case in runner.vectors() if runner.label(case) in wanted])
    for row in FEATURES:
        for vector in cited(row[1]):
            silent = row[READERS[name]] == "not verified" and vector.startswith("invalid/")
            accepted = (
                {"not verified"} if silent else {"pass"} | ({"not verified"} if name == "spec/reader.py" else set())
            )
            assert verdicts[vector] in accepted, (row[0], vector)
            kinds = {"read", "not verified"} if vector.startswith("valid/") else {"refused", "not verified"}
            assert row[READERS[name]] in kinds


def test_what_the_table_says_of_the_package() -> None:
    for row in FEATURES:
        for vector in cited(row[1]):
            path = SPEC / "vectors" / vector
            described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            target = path / "optimizer.safetensors" if path.is_dir() else path.with_suffix(".safetensors")
            if row[2] == "refused" and described.get("verify"):
                assert not verify(target).ok
            elif row[2] == "refused":
                with pytest.raises((errors.FileError, errors.DigestError)):
                    open_state(target)
            else:
                assert row[2] in ("read", "read, written", "not verified")
                with open_state(target):
                    assert bool(verify(target).unverified) == (row[2] == "not verified")
                # tests/test_vectors.py writes those that are canonical, and compares every byte.
                assert described["canonical"] == (row[2] == "read, written"), row[0]


# --- pages next to it -------------------------------------------------------------------------------------------------


def test_the_afternoon_has_every_rule_once() -> None:
    steps = rows((SPEC / "afternoon.md").read_text(encoding="utf-8"), "| step | write | rules | in JavaScript |\n")
    rules = [rule for step in steps for rule in step[2].split()]
    assert sorted(rules, key=lambda rule: int(rule[1:])) == re.findall(r"^\*\*(R[0-9]+)\. ", TEXT, flags=re.MULTILINE)
    for step in steps:
        (file,) = cited(step[3])
        assert (ROOT / "readers" / "js" / "src" / file).is_file()


def test_slots_of_the_registry_are_those_that_optimizers_keep() -> None:
    tried = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
    entered = rows((SPEC / "registry.md").read_text(encoding="utf-8"), "| slot | role | meaning |\n")
    assert len(entered) >= 19
    for names, roles, _ in entered:
        for name in cited(names):
            found = set(re.findall(rf"`{name}` ((?:param|row|col|block|opaque)(?: or \w+)?|F32 scalar|int)", tried))
            kept = {role for each in found for role in each.split(" or ")}
            assert kept
            assert set(cited(roles)) <= kept


def test_frozen_texts_are_not_edited() -> None:
    folder = SPEC / "versions"
    files = {path.relative_to(folder).as_posix(): path for path in folder.glob("*/*")}
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == FROZEN


def test_the_version_of_the_text_is_released_or_being_made() -> None:
    (version,) = re.findall(r"^\| Version \| ([0-9]+\.[0-9]+) \|$", TEXT, flags=re.MULTILINE)
    changes = TEXT[TEXT.index("## 13. Changes") :]
    assert f"- {version}: " in changes
    for frozen in {name.partition("/")[0] for name in FROZEN}:
        assert f"- {frozen}: " in changes
        text = (SPEC / "versions" / frozen / "format.md").read_text(encoding="utf-8")
        assert f"| Version | {frozen} |" in text


@pytest.mark.parametrize(
    "document",
    [
        *("spec/format.md", "spec/registry.md", "spec/afternoon.md", "spec/conformance/README.md"),
        *("spec/versions/README.md", "spec/versions/1.0/format.md", "docs/conformance.md", "docs/readers.md"),
        *("docs/upstream/README.md", "docs/upstream/torchtitan.md", "docs/upstream/hf-lora-state/README.md"),
        *("readers/js/README.md", "readers/rust/README.md", "viewer/README.md"),
    ],
)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert links
    assert missing == []
