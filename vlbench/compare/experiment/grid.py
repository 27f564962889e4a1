"""The grid of a comparison: recipes x alternatives x seeds, every combination a run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import get_args

from vlbench.command_line.arguments import BudgetName, EvalArguments
from vlbench.command_line.compare_arguments import DEFAULT_MATCH_LIMIT, CompareArguments
from vlbench.command_line.overrides import format_override, shorten_keys
from vlbench.command_line.parser import split_arguments
from vlbench.command_line.task_words import OWN_TASK, build_tasks, split_task_words
from vlbench.compare.experiment.curve_request import CurveRequest, parse_curve
from vlbench.compare.experiment.equal_rows import refuse_equal_rows
from vlbench.compare.experiment.sweep_factors import (
    LrFactors,
    check_sweep,
    parse_factors,
    take_part_words,
)
from vlbench.compare.report.curve_plan import CurvePlan
from vlbench.config import recipe as recipes
from vlbench.config.key_types import ENCODER_PARTS
from vlbench.config.schema import Recipe
from vlbench.errors import UserError
from vlbench.key_errors import declared_keys
from vlbench.new_folder import first_free_path
from vlbench.strict_values import INTEGER_PATTERN, parse_flow_yaml
from vlbench.text_files import read_yaml

MATCHABLE_BUDGETS: tuple[str, ...] = get_args(BudgetName)
"""What `match` can make equal in all rows; `model/connector_cost.py` counts them."""
MAX_ROWS = 300  # each is trained with several seeds; their recipes are read in some seconds
MAX_SEEDS = 1000
MAX_NAME_LENGTH = 80  # of a row: its name is that of a folder
RESERVED_KEYS = ("seed", "init", "profile")
"""Recipe keys that a comparison sets itself, or that make runs not comparable."""
RESERVED_GRID_KEYS = ("seed", "run", "profile", "dry_run")
"""Those that no row may have of its own; `init` may be what rows differ in."""
RESERVED_HINTS = {
    "seed": "give seeds=NUMBER",
    "init": "rows name what they begin with, grid='init=RUN' for all of them",
    "run": "run=FOLDER, outside of grid=, is the folder of all runs",
    "dry_run": "dry_run=true, outside of grid=, is for all rows",
    "profile": "profile=true is for one run of fit",
}
"""What to write instead of them."""


@dataclass(frozen=True)
class GridRow:
    """A row of the comparison: a recipe with overrides."""

    name: str
    """Short name, also of its folder."""
    overrides: tuple[str, ...]
    """Arguments of `fit`, without seed and run."""

    def overrides_for_seed(self, seed: int) -> list[str]:
        """Return the overrides with a seed."""
        return [*self.overrides, f"seed={seed}"]

    def with_overrides(self, values: Mapping[str, object]) -> GridRow:
        """Return the row with some keys set to new values, which keep the others of a mapping."""
        words = [part for word in self.overrides for part in _split_mapping(word, values)]
        kept = [
            word
            for word in words
            if not any(f"{word.split('=')[0]}.".startswith(f"{key}.") for key in values)
        ]
        return GridRow(self.name, (*kept, *(f"{key}={value}" for key, value in values.items())))


def _split_mapping(word: str, keys: Iterable[str]) -> list[str]:
    """Return `a={b: 1, c: 2}` as `a.b=1` and `a.c=2` where one of `keys` is inside of it."""
    key, _, text = word.partition("=")
    if not text.startswith("{") or not any(one.startswith(f"{key}.") for one in keys):
        return [word]
    parts = [format_override(f"{key}.{name}", one) for name, one in parse_flow_yaml(text).items()]
    return [inner for part in parts for inner in _split_mapping(part, keys)]


@dataclass(frozen=True)
class ComparisonGrid:
    """The runs of a comparison: every row with every seed."""

    rows: tuple[GridRow, ...]
    seeds: tuple[int, ...]
    folder: Path
    budget_to_match: BudgetName | None = None
    """The one of `MATCHABLE_BUDGETS` that is made equal in all rows."""
    match_limit: float = DEFAULT_MATCH_LIMIT
    """The most times that an option may become larger or smaller for that."""
    curve: CurveRequest | None = None
    """The budgets at which every row is to be trained."""
    curve_plan: CurvePlan | None = None
    """The points of the curves, once rows are points."""
    lr_factors: LrFactors = field(default_factory=dict)
    """Factors of learning rates that every row tries before the runs; {} for none."""
    jobs: str = "auto"
    """How many runs are trained in parallel: a number, `auto` or `slurm`."""
    dry_run: bool = False
    """Only print the plan."""
    arguments: tuple[str, ...] = ()
    """The command line."""
    tasks: str | None = None
    """What every run is asked when it has ended, as it was typed."""
    task_words: tuple[str, ...] = ()
    """`tasks.NAME.KEY=VALUE`, what one of the tasks is asked with."""

    @cached_property
    def recipes(self) -> dict[str, Recipe]:
        """Name of a row -> its recipe with the first seed, read once: each takes a while."""
        return {row.name: load_recipe(row, self.seeds[0]) for row in self.rows}

    def recipe_of(self, row: GridRow, seed: int) -> Recipe:
        """Return the recipe of a row with a seed."""
        return self.recipes[row.name].model_copy(update={"seed": seed})

    @property
    def tested_pair_count(self) -> int:
        """The number of pairs of rows whose difference will be tested."""
        if self.curve_plan:
            return len(self.curve_plan.tested_pairs())
        return len(self.rows) * (len(self.rows) - 1) // 2

    def compared_rows(self) -> list[list[GridRow]]:
        """Return the rows that are compared with one another: those of a budget, or else all."""
        if self.curve_plan is None:
            return [list(self.rows)]
        by_name = {row.name: row for row in self.rows}
        groups = self.curve_plan.points_by_budget()
        return [[by_name[point.row] for point in points] for points in groups]

    def run_folders(self) -> list[Path]:
        """Return the folders of all runs."""
        return [self.run_folder(row, seed) for seed in self.seeds for row in self.rows]

    def run_folder(self, row: GridRow, seed: int) -> Path:
        """Return the folder of a run."""
        return self.folder / row.name / f"seed{seed}"


def parse_grid(words: list[str]) -> ComparisonGrid:
    """Return the grid of a command line; all errors of all recipes are raised together."""
    factor_texts, others = take_part_words(words)
    task_words, others = split_task_words("tasks", others)
    arguments, common = split_arguments(CompareArguments, others, declared_keys(Recipe))
    _check_task_words(arguments.tasks, task_words)
    _refuse_reserved(common, RESERVED_KEYS)
    if arguments.match_limit and not arguments.match:
        raise UserError("match_limit= is of match=, which is not given")
    curve = parse_curve(arguments.curve)
    if curve and curve.budget in MATCHABLE_BUDGETS and arguments.match:
        raise UserError(
            f"curve={curve.budget} sets the sizes of connectors, and so does "
            f"match={arguments.match}: give one of them"
        )
    names = [name.strip() for name in arguments.recipe.split(",") if name.strip()]
    alternatives = _parse_alternatives(arguments.grid)
    _refuse_reserved([word for words in alternatives for word in words], RESERVED_GRID_KEYS)
    if len(names) * len(alternatives) > MAX_ROWS:
        raise UserError(
            f"the grid has {len(names) * len(alternatives):,} rows; a comparison has at most "
            f"{MAX_ROWS}"
        )
    row_name = _make_row_names(names, alternatives)
    rows = [
        GridRow(
            row_name[recipe, alternative],
            (f"recipe={recipe}", *common, *alternative),
        )
        for recipe in names
        for alternative in alternatives
    ]
    repeated = [name for name, count in Counter(row.name for row in rows).items() if count > 1]
    if repeated:
        raise UserError(f"two rows are the same: {repeated[0]}")
    seeds = _parse_seeds(arguments.seeds)
    lr_factors = parse_factors(arguments.sweep, factor_texts)
    recipes_by_row = _load_recipes(rows, seeds[0])
    for seed in {min(seeds), max(seeds)} - {seeds[0]}:  # between them all are in the range
        _load_recipes(rows[:1], seed)
    folder = Path(arguments.run) if arguments.run else first_free_path("runs/compare-{}")
    if arguments.freeze:
        rows = [_freeze_encoder(row, folder) for row in rows]
        recipes_by_row = _load_recipes(rows, seeds[0])
    refuse_equal_rows(recipes_by_row)
    check_sweep(lr_factors, recipes_by_row, seeds)
    return ComparisonGrid(
        tuple(rows),
        seeds,
        folder,
        arguments.match,
        arguments.match_limit or DEFAULT_MATCH_LIMIT,
        curve,
        None,
        lr_factors,
        _parse_jobs(arguments.jobs),
        arguments.dry_run,
        tuple(words),
        arguments.tasks,
        tuple(task_words),
    )


def _refuse_reserved(words: Sequence[str], reserved_keys: Sequence[str]) -> None:
    reserved = [key for word in words if (key := word.partition("=")[0]) in reserved_keys]
    if reserved:
        raise UserError(f"{reserved[0]} is not for compare: {RESERVED_HINTS[reserved[0]]}")


def _parse_alternatives(text: str | None) -> list[tuple[str, ...]]:
    """Return the alternatives of `grid`: 'a=1 + b=2 | c=3', or a YAML file with a list of them."""
    if text is None:
        return [()]
    if Path(text).suffix in (".yaml", ".yml"):
        return _read_alternatives(Path(text).expanduser())
    alternatives = []
    for number, part in enumerate(text.split("|"), 1):
        words = tuple(word.strip() for word in re.split(r"\s\+\s", part.strip()) if word.strip())
        wrong = [word for word in words if "=" not in word]
        if wrong or not words:
            given = f"'{wrong[0]}'" if wrong else "nothing"
            raise UserError(f"grid: alternative {number} holds {given}, which is not KEY=VALUE")
        alternatives.append(words)
    return alternatives


def _read_alternatives(path: Path) -> list[tuple[str, ...]]:
    """Read alternatives from YAML: `rows: [{KEY: VALUE, ...}, ...]`."""
    rows = read_yaml(path).get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row for row in rows):
        raise UserError(f"{path}: wanted is rows, a list of mappings from keys to values")
    return [tuple(format_override(str(key), value) for key, value in row.items()) for row in rows]


def _parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds of `seeds=3` (0, 1, 2) or `seeds=[0,5]`."""
    if INTEGER_PATTERN.fullmatch(text):
        if not 1 <= int(text[:9]) <= MAX_SEEDS or len(text) > 9:
            raise UserError(f"seeds is {text}; allowed are 1 to {MAX_SEEDS}, or a list as [0,1,5]")
        return tuple(range(int(text)))
    try:
        values = parse_flow_yaml(text) if text.startswith("[") else None
        are_integers = isinstance(values, list) and all(
            INTEGER_PATTERN.fullmatch(str(value)) for value in values
        )
        seeds = [int(value) for value in values or ()] if are_integers else []
    except ValueError:  # a bracket that is not closed, a number of thousands of digits
        seeds = []
    if not 0 < len(seeds) <= MAX_SEEDS:
        given = f"'{text}'" if len(text) < 100 else f"'{text[:40]}...' ({len(text):,} characters)"
        raise UserError(f"seeds is {given}; allowed are 1 to {MAX_SEEDS}, or a list as [0,1,5]")
    return tuple(dict.fromkeys(seeds))


