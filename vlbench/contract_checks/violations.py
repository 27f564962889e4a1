"""How a check says that the contract is broken."""

from __future__ import annotations

from collections.abc import Sequence

from vlbench.text_tables import list_some

SHOWN_NAMES = 3


class ContractViolation(AssertionError):
    """What a check found, in one line."""


def require(holds: bool, found: str) -> None:
    """Raise a ContractViolation that says what was found, unless the condition holds."""
    if not holds:
        raise ContractViolation(found)


def require_none(names: Sequence[str], found: str) -> None:
    """Raise a ContractViolation that names what breaks the contract, if anything does."""
    require(not names, f"{found} {list_some(names, SHOWN_NAMES)}")
