"""`sweep=0.3,1,3` and `sweep.language=0.3,1,3`: the factors of learning rates that rows try first.

What would make a sweep worthless is refused before anything is trained: no held-out samples, parts
that no stage trains, held-out samples that are questions of the exam as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vlbench.compare.report.sweep_summary import SWEEP_SEED
from vlbench.config.key_types import PART_NAMES
from vlbench.config.schema import Recipe
from vlbench.config.stage_schema import StageConfig, StageData
from vlbench.data.data_sources import (
    HELD_OUT_SEED_OFFSET,
    SourceCache,
    open_held_out,
)
from vlbench.data.preflight import has_images
from vlbench.errors import UserError, suggest_name
from vlbench.evaluate.heldout_questions import MAX_OWN_QUESTIONS, collect_questions
from vlbench.train.stage_plan import first_loss_sample

LrFactors = Mapping[str, tuple[float, ...]]
"""Part of the model -> factors of its learning rate in every stage."""
DEFAULT_PART = "connector"  # whose rate `sweep=` means
KEY_PREFIX = "sweep."
MAX_LR_FACTORS = 30  # of a part, and the most trials of a row


def take_part_words(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the factors of words `sweep.PART=F,F` by part, and the other words."""
    others = [word for word in words if not word.startswith(KEY_PREFIX)]
    texts: dict[str, str] = {}
    for word in words:
        if not word.startswith(KEY_PREFIX):
            continue
        part, equals, text = word.removeprefix(KEY_PREFIX).partition("=")
        if part not in PART_NAMES or not equals:
            raise UserError(
                f"'{word}': wanted is sweep.PART=FACTORS, PART one of {', '.join(PART_NAMES)}."
                f"{suggest_name(part, PART_NAMES)}"
            )
        if part in texts:
            raise UserError(f"sweep.{part} is given twice, as '{texts[part]}' and '{text}'")
        texts[part] = text
    return texts, others


def parse_factors(text: str | None, part_texts: Mapping[str, str]) -> LrFactors:
    """Return the factors of `sweep=` (the connector's) and of each `sweep.PART=`, by part."""
    if text is not None and DEFAULT_PART in part_texts:
        raise UserError(f"sweep is sweep.{DEFAULT_PART}: give one of them")
    texts = {"sweep": text} if text is not None else {}
    texts |= {f"{KEY_PREFIX}{part}": one for part, one in part_texts.items()}
    factors = {
        DEFAULT_PART if key == "sweep" else key.removeprefix(KEY_PREFIX): _parse_numbers(key, one)
        for key, one in texts.items()
    }
    trials = math.prod(map(len, factors.values()))
    if trials > MAX_LR_FACTORS:
        raise UserError(
            f"sweep: {' x '.join(str(len(one)) for one in factors.values())} factors are {trials} "
            f"trials of every row; allowed are {MAX_LR_FACTORS}"
        )
    return factors


def _parse_numbers(key: str, text: str) -> tuple[float, ...]:
    try:
        factors = tuple(dict.fromkeys(float(factor) for factor in text.strip("[]").split(",")))
    except ValueError:
        factors = ()
    if not 2 <= len(factors) <= MAX_LR_FACTORS or not all(
        1e-4 <= factor <= 1e4 for factor in factors
    ):
        raise UserError(
            f"{key} is '{text:.100}'; wanted are factors of the learning rate between 0.0001 and "
            f"10000, 2 to {MAX_LR_FACTORS} of them, as in {key}=0.3,1,3"
        )
    return factors


def check_sweep(
    lr_factors: LrFactors, recipes_by_row: Mapping[str, Recipe], seeds: Sequence[int]
) -> None:
    """Raise a UserError if the trials of any row could not be told apart, or not fairly."""
    if not lr_factors:
        return
    offsets = (0, HELD_OUT_SEED_OFFSET, -HELD_OUT_SEED_OFFSET)
    taken = sorted({SWEEP_SEED + offset for offset in offsets} & set(seeds))
    if taken:
        raise UserError(f"seeds: {taken[0]} belongs to the trials of sweep=; take another one")
    open_sources: SourceCache = {}
    checked: list[object] = []
    for name, recipe in recipes_by_row.items():
        stages = recipe.selected_stages
        _check_rates(lr_factors, name, list(stages.values()))
        data = (recipe.data, recipe.log.questions, recipe.stages)
        if data not in checked:
            checked.append(data)
            trained = [one for one, stage in stages.items() if _has_steps(stage)][-1]
            _check_held_out(
                name,
                recipe.stage_data(trained),
                recipe.last_stage_data,
                recipe.log.questions,
                open_sources,
            )


def _check_rates(lr_factors: LrFactors, row_name: str, stages: Sequence[StageConfig]) -> None:
    for part in lr_factors:
        if not any(part in stage.trained_parts and _has_steps(stage) for stage in stages):
            raise UserError(
                f"row {row_name}: no stage trains the {part}, so there is no rate to try; leave "
                f"{'sweep' if part == DEFAULT_PART else KEY_PREFIX + part}= out"
            )


def _has_steps(stage: StageConfig) -> bool:
    return bool(stage.steps or stage.epochs)


def _check_held_out(
    row_name: str,
    trained: StageData,
    last: StageData,
    question_limit: int | None,
    open_sources: SourceCache,
) -> None:
    """Refuse a row without held-out samples, or whose held-out samples are asked at the end.

    `trained` is its last stage that has steps; the questions at the end are about `last`.
    """
    data, source = trained.config, open_held_out(trained, open_sources)
    if source is None or (trained.stage.sample_format == "caption" and not has_images(source, [])):
        raise UserError(
            f"row {row_name}: the sweep takes the rate with the lowest held-out loss, and stage "
            f"{trained.stage_name} has no held-out samples; give data.val=FILE, or leave sweep= out"
        )
    if not data.val or data.val != last.config.val:
        return  # rendered scenes, or the exam is about others
    asked, _ = collect_questions(source, question_limit or MAX_OWN_QUESTIONS)
    last_asked = max((int(one.record_number) for one in asked), default=0)
    if last_asked > first_loss_sample(len(source)):
        raise UserError(
            f"row {row_name}: the questions at the end are about the first {last_asked} of "
            f"{len(source)} samples of data.val, and the sweep needs others for its choice; give "
            f"{2 * last_asked} samples or more, or log.questions={max(1, len(asked) // 3)}"
        )
