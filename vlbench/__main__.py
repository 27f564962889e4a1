"""`python -m vlbench VERB key=value ...`. `command_dispatch` has what it does."""

from __future__ import annotations

import sys

from vlbench.stop_signals import end_silently_on_interrupt


def main(argv: list[str] | None = None) -> int:
    """Run the verb in `argv` (default: the command line) and return the exit code.

    The settings of the process are as before when it returns.
    """
    from vlbench.command_dispatch import run_command  # here: what is imported first is small

    return run_command(argv)


def run_program() -> int:
    """Run the verb of the command line in a process of its own; return the exit code."""
    with end_silently_on_interrupt():
        from vlbench import command_dispatch

    return command_dispatch.run_command()


if __name__ == "__main__":
    sys.exit(run_program())
