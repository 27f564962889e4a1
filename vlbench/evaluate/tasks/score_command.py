"""`python -m vlbench score`: what a file of answers to MMMU or CMMMU is worth, by a protocol."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from vlbench.command_line.arguments import ScoreArguments
from vlbench.errors import UserError
from vlbench.evaluate.tasks.answer_files import AnswerRecord, first_errors, read_answers
from vlbench.evaluate.tasks.benchmark_truths import read_truths
from vlbench.evaluate.tasks.score_summary import summarize_scores
from vlbench.evaluate.tasks.scored_items import AnsweredItem, ScoredItem
from vlbench.evaluate.tasks.scoring_protocols import score_items, scoring_protocol
from vlbench.evaluate.tasks.subject_domains import SUBJECT_DOMAINS
from vlbench.text_files import format_json_lines, read_text, write_atomically
from vlbench.text_tables import format_table

PUBLISHED_FILE = Path(__file__).with_name("published.yaml")


def run_score(arguments: ScoreArguments) -> int:
    """Score the answers in a file, print a table, and write scores.json and scored.jsonl.

    Answers that cannot be scored are left out, named on standard error and in bad.txt, and counted.
    """
    task, protocol, seed = arguments.task, arguments.protocol, arguments.seed
    shown = scoring_protocol(task, protocol).accuracy_format
    if arguments.split and not arguments.data:
        raise UserError("split= is for data=, the questions of a file that holds ids alone")
    answers = Path(arguments.answers)
    out = Path(arguments.out or f"{answers}.scores")
    truths = read_truths(task, arguments.data, arguments.split or "val") if arguments.data else None
    # what came with Yi-VL compares letters, and needs no options
    records, items, bad = read_answers(task, answers, truths, protocol != "yi")
    records, items, more = _drop_unscorable(task, protocol, records, items)
    bad += more
    if not items:
        raise UserError("\n".join(first_errors(bad)))
    scored = score_items(task, protocol, items, seed)
    scores = {"task": task, "protocol": protocol, "seed": seed, **summarize_scores(task, scored)}
    if bad:
        scores["bad"] = len(bad)
    write_score_files(out, scores, records, scored)
    write_atomically(out / "bad.txt", "".join(f"{line}\n" for line in bad))
    for line in first_errors(bad):
        print(f"vlbench: left out: {line}", file=sys.stderr)
    told = [f"{len(bad)} of {len(bad) + len(items)} lines left out ({out / 'bad.txt'})"] * bool(bad)
    told += report_equal_ids([record["id"] for record in records])
    lines = [
        *told,
        *format_score_table(scores, shown),
        "",
        *format_published(scores),
        "",
        f"wrote {out}",
    ]
    print("\n".join(lines))
    return 0


def report_equal_ids(ids: Sequence[object]) -> list[str]:
    """Return a line on ids that are there several times, [] if none is."""
    counts = Counter(map(str, ids))
    several = {name: number for name, number in counts.items() if number > 1}
    if not several:
        return []
    name, number = next(iter(several.items()))
    total = sum(several.values())
    return [f"{total} questions share {len(several)} ids ({name}: {number}); each counts by itself"]


def _drop_unscorable(
    task: str, protocol: str, records: list[AnswerRecord], items: list[AnsweredItem]
) -> tuple[list[AnswerRecord], list[AnsweredItem], list[str]]:
    """Leave out the items at which the benchmarks' code stops, and say why."""
    kept: list[tuple[AnswerRecord, AnsweredItem]] = []
    bad = []
    for record, item in zip(records, items, strict=True):
        try:
            score_items(task, protocol, [item])
            kept.append((record, item))
        except UserError as mistake:
            bad.append(str(mistake))
    return [record for record, _ in kept], [item for _, item in kept], bad


def write_score_files(
    folder: Path,
    scores: dict[str, Any],
    records: list[AnswerRecord],
    scored_items: list[ScoredItem],
) -> None:
    """Write scores.json, and scored.jsonl: every line as it was, and what was made of it."""
    lines = format_json_lines(
        {
            **record,
            "prediction": to_json_value(one.prediction),
            "correct": one.correct,
            "fallback": one.fallback,
        }
        for record, one in zip(records, scored_items, strict=True)
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "scored.jsonl", lines)
        write_atomically(
            folder / "scores.json", json.dumps(scores, indent=1, ensure_ascii=False) + "\n"
        )
    except OSError as error:
        raise UserError(f"out={folder} cannot be written ({error.strerror})") from error


def to_json_value(prediction: Any) -> Any:
    """Return a prediction as JSON knows it: nan and inf, which it does not, as texts."""
    if isinstance(prediction, list):
        return [to_json_value(value) for value in prediction]
    finite = not isinstance(prediction, float) or math.isfinite(prediction)
    return prediction if finite else str(prediction)


def format_score_table(scores: dict[str, Any], accuracy_format: str) -> Iterator[str]:
    """Return lines on all answers, types, domains and subjects, as the protocol prints them."""
    drawn, unread = scores["fallback"], scores["unread"]
    yield (
        f"{scores['task']}, protocol {scores['protocol']}, seed {scores['seed']}: "
        f"{drawn} answers drawn at random, {unread} more unreadable; "
        f"{(drawn + unread) / scores['n']:.1%} could not be read"
    )
    rows: list[tuple[str, ...]] = [("n", "correct", "accuracy", "95 % interval", "")]
    parts = [scores[f"by_{kind}"].items() for kind in ("type", "domain", "subject")]
    for name, group in [("all", scores), *chain(*parts)]:
        if group["n"]:
            low, high = group["interval"]
            accuracy = format(group["accuracy"], accuracy_format)
            interval = f"{low:.3f} to {high:.3f}"
            rows.append((str(group["n"]), str(group["correct"]), accuracy, interval, name))
    yield from format_table(rows, ">>>><")


def format_published(scores: dict[str, Any]) -> Iterator[str]:
    """Return lines of published accuracies in percent: all, and the domains; these answers first.

    What is published was prompted in other ways and is of the whole set that its line names.
    """
    by_domain = [scores["by_domain"][domain] for domain in SUBJECT_DOMAINS[scores["task"]].domains]
    ours = [100 * one["accuracy"] if one["n"] else None for one in (scores, *by_domain)]
    yield f"percent: all, {', '.join(SUBJECT_DOMAINS[scores['task']].domains)}"
    yield _format_row(ours, "these answers")
    for name, known in yaml.safe_load(read_text(PUBLISHED_FILE))[scores["task"]].items():
        yield f"published, {name} ({known['source']})"
        for model, row in known["rows"].items():
            yield _format_row(row, model)


def _format_row(percentages: list[float | None], row_name: str) -> str:
    cells = [*percentages, *[None] * (7 - len(percentages))]
    return "".join("     -" if cell is None else f"{cell:6.1f}" for cell in cells) + f"  {row_name}"
