"""What connectors lose, as Markdown."""

from __future__ import annotations

from vlbench.compare.report.analysis import ComparisonResult
from vlbench.compare.report.information_loss import find_information_loss
from vlbench.compare.report.information_tables import information_notes, information_tables
from vlbench.text_tables import markdown_text


def render_information(findings: ComparisonResult) -> list[str]:
    """Return what the connectors lose; [] where no run was asked for information probes."""
    information = find_information_loss(findings)
    tables, notes = information_tables(information), list(information_notes(information))
    lines = ["", "## What the connector loses", ""] if notes else []
    for note in notes:
        lines += [markdown_text(note), ""]
    for table in tables:
        lines += [
            markdown_text(table.caption),
            "",
            f"| {' | '.join(table.headings)} |",
            f"|---|{'---:|' * (len(table.headings) - 1)}",
            *(f"| {' | '.join(map(markdown_text, line))} |" for line in table.lines),
            "",
        ]
    return lines[:-1]
