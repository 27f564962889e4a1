"""Questions at the end of a run that its model cannot be asked: left out, counted and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from random_vlm import NoiseImage, small_vlm

from vlbench.__main__ import main
from vlbench.connector import registry
from vlbench.data.image_tiling import ImageTiling
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample
from vlbench.data.view_layout import ViewSettings
from vlbench.evaluate.askable_questions import choose_questions, split_askable
from vlbench.evaluate.heldout_questions import EvalQuestion

ONLY = ["fit", "recipe=yivl_llava", "only=chat", "stages.chat.steps=0"]
QUIET = ["log.tensorboard=false", "log.questions=8", "log.examples=2"]


def question(name: str, size: tuple[int, int], text: str = "what?") -> EvalQuestion:
    turns = (ChatTurn("human", f"{IMAGE_PLACEHOLDER}\n{text}"),)
    sample = Sample(name, turns, (NoiseImage(size[0], size),), "en")
    return EvalQuestion(sample, "one", "", "en", "7")


def record(folder: Path, name: str, *texts: str, size: tuple[int, int] = (60, 40)) -> dict:
    Image.new("RGB", size, "red").save(folder / f"{name}.png")
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    return {"id": name, "image": f"{name}.png", "conversations": turns}


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_question_is_asked_if_it_fits_and_if_its_exchanged_image_does():
    tiling = ViewSettings(ImageTiling(4, "internvl"), "newline", max_views=3)
    processor = small_vlm(registry.load_connector("llava_mlp"), None, tiling).processor
    two_images = Sample(
        "two",
        (ChatTurn("human", f"{IMAGE_PLACEHOLDER}{IMAGE_PLACEHOLDER}\nwhat?"),),
        (NoiseImage(1), NoiseImage(2)),
        "en",
    )
    both = EvalQuestion(two_images, "one", "", "en", "3")
    asked = [both, question("wide", (56, 28)), question("huge", (112, 28))]
    asked.append(question("long", (28, 28), "what " * 5000))
    sets, skipped = choose_questions(processor, asked, [])
    assert [one.sample.id for one in sets["accuracy"]] == ["two", "wide"]
    assert [str(one).split(":")[0] for one in skipped["accuracy"]] == [
        "huge (record 7)",
        "long (record 7)",
    ]
    assert len(sets["blank_accuracy"]) == 2 and not skipped["blank_accuracy"]
    assert split_askable(processor, sets["blank_accuracy"])[0] == sets["blank_accuracy"]
    # the second of its images becomes the wide one, and that is a view too many
    assert [one.id for one in skipped["shuffled_accuracy"]] == ["two"]
    assert [one.sample.id for one in sets["shuffled_accuracy"]] == ["wide"]


@pytest.mark.parametrize(
    ("texts", "size", "words", "reason"),
    [
        (("<image>\n" + "long " * 9000, "red"), (60, 40), [], "tokens with its images"),
        (("<image>\nColour?", "red"), (900, 40), ["vision.tiling.max_views=3"], "views"),
    ],
)
def test_a_run_writes_its_results_without_the_questions_that_do_not_fit(
    texts, size, words, reason, tmp_path, capsys
):
    records = [
        record(tmp_path, "first", *texts, size=size),
        record(tmp_path, "fits", "<image>\nColour?", "red", "Sure?", "yes"),
    ]
    file, run = tmp_path / "data.json", tmp_path / "run"
    file.write_text(json.dumps(records))
    tiles = ["vision.tiling.tiles=4", *words] if words else []
    assert main([*ONLY, *QUIET, *tiles, f"data.train={file}", f"run={run}"]) == 0
    said = capsys.readouterr().out
    assert "accuracy: 1 of 3 questions cannot be asked and are left out (skipped.jsonl)" in said
    assert "(2 questions (1 more cannot be asked)," in said
    results = json.loads((run / "results.json").read_text())
    assert (results["questions"], results["skipped_questions"]) == (2, 1)
    assert {one["id"] for one in lines(run / "answers.jsonl")} == {"fits/1", "fits/3"}
    [skipped] = lines(run / "skipped.jsonl")
    assert (skipped["set"], skipped["id"], skipped["record"]) == ("accuracy", "first/1", "1")
    assert reason in skipped["reason"]


def test_a_run_of_which_nothing_can_be_asked_writes_the_rest_of_its_results(tmp_path, capsys):
    file, run = tmp_path / "data.json", tmp_path / "run"
    file.write_text(json.dumps([record(tmp_path, "a", "<image>\n" + "long " * 9000, "red")]))
    assert main([*ONLY, *QUIET, f"data.train={file}", f"run={run}"]) == 0
    assert "accuracy: 1 of 1 questions cannot be asked" in capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    assert (results["questions"], results["accuracy"]) == (0, None)
    assert results["budget"] and (run / "examples.png").is_file()
