"""Ask a model many questions: batches of similar length, greedy answers, exact match."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from tqdm import tqdm

from vlbench.evaluate.questions import Question
from vlbench.model.generate import answer_text
from vlbench.model.messages import prompt_batch, prompt_ids
from vlbench.model.vlm import VLM

ROWS = 64  # questions per batch; more gains nothing on two cores and takes memory for the cache
SPARE = 4  # tokens beyond the longest true answer: what is longer is wrong anyway


def ask(
    vlm: VLM, questions: Sequence[Question], title: str, stop: Callable[[], bool] = lambda: False
) -> list[str]:
    """Return the greedy answer to every question, [] if `stop` became true in between."""
    longest = max((len(vlm.tokenizer.encode(f" {q.answer}\n###")) for q in questions), default=0)
    lengths = [len(prompt_ids(vlm, q.sample)) for q in questions]
    order = sorted(range(len(questions)), key=lengths.__getitem__)
    answers = [""] * len(questions)
    with tqdm(total=len(questions), desc=title, unit="question", disable=None) as bar:
        for first in range(0, len(order), ROWS):
            if stop():
                return []
            chosen = order[first : first + ROWS]
            batch = prompt_batch(vlm, [questions[i].sample for i in chosen])
            written = vlm.generate(batch, max_new_tokens=longest + SPARE)
            for index, new in zip(chosen, written, strict=True):
                answers[index] = answer_text(vlm, new)
            bar.update(len(chosen))
    return answers


def accuracy(questions: Iterable[Question], answers: Iterable[str]) -> float:
    """Return the share of answers that equal the true one, word for word."""
    right = [q.answer == answer for q, answer in zip(questions, answers, strict=True)]
    return sum(right) / len(right)


def accuracy_by(
    questions: Sequence[Question], answers: Sequence[str], key: Callable[[Question], str]
) -> dict[str, float]:
    """Return the accuracy of each group of questions, sorted by the group's name."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        groups[key(question)].append(question.answer == answer)
    return {name: sum(right) / len(right) for name, right in sorted(groups.items()) if name}
