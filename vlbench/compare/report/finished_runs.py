"""Reading finished runs: recipes, answers and versions, grouped into arms of equal recipe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlbench.command_line.overrides import flatten_keys, shorten_keys
from vlbench.compare.report.question_clusters import CorrectMatrix, number_clusters
from vlbench.compare.report.row_identity import STAGES_KEY, row_identity
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
BUDGET_KEYS = ("steps", "epochs", "global_batch_size", "max_tokens_per_row", "warmup_ratio")
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
    families: dict[str, str] = {}
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
                families[name] = str(answer.get("family") or "")
                answers_and_truths[name] = (answer.get("answer", ""), answer.get("truth", ""))
                clusters[name] = answer.get("picture") or conversation_of(answer["id"])
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{folder / 'answers.jsonl'}, line {number}: is no answer") from error
    recipe = load_flat_recipe(folder)
    results = read_results(folder / "results.json")
    return FinishedRun(
        folder=folder,
        recipe=recipe,
        results=results,
        correct=correct,
        types_and_languages=types_and_languages,
        families=families,
        answers_and_truths=answers_and_truths,
        clusters=clusters,
        versions=_load_versions(folder, results),
        contents=_load_contents(folder, recipe),
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
    for key in (*DATA_KEYS, "max_tokens_per_row"):
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
    identity = {**_identity(recipe, contents), "checkpoint": checkpoint}
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
    differing = [
        key
        for key in _keys_of_all_stages(identities)
        if len({json.dumps(identity.get(key)) for identity in identities}) > 1
    ]
    return sorted(differing, key=lambda key: not key.endswith(".lr"))


def shown_values(runs: Sequence[FinishedRun], key: str) -> list[Any]:
    """Return the values of a key as recipes have them, or else what tells them apart.

    A recipe's text is not enough where the file that it names was another one.
    """
    values = [_recipe_identity(run).get(key) for run in runs]
    if key == STAGES_KEY:
        return ["all stages" if value is None else ",".join(value) for value in values]
    typed = [run.recipe.get(key, value) for run, value in zip(runs, values, strict=True)]
    pairs = [json.dumps(pair) for pair in zip(typed, values, strict=True)]
    return typed if len({*map(json.dumps, typed)}) == len({*pairs}) else values


def _keys_of_all_stages(identities: Sequence[dict[str, Any]]) -> list[str]:
    """Return the keys of rows, in order, without those of stages that some of them did not run.

    That such a stage was left out says it all.
    """
    stages = [{key.split(".")[1] for key in one if key.startswith("stages.")} for one in identities]
    common = set.intersection(*stages)
    keys = dict.fromkeys(key for identity in identities for key in identity)
    return [key for key in keys if not key.startswith("stages.") or key.split(".")[1] in common]


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
    return _identity(run.recipe, run.contents)


def _identity(recipe: Mapping[str, Any], contents: Mapping[str, str]) -> dict[str, Any]:
    """Return what was trained, a connector that is not shipped told by its source."""
    identity = row_identity(recipe, contents)
    source = contents.get("connector.name")
    return identity if source is None else {**identity, "connector source": source[:12]}


def _arm_names(runs: Sequence[FinishedRun]) -> list[str]:
    """Return short unique names of recipes: the connector and as few other keys as possible."""
    identities = [_recipe_identity(run) for run in runs]
    if len(runs) == 1:
        return [str(identities[0]["connector.name"])]

    def count_distinct(keys: Sequence[str]) -> int:
        return len({json.dumps([identity.get(key) for key in keys]) for identity in identities})

    keys = _keys_of_all_stages(identities)
    order = sorted(keys, key=lambda key: (_meaning_rank(key), -count_distinct([key])))
    chosen: list[str] = []
    for key in order:
        if count_distinct([*chosen, key]) > count_distinct(chosen):
            chosen.append(key)
    short = shorten_keys(chosen)
    columns = [
        [
            "" if _is_of_another_connector(key, identity) else _format_setting(short[key], value)
            for identity, value in zip(identities, shown_values(runs, key), strict=True)
        ]
        for key in chosen
    ]
    return [" ".join(filter(None, words)) for words in zip(*columns, strict=True)]


def _is_of_another_connector(key: str, identity: Mapping[str, Any]) -> bool:
    """Return whether a key is an option that the connector of a row does not have."""
    return key.startswith("connector.") and key not in identity


def _meaning_rank(key: str) -> int:
    """Return how much a key says of what a row is, 0 for the most.

    A connector and its options, adapters, and the models say what is trained; how long, in which
    batches and at which rates is named only where nothing else tells rows apart.
    """
    if key == "connector.name":
        return 0
    if key.startswith("connector."):
        return 1
    if key == STAGES_KEY:
        return 2
    if ".lora." in key:
        return 3 if key.endswith(".rank") else 4
    if key.startswith(("vision.", "language.", "size", "init")):
        return 5
    last = key.rsplit(".", 1)[-1]
    return {"lr": 8, **dict.fromkeys(BUDGET_KEYS, 7)}.get(last, 6)


def _format_setting(key: str, value: Any) -> str:
    """Return `qformer` for a connector's name, `lora.rank=4` for any other key."""
    if key == "connector.name":
        return str(value)
    if key == STAGES_KEY and value == "all stages":
        return str(value)
    return f"{key.removeprefix('connector.')}={'null' if value is None else value}"
