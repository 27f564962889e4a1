"""The end of a run: answers to held-out questions, two controls, and files that tell of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from vlbench.config.schema import Recipe
from vlbench.data.data_sources import SCENES_SOURCE, open_held_out, open_stage_sources
from vlbench.data.shuffle import FeistelShuffle
from vlbench.evaluate.attention_diagnostics import diagnose_answers
from vlbench.evaluate.batched_answers import (
    accuracy_by_group,
    answer_questions,
    exact_match_accuracy,
)
from vlbench.evaluate.budget_card import build_budget_card
from vlbench.evaluate.example_grid import AnsweredExample, draw_examples
from vlbench.evaluate.heldout_questions import (
    EvalQuestion,
    blank_images,
    make_ids_unique,
    scene_questions,
    shuffle_images,
    source_questions,
)
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.text_files import read_csv, write_atomically
from vlbench.train.run_folder import RunFolder, git_commit
from vlbench.train.throughput import peak_memory

MAX_OWN_QUESTIONS = 1000  # questions asked of a user's own data
DIAGNOSED_QUESTIONS = 8  # questions whose pictures diagnostics.json tells about

ItemT = TypeVar("ItemT")


def final_questions(recipe: Recipe) -> tuple[str, list[EvalQuestion], list[EvalQuestion]]:
    """Return what is asked at the end: (of what, questions, questions about unseen pairs)."""
    name, stage = list(recipe.stages.items())[-1]
    data, limit = stage.data or recipe.data, recipe.log.questions
    if data.train == SCENES_SOURCE and not data.mix and not data.val:
        new, unseen = scene_questions("new"), scene_questions("unseen")
        return "new pictures", pick_fixed_subset(new, limit), pick_fixed_subset(unseen, limit)
    source = open_held_out(recipe.data, stage, recipe.seed)
    if source is not None:
        return f"held-out {source.name}", source_questions(source, limit or MAX_OWN_QUESTIONS), []
    asked: list[EvalQuestion] = []
    several = open_stage_sources(recipe.data, stage, name, recipe.seed)
    for number, (trained, _) in enumerate(several, 1):
        some = source_questions(trained, (limit or MAX_OWN_QUESTIONS) - len(asked))
        start = f"{number}." if len(several) > 1 else ""
        asked += [replace(one, record_number=f"{start}{one.record_number}") for one in some]
    return "the training conversations (no data.val was given)", make_ids_unique(asked), []


def pick_fixed_subset(items: list[ItemT], count: int | None) -> list[ItemT]:
    """Return `count` items drawn from all over the list, always the same; all for None."""
    if count is None or count >= len(items):
        return items
    draw = FeistelShuffle(len(items), "spread")
    return [items[draw(n)] for n in range(count)]


def write_results(
    recipe: Recipe,
    run: RunFolder,
    vlm: LoadedVLM,
    should_stop: Callable[[], bool],
    elapsed_seconds: Callable[[], float],
) -> bool:
    """Ask, and write answers, examples, diagnostics and results; False if `stop` cut it short.

    `seconds` tells how long the run has taken.
    """
    asked_of, questions, unseen = final_questions(recipe)
    sets = {
        "accuracy": questions,
        "unseen_accuracy": unseen,
        "blank_accuracy": blank_images(questions, vlm.processor.transform.mean),
        "shuffled_accuracy": shuffle_images(questions),
    }
    answers: dict[str, list[str]] = {}
    for name, asked in sets.items():
        answers[name] = answer_questions(vlm, asked, name.removesuffix("_accuracy"), should_stop)
        if should_stop():
            return False
    _write_answers(run.folder / "answers.jsonl", sets, answers)
    right = answers["accuracy"]
    draw_examples(
        pick_examples(questions, right, recipe.log.examples),
        run.folder / "examples.png",
        f"{recipe.recipe}, size {recipe.size}: answers about {asked_of}",
    )
    results: dict[str, Any] = {
        name: exact_match_accuracy(asked, answers[name]) if asked else None
        for name, asked in sets.items()
    }
    results |= {
        "accuracy_by_type": accuracy_by_group(questions, right, lambda q: q.type),
        "accuracy_by_language": accuracy_by_group(questions, right, lambda q: q.language),
        "questions": len(questions),
        "unseen_questions": len(unseen),
        "asked_of": asked_of,
        "seconds": round(elapsed_seconds(), 1),
        "peak_memory_bytes": peak_memory(),
        "tokens_per_second": mean_tokens_per_second(run.folder / "metrics.csv"),
        "recipe": recipe.recipe,
        "size": recipe.size,
        "connector": recipe.connector["name"],
        "seed": recipe.seed,
        "commit": git_commit(),
        "budget": build_budget_card(recipe, run, vlm.model),
    }
    write_atomically(run.results_file, json.dumps(results, indent=1, ensure_ascii=False))
    # last, as it runs more of a user's own connector: the results are safe if that fails
    diagnostics = diagnose_answers(
        vlm, pick_fixed_subset(list(zip(questions, right, strict=True)), DIAGNOSED_QUESTIONS)
    )
    if diagnostics:
        text = json.dumps(diagnostics, ensure_ascii=False)
        write_atomically(run.folder / "diagnostics.json", text)
    return True


def pick_examples(
    questions: list[EvalQuestion], answers: list[str], count: int
) -> list[AnsweredExample]:
    """Return `count` examples spread evenly over the questions."""
    return [
        AnsweredExample(
            tuple(p.open() for p in question.sample.images),
            question.question_text,
            answer,
            question.answer,
        )
        for question, answer in pick_fixed_subset(list(zip(questions, answers, strict=True)), count)
    ]


def _write_answers(
    path: Path, question_sets: dict[str, list[EvalQuestion]], answers: dict[str, list[str]]
) -> None:
    lines = [
        json.dumps(
            {
                "set": name.removesuffix("_accuracy"),
                "id": question.sample.id,
                "type": question.type,
                "language": question.language,
                "truth": question.answer,
                "answer": answer,
                "correct": answer == question.answer,
            },
            ensure_ascii=False,
        )
        for name, asked in question_sets.items()
        for question, answer in zip(asked, answers[name], strict=True)
    ]
    write_atomically(path, "\n".join(lines) + "\n")


def mean_tokens_per_second(metrics_file: Path) -> float | None:
    """Return the mean rate of the last stage, from metrics.csv; None if nothing was trained."""
    rows = read_csv(metrics_file)
    rates = [float(row["tokens_per_second"]) for row in rows if row["stage"] == rows[-1]["stage"]]
    return round(sum(rates) / len(rates), 1) if rates else None
