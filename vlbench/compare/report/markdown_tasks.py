"""The further tasks of a comparison, and its kinds of questions, as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlbench.compare.report.analysis import ComparisonResult
from vlbench.compare.report.pair_families import detectable_text, name_significant
from vlbench.compare.report.question_kinds import QuestionGroup
from vlbench.compare.report.row_pairs import RowPair
from vlbench.compare.report.task_comparison import TaskComparison
from vlbench.text_tables import markdown_text


def render_tasks(findings: ComparisonResult) -> list[str]:
    """Return the lines of a section: all tasks in one table, then each with its intervals."""
    names = [row.name for row in findings.rows]
    lines = ["## Further tasks", ""]
    if findings.tasks:
        lines += [*_score_table("task", names, bool(findings.pairs))]
        for task in findings.tasks:
            label = f"{task.title} ({len(task.matched.questions):,})"
            lines.append(_score_line(label, names, task.row_scores, task.pairs))
        lines.append("")
    for task in findings.tasks:
        lines += [*_task_lines(task), ""]
    lines += [f"- {markdown_text(remark)}" for remark in findings.task_remarks]
    return lines


def _task_lines(task: TaskComparison) -> list[str]:
    """Return the lines of one task: how it was asked, intervals, kinds of its questions."""
    lines = [f"### {markdown_text(task.title)}", "", markdown_text(task.scope_sentence), ""]
    lines += [f"- {markdown_text(remark)}" for remark in task.matched.remarks]
    lines += ["", "| row | score | 95 % interval |", "|---|---:|---:|"]
    for row in task.rows:
        interval = f"{row.interval_low:.3f} to {row.interval_high:.3f}"
        lines.append(f"| {markdown_text(row.name)} | {row.score:.3f} | {interval} |")
    if task.groups:
        lines += ["", *kinds_table(task.groups, [row.name for row in task.rows])]
    return lines


def kinds_table(groups: Sequence[QuestionGroup], row_names: Sequence[str]) -> list[str]:
    """Return the table of kinds of questions: accuracies, and which pairs are not chance."""
    has_pairs = len(row_names) > 1
    return _score_table("questions", row_names, has_pairs) + [
        _score_line(
            f"{group.name} ({group.question_count})",
            row_names,
            group.scores_of(row_names),
            group.pairs,
        )
        for group in groups
    ]


def _score_table(heading: str, row_names: Sequence[str], has_pairs: bool) -> list[str]:
    """Return the head of a table with a column for every row."""
    more = ["more than chance", "detectable"] if has_pairs else []
    names = [markdown_text(name) for name in row_names]
    columns = len(names)
    return [
        f"| {' | '.join([heading, *names, *more])} |",
        f"|---|{'---:|' * columns}{'---|---:|' if has_pairs else ''}",
    ]


def _score_line(
    label: str, row_names: Sequence[str], scores: Mapping[str, float], pairs: Sequence[RowPair]
) -> str:
    """Return a line of the table; a row that was not asked has an empty cell."""
    cells = [f"{scores[name]:.3f}" if name in scores else "" for name in row_names]
    if len(row_names) > 1:
        cells.append(markdown_text(name_significant(pairs, {name: name for name in row_names})))
        cells.append(detectable_text(pairs))
    return f"| {markdown_text(label)} | {' | '.join(cells)} |"
