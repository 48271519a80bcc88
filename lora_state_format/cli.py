"""The command line: arguments in, reports out.

What was asked for goes to stdout, everything else to stderr. Imports are late, so that a command pays for what it uses.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from lora_state_format import __version__
from lora_state_format.errors import MissingDependencyError, StateFormatError
from lora_state_format.model.text import printable

if TYPE_CHECKING:
    from lora_state_format.model.states import OptimizerState
    from lora_state_format.operations.conversion import Progress
    from lora_state_format.operations.edit import Edited

__all__ = ["main", "run"]

FINDING = 1
USAGE = 2
UNREADABLE = 3
INTERRUPTED = 130

PATH = click.Path(path_type=Path)
SHOWN = 5
"""Names to print of a list that may be long; ``--json`` has them all."""


def main() -> NoReturn:
    """Run the command ``lora-state``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks is no error
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Carry a command out and return its exit code.

    0 done; 1 a finding about a well-formed file; 2 usage; 3 malformed or refused; 4 a conversion stopped by names,
    order or evidence; 130 interrupted.
    """
    try:
        with commands.make_context("lora-state", list(arguments) or ["--help"]) as context:
            code = commands.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as done:
        return done.exit_code
    except StateFormatError as error:
        return _fail(error.on_command_line(), error.exit_code)
    except click.ClickException as error:
        return _fail(error.format_message(), USAGE)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Whoever read stdout has seen enough. Python flushes it once more on the way out; that must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _fail(printable(message), UNREADABLE)
    return int(code or 0)


def _fail(message: str, code: int) -> int:
    """Say what is wrong on one line; the lines of a list in the message follow, indented."""
    first, *rest = message.split("\n")
    click.echo(f"error: {printable(first)}", err=True)
    for line in rest:
        click.echo(f"  {printable(line.strip())}", err=True)
    return code


def _say(*lines: str) -> None:
    for line in lines:
        click.echo(printable(line))


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        click.echo(f"warning: {printable(warning)}", err=True)


def _say_json(members: Any) -> None:
    import json

    click.echo(json.dumps(members, indent=2))


@contextlib.contextmanager
def _progress(label: str) -> Iterator[Progress | None]:
    """Show a bar on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
def commands() -> None:
    """Optimizer state keyed by parameter name, in safetensors."""


