"""`python -m vlbench VERB key=value ...`: run a verb, print its help, turn errors into lines."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vlbench.command_line.parser import (
    declared_arguments,
)
from vlbench.errors import EnvironmentFailure, UserError, suggest_name
from vlbench.process_settings import preserve_process_settings
from vlbench.text_files import split_lines
from vlbench.text_tables import format_table

if TYPE_CHECKING:
    pass


from vlbench.verbs import VERBS

HELP_FLAGS = ("--help", "-h", "help")


def main(argv: list[str] | None = None) -> int:
    """Run the verb in `argv` (default: the command line) and return the exit code.

    The settings of the process are as before when it returns.
    """
    with preserve_process_settings(), escape_unencodable_output(), silence_pil_logging():
        return _run_reporting_errors(argv)


def _run_reporting_errors(argv: list[str] | None) -> int:
    try:
        code = dispatch_verb(sys.argv[1:] if argv is None else argv)
        if sys.stdout is not None:  # None where it is closed
            sys.stdout.flush()  # here, where a closed pipe is handled
        return code
    except (UserError, EnvironmentFailure) as error:
        for line in split_lines(str(error)):
            print(f"vlbench: {line}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one line for all processes of a machine
            print("vlbench: interrupted", file=sys.stderr)
        return 130
    except (OSError, RuntimeError) as error:
        return _exit_code_of(error)


def _exit_code_of(error: OSError | RuntimeError) -> int:
    """Return the exit code for what the system refuses to a user; any other error goes on."""
    if isinstance(error, RuntimeError):
        if "home directory" not in str(error):  # pathlib's, of a path that begins with ~NAME
            raise error
        print("vlbench: a path begins with ~NAME, and there is no such user here", file=sys.stderr)
        return 2
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing is left to be written at exit
        return 1
    # a name that is too long: whatever looks for a file raises it, so it is refused in one place
    if not isinstance(error, PermissionError) and error.errno != errno.ENAMETOOLONG:
        raise error
    print(f"vlbench: {str(error.filename):.300}: {error.strerror}", file=sys.stderr)
    return 2


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
    return VERBS[argv[0]].run_verb(argv[1:])


def program_help() -> str:
    """Return the help of the whole program."""
    verbs = [f"  {name:7} {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: python -m vlbench VERB [KEY=VALUE ...]",
            "",
            "Train vision-language models with any connector, and compare connectors fairly.",
            "",
            *verbs,
            "",
            "Start with: python -m vlbench fit recipe=yivl_llava",
            "`VERB --help` has the table of all keys of a verb, `list` what they can name.",
        ]
    )


def verb_help(verb_name: str) -> str:
    """Return the help of one verb: its usage, and tables of all keys that it takes."""
    verb = VERBS[verb_name]
    specs = list(declared_arguments(verb.declaration).values()) if verb.declaration else []
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
        from vlbench.config.schema import key_rows

        title = f"Keys of recipes, which {verb_name} takes too:" if specs else "Keys of recipes:"
        lines += ["", title, "", *format_table([headings, *key_rows()])]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
