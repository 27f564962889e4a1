"""The end of a run: held-out questions and two controls are answered, and results written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlbench.config.schema import Recipe
from vlbench.connector import registry
from vlbench.data.image_folder import page_refusal
from vlbench.data.shuffle import pick_fixed_subset
from vlbench.data.square_images import open_whole
from vlbench.evaluate.askable_questions import (
    choose_questions,
    set_name,
    split_askable,
    tell_skipped,
    write_skipped,
)
from vlbench.evaluate.attention_diagnostics import diagnose_answers
from vlbench.evaluate.batch_inference import answer_questions
from vlbench.evaluate.budget_card import build_budget_card
from vlbench.evaluate.example_grid import AnsweredExample, draw_examples
from vlbench.evaluate.family_scores import score_families
from vlbench.evaluate.heldout_questions import EvalQuestion, final_questions
from vlbench.evaluate.information_probes import probe_information
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.text_files import format_json, format_json_lines, read_csv, write_atomically
from vlbench.train.run_folder import RunFolder, git_commit
from vlbench.train.throughput import peak_memory

DIAGNOSED_QUESTIONS = 8  # questions with an entry in diagnostics.json


def write_results(
    recipe: Recipe,
    run: RunFolder,
    vlm: LoadedVLM,
    should_stop: Callable[[], bool],
    elapsed_seconds: Callable[[], float],
    spent_by_stage: Mapping[str, Mapping[str, float]],
) -> bool:
    """Ask the questions of a run, and write answers, examples, results and diagnostics.

    Questions that the model cannot be asked are left out, told and listed. Returns False, with no
    results written, if `should_stop` became true before the last answer. `elapsed_seconds` returns
    how long the run has taken; `spent_by_stage` are steps and epochs.
    """
    asked_of, *wanted = final_questions(recipe.last_stage_data, recipe.log.questions)
    question_sets, skipped = choose_questions(vlm.processor, *wanted)
    questions = question_sets["accuracy"]
    tell_skipped(question_sets, skipped)
    write_skipped(run.folder, skipped)
    answers: dict[str, list[str]] = {}
    for name, asked in question_sets.items():
        answers[name] = answer_questions(vlm, asked, set_name(name), should_stop)
        if should_stop():
            return False
    _write_answers(run.folder / "answers.jsonl", question_sets, answers)
    draw_examples(
        pick_examples(questions, answers["accuracy"], recipe.log.examples, recipe.model.apply_exif),
        run.folder / "examples.png",
        f"{recipe.recipe}, size {recipe.size}: answers about {asked_of}",
    )
    results = {
        **_accuracies(question_sets, answers),
        "families": score_families(questions, answers["accuracy"], answers["blank_accuracy"]),
        "questions": len(questions),
        "unseen_questions": len(question_sets["unseen_accuracy"]),
        "skipped_questions": len(skipped["accuracy"]),
        "asked_of": asked_of,
        "seconds": round(elapsed_seconds(), 1),
        "peak_memory_bytes": peak_memory(),
        "loss": last_loss(run.folder / "metrics.csv"),
        "tokens_per_second": mean_tokens_per_second(run.folder / "metrics.csv"),
        "recipe": recipe.recipe,
        "size": recipe.size,
        "connector": registry.connector_label(recipe.connector["name"]),
        "seed": recipe.seed,
        "commit": git_commit(),
        "budget": build_budget_card(recipe.stages, run, vlm, spent_by_stage),
    }
    # the results have time and memory of the run without its probes
    if recipe.log.information_probes and not _write_probes(
        recipe, run, vlm, questions, should_stop
    ):
        return False
    write_atomically(run.results_file, format_json(results, indent=1))
    # last, as it runs more of a user's own connector: the results are safe if that fails
    answered = list(zip(questions, answers["accuracy"], strict=True))
    diagnostics = diagnose_answers(vlm, pick_fixed_subset(answered, DIAGNOSED_QUESTIONS))
    if diagnostics:
        write_atomically(run.folder / "diagnostics.json", format_json(diagnostics))
    return True


def write_information(
    recipe: Recipe, run: RunFolder, vlm: LoadedVLM, should_stop: Callable[[], bool]
) -> bool:
    """Write where the information for the answers of a finished run went (`probe_information`).

    Returns False, with nothing written, if `should_stop` became true before the end.
    """
    _, wanted, _ = final_questions(recipe.last_stage_data, recipe.log.questions)
    questions, _ = split_askable(vlm.processor, wanted)
    return _write_probes(recipe, run, vlm, questions, should_stop)


def _write_probes(
    recipe: Recipe,
    run: RunFolder,
    vlm: LoadedVLM,
    questions: Sequence[EvalQuestion],
    should_stop: Callable[[], bool],
) -> bool:
    information = probe_information(recipe.last_stage_data, vlm, questions, should_stop)
    if should_stop():
        return False
    write_atomically(run.information_file, format_json(information))
    return True


def _accuracies(
    question_sets: dict[str, list[EvalQuestion]], answers: dict[str, list[str]]
) -> dict[str, Any]:
    """Return the accuracy of each set, None for an empty one, and the groups of the first."""
    questions, main_answers = question_sets["accuracy"], answers["accuracy"]
    return {
        **{
            name: exact_match_accuracy(asked, answers[name]) if asked else None
            for name, asked in question_sets.items()
        },
        "accuracy_by_type": accuracy_by_group(questions, main_answers, lambda q: q.type),
        "accuracy_by_language": accuracy_by_group(questions, main_answers, lambda q: q.language),
    }


def exact_match_accuracy(questions: Iterable[EvalQuestion], answers: Iterable[str]) -> float:
    """Return the share of answers that equal the true one, word for word."""
    correct = [
        question.answer == answer for question, answer in zip(questions, answers, strict=True)
    ]
    return sum(correct) / len(correct)


def accuracy_by_group(
    questions: Sequence[EvalQuestion],
    answers: Sequence[str],
    group_of: Callable[[EvalQuestion], str],
) -> dict[str, float]:
    """Return the exact-match accuracy of each group of questions, sorted by the group's name."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        groups[group_of(question)].append(question.answer == answer)
    return {name: sum(correct) / len(correct) for name, correct in sorted(groups.items()) if name}


