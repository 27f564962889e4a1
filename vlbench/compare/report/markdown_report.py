"""The report of a comparison as Markdown, for a terminal or a chat."""

from __future__ import annotations

from collections.abc import Sequence

from vlbench.compare.report import curve_sentences
from vlbench.compare.report.analysis import ComparisonResult, RowResult
from vlbench.compare.report.markdown_information import render_information
from vlbench.compare.report.markdown_tasks import kinds_table, render_tasks
from vlbench.compare.report.pair_families import FAMILY_SENTENCE
from vlbench.compare.report.row_costs import available_budgets
from vlbench.compare.report.vote_report import votes_markdown
from vlbench.text_tables import markdown_text


def render_markdown(findings: ComparisonResult) -> str:
    """Return the report: differing keys, accuracies, budgets, pairs, groups of questions, votes."""
    names = [row.name for row in findings.rows]
    lines = ["# Comparison", "", markdown_text(findings.scope_sentence), ""]
    for warning in findings.warnings:
        lines += [f"**{markdown_text(warning)}**", ""]
    for note in findings.notes:
        lines += [markdown_text(note), ""]
    lines += _curves_section(findings)
    lines += [
        *_differences_table(findings),
        "",
        *_accuracy_table(findings.rows),
        "",
        *_budget_table(findings.rows),
        "",
    ]
    if findings.pairs:
        lines += [
            "## Differences",
            "",
            *(f"- {markdown_text(pair.full_sentence())}" for pair in findings.pairs),
            "",
            *([markdown_text(findings.design), ""] if findings.design else []),
            FAMILY_SENTENCE,
            "",
        ]
    lines += ["## By kind of question", "", *kinds_table(findings.question_groups, names)]
    lines += ["", *render_tasks(findings)] if findings.tasks or findings.task_remarks else []
    lines += ["", votes_markdown(findings.votes)] if findings.votes else []
    lines += render_information(findings)
    if findings.failed:
        failed = (
            f"- {markdown_text(f'{folder}: {reason}')}"
            for folder, reason in findings.failed.items()
        )
        lines += ["", "## Failed or not finished", "", *failed]
    return "\n".join(lines)


def _curves_section(findings: ComparisonResult) -> list[str]:
    """Return the sentences and tables of curves, [] without any."""
    if findings.curves is None:
        return []
    lines = [f"## Curves over {findings.curves.plan.label}", ""]
    lines += [f"- {markdown_text(one)}" for one in curve_sentences.all_sentences(findings.curves)]
    for table in curve_sentences.curve_tables(findings.curves):
        lines += ["", f"{markdown_text(table.title)}:", ""]
        lines += [_table_line(table.header), f"|{'---|' * len(table.header)}"]
        lines += map(_table_line, table.lines)
    return [*lines, ""]


def _table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(markdown_text, cells))} |"


def _differences_table(findings: ComparisonResult) -> list[str]:
    if not findings.recipe_differences:
        return ["The rows have the same recipe." if findings.pairs else "There is one row only."]
    names = [markdown_text(arm.name) for arm in findings.arms]
    lines = ["What differs:", "", f"| key | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    return lines + [
        f"| `{markdown_text(key)}` | {' | '.join(map(markdown_text, values))} |"
        for key, values in findings.recipe_differences
    ]


def _accuracy_table(rows: Sequence[RowResult]) -> list[str]:
    lines = ["| row | accuracy | 95 % interval | seeds' spread | unseen | blank | shuffled | s |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        others = [
            format_share(row.mean_result(f"{name}_accuracy"))
            for name in ("unseen", "blank", "shuffled")
        ]
        lines.append(
            f"| {markdown_text(row.name)} | {row.accuracy:.3f} | {row.interval_low:.3f} to "
            f"{row.interval_high:.3f} | "
            f"{format_share(row.accuracy_std)} | {' | '.join(others)} | "
            f"{format_whole(row.mean_result('seconds'))} |"
        )
    return lines


def _budget_table(rows: Sequence[RowResult]) -> list[str]:
    """Return the table of budgets, [] if no row has any."""
    shown = available_budgets(rows)
    if not shown:
        return []
    lines = [f"| row | {' | '.join(shown.values())} |", f"|---|{'---:|' * len(shown)}"]
    for row in rows:
        values = [f"{row.budget[key]:,}" if key in row.budget else "" for key in shown]
        lines.append(f"| {markdown_text(row.name)} | {' | '.join(values)} |")
    return lines


def format_share(value: float | None) -> str:
    """Return an accuracy with three decimals, "" if it is not known."""
    return "" if value is None else f"{value:.3f}"


def format_whole(value: float | None) -> str:
    """Return a number without decimals, "" if it is not known."""
    return "" if value is None else f"{value:.0f}"
