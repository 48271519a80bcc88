"""The command line: arguments in, reports out.

What was asked for goes to stdout, everything else to stderr. Imports are late, so that a command pays for what it uses.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from lora_state_format import __version__
from lora_state_format.errors import (
    FileError,
    MissingDependencyError,
    OptionError,
    Remedy,
    StateFormatError,
    UnknownFormatError,
)
from lora_state_format.model.text import printable

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from lora_state_format.model.states import OptimizerState, PositionalState
    from lora_state_format.operations.conversion import Progress
    from lora_state_format.operations.edit import Edited
    from lora_state_format.operations.overview import Summary
    from lora_state_format.operations.statistics import Statistics

__all__ = ["commands", "main", "run"]

FINDING: Final = 1
USAGE: Final = 2
UNREADABLE: Final = 3
INTERRUPTED: Final = 130

PROGRAM: Final = "lora-state"
COMPLETE: Final = "_LORA_STATE_COMPLETE"
"""The environment variable by which a shell asks for completions."""

PATH: Final = click.Path(path_type=Path)
SHOWN: Final = 5
"""Names to print of a list that may be long; ``--json`` has them all."""

NARROW: Final = 80
"""Columns of text that goes to a pipe or a file."""

GARBAGE: Final = 50_000
"""New objects between two looks for garbage, in place of 700: imports make many and leave none, and 3 ms of 60 go."""

PATIENCE: Final = 1.0
"""Seconds before a progress bar comes up."""


def main() -> NoReturn:
    """Run the command ``lora-state``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks is no error
    if instruction := os.environ.get(COMPLETE):
        from click.shell_completion import shell_complete

        sys.exit(shell_complete(commands, {}, PROGRAM, COMPLETE, instruction))
    gc.set_threshold(GARBAGE)
    if "--traceback" not in sys.argv:
        _silence_libraries()
    sys.exit(run(sys.argv[1:]))


def _silence_libraries() -> None:
    """Keep what libraries say while they are imported (missing kernels, deprecations) from the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    logging.lastResort = None
    logging.getLogger().addHandler(logging.NullHandler())
    logging.getLogger("lora_state_format").addHandler(_OwnWarnings(logging.WARNING))


class _OwnWarnings(logging.Handler):
    """Shows what this package itself warns of."""

    def emit(self, record: logging.LogRecord) -> None:
        _warn([record.getMessage()])


def run(arguments: Sequence[str]) -> int:
    """Carry a command out.

    Args:
        arguments: The command line after the program's name.

    Returns:
        The exit code: 0 done; 1 a finding about a well-formed file; 2 usage; 3 malformed or refused; 4 a conversion
        stopped by names, order or evidence; 130 interrupted.
    """
    fail = functools.partial(_fail, arguments)
    try:
        with commands.make_context(PROGRAM, list(arguments) or ["--help"]) as context:
            code = commands.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as done:
        return done.exit_code
    except StateFormatError as error:
        return fail(error, error.on_command_line(), error.exit_code)
    except click.ClickException as error:
        return fail(error, error.format_message() + _try(error), USAGE)
    except KeyboardInterrupt as error:
        return fail(error, "interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Whoever read stdout has seen enough. Python flushes it once more on the way out; that must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return fail(error, printable(message), UNREADABLE)
    return int(code or 0)


def _fail(arguments: Sequence[str], error: BaseException, message: str, code: int) -> int:
    """Say what is wrong on one line; the lines of a list in the message follow, indented."""
    if "--traceback" in arguments:
        import traceback

        traceback.print_exception(error)
    first, *rest = message.split("\n")
    click.echo(f"error: {printable(first)}", err=True)
    for line in rest:
        click.echo(f"  {printable(line.strip())}", err=True)
    if "--json" in arguments:
        members = {"type": type(error).__name__, "message": message, "exit_code": code}
        _say_json({"schema_version": _schema_version(), "error": members})
    return code


def _schema_version() -> int:
    from lora_state_format.operations.report import SCHEMA_VERSION

    return SCHEMA_VERSION


def _try(error: click.ClickException) -> str:
    """Return where a usage error's command explains itself."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"\nTry '{context.command_path} --help' for help." if context else ""