def _list_rules(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    if value == "list" and not context.resilient_parsing:
        from lora_state_format.naming.rules import RULES

        _say(*(f"{rule.name}: {rule.summary}" for rule in RULES))
        context.exit()
    return value


def _parse_options(context: click.Context, option: click.Parameter, given: Sequence[str]) -> dict[str, Any]:
    pairs = (text.partition("=") for text in given)
    return {key: _literal(value) if equals else True for key, equals, value in pairs}


def _literal(text: str) -> Any:
    """Return a value as Python writes it; text that is none stands for itself."""
    import ast

    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, with a schema_version.")
_from = click.option("--from", "source_format", metavar="FORMAT", help="Format of the source; `lora-state formats`.")
_names = click.option(
    "--names",
    type=PATH,
    help="Take names from: a file with one name a line in optimizer order, an adapter file, a folder with configs.",
)
_optimizer = click.option(
    "--optimizer",
    metavar="CLASS",
    help="The optimizer's class path, or its rule (adamw), where the file does not say it.",
)
_option = click.option(
    "--option", "options", metavar="KEY[=VALUE]", multiple=True, callback=_parse_options,
    help="What a format has to be told; `lora-state formats` lists it.",
)  # fmt: skip
_map = click.option(
    "--map",
    "layout",
    metavar="MAP",
    help="Names and axes of another library: mlx_lm, flax_nnx, ..., or a file with a map.",
)
_force = click.option("--force", is_flag=True, help="Replace the target if it exists.")


@commands.command()
@click.argument("source", type=PATH)
@click.argument("target", type=click.Path())  # as it is given: a slash at its end means a folder
@_from
@click.option("--to", "target_format", metavar="FORMAT", default="named", show_default=True, help="Format to write.")
@_names
@click.option(
    "--rule", metavar="RULE", is_eager=True, callback=_list_rules,
    help="How the optimizer's groups were made; `--rule list` shows the rules.",
)  # fmt: skip
@_optimizer
@_map
@click.option("--base", type=PATH, help="A checkpoint of the target's format, to take the rest from.")
@_option
@click.option("--dequantize", is_flag=True, help="Decode 8-bit and 4-bit moments to float32; the report says the loss.")
@_force
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@_json
def convert(source: Path, target: str, layout: str | None, as_json: bool, **options: Any) -> None:
    """Convert the checkpoint SOURCE into the file TARGET, keyed by parameter name."""
    from lora_state_format.operations.conversion import convert

    if layout is not None:
        options["options"]["map"] = layout
    with _progress(f"converting {printable(source.name)}") as progress:
        report = convert(source, target, progress=progress, **options)
    _warn(report.warnings)
    if as_json:
        _say_json(report.to_json())
    else:
        _say(*str(report).split("\n"))


@commands.command()
@click.argument("path", type=PATH)
@_from
@_optimizer
@_map
@_option
@click.option("--stats", is_flag=True, help="Read every tensor: magnitudes, zeros, what is not finite.")
@_json
def inspect(
    path: Path,
    source_format: str | None,
    optimizer: str | None,
    layout: str | None,
    options: dict[str, Any],
    stats: bool,
    as_json: bool,
) -> None:
    """Show what a checkpoint of any known format holds; no tensor is read without --stats."""
    from lora_state_format import registry
    from lora_state_format.operations import report

    converter, match = registry.find(path, source_format)
    told = {key: value for key, value in (("optimizer", optimizer), ("map", layout)) if value is not None} | options
    registry.check_options(told, converter)
    state = converter.read(match, told).state
    with contextlib.ExitStack() as stack:
        for resource in state.resources:
            stack.enter_context(resource)
        if as_json:
            members = report.to_json(state, statistics=stats)
            _say_json({**members, "path": str(path), "format": converter.NAME})
        else:
            _say(f"{path} ({converter.NAME})", *report.describe(state, statistics=stats))


@commands.command()
@click.argument("path", type=PATH)
@click.option("--weights", type=PATH, help="Also ask whether the state belongs to these weights: a file or a folder.")
@_json
def verify(path: Path, weights: Path | None, as_json: bool) -> int:
    """Read every byte of a named state and compare every digest.

    With --weights, PATH may be any checkpoint that the weights can name.
    """
    from lora_state_format.format import envelope, reading
    from lora_state_format.operations.report import SCHEMA_VERSION, describe_evidence

    members: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "path": str(path)}
    lines: list[str] = []
    ok = True
    if weights is None or envelope.is_state(path):
        found = reading.verify(path)
        members |= {"ok": found.ok, **vars(found)}
        ok = found.ok
        lines += found.problems
        if found.unverified:
            lines.append(f"{path}: {len(found.unverified)} tensors not verified: no known algorithm made their digests")
        if ok:
            lines.append(f"{path}: every digest matches; {found.tensors} tensors, {found.size:,} bytes")
    if weights is not None and ok:
        from lora_state_format.operations.conversion import belongs

        pairing, evidence = belongs(path, weights)
        if pairing:
            ok = not pairing.differing
            lines.append(f"weights: {pairing.matching}/{pairing.matching + len(pairing.differing)} match by digest")
            lines += [f"weights differ: {name}" for name in pairing.differing[:SHOWN]]
        if evidence:
            ok = ok and evidence.verdict != "contradicted"
            lines += [describe_evidence(evidence.to_json()), *evidence.against, *evidence.notes]
        members["weights"] = pairing and vars(pairing)
        members["evidence"] = evidence and evidence.to_json()
        members["ok"] = ok
    if as_json:
        _say_json(members)
    else:
        _say(*lines)
    return 0 if ok else FINDING


