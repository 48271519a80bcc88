"""Run readers of the format against every vector; README.md next to this file has the protocol.

``python spec/conformance/run.py`` runs the readers of ``readers.json`` that this machine has and prints their matrix;
``python spec/conformance/run.py -- COMMAND...`` runs another one. The exit code is 1 if a reader failed a vector.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

FOLDER: Final = Path(__file__).resolve().parent
ROOT: Final = FOLDER.parent.parent
VECTORS: Final = FOLDER.parent / "vectors"
SECONDS: Final = 120
"""How long a reader may take for all vectors."""

PASSED: Final = "pass"
NOT_VERIFIED: Final = "not verified"
"""The reader gave the right state and says that it compared no digests of tensors, as R21 allows."""


class Vector(NamedTuple):
    """A vector: its name, whether it is valid, the path to open, and its description."""

    name: str
    valid: bool
    path: Path
    description: dict[str, Any]

    @property
    def rule(self) -> str:
        """Return the rule that it breaks, or "valid"."""
        return "valid" if self.valid else str(self.description["rule"])


class Reader(NamedTuple):
    """A reader under test: its name, its language, and the command that gets the paths."""

    name: str
    language: str
    command: tuple[str, ...]
    build: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """Return the program or the module of Python that this machine lacks, or None."""
        programs = [command[0] for command in (self.build, self.command) if command]
        lacking = [p for p in programs if "/" not in p and shutil.which(p) is None]
        return next(iter([*lacking, *(module for module in self.needs if find_spec(module) is None)]), None)


def vectors() -> list[Vector]:
    """Return every vector, the valid ones first, by name."""
    found = []
    for kind in ("valid", "invalid"):
        for description in sorted((VECTORS / kind).glob("*.json")):
            folder = description.with_suffix("")
            path = folder / "optimizer.safetensors" if folder.is_dir() else description.with_suffix(".safetensors")
            text = json.loads(description.read_text(encoding="utf-8"))
            found.append(Vector(description.stem, kind == "valid", path, text))
    return found


def readers() -> list[Reader]:
    """Return the readers of ``readers.json``; ``python`` in a command is this interpreter."""
    described = json.loads((FOLDER / "readers.json").read_text(encoding="utf-8"))
    found = []
    for reader in described:
        commands = {key: tuple(reader.get(key, ())) for key in ("command", "build")}
        commands = {key: tuple(sys.executable if p == "python" else p for p in c) for key, c in commands.items()}
        found.append(Reader(reader["name"], reader["language"], **commands, needs=tuple(reader.get("needs", ()))))
    return found


# --- what a reader has to say ----------------------------------------------------------------------------------------


def canonical(value: Any) -> str:
    """Return a text that is the same for equal typed values: numbers by type, mappings without order."""
    return json.dumps(ordered(value), sort_keys=True)


def ordered(value: Any) -> Any:
    """Return a typed value with its ``$dict`` in one order, or as an object where it may be one."""
    if isinstance(value, list):
        return [ordered(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"$dict"}:
        pairs = [(ordered(key), ordered(item)) for key, item in value["$dict"]]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs):
            return dict(pairs)
        return {"$dict": sorted(([key, item] for key, item in pairs), key=canonical)}
    return {key: ordered(item) for key, item in value.items()}


def expected(vector: Vector) -> dict[str, Any]:
    """Return the state of a valid vector as the protocol has it, with the hashes of bytes for bytes."""
    files = list(vector.description.get("shards", {"": vector.description}).values())
    manifest = files[0]["manifest"]
    groups = [dict(pick(group, "optimizer", "name"), count=0, options=group["options"]) for group in manifest["groups"]]
    for file in files:
        for group, part in zip(groups, file["manifest"]["groups"], strict=True):
            group["count"] += part["count"]
    parameters: dict[int, dict[str, Any]] = {}
    for file in files:
        count = len(file["manifest"]["parameters"])
        positions = file["manifest"].get("set", {}).get("positions", range(count))
        parameters.update(zip(positions, parameters_of(file), strict=True))
    state = {
        "optimizers": [dict(pick(o, "id"), **{"class": o["class"]}) for o in manifest["optimizers"]],
        "groups": groups,
        "parameters": [parameters[position] for position in range(len(parameters))],
        "naming": pick(manifest["naming"], "source", "rule", "details"),
        **pick(manifest, "origin", "extra", "extensions", "global_step"),
    }
    if manifest.get("globals"):
        state["globals"] = bound(manifest["globals"], "$globals", files[0]["tensors"])
    return state


def parameters_of(file: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the parameters of a file."""
    manifest = file["manifest"]
    weights = manifest.get("weights", {"algorithm": None, "values": [None] * len(manifest["parameters"])})
    for parameter, digest in zip(manifest["parameters"], weights["values"], strict=True):
        found = pick(parameter, "name", "dtype", "adapter", "tied", "keys", "id")
        tree = None if parameter["state"] is None else manifest["states"][parameter["state"]]
        found |= {"shape": parameter["shape"], "slots": bound(tree, parameter["name"], file["tensors"])}
        yield found if digest is None else {**found, "weights": [weights["algorithm"], *digest]}