def _say(*lines: str) -> None:
    for line in lines:
        click.echo(printable(line))


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        click.echo(f"warning: {printable(warning)}", err=True)


def _say_json(members: Mapping[str, Any]) -> None:
    import json

    click.echo(json.dumps(members, indent=2))


def _styled(text: str, **style: Any) -> str:
    """Return text as a terminal shows it; as it is where stdout is none, or NO_COLOR is set."""
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return click.style(text, **style) if coloured else text


class _Bar:
    """A progress bar on stderr that comes up after ``PATIENCE`` seconds."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._shown: Any = None
        self._task: Any = None
        self._timer = threading.Timer(PATIENCE, self._start)
        self._timer.daemon = True
        self._timer.start()

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._shown = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._shown.add_task(self._label, total=None)
        self._shown.start()

    def update(self, done: int, total: int) -> None:
        if self._task is not None:
            self._shown.update(self._task, completed=done, total=total)

    def stop(self) -> None:
        self._timer.cancel()
        self._timer.join()
        if self._shown is not None:
            self._shown.stop()


@contextlib.contextmanager
def _progress(label: str) -> Iterator[Progress | None]:
    """Show that work goes on, if stderr is a terminal; what is yielded may be told how much is done of how much."""
    if not sys.stderr.isatty():
        yield None
        return
    bar = _Bar(printable(label))
    try:
        yield bar.update
    finally:
        bar.stop()


# --- commands and their options -----------------------------------------------------------------------------------


class _Command(click.Command):
    """A command that takes ``--traceback``, and whose examples are shown as they are."""

    def __init__(self, *arguments: Any, examples: str = "", **members: Any) -> None:
        members["epilog"] = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples.splitlines())
        super().__init__(*arguments, **members)
        self.params.append(
            click.Option(["--traceback"], is_flag=True, expose_value=False, help="Show where an error was raised.")
        )


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nExamples:\n  lora-state inspect checkpoint-300\n"
    "  lora-state convert checkpoint-300 optimizer.safetensors\n"
    "  lora-state check checkpoint-300 --model ./model",
)
@click.version_option(__version__)
@click.option("--traceback", is_flag=True, expose_value=False, help="Show where an error was raised.")
def commands() -> None:
    """Optimizer state keyed by parameter name, in safetensors."""


def _command(*, examples: str, **members: Any) -> Callable[[Callable[..., Any]], click.Command]:
    return commands.command(cls=_Command, examples=examples, **members)


def _list_rules(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    if value == "list" and not context.resilient_parsing:
        from lora_state_format.naming.rules import RULES

        _say(*(f"{rule.name}: {rule.summary}" for rule in RULES))
        context.exit()
    return value


def _complete_formats(context: click.Context, option: click.Parameter, typed: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from lora_state_format import registry

    return [CompletionItem(name) for name in registry.names() if name.startswith(typed)]


def _complete_rules(context: click.Context, option: click.Parameter, typed: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from lora_state_format.naming.rules import RULES

    return [CompletionItem(rule.name, help=rule.summary) for rule in RULES if rule.name.startswith(typed)]


def _parse_options(context: click.Context, option: click.Parameter, given: Sequence[str]) -> dict[str, Any]:
    pairs = (text.partition("=") for text in given)
    return {key: _literal(value) if equals else True for key, equals, value in pairs}


def _parse_store(context: click.Context, option: click.Parameter, given: Sequence[str]) -> dict[str, str]:
    pairs = (text.partition("=") for text in given)
    return {key: value for key, _, value in pairs}


def _literal(text: str) -> Any:
    """Parse a Python literal; return other text unchanged."""
    import ast

    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, with a schema_version; errors too.")
_latest = click.option("--latest", is_flag=True, help="Take the newest checkpoint in the folder of a run.")
_force = click.option("--force", is_flag=True, help="Replace the target if it exists.")
_match = click.option("--match", metavar="REGEX", help="Only parameters whose names this regular expression finds.")
_rename = click.option(
    "--rename", type=(str, str), multiple=True, metavar="REGEX REPLACEMENT",
    help="Substitute in every name, as Python's re.sub does. May be repeated; applied in order.",
)  # fmt: skip

READING: Final = (
    click.option(
        "--from", "source_format", metavar="FORMAT", shell_complete=_complete_formats,
        help="Format of the source; `lora-state formats` lists them.",
    ),
    click.option(
        "--names", type=PATH, multiple=True,
        help="Take names from: a file with one name a line in optimizer order, a file of weights, a folder with "
        "configs. May be given twice: names, and the weights that show their shapes.",
    ),
    click.option(
        "--rule", metavar="RULE", is_eager=True, callback=_list_rules, shell_complete=_complete_rules,
        help="How the optimizer's groups were made; `--rule list` shows the rules.",
    ),
    click.option(
        "--trainable", metavar="REGEX", multiple=True,
        help="Which parameters were trained, if names come from a model's configs and not all were. May be repeated.",
    ),
    click.option(
        "--optimizer", metavar="CLASS",
        help="The optimizer's class path, or its rule (adamw), where the file does not say it.",
    ),
    click.option(
        "--map", "layout", metavar="MAP",
        help="Names and axes of another library: mlx_lm, flax_nnx, ..., or a file with a map.",
    ),
    click.option(
        "--option", "options", metavar="KEY[=VALUE]", multiple=True, callback=_parse_options,
        help="Set a format-specific option; see `lora-state formats`. May be repeated.",
    ),
)  # fmt: skip
"""How to read a source: the same for every command that reads one."""


def _reading(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of ``READING``; it gets them as one argument, ``reading``."""

    @functools.wraps(command)
    def gathered(
        source_format: str | None,
        names: tuple[Path, ...],
        rule: str | None,
        trainable: tuple[str, ...],
        optimizer: str | None,
        layout: str | None,
        options: dict[str, Any],
        **others: Any,
    ) -> Any:
        told = {"map": layout, **options} if layout is not None else options
        reading = {
            "source_format": source_format, "names": names or None, "rule": rule, "trainable": trainable,
            "optimizer": optimizer, "options": told,
        }  # fmt: skip
        return command(reading=reading, **others)

    gathered.__click_params__ = [*getattr(command, "__click_params__", ()), *_reading_options()]  # type: ignore[attr-defined]
    return gathered


