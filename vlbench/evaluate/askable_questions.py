"""The questions that a model can be asked: its processor can encode them.

What a question holds is known without a model. Whether it fits is not: it may have more tokens than
the language model has positions, more views than the model takes, turns that the chat template
refuses, or a token without an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlbench.errors import UserError
from vlbench.evaluate.batch_inference import SKIPPED_FILE
from vlbench.evaluate.heldout_questions import EvalQuestion, blank_images, shuffle_images
from vlbench.processor import Processor
from vlbench.text_files import format_json_lines, write_atomically


@dataclass(frozen=True)
class SkippedQuestion:
    """A question that a model cannot be asked, and why."""

    id: str
    record: str
    """Number of its record in the source, from 1; "" for a rendered scene."""
    reason: str

    def __str__(self) -> str:
        """Name it."""
        return f"{self.id}{f' (record {self.record})' if self.record else ''}: {self.reason}"


def split_askable(
    processor: Processor, questions: Sequence[EvalQuestion]
) -> tuple[list[EvalQuestion], list[SkippedQuestion]]:
    """Return the questions that can be encoded, and the others, both in their order."""
    askable: list[EvalQuestion] = []
    skipped: list[SkippedQuestion] = []
    for question in questions:
        try:
            processor.encode_prompt(question.sample)
        except UserError as error:
            one = SkippedQuestion(question.sample.id, question.record_number, str(error))
            skipped.append(one)
        else:
            askable.append(question)
    return askable, skipped


def choose_questions(
    processor: Processor, questions: Sequence[EvalQuestion], unseen: Sequence[EvalQuestion]
) -> tuple[dict[str, list[EvalQuestion]], dict[str, list[SkippedQuestion]]]:
    """Return what can be asked, and what cannot, by the name of its accuracy in the results.

    Blank images are as large as the images, and so fit where these do; exchanged ones may not.
    """
    askable, skipped = split_askable(processor, questions)
    sets = {
        "accuracy": (askable, skipped),
        "unseen_accuracy": split_askable(processor, unseen),
        "blank_accuracy": (blank_images(askable, processor.transform.mean), []),
        "shuffled_accuracy": split_askable(processor, shuffle_images(askable)),
    }
    return (
        {name: chosen for name, (chosen, _) in sets.items()},
        {name: left_out for name, (_, left_out) in sets.items()},
    )


def tell_skipped(
    question_sets: Mapping[str, Sequence[EvalQuestion]],
    skipped: Mapping[str, Sequence[SkippedQuestion]],
) -> None:
    """Print how many questions of each set are not asked, and the first of them."""
    for name, left_out in skipped.items():
        if left_out:
            count = len(left_out) + len(question_sets[name])
            print(
                f"{set_name(name)}: {len(left_out)} of {count} questions cannot be asked and are "
                f"left out ({SKIPPED_FILE}), the first: {left_out[0]}"
            )


def write_skipped(folder: Path, skipped: Mapping[str, Sequence[SkippedQuestion]]) -> None:
    """List what is not asked in SKIPPED_FILE of a run, a line each; no file where all is."""
    lines = [
        {"set": set_name(name), **vars(one)}
        for name, left_out in skipped.items()
        for one in left_out
    ]
    if lines:
        write_atomically(folder / SKIPPED_FILE, format_json_lines(lines))
    else:
        (folder / SKIPPED_FILE).unlink(missing_ok=True)


def set_name(accuracy_name: str) -> str:
    """Return the name of a set of questions in files."""
    return accuracy_name.removesuffix("_accuracy")
