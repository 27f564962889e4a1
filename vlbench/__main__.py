"""`python -m vlbench VERB key=value ...`. `command_dispatch` has what it does."""

from __future__ import annotations

import contextlib
import sys

from vlbench.program_help import HELP_FLAGS, program_help


def main(argv: list[str] | None = None) -> int:
    """Run the verb in `argv` (default: the command line) and return the exit code.

    The settings of the process are as before when it returns.
    """
    from vlbench.command_dispatch import run_command  # here: what is imported first is small

    return run_command(argv)


def run_program() -> int:
    """Run the verb of the command line in a process of its own; return the exit code."""
    if is_help_printed(sys.argv[1:]):
        return 0
    from vlbench.stop_signals import end_silently_on_interrupt  # here: help does without it

    with end_silently_on_interrupt():
        from vlbench import command_dispatch
        from vlbench.distributed.abrupt_exit import run_and_exit

    return run_and_exit(command_dispatch.run_command)


def is_help_printed(argv: list[str]) -> bool:
    """Print the help of the program if that is asked for; tell whether it was printed.

    It takes a fifth of the time of `run_command`, which says what is wrong with standard output.
    """
    if len(argv) != 1 or argv[0] not in HELP_FLAGS:
        return False
    with contextlib.suppress(OSError):
        print(program_help(), flush=True)
        return True
    return False


if __name__ == "__main__":
    sys.exit(run_program())
