"""The question of an image: which text it is, and that it is the same wherever an image is met."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_vlm import SMALL, NoiseImage, assert_later_images_are_cached, make_batch, make_sample
from torch import Tensor, nn

from vlbench.connector import registry
from vlbench.connector.base import Connector, Shapes
from vlbench.connector.bounded_building import build_connector
from vlbench.connector.question import Question
from vlbench.contract_checks.contract_table import CONTRACT
from vlbench.contract_checks.small_model import build_small_vlm, make_question
from vlbench.contract_checks.violations import ContractViolation
from vlbench.data.packing import collate
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample, read_questions
from vlbench.errors import UserError
from vlbench.evaluate.heldout_questions import EvalQuestion, blank_images, shuffle_images
from vlbench.model.generation import decoding_state
from vlbench.model.generation.decoding_state import CompiledDecodeStep
from vlbench.model.generation.kv_cache import PrefixCache
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.planner.meta_model import SampleShape, build_row_batch

INSTRUCT = "instruct_qformer"
IMAGE = IMAGE_PLACEHOLDER
SHAPES = Shapes(patches=4, grid=(2, 2), vision_width=32, lm_width=32, lm_layers=3)
CHECKS = {check.name: check for check in CONTRACT}


def small(name: str = INSTRUCT, **options: object) -> LoadedVLM:
    given = {**SMALL.get(name, {}), **options}
    return build_small_vlm(registry.load_connector(name), given).to(torch.float64)


def conversation(*human: str, system: str = "") -> Sample:
    turns = [ChatTurn("system", system)] if system else []
    for text in human:
        turns += [ChatTurn("human", text), ChatTurn("assistant", "an answer")]
    count = sum(text.count(IMAGE) for text in human)
    return Sample("s", tuple(turns), tuple(NoiseImage(n) for n in range(count)))


@pytest.mark.parametrize(
    ("human", "questions"),
    [
        ([f"{IMAGE}\nWhat is it?"], [("What is it?", 1)]),
        ([f" Compare {IMAGE}\nwith {IMAGE} ."], [("Compare with .", 2)]),
        (["Hello", f"{IMAGE}{IMAGE}", f"and {IMAGE}"], [("", 2), ("and", 1)]),
        (["text alone"], []),
    ],
)
def test_a_question_is_the_text_of_the_turn_that_shows_the_image(human, questions):
    sample = conversation(*human, system=f"{IMAGE} is no picture here")
    assert read_questions(sample.turns) == questions


@pytest.fixture(scope="module")
def vlm() -> LoadedVLM:
    return small()


def question_texts(vlm: LoadedVLM, batch) -> list[str]:
    return [vlm.tokenizer.decode(ids) for ids in batch.question_rows()]


def test_training_and_prompts_have_the_same_questions(vlm):
    sample = conversation(f"{IMAGE}{IMAGE} one", "no picture", f"{IMAGE}\n二 two")
    trained = make_batch(vlm, [[make_sample(1), sample]])
    asked = replace(sample, turns=sample.turns[:-1])
    prompts = vlm.processor.collate_prompts([asked, make_question(1)])
    assert question_texts(vlm, trained)[1:] == ["one", "one", "二 two"]
    assert prompts.question_rows() == trained.question_rows()[1:] + trained.question_rows()[:1]
    first = trained.question_rows()[0]
    assert vlm.tokenizer.decode(first).startswith("question 1 word")


def test_a_long_question_is_cut_and_a_cut_image_has_none():
    vlm = small(question_length=4)
    sample = conversation(f"{IMAGE} one two three four five six", f"{IMAGE} seven")
    whole = make_batch(vlm, [[sample]])
    assert whole.question_ids is not None and whole.question_ids.shape == (2, 4)
    encoder = vlm.processor.sample_encoder()
    ids = encoder.encode(sample).input_ids
    second_image = ids.index(-200, ids.index(-200) + vlm.connector.tokens_per_image)
    cut = replace(encoder, max_length=second_image).encode(sample)
    assert len(cut.sample.images) == len(cut.questions) == 1


def test_a_caption_stage_asks_nothing_and_another_connector_reads_nothing(vlm):
    encoder = vlm.processor.sample_encoder("caption")
    batch = collate([[encoder.encode(make_sample(1))]], lambda _: torch.zeros(3, 28, 28))
    assert batch.question_ids.tolist() == [[-1]]
    assert vlm(batch.to("cpu", torch.float64)).loss_sum.isfinite()
    plain = small("llava_mlp")
    assert make_batch(plain, [[make_sample(1)]]).question_ids is None
    assert plain.processor.collate_prompts([make_question(1)]).question_ids is None


def test_no_gradient_reaches_the_embeddings_through_the_question(vlm):
    _, question = vlm.model.connector_inputs(
        make_batch(vlm, [[make_sample(1, images=2)]]), torch.zeros(2, 5, 32).double()
    )
    assert vlm.model.token_embedding.weight.requires_grad
    assert not question.embeddings.requires_grad and question.embeddings.dtype == torch.float64
    assert question.lengths.tolist() == [len(question.embeddings[0])] * 2


def test_images_in_later_turns_are_cached_as_they_are_computed(vlm):
    assert_later_images_are_cached(vlm)


def test_the_same_image_with_another_question_is_not_taken_from_the_cache(vlm):
    def asked(text: str):
        content = [{"type": "image", "image": NoiseImage(3).open()}, {"type": "text", "text": text}]
        return vlm.prepare([{"role": "user", "content": content}])

    vlm.model.eval()
    past = PrefixCache()
    with torch.no_grad():
        first = past.encode_images(vlm.model, asked("what is it?"))
        second = past.encode_images(vlm.model, asked("where?"))
        assert not first.equal(second)
        assert second.equal(vlm.visual(asked("where?")))
    vlm.generate(asked("what is it?"), max_new_tokens=4, past=past)
    answer = vlm.generate(asked("where?"), max_new_tokens=4, past=past)
    assert answer == vlm.generate(asked("where?"), max_new_tokens=4)


def test_a_static_cache_gives_the_same_answers(vlm):
    vlm.model.eval()
    vlm.decode_step = CompiledDecodeStep()
    vars(vlm.decode_step)["_compiled_step"] = decoding_state._decode_step  # compiling takes seconds
    batch = vlm.processor.collate_prompts([make_question(1), make_question(2, images=2, words=9)])
    growing, compiled = (
        vlm.generate(batch, max_new_tokens=4, compiled=one) for one in (False, True)
    )
    assert compiled == growing


def test_cached_features_are_of_the_image_alone(vlm):
    one, other = (
        make_batch(vlm, [[conversation(f"{IMAGE} {text}")]]).to("cpu", torch.float64)
        for text in ("what is it?", "where?")
    )
    with torch.no_grad():
        features = vlm.features(one)
        assert features.equal(vlm.features(other))
        no_pixels = one.pixels.new_zeros(1, 3, 0, 0)
        known = [replace(batch, features=features, pixels=no_pixels) for batch in (one, other)]
        assert vlm.visual(known[0]).equal(vlm.visual(one))
        assert vlm.visual(known[1]).equal(vlm.visual(other))
        assert not vlm.visual(known[0]).equal(vlm.visual(other))


def test_controls_keep_the_question(vlm):
    asked = [EvalQuestion(make_question(n), "x", "", "en") for n in (1, 2)]
    plain, blank, shuffled = (
        vlm.processor.collate_prompts([one.sample for one in some]).question_rows()
        for some in (asked, blank_images(asked, (0.5, 0.5, 0.5)), shuffle_images(asked))
    )
    assert plain == blank == shuffled and plain[0] != plain[1]


def test_a_batch_without_questions_is_refused_in_one_line(vlm):
    batch = replace(make_batch(vlm, [[make_sample(1)]]), question_ids=None)
    with pytest.raises(UserError, match=r"reads the question of each image.*prepare\(\)"):
        vlm.visual(batch)


def test_another_image_size_keeps_the_questions():
    vlm = small()
    vlm.set_image_size(56)
    assert vlm.processor.question_length == 128
    assert len(vlm.processor.collate_prompts([make_question(1)]).question_rows()) == 1


def test_a_planned_row_has_questions_of_full_length(vlm):
    shape = SampleShape(40, 3, 3, 3 * vlm.connector.tokens_per_image, 5)
    row = build_row_batch(shape, vlm.connector, (3, 28, 28))
    assert [len(ids) for ids in row.question_rows()] == [128] * 3


@pytest.mark.parametrize("name", ["question", "text_alone", "generation"])
def test_mixed_passes_the_question_on(name):
    words = [f"{key}={value}" for key, value in SMALL[INSTRUCT].items()]
    vlm = small("mixed", tokens=INSTRUCT, options=tuple(words))
    assert vlm.connector.question_length == 128
    CHECKS[name].run_check(vlm)


class Asked(Connector):
    """A right connector that adds the mean of the question to each patch."""

    question_length = 16

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.tokens_per_image = shapes.patches
        self.into = nn.Linear(shapes.vision_width, shapes.lm_width)
        self.ask = nn.Linear(shapes.lm_width, shapes.lm_width)

    def forward(self, features: Tensor, question: Question) -> Tensor:
        return self.into(features) + self.ask(self.mean(question))[:, None]

    def mean(self, question: Question) -> Tensor:
        counts = question.lengths.clamp(min=1)[:, None]
        return (question.embeddings * question.mask[..., None]).sum(1) / counts


def wrong(mean: object) -> type[Connector]:
    return type("Wrong", (Asked,), {"mean": mean})


def masked_sum(question: Question) -> Tensor:
    return (question.embeddings * question.mask[..., None]).sum(1)


@pytest.mark.parametrize(
    ("mean", "words"),
    [
        (lambda _, question: question.embeddings.mean(1), "padding behind a question changes"),
        (lambda _, one: masked_sum(one).mean(0, True).expand(len(one.lengths), -1), "other images"),
        (lambda _, question: 0 * masked_sum(question), "do not depend on the question"),
        (lambda _, one: masked_sum(one) / one.lengths[:, None], "NaN or infinite"),
    ],
    ids=["padding", "others", "unread", "empty"],
)
def test_a_wrong_reader_of_questions_is_found(mean, words):
    CHECKS["question"].run_check(build_small_vlm(Asked).to(torch.float64))
    with pytest.raises(ContractViolation, match=words):
        CHECKS["question"].run_check(build_small_vlm(wrong(mean)).to(torch.float64))


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"question_length": 0}, "forward is given features alone.*set question_length"),
        ({"question_length": -1}, "question_length is -1; wanted is a whole number"),
        ({"question_length": True}, "question_length is True; wanted is a whole number"),
        ({"forward": lambda self, features: features}, "forward is given features and question"),
        ({"patch_attention": lambda self, features: None}, "patch_attention is given features and"),
    ],
)
def test_a_declaration_that_does_not_fit_forward_is_refused(attributes, words):
    with pytest.raises(ValueError, match=words):
        build_connector(type("Wrong", (Asked,), attributes), SHAPES, {})
