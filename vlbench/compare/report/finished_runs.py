"""Reading finished runs: recipes, answers and versions, grouped into arms of equal recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlbench.compare.report.question_clusters import CorrectMatrix, number_clusters
from vlbench.config import recipe as recipes
from vlbench.config.overrides import shorten_keys
from vlbench.errors import UserError
from vlbench.regular_files import MAX_RECORDS_BYTES
from vlbench.strict_values import FileRecord, check_record
from vlbench.text_files import parse_json, read_json, read_text, split_lines
from vlbench.train.run_results_file import read_results

COMPARED_SET = "accuracy"  # the question set of answers.jsonl on which arms are compared
BUDGET_KEYS = ("steps", "epochs", "global_batch_size", "max_tokens_per_row", "warmup_ratio")
ARM_IGNORED_KEYS = ("seed", "run", "recipe", "only", "from", "dry_run", "profile", "trainer", "log")
"""Top-level recipe keys in which the runs of one arm may differ."""


SWEEP_FILE = "sweep.json"  # in the folder of a comparison: losses of the learning rates tried
SWEEP_FOLDER = "sweep"  # where the runs that tried them are
MATCH_TOLERANCE = 0.05  # budgets match within this relative difference
BUDGET_LABELS = {
    "parameters": "connector's parameters",
    "tokens": "tokens of an image",
    "latents": "latents",
    "flops": "prefill FLOPs",
    "cache": "KV cache bytes of an image",
}
"""Keys of `budget` in results.json that a comparison should match -> labels."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its recipe, results and answers."""

    folder: Path
    recipe: dict[str, Any]
    """The resolved recipe, flattened: `stages.chat.steps` -> 450."""
    results: dict[str, Any]
    correct: dict[str, bool]
    """Question id -> whether the answer is right."""
    types_and_languages: dict[str, tuple[str, str]]
    """Question id -> its type and language."""
    answers_and_truths: dict[str, tuple[str, str]]
    """Question id -> the answer and the true one."""
    clusters: dict[str, str]
    """Question id -> its picture, or else its conversation: what questions have in common."""
    versions: dict[str, str]
    """Versions of libraries, of initial weights and of the code (`commit`)."""

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(self.recipe["seed"])


class AnswerLine(FileRecord):
    """A line of answers.jsonl."""

    id: str
    correct: bool
    type: str
    language: str
    answer: str = ""
    truth: str = ""
    picture: str | None = None


def load_finished_run(folder: Path) -> FinishedRun:
    """Return the run in `folder`; a UserError if it is no run or is not finished."""
    for name in ("recipe.yaml", "results.json", "answers.jsonl"):
        if not (folder / name).is_file():
            problem = (
                "is not finished" if (folder / "recipe.yaml").is_file() else "is no run folder"
            )
            raise UserError(f"{folder} {problem}: it has no {name}")
    correct, types_and_languages, answers_and_truths, clusters = {}, {}, {}, {}
    for number, line in enumerate(
        split_lines(read_text(folder / "answers.jsonl", MAX_RECORDS_BYTES)), 1
    ):
        try:
            answer = parse_json(line)
            if answer["set"] == COMPARED_SET:
                name = str(answer["id"])
                if name in correct:  # several questions may have the same id
                    name = f"{name}#{number}"
                check_record(answer, AnswerLine, folder / f"answers.jsonl, line {number}")
                correct[name] = answer["correct"]
                types_and_languages[name] = (answer["type"], answer["language"])
                answers_and_truths[name] = (answer.get("answer", ""), answer.get("truth", ""))
                clusters[name] = answer.get("picture") or conversation_of(answer["id"])
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{folder / 'answers.jsonl'}, line {number}: is no answer") from error
    recipe = recipes.flatten_keys(
        recipes.to_plain(recipes.load_recipe_file(folder / "recipe.yaml"))
    )
    results = read_results(folder / "results.json")
    return FinishedRun(
        folder=folder,
        recipe=recipe,
        results=results,
        correct=correct,
        types_and_languages=types_and_languages,
        answers_and_truths=answers_and_truths,
        clusters=clusters,
        versions=_load_versions(folder, results),
    )


def conversation_of(question_id: str) -> str:
    """Return the conversation of a question: its id without the number of the turn, as in `7/1`."""
    conversation, _, turn = question_id.rpartition("/")
    return conversation if conversation and turn.isdecimal() else question_id


def cluster_numbers(run: FinishedRun, questions: Sequence[str]) -> NDArray[np.int64]:
    """Return the number of each question's cluster `[questions]`."""
    return number_clusters([run.clusters[name] for name in questions])


def _load_versions(folder: Path, results: dict[str, Any]) -> dict[str, str]:
    """Return the recorded versions; the commit is that of the evaluation, where there is one.

    Of the initial weights, vision encoder and language model are included; the connector's are not,
    because connectors are what is compared.
    """
    file = folder / "versions.json"
    versions = read_json(file) if file.is_file() else {}
    weights = versions.pop("weights", None)
    for part in ("vision", "language"):
        if isinstance(weights, dict) and isinstance(weights.get(part), dict):
            versions[f"weights of {part}"] = weights[part].get("sha256")
    versions |= {"commit": results["commit"]} if results.get("commit") else {}
    return {name: str(value) for name, value in versions.items()}


@dataclass(frozen=True)
class ComparisonArm:
    """Runs of the same recipe that differ only in the seed."""

    name: str
    runs: tuple[FinishedRun, ...]
    """Sorted by seed."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the runs."""
        return tuple(run.seed for run in self.runs)