def _freeze_encoder(row: GridRow, folder: Path) -> GridRow:
    """Return the row with a frozen vision encoder whose features are cached for all runs."""
    stages = load_recipe(row, 0).stages
    frozen = {
        f"stages.{name}.train.{part}": "null"
        for name, stage in stages.items()
        for part in ENCODER_PARTS
        if part in stage.trained_parts
    }
    return row.with_overrides({**frozen, "trainer.feature_cache": folder / "features"})


def _parse_jobs(text: str) -> str:
    if text not in ("auto", "slurm") and not (
        INTEGER_PATTERN.fullmatch(text) and 1 <= int(text) <= 1000
    ):
        raise UserError(f"jobs is '{text}'; allowed are 1 to 1000, auto and slurm")
    return text


def _load_recipes(rows: Sequence[GridRow], seed: int) -> dict[str, Recipe]:
    """Return every row's recipe, with data; all errors are raised together, each with its row."""
    lines: list[str] = []
    loaded: dict[str, Recipe] = {}
    for row in rows:
        try:
            loaded[row.name] = load_recipe(row, seed)
            recipes.require_data(loaded[row.name].size, loaded[row.name].selected_data)
        except UserError as error:
            prefix = f"row {row.name}: " if len(rows) > 1 else ""
            lines += [f"{prefix}{line}" for line in error.lines]
    if lines:
        raise UserError(*dict.fromkeys(lines))
    return loaded


