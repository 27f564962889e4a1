"""Where information goes: labels, evidence, features of places, and what probes make of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from random_vlm import SMALL, NoiseImage, make_sample, open_gates, small_vlm
from torch import Tensor
from torch.nn.functional import one_hot

from vlbench.__main__ import main
from vlbench.compat.transformers_internals import decoder_layer_input
from vlbench.config import recipe as recipes
from vlbench.connector import registry
from vlbench.data.image_tiling import ImageTiling
from vlbench.data.picture_labels import LabelledPicture
from vlbench.data.sample import ChatTurn
from vlbench.data.sample_encoding import IMAGE_TOKEN_INDEX
from vlbench.data.scene_labels import question_evidence
from vlbench.data.scene_text import LANGUAGES, list_questions
from vlbench.data.scene_world import RenderedScene, make_scene
from vlbench.data.view_layout import ViewSettings
from vlbench.errors import UserError
from vlbench.evaluate import information_probes
from vlbench.evaluate.heldout_questions import EvalQuestion, scene_questions
from vlbench.evaluate.information_probes import (
    PicturesKind,
    pictures_kind,
    probe_information,
    training_questions,
)
from vlbench.evaluate.place_features import (
    PlaceFeatures,
    compute_place_features,
    have_equal_views,
)

SCENES = [make_scene("test", 0, index) for index in range(150)]
GIST = PicturesKind(SCENES[0].kind, False)


def gist_questions() -> list[EvalQuestion]:
    return [one for one in scene_questions("new") if one.family == "gist"]


def has_evidence(labels, evidence) -> bool:
    return all(labels[one.label] in one.values for one in evidence)


@pytest.mark.parametrize("language", LANGUAGES)
def test_evidence_decides_the_answer(language):
    """Another scene that has the evidence has the answer, if the question can be asked there."""
    for scene, other in pairwise(SCENES):
        asked_there = {(one.type, one.text): one.answer for one in list_questions(other, language)}
        for one in list_questions(scene, language):
            evidence = question_evidence([scene], one.type, language, one.text)
            assert evidence and has_evidence(scene.labels, evidence)
            if has_evidence(other.labels, evidence):
                assert asked_there.get((one.type, one.text), one.answer) == one.answer


@pytest.mark.parametrize(
    ("kind", "count"), [("colour", 2), ("shape", 2), ("count", 4), ("relation", 4)]
)
def test_evidence_is_what_a_question_names_and_asks_for(kind, count):
    for scene in SCENES:
        for one in list_questions(scene, "en"):
            if one.type == kind:
                assert len(question_evidence([scene], kind, "en", one.text)) == count


def test_a_text_that_is_no_question_about_a_scene_has_no_evidence():
    assert question_evidence(SCENES[:1], "colour", "en", "What is it?") == ()
    assert isinstance(SCENES[0], LabelledPicture)
    assert not isinstance(SimpleNamespace(name="a.jpg", open=None), LabelledPicture)


def test_probes_are_fitted_on_training_pictures_that_no_question_is_about():
    stage_data = recipes.load_recipe(
        ["recipe=yivl_llava", "seed=3", "data.samples=100"]
    ).last_stage_data
    fitted_on = training_questions(stage_data, set(), {GIST: 1000})[GIST]
    names = [one.sample.images[0].name for one in fitted_on]
    assert 20 <= len(fitted_on) < 100 and all("conversations-3-" in name for name in names)
    assert all(pictures_kind(one.sample) == GIST for one in fitted_on)
    assert not set(names) & {one.picture for one in scene_questions("new")}
    left = training_questions(stage_data, set(names[:1]), {GIST: 1000})[GIST]
    assert [one.sample.id for one in left] == [one.sample.id for one in fitted_on[1:]]
    assert all(one.sample.turns[-1].role == "human" and one.answer for one in fitted_on)


def test_probes_pass_over_samples_that_answer_nothing(monkeypatch):
    question = scene_questions("new")[0]
    unanswered = replace(question.sample, id="unanswered", turns=())
    answered = replace(
        question.sample,
        id="answered",
        turns=(*question.sample.turns, ChatTurn("assistant", question.answer)),
    )
    monkeypatch.setattr(information_probes, "open_stage_mixture", lambda _: [unanswered, answered])
    stage_data = recipes.load_recipe(["recipe=yivl_llava"]).last_stage_data
    [fitted_on] = training_questions(stage_data, set(), {GIST: 1000})[GIST]
    assert fitted_on.sample.id == "answered" and fitted_on.answer == question.answer


def written_labels(scene: RenderedScene, kept: tuple[str, ...]) -> Tensor:
    """Return features of a picture in which the labels of these names are written."""
    values = sorted({value for other in SCENES for value in other.labels.values()})
    codes = [
        one_hot(torch.tensor(values.index(value)), len(values)).float() * name.startswith(kept)
        for name, value in scene.labels.items()
    ]
    return torch.cat(codes)


def fake_model(monkeypatch, **kept: tuple[str, ...]) -> SimpleNamespace:
    """Let features of each place be known labels and noise, and return a stand-in of the model."""
    generator = torch.Generator().manual_seed(0)
    turns = torch.randn(13 * 8, 3 * 40, generator=generator)

    def compute(vlm, samples, should_stop=lambda: False) -> PlaceFeatures | None:
        def at(place: str) -> Tensor:
            written = torch.stack([written_labels(one.images[0], kept[place]) for one in samples])
            noise = torch.randn(len(samples), 3 * 40, generator=generator)
            return (written @ turns + noise).unflatten(1, (3, 40))

        return None if should_stop() else PlaceFeatures(*map(at, PlaceFeatures._fields))

    monkeypatch.setattr(information_probes, "compute_place_features", compute)
    monkeypatch.setattr(information_probes, "TRAINING_PICTURES", 300)
    return SimpleNamespace(
        connector=SimpleNamespace(replaces_image_tokens=True, token_grid=None, latent_grid=None),
        processor=SimpleNamespace(view_layout=None, encode_prompt=lambda _: [1]),
        model=SimpleNamespace(vision=SimpleNamespace(grid=(8, 8))),
    )


def read_by_type(told, questions) -> dict[str, list[float]]:
    """Return for each type of question the share that is read at each place."""
    read = {one["id"]: one["read"] for one in told["questions"]}
    shares = {}
    for kind in ("colour", "shape", "count", "position", "relation"):
        rows = [read[one.sample.id] for one in questions if one.type == kind]
        shares[kind] = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return shares


def test_information_is_found_up_to_the_place_where_it_is_removed(monkeypatch):
    everything = ("colour", "shape")
    vlm = fake_model(monkeypatch, encoder=everything, connector=everything, language=("shape",))
    questions = gist_questions()
    recipe = recipes.load_recipe(["recipe=yivl_llava"])
    told = probe_information(recipe.last_stage_data, vlm, questions)
    shares = read_by_type(told, questions)
    for kind in ("colour", "shape", "relation"):
        assert shares[kind][0] > 0.9 and shares[kind][1] > 0.9 and shares[kind][2] < 0.5
    assert told["labels"]["gist"]["language"]["shape of cell 2"] > 0.9
    assert told["labels"]["gist"]["connector"]["colour of cell 2"] > 0.9
    assert told["labels"]["gist"]["language"]["colour of cell 2"] < 0.5
    control = torch.tensor([one["control"] for one in told["questions"]]).double()
    assert float(control.mean(0).max()) < 0.25
    assert told["places"] == {"encoder": [3, 40], "connector": [3, 40], "language": [3, 40]}
    assert told["training_pictures"] == {"gist": 300} and told["neighbours"]["pictures"] == 300


def test_a_position_that_the_connector_forgets_is_lost_there(monkeypatch):
    """Behind the connector, only the quarters above are left."""
    above = ("colour of cell 0", "colour of cell 1", "shape of cell 0", "shape of cell 1")
    everything = ("colour", "shape")
    vlm = fake_model(monkeypatch, encoder=everything, connector=above, language=above)
    monkeypatch.setattr(information_probes, "MIN_QUESTIONS", 50)
    questions = [one for one in gist_questions() if one.type == "position"]
    told = probe_information(
        recipes.load_recipe(["recipe=yivl_llava"]).last_stage_data, vlm, questions
    )
    read = {one["id"]: one["read"] for one in told["questions"]}
    is_above = ["top" in one.answer or "上" in one.answer for one in questions]
    for expected, where in ((0.9, True), (0.35, False)):
        rows = [
            read[q.sample.id] for q, one in zip(questions, is_above, strict=True) if one is where
        ]
        kept = sum(row[1] for row in rows) / len(rows)
        assert kept > expected if where else kept < expected
        assert sum(row[0] for row in rows) / len(rows) > 0.9


def test_too_few_questions_or_too_large_features_are_not_probed(monkeypatch):
    everything = ("colour", "shape")
    places = dict.fromkeys(PlaceFeatures._fields, everything)
    vlm = fake_model(monkeypatch, **places)
    recipe, questions = recipes.load_recipe(["recipe=yivl_llava"]), gist_questions()
    told = probe_information(recipe.last_stage_data, vlm, questions[:99])
    assert told == {"left_out": "99 questions are about rendered scenes, 100 needed"}
    assert probe_information(recipe.last_stage_data, vlm, questions[:100], lambda: True) == {}
    monkeypatch.setattr(information_probes, "MAX_FEATURE_BYTES", 1 << 16)
    told = probe_information(recipe.last_stage_data, vlm, questions[:100])
    assert told["left_out"].startswith("the features of 400 pictures take more than")


def test_probes_are_not_fitted_on_what_the_model_cannot_be_asked(monkeypatch):
    def refuse(sample):
        raise UserError("the conversation has too many views")

    vlm = fake_model(monkeypatch, **dict.fromkeys(PlaceFeatures._fields, ("colour", "shape")))
    vlm.processor.encode_prompt = refuse
    stage_data = recipes.load_recipe(["recipe=yivl_llava"]).last_stage_data
    told = probe_information(stage_data, vlm, gist_questions()[:100])
    assert told["left_out"].startswith("the training has 0 pictures of the kind")


@pytest.mark.parametrize("name", ["llava_mlp", "flamingo", "mixed"])
def test_features_of_a_place_do_not_depend_on_the_batch(name, monkeypatch):
    vlm = open_gates(small_vlm(registry.load_connector(name), SMALL.get(name)))
    samples = [make_sample(number, images) for number, images in enumerate((1, 2, 1), 1)]
    samples = [replace(one, turns=one.turns[:1]) for one in samples]
    together = compute_place_features(vlm, samples)
    alone = [compute_place_features(vlm, [one]) for one in samples]
    for place, expected in zip(together, map(torch.cat, zip(*alone, strict=True)), strict=True):
        assert torch.allclose(place, expected, atol=1e-5)
    injects = not vlm.connector.replaces_image_tokens
    assert len(together.encoder) == len(together.connector) == 4
    assert together.language.shape[:2] == ((3, 1) if injects else together.connector.shape[:2])
    assert compute_place_features(vlm, samples, lambda: True) is None


@pytest.mark.parametrize("name", ["llava_mlp", "flamingo"])
def test_what_is_read_in_the_language_model_is_at_its_places(name):
    vlm = open_gates(small_vlm(registry.load_connector(name), SMALL.get(name)))
    sample = make_sample(1, 1)
    sample = replace(sample, turns=sample.turns[:1])
    batch, model = vlm.processor.collate_prompts([sample]), vlm.model.eval()
    features = compute_place_features(vlm, [sample])
    with torch.no_grad():
        visual = model.encode_images(batch)
        last = model.hidden_states(batch, visual)
        layers = model.language.model.layers
        seen: list[Tensor] = []
        hook = layers[len(layers) // 2].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(decoder_layer_input(args, kwargs)),
            with_kwargs=True,
        )
        assert torch.equal(model.hidden_states(batch, visual), last)
        hook.remove()
    at_images = batch.input_ids[0] == IMAGE_TOKEN_INDEX
    expected = seen[0][0][at_images] if name == "llava_mlp" else last[0, -1:]
    assert features is not None
    assert torch.allclose(features.language[0], expected, atol=1e-6)
    assert all(not layer._forward_pre_hooks for layer in layers) or name == "flamingo"


@pytest.mark.parametrize("name", ["llava_mlp", "flamingo"])
def test_features_of_a_tiled_picture_are_those_of_its_views(name):
    vlm = small_vlm(registry.load_connector(name), SMALL.get(name), ViewSettings(ImageTiling(4)))
    asked = [replace(make_sample(n, 2), turns=make_sample(n, 2).turns[:1]) for n in (1, 2)]
    assert have_equal_views(vlm, asked)
    features = compute_place_features(vlm, asked)
    batch = vlm.processor.collate_prompts(asked)
    assert len(batch.pixels) == 4 * 3  # of each picture three views
    with torch.no_grad():
        encoded, visual = vlm.features(batch), vlm.visual(batch)
    assert torch.allclose(features.encoder, encoded.reshape(4, 3 * 4, 32), atol=1e-5)
    assert torch.allclose(features.connector, visual.reshape(4, -1, visual.shape[2]), atol=1e-5)
    positions = len(batch.visual_index) // 4
    expected = (2, 1, 32) if name == "flamingo" else (4, positions, 32)
    assert features.language.shape == expected
    larger = replace(asked[0], images=(NoiseImage(1), NoiseImage(2, (90, 20))))
    assert not have_equal_views(vlm, [larger])


def test_answers_are_read_where_the_image_has_no_position_of_its_own(monkeypatch):
    """The label is then the answer: it is read if it can be told from the last position alone."""
    vlm = fake_model(monkeypatch, encoder=(), connector=(), language=())
    vlm.connector.replaces_image_tokens = False
    answers: list[str] = []
    compute = information_probes.compute_place_features

    def with_answers(vlm, samples, should_stop=lambda: False):
        features = compute(vlm, samples)
        truth = {
            q.sample.id: q.answer
            for q in [
                *questions,
                *training_questions(recipe.last_stage_data, set(), {GIST: 1000})[GIST],
            ]
        }
        answers.extend(sorted(set(truth.values()) - set(answers)))
        codes = torch.tensor([answers.index(truth[one.id]) for one in samples])
        return features._replace(language=one_hot(codes, 64)[:, None].float())

    monkeypatch.setattr(information_probes, "compute_place_features", with_answers)
    questions = gist_questions()[:200]
    recipe = recipes.load_recipe(["recipe=yivl_llava"])
    told = probe_information(recipe.last_stage_data, vlm, questions)
    assert told["reads_answers"] and told["labels"]["gist"]["language"]["answer"] > 0.95
    assert sum(one["read"][2] for one in told["questions"]) > 190
    assert sum(one["read"][1] for one in told["questions"]) < 60


@pytest.mark.slow
def test_a_run_holds_what_its_probes_found(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(information_probes, "TRAINING_PICTURES", 120)
    monkeypatch.setattr(information_probes, "MIN_QUESTIONS", 12)
    monkeypatch.setattr(information_probes, "PICTURES_WITH_REGIONS", 120)
    words = [
        "fit",
        "recipe=yivl_llava",
        "only=chat",
        "stages.chat.steps=0",
        "log.tensorboard=false",
        "log.questions=100",
        f"run={tmp_path / 'run'}",
    ]
    file = tmp_path / "run/information.json"
    assert main(words) == 0 and not file.is_file()
    results = (tmp_path / "run/results.json").read_bytes()
    assert main([*words, "log.information_probes=true"]) == 0  # a finished run has none yet
    assert (tmp_path / "run/results.json").read_bytes() == results
    told = json.loads(file.read_text(encoding="utf-8"))
    assert len(told["questions"]) == 100 and told["not_probed"] == {}
    assert set(told["labels"]) == {"gist", "crowd", "fine and place", "glyphs", "many"}
    assert all(set(places) == set(told["places"]) for places in told["labels"].values())
    assert told["labels"]["crowd"]["encoder"]["colour"] > 0.8
    shutil.rmtree(tmp_path / "run/checkpoints")
    file.unlink()
    assert main([*words, "log.information_probes=true"]) == 2
    assert "its last checkpoint is gone" in capsys.readouterr().err