@functools.cache
def _reading_options() -> list[click.Parameter]:
    """Return the options of ``READING``, which all commands share: to make 70 more takes 2 ms of 60."""

    def carrier() -> None:
        """Take the options."""

    for option in reversed(READING):
        option(carrier)
    found: list[click.Parameter] = carrier.__click_params__  # type: ignore[attr-defined]
    return found


# --- convert ------------------------------------------------------------------------------------------------------


@_command(
    examples="lora-state convert checkpoint-300 optimizer.safetensors\n"
    "lora-state convert optimizer.pt optimizer.safetensors --names names.txt\n"
    "lora-state convert global_step300 optimizer.safetensors\n"
    "lora-state convert optimizer.safetensors optimizer.pt --to torch_optimizer"
)
@click.argument("source", type=PATH)
@click.argument("target", type=click.Path())  # as it is given: a slash at its end means a folder
@_reading
@click.option(
    "--to", "target_format", metavar="FORMAT", default="named", show_default=True, shell_complete=_complete_formats,
    help="Format to write.",
)  # fmt: skip
@click.option("--base", type=PATH, help="A checkpoint of the target's format, to take the rest from.")
@click.option("--dequantize", is_flag=True, help="Decode 8-bit and 4-bit moments to float32; the report says the loss.")
@click.option(
    "--store", metavar="SLOT=BF16", multiple=True, callback=_parse_store, help="Round a slot; lossy, and said so."
)
@_force
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@_latest
@_json
def convert(source: Path, target: str, reading: dict[str, Any], latest: bool, as_json: bool, **options: Any) -> None:
    """Convert the checkpoint SOURCE into the file TARGET, keyed by parameter name."""
    from lora_state_format import registry
    from lora_state_format.operations.conversion import convert

    source = registry.latest(source) if latest else source
    with _progress(f"converting {source.name}") as progress:
        report = convert(source, target, progress=progress, **reading, **options)
    _warn(report.warnings)
    if as_json:
        _say_json(report.to_json())
    else:
        _say(*str(report).split("\n"))


# --- looking ------------------------------------------------------------------------------------------------------


