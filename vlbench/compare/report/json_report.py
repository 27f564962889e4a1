"""The report of a comparison as JSON, for programs: shares from 0 to 1, budgets as they are."""

from __future__ import annotations

import json
from typing import Any

from vlbench.compare.report.analysis import ComparisonResult, RowResult
from vlbench.compare.report.curve_record import curves_record
from vlbench.compare.report.paired_statistics import PairedDifference
from vlbench.compare.report.row_pairs import RowPair
from vlbench.version import __version__


def render_json(findings: ComparisonResult) -> str:
    """Return the report as one JSON object."""
    report = {
        "vlbench": __version__,
        "scope": findings.scope_sentence,
        "verdict": findings.verdict_sentence,
        "asked_of": findings.asked_of,
        "seeds": findings.seeds,
        "question_count": len(findings.question_ids),
        "picture_count": findings.cluster_count,
        "rows": [_row(row) for row in findings.rows],
        "pairs": [_pair(pair) for pair in findings.pairs],
        "kinds": [
            {
                "name": group.name,
                "question_count": group.question_count,
                "rows": {
                    row.name: {"accuracy": accuracy, "interval": [low, high]}
                    for row, (accuracy, low, high) in zip(
                        findings.rows, group.row_accuracies, strict=True
                    )
                },
            }
            for group in findings.question_groups
        ],
        "recipe_differences": dict(findings.recipe_differences),
        "warnings": findings.warnings,
        "notes": findings.notes,
        "failed": {str(folder): reason for folder, reason in findings.failed.items()},
        "curves": curves_record(findings.curves) if findings.curves else None,
    }
    return json.dumps(report, indent=1)


def _row(row: RowResult) -> dict[str, Any]:
    return {
        "name": row.name,
        "accuracy": row.accuracy,
        "interval": [row.interval_low, row.interval_high],
        "accuracy_std": row.accuracy_std,
        "budget": row.budget,
        "runs": {str(run.seed): str(run.folder) for run in row.runs},
    }


def _difference(difference: PairedDifference) -> dict[str, Any]:
    return {
        "difference": difference.mean,
        "interval": [difference.interval_low, difference.interval_high],
        "p": difference.p_value,
    }


def _pair(pair: RowPair) -> dict[str, Any]:
    return {
        "better": pair.better,
        "worse": pair.worse,
        **_difference(pair.difference),
        "p_corrected": pair.corrected_p,
        "tests_in_family": pair.pair_count,
        "more_than_chance": pair.is_significant,
        "smallest_detectable": pair.difference.smallest_detectable,
    }
