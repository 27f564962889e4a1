"""What the tokenizer and the chat template make of a conversation, in two languages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vlbench.check.supervision_audit import AuditSample, render_audit
from vlbench.command_line.arguments import TemplateName
from vlbench.config.model_schema import ModelConfig
from vlbench.config.stage_schema import StageConfig
from vlbench.data.sample import ChatTurn, Sample
from vlbench.data.sample_encoding import IGNORE_INDEX
from vlbench.data.scene_dataset import SceneConversations
from vlbench.data.scene_text import LANGUAGES
from vlbench.data.tokenizer import Tokenizer
from vlbench.errors import UserError, escape_to_one_line
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.weights.template_detection import brings_other_template
from vlbench.processor import Processor
from vlbench.text_tables import format_table

CONVERSATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "en": (
        (
            "What is in the picture?",
            "Two dogs, 3 red balls and a sign: 'Closed at 17:30'.",
        ),
        ("And how many people?", "None."),
    ),
    "zh": (
        ("图片里有什么？", "两只狗、三个红色的球，还有一块写着“17:30 关门”的牌子。"),
        ("有几个人？", "一个人也没有。"),
    ),
}
"""Questions and answers with what tokenizers treat apart: digits, quotes, wide punctuation."""
SCENES_SEARCHED = 64  # scenes from the first, among which each language is found


def choose_template(given: TemplateName, tokenizer: Tokenizer) -> tuple[TemplateName, str]:
    """Return the template for a tokenizer where nobody named one, and what to say of it.

    It is the tokenizer's own, in which its language model learned to answer, unless there is none,
    or it is the `given` one, or its answers cannot be found.
    """
    try:
        if not brings_other_template(given, tokenizer):
            return given, ""
    except UserError as error:
        return given, f"language.template={given}, as {error}"
    note = f"language.template=auto: the chat template that {tokenizer.folder} brings"
    return "auto", f"{note}; language.template={given} is Yi-VL's"


@dataclass(frozen=True)
class RoundTrip:
    """A conversation through template and tokenizer, and back."""

    language: str
    token_count: int
    supervised_count: int
    unknown_count: int
    """Tokens that stand for what the tokenizer does not know."""
    lost_answers: tuple[str, ...]
    """Answers that are not in the text of the supervised tokens."""
    learns_stop: bool
    """Whether every answer is followed by its end in what is learned."""

    @property
    def cautions(self) -> Iterator[str]:
        """What to think of before training."""
        if self.lost_answers:
            first = escape_to_one_line(self.lost_answers[0])
            yield f"{self.language}: '{first}' does not come back from the tokenizer as it was"
        if self.unknown_count:
            yield f"{self.language}: {self.unknown_count} tokens are unknown to the tokenizer"
        if not self.learns_stop:
            yield f"{self.language}: the end of an answer is not learned, so answers may not end"


def trip_conversations(processor: Processor) -> list[RoundTrip]:
    """Return what becomes of `CONVERSATIONS`, encoded as a chat stage does it.

    Raises:
        UserError: the template cannot write the conversation, or the model lacks its tokens.
    """
    return [_round_trip(processor, language) for language in CONVERSATIONS]


def _round_trip(processor: Processor, language: str) -> RoundTrip:
    exchanges = CONVERSATIONS[language]
    roles = ("human", "assistant")
    turns = (ChatTurn(roles[i], text) for pair in exchanges for i, text in enumerate(pair))
    tokenizer, encoder = processor.tokenizer, processor.sample_encoder("chat")
    encoded = encoder.encode(Sample(f"graft-{language}", tuple(turns), ()))
    answers = _learned_texts(encoded.labels, processor)
    lost = [
        answer
        for number, (_, answer) in enumerate(exchanges)
        if number >= len(answers) or answer not in answers[number]
    ]
    stop = processor.template.stop.strip()
    return RoundTrip(
        language=language,
        token_count=len(encoded.input_ids),
        supervised_count=encoded.supervised_token_count,
        unknown_count=encoded.input_ids.count(tokenizer.unk_token_id),
        lost_answers=tuple(lost),
        learns_stop=all(stop in answer for answer in answers),
    )


def _learned_texts(labels: list[int], processor: Processor) -> list[str]:
    """Return the text of each run of supervised tokens."""
    runs: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORE_INDEX:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [processor.tokenizer.decode(run, keep_special=True) for run in runs if run]


def text_lines(processor: Processor, trips: list[RoundTrip]) -> list[str]:
    """Return a table of the round trips."""
    rows = [("language", "tokens", "supervised", "answers come back", "their end is learned")]
    for trip in trips:
        back = "no" if trip.lost_answers or trip.unknown_count else "yes"
        counts = (str(trip.token_count), str(trip.supervised_count))
        rows.append((trip.language, *counts, back, "yes" if trip.learns_stop else "no"))
    tokenizer, stop = processor.tokenizer, escape_to_one_line(processor.template.stop)
    title = (
        f"text: template {processor.template.name}, answers end at '{stop}'; "
        f"{tokenizer.vocab_size:,} tokens"
    )
    return [title, *format_table(rows, "<>><")]


def render_page(
    config: ModelConfig, stages: Mapping[str, StageConfig], models: Mapping[str, LoadedVLM]
) -> str:
    """Return the page with the tokens that each stage supervises, in both languages."""
    samples = [_first_scene(language) for language in LANGUAGES]
    audited = [
        AuditSample(
            name,
            sample,
            vlm.processor.sample_encoder(stages[name].sample_format),
            vlm.processor.transform,
        )
        for name, vlm in models.items()
        for sample in samples
    ]
    settings = f"Rendered scenes, template {config.language.template}"
    tokenizer = next(iter(models.values())).tokenizer
    title = f"{config.vision.name}, {config.connector_name}, {config.language.weights}"
    return render_audit(audited, title, settings, tokenizer.decode)


def _first_scene(language: str) -> Sample:
    scenes = SceneConversations(seed=0, sample_count=SCENES_SEARCHED, question_count=2)
    for index in range(SCENES_SEARCHED):
        if scenes[index].language == language:
            return scenes[index]
    raise UserError(f"no scene in the language '{language}' among the first {SCENES_SEARCHED}")
