"""Which seeds and questions all rows have: what can be paired.

A question is known by its id. Where data were changed, or rows have other data, one id may stand
for another question: its true answer, its text or its picture tells. Such questions are never
paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePath

from vlbench.compare.report.finished_runs import ComparisonArm, FinishedRun, conversation_of
from vlbench.errors import UserError

SHOWN_ROWS = 4  # in an error


def common_seeds_and_questions(arms: Sequence[ComparisonArm]) -> tuple[list[int], list[str]]:
    """Return the seeds that all arms have, and the questions that all their runs were asked.

    Questions that are not the same in all runs (`unlike_questions`) are left out. A UserError where
    no seed or no question remains.
    """
    seeds = set.intersection(*(set(arm.seeds) for arm in arms))
    if not seeds:
        seeds_per_arm = "; ".join(f"{arm.name}: {', '.join(map(str, arm.seeds))}" for arm in arms)
        raise UserError(
            f"no seed is common to all rows, so nothing can be paired ({seeds_per_arm})"
        )
    runs = [run for arm in arms for run in arm.runs if run.seed in seeds]
    common = _asked_of_all(runs)
    if not common:
        fewest = [min(arm.runs, key=lambda run: len(run.correct)) for arm in arms[:SHOWN_ROWS]]
        asked = "; ".join(map(_describe_asked, fewest))
        more = "; ..." if len(arms) > SHOWN_ROWS else ""
        raise UserError(
            f"no question was asked of all {len(arms)} rows, so nothing can be paired "
            f"({asked}{more})"
        )
    unlike = {*unlike_questions(runs)}
    if len(unlike) == len(common):
        raise UserError(
            "no question was asked of all rows, so nothing can be paired: under the same ids "
            f"their true answers, texts or pictures differ, as of {common[0]}"
        )
    return sorted(seeds), [name for name in common if name not in unlike]


def _describe_asked(run: FinishedRun) -> str:
    """Return how many questions a run has answered, and about what."""
    if not run.correct:
        return f"{run.folder} has no answers"
    return f"{run.folder}: {len(run.correct)} about {run.results.get('asked_of') or 'new images'}"


def unlike_questions(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the ids that do not stand for the same question in all runs: others are paired.

    The true answer tells it, and the checksum of text and pictures. Where runs of old versions have
    none, the file name of the picture does: of its path no more counts, as data may move.
    """
    names = _asked_of_all(runs)
    tells = [_true_answer, _checksum]
    if not all(name in run.checksums for run in runs for name in names):
        tells.append(_picture_name)
    return [name for name in names if any(_differs(runs, name, tell) for tell in tells)]


def _asked_of_all(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the ids that all runs have, in the order of the first run."""
    common = set.intersection(*(set(run.correct) for run in runs))
    return [name for name in runs[0].correct if name in common]


def _differs(
    runs: Sequence[FinishedRun], name: str, tell: Callable[[FinishedRun, str], str]
) -> bool:
    """Tell whether runs that know something of a question know different things."""
    return len({told for run in runs if (told := tell(run, name))}) > 1


def _true_answer(run: FinishedRun, name: str) -> str:
    return run.answers_and_truths[name][1]


def _checksum(run: FinishedRun, name: str) -> str:
    return run.checksums.get(name, "")


def _picture_name(run: FinishedRun, name: str) -> str:
    """Return the file name of a question's picture, "" where the run does not name it."""
    picture = run.clusters[name]
    return "" if picture == conversation_of(name) else PurePath(picture).name
