"""The page of a comparison: what it holds, what it says is missing, that it is one file."""

from __future__ import annotations

import html
import json
import math
import random
import re
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from vlbench.__main__ import main
from vlbench.compare.report.analysis import ComparisonResult, analyze_runs
from vlbench.compare.report.diagnostics import place_map
from vlbench.compare.report.finished_runs import load_finished_run
from vlbench.compare.report.html_report import MAX_ROW_LABEL, render_html, row_labels
from vlbench.compare.report.markdown_report import render_markdown
from vlbench.compare.report.question_examples import find_disagreements
from vlbench.compare.report.result_plots import accuracy_intervals_drawn, say_something
from vlbench.compare.report.row_costs import pareto_frontier
from vlbench.compare.report.svg_figure import widen_range
from vlbench.compare.report.training_curves import load_row_metrics, series_by_stage
from vlbench.config import recipe as recipes
from vlbench.data.scene_exam import held_out_questions

QUESTIONS = held_out_questions("new")[:60]
SEVERAL = (("a",), ("b", "connector.name=linear"))
EVIL = "<script>alert('x')</script> & \ud800"


def run(folder: Path, chance: float, seed: int, *words: str) -> Path:
    """Make a finished run about rendered scenes whose answers are right with `chance`."""
    folder.mkdir(parents=True)
    words = ("recipe=yivl_llava", f"seed={seed}", f"run={folder}", *words)
    recipes.save_recipe(recipes.load_recipe(list(words)), folder / "recipe.yaml")
    rng = random.Random(f"{seed} {words[3:]}")
    lines = []
    for one in QUESTIONS:
        right = rng.random() < chance
        lines.append(
            {
                "set": "accuracy",
                "id": one.id,
                "type": one.type,
                "language": one.language,
                "truth": one.answer,
                "answer": one.answer if right else EVIL,
                "correct": right,
            }
        )
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = {"asked_of": "new pictures", "seconds": 61.0 + seed, "blank_accuracy": 0.2}
    budget = {"parameters": 1000, "tokens": 64, "latents": 0, "flops": 10**9, "cache": 65536}
    (folder / "results.json").write_text(json.dumps({**results, "budget": budget}))
    return folder


def train(folder: Path, loss: float, *gates: str) -> None:
    """Give a run metrics of two stages."""
    header = ["stage", "step", "loss", "held_out_loss", "seconds", *gates]
    lines = [
        [stage, step, loss / step, loss if step % 20 == 0 else "", 1.5, *(0.1 for _ in gates)]
        for stage in ("align", "chat")
        for step in (10, 20, 30, 40)
    ]
    rows = [",".join(map(str, line)) for line in [header, *lines, ["chat", 50, "", "", ""]]]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")


def diagnose(folder: Path, **changes: object) -> None:
    """Give a run diagnostics of two questions."""
    flat = [[1 / 64] * 8] * 8
    maps = [
        {
            "id": one.id,
            "question": one.text,
            "answer": EVIL,
            "truth": one.answer,
            "grid": [8, 8],
            "relevance": relevance,
        }
        for one, relevance in zip(QUESTIONS, (flat, None), strict=False)
    ]
    attention = {"entropy": math.log(32), "uniform": math.log(64), "maps": [flat, flat]}
    found = {"maps": maps, "tokens": [0.25] * 4, "effective": 4.0, "attention": attention}
    (folder / "diagnostics.json").write_text(json.dumps({**found, **changes}))


@pytest.fixture(scope="module")
def findings(tmp_path_factory) -> ComparisonResult:
    home, folders = tmp_path_factory.mktemp("runs"), []
    for seed in range(3):
        folders.append(run(home / f"llava/{seed}", 0.85, seed))
        folders.append(run(home / f"linear/{seed}", 0.5, seed, "connector.name=linear"))
        train(folders[-2], 1.0 + seed, "gate_attn_0", "gate_ff_0")
    diagnose(folders[0])
    return analyze_runs([load_finished_run(folder) for folder in folders])


@pytest.fixture(scope="module")
def written(findings) -> str:
    return render_html(findings)


def text_of(written: str) -> str:
    """Return what a reader sees of a page, on one line."""
    without = re.sub(r"<(style|svg)\b.*?</\1>", " ", written, flags=re.DOTALL).replace("<wbr>", "")
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", without)).split())


def test_the_page_holds_what_the_markdown_holds(findings, written):
    seen = text_of(written)
    for cell in re.findall(r"[^|\n]+", render_markdown(findings).replace("`", "")):
        cell = cell.strip().removeprefix("- ").strip("*")
        if cell and not re.fullmatch(r"[-:]+|s|unseen|shuffled|#.*|What differs:", cell):
            assert cell in seen, cell
    for row in findings.rows:
        assert (
            f"{row.name} {row.accuracy:.3f} {row.interval_low:.3f} to {row.interval_high:.3f}"
            in seen
        )
    assert findings.verdict_sentence in seen and "llava_mlp answers 8" in seen