def group_into_arms(runs: Sequence[FinishedRun]) -> list[ComparisonArm]:
    """Group runs into arms, named by the keys in which they differ; a repeated seed is an error."""
    grouped: dict[str, list[FinishedRun]] = {}
    for run in runs:
        grouped.setdefault(json.dumps(_recipe_identity(run), sort_keys=True), []).append(run)
    names = _arm_names([group[0] for group in grouped.values()])
    arms = []
    for name, group in zip(names, grouped.values(), strict=True):
        group = sorted(group, key=lambda run: run.seed)
        for run, following in pairwise(group):
            if run.seed == following.seed:
                raise UserError(
                    f"{run.folder} and {following.folder} are the same recipe with the same seed "
                    f"{run.seed}: name one of them"
                )
        arms.append(ComparisonArm(name, tuple(group)))
    return arms


def differing_keys(arms: Sequence[ComparisonArm]) -> list[str]:
    """Return the keys in which arms differ, learning rates first."""
    identities = [_recipe_identity(arm.runs[0]) for arm in arms]
    keys = dict.fromkeys(key for identity in identities for key in identity)
    differing = [
        key for key in keys if len({json.dumps(identity.get(key)) for identity in identities}) > 1
    ]
    return sorted(differing, key=lambda key: not key.endswith(".lr"))


def correct_matrix(
    arm: ComparisonArm, seeds: Sequence[int], questions: Sequence[str]
) -> CorrectMatrix:
    """Return which answers of an arm are right, `[seeds, questions]`."""
    by_seed = {run.seed: run.correct for run in arm.runs}
    return np.array([[by_seed[seed][name] for name in questions] for seed in seeds], dtype=float)


def common_seeds_and_questions(arms: Sequence[ComparisonArm]) -> tuple[list[int], list[str]]:
    """Return the seeds and the questions that all arms have."""
    seeds = set.intersection(*(set(arm.seeds) for arm in arms))
    if not seeds:
        seeds_per_arm = "; ".join(f"{arm.name}: {', '.join(map(str, arm.seeds))}" for arm in arms)
        raise UserError(
            f"no seed is common to all rows, so nothing can be paired ({seeds_per_arm})"
        )
    questions = set.intersection(
        *(set(run.correct) for arm in arms for run in arm.runs if run.seed in seeds)
    )
    if not questions:
        raise UserError("no question was asked of all rows, so nothing can be paired")
    first = next(run for run in arms[0].runs if run.seed in seeds)
    return sorted(seeds), [name for name in first.correct if name in questions]


def _recipe_identity(run: FinishedRun) -> dict[str, Any]:
    """Return the recipe without the keys in which runs of one arm may differ."""
    return {
        key: value for key, value in run.recipe.items() if key.split(".")[0] not in ARM_IGNORED_KEYS
    }


def _arm_names(runs: Sequence[FinishedRun]) -> list[str]:
    """Return short unique names of recipes: the connector and as few other keys as possible."""
    identities = [_recipe_identity(run) for run in runs]
    if len(runs) == 1:
        return [str(identities[0]["connector.name"])]

    def count_distinct(keys: Sequence[str]) -> int:
        return len({json.dumps([identity.get(key) for key in keys]) for identity in identities})

    keys = dict.fromkeys(key for identity in identities for key in identity)
    order = sorted(keys, key=lambda key: (_meaning_rank(key), -count_distinct([key])))
    chosen: list[str] = []
    for key in order:
        if count_distinct([*chosen, key]) > count_distinct(chosen):
            chosen.append(key)
    short = shorten_keys(chosen)
    return [
        " ".join(_format_setting(short[key], identity.get(key)) for key in chosen)
        for identity in identities
    ]


def _meaning_rank(key: str) -> int:
    """Return how much a key says of what a row is, 0 for the most.

    A connector and its options, adapters, and the models say what is trained; how long, in which
    batches and at which rates is named only where nothing else tells rows apart.
    """
    if key == "connector.name":
        return 0
    if key.startswith("connector."):
        return 1
    if ".lora." in key:
        return 2 if key.endswith(".rank") else 3
    if key.startswith(("vision.", "language.", "size", "init")):
        return 4
    last = key.rsplit(".", 1)[-1]
    return {"lr": 7, **dict.fromkeys(BUDGET_KEYS, 6)}.get(last, 5)


def _format_setting(key: str, value: Any) -> str:
    """Return `qformer` for a connector's name, `lora.rank=4` for any other key."""
    if key == "connector.name":
        return str(value)
    return f"{key.removeprefix('connector.')}={'null' if value is None else value}"


def describe_sweep(folder: Path) -> list[str]:
    """Return a sentence on the learning rates that were tried and chosen; [] without a sweep."""
    file = folder / SWEEP_FILE
    if not file.is_file():
        return []
    sweep = read_json(file)
    rows = []
    for name, row in sweep["rows"].items():
        losses = ", ".join(
            f"x {factor} {'failed' if loss is None else f'{loss:.4f}'}"
            for factor, loss in row["losses"].items()
        )
        chosen = "none" if row["chosen"] is None else f"x {row['chosen']:g}"
        rows.append(f"{name} {losses}: {chosen} is taken")
    return [
        f"Every row tried its connector's learning rate times some factors, with seed "
        f"{sweep['seed']}; the lowest held-out loss decides. {'; '.join(rows)}."
    ]