def _check_task_words(tasks: str | None, task_words: Sequence[str]) -> None:
    """Refuse keys of tasks that no run can be asked with."""
    if task_words and tasks is None:
        raise UserError(f"'{task_words[0]}' is for one of tasks=, which are not given")
    if own := [word for word in task_words if word.startswith(f"tasks.{OWN_TASK}.")]:
        raise UserError(
            f"'{own[0]}' is for the runs' own questions, which fit asks; log.questions=NUMBER says "
            "how many"
        )
    if tasks is not None:
        build_tasks("tasks", tasks, EvalArguments(model="RUN"), task_words)


def load_recipe(row: GridRow, seed: int) -> Recipe:
    """Return the recipe of a row with a seed."""
    return recipes.load_recipe(row.overrides_for_seed(seed))


def _make_row_names(
    recipe_names: list[str], alternatives: list[tuple[str, ...]]
) -> dict[tuple[str, tuple[str, ...]], str]:
    """Return (recipe, alternative) -> a short name of the row, valid as the name of a folder.

    It says in which overrides the alternatives differ; a number tells apart what is cut, or spelt
    in letters of folder names, alike.
    """
    common = set.intersection(*map(set, alternatives)) if len(alternatives) > 1 else set()
    keys = dict.fromkeys(word.partition("=")[0] for words in alternatives for word in words)
    short_keys = shorten_keys(keys)
    names: dict[tuple[str, tuple[str, ...]], str] = {}
    for recipe in recipe_names:
        stem = Path(recipe).stem
        for alternative in alternatives:
            told = [word.partition("=") for word in alternative if word not in common]
            short = "_".join(f"{short_keys[key]}={value}" for key, _, value in told)
            short = re.sub(r"[^A-Za-z0-9_.=-]+", "-", short)
            name = stem if len(alternatives) == 1 else short
            if len(alternatives) > 1 and (len(recipe_names) > 1 or not short):
                name = f"{stem}_{short}".rstrip("_")
            names[recipe, alternative] = name
    return _cut_names(names)


def _cut_names(
    names: dict[tuple[str, tuple[str, ...]], str],
) -> dict[tuple[str, tuple[str, ...]], str]:
    """Return names of at most MAX_NAME_LENGTH characters; those of different rows are different."""
    cut: dict[tuple[str, tuple[str, ...]], str] = {}
    rows_by_name: dict[str, tuple[str, tuple[str, ...]]] = {}
    for row, whole in names.items():
        name, number = whole[:MAX_NAME_LENGTH], 2
        while rows_by_name.setdefault(name, row) != row:
            name = f"{whole[: MAX_NAME_LENGTH - 4]}-{number}"
            number += 1
        cut[row] = name
    return cut