def _survey(path: Path, as_json: bool) -> int:
    """Print every checkpoint below a folder; return the exit code: a finding where one cannot be read or named."""
    from lora_state_format.operations.report import SCHEMA_VERSION
    from lora_state_format.operations.survey import survey

    found = survey(path)
    first = next(found, None)
    if first is None:
        raise UnknownFormatError(f"{path}: no checkpoint of a known format here or in the folders below")
    failed = False
    members = []
    for checkpoint in chain([first], found):
        failed |= checkpoint.reason is not None
        if as_json:
            members.append(checkpoint.to_json())
        else:
            _say(*str(checkpoint).split("\n"))
    if as_json:
        _say_json({"schema_version": SCHEMA_VERSION, "checkpoints": members})
    return FINDING if failed else 0


@_command(
    examples="lora-state inspect checkpoint-300\n"
    "lora-state inspect optimizer.safetensors --match q_proj --parameters\n"
    "lora-state inspect checkpoint-300 --stats --parameters --sort update\n"
    "lora-state inspect optimizer.safetensors --markdown > state.md"
)
@click.argument("path", type=PATH)
@_reading
@_match
@click.option("--parameters", "every", is_flag=True, help="One row for each parameter.")
@click.option(
    "--sort", type=click.Choice(["order", "name", "size", "step", "update"]), default="order", show_default=True,
    help="Order of the rows of --parameters; update needs --stats.",
)  # fmt: skip
@click.option("--tree", "as_tree", is_flag=True, help="The modules as a tree.")
@click.option("--stats", is_flag=True, help="Read every tensor: sizes, zeros, what is odd.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print Markdown.")
@click.option(
    "--recursive", is_flag=True,
    help="List every checkpoint below PATH, with where its names come from; ends with 1 if one cannot be read or "
    "named.",
)  # fmt: skip
@_latest
@_json
def inspect(
    path: Path,
    reading: dict[str, Any],
    match: str | None,
    every: bool,
    sort: str,
    as_tree: bool,
    stats: bool,
    as_markdown: bool,
    recursive: bool,
    latest: bool,
    as_json: bool,
) -> int:
    """Show what a checkpoint of any known format holds; no tensor is read without --stats."""
    from lora_state_format import registry
    from lora_state_format.operations import overview, report
    from lora_state_format.operations.entries import matching
    from lora_state_format.operations.look import look

    if recursive:
        return _survey(path, as_json)
    path = registry.latest(path) if latest else path
    if sort == "update" and not stats:
        raise click.UsageError("--sort update needs --stats", click.get_current_context())
    with contextlib.ExitStack() as stack:
        with _progress(f"reading {path.name}"):
            found = look(path, whole=stats, **reading)
            for resource in found.state.resources:
                stack.enter_context(resource)
        state = found.state if match is None else matching(found.state, match)
        statistics = _measured(state, path.name) if stats else None
        unnamed = found.why_unnamed(path, on_command_line=True)
        if as_json:
            members = report.to_json(state, statistics)
            _say_json({**members, "path": str(path), "format": found.source_format, "unnamed": unnamed or None})
            return 0
        title = f"{path} ({found.source_format})"
        if as_tree:
            _say(title, *overview.tree(state))
            return 0
        summary = overview.summary(state, statistics, unnamed=unnamed)
        if every:
            short = sys.stdout.isatty() and not as_markdown
            summary = replace(summary, tables=(overview.parameter_rows(state, statistics, sort, short=short),))
    if as_markdown:
        _say_markdown(title, summary)
    else:
        _say_summary(title, summary, None if every and not sys.stdout.isatty() else _width())
    return 0


def _measured(state: OptimizerState | PositionalState, name: str) -> Statistics:
    from lora_state_format.operations.statistics import measure

    with _progress(f"measuring {name}") as progress:
        return measure(state, progress)


def _say_markdown(title: str, summary: Summary) -> None:
    from lora_state_format.operations import tables

    facts = tables.Table(title, ("", ""), summary.facts)
    _say_lines(*(line for table in (facts, *summary.tables) for line in (*tables.markdown(table), "")))
    _say_lines(*(f"- {printable(str(finding))}" for finding in summary.findings))