@commands.command()
@click.argument("first", type=PATH)
@click.argument("second", type=PATH)
@_json
def diff(first: Path, second: Path, as_json: bool) -> int:
    """Compare two checkpoints by name, bit for bit, and tell how far their numbers are apart."""
    from lora_state_format.operations.conversion import read
    from lora_state_format.operations.diff import diff
    from lora_state_format.operations.report import SCHEMA_VERSION

    with read(first) as one, read(second) as two:
        found = diff(one, two)
    if as_json:
        _say_json({"schema_version": SCHEMA_VERSION, **found.to_json()})
    else:
        _say(*str(found).split("\n"))
    return FINDING if found else 0


@commands.command()
@click.argument("path", type=PATH)
@click.option("--model", type=PATH, required=True, help="A folder with config.json and, for an adapter, its config.")
@_json
def check(path: Path, model: Path, as_json: bool) -> int:
    """Tell whether a checkpoint would bind to the model of these configs. Nothing is loaded."""
    from lora_state_format.operations.check import check
    from lora_state_format.operations.report import SCHEMA_VERSION

    plan = check(path, model)
    if as_json:
        problems = [
            {"kind": p.kind, "title": p.title, "items": list(p.items), "hints": list(p.hints)} for p in plan.problems
        ]
        members = {"schema_version": SCHEMA_VERSION, "path": str(path), "ok": not plan.problems}
        _say_json({**members, "restored": plan.restored, "parameters": len(plan.bindings), "problems": problems})
    else:
        _say(*str(plan).split("\n"))
    return FINDING if plan.problems else 0


@commands.command()
@click.argument("source", type=PATH)
@click.argument("target", type=PATH)
@click.option("--slot", required=True, help="The slot to take: exp_avg_sq, for example.")
@click.option(
    "--keys", type=click.Choice(["model", "peft"]), default="model", show_default=True,
    help="Keys in the file: the parameters' names, or those of adapter_model.safetensors.",
)  # fmt: skip
@click.option("--unbiased", is_flag=True, help="Divide a moment by 1 - beta**step, as Adam does.")
@click.option("--inverse-root", is_flag=True, help="Write 1 / (sqrt(value) + eps).")
@click.option("--eps", type=float, help="For --inverse-root, in place of the eps of each parameter's group.")
@_from
@_names
@_force
@_json
def export(
    source: Path, target: Path, slot: str, source_format: str | None, names: Path | None, as_json: bool, **options: Any
) -> None:
    """Write one slot of the checkpoint SOURCE into TARGET, a plain safetensors file keyed by parameter."""
    from lora_state_format.operations.conversion import beside_weights, read
    from lora_state_format.operations.export import export
    from lora_state_format.operations.report import SCHEMA_VERSION

    with read(source, source_format=source_format, names=names) as state:
        done = export(state, target, slot, **options)
    _warn(beside_weights(target))
    if as_json:
        _say_json({"schema_version": SCHEMA_VERSION, "source": str(source), "slot": slot, **vars(done)})
    else:
        _say(f"exported {slot} of {done.tensors} parameters from {source} to {done.path}, {done.size:,} bytes")
        if done.without:
            more = "" if len(done.without) < 4 else f" and {len(done.without) - 3} more"
            _say(f"note: {len(done.without)} parameters have no such slot: {', '.join(done.without[:3])}{more}")


# --- housekeeping -------------------------------------------------------------------------------------------------


def _housekeeping(command: Callable[..., None]) -> click.Command:
    """Add what the commands have in common that write a changed state into a new file."""
    for option in (_json, _force, click.argument("target", type=PATH), click.argument("source", type=PATH)):
        command = option(command)
    return commands.command()(command)


def _rewrite(
    source: Path, target: Path, force: bool, as_json: bool, done: str, change: Callable[[OptimizerState], Edited]
) -> None:
    from lora_state_format.format.writing import write
    from lora_state_format.operations.conversion import beside_weights, read
    from lora_state_format.operations.report import SCHEMA_VERSION

    with read(source) as state:
        edited, changed = change(state)
        written = write(edited, target, force=force)
    _warn(beside_weights(target))
    if as_json:
        members = {"source": str(source), "target": written.path, "changed": changed, "digest": written.digest}
        _say_json({"schema_version": SCHEMA_VERSION, **members})
    else:
        _say(f"{done.format(changed)}: {written.path}")


