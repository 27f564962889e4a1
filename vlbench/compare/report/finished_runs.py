"""Reading finished runs: recipes, answers and versions, and what several of them have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlbench.command_line.overrides import flatten_keys
from vlbench.compare.report.question_clusters import CorrectMatrix, number_clusters
from vlbench.compare.report.row_identity import identity_with_source
from vlbench.config import recipe as recipes
from vlbench.connector.kept_source import KEPT_FOLDER
from vlbench.connector.source_files import RECORD_FILE
from vlbench.data.data_checksums import DATA_KEYS, data_checksums
from vlbench.errors import UserError
from vlbench.regular_files import MAX_RECORDS_BYTES
from vlbench.strict_values import FileRecord, check_record
from vlbench.text_files import parse_json, read_json, read_text, split_lines
from vlbench.train.run_results_file import read_results

MAX_INITS = 10  # runs that begin with one another, each with the one before
COMPARED_SET = "accuracy"  # the question set of answers.jsonl on which arms are compared
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
    families: dict[str, str]
    """Question id -> its family; "" for questions that are not about rendered scenes."""
    answers_and_truths: dict[str, tuple[str, str]]
    """Question id -> the answer and the true one."""
    clusters: dict[str, str]
    """Question id -> its picture, or else its conversation: what questions have in common."""
    versions: dict[str, str]
    """Versions of libraries, of initial weights and of the code (`commit`)."""
    contents: dict[str, str] = field(default_factory=dict)
    """Path of data, or `connector.name` -> checksum of what it held when the run began."""
    checksums: dict[str, str] = field(default_factory=dict)
    """Question id -> checksum of its text and pictures; runs of old versions have none."""

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
    checksum: str = ""


def load_finished_run(folder: Path) -> FinishedRun:
    """Return the run in `folder`; a UserError if it is no run or is not finished."""
    for name in ("recipe.yaml", "results.json", "answers.jsonl"):
        if not (folder / name).is_file():
            problem = (
                "is not finished" if (folder / "recipe.yaml").is_file() else "is no run folder"
            )
            raise UserError(f"{folder} {problem}: it has no {name}")
    answers = _read_answers(folder / "answers.jsonl")
    recipe = load_flat_recipe(folder)
    results = read_results(folder / "results.json")
    return FinishedRun(
        folder=folder,
        recipe=recipe,
        results=results,
        correct={name: one["correct"] for name, one in answers.items()},
        types_and_languages={name: (one["type"], one["language"]) for name, one in answers.items()},
        families={name: str(one.get("family") or "") for name, one in answers.items()},
        answers_and_truths={
            name: (one.get("answer", ""), one.get("truth", "")) for name, one in answers.items()
        },
        clusters={
            name: one.get("picture") or conversation_of(one["id"]) for name, one in answers.items()
        },
        versions=_load_versions(folder, results),
        contents=_load_contents(folder, recipe),
        checksums={name: one["checksum"] for name, one in answers.items() if one.get("checksum")},
    )


def _read_answers(file: Path) -> dict[str, dict[str, Any]]:
    """Return question id -> its line in answers.jsonl, of the compared set."""
    answers: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(split_lines(read_text(file, MAX_RECORDS_BYTES)), 1):
        try:
            answer = parse_json(line)
            if answer["set"] == COMPARED_SET:
                name = str(answer["id"])
                if name in answers:  # several questions may have the same id
                    name = f"{name}#{number}"
                answers[name] = check_record(answer, AnswerLine, Path(f"{file}, line {number}"))
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{file}, line {number}: is no answer") from error
    return answers


def conversation_of(question_id: str) -> str:
    """Return the conversation of a question: its id without the number of the turn, as in `7/1`."""
    conversation, _, turn = question_id.rpartition("/")
    return conversation if conversation and turn.isdecimal() else question_id


def cluster_numbers(runs: Iterable[FinishedRun], questions: Sequence[str]) -> NDArray[np.int64]:
    """Return the number of each question's cluster `[questions]`.

    Runs of old versions do not name pictures: that of all runs counts which tells least apart.
    """
    numbered = (number_clusters([run.clusters[name] for name in questions]) for run in runs)
    return min(numbered, key=lambda numbers: int(numbers.max()))


def _load_versions(folder: Path, results: dict[str, Any]) -> dict[str, str]:
    """Return the recorded versions; the commit is that of the evaluation, where there is one.

    Of the initial weights, vision encoder and language model are included; the connector's are not,
    because connectors are what is compared.
    """
    file = folder / "versions.json"
    versions = read_json(file) if file.is_file() else {}
    weights = versions.pop("weights", None)
    for key in (*DATA_KEYS, "max_tokens_per_row", "wandb_id"):
        versions.pop(key, None)
    for part in ("vision", "second_vision", "language"):
        if isinstance(weights, dict) and isinstance(weights.get(part), dict):
            versions[f"weights of {part}"] = weights[part].get("sha256")
    versions |= {"commit": results["commit"]} if results.get("commit") else {}
    return {name: str(value) for name, value in versions.items()}


def _load_contents(
    folder: Path, recipe: Mapping[str, Any], followed_inits: int = 0
) -> dict[str, str]:
    """Return checksums of a run's data, of its own connector, and of what its `init` trained.

    Of runs that begin with each other `MAX_INITS` are followed.
    """
    contents = data_checksums(folder / "versions.json")
    source = folder / KEPT_FOLDER / RECORD_FILE
    if source.is_file():
        record = read_json(source)
        contents["connector.name"] = str(record.get("sha256") or record.get("version"))
    init = recipe.get("init")
    if init and followed_inits < MAX_INITS and (Path(init) / "recipe.yaml").is_file():
        contents[init] = _checksum_trained(Path(init), followed_inits + 1)
    return contents


def _checksum_trained(folder: Path, followed_inits: int) -> str:
    """Return a checksum of what a run or checkpoint trained; its seed does not count."""
    recipe = load_flat_recipe(folder)
    checkpoint = folder.name if (folder / "position.json").is_file() else ""
    contents = _load_contents(folder, recipe, followed_inits)
    identity = {**identity_with_source(recipe, contents), "checkpoint": checkpoint}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def load_flat_recipe(folder: Path) -> dict[str, Any]:
    """Return the resolved recipe of a run or checkpoint with one key for every value."""
    return flatten_keys(recipes.to_plain(recipes.load_recipe_file(folder / "recipe.yaml")))


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


def correct_matrix(
    arm: ComparisonArm, seeds: Sequence[int], questions: Sequence[str]
) -> CorrectMatrix:
    """Return which answers of an arm are right, `[seeds, questions]`."""
    by_seed = {run.seed: run.correct for run in arm.runs}
    return np.array([[by_seed[seed][name] for name in questions] for seed in seeds], dtype=float)