def _say_summary(title: str, summary: Summary, width: int | None) -> None:
    from lora_state_format.operations import tables

    bold = functools.partial(_styled, bold=True)
    _say_lines(bold(printable(title)), *tables.facts_text(summary.facts, width, bold))
    for finding in summary.findings:
        lines = tables.wrapped(f"! {printable(str(finding))}", "  ", "    ", width)
        _say_lines(*(_styled(line, fg="yellow") for line in lines))
    for table in summary.tables:
        _say_lines("", *tables.text(table, width, bold))


def _say_lines(*lines: str) -> None:
    """Print lines that are printable already, and may have colours."""
    for line in lines:
        click.echo(line)


def _width() -> int:
    """Return the columns to print on: the terminal's; 80 for a pipe or a file."""
    if not sys.stdout.isatty():
        return NARROW
    import shutil

    return shutil.get_terminal_size((NARROW, 24)).columns


@_command(examples="lora-state verify optimizer.safetensors\nlora-state verify checkpoint-300 --weights checkpoint-300")
@click.argument("path", type=PATH)
@click.option("--weights", type=PATH, help="Also tell whether the state belongs to these weights: a file or a folder.")
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
    if weights is None and path.suffix != ".safetensors" and not envelope.is_state(path):
        from lora_state_format import registry

        with contextlib.suppress(UnknownFormatError, FileError, OSError):  # what is damaged says so below
            converter, _ = registry.find(path)
            if converter.NAME != registry.NAMED:
                raise OptionError(
                    f"{path}: a checkpoint of format '{converter.NAME}' has no digests to verify",
                    remedy=Remedy(
                        "convert it, which checks what its container states, or pass {weights} to ask whether it "
                        "belongs to them",
                        {"weights": ...},
                    ),
                )
    if weights is None or envelope.is_state(path):
        with _progress(f"verifying {path.name}"):
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

        with _progress("comparing with the weights"):
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


@_command(
    examples="lora-state diff checkpoint-200 checkpoint-300\n"
    "lora-state diff optimizer.safetensors checkpoint-300 --json"
)
@click.argument("first", type=PATH)
@click.argument("second", type=PATH)
@_reading
@_match
@_json
def diff(first: Path, second: Path, reading: dict[str, Any], match: str | None, as_json: bool) -> int:
    """Compare two checkpoints by name, bit for bit.

    Options that say how to read a source hold for both; --names and --rule for what has no names of its own.
    """
    from lora_state_format.operations.conversion import read_either
    from lora_state_format.operations.diff import diff
    from lora_state_format.operations.entries import matching
    from lora_state_format.operations.report import SCHEMA_VERSION

    with _progress("comparing"), read_either(first, **reading) as one, read_either(second, **reading) as two:
        found = diff(one, two) if match is None else diff(matching(one, match), matching(two, match))
    if as_json:
        _say_json({"schema_version": SCHEMA_VERSION, **found.to_json()})
    else:
        _say(*str(found).split("\n"))
    return FINDING if found else 0


