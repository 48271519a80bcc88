"""The command line: arguments in, reports out.

What was asked for goes to stdout, everything else to stderr. Imports are late, so that a command pays for what it uses.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from lora_state_format.errors import MissingDependencyError, StateFormatError

if TYPE_CHECKING:
    from lora_state_format.conversion import Progress

__all__ = ["main", "run"]

FINDING = 1
USAGE = 2
UNREADABLE = 3
INTERRUPTED = 130

PATH = click.Path(path_type=Path)


def main() -> NoReturn:
    """The command ``lora-state``."""
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
        return _fail(str(error), error.exit_code)
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
        return _fail(_printable(message), UNREADABLE)
    return int(code or 0)


def _fail(message: str, code: int) -> int:
    """Say what is wrong on one line; the lines of a list in the message follow, indented."""
    first, *rest = message.split("\n")
    click.echo(f"error: {_printable(first)}", err=True)
    for line in rest:
        click.echo(f"  {_printable(line.strip())}", err=True)
    return code


def _say(*lines: str) -> None:
    for line in lines:
        click.echo(_printable(line))


def _printable(text: str) -> str:
    """The text on one line, with nothing in it that a terminal would act on: names come out of files."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _say_json(members: Any) -> None:
    import json

    click.echo(json.dumps(members, indent=2))


@contextlib.contextmanager
def _progress(label: str) -> Iterator[Progress | None]:
    """A bar on stderr, if that is a terminal."""
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
@click.version_option(package_name="lora_state_format")
def commands() -> None:
    """Optimizer state keyed by parameter name, in safetensors."""


def _list_rules(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    if value == "list" and not context.resilient_parsing:
        from lora_state_format.order import RULES

        _say(*(f"{rule.name}: {rule.summary}" for rule in RULES))
        context.exit()
    return value


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, with a schema_version.")
_from = click.option("--from", "source_format", metavar="FORMAT", help="Format of the source; `lora-state formats`.")


@commands.command()
@click.argument("source", type=PATH)
@click.argument("target", type=PATH)
@_from
@click.option("--to", "target_format", metavar="FORMAT", default="named", show_default=True, help="Format to write.")
@click.option(
    "--names",
    type=PATH,
    help="Take names from: a file with one name a line in optimizer order, an adapter file, a folder with configs.",
)
@click.option(
    "--rule", metavar="RULE", is_eager=True, callback=_list_rules,
    help="How the optimizer's groups were made; `--rule list` shows the rules.",
)  # fmt: skip
@click.option("--optimizer", metavar="CLASS", help="Class path of the optimizer, where the file does not say it.")
@click.option("--force", is_flag=True, help="Replace the target if it exists.")
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@_json
def convert(source: Path, target: Path, as_json: bool, **options: Any) -> None:
    """Convert the checkpoint SOURCE into the file TARGET, keyed by parameter name."""
    from lora_state_format.conversion import convert

    with _progress(f"converting {_printable(source.name)}") as progress:
        report = convert(source, target, progress=progress, **options)
    for warning in report.warnings:
        click.echo(f"warning: {_printable(warning)}", err=True)
    if as_json:
        _say_json(report.to_json())
    else:
        _say(*str(report).split("\n"))


@commands.command()
@click.argument("path", type=PATH)
@_from
@click.option("--stats", is_flag=True, help="Read every tensor: magnitudes, zeros, what is not finite.")
@_json
def inspect(path: Path, source_format: str | None, stats: bool, as_json: bool) -> None:
    """Show what a checkpoint of any known format holds; no tensor is read without --stats."""
    from lora_state_format import registry, report

    converter = registry.get(source_format) if source_format else registry.detect(path)[0]
    state = converter.read(path).state
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
@_json
def verify(path: Path, as_json: bool) -> int:
    """Read every byte of a named state and compare every digest."""
    from lora_state_format.container import verify
    from lora_state_format.report import SCHEMA_VERSION

    found = verify(path)
    if as_json:
        _say_json({"schema_version": SCHEMA_VERSION, "path": str(path), "ok": found.ok, **vars(found)})
    else:
        _say(*found.problems)
        if found.unverified:
            _say(f"{path}: {len(found.unverified)} tensors not verified: their digests are of an unknown algorithm")
        if found.ok:
            _say(f"{path}: every digest matches; {found.tensors} tensors, {found.size:,} bytes")
    return 0 if found.ok else FINDING


@commands.command()
@_json
def formats(as_json: bool) -> None:
    """List the formats that can be read and written."""
    from lora_state_format import registry
    from lora_state_format.report import SCHEMA_VERSION

    converters = [(name, registry.get(name)) for name in registry.names()]
    rows = [(name, c.DESCRIPTION, hasattr(c, "write")) for name, c in converters]
    if as_json:
        members = [{"name": name, "description": text, "writes": writes} for name, text, writes in rows]
        _say_json({"schema_version": SCHEMA_VERSION, "formats": members})
    else:
        width = max(len(name) for name, _, _ in rows)
        _say(*(f"{name:{width}}  {'read, write' if w else 'read       '}  {text}" for name, text, w in rows))


@commands.command()
def demo() -> int:
    """Train a small LoRA model, convert its checkpoint, rebuild the model, resume it, and compare."""
    try:
        from lora_state_format.torch.demo import demonstrate
    except ImportError as error:
        raise MissingDependencyError(f"the demo needs '{error.name}': pip install 'lora_state_format[demo]'") from error
    return 0 if demonstrate(_say) else FINDING
