"""A comparison as one HTML page that needs nothing but itself: no network, no scripts."""

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
from vlbench.compare.report.diagnostics import RowDiagnostics
from vlbench.compare.report.markdown_report import format_share, format_whole
from vlbench.compare.report.paired_statistics import STATISTICAL_POWER
from vlbench.compare.report.svg_figure import legend_marker
from vlbench.html_pages import jinja_environment
from vlbench.version import __version__

REPORT_TEMPLATE = "report.html.jinja"


def render_html(findings: ComparisonResult) -> str:
    """Return the report of a comparison as HTML; what its runs do not hold is said in it."""
    environment = jinja_environment(Path(__file__).parent)
    environment.filters |= {
        "share": format_share,
        "whole": format_whole,
        "heat": diagnostics.heatmap_uri,
        "exp": math.exp,
    }
    environment.globals |= {
        "counted": format_count,
        "version": __version__,
        "power": STATISTICAL_POWER,
        "named": MAX_NAMED_ROWS,
    }
    album = question_examples.QuestionThumbnails(findings.rows[0].runs[0])
    rows = findings.rows
    text = environment.get_template(REPORT_TEMPLATE).render(
        findings=findings,
        title=_page_title(rows),
        places={row.name: place for place, row in enumerate(rows)},
        swatches=[legend_marker(place) for place in range(len(rows))],
        answered=_answers_section(findings),
        training=_training_section(rows),
        costs=_costs_section(rows),
        cases=question_examples.wins_and_losses(rows, findings.question_ids),
        inside=_diagnostics_section(rows),
        made=_provenance_section(findings),
        album=album,
    )
    return text.encode("utf-8", "replace").decode()  # an answer may hold half a character


def _page_title(rows: Sequence[RowResult]) -> str:
    if len(rows) > MAX_NAMED_ROWS:
        return f"{len(rows)} rows compared"
    return " / ".join(row.name for row in rows)


def _answers_section(findings: ComparisonResult) -> dict[str, Any]:
    """Return the plots of what was answered."""
    rows = findings.rows
    return {
        "accuracies": result_plots.plot_accuracies(rows),
        "differences": result_plots.plot_differences(findings.pairs) if findings.pairs else None,
        "drawn": len(result_plots.pairs_to_draw(findings.pairs)),
        "kinds": result_plots.plot_question_groups(findings.question_groups, rows)
        if findings.question_groups
        else None,
        "drops": result_plots.plot_accuracy_drops(rows),
    }


def _training_section(rows: Sequence[RowResult]) -> dict[str, Any]:
    """Return the plots of training, and the rows that have no metrics."""
    found = {row.name: training_curves.load_row_metrics(row) for row in rows}
    known = {name: some for name, some in found.items() if some}
    order = [row.name for row in rows]
    gates = {
        name: plot
        for name, some in known.items()
        if (plot := training_curves.plot_gates(some, f"plot-gates-{order.index(name)}", name))
        is not None
    }
    return {
        "losses": training_curves.plot_losses(known, order) if known else None,
        "missing": [name for name in order if name not in known],
        "partly": [row.name for row in rows if 0 < len(found[row.name]) < len(row.runs)],
        "gates": gates,
    }


def _costs_section(rows: Sequence[RowResult]) -> dict[str, Any]:
    """Return the plot of costs, the rows on each frontier, and everything known of the costs."""
    prices = {
        "FLOPs": [(row, row.budget.get("flops")) for row in rows],
        "seconds": [(row, row.mean_result("seconds")) for row in rows],
    }
    best = {}
    for label, found in prices.items():
        known = [(row, price) for row, price in found if price]
        points = [(price, row.accuracy) for row, price in known]
        best[label] = [known[index][0].name for index in row_costs.pareto_frontier(points)]
    return {
        "plot": result_plots.plot_costs(rows) if any(best.values()) else None,
        "frontiers": {label: names for label, names in best.items() if names},
        "missing": [row.name for row, price in prices["FLOPs"] if not price],
        "card": row_costs.cost_table(rows),
    }


def _diagnostics_section(rows: Sequence[RowResult]) -> dict[str, Any]:
    """Return what diagnostics there are."""
    found: list[RowDiagnostics] = diagnostics.load_diagnostics(rows)
    order = [row.name for row in rows]
    counted_ = [one for one in found if one.token_shares]
    return {
        "rows": [one.row_name for one in found],
        "relevance": diagnostics.relevance_heatmaps(found),
        "attention": diagnostics.attention_heatmaps(found),
        "attends": [one for one in found if one.attention],
        "tokens": diagnostics.plot_token_shares(counted_, order) if counted_ else None,
    }


def _provenance_section(findings: ComparisonResult) -> dict[str, Any]:
    """Return how the runs were made: versions, data, folders."""
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
    """Return the keys of a recipe that say what was trained on, and their values."""
    wanted = ("train", "val", "images", "mix")
    return [
        (key, value if isinstance(value, str) else json.dumps(value, default=str))
        for key, value in recipe.items()
        if key.split(".")[-1] in wanted and ".data." in f".{key}" and value is not None
    ]