@_command(
    examples="lora-state check checkpoint-300 --model ./model\n"
    "lora-state check checkpoint-300 --base ./base-model\n"
    "lora-state check checkpoint-300 --model ./wider --mismatch resize\n"
    "lora-state check checkpoint --into torch.optim.Muon --mismatch-class fresh\n"
    "lora-state check checkpoint --missing fresh --rename '\\.old\\.' .new."
)
@click.argument("path", type=PATH)
@click.option(
    "--model", type=PATH, help="A folder with config.json and, for an adapter, its config. Default: PATH's own folder."
)
@click.option("--base", type=PATH, help="The base model's folder with config.json, where --model has the adapter's.")
@_reading
@click.option(
    "--missing", type=click.Choice(["error", "fresh"]), default="error", show_default=True,
    help="For parameters that the checkpoint does not have.",
)  # fmt: skip
@click.option(
    "--unexpected", type=click.Choice(["error", "ignore", "carry"]), default="error", show_default=True,
    help="For state of parameters that do not train in the model.",
)  # fmt: skip
@click.option(
    "--mismatch", type=click.Choice(["error", "fresh", "resize"]), default="error", show_default=True,
    help="For parameters of another shape.",
)  # fmt: skip
@click.option(
    "--into", metavar="CLASS", help="The class path of the optimizer that the state is for; else not compared."
)
@click.option(
    "--mismatch-class", type=click.Choice(["error", "translate", "fresh"]), default="error", show_default=True,
    help="For an optimizer of another class; needs --into.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["saved", "param"]), default="saved", show_default=True, help="Of the moments."
)
@_rename
@_json
def check(
    path: Path,
    model: Path | None,
    base: Path | None,
    reading: dict[str, Any],
    as_json: bool,
    into: str | None,
    rename: Sequence[tuple[str, str]],
    **policies: Any,
) -> int:
    """Tell whether a checkpoint would bind to the model of these configs. Nothing is loaded.

    The policies are those of load_optimizer.
    """
    from lora_state_format.binding.policies import Policies
    from lora_state_format.operations.check import check
    from lora_state_format.operations.report import SCHEMA_VERSION

    with _progress("building the model from its configs"):
        asked = Policies(rename=rename or None, **policies)
        plan = check(path, model, base=base, into=into, policies=asked, **reading)
    if as_json:
        problems = [
            {
                "kind": p.kind,
                "title": p.title,
                "items": list(p.items),
                "hints": [hint.on_command_line() for hint in p.hints],
            }
            for p in plan.problems
        ]
        members = {"schema_version": SCHEMA_VERSION, "path": str(path), "ok": not plan.problems}
        _say_json({**members, "restored": plan.restored, "parameters": len(plan.bindings), "problems": problems})
    else:
        _say(*plan.on_command_line().split("\n"))
    return FINDING if plan.problems else 0


@_command(
    examples="lora-state export checkpoint fisher.safetensors --slot exp_avg_sq\n"
    "lora-state export checkpoint P.safetensors --slot exp_avg_sq --inverse-root\n"
    "lora-state export checkpoint m.safetensors --slot exp_avg --keys peft"
)
@click.argument("source", type=PATH)
@click.argument("target", type=PATH)
@click.option("--slot", "slots", multiple=True, required=True, help="The slot to take: exp_avg_sq, for example.")
@click.option(
    "--keys", type=click.Choice(["model", "peft"]), default="model", show_default=True,
    help="Keys in the file: the parameters' names, or those of adapter_model.safetensors.",
)  # fmt: skip
@click.option("--unbiased", is_flag=True, help="Divide a moment by 1 - beta**step, as Adam does.")
@click.option("--inverse-root", is_flag=True, help="Write 1 / (sqrt(value) + eps).")
@click.option("--eps", type=float, help="For --inverse-root, in place of the eps of each parameter's group.")
@_match
@_reading
@_force
@_json
def export(
    source: Path,
    target: Path,
    slots: Sequence[str],
    match: str | None,
    reading: dict[str, Any],
    as_json: bool,
    **options: Any,
) -> None:
    """Write one slot of the checkpoint SOURCE into TARGET, a plain safetensors file keyed by parameter."""
    from lora_state_format.operations.conversion import beside_weights, read
    from lora_state_format.operations.entries import matching
    from lora_state_format.operations.export import export
    from lora_state_format.operations.report import SCHEMA_VERSION

    if len(slots) > 1:
        raise click.UsageError(
            f"one --slot a file, not {len(slots)}: run the command once for each of {', '.join(slots)}",
            click.get_current_context(),
        )
    (slot,) = slots
    with _progress(f"exporting {slot}"), read(source, **reading) as state:
        done = export(state if match is None else matching(state, match), target, slot, **options)
    _warn(beside_weights(target))
    if as_json:
        _say_json({"schema_version": SCHEMA_VERSION, "source": str(source), "slot": slot, **vars(done)})
    else:
        _say(f"exported {slot} of {done.tensors} parameters from {source} to {done.path}, {done.size:,} bytes")
        if done.without:
            more = "" if len(done.without) < 4 else f" and {len(done.without) - 3} more"
            _say(f"note: {len(done.without)} parameters have no such slot: {', '.join(done.without[:3])}{more}")


