"""What each verb takes of its own: the declarations of all verbs, by the verb's name."""

from __future__ import annotations

from vlbench.command_line.arguments import (
    ChatArguments,
    CheckArguments,
    ConnectorTestArguments,
    EvalArguments,
    ExportArguments,
    GraftArguments,
    ListArguments,
    PackArguments,
    PlanArguments,
    ScoreArguments,
    ServeArguments,
)
from vlbench.command_line.compare_arguments import CompareArguments, ReportArguments
from vlbench.command_line.parser import VerbDeclaration

_DECLARED: tuple[type[VerbDeclaration], ...] = (
    EvalArguments,
    ScoreArguments,
    ChatArguments,
    ServeArguments,
    ExportArguments,
    CheckArguments,
    PlanArguments,
    GraftArguments,
    PackArguments,
    CompareArguments,
    ReportArguments,
    ListArguments,
    ConnectorTestArguments,
)
DECLARATIONS = {declaration.verb: declaration for declaration in _DECLARED}
"""Verbs that are not here (`fit`, `show`) take keys of recipes alone."""
