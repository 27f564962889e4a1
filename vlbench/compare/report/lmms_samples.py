"""Samples that lmms-eval logged (`--log_samples --output_path RUN/eval/...`), as answers of a run.

    MODEL/DATE_samples_TASK.jsonl   a line for every document: doc_id, input, target, and per metric
                                    a value, or a mapping with the value in `score`
    MODEL/DATE_results.json         config.model_args, configs, versions, higher_is_better

As of lmms-eval 0.7.2 (August 2026), loggers/evaluation_tracker.py and evaluator.py. A metric is
compared by its values for single documents, from 0 to 1. Of MMMU these are the parsed answers; they
are judged as lmms-eval judges them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlbench.compare.report.eval_answers import asked_checkpoint
from vlbench.compare.report.task_answers import EVAL_FOLDER, TaskAnswers
from vlbench.errors import UserError
from vlbench.evaluate.tasks.benchmark_types import (
    MMMU_DOMAINS,
    AnsweredItem,
)
from vlbench.evaluate.tasks.scoring_protocols import scoring_protocol
from vlbench.text_files import read_json, read_json_lines

NO_METRICS = {
    *("doc_id", "doc", "doc_hash", "target", "arguments", "input", "input_media"),
    *("resps", "filtered_resps", "token_counts", "submission"),
    *("prompt_hash", "target_hash", "filter", "success"),  # of other versions
}
"""Keys of a line that are no metrics."""
TASK_SETTINGS = {
    "dataset_path": "dataset",
    "dataset_name": "part of the dataset",
    "test_split": "split",
    "num_fewshot": "few-shot examples",
    "generation_kwargs": "generation",
    "lmms_eval_specific_kwargs": "prompts",
}
"""Keys of a task's `configs` that have to be the same -> their names in a sentence."""
MODEL_PATHS, FREE_MODEL_ARGS = ("model", "pretrained"), ("batch_size", "device", "max_batch_size")
NO_PICTURES = (
    "The samples do not name the pictures: questions about the same one count as independent, so "
    "intervals may be too narrow."
)


def read_lmms_samples(run_folder: Path) -> tuple[list[TaskAnswers], list[str]]:
    """Return what lmms-eval logged below a run's `eval`, and sentences on what is not compared.

    Of several logs of a task with the same settings the newest counts.
    """
    answers: dict[str, TaskAnswers] = {}
    remarks: list[str] = []
    for file in sorted((run_folder / EVAL_FOLDER).rglob("*_samples_*.jsonl"), key=_date_of):
        try:
            results = _results_beside(file)
            settings = _read_settings(run_folder, file, results)
            logged, unusable = _read_metrics(file, settings, results)
        except UserError as error:
            remarks.append(f"{error}; it is left out.")
            continue
        remarks += unusable
        for one in logged:
            key = json.dumps([one.task, *sorted(one.settings.items())])
            if key in answers:
                remarks.append(f"{file.parent}: {one.task} is there twice; the newest counts.")
            answers[key] = one
    return list(answers.values()), list(dict.fromkeys(remarks))


def _date_of(file: Path) -> tuple[str, str]:
    return file.name.split("_samples_")[0], str(file)


def _task_of(file: Path) -> str:
    return file.name.partition("_samples_")[2].removesuffix(".jsonl")


def _results_beside(file: Path) -> Mapping[str, Any]:
    """Return the results of the evaluation that logged a file, {} where they are not kept."""
    results_file = file.with_name(f"{file.name.partition('_samples_')[0]}_results.json")
    return read_json(results_file) if results_file.is_file() else {}


def _read_settings(run_folder: Path, file: Path, results: Mapping[str, Any]) -> dict[str, str]:
    """Return how a task was asked."""
    task = _task_of(file)
    config = _mapping(_mapping(results, "configs"), task)
    told = {
        "version of the task": _mapping(results, "versions").get(task),
        "version of lmms-eval": results.get("lmms_eval_version"),
        "generation options": _mapping(results, "config").get("gen_kwargs"),
        **{name: config.get(key) for key, name in TASK_SETTINGS.items()},
    }
    settings = {name: _as_text(value) for name, value in told.items() if value not in (None, "")}
    arguments = _model_arguments(_mapping(results, "config").get("model_args"))
    paths = [arguments[key] for key in MODEL_PATHS if arguments.get(key)]
    settings["checkpoint"] = asked_checkpoint(run_folder, file, paths, "lmms-eval")
    others = {k: v for k, v in arguments.items() if k not in (*MODEL_PATHS, *FREE_MODEL_ARGS)}
    return settings | others