def pick(members: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return these members, without those that are absent or empty."""
    return {name: members[name] for name in names if members.get(name) not in (None, [], {})}


def bound(value: Any, owner: str, tensors: dict[str, Any]) -> Any:
    """Return a slot tree with its labels bound to tensors."""
    if isinstance(value, list):
        return [bound(item, owner, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        key = f"{owner}/{value['$tensor']}"
        return {"$tensor": key, "role": value["role"], **tensors[key]}
    return {key: bound(item, owner, tensors) for key, item in value.items()}


def hashed(value: Any) -> Any:
    """Return what a reader said with the hashes of bytes for bytes."""
    if isinstance(value, list):
        return [hashed(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        data = bytes.fromhex(value["data"])
        return {k: v for k, v in value.items() if k != "data"} | {"sha256": hashlib.sha256(data).hexdigest()}
    return {key: hashed(item) for key, item in value.items()}


def judged(vector: Vector, said: Any) -> str:
    """Return the verdict on what a reader said of a vector: ``PASSED``, ``NOT_VERIFIED``, or what is wrong."""
    if not isinstance(said, dict):
        return "no line of JSON: the reader failed"
    if not vector.valid:
        rule, kind = vector.description["rule"], vector.description["kind"]
        if (said.get("rule"), said.get("kind")) == (rule, kind):
            return PASSED
        if vector.description.get("verify") and said.get("verified") is False:
            return NOT_VERIFIED
        found = f"{said['rule']} ({said.get('kind')})" if "rule" in said else "accepted"
        return f"expected {rule} ({kind}), found: {found}"
    if "state" not in said:
        return f"refused: {said.get('message', said.get('rule'))}"
    try:
        same = canonical(hashed(said["state"])) == canonical(expected(vector))
    except (KeyError, TypeError, ValueError) as error:
        return f"a state that is not as the protocol has it: {error!r}"
    if not same:
        return "another state"
    known = {file["manifest"]["digests"]["algorithm"] for file in
             vector.description.get("shards", {"": vector.description}).values()} == {"xxh3-128"}  # fmt: skip
    if said.get("verified") is True:
        return PASSED if known else "verified, by an algorithm that version 1.0 does not know"
    return (NOT_VERIFIED if known else PASSED) if said.get("verified") is False else "no word about verification"


# --- running ---------------------------------------------------------------------------------------------------------


def run(reader: Reader, cases: Sequence[Vector]) -> dict[str, str]:
    """Return a reader's verdict for each vector; where one ends the reader, go on behind it."""
    if reader.build:
        subprocess.run(reader.build, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    verdicts: dict[str, str] = {}
    left = list(cases)
    while left:
        paths = [str(case.path) for case in left]
        done = subprocess.run([*reader.command, *paths], cwd=ROOT, stdout=subprocess.PIPE, timeout=SECONDS, check=False)
        lines = done.stdout.decode("utf-8", "replace").split("\n")[:-1][
            : len(left)
        ]  # not splitlines: names have U+2028
        said = [parsed(line) for line in lines]
        if len(said) < len(left):
            said.append(None)  # it ended while it read this one
        elif done.returncode != int(any(isinstance(each, dict) and "rule" in each for each in said)):
            said[-1] = None  # an exit code that is not as the protocol has it
        verdicts |= {label(case): judged(case, each) for case, each in zip(left, said, strict=False)}
        left = left[len(said) :]
    return verdicts


def label(vector: Vector) -> str:
    """Return a vector's name with its folder."""
    return f"{'valid' if vector.valid else 'invalid'}/{vector.name}"


def parsed(line: str) -> Any:
    """Return a line's JSON, or None."""
    try:
        return json.loads(line)
    except ValueError:
        return None


# --- showing ---------------------------------------------------------------------------------------------------------


def cell(verdicts: list[str]) -> str:
    """Return how many of the vectors of a row passed."""
    good = sum(verdict in (PASSED, NOT_VERIFIED) for verdict in verdicts)
    silent = sum(verdict == NOT_VERIFIED for verdict in verdicts)
    return f"{good}/{len(verdicts)}" + (f" ({silent} {NOT_VERIFIED})" if silent else "")


def table(cases: Sequence[Vector], results: dict[str, dict[str, str]]) -> str:
    """Return the matrix in Markdown: a row for the valid vectors, one for each rule, and their sum."""
    rules = sorted({case.rule for case in cases} - {"valid"}, key=lambda rule: int(rule[1:]))
    rows = [("valid files", [c for c in cases if c.valid])]
    rows += [(f"{rule} broken", [c for c in cases if c.rule == rule]) for rule in rules]
    rows.append(("**all**", list(cases)))
    lines = [f"| vectors | {' | '.join(results)} |", f"|---|{'---|' * len(results)}"]
    for name, members in rows:
        cells = [cell([verdicts[label(case)] for case in members]) for verdicts in results.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def failures(results: dict[str, dict[str, str]]) -> list[str]:
    """Return a line for each vector that a reader failed."""
    return [
        f"{reader}: {vector}: {verdict}"
        for reader, verdicts in results.items()
        for vector, verdict in verdicts.items()
        if verdict not in (PASSED, NOT_VERIFIED)
    ]


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description="Run readers of the format against every vector.")
    parser.add_argument("--only", action="append", help="the name of a reader in readers.json; can be repeated")
    parser.add_argument("--json", action="store_true", help="print every verdict as JSON instead of the matrix")
    parser.add_argument("--page", type=Path, help="write the matrix into this page, between its two marks")
    parser.add_argument("command", nargs="*", help="after --: the command of another reader")
    arguments = parser.parse_args()
    chosen = [Reader("yours", "", tuple(arguments.command))] if arguments.command else readers()
    chosen = [reader for reader in chosen if not arguments.only or reader.name in arguments.only]
    cases, results = vectors(), {}
    for reader in chosen:
        if (program := reader.missing()) is not None:
            sys.stderr.write(f"{reader.name}: skipped, there is no {program} here\n")
            continue
        results[reader.name] = run(reader, cases)
    sys.stdout.write((json.dumps(results, indent=1) if arguments.json else table(cases, results)) + "\n")
    if arguments.page:
        if len(results) < len(chosen) or arguments.command or arguments.only:
            sys.exit("the page is written only if every reader of readers.json was run")
        start, end = "<!-- matrix -->\n", "<!-- end -->"
        before, _, rest = arguments.page.read_text(encoding="utf-8").partition(start)
        page = f"{before}{start}{table(cases, results)}\n{end}{rest.partition(end)[2]}"
        arguments.page.write_text(page, encoding="utf-8")
    for line in failures(results):
        sys.stderr.write(f"{line}\n")
    return int(bool(failures(results)))


if __name__ == "__main__":
    sys.exit(main())