def pick_examples(
    questions: list[EvalQuestion], answers: list[str], count: int, exif: bool
) -> list[AnsweredExample]:
    """Return `count` examples from all over the questions.

    With `exif` photographs are turned as their EXIF orientation says.
    """
    answered = list(zip(questions, answers, strict=True))
    return [
        AnsweredExample(
            images=tuple(
                open_whole(image, exif)
                for image in question.sample.images
                if not page_refusal(image)
            ),
            question=question.question_text,
            answer=answer,
            truth=question.answer,
        )
        for question, answer in pick_fixed_subset(answered, count)
    ]


def _write_answers(
    path: Path, question_sets: dict[str, list[EvalQuestion]], answers: dict[str, list[str]]
) -> None:
    lines = (
        {
            "set": set_name(name),
            "id": question.sample.id,
            "type": question.type,
            "family": question.family,
            "language": question.language,
            "picture": question.picture,
            "checksum": question.checksum,
            "truth": question.answer,
            "answer": answer,
            "correct": answer == question.answer,
        }
        for name, questions in question_sets.items()
        for question, answer in zip(questions, answers[name], strict=True)
    )
    write_atomically(path, format_json_lines(lines))


def mean_tokens_per_second(metrics_file: Path) -> float | None:
    """Return the mean throughput of the last stage, from metrics.csv; None if nothing trained."""
    rows = read_csv(metrics_file)
    rates = [float(row["tokens_per_second"]) for row in rows if row["stage"] == rows[-1]["stage"]]
    return round(sum(rates) / len(rates), 1) if rates else None


def last_loss(metrics_file: Path) -> float | None:
    """Return the loss of the last step in metrics.csv; None if nothing trained."""
    rows = read_csv(metrics_file)
    return float(rows[-1]["loss"]) if rows else None
