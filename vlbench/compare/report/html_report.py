"""The report of a comparison as one self-contained HTML page: no network, no scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlbench.compare.report import (
    diagnostics,
    question_examples,
    result_plots,
    row_costs,
    training_curves,
)
from vlbench.compare.report.analysis import (
    MAX_NAMED_ROWS,
    ComparisonResult,
    RowResult,
    format_count,
)
from vlbench.compare.report.markdown_report import format_share, format_whole
from vlbench.compare.report.paired_statistics import STATISTICAL_POWER
from vlbench.compare.report.svg_figure import legend_marker
from vlbench.html_pages import jinja_environment
from vlbench.version import __version__

REPORT_TEMPLATE = "report.html.jinja"


def render_html(findings: ComparisonResult) -> str:
    """Return the report of a comparison as HTML; it says what its runs lack."""
    environment = jinja_environment(Path(__file__).parent)
    environment.filters |= {
        "share": format_share,
        "whole": format_whole,
        "heatmap": diagnostics.heatmap_uri,
        "exp": math.exp,
    }
    environment.globals |= {
        "format_count": format_count,
        "version": __version__,
        "statistical_power": STATISTICAL_POWER,
        "max_named_rows": MAX_NAMED_ROWS,
    }
    thumbnails = question_examples.QuestionThumbnails(findings.rows[0].runs[0])
    rows = findings.rows
    text = environment.get_template(REPORT_TEMPLATE).render(
        findings=findings,
        title=_page_title(rows),
        row_indices={row.name: index for index, row in enumerate(rows)},
        legend_markers=[legend_marker(index) for index in range(len(rows))],
        answers=_answers_section(findings),
        training=_training_section(rows),
        costs=_costs_section(rows),
        disagreements=question_examples.wins_and_losses(rows, findings.question_ids),
        diagnostics=_diagnostics_section(rows),
        provenance=_provenance_section(findings),
        thumbnails=thumbnails,
    )
    return text.encode("utf-8", "replace").decode()  # an answer may have an unpaired surrogate


def _page_title(rows: Sequence[RowResult]) -> str:
    if len(rows) > MAX_NAMED_ROWS:
        return f"{len(rows)} rows compared"
    return " / ".join(row.name for row in rows)


def _answers_section(findings: ComparisonResult) -> dict[str, Any]:
    """Return the plots of accuracies and differences; None where there is nothing to plot."""
    rows = findings.rows
    return {
        "accuracies": result_plots.plot_accuracies(rows),
        "differences": result_plots.plot_differences(findings.pairs) if findings.pairs else None,
        "pairs_drawn": len(result_plots.pairs_to_draw(findings.pairs)),
        "question_groups": result_plots.plot_question_groups(findings.question_groups, rows)
        if findings.question_groups
        else None,
        "drops": result_plots.plot_accuracy_drops(rows),
    }


def _training_section(rows: Sequence[RowResult]) -> dict[str, Any]:
    """Return the plots of training, and the rows that have no metrics."""
    tables_by_row = {row.name: training_curves.load_row_metrics(row) for row in rows}
    with_metrics = {name: tables for name, tables in tables_by_row.items() if tables}
    names = [row.name for row in rows]
    gate_plots = {
        name: training_curves.plot_gates(tables, f"plot-gates-{names.index(name)}", name)
        for name, tables in with_metrics.items()
    }
    return {
        "losses": training_curves.plot_losses(with_metrics, names) if with_metrics else None,
        "missing": [name for name in names if name not in with_metrics],
        "incomplete": [
            row.name for row in rows if 0 < len(tables_by_row[row.name]) < len(row.runs)
        ],
        "gates": {name: plot for name, plot in gate_plots.items() if plot is not None},
    }


def _costs_section(rows: Sequence[RowResult]) -> dict[str, Any]:
    """Return the plot of costs, the rows on each Pareto frontier, and the table of costs."""
    prices = {
        "FLOPs": [(row, row.budget.get("flops")) for row in rows],
        "seconds": [(row, row.mean_result("seconds")) for row in rows],
    }
    frontiers = {}
    for label, row_prices in prices.items():
        known = [(row, price) for row, price in row_prices if price]
        points = [(price, row.accuracy) for row, price in known]
        frontiers[label] = [known[index][0].name for index in row_costs.pareto_frontier(points)]
    return {
        "plot": result_plots.plot_costs(rows) if any(frontiers.values()) else None,
        "frontiers": {label: names for label, names in frontiers.items() if names},
        "missing": [row.name for row, price in prices["FLOPs"] if not price],
        "table": row_costs.cost_table(rows),
    }


def _diagnostics_section(rows: Sequence[RowResult]) -> dict[str, Any]:
    """Return the heatmaps, attention figures and token plots of the rows that have diagnostics."""
    loaded = diagnostics.load_diagnostics(rows)
    names = [row.name for row in rows]
    with_shares = [row for row in loaded if row.token_shares]
    return {
        "row_names": [row.row_name for row in loaded],
        "relevance": diagnostics.relevance_heatmaps(loaded),
        "attention": diagnostics.attention_heatmaps(loaded),
        "rows_with_attention": [row for row in loaded if row.attention],
        "token_shares": diagnostics.plot_token_shares(with_shares, names) if with_shares else None,
    }


def _provenance_section(findings: ComparisonResult) -> dict[str, Any]:
    """Return how the runs were made: versions, data, size."""
    runs = [run for row in findings.rows for run in row.runs]
    names = dict.fromkeys(name for run in runs for name in run.versions)
    return {
        "versions": {
            name: list(dict.fromkeys(run.versions.get(name, "unknown") for run in runs))
            for name in names
        },
        "data": _data_keys(runs[0].recipe),
        "size": runs[0].recipe["size"],
    }


def _data_keys(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the recipe's keys of training data, with their values as text."""
    data_keys = ("train", "val", "images", "mix")
    return [
        (key, value if isinstance(value, str) else json.dumps(value, default=str))
        for key, value in recipe.items()
        if key.split(".")[-1] in data_keys and ".data." in f".{key}" and value is not None
    ]