def test_it_is_one_file_and_the_same_every_time(findings, written):
    assert written == render_html(findings)
    targets = re.findall(r"""(?:src|href|action|data)\s*=\s*["']([^"']*)""", written)
    targets += re.findall(r"url\(([^)]*)\)", written) + re.findall(r"@import.*", written)
    assert targets and all(one.startswith(("#", "data:image/png;base64,")) for one in targets)
    ids = re.findall(r'\bid="([^"]+)"', written)
    assert len(ids) == len(set(ids))
    assert {one[1:] for one in targets if one.startswith("#")} <= set(ids)
    in_words = re.sub(r"base64,[^\"']*", "", written)  # which may hold any letters
    assert "NaN" not in in_words and " nan" not in text_of(written)
    assert 20_000 < len(written) < 5_000_000


def test_what_was_answered_cannot_become_part_of_the_page(written):
    assert "<script" not in written and "&lt;script&gt;alert(" in written


def test_the_plots_are_xml(written):
    drawn = re.findall(r"<svg id=.*?</svg>", written, re.DOTALL)
    assert len(drawn) == 2 + 2 * 8  # markers; plots, wide and narrow, gates and tokens among them
    for one in drawn:
        assert ElementTree.fromstring(one).get("viewBox")


def test_chinese_questions_and_their_images_are_there(written):
    shown = [one for one in QUESTIONS if one.text in written and one.language == "zh"]
    assert shown and "data:image/png;base64" in written


def test_chinese_names_in_plots_bring_no_warnings(tmp_path):
    """Of a font that the page does not use: text stays text."""
    folders = [run(tmp_path / name, 0.6, 0, *words) for name, *words in SEVERAL]
    for folder in folders:
        text = (folder / "answers.jsonl").read_text()
        (folder / "answers.jsonl").write_text(re.sub('"type": "[a-z]+"', '"type": "颜色"', text))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        page = render_html(analyze_runs([load_finished_run(folder) for folder in folders]))
    assert "颜色" in page and not any("Glyph" in str(one.message) for one in told)


def test_one_row_of_one_seed_without_anything_is_said(tmp_path):
    folder = run(tmp_path / "a", 0.5, 0)
    (folder / "results.json").write_text("{}")
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    bare = [{**line, "type": "", "language": "", "truth": "?"} for line in lines]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bare))
    seen = text_of(render_html(analyze_runs([load_finished_run(folder)])))
    for sentence in (
        "One seed: what another run would give is not known.",
        "There is no other row to compare it with.",
        "These runs have no losses in a metrics.csv.",
        "The questions have neither types nor languages.",
        "These runs do not say what they cost.",
        "There is one row only",
        "These runs have neither diagnostics.json nor answers without images.",
    ):
        assert seen.count(sentence) == 1
    # only what is there has a section, and an entry in the contents
    assert seen.count("Accuracy and differences") == seen.count("How it was made") == 2
    for title in ("Learning curves", "Cost against quality", "Wins and losses", "Diagnostics"):
        assert title not in seen
    assert "blank image" not in seen and "seeds' spread" not in seen


def test_what_some_rows_lack_is_said(written):
    seen = text_of(written)
    assert "Without metrics.csv, and so not drawn: linear." in seen
    assert "Without diagnostics.json: linear." in seen
    assert "no map: the answer does not depend on the image" in seen
    assert "32.0 of 64" in seen


def test_a_map_lies_where_the_model_saw_the_picture(tmp_path):
    """Not every model pads pictures to a square: some are squashed, cropped or cut into tiles."""
    folder = run(tmp_path / "a", 0.9, 0)
    diagnose(folder)
    file = folder / "diagnostics.json"
    told = json.loads(file.read_text())
    told["maps"][0]["box"] = [-0.5, 0, 1.5, 0.75]
    file.write_text(json.dumps(told))
    written = render_html(analyze_runs([load_finished_run(folder)]))
    assert written.count('<image x="-56" y="0" width="224" height="84"') == 2  # and attention
    told["maps"][0].pop("box")
    file.write_text(json.dumps(told))
    written = render_html(analyze_runs([load_finished_run(folder)]))
    assert written.count('<image x="0" y="0" width="112" height="112"') >= 2
    assert place_map(None, 160, 80) == {"x": "0", "y": "-40", "width": "160", "height": "160"}
    assert place_map([0, 0, 1, 1], 50, 160) == {"x": "0", "y": "0", "width": "50", "height": "160"}


