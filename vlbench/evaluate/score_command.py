"""`python -m vlbench score`: what a file of answers to MMMU or CMMMU is worth, by a protocol."""

from __future__ import annotations

import sys
from pathlib import Path

from vlbench.command_line.arguments import ScoreArguments
from vlbench.errors import UserError
from vlbench.evaluate.tasks.answer_files import (
    describe_unanswered,
    first_errors,
    read_answers,
    read_truths,
)
from vlbench.evaluate.tasks.answer_formats import AnswerRecord
from vlbench.evaluate.tasks.benchmark_types import AnsweredItem
from vlbench.evaluate.tasks.score_report import (
    format_published,
    format_score_table,
    report_equal_ids,
    summarize_scores,
    write_score_files,
)
from vlbench.evaluate.tasks.scoring_protocols import score_items, scoring_protocol
from vlbench.text_files import write_for_people


def run_score(arguments: ScoreArguments) -> int:
    """Score the answers in a file, print a table, and write scores.json and scored.jsonl.

    Answers that cannot be scored are left out, named on standard error and in bad.txt, and counted.
    """
    task, protocol, seed = arguments.task, arguments.protocol, arguments.seed
    accuracy_format = scoring_protocol(task, protocol).accuracy_format
    if arguments.split and not arguments.data:
        raise UserError("split= is for data=, the questions of a file that holds ids alone")
    answers = Path(arguments.answers)
    out = Path(arguments.out or f"{answers}.scores")
    data, split = arguments.data, arguments.split or "val"
    truths = read_truths(task, data, split) if data else None
    # the code that came with Yi-VL compares letters, and needs no options
    records, items, errors = read_answers(task, answers, truths, needs_options=protocol != "yi")
    records, items, unscorable = _drop_unscorable(task, protocol, records, items)
    errors += unscorable
    if not items:
        raise UserError(*first_errors(errors))
    scored = score_items(task, protocol, items, seed)
    scores = {"task": task, "protocol": protocol, "seed": seed, **summarize_scores(task, scored)}
    if errors:
        scores["bad"] = len(errors)
    write_score_files(out, scores, records, scored)
    write_for_people(out / "bad.txt", "".join(f"{line}\n" for line in errors))
    for line in first_errors(errors):
        print(f"vlbench: left out: {line}", file=sys.stderr)
    lines = []
    if errors:
        total = len(errors) + len(items)
        lines.append(f"{len(errors)} of {total} lines left out ({out / 'bad.txt'})")
    unanswered = describe_unanswered(records, truths) if truths else ""
    lines += [unanswered] if unanswered else []
    lines += report_equal_ids([record["id"] for record in records])
    lines += format_score_table(scores, accuracy_format)
    lines += ["", *format_published(scores), "", f"wrote {out}"]
    print("\n".join(lines))
    return 0


def _drop_unscorable(
    task: str, protocol: str, records: list[AnswerRecord], items: list[AnsweredItem]
) -> tuple[list[AnswerRecord], list[AnsweredItem], list[str]]:
    """Return the records and items without those on which the reference fails, and the reasons."""
    kept: list[tuple[AnswerRecord, AnsweredItem]] = []
    errors = []
    for record, item in zip(records, items, strict=True):
        try:
            score_items(task, protocol, [item])
            kept.append((record, item))
        except UserError as error:
            errors.append(str(error))
    return [record for record, _ in kept], [item for _, item in kept], errors
