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

from vlbench.evaluate.tasks.aggregate import summary
from vlbench.evaluate.tasks.answers_file import Record, read_answers
from vlbench.evaluate.tasks.answers_file import shown as first_of
from vlbench.evaluate.tasks.benchmark_truths import read_truths
from vlbench.evaluate.tasks.items import Item, Scored
from vlbench.evaluate.tasks.protocols import protocol_of, score_all
from vlbench.evaluate.tasks.subjects import SUBJECTS
from vlbench.files import json_lines, read_text, write_whole
from vlbench.mistakes import Mistake
from vlbench.words import given_keys, whole

KEYS = ("seed", "out", "data", "split")
SEED = 42  # of the benchmarks' own code
PUBLISHED = Path(__file__).with_name("published.yaml")


def main(words: list[str]) -> int:
    """Score `answers=FILE`, print a table, and write scores.json and scored.jsonl.

    They go to the folder `out=DIR`, by default FILE.scores beside the file. Answers that cannot be
    scored are left out, named on standard error and in bad.txt, and counted. `data=` has the
    questions of a file that holds their ids alone.
    """
    given = given_keys("score", words, ("task", "answers", "protocol"), KEYS)
    task, protocol = given["task"], given["protocol"]
    shown = protocol_of(task, protocol).shown
    seed = whole(given, "seed", SEED, 0, 2**32 - 1)
    if "split" in given and "data" not in given:
        raise Mistake("split= is for data=, the questions of a file that holds ids alone")
    answers = Path(given["answers"]).expanduser()
    out = Path(given.get("out") or f"{answers}.scores").expanduser()
    truths = (
        read_truths(task, given["data"], given.get("split", "val")) if "data" in given else None
    )
    # what came with Yi-VL compares letters, and needs no options
    records, items, bad = read_answers(task, answers, truths, protocol != "yi")
    records, items, more = _scorable(task, protocol, records, items)
    bad += more
    if not items:
        raise Mistake("\n".join(first_of(bad)))
    scored = score_all(task, protocol, items, seed)
    scores = {"task": task, "protocol": protocol, "seed": seed, **summary(task, scored)}
    if bad:
        scores["bad"] = len(bad)
    write(out, scores, records, scored)
    write_whole(out / "bad.txt", "".join(f"{line}\n" for line in bad))
    for line in first_of(bad):
        print(f"vlbench: left out: {line}", file=sys.stderr)
    told = [f"{len(bad)} of {len(bad) + len(items)} lines left out ({out / 'bad.txt'})"] * bool(bad)
    told += alike([record["id"] for record in records])
    lines = [*told, *table(scores, shown), "", *published(scores), "", f"wrote {out}"]
    print("\n".join(lines))
    return 0


def alike(ids: Sequence[object]) -> list[str]:
    """Return a line on ids that are there several times, [] if none is."""
    counts = Counter(map(str, ids))
    several = {name: number for name, number in counts.items() if number > 1}
    if not several:
        return []
    name, number = next(iter(several.items()))
    total = sum(several.values())
    return [f"{total} questions share {len(several)} ids ({name}: {number}); each counts by itself"]


def _scorable(
    task: str, protocol: str, records: list[Record], items: list[Item]
) -> tuple[list[Record], list[Item], list[str]]:
    """Leave out the items at which the benchmarks' code stops, and say why."""
    kept: list[tuple[Record, Item]] = []
    bad = []
    for record, item in zip(records, items, strict=True):
        try:
            score_all(task, protocol, [item])
            kept.append((record, item))
        except Mistake as mistake:
            bad.append(str(mistake))
    return [record for record, _ in kept], [item for _, item in kept], bad


def write(
    folder: Path, scores: dict[str, Any], records: list[Record], scored: list[Scored]
) -> None:
    """Write scores.json, and scored.jsonl: every line as it was, and what was made of it."""
    lines = json_lines(
        {
            **record,
            "prediction": plain(one.prediction),
            "correct": one.correct,
            "fallback": one.fallback,
        }
        for record, one in zip(records, scored, strict=True)
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "scored.jsonl", lines)
        write_whole(folder / "scores.json", json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise Mistake(f"out={folder} cannot be written ({error.strerror})") from error


def plain(prediction: Any) -> Any:
    """Return a prediction as JSON knows it: nan and inf, which it does not, as texts."""
    if isinstance(prediction, list):
        return [plain(value) for value in prediction]
    finite = not isinstance(prediction, float) or math.isfinite(prediction)
    return prediction if finite else str(prediction)


def table(scores: dict[str, Any], shown: str) -> Iterator[str]:
    """Return lines on all answers, types, domains and subjects, as the protocol prints them."""
    drawn, unread = scores["fallback"], scores["unread"]
    yield (
        f"{scores['task']}, protocol {scores['protocol']}, seed {scores['seed']}: "
        f"{drawn} answers drawn at random, {unread} more unreadable; "
        f"{(drawn + unread) / scores['n']:.1%} could not be read"
    )
    yield "     n  correct  accuracy  95 % interval"
    parts = [scores[f"by_{kind}"].items() for kind in ("type", "domain", "subject")]
    for name, group in [("all", scores), *chain(*parts)]:
        if group["n"]:
            low, high = group["interval"]
            accuracy = format(group["accuracy"], shown)
            yield (
                f"{group['n']:6}  {group['correct']:7}  {accuracy:>8}  {low:.3f} to {high:.3f}  "
                f"{name}"
            )


def published(scores: dict[str, Any]) -> Iterator[str]:
    """Return lines of published accuracies in percent: all, and the domains; these answers first.

    What is published was prompted in other ways and is of the whole set that its line names.
    """
    by_domain = [scores["by_domain"][domain] for domain in SUBJECTS[scores["task"]].domains]
    ours = [100 * one["accuracy"] if one["n"] else None for one in (scores, *by_domain)]
    yield f"percent: all, {', '.join(SUBJECTS[scores['task']].domains)}"
    yield _row(ours, "these answers")
    for name, known in yaml.safe_load(read_text(PUBLISHED))[scores["task"]].items():
        yield f"published, {name} ({known['source']})"
        for model, row in known["rows"].items():
            yield _row(row, model)


def _row(values: list[float | None], name: str) -> str:
    cells = [*values, *[None] * (7 - len(values))]
    return "".join("     -" if cell is None else f"{cell:6.1f}" for cell in cells) + f"  {name}"