def test_images_of_other_data_are_missing_and_that_is_said_once(tmp_path):
    words = ("data.train=gone.json", "data.val=gone.json")
    folders = [run(tmp_path / "a", 0.9, 0, *words)]
    folders += [run(tmp_path / "b", 0.5, 0, "connector.name=linear", *words)]
    written = render_html(analyze_runs([load_finished_run(folder) for folder in folders]))
    assert text_of(written).count("gone.json: there is no such file") == 1
    assert "data:image/png;base64" not in written and "new-" in text_of(written)


def versions(number: int) -> dict[str, Any]:
    """Return those of a run; the weights of its connector are its own."""
    shas = {"vision": "1" * 64, "connector": f"{number}" * 64, "language": f"{number}" * 64}
    weights = {part: {"source": "a", "sha256": sha} for part, sha in shas.items()}
    return {"torch": f"2.{number}", "peft": "1", "weights": weights}


def test_versions_questions_and_failures_are_warned_of(tmp_path):
    folders = [run(tmp_path / "a", 0.9, 0), run(tmp_path / "b", 0.5, 0, "connector.name=linear")]
    for number, folder in enumerate(folders):
        (folder / "versions.json").write_text(json.dumps(versions(number)))
    answers = (folders[0] / "answers.jsonl").read_text().splitlines()[:-3]
    (folders[0] / "answers.jsonl").write_text("\n".join(answers))
    results = json.loads((folders[1] / "results.json").read_text())
    results["budget"]["flops"] *= 2
    (folders[1] / "results.json").write_text(json.dumps(results))
    found = analyze_runs(
        [load_finished_run(folder) for folder in folders], {tmp_path / "c": "out of memory"}
    )
    for text in (render_markdown(found), text_of(render_html(found))):
        assert (
            "made with different versions: torch (2.0, 2.1); "
            "weights of language (0000000000, 1111111111)." in text
        )
        assert "Only 57 of up to 60 questions were asked of every run." in text
        assert "Not matched within 5%: prefill FLOPs." in text
        assert f"{tmp_path / 'c'}: out of memory" in text and "1 run failed" in text


def test_only_what_nothing_else_beats_is_on_the_frontier():
    points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.4), (2.0, 0.7), (4.0, 0.9), (5.0, 0.95)]
    assert pareto_frontier(points) == [1, 3, 0, 5]
    assert pareto_frontier([(1.0, 0.5), (1.0, 0.5)]) == [0, 1] and pareto_frontier([]) == []


def test_wins_are_the_questions_on_which_most_seeds_part(findings):
    better, worse = findings.rows
    for one, other in ((better, worse), (worse, better)):
        found = find_disagreements(one, other, findings.question_ids)
        won, lost = one.correct.sum(axis=0), other.correct.sum(axis=0)
        assert found.count == np.sum((won >= 2) & (lost <= 1))
        clearest = sorted(zip(lost - won, findings.question_ids, strict=True), key=lambda x: x[0])
        assert [case.question_id for case in found.shown][:1] == [clearest[0][1]]
        assert len(found.shown) == min(6, found.count)
        for case in found.shown:
            right = [
                [mark for _, marks in row.grouped_answers for mark in marks] for row in case.answers
            ]
            assert sum(right[0]) >= 2 and sum(right[1]) <= 1 and len(right[0]) == 3


def test_curves_are_means_over_seeds_stage_by_stage(findings):
    found = load_row_metrics(findings.rows[0])
    held_out = series_by_stage(found, "held_out_loss")
    assert list(held_out) == ["align", "chat"] and held_out["chat"].steps == [20, 40]
    assert held_out["chat"].mean == [2.0, 2.0]
    assert held_out["chat"].low == [1.0, 1.0] and held_out["chat"].high == [3.0, 3.0]
    assert series_by_stage(found, "loss")["align"].steps == [10, 20, 30, 40]


