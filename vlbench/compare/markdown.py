"""A comparison as Markdown: tables and sentences that are read in a terminal or a chat."""

from __future__ import annotations

from collections.abc import Sequence

from vlbench.compare.costs import known
from vlbench.compare.findings import Findings, Row


def markdown(findings: Findings) -> str:
    """Return the report: rows, what they differ in, pairs in plain words."""
    lines = ["# Comparison", "", findings.heading, ""]
    for warning in findings.warnings:
        lines += [f"**{warning}**", ""]
    for note in findings.notes:
        lines += [note, ""]
    lines += [*_differences(findings), "", *_table(findings.rows), "", *_budgets(findings.rows), ""]
    if findings.pairs:
        lines += ["## Differences", "", *(f"- {pair.sentence()}" for pair in findings.pairs), ""]
    lines += ["## By kind of question", "", *_by_kind(findings)]
    if findings.failed:
        failed = (f"- {folder}: {why}" for folder, why in findings.failed.items())
        lines += ["", "## Failed", "", *failed]
    return "\n".join(lines)


def _differences(findings: Findings) -> list[str]:
    if not findings.differing:
        return ["The rows have the same recipe." if findings.pairs else "There is one row only."]
    names = [arm.name for arm in findings.arms]
    lines = ["What differs:", "", f"| key | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    return lines + [f"| `{key}` | {' | '.join(values)} |" for key, values in findings.differing]


def _table(rows: Sequence[Row]) -> list[str]:
    lines = ["| row | accuracy | 95 % interval | seeds' spread | unseen | blank | shuffled | s |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        others = [share(row.mean(f"{name}_accuracy")) for name in ("unseen", "blank", "shuffled")]
        lines.append(
            f"| {row.name} | {row.accuracy:.3f} | {row.low:.3f} to {row.high:.3f} | "
            f"{share(row.spread)} | {' | '.join(others)} | {whole(row.mean('seconds'))} |"
        )
    return lines


def _budgets(rows: Sequence[Row]) -> list[str]:
    """Say what each row costs."""
    shown = known(rows)
    if not shown:
        return []
    lines = [f"| row | {' | '.join(shown.values())} |", f"|---|{'---:|' * len(shown)}"]
    for row in rows:
        values = [f"{row.budget[key]:,}" if key in row.budget else "" for key in shown]
        lines.append(f"| {row.name} | {' | '.join(values)} |")
    return lines


def share(value: float | None) -> str:
    """Return a share of right answers, "" if it is not known."""
    return "" if value is None else f"{value:.3f}"


def whole(value: float | None) -> str:
    """Return a number without decimals, "" if it is not known."""
    return "" if value is None else f"{value:.0f}"


def _by_kind(findings: Findings) -> list[str]:
    names = [row.name for row in findings.rows]
    lines = [f"| questions | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for kind in findings.kinds:
        values = [f"{accuracy:.3f}" for accuracy, _, _ in kind.found]
        lines.append(f"| {kind.name} ({kind.number}) | {' | '.join(values)} |")
    return lines
