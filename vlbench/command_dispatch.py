"""A command, `VERB key=value ...`: run the verb, print its help, turn errors into lines."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator

from vlbench.errors import EnvironmentFailure, UserError, suggest_name
from vlbench.printable_streams import show_control_characters
from vlbench.process_settings import prefer_expandable_segments, preserve_process_settings
from vlbench.program_help import HELP_FLAGS, program_help
from vlbench.stop_signals import StopSignalHandler, unwind_on_stop_signals
from vlbench.system_errors import explain_system_error
from vlbench.text_files import split_lines
from vlbench.verbs import VERBS


def run_command(argv: list[str] | None = None) -> int:
    """Run the verb in `argv` (default: the command line) and return the exit code.

    The settings of the process are as before when it returns.
    """
    _fill_closed_streams()
    with (
        unwind_on_stop_signals() as stop_signals,
        preserve_process_settings(),
        escape_unencodable_output(),
        show_control_characters(),
        silence_pil_logging(),
    ):
        return _run_reporting_errors(argv, stop_signals)


def _fill_closed_streams() -> None:
    """Open the null device where a stream is closed: the next file would get its number."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _run_reporting_errors(argv: list[str] | None, stop_signals: StopSignalHandler) -> int:
    try:
        with stop_signals.explain_broken_imports():
            code = dispatch_verb(sys.argv[1:] if argv is None else argv)
        if sys.stdout is not None:  # None where it is closed
            sys.stdout.flush()  # here, where a closed pipe is handled
        return code
    except (UserError, EnvironmentFailure) as error:
        for line in split_lines(str(error)):
            _report_line(line)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one line for all processes of a machine
            _report_line("interrupted")
        return 130
    except Exception as error:
        return _exit_code_of(error)


def _exit_code_of(error: Exception) -> int:
    """Return the exit code for what the system refuses to a user; any other error goes on."""
    if isinstance(error, OSError) and _is_output_lost(error):
        return 1
    explained = explain_system_error(error)
    if explained is None:
        raise error
    _report_line(str(explained))
    return 2 if isinstance(explained, UserError) else 1


def _is_output_lost(error: OSError) -> bool:
    """Tell whether standard output cannot be written; say why, unless its reader has left."""
    name = getattr(sys.stdout, "name", None)  # None where it is closed, or replaced by a program
    if name is None or error.filename != name:
        return False
    if not isinstance(error, BrokenPipeError):
        _report_line(f"standard output cannot be written ({error.strerror})")
    _discard_output(1)
    return True


def _discard_output(descriptor: int) -> None:
    """Let nothing be left to be written at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _report_line(line: str) -> None:
    """Print a line on standard error, if anybody can read it."""
    try:
        print(f"vlbench: {line}", file=sys.stderr, flush=True)
    except OSError:
        _discard_output(2)


@contextlib.contextmanager
def escape_unencodable_output() -> Iterator[None]:
    """Write a character that the terminal's encoding lacks as its escaped code point."""
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            if not stream.closed:
                stream.reconfigure(errors=errors)


@contextlib.contextmanager
def silence_pil_logging() -> Iterator[None]:
    """Keep PIL's log messages off the terminal; what is wrong with an image is a UserError."""
    handler = logging.NullHandler()
    logging.getLogger("PIL").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("PIL").removeHandler(handler)


def dispatch_verb(argv: list[str]) -> int:
    """Call the verb that the first word names with the others."""
    if len(argv) > 1 and argv[0] in HELP_FLAGS:  # `help fit` is `fit --help`
        argv = [argv[1], HELP_FLAGS[0]]
    if not argv or argv[0] in HELP_FLAGS:
        print(program_help())
        return 0 if argv else 2
    if argv[0] == "--version":
        from vlbench import __version__

        print(f"vlbench {__version__}")
        return 0
    if argv[0] not in VERBS:
        verbs = ", ".join(VERBS)
        raise UserError(f"no verb '{argv[0]}'; verbs: {verbs}.{suggest_name(argv[0], VERBS)}")
    if any(word in HELP_FLAGS[:2] for word in argv[1:]):
        print(verb_help(argv[0]))
        return 0
    prefer_expandable_segments()
    return VERBS[argv[0]].run_verb(argv[1:])


def verb_help(verb_name: str) -> str:
    """Return the help of one verb: its usage, and tables of all keys that it takes."""
    from vlbench.command_line.declarations import DECLARATIONS
    from vlbench.command_line.parser import declared_arguments
    from vlbench.text_tables import format_table

    verb, declaration = VERBS[verb_name], DECLARATIONS.get(verb_name)
    specs = list(declared_arguments(declaration).values()) if declaration else []
    required = [spec.usage for spec in specs if spec.is_required]
    if verb.takes_recipe_keys and "recipe=" not in " ".join(required):
        required.insert(0, "recipe=NAME")
    optional = [spec.metavar for spec in specs if spec.is_positional and not spec.is_required]
    usage = [*required, *(f"[{word} ...]" for word in [*optional, "KEY=VALUE"])]
    lines = [
        f"usage: python -m vlbench {verb_name} {' '.join(usage)}",
        "",
        f"{verb.summary[0].upper()}{verb.summary[1:]}.",
        "",
        f"Example: python -m vlbench {verb_name} {verb.example}",
    ]
    headings = ("key", "type", "default", "meaning")
    if specs:
        lines += ["", *format_table([headings, *(spec.help_row() for spec in specs)])]
    if verb.takes_recipe_keys:
        from vlbench.config.key_table import key_rows

        title = f"Keys of recipes, which {verb_name} takes too:" if specs else "Keys of recipes:"
        lines += ["", title, "", *format_table([headings, *key_rows()])]
    return "\n".join(lines)