@_housekeeping
@click.option(
    "--set", "settings", multiple=True, required=True, metavar="OPTION=VALUE",
    help="An option and its value as Python writes it: lr=1e-5, betas=(0.9,0.99). May be repeated.",
)  # fmt: skip
@click.option("--group", help="Number or name of the group to change; else every group that has the option.")
def edit(settings: Sequence[str], group: str | None, **options: Any) -> None:
    """Write the state SOURCE to TARGET with other group options."""
    from lora_state_format.operations.edit import set_options

    chosen = int(group) if group and group.isdecimal() else group
    values = dict(map(_setting, settings))
    _rewrite(**options, done="changed {} groups", change=lambda state: set_options(state, values, chosen))
    if "lr" in values:
        click.echo("note: a learning-rate scheduler that is resumed beside this state sets lr again", err=True)


def _setting(text: str) -> tuple[str, Any]:
    import ast

    option, _, value = text.partition("=")
    try:
        return option.strip(), ast.literal_eval(value.strip())
    except (SyntaxError, ValueError) as error:
        raise click.BadParameter(f"{text!r}: write OPTION=VALUE, the value as in Python (strings in quotes)") from error


@_housekeeping
@click.option(
    "--rule", "rules", type=(str, str), multiple=True, required=True, metavar="REGEX REPLACEMENT",
    help="Substitute in every name, as Python's re.sub does. May be repeated; applied in order.",
)  # fmt: skip
def rename(rules: Sequence[tuple[str, str]], **options: Any) -> None:
    """Write the state SOURCE to TARGET with its parameters renamed."""
    from lora_state_format.operations.edit import rename

    _rewrite(**options, done="renamed {} parameters", change=lambda state: rename(state, rules))


@_housekeeping
@click.option("--match", required=True, metavar="REGEX", help="Of these parameters, as Python's re.search finds them.")
def reset(match: str, **options: Any) -> None:
    """Write the state SOURCE to TARGET, some parameters as if they had never taken a step."""
    from lora_state_format.operations.edit import reset

    _rewrite(**options, done="reset {} parameters", change=lambda state: reset(state, match))


@_housekeeping
@click.option("--slot", "slots", multiple=True, required=True, help="The slot to drop. May be repeated.")
def strip(slots: Sequence[str], **options: Any) -> None:
    """Write the state SOURCE to TARGET without some slots."""
    from lora_state_format.operations.edit import strip

    _rewrite(**options, done="dropped {} slots", change=lambda state: strip(state, slots))


@_housekeeping
@click.option("--match", metavar="REGEX", help="Remove these parameters, as Python's re.search finds them.")
@click.option("--carried", is_flag=True, help="Remove the parameters that are in no group.")
def prune(match: str | None, carried: bool, **options: Any) -> None:
    """Write the state SOURCE to TARGET without some parameters."""
    from lora_state_format.operations.edit import prune

    _rewrite(**options, done="removed {} parameters", change=lambda state: prune(state, match, carried=carried))


# --- about the program --------------------------------------------------------------------------------------------


@commands.command()
@_json
def formats(as_json: bool) -> None:
    """List the formats that can be read and written."""
    from lora_state_format import registry
    from lora_state_format.operations.report import SCHEMA_VERSION

    converters = registry.available()
    if as_json:
        members = [
            {
                "name": converter.NAME,
                "description": converter.DESCRIPTION,
                "writes": hasattr(converter, "write"),
                "options": dict(registry.options(converter)),
            }
            for converter in converters
        ]
        _say_json({"schema_version": SCHEMA_VERSION, "formats": members})
        return
    for converter in converters:
        _say(f"{converter.NAME} ({'read, write' if hasattr(converter, 'write') else 'read'}): {converter.DESCRIPTION}")
        _say(*(f"    --option {key}: {meaning}" for key, meaning in registry.options(converter).items()))


@commands.command()
def demo() -> int:
    """Train a small LoRA model, convert its checkpoint, rebuild the model, resume it, and compare."""
    try:
        from lora_state_format.demo import demonstrate
    except ImportError as error:
        raise MissingDependencyError(f"the demo needs '{error.name}': pip install 'lora_state_format[demo]'") from error
    return 0 if demonstrate(_say) else FINDING
