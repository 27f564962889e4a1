"""Where information goes in each family of questions, on features of which the truth is known."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from vlbench.compare.report.information_loss import LOSSES, losses_of_answers
from vlbench.config import recipe as recipes
from vlbench.data.picture_labels import LabelledPicture
from vlbench.data.scene_families import FAMILIES, list_picture_questions, make_pictures
from vlbench.data.scene_labels import question_evidence
from vlbench.data.scene_painting import LETTERS
from vlbench.data.scene_text import LANGUAGES
from vlbench.data.scene_world import COLOURS, SHAPES, RenderedScene
from vlbench.data.token_grid import TokenGrid
from vlbench.evaluate import information_probes
from vlbench.evaluate.heldout_questions import EvalQuestion, scene_questions
from vlbench.evaluate.information_probes import probe_information
from vlbench.evaluate.place_features import PlaceFeatures
from vlbench.evaluate.region_reading import attribute_accuracies, read_regions

WIDTH, GRID = 48, 8
CODES = {
    word: torch.randn(WIDTH, generator=torch.Generator().manual_seed(number))
    for number, word in enumerate((*COLOURS, *SHAPES, *LETTERS, "dot"))
}
NOISE = 0.3


def written_tokens(scene: RenderedScene) -> Tensor:
    """Return a token for each patch, in which the objects of a scene are written."""
    tokens = torch.zeros(GRID, GRID, WIDTH)
    for one in scene.objects:
        rows = columns = 1
        row, column = int(one.y * GRID / scene.side), int(one.x * GRID / scene.side)
        if scene.grid == 2:  # large ones, all over their quarter
            row, column = one.cell // 2 * 4, one.cell % 2 * 4
            rows = columns = 4
        covered = tokens[row : row + rows, column : column + columns]
        covered += CODES[one.colour] + CODES[one.shape] + one.has_dot * CODES["dot"]
    return tokens.flatten(0, 1)


def stand_in(monkeypatch, change, **connector) -> SimpleNamespace:
    """Return a stand-in of a model; `change` makes places of `[pictures, patches, width]`."""

    def compute(vlm, samples, should_stop=lambda: False) -> PlaceFeatures:
        generator = torch.Generator().manual_seed(len(samples))
        written = torch.stack([written_tokens(image) for one in samples for image in one.images])
        return PlaceFeatures(
            *(one + NOISE * torch.randn(one.shape, generator=generator) for one in change(written))
        )

    monkeypatch.setattr(information_probes, "compute_place_features", compute)
    monkeypatch.setattr(information_probes, "TRAINING_PICTURES", 200)
    monkeypatch.setattr(information_probes, "PICTURES_WITH_REGIONS", 120)
    monkeypatch.setattr(information_probes, "PICTURES_WITHOUT_PLACES", 200)
    options = {"replaces_image_tokens": True, "token_grid": (GRID, GRID), "latent_grid": None}
    return SimpleNamespace(
        connector=SimpleNamespace(**options | connector),
        processor=SimpleNamespace(view_layout=None, encode_prompt=lambda _: [1]),
        model=SimpleNamespace(vision=SimpleNamespace(grid=(GRID, GRID))),
    )


def asked_questions(families=FAMILIES) -> list[EvalQuestion]:
    """Return 40 questions of each family."""
    new = scene_questions("new")
    return [one for family in families for one in [q for q in new if q.family == family][:40]]


def probe(vlm, questions):
    stage_data = recipes.load_recipe(["recipe=yivl_llava"]).last_stage_data
    return probe_information(stage_data, vlm, questions)


def exchanged(written: Tensor):
    return (written.roll(1, 0),) * 3


def zeroed(written: Tensor):
    return written, torch.zeros_like(written), torch.zeros_like(written)


def kept(written: Tensor):
    return (written,) * 3


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (exchanged, "not in the encoder"),
        (zeroed, "lost in the connector"),
        (kept, "there but not used"),
    ],
)
def test_each_cause_is_found_in_each_family(change, cause, monkeypatch):
    """All answers are wrong: pictures exchanged in the encoder, tokens zeroed, or all there."""
    questions = asked_questions()
    told = probe(stand_in(monkeypatch, change), questions)
    read = {one["id"]: one["read"] for one in told["questions"]}
    assert told["not_probed"] == {}
    for family in FAMILIES:
        flags = np.array([read[one.sample.id] for one in questions if one.family == family])
        losses = losses_of_answers(np.zeros(len(flags), bool), flags.astype(bool))
        share = (losses == LOSSES.index(cause)).mean()
        # where one or two labels decide, chance reads some, at each of the three places
        assert share > (0.45 if family in ("gist", "many", "crowd") else 0.85), (family, share)
    control = np.array([one["control"] for one in told["questions"]])
    assert control.mean(0).max() < 0.2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_pictures_have_the_evidence_of_their_own_questions(family, language):
    """It is of the picture that is asked about, and each of its labels decides something."""
    for index in range(20):
        pictures = make_pictures(family, "test", 0, index, has_dot=family == "fine")
        assert all(isinstance(one, LabelledPicture) for one in pictures)
        for one in list_picture_questions(pictures, language):
            evidence = question_evidence(pictures, one.type, language, one.text)
            assert evidence
            assert all(pictures[e.picture].labels[e.label] in e.values for e in evidence)
            assert {e.picture for e in evidence} == {one.picture}
            counts = {"crowd": 1, "place": 4, "fine": 3, "glyphs": len(pictures[0].objects)}
            assert len(evidence) == counts.get(one.type, len(evidence))


def test_of_a_token_that_covers_two_letters_a_probe_reads_what_it_says_of_each_place():
    """Four patches side by side tell which letter is where; their mean does not."""
    (training, pictures) = (
        [make_pictures("glyphs", stream, 0, index)[0] for index in range(count)]
        for stream, count in (("fit", 700), ("asked", 60))
    )
    grid = TokenGrid.over_patches((4, 4), (GRID, GRID))
    assert grid == TokenGrid(4, 4, (2, 2))

    def blocks(scenes) -> Tensor:
        written = torch.stack([written_tokens(one) for one in scenes])
        written = written + NOISE * torch.randn(
            written.shape, generator=torch.Generator().manual_seed(len(scenes))
        )
        cut = written.unflatten(1, (4, 2, 4, 2)).transpose(2, 3)  # [scenes, 4, 4, 2, 2, width]
        return cut.flatten(3, 4).flatten(1, 2)

    shares = {}
    for name, join in (("shuffled", lambda x: x.flatten(2)), ("mean", lambda x: x.mean(2))):
        read, control = read_regions(
            join(blocks(training)), training, join(blocks(pictures)), pictures, grid
        )
        shares[name] = attribute_accuracies(read, pictures)["letter"]
        assert attribute_accuracies(control, pictures)["letter"] < 0.2
    assert shares["shuffled"] > 0.85 and shares["mean"] < 0.8


def test_an_object_of_a_crowd_is_found_by_what_the_question_names():
    """A mean of two objects says the colour of the star if it holds both as one thing."""
    (training, pictures) = (
        [make_pictures("crowd", stream, 0, index)[0] for index in range(count)]
        for stream, count in (("fit", 250), ("asked", 50))
    )
    pairs = {
        (colour, shape): torch.randn(200, generator=torch.Generator().manual_seed(number))
        for number, (colour, shape) in enumerate(product(COLOURS, SHAPES))
    }

    def means(scenes) -> Tensor:
        tokens = torch.zeros(len(scenes), 16, 200)
        for number, scene in enumerate(scenes):
            for one in scene.objects:
                token = int(one.y * 4 / scene.side) * 4 + int(one.x * 4 / scene.side)
                tokens[number, token] += pairs[one.colour_shape] / 4
        return tokens

    grid = TokenGrid.over_patches((4, 4), (GRID, GRID))
    read, control = read_regions(means(training), training, means(pictures), pictures, grid)
    wanted = [
        (number, evidence)
        for number, scene in enumerate(pictures)
        for one in list_picture_questions([scene], "en")
        for evidence in question_evidence([scene], one.type, "en", one.text)
    ]
    shares = [
        sum(values[number][one.label] in one.values for number, one in wanted) / len(wanted)
        for values in (read, control)
    ]
    assert shares[0] > 0.85 and shares[1] < 0.35


def test_tokens_without_places_are_not_blamed_for_what_their_probe_cannot_read(monkeypatch):
    """Behind learned queries probes have all tokens: they do not read small things anywhere."""

    def mixed(written: Tensor):
        turn = torch.randn(GRID**2, GRID**2, generator=torch.Generator().manual_seed(1)) / GRID
        return written, turn @ written, turn @ written

    questions = asked_questions(("crowd", "place", "glyphs"))
    told = probe(stand_in(monkeypatch, mixed, token_grid=None), questions)
    lost = [one for one in told["questions"] if one["read"] == [1, 0, 0]]
    assert len(lost) > 60
    assert sum(bool(one.get("unsure")) for one in lost) > 0.8 * len(lost)
    told = probe(stand_in(monkeypatch, mixed), questions)
    assert not any("unsure" in one for one in told["questions"])


def test_text_that_looks_at_injected_tokens_has_what_they_have(monkeypatch):
    """Keys and values of every patch have places; their latents' grid says which."""
    vlm = stand_in(
        monkeypatch, kept, replaces_image_tokens=False, token_grid=None, latent_grid=(GRID, GRID)
    )
    told = probe(vlm, asked_questions(("crowd", "place", "many")))
    assert told["reads_answers"]
    assert all(one["read"][1] == one["read"][2] for one in told["questions"])
    assert sum(one["read"][1] for one in told["questions"]) > 90


def test_families_that_training_hardly_has_are_named(monkeypatch):
    vlm = stand_in(monkeypatch, kept)
    monkeypatch.setattr(information_probes, "SEARCHED_SAMPLES", 400)
    told = probe(vlm, asked_questions())
    reasons = {reason: set(ids) for reason, ids in told["not_probed"].items()}
    crowd = {one.sample.id for one in asked_questions(("crowd",))}
    assert any(crowd <= ids and "100 needed" in reason for reason, ids in reasons.items())
    assert not crowd & {one["id"] for one in told["questions"]}