def test_the_verb_writes_both_forms(tmp_path, capsys):
    run(tmp_path / "a", 0.9, 0)
    words = ["report", str(tmp_path), f"out={tmp_path / 'r.md'}", f"out={tmp_path / 'r.html'}"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    written = f"\nwrote {tmp_path / 'r.md'}\nwrote {tmp_path / 'r.html'}\n"
    assert printed == (tmp_path / "r.md").read_text() + written
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out=r.pdf"], "out=r.pdf is no form of a report: out=FILE.md, out=FILE.html or"),
        (["out=r.md", "out=s.md"], "out=FILE.html and out=FILE.json once each"),
        (["out=nowhere/r.html"], "out=nowhere/r.html cannot be written"),
    ],
)
def test_mistakes_are_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "a", 0.9, 0)
    assert main(["report", "a", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_a_model_that_does_not_look_at_all_is_shown_without_its_tokens(tmp_path):
    folder = run(tmp_path / "a", 0.9, 0)
    diagnose(folder, tokens=None, effective=None, attention=None)
    text = render_html(analyze_runs([load_finished_run(folder)]))
    assert "Where the answer comes from" in text and "visual tokens are used" not in text


def test_diagnostics_that_are_none_are_a_mistake(tmp_path, capsys):
    diagnose(run(tmp_path / "a", 0.9, 0), tokens="all")
    assert main(["report", str(tmp_path), f"out={tmp_path / 'r.html'}"]) == 2
    assert (
        "diagnostics.json: tokens must be a list, as [a,b], given 'all'" in capsys.readouterr().err
    )


def test_rows_with_long_names_are_letters_with_a_legend(tmp_path):
    words = [("stages.chat.steps=7", "stages.align_224.steps=9"), ("connector.name=linear",), ()]
    folders = [run(tmp_path / str(index), 0.5, 0, *word) for index, word in enumerate(words)]
    findings = analyze_runs([load_finished_run(folder) for folder in folders])
    names = [row.name for row in findings.rows]
    assert max(map(len, names)) > MAX_ROW_LABEL
    written = render_html(findings)
    for letter, name in zip("ABC", names, strict=True):
        assert f"<b>{letter}</b> {name}</li>" in written
    drawn = "".join(re.findall(r"<svg id=.*?</svg>", written, re.DOTALL))
    assert "A over B" in drawn and not any(name in drawn for name in names)
    assert row_labels(["a", "b"]) == {"a": "a", "b": "b"}
    many = row_labels([f"{number:030}" for number in range(30)])
    assert list(many.values())[25:28] == ["Z", "AA", "AB"]


def test_intervals_that_say_nothing_are_a_sentence(tmp_path):
    folders = [
        run(tmp_path / f"{name}{seed}", chance + 0.2 * seed, seed, f"connector.name={name}")
        for name, chance in (("linear", 0.3), ("avgpool", 0.4))
        for seed in (0, 1)
    ]
    findings = analyze_runs([load_finished_run(folder) for folder in folders])
    assert not accuracy_intervals_drawn(findings.rows)
    seen = text_of(render_html(findings))
    assert "Intervals are not drawn: most of these, of 2 seeds, reach over more than half" in seen
    assert "Accuracy with its 95 % interval" not in seen
    assert say_something([(0.0, 1.0), (0.2, 0.3)]) and not say_something([(0.0, 1.0), (0.2, 0.9)])


def test_values_that_hardly_differ_look_so():
    assert widen_range(2.99, 3.01, 0.6) == pytest.approx((2.7, 3.3))
    assert widen_range(0.0, 10.0, 1.0) == pytest.approx((-0.5, 10.5))
    assert widen_range(0.98, 1.0, 0.2, 0.0, 1.0) == pytest.approx((0.8, 1.0))
    assert widen_range(0.0, 0.01, 0.2, 0.0, 1.0) == pytest.approx((0.0, 0.2))


def test_a_loss_that_hardly_moves_has_no_axis_of_its_noise(tmp_path):
    folder = run(tmp_path / "a", 0.5, 0)
    lines = [f"align,{step},{3 + step / 1000},,1.5" for step in (10, 20)]
    header = "stage,step,loss,held_out_loss,seconds"
    (folder / "metrics.csv").write_text("\n".join([header, *lines, "empty,1,,,1.5"]) + "\n")
    written = render_html(analyze_runs([load_finished_run(folder)]))
    drawn = re.findall(r'<svg id="plot-losses.*?</svg>', written, re.DOTALL)
    for one in drawn:
        ticks = [float(tick) for tick in re.findall(r">(\d\.\d+)</text>", one)]
        assert max(ticks) - min(ticks) > 0.4 and "empty" not in one
    assert len(drawn) == 2


def test_nothing_is_wider_than_a_telephone(written):
    body = re.sub(r"<svg.*?</svg>", "", written.partition("<body>")[2], flags=re.DOTALL)
    outside = re.sub(r'<div class="box".*?</div>', "", body, flags=re.DOTALL)
    assert "<table" in body and "<table" not in outside and "<img" not in outside
    style = written.partition("<style>")[2].partition("</style>")[0]
    for width in re.findall(r"(?<!max-)(?<!min-)\bwidth: ([\d.]+)(px|rem)", style):
        assert float(width[0]) * (16 if width[1] == "rem" else 1) < 360, width
    for one in re.findall(r'<svg id="plot-\w+(?:-\d+)?-narrow".*?viewBox="0 0 (\S+)', written):
        assert float(one) <= 72 * 3.7 + 1  # points: at most as wide as the telephone shows text
