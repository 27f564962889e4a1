"""The report of a comparison as one self-contained HTML page: no network, no scripts."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase as ALPHABET
from typing import Any

from markupsafe import Markup

from vlbench.compare.report import (
    curve_plots,
    curve_sentences,
    diagnostics,
    question_examples,
    result_plots,
    row_costs,
    training_curves,
)
from vlbench.compare.report.analysis import ComparisonResult, RowResult
from vlbench.compare.report.detectable_difference import STATISTICAL_POWER
from vlbench.compare.report.information_loss import find_information_loss
from vlbench.compare.report.information_tables import (
    InformationTable,
    information_notes,
    information_tables,
)
from vlbench.compare.report.markdown_report import format_share, format_whole
from vlbench.compare.report.pair_families import (
    FAMILY_SENTENCE,
    detectable_text,
    name_significant,
)
from vlbench.compare.report.row_pairs import MAX_NAMED_ROWS, format_count, join_names
from vlbench.compare.report.svg_figure import legend_marker
from vlbench.compare.report.vote_report import votes_section
from vlbench.html_pages import jinja_environment
from vlbench.version import __version__

REPORT_TEMPLATE = "report.html.jinja"
MAX_ROW_LABEL = 24  # characters; with a longer name among them, rows are A, B, ... with a legend
MEAN_COLUMNS = {
    "unseen_accuracy": "unseen pairs",
    "blank_accuracy": "blank image",
    "shuffled_accuracy": "exchanged image",
    "seconds": "seconds",
}
"""Keys of results.json -> columns of the table of accuracies; those without values are left out."""
SECTION_TITLES = {
    "curves": "Curves over the budget",
    "differs": "What differs between the rows",
    "accuracy": "Accuracy and differences",
    "training": "Learning curves",
    "kinds": "Accuracy by kind of question",
    "tasks": "Further tasks",
    "votes": "Votes",
    "costs": "Cost against quality",
    "information": "What the connector loses",
    "cases": "Wins and losses",
    "inside": "Diagnostics",
    "made": "How it was made",
}


def render_html(findings: ComparisonResult) -> str:
    """Return the report of a comparison as HTML; it says what its runs lack."""
    environment = jinja_environment(Path(__file__).parent)
    environment.filters |= {
        "share": format_share,
        "whole": format_whole,
        "heatmap": diagnostics.heatmap_uri,
        "place": diagnostics.place_map,
        "exp": math.exp,
        "breakable": _breakable,
        "significant": name_significant,
        "detectable": detectable_text,
    }
    environment.globals |= {
        "format_count": format_count,
        "version": __version__,
        "statistical_power": STATISTICAL_POWER,
        "max_named_rows": MAX_NAMED_ROWS,
        "family_sentence": FAMILY_SENTENCE,
    }
    rows = findings.rows
    labels = row_labels([row.name for row in rows])
    information = find_information_loss(findings)
    sections = {
        "curves": _curves_section(findings),
        "answers": _answers_section(findings, labels),
        "training": _training_section(rows, labels),
        "costs": _costs_section(rows),
        "disagreements": question_examples.wins_and_losses(
            rows, findings.question_ids, findings.pairs if findings.curves else None
        ),
        "diagnostics": _diagnostics_section(rows, labels),
        "information": {
            "tables": information_tables(information),
            "notes": list(information_notes(information)),
        },
        "votes": votes_section(findings.votes) if findings.votes else None,
    }
    left_out = _left_out(findings, sections)
    if not findings.tasks and not findings.task_remarks:
        left_out["tasks"] = "Nothing was asked of these runs beside their own questions."
    text = environment.get_template(REPORT_TEMPLATE).render(
        **sections,
        findings=findings,
        title=_page_title(findings),
        labels=labels,
        row_indices={row.name: index for index, row in enumerate(rows)},
        legend_markers=[legend_marker(index) for index in range(len(rows))],
        titles={
            key: title
            for key, title in SECTION_TITLES.items()
            if key not in left_out and (key not in ("curves", "votes") or sections[key])
        },
        left_out=left_out,
        mean_columns={
            key: heading
            for key, heading in MEAN_COLUMNS.items()
            if any(row.mean_result(key) is not None for row in rows)
        },
        provenance=_provenance_section(findings),
        thumbnails=question_examples.QuestionThumbnails(rows[0].runs[0]),
    )
    return text.encode("utf-8", "replace").decode()  # an answer may have an unpaired surrogate


def row_labels(names: Sequence[str]) -> dict[str, str]:
    """Return name -> label for plots and headings: the name, or a letter if any name is long.

    Letters go on after Z with AA, AB, ...
    """
    if max(map(len, names)) <= MAX_ROW_LABEL:
        return {name: name for name in names}
    letters = (
        "".join(word) for length in (1, 2, 3) for word in itertools.product(ALPHABET, repeat=length)
    )
    return dict(zip(names, letters, strict=False))


def _left_out(findings: ComparisonResult, sections: dict[str, Any]) -> dict[str, str]:
    """Return the sections that would be empty, with a sentence on why."""
    reasons = {}
    if not findings.pairs:
        reasons["cases"] = "There is one row only, so nothing is won or lost."
        if not findings.notes:
            reasons["differs"] = reasons["cases"]
    elif not any(pair.count for pair in sections["disagreements"]):
        reasons["cases"] = "No question is answered right by one row and wrong by another."
    if sections["training"]["losses"] is None:
        reasons["training"] = "These runs have no losses in a metrics.csv."
    if not findings.question_groups:
        reasons["kinds"] = "The questions have neither types nor languages."
    if not sections["costs"]["plot"] and not sections["costs"]["table"]:
        reasons["costs"] = "These runs do not say what they cost."
    diagnostics = sections["diagnostics"]["row_names"]
    if not diagnostics and not sections["training"]["gates"] and not sections["answers"]["drops"]:
        reasons["inside"] = "These runs have neither diagnostics.json nor answers without images."
    return reasons | _without_probes(**sections["information"])


def _without_probes(tables: Sequence[InformationTable], notes: Sequence[str]) -> dict[str, str]:
    reason = "These runs have no information.json; log.information_probes=true writes it."
    return {} if tables else {"information": " ".join(notes) or reason}


def _breakable(key: str) -> Markup:
    """Return a dotted key that may be broken after each dot."""
    return Markup("<wbr>").join(re.findall(r"[^.]*\.?", key))


def _page_title(findings: ComparisonResult) -> str:
    if findings.curves:
        plan = findings.curves.plan
        return f"{join_names(plan.curves, 'and')} over {plan.label}"
    if len(findings.rows) > MAX_NAMED_ROWS:
        return f"{len(findings.rows)} rows compared"
    return " / ".join(row.name for row in findings.rows)


def _answers_section(findings: ComparisonResult, labels: dict[str, str]) -> dict[str, Any]:
    """Return the plots of accuracies and differences; None where there is nothing to plot."""
    rows, pairs, groups = findings.rows, findings.pairs, findings.question_groups
    has_drops = any(
        row.mean_result(f"{name}_accuracy") is not None
        for row in rows
        for name in ("blank", "shuffled")
    )
    has_differences = bool(pairs) and result_plots.difference_intervals_drawn(pairs)
    return {
        "accuracies": result_plots.plot_accuracies(rows, labels),
        "accuracy_intervals": result_plots.accuracy_intervals_drawn(rows),
        "differences": result_plots.plot_differences(pairs, labels) if has_differences else None,
        "pairs_drawn": len(result_plots.pairs_to_draw(pairs)),
        "question_groups": result_plots.plot_question_groups(groups, rows) if groups else None,
        "group_intervals": result_plots.group_intervals_drawn(groups),
        "drops": result_plots.plot_accuracy_drops(rows, labels) if has_drops else None,
    }


def _curves_section(findings: ComparisonResult) -> dict[str, Any] | None:
    """Return the plots, sentences and tables of curves; None without any."""
    found = findings.curves
    if found is None:
        return None
    return {
        "names": found.plan.curves,
        "plot": curve_plots.plot_curves(found),
        "has_bands": curve_plots.bands_drawn(found.curves),
        "has_crossings": any(one.crossings for pair in found.curve_pairs for one in pair.undecided),
        "kinds_plot": curve_plots.plot_curves_by_kind(found),
        "sentences": curve_sentences.all_sentences(found),
        "tables": curve_sentences.curve_tables(found),
    }


def _training_section(rows: Sequence[RowResult], labels: dict[str, str]) -> dict[str, Any]:
    """Return the plots of training, and the rows that have no metrics."""
    tables_by_row = {row.name: training_curves.load_row_metrics(row) for row in rows}
    with_metrics = {name: tables for name, tables in tables_by_row.items() if tables}
    names = [row.name for row in rows]
    gate_plots = {
        name: training_curves.plot_gates(tables, f"plot-gates-{names.index(name)}", labels[name])
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


def _diagnostics_section(rows: Sequence[RowResult], labels: dict[str, str]) -> dict[str, Any]:
    """Return the heatmaps, attention figures and token plots of the rows that have diagnostics."""
    loaded = diagnostics.load_diagnostics(rows)
    with_shares = [row for row in loaded if row.token_shares]
    return {
        "row_names": [row.row_name for row in loaded],
        "relevance": diagnostics.relevance_heatmaps(loaded),
        "attention": diagnostics.attention_heatmaps(loaded),
        "rows_with_attention": [row for row in loaded if row.attention],
        "token_shares": diagnostics.plot_token_shares(with_shares, labels) if with_shares else None,
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
