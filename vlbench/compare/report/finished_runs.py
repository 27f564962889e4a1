"""Finished runs as rows of a comparison: what they differ in, and what they answered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlbench.compare.report.paired_statistics import CorrectMatrix
from vlbench.config import recipe as recipes
from vlbench.config.merge import flatten_keys
from vlbench.errors import UserError
from vlbench.text_files import read_json, read_text, split_lines

COMPARED_SET = "accuracy"  # the set of questions that arms are compared on
ARM_IGNORED_KEYS = ("seed", "run", "recipe", "only", "from", "dry_run", "profile", "trainer", "log")
"""Keys at the top of a recipe that make no other arm."""


@dataclass(frozen=True)
class FinishedRun:
    """A run that has its results."""

    folder: Path
    recipe: dict[str, Any]
    """Every key of the resolved recipe, flat: `stages.chat.steps` -> 450."""
    results: dict[str, Any]
    correct: dict[str, bool]
    """Question -> whether its answer was right."""
    types_and_languages: dict[str, tuple[str, str]]
    """Question -> its type and language."""
    answers_and_truths: dict[str, tuple[str, str]]
    """Question -> the answer and the true one."""
    versions: dict[str, str]
    """Of what the run was made with, its commit among them."""

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(self.recipe["seed"])


def load_finished_run(folder: Path) -> FinishedRun:
    """Return the run in `folder`; a Mistake when it is none or is not finished."""
    for name in ("recipe.yaml", "results.json", "answers.jsonl"):
        if not (folder / name).is_file():
            what = "is not finished" if (folder / "recipe.yaml").is_file() else "is no run folder"
            raise UserError(f"{folder} {what}: it has no {name}")
    right, kinds, texts = {}, {}, {}
    for number, line in enumerate(split_lines(read_text(folder / "answers.jsonl")), 1):
        try:
            one = json.loads(line)
            if one["set"] == COMPARED_SET:
                name = one["id"] if one["id"] not in right else f"{one['id']}#{number}"
                right[name] = bool(one["correct"])  # several questions may have the same id
                kinds[name] = (one["type"], one["language"])
                texts[name] = (one.get("answer", ""), one.get("truth", ""))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / 'answers.jsonl'}, line {number}: is no answer") from error
    recipe = flatten_keys(recipes.to_plain(recipes.load_recipe_file(folder / "recipe.yaml")))
    results = read_json(folder / "results.json")
    return FinishedRun(
        folder, recipe, results, right, kinds, texts, _load_versions(folder, results)
    )


def _load_versions(folder: Path, results: dict[str, Any]) -> dict[str, str]:
    """Return what is known of versions; the commit is that of the end, where answers were made.

    Of the weights that a run began with, tower and language model count: connectors are compared.
    """
    file = folder / "versions.json"
    found = read_json(file) if file.is_file() else {}
    weights = found.pop("weights", None)
    for part in ("vision", "language"):
        if isinstance(weights, dict) and isinstance(weights.get(part), dict):
            found[f"weights of {part}"] = weights[part].get("sha256")
    found |= {"commit": results["commit"]} if results.get("commit") else {}
    return {name: str(value) for name, value in found.items()}


@dataclass(frozen=True)
class ComparisonArm:
    """Runs of the same recipe that differ in the seed alone."""

    name: str
    runs: tuple[FinishedRun, ...]
    """In the order of their seeds."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the runs."""
        return tuple(run.seed for run in self.runs)


def group_into_arms(runs: Sequence[FinishedRun]) -> list[ComparisonArm]:
    """Group runs into arms, named by what they differ in; a seed that is there twice is refused."""
    grouped: dict[str, list[FinishedRun]] = {}
    for run in runs:
        grouped.setdefault(json.dumps(_recipe_identity(run), sort_keys=True), []).append(run)
    names = _arm_names([group[0] for group in grouped.values()])
    found = []
    for name, group in zip(names, grouped.values(), strict=True):
        group = sorted(group, key=lambda run: run.seed)
        for one, other in zip(group, group[1:], strict=False):
            if one.seed == other.seed:
                raise UserError(
                    f"{one.folder} and {other.folder} are the same recipe with the same seed "
                    f"{one.seed}: name one of them"
                )
        found.append(ComparisonArm(name, tuple(group)))
    return found


def differing_keys(arms: Sequence[ComparisonArm]) -> list[str]:
    """Return the keys in which arms differ, learning rates first."""
    recipes_ = [_recipe_identity(arm.runs[0]) for arm in arms]
    keys = dict.fromkeys(key for one in recipes_ for key in one)
    differ = [key for key in keys if len({json.dumps(one.get(key)) for one in recipes_}) > 1]
    return sorted(differ, key=lambda key: not key.endswith(".lr"))


def correct_matrix(
    arm: ComparisonArm, seeds: Sequence[int], questions: Sequence[str]
) -> CorrectMatrix:
    """Return which answers of an arm were right, `[seeds, questions]`."""
    by_seed = {run.seed: run.correct for run in arm.runs}
    return np.array([[by_seed[seed][one] for one in questions] for seed in seeds], dtype=float)


def common_seeds_and_questions(arms: Sequence[ComparisonArm]) -> tuple[list[int], list[str]]:
    """Return the seeds and the questions that all arms have."""
    seeds = set.intersection(*(set(arm.seeds) for arm in arms))
    if not seeds:
        each = "; ".join(f"{arm.name}: {', '.join(map(str, arm.seeds))}" for arm in arms)
        raise UserError(f"no seed is common to all rows, so nothing can be paired ({each})")
    asked = [set(run.correct) for arm in arms for run in arm.runs if run.seed in seeds]
    questions = set.intersection(*asked)
    if not questions:
        raise UserError("no question was asked of all rows, so nothing can be paired")
    first = next(run for run in arms[0].runs if run.seed in seeds)
    return sorted(seeds), [one for one in first.correct if one in questions]


def _recipe_identity(run: FinishedRun) -> dict[str, Any]:
    return {
        key: value for key, value in run.recipe.items() if key.split(".")[0] not in ARM_IGNORED_KEYS
    }


def _arm_names(runs: Sequence[FinishedRun]) -> list[str]:
    """Return a short name of each recipe: its connector, and as few other keys as tell it apart."""
    identities = [_recipe_identity(run) for run in runs]
    if len(runs) == 1:
        return [str(identities[0]["connector.name"])]

    def count_distinct(keys: Sequence[str]) -> int:
        return len({json.dumps([one.get(key) for key in keys]) for one in identities})

    keys = dict.fromkeys(key for one in identities for key in one)
    # a connector says most, then what has most values; a rate names a row only where it must
    order = sorted(
        keys, key=lambda key: (key != "connector.name", -count_distinct([key]), key.endswith(".lr"))
    )
    telling: list[str] = []
    for key in order:
        if count_distinct([*telling, key]) > count_distinct(telling):
            telling.append(key)
    short = _short_keys(telling)
    return [
        " ".join(_format_setting(short[key], one.get(key)) for key in telling) for one in identities
    ]


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Return the last two parts of each key; all of it, where these are those of another one."""
    ends = {key: ".".join(key.split(".")[-2:]) for key in keys}
    found = list(ends.values())
    return {key: end if found.count(end) == 1 else key for key, end in ends.items()}


def _format_setting(key: str, value: Any) -> str:
    """Return `qformer` for a connector's name, `lora.rank=4` for another key."""
    if key == "connector.name":
        return str(value)
    return f"{key.removeprefix('connector.')}={'null' if value is None else value}"
