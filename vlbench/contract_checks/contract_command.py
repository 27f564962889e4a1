"""`test-connector`: a line for each check of the contract, and what is not checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlbench.command_line.arguments import ConnectorTestArguments
from vlbench.connector import registry
from vlbench.contract_checks.contract_table import CONTRACT
from vlbench.contract_checks.run_contract import CheckOutcome, run_contract, small_options
from vlbench.errors import UserError, escape_to_one_line
from vlbench.strict_values import RawText

OPTION_PREFIX = "connector."
NOT_CHECKED = (
    "Not checked here: that two processes learn what one does (DDP, FSDP2). "
    "tests/test_contract.py in a clone of vlbench does it."
)


def run_contract_command(arguments: ConnectorTestArguments) -> int:
    """Print a line for each check; return 1 if any fails, else 0."""
    name, given = split_connector_words(arguments.words)
    options = ", ".join(f"{key}={value}" for key, value in {**small_options(name), **given}.items())
    place = registry.find_connector(name).location
    heading = f"{registry.connector_label(name)} ({place}){f' with {options}' if options else ''}"
    print(escape_to_one_line(heading), flush=True)
    outcomes = []
    for outcome in run_contract(name, given):
        print("\n".join(outcome_lines(outcome)), flush=True)
        outcomes.append(outcome)
    print(summary_line(outcomes))
    print(NOT_CHECKED)
    return 1 if any(outcome.found for outcome in outcomes) else 0


def split_connector_words(words: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """Return the name or the absolute path of the connector, and the options typed with it.

    Raises:
        UserError: when there is not exactly one connector among the words.
    """
    typed = [word for word in words if word.startswith(OPTION_PREFIX) and "=" in word]
    names = [word for word in words if word not in typed]
    if len(names) != 1:
        given = ", ".join(f"'{name}'" for name in names) or "none"
        raise UserError(
            f"test-connector takes one connector, given {given}; options are typed "
            f"{OPTION_PREFIX}OPTION=VALUE"
        )
    options: dict[str, Any] = {}
    for word in typed:
        key, _, value = word.removeprefix(OPTION_PREFIX).partition("=")
        if key in options:
            raise UserError(f"{OPTION_PREFIX}{key} is given twice")
        options[key] = RawText(value)
    is_file = names[0].endswith(".py")
    return str(Path(names[0]).expanduser().absolute()) if is_file else names[0], options


def outcome_lines(outcome: CheckOutcome) -> list[str]:
    """Return the line of a check, and below it where the connector's own code failed."""
    check, width = outcome.check, max(len(check.name) for check in CONTRACT)
    if not outcome.found:
        return [f"ok      {check.name:{width}}  {check.meaning}"]
    line = (
        f"FAILED  {check.name:{width}}  {escape_to_one_line(outcome.found)}. "
        f"It must hold: {check.meaning}. What to do: {check.remedy}."
    )
    return [line, *(f"        {frame}" for frame in outcome.frames)]


def summary_line(outcomes: list[CheckOutcome]) -> str:
    """Return how many checks hold, which fail, and which were not run."""
    failed = [outcome.check.name for outcome in outcomes if outcome.found]
    left = len(CONTRACT) - len(outcomes)
    text = f"{len(outcomes) - len(failed)} of {len(CONTRACT)} checks hold"
    if failed:
        text += f"; failed: {', '.join(failed)}"
    if left:
        text += f"; {left} that need it were not run"
    return f"{text}."