@_command(
    examples="lora-state report checkpoint-300 -o report.html\n"
    "lora-state report checkpoint-300 -o report.html --weights checkpoint-300\n"
    "lora-state report checkpoint-300 -o report.html --compare checkpoint-200"
)
@click.argument("path", type=PATH)
@click.option("-o", "--output", "target", type=PATH, required=True, metavar="FILE", help="The HTML file to write.")
@click.option("--compare", type=PATH, help="An earlier checkpoint to compare with.")
@click.option("--weights", type=PATH, help="The parameters' values: a safetensors file, or a folder with one.")
@click.option("--figures", "figures_folder", type=PATH, metavar="DIR", help="Also write the figures as PNG and SVG.")
@_reading
@_force
@_json
def report(path: Path, target: Path, reading: dict[str, Any], as_json: bool, **options: Any) -> None:
    """Draw what a checkpoint holds: one HTML page that needs no network. Needs the extra report."""
    from lora_state_format.operations.page import write_report
    from lora_state_format.operations.report import SCHEMA_VERSION

    with _progress(f"measuring {path.name}") as progress:
        written = write_report(path, target, progress=progress, **reading, **options)
    if as_json:
        _say_json({"schema_version": SCHEMA_VERSION, "source": str(path), "written": list(written)})
    else:
        _say(*(f"wrote {name}" for name in written))


# --- housekeeping -------------------------------------------------------------------------------------------------


def _housekeeping(*, examples: str) -> Callable[[Callable[..., None]], click.Command]:
    """Give a command what all have that write a changed state into a new file."""

    def decorate(command: Callable[..., None]) -> click.Command:
        command = _reading(command)
        for option in (_json, _force, click.argument("target", type=PATH), click.argument("source", type=PATH)):
            command = option(command)
        return _command(examples=examples)(command)

    return decorate


def _rewrite(
    source: Path,
    target: Path,
    reading: dict[str, Any],
    force: bool,
    as_json: bool,
    done: str,
    change: Callable[[OptimizerState], Edited],
) -> None:
    from lora_state_format.format.writing import write
    from lora_state_format.operations.conversion import beside_weights, read
    from lora_state_format.operations.report import SCHEMA_VERSION

    with _progress(f"writing {target.name}"), read(source, **reading) as state:
        edited, changed = change(state)
        written = write(edited, target, force=force)
    _warn(beside_weights(target))
    if as_json:
        members = {"source": str(source), "target": written.path, "changed": changed, "digest": written.digest}
        _say_json({"schema_version": SCHEMA_VERSION, **members})
    else:
        _say(f"{done.format(changed)}: {written.path}")


@_housekeeping(
    examples="lora-state edit a.safetensors b.safetensors --set lr=1e-5\n"
    "lora-state edit a.safetensors b.safetensors --set 'betas=(0.9,0.99)'"
)
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
        click.echo("note: a learning-rate scheduler that is resumed next to this state sets lr again", err=True)


def _setting(text: str) -> tuple[str, Any]:
    import ast

    option, _, value = text.partition("=")
    try:
        return option.strip(), ast.literal_eval(value.strip())
    except (SyntaxError, ValueError) as error:
        raise click.BadParameter(f"{text!r}: write OPTION=VALUE, the value as in Python (strings in quotes)") from error


@_housekeeping(
    examples="lora-state rename a.safetensors b.safetensors --rename 'old\\.' new.",
)
@_rename
def rename(rename: Sequence[tuple[str, str]], **options: Any) -> None:
    """Write the state SOURCE to TARGET with its parameters renamed."""
    from lora_state_format.operations import edit

    if not rename:
        raise click.UsageError("Missing option '--rename'.", click.get_current_context())
    _rewrite(**options, done="renamed {} parameters", change=lambda state: edit.rename(state, rename))


@_housekeeping(examples="lora-state reset a.safetensors b.safetensors --match 'layers\\.2[0-7]\\.'")
@click.option("--match", required=True, metavar="REGEX", help="The parameters, as Python's re.search finds them.")
def reset(match: str, **options: Any) -> None:
    """Write the state SOURCE to TARGET, some parameters as if they had never taken a step."""
    from lora_state_format.operations.edit import reset

    _rewrite(**options, done="reset {} parameters", change=lambda state: reset(state, match))


@_housekeeping(examples="lora-state strip a.safetensors b.safetensors --slot max_exp_avg_sq")
@click.option("--slot", "slots", multiple=True, required=True, help="The slot to drop. May be repeated.")
def strip(slots: Sequence[str], **options: Any) -> None:
    """Write the state SOURCE to TARGET without some slots."""
    from lora_state_format.operations.edit import strip

    _rewrite(**options, done="dropped {} slots", change=lambda state: strip(state, slots))


