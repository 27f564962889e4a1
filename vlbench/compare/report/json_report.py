"""The report of a comparison as JSON, for other programs: every figure of the page, unrounded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vlbench.compare.report.analysis import ComparisonResult, RowResult
from vlbench.compare.report.curve_record import curves_record
from vlbench.compare.report.detectable_difference import UNDETECTABLE
from vlbench.compare.report.earlier_reports import LOOKS_KEY
from vlbench.compare.report.information_loss import (
    LOSSES,
    InformationLoss,
    KindInformation,
    ShareEstimate,
    find_information_loss,
)
from vlbench.compare.report.pair_families import FAMILY_SENTENCE
from vlbench.compare.report.question_kinds import QuestionGroup
from vlbench.compare.report.row_pairs import RowPair
from vlbench.compare.report.run_probes import PLACE_LABELS
from vlbench.compare.report.task_comparison import TaskComparison
from vlbench.compare.report.vote_report import votes_record
from vlbench.version import __version__


def render_json(findings: ComparisonResult) -> str:
    """Return the report as JSON: shares from 0 to 1, differences as well, intervals of 95 %."""
    names = [row.name for row in findings.rows]
    report = {
        "vlbench": __version__,
        "question": findings.question_sentence,
        "verdict": findings.verdict_sentence,
        "asked_of": findings.asked_of,
        "seeds": findings.seeds,
        LOOKS_KEY: findings.looks or [len(findings.seeds)],
        "questions": len(findings.question_ids),
        "pictures": findings.cluster_count,
        "recipe_differences": {
            key: dict(zip([arm.name for arm in findings.arms], values, strict=True))
            for key, values in findings.recipe_differences
        },
        "rows": [_row_entry(row) for row in findings.rows],
        "families": FAMILY_SENTENCE,
        "pairs": [_pair_entry(pair) for pair in findings.pairs],
        "design": findings.design,
        "kinds": [_kind_entry(group, names) for group in findings.question_groups],
        "curves": curves_record(findings.curves) if findings.curves else None,
        "tasks": [_task_entry(task) for task in findings.tasks],
        "task_remarks": findings.task_remarks,
        "votes": votes_record(findings.votes) if findings.votes else None,
        "information": _information_entry(find_information_loss(findings)),
        "warnings": findings.warnings,
        "notes": findings.notes,
        "failed": {str(folder): reason for folder, reason in findings.failed.items()},
    }
    return json.dumps(report, indent=1)


def _row_entry(row: RowResult) -> dict[str, Any]:
    return {
        "name": row.name,
        "accuracy": row.accuracy,
        "interval": [row.interval_low, row.interval_high],
        "runs": [
            {"folder": str(run.folder), "seed": run.seed, "accuracy": float(correct.mean())}
            for run, correct in zip(row.runs, row.correct, strict=True)
        ],
        **{
            key: row.mean_result(key)
            for key in ("unseen_accuracy", "blank_accuracy", "shuffled_accuracy", "seconds")
        },
        "budget": row.budget,
    }


def _pair_entry(pair: RowPair) -> dict[str, Any]:
    difference = pair.difference
    smallest = difference.smallest_detectable
    return {
        "better": pair.better,
        "worse": pair.worse,
        "difference": difference.mean,
        "interval": [difference.interval_low, difference.interval_high],
        "p": difference.p_value,
        "p_corrected": pair.corrected_p,
        "tests_in_family": pair.pair_count,
        "more_than_chance": pair.is_significant,
        "smallest_detectable": None if smallest >= UNDETECTABLE else smallest,
    }


def _kind_entry(group: QuestionGroup, row_names: Sequence[str]) -> dict[str, Any]:
    return {
        "kind": group.kind,
        "name": group.name,
        "questions": group.question_count,
        "rows": {
            name: {"accuracy": accuracy, "interval": [low, high]}
            for name, (accuracy, low, high) in zip(row_names, group.row_accuracies, strict=True)
        },
        "pairs": [_pair_entry(pair) for pair in group.pairs],
    }


def _task_entry(task: TaskComparison) -> dict[str, Any]:
    return {
        "task": task.title,
        "settings": dict(task.matched.settings),
        "seeds": task.matched.seeds,
        "questions": len(task.matched.questions),
        "pictures": task.cluster_count,
        "rows": [
            {
                "name": row.name,
                "score": row.score,
                "interval": [row.interval_low, row.interval_high],
                "by_seed": row.seed_scores,
            }
            for row in task.rows
        ],
        "pairs": [_pair_entry(pair) for pair in task.pairs],
        "kinds": [_kind_entry(group, [row.name for row in task.rows]) for group in task.groups],
        "remarks": task.matched.remarks,
    }


def _information_entry(information: InformationLoss) -> dict[str, Any]:
    return {
        "rows": [
            {
                "name": row.row_name,
                "training_pictures": row.training_pictures,
                "reads_answers": row.reads_answers,
                "not_attributed": row.not_attributed,
                "kinds": [_information_kind(kind) for kind in row.kinds],
                "neighbours": {
                    "count": row.neighbour_count,
                    "kept": _share_entry(row.neighbours),
                    "chance": row.neighbours_by_chance,
                },
            }
            for row in information.rows
        ],
        "missing": information.missing,
    }


def _information_kind(kind: KindInformation) -> dict[str, Any]:
    return {
        "name": kind.kind,
        "questions": kind.question_count,
        "read": {
            place: _share_entry(share)
            for place, share in zip(PLACE_LABELS, kind.read, strict=False)
        },
        "read_of_right_answers": dict(zip(PLACE_LABELS, kind.read_of_right, strict=False)),
        "chance": kind.by_chance,
        "wrong": kind.wrong_count,
        "losses": {
            name: {"count": loss.answers, "of_questions": _share_entry(loss.of_questions)}
            for name, loss in zip(LOSSES, kind.losses, strict=True)
        },
    }


def _share_entry(estimate: ShareEstimate) -> dict[str, Any]:
    return {"share": estimate.share, "interval": [estimate.low, estimate.high]}