def _mapping(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    inner = value.get(key)
    return inner if isinstance(inner, dict) else {}


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _model_arguments(model_args: object) -> dict[str, str]:
    """Return lmms-eval's `--model_args`, a mapping or `a=1,b=2`."""
    if isinstance(model_args, dict):
        return {key: _as_text(value) for key, value in model_args.items()}
    words = [word.partition("=") for word in str(model_args or "").split(",")]
    return {key.strip(): value.strip() for key, equals, value in words if equals}


def _read_metrics(
    file: Path, settings: Mapping[str, str], results: Mapping[str, Any]
) -> tuple[list[TaskAnswers], list[str]]:
    """Return one metric after another, and a sentence on those without values to compare."""
    task, lines = _task_of(file), read_json_lines(file)
    is_better = _mapping(_mapping(results, "higher_is_better"), task)
    metrics = dict.fromkeys(key for line in lines for key in line if key not in NO_METRICS)
    found, unusable = [], []
    logged = set()  # metrics that only differ in how they are summed up log the same mappings
    for metric in metrics:
        values = json.dumps([line.get(metric) for line in lines])
        one = _read_metric(metric, lines, is_better.get(metric) is not False)
        if one is not None and ("{" not in values or values not in logged):
            task_name = f"lmms-eval {task}: {metric}"
            found.append(replace(one, task=task_name, settings={**settings, **one.settings}))
        unusable += [metric] if one is None else []
        logged.add(values)
    if not unusable and metrics:
        return found, []
    named = ", ".join(unusable) or "it"
    return found, [
        f"{file}: {named} has no values from 0 to 1 for single questions; it is left out."
    ]


def _read_metric(
    metric: str, lines: Sequence[Mapping[str, Any]], higher_is_better: bool
) -> TaskAnswers | None:
    """Return the values of a metric for every document that has it; None if any is no share."""
    scores: dict[str, float] = {}
    kinds: dict[str, dict[str, str]] = {}
    clusters: dict[str, str] = {}
    for name, line in _first_lines(lines):
        if metric not in line:
            continue
        score = _score_of(line[metric])
        if score is None:
            return None
        details = line[metric] if isinstance(line[metric], dict) else {}
        scores[name] = score if higher_is_better else 1 - score
        kinds[name], clusters[name] = _kinds_of(details), _cluster_of(name, line, details)
    has_media = any(line.get("input_media") for line in lines)
    return TaskAnswers(
        task="",
        settings={"score": metric if higher_is_better else f"1 - {metric}"},
        scores=scores,
        kinds=kinds,
        clusters=clusters,
        caution="" if has_media or len({*clusters.values()}) < len(clusters) else NO_PICTURES,
    )


def _first_lines(lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Give every document once, by a name that stands for its question and true answer too.

    `doc_hash` is no such name: where a document holds its image it changes from process to process.
    Where a task has several filters, its documents are logged again for each; the first counts.
    """
    seen = set()
    for line in lines:
        text = json.dumps([line.get("input"), line.get("target")])
        name = f"{line.get('doc_id')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        if name not in seen:
            seen.add(name)
            yield name, line


def _score_of(value: Any) -> float | None:
    """Return a value of a metric from 0 to 1, None where it is something else."""
    if isinstance(value, dict) and "parsed_pred" in value:
        return _score_mmmu(value)
    if isinstance(value, dict):
        value = value.get("score")
    if isinstance(value, bool | int | float) and 0 <= value <= 1:
        return float(value)
    return None


def _score_mmmu(value: Mapping[str, Any]) -> float | None:
    """Judge the parsed answers to a question of MMMU: any of them may be right."""
    kind, parsed = value.get("question_type"), value["parsed_pred"]
    rules = scoring_protocol("mmmu", "lmms").rules
    if not isinstance(kind, str) or kind not in rules or not isinstance(parsed, list | str):
        return None
    predictions = parsed if isinstance(parsed, list) else [parsed]
    item = AnsweredItem(str(value.get("id")), kind, [], value.get("answer"), "")
    try:
        return float(any(rules[kind].is_correct(one, item) for one in predictions))
    except (TypeError, AttributeError, UserError):
        return None


def _kinds_of(details: Mapping[str, Any]) -> dict[str, str]:
    """Return the type and category of a question, as far as a metric names them."""
    named = {"type": details.get("question_type"), "category": details.get("category")}
    if isinstance(details.get("subdomain"), str):
        named["domain"] = MMMU_DOMAINS.domain_of(details["subdomain"])
    return {kind: name for kind, name in named.items() if isinstance(name, str)}


def _cluster_of(name: str, line: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    """Return the picture of a question: where it came from, or the id that several share."""
    media = line.get("input_media")
    if isinstance(media, list) and media:
        return str(media[0])
    return str(details.get("question_id", name))
