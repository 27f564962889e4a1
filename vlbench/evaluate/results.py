"""The end of a run: answers to held-out questions, two controls, and files that tell of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from vlbench.data.order import Order
from vlbench.data.sources import SCENES, held_out, sources
from vlbench.evaluate.ask import accuracy, accuracy_by, ask
from vlbench.evaluate.budget import card
from vlbench.evaluate.diagnostics import diagnose
from vlbench.evaluate.picture import Example, draw_examples
from vlbench.evaluate.questions import (
    Question,
    blanked,
    scene_questions,
    shuffled,
    source_questions,
    told_apart,
)
from vlbench.files import read_table, write_whole
from vlbench.model.vlm import VLM
from vlbench.schema import Recipe
from vlbench.train.run import Run, commit
from vlbench.train.speed import peak_memory

LIMIT = 1000  # questions asked of a user's own data
PICTURES = 8  # questions whose pictures diagnostics.json tells about

Item = TypeVar("Item")


def questions_of(recipe: Recipe) -> tuple[str, list[Question], list[Question]]:
    """Return what is asked at the end: (of what, questions, questions about unseen pairs)."""
    name, stage = list(recipe.stages.items())[-1]
    data, limit = stage.data or recipe.data, recipe.log.questions
    if data.train == SCENES and not data.mix and not data.val:
        new, unseen = scene_questions("new"), scene_questions("unseen")
        return "new pictures", spread(new, limit), spread(unseen, limit)
    source = held_out(recipe.data, stage, recipe.seed)
    if source is not None:
        return f"held-out {source.name}", source_questions(source, limit or LIMIT), []
    asked: list[Question] = []
    several = sources(recipe.data, stage, name, recipe.seed)
    for number, (trained, _) in enumerate(several, 1):
        some = source_questions(trained, (limit or LIMIT) - len(asked))
        start = f"{number}." if len(several) > 1 else ""
        asked += [replace(one, record=f"{start}{one.record}") for one in some]
    return "the training conversations (no data.val was given)", told_apart(asked), []


def spread(items: list[Item], count: int | None) -> list[Item]:
    """Return `count` items drawn from all over the list, always the same; all for None."""
    if count is None or count >= len(items):
        return items
    draw = Order(len(items), "spread")
    return [items[draw(n)] for n in range(count)]


def write_results(
    recipe: Recipe, run: Run, vlm: VLM, stop: Callable[[], bool], seconds: Callable[[], float]
) -> bool:
    """Ask, and write answers, examples, diagnostics and results; False if `stop` cut it short.

    `seconds` tells how long the run has taken.
    """
    asked_of, questions, unseen = questions_of(recipe)
    sets = {
        "accuracy": questions,
        "unseen_accuracy": unseen,
        "blank_accuracy": blanked(questions, vlm.transform.mean),
        "shuffled_accuracy": shuffled(questions),
    }
    answers: dict[str, list[str]] = {}
    for name, asked in sets.items():
        answers[name] = ask(vlm, asked, name.removesuffix("_accuracy"), stop)
        if stop():
            return False
    _write_answers(run.folder / "answers.jsonl", sets, answers)
    right = answers["accuracy"]
    draw_examples(
        examples(questions, right, recipe.log.examples),
        run.folder / "examples.png",
        f"{recipe.recipe}, size {recipe.size}: answers about {asked_of}",
    )
    results: dict[str, Any] = {
        name: accuracy(asked, answers[name]) if asked else None for name, asked in sets.items()
    }
    results |= {
        "accuracy_by_type": accuracy_by(questions, right, lambda q: q.type),
        "accuracy_by_language": accuracy_by(questions, right, lambda q: q.language),
        "questions": len(questions),
        "unseen_questions": len(unseen),
        "asked_of": asked_of,
        "seconds": round(seconds(), 1),
        "peak_memory_bytes": peak_memory(),
        "tokens_per_second": tokens_per_second(run.folder / "metrics.csv"),
        "recipe": recipe.recipe,
        "size": recipe.size,
        "connector": recipe.connector["name"],
        "seed": recipe.seed,
        "commit": commit(),
        "budget": card(recipe, run, vlm),
    }
    write_whole(run.results_file, json.dumps(results, indent=1, ensure_ascii=False))
    # last, as it runs more of a user's own connector: the results are safe if that fails
    diagnostics = diagnose(vlm, spread(list(zip(questions, right, strict=True)), PICTURES))
    if diagnostics:
        text = json.dumps(diagnostics, ensure_ascii=False)
        write_whole(run.folder / "diagnostics.json", text)
    return True


def examples(questions: list[Question], answers: list[str], count: int) -> list[Example]:
    """Return `count` examples spread evenly over the questions."""
    return [
        Example(
            tuple(p.open() for p in question.sample.pictures),
            question.text,
            answer,
            question.answer,
        )
        for question, answer in spread(list(zip(questions, answers, strict=True)), count)
    ]


def _write_answers(
    path: Path, sets: dict[str, list[Question]], answers: dict[str, list[str]]
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
        for name, asked in sets.items()
        for question, answer in zip(asked, answers[name], strict=True)
    ]
    write_whole(path, "\n".join(lines) + "\n")


def tokens_per_second(metrics: Path) -> float | None:
    """Return the mean rate of the last stage, from metrics.csv; None if nothing was trained."""
    rows = read_table(metrics)
    rates = [float(row["tokens_per_second"]) for row in rows if row["stage"] == rows[-1]["stage"]]
    return round(sum(rates) / len(rates), 1) if rates else None
