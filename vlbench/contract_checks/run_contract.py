"""Run the contract on one connector, and say what came of each check."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from traceback import walk_tb
from typing import Any, NamedTuple

import torch

from vlbench.connector import registry
from vlbench.connector.base import Connector
from vlbench.connector.folder_modules import is_connector_module
from vlbench.contract_checks.contract_table import CONTRACT, ContractCheck
from vlbench.contract_checks.small_model import SMALL_OPTIONS, build_small_vlm, open_gates
from vlbench.contract_checks.violations import ContractViolation
from vlbench.errors import EnvironmentFailure, UserError, escape_to_one_line, one_line
from vlbench.model.loaded_vlm import LoadedVLM

SHOWN_FRAMES = 5  # of a connector's own, the innermost


class CheckOutcome(NamedTuple):
    """What came of one check."""

    check: ContractCheck
    found: str
    """What is wrong, in one line; "" where nothing is."""
    frames: list[str]
    """Where the connector's own code failed: file, line and source, the innermost last."""


def run_contract(name: str, given: Mapping[str, Any]) -> Iterator[CheckOutcome]:
    """Run the checks on connector `name`, one after the other.

    They end where the connector cannot be built, or a basic check fails.

    Args:
        name: A connector's name, or a file `.py`.
        given: Options that are not to have their defaults (texts are converted).

    Raises:
        UserError: when there is no such connector, or its file cannot be executed.
    """
    connector = registry.load_connector(name)
    options = {**small_options(name), **given}
    for check in CONTRACT:
        outcome = run_check(check, connector, lambda: build_vlm_to_check(name, connector, options))
        yield outcome
        if outcome.found and check.is_basic:
            return


def small_options(name: str) -> dict[str, Any]:
    """Return the options with which a shipped connector fits the small model."""
    is_shipped = registry.is_shipped(registry.find_connector(name))
    return SMALL_OPTIONS.get(Path(name).stem, {}) if is_shipped else {}


def build_vlm_to_check(
    name: str, connector: type[Connector], options: Mapping[str, Any]
) -> LoadedVLM:
    """Return the small model with the connector, its gates open, in float64.

    Raises:
        UserError: when the options are not those of the connector, or do not fit the model.
    """
    values, mistakes = registry.resolve_options(name, dict(options))
    if mistakes:
        raise UserError("; ".join(line.removeprefix("connector.name: ") for line in mistakes))
    return open_gates(build_small_vlm(connector, values).to(torch.float64))


def run_check(
    check: ContractCheck, connector: type[Connector], build_vlm: Callable[[], LoadedVLM]
) -> CheckOutcome:
    """Run one check on a model of its own; what the connector's code raises is part of the outcome.

    Raises:
        EnvironmentFailure: when the machine refuses something, as does MemoryError.
    """
    try:
        check.run_check(build_vlm())
    except ContractViolation as violation:
        return CheckOutcome(check, str(violation), [])
    except (EnvironmentFailure, MemoryError):
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
        frames = connector_frames(cause, connector)
        kind = "" if isinstance(cause, UserError) else f"{type(cause).__name__}: "
        return CheckOutcome(check, f"{kind}{one_line(cause)}", frames)
    return CheckOutcome(check, "", [])


def connector_frames(error: BaseException, connector: type[Connector]) -> list[str]:
    """Return the frames of a traceback that are in the connector's own package or file."""
    package = connector.__module__.partition(".")[0]
    frames = []
    stack = traceback.extract_tb(error.__traceback__)
    for (frame, _), summary in zip(walk_tb(error.__traceback__), stack, strict=True):
        module = frame.f_globals.get("__name__", "")
        is_own = is_connector_module(module)
        if is_own or (package != "vlbench" and module.partition(".")[0] == package):
            place = f"{summary.filename}:{summary.lineno} in {summary.name}"
            frames.append(escape_to_one_line(f"{place}: {summary.line}"))
    return frames[-SHOWN_FRAMES:]