@_housekeeping(
    examples="lora-state prune a.safetensors b.safetensors --match 'layers\\.27\\.'\n"
    "lora-state prune a.safetensors b.safetensors --carried"
)
@click.option("--match", metavar="REGEX", help="Remove these parameters, as Python's re.search finds them.")
@click.option("--carried", is_flag=True, help="Remove the parameters that are in no group.")
def prune(match: str | None, carried: bool, **options: Any) -> None:
    """Write the state SOURCE to TARGET without some parameters."""
    from lora_state_format.operations.edit import prune

    _rewrite(**options, done="removed {} parameters", change=lambda state: prune(state, match, carried=carried))


@_command(
    examples="lora-state names base-model --rule trainer > names.txt\n"
    "lora-state convert optimizer.pt optimizer.safetensors --names names.txt"
)
@click.argument("folder", type=PATH)
@click.option("--rule", metavar="RULE", default="flat", show_default=True, help="How the optimizer's groups were made.")
@_json
def names(folder: Path, rule: str, as_json: bool) -> None:
    """Print the names of a model's parameters in optimizer order, from the configs in FOLDER."""
    from lora_state_format.naming.order import grouped
    from lora_state_format.operations.conversion import rebuild
    from lora_state_format.operations.report import SCHEMA_VERSION

    groups = grouped(rebuild(folder), rule)
    if as_json:
        _say_json({"schema_version": SCHEMA_VERSION, "folder": str(folder), "rule": rule, "groups": groups})
    else:
        _say(*(name for group in groups for name in group))


# --- about the program --------------------------------------------------------------------------------------------


@_command(examples="lora-state formats")
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


@_command(
    name="prune-checkpoints",
    examples="lora-state prune-checkpoints runs/lora --keep 2 --dry-run\n"
    "lora-state prune-checkpoints runs/lora --keep 2",
)
@click.argument("folder", type=PATH)
@click.option("--keep", type=click.IntRange(min=1), required=True, help="Checkpoints that keep their state: the last.")
@click.option("--legacy", is_flag=True, help="Also optimizer.pt, optimizer.bin and optimizer_N.bin.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed.")
@_json
def prune_checkpoints(folder: Path, keep: int, legacy: bool, dry_run: bool, as_json: bool) -> None:
    """Remove the optimizer's state from all but a run's last checkpoints; weights and all else stay."""
    from lora_state_format.format.rotation import STATE
    from lora_state_format.operations.checkpoints import prune_checkpoints
    from lora_state_format.operations.report import SCHEMA_VERSION

    pruned = prune_checkpoints(folder, keep, legacy=legacy, dry_run=dry_run)
    if not pruned.kept:
        more = "" if legacy else "; --legacy counts optimizer.pt and optimizer.bin too"
        nothing = f"note: nothing to remove: no checkpoint in {folder} has an optimizer's state under {STATE}{more}"
        click.echo(printable(nothing), err=True)
    if as_json:
        members = {"kept": list(map(str, pruned.kept)), "removed": list(map(str, pruned.removed))}
        _say_json({"schema_version": SCHEMA_VERSION, "dry_run": dry_run, **members, "bytes": pruned.size})
    else:
        _say(*str(pruned).split("\n"))


@_command(examples="lora-state demo\nlora-state demo --out demo")
@click.option("--out", type=PATH, metavar="DIR", help="Keep what the demo makes in this folder, which must be new.")
def demo(out: Path | None) -> int:
    """Train a small LoRA model, convert its checkpoint, rebuild the model, resume it, and compare."""
    try:
        from lora_state_format.demo import demonstrate
    except ImportError as error:
        raise MissingDependencyError(
            f"the demo needs '{error.name}': pip install torch transformers peft accelerate"
        ) from error
    return 0 if demonstrate(_say, out) else FINDING


@_command(
    examples='eval "$(lora-state completion bash)"        # in ~/.bashrc\n'
    'eval "$(lora-state completion zsh)"         # in ~/.zshrc\n'
    "lora-state completion fish > ~/.config/fish/completions/lora-state.fish"
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes commands and options in a shell."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(commands, {}, PROGRAM, COMPLETE).source())
