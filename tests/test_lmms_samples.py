"""Samples that lmms-eval logged into a run's eval folder, in its files of August 2026."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_further_tasks import EARLIER, LAST, compare, make_runs

from vlbench.compare.report.lmms_samples import read_lmms_samples
from vlbench.text_files import format_json_lines

DATE = "20260810_101112"


def log_samples(
    folder: Path,
    task: str,
    metrics: list[dict[str, Any]],
    date: str = DATE,
    model_args: str | None = None,
    place: str = "lmms/run",
    **results: Any,
) -> None:
    """Write what `lmms-eval --log_samples --output_path RUN/eval/lmms` writes."""
    out = folder / "eval" / place
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "doc_id": number,
            "target": f"answer {number}",
            "input": f"question {number}",
            "filtered_resps": "x",
            "doc_hash": f"{folder}{number}",  # in which the address of an image may be
            **values,
        }
        for number, values in enumerate(metrics)
    ]
    (out / f"{date}_samples_{task}.jsonl").write_text(format_json_lines(lines))
    written = {
        "config": {"model_args": f"model={folder}" if model_args is None else model_args},
        "versions": {task: 0.1},
        "configs": {task: {"dataset_path": "lmms-lab/x", "generation_kwargs": {"max": 16}}},
        "lmms_eval_version": "0.7.2",
        **results,
    }
    (out / f"{date}_results.json").write_text(json.dumps(written))


@pytest.fixture
def rows(tmp_path) -> dict[str, list[Path]]:
    return make_runs(tmp_path, 2)


def log_everywhere(rows: dict[str, list[Path]], task: str, metrics: list[dict[str, Any]]) -> None:
    for folder in (folder for group in rows.values() for folder in group):
        log_samples(folder, task, metrics)


def test_values_and_mappings_with_a_score_are_compared_metric_by_metric(rows):
    metrics = [{"anls": 0.25 * (n % 5), "exact_match": n % 2 == 0} for n in range(10)]
    log_everywhere(rows, "docvqa_val", metrics)
    found = compare(rows)
    anls, exact = found.tasks
    assert anls.title == "lmms-eval docvqa_val: anls" and anls.rows[0].score == 0.5
    assert exact.rows[1].score == 0.5 and exact.pairs[0].pair_count == 2
    assert "score: anls" in anls.scope_sentence and "dataset lmms-lab/x" in anls.scope_sentence
    assert "The samples do not name the pictures" in anls.matched.remarks[0]


def test_what_only_differs_in_its_sum_is_one_and_shared_ids_are_pictures(rows):
    scored = [
        {"question_id": f"{n // 2}.jpg", "category": ("OCR", "count")[n % 2], "score": n % 3 == 0}
        for n in range(12)
    ]
    log_everywhere(rows, "mme", [{"accuracy": one, "f1_score": one} for one in scored])
    (task,) = compare(rows).tasks
    assert task.title == "lmms-eval mme: accuracy" and task.cluster_count == 6
    assert [group.name for group in task.groups] == ["OCR", "count"]
    assert task.matched.remarks == []


def test_what_other_versions_log_beside_the_metrics_is_no_metric(rows):
    """Hashes (0.3 to 0.5), the name of a filter, and whether a request came through."""
    others = {"prompt_hash": "ab", "target_hash": "cd", "filter": "none", "success": True}
    metrics = [{"anls": n % 2, "arguments": [], **others} for n in range(6)]
    log_everywhere(rows, "docvqa_val", metrics)
    found = compare(rows)
    assert [task.title for task in found.tasks] == ["lmms-eval docvqa_val: anls"]
    assert found.task_remarks == []


def test_mmmu_is_judged_as_lmms_eval_does(rows):
    def parsed(answer: object, *predictions: str, kind: str = "multiple-choice") -> dict[str, Any]:
        one = {"id": "validation_Art_1", "subdomain": "Art", "question_type": kind}
        return {"mmmu_acc": {**one, "answer": answer, "parsed_pred": list(predictions)}}

    metrics = [parsed("B", "B"), parsed("B", "C"), parsed("B", "C", "B"), parsed(["A", "D"], "D")]
    metrics += [parsed("42", "42", kind="open")]  # open ones are all wrong there
    log_everywhere(rows, "mmmu_val", metrics)
    (task,) = compare(rows).tasks
    assert task.rows[0].score == pytest.approx(3 / 5)


def test_a_metric_that_is_better_when_it_is_lower_is_turned_round(rows):
    for folder in (folder for group in rows.values() for folder in group):
        log_samples(
            folder,
            "chair",
            [{"chair_i": 0.25}] * 4,
            higher_is_better={"chair": {"chair_i": False}},
        )
    (task,) = compare(rows).tasks
    assert task.rows[0].score == 0.75 and task.matched.settings["score"] == "1 - chair_i"


def test_settings_that_differ_are_told_in_one_line(rows):
    for name, group in rows.items():
        for folder in group:
            kind = "bf16" if name == "linear" else "float32"
            log_samples(
                folder, "pope", [{"x": 1.0}] * 3, model_args=f"pretrained={folder},dtype={kind}"
            )
    found = compare(rows)
    assert found.tasks == [] and found.task_remarks == [
        "lmms-eval pope: x is not compared, as the rows were not asked alike: dtype is float32 "
        "for llava_mlp, bf16 for linear."
    ]


@pytest.mark.parametrize(
    ("model", "place", "checkpoint"),
    [
        ("{run}", "lmms", "last"),
        (f"{{run}}/checkpoints/{EARLIER}", "lmms", EARLIER),
        (f"{{run}}/checkpoints/{LAST}", "lmms", "last"),
        ("", f"{EARLIER}/lmms", EARLIER),
        ("somewhere/that/moved", "lmms", "last"),
    ],
)
def test_the_checkpoint_is_that_of_the_arguments_or_of_the_folder(model, place, checkpoint, rows):
    folder = rows["linear"][0]
    arguments = f"model={model.format(run=folder)},batch_size=4" if model else ""
    log_samples(folder, "pope", [{"x": 1.0}], model_args=arguments, place=place)
    ((one,), remarks) = read_lmms_samples(folder)
    assert one.settings["checkpoint"] == checkpoint and remarks == []
    assert "batch_size" not in one.settings


def test_answers_of_another_model_are_not_taken_for_the_runs(rows):
    folder, other = rows["linear"][0], rows["llava_mlp"][0]
    log_samples(folder, "pope", [{"x": 1.0}], model_args=f"model={other}")
    answers, (remark,) = read_lmms_samples(folder)
    assert answers == [] and f"lmms-eval asked another model, {other}; it is left out." in remark


def test_the_newest_of_several_logs_counts_and_what_has_no_shares_is_named(rows):
    folder = rows["linear"][0]
    log_samples(folder, "pope", [{"x": 0.0}])
    log_samples(folder, "pope", [{"x": 1.0}], date="20260811_101112")
    log_samples(folder, "judged", [{"gpt_eval": 7.5, "submission": {"a": "b"}}], date="20260809")
    log_samples(folder, "pope", [{"x": 1.0, "ratio": 2.0}], date="20260812")
    (one,), remarks = read_lmms_samples(folder)
    assert list(one.scores.values()) == [1.0]
    said = "\n".join(remarks)
    assert "pope: x is there twice; the newest counts." in said
    assert "judged.jsonl: gpt_eval has no values from 0 to 1 for single questions" in said
    assert "pope.jsonl: ratio has no values from 0 to 1" in said


def test_documents_that_several_filters_log_count_once_and_other_questions_do_not_pair(rows):
    log_everywhere(rows, "pope", [{"x": 1.0}, {"x": 0.0}])
    first = rows["linear"][0]
    file = next((first / "eval").rglob("*_samples_*.jsonl"))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines += [{**lines[0], "x": 0.0}]
    lines[1]["input"] = "another question"
    file.write_text(format_json_lines(lines))
    (task,) = compare(rows).tasks
    assert len(task.matched.questions) == 1 and task.rows[-1].score == 1.0
    assert any("2 questions not put to every run" in one for one in task.matched.remarks)


def test_a_torn_log_is_named_and_the_rest_is_compared(rows):
    log_everywhere(rows, "pope", [{"x": 1.0}])
    folder = rows["linear"][0]
    (folder / "eval/lmms/run" / f"{DATE}_samples_torn.jsonl").write_text("{\n{}\n")
    found = compare(rows)
    assert len(found.tasks) == 1
    assert any("samples_torn.jsonl: line 1 is not JSON" in one for one in found.task_remarks)
