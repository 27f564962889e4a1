"""Ask a model many questions: batches of similar length, greedy answers, exact match."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from tqdm import tqdm

from vlbench.evaluate.heldout_questions import EvalQuestion
from vlbench.model.generation.answer_text import decode_answer
from vlbench.model.loaded_vlm import LoadedVLM

QUESTIONS_PER_BATCH = (
    64  # questions per batch; more gains nothing on two cores and takes memory for the cache
)
EXTRA_TOKENS = 4  # tokens beyond the longest true answer: what is longer is wrong anyway


def answer_questions(
    vlm: LoadedVLM,
    questions: Sequence[EvalQuestion],
    title: str,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Return the greedy answer to every question, [] if `stop` became true in between."""
    longest = max((len(vlm.tokenizer.encode(f" {q.answer}\n###")) for q in questions), default=0)
    lengths = [len(vlm.processor.encode_prompt(q.sample)) for q in questions]
    order = sorted(range(len(questions)), key=lengths.__getitem__)
    answers = [""] * len(questions)
    with tqdm(total=len(questions), desc=title, unit="question", disable=None) as bar:
        for first in range(0, len(order), QUESTIONS_PER_BATCH):
            if should_stop():
                return []
            chosen = order[first : first + QUESTIONS_PER_BATCH]
            batch = vlm.processor.collate_prompts([questions[i].sample for i in chosen])
            batch = batch.to(vlm.device)
            written = vlm.generate(batch, max_new_tokens=longest + EXTRA_TOKENS)
            for index, new in zip(chosen, written, strict=True):
                answers[index] = decode_answer(vlm.processor, new)
            bar.update(len(chosen))
    return answers


def exact_match_accuracy(questions: Iterable[EvalQuestion], answers: Iterable[str]) -> float:
    """Return the share of answers that equal the true one, word for word."""
    right = [q.answer == answer for q, answer in zip(questions, answers, strict=True)]
    return sum(right) / len(right)


def accuracy_by_group(
    questions: Sequence[EvalQuestion],
    answers: Sequence[str],
    group_of: Callable[[EvalQuestion], str],
) -> dict[str, float]:
    """Return the accuracy of each group of questions, sorted by the group's name."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        groups[group_of(question)].append(question.answer == answer)
    return {name: sum(right) / len(right) for name, right in sorted(groups.items()) if name}
